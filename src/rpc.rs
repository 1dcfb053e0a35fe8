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
//! * Time is read from one [`MonotonicClock`]; deadlines are found by [`Hub::sweep`], so they are kept to about its interval.

mod ask;
mod changes;
mod connection;
mod late;
mod link;
mod mail;
mod names;
mod nodes;
mod peer;
mod pending;
mod provide;
mod route;
mod services;
#[cfg(test)]
mod tests;

use std::{
    collections::{HashMap, VecDeque},
    sync::{
        Arc,
        atomic::{AtomicU64, AtomicUsize, Ordering::Relaxed},
    },
    time::Duration,
};

use foldhash::fast::RandomState;
use parking_lot::Mutex;
use serde::Serialize;
use serde_json::value::RawValue;
use tokio::sync::{oneshot, watch};

pub use crate::cluster::MonotonicClock;
pub use ask::{CallError, CallFuture};
pub use changes::{ServiceChange, ServiceChangeKind, UnpublishedChange};
pub use connection::{HubConnection, ProvidedServices, ReplyOutcome};
pub use peer::{
    CallAnswer, CallMeta, ForwardedCall, MethodNames, Peer, ProbeCallback, ProviderError, RelayInfo, WriteOutcome,
};
pub use pending::{CallId, CallIdText, CallerId};
pub use provide::{AcceptedProvider, ProvideFuture};

use crate::{
    cluster::{Cluster, MessageKind, NodeId},
    error::{Code, Error, Result},
    metrics::Metrics,
};
use changes::Changes;
use late::Late;
use nodes::Nodes;
use pending::Conn;
use provide::Heard;
use services::{Room, Service};

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
    /// The same call as an adapter's own world wrote it, JSON, for providers of that world; others get `method` and
    /// `params`. What may be a method is then that world's affair.
    pub as_sent: Option<&'a RawValue>,
}

/// What a connection asks to provide.
#[derive(Clone, Copy, Debug)]
pub struct ProvideRequest<'a> {
    pub service: &'a str,
    /// Subject of who provides, from its permit.
    pub subject: &'a str,
    /// Nobody else may provide the service.
    pub exclusive: bool,
    /// Replaces an exclusive provider of the same subject.
    pub takeover: bool,
    /// Has an exclusive provider [probed](Peer::probe), on whatever node it is, and is refused only by one that lives.
    pub probe: bool,
    /// Calls in flight that it takes, at least 1.
    pub concurrency: u32,
    pub names: MethodNames,
    /// Whether calls carry [`CallMeta`], and cancelled ones are told.
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
pub struct HubCounts {
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

type Shard = Mutex<HashMap<Arc<str>, Arc<Service>, RandomState>>;

/// See the [module](self). Shared as an `Arc`.
pub struct Hub {
    config: Config,
    clock: MonotonicClock,
    names: [Shard; Self::SHARDS],
    /// Identifies calls; starts anywhere, so that a reply to a former process matches nothing.
    seq: AtomicU64,
    cluster: Arc<dyn Cluster>,
    nodes: Nodes,
    /// Who waits for the holder of a name to answer.
    asks: Mutex<HashMap<u64, (NodeId, oneshot::Sender<Heard>)>>,
    /// Told of every sweep.
    ticks: watch::Sender<()>,
    sweeps: AtomicUsize,
    /// Services whose names are held in the cluster.
    tenured: Mutex<Vec<Arc<Service>>>,
    provided: AtomicUsize,
    /// Services that have calls, and therefore deadlines.
    ticking: Mutex<Vec<Arc<Service>>>,
    /// Services whose provider left, and when.
    remembered: Mutex<VecDeque<(u64, Arc<Service>)>>,
    room: Arc<Room>,
    late: Late,
    changes: Changes,
    connections: AtomicUsize,
    /// Calls timed since the last sweep.
    timed: AtomicU64,
    metrics: Arc<Metrics>,
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

impl<'a> Call<'a> {
    /// A call with the configured timeout, by nobody in particular.
    pub fn new(service: &'a str, method: &'a str, params: Option<&'a RawValue>) -> Self {
        Call {
            service,
            method,
            params,
            caller: "",
            traceparent: None,
            timeout: None,
            wait: None,
            late: false,
            as_sent: None,
        }
    }

    /// Splits the name of a call at its last `/`. `method_not_found` if there is none.
    pub fn split(name: &str) -> Result<(&str, &str)> {
        name.rsplit_once('/')
            .ok_or_else(|| Error::new(Code::MethodNotFound, format!("{name} is no method of weir, nor SERVICE/METHOD")))
    }
}

impl<'a> ProvideRequest<'a> {
    /// A shared registration with the documented defaults.
    pub fn new(service: &'a str) -> Self {
        ProvideRequest {
            service,
            subject: "",
            exclusive: false,
            takeover: false,
            probe: false,
            concurrency: 1_000,
            names: MethodNames::Short,
            meta: false,
            methods: &[],
        }
    }
}

// === impl Hub: what transports and app use ===

impl Hub {
    const SHARDS: usize = 16;
    /// Calls timed between two sweeps.
    const TIMED: u64 = 64;
    /// The service that is always there.
    const BUILT_IN: &'static str = "weir";

