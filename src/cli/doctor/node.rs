//! Examines a node through the proxies in front of it, which may buffer streams, close idle connections and reject large
//! bodies. None of that is in a log of weir.

use std::{
    collections::VecDeque,
    time::{Duration, Instant},
};

use futures_util::{SinkExt as _, StreamExt as _};
use http::{Method, header};
use http_body_util::BodyExt as _;
use hyper::body::Incoming;
use serde_json::{Value, json};
use tokio::time::{sleep, timeout};
use tokio_tungstenite::tungstenite::Message;

use super::{
    latency::{Latency, Span},
    report::{Report, unix_time},
};
use crate::{
    cli::{
        args::Remote,
        client::{NOT_FROM_WEIR, NodeClient, NodeResponse},
        provide::{NodeSocket, upgrade},
        request_target::RequestTarget,
        sse::{self, SseEvent, SseParser},
    },
    duration,
    terminal::{Failure, note},
};

/// Timeout of requests that a node answers at once.
const RESPONSE_TIMEOUT: Duration = Duration::from_secs(10);
/// An event that has not arrived after this time is buffered on the way.
const BUFFERED: Duration = Duration::from_secs(5);
/// A higher latency is a problem.
const SLOW: Duration = Duration::from_secs(1);
/// Enough bytes to fill the buffer of a proxy.
const PADDING: usize = 64 << 10;
/// The wait of the first long-poll.
const SHORT_POLL: Duration = Duration::from_secs(3);
/// The wait of the long-poll of `--long`: the default maximum of weir.
const LONG_POLL: Duration = Duration::from_secs(55);
/// How long `--long` keeps connections idle. Most proxies have an idle timeout of a minute.
const IDLE: Duration = Duration::from_secs(75);
/// The size of the large body, in bytes: more than 1 MB, the default limit of nginx.
const LARGE: usize = 3 << 19;

const NO_NODE: &str = "there is no node to examine";
const FOREIGN: &str = "another server responds: is the path of the URL correct?";
const BUFFERS: &str = "a proxy buffers responses: disable buffering and compression of text/event-stream (nginx: \
                       proxy_buffering off), and forward X-Accel-Buffering to outer proxies";
const CLOSES_IDLE: &str = "a proxy closes idle connections: raise its idle or read timeout above 60s (nginx: \
                        proxy_read_timeout 75s)";

/// Examines a node. `long`: idle connections too.
pub(crate) async fn examine(remote: &Remote, long: bool, report: &mut Report<'_>) -> Result<(), Failure> {
    let mut client = NodeClient::of_doctor(remote)?;
    report.of(client.base.to_string());
    reach(&mut client, report).await?;
    ready(&mut client, report).await?;
    version(&mut client, report).await?;
    clock(&mut client, report).await?;
    let channel = format!("weir.doctor.{:08x}", fastrand::u32(..));
    let mut probe = Probe { remote, client, channel, published: 0 };
    let examined = probe.examine(long, report).await;
    probe.clean_up().await;
    examined
}

async fn reach(client: &mut NodeClient, report: &mut Report<'_>) -> Result<(), Failure> {
    let target = RequestTarget::new("/health/live");
    let mut taken = Vec::new();
    for _ in 0..20 {
        let began = Instant::now();
        let response = match client.exchange(Method::GET, &target, None, RESPONSE_TIMEOUT).await {
            Ok(response) => response,
            Err(Failure::Unavailable(reason)) => {
                let change = match &reason {
                    reason if reason.contains("certificate") => {
                        "correct the certificate, or trust its authority (SSL_CERT_FILE=ca.pem)"
                    }
                    reason if reason.contains("invalid HTTP") => "does the server speak TLS? use https://",
                    _ => "start it, or use the URL of its clients",
                };
                report.problem("reach", reason, change)?;
                return Err(Failure::Unavailable(NO_NODE.into()));
            }
            Err(other) => return Err(other),
        };
        if !response.status.is_success() {
            return reached_error(&response, report);
        }
        if let Err(Failure::Failed(reason)) = response.into_json() {
            report.problem("reach", reason, FOREIGN)?;
            return Err(Failure::Unavailable(NO_NODE.into()));
        }
        taken.push(began.elapsed());
    }
    // The first request opened the connection.
    let opening = taken.remove(0);
    let latency = Latency::of(taken);
    let found = format!(
        "responds in {}, the slowest of 20 in {}; the first took {}",
        Span(latency.median()),
        Span(latency.longest()),
        Span(opening)
    );
    match latency.median() > SLOW / 4 {
        true => {
            report.advice("reach", found, "every publish and call has this latency: run clients nearer to the node")
        }
        false => report.ok("reach", found),
    }
}

