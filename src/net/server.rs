//! Serves accepted connections: HTTP/1 or HTTP/2, detected by the first bytes, in hyper, until a response
//! [hijacks its connection](crate::net::hijack).
//!
//! Hyper reads the request and writes the head of the response. The connection leaves hyper at the first flush after
//! the body was polled: then the head is written completely, whereas `into_parts()` silently drops unwritten bytes.
//! Therefore `pipeline_flush` must never be enabled: it reports a flush that did not happen.

use std::{
    convert::Infallible,
    fs::File,
    io,
    net::SocketAddr,
    pin::{Pin, pin},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU8, AtomicU16, AtomicU32, Ordering::Relaxed},
    },
    task::{Context, Poll, ready},
    time::{Duration, Instant},
};

use axum::body::Body as AxumBody;
use bytes::Bytes;
use http::{HeaderValue, Method, Request, Response, StatusCode, Uri, Version, header, request::Parts};
use http_body::{Body, Frame, SizeHint};
use hyper::{
    body::Incoming,
    rt,
    server::conn::{http1, http2},
    service::service_fn,
};
use hyper_util::rt::{TokioExecutor, TokioIo};
use parking_lot::Mutex;
use socket2::TcpKeepalive;
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::TcpListener,
};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use crate::{
    config::LimitsSection,
    duration,
    error::{Code, Error, Executed},
    metrics::{Metrics, OpenConnection, Transport},
    net::{
        hijack::{BodyFraming, Conn, ConnectionPermit, Hijack, HijackedConn},
        linger,
        timer::{Due, TICK, Timer, TimerWheel},
    },
};

const PREFACE: &[u8; 24] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
/// The longest interval at which the timeouts of a connection inside hyper are checked.
const CHECK: Duration = Duration::from_secs(5);

/// How long a connection beyond the limit may take to send its request.
const MAX_REJECTED: Duration = Duration::from_secs(2);

/// Idle time before the first TCP keepalive probe, and between probes.
const KEEPALIVE: Duration = Duration::from_secs(30);

