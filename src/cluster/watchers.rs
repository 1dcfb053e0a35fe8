//! [`Watchers`]: the subscriptions of this node to members and rosters. For backends.

use std::sync::Arc;

use bytes::Bytes;

use super::{
    change_queue::{ChangeQueue, ChangeSender},
    node_id::NodeId,
};

/// Changes of membership, at most one per node.
pub type ClusterMembers = ChangeQueue<NodeId, ClusterMember>;

/// Changes of rosters, at most one per name and node.
pub type Roster = ChangeQueue<(Arc<str>, NodeId), RosterEntry>;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ClusterMember {
    pub node: NodeId,
    pub up: bool,
}

/// The entry that a node publishes for a name that it holds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RosterEntry {
    pub name: Arc<str>,
    pub node: NodeId,
    /// Increases with every entry that this node publishes, whatever the name.
    pub rev: u64,
    /// As set by [`Lease::set_info`](super::Lease::set_info). `None`: the node no longer holds the name.
    pub info: Option<Bytes>,
}

#[derive(Default)]
pub struct Watchers {
    members: Vec<ChangeSender<NodeId, ClusterMember>>,
    /// Each with the prefix of the names that it watches.
    rosters: Vec<(String, RosterSender)>,
}

type RosterSender = ChangeSender<(Arc<str>, NodeId), RosterEntry>;

impl Watchers {
    /// A new subscription to members, which starts with the nodes in `up`.
    pub fn members(&mut self, up: impl IntoIterator<Item = NodeId>) -> ClusterMembers {
        let (queue, sender) = ChangeQueue::new();
        for node in up {
            sender.send(node, ClusterMember { node, up: true });
        }
        self.members.push(sender);
        queue
    }

    /// A new subscription to a roster, which starts with the entries in `known` that match.
    pub fn roster(&mut self, prefix: &str, known: impl IntoIterator<Item = RosterEntry>) -> Roster {
        let (queue, sender) = ChangeQueue::new();
        for entry in known.into_iter().filter(|entry| entry.name.starts_with(prefix)) {
            sender.send((entry.name.clone(), entry.node), entry);
        }
        self.rosters.push((prefix.to_owned(), sender));
        queue
    }

    pub fn member_changed(&mut self, node: NodeId, up: bool) {
        self.members.retain(|sender| sender.send(node, ClusterMember { node, up }));
    }

    pub fn roster_changed(&mut self, entry: &RosterEntry) {
        let key = (entry.name.clone(), entry.node);
        self.rosters.retain(|(prefix, sender)| {
            // A dropped subscription is removed at the next change that matches it.
            !entry.name.starts_with(prefix.as_str()) || sender.send(key.clone(), entry.clone())
        });
    }
}
