//! Latency statistics, and durations for people.

use std::{fmt, time::Duration};

/// Sorted durations of a repeated operation.
pub(super) struct Latency(Vec<Duration>);

impl Latency {
    pub(super) fn of(mut taken: Vec<Duration>) -> Self {
        taken.sort_unstable();
        Latency(taken)
    }

    pub(super) fn median(&self) -> Duration {
        self.at(0.5)
    }

    pub(super) fn p99(&self) -> Duration {
        self.at(0.99)
    }

    pub(super) fn longest(&self) -> Duration {
        self.0.last().copied().unwrap_or_default()
    }

    fn at(&self, part: f64) -> Duration {
        let index = (self.0.len() as f64 * part) as usize;
        self.0.get(index.min(self.0.len().saturating_sub(1))).copied().unwrap_or_default()
    }
}

/// A duration with two significant digits: `0.21 ms`, `1.4 s`.
pub(super) struct Span(pub(super) Duration);

impl fmt::Display for Span {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let seconds = self.0.as_secs_f64();
        match seconds {
            10.0.. => write!(f, "{seconds:.0} s"),
            1.0.. => write!(f, "{seconds:.1} s"),
            0.01.. => write!(f, "{:.0} ms", seconds * 1e3),
            0.001.. => write!(f, "{:.1} ms", seconds * 1e3),
            _ => write!(f, "{:.2} ms", seconds * 1e3),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn spans_have_two_significant_digits() {
        let shown = [210, 1_400, 23_000, 1_360_000, 75_000_000].map(|us| Span(Duration::from_micros(us)).to_string());
        assert_eq!(shown, ["0.21 ms", "1.4 ms", "23 ms", "1.4 s", "75 s"]);
    }

    #[test]
    fn percentiles_do_not_depend_on_the_order() {
        let latency = Latency::of((1..=100).rev().map(Duration::from_millis).collect());
        assert_eq!((latency.median().as_millis(), latency.p99().as_millis()), (51, 100));
        assert_eq!(Latency::of(Vec::new()).p99(), Duration::ZERO);
    }
}
