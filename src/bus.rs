//! [`Bus`]: what everybody calls to publish, read and wait. Over it the transports, under it a backend.

mod filter;
mod format;
mod log;
mod log_bounds;
mod ring;
mod subscription;
mod topic;
mod window;

use std::{collections::HashMap, sync::Arc};

use futures_util::future::try_join_all;

pub use self::{
    filter::Filter,
    format::Format,
    log::{Backfill, ChannelInfo, ConsumerInfo, CursorOp, Gap, GapReason, Log, LogPage, Placed, ReadLimit, Tail},
    log_bounds::{LogBounds, PreviousLife, Term},
    ring::{KeyLimits, Retention, Ring},
    subscription::{Delivery, DeliveryItem, SubscriptionStart, Subscriptions, WakeList},
    topic::{Config, RetentionRule, Topic, Topics, WallClock},
    window::LiveOutcome,
};
use crate::{
    channel::Channel,
    error::{Error, Result},
    event::{Draft, Event},
    position::{Position, Start},
};

/// A filtered read looks at most at so many events: what it has passed is in `next`.
const MAX_SCAN: usize = 10_000;
/// Channels put into use at a time, where that is a question to somebody else.
const TAILS: usize = 256;

/// The core. Fan-out, replay, limits and order are written here, once; what lies in which place is the backend's.
pub struct Bus {
    log: Arc<dyn Log>,
    topics: Arc<Topics>,
}

/// A channel in use on this node, and filled, while this lives. Watch before you read: what comes after the watch
/// wakes you, so nothing is lost in between.
pub struct Watch {
    topic: Arc<Topic>,
    tail: Tail,
}

/// Some drafts could not be placed. The rest may have been.
#[derive(Debug)]
pub struct PublishFailed {
    pub error: Error,
    /// One entry per draft.
    pub placed: Vec<Option<Placed>>,
}

impl Bus {
    /// `topics` are those that the backend fills.
    pub fn new(log: Arc<dyn Log>, topics: Arc<Topics>) -> Self {
        Bus { log, topics }
    }

    /// The channels in use on this node.
    pub fn topics(&self) -> &Topics {
        &self.topics
    }

    /// Whether events can be placed and heard of now.
    pub fn ready(&self) -> Result<()> {
        self.log.ready()
    }

    /// One part of the housekeeping: all of it after 64 calls.
    pub fn sweep(&self) {
        self.log.sweep();
    }

    /// Unix milliseconds.
    pub fn now(&self) -> u64 {
        self.topics.now()
    }

    /// Places drafts: one atomic step per channel, in the order in which the channels first appear. Stops at the
    /// first failure. `subject` is who publishes, the scope of idempotency keys.
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
                Ok(here) => indexes.into_iter().zip(here).for_each(|(at, here)| placed[at] = Some(here)),
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

    /// Puts channels into use, in their order.
    pub async fn watch(&self, channels: &[Channel]) -> Result<Vec<Watch>> {
        let begin = async |channel: &Channel| {
            let topic = self.topics.with(channel, |topic, ring| {
                ring.join();
                topic.clone()
            });
            // Joined before the await: if that fails or is dropped, the watch leaves again.
            let mut watch = Watch { topic, tail: Tail::default() };
            watch.tail = self.log.tail(&watch.topic).await?;
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

    /// Up to `limit` events that pass the filter. `next` passes everything that was looked at.
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
                // Trimmed while we read. What we have comes first; the reader meets this gap at its next read.
                let after = page.gap.as_ref().and_then(|gap| gap.after).unwrap_or(page.next);
                return Ok(LogPage { events: shown, next: after, more: true, gap });
            }
            page.gap = page.gap.or(gap);
        }
    }

    /// What is known of a channel.
    pub async fn inspect(&self, channel: &Channel) -> Result<ChannelInfo> {
        self.log.inspect(channel).await
    }

    /// Where a reader is who has seen everything.
    pub async fn head(&self, channel: &Channel) -> Result<Position> {
        Ok(self.locate(channel, Start::Now).await?.0)
    }

    /// The first position of `start`, and what is missing before it. Unlike a [watch](Self::watch), it does not put the
    /// channel into use: it is for those who do not stay.
    pub async fn locate(&self, channel: &Channel, start: Start) -> Result<(Position, Option<Gap>)> {
        let page = self.log.read(channel, start, ReadLimit { events: 1, bytes: 0 }).await?;
        let before = |event: &Arc<Event>| Position { offset: event.offset - 1, ..event.position() };
        Ok((page.events.first().map_or(page.next, before), page.gap))
    }

    /// Channels that have a log, by name.
    pub async fn list(&self, prefix: &str, after: Option<&str>, limit: usize) -> Result<Vec<ChannelInfo>> {
        self.log.list(prefix, after, limit).await
    }

    /// Removes the events before `before`, or the log.
    pub async fn remove(&self, channel: &Channel, before: Option<Position>) -> Result<()> {
        self.log.remove(channel, before).await
    }

    /// Where `consumer` is in a channel.
    pub async fn cursor(&self, consumer: &str, channel: &Channel) -> Result<Option<Position>> {
        self.log.cursor(consumer, channel, CursorOp::Get).await
    }

    /// Moves a cursor forward. An older position changes nothing.
    pub async fn commit(&self, consumer: &str, channel: &Channel, to: Position) -> Result<()> {
        self.log.cursor(consumer, channel, CursorOp::Commit(to)).await.map(drop)
    }

    /// Moves a cursor anywhere.
    pub async fn seek(&self, consumer: &str, channel: &Channel, to: Position) -> Result<()> {
        self.log.cursor(consumer, channel, CursorOp::Seek(to)).await.map(drop)
    }

    /// All cursors of a consumer.
    pub async fn consumer(&self, name: &str) -> Result<Option<ConsumerInfo>> {
        self.log.consumer(name).await
    }

    /// Consumers, by name.
    pub async fn consumers(&self, prefix: &str, after: Option<&str>, limit: usize) -> Result<Vec<ConsumerInfo>> {
        self.log.consumers(prefix, after, limit).await
    }

    /// Forgets a consumer. False if there was none.
    pub async fn forget(&self, consumer: &str) -> Result<bool> {
        self.log.forget(consumer).await
    }
}

impl Watch {
    pub fn channel(&self) -> &Channel {
        self.topic.channel()
    }

    /// The first position of `start`, and what is missing before it.
    pub fn resolve(&self, start: Start) -> (Position, Option<Gap>) {
        self.topic.resolve(start)
    }

    /// Has what is older than the ring fetched, for all who wait for it.
    fn fetch(&self) {
        if let Some(tail) = &self.tail.0 {
            tail.fetch();
        }
    }

    fn lock(&self) -> parking_lot::MutexGuard<'_, Ring> {
        self.topic.lock()
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        self.topic.lock().leave();
    }
}
