//! From what is held to what is announced: events `join` and `leave`, many members in each.

use std::{sync::Arc, time::Duration};

use futures_util::{StreamExt as _, stream};
use indexmap::IndexMap;
use serde_json::value::RawValue;

use super::{
    Presence, Said, State,
    book::{Change, WINDOW},
    pause,
};
use crate::{
    bus::ReadLimit,
    channel::{Channel, PRESENCE},
    error::{Result, Retry},
    event::{Draft, DraftParts, EventData},
    position::{Position, Start},
};

/// Between two announcements, so that those of a storm have many members each.
const PACE: Duration = Duration::from_millis(50);
/// Bytes of members in one event.
const CHUNK: usize = 48 << 10;
/// Changes taken at once.
const MOST: usize = 10_000;
/// Channels that are published to at a time.
const AT_ONCE: usize = 32;
/// Between two attempts while the bus is away.
const RETRY: Duration = Duration::from_millis(500);
/// Channels of one page of the list.
const PAGE: usize = 1_000;

const JOIN: &str = "join";
const LEAVE: &str = "leave";
/// Whoever was announced before is gone.
const ALL_GONE: &str = r#"{"members":[],"all":true}"#;

impl Presence {
    pub(super) async fn announce(&self) {
        loop {
            if self.cluster.is_leader()
                && !self.is_sure()
                && let Err(error) = self.begin_anew().await
            {
                tracing::debug!(%error, "cannot find out who was announced");
            }
            // Changes wait for as long as a beat at least: none is overlooked.
            let wait = {
                let mut state = self.state.lock();
                let now = self.now();
                state.book.sweep(now);
                state.book.lead(self.cluster.is_leader() && self.is_sure(), now);
                state.book.next_due().map_or(WINDOW, |at| at.saturating_sub(now).min(WINDOW))
            };
            pause(PACE.max(Duration::from_millis(wait))).await;
            self.announce_until(self.now()).await;
        }
    }

    /// What is not announced yet is announced now: this node leaves, and all its members have left.
    pub async fn close(&self) {
        if self.cluster.is_leader() && self.is_sure() {
            {
                let book = &mut self.state.lock().book;
                // Anew: what was under way when `run` was dropped is taken up again.
                book.lead(false, 0);
                book.lead(true, 0);
            }
            self.announce_until(u64::MAX).await;
        }
    }

    async fn announce_until(&self, now: u64) {
        loop {
            let changes = self.state.lock().book.due(now, MOST);
            if changes.is_empty() {
                return;
            }
            let mut channels: IndexMap<Channel, Vec<Change>> = IndexMap::new();
            for change in changes {
                channels.entry(change.channel.clone()).or_default().push(change);
            }
            stream::iter(channels)
                .for_each_concurrent(AT_ONCE, |(channel, changes)| async move {
                    self.announce_on(&channel, changes).await;
                })
                .await;
        }
    }

    async fn announce_on(&self, channel: &Channel, changes: Vec<Change>) {
        let Ok(on) = channel.presence() else { return };
        let (leaves, joins): (Vec<_>, Vec<_>) = changes.into_iter().partition(|change| change.about.is_none());
        let most = CHUNK.min(self.config.event / 2);
        for (kind, changes) in [(LEAVE, leaves), (JOIN, joins)] {
            let mut changes = changes.into_iter().peekable();
            while changes.peek().is_some() {
                let mut data = br#"{"members":["#.to_vec();
                let mut chunk = Vec::new();
                while let Some(change) = changes.next_if(|_| data.len() < most) {
                    if !chunk.is_empty() {
                        data.push(b',');
                    }
                    match (&change.about, &change.before) {
                        (Some(about), _) => about.write_json(&change.client, &mut data),
                        (None, Some(before)) => before.write_brief(&change.client, &mut data),
                        (None, None) => {}
                    }
                    chunk.push(change);
                }
                data.extend_from_slice(b"]}");
                match self.place(&on, kind, data).await {
                    Ok(Some(at)) => self.placed(channel, chunk, at),
                    // Somebody else announces now.
                    Ok(None) => return,
                    Err(error) => tracing::warn!(%channel, %error, "could not announce who is there"),
                }
            }
        }
    }

    /// Publishes, however long the bus is away. `None`: this node does not announce any more.
    async fn place(&self, on: &Channel, kind: &str, data: Vec<u8>) -> Result<Option<Position>> {
        let json = String::from_utf8(data).map_err(crate::error::Error::internal)?;
        let json = RawValue::from_string(json).map_err(crate::error::Error::internal)?;
        // Whether an attempt was placed may not be known: with a key the next one places it at most once.
        let key = format!("{:016x}", fastrand::u64(..));
        let parts =
            DraftParts { kind: Some(kind), data: EventData::Json(&json), key: Some(&key), ..DraftParts::default() };
        let draft = Draft::new(parts, self.config.event)?;
        loop {
            match self.bus.publish_one("", on, draft.clone()).await {
                Ok(placed) => return Ok(Some(placed.position)),
                Err(error) if error.code().retry() == Retry::No => return Err(error),
                Err(error) => tracing::debug!(%on, %error, "not announced yet"),
            }
            pause(RETRY).await;
            if !self.cluster.is_leader() {
                return Ok(None);
            }
        }
    }

    fn placed(&self, channel: &Channel, chunk: Vec<Change>, at: Position) {
        self.metrics.presence_announced.add(chunk.len() as u64);
        let now = self.now();
        let mut state = self.state.lock();
        let State { book, said, .. } = &mut *state;
        if book.has_others() {
            let members = chunk.iter().map(|change| (change.client.clone(), change.about.clone())).collect();
            said.push(Said { channel: channel.clone(), at, members });
            self.news.notify_one();
        }
        for Change { channel, client, about, .. } in chunk {
            book.told((channel, client), about, now);
        }
        book.upto(channel, at, now);
    }

    /// Nobody who could say so knows what was announced: all nodes are new. So all who were announced are gone.
    async fn begin_anew(&self) -> Result<()> {
        let mut after: Option<String> = None;
        loop {
            let page = self.bus.list(PRESENCE, after.as_deref(), PAGE).await?;
            let Some(last) = page.last() else { break };
            after = Some(last.channel.as_str().to_owned());
            let full = page.len() == PAGE;
            let mut ended = stream::iter(page).map(|info| self.end(info.channel)).buffer_unordered(AT_ONCE);
            while let Some(ended) = ended.next().await {
                if let Some((channel, at)) = ended? {
                    self.state.lock().book.upto(&channel, at, self.now());
                }
            }
            if !full {
                break;
            }
        }
        let mut state = self.state.lock();
        state.book.untell(self.now());
        state.anew = true;
        self.sure.store(true, std::sync::atomic::Ordering::Relaxed);
        self.news.notify_one();
        Ok(())
    }

    /// The channel that it is about, and where it says so.
    async fn end(&self, on: Channel) -> Result<Option<(Channel, Position)>> {
        let last = self.bus.read(&on, Start::Last(1), ReadLimit { events: 1, bytes: 0 }, None).await?;
        let is_ended = |event: &&Arc<crate::event::Event>| event.data_json() == Some(ALL_GONE);
        let at = match last.events.last().filter(is_ended) {
            Some(event) => Some(event.position()),
            None => self.place(&on, LEAVE, ALL_GONE.into()).await?,
        };
        let channel = on.as_str().strip_prefix(PRESENCE).and_then(|name| Channel::parse(name).ok());
        Ok(channel.zip(at))
    }
}
