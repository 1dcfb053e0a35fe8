//! [`IdempotencyKeys`], the keys that were used lately.

use std::{
    collections::{HashMap, VecDeque},
    hash::BuildHasher,
    sync::Arc,
};

use parking_lot::{MappedMutexGuard, Mutex, MutexGuard};

use crate::{
    bus::{KeyLimits, MemoryBudget, MemoryCharge, Placed, Topic},
    channel::Channel,
    error::{Code, Error, Result},
    event::Draft,
};

const SHARDS: usize = 64;
/// Memory of a key: its place in the table, which is at most half empty, and in the order.
const KEY_COST: usize = 128;

/// The idempotency keys of all channels that have some. Locked after the buffer of the channel.
pub(super) struct IdempotencyKeys {
    shards: Box<[Mutex<HashMap<Channel, UsedKeys, foldhash::fast::RandomState>>]>,
    /// Chooses the shard of a channel.
    placement: foldhash::fast::RandomState,
    budget: Arc<MemoryBudget>,
}

/// The idempotency keys of one channel.
pub(super) struct UsedKeys {
    used: HashMap<u64, UsedKey, foldhash::fast::RandomState>,
    /// Unix milliseconds at which each key was used, oldest first.
    order: VecDeque<(u64, u64)>,
    /// A 64-bit hash stands for (subject, key). Its seed is secret, so that no client can make two keys collide.
    hasher: foldhash::quality::RandomState,
    charge: MemoryCharge,
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
                charge: MemoryCharge::new(self.budget.clone()),
                _topic: topic.clone(),
            })
        })
    }

    /// Forgets all keys of a channel, whose life has ended.
    pub(super) fn forget(&self, channel: &Channel) {
        self.shard(channel).remove(channel);
    }

    /// Forgets the keys of a channel that are too old.
    pub(super) fn expire(&self, channel: &Channel, limits: &KeyLimits, now: u64) {
        let mut shard = self.shard(channel);
        if let Some(keys) = shard.get_mut(channel) {
            keys.expire(limits, now);
            if keys.order.is_empty() {
                shard.remove(channel);
            }
        }
    }
}

impl UsedKeys {
    /// Checks a whole batch before it is placed: a known key with another body rejects all of it.
    ///
    /// # Errors
    /// `key_reused`.
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

    /// Forgets the keys that are too old or too many, and accounts for the memory of the rest.
    pub(super) fn expire(&mut self, limits: &KeyLimits, now: u64) {
        let old = now.saturating_sub(limits.window.as_millis() as u64);
        while self.order.len() > limits.count || self.order.front().is_some_and(|(used, _)| *used < old) {
            if let Some((_, hash)) = self.order.pop_front() {
                self.used.remove(&hash);
            }
        }
        self.charge.resize(self.order.len() * KEY_COST);
    }
}
