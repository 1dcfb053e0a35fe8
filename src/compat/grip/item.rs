//! [`PublishItem`]: the unit of publishing, in one or more formats. The texts of errors are Pushpin's.

use std::collections::BTreeMap;

use http::{HeaderMap, StatusCode};
use serde_json::{Map, Value};

use super::members::{bytes_of, code_of, headers_of, text_of};
use crate::json::parse_owned;

#[derive(Debug, Default, PartialEq)]
pub(super) struct PublishItem {
    pub(super) channel: String,
    pub(super) id: Option<String>,
    /// The predecessor in the channel.
    pub(super) prev_id: Option<String>,
    /// The publisher's metadata for filters.
    pub(super) meta: BTreeMap<String, String>,
    /// Published without waiting for the predecessor (`no-seq`).
    pub(super) unordered: bool,
    pub(super) stream: Option<FormatAction<Vec<u8>>>,
    pub(super) response: Option<FormatAction<ItemResponse>>,
}

/// The effect of one format of an item on a held response.
#[derive(Debug, PartialEq)]
pub(super) enum FormatAction<T> {
    Send(T),
    /// The proxy requests the data from the origin.
    Hint,
    Close,
}

/// The format `http-response`.
#[derive(Debug, PartialEq)]
pub(super) struct ItemResponse {
    pub(super) code: StatusCode,
    pub(super) headers: HeaderMap,
    pub(super) body: ItemBody,
}

#[derive(Debug, PartialEq)]
pub(super) enum ItemBody {
    Bytes(Vec<u8>),
    /// A JSON Patch of the body of the origin's response.
    Patch(Value),
}

/// All items of a request. The error is the body of a 400 response.
pub(super) fn read(body: &[u8]) -> Result<Vec<PublishItem>, String> {
    let document: Value = parse_owned(body).map_err(|_| "Body is not valid JSON.\n".to_owned())?;
    let Value::Object(document) = document else { return Err("Invalid format.\n".into()) };
    let items = match document.get("items") {
        None => Err("object does not contain 'items'".to_owned()),
        Some(Value::Array(items)) => items.iter().map(PublishItem::read).collect(),
        Some(_) => Err("object contains 'items' with wrong type".to_owned()),
    };
    items.map_err(|error| format!("Invalid format: {error}\n"))
}

impl PublishItem {
    fn read(value: &Value) -> Result<Self, String> {
        const WHAT: &str = "publish item object";
        let from = value.as_object().ok_or_else(|| format!("{WHAT} is not an object"))?;
        let channel = text_of(from, WHAT, "channel")?.ok_or_else(|| format!("{WHAT} does not contain 'channel'"))?;
        let owned = |key: &str| Ok::<_, String>(text_of(from, WHAT, key)?.map(str::to_owned));
        let mut item = PublishItem {
            channel: channel.to_owned(),
            id: owned("id")?,
            prev_id: owned("prev-id")?,
            ..PublishItem::default()
        };
        // In the old notation, the formats are members of the item itself.
        let formats = match from.get("formats") {
            None => from,
            Some(formats) => formats.as_object().ok_or_else(|| format!("{WHAT} contains 'formats' with wrong type"))?,
        };
        let old_notation = !from.contains_key("formats");
        let known = ["http-response", "http-stream", "ws-message"];
        if formats.is_empty() || (old_notation && !known.iter().any(|format| formats.contains_key(*format))) {
            return Err("no formats specified".into());
        }
        if let Some(format) = formats.get("http-response") {
            item.response = Some(response(format)?);
        }
        if let Some(format) = formats.get("http-stream") {
            item.stream = Some(stream(format)?);
        }
        if let Some(meta) = from.get("meta") {
            for (key, value) in meta.as_object().ok_or_else(|| format!("{WHAT} contains 'meta' with wrong type"))? {
                let value = value.as_str().ok_or_else(|| format!("'meta' contains '{key}' with wrong type"))?;
                item.meta.insert(key.clone(), value.to_owned());
            }
        }
        if let Some(unordered) = from.get("no-seq") {
            item.unordered = unordered.as_bool().ok_or_else(|| format!("{WHAT} contains 'no-seq' with wrong type"))?;
        }
        Ok(item)
    }
}

fn action<T>(
    format: &Value,
    what: &str,
    send: impl FnOnce(&Map<String, Value>) -> Result<T, String>,
) -> Result<FormatAction<T>, String> {
    let format = format.as_object().ok_or_else(|| format!("{what} is not an object"))?;
    match text_of(format, what, "action")? {
        None | Some("send") => send(format).map(FormatAction::Send),
        Some("hint") => Ok(FormatAction::Hint),
        Some("close") => Ok(FormatAction::Close),
        Some(_) => Err(format!("{what} contains 'action' with unknown value")),
    }
}

