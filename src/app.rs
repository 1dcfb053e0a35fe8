//! [`App`]: what one weir is made of, built in one direction and ended in one order.

use std::{future::Future, io, iter, net::SocketAddr, sync::Arc, time::Duration};

use anyhow::{Context, anyhow};
use serde_json::value::to_raw_value;
use tokio::{net::TcpListener, task::JoinHandle, time::MissedTickBehavior};
use tokio_util::sync::CancellationToken;

use crate::{
    backend::{
        memory::Memory,
        redis::{
            self, Redis, RedisCluster, RedisSettings,
            client::{RedisUrl, Topology},
        },
    },
    bus::{self, Bus, Log, Topics, WallClock},
    channel::Channel,
    cluster::{self, Cluster},
    compat::{self, Adapter},
    config::{self, Config},
    event::{Draft, DraftParts, EventData},
    http::{Endpoint, ListenerRole},
    metrics::Metrics,
    net::{
        server::{self, Connections},
        timer::TimerWheel,
    },
    node::Node,
    pattern::Pattern,
    presence::{self, Presence},
    rpc::{self, Hub, RemoteNodes},
    sessions::{ConnectionRegistry, cluster::ClusterConnections},
};

/// Every shard of the bus is looked after once in 64 of these: within four seconds.
const BUS_SWEEP: Duration = Duration::from_millis(60);
/// How exactly deadlines of calls are kept.
const HUB_SWEEP: Duration = Duration::from_millis(20);

/// How long the bus may take to hear who leaves with this node.
const FAREWELL: Duration = Duration::from_secs(2);
/// How long the start waits for Redis.
const REDIS_CONNECT: Duration = Duration::from_secs(3);

/// Between two tries to tell what has changed among the services; it doubles up to...
const TELL_AGAIN: Duration = Duration::from_millis(100);
/// ...this.
const TELL_SELDOM: Duration = Duration::from_secs(2);

/// A sample of a histogram waits for so long at most.
const METRICS_UPKEEP: Duration = Duration::from_secs(1);

/// One weir: bound, not yet serving.
pub struct App {
    /// As a log may show it.
    bus: String,
    listeners: Vec<(TcpListener, Arc<Endpoint>)>,
    node: Arc<Node>,
    connections: Connections,
    remote_nodes: Arc<RemoteNodes>,
}

/// Tasks that end with the value.
struct Tasks(Vec<JoinHandle<()>>);

impl App {
    /// Binds the addresses of `config` and wires the parts. Needs a tokio runtime.
    pub async fn build(config: Config) -> anyhow::Result<Self> {
        let metrics = Arc::new(Metrics::new());
        let redis = redis(&config, metrics.clone()).await?;
        let bus_name = match &redis {
            None => "memory".to_owned(),
            // Shown without its password.
            Some(deployment) => deployment.url.to_string(),
        };
        let node = node(config, redis.as_ref(), metrics);
        let remote_nodes = Arc::new(RemoteNodes::new(&node.hub));
        let config = node.config.clone();
        let connections = Connections::new(connection_limits(&config), node.timers.clone(), node.metrics.clone());
        let mut adapters = compat::build(&node)?;
        let of_adapters: Vec<_> = adapters.iter_mut().flat_map(|adapter| adapter.listeners.drain(..)).collect();
        let adapters: Arc<[Adapter]> = adapters.into();
        let separate = config.admin.listen.is_some();
        let main = || if separate { ListenerRole::Clients } else { ListenerRole::All };
        let main = config.server.listen.iter().map(|address| (*address, main()));
        let admin = config.admin.listen.map(|address| (address, ListenerRole::Admin));
        let of_adapters = of_adapters.into_iter().map(|listener| (listener.address, ListenerRole::Adapter(listener)));
        let mut listeners = Vec::new();
        for (address, role) in main.chain(admin).chain(of_adapters) {
            let listener = TcpListener::bind(address).await.map_err(|error| {
                let remedy = match (error.kind(), &role) {
                    (io::ErrorKind::AddrInUse, ListenerRole::Adapter(listener)) => listener.if_in_use,
                    (io::ErrorKind::AddrInUse, _) => ": is weir already running? --listen sets another address",
                    (io::ErrorKind::PermissionDenied, _) => ": ports below 1024 require root or CAP_NET_BIND_SERVICE",
                    _ => "",
                };
                anyhow!("cannot listen on {address}: {error}{remedy}")
            })?;
            let endpoint = Endpoint::new(node.clone(), adapters.clone(), address.ip().is_loopback(), role);
            listeners.push((listener, Arc::new(endpoint)));
        }
        Ok(App { bus: bus_name, listeners, node, connections, remote_nodes })
    }

