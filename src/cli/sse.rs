//! `weir tail`: prints a stream of events, and resumes it after a lost connection.

use std::time::Duration;

use bytes::Bytes;
use http::{HeaderValue, Method, Response, StatusCode, header};
use http_body_util::{BodyExt as _, Full};
use hyper::body::Incoming;
use serde_json::Value;
use tokio::time::{sleep, timeout};

use super::{
    backoff::Backoff,
    client::{NodeClient, NodeResponse, connection_lost},
    request_target::RequestTarget,
};
use crate::terminal::{Failure, Output, note};

/// A stream without a byte for so long is dead. The default interval of heartbeats is at most 25 s.
const SILENCE: Duration = Duration::from_secs(120);
/// Maximum size of an event in bytes, longer than any event of weir.
const MAX_EVENT: usize = 64 << 20;

/// One dispatched event of the stream.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct SseEvent {
    pub(super) kind: String,
    pub(super) data: String,
}

/// Parses server-sent events as the HTML specification says, except that a CR without LF does not end a line.
#[derive(Default)]
pub(super) struct SseParser {
    line: Vec<u8>,
    event: SseEvent,
    has_data: bool,
    id: Option<String>,
    retry: Option<Duration>,
}

/// Prints `count` events, or all of them until the command is interrupted. No event is printed twice.
pub(super) async fn tail(
    client: &mut NodeClient,
    target: &RequestTarget,
    count: Option<u64>,
    out: &mut Output,
) -> Result<(), Failure> {
    let mut parser = SseParser::default();
    let mut backoff = Backoff::default();
    let mut left = count;
    let mut connected = false;
    loop {
        let ended = stream(client, target, &mut parser, &mut backoff, &mut connected, &mut left, out).await;
        let (reason, wait) = match ended {
            Ok(()) => return Ok(()),
            Err(Failure::Unavailable(reason)) if connected => {
                let wait = parser.retry.take().unwrap_or_else(|| backoff.next());
                (reason, wait)
            }
            // Not retried: a rejection, or the first connection fails, probably because the URL is wrong.
            Err(other) => return Err(other),
        };
        note(format_args!("{reason}; retrying in {:.1}s", wait.as_secs_f32()));
        sleep(wait).await;
    }
}

/// Prints the events of one connection. Its end is an error unless all events were printed.
async fn stream(
    client: &mut NodeClient,
    target: &RequestTarget,
    parser: &mut SseParser,
    backoff: &mut Backoff,
    connected: &mut bool,
    left: &mut Option<u64>,
    out: &mut Output,
) -> Result<(), Failure> {
    let mut request = client.request(Method::GET, target);
    if let Some(id) = &parser.id {
        request = request.header("last-event-id", id);
    }
    let response = open(client, request, SILENCE).await?;
    *connected = true;
    parser.restart();
    let mut body: Incoming = response.into_body();
    loop {
        let frame = match timeout(SILENCE, body.frame()).await {
            Ok(Some(frame)) => frame.map_err(|error| connection_lost(&error))?,
            Ok(None) => return Err(Failure::Unavailable("the stream ended".into())),
            Err(_) => return Err(Failure::Unavailable("the stream is silent".into())),
        };
        let Some(bytes) = frame.data_ref() else { continue };
        let mut rest: &[u8] = bytes;
        while let Some(event) = parser.next(&mut rest)? {
            match event.kind.as_str() {
                "weir.open" | "weir.position" => {}
                "weir.retry" => {
                    let parsed: Value = serde_json::from_str(&event.data).unwrap_or_default();
                    parser.retry = parsed["after_ms"].as_u64().map(Duration::from_millis).or(parser.retry);
                    if parsed["code"] == "kicked" {
                        return Err(Failure::Rejected("kicked: an administrator has closed this stream".into()));
                    }
                    let code = parsed["code"].as_str().unwrap_or("the node closed the stream").to_owned();
                    return Err(Failure::Unavailable(code));
                }
                "weir.gap" => note(format_args!("gap: {}", event.data)),
                _ => {
                    // Not earlier: a node that accepts streams and ends them at once is retried with back-off.
                    backoff.reset();
                    out.line(&event.data)?;
                    if let Some(left) = left {
                        *left -= 1;
                        if *left == 0 {
                            return Ok(());
                        }
                    }
                }
            }
        }
        out.flush()?;
    }
}

