//! JSON-RPC over a WebSocket (`/v1/ws`) and over HTTP (`/v1/rpc`).

use std::sync::Arc;

use axum::{
    body::Body,
    extract::State,
    http::{HeaderValue, Request, StatusCode, header, request::Parts},
    response::{IntoResponse, Response},
};

use super::json;
use crate::{
    auth::Identity,
    error::{Code, Result},
    http::{
        extract::{Admitted, check_declared_json, read_body},
        schema::ProblemSchema,
    },
    json::without_bom,
    node::Node,
    transport::{query::Query, ws},
};

/// `GET /v1/ws`.
pub(crate) async fn upgrade(State(node): State<Arc<Node>>, Admitted(admitted): Admitted, head: Parts) -> Response {
    match ws::upgrade(&node, &head, admitted).await {
        Ok(response) => response,
        Err(error) => {
            let upgrade_required = error.code() == Code::UpgradeRequired;
            let mut response = error.into_response();
            if upgrade_required {
                let headers = response.headers_mut();
                headers.insert(header::UPGRADE, HeaderValue::from_static("websocket"));
                headers.insert(header::SEC_WEBSOCKET_VERSION, HeaderValue::from_static("13"));
            }
            response
        }
    }
}

/// `POST /v1/rpc`: one message or batch. The status is 200, or 204 without a response; errors are those of JSON-RPC.
#[utoipa::path(post, path = "/v1/rpc", operation_id = "postJsonRpc", tag = "services",
    description = "JSON-RPC 2.0 over HTTP: one request or a batch, with the methods of the WebSocket except weir.subscribe, \
        weir.unsubscribe, weir.provide and weir.withdraw. JSON-RPC errors have the status 200. Closing the connection cancels the calls.",
    request_body(description = "A request or a batch.", content((serde_json::Value = "application/json"))),
    responses(
        (status = 200, description = "One response, or an array of responses.", body = serde_json::Value, content_type = "application/json"),
        (status = 204, description = "The body contains only notifications."),
        (status = "4XX", description = "`invalid_params` (query parameters), `too_large`, `unsupported_media_type`", body = ProblemSchema, content_type = "application/problem+json"),
    ),
)]
pub(crate) async fn post(
    State(node): State<Arc<Node>>,
    identity: Identity,
    request: Request<Body>,
) -> Result<Response> {
    let (head, body) = request.into_parts();
    check_declared_json(&head.headers)?;
    Query::parse(head.uri.query())?.finish()?;
    let limits = &node.config.limits;
    let body = read_body(body, limits.frame, "limits.frame", limits.body_time).await?;
    Ok(match ws::post(&node, identity, without_bom(&body)).await? {
        Some(answer) => json(StatusCode::OK, answer),
        None => StatusCode::NO_CONTENT.into_response(),
    })
}
