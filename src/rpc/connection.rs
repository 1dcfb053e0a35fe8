//! What a transport does with the hub on behalf of one connection.

use std::{
    sync::{
        Arc, Weak,
        atomic::Ordering::{Relaxed, SeqCst},
    },
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use serde_json::value::{RawValue, to_raw_value};

use super::{
    Call, CallAnswer, Hub, ProvideFuture, ProvideRequest,
    pending::{CallId, CallerId, Conn, Live, Registration},
    route::{Failed, Tried, busy, no_provider},
    services::{After, Done, New, Request, Service},
};
use crate::{
    channel::check_label,
    duration,
    error::{Code, Error, Result},
    metrics::Outcome,
};

/// A connection's hold on the hub. Dropping it withdraws its services, whose calls then fail as `provider_gone`, and
/// cancels the calls that it made.
///
/// One task uses it: calls are written to a provider in the order in which they are made here.
pub struct HubConnection {
    pub(super) hub: Arc<Hub>,
    pub(super) conn: Arc<Conn>,
}

/// What a connection provides, as long as there is one.
#[derive(Clone, Debug)]
pub struct ProvidedServices(Weak<Conn>);

/// What became of a reply.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ReplyOutcome {
    Answered,
    /// After the deadline; delivered if the caller asked for that.
    Late,
    /// Nobody waits for it: cancelled, unknown, or another provider's.
    Unmatched,
}

impl ProvidedServices {
    /// The services, by name.
    pub fn names(&self) -> Vec<String> {
        let Some(conn) = self.0.upgrade() else { return Vec::new() };
        let mut names: Vec<_> = conn.provides.lock().iter().map(|(_, mine)| mine.service.name.to_string()).collect();
        names.sort_unstable();
        names
    }
}

impl HubConnection {
    pub(super) fn new(hub: Arc<Hub>, conn: Arc<Conn>) -> Self {
        HubConnection { hub, conn }
    }

    /// Makes a call. [`Peer::answer`](super::Peer::answer) is called once, perhaps before this returns.
    ///
    /// Two calls in flight may have the same id: both are made and both answered, since what their caller makes of that
    /// is its own affair, and an error under that id would be taken for the answer of the first.
    pub fn call(&self, to: CallerId, call: &Call<'_>) {
        if let Err((to, error)) = self.enter(to, call) {
            self.hub.metrics.call_ended(error.code().into(), None);
            self.conn.peer.answer(&to, CallAnswer::Failed(error));
        }
    }

    /// Sends a notification: to one provider, whatever it has to do already; no answer, no error.
    pub fn notify(&self, call: &Call<'_>) {
        self.hub.notify(call);
    }

    /// Cancels the calls in flight under `id`, which are answered as `cancelled`. Returns how many there were.
    pub fn cancel(&self, id: &[u8]) -> usize {
        self.give_up(|call| call.tag.id() == id, &Error::new(Code::Cancelled, "cancelled by the caller"))
    }

    /// Ends all calls in flight, which are answered as `draining`: the node goes before their answers have come.
    pub fn fail_in_flight(&self) -> usize {
        self.give_up(|_| true, &Error::new(Code::Draining, "this node left before the answer came"))
    }

    fn give_up(&self, which: impl Fn(&Live) -> bool, why: &Error) -> usize {
        let given_up: Vec<Live> = {
            let mut live = self.conn.live.lock();
            let found: Vec<usize> = live.iter().filter(|(_, call)| which(call)).map(|(at, _)| at).collect();
            found.into_iter().map(|at| live.remove(at)).collect()
        };
        let count = given_up.len();
        for call in given_up {
            let executed = self.hub.abandon(&call);
            self.hub.ended(&self.conn, &call, why.code().into());
            self.conn.peer.answer(&call.tag, CallAnswer::Failed(why.clone().executed(executed)));
        }
        count
    }

