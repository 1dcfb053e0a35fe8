//! The hub: services register providers, callers call, and every call gets one answer.
//!
//! ```text
//! transport ── Connection::call ──▶ Hub ── Peer::call ──▶ provider's transport
//! transport ◀── Peer::answer ────── Hub ◀── Connection::reply ── provider's transport
//! ```
//!
//! All of it is synchronous and per call there is no task, timer, future or allocation: a transport calls in with what it
//! read, and the hub calls out to [`Peer`]s that append to their outbound buffers. Rules that hold everywhere here:
//!
//! * No lock is held while a [`Peer`] is called. Locks are taken in the order *connection, service, the hub's lists*.
//! * weir writes a call to at most one provider. Once it may have been written it is never placed again.
//! * Time is read from one [`Clock`]; deadlines are found by [`Hub::sweep`], so they are kept to about its interval.

mod ask;
mod changes;
mod connection;
mod late;
mod peer;
mod pending;
mod services;
#[cfg(test)]
mod tests;

use std::{
    collections::{HashMap, VecDeque},
    sync::{
        Arc,
        atomic::{
            AtomicU64, AtomicUsize,
            Ordering::{self, Relaxed},
        },
    },
    time::{Duration, Instant},
};

use foldhash::fast::RandomState;
use parking_lot::Mutex;
use serde::Serialize;
use serde_json::value::RawValue;

pub use ask::{Asked, Refusal};
pub use changes::{Change, ChangeKind};
pub use connection::{Connection, Provided, Replied};
pub use peer::{Answer, Forward, Meta, Names, Peer, ProviderError, Written};
pub use pending::{CallId, CallIdText, Tag};

use crate::{
    duration,
    error::{Code, Error, Executed, Result},
};
use changes::Changes;
use late::Late;
use pending::Conn;
use services::{After, Expired, New, Overdue, Removed, Request, Room, Service, State, Target, Ticket};

/// How long a service without providers is still known: its calls wait for a new one, which is on its way in a deploy.
const REMEMBERED: Duration = Duration::from_secs(60);

/// What the hub allows. The defaults are those of the documented protocol.
#[derive(Clone, Debug)]
pub struct Config {
    /// Deadline of a call that names none, waiting included.
    pub timeout: Duration,
    /// Longest deadline that a call may name.
    pub max_timeout: Duration,
    /// How long a call waits for a provider of a service that had one within the last minute.
    pub wait_for_provider: Duration,
    /// How long after its deadline a reply is still known.
    pub late_window: Duration,
    /// Calls past their deadline whose reply is still known, on this node.
    pub late: usize,
    /// Calls in flight of one connection.
    pub calls: usize,
    /// Calls that wait for a provider, on this node.
    pub waiting: usize,
    /// Bytes of the calls that wait for a provider, on this node.
    pub waiting_bytes: usize,
    /// Services that have a provider, on this node; and as many again whose provider left within the last minute.
    pub services: usize,
    /// Services that one connection provides; at most 1,000.
    pub provides: usize,
}

/// Where the hub's time comes from.
#[derive(Debug)]
pub enum Clock {
    Real(Instant),
    /// Milliseconds, moved by a test.
    Manual(Arc<AtomicU64>),
}

/// A call as a transport read it.
#[derive(Clone, Copy, Debug)]
pub struct Call<'a> {
    pub service: &'a str,
    pub method: &'a str,
    pub params: Option<&'a RawValue>,
    /// Subject of who calls, from its permit.
    pub caller: &'a str,
    pub traceparent: Option<&'a str>,
    /// None: the configured one.
    pub timeout: Option<Duration>,
    /// How long to wait for a provider, even of a service that never had one. None: the configured time, and only if
    /// the service had one within the last minute.
    pub wait: Option<Duration>,
    /// A reply after the deadline is delivered by [`Peer::late`].
    pub late: bool,
}

