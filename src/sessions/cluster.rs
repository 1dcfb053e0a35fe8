//! Asking all nodes about their connections: mail there, mail back, and a bounded wait. Who is silent is named.

use std::{
    collections::{HashMap, HashSet},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    time::Duration,
};

use parking_lot::Mutex;
use serde::{Deserialize, Serialize};
use tokio::sync::oneshot;

use super::{ConnectionFilter, ConnectionInfo, ConnectionRegistry};
use crate::cluster::{Cluster, InboxEvent, Member, MessageKind, NodeId, Priority, SendOutcome};

/// How long the answers of other nodes are waited for.
const PATIENCE: Duration = Duration::from_secs(2);
/// The first byte of a mail; what begins otherwise is of a later version, and not answered.
const VERSION: u8 = 1;

/// The connections of all nodes.
pub struct ClusterConnections {
    local: Arc<ConnectionRegistry>,
    cluster: Arc<dyn Cluster>,
    numbers: AtomicU64,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    /// Who is up, and what it calls itself.
    nodes: HashMap<NodeId, Option<String>>,
    open: HashMap<u64, Open>,
}

/// A question whose answers are awaited.
struct Open {
    left: HashSet<NodeId>,
    /// They will not answer.
    silent: Vec<NodeId>,
    answers: Vec<Said>,
    /// Dropped when nobody is left.
    done: Option<oneshot::Sender<()>>,
}

/// What several nodes came to.
#[derive(Debug, Default)]
pub struct Found<T> {
    pub found: T,
    /// Nodes that did not answer in time.
    pub silent: Vec<String>,
}

#[derive(Serialize, Deserialize)]
enum Mail {
    /// This is what the sender is called.
    Called(String),
    List {
        number: u64,
        filter: ConnectionFilter,
        after: Option<String>,
        most: usize,
    },
    Kick {
        number: u64,
        filter: ConnectionFilter,
    },
    Said {
        number: u64,
        said: Said,
    },
}

#[derive(Serialize, Deserialize)]
enum Said {
    ConnectionInfo(Vec<ConnectionInfo>),
    Kicked(usize),
}

impl ClusterConnections {
    pub fn new(local: Arc<ConnectionRegistry>, cluster: Arc<dyn Cluster>) -> Arc<Self> {
        Arc::new(ClusterConnections { local, cluster, numbers: AtomicU64::new(0), state: Mutex::default() })
    }

    pub fn local(&self) -> &Arc<ConnectionRegistry> {
        &self.local
    }

    /// Answers other nodes and takes their answers, until it is dropped.
    pub async fn run(self: Arc<Self>) {
        let (members, inbox) = (self.cluster.members(), self.cluster.inbox(MessageKind::Connections));
        loop {
            tokio::select! {
                () = inbox.ready() => {}
                () = members.ready() => {}
            }
            // Before the mail: what went before somebody left is not to bring it back.
            let changed = members.take();
            for incoming in inbox.take() {
                match incoming {
                    InboxEvent::Message { from, body } => self.take(from, &body),
                    InboxEvent::Returned { to, .. } => self.give_up(to),
                    InboxEvent::LinkLost { peer, gone } => {
                        self.give_up(peer);
                        if !gone {
                            // What this one is called may be what was lost.
                            self.send(peer, &Mail::Called(self.local.node()));
                        }
                    }
                }
            }
            for Member { node, up } in changed {
                if up {
                    self.state.lock().nodes.entry(node).or_default();
                    self.send(node, &Mail::Called(self.local.node()));
                } else {
                    self.give_up(node);
                    self.state.lock().nodes.remove(&node);
                }
            }
        }
    }

