//! Serves accepted connections: HTTP/1 or HTTP/2 by the first bytes, in hyper, until a response
//! [takes its connection over](crate::net::hijack).
//!
//! Hyper reads the request and writes the head of the response. The connection leaves at the first flush after the
//! body was asked for: then the head is surely whole on its way, for `into_parts()` silently drops what is unwritten.
//! (Therefore `pipeline_flush` must never be switched on: it reports a flush that did not happen.)

use std::{
    convert::Infallible,
    io,
    net::SocketAddr,
    pin::{Pin, pin},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU8, AtomicU32, Ordering::Relaxed},
    },
    task::{Context, Poll, ready},
    time::Duration,
};

use axum::body::Body as AxumBody;
use bytes::Bytes;
use http::{HeaderValue, Method, Request, Response, StatusCode, Version, header, request::Parts};
use http_body::{Body, Frame, SizeHint};
use hyper::{
    body::Incoming,
    server::conn::{http1, http2},
    service::service_fn,
};
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use parking_lot::Mutex;
use socket2::TcpKeepalive;
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::TcpListener,
};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use crate::{
    error::{Code, Error},
    metrics::{Metrics, OpenConnection, Transport},
    net::{
        hijack::{BodyFraming, Conn, ConnectionPermit, Hijack, HijackedConn},
        timer::{Due, Timer, TimerWheel},
    },
};

const PREFACE: &[u8; 24] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
/// How often a connection inside hyper is looked at, at least.
const LOOK: Duration = Duration::from_secs(5);

/// How often a peer is asked whether it is there, where nothing else would tell.
const PROBE: Duration = Duration::from_secs(30);

/// What a connection may take and how long.
#[derive(Clone, Debug)]
pub struct Limits {
    /// Open connections. A few more are answered with `overloaded`; beyond those, connections are closed unread.
    pub connections: usize,
    /// From the first byte of a request to the end of its head.
    pub header_timeout: Duration,
    /// How long a connection is kept open between two requests, or before the first.
    pub idle_timeout: Duration,
    /// How long a peer may read nothing of what waits for it.
    pub stall_timeout: Duration,
    /// Bytes of a request's head.
    pub header_bytes: usize,
    /// Requests at once on one HTTP/2 connection.
    pub h2_streams: u32,
}

/// Answers the requests of the connections that one listener accepts.
pub trait HttpService: Send + Sync + 'static {
    fn respond(self: Arc<Self>, request: Request<Incoming>) -> impl Future<Output = Response<AxumBody>> + Send;

    fn options(&self) -> ListenerOptions;

    /// Whether a request to `path` is answered although [`Limits::connections`] is reached.
    fn is_probe(&self, path: &str) -> bool;
}

/// How the connections of one listener differ from those of others.
#[derive(Clone, Copy, Debug, Default)]
pub struct ListenerOptions {
    /// Accept connections beyond [`Limits::connections`], so that an administrator reaches a node that is full.
    pub exempt_from_limit: bool,
    /// Detect a vanished peer by TCP keepalive, for responses that may stay silent for ever.
    pub tcp_keepalive: bool,
}

/// The address of the peer, in the extensions of every `GET` request and of every request to a listener with
/// [`ListenerOptions::tcp_keepalive`].
#[derive(Clone, Copy, Debug)]
pub struct PeerAddr(pub SocketAddr);

/// Why a request must be rejected, in its extensions: set by the server beyond [`Limits::connections`], and by an HTTP
/// endpoint for the one route that reports rejections in its own way.
#[derive(Clone, Debug)]
pub struct Rejected(pub Error);

/// The open connections of one App. Cheap to clone.
#[derive(Clone)]
pub struct Connections(Arc<Inner>);

struct Inner {
    limits: Limits,
    look: Duration,
    wheel: Arc<TimerWheel>,
    metrics: Arc<Metrics>,
    tracker: TaskTracker,
    /// It has been said that no more are admitted, and is still so.
    full: AtomicBool,
    h1: http1::Builder,
    h2: http2::Builder<TokioExecutor>,
}

