//! [`SocketOutput`]: what is being written to one socket.

use std::{
    collections::VecDeque,
    io::{self, IoSlice},
    pin::Pin,
    task::{Context, Poll, ready},
};

use bytes::{Buf, Bytes};
use tokio::io::AsyncWrite;

use super::outbox;
use crate::net::{hijack::Conn, websocket::frame};

/// Pieces that one `writev` takes.
const SLICES: usize = 32;

/// What is being written: frames of this connection, then shared events, then the last words. Refilled only when it is
/// empty, so that what was said earlier is read earlier.
#[derive(Default)]
pub struct SocketOutput {
    text: Vec<u8>,
    /// Written bytes of `text`.
    at: usize,
    events: Events,
    last: Vec<u8>,
}

/// A queue that is filled, emptied, and then filled again. The usual single piece allocates nothing.
#[derive(Default)]
struct Events {
    first: Bytes,
    rest: VecDeque<Bytes>,
    len: usize,
    /// The first is partly written.
    begun: bool,
}

impl Events {
    fn push(&mut self, piece: Bytes) {
        self.len += piece.len();
        if self.first.is_empty() {
            self.first = piece;
        } else {
            self.rest.push_back(piece);
        }
    }

    fn advance(&mut self, mut n: usize) {
        self.len -= n;
        while n > 0 {
            let here = n.min(self.first.len());
            self.first.advance(here);
            self.begun = true;
            n -= here;
            if self.first.is_empty() {
                // Dropped at once: a frame is shared with its channel's ring.
                self.first = self.rest.pop_front().unwrap_or_default();
                self.begun = false;
                if here == 0 {
                    break;
                }
            }
        }
    }
}

impl SocketOutput {
    /// Bytes that wait.
    pub fn len(&self) -> usize {
        self.text.len() - self.at + self.events.len + self.last.len()
    }

    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Gives back what an idle connection does not need.
    pub fn relax(&mut self) {
        if self.is_empty() {
            *self = SocketOutput::default();
        }
    }

    /// Where to put frames of this connection, while nothing waits.
    pub fn text(&mut self) -> &mut Vec<u8> {
        &mut self.text
    }

    /// Adds a shared piece, which is whole frames.
    pub fn push(&mut self, piece: Bytes) {
        self.events.push(piece);
    }

    /// What is written when all else is.
    pub fn set_last(&mut self, last: Vec<u8>) {
        self.last = last;
    }

    /// Drops the frames of which nothing has been written.
    pub fn drop_unbegun(&mut self) {
        let end = frame::boundary(&self.text, self.at);
        self.text.truncate(end);
        let Events { first, begun, .. } = std::mem::take(&mut self.events);
        if begun {
            // Where its frames end cannot be told from its middle; it is one turn of one channel at most.
            self.events = Events { len: first.len(), first, begun, ..Events::default() };
        }
    }

    /// Writes all of it, or until the peer takes no more.
    pub fn poll_write(&mut self, cx: &mut Context<'_>, io: &mut Conn) -> Poll<io::Result<()>> {
        loop {
            if self.text.len() == self.at && self.events.len == 0 {
                self.at = 0;
                outbox::clear(&mut self.text);
                if self.last.is_empty() {
                    break;
                }
                self.text = std::mem::take(&mut self.last);
            }
            let text = self.text.len() - self.at;
            let n = match (text, self.events.len) {
                (0, _) if self.events.rest.is_empty() => ready!(Pin::new(&mut *io).poll_write(cx, &self.events.first))?,
                (_, 0) => ready!(Pin::new(&mut *io).poll_write(cx, &self.text[self.at..]))?,
                _ => {
                    let mut slices = [IoSlice::new(&[]); SLICES];
                    let pieces = [&self.text[self.at..], &self.events.first].into_iter();
                    let pieces = pieces.chain(self.events.rest.iter().map(|piece| &piece[..]));
                    let mut count = 0;
                    for (slice, piece) in slices.iter_mut().zip(pieces.filter(|piece| !piece.is_empty())) {
                        *slice = IoSlice::new(piece);
                        count += 1;
                    }
                    ready!(Pin::new(&mut *io).poll_write_vectored(cx, &slices[..count]))?
                }
            };
            if n == 0 {
                return Poll::Ready(Err(io::ErrorKind::WriteZero.into()));
            }
            let here = n.min(text);
            self.at += here;
            if n > here {
                self.events.advance(n - here);
            }
        }
        // Nothing to do for TCP; TLS keeps what it encrypted until asked.
        Pin::new(io).poll_flush(cx)
    }
}

