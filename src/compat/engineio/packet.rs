//! Encoding of Engine.IO packets, revision 4.
//!
//! A packet is a digit and its text. An HTTP body has one or more, separated by `\x1e`, where bytes are `b` and base64.

use std::borrow::Cow;

use base64::{
    Engine as _,
    alphabet::STANDARD,
    engine::{DecodePaddingMode, GeneralPurpose, GeneralPurposeConfig, general_purpose},
};

use crate::net::websocket::frame;

/// Separates the packets of a body. JSON does not contain it unescaped.
const SEPARATOR: u8 = 0x1e;

/// Browsers add padding, some clients do not.
const BASE64: GeneralPurpose = GeneralPurpose::new(
    &STANDARD,
    GeneralPurposeConfig::new().with_decode_padding_mode(DecodePaddingMode::Indifferent),
);

/// A packet from a client.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum EnginePacket<'a> {
    Close,
    Ping(&'a str),
    Pong,
    Message(&'a str),
    Binary(Cow<'a, [u8]>),
    Upgrade,
    Noop,
}

/// How packets are framed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Framing {
    /// In HTTP bodies.
    Polling,
    WebSocket,
}

/// Reads a text packet. `None` if it is malformed.
pub(crate) fn read(text: &str) -> Option<EnginePacket<'_>> {
    let (kind, rest) = text.split_at_checked(1)?;
    Some(match kind {
        "1" => EnginePacket::Close,
        "2" => EnginePacket::Ping(rest),
        "3" => EnginePacket::Pong,
        "4" => EnginePacket::Message(rest),
        "5" => EnginePacket::Upgrade,
        "6" => EnginePacket::Noop,
        _ => return None,
    })
}

/// The packets of a body, in order, with `None` for a malformed one.
pub(crate) fn read_body(body: &str) -> impl Iterator<Item = Option<EnginePacket<'_>>> {
    body.split(char::from(SEPARATOR)).map(|text| match text.strip_prefix('b') {
        Some(base64) => BASE64.decode(base64).ok().map(|bytes| EnginePacket::Binary(Cow::Owned(bytes))),
        None => read(text),
    })
}

impl Framing {
    /// Appends a text packet: `write` appends its digit and text.
    pub(crate) fn text(self, out: &mut Vec<u8>, write: impl FnOnce(&mut Vec<u8>)) {
        match self {
            Framing::Polling => {
                separate(out);
                write(out);
            }
            Framing::WebSocket => frame::text(out, write),
        }
    }

    /// Appends a binary message.
    pub(crate) fn binary(self, out: &mut Vec<u8>, bytes: &[u8]) {
        match self {
            Framing::Polling => {
                separate(out);
                let start = out.len() + 1;
                out.resize(start + bytes.len().div_ceil(3) * 4, b'b');
                // Cannot fail: the length is exact.
                let _ = general_purpose::STANDARD.encode_slice(bytes, &mut out[start..]);
            }
            Framing::WebSocket => frame::binary(out, bytes),
        }
    }
}

fn separate(out: &mut Vec<u8>) {
    if !out.is_empty() {
        out.push(SEPARATOR);
    }
}

/// Converts a body of ours to WebSocket frames: packets that no poll has fetched before the upgrade.
pub(crate) fn reframe(body: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(body.len() + 16);
    if body.is_empty() {
        return out;
    }
    for packet in body.split(|byte| *byte == SEPARATOR) {
        match packet.strip_prefix(b"b") {
            // Cannot fail: it is our own.
            Some(base64) => Framing::WebSocket.binary(&mut out, &BASE64.decode(base64).unwrap_or_default()),
            None => Framing::WebSocket.text(&mut out, |out| out.extend_from_slice(packet)),
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn packet_types() {
        for (text, packet) in [
            ("1", EnginePacket::Close),
            ("2", EnginePacket::Ping("")),
            ("2probe", EnginePacket::Ping("probe")),
            ("3", EnginePacket::Pong),
            ("3probe", EnginePacket::Pong),
            ("40", EnginePacket::Message("0")),
            ("4", EnginePacket::Message("")),
            ("5", EnginePacket::Upgrade),
            ("6", EnginePacket::Noop),
        ] {
            assert_eq!(read(text), Some(packet));
        }
        for bad in ["", "0", "7", "b", "é", " 1"] {
            assert_eq!(read(bad), None, "{bad}");
        }
    }

    #[test]
    fn bodies() {
        let body = "40\u{1e}bAQI=\u{1e}bAQI\u{1e}3";
        let bytes = || Some(EnginePacket::Binary(Cow::Owned(vec![1, 2])));
        let packets: Vec<_> = read_body(body).collect();
        assert_eq!(packets, [Some(EnginePacket::Message("0")), bytes(), bytes(), Some(EnginePacket::Pong)]);
        assert_eq!(read_body("b!").collect::<Vec<_>>(), [None]);
        assert_eq!(read_body("").collect::<Vec<_>>(), [None]);
    }

    #[derive(Clone, Debug)]
    enum Sent {
        Text(String),
        Binary(Vec<u8>),
    }

    fn sent() -> impl Strategy<Value = Sent> {
        prop_oneof![
            "[^\u{1e}]{0,20}".prop_map(Sent::Text),
            prop::collection::vec(any::<u8>(), 0..40).prop_map(Sent::Binary)
        ]
    }

    fn put(framing: Framing, sent: &[Sent]) -> Vec<u8> {
        let mut out = Vec::new();
        for one in sent {
            match one {
                Sent::Text(text) => framing.text(&mut out, |out| {
                    out.push(b'4');
                    out.extend_from_slice(text.as_bytes());
                }),
                Sent::Binary(bytes) => framing.binary(&mut out, bytes),
            }
        }
        out
    }

    proptest! {
        #[test]
        fn a_body_is_read_back(sent in prop::collection::vec(sent(), 1..6)) {
            let body = put(Framing::Polling, &sent);
            let read: Vec<_> = read_body(std::str::from_utf8(&body).unwrap()).collect();
            let expected: Vec<_> = sent
                .iter()
                .map(|sent| Some(match sent {
                    Sent::Text(text) => EnginePacket::Message(text),
                    Sent::Binary(bytes) => EnginePacket::Binary(Cow::Borrowed(bytes)),
                }))
                .collect();
            prop_assert_eq!(read, expected);
        }

        #[test]
        fn what_was_queued_for_a_poll_is_the_same_on_a_socket(sent in prop::collection::vec(sent(), 0..6)) {
            prop_assert_eq!(reframe(&put(Framing::Polling, &sent)), put(Framing::WebSocket, &sent));
        }

        #[test]
        fn any_text_is_read_or_refused(text in ".{0,60}") {
            read_body(&text).for_each(drop);
            let _ = read(&text);
        }
    }
}