    /// Where weir listens, in the order of the configuration: `server.listen`, `admin.listen`, then those of adapters.
    pub fn addresses(&self) -> Vec<SocketAddr> {
        // A listener that is bound has an address.
        self.listeners.iter().filter_map(|(listener, _)| listener.local_addr().ok()).collect()
    }

    /// The HTTP side of each of [`addresses`](Self::addresses).
    pub fn endpoints(&self) -> impl Iterator<Item = &Arc<Endpoint>> {
        self.listeners.iter().map(|(_, endpoint)| endpoint)
    }

    /// What each of [`addresses`](Self::addresses) is for.
    pub fn purposes(&self) -> impl Iterator<Item = &'static str> {
        self.listeners.iter().map(|(_, endpoint)| endpoint.purpose())
    }

    /// `memory`, or where Redis is, without the password.
    pub fn bus(&self) -> &str {
        &self.bus
    }

    /// What this run of the node is called among others, as in lists of connections.
    pub fn node_name(&self) -> String {
        self.node.cluster_connections.local().node()
    }

    /// What handlers share: for tests that count what is left.
    pub fn node(&self) -> &Arc<Node> {
        &self.node
    }

    /// Open connections: for tests that count what is left.
    pub fn connections(&self) -> &Connections {
        &self.connections
    }

    /// Serves until `shutdown`, then leaves: not ready → nothing accepted → polls answer empty → streams and sockets
    /// end, spread over `drain.window` → calls finish, or are cut off after `drain.grace`.
    pub async fn run(self, shutdown: impl Future<Output = ()>) -> anyhow::Result<()> {
        let App { listeners, node, connections, remote_nodes, .. } = self;
        let drain = node.config.drain.clone();
        let stop = CancellationToken::new();
        let _tasks = Tasks(vec![
            tokio::spawn(node.cluster_connections.clone().run()),
            every(BUS_SWEEP, {
                let bus = node.bus.clone();
                move || bus.sweep()
            }),
            every(HUB_SWEEP, {
                let (hub, remote_nodes) = (node.hub.clone(), remote_nodes.clone());
                move || {
                    hub.sweep();
                    remote_nodes.send_heartbeats();
                }
            }),
            every(METRICS_UPKEEP, {
                let node = node.clone();
                move || {
                    let welcome = !node.draining.is_cancelled() && node.bus.ready().is_ok();
                    node.metrics.ready.set(welcome.into());
                    node.metrics.upkeep();
                }
            }),
            tokio::spawn(async move { remote_nodes.run().await }),
            tokio::spawn(announce_services(node.clone())),
        ]);
        let accepting: Vec<_> = listeners
            .into_iter()
            .map(|(listener, endpoint)| {
                let (connections, stop) = (connections.clone(), stop.clone());
                tokio::spawn(async move { connections.accept(listener, endpoint, stop).await })
            })
            .collect();
        let present = Tasks(vec![tokio::spawn(node.presence.clone().run())]);
        shutdown.await;

        node.metrics.ready.set(0);
        node.draining.cancel();
        stop.cancel();
        for task in accepting {
            task.await.context("an accept loop has failed")?;
        }
        node.timers.drain(drain.window);
        if tokio::time::timeout(drain.grace, connections.closed()).await.is_err() {
            tracing::warn!(open = connections.len(), "cut off what did not end within drain.grace");
        }
        drop(present);
        if tokio::time::timeout(FAREWELL, node.presence.close()).await.is_err() {
            tracing::warn!("the bus is away: who was here is not announced as gone");
        }
        // Names are free for other nodes, which need not wait until this one is missed.
        node.cluster.leave().await;
        Ok(())
    }
}