impl Default for Limits {
    fn default() -> Self {
        Limits {
            connections: 100_000,
            header_timeout: Duration::from_secs(10),
            idle_timeout: Duration::from_secs(75),
            stall_timeout: Duration::from_secs(30),
            header_bytes: 16 * 1024,
            h2_streams: 200,
        }
    }
}

// === impl Connections ===

impl Connections {
    pub fn new(limits: Limits, wheel: Arc<TimerWheel>, metrics: Arc<Metrics>) -> Self {
        let mut h1 = http1::Builder::new();
        // Hyper's own timer would be a Sleep per connection, and would also end idle keep-alive connections; the
        // wheel does both. A buffer of less than 8 KiB makes hyper panic.
        h1.header_read_timeout(None)
            .max_header_size(limits.header_bytes)
            .max_buf_size(limits.header_bytes.max(64 * 1024))
            .half_close(false)
            .writev(false);
        let mut h2 = http2::Builder::new(TokioExecutor::new());
        h2.timer(TokioTimer::new())
            .keep_alive_interval(Duration::from_secs(25))
            .keep_alive_timeout(Duration::from_secs(20))
            .max_concurrent_streams(limits.h2_streams)
            .max_header_list_size(u32::try_from(limits.header_bytes).unwrap_or(u32::MAX))
            .initial_stream_window_size(64 * 1024)
            .initial_connection_window_size(1024 * 1024)
            .max_send_buf_size(64 * 1024);
        let look = LOOK.min(limits.header_timeout / 2).min(limits.idle_timeout / 2).min(limits.stall_timeout / 2);
        Connections(Arc::new(Inner {
            limits,
            look,
            wheel,
            metrics,
            tracker: TaskTracker::new(),
            full: AtomicBool::new(false),
            h1,
            h2,
        }))
    }

    /// Accepts clients of `endpoint` until `stop`, and closes the listener. Open connections go on: see [`TimerWheel::drain`] and
    /// [`closed`](Self::closed).
    pub async fn accept<S: HttpService>(&self, listener: TcpListener, endpoint: Arc<S>, stop: CancellationToken) {
        let mut stopped = pin!(stop.cancelled());
        loop {
            let accepted = tokio::select! {
                biased;
                () = &mut stopped => return,
                accepted = listener.accept() => accepted,
            };
            match accepted {
                Ok((socket, peer)) => {
                    // Refused only for sockets that are gone already.
                    let _ = socket.set_nodelay(true);
                    // Idle streams would notice a vanished peer only after a quarter of an hour of retransmissions.
                    let _ = socket2::SockRef::from(&socket).set_tcp_user_timeout(Some(self.0.limits.stall_timeout * 2));
                    if endpoint.options().tcp_keepalive {
                        // What is held for an origin may be silent for ever: who is there is asked of the system.
                        let asking = TcpKeepalive::new().with_time(PROBE).with_interval(PROBE);
                        let _ = socket2::SockRef::from(&socket).set_tcp_keepalive(&asking);
                    }
                    self.serve(Conn::Tcp(socket), peer, &endpoint);
                }
                // The connection died in the queue: the next one may be well.
                Err(error)
                    if matches!(
                        error.kind(),
                        io::ErrorKind::ConnectionAborted | io::ErrorKind::ConnectionReset | io::ErrorKind::Interrupted
                    ) => {}
                Err(error) => {
                    // Out of descriptors or memory, as a rule: going on at once would only burn the processor.
                    tracing::error!(%error, open = self.len(), "cannot accept connections");
                    tokio::time::sleep(Duration::from_millis(200)).await;
                }
            }
        }
    }

