//! [`Hijack`]: a response that, once its head is written, takes the connection away from the HTTP server.
//!
//! Outside hyper a stream needs a small fraction of the memory (0.6 KB instead of 11 KB), and WebSockets have to leave
//! it anyway. The handler puts a `Hijack` into the extensions of its response. [`server`](crate::net::server) applies
//! it where possible (HTTP/1, not HEAD, body not encoded), and else sends the response as it is. So a response with
//! status 200 has a body that does the same work, at a higher cost; a 101 has none.

use std::{
    io,
    net::SocketAddr,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
};

use bytes::Bytes;
use parking_lot::Mutex;
use tokio::{
    io::{AsyncRead, AsyncWrite, DuplexStream, Interest, ReadBuf},
    net::TcpStream,
};
use tokio_util::task::task_tracker::TaskTrackerToken;

/// The transport of a connection.
pub enum Conn {
    Tcp(TcpStream),
    /// In memory: for tests of conditions that are rare on a socket.
    Pipe(DuplexStream),
}

/// How the head announced the length of the body.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum BodyFraming {
    /// HTTP/1.1: chunks, and `0\r\n\r\n` at the end.
    Chunked,
    /// HTTP/1.0: until the connection closes.
    UntilClose,
}

/// A connection that left the HTTP server.
pub(crate) struct HijackedConn {
    pub(crate) io: Conn,
    pub(crate) peer: SocketAddr,
    /// Bytes that were read behind the request: the first of a WebSocket, meaningless for a stream.
    pub(crate) early: Bytes,
    pub(crate) framing: BodyFraming,
    /// Held as long as the connection is open.
    pub(crate) permit: ConnectionPermit,
}

/// Counts one open connection until it is dropped. A graceful shutdown waits for all of them.
pub(crate) struct ConnectionPermit(#[expect(dead_code, reason = "held for its drop")] TaskTrackerToken);

type Take = Box<dyn FnOnce(HijackedConn) + Send>;

/// A response extension. The closure gets the connection and should spawn a task for it. It is dropped without being
/// called if the connection ends earlier or cannot be hijacked: what it captures must clean up on drop.
#[derive(Clone)]
pub(crate) struct Hijack(Arc<Mutex<Option<Take>>>);

impl Hijack {
    pub(crate) fn new(take: impl FnOnce(HijackedConn) + Send + 'static) -> Self {
        // Extensions must be `Clone` and `Sync`; an `FnOnce` is neither.
        Hijack(Arc::new(Mutex::new(Some(Box::new(take)))))
    }

    /// Takes the closure; `None` if it was taken before.
    pub(crate) fn claim(&self) -> Option<impl FnOnce(HijackedConn) + Send + 'static> {
        self.0.lock().take()
    }
}

impl ConnectionPermit {
    pub(crate) fn new(token: TaskTrackerToken) -> Self {
        ConnectionPermit(token)
    }
}

// === impl Conn ===

impl Conn {
    /// Reads what is available: `None` if nothing is, `Some(Ok(0))` if the peer has closed.
    ///
    /// For a task that has left its waker with `poll_read` already: while the socket is not readable, this costs one
    /// atomic load, where `poll_read` takes a lock. After `Some` the task must `poll_read` until that is pending.
    pub(crate) fn try_read(&self, buf: &mut [u8]) -> Option<io::Result<usize>> {
        let Conn::Tcp(socket) = self else { return Some(Err(io::ErrorKind::WouldBlock.into())) };
        let mut tried = false;
        let read = socket.try_io(Interest::READABLE, || {
            tried = true;
            socket.try_read(buf)
        });
        tried.then_some(read)
    }

    /// Whether `poll_read` may return something, for a task that has left its waker with it already: costs one atomic
    /// load, where `poll_read` takes a lock.
    pub(crate) fn is_readable(&self) -> bool {
        match self {
            Conn::Tcp(socket) => socket.try_io(Interest::READABLE, || Ok(())).is_ok(),
            Conn::Pipe(_) => true,
        }
    }
}

impl AsyncRead for Conn {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Conn::Tcp(io) => Pin::new(io).poll_read(cx, buf),
            Conn::Pipe(io) => Pin::new(io).poll_read(cx, buf),
        }
    }
}

impl AsyncWrite for Conn {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        match self.get_mut() {
            Conn::Tcp(io) => Pin::new(io).poll_write(cx, bytes),
            Conn::Pipe(io) => Pin::new(io).poll_write(cx, bytes),
        }
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        slices: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        match self.get_mut() {
            Conn::Tcp(io) => Pin::new(io).poll_write_vectored(cx, slices),
            Conn::Pipe(io) => Pin::new(io).poll_write_vectored(cx, slices),
        }
    }

    fn is_write_vectored(&self) -> bool {
        match self {
            Conn::Tcp(io) => io.is_write_vectored(),
            Conn::Pipe(io) => io.is_write_vectored(),
        }
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Conn::Tcp(io) => Pin::new(io).poll_flush(cx),
            Conn::Pipe(io) => Pin::new(io).poll_flush(cx),
        }
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Conn::Tcp(io) => Pin::new(io).poll_shutdown(cx),
            Conn::Pipe(io) => Pin::new(io).poll_shutdown(cx),
        }
    }
}
