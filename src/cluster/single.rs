//! The cluster of a weir that has only one node.

use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    time::{SystemTime, UNIX_EPOCH},
};

use futures_util::future::{BoxFuture, ready};

use super::{
    Claim, ClaimError, Cluster, ClusterMembers, Inbox, Lease, MessageKind, MonotonicClock, NodeId, Priority, Roster,
    SendOutcome,
    change_queue::ChangeQueue,
    lease::{LeaseBackend, LeaseState},
};

/// Every claim succeeds. Fencing tokens start at the time of day in microseconds, so that they also increase across
/// restarts.
pub fn single_node() -> Arc<dyn Cluster> {
    let micros = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_micros() as u64;
    Arc::new(SingleNode { fence: AtomicU64::new(micros), clock: MonotonicClock::real() })
}

struct SingleNode {
    fence: AtomicU64,
    clock: MonotonicClock,
}

struct UnsharedLeases;

impl Cluster for SingleNode {
    fn members(&self) -> ClusterMembers {
        ChangeQueue::new().0
    }

    fn claim(&self, name: &str, claim: Claim) -> BoxFuture<'static, Result<Lease, ClaimError>> {
        let fence = match claim {
            Claim::Shared => 0,
            Claim::Exclusive => self.fence.fetch_add(1, Relaxed) + 1,
        };
        let lease = LeaseState::new(name.into(), claim, fence, self.clock.clone(), u64::MAX);
        Box::pin(ready(Ok(Lease::new(lease, Arc::new(UnsharedLeases)))))
    }

    fn roster(&self, _: &str) -> Roster {
        ChangeQueue::new().0
    }

    fn send(&self, _: NodeId, _: MessageKind, _: Priority, _: &[u8]) -> SendOutcome {
        SendOutcome::NoSuchNode
    }

    fn inbox(&self, _: MessageKind) -> Inbox {
        Inbox::new().0
    }

    fn is_leader(&self) -> bool {
        true
    }

    fn is_isolated(&self) -> bool {
        false
    }

    fn leave(&self) -> BoxFuture<'static, ()> {
        Box::pin(ready(()))
    }
}

impl LeaseBackend for UnsharedLeases {
    fn info_changed(&self, _: &Arc<LeaseState>) {}

    fn release(&self, _: &Arc<LeaseState>) {}

    fn is_single_node(&self) -> bool {
        true
    }
}
