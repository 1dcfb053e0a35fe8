//! [`ChannelImport`]: one channel, whether it may be imported, and the import of its events.

use std::{sync::Arc, time::Duration};

use serde::Deserialize;
use serde_json::value::RawValue;

use super::{
    progress::{ImportProgress, ImportedChannel},
    source::{EventIds, ImportSource},
    target::{ImportTarget, failed},
};
use crate::{
    bus::ReadLimit,
    channel::Channel,
    compat::ganomede::wire::VOID,
    event::{Draft, DraftParts, Event, EventData},
    json::JsonStr,
    position::{Epoch, Position, Start},
    terminal::Failure,
};

/// Events that are read at a time, and void events that are placed at a time.
const PAGE: usize = 500;
/// A missing id may be that of an event that is being written, if the events around it are younger than this.
const SETTLED: Duration = Duration::from_secs(60);
/// Bytes that an event counts in `keep.bytes` beside its own.
const OVERHEAD: usize = 100;
const ONE: ReadLimit = ReadLimit { events: 1, bytes: 1 };

/// A channel of the source that is being imported.
pub(super) struct ChannelImport {
    channel: Channel,
    /// None if there are no events, only a counter.
    ids: Option<EventIds>,
    /// The newest id to import.
    end: u64,
    /// The newest offset in weir.
    at: u64,
}

/// The log of an imported channel, which cursors refer to.
pub(super) struct ImportedLog {
    pub(super) channel: Channel,
    pub(super) epoch: Epoch,
    pub(super) top: u64,
}

/// An event as ganomede-events stores it.
#[derive(Deserialize)]
struct StoredEvent<'a> {
    timestamp: u64,
    #[serde(rename = "type")]
    #[serde(borrow)]
    kind: JsonStr<'a>,
    #[serde(borrow)]
    from: JsonStr<'a>,
    #[serde(borrow)]
    data: Option<&'a RawValue>,
}

/// An event for weir and its time, or the reason why weir cannot store it.
fn read(stored: &str, limit: usize) -> Result<(Draft, u64), String> {
    let stored: StoredEvent<'_> = serde_json::from_str(stored).map_err(|error| format!("unreadable: {error}"))?;
    let data = stored.data.map_or(EventData::None, EventData::Json);
    let parts = DraftParts { kind: Some(&stored.kind), from: Some(&stored.from), data, ..DraftParts::default() };
    let draft = Draft::new(parts, limit).map_err(|error| error.detail().to_owned())?;
    Ok((draft, stored.timestamp))
}

// === impl ChannelImport ===

impl ChannelImport {
    /// Compares a channel in source and target. The inner error is a reason to import nothing at all.
    pub(super) async fn prepare(
        source: &mut ImportSource,
        target: &ImportTarget,
        channel: Channel,
        counter: u64,
        allow_trim: bool,
    ) -> Result<Result<Self, String>, Failure> {
        let ids = source.event_ids(channel.as_str()).await?;
        // The counter may be ahead of the newest event, which is still being written. Without events only the counter
        // is known.
        let end = ids.map_or(counter, |ids| ids.last);
        let info = target.past.inspect(&channel).await.map_err(|error| failed(&error))?;
        let import = ChannelImport { ids, end, at: info.top, channel };
        if info.top > 0 && !import.is_ours(source, target).await? {
            return Ok(Err(format!(
                "{}: weir has events of its own there: delete them, or import under another prefix",
                import.channel
            )));
        }
        if !allow_trim && let Some(reason) = import.trimmed(source, target).await? {
            return Ok(Err(reason));
        }
        Ok(Ok(import))
    }

