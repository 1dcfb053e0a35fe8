//! Forwarding: from a client's request to an origin's, and back.

use std::{
    net::IpAddr,
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU32, Ordering::Relaxed},
    },
    task::{Context, Poll},
    time::Duration,
};

use axum::body::Body as AxumBody;
use bytes::Bytes;
use http::{
    HeaderMap, HeaderName, HeaderValue, Method, Request, Response, StatusCode, Uri, Version, header,
    uri::{Authority, PathAndQuery, Scheme},
};
use http_body::{Body, Frame, SizeHint};
use http_body_util::BodyExt as _;
use hyper::body::Incoming;
use hyper_rustls::{HttpsConnector, HttpsConnectorBuilder};
use hyper_util::{
    client::legacy::{Client, connect::HttpConnector},
    rt::{TokioExecutor, TokioIo, TokioTimer},
};
use tokio::io::AsyncWriteExt as _;
use tokio_rustls::rustls::{self, ClientConfig, RootCertStore};

use super::{Route, config::Config, instruct};
use crate::{
    auth::Identity,
    error::Code,
    metrics::Transport,
    net::{
        hijack::{Hijack, HijackedConn},
        timer::{Due, TimerWheel},
    },
    node::Node,
    sessions::ChannelSet,
};

/// How long an idle connection to an origin is kept. Shorter than what common servers keep theirs (Node: 5 s; most: 60 s
/// or more): a request that meets a closing one is sent again only if nothing of it was written.
const IDLE: Duration = Duration::from_secs(4);
/// How long one side of a tunnel stays open when the other has closed.
const LINGER: Duration = Duration::from_secs(5);
/// What the proxy does beyond passing on, for origins that ask.
const FEATURES: HeaderValue =
    HeaderValue::from_static("status, link:next, filter:skip-self, filter:skip-users, filter:require-sub");

/// Headers that are between two neighbours only (RFC 9110, 7.6.1), besides those that `Connection` names.
const HOP: [HeaderName; 8] = [
    header::CONNECTION,
    HeaderName::from_static("keep-alive"),
    HeaderName::from_static("proxy-connection"),
    header::PROXY_AUTHENTICATE,
    header::PROXY_AUTHORIZATION,
    header::TE,
    header::TRANSFER_ENCODING,
    header::UPGRADE,
];

/// The way to all origins.
pub struct Origins {
    client: Client<HttpsConnector<HttpConnector>, Upload>,
    timeout: Duration,
    wheel: Arc<TimerWheel>,
}

/// Why an origin did not answer.
#[derive(Debug)]
pub enum Failure {
    /// No connection came about.
    Unreachable,
    /// It broke off, or answered what is no HTTP.
    Broken,
    /// It did not begin its answer in time.
    Late(Duration),
    /// The client did not send its request in time.
    Stalled,
    /// It asked for what cannot be done.
    Wrong(String),
}

/// What goes to an origin.
pub struct Ask {
    pub method: Method,
    pub path: PathAndQuery,
    pub headers: HeaderMap,
    pub body: AxumBody,
}

/// A request's body on its way, watched.
pub struct Upload {
    body: AxumBody,
    watch: Arc<Watch>,
}

struct Watch {
    wheel: Arc<TimerWheel>,
    moved: AtomicU32,
    done: AtomicBool,
}

impl Origins {
    /// `tls`: some are reached by https.
    pub fn new(config: &Config, tls: bool, wheel: Arc<TimerWheel>) -> Result<Self, String> {
        let mut http = HttpConnector::new();
        http.enforce_http(false);
        http.set_nodelay(true);
        http.set_connect_timeout(Some(config.connect_timeout));
        let https = HttpsConnectorBuilder::new()
            .with_tls_config(tls_config(tls)?)
            .https_or_http()
            .enable_http1()
            .wrap_connector(http);
        let client = Client::builder(TokioExecutor::new())
            .timer(TokioTimer::new())
            // Without a timer of its own the pool would never forget.
            .pool_timer(TokioTimer::new())
            .pool_idle_timeout(IDLE)
            .pool_max_idle_per_host(config.idle_connections)
            .build(https);
        Ok(Origins { client, timeout: config.timeout, wheel })
    }

