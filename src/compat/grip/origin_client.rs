//! [`OriginClient`]: sends requests to origins.

use std::{
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
    HeaderMap, Method, Request, Response, StatusCode, Uri,
    uri::{Authority, PathAndQuery, Scheme},
};
use http_body::{Body, Frame, SizeHint};
use hyper::body::Incoming;
use hyper_rustls::{HttpsConnector, HttpsConnectorBuilder};
use hyper_util::{
    client::legacy::{Client, connect::HttpConnector},
    rt::{TokioExecutor, TokioTimer},
};
use tokio_rustls::rustls::{self, ClientConfig, RootCertStore};

use super::{config::Config, response::text_response};
use crate::{error::Error, net::timer::TimerWheel};

/// How long an idle connection to an origin is kept. Shorter than the keep-alive of common servers (Node: 5 s; most: 60 s
/// or more), because a request on a connection that the origin closes is retried only if none of it was written.
const POOL_IDLE: Duration = Duration::from_secs(4);

/// A connection pool for all origins.
pub(super) struct OriginClient {
    client: Client<HttpsConnector<HttpConnector>, UploadBody>,
    timeout: Duration,
    timers: Arc<TimerWheel>,
}

/// Why there is no response that can be forwarded.
#[derive(Debug)]
pub(super) enum OriginError {
    Unreachable,
    /// The connection broke, or the response is not HTTP.
    Broken,
    /// No response head in this time.
    Timeout(Duration),
    /// The client did not send its request body in time.
    UploadStalled,
    /// Invalid instructions, or ones that cannot be followed; why.
    Invalid(String),
}

pub(super) struct OriginRequest {
    pub(super) method: Method,
    pub(super) path: PathAndQuery,
    pub(super) headers: HeaderMap,
    pub(super) body: AxumBody,
}

/// A request body that records its progress.
struct UploadBody {
    body: AxumBody,
    progress: Arc<UploadProgress>,
}

struct UploadProgress {
    timers: Arc<TimerWheel>,
    /// The tick of the last progress.
    moved: AtomicU32,
    done: AtomicBool,
}

impl OriginClient {
    /// `tls`: whether a route has an https origin.
    pub(super) fn new(config: &Config, tls: bool, timers: Arc<TimerWheel>) -> Result<Self, String> {
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
            // Without its own timer the pool keeps idle connections for ever.
            .pool_timer(TokioTimer::new())
            .pool_idle_timeout(POOL_IDLE)
            .pool_max_idle_per_host(config.idle_connections)
            .build(https);
        Ok(OriginClient { client, timeout: config.timeout, timers })
    }

    /// Sends a request and waits for the response head. The exchange is aborted when this future, or the body of the
    /// response, is dropped.
    pub(super) async fn send(
        &self,
        scheme: &Scheme,
        authority: &Authority,
        request: OriginRequest,
    ) -> Result<Response<Incoming>, OriginError> {
        let OriginRequest { method, path, headers, body } = request;
        let mut uri = http::uri::Parts::default();
        (uri.scheme, uri.authority) = (Some(scheme.clone()), Some(authority.clone()));
        uri.path_and_query = Some(path);
        let uri = Uri::from_parts(uri).map_err(|_| OriginError::Unreachable)?;
        let done = body.is_end_stream().into();
        let moved = self.timers.now().into();
        let progress = Arc::new(UploadProgress { timers: self.timers.clone(), moved, done });
        let mut request = Request::new(UploadBody { body, progress: progress.clone() });
        (*request.method_mut(), *request.uri_mut(), *request.headers_mut()) = (method, uri, headers);
        let mut response = std::pin::pin!(self.client.request(request));
        let mut left = self.timeout;
        loop {
            match tokio::time::timeout(left, &mut response).await {
                Ok(Ok(response)) => return Ok(response),
                Ok(Err(error)) => {
                    tracing::debug!(origin = %authority, %error, "request to origin failed");
                    return Err(if error.is_connect() { OriginError::Unreachable } else { OriginError::Broken });
                }
                Err(_) => {
                    // The timeout applies only while the upload makes no progress.
                    let stalled = TimerWheel::span(progress.moved.load(Relaxed), self.timers.now());
                    left = self.timeout.saturating_sub(stalled);
                    if left.is_zero() && !progress.done.load(Relaxed) {
                        return Err(OriginError::UploadStalled);
                    }
                    if left.is_zero() {
                        return Err(OriginError::Timeout(self.timeout));
                    }
                }
            }
        }
    }
}

/// Loads the certificates of the machine only if they are needed.
fn tls_config(needed: bool) -> Result<ClientConfig, String> {
    let mut roots = RootCertStore::empty();
    if needed {
        let found = rustls_native_certs::load_native_certs();
        roots.add_parsable_certificates(found.certs);
        if roots.is_empty() {
            return Err("an origin has an https URL, but this machine has no CA certificates".into());
        }
    }
    let config = ClientConfig::builder_with_provider(Arc::new(rustls::crypto::aws_lc_rs::default_provider()));
    let config = config.with_safe_default_protocol_versions().map_err(|error| format!("TLS: {error}"))?;
    Ok(config.with_root_certificates(roots).with_no_client_auth())
}

impl Body for UploadBody {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, axum::Error>>> {
        let polled = Pin::new(&mut self.body).poll_frame(cx);
        if polled.is_ready() {
            self.progress.moved.store(self.progress.timers.now(), Relaxed);
            self.progress.done.store(self.body.is_end_stream() || matches!(polled, Poll::Ready(None)), Relaxed);
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

impl OriginError {
    /// The bus cannot serve the channels of a hold now.
    pub(super) fn bus_unavailable(error: Error) -> Self {
        tracing::debug!(%error, "could not hold a response");
        OriginError::Invalid("what it wants to hold cannot be held now".into())
    }

    /// The response to the client.
    pub(super) fn into_response(self) -> Response<AxumBody> {
        let (status, reason) = match self {
            OriginError::Unreachable => (StatusCode::BAD_GATEWAY, "it cannot be reached".to_owned()),
            OriginError::Broken => (StatusCode::BAD_GATEWAY, "it broke off".to_owned()),
            OriginError::Timeout(time) => {
                (StatusCode::GATEWAY_TIMEOUT, format!("it did not answer within {}", crate::duration::format(time)))
            }
            OriginError::UploadStalled => {
                return text_response(StatusCode::REQUEST_TIMEOUT, "The request did not arrive in time.\n");
            }
            OriginError::Invalid(reason) => (StatusCode::BAD_GATEWAY, reason),
        };
        text_response(status, format!("Error while proxying to origin: {reason}.\n"))
    }
}
