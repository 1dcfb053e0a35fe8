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
use utoipa::{IntoParams, OpenApi, ToSchema};

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
        api::events::publish_by_route,
        api::events::get_by_route,
        api::events::delete,
        api::stream::get,
        api::channels::get,
        api::connections::list,
        api::connections::kick,
        api::consumers::list,
        api::consumers::get,
        api::consumers::delete,
        api::consumers::commit,
        api::consumers::seek,
        api::services::list,
        api::services::call,
        api::jsonrpc::post,
        api::presence::get,
        admin::live,
        admin::ready,
        admin::metrics,
        document,
    ),
    components(schemas(
        Event,
        NewEvent,
        Placed,
        Page,
        Gap,
        Problem,
        Channel,
        Channels,
        Consumer,
        Consumers,
        PresentChannelName
    ))
)]
struct Document;

/// `GET /openapi.json`.
#[utoipa::path(get, path = "/openapi.json", tag = "operations", description = "This document.",
    responses((status = 200, content_type = "application/json", body = BTreeMap<String, Value>)))]
pub async fn document() -> Response {
    static TEXT: LazyLock<Bytes> = LazyLock::new(|| {
        let mut document = serde_json::to_value(Document::openapi()).unwrap_or_default();
        let operations = document["paths"].as_object_mut().into_iter().flat_map(|paths| paths.values_mut());
        let operations = operations.filter_map(Value::as_object_mut).flat_map(|path| path.values_mut());
        operations.filter_map(|it| it.get_mut("parameters")?.as_array_mut()).flatten().for_each(never_null);
        document.to_string().into()
    });
    api::json(StatusCode::OK, TEXT.clone())
}

/// An optional parameter of a URL is absent or not, but never null as an optional member of JSON may be.
fn never_null(parameter: &mut Value) {
    let schema = &mut parameter["schema"];
    if let Some(types) = schema["type"].as_array() {
        schema["type"] = types[0].clone();
    }
    let described =
        schema["oneOf"].as_array().and_then(|either| either.iter().find(|one| one["type"] != "null")).cloned();
    if let Some(described) = described {
        *schema = described;
    }
}

// === names and positions, as exactly as a pattern can say ===

/// Bytes of UTF-8 are counted, without control characters.
#[derive(ToSchema)]
#[schema(min_length = 1, max_length = 255, pattern = r"^[^\x00-\x1f\x7f-\x9f]+$", example = "orders")]
pub struct ChannelName(String);

/// As every channel name; those beginning with `$` are read-only.
#[derive(ToSchema)]
#[schema(
    min_length = 1,
    max_length = 255,
    pattern = r"^[^$\x00-\x1f\x7f-\x9f][^\x00-\x1f\x7f-\x9f]*$",
    example = "orders"
)]
pub struct OwnChannelName(String);

/// As the name of a channel, of at most 245 bytes; those beginning with `$` have no presence.
#[derive(ToSchema)]
#[schema(
    min_length = 1,
    max_length = 245,
    pattern = r"^[^$\x00-\x1f\x7f-\x9f][^\x00-\x1f\x7f-\x9f]*$",
    example = "chat"
)]
pub struct PresentChannelName(String);

/// Types beginning with `weir.` are weir's own.
#[derive(ToSchema)]
#[schema(min_length = 1, max_length = 128, pattern = r"^(?!weir\.)[^\x00-\x1f\x7f-\x9f]+$", example = "created")]
pub struct TypeName(String);

/// Bytes of UTF-8 are counted, without control characters.
#[derive(ToSchema)]
#[schema(min_length = 1, max_length = 128, pattern = r"^[^\x00-\x1f\x7f-\x9f]+$")]
pub struct Label(String);

/// `EPOCH-OFFSET`.
#[derive(ToSchema)]
#[schema(pattern = r"^(0|[A-Zab-vx-z0-9_-][A-Za-z0-9_-]{4}[B-Za-z0-9_-])-[0-9]{1,19}$", example = "k3Vq7a-42")]
pub struct Position(String);

/// A position; a token, as an answer called it `next`; an offset; `earliest`; or `now`.
#[derive(ToSchema)]
#[schema(
    pattern = r"^(earliest|now|[0-9]{1,19}|(0|[A-Zab-vx-z0-9_-][A-Za-z0-9_-]{4}[B-Za-z0-9_-])-[0-9]{1,19}|w[A-Za-z0-9_-]{11,2047})$",
    example = "k3Vq7a-42"
)]
pub struct After(String);

/// What the last answer called `page`.
#[derive(ToSchema)]
#[schema(pattern = "^([0-9a-f]{2})+$")]
pub struct PageName(String);

