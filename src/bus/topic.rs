//! [`Topic`], a channel in use on this node, and [`Topics`], all of them.
//!
//! A million names that came and went cost nothing: a topic without events, readers and keys leaves the table, and
//! what is remembered of its end is bounded.

use std::{
    collections::{HashMap, VecDeque},
    hash::BuildHasher,
    sync::{
        Arc,
        atomic::{AtomicU64, AtomicUsize, Ordering::Relaxed},
    },
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use indexmap::IndexMap;
use parking_lot::{Mutex, MutexGuard};

use super::{
    log::Gap,
    log_bounds::PreviousLife,
    ring::{KeyLimits, Retention, Ring},
};
use crate::{
    channel::Channel,
    error::{Code, Error, Result},
    pattern::Pattern,
    position::{Position, Start},
};

const SHARDS: usize = 64;
/// What a topic costs beside its events, in bytes.
const TOPIC_COST: usize = 360;
/// Ended lives remembered per shard, 65,536 in all.
const ENDS: usize = 1024;
/// An empty topic stays for so long, since who wrote once writes again.
const LINGER: Duration = Duration::from_secs(60);
/// Channels trimmed at most for one publish: some milliseconds of work.
const RELIEFS: usize = 10_000;
/// Topics looked at when the budget asks for the oldest event. As in Redis's approximate LRU: a few are enough.
const SAMPLES: usize = 5;

/// Retention by name: the first pattern that matches.
#[derive(Clone, Debug)]
pub struct RetentionRule {
    pub pattern: Pattern,
    pub retention: Retention,
}

/// What the bus may use, and how long it remembers.
#[derive(Clone, Debug)]
pub struct Config {
    pub rules: Vec<RetentionRule>,
    /// Where no rule matches.
    pub retention: Retention,
    /// Memory of all events and topics, in bytes.
    pub budget: usize,
    pub keys: KeyLimits,
    /// A consumer that was not heard of for so long is forgotten.
    pub consumer_idle: Duration,
    pub max_consumers: usize,
    /// Channels of one consumer.
    pub max_cursors: usize,
}

/// The bus's idea of time, Unix milliseconds. Tests own theirs.
#[derive(Clone, Debug, Default)]
pub enum WallClock {
    #[default]
    System,
    Manual(Arc<AtomicU64>),
}

pub struct Topic {
    channel: Channel,
    retention: Retention,
    clock: WallClock,
    ring: Mutex<Ring>,
}

pub struct Topics {
    shards: Box<[Mutex<Shard>]>,
    hasher: foldhash::fast::RandomState,
    config: Config,
    clock: WallClock,
    /// Bytes of all rings, their keys, and topics.
    used: AtomicUsize,
    /// The next shard to sweep.
    hand: AtomicUsize,
}

#[derive(Default)]
struct Shard {
    /// Indexed, so that a sweep and a sample cost no more than what they look at.
    topics: IndexMap<Channel, Arc<Topic>, foldhash::fast::RandomState>,
    ends: HashMap<u64, End, foldhash::fast::RandomState>,
    /// By age. Holds ends that are forgotten by now, at most as many again as there may be.
    order: VecDeque<(u64, u64)>,
    /// Ends so far.
    ended: u64,
    /// From this second on, a channel that is neither here nor among `ends` is known to have had no log.
    horizon: u64,
}

/// How a log ended whose topic has left the table.
struct End {
    past: PreviousLife,
    /// From this second on there was no log.
    absent: u64,
    /// Which end of the shard this is: tells it from one before of the same channel.
    number: u64,
}

// === impl Clock ===

impl WallClock {
    /// Unix milliseconds.
    pub fn now(&self) -> u64 {
        match self {
            WallClock::System => SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_millis() as u64,
            WallClock::Manual(now) => now.load(Relaxed),
        }
    }
}

// === impl Topic ===

impl Topic {
    pub fn channel(&self) -> &Channel {
        &self.channel
    }

    pub fn retention(&self) -> &Retention {
        &self.retention
    }

    pub fn lock(&self) -> MutexGuard<'_, Ring> {
        self.ring.lock()
    }

    /// See [`LogBounds::resolve`](super::log_bounds::LogBounds::resolve).
    pub fn resolve(&self, start: Start) -> (Position, Option<Gap>) {
        let ring = self.lock();
        ring.bounds().resolve(&self.channel, start, ring.clock(self.clock.now()))
    }
}

// === impl Topics ===

impl Topics {
    pub fn new(config: Config, clock: WallClock) -> Self {
        // A position of the second in which a process before this one ended must not pass for one of this.
        let horizon = clock.now() / 1000 + 1;
        let shard = || Mutex::new(Shard { horizon, ..Default::default() });
        Topics {
            shards: (0..SHARDS).map(|_| shard()).collect(),
            hasher: Default::default(),
            config,
            clock,
            used: AtomicUsize::new(0),
            hand: AtomicUsize::new(0),
        }
    }

