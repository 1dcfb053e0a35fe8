//! [`SocketReader`]: what comes over one WebSocket. All sockets of a worker are read into one buffer: nearly always they have
//! nothing to say, and a buffer for each would be most of what they cost.

use std::{
    cell::Cell,
    ops::{Deref, DerefMut},
    pin::Pin,
    task::{Context, Poll, ready},
};

use bytes::Bytes;
use tokio::io::{AsyncRead, ReadBuf};

use crate::net::hijack::Conn;

/// Bytes read at once. Messages are parsed where they lie.
const SCRATCH: usize = 64 * 1024;

thread_local! {
    /// Taken for the time of one read.
    static BUFFER: Cell<Option<Box<[u8]>>> = const { Cell::new(None) };
}

/// A connection, and how it is read.
pub struct SocketReader {
    pub io: Conn,
    /// Read behind the request.
    early: Bytes,
    /// The socket has our waker for when something can be read.
    listening: bool,
}

/// What was read, in the worker's buffer, which is given back on drop.
pub struct Read {
    buffer: Box<[u8]>,
    len: usize,
}

impl SocketReader {
    pub fn new(io: Conn, early: Bytes) -> Self {
        SocketReader { io, early, listening: false }
    }

    /// Reads once. `None`: the peer is gone.
    pub fn poll_read(&mut self, cx: &mut Context<'_>) -> Poll<Option<Read>> {
        if self.listening && !self.io.is_readable() {
            return Poll::Pending;
        }
        let mut read = Read::new();
        if !self.early.is_empty() {
            let early = self.early.split_to(self.early.len().min(SCRATCH));
            read.buffer[..early.len()].copy_from_slice(&early);
            read.len = early.len();
            return Poll::Ready(Some(read));
        }
        let mut buffer = ReadBuf::new(&mut read.buffer);
        let polled = Pin::new(&mut self.io).poll_read(cx, &mut buffer);
        let len = buffer.filled().len();
        self.listening = polled.is_pending();
        let whole = ready!(polled).is_ok() && len > 0;
        read.len = len;
        Poll::Ready(whole.then_some(read))
    }
}

impl Read {
    fn new() -> Self {
        let buffer = BUFFER.take().unwrap_or_else(|| vec![0; SCRATCH].into_boxed_slice());
        Read { buffer, len: 0 }
    }
}

impl Deref for Read {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.buffer[..self.len]
    }
}

impl DerefMut for Read {
    fn deref_mut(&mut self) -> &mut [u8] {
        &mut self.buffer[..self.len]
    }
}

impl Drop for Read {
    fn drop(&mut self) {
        BUFFER.set(Some(std::mem::take(&mut self.buffer)));
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::AsyncWriteExt as _;

    use super::*;

    #[tokio::test]
    async fn what_came_early_comes_first_and_the_end_last() {
        let (io, mut peer) = tokio::io::duplex(1_000_000);
        let early: Vec<u8> = (0..=255).cycle().take(SCRATCH + 10).collect();
        let mut inlet = SocketReader::new(Conn::Pipe(io), early.clone().into());
        peer.write_all(b"later").await.unwrap();
        drop(peer);
        let mut got = Vec::new();
        while let Some(read) = std::future::poll_fn(|cx| inlet.poll_read(cx)).await {
            assert!(!read.is_empty());
            got.extend_from_slice(&read);
        }
        assert_eq!(got, [&early[..], b"later"].concat());
        // One buffer, used again.
        let kept = BUFFER.take().unwrap();
        assert_eq!(kept.len(), SCRATCH);
    }
}
