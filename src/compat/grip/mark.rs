//! An item as an event, and back: what every other world reads of it, and the publisher's own bytes.
//!
//! One whole block of server-sent events becomes an event with its type and its data; anything else is an event of type
//! `grip` whose data is the text. Nearly always the bytes follow from that event, and nothing more is kept. What does not
//! follow (ids, another spelling, an answer to held responses) is a [`Mark`] in the event's `meta`, so that it is where
//! the event is: on every node, in every backend, and after a restart of this one.

use std::{borrow::Cow, collections::BTreeMap};

use base64::{Engine, engine::general_purpose::STANDARD as BASE64};
use http::{HeaderMap, HeaderName, HeaderValue, StatusCode};
use serde::{Deserialize, Serialize};
use serde_json::{
    Value,
    value::{RawValue, to_raw_value},
};

use super::item::{Action, Body, Item, Response};
use crate::{
    error::Result,
    event::{self, Draft, DraftParts, Event, EventData},
};

/// The member of `meta`. Its value is text, as all of `meta` is: of JSON.
const META: &str = "weir.grip";
/// The type of what is no block of server-sent events.
const KIND: &str = "grip";

/// What an item says beside its type and data.
#[derive(Clone, Debug, Default, Deserialize, Serialize)]
#[serde(default)]
pub struct Mark {
    #[serde(skip_serializing_if = "Option::is_none")]
    pub id: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub prev: Option<String>,
    #[serde(skip_serializing_if = "Stream::is_block")]
    pub stream: Stream,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub response: Option<Answer>,
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub meta: BTreeMap<String, String>,
}

/// What held streams get.
#[derive(Clone, Debug, Default, Deserialize, PartialEq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Stream {
    /// A block: `event: <type>`, `data: <JSON>`.
    #[default]
    Block,
    /// A block whose data is the text itself, and not JSON.
    Plain,
    /// The data as bytes.
    Data,
    /// A block in another spelling, as it was spelled.
    Text(String),
    Nothing,
    Hint,
    Close,
}

/// What held responses get.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Answer {
    Hint,
    Send { code: u16, headers: Vec<(String, String)>, body: Content },
}

#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Content {
    /// The data as bytes.
    Data,
    Text(String),
    Base64(String),
    Patch(Value),
}

/// What one event is to a held stream.
#[derive(Debug, PartialEq)]
pub enum Said<'a> {
    Bytes(Cow<'a, [u8]>),
    Nothing,
    Hint,
    Close,
}

// === from an item to an event ===

/// The event that an item becomes; none for an item in no format that weir knows.
pub fn draft(item: &Item, key: Option<&str>, limit: usize) -> Result<Option<Draft>> {
    let mut mark = Mark { id: item.id.clone(), prev: item.prev_id.clone(), meta: item.meta.clone(), ..Mark::default() };
    let mut parts = DraftParts { kind: Some(KIND), key, ..DraftParts::default() };
    let block;
    match (&item.stream, &item.response) {
        (Some(Action::Send(bytes)), _) => match Block::read(bytes) {
            Some(read) => {
                block = read;
                parts.kind = block.kind;
                let json = serde_json::from_str::<&RawValue>(&block.data).ok();
                (parts.data, mark.stream) = match json {
                    Some(json) => (EventData::Json(json), Stream::Block),
                    None => (EventData::Text(&block.data), Stream::Plain),
                };
                let mut spelled = Vec::with_capacity(bytes.len());
                spell(block.kind, json.map_or(&*block.data, RawValue::get), &mut spelled);
                if spelled != *bytes {
                    // A block is text.
                    mark.stream = Stream::Text(String::from_utf8_lossy(bytes).into_owned());
                }
            }
            None => (parts.data, mark.stream) = (data(bytes), Stream::Data),
        },
        (Some(Action::Hint), _) => mark.stream = Stream::Hint,
        (Some(Action::Close), _) => mark.stream = Stream::Close,
        (None, Some(Action::Send(Response { body: Body::Bytes(bytes), .. }))) => {
            (parts.data, mark.stream) = (data(bytes), Stream::Nothing);
        }
        (None, Some(_)) => mark.stream = Stream::Nothing,
        (None, None) => return Ok(None),
    }
    mark.response = item.response.as_ref().and_then(|response| Answer::new(response, mark.stream == Stream::Nothing));
    let meta = (!mark.is_empty()).then(|| mark.meta_json());
    parts.meta = meta.as_deref();
    Draft::own(parts, limit).map(Some)
}

fn data(bytes: &[u8]) -> EventData<'_> {
    std::str::from_utf8(bytes).map_or(EventData::Bytes(bytes), EventData::Text)
}

impl Mark {
    fn is_empty(&self) -> bool {
        let Mark { id, prev, stream, response, meta } = self;
        id.is_none() && prev.is_none() && stream.is_block() && response.is_none() && meta.is_empty()
    }

    fn meta_json(&self) -> Box<RawValue> {
        // Neither can fail: all of it is text, and numbers.
        let text = serde_json::to_string(self).unwrap_or_default();
        to_raw_value(&BTreeMap::from([(META, text)])).unwrap_or_default()
    }

