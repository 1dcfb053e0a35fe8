//! A running node, through whatever stands before it: proxies hold streams back, cut what is silent and refuse
//! what is large, and none of it shows in a log of weir.

use std::{
    collections::VecDeque,
    time::{Duration, Instant, SystemTime},
};

use bytes::Bytes;
use futures_util::{SinkExt as _, StreamExt as _};
use http::{Method, Response, header};
use http_body_util::{BodyExt as _, Full};
use hyper::body::Incoming;
use serde_json::{Value, json};
use tokio::time::{sleep, timeout};
use tokio_tungstenite::tungstenite::Message;

use super::{
    super::{
        Failure, Target,
        args::Remote,
        client::{Client, whole},
        commands::client,
        provide::{Socket, upgrade},
        sse::{Block, Reader},
    },
    Report,
    latency::{Latency, Span},
};

/// How long an answer may take that should take no time.
const PATIENCE: Duration = Duration::from_secs(10);
/// What has not come after so long is held back.
const HELD: Duration = Duration::from_secs(5);
/// Later than this is late, for an event or an answer.
const LATE: Duration = Duration::from_secs(1);
/// A stream that is held back until a buffer is full comes when so much is sent after.
const PADDING: usize = 64 << 10;
/// How long the poll waits that shows whether polls may wait.
const SHORT_POLL: Duration = Duration::from_secs(3);
/// The longest wait that weir allows, and what `--long` tries.
const LONG_POLL: Duration = Duration::from_secs(55);
/// Longer than the minute after which most proxies give up.
const IDLE: Duration = Duration::from_secs(75);
/// More than the megabyte that nginx allows unless it is told.
const LARGE: usize = 3 << 19;

const BUFFERS: &str = "something between holds responses back: turn buffering and compression off for text/event-stream \
                       (nginx: proxy_buffering off), and let X-Accel-Buffering through to outer proxies";
const GIVES_UP: &str = "something between gives up on what is silent: raise its idle or read timeout above 60s \
                        (nginx: proxy_read_timeout 75s)";

/// Looks at a node. `long` also waits as long as clients do.
pub async fn examine(remote: &Remote, long: bool, report: &mut Report<'_>) -> Result<(), Failure> {
    let mut client = client(remote)?;
    report.of(client.base.to_string());
    reach(&mut client, report).await?;
    ready(&mut client, report).await?;
    version(&mut client, report).await?;
    clock(&mut client, report).await?;
    let channel = format!("weir.doctor.{:08x}", fastrand::u32(..));
    let mut probe = Probe { remote, client, channel, published: 0 };
    let looked = probe.examine(long, report).await;
    probe.leave().await;
    looked
}

async fn reach(client: &mut Client, report: &mut Report<'_>) -> Result<(), Failure> {
    let target = Target::new("/health/live");
    let mut taken = Vec::new();
    for _ in 0..20 {
        let began = Instant::now();
        if let Err(failure) = client.ask(Method::GET, &target, None, PATIENCE).await {
            let (reason, change) = match &failure {
                Failure::Unavailable(reason) => (reason, "start it, or name the URL where clients reach it"),
                Failure::Failed(reason) | Failure::Refused(reason) | Failure::Usage(reason) => {
                    (reason, "something answers there, but not as weir does: is a path missing in the URL?")
                }
                Failure::OutputClosed => return Err(failure),
            };
            report.problem("reach", reason, change)?;
            return Err(Failure::Unavailable("there is nothing to look at".into()));
        }
        taken.push(began.elapsed());
    }
    // The first has opened the connection.
    let opening = taken.remove(0);
    let latency = Latency::of(taken);
    let found = format!(
        "answers in {}, the slowest of 20 in {}; the first took {}",
        Span(latency.median()),
        Span(latency.longest()),
        Span(opening)
    );
    match latency.median() > LATE / 4 {
        true => report.advice("reach", found, "every publish and call takes at least so long: go nearer to it"),
        false => report.ok("reach", found),
    }
}

async fn ready(client: &mut Client, report: &mut Report<'_>) -> Result<(), Failure> {
    match client.ask(Method::GET, &Target::new("/health/ready"), None, PATIENCE).await {
        Ok(_) => report.ok("ready", "takes clients"),
        Err(Failure::Unavailable(reason) | Failure::Refused(reason) | Failure::Failed(reason)) => {
            report.problem("ready", format!("takes no clients: {reason}"), "see the node's log; it may be leaving")
        }
        Err(other) => Err(other),
    }
}