fn stream(format: &Value) -> Result<FormatAction<Vec<u8>>, String> {
    const WHAT: &str = "'http-stream'";
    action(format, WHAT, |format| {
        bytes_of(format, WHAT, "content-bin", "content")?
            .ok_or_else(|| format!("{WHAT} does not contain 'content' or 'content-bin'"))
    })
}

fn response(format: &Value) -> Result<FormatAction<ItemResponse>, String> {
    const WHAT: &str = "'http-response'";
    action(format, WHAT, |format| {
        let code = code_of(format, WHAT)?.unwrap_or(StatusCode::OK);
        // Checked, but dropped: HTTP/2 has no reason phrase.
        text_of(format, WHAT, "reason")?;
        let headers = headers_of(format, WHAT)?;
        let body = match (bytes_of(format, WHAT, "body-bin", "body")?, format.get("body-patch")) {
            (Some(bytes), _) => ItemBody::Bytes(bytes),
            (None, Some(patch)) if patch.is_array() => ItemBody::Patch(patch.clone()),
            (None, Some(_)) => return Err(format!("{WHAT} contains 'body-patch' with wrong type")),
            (None, None) => return Err(format!("{WHAT} does not contain 'body', 'body-bin', or 'body-patch'")),
        };
        Ok(ItemResponse { code, headers, body })
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn items_in_all_notations() {
        let items = read(
            br#"{"items":[
                {"formats":{"http-stream":{"content":"event: message\ndata: {\"a\":1}\n\n"}},"channel":"events-abc"},
                {"channel":"b","id":"2","prev-id":"1","meta":{"sender":"s"},"formats":{"http-stream":{"content-bin":"AP8="},
                    "http-response":{"code":"201","reason":"Yes","headers":{"X-A":"1"},"body-bin":"AA=="}}},
                {"channel":"c","http-stream":{"action":"close","content":""}},
                {"channel":"d","formats":{"http-response":{"action":"hint"},"ws-message":{"content":1},"other":0}}]}"#,
        )
        .unwrap();
        let [a, b, c, d] = &items[..] else { panic!("{items:?}") };
        assert_eq!(a.stream, Some(FormatAction::Send(b"event: message\ndata: {\"a\":1}\n\n".to_vec())));
        assert_eq!((a.id.as_deref(), a.response.is_none()), (None, true));
        assert_eq!((b.id.as_deref(), b.prev_id.as_deref(), &b.meta["sender"][..]), (Some("2"), Some("1"), "s"));
        assert_eq!(b.stream, Some(FormatAction::Send(vec![0, 255])));
        let Some(FormatAction::Send(response)) = &b.response else { panic!("{b:?}") };
        assert_eq!((response.code.as_u16(), &response.body), (201, &ItemBody::Bytes(vec![0])));
        assert_eq!((&c.stream, &d.stream, &d.response), (&Some(FormatAction::Close), &None, &Some(FormatAction::Hint)));
        assert_eq!(read(br#"{"items":[]}"#).unwrap(), []);
    }

    #[test]
    fn errors_have_the_texts_of_pushpin() {
        let item = |formats: &str| format!(r#"{{"items":[{{"channel":"a","formats":{formats}}}]}}"#);
        for (body, wrong) in [
            ("", "Body is not valid JSON.\n"),
            ("[]", "Invalid format.\n"),
            ("{}", "Invalid format: object does not contain 'items'\n"),
            (r#"{"items":{}}"#, "Invalid format: object contains 'items' with wrong type\n"),
            (r#"{"items":[1]}"#, "Invalid format: publish item object is not an object\n"),
            (r#"{"items":[{}]}"#, "Invalid format: publish item object does not contain 'channel'\n"),
            (
                r#"{"items":[{"channel":1}]}"#,
                "Invalid format: publish item object contains 'channel' with wrong type\n",
            ),
            (r#"{"items":[{"channel":"a"}]}"#, "Invalid format: no formats specified\n"),
            (&item("{}"), "Invalid format: no formats specified\n"),
            (&item(r#"{"http-stream":1}"#), "Invalid format: 'http-stream' is not an object\n"),
            (
                &item(r#"{"http-stream":{}}"#),
                "Invalid format: 'http-stream' does not contain 'content' or 'content-bin'\n",
            ),
            (
                &item(r#"{"http-stream":{"content":1}}"#),
                "Invalid format: 'http-stream' contains 'content' with wrong type\n",
            ),
            (
                &item(r#"{"http-response":{}}"#),
                "Invalid format: 'http-response' does not contain 'body', 'body-bin', or 'body-patch'\n",
            ),
            (
                &item(r#"{"http-response":{"code":1000,"body":""}}"#),
                "Invalid format: 'http-response' contains 'code' with invalid value\n",
            ),
            (
                &item(r#"{"http-response":{"code":[],"body":""}}"#),
                "Invalid format: 'http-response' contains 'code' with wrong type\n",
            ),
        ] {
            assert_eq!(read(body.as_bytes()).unwrap_err(), wrong, "{body}");
        }
    }
}
