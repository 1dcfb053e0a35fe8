//! `POST /publish`: a batch of events, published all or none.

use axum::{
    body::Body,
    http::{HeaderMap, Response, StatusCode, header, request::Parts as Head},
};
use serde::Deserialize;
use serde_json::{
    Value,
    value::{RawValue, to_raw_value},
};

use super::{
    context::{NodeSse, NodeSseError},
    js, wire,
};
use crate::{
    channel::Channel,
    compat::publish::publish,
    error::{Code, Error},
    event::{Draft, DraftParts, EventData, check_kind},
    json::{well_formed, without_bom},
    net::body::read_body,
};

/// Maximum size of a body, as in the original.
const MAX_BODY: usize = 100 * 1024;
/// Types of events that only the server sends.
const RESERVED: [&str; 3] = ["registered", "lastEvent", "online-presence"];
const INCOMPLETE: &str =
    "Bad Request: 'channelName', 'type', and 'payload' are three required json fields in an event.";

/// An event of a request. Omitted members are null, as in JavaScript.
#[derive(Default, Deserialize)]
#[serde(default)]
struct PublishedEvent<'a> {
    #[serde(rename = "channelName")]
    channel: Value,
    #[serde(rename = "type")]
    kind: Value,
    #[serde(borrow)]
    payload: Option<&'a RawValue>,
}

impl NodeSse {
    pub(super) async fn publish(&self, head: &Head, body: Body) -> Result<Response<Body>, NodeSseError> {
        let time = self.node.config.limits.body_time;
        let body = read_body(body, MAX_BODY, "100 KiB", time).await.map_err(|error| match error.code() {
            Code::TooLarge => {
                let text = "PayloadTooLargeError: request entity too large";
                NodeSseError::Page(StatusCode::PAYLOAD_TOO_LARGE, text.to_owned())
            }
            _ => error.into(),
        })?;
        // A body of another type is ignored.
        if !is_json(&head.headers) || body.is_empty() {
            return Ok(Response::default());
        }
        let unreadable = |error: &dyn std::fmt::Display| {
            NodeSseError::Page(StatusCode::BAD_REQUEST, format!("SyntaxError: {error} in JSON"))
        };
        let text = well_formed(std::str::from_utf8(without_bom(&body)).map_err(|error| unreadable(&error))?);
        let whole: &RawValue = serde_json::from_str(&text).map_err(|error| unreadable(&error))?;
        if !whole.get().starts_with(['{', '[']) {
            return Err(unreadable(&"a value that is neither an object nor a list"));
        }
        let events = events(whole.get())?;
        for event in &events {
            if let Some(kind) = event.kind.as_str().filter(|kind| RESERVED.contains(kind)) {
                return Err(NodeSseError::Text(format!("Event type \"{kind}\" is reserved, can't fire!")));
            }
        }
        // All are validated before any is published.
        let mut batch = Vec::with_capacity(events.len());
        for event in &events {
            batch.push(self.draft(event, &batch).await?);
        }
        if !batch.is_empty() {
            publish(&self.node, &self.access.identity(head), batch).await?;
        }
        Ok(Response::default())
    }

    async fn draft(
        &self,
        event: &PublishedEvent<'_>,
        before: &[(Channel, Draft)],
    ) -> Result<(Channel, Draft), NodeSseError> {
        let incomplete = || NodeSseError::Text(INCOMPLETE.to_owned());
        let payload = event.payload.ok_or_else(incomplete)?;
        // Decides whether the payload is falsy without copying it.
        let falsy = matches!(payload.get(), "\"\"" | "false" | "null")
            || serde_json::from_str::<f64>(payload.get()).is_ok_and(|number| number == 0.0);
        if falsy || js::is_falsy(&event.channel) || js::is_falsy(&event.kind) {
            return Err(incomplete());
        }
        let channel = Channel::parse(&js::text(&event.channel))?;
        channel.writable().map_err(|error| NodeSseError::Text(format!("Bad Request: {}", error.detail())))?;
        let kind = js::text(&event.kind);
        check_kind(&kind)?;
        let exists = before.iter().any(|(other, _)| *other == channel) || self.exists(&channel).await?;
        let mark = match exists {
            false => Some(wire::FIRST),
            true if !payload.get().starts_with('"') => Some(wire::VALUE),
            true => None,
        };
        let meta = mark.map(|mark| to_raw_value(&serde_json::json!({ wire::META: mark }))).transpose();
        let meta = meta.map_err(|error| Error::internal(error.to_string()))?;
        let parts = DraftParts {
            kind: Some(&kind),
            meta: meta.as_deref(),
            data: EventData::Json(payload),
            ..DraftParts::default()
        };
        Ok((channel, Draft::own(parts, self.node.config.limits.event)?))
    }

    /// Whether a client has subscribed or published to the channel.
    pub(super) async fn exists(&self, channel: &Channel) -> Result<bool, Error> {
        if self.known.has(channel) {
            return Ok(true);
        }
        let info = self.node.bus.inspect(channel).await?;
        let exists = info.top > 0 || info.readers > 0;
        if exists {
            self.known.add(channel);
        }
        Ok(exists)
    }
}

/// `events` of a body; none if it is missing.
fn events(body: &str) -> Result<Vec<PublishedEvent<'_>>, NodeSseError> {
    #[derive(Default, Deserialize)]
    #[serde(default)]
    struct PublishBody<'a> {
        #[serde(borrow)]
        events: Option<&'a RawValue>,
    }
    // An array has no members.
    let Ok(PublishBody { events: Some(events) }) = serde_json::from_str(body) else { return Ok(Vec::new()) };
    let falsy = serde_json::from_str::<Value>(events.get()).is_ok_and(|value| js::is_falsy(&value));
    if falsy {
        return Ok(Vec::new());
    }
    serde_json::from_str(events.get())
        .map_err(|_| NodeSseError::Text("Bad Request: 'events' is a list of json objects.".to_owned()))
}

fn is_json(headers: &HeaderMap) -> bool {
    let kind = headers.get(header::CONTENT_TYPE).and_then(|kind| kind.to_str().ok()).unwrap_or_default();
    kind.split(';').next().unwrap_or_default().trim().eq_ignore_ascii_case("application/json")
}
