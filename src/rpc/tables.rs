//! The records of the hub: connections, services, providers and calls.
//!
//! A call is known to two of them. Its [`CallEntry`] is in the service, and is removed by the reply, the deadline or the end
//! of the provider. Its [`InFlight`] is in the caller's connection. **Taking the `InFlight` is the right to answer**, which
//! is why a call has exactly one answer, whatever happens at the same time.
//!
//! The records refer to each other in circles and are therefore defined in one file. Their methods are in `in_flight`
//! (calls), `provider`, `choice` and `remote_provider` (providers), `service` and `registry`.
//!
//! Everything in a [`ServiceState`] happens under the service's one lock and touches no connection: what has to be written
//! or answered is returned, or left in [`Effects`], for the hub to do when the lock is released.

use std::{
    collections::VecDeque,
    sync::{
        Arc, Weak,
        atomic::{AtomicBool, AtomicUsize},
    },
};

use parking_lot::Mutex;
use slab::Slab;

use super::{
    call::StoredRequest,
    call_id::{CallId, CallerId},
    peer::{MethodNames, Peer},
};
use crate::cluster::{Lease, NodeId};

/// The hub's state of a connection, shared by all that refer to the connection.
pub(super) struct PeerState {
    pub(super) peer: Arc<dyn Peer>,
    /// Calls that it may have in flight.
    pub(super) max_calls: usize,
    /// Calls that it made and that are not answered. Locked before a service, never after.
    pub(super) in_flight: Mutex<Slab<InFlight>>,
    /// The node, if this is the link to another one.
    pub(super) node: Option<NodeId>,
    /// Its registrations; the index is the slot in a [`CallId`], except of links. Locked before a service, never after.
    pub(super) provides: Mutex<Slab<ProviderSlot>>,
    /// The caller that its last reply has filled up: no more of its replies are read until that caller has read.
    pub(super) held_by: Mutex<Option<Weak<PeerState>>>,
    /// Late calls in which it is caller or provider.
    pub(super) late: AtomicUsize,
    pub(super) closed: AtomicBool,
}

/// A call in its caller's connection.
pub(super) struct InFlight {
    pub(super) caller_id: CallerId,
    pub(super) service: Arc<ServiceEntry>,
    /// Where the entry is, unless its `seq` is another by now.
    pub(super) index: u32,
    pub(super) seq: u64,
    /// Microseconds of the hub's clock.
    pub(super) started: u64,
    pub(super) late: bool,
}

/// A provider in its own connection.
pub(super) struct ProviderSlot {
    pub(super) service: Arc<ServiceEntry>,
    /// Key among the service's providers.
    pub(super) provider: u32,
}

/// A service in the registry.
pub(super) struct ServiceEntry {
    pub(super) name: Arc<str>,
    pub(super) state: Mutex<ServiceState>,
    /// One registration at a time: it may have to wait for the cluster. Holds when the cluster could last not be reached,
    /// in milliseconds of the hub's clock: registrations that waited meanwhile fail with the same error.
    pub(super) registration: Arc<tokio::sync::Mutex<Option<u64>>>,
}

#[derive(Default)]
pub(super) struct ServiceState {
    pub(super) providers: ProviderTable,
    pub(super) calls: CallTable,
    /// This node's hold on the name, while it has a provider.
    pub(super) lease: Option<Lease>,
    /// The lease is exclusive: providers of this node are called only while it is valid.
    pub(super) exclusive: bool,
    /// Registrations under way.
    pub(super) registering: usize,
    pub(super) marks: RegistryMarks,
    pub(super) effects: Effects,
}

#[derive(Default)]
pub(super) struct ProviderTable {
    pub(super) all: Slab<Provider>,
    /// Withdrawn providers that still have calls, those of other nodes included.
    pub(super) leaving: usize,
    /// Keys of the providers of this node that take calls.
    pub(super) active: Vec<u32>,
    /// Keys of other nodes: each counts as one provider for all that it has.
    pub(super) remote: Vec<u32>,
    /// Which of equals is next.
    pub(super) turn: usize,
}

pub(super) struct Provider {
    pub(super) conn: Arc<PeerState>,
    /// Index in its connection's `provides`.
    pub(super) slot: u32,
    /// For another node.
    pub(super) remote: Option<RemoteProvider>,
    pub(super) subject: Box<str>,
    pub(super) stage: ProviderStage,
    pub(super) concurrency: u32,
    pub(super) in_flight: u32,
    pub(super) names: MethodNames,
    pub(super) meta: bool,
    pub(super) fence: Option<u64>,
    pub(super) methods: Box<[Box<str>]>,
    /// First in the list of its calls.
    pub(super) head: u32,
}

