//! The OpenAPI document. Operations are described at their handlers; here are the shapes they speak of.
//!
//! The shapes are for the document only, for no JSON passes through a struct on its way. A test compares what the
//! running server answers with them.

#![expect(dead_code, reason = "shapes in the document")]

use std::{collections::BTreeMap, sync::LazyLock};

use axum::response::Response;
use bytes::Bytes;
use http::StatusCode;
use serde_json::Value;
use utoipa::{OpenApi, ToSchema};

use super::{admin, api};

#[derive(OpenApi)]
#[openapi(
    info(
        title = "weir",
        description = "One bus, three transports. Streams are at `/v1/sse`, sockets at `/v1/ws`; neither can be said in OpenAPI.\n\n\
            Positions are `EPOCH-OFFSET`; durations are `500ms`, `5s`, `2m`; failures are problem documents (RFC 9457) with a stable `code`. \
            Unknown parameters are refused unless they begin with `_`.",
        license(name = "MIT OR Apache-2.0"),
    ),
    paths(
        api::events::publish,
        api::events::get,
        api::events::delete,
        api::channels::get,
        api::consumers::list,
        api::consumers::get,
        api::consumers::delete,
        api::consumers::commit,
        api::consumers::seek,
        api::services::list,
        api::services::call,
        api::jsonrpc::post,
        admin::live,
        admin::ready,
    ),
    components(schemas(Event, NewEvent, Placed, Page, Gap, Problem, Channel, Channels, Consumer, Consumers))
)]
struct Document;

/// `GET /openapi.json`.
pub async fn document() -> Response {
    static TEXT: LazyLock<Bytes> = LazyLock::new(|| Document::openapi().to_json().unwrap_or_default().into());
    api::json(StatusCode::OK, TEXT.clone())
}

/// An event in its place.
#[derive(ToSchema)]
pub struct Event {
    #[schema(min_length = 1, max_length = 255)]
    channel: String,
    /// Which life of the channel's log.
    #[schema(example = "k3Vq00")]
    epoch: String,
    /// Dense number in the channel, from 1.
    #[schema(minimum = 1, example = 42)]
    offset: u64,
    /// Unix milliseconds.
    time: u64,
    #[schema(nullable = false)]
    r#type: Option<String>,
    /// The publisher's claim.
    #[schema(nullable = false)]
    from: Option<String>,
    #[schema(nullable = false)]
    meta: Option<BTreeMap<String, String>>,
    /// Any JSON. Absent is not null.
    data: Option<Value>,
    /// Instead of `data`, for bytes.
    #[schema(nullable = false)]
    data_base64: Option<String>,
}

/// An event to publish.
#[derive(ToSchema)]
#[serde(deny_unknown_fields)]
pub struct NewEvent {
    /// 1 to 255 bytes without control characters. Names beginning with `$` are read-only.
    #[schema(min_length = 1, max_length = 60, pattern = "^[^$\\p{Cc}\\p{Cs}][^\\p{Cc}\\p{Cs}]*$", example = "orders")]
    channel: String,
    /// Types beginning with `weir.` are weir's own.
    #[schema(
        nullable = false,
        min_length = 1,
        max_length = 30,
        pattern = "^[A-Za-z][A-Za-z0-9_/-]*$",
        example = "created"
    )]
    r#type: Option<String>,
    #[schema(nullable = false, min_length = 1, max_length = 30, pattern = "^[^\\p{Cc}\\p{Cs}]+$")]
    from: Option<String>,
    /// Strings, at most 1 KiB.
    #[schema(nullable = false)]
    meta: Option<BTreeMap<String, Short>>,
    data: Option<Value>,
    /// A repeat with the same key and body within 5 minutes is not placed again.
    #[schema(nullable = false, min_length = 1, max_length = 30, pattern = "^[^\\p{Cc}\\p{Cs}]+$")]
    key: Option<String>,
}

#[derive(ToSchema)]
#[schema(max_length = 30, pattern = "^[A-Za-z0-9-]*$")]
pub struct Short(String);

/// Where an event was placed.
#[derive(ToSchema)]
pub struct Placed {
    channel: String,
    epoch: String,
    #[schema(minimum = 1)]
    offset: u64,
    time: u64,
    /// The key had been used for the same event: this is where that is.
    #[schema(nullable = false)]
    duplicate: Option<bool>,
}

