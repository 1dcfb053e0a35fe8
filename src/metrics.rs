//! Every metric, with its name and help text, in this one file. Counters end in `_total`, times in `_seconds`, sizes
//! in `_bytes`. Labels come from closed sets: never the name of a channel, a service, a consumer or a subject.
//!
//! One [`Metrics`] per `App`, so that two of them in one test process do not add up. Parts keep clones of the handles
//! they use; adding to one is an atomic addition, and what happens per delivery is added up by its transport first.

mod registry;
mod repeats;

use std::{
    hash::Hash,
    sync::Arc,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use crate::error::Code;
use registry::Registry;
pub use registry::{By, Counter, Gauge, Histogram, Label, Rare};
use repeats::Repeats;

macro_rules! label {
    ($(#[doc = $about:literal])+ $label:ident as $name:literal { $($(#[doc = $doc:literal])* $value:ident = $text:literal,)+ }) => {
        $(#[doc = $about])+
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        pub enum $label { $($(#[doc = $doc])* $value,)+ }

        impl Label for $label {
            const NAME: &'static str = $name;
            const ALL: &'static [Self] = &[$($label::$value,)+];

            fn value(self) -> &'static str {
                match self { $($label::$value => $text,)+ }
            }

            fn index(self) -> usize {
                self as usize
            }
        }
    };
}

label! {
    /// How a client is connected, or how something came in or went out.
    Transport as "transport" {
        /// Requests and answers; what became a stream or a socket is counted there instead.
        Http = "http",
        Sse = "sse",
        Ws = "ws",
        /// Reads over HTTP, waiting or not.
        Poll = "poll",
        /// Clients of Socket.IO, by whatever they are connected.
        SocketIo = "socketio",
    }
}

label! {
    /// How a call ended.
    Outcome as "result" {
        Ok = "ok",
        ServiceError = "service_error",
        NoProvider = "no_provider",
        Busy = "busy",
        Timeout = "timeout",
        ProviderGone = "provider_gone",
        BadReply = "bad_reply",
        Cancelled = "cancelled",
        /// Refused before anybody was asked: a limit, a permission, a drain.
        Refused = "refused",
    }
}

label! {
    /// The class of an HTTP status.
    Status as "status" {
        Informational = "1xx",
        Success = "2xx",
        Redirection = "3xx",
        Client = "4xx",
        Server = "5xx",
    }
}

label! {
    /// What a connection to Redis is for.
    RedisConnectionKind as "lane" {
        Commands = "commands",
        Events = "events",
        Mail = "mail",
        /// Where it is waited for replicas.
        Acks = "acks",
    }
}

/// Handles to every metric.
#[derive(Debug)]
pub struct Metrics {
    /// Connections by what they are now. See [`Metrics::connected`].
    pub connections: By<Transport, Gauge>,
    pub connections_accepted: By<Transport, Counter>,
    /// By transport and reason: a [`Code`] that ends connections, `peer`, `done` or `error`.
    pub connections_closed: Rare<2>,
    /// Not even read: over the cap of connections.
    pub connections_refused: Counter,
    pub requests: By<Status, Counter>,

    pub subscriptions: By<Transport, Gauge>,
    /// Channels that have a log or a reader on this node.
    pub channels: Gauge,
    pub published: By<Transport, Counter>,
    pub published_bytes: By<Transport, Counter>,
    pub duplicates: Counter,
    /// By [`Code`]. See [`Metrics::publish_failed`].
    pub publish_failures: Rare<1>,
    pub delivered: By<Transport, Counter>,
    /// As written, framing included.
    pub delivered_bytes: By<Transport, Counter>,
    /// By the reason of the gap.
    pub gaps: Rare<1>,
    pub bus_memory_bytes: Gauge,

    /// See [`Metrics::page_of_consumer`].
    pub consumer_repeats: Counter,

    pub calls: By<Outcome, Counter>,
    pub call_seconds: By<Outcome, Histogram>,
    pub calls_in_flight: Gauge,
    pub calls_late: Counter,
    pub services: Gauge,
    pub providers: Gauge,

    /// Connections to Redis made again after they had broken.
    pub redis_reconnects: By<RedisConnectionKind, Counter>,
    /// From a publish to its answer by Redis.
    pub redis_append_seconds: Histogram,
    /// From the time of an event to when this node hears of it.
    pub redis_lag_seconds: Histogram,
    /// Looks at a log that found what had not been heard of.
    pub redis_repairs: Counter,
    /// Messages that could not be read.
    pub redis_unreadable: Counter,
    /// Servers whose probe comes back.
    pub redis_echoing: Gauge,

    pub presence_leases: Gauge,
    pub presence_members: Gauge,
    pub presence_announced: Counter,

    /// Mail about calls.
    pub mail_sent: Counter,
    pub mail_received: Counter,
    /// Other nodes that can be reached.
    pub links: Gauge,
    pub links_lost: Counter,

    pub ws_ignored: Counter,
    pub ws_unreadable: Counter,

    /// 1 while clients are welcome.
    pub ready: Gauge,

    repeats: Repeats,
    registry: Registry,
}

impl Metrics {
    pub fn new() -> Self {
        let it = Registry::new();
        it.info("weir_build_info", "Always 1; the version is the label.", "version", env!("CARGO_PKG_VERSION"));
        let started = it.gauge("weir_start_time_seconds", "When this node started, in Unix seconds.");
        started.set(SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |time| time.as_secs() as i64));
        Metrics {
            ready: it.gauge("weir_ready", "1 while clients are welcome, 0 while starting or draining."),

            connections: it.gauges("weir_connections", "Connections now, by what they are used for."),
            connections_accepted: it.counters("weir_connections_accepted_total", "Connections begun."),
            connections_closed: it.rare_pairs(
                "weir_connections_closed_total",
                "Connections ended; the reason is an error code, peer (the client left), done (as agreed) or error.",
                ["transport", "reason"],
            ),
            connections_refused: it.counter(
                "weir_connections_refused_total",
                "Connections turned away because limits.connections was reached.",
            ),
            requests: it.counters("weir_http_requests_total", "HTTP requests answered, by class of status."),

            subscriptions: it.gauges("weir_subscriptions", "Channels being read now, one per reader and channel."),
            channels: it.gauge("weir_channels", "Channels that hold events or have a reader on this node."),
            published: it.counters("weir_events_published_total", "Events placed."),
            published_bytes: it.counters("weir_events_published_bytes_total", "Encoded bytes of the events placed."),
            duplicates: it
                .counter("weir_publish_duplicates_total", "Publishes that repeated a key and were not placed."),
            publish_failures: it.rare("weir_publish_failures_total", "Publishes refused, by error code.", "code"),
            delivered: it.counters("weir_events_delivered_total", "Events handed to readers."),
            delivered_bytes: it.counters("weir_events_delivered_bytes_total", "Bytes of the events handed to readers."),
            gaps: it.rare("weir_gaps_total", "Gaps announced to readers: history they asked for is gone.", "reason"),
            bus_memory_bytes: it.gauge("weir_bus_memory_bytes", "Bytes of all events held by the memory backend."),

            consumer_repeats: it.counter(
                "weir_consumer_repeats_total",
                "Pages handed to a consumer for the third time or more within a second: it does not commit.",
            ),

            calls: it.counters("weir_rpc_calls_total", "Calls ended."),
            call_seconds: it.histograms(
                "weir_rpc_duration_seconds",
                "How long calls took, from request to answer; a sample when there are many.",
            ),
            calls_in_flight: it.gauge("weir_rpc_in_flight", "Calls awaiting their answer."),
            calls_late: it.counter("weir_rpc_late_total", "Replies that came after the deadline of their call."),
            services: it.gauge("weir_rpc_services", "Services that have a provider on this node."),
            providers: it.gauge("weir_rpc_providers", "Providers on this node, one per connection and service."),

            mail_sent: it.counter("weir_node_mail_sent_total", "Messages about calls sent to other nodes."),
            mail_received: it.counter("weir_node_mail_received_total", "Messages about calls from other nodes."),
            links: it.gauge("weir_node_links", "Other nodes that can be reached."),
            links_lost: it.counter(
                "weir_node_links_lost_total",
                "Links to other nodes that broke, by lost mail or because the node went: open calls over them failed.",
            ),

            redis_reconnects: it
                .counters("weir_redis_reconnects_total", "Connections to Redis that broke and were made again."),
            redis_append_seconds: it
                .histogram("weir_redis_append_seconds", "From a publish to the answer of Redis that it is placed."),
            redis_lag_seconds: it.histogram(
                "weir_redis_lag_seconds",
                "From the time of an event, by the clock of Redis, to when this node heard of it.",
            ),
            redis_repairs: it.counter(
                "weir_redis_repairs_total",
                "Looks at a log that found events which had not been heard of when they were published.",
            ),
            redis_unreadable: it
                .counter("weir_redis_unreadable_total", "Messages from Redis that this weir could not read."),
            redis_echoing: it
                .gauge("weir_redis_echoing", "Redis servers through which a probe of this node comes back."),

            presence_leases: it.gauge("weir_presence_leases", "Subscriptions on this node that hold a member present."),
            presence_members: it.gauge("weir_presence_members", "Members of all channels, on all nodes, as announced."),
            presence_announced: it
                .counter("weir_presence_announced_total", "Joins and leaves that this node has announced."),

            ws_ignored: it.counter("weir_ws_ignored_total", "Answers on WebSockets that nobody waited for."),
            ws_unreadable: it.counter("weir_ws_unreadable_total", "Messages on WebSockets that were not JSON."),

            repeats: Repeats::default(),
            registry: it,
        }
    }

    /// The text that Prometheus scrapes (format 0.0.4), this process's own figures included.
    pub fn render(&self) -> String {
        let mut out = self.registry.render();
        process(&mut out);
        out
    }

    /// Adds new samples to the buckets of histograms, which hold them until then; call it every second.
    pub fn upkeep(&self) {
        self.registry.upkeep();
    }

    /// The value of a series, as the rendered text names it; 0 if there is none. For tests.
    pub fn value(&self, series: &str) -> f64 {
        let text = self.render();
        let line = text.lines().filter_map(|line| line.strip_prefix(series)?.strip_prefix(' ')).next();
        line.and_then(|value| value.parse().ok()).unwrap_or_default()
    }

    /// A connection that counts as open until what is returned is dropped.
    pub fn connected(self: &Arc<Self>, transport: Transport) -> Connected {
        self.connections_accepted[transport].add(1);
        self.connections[transport].add(1);
        Connected { metrics: self.clone(), transport, end: End::Error }
    }

    pub fn publish_failed(&self, code: Code) {
        self.publish_failures.of([code.as_str()]).add(1);
    }

    /// `reason` as it is on the wire.
    pub fn gap(&self, reason: &'static str) {
        self.gaps.of([reason]).add(1);
    }

    /// A page with events was handed to a consumer; `page` is the same for the same page of the same consumer.
    pub fn page_of_consumer(&self, page: impl Hash) {
        if self.repeats.served(page) {
            self.consumer_repeats.add(1);
        }
    }

    /// `took` may be left out: with very many calls the time of a sample is enough.
    pub fn call_ended(&self, outcome: Outcome, took: Option<Duration>) {
        self.calls[outcome].add(1);
        if let Some(took) = took {
            self.call_seconds[outcome].record(took);
        }
    }
}

impl Default for Metrics {
    fn default() -> Self {
        Metrics::new()
    }
}

/// One connection in the gauges. Dropped, it counts as closed for the reason last given, or else `error`.
///
/// Small: an idle stream is a few hundred bytes in all.
#[derive(Debug)]
#[must_use = "dropped, the connection counts as closed"]
pub struct Connected {
    metrics: Arc<Metrics>,
    transport: Transport,
    end: End,
}

#[derive(Clone, Copy, Debug)]
enum End {
    Error,
    Peer,
    Done,
    Because(Code),
}

impl Connected {
    /// The client left.
    pub fn peer(&mut self) {
        self.end = End::Peer;
    }

    /// It ended as agreed: an answer complete, a connection that became something else.
    pub fn done(&mut self) {
        self.end = End::Done;
    }

    /// weir ended it.
    pub fn because(&mut self, code: Code) {
        self.end = End::Because(code);
    }
}

impl Drop for Connected {
    fn drop(&mut self) {
        let reason = match self.end {
            End::Error => "error",
            End::Peer => "peer",
            End::Done => "done",
            End::Because(code) => code.as_str(),
        };
        self.metrics.connections[self.transport].add(-1);
        self.metrics.connections_closed.of([self.transport.value(), reason]).add(1);
    }
}

impl From<Code> for Outcome {
    fn from(code: Code) -> Self {
        match code {
            Code::ServiceError => Outcome::ServiceError,
            Code::NoProvider => Outcome::NoProvider,
            Code::Busy => Outcome::Busy,
            Code::Timeout => Outcome::Timeout,
            Code::ProviderGone => Outcome::ProviderGone,
            Code::BadReply => Outcome::BadReply,
            Code::Cancelled => Outcome::Cancelled,
            _ => Outcome::Refused,
        }
    }
}

impl Status {
    pub fn of(status: u16) -> Self {
        match status {
            ..200 => Status::Informational,
            200..300 => Status::Success,
            300..400 => Status::Redirection,
            400..500 => Status::Client,
            500.. => Status::Server,
        }
    }
}

/// Memory, file descriptors and CPU, as every exporter names them. Where there is no /proc they are left out.
fn process(out: &mut String) {
    use std::fmt::Write as _;
    // Pages of 4 KiB and 100 ticks a second hold wherever weir is built for.
    const PAGE: u64 = 4096;
    const TICKS: f64 = 100.0;
    let nth = |text: &str, n: usize| text.split_ascii_whitespace().nth(n).and_then(|field| field.parse::<u64>().ok());
    let mut gauge = |name: &str, kind: &str, help: &str, value: f64| {
        let _ = writeln!(out, "# HELP {name} {help}\n# TYPE {name} {kind}\n{name} {value}");
    };
    if let Some(pages) = std::fs::read_to_string("/proc/self/statm").ok().and_then(|text| nth(&text, 1)) {
        gauge("process_resident_memory_bytes", "gauge", "Resident memory.", (pages * PAGE) as f64);
    }
    // The second field is the name in brackets and may hold spaces: count from behind it.
    let stat = std::fs::read_to_string("/proc/self/stat").unwrap_or_default();
    let fields = stat.rsplit_once(')').map_or("", |(_, fields)| fields);
    if let (Some(user), Some(system)) = (nth(fields, 11), nth(fields, 12)) {
        gauge("process_cpu_seconds_total", "counter", "CPU time, user and system.", (user + system) as f64 / TICKS);
    }
    if let Ok(open) = std::fs::read_dir("/proc/self/fd") {
        gauge("process_open_fds", "gauge", "Open file descriptors.", open.count() as f64);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_prometheus_reads() {
        let metrics = Metrics::new();
        metrics.delivered[Transport::Sse].add(7);
        metrics.gap("trimmed");
        metrics.publish_failed(Code::TooLarge);
        metrics.call_ended(Outcome::Ok, Some(Duration::from_micros(70)));
        metrics.call_ended(Outcome::Ok, Some(Duration::from_micros(50)));
        metrics.call_ended(Outcome::Ok, Some(Duration::from_secs(600)));
        let text = metrics.render();
        for line in [
            "# TYPE weir_events_delivered_total counter",
            "weir_events_delivered_total{transport=\"sse\"} 7",
            "weir_events_delivered_total{transport=\"ws\"} 0",
            "weir_gaps_total{reason=\"trimmed\"} 1",
            "weir_publish_failures_total{code=\"too_large\"} 1",
            "weir_rpc_duration_seconds_bucket{result=\"ok\",le=\"0.00005\"} 1",
            "weir_rpc_duration_seconds_bucket{result=\"ok\",le=\"0.0001\"} 2",
            "weir_rpc_duration_seconds_bucket{result=\"ok\",le=\"+Inf\"} 3",
            "weir_rpc_duration_seconds_sum{result=\"ok\"} 600.00012",
            "weir_rpc_duration_seconds_count{result=\"ok\"} 3",
            concat!("weir_build_info{version=\"", env!("CARGO_PKG_VERSION"), "\"} 1"),
        ] {
            assert!(text.lines().any(|other| other == line), "no {line} in\n{text}");
        }
    }

    #[test]
    fn names_say_what_they_measure() {
        let text = Metrics::new().render();
        for line in text.lines().filter_map(|line| line.strip_prefix("# TYPE ")) {
            let (name, kind) = line.split_once(' ').unwrap();
            assert_eq!(name.ends_with("_total"), kind == "counter", "{name}");
            assert_eq!(text.matches(&format!("# TYPE {name} ")).count(), 1, "{name} twice");
            assert!(name.starts_with("weir_") || name.starts_with("process_"), "{name}");
        }
    }

    #[test]
    fn a_connection_is_given_back() {
        let metrics = Arc::new(Metrics::new());
        let mut one = metrics.connected(Transport::Ws);
        let other = metrics.connected(Transport::Ws);
        assert_eq!(metrics.value("weir_connections{transport=\"ws\"}") as u64, 2);
        one.because(Code::Slow);
        drop((one, other));
        assert_eq!(metrics.value("weir_connections{transport=\"ws\"}") as u64, 0);
        assert_eq!(metrics.value("weir_connections_accepted_total{transport=\"ws\"}") as u64, 2);
        assert_eq!(metrics.value("weir_connections_closed_total{transport=\"ws\",reason=\"slow\"}") as u64, 1);
        assert_eq!(metrics.value("weir_connections_closed_total{transport=\"ws\",reason=\"error\"}") as u64, 1);
    }
}
