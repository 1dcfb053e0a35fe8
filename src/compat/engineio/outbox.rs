//! [`PacketOutbox`]: the packets that wait for one client, whichever transport it uses.
//!
//! Packets are encoded in the framing of the current transport. The next poll, or the WebSocket's task, takes all of
//! them. At an upgrade the packets that still wait are reframed.

use std::task::{Context, Poll};

use super::packet::{Framing, reframe};
use crate::{
    net::websocket::outbox::{OfferOutcome, Outbox, OutboxContent, OutboxExtra},
    rpc::PeerRoom,
};

/// The outbound side of one session.
pub(crate) struct PacketOutbox(Outbox<PacketTransport>);

struct PacketTransport {
    framing: Framing,
    /// Polls are answered at once, if need be with a no-op: the client waits for that before it completes the upgrade.
    upgrading: bool,
}

impl OutboxExtra for PacketTransport {
    fn discard(&mut self) {}
}

impl PacketOutbox {
    /// `limit` is in bytes.
    pub(crate) fn new(framing: Framing, limit: usize) -> Self {
        PacketOutbox(Outbox::new(limit, PacketTransport { framing, upgrading: false }))
    }

    /// Swaps what waits for the empty `into`, for a reader of `framing`. `Pending`: nothing waits, and the task will be
    /// woken. The outbox is closed for a reader of the other framing.
    pub(crate) fn poll_take(&self, cx: &mut Context<'_>, framing: Framing, into: &mut Vec<u8>) -> Poll<OutboxContent> {
        let mut state = self.0.lock();
        if state.extra.framing != framing {
            return Poll::Ready(OutboxContent::Closed);
        }
        let content = state.poll_take(cx, into);
        let noop = content.is_pending() && framing == Framing::Polling && state.extra.upgrading;
        self.0.wake_writers(state);
        if noop {
            into.push(b'6');
            return Poll::Ready(OutboxContent::Bytes);
        }
        content
    }

    /// Appends packets, unless the session is ending.
    pub(crate) fn send(&self, write: impl FnOnce(Framing, &mut Vec<u8>)) {
        self.0.append(|state| write(state.extra.framing, &mut state.bytes));
    }

    /// Appends packets, or `instead` if so much waits that there is no room for large ones. Returns whether the client has
    /// to read before more is produced for it.
    pub(crate) fn answer(
        &self,
        write: impl FnOnce(Framing, &mut Vec<u8>),
        instead: impl FnOnce(Framing, &mut Vec<u8>),
    ) -> PeerRoom {
        let mut room = PeerRoom::Free;
        self.0.append(|state| {
            match self.0.is_overfull(state) {
                false => write(state.extra.framing, &mut state.bytes),
                true => instead(state.extra.framing, &mut state.bytes),
            }
            if self.0.is_full(state) {
                room = PeerRoom::Full;
            }
        });
        room
    }

    /// See [`Peer::poll_room`](crate::rpc::Peer::poll_room).
    pub(crate) fn poll_room(&self, cx: &mut Context<'_>) -> Poll<()> {
        self.0.poll_room(cx)
    }

    pub(crate) fn abandon_wait(&self) {
        self.0.abandon_wait();
    }

    /// Appends packets if the limit is not reached.
    pub(crate) fn offer(&self, write: impl FnOnce(Framing, &mut Vec<u8>)) -> OfferOutcome {
        self.0.offer(|state| write(state.extra.framing, &mut state.bytes))
    }

    /// Appends one text packet.
    pub(crate) fn text(&self, packet: &str) {
        self.send(|framing, out| framing.text(out, |out| out.extend_from_slice(packet.as_bytes())));
    }

    /// Whether so much waits that the client must read before it is read from again.
    pub(crate) fn is_full(&self) -> bool {
        self.0.lock().bytes.len() >= self.0.limit()
    }

    /// Ends the session when all that waits has been read.
    pub(crate) fn finish(&self) {
        self.0.update(|state| {
            if state.finish() && state.extra.framing == Framing::Polling {
                Framing::Polling.text(&mut state.bytes, |out| out.push(b'1'));
            }
        });
    }

    /// Sends `packet` as the last, upon which the client closes. If the session were closed at once, the client might
    /// see that first.
    pub(crate) fn send_last(&self, packet: &str) {
        self.text(packet);
        self.0.lock().seal();
    }

    /// Whether nothing can be appended any more.
    pub(crate) fn is_ending(&self) -> bool {
        !self.0.lock().is_open()
    }

    /// Whether the session ends, and the last packet has been taken.
    pub(crate) fn is_finished(&self) -> bool {
        self.0.lock().is_finished()
    }

    /// Nothing is kept from now on.
    pub(crate) fn close(&self) {
        self.0.update(|state| state.close());
    }

    /// Begins or abandons an upgrade: while it is under way, polls are answered at once.
    pub(crate) fn set_upgrading(&self, upgrading: bool) {
        self.0.update(|state| state.extra.upgrading = upgrading);
    }

    /// Completes an upgrade: what waits is for a WebSocket from now on.
    pub(crate) fn upgrade(&self) {
        self.0.update(|state| {
            state.bytes = reframe(&state.bytes);
            state.extra = PacketTransport { framing: Framing::WebSocket, upgrading: false };
        });
    }

    /// Frees what an idle connection does not need.
    pub(crate) fn shrink(&self) {
        self.0.lock().shrink();
    }
}
