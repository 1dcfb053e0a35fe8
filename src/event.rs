//! What travels: [`Channel`], [`Draft`] (before the bus placed it) and [`Event`] (after).
//!
//! An event is encoded once, when its draft is made, except for what only the bus knows (epoch, offset, time).
//! Every wire format is that encoding with something in front and behind.

use std::{borrow::Cow, collections::BTreeMap, fmt, ops::Range, sync::Arc};

use base64::{Engine, engine::general_purpose::STANDARD as BASE64};
use serde_json::value::RawValue;

use crate::{
    error::{Code, Error, Result},
    position::{Epoch, Position},
};

mod incoming;

pub use incoming::{Incoming, Text, misread, parse, unreadable};

/// Longest channel name, in bytes.
pub const MAX_CHANNEL: usize = 255;
/// Longest `type`, `from`, `key`, service and method name, in bytes.
pub const MAX_LABEL: usize = 128;
/// Largest `meta` object, in bytes of JSON.
pub const MAX_META: usize = 1024;
/// What types and members of `meta` begin with that only weir gives.
const OWN: &str = "weir.";
/// What the channels begin with on which joins and leaves of others are announced.
pub const PRESENCE: &str = "$presence/";

/// The name of a channel: 1–255 bytes of UTF-8 without control characters. Cheap to clone.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Channel(Arc<str>);

/// An event that the bus has not placed yet, validated and encoded.
#[derive(Clone, Debug)]
pub struct Draft {
    pub(crate) body: Body,
    pub(crate) key: Option<Box<str>>,
}

/// What a [`Draft`] is made of, borrowed from wherever it was parsed.
#[derive(Clone, Copy, Debug, Default)]
pub struct Parts<'a> {
    pub kind: Option<&'a str>,
    pub from: Option<&'a str>,
    pub meta: Option<&'a RawValue>,
    pub data: Data<'a>,
    pub key: Option<&'a str>,
}

/// The body of an event. Absent is not `null`; both are kept.
#[derive(Clone, Copy, Debug, Default)]
pub enum Data<'a> {
    #[default]
    None,
    Json(&'a RawValue),
    /// Becomes a JSON string.
    Text(&'a str),
    /// Travels as `data_base64`.
    Bytes(&'a [u8]),
}

/// An event in its place. Shared by reference count, never changed.
#[derive(Debug)]
pub struct Event {
    pub epoch: Epoch,
    /// Dense number in the channel, from 1.
    pub offset: u64,
    /// Unix milliseconds, stamped by the bus; never decreases within an epoch.
    pub time: u64,
    body: Body,
}

/// Bytes before the body of a stored event.
pub(crate) const STORED: usize = 11;

/// The encoded parts of an event that do not depend on its place, in one allocation:
/// `,"type":…,"from":…` then (from `tail`) `,"meta":…,"data":…}`.
#[derive(Clone)]
pub(crate) struct Body {
    bytes: Box<[u8]>,
    kind_end: u16,
    from_start: u16,
    tail: u16,
    data_start: u32,
    binary: bool,
}

// === impl Channel ===

impl Channel {
    /// Reads a name as a client wrote it.
    pub fn parse(name: &str) -> Result<Self> {
        if name.is_empty() || name.len() > MAX_CHANNEL {
            return Err(Error::params(format!(
                "a channel name has 1 to {MAX_CHANNEL} bytes, this one has {}",
                name.len()
            )));
        }
        if has_control(name) {
            return Err(Error::params("a channel name has no control characters"));
        }
        Ok(Channel(name.into()))
    }

    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// Names beginning with `$` are weir's own: anyone may read them, nobody may write them.
    pub fn is_reserved(&self) -> bool {
        self.0.starts_with('$')
    }

    /// The channel on which joins and leaves of this one are announced.
    ///
    /// # Errors
    /// `invalid_params` for channels of weir's own, and for names so long that there is none.
    pub fn presence(&self) -> Result<Channel> {
        if self.is_reserved() {
            return Err(Error::params(format!(
                "channel {self} has no presence: names beginning with $ are weir's own"
            )));
        }
        let most = MAX_CHANNEL - PRESENCE.len();
        if self.0.len() > most {
            return Err(Error::params(format!("a channel with presence has a name of at most {most} bytes")));
        }
        Ok(Channel(format!("{PRESENCE}{self}").into()))
    }

    /// Refuses what a client may not write to.
    pub fn writable(&self) -> Result<()> {
        if self.is_reserved() {
            return Err(Error::new(
                Code::Forbidden,
                format!("channel {self} is read-only: names beginning with $ are weir's own"),
            )
            .with("permission", "publish"));
        }
        Ok(())
    }
}

impl fmt::Display for Channel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Debug for Channel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(&self.0, f)
    }
}

