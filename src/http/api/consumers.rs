//! `/v1/consumers`: named readers whose cursors weir stores.

use std::{borrow::Cow, sync::Arc};

use axum::{
    body::Body,
    extract::State,
    http::{Request, StatusCode, request::Parts},
    response::Response,
};
use futures_util::future::try_join_all;
use serde::{Deserialize, Serialize, de::DeserializeOwned};
use utoipa::ToSchema;

use super::{Listing, to_json};
use crate::{
    auth::{AdminOperation, Identity},
    bus::{ConsumerInfo, ReadLimit},
    channel::Channel,
    error::{Code, Error, Result},
    http::{
        extract::{check_declared_json, read_body},
        schema::{self, After, ChannelName, ProblemSchema},
    },
    json::{json_error_at_path, json_text, well_formed},
    node::Node,
    position::{Position, Start},
    transport::{
        query::{Query, StartParam, decode},
        reading,
    },
};

/// Maximum size of a request body in bytes: many times that of a token and a channel name.
const MAX_BODY: usize = 64 * 1024;
/// Consumers, and their cursors, of which the metrics show the lag.
const MAX_OBSERVED: usize = 1_000;

/// `GET /v1/consumers`.
#[utoipa::path(get, path = "/v1/consumers", operation_id = "listConsumers",
    description = "Lists the consumers, sorted by name.", tag = "consumers",
    params(schema::ListQuery),
    responses(
        (status = 200, description = "A page of the list.", body = Consumers),
        (status = "4XX", description = "`invalid_params`, `forbidden`", body = ProblemSchema, content_type = "application/problem+json"),
        (status = "5XX", description = "`bus_unavailable`", body = ProblemSchema, content_type = "application/problem+json"),
    ),
)]
pub(crate) async fn list(State(node): State<Arc<Node>>, identity: Identity, head: Parts) -> Result<Response> {
    let mut query = Query::parse(head.uri.query())?;
    let listing = Listing::take(&mut query)?;
    query.finish()?;
    let _ = identity.may_administer(AdminOperation::ListConsumers)?;
    let mut found = node.bus.consumers(&listing.prefix, listing.after.as_deref(), listing.limit + 1).await?;
    let page = listing.page(&mut found, |consumer| &consumer.name);
    let mut consumers = Vec::with_capacity(found.len());
    for consumer in found {
        consumers.push(Consumer::of(&node, &identity, consumer).await?);
    }
    Ok(to_json(&Consumers { consumers, page }))
}

/// `GET /v1/consumers/N`.
#[utoipa::path(get, path = "/v1/consumers/{name}", operation_id = "getConsumer",
    description = "Returns a consumer and its lag.", tag = "consumers",
    params(("name" = String, Path, pattern = "^[A-Za-z0-9._:-]{1,128}$")),
    responses(
        (status = 200, description = "The consumer, with its lag in each channel.", body = Consumer),
        (status = "4XX", description = "`not_found`, `forbidden`", body = ProblemSchema, content_type = "application/problem+json"),
        (status = "5XX", description = "`bus_unavailable`", body = ProblemSchema, content_type = "application/problem+json"),
    ),
)]
pub(crate) async fn get(State(node): State<Arc<Node>>, identity: Identity, head: Parts) -> Result<Response> {
    Query::parse(head.uri.query())?.finish()?;
    let name = name(&head, "")?;
    let _ = identity.may_consume(&name)?;
    let consumer = node.bus.consumer(&name).await?.ok_or_else(|| unknown(&name))?;
    Ok(to_json(&Consumer::of(&node, &identity, consumer).await?))
}

/// `POST /v1/consumers/N/commit`.
#[utoipa::path(post, path = "/v1/consumers/{name}/commit", operation_id = "commitConsumer", tag = "consumers",
    description = "Commits: moves the cursors forward. A position older than the cursor has no effect.",
    params(("name" = String, Path, pattern = "^[A-Za-z0-9._:-]{1,128}$")),
    request_body = Commit,
    responses(
        (status = 204, description = "Committed."),
        (status = "4XX", description = "`not_found`, `invalid_params`, `invalid_position`, `forbidden`", body = ProblemSchema, content_type = "application/problem+json"),
        (status = "5XX", description = "`bus_unavailable`", body = ProblemSchema, content_type = "application/problem+json"),
    ),
)]
pub(crate) async fn commit(
    State(node): State<Arc<Node>>,
    identity: Identity,
    request: Request<Body>,
) -> Result<StatusCode> {
    let (name, Commit { after, channels }) = read(&node, request, "/commit").await?;
    let _ = identity.may_consume(&name)?;
    let channels = channels.map(|names| names.iter().map(|name| Channel::parse(name)).collect::<Result<Vec<_>>>());
    reading::commit_named(&node.bus, &identity, &name, channels.transpose()?, &after).await?;
    Ok(StatusCode::NO_CONTENT)
}

