//! HTTP/1.1 requests on persistent connections: durable long-polls and publishing.

use std::{
    io::{ErrorKind, Read, Write},
    net::SocketAddr,
    time::Duration,
};

use anyhow::{Context, Result, bail, ensure};
use memchr::memmem;
use mio::{Events, Interest, Poll, Token, net::TcpStream};

use crate::{
    fan::ALL,
    link::{self, HELLO, PUBLISHER, READER},
    report::Measure,
    stamp::{Faults, Histogram, Seen, Stamp},
    sys::{self, Process, Server},
    wire,
};

/// A persistent connection with one request in flight.
struct Requester {
    stream: TcpStream,
    rest: wire::Rest,
    sent: u64,
}

impl Requester {
    fn ask(&mut self, request: &[u8]) -> Result<()> {
        self.sent = sys::now();
        // Requests are small and sent one at a time, so the socket always has room.
        ensure!(self.stream.write(request)? == request.len(), "no room for a request");
        Ok(())
    }

    /// Reads the available input and calls `got` with each whole response: status, body and all bytes.
    fn read(&mut self, scratch: &mut [u8], mut got: impl FnMut(u16, &[u8], &[u8]) -> Result<()>) -> Result<()> {
        loop {
            let length = match self.stream.read(scratch) {
                Ok(0) => bail!("the connection ended"),
                Ok(length) => length,
                Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(()),
                Err(error) => return Err(error.into()),
            };
            self.rest.with(&scratch[..length], |input| {
                let mut at = 0;
                while let Some((status, body, length)) = wire::response(&input[at..])? {
                    got(status, body, &input[at..at + length])?;
                    at += length;
                }
                Ok(at)
            })?;
            if length < scratch.len() {
                return Ok(());
            }
        }
    }
}

/// Connections to weir or to a floor, registered in order.
fn requesters(addr: SocketAddr, floor: bool, count: usize, poll: &Poll) -> Result<Vec<Requester>> {
    (0..count)
        .map(|token| {
            let mut stream = std::net::TcpStream::connect(addr)?;
            stream.set_nodelay(true)?;
            if floor {
                stream.write_all(&[READER])?;
                let mut hello = [0];
                stream.read_exact(&mut hello)?;
                ensure!(hello == [HELLO], "a floor without a greeting");
            }
            stream.set_nonblocking(true)?;
            let mut stream = TcpStream::from_std(stream);
            poll.registry().register(&mut stream, Token(token), Interest::READABLE)?;
            Ok(Requester { stream, rest: wire::Rest::default(), sent: 0 })
        })
        .collect()
}

// === long-poll ===

/// Many consumers of one channel, each of which polls again as soon as it has a response.
pub struct Polls {
    server_name: &'static str,
    pid: u32,
    host: String,
    poll: Poll,
    pollers: Vec<(Requester, Seen, String)>,
    publisher: TcpStream,
    /// The response of a floor, whose stamp is replaced for each message.
    answer: Option<Vec<u8>>,
    dialect: Dialect,
    size: usize,
    next: u64,
    pub busy_poll: bool,
}

/// How a consumer sends its position.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Dialect {
    /// With the token of the last page.
    Tokens,
    /// The same, with a cursor stored by weir.
    Named,
    /// As a client of ganomede-events: with the last id, and weir stores the position.
    Ganomede,
}

/// Shared secret of ganomede clients.
pub const SECRET: &str = "s3cret";

const POLLED: u32 = 900_000;

impl Polls {
    pub fn weir(server: &Process, consumers: usize, size: usize, dialect: Dialect) -> Result<Self> {
        let publisher = link::connect(server.addr(), wire::upgrade(&server.addr().to_string(), "/v1/ws").as_bytes())?;
        Self::new("weir", server, consumers, size, dialect, publisher, None)
    }

    /// A floor returns `answer`, a response in that format, with a new stamp for each message.
    pub fn floor(server: &Process, consumers: usize, size: usize, dialect: Dialect, answer: Vec<u8>) -> Result<Self> {
        let poll = Poll::new()?;
        let requesters = requesters(server.addr(), true, consumers, &poll)?;
        let publisher = link::connect(server.addr(), &[PUBLISHER])?;
        let mut polls = Self::with("floor", server, poll, requesters, size, dialect, publisher, Some(answer));
        for at in 0..polls.pollers.len() {
            polls.ask(at)?;
        }
        Ok(polls)
    }