    /// A provider's reply. [`CallAnswer::bad_reply`] for one that cannot be passed on.
    pub fn reply(&self, id: CallId, answer: CallAnswer<'_>) -> ReplyOutcome {
        let provides = self.conn.provides.lock();
        if let Some(registration) = provides.get(id.slot()) {
            let finished = registration.service.state.lock().finish(id, &self.conn);
            if let Some((done, after)) = finished {
                let then = after.is_something().then(|| (registration.service.clone(), after));
                drop(provides);
                return self.finished(&done, answer, then);
            }
        }
        drop(provides);
        self.reply_late(id, answer)
    }

    /// The reply of another node, which says of which service it is: it has more of them than an id has slots.
    pub(super) fn reply_of(
        &self,
        service: &Arc<Service>,
        id: CallId,
        load: u64,
        answer: CallAnswer<'_>,
    ) -> ReplyOutcome {
        let mut state = service.state.lock();
        let finished = state.finish(id, &self.conn);
        state.heard_load(&self.conn, u32::try_from(load).unwrap_or(u32::MAX), self.hub.clock.now());
        drop(state);
        match finished {
            Some((done, after)) => {
                let then = after.is_something().then(|| (service.clone(), after));
                self.finished(&done, answer, then)
            }
            None => self.reply_late(id, answer),
        }
    }

    #[inline]
    fn finished(&self, done: &Done, answer: CallAnswer<'_>, then: Option<(Arc<Service>, After)>) -> ReplyOutcome {
        let answered = self.hub.settle(done, answer);
        if let Some((service, after)) = then {
            self.hub.after(&service, after);
        }
        if answered { ReplyOutcome::Answered } else { ReplyOutcome::Unmatched }
    }

    fn reply_late(&self, id: CallId, answer: CallAnswer<'_>) -> ReplyOutcome {
        let Some(call) = self.hub.late.take(id, &self.conn) else { return ReplyOutcome::Unmatched };
        if !self.conn.is_link() {
            // On the node where the provider is, be it for a caller of another.
            self.hub.metrics.calls_late.add(1);
        }
        if let Some(tag) = &call.tag {
            call.caller.peer.late(tag, answer);
        }
        ReplyOutcome::Late
    }

    /// Registers this connection as a provider, or changes how it is registered. Where other nodes have to be asked it
    /// takes a moment; dropping what is returned gives it up.
    ///
    /// # Errors
    /// `service_taken`; `limit_reached`; `invalid_params` for names and numbers that are none; `bus_unavailable` while the
    /// other nodes cannot be asked.
    pub fn provide(&self, ask: &ProvideRequest<'_>) -> ProvideFuture {
        ProvideFuture::begin(self.hub.clone(), self.conn.clone(), ask)
    }

    /// Ends a registration: no new calls; those in flight may still be answered. Returns how many that are.
    ///
    /// # Errors
    /// `not_found` if this connection does not provide the service.
    pub fn withdraw(&self, service: &str) -> Result<usize> {
        let unknown = || Error::new(Code::NotFound, format!("this connection does not provide {service}"));
        let service = self.hub.find(service).ok_or_else(unknown)?;
        let registered = self.conn.provides.lock().iter().any(|(_, mine)| Arc::ptr_eq(&mine.service, &service));
        registered.then(|| self.leave(&service)).flatten().ok_or_else(unknown)
    }

    /// Ends all registrations, as [`withdraw`](Self::withdraw) does: for a node that drains.
    pub fn withdraw_all(&self) -> usize {
        let services: Vec<_> = self.conn.provides.lock().iter().map(|(_, mine)| mine.service.clone()).collect();
        services.iter().filter_map(|service| self.leave(service)).sum()
    }

    /// What it provides, from now on, for whoever lists connections.
    pub fn provided_services(&self) -> ProvidedServices {
        ProvidedServices(Arc::downgrade(&self.conn))
    }

    /// Calls made and not answered.
    pub fn in_flight(&self) -> usize {
        self.conn.live.lock().len()
    }

