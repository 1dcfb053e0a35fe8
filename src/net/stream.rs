//! What carries a stream: the socket itself ([`HijackedStream`]), or a response in hyper ([`StreamBody`]).
//!
//! *What* is said, and when, is a [`StreamSource`]; native SSE and every adapter's streams are one each.

use std::{
    convert::Infallible,
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
        timer::{Timer, TimerWheel},
        write_queue::WriteQueue,
    },
};

/// Bytes of one write. More waits for the next turn, so that nobody waits for a reader that is far behind.
pub const TURN: usize = 64 * 1024;

/// A client has nothing to say on a stream. What comes anyway is read, to see it go, but not without end.
const MAX_JUNK: usize = 16 * 1024;

/// What one reader gets and in which order, whatever carries it. All methods are called by one task.
pub trait StreamSource: Send + Unpin + 'static {
    /// Pushes what it is time for: a heartbeat, the end.
    ///
    /// Called at every turn, also while the peer does not read (then `blocked` is true, and nothing but the end is to
    /// be pushed): the timer would otherwise never be asked again.
    fn poll_time(&mut self, cx: &mut Context<'_>, blocked: bool, out: &mut StreamOutput);

    /// Pushes what comes next, about as much as fits one write ([`TURN`]).
    fn poll(&mut self, cx: &mut Context<'_>, out: &mut StreamOutput) -> Progress;

    /// Why the connection will have been closed.
    fn connected(&mut self) -> &mut OpenConnection;

    /// The flow's place on the wheel.
    fn timer(&mut self) -> &mut Timer;

    /// How long the peer may take nothing of what waits for it.
    fn patience(&self) -> Duration;

    /// Whom it was that the flow was taken over for.
    fn met(&mut self, _: SocketAddr) {}
}

/// What [`StreamSource::poll`] found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Progress {
    /// There may be more at once: come back after the write.
    Full,
    /// The reader has everything, and its task will be woken.
    Idle,
    /// What was pushed is the last.
    Ended,
}

/// What waits to be written, in chunks or as bare text.
pub struct StreamOutput {
    egress: WriteQueue,
    framing: BodyFraming,
}

/// A flow that nobody carries yet, and its first chunks. Whoever is asked first takes it.
pub struct StreamResponse<F>(Arc<Mutex<Option<UnstartedStream<F>>>>);

type UnstartedStream<F> = (F, Vec<Bytes>);

impl<F: StreamSource> StreamResponse<F> {
    /// `first` are chunks.
    pub fn new(flow: F, first: Vec<Bytes>) -> Self {
        StreamResponse(Arc::new(Mutex::new(Some((flow, first)))))
    }

    fn take(&self) -> Option<UnstartedStream<F>> {
        self.0.lock().take()
    }

    fn share(&self) -> Self {
        StreamResponse(self.0.clone())
    }

    /// For connections that can be taken over.
    fn takeover(&self) -> Hijack {
        let offer = self.share();
        Hijack::new(move |taken| {
            if let Some((flow, first)) = offer.take() {
                tokio::spawn(HijackedStream::new(taken, flow, first));
            }
        })
    }

    /// Makes `response` the stream: on a socket of its own where the connection can be taken over, else as its body.
    pub fn respond(self, response: Response<()>) -> Response<AxumBody> {
        let (mut head, ()) = response.into_parts();
        head.extensions.insert(self.takeover());
        Response::from_parts(head, AxumBody::new(StreamBody { offer: Some(self), state: None }))
    }
}

/// A flow on a socket of its own. No buffer, no timer: some hundred bytes in all.
struct HijackedStream<F> {
    io: Conn,
    out: StreamOutput,
    flow: F,
    /// The tick since which the peer took nothing. 0: it takes.
    blocked: u32,
    junk: u16,
    /// The socket has our waker for when something can be read.
    listening: bool,
    closing: bool,
    _seat: ConnectionPermit,
}

impl<F: StreamSource> HijackedStream<F> {
    fn new(taken: HijackedConn, mut flow: F, first: Vec<Bytes>) -> Self {
        flow.met(taken.peer);
        HijackedStream {
            io: taken.io,
            out: StreamOutput::new(taken.framing, first),
            flow,
            blocked: 0,
            junk: 0,
            listening: false,
            closing: false,
            _seat: taken.seat,
        }
    }

    /// Ready when the peer is gone, or says too much.
    fn poll_gone(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        let mut scrap = [0; 256];
        if self.listening {
            let Some(read) = self.io.try_read(&mut scrap) else { return Poll::Pending };
            self.listening = false;
            if let Ok(n) = read
                && self.heard(n)
            {
                return Poll::Ready(());
            }
        }
        loop {
            let mut buf = ReadBuf::new(&mut scrap);
            match Pin::new(&mut self.io).poll_read(cx, &mut buf) {
                Poll::Pending => {
                    self.listening = true;
                    return Poll::Pending;
                }
                Poll::Ready(Ok(())) => {
                    if self.heard(buf.filled().len()) {
                        return Poll::Ready(());
                    }
                }
                Poll::Ready(Err(_)) => {
                    self.flow.connected().closed_by_peer();
                    return Poll::Ready(());
                }
            }
        }
    }