async fn version(client: &mut Client, report: &mut Report<'_>) -> Result<(), Failure> {
    const OURS: &str = env!("CARGO_PKG_VERSION");
    let answer = client.ask(Method::GET, &Target::new("/openapi.json"), None, PATIENCE).await;
    let document: Value = match answer {
        Ok(Some(document)) => serde_json::from_str(document.get()).unwrap_or_default(),
        _ => Value::Null,
    };
    match document["info"]["version"].as_str() {
        Some(OURS) => report.ok("version", format!("weir {OURS}")),
        Some(theirs) => report.ok("version", format!("weir {theirs}; this command is of {OURS}")),
        None => report.advice("version", "it does not say", "let /openapi.json through"),
    }
}

async fn clock(client: &mut Client, report: &mut Report<'_>) -> Result<(), Failure> {
    let target = Target::new("/v1/services/weir/time");
    let (began, before) = (Instant::now(), unix());
    let answer = match client.ask(Method::POST, &target, None, PATIENCE).await {
        Ok(answer) => answer,
        Err(failure) => return refused("clock", failure, "call weir/time", report),
    };
    let taken = began.elapsed();
    let answer: Value = answer.and_then(|answer| serde_json::from_str(answer.get()).ok()).unwrap_or_default();
    let Some(theirs) = answer["time"].as_u64() else {
        return report.advice("clock", "it does not say what time it is", "let /v1/services/weir/time through");
    };
    let theirs = Duration::from_millis(theirs);
    let ours = before + taken / 2;
    super::clock("the node's clock", theirs, ours, taken, report)
}

/// What we may not do is no failure of the node, but has not been looked at either.
fn refused(check: &str, failure: Failure, what: &str, report: &mut Report<'_>) -> Result<(), Failure> {
    match failure {
        Failure::Refused(reason) if reason.starts_with("unauthorized") || reason.starts_with("token_expired") => {
            Err(Failure::Refused(format!("{reason}; --token gives one")))
        }
        Failure::Refused(reason) => report.advice(check, reason, format!("with a token that may {what}, more is seen")),
        Failure::Unavailable(reason) | Failure::Failed(reason) => {
            report.problem(check, reason, "see the node's log, and that of what stands before it")
        }
        other => Err(other),
    }
}