impl std::borrow::Borrow<str> for Channel {
    fn borrow(&self) -> &str {
        &self.0
    }
}

// === impl Draft ===

impl Draft {
    /// Validates and encodes what a client sent. `limit` is the largest encoded event, in bytes.
    pub fn new(parts: Parts<'_>, limit: usize) -> Result<Self> {
        if let Some(kind) = parts.kind {
            check_kind(kind)?;
        }
        if let Some(meta) = parts.meta {
            check_meta(meta)?;
        }
        Self::own(parts, limit)
    }

    /// As [`new`](Self::new), for what weir or an adapter made: its `type` and the members of its `meta` may be weir's own,
    /// and `meta` may be larger than a client's.
    pub(crate) fn own(parts: Parts<'_>, limit: usize) -> Result<Self> {
        if let Some(from) = parts.from {
            label("from", from)?;
        }
        if let Some(key) = parts.key {
            label("key", key)?;
        }
        let body = Body::encode(&parts);
        if body.bytes.len() > limit {
            return Err(Error::new(
                Code::TooLarge,
                format!("the event has {} bytes encoded, limits.event is {limit}", body.bytes.len()),
            )
            .with("limit", "limits.event"));
        }
        Ok(Draft { body, key: parts.key.map(Into::into) })
    }

    /// Encoded size in bytes, without what the bus adds.
    pub fn size(&self) -> usize {
        self.body.bytes.len()
    }

    /// The body, and the idempotency key.
    pub(crate) fn parts(&self) -> (&Body, Option<&str>) {
        (&self.body, self.key.as_deref())
    }

    /// Puts the draft in its place.
    pub fn place(self, at: Position, time: u64) -> Event {
        Event { epoch: at.epoch, offset: at.offset, time, body: self.body }
    }
}

/// Checks a `type`, `from`, `key` or a name of a consumer, service or method.
pub fn label(what: &str, text: &str) -> Result<()> {
    if text.is_empty() || text.len() > MAX_LABEL {
        return Err(Error::params(format!("{what} has 1 to {MAX_LABEL} bytes, this one has {}", text.len())));
    }
    if has_control(text) {
        return Err(Error::params(format!("{what} has no control characters")));
    }
    Ok(())
}

fn has_control(text: &str) -> bool {
    // Nearly all are plain ASCII, and every call and every publish has some.
    let plain = text.bytes().all(|byte| (b' '..=b'~').contains(&byte));
    !plain && text.chars().any(char::is_control)
}

/// Checks the `type` of an event that a client sends.
pub fn check_kind(kind: &str) -> Result<()> {
    label("type", kind)?;
    if kind.starts_with(OWN) {
        return Err(Error::params("types beginning with weir. are weir's own"));
    }
    Ok(())
}

/// What adapters note in `meta` they believe later: nobody else may write it.
fn check_meta(meta: &RawValue) -> Result<()> {
    if meta.get().len() > MAX_META {
        return Err(Error::new(Code::TooLarge, format!("meta has at most {MAX_META} bytes")).with("limit", "meta"));
    }
    let members: BTreeMap<String, String> =
        serde_json::from_str(meta.get()).map_err(|_| Error::params("meta is an object of strings"))?;
    match members.keys().find(|name| name.starts_with(OWN)) {
        Some(name) => Err(Error::params(format!("meta.{name}: members beginning with weir. are weir's own"))),
        None => Ok(()),
    }
}

// === impl Event ===

impl Event {
    pub fn position(&self) -> Position {
        Position { epoch: self.epoch, offset: self.offset }
    }

    /// Encoded size in bytes, without what the bus adds.
    pub fn size(&self) -> usize {
        self.body.bytes.len()
    }

    /// What a backend stored, in its place.
    pub(crate) fn restore(at: Position, time: u64, stored: &[u8]) -> Option<Self> {
        Some(Event { epoch: at.epoch, offset: at.offset, time, body: Body::restore(stored)? })
    }

    /// `type`, as the JSON text of a string, quotes included.
    pub fn kind_json(&self) -> Option<&str> {
        const START: usize = r#","type":"#.len();
        (self.body.kind_end > 0).then(|| self.body.text(START..self.body.kind_end as usize))
    }

    /// `from`, as the JSON text of a string, quotes included.
    pub fn from_json(&self) -> Option<&str> {
        (self.body.from_start > 0).then(|| self.body.text(self.body.from_start as usize..self.body.tail as usize))
    }

