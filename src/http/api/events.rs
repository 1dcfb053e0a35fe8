//! `/v1/events`: publish, read, trim and delete.

use std::{fmt, sync::Arc};

use axum::{
    body::{Body, Bytes},
    extract::State,
    http::{Method, Request, StatusCode, request::Parts},
    response::{IntoResponse, Response},
};
use http::{HeaderName, HeaderValue, header};
use serde::{
    Deserializer,
    de::{SeqAccess, Visitor},
};
use serde_json::value::RawValue;

use super::{super::error::problem, json};
use crate::{
    auth::{AdminOperation, Identity},
    channel::Channel,
    error::{Code, Error, Result},
    event::{self, Draft, EventData, IncomingEvent},
    http::{
        extract::{check_declared_json, header_text, is_json, is_ndjson, read_body},
        schema::{self, PageSchema, ProblemSchema, Published},
    },
    json::{JsonStr, json_error, json_error_at_path, json_text},
    metrics::Transport,
    net::{body::not_generated, server::PeerAddr},
    node::Node,
    position::Position,
    sessions,
    transport::{
        accept, publishing,
        query::Query,
        reading::{PageRequest, ReadPage},
        sse,
    },
};

static IDEMPOTENCY_KEY: HeaderName = HeaderName::from_static("idempotency-key");
static LAST_EVENT_ID: HeaderName = HeaderName::from_static("last-event-id");

/// A parsed publish request.
enum PublishRequest {
    /// The response is an object.
    One(Channel, Draft),
    /// The response is an array.
    Many(Vec<(Channel, Draft)>),
}

/// `POST /v1/events`.
#[utoipa::path(post, path = "/v1/events", operation_id = "publishEvents", tag = "events",
    description = "Publishes events. The body is an event, an array of events, or NDJSON. With the parameter `channel` the body is \
        the data of one event (a body that is not JSON becomes a JSON string, unless it is declared as JSON). A request with an \
        Origin or a Cookie must declare JSON. A body may have the Content-Encoding gzip or deflate.",
    params(schema::PublishQuery, ("Idempotency-Key" = Option<schema::LabelSchema>, Header, description = "The idempotency key of one event. An event with the same key and content within 5 minutes is not stored again.")),
    request_body(description = "The events to publish.", content((schema::PublishSchema = "application/json"), (String = "application/x-ndjson"))),
    responses(
        (status = 201, description = "The events are stored.", body = Published),
        (status = 200, description = "The idempotency key was already used for this event; the position is that of the first one.", body = Published),
        (status = "4XX", description = "`parse_error`, `invalid_request`, `invalid_params`, `forbidden`, `key_reused`, `too_large`, `unsupported_media_type`", body = ProblemSchema, content_type = "application/problem+json"),
        (status = "5XX", description = "`bus_unavailable`: the event was not stored. `unconfirmed`: the event may have been stored; retry with the same key. For several events, `placed` has a position or null for each.", body = ProblemSchema, content_type = "application/problem+json"),
    ),
)]
pub(crate) async fn publish_by_route(
    State(node): State<Arc<Node>>,
    identity: Identity,
    request: Request<Body>,
) -> Result<Response> {
    let (head, body) = request.into_parts();
    publish(&node, &identity, &head, body).await
}

/// As [`publish_by_route`].
pub(crate) async fn publish(node: &Node, identity: &Identity, head: &Parts, body: Body) -> Result<Response> {
    check_declared_json(&head.headers)?;
    let limits = &node.config.limits;
    let body = read_body(body, limits.publish_bytes, "limits.publish_bytes", limits.body_time).await?;
    let answer = match read(head, &body, node) {
        Ok(PublishRequest::One(channel, draft)) => publish_one(node, identity, channel, draft).await,
        Ok(PublishRequest::Many(events)) => publish_many(node, identity, events).await,
        Err(error) => Err(error),
    };
    answer.inspect_err(|error| node.metrics.publish_failed(error.code()))
}

async fn publish_one(node: &Node, identity: &Identity, channel: Channel, draft: Draft) -> Result<Response> {
    let subject = identity.may_publish(&channel, &draft)?.subject();
    let size = draft.size();
    let placed = node.bus.publish_one(subject, &channel, draft).await?;
    node.metrics.event_published(Transport::Http, placed.duplicate, size);
    let mut out = Vec::new();
    placed.write_json(&channel, &mut out);
    Ok(json(if placed.duplicate { StatusCode::OK } else { StatusCode::CREATED }, out))
}

async fn publish_many(node: &Node, identity: &Identity, events: Vec<(Channel, Draft)>) -> Result<Response> {
    // All channels are checked before any event is stored.
    for (channel, draft) in &events {
        let _ = identity.may_publish(channel, draft)?;
    }
    let published = publishing::publish_many(node, identity.subject(), Transport::Http, events).await;
    if let Some(error) = published.error {
        return Ok(problem(&error, None, Some(("placed", &published.json))));
    }
    let status = if published.all_repeated { StatusCode::OK } else { StatusCode::CREATED };
    Ok(json(status, published.json))
}

