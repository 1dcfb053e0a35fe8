//! What carries a [`Stream`]: the socket itself ([`Session`]), or a response in hyper ([`StreamBody`]).

use std::{
    convert::Infallible,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
};

use bytes::Bytes;
use http_body::{Body, Frame};
use parking_lot::Mutex;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use super::stream::{Chunks, Stream, Turn};
use crate::{
    error::Code,
    transport::{
        takeover::{Framing, Io, Seat, Taken, Takeover},
        wheel::Wheel,
    },
};

/// A client has nothing to say on a stream. What comes anyway is read, to see it go, but not without end.
const MAX_JUNK: usize = 16 * 1024;

/// A stream that nobody carries yet, and its first blocks. Whoever is asked first takes it.
#[derive(Clone)]
pub(super) struct Offer(Arc<Mutex<Option<Begun>>>);

type Begun = (Stream, Vec<Bytes>);

impl Offer {
    pub fn new(stream: Stream, first: Vec<Bytes>) -> Self {
        Offer(Arc::new(Mutex::new(Some((stream, first)))))
    }

    fn take(&self) -> Option<Begun> {
        self.0.lock().take()
    }

    /// For connections that can be taken over.
    pub fn takeover(&self) -> Takeover {
        let offer = self.clone();
        Takeover::new(move |taken| {
            if let Some((stream, first)) = offer.take() {
                tokio::spawn(Session::new(taken, stream, first));
            }
        })
    }

    /// For all others: the same stream, lazily.
    pub fn body(self) -> StreamBody {
        StreamBody { offer: Some(self), state: None }
    }
}

/// A stream on a socket of its own. No buffer, no timer: some hundred bytes in all.
struct Session {
    io: Io,
    out: Chunks,
    stream: Stream,
    /// The tick since which the peer took nothing. 0: it takes.
    blocked: u32,
    junk: u16,
    /// The socket has our waker for when something can be read.
    listening: bool,
    closing: bool,
    _seat: Seat,
}

impl Session {
    fn new(taken: Taken, stream: Stream, first: Vec<Bytes>) -> Self {
        Session {
            io: taken.io,
            out: Chunks::new(taken.framing, first),
            stream,
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
                    self.stream.connected().peer();
                    return Poll::Ready(());
                }
            }
        }
    }

    /// Whether the connection is over after `n` bytes were read.
    fn heard(&mut self, n: usize) -> bool {
        let junk = usize::from(self.junk) + n;
        if n == 0 {
            self.stream.connected().peer();
        } else if junk > MAX_JUNK {
            self.stream.connected().because(Code::Protocol);
        } else {
            self.junk = junk as u16;
        }
        n == 0 || junk > MAX_JUNK
    }

    /// Ready when all is written; `None` when the connection is of no use any more.
    fn poll_write(&mut self, cx: &mut Context<'_>) -> Option<Poll<()>> {
        let before = self.out.egress.len();
        match self.out.egress.poll_write(cx, &mut self.io) {
            Poll::Ready(Ok(())) => {
                self.blocked = 0;
                Some(Poll::Ready(()))
            }
            Poll::Ready(Err(_)) => {
                self.stream.connected().peer();
                None
            }
            Poll::Pending => {
                let now = self.stream.now();
                if self.blocked == 0 || self.out.egress.len() < before {
                    self.blocked = now;
                }
                let left = self.stream.patience().saturating_sub(Wheel::span(self.blocked, now));
                if left.is_zero() {
                    self.stream.connected().because(Code::Slow);
                    return None;
                }
                self.stream.look_within(left);
                Some(Poll::Pending)
            }
        }
    }
}

impl Future for Session {
    type Output = ();

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        let this = self.get_mut();
        if this.poll_gone(cx).is_ready() {
            return Poll::Ready(());
        }
        if this.closing {
            return Pin::new(&mut this.io).poll_shutdown(cx).map(drop);
        }
        this.stream.poll_time(cx, !this.out.egress.is_empty(), &mut this.out);
        // First what is left of the last turn: while that is stuck nothing more is asked for, and a subscription that
        // is not asked is not parked, so that nothing wakes a reader who cannot take it.
        match this.poll_write(cx) {
            None => return Poll::Ready(()),
            Some(Poll::Pending) => return Poll::Pending,
            Some(Poll::Ready(())) => {}
        }
        let turn = this.stream.poll(cx, &mut this.out);
        match this.poll_write(cx) {
            None => return Poll::Ready(()),
            Some(Poll::Pending) => return Poll::Pending,
            Some(Poll::Ready(())) => {}
        }
        match turn {
            Turn::Idle => Poll::Pending,
            Turn::Full => {
                cx.waker().wake_by_ref();
                Poll::Pending
            }
            Turn::Ended => {
                this.closing = true;
                Pin::new(&mut this.io).poll_shutdown(cx).map(drop)
            }
        }
    }
}

/// A stream as an ordinary body, for HTTP/2 and for whatever keeps a connection in hyper.
pub(super) struct StreamBody {
    offer: Option<Offer>,
    state: Option<Box<(Stream, Chunks)>>,
}

impl Body for StreamBody {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        let this = self.get_mut();
        if let Some(offer) = this.offer.take() {
            this.state =
                offer.take().map(|(stream, first)| Box::new((stream, Chunks::new(Framing::UntilClose, first))));
        }
        let Some((stream, out)) = this.state.as_deref_mut() else { return Poll::Ready(None) };
        // Hyper asks only when it has room: a body is never blocked.
        stream.poll_time(cx, false, out);
        let turn = match out.egress.is_empty() {
            true => stream.poll(cx, out),
            false => Turn::Idle,
        };
        match out.egress.pop() {
            Some(piece) => Poll::Ready(Some(Ok(Frame::data(piece)))),
            None if matches!(turn, Turn::Ended) => {
                this.state = None;
                Poll::Ready(None)
            }
            None => Poll::Pending,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_idle_stream_is_small() {
        // With what tokio adds, a task is at most the 512 bytes that its allocation takes anyway.
        assert!(size_of::<Session>() <= 344, "{}", size_of::<Session>());
    }
}
