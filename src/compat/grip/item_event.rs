//! Converts items to events and back.
//!
//! One complete SSE block becomes an event with its type and data; any other text is the data of an event of type `grip`.
//! Usually the published bytes can be derived from the event. What cannot be derived (ids, another notation, content for
//! response holds) is an [`ItemRecord`] in the event's `meta`, so that it is available on every node, in every backend and
//! after a restart.

use std::{borrow::Cow, collections::BTreeMap};

use base64::{Engine, engine::general_purpose::STANDARD as BASE64};
use http::{HeaderMap, HeaderName, HeaderValue, StatusCode};
use serde::{Deserialize, Serialize};
use serde_json::{
    Value,
    value::{RawValue, to_raw_value},
};

use super::{
    item::{FormatAction, ItemBody, ItemResponse, PublishItem},
    patch,
};
use crate::{
    error::Result,
    event::{self, Draft, DraftParts, Event, EventData},
    json::read_json_str,
};

/// The member of `meta`. Its value is a string that contains JSON, because all values of `meta` are strings.
const META: &str = "weir.grip";
/// The type of items that are not an SSE block.
const DEFAULT_KIND: &str = "grip";

/// The parts of an item that its event's type and data do not contain.
#[derive(Clone, Debug, Default, Deserialize, Serialize)]
#[serde(default)]
pub(super) struct ItemRecord {
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) id: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) prev: Option<String>,
    #[serde(skip_serializing_if = "StreamContent::is_block")]
    pub(super) stream: StreamContent,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) response: Option<ResponseContent>,
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub(super) meta: BTreeMap<String, String>,
}

/// The content of an item for held streams. The names of the variants are a storage format.
#[derive(Clone, Debug, Default, Deserialize, PartialEq, Serialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum StreamContent {
    /// An SSE block: `event: <type>`, `data: <JSON>`.
    #[default]
    Block,
    /// An SSE block whose data is the text itself, not JSON.
    Plain,
    /// The data as bytes.
    Data,
    /// An SSE block in another notation, as published.
    Text(String),
    Nothing,
    Hint,
    Close,
}

/// The content of an item for held responses. The names of the variants are a storage format.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum ResponseContent {
    Hint,
    Send { code: u16, headers: Vec<(String, String)>, body: StoredBody },
}

#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum StoredBody {
    /// The data as bytes.
    Data,
    Text(String),
    Base64(String),
    Patch(Value),
}

/// The effect of an event on a held stream.
#[derive(Debug, PartialEq)]
pub(super) enum StreamItem<'a> {
    Bytes(Cow<'a, [u8]>),
    Nothing,
    Hint,
    Close,
}

// === item to event ===

/// The event of an item; `None` for an item without a supported format.
pub(super) fn draft(item: &PublishItem, key: Option<&str>, limit: usize) -> Result<Option<Draft>> {
    let mut record = ItemRecord {
        id: item.id.clone(),
        prev: item.prev_id.clone(),
        meta: item.meta.clone(),
        ..ItemRecord::default()
    };
    let mut parts = DraftParts { kind: Some(DEFAULT_KIND), key, ..DraftParts::default() };
    let block;
    match (&item.stream, &item.response) {
        (Some(FormatAction::Send(bytes)), _) => match SseBlock::read(bytes) {
            Some(read) => {
                block = read;
                parts.kind = block.kind;
                let json = serde_json::from_str::<&RawValue>(&block.data).ok();
                (parts.data, record.stream) = match json {
                    Some(json) => (EventData::Json(json), StreamContent::Block),
                    None => (EventData::Text(&block.data), StreamContent::Plain),
                };
                let mut canonical = Vec::with_capacity(bytes.len());
                write_block(block.kind, json.map_or(&*block.data, RawValue::get), &mut canonical);
                if canonical != *bytes {
                    // An SSE block is valid UTF-8.
                    record.stream = StreamContent::Text(String::from_utf8_lossy(bytes).into_owned());
                }
            }
            None => (parts.data, record.stream) = (data(bytes), StreamContent::Data),
        },
        (Some(FormatAction::Hint), _) => record.stream = StreamContent::Hint,
        (Some(FormatAction::Close), _) => record.stream = StreamContent::Close,
        (None, Some(FormatAction::Send(ItemResponse { body: ItemBody::Bytes(bytes), .. }))) => {
            (parts.data, record.stream) = (data(bytes), StreamContent::Nothing);
        }
        (None, Some(_)) => record.stream = StreamContent::Nothing,
        (None, None) => return Ok(None),
    }
    record.response = item
        .response
        .as_ref()
        .and_then(|response| ResponseContent::new(response, record.stream == StreamContent::Nothing));
    let meta = (!record.is_empty()).then(|| record.meta_json());
    parts.meta = meta.as_deref();
    Draft::own(parts, limit).map(Some)
}

