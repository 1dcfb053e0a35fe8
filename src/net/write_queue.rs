//! [`WriteQueue`]: bytes that wait to be written to one connection, as shared pieces.

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
/// Capacity for pieces that is kept when the queue runs empty.
const KEPT: usize = 16;

/// A queue of shared [`Bytes`] in front of an [`AsyncWrite`]. Copies nothing; the usual single piece allocates nothing.
///
/// It has no limit of its own: callers check [`len`](Self::len) before they push.
#[derive(Default)]
pub(crate) struct WriteQueue {
    /// The piece being written.
    front: Bytes,
    rest: VecDeque<Bytes>,
    /// In 32 bits, as the queue is bounded far below: this is most of what an idle connection holds.
    len: u32,
    /// `front` is partly written.
    begun: bool,
    unflushed: bool,
}

impl WriteQueue {
    pub(crate) const fn new() -> Self {
        WriteQueue { front: Bytes::new(), rest: VecDeque::new(), len: 0, begun: false, unflushed: false }
    }

    /// Bytes that wait.
    pub(crate) fn len(&self) -> usize {
        self.len as usize
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Whether nothing waits, not even in the writer: one that buffers, such as TLS, may hold what was written.
    pub(crate) fn is_flushed(&self) -> bool {
        self.is_empty() && !self.unflushed
    }

    pub(crate) fn push(&mut self, piece: Bytes) {
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

    /// Takes the first piece, for a writer that is not an [`AsyncWrite`].
    pub(crate) fn pop(&mut self) -> Option<Bytes> {
        let piece = self.next_piece();
        self.len -= piece.len() as u32;
        self.free_burst();
        (!piece.is_empty()).then_some(piece)
    }

    /// Takes back the piece that was pushed last. It must have been pushed after the last write.
    pub(crate) fn pop_back(&mut self) -> Option<Bytes> {
        let piece = self.rest.pop_back().unwrap_or_else(|| std::mem::take(&mut self.front));
        self.len -= piece.len() as u32;
        (!piece.is_empty()).then_some(piece)
    }

    /// Drops the pieces of which nothing is written.
    pub(crate) fn drop_unwritten(&mut self) {
        self.rest = VecDeque::new();
        if !self.begun {
            self.front = Bytes::new();
        }
        self.len = self.front.len() as u32;
    }

    /// Writes until all is written and flushed, or the peer takes no more. Bytes may be written even if the result is
    /// `Pending`: compare [`len`](Self::len).
    pub(crate) fn poll_write<W: AsyncWrite + Unpin>(
        &mut self,
        cx: &mut Context<'_>,
        io: &mut W,
    ) -> Poll<io::Result<()>> {
        while !self.front.is_empty() {
            ready!(self.poll_write_behind(cx, &[], io))?;
        }
        self.poll_flush(cx, io)
    }

    /// Writes once: `head`, then pieces. Returns how many bytes of `head` were written. One of the two must not be
    /// empty.
    ///
    /// Several pieces are one `writev`: with one `write` per piece a reader that is behind never catches up with hyper,
    /// which flattens.
    pub(crate) fn poll_write_behind<W: AsyncWrite + Unpin>(
        &mut self,
        cx: &mut Context<'_>,
        head: &[u8],
        io: &mut W,
    ) -> Poll<io::Result<usize>> {
        let n = match (head.is_empty(), self.front.is_empty()) {
            (true, _) if self.rest.is_empty() => ready!(Pin::new(&mut *io).poll_write(cx, &self.front))?,
            (_, true) => ready!(Pin::new(&mut *io).poll_write(cx, head))?,
            _ => {
                let mut slices = [IoSlice::new(&[]); SLICES];
                let pieces = [head, &self.front].into_iter().chain(self.rest.iter().map(|piece| &piece[..]));
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
        self.unflushed = true;
        let of_head = n.min(head.len());
        self.advance(n - of_head);
        Poll::Ready(Ok(of_head))
    }

    /// Flushes what was written. TCP has nothing to flush; TLS keeps what it encrypted until then.
    pub(crate) fn poll_flush<W: AsyncWrite + Unpin>(
        &mut self,
        cx: &mut Context<'_>,
        io: &mut W,
    ) -> Poll<io::Result<()>> {
        if self.unflushed {
            self.free_burst();
            ready!(Pin::new(io).poll_flush(cx))?;
            self.unflushed = false;
        }
        Poll::Ready(Ok(()))
    }

    fn advance(&mut self, mut n: usize) {
        self.len -= n as u32;
        while n >= self.front.len() && n > 0 {
            // Dropped at once: a frame is shared with its channel's ring, and must not outlive its write.
            n -= self.next_piece().len();
        }
        if n > 0 {
            self.front.advance(n);
            self.begun = true;
        }
    }

    /// Replaces `front`, and returns it.
    fn next_piece(&mut self) -> Bytes {
        self.begun = false;
        std::mem::replace(&mut self.front, self.rest.pop_front().unwrap_or_default())
    }

    /// Frees the capacity that a burst of small pieces has left behind.
    fn free_burst(&mut self) {
        if self.rest.is_empty() && self.rest.capacity() > KEPT {
            self.rest = VecDeque::new();
        }
    }

    /// Frees all unused capacity. Called when the connection seems idle.
    pub(crate) fn shrink(&mut self) {
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
            let mut queue = WriteQueue::new();
            let mut cx = Context::from_waker(Waker::noop());
            let mut want = String::new();
            for turn in turns {
                for piece in turn {
                    want.push_str(&piece);
                    queue.push(piece.into());
                }
                let _ = queue.poll_write(&mut cx, &mut io);
                prop_assert_eq!(queue.len(), want.len() - io.got.len());
            }
            while queue.poll_write(&mut cx, &mut io).is_pending() {}
            prop_assert!(queue.is_empty());
            prop_assert!(queue.rest.capacity() <= KEPT);
            prop_assert_eq!(String::from_utf8(io.got).unwrap(), want);
        }
    }

    #[test]
    fn a_writer_that_buffers_is_flushed_until_nothing_is_left() {
        /// Takes everything and needs two flushes.
        struct Buffering(usize);
        impl AsyncWrite for Buffering {
            fn poll_write(self: Pin<&mut Self>, _: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
                Poll::Ready(Ok(bytes.len()))
            }
            fn poll_flush(mut self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
                self.0 += 1;
                if self.0 < 2 { Poll::Pending } else { Poll::Ready(Ok(())) }
            }
            fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
                Poll::Ready(Ok(()))
            }
        }
        let (mut queue, mut io) = (WriteQueue::new(), Buffering(0));
        let mut cx = Context::from_waker(Waker::noop());
        queue.push(Bytes::from_static(b"a"));
        assert!(queue.poll_write(&mut cx, &mut io).is_pending());
        assert!(queue.is_empty() && !queue.is_flushed());
        assert!(queue.poll_write(&mut cx, &mut io).is_ready());
        assert!(queue.is_flushed());
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
        let mut queue = WriteQueue::new();
        queue.push(Bytes::from_static(b"a"));
        assert!(matches!(
            queue.poll_write(&mut Context::from_waker(Waker::noop()), &mut Closed),
            Poll::Ready(Err(error)) if error.kind() == io::ErrorKind::WriteZero
        ));
    }
}
