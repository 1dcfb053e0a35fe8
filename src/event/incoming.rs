//! [`IncomingEvent`], an event as a client sends it: with the same members on every transport.

use base64::{Engine, engine::general_purpose::STANDARD as BASE64};
use serde::{Deserialize, Deserializer};
use serde_json::value::RawValue;

use super::{Draft, DraftParts, EventData};
use crate::{
    channel::Channel,
    error::{Error, Result},
    json::JsonStr,
};

/// `{channel, type?, from?, data?, data_base64?, meta?, key?}`, borrowed from the text it was parsed from.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct IncomingEvent<'a> {
    #[serde(borrow)]
    pub(crate) channel: JsonStr<'a>,
    #[serde(rename = "type", borrow)]
    pub(crate) kind: Option<JsonStr<'a>>,
    #[serde(borrow)]
    pub(crate) from: Option<JsonStr<'a>>,
    // Serde's own `Option` would read `null` as absent.
    #[serde(default, borrow, deserialize_with = "present")]
    pub(crate) data: Option<&'a RawValue>,
    #[serde(borrow)]
    pub(crate) data_base64: Option<JsonStr<'a>>,
    #[serde(default, borrow, deserialize_with = "present")]
    pub(crate) meta: Option<&'a RawValue>,
    #[serde(borrow)]
    pub(crate) key: Option<JsonStr<'a>>,
}

impl IncomingEvent<'_> {
    /// Validates and encodes the event. `limit` is its largest encoded size, in bytes.
    pub(crate) fn draft(&self, limit: usize) -> Result<(Channel, Draft)> {
        let channel = Channel::parse(&self.channel)?;
        let bytes;
        let data = match (self.data, &self.data_base64) {
            (Some(_), Some(_)) => return Err(Error::params("data and data_base64 exclude each other")),
            (Some(json), None) => EventData::Json(json),
            (None, Some(text)) => {
                bytes = BASE64.decode(text.as_bytes()).map_err(|_| Error::params("data_base64 is not base64"))?;
                EventData::Bytes(&bytes)
            }
            (None, None) => EventData::None,
        };
        let parts = DraftParts {
            kind: self.kind.as_deref(),
            from: self.from.as_deref(),
            meta: self.meta,
            data,
            key: self.key.as_deref(),
        };
        Ok((channel, Draft::new(parts, limit)?))
    }
}

fn present<'de: 'a, 'a, D: Deserializer<'de>>(deserializer: D) -> Result<Option<&'a RawValue>, D::Error> {
    <&RawValue>::deserialize(deserializer).map(Some)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{error::Code, json::json_error};

    fn read(json: &str) -> Result<(Channel, Draft)> {
        serde_json::from_str::<IncomingEvent<'_>>(json).map_err(|error| json_error(&error))?.draft(1_000_000)
    }

    fn rejected(json: &str) -> Code {
        read(json).unwrap_err().code()
    }

    #[test]
    fn null_is_data_and_absent_is_not() {
        let sizes = [r#"{"channel":"a"}"#, r#"{"channel":"a","data":null}"#].map(|json| read(json).unwrap().1.size());
        assert!(sizes[0] < sizes[1]);
        assert_eq!(read(r#"{"channel":"a","data_base64":"AP8="}"#).unwrap().0.as_str(), "a");
    }

    #[test]
    fn malformed_events_are_rejected() {
        assert_eq!(rejected("{"), Code::ParseError);
        assert_eq!(rejected(r#"{"channel":"a",}"#), Code::ParseError);
        assert_eq!(rejected("7"), Code::InvalidParams);
        assert_eq!(rejected("{}"), Code::InvalidParams);
        assert_eq!(rejected(r#"{"channel":7}"#), Code::InvalidParams);
        assert_eq!(rejected(r#"{"channel":"a","typ":"x"}"#), Code::InvalidParams);
        assert_eq!(rejected(r#"{"channel":"a","type":"weir.gap"}"#), Code::InvalidParams);
        assert_eq!(rejected(r#"{"channel":"a","data":1,"data_base64":"AA=="}"#), Code::InvalidParams);
        assert_eq!(rejected(r#"{"channel":"a","data_base64":"!"}"#), Code::InvalidParams);
        assert_eq!(rejected(r#"{"channel":"a","meta":null}"#), Code::InvalidParams);
    }
}
