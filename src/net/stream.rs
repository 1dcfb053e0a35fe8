//! Writing a stream to a client: on its hijacked connection ([`HijackedStream`]) or as a response body inside hyper
//! (`StreamBody`).
//!
//! A [`StreamSource`] decides which bytes are sent and when. This module writes them, detects peers that read too
//! slowly or are gone, and ends the stream.

use std::{
    convert::Infallible,
    future::poll_fn,
    net::SocketAddr,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};

use axum::body::Body as AxumBody;
use bytes::Bytes;
use http::Response;
use http_body::{Body, Frame};
use parking_lot::Mutex;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use crate::{
    error::Code,
    metrics::OpenConnection,
    net::{
        chunk,
        hijack::{BodyFraming, Conn, ConnectionPermit, Hijack, HijackedConn},
        linger,
        timer::{Due, Timer, TimerWheel},
        write_queue::WriteQueue,
    },
};

/// Bytes that one poll gathers for one write. The rest waits for the next poll, so that one slow reader does not delay
/// others.
const WRITE_BUDGET: usize = 64 * 1024;

/// Bytes that a client may send on a stream, where none are expected. They are read only to detect that it closes.
const MAX_UNEXPECTED: usize = 16 * 1024;

/// The content of one stream, independent of what carries it. All methods are called by one task.
pub(crate) trait StreamSource: Send + Unpin + 'static {
    /// Polls the timer and pushes what is due: a heartbeat or the end of the stream.
    ///
    /// Called on every poll, also while the peer does not read: the timer would otherwise never be polled again. Then
    /// `blocked` is true, and only the end of the stream may be pushed.
    fn poll_timer(&mut self, cx: &mut Context<'_>, blocked: bool, out: &mut StreamOutput);

    /// Pushes about as much as one write takes; see [`StreamOutput::is_full`].
    fn poll(&mut self, cx: &mut Context<'_>, out: &mut StreamOutput) -> Progress;

    /// The metrics guard of the connection, which takes the reason why it ends.
    fn connected(&mut self) -> &mut OpenConnection;

    fn timer(&mut self) -> &mut Timer;

    /// How long the peer may read nothing of what waits for it.
    fn stall_timeout(&self) -> Duration;

    /// Called with the peer's address once the connection is hijacked.
    fn set_peer(&mut self, _: SocketAddr) {}
}

/// The result of [`StreamSource::poll`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Progress {
    /// There may be more at once: poll again after the write.
    Full,
    /// Everything is pushed, and the task will be woken when there is more.
    Idle,
    /// The stream ends after what was pushed.
    Ended,
}

/// Bytes that wait to be written to one stream, as chunks or as bare text.
pub(crate) struct StreamOutput {
    queue: WriteQueue,
    framing: BodyFraming,
}

/// A stream that has not started, shared between the response's body and its [`Hijack`]: the first of the two to be
/// used takes it.
pub(crate) struct StreamResponse<S>(Arc<Mutex<Option<UnstartedStream<S>>>>);

type UnstartedStream<S> = (S, Vec<Bytes>);

impl<S: StreamSource> StreamResponse<S> {
    /// `first` are chunks to be sent before anything that the source pushes.
    pub(crate) fn new(source: S, first: Vec<Bytes>) -> Self {
        StreamResponse(Arc::new(Mutex::new(Some((source, first)))))
    }

    fn take(&self) -> Option<UnstartedStream<S>> {
        self.0.lock().take()
    }

    /// Starts the stream as a task on its hijacked connection. The only place where a stream gets a task of its own.
    fn hijack(&self) -> Hijack {
        let unstarted = StreamResponse(self.0.clone());
        Hijack::new(move |conn| {
            if let Some((source, first)) = unstarted.take() {
                let mut stream = HijackedStream::new(conn, source, first);
                tokio::spawn(poll_fn(move |cx| stream.poll(cx)));
            }
        })
    }

    /// Completes `response`: the stream runs on the hijacked connection where that is possible, else as the body.
    pub(crate) fn respond(self, response: Response<()>) -> Response<AxumBody> {
        let (mut head, ()) = response.into_parts();
        head.extensions.insert(self.hijack());
        Response::from_parts(head, AxumBody::new(StreamBody { unstarted: Some(self), started: None }))
    }
}