/// What is looked at on a channel that is ours alone.
struct Probe<'a> {
    remote: &'a Remote,
    client: Client,
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

    /// Nothing of ours stays behind. A token that may not delete leaves what retention takes.
    async fn leave(&mut self) {
        if self.published > 0 {
            let target = Target::new("/v1/events").query("channel", &self.channel);
            let _ = self.client.ask(Method::DELETE, &target, None, PATIENCE).await;
        }
    }

    async fn publish(&mut self, padding: usize) -> Result<u64, Failure> {
        let number = self.published + 1;
        let event = json!({ "channel": self.channel, "data": { "n": number, "padding": ".".repeat(padding) } });
        let body = event.to_string().into_bytes();
        self.client.ask(Method::POST, &Target::new("/v1/events"), Some(body), PATIENCE).await?;
        self.published = number;
        Ok(number)
    }

    /// How long a stream takes to begin, and each event to come: whatever buffers shows here.
    async fn stream(&mut self, report: &mut Report<'_>) -> Result<(), Failure> {
        let began = Instant::now();
        let mut stream = match Stream::open(self.remote, &self.channel).await {
            Ok(stream) => stream,
            Err(failure) => return refused("stream", failure, "subscribe to weir.doctor.*", report),
        };
        if let Some(encoding) = &stream.encoding {
            return report.problem("stream", format!("compressed on its way ({encoding})"), BUFFERS);
        }
        match timeout(HELD, stream.next()).await {
            Ok(Ok(block)) if block.kind == "weir.open" => {}
            Ok(Ok(block)) => {
                return report.problem("stream", format!("begins with {:?}", block.kind), "is the node overloaded?");
            }
            Ok(Err(reason)) => return report.problem("stream", reason, BUFFERS),
            Err(_) => {
                let found = format!("nothing comes within {}, though the first bytes are sent at once", Span(HELD));
                return report.problem("stream", found, BUFFERS);
            }
        }
        let first = began.elapsed();
        let mut taken = Vec::new();
        for _ in 0..5 {
            let began = Instant::now();
            let number = match self.publish(0).await {
                Ok(number) => number,
                Err(failure) => {
                    report.ok("stream", format!("begins after {}", Span(first)))?;
                    return refused("events", failure, "publish to weir.doctor.*", report);
                }
            };
            match stream.event(number).await {
                Ok(()) => taken.push(began.elapsed()),
                Err(Some(reason)) => return report.problem("stream", reason, GIVES_UP),
                Err(None) => return self.held(stream, number, report).await,
            }
            // Apart from each other: a proxy that waits a little for more would otherwise have it at once.
            sleep(Duration::from_millis(50)).await;
        }
        let latency = Latency::of(taken);
        let found = format!(
            "begins after {}; events come {} after they are published, the slowest after {}",
            Span(first),
            Span(latency.median()),
            Span(latency.longest())
        );
        match latency.median() > LATE {
            true => report.problem("stream", found, BUFFERS),
            false => report.ok("stream", found),
        }
    }

    /// An event has not come. Does it, if more is sent?
    async fn held(&mut self, mut stream: Stream, number: u64, report: &mut Report<'_>) -> Result<(), Failure> {
        if let Err(failure) = self.publish(PADDING).await {
            return refused("stream", failure, "publish to weir.doctor.*", report);
        }
        let removed = if stream.unbuffered { "" } else { "; X-Accel-Buffering was removed on the way" };
        let found = match stream.event(number).await {
            Ok(()) => format!("an event comes only when {PADDING} bytes more have been sent{removed}"),
            Err(_) => format!("an event does not come within {}{removed}", Span(HELD)),
        };
        report.problem("stream", found, BUFFERS)
    }

    /// A poll waits as long as it asks for, and ends when there is something.
    async fn poll(&mut self, report: &mut Report<'_>) -> Result<(), Failure> {
        let began = Instant::now();
        let next = match self.ask_to_wait(SHORT_POLL).await {
            Ok(next) => next,
            Err(Failure::Unavailable(reason) | Failure::Failed(reason)) => {
                let found =
                    format!("asked to wait for {}, after {}: {reason}", Span(SHORT_POLL), Span(began.elapsed()));
                return report.problem("long-poll", found, GIVES_UP);
            }
            Err(other) => return refused("long-poll", other, "subscribe to weir.doctor.*", report),
        };
        let waited = began.elapsed();
        if waited < SHORT_POLL * 9 / 10 {
            let found = format!("asked to wait for {}, it ends after {}", Span(SHORT_POLL), Span(waited));
            return report.problem("long-poll", found, "is the node leaving, or does something between answer for it?");
        }
        if self.published == 0 {
            return report.ok("long-poll", format!("waits as long as it is asked to ({})", Span(SHORT_POLL)));
        }
        let mut other = client(self.remote)?;
        let target = Target::new("/v1/events").query("channel", &self.channel).query("after", next);
        let target = target.query("wait", "10s");
        let publish = async {
            // The poll should be waiting by then; if it is not, it answers even sooner.
            sleep(Duration::from_millis(200)).await;
            let began = Instant::now();
            self.publish(0).await.map(|_| began)
        };
        let (answer, began) = tokio::join!(other.ask(Method::GET, &target, None, 2 * PATIENCE), publish);
        let (Ok(_), Ok(began)) = (&answer, began) else {
            return match answer {
                Err(failure) => refused("long-poll", failure, "read weir.doctor.*", report),
                Ok(_) => report.advice("long-poll", "nothing could be published to it", "try again"),
            };
        };
        let taken = began.elapsed();
        let found = format!("waits as long as it is asked to; an event ends it after {}", Span(taken));
        match taken > HELD {
            true => report.problem("long-poll", found, BUFFERS),
            false => report.ok("long-poll", found),
        }
    }

    /// A poll that nothing ends. Answers where it stands.
    async fn ask_to_wait(&self, wait: Duration) -> Result<String, Failure> {
        let target = Target::new("/v1/events").query("channel", &self.channel).query("after", "now");
        let target = target.query("wait", crate::duration::format(wait));
        let answer = client(self.remote)?.ask(Method::GET, &target, None, wait + PATIENCE).await?;
        let page: Value = answer.and_then(|page| serde_json::from_str(page.get()).ok()).unwrap_or_default();
        let next = page["next"].as_str().map(ToOwned::to_owned);
        next.ok_or_else(|| Failure::Failed("not the answer that a weir gives to a poll".into()))
    }

    async fn socket(&mut self, report: &mut Report<'_>) -> Result<(), Failure> {
        const PASS: &str = "let WebSockets through to /v1/ws (nginx: proxy_http_version 1.1, and the headers Upgrade and \
                            Connection passed on)";
        let began = Instant::now();
        let opened = timeout(PATIENCE, upgrade(&self.client)).await;
        let mut socket = match opened {
            Ok(Ok(socket)) => socket,
            Ok(Err(Failure::Refused(reason))) if reason.starts_with("upgrade_required") => {
                return report.problem("websocket", "the request arrives without its Upgrade header", PASS);
            }
            Ok(Err(Failure::Refused(reason))) if reason.starts_with("unauthorized") => {
                return refused("websocket", Failure::Refused(reason), "connect", report);
            }
            Ok(Err(Failure::Refused(reason) | Failure::Unavailable(reason) | Failure::Failed(reason))) => {
                return report.problem("websocket", reason, PASS);
            }
            Ok(Err(other)) => return Err(other),
            Err(_) => return report.problem("websocket", format!("no answer within {}", Span(PATIENCE)), PASS),
        };
        let opening = began.elapsed();
        let mut taken = Vec::new();
        for number in 0..20 {
            let began = Instant::now();
            if let Err(reason) = echo(&mut socket, number).await {
                return report.problem("websocket", format!("opens after {}, then: {reason}", Span(opening)), PASS);
            }
            taken.push(began.elapsed());
        }
        let latency = Latency::of(taken);
        let _ = timeout(LATE, socket.close(None)).await;
        let found = format!(
            "opens after {}; a call comes back after {}, the slowest of 20 after {}",
            Span(opening),
            Span(latency.median()),
            Span(latency.longest())
        );
        report.ok("websocket", found)
    }

    /// A body that weir refuses once it has it, so that nothing is placed: who refuses it sooner stands between.
    async fn large(&mut self, report: &mut Report<'_>) -> Result<(), Failure> {
        let mut body = vec![b' '; LARGE];
        body.extend_from_slice(b"?");
        let request = self.client.request(Method::POST, &Target::new("/v1/events"));
        let request = request.header(header::CONTENT_TYPE, "application/json").body(Full::new(Bytes::from(body)));
        let request = request.map_err(|error| Failure::Failed(error.to_string()))?;
        let mut client = client(self.remote)?;
        let answer = async {
            let response = client.send(request).await?;
            let status = response.status().as_u16();
            Ok::<_, Failure>((status, whole(response.into_body()).await?))
        };
        let change = "let bodies of 8 MB through, or publish less at a time (nginx: client_max_body_size 9m)";
        let found = match timeout(PATIENCE, answer).await {
            Ok(Ok((status, body))) => {
                let problem: Value = serde_json::from_slice(&body).unwrap_or_default();
                if problem["code"].is_string() {
                    return report.ok("body", format!("{LARGE} bytes arrive"));
                }
                format!("HTTP status {status} for {LARGE} bytes, and it is not weir that says so")
            }
            Ok(Err(_)) => format!("the connection ends at {LARGE} bytes"),
            Err(_) => format!("no answer to {LARGE} bytes within {}", Span(PATIENCE)),
        };
        report.problem("body", found, change)
    }

    /// What clients do most of the time: nothing.
    async fn idle(&mut self, report: &mut Report<'_>) -> Result<(), Failure> {
        super::super::note(format_args!("waiting for {} to see what is cut off", Span(IDLE)));
        let stream = async {
            let mut stream = Stream::open(self.remote, &self.channel).await.ok()?;
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
            (self.ask_to_wait(LONG_POLL).await, began.elapsed())
        };
        let (stream, socket, (poll, polled)) = tokio::join!(stream, socket, poll);
        match stream {
            Some(Idle { lasted, silence, .. }) if lasted >= IDLE => {
                report.ok("idle stream", format!("stays open; longest silence {}", Span(silence)))?;
            }
            Some(Idle { lasted, last, .. }) => {
                let found = format!("cut off after {}, {} after the last heartbeat", Span(lasted), Span(last));
                report.problem("idle stream", found, GIVES_UP)?;
            }
            None => report.advice("idle stream", "could not be opened", "see above")?,
        }
        match socket {
            Some((_, true)) => report.ok("idle socket", "stays open")?,
            Some((lasted, false)) => {
                report.problem("idle socket", format!("cut off after {}", Span(lasted)), GIVES_UP)?;
            }
            None => report.advice("idle socket", "could not be opened", "see above")?,
        }
        match poll {
            Ok(_) => report.ok("idle poll", format!("answered after {}", Span(polled))),
            Err(_) => report.problem("idle poll", format!("cut off after {}", Span(polled)), GIVES_UP),
        }
    }
}