    pub fn new(config: Config, clock: MonotonicClock, cluster: Arc<dyn Cluster>, metrics: Arc<Metrics>) -> Arc<Self> {
        Arc::new(Hub {
            nodes: Nodes::new(cluster.members(), cluster.roster(Self::PREFIX), cluster.inbox(MessageKind::Calls)),
            cluster,
            asks: Mutex::default(),
            ticks: watch::Sender::new(()),
            sweeps: AtomicUsize::new(0),
            tenured: Mutex::default(),
            clock,
            names: Default::default(),
            seq: AtomicU64::new(fastrand::u64(..)),
            provided: AtomicUsize::new(0),
            ticking: Mutex::default(),
            remembered: Mutex::default(),
            room: Arc::default(),
            late: Late::new(config.late),
            changes: Changes::default(),
            connections: AtomicUsize::new(0),
            timed: AtomicU64::new(0),
            metrics,
            config,
        })
    }

    pub fn config(&self) -> &Config {
        &self.config
    }

    /// A connection that calls or provides. Dropping it takes everything back that it did.
    ///
    /// `peer` must not own the [`HubConnection`], or neither is ever dropped.
    pub fn connect(self: &Arc<Self>, peer: Arc<dyn Peer>) -> HubConnection {
        self.connect_with(peer, self.config.calls)
    }

    /// As [`connect`](Self::connect), with a limit of its own on the calls that it has in flight.
    pub fn connect_with(self: &Arc<Self>, peer: Arc<dyn Peer>, calls: usize) -> HubConnection {
        self.connections.fetch_add(1, Relaxed);
        HubConnection::new(self.clone(), Arc::new(Conn::new(peer, calls, None)))
    }

    /// Finds what is due. To be called every 20 ms or so, by one task.
    pub fn sweep(&self) {
        let now = self.clock.now();
        self.timed.store(0, Relaxed);
        self.late.sweep(now);
        let mut services = std::mem::take(&mut *self.ticking.lock());
        services.retain(|service| {
            let mut state = service.state.lock();
            let (expired, after) = state.expire(now);
            state.ticking = !state.is_idle();
            let (keep, waits) = (state.ticking, state.waits_for_others());
            drop(state);
            for call in expired {
                self.overdue(service, call, now);
            }
            self.after(service, after);
            if waits {
                // Another node may have room by now, or a name stand again: nobody says so.
                self.flush(service);
            }
            if !keep {
                self.forget(service, now, false);
            }
            keep
        });
        self.ticking.lock().append(&mut services);
        self.forget_left(now);
        self.beat(now);
        // Many names are looked at in turns; a call looks itself.
        if self.sweeps.fetch_add(1, Relaxed).is_multiple_of(8) || self.tenured.lock().len() < 64 {
            self.look_after_names();
        }
        self.changes.look(self.cluster.is_leader(), self.cluster.is_isolated(), now);
        if self.ticks.receiver_count() > 0 {
            self.ticks.send_replace(());
        }
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
    /// Of several nodes, one does. For one task, which may take its time; while nobody asks at most one entry per service
    /// is kept.
    pub async fn next_changes(&self) -> Vec<UnpublishedChange> {
        loop {
            let changes = self.take_changes();
            if !changes.is_empty() {
                return changes;
            }
            self.changes.some().await;
        }
    }

    /// Takes back what could not be told. It comes again soon, as it stands then.
    pub fn requeue_changes(&self, changes: impl Iterator<Item = UnpublishedChange>) {
        self.changes.give_back(changes, self.clock.now());
    }

    fn take_changes(&self) -> Vec<UnpublishedChange> {
        self.changes.take(self.cluster.is_leader(), self.clock.now())
    }

    pub fn counts(&self) -> HubCounts {
        let mut counts = HubCounts {
            connections: self.connections.load(Relaxed),
            services: self.provided.load(Relaxed),
            late: self.late.len(),
            ..HubCounts::default()
        };
        for shard in &self.names {
            let shard = shard.lock();
            counts.names += shard.len();
            for service in shard.values() {
                let state = service.state.lock();
                counts.providers += state.here();
                counts.pending += state.in_flight();
                counts.waiting += state.waiting();
            }
        }
        counts
    }

    /// Brings the gauges up to date, for whoever shows them.
    pub fn update_gauges(&self) {
        let HubCounts { services, providers, pending, waiting, .. } = self.counts();
        self.metrics.links.set(self.nodes.links() as i64);
        self.metrics.services.set(services as i64);
        self.metrics.providers.set(providers as i64);
        self.metrics.calls_in_flight.set((pending + waiting) as i64);
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
            in_flight: state.load_anywhere(),
            exclusive: state.is_exclusive(),
            methods: state.methods(),
        })
    }
}