// === parameters ===

/// Of `POST /v1/events`.
#[derive(IntoParams)]
#[into_params(parameter_in = Query)]
pub struct PublishQuery {
    /// The body is the data of one event of this channel.
    channel: Option<OwnChannelName>,
    /// With channel: the type of the event.
    r#type: Option<TypeName>,
    /// With channel: who sends it.
    from: Option<Label>,
    /// With channel: as Idempotency-Key.
    key: Option<Label>,
}

/// Of `GET /v1/events`.
#[derive(IntoParams)]
#[into_params(parameter_in = Query)]
pub struct ReadQuery {
    /// Repeated for several; commas are letters.
    #[param(min_items = 1, max_items = 100)]
    channel: Vec<ChannelName>,
    /// Where to go on; the oldest event if nothing is said. Excludes `last`.
    after: Option<After>,
    /// So many events before the newest. Excludes `after` and `consumer`.
    last: Option<u64>,
    /// As the header Last-Event-ID: wins over `after`.
    last_event_id: Option<After>,
    /// The same.
    #[param(rename = "lastEventId")]
    last_event_id_too: Option<After>,
    /// Only events of these types; repeated for several.
    r#type: Option<Vec<Label>>,
    /// Events, 100 if nothing is said.
    #[param(minimum = 1, maximum = 1000)]
    limit: Option<u64>,
    /// How long to wait if there is nothing.
    #[param(pattern = "^([0-9]{1,4}ms|[1-4]?[0-9]s|5[0-5]s)$", example = "30s")]
    wait: Option<String>,
    /// Events to wait for, at most `limit`.
    #[param(minimum = 1, maximum = 1000)]
    min: Option<u64>,
    /// Reads on from the cursor of this consumer; `after` commits first.
    #[param(pattern = "^[A-Za-z0-9._:-]{1,128}$")]
    consumer: Option<String>,
    /// Where a new consumer begins: `earliest` if nothing is said.
    #[param(pattern = "^(earliest|now)$")]
    start: Option<String>,
    /// `auto` commits what is handed out. `manual` if nothing is said.
    #[param(pattern = "^(manual|auto)$")]
    commit: Option<String>,
}

/// Of `GET /v1/sse`.
#[derive(IntoParams)]
#[into_params(parameter_in = Query)]
pub struct StreamQuery {
    /// Repeated for several; commas are letters.
    #[param(min_items = 1, max_items = 100)]
    channel: Vec<ChannelName>,
    /// Where to go on; what comes from now on if nothing is said. What cannot be read is a gap `bad_position`, not an error.
    after: Option<After>,
    /// So many events before the newest. Excludes `after`.
    last: Option<u64>,
    /// As the header Last-Event-ID: wins over `after`.
    last_event_id: Option<String>,
    /// The same.
    #[param(rename = "lastEventId")]
    last_event_id_too: Option<String>,
    /// Only events of these types; repeated for several.
    r#type: Option<Vec<Label>>,
    /// `event`: `data:` is the event. `data`: `event:` is its type, `data:` its data.
    #[param(pattern = "^(event|data)$")]
    format: Option<String>,
    /// With several channels: an `id:` for every event.
    #[param(pattern = "^all$")]
    ids: Option<String>,
    /// A client that is on these channels while the stream lasts.
    present: Option<Label>,
    /// JSON that others are to know of it, at most 1 KiB.
    info: Option<String>,
}

/// Of `DELETE /v1/events`.
#[derive(IntoParams)]
#[into_params(parameter_in = Query)]
pub struct DeleteQuery {
    channel: OwnChannelName,
    /// The first event to keep. Without it everything goes.
    before: Option<Position>,
}

/// Of every list.
#[derive(IntoParams)]
#[into_params(parameter_in = Query)]
pub struct ListQuery {
    /// Of the names.
    prefix: Option<String>,
    /// 100 if nothing is said.
    #[param(minimum = 1, maximum = 1000)]
    limit: Option<u64>,
    page: Option<PageName>,
}

/// Which connections are meant. All that is said has to fit.
#[derive(IntoParams)]
#[into_params(parameter_in = Query)]
pub struct ConnectionQuery {
    /// Of whom.
    subject: Option<String>,
    /// That read this channel.
    channel: Option<ChannelName>,
    /// Just this one.
    id: Option<String>,
}

/// Of lists without a prefix.
#[derive(IntoParams)]
#[into_params(parameter_in = Query)]
pub struct PageQuery {
    /// 100 if nothing is said.
    #[param(minimum = 1, maximum = 1000)]
    limit: Option<u64>,
    page: Option<PageName>,
}

