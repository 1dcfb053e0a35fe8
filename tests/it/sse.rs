//! Server-sent events and connections, byte by byte over real sockets.

use std::{
    collections::BTreeMap,
    future::Future,
    net::SocketAddr,
    sync::Arc,
    time::{Duration, Instant},
};

use serde_json::{Value, json, value::RawValue};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpSocket, TcpStream},
};
use tokio_util::sync::CancellationToken;
use weir::{
    backend::memory::Memory,
    bus::{self, Bus, Clock, Keep, KeyLimits, Topics},
    config::Config,
    event::{Channel, Data, Draft, Parts},
    http::{
        Door, Gateway,
        connection::{Connections, Limits},
    },
    metrics::{Metrics, Transport},
    position::Position,
    transport::{
        sse::{Settings, Sse},
        takeover::Io,
        wheel::Wheel,
    },
};

const PATIENCE: Duration = Duration::from_secs(20);

// === the server ===

struct Server {
    at: SocketAddr,
    bus: Arc<Bus>,
    wheel: Arc<Wheel>,
    metrics: Arc<Metrics>,
    connections: Connections,
    door: Arc<Door>,
    stop: CancellationToken,
}

#[derive(Clone)]
struct Setup {
    limits: Limits,
    sse: Settings,
    keep: usize,
}

impl Default for Setup {
    fn default() -> Self {
        Setup { limits: Limits::default(), sse: Settings::default(), keep: 10_000 }
    }
}

impl Server {
    async fn start() -> Self {
        Self::with(Setup::default()).await
    }

    async fn with(setup: Setup) -> Self {
        let topics = Arc::new(Topics::new(
            bus::Config {
                rules: Vec::new(),
                keep: Keep { count: setup.keep, age: Duration::from_secs(3600), bytes: 1 << 30 },
                budget: 1 << 30,
                keys: KeyLimits { window: Duration::from_secs(300), count: 1000 },
                consumer_idle: Duration::from_secs(300),
                max_consumers: 100,
            },
            Clock::System,
        ));
        let bus = Arc::new(Bus::new(Arc::new(Memory::new(topics.clone())), topics));
        let (wheel, metrics) = (Wheel::start(), Arc::new(Metrics::new()));
        let gateway = Arc::new(Gateway {
            bus: bus.clone(),
            config: Arc::new(Config::default()),
            metrics: metrics.clone(),
            sse: Arc::new(Sse::new(bus.clone(), wheel.clone(), metrics.clone(), setup.sse)),
            draining: CancellationToken::new(),
        });
        let connections = Connections::new(setup.limits, wheel.clone(), metrics.clone());
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let at = listener.local_addr().unwrap();
        let stop = CancellationToken::new();
        let door = Arc::new(Door::new(gateway, true));
        let (accepting, entered, stopped) = (connections.clone(), door.clone(), stop.clone());
        tokio::spawn(async move { accepting.accept(listener, entered, stopped).await });
        Server { at, bus, wheel, metrics, connections, door, stop }
    }

    async fn publish(&self, name: &str, data: &str) -> Position {
        self.publish_kind(name, None, data).await
    }

    async fn publish_kind(&self, name: &str, kind: Option<&str>, data: &str) -> Position {
        let data = RawValue::from_string(data.to_owned()).unwrap();
        let draft = Draft::new(Parts { kind, data: Data::Json(&data), ..Parts::default() }, 1 << 20).unwrap();
        self.bus.publish_one("", &channel(name), draft).await.unwrap().position
    }

    async fn stream(&self, query: &str) -> Client {
        self.request(&format!("GET /v1/sse?{query} HTTP/1.1\r\nhost: localhost\r\n\r\n")).await
    }

    async fn resume(&self, query: &str, id: &str) -> Client {
        self.request(&format!("GET /v1/sse?{query} HTTP/1.1\r\nhost: localhost\r\nlast-event-id: {id}\r\n\r\n")).await
    }

    async fn request(&self, bytes: &str) -> Client {
        let mut client = Client::new(TcpStream::connect(self.at).await.unwrap());
        client.socket.write_all(bytes.as_bytes()).await.unwrap();
        client
    }

    fn open(&self) -> (usize, i64, i64, usize) {
        let metrics = &self.metrics;
        (
            self.connections.len(),
            metrics.connections[Transport::Sse].get() + metrics.connections[Transport::Http].get(),
            metrics.subscriptions[Transport::Sse].get(),
            self.bus.topics().readers(),
        )
    }

    async fn empty(&self) {
        eventually("all counts are back at zero", || self.open() == (0, 0, 0, 0)).await;
        assert!(self.wheel.is_empty(), "timers are left");
    }
}