/// Reports that `/health/live` responds with an error, which a weir that serves this client does not.
fn reached_error(response: &NodeResponse, report: &mut Report<'_>) -> Result<(), Failure> {
    let status = response.status;
    let (found, change) = match response.problem() {
        Some(problem) => (
            format!("weir responds {status}, {} ({}): {}", problem.title, problem.code, problem.detail),
            match problem.code.as_str() {
                "unauthorized" | "token_expired" => "pass credentials with --token",
                _ if status.is_server_error() => "see the log of the node; it may be shutting down",
                _ => "do what the response says; the log of the node has more",
            },
        ),
        None => (
            response.reason(),
            match status.as_u16() {
                300..=399 => "use the URL that it redirects to: clients of weir do not follow redirects",
                401 | 403 | 407 => {
                    "a proxy rejects the request: pass the credentials that it requires (--token), or permit it"
                }
                502..=504 => "a proxy does not reach the node: is it running, and does the proxy have its address?",
                _ => FOREIGN,
            },
        ),
    };
    report.problem("reach", found, change)?;
    // The rejection of a proxy counts, because the credentials may be for it.
    match status.is_client_error() && (response.problem().is_some() || matches!(status.as_u16(), 401 | 403 | 407)) {
        true => Err(Failure::Rejected(format!("the request is rejected with status {status}"))),
        false => Err(Failure::Unavailable(NO_NODE.into())),
    }
}

async fn ready(client: &mut NodeClient, report: &mut Report<'_>) -> Result<(), Failure> {
    match client.fetch(Method::GET, &RequestTarget::new("/health/ready"), None, RESPONSE_TIMEOUT).await {
        Ok(_) => report.ok("ready", "accepts clients"),
        Err(Failure::Unavailable(reason) | Failure::Rejected(reason) | Failure::Failed(reason)) => report.problem(
            "ready",
            format!("does not accept clients: {reason}"),
            "see the log of the node; it may be shutting down",
        ),
        Err(other) => Err(other),
    }
}

async fn version(client: &mut NodeClient, report: &mut Report<'_>) -> Result<(), Failure> {
    const OURS: &str = env!("CARGO_PKG_VERSION");
    let response = client.fetch(Method::GET, &RequestTarget::new("/openapi.json"), None, RESPONSE_TIMEOUT).await;
    let document: Value = match response {
        Ok(Some(document)) => serde_json::from_str(document.get()).unwrap_or_default(),
        _ => Value::Null,
    };
    if document["info"]["title"].as_str().is_some_and(|title| title != "weir") {
        report.problem("version", format!("the server is not weir, but {}", document["info"]["title"]), FOREIGN)?;
        return Err(Failure::Unavailable(NO_NODE.into()));
    }
    match document["info"]["version"].as_str() {
        Some(OURS) => report.ok("version", format!("weir {OURS}")),
        Some(theirs) => report.ok("version", format!("weir {theirs}; this command is version {OURS}")),
        None => report.advice("version", "unknown", "let proxies forward /openapi.json"),
    }
}

async fn clock(client: &mut NodeClient, report: &mut Report<'_>) -> Result<(), Failure> {
    let target = RequestTarget::new("/v1/services/weir/time");
    let (began, requested) = (Instant::now(), unix_time());
    let response = match client.fetch(Method::POST, &target, None, RESPONSE_TIMEOUT).await {
        Ok(response) => response,
        Err(error) => return rejected("clock", error, "call weir/time", report),
    };
    let taken = began.elapsed();
    let result: Value = response.and_then(|result| serde_json::from_str(result.get()).ok()).unwrap_or_default();
    let Some(theirs) = result["time"].as_u64() else {
        return report.advice("clock", "unknown", "let proxies forward /v1/services/weir/time");
    };
    report.clock("the clock of the node", Duration::from_millis(theirs), requested, taken)
}

