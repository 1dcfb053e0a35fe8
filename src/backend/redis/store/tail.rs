//! Filling rings: what is heard goes straight in; what may have been missed is looked up, once per channel.
//!
//! Looks at a channel are taken one at a time and shown in that order. Whoever needs the ring to be as the log was at some
//! moment shares the first look that begins after it.

use std::{
    collections::HashMap,
    sync::{
        Arc, OnceLock, Weak,
        atomic::{AtomicBool, AtomicU64, Ordering::SeqCst},
    },
    time::Duration,
};

use bytes::Bytes;
use parking_lot::Mutex;
use tokio::{
    sync::{Notify, Semaphore},
    time::{Instant, sleep, timeout_at},
};

use super::{
    Inner,
    keys::ChannelKeys,
    read::failed,
    wire::{EventMessage, LogSnapshot, position},
};
use crate::backend::redis::client::PubSubHandler;
use crate::{
    bus::{Backfill, LiveOutcome, Placed, ReadLimit, Tail, Topic},
    channel::Channel,
    error::{Code, Error, Result},
    event::Draft,
    position::{Position, Start},
};

/// How long a reader waits for its subscription.
const SUBSCRIBE: Duration = Duration::from_secs(4);
/// Looks that repair rings, at a time: after a break all of them need one.
const REPAIRS: usize = 64;
/// Between two tries of what readers wait for.
const PAUSE: Duration = Duration::from_millis(100);
const LONGEST_PAUSE: Duration = Duration::from_secs(2);
/// A channel that is silent for so long is looked at.
const AUDIT: Duration = Duration::from_secs(30);
/// A channel without readers stays subscribed for so long: they come back.
const LINGER: Duration = Duration::from_secs(10);
/// What is looked up for a ring, and for those behind it.
const WINDOW: ReadLimit = ReadLimit { events: 256, bytes: 64 << 10 };
const PAGE: ReadLimit = ReadLimit { events: 1024, bytes: 256 << 10 };

/// The channels that are read on this node.
pub(super) struct Tails {
    owner: OnceLock<Weak<Inner>>,
    entries: Mutex<HashMap<Bytes, Arc<Entry>>>,
    repairs: Arc<Semaphore>,
}

/// A channel that is read here, or was a moment ago.
pub(super) struct Entry {
    channel: Channel,
    keys: ChannelKeys,
    events: Bytes,
    /// Of those who read it now.
    topic: Mutex<Arc<Topic>>,
    guard: Mutex<Weak<Guard>>,
    /// Since when nobody reads it.
    left: Mutex<Option<Instant>>,
    subscribed: Notify,
    /// Looks begun.
    begun: AtomicU64,
    /// One at a time.
    turn: tokio::sync::Mutex<Turn>,
    /// Somebody repairs the ring...
    repairing: AtomicBool,
    /// ...and something came up since that look began.
    again: AtomicBool,
    heard: Mutex<Instant>,
    /// When it was said that the log has readers, Unix milliseconds.
    touched: AtomicU64,
}

/// How the last look ended.
#[derive(Default)]
struct Turn {
    number: u64,
    failed: Option<Error>,
}

/// What readers of a channel hold.
struct Guard {
    owner: Weak<Inner>,
    entry: Arc<Entry>,
}

impl Default for Tails {
    fn default() -> Self {
        Tails { owner: OnceLock::new(), entries: Mutex::default(), repairs: Arc::new(Semaphore::new(REPAIRS)) }
    }
}

impl Tails {
    pub fn belong_to(&self, owner: Weak<Inner>) {
        let _ = self.owner.set(owner);
    }

    fn entry(&self, events: &[u8]) -> Option<Arc<Entry>> {
        self.entries.lock().get(events).cloned()
    }

    fn owner(&self) -> Option<Arc<Inner>> {
        self.owner.get()?.upgrade()
    }
}

