//! [`Socket`]: one WebSocket, one task, one hand-written future.
//!
//! A turn reads once, into a buffer that all sockets of a worker share, does what was read, and writes once: whatever
//! the outbox holds and then events, at most [`TURN`] bytes of them. A socket that is blocked asks for nothing, so that
//! nothing wakes it in vain, but it is read on: who waits for its replies must not wait for its reading.

use std::{
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, ready},
    time::Duration,
};

use tokio::io::AsyncWrite;

use super::{
    dispatch::Session,
    jsonrpc,
    outbox::{Outbox, Taken},
    reader::Shown,
};
use crate::{
    error::Code,
    metrics::{OpenConnection, Transport},
    net::{
        hijack::{self, ConnectionPermit},
        timer::{Due, TICK, Timer, TimerWheel},
        websocket::{
            frame::{self, Broken, Decoder, Incoming},
            output::SocketOutput,
            reader::SocketReader,
        },
    },
    node::Node,
};

/// Bytes of events gathered for one write.
const TURN: usize = 64 * 1024;
/// Turns before other connections have theirs.
const TURNS: usize = 2;
/// How long a peer may take to answer our close.
const FAREWELL: Duration = Duration::from_secs(5);

/// One open WebSocket.
pub struct Socket {
    inlet: SocketReader,
    decoder: Decoder,
    out: SocketOutput,
    outbox: Arc<Outbox>,
    /// Gone as soon as the connection is to end: its calls, services and subscriptions with it.
    session: Option<Session>,
    node: Arc<Node>,
    timer: Timer,
    /// The tick at which the next ping is due.
    ping: u32,
    /// The tick since which the peer took nothing. 0: it takes.
    blocked: u32,
    /// The tick at which a leave or farewell is over. 0: neither.
    until: u32,
    /// Something came since the last ping.
    heard: bool,
    phase: Phase,
    delivered: Delivered,
    connected: OpenConnection,
    _permit: ConnectionPermit,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Phase {
    Open,
    /// The node drains: what is in flight may finish.
    Leaving,
    /// Our close is on its way; the peer's is awaited.
    Closing,
    /// Both have said it.
    Closed,
}

/// What was written, until it is added to the metrics.
#[derive(Default)]
struct Delivered {
    events: u64,
    bytes: u64,
}

/// The connection is over; the reason has been noted.
struct Over;

// === impl Socket ===

impl Socket {
    pub fn new(node: Arc<Node>, session: Session, outbox: Arc<Outbox>, taken: hijack::HijackedConn) -> Self {
        let now = node.timers.now();
        let interval = jitter(node.config.ws.ping);
        let mut timer = node.timers.timer(interval);
        if let Some(registration) = &session.registration {
            timer.set_owner(registration.number());
        }
        Socket {
            inlet: SocketReader::new(taken.io, taken.early),
            decoder: Decoder::new(node.config.limits.frame),
            out: SocketOutput::default(),
            outbox,
            session: Some(session),
            timer,
            ping: after(now, interval),
            blocked: 0,
            until: 0,
            heard: true,
            phase: Phase::Open,
            delivered: Delivered::default(),
            connected: node.metrics.connected(Transport::Ws),
            node,
            _permit: taken.permit,
        }
    }

    /// Ends the connection from our side: `code` and its name are the last frame.
    pub fn close(&mut self, code: Code) {
        let mut frame = Vec::new();
        // Every code that gets here can end a connection.
        frame::close(&mut frame, code.close().unwrap_or(1011), code.as_str());
        let patience = if code == Code::Slow {
            // It may yet read: what it is behind with is dropped, so that the reason can reach it.
            self.out.drop_unwritten();
            self.outbox.close();
            self.node.config.limits.stalled
        } else {
            FAREWELL
        };
        self.connected.closed_with(code);
        self.finish(&frame, Phase::Closing, patience);
    }

    /// Has `frame` written last.
    fn finish(&mut self, frame: &[u8], phase: Phase, patience: Duration) {
        let mut last = Vec::new();
        self.outbox.drain(&mut last);
        last.extend_from_slice(frame);
        self.out.set_last(last);
        self.outbox.close();
        self.session = None;
        self.phase = phase;
        self.until = after(self.node.timers.now(), patience);
        self.timer.shorten(patience);
    }

    fn is_open(&self) -> bool {
        matches!(self.phase, Phase::Open | Phase::Leaving)
    }

    // --- time ---