/// The bus of a configuration, without the node that serves it: as `topics` keep it, by the time of `clock`. Needs a tokio
/// runtime.
pub async fn bus(config: &Config, topics: bus::Config, clock: WallClock, metrics: Arc<Metrics>) -> anyhow::Result<Bus> {
    Ok(over(redis(config, metrics).await?.as_ref(), config, topics, clock))
}

/// The parts that handlers share. Needs a tokio runtime.
pub(crate) fn node(config: Config, redis: Option<&Arc<Topology>>, metrics: Arc<Metrics>) -> Arc<Node> {
    let bus = Arc::new(over(redis, &config, bus_config(&config), WallClock::System));
    let cluster: Arc<dyn Cluster> = match redis {
        Some(deployment) => RedisCluster::start(deployment.clone(), &config.bus.redis.prefix),
        None => cluster::single::single_node(),
    };
    let timers = TimerWheel::start();
    let presence = presence::Config { leases: config.limits.presences, event: config.limits.event };
    let presence = Presence::new(presence, bus.clone(), cluster.clone(), metrics.clone());
    let sessions = ConnectionRegistry::new(timers.clone());
    let cluster_connections = ClusterConnections::new(sessions.clone(), cluster.clone());
    let hub = Hub::new(hub_config(&config), cluster::MonotonicClock::real(), cluster.clone(), metrics.clone());
    Arc::new(Node {
        bus,
        hub,
        presence,
        sessions,
        cluster_connections,
        cluster,
        timers,
        metrics,
        config: Arc::new(config),
        draining: CancellationToken::new(),
    })
}

fn over(redis: Option<&Arc<Topology>>, config: &Config, topics: bus::Config, clock: WallClock) -> Bus {
    let topics = Arc::new(Topics::new(topics, clock));
    let log: Arc<dyn Log> = match redis {
        None => Arc::new(Memory::new(topics.clone())),
        Some(deployment) => {
            let ack = match config.bus.redis.ack {
                config::Ack::Stored => redis::Ack::Stored,
                config::Ack::Replicated => redis::Ack::Replicated,
            };
            let settings = RedisSettings { prefix: config.bus.redis.prefix.clone(), ack };
            Arc::new(Redis::start(deployment.clone(), topics.clone(), settings))
        }
    };
    Bus::new(log, topics)
}

/// What is wrong with settings that only the part they are for can read: the key to blame, and why.
pub fn check(config: &Config) -> Result<(), (&'static str, String)> {
    match config.bus.backend {
        config::Backend::Memory => Ok(()),
        config::Backend::Redis => redis_url(config).map(drop),
    }
}

fn redis_url(config: &Config) -> Result<RedisUrl, (&'static str, String)> {
    RedisUrl::parse(config.bus.redis.url.reveal()).map_err(|error| ("bus.redis.url", error))
}

/// Connects to Redis, if it is used. What will not be different the next time is said now; a Redis that is away may come.
async fn redis(config: &Config, metrics: Arc<Metrics>) -> anyhow::Result<Option<Arc<Topology>>> {
    if config.bus.backend == config::Backend::Memory {
        return Ok(None);
    }
    let url = redis_url(config).map_err(|(key, error)| anyhow!("{key}: {error}"))?;
    let tls = url.tls;
    let deployment = Topology::start(url, metrics);
    if let Err(reason) = deployment.ready(REDIS_CONNECT).await {
        // A Redis that speaks no TLS says so with silence.
        let hint =
            tls.then_some("rediss:// needs a port where Redis speaks TLS; weir doctor --redis sees whether it does");
        tracing::warn!(%reason, hint, "Redis cannot be reached yet");
    }
    Ok(Some(deployment))
}