/// What a connection asks to provide.
#[derive(Clone, Copy, Debug)]
pub struct Provide<'a> {
    pub service: &'a str,
    /// Subject of who provides, from its permit.
    pub subject: &'a str,
    /// Nobody else may provide the service.
    pub exclusive: bool,
    /// Replaces an exclusive provider of the same subject.
    pub takeover: bool,
    /// Calls in flight that it takes, at least 1.
    pub concurrency: u32,
    pub names: Names,
    /// Whether calls carry [`Meta`], and cancelled ones are told.
    pub meta: bool,
    /// For [`Hub::services`]; the hub refuses no method.
    pub methods: &'a [&'a str],
}

/// A service as discovery shows it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct ServiceInfo {
    pub service: String,
    pub providers: usize,
    pub in_flight: usize,
    pub exclusive: bool,
    /// What the providers declared, if they did.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub methods: Vec<String>,
}

/// What the hub holds at this moment, for tests and metrics.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    pub connections: usize,
    /// Services that have a provider.
    pub services: usize,
    pub providers: usize,
    /// Calls written to a provider and not answered.
    pub pending: usize,
    /// Calls that wait for a provider.
    pub waiting: usize,
    /// Calls past their deadline whose reply is still known.
    pub late: usize,
    /// Names in the table: services that have a provider, or had one within the last minute.
    pub names: usize,
}

/// What the hub has done so far; each only grows.
#[derive(Debug)]
pub struct Tally {
    /// Calls answered with a result.
    pub results: AtomicU64,
    /// Calls answered with an error of the provider.
    pub errors: AtomicU64,
    /// Calls that weir failed, in the order of [`Code::ALL`].
    pub failed: [AtomicU64; Code::ALL.len()],
    pub notifications: AtomicU64,
    /// Replies that came after the deadline.
    pub late: AtomicU64,
    /// Replies that nobody waits for: cancelled, unknown, or not that provider's.
    pub unmatched: AtomicU64,
}

/// See the [module](self). Shared as an `Arc`.
pub struct Hub {
    config: Config,
    clock: Clock,
    names: [Mutex<HashMap<Arc<str>, Arc<Service>, RandomState>>; Self::SHARDS],
    /// Identifies calls; starts anywhere, so that a reply to a former process matches nothing.
    seq: AtomicU64,
    /// Fences of names that are forgotten were not higher.
    fence: AtomicU64,
    provided: AtomicUsize,
    /// Services that have calls, and therefore deadlines.
    ticking: Mutex<Vec<Arc<Service>>>,
    /// Services whose provider left, and when.
    remembered: Mutex<VecDeque<(u64, Arc<Service>)>>,
    room: Arc<Room>,
    late: Late,
    changes: Changes,
    connections: AtomicUsize,
    tally: Tally,
}

impl Default for Config {
    fn default() -> Self {
        Config {
            timeout: Duration::from_secs(30),
            max_timeout: Duration::from_secs(600),
            wait_for_provider: Duration::from_secs(2),
            late_window: Duration::from_secs(300),
            late: 10_000,
            calls: 1_000,
            waiting: 10_000,
            waiting_bytes: 64 << 20,
            services: 10_000,
            provides: 1_000,
        }
    }
}

impl Default for Tally {
    fn default() -> Self {
        Tally {
            results: AtomicU64::new(0),
            errors: AtomicU64::new(0),
            failed: [const { AtomicU64::new(0) }; Code::ALL.len()],
            notifications: AtomicU64::new(0),
            late: AtomicU64::new(0),
            unmatched: AtomicU64::new(0),
        }
    }
}

impl Clock {
    pub fn real() -> Self {
        Clock::Real(Instant::now())
    }

    fn now(&self) -> u64 {
        match self {
            Clock::Real(start) => start.elapsed().as_millis() as u64,
            Clock::Manual(now) => now.load(Relaxed),
        }
    }
}