    fn poll_time(&mut self, cx: &mut Context<'_>) -> Result<(), Over> {
        while let Poll::Ready(due) = self.timer.poll(cx) {
            match due {
                Due::Leave => self.leave(),
                Due::Kicked if self.is_open() => self.close(Code::Kicked),
                Due::Kicked => {}
                Due::Time => self.tick()?,
            }
        }
        Ok(())
    }

    fn tick(&mut self) -> Result<(), Over> {
        let now = self.node.timers.now();
        let stalled = self.node.config.limits.stalled;
        if self.until != 0 && now >= self.until {
            match self.phase {
                Phase::Leaving => {
                    if let Some(session) = &self.session {
                        session.cut_off();
                    }
                    self.close(Code::Draining);
                }
                _ => return Err(Over),
            }
        }
        if self.is_open() && self.blocked != 0 && TimerWheel::span(self.blocked, now) >= stalled {
            self.close(Code::Slow);
        }
        if self.is_open() && now >= self.ping {
            if self.blocked != 0 {
                // A ping would not get through: the stall decides.
            } else if self.heard {
                self.heard = false;
                self.outbox.raw(&frame::PING_FRAME);
            } else {
                self.close(Code::DeadPeer);
            }
            self.ping = after(now, jitter(self.node.config.ws.ping));
            self.relax();
        }
        let mut next = if self.is_open() { self.ping } else { self.until };
        if self.phase == Phase::Leaving {
            next = next.min(self.until);
        }
        if self.is_open() && self.blocked != 0 {
            next = next.min(after(self.blocked, stalled));
        }
        self.timer.reset(TICK * next.saturating_sub(now).max(1));
        Ok(())
    }

    /// Gives back what an idle connection does not need.
    fn relax(&mut self) {
        self.delivered.report(&self.node);
        self.outbox.relax();
        self.out.shrink();
        if let Some(session) = &mut self.session {
            session.relax();
        }
    }

    /// This connection's turn to go, in a drain.
    fn leave(&mut self) {
        let Some(session) = &mut self.session else { return };
        if self.phase != Phase::Open {
            return;
        }
        let left = self.node.config.drain.grace.saturating_sub(self.node.timers.draining_for());
        if session.knows_weir {
            let params = serde_json::json!({
                // Different for each: all of them come back elsewhere.
                "after_ms": fastrand::u16(1_000..4_000),
                "deadline_ms": left.as_millis() as u64,
            });
            self.outbox.send(|out| jsonrpc::notification(out, "weir.drain", &params));
        }
        session.withdraw_all();
        self.phase = Phase::Leaving;
        self.until = after(self.node.timers.now(), left);
        self.timer.shorten(left);
    }

    // --- reading ---

