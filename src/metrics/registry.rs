//! Handles of metrics, which make an update an atomic operation without a lookup, and the registry that they come from.

use std::{marker::PhantomData, ops::Index, sync::Arc, time::Duration};

use metrics::{Key, KeyName, Metadata, Recorder, Unit};
use metrics_exporter_prometheus::{Matcher, PrometheusBuilder, PrometheusRecorder};

/// A value that only increases. Clones share the value.
#[derive(Clone, Debug)]
pub(crate) struct Counter(metrics::Counter);

/// A value that goes up and down. Clones share the value.
#[derive(Clone, Debug)]
pub(crate) struct Gauge(metrics::Gauge);

/// A distribution of durations. Clones share it.
#[derive(Clone, Debug)]
pub(crate) struct Histogram(metrics::Histogram);

/// Upper bounds of the buckets in seconds: a local call takes tens of microseconds, a long-poll a minute.
const BOUNDS: [f64; 14] =
    [50e-6, 100e-6, 250e-6, 500e-6, 1e-3, 2.5e-3, 5e-3, 10e-3, 50e-3, 250e-3, 1.0, 5.0, 30.0, 120.0];

/// A label with a closed set of values, so that clients cannot create series.
pub(crate) trait MetricLabel: Copy + 'static {
    const NAME: &'static str;
    const ALL: &'static [Self];
    fn value(self) -> &'static str;
    /// The position of `self` in [`ALL`](Self::ALL).
    fn index(self) -> usize;
}

/// One metric per value of a label: `delivered[Transport::Sse]`.
#[derive(Clone, Debug)]
pub(crate) struct PerLabel<L, M>(Box<[M]>, PhantomData<L>);

/// Counters by `N` labels, looked up at each use: for rare events. The label values are constants of the program.
#[derive(Clone)]
pub(crate) struct RareCounter<const N: usize> {
    registry: MetricRegistry,
    name: &'static str,
    labels: [&'static str; N],
}

/// Creates handles and renders their values. Not the global recorder of the process: each `App` has its own.
#[derive(Clone)]
pub(super) struct MetricRegistry(Arc<PrometheusRecorder>);

/// Required by the `Recorder` trait, but not used.
const METADATA: Metadata<'static> = Metadata::new(module_path!(), metrics::Level::INFO, None);

// === impl Counter, Gauge, Histogram ===

impl Counter {
    pub(crate) fn add(&self, n: u64) {
        self.0.increment(n);
    }
}

impl Gauge {
    pub(crate) fn add(&self, n: i64) {
        self.0.increment(n as f64);
    }

    pub(crate) fn set(&self, n: i64) {
        self.0.set(n as f64);
    }
}

impl Histogram {
    pub(crate) fn record(&self, took: Duration) {
        self.0.record(took.as_secs_f64());
    }
}

impl<L: MetricLabel, M> Index<L> for PerLabel<L, M> {
    type Output = M;

    fn index(&self, label: L) -> &M {
        &self.0[label.index()]
    }
}

impl<const N: usize> RareCounter<N> {
    /// The counter for these label values.
    pub(crate) fn of(&self, values: [&'static str; N]) -> Counter {
        let labels: Vec<_> = self.labels.into_iter().zip(values).collect();
        Counter(self.registry.0.register_counter(&Key::from_parts(self.name, &labels), &METADATA))
    }
}

// === impl MetricRegistry ===

impl MetricRegistry {
    pub(super) fn new() -> Self {
        // Fails only for an empty list of bounds.
        let builder = PrometheusBuilder::new()
            .set_buckets_for_metric(Matcher::Suffix("_seconds".into()), &BOUNDS)
            .unwrap_or_default();
        MetricRegistry(Arc::new(builder.build_recorder()))
    }

    pub(super) fn counter(&self, name: &'static str, help: &'static str) -> Counter {
        self.counter_of(name, help, &[])
    }

    pub(super) fn gauge(&self, name: &'static str, help: &'static str) -> Gauge {
        self.gauge_of(name, help, &[])
    }

    /// A gauge that is always 1 and carries its information in a label.
    pub(super) fn info(&self, name: &'static str, help: &'static str, label: &'static str, value: &'static str) {
        self.gauge_of(name, help, &[(label, value)]).set(1);
    }

    pub(super) fn counters<L: MetricLabel>(&self, name: &'static str, help: &'static str) -> PerLabel<L, Counter> {
        each(|labels| self.counter_of(name, help, labels))
    }

    pub(super) fn gauges<L: MetricLabel>(&self, name: &'static str, help: &'static str) -> PerLabel<L, Gauge> {
        each(|labels| self.gauge_of(name, help, labels))
    }

    pub(super) fn histogram(&self, name: &'static str, help: &'static str) -> Histogram {
        self.0.describe_histogram(KeyName::from(name), Some(Unit::Seconds), help.into());
        Histogram(self.0.register_histogram(&Key::from_static_name(name), &METADATA))
    }

    pub(super) fn histograms<L: MetricLabel>(&self, name: &'static str, help: &'static str) -> PerLabel<L, Histogram> {
        self.0.describe_histogram(KeyName::from(name), Some(Unit::Seconds), help.into());
        each(|labels| Histogram(self.0.register_histogram(&Key::from_parts(name, labels), &METADATA)))
    }

    pub(super) fn rare<const N: usize>(
        &self,
        name: &'static str,
        help: &'static str,
        labels: [&'static str; N],
    ) -> RareCounter<N> {
        self.0.describe_counter(KeyName::from(name), None, help.into());
        RareCounter { registry: self.clone(), name, labels }
    }

    pub(super) fn render(&self) -> String {
        self.0.handle().render()
    }

    /// Moves pending samples into the buckets of histograms, which keep every sample until then.
    pub(super) fn upkeep(&self) {
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

/// Makes one metric per value of the label.
fn each<L: MetricLabel, M>(make: impl Fn(&[(&'static str, &'static str)]) -> M) -> PerLabel<L, M> {
    PerLabel(L::ALL.iter().map(|label| make(&[(L::NAME, label.value())])).collect(), PhantomData)
}
