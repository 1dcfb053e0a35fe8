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
use crate::cluster::{Cluster, Incoming, Member, NodeId, Sent, Topic, Weight};

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
        let (members, mailbox) = (self.cluster.members(), self.cluster.mailbox(Topic::Connections));
        loop {
            tokio::select! {
                () = mailbox.ready() => {}
                () = members.ready() => {}
            }
            // Before the mail: what went before somebody left is not to bring it back.
            let changed = members.take();
            for incoming in mailbox.take() {
                match incoming {
                    Incoming::Mail { from, mail } => self.take(from, &mail),
                    Incoming::Returned { to, .. } => self.give_up(to),
                    Incoming::Lost { with, gone } => {
                        self.give_up(with);
                        if !gone {
                            // What this one is called may be what was lost.
                            self.send(with, &Mail::Called(self.local.node()));
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
            if self.send(node, &question) != Sent::Taken {
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

    fn send(&self, to: NodeId, mail: &Mail) -> Sent {
        let mut bytes = vec![VERSION];
        // Plain data, written to memory: it cannot fail.
        let _ = serde_json::to_writer(&mut bytes, mail);
        self.cluster.send(to, Topic::Connections, Weight::May, &bytes)
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
