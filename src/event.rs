//! [`Event`], and [`Draft`], an event before the bus has placed it in a channel.
//!
//! An event is encoded once, when its draft is made, except for its epoch, offset and time, which the bus assigns. Every
//! wire format is that encoding with a prefix and a suffix.

use std::{borrow::Cow, collections::BTreeMap, fmt, hash::BuildHasher as _, ops::Range};

use base64::{Engine, engine::general_purpose::STANDARD as BASE64};
use serde_json::value::RawValue;

use crate::{
    channel::{Channel, check_label},
    error::{Code, Error, Result},
    json::{JsonStr, parse_json, write_json_line, write_json_str},
    position::{Epoch, Position},
};

mod incoming;

pub(crate) use incoming::IncomingEvent;

/// Largest `meta` object, in bytes of JSON.
pub(crate) const MAX_META: usize = 1024;
/// Members of `meta` that trace a request. Each attempt to publish an event has its own, so they are no part of what an
/// idempotency key stands for.
const TRACE_CONTEXT: [&str; 5] = ["traceparent", "tracestate", "baggage", "sentry-trace", "b3"];
/// Prefix of the types and the members of `meta` that clients may not use.
const OWN: &str = "weir.";

/// An event that the bus has not placed yet, validated and encoded.
#[derive(Clone, Debug)]
pub struct Draft {
    pub(crate) body: EncodedBody,
    pub(crate) key: Option<Box<str>>,
}

/// The parts of a [`Draft`], borrowed from the request.
#[derive(Clone, Copy, Debug, Default)]
pub struct DraftParts<'a> {
    pub kind: Option<&'a str>,
    pub from: Option<&'a str>,
    pub meta: Option<&'a RawValue>,
    pub data: EventData<'a>,
    pub key: Option<&'a str>,
}

