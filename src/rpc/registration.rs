//! Registration of a provider: first in the cluster, where an exclusive name has one holder and a shared name none that is
//! exclusive, then on this node under the service's lock.
//!
//! A registration is not rejected merely because the cluster says that another node holds the name: that node is queried. It
//! may have died less than a lease ago, its provider may just have left, or it yields to the same subject.

use std::{
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};

use futures_util::{FutureExt, future::BoxFuture};
use slab::Slab;
use tokio::sync::oneshot;

use super::{
    call_id::CallId,
    hub::Hub,
    message::NameQuery,
    name_queries::PendingQuery,
    peer::ProbeCallback,
    provider::ProvideRequest,
    tables::{PeerState, ProviderSlot, ServiceEntry, ServiceState},
};
use crate::{
    channel::check_label,
    cluster::{Claim, ClaimError, Lease, MessageKind, NodeId, Priority, SendOutcome},
    error::{Code, Error, Result},
};

/// Prefix of the names of services in the cluster.
pub(super) const NAME_PREFIX: &str = "service:";
/// How long to wait for a name whose holder does not respond: longer than its lease.
const CLAIM_TIMEOUT: Duration = Duration::from_secs(13);
/// How long to wait for the response to a query.
const QUERY_TIMEOUT: Duration = Duration::from_secs(1);
/// Pause before a name is claimed again whose holder does not respond.
const RETRY_PAUSE: Duration = Duration::from_millis(200);

/// The result of a registration, in the future. Dropping it gives the registration up.
#[must_use = "dropping it gives the registration up"]
pub struct ProvideFuture(ProvideProgress);

enum ProvideProgress {
    Done(Option<Result<AcceptedProvider>>),
    Running(BoxFuture<'static, Result<AcceptedProvider>>),
}

/// A registration that was accepted. Dropping it lets the provider take calls, so that its transport can respond first.
#[must_use = "calls begin when it is dropped"]
pub struct AcceptedProvider {
    hub: Arc<Hub>,
    service: Arc<ServiceEntry>,
    conn: Arc<PeerState>,
    provider: u32,
    /// Providers of the service on all nodes.
    pub providers: usize,
    /// Fencing token of an exclusive provider.
    pub fence: Option<u64>,
}

/// A registration in progress.
struct Registration {
    hub: Arc<Hub>,
    conn: Arc<PeerState>,
    request: OwnedProvideRequest,
}

struct OwnedProvideRequest {
    service: String,
    subject: String,
    methods: Vec<String>,
    /// All that is not borrowed.
    options: ProvideRequest<'static>,
}

/// Keeps a service in the registry, and its name held, while a provider is being registered.
struct RegisteringGuard<'a> {
    hub: &'a Hub,
    service: &'a Arc<ServiceEntry>,
}

// === impl ProvideFuture ===

impl ProvideFuture {
    pub(super) fn new(hub: Arc<Hub>, conn: Arc<PeerState>, request: &ProvideRequest<'_>) -> Self {
        if let Err(error) = check(request) {
            return ProvideFuture(ProvideProgress::Done(Some(Err(error))));
        }
        let registration = Registration { hub, conn, request: OwnedProvideRequest::new(request) };
        let mut running = async move { registration.run().await }.boxed();
        // It usually needs no other node and is done at once.
        match running.as_mut().now_or_never() {
            Some(done) => ProvideFuture(ProvideProgress::Done(Some(done))),
            None => ProvideFuture(ProvideProgress::Running(running)),
        }
    }

    /// The result, if it is available already.
    pub fn try_finish(self) -> std::result::Result<Result<AcceptedProvider>, Self> {
        match self.0 {
            ProvideProgress::Done(Some(done)) => Ok(done),
            other => Err(ProvideFuture(other)),
        }
    }
}

