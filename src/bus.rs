//! [`Bus`], the core that transports and adapters publish to, read from and wait on. A backend below it stores the events.

mod channel_info;
mod config;
mod consumer;
mod filter;
mod format;
mod frame_cache;
mod gap;
mod log;
mod log_bounds;
mod memory_budget;
mod page;
mod parking;
mod retention;
mod ring;
mod subscription;
mod tail;
mod topic;
mod topics;
mod wall_clock;
mod watch;
mod window;

use std::{collections::HashMap, sync::Arc};

use futures_util::future::try_join_all;

pub use self::{
    channel_info::ChannelInfo,
    config::Config,
    consumer::{ConsumerInfo, CursorOp},
    filter::Filter,
    format::Format,
    gap::{Gap, GapReason},
    log::Log,
    page::{LogPage, Placed, ReadLimit},
    retention::{Retention, RetentionRule},
    subscription::{Delivery, DeliveryItem, SubscriptionStart, Subscriptions},
    tail::Tail,
    topic::Topic,
    topics::Topics,
    wall_clock::WallClock,
    watch::Watch,
};
pub(crate) use self::{
    log_bounds::{LogBounds, PreviousLife, Term},
    memory_budget::{MemoryBudget, MemoryCharge},
    ring::{EVENT_COST, Ring},
    tail::Backfill,
    window::LiveOutcome,
};
use crate::{
    channel::Channel,
    error::{Error, Result},
    event::{Draft, Event},
    position::{Position, Start},
};

/// Events that a filtered read scans at most. `next` of its page is past all of them.
const MAX_SCAN: usize = 10_000;
/// Channels whose tails are begun concurrently.
const TAILS: usize = 256;

/// The core: fan-out, replay, limits and order are written here, once for all backends.
pub struct Bus {
    log: Arc<dyn Log>,
    topics: Arc<Topics>,
}

/// Some drafts could not be placed. Others may have been.
#[derive(Debug)]
pub struct PublishFailed {
    pub error: Error,
    /// One result per draft.
    pub placed: Vec<Option<Placed>>,
}

impl Bus {
    /// `topics` is the table that the backend behind `log` fills.
    pub fn new(log: Arc<dyn Log>, topics: Arc<Topics>) -> Self {
        Bus { log, topics }
    }

    /// The channels in use on this node.
    pub fn topics(&self) -> &Topics {
        &self.topics
    }

    /// Whether events can be published and received now.
    pub fn ready(&self) -> Result<()> {
        self.log.ready()
    }

    /// Does one part of the housekeeping; 64 calls do all of it.
    pub fn sweep(&self) {
        self.log.sweep();
    }

    /// Unix milliseconds.
    pub fn now(&self) -> u64 {
        self.topics.now()
    }

    /// Places drafts: one atomic step per channel, in the order in which the channels first appear. Stops at the
    /// first failure. `subject` identifies the publisher and is the scope of idempotency keys.
    pub async fn publish(&self, subject: &str, drafts: Vec<(Channel, Draft)>) -> Result<Vec<Placed>, PublishFailed> {
        let count = drafts.len();
        let mut order: Vec<Channel> = Vec::new();
        let mut steps: HashMap<Channel, (Vec<usize>, Vec<Draft>)> = HashMap::new();
        for (at, (channel, draft)) in drafts.into_iter().enumerate() {
            let (indexes, drafts) = steps.entry(channel.clone()).or_insert_with(|| {
                order.push(channel);
                Default::default()
            });
            indexes.push(at);
            drafts.push(draft);
        }
        let mut placed = vec![None; count];
        for channel in order {
            let Some((indexes, drafts)) = steps.remove(&channel) else { continue };
            match self.log.append(&channel, subject, drafts).await {
                Ok(step) => indexes.into_iter().zip(step).for_each(|(at, step)| placed[at] = Some(step)),
                Err(error) => return Err(PublishFailed { error, placed }),
            }
        }
        Ok(placed.into_iter().flatten().collect())
    }

    /// Places one draft.
    pub async fn publish_one(&self, subject: &str, channel: &Channel, draft: Draft) -> Result<Placed> {
        let placed = self.log.append(channel, subject, vec![draft]).await?;
        placed.first().copied().ok_or_else(|| Error::internal("a backend placed nothing and did not fail"))
    }

