//! [`Hijack`]: a response that, once its head is written, takes the connection away from the HTTP server.
//!
//! A stream needs a small fraction of the memory outside hyper (0.6 KB instead of 11 KB), and WebSockets have to leave
//! anyway. The handler puts a `Hijack` into the extensions of its response; `http::connection` honours it where it
//! can (HTTP/1, not HEAD, body not encoded), and else sends the response as it is. So a response with status 200
//! carries a body that does the same work, slower; a 101 has none.

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

/// What a connection is carried by.
pub enum Conn {
    Tcp(TcpStream),
    /// In memory, for tests of what a socket does too rarely.
    Pipe(DuplexStream),
}

/// How the length of the body that follows was announced in the head.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BodyFraming {
    /// HTTP/1.1: chunks, and `0\r\n\r\n` at the end.
    Chunked,
    /// HTTP/1.0: until the connection closes.
    UntilClose,
}

/// A connection that left the HTTP server.
pub struct HijackedConn {
    pub io: Conn,
    pub peer: SocketAddr,
    /// What was read behind the request. Belongs to the WebSocket; of no meaning for a stream.
    pub early: Bytes,
    pub framing: BodyFraming,
    /// To be held as long as the connection is open.
    pub permit: ConnectionPermit,
}

/// Counts one open connection while it lives; a graceful shutdown waits for all of them.
pub struct ConnectionPermit(#[expect(dead_code, reason = "held for its drop")] TaskTrackerToken);

type Take = Box<dyn FnOnce(HijackedConn) + Send>;

/// A response extension. The closure gets the connection, and is expected to spawn a task for it and to return.
/// It is dropped uncalled if the connection ends before, or cannot be taken: what it captured must clean up after
/// itself.
#[derive(Clone)]
pub struct Hijack(Arc<Mutex<Option<Take>>>);

impl Hijack {
    pub fn new(take: impl FnOnce(HijackedConn) + Send + 'static) -> Self {
        // Extensions must be cloneable and shareable; a closure that runs once is neither.
        Hijack(Arc::new(Mutex::new(Some(Box::new(take)))))
    }

    /// The closure, once.
    pub fn claim(&self) -> Option<impl FnOnce(HijackedConn) + Send + 'static> {
        self.0.lock().take()
    }
}

impl ConnectionPermit {
    pub fn new(token: TaskTrackerToken) -> Self {
        ConnectionPermit(token)
    }
}

// === impl Conn ===

impl Conn {
    /// What can be read at once: `None` if that is nothing, `Some(Ok(0))` if the peer has closed.
    ///
    /// Costs one load of an atomic while the socket is not readable, where `poll_read` takes a lock to leave its waker
    /// once more. So it is for a task whose waker is there already: after `Some` it has to `poll_read` until that is
    /// pending.
    pub fn try_read(&self, buf: &mut [u8]) -> Option<io::Result<usize>> {
        let Conn::Tcp(socket) = self else { return Some(Err(io::ErrorKind::WouldBlock.into())) };
        let mut tried = false;
        let read = socket.try_io(Interest::READABLE, || {
            tried = true;
            socket.try_read(buf)
        });
        tried.then_some(read)
    }
}

impl Conn {
    /// Whether `poll_read` is worth its while, for a task that has left its waker there already: one load of an atomic,
    /// where `poll_read` takes a lock.
    pub fn is_readable(&self) -> bool {
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