    pub fn config(&self) -> &Config {
        &self.config
    }

    /// Unix milliseconds.
    pub fn now(&self) -> u64 {
        self.clock.now()
    }

    /// Memory in use, in bytes.
    pub fn used(&self) -> usize {
        self.used.load(Relaxed)
    }

    /// Topics in the table.
    pub fn count(&self) -> usize {
        self.shards.iter().map(|shard| shard.lock().topics.len()).sum()
    }

    /// Subscriptions of all topics.
    pub fn readers(&self) -> usize {
        self.shards
            .iter()
            .map(|shard| shard.lock().topics.values().map(|topic| topic.lock().readers() as usize).sum::<usize>())
            .sum()
    }

    /// The topic, if the channel is in use.
    pub fn get(&self, channel: &Channel) -> Option<Arc<Topic>> {
        self.shard(self.hasher.hash_one(channel)).lock().topics.get(channel).cloned()
    }

    /// What would be known of a channel that is not in use, without putting it into use.
    pub fn passing(&self, channel: &Channel) -> Ring {
        let hash = self.hasher.hash_one(channel);
        let shard = self.shard(hash).lock();
        match shard.ends.get(&hash) {
            Some(end) => Ring::new(end.absent.max(shard.horizon), Some(end.past)),
            None => Ring::new(shard.horizon, None),
        }
    }

    /// How much of a channel is kept.
    pub fn retention_of(&self, channel: &Channel) -> Retention {
        let rule = self.config.rules.iter().find(|rule| rule.pattern.matches(channel.as_str()));
        rule.map_or(self.config.retention, |rule| rule.retention)
    }

    /// The bus's idea of time is a test's.
    pub fn is_manual(&self) -> bool {
        matches!(self.clock, WallClock::Manual(_))
    }

    /// Does `work` with the ring of a channel that is in use from now on.
    pub fn with<R>(&self, channel: &Channel, work: impl FnOnce(&Arc<Topic>, &mut Ring) -> R) -> R {
        loop {
            let topic = self.open(channel);
            let mut ring = topic.lock();
            // Between the two locks the sweep may have taken it away.
            if !ring.retired {
                return work(&topic, &mut ring);
            }
        }
    }

    fn open(&self, channel: &Channel) -> Arc<Topic> {
        let hash = self.hasher.hash_one(channel);
        let mut shard = self.shard(hash).lock();
        if let Some(topic) = shard.topics.get(channel) {
            return topic.clone();
        }
        let horizon = shard.horizon;
        let (absent, past) = match shard.ends.remove(&hash) {
            Some(end) => (end.absent.max(horizon), Some(end.past)),
            None => (horizon, None),
        };
        let topic = Arc::new(Topic {
            channel: channel.clone(),
            retention: self.retention_of(channel),
            clock: self.clock.clone(),
            ring: Mutex::new(Ring::new(absent, past)),
        });
        shard.topics.insert(channel.clone(), topic.clone());
        self.used.fetch_add(TOPIC_COST, Relaxed);
        topic
    }

    fn shard(&self, hash: u64) -> &Mutex<Shard> {
        // The table itself uses the low bits, and the top seven.
        &self.shards[(hash >> 48) as usize % SHARDS]
    }

    /// Calls `visit` with every topic, a shard locked at a time.
    pub fn each(&self, mut visit: impl FnMut(&Arc<Topic>)) {
        for shard in &self.shards {
            shard.lock().topics.values().for_each(&mut visit);
        }
    }

    // === memory ===

    /// Says that a ring grew or shrank.
    pub fn account(&self, before: usize, after: usize) {
        match after.checked_sub(before) {
            Some(grown) => self.used.fetch_add(grown, Relaxed),
            None => self.used.fetch_sub(before - after, Relaxed),
        };
    }

    /// Keeps the budget: lets go of old events until there is room for `bytes`.
    pub fn reserve(&self, bytes: usize) -> Result<()> {
        let mut tries = 0;
        while self.used() + bytes > self.config.budget {
            tries += 1;
            // What can never fit must not empty everybody's channels first.
            if bytes > self.config.budget || tries > RELIEFS || !self.relieve() {
                return Err(Error::new(
                    Code::Overloaded,
                    format!("bus.memory.budget of {} bytes is used up", self.config.budget),
                )
                .with("limit", "bus.memory.budget"));
            }
        }
        Ok(())
    }

