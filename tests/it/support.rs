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
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;
use weir::{
    backend::memory::Memory,
    bus::{Bus, Clock, Topics},
    config::Config,
    http::{Door, Doors, Gateway, connection::Connections},
    metrics::Metrics,
    transport::{sse::Sse, wheel::Wheel},
};

pub use client::{Client, Reply, Request};

/// A weir to be started: change it, then await it.
#[must_use]
pub struct Starter {
    config: Config,
}

/// A running weir. Dropped, it is gone.
pub struct Weir {
    pub address: SocketAddr,
    gateway: Arc<Gateway>,
    stop: CancellationToken,
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
        let listener = TcpListener::bind(self.config.server.listen[0]).await.unwrap();
        let address = listener.local_addr().unwrap();
        let topics = Arc::new(Topics::new(bus_config(), Clock::default()));
        let bus = Arc::new(Bus::new(Arc::new(Memory::new(topics.clone())), topics));
        let wheel = Wheel::start();
        let metrics = Arc::new(Metrics::new());
        let config = Arc::new(self.config);
        let gateway = Arc::new(Gateway {
            sse: Arc::new(Sse::new(bus.clone(), wheel.clone(), metrics.clone(), Default::default())),
            hub: weir::rpc::Hub::new(Default::default(), weir::rpc::Clock::real()),
            bus,
            config,
            metrics: metrics.clone(),
            draining: CancellationToken::new(),
        });
        let door = Arc::new(Door::new(gateway.clone(), address.ip().is_loopback(), Doors::One));
        let connections = Connections::new(Default::default(), wheel, metrics);
        let stop = CancellationToken::new();
        let stopped = stop.clone();
        tokio::spawn(async move { connections.accept(listener, door, stopped).await });
        Weir { address, gateway, stop }
    }
}

impl IntoFuture for Starter {
    type Output = Weir;
    type IntoFuture = Pin<Box<dyn Future<Output = Weir> + Send>>;

    fn into_future(self) -> Self::IntoFuture {
        Box::pin(self.start())
    }
}

impl Drop for Weir {
    fn drop(&mut self) {
        self.stop.cancel();
    }
}

impl Weir {
    /// What the handlers share: for tests that count what is left.
    pub fn gateway(&self) -> &Gateway {
        &self.gateway
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

fn bus_config() -> weir::bus::Config {
    weir::bus::Config {
        rules: vec![],
        keep: weir::bus::Keep { count: 10_000, age: std::time::Duration::from_secs(3600), bytes: 16 << 20 },
        budget: 256 << 20,
        keys: weir::bus::KeyLimits { window: std::time::Duration::from_secs(300), count: 10_000 },
        consumer_idle: std::time::Duration::from_secs(3600),
        max_consumers: 1000,
    }
}