impl<'a> Call<'a> {
    /// A call with the configured timeout, by nobody in particular.
    pub fn new(service: &'a str, method: &'a str, params: Option<&'a RawValue>) -> Self {
        Call { service, method, params, caller: "", traceparent: None, timeout: None, wait: None, late: false }
    }

    /// Splits the name of a call at its last `/`. `method_not_found` if there is none.
    pub fn split(name: &str) -> Result<(&str, &str)> {
        name.rsplit_once('/')
            .ok_or_else(|| Error::new(Code::MethodNotFound, format!("{name} is no method of weir, nor SERVICE/METHOD")))
    }
}

impl<'a> Provide<'a> {
    /// A shared registration with the documented defaults.
    pub fn new(service: &'a str) -> Self {
        Provide {
            service,
            subject: "",
            exclusive: false,
            takeover: false,
            concurrency: 1_000,
            names: Names::Bare,
            meta: false,
            methods: &[],
        }
    }
}

// === impl Hub: what transports and app use ===

impl Hub {
    const SHARDS: usize = 16;
    /// The service that is always there.
    const BUILT_IN: &'static str = "weir";

    pub fn new(config: Config, clock: Clock) -> Arc<Self> {
        Arc::new(Hub {
            clock,
            names: Default::default(),
            seq: AtomicU64::new(fastrand::u64(..)),
            fence: AtomicU64::new(0),
            provided: AtomicUsize::new(0),
            ticking: Mutex::default(),
            remembered: Mutex::default(),
            room: Arc::default(),
            late: Late::new(config.late),
            changes: Changes::default(),
            connections: AtomicUsize::new(0),
            tally: Tally::default(),
            config,
        })
    }

    pub fn config(&self) -> &Config {
        &self.config
    }

    pub fn tally(&self) -> &Tally {
        &self.tally
    }

    /// A connection that calls or provides. Dropping it takes everything back that it did.
    ///
    /// `peer` must not own the [`Connection`], or neither is ever dropped.
    pub fn connect(self: &Arc<Self>, peer: Arc<dyn Peer>) -> Connection {
        self.connections.fetch_add(1, Relaxed);
        Connection::new(self.clone(), Arc::new(Conn::new(peer)))
    }

    /// Finds what is due. To be called every 20 ms or so, by one task.
    pub fn sweep(&self) {
        let now = self.clock.now();
        self.late.sweep(now);
        let mut services = std::mem::take(&mut *self.ticking.lock());
        services.retain(|service| {
            let mut state = service.state.lock();
            let (expired, after) = state.expire(now);
            state.ticking = !state.is_idle();
            let keep = state.ticking;
            drop(state);
            for call in expired {
                self.overdue(service, call, now);
            }
            self.after(service, after);
            if !keep {
                self.forget(service, now, false);
            }
            keep
        });
        self.ticking.lock().append(&mut services);
        self.forget_left(now);
    }

    /// Services whose name begins with `prefix` and that have a provider, at most `limit`, by name.
    pub fn services(&self, prefix: &str, limit: usize) -> Vec<ServiceInfo> {
        let mut found = Vec::new();
        for shard in &self.names {
            let shard = shard.lock();
            found.extend(shard.values().filter(|service| service.name.starts_with(prefix)).cloned());
        }
        found.sort_by(|a, b| a.name.cmp(&b.name));
        let mut infos: Vec<_> = found.iter().filter_map(|service| service.info()).take(limit).collect();
        if Self::BUILT_IN.starts_with(prefix) {
            let at = infos.partition_point(|info| info.service.as_str() < Self::BUILT_IN);
            infos.insert(at, Self::built_in_info());
            infos.truncate(limit);
        }
        infos
    }

    /// Waits until providers came or went, and says where they stand now: one entry per service however often it changed.
    /// For one task, which may take its time; while nobody asks at most one entry per service is kept.
    pub async fn changes(&self) -> Vec<Change> {
        self.changes.next().await
    }