impl Inner {
    pub(super) async fn tail(self: &Arc<Self>, topic: &Arc<Topic>) -> Result<Tail> {
        let keys = self.keys.channel(topic.channel());
        let events = keys.events();
        let guard = {
            let mut entries = self.tails.entries.lock();
            let entry = entries.entry(events.clone()).or_insert_with(|| {
                Arc::new(Entry {
                    channel: topic.channel().clone(),
                    keys,
                    events: events.clone(),
                    topic: Mutex::new(topic.clone()),
                    guard: Mutex::default(),
                    left: Mutex::default(),
                    subscribed: Notify::new(),
                    begun: AtomicU64::new(0),
                    turn: tokio::sync::Mutex::default(),
                    repairing: AtomicBool::new(false),
                    again: AtomicBool::new(false),
                    heard: Mutex::new(Instant::now()),
                    touched: AtomicU64::new(0),
                })
            });
            *entry.topic.lock() = topic.clone();
            topic.lock().set_tailed(true);
            *entry.left.lock() = None;
            let mut guard = entry.guard.lock();
            guard.upgrade().unwrap_or_else(|| {
                let made = Arc::new(Guard { owner: Arc::downgrade(self), entry: entry.clone() });
                *guard = Arc::downgrade(&made);
                made
            })
        };
        self.pubsub.subscribe(events.clone());
        let deadline = Instant::now() + SUBSCRIBE;
        loop {
            let subscribed = guard.entry.subscribed.notified();
            tokio::pin!(subscribed);
            // Listens from here on: what comes between the look and the wait is not slept through.
            subscribed.as_mut().enable();
            if self.pubsub.is_subscribed(&events) {
                break;
            }
            if timeout_at(deadline, subscribed).await.is_err() {
                return Err(Error::new(Code::BusUnavailable, "Redis cannot be reached now"));
            }
        }
        self.sync(&guard.entry).await?;
        Ok(Tail(Some(guard)))
    }

    /// Returns when the ring is as the log was at some moment after the call, or later.
    async fn sync(&self, entry: &Entry) -> Result<()> {
        let before = entry.begun.load(SeqCst);
        let mut turn = entry.turn.lock().await;
        if turn.number > before {
            return turn.failed.clone().map_or(Ok(()), Err);
        }
        turn.number = entry.begun.fetch_add(1, SeqCst) + 1;
        let done = self.show(entry).await;
        turn.failed = done.as_ref().err().cloned();
        done.map(drop)
    }

    /// Looks at the log and sets the ring right. Whether something had been missed. Only in one's turn.
    async fn show(&self, entry: &Entry) -> Result<bool> {
        let topic = entry.topic.lock().clone();
        let (epoch, top) = {
            let ring = topic.lock();
            (ring.epoch(), ring.top())
        };
        let keep = self.keep_of(&entry.channel).await.map_err(failed)?;
        let newest = Start::Last(WINDOW.events as u64);
        let start = if epoch.is_absent() { newest } else { Start::After(Position { epoch, offset: top }) };
        let mut look = self.look(&entry.keys, &keep, start, WINDOW).await?;
        if look.bounds.top > top
            && look.events.last().is_none_or(|event| event.offset < look.bounds.top)
            && start != newest
        {
            // Too many to be heard of one by one.
            look = self.look(&entry.keys, &keep, newest, WINDOW).await?;
        }
        let LogSnapshot { bounds, mut events, .. } = look;
        events.retain(|event| event.epoch == bounds.epoch);
        let missed = !bounds.is_absent() && (bounds.epoch, bounds.top) != (epoch, top);
        let parked = {
            let mut ring = topic.lock();
            let (memory, before) = (ring.memory(), (ring.epoch(), ring.top()));
            let parked = ring.apply_snapshot(&entry.channel, &keep, bounds, events);
            self.topics.account(memory, ring.memory());
            (parked, missed && (ring.epoch(), ring.top()) != before)
        };
        parked.0.wake();
        Ok(parked.1)
    }

    /// Has the ring set right soon, by whoever is at it already or by a task.
    fn repair(self: &Arc<Self>, entry: &Arc<Entry>) {
        entry.again.store(true, SeqCst);
        if entry.repairing.swap(true, SeqCst) {
            return;
        }
        let (owner, entry, permits) = (Arc::downgrade(self), entry.clone(), self.tails.repairs.clone());
        tokio::spawn(async move {
            let mut pause = PAUSE;
            loop {
                // Not while it waits for others: what comes up until then is seen by the look that follows.
                let Ok(permit) = permits.acquire().await else { return };
                entry.again.store(false, SeqCst);
                let Some(owner) = owner.upgrade() else { return };
                let done = {
                    let mut turn = entry.turn.lock().await;
                    turn.number = entry.begun.fetch_add(1, SeqCst) + 1;
                    let done = owner.show(&entry).await;
                    turn.failed = done.as_ref().err().cloned();
                    done
                };
                drop(permit);
                let gone = entry.is_left() || !owner.tails.entries.lock().contains_key(&entry.events);
                match done {
                    Ok(missed) => {
                        owner.topology.metrics.redis_repairs.add(missed.into());
                        pause = PAUSE;
                    }
                    Err(_) if gone => entry.again.store(false, SeqCst),
                    Err(error) => {
                        tracing::debug!(channel = %entry.channel, %error, "cannot look at a log yet");
                        entry.again.store(true, SeqCst);
                        drop(owner);
                        sleep(pause.mul_f64(0.5 + fastrand::f64())).await;
                        pause = (pause * 2).min(LONGEST_PAUSE);
                    }
                }
                if !entry.again.load(SeqCst) {
                    entry.repairing.store(false, SeqCst);
                    // Somebody may have come between the two.
                    if !entry.again.load(SeqCst) || entry.repairing.swap(true, SeqCst) {
                        return;
                    }
                }
            }
        });
    }

