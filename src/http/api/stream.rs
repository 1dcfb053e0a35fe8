//! `/v1/sse`: the same events as a stream, by a path that needs no `Accept`.

use std::sync::Arc;

use axum::{extract::State, response::Response};
use http::request::Parts;

use crate::{auth::Identity, error::Result, http::Gateway};

/// `GET /v1/sse`.
pub async fn get(State(gateway): State<Arc<Gateway>>, identity: Identity, head: Parts) -> Result<Response> {
    gateway.sse.open(&identity, &head).await
}
