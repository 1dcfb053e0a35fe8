//! The cluster of nodes that form one weir: its members, leases of names, and messages between nodes.
//!
//! [`ClusterMembers`], [`Lease`], [`Roster`] and [`Inbox`] are handles; dropping one ends what it stands for. Each is read with a
//! non-blocking `take`, and `ready` waits until there is something to take, so that readers can be tested under a
//! stopped clock. A node is not among its own members.

mod change_queue;
mod clock;
mod inbox;
mod lease;
mod message;
mod node_id;
mod peer_links;
pub mod single;
mod watchers;

use std::task::{Context, Poll};

use futures_util::future::BoxFuture;

pub use self::{
    clock::MonotonicClock,
    inbox::{Inbox, InboxEvent},
    lease::{Claim, ClaimError, Lease, LeaseBackend, LeaseState},
    message::{MessageKind, Priority, SendOutcome},
    node_id::NodeId,
    peer_links::{BatchOutcome, MessageBatch, PeerLinks, ReceiveOutcome},
    watchers::{ClusterMember, ClusterMembers, Roster, RosterEntry, Watchers},
};

/// The contract of a cluster backend. No method blocks: what is impossible at the moment fails at once.
pub trait Cluster: Send + Sync {
    /// The members at present, then every change.
    fn members(&self) -> ClusterMembers;

    /// Claims a name. A shared name has any number of holders, at most one per node, as long as no node holds it
    /// exclusively. Claiming a name that this node holds already replaces the lease by one with a higher fencing token.
    ///
    /// Dropping the future or the [`Lease`] releases the name.
    fn claim(&self, name: &str, claim: Claim) -> BoxFuture<'static, Result<Lease, ClaimError>>;

    /// The entries that other nodes publish for names that they hold and that start with `prefix`: all at present, then
    /// every change.
    fn roster(&self, prefix: &str) -> Roster;

    /// Queues a message. A queued message arrives in order and at most once, or is returned, or is reported with the
    /// [loss of the link](InboxEvent::LinkLost).
    fn send(&self, to: NodeId, kind: MessageKind, priority: Priority, message: &[u8]) -> SendOutcome;

    /// Waits until a node takes messages of [normal priority](Priority::Normal) again, or cannot be reached.
    fn poll_room(&self, _: NodeId, _: &mut Context<'_>) -> Poll<()> {
        Poll::Ready(())
    }

    /// The messages of one kind for this node. There is one reader per kind.
    fn inbox(&self, kind: MessageKind) -> Inbox;

    /// Whether this node is the leader. There is one leader, except briefly while the leader changes.
    fn is_leader(&self) -> bool;

    /// Whether this node cannot reach other nodes, should there be any. An isolated node is not led by another one.
    fn is_isolated(&self) -> bool;

    /// Releases all names and tells the other nodes, which see this node as gone at once.
    fn leave(&self) -> BoxFuture<'static, ()>;
}
