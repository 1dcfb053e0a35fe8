//! Schemas of the OpenAPI document for what serde neither reads nor writes: query parameters are parsed by hand, and
//! events, pages and problems are written by hand. All other types derive their schema where they are defined. A test
//! compares the responses of a running server with the document.

#![expect(dead_code, reason = "schemas of the document")]

use std::collections::BTreeMap;

use serde_json::Value;
use utoipa::{IntoParams, ToSchema};

// === names and positions ===

/// 1 to 255 bytes of UTF-8 without control characters.
#[derive(ToSchema)]
#[schema(min_length = 1, max_length = 255, pattern = r"^[^\x00-\x1f\x7f-\x9f]+$", example = "orders")]
pub(crate) struct ChannelName(String);

/// The name of a channel that clients can write to: 1 to 255 bytes. Channels whose name begins with `$` are read-only.
#[derive(ToSchema)]
#[schema(
    min_length = 1,
    max_length = 255,
    pattern = r"^[^$\x00-\x1f\x7f-\x9f][^\x00-\x1f\x7f-\x9f]*$",
    example = "orders"
)]
pub(crate) struct OwnChannelName(String);

/// The name of a channel with presence: 1 to 245 bytes. Channels whose name begins with `$` have no presence.
#[derive(ToSchema)]
#[schema(
    min_length = 1,
    max_length = 245,
    pattern = r"^[^$\x00-\x1f\x7f-\x9f][^\x00-\x1f\x7f-\x9f]*$",
    example = "chat"
)]
pub(crate) struct PresentChannelName(String);

/// The type of an event. Types that begin with `weir.` are reserved.
#[derive(ToSchema)]
#[schema(min_length = 1, max_length = 128, pattern = r"^(?!weir\.)[^\x00-\x1f\x7f-\x9f]+$", example = "created")]
pub(crate) struct TypeName(String);

/// 1 to 128 bytes of UTF-8 without control characters.
#[derive(ToSchema)]
#[schema(min_length = 1, max_length = 128, pattern = r"^[^\x00-\x1f\x7f-\x9f]+$")]
#[schema(as = Label)]
pub(crate) struct LabelSchema(String);

/// `EPOCH-OFFSET`.
#[derive(ToSchema)]
#[schema(pattern = r"^(0|[A-Zab-vx-z0-9_-][A-Za-z0-9_-]{4}[B-Za-z0-9_-])-[0-9]{1,19}$", example = "k3Vq7a-42")]
#[schema(as = Position)]
pub(crate) struct PositionSchema(String);

/// A position, a token (`next` of an earlier response), an offset, `earliest` or `now`.
#[derive(ToSchema)]
#[schema(
    pattern = r"^(earliest|now|[0-9]{1,19}|(0|[A-Zab-vx-z0-9_-][A-Za-z0-9_-]{4}[B-Za-z0-9_-])-[0-9]{1,19}|w[A-Za-z0-9_-]{11,2047})$",
    example = "k3Vq7a-42"
)]
pub(crate) struct After(String);

/// The `page` of the previous response.
#[derive(ToSchema)]
#[schema(pattern = "^([0-9a-f]{2})+$")]
pub(crate) struct PageName(String);

// === parameters ===

/// Query parameters of `POST /v1/events`.
#[derive(IntoParams)]
#[into_params(parameter_in = Query)]
pub(crate) struct PublishQuery {
    /// Publishes one event to this channel; the body is the data of the event.
    channel: Option<OwnChannelName>,
    /// The type of the event. Requires `channel`.
    r#type: Option<TypeName>,
    /// The sender of the event. Requires `channel`.
    from: Option<LabelSchema>,
    /// The idempotency key, equivalent to the header `Idempotency-Key`. Requires `channel`.
    key: Option<LabelSchema>,
}

