//! Handles of metrics, which make an update an atomic operation without a lookup, and the registry that they come from.

use std::{fmt::Write as _, marker::PhantomData, ops::Index, sync::Arc};

use metrics::{Key, KeyName, Metadata, Recorder};
use metrics_exporter_prometheus::{PrometheusBuilder, PrometheusRecorder};
use parking_lot::Mutex;

use super::histogram::Histogram;

/// A value that only increases. Clones share the value.
#[derive(Clone, Debug)]
pub(crate) struct Counter(metrics::Counter);

/// A value that goes up and down. Clones share the value.
#[derive(Clone, Debug)]
pub(crate) struct Gauge(metrics::Gauge);

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
pub(super) struct MetricRegistry {
    recorder: Arc<PrometheusRecorder>,
    histograms: Arc<Mutex<Vec<HistogramFamily>>>,
}

/// The histograms of one name, with their labels as they are rendered.
struct HistogramFamily {
    name: &'static str,
    help: &'static str,
    series: Vec<(String, Histogram)>,
}

/// Required by the `Recorder` trait, but not used.
const METADATA: Metadata<'static> = Metadata::new(module_path!(), metrics::Level::INFO, None);

// === impl Counter, Gauge ===

impl Counter {
    pub(crate) fn add(&self, n: u64) {
        self.0.increment(n);
    }

    /// Sets a count that is kept elsewhere.
    pub(crate) fn set(&self, n: u64) {
        self.0.absolute(n);
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

impl<L: MetricLabel, M> PerLabel<L, M> {
    pub(super) fn iter(&self) -> std::slice::Iter<'_, M> {
        self.0.iter()
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
        Counter(self.registry.recorder.register_counter(&Key::from_parts(self.name, &labels), &METADATA))
    }
}

// === impl MetricRegistry ===

impl MetricRegistry {
    pub(super) fn new() -> Self {
        let recorder = Arc::new(PrometheusBuilder::new().build_recorder());
        MetricRegistry { recorder, histograms: Arc::default() }
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
        let histogram = Histogram::default();
        self.add_histograms(name, help, vec![(String::new(), histogram.clone())]);
        histogram
    }

    pub(super) fn histograms<L: MetricLabel>(&self, name: &'static str, help: &'static str) -> PerLabel<L, Histogram> {
        let histograms: PerLabel<L, Histogram> = each(|_| Histogram::default());
        let labels = L::ALL.iter().map(|label| format!("{}=\"{}\"", L::NAME, label.value()));
        self.add_histograms(name, help, labels.zip(histograms.0.iter().cloned()).collect());
        histograms
    }

    fn add_histograms(&self, name: &'static str, help: &'static str, series: Vec<(String, Histogram)>) {
        self.histograms.lock().push(HistogramFamily { name, help, series });
    }

    pub(super) fn rare<const N: usize>(
        &self,
        name: &'static str,
        help: &'static str,
        labels: [&'static str; N],
    ) -> RareCounter<N> {
        self.recorder.describe_counter(KeyName::from(name), None, help.into());
        RareCounter { registry: self.clone(), name, labels }
    }

    pub(super) fn render(&self) -> String {
        let mut out = self.recorder.handle().render();
        for HistogramFamily { name, help, series } in &*self.histograms.lock() {
            // Writing to a String cannot fail.
            let _ = writeln!(out, "# HELP {name} {help}\n# TYPE {name} histogram");
            for (labels, histogram) in series {
                let _ = histogram.render(name, labels, &mut out);
            }
            out.push('\n');
        }
        out
    }

    fn counter_of(&self, name: &'static str, help: &'static str, labels: &[(&'static str, &'static str)]) -> Counter {
        self.recorder.describe_counter(KeyName::from(name), None, help.into());
        Counter(self.recorder.register_counter(&Key::from_parts(name, labels), &METADATA))
    }

    fn gauge_of(&self, name: &'static str, help: &'static str, labels: &[(&'static str, &'static str)]) -> Gauge {
        self.recorder.describe_gauge(KeyName::from(name), None, help.into());
        Gauge(self.recorder.register_gauge(&Key::from_parts(name, labels), &METADATA))
    }
}

/// Makes one metric per value of the label.
fn each<L: MetricLabel, M>(make: impl Fn(&[(&'static str, &'static str)]) -> M) -> PerLabel<L, M> {
    PerLabel(L::ALL.iter().map(|label| make(&[(L::NAME, label.value())])).collect(), PhantomData)
}
