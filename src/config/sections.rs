//! [`Config`]: all sections that are not an adapter's.

use std::{net::SocketAddr, time::Duration};

use super::{
    adapter::{AdapterConfig, CompatSection},
    auth::AuthSection,
    channel_rule::ChannelRule,
    section::{KIB, MIB, seconds, section},
    value::{Ack, Backend, Level, LogFormat, Secret},
};

/// Upper bound of `limits.event`. The chunks of a stream have a six-digit hexadecimal size (less than 16 MiB), and
/// `format=data` encodes the two bytes of `\n` as seven.
const MAX_EVENT: usize = 4 * MIB;

section! {
    /// All settings of weir.
    Config {
        server: ServerSection as Section = ServerSection::default(),
        admin: AdminSection as Section = AdminSection::default(),
        bus: BusSection as Section = BusSection::default(),
        /// Retention rules. The first rule whose `match` pattern fits the channel name applies (`*` matches any run of
        /// characters; no other character is special). A configured rule replaces this list. Values that a rule omits,
        /// and channels that match no rule, have the defaults shown here.
        channels: Vec<ChannelRule> as Tables = vec![ChannelRule::default()],
        consumers: ConsumersSection as Section = ConsumersSection::default(),
        sse: SseSection as Section = SseSection::default(),
        ws: WsSection as Section = WsSection::default(),
        rpc: RpcSection as Section = RpcSection::default(),
        limits: LimitsSection as Section = LimitsSection::default(),
        auth: AuthSection as Section = AuthSection::default(),
        cors: CorsSection as Section = CorsSection::default(),
        compat: CompatSection as Section = CompatSection::default(),
        drain: DrainSection as Section = DrainSection::default(),
        log: LogSection as Section = LogSection::default(),
    }
}

section! {
    /// The listeners that clients connect to.
    ServerSection {
        /// Addresses with ports: a string (several separated by commas) or a list. Port 0 selects a free port.
        listen: Vec<SocketAddr> as Addresses = vec![SocketAddr::from(([127, 0, 0, 1], 8000))],
        /// Host names by which clients reach a listener on a loopback address, besides those of this machine: for a
        /// proxy that forwards the `Host` of its clients, such as `weir.example` (`*` matches any run of characters).
        /// Listeners on other addresses accept every name.
        hosts: Vec<String> as Texts = Vec::new(),
    }
}

section! {
    /// A separate listener for administration.
    AdminSection {
        /// Address that serves metrics and administration instead of the main listeners. Empty: the main listeners
        /// serve them.
        listen: Option<SocketAddr> as Address = None,
    }
}

section! {
    /// Storage of events.
    BusSection {
        /// `memory` stores events in this process until it exits. `redis` stores them in Redis, shared by all nodes
        /// that use it.
        backend: Backend as Backend = Backend::Memory,
        /// How long an idempotency key is remembered, at most `1d`. A publish repeated with the same key within this time
        /// is not stored again. In the memory backend all keys use at most half of `bus.memory.budget`; beyond it,
        /// publishes with a new key are rejected.
        idempotency_window: Duration as Time = seconds(300),
        memory: MemorySection as Section = MemorySection::default(),
        redis: RedisSection as Section = RedisSection::default(),
    }
}

section! {
    /// The Redis backend. It requires Redis 6.2 or later (Redis Cluster 7.0 or later) or Valkey.
    RedisSection {
        /// `redis://[user:password@]host:6379[/database]`, `redis+sentinel://host:26379,host/master` or
        /// `redis-cluster://host:6379,host`. The schemes `rediss`, `rediss+sentinel` and `rediss-cluster` use TLS.
        url: Secret as Secret = Secret::default(),
        /// Prefix of every key and every pub/sub channel. All nodes of one bus use the same prefix.
        prefix: String as Text = "weir:".to_owned(),
        /// When a publish is acknowledged: `stored` after the master has applied it, `replicated` after at least one
        /// replica has it too.
        ack: Ack as Ack = Ack::Stored,
    }
}

section! {
    /// The memory backend.
    MemorySection {
        /// Maximum memory of all channels together. Beyond it the oldest events are trimmed, and readers get a gap.
        budget: usize as Size = 256 * MIB,
    }
}

section! {
    /// Consumers: named readers whose cursors weir stores.
    ConsumersSection {
        /// A consumer that is unused for this long is deleted.
        idle: Duration as Time = seconds(30 * 24 * 60 * 60),
    }
}

