//! Calls: caller → hub → provider → hub → caller, over WebSocket: JSON-RPC, or MicroStream's events on Socket.IO.

use std::{
    io::{self, ErrorKind, Read, Write},
    net::SocketAddr,
    time::Duration,
};

use anyhow::{Context, Result, bail, ensure};
use memchr::memmem;
use mio::{Events, Interest, Poll, Token, net::TcpStream};

use crate::{
    floor::CALLER_AT,
    link::{self, CALLER, HELLO, PROVIDER, PUBLISHER},
    redis,
    report::Measure,
    stamp::{self, Faults, Histogram, Stamp},
    sys::{self, Process, Server},
    wire,
};

/// The protocol of callers and providers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wire {
    JsonRpc,
    /// Service names are unique, so each provider is a service of its own.
    MicroStream,
}

/// Numbers of callers, providers and calls.
#[derive(Clone, Copy, Debug)]
pub struct Layout {
    pub callers: usize,
    pub providers: usize,
    /// Calls in flight of each caller.
    pub in_flight: usize,
    /// Bytes of `params` and of the equal result.
    pub size: usize,
}

/// One server with connected callers and providers, all driven by this thread.
pub struct Rig {
    server_name: &'static str,
    pid: u32,
    poll: Poll,
    /// Providers first.
    peers: Vec<Peer>,
    wire: Wire,
    layout: Layout,
    scratch: Vec<u8>,
    busy_poll: bool,
}

struct Peer {
    stream: TcpStream,
    out: Vec<u8>,
    rest: wire::Rest,
    caller: Option<Caller>,
}

struct Caller {
    wire: Wire,
    /// The service that a MicroStream caller calls.
    target: usize,
    number: u32,
    next: u64,
    pending: Vec<Stamp>,
}

#[derive(Default)]
struct Tally {
    latency: Histogram,
    faults: Faults,
    done: u64,
    /// No new calls are started.
    closing: bool,
}

impl Rig {
    pub fn weir(server: &Process, layout: Layout, busy_poll: bool) -> Result<Self> {
        Self::nodes(server, server, layout, busy_poll)
    }

