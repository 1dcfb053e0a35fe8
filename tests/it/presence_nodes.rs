//! Presence of several nodes that share a log, in one process and under a clock of leases that only the test advances.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::SeqCst},
    },
    time::{Duration, Instant},
};

use serde_json::Value;
use tokio::task::JoinHandle;
use weir::{
    backend::memory,
    bus::{self, Bus, ReadLimit, WallClock},
    channel::Channel,
    cluster::MonotonicClock,
    metrics::Metrics,
    position::Start,
    presence::{Presence, PresenceLease, PresentClient},
};

use crate::support::test_network::{TestNetwork, TestNode};

const PATIENCE: Duration = Duration::from_secs(20);

struct PresenceCluster {
    net: Arc<TestNetwork>,
    time: Arc<AtomicU64>,
    /// Number of rounds in which messages were carried and memberships renewed.
    rounds: Arc<AtomicU64>,
    bus: Arc<Bus>,
    nodes: Vec<PresenceNode>,
    carrier: JoinHandle<()>,
}

struct PresenceNode {
    node: Arc<TestNode>,
    presence: Arc<Presence>,
    run: JoinHandle<()>,
}

/// The announcements in the log, and their result.
#[derive(Debug, Default)]
struct AnnouncementLog {
    members: BTreeMap<String, Value>,
    joins: Vec<String>,
    leaves: Vec<String>,
    ended: usize,
}

impl PresenceCluster {
    fn start(count: usize) -> Self {
        let bus = Arc::new(memory::bus(bus::Config::default(), WallClock::System));
        let time = Arc::new(AtomicU64::new(0));
        let net = TestNetwork::new(MonotonicClock::Manual(time.clone()));
        let carried = net.clone();
        let rounds = Arc::<AtomicU64>::default();
        let beats = rounds.clone();
        let carrier = tokio::spawn(async move {
            loop {
                carried.carry();
                carried.beat();
                beats.fetch_add(1, SeqCst);
                tokio::time::sleep(Duration::from_millis(2)).await;
            }
        });
        let mut nodes = PresenceCluster { net, time, rounds, bus, nodes: Vec::new(), carrier };
        (0..count).for_each(|_| nodes.join());
        nodes
    }

    fn join(&mut self) {
        let node = self.net.join();
        let presence = Presence::new(Arc::default(), self.bus.clone(), node.clone(), Arc::new(Metrics::new()));
        let run = tokio::spawn(presence.clone().run());
        self.nodes.push(PresenceNode { node, presence, run });
    }

    fn enter(&self, node: usize, client: &str) -> PresenceLease {
        let client = PresentClient::new(client, None, 100).unwrap();
        self.nodes[node].presence.enter(&chat(), &client, "", "ws").unwrap()
    }

    /// Ends a node without notice to the others.
    fn kill(&mut self, node: usize) -> PresenceNode {
        let one = self.nodes.remove(node);
        self.net.kill(&one.node);
        one.run.abort();
        one
    }

    /// Lets the memberships of dead nodes expire.
    async fn memberships_expire(&self) {
        // In steps, so that live nodes renew theirs in between.
        for _ in 0..6 {
            self.time.fetch_add(2_000, SeqCst);
            let rounds = self.rounds.load(SeqCst);
            while self.rounds.load(SeqCst) < rounds + 2 {
                tokio::time::sleep(Duration::from_millis(2)).await;
            }
        }
    }

    async fn list(&self, node: usize) -> Vec<String> {
        let listed = self.nodes[node].presence.list(&chat(), None, 100_000, usize::MAX).await.unwrap();
        assert_eq!(listed.page.count, listed.page.members.len());
        listed.page.members.into_iter().map(|(client, _)| client.to_string()).collect()
    }

