//! [`Memory`], the log of one node, which lives as long as its process. The rings of the topics are the log.

mod consumers;
mod keys;

use std::{collections::BinaryHeap, future::ready, sync::Arc};

use futures_util::{FutureExt, future::BoxFuture};

use self::{
    consumers::ConsumerTable,
    keys::{IdempotencyKeys, KEY_COST},
};
use crate::{
    bus::{
        Bus, ChannelInfo, Config, ConsumerInfo, CursorOp, EVENT_COST, GapReason, Log, LogBounds, LogPage, Placed,
        ReadLimit, Retention, Ring, Tail, Topic, Topics, WallClock,
    },
    channel::Channel,
    error::{Code, Error, Result},
    event::Draft,
    position::{Position, Start},
};

/// Channels that are trimmed at most for one publish: some milliseconds of work.
const MAX_EVICTIONS: usize = 10_000;

/// A backend without a server. No operation waits, so every future is ready.
pub struct Memory {
    topics: Arc<Topics>,
    keys: IdempotencyKeys,
    consumers: ConsumerTable,
}

/// A bus in memory.
pub fn bus(config: Config, clock: WallClock) -> Bus {
    let topics = Arc::new(Topics::new(config, clock));
    Bus::new(Arc::new(Memory::new(topics.clone())), topics)
}

impl Memory {
    pub fn new(topics: Arc<Topics>) -> Self {
        let keys = IdempotencyKeys::new(topics.budget().clone());
        Memory { topics, keys, consumers: ConsumerTable::default() }
    }

    // === writing ===

    fn publish(&self, channel: &Channel, subject: &str, drafts: Vec<Draft>) -> Result<Vec<Placed>> {
        let keys = drafts.iter().filter(|draft| draft.key.is_some()).count();
        self.reserve(drafts.iter().map(Draft::size).sum::<usize>() + keys * KEY_COST)?;
        let topic = self.topics.open(channel);
        let mut buffer = topic.edit();
        let placed = self.place(&topic, &mut buffer, subject, drafts)?;
        let parked = buffer.take_parked();
        drop(buffer);
        parked.wake();
        Ok(placed)
    }

    /// Places all drafts, or none of them if a key is reused or cannot be remembered.
    fn place(&self, topic: &Arc<Topic>, ring: &mut Ring, subject: &str, drafts: Vec<Draft>) -> Result<Vec<Placed>> {
        let now = self.topics.now();
        let mut keys = drafts.iter().any(|draft| draft.key.is_some()).then(|| self.keys.of(topic));
        if let Some(keys) = &mut keys {
            keys.expire(self.topics.config().key_window, now);
            keys.check(topic.channel(), subject, &drafts)?;
        }
        ring.bounds_mut().begin(now);
        let time = ring.bounds().time.max(now);
        let mut results = Vec::with_capacity(drafts.len());
        for draft in drafts {
            let position = Position { epoch: ring.epoch(), offset: ring.top() + 1 };
            let placed = Placed { position, time, duplicate: false };
            if let (Some(keys), Some(key)) = (&mut keys, &draft.key) {
                let key = keys.key_of(subject, key, &draft);
                if let Some(earlier) = keys.placed(key) {
                    results.push(Placed { duplicate: true, ..earlier });
                    continue;
                }
                keys.insert(key, placed, now);
            }
            ring.push(Arc::new(draft.place(position, time)));
            results.push(placed);
        }
        if let Some(keys) = &mut keys {
            keys.account();
        }
        trim(ring, topic.retention(), now);
        Ok(results)
    }

    /// Keeps the memory budget: evicts old events until there is room for `bytes`.
    ///
    /// # Errors
    /// `overloaded`.
    fn reserve(&self, bytes: usize) -> Result<()> {
        let budget = self.topics.budget();
        let mut evictions = 0;
        while budget.used() + bytes > budget.limit() {
            evictions += 1;
            // A batch that can never fit must not empty all channels first.
            if bytes > budget.limit() || evictions > MAX_EVICTIONS || !self.evict() {
                return Err(Error::new(
                    Code::Overloaded,
                    format!("bus.memory.budget of {} bytes is used up", budget.limit()),
                )
                .with("limit", "bus.memory.budget"));
            }
        }
        Ok(())
    }

    /// Removes the older half of a channel with old events. False if no channel has an event.
    fn evict(&self) -> bool {
        let Some(topic) = self.topics.sample_oldest() else { return false };
        let mut ring = topic.edit();
        let evicted = ring.events().len().div_ceil(2);
        for _ in 0..evicted {
            drop_oldest(&mut ring, GapReason::Budget);
        }
        self.topics.budget().add_evicted(evicted);
        ring.clear_frames();
        true
    }

