//! `/v1/channels`: the channels that have a log.

use std::sync::Arc;

use axum::{extract::State, http::request::Parts, response::Response};
use serde::Serialize;
use utoipa::ToSchema;

use super::{Listing, to_json};
use crate::{
    auth::{AdminOperation, Identity},
    bus::ChannelInfo,
    error::Result,
    http::schema::{ChannelQuery, ListQuery, ProblemSchema},
    node::Node,
    transport::query::Query,
};

/// `GET /v1/channels`: one channel if `channel` is present, otherwise a list.
#[utoipa::path(get, path = "/v1/channels", operation_id = "getChannels", tag = "administration",
    description = "Returns one channel if `channel` is present, otherwise a list of the channels that have a log.",
    params(ChannelQuery, ListQuery),
    responses(
        (status = 200, description = "The channel, or a page of the list.", body = ChannelOrChannels),
        (status = "4XX", description = "`invalid_params`, `forbidden`", body = ProblemSchema, content_type = "application/problem+json"),
        (status = "5XX", description = "`bus_unavailable`", body = ProblemSchema, content_type = "application/problem+json"),
    ),
)]
pub(crate) async fn get(State(node): State<Arc<Node>>, identity: Identity, head: Parts) -> Result<Response> {
    let mut query = Query::parse(head.uri.query())?;
    let listing = Listing::take(&mut query)?;
    let channel = query.channel()?;
    query.finish()?;
    if let Some(channel) = channel {
        let _ = identity.may_subscribe(&channel)?;
        return Ok(to_json(&ChannelOrChannels::One(node.bus.inspect(&channel).await?)));
    }
    let _ = identity.may_administer(AdminOperation::ListChannels)?;
    let mut channels = node.bus.list(&listing.prefix, listing.after.as_deref(), listing.limit + 1).await?;
    let page = listing.page(&mut channels, |info| info.channel.as_str());
    Ok(to_json(&ChannelOrChannels::Many(Channels { channels, page })))
}

/// One channel if the parameter `channel` is present, otherwise a list.
#[derive(Serialize, ToSchema)]
#[serde(untagged)]
enum ChannelOrChannels {
    One(ChannelInfo),
    Many(Channels),
}

#[derive(Serialize, ToSchema)]
struct Channels {
    channels: Vec<ChannelInfo>,
    /// Present if there are more entries: the value of the parameter `page` for the next request.
    #[schema(nullable = false)]
    #[serde(skip_serializing_if = "Option::is_none")]
    page: Option<String>,
}
