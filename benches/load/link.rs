//! One connection of a reader, from connecting to the last event.

use std::{
    io::{self, Read, Write},
    net::{SocketAddr, TcpStream as StdStream},
};

use anyhow::{Context, Result, ensure};
use mio::{Interest, Registry, Token, net::TcpStream};

use crate::{
    stamp::{Faults, Histogram, Seen, Stamp},
    wire::{self, Chunked, H2, Lines, Rest},
};

/// How readers are connected.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Transport {
    Sse,
    /// As browsers of node-sse-server.
    NodeSse,
    Ws,
    /// Streams of SSE over HTTP/2, so many to a connection.
    H2(usize),
}

/// What is written to a floor's connection first: who we are.
pub const READER: u8 = b'R';
pub const PUBLISHER: u8 = b'P';
pub const CALLER: u8 = b'C';
pub const PROVIDER: u8 = b'V';
/// What a floor answers.
pub const HELLO: u8 = b'k';

/// One reader's connection.
pub struct Link {
    stream: TcpStream,
    state: State,
    rest: Rest,
    /// One per stream: one, but over HTTP/2.
    seen: Vec<Seen>,
    /// Streams (SSE) or subscriptions (WebSocket) that are not open yet.
    pub opening: usize,
    /// To be written once the connection is upgraded.
    subscribe: Vec<u8>,
    pub closed: bool,
    size: usize,
}

enum State {
    /// Of a floor: it greets, then sends bodies.
    Greeting(Transport),
    Head(Transport),
    Sse(Chunked, Lines),
    Ws,
    H2(Vec<Lines>),
}

/// What the events of a slice are entered in.
#[derive(Default)]
pub struct Book {
    pub latency: Histogram,
    pub faults: Faults,
    /// Events that came for the first time.
    pub delivered: u64,
    /// Sequences of those, where somebody waits for a window.
    pub arrived: Option<Vec<u64>>,
    /// The bytes of the first event as they came, framing included.
    pub sample: Option<Vec<u8>>,
}

impl Book {
    fn enter(&mut self, seen: &mut Seen, stamp: Option<Stamp>, now: u64) {
        let Some(stamp) = stamp else {
            self.faults.failed += 1; // an event that we did not send
            return;
        };
        if seen.enter(stamp, &mut self.faults) {
            self.delivered += 1;
            self.latency.add(now.saturating_sub(stamp.sent));
            if let Some(arrived) = &mut self.arrived {
                arrived.push(stamp.sequence);
            }
        }
    }
}

/// The name of a channel.
pub fn channel(number: u32) -> String {
    format!("bench-{number:06}")
}

/// Opens a connection, writes `first`, and goes on without blocking.
pub fn connect(addr: SocketAddr, first: &[u8]) -> Result<TcpStream> {
    let mut stream = StdStream::connect(addr).with_context(|| format!("connecting to {addr}"))?;
    stream.set_nodelay(true)?;
    stream.write_all(first)?;
    stream.set_nonblocking(true)?;
    Ok(TcpStream::from_std(stream))
}