    fn delete(&self, channel: &Channel, before: Option<Position>) -> Result<()> {
        let Some(topic) = self.topics.get(channel) else {
            return match before {
                Some(_) => Err(Error::new(Code::InvalidPosition, "the channel has no log")),
                None => Ok(()),
            };
        };
        let mut ring = topic.edit();
        let Some(before) = before else {
            // The next event begins another life. Readers stay.
            let ended = ring.bounds().ended(self.topics.now(), GapReason::Deleted);
            ring.reset(ended);
            self.keys.forget(channel);
            return Ok(());
        };
        if before.epoch != ring.epoch() || before.offset > ring.top() + 1 {
            return Err(Error::new(Code::InvalidPosition, "before is a position in the channel as it is now"));
        }
        while ring.bounds().first < before.offset {
            drop_oldest(&mut ring, GapReason::Deleted);
        }
        ring.clear_frames();
        Ok(())
    }

    // === reading ===

    /// Calls `read` with the bounds of a channel, and with its ring if it is in use. Reads never write: they do not put
    /// a channel into use.
    fn inspect_with<R>(&self, channel: &Channel, read: impl FnOnce(&LogBounds, Option<&Ring>) -> R) -> R {
        match self.topics.get(channel) {
            Some(topic) => {
                let ring = topic.lock();
                read(ring.bounds(), Some(&ring))
            }
            None => read(&self.topics.unused_bounds(channel), None),
        }
    }

    fn page(&self, channel: &Channel, start: Start, limit: ReadLimit) -> LogPage {
        self.inspect_with(channel, |bounds, ring| {
            let (mut next, gap) = bounds.resolve(channel, start, self.topics.now());
            let mut events = Vec::new();
            let ring = ring.filter(|_| !bounds.is_absent());
            if let Some(ring) = ring {
                let mut bytes = 0;
                for event in ring.events().range((next.offset + 1 - bounds.first) as usize..) {
                    bytes += event.size() + channel.as_str().len() + EVENT_COST;
                    if events.len() == limit.events || (bytes > limit.bytes && !events.is_empty()) {
                        break;
                    }
                    next.offset = event.offset;
                    events.push(event.clone());
                }
            }
            LogPage { events, next, more: ring.is_some() && next.offset < bounds.top, gap }
        })
    }

    fn describe(&self, channel: &Channel) -> ChannelInfo {
        self.inspect_with(channel, |bounds, ring| ChannelInfo {
            channel: channel.clone(),
            epoch: bounds.epoch,
            first: bounds.first,
            top: bounds.top,
            bytes: ring.map_or(0, Ring::bytes),
            readers: ring.map_or(0, Ring::readers),
            time: Some(bounds.time).filter(|time| *time > 0 && !bounds.is_absent()),
        })
    }

    fn channels(&self, prefix: &str, after: Option<&str>, limit: usize) -> Vec<ChannelInfo> {
        // The smallest `limit` names, without collecting all of them.
        let mut first: BinaryHeap<Channel> = BinaryHeap::with_capacity(limit + 1);
        self.topics.each(|topic| {
            let name = topic.channel().as_str();
            let matches = name.starts_with(prefix) && after.is_none_or(|after| name > after);
            if matches
                && (first.len() < limit || first.peek().is_some_and(|last| topic.channel() < last))
                && !topic.lock().epoch().is_absent()
            {
                first.push(topic.channel().clone());
                if first.len() > limit {
                    first.pop();
                }
            }
        });
        first.into_sorted_vec().iter().map(|channel| self.describe(channel)).collect()
    }

    fn move_cursor(&self, consumer: &str, channel: &Channel, op: CursorOp) -> Result<Option<Position>> {
        self.consumers.update(consumer, channel, self.topics.config(), self.topics.now(), |known| match op {
            CursorOp::Get => Ok(known),
            CursorOp::Seek(to) => Ok(Some(to)),
            CursorOp::Commit(to) => self.forward(channel, known, to).map(Some),
        })
    }

    /// The later of two positions, as far as this node knows their order.
    fn forward(&self, channel: &Channel, known: Option<Position>, to: Position) -> Result<Position> {
        self.inspect_with(channel, |bounds, _| {
            if !to.epoch.is_absent() && to.epoch == bounds.epoch && to.offset > bounds.top {
                return Err(Error::new(Code::InvalidPosition, format!("{to} lies ahead of channel {channel}")));
            }
            Ok(known.filter(|known| bounds.rank(*known) >= bounds.rank(to)).unwrap_or(to))
        })
    }
}

