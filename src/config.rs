//! All settings with their defaults and descriptions, and the loading of them.
//!
//! Sources in increasing precedence: a TOML file, the environment (`WEIR__SSE__HEARTBEAT` is `sse.heartbeat`), flags.
//! An unknown key is an error. All errors are reported together, each with its key and its source.
//! `config.toml` at the root of the repository is generated from this file (`UPDATE=1 cargo test config`).

mod load;
mod originals;
mod route;
mod slot;

use std::{collections::BTreeMap, fmt::Write as _, net::SocketAddr, time::Duration};

use base64::Engine;

pub use load::{Loaded, Override, Problem, Problems, Source, load};
use load::{Table, Tables};
pub use route::{Template, fill};
pub use slot::{Ack, Adapter, Backend, Format, Level, Secret};
use slot::{Item, Setting, Slot};

/// A section of the configuration. [`Config`] composes the sections.
trait Part {
    /// The description of the section in `config.toml`.
    const DOC: &'static str;

    /// Appends the settings of this section, whose key is `at`, in the order in which they are printed.
    fn items<'a>(&'a mut self, at: &str, items: &mut Vec<Item<'a>>);
}

/// Defines a section. A setting is `name: Type as Kind = default`; `Kind` is a variant of [`Slot`], or `Part` for a
/// subsection.
macro_rules! part {
    ($(#[doc = $about:literal])+ $part:ident { $($(#[doc = $doc:literal])* $name:ident: $type:ty as $kind:ident = $default:expr,)+ }) => {
        $(#[doc = $about])+
        #[derive(Clone, Debug, PartialEq, Eq)]
        pub struct $part { $($(#[doc = $doc])* pub $name: $type,)+ }

        impl Default for $part {
            fn default() -> Self {
                $part { $($name: $default,)+ }
            }
        }

        impl Part for $part {
            const DOC: &'static str = concat!($($about, "\n"),+);

            fn items<'a>(&'a mut self, at: &str, items: &mut Vec<Item<'a>>) {
                $(part!(@ $kind, self.$name: $type, load::join(at, stringify!($name)), concat!($($doc, "\n"),*), items);)+
            }
        }
    };
    (@ Part, $self:ident.$field:ident: $type:ty, $key:expr, $doc:expr, $items:ident) => {{
        let key = $key;
        $items.push(Item::Section { key: key.clone(), doc: <$type as Part>::DOC });
        $self.$field.items(&key, $items);
    }};
    (@ $kind:ident, $self:ident.$field:ident: $type:ty, $key:expr, $doc:expr, $items:ident) => {
        $items.push(Item::Setting(Setting { key: $key, doc: $doc, slot: Slot::$kind(&mut $self.$field) }))
    };
}

const KIB: usize = 1 << 10;
const MIB: usize = 1 << 20;
/// Upper bound of `limits.event`. The chunks of a stream have a six-digit hexadecimal size (less than 16 MiB), and
/// `format=data` encodes the two bytes of `\n` as seven.
const MAX_EVENT: usize = 4 * MIB;

const fn seconds(n: u64) -> Duration {
    Duration::from_secs(n)
}

part! {
    /// All settings of weir.
    Config {
        server: Server as Part = Server::default(),
        admin: Admin as Part = Admin::default(),
        bus: Bus as Part = Bus::default(),
        /// Retention rules. The first rule whose `match` pattern fits the channel name applies (`*` matches any run of
        /// characters; no other character is special). A configured rule replaces this list. Values that a rule omits,
        /// and channels that match no rule, have the defaults shown here.
        channels: Vec<ChannelRule> as Tables = vec![ChannelRule::default()],
        consumers: Consumers as Part = Consumers::default(),
        sse: Sse as Part = Sse::default(),
        ws: Ws as Part = Ws::default(),
        rpc: Rpc as Part = Rpc::default(),
        limits: Limits as Part = Limits::default(),
        auth: Auth as Part = Auth::default(),
        cors: Cors as Part = Cors::default(),
        compat: Compat as Part = Compat::default(),
        drain: Drain as Part = Drain::default(),
        log: Log as Part = Log::default(),
    }
}

part! {
    /// The listeners that clients connect to.
    Server {
        /// Addresses with ports: a string (several separated by commas) or a list. Port 0 selects a free port.
        listen: Vec<SocketAddr> as Addresses = vec![SocketAddr::from(([127, 0, 0, 1], 8000))],
    }
}

part! {
    /// A separate listener for administration.
    Admin {
        /// Address that serves metrics and administration instead of the main listeners. Empty: the main listeners
        /// serve them.
        listen: Option<SocketAddr> as Address = None,
    }
}

part! {
    /// Storage of events.
    Bus {
        /// `memory` stores events in this process until it exits. `redis` stores them in Redis, shared by all nodes
        /// that use it.
        backend: Backend as Backend = Backend::Memory,
        /// How long an idempotency key is remembered. A publish repeated with the same key within this time is not
        /// stored again.
        idempotency_window: Duration as Time = seconds(300),
        memory: Memory as Part = Memory::default(),
        redis: Redis as Part = Redis::default(),
    }
}

part! {
    /// The Redis backend. It requires Redis 6.2 or later (Redis Cluster 7.0 or later) or Valkey.
    Redis {
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

part! {
    /// The memory backend.
    Memory {
        /// Maximum memory of all channels together. Beyond it the oldest events are trimmed, and readers get a gap.
        budget: usize as Size = 256 * MIB,
    }
}

part! {
    /// Retention of a channel. The first limit reached trims the oldest events.
    Keep {
        /// Maximum number of events.
        count: usize as Count = 10_000,
        /// Maximum age of an event.
        age: Duration as Time = seconds(24 * 60 * 60),
        /// Maximum size of the encoded events.
        bytes: usize as Size = 16 * MIB,
    }
}

part! {
    /// Consumers: named readers whose cursors weir stores.
    Consumers {
        /// A consumer that is unused for this long is deleted.
        idle: Duration as Time = seconds(30 * 24 * 60 * 60),
    }
}

part! {
    /// Server-sent event (SSE) streams.
    Sse {
        /// Interval of heartbeats on an idle stream, randomized by ±25 % so that the streams are not in step.
        heartbeat: Duration as Time = seconds(20),
    }
}

part! {
    /// WebSocket connections.
    Ws {
        /// Interval of Ping frames, randomized by ±20 %. A peer that sends nothing until the next Ping is disconnected.
        ping: Duration as Time = seconds(25),
    }
}

part! {
    /// Remote procedure calls to services.
    Rpc {
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

part! {
    /// Limits per client or in total. An error caused by a limit names its key.
    Limits {
        /// Maximum number of connections of all kinds on all listeners.
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
        /// Maximum number of idempotency keys per channel in the memory backend. Redis keeps all keys for
        /// `bus.idempotency_window`.
        keys: usize as Count = 10_000,
        /// Size of the write queue of one connection above which weir stops reading from its channels (backpressure).
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

part! {
    /// Access control.
    Auth {
        /// Allows listeners on addresses that other machines can reach, without authentication. If false, weir accepts
        /// loopback addresses only, because this version has no credentials.
        allow_anonymous: bool as Flag = false,
    }
}

part! {
    /// Cross-origin resource sharing (CORS).
    Cors {
        /// Allowed origins (`*` matches any run of characters) besides the same origin. A listener on a loopback address
        /// also allows `http://localhost:*` and `http://127.0.0.1:*`.
        origins: Vec<String> as Origins = Vec::new(),
    }
}

part! {
    /// Adapters for unmodified clients of other systems. Each adapter serves one other protocol on the same channels
    /// and services.
    Compat {
        /// Enabled adapters: any of microstream, ganomede, node-sse, grip. A disabled adapter uses no resources.
        enable: Vec<Adapter> as Adapters = Vec::new(),
        microstream: MicroStream as Part = MicroStream::default(),
        ganomede: Ganomede as Part = Ganomede::default(),
        sse: SseRoutes as Part = SseRoutes::default(),
        grip: Grip as Part = Grip::default(),
    }
}

part! {
    /// The `microstream` adapter: a hub for MicroStream clients, which use Socket.IO at /socket.io/. The defaults equal
    /// those of MicroStream.
    MicroStream {
        /// A client that sends no heartbeat for this long is disconnected, and its name is released.
        heartbeat_timeout: Duration as Time = seconds(15),
        /// Interval at which missing heartbeats are checked.
        sweep: Duration as Time = seconds(5),
        /// Interval of Engine.IO pings.
        ping: Duration as Time = seconds(25),
        /// Timeout for the pong.
        ping_timeout: Duration as Time = seconds(20),
        /// When a second client connects with a name in use, the first client must respond within this time to keep the
        /// name.
        probe: Duration as Time = seconds(2),
        /// Maximum size of one message. A client that sends a larger one is disconnected.
        max_payload: usize as Size = 1_000_000,
        /// Size of the write queue of one client above which it gets no more requests.
        queued: usize as Size = 16 * MIB,
        /// Maximum number of requests in flight per client.
        calls: usize as Count = 10_000,
    }
}

part! {
    /// The `ganomede` adapter: the HTTP interface of ganomede-events at /events/v1.
    Ganomede {
        /// Shared secret of the clients (`API_SECRET`). Required if the adapter is enabled.
        secret: Secret as Secret = Secret::default(),
        /// How long a poll waits for events before it returns an empty array.
        poll_timeout: Duration as Pause = seconds(5),
    }
}

part! {
    /// SSE streams at configured paths, in the format of @fanoutio/eventstream.
    SseRoutes {
        /// Routes, written as [[compat.sse.routes]] with `path` and `channels`. A {name} in `path` matches one path
        /// segment; in `channels` it is replaced by that segment, or by the query parameter of this name.
        routes: Vec<SseRoute> as Tables = Vec::new(),
    }
}

part! {
    /// A path and the channels that are streamed at it.
    SseRoute {
        path: String as Path = String::new(),
        channels: Vec<String> as Texts = Vec::new(),
    }
}

part! {
    /// The `grip` adapter: a GRIP proxy compatible with Pushpin. weir forwards requests to HTTP servers (origins) and
    /// holds a response open if the origin instructs it to.
    Grip {
        /// Address of the proxy. It is a separate listener, because all its paths belong to the origins. Empty disables
        /// it.
        listen: Option<SocketAddr> as Address = Some(SocketAddr::from(([127, 0, 0, 1], 7999))),
        /// Address at which origins publish. Empty disables it. The main listeners serve the same at /grip/publish/.
        publish_listen: Option<SocketAddr> as Address = Some(SocketAddr::from(([127, 0, 0, 1], 5561))),
        /// The `iss` claim of Grip-Sig.
        iss: String as Text = "pushpin".into(),
        /// Timeout for connecting to an origin.
        connect_timeout: Duration as Time = seconds(5),
        /// Timeout for the response headers of an origin.
        timeout: Duration as Time = seconds(60),
        /// Maximum number of idle connections kept per origin.
        idle_connections: usize as Count = 64,
        /// Routes to origins, written as [[compat.grip.routes]]. The longest matching `path` applies. `origin` is the
        /// URL of the server. `key` signs Grip-Sig and is required for publishing (plain text, or base64:…). `prefix`
        /// is prepended to channel names. `iss` is the `iss` claim that publish tokens must have.
        routes: Vec<GripRoute> as Tables = Vec::new(),
    }
}

part! {
    /// An origin and the path prefix that is forwarded to it.
    GripRoute {
        path: String as Path = "/".into(),
        origin: String as Url = String::new(),
        key: Secret as Secret = Secret::default(),
        prefix: String as Text = String::new(),
        iss: String as Text = String::new(),
    }
}

part! {
    /// Graceful shutdown on SIGTERM.
    Drain {
        /// Streams and WebSockets are closed one after the other over this time, so that their clients do not all
        /// reconnect at once.
        window: Duration as Pause = seconds(10),
        /// Connections and calls that are still open after this time are aborted.
        grace: Duration as Time = seconds(30),
    }
}

part! {
    /// Logging to standard error.
    Log {
        /// error, warn, info, debug, trace or off, or a filter by target such as "info,weir::rpc=debug".
        level: Level as Level = Level::info(),
        /// `text`, `json`, or `auto` (text on a terminal, JSON otherwise).
        format: Format as Format = Format::Auto,
    }
}

/// The retention of the channels whose name matches `pattern`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ChannelRule {
    /// `*` matches any run of characters; no other character is special. The key in files is `match`.
    pub pattern: String,
    pub keep: Keep,
}

// === impl ChannelRule ===

impl Default for ChannelRule {
    fn default() -> Self {
        ChannelRule { pattern: "*".into(), keep: Keep::default() }
    }
}

impl Table for ChannelRule {
    const REQUIRED: &'static [(&'static str, &'static str)] = &[("match", "which channels is it for?")];
    const EXAMPLE: &'static str = "{ match = \"*\", keep = { count = 5 } }";
}

impl Table for SseRoute {
    const REQUIRED: &'static [(&'static str, &'static str)] =
        &[("path", "where is it?"), ("channels", "what is streamed there?")];
    const EXAMPLE: &'static str = "{ path = \"/api/events/{id}\", channels = [\"{id}\"] }";
}

impl Table for GripRoute {
    const REQUIRED: &'static [(&'static str, &'static str)] = &[("origin", "where is the server?")];
    const EXAMPLE: &'static str = "{ path = \"/\", origin = \"http://127.0.0.1:3000\" }";
}

impl Part for ChannelRule {
    const DOC: &'static str = "The retention of the channels whose name matches.";

    fn items<'a>(&'a mut self, at: &str, items: &mut Vec<Item<'a>>) {
        let pattern = Slot::Pattern(&mut self.pattern);
        items.push(Item::Setting(Setting { key: load::join(at, "match"), doc: "", slot: pattern }));
        self.keep.items(&load::join(at, "keep"), items);
    }
}

// === impl GripRoute ===

impl GripRoute {
    /// Decodes the key. `None` if it begins with `base64:` and is not valid base64; empty if no key is set.
    pub fn key_bytes(&self) -> Option<Vec<u8>> {
        match self.key.reveal().strip_prefix("base64:") {
            Some(text) => base64::engine::general_purpose::STANDARD.decode(text).ok(),
            None => Some(self.key.reveal().into()),
        }
    }
}

// === impl Compat ===

impl Compat {
    /// Errors of `compat.sse.routes`: invalid paths, paths in use, routes without channels.
    fn route_collisions(&self) -> Option<(&'static str, String)> {
        let mut taken: Vec<(&str, &str)> =
            ["/", "/v1/*", "/health/*", "/metrics", "/openapi.json", "/console/*"].map(|path| (path, "weir's")).into();
        for adapter in &self.enable {
            taken.extend(adapter.paths().iter().map(|path| (*path, adapter.as_str())));
        }
        let mut found = Vec::new();
        let mut wrong = |reason: String| found.push(reason);
        for (n, route) in self.sse.routes.iter().enumerate() {
            let template = match Template::parse(&route.path) {
                Ok(template) => template,
                Err(reason) => {
                    wrong(reason);
                    continue;
                }
            };
            let meets = |other: &str| Template::parse(other).is_ok_and(|other| template.collides(&other));
            for (path, owner) in taken.iter().filter(|(path, _)| meets(path)) {
                wrong(format!("{} would take {path}, which is {owner} already", route.path));
            }
            for other in self.sse.routes[..n].iter().filter(|other| meets(&other.path)) {
                wrong(format!("{} and {} are both the path of some requests", other.path, route.path));
            }
            if route.channels.is_empty() {
                wrong(format!("{} streams no channels", route.path));
            }
        }
        (!found.is_empty()).then(|| ("compat.sse.routes", found.join("; ")))
    }
}

// === impl Grip ===

impl Grip {
    fn contradictions(&self, anonymous: bool) -> Vec<(&'static str, String)> {
        let mut found = Vec::new();
        let mut wrong = |reason: String| found.push(("compat.grip.routes", reason));
        for (n, route) in self.routes.iter().enumerate() {
            if self.routes[..n].iter().any(|other| other.path == route.path) {
                wrong(format!("{} has two origins", route.path));
            }
            if route.key_bytes().is_none() {
                wrong(format!("the key of {} is not valid base64", route.path));
            }
        }
        let keyed = !self.routes.is_empty() && self.routes.iter().all(|route| !route.key.is_empty());
        if let Some(address) = self.publish_listen
            && !address.ip().is_loopback()
            && !keyed
            && !anonymous
        {
            let reason = format!(
                "{address} can be reached from other machines, and a route without a key accepts every publisher: give \
                 every route a key, listen on 127.0.0.1:{}, or allow this with auth.allow_anonymous = true",
                address.port()
            );
            found.push(("compat.grip.publish_listen", reason));
        }
        found
    }
}

// === impl Config ===

impl Config {
    /// Whether all listeners have loopback addresses.
    pub fn is_loopback_only(&self) -> bool {
        self.server.listen.iter().chain(&self.admin.listen).all(|address| address.ip().is_loopback())
    }

    /// Errors that involve more than one setting, as pairs of key and reason.
    fn contradictions(&self) -> Vec<(&'static str, String)> {
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

        if self.compat.enable.contains(&Adapter::Ganomede) && self.compat.ganomede.secret.is_empty() {
            let reason = "is missing: it is the shared secret of all ganomede-events clients \
                          (WEIR__COMPAT__GANOMEDE__SECRET, or API_SECRET if ganomede is the only adapter)";
            found.push(("compat.ganomede.secret", reason.to_owned()));
        }
        found.extend(self.compat.route_collisions());
        if self.compat.enable.contains(&Adapter::Grip) {
            found.extend(self.compat.grip.contradictions(self.auth.allow_anonymous));
        } else if !self.compat.grip.routes.is_empty() {
            found.push(("compat.grip.routes", "are set, but compat.enable does not contain grip".into()));
        }
        let listeners = self.server.listen.iter().map(|address| ("server.listen", address));
        let listeners = listeners.chain(self.admin.listen.iter().map(|address| ("admin.listen", address)));
        let grip = Some(&self.compat.grip).filter(|_| self.compat.enable.contains(&Adapter::Grip));
        let grip = grip.into_iter().flat_map(|grip| {
            let proxy = grip.listen.iter().map(|address| ("compat.grip.listen", address));
            proxy.chain(grip.publish_listen.iter().map(|address| ("compat.grip.publish_listen", address)))
        });
        let listeners: Vec<_> = listeners.chain(grip).collect();
        for (n, (key, address)) in listeners.iter().enumerate() {
            if address.port() != 0 && listeners[..n].iter().any(|(_, other)| other == address) {
                found.push((key, format!("{address} is listed twice")));
            }
            // Access to the proxy is controlled by its origins.
            if key.starts_with("compat.") {
                continue;
            }
            if !address.ip().is_loopback() && !self.auth.allow_anonymous {
                let reason = format!(
                    "{address} can be reached from other machines, and this version has no authentication: listen on \
                     127.0.0.1:{}, or allow this with auth.allow_anonymous = true (WEIR__AUTH__ALLOW_ANONYMOUS=true)",
                    address.port()
                );
                found.push((key, reason));
            }
        }
        found
    }

    /// Formats the configuration as TOML that [`load`] can read. `explained` adds the description of each key as a
    /// comment; a key that is in `sources` gets its source as a comment.
    pub fn to_toml(&self, explained: bool, sources: &BTreeMap<String, Source>) -> String {
        let mut out = String::new();
        let mut config = self.clone();
        let mut items = Vec::new();
        config.items("", &mut items);
        for item in items {
            match item {
                Item::Section { key, doc } => {
                    out.push('\n');
                    if explained {
                        comment(doc, &mut out);
                    }
                    let _ = writeln!(out, "[{key}]");
                }
                // It must precede all sections: below a section header the key would belong to that section.
                Item::Setting(Setting { key, slot: Slot::Tables(list), .. })
                    if list.len() == 0 && !key.contains('.') =>
                {
                    out.insert_str(0, &format!("{key} = []\n"));
                }
                Item::Setting(Setting { key, doc, slot: Slot::Tables(list) }) if list.len() > 0 => {
                    out.push('\n');
                    if explained {
                        comment(doc, &mut out);
                    }
                    write_tables(&key, list, sources.get(&key), &mut out);
                }
                Item::Setting(Setting { key, doc, slot }) => {
                    if explained {
                        comment(doc, &mut out);
                    }
                    let name = key.rsplit('.').next().unwrap_or(&key);
                    let _ = write!(out, "{name} = {slot}");
                    if let Some(source) = sources.get(&key) {
                        let _ = write!(out, "  # {source}");
                    }
                    out.push('\n');
                }
            }
        }
        out.trim_start().to_owned()
    }
}

/// Writes an array of tables. It must follow all other settings of its section: a key after a table would belong to the
/// table.
fn write_tables(key: &str, list: &mut dyn Tables, source: Option<&Source>, out: &mut String) {
    if let Some(source) = source {
        let _ = writeln!(out, "# {source}");
    }
    for n in 0..list.len() {
        let _ = writeln!(out, "{}[[{key}]]", if n == 0 { "" } else { "\n" });
        for item in list.items(n, "") {
            if let Item::Setting(Setting { key, slot, .. }) = item {
                let _ = writeln!(out, "{key} = {slot}");
            }
        }
    }
}

fn comment(doc: &str, out: &mut String) {
    for line in doc.lines().map(str::trim).filter(|line| !line.is_empty()) {
        let _ = writeln!(out, "# {line}");
    }
}

#[cfg(test)]
mod tests;