    /// Providers on one node, callers on another.
    pub fn nodes(provided: &Process, server: &Process, layout: Layout, busy_poll: bool) -> Result<Self> {
        let mut peers = Vec::new();
        for number in 0..layout.providers + layout.callers {
            if number == layout.providers {
                redis::known(server, "bench")?;
            }
            let at = if number < layout.providers { provided } else { server };
            let mut stream = blocking_upgrade(at.addr(), "/v1/ws")?;
            if number < layout.providers {
                let mut provide = Vec::new();
                let text = br#"{"jsonrpc":"2.0","id":1,"method":"weir.provide","params":{"service":"bench","concurrency":1000}}"#;
                wire::put_frame(wire::TEXT, text, &mut provide);
                stream.write_all(&provide)?;
                let answer = blocking_frame(&mut stream)?;
                ensure!(memmem::find(&answer, br#""result""#).is_some(), "{}", String::from_utf8_lossy(&answer));
            }
            peers.push(stream);
        }
        Self::new("weir", server.pid(), peers, Wire::JsonRpc, layout, busy_poll)
    }

    /// The same calls by MicroStream clients, of weir or of another hub.
    pub fn microstream(
        server_name: &'static str,
        addr: SocketAddr,
        pid: u32,
        layout: Layout,
        busy_poll: bool,
    ) -> Result<Self> {
        let mut peers = Vec::new();
        for number in 0..layout.providers + layout.callers {
            let path = format!("/socket.io/?EIO=4&transport=websocket&serviceName=bench{number}");
            let mut stream = blocking_upgrade(addr, &path)?;
            let open = blocking_frame(&mut stream)?;
            ensure!(open.starts_with(b"0{"), "{}", String::from_utf8_lossy(&open));
            let mut connect = Vec::new();
            wire::put_frame(wire::TEXT, b"40", &mut connect);
            stream.write_all(&connect)?;
            let connected = blocking_frame(&mut stream)?;
            ensure!(connected.starts_with(b"40{"), "{}", String::from_utf8_lossy(&connected));
            peers.push(stream);
        }
        Self::new(server_name, pid, peers, Wire::MicroStream, layout, busy_poll)
    }

    /// The same with a floor, which relays the same frames.
    pub fn floor(server_name: &'static str, server: &Process, layout: Layout, busy_poll: bool) -> Result<Self> {
        let mut peers = Vec::new();
        for number in 0..layout.providers + layout.callers {
            let mut stream = std::net::TcpStream::connect(server.addr())?;
            stream.set_nodelay(true)?;
            stream.write_all(&[if number < layout.providers { PROVIDER } else { CALLER }])?;
            let mut hello = [0];
            stream.read_exact(&mut hello)?;
            ensure!(hello == [HELLO], "a floor without a greeting");
            peers.push(stream);
        }
        drop(link::connect(server.addr(), &[PUBLISHER])?); // all peers are connected
        Self::new(server_name, server.pid(), peers, Wire::JsonRpc, layout, busy_poll)
    }

    fn new(
        server_name: &'static str,
        pid: u32,
        streams: Vec<std::net::TcpStream>,
        wire: Wire,
        layout: Layout,
        busy_poll: bool,
    ) -> Result<Self> {
        let poll = Poll::new()?;
        let mut peers = Vec::new();
        for (token, stream) in streams.into_iter().enumerate() {
            stream.set_nonblocking(true)?;
            let mut stream = TcpStream::from_std(stream);
            poll.registry().register(&mut stream, Token(token), Interest::READABLE | Interest::WRITABLE)?;
            let caller = token.checked_sub(layout.providers).map(|number| Caller {
                wire,
                target: number % layout.providers,
                number: number as u32,
                next: 0,
                pending: Vec::new(),
            });
            peers.push(Peer { stream, out: Vec::new(), rest: wire::Rest::default(), caller });
        }
        Ok(Rig { server_name, pid, poll, peers, wire, layout, scratch: vec![0; 64 * 1024], busy_poll })
    }

    /// Calls for `time`, waits for the last response and returns the figures.
    pub fn run(&mut self, time: Duration) -> Result<Measure> {
        let layout = self.layout;
        let mut tally = Tally::default();
        let mut events = Events::with_capacity(256);
        let (cpu, load, begin) = (sys::cpu(self.pid), sys::cpu(std::process::id()), sys::now());
        let end = begin + time.as_nanos() as u64;
        let mut last = begin;
        for (number, peer) in self.peers.iter_mut().enumerate() {
            if self.wire == Wire::MicroStream {
                let beat = format!(r#"42["heartbeat",{{"serviceName":"bench{number}"}}]"#);
                wire::put_frame(wire::TEXT, beat.as_bytes(), &mut peer.out);
            }
            if let Some(caller) = &mut peer.caller {
                (0..layout.in_flight).for_each(|_| caller.call(layout.size, &mut peer.out));
            }
            flush(&mut peer.stream, &mut peer.out)?;
        }
        loop {
            let wait = if self.busy_poll { Duration::ZERO } else { Duration::from_millis(100) };
            match self.poll.poll(&mut events, Some(wait)) {
                Err(error) if error.kind() == ErrorKind::Interrupted => continue,
                result => result?,
            }
            let before = tally.done;
            for event in events.iter() {
                let peer = &mut self.peers[event.token().0];
                peer.read(layout.size, &mut self.scratch, &mut tally)
                    .with_context(|| format!("peer {} of {}", event.token().0, self.server_name))?;
                flush(&mut peer.stream, &mut peer.out)?;
            }
            let now = sys::now();
            if tally.done > before {
                last = now;
            }
            tally.closing = now >= end;
            let pending: usize =
                self.peers.iter().filter_map(|peer| peer.caller.as_ref()).map(|caller| caller.pending.len()).sum();
            if tally.closing && pending == 0 {
                break;
            }
            if now > last.max(end) + 5_000_000_000 {
                tally.faults.lost += pending as u64;
                self.peers.iter_mut().filter_map(|peer| peer.caller.as_mut()).for_each(|caller| caller.pending.clear());
                break;
            }
        }
        std::thread::sleep(Duration::from_millis(5));
        let cpu = sys::cpu(self.pid) - cpu;
        let load = sys::cpu(std::process::id()) - load;
        Ok(Measure::of(self.server_name, tally.done, last - begin, cpu, load, &tally.latency, tally.faults))
    }
}

impl Peer {
    fn read(&mut self, size: usize, scratch: &mut [u8], tally: &mut Tally) -> Result<()> {
        loop {
            let length = match self.stream.read(scratch) {
                Ok(0) => bail!("the connection ended"),
                Ok(length) => length,
                Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(()),
                Err(error) => return Err(error.into()),
            };
            let (caller, out) = (&mut self.caller, &mut self.out);
            self.rest.with(&scratch[..length], |input| {
                let mut at = 0;
                while let Some((opcode, from, to)) = wire::frame(&input[at..])? {
                    let text = &input[at + from..at + to];
                    match (opcode, &mut *caller) {
                        // Engine.IO's own ping.
                        (wire::TEXT, _) if text == b"2" => wire::put_frame(wire::TEXT, b"3", out),
                        (wire::TEXT, Some(caller)) => caller.answered(text, size, out, tally),
                        (wire::TEXT, None) => reply(text, out)?,
                        (wire::PING, _) => wire::put_frame(wire::PONG, text, out),
                        (wire::CLOSE, _) => bail!("closed: {}", String::from_utf8_lossy(text)),
                        _ => {}
                    }
                    at += to;
                }
                Ok(at)
            })?;
            if length < scratch.len() {
                return Ok(());
            }
        }
    }
}

impl Caller {
    fn call(&mut self, size: usize, out: &mut Vec<u8>) {
        let stamp = Stamp { sequence: self.next, sent: sys::now(), channel: self.number };
        self.next += 1;
        let mut text = Vec::with_capacity(size + 100);
        match self.wire {
            Wire::JsonRpc => text.extend_from_slice(br#"{"jsonrpc":"2.0","id":""#),
            Wire::MicroStream => {
                let _ = write!(text, r#"42["request",{{"targetService":"bench{}","payload":{{"id":""#, self.target);
            }
        }
        stamp::put_hex(self.number.into(), 4, &mut text);
        stamp::put_hex(stamp.sequence, 12, &mut text);
        match self.wire {
            Wire::JsonRpc => text.extend_from_slice(br#"","method":"bench/echo","params":"#),
            Wire::MicroStream => text.extend_from_slice(br#"","event":"echo","data":"#),
        }
        stamp.put(size, &mut text);
        text.extend_from_slice(match self.wire {
            Wire::JsonRpc => b"}",
            Wire::MicroStream => b"}}]",
        });
        wire::put_frame(wire::TEXT, &text, out);
        self.pending.push(stamp);
    }

    fn answered(&mut self, text: &[u8], size: usize, out: &mut Vec<u8>, tally: &mut Tally) {
        // The result is the last member and equals the params.
        let (at, tail) = match self.wire {
            Wire::JsonRpc => (CALLER_AT, 1),
            Wire::MicroStream => (br#"42["response",{"id":""#.len(), 2),
        };
        let id = text.get(at..at + 16).and_then(|id| Some((stamp::hex(&id[..4])?, stamp::hex(&id[4..])?)));
        let at = id.and_then(|(_, sequence)| self.pending.iter().position(|call| call.sequence == sequence));
        match (id, at, Stamp::at_end(text, size, tail)) {
            (Some((number, _)), Some(at), Some(echoed))
                if number == u64::from(self.number) && echoed == self.pending[at] =>
            {
                self.pending.swap_remove(at);
                tally.done += 1;
                tally.latency.add(sys::now().saturating_sub(echoed.sent));
            }
            (Some(_), None, _) => tally.faults.duplicated += 1,
            _ => {
                if tally.faults.failed == 0 {
                    eprintln!("load: not an answer: {}", String::from_utf8_lossy(text));
                }
                tally.faults.failed += 1;
                if let Some(at) = at {
                    self.pending.swap_remove(at);
                }
            }
        }
        if !tally.closing {
            self.call(size, out);
        }
    }
}

/// Echoes `params` (or `data`) of a forwarded call, its last member.
fn reply(text: &[u8], out: &mut Vec<u8>) -> Result<()> {
    if let Some(rest) = text.strip_prefix(br#"42["request",{"id":"#) {
        let garbled = || format!("not a request: {}", String::from_utf8_lossy(text));
        let id = &rest[..memchr::memchr(b',', rest).with_context(garbled)?];
        let data = memmem::find(rest, br#""data":"#).with_context(garbled)? + 7;
        let data = &rest[data..rest.len() - 2];
        put(&[br#"42["response",{"id":"#, id, br#","response":"#, data, b"}]"], out);
        return Ok(());
    }
    const ID: &[u8] = br#"{"jsonrpc":"2.0","id":"#;
    let garbled = || format!("not a call: {}", String::from_utf8_lossy(text));
    let rest = text.strip_prefix(ID).with_context(garbled)?;
    let id = &rest[..memchr::memchr(b',', rest).with_context(garbled)?];
    let params = memmem::find(rest, br#""params":"#).with_context(garbled)? + 9;
    let params = &rest[params..rest.len() - 1];
    put(&[ID, id, br#","result":"#, params, b"}"], out);
    Ok(())
}

fn put(parts: &[&[u8]], out: &mut Vec<u8>) {
    wire::put_header(wire::TEXT, parts.iter().map(|part| part.len()).sum(), 0x80, out);
    out.extend_from_slice(&[0; 4]);
    parts.iter().for_each(|part| out.extend_from_slice(part));
}

fn flush(stream: &mut TcpStream, out: &mut Vec<u8>) -> io::Result<()> {
    while !out.is_empty() {
        match stream.write(out) {
            Ok(written) if written == out.len() => out.clear(),
            Ok(written) => drop(out.drain(..written)),
            Err(error) if error.kind() == ErrorKind::WouldBlock => break,
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

/// Opens a WebSocket and reads exactly the head of the response.
fn blocking_upgrade(addr: SocketAddr, path: &str) -> Result<std::net::TcpStream> {
    let mut stream = std::net::TcpStream::connect(addr)?;
    stream.set_nodelay(true)?;
    stream.set_read_timeout(Some(Duration::from_secs(10)))?;
    stream.write_all(wire::upgrade(&addr.to_string(), path).as_bytes())?;
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        let mut byte = [0];
        stream.read_exact(&mut byte)?;
        head.extend_from_slice(&byte);
    }
    ensure!(head.starts_with(b"HTTP/1.1 101 "), "{}", String::from_utf8_lossy(&head));
    Ok(stream)
}

fn blocking_frame(stream: &mut std::net::TcpStream) -> Result<Vec<u8>> {
    let mut input = Vec::new();
    loop {
        let mut piece = [0; 4096];
        let length = stream.read(&mut piece)?;
        ensure!(length > 0, "the connection ended");
        input.extend_from_slice(&piece[..length]);
        if let Some((_, from, to)) = wire::frame(&input)? {
            return Ok(input[from..to].to_vec());
        }
    }
}
