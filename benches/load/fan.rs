//! Fan-out: one publisher and many readers, at a given rate or saturated with a number of messages in flight.

use std::{
    collections::VecDeque,
    io::{self, Write},
    net::SocketAddr,
    time::Duration,
};

use anyhow::{Context, Result, bail, ensure};
use mio::{Events, Poll, net::TcpStream};

use crate::{
    link::{self, Link, PUBLISHER, Tally, Transport},
    report::Measure,
    stamp::Stamp,
    sys::{self, Server},
    wire,
};

/// Readers and their channels.
#[derive(Clone, Copy, Debug)]
pub struct Layout {
    pub transport: Transport,
    /// The number of streams with HTTP/2, otherwise of connections.
    pub readers: usize,
    pub channels: usize,
    /// Channels of each reader: those after the channels of the previous reader, wrapping around.
    pub per_reader: usize,
    /// Bytes of `data`.
    pub size: usize,
}

/// The pace of the publisher.
#[derive(Clone, Copy, Debug)]
pub enum Pace {
    /// Messages per second, over all channels in turn.
    Rate(f64),
    /// The next message is published as soon as fewer than this number are in flight.
    Window(usize),
}

/// The address of all readers of a floor.
pub const ALL: u32 = u32::MAX;

/// One server with its connected readers, driven by this thread.
pub struct Rig {
    pub server_name: &'static str,
    pid: u32,
    poll: Poll,
    pub links: Vec<Link>,
    publisher: TcpStream,
    /// Not yet written to the publisher's connection.
    out: Vec<u8>,
    to: To,
    layout: Layout,
    /// The next sequence of each channel.
    next: Vec<u64>,
    turn: usize,
    scratch: Vec<u8>,
    busy_poll: bool,
}

enum To {
    Weir,
    /// A frame as weir writes it, whose stamp is replaced for each message.
    Floor(Vec<u8>),
}

impl Rig {
    pub fn weir(server: &dyn Server, layout: Layout, busy_poll: bool) -> Result<Self> {
        Self::nodes(server.addr(), server, layout, busy_poll)
    }

    /// The publisher is connected to one node, the readers to another.
    pub fn nodes(publish: SocketAddr, server: &dyn Server, layout: Layout, busy_poll: bool) -> Result<Self> {
        let (connections, per_link) = match layout.transport {
            Transport::H2(streams) => (layout.readers / streams, streams * layout.per_reader),
            _ => (layout.readers, layout.per_reader),
        };
        let publisher = link::connect(publish, wire::upgrade(&publish.to_string(), "/v1/ws").as_bytes())?;
        let mut rig = Self::new("weir", server, publisher, To::Weir, layout, busy_poll)?;
        for at in 0..connections {
            let first = (at * per_link % layout.channels) as u32;
            let Layout { transport, per_reader, channels, size, .. } = layout;
            let link = Link::weir(server.addr(), transport, first, per_reader, channels, size)?;
            rig.add(link)?;
        }
        rig.open()?;
        Ok(rig)
    }

    /// The same readers with a floor, which writes `frame` with a new stamp for each message.
    pub fn floor(
        server_name: &'static str,
        server: &dyn Server,
        layout: Layout,
        frame: Vec<u8>,
        busy_poll: bool,
    ) -> Result<Self> {
        // The publisher connects last: a floor accepts no readers after it.
        let mut links = Vec::new();
        let connections =
            if let Transport::H2(streams) = layout.transport { layout.readers / streams } else { layout.readers };
        for at in 0..connections {
            let first = (at * layout.per_reader % layout.channels) as u32;
            links.push(Link::floor(server.addr(), layout.transport, first, layout.per_reader, layout.size)?);
        }
        let publisher = link::connect(server.addr(), &[PUBLISHER])?;
        let mut rig = Self::new(server_name, server, publisher, To::Floor(frame), layout, busy_poll)?;
        links.into_iter().try_for_each(|link| rig.add(link))?;
        rig.open()?;
        Ok(rig)
    }

    fn new(
        server_name: &'static str,
        server: &dyn Server,
        publisher: TcpStream,
        to: To,
        layout: Layout,
        busy_poll: bool,
    ) -> Result<Self> {
        Ok(Rig {
            server_name,
            pid: server.pid(),
            poll: Poll::new()?,
            links: Vec::new(),
            publisher,
            out: Vec::new(),
            to,
            layout,
            next: vec![0; layout.channels],
            turn: 0,
            scratch: vec![0; 64 * 1024],
            busy_poll,
        })
    }

    fn add(&mut self, mut link: Link) -> Result<()> {
        link.register(self.poll.registry(), self.links.len())?;
        self.links.push(link);
        if self.links.len().is_multiple_of(64) {
            // Responses are read, so that the server is not blocked by a full socket.
            self.turn(&mut Events::with_capacity(1024), &mut Tally::default(), Some(Duration::ZERO))?;
        }
        Ok(())
    }

    /// Waits until every stream is open.
    fn open(&mut self) -> Result<()> {
        let started = sys::now();
        let mut events = Events::with_capacity(1024);
        loop {
            self.turn(&mut events, &mut Tally::default(), Some(Duration::from_millis(50)))?;
            if self.links.iter().all(|link| link.opening == 0) {
                return Ok(());
            }
            if let Some(at) = self.links.iter().position(|link| link.closed) {
                bail!("reader {at} of {}: the connection ended while it opened", self.server_name);
            }
            if sys::now() - started > 30_000_000_000 {
                let left = self.links.iter().filter(|link| link.opening > 0).count();
                bail!("{left} of {} readers of {} did not open within 30 s", self.links.len(), self.server_name);
            }
        }
    }

