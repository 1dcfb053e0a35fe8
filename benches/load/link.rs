//! One connection of a reader.

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

/// The transport of readers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Transport {
    Sse,
    /// The streams of node-sse-server.
    NodeSse,
    Ws,
    /// SSE over HTTP/2, with this number of streams per connection.
    H2(usize),
}

/// The first byte on a connection to a floor: the role of the peer.
pub const READER: u8 = b'R';
pub const PUBLISHER: u8 = b'P';
pub const CALLER: u8 = b'C';
pub const PROVIDER: u8 = b'V';
/// The response of a floor.
pub const HELLO: u8 = b'k';

/// The connection of one reader.
pub struct Link {
    stream: TcpStream,
    state: State,
    rest: Rest,
    /// One per stream; several only with HTTP/2.
    seen: Vec<Seen>,
    /// Streams (SSE) or subscriptions (WebSocket) that are still opening.
    pub opening: usize,
    /// Written when the connection is upgraded.
    subscribe: Vec<u8>,
    pub closed: bool,
    size: usize,
}

enum State {
    /// A floor sends a greeting and then bodies.
    Greeting(Transport),
    Head(Transport),
    Sse(Chunked, Lines),
    Ws,
    H2(Vec<Lines>),
}

/// Records of the events of a slice.
#[derive(Default)]
pub struct Tally {
    pub latency: Histogram,
    pub faults: Faults,
    /// Events received for the first time.
    pub delivered: u64,
    /// Their sequences, if the publisher uses a window.
    pub arrived: Option<Vec<u64>>,
    /// The bytes of the first event as received, with framing.
    pub sample: Option<Vec<u8>>,
}

impl Tally {
    fn record(&mut self, seen: &mut Seen, stamp: Option<Stamp>, now: u64) {
        let Some(stamp) = stamp else {
            self.faults.failed += 1; // an event without a stamp
            return;
        };
        if seen.record(stamp, &mut self.faults) {
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

/// Opens a connection, writes `first` and makes it non-blocking.
pub fn connect(addr: SocketAddr, first: &[u8]) -> Result<TcpStream> {
    let mut stream = StdStream::connect(addr).with_context(|| format!("connecting to {addr}"))?;
    stream.set_nodelay(true)?;
    stream.write_all(first)?;
    stream.set_nonblocking(true)?;
    Ok(TcpStream::from_std(stream))
}

impl Link {
    /// A reader of `per_stream` channels from number `first` on. Each further stream reads the following channels,
    /// wrapping at `channels`. `size` is that of the payloads.
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

    /// A reader of a floor that writes the bodies of `transport`.
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

    /// Reads all available input with the buffer `scratch`. The time is taken once for each read.
    pub fn read(&mut self, scratch: &mut [u8], tally: &mut Tally) -> Result<()> {
        loop {
            match self.stream.read(scratch) {
                Ok(0) => {
                    self.closed = true;
                    return Ok(());
                }
                Ok(length) => {
                    self.feed(&scratch[..length], tally)?;
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

    fn feed(&mut self, input: &[u8], tally: &mut Tally) -> Result<()> {
        let now = crate::sys::now();
        match &mut self.state {
            State::Greeting(transport) => {
                ensure!(input == [HELLO], "a floor without a greeting");
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
                        ensure!(
                            self.stream.write(&subscribe)? == subscribe.len(),
                            "the socket has no room for a subscription"
                        );
                    }
                    if !body.is_empty() {
                        self.feed(&body, tally)?;
                    }
                }
            }
            State::Sse(chunked, lines) => {
                let before = tally.delivered;
                let (seen, opening, size) = (&mut self.seen[0], &mut self.opening, self.size);
                chunked.feed(input, |text| {
                    lines.feed(text, &mut |name, data| sse(name, data, size, seen, opening, tally, now));
                })?;
                if tally.sample.is_none() && tally.delivered == before + 1 {
                    tally.sample = Some(input.to_vec());
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
                                lines.feed(text, &mut |name, data| sse(name, data, size, seen, opening, tally, now));
                            }
                        }
                        H2::Write(bytes) => unwritten |= !matches!(stream.write(&bytes), Ok(n) if n == bytes.len()),
                        H2::Ended => *closed = true,
                    })
                })?;
                ensure!(!unwritten, "the socket has no room for a flow control frame");
            }
            State::Ws => {
                let before = tally.delivered;
                let (seen, opening, size) = (&mut self.seen[0], &mut self.opening, self.size);
                let (stream, closed) = (&mut self.stream, &mut self.closed);
                self.rest.with(input, |input| {
                    let mut at = 0;
                    while let Some((opcode, from, to)) = wire::frame(&input[at..])? {
                        let payload = &input[at + from..at + to];
                        match opcode {
                            wire::TEXT => message(payload, size, seen, opening, tally, now),
                            wire::PING => {
                                let mut pong = Vec::new();
                                wire::put_frame(wire::PONG, payload, &mut pong);
                                // The write fails only if the server does not read at all, which other checks notice.
                                let _ = stream.write(&pong);
                            }
                            wire::CLOSE => *closed = true,
                            _ => {}
                        }
                        at += to;
                    }
                    Ok(at)
                })?;
                if tally.sample.is_none() && tally.delivered == before + 1 {
                    tally.sample = Some(input.to_vec());
                }
            }
        }
        Ok(())
    }

    /// Expects only events published from now on.
    pub fn skip_to(&mut self, next: impl Fn(u32) -> u64) {
        self.seen.iter_mut().for_each(|seen| seen.skip_to(&next));
    }

    pub fn lost(&self, published: impl Fn(u32) -> u64) -> u64 {
        self.seen.iter().map(|seen| seen.lost(&published)).sum()
    }
}

fn sse(
    name: Option<&str>,
    data: &[u8],
    size: usize,
    seen: &mut Seen,
    opening: &mut usize,
    tally: &mut Tally,
    now: u64,
) {
    match name {
        None => tally.record(seen, Stamp::at_end(data, size, 1), now),
        Some("weir.open") => *opening = opening.saturating_sub(1),
        Some("weir.gap") => tally.faults.gaps += 1,
        Some("weir.position") => {}
        // A frame of node-sse-server: the stamp is JSON within a string within JSON.
        Some("message") => {
            let plain: Vec<u8> = data.iter().copied().filter(|byte| *byte != b'\\').collect();
            tally.record(seen, Stamp::find(&plain), now);
        }
        Some("registered") => *opening = opening.saturating_sub(1),
        Some("lastEvent" | "online-presence") => {}
        Some(_) => tally.faults.failed += 1,
    }
}

fn message(text: &[u8], size: usize, seen: &mut Seen, opening: &mut usize, tally: &mut Tally, now: u64) {
    const EVENT: &[u8] = br#"{"jsonrpc":"2.0","method":"weir.event","params":"#;
    if text.starts_with(EVENT) {
        tally.record(seen, Stamp::at_end(text, size, 2), now);
    } else if memchr::memmem::find(text, br#""result":"#).is_some() {
        *opening = opening.saturating_sub(1);
    } else if memchr::memmem::find(text, br#""method":"weir.gap""#).is_some() {
        tally.faults.gaps += 1;
    } else {
        tally.faults.failed += 1;
        eprintln!("load: {}", String::from_utf8_lossy(text));
    }
}
