//! [`EngineSocket`]: the WebSocket of a session. Either it opened the session, or it takes over from polls: then it has
//! to prove that it works (`2probe`, `3probe`) before it carries the session, from `5` on.

use std::{
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};

use super::{
    packet::{self, EnginePacket, Framing},
    session::EngineSession,
    session_table::SessionTable,
    settings::EngineSettings,
};
use crate::{
    error::Code,
    net::{
        hijack::HijackedConn,
        timer::TimerWheel,
        websocket::{
            frame::{self, Payload},
            outbox::OutboxContent,
            output::SocketOutput,
            socket::{SocketHandler, WebSocket},
        },
    },
};

pub(super) struct EngineSocket {
    session: Arc<EngineSession>,
    /// Keeps the time of the session, also when the server is gone.
    _sessions: Arc<SessionTable>,
    settings: Arc<EngineSettings>,
    role: SocketRole,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum SocketRole {
    /// Polls still carry the session; the socket has to prove itself until this tick.
    Probing { until: u32 },
    /// The socket carries the session.
    Carrier,
    /// The socket has nothing to do with the session any more.
    Ended,
}

impl EngineSocket {
    /// `probing`: polls still carry the session.
    pub(super) fn open(
        session: Arc<EngineSession>,
        sessions: Arc<SessionTable>,
        settings: Arc<EngineSettings>,
        timers: &Arc<TimerWheel>,
        probing: bool,
        conn: HijackedConn,
    ) -> WebSocket<Self> {
        session.with_registration(|registration| registration.set_peer(conn.peer));
        let role = match probing {
            true => SocketRole::Probing { until: timers.now() + TimerWheel::ticks(settings.upgrade) },
            false => SocketRole::Carrier,
        };
        let max_message = settings.max_payload;
        // The session has a timer of its own, for drains and kicks.
        WebSocket::new(conn, timers, None, max_message, EngineSocket { session, _sessions: sessions, settings, role })
    }

    fn end(&mut self, reason: Option<Code>) {
        match self.role {
            SocketRole::Probing { .. } => self.session.abandon_upgrade(),
            SocketRole::Carrier => self.session.close_because(reason),
            SocketRole::Ended => {}
        }
        self.role = SocketRole::Ended;
    }
}

impl SocketHandler for EngineSocket {
    fn on_read(&mut self) {
        if self.role == SocketRole::Carrier {
            self.session.client_alive();
        }
    }

    fn on_message(&mut self, message: &Payload<'_>, out: &mut SocketOutput) -> Result<(), Code> {
        let packet = match message {
            Payload::Text(text) => packet::read(text),
            Payload::Binary(bytes) => Some(EnginePacket::Binary((*bytes).into())),
            Payload::Pieces { text: true, bytes } => str::from_utf8(bytes).ok().and_then(packet::read),
            Payload::Pieces { text: false, bytes } => Some(EnginePacket::Binary(bytes[..].into())),
        };
        match (self.role, packet) {
            (SocketRole::Carrier, Some(packet)) => self.session.receive(&packet).map_err(|_| Code::Protocol),
            (SocketRole::Probing { .. }, Some(EnginePacket::Ping("probe"))) => {
                let mut answer = Vec::new();
                frame::text(&mut answer, |out| out.extend_from_slice(b"3probe"));
                out.push(answer.into());
                self.session.outbox.set_upgrading(true);
                Ok(())
            }
            (SocketRole::Probing { .. }, Some(EnginePacket::Upgrade)) if self.session.upgrade() => {
                self.role = SocketRole::Carrier;
                self.session.client_alive();
                Ok(())
            }
            _ => Err(Code::Protocol),
        }
    }

    fn poll_output(&mut self, cx: &mut Context<'_>, out: &mut SocketOutput) -> Result<bool, Code> {
        if self.role != SocketRole::Carrier {
            return Ok(false);
        }
        match self.session.outbox.poll_take(cx, Framing::WebSocket, out.buffer()) {
            Poll::Pending => Ok(false),
            // No waker was left.
            Poll::Ready(OutboxContent::Bytes) => Ok(true),
            Poll::Ready(OutboxContent::Close(code)) => Err(code),
            Poll::Ready(OutboxContent::Closed) if self.session.is_leaving() => Err(Code::Draining),
            Poll::Ready(OutboxContent::Closed) => Err(Code::Kicked),
        }
    }

    fn is_full(&self) -> bool {
        self.session.outbox.is_full()
    }

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        self.session.poll_ready(cx)
    }

    fn abandon_wait(&mut self) {
        self.session.abandon_wait();
    }

    fn stall_timeout(&self) -> Duration {
        self.settings.stalled
    }

    fn close_timeout(&self) -> Duration {
        self.settings.linger
    }

    fn deadline(&self) -> Option<u32> {
        match self.role {
            SocketRole::Probing { until } => Some(until),
            SocketRole::Carrier | SocketRole::Ended => None,
        }
    }

    fn on_end(&mut self, reason: Option<Code>, _: &mut Vec<u8>) {
        self.end(reason);
    }
}

impl Drop for EngineSocket {
    fn drop(&mut self) {
        self.end(None);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// One per connection, and most of them are idle.
    #[test]
    fn a_socket_is_small() {
        assert!(size_of::<WebSocket<EngineSocket>>() <= 336, "{}", size_of::<WebSocket<EngineSocket>>());
    }
}