    fn poll_read(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Over>> {
        if self.blocked != 0 && self.is_open() && self.outbox.is_full() {
            // It does not read what it asked for: it may not ask for more. The write wakes us.
            return Poll::Pending;
        }
        let Some(mut read) = ready!(self.inlet.poll_read(cx)) else {
            if self.is_open() {
                self.connected.closed_by_peer();
            }
            return Poll::Ready(Err(Over));
        };
        self.heard = true;
        self.take(&mut read);
        Poll::Ready(Ok(()))
    }

    /// Does what was read.
    fn take(&mut self, mut input: &mut [u8]) {
        let mut replies = Vec::new();
        loop {
            match self.decoder.next(&mut input, &mut replies) {
                Ok(None) => break,
                Ok(Some(Incoming::Message(message))) => {
                    if let Some(session) = &mut self.session {
                        session.receive(message.text());
                    }
                }
                Ok(Some(Incoming::Alive)) => {}
                Ok(Some(Incoming::Close)) => {
                    if self.is_open() {
                        self.connected.closed_by_peer();
                        return self.finish(&replies, Phase::Closed, FAREWELL);
                    }
                    self.phase = Phase::Closed;
                    return;
                }
                Err(Broken(code)) => {
                    if self.is_open() {
                        self.close(code);
                    } else {
                        // Said enough already: what it sends is of no interest.
                        self.phase = Phase::Closed;
                    }
                    return;
                }
            }
        }
        if !replies.is_empty() && self.is_open() {
            self.outbox.raw(&replies);
        }
    }

    // --- writing ---

    /// Writes a turn. Ready: all is written; `true` if there may be more. Pending: the peer takes no more.
    fn poll_write(&mut self, cx: &mut Context<'_>) -> Poll<Result<bool, Over>> {
        // What is left of the last turn goes first; behind it there may be anything.
        let more = if self.out.is_empty() { self.gather(cx) } else { true };
        if self.out.is_empty() {
            return Poll::Ready(Ok(more));
        }
        let before = self.out.len();
        match self.out.poll_write(cx, &mut self.inlet.io) {
            Poll::Ready(Ok(())) => {
                self.blocked = 0;
                Poll::Ready(Ok(more))
            }
            Poll::Ready(Err(_)) => {
                if self.is_open() {
                    self.connected.closed_by_peer();
                }
                Poll::Ready(Err(Over))
            }
            Poll::Pending => {
                if self.blocked == 0 || self.out.len() < before {
                    self.blocked = self.node.timers.now();
                    self.timer.shorten(self.node.config.limits.stalled);
                }
                Poll::Pending
            }
        }
    }

    /// Fills the empty `out`. True if there may be more.
    fn gather(&mut self, cx: &mut Context<'_>) -> bool {
        let Some(session) = &mut self.session else { return false };
        // Before the outbox is emptied: an answer that is complete now is written before its events.
        if let Some(reader) = &mut session.reader {
            reader.begin(|batch| self.outbox.has_batch(batch));
        }
        let more = match self.outbox.poll_take(cx, self.out.buffer()) {
            Poll::Pending => false,
            // The waker was not left there.
            Poll::Ready(Taken::Frames) => true,
            Poll::Ready(Taken::Close(code)) => {
                self.close(code);
                return false;
            }
        };
        let Some(reader) = &mut session.reader else { return more };
        if reader.poll_turn(cx).is_pending() {
            return more;
        }
        let text = self.out.len();
        while self.out.len() < text + TURN {
            match reader.take() {
                None => return more,
                Some(Shown::Events { bytes, count }) => {
                    self.delivered.events += u64::from(count);
                    self.delivered.bytes += bytes.len() as u64;
                    self.out.push(bytes);
                }
                Some(Shown::Gap(gap)) => {
                    self.node.metrics.gap(gap.reason.as_str());
                    let mut notice = Vec::new();
                    frame::text(&mut notice, |out| jsonrpc::notification(out, "weir.gap", &gap));
                    self.out.push(notice.into());
                }
            }
        }
        true
    }

    /// One turn after the other, until there is nothing to do or others should have theirs.
    fn run(&mut self, cx: &mut Context<'_>) -> Poll<Over> {
        if let Err(over) = self.poll_time(cx) {
            return Poll::Ready(over);
        }
        for _ in 0..TURNS {
            let mut busy = match self.poll_read(cx) {
                Poll::Ready(Err(over)) => return Poll::Ready(over),
                read => read.is_ready(),
            };
            if let Some(session) = &mut self.session {
                busy |= session.poll(cx);
                if self.phase == Phase::Leaving && session.is_quiet() {
                    self.close(Code::Draining);
                }
            }
            match self.poll_write(cx) {
                Poll::Ready(Err(over)) => return Poll::Ready(over),
                Poll::Ready(Ok(more)) => busy |= more,
                Poll::Pending => {}
            }
            if self.phase == Phase::Closed && self.out.is_empty() {
                ready!(Pin::new(&mut self.inlet.io).poll_shutdown(cx)).ok();
                return Poll::Ready(Over);
            }
            if !busy {
                return Poll::Pending;
            }
        }
        cx.waker().wake_by_ref();
        Poll::Pending
    }
}

impl Future for Socket {
    type Output = ();

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        self.get_mut().run(cx).map(|Over| ())
    }
}

impl Drop for Socket {
    fn drop(&mut self) {
        // The hub may know the outbox for longer.
        self.outbox.close();
        self.delivered.report(&self.node);
    }
}

impl Delivered {
    fn report(&mut self, node: &Node) {
        node.metrics.delivered[Transport::Ws].add(std::mem::take(&mut self.events));
        node.metrics.delivered_bytes[Transport::Ws].add(std::mem::take(&mut self.bytes));
    }
}

/// The tick that is `time` after `tick`.
fn after(tick: u32, time: Duration) -> u32 {
    tick + TimerWheel::ticks(time)
}

/// `base`, give or take a fifth.
fn jitter(base: Duration) -> Duration {
    base.mul_f64(fastrand::f64() * 0.4 + 0.8)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// One per connection, and most of them are idle.
    #[test]
    fn a_socket_is_small() {
        assert!(size_of::<Socket>() <= 480, "{}", size_of::<Socket>());
        assert!(size_of::<Outbox>() <= 128, "{}", size_of::<Outbox>());
    }
}
