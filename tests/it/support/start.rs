//! The starter: the real application in this process, on a free port.

use std::{
    future::{Future, IntoFuture},
    net::SocketAddr,
    pin::Pin,
    sync::Arc,
};

use bytes::Bytes;
use tokio_util::sync::{CancellationToken, DropGuard};
use weir::{
    app::App,
    bus::Bus,
    compat::default_config,
    config::{Backend, Config},
    http::Endpoint,
    net::{server::HttpConnections, timer::TimerWheel},
    node::Node,
    position::Position,
};

use super::{
    Client, EventStream, Request, Response, Socket,
    event::{channel, draft},
    eventually, in_time,
};

/// Starts an instance when awaited.
#[must_use]
pub struct Starter {
    config: Config,
}

/// A running instance. It begins to shut down when dropped and ends with the runtime of the test.
pub struct Weir {
    pub address: SocketAddr,
    /// Of all listeners; that of `admin.listen` comes last.
    pub addresses: Vec<SocketAddr>,
    node: Arc<Node>,
    endpoint: Arc<Endpoint>,
    connections: HttpConnections,
    shutdown: CancellationToken,
    run: tokio::task::JoinHandle<anyhow::Result<()>>,
    _shutdown: DropGuard,
}

/// An instance with the default configuration.
pub fn weir() -> Starter {
    let mut config = default_config();
    config.server.listen = vec![SocketAddr::from(([127, 0, 0, 1], 0))];
    Starter { config }
}

/// An instance on Redis.
pub fn weir_on(redis: &str) -> Starter {
    weir().with(|config| {
        config.bus.backend = Backend::Redis;
        config.bus.redis.url = redis.into();
    })
}

impl Starter {
    pub fn with(mut self, change: impl FnOnce(&mut Config)) -> Self {
        change(&mut self.config);
        self
    }

    async fn start(self) -> Weir {
        let app = App::build(self.config).await.unwrap();
        let (addresses, node, connections) = (app.addresses(), app.node().clone(), app.connections().clone());
        let endpoint = app.endpoints().next().unwrap().clone();
        let shutdown = CancellationToken::new();
        let run = tokio::spawn(app.run(shutdown.clone().cancelled_owned()));
        let _shutdown = shutdown.clone().drop_guard();
        Weir { address: addresses[0], addresses, node, endpoint, connections, shutdown, run, _shutdown }
    }
}

impl IntoFuture for Starter {
    type Output = Weir;
    type IntoFuture = Pin<Box<dyn Future<Output = Weir> + Send>>;

    fn into_future(self) -> Self::IntoFuture {
        Box::pin(self.start())
    }
}

impl Weir {
    /// The state that handlers share.
    pub fn node(&self) -> &Arc<Node> {
        &self.node
    }

    /// The first listener's service.
    pub fn endpoint(&self) -> &Arc<Endpoint> {
        &self.endpoint
    }

    pub fn bus(&self) -> &Arc<Bus> {
        &self.node.bus
    }

    pub fn connections(&self) -> &HttpConnections {
        &self.connections
    }

    pub fn timers(&self) -> &Arc<TimerWheel> {
        &self.node.timers
    }

    /// The value of a series of `/metrics`.
    pub fn metric(&self, series: &str) -> i64 {
        self.node.metrics.value(series) as i64
    }

    /// Begins to shut down, as on SIGTERM.
    pub fn shut_down(&self) {
        self.shutdown.cancel();
    }

    pub fn has_stopped(&self) -> bool {
        self.run.is_finished()
    }

    /// Waits until it has shut down.
    pub async fn stopped(self) {
        in_time(self.run).await.unwrap().unwrap();
    }

    /// Counts of connections, connections of HTTP and SSE, subscriptions of SSE, and readers.
    pub fn open_counts(&self) -> (usize, i64, i64, usize) {
        (
            self.connections.len(),
            self.metric("weir_connections{transport=\"sse\"}") + self.metric("weir_connections{transport=\"http\"}"),
            self.metric("weir_subscriptions{transport=\"sse\"}"),
            self.bus().topics().readers(),
        )
    }

    /// Waits until every connection, subscription, call and timer is gone.
    pub async fn idle(&self) {
        eventually("all counts are back at zero", async || {
            let counts = self.node.hub.counts();
            self.connections.is_empty()
                && ["http", "sse", "ws", "poll", "socketio"].iter().all(|transport| {
                    self.metric(&format!("weir_connections{{transport=\"{transport}\"}}")) == 0
                        && self.metric(&format!("weir_subscriptions{{transport=\"{transport}\"}}")) == 0
                })
                && self.bus().topics().readers() == 0
                && (counts.connections, counts.providers, counts.pending, counts.waiting, counts.late)
                    == (0, 0, 0, 0, 0)
        })
        .await;
        eventually("no timer is left", async || self.timers().is_empty()).await;
    }

    /// An HTTP connection that is kept open between requests.
    pub async fn client(&self) -> Client {
        Client::connect(self.address).await
    }

    /// An HTTP connection to which `bytes` are written as they are.
    pub async fn write(&self, bytes: impl AsRef<[u8]>) -> Client {
        let mut client = self.client().await;
        client.write(bytes).await;
        client
    }

    /// A request on a connection of its own.
    pub fn request(&self, method: &'static str, path: impl Into<String>) -> Request {
        Request::new(self.address, method, path.into())
    }

    pub async fn get(&self, path: impl Into<String>) -> Response {
        self.request("GET", path).await
    }

    pub async fn post(&self, path: impl Into<String>, body: impl Into<Bytes>) -> Response {
        self.request("POST", path).body(body).await
    }

    pub async fn delete(&self, path: impl Into<String>) -> Response {
        self.request("DELETE", path).await
    }

    /// Publishes one event over HTTP and returns its position.
    pub async fn publish(&self, channel: &str, data: &str) -> String {
        let placed = self.post(format!("/v1/events?channel={channel}"), data.to_owned()).await.expect(201).json();
        format!("{}-{}", placed["epoch"].as_str().unwrap(), placed["offset"])
    }

    /// Publishes one event without a connection, so that no count changes.
    pub async fn append(&self, name: &str, data: &str) -> Position {
        self.append_typed(name, None, data).await
    }

    pub async fn append_typed(&self, name: &str, kind: Option<&str>, data: &str) -> Position {
        self.bus().publish_one("", &channel(name), draft(kind, data, None)).await.unwrap().position
    }

    /// A stream of server-sent events.
    pub async fn sse(&self, query: &str) -> EventStream {
        EventStream::open(self.address, query).await
    }

    /// As [`sse`](Self::sse), resumed after an id.
    pub async fn sse_after(&self, query: &str, id: &str) -> EventStream {
        EventStream::resume(self.address, query, id).await
    }

    /// A WebSocket at `/v1/ws`.
    pub async fn socket(&self) -> Socket {
        Socket::open(self.address).await
    }
}