    /// Puts channels into use. The watches are in the order of the channels.
    pub async fn watch(&self, channels: &[Channel]) -> Result<Vec<Watch>> {
        let begin = async |channel: &Channel| {
            // Made before the await: if that fails or is dropped, the watch ends.
            let mut watch = Watch::new(self.topics.open(channel));
            watch.fill(self.log.tail(watch.topic()).await?);
            Ok::<_, Error>(watch)
        };
        let mut watches = Vec::with_capacity(channels.len());
        for some in channels.chunks(TAILS) {
            match some {
                [one] => watches.push(begin(one).await?),
                many => watches.extend(try_join_all(many.iter().map(begin)).await?),
            }
        }
        Ok(watches)
    }

    /// Reads up to `limit` events that pass the filter. `next` of the page is past all events that were scanned.
    pub async fn read(
        &self,
        channel: &Channel,
        start: Start,
        limit: ReadLimit,
        filter: Option<&Filter>,
    ) -> Result<LogPage> {
        let Some(filter) = filter else { return self.log.read(channel, start, limit).await };
        let scan = ReadLimit { events: limit.events.max(256), bytes: limit.bytes };
        let mut page = self.log.read(channel, start, scan).await?;
        let mut shown: Vec<Arc<Event>> = Vec::new();
        let (mut bytes, mut scanned) = (0, 0);
        loop {
            for event in std::mem::take(&mut page.events) {
                if filter.matches(&event) {
                    bytes += event.size();
                    if shown.len() == limit.events || (bytes > limit.bytes && !shown.is_empty()) {
                        page.more = true;
                        page.events = shown;
                        return Ok(page);
                    }
                    shown.push(event.clone());
                }
                scanned += 1;
                page.next = event.position();
            }
            if !page.more || scanned >= MAX_SCAN || shown.len() == limit.events {
                page.events = shown;
                return Ok(page);
            }
            let gap = page.gap.take();
            page = self.log.read(channel, Start::After(page.next), scan).await?;
            if page.gap.is_some() && (gap.is_some() || !shown.is_empty()) {
                // Trimmed during the read. The events before the gap come first; the next read returns the gap.
                let after = page.gap.as_ref().and_then(|gap| gap.after).unwrap_or(page.next);
                return Ok(LogPage { events: shown, next: after, more: true, gap });
            }
            page.gap = page.gap.or(gap);
        }
    }

    /// Describes a channel. A channel without a log is not an error.
    pub async fn inspect(&self, channel: &Channel) -> Result<ChannelInfo> {
        self.log.inspect(channel).await
    }

    /// Position of a reader that has read everything.
    pub async fn head(&self, channel: &Channel) -> Result<Position> {
        Ok(self.locate(channel, Start::Now).await?.0)
    }

    /// The first position of `start`, and the history that is missing before it. Unlike [`watch`](Self::watch), it does
    /// not put the channel into use.
    pub(crate) async fn locate(&self, channel: &Channel, start: Start) -> Result<(Position, Option<Gap>)> {
        let page = self.log.read(channel, start, ReadLimit { events: 1, bytes: 0 }).await?;
        let before = |event: &Arc<Event>| Position { offset: event.offset - 1, ..event.position() };
        Ok((page.events.first().map_or(page.next, before), page.gap))
    }

    /// Lists channels that have a log, by name.
    pub async fn list(&self, prefix: &str, after: Option<&str>, limit: usize) -> Result<Vec<ChannelInfo>> {
        self.log.list(prefix, after, limit).await
    }

    /// Removes the events before `before`, or the whole log.
    pub async fn remove(&self, channel: &Channel, before: Option<Position>) -> Result<()> {
        self.log.remove(channel, before).await
    }

    /// Position of a consumer's cursor.
    pub async fn cursor(&self, consumer: &str, channel: &Channel) -> Result<Option<Position>> {
        self.log.cursor(consumer, channel, CursorOp::Get).await
    }

    /// Moves a cursor forward. An older position changes nothing.
    pub async fn commit(&self, consumer: &str, channel: &Channel, to: Position) -> Result<()> {
        self.log.cursor(consumer, channel, CursorOp::Commit(to)).await.map(drop)
    }

    /// Moves a cursor to any position.
    pub async fn seek(&self, consumer: &str, channel: &Channel, to: Position) -> Result<()> {
        self.log.cursor(consumer, channel, CursorOp::Seek(to)).await.map(drop)
    }

    /// All cursors of a consumer.
    pub async fn consumer(&self, name: &str) -> Result<Option<ConsumerInfo>> {
        self.log.consumer(name).await
    }

    /// Lists consumers, by name.
    pub async fn consumers(&self, prefix: &str, after: Option<&str>, limit: usize) -> Result<Vec<ConsumerInfo>> {
        self.log.consumers(prefix, after, limit).await
    }

    /// Removes a consumer. False if it does not exist.
    pub async fn forget(&self, consumer: &str) -> Result<bool> {
        self.log.forget(consumer).await
    }
}
