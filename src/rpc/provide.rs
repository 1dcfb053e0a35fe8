//! Registering a provider: on this node under the service's lock, and before that in the cluster, which has one holder of
//! an exclusive name and none of a shared one that is held exclusively.
//!
//! A name that another node holds is not refused on the word of the table: that node is asked. It may have died less than a
//! lease ago, its provider may have left in this moment, or it yields to the same subject.

use std::{
    pin::Pin,
    sync::{Arc, atomic::Ordering::Relaxed},
    task::{Context, Poll},
    time::Duration,
};

use futures_util::{FutureExt, future::BoxFuture};
use tokio::sync::oneshot;

use super::{
    Hub, MethodNames, ProbeCallback, ProvideRequest,
    mail::Ask,
    pending::{CallId, Conn, Registration},
    services::Service,
};
use crate::{
    channel::check_label,
    cluster::{Claim, ClaimError, Lease, MessageKind, NodeId, Priority, SendOutcome},
    error::{Code, Error, Result},
};

/// How long a name may be held by a node that does not answer: longer than its lease.
const PATIENCE: Duration = Duration::from_secs(13);
/// How long an answer may take.
const ANSWER: Duration = Duration::from_secs(1);
/// How long before a name whose holder does not answer is claimed again.
const AGAIN: Duration = Duration::from_millis(200);

/// A registration to come. Dropping it gives it up.
#[must_use = "dropping it gives the registration up"]
pub struct ProvideFuture(State);

enum State {
    Done(Option<Result<AcceptedProvider>>),
    Asking(BoxFuture<'static, Result<AcceptedProvider>>),
}

/// A registration that was accepted. The provider gets calls once this is dropped, so that a transport can answer first.
#[must_use = "calls begin when it is dropped"]
pub struct AcceptedProvider {
    hub: Arc<Hub>,
    service: Arc<Service>,
    conn: Arc<Conn>,
    provider: u32,
    /// How many provide the service now, on all nodes.
    pub providers: usize,
    /// Of exclusive providers.
    pub fence: Option<u64>,
}

/// A [`ProvideRequest`] on its own feet.
struct Wanted {
    service: String,
    subject: String,
    exclusive: bool,
    takeover: bool,
    probe: bool,
    concurrency: u32,
    names: MethodNames,
    meta: bool,
    methods: Vec<String>,
}

/// Keeps a service in the table, and its name held, while a provider is being registered.
struct Registering<'a> {
    hub: &'a Hub,
    service: &'a Arc<Service>,
}

/// What the holder of a name said.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Heard {
    Held,
    Free,
}

// === impl ProvideFuture ===

impl ProvideFuture {
    pub(super) fn begin(hub: Arc<Hub>, conn: Arc<Conn>, ask: &ProvideRequest<'_>) -> Self {
        if let Err(error) = check(ask) {
            return ProvideFuture(State::Done(Some(Err(error))));
        }
        let wanted = Wanted::of(ask);
        let mut asking = async move { provide(&hub, &conn, &wanted).await }.boxed();
        // Nearly always nobody has to be asked.
        match asking.as_mut().now_or_never() {
            Some(done) => ProvideFuture(State::Done(Some(done))),
            None => ProvideFuture(State::Asking(asking)),
        }
    }

    /// What came of it, if it is known already.
    pub fn try_finish(self) -> std::result::Result<Result<AcceptedProvider>, Self> {
        match self.0 {
            State::Done(Some(done)) => Ok(done),
            other => Err(ProvideFuture(other)),
        }
    }
}

impl Future for ProvideFuture {
    type Output = Result<AcceptedProvider>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        match &mut self.0 {
            State::Done(done) => {
                Poll::Ready(done.take().unwrap_or_else(|| Err(Error::internal("a registration was asked for twice"))))
            }
            State::Asking(asking) => asking.as_mut().poll(cx),
        }
    }
}