    /// Whether it waits for no answer and nobody waits for one of it, or may begin to.
    pub fn is_idle(&self) -> bool {
        self.in_flight() == 0 && self.conn.provides.lock().is_empty()
    }

    /// Whether it provides a service besides this one.
    pub fn provides_other(&self, service: &str) -> bool {
        self.conn.provides.lock().iter().any(|(_, mine)| *mine.service.name != *service)
    }

    fn enter(&self, mut tag: CallerId, call: &Call<'_>) -> Result<(), (CallerId, Error)> {
        let hub = &*self.hub;
        let timeout = match hub.check(call) {
            Ok(timeout) => timeout,
            Err(error) => return Err((tag, error)),
        };
        if call.service == Hub::BUILT_IN {
            return self.built_in(tag, call);
        }
        let request = Request::of(call);
        loop {
            let service = match hub.find_for(call.service, &request) {
                Ok(service) => service,
                Err(error) => return Err((tag, error)),
            };
            match self.enter_at(&service, tag, timeout, &request) {
                Ok(None) => return Ok(()),
                Ok(Some((done, error))) => {
                    hub.settle(&done, CallAnswer::Failed(error));
                    return Ok(());
                }
                Err((tag, Some(error))) => {
                    hub.forget_unused(&service, &request);
                    return Err((tag, error));
                }
                Err((returned, None)) => tag = returned,
            }
        }
    }

    /// What is returned is to be failed. Without an error: `service` is dead.
    #[inline]
    pub(super) fn enter_at(
        &self,
        service: &Arc<Service>,
        tag: CallerId,
        timeout: u32,
        request: &Request<'_>,
    ) -> Result<Option<Failed>, (CallerId, Option<Error>)> {
        let hub = &*self.hub;
        let started = hub.clock.micros();
        let mut live = self.conn.live.lock();
        if live.len() >= self.conn.calls {
            let detail = format!("{} calls of this connection are in flight, which is the most", live.len());
            return Err((tag, Some(Error::new(Code::LimitReached, detail).with("limit", "limits.calls"))));
        }
        let vacant = live.vacant_entry();
        let mut state = service.state.lock();
        if state.dead {
            return Err((tag, None));
        }
        // What another node has asked for is for a provider here, and waits there.
        let only_here = self.conn.is_link();
        let chosen = match state.is_queued() && !only_here {
            true => None,
            false => state.pick(&[], false, only_here, started / 1_000),
        };
        let full = || state.has_active(only_here) && (only_here || !state.is_flushing());
        if chosen.is_none() && full() || !state.has_room() {
            return Err((tag, Some(busy(&service.name))));
        }
        if chosen.is_none() && only_here {
            return Err((tag, Some(no_provider(&service.name))));
        }
        let seq = hub.next_seq();
        let caller = Some((self.conn.clone(), vacant.key() as u32));
        let new = New { seq, caller, deadline: started / 1_000 + u64::from(timeout), timeout };
        let (index, target) = match chosen {
            Some(provider) => {
                let (index, target) = state.place(new, provider);
                (index, Some(target))
            }
            None => match hub.may_wait(&service.name, &state, request) {
                Ok((until, ticket)) => (state.enqueue(new, until, request.store(ticket)), None),
                Err(error) => return Err((tag, Some(error))),
            },
        };
        let starts = hub.starts_ticking(&mut state);
        drop(state);
        // Nobody answers before this is here: the right to answer is taken under the lock that `live` holds.
        vacant.insert(Live { tag, service: service.clone(), index, seq, started, late: request.late });
        drop(live);
        if starts {
            hub.ticking.lock().push(service.clone());
        }
        let Some(target) = target else { return Ok(None) };
        Ok(hub.try_deliver(service, target, request, Some((index, seq)), &mut Tried::default()))
    }