/// `POST /v1/consumers/N/seek`.
#[utoipa::path(post, path = "/v1/consumers/{name}/seek", operation_id = "seekConsumer", tag = "consumers",
    description = "Moves one cursor to any position, also backward.",
    params(("name" = String, Path, pattern = "^[A-Za-z0-9._:-]{1,128}$")),
    request_body = Seek,
    responses(
        (status = 204, description = "The cursor is moved."),
        (status = "4XX", description = "`not_found`, `invalid_params`, `invalid_position`, `forbidden`", body = ProblemSchema, content_type = "application/problem+json"),
        (status = "5XX", description = "`bus_unavailable`", body = ProblemSchema, content_type = "application/problem+json"),
    ),
)]
pub(crate) async fn seek(
    State(node): State<Arc<Node>>,
    identity: Identity,
    request: Request<Body>,
) -> Result<StatusCode> {
    let (name, Seek { channel, after }) = read(&node, request, "/seek").await?;
    let channel = Channel::parse(&channel)?;
    let _ = identity.may_consume(&name)?;
    let _ = identity.may_subscribe(&channel)?;
    if node.bus.consumer(&name).await?.is_none() {
        return Err(unknown(&name));
    }
    let start = StartParam::After(after).starts(std::slice::from_ref(&channel), Start::Earliest)?[0];
    let at = match start {
        // Stored unmodified: if there is a gap, the next read reports it.
        Start::After(position) => {
            reading::check_ahead(&node.bus, &channel, position).await?;
            position
        }
        start => node.bus.locate(&channel, start).await?.0,
    };
    node.bus.seek(&name, &channel, at).await?;
    Ok(StatusCode::NO_CONTENT)
}

/// `DELETE /v1/consumers/N`.
#[utoipa::path(delete, path = "/v1/consumers/{name}", operation_id = "deleteConsumer",
    description = "Deletes a consumer and its cursors. With admin.listen set, only that listener serves it.", tag = "consumers",
    params(("name" = String, Path, pattern = "^[A-Za-z0-9._:-]{1,128}$")),
    responses(
        (status = 204, description = "The consumer is deleted."),
        (status = "4XX", description = "`not_found`, `forbidden`", body = ProblemSchema, content_type = "application/problem+json"),
        (status = "5XX", description = "`bus_unavailable`", body = ProblemSchema, content_type = "application/problem+json"),
    ),
)]
pub(crate) async fn delete(State(node): State<Arc<Node>>, identity: Identity, head: Parts) -> Result<StatusCode> {
    Query::parse(head.uri.query())?.finish()?;
    let name = name(&head, "")?;
    let _ = identity.may_consume(&name)?;
    match node.bus.forget(&name).await? {
        true => Ok(StatusCode::NO_CONTENT),
        false => Err(unknown(&name)),
    }
}

/// A position to commit.
#[derive(Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
struct Commit {
    /// A position, or a token of all channels of the consumer or of `channels`.
    #[schema(pattern = r"^((0|[A-Zab-vx-z0-9_-][A-Za-z0-9_-]{4}[B-Za-z0-9_-])-[0-9]{1,19}|w[A-Za-z0-9_-]{11,2047})$")]
    after: String,
    /// The channels of the token. Default: all channels of the consumer.
    #[schema(nullable = false, min_items = 1, value_type = Option<Vec<ChannelName>>)]
    channels: Option<Vec<String>>,
}

/// The new position of a cursor.
#[derive(Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
struct Seek {
    #[schema(value_type = ChannelName)]
    channel: String,
    #[schema(value_type = After)]
    after: String,
}

#[derive(Serialize, ToSchema)]
struct Consumers {
    consumers: Vec<Consumer>,
    #[schema(nullable = false)]
    #[serde(skip_serializing_if = "Option::is_none")]
    page: Option<String>,
}

