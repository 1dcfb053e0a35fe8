//! Failures as RFC 9457 problem documents.

use axum::response::{IntoResponse, Response};
use http::{HeaderValue, StatusCode, header};

use crate::error::{Code, Error};

/// The content type of every failure.
pub const PROBLEM: HeaderValue = HeaderValue::from_static("application/problem+json");

impl IntoResponse for Error {
    fn into_response(self) -> Response {
        problem(&self, self.to_problem())
    }
}

/// Answers `document`, the problem document of `error` with whatever else belongs into it. Its `status` is the answer's.
pub fn problem(error: &Error, document: serde_json::Value) -> Response {
    let status = document["status"].as_u64().and_then(|status| StatusCode::from_u16(status as u16).ok());
    let mut response = document.to_string().into_response();
    *response.status_mut() = status.unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
    let headers = response.headers_mut();
    headers.insert(header::CONTENT_TYPE, PROBLEM);
    if let Some(ms) = error.retry_after_ms() {
        // Whole seconds, and never "at once" to those who were told to wait.
        headers.insert(header::RETRY_AFTER, HeaderValue::from(ms.div_ceil(1_000).max(1)));
    }
    if matches!(error.code(), Code::Unauthorized | Code::TokenExpired) {
        headers.insert(header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
    }
    response
}
