//! Scenarios with Redis: appends and messages between nodes. The floors are a minimal client of the same Redis.

use std::{
    collections::VecDeque,
    io::{ErrorKind, Read, Write},
    net::{Ipv4Addr, Shutdown, SocketAddr, TcpListener, TcpStream as StdStream},
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail, ensure};
use memchr::memmem;
use mio::{Events, Interest, Poll, Token, net::TcpStream};

use crate::{
    link,
    report::Measure,
    stamp::{Faults, Histogram, Stamp},
    sys::{self, Process, Server, Weir},
    wire,
};

/// The channel of weir and that of the floor. Names of equal length can be replaced within a command.
const CHANNEL: &str = "bench-redis";
const FLOOR: &str = "bench-floor";
/// The number of digits of an idempotency key. Keys of equal length can be replaced within a command.
const KEY: usize = 16;

/// The minimum of an append: a counter, a log and a message to subscribers.
const BARE: &str = "local top = redis.call('HINCRBY', KEYS[1], 'top', 1)
redis.call('XADD', KEYS[2], 'MAXLEN', '~', 1000, top .. '-0', 'e', ARGV[1])
redis.call('PUBLISH', KEYS[3], ARGV[1])
return top";

/// The settings of a weir on Redis.
pub fn node(how: &Weir, redis: SocketAddr) -> Weir {
    let mut how = how.clone();
    how.env.push(("WEIR__BUS__BACKEND".into(), "redis".into()));
    how.env.push(("WEIR__BUS__REDIS__URL".into(), format!("redis://{redis}")));
    how
}

/// Adds the CPU time and commands of Redis during `work` to its figures.
pub fn beside(redis: &Process, work: impl FnOnce() -> Result<Measure>) -> Result<Measure> {
    let (cpu, publishes) = (sys::cpu(redis.pid()), publishes(redis)?);
    let mut measure = work()?;
    let cpu = sys::cpu(redis.pid()) - cpu;
    let publishes = self::publishes(redis)? - publishes;
    let count = measure.done.max(1) as f64;
    measure.figures.insert(1, ("redis_us", cpu as f64 / 1e3 / count));
    measure.figures.insert(2, ("publishes_each", publishes as f64 / count));
    Ok(measure)
}

/// The number of PUBLISH commands that Redis has executed.
fn publishes(redis: &Process) -> Result<u64> {
    let mut stream = StdStream::connect(redis.addr())?;
    stream.write_all(&command(&[b"INFO", b"commandstats"]))?;
    let mut text = Vec::new();
    let mut piece = [0; 16 * 1024];
    loop {
        let length = stream.read(&mut piece)?;
        ensure!(length > 0, "Redis ended");
        text.extend_from_slice(&piece[..length]);
        if reply(&text)?.is_some() {
            break;
        }
    }
    let text = String::from_utf8_lossy(&text);
    let calls = text.lines().filter_map(|line| line.strip_prefix("cmdstat_publish:calls="));
    Ok(calls.filter_map(|rest| rest.split(',').next()?.parse::<u64>().ok()).sum())
}

// === a subset of the Redis protocol ===

fn command(args: &[&[u8]]) -> Vec<u8> {
    let mut out = format!("*{}\r\n", args.len()).into_bytes();
    for arg in args {
        out.extend_from_slice(format!("${}\r\n", arg.len()).as_bytes());
        out.extend_from_slice(arg);
        out.extend_from_slice(b"\r\n");
    }
    out
}

/// Length of the whole reply or command at the start of `input`. Fails on an error of Redis.
fn reply(input: &[u8]) -> Result<Option<usize>> {
    let Some(end) = memmem::find(input, b"\r\n") else { return Ok(None) };
    let line = std::str::from_utf8(&input[..end])?;
    let number = || line[1..].parse::<i64>().with_context(|| format!("Redis replies {line}"));
    let mut at = end + 2;
    match input[0] {
        b'+' | b':' | b'_' => {}
        b'-' => bail!("Redis replies {line}"),
        b'$' => {
            if let Ok(length) = usize::try_from(number()?) {
                at += length + 2;
            }
        }
        b'*' | b'>' => {
            for _ in 0..number()?.max(0) {
                match input.get(at..).map(reply).transpose()?.flatten() {
                    Some(length) => at += length,
                    None => return Ok(None),
                }
            }
        }
        _ => bail!("Redis replies {line}"),
    }
    Ok((at <= input.len()).then_some(at))
}

// === the commands of weir ===

/// A proxy before Redis that records the commands of weir, one text for each connection.
struct Recorder {
    addr: SocketAddr,
    commands: Arc<Mutex<Vec<Vec<u8>>>>,
}