    fn new(
        server_name: &'static str,
        server: &Process,
        consumers: usize,
        size: usize,
        dialect: Dialect,
        publisher: TcpStream,
        answer: Option<Vec<u8>>,
    ) -> Result<Self> {
        let poll = Poll::new()?;
        let requesters = requesters(server.addr(), false, consumers, &poll)?;
        let mut polls = Self::with(server_name, server, poll, requesters, size, dialect, publisher, answer);
        // The current position, from which nothing may be missed.
        for at in 0..polls.pollers.len() {
            let start = match dialect {
                Dialect::Tokens => "after=now".to_owned(),
                Dialect::Named => format!("consumer=load-{at}&start=now"),
                // A new channel: the position before its first event.
                Dialect::Ganomede => {
                    polls.pollers[at].2 = "0".to_owned();
                    continue;
                }
            };
            let request = format!(
                "GET /v1/events?channel={}&{start} HTTP/1.1\r\nHost: {}\r\n\r\n",
                link::channel(POLLED),
                polls.host
            );
            polls.pollers[at].0.ask(request.as_bytes())?;
        }
        let mut scratch = vec![0; 64 * 1024];
        let mut events = Events::with_capacity(256);
        let started = sys::now();
        while polls.pollers.iter().any(|(.., next)| next.is_empty()) {
            polls.poll.poll(&mut events, Some(Duration::from_millis(100)))?;
            for event in events.iter() {
                let (requester, _, next) = &mut polls.pollers[event.token().0];
                requester.read(&mut scratch, |status, body, _| {
                    ensure!(status == 200, "status {status}: {}", String::from_utf8_lossy(body));
                    *next = position(body)?;
                    Ok(())
                })?;
            }
            ensure!(sys::now() - started < 10_000_000_000, "consumers were not answered within 10 s");
        }
        for at in 0..polls.pollers.len() {
            polls.ask(at)?;
        }
        Ok(polls)
    }

    #[expect(clippy::too_many_arguments, reason = "a constructor, called twice")]
    fn with(
        server_name: &'static str,
        server: &Process,
        poll: Poll,
        requesters: Vec<Requester>,
        size: usize,
        dialect: Dialect,
        publisher: TcpStream,
        answer: Option<Vec<u8>>,
    ) -> Self {
        let pollers =
            requesters.into_iter().map(|requester| (requester, Seen::new(POLLED, 1), String::new())).collect();
        let host = server.addr().to_string();
        Polls {
            server_name,
            pid: server.pid(),
            host,
            poll,
            pollers,
            publisher,
            answer,
            dialect,
            size,
            next: 0,
            busy_poll: false,
        }
    }

    fn ask(&mut self, at: usize) -> Result<()> {
        let (requester, _, next) = &mut self.pollers[at];
        let channel = link::channel(POLLED);
        let target = match self.dialect {
            Dialect::Tokens => format!("/v1/events?channel={channel}&after={next}&wait=30s"),
            Dialect::Named => format!("/v1/events?channel={channel}&after={next}&wait=30s&consumer=load-{at}"),
            Dialect::Ganomede => {
                format!("/events/v1/events?channel={channel}&after={next}&clientId=load-{at}&secret={SECRET}")
            }
        };
        let request = format!("GET {target} HTTP/1.1\r\nHost: {}\r\n\r\n", self.host);
        requester.ask(request.as_bytes())
    }

    fn publish(&mut self) -> Result<()> {
        let stamp = Stamp { sequence: self.next, sent: sys::now(), channel: POLLED };
        self.next += 1;
        let mut out = Vec::new();
        match &mut self.answer {
            None => {
                let mut message = format!(
                    r#"{{"jsonrpc":"2.0","method":"weir.publish","params":{{"channel":"{}","data":"#,
                    link::channel(POLLED)
                )
                .into_bytes();
                stamp.put(self.size, &mut message);
                message.extend_from_slice(b"}}");
                wire::put_frame(wire::TEXT, &message, &mut out);
            }
            Some(answer) => {
                stamp.patch(answer);
                out.extend_from_slice(&(answer.len() as u32).to_be_bytes());
                out.extend_from_slice(&ALL.to_be_bytes());
                out.extend_from_slice(answer);
            }
        }
        ensure!(self.publisher.write(&out)? == out.len(), "no room to publish");
        Ok(())
    }

