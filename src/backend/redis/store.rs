//! The log of a bus on Redis: [`Redis`] implements [`Log`](crate::bus::Log).

mod acks;
mod append;
mod consumers;
pub(super) mod keys;
mod probe;
mod read;
mod retention;
mod tail;
mod wire;

use std::{sync::Arc, time::Duration};

use parking_lot::Mutex;
use tokio::task::JoinHandle;

pub use self::acks::Ack;
use self::{
    acks::Acks, append::Appends, consumers::Sweeps, keys::Keys, probe::Probes, retention::RetentionRules, tail::Tails,
};
use super::client::{PubSub, Topology};
use crate::{bus::Topics, metrics::RedisConnectionKind};

/// How often tails and probes are looked after.
const BEAT: Duration = Duration::from_secs(1);

/// The log of many nodes. Dropped, it ends its subscriptions.
pub struct Redis(Arc<Inner>);

/// How it is used.
#[derive(Clone, Debug)]
pub struct RedisSettings {
    /// Before every key and every pub/sub channel.
    pub prefix: String,
    /// When a publish is answered.
    pub ack: Ack,
}

struct Inner {
    topology: Arc<Topology>,
    topics: Arc<Topics>,
    keys: Keys,
    tails: Arc<Tails>,
    pubsub: Arc<PubSub>,
    probes: Probes,
    acks: Option<Acks>,
    sweeps: Sweeps,
    appends: Appends,
    keeps: RetentionRules,
    /// A test owns the time.
    clock_is_ours: bool,
    /// The first second after this was made, by that time.
    began: u64,
    beat: Mutex<Option<JoinHandle<()>>>,
}

impl Redis {
    /// Needs a tokio runtime. Whether Redis can be reached shows later.
    pub fn start(topology: Arc<Topology>, topics: Arc<Topics>, settings: RedisSettings) -> Self {
        let tails = Arc::new(Tails::default());
        let inner = Arc::new_cyclic(|inner| {
            tails.belong_to(inner.clone());
            Inner {
                pubsub: PubSub::start(topology.clone(), RedisConnectionKind::Events, tails.clone()),
                keys: Keys::new(&settings.prefix),
                tails: tails.clone(),
                probes: Probes::default(),
                acks: match settings.ack {
                    Ack::Stored => None,
                    Ack::Replicated => Some(Acks::default()),
                },
                sweeps: Sweeps::default(),
                appends: Appends::default(),
                keeps: RetentionRules::new(&topics.config().rules, topics.config().retention),
                clock_is_ours: topics.is_manual(),
                began: topics.now() / 1000 + 1,
                topology,
                topics,
                beat: Mutex::default(),
            }
        });
        let beat = tokio::spawn({
            let inner = Arc::downgrade(&inner);
            async move {
                let mut ticks = tokio::time::interval(BEAT);
                ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
                loop {
                    ticks.tick().await;
                    let Some(inner) = inner.upgrade() else { return };
                    inner.probe();
                    inner.audit();
                    tokio::spawn(async move { inner.agree().await });
                }
            }
        });
        *inner.beat.lock() = Some(beat);
        Redis(inner)
    }

    /// Looks after channels that have been quiet, as it is done all the time. For tests that own the time.
    pub async fn audit(&self) {
        self.0.audit_all().await;
    }
}

impl Drop for Redis {
    fn drop(&mut self) {
        if let Some(beat) = self.0.beat.lock().take() {
            beat.abort();
        }
    }
}