/// Query parameters of `GET /v1/events`.
#[derive(IntoParams)]
#[into_params(parameter_in = Query)]
pub(crate) struct ReadQuery {
    /// The channel to read. Repeat the parameter for several channels; a comma is part of the name.
    #[param(min_items = 1, max_items = 100)]
    channel: Vec<ChannelName>,
    /// The position after which to read. Default: the oldest event. Excludes `last`.
    after: Option<After>,
    /// Starts this many events before the end of the channel. Excludes `after` and `consumer`.
    last: Option<u64>,
    /// Equivalent to the header `Last-Event-ID`; overrides `after`.
    last_event_id: Option<After>,
    /// Alias of `last_event_id`.
    #[param(rename = "lastEventId")]
    last_event_id_too: Option<After>,
    /// Returns only events of this type. Repeat the parameter for several types.
    r#type: Option<Vec<LabelSchema>>,
    /// The maximum number of events. Default: 100.
    #[param(minimum = 1, maximum = 1000)]
    limit: Option<u64>,
    /// How long to wait for events if there are none.
    #[param(pattern = "^([0-9]{1,4}ms|[1-4]?[0-9]s|5[0-5]s)$", example = "30s")]
    wait: Option<String>,
    /// The number of events to wait for, at most `limit`. Default: 1.
    #[param(minimum = 1, maximum = 1000)]
    min: Option<u64>,
    /// Reads from the cursor of this consumer. `after` commits that position first.
    #[param(pattern = "^[A-Za-z0-9._:-]{1,128}$")]
    consumer: Option<String>,
    /// The start of a new consumer. Default: `earliest`.
    #[param(pattern = "^(earliest|now)$")]
    start: Option<String>,
    /// `auto` commits the returned events with the read. Default: `manual`.
    #[param(pattern = "^(manual|auto)$")]
    commit: Option<String>,
}

/// Query parameters of `GET /v1/sse`.
#[derive(IntoParams)]
#[into_params(parameter_in = Query)]
pub(crate) struct StreamQuery {
    /// The channel to read. Repeat the parameter for several channels; a comma is part of the name.
    #[param(min_items = 1, max_items = 100)]
    channel: Vec<ChannelName>,
    /// The position after which to read. Default: `now`. An invalid position causes a gap `bad_position`, not an error.
    after: Option<After>,
    /// Starts this many events before the end of the channel. Excludes `after`.
    last: Option<u64>,
    /// Equivalent to the header `Last-Event-ID`; overrides `after`.
    last_event_id: Option<String>,
    /// Alias of `last_event_id`.
    #[param(rename = "lastEventId")]
    last_event_id_too: Option<String>,
    /// Returns only events of this type. Repeat the parameter for several types.
    r#type: Option<Vec<LabelSchema>>,
    /// `event` (default): `data:` holds the whole event. `data`: `event:` holds its type and `data:` its data.
    #[param(pattern = "^(event|data)$")]
    format: Option<String>,
    /// With several channels: writes an `id:` with every event.
    #[param(pattern = "^all$")]
    ids: Option<String>,
    /// The name under which this client is a presence member of the channels while the stream is open.
    present: Option<LabelSchema>,
    /// The `info` of the presence member: JSON of at most 1 KiB.
    info: Option<String>,
}

/// Query parameters of `DELETE /v1/events`.
#[derive(IntoParams)]
#[into_params(parameter_in = Query)]
pub(crate) struct DeleteQuery {
    channel: OwnChannelName,
    /// The position of the first event to keep. If absent, the whole log is deleted.
    before: Option<PositionSchema>,
}

/// Query parameters of every list.
#[derive(IntoParams)]
#[into_params(parameter_in = Query)]
pub(crate) struct ListQuery {
    /// Returns only names with this prefix.
    prefix: Option<String>,
    /// The maximum number of entries. Default: 100.
    #[param(minimum = 1, maximum = 1000)]
    limit: Option<u64>,
    page: Option<PageName>,
}