    /// `meta`, as JSON text.
    pub fn meta_json(&self) -> Option<&str> {
        const START: &[u8] = br#","meta":"#;
        let start = self.body.tail as usize;
        self.body.bytes[start..].starts_with(START).then_some(())?;
        let end = match (self.body.data_start as usize, self.body.binary) {
            (0, _) => self.body.bytes.len() - 1,
            (data, false) => data - r#","data":"#.len(),
            (data, true) => data - r#","data_base64":"#.len(),
        };
        Some(self.body.text(start + START.len()..end))
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

    /// Appends the event as every transport shows it: one line of JSON.
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

impl Body {
    fn encode(parts: &Parts<'_>) -> Self {
        let estimate = 32
            + parts.kind.map_or(0, |kind| kind.len() + 10)
            + parts.from.map_or(0, |from| from.len() + 10)
            + parts.meta.map_or(0, |meta| meta.get().len() + 10)
            + match parts.data {
                Data::None => 0,
                Data::Json(json) => json.get().len(),
                Data::Text(text) => text.len() + 2,
                Data::Bytes(bytes) => bytes.len().div_ceil(3) * 4,
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
        let binary = matches!(parts.data, Data::Bytes(_));
        match parts.data {
            Data::None => {}
            Data::Json(json) => {
                out.extend_from_slice(br#","data":"#);
                data_start = out.len() as u32;
                write_json_line(json, &mut out);
            }
            Data::Text(text) => {
                out.extend_from_slice(br#","data":"#);
                data_start = out.len() as u32;
                write_json_str(text, &mut out);
            }
            Data::Bytes(bytes) => {
                out.extend_from_slice(br#","data_base64":"#);
                data_start = out.len() as u32;
                out.push(b'"');
                out.extend_from_slice(BASE64.encode(bytes).as_bytes());
                out.push(b'"');
            }
        }
        out.push(b'}');
        Body { bytes: out.into_boxed_slice(), kind_end, from_start, tail, data_start, binary }
    }

    fn text(&self, range: Range<usize>) -> &str {
        // Only whole JSON values are cut out of what was UTF-8 when it came in.
        std::str::from_utf8(&self.bytes[range]).unwrap_or_default()
    }

    /// Appends the body as a backend stores it: where its parts are (big end first), then the parts.
    pub(crate) fn store(&self, out: &mut Vec<u8>) {
        out.reserve(STORED + self.bytes.len());
        for part in [self.kind_end, self.from_start, self.tail] {
            out.extend_from_slice(&part.to_be_bytes());
        }
        out.extend_from_slice(&self.data_start.to_be_bytes());
        out.push(self.binary.into());
        out.extend_from_slice(&self.bytes);
    }

    /// Reads what [`store`](Self::store) wrote; nothing if that is not what it is.
    pub(crate) fn restore(stored: &[u8]) -> Option<Self> {
        let (head, bytes) = stored.split_at_checked(STORED)?;
        let part = |at: usize| u16::from_be_bytes([head[at], head[at + 1]]);
        let (kind_end, from_start, tail) = (part(0), part(2), part(4));
        let data_start = u32::from_be_bytes([head[6], head[7], head[8], head[9]]);
        let body = Body { bytes: bytes.into(), kind_end, from_start, tail, data_start, binary: head[10] != 0 };
        // What is cut out later must be there.
        let kind = kind_end == 0 || (8..=tail).contains(&kind_end);
        let from = from_start == 0 || (kind_end..=tail).contains(&from_start);
        let inside = (tail as usize) < bytes.len() && (data_start as usize) < bytes.len();
        (kind && from && inside && bytes.ends_with(b"}") && std::str::from_utf8(bytes).is_ok()).then_some(body)
    }

    /// A 64-bit fingerprint: the same body again has the same one.
    pub(crate) fn fingerprint(&self) -> u64 {
        use std::hash::BuildHasher;
        foldhash::quality::FixedState::with_seed(0x7765_6972).hash_one(&self.bytes)
    }
}

impl fmt::Debug for Body {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        String::from_utf8_lossy(&self.bytes).fmt(f)
    }
}

/// Appends `text` as a JSON string.
pub fn write_json_str(text: &str, out: &mut Vec<u8>) {
    // Names, mostly: nothing in them to escape, and then a copy is a tenth of the work.
    if !text.bytes().any(|byte| byte < b' ' || byte == b'"' || byte == b'\\') {
        out.push(b'"');
        out.extend_from_slice(text.as_bytes());
        out.push(b'"');
        return;
    }
    // Writing into a Vec cannot fail.
    let _ = serde_json::to_writer(out, text);
}

/// The string that a JSON text means; nearly always the text without its quotes.
pub fn read_json_str(json: &str) -> Cow<'_, str> {
    let inner = json.get(1..json.len().saturating_sub(1)).unwrap_or_default();
    if memchr::memchr(b'\\', inner.as_bytes()).is_none() {
        return Cow::Borrowed(inner);
    }
    // A lone surrogate is legal JSON and no string: it stays as it was written.
    serde_json::from_str(json).map_or(Cow::Borrowed(inner), Cow::Owned)
}

/// Appends JSON as one line. Raw line ends are legal JSON only between tokens, where a space means the same.
pub fn write_json_line(json: &RawValue, out: &mut Vec<u8>) {
    let from = out.len();
    out.extend_from_slice(json.get().as_bytes());
    let mut at = from;
    while let Some(found) = memchr::memchr2(b'\n', b'\r', &out[at..]) {
        out[at + found] = b' ';
        at += found + 1;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn raw(json: &str) -> &RawValue {
        serde_json::from_str(json).unwrap()
    }

    fn event(parts: Parts<'_>) -> Event {
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
        let event = event(Parts {
            kind: Some("created"),
            from: Some("shop/v1"),
            meta: Some(raw(r#"{"traceparent":"00-1"}"#)),
            data: Data::Json(raw(r#"{"id":7}"#)),
            key: None,
        });
        assert_eq!(
            json(&event),
            r#"{"channel":"orders","epoch":"k3Vq00","offset":42,"type":"created","from":"shop/v1","time":1763640000123,"meta":{"traceparent":"00-1"},"data":{"id":7}}"#
        );
        assert_eq!(event.kind_json(), Some(r#""created""#));
        assert_eq!(event.from_json(), Some(r#""shop/v1""#));
        assert_eq!(event.data_json(), Some(r#"{"id":7}"#));
        assert_eq!(event.meta_json(), Some(r#"{"traceparent":"00-1"}"#));
    }

    #[test]
    fn meta_is_found_before_whatever_follows() {
        let meta = Some(raw(r#"{"a":"b"}"#));
        for data in [Data::None, Data::Text("x"), Data::Bytes(b"\0"), Data::Json(raw("null"))] {
            assert_eq!(event(Parts { meta, data, ..Default::default() }).meta_json(), Some(r#"{"a":"b"}"#));
            assert_eq!(event(Parts { data, ..Default::default() }).meta_json(), None);
        }
    }

    #[test]
    fn absent_null_text_and_bytes_differ() {
        assert!(json(&event(Parts::default())).ends_with(r#""time":1763640000123}"#));
        assert_eq!(event(Parts::default()).data_json(), None);
        assert_eq!(event(Parts { data: Data::Json(raw("null")), ..Default::default() }).data_json(), Some("null"));
        assert_eq!(event(Parts { data: Data::Text("a\"b"), ..Default::default() }).data_json(), Some(r#""a\"b""#));
        let bytes = event(Parts { data: Data::Bytes(b"\0\xff"), ..Default::default() });
        assert_eq!(bytes.data_json(), None);
        assert_eq!(bytes.data_base64(), Some(r#""AP8=""#));
    }

    #[test]
    fn what_is_stored_comes_back() {
        for parts in [
            Parts::default(),
            Parts { kind: Some("k"), from: Some("f"), data: Data::Text("ä"), ..Default::default() },
            Parts { data: Data::Bytes(b"\xff"), meta: Some(raw(r#"{"a":"b"}"#)), ..Default::default() },
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
                        event.from_json().is_some(),
                        event.data_json().is_some(),
                    )
                });
            }
        }
    }

    #[test]
    fn line_ends_between_tokens_become_spaces() {
        let event = event(Parts { data: Data::Json(raw("{\"a\":\r\n 1}")), ..Default::default() });
        assert_eq!(event.data_json(), Some("{\"a\":   1}"));
    }

    #[test]
    fn refusals_name_what_was_wrong() {
        let refused = |parts| Draft::new(parts, 100).unwrap_err();
        assert_eq!(refused(Parts { kind: Some("weir.gap"), ..Default::default() }).code(), Code::InvalidParams);
        assert_eq!(refused(Parts { kind: Some("a\nb"), ..Default::default() }).code(), Code::InvalidParams);
        assert_eq!(refused(Parts { from: Some(""), ..Default::default() }).code(), Code::InvalidParams);
        for meta in [r#"{"a":1}"#, r#"{"a":"b","weir.grip":"{}"}"#, r#"{"weir\u002egrip":"{}"}"#] {
            let parts = Parts { meta: Some(raw(meta)), ..Default::default() };
            assert_eq!(refused(parts).code(), Code::InvalidParams, "{meta}");
            assert!(Draft::own(parts, 100).is_ok());
        }
        let long = "x".repeat(100);
        assert_eq!(refused(Parts { data: Data::Text(&long), ..Default::default() }).code(), Code::TooLarge);
    }

    #[test]
    fn channel_names() {
        for good in ["a", "users/v1:add", "a,b", "50%", "é", &"x".repeat(255)] {
            assert!(Channel::parse(good).is_ok(), "{good}");
        }
        for bad in ["", "a\nb", "a\u{7f}", &"x".repeat(256)] {
            assert!(Channel::parse(bad).is_err(), "{bad:?}");
        }
        assert!(Channel::parse("$services").unwrap().writable().is_err());
    }
}