impl Drop for AcceptedProvider {
    fn drop(&mut self) {
        self.service.state.lock().start(self.provider, &self.conn);
        self.hub.flush(&self.service);
    }
}

async fn provide(hub: &Arc<Hub>, conn: &Arc<Conn>, wanted: &Wanted) -> Result<AcceptedProvider> {
    let methods: Vec<&str> = wanted.methods.iter().map(String::as_str).collect();
    let ask = wanted.ask(&methods);
    loop {
        let service = hub.find_or_create(ask.service);
        let _one_at_a_time = service.registering.clone().lock_owned().await;
        // None: it was forgotten at this moment.
        let Some(_registering) = Registering::begin(hub, &service) else { continue };
        hub.has_room_for(conn, &service)?;
        let lease = match need(conn, &service, &ask).await? {
            Some(claim) => Some(hub.claim(&service.name, claim, &ask).await?),
            None => None,
        };
        return hub.register(conn, &service, &ask, lease);
    }
}

/// What the cluster has to be asked for. A provider here that is dead is out of the way then, if the asker wants that.
async fn need(conn: &Arc<Conn>, service: &Arc<Service>, ask: &ProvideRequest<'_>) -> Result<Option<Claim>> {
    let mut probed: Option<Arc<Conn>> = None;
    loop {
        let mine = mine(conn, service);
        let (taken, holder) = {
            let state = service.state.lock();
            match state.need(&service.name, mine, ask) {
                Ok(need) => return Ok(need),
                Err(taken) => (taken, state.holder(mine)),
            }
        };
        let known = |holder: &Arc<Conn>| probed.as_ref().is_some_and(|probed| Arc::ptr_eq(probed, holder));
        let Some(holder) = holder.filter(|holder| ask.probe && !known(holder)) else { return Err(taken) };
        let (told, lives) = oneshot::channel();
        let told = move |lives| {
            // Who wanted to know may have given up.
            let _ = told.send(lives);
        };
        holder.peer.probe(Box::new(told));
        if lives.await.unwrap_or(true) {
            return Err(taken);
        }
        probed = Some(holder);
    }
}

/// The key of `conn` among the providers of `service`.
fn mine(conn: &Arc<Conn>, service: &Arc<Service>) -> Option<u32> {
    let provides = conn.provides.lock();
    provides.iter().find(|(_, mine)| Arc::ptr_eq(&mine.service, service)).map(|(_, mine)| mine.provider)
}

fn check(ask: &ProvideRequest<'_>) -> Result<()> {
    check_label("service", ask.service)?;
    if ["weir", "rpc.", "$"].iter().any(|own| ask.service.starts_with(own)) {
        return Err(Error::params("names of services do not begin with weir, rpc. or $"));
    }
    for method in ask.methods {
        check_label("method", method)?;
    }
    if ask.methods.len() > 1_000 {
        return Err(Error::params("a provider declares at most 1000 methods"));
    }
    if ask.concurrency == 0 {
        return Err(Error::params("concurrency is at least 1"));
    }
    if ask.takeover && !ask.exclusive {
        return Err(Error::params("takeover is for exclusive providers"));
    }
    Ok(())
}

impl Hub {
    /// Under what name the cluster knows a service.
    pub(super) const PREFIX: &'static str = "service:";

    fn has_room_for(&self, conn: &Arc<Conn>, service: &Arc<Service>) -> Result<()> {
        let is_mine = mine(conn, service).is_some();
        let provides = conn.provides.lock().len();
        if !is_mine && provides >= self.config.provides.min(CallId::SLOTS) {
            let detail = format!("this connection provides {provides} services, which is the most");
            return Err(Error::new(Code::LimitReached, detail).with("limit", "limits.provides"));
        }
        if !service.state.lock().counted && self.provided.load(Relaxed) >= self.config.services {
            let detail = "as many services as this node takes have providers";
            return Err(Error::new(Code::LimitReached, detail).with("limit", "limits.services"));
        }
        Ok(())
    }