/// Sends a request for a stream. A response other than a stream is an error.
pub(super) async fn open(
    client: &mut NodeClient,
    request: http::request::Builder,
    limit: Duration,
) -> Result<Response<Incoming>, Failure> {
    let request = request.header(header::ACCEPT, "text/event-stream").body(Full::new(Bytes::new()));
    let request = request.map_err(|error| Failure::Usage(error.to_string()))?;
    let response = match timeout(limit, client.send(request)).await {
        Ok(response) => response?,
        Err(_) => return Err(Failure::Unavailable(format!("no response within {}s", limit.as_secs()))),
    };
    let status = response.status();
    let kind = response.headers().get(header::CONTENT_TYPE).map_or(b"".as_slice(), HeaderValue::as_bytes);
    if status == StatusCode::OK && kind.starts_with(b"text/event-stream") {
        return Ok(response);
    }
    NodeResponse::read(response).await?.into_json()?;
    Err(Failure::Failed(format!("HTTP status {status}, but not a stream; is this a weir node?")))
}

// === impl SseParser ===

impl SseParser {
    /// Prepares for a new connection: drops a partial event, and keeps the position.
    fn restart(&mut self) {
        *self = SseParser { id: self.id.take(), ..SseParser::default() };
    }

    /// Consumes bytes until an event is complete. `None`: all bytes are consumed.
    pub(super) fn next(&mut self, from: &mut &[u8]) -> Result<Option<SseEvent>, Failure> {
        while let Some(end) = memchr::memchr(b'\n', from) {
            self.line.extend_from_slice(&from[..end]);
            *from = &from[end + 1..];
            let line = std::mem::take(&mut self.line);
            if let Some(event) = self.line(line.strip_suffix(b"\r").unwrap_or(&line)) {
                return Ok(Some(event));
            }
        }
        self.line.extend_from_slice(from);
        *from = &[];
        if self.line.len() + self.event.data.len() > MAX_EVENT {
            return Err(Failure::Failed("an event is larger than 64 MiB; is this a weir node?".into()));
        }
        Ok(None)
    }

    fn line(&mut self, line: &[u8]) -> Option<SseEvent> {
        if line.is_empty() {
            let event = std::mem::take(&mut self.event);
            // An event without data is not dispatched, but its id counts.
            return std::mem::take(&mut self.has_data).then_some(event);
        }
        let line = String::from_utf8_lossy(line);
        let (field, value) = line.split_once(':').unwrap_or((&line, ""));
        let value = value.strip_prefix(' ').unwrap_or(value);
        match field {
            "data" => {
                if std::mem::replace(&mut self.has_data, true) {
                    self.event.data.push('\n');
                }
                self.event.data.push_str(value);
            }
            "event" => value.clone_into(&mut self.event.kind),
            "id" if !value.contains('\0') => self.id = Some(value.to_owned()),
            "retry" => self.retry = value.parse().ok().map(Duration::from_millis).or(self.retry),
            _ => {}
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn chunk_boundaries_do_not_matter() {
        let text = "retry: 2371\r\nid: k-1\nevent: weir.open\ndata: {}\n\n:\nid: k-2\ndata: a\ndata: b\n\n:\nid: k-3\n\ndata\n\n";
        let event = |kind: &str, data: &str| SseEvent { kind: kind.into(), data: data.into() };
        for cut in 0..text.len() {
            let mut parser = SseParser::default();
            let mut events = Vec::new();
            for mut part in [&text.as_bytes()[..cut], &text.as_bytes()[cut..]] {
                while let Some(event) = parser.next(&mut part).unwrap() {
                    events.push(event);
                }
            }
            assert_eq!(events, [event("weir.open", "{}"), event("", "a\nb"), event("", "")], "cut at {cut}");
            assert_eq!(parser.id.as_deref(), Some("k-3"));
            assert_eq!(parser.retry, Some(Duration::from_millis(2371)));
        }
    }
}