fn data(bytes: &[u8]) -> EventData<'_> {
    std::str::from_utf8(bytes).map_or(EventData::Bytes(bytes), EventData::Text)
}

impl ItemRecord {
    fn is_empty(&self) -> bool {
        let ItemRecord { id, prev, stream, response, meta } = self;
        id.is_none() && prev.is_none() && stream.is_block() && response.is_none() && meta.is_empty()
    }

    fn meta_json(&self) -> Box<RawValue> {
        // Neither can fail: all values are strings and numbers.
        let text = serde_json::to_string(self).unwrap_or_default();
        to_raw_value(&BTreeMap::from([(META, text)])).unwrap_or_default()
    }

    /// The record in an event's `meta`, if any.
    pub(super) fn of(event: &Event) -> Option<Self> {
        #[derive(Deserialize)]
        struct RecordMeta<'a> {
            #[serde(rename = "weir.grip", borrow)]
            record: Option<Cow<'a, str>>,
        }
        let meta: RecordMeta<'_> = serde_json::from_str(event.meta_json()?).ok()?;
        serde_json::from_str(&meta.record?).ok()
    }
}

impl StreamContent {
    fn is_block(&self) -> bool {
        *self == StreamContent::Block
    }
}

impl ResponseContent {
    /// `is_data`: the body is the event's data.
    fn new(response: &FormatAction<ItemResponse>, is_data: bool) -> Option<Self> {
        let ItemResponse { code, headers, body } = match response {
            FormatAction::Send(response) => response,
            FormatAction::Hint => return Some(ResponseContent::Hint),
            // A held response cannot be closed without one.
            FormatAction::Close => return None,
        };
        let pair = |(name, value): (&HeaderName, &HeaderValue)| {
            (name.as_str().to_owned(), String::from_utf8_lossy(value.as_bytes()).into_owned())
        };
        let body = match body {
            ItemBody::Bytes(_) if is_data => StoredBody::Data,
            ItemBody::Bytes(bytes) => match std::str::from_utf8(bytes) {
                Ok(text) => StoredBody::Text(text.to_owned()),
                Err(_) => StoredBody::Base64(BASE64.encode(bytes)),
            },
            ItemBody::Patch(patch) => StoredBody::Patch(patch.clone()),
        };
        Some(ResponseContent::Send { code: code.as_u16(), headers: headers.iter().map(pair).collect(), body })
    }
}

// === event to item ===

/// The effect of an event with this record on a held stream.
pub(super) fn stream_item<'a>(event: &'a Event, record: Option<&'a ItemRecord>) -> StreamItem<'a> {
    let block = |data: &str| {
        let mut out = Vec::with_capacity(data.len() + 64);
        let kind = event.kind_json().map(text_of);
        write_block(kind.as_deref(), data, &mut out);
        StreamItem::Bytes(out.into())
    };
    match record.map_or(&StreamContent::Block, |record| &record.stream) {
        StreamContent::Block => block(event.data_json().or(event.data_base64()).unwrap_or_default()),
        StreamContent::Plain => block(&event.data_json().map_or(Cow::Borrowed(""), text_of)),
        StreamContent::Data => StreamItem::Bytes(bytes_of(event)),
        StreamContent::Text(text) => StreamItem::Bytes(text.as_bytes().into()),
        StreamContent::Nothing => StreamItem::Nothing,
        StreamContent::Hint => StreamItem::Hint,
        StreamContent::Close => StreamItem::Close,
    }
}