section! {
    /// Server-sent event (SSE) streams.
    SseSection {
        /// Interval of heartbeats on an idle stream, randomized by ±25 % so that the streams are not in step.
        heartbeat: Duration as Time = seconds(20),
    }
}

section! {
    /// WebSocket connections.
    WsSection {
        /// Interval of Ping frames, randomized by ±20 %. A peer that sends nothing until the next Ping is disconnected.
        ping: Duration as Time = seconds(25),
    }
}

section! {
    /// Remote procedure calls to services.
    RpcSection {
        /// Default timeout of a call, including the wait for a provider.
        timeout: Duration as Time = seconds(30),
        /// Maximum timeout that a call may request.
        max_timeout: Duration as Time = seconds(600),
        /// How long a call waits for a provider if the service had one within the last minute.
        wait_for_provider: Duration as Pause = seconds(2),
        /// How long after its deadline a reply is still delivered to a caller that requested late replies.
        late_window: Duration as Pause = seconds(300),
    }
}

section! {
    /// Limits per client or in total. An error caused by a limit names its key.
    LimitsSection {
        /// Maximum number of connections of all kinds on all listeners. Lowered at start, with a warning, to what the limit of
        /// open files of the process allows.
        connections: usize as Count = 100_000,
        /// Maximum size of one encoded event.
        event: usize as Size = 1_000_000,
        /// Maximum number of events in one publish request.
        publish_events: usize as Count = 1_000,
        /// Maximum body size of one publish request.
        publish_bytes: usize as Size = 8_000_000,
        /// Maximum number of events in one page of a read.
        page_events: usize as Count = 1_000,
        /// Maximum size of one page of a read. A page always holds at least one event.
        page_bytes: usize as Size = 512 * KIB,
        /// Maximum time that a read may wait for events.
        wait: Duration as Time = seconds(55),
        /// Maximum number of channels of one stream or read.
        stream_channels: usize as Count = 100,
        /// Maximum number of channels that one WebSocket subscribes to.
        subscriptions: usize as Count = 10_000,
        /// Maximum size of one WebSocket message and of the body of one call over HTTP.
        frame: usize as Size = MIB + 64 * KIB,
        /// Maximum number of messages in one JSON-RPC batch.
        batch: usize as Count = 100,
        /// Maximum number of calls in flight per connection.
        calls: usize as Count = 1_000,
        /// Maximum number of calls that wait for a provider, over all connections.
        waiting: usize as Count = 10_000,
        /// Maximum size of all calls that wait for a provider.
        waiting_bytes: usize as Size = 64 * MIB,
        /// Maximum number of replies awaited past their deadline, over all connections.
        late: usize as Count = 10_000,
        /// Maximum number of services that have a provider, over all connections.
        services: usize as Count = 10_000,
        /// Maximum number of services that one connection provides.
        provides: usize as Count = 1_000,
        /// Maximum number of consumers.
        consumers: usize as Count = 100_000,
        /// Maximum number of channels of one consumer.
        consumer_channels: usize as Count = 1_000,
        /// Maximum number of subscriptions with presence on this node.
        presences: usize as Count = 100_000,
        /// Maximum size of the `info` of a presence member.
        present_info: usize as Size = KIB,
        /// Size of the write queue of one connection above which weir stops reading from its channels, from the connection and
        /// from the providers that answer it (backpressure).
        queued: usize as Size = 2 * MIB,
        /// A connection whose peer reads none of its queued bytes for this long is closed with the code `slow`.
        stalled: Duration as Time = seconds(30),
        /// Maximum number of unparsable messages per minute on one WebSocket. Beyond it the WebSocket is closed.
        unreadable: usize as Count = 20,
        /// Maximum size of the request line and headers of an HTTP request.
        header: usize as Size = 16 * KIB,
        /// Timeout for receiving the request line and headers of an HTTP request.
        header_time: Duration as Time = seconds(10),
        /// Timeout for receiving the body of an HTTP request.
        body_time: Duration as Time = seconds(30),
        /// How long an idle HTTP connection is kept open (keep-alive timeout).
        idle: Duration as Time = seconds(75),
        /// Maximum number of concurrent streams on one HTTP/2 connection.
        h2_streams: usize as Count = 200,
    }
}

section! {
    /// Cross-origin resource sharing (CORS).
    CorsSection {
        /// Allowed origins (`*` matches any run of characters) besides the same origin. A listener on a loopback address
        /// also allows `http://localhost:*` and `http://127.0.0.1:*`.
        origins: Vec<String> as Origins = Vec::new(),
    }
}

