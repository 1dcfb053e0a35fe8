//! [`MicroStreamHub`]: the state that the clients of a hub share.

use std::{
    collections::HashMap,
    sync::{
        Arc,
        atomic::{AtomicU32, Ordering::Relaxed},
    },
    time::Duration,
};

use foldhash::fast::RandomState;
use parking_lot::Mutex;

use super::config::Config;
use crate::{net::timer::TimerWheel, node::Node, rpc::Hub};

/// Maximum size of the attachments of one packet, in multiples of `max_payload`.
pub(super) const ATTACHED: usize = 8;
/// Timeout for the connect packet, as in the original.
pub(super) const CONNECT: Duration = Duration::from_secs(45);

/// What the clients share.
pub(super) struct MicroStreamHub {
    pub(super) node: Arc<Node>,
    pub(super) rpc: Arc<Hub>,
    pub(super) wheel: Arc<TimerWheel>,
    pub(super) config: Config,
    /// The number of ticks for which a caller may wait for a response.
    pub(super) memory: u32,
    /// The clients that are connected to this node.
    names: Mutex<HashMap<Box<str>, Beat, RandomState>>,
}

/// The tick of a client's last heartbeat.
pub(super) type Beat = Arc<AtomicU32>;

impl MicroStreamHub {
    pub(super) fn new(node: &Arc<Node>) -> Self {
        let rpc = &node.config.rpc;
        MicroStreamHub {
            node: node.clone(),
            rpc: node.hub.clone(),
            wheel: node.timers.clone(),
            config: node.config.compat.get(),
            memory: TimerWheel::ticks(rpc.timeout.min(rpc.max_timeout) + rpc.late_window),
            names: Mutex::default(),
        }
    }

    pub(super) fn connected(&self, name: &str, beat: &Beat) {
        self.names.lock().insert(name.into(), beat.clone());
    }

    /// Removes a name, unless another client has registered it meanwhile.
    pub(super) fn disconnected(&self, name: &str, beat: &Beat) {
        let mut names = self.names.lock();
        if names.get(name).is_some_and(|other| Arc::ptr_eq(other, beat)) {
            names.remove(name);
            if names.is_empty() {
                names.shrink_to_fit();
            }
        }
    }

    /// Records a heartbeat. As in the original, it counts for the client of that name, whichever client sends it.
    pub(super) fn heartbeat(&self, name: &str) {
        if let Some(beat) = self.names.lock().get(name) {
            beat.store(self.wheel.now(), Relaxed);
        }
    }
}
