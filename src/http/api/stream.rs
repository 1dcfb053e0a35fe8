//! `/v1/sse`: a stream of events, at a path that needs no `Accept` header.

use std::sync::Arc;

use axum::{extract::State, response::Response};
use http::request::Parts;

use crate::transport::sse;
use crate::{auth::Identity, error::Result, http::schema, node::Node};

/// `GET /v1/sse`.
#[utoipa::path(get, path = "/v1/sse", operation_id = "streamEvents", tag = "events",
    description = "Streams events. Equivalent to `GET /v1/events` with `Accept: text/event-stream`.",
    params(schema::StreamQuery, ("Last-Event-ID" = Option<String>, Header, description = "The position after which to resume. Overrides `after`.")),
    responses(
        (status = 200, description = "Server-sent events, until the client or the node closes the stream.", body = String, content_type = "text/event-stream"),
        (status = "4XX", description = "`invalid_params`, `forbidden`, `not_acceptable`. Temporary errors are reported in the stream instead.", body = schema::ProblemSchema, content_type = "application/problem+json"),
    ),
)]
pub(crate) async fn get(State(node): State<Arc<Node>>, identity: Identity, head: Parts) -> Result<Response> {
    sse::open(&node, &identity, &head).await
}
