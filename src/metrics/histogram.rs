//! [`Histogram`], a distribution of durations that counts every value.

use std::{
    fmt::{self, Write as _},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    time::Duration,
};

/// Upper bounds of the buckets in microseconds: a local call takes tens of them, a long-poll a minute.
const BOUNDS: [u64; 14] =
    [50, 100, 250, 500, 1_000, 2_500, 5_000, 10_000, 50_000, 250_000, 1_000_000, 5_000_000, 30_000_000, 120_000_000];

/// A distribution of durations. Clones share it. Recording is two atomic additions.
#[derive(Clone, Debug, Default)]
pub(crate) struct Histogram(Arc<HistogramState>);

#[derive(Debug, Default)]
struct HistogramState {
    /// The values of each bucket alone; the last one has no bound.
    buckets: [AtomicU64; BOUNDS.len() + 1],
    /// In microseconds.
    sum: AtomicU64,
}

impl Histogram {
    pub(crate) fn record(&self, took: Duration) {
        self.record_micros(took.as_micros() as u64);
    }

    #[inline]
    pub(crate) fn record_micros(&self, micros: u64) {
        let bucket = BOUNDS.iter().position(|bound| micros <= *bound).unwrap_or(BOUNDS.len());
        self.0.buckets[bucket].fetch_add(1, Relaxed);
        self.0.sum.fetch_add(micros, Relaxed);
    }

    /// The number of recorded values.
    pub(super) fn count(&self) -> u64 {
        self.0.buckets.iter().map(|bucket| bucket.load(Relaxed)).sum()
    }

    /// Writes the series in the text format of Prometheus. `labels` are written as in braces.
    pub(super) fn render(&self, name: &str, labels: &str, out: &mut String) -> fmt::Result {
        let comma = if labels.is_empty() { "" } else { "," };
        let mut total = 0;
        for (at, bucket) in self.0.buckets.iter().enumerate() {
            total += bucket.load(Relaxed);
            let bound = BOUNDS.get(at).map_or_else(|| "+Inf".to_owned(), |bound| seconds(*bound).to_string());
            writeln!(out, "{name}_bucket{{{labels}{comma}le=\"{bound}\"}} {total}")?;
        }
        let labels = if labels.is_empty() { String::new() } else { format!("{{{labels}}}") };
        writeln!(out, "{name}_sum{labels} {}", seconds(self.0.sum.load(Relaxed)))?;
        writeln!(out, "{name}_count{labels} {total}")
    }
}

fn seconds(micros: u64) -> f64 {
    micros as f64 / 1e6
}
