//! Formats of events for held streams.

use std::{borrow::Cow, collections::BTreeMap};

use bytes::Bytes;
use serde::{Deserialize, Serialize};

use super::item_event::{ItemRecord, StreamItem, stream_item};
use crate::{bus::Format, channel::Channel, event::Event, net::chunk};

/// First byte of a frame after which the stream ends; other frames begin with a digit of the chunk size.
const CLOSES: u8 = b'!';

/// The content of items as one chunk, shared by all streams that inspect nothing.
pub(super) static CONTENT: Format = Format { open: chunk::open, event: write_content, close: close_content };

/// One event with its ids and metadata, for [`ItemFrame::read`]. Readers must take events one by one.
pub(super) static WITH_RECORD: Format = Format { open: |_| {}, event: write_item, close: |_| {} };

fn write_content(_: &Channel, event: &Event, out: &mut Vec<u8>) {
    if out[0] == CLOSES {
        return;
    }
    match stream_item(event, ItemRecord::of(event).as_ref()) {
        StreamItem::Bytes(bytes) => out.extend_from_slice(&bytes),
        StreamItem::Close => out[0] = CLOSES,
        // A stream without next link ignores hints.
        StreamItem::Nothing | StreamItem::Hint => {}
    }
}

fn close_content(out: &mut Vec<u8>) {
    let closes = out[0] == CLOSES;
    chunk::close(out);
    if closes {
        out[0] = CLOSES;
    }
}

/// Reads a frame of [`CONTENT`]: the chunk, if any, and whether the stream ends after it.
pub(super) fn split_close(frame: Bytes) -> (Option<Bytes>, bool) {
    let closes = frame.first() == Some(&CLOSES);
    if frame.len() <= chunk::HEAD.len() + chunk::TAIL.len() {
        return (None, closes);
    }
    match closes {
        true => (Some(chunk::of(&chunk::text(&frame))), true),
        false => (Some(frame), false),
    }
}

/// The effect of an item on a stream.
#[derive(Clone, Copy, Debug, Deserialize, PartialEq, Serialize)]
pub(super) enum FrameAction {
    Send,
    Nothing,
    Hint,
    Close,
}

/// A frame of [`WITH_RECORD`].
#[derive(Debug, Deserialize, Serialize)]
pub(super) struct ItemFrame<'a> {
    pub(super) id: Option<Cow<'a, str>>,
    pub(super) prev: Option<Cow<'a, str>>,
    /// Whether the event has an [`ItemRecord`]. The ids of other events are not compared.
    pub(super) has_record: bool,
    pub(super) offset: u64,
    pub(super) action: FrameAction,
    pub(super) meta: Cow<'a, BTreeMap<String, String>>,
    #[serde(skip)]
    pub(super) content: &'a [u8],
}

fn write_item(_: &Channel, event: &Event, out: &mut Vec<u8>) {
    let record = ItemRecord::of(event);
    let item = stream_item(event, record.as_ref());
    let action = match &item {
        StreamItem::Bytes(_) => FrameAction::Send,
        StreamItem::Nothing => FrameAction::Nothing,
        StreamItem::Hint => FrameAction::Hint,
        StreamItem::Close => FrameAction::Close,
    };
    let has_record = record.is_some();
    let record = record.clone().unwrap_or_default();
    let frame = ItemFrame {
        id: record.id.as_deref().map(Cow::Borrowed),
        prev: record.prev.as_deref().map(Cow::Borrowed),
        has_record,
        offset: event.offset,
        action,
        meta: Cow::Borrowed(&record.meta),
        content: &[],
    };
    let head = serde_json::to_vec(&frame).unwrap_or_default();
    out.extend_from_slice(&(head.len() as u32).to_be_bytes());
    out.extend_from_slice(&head);
    if let StreamItem::Bytes(bytes) = item {
        out.extend_from_slice(&bytes);
    }
}

