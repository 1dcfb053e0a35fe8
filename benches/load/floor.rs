//! The floors: servers that only move the bytes, as the lower bound of the cost. Each is a process of its own.
//!
//! They trust their peers, parse as little as possible and stop at the first error: only the load program connects to
//! them.

use std::{
    collections::VecDeque,
    io::{self, ErrorKind, Read, Write},
    net::{Ipv4Addr, TcpListener, TcpStream as StdStream},
};

use anyhow::{Context, Result, bail};
use mio::{Events, Interest, Poll, Token, net::TcpStream};

use crate::{
    fan::ALL,
    link::{CALLER, HELLO, PROVIDER, PUBLISHER, READER},
    wire,
};

/// The offset of the caller's number in the text of a call: four hex digits.
pub const CALLER_AT: usize = br#"{"jsonrpc":"2.0","id":""#.len();

/// Runs the floor `role` until its peers have disconnected. Prints its address first.
pub fn run(role: &str) -> Result<()> {
    let mut answer = Vec::new();
    io::stdin().read_to_end(&mut answer)?;
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
    println!("{}", listener.local_addr()?);
    match role {
        "fan" => fan(&listener, false),
        "fan-batched" => fan(&listener, true),
        "relay" => relay(&listener, false),
        "relay-batched" => relay(&listener, true),
        "answer" => answerer(&listener, &answer),
        "hold" => hold(&listener),
        _ => bail!("no floor {role}"),
    }
}

/// Accepts connections until one with the role `last`.
fn accept(listener: &TcpListener, last: u8) -> Result<(Vec<(u8, StdStream)>, StdStream)> {
    let mut peers = Vec::new();
    loop {
        let (mut stream, _) = listener.accept()?;
        stream.set_nodelay(true)?;
        let mut role = [0];
        stream.read_exact(&mut role)?;
        if role[0] == last {
            return Ok((peers, stream));
        }
        stream.write_all(&[HELLO])?;
        peers.push((role[0], stream));
    }
}

/// Frames of a publisher: length, reader, bytes.
fn frames(input: &[u8], mut got: impl FnMut(u32, &[u8])) -> usize {
    let mut at = 0;
    while let Some(header) = input.get(at..at + 8) {
        let length = u32::from_be_bytes([header[0], header[1], header[2], header[3]]) as usize;
        let to = u32::from_be_bytes([header[4], header[5], header[6], header[7]]);
        let Some(frame) = input.get(at + 8..at + 8 + length) else { break };
        got(to, frame);
        at += 8 + length;
    }
    at
}

/// Forwards frames of the publisher to every reader or to one: with one write for each frame, or one for all received.
fn fan(listener: &TcpListener, batched: bool) -> Result<()> {
    let (readers, mut publisher) = accept(listener, PUBLISHER)?;
    let mut readers: Vec<_> = readers.into_iter().map(|(role, stream)| (role == READER).then_some(stream)).collect();
    let mut buffer = vec![0; 256 * 1024];
    let mut filled = 0;
    let mut batches: Vec<Vec<u8>> = vec![Vec::new(); readers.len()];
    let mut dirty: Vec<usize> = Vec::new();
    let mut all = Vec::new();
    loop {
        let read = publisher.read(&mut buffer[filled..])?;
        if read == 0 {
            return Ok(());
        }
        filled += read;
        let used = frames(&buffer[..filled], |to, frame| match (to, batched) {
            (ALL, true) => all.extend_from_slice(frame),
            (ALL, false) => readers.iter_mut().for_each(|reader| put(reader, frame)),
            (to, true) => {
                if let Some(batch) = batches.get_mut(to as usize) {
                    if batch.is_empty() {
                        dirty.push(to as usize);
                    }
                    batch.extend_from_slice(frame);
                }
            }
            (to, false) => readers.get_mut(to as usize).into_iter().for_each(|reader| put(reader, frame)),
        });
        buffer.copy_within(used..filled, 0);
        filled -= used;
        if !all.is_empty() {
            readers.iter_mut().for_each(|reader| put(reader, &all));
            all.clear();
        }
        for at in dirty.drain(..) {
            put(&mut readers[at], &batches[at]);
            batches[at].clear();
        }
    }
}