/// Filters of connections. A connection must match all of them.
#[derive(IntoParams)]
#[into_params(parameter_in = Query)]
pub(crate) struct ConnectionQuery {
    /// Returns only connections of this authenticated subject.
    #[param(min_length = 1)]
    subject: Option<String>,
    /// Returns only connections that read this channel.
    channel: Option<ChannelName>,
    /// Returns only the connection with this id.
    #[param(min_length = 1)]
    id: Option<String>,
}

/// Query parameters of lists without a prefix.
#[derive(IntoParams)]
#[into_params(parameter_in = Query)]
pub(crate) struct PageQuery {
    /// The maximum number of entries. Default: 100.
    #[param(minimum = 1, maximum = 1000)]
    limit: Option<u64>,
    page: Option<PageName>,
}

/// The connections to close. `subject` or `id` is required.
#[derive(IntoParams)]
#[into_params(parameter_in = Query)]
pub(crate) struct KickQuery {
    #[param(min_length = 1)]
    subject: Option<String>,
    #[param(min_length = 1)]
    id: Option<String>,
    /// Closes only connections that read this channel.
    channel: Option<ChannelName>,
}

/// Query parameters of `GET /v1/presence`.
#[derive(IntoParams)]
#[into_params(parameter_in = Query)]
pub(crate) struct PresenceQuery {
    channel: PresentChannelName,
    /// Returns only the number of members.
    count: Option<bool>,
    /// The maximum number of members. Default: 1,000.
    #[param(minimum = 1, maximum = 1000)]
    limit: Option<u64>,
    page: Option<PageName>,
}

/// Query parameters of `GET /v1/channels` in addition to those of a list.
#[derive(IntoParams)]
#[into_params(parameter_in = Query)]
pub(crate) struct ChannelQuery {
    /// Returns this channel instead of a list. Excludes the other parameters.
    channel: Option<ChannelName>,
}

// === bodies ===

/// A stored event.
#[derive(ToSchema)]
#[schema(as = Event)]
pub(crate) struct EventSchema {
    #[schema(min_length = 1, max_length = 255)]
    channel: String,
    /// The epoch of the channel's log.
    #[schema(example = "k3Vq00")]
    epoch: String,
    /// The number of the event in its channel, from 1, without holes.
    #[schema(minimum = 1, example = 42)]
    offset: u64,
    /// Unix time in milliseconds.
    time: u64,
    #[schema(nullable = false)]
    r#type: Option<String>,
    /// The sender, as stated by the publisher (not authenticated).
    #[schema(nullable = false)]
    from: Option<String>,
    #[schema(nullable = false)]
    meta: Option<BTreeMap<String, String>>,
    /// Any JSON. An absent member and null are different.
    data: Option<Value>,
    /// Instead of `data`, for bytes.
    #[schema(nullable = false)]
    data_base64: Option<String>,
}

/// An event to publish.
#[derive(ToSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct NewEvent {
    channel: OwnChannelName,
    #[schema(nullable = false)]
    r#type: Option<TypeName>,
    #[schema(nullable = false)]
    from: Option<LabelSchema>,
    /// Strings of at most 1 KiB in total. Names that begin with `weir.` are reserved.
    #[schema(nullable = false)]
    meta: Option<BTreeMap<String, String>>,
    data: Option<Value>,
    /// Instead of `data`, for bytes.
    #[schema(nullable = false, pattern = "^([A-Za-z0-9+/]{4})*$")]
    data_base64: Option<String>,
    /// The idempotency key. An event with the same key and content within 5 minutes is not stored again.
    #[schema(nullable = false)]
    key: Option<LabelSchema>,
}

/// The position at which an event was stored.
#[derive(ToSchema)]
#[schema(as = Placed)]
pub(crate) struct PlacedSchema {
    channel: String,
    epoch: String,
    #[schema(minimum = 1)]
    offset: u64,
    time: u64,
    /// True if the key was already used for the same event. This is the position of the first one.
    #[schema(nullable = false)]
    duplicate: Option<bool>,
}