    /// Serves one connection in a task of its own.
    pub fn serve<S: HttpService>(&self, io: Conn, peer: SocketAddr, endpoint: &Arc<S>) {
        let inner = self.0.clone();
        let permit = ConnectionPermit::new(inner.tracker.token());
        let (open, cap) = (self.len(), inner.limits.connections);
        // Whoever looks after the node gets in when it is full, or it would be taken for dead.
        let full = open > cap && !endpoint.options().exempt_from_limit;
        if full {
            inner.metrics.connections_refused.add(1);
            if !inner.full.swap(true, Relaxed) {
                tracing::warn!(open, "refusing connections: limits.connections is reached");
            }
            // Some are told why; a flood of them is not worth a task each.
            if open > cap + cap / 16 + 16 {
                tracing::debug!(%peer, open, "closed a connection beyond the cap");
                return;
            }
        } else if open < cap - cap / 16 {
            inner.full.store(false, Relaxed);
        }
        let connected = inner.metrics.connected(Transport::Http);
        let client = Client { inner, endpoint: endpoint.clone(), peer, refuse: full };
        tokio::spawn(drive(client, io, permit, connected));
    }

    /// Open connections, in hyper or taken over.
    pub fn len(&self) -> usize {
        self.0.tracker.len()
    }

    pub fn is_empty(&self) -> bool {
        self.0.tracker.is_empty()
    }

    /// Waits until the last connection is closed. To be called when nothing is accepted any more.
    pub async fn closed(&self) {
        self.0.tracker.close();
        self.0.tracker.wait().await;
    }
}

impl PeerAddr {
    /// The address of the peer that sent a request, where the server recorded it.
    pub fn of(head: &Parts) -> Option<SocketAddr> {
        head.extensions.get::<PeerAddr>().map(|PeerAddr(address)| *address)
    }
}

// === One connection ===

/// What the parts of one connection tell each other. All run in one task; the atomics only satisfy `Send`.
struct ConnectionState {
    wheel: Arc<TimerWheel>,
    stage: AtomicU8,
    take: Mutex<Option<(Hijack, BodyFraming)>>,
    /// Requests in work.
    busy: AtomicU32,
    /// Ticks since when: a head is being read, no request is in work, nothing could be written. 0: it is not so.
    reading: AtomicU32,
    quiet: AtomicU32,
    blocked: AtomicU32,
}

/// The stages of a leave.
const HTTP: u8 = 0;
/// A stream's response was handed to hyper, with a body that never ends ([`Reply::Never`]).
const ARMED: u8 = 1;
/// Hyper asked that body for data: the head is encoded.
const ENCODED: u8 = 2;
/// Hyper flushed: the head is written.
const FLUSHED: u8 = 3;

impl ConnectionState {
    fn new(wheel: &Arc<TimerWheel>) -> Self {
        ConnectionState {
            wheel: wheel.clone(),
            stage: AtomicU8::new(HTTP),
            take: Mutex::new(None),
            busy: AtomicU32::new(0),
            reading: AtomicU32::new(0),
            quiet: AtomicU32::new(wheel.now()),
            blocked: AtomicU32::new(0),
        }
    }

    fn advance(&self, from: u8, to: u8) {
        let _ = self.stage.compare_exchange(from, to, Relaxed, Relaxed);
    }

    fn is(&self, stage: u8) -> bool {
        self.stage.load(Relaxed) == stage
    }

    /// Bytes came: of a new request, if none is in work.
    fn heard(&self) {
        if self.quiet.load(Relaxed) != 0 && self.reading.load(Relaxed) == 0 {
            self.reading.store(self.wheel.now(), Relaxed);
        }
    }

    /// A request came, and is in work until what is returned is dropped.
    fn begin(self: &Arc<Self>) -> Done {
        self.busy.fetch_add(1, Relaxed);
        self.reading.store(0, Relaxed);
        self.quiet.store(0, Relaxed);
        Done(self.clone())
    }

    /// Why the connection must end now.
    fn fault(&self, limits: &Limits) -> Option<Code> {
        let longer = |since: &AtomicU32, limit| match since.load(Relaxed) {
            0 => false,
            since => TimerWheel::span(since, self.wheel.now()) >= limit,
        };
        if longer(&self.blocked, limits.stall_timeout) {
            Some(Code::Slow)
        } else if self.quiet.load(Relaxed) != 0 && longer(&self.reading, limits.header_timeout) {
            Some(Code::Timeout)
        } else {
            None
        }
    }