/// Reports an error of a request. A missing permission is not a problem of the node, but it prevents the check.
fn rejected(check: &str, error: Failure, permission: &str, report: &mut Report<'_>) -> Result<(), Failure> {
    match error {
        Failure::Rejected(reason) if reason.starts_with("unauthorized") || reason.starts_with("token_expired") => {
            Err(Failure::Rejected(format!("{reason}; pass credentials with --token")))
        }
        Failure::Rejected(reason) if reason.contains(NOT_FROM_WEIR) => {
            report.problem(check, reason, "a proxy rejects the request: let it forward /v1/")
        }
        // Of the paths that the command uses, all listeners for clients have all.
        Failure::Rejected(reason) if reason.starts_with("not_found") => {
            report.problem(
                check,
                reason,
                "use the URL of the clients: an admin listener (admin.listen) does not serve them",
            )?;
            Err(Failure::Failed("the listener does not serve clients".into()))
        }
        Failure::Rejected(reason) => report.advice(check, reason, format!("use a token that permits to {permission}")),
        Failure::Unavailable(reason) | Failure::Failed(reason) => {
            report.problem(check, reason, "see the logs of the node and of its proxies")
        }
        other => Err(other),
    }
}

/// The checks that use a channel, which has a random name.
struct Probe<'a> {
    remote: &'a Remote,
    client: NodeClient,
    channel: String,
    published: u64,
}