/// Drops the events that retention does not keep.
fn trim(ring: &mut Ring, retention: &Retention, now: u64) {
    let old = now.saturating_sub(retention.age.as_millis() as u64);
    while ring.events().len() > 1 && (ring.events().len() > retention.count || ring.bytes() > retention.bytes) {
        drop_oldest(ring, GapReason::Trimmed);
    }
    while ring.events().front().is_some_and(|event| event.time < old) {
        drop_oldest(ring, GapReason::Trimmed);
    }
}

/// Drops the oldest event from the log.
fn drop_oldest(ring: &mut Ring, reason: GapReason) {
    if ring.pop_oldest() {
        let bounds = ring.bounds_mut();
        bounds.first += 1;
        bounds.trim_reason = reason;
    }
}

impl Log for Memory {
    fn ready(&self) -> Result<()> {
        Ok(())
    }

    fn sweep(&self) {
        let (now, config) = (self.topics.now(), self.topics.config());
        let all = self.topics.sweep(|topic, ring| {
            trim(ring, topic.retention(), now);
            self.keys.expire(topic.channel(), config.key_window, now);
        });
        if all {
            self.consumers.expire(config, now);
        }
    }

    fn append<'a>(
        &'a self,
        channel: &'a Channel,
        subject: &'a str,
        drafts: Vec<Draft>,
    ) -> BoxFuture<'a, Result<Vec<Placed>>> {
        ready(self.publish(channel, subject, drafts)).boxed()
    }

    fn read<'a>(&'a self, channel: &'a Channel, start: Start, limit: ReadLimit) -> BoxFuture<'a, Result<LogPage>> {
        ready(Ok(self.page(channel, start, limit))).boxed()
    }

    fn tail<'a>(&'a self, _topic: &'a Arc<Topic>) -> BoxFuture<'a, Result<Tail>> {
        ready(Ok(Tail::default())).boxed()
    }

    fn inspect<'a>(&'a self, channel: &'a Channel) -> BoxFuture<'a, Result<ChannelInfo>> {
        ready(Ok(self.describe(channel))).boxed()
    }

    fn list<'a>(
        &'a self,
        prefix: &'a str,
        after: Option<&'a str>,
        limit: usize,
    ) -> BoxFuture<'a, Result<Vec<ChannelInfo>>> {
        ready(Ok(self.channels(prefix, after, limit))).boxed()
    }

    fn remove<'a>(&'a self, channel: &'a Channel, before: Option<Position>) -> BoxFuture<'a, Result<()>> {
        ready(self.delete(channel, before)).boxed()
    }

    fn cursor<'a>(
        &'a self,
        consumer: &'a str,
        channel: &'a Channel,
        op: CursorOp,
    ) -> BoxFuture<'a, Result<Option<Position>>> {
        ready(self.move_cursor(consumer, channel, op)).boxed()
    }

    fn consumer<'a>(&'a self, consumer: &'a str) -> BoxFuture<'a, Result<Option<ConsumerInfo>>> {
        ready(Ok(self.consumers.get(consumer, self.topics.config()))).boxed()
    }

    fn consumers<'a>(
        &'a self,
        prefix: &'a str,
        after: Option<&'a str>,
        limit: usize,
    ) -> BoxFuture<'a, Result<Vec<ConsumerInfo>>> {
        ready(Ok(self.consumers.list(prefix, after, limit, self.topics.config()))).boxed()
    }

    fn forget<'a>(&'a self, consumer: &'a str) -> BoxFuture<'a, Result<bool>> {
        ready(Ok(self.consumers.remove(consumer))).boxed()
    }
}

#[cfg(test)]
mod tests {
    use std::{
        sync::atomic::{AtomicU64, Ordering::Relaxed},
        time::Duration,
    };

    use super::*;
    use crate::event::DraftParts;

    #[test]
    fn the_budget_includes_keys_that_outlive_their_events() {
        let retention = Retention { count: 1, age: Duration::from_secs(60), bytes: 1 << 20 };
        let key_window = Duration::from_secs(60);
        let config = Config { rules: Vec::new(), retention, budget: 1 << 24, key_window, ..Config::default() };
        let clock = Arc::new(AtomicU64::new(1_000_000));
        let topics = Arc::new(Topics::new(config, WallClock::Manual(clock.clone())));
        let memory = Memory::new(topics.clone());
        let channel = Channel::parse("a").unwrap();
        for n in 0..2000 {
            let key = n.to_string();
            let draft = Draft::new(DraftParts { key: Some(&key), ..DraftParts::default() }, 1000).unwrap();
            memory.publish(&channel, "", vec![draft]).unwrap();
        }
        assert!(topics.used() > 2000 * 100, "{}", topics.used());
        clock.fetch_add(200_000, Relaxed);
        for _ in 0..64 {
            memory.sweep();
        }
        assert_eq!((topics.count(), topics.used()), (0, 0));
    }
}
