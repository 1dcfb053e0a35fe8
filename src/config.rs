//! Every setting, its default and its explanation, in one place; and how they are found.
//!
//! A file (TOML), then the environment (`WEIR__SSE__HEARTBEAT` is `sse.heartbeat`), then flags: the later wins.
//! Nothing unknown is ignored, and everything that is wrong is reported at once, with its key and its source.
//! `config.toml` at the root of the repository is generated from here (`UPDATE=1 cargo test config`).

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

/// Something that has settings. A part owns its section; [`Config`] only composes them.
trait Part {
    /// What the section is about.
    const DOC: &'static str;

    /// Adds each setting under the key `at`, in the order in which they are shown.
    fn items<'a>(&'a mut self, at: &str, items: &mut Vec<Item<'a>>);
}

/// `name: Type as Kind = default`, where the kind is a variant of [`Slot`]; `Part` is a section inside.
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
/// The chunks of streams have six hexadecimal digits of size, and `format=data` makes seven bytes of the two of `\n`.
const MAX_EVENT: usize = 4 * MIB;

const fn seconds(n: u64) -> Duration {
    Duration::from_secs(n)
}

part! {
    /// Every setting of weir.
    Config {
        server: Server as Part = Server::default(),
        admin: Admin as Part = Admin::default(),
        bus: Bus as Part = Bus::default(),
        /// Rules for channels: the first whose `match` fits a name counts (`*` is any run of characters, nothing else is
        /// special). Setting any rule replaces this list; what a rule leaves out, and a channel without a rule, is as here.
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
        /// Addresses with ports; one, several, or text with commas. Port 0 takes a free one.
        listen: Vec<SocketAddr> as Addresses = vec![SocketAddr::from(([127, 0, 0, 1], 8000))],
    }
}

part! {
    /// A listener for operators.
    Admin {
        /// Moves metrics and administration from the main listeners to this address; empty leaves them there.
        listen: Option<SocketAddr> as Address = None,
    }
}

part! {
    /// Where events are kept.
    Bus {
        /// `memory`: in this process, for as long as it lives. `redis`: in Redis, for all nodes that use it.
        backend: Backend as Backend = Backend::Memory,
        /// How long the key of a publish is remembered, so that a repeat is not placed again.
        idempotency_window: Duration as Time = seconds(300),
        memory: Memory as Part = Memory::default(),
        redis: Redis as Part = Redis::default(),
    }
}

part! {
    /// The Redis backend: Redis 6.2 or newer (a Cluster 7.0), or Valkey.
    Redis {
        /// `redis://[user:password@]host:6379[/database]`, `redis+sentinel://host:26379,host/master` or `redis-cluster://host:6379,host`;
        /// with `rediss` instead of `redis` over TLS.
        url: Secret as Secret = Secret::default(),
        /// Before every key and every pub/sub channel. Nodes of one bus have the same.
        prefix: String as Text = "weir:".to_owned(),
        /// When a publish is answered: `stored`, when the master has it, or `replicated`, when a replica has it as well.
        ack: Ack as Ack = Ack::Stored,
    }
}

part! {
    /// The memory backend.
    Memory {
        /// What all channels together may hold; beyond it the oldest events go first, announced as a gap.
        budget: usize as Size = 256 * MIB,
    }
}

part! {
    /// How much of a channel is kept. Whichever is reached first trims the oldest events.
    Keep {
        /// Events.
        count: usize as Count = 10_000,
        /// Time since an event was placed.
        age: Duration as Time = seconds(24 * 60 * 60),
        /// Encoded bytes.
        bytes: usize as Size = 16 * MIB,
    }
}

part! {
    /// Named readers whose positions weir keeps.
    Consumers {
        /// A consumer that nobody used for so long is forgotten.
        idle: Duration as Time = seconds(30 * 24 * 60 * 60),
    }
}

part! {
    /// Streams of server-sent events.
    Sse {
        /// A quiet stream gets a heartbeat this often, give or take a quarter so that they do not come all at once.
        heartbeat: Duration as Time = seconds(20),
    }
}

part! {
    /// WebSocket connections.
    Ws {
        /// A Ping goes out this often, give or take a fifth; a peer that is silent until the next one is dead.
        ping: Duration as Time = seconds(25),
    }
}

