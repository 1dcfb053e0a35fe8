//! Events as frames for held streams, made once for all that need the same.

use std::{borrow::Cow, collections::BTreeMap};

use bytes::Bytes;
use serde::{Deserialize, Serialize};

use super::mark::{Mark, Said, said};
use crate::{bus::Format, channel::Channel, event::Event, net::chunk};

/// The first byte of a frame after which the stream ends. A size begins with a digit.
const CLOSES: u8 = b'!';

/// What held streams get that follow nothing: bytes, and nothing else, shared by all of them.
pub static PLAIN: Format = Format { open: chunk::open, event: plain, close: close_plain };

/// One event, and what a stream has to know of it to go on or not: read by [`Frame::read`]. For readers one by one.
pub static MARKED: Format = Format { open: |_| {}, event: marked, close: |_| {} };

fn plain(_: &Channel, event: &Event, out: &mut Vec<u8>) {
    if out[0] == CLOSES {
        return;
    }
    // Without a mark in it, it is a block.
    match said(event, Mark::of(event).as_ref()) {
        Said::Bytes(bytes) => out.extend_from_slice(&bytes),
        Said::Close => out[0] = CLOSES,
        // Who follows nothing has nothing to ask for.
        Said::Nothing | Said::Hint => {}
    }
}

fn close_plain(out: &mut Vec<u8>) {
    let closes = out[0] == CLOSES;
    chunk::close(out);
    if closes {
        out[0] = CLOSES;
    }
}

/// What a frame of [`PLAIN`] is: the chunk to push, if there is one, and whether the stream ends behind it.
pub fn unpack(frame: Bytes) -> (Option<Bytes>, bool) {
    let closes = frame.first() == Some(&CLOSES);
    if frame.len() <= chunk::HEAD.len() + chunk::TAIL.len() {
        return (None, closes);
    }
    match closes {
        true => (Some(chunk::of(&chunk::text(&frame))), true),
        false => (Some(frame), false),
    }
}

/// What becomes of a stream.
#[derive(Clone, Copy, Debug, Deserialize, PartialEq, Serialize)]
pub enum What {
    Send,
    Nothing,
    Hint,
    Close,
}

/// A frame of [`MARKED`].
#[derive(Debug, Deserialize, Serialize)]
pub struct Frame<'a> {
    pub id: Option<Cow<'a, str>>,
    pub prev: Option<Cow<'a, str>>,
    /// Whether a publisher of items said anything of it. What has no mark is never missed by its id.
    pub marked: bool,
    pub offset: u64,
    pub what: What,
    pub meta: Cow<'a, BTreeMap<String, String>>,
    #[serde(skip)]
    pub bytes: &'a [u8],
}

fn marked(_: &Channel, event: &Event, out: &mut Vec<u8>) {
    let mark = Mark::of(event);
    let said = said(event, mark.as_ref());
    let what = match &said {
        Said::Bytes(_) => What::Send,
        Said::Nothing => What::Nothing,
        Said::Hint => What::Hint,
        Said::Close => What::Close,
    };
    let marked = mark.is_some();
    let mark = mark.clone().unwrap_or_default();
    let frame = Frame {
        id: mark.id.as_deref().map(Cow::Borrowed),
        prev: mark.prev.as_deref().map(Cow::Borrowed),
        marked,
        offset: event.offset,
        what,
        meta: Cow::Borrowed(&mark.meta),
        bytes: &[],
    };
    let head = serde_json::to_vec(&frame).unwrap_or_default();
    out.extend_from_slice(&(head.len() as u32).to_be_bytes());
    out.extend_from_slice(&head);
    if let Said::Bytes(bytes) = said {
        out.extend_from_slice(&bytes);
    }
}