    /// Halves the ring with the oldest event among a few that chance picks. False if there was none.
    fn relieve(&self) -> bool {
        let mut oldest: Option<(u64, Arc<Topic>)> = None;
        let mut seen = 0;
        // Every shard at most once: chance says where to begin.
        let start = fastrand::usize(..SHARDS);
        for at in 0..SHARDS {
            let shard = self.shards[(start + at) % SHARDS].lock();
            if shard.topics.is_empty() {
                continue;
            }
            let from = fastrand::usize(..shard.topics.len());
            for i in 0..shard.topics.len().min(2 * SAMPLES) {
                let topic = &shard.topics[(from + i) % shard.topics.len()];
                if let Some(time) = topic.lock().oldest() {
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
        let Some((_, topic)) = oldest else { return false };
        let mut ring = topic.lock();
        let before = ring.memory();
        ring.relieve();
        self.account(before, ring.memory());
        true
    }

    /// One part of the housekeeping: age, keys, frames nobody needs, topics nobody uses. All of it after 64 calls, of
    /// which the last answers true.
    pub fn sweep(&self) -> bool {
        let now = self.now();
        let hand = self.hand.fetch_add(1, Relaxed) % SHARDS;
        let mut shard = self.shards[hand].lock();
        let mut at = 0;
        while at < shard.topics.len() {
            let topic = shard.topics[at].clone();
            let mut ring = topic.lock();
            let before = ring.memory();
            ring.trim(&topic.retention, now);
            ring.expire_keys(&self.config.keys, now);
            ring.cool();
            self.account(before, ring.memory());
            let quiet = ring.time().is_none_or(|time| time + (LINGER.as_millis() as u64) < now);
            if ring.is_idle() && quiet {
                ring.retired = true;
                // Of a window something is left.
                self.account(ring.memory(), 0);
                if let Some(past) = ring.past().filter(|_| !ring.is_window()) {
                    let absent = ring.end(now);
                    shard.remember(self.hasher.hash_one(&topic.channel), past, absent);
                }
                shard.topics.swap_remove_index(at);
                self.used.fetch_sub(TOPIC_COST, Relaxed);
            } else {
                at += 1;
            }
        }
        if shard.topics.capacity() > 64 && shard.topics.capacity() > shard.topics.len() * 4 {
            shard.topics.shrink_to_fit();
        }
        hand == SHARDS - 1
    }
}

// === impl Shard ===

impl Shard {
    fn remember(&mut self, hash: u64, past: PreviousLife, absent: u64) {
        self.ended += 1;
        let number = self.ended;
        self.ends.insert(hash, End { past, absent, number });
        self.order.push_back((hash, number));
        while self.ends.len() > ENDS {
            let Some((hash, number)) = self.order.pop_front() else { break };
            // A channel that came back since has no end, or another: that one is younger than its place here says.
            if let Some(end) = self.ends.get(&hash).filter(|end| end.number == number) {
                // Whoever was given a position before this end can no longer be told what came after.
                self.horizon = self.horizon.max(end.absent);
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
    use crate::{
        bus::log::GapReason,
        event::{Draft, DraftParts},
        position::Epoch,
    };

    #[test]
    fn the_budget_knows_of_keys_that_outlive_their_events() {
        let keep = Retention { count: 1, age: Duration::from_secs(60), bytes: 1 << 20 };
        let config = Config {
            rules: Vec::new(),
            retention: keep,
            budget: 1 << 24,
            keys: KeyLimits { window: Duration::from_secs(60), count: 1000 },
            consumer_idle: Duration::from_secs(60),
            max_consumers: 1,
            max_cursors: 1,
        };
        let clock = Arc::new(AtomicU64::new(1_000_000));
        let topics = Topics::new(config, WallClock::Manual(clock.clone()));
        let channel = Channel::parse("a").unwrap();
        for n in 0..2000 {
            let key = n.to_string();
            let draft = Draft::new(DraftParts { key: Some(&key), ..DraftParts::default() }, 1000).unwrap();
            topics.with(&channel, |_, ring| {
                let before = ring.memory();
                ring.append(&channel, "", vec![draft], &keep, &topics.config.keys, topics.now()).unwrap();
                topics.account(before, ring.memory());
            });
        }
        assert!(topics.used() > 1000 * 100, "{}", topics.used());
        clock.fetch_add(200_000, Relaxed);
        for _ in 0..SHARDS {
            topics.sweep();
        }
        assert_eq!((topics.count(), topics.used()), (0, 0));
    }

    /// A channel that comes and goes for ever does not push out what is remembered of the others.
    #[test]
    fn ends_are_forgotten_by_age_and_not_by_the_restlessness_of_others() {
        let mut shard = Shard::default();
        let past = PreviousLife { epoch: Epoch::random(), top: 1, reason: GapReason::Reset };
        shard.remember(1, past, 1);
        for n in 2..5 * ENDS as u64 {
            shard.ends.remove(&2);
            shard.remember(2, past, n);
        }
        assert_eq!((shard.ends.len(), shard.horizon), (2, 0));
        assert!(shard.order.len() <= 2 * ENDS);
        for n in 0..ENDS as u64 {
            shard.remember(1_000 + n, past, 1_000_000);
        }
        // The two oldest went.
        assert_eq!((shard.ends.len(), shard.horizon), (ENDS, 5 * ENDS as u64 - 1));
    }
}
