//! The client side of every wire format, as cheap as possible without trusting the framing of the server: HTTP
//! responses, chunked SSE, WebSocket frames, and enough of HTTP/2 to hold streams open.

use anyhow::{Context, Result, bail, ensure};
use memchr::{memchr, memmem};

/// Received bytes that are not yet a whole message.
#[derive(Default)]
pub struct Rest(Vec<u8>);

impl Rest {
    /// Calls `parse` with all bytes; it returns how many it has consumed.
    pub fn with(&mut self, input: &[u8], mut parse: impl FnMut(&[u8]) -> Result<usize>) -> Result<()> {
        if self.0.is_empty() {
            let used = parse(input)?;
            self.0.extend_from_slice(&input[used..]);
        } else {
            self.0.extend_from_slice(input);
            let used = parse(&self.0)?;
            self.0.drain(..used);
        }
        if self.0.is_empty() {
            self.0 = Vec::new();
        }
        Ok(())
    }
}

// === HTTP/1.1 ===

/// A whole response at the start of `input`: status, body and length in bytes.
pub fn response(input: &[u8]) -> Result<Option<(u16, &[u8], usize)>> {
    let Some((status, head, length)) = head(input)? else { return Ok(None) };
    let length = if status == 204 { 0 } else { length.context("a response without content-length")? };
    Ok(input.get(head..head + length).map(|body| (status, body, head + length)))
}

/// Status, length of the head, and content-length.
pub fn head(input: &[u8]) -> Result<Option<(u16, usize, Option<usize>)>> {
    let Some(end) = memmem::find(input, b"\r\n\r\n") else { return Ok(None) };
    let text = std::str::from_utf8(&input[..end])?;
    let mut lines = text.split("\r\n");
    let status = lines.next().and_then(|line| line.split(' ').nth(1)).context("no status")?.parse()?;
    let mut length = None;
    for line in lines {
        if let Some((name, value)) = line.split_once(':')
            && name.eq_ignore_ascii_case("content-length")
        {
            length = Some(value.trim().parse()?);
        }
    }
    Ok(Some((status, end + 4, length)))
}

// === SSE ===

/// A parser of streams that calls `got(event name, data)` for each `data:` line. (weir writes one per event.)
#[derive(Default)]
pub struct Lines {
    rest: Vec<u8>,
    name: Option<Box<str>>,
}

impl Lines {
    pub fn feed(&mut self, mut text: &[u8], got: &mut impl FnMut(Option<&str>, &[u8])) {
        while let Some(end) = memchr(b'\n', text) {
            if self.rest.is_empty() {
                self.line(&text[..end], got);
            } else {
                self.rest.extend_from_slice(&text[..end]);
                let line = std::mem::take(&mut self.rest);
                self.line(&line, got);
            }
            text = &text[end + 1..];
        }
        self.rest.extend_from_slice(text);
    }

    fn line(&mut self, line: &[u8], got: &mut impl FnMut(Option<&str>, &[u8])) {
        match line {
            [] => self.name = None,
            [b'd', b'a', b't', b'a', b':', b' ', data @ ..] => got(self.name.as_deref(), data),
            [b'e', b'v', b'e', b'n', b't', b':', b' ', name @ ..] => {
                self.name = Some(String::from_utf8_lossy(name).into());
            }
            _ => {}
        }
    }
}

/// A decoder of `Transfer-Encoding: chunked`.
#[derive(Default)]
pub struct Chunked {
    size: Vec<u8>,
    /// Of the current chunk, its closing CRLF included; 0 between chunks.
    left: usize,
    pub ended: bool,
}

impl Chunked {
    pub fn feed(&mut self, mut input: &[u8], mut got: impl FnMut(&[u8])) -> Result<()> {
        while !input.is_empty() {
            if self.left == 0 {
                let Some(end) = memchr(b'\n', input) else {
                    self.size.extend_from_slice(input);
                    ensure!(self.size.len() < 20, "a chunk without a size");
                    return Ok(());
                };
                self.size.extend_from_slice(&input[..end]);
                input = &input[end + 1..];
                let text = std::str::from_utf8(&self.size)?.trim_end();
                let size = usize::from_str_radix(text, 16).with_context(|| format!("chunk size {text:?}"))?;
                self.size.clear();
                self.ended |= size == 0;
                self.left = size + 2;
                continue;
            }
            let here = self.left.min(input.len());
            let data = here.min((self.left).saturating_sub(2));
            got(&input[..data]);
            if let Some(close) = input[..here].get(data..)
                && !close.iter().all(|byte| matches!(byte, b'\r' | b'\n'))
            {
                bail!("a chunk is longer than its size");
            }
            self.left -= here;
            input = &input[here..];
        }
        Ok(())
    }
}

// === WebSocket ===

pub const TEXT: u8 = 1;
pub const CLOSE: u8 = 8;
pub const PING: u8 = 9;
pub const PONG: u8 = 10;

