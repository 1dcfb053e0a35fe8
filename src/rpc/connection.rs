//! [`HubConnection`]: the hub's interface to transports, one value per connection.

use std::{
    sync::{
        Arc, Weak,
        atomic::Ordering::{Relaxed, SeqCst},
    },
    task::{Context, Poll, ready},
};

use super::{
    call::Call,
    call_id::{CallId, CallerId},
    hub::{Hub, ReplyOutcome},
    peer::{CallAnswer, Peer},
    provider::ProvideRequest,
    registration::{self, ProvideFuture},
    tables::{InFlight, PeerState, ProviderSlot},
};
use crate::{
    error::{Code, Error, Result},
    metrics::CallOutcome,
};

/// A connection to the hub, as caller and provider. Dropping it withdraws its services, whose calls then fail as
/// `provider_gone`, and cancels the calls that it made.
///
/// One task uses it: calls are written to a provider in the order in which they are made.
pub struct HubConnection {
    pub(super) hub: Arc<Hub>,
    pub(super) conn: Arc<PeerState>,
}

/// The services that a connection provides, as long as it exists.
#[derive(Clone, Debug)]
pub(crate) struct ProvidedServices(Weak<PeerState>);

impl ProvidedServices {
    /// Their names, sorted.
    pub(crate) fn names(&self) -> Vec<String> {
        let Some(conn) = self.0.upgrade() else { return Vec::new() };
        let mut names: Vec<_> = conn.provides.lock().iter().map(|(_, slot)| slot.service.name.to_string()).collect();
        names.sort_unstable();
        names
    }
}

impl HubConnection {
    /// `peer` must not own the connection, or neither is ever dropped.
    pub fn new(hub: &Arc<Hub>, peer: Arc<dyn Peer>) -> Self {
        Self::with_max_calls(hub, peer, hub.config.limits.calls)
    }

    /// As [`new`](Self::new), with a limit of its own on the calls that it has in flight.
    pub(crate) fn with_max_calls(hub: &Arc<Hub>, peer: Arc<dyn Peer>, max_calls: usize) -> Self {
        hub.connections.fetch_add(1, Relaxed);
        Self::with_conn(hub, PeerState::new(peer, max_calls, None))
    }

    pub(super) fn with_conn(hub: &Arc<Hub>, conn: PeerState) -> Self {
        HubConnection { hub: hub.clone(), conn: Arc::new(conn) }
    }

    /// Makes a call. [`Peer::answer`] is called once, perhaps before this returns.
    ///
    /// Two calls in flight may have the same id, and both are answered. An error under that id would be taken for the
    /// answer of the first call.
    pub fn call(&self, caller_id: CallerId, call: &Call<'_>) {
        self.hub.call(&self.conn, caller_id, call);
    }

    /// Sends a notification to one provider, even if that is at its concurrency; there is no answer and no error.
    pub fn notify(&self, call: &Call<'_>) {
        self.hub.notify(call);
    }

    /// Cancels the calls in flight under `id`, which are answered with `cancelled`. Returns how many there were.
    pub fn cancel(&self, id: &[u8]) -> usize {
        self.fail(|call| call.caller_id.id() == id, &Error::new(Code::Cancelled, "cancelled by the caller"))
    }

    /// Ends all calls in flight, which are answered with `draining`: the node stops before their answers arrive.
    pub(crate) fn fail_in_flight(&self) -> usize {
        self.fail(|_| true, &Error::new(Code::Draining, "this node shut down before the answer arrived"))
    }

    fn fail(&self, which: impl Fn(&InFlight) -> bool, error: &Error) -> usize {
        let calls = self.conn.take_all(which);
        let count = calls.len();
        for call in calls {
            let executed = self.hub.abandon(&call);
            self.hub.record(&self.conn, &call, error.code().into());
            self.conn.peer.answer(&call.caller_id, CallAnswer::Failed(error.clone().executed(executed)));
        }
        count
    }