#[cfg(test)]
mod tests {
    use std::task::Waker;

    use proptest::prelude::*;
    use tokio::io::{AsyncRead, ReadBuf};

    use super::*;

    fn frame(len: usize) -> Vec<u8> {
        let mut out = Vec::new();
        frame::text(&mut out, |out| out.extend((0..len).map(|n| n as u8)));
        out
    }

    /// Reads at most so many bytes.
    fn read(pipe: &mut tokio::io::DuplexStream, most: usize, got: &mut Vec<u8>) {
        let mut bytes = vec![0; most];
        let mut buf = ReadBuf::new(&mut bytes);
        let mut cx = Context::from_waker(Waker::noop());
        if Pin::new(pipe).poll_read(&mut cx, &mut buf).is_ready() {
            got.extend_from_slice(buf.filled());
        }
    }

    proptest! {
        #[test]
        fn all_bytes_once_in_order_however_the_peer_reads(
            turns in prop::collection::vec((prop::collection::vec(0..300usize, 0..3), prop::collection::vec(0..300usize, 0..50)), 1..5),
            last in 0..200usize,
            reads in prop::collection::vec(1..500usize, 1..20),
        ) {
            let (near, mut far) = tokio::io::duplex(64);
            let (mut io, mut cx) = (Conn::Pipe(near), Context::from_waker(Waker::noop()));
            let (mut out, mut want, mut got) = (SocketOutput::default(), Vec::new(), Vec::new());
            let mut reads = reads.into_iter().cycle();
            let count = turns.len();
            for (turn, (text, events)) in turns.into_iter().enumerate() {
                for frame in text.into_iter().map(frame) {
                    want.extend_from_slice(&frame);
                    out.text().extend_from_slice(&frame);
                }
                for frame in events.into_iter().map(frame) {
                    want.extend_from_slice(&frame);
                    out.push(frame.into());
                }
                if turn + 1 == count {
                    want.extend(frame(last));
                    out.set_last(frame(last));
                }
                while out.poll_write(&mut cx, &mut io).is_pending() {
                    prop_assert!(!out.is_empty());
                    read(&mut far, reads.next().unwrap(), &mut got);
                }
                prop_assert!(out.is_empty());
            }
            while got.len() < want.len() {
                read(&mut far, 1000, &mut got);
            }
            prop_assert_eq!(got, want);
        }

        #[test]
        fn what_is_not_begun_is_dropped_at_a_boundary(
            text in prop::collection::vec(0..300usize, 0..5),
            events in prop::collection::vec(0..300usize, 0..5),
            taken in 1..2000usize,
        ) {
            let (near, mut far) = tokio::io::duplex(taken);
            let (mut io, mut cx) = (Conn::Pipe(near), Context::from_waker(Waker::noop()));
            let mut out = SocketOutput::default();
            text.into_iter().for_each(|len| out.text().extend(frame(len)));
            events.into_iter().for_each(|len| out.push(frame(len).into()));
            let _ = out.poll_write(&mut cx, &mut io);
            out.drop_unbegun();
            prop_assert!(out.len() < 310, "{}", out.len());
            out.set_last(frame(7));
            let mut got = Vec::new();
            while out.poll_write(&mut cx, &mut io).is_pending() {
                read(&mut far, 100, &mut got);
            }
            for _ in 0..3 {
                read(&mut far, 4000, &mut got);
            }
            // Whole frames, and ours behind them.
            prop_assert_eq!(frame::boundary(&got, got.len() - 1), got.len());
            prop_assert!(got.ends_with(&frame(7)));
        }
    }
}
