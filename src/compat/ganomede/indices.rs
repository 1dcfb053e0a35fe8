//! [`Indices`]: the definitions of indices.
//!
//! A definition is an event of the channel `$ganomede/indices`, so that all nodes have it; the first definition of an
//! id applies. Definitions never change, so they are cached.

use std::{collections::HashMap, sync::Arc};

use parking_lot::Mutex;
use serde::{Deserialize, Serialize};
use serde_json::value::to_raw_value;

use crate::{
    bus::{Bus, ReadLimit},
    channel::Channel,
    error::{Code, Error, Result},
    event::{Draft, DraftParts, EventData},
    position::{Position, Start},
};

/// The channel of the definitions.
pub(super) const INDICES: &str = "$ganomede/indices";
/// Maximum number of indices of all channels.
const MAX_INDICES: usize = 10_000;
const PAGE: ReadLimit = ReadLimit { events: 500, bytes: 1 << 20 };

/// The channel of definitions, and a cache of it.
pub(super) struct Indices {
    bus: Arc<Bus>,
    event_limit: usize,
    log: Channel,
    known: Mutex<KnownIndices>,
}

#[derive(Default)]
struct KnownIndices {
    /// By id, with their positions in the channel.
    definitions: HashMap<Box<str>, (Position, Arc<IndexDefinition>)>,
    /// The position up to which the channel was read.
    read: Option<Position>,
}

#[derive(Debug, Serialize, Deserialize)]
pub(super) struct IndexDefinition {
    pub(super) id: String,
    pub(super) channel: String,
    pub(super) field: String,
}

impl Indices {
    pub(super) fn new(bus: Arc<Bus>, event_limit: usize) -> Result<Self> {
        Ok(Indices { bus, event_limit, log: Channel::parse(INDICES)?, known: Mutex::default() })
    }

    /// Defines an index. `false` if its id is in use.
    pub(super) async fn define(&self, id: &str, channel: &str, field: &str) -> Result<bool> {
        let definition = IndexDefinition { id: id.to_owned(), channel: channel.to_owned(), field: field.to_owned() };
        if self.find(&definition.id).await?.is_some() {
            return Ok(false);
        }
        if self.known.lock().definitions.len() >= MAX_INDICES {
            return Err(Error::new(Code::LimitReached, format!("there are {MAX_INDICES} indices already")));
        }
        let data = to_raw_value(&definition).map_err(|error| Error::internal(error.to_string()))?;
        let parts = DraftParts { kind: Some("index"), data: EventData::Json(&data), ..DraftParts::default() };
        let placed = self.bus.publish_one("", &self.log, Draft::new(parts, self.event_limit)?).await?;
        // Of concurrent definitions of an id the first in the log applies.
        Ok(self.find(&definition.id).await?.is_some_and(|(first, _)| first == placed.position))
    }

    pub(super) async fn find(&self, id: &str) -> Result<Option<(Position, Arc<IndexDefinition>)>> {
        if let Some(known) = self.known.lock().definitions.get(id) {
            return Ok(Some(known.clone()));
        }
        loop {
            let start = self.known.lock().read.map_or(Start::Earliest, Start::After);
            let page = self.bus.read(&self.log, start, PAGE, None).await?;
            let mut known = self.known.lock();
            for event in &page.events {
                let Some(Ok(read)) = event.data_json().map(serde_json::from_str::<IndexDefinition>) else { continue };
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
