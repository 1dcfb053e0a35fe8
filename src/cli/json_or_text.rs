//! [`JsonOrText`]: data from the command line.

use serde::Serialize;
use serde_json::value::RawValue;

/// JSON is sent unmodified; any other text becomes a JSON string.
#[derive(Serialize)]
#[serde(untagged)]
pub(super) enum JsonOrText<'a> {
    Json(&'a RawValue),
    Text(&'a str),
}

impl<'a> JsonOrText<'a> {
    pub(super) fn of(text: &'a str) -> Self {
        serde_json::from_str(text).map_or(JsonOrText::Text(text), JsonOrText::Json)
    }
}