    /// Places the events that are missing in the target.
    pub(super) async fn run(
        mut self,
        source: &mut ImportSource,
        target: &ImportTarget,
        progress: &mut ImportProgress,
    ) -> Result<(ImportedChannel, Option<ImportedLog>), Failure> {
        let name = self.channel.as_str().to_owned();
        let mut imported = ImportedChannel { channel: name.clone(), ..ImportedChannel::default() };
        // An unreadable event has no time: it gets that of the event before. Not 0: that is the clock of Redis itself.
        target.set_time(1);
        'pages: loop {
            let page = source.page(&name, self.at, PAGE).await?;
            if page.is_empty() {
                break;
            }
            for (id, stored) in page {
                let (draft, time) = match stored.as_deref().map(|stored| read(stored, target.event_limit)) {
                    Some(Ok((draft, time))) => (Some(draft), Some(time)),
                    Some(Err(reason)) => {
                        imported.unfit.push(format!("event {id}: {reason}"));
                        (None, None)
                    }
                    None => (None, None),
                };
                if let Some(time) = time {
                    let young = target.bus.now().saturating_sub(time) < SETTLED.as_millis() as u64;
                    if young && id > self.at + 1 && self.ids.is_some_and(|ids| id > ids.first) {
                        imported.held_back = self.end.saturating_sub(self.at);
                        break 'pages;
                    }
                    target.set_time(time);
                }
                if id > self.at + 1 {
                    imported.void += id - self.at - 1;
                    self.void(target, id - 1).await?;
                }
                match draft {
                    Some(draft) => {
                        self.place(target, vec![draft]).await?;
                        imported.events += 1;
                        progress.placed += 1;
                    }
                    None => {
                        imported.void += 1;
                        self.void(target, id).await?;
                    }
                }
                progress.note(&self.channel, id, self.end);
            }
        }
        if self.ids.is_none() && self.end > self.at {
            target.set_time(target.bus.now());
            imported.void += self.end - self.at;
            self.void(target, self.end).await?;
        }
        imported.top = self.at;
        let epoch = target.past.inspect(&self.channel).await.map_err(|error| failed(&error))?.epoch;
        if self.at == 0 || epoch.is_absent() {
            return Ok((imported, None));
        }
        // Events before the first existed once: clients that read from there get a gap.
        let first = self.ids.map_or(self.end + 1, |ids| ids.first);
        if first > 1 && self.at + 1 >= first {
            let before = Position { epoch, offset: first };
            target.past.remove(&self.channel, Some(before)).await.map_err(|error| failed(&error))?;
        }
        let log = ImportedLog { epoch, top: self.at, channel: self.channel };
        Ok((imported, Some(log)))
    }

    /// The result of an import, unless more events are written.
    pub(super) async fn plan(&self, source: &mut ImportSource, event_limit: usize) -> Result<ImportedChannel, Failure> {
        let mut plan = ImportedChannel { channel: self.channel.as_str().to_owned(), ..ImportedChannel::default() };
        let mut at = self.at;
        loop {
            let page = source.page(&plan.channel, at, PAGE).await?;
            let Some((last, _)) = page.last() else { break };
            at = *last;
            for (id, stored) in &page {
                match stored.as_deref().map(|stored| read(stored, event_limit)) {
                    Some(Ok(_)) => plan.events += 1,
                    Some(Err(reason)) => plan.unfit.push(format!("event {id}: {reason}")),
                    None => {}
                }
            }
        }
        plan.top = at.max(self.end);
        plan.void = plan.top - self.at - plan.events;
        Ok(plan)
    }

    /// Whether the newest event in weir is the one that an import of this source would have placed.
    async fn is_ours(&self, source: &mut ImportSource, target: &ImportTarget) -> Result<bool, Failure> {
        let name = self.channel.as_str();
        let at = self.at.min(self.end);
        let start = Start::AfterOffset(at.saturating_sub(1));
        let page = target.past.read(&self.channel, start, ONE, None).await.map_err(|error| failed(&error))?;
        let Some(event) = page.events.first().filter(|event| event.offset == at) else {
            // A channel without events was imported as its counter only.
            return Ok(self.ids.is_none() && self.at >= self.end);
        };
        let stored = source.event(name, at).await?;
        Ok(match stored.as_deref().map(|stored| read(stored, target.event_limit)) {
            Some(Ok((draft, time))) => {
                let ours = draft.place(event.position(), event.time);
                event.time >= time && is_same(&ours, event)
            }
            Some(Err(_)) | None => is_void(event),
        })
    }

    /// Why retention in the target would trim the channel at once, if it would.
    async fn trimmed(&self, source: &mut ImportSource, target: &ImportTarget) -> Result<Option<String>, Failure> {
        let Some(EventIds { first, count, .. }) = self.ids else { return Ok(None) };
        let (name, keep) = (self.channel.as_str(), target.bus.topics().config().retention_of(&self.channel));
        let exceeds = |key: &str, reason: String| {
            Some(format!("{name}: {reason}; raise keep.{key} in [[channels]], or trim it with --allow-trim"))
        };
        if count > keep.count as u64 {
            return Ok(exceeds("count", format!("of {count} events {} would be kept", keep.count)));
        }
        let (mut at, mut bytes, mut oldest) = (0, 0, None);
        loop {
            let page = source.page(name, at, PAGE).await?;
            let Some((last, _)) = page.last() else { return Ok(None) };
            at = *last;
            for (draft, time) in page.iter().filter_map(|(_, stored)| read(stored.as_deref()?, target.event_limit).ok())
            {
                bytes += draft.size() + OVERHEAD;
                oldest.get_or_insert(time);
            }
            if let Some(age) = oldest.map(|time| Duration::from_millis(target.bus.now().saturating_sub(time)))
                && age > keep.age
            {
                let hours = |age: Duration| age.as_secs().div_ceil(3600);
                let reason =
                    format!("of {first} to {at} some are {} hours old, {} are kept", hours(age), hours(keep.age));
                return Ok(exceeds("age", reason));
            }
            if bytes > keep.bytes {
                return Ok(exceeds("bytes", format!("it has more than the {} bytes that are kept", keep.bytes)));
            }
        }
    }

    /// Places events at the next offsets.
    async fn place(&mut self, target: &ImportTarget, drafts: Vec<Draft>) -> Result<(), Failure> {
        let drafts: Vec<_> = drafts.into_iter().map(|draft| (self.channel.clone(), draft)).collect();
        let count = drafts.len() as u64;
        let placed = target.past.publish("", drafts).await.map_err(|failure| failed(&failure.error))?;
        let first = placed.first().ok_or_else(|| Failure::Failed("nothing was placed".into()))?;
        if first.position.offset != self.at + 1 {
            return Err(Failure::Failed(format!(
                "{}: another client publishes there: stop it, delete the channel and run the import again",
                self.channel
            )));
        }
        self.at += count;
        Ok(())
    }

    /// Fills the offsets up to `last`.
    async fn void(&mut self, target: &ImportTarget, last: u64) -> Result<(), Failure> {
        let parts = DraftParts { kind: Some(VOID), ..DraftParts::default() };
        let void = Draft::own(parts, target.event_limit).map_err(|error| failed(&error))?;
        while self.at < last {
            let count = usize::try_from(last - self.at).unwrap_or(PAGE).min(PAGE);
            self.place(target, vec![void.clone(); count]).await?;
        }
        Ok(())
    }
}

fn is_void(event: &Arc<Event>) -> bool {
    event.kind_json().is_some_and(|kind| kind.trim_matches('"') == VOID)
}

/// Whether both have the same content.
fn is_same(one: &Event, other: &Event) -> bool {
    one.kind_json() == other.kind_json()
        && one.sender_json() == other.sender_json()
        && one.data_json() == other.data_json()
}
