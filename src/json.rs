//! JSON text without a tree: strings, single lines, and errors that name the member.
//!
//! A JSON string may contain half of a surrogate pair (`"\\ud83d"`), which is no character: JavaScript's `substring` cuts
//! emoji in two. JSON that stays JSON keeps it as it was written. Wherever text is taken out of JSON, it becomes U+FFFD.

use std::{borrow::Cow, fmt};

use serde::{
    Deserialize, Deserializer,
    de::{self, DeserializeOwned},
};
use serde_json::value::RawValue;

use crate::error::{Code, Error, Result};

/// A JSON string, borrowed unless it has escapes. (Serde copies an `Option<Cow<str>>` always.)
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct JsonStr<'a>(pub Cow<'a, str>);

/// JSON as it was received, without the byte order mark that some programs write before it (RFC 8259, section 8.1).
pub(crate) fn without_bom(json: &[u8]) -> &[u8] {
    json.strip_prefix("\u{feff}".as_bytes()).unwrap_or(json)
}

/// The text of a JSON body.
///
/// # Errors
/// `parse_error` if it is not UTF-8.
pub(crate) fn json_text(body: &[u8]) -> Result<&str> {
    std::str::from_utf8(without_bom(body)).map_err(|_| Error::new(Code::ParseError, "the body is not UTF-8"))
}

/// Parses JSON. The error names the member that it is about.
pub(crate) fn parse_json<'a, T: Deserialize<'a>>(json: &'a str) -> Result<T> {
    serde_json::from_str(json).map_err(|error| json_error_at_path::<T>(json, &error))
}

/// Converts the `error` of parsing `json` as a `T`, and adds the path of the member, which [`serde_json`] does not tell.
pub(crate) fn json_error_at_path<'a, T: Deserialize<'a>>(json: &'a str, error: &serde_json::Error) -> Error {
    let plain = json_error(error);
    if !error.is_data() {
        // A name of a member may be valid JSON and still no text, which serde_json reports as malformed.
        let valid = serde_json::from_str::<de::IgnoredAny>(json).is_ok();
        return if valid { Error::params(plain.detail().to_owned()) } else { plain };
    }
    // Parsed once more, with the path recorded: only requests with a mistake pay for it.
    let located = serde_path_to_error::deserialize::<_, T>(&mut serde_json::Deserializer::from_str(json));
    let Some(path) = located.err().map(|error| error.path().to_string()) else { return plain };
    let named =
        path.rsplit('.').next().is_none_or(|name| name.is_empty() || plain.detail().contains(&format!("`{name}`")));
    if named { plain } else { Error::params(format!("{path}: {}", plain.detail())) }
}

/// Converts an error of [`serde_json`]: malformed JSON is a `parse_error`, other values are `invalid_params`.
pub(crate) fn json_error(error: &serde_json::Error) -> Error {
    let code = if error.is_data() { Code::InvalidParams } else { Code::ParseError };
    Error::new(code, error.to_string())
}

impl std::ops::Deref for JsonStr<'_> {
    type Target = str;

    fn deref(&self) -> &str {
        &self.0
    }
}

impl<'de: 'a, 'a> Deserialize<'de> for JsonStr<'a> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Visitor;

        impl<'de> de::Visitor<'de> for Visitor {
            type Value = JsonStr<'de>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a string")
            }

            fn visit_borrowed_bytes<E: de::Error>(self, text: &'de [u8]) -> Result<JsonStr<'de>, E> {
                match std::str::from_utf8(text) {
                    Ok(text) if !text.bytes().any(|byte| byte < b' ') => Ok(JsonStr(Cow::Borrowed(text))),
                    _ => Err(E::custom("a string contains a control character")),
                }
            }

            fn visit_bytes<E>(self, text: &[u8]) -> Result<JsonStr<'de>, E> {
                Ok(JsonStr(Cow::Owned(from_wtf8(text))))
            }

            fn visit_str<E>(self, text: &str) -> Result<JsonStr<'de>, E> {
                Ok(JsonStr(Cow::Owned(text.to_owned())))
            }
        }

        // As bytes, because serde_json rejects a string with half a surrogate pair.
        deserializer.deserialize_bytes(Visitor)
    }
}

/// The text of a string that [`serde_json`] read as bytes: UTF-8, but for three bytes for each half of a surrogate pair.
fn from_wtf8(bytes: &[u8]) -> String {
    let mut out = String::with_capacity(bytes.len());
    for chunk in bytes.utf8_chunks() {
        out.push_str(chunk.valid());
        // The first byte of the half; its other two are invalid for themselves.
        if chunk.invalid().first().is_some_and(|byte| *byte == 0xed) {
            out.push(char::REPLACEMENT_CHARACTER);
        }
    }
    out
}