impl<'a> ItemFrame<'a> {
    pub(super) fn read(frame: &'a [u8]) -> Option<Self> {
        let (len, rest) = frame.split_first_chunk::<4>()?;
        let (head, content) = rest.split_at_checked(u32::from_be_bytes(*len) as usize)?;
        let frame: ItemFrame<'a> = serde_json::from_slice(head).ok()?;
        Some(ItemFrame { content, ..frame })
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::{
        compat::grip::{item, item_event},
        event::{Draft, DraftParts, EventData},
        position::Position,
    };

    fn placed(draft: Draft, offset: u64) -> Arc<Event> {
        Arc::new(draft.place(Position { epoch: "k3Vq00".parse().unwrap(), offset }, 1))
    }

    /// The events of the items of a request.
    fn events(items: &str) -> Vec<Arc<Event>> {
        let items = item::read(format!(r#"{{"items":{items}}}"#).as_bytes()).unwrap();
        let drafts = items.iter().filter_map(|item| item_event::draft(item, None, 10_000).unwrap());
        drafts.zip(1..).map(|(draft, offset)| placed(draft, offset)).collect()
    }

    fn stream(content: &str) -> Arc<Event> {
        events(&serde_json::json!([{"channel": "a", "formats": {"http-stream": {"content": content}}}]).to_string())
            .remove(0)
    }

    fn content_of(events: &[Arc<Event>]) -> (String, bool) {
        let (chunk, closes) = split_close(CONTENT.encode(&Channel::parse("a").unwrap(), events));
        (chunk.map_or(String::new(), |chunk| String::from_utf8(chunk::text(&chunk).into()).unwrap()), closes)
    }

    #[test]
    fn streams_receive_the_published_bytes_and_other_readers_an_event() {
        for (content, kind, data, has_record) in [
            ("event: message\ndata: {\"a\":1}\n\n", Some("message"), r#"{"a":1}"#, false),
            ("data: 7\n\n", None, "7", false),
            ("event: keep-alive\ndata: \n\n", Some("keep-alive"), r#""""#, true),
            ("event: e\ndata: hello\n\n", Some("e"), r#""hello""#, true),
            ("event:e\ndata:{ \"a\": 1 }\n\n", Some("e"), r#"{ "a": 1 }"#, true),
            ("id: 5\nevent: e\ndata: 1\n\n", Some("e"), "1", true),
            ("event: e\r\ndata: 1\r\n\r\n", Some("e"), "1", true),
            ("event: e\ndata: a\ndata: b\n\n", Some("e"), r#""a\nb""#, true),
            (": comment\ndata: 1\n\n", None, "1", true),
            ("data: \"\\ud800\"\n\n", None, r#""\ud800""#, false),
            // An incomplete block, or several: text.
            ("data: 1\n\ndata: 2\n\n", Some("grip"), r#""data: 1\n\ndata: 2\n\n""#, true),
            ("data: 1\n", Some("grip"), r#""data: 1\n""#, true),
            (":\n\n", Some("grip"), r#"":\n\n""#, true),
            ("event: weir.gap\ndata: 1\n\n", Some("grip"), r#""event: weir.gap\ndata: 1\n\n""#, true),
            ("event: a\u{7}\ndata: 1\n\n", Some("grip"), r#""event: a\u0007\ndata: 1\n\n""#, true),
            ("hello\r\n", Some("grip"), r#""hello\r\n""#, true),
            ("", Some("grip"), r#""""#, true),
        ] {
            let event = stream(content);
            let kind = kind.map(|kind| format!("{kind:?}"));
            assert_eq!((event.kind_json(), event.data_json()), (kind.as_deref(), Some(data)), "{content:?}");
            assert_eq!(event.meta_json().is_some(), has_record, "{content:?}");
            assert_eq!(content_of(&[event]), (content.to_owned(), false));
        }
    }

    #[test]
    fn events_of_other_publishers_are_sse_blocks() {
        let event = |parts: DraftParts<'_>| placed(Draft::new(parts, 1000).unwrap(), 1);
        let json: &serde_json::value::RawValue = serde_json::from_str(r#"{"id":7}"#).unwrap();
        let typed = DraftParts { kind: Some("created"), data: EventData::Json(json), ..DraftParts::default() };
        assert_eq!(content_of(&[event(typed)]).0, "event: created\ndata: {\"id\":7}\n\n");
        assert_eq!(
            content_of(&[event(DraftParts { data: EventData::Text("x\ny"), ..DraftParts::default() })]).0,
            "data: \"x\\ny\"\n\n"
        );
        assert_eq!(
            content_of(&[event(DraftParts { data: EventData::Bytes(b"\0"), ..DraftParts::default() })]).0,
            "data: \"AA==\"\n\n"
        );
        assert_eq!(content_of(&[event(DraftParts::default())]).0, "data: \n\n");
    }

    #[test]
    fn no_event_follows_a_close() {
        let items = events(
            r#"[{"channel":"a","http-stream":{"content":"1"}},{"channel":"a","http-response":{"body":"no"}},
                {"channel":"a","http-stream":{"action":"hint"}},{"channel":"a","http-stream":{"content-bin":"Mg=="}},
                {"channel":"a","http-stream":{"action":"close"}},{"channel":"a","http-stream":{"content":"3"}}]"#,
        );
        assert_eq!(content_of(&items), ("12".into(), true));
        assert_eq!(content_of(&items[1..3]), (String::new(), false));
        assert_eq!(content_of(&items[4..]), (String::new(), true));
        assert_eq!(content_of(&items[3..4]), ("2".into(), false));
    }

    #[test]
    fn binary_content_is_kept() {
        let event = events(r#"[{"channel":"a","http-stream":{"content-bin":"AP8="}}]"#).remove(0);
        assert_eq!(event.data_base64(), Some(r#""AP8=""#));
        let (chunk, _) = split_close(CONTENT.encode(&Channel::parse("a").unwrap(), [&event]));
        assert_eq!(chunk::text(&chunk.unwrap()), &[0, 255][..]);
    }

    #[test]
    fn frames_contain_ids_and_metadata() {
        let item = r#"[{"channel":"a","id":"2","prev-id":"1","meta":{"sender":"s"},"http-stream":{"content":"x"}}]"#;
        let encoded = WITH_RECORD.encode(&Channel::parse("a").unwrap(), [&events(item)[0]]);
        let frame = ItemFrame::read(&encoded).unwrap();
        assert_eq!((frame.id.as_deref(), frame.prev.as_deref(), frame.has_record), (Some("2"), Some("1"), true));
        assert_eq!((frame.action, frame.content, &frame.meta["sender"][..]), (FrameAction::Send, &b"x"[..], "s"));
        let encoded = WITH_RECORD.encode(&Channel::parse("a").unwrap(), [&stream("data: 1\n\n")]);
        assert!(!ItemFrame::read(&encoded).unwrap().has_record);
        assert!(ItemFrame::read(b"").is_none() && ItemFrame::read(&encoded[..9]).is_none());
    }
}