/// The providers of another node, as far as this node knows.
pub(super) struct RemoteProvider {
    pub(super) providers: u32,
    /// Revision of the advertisement that this is made of.
    pub(super) rev: u64,
    /// Calls that it has from elsewhere, as last reported.
    pub(super) other_calls: u32,
    /// Time from which the report is too old to count.
    pub(super) valid_until: u64,
}

#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum ProviderStage {
    /// Registered, but its transport has not written the response yet.
    Starting,
    Active,
    /// Withdrawn: finishes its calls and is removed then.
    Leaving,
}

#[derive(Default)]
pub(super) struct CallTable {
    pub(super) entries: Slab<CallEntry>,
    /// The waiting calls, in order; some of them may be over.
    pub(super) queue: VecDeque<CallKey>,
    pub(super) waiting: usize,
    /// A thread is writing what waited; new calls queue up behind, or they would be written before.
    pub(super) flushing: bool,
    /// No entry is due earlier; the next sweep finds the exact time.
    pub(super) earliest_due: u64,
}

/// A call that is with a provider or waits for one.
pub(super) struct CallEntry {
    pub(super) seq: u64,
    /// The caller's connection and the index there. None: a notification, which has an entry only while it waits.
    pub(super) caller: Option<(Arc<PeerState>, u32)>,
    pub(super) due: u64,
    pub(super) deadline: u64,
    /// Milliseconds.
    pub(super) timeout: u32,
    pub(super) place: CallPlace,
}

pub(super) enum CallPlace {
    /// In the list of the provider's calls.
    With {
        provider: u32,
        previous: u32,
        next: u32,
    },
    Waiting(Box<StoredRequest>),
    /// On its way from one to the other, while the lock is held.
    Nowhere,
}

/// Index and number of a [`CallEntry`]: the call is over if the entry has another number.
pub(super) type CallKey = (u32, u64);

/// The end of a list of calls.
pub(super) const NO_ENTRY: u32 = u32::MAX;

/// A call that left its service and whose caller has no answer yet.
pub(super) struct FinishedCall {
    pub(super) caller: Arc<PeerState>,
    /// Index in the caller's `in_flight`.
    pub(super) at: u32,
    pub(super) seq: u64,
}

/// Which of the registry's lists a service is in.
#[derive(Default)]
pub(super) struct RegistryMarks {
    /// Removed from the registry: the service has to be looked up again.
    pub(super) dead: bool,
    /// In the list of services that every sweep visits.
    pub(super) ticking: bool,
    /// In the list of services whose name this node holds.
    pub(super) leased: bool,
    /// When the last provider left.
    pub(super) left: Option<u64>,
    /// In the list of names whose provider left.
    pub(super) remembered: bool,
    /// Counts as a service that has a provider on this node.
    pub(super) counted: bool,
    /// Had a provider on some node at the last update.
    pub(super) present: bool,
    /// In the list of changes to publish.
    pub(super) changed: bool,
    /// Providers as last published.
    pub(super) published: usize,
    /// An exclusive provider was replaced since.
    pub(super) replaced: bool,
}

/// Work that a change leaves for the time after the lock.
#[derive(Default)]
pub(super) struct Effects {
    /// Providers came, left or changed: the registry and the other nodes have to know.
    pub(super) providers_changed: bool,
    /// A waiting call may have a provider now.
    pub(super) capacity_freed: bool,
    pub(super) removed: Vec<RemovedProvider>,
}

pub(super) struct RemovedProvider {
    pub(super) conn: Arc<PeerState>,
    pub(super) slot: u32,
    /// Calls that it has not answered.
    pub(super) orphans: Vec<FinishedCall>,
    /// Why, if the provider did not ask for it; see [`Peer::withdrawn`].
    pub(super) reason: Option<&'static str>,
}

/// Where a call is written to.
pub(super) struct CallTarget {
    pub(super) conn: Arc<PeerState>,
    pub(super) provider: u32,
    /// None: a notification.
    pub(super) id: Option<CallId>,
    pub(super) names: MethodNames,
    pub(super) meta: bool,
    pub(super) fence: Option<u64>,
    pub(super) deadline: u64,
    /// Revision of the advertisement of another node.
    pub(super) rev: u64,
}

impl Effects {
    pub(super) fn is_empty(&self) -> bool {
        !self.capacity_freed && self.removed.is_empty()
    }
}