/// Parses a publish request in any of its forms.
fn read(head: &Parts, body: &Bytes, node: &Node) -> Result<PublishRequest> {
    let limit = node.config.limits.event;
    let header_key = header_text(&head.headers, &IDEMPOTENCY_KEY)?;
    let Some(query) = head.uri.query() else {
        return read_events(head, body, header_key, node);
    };
    let mut query = Query::parse(Some(query))?;
    let Some(channel) = query.channel()? else {
        query.finish().map_err(|error| match error.detail() {
            detail if detail.starts_with("unknown parameter") => {
                Error::params(format!("{detail}: without channel in the URL, the body is the whole event"))
            }
            _ => error,
        })?;
        return read_events(head, body, header_key, node);
    };
    let (kind, from, key) = (query.take("type")?, query.take("from")?, query.take("key")?);
    query.finish()?;
    let key = one_key(header_key, key.as_deref())?;
    // A body that is declared as JSON and is not would otherwise be stored as text, and every reader would fail on it.
    let declared = is_json(&head.headers) || is_ndjson(&head.headers);
    let data = match json_text(body).map(serde_json::from_str::<&RawValue>) {
        _ if body.is_empty() => EventData::None,
        Ok(Ok(json)) => EventData::Json(json),
        Ok(Err(error)) if declared => return Err(json_error(&error)),
        Err(error) if declared => return Err(error),
        _ => std::str::from_utf8(body).map_or(EventData::Bytes(body), EventData::Text),
    };
    let parts = event::DraftParts { kind: kind.as_deref(), from: from.as_deref(), meta: None, data, key };
    Ok(PublishRequest::One(channel, Draft::new(parts, limit)?))
}

/// Parses whole events: an object, an array, or newline-delimited JSON.
fn read_events(head: &Parts, body: &Bytes, header_key: Option<&str>, node: &Node) -> Result<PublishRequest> {
    let limits = &node.config.limits;
    let text = json_text(body)?;
    let lines = is_ndjson(&head.headers);
    let mut events = Vec::new();
    if text.trim_ascii_start().starts_with('[') && !lines {
        let mut reader = serde_json::Deserializer::from_str(text);
        events = reader
            .deserialize_seq(Events { most: limits.publish_events })
            .map_err(|error| json_error_at_path::<Vec<IncomingEvent<'_>>>(text, &error))?;
        reader.end().map_err(|error| json_error(&error))?;
    } else {
        let reader = serde_json::Deserializer::from_str(text).into_iter::<IncomingEvent<'_>>();
        for event in reader {
            let event = event.map_err(|error| match events.len() {
                0 => first(json_error_at_path::<IncomingEvent<'_>>(text, &error)),
                _ => json_error(&error),
            })?;
            events.push(event);
            if events.len() > limits.publish_events {
                break;
            }
        }
        if let [event] = &mut events[..]
            && !lines
        {
            let key = one_key(header_key, event.key.as_deref())?.map(str::to_owned);
            event.key = key.map(|key| JsonStr(key.into()));
            let (channel, draft) = event.draft(limits.event)?;
            return Ok(PublishRequest::One(channel, draft));
        }
    }
    if events.is_empty() {
        return Err(Error::new(Code::InvalidRequest, "the body has no event"));
    }
    if events.len() > limits.publish_events {
        let most = limits.publish_events;
        return Err(Error::new(Code::TooLarge, format!("more than {most} events (limits.publish_events)"))
            .with("limit", "limits.publish_events"));
    }
    if header_key.is_some() {
        return Err(Error::params(
            "Idempotency-Key applies to one event: with several events, each has its own member key",
        ));
    }
    let draft =
        |(at, event): (usize, &IncomingEvent<'_>)| event.draft(limits.event).map_err(|error| error.with("event", at));
    Ok(PublishRequest::Many(events.iter().enumerate().map(draft).collect::<Result<_>>()?))
}

/// Explains the parameter `channel` in the error of the first event, because the body may be meant as data only.
fn first(error: Error) -> Error {
    let detail = error.detail();
    if !(detail.starts_with("unknown field") || detail.starts_with("missing field `channel`")) {
        return error;
    }
    Error::params(format!(
        "{detail}; with ?channel=NAME in the URL the body is the data of the event, without it the whole event"
    ))
}

/// The idempotency key of the header or the member. If both are present, they must be equal.
fn one_key<'a>(header: Option<&'a str>, member: Option<&'a str>) -> Result<Option<&'a str>> {
    match (header, member) {
        (Some(header), Some(member)) if header != member => {
            Err(Error::params("Idempotency-Key and key differ: use one of them"))
        }
        (header, member) => Ok(header.or(member)),
    }
}

/// Deserializes at most one event more than the limit, and skips the rest, which bounds the memory.
struct Events {
    most: usize,
}

impl<'de> Visitor<'de> for Events {
    type Value = Vec<IncomingEvent<'de>>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an array of events")
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut array: A) -> Result<Self::Value, A::Error> {
        let mut events = Vec::new();
        while let Some(event) = array.next_element()? {
            events.push(event);
            if events.len() > self.most {
                while array.next_element::<serde::de::IgnoredAny>()?.is_some() {}
                break;
            }
        }
        Ok(events)
    }
}

/// `GET /v1/events`.
#[utoipa::path(get, path = "/v1/events", operation_id = "readEvents", tag = "events",
    description = "Reads events. With `wait` the request waits until there are events (long-poll). With `consumer` weir stores the cursor.",
    params(schema::ReadQuery, ("Last-Event-ID" = Option<schema::After>, Header, description = "Overrides `after`.")),
    responses(
        (status = 200, description = "A page of events. It is empty if there are none.", body = PageSchema),
        (status = "4XX", description = "`invalid_params`, `invalid_position`, `forbidden`, `limit_reached`", body = ProblemSchema, content_type = "application/problem+json"),
        (status = "5XX", description = "`bus_unavailable`", body = ProblemSchema, content_type = "application/problem+json"),
    ),
)]
pub(crate) async fn get_by_route(
    State(node): State<Arc<Node>>,
    identity: Identity,
    request: Request<Body>,
) -> Response {
    get(&node, &identity, &request.into_parts().0).await
}