/// Blocks until everything is written. A reader that has disconnected is dropped.
fn put(reader: &mut Option<StdStream>, bytes: &[u8]) {
    if let Some(stream) = reader
        && stream.write_all(bytes).is_err()
    {
        *reader = None;
    }
}

/// A connection in an epoll loop.
struct Peer {
    stream: TcpStream,
    rest: Vec<u8>,
    out: Vec<u8>,
    provider: bool,
    gone: bool,
}

impl Peer {
    fn new(stream: StdStream, provider: bool, poll: &Poll, token: usize) -> Result<Self> {
        stream.set_nonblocking(true)?;
        stream.set_nodelay(true)?;
        let mut stream = TcpStream::from_std(stream);
        poll.registry().register(&mut stream, Token(token), Interest::READABLE | Interest::WRITABLE)?;
        Ok(Peer { stream, rest: Vec::new(), out: Vec::new(), provider, gone: false })
    }

    /// Reads the available input into `rest`.
    fn fill(&mut self, scratch: &mut [u8]) -> Result<()> {
        loop {
            match self.stream.read(scratch) {
                Ok(0) => self.gone = true,
                Ok(length) => {
                    self.rest.extend_from_slice(&scratch[..length]);
                    if length == scratch.len() {
                        continue;
                    }
                }
                Err(error) if error.kind() == ErrorKind::WouldBlock => {}
                Err(_) => self.gone = true,
            }
            return Ok(());
        }
    }

    fn flush(&mut self) {
        while !self.out.is_empty() {
            match self.stream.write(&self.out) {
                Ok(written) if written == self.out.len() => self.out.clear(),
                Ok(written) => drop(self.out.drain(..written)),
                Err(error) if error.kind() == ErrorKind::WouldBlock => return,
                Err(_) => {
                    self.gone = true;
                    return;
                }
            }
        }
    }
}

/// Relays calls to the providers in turn, and replies to the caller whose number they contain.
fn relay(listener: &TcpListener, batched: bool) -> Result<()> {
    let (mut streams, last) = accept(listener, PUBLISHER)?;
    drop(last); // marks that all peers are connected
    streams.retain(|(role, _)| matches!(*role, CALLER | PROVIDER));
    let mut poll = Poll::new()?;
    let mut peers = Vec::new();
    for (token, (role, stream)) in streams.into_iter().enumerate() {
        peers.push(Peer::new(stream, role == PROVIDER, &poll, token)?);
    }
    let providers: Vec<_> = (0..peers.len()).filter(|at| peers[*at].provider).collect();
    let callers: Vec<_> = (0..peers.len()).filter(|at| !peers[*at].provider).collect();
    let mut turn = 0;
    let mut events = Events::with_capacity(256);
    let mut scratch = vec![0; 64 * 1024];
    let mut dirty = Vec::new();
    loop {
        poll.poll(&mut events, None)?;
        for event in events.iter() {
            let at = event.token().0;
            peers[at].flush();
            peers[at].fill(&mut scratch)?;
            let input = std::mem::take(&mut peers[at].rest);
            let mut done = 0;
            while let Some((_, from, to)) = wire::frame(&input[done..])? {
                let text = &input[done + from..done + to];
                let (target, mask) = if peers[at].provider {
                    let caller = text.get(CALLER_AT..CALLER_AT + 4).and_then(crate::stamp::hex).context("no caller")?;
                    (callers[caller as usize], 0)
                } else {
                    turn = (turn + 1) % providers.len();
                    (providers[turn], 0)
                };
                let target_peer = &mut peers[target];
                wire::put_header(wire::TEXT, text.len(), mask, &mut target_peer.out);
                target_peer.out.extend_from_slice(text);
                if batched {
                    dirty.push(target);
                } else {
                    target_peer.flush();
                }
                done += to;
            }
            peers[at].rest = input;
            peers[at].rest.drain(..done);
        }
        dirty.drain(..).for_each(|at: usize| peers[at].flush());
        if peers.iter().all(|peer| peer.gone) {
            return Ok(());
        }
    }
}

