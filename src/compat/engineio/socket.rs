//! [`Socket`]: a session's WebSocket, one task. Either it opened the session, or it takes over from polls: then it first
//! proves that it carries anything (`2probe`, `3probe`), and is the session's from `5` on.

use std::{
    io,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, ready},
    time::Duration,
};

use tokio::io::AsyncWrite;

use super::{
    Server,
    outbox::{KEPT, Taken},
    packet::{self, Framing, Packet},
    session::Session,
};
use crate::{
    error::Code,
    net::{
        hijack::{self, ConnectionPermit},
        timer::{Due, Timer, TimerWheel},
        websocket::{
            frame::{self, Broken, Decoder, Incoming, Payload},
            reader::SocketReader,
        },
    },
};

/// Turns before other connections have theirs.
const TURNS: usize = 2;

pub struct Socket {
    inlet: SocketReader,
    decoder: Decoder,
    out: Vec<u8>,
    /// Written bytes of `out`.
    at: usize,
    session: Arc<Session>,
    server: Arc<Server>,
    timer: Timer,
    /// The tick since which the client took nothing. 0: it takes.
    blocked: u32,
    /// The tick at which a probe or a farewell is over. 0: neither.
    until: u32,
    phase: Phase,
    _permit: ConnectionPermit,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Phase {
    /// Not the session's yet.
    Probing,
    Open,
    /// Our close is on its way; the client's is awaited.
    Closing,
    /// Both have said it.
    Closed,
}

/// The connection is over.
struct Over;

// === impl Socket ===

impl Socket {
    /// `probing`: the session is carried by polls yet.
    pub fn new(server: Arc<Server>, session: Arc<Session>, probing: bool, taken: hijack::HijackedConn) -> Self {
        let settings = &server.settings;
        let patience = if probing { settings.upgrade } else { settings.stalled };
        let mut timer = server.node.timers.timer(settings.stalled);
        timer.shorten(patience);
        session.with_registration(|registration| registration.set_peer(taken.peer));
        Socket {
            inlet: SocketReader::new(taken.io, taken.early),
            decoder: Decoder::new(settings.max_payload),
            out: Vec::new(),
            at: 0,
            session,
            timer,
            blocked: 0,
            until: if probing { after(&server, patience) } else { 0 },
            phase: if probing { Phase::Probing } else { Phase::Open },
            server,
            _permit: taken.permit,
        }
    }

    /// Says goodbye: what is written so far, and a close.
    fn close(&mut self, code: Code) {
        if self.phase == Phase::Open {
            self.session.close(code);
        }
        // A frame that is begun has to be finished.
        frame::close(&mut self.out, code.close().unwrap_or(1000), code.as_str());
        self.phase = Phase::Closing;
        self.until = after(&self.server, self.server.settings.farewell);
        self.timer.shorten(self.server.settings.farewell);
    }

    // --- time ---

    fn poll_time(&mut self, cx: &mut Context<'_>) -> Result<(), Over> {
        while let Poll::Ready(due) = self.timer.poll(cx) {
            match due {
                // The session has a place of its own, and hears of it there.
                Due::Leave | Due::Kicked => {}
                Due::Time => self.tick()?,
            }
        }
        Ok(())
    }

    fn tick(&mut self) -> Result<(), Over> {
        let now = self.server.node.timers.now();
        if self.until != 0 && now >= self.until {
            return Err(Over);
        }
        let stalled = self.server.settings.stalled;
        if self.blocked != 0 && TimerWheel::span(self.blocked, now) >= stalled {
            self.session.close(Code::Slow);
            return Err(Over);
        }
        self.timer.reset(stalled);
        if self.blocked != 0 {
            self.timer.shorten(stalled.saturating_sub(TimerWheel::span(self.blocked, now)));
        }
        if self.until != 0 {
            self.timer.shorten(TimerWheel::span(now, self.until));
        }
        Ok(())
    }

    // --- reading ---