/// An object for one event, an array for an array or NDJSON.
#[derive(ToSchema)]
#[serde(untagged)]
pub(crate) enum Published {
    One(PlacedSchema),
    Many(Vec<PlacedSchema>),
}

/// One event or an array of events. With the parameter `channel`, the body is instead the data of one event.
#[derive(ToSchema)]
#[serde(untagged)]
#[schema(as = Publish)]
pub(crate) enum PublishSchema {
    One(NewEvent),
    Many(NewEvents),
}

/// Events that are stored in order, atomically per channel.
#[derive(ToSchema)]
#[schema(min_items = 1, max_items = 1000)]
pub(crate) struct NewEvents(Vec<NewEvent>);

/// The result of a read.
#[derive(ToSchema)]
#[schema(as = Page)]
pub(crate) struct PageSchema {
    events: Vec<EventSchema>,
    /// The value of `after` for the next read.
    next: String,
    /// Whether more events were available at the time of the read.
    more: bool,
    gaps: Vec<GapSchema>,
    #[schema(nullable = false)]
    consumer: Option<PageConsumer>,
}

/// The consumer of the read.
#[derive(ToSchema)]
pub(crate) struct PageConsumer {
    name: String,
    /// True if the consumer had no cursor: it is new, or weir has deleted it.
    #[schema(nullable = false)]
    new: Option<bool>,
    /// False if a position could not be stored, because Redis rejects writes for now: the events are delivered again.
    committed: Option<bool>,
}

/// Requested events that are no longer available.
#[derive(ToSchema)]
#[schema(as = Gap)]
pub(crate) struct GapSchema {
    channel: String,
    reason: GapReasonSchema,
    /// The position of the reader.
    #[schema(required)]
    after: Option<String>,
    /// The position of the next event.
    next: String,
    /// The number of missing events; null if unknown.
    #[schema(required)]
    missed: Option<u64>,
}

#[derive(ToSchema)]
#[schema(rename_all = "snake_case")]
#[schema(as = GapReason)]
pub(crate) enum GapReasonSchema {
    Trimmed,
    Budget,
    Reset,
    Failover,
    Deleted,
    BadPosition,
}

/// An error (RFC 9457). `code` is stable; a client that does not know a code uses the status.
#[derive(ToSchema)]
#[schema(as = Problem)]
pub(crate) struct ProblemSchema {
    #[schema(example = "urn:weir:error:invalid_params")]
    r#type: String,
    title: String,
    #[schema(minimum = 400, maximum = 599)]
    status: u16,
    detail: String,
    #[schema(example = "invalid_params")]
    code: String,
    /// Whether the request may have been executed: `no` or `maybe`.
    #[schema(nullable = false)]
    executed: Option<String>,
    #[schema(nullable = false)]
    retry_after_ms: Option<u64>,
}

/// The presence members of a channel.
#[derive(ToSchema)]
#[schema(as = Presence)]
pub(crate) struct PresenceSchema {
    channel: String,
    /// The number of all members, on this page or not.
    count: u64,
    /// Read `$presence/CHANNEL` after this position to keep the list up to date. Absent while the bus is unavailable.
    #[schema(nullable = false)]
    position: Option<String>,
    /// The members, sorted by name. Absent with `count=true`.
    #[schema(nullable = false)]
    members: Option<Vec<PresentMember>>,
    /// Present if there are more entries: the value of the parameter `page` for the next request.
    #[schema(nullable = false)]
    page: Option<String>,
}

/// A client with a subscription that has presence.
#[derive(ToSchema)]
pub(crate) struct PresentMember {
    client: String,
    /// The subject of its credentials.
    subject: String,
    #[schema(example = "sse")]
    transport: String,
    /// Any JSON, as sent by the client.
    info: Option<Value>,
    /// Unix time in milliseconds.
    since: u64,
}

/// Params of a call. They are optional.
#[derive(ToSchema)]
#[serde(untagged)]
pub(crate) enum Params {
    Named(BTreeMap<String, Value>),
    Positional(Vec<Value>),
}
