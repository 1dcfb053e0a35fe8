//! Socket.IO packets (protocol 5) as text: `2["event",…]`, `40`, `51-["event",{"_placeholder":true,"num":0}]` and the
//! binary attachments that follow it. Independent of sessions.

use std::fmt;

use serde::{
    Deserialize, Deserializer,
    de::{IgnoredAny, SeqAccess, Visitor},
};
use serde_json::value::RawValue;

use crate::json::{JsonStr, write_json_str};

/// A packet from a client.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct SocketIoPacket<'a> {
    pub(super) kind: SocketIoKind,
    /// The number of binary attachments, which follow as messages of their own.
    pub(super) attachments: usize,
    /// `/` is the default.
    pub(super) namespace: &'a str,
    /// JSON, not validated; may be empty.
    pub(super) payload: &'a str,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum SocketIoKind {
    Connect,
    Disconnect,
    Event,
    Ack,
    ConnectError,
}

/// An event and its first argument, borrowed from the text of the packet.
#[derive(Debug)]
pub(super) struct SocketIoEvent<'a> {
    pub(super) name: JsonStr<'a>,
    pub(super) argument: Option<&'a RawValue>,
}

/// Maximum number of attachments of one packet.
const MAX_ATTACHMENTS: usize = 1_000;

impl<'a> SocketIoPacket<'a> {
    /// Parses a packet, except for its JSON. `None` if it is invalid.
    pub(super) fn read(text: &'a str) -> Option<Self> {
        let (digit, mut rest) = text.split_at_checked(1)?;
        let (kind, binary) = match digit {
            "0" => (SocketIoKind::Connect, false),
            "1" => (SocketIoKind::Disconnect, false),
            "2" => (SocketIoKind::Event, false),
            "3" => (SocketIoKind::Ack, false),
            "4" => (SocketIoKind::ConnectError, false),
            "5" => (SocketIoKind::Event, true),
            "6" => (SocketIoKind::Ack, true),
            _ => return None,
        };
        let mut attachments = 0;
        if binary {
            let (count, behind) = rest.split_once('-')?;
            let digits = !count.is_empty() && count.bytes().all(|byte| byte.is_ascii_digit());
            attachments = count.parse().ok().filter(|count| digits && *count <= MAX_ATTACHMENTS)?;
            rest = behind;
        }
        let mut namespace = "/";
        if rest.starts_with('/') {
            (namespace, rest) = rest.split_once(',').unwrap_or((rest, ""));
        }
        // The id of an acknowledgement is skipped: acknowledgements are not supported.
        let payload = rest.trim_start_matches(|letter: char| letter.is_ascii_digit());
        Some(SocketIoPacket { kind, attachments, namespace, payload })
    }
}

impl<'de: 'a, 'a> Deserialize<'de> for SocketIoEvent<'a> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Arguments;

        impl<'de> Visitor<'de> for Arguments {
            type Value = SocketIoEvent<'de>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an event")
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<SocketIoEvent<'de>, A::Error> {
                let missing = || serde::de::Error::invalid_length(0, &"an event");
                let name = list.next_element()?.ok_or_else(missing)?;
                let argument = list.next_element()?;
                if argument.is_some() {
                    while list.next_element::<IgnoredAny>()?.is_some() {}
                }
                Ok(SocketIoEvent { name, argument })
            }
        }

        deserializer.deserialize_seq(Arguments)
    }
}

/// Appends the beginning of an event with one argument, up to the argument: `42["name",` in an Engine.IO message.
pub(super) fn open_event(out: &mut Vec<u8>, name: &str, attachments: usize) {
    match attachments {
        0 => out.extend_from_slice(b"42["),
        count => {
            out.extend_from_slice(b"45");
            out.extend_from_slice(itoa::Buffer::new().format(count).as_bytes());
            out.extend_from_slice(b"-[");
        }
    }
    write_json_str(name, out);
    out.push(b',');
}

/// Appends the end of an event that [`open_event`] began.
pub(super) fn close_event(out: &mut Vec<u8>) {
    out.push(b']');
}