    pub fn counts(&self) -> Counts {
        let mut counts = Counts {
            connections: self.connections.load(Relaxed),
            services: self.provided.load(Relaxed),
            late: self.late.len(),
            ..Counts::default()
        };
        for shard in &self.names {
            let shard = shard.lock();
            counts.names += shard.len();
            for service in shard.values() {
                let state = service.state.lock();
                counts.providers += state.providers();
                counts.pending += state.in_flight();
                counts.waiting += state.waiting();
            }
        }
        counts
    }

    fn built_in_info() -> ServiceInfo {
        ServiceInfo {
            service: Self::BUILT_IN.into(),
            providers: 1,
            in_flight: 0,
            exclusive: true,
            methods: vec!["echo".into(), "time".into()],
        }
    }
}

impl Service {
    fn info(&self) -> Option<ServiceInfo> {
        let state = self.state.lock();
        let providers = state.providers();
        (providers > 0).then(|| ServiceInfo {
            service: self.name.to_string(),
            providers,
            in_flight: state.in_flight(),
            exclusive: state.is_exclusive(),
            methods: state.methods(),
        })
    }
}

// === impl Hub: names ===

impl Hub {
    fn shard(&self, name: &str) -> &Mutex<HashMap<Arc<str>, Arc<Service>, RandomState>> {
        let bytes = name.as_bytes();
        let mixed = bytes.len() + usize::from(*bytes.first().unwrap_or(&0)) + usize::from(*bytes.last().unwrap_or(&0));
        &self.names[mixed % Self::SHARDS]
    }

    fn find(&self, name: &str) -> Option<Arc<Service>> {
        self.shard(name).lock().get(name).cloned()
    }

    fn find_or_create(&self, name: &str) -> Arc<Service> {
        let mut shard = self.shard(name).lock();
        if let Some(service) = shard.get(name) {
            return service.clone();
        }
        let service = Arc::new(Service::new(name, self.fence.load(Relaxed)));
        shard.insert(service.name.clone(), service.clone());
        service
    }

    /// Takes a service from the table that is deserted and whose time is over, or cut short.
    fn forget(&self, service: &Arc<Service>, now: u64, cut: bool) {
        let mut shard = self.shard(&service.name).lock();
        let mut state = service.state.lock();
        if cut {
            // What is still in it may finish; after that nothing holds the name.
            state.left = None;
        }
        let over = state.left.is_none_or(|left| now >= left + REMEMBERED.as_millis() as u64);
        if over && state.is_deserted() && !state.dead {
            state.dead = true;
            // A name that comes back goes on above the fence that it had, though nothing remembers it.
            self.fence.fetch_max(state.fence, Relaxed);
            shard.remove(&service.name);
        }
    }

    fn forget_left(&self, now: u64) {
        let time = REMEMBERED.as_millis() as u64;
        loop {
            let (service, full) = {
                let mut remembered = self.remembered.lock();
                let full = remembered.len() > self.config.services;
                if !remembered.front().is_some_and(|(left, _)| full || now >= left + time) {
                    return;
                }
                let Some((_, service)) = remembered.pop_front() else { return };
                (service, full)
            };
            let mut state = service.state.lock();
            let left = state.left.filter(|left| !full && now < left + time);
            state.remembered = left.is_some();
            drop(state);
            match left {
                // It came and went again since.
                Some(left) => self.remembered.lock().push_back((left, service)),
                None => self.forget(&service, now, true),
            }
        }
    }

    /// Brings the hub's books up to date with a service whose providers changed. The lock of `state` is held.
    fn touched(&self, service: &Arc<Service>, state: &mut State) {
        let providers = state.providers();
        if (providers > 0) != state.counted {
            state.counted = providers > 0;
            if state.counted {
                self.provided.fetch_add(1, Relaxed);
                state.left = None;
            } else {
                self.provided.fetch_sub(1, Relaxed);
                let now = self.clock.now();
                state.left = Some(now);
                if !std::mem::replace(&mut state.remembered, true) {
                    self.remembered.lock().push_back((now, service.clone()));
                }
            }
        }
        if providers != state.announced || state.replaced {
            self.changes.mark(service, state);
        }
    }
}

