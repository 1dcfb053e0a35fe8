//! All metrics of weir, with names and help texts. Counters end in `_total`, times in `_seconds`, sizes in `_bytes`. Labels
//! have closed sets of values: never the name of a channel, service, consumer or subject.
//!
//! Each `App` has its own [`Metrics`], so that several in one test process do not add up. Parts keep clones of the handles
//! that they use. Updating one is an atomic operation; transports accumulate what happens per delivery.

mod histogram;
mod registry;
mod repeat_detector;

use std::{
    hash::Hash,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering::Relaxed},
    },
    time::{SystemTime, UNIX_EPOCH},
};

pub(crate) use self::{
    histogram::Histogram,
    registry::{Counter, Gauge, MetricLabel},
};
use self::{
    registry::{MetricRegistry, PerLabel, RareCounter},
    repeat_detector::RepeatDetector,
};
use crate::error::Code;

macro_rules! label {
    ($(#[doc = $about:literal])+ $vis:vis $label:ident as $name:literal { $($(#[doc = $doc:literal])* $value:ident = $text:literal,)+ }) => {
        $(#[doc = $about])+
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        $vis enum $label { $($(#[doc = $doc])* $value,)+ }

        impl MetricLabel for $label {
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
    /// The transport of a connection, an event or a request.
    pub Transport as "transport" {
        /// Plain requests. A request that becomes a stream or a socket counts as that.
        Http = "http",
        Sse = "sse",
        Ws = "ws",
        /// Reads over HTTP, with or without waiting.
        Poll = "poll",
        /// Socket.IO clients, over any transport of Engine.IO.
        SocketIo = "socketio",
    }
}

label! {
    /// The result of a call.
    pub(crate) CallOutcome as "result" {
        Ok = "ok",
        ServiceError = "service_error",
        NoProvider = "no_provider",
        Busy = "busy",
        Timeout = "timeout",
        ProviderGone = "provider_gone",
        BadReply = "bad_reply",
        Cancelled = "cancelled",
        /// Rejected before it reached a provider, by a limit, a permission or a drain.
        Refused = "refused",
    }
}

label! {
    /// The class of an HTTP status code.
    pub(crate) StatusClass as "status" {
        Informational = "1xx",
        Success = "2xx",
        Redirection = "3xx",
        Client = "4xx",
        Server = "5xx",
    }
}

label! {
    /// What an HTTP request is for, by its path and method.
    pub(crate) RouteClass as "route" {
        /// `POST /v1/events`.
        Publish = "publish",
        /// `GET /v1/events`. A long-poll includes the time that it waits.
        Read = "read",
        /// Trims and deletes, and everything else about channels and consumers.
        Channels = "channels",
        Consumers = "consumers",
        Presence = "presence",
        Connections = "connections",
        Services = "services",
        /// `POST /v1/services/…`: a call with its reply.
        Call = "call",
        /// `POST /v1/rpc`.
        Rpc = "rpc",
        /// The response head of an SSE stream or a WebSocket.
        Stream = "stream",
        /// Health checks, metrics and documents.
        Operations = "operations",
        /// Paths and listeners of adapters.
        Adapter = "adapter",
        Other = "other",
    }
}

label! {
    /// The purpose of a connection to Redis.
    pub RedisConnectionKind as "lane" {
        Commands = "commands",
        Events = "events",
        Mail = "mail",
        /// Waits for the acknowledgement of replicas.
        Acks = "acks",
    }
}

/// Defines [`Metrics`]: a metric is its help text, the field of its handle, and its registration by name and labels.
macro_rules! metrics {
    ($($(#[doc = $help:literal])+ $field:ident: $type:ty = $register:ident($name:literal $(, $labels:expr)?);)+) => {
        /// Handles to every metric.
        pub struct Metrics {
            $($(#[doc = $help])+ pub(crate) $field: $type,)+
            repeats: RepeatDetector,
            registry: MetricRegistry,
            /// The metrics of Redis, and whether this node uses it.
            redis_registry: MetricRegistry,
            uses_redis: AtomicBool,
        }

        impl Metrics {
            pub fn new() -> Self {
                let (registry, redis_registry) = (MetricRegistry::new(), MetricRegistry::new());
                let registry_of = |name: &str| if name.starts_with("weir_redis_") { &redis_registry } else { &registry };
                registry.info("weir_build_info", "Always 1. The label is the version.", "version", env!("CARGO_PKG_VERSION"));
                let started =
                    registry.gauge("weir_start_time_seconds", "Unix time at which this node started, in seconds.");
                started.set(SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |time| time.as_secs() as i64));
                let metrics = Metrics {
                    // The lines of a doc comment begin with a space.
                    $($field: registry_of($name).$register($name, concat!($($help),+).trim_start() $(, $labels)?),)+
                    repeats: RepeatDetector::default(),
                    uses_redis: AtomicBool::new(false),
                    registry,
                    redis_registry,
                };
                metrics.begin_at_zero();
                metrics
            }
        }
    };
}

metrics! {
    /// 1 while this node accepts clients, 0 while it starts or drains.
    ready: Gauge = gauge("weir_ready");

    /// Open connections, by transport.
    connections: PerLabel<Transport, Gauge> = gauges("weir_connections");
    /// Connections accepted.
    connections_accepted: PerLabel<Transport, Counter> = counters("weir_connections_accepted_total");
    /// Connections closed. The reason is an error code, peer (closed by the client), done (completed) or error.
    connections_closed: RareCounter<2> = rare("weir_connections_closed_total", ["transport", "reason"]);
    /// Connections rejected because of limits.connections.
    connections_refused: Counter = counter("weir_connections_refused_total");
    /// HTTP requests answered, by class of the status code.
    requests: PerLabel<StatusClass, Counter> = counters("weir_http_requests_total");
    /// Time from the head of an HTTP request to that of its response.
    request_seconds: PerLabel<RouteClass, Histogram> = histograms("weir_http_request_duration_seconds");

    /// Active subscriptions, one per reader and channel.
    subscriptions: PerLabel<Transport, Gauge> = gauges("weir_subscriptions");
    /// Channels with events or a reader on this node.
    channels: Gauge = gauge("weir_channels");
    /// Events appended to a log.
    published: PerLabel<Transport, Counter> = counters("weir_events_published_total");
    /// Encoded bytes of the events appended to a log.
    published_bytes: PerLabel<Transport, Counter> = counters("weir_events_published_bytes_total");
    /// Publishes not appended because their idempotency key was a repetition.
    duplicates: Counter = counter("weir_publish_duplicates_total");
    /// Publishes rejected, by error code.
    publish_failures: RareCounter<1> = rare("weir_publish_failures_total", ["code"]);
    /// Events delivered to readers.
    delivered: PerLabel<Transport, Counter> = counters("weir_events_delivered_total");
    /// Bytes of the events delivered to readers.
    delivered_bytes: PerLabel<Transport, Counter> = counters("weir_events_delivered_bytes_total");
    /// Gaps reported to readers: requested history is no longer available.
    gaps: RareCounter<1> = rare("weir_gaps_total", ["reason"]);
    /// Memory of all events, idempotency keys and channels on this node.
    bus_memory_bytes: Gauge = gauge("weir_bus_memory_bytes");
    /// The upper bound of weir_bus_memory_bytes in the memory backend (bus.memory.budget).
    bus_memory_limit: Gauge = gauge("weir_bus_memory_limit_bytes");
    /// Events that the memory backend removed early, because the budget was used up.
    bus_evictions: Counter = counter("weir_bus_evicted_events_total");

    /// Pages that a consumer read for at least the third time within a second, because it does not commit.
    consumer_repeats: Counter = counter("weir_consumer_repeats_total");

    /// Consumers, up to the 1,000 that are examined.
    consumers: Gauge = gauge("weir_consumers");
    /// Unread events of the consumer and channel with the most of them, of up to 1,000.
    consumer_lag: Gauge = gauge("weir_consumer_lag_events");
    /// Age of the oldest event that one of these consumers has not read.
    consumer_lag_seconds: Gauge = gauge("weir_consumer_lag_seconds");

    /// Calls completed.
    calls: PerLabel<CallOutcome, Counter> = counters("weir_rpc_calls_total");
    /// Duration of calls, from request to reply. Every call counts; rejected ones as zero.
    call_seconds: PerLabel<CallOutcome, Histogram> = histograms("weir_rpc_duration_seconds");
    /// Calls in flight.
    calls_in_flight: Gauge = gauge("weir_rpc_in_flight");
    /// Replies received after the deadline of their call.
    calls_late: Counter = counter("weir_rpc_late_total");
    /// Services with a provider on this node.
    services: Gauge = gauge("weir_rpc_services");
    /// Providers on this node, one per connection and service.
    providers: Gauge = gauge("weir_rpc_providers");

    /// Messages about calls sent to other nodes.
    mail_sent: Counter = counter("weir_node_mail_sent_total");
    /// Messages about calls received from other nodes.
    mail_received: Counter = counter("weir_node_mail_received_total");
    /// Reachable other nodes.
    links: Gauge = gauge("weir_node_links");
    /// Links to other nodes that broke, because a message was lost or the node left. Calls in flight over them
    /// failed.
    links_lost: Counter = counter("weir_node_links_lost_total");

    /// Connections to Redis that were re-established.
    redis_reconnects: PerLabel<RedisConnectionKind, Counter> = counters("weir_redis_reconnects_total");
    /// Time from a publish to its confirmation by Redis.
    redis_append_seconds: Histogram = histogram("weir_redis_append_seconds");
    /// Time from an event, by the clock of Redis, to its arrival on this node.
    redis_lag_seconds: Histogram = histogram("weir_redis_lag_seconds");
    /// Log reads that found events of which no notification had arrived.
    redis_repairs: Counter = counter("weir_redis_repairs_total");
    /// Messages from Redis that this version cannot read.
    redis_unreadable: Counter = counter("weir_redis_unreadable_total");
    /// Redis servers through which the probes of this node return.
    redis_echoing: Gauge = gauge("weir_redis_echoing");

    /// Subscriptions on this node that hold a presence member.
    presence_leases: Gauge = gauge("weir_presence_leases");
    /// Announced presence members of all channels, on all nodes.
    presence_members: Gauge = gauge("weir_presence_members");
    /// Joins and leaves announced by this node.
    presence_announced: Counter = counter("weir_presence_announced_total");

    /// Replies on WebSockets that match no call.
    ws_ignored: Counter = counter("weir_ws_ignored_total");
    /// Messages on WebSockets that are not valid JSON.
    ws_unreadable: Counter = counter("weir_ws_unreadable_total");
}

/// The errors of publishes, and why connections end, as far as these are ordinary.
const PUBLISH_ERRORS: [Code; 10] = [
    Code::BusUnavailable,
    Code::Draining,
    Code::Forbidden,
    Code::InvalidParams,
    Code::InvalidRequest,
    Code::KeyReused,
    Code::Overloaded,
    Code::ParseError,
    Code::TooLarge,
    Code::Unconfirmed,
];
const CLOSE_REASONS: [&str; 7] = ["done", "peer", "error", "draining", "slow", "dead_peer", "kicked"];

impl Metrics {
    /// The Prometheus text format 0.0.4, with the standard `process_` metrics.
    pub fn render(&self) -> String {
        // Every call is in the histogram: a counter of its own would cost another atomic operation per call.
        for (calls, seconds) in self.calls.iter().zip(self.call_seconds.iter()) {
            calls.set(seconds.count());
        }
        let mut out = self.registry.render();
        if self.uses_redis.load(Relaxed) {
            out += &self.redis_registry.render();
        }
        render_process(&mut out);
        out
    }

    /// Renders the metrics of Redis from now on.
    pub(crate) fn use_redis(&self) {
        self.uses_redis.store(true, Relaxed);
    }

    /// Creates the series of the label values that are known, so that a rate is known from their first event on.
    fn begin_at_zero(&self) {
        for reason in ["trimmed", "budget", "reset", "failover", "deleted", "bad_position"] {
            self.gaps.of([reason]).add(0);
        }
        for code in PUBLISH_ERRORS {
            self.publish_failures.of([code.as_str()]).add(0);
        }
        for transport in Transport::ALL {
            for reason in CLOSE_REASONS {
                self.connections_closed.of([transport.value(), reason]).add(0);
            }
        }
    }

    /// The value of a series as it is rendered, or 0 if there is none. For tests.
    pub fn value(&self, series: &str) -> f64 {
        let text = self.render();
        let line = text.lines().filter_map(|line| line.strip_prefix(series)?.strip_prefix(' ')).next();
        line.and_then(|value| value.parse().ok()).unwrap_or_default()
    }

    /// Counts a connection as open until the returned guard is dropped.
    pub(crate) fn connected(self: &Arc<Self>, transport: Transport) -> OpenConnection {
        self.connections_accepted[transport].add(1);
        self.connections[transport].add(1);
        OpenConnection { metrics: self.clone(), transport, reason: CloseReason::Error }
    }

    /// A publish has placed an event of `size` bytes, or has repeated an earlier one.
    pub(crate) fn event_published(&self, transport: Transport, is_repeated: bool, size: usize) {
        if is_repeated {
            self.duplicates.add(1);
        } else {
            self.published[transport].add(1);
            self.published_bytes[transport].add(size as u64);
        }
    }

    /// `bytes`: framing included.
    pub(crate) fn events_delivered(&self, transport: Transport, events: u64, bytes: u64) {
        self.delivered[transport].add(events);
        self.delivered_bytes[transport].add(bytes);
    }

    pub(crate) fn publish_failed(&self, code: Code) {
        self.publish_failures.of([code.as_str()]).add(1);
    }

    /// `reason`: as in the protocol.
    pub(crate) fn gap(&self, reason: &'static str) {
        self.gaps.of([reason]).add(1);
    }

    /// A consumer has read a page with events. `page` identifies the consumer and the page.
    pub(crate) fn consumer_page_read(&self, page: impl Hash) {
        if self.repeats.is_repeated(page) {
            self.consumer_repeats.add(1);
        }
    }

    /// Counts a call that took this time.
    #[inline]
    pub(crate) fn call_ended(&self, outcome: CallOutcome, micros: u64) {
        self.call_seconds[outcome].record_micros(micros);
    }
}

impl Default for Metrics {
    fn default() -> Self {
        Metrics::new()
    }
}

/// Counts one open connection. Dropping it counts the connection as closed, for the reason last set or else `error`.
///
/// Kept small: an idle stream takes a few hundred bytes in all.
#[must_use = "dropping the guard counts the connection as closed"]
pub(crate) struct OpenConnection {
    metrics: Arc<Metrics>,
    transport: Transport,
    reason: CloseReason,
}

#[derive(Clone, Copy, Debug)]
enum CloseReason {
    Error,
    Peer,
    Done,
    Code(Code),
}

impl OpenConnection {
    /// The client closed the connection.
    pub(crate) fn closed_by_peer(&mut self) {
        self.reason = CloseReason::Peer;
    }

    /// The response is complete, or the connection has become a stream or a socket.
    pub(crate) fn completed(&mut self) {
        self.reason = CloseReason::Done;
    }

    /// weir closes the connection.
    pub(crate) fn closed_with(&mut self, code: Code) {
        self.reason = CloseReason::Code(code);
    }
}

impl Drop for OpenConnection {
    fn drop(&mut self) {
        let reason = match self.reason {
            CloseReason::Error => "error",
            CloseReason::Peer => "peer",
            CloseReason::Done => "done",
            CloseReason::Code(code) => code.as_str(),
        };
        self.metrics.connections[self.transport].add(-1);
        self.metrics.connections_closed.of([self.transport.value(), reason]).add(1);
    }
}

impl From<Code> for CallOutcome {
    fn from(code: Code) -> Self {
        match code {
            Code::ServiceError => CallOutcome::ServiceError,
            Code::NoProvider => CallOutcome::NoProvider,
            Code::Busy => CallOutcome::Busy,
            Code::Timeout => CallOutcome::Timeout,
            Code::ProviderGone => CallOutcome::ProviderGone,
            Code::BadReply => CallOutcome::BadReply,
            Code::Cancelled => CallOutcome::Cancelled,
            _ => CallOutcome::Refused,
        }
    }
}

impl StatusClass {
    pub(crate) fn new(status: u16) -> Self {
        match status {
            ..200 => StatusClass::Informational,
            200..300 => StatusClass::Success,
            300..400 => StatusClass::Redirection,
            400..500 => StatusClass::Client,
            500.. => StatusClass::Server,
        }
    }
}

/// Memory, file descriptors and CPU time under the standard names. Omitted on systems without `/proc`.
fn render_process(out: &mut String) {
    use std::fmt::Write as _;
    // 4 KiB pages and 100 ticks a second on all platforms that weir supports.
    const PAGE: u64 = 4096;
    const TICKS: f64 = 100.0;
    let nth = |text: &str, n: usize| text.split_ascii_whitespace().nth(n).and_then(|field| field.parse::<u64>().ok());
    let mut gauge = |name: &str, kind: &str, help: &str, value: f64| {
        let _ = writeln!(out, "# HELP {name} {help}\n# TYPE {name} {kind}\n{name} {value}");
    };
    if let Some(pages) = std::fs::read_to_string("/proc/self/statm").ok().and_then(|text| nth(&text, 1)) {
        gauge("process_resident_memory_bytes", "gauge", "Resident memory.", (pages * PAGE) as f64);
    }
    // The second field is the name in parentheses, which may contain spaces: count from behind it.
    let stat = std::fs::read_to_string("/proc/self/stat").unwrap_or_default();
    let fields = stat.rsplit_once(')').map_or("", |(_, fields)| fields);
    if let (Some(user), Some(system)) = (nth(fields, 11), nth(fields, 12)) {
        gauge("process_cpu_seconds_total", "counter", "CPU time, user and system.", (user + system) as f64 / TICKS);
    }
    if let Ok(open) = std::fs::read_dir("/proc/self/fd") {
        gauge("process_open_fds", "gauge", "Open file descriptors.", open.count() as f64);
    }
    if let Some(files) = rustix::process::getrlimit(rustix::process::Resource::Nofile).current {
        gauge("process_max_fds", "gauge", "Maximum number of open file descriptors.", files as f64);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_rendered_text() {
        let metrics = Metrics::new();
        metrics.delivered[Transport::Sse].add(7);
        metrics.gap("trimmed");
        metrics.publish_failed(Code::TooLarge);
        metrics.call_ended(CallOutcome::Ok, 70);
        metrics.call_ended(CallOutcome::Ok, 50);
        metrics.call_ended(CallOutcome::Ok, 600_000_000);
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
            "weir_rpc_calls_total{result=\"ok\"} 3",
            "weir_gaps_total{reason=\"failover\"} 0",
            "weir_publish_failures_total{code=\"overloaded\"} 0",
            "weir_connections_closed_total{transport=\"ws\",reason=\"slow\"} 0",
            concat!("weir_build_info{version=\"", env!("CARGO_PKG_VERSION"), "\"} 1"),
        ] {
            assert!(text.lines().any(|other| other == line), "no {line} in\n{text}");
        }
    }

    #[test]
    fn names_follow_the_conventions() {
        let metrics = Metrics::new();
        assert!(!metrics.render().contains("weir_redis_"));
        metrics.use_redis();
        let text = metrics.render();
        assert!(text.contains("weir_redis_append_seconds_count 0"));
        for line in text.lines().filter_map(|line| line.strip_prefix("# TYPE ")) {
            let (name, kind) = line.split_once(' ').unwrap();
            assert_eq!(name.ends_with("_total"), kind == "counter", "{name}");
            assert_eq!(text.matches(&format!("# TYPE {name} ")).count(), 1, "{name} twice");
            assert!(name.starts_with("weir_") || name.starts_with("process_"), "{name}");
        }
    }

    #[test]
    fn dropping_the_guard_closes_the_connection() {
        let metrics = Arc::new(Metrics::new());
        let mut one = metrics.connected(Transport::Ws);
        let other = metrics.connected(Transport::Ws);
        assert_eq!(metrics.value("weir_connections{transport=\"ws\"}") as u64, 2);
        one.closed_with(Code::Slow);
        drop((one, other));
        assert_eq!(metrics.value("weir_connections{transport=\"ws\"}") as u64, 0);
        assert_eq!(metrics.value("weir_connections_accepted_total{transport=\"ws\"}") as u64, 2);
        assert_eq!(metrics.value("weir_connections_closed_total{transport=\"ws\",reason=\"slow\"}") as u64, 1);
        assert_eq!(metrics.value("weir_connections_closed_total{transport=\"ws\",reason=\"error\"}") as u64, 1);
    }
}