    /// Fetches what is older than the ring, for all who wait for it, until nobody does.
    async fn fetch(self: Arc<Self>, entry: Arc<Entry>) {
        let topic = entry.topic.lock().clone();
        let mut pause = PAUSE;
        loop {
            let Some(position) = topic.lock().next_wanted() else { return };
            let done = {
                let _turn = entry.turn.lock().await;
                self.fetch_after(&entry, &topic, position).await
            };
            match done {
                Ok(true) => {
                    pause = PAUSE;
                    continue;
                }
                Ok(false) => {}
                Err(error) => tracing::debug!(channel = %entry.channel, %error, "cannot read what is older yet"),
            }
            sleep(pause.mul_f64(0.5 + fastrand::f64())).await;
            pause = (pause * 2).min(LONGEST_PAUSE);
        }
    }

    /// Whether somebody was served.
    async fn fetch_after(&self, entry: &Entry, topic: &Topic, position: Position) -> Result<bool> {
        let keep = self.keep_of(&entry.channel).await.map_err(failed)?;
        let mut look = self.look(&entry.keys, &keep, Start::After(position), PAGE).await?;
        let (next, gap) = look.bounds.resolve(&entry.channel, Start::After(position), look.now);
        let mut events = std::mem::take(&mut look.events);
        if gap.is_none() && !look.bounds.is_absent() {
            match events.first() {
                Some(first) if first.offset == next.offset + 1 => {}
                // What should be there is not: the stream was deleted, or cut, by somebody else.
                Some(first) => look.bounds.first = first.offset,
                None => look.bounds.first = look.bounds.top + 1,
            }
        }
        let mut at = events.first().map_or(0, |event| event.offset);
        let epoch = events.first().map(|event| event.epoch);
        let whole = events.iter().take_while(|event| {
            at += 1;
            event.offset == at - 1 && Some(event.epoch) == epoch
        });
        let whole = whole.count();
        events.truncate(whole);
        let fetched = {
            let mut ring = topic.lock();
            let memory = ring.memory();
            let fetched = ring.add_older(&entry.channel, &look.bounds, events);
            self.topics.account(memory, ring.memory());
            fetched
        };
        match fetched {
            Some(parked) => {
                let served = !parked.is_empty();
                parked.wake();
                Ok(served)
            }
            // The log is another than the ring knows.
            None => self.show(entry).await.map(|_| true),
        }
    }

    /// What was placed from here, if it is read here and is the next.
    pub(super) fn hear_own(&self, events: &[u8], placed: Vec<(Draft, Placed)>) {
        let Some(entry) = self.tails.entry(events) else { return };
        let topic = entry.topic.lock().clone();
        let keep = self.keeps.max_with(*topic.retention(), &entry.channel);
        let parked = {
            let mut ring = topic.lock();
            let memory = ring.memory();
            let mut next = false;
            for (draft, placed) in placed.into_iter().filter(|(_, placed)| !placed.duplicate) {
                // If others come before it, it is heard of after them.
                next |= ring.apply_live(draft.place(placed.position, placed.time), &keep) == LiveOutcome::Next;
            }
            self.topics.account(memory, ring.memory());
            next.then(|| ring.take_parked())
        };
        if let Some(parked) = parked {
            parked.wake();
        }
    }

    /// If the channel is read here: returns when its ring knows of `position`.
    pub(super) async fn catch_up_with(&self, channel: &Channel, position: Position) {
        let Some(topic) = self.topics.get(channel) else { return };
        if topic.lock().bounds().knows(position) {
            return;
        }
        if let Some(entry) = self.tails.entry(&self.keys.channel(channel).events()) {
            // If this fails, the next to ask for it is told.
            let _ = self.sync(&entry).await;
        }
    }

    /// If the channel is read here: returns when its ring has been set right.
    pub(super) async fn refresh(&self, channel: &Channel) {
        if let Some(entry) = self.tails.entry(&self.keys.channel(channel).events()) {
            let _ = self.sync(&entry).await;
        }
    }

    // === looking after ===

