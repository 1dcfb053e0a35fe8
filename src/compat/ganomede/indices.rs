//! `/indices`: events of a channel by the value of one of their members.
//!
//! A definition is an event of the channel `$ganomede/indices`, so that all nodes know it; the first of an id counts. What
//! was read once is remembered, for definitions never change. A lookup reads the channel's log, but not more than its
//! newest part: nothing is kept per value.

use std::{
    collections::{HashMap, VecDeque},
    sync::Arc,
};

use memchr::memmem;
use parking_lot::Mutex;
use serde::{Deserialize, Serialize};
use serde_json::{Value, value::to_raw_value};

use super::{
    Ganomede, Given,
    poll::channel,
    wire::{self, Refusal, is_void},
};
use crate::{
    bus::{Bus, ReadLimit},
    channel::Channel,
    error::{Code, Error, Result},
    event::{Draft, DraftParts, Event, EventData},
    json::write_json_str,
    position::{Position, Start},
};

/// The channel of the definitions.
pub(super) const INDICES: &str = "$ganomede/indices";
/// Indices, of all channels.
const MAX_INDICES: usize = 10_000;
/// The newest events of a channel that a lookup reads.
const MAX_SCAN: u64 = 100_000;
/// Bytes of the events that one lookup answers.
const MAX_ROWS: usize = 8 << 20;
/// Bytes of an id or a field.
const MAX_NAME: usize = 1024;
const PAGE: ReadLimit = ReadLimit { events: 500, bytes: 1 << 20 };

/// The definitions.
pub struct Indices {
    bus: Arc<Bus>,
    event_limit: usize,
    log: Channel,
    known: Mutex<Known>,
}

#[derive(Default)]
struct Known {
    /// By id, and where they stand in the log.
    definitions: HashMap<Box<str>, (Position, Arc<Definition>)>,
    /// Up to where the channel of definitions was read.
    read: Option<Position>,
}

#[derive(Debug, Serialize, Deserialize)]
struct Definition {
    id: String,
    channel: String,
    field: String,
}

impl Ganomede {
    /// Defines an index: `"OK"`, or `null` if there is one of this id.
    pub(super) async fn define(&self, given: &Given<'_>) -> Result<Vec<u8>, Refusal> {
        let name = |member| given.text(member).filter(|text| text.len() <= MAX_NAME);
        let id = name("id").ok_or_else(|| Refusal::invalid("Invalid index ID"))?;
        let channel = given.text("channel").filter(|name| channel(name).is_some());
        let channel = channel.ok_or_else(|| Refusal::invalid("Invalid Channel"))?;
        let field = name("field").ok_or_else(|| Refusal::invalid("Invalid field"))?;
        let created = self.indices.define(&id, &channel, &field).await?;
        Ok(if created { wire::string("OK") } else { b"null".to_vec() })
    }

    /// The events whose member has this value, newest first.
    pub(super) async fn look_up(&self, id: &str, value: &str) -> Result<Vec<u8>, Refusal> {
        let Some((_, index)) = self.indices.find(id).await? else {
            // The original dies of this question.
            let message = format!("index {id} does not exist");
            return Err(Refusal::new(http::StatusCode::NOT_FOUND, "NotFound", message));
        };
        let channel = channel(&index.channel).ok_or_else(|| Refusal::invalid("Invalid Channel"))?;
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
            // Of a large channel this takes a while, and there are others.
            tokio::task::yield_now().await;
        }
    }
}

/// Whether it is worth to parse an event: most that have not the bytes of a value have not the value.
fn may_have(event: &Event, value: &memmem::Finder<'_>) -> bool {
    let texts = [event.kind_json(), event.from_json(), event.data_json(), event.data_base64()];
    let written =
        |text: &str| value.find(text.as_bytes()).is_some() || memchr::memchr(b'\\', text.as_bytes()).is_some();
    // Without a type it has one that is written nowhere.
    event.kind_json().is_none() || texts.into_iter().flatten().any(written)
}

/// Whether the member of an event that lodash calls `field` is this text.
fn has(event: &Event, field: &str, value: &str) -> bool {
    let mut json = Vec::with_capacity(event.size() + 64);
    wire::event(event, &mut json);
    let Ok(root) = serde_json::from_slice::<Value>(&json) else { return false };
    // A name with dots in it comes before a way through members.
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

// === impl Indices ===

impl Indices {
    pub fn new(bus: Arc<Bus>, event_limit: usize) -> Result<Self> {
        Ok(Indices { bus, event_limit, log: Channel::parse(INDICES)?, known: Mutex::default() })
    }

    /// Whether this definition is the first of its id.
    pub async fn define(&self, id: &str, channel: &str, field: &str) -> Result<bool> {
        let definition = Definition { id: id.to_owned(), channel: channel.to_owned(), field: field.to_owned() };
        if self.find(&definition.id).await?.is_some() {
            return Ok(false);
        }
        if self.known.lock().definitions.len() >= MAX_INDICES {
            return Err(Error::new(Code::LimitReached, format!("there are {MAX_INDICES} indices already")));
        }
        let data = to_raw_value(&definition).map_err(|error| Error::internal(error.to_string()))?;
        let parts = DraftParts { kind: Some("index"), data: EventData::Json(&data), ..DraftParts::default() };
        let placed = self.bus.publish_one("", &self.log, Draft::new(parts, self.event_limit)?).await?;
        // Two that came at once are told apart by their order in the log.
        Ok(self.find(&definition.id).await?.is_some_and(|(first, _)| first == placed.position))
    }

    async fn find(&self, id: &str) -> Result<Option<(Position, Arc<Definition>)>> {
        if let Some(known) = self.known.lock().definitions.get(id) {
            return Ok(Some(known.clone()));
        }
        loop {
            let start = self.known.lock().read.map_or(Start::Earliest, Start::After);
            let page = self.bus.read(&self.log, start, PAGE, None).await?;
            let mut known = self.known.lock();
            for event in &page.events {
                let Some(Ok(read)) = event.data_json().map(serde_json::from_str::<Definition>) else { continue };
                if known.definitions.len() < MAX_INDICES {
                    let id = read.id.as_str().into();
                    known.definitions.entry(id).or_insert_with(|| (event.position(), Arc::new(read)));
                }
            }
            known.read = Some(page.next);
            if !page.more {
                return Ok(known.definitions.get(id).cloned());
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn event(data: &str) -> Event {
        let data = EventData::Json(serde_json::from_str(data).unwrap());
        let parts = DraftParts { kind: Some("ban"), from: Some("f"), data, ..DraftParts::default() };
        let at = Position { epoch: "k3Vq00".parse().unwrap(), offset: 7 };
        Draft::new(parts, 1000).unwrap().place(at, 1)
    }

    #[test]
    fn members_as_lodash_finds_them() {
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