/// Replaces each half of a surrogate pair by the escape of U+FFFD, which has the same length.
pub(crate) fn well_formed(json: &str) -> Cow<'_, str> {
    let unit = |at: usize| {
        let digits = json.get(at..at + 6)?.strip_prefix("\\u")?;
        u32::from_str_radix(digits, 16).ok()
    };
    let mut out = String::new();
    let (mut copied, mut at) = (0, 0);
    while let Some(found) = memchr::memchr(b'\\', &json.as_bytes()[at..]) {
        at += found;
        match (unit(at), unit(at + 6)) {
            (Some(0xd800..0xdc00), Some(0xdc00..0xe000)) => at += 12,
            (Some(0xd800..0xe000), _) => {
                out.push_str(&json[copied..at]);
                out.push_str("\\ufffd");
                at += 6;
                copied = at;
            }
            // The escaped character may be a backslash.
            _ => at = json.len().min(at + 2),
        }
    }
    if copied == 0 {
        return Cow::Borrowed(json);
    }
    out.push_str(&json[copied..]);
    Cow::Owned(out)
}

/// Parses a whole document into values that own their text.
pub(crate) fn parse_owned<T: DeserializeOwned>(json: &[u8]) -> serde_json::Result<T> {
    match std::str::from_utf8(json) {
        Ok(text) => serde_json::from_str(&well_formed(text)),
        // It describes the mistake.
        Err(_) => serde_json::from_slice(json),
    }
}

/// Appends `text` as a JSON string.
pub(crate) fn write_json_str(text: &str, out: &mut Vec<u8>) {
    // Most are names without anything to escape, for which a copy takes a tenth of the time.
    if !text.bytes().any(|byte| byte < b' ' || byte == b'"' || byte == b'\\') {
        out.push(b'"');
        out.extend_from_slice(text.as_bytes());
        out.push(b'"');
        return;
    }
    // Writing into a Vec cannot fail.
    let _ = serde_json::to_writer(out, text);
}

/// The value of a JSON string; nearly always the text without its quotes.
pub(crate) fn read_json_str(json: &str) -> Cow<'_, str> {
    let inner = json.get(1..json.len().saturating_sub(1)).unwrap_or_default();
    if memchr::memchr(b'\\', inner.as_bytes()).is_none() {
        return Cow::Borrowed(inner);
    }
    serde_json::from_str(&well_formed(json)).map_or(Cow::Borrowed(inner), Cow::Owned)
}

/// Appends JSON as one line. Valid JSON has raw line ends only between tokens, where a space is equivalent.
pub(crate) fn write_json_line(json: &RawValue, out: &mut Vec<u8>) {
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
    use proptest::prelude::*;

    use super::*;

    /// Characters, escapes, and any sequence of UTF-16 units as escapes: whole pairs, halves and reversed pairs.
    fn json_string() -> impl Strategy<Value = String> {
        let unit =
            prop_oneof![0xd800..0xdc00u16, 0xdc00..0xe000u16, any::<u16>()].prop_map(|unit| format!("\\u{unit:04x}"));
        let upper = (0xd800..0xe000u16).prop_map(|unit| format!("\\u{unit:04X}"));
        let other = prop_oneof![Just("\\\\"), Just("\\n"), Just("\\\""), Just("é😀"), Just("u"), Just("d83d")];
        let piece = prop_oneof![4 => unit, 1 => upper, 3 => other.prop_map(str::to_owned)];
        proptest::collection::vec(piece, 0..12).prop_map(|pieces| format!("\"{}\"", pieces.concat()))
    }

    /// The text by the rules of UTF-16.
    fn expected(json: &str) -> String {
        let mut units: Vec<u16> = Vec::new();
        let mut rest = &json[1..json.len() - 1];
        while let Some(first) = rest.chars().next() {
            let escape = rest.strip_prefix('\\');
            let taken = match escape.and_then(|escape| escape.chars().next()) {
                Some('u') => {
                    units.push(u16::from_str_radix(&rest[2..6], 16).unwrap());
                    6
                }
                Some('n') => {
                    units.push(0x0a);
                    2
                }
                Some(escaped) => {
                    units.push(escaped as u16);
                    2
                }
                None => {
                    units.extend(first.encode_utf16(&mut [0; 2]).iter());
                    first.len_utf8()
                }
            };
            rest = &rest[taken..];
        }
        String::from_utf16_lossy(&units)
    }

    proptest! {
        #[test]
        fn half_a_surrogate_pair_becomes_u_fffd_on_every_way_out_of_json(json in json_string()) {
            let text = expected(&json);
            prop_assert_eq!(&*read_json_str(&json), &text);
            prop_assert_eq!(&*serde_json::from_str::<JsonStr<'_>>(&json).unwrap(), &text);
            prop_assert_eq!(&parse_owned::<String>(json.as_bytes()).unwrap(), &text);
            prop_assert_eq!(well_formed(&json).len(), json.len());
            let member = format!("{{{json}:[{json}]}}");
            let members: std::collections::BTreeMap<JsonStr<'_>, [JsonStr<'_>; 1]> = serde_json::from_str(&member).unwrap();
            let (name, [value]) = members.first_key_value().unwrap();
            prop_assert_eq!((&**name, &**value), (&*text, &*text));
        }

        #[test]
        fn any_text_is_replaced_or_left(text in "(\\\\|u|d83d|é|\"){0,12}") {
            prop_assert_eq!(well_formed(&text).len(), text.len());
        }
    }

    #[test]
    fn only_strings_are_read_as_strings() {
        for json in ["7", "null", "[100,101]", "{}", "\"a\nb\"", "\"a", "\"\\x\"", "\"\\ud83\""] {
            assert!(serde_json::from_str::<JsonStr<'_>>(json).is_err(), "{json}");
        }
    }
}
