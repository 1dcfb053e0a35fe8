//! `weir tail`: a stream that comes back where it was.

use std::time::Duration;

use bytes::Bytes;
use http::{Method, header};
use http_body_util::{BodyExt as _, Full};
use hyper::body::Incoming;
use serde_json::Value;
use tokio::time::{sleep, timeout};

use super::{
    Backoff, Failure, Output, Target,
    client::{Client, answer, lost, whole},
    note,
};

/// Heartbeats come every 25 s at most, unless weir is told otherwise: after this nobody is there any more.
const SILENCE: Duration = Duration::from_secs(120);
/// Longer than the longest event.
const LONGEST_LINE: usize = 64 << 20;

/// One dispatched event of the stream.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Block {
    pub kind: String,
    pub data: String,
}

/// Server-sent events from bytes, as the HTML specification reads them, but for a lone CR.
#[derive(Default)]
pub struct Reader {
    line: Vec<u8>,
    block: Block,
    has_data: bool,
    id: Option<String>,
    retry: Option<Duration>,
}

/// Prints events until `count` are out, or for ever. What was printed is not asked for again.
pub async fn tail(client: &mut Client, target: &Target, count: Option<u64>, out: &mut Output) -> Result<(), Failure> {
    let mut reader = Reader::default();
    let mut backoff = Backoff::default();
    let mut left = count;
    let mut connected = false;
    loop {
        let ended = stream(client, target, &mut reader, &mut backoff, &mut connected, &mut left, out).await;
        let (reason, wait) = match ended {
            Ok(()) => return Ok(()),
            Err(Failure::Unavailable(reason)) if connected => {
                let wait = reader.retry.take().unwrap_or_else(|| backoff.next());
                (reason, wait)
            }
            // Refused, or nobody there the first time: a wrong URL should say so at once.
            Err(other) => return Err(other),
        };
        note(format_args!("{reason}; again in {:.1}s", wait.as_secs_f32()));
        sleep(wait).await;
    }
}

/// One connection's worth. Its end is an error, unless enough was printed.
async fn stream(
    client: &mut Client,
    target: &Target,
    reader: &mut Reader,
    backoff: &mut Backoff,
    connected: &mut bool,
    left: &mut Option<u64>,
    out: &mut Output,
) -> Result<(), Failure> {
    let mut request = client.request(Method::GET, target).header(header::ACCEPT, "text/event-stream");
    if let Some(id) = &reader.id {
        request = request.header("last-event-id", id);
    }
    let request = request.body(Full::new(Bytes::new())).map_err(|error| Failure::Usage(error.to_string()))?;
    let response = match timeout(SILENCE, client.send(request)).await {
        Ok(response) => response?,
        Err(_) => return Err(Failure::Unavailable("no answer".into())),
    };
    let status = response.status().as_u16();
    if status != 200 {
        let body = whole(response.into_body()).await?;
        answer(status, &body)?;
        return Err(Failure::Failed(format!("HTTP status {status} where a stream should be")));
    }
    *connected = true;
    reader.restart();
    let mut body: Incoming = response.into_body();
    loop {
        let frame = match timeout(SILENCE, body.frame()).await {
            Ok(Some(frame)) => frame.map_err(|error| lost(&error))?,
            Ok(None) => return Err(Failure::Unavailable("the stream ended".into())),
            Err(_) => return Err(Failure::Unavailable("the stream is silent".into())),
        };
        let Some(bytes) = frame.data_ref() else { continue };
        let mut rest: &[u8] = bytes;
        while let Some(block) = reader.next(&mut rest)? {
            // Only now is it known to work: a node that accepts and ends at once must not be hammered.
            match block.kind.as_str() {
                "weir.open" | "weir.position" => {}
                "weir.retry" => {
                    let parsed: Value = serde_json::from_str(&block.data).unwrap_or_default();
                    reader.retry = parsed["after_ms"].as_u64().map(Duration::from_millis).or(reader.retry);
                    if parsed["code"] == "kicked" {
                        return Err(Failure::Refused("kicked: an operator has ended this stream".into()));
                    }
                    let code = parsed["code"].as_str().unwrap_or("asked to come back").to_owned();
                    return Err(Failure::Unavailable(code));
                }
                "weir.gap" => note(format_args!("gap: {}", block.data)),
                _ => {
                    backoff.reset();
                    out.line(&block.data)?;
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

// === impl Reader ===

impl Reader {
    /// A new connection: what was half read is gone, the position stays.
    fn restart(&mut self) {
        *self = Reader { id: self.id.take(), ..Reader::default() };
    }

    /// Takes bytes until an event is complete. None when they are used up.
    pub fn next(&mut self, from: &mut &[u8]) -> Result<Option<Block>, Failure> {
        while let Some(end) = memchr::memchr(b'\n', from) {
            self.line.extend_from_slice(&from[..end]);
            *from = &from[end + 1..];
            let line = std::mem::take(&mut self.line);
            if let Some(block) = self.line(line.strip_suffix(b"\r").unwrap_or(&line)) {
                return Ok(Some(block));
            }
        }
        self.line.extend_from_slice(from);
        *from = &[];
        if self.line.len() + self.block.data.len() > LONGEST_LINE {
            return Err(Failure::Failed("an event of more than 64 MiB; is this a weir?".into()));
        }
        Ok(None)
    }

    fn line(&mut self, line: &[u8]) -> Option<Block> {
        if line.is_empty() {
            let block = std::mem::take(&mut self.block);
            // Without data there is no event, though an id counts.
            return std::mem::take(&mut self.has_data).then_some(block);
        }
        let line = String::from_utf8_lossy(line);
        let (field, value) = line.split_once(':').unwrap_or((&line, ""));
        let value = value.strip_prefix(' ').unwrap_or(value);
        match field {
            "data" => {
                if std::mem::replace(&mut self.has_data, true) {
                    self.block.data.push('\n');
                }
                self.block.data.push_str(value);
            }
            "event" => value.clone_into(&mut self.block.kind),
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
    fn any_cut_of_the_stream_reads_the_same() {
        let text = "retry: 2371\r\nid: k-1\nevent: weir.open\ndata: {}\n\n:\nid: k-2\ndata: a\ndata: b\n\n:\nid: k-3\n\ndata\n\n";
        let block = |kind: &str, data: &str| Block { kind: kind.into(), data: data.into() };
        for cut in 0..text.len() {
            let mut reader = Reader::default();
            let mut blocks = Vec::new();
            for mut part in [&text.as_bytes()[..cut], &text.as_bytes()[cut..]] {
                while let Some(block) = reader.next(&mut part).unwrap() {
                    blocks.push(block);
                }
            }
            assert_eq!(blocks, [block("weir.open", "{}"), block("", "a\nb"), block("", "")], "cut at {cut}");
            assert_eq!(reader.id.as_deref(), Some("k-3"));
            assert_eq!(reader.retry, Some(Duration::from_millis(2371)));
        }
    }
}
