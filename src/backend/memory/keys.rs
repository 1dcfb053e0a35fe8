//! [`IdempotencyKeys`], the keys that were used lately.

use std::{
    collections::{HashMap, VecDeque},
    hash::BuildHasher,
    sync::Arc,
    time::Duration,
};

use parking_lot::{MappedMutexGuard, Mutex, MutexGuard};

use crate::{
    bus::{MemoryBudget, MemoryCharge, Placed, Topic},
    channel::Channel,
    error::{Code, Error, Result},
    event::Draft,
};

const SHARDS: usize = 64;
/// Memory of a key: its place in the table and in the order, each of which may be half empty.
pub(super) const KEY_COST: usize = 160;
/// Tables with room for this many keys more than they hold free it.
const SPARE: usize = 64;

/// The idempotency keys of all channels that have some. Locked after the buffer of the channel.
pub(super) struct IdempotencyKeys {
    shards: Box<[Mutex<HashMap<Channel, UsedKeys, foldhash::fast::RandomState>>]>,
    /// Chooses the shard of a channel.
    placement: foldhash::fast::RandomState,
    budget: Arc<MemoryBudget>,
    /// The part of `budget` that keys may use. A key cannot be evicted as an event can: its publish could be repeated.
    share: Arc<MemoryBudget>,
}

/// The idempotency keys of one channel.
pub(super) struct UsedKeys {
    used: HashMap<u64, UsedKey, foldhash::fast::RandomState>,
    /// Unix milliseconds at which each key was used, oldest first.
    order: VecDeque<(u64, u64)>,
    /// A 64-bit hash stands for (subject, key). Its seed is secret, so that no client can make two keys collide.
    hasher: foldhash::quality::RandomState,
    budget: MemoryCharge,
    share: MemoryCharge,
    /// Keeps the topic in use: keys and epoch of a channel live and die together.
    _topic: Arc<Topic>,
}

struct UsedKey {
    body: u64,
    placed: Placed,
}

/// A key of a draft, and the fingerprint of the body that it stands for.
#[derive(Clone, Copy)]
pub(super) struct DraftKey {
    hash: u64,
    body: u64,
}

impl IdempotencyKeys {
    pub(super) fn new(budget: Arc<MemoryBudget>) -> Self {
        IdempotencyKeys {
            shards: (0..SHARDS).map(|_| Mutex::default()).collect(),
            placement: Default::default(),
            share: Arc::new(MemoryBudget::new(budget.limit() / 2)),
            budget,
        }
    }

    fn shard(&self, channel: &Channel) -> MutexGuard<'_, HashMap<Channel, UsedKeys, foldhash::fast::RandomState>> {
        self.shards[(self.placement.hash_one(channel) >> 48) as usize % SHARDS].lock()
    }

    /// The keys of a channel.
    pub(super) fn of(&self, topic: &Arc<Topic>) -> MappedMutexGuard<'_, UsedKeys> {
        MutexGuard::map(self.shard(topic.channel()), |shard| {
            shard.entry(topic.channel().clone()).or_insert_with(|| UsedKeys {
                used: HashMap::default(),
                order: VecDeque::new(),
                hasher: Default::default(),
                budget: MemoryCharge::new(self.budget.clone()),
                share: MemoryCharge::new(self.share.clone()),
                _topic: topic.clone(),
            })
        })
    }

    /// Forgets all keys of a channel, whose life has ended.
    pub(super) fn forget(&self, channel: &Channel) {
        self.shard(channel).remove(channel);
    }

    /// Forgets the keys of a channel that are older than `window`.
    pub(super) fn expire(&self, channel: &Channel, window: Duration, now: u64) {
        let mut shard = self.shard(channel);
        if let Some(keys) = shard.get_mut(channel) {
            keys.expire(window, now);
            if keys.order.is_empty() {
                shard.remove(channel);
            }
        }
    }
}

impl UsedKeys {
    /// Checks a whole batch before it is placed: a known key with another body rejects all of it, and so does a new key
    /// for which there is no memory, because a repetition of its publish would not be recognized.
    ///
    /// # Errors
    /// `key_reused` or `overloaded`.
    pub(super) fn check(&self, channel: &Channel, subject: &str, drafts: &[Draft]) -> Result<()> {
        let mut batch: HashMap<u64, u64> = HashMap::new();
        for draft in drafts {
            let Some(key) = &draft.key else { continue };
            let DraftKey { hash, body } = self.key_of(subject, key, draft);
            let known = self.used.get(&hash).map(|used| used.body);
            if known.or(batch.insert(hash, body)).is_some_and(|known| known != body) {
                return Err(Error::new(
                    Code::KeyReused,
                    format!("the key {key:?} was used for another event of channel {channel}"),
                ));
            }
        }
        let new = batch.keys().filter(|hash| !self.used.contains_key(hash)).count();
        let share = self.share.budget();
        if new > 0 && share.used() + new * KEY_COST > share.limit() {
            let reason = format!("the idempotency keys use {} bytes, half of bus.memory.budget", share.limit());
            return Err(Error::new(Code::Overloaded, reason).with("limit", "bus.memory.budget"));
        }
        Ok(())
    }

    pub(super) fn key_of(&self, subject: &str, key: &str, draft: &Draft) -> DraftKey {
        DraftKey { hash: self.hasher.hash_one((subject, key)), body: draft.body.fingerprint() }
    }

    /// Where the event of a key was placed.
    pub(super) fn placed(&self, key: DraftKey) -> Option<Placed> {
        self.used.get(&key.hash).map(|used| used.placed)
    }

    /// Remembers that a key was used at `now`, in Unix milliseconds.
    pub(super) fn insert(&mut self, key: DraftKey, placed: Placed, now: u64) {
        self.used.insert(key.hash, UsedKey { body: key.body, placed });
        self.order.push_back((now, key.hash));
    }

    /// Forgets the keys that are older than `window`.
    pub(super) fn expire(&mut self, window: Duration, now: u64) {
        let window = window.as_millis() as u64;
        while let Some((_, hash)) = self.order.pop_front_if(|(used, _)| *used + window <= now) {
            self.used.remove(&hash);
        }
        let len = self.order.len();
        if self.order.capacity() > SPARE + 4 * len {
            self.order.shrink_to(2 * len);
            self.used.shrink_to(2 * len);
        }
        self.account();
    }

    /// Accounts for the memory of the keys.
    pub(super) fn account(&mut self) {
        let bytes = self.order.len() * KEY_COST;
        self.budget.resize(bytes);
        self.share.resize(bytes);
    }
}
