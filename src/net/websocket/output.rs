//! [`SocketOutput`]: the bytes that are being written to one WebSocket.

use std::{
    io,
    task::{Context, Poll, ready},
};

use bytes::Bytes;

use super::frame;
use crate::net::{hijack::Conn, write_queue::WriteQueue};

/// A larger buffer is freed once it is written.
const KEPT: usize = 64 * 1024;

/// The bytes that are being written: frames of this connection, then shared frames, then the last ones. The buffer is
/// refilled only when all is written but control frames, so that messages are read in the order in which they were sent.
#[derive(Default)]
pub(crate) struct SocketOutput {
    buffer: Vec<u8>,
    /// Written bytes of `buffer`.
    written: usize,
    queue: WriteQueue,
    last: Vec<u8>,
}

impl SocketOutput {
    /// Bytes that wait.
    pub(crate) fn len(&self) -> usize {
        self.buffer.len() - self.written + self.queue.len() + self.last.len()
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Whether nothing waits, not even in the connection.
    pub(crate) fn is_flushed(&self) -> bool {
        self.is_empty() && self.queue.is_flushed()
    }

    /// Frees what an idle connection does not need.
    pub(crate) fn shrink(&mut self) {
        if self.is_flushed() {
            *self = SocketOutput::default();
        }
    }

    /// The buffer for frames of this connection. Only to be used while nothing is partly written.
    pub(crate) fn buffer(&mut self) -> &mut Vec<u8> {
        &mut self.buffer
    }

    /// Appends a shared piece, which is whole frames.
    pub(crate) fn push(&mut self, piece: Bytes) {
        self.queue.push(piece);
    }

    /// Sets the frames that are written after everything else.
    pub(crate) fn set_last(&mut self, last: Vec<u8>) {
        self.last = last;
    }

    /// Drops the frames of which nothing is written.
    pub(crate) fn drop_unwritten(&mut self) {
        let end = frame::boundary(&self.buffer, self.written);
        self.buffer.truncate(end);
        // A piece that is partly written is kept whole: its frame boundaries are unknown.
        self.queue.drop_unwritten();
    }

    /// Writes until all is written, or the peer takes no more.
    pub(crate) fn poll_write(&mut self, cx: &mut Context<'_>, io: &mut Conn) -> Poll<io::Result<()>> {
        loop {
            if self.buffer.len() == self.written && self.queue.is_empty() {
                self.written = 0;
                match self.buffer.capacity() > KEPT {
                    true => self.buffer = Vec::new(),
                    false => self.buffer.clear(),
                }
                if self.last.is_empty() {
                    return self.queue.poll_flush(cx, io);
                }
                self.buffer = std::mem::take(&mut self.last);
            }
            self.written += ready!(self.queue.poll_write_behind(cx, &self.buffer[self.written..], io))?;
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{pin::Pin, task::Waker};

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
                    out.buffer().extend_from_slice(&frame);
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
        fn unwritten_frames_are_dropped_at_a_boundary(
            text in prop::collection::vec(0..300usize, 0..5),
            events in prop::collection::vec(0..300usize, 0..5),
            taken in 1..2000usize,
        ) {
            let (near, mut far) = tokio::io::duplex(taken);
            let (mut io, mut cx) = (Conn::Pipe(near), Context::from_waker(Waker::noop()));
            let mut out = SocketOutput::default();
            text.into_iter().for_each(|len| out.buffer().extend(frame(len)));
            events.into_iter().for_each(|len| out.push(frame(len).into()));
            let _ = out.poll_write(&mut cx, &mut io);
            out.drop_unwritten();
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
