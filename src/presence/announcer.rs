//! [`Announcer`]: publishes the difference between held and announced members as `join` and `leave` events, with many
//! members in each.

use std::{sync::Arc, time::Duration};

use futures_util::{StreamExt as _, stream};
use indexmap::IndexMap;
use serde_json::value::RawValue;
use tokio::time::sleep;

use super::{
    core::{Announced, PresenceCore},
    member_table::{DEBOUNCE, MemberChange},
};
use crate::{
    bus::ReadLimit,
    channel::{Channel, PRESENCE},
    error::{Error, Result, Retry},
    event::{Draft, DraftParts, Event, EventData},
    position::{Position, Start},
};

/// Pause between two rounds, so that the changes of a burst share events.
const PACE: Duration = Duration::from_millis(50);
/// Bytes of members in one event.
const EVENT_BYTES: usize = 48 << 10;
/// Changes taken from the table at once.
const ROUND: usize = 10_000;
/// Channels that are published to concurrently.
const CONCURRENCY: usize = 32;
/// Back-off while the bus is unavailable.
const RETRY: Duration = Duration::from_millis(500);
/// Channels listed at once.
const PAGE: usize = 1_000;

const JOIN: &str = "join";
const LEAVE: &str = "leave";
/// Data of the `leave` event that ends all memberships announced before it.
const ALL_LEFT: &str = r#"{"members":[],"all":true}"#;

pub(super) struct Announcer<'a> {
    core: &'a PresenceCore,
}

impl<'a> Announcer<'a> {
    pub(super) fn new(core: &'a PresenceCore) -> Self {
        Announcer { core }
    }

    /// Announces while this node is the leader. Never returns.
    pub(super) async fn run(self) {
        let core = self.core;
        loop {
            if core.cluster.is_leader()
                && !core.is_synced()
                && let Err(error) = self.reset().await
            {
                tracing::debug!(%error, "cannot end the presence announced before");
            }
            let wait = {
                let table = &mut core.state.lock().table;
                let now = core.now();
                table.sweep(now);
                table.set_announcing(core.is_announcer(), now);
                // A change is due no earlier than `DEBOUNCE` after it is made, so none is overlooked.
                table.next_due().map_or(DEBOUNCE, |at| at.saturating_sub(now).min(DEBOUNCE))
            };
            sleep(PACE.max(Duration::from_millis(wait))).await;
            self.announce_due(core.now()).await;
        }
    }

    /// Announces at once what has not been announced yet.
    pub(super) async fn close(&self) {
        if self.core.is_announcer() {
            {
                let table = &mut self.core.state.lock().table;
                // Queues changes again that `run` had taken when it was dropped.
                table.set_announcing(false, 0);
                table.set_announcing(true, 0);
            }
            self.announce_due(u64::MAX).await;
        }
    }

    async fn announce_due(&self, now: u64) {
        loop {
            let changes = self.core.state.lock().table.take_due(now, ROUND);
            if changes.is_empty() {
                return;
            }
            let mut channels: IndexMap<Channel, Vec<MemberChange>> = IndexMap::new();
            for change in changes {
                channels.entry(change.channel.clone()).or_default().push(change);
            }
            stream::iter(channels)
                .for_each_concurrent(CONCURRENCY, |(channel, changes)| async move {
                    self.announce_on(&channel, changes).await;
                })
                .await;
        }
    }

    async fn announce_on(&self, channel: &Channel, changes: Vec<MemberChange>) {
        let Ok(events) = channel.presence() else { return };
        let (leaves, joins): (Vec<_>, Vec<_>) = changes.into_iter().partition(|change| change.info.is_none());
        let limit = EVENT_BYTES.min(self.core.config.limits.event / 2);
        for (kind, changes) in [(LEAVE, leaves), (JOIN, joins)] {
            let mut changes = changes.into_iter().peekable();
            while changes.peek().is_some() {
                let mut data = br#"{"members":["#.to_vec();
                let mut chunk = Vec::new();
                while let Some(change) = changes.next_if(|_| data.len() < limit) {
                    if !chunk.is_empty() {
                        data.push(b',');
                    }
                    match (&change.info, &change.before) {
                        (Some(info), _) => info.write_json(&change.client, &mut data),
                        (None, Some(before)) => before.write_brief(&change.client, &mut data),
                        (None, None) => {}
                    }
                    chunk.push(change);
                }
                data.extend_from_slice(b"]}");
                match self.publish(&events, kind, data).await {
                    Ok(Some(position)) => self.record(channel, chunk, position),
                    // The new leader announces the rest.
                    Ok(None) => return,
                    Err(error) => tracing::warn!(%channel, %error, "cannot announce presence members"),
                }
            }
        }
    }