async fn echo(socket: &mut Socket, number: u32) -> Result<(), String> {
    let request = json!({ "jsonrpc": "2.0", "id": number, "method": "weir/echo", "params": [number] });
    let exchange = async {
        socket.send(Message::text(request.to_string())).await.map_err(|error| error.to_string())?;
        loop {
            match socket.next().await {
                Some(Ok(Message::Text(text))) => {
                    let answer: Value = serde_json::from_str(&text).unwrap_or_default();
                    if answer["id"] == number {
                        // Also if it is not ours to call: there and back it went.
                        return Ok(());
                    }
                }
                Some(Ok(_)) => {}
                Some(Err(error)) => return Err(error.to_string()),
                None => return Err("closed".to_owned()),
            }
        }
    };
    timeout(HELD, exchange).await.unwrap_or_else(|_| Err(format!("no answer within {}", Span(HELD))))
}

// === Stream ===

/// One stream of server-sent events. It does not come back when it ends.
struct Stream {
    body: Incoming,
    reader: Reader,
    ready: VecDeque<Block>,
    encoding: Option<String>,
    /// What tells proxies not to hold it back has come through.
    unbuffered: bool,
}

/// A stream on which nothing happened.
struct Idle {
    lasted: Duration,
    /// The longest time without a byte, and the time without one before its end.
    silence: Duration,
    last: Duration,
}