/// A named reader.
#[derive(Serialize, ToSchema)]
struct Consumer {
    #[schema(value_type = String)]
    name: Box<str>,
    #[schema(example = "cursor")]
    mode: &'static str,
    channels: Vec<Lag>,
    /// The time of the last use, Unix time in milliseconds.
    seen: u64,
    /// The time at which it is deleted if it stays unused, Unix time in milliseconds.
    expires: u64,
}

/// The cursor of a consumer in one channel.
#[derive(Serialize, ToSchema)]
struct Lag {
    channel: String,
    #[schema(value_type = String)]
    position: Position,
    #[schema(value_type = String)]
    top: Position,
    /// The number of unread events.
    lag: u64,
    /// The age of the oldest unread event, in milliseconds.
    lag_ms: u64,
}

impl Consumer {
    /// Cursors of channels that the client may not read are left out.
    async fn of(node: &Node, identity: &Identity, consumer: ConsumerInfo) -> Result<Self> {
        let mut channels = Vec::with_capacity(consumer.cursors.len());
        for (channel, position) in &consumer.cursors {
            if identity.may_subscribe(channel).is_ok() {
                channels.push(Lag::of(node, channel, *position).await?);
            }
        }
        let ConsumerInfo { name, seen, expires, .. } = consumer;
        Ok(Consumer { name, mode: "cursor", channels, seen, expires })
    }
}

/// Updates the metrics of the lag of consumers.
pub(crate) async fn observe_lag(node: &Node) -> Result<()> {
    let consumers = node.bus.consumers("", None, MAX_OBSERVED).await?;
    let cursors: Vec<_> = consumers.iter().flat_map(|consumer| consumer.cursors.iter()).take(MAX_OBSERVED).collect();
    let mut lags: Vec<Lag> = Vec::with_capacity(cursors.len());
    for some in cursors.chunks(64) {
        let mut reads = Vec::with_capacity(some.len());
        for (channel, position) in some {
            reads.push(Lag::of(node, channel, *position));
        }
        lags.extend(try_join_all(reads).await?);
    }
    node.metrics.consumers.set(consumers.len() as i64);
    node.metrics.consumer_lag.set(lags.iter().map(|lag| lag.lag).max().unwrap_or(0) as i64);
    node.metrics.consumer_lag_seconds.set(lags.iter().map(|lag| lag.lag_ms).max().unwrap_or(0) as i64 / 1000);
    Ok(())
}

impl Lag {
    async fn of(node: &Node, channel: &Channel, position: Position) -> Result<Self> {
        let bus = &node.bus;
        // The oldest unread event, which may be after a gap.
        let page = bus.read(channel, Start::After(position), ReadLimit { events: 1, bytes: 0 }, None).await?;
        let info = bus.inspect(channel).await?;
        let top = bus.head(channel).await?;
        let (lag, lag_ms) = match page.events.first() {
            Some(event) => (info.top.saturating_sub(event.offset) + 1, bus.now().saturating_sub(event.time)),
            None => (0, 0),
        };
        Ok(Lag { channel: channel.as_str().to_owned(), position, top, lag, lag_ms })
    }
}

async fn read<T: DeserializeOwned>(node: &Node, request: Request<Body>, action: &str) -> Result<(String, T)> {
    let (head, body) = request.into_parts();
    check_declared_json(&head.headers)?;
    Query::parse(head.uri.query())?.finish()?;
    let name = name(&head, action)?;
    let body = read_body(body, MAX_BODY, "64 KiB", node.config.limits.body_time).await?;
    let text = json_text(&body)?;
    let read = serde_json::from_str(&well_formed(text)).map_err(|error| json_error_at_path::<T>(text, &error))?;
    Ok((name, read))
}

/// The name in `/v1/consumers/NAME`, before `action`.
fn name(head: &Parts, action: &str) -> Result<String> {
    let path = head.uri.path();
    let name = path.strip_prefix("/v1/consumers/").and_then(|rest| rest.strip_suffix(action)).unwrap_or_default();
    decode(name, false).map(Cow::into_owned)
}

fn unknown(name: &str) -> Error {
    Error::new(Code::NotFound, format!("there is no consumer {name}"))
}
