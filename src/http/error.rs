//! Errors as problem documents (RFC 9457).

use axum::response::{IntoResponse, Response};
use http::{HeaderValue, StatusCode, header};

use crate::{
    error::{Code, Error},
    net::content_coding::ACCEPTED,
};

/// The content type of errors.
pub(crate) const PROBLEM: HeaderValue = HeaderValue::from_static("application/problem+json");

impl IntoResponse for Error {
    fn into_response(self) -> Response {
        problem(&self, None, None)
    }
}

/// `WWW-Authenticate` (RFC 6750, section 3). An error without the member `permission` is about the credential itself.
fn challenge(error: &Error) -> Option<&'static str> {
    let permission = error.data().get("permission").is_some();
    match error.code() {
        Code::Unauthorized if permission => Some("Bearer"),
        Code::Unauthorized | Code::TokenExpired => Some(r#"Bearer error="invalid_token""#),
        Code::Forbidden if permission => Some(r#"Bearer error="insufficient_scope""#),
        _ => None,
    }
}

/// The problem document of `error`. `status` overrides its status; `member` is a name and JSON to add.
pub(crate) fn problem(error: &Error, status: Option<u16>, member: Option<(&str, &[u8])>) -> Response {
    let status = status.and_then(|status| StatusCode::from_u16(status).ok());
    let status = status.or_else(|| StatusCode::from_u16(error.code().status()).ok());
    let status = status.unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
    let mut document = error.to_problem();
    document["status"] = status.as_u16().into();
    let mut text = document.to_string().into_bytes();
    if let Some((name, json)) = member {
        // Appended as text, because a `Value` would round long numbers. The document has at least four members.
        text.pop();
        text.extend_from_slice(format!(",\"{name}\":").as_bytes());
        text.extend_from_slice(json);
        text.push(b'}');
    }
    let mut response = text.into_response();
    *response.status_mut() = status;
    let headers = response.headers_mut();
    headers.insert(header::CONTENT_TYPE, PROBLEM);
    if let Some(ms) = error.retry_after_ms() {
        // In whole seconds, at least 1: 0 would mean an immediate retry.
        headers.insert(header::RETRY_AFTER, HeaderValue::from(ms.div_ceil(1_000).max(1)));
    }
    // A coding of the body was the reason. Otherwise the header must not be sent (RFC 9110, section 12.5.3).
    if error.data().contains_key("accept_encoding") {
        headers.insert(header::ACCEPT_ENCODING, HeaderValue::from_static(ACCEPTED));
    }
    if let Some(challenge) = challenge(error) {
        headers.insert(header::WWW_AUTHENTICATE, HeaderValue::from_static(challenge));
    }
    response
}