    /// Up to `most` connections of all nodes, by id from the first after `after` on.
    pub async fn list(
        &self,
        filter: &ConnectionFilter,
        after: Option<&str>,
        most: usize,
    ) -> Found<Vec<ConnectionInfo>> {
        let mut found = self.local.list(filter, after, most);
        let asked = |number| Mail::List { number, filter: filter.clone(), after: after.map(str::to_owned), most };
        let Found { found: answers, silent } = self.ask(asked).await;
        found.extend(answers.into_iter().flat_map(|said| match said {
            Said::ConnectionInfo(listed) => listed,
            Said::Kicked(_) => Vec::new(),
        }));
        found.sort_unstable_by(|one, other| one.id.cmp(&other.id));
        found.truncate(most);
        Found { found, silent }
    }

    /// Has those that are meant end, on all nodes. How many there were.
    pub async fn kick(&self, filter: &ConnectionFilter) -> Found<usize> {
        let own = self.local.kick(filter);
        let Found { found: answers, silent } = self.ask(|number| Mail::Kick { number, filter: filter.clone() }).await;
        let others = answers.into_iter().map(|said| match said {
            Said::Kicked(count) => count,
            Said::ConnectionInfo(_) => 0,
        });
        Found { found: own + others.sum::<usize>(), silent }
    }

    async fn ask(&self, question: impl FnOnce(u64) -> Mail) -> Found<Vec<Said>> {
        let number = self.numbers.fetch_add(1, Relaxed);
        let nodes: Vec<NodeId> = self.state.lock().nodes.keys().copied().collect();
        if nodes.is_empty() {
            return Found::default();
        }
        let (done, all) = oneshot::channel();
        let open =
            Open { left: nodes.iter().copied().collect(), silent: Vec::new(), answers: Vec::new(), done: Some(done) };
        self.state.lock().open.insert(number, open);
        // Given back also if whoever asks hangs up.
        let _closed = Closed { connections: self, number };
        let question = question(number);
        for node in nodes {
            if self.send(node, &question) != SendOutcome::Queued {
                self.give_up(node);
            }
        }
        // Ends when the other end is dropped, too.
        let _ = tokio::time::timeout(PATIENCE, all).await;
        let mut state = self.state.lock();
        let Some(open) = state.open.remove(&number) else { return Found::default() };
        let mut silent: Vec<String> = open
            .silent
            .iter()
            .chain(&open.left)
            .map(|node| state.nodes.get(node).cloned().flatten().unwrap_or_else(|| node.to_string()))
            .collect();
        silent.sort_unstable();
        Found { found: open.answers, silent }
    }

    fn send(&self, to: NodeId, mail: &Mail) -> SendOutcome {
        let mut bytes = vec![VERSION];
        // Plain data, written to memory: it cannot fail.
        let _ = serde_json::to_writer(&mut bytes, mail);
        self.cluster.send(to, MessageKind::Connections, Priority::Normal, &bytes)
    }

    fn take(&self, from: NodeId, mail: &[u8]) {
        let [VERSION, json @ ..] = mail else { return };
        match serde_json::from_slice(json) {
            Ok(Mail::Called(name)) => {
                self.state.lock().nodes.insert(from, Some(name));
            }
            Ok(Mail::List { number, filter, after, most }) => {
                let said = Said::ConnectionInfo(self.local.list(&filter, after.as_deref(), most));
                self.send(from, &Mail::Said { number, said });
            }
            Ok(Mail::Kick { number, filter }) => {
                let said = Said::Kicked(self.local.kick(&filter));
                self.send(from, &Mail::Said { number, said });
            }
            Ok(Mail::Said { number, said }) => {
                let mut state = self.state.lock();
                if let Some(open) = state.open.get_mut(&number).filter(|open| open.left.contains(&from)) {
                    open.answers.push(said);
                    open.without(from);
                }
            }
            Err(error) => tracing::debug!(%from, %error, "a mail that cannot be read"),
        }
    }

    /// It will not answer what it was asked.
    fn give_up(&self, node: NodeId) {
        for open in self.state.lock().open.values_mut().filter(|open| open.left.contains(&node)) {
            open.silent.push(node);
            open.without(node);
        }
    }
}

