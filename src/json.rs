//! Reading and writing JSON text without a tree: strings, single lines, and errors that name the member.

use std::{borrow::Cow, fmt};

use serde::{Deserialize, Deserializer, de};
use serde_json::value::RawValue;

use crate::error::{Code, Error, Result};

/// A string of JSON, borrowed unless it holds escapes. (`Option<Cow<str>>` would always copy.)
#[derive(Debug, Clone)]
pub struct JsonStr<'a>(pub Cow<'a, str>);

/// Reads JSON; an error about a member names it.
pub fn parse_json<'a, T: Deserialize<'a>>(json: &'a str) -> Result<T> {
    serde_json::from_str(json).map_err(|error| json_error_at_path::<T>(json, &error))
}

/// What is wrong with `json`, which [`serde_json`] could not read as a `T`. It says what it met, but not as whose value.
pub fn json_error_at_path<'a, T: Deserialize<'a>>(json: &'a str, error: &serde_json::Error) -> Error {
    let plain = json_error(error);
    if !error.is_data() {
        return plain;
    }
    // A second time, with somebody who takes note of the way: nobody waits for that but who made the mistake.
    let again = serde_path_to_error::deserialize::<_, T>(&mut serde_json::Deserializer::from_str(json));
    let Some(path) = again.err().map(|error| error.path().to_string()) else { return plain };
    let said =
        path.rsplit('.').next().is_none_or(|name| name.is_empty() || plain.detail().contains(&format!("`{name}`")));
    if said { plain } else { Error::params(format!("{path}: {}", plain.detail())) }
}

/// Tells JSON that is malformed (`parse_error`) from JSON that says the wrong thing (`invalid_params`).
pub fn json_error(error: &serde_json::Error) -> Error {
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
