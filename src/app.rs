//! [`App`]: builds the parts of a node in one direction, runs them, and shuts them down in one order.

use std::{future::Future, io, net::SocketAddr, sync::Arc, time::Duration};

use anyhow::{Context, anyhow};
use serde_json::value::to_raw_value;
use tokio::{net::TcpListener, task::JoinHandle, time::MissedTickBehavior};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use crate::{
    auth::{AuthProblems, Authenticator},
    backend::{
        self,
        redis::{RedisCluster, client::Topology},
    },
    bus::{self, WallClock},
    channel::Channel,
    cluster::{self, Cluster},
    compat::{self, Adapter},
    config::Config,
    error,
    event::{Draft, DraftParts, EventData},
    http::{Endpoint, ListenerRole},
    metrics::Metrics,
    net::{
        server::HttpConnections,
        timer::{self, Standstill, TimerWheel},
    },
    node::Node,
    presence::Presence,
    rpc::{Hub, RemoteNodes, UnpublishedChange},
    sessions::{ConnectionRegistry, cluster::ClusterConnections},
};

/// Interval of bus maintenance. Each run maintains one of 64 shards, so each shard is maintained every four seconds.
const BUS_SWEEP: Duration = Duration::from_millis(60);
/// Interval at which the deadlines of calls are checked.
const HUB_SWEEP: Duration = Duration::from_millis(20);

/// Timeout for announcing that the members of this node have left.
const LEAVE_TIMEOUT: Duration = Duration::from_secs(2);

/// Delay before a change of the services is published again; doubled up to [`MAX_RETRY`].
const MIN_RETRY: Duration = Duration::from_millis(100);
const MAX_RETRY: Duration = Duration::from_secs(2);

/// Interval at which the readiness is measured.
const READINESS: Duration = Duration::from_secs(1);

/// A node that is bound to its addresses, and not yet serving.
pub struct App {
    /// The bus as it is logged, without the password.
    bus: String,
    listeners: Vec<(TcpListener, Arc<Endpoint>)>,
    node: Arc<Node>,
    connections: HttpConnections,
    remote_nodes: Arc<RemoteNodes>,
}

/// Tasks that are aborted on drop.
struct Tasks(Vec<JoinHandle<()>>);

impl App {
    /// Builds the parts and binds the addresses of `config`. Requires a tokio runtime.
    pub async fn build(config: Config) -> anyhow::Result<Self> {
        let metrics = Arc::new(Metrics::new());
        let redis = backend::connect(&config, metrics.clone())?;
        // The URL is formatted without the password.
        let bus_name = redis.as_ref().map_or_else(|| "memory".to_owned(), |topology| topology.url.to_string());
        let auth = Authenticator::new(&config.auth).map_err(|problems| anyhow!("{}", describe(&problems)))?;
        let node = node(config, auth, redis.as_ref(), metrics);
        let remote_nodes = Arc::new(RemoteNodes::new(&node.hub));
        let config = node.config.clone();
        let connections = HttpConnections::new(config.limits.clone(), node.timers.clone(), node.metrics.clone());
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

    /// The bound addresses: `server.listen`, `admin.listen`, then those of adapters.
    pub fn addresses(&self) -> Vec<SocketAddr> {
        // A listener that is bound has an address.
        self.listeners.iter().filter_map(|(listener, _)| listener.local_addr().ok()).collect()
    }

    /// The HTTP side of each of [`addresses`](Self::addresses).
    pub fn endpoints(&self) -> impl Iterator<Item = &Arc<Endpoint>> {
        self.listeners.iter().map(|(_, endpoint)| endpoint)
    }

    /// The purpose of each of [`addresses`](Self::addresses), for the log.
    pub fn purposes(&self) -> impl Iterator<Item = &'static str> {
        self.listeners.iter().map(|(_, endpoint)| endpoint.purpose())
    }

    /// `memory`, or the URL of Redis without the password.
    pub fn bus(&self) -> &str {
        &self.bus
    }

    /// The id of this run of the node, as in lists of connections.
    pub fn node_name(&self) -> String {
        self.node.cluster_connections.local().node()
    }

    /// The parts that handlers share, for tests.
    pub fn node(&self) -> &Arc<Node> {
        &self.node
    }

    /// Open connections, for tests.
    pub fn connections(&self) -> &HttpConnections {
        &self.connections
    }