    /// Looks at channels that have been silent, and lets go of those that nobody reads.
    pub(super) fn audit(self: &Arc<Self>) {
        let entries: Vec<Arc<Entry>> = self.tails.entries.lock().values().cloned().collect();
        for entry in entries {
            if entry.is_left() {
                self.let_go(&entry);
            } else if entry.heard.lock().elapsed() > AUDIT {
                // Not all of them at once the next time.
                *entry.heard.lock() = Instant::now() - AUDIT.mul_f64(fastrand::f64() / 4.0);
                self.repair(&entry);
                let (owner, entry) = (self.clone(), entry.clone());
                tokio::spawn(async move { owner.keep_alive(&entry).await });
            }
        }
    }

    pub(super) async fn audit_all(self: &Arc<Self>) {
        let entries: Vec<Arc<Entry>> = self.tails.entries.lock().values().cloned().collect();
        for entry in entries {
            self.keep_alive(&entry).await;
            let _ = self.sync(&entry).await;
        }
    }

    /// A log with readers is not idle, however long nobody writes.
    async fn keep_alive(&self, entry: &Entry) {
        let topic = entry.topic.lock().clone();
        let now = self.topics.now();
        // Well before it would be taken for idle, and not much more often.
        let Ok(keep) = self.keep_of(&entry.channel).await else { return };
        let often = (keep.age.as_millis() as u64 / 4).clamp(AUDIT.as_millis() as u64 / 2, 3_600_000);
        let absent = topic.lock().epoch().is_absent();
        if absent || now.saturating_sub(entry.touched.load(SeqCst)) < often {
            return;
        }
        if self.touch(&entry.keys, &keep).await.is_ok() {
            entry.touched.store(now, SeqCst);
        }
    }

    fn let_go(&self, entry: &Arc<Entry>) {
        let mut entries = self.tails.entries.lock();
        let left = entry.left.lock().is_some_and(|left| left.elapsed() > LINGER);
        if left && entry.guard.lock().strong_count() == 0 && self.pubsub.unsubscribe(&entry.events) {
            entries.remove(&entry.events);
            let topic = entry.topic.lock().clone();
            topic.lock().set_tailed(false);
        }
    }
}

impl Entry {
    fn is_left(&self) -> bool {
        self.left.lock().is_some() && self.guard.lock().strong_count() == 0
    }
}

// === impl Guard ===

impl Backfill for Guard {
    fn fetch(&self) {
        if let Some(owner) = self.owner.upgrade() {
            tokio::spawn(owner.fetch(self.entry.clone()));
        }
    }
}

impl Drop for Guard {
    fn drop(&mut self) {
        *self.entry.left.lock() = Some(Instant::now());
    }
}

// === impl Tails ===

impl PubSubHandler for Tails {
    fn heard(&self, channel: &Bytes, message: Bytes) {
        let Some(owner) = self.owner() else { return };
        let Some(entry) = self.entry(channel) else {
            owner.echo(channel);
            return;
        };
        *entry.heard.lock() = Instant::now();
        if let Some(at) = position(&message) {
            // Most of what is published here has been heard of by then.
            let topic = entry.topic.lock().clone();
            let ring = topic.lock();
            if ring.epoch() == at.epoch && at.offset <= ring.top() {
                return;
            }
        }
        let events = match EventMessage::read(&message) {
            EventMessage::Events(events) => events,
            EventMessage::Changed => return owner.repair(&entry),
            EventMessage::Unknown => {
                owner.topology.metrics.redis_unreadable.add(1);
                // Whatever it says, the log knows better.
                return owner.repair(&entry);
            }
        };
        if let Some(newest) = events.last() {
            let lag = owner.topics.now().saturating_sub(newest.time);
            owner.topology.metrics.redis_lag_seconds.record(Duration::from_millis(lag));
        }
        let topic = entry.topic.lock().clone();
        let keep = owner.keeps.max_with(*topic.retention(), &entry.channel);
        let (parked, beyond) = {
            let mut ring = topic.lock();
            let memory = ring.memory();
            let (mut next, mut beyond) = (false, false);
            for event in events {
                match ring.apply_live(event, &keep) {
                    LiveOutcome::Next => next = true,
                    LiveOutcome::Old => {}
                    LiveOutcome::Beyond => beyond = true,
                }
            }
            owner.topics.account(memory, ring.memory());
            (next.then(|| ring.take_parked()), beyond)
        };
        if let Some(parked) = parked {
            parked.wake();
        }
        if beyond {
            owner.repair(&entry);
        }
    }

    fn subscribed(&self, channel: &Bytes) {
        let (Some(owner), Some(entry)) = (self.owner(), self.entry(channel)) else { return };
        // What was published before this is not going to be heard.
        if entry.begun.load(SeqCst) > 0 {
            owner.repair(&entry);
        }
        entry.subscribed.notify_waiters();
    }
}