    /// Handles the input that arrives within `wait`.
    pub fn turn(&mut self, events: &mut Events, tally: &mut Tally, wait: Option<Duration>) -> Result<()> {
        let wait = if self.busy_poll { Some(Duration::ZERO) } else { wait };
        match self.poll.poll(events, wait) {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => return Ok(()),
            result => result?,
        }
        for event in events.iter() {
            let at = event.token().0;
            let link = &mut self.links[at];
            if link.closed {
                continue;
            }
            link.read(&mut self.scratch, tally).with_context(|| format!("reader {at} of {}", self.server_name))?;
            if link.closed {
                tally.faults.failed += 1;
            }
        }
        Ok(())
    }

    /// Queues the next message of the next channel.
    fn publish(&mut self) {
        let channel = self.turn;
        self.turn = (self.turn + 1) % self.layout.channels;
        let stamp = Stamp { sequence: self.next[channel], sent: sys::now(), channel: channel as u32 };
        self.next[channel] += 1;
        match &mut self.to {
            To::Weir => {
                let mut message = Vec::with_capacity(self.layout.size + 120);
                message.extend_from_slice(br#"{"jsonrpc":"2.0","method":"weir.publish","params":{"channel":""#);
                message.extend_from_slice(link::channel(channel as u32).as_bytes());
                message.extend_from_slice(br#"","data":"#);
                stamp.put(self.layout.size, &mut message);
                message.extend_from_slice(b"}}");
                wire::put_frame(wire::TEXT, &message, &mut self.out);
            }
            To::Floor(frame) => {
                stamp.patch(frame);
                // If every channel has one reader, it is the connection with the same number.
                let Layout { channels, per_reader, .. } = self.layout;
                let to =
                    if channels > per_reader || self.links.len() == 1 { (channel / per_reader) as u32 } else { ALL };
                self.out.extend_from_slice(&(frame.len() as u32).to_be_bytes());
                self.out.extend_from_slice(&to.to_be_bytes());
                self.out.extend_from_slice(frame);
            }
        }
    }

    fn flush(&mut self) -> Result<()> {
        while !self.out.is_empty() {
            match self.publisher.write(&self.out) {
                Ok(written) => drop(self.out.drain(..written)),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                Err(error) => return Err(error).with_context(|| format!("publishing to {}", self.server_name)),
            }
        }
        Ok(())
    }

    /// Publishes for `time`, waits for the last event and returns the figures.
    pub fn run(&mut self, pace: Pace, time: Duration) -> Result<(Measure, Option<Vec<u8>>)> {
        let readers_of_a_channel = (self.layout.readers * self.layout.per_reader / self.layout.channels) as u64;
        let mut events = Events::with_capacity(1024);
        let mut tally = Tally { arrived: matches!(pace, Pace::Window(_)).then(Vec::new), ..Tally::default() };
        ensure!(self.layout.channels == 1 || tally.arrived.is_none(), "windows are for one channel");
        let first = self.next.clone();
        let skipped: u64 = first.iter().sum();
        self.links.iter_mut().for_each(|link| link.skip_to(|channel| first[channel as usize]));
        // For a window: the number of readers that have not received each message in flight.
        let mut pending: VecDeque<u64> = VecDeque::new();
        let mut oldest = first[0];

        let (cpu, load, begin) = (sys::cpu(self.pid), sys::cpu(std::process::id()), sys::now());
        let end = begin + time.as_nanos() as u64;
        let mut last = begin;
        let mut progress = begin;
        let mut published = 0;
        loop {
            let now = sys::now();
            let mut wait = Duration::from_millis(100);
            if now < end {
                match pace {
                    Pace::Rate(rate) => {
                        let due = ((now - begin) as f64 / 1e9 * rate) as u64 + 1;
                        // The burst is limited, in case this thread was not scheduled.
                        (published..due.min(published + 10_000)).for_each(|_| self.publish());
                        published = published.max(due.min(published + 10_000));
                        let next = begin + (published as f64 / rate * 1e9) as u64;
                        wait = wait.min(Duration::from_nanos(next.saturating_sub(sys::now())));
                    }
                    Pace::Window(window) => {
                        while pending.len() < window {
                            pending.push_back(readers_of_a_channel);
                            self.publish();
                            published += 1;
                        }
                    }
                }
            } else if tally.delivered >= published * readers_of_a_channel {
                break;
            } else if now - progress > 5_000_000_000 {
                break; // the rest is lost
            }
            self.flush()?;
            if !self.out.is_empty() {
                wait = wait.min(Duration::from_millis(1));
            }
            let before = tally.delivered;
            self.turn(&mut events, &mut tally, Some(wait))?;
            if tally.delivered > before {
                last = sys::now();
                progress = last;
            }
            if let Some(arrived) = &mut tally.arrived {
                for sequence in arrived.drain(..) {
                    if let Some(left) = pending.get_mut((sequence - oldest) as usize) {
                        *left -= 1;
                    }
                }
                while pending.front() == Some(&0) {
                    pending.pop_front();
                    oldest += 1;
                }
            }
            if now > end + 30_000_000_000 {
                break;
            }
        }
        // The server goes to sleep, which makes its CPU time exact.
        std::thread::sleep(Duration::from_millis(5));
        let cpu = sys::cpu(self.pid) - cpu;
        let load = sys::cpu(std::process::id()) - load;
        tally.faults.lost +=
            self.links.iter().map(|link| link.lost(|channel| self.next[channel as usize])).sum::<u64>();
        debug_assert_eq!(self.next.iter().sum::<u64>() - skipped, published);
        let measure =
            Measure::of(self.server_name, tally.delivered, last - begin, cpu, load, &tally.latency, tally.faults);
        Ok((measure, tally.sample))
    }
}