/// The data of an event. Absent data and `null` are different.
#[derive(Clone, Copy, Debug, Default)]
pub enum EventData<'a> {
    #[default]
    None,
    Json(&'a RawValue),
    /// Becomes a JSON string.
    Text(&'a str),
    /// Travels as `data_base64`.
    Bytes(&'a [u8]),
}

/// A placed event. Immutable, shared by reference count.
#[derive(Debug)]
pub struct Event {
    pub epoch: Epoch,
    /// Dense number in the channel, from 1.
    pub offset: u64,
    /// Unix milliseconds, stamped by the bus; never decreases within an epoch.
    pub time: u64,
    body: EncodedBody,
}

/// Length of the header of a stored body, in bytes.
pub(crate) const STORED: usize = 11;

/// The encoded parts of an event that do not depend on its position, in one allocation:
/// `,"type":…,"from":…` then (from `tail`) `,"meta":…,"data":…}`.
#[derive(Clone)]
pub(crate) struct EncodedBody {
    bytes: Box<[u8]>,
    kind_end: u16,
    from_start: u16,
    tail: u16,
    data_start: u32,
    binary: bool,
}

// === impl Draft ===

impl Draft {
    /// Validates and encodes an event of a client. `limit` is the largest encoded size, in bytes.
    ///
    /// # Errors
    /// `invalid_params` or `too_large`.
    pub fn new(parts: DraftParts<'_>, limit: usize) -> Result<Self> {
        if let Some(kind) = parts.kind {
            check_kind(kind)?;
        }
        if let Some(meta) = parts.meta {
            check_meta(meta)?;
        }
        Self::own(parts, limit)
    }

    /// As [`new`](Self::new), for an event of weir or an adapter: its `type` and the members of its `meta` may begin with
    /// `weir.`, and `meta` may be larger.
    pub(crate) fn own(parts: DraftParts<'_>, limit: usize) -> Result<Self> {
        if let Some(from) = parts.from {
            check_label("from", from)?;
        }
        if let Some(key) = parts.key {
            check_label("key", key)?;
        }
        let body = EncodedBody::encode(&parts);
        if body.bytes.len() > limit {
            return Err(Error::new(
                Code::TooLarge,
                format!("the event has {} bytes encoded, limits.event is {limit}", body.bytes.len()),
            )
            .with("limit", "limits.event"));
        }
        Ok(Draft { body, key: parts.key.map(Into::into) })
    }

    /// Encoded size in bytes, without epoch, offset, time and channel.
    pub fn size(&self) -> usize {
        self.body.bytes.len()
    }

    /// `from`, if it has one.
    pub(crate) fn from(&self) -> Option<Cow<'_, str>> {
        parse_json::<JsonStr<'_>>(self.body.sender_text()?).ok().map(|text| text.0)
    }

    /// The body, and the idempotency key.
    pub(crate) fn parts(&self) -> (&EncodedBody, Option<&str>) {
        (&self.body, self.key.as_deref())
    }

    /// Makes the event, at its position.
    pub fn place(self, at: Position, time: u64) -> Event {
        Event { epoch: at.epoch, offset: at.offset, time, body: self.body }
    }
}

/// Validates the `type` of a client's event.
pub(crate) fn check_kind(kind: &str) -> Result<()> {
    check_label("type", kind)?;
    if kind.starts_with(OWN) {
        return Err(Error::params("types beginning with weir. are weir's own"));
    }
    Ok(())
}

/// Validates the `meta` of a client's event. Adapters trust the members that they store, so clients may not set those.
fn check_meta(meta: &RawValue) -> Result<()> {
    if meta.get().len() > MAX_META {
        return Err(Error::new(Code::TooLarge, format!("meta has at most {MAX_META} bytes")).with("limit", "meta"));
    }
    let members: BTreeMap<JsonStr<'_>, JsonStr<'_>> =
        serde_json::from_str(meta.get()).map_err(|_| Error::params("meta is an object of strings"))?;
    match members.keys().find(|name| name.starts_with(OWN)) {
        Some(name) => Err(Error::params(format!("meta.{}: members beginning with weir. are weir's own", &**name))),
        None => Ok(()),
    }
}

// === impl Event ===

impl Event {
    pub fn position(&self) -> Position {
        Position { epoch: self.epoch, offset: self.offset }
    }

    /// Encoded size in bytes, without epoch, offset, time and channel.
    pub fn size(&self) -> usize {
        self.body.bytes.len()
    }

    /// Reads a body that a backend stored. `None` if it is malformed.
    pub(crate) fn restore(at: Position, time: u64, stored: &[u8]) -> Option<Self> {
        Some(Event { epoch: at.epoch, offset: at.offset, time, body: EncodedBody::restore(stored)? })
    }

    /// `type`, as the JSON text of a string, quotes included.
    pub fn kind_json(&self) -> Option<&str> {
        const START: usize = r#","type":"#.len();
        (self.body.kind_end > 0).then(|| self.body.text(START..self.body.kind_end as usize))
    }

    /// `from`, as the JSON text of a string, quotes included.
    pub(crate) fn sender_json(&self) -> Option<&str> {
        self.body.sender_text()
    }

    /// `meta`, as JSON text.
    pub(crate) fn meta_json(&self) -> Option<&str> {
        self.body.meta().map(|meta| self.body.text(meta))
    }

    /// `data`, as JSON text. `None` if absent or binary.
    pub fn data_json(&self) -> Option<&str> {
        (self.body.data_start > 0 && !self.body.binary).then(|| self.data_text())
    }

    /// `data_base64`, as the JSON text of a string, quotes included.
    pub fn data_base64(&self) -> Option<&str> {
        (self.body.data_start > 0 && self.body.binary).then(|| self.data_text())
    }

    fn data_text(&self) -> &str {
        self.body.text(self.body.data_start as usize..self.body.bytes.len() - 1)
    }

    /// Appends the event as one line of JSON, as every transport shows it.
    pub fn write_json(&self, channel: &Channel, out: &mut Vec<u8>) {
        let (head, tail) = self.body.bytes.split_at(self.body.tail as usize);
        out.reserve(self.body.bytes.len() + channel.as_str().len() + 100);
        out.extend_from_slice(br#"{"channel":"#);
        write_json_str(channel.as_str(), out);
        out.extend_from_slice(br#","epoch":""#);
        out.extend_from_slice(&self.epoch.text());
        out.extend_from_slice(br#"","offset":"#);
        out.extend_from_slice(itoa::Buffer::new().format(self.offset).as_bytes());
        out.extend_from_slice(head);
        out.extend_from_slice(br#","time":"#);
        out.extend_from_slice(itoa::Buffer::new().format(self.time).as_bytes());
        out.extend_from_slice(tail);
    }
}

// === impl Body ===

impl EncodedBody {
    fn encode(parts: &DraftParts<'_>) -> Self {
        let estimate = 32
            + parts.kind.map_or(0, |kind| kind.len() + 10)
            + parts.from.map_or(0, |from| from.len() + 10)
            + parts.meta.map_or(0, |meta| meta.get().len() + 10)
            + match parts.data {
                EventData::None => 0,
                EventData::Json(json) => json.get().len(),
                EventData::Text(text) => text.len() + 2,
                EventData::Bytes(bytes) => bytes.len().div_ceil(3) * 4,
            };
        let mut out = Vec::with_capacity(estimate);
        let mut kind_end = 0;
        if let Some(kind) = parts.kind {
            out.extend_from_slice(br#","type":"#);
            write_json_str(kind, &mut out);
            kind_end = out.len() as u16;
        }
        let mut from_start = 0;
        if let Some(from) = parts.from {
            out.extend_from_slice(br#","from":"#);
            from_start = out.len() as u16;
            write_json_str(from, &mut out);
        }
        // At most 2 × (128 × 6 + 12) bytes: a u16 holds it.
        let tail = out.len() as u16;
        if let Some(meta) = parts.meta {
            out.extend_from_slice(br#","meta":"#);
            write_json_line(meta, &mut out);
        }
        let mut data_start = 0;
        let binary = matches!(parts.data, EventData::Bytes(_));
        match parts.data {
            EventData::None => {}
            EventData::Json(json) => {
                out.extend_from_slice(br#","data":"#);
                data_start = out.len() as u32;
                write_json_line(json, &mut out);
            }
            EventData::Text(text) => {
                out.extend_from_slice(br#","data":"#);
                data_start = out.len() as u32;
                write_json_str(text, &mut out);
            }
            EventData::Bytes(bytes) => {
                out.extend_from_slice(br#","data_base64":"#);
                data_start = out.len() as u32;
                out.push(b'"');
                out.extend_from_slice(BASE64.encode(bytes).as_bytes());
                out.push(b'"');
            }
        }
        out.push(b'}');
        EncodedBody { bytes: out.into_boxed_slice(), kind_end, from_start, tail, data_start, binary }
    }

    fn sender_text(&self) -> Option<&str> {
        (self.from_start > 0).then(|| self.text(self.from_start as usize..self.tail as usize))
    }

    /// Where the value of `meta` is.
    fn meta(&self) -> Option<Range<usize>> {
        const START: &[u8] = br#","meta":"#;
        let start = self.tail as usize;
        self.bytes[start..].starts_with(START).then_some(())?;
        let end = match (self.data_start as usize, self.binary) {
            (0, _) => self.bytes.len() - 1,
            (data, false) => data - r#","data":"#.len(),
            (data, true) => data - r#","data_base64":"#.len(),
        };
        Some(start + START.len()..end)
    }

    fn text(&self, range: Range<usize>) -> &str {
        // Only whole JSON values are cut out, and the text was UTF-8 when it was received.
        std::str::from_utf8(&self.bytes[range]).unwrap_or_default()
    }

    /// Appends the body as a backend stores it: the places of its parts, in big-endian order, then the parts.
    pub(crate) fn store(&self, out: &mut Vec<u8>) {
        out.reserve(STORED + self.bytes.len());
        for part in [self.kind_end, self.from_start, self.tail] {
            out.extend_from_slice(&part.to_be_bytes());
        }
        out.extend_from_slice(&self.data_start.to_be_bytes());
        out.push(self.binary.into());
        out.extend_from_slice(&self.bytes);
    }

    /// Reads the output of [`store`](Self::store). `None` if it is malformed.
    pub(crate) fn restore(stored: &[u8]) -> Option<Self> {
        let (head, bytes) = stored.split_at_checked(STORED)?;
        let part = |at: usize| u16::from_be_bytes([head[at], head[at + 1]]);
        let (kind_end, from_start, tail) = (part(0), part(2), part(4));
        let data_start = u32::from_be_bytes([head[6], head[7], head[8], head[9]]);
        let body = EncodedBody { bytes: bytes.into(), kind_end, from_start, tail, data_start, binary: head[10] != 0 };
        // Checked here because the accessors cut out the parts without further checks.
        let kind = kind_end == 0 || (8..=tail).contains(&kind_end);
        let from = from_start == 0 || (kind_end..=tail).contains(&from_start);
        let inside = (tail as usize) < bytes.len() && (data_start as usize) < bytes.len();
        (kind && from && inside && bytes.ends_with(b"}") && std::str::from_utf8(bytes).is_ok()).then_some(body)
    }

    /// A 64-bit hash of the content that an idempotency key stands for: everything but the trace context, and whatever
    /// the order of the members of `meta` is.
    pub(crate) fn fingerprint(&self) -> u64 {
        let meta = self.meta();
        let (head, rest) = self.bytes.split_at(self.tail as usize);
        let rest = meta.as_ref().map_or(rest, |meta| &self.bytes[meta.end..]);
        let members: BTreeMap<JsonStr<'_>, &RawValue> =
            meta.and_then(|meta| serde_json::from_str(self.text(meta)).ok()).unwrap_or_default();
        let is_content = |name: &&str| !TRACE_CONTEXT.iter().any(|trace| trace.eq_ignore_ascii_case(name));
        let members: Vec<(&str, &str)> =
            members.iter().map(|(name, value)| (&**name, value.get())).filter(|(name, _)| is_content(name)).collect();
        foldhash::quality::FixedState::with_seed(0x7765_6972).hash_one((head, members, rest))
    }
}

impl fmt::Debug for EncodedBody {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        String::from_utf8_lossy(&self.bytes).fmt(f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn raw(json: &str) -> &RawValue {
        serde_json::from_str(json).unwrap()
    }

    fn event(parts: DraftParts<'_>) -> Event {
        let at = Position { epoch: "k3Vq00".parse().unwrap(), offset: 42 };
        Draft::new(parts, 1_000_000).unwrap().place(at, 1763640000123)
    }

    fn json(event: &Event) -> String {
        let mut out = Vec::new();
        event.write_json(&Channel::parse("orders").unwrap(), &mut out);
        String::from_utf8(out).unwrap()
    }

    #[test]
    fn an_event_on_the_wire() {
        let event = event(DraftParts {
            kind: Some("created"),
            from: Some("shop/v1"),
            meta: Some(raw(r#"{"traceparent":"00-1"}"#)),
            data: EventData::Json(raw(r#"{"id":7}"#)),
            key: None,
        });
        assert_eq!(
            json(&event),
            r#"{"channel":"orders","epoch":"k3Vq00","offset":42,"type":"created","from":"shop/v1","time":1763640000123,"meta":{"traceparent":"00-1"},"data":{"id":7}}"#
        );
        assert_eq!(event.kind_json(), Some(r#""created""#));
        assert_eq!(event.sender_json(), Some(r#""shop/v1""#));
        assert_eq!(event.data_json(), Some(r#"{"id":7}"#));
        assert_eq!(event.meta_json(), Some(r#"{"traceparent":"00-1"}"#));
    }

    #[test]
    fn meta_is_found_before_any_data() {
        let meta = Some(raw(r#"{"a":"b"}"#));
        for data in [EventData::None, EventData::Text("x"), EventData::Bytes(b"\0"), EventData::Json(raw("null"))] {
            assert_eq!(event(DraftParts { meta, data, ..Default::default() }).meta_json(), Some(r#"{"a":"b"}"#));
            assert_eq!(event(DraftParts { data, ..Default::default() }).meta_json(), None);
        }
    }

    #[test]
    fn the_fingerprint_leaves_out_the_trace_context() {
        let print = |meta: Option<&str>| {
            let parts = DraftParts { meta: meta.map(raw), data: EventData::Text("x"), ..Default::default() };
            Draft::new(parts, 1000).unwrap().body.fingerprint()
        };
        let traced = r#"{"Traceparent":"00-1","tracestate":"a=1","baggage":"b","sentry-trace":"c","b3":"d"}"#;
        assert_eq!(print(None), print(Some(traced)));
        assert_eq!(print(Some(r#"{"a":"1","traceparent":"00-2","b":"2"}"#)), print(Some(r#"{"b":"2","a":"1"}"#)));
        let distinct = [None, Some(r#"{"a":"1"}"#), Some(r#"{"a":"2"}"#), Some(r#"{"b":"1"}"#)].map(print);
        assert!((1..4).all(|n| !distinct[..n].contains(&distinct[n])));
    }

    #[test]
    fn absent_null_text_and_bytes_differ() {
        assert!(json(&event(DraftParts::default())).ends_with(r#""time":1763640000123}"#));
        assert_eq!(event(DraftParts::default()).data_json(), None);
        assert_eq!(
            event(DraftParts { data: EventData::Json(raw("null")), ..Default::default() }).data_json(),
            Some("null")
        );
        assert_eq!(
            event(DraftParts { data: EventData::Text("a\"b"), ..Default::default() }).data_json(),
            Some(r#""a\"b""#)
        );
        let bytes = event(DraftParts { data: EventData::Bytes(b"\0\xff"), ..Default::default() });
        assert_eq!(bytes.data_json(), None);
        assert_eq!(bytes.data_base64(), Some(r#""AP8=""#));
    }

    #[test]
    fn stored_bodies_are_restored() {
        for parts in [
            DraftParts::default(),
            DraftParts { kind: Some("k"), from: Some("f"), data: EventData::Text("ä"), ..Default::default() },
            DraftParts { data: EventData::Bytes(b"\xff"), meta: Some(raw(r#"{"a":"b"}"#)), ..Default::default() },
        ] {
            let draft = Draft::new(parts, 1000).unwrap();
            let (mut stored, at) = (Vec::new(), event(parts).position());
            draft.body.store(&mut stored);
            assert_eq!(json(&Event::restore(at, 1763640000123, &stored).unwrap()), json(&event(parts)));
            for end in 0..stored.len() {
                let _ = Event::restore(at, 0, &stored[..end]).map(|event| json(&event));
            }
            for at_byte in 0..STORED {
                let mut odd = stored.clone();
                odd[at_byte] = 0xff;
                let odd = Event::restore(at, 0, &odd);
                let _ = odd.map(|event| {
                    (
                        json(&event),
                        event.kind_json().is_some(),
                        event.sender_json().is_some(),
                        event.data_json().is_some(),
                    )
                });
            }
        }
    }

    #[test]
    fn line_ends_between_tokens_become_spaces() {
        let event = event(DraftParts { data: EventData::Json(raw("{\"a\":\r\n 1}")), ..Default::default() });
        assert_eq!(event.data_json(), Some("{\"a\":   1}"));
    }

    #[test]
    fn invalid_drafts_are_rejected() {
        let rejected = |parts| Draft::new(parts, 100).unwrap_err();
        assert_eq!(rejected(DraftParts { kind: Some("weir.gap"), ..Default::default() }).code(), Code::InvalidParams);
        assert_eq!(rejected(DraftParts { kind: Some("a\nb"), ..Default::default() }).code(), Code::InvalidParams);
        assert_eq!(rejected(DraftParts { from: Some(""), ..Default::default() }).code(), Code::InvalidParams);
        for meta in [r#"{"a":1}"#, r#"{"a":"b","weir.mark":"{}"}"#, r#"{"weir\u002emark":"{}"}"#] {
            let parts = DraftParts { meta: Some(raw(meta)), ..Default::default() };
            assert_eq!(rejected(parts).code(), Code::InvalidParams, "{meta}");
            assert!(Draft::own(parts, 100).is_ok());
        }
        let long = "x".repeat(100);
        assert_eq!(rejected(DraftParts { data: EventData::Text(&long), ..Default::default() }).code(), Code::TooLarge);
    }
}
