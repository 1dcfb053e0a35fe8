//! Encoding of server-sent events: the [`Format`]s of events, and weir's own blocks. Each is one
//! [chunk](crate::net::chunk).

use std::fmt::Write as _;

use bytes::Bytes;

use crate::{
    bus::{Format, Gap},
    channel::Channel,
    event::Event,
    json::{read_json_str, write_json_str},
    net::chunk::{HEAD, TAIL, close, open, text},
    position::Position,
};

/// A comment that keeps proxies from closing the connection. No empty line follows: two common clients would deliver an
/// empty event.
pub const HEARTBEAT: &[u8] = b"000002\r\n:\n\r\n";

/// Whole envelopes, each with its position as `id:`. For streams of one channel.
pub static EVENT: Format = Format { open, event: event::<true>, close };
/// Without `id:`. For streams of several channels, each of which has a token of its own.
pub static EVENT_BARE: Format = Format { open, event: event::<false>, close };
/// `event:` is the type, `data:` the bare data.
pub static DATA: Format = Format { open, event: data::<true>, close };
pub static DATA_BARE: Format = Format { open, event: data::<false>, close };

fn event<const ID: bool>(channel: &Channel, event: &Event, out: &mut Vec<u8>) {
    if ID {
        id(event.position(), out);
    }
    out.extend_from_slice(b"data: ");
    event.write_json(channel, out);
    out.extend_from_slice(b"\n\n");
}

fn data<const ID: bool>(_: &Channel, event: &Event, out: &mut Vec<u8>) {
    if ID {
        id(event.position(), out);
    }
    if let Some(kind) = event.kind_json() {
        out.extend_from_slice(b"event: ");
        // No type has control characters: it is one line.
        out.extend_from_slice(read_json_str(kind).as_bytes());
        out.push(b'\n');
    }
    match event.data_json().or(event.data_base64()) {
        Some(text) if text.starts_with('"') => lines(&read_json_str(text), out),
        Some(json) => lines(json, out),
        // Not omitted: a block without data is never dispatched.
        None => lines("", out),
    }
    out.push(b'\n');
}

fn id(position: Position, out: &mut Vec<u8>) {
    out.extend_from_slice(b"id: ");
    out.extend_from_slice(&position.epoch.text());
    out.push(b'-');
    out.extend_from_slice(itoa::Buffer::new().format(position.offset).as_bytes());
    out.push(b'\n');
}

/// A `data:` line for each line, whatever its line ending.
fn lines(text: &str, out: &mut Vec<u8>) {
    let mut rest = text.as_bytes();
    loop {
        out.extend_from_slice(b"data: ");
        let end = memchr::memchr2(b'\n', b'\r', rest);
        out.extend_from_slice(&rest[..end.unwrap_or(rest.len())]);
        out.push(b'\n');
        let Some(end) = end else { return };
        rest = &rest[end..];
        rest = rest.strip_prefix(b"\r\n").unwrap_or(&rest[1..]);
    }
}

// === weir's own blocks ===