/// A connect error: `44{"message":…,"data":…}`. `data` is JSON.
pub(super) fn connect_error(namespace: &str, message: &str, data: Option<&str>) -> String {
    let mut out = b"44".to_vec();
    if namespace != "/" {
        out.extend_from_slice(namespace.as_bytes());
        out.push(b',');
    }
    out.extend_from_slice(br#"{"message":"#);
    write_json_str(message, &mut out);
    if let Some(data) = data {
        out.extend_from_slice(br#","data":"#);
        out.extend_from_slice(data.as_bytes());
    }
    out.push(b'}');
    String::from_utf8(out).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn packet(
        kind: SocketIoKind,
        attachments: usize,
        namespace: &'static str,
        payload: &'static str,
    ) -> Option<SocketIoPacket<'static>> {
        Some(SocketIoPacket { kind, attachments, namespace, payload })
    }

    #[test]
    fn packets() {
        assert_eq!(SocketIoPacket::read("0"), packet(SocketIoKind::Connect, 0, "/", ""));
        assert_eq!(SocketIoPacket::read("0{\"token\":1}"), packet(SocketIoKind::Connect, 0, "/", "{\"token\":1}"));
        assert_eq!(SocketIoPacket::read("0/admin,{}"), packet(SocketIoKind::Connect, 0, "/admin", "{}"));
        assert_eq!(SocketIoPacket::read("0/admin"), packet(SocketIoKind::Connect, 0, "/admin", ""));
        assert_eq!(SocketIoPacket::read("1"), packet(SocketIoKind::Disconnect, 0, "/", ""));
        assert_eq!(SocketIoPacket::read("2[\"a\"]"), packet(SocketIoKind::Event, 0, "/", "[\"a\"]"));
        assert_eq!(SocketIoPacket::read("212[\"a\"]"), packet(SocketIoKind::Event, 0, "/", "[\"a\"]"));
        assert_eq!(SocketIoPacket::read("3/x,7[]"), packet(SocketIoKind::Ack, 0, "/x", "[]"));
        assert_eq!(SocketIoPacket::read("52-[\"a\"]"), packet(SocketIoKind::Event, 2, "/", "[\"a\"]"));
        assert_eq!(SocketIoPacket::read("61-3[]"), packet(SocketIoKind::Ack, 1, "/", "[]"));
        for bad in ["", "7", "5", "5[]", "5-[]", "51", "5+1-[]", "51001-[]", "5x-[]", "é"] {
            assert_eq!(SocketIoPacket::read(bad), None, "{bad}");
        }
    }

    #[test]
    fn events() {
        let read = |json| {
            serde_json::from_str::<SocketIoEvent<'_>>(json)
                .map(|event| (event.name.0.into_owned(), event.argument.map(|argument| argument.get().to_owned())))
        };
        assert_eq!(read(r#"["a",{"b":[1]},7]"#).unwrap(), ("a".into(), Some(r#"{"b":[1]}"#.into())));
        assert_eq!(read(r#"["a\n"]"#).unwrap(), ("a\n".into(), None));
        for bad in ["[]", "[1,{}]", "{}", "[\"a\"", "null", "[\"a\",]", "[\"a\"]]"] {
            assert!(read(bad).is_err(), "{bad}");
        }
    }

    proptest! {
        #[test]
        fn an_event_is_read_back(name in "[^\u{0}-\u{1f}]{0,20}", json in "\\{\"[a-z]{1,5}\":[1-9][0-9]{0,2}\\}", count in 0..=MAX_ATTACHMENTS) {
            let mut out = Vec::new();
            open_event(&mut out, &name, count);
            out.extend_from_slice(json.as_bytes());
            close_event(&mut out);
            let text = std::str::from_utf8(&out).unwrap().strip_prefix('4').unwrap();
            let packet = SocketIoPacket::read(text).unwrap();
            prop_assert_eq!((packet.kind, packet.attachments, packet.namespace), (SocketIoKind::Event, count, "/"));
            let event: SocketIoEvent<'_> = serde_json::from_str(packet.payload).unwrap();
            prop_assert_eq!((&*event.name.0, event.argument.unwrap().get()), (&*name, &*json));
        }

        #[test]
        fn any_text_is_read_or_refused(text in "[0-9/,\\-\\[{\"a]{0,20}|.{0,20}") {
            if let Some(packet) = SocketIoPacket::read(&text) {
                let _ = serde_json::from_str::<SocketIoEvent<'_>>(packet.payload);
            }
        }
    }
}
