//! [`WriteQueue`]: what waits to be written to one connection, as shared bytes.

use std::{
    collections::VecDeque,
    io::{self, IoSlice},
    pin::Pin,
    task::{Context, Poll, ready},
};

use bytes::{Buf, Bytes};
use tokio::io::AsyncWrite;

/// Pieces that one `writev` takes.
const SLICES: usize = 64;
/// Room for pieces that is kept when the queue runs empty.
const KEPT: usize = 16;

/// A queue of shared [`Bytes`] in front of an [`AsyncWrite`]. Copies nothing; the usual single piece allocates nothing.
///
/// It has no limit of its own: whoever fills it looks at [`len`](Self::len) first.
#[derive(Default)]
pub struct WriteQueue {
    /// The piece being written.
    front: Bytes,
    rest: VecDeque<Bytes>,
    /// In 32 bits, as what is queued is bounded far below: an idle connection has little else.
    len: u32,
    unflushed: bool,
}

impl WriteQueue {
    pub const fn new() -> Self {
        WriteQueue { front: Bytes::new(), rest: VecDeque::new(), len: 0, unflushed: false }
    }

    /// Bytes that wait.
    pub fn len(&self) -> usize {
        self.len as usize
    }

    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    pub fn push(&mut self, piece: Bytes) {
        if piece.is_empty() {
            return;
        }
        self.len += piece.len() as u32;
        if self.front.is_empty() {
            self.front = piece;
        } else {
            self.rest.push_back(piece);
        }
    }

    /// The first piece, for a writer that is not an [`AsyncWrite`].
    pub fn pop(&mut self) -> Option<Bytes> {
        let next = self.rest.pop_front().unwrap_or_default();
        let piece = std::mem::replace(&mut self.front, next);
        self.len -= piece.len() as u32;
        self.tidy();
        (!piece.is_empty()).then_some(piece)
    }

    /// Writes until all is written and flushed, or the peer takes no more. `Pending` may have written too: compare
    /// [`len`](Self::len).
    ///
    /// One piece is one `write`, several are one `writev`: with one `write` per piece a reader that is behind never
    /// catches up with hyper, which flattens.
    pub fn poll_write<W: AsyncWrite + Unpin>(&mut self, cx: &mut Context<'_>, io: &mut W) -> Poll<io::Result<()>> {
        while !self.front.is_empty() {
            let n = if self.rest.is_empty() {
                ready!(Pin::new(&mut *io).poll_write(cx, &self.front))?
            } else {
                let mut slices = [IoSlice::new(&[]); SLICES];
                slices[0] = IoSlice::new(&self.front);
                let count = 1 + self.rest.len().min(SLICES - 1);
                for (slice, piece) in slices[1..].iter_mut().zip(&self.rest) {
                    *slice = IoSlice::new(piece);
                }
                ready!(Pin::new(&mut *io).poll_write_vectored(cx, &slices[..count]))?
            };
            if n == 0 {
                return Poll::Ready(Err(io::ErrorKind::WriteZero.into()));
            }
            self.advance(n);
            self.unflushed = true;
        }
        if self.unflushed {
            self.tidy();
            // Nothing to do for TCP; TLS keeps what it encrypted until asked.
            ready!(Pin::new(io).poll_flush(cx))?;
            self.unflushed = false;
        }
        Poll::Ready(Ok(()))
    }

    fn advance(&mut self, mut n: usize) {
        self.len -= n as u32;
        while n >= self.front.len() && n > 0 {
            n -= self.front.len();
            // Dropped at once: a frame is shared with its channel's ring, and must not outlive its turn here.
            self.front = self.rest.pop_front().unwrap_or_default();
        }
        self.front.advance(n);
    }

    /// A burst of small pieces must not leave its room behind for ever.
    fn tidy(&mut self) {
        if self.rest.is_empty() && self.rest.capacity() > KEPT {
            self.rest = VecDeque::new();
        }
    }

    /// Gives back the room that was kept. Called when the connection seems idle.
    pub fn relax(&mut self) {
        if self.rest.is_empty() {
            self.rest = VecDeque::new();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::task::Waker;

    use proptest::prelude::*;

    use super::*;

    /// Takes as many bytes as its script says, then blocks once for each 0.
    struct Slow {
        script: Vec<usize>,
        got: Vec<u8>,
    }

    impl Slow {
        fn take(&mut self, slices: &[IoSlice<'_>]) -> Poll<io::Result<usize>> {
            match self.script.pop() {
                Some(0) => Poll::Pending,
                limit => {
                    let before = self.got.len();
                    let mut room = limit.unwrap_or(usize::MAX);
                    for slice in slices {
                        let n = room.min(slice.len());
                        self.got.extend_from_slice(&slice[..n]);
                        room -= n;
                    }
                    Poll::Ready(Ok(self.got.len() - before))
                }
            }
        }
    }

    impl AsyncWrite for Slow {
        fn poll_write(self: Pin<&mut Self>, _: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
            self.get_mut().take(&[IoSlice::new(bytes)])
        }

        fn poll_write_vectored(
            self: Pin<&mut Self>,
            _: &mut Context<'_>,
            slices: &[IoSlice<'_>],
        ) -> Poll<io::Result<usize>> {
            self.get_mut().take(slices)
        }

        fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
            Poll::Ready(Ok(()))
        }

        fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
            Poll::Ready(Ok(()))
        }
    }

    proptest! {
        #[test]
        fn all_bytes_once_in_order_however_the_peer_reads(
            turns in prop::collection::vec(prop::collection::vec("[a-z]{0,40}", 0..90), 0..5),
            script in prop::collection::vec(0..70usize, 0..60),
        ) {
            let mut io = Slow { script, got: Vec::new() };
            let mut egress = WriteQueue::new();
            let mut cx = Context::from_waker(Waker::noop());
            let mut want = String::new();
            for turn in turns {
                for piece in turn {
                    want.push_str(&piece);
                    egress.push(piece.into());
                }
                let _ = egress.poll_write(&mut cx, &mut io);
                prop_assert_eq!(egress.len(), want.len() - io.got.len());
            }
            while egress.poll_write(&mut cx, &mut io).is_pending() {}
            prop_assert!(egress.is_empty());
            prop_assert!(egress.rest.capacity() <= KEPT);
            prop_assert_eq!(String::from_utf8(io.got).unwrap(), want);
        }
    }

    #[test]
    fn a_peer_that_takes_nothing_is_an_error_and_not_a_loop() {
        struct Closed;
        impl AsyncWrite for Closed {
            fn poll_write(self: Pin<&mut Self>, _: &mut Context<'_>, _: &[u8]) -> Poll<io::Result<usize>> {
                Poll::Ready(Ok(0))
            }
            fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
                Poll::Ready(Ok(()))
            }
            fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
                Poll::Ready(Ok(()))
            }
        }
        let mut egress = WriteQueue::new();
        egress.push(Bytes::from_static(b"a"));
        assert!(matches!(
            egress.poll_write(&mut Context::from_waker(Waker::noop()), &mut Closed),
            Poll::Ready(Err(error)) if error.kind() == io::ErrorKind::WriteZero
        ));
    }
}
