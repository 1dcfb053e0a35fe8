//! What the nodes of one weir know of each other: who is up, who holds which name, and mail between them.
//!
//! [`Members`], [`Lease`], [`Roster`] and [`Mailbox`] are returned, and dropping them ends them. They are read without
//! waiting (`take`) when they are [`ready`](Mailbox::ready), so that whoever reads them can be tested with a clock that
//! stands still. A node does not hear of itself.

mod feed;
mod lease;
pub mod local;
mod mailbox;
pub mod post;
mod readers;

use std::{
    fmt,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    time::Instant,
};

use bytes::Bytes;
use futures_util::future::BoxFuture;

pub use feed::{Feed, Writer};
pub use lease::{Keeper, Lease, Tenure};
pub use mailbox::{Incoming, Mailbox};
pub use readers::Readers;

/// One run of a node: a node that was away for longer than its session comes back as another.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct NodeId(pub u64);

/// The contract that a backend implements. What it cannot do now it says at once; nothing here blocks.
pub trait Cluster: Send + Sync {
    /// Who is up, and from then on who comes and goes.
    fn members(&self) -> Members;

    /// Takes a name. A shared name has any number of holders, one per node, while nobody has it exclusively. A node that
    /// claims what it holds gets a new lease in place of the old one, with a higher fence.
    ///
    /// Dropping the future, or the [`Lease`], gives the name back.
    fn claim(&self, name: &str, claim: Claim) -> BoxFuture<'static, Result<Lease, Unclaimed>>;

    /// What other nodes tell of the names that they hold and that begin with `prefix`: all there is, then what changes.
    fn roster(&self, prefix: &str) -> Roster;

    /// Posts `mail`. What was taken arrives in order and at most once, or comes back, or the link is
    /// [lost](Incoming::Lost).
    fn send(&self, to: NodeId, topic: Topic, weight: Weight, mail: &[u8]) -> Sent;

    /// What is sent to this node under `topic`, of which there is one reader.
    fn mailbox(&self, topic: Topic) -> Mailbox;

    /// Whether this node speaks for all where one has to: exactly one does, but for the moment in which it changes.
    fn leads(&self) -> bool;

    /// Whether no other node can be reached, if there are any: then none of them leads this one.
    fn is_cut_off(&self) -> bool;

    /// Gives everything back and says goodbye: the others know at once.
    fn leave(&self) -> BoxFuture<'static, ()>;
}

/// Changes of who is up, at most one per node however often it came and went.
pub type Members = Feed<NodeId, Member>;

/// Changes of who holds what, at most one per node and name.
pub type Roster = Feed<(Arc<str>, NodeId), Holding>;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Member {
    pub node: NodeId,
    pub up: bool,
}

/// What a node tells of a name that it holds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Holding {
    pub name: Arc<str>,
    pub node: NodeId,
    /// Grows with everything that this node tells.
    pub rev: u64,
    /// As given to [`Lease::tell`]. None: it holds the name no longer.
    pub info: Option<Bytes>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Claim {
    Shared,
    /// The holder's fence is higher than that of every holder before, also of those before a restart.
    Exclusive,
}

/// Why a name was not given.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Unclaimed {
    /// These nodes hold it, or died less than a lease ago: ask them.
    Taken(Vec<NodeId>),
    /// The others cannot be reached.
    Away,
}

/// Who reads a mail. The numbers are on the wire.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Topic {
    Calls = 1,
    Connections = 2,
    Presence = 3,
}

/// Whether a mail is refused when much waits for the same node.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Weight {
    /// It is: somebody else may do.
    May,
    /// Only when it is far too much.
    Must,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sent {
    Taken,
    /// Too much waits for that node.
    Full,
    /// It is not up, or cannot be reached.
    NoSuchNode,
}

/// Where the time of leases and calls comes from. It only runs on; it is no time of day.
#[derive(Clone, Debug)]
pub enum MonotonicClock {
    Real(Instant),
    /// Milliseconds, moved by a test.
    Manual(Arc<AtomicU64>),
}

impl Topic {
    const ALL: [Topic; 3] = [Topic::Calls, Topic::Connections, Topic::Presence];

    fn of(number: u8) -> Option<Self> {
        Self::ALL.into_iter().find(|topic| *topic as u8 == number)
    }

    fn index(self) -> usize {
        self as usize - 1
    }
}

impl NodeId {
    pub fn random() -> Self {
        NodeId(fastrand::u64(1..))
    }

    /// Reads what `Display` writes.
    pub fn parse(text: &str) -> Option<Self> {
        (text.len() == 16).then(|| u64::from_str_radix(text, 16).ok().map(NodeId)).flatten()
    }
}

impl fmt::Display for NodeId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:016x}", self.0)
    }
}

impl fmt::Debug for NodeId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl MonotonicClock {
    pub fn real() -> Self {
        MonotonicClock::Real(Instant::now())
    }

    /// Milliseconds.
    pub fn now(&self) -> u64 {
        self.micros() / 1_000
    }

    pub fn micros(&self) -> u64 {
        match self {
            MonotonicClock::Real(start) => start.elapsed().as_micros() as u64,
            MonotonicClock::Manual(now) => now.load(Relaxed) * 1_000,
        }
    }
}

#[cfg(test)]
mod tests;
