//! [`MonotonicClock`].

use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    time::Instant,
};

/// Measures the time of leases and calls. It never goes back and is no time of day.
#[derive(Clone, Debug)]
pub enum MonotonicClock {
    Real(Instant),
    /// Milliseconds, advanced by a test.
    Manual(Arc<AtomicU64>),
}

impl MonotonicClock {
    pub fn real() -> Self {
        MonotonicClock::Real(Instant::now())
    }

    /// Milliseconds since the clock was made.
    pub fn now(&self) -> u64 {
        self.micros() / 1_000
    }

    /// Microseconds since the clock was made.
    pub(crate) fn micros(&self) -> u64 {
        match self {
            MonotonicClock::Real(start) => start.elapsed().as_micros() as u64,
            MonotonicClock::Manual(now) => now.load(Relaxed) * 1_000,
        }
    }
}