impl<'a> Frame<'a> {
    pub fn read(frame: &'a [u8]) -> Option<Self> {
        let (len, rest) = frame.split_first_chunk::<4>()?;
        let (head, bytes) = rest.split_at_checked(u32::from_be_bytes(*len) as usize)?;
        let frame: Frame<'a> = serde_json::from_slice(head).ok()?;
        Some(Frame { bytes, ..frame })
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::{
        compat::grip::{item, mark},
        event::{Draft, DraftParts, EventData},
        position::Position,
    };

    fn placed(draft: Draft, offset: u64) -> Arc<Event> {
        Arc::new(draft.place(Position { epoch: "k3Vq00".parse().unwrap(), offset }, 1))
    }

    /// What the items of a request become.
    fn events(items: &str) -> Vec<Arc<Event>> {
        let items = item::read(format!(r#"{{"items":{items}}}"#).as_bytes()).unwrap();
        let drafts = items.iter().filter_map(|item| mark::draft(item, None, 10_000).unwrap());
        drafts.zip(1..).map(|(draft, offset)| placed(draft, offset)).collect()
    }

    fn stream(content: &str) -> Arc<Event> {
        events(&serde_json::json!([{"channel": "a", "formats": {"http-stream": {"content": content}}}]).to_string())
            .remove(0)
    }

    fn plain_text(events: &[Arc<Event>]) -> (String, bool) {
        let (chunk, closes) = unpack(PLAIN.encode(&Channel::parse("a").unwrap(), events));
        (chunk.map_or(String::new(), |chunk| String::from_utf8(chunk::text(&chunk).into()).unwrap()), closes)
    }

    #[test]
    fn publishers_get_their_bytes_back_and_others_an_event() {
        for (content, kind, data, marked) in [
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
            // No whole block, or more than one: text.
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
            assert_eq!(event.meta_json().is_some(), marked, "{content:?}");
            assert_eq!(plain_text(&[event]), (content.to_owned(), false));
        }
    }

    #[test]
    fn events_of_other_worlds_are_blocks() {
        let event = |parts: DraftParts<'_>| placed(Draft::new(parts, 1000).unwrap(), 1);
        let json: &serde_json::value::RawValue = serde_json::from_str(r#"{"id":7}"#).unwrap();
        let typed = DraftParts { kind: Some("created"), data: EventData::Json(json), ..DraftParts::default() };
        assert_eq!(plain_text(&[event(typed)]).0, "event: created\ndata: {\"id\":7}\n\n");
        assert_eq!(
            plain_text(&[event(DraftParts { data: EventData::Text("x\ny"), ..DraftParts::default() })]).0,
            "data: \"x\\ny\"\n\n"
        );
        assert_eq!(
            plain_text(&[event(DraftParts { data: EventData::Bytes(b"\0"), ..DraftParts::default() })]).0,
            "data: \"AA==\"\n\n"
        );
        assert_eq!(plain_text(&[event(DraftParts::default())]).0, "data: \n\n");
    }

    #[test]
    fn a_batch_ends_where_the_stream_does() {
        let items = events(
            r#"[{"channel":"a","http-stream":{"content":"1"}},{"channel":"a","http-response":{"body":"no"}},
                {"channel":"a","http-stream":{"action":"hint"}},{"channel":"a","http-stream":{"content-bin":"Mg=="}},
                {"channel":"a","http-stream":{"action":"close"}},{"channel":"a","http-stream":{"content":"3"}}]"#,
        );
        assert_eq!(plain_text(&items), ("12".into(), true));
        assert_eq!(plain_text(&items[1..3]), (String::new(), false));
        assert_eq!(plain_text(&items[4..]), (String::new(), true));
        assert_eq!(plain_text(&items[3..4]), ("2".into(), false));
    }

    #[test]
    fn bytes_survive_as_bytes() {
        let event = events(r#"[{"channel":"a","http-stream":{"content-bin":"AP8="}}]"#).remove(0);
        assert_eq!(event.data_base64(), Some(r#""AP8=""#));
        let (chunk, _) = unpack(PLAIN.encode(&Channel::parse("a").unwrap(), [&event]));
        assert_eq!(chunk::text(&chunk.unwrap()), &[0, 255][..]);
    }

    #[test]
    fn what_one_reader_has_to_know() {
        let item = r#"[{"channel":"a","id":"2","prev-id":"1","meta":{"sender":"s"},"http-stream":{"content":"x"}}]"#;
        let encoded = MARKED.encode(&Channel::parse("a").unwrap(), [&events(item)[0]]);
        let frame = Frame::read(&encoded).unwrap();
        assert_eq!((frame.id.as_deref(), frame.prev.as_deref(), frame.marked), (Some("2"), Some("1"), true));
        assert_eq!((frame.what, frame.bytes, &frame.meta["sender"][..]), (What::Send, &b"x"[..], "s"));
        let encoded = MARKED.encode(&Channel::parse("a").unwrap(), [&stream("data: 1\n\n")]);
        assert!(!Frame::read(&encoded).unwrap().marked);
        assert!(Frame::read(b"").is_none() && Frame::read(&encoded[..9]).is_none());
    }
}
