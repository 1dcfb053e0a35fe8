//! Serves accepted connections: HTTP/1 or HTTP/2, detected by the first bytes, in hyper, until a response
//! [hijacks its connection](crate::net::hijack).
//!
//! Hyper reads the request and writes the head of the response. The connection leaves hyper at the first flush after
//! the body was polled: then the head is written completely, whereas `into_parts()` silently drops unwritten bytes.
//! Therefore `pipeline_flush` must never be enabled: it reports a flush that did not happen.

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
    config::LimitsSection,
    error::{Code, Error},
    metrics::{Metrics, OpenConnection, Transport},
    net::{
        hijack::{BodyFraming, Conn, ConnectionPermit, Hijack, HijackedConn},
        timer::{Due, Timer, TimerWheel},
    },
};

const PREFACE: &[u8; 24] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
/// The longest interval at which the timeouts of a connection inside hyper are checked.
const CHECK: Duration = Duration::from_secs(5);

/// Idle time before the first TCP keepalive probe, and between probes.
const KEEPALIVE: Duration = Duration::from_secs(30);

/// Answers the requests of the connections that one listener accepts.
pub trait HttpService: Send + Sync + 'static {
    fn respond(self: Arc<Self>, request: Request<Incoming>) -> impl Future<Output = Response<AxumBody>> + Send;

    fn options(&self) -> ListenerOptions;

    /// Whether a request to `path` is answered although `limits.connections` is reached.
    fn is_probe(&self, path: &str) -> bool;
}

/// How the connections of one listener differ from those of others.
#[derive(Clone, Copy, Debug, Default)]
pub struct ListenerOptions {
    /// Accept connections beyond `limits.connections`, so that an administrator reaches a node that is
    /// full.
    pub exempt_from_limit: bool,
    /// Detect a vanished peer by TCP keepalive, for responses that may stay silent for ever.
    pub tcp_keepalive: bool,
}

/// The address of the peer, in the extensions of every `GET` request and of every request to a listener with
/// [`ListenerOptions::tcp_keepalive`].
#[derive(Clone, Copy, Debug)]
pub(crate) struct PeerAddr(pub(crate) SocketAddr);

/// The reason to reject a request, in its extensions: set by the server beyond `limits.connections`, and
/// by an HTTP endpoint for the one route that reports rejections in its own way.
#[derive(Clone, Debug)]
pub(crate) struct Rejected(pub(crate) Error);

/// The open connections of one node. Cheap to clone.
#[derive(Clone)]
pub struct HttpConnections(Arc<ServerState>);

struct ServerState {
    limits: LimitsSection,
    check: Duration,
    wheel: Arc<TimerWheel>,
    metrics: Arc<Metrics>,
    tracker: TaskTracker,
    /// The limit is reached, and has been logged.
    full: AtomicBool,
    h1: http1::Builder,
    h2: http2::Builder<TokioExecutor>,
}

// === impl HttpConnections ===

impl HttpConnections {
    pub(crate) fn new(limits: LimitsSection, wheel: Arc<TimerWheel>, metrics: Arc<Metrics>) -> Self {
        let mut h1 = http1::Builder::new();
        // Hyper's own timer would be a Sleep per connection, and would also end idle keep-alive connections; the wheel
        // handles both. Hyper panics on a buffer of less than 8 KiB.
        h1.header_read_timeout(None)
            .max_header_size(limits.header)
            .max_buf_size(limits.header.max(64 * 1024))
            .half_close(false)
            .writev(false);
        let mut h2 = http2::Builder::new(TokioExecutor::new());
        h2.timer(TokioTimer::new())
            .keep_alive_interval(Duration::from_secs(25))
            .keep_alive_timeout(Duration::from_secs(20))
            .max_concurrent_streams(u32::try_from(limits.h2_streams).unwrap_or(u32::MAX))
            .max_header_list_size(u32::try_from(limits.header).unwrap_or(u32::MAX))
            .initial_stream_window_size(64 * 1024)
            .initial_connection_window_size(1024 * 1024)
            .max_send_buf_size(64 * 1024);
        let check = CHECK.min(limits.header_time / 2).min(limits.idle / 2).min(limits.stalled / 2);
        HttpConnections(Arc::new(ServerState {
            limits,
            check,
            wheel,
            metrics,
            tracker: TaskTracker::new(),
            full: AtomicBool::new(false),
            h1,
            h2,
        }))
    }

