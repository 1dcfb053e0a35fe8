//! `/v1/connections`: lists and closes the connections of all nodes.

use std::sync::Arc;

use axum::{extract::State, http::request::Parts, response::Response};
use serde::Serialize;
use utoipa::ToSchema;

use super::{Listing, to_json};
use crate::{
    auth::{AdminOperation, Identity},
    error::{Code, Error, Result},
    http::schema::{self, ProblemSchema},
    node::Node,
    sessions::{ConnectionFilter, ConnectionInfo},
    transport::query::Query,
};

/// `GET /v1/connections`.
#[utoipa::path(get, path = "/v1/connections", operation_id = "listConnections", tag = "administration",
    description = "Lists the streams, WebSockets and waiting reads of all nodes, sorted by id.",
    params(schema::ConnectionQuery, schema::PageQuery),
    responses(
        (status = 200, description = "A page of the list.", body = Connections),
        (status = "4XX", description = "`invalid_params`, `forbidden`", body = ProblemSchema, content_type = "application/problem+json"),
    ),
)]
pub(crate) async fn list(State(node): State<Arc<Node>>, identity: Identity, head: Parts) -> Result<Response> {
    let mut query = Query::parse(head.uri.query())?;
    if query.has("prefix") {
        return Err(Error::params("unknown parameter \"prefix\": use subject, channel or id"));
    }
    let listing = Listing::take(&mut query)?;
    let filter = filter(&mut query)?;
    query.finish()?;
    let _ = identity.may_administer(AdminOperation::ListConnections)?;
    let mut found = node.cluster_connections.list(&filter, listing.after.as_deref(), listing.limit + 1).await;
    let page = listing.page(&mut found.found, |connection| &connection.id);
    Ok(to_json(&Connections { connections: found.found, page, silent: found.silent }))
}

/// `DELETE /v1/connections`.
#[utoipa::path(delete, path = "/v1/connections", operation_id = "kickConnections", tag = "administration",
    description = "Closes the connections of a subject, or one connection, on all nodes. A client whose credentials are still valid can reconnect.",
    params(schema::KickQuery),
    responses(
        (status = 200, description = "The connections are being closed.", body = Kicked),
        (status = "4XX", description = "`invalid_params`, `not_found` (no node has a connection of this id), `forbidden`", body = ProblemSchema, content_type = "application/problem+json"),
    ),
)]
pub(crate) async fn kick(State(node): State<Arc<Node>>, identity: Identity, head: Parts) -> Result<Response> {
    let mut query = Query::parse(head.uri.query())?;
    let filter = filter(&mut query)?;
    query.finish()?;
    if filter.id.is_none() && filter.subject.is_none() {
        return Err(Error::params("subject or id is required"));
    }
    let _ = identity.may_administer(AdminOperation::KickConnections)?;
    let kicked = node.cluster_connections.kick(&filter).await;
    // A subject may have no connection at the moment, but an id is of one.
    if let Some(id) = filter.id.filter(|_| kicked.found == 0 && kicked.silent.is_empty()) {
        return Err(Error::new(Code::NotFound, format!("there is no connection {id}")));
    }
    Ok(to_json(&Kicked { kicked: kicked.found, silent: kicked.silent }))
}

/// An empty selector is an error: as absent it would select all connections, and as a subject all anonymous ones.
fn filter(query: &mut Query<'_>) -> Result<ConnectionFilter> {
    let mut text = |name| match query.take(name)? {
        Some(text) if text.is_empty() => Err(Error::params(format!("{name} is empty"))),
        text => Ok(text.map(|text| text.into_owned())),
    };
    let (id, subject) = (text("id")?, text("subject")?);
    let channel = query.channel()?.map(|channel| channel.as_str().to_owned());
    Ok(ConnectionFilter { id, subject, channel })
}

#[derive(Serialize, ToSchema)]
struct Connections {
    connections: Vec<ConnectionInfo>,
    /// Present if there are more entries: the value of the parameter `page` for the next request.
    #[schema(nullable = false)]
    #[serde(skip_serializing_if = "Option::is_none")]
    page: Option<String>,
    /// Nodes that did not respond within two seconds. Their connections are missing.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    silent: Vec<String>,
}

#[derive(Serialize, ToSchema)]
struct Kicked {
    /// The number of connections that are being closed.
    kicked: usize,
    /// Nodes that did not respond within two seconds. They may or may not have closed their connections.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    silent: Vec<String>,
}