part! {
    /// Calls to services.
    Rpc {
        /// The deadline of a call that names none, waiting for a provider included.
        timeout: Duration as Time = seconds(30),
        /// The longest deadline that a call may name.
        max_timeout: Duration as Time = seconds(600),
        /// How long a call waits for a provider of a service that had one within the last minute.
        wait_for_provider: Duration as Pause = seconds(2),
        /// How long after its deadline a reply is still delivered to a caller that asked for late replies.
        late_window: Duration as Pause = seconds(300),
    }
}

part! {
    /// What one client, or all of them, may ask for. The error that a limit causes names it.
    Limits {
        /// Connections of all kinds, on all listeners.
        connections: usize as Count = 100_000,
        /// One event as encoded.
        event: usize as Size = 1_000_000,
        /// Events of one publish request.
        publish_events: usize as Count = 1_000,
        /// The body of one publish request.
        publish_bytes: usize as Size = 8_000_000,
        /// Events of one page that is read.
        page_events: usize as Count = 1_000,
        /// Bytes of one page that is read; it always holds at least one event.
        page_bytes: usize as Size = 512 * KIB,
        /// How long a read may wait for events.
        wait: Duration as Time = seconds(55),
        /// Channels of one stream or read.
        stream_channels: usize as Count = 100,
        /// Channels that one WebSocket is subscribed to.
        subscriptions: usize as Count = 10_000,
        /// One WebSocket message, and the body of one call over HTTP.
        frame: usize as Size = MIB + 64 * KIB,
        /// Messages of one JSON-RPC batch.
        batch: usize as Count = 100,
        /// Calls in flight of one connection.
        calls: usize as Count = 1_000,
        /// Calls that wait for a provider, of all connections.
        waiting: usize as Count = 10_000,
        /// Bytes of the calls that wait for a provider.
        waiting_bytes: usize as Size = 64 * MIB,
        /// Replies awaited past their deadline, of all connections.
        late: usize as Count = 10_000,
        /// Services that have a provider, of all connections.
        services: usize as Count = 10_000,
        /// Services that one connection provides.
        provides: usize as Count = 1_000,
        /// Named consumers.
        consumers: usize as Count = 100_000,
        /// Channels of one consumer.
        consumer_channels: usize as Count = 1_000,
        /// Subscriptions of this node that say who is present.
        presences: usize as Count = 100_000,
        /// What a client may tell of itself where it is present.
        present_info: usize as Size = KIB,
        /// Idempotency keys remembered of one channel, in memory. In Redis all are, for `bus.idempotency_window`.
        keys: usize as Count = 10_000,
        /// Bytes queued for one connection, beyond which nothing more is read from its channels.
        queued: usize as Size = 2 * MIB,
        /// A connection that takes nothing of what is queued for so long is closed as `slow`.
        stalled: Duration as Time = seconds(30),
        /// Unreadable messages of one WebSocket in a minute, beyond which it is closed.
        unreadable: usize as Count = 20,
        /// The head of an HTTP request.
        header: usize as Size = 16 * KIB,
        /// How long the head of an HTTP request may take to arrive.
        header_time: Duration as Time = seconds(10),
        /// How long the body of an HTTP request may take to arrive.
        body_time: Duration as Time = seconds(30),
        /// How long an HTTP connection is kept open between two requests.
        idle: Duration as Time = seconds(75),
        /// Requests at a time on one HTTP/2 connection.
        h2_streams: usize as Count = 200,
    }
}

part! {
    /// Who may connect.
    Auth {
        /// Serve anybody who can reach the address. Without it weir listens on this machine only, for there are no credentials yet.
        allow_anonymous: bool as Flag = false,
    }
}

part! {
    /// Web pages of other origins.
    Cors {
        /// Origins whose pages may use weir (`*` is any run of characters). Empty: pages of this machine, while only this machine is served.
        origins: Vec<String> as Origins = Vec::new(),
    }
}

part! {
    /// Clients of other systems, unchanged: each adapter speaks one of their protocols on the same channels and services.
    Compat {
        /// Any of microstream, ganomede, node-sse, grip; what is not named costs nothing.
        enable: Vec<Adapter> as Adapters = Vec::new(),
        microstream: MicroStream as Part = MicroStream::default(),
        ganomede: Ganomede as Part = Ganomede::default(),
        sse: SseRoutes as Part = SseRoutes::default(),
        grip: Grip as Part = Grip::default(),
    }
}