/// Whose connections are to end: `subject` or `id` is needed.
#[derive(IntoParams)]
#[into_params(parameter_in = Query)]
pub struct KickQuery {
    subject: Option<String>,
    id: Option<String>,
    /// Only those that read this channel.
    channel: Option<ChannelName>,
}

/// Of `GET /v1/presence`.
#[derive(IntoParams)]
#[into_params(parameter_in = Query)]
pub struct PresenceQuery {
    channel: PresentChannelName,
    /// Only how many.
    count: Option<bool>,
    /// 1,000 if nothing is said.
    #[param(minimum = 1, maximum = 1000)]
    limit: Option<u64>,
    page: Option<PageName>,
}

/// Of `GET /v1/channels`, beside those of a list.
#[derive(IntoParams)]
#[into_params(parameter_in = Query)]
pub struct ChannelQuery {
    /// Just this one. Excludes the others.
    channel: Option<ChannelName>,
}

// === bodies ===

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
    channel: OwnChannelName,
    #[schema(nullable = false)]
    r#type: Option<TypeName>,
    #[schema(nullable = false)]
    from: Option<Label>,
    /// Strings, at most 1 KiB. Names beginning with `weir.` are refused.
    #[schema(nullable = false)]
    meta: Option<BTreeMap<String, String>>,
    data: Option<Value>,
    /// Instead of `data`, for bytes.
    #[schema(nullable = false, pattern = "^([A-Za-z0-9+/]{4})*$")]
    data_base64: Option<String>,
    /// A repeat with the same key and body within 5 minutes is not placed again.
    #[schema(nullable = false)]
    key: Option<Label>,
}

/// What a consumer acknowledges.
#[derive(ToSchema)]
#[serde(deny_unknown_fields)]
pub struct Commit {
    /// A position, or a token of all channels of the consumer or of `channels`.
    #[schema(pattern = r"^((0|[A-Zab-vx-z0-9_-][A-Za-z0-9_-]{4}[B-Za-z0-9_-])-[0-9]{1,19}|w[A-Za-z0-9_-]{11,2047})$")]
    after: String,
    /// What the token is of, if not all channels of the consumer.
    #[schema(nullable = false, min_items = 1)]
    channels: Option<Vec<ChannelName>>,
}

/// Where a cursor shall be.
#[derive(ToSchema)]
#[serde(deny_unknown_fields)]
pub struct Seek {
    channel: ChannelName,
    after: After,
}

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

/// Who is on a channel.
#[derive(ToSchema)]
pub struct Presence {
    channel: String,
    /// All members, shown or not.
    count: u64,
    /// Read `$presence/CHANNEL` after this to keep the list up to date. Absent while the bus is away.
    #[schema(nullable = false)]
    position: Option<String>,
    /// By name. Absent if only the count was asked for.
    #[schema(nullable = false)]
    members: Option<Vec<PresentMember>>,
    /// There are more: give this as `page`.
    #[schema(nullable = false)]
    page: Option<String>,
}

/// A client that holds a subscription.
#[derive(ToSchema)]
pub struct PresentMember {
    client: String,
    /// Who its credentials say it is.
    subject: String,
    #[schema(example = "sse")]
    transport: String,
    /// Any JSON, as the client gave it.
    info: Option<Value>,
    /// Unix milliseconds.
    since: u64,
}

/// A stream, a socket, or a read that waits.
#[derive(ToSchema)]
pub struct Connection {
    /// The node, and a number.
    id: String,
    node: String,
    #[schema(example = "ws")]
    transport: String,
    /// Who its credentials say it is.
    subject: String,
    /// Where it comes from, if that is known: the last proxy, if there are any.
    #[schema(required)]
    remote: Option<String>,
    /// Unix milliseconds.
    since: u64,
    /// How many channels it reads.
    channels: u64,
    /// What it provides.
    #[schema(nullable = false)]
    services: Option<Vec<String>>,
}

#[derive(ToSchema)]
pub struct Connections {
    connections: Vec<Connection>,
    /// There are more: give this as `page`.
    #[schema(nullable = false)]
    page: Option<String>,
    /// Nodes that did not answer within two seconds: theirs are missing.
    #[schema(nullable = false)]
    silent: Option<Vec<String>>,
}

#[derive(ToSchema)]
pub struct Kicked {
    /// Connections that were told to end.
    kicked: u64,
    /// Nodes that did not answer within two seconds: they may have kicked, or not.
    #[schema(nullable = false)]
    silent: Option<Vec<String>>,
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
