//! Server-sent events as bytes: what the formats and weir's own blocks write, and what an `EventSource` reads from it.

use std::sync::Arc;

use bytes::Bytes;
use proptest::prelude::*;
use serde_json::value::RawValue;
use weir::{
    bus::{Format, Gap, GapReason},
    channel::Channel,
    event::{Draft, DraftParts, Event, EventData},
    net::chunk::text,
    position::Position,
    transport::sse::frame::{DATA, DATA_BARE, EVENT, EVENT_BARE, HEARTBEAT, gap, opening, position, retry, with_id},
};

/// A stream as an `EventSource` reads it, following the HTML standard.
#[derive(Clone, Debug, Default, PartialEq)]
struct ParsedBlock {
    id: String,
    event: String,
    data: String,
}

#[derive(Default)]
struct Parsed {
    blocks: Vec<ParsedBlock>,
    retry: Option<u64>,
    comments: usize,
}

fn parse(stream: &[u8]) -> Parsed {
    let stream = std::str::from_utf8(stream).unwrap();
    let mut parsed = Parsed::default();
    let (mut id, mut event, mut data) = (String::new(), String::new(), String::new());
    let mut rest = stream;
    while let Some(end) = rest.find(['\r', '\n']) {
        let line = &rest[..end];
        rest = rest[end..].strip_prefix("\r\n").unwrap_or(&rest[end + 1..]);
        if line.is_empty() {
            if !data.is_empty() {
                data.pop();
                let (event, data) = (std::mem::take(&mut event), std::mem::take(&mut data));
                parsed.blocks.push(ParsedBlock { id: id.clone(), event, data });
            }
            event.clear();
            continue;
        }
        let (field, value) = line.split_once(':').unwrap_or((line, ""));
        let value = value.strip_prefix(' ').unwrap_or(value);
        match field {
            "" => parsed.comments += 1,
            "event" => event = value.into(),
            "data" => {
                data += value;
                data += "\n";
            }
            "id" if !value.contains('\0') => id = value.into(),
            "retry" => parsed.retry = value.parse().ok(),
            _ => panic!("unknown field {field:?}"),
        }
    }
    assert!(rest.is_empty(), "an unfinished line: {rest:?}");
    parsed
}

/// Undoes HTTP/1.1 chunks.
fn unchunk(mut bytes: &[u8]) -> Vec<u8> {
    let mut text = Vec::new();
    while !bytes.is_empty() {
        let end = memchr::memmem::find(bytes, b"\r\n").unwrap();
        let size = usize::from_str_radix(std::str::from_utf8(&bytes[..end]).unwrap(), 16).unwrap();
        text.extend_from_slice(&bytes[end + 2..end + 2 + size]);
        assert_eq!(&bytes[end + 2 + size..end + 4 + size], b"\r\n");
        bytes = &bytes[end + 4 + size..];
    }
    text
}

fn channel(name: &str) -> Channel {
    Channel::parse(name).unwrap()
}

fn placed(offset: u64, parts: DraftParts<'_>) -> Arc<Event> {
    let at = Position { epoch: "k3Vq00".parse().unwrap(), offset };
    Arc::new(Draft::new(parts, 1_000_000).unwrap().place(at, 1763640000123))
}

fn raw(json: &str) -> Box<RawValue> {
    RawValue::from_string(json.to_owned()).unwrap()
}

/// The stream's text of these events, after a check that the chunk holds just that.
fn encode(format: &'static Format, events: &[Arc<Event>]) -> Vec<u8> {
    let chunk = format.encode(&channel("orders"), events);
    let text = text(&chunk);
    assert_eq!(unchunk(&chunk), text);
    text.to_vec()
}

fn said(bytes: &Bytes) -> String {
    String::from_utf8(text(bytes).to_vec()).unwrap()
}