    fn is_idle(&self, limits: &Limits) -> bool {
        let quiet = self.quiet.load(Relaxed);
        quiet != 0
            && self.reading.load(Relaxed) == 0
            && TimerWheel::span(quiet, self.wheel.now()) >= limits.idle_timeout
    }
}

/// Who is on the other end.
struct Client<S> {
    inner: Arc<Inner>,
    endpoint: Arc<S>,
    peer: SocketAddr,
    refuse: bool,
}

impl<S> Clone for Client<S> {
    fn clone(&self) -> Self {
        Client { inner: self.inner.clone(), endpoint: self.endpoint.clone(), peer: self.peer, refuse: self.refuse }
    }
}

async fn drive<S: HttpService>(
    client: Client<S>,
    mut io: Conn,
    permit: ConnectionPermit,
    mut connected: OpenConnection,
) {
    let inner = &client.inner;
    let state = Arc::new(ConnectionState::new(&inner.wheel));
    let mut timer = inner.wheel.timer(inner.look);
    let Some((pre, h2)) = sniff(inner, &state, &mut timer, &mut io).await else { return };
    let io = TokioIo::new(ObservedConn { io, pre, state: state.clone() });
    if h2 {
        // Boxed: the future of this function should be no larger than HTTP/1 needs.
        return Box::pin(drive_h2(client, io, permit, connected, state, timer)).await;
    }

    let service = service_fn(|request| call(&client, &state, request));
    let mut connection = inner.h1.serve_connection(io, service);
    let left = std::future::poll_fn(|cx| {
        while let Poll::Ready(due) = timer.poll(cx) {
            if due == Due::Leave || state.is_idle(&inner.limits) {
                Pin::new(&mut connection).graceful_shutdown();
            }
            if due == Due::Time {
                if let Some(fault) = state.fault(&inner.limits) {
                    connected.closed_with(fault);
                    return Poll::Ready(false);
                }
                timer.reset(inner.look);
            }
        }
        match Pin::new(&mut connection).poll(cx) {
            Poll::Pending if state.is(FLUSHED) => Poll::Ready(true),
            Poll::Pending => Poll::Pending,
            Poll::Ready(Ok(())) => {
                connected.completed();
                // A 101 ends the connection without closing it; everything else has closed it.
                Poll::Ready(state.is(HTTP))
            }
            Poll::Ready(Err(error)) => {
                tracing::debug!(peer = %client.peer, %error, "a connection failed");
                Poll::Ready(false)
            }
        }
    })
    .await;
    let taken = if left { state.take.lock().take() } else { None };
    let Some((takeover, framing)) = taken else { return };
    connected.completed();
    let parts = connection.into_parts();
    if let Some(take) = takeover.claim() {
        // In a task of its own, so that this one goes, with its two kilobytes and hyper's two buffers of eight.
        // A copy, though there is hardly ever anything to copy: even an empty slice would keep hyper's buffer alive.
        let early = Bytes::copy_from_slice(&parts.read_buf);
        take(HijackedConn { io: parts.io.into_inner().io, peer: client.peer, early, framing, permit });
    }
}

async fn drive_h2<S: HttpService>(
    client: Client<S>,
    io: TokioIo<ObservedConn>,
    _permit: ConnectionPermit,
    mut connected: OpenConnection,
    state: Arc<ConnectionState>,
    mut timer: Timer,
) {
    let inner = client.inner.clone();
    let peer = client.peer;
    let own = state.clone();
    let service = service_fn(move |request| {
        // Requests outlive the call: each runs in a task.
        let (client, state) = (client.clone(), own.clone());
        // Boxed, for hyper keeps the room of this future as long as the stream lives: kilobytes, where its body has a
        // few hundred bytes.
        Box::pin(async move { call(&client, &state, request).await })
    });
    let mut connection = pin!(inner.h2.serve_connection(io, service));
    std::future::poll_fn(|cx| {
        while let Poll::Ready(due) = timer.poll(cx) {
            // Heads are hyper's business here: what comes between requests may as well be the answer to a ping.
            state.reading.store(0, Relaxed);
            if due == Due::Leave || state.is_idle(&inner.limits) {
                connection.as_mut().graceful_shutdown();
            }
            if due == Due::Time {
                if let Some(fault) = state.fault(&inner.limits) {
                    connected.closed_with(fault);
                    return Poll::Ready(());
                }
                timer.reset(inner.look);
            }
        }
        connection.as_mut().poll(cx).map(|ended| match ended {
            Ok(()) => connected.completed(),
            Err(error) => tracing::debug!(%peer, %error, "an HTTP/2 connection failed"),
        })
    })
    .await;
}

