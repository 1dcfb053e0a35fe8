//! Counters, gauges and histograms that cost an atomic addition, and their text for Prometheus.
//!
//! Ours, because the usual exporter appends every sample of a histogram to a list until somebody drains it: at
//! 300,000 calls a second that is megabytes a second, for figures that end in fourteen buckets anyway.

use std::{
    collections::BTreeMap,
    fmt::Write as _,
    marker::PhantomData,
    ops::Index,
    sync::{
        Arc,
        atomic::{AtomicI64, AtomicU64, Ordering::Relaxed},
    },
    time::Duration,
};

use parking_lot::Mutex;

/// Two of these never share a cache line: workers add to neighbouring counters all the time.
#[derive(Debug, Default)]
#[repr(align(64))]
struct Alone<T>(T);

/// Only goes up. Cloning gives another handle to the same number.
#[derive(Clone, Debug, Default)]
pub struct Counter(Arc<Alone<AtomicU64>>);

/// Goes up and down. Cloning gives another handle to the same number.
#[derive(Clone, Debug, Default)]
pub struct Gauge(Arc<Alone<AtomicI64>>);

/// One that is counted in a [`Gauge`] until it is dropped.
#[derive(Debug)]
pub struct Held(Gauge);

/// How long things took.
#[derive(Clone, Debug, Default)]
pub struct Histogram(Arc<Alone<Buckets>>);

#[derive(Debug, Default)]
struct Buckets {
    /// As many as [`BOUNDS`], and one for what is longer.
    counts: [AtomicU64; BOUNDS.len() + 1],
    nanoseconds: AtomicU64,
}

/// Upper bounds: microseconds, and what Prometheus writes for them. A local call takes tens of microseconds, a long-poll a minute.
const BOUNDS: [(u64, &str); 14] = [
    (50, "0.00005"),
    (100, "0.0001"),
    (250, "0.00025"),
    (500, "0.0005"),
    (1_000, "0.001"),
    (2_500, "0.0025"),
    (5_000, "0.005"),
    (10_000, "0.01"),
    (50_000, "0.05"),
    (250_000, "0.25"),
    (1_000_000, "1"),
    (5_000_000, "5"),
    (30_000_000, "30"),
    (120_000_000, "120"),
];

/// A label with a closed set of values, so that a client can never make a series.
pub trait Label: Copy + 'static {
    const NAME: &'static str;
    const ALL: &'static [Self];
    fn value(self) -> &'static str;
    /// Where `self` is in [`ALL`](Self::ALL).
    fn index(self) -> usize;
}

/// A metric per value of a label: `delivered[Transport::Sse]`.
#[derive(Clone, Debug)]
pub struct By<L, M>(Box<[M]>, PhantomData<L>);

