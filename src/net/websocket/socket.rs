//! [`WebSocket`]: one open WebSocket, as one hand-written future.
//!
//! A turn reads once, into a buffer that all sockets of a worker thread share, handles what was read, and writes once.
//! A socket whose peer does not read gathers no output, so that nothing wakes it in vain, but it goes on reading: its
//! peer may wait for room to send before it reads.

use std::{
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, ready},
    time::Duration,
};

use bytes::Bytes;
use tokio::io::AsyncWrite;

use super::{
    frame::{self, Decoder, FrameError, Incoming, Payload},
    output::SocketOutput,
    reader::SocketReader,
};
use crate::{
    error::Code,
    net::{
        hijack::{ConnectionPermit, HijackedConn},
        linger::MAX_DISCARDED,
        timer::{Due, TICK, Timer, TimerWheel},
    },
};

/// Turns before the task yields to other connections.
const TURNS: usize = 2;
/// Unwritten bytes beyond which a peer that does not read gets no pongs. Only its last ping needs one (RFC 6455
/// §5.5.3).
const MAX_BEFORE_PONG: usize = 64 * 1024;

/// How long a peer is not read from because a caller has not read its earlier replies. Then it is read from again: other
/// callers wait for its replies too.
const MAX_HELD: Duration = Duration::from_secs(2);