    fn poll_read(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Over>> {
        if self.blocked != 0 && self.session.outbox.is_full() {
            // It does not read what it asked for: it may not ask for more. The write wakes us.
            return Poll::Pending;
        }
        let Some(mut read) = ready!(self.inlet.poll_read(cx)) else { return Poll::Ready(Err(Over)) };
        self.take(&mut read);
        Poll::Ready(Ok(()))
    }

    /// Does what was read.
    fn take(&mut self, mut input: &mut [u8]) {
        if self.phase == Phase::Open {
            self.session.heard();
        }
        let mut replies = Vec::new();
        loop {
            match self.decoder.next(&mut input, &mut replies) {
                Ok(None) => break,
                Ok(Some(Incoming::Message(message))) => {
                    let packet = match &message {
                        Payload::Text(text) => packet::read(text),
                        Payload::Binary(bytes) => Some(Packet::Binary((*bytes).into())),
                        Payload::Pieces { text: true, bytes } => str::from_utf8(bytes).ok().and_then(packet::read),
                        Payload::Pieces { text: false, bytes } => Some(Packet::Binary(bytes[..].into())),
                    };
                    self.packet(packet);
                }
                Ok(Some(Incoming::Alive)) => {}
                Ok(Some(Incoming::Close)) => {
                    match self.phase {
                        Phase::Open => self.session.close_because(None),
                        Phase::Probing => self.session.give_up_upgrade(),
                        Phase::Closing | Phase::Closed => replies.clear(),
                    }
                    self.phase = Phase::Closed;
                    self.until = after(&self.server, self.server.settings.farewell);
                    break;
                }
                Err(Broken(code)) => {
                    match self.phase {
                        Phase::Probing => {
                            self.session.give_up_upgrade();
                            self.close(code);
                        }
                        Phase::Open => self.close(code),
                        Phase::Closing | Phase::Closed => self.phase = Phase::Closed,
                    }
                    return;
                }
            }
        }
        // Between frames, as `out` always ends with one.
        self.out.extend_from_slice(&replies);
    }

    fn packet(&mut self, packet: Option<Packet<'_>>) {
        match (self.phase, packet) {
            (Phase::Open, Some(packet)) => {
                // What it broke is closed already.
                if self.session.receive(&packet).is_err() {
                    self.close(Code::Protocol);
                }
            }
            (Phase::Probing, Some(Packet::Ping("probe"))) => {
                frame::text(&mut self.out, |out| out.extend_from_slice(b"3probe"));
                self.session.outbox.upgrading(true);
            }
            (Phase::Probing, Some(Packet::Upgrade)) if self.session.upgrade() => {
                self.phase = Phase::Open;
                self.until = 0;
                self.session.heard();
            }
            (Phase::Open, None) => self.close(Code::Protocol),
            (Phase::Probing, _) => {
                self.session.give_up_upgrade();
                self.close(Code::Protocol);
            }
            (Phase::Closing | Phase::Closed, _) => {}
        }
    }

    // --- writing ---

    /// Writes a turn. Ready: all is written; `true` if there may be more. Pending: the client takes no more.
    fn poll_write(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<bool>> {
        if self.at == self.out.len() {
            self.at = 0;
            if self.out.capacity() > KEPT {
                self.out = Vec::new();
            }
            self.out.clear();
        }
        if self.out.is_empty() && self.phase == Phase::Open {
            match self.session.outbox.poll_take(cx, Framing::WebSocket, &mut self.out) {
                Poll::Ready(Taken::Packets) => {}
                Poll::Ready(Taken::Slow) => self.close(Code::Slow),
                Poll::Ready(Taken::Over | Taken::Elsewhere) => {
                    let leaving = self.session.is_leaving();
                    self.close(if leaving { Code::Draining } else { Code::Kicked });
                }
                Poll::Pending => return Poll::Ready(Ok(false)),
            }
        }
        while self.at < self.out.len() {
            match Pin::new(&mut self.inlet.io).poll_write(cx, &self.out[self.at..]) {
                Poll::Ready(Ok(0)) => return Poll::Ready(Err(io::ErrorKind::WriteZero.into())),
                Poll::Ready(Ok(n)) => {
                    self.at += n;
                    self.blocked = 0;
                }
                Poll::Ready(Err(error)) => return Poll::Ready(Err(error)),
                Poll::Pending => {
                    if self.blocked == 0 {
                        self.blocked = self.server.node.timers.now();
                        self.timer.shorten(self.server.settings.stalled);
                    }
                    return Poll::Pending;
                }
            }
        }
        ready!(Pin::new(&mut self.inlet.io).poll_flush(cx))?;
        // The waker is left only where there is nothing to take.
        Poll::Ready(Ok(self.phase == Phase::Open))
    }

    fn is_written(&self) -> bool {
        self.at == self.out.len()
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
            match self.poll_write(cx) {
                Poll::Ready(Err(_)) => return Poll::Ready(Over),
                Poll::Ready(Ok(more)) => busy |= more,
                Poll::Pending => {}
            }
            if self.phase == Phase::Closed && self.is_written() {
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
        match self.phase {
            // Whatever became of the upgrade, the polls go on.
            Phase::Probing => self.session.give_up_upgrade(),
            _ => self.session.close_because(None),
        }
    }
}

/// The tick that is `time` from now.
fn after(server: &Server, time: Duration) -> u32 {
    server.node.timers.now() + TimerWheel::ticks(time)
}