impl Probe<'_> {
    async fn examine(&mut self, long: bool, report: &mut Report<'_>) -> Result<(), Failure> {
        self.stream(report).await?;
        self.poll(report).await?;
        self.socket(report).await?;
        self.large(report).await?;
        if long { self.idle(report).await } else { Ok(()) }
    }

    /// Deletes the events. If the token does not permit that, retention deletes them.
    async fn clean_up(&mut self) {
        if self.published > 0 {
            let target = RequestTarget::new("/v1/events").query("channel", &self.channel);
            let _ = self.client.fetch(Method::DELETE, &target, None, RESPONSE_TIMEOUT).await;
        }
    }

    async fn publish(&mut self, padding: usize) -> Result<u64, Failure> {
        let number = self.published + 1;
        let event = json!({ "channel": self.channel, "data": { "n": number, "padding": ".".repeat(padding) } });
        let body = event.to_string().into_bytes();
        self.client.fetch(Method::POST, &RequestTarget::new("/v1/events"), Some(body), RESPONSE_TIMEOUT).await?;
        self.published = number;
        Ok(number)
    }

    /// Measures when a stream begins and how long each event takes, which shows buffering proxies.
    async fn stream(&mut self, report: &mut Report<'_>) -> Result<(), Failure> {
        let began = Instant::now();
        let mut stream = match ProbeStream::open(self.remote, &self.channel).await {
            Ok(stream) => stream,
            Err(error) => return rejected("stream", error, "subscribe to weir.doctor.*", report),
        };
        if let Some(encoding) = &stream.encoding {
            return report.problem("stream", format!("compressed by a proxy ({encoding})"), BUFFERS);
        }
        match timeout(BUFFERED, stream.next()).await {
            Ok(Ok(event)) if event.kind == "weir.open" => {}
            Ok(Ok(event)) => {
                return report.problem("stream", format!("begins with {:?}", event.kind), "is the node overloaded?");
            }
            Ok(Err(reason)) => return report.problem("stream", reason, BUFFERS),
            Err(_) => {
                let found =
                    format!("no event within {}, although the node sends the first one at once", Span(BUFFERED));
                return report.problem("stream", found, BUFFERS);
            }
        }
        let first = began.elapsed();
        let mut taken = Vec::new();
        for _ in 0..5 {
            let began = Instant::now();
            let number = match self.publish(0).await {
                Ok(number) => number,
                Err(error) => {
                    report.ok("stream", format!("begins after {}", Span(first)))?;
                    return rejected("events", error, "publish to weir.doctor.*", report);
                }
            };
            match stream.event(number).await {
                Ok(()) => taken.push(began.elapsed()),
                Err(Some(reason)) => return report.problem("stream", reason, CLOSES_IDLE),
                Err(None) => return self.buffered(stream, number, report).await,
            }
            // With pauses, because the next event would flush the buffer of a proxy that delays small writes.
            sleep(Duration::from_millis(50)).await;
        }
        let latency = Latency::of(taken);
        let found = format!(
            "begins after {}; events arrive {} after they are published, the slowest after {}",
            Span(first),
            Span(latency.median()),
            Span(latency.longest())
        );
        match latency.median() > SLOW {
            true => report.problem("stream", found, BUFFERS),
            false => report.ok("stream", found),
        }
    }

    /// Reports an event that has not arrived: it may be in a buffer that more bytes flush.
    async fn buffered(&mut self, mut stream: ProbeStream, number: u64, report: &mut Report<'_>) -> Result<(), Failure> {
        if let Err(error) = self.publish(PADDING).await {
            return rejected("stream", error, "publish to weir.doctor.*", report);
        }
        let removed = if stream.unbuffered { "" } else { "; a proxy removed X-Accel-Buffering" };
        let found = match stream.event(number).await {
            Ok(()) => format!("an event arrives only after {PADDING} more bytes have been sent{removed}"),
            Err(_) => format!("an event does not arrive within {}{removed}", Span(BUFFERED)),
        };
        report.problem("stream", found, BUFFERS)
    }

    /// A long-poll must wait as long as it requests, and end at the first event.
    async fn poll(&mut self, report: &mut Report<'_>) -> Result<(), Failure> {
        let began = Instant::now();
        let next = match self.long_poll(SHORT_POLL).await {
            Ok(next) => next,
            Err(Failure::Unavailable(reason) | Failure::Failed(reason)) => {
                let found =
                    format!("requested to wait for {}, after {}: {reason}", Span(SHORT_POLL), Span(began.elapsed()));
                return report.problem("long-poll", found, CLOSES_IDLE);
            }
            Err(other) => return rejected("long-poll", other, "subscribe to weir.doctor.*", report),
        };
        let waited = began.elapsed();
        if waited < SHORT_POLL * 9 / 10 {
            let found = format!("requested to wait for {}, it ends after {}", Span(SHORT_POLL), Span(waited));
            return report.problem("long-poll", found, "is the node shutting down, or does a proxy respond for it?");
        }
        if self.published == 0 {
            return report.ok("long-poll", format!("waits as long as requested ({})", Span(SHORT_POLL)));
        }
        let mut other = NodeClient::of_doctor(self.remote)?;
        let target = RequestTarget::new("/v1/events").query("channel", &self.channel).query("after", next);
        let target = target.query("wait", "10s");
        let publish = async {
            // By then the long-poll should be waiting; if it is not, it ends even sooner.
            sleep(Duration::from_millis(200)).await;
            let began = Instant::now();
            self.publish(0).await.map(|_| began)
        };
        let (response, began) = tokio::join!(other.fetch(Method::GET, &target, None, 2 * RESPONSE_TIMEOUT), publish);
        let (Ok(_), Ok(began)) = (&response, began) else {
            return match response {
                Err(error) => rejected("long-poll", error, "read weir.doctor.*", report),
                Ok(_) => report.advice("long-poll", "no event could be published to it", "try again"),
            };
        };
        let taken = began.elapsed();
        let found = format!("waits as long as requested; an event ends it after {}", Span(taken));
        match taken > BUFFERED {
            true => report.problem("long-poll", found, BUFFERS),
            false => report.ok("long-poll", found),
        }
    }

    /// A long-poll without an event. Returns its position.
    async fn long_poll(&self, wait: Duration) -> Result<String, Failure> {
        let target = RequestTarget::new("/v1/events").query("channel", &self.channel).query("after", "now");
        let target = target.query("wait", duration::format(wait));
        let response =
            NodeClient::of_doctor(self.remote)?.fetch(Method::GET, &target, None, wait + RESPONSE_TIMEOUT).await?;
        let page: Value = response.and_then(|page| serde_json::from_str(page.get()).ok()).unwrap_or_default();
        let next = page["next"].as_str().map(ToOwned::to_owned);
        next.ok_or_else(|| Failure::Failed("unexpected response to a long-poll; is this a weir node?".into()))
    }

    async fn socket(&mut self, report: &mut Report<'_>) -> Result<(), Failure> {
        const FORWARD: &str = "forward WebSockets to /v1/ws (nginx: proxy_http_version 1.1, and the headers Upgrade and \
                               Connection)";
        let began = Instant::now();
        let opened = timeout(RESPONSE_TIMEOUT, upgrade(&self.client)).await;
        let mut socket = match opened {
            Ok(Ok(socket)) => socket,
            Ok(Err(Failure::Rejected(reason))) if reason.starts_with("upgrade_required") => {
                return report.problem("websocket", "the request arrives without its Upgrade header", FORWARD);
            }
            Ok(Err(Failure::Rejected(reason))) if !reason.contains(NOT_FROM_WEIR) => {
                return rejected("websocket", Failure::Rejected(reason), "connect", report);
            }
            Ok(Err(Failure::Rejected(reason) | Failure::Unavailable(reason) | Failure::Failed(reason))) => {
                return report.problem("websocket", reason, FORWARD);
            }
            Ok(Err(other)) => return Err(other),
            Err(_) => {
                return report.problem("websocket", format!("no response within {}", Span(RESPONSE_TIMEOUT)), FORWARD);
            }
        };
        let opening = began.elapsed();
        let mut taken = Vec::new();
        for number in 0..20 {
            let began = Instant::now();
            if let Err(reason) = echo(&mut socket, number).await {
                return report.problem("websocket", format!("opens after {}, then: {reason}", Span(opening)), FORWARD);
            }
            taken.push(began.elapsed());
        }
        let latency = Latency::of(taken);
        let _ = timeout(SLOW, socket.close(None)).await;
        let found = format!(
            "opens after {}; a call takes {}, the slowest of 20 {}",
            Span(opening),
            Span(latency.median()),
            Span(latency.longest())
        );
        report.ok("websocket", found)
    }

    /// Publishes a small event in a large body, most of which is white space.
    async fn large(&mut self, report: &mut Report<'_>) -> Result<(), Failure> {
        let mut body = json!({ "channel": self.channel }).to_string().into_bytes();
        body.resize(LARGE, b' ');
        let change = "permit bodies of 8 MB, or publish smaller batches (nginx: client_max_body_size 9m)";
        let target = RequestTarget::new("/v1/events");
        let mut client = NodeClient::of_doctor(self.remote)?;
        let found = match client.exchange(Method::POST, &target, Some(body), RESPONSE_TIMEOUT).await {
            // An error of weir is a response to the whole body, too.
            Ok(response) if response.status.is_success() || response.problem().is_some() => {
                self.published += u64::from(response.status.is_success());
                return report.ok("body", format!("{LARGE} bytes arrive"));
            }
            Ok(response) => format!("{LARGE} bytes: {}", response.reason()),
            Err(Failure::Unavailable(reason)) => format!("{LARGE} bytes: {reason}"),
            Err(other) => return Err(other),
        };
        report.problem("body", found, change)
    }

    /// Keeps connections idle, as clients do most of the time.
    async fn idle(&mut self, report: &mut Report<'_>) -> Result<(), Failure> {
        note(format_args!("waiting for {} to detect idle timeouts", Span(IDLE)));
        let stream = async {
            let mut stream = ProbeStream::open(self.remote, &self.channel).await.ok()?;
            Some(stream.idle().await)
        };
        let socket = async {
            let mut socket = upgrade(&self.client).await.ok()?;
            let began = Instant::now();
            let read = async { while let Some(Ok(Message::Ping(_) | Message::Text(_))) = socket.next().await {} };
            let _ = timeout(IDLE, read).await;
            Some((began.elapsed(), echo(&mut socket, 0).await.is_ok()))
        };
        let poll = async {
            let began = Instant::now();
            (self.long_poll(LONG_POLL).await, began.elapsed())
        };
        let (stream, socket, (poll, polled)) = tokio::join!(stream, socket, poll);
        match stream {
            Some(IdleStream { lasted, silence, .. }) if lasted >= IDLE => {
                report.ok("idle stream", format!("stays open; longest silence {}", Span(silence)))?;
            }
            Some(IdleStream { lasted, last, .. }) => {
                let found = format!("closed after {}, {} after the last heartbeat", Span(lasted), Span(last));
                report.problem("idle stream", found, CLOSES_IDLE)?;
            }
            None => report.advice("idle stream", "could not be opened", "see the findings above")?,
        }
        match socket {
            Some((_, true)) => report.ok("idle socket", "stays open")?,
            Some((lasted, false)) => {
                report.problem("idle socket", format!("closed after {}", Span(lasted)), CLOSES_IDLE)?;
            }
            None => report.advice("idle socket", "could not be opened", "see the findings above")?,
        }
        match poll {
            Ok(_) => report.ok("idle poll", format!("ends after {}", Span(polled))),
            Err(_) => report.problem("idle poll", format!("closed after {}", Span(polled)), CLOSES_IDLE),
        }
    }
}