impl Stream {
    async fn open(remote: &Remote, channel: &str) -> Result<Self, Failure> {
        let mut client = client(remote)?;
        let request = client.request(Method::GET, &Target::new("/v1/sse").query("channel", channel));
        // As browsers ask.
        let request = request.header(header::ACCEPT, "text/event-stream").header(header::ACCEPT_ENCODING, "gzip, br");
        let request = request.body(Full::new(Bytes::new())).map_err(|error| Failure::Usage(error.to_string()))?;
        let response: Response<Incoming> = match timeout(PATIENCE, client.send(request)).await {
            Ok(response) => response?,
            Err(_) => return Err(Failure::Unavailable(format!("not even a head within {}", Span(PATIENCE)))),
        };
        let status = response.status().as_u16();
        let value = |name| response.headers().get(name).and_then(|value| value.to_str().ok()).map(ToOwned::to_owned);
        let encoding = value(header::CONTENT_ENCODING).filter(|encoding| encoding != "identity");
        let unbuffered = response.headers().contains_key("x-accel-buffering");
        if status != 200 {
            let body = whole(response.into_body()).await?;
            super::super::client::answer(status, &body)?;
            return Err(Failure::Failed(format!("HTTP status {status} where a stream should be")));
        }
        let body = response.into_body();
        Ok(Stream { body, reader: Reader::default(), ready: VecDeque::new(), encoding, unbuffered })
    }

    /// Waits for bytes. Not for an event: heartbeats are bytes, too.
    async fn bytes(&mut self) -> Result<(), String> {
        match self.body.frame().await {
            Some(Ok(frame)) => {
                let mut rest = frame.data_ref().map(AsRef::as_ref).unwrap_or_default();
                loop {
                    match self.reader.next(&mut rest) {
                        Ok(Some(block)) => self.ready.push_back(block),
                        Ok(None) => return Ok(()),
                        Err(_) => return Err("not a stream of events".into()),
                    }
                }
            }
            Some(Err(error)) => Err(format!("the stream breaks: {error}")),
            None => Err("the stream ends".into()),
        }
    }

    async fn next(&mut self) -> Result<Block, String> {
        loop {
            if let Some(block) = self.ready.pop_front() {
                return Ok(block);
            }
            self.bytes().await?;
        }
    }

    /// Waits for the event of this number. `Err(None)` if it does not come.
    async fn event(&mut self, number: u64) -> Result<(), Option<String>> {
        let wait = async {
            loop {
                let block = self.next().await?;
                let event: Value = serde_json::from_str(&block.data).unwrap_or_default();
                if event["data"]["n"] == number {
                    return Ok(());
                }
            }
        };
        timeout(HELD, wait).await.map_err(|_| None)?.map_err(Some)
    }

    async fn idle(&mut self) -> Idle {
        let began = Instant::now();
        let mut heard = began;
        let mut silence = Duration::ZERO;
        while let Ok(Ok(())) = timeout(IDLE.saturating_sub(began.elapsed()), self.bytes()).await {
            silence = silence.max(heard.elapsed());
            heard = Instant::now();
        }
        Idle { lasted: began.elapsed(), silence: silence.max(heard.elapsed()), last: heard.elapsed() }
    }
}

/// Since 1970.
pub fn unix() -> Duration {
    SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default()
}