// === impl Hub: calls ===

impl Hub {
    fn next_seq(&self) -> u64 {
        self.seq.fetch_add(1, Ordering::Relaxed)
    }

    fn failed_counter(&self, code: Code) -> Option<&AtomicU64> {
        Code::ALL.iter().position(|known| *known == code).map(|at| &self.tally.failed[at])
    }

    fn count_failed(&self, code: Code) {
        if let Some(counter) = self.failed_counter(code) {
            counter.fetch_add(1, Relaxed);
        }
    }

    fn fail(&self, conn: &Conn, live: u32, seq: u64, error: Error) {
        let code = error.code();
        if conn.settle(live, seq, Answer::Failed(error)) {
            self.count_failed(code);
        }
    }

    /// Until when a call may wait for a provider, and its place among those that do; or why it may not.
    fn may_wait(&self, name: &str, state: &State, request: &Request<'_>) -> Result<(u64, Ticket)> {
        let now = self.clock.now();
        let usual = self.config.wait_for_provider.as_millis() as u64;
        // One is just registering, or was here within the last minute.
        let expected = state.providers() > 0
            || state.is_flushing()
            || state.left.is_some_and(|left| now < left + REMEMBERED.as_millis() as u64);
        let until = match request.wait {
            Some(wait) if wait > 0 => now + wait,
            None if expected && usual > 0 => now + usual,
            _ => return Err(no_provider(name)),
        };
        let ticket = self.room.take(request.bytes(), self.config.waiting, self.config.waiting_bytes);
        Ok((until, ticket.ok_or_else(|| no_provider(name).with("limit", "waiting"))?))
    }

    /// Lets a notification wait if it may. True: the service has to be put among those that tick.
    fn wait_notification(&self, service: &Service, state: &mut State, request: &Request<'_>) -> bool {
        let Ok((until, ticket)) = self.may_wait(&service.name, state, request) else { return false };
        let call = New { seq: self.next_seq(), caller: None, deadline: until, timeout: 0 };
        state.enqueue(call, until, request.store(ticket));
        self.starts_ticking(state)
    }

    /// Writes a call that has been placed; looks for another provider while none took it. `entry`: not of notifications.
    fn deliver(&self, service: &Arc<Service>, mut target: Target, request: &Request<'_>, entry: Option<(u32, u64)>) {
        let mut tried = Vec::new();
        loop {
            let meta = target.meta.then(|| Meta {
                caller: request.caller,
                deadline_ms: target.id.map(|_| target.deadline.saturating_sub(self.clock.now())),
                traceparent: request.traceparent,
                fence: target.fence,
            });
            let written = target.conn.peer.call(&Forward {
                id: target.id,
                service: &service.name,
                method: request.method,
                names: target.names,
                params: request.params,
                meta,
            });
            if written == Written::Yes {
                return;
            }
            let mut state = service.state.lock();
            if let Some((index, seq)) = entry
                && !state.take_back(index, seq)
            {
                // Answered while it was being written: cancelled, overdue, or the provider was dropped.
                return;
            }
            let removed = match written {
                Written::Gone => state.remove_conn(target.provider, &target.conn),
                Written::Full | Written::Yes => None,
            };
            if removed.is_some() {
                self.touched(service, &mut state);
            }
            if written == Written::Full {
                tried.push(target.provider);
            }
            let next = state.pick(&tried, entry.is_none());
            let mut refused = None;
            let mut starts = false;
            let again = match (next, entry) {
                (Some(provider), Some((index, _))) => Some(state.place_at(index, provider)),
                (Some(provider), None) => Some(state.notify(provider)),
                (None, Some((index, _))) => {
                    // Who took none of it will not in a moment either, and must not be asked for ever.
                    let stays = match state.has_active() {
                        true => Err(busy(&service.name)),
                        false => self.may_wait(&service.name, &state, request),
                    };
                    match stays {
                        Ok((until, ticket)) => state.wait_first(index, until, request.store(ticket)),
                        Err(error) => refused = state.give_up(index).map(|done| (done, error)),
                    }
                    None
                }
                (None, None) => {
                    starts = !state.has_active() && self.wait_notification(service, &mut state, request);
                    None
                }
            };
            drop(state);
            if starts {
                self.ticking.lock().push(service.clone());
            }
            if let Some(removed) = removed {
                self.removed(service, removed);
            }
            if let Some((done, error)) = refused {
                self.fail(&done.caller, done.live, done.seq, error);
            }
            match again {
                Some(next) => target = next,
                None => return,
            }
        }
    }