    /// Waits until every node lists exactly these clients.
    async fn wait_for(&self, clients: &[&str]) {
        let start = Instant::now();
        for node in 0..self.nodes.len() {
            loop {
                let list = self.list(node).await;
                if list == clients {
                    break;
                }
                assert!(start.elapsed() < PATIENCE, "node {node} lists {list:?} and not {clients:?}");
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        }
    }

    async fn announced(&self) -> AnnouncementLog {
        let limit = ReadLimit { events: 10_000, bytes: usize::MAX };
        let page = self.bus.read(&chat().presence().unwrap(), Start::Earliest, limit, None).await.unwrap();
        let mut announced = AnnouncementLog::default();
        for event in page.events {
            let data: Value = serde_json::from_str(event.data_json().unwrap()).unwrap();
            if data["all"] == true {
                announced.members.clear();
                announced.ended += 1;
            }
            for member in data["members"].as_array().unwrap() {
                let client = member["client"].as_str().unwrap().to_owned();
                if event.kind_json() == Some("\"join\"") {
                    announced.joins.push(client.clone());
                    announced.members.insert(client, member.clone());
                } else {
                    announced.leaves.push(client.clone());
                    announced.members.remove(&client);
                }
            }
        }
        announced
    }

    /// Waits until every list and the log contain exactly these clients.
    async fn agree(&self, clients: &[&str]) -> AnnouncementLog {
        self.wait_for(clients).await;
        let announced = self.announced().await;
        assert_eq!(announced.members.keys().map(String::as_str).collect::<Vec<_>>(), clients);
        announced
    }
}

impl Drop for PresenceCluster {
    fn drop(&mut self) {
        self.carrier.abort();
        self.nodes.iter().for_each(|one| one.run.abort());
    }
}

fn chat() -> Channel {
    Channel::parse("chat").unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn members_of_all_nodes_are_known_to_all_and_announced_once() {
    let mut nodes = PresenceCluster::start(3);
    let leases: Vec<_> = (0..9).map(|n| nodes.enter(n % 3, &format!("c{n}"))).collect();
    let names: Vec<String> = (0..9).map(|n| format!("c{n}")).collect();
    let names: Vec<&str> = names.iter().map(String::as_str).collect();
    let announced = nodes.agree(&names).await;
    assert_eq!(announced.joins.iter().collect::<BTreeSet<_>>().len(), announced.joins.len(), "{announced:?}");
    // A node that joins later receives all of it.
    nodes.join();
    nodes.agree(&names).await;
    drop(leases);
    let announced = nodes.agree(&[]).await;
    assert_eq!((announced.joins.len(), announced.leaves.len(), announced.ended), (9, 9, 0), "{announced:?}");
    let start = Instant::now();
    while nodes.nodes.iter().any(|one| one.presence.counts() != (0, 0, 0)) {
        assert!(start.elapsed() < PATIENCE);
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_client_that_moves_to_another_node_is_not_announced() {
    let nodes = PresenceCluster::start(3);
    let mut held = nodes.enter(1, "c");
    nodes.agree(&["c"]).await;
    for to in [2, 0, 1, 2, 1, 0] {
        let next = nodes.enter(to, "c");
        drop(held);
        held = next;
    }
    let marker = nodes.enter(1, "z");
    let announced = nodes.agree(&["c", "z"]).await;
    assert_eq!((announced.joins, announced.leaves), (vec!["c".to_owned(), "z".to_owned()], vec![]));
    drop((held, marker));
    nodes.agree(&[]).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn members_of_a_dead_node_are_announced_as_gone_once() {
    let mut nodes = PresenceCluster::start(3);
    let far = [nodes.enter(2, "far1"), nodes.enter(2, "far2")];
    let both = [nodes.enter(2, "moved"), nodes.enter(1, "stays")];
    nodes.agree(&["far1", "far2", "moved", "stays"]).await;
    let dead = nodes.kill(2);
    // The client reconnects to another node before the death of its node is detected.
    let moved = nodes.enter(1, "moved");
    nodes.memberships_expire().await;
    let announced = nodes.agree(&["moved", "stays"]).await;
    assert_eq!(announced.leaves.iter().map(String::as_str).collect::<BTreeSet<_>>(), BTreeSet::from(["far1", "far2"]));
    assert_eq!((announced.joins.len(), announced.leaves.len()), (4, 2), "{announced:?}");
    // The leader dies, and another node takes over.
    let led = nodes.enter(0, "led");
    nodes.agree(&["led", "moved", "stays"]).await;
    let leader = nodes.kill(0);
    nodes.memberships_expire().await;
    let announced = nodes.agree(&["moved", "stays"]).await;
    assert_eq!((announced.joins.len(), announced.leaves.len(), announced.ended), (5, 3, 0), "{announced:?}");
    let after = nodes.enter(0, "after");
    nodes.agree(&["after", "moved", "stays"]).await;
    drop((far, both, moved, led, after, dead, leader));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn lists_agree_again_after_a_partition() {
    let nodes = PresenceCluster::start(3);
    let _near = nodes.enter(0, "near");
    let far = nodes.enter(2, "far");
    let gone = nodes.enter(0, "gone");
    nodes.agree(&["far", "gone", "near"]).await;
    nodes.nodes[2].node.cut(true);
    nodes.memberships_expire().await;
    let lists = |nodes: &PresenceCluster, wanted: &'static [&'static str]| {
        let presence = nodes.nodes[1].presence.clone();
        async move {
            let start = Instant::now();
            loop {
                let page = presence.list(&chat(), None, 100, usize::MAX).await.unwrap().page;
                let names: Vec<_> = page.members.iter().map(|(client, _)| client.to_string()).collect();
                if names == wanted {
                    return;
                }
                assert!(start.elapsed() < PATIENCE, "{names:?}");
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        }
    };
    lists(&nodes, &["gone", "near"]).await;
    // Members change on both sides of the partition.
    drop(gone);
    let _new = nodes.enter(1, "new");
    let _late = nodes.enter(2, "late");
    lists(&nodes, &["near", "new"]).await;
    nodes.nodes[2].node.cut(false);
    let announced = nodes.agree(&["far", "late", "near", "new"]).await;
    assert_eq!((announced.joins.len(), announced.leaves.len()), (6, 2), "{announced:?}");
    drop(far);
    nodes.agree(&["late", "near", "new"]).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn lists_agree_again_after_lost_messages() {
    let nodes = PresenceCluster::start(3);
    let mut held = Vec::new();
    for round in 0..10 {
        let lossy = round % 2 == 0;
        for (from, to) in [(1, 0), (1, 2), (2, 0)] {
            nodes.net.set_lossy(&nodes.nodes[from].node, &nodes.nodes[to].node, lossy);
        }
        held.push(nodes.enter(1 + round % 2, &format!("c{round}")));
        if round % 3 == 2 {
            held.remove(0);
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    // The next message reveals the loss.
    held.push(nodes.enter(1, "y"));
    held.push(nodes.enter(2, "z"));
    nodes.agree(&["c3", "c4", "c5", "c6", "c7", "c8", "c9", "y", "z"]).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn after_a_restart_of_all_nodes_former_members_are_announced_as_gone() {
    let mut nodes = PresenceCluster::start(2);
    let held = [nodes.enter(0, "a"), nodes.enter(1, "b")];
    nodes.agree(&["a", "b"]).await;
    let dead = [nodes.kill(0), nodes.kill(0)];
    // The client is back before the former membership of its node has expired.
    nodes.join();
    let again = nodes.enter(0, "b");
    nodes.memberships_expire().await;
    let announced = nodes.agree(&["b"]).await;
    assert_eq!((announced.joins, announced.ended), (vec!["a".to_owned(), "b".to_owned(), "b".to_owned()], 1));
    drop((held, dead, again));
    nodes.agree(&[]).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn many_joins_and_leaves_are_announced_in_few_events() {
    let nodes = PresenceCluster::start(3);
    let leases: Vec<_> = (0..6_000).map(|n| nodes.enter(n % 3, &format!("c{n:04}"))).collect();
    let names: Vec<String> = (0..6_000).map(|n| format!("c{n:04}")).collect();
    let names: Vec<&str> = names.iter().map(String::as_str).collect();
    nodes.agree(&names).await;
    drop(leases);
    let announced = nodes.agree(&[]).await;
    assert_eq!((announced.joins.len(), announced.leaves.len()), (6_000, 6_000));
    let info = nodes.bus.inspect(&chat().presence().unwrap()).await.unwrap();
    assert!(info.top < 200, "{} events", info.top);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_list_of_any_node_is_what_was_announced_up_to_its_position() {
    let nodes = PresenceCluster::start(2);
    // Replicating one event takes several messages.
    let mut leases: Vec<_> = (0..4_000).map(|n| nodes.enter(n % 2, &format!("c{n:04}-{}", "x".repeat(100)))).collect();
    let (mut lists, mut ends) = ([Vec::new(), Vec::new()], [0, 0]);
    let start = Instant::now();
    while ends.iter().any(|end| *end < 20) {
        assert!(start.elapsed() < PATIENCE);
        for node in 0..2 {
            let listed = nodes.nodes[node].presence.list(&chat(), None, 100_000, usize::MAX).await.unwrap();
            ends[node] += usize::from(leases.is_empty() && listed.page.count == 0);
            let names: BTreeSet<String> = listed.page.members.iter().map(|(client, _)| client.to_string()).collect();
            lists[node].push((listed.position.unwrap(), names));
        }
        if lists.iter().all(|lists| lists.last().is_some_and(|(_, names)| names.len() == 4_000)) {
            leases.clear();
        }
    }
    let limit = ReadLimit { events: 10_000, bytes: usize::MAX };
    let log = nodes.bus.read(&chat().presence().unwrap(), Start::Earliest, limit, None).await.unwrap().events;
    for lists in &lists {
        let (mut members, mut events, mut last) = (BTreeSet::new(), log.iter().peekable(), 0);
        for (at, names) in lists {
            // Nothing has been announced yet.
            let offset = if at.epoch.is_absent() { 0 } else { at.offset };
            assert!(offset >= last, "from {last} back to {offset}");
            last = offset;
            while let Some(event) = events.next_if(|event| event.offset <= offset) {
                let data: Value = serde_json::from_str(event.data_json().unwrap()).unwrap();
                for member in data["members"].as_array().unwrap() {
                    let client = member["client"].as_str().unwrap().to_owned();
                    if event.kind_json() == Some("\"join\"") {
                        members.insert(client);
                    } else {
                        members.remove(&client);
                    }
                }
            }
            assert!(*names == members, "at {offset}: {} are listed, {} announced", names.len(), members.len());
        }
        assert!(events.next().is_none());
    }
}