/// Answers the requests of the connections that one listener accepts.
pub trait HttpService: Send + Sync + 'static {
    fn respond(self: Arc<Self>, request: Request<Incoming>) -> impl Future<Output = Response<AxumBody>> + Send;

    fn options(&self) -> ListenerOptions;

    /// Whether a request to `path` is answered although `limits.connections` is reached.
    fn is_probe(&self, path: &str) -> bool;

    /// The response to a request that could not be read. `head` has only those parts of it that were found: the path, and
    /// the headers that tell the origin.
    fn reject(&self, head: &Parts, status: StatusCode, error: &Error) -> Response<AxumBody>;
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
    /// For the few connections beyond the limit: they must not keep probes out.
    rejected: LimitsSection,
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
        h2.timer(WheelTimer(wheel.clone()))
            .keep_alive_interval(Duration::from_secs(25))
            .keep_alive_timeout(Duration::from_secs(20))
            .max_concurrent_streams(u32::try_from(limits.h2_streams).unwrap_or(u32::MAX))
            .max_header_list_size(u32::try_from(limits.header).unwrap_or(u32::MAX))
            .initial_stream_window_size(64 * 1024)
            .initial_connection_window_size(1024 * 1024)
            .max_send_buf_size(64 * 1024);
        let check = CHECK.min(limits.header_time / 2).min(limits.idle / 2).min(limits.stalled / 2);
        let rejected = LimitsSection { header_time: MAX_REJECTED, idle: MAX_REJECTED, ..limits.clone() };
        HttpConnections(Arc::new(ServerState {
            limits,
            rejected,
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
        let mut backoff = AcceptBackoff::new();
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
                    self.open(Conn::Tcp(socket), peer, &endpoint, backoff.has_no_reserve());
                }
                // The connection was closed in the backlog: the next may be fine.
                Err(error)
                    if matches!(
                        error.kind(),
                        io::ErrorKind::ConnectionAborted | io::ErrorKind::ConnectionReset | io::ErrorKind::Interrupted
                    ) => {}
                Err(error) => backoff.failed(&error, self.len()).await,
            }
        }
    }

    /// Serves one connection in a task of its own.
    pub fn serve<S: HttpService>(&self, io: Conn, peer: SocketAddr, endpoint: &Arc<S>) {
        self.open(io, peer, endpoint, false);
    }

    /// As [`serve`](Self::serve). `exhausted`: the process has no more descriptors, so that only probes are answered.
    fn open<S: HttpService>(&self, io: Conn, peer: SocketAddr, endpoint: &Arc<S>, exhausted: bool) {
        let server = self.0.clone();
        let permit = ConnectionPermit::new(server.tracker.token());
        let (open, cap) = (self.len(), server.limits.connections);
        // Probes and administrators are served by a full node: it is alive.
        let full = exhausted || open > cap && !endpoint.options().exempt_from_limit;
        if full {
            server.metrics.connections_refused.add(1);
            if !exhausted && !server.full.swap(true, Relaxed) {
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

/// Keeps hyper's time: the answer to a ping that arrived while the process stood still is read before the peer is judged.
struct WheelTimer(Arc<TimerWheel>);

struct WheelSleep(Timer);

impl rt::Timer for WheelTimer {
    fn sleep(&self, time: Duration) -> Pin<Box<dyn rt::Sleep>> {
        Box::pin(WheelSleep(self.0.timer(time)))
    }

    fn sleep_until(&self, deadline: Instant) -> Pin<Box<dyn rt::Sleep>> {
        self.sleep(deadline.saturating_duration_since(Instant::now()))
    }
}

impl rt::Sleep for WheelSleep {}

impl Future for WheelSleep {
    type Output = ();

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        let timer = &mut self.get_mut().0;
        // A drain is the affair of the connection.
        while ready!(timer.poll(cx)) != Due::Time {}
        Poll::Ready(())
    }
}

impl ServerState {
    /// The timeouts of a connection, and how often they are checked.
    fn timeouts(&self, rejected: bool) -> (&LimitsSection, Duration) {
        if rejected { (&self.rejected, self.check.min(MAX_REJECTED / 2)) } else { (&self.limits, self.check) }
    }
}

impl PeerAddr {
    /// The address of the peer that sent a request, where the server recorded it.
    pub(crate) fn of(head: &Parts) -> Option<SocketAddr> {
        head.extensions.get::<PeerAddr>().map(|PeerAddr(address)| *address)
    }
}

/// What an accept loop does when the process has no descriptor left for another connection.
///
/// It keeps one in reserve. With that it still accepts one connection at a time, answers probes and closes all others,
/// instead of leaving every client, and the probe that would have the node killed, without an answer.
struct AcceptBackoff {
    /// `None` without a `/dev/null`: then there is no reserve.
    reserve: Option<File>,
    /// The reserve has been used.
    spent: bool,
    pause: Duration,
    logged: Option<Instant>,
}

impl AcceptBackoff {
    const MIN_PAUSE: Duration = Duration::from_millis(10);
    const MAX_PAUSE: Duration = Duration::from_secs(1);
    /// Between two messages in the log.
    const QUIET: Duration = Duration::from_secs(60);

    fn new() -> Self {
        AcceptBackoff { reserve: File::open("/dev/null").ok(), spent: false, pause: Self::MIN_PAUSE, logged: None }
    }

    /// Called after every accept: whether the connection has used up the reserve, which cannot be filled again yet.
    fn has_no_reserve(&mut self) -> bool {
        self.pause = Self::MIN_PAUSE;
        if self.spent {
            self.reserve = File::open("/dev/null").ok();
            self.spent = self.reserve.is_none();
        }
        self.spent
    }

    async fn failed(&mut self, error: &io::Error, open: usize) {
        if self.logged.is_none_or(|at| at.elapsed() >= Self::QUIET) {
            self.logged = Some(Instant::now());
            tracing::error!(
                %error,
                open,
                "cannot accept connections: only probes are answered; if files are the reason, \
                 raise the limit of open files (ulimit -n, LimitNOFILE) or lower limits.connections"
            );
        }
        // The next accept uses the reserve.
        if self.reserve.take().is_some() {
            self.spent = true;
        } else {
            tokio::time::sleep(self.pause).await;
            self.pause = (self.pause * 2).min(Self::MAX_PAUSE);
        }
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
    /// The last request has a body, which may not have been read to its end.
    has_body: AtomicBool,
    /// A request has begun since the last flush: what hyper writes is its response. Otherwise it is the bare response to a
    /// head that hyper rejects.
    answering: AtomicBool,
    /// The status of such a response, which was not written. 0: there is none.
    bare: AtomicU16,
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
            answering: AtomicBool::new(false),
            has_body: AtomicBool::new(false),
            bare: AtomicU16::new(0),
        }
    }

    /// The status with which hyper rejects the head that it reads.
    fn bare_status(&self) -> Option<StatusCode> {
        match self.bare.load(Relaxed) {
            0 => None,
            status => Some(StatusCode::from_u16(status).unwrap_or(StatusCode::BAD_REQUEST)),
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
        self.answering.store(true, Relaxed);
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
    let (limits, check) = server.timeouts(client.rejected);
    let state = Arc::new(ConnectionState::new(&server.wheel));
    let mut timer = server.wheel.timer(check);
    let Some((pre, h2)) = detect_h2((limits, check), &state, &mut timer, &mut io).await else { return };
    let io = TokioIo::new(ObservedConn { io, pre, h2, state: state.clone() });
    if h2 {
        // Boxed: the future of this function should be no larger than HTTP/1 needs.
        return Box::pin(drive_h2(client, io, permit, connected, state, timer)).await;
    }

    let service = service_fn(|request| call(&client, &state, request));
    let mut connection = server.h1.serve_connection(io, service);
    let end = std::future::poll_fn(|cx| {
        let mut judge = false;
        while let Poll::Ready(due) = timer.poll(cx) {
            match due {
                Due::Leave => Pin::new(&mut connection).graceful_shutdown(),
                Due::Time => {
                    judge = true;
                    timer.reset(check);
                }
                Due::Kicked(_) => {}
            }
        }
        loop {
            let polled = Pin::new(&mut connection).poll(cx);
            if let Some(status) = state.bare_status() {
                return Poll::Ready(HttpEnd::Unreadable(status));
            }
            match polled {
                Poll::Pending if state.is(FLUSHED) => return Poll::Ready(HttpEnd::Complete),
                // Only now, when everything is read that has arrived.
                Poll::Pending if std::mem::take(&mut judge) => {
                    if let Some(code) = state.timed_out(limits) {
                        connected.closed_with(code);
                        return Poll::Ready(HttpEnd::TimedOut(code));
                    }
                    if state.is_idle(limits) {
                        Pin::new(&mut connection).graceful_shutdown();
                        continue;
                    }
                    return Poll::Pending;
                }
                Poll::Pending => return Poll::Pending,
                Poll::Ready(Ok(())) => {
                    connected.completed();
                    return Poll::Ready(HttpEnd::Complete);
                }
                Poll::Ready(Err(error)) => {
                    tracing::debug!(peer = %client.peer, %error, "a connection failed");
                    return Poll::Ready(HttpEnd::Failed);
                }
            }
        }
    })
    .await;
    let unreadable = match end {
        HttpEnd::Failed | HttpEnd::TimedOut(Code::Slow) => return,
        HttpEnd::Complete => None,
        HttpEnd::TimedOut(_) => Some(StatusCode::REQUEST_TIMEOUT),
        HttpEnd::Unreadable(status) => Some(status),
    };
    drop(timer);
    let parts = connection.into_parts();
    let io = parts.io.into_inner().io;
    if let Some(status) = unreadable {
        let (head, error) = (partial_head(&parts.read_buf), unreadable_head(status, limits));
        let response = client.endpoint.reject(&head, status, &error);
        return linger::close(io, encode(response).await, true, &server.wheel).await;
    }
    // A 101 or a stream leaves the connection open.
    let hijacked = state.hijack.lock().take();
    let Some((hijack, framing)) = hijacked else {
        return linger::close(io, Bytes::new(), state.has_body.load(Relaxed), &server.wheel).await;
    };
    connected.completed();
    if let Some(take) = hijack.claim() {
        // It gets a task of its own, so that this one ends, with its 2 KB and hyper's two buffers of 8 KB. The bytes
        // are copied, though there are hardly ever any: even an empty slice would keep hyper's buffer alive.
        let early = Bytes::copy_from_slice(&parts.read_buf);
        take(HijackedConn { io, peer: client.peer, early, framing, permit });
    }
}

/// Why hyper is done with an HTTP/1 connection.
enum HttpEnd {
    /// The last response is written, or the connection is hijacked.
    Complete,
    /// The head of a request cannot be read; its response is still to be written.
    Unreadable(StatusCode),
    TimedOut(Code),
    /// The peer is gone, or a response was aborted.
    Failed,
}

/// The error for a head that could not be read.
fn unreadable_head(status: StatusCode, limits: &LimitsSection) -> Error {
    match status {
        StatusCode::REQUEST_HEADER_FIELDS_TOO_LARGE => {
            let detail = format!("the head of the request has more than {} bytes (limits.header)", limits.header);
            Error::new(Code::TooLarge, detail).with("limit", "limits.header")
        }
        StatusCode::URI_TOO_LONG => Error::new(Code::TooLarge, "the URL has more than 65534 bytes"),
        StatusCode::REQUEST_TIMEOUT => {
            let time = duration::format(limits.header_time);
            let detail = format!("the head of the request did not arrive within {time} (limits.header_time)");
            Error::new(Code::Timeout, detail).executed(Executed::No)
        }
        _ => Error::new(Code::InvalidRequest, "the head of the request is not valid HTTP/1.1"),
    }
}

/// The path, `Host` and `Origin` of a head that is incomplete or malformed, as far as they can be found.
fn partial_head(head: &[u8]) -> Parts {
    let mut lines = head.split(|byte| *byte == b'\n').map(|line| line.strip_suffix(b"\r").unwrap_or(line));
    let target = lines.next().and_then(|line| line.split(|byte| *byte == b' ').nth(1)).unwrap_or_default();
    let path = target.split(|byte| *byte == b'?').next().unwrap_or_default();
    let (mut parts, ()) = Request::new(()).into_parts();
    if let Ok(uri) = Uri::try_from(path) {
        parts.uri = uri;
    }
    for line in lines.take_while(|line| !line.is_empty()) {
        let Some((name, value)) = line.iter().position(|byte| *byte == b':').map(|at| (&line[..at], &line[at + 1..]))
        else {
            continue;
        };
        for known in [header::HOST, header::ORIGIN] {
            if name.eq_ignore_ascii_case(known.as_str().as_bytes())
                && let Ok(value) = HeaderValue::from_bytes(value.trim_ascii())
            {
                parts.headers.insert(known, value);
            }
        }
    }
    parts
}

/// A response as HTTP/1.1, after which the connection is closed.
async fn encode(response: Response<AxumBody>) -> Bytes {
    let (head, body) = response.into_parts();
    // The body of an error is in memory.
    let body = axum::body::to_bytes(body, usize::MAX).await.unwrap_or_default();
    let reason = head.status.canonical_reason().unwrap_or_default();
    let mut out = format!("HTTP/1.1 {} {reason}\r\n", head.status.as_str()).into_bytes();
    for (name, value) in
        head.headers.iter().filter(|(name, _)| !matches!(**name, header::CONNECTION | header::CONTENT_LENGTH))
    {
        for part in [name.as_str().as_bytes(), b": ", value.as_bytes(), b"\r\n"] {
            out.extend_from_slice(part);
        }
    }
    out.extend_from_slice(format!("content-length: {}\r\nconnection: close\r\n\r\n", body.len()).as_bytes());
    out.extend_from_slice(&body);
    out.into()
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
    let (limits, check) = server.timeouts(client.rejected);
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
        let mut judge = false;
        while let Poll::Ready(due) = timer.poll(cx) {
            match due {
                Due::Leave => connection.as_mut().graceful_shutdown(),
                Due::Time => {
                    judge = true;
                    timer.reset(check);
                }
                Due::Kicked(_) => {}
            }
        }
        loop {
            match connection.as_mut().poll(cx) {
                Poll::Pending => {}
                Poll::Ready(Ok(())) => {
                    connected.completed();
                    return Poll::Ready(());
                }
                Poll::Ready(Err(error)) => {
                    tracing::debug!(%peer, %error, "an HTTP/2 connection failed");
                    return Poll::Ready(());
                }
            }
            // Only now, when everything is read that has arrived.
            if !std::mem::take(&mut judge) {
                return Poll::Pending;
            }
            // Hyper limits the time of heads itself: bytes between requests may be the answer to a ping.
            state.reading.store(0, Relaxed);
            if let Some(code) = state.timed_out(limits) {
                connected.closed_with(code);
                return Poll::Ready(());
            }
            if !state.is_idle(limits) {
                return Poll::Pending;
            }
            connection.as_mut().graceful_shutdown();
        }
    })
    .await;
}

/// Reads until it is known whether the client speaks HTTP/2. `None` if it disconnects or takes too long.
async fn detect_h2(
    (limits, check): (&LimitsSection, Duration),
    state: &ConnectionState,
    timer: &mut Timer,
    io: &mut Conn,
) -> Option<(Preface, bool)> {
    let mut pre = Preface { bytes: [0; PREFACE.len()], at: 0, len: 0 };
    let h2 = std::future::poll_fn(|cx| {
        loop {
            let mut buf = ReadBuf::new(&mut pre.bytes[pre.len as usize..]);
            match Pin::new(&mut *io).poll_read(cx, &mut buf) {
                Poll::Ready(Ok(())) if !buf.filled().is_empty() => {
                    pre.len += buf.filled().len() as u8;
                    state.bytes_read();
                }
                Poll::Ready(_) => return Poll::Ready(None),
                Poll::Pending => match ready!(timer.poll(cx)) {
                    // No request has begun: nothing is lost.
                    Due::Leave | Due::Kicked(_) => return Poll::Ready(None),
                    Due::Time if state.is_idle(limits) => return Poll::Ready(None),
                    Due::Time if state.timed_out(limits).is_some() => {
                        // Reported as HTTP/1.1.
                        timer.reset(TICK);
                        return Poll::Ready(Some(false));
                    }
                    Due::Time => {
                        timer.reset(check);
                        continue;
                    }
                },
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
    state.has_body.store(!request.body().is_end_stream(), Relaxed);
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
    h2: bool,
    state: Arc<ConnectionState>,
}

struct Preface {
    bytes: [u8; PREFACE.len()],
    at: u8,
    len: u8,
}

impl ObservedConn {
    /// Whether hyper writes a response that no handler has made: to a head that it rejects. Its status is recorded.
    fn is_bare(&self, bytes: &[u8]) -> bool {
        let bare = !self.h2 && !self.state.answering.load(Relaxed);
        if bare {
            let status = bytes.get(9..12).and_then(|status| StatusCode::from_bytes(status).ok());
            self.state.bare.store(status.unwrap_or(StatusCode::BAD_REQUEST).as_u16(), Relaxed);
        }
        bare
    }

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
        if this.is_bare(bytes) {
            return Poll::Ready(Ok(bytes.len()));
        }
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
        if this.state.busy.load(Relaxed) == 0 {
            this.state.answering.store(false, Relaxed);
        }
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.h2 {
            true => Pin::new(&mut self.get_mut().io).poll_shutdown(cx),
            // It is closed outside of hyper, after what is written: see `linger`.
            false => Poll::Ready(Ok(())),
        }
    }
}
