//! Health checks and metrics.

use std::{sync::Arc, time::Duration};

use axum::{
    extract::State,
    response::{IntoResponse, Response},
};
use http::{HeaderValue, StatusCode, header};

use super::{
    api::{self, consumers},
    schema,
};
use crate::{
    auth::{AdminOperation, Identity},
    error::{Code, Error, Result},
    node::Node,
};

/// How long `/metrics` waits for the lag of consumers, which may be in Redis.
const LAG_TIMEOUT: Duration = Duration::from_millis(500);

/// `GET /health/live`, without authentication. It depends on no other server.
#[utoipa::path(get, path = "/health/live", operation_id = "getLiveness", tag = "operations", description = "Liveness probe.", responses((status = 200, description = "The process is alive.", body = Healthy)))]
pub(crate) async fn live() -> Response {
    healthy()
}

/// `GET /health/ready`, without authentication: whether the node accepts clients.
#[utoipa::path(get, path = "/health/ready", operation_id = "getReadiness", tag = "operations", description = "Readiness probe.", responses(
    (status = 200, description = "The node accepts clients.", body = Healthy),
    (status = 503, description = "`draining`: this node is shutting down. `bus_unavailable`: events cannot be stored and delivered.", body = schema::ProblemSchema, content_type = "application/problem+json"),
))]
pub(crate) async fn ready(State(node): State<Arc<Node>>) -> Response {
    if node.draining.is_cancelled() {
        return Error::new(Code::Draining, "this node is shutting down").into_response();
    }
    if let Err(error) = node.bus.ready() {
        return error.into_response();
    }
    healthy()
}

/// `GET /metrics` in the Prometheus text format.
#[utoipa::path(get, path = "/metrics", operation_id = "getMetrics", tag = "operations", description = "Metrics in the Prometheus text format.",
    responses((status = 200, description = "The metrics.", body = String, content_type = "text/plain")))]
pub(crate) async fn metrics(State(node): State<Arc<Node>>, identity: Identity) -> Result<Response> {
    let _ = identity.may_administer(AdminOperation::Metrics)?;
    observe(&node).await;
    let mut response = node.metrics.render().into_response();
    let kind = HeaderValue::from_static("text/plain; version=0.0.4; charset=utf-8");
    response.headers_mut().insert(header::CONTENT_TYPE, kind);
    Ok(response)
}

/// Updates the metrics whose values bus, presence and hub count themselves.
async fn observe(node: &Node) {
    let topics = node.bus.topics();
    node.metrics.channels.set(topics.count() as i64);
    node.metrics.bus_memory_bytes.set(topics.used() as i64);
    node.metrics.bus_memory_limit.set(topics.budget().limit() as i64);
    node.metrics.bus_evictions.set(topics.budget().evicted());
    // Without Redis for a while, the last known lag is better than no metrics.
    let _ = tokio::time::timeout(LAG_TIMEOUT, consumers::observe_lag(node)).await;
    node.metrics.presence_members.set(node.presence.members() as i64);
    node.hub.update_gauges();
}

/// The body of a successful health check.
#[derive(utoipa::ToSchema)]
#[expect(dead_code, reason = "a schema of the document")]
struct Healthy {
    #[schema(example = "ok")]
    status: String,
}

fn healthy() -> Response {
    api::json(StatusCode::OK, r#"{"status":"ok"}"#)
}