part! {
    /// A hub for clients of MicroStream, which speak Socket.IO at /socket.io/. The defaults are the original's.
    MicroStream {
        /// A client whose heartbeat is missing for so long is disconnected, and its name is free.
        heartbeat_timeout: Duration as Time = seconds(15),
        /// How often that is looked at.
        sweep: Duration as Time = seconds(5),
        /// A ping goes out this often.
        ping: Duration as Time = seconds(25),
        /// How long its answer may take.
        ping_timeout: Duration as Time = seconds(20),
        /// How long the client that has a name is given to show that it lives when another one asks for the name.
        probe: Duration as Time = seconds(2),
        /// One message; a client that sends a larger one is disconnected.
        max_payload: usize as Size = 1_000_000,
        /// Bytes queued for one client, beyond which it gets no more requests.
        queued: usize as Size = 16 * MIB,
        /// Requests in flight of one client.
        calls: usize as Count = 10_000,
    }
}

part! {
    /// ganomede-events, at /events/v1.
    Ganomede {
        /// What its clients prove themselves by. There is no adapter without it.
        secret: Secret as Secret = Secret::default(),
        /// How long a poll waits for events.
        poll_timeout: Duration as Pause = seconds(5),
    }
}

part! {
    /// Streams at paths of one's own, as @fanoutio/eventstream serves them.
    SseRoutes {
        /// As [[compat.sse.routes]] with `path` and `channels`: in both, {id} is a segment of the path or a parameter of the URL.
        routes: Vec<SseRoute> as Tables = Vec::new(),
    }
}

part! {
    /// A path, and the channels that are streamed there.
    SseRoute {
        path: String as Path = String::new(),
        channels: Vec<String> as Texts = Vec::new(),
    }
}

part! {
    /// GRIP, as by Pushpin: weir is the proxy in front of HTTP servers, and holds the answers that they tell it to.
    Grip {
        /// The proxy. Every path of it is an origin's, so it has a listener of its own; empty for none.
        listen: Option<SocketAddr> as Address = Some(SocketAddr::from(([127, 0, 0, 1], 7999))),
        /// Where origins publish; empty for none. The main listeners have it at /grip/publish/.
        publish_listen: Option<SocketAddr> as Address = Some(SocketAddr::from(([127, 0, 0, 1], 5561))),
        /// The issuer in Grip-Sig.
        iss: String as Text = "pushpin".into(),
        /// How long an origin may take to accept a connection.
        connect_timeout: Duration as Time = seconds(5),
        /// How long an origin may take to begin its answer.
        timeout: Duration as Time = seconds(60),
        /// Idle connections to one origin that are kept for later.
        idle_connections: usize as Count = 64,
        /// Origins by the paths they answer; the longest path that fits counts. As [[compat.grip.routes]] with `path`, `origin`
        /// (where the server is), `key` (signs Grip-Sig, and publishing asks for it; as it is, or base64:…), `prefix` (put before
        /// the names of channels) and `iss` (the issuer that tokens for publishing must name).
        routes: Vec<GripRoute> as Tables = Vec::new(),
    }
}

part! {
    /// An origin, and the paths that are its own.
    GripRoute {
        path: String as Path = "/".into(),
        origin: String as Url = String::new(),
        key: Secret as Secret = Secret::default(),
        prefix: String as Text = String::new(),
        iss: String as Text = String::new(),
    }
}

part! {
    /// Leaving on SIGTERM.
    Drain {
        /// Streams and sockets are ended spread over this time, so that they do not all come back at once.
        window: Duration as Pause = seconds(10),
        /// What is not finished by then is cut off.
        grace: Duration as Time = seconds(30),
    }
}

part! {
    /// The log, on standard error.
    Log {
        /// error, warn, info, debug, trace or off; or by target, as "info,weir::rpc=debug".
        level: Level as Level = Level::info(),
        /// `text`, `json`, or `auto`: text on a terminal, JSON elsewhere.
        format: Format as Format = Format::Auto,
    }
}

/// What holds for the channels whose name `pattern` fits.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ChannelRule {
    /// `*` is any run of characters, nothing else is special. In files it is `match`.
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
    const DOC: &'static str = "What holds for the channels whose name fits.";

    fn items<'a>(&'a mut self, at: &str, items: &mut Vec<Item<'a>>) {
        let pattern = Slot::Pattern(&mut self.pattern);
        items.push(Item::Setting(Setting { key: load::join(at, "match"), doc: "", slot: pattern }));
        self.keep.items(&load::join(at, "keep"), items);
    }
}