/// One event gives one answer, an array or lines give an array.
#[derive(ToSchema)]
#[serde(untagged)]
pub enum Published {
    One(Placed),
    Many(Vec<Placed>),
}

/// One event or several. With `channel` in the URL instead: any body, which is the data.
#[derive(ToSchema)]
#[serde(untagged)]
pub enum Publish {
    One(NewEvent),
    Many(NewEvents),
}

/// Placed in order, one atomic step for each channel.
#[derive(ToSchema)]
#[schema(min_items = 1, max_items = 1000)]
pub struct NewEvents(Vec<NewEvent>);

/// What a read answers.
#[derive(ToSchema)]
pub struct Page {
    events: Vec<Event>,
    /// Give this as `after` next.
    next: String,
    /// There was more when this was read.
    more: bool,
    gaps: Vec<Gap>,
    #[schema(nullable = false)]
    consumer: Option<PageConsumer>,
}

/// The consumer that read.
#[derive(ToSchema)]
pub struct PageConsumer {
    name: String,
    /// It had no cursor: weir does not know it, or no longer.
    #[schema(nullable = false)]
    new: Option<bool>,
}

/// History that was asked for and is gone.
#[derive(ToSchema)]
pub struct Gap {
    channel: String,
    reason: GapReason,
    /// What the reader had.
    #[schema(required)]
    after: Option<String>,
    /// Position of the next event.
    next: String,
    /// How many events are missing, if it can be known.
    #[schema(required)]
    missed: Option<u64>,
}

#[derive(ToSchema)]
#[schema(rename_all = "snake_case")]
pub enum GapReason {
    Trimmed,
    Budget,
    Reset,
    Failover,
    Deleted,
    BadPosition,
}

/// A failure (RFC 9457). `code` is stable; clients that do not know it go by the status.
#[derive(ToSchema)]
pub struct Problem {
    #[schema(example = "urn:weir:error:invalid_params")]
    r#type: String,
    title: String,
    #[schema(minimum = 400, maximum = 599)]
    status: u16,
    detail: String,
    #[schema(example = "invalid_params")]
    code: String,
    /// Whether the work may have happened: `no` or `maybe`.
    #[schema(nullable = false)]
    executed: Option<String>,
    #[schema(nullable = false)]
    retry_after_ms: Option<u64>,
}

/// What is known of a channel. One that was never written is not an error: its epoch is `0`.
#[derive(ToSchema)]
pub struct Channel {
    channel: String,
    epoch: String,
    /// Oldest offset that can be read.
    first: u64,
    /// Newest offset.
    top: u64,
    bytes: u64,
    /// Subscriptions on this node.
    readers: u32,
    /// Of the newest event, Unix milliseconds.
    #[schema(required)]
    time: Option<u64>,
}

#[derive(ToSchema)]
pub struct Channels {
    channels: Vec<Channel>,
    /// There are more: give this as `page`.
    #[schema(nullable = false)]
    page: Option<String>,
}

/// `GET /v1/channels`: one if `channel` was given, else a list.
#[derive(ToSchema)]
#[serde(untagged)]
pub enum ChannelOrChannels {
    One(Channel),
    Many(Channels),
}

/// A named reader.
#[derive(ToSchema)]
pub struct Consumer {
    name: String,
    #[schema(example = "cursor")]
    mode: String,
    channels: Vec<Lag>,
    /// When it was last heard of, Unix milliseconds.
    seen: u64,
    /// When it will be forgotten if it is not heard of, Unix milliseconds.
    expires: u64,
}

/// How far a cursor is behind.
#[derive(ToSchema)]
pub struct Lag {
    channel: String,
    position: String,
    top: String,
    /// Events.
    lag: u64,
    /// Age of the oldest of them.
    lag_ms: u64,
}

#[derive(ToSchema)]
pub struct Consumers {
    consumers: Vec<Consumer>,
    #[schema(nullable = false)]
    page: Option<String>,
}

/// Params of a call; nothing will do as well.
#[derive(ToSchema)]
#[serde(untagged)]
pub enum Params {
    Named(BTreeMap<String, Value>),
    Positional(Vec<Value>),
}

#[derive(ToSchema)]
pub struct Services {
    services: Vec<Service>,
}

/// What can be called.
#[derive(ToSchema)]
pub struct Service {
    service: String,
    providers: u64,
    in_flight: u64,
    exclusive: bool,
    /// What the providers declared, if they did.
    #[schema(nullable = false)]
    methods: Option<Vec<String>>,
}