/// A stream on its own connection: a plain value of a few hundred bytes without buffer or timer, which its owner polls
/// with [`poll`](Self::poll).
pub(crate) struct HijackedStream<S> {
    io: Conn,
    out: StreamOutput,
    source: S,
    /// The tick since which the peer has read nothing; 0 if it reads.
    blocked: u32,
    /// Bytes that the peer has sent.
    unexpected: u16,
    /// The socket holds our waker for when it becomes readable.
    read_armed: bool,
    closing: bool,
    _permit: ConnectionPermit,
}

impl<S: StreamSource> HijackedStream<S> {
    fn new(conn: HijackedConn, mut source: S, first: Vec<Bytes>) -> Self {
        source.set_peer(conn.peer);
        HijackedStream {
            io: conn.io,
            out: StreamOutput::new(conn.framing, first),
            source,
            blocked: 0,
            unexpected: 0,
            read_armed: false,
            closing: false,
            _permit: conn.permit,
        }
    }

    /// Reads, pushes and writes as far as possible. Ready when the connection is over.
    pub(crate) fn poll(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        if self.poll_peer_gone(cx).is_ready() {
            return Poll::Ready(());
        }
        if self.closing {
            return self.poll_close(cx);
        }
        self.source.poll_timer(cx, !self.out.is_empty(), &mut self.out);
        // First the rest of the last poll. While it is stuck, the source is not polled: an unpolled subscription leaves
        // no waker, so that nothing wakes a stream whose peer cannot take more.
        match self.poll_write(cx) {
            None => return Poll::Ready(()),
            Some(Poll::Pending) => return Poll::Pending,
            Some(Poll::Ready(())) => {}
        }
        let progress = self.source.poll(cx, &mut self.out);
        match self.poll_write(cx) {
            None => return Poll::Ready(()),
            Some(Poll::Pending) => return Poll::Pending,
            Some(Poll::Ready(())) => {}
        }
        match progress {
            Progress::Idle => Poll::Pending,
            Progress::Full => {
                cx.waker().wake_by_ref();
                Poll::Pending
            }
            Progress::Ended => {
                self.closing = true;
                self.source.timer().reset(linger::SILENCE);
                self.poll_close(cx)
            }
        }
    }

    /// Ends this side of the connection, and waits for a peer that sends something to end its own: see [`linger`].
    fn poll_close(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        match Pin::new(&mut self.io).poll_shutdown(cx) {
            Poll::Ready(Ok(())) if self.unexpected > 0 => {}
            Poll::Ready(_) => return Poll::Ready(()),
            Poll::Pending => return Poll::Pending,
        }
        while let Poll::Ready(due) = self.source.timer().poll(cx) {
            if due == Due::Time {
                return Poll::Ready(());
            }
        }
        Poll::Pending
    }

    /// Ready when the peer has closed or sends too much.
    fn poll_peer_gone(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        let mut scrap = [0; 256];
        if self.read_armed {
            let Some(read) = self.io.try_read(&mut scrap) else { return Poll::Pending };
            self.read_armed = false;
            if let Ok(n) = read
                && self.ends_after_read(n)
            {
                return Poll::Ready(());
            }
        }
        loop {
            let mut buf = ReadBuf::new(&mut scrap);
            match Pin::new(&mut self.io).poll_read(cx, &mut buf) {
                Poll::Pending => {
                    self.read_armed = true;
                    return Poll::Pending;
                }
                Poll::Ready(Ok(())) => {
                    if self.ends_after_read(buf.filled().len()) {
                        return Poll::Ready(());
                    }
                }
                Poll::Ready(Err(_)) => {
                    self.peer_closed();
                    return Poll::Ready(());
                }
            }
        }
    }

    /// Counts `n` bytes that were read. True if the connection is over: the peer has closed or sends too much.
    fn ends_after_read(&mut self, n: usize) -> bool {
        let unexpected = usize::from(self.unexpected) + n;
        if n == 0 {
            self.peer_closed();
        } else if unexpected > MAX_UNEXPECTED {
            // After the end of the stream it is not the reason.
            if !self.closing {
                self.source.connected().closed_with(Code::Protocol);
            }
        } else {
            self.unexpected = unexpected as u16;
        }
        n == 0 || unexpected > MAX_UNEXPECTED
    }

    fn peer_closed(&mut self) {
        // After the end of the stream it is expected, and not the reason.
        if !self.closing {
            self.source.connected().closed_by_peer();
        }
    }

