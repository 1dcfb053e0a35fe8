//! [`NodeClient`]: HTTP requests to a node.

use std::time::Duration;

use bytes::{Bytes, BytesMut};
use http::{HeaderValue, Method, Request, Response, StatusCode, header, response::Parts};
use http_body_util::{BodyExt as _, Full};
use hyper::{body::Incoming, client::conn::http1};
use hyper_util::rt::TokioIo;
use serde::Deserialize;
use serde_json::value::RawValue;
use tokio::time::timeout;

use super::{
    args::Remote,
    connect::{BaseUrl, connect},
    request_target::RequestTarget,
};
use crate::{json::parse_owned, terminal::Failure};

/// Timeout of requests that a node answers at once.
pub(super) const RESPONSE_TIMEOUT: Duration = Duration::from_secs(60);
const USER_AGENT: &str = concat!("weir/", env!("CARGO_PKG_VERSION"));
/// Marks the requests of `weir doctor` in the logs of proxies.
const DOCTOR_USER_AGENT: &str = concat!("weir-doctor/", env!("CARGO_PKG_VERSION"));
/// In the reason of an error that a proxy or another server responds with.
pub(super) const NOT_FROM_WEIR: &str = "which is not from weir; is this a weir node?";
/// Maximum size of a response: more than any limit of weir allows.
const MAX_BYTES: usize = 64 << 20;

/// A client of one node, with one HTTP/1.1 connection.
pub(super) struct NodeClient {
    pub(super) base: BaseUrl,
    /// `Bearer …`, marked as sensitive.
    token: Option<HeaderValue>,
    pub(super) user_agent: HeaderValue,
    connection: Option<http1::SendRequest<Full<Bytes>>>,
}

impl NodeClient {
    /// Connects with the first request.
    pub(super) fn new(remote: &Remote) -> Result<Self, Failure> {
        let bearer = |token: &String| {
            let mut value = HeaderValue::try_from(format!("Bearer {token}"))
                .map_err(|_| Failure::Usage("the token contains characters that a header cannot have".into()))?;
            value.set_sensitive(true);
            Ok(value)
        };
        let token = remote.token.as_ref().map(bearer).transpose()?;
        let user_agent = HeaderValue::from_static(USER_AGENT);
        Ok(NodeClient { base: remote.url.clone(), token, user_agent, connection: None })
    }

    /// As [`new`](Self::new), for `weir doctor`.
    pub(super) fn of_doctor(remote: &Remote) -> Result<Self, Failure> {
        Ok(NodeClient { user_agent: HeaderValue::from_static(DOCTOR_USER_AGENT), ..NodeClient::new(remote)? })
    }

    /// The value of the `Authorization` header.
    pub(super) fn token(&self) -> Option<&HeaderValue> {
        self.token.as_ref()
    }

    /// A request with the headers that all requests have.
    pub(super) fn request(&self, method: Method, target: &RequestTarget) -> http::request::Builder {
        let request = Request::builder().method(method).uri(self.base.path(target));
        let request = request.header(header::HOST, self.base.authority()).header(header::USER_AGENT, &self.user_agent);
        match &self.token {
            Some(token) => request.header(header::AUTHORIZATION, token),
            None => request,
        }
    }

    /// Sends a request and reads its response, both within `limit`. `None`: the response has no body.
    pub(super) async fn fetch(
        &mut self,
        method: Method,
        target: &RequestTarget,
        body: Option<Vec<u8>>,
        limit: Duration,
    ) -> Result<Option<Box<RawValue>>, Failure> {
        self.exchange(method, target, body, limit).await?.into_json()
    }

    /// As [`fetch`](Self::fetch), for a response of any status.
    pub(super) async fn exchange(
        &mut self,
        method: Method,
        target: &RequestTarget,
        body: Option<Vec<u8>>,
        limit: Duration,
    ) -> Result<NodeResponse, Failure> {
        let mut request = self.request(method, target).header(header::ACCEPT, "application/json");
        if body.is_some() {
            request = request.header(header::CONTENT_TYPE, "application/json");
        }
        let body = Full::new(Bytes::from(body.unwrap_or_default()));
        let request = request.body(body).map_err(|error| Failure::Usage(error.to_string()))?;
        let exchange = async { NodeResponse::read(self.send(request).await?).await };
        match timeout(limit, exchange).await {
            Ok(response) => response,
            Err(_) => {
                self.connection = None;
                Err(Failure::Unavailable(format!("no response within {}s", limit.as_secs())))
            }
        }
    }

