//! [`RpcSocket`]: JSON-RPC on one WebSocket.

use std::{
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};

use super::{jsonrpc, session::RpcSession, subscriptions::SocketDelivery};
use crate::{
    error::Code,
    metrics::{OpenConnection, Transport},
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
    node::Node,
};

/// Bytes of events gathered for one write.
const WRITE_BUDGET: usize = 64 * 1024;
/// How long a peer may take to answer our close frame.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(5);

/// The handler of one WebSocket.
pub(super) struct RpcSocket {
    /// `None` as soon as the connection is to end: its calls, services and subscriptions end with the session.
    session: Option<RpcSession>,
    node: Arc<Node>,
    connected: OpenConnection,
    /// The tick until which calls in flight may finish, while the node drains.
    leave_by: Option<u32>,
    /// Events and bytes that were written since they were last added to the metrics.
    events: u64,
    bytes: u64,
}

impl RpcSocket {
    /// The WebSocket on `conn` that speaks JSON-RPC with `session`.
    pub(super) fn open(node: Arc<Node>, session: RpcSession, conn: HijackedConn) -> WebSocket<Self> {
        let connected = node.metrics.connected(Transport::Ws);
        let owner = session.registration.as_ref().map(|registration| registration.number());
        let (timers, max_message) = (node.timers.clone(), node.config.limits.frame);
        let handler = RpcSocket { session: Some(session), node, connected, leave_by: None, events: 0, bytes: 0 };
        WebSocket::new(conn, &timers, owner, max_message, handler)
    }

    fn report(&mut self) {
        let (events, bytes) = (std::mem::take(&mut self.events), std::mem::take(&mut self.bytes));
        self.node.metrics.events_delivered(Transport::Ws, events, bytes);
    }
}

impl SocketHandler for RpcSocket {
    fn on_message(&mut self, message: &Payload<'_>, _: &mut SocketOutput) -> Result<(), Code> {
        if let Some(session) = &mut self.session {
            session.receive(message.text());
        }
        Ok(())
    }

    fn poll_work(&mut self, cx: &mut Context<'_>) -> Result<bool, Code> {
        let Some(session) = &mut self.session else { return Ok(false) };
        let more = session.poll(cx);
        match self.leave_by.is_some() && session.is_quiet() {
            true => Err(Code::Draining),
            false => Ok(more),
        }
    }

    fn poll_output(&mut self, cx: &mut Context<'_>, out: &mut SocketOutput) -> Result<bool, Code> {
        let Some(session) = &mut self.session else { return Ok(false) };
        // Before the outbox is emptied: an answer that is complete now is written before its events.
        if let Some(subscriptions) = &mut session.subscriptions {
            subscriptions.begin_answered(|batch| session.outbox.has_batch(batch));
        }
        let more = match session.outbox.poll_take(cx, out.buffer()) {
            Poll::Pending | Poll::Ready(OutboxContent::Closed) => false,
            // No waker was left.
            Poll::Ready(OutboxContent::Bytes) => true,
            Poll::Ready(OutboxContent::Close(code)) => return Err(code),
        };
        let Some(subscriptions) = &mut session.subscriptions else { return Ok(more) };
        if subscriptions.poll_turn(cx).is_pending() {
            return Ok(more);
        }
        let full = out.len() + WRITE_BUDGET;
        while out.len() < full {
            match subscriptions.take() {
                None => return Ok(more),
                Some(SocketDelivery::Events { bytes, count }) => {
                    self.events += u64::from(count);
                    self.bytes += bytes.len() as u64;
                    out.push(bytes);
                }
                Some(SocketDelivery::Gap(gap)) => {
                    self.node.metrics.gap(gap.reason.as_str());
                    let mut notice = Vec::new();
                    frame::text(&mut notice, |out| jsonrpc::notification(out, "weir.gap", &gap));
                    out.push(notice.into());
                }
            }
        }
        Ok(true)
    }

    fn is_full(&self) -> bool {
        self.session.as_ref().is_some_and(|session| session.outbox.is_full())
    }

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        self.session.as_ref().map_or(Poll::Ready(()), |session| session.poll_ready(cx))
    }

    fn abandon_wait(&mut self) {
        if let Some(session) = &self.session {
            session.abandon_wait();
        }
    }

    fn ping_interval(&self) -> Option<Duration> {
        Some(self.node.config.ws.ping)
    }

    fn stall_timeout(&self) -> Duration {
        self.node.config.limits.stalled
    }

    fn close_timeout(&self) -> Duration {
        CLOSE_TIMEOUT
    }

    fn deadline(&self) -> Option<u32> {
        self.leave_by
    }

    fn on_deadline(&mut self) -> Option<Code> {
        if let Some(session) = &self.session {
            session.fail_in_flight();
        }
        Some(Code::Draining)
    }

    fn on_leave(&mut self) {
        let Some(session) = &mut self.session else { return };
        let left = self.node.config.drain.grace.saturating_sub(self.node.timers.draining_for());
        if session.knows_weir {
            let params = serde_json::json!({
                // Random, so that clients do not reconnect to another node all at once.
                "after_ms": fastrand::u16(1_000..4_000),
                "deadline_ms": left.as_millis() as u64,
            });
            session.outbox.send(|out| jsonrpc::notification(out, "weir.drain", &params));
        }
        session.withdraw_all();
        self.leave_by = Some(self.node.timers.now() + TimerWheel::ticks(left));
    }

    fn shrink(&mut self) {
        self.report();
        if let Some(session) = &mut self.session {
            session.outbox.shrink();
            session.shrink();
        }
    }

    fn on_end(&mut self, reason: Option<Code>, last: &mut Vec<u8>) {
        match reason {
            Some(code) => self.connected.closed_with(code),
            None => self.connected.closed_by_peer(),
        }
        if let Some(session) = self.session.take() {
            if reason != Some(Code::Slow) {
                session.outbox.drain(last);
            }
            // The hub may hold the outbox for longer.
            session.outbox.close();
        }
    }
}

impl Drop for RpcSocket {
    fn drop(&mut self) {
        if let Some(session) = &self.session {
            session.outbox.close();
        }
        self.report();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::transport::ws::outbox::RpcOutbox;

    /// One per connection, and most of them are idle.
    #[test]
    fn a_socket_is_small() {
        assert!(size_of::<WebSocket<RpcSocket>>() <= 480, "{}", size_of::<WebSocket<RpcSocket>>());
        assert!(size_of::<RpcOutbox>() <= 128, "{}", size_of::<RpcOutbox>());
    }
}