    /// Publishes `rate` events per second for `time`. Also returns a response with one event as received.
    pub fn run(&mut self, rate: f64, time: Duration) -> Result<(Measure, Option<Vec<u8>>)> {
        let mut scratch = vec![0; 64 * 1024];
        let mut events = Events::with_capacity(256);
        let mut latency = Histogram::default();
        let mut faults = Faults::default();
        let mut sample = None;
        let (mut delivered, mut published) = (0, 0);
        let consumers = self.pollers.len() as u64;
        let (cpu, load, begin) = (sys::cpu(self.pid), sys::cpu(std::process::id()), sys::now());
        let end = begin + time.as_nanos() as u64;
        let mut last = begin;
        loop {
            let now = sys::now();
            let mut wait = Duration::from_millis(100);
            if now < end {
                let due = begin + (published as f64 / rate * 1e9) as u64;
                if now >= due {
                    self.publish()?;
                    published += 1;
                }
                let due = begin + (published as f64 / rate * 1e9) as u64;
                wait = Duration::from_nanos(due.saturating_sub(sys::now()));
            } else if delivered == published * consumers || now > last.max(end) + 5_000_000_000 {
                break;
            }
            self.poll.poll(&mut events, Some(if self.busy_poll { Duration::ZERO } else { wait }))?;
            for event in events.iter() {
                let at = event.token().0;
                let dialect = self.dialect;
                let (requester, seen, next) = &mut self.pollers[at];
                let mut answered = false;
                let now = sys::now();
                requester.read(&mut scratch, |status, body, whole| {
                    ensure!(status == 200, "status {status}: {}", String::from_utf8_lossy(body));
                    let before = delivered;
                    for stamp in Stamp::all(body) {
                        if seen.record(stamp, &mut faults) {
                            delivered += 1;
                            latency.add(now.saturating_sub(stamp.sent));
                        }
                    }
                    if delivered == before + 1 && sample.is_none() {
                        sample = Some(whole.to_vec());
                    }
                    match dialect {
                        // An empty page does not move the position.
                        Dialect::Ganomede => *next = last_id(body).unwrap_or_else(|| std::mem::take(next)),
                        _ => {
                            faults.gaps += u64::from(memmem::find(body, br#""gaps":[]"#).is_none());
                            *next = position(body)?;
                        }
                    }
                    answered = true;
                    Ok(())
                })?;
                if answered {
                    last = now;
                    self.ask(at)?;
                }
            }
        }
        std::thread::sleep(Duration::from_millis(5));
        let cpu = sys::cpu(self.pid) - cpu;
        let load = sys::cpu(std::process::id()) - load;
        faults.lost += self.pollers.iter().map(|(_, seen, _)| seen.lost(|_| self.next)).sum::<u64>();
        // Lost events are counted once.
        self.pollers.iter_mut().for_each(|(_, seen, _)| seen.skip_to(|_| self.next));
        let measure = Measure::of(self.server_name, delivered, last.saturating_sub(begin), cpu, load, &latency, faults);
        Ok((measure, sample))
    }
}

/// `id` of the last event of a page, if there is one.
fn last_id(body: &[u8]) -> Option<String> {
    let at = memmem::rfind(body, br#"{"id":"#)? + 6;
    let end = memchr::memchr(b',', &body[at..])?;
    Some(std::str::from_utf8(&body[at..at + end]).ok()?.to_owned())
}

/// `next` of a page.
fn position(body: &[u8]) -> Result<String> {
    let garbled = || format!("a page without next: {}", String::from_utf8_lossy(body));
    let at = memmem::rfind(body, br#""next":""#).with_context(garbled)? + 8;
    let end = memchr::memchr(b'"', &body[at..]).with_context(garbled)?;
    Ok(std::str::from_utf8(&body[at..at + end])?.to_owned())
}

// === publish ===

/// Publishers with one request in flight each.
pub struct Posts {
    server_name: &'static str,
    pid: u32,
    poll: Poll,
    posters: Vec<Requester>,
    request: Vec<u8>,
    floor: bool,
    next: u64,
    /// The last offset that weir returned.
    top: Option<u64>,
    pub busy_poll: bool,
}

impl Posts {
    pub fn weir(server: &Process, connections: usize, size: usize) -> Result<Self> {
        Self::new("weir", server, connections, size, false)
    }

    pub fn floor(server: &Process, connections: usize, size: usize) -> Result<Self> {
        Self::new("floor", server, connections, size, true)
    }

    fn new(server_name: &'static str, server: &Process, connections: usize, size: usize, floor: bool) -> Result<Self> {
        let poll = Poll::new()?;
        let posters = requesters(server.addr(), floor, connections, &poll)?;
        if floor {
            drop(link::connect(server.addr(), &[PUBLISHER])?); // all peers are connected
        }
        let mut request = format!(
            "POST /v1/events?channel=bench-posts HTTP/1.1\r\nHost: {}\r\nContent-Length: {size}\r\n\r\n",
            server.addr()
        )
        .into_bytes();
        Stamp { sequence: 0, sent: 0, channel: 0 }.put(size, &mut request);
        let pid = server.pid();
        Ok(Posts { server_name, pid, poll, posters, request, floor, next: 0, top: None, busy_poll: false })
    }

    fn ask(&mut self, at: usize) -> Result<()> {
        Stamp { sequence: self.next, sent: 0, channel: 0 }.patch(&mut self.request);
        self.next += 1;
        self.posters[at].ask(&self.request)
    }

    /// Publishes for `time`. Also returns one response as received.
    pub fn run(&mut self, time: Duration) -> Result<(Measure, Option<Vec<u8>>)> {
        let mut scratch = vec![0; 64 * 1024];
        let mut events = Events::with_capacity(256);
        let mut latency = Histogram::default();
        let mut faults = Faults::default();
        let mut sample = None;
        let mut offsets = Vec::new();
        let mut done = 0;
        let (cpu, load, begin) = (sys::cpu(self.pid), sys::cpu(std::process::id()), sys::now());
        let end = begin + time.as_nanos() as u64;
        let mut last = begin;
        for at in 0..self.posters.len() {
            self.ask(at)?;
        }
        let mut pending = self.posters.len();
        while pending > 0 {
            self.poll.poll(&mut events, Some(Duration::from_millis(if self.busy_poll { 0 } else { 100 })))?;
            for event in events.iter() {
                let at = event.token().0;
                let mut answered = false;
                let mut offset = None;
                let requester = &mut self.posters[at];
                requester.read(&mut scratch, |status, body, whole| {
                    answered = true;
                    done += 1;
                    sample.get_or_insert_with(|| whole.to_vec());
                    if status == 201 {
                        offset = offset_of(body);
                    } else {
                        faults.failed += 1;
                    }
                    Ok(())
                })?;
                if !answered {
                    continue;
                }
                last = sys::now();
                latency.add(last - requester.sent);
                if !self.floor {
                    offsets.extend(offset);
                }
                if last < end {
                    self.ask(at)?;
                } else {
                    pending -= 1;
                }
            }
            if sys::now() > last.max(end) + 5_000_000_000 {
                faults.lost += pending as u64;
                break;
            }
        }
        if !self.floor {
            // Offsets have no holes, and no other client writes to this channel.
            offsets.sort_unstable();
            let distinct = offsets.windows(2).filter(|pair| pair[0] != pair[1]).count() + offsets.len().min(1);
            faults.duplicated += (offsets.len() - distinct) as u64;
            let first = self.top.map(|top| top + 1).or(offsets.first().copied()).unwrap_or(1);
            self.top = offsets.last().copied().or(self.top);
            faults.lost += (self.top.unwrap_or(0) + 1).saturating_sub(first + distinct as u64);
        }
        std::thread::sleep(Duration::from_millis(5));
        let cpu = sys::cpu(self.pid) - cpu;
        let load = sys::cpu(std::process::id()) - load;
        Ok((Measure::of(self.server_name, done, last - begin, cpu, load, &latency, faults), sample))
    }
}

fn offset_of(body: &[u8]) -> Option<u64> {
    let at = memmem::find(body, br#""offset":"#)? + 9;
    let digits = body[at..].iter().take_while(|byte| byte.is_ascii_digit()).count();
    std::str::from_utf8(&body[at..at + digits]).ok()?.parse().ok()
}
