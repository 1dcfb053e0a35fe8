//! [`Item`]: what a publisher sends to a channel, in one or more formats. The texts of refusals are Pushpin's.

use std::collections::BTreeMap;

use http::{HeaderMap, StatusCode};
use serde_json::{Map, Value};

use super::{
    instruct::Wrong,
    members::{bytes_of, code_of, headers_of, text_of},
};

/// One thing to tell those who are held on a channel.
#[derive(Debug, Default, PartialEq)]
pub struct Item {
    pub channel: String,
    pub id: Option<String>,
    /// The item before it.
    pub prev_id: Option<String>,
    /// What filters know of the publisher.
    pub meta: BTreeMap<String, String>,
    /// Does not wait for the item before it.
    pub unordered: bool,
    pub stream: Option<Action<Vec<u8>>>,
    pub response: Option<Action<Response>>,
}

#[derive(Debug, PartialEq)]
pub enum Action<T> {
    Send(T),
    /// Whoever is held asks its origin again.
    Hint,
    /// The stream ends.
    Close,
}

/// What answers a held response.
#[derive(Debug, PartialEq)]
pub struct Response {
    pub code: StatusCode,
    pub headers: HeaderMap,
    pub body: Body,
}

#[derive(Debug, PartialEq)]
pub enum Body {
    Bytes(Vec<u8>),
    /// A JSON Patch of what the origin would have answered.
    Patch(Value),
}

/// All items of a request. `Err` is the whole body of a 400.
pub fn read(body: &[u8]) -> Result<Vec<Item>, String> {
    let document: Value = serde_json::from_slice(body).map_err(|_| "Body is not valid JSON.\n".to_owned())?;
    let Value::Object(document) = document else { return Err("Invalid format.\n".into()) };
    let items = match document.get("items") {
        None => Err("object does not contain 'items'".to_owned()),
        Some(Value::Array(items)) => items.iter().map(Item::read).collect(),
        Some(_) => Err("object contains 'items' with wrong type".to_owned()),
    };
    items.map_err(|wrong| format!("Invalid format: {wrong}\n"))
}

impl Item {
    fn read(value: &Value) -> Result<Self, Wrong> {
        const WHAT: &str = "publish item object";
        let from = value.as_object().ok_or_else(|| format!("{WHAT} is not an object"))?;
        let channel = text_of(from, WHAT, "channel")?.ok_or_else(|| format!("{WHAT} does not contain 'channel'"))?;
        let owned = |key: &str| Ok::<_, Wrong>(text_of(from, WHAT, key)?.map(str::to_owned));
        let mut item =
            Item { channel: channel.to_owned(), id: owned("id")?, prev_id: owned("prev-id")?, ..Item::default() };
        // Formats may also stand beside the channel, as long ago.
        let formats = match from.get("formats") {
            None => from,
            Some(formats) => formats.as_object().ok_or_else(|| format!("{WHAT} contains 'formats' with wrong type"))?,
        };
        let bare = !from.contains_key("formats");
        let known = ["http-response", "http-stream", "ws-message"];
        if formats.is_empty() || (bare && !known.iter().any(|format| formats.contains_key(*format))) {
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
    send: impl FnOnce(&Map<String, Value>) -> Result<T, Wrong>,
) -> Result<Action<T>, Wrong> {
    let format = format.as_object().ok_or_else(|| format!("{what} is not an object"))?;
    match text_of(format, what, "action")? {
        None | Some("send") => send(format).map(Action::Send),
        Some("hint") => Ok(Action::Hint),
        Some("close") => Ok(Action::Close),
        Some(_) => Err(format!("{what} contains 'action' with unknown value")),
    }
}

fn stream(format: &Value) -> Result<Action<Vec<u8>>, Wrong> {
    const WHAT: &str = "'http-stream'";
    action(format, WHAT, |format| {
        bytes_of(format, WHAT, "content-bin", "content")?
            .ok_or_else(|| format!("{WHAT} does not contain 'content' or 'content-bin'"))
    })
}

fn response(format: &Value) -> Result<Action<Response>, Wrong> {
    const WHAT: &str = "'http-response'";
    action(format, WHAT, |format| {
        let code = code_of(format, WHAT)?.unwrap_or(StatusCode::OK);
        // Checked, and lost: HTTP/2 has no reason, and nobody reads it.
        text_of(format, WHAT, "reason")?;
        let headers = headers_of(format, WHAT)?;
        let body = match (bytes_of(format, WHAT, "body-bin", "body")?, format.get("body-patch")) {
            (Some(bytes), _) => Body::Bytes(bytes),
            (None, Some(patch)) if patch.is_array() => Body::Patch(patch.clone()),
            (None, Some(_)) => return Err(format!("{WHAT} contains 'body-patch' with wrong type")),
            (None, None) => return Err(format!("{WHAT} does not contain 'body', 'body-bin', or 'body-patch'")),
        };
        Ok(Response { code, headers, body })
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_publishers_send() {
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
        assert_eq!(a.stream, Some(Action::Send(b"event: message\ndata: {\"a\":1}\n\n".to_vec())));
        assert_eq!((a.id.as_deref(), a.response.is_none()), (None, true));
        assert_eq!((b.id.as_deref(), b.prev_id.as_deref(), &b.meta["sender"][..]), (Some("2"), Some("1"), "s"));
        assert_eq!(b.stream, Some(Action::Send(vec![0, 255])));
        let Some(Action::Send(response)) = &b.response else { panic!("{b:?}") };
        assert_eq!((response.code.as_u16(), &response.body), (201, &Body::Bytes(vec![0])));
        assert_eq!((&c.stream, &d.stream, &d.response), (&Some(Action::Close), &None, &Some(Action::Hint)));
        assert_eq!(read(br#"{"items":[]}"#).unwrap(), []);
    }

    #[test]
    fn refusals_have_pushpins_words() {
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
