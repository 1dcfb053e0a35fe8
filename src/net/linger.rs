//! Closing a connection so that the peer can read what was written last (RFC 9112 §9.6).
//!
//! A socket that is closed with unread bytes is reset, and the peer loses what it has not read yet: a client that sends
//! its body before it reads would see a broken connection instead of the response. So weir first ends its own side, then
//! reads and discards what the peer still sends, within bounds, until that ends its side too.

use std::{
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};

use bytes::Bytes;
use tokio::io::{AsyncRead as _, AsyncWrite as _, ReadBuf};

use crate::net::{
    hijack::Conn,
    timer::{Due, Timer, TimerWheel},
    write_queue::WriteQueue,
};

/// How long a peer may send after the end.
const LONGEST: Duration = Duration::from_secs(30);
/// How long a peer may be silent after the end, neither sending nor closing.
pub(crate) const SILENCE: Duration = Duration::from_secs(2);
/// Bytes that a peer may send after the end.
pub(crate) const MAX_DISCARDED: usize = 64 << 20;
/// Reads before other connections have their turn.
const READS: usize = 32;

/// A connection that is being closed.
struct LingeringClose {
    io: Conn,
    last: WriteQueue,
    timer: Timer,
    /// The tick at which the connection is dropped.
    until: u32,
    sending: bool,
    discarded: usize,
    shut: bool,
}

/// Writes `last` and closes the connection. `sending`: the peer may be in the middle of a request. Otherwise the
/// connection is closed at once if nothing has arrived.
pub(crate) async fn close(io: Conn, last: Bytes, sending: bool, wheel: &Arc<TimerWheel>) {
    let mut queue = WriteQueue::new();
    queue.push(last);
    let timer = wheel.timer(SILENCE);
    let until = timer.now() + TimerWheel::ticks(LONGEST);
    let mut closing = LingeringClose { io, last: queue, timer, until, sending, discarded: 0, shut: false };
    std::future::poll_fn(|cx| closing.poll(cx)).await;
}

impl LingeringClose {
    fn poll(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        if !self.shut
            && let Poll::Ready(written) = self.last.poll_write(cx, &mut self.io)
        {
            if written.is_err() {
                return Poll::Ready(());
            }
            match Pin::new(&mut self.io).poll_shutdown(cx) {
                Poll::Ready(Ok(())) => self.shut = true,
                Poll::Ready(Err(_)) => return Poll::Ready(()),
                Poll::Pending => {}
            }
        }
        if self.poll_discard(cx).is_ready() || self.shut && !self.sending && self.discarded == 0 {
            return Poll::Ready(());
        }
        while let Poll::Ready(due) = self.timer.poll(cx) {
            // Nothing but the end is left: a drain and an administrator want the same.
            if due == Due::Time {
                return Poll::Ready(());
            }
        }
        Poll::Pending
    }

    /// Ready when the peer has closed, or has sent too much for too long.
    fn poll_discard(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        let mut scrap = [0; 8 * 1024];
        for _ in 0..READS {
            let mut buf = ReadBuf::new(&mut scrap);
            match Pin::new(&mut self.io).poll_read(cx, &mut buf) {
                Poll::Pending => return Poll::Pending,
                Poll::Ready(Ok(())) if !buf.filled().is_empty() => {
                    self.discarded += buf.filled().len();
                    let now = self.timer.now();
                    if self.discarded > MAX_DISCARDED || now >= self.until {
                        return Poll::Ready(());
                    }
                    self.timer.reset(SILENCE);
                }
                Poll::Ready(_) => return Poll::Ready(()),
            }
        }
        cx.waker().wake_by_ref();
        Poll::Pending
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_peer_that_still_sends_reads_the_last_bytes() {
        let wheel = TimerWheel::start();
        let (io, mut peer) = tokio::io::duplex(1_000);
        let closing = tokio::spawn({
            let wheel = wheel.clone();
            async move { close(Conn::Pipe(io), Bytes::from_static(b"the last"), true, &wheel).await }
        });
        peer.write_all(&[b'x'; 100_000]).await.unwrap();
        let mut got = String::new();
        peer.read_to_string(&mut got).await.unwrap();
        assert_eq!(got, "the last");
        drop(peer);
        closing.await.unwrap();
        assert!(wheel.is_empty());
    }

    #[tokio::test(start_paused = true)]
    async fn neither_silence_nor_bytes_keep_a_connection_open() {
        let wheel = TimerWheel::start();
        let (io, mut silent) = tokio::io::duplex(1_000);
        close(Conn::Pipe(io), Bytes::new(), true, &wheel).await;
        assert_eq!(silent.read(&mut [0]).await.unwrap(), 0);
        let (io, mut talking) = tokio::io::duplex(1 << 20);
        let talk = tokio::spawn(async move { while talking.write_all(&[0; 1 << 16]).await.is_ok() {} });
        close(Conn::Pipe(io), Bytes::new(), false, &wheel).await;
        talk.await.unwrap();
    }
}
