//! The handles behind [`Metrics`](super::Metrics): kept, so that counting costs an atomic addition and no look-up.

use std::{fmt, marker::PhantomData, ops::Index, sync::Arc, time::Duration};

use metrics::{Key, KeyName, Metadata, Recorder, Unit};
use metrics_exporter_prometheus::{Matcher, PrometheusBuilder, PrometheusRecorder};

/// Only goes up. Cloning gives another handle to the same number.
#[derive(Clone, Debug)]
pub struct Counter(metrics::Counter);

/// Goes up and down. Cloning gives another handle to the same number.
#[derive(Clone, Debug)]
pub struct Gauge(metrics::Gauge);

/// How long things took.
#[derive(Clone, Debug)]
pub struct Histogram(metrics::Histogram);

/// Upper bounds in seconds. A local call takes tens of microseconds, a long-poll a minute.
const BOUNDS: [f64; 14] =
    [50e-6, 100e-6, 250e-6, 500e-6, 1e-3, 2.5e-3, 5e-3, 10e-3, 50e-3, 250e-3, 1.0, 5.0, 30.0, 120.0];

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

/// Counters looked up when a value of their labels comes up. For what is rare; its values are the program's own text.
#[derive(Clone, Debug)]
pub struct Rare<const N: usize> {
    registry: Registry,
    name: &'static str,
    labels: [&'static str; N],
}

/// Where handles come from, and what renders them. Not the process's global one: an `App` counts for itself.
#[derive(Clone)]
pub(super) struct Registry(Arc<PrometheusRecorder>);

/// Where a metric is from, which nobody asks.
const METADATA: Metadata<'static> = Metadata::new(module_path!(), metrics::Level::INFO, None);

// === impl Counter, Gauge, Histogram ===

impl Counter {
    pub fn add(&self, n: u64) {
        self.0.increment(n);
    }
}

impl Gauge {
    pub fn add(&self, n: i64) {
        self.0.increment(n as f64);
    }

    pub fn set(&self, n: i64) {
        self.0.set(n as f64);
    }
}

impl Histogram {
    pub fn record(&self, took: Duration) {
        self.0.record(took.as_secs_f64());
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
        let labels: Vec<_> = self.labels.into_iter().zip(values).collect();
        Counter(self.registry.0.register_counter(&Key::from_parts(self.name, &labels), &METADATA))
    }
}

// === impl Registry ===

impl Registry {
    pub fn new() -> Self {
        // Fails only without a bound, or with an empty quantile.
        let builder = PrometheusBuilder::new()
            .set_buckets_for_metric(Matcher::Suffix("_seconds".into()), &BOUNDS)
            .unwrap_or_default();
        Registry(Arc::new(builder.build_recorder()))
    }

    pub fn counter(&self, name: &'static str, help: &'static str) -> Counter {
        self.counter_of(name, help, &[])
    }

    pub fn gauge(&self, name: &'static str, help: &'static str) -> Gauge {
        self.gauge_of(name, help, &[])
    }

    /// A gauge that says something by its label, and is 1.
    pub fn info(&self, name: &'static str, help: &'static str, label: &'static str, value: &'static str) {
        self.gauge_of(name, help, &[(label, value)]).set(1);
    }

    pub fn counters<L: Label>(&self, name: &'static str, help: &'static str) -> By<L, Counter> {
        each(|labels| self.counter_of(name, help, labels))
    }

    pub fn gauges<L: Label>(&self, name: &'static str, help: &'static str) -> By<L, Gauge> {
        each(|labels| self.gauge_of(name, help, labels))
    }

    pub fn histogram(&self, name: &'static str, help: &'static str) -> Histogram {
        self.0.describe_histogram(KeyName::from(name), Some(Unit::Seconds), help.into());
        Histogram(self.0.register_histogram(&Key::from_static_name(name), &METADATA))
    }

    pub fn histograms<L: Label>(&self, name: &'static str, help: &'static str) -> By<L, Histogram> {
        self.0.describe_histogram(KeyName::from(name), Some(Unit::Seconds), help.into());
        each(|labels| Histogram(self.0.register_histogram(&Key::from_parts(name, labels), &METADATA)))
    }

    pub fn rare(&self, name: &'static str, help: &'static str, label: &'static str) -> Rare<1> {
        self.rare_pairs(name, help, [label])
    }

    pub fn rare_pairs<const N: usize>(
        &self,
        name: &'static str,
        help: &'static str,
        labels: [&'static str; N],
    ) -> Rare<N> {
        self.0.describe_counter(KeyName::from(name), None, help.into());
        Rare { registry: self.clone(), name, labels }
    }

    pub fn render(&self) -> String {
        self.0.handle().render()
    }

    /// Histograms keep every sample until this adds it to their buckets.
    pub fn upkeep(&self) {
        self.0.handle().run_upkeep();
    }

    fn counter_of(&self, name: &'static str, help: &'static str, labels: &[(&'static str, &'static str)]) -> Counter {
        self.0.describe_counter(KeyName::from(name), None, help.into());
        Counter(self.0.register_counter(&Key::from_parts(name, labels), &METADATA))
    }

    fn gauge_of(&self, name: &'static str, help: &'static str, labels: &[(&'static str, &'static str)]) -> Gauge {
        self.0.describe_gauge(KeyName::from(name), None, help.into());
        Gauge(self.0.register_gauge(&Key::from_parts(name, labels), &METADATA))
    }
}

impl fmt::Debug for Registry {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Registry")
    }
}

/// One metric per value of the label.
fn each<L: Label, M>(make: impl Fn(&[(&'static str, &'static str)]) -> M) -> By<L, M> {
    By(L::ALL.iter().map(|label| make(&[(L::NAME, label.value())])).collect(), PhantomData)
}