/// The protocol that is spoken on one WebSocket. All methods are called by one task, and none but
/// [`stall_timeout`](Self::stall_timeout) and [`close_timeout`](Self::close_timeout) after [`on_end`](Self::on_end).
///
/// An error closes the WebSocket with its code.
pub(crate) trait SocketHandler: Send + Unpin + 'static {
    /// Called after bytes were read, before their messages.
    fn on_read(&mut self) {}

    fn on_message(&mut self, message: &Payload<'_>, out: &mut SocketOutput) -> Result<(), Code>;

    /// Makes progress with work that messages have begun. True if there is more to do at once.
    fn poll_work(&mut self, _: &mut Context<'_>) -> Result<bool, Code> {
        Ok(false)
    }

    /// Fills `out`, whose buffer is empty. True if there may be more at once; else the task will be woken.
    fn poll_output(&mut self, cx: &mut Context<'_>, out: &mut SocketOutput) -> Result<bool, Code>;

    /// Whether so much waits for the peer that it must read before it is read from again.
    fn is_full(&self) -> bool;

    /// Waits until others have taken what earlier messages of the peer have caused. Until then it is not read from.
    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<()> {
        Poll::Ready(())
    }

    /// Ends the wait of [`poll_ready`](Self::poll_ready), which takes too long.
    fn abandon_wait(&mut self) {}

    /// How often the peer is pinged; one that sends nothing until the next ping is dead. `None`: it is not pinged.
    fn ping_interval(&self) -> Option<Duration> {
        None
    }

    /// How long the peer may read nothing of what waits for it.
    fn stall_timeout(&self) -> Duration;

    /// How long the peer may take to answer our close frame.
    fn close_timeout(&self) -> Duration;

    /// The tick at which [`on_deadline`](Self::on_deadline) is to be called; may be set by
    /// [`on_leave`](Self::on_leave).
    fn deadline(&self) -> Option<u32> {
        None
    }

    /// Called when the deadline has passed: the code to close with. `None` drops the connection.
    fn on_deadline(&mut self) -> Option<Code> {
        None
    }

    /// Called when the node drains and it is this connection's turn to leave.
    fn on_leave(&mut self) {}

    /// Frees what an idle connection does not need. Called at every ping.
    fn shrink(&mut self) {}

    /// Called once when the connection is to end: closed by us for a reason, or by the peer. May append frames to
    /// `last`, which are written before the close frame if the peer can still read.
    fn on_end(&mut self, reason: Option<Code>, last: &mut Vec<u8>);
}

/// One open WebSocket, whose future completes when the connection is closed.
pub(crate) struct WebSocket<H> {
    reader: SocketReader,
    decoder: Decoder,
    out: SocketOutput,
    handler: H,
    timer: Timer,
    /// The tick at which the next ping is due.
    ping: u32,
    /// The tick since which the peer has read nothing; 0 if it reads.
    blocked: u32,
    /// The tick since which the peer is not read from, because others have to read first; 0 if it is.
    held: u32,
    /// The tick at which a connection that is no longer open is dropped.
    until: u32,
    /// Bytes that were read and discarded after the end of the conversation, as in [`linger`](crate::net::linger).
    discarded: u32,
    /// Something was read since the last ping.
    alive: bool,
    /// The last read found nothing: otherwise nothing follows from the silence of the peer.
    drained: bool,
    /// No more will be written, as the peer knows.
    shut: bool,
    phase: SocketPhase,
    _permit: ConnectionPermit,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum SocketPhase {
    Open,
    /// Our close frame is sent or queued; the peer's is awaited.
    Closing,
    /// Our close frame is sent or queued, and the peer sends what cannot be decoded. The end of its bytes is awaited.
    Discarding,
    /// Both close frames are sent or queued.
    Closed,
}

/// The connection is over; the handler knows the reason.
struct SocketOver;

impl<H: SocketHandler> WebSocket<H> {
    /// `max_message` is the largest message that is accepted, in bytes; `owner` identifies the connection to
    /// [`TimerWheel::kick`].
    pub(crate) fn new(
        conn: HijackedConn,
        wheel: &Arc<TimerWheel>,
        owner: Option<u32>,
        max_message: usize,
        handler: H,
    ) -> Self {
        let interval = interval(&handler);
        let mut timer = wheel.timer(interval);
        if let Some(owner) = owner {
            timer.set_owner(owner);
        }
        let mut socket = WebSocket {
            reader: SocketReader::new(conn.io, conn.early),
            decoder: Decoder::new(max_message),
            out: SocketOutput::default(),
            ping: after(timer.now(), interval),
            handler,
            timer,
            blocked: 0,
            held: 0,
            until: 0,
            discarded: 0,
            alive: true,
            drained: false,
            shut: false,
            phase: SocketPhase::Open,
            _permit: conn.permit,
        };
        socket.shorten_to_deadline();
        socket
    }

    /// Closes the connection: `code` and its name are in the close frame.
    pub(crate) fn close(&mut self, code: Code) {
        let mut last = Vec::new();
        self.handler.on_end(Some(code), &mut last);
        // Every code that gets here can end a connection.
        frame::close(&mut last, code.close().unwrap_or(1011), code.as_str());
        let timeout = if code == Code::Slow {
            // It may yet read: what it has not read is dropped, so that the close frame can reach it.
            self.out.drop_unwritten();
            self.handler.stall_timeout()
        } else {
            self.handler.close_timeout()
        };
        self.finish(last, SocketPhase::Closing, timeout);
    }

    fn finish(&mut self, last: Vec<u8>, phase: SocketPhase, timeout: Duration) {
        self.out.set_last(last);
        self.phase = phase;
        self.until = after(self.timer.now(), timeout);
        self.timer.shorten(timeout);
    }

    /// The connection is lost: nothing can be written.
    fn lost(&mut self) -> SocketOver {
        if self.is_open() {
            self.handler.on_end(None, &mut Vec::new());
        }
        SocketOver
    }

    fn is_open(&self) -> bool {
        self.phase == SocketPhase::Open
    }

    /// Whether nothing is decoded any more.
    fn is_over(&self) -> bool {
        matches!(self.phase, SocketPhase::Discarding | SocketPhase::Closed)
    }

    // --- time ---

    fn poll_timer(&mut self, cx: &mut Context<'_>) -> Result<(), SocketOver> {
        while let Poll::Ready(due) = self.timer.poll(cx) {
            match due {
                Due::Time => {
                    // The peer may have read meanwhile.
                    if self.blocked != 0
                        && let Poll::Ready(Err(over)) = self.poll_write(cx)
                    {
                        return Err(over);
                    }
                    let held = self.held != 0;
                    self.tick()?;
                    if held && self.held == 0 {
                        // The peer is read from again.
                        cx.waker().wake_by_ref();
                    }
                }
                Due::Leave if self.is_open() => {
                    self.handler.on_leave();
                    self.shorten_to_deadline();
                }
                Due::Kicked(code) if self.is_open() => self.close(code),
                Due::Leave | Due::Kicked(_) => {}
            }
        }
        Ok(())
    }

    fn shorten_to_deadline(&mut self) {
        if let Some(at) = self.handler.deadline() {
            self.timer.shorten(TimerWheel::span(self.timer.now(), at));
        }
    }

    fn tick(&mut self) -> Result<(), SocketOver> {
        let now = self.timer.now();
        if !self.is_open() && now >= self.until {
            return Err(SocketOver);
        }
        if self.is_open() && self.handler.deadline().is_some_and(|at| now >= at) {
            match self.handler.on_deadline() {
                Some(code) => self.close(code),
                None => return Err(self.lost()),
            }
        }
        let stall = self.handler.stall_timeout();
        if self.is_open() && self.blocked != 0 && TimerWheel::span(self.blocked, now) >= stall {
            self.close(Code::Slow);
        }
        if self.held != 0 && TimerWheel::span(self.held, now) >= MAX_HELD {
            self.held = 0;
            self.handler.abandon_wait();
        }
        if self.is_open() && now >= self.ping {
            self.ping(now);
        }
        let mut next = self.until;
        if self.is_open() {
            next = self.ping.min(self.handler.deadline().unwrap_or(u32::MAX));
            if self.blocked != 0 {
                next = next.min(after(self.blocked, stall));
            }
            if self.held != 0 {
                next = next.min(after(self.held, MAX_HELD));
            }
        }
        self.timer.reset(TICK * next.saturating_sub(now).max(1));
        Ok(())
    }

    fn ping(&mut self, now: u32) {
        self.out.shrink();
        self.handler.shrink();
        // To a peer that does not read no ping gets through: the stall timeout decides.
        if self.handler.ping_interval().is_some() && self.blocked == 0 {
            if !self.alive && self.drained {
                return self.close(Code::DeadPeer);
            }
            self.alive = false;
            self.out.push(Bytes::from_static(&frame::PING_FRAME));
        }
        self.ping = after(now, interval(&self.handler));
    }

    // --- reading ---

    fn poll_read(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), SocketOver>> {
        if self.blocked != 0 && self.is_open() && self.handler.is_full() {
            // The peer does not read the answers to its requests: no more are accepted. The write wakes us.
            self.drained = false;
            return Poll::Pending;
        }
        if self.is_open() && self.handler.poll_ready(cx).is_pending() {
            self.drained = false;
            if self.held == 0 {
                self.held = self.timer.now();
                self.timer.shorten(MAX_HELD);
            }
            return Poll::Pending;
        }
        self.held = 0;
        let read = self.reader.poll_read(cx);
        self.drained = read.is_pending();
        let Some(mut read) = ready!(read) else { return Poll::Ready(Err(self.lost())) };
        self.alive = true;
        if self.is_over() {
            self.discarded = self.discarded.saturating_add(read.len() as u32);
            return Poll::Ready(if self.discarded as usize > MAX_DISCARDED { Err(SocketOver) } else { Ok(()) });
        }
        if self.is_open() {
            self.handler.on_read();
        }
        self.receive(cx, &mut read);
        Poll::Ready(Ok(()))
    }

    /// Handles the bytes that were read.
    fn receive(&mut self, cx: &mut Context<'_>, mut input: &mut [u8]) {
        let mut replies = Vec::new();
        loop {
            match self.decoder.next(&mut input, &mut replies) {
                Ok(None) => break,
                Ok(Some(Incoming::Alive)) => {}
                Ok(Some(Incoming::Message(message))) => {
                    if self.is_open()
                        && let Err(code) = self.handler.on_message(&message, &mut self.out)
                    {
                        self.close(code);
                    }
                    // One read may hold hundreds of messages, and each may cause a large answer.
                    if self.is_open()
                        && !input.is_empty()
                        && (self.handler.is_full() || self.handler.poll_ready(cx).is_pending())
                    {
                        self.reader.put_back(input);
                        break;
                    }
                }
                Ok(Some(Incoming::Close)) if self.is_open() => {
                    let mut last = Vec::new();
                    self.handler.on_end(None, &mut last);
                    last.extend_from_slice(&replies);
                    return self.finish(last, SocketPhase::Closed, self.handler.close_timeout());
                }
                Err(FrameError(code)) => {
                    if self.is_open() {
                        self.close(code);
                    }
                    return self.phase = SocketPhase::Discarding;
                }
                Ok(Some(Incoming::Close)) => return self.phase = SocketPhase::Closed,
            }
        }
        if self.is_open() && !replies.is_empty() && (self.blocked == 0 || self.out.len() < MAX_BEFORE_PONG) {
            self.out.push(replies.into());
        }
    }

    // --- writing ---

    /// Writes once. Ready: all is written; `true` if there may be more. Pending: the peer takes no more.
    fn poll_write(&mut self, cx: &mut Context<'_>) -> Poll<Result<bool, SocketOver>> {
        // A partly written piece goes first, and there may be more behind it. Whole control frames do not count: a peer
        // that sends a ping with everything it sends is to get its replies.
        let more = if self.out.is_empty() || self.blocked == 0 { self.gather(cx) } else { true };
        if self.out.is_flushed() {
            return Poll::Ready(Ok(more));
        }
        let before = self.out.len();
        match self.out.poll_write(cx, &mut self.reader.io) {
            Poll::Ready(Ok(())) => {
                self.blocked = 0;
                Poll::Ready(Ok(more))
            }
            Poll::Ready(Err(_)) => Poll::Ready(Err(self.lost())),
            Poll::Pending => {
                if self.blocked == 0 || self.out.len() < before {
                    self.blocked = self.timer.now();
                    self.timer.shorten(self.handler.stall_timeout());
                }
                Poll::Pending
            }
        }
    }

    fn gather(&mut self, cx: &mut Context<'_>) -> bool {
        if !self.is_open() {
            return false;
        }
        self.handler.poll_output(cx, &mut self.out).unwrap_or_else(|code| {
            self.close(code);
            false
        })
    }

    /// Takes turns until there is nothing to do or other connections should have theirs.
    fn run(&mut self, cx: &mut Context<'_>) -> Poll<SocketOver> {
        for turn in 0..TURNS {
            let mut busy = match self.poll_read(cx) {
                Poll::Ready(Err(over)) => return Poll::Ready(over),
                read => read.is_ready(),
            };
            // Deadlines of the peer are judged by what it has sent until now.
            if turn == 0
                && let Err(over) = self.poll_timer(cx)
            {
                return Poll::Ready(over);
            }
            if self.is_open() {
                match self.handler.poll_work(cx) {
                    Ok(more) => busy |= more,
                    Err(code) => self.close(code),
                }
            }
            match self.poll_write(cx) {
                Poll::Ready(Err(over)) => return Poll::Ready(over),
                Poll::Ready(Ok(more)) => busy |= more,
                Poll::Pending => {}
            }
            if self.is_over() && self.out.is_flushed() {
                if !self.shut && ready!(Pin::new(&mut self.reader.io).poll_shutdown(cx)).is_err() {
                    return Poll::Ready(SocketOver);
                }
                self.shut = true;
                if self.phase == SocketPhase::Closed && self.drained {
                    return Poll::Ready(SocketOver);
                }
            }
            if !busy {
                return Poll::Pending;
            }
        }
        cx.waker().wake_by_ref();
        Poll::Pending
    }
}

impl<H: SocketHandler> Future for WebSocket<H> {
    type Output = ();

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        self.get_mut().run(cx).map(|SocketOver| ())
    }
}

/// The time until the next ping: within a fifth of what the handler asks for, so that sockets which were opened
/// together do not stay in step.
fn interval(handler: &impl SocketHandler) -> Duration {
    let jitter = |base: Duration| base.mul_f64(fastrand::f64() * 0.4 + 0.8);
    handler.ping_interval().map_or_else(|| handler.stall_timeout(), jitter)
}

/// The tick that is `time` after `tick`.
fn after(tick: u32, time: Duration) -> u32 {
    tick + TimerWheel::ticks(time)
}