    /// Sends a request to the origin of `route`, and waits for the head of its answer. Dropping this, or the answer's
    /// body, ends the exchange.
    pub async fn ask(&self, route: &Route, ask: Ask) -> Result<Response<Incoming>, Failure> {
        let Ask { method, path, headers, body } = ask;
        let mut uri = http::uri::Parts::default();
        (uri.scheme, uri.authority) = (Some(route.scheme.clone()), Some(route.authority.clone()));
        uri.path_and_query = Some(path);
        let uri = Uri::from_parts(uri).map_err(|_| Failure::Unreachable)?;
        let done = body.is_end_stream().into();
        let watch = Arc::new(Watch { wheel: self.wheel.clone(), moved: self.wheel.now().into(), done });
        let mut request = Request::new(Upload { body, watch: watch.clone() });
        (*request.method_mut(), *request.uri_mut(), *request.headers_mut()) = (method, uri, headers);
        let mut answer = std::pin::pin!(self.client.request(request));
        let mut left = self.timeout;
        loop {
            match tokio::time::timeout(left, &mut answer).await {
                Ok(Ok(answer)) => return Ok(answer),
                Ok(Err(error)) => {
                    tracing::debug!(origin = %route.authority, %error, "an origin failed");
                    return Err(if error.is_connect() { Failure::Unreachable } else { Failure::Broken });
                }
                Err(_) => {
                    // Of a large upload only a standstill counts.
                    let still = TimerWheel::span(watch.moved.load(Relaxed), self.wheel.now());
                    left = self.timeout.saturating_sub(still);
                    if left.is_zero() && !watch.done.load(Relaxed) {
                        return Err(Failure::Stalled);
                    }
                    if left.is_zero() {
                        return Err(Failure::Late(self.timeout));
                    }
                }
            }
        }
    }
}

/// The certificates of this machine are read only if somebody needs them.
fn tls_config(needed: bool) -> Result<ClientConfig, String> {
    let mut roots = RootCertStore::empty();
    if needed {
        let found = rustls_native_certs::load_native_certs();
        roots.add_parsable_certificates(found.certs);
        if roots.is_empty() {
            return Err("this machine has no certificates to know https origins by".into());
        }
    }
    let config = ClientConfig::builder_with_provider(Arc::new(rustls::crypto::aws_lc_rs::default_provider()));
    let config = config.with_safe_default_protocol_versions().map_err(|error| format!("TLS: {error}"))?;
    Ok(config.with_root_certificates(roots).with_no_client_auth())
}

