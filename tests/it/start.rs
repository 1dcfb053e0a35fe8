//! The real app on a free port.

use std::{
    future::Future,
    net::SocketAddr,
    sync::Arc,
    time::{Duration, Instant},
};

use serde_json::value::RawValue;
use tokio::{io::AsyncWriteExt, net::TcpStream};
use tokio_util::sync::CancellationToken;
use weir::{
    app::App,
    bus::Bus,
    channel::Channel,
    config::Config,
    event::{Draft, DraftParts, EventData},
    http::Endpoint,
    metrics::Metrics,
    net::{server::Connections, timer::TimerWheel},
    position::Position,
};

use crate::wire::Client;

/// How long a test waits for what must come.
const PATIENCE: Duration = Duration::from_secs(20);

pub struct Server {
    pub at: SocketAddr,
    endpoint: Arc<Endpoint>,
    pub bus: Arc<Bus>,
    pub metrics: Arc<Metrics>,
    pub wheel: Arc<TimerWheel>,
    pub connections: Connections,
    /// Ends the app as a signal does.
    pub stop: CancellationToken,
    pub running: tokio::task::JoinHandle<anyhow::Result<()>>,
}

impl Server {
    pub async fn start() -> Self {
        Self::with(|_| ()).await
    }

    /// With other settings than the defaults.
    pub async fn with(change: impl FnOnce(&mut Config)) -> Self {
        let mut config = Config::default();
        config.server.listen = vec![SocketAddr::from(([127, 0, 0, 1], 0))];
        change(&mut config);
        let app = App::build(config).await.unwrap();
        let (at, node, stop) = (app.addresses()[0], app.node().clone(), CancellationToken::new());
        let endpoint = app.endpoints().next().unwrap().clone();
        let (wheel, connections) = (node.timers.clone(), app.connections().clone());
        let (bus, metrics) = (node.bus.clone(), node.metrics.clone());
        let running = tokio::spawn(app.run(stop.clone().cancelled_owned()));
        Server { at, endpoint, bus, metrics, wheel, connections, stop, running }
    }

    pub fn endpoint(&self) -> Arc<Endpoint> {
        self.endpoint.clone()
    }

    pub async fn publish(&self, name: &str, data: &str) -> Position {
        self.publish_kind(name, None, data).await
    }

    pub async fn publish_kind(&self, name: &str, kind: Option<&str>, data: &str) -> Position {
        let data = RawValue::from_string(data.to_owned()).unwrap();
        let draft =
            Draft::new(DraftParts { kind, data: EventData::Json(&data), ..DraftParts::default() }, 1 << 20).unwrap();
        self.bus.publish_one("", &channel(name), draft).await.unwrap().position
    }

    pub async fn stream(&self, query: &str) -> Client {
        self.request(&format!("GET /v1/sse?{query} HTTP/1.1\r\nhost: localhost\r\n\r\n")).await
    }

    pub async fn resume(&self, query: &str, id: &str) -> Client {
        self.request(&format!("GET /v1/sse?{query} HTTP/1.1\r\nhost: localhost\r\nlast-event-id: {id}\r\n\r\n")).await
    }

    pub async fn request(&self, bytes: &str) -> Client {
        let mut client = Client::new(TcpStream::connect(self.at).await.unwrap());
        client.socket.write_all(bytes.as_bytes()).await.unwrap();
        client
    }

    pub fn open(&self) -> (usize, i64, i64, usize) {
        let metrics = &self.metrics;
        (
            self.connections.len(),
            (metrics.value("weir_connections{transport=\"sse\"}")
                + metrics.value("weir_connections{transport=\"http\"}")) as i64,
            metrics.value("weir_subscriptions{transport=\"sse\"}") as i64,
            self.bus.topics().readers(),
        )
    }

    pub async fn empty(&self) {
        eventually("all counts are back at zero", || self.open() == (0, 0, 0, 0)).await;
        assert!(self.wheel.is_empty(), "timers are left");
    }
}

pub fn channel(name: &str) -> Channel {
    Channel::parse(name).unwrap()
}

pub async fn eventually(what: &str, condition: impl Fn() -> bool) {
    let start = Instant::now();
    while !condition() {
        assert!(start.elapsed() < PATIENCE, "never: {what}");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

pub async fn soon<T>(what: impl Future<Output = T>) -> T {
    tokio::time::timeout(PATIENCE, what).await.expect("nothing came")
}
