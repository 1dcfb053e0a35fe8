//! [`ClusterConnections`]: lists and kicks connections on all nodes. Each request is sent to every node and answered by a
//! message; nodes that do not answer in time are named in the result.

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
use tokio::{sync::oneshot, time::timeout};

use super::{ConnectionFilter, ConnectionInfo, ConnectionRegistry};
use crate::cluster::{Cluster, ClusterMember, InboxEvent, MessageKind, NodeId, Priority, SendOutcome};

/// The time for which a request waits for the replies of other nodes.
const REPLY_TIMEOUT: Duration = Duration::from_secs(2);
/// The first byte of a message. Messages of other versions are ignored.
const VERSION: u8 = 1;

/// The connections of all nodes.
pub struct ClusterConnections {
    local: Arc<ConnectionRegistry>,
    cluster: Arc<dyn Cluster>,
    numbers: AtomicU64,
    state: Mutex<ClusterConnectionsState>,
}

#[derive(Default)]
struct ClusterConnectionsState {
    /// The other members, and the node names that they use in [`ConnectionInfo::node`].
    nodes: HashMap<NodeId, Option<String>>,
    pending: HashMap<u64, PendingRequest>,
}

/// A request whose replies are awaited.
struct PendingRequest {
    waiting: HashSet<NodeId>,
    /// Nodes that will not reply.
    silent: Vec<NodeId>,
    replies: Vec<ConnectionsReply>,
    /// Dropped when no reply is awaited any more.
    done: Option<oneshot::Sender<()>>,
}

/// The combined result of all nodes.
#[derive(Debug, Default)]
pub struct Gathered<T> {
    pub found: T,
    /// Names of the nodes that did not reply in time.
    pub silent: Vec<String>,
}

/// JSON on the wire, after the version.
#[derive(Serialize, Deserialize)]
enum ConnectionsMessage {
    /// The name of the sender, as in [`ConnectionInfo::node`].
    #[serde(rename = "Called")]
    NodeName(String),
    List {
        number: u64,
        #[serde(rename = "which")]
        filter: ConnectionFilter,
        after: Option<String>,
        #[serde(rename = "most")]
        limit: usize,
    },
    Kick {
        number: u64,
        #[serde(rename = "which")]
        filter: ConnectionFilter,
    },
    #[serde(rename = "Said")]
    Reply {
        number: u64,
        #[serde(rename = "said")]
        reply: ConnectionsReply,
    },
}

#[derive(Serialize, Deserialize)]
enum ConnectionsReply {
    Listed(Vec<ConnectionInfo>),
    Kicked(usize),
}

impl ClusterConnections {
    pub fn new(local: Arc<ConnectionRegistry>, cluster: Arc<dyn Cluster>) -> Arc<Self> {
        Arc::new(ClusterConnections { local, cluster, numbers: AtomicU64::new(0), state: Mutex::default() })
    }

    /// The connections of this node.
    pub fn local(&self) -> &Arc<ConnectionRegistry> {
        &self.local
    }

    /// Answers other nodes and receives their replies. Never returns.
    pub async fn run(self: Arc<Self>) {
        let (members, inbox) = (self.cluster.members(), self.cluster.inbox(MessageKind::Connections));
        loop {
            tokio::select! {
                () = inbox.ready() => {}
                () = members.ready() => {}
            }
            // Taken before messages, and processed after them: an older message must not restore a node that has left.
            let changed = members.take();
            for event in inbox.take() {
                match event {
                    InboxEvent::Message { from, body } => self.receive(from, &body),
                    InboxEvent::Returned { to, .. } => self.give_up(to),
                    InboxEvent::LinkLost { peer, gone } => {
                        self.give_up(peer);
                        if !gone {
                            // The name may be among the messages that were lost.
                            self.send_name(peer);
                        }
                    }
                }
            }
            for ClusterMember { node, up } in changed {
                if up {
                    self.state.lock().nodes.entry(node).or_default();
                    self.send_name(node);
                } else {
                    self.give_up(node);
                    self.state.lock().nodes.remove(&node);
                }
            }
        }
    }

    /// Up to `limit` connections of all nodes that match `filter`, in the order of ids, starting after the id `after`.
    pub async fn list(
        &self,
        filter: &ConnectionFilter,
        after: Option<&str>,
        limit: usize,
    ) -> Gathered<Vec<ConnectionInfo>> {
        let mut found = self.local.list(filter, after, limit);
        let message = |number| ConnectionsMessage::List {
            number,
            filter: filter.clone(),
            after: after.map(str::to_owned),
            limit,
        };
        let replies = self.request(message).await;
        found.extend(replies.found.into_iter().flat_map(|reply| match reply {
            ConnectionsReply::Listed(listed) => listed,
            ConnectionsReply::Kicked(_) => Vec::new(),
        }));
        found.sort_unstable_by(|one, other| one.id.cmp(&other.id));
        found.truncate(limit);
        Gathered { found, silent: replies.silent }
    }