    /// Sends over the open connection, or else a new one. No part of a request is sent twice.
    pub(super) async fn send(&mut self, request: Request<Full<Bytes>>) -> Result<Response<Incoming>, Failure> {
        let mut request = request;
        if let Some(mut connection) = self.connection.take()
            && connection.ready().await.is_ok()
        {
            match connection.try_send_request(request).await {
                Ok(response) => {
                    self.connection = Some(connection);
                    return Ok(response);
                }
                // The node closed the idle connection before any byte of the request was sent.
                Err(mut error) => match error.take_message() {
                    Some(unsent) => request = unsent,
                    None => return Err(connection_lost(error.error())),
                },
            }
        }
        let stream = connect(&self.base).await?;
        let (mut connection, driver) =
            http1::handshake(TokioIo::new(stream)).await.map_err(|error| connection_lost(&error))?;
        // The task ends with the connection. Requests report its errors.
        tokio::spawn(driver);
        let response = connection.send_request(request).await.map_err(|error| connection_lost(&error))?;
        self.connection = Some(connection);
        Ok(response)
    }
}

/// A whole response, of weir or of another server.
pub(super) struct NodeResponse {
    pub(super) status: StatusCode,
    /// Of a redirect.
    pub(super) location: Option<String>,
    body: Bytes,
}

/// A problem document of weir.
#[derive(Deserialize)]
pub(super) struct ProblemDocument {
    #[serde(rename = "type")]
    kind: String,
    pub(super) title: String,
    pub(super) code: String,
    #[serde(default)]
    pub(super) detail: String,
}

impl NodeResponse {
    pub(super) async fn read(response: Response<Incoming>) -> Result<Self, Failure> {
        let (head, body) = response.into_parts();
        Ok(NodeResponse::new(&head, read_body(body).await?))
    }

    pub(super) fn new(head: &Parts, body: Bytes) -> Self {
        let location = head.headers.get(header::LOCATION).and_then(|location| location.to_str().ok());
        NodeResponse { status: head.status, location: location.map(ToOwned::to_owned), body }
    }

    /// None: the response is not an error, or it is not from weir.
    pub(super) fn problem(&self) -> Option<ProblemDocument> {
        let problem: ProblemDocument = parse_owned(&self.body).ok()?;
        problem.kind.starts_with("urn:weir:error:").then_some(problem)
    }

    /// The body of a successful response, unmodified, or the error.
    pub(super) fn into_json(self) -> Result<Option<Box<RawValue>>, Failure> {
        if self.status.is_success() {
            if self.body.is_empty() {
                return Ok(None);
            }
            let not_json = |_| Failure::Failed("the response is not JSON; is this a weir node?".into());
            return serde_json::from_slice(&self.body).map(Some).map_err(not_json);
        }
        let reason = self.reason();
        Err(match self.status.as_u16() {
            500.. => Failure::Unavailable(reason),
            400.. => Failure::Rejected(reason),
            _ => Failure::Failed(reason),
        })
    }

    /// The error in words: the code and the detail, or [`NOT_FROM_WEIR`].
    pub(super) fn reason(&self) -> String {
        match (self.problem(), &self.location) {
            (Some(problem), _) => format!("{}: {}", problem.code, problem.detail),
            (None, Some(location)) => format!("HTTP status {}, a redirect to {location}: use that URL", self.status),
            (None, None) => format!("HTTP status {}, {NOT_FROM_WEIR}", self.status),
        }
    }
}

/// Reads the whole body.
async fn read_body(mut body: Incoming) -> Result<Bytes, Failure> {
    let mut all = BytesMut::new();
    while let Some(frame) = body.frame().await {
        let frame = frame.map_err(|error| connection_lost(&error))?;
        if let Some(data) = frame.data_ref() {
            if all.len() + data.len() > MAX_BYTES {
                return Err(Failure::Failed("the response is larger than 64 MiB".into()));
            }
            all.extend_from_slice(data);
        }
    }
    Ok(all.freeze())
}

/// The connection failed: the node may have executed the request.
pub(super) fn connection_lost(error: &hyper::Error) -> Failure {
    use std::error::Error as _;
    let cause = error.source().map(|cause| format!(": {cause}")).unwrap_or_default();
    Failure::Unavailable(format!("connection lost: {error}{cause}"))
}