/// Calls `weir/echo` over the WebSocket.
async fn echo(socket: &mut NodeSocket, number: u32) -> Result<(), String> {
    let request = json!({ "jsonrpc": "2.0", "id": number, "method": "weir/echo", "params": [number] });
    let exchange = async {
        socket.send(Message::text(request.to_string())).await.map_err(|error| error.to_string())?;
        loop {
            match socket.next().await {
                Some(Ok(Message::Text(text))) => {
                    let response: Value = serde_json::from_str(&text).unwrap_or_default();
                    if response["id"] == number {
                        // An error `forbidden` is a response, too.
                        return Ok(());
                    }
                }
                Some(Ok(_)) => {}
                Some(Err(error)) => return Err(error.to_string()),
                None => return Err("closed".to_owned()),
            }
        }
    };
    timeout(BUFFERED, exchange).await.unwrap_or_else(|_| Err(format!("no response within {}", Span(BUFFERED))))
}

// === ProbeStream ===

/// A stream of server-sent events that is not resumed when it ends.
struct ProbeStream {
    body: Incoming,
    parser: SseParser,
    ready: VecDeque<SseEvent>,
    encoding: Option<String>,
    /// The header that disables the buffering of proxies has arrived.
    unbuffered: bool,
}

/// The result of an idle stream.
struct IdleStream {
    lasted: Duration,
    /// The longest time without a byte, and the time between the last byte and the end.
    silence: Duration,
    last: Duration,
}