impl Future for ProvideFuture {
    type Output = Result<AcceptedProvider>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        match &mut self.0 {
            ProvideProgress::Done(done) => Poll::Ready(
                done.take().unwrap_or_else(|| Err(Error::internal("a registration was polled after its end"))),
            ),
            ProvideProgress::Running(running) => running.as_mut().poll(cx),
        }
    }
}

impl Drop for AcceptedProvider {
    fn drop(&mut self) {
        self.hub.edit(&self.service).start(self.provider, &self.conn);
    }
}

fn check(request: &ProvideRequest<'_>) -> Result<()> {
    check_label("service", request.service)?;
    if ["weir", "rpc.", "$"].iter().any(|reserved| request.service.starts_with(reserved)) {
        return Err(Error::params("names of services do not begin with weir, rpc. or $"));
    }
    for method in request.methods {
        check_label("method", method)?;
    }
    if request.methods.len() > 1_000 {
        return Err(Error::params("a provider declares at most 1000 methods"));
    }
    if request.concurrency == 0 {
        return Err(Error::params("concurrency is at least 1"));
    }
    if request.takeover && !request.exclusive {
        return Err(Error::params("takeover is for exclusive providers"));
    }
    Ok(())
}

// === impl Registration ===

impl Registration {
    async fn run(&self) -> Result<AcceptedProvider> {
        let methods: Vec<&str> = self.request.methods.iter().map(String::as_str).collect();
        let request = self.request.borrow(&methods);
        let begun = self.hub.clock.now();
        loop {
            let service = self.hub.registry.find_or_create(request.service);
            let mut unreachable = service.registration.clone().lock_owned().await;
            if unreachable.is_some_and(|at| at > begun) {
                return Err(unclaimed(request.service));
            }
            // None: it was removed from the registry meanwhile.
            let Some(_guard) = RegisteringGuard::new(&self.hub, &service) else { continue };
            self.check_limits(&service)?;
            let lease = match self.required_claim(&service, &request).await? {
                Some(claim) => {
                    let claimed = self.claim(&service.name, claim, &request).await;
                    if claimed.as_ref().is_err_and(|error| error.code() == Code::BusUnavailable) {
                        *unreachable = Some(self.hub.clock.now());
                    }
                    Some(claimed?)
                }
                None => None,
            };
            return self.register(&service, &request, lease);
        }
    }

    fn check_limits(&self, service: &Arc<ServiceEntry>) -> Result<()> {
        let limits = &self.hub.config.limits;
        let provides = self.conn.provides.lock();
        let is_new = !provides.iter().any(|(_, slot)| Arc::ptr_eq(&slot.service, service));
        if is_new && provides.len() >= limits.provides.min(CallId::SLOTS) {
            let detail = format!("this connection provides {} services, which is the limit", provides.len());
            return Err(Error::new(Code::LimitReached, detail).with("limit", "limits.provides"));
        }
        drop(provides);
        if !service.state.lock().marks.counted && self.hub.registry.provided() >= limits.services {
            let detail = "this node has as many services as it accepts";
            return Err(Error::new(Code::LimitReached, detail).with("limit", "limits.services"));
        }
        Ok(())
    }

    /// The claim that the cluster has to grant. If the request wants it, a dead provider on this node is removed first.
    async fn required_claim(&self, service: &Arc<ServiceEntry>, request: &ProvideRequest<'_>) -> Result<Option<Claim>> {
        let mut probed: Option<Arc<PeerState>> = None;
        loop {
            let (taken, holder) = {
                let provides = self.conn.provides.lock();
                let state = service.state.lock();
                let own = own_key(&provides, service, &self.conn, &state);
                match state.required_claim(&service.name, own, request) {
                    Ok(claim) => return Ok(claim),
                    Err(taken) => (taken, state.providers.exclusive_holder(own)),
                }
            };
            let is_probed = |holder: &Arc<PeerState>| probed.as_ref().is_some_and(|probed| Arc::ptr_eq(probed, holder));
            let Some(holder) = holder.filter(|holder| request.probe && !is_probed(holder)) else { return Err(taken) };
            let (sender, alive) = oneshot::channel();
            holder.peer.probe(Box::new(move |alive| {
                // The registration may have been given up.
                let _ = sender.send(alive);
            }));
            if alive.await.unwrap_or(true) {
                return Err(taken);
            }
            probed = Some(holder);
        }
    }