/// One frame at the start of `input`: opcode, start and end of its payload.
pub fn frame(input: &[u8]) -> Result<Option<(u8, usize, usize)>> {
    let [first, second, ..] = input else { return Ok(None) };
    ensure!(first & 0x80 != 0, "a fragment");
    let (mut at, length) = match second & 0x7f {
        126 => match input.get(2..4) {
            Some(bytes) => (4, usize::from(u16::from_be_bytes([bytes[0], bytes[1]]))),
            None => return Ok(None),
        },
        127 => match input.get(2..10) {
            Some(bytes) => (10, bytes.iter().fold(0, |length, byte| length << 8 | usize::from(*byte))),
            None => return Ok(None),
        },
        length => (2, usize::from(length)),
    };
    if second & 0x80 != 0 {
        // Clients of this program use a mask of zeros, which need not be undone.
        at += 4;
    }
    Ok((input.len() >= at + length).then_some((first & 0x0f, at, at + length)))
}

/// Appends a frame of a client with a mask of zeros, which is valid and costs nothing.
pub fn put_frame(opcode: u8, payload: &[u8], out: &mut Vec<u8>) {
    put_header(opcode, payload.len(), 0x80, out);
    out.extend_from_slice(&[0; 4]);
    out.extend_from_slice(payload);
}

/// Appends the header of a frame; `mask` is the mask bit.
pub fn put_header(opcode: u8, length: usize, mask: u8, out: &mut Vec<u8>) {
    out.push(0x80 | opcode);
    match length {
        0..126 => out.push(mask | length as u8),
        126..0x1_0000 => {
            out.push(mask | 126);
            out.extend_from_slice(&(length as u16).to_be_bytes());
        }
        _ => {
            out.push(mask | 127);
            out.extend_from_slice(&(length as u64).to_be_bytes());
        }
    }
}

/// The request that opens a WebSocket.
pub fn upgrade(host: &str, path: &str) -> String {
    format!(
        "GET {path} HTTP/1.1\r\nHost: {host}\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\
         Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n\r\n"
    )
}

// === HTTP/2 ===

const DATA: u8 = 0;
const HEADERS: u8 = 1;
const RST_STREAM: u8 = 3;
const SETTINGS: u8 = 4;
const H2_PING: u8 = 6;
const GOAWAY: u8 = 7;
const WINDOW_UPDATE: u8 = 8;

/// A frame of HTTP/2 that a reader has to handle.
pub enum H2<'a> {
    Data(u32, &'a [u8]),
    /// Bytes to write: an acknowledgement of settings or a response to a ping.
    Write(Vec<u8>),
    Ended,
}

/// The preface, with the largest windows, so that flow control does not stop a stream.
pub fn h2_preface() -> Vec<u8> {
    let mut out = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n".to_vec();
    put_h2(SETTINGS, 0, 0, &[0, 4, 0x7f, 0xff, 0xff, 0xff], &mut out);
    put_h2(WINDOW_UPDATE, 0, 0, &(0x7fff_ffff_u32 - 65_535).to_be_bytes(), &mut out);
    out
}

/// A GET on a new stream, with headers as literals without indexing.
pub fn h2_get(stream: u32, host: &str, path: &str, out: &mut Vec<u8>) {
    let mut block = vec![0x82, 0x86]; // :method GET, :scheme http, of the static table
    for (name, value) in [(":path", path), (":authority", host), ("accept", "text/event-stream")] {
        block.push(0);
        for text in [name, value] {
            debug_assert!(text.len() < 127);
            block.push(text.len() as u8);
            block.extend_from_slice(text.as_bytes());
        }
    }
    put_h2(HEADERS, 0x5, stream, &block, out);
}

fn put_h2(kind: u8, flags: u8, stream: u32, payload: &[u8], out: &mut Vec<u8>) {
    out.extend_from_slice(&(payload.len() as u32).to_be_bytes()[1..]);
    out.extend_from_slice(&[kind, flags]);
    out.extend_from_slice(&stream.to_be_bytes());
    out.extend_from_slice(payload);
}

/// Reads the frames at the start of `input` and returns their length.
pub fn h2_frames(input: &[u8], mut got: impl FnMut(H2<'_>)) -> Result<usize> {
    let mut at = 0;
    while let Some(header) = input.get(at..at + 9) {
        let length = usize::from(header[0]) << 16 | usize::from(header[1]) << 8 | usize::from(header[2]);
        let (kind, flags) = (header[3], header[4]);
        let stream = u32::from_be_bytes([header[5] & 0x7f, header[6], header[7], header[8]]);
        let Some(payload) = input.get(at + 9..at + 9 + length) else { break };
        match kind {
            DATA => {
                got(H2::Data(stream, payload));
                if length > 0 {
                    let mut more = Vec::new();
                    put_h2(WINDOW_UPDATE, 0, 0, &(length as u32).to_be_bytes(), &mut more);
                    got(H2::Write(more));
                }
                if flags & 1 != 0 {
                    got(H2::Ended);
                }
            }
            // 0x88 is `:status: 200` of the static table.
            HEADERS => ensure!(payload.first() == Some(&0x88), "stream {stream} was rejected"),
            RST_STREAM => got(H2::Ended),
            SETTINGS if flags & 1 == 0 => {
                let mut ack = Vec::new();
                put_h2(SETTINGS, 1, 0, &[], &mut ack);
                got(H2::Write(ack));
            }
            H2_PING if flags & 1 == 0 => {
                let mut pong = Vec::new();
                put_h2(H2_PING, 1, 0, payload, &mut pong);
                got(H2::Write(pong));
            }
            GOAWAY => bail!("the server sent GOAWAY: {:?}", String::from_utf8_lossy(payload)),
            _ => {}
        }
        at += 9 + length;
    }
    Ok(at)
}