impl Recorder {
    fn start(redis: SocketAddr) -> Result<Self> {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
        let addr = listener.local_addr()?;
        let commands: Arc<Mutex<Vec<Vec<u8>>>> = Arc::default();
        let recorded = commands.clone();
        // The thread ends with the process. It is used for the warm-up only and is idle afterwards.
        std::thread::spawn(move || {
            for client in listener.incoming().flatten() {
                let Ok(server) = StdStream::connect(redis) else { return };
                let (Ok(back), Ok(from)) = (client.try_clone(), server.try_clone()) else { return };
                let mut all = recorded.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
                all.push(Vec::new());
                let index = all.len() - 1;
                drop(all);
                let recorded = recorded.clone();
                std::thread::spawn(move || {
                    forward(client, server, |bytes| {
                        recorded.lock().unwrap_or_else(|poisoned| poisoned.into_inner())[index]
                            .extend_from_slice(bytes);
                    });
                });
                std::thread::spawn(move || forward(from, back, |_| {}));
            }
        });
        Ok(Recorder { addr, commands })
    }

    /// The first command that contains `needle`.
    fn find(&self, needle: &[u8]) -> Result<Option<Vec<u8>>> {
        let commands = self.commands.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        for text in commands.iter() {
            let mut at = 0;
            while let Some(length) = text.get(at..).filter(|rest| !rest.is_empty()).map(reply).transpose()?.flatten() {
                let one = &text[at..at + length];
                if memmem::find(one, needle).is_some() {
                    return Ok(Some(one.to_vec()));
                }
                at += length;
            }
        }
        Ok(None)
    }
}

fn forward(mut from: StdStream, mut to: StdStream, mut seen: impl FnMut(&[u8])) {
    let mut buffer = [0; 16 * 1024];
    while let Ok(length @ 1..) = from.read(&mut buffer) {
        seen(&buffer[..length]);
        if to.write_all(&buffer[..length]).is_err() {
            break;
        }
    }
    let _ = to.shutdown(Shutdown::Both);
}

/// The command with which weir appends one event. The floor repeats it.
pub fn recorded(how: &Weir, redis: &Process, size: usize, keyed: bool) -> Result<Vec<u8>> {
    let recorder = Recorder::start(redis.addr())?;
    let weir = Process::weir(&node(how, recorder.addr))?;
    let mut publishers = Publishers::new(&weir, 1, 1, size, keyed, false)?;
    // The second publish is recorded: the first one also creates the channel.
    while publishers.next < 3 {
        publishers.run(Duration::from_millis(50)).with_context(|| format!("weir's log: {}", weir.log()))?;
    }
    let mut needle = Vec::new();
    Stamp { sequence: 1, sent: 0, channel: 0 }.put(size, &mut needle);
    let mut found = recorder.find(&needle)?.context("weir sent no command with the event to Redis")?;
    for at in memmem::find_iter(&found.clone(), CHANNEL) {
        found[at..at + FLOOR.len()].copy_from_slice(FLOOR.as_bytes());
    }
    Ok(found)
}

// === a minimal client ===

/// One connection with a number of commands in flight.
pub struct Pipe {
    server_name: &'static str,
    poll: Poll,
    stream: TcpStream,
    command: Vec<u8>,
    /// The offsets of the idempotency key, which must be unique for each command.
    keys: Vec<usize>,
    next: u64,
    in_flight: usize,
    busy_poll: bool,
}

impl Pipe {
    /// Repeats `command`. With `keyed` each one has a new key.
    pub fn new(
        server_name: &'static str,
        redis: &Process,
        command: Vec<u8>,
        keyed: bool,
        in_flight: usize,
        busy: bool,
    ) -> Result<Self> {
        let keys = if keyed { memmem::find_iter(&command, &key(1)).collect() } else { Vec::new() };
        ensure!(keyed != keys.is_empty(), "no key in the command of weir");
        let poll = Poll::new()?;
        let mut stream = link::connect(redis.addr(), b"")?;
        poll.registry().register(&mut stream, Token(0), Interest::READABLE | Interest::WRITABLE)?;
        // Differs from the keys of weir.
        Ok(Pipe { server_name, poll, stream, command, keys, next: 1 << 40, in_flight, busy_poll: busy })
    }