    fn register(
        self: &Arc<Self>,
        conn: &Arc<Conn>,
        service: &Arc<Service>,
        ask: &ProvideRequest<'_>,
        lease: Option<Lease>,
    ) -> Result<AcceptedProvider> {
        self.has_room_for(conn, service)?;
        let mut provides = conn.provides.lock();
        if conn.is_closed() {
            return Err(Error::new(Code::Cancelled, "the connection is over"));
        }
        let mut state = service.state.lock();
        let mine = provides
            .iter()
            .find(|(_, mine)| Arc::ptr_eq(&mine.service, service) && state.is_of(mine.provider, conn))
            .map(|(_, mine)| mine.provider);
        let slot = provides.vacant_key() as u32;
        let registered = state.provide(&service.name, conn, mine, slot, ask, lease)?;
        if mine.is_none() {
            provides.insert(Registration { service: service.clone(), provider: registered.provider });
        }
        self.touched(service, &mut state);
        drop(state);
        drop(provides);
        if let Some(removed) = registered.replaced {
            self.replaced(service, removed, "replaced");
        }
        Ok(AcceptedProvider {
            hub: self.clone(),
            service: service.clone(),
            conn: conn.clone(),
            provider: registered.provider,
            providers: registered.providers,
            fence: registered.fence,
        })
    }

    /// Takes a name in the cluster. Waits while its holder is silent, and is refused by a holder that is not.
    async fn claim(&self, service: &str, claim: Claim, ask: &ProvideRequest<'_>) -> Result<Lease> {
        let name = [Self::PREFIX, service].concat();
        let give_up = self.clock.now() + PATIENCE.as_millis() as u64;
        let mut ticks = self.ticks.subscribe();
        let mut freed = 0;
        loop {
            let holders = match self.cluster.claim(&name, claim).await {
                Ok(lease) => return Ok(lease),
                Err(ClaimError::Held(holders)) => holders,
                Err(ClaimError::Unreachable) => {
                    let detail = format!("whether somebody else has {service} cannot be asked: the bus is away");
                    return Err(Error::new(Code::BusUnavailable, detail));
                }
            };
            let mut all_free = true;
            let asked: Vec<_> = holders.iter().map(|node| self.ask_holder(*node, service, ask)).collect();
            let until = self.clock.now() + ANSWER.as_millis() as u64;
            for mut answer in asked {
                loop {
                    tokio::select! {
                        biased;
                        heard = &mut answer.0 => {
                            match heard {
                                Ok(Heard::Held) => return Err(held_elsewhere(service, claim)),
                                Ok(Heard::Free) => {}
                                Err(_) => all_free = false,
                            }
                            break;
                        }
                        _ = ticks.changed() => if self.clock.now() >= until {
                            all_free = false;
                            break;
                        },
                    }
                }
            }
            let now = self.clock.now();
            if now >= give_up {
                return Err(held_elsewhere(service, claim));
            }
            // Given back at this moment: the table follows. Not known: its lease ends, or it answers again.
            freed += usize::from(all_free);
            let pause = if all_free && freed <= 3 { 0 } else { AGAIN.as_millis() as u64 };
            while pause > 0 && self.clock.now() < now + pause {
                if ticks.changed().await.is_err() {
                    break;
                }
            }
        }
    }

