//! JSON text without a tree: strings, single lines, and errors that name the member.

use std::{borrow::Cow, fmt};

use serde::{Deserialize, Deserializer, de};
use serde_json::value::RawValue;

use crate::error::{Code, Error, Result};

/// A JSON string, borrowed unless it has escapes. (Serde copies an `Option<Cow<str>>` always.)
#[derive(Debug, Clone)]
pub(crate) struct JsonStr<'a>(pub Cow<'a, str>);

/// Parses JSON. The error names the member that it is about.
pub(crate) fn parse_json<'a, T: Deserialize<'a>>(json: &'a str) -> Result<T> {
    serde_json::from_str(json).map_err(|error| json_error_at_path::<T>(json, &error))
}

/// Converts the `error` of parsing `json` as a `T`, and adds the path of the member, which [`serde_json`] does not tell.
pub(crate) fn json_error_at_path<'a, T: Deserialize<'a>>(json: &'a str, error: &serde_json::Error) -> Error {
    let plain = json_error(error);
    if !error.is_data() {
        return plain;
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

            fn visit_borrowed_str<E>(self, text: &'de str) -> Result<JsonStr<'de>, E> {
                Ok(JsonStr(Cow::Borrowed(text)))
            }

            fn visit_str<E>(self, text: &str) -> Result<JsonStr<'de>, E> {
                Ok(JsonStr(Cow::Owned(text.to_owned())))
            }
        }

        deserializer.deserialize_str(Visitor)
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
    // A lone surrogate is valid JSON but not a valid string: it stays as written.
    serde_json::from_str(json).map_or(Cow::Borrowed(inner), Cow::Owned)
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