section! {
    /// Graceful shutdown on SIGTERM.
    DrainSection {
        /// Streams and WebSockets are closed one after the other over this time, so that their clients do not all
        /// reconnect at once.
        window: Duration as Pause = seconds(10),
        /// Connections and calls that are still open after this time are aborted.
        grace: Duration as Time = seconds(30),
    }
}

section! {
    /// Logging to standard error.
    LogSection {
        /// error, warn, info, debug, trace or off, or a filter by target such as "info,weir::rpc=debug".
        level: Level as Level = Level::info(),
        /// `text`, `json`, or `auto` (text on a terminal, JSON otherwise).
        format: LogFormat as Format = LogFormat::Auto,
    }
}

// === impl Config ===

impl Config {
    /// Whether all listeners have loopback addresses.
    pub fn is_loopback_only(&self) -> bool {
        self.server.listen.iter().chain(&self.admin.listen).all(|address| address.ip().is_loopback())
    }

    /// Errors that involve more than one setting, as pairs of key and reason.
    pub(super) fn contradictions(&self) -> Vec<(&'static str, String)> {
        let mut found = Vec::new();
        let mut must = |holds: bool, key, reason: &str| {
            if !holds {
                found.push((key, reason.to_owned()));
            }
        };
        let limits = &self.limits;
        must(self.rpc.timeout <= self.rpc.max_timeout, "rpc.timeout", "is longer than rpc.max_timeout");
        must(self.drain.window <= self.drain.grace, "drain.window", "is longer than drain.grace");
        must(limits.header >= 8 * KIB, "limits.header", "must be at least 8KiB");
        must(
            limits.event <= limits.frame,
            "limits.event",
            "is more than limits.frame, so no WebSocket could publish such an event",
        );
        must(
            limits.event <= MAX_EVENT,
            "limits.event",
            "must be at most 4MiB: its encoding on a stream can be several times as large, and a chunk is less than 16MiB",
        );
        must(limits.event <= limits.publish_bytes, "limits.event", "is more than limits.publish_bytes");
        must(limits.frame <= limits.queued, "limits.frame", "is more than limits.queued, so no reply would fit");
        must(
            self.bus.memory.budget >= limits.event,
            "bus.memory.budget",
            "is less than limits.event, so such an event would not fit",
        );
        // The metadata of a log, to whose life the keys belong, is kept for at least a day.
        must(self.bus.idempotency_window <= seconds(24 * 60 * 60), "bus.idempotency_window", "must be at most 1d");
        must(
            self.bus.backend != Backend::Redis || !self.bus.redis.url.is_empty(),
            "bus.redis.url",
            "is missing: set the URL of Redis (WEIR__BUS__REDIS__URL=redis://localhost:6379)",
        );
        must(
            self.bus.backend == Backend::Redis || self.bus.redis.url.is_empty(),
            "bus.redis.url",
            "is set, but bus.backend is memory, which does not use it (WEIR__BUS__BACKEND=redis)",
        );
        must(!self.bus.redis.prefix.contains(['{', '}']), "bus.redis.prefix", "must not contain braces");
        must(self.sse.heartbeat >= seconds(1), "sse.heartbeat", "must be at least 1s");
        must(self.ws.ping >= seconds(1), "ws.ping", "must be at least 1s");

        found.extend(self.compat.contradictions(self.auth.allow_anonymous));
        let main = self.server.listen.iter().map(|address| ("server.listen", *address));
        let admin = self.admin.listen.iter().map(|address| ("admin.listen", *address));
        let own = self.compat.enabled().flat_map(AdapterConfig::listeners);
        let listeners: Vec<_> = main.chain(admin).chain(own).collect();
        for (n, (key, address)) in listeners.iter().enumerate() {
            if address.port() != 0 && listeners[..n].iter().any(|(_, other)| other == address) {
                found.push((key, format!("{address} is listed twice")));
            }
            // The adapter controls the access to its own listeners.
            if key.starts_with("compat.") {
                continue;
            }
            if !address.ip().is_loopback() && !self.auth.allow_anonymous && !self.auth.is_on() {
                let reason = format!(
                    "{address} can be reached from other machines, and clients are not asked for credentials: add a key \
                     (weir key new ops --role admin), listen on 127.0.0.1:{}, or allow this with \
                     auth.allow_anonymous = true (WEIR__AUTH__ALLOW_ANONYMOUS=true)",
                    address.port()
                );
                found.push((key, reason));
            }
        }
        found
    }
}