// === impl GripRoute ===

impl GripRoute {
    /// The key as bytes, and nothing if it is not the base64 that it claims to be. Empty if there is none.
    pub fn key_bytes(&self) -> Option<Vec<u8>> {
        match self.key.reveal().strip_prefix("base64:") {
            Some(text) => base64::engine::general_purpose::STANDARD.decode(text).ok(),
            None => Some(self.key.reveal().into()),
        }
    }
}

// === impl Compat ===

impl Compat {
    /// Routes whose paths are somebody else's, or no paths.
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
                wrong(format!("the key of {} is not the base64 that it claims to be", route.path));
            }
        }
        let keyed = !self.routes.is_empty() && self.routes.iter().all(|route| !route.key.is_empty());
        if let Some(address) = self.publish_listen
            && !address.ip().is_loopback()
            && !keyed
            && !anonymous
        {
            let reason = format!(
                "{address} can be reached from other machines, and a route without a key asks nobody for one: give every \
                 route a key, listen on 127.0.0.1:{}, or let anybody publish with auth.allow_anonymous = true",
                address.port()
            );
            found.push(("compat.grip.publish_listen", reason));
        }
        found
    }
}

// === impl Config ===

impl Config {
    /// Whether every listener can only be reached from this machine.
    pub fn is_loopback_only(&self) -> bool {
        self.server.listen.iter().chain(&self.admin.listen).all(|address| address.ip().is_loopback())
    }

    /// What no key can know of itself: the key to blame, and why.
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
            "is more than limits.frame, so that no socket could publish it",
        );
        must(
            limits.event <= MAX_EVENT,
            "limits.event",
            "must be at most 4MiB: as lines of a stream it may take several times as much, and a chunk has less than 16MiB",
        );
        must(limits.event <= limits.publish_bytes, "limits.event", "is more than limits.publish_bytes");
        must(limits.frame <= limits.queued, "limits.frame", "is more than limits.queued, so that no reply would fit");
        must(
            self.bus.memory.budget >= limits.event,
            "bus.memory.budget",
            "is less than limits.event: not one would fit",
        );
        must(
            self.bus.backend != Backend::Redis || !self.bus.redis.url.is_empty(),
            "bus.redis.url",
            "is missing: where is Redis? (WEIR__BUS__REDIS__URL=redis://localhost:6379)",
        );
        must(
            self.bus.backend == Backend::Redis || self.bus.redis.url.is_empty(),
            "bus.redis.url",
            "is set, and bus.backend is memory: this node would be a bus of its own (WEIR__BUS__BACKEND=redis)",
        );
        must(!self.bus.redis.prefix.contains(['{', '}']), "bus.redis.prefix", "must not have braces");
        must(self.sse.heartbeat >= seconds(1), "sse.heartbeat", "must be at least 1s");
        must(self.ws.ping >= seconds(1), "ws.ping", "must be at least 1s");

        if self.compat.enable.contains(&Adapter::Ganomede) && self.compat.ganomede.secret.is_empty() {
            let reason = "is missing: clients of ganomede-events prove themselves by it, and without one anybody could \
                          (WEIR__COMPAT__GANOMEDE__SECRET, or API_SECRET where ganomede is the only adapter)";
            found.push(("compat.ganomede.secret", reason.to_owned()));
        }
        found.extend(self.compat.route_collisions());
        if self.compat.enable.contains(&Adapter::Grip) {
            found.extend(self.compat.grip.contradictions(self.auth.allow_anonymous));
        } else if !self.compat.grip.routes.is_empty() {
            found.push(("compat.grip.routes", "are given, and compat.enable does not name grip".into()));
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
            // Of a proxy its origins decide whom they serve.
            if key.starts_with("compat.") {
                continue;
            }
            if !address.ip().is_loopback() && !self.auth.allow_anonymous {
                let reason = format!(
                    "{address} can be reached from other machines, and there are no credentials to ask them for: \
                     listen on 127.0.0.1:{}, or serve anybody with auth.allow_anonymous = true (WEIR__AUTH__ALLOW_ANONYMOUS=true)",
                    address.port()
                );
                found.push((key, reason));
            }
        }
        found
    }

    /// As the text of a file that [`load`] reads back. `explained` adds what each key means; a key that is in `sources`
    /// says where it comes from.
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
                // Below a section it would belong to that section.
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

/// To be written behind all other settings of their section: a key after a table would belong to the table.
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
