//! Socket.IO packets (protocol 5) as text: `2["event",…]`, `40`, `51-["event",{"_placeholder":true,"num":0}]` and the
//! bytes that follow it. A leaf: it knows no session.

use std::fmt;

use serde::{
    Deserialize, Deserializer,
    de::{IgnoredAny, SeqAccess, Visitor},
};
use serde_json::value::RawValue;

use crate::json::{JsonStr, write_json_str};

/// What a client sends.
#[derive(Debug, PartialEq, Eq)]
pub struct Packet<'a> {
    pub kind: Kind,
    /// Messages of bytes that belong to it and follow.
    pub attachments: usize,
    /// `/` unless another is named.
    pub namespace: &'a str,
    /// JSON that may be invalid; empty if there is none.
    pub payload: &'a str,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    Connect,
    Disconnect,
    Event,
    Ack,
    ConnectError,
}

/// An event and its first argument, borrowed from the text they came in.
#[derive(Debug)]
pub struct Event<'a> {
    pub name: JsonStr<'a>,
    pub argument: Option<&'a RawValue>,
}

/// Most messages of bytes that belong to one packet.
const MAX_ATTACHMENTS: usize = 1_000;

impl<'a> Packet<'a> {
    /// Reads a packet, but for its JSON. `None` if it is none.
    pub fn read(text: &'a str) -> Option<Self> {
        let (digit, mut rest) = text.split_at_checked(1)?;
        let (kind, binary) = match digit {
            "0" => (Kind::Connect, false),
            "1" => (Kind::Disconnect, false),
            "2" => (Kind::Event, false),
            "3" => (Kind::Ack, false),
            "4" => (Kind::ConnectError, false),
            "5" => (Kind::Event, true),
            "6" => (Kind::Ack, true),
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
        // Nobody is answered: acknowledgements are not among what is spoken here.
        let payload = rest.trim_start_matches(|letter: char| letter.is_ascii_digit());
        Some(Packet { kind, attachments, namespace, payload })
    }
}

impl<'de: 'a, 'a> Deserialize<'de> for Event<'a> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Arguments;

        impl<'de> Visitor<'de> for Arguments {
            type Value = Event<'de>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an event")
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<Event<'de>, A::Error> {
                let missing = || serde::de::Error::invalid_length(0, &"an event");
                let name = list.next_element()?.ok_or_else(missing)?;
                let argument = list.next_element()?;
                if argument.is_some() {
                    while list.next_element::<IgnoredAny>()?.is_some() {}
                }
                Ok(Event { name, argument })
            }
        }

        deserializer.deserialize_seq(Arguments)
    }
}

/// The opening of an event with one argument, up to the argument: `42["name",` as Engine.IO carries it.
pub fn open_event(out: &mut Vec<u8>, name: &str, attachments: usize) {
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

/// The end of what [`open_event`] began.
pub fn close_event(out: &mut Vec<u8>) {
    out.push(b']');
}

/// A refused connection: `44{"message":…,"data":…}`. `data` is JSON.
pub fn connect_error(namespace: &str, message: &str, data: Option<&str>) -> String {
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
        kind: Kind,
        attachments: usize,
        namespace: &'static str,
        payload: &'static str,
    ) -> Option<Packet<'static>> {
        Some(Packet { kind, attachments, namespace, payload })
    }

    #[test]
    fn packets() {
        assert_eq!(Packet::read("0"), packet(Kind::Connect, 0, "/", ""));
        assert_eq!(Packet::read("0{\"token\":1}"), packet(Kind::Connect, 0, "/", "{\"token\":1}"));
        assert_eq!(Packet::read("0/admin,{}"), packet(Kind::Connect, 0, "/admin", "{}"));
        assert_eq!(Packet::read("0/admin"), packet(Kind::Connect, 0, "/admin", ""));
        assert_eq!(Packet::read("1"), packet(Kind::Disconnect, 0, "/", ""));
        assert_eq!(Packet::read("2[\"a\"]"), packet(Kind::Event, 0, "/", "[\"a\"]"));
        assert_eq!(Packet::read("212[\"a\"]"), packet(Kind::Event, 0, "/", "[\"a\"]"));
        assert_eq!(Packet::read("3/x,7[]"), packet(Kind::Ack, 0, "/x", "[]"));
        assert_eq!(Packet::read("52-[\"a\"]"), packet(Kind::Event, 2, "/", "[\"a\"]"));
        assert_eq!(Packet::read("61-3[]"), packet(Kind::Ack, 1, "/", "[]"));
        for bad in ["", "7", "5", "5[]", "5-[]", "51", "5+1-[]", "51001-[]", "5x-[]", "é"] {
            assert_eq!(Packet::read(bad), None, "{bad}");
        }
    }

    #[test]
    fn events() {
        let read = |json| {
            serde_json::from_str::<Event<'_>>(json)
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
            let packet = Packet::read(text).unwrap();
            prop_assert_eq!((packet.kind, packet.attachments, packet.namespace), (Kind::Event, count, "/"));
            let event: Event<'_> = serde_json::from_str(packet.payload).unwrap();
            prop_assert_eq!((&*event.name.0, event.argument.unwrap().get()), (&*name, &*json));
        }

        #[test]
        fn any_text_is_read_or_refused(text in "[0-9/,\\-\\[{\"a]{0,20}|.{0,20}") {
            if let Some(packet) = Packet::read(&text) {
                let _ = serde_json::from_str::<Event<'_>>(packet.payload);
            }
        }
    }
}
