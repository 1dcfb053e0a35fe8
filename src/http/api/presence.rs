//! `/v1/presence`: the presence members of a channel.

use std::sync::Arc;

use axum::{extract::State, http::request::Parts, response::Response};
use http::StatusCode;

use super::json;
use crate::{
    auth::Identity,
    error::Result,
    http::schema::{PresenceQuery, ProblemSchema},
    node::Node,
    transport::{present::MembersRequest, query::Query},
};

/// `GET /v1/presence`.
#[utoipa::path(get, path = "/v1/presence", operation_id = "getPresence", tag = "events",
    description = "Lists the presence members of a channel, as announced on `$presence/CHANNEL` up to `position`. It requires permission to read the channel.",
    params(PresenceQuery),
    responses(
        (status = 200, description = "A page of the members.", body = crate::http::schema::PresenceSchema),
        (status = "4XX", description = "`invalid_params`, `forbidden`", body = ProblemSchema, content_type = "application/problem+json"),
    ),
)]
pub(crate) async fn get(State(node): State<Arc<Node>>, identity: Identity, head: Parts) -> Result<Response> {
    let presence = MembersRequest::from_query(Query::parse(head.uri.query())?, &node.config.limits)?;
    presence.permit(&identity)?;
    Ok(json(StatusCode::OK, presence.answer(&node.presence).await?))
}