    /// Serves until `shutdown` resolves, then shuts down: readiness is withdrawn, accepting stops, polls are answered,
    /// streams and sockets are closed over `drain.window`, and what is still open after `drain.grace` is aborted.
    pub async fn run(self, shutdown: impl Future<Output = ()>) -> anyhow::Result<()> {
        let App { listeners, node, connections, remote_nodes, .. } = self;
        let drain = node.config.drain.clone();
        let _key_sets = node.auth.start();
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
            every(READINESS, {
                let node = node.clone();
                move || {
                    let ready = !node.draining.is_cancelled() && node.bus.ready().is_ok();
                    node.metrics.ready.set(ready.into());
                    node.sessions.close_expired(node.bus.now());
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
        let completed = async {
            connections.closed().await;
            node.background.close();
            node.background.wait().await;
        };
        if timer::timeout(drain.grace, completed).await.is_err() {
            tracing::warn!(open = connections.len(), "connections are aborted after drain.grace");
        }
        drop(present);
        if tokio::time::timeout(LEAVE_TIMEOUT, node.presence.close()).await.is_err() {
            tracing::warn!("the bus is unavailable: members of this node are not announced as gone");
        }
        // Leases are released at once; otherwise other nodes would wait until they expire.
        node.cluster.leave().await;
        Ok(())
    }
}

/// The parts that handlers share, in memory and without credentials, for tests. Requires a tokio runtime.
#[cfg(test)]
pub(crate) fn open_node(config: Config) -> Arc<Node> {
    let auth = Authenticator::new(&config.auth).unwrap();
    node(config, auth, None, Arc::new(Metrics::new()))
}

/// The parts that handlers share. Requires a tokio runtime.
fn node(config: Config, auth: Authenticator, redis: Option<&Arc<Topology>>, metrics: Arc<Metrics>) -> Arc<Node> {
    let bus = Arc::new(backend::bus_on(redis, &config, bus::Config::new(&config), WallClock::System));
    let cluster: Arc<dyn Cluster> = match redis {
        Some(topology) => RedisCluster::start(topology.clone(), &config.bus.redis.prefix),
        None => cluster::single::single_node(),
    };
    let timers = TimerWheel::start();
    let config = Arc::new(config);
    let presence = Presence::new(config.clone(), bus.clone(), cluster.clone(), metrics.clone());
    let sessions = ConnectionRegistry::new(timers.clone());
    let cluster_connections = ClusterConnections::new(sessions.clone(), cluster.clone());
    let hub = Hub::new(config.clone(), cluster::MonotonicClock::real(), cluster.clone(), metrics.clone());
    Arc::new(Node {
        auth,
        bus,
        hub,
        presence,
        sessions,
        cluster_connections,
        cluster,
        timers,
        metrics,
        config,
        draining: CancellationToken::new(),
        background: TaskTracker::new(),
    })
}

/// Publishes the changes of services to the channel `$services`. A change that the bus rejects is retried.
async fn announce_services(node: Arc<Node>) {
    let Ok(channel) = Channel::parse("$services") else { return };
    let mut pause = MIN_RETRY;
    loop {
        match publish_changes(&node, &channel, node.hub.next_changes().await).await {
            Ok(()) => pause = MIN_RETRY,
            Err(error) => {
                tracing::debug!(%error, "could not announce all changes of services yet");
                tokio::time::sleep(pause).await;
                pause = (pause * 2).min(MAX_RETRY);
            }
        }
    }
}

/// Publishes changes in their order. At an error the rest is dropped, which queues it again.
async fn publish_changes(node: &Node, channel: &Channel, changes: Vec<UnpublishedChange>) -> error::Result<()> {
    for pending in changes {
        let change = pending.change();
        let draft = to_raw_value(change).map_err(|error| error.to_string()).and_then(|data| {
            let parts =
                DraftParts { kind: Some(change.kind.as_str()), data: EventData::Json(&data), ..DraftParts::default() };
            Draft::new(parts, node.config.limits.event).map_err(|error| error.to_string())
        });
        match draft {
            Ok(draft) => drop(node.bus.publish_one("", channel, draft).await?),
            Err(error) => {
                tracing::warn!(service = change.service, %error, "cannot announce a change of its providers");
            }
        }
        pending.published();
    }
    Ok(())
}

/// The problems of credentials and roles in a configuration, as pairs of key and reason.
pub fn check_auth(config: &Config) -> Vec<(String, String)> {
    Authenticator::new(&config.auth).err().unwrap_or_default()
}

fn describe(problems: &AuthProblems) -> String {
    let lines: Vec<_> = problems.iter().map(|(key, reason)| format!("{key}: {reason}")).collect();
    lines.join("\n")
}

fn every(period: Duration, mut work: impl FnMut() + Send + 'static) -> JoinHandle<()> {
    tokio::spawn(async move {
        let mut ticks = tokio::time::interval(period);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        // The replies that sockets hold are read before calls are found overdue.
        let mut standstill = Standstill::new(period);
        loop {
            ticks.tick().await;
            let _ = standstill.resume().await;
            work();
        }
    })
}

impl Drop for Tasks {
    fn drop(&mut self) {
        self.0.iter().for_each(JoinHandle::abort);
    }
}