    /// Accepts clients of `endpoint` until `stop`, and closes the listener. Open connections continue: see
    /// [`TimerWheel::drain`] and [`closed`](Self::closed).
    pub(crate) async fn accept<S: HttpService>(
        &self,
        listener: TcpListener,
        endpoint: Arc<S>,
        stop: CancellationToken,
    ) {
        let mut stopped = pin!(stop.cancelled());
        loop {
            let accepted = tokio::select! {
                biased;
                () = &mut stopped => return,
                accepted = listener.accept() => accepted,
            };
            match accepted {
                Ok((socket, peer)) => {
                    // Fails only if the socket is closed already.
                    let _ = socket.set_nodelay(true);
                    // Otherwise a vanished peer is detected only after 15 minutes of retransmissions.
                    let _ = socket2::SockRef::from(&socket).set_tcp_user_timeout(Some(self.0.limits.stalled * 2));
                    if endpoint.options().tcp_keepalive {
                        // Responses may stay silent for ever: the kernel has to detect vanished peers.
                        let keepalive = TcpKeepalive::new().with_time(KEEPALIVE).with_interval(KEEPALIVE);
                        let _ = socket2::SockRef::from(&socket).set_tcp_keepalive(&keepalive);
                    }
                    self.serve(Conn::Tcp(socket), peer, &endpoint);
                }
                // The connection was closed in the backlog: the next may be fine.
                Err(error)
                    if matches!(
                        error.kind(),
                        io::ErrorKind::ConnectionAborted | io::ErrorKind::ConnectionReset | io::ErrorKind::Interrupted
                    ) => {}
                Err(error) => {
                    // Usually out of descriptors or memory: retrying at once would only waste CPU time.
                    tracing::error!(%error, open = self.len(), "cannot accept connections");
                    tokio::time::sleep(Duration::from_millis(200)).await;
                }
            }
        }
    }

    /// Serves one connection in a task of its own.
    pub fn serve<S: HttpService>(&self, io: Conn, peer: SocketAddr, endpoint: &Arc<S>) {
        let server = self.0.clone();
        let permit = ConnectionPermit::new(server.tracker.token());
        let (open, cap) = (self.len(), server.limits.connections);
        // Probes and administrators are served by a full node: it is alive.
        let full = open > cap && !endpoint.options().exempt_from_limit;
        if full {
            server.metrics.connections_refused.add(1);
            if !server.full.swap(true, Relaxed) {
                tracing::warn!(open, "refusing connections: limits.connections is reached");
            }
            // Some get an error response; beyond that a task for each would cost too much.
            if open > cap + cap / 16 + 16 {
                tracing::debug!(%peer, open, "closed a connection beyond the cap");
                return;
            }
        } else if open < cap - cap / 16 {
            server.full.store(false, Relaxed);
        }
        let connected = server.metrics.connected(Transport::Http);
        let client = HttpClient { server, endpoint: endpoint.clone(), peer, rejected: full };
        tokio::spawn(drive(client, io, permit, connected));
    }

    /// The number of open connections, in hyper or hijacked.
    pub fn len(&self) -> usize {
        self.0.tracker.len()
    }

    pub fn is_empty(&self) -> bool {
        self.0.tracker.is_empty()
    }

    /// Waits until the last connection is closed. To be called once nothing is accepted any more.
    pub(crate) async fn closed(&self) {
        self.0.tracker.close();
        self.0.tracker.wait().await;
    }
}

impl PeerAddr {
    /// The address of the peer that sent a request, where the server recorded it.
    pub(crate) fn of(head: &Parts) -> Option<SocketAddr> {
        head.extensions.get::<PeerAddr>().map(|PeerAddr(address)| *address)
    }
}

