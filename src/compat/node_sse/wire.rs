//! The wire format of the original: frames, sentences and error pages.

use std::borrow::Cow;

use axum::{
    body::{Body, Bytes},
    http::{HeaderValue, Response, StatusCode, header},
};
use serde_json::Value;

use super::js;
use crate::{
    bus::Format,
    channel::Channel,
    error::Error,
    event::Event,
    json::{parse_owned, read_json_str, write_json_str},
    net::chunk,
};

/// The member of an event's `meta` that marks an event of this adapter whose payload was not a string. Its text is that
/// of JavaScript's `String(payload)`.
pub(super) const META: &str = "weir.node-sse";
pub(super) const VALUE: &str = "value";
/// The event was published to a channel that did not exist, for which the original stores only the payload.
pub(super) const FIRST: &str = "first";

/// The format of events on streams of this adapter.
pub(super) static EVENT: Format = Format { open: chunk::open, event, close: chunk::close };

fn event(channel: &Channel, event: &Event, out: &mut Vec<u8>) {
    let kind = event.kind_json().unwrap_or(r#""message""#);
    out.extend_from_slice(b"event: ");
    // A type contains no control characters, so this is one line.
    out.extend_from_slice(read_json_str(kind).as_bytes());
    out.extend_from_slice(
        br#"
data: {"channelName":"#,
    );
    write_json_str(channel.as_str(), out);
    out.extend_from_slice(br#","type":"#);
    out.extend_from_slice(kind.as_bytes());
    out.extend_from_slice(br#","payload":"#);
    write_json_str(&payload(event), out);
    out.extend_from_slice(b"}\n\n");
}

/// `{channelName?,type,payload}` as a chunk.
pub(super) fn frame(channel: Option<&Channel>, kind: &str, payload: &str) -> Bytes {
    let mut out = Vec::with_capacity(128 + payload.len());
    chunk::open(&mut out);
    out.extend_from_slice(b"event: ");
    out.extend_from_slice(kind.as_bytes());
    out.extend_from_slice(b"\ndata: {");
    if let Some(channel) = channel {
        out.extend_from_slice(br#""channelName":"#);
        write_json_str(channel.as_str(), &mut out);
        out.push(b',');
    }
    out.extend_from_slice(br#""type":"#);
    write_json_str(kind, &mut out);
    out.extend_from_slice(br#","payload":"#);
    write_json_str(payload, &mut out);
    out.extend_from_slice(b"}\n\n");
    chunk::close(&mut out);
    out.into()
}

/// The payload as text.
fn payload(event: &Event) -> Cow<'_, str> {
    match event.data_json().or(event.data_base64()) {
        Some(text) if text.starts_with('"') => read_json_str(text),
        Some(json) if mark(event).is_some() => js::text(&parse(json)).into(),
        Some(json) => json.into(),
        None => "".into(),
    }
}

/// The last event of a channel in `/lastEvent`: JSON text, or only the payload of the first event.
pub(super) fn last_event(event: &Event) -> Value {
    let mark = mark(event);
    let raw = match event.data_json() {
        Some(json) if mark.is_some() || json.starts_with('"') => parse(json),
        _ => Value::String(payload(event).into_owned()),
    };
    if mark.as_deref() == Some(FIRST) {
        return raw;
    }
    let mut out = br#"{"type":"#.to_vec();
    out.extend_from_slice(event.kind_json().unwrap_or(r#""message""#).as_bytes());
    out.extend_from_slice(br#","payload":"#);
    js::stringify(&raw, &mut out);
    out.push(b'}');
    Value::String(String::from_utf8_lossy(&out).into_owned())
}

/// The mark of the event in its `meta`.
fn mark(event: &Event) -> Option<String> {
    let meta = event.meta_json().filter(|meta| meta.contains(META))?;
    let meta: Value = parse_owned(meta.as_bytes()).ok()?;
    Some(meta.get(META)?.as_str()?.to_owned())
}

/// Parses JSON that was valid when it was published.
fn parse(json: &str) -> Value {
    parse_owned(json.as_bytes()).unwrap_or_default()
}

/// The response to an error of weir: a sentence for a mistake of the client, as in the original, else a page.
pub(super) fn failure(error: &Error) -> Response<Body> {
    match StatusCode::from_u16(error.code().status()).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR) {
        StatusCode::BAD_REQUEST => bad_request(format!("Bad Request: {}", error.detail())),
        // The original has no credentials.
        status @ (StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN) => {
            let mut answer = Response::new(Body::from(error.detail().to_owned()));
            *answer.status_mut() = status;
            answer
        }
        status => page(status, error.detail()),
    }
}

pub(super) fn bad_request(text: String) -> Response<Body> {
    let mut answer = Response::new(Body::from(text));
    *answer.status_mut() = StatusCode::BAD_REQUEST;
    answer
}

/// An error page of Express.
pub(super) fn page(status: StatusCode, text: &str) -> Response<Body> {
    let text = text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;");
    let page = format!(
        "<!DOCTYPE html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\">\n<title>Error</title>\n</head>\n<body>\n\
         <pre>{text}</pre>\n</body>\n</html>\n"
    );
    let mut answer = Response::new(Body::from(page));
    *answer.status_mut() = status;
    let headers = answer.headers_mut();
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("text/html; charset=utf-8"));
    headers.insert(header::CONTENT_SECURITY_POLICY, HeaderValue::from_static("default-src 'none'"));
    headers.insert(header::X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff"));
    answer
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        event::{Draft, DraftParts, EventData},
        position::Position,
    };

    fn shown(parts: DraftParts<'_>) -> (String, Value) {
        let at = Position { epoch: "k3Vq00".parse().unwrap(), offset: 7 };
        let event = Draft::own(parts, 1000).unwrap().place(at, 1);
        let text = chunk::text(&EVENT.encode(&Channel::parse("a").unwrap(), [std::sync::Arc::new(event)]));
        let event = Draft::own(parts, 1000).unwrap().place(at, 1);
        (String::from_utf8(text.into()).unwrap(), last_event(&event))
    }

    #[test]
    fn events_of_any_publisher() {
        let raw = |json| serde_json::from_str(json).unwrap();
        let frame = |kind: &str, payload: &str| {
            format!("event: {kind}\ndata: {{\"channelName\":\"a\",\"type\":\"{kind}\",\"payload\":{payload}}}\n\n")
        };
        let value = Some(raw(r#"{"weir.node-sse":"value"}"#));
        let first = Some(raw(r#"{"weir.node-sse":"first"}"#));
        let kind = Some("t");
        for (meta, data, payload, last) in [
            (None, EventData::Text("{\"x\":\"é\"}"), r#""{\"x\":\"é\"}""#, r#"{"type":"t","payload":"{\"x\":\"é\"}"}"#),
            (None, EventData::Json(raw(r#"{"x": 1}"#)), r#""{\"x\": 1}""#, r#"{"type":"t","payload":"{\"x\": 1}"}"#),
            (None, EventData::None, r#""""#, r#"{"type":"t","payload":""}"#),
            (None, EventData::Bytes(b"\0"), r#""AA==""#, r#"{"type":"t","payload":"AA=="}"#),
            (value, EventData::Json(raw(r#"{"x": 1}"#)), r#""[object Object]""#, r#"{"type":"t","payload":{"x":1}}"#),
            (value, EventData::Json(raw("[1, 2]")), r#""1,2""#, r#"{"type":"t","payload":[1,2]}"#),
            (value, EventData::Json(raw("12.50")), r#""12.5""#, r#"{"type":"t","payload":12.5}"#),
        ] {
            let (text, stored) = shown(DraftParts { kind, meta, data, ..DraftParts::default() });
            assert_eq!((text, stored), (frame("t", payload), Value::from(last)));
        }
        let (text, stored) =
            shown(DraftParts { kind, meta: first, data: EventData::Json(raw("[1]")), ..DraftParts::default() });
        assert_eq!((text, stored), (frame("t", r#""1""#), serde_json::json!([1])));
        assert_eq!(
            shown(DraftParts { data: EventData::Text("x"), ..DraftParts::default() }).0,
            frame("message", r#""x""#)
        );
    }
}