/// The first block: the positions at which the stream starts. It is an event with an `id:`, so that an `EventSource`
/// which loses its connection before the first event resumes from here: not all clients remember an `id:` without data.
pub fn opening<'a>(retry_ms: u32, id: &str, at: impl IntoIterator<Item = (&'a Channel, Position)>) -> Bytes {
    let mut out = start();
    line(&mut out, format_args!("retry: {retry_ms}"));
    named(&mut out, Some(id), "weir.open");
    out.extend_from_slice(br#"{"channels":["#);
    for (i, (channel, position)) in at.into_iter().enumerate() {
        out.extend_from_slice(if i == 0 { br#"{"channel":"# } else { br#",{"channel":"# });
        write_json_str(channel.as_str(), &mut out);
        out.extend_from_slice(format!(r#","position":"{position}"}}"#).as_bytes());
    }
    out.extend_from_slice(b"]}");
    finish(out)
}

/// Reports that events are missing here.
pub fn gap(id: &str, gap: &Gap) -> Bytes {
    let mut out = start();
    named(&mut out, Some(id), "weir.gap");
    // Plain data, written to memory: it cannot fail.
    let _ = serde_json::to_writer(&mut out, gap);
    finish(out)
}

/// Reports the position where no event can carry it.
pub fn position(id: &str) -> Bytes {
    let mut out = start();
    named(&mut out, Some(id), "weir.position");
    out.extend_from_slice(b"{}");
    finish(out)
}

/// A delay before reconnecting: random, as all clients lose their streams at the same moment.
pub(super) fn retry_ms() -> u16 {
    fastrand::u16(1_000..4_000)
}

/// Reports that the stream ends, and that the client should reconnect after `after_ms`. No `id:`, so that it keeps its
/// own. `retry` adds the delay as a `retry:` line, for an `EventSource` that has not got one on this stream.
pub fn retry(code: &str, after_ms: u64, retry: bool) -> Bytes {
    let mut out = start();
    if retry {
        line(&mut out, format_args!("retry: {after_ms}"));
    }
    named(&mut out, None, "weir.retry");
    out.extend_from_slice(format!(r#"{{"code":"{code}","after_ms":{after_ms}}}"#).as_bytes());
    finish(out)
}

fn start() -> Vec<u8> {
    let mut out = Vec::with_capacity(256);
    open(&mut out);
    out
}

fn finish(mut out: Vec<u8>) -> Bytes {
    out.extend_from_slice(b"\n\n");
    close(&mut out);
    out.into()
}

fn named(out: &mut Vec<u8>, id: Option<&str>, event: &str) {
    if let Some(id) = id {
        line(out, format_args!("id: {id}"));
    }
    line(out, format_args!("event: {event}"));
    out.extend_from_slice(b"data: ");
}

fn line(out: &mut Vec<u8>, text: std::fmt::Arguments<'_>) {
    let mut line = String::new();
    let _ = writeln!(line, "{text}");
    out.extend_from_slice(line.as_bytes());
}

// === adding ids to chunks ===

/// The last `id:` of a chunk whose blocks each begin with one.
pub(crate) fn last_id(chunk: &[u8]) -> &[u8] {
    let text = &chunk[HEAD.len()..chunk.len() - TAIL.len()];
    let block = &text[last_block(text)..];
    let line = &block[..memchr::memchr(b'\n', block).unwrap_or(block.len())];
    line.strip_prefix(b"id: ").unwrap_or_default()
}

/// The beginning of the last block. Every block ends with an empty line, and none has one inside.
fn last_block(text: &[u8]) -> usize {
    memchr::memmem::rfind(&text[..text.len().saturating_sub(2)], b"\n\n").map_or(0, |at| at + 2)
}

/// Puts `id` before the last block of `piece`, which is a chunk if `chunked`, else the text of one; `many` says whether
/// it has more than one block. Shares its bytes.
///
/// Not before the first block: an `id:` is remembered when its block is dispatched, and a client that loses its
/// connection then would never get the blocks behind it.
pub fn with_id(piece: &Bytes, many: bool, id: &str, chunked: bool, mut push: impl FnMut(Bytes)) {
    let text = if chunked { text(piece) } else { piece.clone() };
    let id = format!("id: {id}\n");
    let cut = if many { last_block(&text) } else { 0 };
    match (chunked, cut) {
        (false, _) => {
            push(text.slice(..cut));
            push(id.into());
            push(text.slice(cut..));
        }
        (true, 0) => {
            push(format!("{:06x}\r\n{id}\r\n", id.len()).into());
            push(piece.clone());
        }
        (true, _) => {
            push(format!("{cut:06x}\r\n").into());
            push(text.slice(..cut));
            // One chunk for both the `id:` and its block.
            push(format!("\r\n{:06x}\r\n{id}", id.len() + text.len() - cut).into());
            push(piece.slice(HEAD.len() + cut..));
        }
    }
}