    /// Whether the hub has to be told that this service has deadlines now.
    fn starts_ticking(&self, state: &mut State) -> bool {
        !state.is_idle() && !std::mem::replace(&mut state.ticking, true)
    }

    /// Writes what waits, in order, while there is a provider for it.
    fn flush(&self, service: &Arc<Service>) {
        if !service.state.lock().begin_flush() {
            return;
        }
        loop {
            // The guard must not live on in the loop's body, which calls peers.
            let next = service.state.lock().next_waiting();
            let Some((target, entry, stored)) = next else { return };
            self.deliver(service, target, &stored.request(), entry);
        }
    }

    fn after(&self, service: &Arc<Service>, after: After) {
        for (conn, slot) in &after.closed {
            self.vacate(service, conn, *slot);
        }
        if after.flush {
            self.flush(service);
        }
    }

    /// Frees the slot of a registration that is no more.
    fn vacate(&self, service: &Arc<Service>, conn: &Conn, slot: u16) {
        let mut provides = conn.provides.lock();
        if provides.get(usize::from(slot)).is_some_and(|registration| Arc::ptr_eq(&registration.service, service)) {
            provides.remove(usize::from(slot));
        }
    }

    /// Fails the calls of a provider that is no more.
    fn removed(&self, service: &Arc<Service>, removed: Removed) {
        let Removed { provider, orphans } = removed;
        self.vacate(service, &provider.conn, provider.slot);
        for call in orphans {
            let detail = format!("the provider of {} went before it answered", service.name);
            self.fail(&call.caller, call.live, call.seq, Error::new(Code::ProviderGone, detail));
        }
    }

    fn overdue(&self, service: &Service, call: Expired, now: u64) {
        let Expired { done, timeout, why } = call;
        let name = &service.name;
        let in_time = || duration::format(Duration::from_millis(u64::from(timeout)));
        let (error, late) = match why {
            Overdue::Unanswered { provider, id } => {
                let detail = format!("{name} did not answer within {}", in_time());
                (Error::new(Code::Timeout, detail), Some((provider, id)))
            }
            Overdue::Unwritten => {
                let detail = format!("no provider of {name} came within {}", in_time());
                (Error::new(Code::Timeout, detail).executed(Executed::No), None)
            }
            Overdue::Unprovided { full: true } => (busy(name), None),
            Overdue::Unprovided { full: false } => (no_provider(name), None),
        };
        let Some(live) = done.caller.take(done.live, done.seq) else { return };
        self.count_failed(error.code());
        if let Some((provider, id)) = late {
            let until = now + self.config.late_window.as_millis() as u64;
            let tag = live.late.then(|| live.tag.clone());
            self.late.put(id, until, done.caller.clone(), tag, provider);
        }
        done.caller.peer.answer(&live.tag, Answer::Failed(error));
    }
}

fn busy(name: &str) -> Error {
    Error::new(Code::Busy, format!("every provider of {name} has as many calls as it takes"))
}

fn no_provider(name: &str) -> Error {
    Error::new(Code::NoProvider, format!("nobody provides {name}"))
}