/// The response in an event for held responses; `None` for a hint. A patch is applied to `origin_body`.
pub(super) fn response_parts(
    event: &Event,
    content: &ResponseContent,
    origin_body: &[u8],
) -> Option<(StatusCode, HeaderMap, Vec<u8>)> {
    let ResponseContent::Send { code, headers, body } = content else { return None };
    let mut map = HeaderMap::new();
    for (name, value) in headers {
        if let (Ok(name), Ok(value)) = (HeaderName::try_from(name), HeaderValue::try_from(value)) {
            map.append(name, value);
        }
    }
    let body = match body {
        StoredBody::Data => bytes_of(event).into_owned(),
        StoredBody::Text(text) => text.as_bytes().to_vec(),
        StoredBody::Base64(text) => BASE64.decode(text).unwrap_or_default(),
        StoredBody::Patch(patch) => patch::apply(origin_body, patch).unwrap_or_else(|| origin_body.to_vec()),
    };
    Some((StatusCode::from_u16(*code).ok()?, map, body))
}

fn bytes_of(event: &Event) -> Cow<'_, [u8]> {
    match (event.data_json(), event.data_base64()) {
        (Some(json), _) => match text_of(json) {
            Cow::Borrowed(text) => text.as_bytes().into(),
            Cow::Owned(text) => text.into_bytes().into(),
        },
        (None, Some(base64)) => BASE64.decode(base64.trim_matches('"')).unwrap_or_default().into(),
        (None, None) => Cow::Borrowed(&[]),
    }
}

/// Decodes a JSON string; other JSON is returned unchanged.
fn text_of(json: &str) -> Cow<'_, str> {
    if json.starts_with('"') { read_json_str(json) } else { json.into() }
}

/// Writes an SSE block in the canonical notation.
fn write_block(kind: Option<&str>, data: &str, out: &mut Vec<u8>) {
    if let Some(kind) = kind {
        out.extend_from_slice(b"event: ");
        out.extend_from_slice(kind.as_bytes());
        out.push(b'\n');
    }
    out.extend_from_slice(b"data: ");
    out.extend_from_slice(data.as_bytes());
    out.extend_from_slice(b"\n\n");
}

/// One complete block of server-sent events.
#[derive(Debug, PartialEq)]
struct SseBlock<'a> {
    kind: Option<&'a str>,
    data: Cow<'a, str>,
}

impl<'a> SseBlock<'a> {
    /// `None` for an incomplete block, several blocks, a block without data, and types that are invalid for events.
    fn read(bytes: &'a [u8]) -> Option<Self> {
        let text = std::str::from_utf8(bytes).ok()?;
        let (mut kind, mut data, mut ended) = (None, None::<Cow<'a, str>>, false);
        for line in lines(text)? {
            if ended {
                return None;
            }
            let (field, value) = line.split_once(':').unwrap_or((line, ""));
            let value = value.strip_prefix(' ').unwrap_or(value);
            match field {
                "" if line.is_empty() => ended = true,
                "event" => kind = Some(value).filter(|kind| !kind.is_empty()),
                "data" => match &mut data {
                    None => data = Some(value.into()),
                    Some(data) => {
                        data.to_mut().push('\n');
                        data.to_mut().push_str(value);
                    }
                },
                // Comments, ids and retry times are not part of the event.
                _ => {}
            }
        }
        (ended && kind.is_none_or(|kind| event::check_kind(kind).is_ok())).then_some(())?;
        Some(SseBlock { kind, data: data? })
    }
}

/// The lines of a text; `None` if the last line is not terminated.
fn lines(text: &str) -> Option<impl Iterator<Item = &str>> {
    if !text.ends_with(['\n', '\r']) {
        return None;
    }
    let mut rest = text;
    Some(std::iter::from_fn(move || {
        let end = rest.find(['\n', '\r'])?;
        let line = &rest[..end];
        rest = rest[end..].strip_prefix("\r\n").unwrap_or(&rest[end + 1..]);
        Some(line)
    }))
}
