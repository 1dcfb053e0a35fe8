//! [`ConsumerTable`], the consumers of a node and their cursors.

use std::{collections::BTreeMap, ops::Bound};

use parking_lot::Mutex;

use crate::{
    bus::{Config, ConsumerInfo},
    channel::Channel,
    error::{Code, Error, Result},
    position::Position,
};

/// Consumers by name.
#[derive(Default)]
pub(super) struct ConsumerTable(Mutex<BTreeMap<Box<str>, ConsumerState>>);

struct ConsumerState {
    cursors: BTreeMap<Channel, Position>,
    /// Time of the last request, Unix milliseconds.
    seen: u64,
}

impl ConsumerTable {
    /// Applies `update` to the cursor of a consumer, and returns its resulting position.
    ///
    /// # Errors
    /// Those of `update`, and `limit_reached` for one consumer or cursor too many.
    pub(super) fn update(
        &self,
        consumer: &str,
        channel: &Channel,
        config: &Config,
        now: u64,
        update: impl FnOnce(Option<Position>) -> Result<Option<Position>>,
    ) -> Result<Option<Position>> {
        let mut consumers = self.0.lock();
        let known = consumers.get(consumer).and_then(|state| state.cursors.get(channel)).copied();
        let to = update(known)?;
        if let Some(state) = consumers.get_mut(consumer) {
            state.seen = now;
        }
        let Some(to) = to.filter(|to| known != Some(*to)) else { return Ok(known) };
        if !consumers.contains_key(consumer) && consumers.len() >= config.max_consumers {
            return Err(limit_reached("limits.consumers", config.max_consumers));
        }
        let new = || ConsumerState { cursors: BTreeMap::new(), seen: now };
        let state = consumers.entry(consumer.into()).or_insert_with(new);
        if !state.cursors.contains_key(channel) && state.cursors.len() >= config.max_cursors {
            return Err(limit_reached("limits.consumer_channels", config.max_cursors));
        }
        state.cursors.insert(channel.clone(), to);
        Ok(Some(to))
    }

    pub(super) fn get(&self, name: &str, config: &Config) -> Option<ConsumerInfo> {
        self.0.lock().get(name).map(|state| state.describe(name, config))
    }

    pub(super) fn list(&self, prefix: &str, after: Option<&str>, limit: usize, config: &Config) -> Vec<ConsumerInfo> {
        let start = match after {
            Some(after) if after >= prefix => Bound::Excluded(after),
            _ => Bound::Included(prefix),
        };
        self.0
            .lock()
            .range::<str, _>((start, Bound::Unbounded))
            .take_while(|(name, _)| name.starts_with(prefix))
            .take(limit)
            .map(|(name, state)| state.describe(name, config))
            .collect()
    }

    pub(super) fn remove(&self, name: &str) -> bool {
        self.0.lock().remove(name).is_some()
    }

    /// Removes the consumers that have been idle for too long. `now` is in Unix milliseconds.
    pub(super) fn expire(&self, config: &Config, now: u64) {
        let old = now.saturating_sub(config.consumer_idle.as_millis() as u64);
        self.0.lock().retain(|_, state| state.seen >= old);
    }
}

impl ConsumerState {
    fn describe(&self, name: &str, config: &Config) -> ConsumerInfo {
        ConsumerInfo {
            name: name.into(),
            cursors: self.cursors.iter().map(|(channel, position)| (channel.clone(), *position)).collect(),
            seen: self.seen,
            expires: self.seen + config.consumer_idle.as_millis() as u64,
        }
    }
}

fn limit_reached(limit: &'static str, number: usize) -> Error {
    Error::new(Code::LimitReached, format!("{limit} is {number}")).with("limit", limit)
}
