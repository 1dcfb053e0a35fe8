//! [`SocketReader`]: reads from one WebSocket. All sockets of a worker thread are read into one buffer: they are mostly
//! idle, and a buffer for each would be most of their memory.

use std::{
    cell::Cell,
    ops::{Deref, DerefMut},
    pin::Pin,
    task::{Context, Poll, ready},
};

use bytes::Bytes;
use tokio::io::{AsyncRead, ReadBuf};

use crate::net::hijack::Conn;

/// Bytes of one read. Messages are parsed in place.
const SCRATCH: usize = 64 * 1024;

thread_local! {
    /// Taken during a read.
    static BUFFER: Cell<Option<Box<[u8]>>> = const { Cell::new(None) };
}

/// A connection and the state of reading it.
pub(super) struct SocketReader {
    pub(super) io: Conn,
    /// Bytes that are to be read before those of the socket: they were read behind the request, or put back.
    early: Bytes,
    /// The socket holds our waker for when it becomes readable.
    armed: bool,
}

/// Bytes that were read, in the worker's buffer, which is returned on drop.
pub(super) struct ReadBytes {
    buffer: Box<[u8]>,
    len: usize,
}

impl SocketReader {
    pub(super) fn new(io: Conn, early: Bytes) -> Self {
        SocketReader { io, early, armed: false }
    }

    /// Reads once. `None` if the peer is gone.
    pub(super) fn poll_read(&mut self, cx: &mut Context<'_>) -> Poll<Option<ReadBytes>> {
        if self.early.is_empty() && self.armed && !self.io.is_readable() {
            return Poll::Pending;
        }
        let mut read = ReadBytes::new();
        if !self.early.is_empty() {
            let early = self.early.split_to(self.early.len().min(SCRATCH));
            read.buffer[..early.len()].copy_from_slice(&early);
            read.len = early.len();
            return Poll::Ready(Some(read));
        }
        let mut buffer = ReadBuf::new(&mut read.buffer);
        let polled = Pin::new(&mut self.io).poll_read(cx, &mut buffer);
        let len = buffer.filled().len();
        self.armed = polled.is_pending();
        let whole = ready!(polled).is_ok() && len > 0;
        read.len = len;
        Poll::Ready(whole.then_some(read))
    }

    /// Puts back what was read last and could not be handled yet: the next read returns it.
    pub(super) fn put_back(&mut self, rest: &[u8]) {
        self.early = match self.early.is_empty() {
            true => Bytes::copy_from_slice(rest),
            false => [rest, &self.early].concat().into(),
        };
    }
}

impl ReadBytes {
    fn new() -> Self {
        let buffer = BUFFER.take().unwrap_or_else(|| vec![0; SCRATCH].into_boxed_slice());
        ReadBytes { buffer, len: 0 }
    }
}

impl Deref for ReadBytes {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.buffer[..self.len]
    }
}

impl DerefMut for ReadBytes {
    fn deref_mut(&mut self) -> &mut [u8] {
        &mut self.buffer[..self.len]
    }
}

impl Drop for ReadBytes {
    fn drop(&mut self) {
        BUFFER.set(Some(std::mem::take(&mut self.buffer)));
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::AsyncWriteExt as _;

    use super::*;

    #[tokio::test]
    async fn early_bytes_come_first() {
        let (io, mut peer) = tokio::io::duplex(1_000_000);
        let early: Vec<u8> = (0..=255).cycle().take(SCRATCH + 10).collect();
        let mut reader = SocketReader::new(Conn::Pipe(io), early.clone().into());
        peer.write_all(b"later").await.unwrap();
        drop(peer);
        let mut got = Vec::new();
        while let Some(read) = std::future::poll_fn(|cx| reader.poll_read(cx)).await {
            assert!(!read.is_empty());
            got.extend_from_slice(&read);
        }
        assert_eq!(got, [&early[..], b"later"].concat());
        // One buffer is reused.
        let kept = BUFFER.take().unwrap();
        assert_eq!(kept.len(), SCRATCH);
    }
}
