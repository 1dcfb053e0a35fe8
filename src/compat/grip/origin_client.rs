//! [`OriginClient`]: sends requests to origins.

use std::{
    error::Error as StdError,
    io,
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
    client::legacy::{self, Client, connect::HttpConnector},
    rt::{TokioExecutor, TokioTimer},
};
use tokio_rustls::rustls::{self, ClientConfig, RootCertStore};

use super::{config::Config, headers::strip_trailers, response::text_response};
use crate::{error::Error, net::timer::TimerWheel};

/// How long an idle connection to an origin is kept. Shorter than the keep-alive of common servers (Node: 5 s; most: 60 s
/// or more), because a request on a connection that the origin closes is retried only if it is idempotent or none of it was
/// written.
const POOL_IDLE: Duration = Duration::from_secs(4);

/// Maximum number of header fields of a response.
const MAX_FIELDS: usize = 1_000;

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
    /// The response is not HTTP, or its body broke off.
    Broken,
    /// The connection was closed without a response.
    Unanswered,
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
            .http1_max_headers(MAX_FIELDS)
            // A proxy removes them (RFC 9112, sections 5.1 and 5.2). In requests of clients they are errors.
            .http1_allow_spaces_after_header_name_in_responses(true)
            .http1_allow_obsolete_multiline_headers_in_responses(true)
            .build(https);
        Ok(OriginClient { client, timeout: config.timeout, timers })
    }

    /// Sends a request and waits for the response head. The exchange is aborted when this future, or the body of the
    /// response, is dropped.
    ///
    /// An idempotent request is sent once more if its connection closes without a response, as an idle connection does
    /// that the origin closes at the same time (RFC 9110, section 9.2.2).
    pub(super) async fn send(
        &self,
        scheme: &Scheme,
        authority: &Authority,
        request: OriginRequest,
    ) -> Result<Response<Incoming>, OriginError> {
        let repetition = request.repetition();
        match (self.send_once(scheme, authority, request).await, repetition) {
            (Err(OriginError::Unanswered), Some(request)) => self.send_once(scheme, authority, request).await,
            (result, _) => result,
        }
    }

    async fn send_once(
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
                    return Err(match error.is_connect() {
                        true => OriginError::Unreachable,
                        false if is_unanswered(&error) => OriginError::Unanswered,
                        false => OriginError::Broken,
                    });
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

/// Whether the connection ended before a response did, as opposed to a response that is not HTTP.
fn is_unanswered(error: &legacy::Error) -> bool {
    let cause = error.source().and_then(|cause| cause.downcast_ref::<hyper::Error>());
    cause.is_some_and(|cause| {
        cause.is_incomplete_message()
            || cause.is_canceled()
            || cause.source().is_some_and(<dyn StdError>::is::<io::Error>)
    })
}

impl OriginRequest {
    /// The same request, if it is idempotent and has no body.
    fn repetition(&self) -> Option<Self> {
        (self.method.is_idempotent() && self.body.is_end_stream()).then(|| OriginRequest {
            method: self.method.clone(),
            path: self.path.clone(),
            headers: self.headers.clone(),
            body: AxumBody::empty(),
        })
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
        let polled = Pin::new(&mut self.body).poll_frame(cx).map_ok(|frame| match frame.into_trailers() {
            Ok(mut trailers) => {
                strip_trailers(&mut trailers);
                Frame::trailers(trailers)
            }
            Err(frame) => frame,
        });
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
            OriginError::Broken | OriginError::Unanswered => (StatusCode::BAD_GATEWAY, "it broke off".to_owned()),
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