    /// Claims a name in the cluster. Waits while the holder does not respond, and fails if it still needs the name.
    async fn claim(&self, service: &str, claim: Claim, request: &ProvideRequest<'_>) -> Result<Lease> {
        let hub = &*self.hub;
        let name = [NAME_PREFIX, service].concat();
        let deadline = hub.clock.now() + CLAIM_TIMEOUT.as_millis() as u64;
        let mut sweeps = hub.sweeps.subscribe();
        let mut released = 0;
        loop {
            let holders = match hub.cluster.claim(&name, claim).await {
                Ok(lease) => return Ok(lease),
                Err(ClaimError::Held(holders)) => holders,
                Err(ClaimError::Unreachable) => return Err(unclaimed(service)),
            };
            let mut all_released = true;
            let queries: Vec<_> = holders.iter().map(|node| self.query(*node, service, request)).collect();
            let query_deadline = hub.clock.now() + QUERY_TIMEOUT.as_millis() as u64;
            for mut query in queries {
                loop {
                    tokio::select! {
                        biased;
                        held = &mut query.held => {
                            match held {
                                Ok(true) => return Err(held_elsewhere(service, claim)),
                                Ok(false) => {}
                                Err(_) => all_released = false,
                            }
                            break;
                        }
                        _ = sweeps.changed() => if hub.clock.now() >= query_deadline {
                            all_released = false;
                            break;
                        },
                    }
                }
            }
            let now = hub.clock.now();
            if now >= deadline {
                return Err(held_elsewhere(service, claim));
            }
            // A name that was just released is free in the cluster very soon. Otherwise the lease has to expire, or the
            // holder to respond.
            released += usize::from(all_released);
            let pause = if all_released && released <= 3 { 0 } else { RETRY_PAUSE.as_millis() as u64 };
            while pause > 0 && hub.clock.now() < now + pause {
                if sweeps.changed().await.is_err() {
                    break;
                }
            }
        }
    }

