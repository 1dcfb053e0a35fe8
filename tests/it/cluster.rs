//! Members, leases and rosters of several nodes in one process, under a clock that only the test advances.

mod links;

use std::sync::{
    Arc,
    atomic::{AtomicU64, Ordering::SeqCst},
};

use futures_util::FutureExt;
use weir::cluster::{Claim, ClaimError, Cluster, ClusterMember, Lease, MonotonicClock};

use crate::support::test_network::{TTL, TestNetwork, TestNode};

struct TestCluster {
    net: Arc<TestNetwork>,
    now: Arc<AtomicU64>,
}

impl TestCluster {
    fn new() -> Self {
        let now = Arc::new(AtomicU64::new(1_000));
        TestCluster { net: TestNetwork::new(MonotonicClock::Manual(now.clone())), now }
    }

    fn advance(&self, ms: u64) {
        self.now.fetch_add(ms, SeqCst);
        self.net.beat();
    }
}

fn claim(node: &TestNode, name: &str, how: Claim) -> Result<Lease, ClaimError> {
    node.claim(name, how).now_or_never().unwrap()
}

#[test]
fn names_are_shared_or_exclusive_and_fencing_tokens_increase() {
    let cluster = TestCluster::new();
    let (a, b) = (cluster.net.join(), cluster.net.join());
    let (one, two) = (claim(&a, "x", Claim::Shared).unwrap(), claim(&b, "x", Claim::Shared).unwrap());
    assert_eq!(claim(&a, "x", Claim::Exclusive).err(), Some(ClaimError::Held(vec![b.id()])));
    drop(two);
    let own = claim(&a, "x", Claim::Exclusive).unwrap();
    drop(one);
    assert_eq!((own.fence(), own.is_valid()), (Some(1), true), "dropping the replaced lease releases nothing");
    assert_eq!(claim(&b, "x", Claim::Shared).err(), Some(ClaimError::Held(vec![a.id()])));
    drop(own);
    assert_eq!(cluster.net.names(), 0);
    assert_eq!(claim(&b, "x", Claim::Exclusive).unwrap().fence(), Some(2));
    assert_eq!((a.leases(), b.leases(), cluster.net.names()), (0, 0, 0));
}

#[test]
fn an_exclusive_lease_is_invalid_before_it_expires_and_valid_again_if_unclaimed() {
    let cluster = TestCluster::new();
    let (a, b) = (cluster.net.join(), cluster.net.join());
    let own = claim(&a, "x", Claim::Exclusive).unwrap();
    for _ in 0..5 {
        cluster.advance(3_000);
        assert!(own.is_valid());
    }
    a.cut(true);
    cluster.advance(TTL - 2_001);
    assert!(own.is_valid());
    cluster.advance(1);
    assert!(!own.is_valid() && !own.is_lost());
    assert!(matches!(claim(&b, "x", Claim::Exclusive), Err(ClaimError::Held(_))));
    a.cut(false);
    cluster.advance(0);
    assert!(own.is_valid());
    a.cut(true);
    cluster.advance(TTL);
    let other = claim(&b, "x", Claim::Exclusive).unwrap();
    assert_eq!(other.fence(), Some(2));
    a.cut(false);
    let before = a.id();
    cluster.advance(0);
    assert!(own.is_lost() && !own.is_valid() && other.is_valid());
    assert_ne!(a.id(), before, "it joins under a new id");
    drop(own);
    assert!(other.is_valid() && cluster.net.names() == 1);
}

#[test]
fn members_and_rosters_reach_all_nodes() {
    let cluster = TestCluster::new();
    let a = cluster.net.join();
    let (members, roster) = (a.members(), a.roster("s:"));
    let b = cluster.net.join();
    assert_eq!(members.take(), [ClusterMember { node: b.id(), up: true }]);
    let lease = claim(&b, "s:x", Claim::Shared).unwrap();
    let hidden = claim(&b, "other", Claim::Shared).unwrap();
    hidden.set_info(Some("no".into()));
    assert_eq!(roster.take(), []);
    lease.set_info(Some("1".into()));
    lease.set_info(Some("2".into()));
    let entries = roster.take();
    assert_eq!((entries.len(), entries[0].info.as_deref()), (1, Some(&b"2"[..])));
    assert_eq!(a.roster("s:").take(), entries, "a new roster starts with the present entries");
    drop(lease);
    assert!(roster.take()[0].info.is_none());
    cluster.net.kill(&b);
    cluster.advance(TTL - 1);
    assert_eq!(members.take(), []);
    cluster.advance(1);
    assert_eq!(members.take(), [ClusterMember { node: b.id(), up: false }]);
}