impl Link {
    /// A reader of `per_stream` channels from number `first` on (each further stream: of the next ones, wrapping
    /// at `channels`). `size` is that of the payloads.
    pub fn weir(
        addr: SocketAddr,
        transport: Transport,
        first: u32,
        per_stream: usize,
        channels: usize,
        size: usize,
    ) -> Result<Self> {
        let host = addr.to_string();
        let streams = if let Transport::H2(streams) = transport { streams } else { 1 };
        let base = |stream: usize| ((first as usize + stream * per_stream) % channels) as u32;
        let names = |stream: usize| (base(stream)..).take(per_stream).map(channel);
        let path = |stream: usize| {
            let names: Vec<_> = names(stream).map(|name| format!("channel={name}")).collect();
            format!("/v1/sse?{}", names.join("&"))
        };
        let mut subscribe = Vec::new();
        let mut opening = streams;
        let hello = match transport {
            Transport::Sse => {
                format!("GET {} HTTP/1.1\r\nHost: {host}\r\nAccept: text/event-stream\r\n\r\n", path(0)).into_bytes()
            }
            Transport::NodeSse => {
                let names: Vec<_> = names(0).collect();
                let path = format!("/subscribe?channels={}", names.join(","));
                format!("GET {path} HTTP/1.1\r\nHost: {host}\r\nAccept: text/event-stream\r\n\r\n").into_bytes()
            }
            Transport::Ws => {
                let names: Vec<_> = names(0).collect();
                opening = 0;
                for (id, names) in names.chunks(500).enumerate() {
                    let names: Vec<_> = names.iter().map(|name| format!("{name:?}")).collect();
                    let message = format!(
                        r#"{{"jsonrpc":"2.0","id":{id},"method":"weir.subscribe","params":{{"channels":[{}]}}}}"#,
                        names.join(",")
                    );
                    wire::put_frame(wire::TEXT, message.as_bytes(), &mut subscribe);
                    opening += 1;
                }
                wire::upgrade(&host, "/v1/ws").into_bytes()
            }
            Transport::H2(streams) => {
                let mut hello = wire::h2_preface();
                (0..streams).for_each(|stream| wire::h2_get(stream as u32 * 2 + 1, &host, &path(stream), &mut hello));
                hello
            }
        };
        let state = match transport {
            Transport::H2(streams) => State::H2((0..streams).map(|_| Lines::default()).collect()),
            transport => State::Head(transport),
        };
        let seen = (0..streams).map(|stream| Seen::new(base(stream), per_stream)).collect();
        let stream = connect(addr, &hello)?;
        Ok(Link { stream, state, rest: Rest::default(), seen, opening, subscribe, closed: false, size })
    }

    /// A reader of a floor that writes bodies as `transport` would.
    pub fn floor(addr: SocketAddr, transport: Transport, first: u32, channels: usize, size: usize) -> Result<Self> {
        Ok(Link {
            stream: connect(addr, &[READER])?,
            state: State::Greeting(transport),
            rest: Rest::default(),
            seen: vec![Seen::new(first, channels)],
            opening: 1,
            subscribe: Vec::new(),
            closed: false,
            size,
        })
    }

    pub fn register(&mut self, registry: &Registry, token: usize) -> io::Result<()> {
        registry.register(&mut self.stream, Token(token), Interest::READABLE)
    }