    fn query(&self, node: NodeId, service: &str, request: &ProvideRequest<'_>) -> PendingQuery<'_> {
        let hub = &*self.hub;
        let number = hub.next_seq();
        let ProvideRequest { subject, probe, .. } = *request;
        let takeover = request.exclusive && request.takeover;
        let message = NameQuery { number, service, subject, takeover, probe };
        let query = hub.name_queries.begin(number, node);
        if hub.cluster.send(node, MessageKind::Calls, Priority::High, &message.encode()) != SendOutcome::Queued {
            hub.name_queries.remove(number);
        }
        query
    }

    fn register(
        &self,
        service: &Arc<ServiceEntry>,
        request: &ProvideRequest<'_>,
        lease: Option<Lease>,
    ) -> Result<AcceptedProvider> {
        self.check_limits(service)?;
        let Registration { hub, conn, .. } = self;
        let mut provides = conn.provides.lock();
        if conn.is_closed() {
            return Err(Error::new(Code::Cancelled, "the connection is closed"));
        }
        let mut state = hub.edit(service);
        let own = own_key(&provides, service, conn, &state);
        let slot = provides.vacant_key() as u32;
        let provider = state.provide(&service.name, conn, own, slot, request, lease)?;
        if own.is_none() {
            provides.insert(ProviderSlot { service: service.clone(), provider });
        }
        let (providers, fence) = (state.providers.count(), state.providers.all[provider as usize].fence);
        let follow_up = state.unlock();
        drop(provides);
        drop(follow_up);
        let (hub, service, conn) = (hub.clone(), service.clone(), conn.clone());
        Ok(AcceptedProvider { hub, service, conn, provider, providers, fence })
    }
}

/// The key of `conn` among the providers of `service`.
fn own_key(
    provides: &Slab<ProviderSlot>,
    service: &Arc<ServiceEntry>,
    conn: &Arc<PeerState>,
    state: &ServiceState,
) -> Option<u32> {
    let slots = provides.iter().map(|(_, slot)| slot).filter(|slot| Arc::ptr_eq(&slot.service, service));
    // A slot outlives its provider for a moment.
    slots.map(|slot| slot.provider).find(|key| state.providers.is_of(*key, conn))
}

/// Answers another node's query whether a name is held on this node. It is not held against the same subject, nor by a
/// dead provider if the query asks for a probe.
pub(super) fn answer_query(hub: &Hub, query: &NameQuery<'_>, callback: ProbeCallback) {
    let Some(service) = hub.registry.find(query.service) else { return callback(false) };
    let mut state = hub.edit(&service);
    let is_registering = state.registering > 0;
    let yields = if query.takeover { state.providers.yields_to(query.subject) } else { None };
    if let Some(key) = yields.filter(|_| !is_registering) {
        state.remove(key, Some("replaced"));
        drop(state);
        return callback(false);
    }
    let held = is_registering || state.providers.count_local() > 0;
    let holder = if query.probe && !is_registering { state.providers.exclusive_holder(None) } else { None };
    drop(state);
    match holder {
        Some(holder) => holder.peer.probe(callback),
        None => callback(held),
    }
}

/// Withdraws `conn` from a service. Returns how many calls it still has; None if it does not provide the service, or
/// withdrew before.
pub(super) fn withdraw(hub: &Hub, conn: &Arc<PeerState>, service: &Arc<ServiceEntry>) -> Option<usize> {
    let provides = conn.provides.lock();
    let mut state = hub.edit(service);
    let own = own_key(&provides, service, conn, &state)?;
    let in_flight = state.withdraw(own);
    let follow_up = state.unlock();
    drop(provides);
    drop(follow_up);
    Some(in_flight as usize)
}

impl<'a> RegisteringGuard<'a> {
    fn new(hub: &'a Hub, service: &'a Arc<ServiceEntry>) -> Option<Self> {
        let mut state = service.state.lock();
        if state.marks.dead {
            return None;
        }
        state.registering += 1;
        Some(RegisteringGuard { hub, service })
    }
}

impl Drop for RegisteringGuard<'_> {
    fn drop(&mut self) {
        let mut state = self.hub.edit(self.service);
        state.registering -= 1;
        state.effects.providers_changed = true;
    }
}

impl OwnedProvideRequest {
    fn new(request: &ProvideRequest<'_>) -> Self {
        let ProvideRequest { service, subject, methods, exclusive, takeover, probe, concurrency, names, meta } =
            *request;
        let options =
            ProvideRequest { exclusive, takeover, probe, concurrency, names, meta, ..ProvideRequest::new("") };
        let methods = methods.iter().map(|method| (*method).to_owned()).collect();
        OwnedProvideRequest { service: service.to_owned(), subject: subject.to_owned(), methods, options }
    }

    fn borrow<'a>(&'a self, methods: &'a [&'a str]) -> ProvideRequest<'a> {
        ProvideRequest { service: &self.service, subject: &self.subject, methods, ..self.options }
    }
}

fn unclaimed(service: &str) -> Error {
    Error::new(Code::BusUnavailable, format!("the bus is unavailable, so {service} cannot be claimed"))
}

fn held_elsewhere(service: &str, claim: Claim) -> Error {
    Error::new(
        Code::ServiceTaken,
        match claim {
            Claim::Shared => format!("{service} is provided exclusively by another connection"),
            Claim::Exclusive => {
                format!("{service} has a provider on another node and cannot be exclusive")
            }
        },
    )
}