    /// Whether the connection is over after `n` bytes were read.
    fn heard(&mut self, n: usize) -> bool {
        let junk = usize::from(self.junk) + n;
        if n == 0 {
            self.flow.connected().closed_by_peer();
        } else if junk > MAX_JUNK {
            self.flow.connected().closed_with(Code::Protocol);
        } else {
            self.junk = junk as u16;
        }
        n == 0 || junk > MAX_JUNK
    }

    /// Ready when all is written; `None` when the connection is of no use any more.
    fn poll_write(&mut self, cx: &mut Context<'_>) -> Option<Poll<()>> {
        let before = self.out.len();
        match self.out.egress.poll_write(cx, &mut self.io) {
            Poll::Ready(Ok(())) => {
                self.blocked = 0;
                Some(Poll::Ready(()))
            }
            Poll::Ready(Err(_)) => {
                self.flow.connected().closed_by_peer();
                None
            }
            Poll::Pending => {
                let now = self.flow.timer().now();
                if self.blocked == 0 || self.out.len() < before {
                    self.blocked = now;
                }
                let left = self.flow.patience().saturating_sub(TimerWheel::span(self.blocked, now));
                if left.is_zero() {
                    self.flow.connected().closed_with(Code::Slow);
                    return None;
                }
                self.flow.timer().shorten(left);
                Some(Poll::Pending)
            }
        }
    }
}

impl<F: StreamSource> Future for HijackedStream<F> {
    type Output = ();

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        let this = self.get_mut();
        if this.poll_gone(cx).is_ready() {
            return Poll::Ready(());
        }
        if this.closing {
            return Pin::new(&mut this.io).poll_shutdown(cx).map(drop);
        }
        this.flow.poll_time(cx, !this.out.is_empty(), &mut this.out);
        // First what is left of the last turn: while that is stuck nothing more is asked for, and a subscription that
        // is not asked is not parked, so that nothing wakes a reader who cannot take it.
        match this.poll_write(cx) {
            None => return Poll::Ready(()),
            Some(Poll::Pending) => return Poll::Pending,
            Some(Poll::Ready(())) => {}
        }
        let turn = this.flow.poll(cx, &mut this.out);
        match this.poll_write(cx) {
            None => return Poll::Ready(()),
            Some(Poll::Pending) => return Poll::Pending,
            Some(Poll::Ready(())) => {}
        }
        match turn {
            Progress::Idle => Poll::Pending,
            Progress::Full => {
                cx.waker().wake_by_ref();
                Poll::Pending
            }
            Progress::Ended => {
                this.closing = true;
                Pin::new(&mut this.io).poll_shutdown(cx).map(drop)
            }
        }
    }
}

/// A flow as an ordinary body, for HTTP/2 and for whatever keeps a connection in hyper.
struct StreamBody<F> {
    offer: Option<StreamResponse<F>>,
    state: Option<Box<(F, StreamOutput)>>,
}

impl<F: StreamSource> Body for StreamBody<F> {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        let this = self.get_mut();
        if let Some(offer) = this.offer.take() {
            this.state =
                offer.take().map(|(flow, first)| Box::new((flow, StreamOutput::new(BodyFraming::UntilClose, first))));
        }
        let Some((flow, out)) = this.state.as_deref_mut() else { return Poll::Ready(None) };
        // Hyper asks only when it has room: a body is never blocked.
        flow.poll_time(cx, false, out);
        let turn = match out.is_empty() {
            true => flow.poll(cx, out),
            false => Progress::Idle,
        };
        match out.egress.pop() {
            Some(piece) => Poll::Ready(Some(Ok(Frame::data(piece)))),
            None if turn == Progress::Ended => {
                this.state = None;
                Poll::Ready(None)
            }
            // What was pushed was empty: nothing would ask again.
            None if turn == Progress::Full => {
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
        let mut out = StreamOutput { egress: WriteQueue::new(), framing };
        first.into_iter().for_each(|chunk| out.push(chunk));
        out
    }

    /// Bytes that wait.
    pub fn len(&self) -> usize {
        self.egress.len()
    }

    pub fn is_empty(&self) -> bool {
        self.egress.is_empty()
    }

    pub fn is_full(&self) -> bool {
        self.len() >= TURN
    }

    /// One whole [chunk].
    pub fn push(&mut self, chunk: Bytes) {
        self.egress.push(match self.framing {
            BodyFraming::Chunked => chunk,
            BodyFraming::UntilClose => chunk::text(&chunk),
        });
    }

    /// Whether what is pushed as it is has to be chunked.
    pub fn is_chunked(&self) -> bool {
        self.framing == BodyFraming::Chunked
    }

    /// A piece of what goes on the wire, framed by the caller.
    pub fn push_framed(&mut self, piece: Bytes) {
        self.egress.push(piece);
    }

    /// The end of the body. Nothing may be pushed after it.
    pub fn end(&mut self) {
        if self.is_chunked() {
            self.egress.push(Bytes::from_static(chunk::END));
        }
    }

    /// Gives back the room that a burst has left. Called now and then by a quiet stream.
    pub fn relax(&mut self) {
        self.egress.relax();
    }
}

/// The size of a task that carries `F`: with what tokio adds it should be at most the 512 bytes that its allocation takes
/// anyway.
#[cfg(test)]
pub const fn size<F>() -> usize {
    size_of::<HijackedStream<F>>()
}
