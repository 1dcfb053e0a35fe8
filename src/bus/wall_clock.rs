//! [`WallClock`], the time of day that the bus stamps on events.

use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    time::{SystemTime, UNIX_EPOCH},
};

/// The time of day, in Unix milliseconds. Tests and imports set their own.
#[derive(Clone, Debug, Default)]
pub enum WallClock {
    #[default]
    System,
    Manual(Arc<AtomicU64>),
}

impl WallClock {
    /// Unix milliseconds.
    pub(crate) fn now(&self) -> u64 {
        match self {
            WallClock::System => SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_millis() as u64,
            WallClock::Manual(now) => now.load(Relaxed),
        }
    }
}