/// Answers every request with the same bytes.
fn answerer(listener: &TcpListener, answer: &[u8]) -> Result<()> {
    let (streams, last) = accept(listener, PUBLISHER)?;
    drop(last);
    let mut poll = Poll::new()?;
    let mut peers = Vec::new();
    for (token, (_, stream)) in streams.into_iter().enumerate() {
        peers.push(Peer::new(stream, false, &poll, token)?);
    }
    let mut events = Events::with_capacity(256);
    let mut scratch = vec![0; 64 * 1024];
    loop {
        poll.poll(&mut events, None)?;
        for event in events.iter() {
            let peer = &mut peers[event.token().0];
            peer.fill(&mut scratch)?;
            while let Some((head, length)) = request(&peer.rest)? {
                peer.rest.drain(..head + length);
                peer.out.extend_from_slice(answer);
            }
            peer.flush();
        }
        if peers.iter().all(|peer| peer.gone) {
            return Ok(());
        }
    }
}

/// Length of head and body of a whole request.
fn request(input: &[u8]) -> Result<Option<(usize, usize)>> {
    let Some(end) = memchr::memmem::find(input, b"\r\n\r\n") else { return Ok(None) };
    let length = match memchr::memmem::find(&input[..end + 2], b"Content-Length: ") {
        Some(at) => std::str::from_utf8(&input[at + 16..end])?.split("\r\n").next().unwrap_or("").parse()?,
        None => 0,
    };
    Ok((input.len() >= end + 4 + length).then_some((end + 4, length)))
}

/// Holds every request until the publisher sends the response.
fn hold(listener: &TcpListener) -> Result<()> {
    let (streams, publisher) = accept(listener, PUBLISHER)?;
    let mut poll = Poll::new()?;
    let mut peers = Vec::new();
    for (token, (_, stream)) in streams.into_iter().enumerate() {
        peers.push(Peer::new(stream, false, &poll, token)?);
    }
    let publisher_at = peers.len();
    peers.push(Peer::new(publisher, true, &poll, publisher_at)?);
    let mut waiting = vec![false; publisher_at];
    let mut answers: Vec<VecDeque<Vec<u8>>> = vec![VecDeque::new(); publisher_at];
    let mut events = Events::with_capacity(256);
    let mut scratch = vec![0; 64 * 1024];
    loop {
        poll.poll(&mut events, None)?;
        for event in events.iter() {
            let at = event.token().0;
            peers[at].fill(&mut scratch)?;
            if at == publisher_at {
                let input = std::mem::take(&mut peers[at].rest);
                let used = frames(&input, |_, answer| {
                    for (reader, waiting) in waiting.iter_mut().enumerate() {
                        if std::mem::take(waiting) {
                            peers[reader].out.extend_from_slice(answer);
                            peers[reader].flush();
                        } else {
                            answers[reader].push_back(answer.to_vec());
                        }
                    }
                });
                peers[at].rest = input;
                peers[at].rest.drain(..used);
                continue;
            }
            while let Some((head, length)) = request(&peers[at].rest)? {
                peers[at].rest.drain(..head + length);
                match answers[at].pop_front() {
                    Some(answer) => peers[at].out.extend_from_slice(&answer),
                    None => waiting[at] = true,
                }
            }
            peers[at].flush();
        }
        if peers.iter().all(|peer| peer.gone) {
            return Ok(());
        }
    }
}
