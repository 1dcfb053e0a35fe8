//! The backends of the bus, and the choice of one by the configuration.

pub mod memory;
pub mod redis;

use std::{sync::Arc, time::Duration};

use anyhow::anyhow;

use self::redis::{
    Redis, RedisSettings,
    client::{RedisUrl, Topology},
};
use crate::{
    bus::{self, Bus, Topics, WallClock},
    config::{Backend, Config},
    metrics::Metrics,
};

/// After this time without a connection to Redis, the log says why.
const REDIS_CONNECT: Duration = Duration::from_secs(3);

/// Begins to connect to Redis, if it is the backend, and does not wait for it: clients of a node that starts get their
/// answers as those of any other node do. An unavailable Redis is no error, because it may become available.
pub(crate) fn connect(config: &Config, metrics: Arc<Metrics>) -> anyhow::Result<Option<Arc<Topology>>> {
    if config.bus.backend == Backend::Memory {
        return Ok(None);
    }
    let url = redis_url(config).map_err(|(key, error)| anyhow!("{key}: {error}"))?;
    let tls = url.tls;
    let topology = Topology::start(url, metrics);
    let connecting = topology.clone();
    tokio::spawn(async move {
        if let Err(reason) = connecting.ready(REDIS_CONNECT).await {
            // A port without TLS does not answer a TLS handshake, so the reason is a timeout.
            let hint = tls.then_some("rediss:// requires a port with TLS; weir doctor --redis checks it");
            tracing::warn!(%reason, hint, "Redis cannot be reached yet");
        }
    });
    Ok(Some(topology))
}

/// The bus on Redis, or in memory without it. Requires a tokio runtime.
pub(crate) fn bus_on(redis: Option<&Arc<Topology>>, config: &Config, limits: bus::Config, clock: WallClock) -> Bus {
    let Some(topology) = redis else { return memory::bus(limits, clock) };
    let topics = Arc::new(Topics::new(limits, clock));
    let settings = RedisSettings { prefix: config.bus.redis.prefix.clone(), ack: config.bus.redis.ack };
    Bus::new(Arc::new(Redis::start(topology.clone(), topics.clone(), settings)), topics)
}

/// A bus without a node.
pub(crate) async fn open_bus(
    config: &Config,
    limits: bus::Config,
    clock: WallClock,
    metrics: Arc<Metrics>,
) -> anyhow::Result<Bus> {
    let redis = connect(config, metrics)?;
    if let Some(topology) = &redis {
        // The first operation reports the reason.
        let _ = topology.ready(REDIS_CONNECT).await;
    }
    Ok(bus_on(redis.as_ref(), config, limits, clock))
}

/// Validates the settings that only the backend can parse. The error is a key and the reason.
pub fn check(config: &Config) -> Result<(), (&'static str, String)> {
    match config.bus.backend {
        Backend::Memory => Ok(()),
        Backend::Redis => redis_url(config).map(drop),
    }
}

fn redis_url(config: &Config) -> Result<RedisUrl, (&'static str, String)> {
    RedisUrl::parse(config.bus.redis.url.reveal()).map_err(|error| ("bus.redis.url", error))
}
