//! The real thing on a free port, and a client that shows every byte.
//!
//! ```ignore
//! let weir = weir().await;
//! let strict = weir().with(|config| config.limits.event = 100).await;
//! weir.post("/v1/events?channel=a", "1").await.expect(201);
//! ```

pub mod client;

use std::{
    future::{Future, IntoFuture},
    net::SocketAddr,
    pin::Pin,
    sync::Arc,
};

use bytes::Bytes;
use tokio_util::sync::{CancellationToken, DropGuard};
use weir::{app::App, config::Config, net::server::Connections, node::Node};

pub use client::{Client, Reply, Request};

/// A weir to be started: change it, then await it.
#[must_use]
pub struct Starter {
    config: Config,
}

/// A running weir. Dropped, it begins to leave; the end of the test's runtime is the end of it.
pub struct Weir {
    pub address: SocketAddr,
    /// All of them: the last is `admin.listen` if there is one.
    pub addresses: Vec<SocketAddr>,
    node: Arc<Node>,
    connections: Connections,
    shutdown: CancellationToken,
    run: tokio::task::JoinHandle<anyhow::Result<()>>,
    _shutdown: DropGuard,
}

/// With the default configuration.
pub fn weir() -> Starter {
    let mut config = Config::default();
    config.server.listen = vec![SocketAddr::from(([127, 0, 0, 1], 0))];
    Starter { config }
}

impl Starter {
    pub fn with(mut self, change: impl FnOnce(&mut Config)) -> Self {
        change(&mut self.config);
        self
    }

    async fn start(self) -> Weir {
        let app = App::build(self.config).await.unwrap();
        let (addresses, node, connections) = (app.addresses(), app.node().clone(), app.connections().clone());
        let shutdown = CancellationToken::new();
        let run = tokio::spawn(app.run(shutdown.clone().cancelled_owned()));
        let _shutdown = shutdown.clone().drop_guard();
        Weir { address: addresses[0], addresses, node, connections, shutdown, run, _shutdown }
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
    /// What the handlers share: for tests that count what is left.
    pub fn node(&self) -> &Node {
        &self.node
    }

    /// For tests that count what is left.
    pub fn connections(&self) -> &Connections {
        &self.connections
    }

    /// Begins to leave, as on SIGTERM.
    pub fn leave(&self) {
        self.shutdown.cancel();
    }

    /// Waits until it has left.
    pub async fn left(self) {
        self.run.await.unwrap().unwrap();
    }

    /// A connection that is kept open between requests.
    pub async fn client(&self) -> Client {
        Client::connect(self.address).await
    }

    /// A request on a connection of its own.
    pub fn request(&self, method: &'static str, path: impl Into<String>) -> Request {
        Request::new(self.address, method, path.into())
    }

    pub async fn get(&self, path: impl Into<String>) -> Reply {
        self.request("GET", path).await
    }

    pub async fn post(&self, path: impl Into<String>, body: impl Into<Bytes>) -> Reply {
        self.request("POST", path).body(body).await
    }

    pub async fn delete(&self, path: impl Into<String>) -> Reply {
        self.request("DELETE", path).await
    }

    /// Publishes one event and answers its position.
    pub async fn publish(&self, channel: &str, data: &str) -> String {
        let placed = self.post(format!("/v1/events?channel={channel}"), data.to_owned()).await.expect(201).json();
        format!("{}-{}", placed["epoch"].as_str().unwrap(), placed["offset"])
    }
}

/// The value of a series of `/metrics`.
pub fn metric(weir: &Weir, series: &str) -> i64 {
    weir.node().metrics.value(series) as i64
}