    fn ask_holder(&self, node: NodeId, service: &str, ask: &ProvideRequest<'_>) -> Asking<'_> {
        let (heard, answer) = oneshot::channel();
        let number = self.next_seq();
        let (subject, takeover, probe) = (ask.subject, ask.exclusive && ask.takeover, ask.probe);
        let mail = Ask { ask: number, service, subject, takeover, probe };
        self.asks.lock().insert(number, (node, heard));
        if self.cluster.send(node, MessageKind::Calls, Priority::High, &mail.write()) != SendOutcome::Queued {
            self.asks.lock().remove(&number);
        }
        Asking(answer, self, number)
    }

    /// Another node wants a name: `told` whether it is held here. The same subject gets it, and whoever asks for it in the
    /// place of the dead.
    pub(super) fn is_held(&self, ask: &Ask<'_>, told: ProbeCallback) {
        let Some(service) = self.find(ask.service) else { return told(false) };
        let mut state = service.state.lock();
        let yields = if ask.takeover { state.yields_to(ask.subject) } else { None };
        let Some(key) = yields.filter(|_| state.registering == 0) else {
            let held = state.registering > 0 || state.here() > 0;
            let holder = if ask.probe && state.registering == 0 { state.holder(None) } else { None };
            drop(state);
            return match holder {
                Some(holder) => holder.peer.probe(told),
                None => told(held),
            };
        };
        let removed = state.remove(key);
        self.touched(&service, &mut state);
        drop(state);
        self.replaced(&service, removed, "replaced");
        told(false);
    }

    /// Names that other nodes have by now are no longer provided here.
    pub(super) fn look_after_names(&self) {
        let mut services = std::mem::take(&mut *self.tenured.lock());
        services.retain(|service| {
            let mut state = service.state.lock();
            let mut gone = Vec::new();
            if state.is_lost() {
                gone.extend(state.keys_here().into_iter().map(|key| state.remove(key)));
                self.touched(service, &mut state);
            }
            state.tenured = state.is_tenured();
            let keep = state.tenured;
            drop(state);
            for removed in gone {
                self.replaced(service, removed, "lost");
            }
            keep
        });
        self.tenured.lock().append(&mut services);
    }

    /// A provider is one no longer, and did not ask for that.
    fn replaced(&self, service: &Arc<Service>, removed: super::services::Removed, reason: &str) {
        let (old, slot) = (removed.provider.conn.clone(), removed.provider.slot as usize);
        old.peer.withdrawn(&service.name, reason);
        self.late.retain(&old, |id, call| !(Arc::ptr_eq(call.provider(), &old) && id.slot() == slot));
        self.removed(service, removed);
    }
}

/// The answer of a node that was asked. Dropped, it is waited for no longer.
struct Asking<'a>(oneshot::Receiver<Heard>, &'a Hub, u64);

impl Drop for Asking<'_> {
    fn drop(&mut self) {
        self.1.asks.lock().remove(&self.2);
    }
}

impl<'a> Registering<'a> {
    fn begin(hub: &'a Hub, service: &'a Arc<Service>) -> Option<Self> {
        let mut state = service.state.lock();
        if state.dead {
            return None;
        }
        state.registering += 1;
        Some(Registering { hub, service })
    }
}

impl Drop for Registering<'_> {
    fn drop(&mut self) {
        let mut state = self.service.state.lock();
        state.registering -= 1;
        state.keep_or_release();
        drop(state);
        self.hub.forget(self.service, self.hub.clock.now(), false);
    }
}

impl Wanted {
    fn of(ask: &ProvideRequest<'_>) -> Self {
        Wanted {
            service: ask.service.to_owned(),
            subject: ask.subject.to_owned(),
            exclusive: ask.exclusive,
            takeover: ask.takeover,
            probe: ask.probe,
            concurrency: ask.concurrency,
            names: ask.names,
            meta: ask.meta,
            methods: ask.methods.iter().map(|method| (*method).to_owned()).collect(),
        }
    }

    fn ask<'a>(&'a self, methods: &'a [&'a str]) -> ProvideRequest<'a> {
        let Wanted { service, subject, .. } = self;
        let Wanted { exclusive, takeover, probe, concurrency, names, meta, .. } = *self;
        ProvideRequest { service, subject, exclusive, takeover, probe, concurrency, names, meta, methods }
    }
}

fn held_elsewhere(service: &str, claim: Claim) -> Error {
    Error::new(
        Code::ServiceTaken,
        match claim {
            Claim::Shared => format!("{service} is provided exclusively by another connection"),
            Claim::Exclusive => {
                format!("{service} has a provider on another node, so nobody else can have it exclusively")
            }
        },
    )
}
