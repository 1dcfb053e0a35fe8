//! [`PresenceCore`]: the state that leases, announcer and replication share.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering::Relaxed},
    },
    time::Instant,
};

use parking_lot::Mutex;
use tokio::sync::Notify;

use super::{member::MemberInfo, member_table::MemberTable};
use crate::{bus::Bus, channel::Channel, cluster::Cluster, config::Config, metrics::Metrics, position::Position};

pub(super) struct PresenceCore {
    pub(super) config: Arc<Config>,
    pub(super) bus: Arc<Bus>,
    pub(super) cluster: Arc<dyn Cluster>,
    pub(super) metrics: Arc<Metrics>,
    started: Instant,
    pub(super) state: Mutex<PresenceState>,
    /// Wakes the replication.
    pub(super) changed: Notify,
    /// The table holds what was announced: received from the leader, or established by this node as the leader.
    synced: AtomicBool,
}

#[derive(Default)]
pub(super) struct PresenceState {
    pub(super) table: MemberTable,
    /// Announcements of this node that are not replicated yet.
    pub(super) announced: Vec<Announced>,
    /// All nodes are to be sent a full snapshot.
    pub(super) resend_all: bool,
}

/// The content of one announcement.
pub(super) struct Announced {
    pub(super) channel: Channel,
    pub(super) position: Position,
    /// `None`: the member left.
    pub(super) members: Vec<(Arc<str>, Option<Arc<MemberInfo>>)>,
}

impl PresenceCore {
    pub(super) fn new(config: Arc<Config>, bus: Arc<Bus>, cluster: Arc<dyn Cluster>, metrics: Arc<Metrics>) -> Self {
        PresenceCore {
            config,
            bus,
            cluster,
            metrics,
            started: Instant::now(),
            state: Mutex::default(),
            changed: Notify::new(),
            synced: AtomicBool::new(false),
        }
    }

    /// Monotonic milliseconds.
    pub(super) fn now(&self) -> u64 {
        self.started.elapsed().as_millis() as u64
    }

    pub(super) fn notify_replication(&self, state: &PresenceState) {
        if state.table.has_unsent() {
            self.changed.notify_one();
        }
    }

    pub(super) fn is_synced(&self) -> bool {
        self.synced.load(Relaxed)
    }

    pub(super) fn set_synced(&self) {
        self.synced.store(true, Relaxed);
    }

    /// Whether this node is to announce.
    pub(super) fn is_announcer(&self) -> bool {
        self.cluster.is_leader() && self.is_synced()
    }
}
