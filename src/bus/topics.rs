//! [`Topics`], the table of the channels in use on this node.
//!
//! A million channels that came and went cost nothing: a topic without events and users leaves the table, and what is
//! remembered of its end is bounded.

use std::{
    collections::{HashMap, VecDeque},
    hash::BuildHasher,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering::Relaxed},
    },
    time::Duration,
};

use indexmap::IndexMap;
use parking_lot::Mutex;

use super::{
    config::Config,
    log_bounds::{LogBounds, PreviousLife},
    memory_budget::MemoryBudget,
    ring::Ring,
    topic::Topic,
    wall_clock::WallClock,
};
use crate::channel::Channel;

const SHARDS: usize = 64;
/// Ended logs remembered per shard, 65,536 in all.
const ENDS: usize = 1024;
/// An empty topic stays for so long, because a publisher is likely to publish again.
const LINGER: Duration = Duration::from_secs(60);
/// Topics compared to find an old event. A few are enough, as in Redis's approximate LRU.
const SAMPLES: usize = 5;
/// A table of topics that shrank frees its memory above this capacity.
const SPARE: usize = 64;

/// The channels in use on this node.
pub struct Topics {
    shards: Box<[Mutex<TopicShard>]>,
    hasher: foldhash::fast::RandomState,
    config: Config,
    clock: WallClock,
    budget: Arc<MemoryBudget>,
    /// The next shard to sweep.
    hand: AtomicUsize,
}

#[derive(Default)]
struct TopicShard {
    /// Indexed, so that a sweep and a sample cost no more than the topics that they visit.
    topics: IndexMap<Channel, Arc<Topic>, foldhash::fast::RandomState>,
    ends: HashMap<u64, LogEnd, foldhash::fast::RandomState>,
    /// Keys and numbers of `ends` by age, among them up to as many that are forgotten.
    order: VecDeque<(u64, u64)>,
    /// Number of the last end.
    ended: u64,
    /// Unix second from which on a channel that is in neither table is known to have had no log.
    horizon: u64,
}

/// How a log ended whose topic has left the table.
struct LogEnd {
    previous: PreviousLife,
    absent_since: u64,
    /// Tells this end from an earlier one of the same channel.
    number: u64,
}

// === impl Topics ===

impl Topics {
    pub fn new(config: Config, clock: WallClock) -> Self {
        // A position of the second in which an earlier process ended must not be taken for one of this process.
        let horizon = clock.now() / 1000 + 1;
        let shard = || Mutex::new(TopicShard { horizon, ..Default::default() });
        Topics {
            shards: (0..SHARDS).map(|_| shard()).collect(),
            hasher: Default::default(),
            budget: Arc::new(MemoryBudget::new(config.budget)),
            config,
            clock,
            hand: AtomicUsize::new(0),
        }
    }

    pub(crate) fn config(&self) -> &Config {
        &self.config
    }

    /// Unix milliseconds.
    pub(crate) fn now(&self) -> u64 {
        self.clock.now()
    }

    /// Whether the time is set by a test or an import.
    pub(crate) fn is_manual(&self) -> bool {
        matches!(self.clock, WallClock::Manual(_))
    }

    pub(crate) fn budget(&self) -> &Arc<MemoryBudget> {
        &self.budget
    }

    /// Memory in use, in bytes.
    pub fn used(&self) -> usize {
        self.budget.used()
    }

    /// Number of topics.
    pub fn count(&self) -> usize {
        self.shards.iter().map(|shard| shard.lock().topics.len()).sum()
    }

    /// Subscriptions of all topics.
    pub fn readers(&self) -> usize {
        let mut readers = 0;
        self.each(|topic| readers += topic.lock().readers() as usize);
        readers
    }

    /// The topic of a channel that is in use.
    pub(crate) fn get(&self, channel: &Channel) -> Option<Arc<Topic>> {
        self.shard(self.hasher.hash_one(channel)).lock().topics.get(channel).cloned()
    }

    /// The bounds of a channel that is not in use, without putting it into use.
    pub(crate) fn unused_bounds(&self, channel: &Channel) -> LogBounds {
        let hash = self.hasher.hash_one(channel);
        let shard = self.shard(hash).lock();
        let end = shard.ends.get(&hash);
        LogBounds::absent(end.map_or(0, |end| end.absent_since).max(shard.horizon), end.map(|end| end.previous))
    }

    /// Puts a channel into use while the returned topic is held.
    pub(crate) fn open(&self, channel: &Channel) -> Arc<Topic> {
        let hash = self.hasher.hash_one(channel);
        let mut shard = self.shard(hash).lock();
        if let Some(topic) = shard.topics.get(channel) {
            return topic.clone();
        }
        let end = shard.ends.remove(&hash);
        let since = end.as_ref().map_or(0, |end| end.absent_since).max(shard.horizon);
        let topic = Arc::new(Topic::new(
            channel.clone(),
            self.config.retention_of(channel),
            self.clock.clone(),
            self.budget.clone(),
            LogBounds::absent(since, end.map(|end| end.previous)),
        ));
        shard.topics.insert(channel.clone(), topic.clone());
        topic
    }

