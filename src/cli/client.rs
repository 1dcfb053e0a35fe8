//! One HTTP/1.1 connection to weir and what is asked over it.

use std::time::Duration;

use bytes::{Bytes, BytesMut};
use http::{HeaderValue, Method, Request, Response, header};
use http_body_util::{BodyExt as _, Full};
use hyper::{body::Incoming, client::conn::http1};
use hyper_util::rt::TokioIo;
use serde_json::{Value, value::RawValue};
use tokio::time::timeout;

use super::{
    Failure, Target,
    connect::{Base, connect},
};

/// The largest answer that is kept: more than any limit of weir lets it send.
const LARGEST: usize = 64 << 20;

/// What every client command needs to know.
pub struct Client {
    pub base: Base,
    /// `Bearer …`, marked sensitive.
    token: Option<HeaderValue>,
    connection: Option<http1::SendRequest<Full<Bytes>>>,
}

impl Client {
    pub fn new(base: Base, token: Option<&str>) -> Result<Self, String> {
        let bearer = |token: &str| {
            let mut value = HeaderValue::try_from(format!("Bearer {token}"))
                .map_err(|_| "the token has characters that no token has".to_owned())?;
            value.set_sensitive(true);
            Ok::<_, String>(value)
        };
        Ok(Client { base, token: token.map(bearer).transpose()?, connection: None })
    }

    /// The `Authorization` header, for requests that are made elsewhere.
    pub fn token(&self) -> Option<&HeaderValue> {
        self.token.as_ref()
    }

    /// A request with everything but its body.
    pub fn request(&self, method: Method, target: &Target) -> http::request::Builder {
        let request = Request::builder().method(method).uri(self.base.path(target));
        let request = request.header(header::HOST, self.base.authority()).header(header::USER_AGENT, USER_AGENT);
        match &self.token {
            Some(token) => request.header(header::AUTHORIZATION, token),
            None => request,
        }
    }

    /// Asks, and reads the whole answer within `patience`. `None` is an answer without a body.
    pub async fn ask(
        &mut self,
        method: Method,
        target: &Target,
        body: Option<Vec<u8>>,
        patience: Duration,
    ) -> Result<Option<Box<RawValue>>, Failure> {
        let mut request = self.request(method, target).header(header::ACCEPT, "application/json");
        if body.is_some() {
            request = request.header(header::CONTENT_TYPE, "application/json");
        }
        let body = Full::new(Bytes::from(body.unwrap_or_default()));
        let request = request.body(body).map_err(|error| Failure::Usage(error.to_string()))?;
        let answer = async {
            let response = self.send(request).await?;
            let status = response.status().as_u16();
            let body = whole(response.into_body()).await?;
            answer(status, &body)
        };
        match timeout(patience, answer).await {
            Ok(answer) => answer,
            Err(_) => {
                self.connection = None;
                Err(Failure::Unavailable(format!("no answer within {}s", patience.as_secs())))
            }
        }
    }

    /// Sends over the connection that is there, or a new one. Nothing is sent twice.
    pub async fn send(&mut self, request: Request<Full<Bytes>>) -> Result<Response<Incoming>, Failure> {
        let mut request = request;
        if let Some(mut connection) = self.connection.take()
            && connection.ready().await.is_ok()
        {
            match connection.try_send_request(request).await {
                Ok(response) => {
                    self.connection = Some(connection);
                    return Ok(response);
                }
                // weir closed the idle connection before anything of this went out.
                Err(mut error) => match error.take_message() {
                    Some(unsent) => request = unsent,
                    None => return Err(lost(error.error())),
                },
            }
        }
        let stream = connect(&self.base).await?;
        let (mut connection, driver) = http1::handshake(TokioIo::new(stream)).await.map_err(|error| lost(&error))?;
        // Ends with the connection; what goes wrong with it is seen by the request.
        tokio::spawn(driver);
        let response = connection.send_request(request).await.map_err(|error| lost(&error))?;
        self.connection = Some(connection);
        Ok(response)
    }
}

pub const USER_AGENT: &str = concat!("weir/", env!("CARGO_PKG_VERSION"));

/// A success is its body as it was written, an error is its problem document.
pub fn answer(status: u16, body: &[u8]) -> Result<Option<Box<RawValue>>, Failure> {
    if (200..300).contains(&status) {
        if body.is_empty() {
            return Ok(None);
        }
        let not_json = |_| Failure::Failed("the answer is not JSON; is this a weir?".into());
        return serde_json::from_slice(body).map(Some).map_err(not_json);
    }
    let problem: Value = serde_json::from_slice(body).unwrap_or_default();
    let reason = match (problem["code"].as_str(), problem["detail"].as_str()) {
        (Some(code), Some(detail)) => format!("{code}: {detail}"),
        (Some(code), None) => code.to_owned(),
        _ => format!("HTTP status {status}; is this a weir?"),
    };
    if status >= 500 { Err(Failure::Unavailable(reason)) } else { Err(Failure::Refused(reason)) }
}

pub async fn whole(mut body: Incoming) -> Result<Bytes, Failure> {
    let mut all = BytesMut::new();
    while let Some(frame) = body.frame().await {
        let frame = frame.map_err(|error| lost(&error))?;
        if let Some(data) = frame.data_ref() {
            if all.len() + data.len() > LARGEST {
                return Err(Failure::Failed("the answer is larger than 64 MiB".into()));
            }
            all.extend_from_slice(data);
        }
    }
    Ok(all.freeze())
}

/// The connection went away: what was asked may have been done.
pub fn lost(error: &hyper::Error) -> Failure {
    use std::error::Error as _;
    let cause = error.source().map(|cause| format!(": {cause}")).unwrap_or_default();
    Failure::Unavailable(format!("connection lost: {error}{cause}"))
}