// === One connection ===

/// State that the parts of one connection share. All run in one task; the atomics only satisfy `Send`.
struct ConnectionState {
    wheel: Arc<TimerWheel>,
    stage: AtomicU8,
    hijack: Mutex<Option<(Hijack, BodyFraming)>>,
    /// Requests in progress.
    busy: AtomicU32,
    /// The ticks since which a head is being read, no request is in progress, nothing could be written. 0: not so.
    reading: AtomicU32,
    quiet: AtomicU32,
    blocked: AtomicU32,
}

// The stages of a hijack.
const HTTP: u8 = 0;
/// A stream's response was passed to hyper, with a body that never ends ([`ResponseBody::Never`]).
const ARMED: u8 = 1;
/// Hyper has polled that body: the head is encoded.
const ENCODED: u8 = 2;
/// Hyper has flushed: the head is written.
const FLUSHED: u8 = 3;

impl ConnectionState {
    fn new(wheel: &Arc<TimerWheel>) -> Self {
        ConnectionState {
            wheel: wheel.clone(),
            stage: AtomicU8::new(HTTP),
            hijack: Mutex::new(None),
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

    /// Records that bytes were read: of a new request, if none is in progress.
    fn bytes_read(&self) {
        if self.quiet.load(Relaxed) != 0 && self.reading.load(Relaxed) == 0 {
            self.reading.store(self.wheel.now(), Relaxed);
        }
    }

    /// Begins a request, which is in progress until the guard is dropped.
    fn begin(self: &Arc<Self>) -> RequestInProgress {
        self.busy.fetch_add(1, Relaxed);
        self.reading.store(0, Relaxed);
        self.quiet.store(0, Relaxed);
        RequestInProgress(self.clone())
    }

    /// The timeout that has passed, if any.
    fn timed_out(&self, limits: &LimitsSection) -> Option<Code> {
        let longer = |since: &AtomicU32, limit| match since.load(Relaxed) {
            0 => false,
            since => TimerWheel::span(since, self.wheel.now()) >= limit,
        };
        if longer(&self.blocked, limits.stalled) {
            Some(Code::Slow)
        } else if self.quiet.load(Relaxed) != 0 && longer(&self.reading, limits.header_time) {
            Some(Code::Timeout)
        } else {
            None
        }
    }

    fn is_idle(&self, limits: &LimitsSection) -> bool {
        let quiet = self.quiet.load(Relaxed);
        quiet != 0 && self.reading.load(Relaxed) == 0 && TimerWheel::span(quiet, self.wheel.now()) >= limits.idle
    }
}

/// The context of all requests of one connection.
struct HttpClient<S> {
    server: Arc<ServerState>,
    endpoint: Arc<S>,
    peer: SocketAddr,
    /// The connection exceeds the limit: requests are rejected.
    rejected: bool,
}

impl<S> Clone for HttpClient<S> {
    fn clone(&self) -> Self {
        HttpClient {
            server: self.server.clone(),
            endpoint: self.endpoint.clone(),
            peer: self.peer,
            rejected: self.rejected,
        }
    }
}

async fn drive<S: HttpService>(
    client: HttpClient<S>,
    mut io: Conn,
    permit: ConnectionPermit,
    mut connected: OpenConnection,
) {
    let server = &client.server;
    let state = Arc::new(ConnectionState::new(&server.wheel));
    let mut timer = server.wheel.timer(server.check);
    let Some((pre, h2)) = detect_h2(server, &state, &mut timer, &mut io).await else { return };
    let io = TokioIo::new(ObservedConn { io, pre, state: state.clone() });
    if h2 {
        // Boxed: the future of this function should be no larger than HTTP/1 needs.
        return Box::pin(drive_h2(client, io, permit, connected, state, timer)).await;
    }

    let service = service_fn(|request| call(&client, &state, request));
    let mut connection = server.h1.serve_connection(io, service);
    let left = std::future::poll_fn(|cx| {
        while let Poll::Ready(due) = timer.poll(cx) {
            if due == Due::Leave || state.is_idle(&server.limits) {
                Pin::new(&mut connection).graceful_shutdown();
            }
            if due == Due::Time {
                if let Some(code) = state.timed_out(&server.limits) {
                    connected.closed_with(code);
                    return Poll::Ready(false);
                }
                timer.reset(server.check);
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
    let hijacked = if left { state.hijack.lock().take() } else { None };
    let Some((hijack, framing)) = hijacked else { return };
    connected.completed();
    let parts = connection.into_parts();
    if let Some(take) = hijack.claim() {
        // It gets a task of its own, so that this one ends, with its 2 KB and hyper's two buffers of 8 KB. The bytes
        // are copied, though there are hardly ever any: even an empty slice would keep hyper's buffer alive.
        let early = Bytes::copy_from_slice(&parts.read_buf);
        take(HijackedConn { io: parts.io.into_inner().io, peer: client.peer, early, framing, permit });
    }
}

async fn drive_h2<S: HttpService>(
    client: HttpClient<S>,
    io: TokioIo<ObservedConn>,
    _permit: ConnectionPermit,
    mut connected: OpenConnection,
    state: Arc<ConnectionState>,
    mut timer: Timer,
) {
    let server = client.server.clone();
    let peer = client.peer;
    let own = state.clone();
    let service = service_fn(move |request| {
        // Each request runs in its own task.
        let (client, state) = (client.clone(), own.clone());
        // Boxed, as hyper keeps the memory of this future as long as the stream lives: kilobytes, where its body has a
        // few hundred bytes.
        Box::pin(async move { call(&client, &state, request).await })
    });
    let mut connection = pin!(server.h2.serve_connection(io, service));
    std::future::poll_fn(|cx| {
        while let Poll::Ready(due) = timer.poll(cx) {
            // Hyper limits the time of heads itself: bytes between requests may be the answer to a ping.
            state.reading.store(0, Relaxed);
            if due == Due::Leave || state.is_idle(&server.limits) {
                connection.as_mut().graceful_shutdown();
            }
            if due == Due::Time {
                if let Some(code) = state.timed_out(&server.limits) {
                    connected.closed_with(code);
                    return Poll::Ready(());
                }
                timer.reset(server.check);
            }
        }
        connection.as_mut().poll(cx).map(|ended| match ended {
            Ok(()) => connected.completed(),
            Err(error) => tracing::debug!(%peer, %error, "an HTTP/2 connection failed"),
        })
    })
    .await;
}

/// Reads until it is known whether the client speaks HTTP/2. `None` if it disconnects or takes too long.
async fn detect_h2(
    server: &ServerState,
    state: &ConnectionState,
    timer: &mut Timer,
    io: &mut Conn,
) -> Option<(Preface, bool)> {
    let mut pre = Preface { bytes: [0; PREFACE.len()], at: 0, len: 0 };
    let h2 = std::future::poll_fn(|cx| {
        loop {
            match timer.poll(cx) {
                // No request has begun: nothing is lost.
                Poll::Ready(Due::Leave | Due::Kicked) => return Poll::Ready(None),
                Poll::Ready(Due::Time)
                    if state.timed_out(&server.limits).is_some() || state.is_idle(&server.limits) =>
                {
                    return Poll::Ready(None);
                }
                Poll::Ready(Due::Time) => timer.reset(server.check),
                Poll::Pending => break,
            }
        }
        loop {
            let mut buf = ReadBuf::new(&mut pre.bytes[pre.len as usize..]);
            match ready!(Pin::new(&mut *io).poll_read(cx, &mut buf)) {
                Ok(()) if !buf.filled().is_empty() => {
                    pre.len += buf.filled().len() as u8;
                    state.bytes_read();
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

/// Answers one request, and decides whether the response hijacks the connection.
async fn call<S: HttpService>(
    client: &HttpClient<S>,
    state: &Arc<ConnectionState>,
    mut request: Request<Incoming>,
) -> Result<Response<ResponseBody>, Infallible> {
    let done = state.begin();
    let (version, head) = (request.version(), request.method() == Method::HEAD);
    if client.rejected && !client.endpoint.is_probe(request.uri().path()) {
        let error = Error::new(Code::Overloaded, "this node has as many connections as limits.connections allows");
        request.extensions_mut().insert(Rejected(error.with("limit", "limits.connections")));
    }
    if request.method() == Method::GET || client.endpoint.options().tcp_keepalive {
        // Only where it is used: for the list of long-lived connections, and by proxies.
        request.extensions_mut().insert(PeerAddr(client.peer));
    }
    let mut response = client.endpoint.clone().respond(request).await;
    if client.rejected && version <= Version::HTTP_11 {
        response.headers_mut().insert(header::CONNECTION, HeaderValue::from_static("close"));
    }
    if let Some(hijack) = response.extensions_mut().remove::<Hijack>()
        && version <= Version::HTTP_11
        && !head
    {
        if response.status() == StatusCode::SWITCHING_PROTOCOLS {
            *state.hijack.lock() = Some((hijack, BodyFraming::UntilClose));
        } else if is_plain_stream(&response) {
            let framing = if version == Version::HTTP_11 { BodyFraming::Chunked } else { BodyFraming::UntilClose };
            *state.hijack.lock() = Some((hijack, framing));
            state.advance(HTTP, ARMED);
            // No `Connection: close`, though it closes: under that header Node's fetch takes a lost connection for the
            // end of the stream. A stream that ends sends the last chunk. The ordinary body is dropped here, before its
            // first poll.
            return Ok(response.map(|_| ResponseBody::Never(state.clone())));
        }
    }
    Ok(response.map(|body| ResponseBody::Body(body, done)))
}

/// Whether the head announces the body that the hijacked connection will carry: a layer may have encoded it.
fn is_plain_stream(response: &Response<AxumBody>) -> bool {
    response.status() == StatusCode::OK
        && !response.headers().contains_key(header::CONTENT_ENCODING)
        && !response.headers().contains_key(header::CONTENT_LENGTH)
}

// === Body ===

/// The body that hyper gets.
enum ResponseBody {
    Body(AxumBody, #[expect(dead_code, reason = "held for its drop")] RequestInProgress),
    /// Stands for a body that is written on the hijacked connection.
    Never(Arc<ConnectionState>),
}

/// One request in progress: dropped when the response is complete or aborted.
struct RequestInProgress(Arc<ConnectionState>);

impl Drop for RequestInProgress {
    fn drop(&mut self) {
        if self.0.busy.fetch_sub(1, Relaxed) == 1 {
            self.0.quiet.store(self.0.wheel.now(), Relaxed);
        }
    }
}

impl Body for ResponseBody {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, axum::Error>>> {
        match self.get_mut() {
            ResponseBody::Body(body, _) => Pin::new(body).poll_frame(cx),
            ResponseBody::Never(state) => {
                state.advance(ARMED, ENCODED);
                Poll::Pending
            }
        }
    }

    fn is_end_stream(&self) -> bool {
        match self {
            ResponseBody::Body(body, _) => body.is_end_stream(),
            ResponseBody::Never(_) => false,
        }
    }

    fn size_hint(&self) -> SizeHint {
        match self {
            ResponseBody::Body(body, _) => body.size_hint(),
            ResponseBody::Never(_) => SizeHint::default(),
        }
    }
}

// === IO ===

/// Replays the bytes that were read to detect HTTP/2, and observes when hyper flushes and when the peer stops reading.
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
            // Continues to read: after a first read of only 24 bytes hyper would reserve a second buffer.
        }
        let read = Pin::new(&mut this.io).poll_read(cx, buf);
        if buf.filled().len() == before {
            return read;
        }
        this.state.bytes_read();
        match read {
            // An error will be returned again by the next read.
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
        // Hyper flushes only when its write buffer is empty.
        this.state.advance(ENCODED, FLUSHED);
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().io).poll_shutdown(cx)
    }
}