    fn shard(&self, hash: u64) -> &Mutex<TopicShard> {
        // The hash table in the shard uses the low bits and the top seven.
        &self.shards[(hash >> 48) as usize % SHARDS]
    }

    /// Visits every topic, with one shard locked at a time.
    pub(crate) fn each(&self, mut visit: impl FnMut(&Arc<Topic>)) {
        for shard in &self.shards {
            shard.lock().topics.values().for_each(&mut visit);
        }
    }

    /// The topic with the oldest event among a few random ones; `None` if no topic has an event.
    pub(crate) fn sample_oldest(&self) -> Option<Arc<Topic>> {
        let mut oldest: Option<(u64, Arc<Topic>)> = None;
        let mut seen = 0;
        // Each shard is visited at most once, beginning with a random one.
        let start = fastrand::usize(..SHARDS);
        for at in 0..SHARDS {
            let shard = self.shards[(start + at) % SHARDS].lock();
            if shard.topics.is_empty() {
                continue;
            }
            let from = fastrand::usize(..shard.topics.len());
            for i in 0..shard.topics.len().min(2 * SAMPLES) {
                let topic = &shard.topics[(from + i) % shard.topics.len()];
                if let Some(time) = topic.lock().events().front().map(|event| event.time) {
                    seen += 1;
                    if oldest.as_ref().is_none_or(|(found, _)| time < *found) {
                        oldest = Some((time, topic.clone()));
                    }
                }
            }
            if seen >= SAMPLES {
                break;
            }
        }
        oldest.map(|(_, topic)| topic)
    }

    /// Does one part of the housekeeping: passes the topics of one shard to `trim`, frees spare memory, and removes unused
    /// topics. 64 calls do all of it; the last of them returns true.
    pub(crate) fn sweep(&self, trim: impl Fn(&Topic, &mut Ring)) -> bool {
        let now = self.now();
        let hand = self.hand.fetch_add(1, Relaxed) % SHARDS;
        let mut shard = self.shards[hand].lock();
        let mut at = 0;
        while at < shard.topics.len() {
            let topic = &shard.topics[at];
            let mut buffer = topic.edit();
            trim(topic, &mut buffer);
            buffer.shrink();
            let quiet = buffer.bounds().time + (LINGER.as_millis() as u64) < now;
            // A count of one is final: a new reference is only made from another one, or under the lock of this shard.
            if !quiet || !buffer.is_disposable() || Arc::strong_count(topic) > 1 {
                at += 1;
                continue;
            }
            let ended = buffer.ended(now);
            drop(buffer);
            if let Some(LogBounds { previous: Some(previous), absent_since, .. }) = ended {
                let hash = self.hasher.hash_one(topic.channel());
                shard.remember(hash, previous, absent_since);
            }
            shard.topics.swap_remove_index(at);
        }
        if shard.topics.capacity() > SPARE && shard.topics.capacity() > shard.topics.len() * 4 {
            shard.topics.shrink_to_fit();
        }
        hand == SHARDS - 1
    }
}

// === impl TopicShard ===

impl TopicShard {
    fn remember(&mut self, hash: u64, previous: PreviousLife, absent_since: u64) {
        self.ended += 1;
        let number = self.ended;
        self.ends.insert(hash, LogEnd { previous, absent_since, number });
        self.order.push_back((hash, number));
        while self.ends.len() > ENDS {
            let Some((hash, number)) = self.order.pop_front() else { break };
            // A channel that came back has no end, or one that is newer than this place in the order.
            if let Some(end) = self.ends.get(&hash).filter(|end| end.number == number) {
                // From now on, a position from before this end cannot be resolved without a gap.
                self.horizon = self.horizon.max(end.absent_since);
                self.ends.remove(&hash);
            }
        }
        if self.order.len() > 2 * ENDS {
            let ends = &self.ends;
            self.order.retain(|(hash, number)| ends.get(hash).is_some_and(|end| end.number == *number));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{bus::gap::GapReason, position::Epoch};

    /// A channel that repeatedly comes and goes does not push out what is remembered of the others.
    #[test]
    fn ends_are_forgotten_by_age() {
        let mut shard = TopicShard::default();
        let previous = PreviousLife { epoch: Epoch::random(), top: 1, reason: GapReason::Reset };
        shard.remember(1, previous, 1);
        for n in 2..5 * ENDS as u64 {
            shard.ends.remove(&2);
            shard.remember(2, previous, n);
        }
        assert_eq!((shard.ends.len(), shard.horizon), (2, 0));
        assert!(shard.order.len() <= 2 * ENDS);
        for n in 0..ENDS as u64 {
            shard.remember(1_000 + n, previous, 1_000_000);
        }
        // The two oldest were forgotten.
        assert_eq!((shard.ends.len(), shard.horizon), (ENDS, 5 * ENDS as u64 - 1));
    }
}