impl ProbeStream {
    async fn open(remote: &Remote, channel: &str) -> Result<Self, Failure> {
        let mut client = NodeClient::of_doctor(remote)?;
        let request = client.request(Method::GET, &RequestTarget::new("/v1/sse").query("channel", channel));
        // As browsers do, to detect proxies that compress.
        let request = request.header(header::ACCEPT_ENCODING, "gzip, br");
        let response = sse::open(&mut client, request, RESPONSE_TIMEOUT).await?;
        let encoding = response.headers().get(header::CONTENT_ENCODING).and_then(|value| value.to_str().ok());
        let encoding = encoding.filter(|encoding| *encoding != "identity").map(ToOwned::to_owned);
        let unbuffered = response.headers().contains_key("x-accel-buffering");
        let body = response.into_body();
        Ok(ProbeStream { body, parser: SseParser::default(), ready: VecDeque::new(), encoding, unbuffered })
    }

    /// Waits for bytes, which may be a heartbeat.
    async fn bytes(&mut self) -> Result<(), String> {
        match self.body.frame().await {
            Some(Ok(frame)) => {
                let mut rest = frame.data_ref().map(AsRef::as_ref).unwrap_or_default();
                loop {
                    match self.parser.next(&mut rest) {
                        Ok(Some(event)) => self.ready.push_back(event),
                        Ok(None) => return Ok(()),
                        Err(_) => return Err("not a stream of server-sent events".into()),
                    }
                }
            }
            Some(Err(error)) => Err(format!("the stream breaks: {error}")),
            None => Err("the stream ends".into()),
        }
    }

    async fn next(&mut self) -> Result<SseEvent, String> {
        loop {
            if let Some(event) = self.ready.pop_front() {
                return Ok(event);
            }
            self.bytes().await?;
        }
    }

    /// Waits for the event of this number. `Err(None)` if it does not arrive in time.
    async fn event(&mut self, number: u64) -> Result<(), Option<String>> {
        let wait = async {
            loop {
                let event = self.next().await?;
                let event: Value = serde_json::from_str(&event.data).unwrap_or_default();
                if event["data"]["n"] == number {
                    return Ok(());
                }
            }
        };
        timeout(BUFFERED, wait).await.map_err(|_| None)?.map_err(Some)
    }

    async fn idle(&mut self) -> IdleStream {
        let began = Instant::now();
        let mut last = began;
        let mut silence = Duration::ZERO;
        while let Ok(Ok(())) = timeout(IDLE.saturating_sub(began.elapsed()), self.bytes()).await {
            silence = silence.max(last.elapsed());
            last = Instant::now();
        }
        IdleStream { lasted: began.elapsed(), silence: silence.max(last.elapsed()), last: last.elapsed() }
    }
}