impl Open {
    fn without(&mut self, node: NodeId) {
        self.left.remove(&node);
        if self.left.is_empty() {
            self.done = None;
        }
    }
}

struct Closed<'a> {
    connections: &'a ClusterConnections,
    number: u64,
}

impl Drop for Closed<'_> {
    fn drop(&mut self) {
        self.connections.state.lock().open.remove(&self.number);
    }
}

#[cfg(test)]
mod tests {
    use std::{collections::BTreeSet, task::Poll, time::Instant};

    use super::*;
    use crate::{
        auth::Identity,
        cluster::{MonotonicClock, test_network::TestNetwork},
        metrics::Transport,
        net::timer::{Due, TimerWheel},
        sessions::ChannelSet,
    };

    #[tokio::test]
    async fn all_nodes_are_asked_and_the_silent_are_named() {
        let time = Arc::new(AtomicU64::new(0));
        let net = TestNetwork::new(MonotonicClock::Manual(time));
        let nodes: Vec<_> = (0..3).map(|_| net.join()).collect();
        let carrier = net.clone();
        tokio::spawn(async move {
            loop {
                carrier.carry();
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
        });
        let mut clusters = Vec::new();
        let mut registrations = Vec::new();
        for node in &nodes {
            let wheel = TimerWheel::start();
            let cluster_connections = ClusterConnections::new(ConnectionRegistry::new(wheel.clone()), node.clone());
            tokio::spawn(cluster_connections.clone().run());
            for _ in 0..50 {
                let registration = cluster_connections.local().register(
                    Transport::Ws,
                    &Identity::anonymous(),
                    None,
                    ChannelSet::Empty,
                );
                let mut timer = wheel.timer(Duration::from_secs(1_000));
                timer.set_owner(registration.number());
                registrations.push((registration, timer));
            }
            clusters.push(cluster_connections);
        }
        let all = |from: usize| {
            let cluster_connections = clusters[from].clone();
            async move { cluster_connections.list(&ConnectionFilter::default(), None, 1000).await }
        };
        for from in 0..3 {
            let start = Instant::now();
            while all(from).await.found.len() < 150 {
                assert!(start.elapsed() < Duration::from_secs(20));
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
            assert!(all(from).await.silent.is_empty());
        }
        // Page by page, across nodes.
        let (mut ids, mut after) = (Vec::new(), None::<String>);
        loop {
            let page = clusters[1].list(&ConnectionFilter::default(), after.as_deref(), 40).await.found;
            let Some(last) = page.last() else { break };
            after = Some(last.id.clone());
            ids.extend(page.into_iter().map(|it| it.id));
        }
        assert_eq!(ids.len(), 150);
        assert!(ids.is_sorted());
        // One that is on another node.
        let (own, other) = (clusters[0].local().node(), clusters[2].local().node());
        let id = ids.iter().find(|id| id.starts_with(&other)).unwrap();
        let which = ConnectionFilter { id: Some(id.clone()), ..ConnectionFilter::default() };
        assert_eq!(clusters[0].kick(&which).await.found, 1);
        let mut kicked = 0;
        for (_, timer) in &mut registrations {
            let polled = std::future::poll_fn(|cx| Poll::Ready(timer.poll(cx))).await;
            kicked += usize::from(polled == Poll::Ready(Due::Kicked));
        }
        assert_eq!(kicked, 1);

        nodes[2].stop(true);
        let found = tokio::time::timeout(Duration::from_secs(20), all(0)).await.unwrap();
        assert_eq!((found.found.len(), found.silent), (100, vec![other.clone()]));
        let names: BTreeSet<String> = found.found.into_iter().map(|it| it.node).collect();
        assert!(names.contains(&own) && !names.contains(&other));
        let kicked =
            clusters[0].kick(&ConnectionFilter { subject: Some(String::new()), ..ConnectionFilter::default() }).await;
        assert_eq!((kicked.found, kicked.silent), (100, vec![other]));
    }
}