    /// Publishes, and retries while the bus is unavailable. `None`: this node is no longer the leader.
    async fn publish(&self, events: &Channel, kind: &str, data: Vec<u8>) -> Result<Option<Position>> {
        let json = String::from_utf8(data).map_err(Error::internal)?;
        let json = RawValue::from_string(json).map_err(Error::internal)?;
        // An attempt may have succeeded without confirmation: the idempotency key makes retries safe.
        let key = format!("{:016x}", fastrand::u64(..));
        let parts =
            DraftParts { kind: Some(kind), data: EventData::Json(&json), key: Some(&key), ..DraftParts::default() };
        let draft = Draft::new(parts, self.core.config.limits.event)?;
        loop {
            match self.core.bus.publish_one("", events, draft.clone()).await {
                Ok(placed) => return Ok(Some(placed.position)),
                Err(error) if error.code().retry() == Retry::No => return Err(error),
                Err(error) => tracing::debug!(channel = %events, %error, "cannot announce presence members yet"),
            }
            sleep(RETRY).await;
            if !self.core.cluster.is_leader() {
                return Ok(None);
            }
        }
    }

    /// Enters an announcement into the table and queues it for replication.
    fn record(&self, channel: &Channel, changes: Vec<MemberChange>, position: Position) {
        self.core.metrics.presence_announced.add(changes.len() as u64);
        let now = self.core.now();
        let mut state = self.core.state.lock();
        if state.table.has_peers() {
            let members = changes.iter().map(|change| (change.client.clone(), change.info.clone())).collect();
            state.announced.push(Announced { channel: channel.clone(), position, members });
            self.core.changed.notify_one();
        }
        for MemberChange { channel, client, info, .. } in changes {
            state.table.set_announced((channel, client), info, now);
        }
        state.table.set_position(channel, position, now);
    }

    /// Announces on every presence channel that all members have left. Needed when no node knows what was announced,
    /// because all of them have restarted.
    async fn reset(&self) -> Result<()> {
        let core = self.core;
        let mut after: Option<String> = None;
        loop {
            let page = core.bus.list(PRESENCE, after.as_deref(), PAGE).await?;
            let Some(last) = page.last() else { break };
            after = Some(last.channel.as_str().to_owned());
            let full = page.len() == PAGE;
            let mut ended = stream::iter(page).map(|info| self.end_all(info.channel)).buffer_unordered(CONCURRENCY);
            while let Some(ended) = ended.next().await {
                if let Some((channel, position)) = ended? {
                    core.state.lock().table.set_position(&channel, position, core.now());
                }
            }
            if !full {
                break;
            }
        }
        let mut state = core.state.lock();
        state.table.clear_announced(core.now());
        state.resend_all = true;
        core.set_synced();
        core.changed.notify_one();
        Ok(())
    }

    /// Announces that all members of one channel have left, unless that is its last event. Returns the channel whose
    /// members they are, and the position of that event.
    async fn end_all(&self, events: Channel) -> Result<Option<(Channel, Position)>> {
        let last = self.core.bus.read(&events, Start::Last(1), ReadLimit { events: 1, bytes: 0 }, None).await?;
        let is_end = |event: &&Arc<Event>| event.data_json() == Some(ALL_LEFT);
        let position = match last.events.last().filter(is_end) {
            Some(event) => Some(event.position()),
            None => self.publish(&events, LEAVE, ALL_LEFT.into()).await?,
        };
        let channel = events.as_str().strip_prefix(PRESENCE).and_then(|name| Channel::parse(name).ok());
        Ok(channel.zip(position))
    }
}
