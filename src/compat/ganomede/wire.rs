//! The wire format of the original: responses and events.

use std::time::{SystemTime, UNIX_EPOCH};

use axum::{
    body::{Body, Bytes},
    http::{HeaderValue, Response, StatusCode, header},
};

use crate::{
    error::{Code, Error},
    event::Event,
    json::write_json_str,
    terminal::utc,
};

/// The type of void events: they fill the ids without an event in imported channels, and are not shown to clients.
pub(super) const VOID: &str = "weir.void";

pub(super) fn is_void(event: &Event) -> bool {
    event.kind_json() == Some(r#""weir.void""#)
}

/// An error response: `{"code":…,"message":…}`.
#[derive(Debug)]
pub(super) struct GanomedeError {
    pub(super) status: StatusCode,
    pub(super) code: &'static str,
    pub(super) message: String,
}

impl GanomedeError {
    pub(super) fn new(status: StatusCode, code: &'static str, message: impl Into<String>) -> Self {
        GanomedeError { status, code, message: message.into() }
    }

    /// Invalid parameters.
    pub(super) fn invalid(message: impl Into<String>) -> Self {
        GanomedeError::new(StatusCode::BAD_REQUEST, "InvalidContent", message)
    }
}

/// An error that the original does not have gets the code that `restify-errors` has for the status.
impl From<Error> for GanomedeError {
    fn from(error: Error) -> Self {
        let status = StatusCode::from_u16(error.code().status()).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
        let code = match status.as_u16() {
            400 => "BadRequest",
            403 => "Forbidden",
            408 => "RequestTimeout",
            409 => "Conflict",
            413 => "PayloadTooLarge",
            429 => "TooManyRequests",
            502 => "BadGateway",
            503 => "ServiceUnavailable",
            504 => "GatewayTimeout",
            _ => "Internal",
        };
        let message = match error.code() {
            Code::Internal => "caused by an error in weir, which is in its log".to_owned(),
            _ => error.detail().to_owned(),
        };
        GanomedeError { status, code, message }
    }
}

impl From<GanomedeError> for Response<Body> {
    fn from(error: GanomedeError) -> Self {
        let mut out = br#"{"code":"#.to_vec();
        write_json_str(error.code, &mut out);
        out.extend_from_slice(br#","message":"#);
        write_json_str(&error.message, &mut out);
        out.push(b'}');
        let mut answer = json(out);
        *answer.status_mut() = error.status;
        answer
    }
}

pub(super) fn json(body: impl Into<Bytes>) -> Response<Body> {
    let mut answer = Response::new(Body::from(body.into()));
    answer.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
    // The original does not send it, so a proxy may cache an empty page.
    answer.headers_mut().insert(header::CACHE_CONTROL, HeaderValue::from_static("no-store"));
    answer
}

/// A JSON string.
pub(super) fn string(text: &str) -> Vec<u8> {
    let mut out = Vec::with_capacity(text.len() + 2);
    write_json_str(text, &mut out);
    out
}

/// Appends an event: `id`, `timestamp`, `type`, `from` and optional `data`.
pub(super) fn event(event: &Event, out: &mut Vec<u8>) {
    let mut number = itoa::Buffer::new();
    out.extend_from_slice(br#"{"id":"#);
    out.extend_from_slice(number.format(event.offset).as_bytes());
    out.extend_from_slice(br#","timestamp":"#);
    out.extend_from_slice(number.format(event.time).as_bytes());
    out.extend_from_slice(br#","type":"#);
    out.extend_from_slice(event.kind_json().unwrap_or(r#""message""#).as_bytes());
    out.extend_from_slice(br#","from":"#);
    out.extend_from_slice(event.sender_json().unwrap_or(r#""""#).as_bytes());
    if let Some(data) = event.data_json() {
        // In this protocol `data` is an object or an array; other values are wrapped.
        let whole = data.starts_with(['{', '[']);
        out.extend_from_slice(if whole { br#","data":"# } else { br#","data":{"value":"# });
        out.extend_from_slice(data.as_bytes());
        out.extend_from_slice(if whole { b"" } else { b"}" });
    } else if let Some(base64) = event.data_base64() {
        out.extend_from_slice(br#","data":{"base64":"#);
        out.extend_from_slice(base64.as_bytes());
        out.push(b'}');
    }
    out.push(b'}');
}

/// A JSON array of events.
pub(super) fn array<'a>(events: impl IntoIterator<Item = &'a Event>) -> Vec<u8> {
    let mut out = vec![b'['];
    for each in events {
        if out.len() > 1 {
            out.push(b',');
        }
        event(each, &mut out);
    }
    out.push(b']');
    out
}

/// The response of `/about`, with the members of the original.
pub(super) fn about() -> Bytes {
    let host = rustix::system::uname();
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_millis() as u64;
    let about = serde_json::json!({
        "hostname": host.nodename().to_string_lossy(),
        "type": "ganomede-events",
        "version": env!("CARGO_PKG_VERSION"),
        "description": "weir, in the place of ganomede-events",
        "startDate": utc(now),
    });
    Bytes::from(about.to_string())
}

/// A random UUID of version 4.
pub(super) fn uuid() -> HeaderValue {
    let bits = fastrand::u128(..) & !(0xf << 76) & !(0x3 << 62) | (4 << 76) | (2 << 62);
    let hex = format!("{bits:032x}");
    let text = [&hex[..8], &hex[8..12], &hex[12..16], &hex[16..20], &hex[20..]].join("-");
    // Hexadecimal digits and hyphens are valid in a header.
    HeaderValue::from_str(&text).unwrap_or(HeaderValue::from_static("-"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        event::{Draft, DraftParts, EventData},
        position::Position,
    };

    fn shown(parts: DraftParts<'_>) -> String {
        let at = Position { epoch: "k3Vq00".parse().unwrap(), offset: 7 };
        let mut out = Vec::new();
        event(&Draft::new(parts, 1000).unwrap().place(at, 1763640000123), &mut out);
        String::from_utf8(out).unwrap()
    }

    #[test]
    fn events_of_any_publisher() {
        let data = |json| EventData::Json(serde_json::from_str(json).unwrap());
        for (parts, json) in [
            (
                DraftParts { kind: Some("t"), from: Some("f"), data: data(r#"{"a":1}"#), ..DraftParts::default() },
                r#"{"id":7,"timestamp":1763640000123,"type":"t","from":"f","data":{"a":1}}"#,
            ),
            (DraftParts::default(), r#"{"id":7,"timestamp":1763640000123,"type":"message","from":""}"#),
            (
                DraftParts { data: data("[1]"), ..DraftParts::default() },
                r#"{"id":7,"timestamp":1763640000123,"type":"message","from":"","data":[1]}"#,
            ),
            (
                DraftParts { data: data("\"x\""), ..DraftParts::default() },
                r#"{"id":7,"timestamp":1763640000123,"type":"message","from":"","data":{"value":"x"}}"#,
            ),
            (
                DraftParts { data: data("null"), ..DraftParts::default() },
                r#"{"id":7,"timestamp":1763640000123,"type":"message","from":"","data":{"value":null}}"#,
            ),
            (
                DraftParts { data: EventData::Bytes(b"\0"), ..DraftParts::default() },
                r#"{"id":7,"timestamp":1763640000123,"type":"message","from":"","data":{"base64":"AA=="}}"#,
            ),
        ] {
            assert_eq!(shown(parts), json);
        }
    }

    #[test]
    fn dates() {
        assert_eq!(utc(0), "1970-01-01T00:00:00.000Z");
        assert_eq!(utc(951_827_696_001), "2000-02-29T12:34:56.001Z");
        assert_eq!(utc(1_763_640_000_123), "2025-11-20T12:00:00.123Z");
    }

    #[test]
    fn request_ids() {
        let id = uuid();
        let id = id.to_str().unwrap();
        assert_eq!((id.len(), &id[14..15]), (36, "4"));
        assert!(matches!(&id[19..20], "8" | "9" | "a" | "b"), "{id}");
        assert_ne!(id, uuid().to_str().unwrap());
    }
}