#[test]
fn an_envelope_as_specified() {
    let data = raw(r#"{"id":7}"#);
    let event = placed(42, DraftParts { kind: Some("created"), data: EventData::Json(&data), ..Default::default() });
    let json =
        r#"{"channel":"orders","epoch":"k3Vq00","offset":42,"type":"created","time":1763640000123,"data":{"id":7}}"#;
    let events = [event];
    assert_eq!(String::from_utf8(encode(&EVENT, &events)).unwrap(), format!("id: k3Vq00-42\ndata: {json}\n\n"));
    assert_eq!(String::from_utf8(encode(&EVENT_BARE, &events)).unwrap(), format!("data: {json}\n\n"));
    assert_eq!(encode(&DATA, &events), b"id: k3Vq00-42\nevent: created\ndata: {\"id\":7}\n\n");
    assert_eq!(encode(&DATA_BARE, &events), b"event: created\ndata: {\"id\":7}\n\n");
}

#[test]
fn bare_data_of_every_kind() {
    let (null, lone) = (raw("null"), raw(r#""\ud800\n""#));
    for (data, want) in [
        (EventData::None, "data: \n\n"),
        (EventData::Json(&null), "data: null\n\n"),
        (EventData::Text(""), "data: \n\n"),
        (EventData::Text("<li>a</li>\n<li>b</li>"), "data: <li>a</li>\ndata: <li>b</li>\n\n"),
        (EventData::Text("a\rb\r\nc\n"), "data: a\ndata: b\ndata: c\ndata: \n\n"),
        (EventData::Text(" \u{0}\u{2028}"), "data:  \u{0}\u{2028}\n\n"),
        (EventData::Bytes(b"\0\xff"), "data: AP8=\n\n"),
        (EventData::Json(&lone), "data: \u{fffd}\ndata: \n\n"),
    ] {
        let text = encode(&DATA_BARE, &[placed(1, DraftParts { data, ..Default::default() })]);
        assert_eq!(String::from_utf8(text).unwrap(), want);
    }
}

#[test]
fn own_blocks_as_specified() {
    let at: Position = "k3Vq00-41".parse().unwrap();
    assert_eq!(
        said(&opening(2371, "k3Vq00-41", [(&channel("orders"), at)])),
        "retry: 2371\nid: k3Vq00-41\nevent: weir.open\ndata: {\"channels\":[{\"channel\":\"orders\",\"position\":\"k3Vq00-41\"}]}\n\n"
    );
    assert_eq!(
        said(&opening(1000, "wX", [(&channel("a\"b"), at), (&channel("c"), Position::absent(9))])),
        "retry: 1000\nid: wX\nevent: weir.open\ndata: {\"channels\":[{\"channel\":\"a\\\"b\",\"position\":\"k3Vq00-41\"},{\"channel\":\"c\",\"position\":\"0-9\"}]}\n\n"
    );
    let missing = Gap {
        channel: channel("orders"),
        reason: GapReason::Trimmed,
        after: "k3Vq00-42".parse().ok(),
        next: "k3Vq00-97".parse().unwrap(),
        missed: Some(54),
    };
    assert_eq!(
        said(&gap("k3Vq00-96", &missing)),
        "id: k3Vq00-96\nevent: weir.gap\ndata: {\"channel\":\"orders\",\"reason\":\"trimmed\",\"after\":\"k3Vq00-42\",\"next\":\"k3Vq00-97\",\"missed\":54}\n\n"
    );
    assert_eq!(said(&position("k3Vq00-96")), "id: k3Vq00-96\nevent: weir.position\ndata: {}\n\n");
    let draining = "event: weir.retry\ndata: {\"code\":\"draining\",\"after_ms\":2371}\n\n";
    assert_eq!(said(&retry("draining", 2371, false)), draining);
    assert_eq!(said(&retry("draining", 2371, true)), format!("retry: 2371\n{draining}"));
    for block in [position("x"), retry("draining", 1, true)] {
        assert_eq!(unchunk(&block), text(&block));
    }
}

#[test]
fn a_heartbeat_is_no_event() {
    let heartbeat = Bytes::from_static(HEARTBEAT);
    assert_eq!(unchunk(&heartbeat), b":\n");
    assert_eq!(said(&heartbeat), ":\n");
    let stream = [&b":\n:\n"[..], b"data: a\n\n", b":\n"].concat();
    let parsed = parse(&stream);
    assert_eq!((parsed.blocks.len(), parsed.comments), (1, 3));
}

fn text_of_anything() -> impl Strategy<Value = String> {
    prop_oneof![
        any::<String>(),
        prop::collection::vec(
            prop::sample::select(vec!['\r', '\n', '\0', ':', ' ', 'a', '"', '\\', 'é', '\u{2028}', '\u{feff}', '😀']),
            0..20
        )
        .prop_map(String::from_iter),
    ]
}

/// The text that a client gets, with line endings normalized.
fn with_newlines(text: &str) -> String {
    text.replace("\r\n", "\n").replace('\r', "\n")
}

proptest! {
    #[test]
    fn any_text_comes_through(texts in prop::collection::vec(text_of_anything(), 1..6)) {
        let events: Vec<_> = texts
            .iter()
            .enumerate()
            .map(|(i, text)| placed(i as u64 + 1, DraftParts { data: EventData::Text(text), ..Default::default() }))
            .collect();

        let parsed = parse(&encode(&DATA, &events));
        prop_assert_eq!(parsed.blocks.len(), texts.len());
        for (i, (block, text)) in parsed.blocks.iter().zip(&texts).enumerate() {
            prop_assert_eq!(&block.data, &with_newlines(text));
            prop_assert_eq!(&block.id, &format!("k3Vq00-{}", i + 1));
            prop_assert_eq!(&block.event, "");
        }

        let parsed = parse(&encode(&EVENT, &events));
        prop_assert_eq!(parsed.blocks.len(), texts.len());
        for (block, text) in parsed.blocks.iter().zip(&texts) {
            let envelope: serde_json::Value = serde_json::from_str(&block.data).unwrap();
            prop_assert_eq!(envelope["data"].as_str(), Some(text.as_str()));
        }
    }

    #[test]
    fn any_type_is_one_line(kind in "[^\\p{Cc}]{1,30}") {
        let event = placed(1, DraftParts { kind: Some(&kind), ..Default::default() });
        let block = parse(&encode(&DATA, &[event])).blocks.remove(0);
        prop_assert_eq!(block.event, kind);
    }

    #[test]
    fn an_id_goes_before_the_last_block(
        texts in prop::collection::vec(text_of_anything(), 1..6),
        chunked: bool,
        bare: bool,
    ) {
        let events: Vec<_> =
            texts.iter().map(|text| placed(1, DraftParts { data: EventData::Text(text), ..Default::default() })).collect();
        let format = if bare { &DATA_BARE } else { &EVENT_BARE };
        let chunk = format.encode(&channel("orders"), &events);
        let mut pieces = Vec::new();
        let piece = if chunked { chunk.clone() } else { text(&chunk) };
        with_id(&piece, texts.len() > 1, "wTOKEN", chunked, |piece| pieces.extend_from_slice(&piece));
        let parsed = parse(&if chunked { unchunk(&pieces) } else { pieces });
        let plain = parse(&text(&chunk));
        let ids: Vec<_> = parsed.blocks.iter().map(|block| block.id.as_str()).collect();
        let mut want = vec![""; texts.len()];
        *want.last_mut().unwrap() = "wTOKEN";
        prop_assert_eq!(ids, want);
        let data = |parsed: &Parsed| parsed.blocks.iter().map(|block| block.data.clone()).collect::<Vec<_>>();
        prop_assert_eq!(data(&parsed), data(&plain));
    }
}
