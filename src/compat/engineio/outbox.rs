//! [`Outbox`]: what waits to be written to one client, whatever it is connected by.
//!
//! Whoever has something to say encodes it into one buffer, in the framing of the moment; the next poll or the socket's
//! task takes all of it. At an upgrade what is still there changes its framing.

use std::task::{Context, Poll, Waker};

use parking_lot::{Mutex, MutexGuard};

use super::packet::{Framing, reframe};

/// Beyond so many times its limit nothing is kept for a client: it does not read what it asked for.
const HARD: usize = 4;
/// A buffer that a burst made larger than this is not kept.
pub const KEPT: usize = 64 * 1024;

/// The outbound side of one session.
pub struct Outbox {
    /// Bytes, beyond which others' requests are not taken.
    most: usize,
    state: Mutex<State>,
}

struct State {
    framing: Framing,
    bytes: Vec<u8>,
    end: End,
    /// Polls are answered at once, with nothing if there is nothing: the client waits for that to change over.
    upgrading: bool,
    waker: Option<Waker>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum End {
    Open,
    /// Nothing is added; the client has been told, and closes by itself.
    Parting,
    /// Nothing is added; what is there is delivered, and then the session ends.
    Finishing,
    /// It did not read: nothing is delivered any more.
    Overflown,
    Gone,
}

/// What [`Outbox::poll_take`] found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Taken {
    /// The buffer given was empty and now holds packets.
    Packets,
    /// Nothing more will come.
    Over,
    /// The same, because the client did not read.
    Slow,
    /// The client reads elsewhere now.
    Elsewhere,
}

// === impl Outbox ===

impl Outbox {
    pub fn new(framing: Framing, most: usize) -> Self {
        let state = State { framing, bytes: Vec::new(), end: End::Open, upgrading: false, waker: None };
        Outbox { most, state: Mutex::new(state) }
    }

    /// Swaps what waits for the empty `into`, for a reader in `framing`. `Pending`: nothing waits, and the task will be
    /// woken.
    pub fn poll_take(&self, cx: &mut Context<'_>, framing: Framing, into: &mut Vec<u8>) -> Poll<Taken> {
        debug_assert!(into.is_empty());
        let mut state = self.state.lock();
        if state.framing != framing {
            return Poll::Ready(Taken::Elsewhere);
        }
        if !state.bytes.is_empty() {
            std::mem::swap(&mut state.bytes, into);
            return Poll::Ready(Taken::Packets);
        }
        match state.end {
            End::Open | End::Parting => {}
            End::Overflown => return Poll::Ready(Taken::Slow),
            End::Finishing | End::Gone => return Poll::Ready(Taken::Over),
        }
        if framing == Framing::Polling && state.upgrading {
            into.push(b'6');
            return Poll::Ready(Taken::Packets);
        }
        if state.waker.as_ref().is_none_or(|waker| !waker.will_wake(cx.waker())) {
            state.waker = Some(cx.waker().clone());
        }
        Poll::Pending
    }

    /// Appends packets in order, unless the session is ending.
    pub fn send(&self, write: impl FnOnce(Framing, &mut Vec<u8>)) {
        let mut state = self.state.lock();
        if state.end != End::Open {
            return;
        }
        let State { framing, bytes, .. } = &mut *state;
        write(*framing, bytes);
        if state.bytes.len() > self.most.saturating_mul(HARD) {
            state.bytes = Vec::new();
            state.end = End::Overflown;
        }
        wake(state);
    }

    /// As [`send`](Self::send), but only while there is room. False: nothing was written. `None`: and nothing will be.
    pub fn offer(&self, write: impl FnOnce(Framing, &mut Vec<u8>)) -> Option<bool> {
        let mut state = self.state.lock();
        if state.end != End::Open {
            return None;
        }
        if state.bytes.len() >= self.most {
            return Some(false);
        }
        let State { framing, bytes, .. } = &mut *state;
        write(*framing, bytes);
        wake(state);
        Some(true)
    }

    /// Appends one text packet.
    pub fn text(&self, packet: &str) {
        self.send(|framing, out| framing.text(out, |out| out.extend_from_slice(packet.as_bytes())));
    }

    /// Whether so much waits that the client should read before it asks for more.
    pub fn is_full(&self) -> bool {
        self.state.lock().bytes.len() >= self.most
    }

    /// Has the session end when all that waits has been read.
    pub fn finish(&self) {
        let mut state = self.state.lock();
        if matches!(state.end, End::Open | End::Parting) {
            let State { framing, bytes, .. } = &mut *state;
            if *framing == Framing::Polling {
                framing.text(bytes, |out| out.push(b'1'));
            }
            state.end = End::Finishing;
        }
        wake(state);
    }

    /// Says `packet` last, upon which the client closes: were it closed at once, the client might see that first.
    pub fn part(&self, packet: &str) {
        self.text(packet);
        let mut state = self.state.lock();
        if state.end == End::Open {
            state.end = End::Parting;
        }
    }

    /// Whether nothing is added any more.
    pub fn is_ending(&self) -> bool {
        self.state.lock().end != End::Open
    }

    /// Whether the last of it has been taken.
    pub fn is_finished(&self) -> bool {
        let state = self.state.lock();
        state.end == End::Finishing && state.bytes.is_empty()
    }

    /// Nothing is kept from now on.
    pub fn close(&self) {
        let mut state = self.state.lock();
        state.bytes = Vec::new();
        state.end = End::Gone;
        wake(state);
    }

    /// From now on polls are not held, or are again.
    pub fn upgrading(&self, upgrading: bool) {
        let mut state = self.state.lock();
        state.upgrading = upgrading;
        wake(state);
    }

    /// What waits is for a WebSocket from now on.
    pub fn upgrade(&self) {
        let mut state = self.state.lock();
        state.bytes = reframe(&state.bytes);
        state.framing = Framing::WebSocket;
        state.upgrading = false;
        wake(state);
    }

    /// Gives back what an idle connection does not need.
    pub fn relax(&self) {
        let mut state = self.state.lock();
        if state.bytes.is_empty() {
            state.bytes = Vec::new();
        }
    }
}

/// Wakes whoever takes, unless nobody sleeps.
fn wake(mut state: MutexGuard<'_, State>) {
    let Some(waker) = state.waker.take() else { return };
    drop(state);
    waker.wake();
}