    /// Reads all that is there. `scratch` is lent; `now` is read once for each piece.
    pub fn read(&mut self, scratch: &mut [u8], book: &mut Book) -> Result<()> {
        loop {
            match self.stream.read(scratch) {
                Ok(0) => {
                    self.closed = true;
                    return Ok(());
                }
                Ok(length) => {
                    self.feed(&scratch[..length], book)?;
                    if length < scratch.len() {
                        return Ok(());
                    }
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(()),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(_) => {
                    self.closed = true;
                    return Ok(());
                }
            }
        }
    }

    fn feed(&mut self, input: &[u8], book: &mut Book) -> Result<()> {
        let now = crate::sys::now();
        match &mut self.state {
            State::Greeting(transport) => {
                ensure!(input == [HELLO], "a floor that does not greet");
                self.opening = 0;
                self.state = match transport {
                    Transport::Ws => State::Ws,
                    _ => State::Sse(Chunked::default(), Lines::default()),
                };
            }
            State::Head(transport) => {
                let transport = *transport;
                let mut begin = None;
                self.rest.with(input, |input| {
                    let Some((status, length, _)) = wire::head(input)? else { return Ok(0) };
                    let expected = if transport == Transport::Ws { 101 } else { 200 };
                    ensure!(status == expected, "status {status}: {}", String::from_utf8_lossy(input));
                    begin = Some(input[length..].to_vec());
                    Ok(input.len())
                })?;
                if let Some(body) = begin {
                    self.state = match transport {
                        Transport::Ws => State::Ws,
                        _ => State::Sse(Chunked::default(), Lines::default()),
                    };
                    if !self.subscribe.is_empty() {
                        let subscribe = std::mem::take(&mut self.subscribe);
                        ensure!(self.stream.write(&subscribe)? == subscribe.len(), "no room for a subscription");
                    }
                    if !body.is_empty() {
                        self.feed(&body, book)?;
                    }
                }
            }
            State::Sse(chunked, lines) => {
                let before = book.delivered;
                let (seen, opening, size) = (&mut self.seen[0], &mut self.opening, self.size);
                chunked.feed(input, |text| {
                    lines.feed(text, &mut |name, data| sse(name, data, size, seen, opening, book, now));
                })?;
                if book.sample.is_none() && book.delivered == before + 1 {
                    book.sample = Some(input.to_vec());
                }
                self.closed |= chunked.ended;
            }
            State::H2(streams) => {
                let (seen, opening, size) = (&mut self.seen, &mut self.opening, self.size);
                let (stream, closed) = (&mut self.stream, &mut self.closed);
                let mut unwritten = false;
                self.rest.with(input, |input| {
                    wire::h2_frames(input, |frame| match frame {
                        H2::Data(number, text) => {
                            let at = number as usize / 2;
                            if let Some(lines) = streams.get_mut(at) {
                                let seen = &mut seen[at];
                                lines.feed(text, &mut |name, data| sse(name, data, size, seen, opening, book, now));
                            }
                        }
                        H2::Write(bytes) => unwritten |= !matches!(stream.write(&bytes), Ok(n) if n == bytes.len()),
                        H2::Ended => *closed = true,
                    })
                })?;
                ensure!(!unwritten, "no room for a frame of flow control");
            }
            State::Ws => {
                let before = book.delivered;
                let (seen, opening, size) = (&mut self.seen[0], &mut self.opening, self.size);
                let (stream, closed) = (&mut self.stream, &mut self.closed);
                self.rest.with(input, |input| {
                    let mut at = 0;
                    while let Some((opcode, from, to)) = wire::frame(&input[at..])? {
                        let payload = &input[at + from..at + to];
                        match opcode {
                            wire::TEXT => message(payload, size, seen, opening, book, now),
                            wire::PING => {
                                let mut pong = Vec::new();
                                wire::put_frame(wire::PONG, payload, &mut pong);
                                // Lost only if the server reads nothing at all, which shows elsewhere.
                                let _ = stream.write(&pong);
                            }
                            wire::CLOSE => *closed = true,
                            _ => {}
                        }
                        at += to;
                    }
                    Ok(at)
                })?;
                if book.sample.is_none() && book.delivered == before + 1 {
                    book.sample = Some(input.to_vec());
                }
            }
        }
        Ok(())
    }

    /// Forgets what was published so far.
    pub fn skip_to(&mut self, next: impl Fn(u32) -> u64) {
        self.seen.iter_mut().for_each(|seen| seen.skip_to(&next));
    }

    pub fn lost(&self, published: impl Fn(u32) -> u64) -> u64 {
        self.seen.iter().map(|seen| seen.lost(&published)).sum()
    }
}

fn sse(name: Option<&str>, data: &[u8], size: usize, seen: &mut Seen, opening: &mut usize, book: &mut Book, now: u64) {
    match name {
        None => book.enter(seen, Stamp::at_end(data, size, 1), now),
        Some("weir.open") => *opening = opening.saturating_sub(1),
        Some("weir.gap") => book.faults.gaps += 1,
        Some("weir.position") => {}
        // What node-sse-server says: the stamp is JSON in a text in JSON.
        Some("message") => {
            let plain: Vec<u8> = data.iter().copied().filter(|byte| *byte != b'\\').collect();
            book.enter(seen, Stamp::find(&plain), now);
        }
        Some("registered") => *opening = opening.saturating_sub(1),
        Some("lastEvent" | "online-presence") => {}
        Some(_) => book.faults.failed += 1,
    }
}

fn message(text: &[u8], size: usize, seen: &mut Seen, opening: &mut usize, book: &mut Book, now: u64) {
    const EVENT: &[u8] = br#"{"jsonrpc":"2.0","method":"weir.event","params":"#;
    if text.starts_with(EVENT) {
        book.enter(seen, Stamp::at_end(text, size, 2), now);
    } else if memchr::memmem::find(text, br#""result":"#).is_some() {
        *opening = opening.saturating_sub(1);
    } else if memchr::memmem::find(text, br#""method":"weir.gap""#).is_some() {
        book.faults.gaps += 1;
    } else {
        book.faults.failed += 1;
        eprintln!("load: {}", String::from_utf8_lossy(text));
    }
}