    /// Ready when all is written; `None` if the connection has failed or the peer has stalled for too long.
    fn poll_write(&mut self, cx: &mut Context<'_>) -> Option<Poll<()>> {
        let before = self.out.len();
        match self.out.queue.poll_write(cx, &mut self.io) {
            Poll::Ready(Ok(())) => {
                self.blocked = 0;
                Some(Poll::Ready(()))
            }
            Poll::Ready(Err(_)) => {
                self.source.connected().closed_by_peer();
                None
            }
            Poll::Pending => {
                let now = self.source.timer().now();
                if self.blocked == 0 || self.out.len() < before {
                    self.blocked = now;
                }
                let left = self.source.stall_timeout().saturating_sub(TimerWheel::span(self.blocked, now));
                if left.is_zero() {
                    self.source.connected().closed_with(Code::Slow);
                    return None;
                }
                self.source.timer().shorten(left);
                Some(Poll::Pending)
            }
        }
    }
}

/// A stream as an ordinary body: for HTTP/2, and for connections that cannot be hijacked.
struct StreamBody<S> {
    unstarted: Option<StreamResponse<S>>,
    started: Option<Box<(S, StreamOutput)>>,
}

impl<S: StreamSource> Body for StreamBody<S> {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        let this = self.get_mut();
        if let Some(unstarted) = this.unstarted.take() {
            this.started = unstarted
                .take()
                .map(|(source, first)| Box::new((source, StreamOutput::new(BodyFraming::UntilClose, first))));
        }
        let Some((source, out)) = this.started.as_deref_mut() else { return Poll::Ready(None) };
        // Hyper polls only when it has room: a body is never blocked.
        source.poll_timer(cx, false, out);
        let progress = match out.is_empty() {
            true => source.poll(cx, out),
            false => Progress::Idle,
        };
        match out.queue.pop() {
            Some(piece) => Poll::Ready(Some(Ok(Frame::data(piece)))),
            None if progress == Progress::Ended => {
                this.started = None;
                Poll::Ready(None)
            }
            // Only empty chunks were pushed: hyper would not poll again.
            None if progress == Progress::Full => {
                cx.waker().wake_by_ref();
                Poll::Pending
            }
            None => Poll::Pending,
        }
    }
}

// === impl StreamOutput ===

impl StreamOutput {
    /// `first` are chunks, whatever the framing.
    fn new(framing: BodyFraming, first: Vec<Bytes>) -> Self {
        let mut out = StreamOutput { queue: WriteQueue::new(), framing };
        first.into_iter().for_each(|chunk| out.push(chunk));
        out
    }

    /// Bytes that wait.
    pub(crate) fn len(&self) -> usize {
        self.queue.len()
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.queue.is_empty()
    }

    /// Whether enough waits for one write.
    pub(crate) fn is_full(&self) -> bool {
        self.len() >= WRITE_BUDGET
    }

    /// Appends one whole [chunk].
    pub(crate) fn push(&mut self, chunk: Bytes) {
        self.queue.push(match self.framing {
            BodyFraming::Chunked => chunk,
            BodyFraming::UntilClose => chunk::text(&chunk),
        });
    }

    /// Takes back the chunk that was pushed last in the same poll: as a whole chunk if
    /// [`is_chunked`](Self::is_chunked), else its text.
    pub(crate) fn take_back(&mut self) -> Option<Bytes> {
        self.queue.pop_back()
    }

    /// Whether pieces for [`push_framed`](Self::push_framed) must be chunked.
    pub(crate) fn is_chunked(&self) -> bool {
        self.framing == BodyFraming::Chunked
    }

    /// Appends bytes that are written as they are: the caller has framed them.
    pub(crate) fn push_framed(&mut self, piece: Bytes) {
        self.queue.push(piece);
    }

    /// Appends the end of the body. Nothing may be pushed after it.
    pub(crate) fn finish(&mut self) {
        if self.is_chunked() {
            self.queue.push(Bytes::from_static(chunk::END));
        }
    }

    /// Frees the capacity that a burst has left behind.
    pub(crate) fn shrink(&mut self) {
        self.queue.shrink();
    }
}

/// The size of a task that carries `S`: with what tokio adds it should be at most the 512 bytes that its allocation
/// takes anyway.
#[cfg(test)]
pub(crate) const fn task_size<S>() -> usize {
    size_of::<HijackedStream<S>>()
}
