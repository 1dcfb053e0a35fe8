//! `/v1/channels`: what there is.

use std::sync::Arc;

use axum::{extract::State, http::request::Parts, response::Response};
use serde::Serialize;

use super::{Listing, to_json};
use crate::{auth::Identity, bus::Info, error::Result, http::Gateway, transport::query::Query};

/// `GET /v1/channels`: one if `channel` is given, else a list.
pub async fn get(State(gateway): State<Arc<Gateway>>, identity: Identity, head: Parts) -> Result<Response> {
    let mut query = Query::parse(head.uri.query())?;
    if query.has("channel") {
        let channel = query.one_channel()?;
        query.finish()?;
        let _ = identity.may_subscribe(&channel)?;
        return Ok(to_json(&gateway.bus.inspect(&channel).await?));
    }
    let listing = Listing::take(&mut query)?;
    query.finish()?;
    let _ = identity.may_administer()?;
    let mut channels = gateway.bus.list(&listing.prefix, listing.after.as_deref(), listing.limit + 1).await?;
    let page = listing.page(&mut channels, |info| info.channel.as_str());
    Ok(to_json(&Channels { channels, page }))
}

#[derive(Serialize)]
struct Channels {
    channels: Vec<Info>,
    #[serde(skip_serializing_if = "Option::is_none")]
    page: Option<String>,
}