    /// The mark of an event; none if it is as any other.
    pub fn of(event: &Event) -> Option<Mark> {
        #[derive(Deserialize)]
        struct Meta<'a> {
            #[serde(rename = "weir.grip", borrow)]
            mark: Option<Cow<'a, str>>,
        }
        let meta: Meta<'_> = serde_json::from_str(event.meta_json()?).ok()?;
        serde_json::from_str(&meta.mark?).ok()
    }
}

impl Stream {
    fn is_block(&self) -> bool {
        *self == Stream::Block
    }
}

impl Answer {
    /// `is_data`: the body is the event's data already.
    fn new(response: &Action<Response>, is_data: bool) -> Option<Self> {
        let Response { code, headers, body } = match response {
            Action::Send(response) => response,
            Action::Hint => return Some(Answer::Hint),
            // An answer has no end but to be given.
            Action::Close => return None,
        };
        let pair = |(name, value): (&HeaderName, &HeaderValue)| {
            (name.as_str().to_owned(), String::from_utf8_lossy(value.as_bytes()).into_owned())
        };
        let body = match body {
            Body::Bytes(_) if is_data => Content::Data,
            Body::Bytes(bytes) => match std::str::from_utf8(bytes) {
                Ok(text) => Content::Text(text.to_owned()),
                Err(_) => Content::Base64(BASE64.encode(bytes)),
            },
            Body::Patch(patch) => Content::Patch(patch.clone()),
        };
        Some(Answer::Send { code: code.as_u16(), headers: headers.iter().map(pair).collect(), body })
    }
}

// === from an event to bytes ===

/// What `event` is to a held stream, if `mark` is its own.
pub fn said<'a>(event: &'a Event, mark: Option<&'a Mark>) -> Said<'a> {
    let block = |data: &str| {
        let mut out = Vec::with_capacity(data.len() + 64);
        let kind = event.kind_json().map(text_of);
        spell(kind.as_deref(), data, &mut out);
        Said::Bytes(out.into())
    };
    match mark.map_or(&Stream::Block, |mark| &mark.stream) {
        Stream::Block => block(event.data_json().or(event.data_base64()).unwrap_or_default()),
        Stream::Plain => block(&event.data_json().map_or(Cow::Borrowed(""), text_of)),
        Stream::Data => Said::Bytes(bytes_of(event)),
        Stream::Text(text) => Said::Bytes(text.as_bytes().into()),
        Stream::Nothing => Said::Nothing,
        Stream::Hint => Said::Hint,
        Stream::Close => Said::Close,
    }
}

/// What a held response is answered with. `patched` is what the origin would have answered.
pub fn answer(event: &Event, answer: &Answer, patched: &[u8]) -> Option<(StatusCode, HeaderMap, Vec<u8>)> {
    let Answer::Send { code, headers, body } = answer else { return None };
    let mut map = HeaderMap::new();
    for (name, value) in headers {
        if let (Ok(name), Ok(value)) = (HeaderName::try_from(name), HeaderValue::try_from(value)) {
            map.append(name, value);
        }
    }
    let body = match body {
        Content::Data => bytes_of(event).into_owned(),
        Content::Text(text) => text.as_bytes().to_vec(),
        Content::Base64(text) => BASE64.decode(text).unwrap_or_default(),
        Content::Patch(patch) => super::patch::apply(patched, patch).unwrap_or_else(|| patched.to_vec()),
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

/// The string that a JSON text means; JSON that is no string is its own text.
fn text_of(json: &str) -> Cow<'_, str> {
    let Some(inner) = json.strip_prefix('"').and_then(|json| json.strip_suffix('"')) else { return json.into() };
    match memchr::memchr(b'\\', inner.as_bytes()) {
        None => inner.into(),
        // A lone surrogate is legal JSON and no string: it stays as it was written.
        Some(_) => serde_json::from_str::<String>(json).map_or(inner.into(), Cow::Owned),
    }
}

/// One block, as everybody writes it.
fn spell(kind: Option<&str>, data: &str, out: &mut Vec<u8>) {
    if let Some(kind) = kind {
        out.extend_from_slice(b"event: ");
        out.extend_from_slice(kind.as_bytes());
        out.push(b'\n');
    }
    out.extend_from_slice(b"data: ");
    out.extend_from_slice(data.as_bytes());
    out.extend_from_slice(b"\n\n");
}

/// One whole block of server-sent events.
#[derive(Debug, PartialEq)]
struct Block<'a> {
    kind: Option<&'a str>,
    data: Cow<'a, str>,
}

impl<'a> Block<'a> {
    /// Nothing if it is less than a block, or more than one, or has no data, or a type that events cannot have.
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
                // Comments, ids, times to retry: a reader of the event does without them.
                _ => {}
            }
        }
        (ended && kind.is_none_or(|kind| event::check_kind(kind).is_ok())).then_some(())?;
        Some(Block { kind, data: data? })
    }
}

/// The lines of a text that ends with one.
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