/// Reads as much as it takes to know whether the client speaks HTTP/2. `None`: it went, or took too long.
async fn sniff(inner: &Inner, state: &ConnectionState, timer: &mut Timer, io: &mut Conn) -> Option<(Preface, bool)> {
    let mut pre = Preface { bytes: [0; PREFACE.len()], at: 0, len: 0 };
    let h2 = std::future::poll_fn(|cx| {
        loop {
            match timer.poll(cx) {
                // No request was begun: nothing is lost.
                Poll::Ready(Due::Leave | Due::Kicked) => return Poll::Ready(None),
                Poll::Ready(Due::Time) if state.fault(&inner.limits).is_some() || state.is_idle(&inner.limits) => {
                    return Poll::Ready(None);
                }
                Poll::Ready(Due::Time) => timer.reset(inner.look),
                Poll::Pending => break,
            }
        }
        loop {
            let mut buf = ReadBuf::new(&mut pre.bytes[pre.len as usize..]);
            match ready!(Pin::new(&mut *io).poll_read(cx, &mut buf)) {
                Ok(()) if !buf.filled().is_empty() => {
                    pre.len += buf.filled().len() as u8;
                    state.heard();
                }
                _ => return Poll::Ready(None),
            }
            let got = &pre.bytes[..pre.len as usize];
            if got != &PREFACE[..got.len()] {
                return Poll::Ready(Some(false));
            }
            if got.len() == PREFACE.len() {
                return Poll::Ready(Some(true));
            }
        }
    })
    .await?;
    Some((pre, h2))
}

/// One request: the answer, and the decision whether it takes the connection along.
async fn call<S: HttpService>(
    client: &Client<S>,
    state: &Arc<ConnectionState>,
    mut request: Request<Incoming>,
) -> Result<Response<Reply>, Infallible> {
    let done = state.begin();
    let (version, head) = (request.version(), request.method() == Method::HEAD);
    if client.refuse && !client.endpoint.is_probe(request.uri().path()) {
        let error = Error::new(Code::Overloaded, "this node has as many connections as limits.connections allows");
        request.extensions_mut().insert(Rejected(error.with("limit", "limits.connections")));
    }
    if request.method() == Method::GET || client.endpoint.options().tcp_keepalive {
        // Of those who may stay it is listed where they come from, and origins are told.
        request.extensions_mut().insert(PeerAddr(client.peer));
    }
    let mut response = client.endpoint.clone().respond(request).await;
    if client.refuse && version <= Version::HTTP_11 {
        response.headers_mut().insert(header::CONNECTION, HeaderValue::from_static("close"));
    }
    if let Some(takeover) = response.extensions_mut().remove::<Hijack>()
        && version <= Version::HTTP_11
        && !head
    {
        if response.status() == StatusCode::SWITCHING_PROTOCOLS {
            *state.take.lock() = Some((takeover, BodyFraming::UntilClose));
        } else if is_plain_stream(&response) {
            let framing = if version == Version::HTTP_11 { BodyFraming::Chunked } else { BodyFraming::UntilClose };
            *state.take.lock() = Some((takeover, framing));
            state.advance(HTTP, ARMED);
            // No `Connection: close`, though it closes: under that header Node's fetch takes a connection that was cut
            // for a stream that ended. A stream that does end says so with its last chunk.
            // The ordinary body goes here: it never ran.
            return Ok(response.map(|_| Reply::Never(state.clone())));
        }
    }
    Ok(response.map(|body| Reply::Body(body, done)))
}