/// Counters made when a value of their labels first comes up. For what is rare; its values are the program's own text.
#[derive(Clone, Debug)]
pub struct Rare<const N: usize>(Arc<Mutex<BTreeMap<[&'static str; N], Counter>>>);

/// Everything there is to render, in the order in which it was made.
#[derive(Debug, Default)]
pub(super) struct Registry(Vec<Family>);

#[derive(Debug)]
struct Family {
    name: &'static str,
    help: &'static str,
    series: Series,
}

#[derive(Debug)]
enum Series {
    Counters(Vec<(String, Counter)>),
    Gauges(Vec<(String, Gauge)>),
    Histograms(Vec<(String, Histogram)>),
    One([&'static str; 1], Rare<1>),
    Two([&'static str; 2], Rare<2>),
}

// === impl Counter, Gauge, Histogram ===

impl Counter {
    pub fn add(&self, n: u64) {
        self.0.0.fetch_add(n, Relaxed);
    }

    pub fn get(&self) -> u64 {
        self.0.0.load(Relaxed)
    }
}

impl Gauge {
    pub fn add(&self, n: i64) {
        self.0.0.fetch_add(n, Relaxed);
    }

    pub fn set(&self, n: i64) {
        self.0.0.store(n, Relaxed);
    }

    pub fn get(&self) -> i64 {
        self.0.0.load(Relaxed)
    }

    /// Counts one until what is returned is dropped.
    pub fn hold(&self) -> Held {
        self.add(1);
        Held(self.clone())
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        self.0.add(-1);
    }
}

impl Histogram {
    pub fn record(&self, took: Duration) {
        let buckets = &self.0.0;
        let nanoseconds = took.as_nanos() as u64;
        let at = BOUNDS.partition_point(|(bound, _)| bound * 1_000 < nanoseconds);
        buckets.counts[at].fetch_add(1, Relaxed);
        // Wraps after centuries of waiting; Prometheus takes that for a restart.
        buckets.nanoseconds.fetch_add(nanoseconds, Relaxed);
    }

    pub fn count(&self) -> u64 {
        self.0.0.counts.iter().map(|count| count.load(Relaxed)).sum()
    }
}

impl<L: Label, M> Index<L> for By<L, M> {
    type Output = M;

    fn index(&self, label: L) -> &M {
        &self.0[label.index()]
    }
}

impl<const N: usize> Rare<N> {
    /// The counter of these values.
    pub fn of(&self, values: [&'static str; N]) -> Counter {
        self.0.lock().entry(values).or_default().clone()
    }
}

// === impl Registry ===

impl Registry {
    pub fn counter(&mut self, name: &'static str, help: &'static str) -> Counter {
        let counter = Counter::default();
        self.push(name, help, Series::Counters(vec![(String::new(), counter.clone())]));
        counter
    }

    pub fn gauge(&mut self, name: &'static str, help: &'static str) -> Gauge {
        let gauge = Gauge::default();
        self.push(name, help, Series::Gauges(vec![(String::new(), gauge.clone())]));
        gauge
    }

    /// A gauge that says something by its label, and is 1.
    pub fn info(&mut self, name: &'static str, help: &'static str, label: &'static str, value: &'static str) {
        let gauge = Gauge::default();
        gauge.set(1);
        self.push(name, help, Series::Gauges(vec![(format!("{label}=\"{value}\""), gauge)]));
    }

    pub fn counters<L: Label>(&mut self, name: &'static str, help: &'static str) -> By<L, Counter> {
        let (by, series) = each();
        self.push(name, help, Series::Counters(series));
        by
    }

    pub fn gauges<L: Label>(&mut self, name: &'static str, help: &'static str) -> By<L, Gauge> {
        let (by, series) = each();
        self.push(name, help, Series::Gauges(series));
        by
    }

    pub fn histograms<L: Label>(&mut self, name: &'static str, help: &'static str) -> By<L, Histogram> {
        let (by, series) = each();
        self.push(name, help, Series::Histograms(series));
        by
    }

    pub fn rare(&mut self, name: &'static str, help: &'static str, label: &'static str) -> Rare<1> {
        let rare = Rare(Arc::default());
        self.push(name, help, Series::One([label], rare.clone()));
        rare
    }

    pub fn rare_pairs(&mut self, name: &'static str, help: &'static str, labels: [&'static str; 2]) -> Rare<2> {
        let rare = Rare(Arc::default());
        self.push(name, help, Series::Two(labels, rare.clone()));
        rare
    }

    fn push(&mut self, name: &'static str, help: &'static str, series: Series) {
        self.0.push(Family { name, help, series });
    }

    pub fn render(&self, out: &mut String) {
        for Family { name, help, series } in &self.0 {
            let kind = match series {
                Series::Gauges(_) => "gauge",
                Series::Histograms(_) => "histogram",
                _ => "counter",
            };
            let _ = writeln!(out, "# HELP {name} {help}\n# TYPE {name} {kind}");
            match series {
                Series::Counters(all) => all.iter().for_each(|(labels, one)| line(out, name, labels, one.get())),
                Series::Gauges(all) => all.iter().for_each(|(labels, one)| line(out, name, labels, one.get())),
                Series::Histograms(all) => all.iter().for_each(|(labels, one)| one.render(name, labels, out)),
                Series::One(labels, rare) => rare.render(name, *labels, out),
                Series::Two(labels, rare) => rare.render(name, *labels, out),
            }
        }
    }
}

impl Histogram {
    fn render(&self, name: &str, labels: &str, out: &mut String) {
        let separator = if labels.is_empty() { "" } else { "," };
        let bounds = BOUNDS.iter().map(|(_, text)| *text).chain(["+Inf"]);
        let mut below = 0;
        for (bound, count) in bounds.zip(&self.0.0.counts) {
            below += count.load(Relaxed);
            let _ = writeln!(out, "{name}_bucket{{{labels}{separator}le=\"{bound}\"}} {below}");
        }
        let sum = self.0.0.nanoseconds.load(Relaxed) as f64 / 1e9;
        line(out, &format!("{name}_sum"), labels, sum);
        line(out, &format!("{name}_count"), labels, below);
    }
}

impl<const N: usize> Rare<N> {
    fn render(&self, name: &str, labels: [&'static str; N], out: &mut String) {
        for (values, counter) in self.0.lock().iter() {
            let pairs: Vec<_> =
                labels.iter().zip(values).map(|(label, value)| format!("{label}=\"{value}\"")).collect();
            line(out, name, &pairs.join(","), counter.get());
        }
    }
}

fn each<L: Label, M: Clone + Default>() -> (By<L, M>, Vec<(String, M)>) {
    let all: Box<[M]> = L::ALL.iter().map(|_| M::default()).collect();
    let labels = L::ALL.iter().map(|label| format!("{}=\"{}\"", L::NAME, label.value()));
    let series = labels.zip(all.iter().cloned()).collect();
    (By(all, PhantomData), series)
}

fn line(out: &mut String, name: &str, labels: &str, value: impl std::fmt::Display) {
    let _ = match labels {
        "" => writeln!(out, "{name} {value}"),
        labels => writeln!(out, "{name}{{{labels}}} {value}"),
    };
}