/// Publishes what changes among the services to the channel `$services`. What the bus does not take now comes again.
async fn announce_services(node: Arc<Node>) {
    let Ok(channel) = Channel::parse("$services") else { return };
    let mut pause = TELL_AGAIN;
    loop {
        let mut changes = node.hub.next_changes().await.into_iter();
        while let Some(telling) = changes.next() {
            let change = &telling.change;
            let draft = to_raw_value(change).map_err(|error| error.to_string()).and_then(|data| {
                let parts = DraftParts {
                    kind: Some(change.kind.as_str()),
                    data: EventData::Json(&data),
                    ..DraftParts::default()
                };
                Draft::new(parts, node.config.limits.event).map_err(|error| error.to_string())
            });
            let draft = match draft {
                Ok(draft) => draft,
                Err(error) => {
                    tracing::warn!(service = change.service, %error, "cannot announce a change of its providers");
                    continue;
                }
            };
            if let Err(error) = node.bus.publish_one("", &channel, draft).await {
                tracing::debug!(service = change.service, %error, "could not announce a change of its providers yet");
                node.hub.requeue_changes(iter::once(telling).chain(changes));
                tokio::time::sleep(pause).await;
                pause = (pause * 2).min(TELL_SELDOM);
                break;
            }
            pause = TELL_AGAIN;
        }
    }
}

fn every(period: Duration, mut work: impl FnMut() + Send + 'static) -> JoinHandle<()> {
    tokio::spawn(async move {
        let mut ticks = tokio::time::interval(period);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            ticks.tick().await;
            work();
        }
    })
}

impl Drop for Tasks {
    fn drop(&mut self) {
        self.0.iter().for_each(JoinHandle::abort);
    }
}

// === what each part takes of the settings ===

fn keep(keep: &config::Keep) -> bus::Retention {
    bus::Retention { count: keep.count, age: keep.age, bytes: keep.bytes }
}

/// What the bus takes of the settings.
pub fn bus_config(config: &Config) -> bus::Config {
    let rule = |rule: &config::ChannelRule| bus::RetentionRule {
        pattern: Pattern::new(&rule.pattern),
        retention: keep(&rule.keep),
    };
    let of_adapters: Vec<_> = config.compat.enabled().flat_map(|adapter| adapter.channels()).collect();
    bus::Config {
        rules: of_adapters.iter().chain(&config.channels).map(rule).collect(),
        retention: keep(&config::Keep::default()),
        budget: config.bus.memory.budget,
        keys: bus::KeyLimits { window: config.bus.idempotency_window, count: config.limits.keys },
        consumer_idle: config.consumers.idle,
        max_consumers: config.limits.consumers,
        max_cursors: config.limits.consumer_channels,
    }
}

fn hub_config(config: &Config) -> rpc::Config {
    rpc::Config {
        timeout: config.rpc.timeout,
        max_timeout: config.rpc.max_timeout,
        wait_for_provider: config.rpc.wait_for_provider,
        late_window: config.rpc.late_window,
        late: config.limits.late,
        calls: config.limits.calls,
        waiting: config.limits.waiting,
        waiting_bytes: config.limits.waiting_bytes,
        services: config.limits.services,
        provides: config.limits.provides,
    }
}

fn connection_limits(config: &Config) -> server::Limits {
    server::Limits {
        connections: config.limits.connections,
        header_timeout: config.limits.header_time,
        idle_timeout: config.limits.idle,
        stall_timeout: config.limits.stalled,
        header_bytes: config.limits.header,
        h2_streams: u32::try_from(config.limits.h2_streams).unwrap_or(u32::MAX),
    }
}