    /// The three commands that any append needs.
    pub fn bare(redis: &Process, size: usize, in_flight: usize, busy: bool) -> Result<Self> {
        let mut stream = StdStream::connect(redis.addr())?;
        stream.write_all(&command(&[b"SCRIPT", b"LOAD", BARE.as_bytes()]))?;
        let mut answer = [0; 128];
        let length = stream.read(&mut answer)?;
        let hash = String::from_utf8_lossy(&answer[..length]).lines().nth(1).context("no hash")?.to_owned();
        let mut event = vec![b'e'; 32];
        Stamp { sequence: 0, sent: 0, channel: 0 }.put(size, &mut event);
        let command = command(&[b"EVALSHA", hash.as_bytes(), b"3", b"{bare}:m", b"{bare}:s", b"{bare}:e", &event]);
        Self::new("three commands", redis, command, false, in_flight, busy)
    }

    pub fn run(&mut self, time: Duration) -> Result<Measure> {
        let mut events = Events::with_capacity(16);
        let mut scratch = vec![0; 256 * 1024];
        let mut latency = Histogram::default();
        let (mut out, mut rest) = (Vec::new(), wire::Rest::default());
        let mut sent: VecDeque<u64> = VecDeque::new();
        let (load, begin) = (sys::cpu(std::process::id()), sys::now());
        let end = begin + time.as_nanos() as u64;
        let (mut done, mut last) = (0, begin);
        loop {
            let now = sys::now();
            while sent.len() < self.in_flight && now < end {
                for at in &self.keys {
                    self.command[*at..*at + KEY].copy_from_slice(&key(self.next));
                }
                self.next += 1;
                out.extend_from_slice(&self.command);
                sent.push_back(now);
            }
            flush(&mut self.stream, &mut out)?;
            if sent.is_empty() {
                break;
            }
            self.poll.poll(&mut events, Some(Duration::from_millis(if self.busy_poll { 0 } else { 100 })))?;
            read(&mut self.stream, &mut rest, &mut scratch, |_| {
                last = sys::now();
                done += 1;
                latency.add(last - sent.pop_front().context("an unexpected response")?);
                Ok(())
            })?;
            ensure!(sys::now() < last.max(end) + 5_000_000_000, "Redis does not answer");
        }
        let load = sys::cpu(std::process::id()) - load;
        Ok(Measure::of(self.server_name, done, last - begin, 0, load, &latency, Faults::default()))
    }
}

fn key(number: u64) -> Vec<u8> {
    format!("{number:0KEY$x}").into_bytes()
}