/// Whether the body that the head announces is what the takeover will write: a layer may have encoded it.
fn is_plain_stream(response: &Response<AxumBody>) -> bool {
    response.status() == StatusCode::OK
        && !response.headers().contains_key(header::CONTENT_ENCODING)
        && !response.headers().contains_key(header::CONTENT_LENGTH)
}

// === The body ===

/// What hyper gets to send.
enum Reply {
    Body(AxumBody, #[expect(dead_code, reason = "held for its drop")] Done),
    /// Announces a body that is somebody else's to write.
    Never(Arc<ConnectionState>),
}

/// The request is answered, to the last byte or the breaking off, when this is dropped.
struct Done(Arc<ConnectionState>);

impl Drop for Done {
    fn drop(&mut self) {
        if self.0.busy.fetch_sub(1, Relaxed) == 1 {
            self.0.quiet.store(self.0.wheel.now(), Relaxed);
        }
    }
}

impl Body for Reply {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, axum::Error>>> {
        match self.get_mut() {
            Reply::Body(body, _) => Pin::new(body).poll_frame(cx),
            Reply::Never(state) => {
                state.advance(ARMED, ENCODED);
                Poll::Pending
            }
        }
    }

    fn is_end_stream(&self) -> bool {
        match self {
            Reply::Body(body, _) => body.is_end_stream(),
            Reply::Never(_) => false,
        }
    }

    fn size_hint(&self) -> SizeHint {
        match self {
            Reply::Body(body, _) => body.size_hint(),
            Reply::Never(_) => SizeHint::default(),
        }
    }
}

// === The IO ===

/// Replays what was sniffed, and sees when hyper flushes and when the peer stops reading.
struct ObservedConn {
    io: Conn,
    pre: Preface,
    state: Arc<ConnectionState>,
}

struct Preface {
    bytes: [u8; PREFACE.len()],
    at: u8,
    len: u8,
}

impl ObservedConn {
    fn wrote(&self, result: Poll<io::Result<usize>>) -> Poll<io::Result<usize>> {
        match result {
            Poll::Ready(_) => self.state.blocked.store(0, Relaxed),
            Poll::Pending if self.state.blocked.load(Relaxed) == 0 => {
                self.state.blocked.store(self.state.wheel.now(), Relaxed);
            }
            Poll::Pending => {}
        }
        result
    }
}

impl AsyncRead for ObservedConn {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        let before = buf.filled().len();
        if this.pre.at < this.pre.len {
            let pre = &this.pre.bytes[this.pre.at as usize..this.pre.len as usize];
            let n = pre.len().min(buf.remaining());
            buf.put_slice(&pre[..n]);
            this.pre.at += n as u8;
            // And reads on: after a first read of only 24 bytes hyper would reserve a second buffer.
        }
        let read = Pin::new(&mut this.io).poll_read(cx, buf);
        if buf.filled().len() == before {
            return read;
        }
        this.state.heard();
        match read {
            // An error will come again.
            Poll::Pending | Poll::Ready(Err(_)) => Poll::Ready(Ok(())),
            Poll::Ready(Ok(())) => Poll::Ready(Ok(())),
        }
    }
}

impl AsyncWrite for ObservedConn {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        let result = Pin::new(&mut this.io).poll_write(cx, bytes);
        this.wrote(result)
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        slices: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        let result = Pin::new(&mut this.io).poll_write_vectored(cx, slices);
        this.wrote(result)
    }

    fn is_write_vectored(&self) -> bool {
        self.io.is_write_vectored()
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        ready!(Pin::new(&mut this.io).poll_flush(cx))?;
        // Hyper calls this only when its write buffer is empty.
        this.state.advance(ENCODED, FLUSHED);
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().io).poll_shutdown(cx)
    }
}