/// As [`get_by_route`].
pub(crate) async fn get(node: &Arc<Node>, identity: &Identity, head: &Parts) -> Response {
    let answer = match sse::is_wanted(&head.headers) {
        true => sse::open(node, identity, head).await,
        false if accept::preference(&head.headers, "application/json").is_some_and(|json| json.quality == 0) => Err(
            Error::new(Code::NotAcceptable, "events are application/json or text/event-stream, which Accept excludes"),
        ),
        false => page(node, identity, head).await,
    };
    let mut answer = answer.unwrap_or_else(IntoResponse::into_response);
    answer.headers_mut().insert(header::VARY, HeaderValue::from_static("Accept"));
    answer
}

async fn page(node: &Node, identity: &Identity, head: &Parts) -> Result<Response> {
    let query = Query::parse(head.uri.query())?;
    let reading = PageRequest::from_query(query, header_text(&head.headers, &LAST_EVENT_ID)?, &node.config.limits)?;
    reading.permit(identity)?;
    if head.method == Method::HEAD {
        let mut answer = json(StatusCode::OK, Bytes::new());
        *answer.body_mut() = not_generated();
        return Ok(answer);
    }
    let answer = match reading.waits() {
        false => reading.read(&node.bus, &node.draining).await?,
        true => listed(node, identity, head, &reading).await?,
    };
    let mut out = Vec::new();
    reading.write_json(&answer, &mut out);
    answer.count(&node.metrics, Transport::Poll, out.len());
    Ok(json(StatusCode::OK, out))
}

/// Registers a read that may wait for as long as it waits, so that it is listed and can be kicked.
async fn listed(node: &Node, identity: &Identity, head: &Parts, reading: &PageRequest) -> Result<ReadPage> {
    let mut waiting =
        node.cluster_connections.local().register_read(identity, PeerAddr::of(head), reading.channels().to_vec());
    tokio::select! {
        biased;
        answer = reading.read(&node.bus, &node.draining) => answer,
        code = waiting.kicked() => Err(sessions::closed(code)),
    }
}

/// `DELETE /v1/events`.
#[utoipa::path(delete, path = "/v1/events", operation_id = "deleteEvents", tag = "administration",
    description = "Trims a channel, or deletes its log.",
    params(schema::DeleteQuery),
    responses(
        (status = 204, description = "The events are deleted."),
        (status = "4XX", description = "`not_found` (the channel has no log), `invalid_params`, `invalid_position`, `forbidden`", body = ProblemSchema, content_type = "application/problem+json"),
        (status = "5XX", description = "`bus_unavailable`", body = ProblemSchema, content_type = "application/problem+json"),
    ),
)]
pub(crate) async fn delete(State(node): State<Arc<Node>>, identity: Identity, head: Parts) -> Result<StatusCode> {
    let mut query = Query::parse(head.uri.query())?;
    let channel = query.one_channel()?;
    let before = query.take("before")?;
    query.finish()?;
    let before = match before {
        Some(text) => Some(text.parse::<Position>().map_err(|_| {
            Error::new(Code::InvalidPosition, "before is the position of the first event to keep, as EPOCH-OFFSET")
        })?),
        None => None,
    };
    let _ = identity.may_administer(AdminOperation::DeleteEvents)?;
    let _ = identity.may_write(&channel)?;
    if node.bus.inspect(&channel).await?.epoch.is_absent() {
        return Err(Error::new(Code::NotFound, format!("channel {channel} has no log")));
    }
    node.bus.remove(&channel, before).await?;
    Ok(StatusCode::NO_CONTENT)
}