impl Body for Upload {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, axum::Error>>> {
        let polled = Pin::new(&mut self.body).poll_frame(cx);
        if polled.is_ready() {
            self.watch.moved.store(self.watch.wheel.now(), Relaxed);
            self.watch.done.store(self.body.is_end_stream() || matches!(polled, Poll::Ready(None)), Relaxed);
        }
        polled
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

impl Failure {
    /// What the client is told.
    pub fn answer(&self) -> Response<AxumBody> {
        let (status, why) = match self {
            Failure::Unreachable => (StatusCode::BAD_GATEWAY, "it cannot be reached".to_owned()),
            Failure::Broken => (StatusCode::BAD_GATEWAY, "it broke off".to_owned()),
            Failure::Late(time) => {
                (StatusCode::GATEWAY_TIMEOUT, format!("it did not answer within {}", crate::duration::format(*time)))
            }
            Failure::Stalled => {
                return text(StatusCode::REQUEST_TIMEOUT, "The request did not arrive in time.\n".into());
            }
            Failure::Wrong(wrong) => (StatusCode::BAD_GATEWAY, wrong.clone()),
        };
        text(status, format!("Error while proxying to origin: {why}.\n"))
    }
}

pub fn text(status: StatusCode, text: String) -> Response<AxumBody> {
    let mut response = Response::new(AxumBody::from(text));
    *response.status_mut() = status;
    response.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static("text/plain"));
    response
}

// === headers ===

/// Removes what is between neighbours only.
pub fn strip_hop(headers: &mut HeaderMap) {
    let named: Vec<HeaderName> = headers
        .get_all(header::CONNECTION)
        .iter()
        .filter_map(|value| value.to_str().ok())
        .flat_map(|value| value.split(','))
        .filter_map(|name| name.trim().parse().ok())
        .collect();
    for name in named.iter().chain(&HOP) {
        headers.remove(name);
    }
}

/// Whether a client wants a WebSocket.
///
/// No other protocol is let through: behind an upgrade to HTTP/2 a client would speak to the origin itself, and sign its own
/// requests.
pub fn wants_socket(headers: &HeaderMap) -> bool {
    let has = |name: HeaderName, wanted: &str| {
        let values = headers.get_all(name).into_iter().filter_map(|value| value.to_str().ok());
        values.flat_map(|value| value.split(',')).any(|value| value.trim().eq_ignore_ascii_case(wanted))
    };
    has(header::CONNECTION, "upgrade") && has(header::UPGRADE, "websocket")
}

/// Makes a client's headers those of the request to the origin.
pub fn to_origin(headers: &mut HeaderMap, uri: &Uri, peer: Option<IpAddr>, signature: HeaderValue) {
    // Trailers are passed on: whoever takes them from us may say so.
    let trailers =
        headers.get_all(header::TE).iter().any(|value| value.to_str().is_ok_and(|te| te.contains("trailers")));
    let socket = wants_socket(headers);
    strip_hop(headers);
    instruct::strip(headers);
    // Answered on this side already.
    headers.remove(header::EXPECT);
    // What is published later is added to the answer as it is: so must the answer be.
    headers.insert(header::ACCEPT_ENCODING, HeaderValue::from_static("identity"));
    if socket {
        headers.insert(header::CONNECTION, HeaderValue::from_static("upgrade"));
        headers.insert(header::UPGRADE, HeaderValue::from_static("websocket"));
    } else if trailers {
        headers.insert(header::CONNECTION, HeaderValue::from_static("te"));
        headers.insert(header::TE, HeaderValue::from_static("trailers"));
    }
    // HTTP/2 may have cut it into pieces, which no HTTP/1 server puts together.
    if headers.get_all(header::COOKIE).iter().nth(1).is_some() {
        let pieces: Vec<_> = headers.get_all(header::COOKIE).iter().map(HeaderValue::as_bytes).collect();
        if let Ok(whole) = HeaderValue::from_bytes(&pieces.join(&b"; "[..])) {
            headers.insert(header::COOKIE, whole);
        }
    }
    // HTTP/2 has it in the URI.
    if let Some(Ok(host)) = uri.authority().map(|host| HeaderValue::from_str(host.as_str())) {
        headers.insert(header::HOST, host);
    }
    if let Some(peer) = peer {
        let before = headers.get_all("x-forwarded-for").iter().filter_map(|value| value.to_str().ok());
        let mut all: Vec<String> = before.map(str::to_owned).collect();
        all.push(peer.to_canonical().to_string());
        if let Ok(value) = HeaderValue::from_str(&all.join(", ")) {
            headers.insert("x-forwarded-for", value);
        }
    }
    // Whoever ends TLS in front of weir knows better.
    headers.entry("x-forwarded-proto").or_insert(HeaderValue::from_static("http"));
    if let Some(host) = headers.get(header::HOST).cloned() {
        headers.entry("x-forwarded-host").or_insert(host);
    }
    sign(headers, signature);
}

/// Marks a request as the proxy's own.
pub fn sign(headers: &mut HeaderMap, signature: HeaderValue) {
    headers.insert("grip-sig", signature);
    headers.insert("grip-feature", FEATURES);
}

/// The scheme and the authority of a URL without a path.
pub fn server(url: &str) -> Option<(Scheme, Authority)> {
    let parts = url.parse::<Uri>().ok()?.into_parts();
    Some((parts.scheme?, parts.authority?))
}

// === answers ===

/// An origin's answer for the client, as it is.
pub fn pass(answer: Response<Incoming>) -> Response<AxumBody> {
    answer.map(|body| {
        AxumBody::new(body.map_frame(|frame| match frame.into_trailers() {
            Ok(mut trailers) => {
                instruct::strip(&mut trailers);
                Frame::trailers(trailers)
            }
            Err(frame) => frame.into_data().map_or_else(|_| Frame::data(Bytes::new()), Frame::data),
        }))
    })
}

/// A 101: whatever both sides speak now is theirs.
pub fn tunnel(mut answer: Response<Incoming>, node: Arc<Node>) -> Response<AxumBody> {
    let upgrade = hyper::upgrade::on(&mut answer);
    let protocol = answer.headers().get(header::UPGRADE).cloned();
    let (mut head, _) = answer.into_parts();
    strip_hop(&mut head.headers);
    instruct::strip(&mut head.headers);
    head.headers.insert(header::CONNECTION, HeaderValue::from_static("upgrade"));
    head.headers.extend(protocol.map(|protocol| (header::UPGRADE, protocol)));
    head.version = Version::HTTP_11;
    head.extensions = http::Extensions::new();
    head.extensions.insert(Hijack::new(move |conn| {
        tokio::spawn(carry(conn, upgrade, node));
    }));
    Response::from_parts(head, AxumBody::empty())
}

async fn carry(conn: HijackedConn, upgrade: hyper::upgrade::OnUpgrade, node: Arc<Node>) {
    let HijackedConn { io: client, peer, early, permit: _permit, .. } = conn;
    let mut connected = node.metrics.connected(Transport::Ws);
    let registration = node.sessions.register(Transport::Ws, &Identity::anonymous(), Some(peer), ChannelSet::Empty);
    let mut timer = node.timers.timer(Duration::from_secs(60 * 60));
    timer.set_owner(registration.number());
    let Ok(upgraded) = upgrade.await else { return };
    let mut origin = TokioIo::new(upgraded);
    let leave = std::future::poll_fn(|cx| {
        loop {
            match timer.poll(cx) {
                Poll::Ready(Due::Leave) => return Poll::Ready(Code::Draining),
                Poll::Ready(Due::Kicked) => return Poll::Ready(Code::Kicked),
                Poll::Ready(Due::Time) => timer.reset(Duration::from_secs(60 * 60)),
                Poll::Pending => return Poll::Pending,
            }
        }
    });
    let both = async {
        origin.write_all(&early).await?;
        let (mut from_client, mut to_client) = tokio::io::split(client);
        let (mut from_origin, mut to_origin) = tokio::io::split(origin);
        let mut up = std::pin::pin!(async {
            tokio::io::copy(&mut from_client, &mut to_origin).await?;
            to_origin.shutdown().await
        });
        let mut down = std::pin::pin!(async {
            tokio::io::copy(&mut from_origin, &mut to_client).await?;
            to_client.shutdown().await
        });
        // Who hears that the other has no more to say has some time for last words, and not for ever.
        let last = tokio::select! {
            ended = &mut up => ended.map(|()| tokio::time::timeout(LINGER, down)),
            ended = &mut down => return ended.map(|()| tokio::time::timeout(LINGER, up))?.await.unwrap_or(Ok(())),
        };
        last?.await.unwrap_or(Ok(()))
    };
    tokio::select! {
        ended = both => match ended {
            Ok(()) => connected.completed(),
            Err::<_, std::io::Error>(_) => connected.closed_by_peer(),
        },
        code = leave => connected.closed_with(code),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn headers(pairs: &[(&'static str, &'static str)]) -> HeaderMap {
        let mut headers = HeaderMap::new();
        for (name, value) in pairs {
            headers.append(*name, HeaderValue::from_static(value));
        }
        headers
    }

    #[test]
    fn what_reaches_the_origin() {
        let mut map = headers(&[
            ("host", "example.com"),
            ("connection", "keep-alive, X-Mine"),
            ("x-mine", "1"),
            ("keep-alive", "timeout=5"),
            ("grip-sig", "forged"),
            ("grip-last", "a; last-id=1"),
            ("x-forwarded-for", "10.0.0.1"),
            ("x-forwarded-proto", "https"),
            ("accept-encoding", "gzip"),
            ("te", "trailers, deflate"),
            ("upgrade", "websocket"),
            ("cookie", "a=1"),
            ("cookie", "b=2"),
        ]);
        let peer = Some("::ffff:127.0.0.1".parse().unwrap());
        to_origin(&mut map, &Uri::from_static("/"), peer, HeaderValue::from_static("sig"));
        let features = map.remove("grip-feature");
        assert_eq!(features, Some(FEATURES));
        let expected = headers(&[
            ("host", "example.com"),
            ("x-forwarded-for", "10.0.0.1, 127.0.0.1"),
            ("x-forwarded-proto", "https"),
            ("x-forwarded-host", "example.com"),
            ("accept-encoding", "identity"),
            ("connection", "te"),
            ("te", "trailers"),
            ("cookie", "a=1; b=2"),
            ("grip-sig", "sig"),
        ]);
        assert_eq!(map, expected);
    }

    #[test]
    fn only_websockets_are_let_through() {
        assert!(wants_socket(&headers(&[("upgrade", "WebSocket"), ("connection", "keep-alive, Upgrade")])));
        assert!(!wants_socket(&headers(&[("upgrade", "websocket")])));
        let smuggled = [("upgrade", "h2c"), ("connection", "Upgrade, HTTP2-Settings"), ("http2-settings", "x")];
        let mut map = headers(&smuggled);
        assert!(!wants_socket(&map));
        to_origin(&mut map, &Uri::from_static("/"), None, HeaderValue::from_static("sig"));
        assert!(!map.contains_key("upgrade") && !map.contains_key("connection") && !map.contains_key("http2-settings"));
    }
}
