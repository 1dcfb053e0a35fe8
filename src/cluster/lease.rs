//! [`Lease`]: a name that this node holds.

use std::sync::{
    Arc,
    atomic::{AtomicBool, AtomicU64, Ordering::SeqCst},
};

use bytes::Bytes;
use parking_lot::Mutex;
use tokio::sync::Notify;

use super::{clock::MonotonicClock, node_id::NodeId};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Claim {
    Shared,
    /// The fencing token is higher than that of every earlier holder, restarts included.
    Exclusive,
}

/// The reason why a name could not be claimed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ClaimError {
    /// The nodes that hold the name, or died less than a lease ago.
    Held(Vec<NodeId>),
    /// Other nodes cannot be reached.
    Unreachable,
}

/// A name held by this node. Dropping it releases the name.
#[must_use = "dropping a lease releases the name"]
pub struct Lease {
    state: Arc<LeaseState>,
    backend: Arc<dyn LeaseBackend>,
}

/// A lease, as the holder and the backend share it.
pub struct LeaseState {
    pub name: Arc<str>,
    pub claim: Claim,
    /// The fencing token of an exclusive name; 0 for a shared one.
    pub fence: u64,
    clock: MonotonicClock,
    /// The expiry of an exclusive lease in milliseconds of `clock`, less a safety margin. Each renewal extends it.
    until: AtomicU64,
    lost: AtomicBool,
    changed: Notify,
    info: Mutex<Option<Bytes>>,
}

/// The backend that keeps a lease.
pub trait LeaseBackend: Send + Sync {
    /// [`LeaseState::info`] has changed and is to be published to other nodes.
    fn info_changed(&self, lease: &Arc<LeaseState>);

    /// The lease was dropped. A newer lease of the same name, if there is one, is unaffected.
    fn release(&self, lease: &Arc<LeaseState>);

    /// Whether there can be no other nodes, so that nothing has to be published.
    fn is_single_node(&self) -> bool {
        false
    }
}

impl Lease {
    pub fn new(state: Arc<LeaseState>, backend: Arc<dyn LeaseBackend>) -> Self {
        Lease { state, backend }
    }

    /// The fencing token of an exclusive name.
    pub fn fence(&self) -> Option<u64> {
        (self.state.claim == Claim::Exclusive).then_some(self.state.fence)
    }

    pub(crate) fn claim(&self) -> Claim {
        self.state.claim
    }

    /// Whether the name is certainly held at this moment. While other nodes cannot be reached, an exclusive lease becomes
    /// invalid before another node can claim the name, and valid again later if none did.
    pub fn is_valid(&self) -> bool {
        self.state.is_valid()
    }

    /// Whether the lease is invalid for good: another node holds the name, or may have held it.
    pub fn is_lost(&self) -> bool {
        self.state.is_lost()
    }

    /// Waits until the lease is lost.
    pub(crate) async fn lost(&self) {
        while !self.is_lost() {
            let changed = self.state.changed.notified();
            if self.is_lost() {
                return;
            }
            changed.await;
        }
    }

    /// Sets what other nodes see in their rosters. `None`, the default, hides the name.
    pub fn set_info(&self, info: Option<Bytes>) {
        if self.backend.is_single_node() || *self.state.info.lock() == info {
            return;
        }
        *self.state.info.lock() = info;
        self.backend.info_changed(&self.state);
    }

    /// Whether there can be no other nodes.
    pub(crate) fn is_single_node(&self) -> bool {
        self.backend.is_single_node()
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        self.backend.release(&self.state);
    }
}

impl LeaseState {
    /// `until`: milliseconds of `clock`; `u64::MAX` for a lease that does not expire.
    pub fn new(name: Arc<str>, claim: Claim, fence: u64, clock: MonotonicClock, until: u64) -> Arc<Self> {
        Arc::new(LeaseState {
            name,
            claim,
            fence,
            clock,
            until: AtomicU64::new(until),
            lost: AtomicBool::new(false),
            changed: Notify::new(),
            info: Mutex::default(),
        })
    }

    fn is_valid(&self) -> bool {
        !self.is_lost() && {
            let until = self.until.load(SeqCst);
            // Saves reading the clock, which the call path would notice.
            until == u64::MAX || self.clock.now() < until
        }
    }

    pub fn is_lost(&self) -> bool {
        self.lost.load(SeqCst)
    }

    pub fn renew(&self, until: u64) {
        self.until.store(until, SeqCst);
    }

    pub fn mark_lost(&self) {
        self.lost.store(true, SeqCst);
        self.changed.notify_waiters();
    }

    pub fn info(&self) -> Option<Bytes> {
        self.info.lock().clone()
    }
}
