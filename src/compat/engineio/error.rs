//! [`EngineError`]: why a request is rejected, with the codes and messages of the original server.

use axum::{body::Body, http::Response};
use http::{HeaderValue, StatusCode, header};

#[derive(Clone, Copy, Debug)]
pub(super) enum EngineError {
    UnknownTransport,
    UnknownSession,
    HandshakeMethod,
    BadRequest,
    Forbidden,
    ProtocolVersion,
}

impl EngineError {
    pub(super) fn response(self) -> Response<Body> {
        let (code, message) = match self {
            EngineError::UnknownTransport => (0, "Transport unknown"),
            EngineError::UnknownSession => (1, "Session ID unknown"),
            EngineError::HandshakeMethod => (2, "Bad handshake method"),
            EngineError::BadRequest => (3, "Bad request"),
            EngineError::Forbidden => (4, "Forbidden"),
            EngineError::ProtocolVersion => (5, "Unsupported protocol version"),
        };
        let mut response = Response::new(Body::from(format!(r#"{{"code":{code},"message":"{message}"}}"#)));
        *response.status_mut() = match self {
            EngineError::Forbidden => StatusCode::FORBIDDEN,
            _ => StatusCode::BAD_REQUEST,
        };
        response.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
        response
    }
}
