//! An event as a client sends it: [`Incoming`], the same members on every way in.

use std::{borrow::Cow, fmt};

use base64::{Engine, engine::general_purpose::STANDARD as BASE64};
use serde::{Deserialize, Deserializer, de};
use serde_json::value::RawValue;

use super::{Channel, Data, Draft, Parts};
use crate::error::{Code, Error, Result};

/// `{channel, type?, from?, data?, data_base64?, meta?, key?}`, borrowed from the text it was parsed from.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Incoming<'a> {
    #[serde(borrow)]
    pub channel: Text<'a>,
    #[serde(rename = "type", borrow)]
    pub kind: Option<Text<'a>>,
    #[serde(borrow)]
    pub from: Option<Text<'a>>,
    // Not an Option of serde's making: that reads `null` as absent.
    #[serde(default, borrow, deserialize_with = "present")]
    pub data: Option<&'a RawValue>,
    #[serde(borrow)]
    pub data_base64: Option<Text<'a>>,
    #[serde(default, borrow, deserialize_with = "present")]
    pub meta: Option<&'a RawValue>,
    #[serde(borrow)]
    pub key: Option<Text<'a>>,
}

/// A string of JSON, borrowed unless it holds escapes. (`Option<Cow<str>>` would always copy.)
#[derive(Debug, Clone)]
pub struct Text<'a>(pub Cow<'a, str>);

impl Incoming<'_> {
    /// Checks and encodes. `limit` is the largest encoded event, in bytes.
    pub fn draft(&self, limit: usize) -> Result<(Channel, Draft)> {
        let channel = Channel::parse(&self.channel)?;
        let bytes;
        let data = match (self.data, &self.data_base64) {
            (Some(_), Some(_)) => return Err(Error::params("data and data_base64 exclude each other")),
            (Some(json), None) => Data::Json(json),
            (None, Some(text)) => {
                bytes = BASE64.decode(text.as_bytes()).map_err(|_| Error::params("data_base64 is not base64"))?;
                Data::Bytes(&bytes)
            }
            (None, None) => Data::None,
        };
        let parts = Parts {
            kind: self.kind.as_deref(),
            from: self.from.as_deref(),
            meta: self.meta,
            data,
            key: self.key.as_deref(),
        };
        Ok((channel, Draft::new(parts, limit)?))
    }
}

/// Reads JSON; an error about a member names it.
pub fn parse<'a, T: Deserialize<'a>>(json: &'a str) -> Result<T> {
    serde_json::from_str(json).map_err(|error| misread::<T>(json, &error))
}

/// What is wrong with `json`, which [`serde_json`] could not read as a `T`. It says what it met, but not as whose value.
pub fn misread<'a, T: Deserialize<'a>>(json: &'a str, error: &serde_json::Error) -> Error {
    let unreadable = unreadable(error);
    if !error.is_data() {
        return unreadable;
    }
    // A second time, with somebody who takes note of the way: nobody waits for that but who made the mistake.
    let again = serde_path_to_error::deserialize::<_, T>(&mut serde_json::Deserializer::from_str(json));
    let Some(path) = again.err().map(|error| error.path().to_string()) else { return unreadable };
    let said = path
        .rsplit('.')
        .next()
        .is_none_or(|name| name.is_empty() || unreadable.detail().contains(&format!("`{name}`")));
    if said { unreadable } else { Error::params(format!("{path}: {}", unreadable.detail())) }
}

/// Tells JSON that is malformed (`parse_error`) from JSON that says the wrong thing (`invalid_params`).
pub fn unreadable(error: &serde_json::Error) -> Error {
    let code = if error.is_data() { Code::InvalidParams } else { Code::ParseError };
    Error::new(code, error.to_string())
}

fn present<'de: 'a, 'a, D: Deserializer<'de>>(deserializer: D) -> Result<Option<&'a RawValue>, D::Error> {
    <&RawValue>::deserialize(deserializer).map(Some)
}

impl std::ops::Deref for Text<'_> {
    type Target = str;

    fn deref(&self) -> &str {
        &self.0
    }
}

impl<'de: 'a, 'a> Deserialize<'de> for Text<'a> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Visitor;

        impl<'de> de::Visitor<'de> for Visitor {
            type Value = Text<'de>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a string")
            }

            fn visit_borrowed_str<E>(self, text: &'de str) -> Result<Text<'de>, E> {
                Ok(Text(Cow::Borrowed(text)))
            }

            fn visit_str<E>(self, text: &str) -> Result<Text<'de>, E> {
                Ok(Text(Cow::Owned(text.to_owned())))
            }
        }

        deserializer.deserialize_str(Visitor)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(json: &str) -> Result<(Channel, Draft)> {
        serde_json::from_str::<Incoming<'_>>(json).map_err(|error| unreadable(&error))?.draft(1_000_000)
    }

    fn refused(json: &str) -> Code {
        read(json).unwrap_err().code()
    }

    #[test]
    fn null_is_data_and_absent_is_not() {
        let sizes = [r#"{"channel":"a"}"#, r#"{"channel":"a","data":null}"#].map(|json| read(json).unwrap().1.size());
        assert!(sizes[0] < sizes[1]);
        assert_eq!(read(r#"{"channel":"a","data_base64":"AP8="}"#).unwrap().0.as_str(), "a");
    }

    #[test]
    fn what_is_refused_and_why() {
        assert_eq!(refused("{"), Code::ParseError);
        assert_eq!(refused(r#"{"channel":"a",}"#), Code::ParseError);
        assert_eq!(refused("7"), Code::InvalidParams);
        assert_eq!(refused("{}"), Code::InvalidParams);
        assert_eq!(refused(r#"{"channel":7}"#), Code::InvalidParams);
        assert_eq!(refused(r#"{"channel":"a","typ":"x"}"#), Code::InvalidParams);
        assert_eq!(refused(r#"{"channel":"a","type":"weir.gap"}"#), Code::InvalidParams);
        assert_eq!(refused(r#"{"channel":"a","data":1,"data_base64":"AA=="}"#), Code::InvalidParams);
        assert_eq!(refused(r#"{"channel":"a","data_base64":"!"}"#), Code::InvalidParams);
        assert_eq!(refused(r#"{"channel":"a","meta":null}"#), Code::InvalidParams);
    }
}
