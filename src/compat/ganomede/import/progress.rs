//! Results of an import, and progress while it runs.

use std::time::{Duration, Instant};

use serde::Serialize;

use crate::{channel::Channel, terminal::note};

/// How often progress is reported.
const INTERVAL: Duration = Duration::from_secs(2);

/// The result for one channel.
#[derive(Debug, Default, Serialize)]
pub(super) struct ImportedChannel {
    pub(super) channel: String,
    /// Placed by this run, or by the run that a dry run predicts.
    pub(super) events: u64,
    /// Ids without an event, and ids of unfit events.
    pub(super) void: u64,
    /// Events that weir cannot store, with the reason.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub(super) unfit: Vec<String>,
    /// The newest offset after the run.
    pub(super) top: u64,
    /// Left for the next run: among them an event may be missing that is still being written.
    #[serde(skip_serializing_if = "is_zero")]
    pub(super) held_back: u64,
}

/// The result for cursors and indices.
#[derive(Debug, Default, Serialize)]
pub(super) struct ImportedCursors {
    pub(super) cursors: u64,
    pub(super) indices: u64,
    /// Cursors of channels that were not imported.
    pub(super) cursors_without_channel: u64,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub(super) unfit: Vec<String>,
}

pub(super) struct ImportProgress {
    reported: Instant,
    pub(super) placed: u64,
    pub(super) began: Instant,
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde asks so")]
fn is_zero(n: &u64) -> bool {
    *n == 0
}

impl ImportProgress {
    pub(super) fn start() -> Self {
        ImportProgress { reported: Instant::now(), placed: 0, began: Instant::now() }
    }

    pub(super) fn note(&mut self, channel: &Channel, at: u64, end: u64) {
        if self.reported.elapsed() > INTERVAL {
            self.reported = Instant::now();
            let rate = self.placed as f64 / self.began.elapsed().as_secs_f64();
            note(format_args!("{}: {at} of {} ({rate:.0} events/s)", channel, end));
        }
    }
}