    /// A provider's reply. [`CallAnswer::bad_reply`] replaces one that cannot be passed on.
    pub fn reply(&self, id: CallId, answer: CallAnswer<'_>) -> ReplyOutcome {
        self.hub.reply(&self.conn, id, answer)
    }

    /// Waits until the callers that this connection has answered have room for more answers. To be called before more
    /// replies are read: what this connection is not asked for yet needs no memory.
    pub(crate) fn poll_room(&self, cx: &mut Context<'_>) -> Poll<()> {
        // A statement of its own: no lock may be held while a peer is called.
        let Some(caller) = self.conn.held_by.lock().clone() else { return Poll::Ready(()) };
        if let Some(caller) = caller.upgrade() {
            ready!(caller.peer.poll_room(cx));
        }
        *self.conn.held_by.lock() = None;
        Poll::Ready(())
    }

    /// Ends the wait of [`poll_room`](Self::poll_room): other callers must not wait for a slow one for long.
    pub(crate) fn abandon_wait(&self) {
        let held_by = self.conn.held_by.lock().take();
        if let Some(caller) = held_by.and_then(|caller| caller.upgrade()) {
            caller.peer.abandon_wait();
        }
    }

    /// Registers this connection as a provider, or changes its registration. It takes a moment if other nodes have to be
    /// queried; dropping the future gives it up.
    ///
    /// # Errors
    /// `service_taken`; `limit_reached`; `invalid_params` for malformed names and numbers; `bus_unavailable` while the
    /// other nodes cannot be queried.
    pub fn provide(&self, request: &ProvideRequest<'_>) -> ProvideFuture {
        ProvideFuture::new(self.hub.clone(), self.conn.clone(), request)
    }

    /// Ends a registration: no new calls; those in flight may still be answered. Returns how many there are.
    ///
    /// # Errors
    /// `not_found` if this connection does not provide the service.
    pub fn withdraw(&self, service: &str) -> Result<usize> {
        let unknown = || Error::new(Code::NotFound, format!("this connection does not provide {service}"));
        let service = self.hub.registry.find(service).ok_or_else(unknown)?;
        registration::withdraw(&self.hub, &self.conn, &service).ok_or_else(unknown)
    }

    /// Ends all registrations, as [`withdraw`](Self::withdraw) does: for a node that drains.
    pub fn withdraw_all(&self) -> usize {
        let services: Vec<_> = self.conn.provides.lock().iter().map(|(_, slot)| slot.service.clone()).collect();
        services.iter().filter_map(|service| registration::withdraw(&self.hub, &self.conn, service)).sum()
    }

    /// For the list of connections.
    pub(crate) fn provided_services(&self) -> ProvidedServices {
        ProvidedServices(Arc::downgrade(&self.conn))
    }

    /// Calls made and not answered.
    pub fn in_flight(&self) -> usize {
        self.conn.in_flight.lock().len()
    }

    /// Whether it has no call in flight and provides no service.
    pub fn is_idle(&self) -> bool {
        self.in_flight() == 0 && self.conn.provides.lock().is_empty()
    }

    pub(crate) fn provides_other(&self, service: &str) -> bool {
        self.conn.provides.lock().iter().any(|(_, slot)| *slot.service.name != *service)
    }
}

impl Drop for HubConnection {
    fn drop(&mut self) {
        let HubConnection { hub, conn } = self;
        conn.closed.store(true, SeqCst);
        // Its own calls first, or those that it made to itself would be answered.
        for call in conn.take_all(|_| true) {
            hub.record(conn, &call, CallOutcome::Cancelled);
            hub.abandon(&call);
        }
        let provides = std::mem::take(&mut *conn.provides.lock());
        for (_, ProviderSlot { service, provider }) in provides {
            hub.edit(&service).remove_conn(provider, conn);
        }
        hub.late.retain(conn, |_, call| !Arc::ptr_eq(&call.caller, conn) && !Arc::ptr_eq(call.provider(), conn));
        if !conn.is_link() {
            hub.connections.fetch_sub(1, Relaxed);
        }
    }
}