    fn built_in(&self, tag: CallerId, call: &Call<'_>) -> Result<(), (CallerId, Error)> {
        let time;
        let result = match call.method {
            "echo" => call.params.unwrap_or(RawValue::NULL),
            "time" => {
                time = wall_clock();
                &time
            }
            method => {
                let detail = format!("the service weir has the methods echo and time, and no {method}");
                return Err((tag, Error::new(Code::MethodNotFound, detail)));
            }
        };
        self.hub.metrics.call_ended(Outcome::Ok, None);
        self.conn.peer.answer(&tag, CallAnswer::Result(result));
        Ok(())
    }

    /// None: this connection does not provide it, or withdrew it already.
    fn leave(&self, service: &Arc<Service>) -> Option<usize> {
        let provides = self.conn.provides.lock();
        let mut state = service.state.lock();
        let (_, mine) = provides
            .iter()
            .find(|(_, mine)| Arc::ptr_eq(&mine.service, service) && state.is_of(mine.provider, &self.conn))?;
        let (in_flight, after) = state.withdraw(mine.provider);
        self.hub.touched(service, &mut state);
        drop(state);
        drop(provides);
        self.hub.after(service, after);
        Some(in_flight as usize)
    }
}

impl Drop for HubConnection {
    fn drop(&mut self) {
        let HubConnection { hub, conn } = self;
        conn.closed.store(true, SeqCst);
        // Its own calls first, or those that it made to itself would be answered.
        let live = std::mem::take(&mut *conn.live.lock());
        for (_, call) in live {
            hub.ended(conn, &call, Outcome::Cancelled);
            hub.abandon(&call);
        }
        let provides = std::mem::take(&mut *conn.provides.lock());
        for (_, Registration { service, provider }) in provides {
            let mut state = service.state.lock();
            let Some(removed) = state.remove_conn(provider, conn) else { continue };
            hub.touched(&service, &mut state);
            drop(state);
            hub.removed(&service, removed);
        }
        hub.late.retain(conn, |_, call| !Arc::ptr_eq(&call.caller, conn) && !Arc::ptr_eq(call.provider(), conn));
        if !conn.is_link() {
            hub.connections.fetch_sub(1, Relaxed);
        }
    }
}

impl Hub {
    /// Sends a notification; see [`HubConnection::notify`].
    pub fn notify(&self, call: &Call<'_>) {
        if self.check(call).is_err() || call.service == Hub::BUILT_IN {
            return;
        }
        let request = Request::of(call);
        loop {
            let Ok(service) = self.find_for(call.service, &request) else { return };
            let now = self.clock.now();
            let mut state = service.state.lock();
            if state.dead {
                continue;
            }
            let chosen = if state.is_queued() { None } else { state.pick(&[], true, false, now) };
            if let Some(provider) = chosen {
                let target = state.notify(provider);
                drop(state);
                return self.deliver(&service, target, &request, None);
            }
            let starts = self.wait_notification(&service, &mut state, &request);
            drop(state);
            if starts {
                self.ticking.lock().push(service);
            } else {
                self.forget_unused(&service, &request);
            }
            return;
        }
    }

    /// Refuses what cannot be called. Returns the timeout in milliseconds.
    fn check(&self, call: &Call<'_>) -> Result<u32> {
        if call.as_sent.is_none() {
            check_label("method", call.method)?;
        }
        let most = self.config.max_timeout;
        let timeout = call.timeout.unwrap_or_else(|| self.config.timeout.min(most));
        if timeout > most || call.wait.is_some_and(|wait| wait > most) {
            return Err(Error::params(format!("timeout and wait are at most {}", duration::format(most))));
        }
        if timeout < Duration::from_millis(1) {
            return Err(Error::params("a timeout is at least 1ms"));
        }
        Ok(u32::try_from(timeout.as_millis()).unwrap_or(u32::MAX))
    }
}

fn wall_clock() -> Box<RawValue> {
    let ms = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_millis() as u64;
    to_raw_value(&serde_json::json!({ "time": ms })).unwrap_or_else(|_| RawValue::NULL.to_owned())
}
