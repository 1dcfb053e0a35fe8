//! [`ImportTarget`]: the bus that an import writes to.

use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use crate::{
    backend,
    bus::{self, Bus, Retention, WallClock},
    config::{Backend, Config},
    error::{Code, Error},
    metrics::Metrics,
    terminal::Failure,
};

/// Larger than any channel: retention applies after the import.
const EVERYTHING: Retention =
    Retention { count: 1 << 40, age: Duration::from_secs(200 * 365 * 24 * 60 * 60), bytes: 1 << 46 };

pub(super) struct ImportTarget {
    /// The bus as nodes use it.
    pub(super) bus: Arc<Bus>,
    /// The same, with the time of `clock` and without retention.
    pub(super) past: Bus,
    clock: Arc<AtomicU64>,
    /// The largest event, in bytes.
    pub(super) event_limit: usize,
}

impl ImportTarget {
    pub(super) async fn open(mut config: Config) -> Result<Self, Failure> {
        if config.bus.backend == Backend::Memory {
            let reason = "bus.backend is memory, which is lost when this process exits: use the settings of the nodes, with \
                          bus.backend = \"redis\" and bus.redis.url";
            return Err(Failure::Usage(reason.into()));
        }
        if !config.compat.enable.contains(&"ganomede") {
            // Its channel of index definitions then has the retention that the adapter needs.
            config.compat.enable.push("ganomede");
        }
        let unavailable = |error: anyhow::Error| Failure::Unavailable(format!("{error:#}"));
        let metrics = Arc::new(Metrics::new());
        let topics = bus::Config::new(&config);
        let clock = Arc::new(AtomicU64::new(0));
        let mut past = topics.clone();
        past.rules.clear();
        past.retention = EVERYTHING;
        let past = backend::open_bus(&config, past, WallClock::Manual(clock.clone()), metrics.clone())
            .await
            .map_err(unavailable)?;
        let bus = Arc::new(backend::open_bus(&config, topics, WallClock::System, metrics).await.map_err(unavailable)?);
        Ok(ImportTarget { bus, past, clock, event_limit: config.limits.event })
    }

    /// Sets the clock of `past`, Unix milliseconds.
    pub(super) fn set_time(&self, ms: u64) {
        self.clock.store(ms, Ordering::Relaxed);
    }
}

/// An error of the bus as the failure of the command.
pub(super) fn failed(error: &Error) -> Failure {
    let reason = format!("{}; run the import again to continue it", error.detail());
    match error.code() {
        Code::BusUnavailable | Code::Unconfirmed | Code::Overloaded => Failure::Unavailable(reason),
        _ => Failure::Failed(reason),
    }
}