    /// Ends the connections that match `filter` on all nodes and returns their number.
    pub async fn kick(&self, filter: &ConnectionFilter) -> Gathered<usize> {
        let own = self.local.kick(filter);
        let replies = self.request(|number| ConnectionsMessage::Kick { number, filter: filter.clone() }).await;
        let others = replies.found.into_iter().map(|reply| match reply {
            ConnectionsReply::Kicked(count) => count,
            ConnectionsReply::Listed(_) => 0,
        });
        Gathered { found: own + others.sum::<usize>(), silent: replies.silent }
    }

    /// Sends a request to all other nodes and waits for their replies.
    async fn request(&self, message: impl FnOnce(u64) -> ConnectionsMessage) -> Gathered<Vec<ConnectionsReply>> {
        let number = self.numbers.fetch_add(1, Relaxed);
        let nodes: Vec<NodeId> = self.state.lock().nodes.keys().copied().collect();
        if nodes.is_empty() {
            return Gathered::default();
        }
        let (done, all_replied) = oneshot::channel();
        let waiting = nodes.iter().copied().collect();
        let pending = PendingRequest { waiting, silent: Vec::new(), replies: Vec::new(), done: Some(done) };
        self.state.lock().pending.insert(number, pending);
        // Removes the entry also if this future is dropped.
        let _guard = PendingGuard { connections: self, number };
        let message = message(number);
        for node in nodes {
            if self.send(node, &message) != SendOutcome::Queued {
                self.give_up(node);
            }
        }
        // Also completes when `done` is dropped.
        let _ = timeout(REPLY_TIMEOUT, all_replied).await;
        let mut state = self.state.lock();
        let Some(pending) = state.pending.remove(&number) else { return Gathered::default() };
        let name = |node| state.nodes.get(node).cloned().flatten().unwrap_or_else(|| NodeId::to_string(node));
        let mut silent: Vec<String> = pending.silent.iter().chain(&pending.waiting).map(name).collect();
        silent.sort_unstable();
        Gathered { found: pending.replies, silent }
    }

    fn send_name(&self, to: NodeId) {
        self.send(to, &ConnectionsMessage::NodeName(self.local.node()));
    }

    fn send(&self, to: NodeId, message: &ConnectionsMessage) -> SendOutcome {
        let mut bytes = vec![VERSION];
        // Serializing plain data to memory cannot fail.
        let _ = serde_json::to_writer(&mut bytes, message);
        self.cluster.send(to, MessageKind::Connections, Priority::Normal, &bytes)
    }

    fn receive(&self, from: NodeId, message: &[u8]) {
        let [VERSION, json @ ..] = message else { return };
        match serde_json::from_slice(json) {
            Ok(ConnectionsMessage::NodeName(name)) => {
                self.state.lock().nodes.insert(from, Some(name));
            }
            Ok(ConnectionsMessage::List { number, filter, after, limit }) => {
                let reply = ConnectionsReply::Listed(self.local.list(&filter, after.as_deref(), limit));
                self.send(from, &ConnectionsMessage::Reply { number, reply });
            }
            Ok(ConnectionsMessage::Kick { number, filter }) => {
                let reply = ConnectionsReply::Kicked(self.local.kick(&filter));
                self.send(from, &ConnectionsMessage::Reply { number, reply });
            }
            Ok(ConnectionsMessage::Reply { number, reply }) => {
                let mut state = self.state.lock();
                if let Some(pending) = state.pending.get_mut(&number)
                    && pending.stop_waiting(from)
                {
                    pending.replies.push(reply);
                }
            }
            Err(error) => tracing::debug!(%from, %error, "cannot read a message about connections"),
        }
    }

    /// Ends the wait for replies of a node.
    fn give_up(&self, node: NodeId) {
        for pending in self.state.lock().pending.values_mut() {
            if pending.stop_waiting(node) {
                pending.silent.push(node);
            }
        }
    }
}

impl PendingRequest {
    /// False: no reply of this node was awaited.
    fn stop_waiting(&mut self, node: NodeId) -> bool {
        let was_waiting = self.waiting.remove(&node);
        if self.waiting.is_empty() {
            self.done = None;
        }
        was_waiting
    }
}

struct PendingGuard<'a> {
    connections: &'a ClusterConnections,
    number: u64,
}

impl Drop for PendingGuard<'_> {
    fn drop(&mut self) {
        self.connections.state.lock().pending.remove(&self.number);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_wire_form_of_messages() {
        let filter = ConnectionFilter { subject: Some("u7".into()), ..ConnectionFilter::default() };
        let reply = ConnectionsReply::Listed(Vec::new());
        for (message, json) in [
            (ConnectionsMessage::NodeName("n".into()), r#"{"Called":"n"}"#),
            (
                ConnectionsMessage::List { number: 1, filter: filter.clone(), after: None, limit: 9 },
                r#"{"List":{"number":1,"which":{"subject":"u7"},"after":null,"most":9}}"#,
            ),
            (ConnectionsMessage::Kick { number: 2, filter }, r#"{"Kick":{"number":2,"which":{"subject":"u7"}}}"#),
            (ConnectionsMessage::Reply { number: 1, reply }, r#"{"Said":{"number":1,"said":{"Listed":[]}}}"#),
        ] {
            assert_eq!(serde_json::to_string(&message).unwrap(), json);
        }
    }
}
