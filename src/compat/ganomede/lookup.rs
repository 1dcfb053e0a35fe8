//! `/indices`: defining an index, and looking up events of a channel by the value of one of their members.
//!
//! A lookup reads the newest part of the channel's log. No index is stored per value.

use std::{collections::VecDeque, sync::Arc};

use axum::http::StatusCode;
use memchr::memmem;
use serde_json::Value;

use super::{
    body::GanomedeBody,
    context::Ganomede,
    poll::channel,
    wire::{self, GanomedeError, is_void},
};
use crate::{
    auth::Identity,
    bus::ReadLimit,
    channel::Channel,
    error::Result,
    event::Event,
    json::{parse_owned, write_json_str},
    position::Start,
};

/// Maximum number of the newest events that a lookup reads.
const MAX_SCAN: u64 = 100_000;
/// Maximum size of the events of one response, in bytes.
const MAX_ROWS: usize = 8 << 20;
/// Maximum size of an id or a field, in bytes.
const MAX_NAME: usize = 1024;
const PAGE: ReadLimit = ReadLimit { events: 500, bytes: 1 << 20 };

impl Ganomede {
    /// Defines an index. The response is `"OK"`, or `null` if the id is in use.
    pub(super) async fn define(&self, identity: &Identity, body: &GanomedeBody<'_>) -> Result<Vec<u8>, GanomedeError> {
        let name = |member| body.text(member).filter(|text| text.len() <= MAX_NAME);
        let id = name("id").ok_or_else(|| GanomedeError::invalid("Invalid index ID"))?;
        let text = body.text("channel");
        let channel = text.as_deref().and_then(channel).ok_or_else(|| GanomedeError::invalid("Invalid Channel"))?;
        let _ = identity.may_subscribe(&channel)?;
        let field = name("field").ok_or_else(|| GanomedeError::invalid("Invalid field"))?;
        let created = self.indices.define(&id, channel.as_str(), &field).await?;
        Ok(if created { wire::string("OK") } else { b"null".to_vec() })
    }

    /// The events whose member has this value, newest first.
    pub(super) async fn look_up(&self, identity: &Identity, id: &str, value: &str) -> Result<Vec<u8>, GanomedeError> {
        let Some((_, index)) = self.indices.find(id).await? else {
            // The original crashes.
            let message = format!("index {id} does not exist");
            return Err(GanomedeError::new(StatusCode::NOT_FOUND, "NotFound", message));
        };
        let channel = channel(&index.channel).ok_or_else(|| GanomedeError::invalid("Invalid Channel"))?;
        let _ = identity.may_subscribe(&channel)?;
        let rows = self.rows(&channel, &index.field, value).await?;
        let mut out = br#"{"id":"#.to_vec();
        write_json_str(&index.id, &mut out);
        out.extend_from_slice(br#","field":"#);
        write_json_str(&index.field, &mut out);
        out.extend_from_slice(br#","value":"#);
        write_json_str(value, &mut out);
        out.extend_from_slice(br#","rows":"#);
        out.extend_from_slice(&wire::array(rows.iter().rev().map(|event| &**event)));
        out.push(b'}');
        Ok(out)
    }

    async fn rows(&self, channel: &Channel, field: &str, value: &str) -> Result<VecDeque<Arc<Event>>> {
        let finder = memmem::Finder::new(value);
        let mut rows: VecDeque<Arc<Event>> = VecDeque::new();
        let mut held = 0;
        let mut start = Start::Last(MAX_SCAN);
        loop {
            let page = self.node.bus.read(channel, start, PAGE, None).await?;
            for event in page.events {
                if is_void(&event) || !may_have(&event, &finder) || !has(&event, field, value) {
                    continue;
                }
                held += event.size();
                rows.push_back(event);
                while held > MAX_ROWS && rows.len() > 1 {
                    held -= rows.pop_front().map_or(0, |event| event.size());
                }
            }
            if !page.more {
                return Ok(rows);
            }
            start = Start::After(page.next);
            // A large channel takes a while, in which other tasks must run.
            tokio::task::yield_now().await;
        }
    }
}

/// Whether the event can have the value: a search for its bytes that is cheaper than parsing.
fn may_have(event: &Event, value: &memmem::Finder<'_>) -> bool {
    let texts = [event.kind_json(), event.sender_json(), event.data_json(), event.data_base64()];
    let written =
        |text: &str| value.find(text.as_bytes()).is_some() || memchr::memchr(b'\\', text.as_bytes()).is_some();
    // The default type is not part of the event.
    event.kind_json().is_none() || texts.into_iter().flatten().any(written)
}

/// Whether the member at the path `field`, as lodash reads it, is this string.
fn has(event: &Event, field: &str, value: &str) -> bool {
    let mut json = Vec::with_capacity(event.size() + 64);
    wire::event(event, &mut json);
    let Ok(root) = parse_owned::<Value>(&json) else { return false };
    // A member whose name contains dots has precedence over a path.
    let found = match root.get(field) {
        Some(found) => Some(found),
        None => field.split(['.', '[']).try_fold(&root, |at, step| {
            let name = step.strip_suffix(']').unwrap_or(step);
            let name = name.trim_matches(['"', '\'']);
            match at {
                Value::Array(items) => items.get(name.parse::<usize>().ok()?),
                Value::Object(members) => members.get(name),
                _ => None,
            }
        }),
    };
    found.and_then(Value::as_str) == Some(value)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        event::{Draft, DraftParts, EventData},
        position::Position,
    };

    fn event(data: &str) -> Event {
        let data = EventData::Json(serde_json::from_str(data).unwrap());
        let parts = DraftParts { kind: Some("ban"), from: Some("f"), data, ..DraftParts::default() };
        let at = Position { epoch: "k3Vq00".parse().unwrap(), offset: 7 };
        Draft::new(parts, 1000).unwrap().place(at, 1)
    }

    #[test]
    fn members_are_found_as_by_lodash() {
        let json = r#"{"user":{"name":"jo\u0065","tags":["x","y"],"n":5,"a-b":"z"},"":"e"}"#;
        for (field, value, found) in [
            ("type", "ban", true),
            ("data.user.name", "joe", true),
            ("data.user.tags[1]", "y", true),
            ("data.user.tags.0", "x", true),
            ("data['user'][\"a-b\"]", "z", true),
            ("data.user.n", "5", false),
            ("data.user", "x", false),
            ("data.nope.name", "joe", false),
            ("user.name", "joe", false),
        ] {
            let event = event(json);
            let finder = memmem::Finder::new(value);
            assert_eq!(may_have(&event, &finder) && has(&event, field, value), found, "{field}");
        }
        assert!(!may_have(&event(r#"{"a":"b"}"#), &memmem::Finder::new("zzz")));
    }
}