fn flush(stream: &mut TcpStream, out: &mut Vec<u8>) -> Result<()> {
    while !out.is_empty() {
        match stream.write(out) {
            Ok(written) => drop(out.drain(..written)),
            Err(error) if error.kind() == ErrorKind::WouldBlock => break,
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
}

fn read(
    stream: &mut TcpStream,
    rest: &mut wire::Rest,
    scratch: &mut [u8],
    mut got: impl FnMut(&[u8]) -> Result<()>,
) -> Result<()> {
    loop {
        let length = match stream.read(scratch) {
            Ok(0) => bail!("Redis ended the connection"),
            Ok(length) => length,
            Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(()),
            Err(error) => return Err(error.into()),
        };
        rest.with(&scratch[..length], |input| {
            let mut at = 0;
            while let Some(length) = input.get(at..).filter(|rest| !rest.is_empty()).map(reply).transpose()?.flatten() {
                got(&input[at..at + length])?;
                at += length;
            }
            Ok(at)
        })?;
    }
}

// === hops ===

/// Messages published by one connection and received by another: one way, or both ways.
pub struct Hops {
    poll: Poll,
    publisher: TcpStream,
    listener: TcpStream,
    back: bool,
    in_flight: usize,
    size: usize,
    busy_poll: bool,
}

impl Hops {
    pub fn new(redis: &Process, back: bool, in_flight: usize, size: usize, busy_poll: bool) -> Result<Self> {
        let poll = Poll::new()?;
        let mut publisher = link::connect(redis.addr(), b"")?;
        let mut listener = StdStream::connect(redis.addr())?;
        listener.set_nodelay(true)?;
        listener.write_all(&command(&[b"SUBSCRIBE", b"hop-there", b"hop-back"]))?;
        let mut confirmed = Vec::new();
        while memmem::find_iter(&confirmed, b"subscribe").count() < 2 || !confirmed.ends_with(b":2\r\n") {
            let mut piece = [0; 256];
            let length = listener.read(&mut piece)?;
            ensure!(length > 0, "Redis ended");
            confirmed.extend_from_slice(&piece[..length]);
        }
        listener.set_nonblocking(true)?;
        let mut listener = TcpStream::from_std(listener);
        poll.registry().register(&mut publisher, Token(0), Interest::READABLE | Interest::WRITABLE)?;
        poll.registry().register(&mut listener, Token(1), Interest::READABLE)?;
        Ok(Hops { poll, publisher, listener, back, in_flight, size, busy_poll })
    }

    pub fn run(&mut self, time: Duration) -> Result<Measure> {
        let mut events = Events::with_capacity(16);
        let mut scratch = vec![0; 256 * 1024];
        let mut latency = Histogram::default();
        let mut faults = Faults::default();
        let (mut answers, mut messages, mut out) = (wire::Rest::default(), wire::Rest::default(), Vec::new());
        let (load, begin) = (sys::cpu(std::process::id()), sys::now());
        let end = begin + time.as_nanos() as u64;
        let (mut next, mut done, mut last) = (0, 0, begin);
        loop {
            while next - done < self.in_flight as u64 && sys::now() < end {
                let mut data = Vec::new();
                Stamp { sequence: next, sent: sys::now(), channel: 0 }.put(self.size, &mut data);
                out.extend_from_slice(&command(&[b"PUBLISH", b"hop-there", &data]));
                next += 1;
            }
            flush(&mut self.publisher, &mut out)?;
            if next == done {
                break;
            }
            self.poll.poll(&mut events, Some(Duration::from_millis(if self.busy_poll { 0 } else { 100 })))?;
            read(&mut self.publisher, &mut answers, &mut scratch, |_| Ok(()))?;
            let back = self.back;
            read(&mut self.listener, &mut messages, &mut scratch, |message| {
                let stamp = Stamp::find(message).context("a foreign message")?;
                if back && memmem::find(message, b"hop-there").is_some() {
                    let mut data = Vec::new();
                    stamp.put(self.size, &mut data);
                    out.extend_from_slice(&command(&[b"PUBLISH", b"hop-back", &data]));
                    return Ok(());
                }
                faults.misordered += u64::from(stamp.sequence != done);
                done += 1;
                last = sys::now();
                latency.add(last - stamp.sent);
                Ok(())
            })?;
            ensure!(sys::now() < last.max(end) + 5_000_000_000, "a message is not received");
        }
        let load = sys::cpu(std::process::id()) - load;
        Ok(Measure::of("floor", done, last - begin, 0, load, &latency, faults))
    }
}

// === publishers ===

/// WebSockets with a number of publishes in flight each.
pub struct Publishers {
    pid: u32,
    poll: Poll,
    peers: Vec<Publisher>,
    in_flight: usize,
    size: usize,
    keyed: bool,
    next: u64,
    /// The last offset that weir returned.
    top: Option<u64>,
    pub busy_poll: bool,
}

struct Publisher {
    stream: TcpStream,
    out: Vec<u8>,
    rest: wire::Rest,
    /// The sequences in flight and the times at which they were sent.
    pending: VecDeque<(u64, u64)>,
    open: bool,
}

impl Publishers {
    pub fn new(
        weir: &Process,
        sockets: usize,
        in_flight: usize,
        size: usize,
        keyed: bool,
        busy_poll: bool,
    ) -> Result<Self> {
        let poll = Poll::new()?;
        let mut peers = Vec::new();
        for token in 0..sockets {
            let mut stream = link::connect(weir.addr(), wire::upgrade(&weir.addr().to_string(), "/v1/ws").as_bytes())?;
            poll.registry().register(&mut stream, Token(token), Interest::READABLE | Interest::WRITABLE)?;
            let (out, rest, pending) = (Vec::new(), wire::Rest::default(), VecDeque::new());
            peers.push(Publisher { stream, out, rest, pending, open: false });
        }
        Ok(Publishers { pid: weir.pid(), poll, peers, in_flight, size, keyed, next: 0, top: None, busy_poll })
    }

    pub fn run(&mut self, time: Duration) -> Result<Measure> {
        let mut events = Events::with_capacity(64);
        let mut scratch = vec![0; 64 * 1024];
        let mut latency = Histogram::default();
        let mut faults = Faults::default();
        let mut offsets = Vec::new();
        let (cpu, load, begin) = (sys::cpu(self.pid), sys::cpu(std::process::id()), sys::now());
        let end = begin + time.as_nanos() as u64;
        let mut last = begin;
        loop {
            let closing = sys::now() >= end;
            let mut pending = 0;
            for peer in &mut self.peers {
                while !closing && peer.pending.len() < self.in_flight {
                    peer.publish(self.next, self.size, self.keyed);
                    self.next += 1;
                }
                flush(&mut peer.stream, &mut peer.out)?;
                pending += peer.pending.len();
            }
            if closing && pending == 0 {
                break;
            }
            self.poll.poll(&mut events, Some(Duration::from_millis(if self.busy_poll { 0 } else { 20 })))?;
            for event in events.iter() {
                self.peers[event.token().0].read(&mut scratch, |sent, offset| {
                    last = sys::now();
                    latency.add(last - sent);
                    match offset {
                        Some(offset) => offsets.push(offset),
                        None => faults.failed += 1,
                    }
                })?;
            }
            if sys::now() > last.max(end) + 5_000_000_000 {
                faults.lost += pending as u64;
                break;
            }
        }
        // Offsets have no holes, and no other client writes to this channel.
        let done = offsets.len() as u64;
        offsets.sort_unstable();
        let distinct = offsets.chunk_by(|a, b| a == b).count() as u64;
        faults.duplicated += done - distinct;
        let first = self.top.map(|top| top + 1).or(offsets.first().copied()).unwrap_or(1);
        self.top = offsets.last().copied().or(self.top);
        faults.lost += (self.top.unwrap_or(0) + 1).saturating_sub(first + distinct);
        std::thread::sleep(Duration::from_millis(5));
        let (cpu, load) = (sys::cpu(self.pid) - cpu, sys::cpu(std::process::id()) - load);
        Ok(Measure::of("weir", done, last - begin, cpu, load, &latency, faults))
    }
}

impl Publisher {
    fn publish(&mut self, sequence: u64, size: usize, keyed: bool) {
        let key = match keyed {
            true => format!(r#""key":"{sequence:0KEY$x}","#),
            false => String::new(),
        };
        let mut text = format!(
            r#"{{"jsonrpc":"2.0","id":{sequence},"method":"weir.publish","params":{{"channel":"{CHANNEL}",{key}"data":"#
        )
        .into_bytes();
        // The time is recorded here and not in the event, so that the command of an event can be found and repeated.
        Stamp { sequence, sent: 0, channel: 0 }.put(size, &mut text);
        text.extend_from_slice(b"}}");
        wire::put_frame(wire::TEXT, &text, &mut self.out);
        self.pending.push_back((sequence, sys::now()));
    }

    fn read(&mut self, scratch: &mut [u8], mut answered: impl FnMut(u64, Option<u64>)) -> Result<()> {
        loop {
            let length = match self.stream.read(scratch) {
                Ok(0) => bail!("the connection ended"),
                Ok(length) => length,
                Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(()),
                Err(error) => return Err(error.into()),
            };
            let (open, out, pending) = (&mut self.open, &mut self.out, &mut self.pending);
            self.rest.with(&scratch[..length], |input| {
                let mut at = 0;
                if !*open {
                    let Some((status, length, _)) = wire::head(input)? else { return Ok(0) };
                    ensure!(status == 101, "{}", String::from_utf8_lossy(input));
                    (*open, at) = (true, length);
                }
                while let Some((opcode, from, to)) = wire::frame(&input[at..])? {
                    let text = &input[at + from..at + to];
                    match opcode {
                        wire::TEXT => {
                            let id = number(text, br#""id":"#).context("a response without an id")?;
                            let place = pending.iter().position(|(sequence, _)| *sequence == id);
                            let (_, sent) =
                                place.and_then(|at| pending.remove(at)).context("an unexpected response")?;
                            let offset = number(text, br#""offset":"#);
                            if offset.is_none() {
                                eprintln!("load: not published: {}", String::from_utf8_lossy(text));
                            }
                            answered(sent, offset);
                        }
                        wire::PING => wire::put_frame(wire::PONG, text, out),
                        wire::CLOSE => bail!("closed: {}", String::from_utf8_lossy(text)),
                        _ => {}
                    }
                    at += to;
                }
                Ok(at)
            })?;
        }
    }
}

fn number(text: &[u8], member: &[u8]) -> Option<u64> {
    let at = memmem::find(text, member)? + member.len();
    let digits = text[at..].iter().take_while(|byte| byte.is_ascii_digit()).count();
    std::str::from_utf8(&text[at..at + digits]).ok()?.parse().ok()
}

/// Waits until a node lists `service`, which is provided on another node.
pub fn known(weir: &Process, service: &str) -> Result<()> {
    let began = Instant::now();
    loop {
        let mut stream = StdStream::connect(weir.addr())?;
        let request =
            format!("GET /v1/services?prefix={service} HTTP/1.1\r\nHost: {}\r\nConnection: close\r\n\r\n", weir.addr());
        stream.write_all(request.as_bytes())?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer)?;
        if answer.contains(&format!(r#""service":"{service}""#)) {
            return Ok(());
        }
        ensure!(began.elapsed() < Duration::from_secs(20), "{service} is not listed on another node: {answer}");
        std::thread::sleep(Duration::from_millis(20));
    }
}