fn channel(name: &str) -> Channel {
    Channel::parse(name).unwrap()
}

async fn eventually(what: &str, condition: impl Fn() -> bool) {
    let start = Instant::now();
    while !condition() {
        assert!(start.elapsed() < PATIENCE, "never: {what}");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

async fn soon<T>(what: impl Future<Output = T>) -> T {
    tokio::time::timeout(PATIENCE, what).await.expect("nothing came")
}

// === the client ===

struct Client {
    socket: TcpStream,
    raw: Vec<u8>,
    text: Vec<u8>,
    /// `None` before the head was read.
    chunked: Option<bool>,
    ended: bool,
    id: String,
    retry: Option<u64>,
    comments: usize,
}

#[derive(Clone, Debug, PartialEq)]
struct Block {
    id: String,
    event: String,
    data: String,
}

impl Block {
    fn json(&self) -> Value {
        serde_json::from_str(&self.data).unwrap()
    }

    fn offset(&self) -> u64 {
        self.json()["offset"].as_u64().unwrap()
    }
}

impl Client {
    fn new(socket: TcpStream) -> Self {
        let (id, raw, text) = Default::default();
        Client { socket, raw, text, chunked: None, ended: false, id, retry: None, comments: 0 }
    }

    /// False at the end of the connection.
    async fn fill(&mut self) -> bool {
        soon(self.socket.read_buf(&mut self.raw)).await.is_ok_and(|n| n > 0)
    }

    /// The head of the next response, in lower case.
    async fn head(&mut self) -> String {
        loop {
            if let Some(end) = self.raw.windows(4).position(|four| four == b"\r\n\r\n") {
                let head = String::from_utf8(self.raw.drain(..end + 4).collect()).unwrap().to_lowercase();
                self.chunked = Some(head.contains("transfer-encoding: chunked"));
                return head;
            }
            assert!(self.fill().await, "closed instead of a head");
        }
    }

    /// The body of a response with a length.
    async fn body(&mut self, head: &str) -> String {
        let length = head.split("content-length: ").nth(1).unwrap().split('\r').next().unwrap().parse().unwrap();
        while self.raw.len() < length {
            assert!(self.fill().await);
        }
        String::from_utf8(self.raw.drain(..length).collect()).unwrap()
    }

    /// Moves whole chunks to `text`.
    fn unchunk(&mut self) {
        if self.chunked != Some(true) {
            self.text.append(&mut self.raw);
            return;
        }
        while let Some(line) = self.raw.windows(2).position(|two| two == b"\r\n") {
            let size = usize::from_str_radix(std::str::from_utf8(&self.raw[..line]).unwrap(), 16).unwrap();
            if self.raw.len() < line + 4 + size {
                return;
            }
            assert_eq!(&self.raw[line + 2 + size..line + 4 + size], b"\r\n");
            self.text.extend_from_slice(&self.raw[line + 2..line + 2 + size]);
            self.raw.drain(..line + 4 + size);
            if size == 0 {
                self.ended = true;
                assert!(self.raw.is_empty(), "more after the end");
                return;
            }
        }
    }

    /// The next event as a browser dispatches it; `None` at the end of the stream.
    async fn block(&mut self) -> Option<Block> {
        if self.chunked.is_none() {
            let head = self.head().await;
            assert!(head.starts_with("http/1.1 200 "), "{head}");
        }
        let (mut event, mut data, mut lines) = (String::new(), String::new(), 0);
        loop {
            self.unchunk();
            if let Some(end) = self.text.iter().position(|byte| *byte == b'\n') {
                let line = String::from_utf8(self.text.drain(..=end).collect()).unwrap();
                let line = line.trim_end_matches('\n');
                assert!(!line.contains('\r'));
                if line.is_empty() {
                    // Nothing is sent that some client takes for an empty event.
                    assert!(lines > 0, "an empty block");
                    return Some(Block { id: self.id.clone(), event, data });
                }
                let (field, value) = line.split_once(':').unwrap();
                let value = value.strip_prefix(' ').unwrap_or(value).to_owned();
                match field {
                    "" => self.comments += 1,
                    "retry" => self.retry = value.parse().ok(),
                    "event" => event = value,
                    "id" => self.id = value,
                    "data" => {
                        data += if lines > 0 { "\n" } else { "" };
                        data += &value;
                        lines += 1;
                    }
                    _ => panic!("unknown field {line:?}"),
                }
            } else if self.ended || !self.fill().await {
                return None;
            }
        }
    }

    async fn next(&mut self) -> Block {
        self.block().await.expect("the stream has ended")
    }

    async fn opening(&mut self) -> Block {
        let block = self.next().await;
        assert_eq!(block.event, "weir.open", "{block:?}");
        assert!((1000..4000).contains(&self.retry.unwrap()));
        block
    }

    /// Whether the server has closed the connection, however.
    async fn closed(&mut self) {
        while self.fill().await {}
    }
}

// === one channel ===

#[tokio::test]
async fn a_stream_from_head_to_event() {
    let server = Server::start().await;
    let before = server.publish("orders", "1").await;
    let mut client = server.stream("channel=orders").await;
    let head = client.head().await;
    for line in [
        "http/1.1 200 ok\r\n",
        "\r\ncontent-type: text/event-stream\r\n",
        "\r\ncache-control: no-store, no-transform\r\n",
        "\r\nx-accel-buffering: no\r\n",
        "\r\ntransfer-encoding: chunked\r\n",
        "\r\nconnection: close\r\n",
        "\r\ndate: ",
    ] {
        assert!(head.contains(line), "{line:?} is not in {head}");
    }
    let open = client.opening().await;
    assert_eq!(open.id, before.to_string());
    assert_eq!(open.json(), json!({"channels": [{"channel": "orders", "position": before.to_string()}]}));
    let at = server.publish_kind("orders", Some("created"), r#"{"id":7}"#).await;
    let block = client.next().await;
    assert_eq!((block.id.as_str(), block.event.as_str()), (at.to_string().as_str(), ""));
    let event = block.json();
    assert_eq!((&event["type"], &event["data"]), (&json!("created"), &json!({"id": 7})));
    assert_eq!(server.open(), (1, 1, 1, 1));
    drop(client);
    server.empty().await;
    let closed = server.metrics.render();
    assert!(closed.contains(r#"weir_connections_closed_total{transport="sse",reason="peer"} 1"#), "{closed}");
    assert!(closed.contains(r#"weir_events_delivered_total{transport="sse"} 1"#));
}

#[tokio::test]
async fn bare_data() {
    let server = Server::start().await;
    let mut client = server.stream("channel=a&format=data").await;
    client.opening().await;
    server.publish_kind("a", Some("note"), r#""<li>1</li>\n<li>2</li>""#).await;
    server.publish("a", r#"{"n": [1, 2]}"#).await;
    let (one, two) = (client.next().await, client.next().await);
    assert_eq!((one.event.as_str(), one.data.as_str()), ("note", "<li>1</li>\n<li>2</li>"));
    assert_eq!((two.event.as_str(), two.data.as_str()), ("", r#"{"n": [1, 2]}"#));
}

#[tokio::test]
async fn what_was_published_before_the_first_event_is_not_lost() {
    let server = Server::start().await;
    for name in ["born", "unborn"] {
        if name == "born" {
            server.publish(name, "0").await;
        }
        let mut client = server.stream(&format!("channel={name}")).await;
        let id = client.opening().await.id;
        drop(client);
        server.empty().await;
        server.publish(name, "1").await;
        let mut client = server.resume(&format!("channel={name}"), &id).await;
        client.opening().await;
        assert_eq!(client.next().await.json()["data"], 1, "{name}");
        drop(client);
        server.empty().await;
    }
}

#[tokio::test]
async fn where_to_start_and_what_wins() {
    let server = Server::start().await;
    let mut at = Vec::new();
    for n in 0..5 {
        at.push(server.publish("a", &n.to_string()).await.to_string());
    }
    for (query, header, first) in [
        ("after=earliest".to_owned(), None, 0),
        ("last=2".to_owned(), None, 3),
        ("after=2".to_owned(), None, 2),
        (format!("after={}", at[0]), None, 1),
        (format!("after=earliest&last_event_id={}", at[2]), None, 3),
        (format!("last=1&lastEventId={}", at[1]), None, 2),
        (format!("after=earliest&last_event_id={}", at[0]), Some(&at[3]), 4),
    ] {
        let query = format!("channel=a&{query}");
        let mut client = match header {
            None => server.stream(&query).await,
            Some(id) => server.resume(&query, id).await,
        };
        client.opening().await;
        assert_eq!(client.next().await.json()["data"], first, "{query} {header:?}");
    }
}

#[tokio::test]
async fn an_unreadable_position_is_a_gap_and_never_a_status() {
    let server = Server::start().await;
    let top = server.publish("a", "0").await;
    let next = Position { offset: top.offset + 1, ..top }.to_string();
    for (query, header) in [
        ("after=what", None),
        ("last_event_id=", None),
        ("", Some("nonsense")),
        ("after=earliest", Some("\u{fffd}\u{e9}")),
        ("", Some("wAAAA")),
    ] {
        let query = format!("channel=a&{query}");
        let mut client = match header {
            None => server.stream(&query).await,
            Some(id) => server.resume(&query, id).await,
        };
        assert_eq!(client.opening().await.id, top.to_string());
        let gap = client.next().await;
        assert_eq!((gap.event.as_str(), gap.id.clone()), ("weir.gap", top.to_string()));
        assert_eq!(
            gap.json(),
            json!({"channel": "a", "reason": "bad_position", "after": null, "next": next, "missed": null})
        );
    }
    // Readable, but of no log that ever was.
    let mut client = server.resume("channel=a", "zzzzzz-7").await;
    client.opening().await;
    assert_eq!(client.next().await.json()["reason"], "reset");
    assert_eq!(client.next().await.json()["data"], 0);
}

#[tokio::test]
async fn history_that_is_gone_is_announced() {
    let server = Server::with(Setup { keep: 10, ..Setup::default() }).await;
    let first = server.publish("a", "1").await;
    for n in 2..=20 {
        server.publish("a", &n.to_string()).await;
    }
    let mut client = server.resume("channel=a", &first.to_string()).await;
    let open = client.opening().await;
    let gap = client.next().await;
    let at = |offset| Position { offset, ..first }.to_string();
    assert_eq!((open.id, gap.event.as_str(), &gap.id), (at(10), "weir.gap", &at(10)));
    assert_eq!(gap.json(), json!({"channel": "a", "reason": "trimmed", "after": at(1), "next": at(11), "missed": 9}));
    for n in 11..=20 {
        assert_eq!(client.next().await.json()["data"], n);
    }
    // Whoever has had everything loses nothing when the log is deleted, and goes on with the next life.
    server.bus.remove(&channel("a"), None).await.unwrap();
    let born = server.publish("a", "21").await;
    let block = client.next().await;
    assert_eq!((block.event.as_str(), block.id, block.data.contains("21}")), ("", born.to_string(), true));
    assert_eq!(born.offset, 1);
}

#[tokio::test]
async fn heartbeats_keep_a_quiet_stream_and_are_no_events() {
    let sse = Settings { heartbeat: Duration::from_millis(400), ..Settings::default() };
    let server = Server::with(Setup { sse, ..Setup::default() }).await;
    let mut client = server.stream("channel=a").await;
    client.opening().await;
    while client.text.len() < 6 {
        assert!(client.fill().await);
        client.unchunk();
    }
    assert_eq!(client.text, b":\n".repeat(client.text.len() / 2));
    server.publish("a", "1").await;
    assert_eq!(client.next().await.json()["data"], 1);
    assert!(client.comments >= 3);
}

#[tokio::test]
async fn positions_move_where_a_filter_hides_everything() {
    let sse = Settings { heartbeat: Duration::from_millis(400), ..Settings::default() };
    let server = Server::with(Setup { sse, ..Setup::default() }).await;
    let mut client = server.stream("channel=a&type=seen&type=also").await;
    client.opening().await;
    server.publish_kind("a", Some("seen"), "1").await;
    assert_eq!(client.next().await.json()["data"], 1);
    server.publish_kind("a", Some("hidden"), "2").await;
    let top = server.publish("a", "3").await;
    let position = client.next().await;
    assert_eq!((position.event.as_str(), position.data.as_str()), ("weir.position", "{}"));
    assert_eq!(position.id, top.to_string());
    // Said once.
    let comments = client.comments;
    while client.comments < comments + 2 {
        assert!(client.fill().await);
        client.unchunk();
        client.comments += client.text.len() / 2;
        assert!(client.text.drain(..).all(|byte| byte == b':' || byte == b'\n'));
    }
    server.publish_kind("a", Some("also"), "4").await;
    assert_eq!(client.next().await.json()["data"], 4);
}

// === many channels ===

#[tokio::test]
async fn many_channels_resume_with_one_token() {
    let server = Server::start().await;
    let names: Vec<String> = (0..5).map(|n| format!("c{n}")).collect();
    let query = names.iter().map(|name| format!("channel={name}")).collect::<Vec<_>>().join("&");
    let mut client = server.stream(&query).await;
    let open = client.opening().await;
    let listed: Vec<_> = open.json()["channels"].as_array().unwrap().iter().map(|at| at["channel"].clone()).collect();
    assert_eq!(listed, names.iter().map(|name| json!(name)).collect::<Vec<_>>());

    let mut want: BTreeMap<String, u64> = BTreeMap::new();
    let mut seen: BTreeMap<String, u64> = BTreeMap::new();
    let mut id = open.id;
    for round in 0..20 {
        for n in 0..200 {
            let name = &names[(n * 7 + round) % names.len()];
            server.publish(name, "0").await;
            *want.entry(name.clone()).or_default() += 1;
        }
        // Breaks off anywhere; comes back with the last id that a browser would have.
        for _ in 0..(fastrand::usize(1..150)) {
            if seen == want {
                break;
            }
            let block = client.next().await;
            assert_eq!(block.event, "");
            let event = block.json();
            let last = seen.entry(event["channel"].as_str().unwrap().to_owned()).or_default();
            // At least once, in order, nothing left out.
            assert!(block.offset() <= *last + 1, "{} after {last}", block.offset());
            *last = block.offset().max(*last);
            id = block.id;
        }
        if round % 3 == 0 {
            drop(client);
            client = server.resume(&query, &id).await;
            client.opening().await;
        }
    }
    while seen != want {
        let block = client.next().await;
        let event = block.json();
        let last = seen.entry(event["channel"].as_str().unwrap().to_owned()).or_default();
        assert!(block.offset() <= *last + 1, "{} after {last}", block.offset());
        *last = block.offset().max(*last);
    }
    drop(client);
    server.empty().await;
}

#[tokio::test]
async fn a_token_of_other_channels_is_a_gap_for_each() {
    let server = Server::start().await;
    let mut client = server.stream("channel=a&channel=b").await;
    let id = client.opening().await.id;
    let mut client = server.resume("channel=a&channel=c", &id).await;
    client.opening().await;
    for name in ["a", "c"] {
        let gap = client.next().await.json();
        assert_eq!((&gap["channel"], &gap["reason"]), (&json!(name), &json!("bad_position")));
    }
}

#[tokio::test]
async fn ids_for_all_events() {
    let server = Server::start().await;
    let start = server.stream("channel=a&channel=b&ids=all").await.opening().await.id;
    for n in 0..100 {
        server.publish(["a", "b"][n % 2], &n.to_string()).await;
    }
    let mut client = server.resume("channel=a&channel=b&ids=all", &start).await;
    client.opening().await;
    let (mut ids, mut all) = (Vec::new(), Vec::new());
    for _ in 0..100 {
        let block = client.next().await;
        all.push(block.json()["data"].as_u64().unwrap());
        ids.push(block.id);
    }
    ids.dedup();
    assert_eq!(ids.len(), 100);
    // Each is exact: nothing before it comes again, and nothing after it is missing.
    for at in [0, 1, 63, 64, 98, 99] {
        let mut client = server.resume("channel=a&channel=b", &ids[at]).await;
        client.opening().await;
        let mut rest = Vec::new();
        for _ in at + 1..100 {
            rest.push(client.next().await.json()["data"].as_u64().unwrap());
        }
        rest.sort();
        let mut want = all[at + 1..].to_vec();
        want.sort();
        assert_eq!(rest, want);
    }
}

#[tokio::test]
async fn long_tokens_are_rare_and_never_late() {
    let server = Server::start().await;
    let query = (0..100).map(|n| format!("channel=channel-{n}")).collect::<Vec<_>>().join("&");
    for n in 0..100 {
        server.publish(&format!("channel-{n}"), "0").await;
    }
    let mut client = server.stream(&query).await;
    let opened = client.opening().await.id;
    assert!(opened.len() > 64 && opened.len() <= 2048);
    let start = Instant::now();
    let mut ids = vec![opened];
    let mut n = 0;
    while start.elapsed() < Duration::from_millis(1500) {
        server.publish(&format!("channel-{}", n % 100), "1").await;
        ids.push(client.next().await.id);
        n += 1;
    }
    ids.dedup();
    assert!((2..=3).contains(&ids.len()), "{} tokens", ids.len());
    let position = loop {
        let block = client.next().await;
        if block.event == "weir.position" {
            break block;
        }
    };
    assert!(start.elapsed() < Duration::from_millis(1500 + 1300));
    // It stands for everything that came.
    let mut again = server.resume(&query, &position.id).await;
    again.opening().await;
    server.publish("channel-0", "2").await;
    assert_eq!(again.next().await.json()["data"], 2);
}

// === refusals ===

#[tokio::test]
async fn what_is_wrong_for_ever_is_a_status() {
    let server = Server::start().await;
    let many = (0..101).map(|n| format!("channel=c{n}")).collect::<Vec<_>>().join("&");
    for (query, accept, status) in [
        ("", "*/*", 400),
        ("channel=", "*/*", 400),
        ("chanel=a", "*/*", 400),
        ("channel=a&format=xml", "*/*", 400),
        ("channel=a&ids=some", "*/*", 400),
        ("channel=a&last=x", "*/*", 400),
        ("channel=a&type=", "*/*", 400),
        (many.as_str(), "*/*", 400),
        ("channel=a", "application/json", 406),
    ] {
        let mut client = server
            .request(&format!("GET /v1/sse?{query} HTTP/1.1\r\nhost: localhost\r\naccept: {accept}\r\n\r\n"))
            .await;
        let head = client.head().await;
        assert!(head.starts_with(&format!("http/1.1 {status} ")), "{query}: {head}");
        assert!(head.contains("content-type: application/problem+json"));
    }
    let mut client = server.stream("channel=a&_=1").await;
    client.opening().await;
}

#[tokio::test]
async fn what_will_pass_is_said_in_band() {
    let server = Server::start().await;
    let mut open = server.stream("channel=a").await;
    open.opening().await;
    server.wheel.drain(Duration::from_millis(1));
    let retry = open.next().await;
    assert_eq!(retry.event, "weir.retry");
    assert_eq!(retry.json(), json!({"code": "draining", "after_ms": open.retry.unwrap()}));
    assert_eq!(open.block().await, None);
    assert!(open.ended, "the chunks have an end");
    open.closed().await;

    let mut late = server.stream("channel=a").await;
    let retry = late.next().await;
    assert_eq!((retry.event.as_str(), retry.id.as_str()), ("weir.retry", ""));
    assert_eq!(retry.json(), json!({"code": "draining", "after_ms": late.retry.unwrap()}));
    assert!(late.retry.unwrap() >= 1000);
    assert_eq!(late.block().await, None);
}

#[tokio::test]
async fn beyond_the_cap_of_connections() {
    let limits = Limits { connections: 2, ..Limits::default() };
    let server = Server::with(Setup { limits, ..Setup::default() }).await;
    let mut streams = vec![server.stream("channel=a").await, server.stream("channel=a").await];
    for client in &mut streams {
        client.opening().await;
    }
    let mut client = server.stream("channel=a").await;
    let retry = client.next().await;
    assert_eq!((retry.event.as_str(), &retry.json()["code"]), ("weir.retry", &json!("overloaded")));
    client.closed().await;
    let mut client = server.request("GET /v1/channels HTTP/1.1\r\nhost: localhost\r\n\r\n").await;
    let head = client.head().await;
    assert!(head.starts_with("http/1.1 503 ") && head.contains("retry-after: "), "{head}");
    client.closed().await;
    drop(streams);
    server.empty().await;
    server.stream("channel=a").await.opening().await;
}

// === connections ===

const GET: &str = "GET /v1/sse?channel=a HTTP/1.1\r\nhost: localhost\r\n\r\n";
const OTHER: &str = "GET /v1/channels HTTP/1.1\r\nhost: localhost\r\n\r\n";

#[tokio::test]
async fn requests_before_and_behind_in_one_segment() {
    let server = Server::start().await;
    let mut client = server.request(&format!("{OTHER}{OTHER}{GET}{OTHER}")).await;
    for _ in 0..2 {
        let head = client.head().await;
        assert!(client.body(&head).await.contains("channels"));
    }
    client.chunked = None;
    client.opening().await;
    server.publish("a", "1").await;
    assert_eq!(client.next().await.json()["data"], 1);
    drop(client);
    server.empty().await;
}

#[tokio::test]
async fn a_connection_leaves_only_when_its_head_is_written() {
    let server = Server::start().await;
    // A pipe of 64 bytes: the head needs several turns, and what hyper has not written when it is left is lost.
    let (mut ours, theirs) = tokio::io::duplex(64);
    server.connections.serve(Io::Pipe(theirs), server.at, &server.door);
    ours.write_all(GET.as_bytes()).await.unwrap();
    let mut text = String::new();
    let mut scrap = [0; 7];
    while !text.ends_with("data: {\"channels\":[{\"channel\":\"a\",\"position\":\"0-") {
        let n = soon(ours.read(&mut scrap)).await.unwrap();
        for byte in &scrap[..n] {
            text.push(*byte as char);
            if text.ends_with("\"0-") {
                break;
            }
        }
        assert!(n > 0, "{text}");
    }
    let (head, body) = text.split_once("\r\n\r\n").unwrap();
    assert!(head.starts_with("HTTP/1.1 200 OK\r\n") && head.contains("\r\ndate: "), "{head}");
    assert!(body.starts_with("0000") && body[6..].starts_with("\r\nretry: "), "{body}");
    drop(ours);
    server.empty().await;
}

#[tokio::test]
async fn a_request_byte_by_byte() {
    let server = Server::start().await;
    let mut client = server.request("").await;
    client.socket.set_nodelay(true).unwrap();
    for byte in GET.as_bytes() {
        client.socket.write_all(&[*byte]).await.unwrap();
        tokio::task::yield_now().await;
    }
    client.opening().await;
    server.publish("a", "1").await;
    assert_eq!(client.next().await.json()["data"], 1);
}

#[tokio::test]
async fn http_1_0_ends_with_the_connection() {
    let server = Server::start().await;
    for connection in ["", "connection: keep-alive\r\n"] {
        let request = format!("GET /v1/sse?channel=a HTTP/1.0\r\nhost: localhost\r\n{connection}\r\n");
        let mut client = server.request(&request).await;
        let head = client.head().await;
        assert!(head.starts_with("http/1.0 200 ") && !head.contains("chunked"), "{head}");
        client.opening().await;
        server.publish("a", "1").await;
        assert_eq!(client.next().await.json()["data"], 1);
    }
    let mut client = server.request("GET /v1/sse?channel=a HTTP/1.0\r\nhost: localhost\r\n\r\n").await;
    client.head().await;
    client.opening().await;
    server.wheel.drain(Duration::from_millis(1));
    assert_eq!(client.next().await.event, "weir.retry");
    assert_eq!(client.block().await, None);
}

#[tokio::test]
async fn head_opens_nothing_and_the_connection_goes_on() {
    let server = Server::start().await;
    let mut client = server.request(&format!("{}{OTHER}", GET.replace("GET", "HEAD"))).await;
    let head = client.head().await;
    assert!(head.starts_with("http/1.1 200 ") && head.contains("text/event-stream"), "{head}");
    let head = client.head().await;
    assert!(client.body(&head).await.contains("channels"));
    assert_eq!(server.open().2, 0);
    assert_eq!(server.metrics.connections_accepted[Transport::Sse].get(), 0);
}

#[tokio::test]
async fn the_same_resource_by_accept() {
    let server = Server::start().await;
    let request = "GET /v1/events?channel=a HTTP/1.1\r\nhost: localhost\r\norigin: http://localhost:5000\r\n\
                   accept: text/event-stream\r\n\r\n";
    let mut client = server.request(request).await;
    let head = client.head().await;
    assert!(head.contains("\r\nvary: accept"), "{head}");
    assert!(head.contains("\r\naccess-control-allow-origin: http://localhost:5000\r\n"), "{head}");
    client.opening().await;
}

#[tokio::test]
async fn a_client_that_goes_in_any_way() {
    let server = Server::start().await;
    // Half closed: nobody who streams says so and reads on.
    let mut client = server.stream("channel=a").await;
    client.opening().await;
    client.socket.shutdown().await.unwrap();
    client.closed().await;
    server.empty().await;
    // Reset.
    let mut client = server.stream("channel=a").await;
    client.opening().await;
    socket2::SockRef::from(&client.socket).set_linger(Some(Duration::ZERO)).unwrap();
    drop(client);
    server.empty().await;
    // Gone with the request.
    let mut client = server.request(GET).await;
    client.socket.shutdown().await.unwrap();
    client.closed().await;
    server.empty().await;
    // With much to say.
    let mut client = server.stream("channel=a").await;
    client.opening().await;
    let _ = client.socket.write_all(&[b'x'; 20_000]).await;
    client.closed().await;
    server.empty().await;
}

#[tokio::test]
async fn ten_thousand_abrupt_disconnects() {
    let server = Server::start().await;
    let mut n = 0;
    for round in 0..40 {
        let mut clients = Vec::new();
        for _ in 0..250 {
            n += 1;
            let query = if n % 3 == 0 { "channel=a&channel=b" } else { "channel=a" };
            clients.push(server.stream(query).await);
        }
        for (at, client) in clients.iter_mut().enumerate() {
            match (at + round) % 4 {
                0 => {}
                1 => drop(client.head().await),
                2 => drop(client.opening().await),
                _ => socket2::SockRef::from(&client.socket).set_linger(Some(Duration::ZERO)).unwrap(),
            }
            if at % 50 == 0 {
                server.publish("a", "1").await;
            }
        }
    }
    assert_eq!(n, 10_000);
    server.empty().await;
}

#[tokio::test]
async fn a_slow_reader_gets_everything_in_order() {
    let server = Server::start().await;
    let socket = TcpSocket::new_v4().unwrap();
    socket.set_recv_buffer_size(4096).unwrap();
    let mut client = Client::new(socket.connect(server.at).await.unwrap());
    client.socket.write_all(GET.as_bytes()).await.unwrap();
    client.opening().await;
    let text = "x".repeat(20_000);
    for n in 0..400 {
        server.publish("a", &format!(r#"[{n},"{text}"]"#)).await;
    }
    for n in 0..400 {
        let data = &client.next().await.json()["data"];
        assert_eq!((&data[0], data[1].as_str().unwrap().len()), (&json!(n), text.len()));
    }
}

#[tokio::test]
async fn who_does_not_read_at_all_is_closed() {
    let sse = Settings { stalled: Duration::from_secs(1), ..Settings::default() };
    let server = Server::with(Setup { sse, ..Setup::default() }).await;
    let mut client = server.stream("channel=a").await;
    client.opening().await;
    let text = format!(r#""{}""#, "x".repeat(500_000));
    for _ in 0..40 {
        server.publish("a", &text).await;
    }
    server.empty().await;
    let closed = server.metrics.render();
    assert!(closed.contains(r#"weir_connections_closed_total{transport="sse",reason="slow"} 1"#), "{closed}");
}

#[tokio::test]
async fn who_never_finishes_a_head_or_asks_nothing_is_closed() {
    let limits =
        Limits { header_timeout: Duration::from_secs(1), idle_timeout: Duration::from_secs(1), ..Limits::default() };
    let server = Server::with(Setup { limits, ..Setup::default() }).await;
    let mut clients = Vec::new();
    for begun in ["", "P", "PRI * HTTP/2.0\r\n", "GET /v1/sse?channel=a HTTP/1.1\r\nhost: ", OTHER] {
        clients.push(server.request(begun).await);
    }
    let mut stream = server.stream("channel=a").await;
    stream.opening().await;
    for mut client in clients {
        client.closed().await;
    }
    eventually("the stream alone is open", || server.open() == (1, 1, 1, 1)).await;
}

#[tokio::test]
async fn a_head_too_large_is_refused() {
    let server = Server::start().await;
    let request = format!("GET /v1/sse?channel=a HTTP/1.1\r\nhost: localhost\r\nx: {}\r\n\r\n", "x".repeat(20_000));
    let mut client = server.request(&request).await;
    assert!(client.head().await.starts_with("http/1.1 431 "));
}

#[tokio::test]
async fn draining_closes_what_is_idle_and_waits_for_the_rest() {
    let server = Server::start().await;
    let mut idle = server.request(OTHER).await;
    let head = idle.head().await;
    idle.body(&head).await;
    let mut streams = Vec::new();
    for _ in 0..50 {
        streams.push(server.stream("channel=a&channel=b").await);
    }
    for client in &mut streams {
        client.opening().await;
    }
    server.stop.cancel();
    server.wheel.drain(Duration::from_secs(1));
    let start = Instant::now();
    soon(server.connections.closed()).await;
    assert!(start.elapsed() < Duration::from_secs(5));
    for client in &mut streams {
        assert_eq!(client.next().await.event, "weir.retry");
        assert_eq!(client.block().await, None);
        assert!(client.ended);
    }
    idle.closed().await;
    assert!(TcpStream::connect(server.at).await.is_err(), "the listener is closed");
}

// === HTTP/2 ===

#[tokio::test]
async fn http_2_by_prior_knowledge() {
    use http_body_util::{BodyExt, Empty};
    use hyper_util::rt::{TokioExecutor, TokioIo};

    let server = Server::start().await;
    let socket = TcpStream::connect(server.at).await.unwrap();
    let (mut sender, connection) =
        hyper::client::conn::http2::handshake(TokioExecutor::new(), TokioIo::new(socket)).await.unwrap();
    tokio::spawn(connection);
    let mut bodies = Vec::new();
    for _ in 0..100 {
        let request = http::Request::get(format!("http://localhost:{}/v1/sse?channel=a", server.at.port()))
            .body(Empty::<bytes::Bytes>::new())
            .unwrap();
        let response = soon(sender.send_request(request)).await.unwrap();
        assert_eq!((response.status().as_u16(), response.version()), (200, http::Version::HTTP_2));
        bodies.push(response.into_body());
    }
    assert_eq!((server.open().0, server.open().2), (1, 100));
    let at = server.publish("a", "1").await;
    for body in &mut bodies {
        let mut text = Vec::new();
        while !text.ends_with(b"\"data\":1}\n\n") {
            text.extend_from_slice(&soon(body.frame()).await.unwrap().unwrap().into_data().unwrap());
        }
        let text = String::from_utf8(text).unwrap();
        assert!(text.starts_with("retry: ") && text.contains(&format!("\n\nid: {at}\ndata: {{")), "{text}");
    }
    drop(bodies);
    eventually("the streams are gone", || server.open().2 == 0).await;
    drop(sender);
    server.empty().await;
}
