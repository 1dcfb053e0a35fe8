//! [`Tails`]: the channels that are read on this node. A message goes straight into the ring of its channel; what may
//! have been missed is read from the log, once for all readers.
//!
//! Snapshots of a channel are taken one at a time and applied in that order. Tasks that need the ring to be as the log
//! was at some moment share the first snapshot that begins after it.

use std::{
    collections::HashMap,
    sync::{
        Arc, Weak,
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
    context::LogContext,
    keys::ChannelKeys,
    probe::Probes,
    read::LogReader,
    retention::RetentionRules,
    wire::{EventMessage, LogSnapshot, position},
};
use crate::{
    backend::redis::client::{PubSub, PubSubHandler, deadline},
    bus::{Backfill, LiveOutcome, Placed, ReadLimit, Tail, Topic},
    channel::Channel,
    error::{Code, Error, Result},
    event::{Draft, Event},
    metrics::RedisConnectionKind,
    position::{Position, Start},
};

/// Rings that are resynchronised at a time: after a break all of them need it.
const RESYNCS: usize = 64;
/// The back-off between attempts, at first and at most.
const PAUSE: Duration = Duration::from_millis(100);
const LONGEST_PAUSE: Duration = Duration::from_secs(2);
/// A channel without messages for this long is compared with its log.
const AUDIT: Duration = Duration::from_secs(30);
/// A channel without readers stays subscribed for this long: readers come back.
const LINGER: Duration = Duration::from_secs(10);
/// Limits of a read for a ring.
const WINDOW: ReadLimit = ReadLimit { events: 256, bytes: 64 << 10 };
/// Limits of a read for readers behind the ring.
const PAGE: ReadLimit = ReadLimit { events: 1024, bytes: 256 << 10 };

pub(super) struct Tails {
    me: Weak<Tails>,
    context: Arc<LogContext>,
    reader: Arc<LogReader>,
    retention: Arc<RetentionRules>,
    pub(super) pubsub: Arc<PubSub>,
    channels: Mutex<HashMap<Bytes, Arc<TailedChannel>>>,
    resyncs: Arc<Semaphore>,
}

/// A channel that has readers on this node, or had a moment ago.
struct TailedChannel {
    channel: Channel,
    keys: ChannelKeys,
    events: Bytes,
    /// The topic of the present readers.
    topic: Mutex<Arc<Topic>>,
    guard: Mutex<Weak<TailGuard>>,
    /// Since when it has no readers.
    left: Mutex<Option<Instant>>,
    subscribed: Notify,
    /// The number of snapshots begun.
    begun: AtomicU64,
    /// Held while a snapshot is taken and applied.
    last: tokio::sync::Mutex<LastSync>,
    /// A task resynchronises the ring...
    resyncing: AtomicBool,
    /// ...and there was another reason since its snapshot began.
    again: AtomicBool,
    last_message: Mutex<Instant>,
    /// When the log was last marked as read, Unix milliseconds.
    touched: AtomicU64,
}

/// How the last snapshot ended.
#[derive(Default)]
struct LastSync {
    number: u64,
    error: Option<Error>,
}

/// Held by the readers of a channel.
struct TailGuard {
    tails: Weak<Tails>,
    channel: Arc<TailedChannel>,
}

struct EventHandler {
    tails: Weak<Tails>,
    probes: Arc<Probes>,
}

impl Tails {
    pub(super) fn start(
        context: Arc<LogContext>,
        reader: Arc<LogReader>,
        retention: Arc<RetentionRules>,
        probes: Arc<Probes>,
    ) -> Arc<Self> {
        Arc::new_cyclic(|me| {
            let handler = Arc::new(EventHandler { tails: me.clone(), probes });
            let pubsub = PubSub::start(context.topology.clone(), RedisConnectionKind::Events, handler);
            let resyncs = Arc::new(Semaphore::new(RESYNCS));
            Tails { me: me.clone(), context, reader, retention, pubsub, channels: Mutex::default(), resyncs }
        })
    }

    /// Subscribes to the channel of a topic, and fills its ring.
    pub(super) async fn tail(&self, topic: &Arc<Topic>) -> Result<Tail> {
        let keys = self.context.keys.channel(topic.channel());
        let events = keys.events();
        let guard = {
            let mut channels = self.channels.lock();
            let channel = channels
                .entry(events.clone())
                .or_insert_with(|| Arc::new(TailedChannel::new(topic, keys, events.clone())));
            *channel.topic.lock() = topic.clone();
            topic.lock().window();
            *channel.left.lock() = None;
            let mut guard = channel.guard.lock();
            guard.upgrade().unwrap_or_else(|| {
                let new = Arc::new(TailGuard { tails: self.me.clone(), channel: channel.clone() });
                *guard = Arc::downgrade(&new);
                new
            })
        };
        self.pubsub.subscribe(events.clone());
        let deadline = deadline();
        loop {
            let subscribed = guard.channel.subscribed.notified();
            tokio::pin!(subscribed);
            // Registered before the check, so that a confirmation between the two is not missed.
            subscribed.as_mut().enable();
            if self.pubsub.is_subscribed(&events) {
                break;
            }
            if timeout_at(deadline, subscribed).await.is_err() {
                return Err(Error::new(Code::BusUnavailable, "Redis cannot be reached now"));
            }
        }
        self.sync(&guard.channel).await?;
        Ok(Tail(Some(guard)))
    }

    /// Completes when the ring is as the log was at some moment after the call, or later.
    async fn sync(&self, channel: &TailedChannel) -> Result<()> {
        let before = channel.begun.load(SeqCst);
        let mut last = channel.last.lock().await;
        if last.number > before {
            return last.error.clone().map_or(Ok(()), Err);
        }
        self.sync_now(channel, &mut last).await.map(drop)
    }

    /// Takes a snapshot and applies it. True if messages had been missed.
    async fn sync_now(&self, channel: &TailedChannel, last: &mut LastSync) -> Result<bool> {
        last.number = channel.begun.fetch_add(1, SeqCst) + 1;
        let result = self.apply_snapshot(channel).await;
        last.error = result.as_ref().err().cloned();
        result
    }

    /// Only while `last` of the channel is locked.
    async fn apply_snapshot(&self, channel: &TailedChannel) -> Result<bool> {
        let topic = channel.topic.lock().clone();
        let (epoch, top) = {
            let ring = topic.lock();
            (ring.epoch(), ring.top())
        };
        let keep = self.retention.for_read(&channel.channel).await?;
        let newest = Start::Last(WINDOW.events as u64);
        let start = if epoch.is_absent() { newest } else { Start::After(Position { epoch, offset: top }) };
        let mut snapshot = self.reader.snapshot(&channel.keys, &keep, start, WINDOW).await?;
        if snapshot.bounds.top > top
            && snapshot.events.last().is_none_or(|event| event.offset < snapshot.bounds.top)
            && start != newest
        {
            // The ring is too far behind: it begins again with the newest events.
            snapshot = self.reader.snapshot(&channel.keys, &keep, newest, WINDOW).await?;
        }
        let LogSnapshot { bounds, mut events, .. } = snapshot;
        events.retain(|event| event.epoch == bounds.epoch);
        let missed = !bounds.is_absent() && (bounds.epoch, bounds.top) != (epoch, top);
        let (parked, missed) = {
            let mut buffer = topic.edit();
            let window = buffer.window();
            let before = (window.epoch(), window.top());
            let parked = window.apply_snapshot(&channel.channel, &keep, bounds, events);
            (parked, missed && (window.epoch(), window.top()) != before)
        };
        parked.wake();
        Ok(missed)
    }

    /// Has the ring synchronised soon, by the task that does so already or by a new one.
    fn resync(&self, channel: &Arc<TailedChannel>) {
        channel.again.store(true, SeqCst);
        if channel.resyncing.swap(true, SeqCst) {
            return;
        }
        let (tails, channel, permits) = (self.me.clone(), channel.clone(), self.resyncs.clone());
        tokio::spawn(async move {
            let mut pause = PAUSE;
            loop {
                // Reset only after the wait for a permit: the snapshot that follows covers the reasons until then.
                let Ok(permit) = permits.acquire().await else { return };
                channel.again.store(false, SeqCst);
                let Some(tails) = tails.upgrade() else { return };
                let result = tails.sync_now(&channel, &mut *channel.last.lock().await).await;
                drop(permit);
                let gone = channel.is_left() || !tails.channels.lock().contains_key(&channel.events);
                match result {
                    Ok(missed) => {
                        tails.context.topology.metrics.redis_repairs.add(missed.into());
                        pause = PAUSE;
                    }
                    Err(_) if gone => channel.again.store(false, SeqCst),
                    Err(error) => {
                        tracing::debug!(channel = %channel.channel, %error, "cannot read a log yet");
                        channel.again.store(true, SeqCst);
                        drop(tails);
                        back_off(&mut pause).await;
                    }
                }
                if !channel.again.load(SeqCst) {
                    channel.resyncing.store(false, SeqCst);
                    // Another reason may have come between the two.
                    if !channel.again.load(SeqCst) || channel.resyncing.swap(true, SeqCst) {
                        return;
                    }
                }
            }
        });
    }

    /// Reads events that are older than the ring, for all readers that wait for them, until none does.
    async fn fetch(self: Arc<Self>, channel: Arc<TailedChannel>) {
        let topic = channel.topic.lock().clone();
        let mut pause = PAUSE;
        loop {
            let Some(position) = topic.edit().window().next_wanted() else { return };
            let result = {
                let _last = channel.last.lock().await;
                self.fetch_after(&channel, &topic, position).await
            };
            match result {
                Ok(true) => {
                    pause = PAUSE;
                    continue;
                }
                Ok(false) => {}
                Err(error) => tracing::debug!(channel = %channel.channel, %error, "cannot read older events yet"),
            }
            back_off(&mut pause).await;
        }
    }

    /// True if a reader has received events.
    async fn fetch_after(&self, channel: &TailedChannel, topic: &Topic, position: Position) -> Result<bool> {
        let keep = self.retention.for_read(&channel.channel).await?;
        let mut snapshot = self.reader.snapshot(&channel.keys, &keep, Start::After(position), PAGE).await?;
        let (next, gap) = snapshot.bounds.resolve(&channel.channel, Start::After(position), snapshot.now);
        let mut events = std::mem::take(&mut snapshot.events);
        if gap.is_none() && !snapshot.bounds.is_absent() {
            match events.first() {
                Some(first) if first.offset == next.offset + 1 => {}
                // The event that must follow is missing: something else deleted or trimmed the stream.
                Some(first) => snapshot.bounds.first = first.offset,
                None => snapshot.bounds.first = snapshot.bounds.top + 1,
            }
        }
        let contiguous = events.chunk_by(|one, next| next.offset == one.offset + 1 && next.epoch == one.epoch).next();
        events.truncate(contiguous.map_or(0, <[_]>::len));
        let fetched = topic.edit().window().add_older(&channel.channel, &snapshot.bounds, events);
        match fetched {
            Some(parked) => {
                let served = !parked.is_empty();
                parked.wake();
                Ok(served)
            }
            // The log differs from what the ring knows.
            None => self.apply_snapshot(channel).await.map(|_| true),
        }
    }

    /// Applies events that this node has placed, if the channel has readers here.
    pub(super) fn apply_own(&self, events: &[u8], placed: Vec<(Draft, Placed)>) {
        let Some(channel) = self.get(events) else { return };
        let placed = placed.into_iter().filter(|(_, placed)| !placed.duplicate);
        // Events that others have placed before come as messages, and these again behind them.
        let _ = self.apply_live(&channel, placed.map(|(draft, placed)| draft.place(placed.position, placed.time)));
    }

    /// Applies new events in their order. False if there is a gap before one of them.
    fn apply_live(&self, channel: &TailedChannel, events: impl Iterator<Item = Event>) -> bool {
        let topic = channel.topic.lock().clone();
        let keep = self.retention.max_with(*topic.retention(), &channel.channel);
        let (parked, beyond) = {
            let mut buffer = topic.edit();
            let window = buffer.window();
            let (mut next, mut beyond) = (false, false);
            for event in events {
                match window.apply_live(event, &keep) {
                    LiveOutcome::Appended => next = true,
                    LiveOutcome::Known => {}
                    LiveOutcome::OutOfSequence => beyond = true,
                }
            }
            (next.then(|| window.take_parked()), beyond)
        };
        if let Some(parked) = parked {
            parked.wake();
        }
        !beyond
    }

    fn on_message(&self, channel: &Arc<TailedChannel>, message: &[u8]) {
        *channel.last_message.lock() = Instant::now();
        if let Some(at) = position(message) {
            // Most events of this node have been applied by now.
            let topic = channel.topic.lock().clone();
            let ring = topic.lock();
            if ring.epoch() == at.epoch && at.offset <= ring.top() {
                return;
            }
        }
        let events = match EventMessage::parse(message) {
            EventMessage::Events(events) => events,
            EventMessage::Changed => return self.resync(channel),
            EventMessage::Unknown => {
                self.context.topology.metrics.redis_unreadable.add(1);
                return self.resync(channel);
            }
        };
        if let Some(newest) = events.last() {
            let lag = self.context.topics.now().saturating_sub(newest.time);
            self.context.topology.metrics.redis_lag_seconds.record(Duration::from_millis(lag));
        }
        if !self.apply_live(channel, events.into_iter()) {
            self.resync(channel);
        }
    }

    /// If the channel has readers here: completes when its ring knows of `position`.
    pub(super) async fn catch_up_with(&self, channel: &Channel, position: Position) {
        let Some(topic) = self.context.topics.get(channel) else { return };
        if topic.lock().bounds().covers(position) {
            return;
        }
        self.refresh(channel).await;
    }

    /// If the channel has readers here: completes when its ring has been synchronised. An error is ignored: the next
    /// task that needs the ring gets it.
    pub(super) async fn refresh(&self, channel: &Channel) {
        if let Some(channel) = self.get(&self.context.keys.channel(channel).events()) {
            let _ = self.sync(&channel).await;
        }
    }

    fn get(&self, events: &[u8]) -> Option<Arc<TailedChannel>> {
        self.channels.lock().get(events).cloned()
    }

    // === maintenance ===

    /// Compares channels without messages with their logs, and unsubscribes from channels without readers.
    pub(super) fn audit(&self) {
        let channels: Vec<_> = self.channels.lock().values().cloned().collect();
        for channel in channels {
            if channel.is_left() {
                self.unsubscribe(&channel);
            } else if channel.last_message.lock().elapsed() > AUDIT {
                // Spread, so that the next audits are not all at the same time.
                *channel.last_message.lock() = Instant::now() - AUDIT.mul_f64(fastrand::f64() / 4.0);
                self.resync(&channel);
                let Some(tails) = self.me.upgrade() else { return };
                tokio::spawn(async move { tails.keep_alive(&channel).await });
            }
        }
    }

    /// Audits every channel now, and waits for it.
    pub(super) async fn audit_all(&self) {
        let channels: Vec<_> = self.channels.lock().values().cloned().collect();
        for channel in channels {
            self.keep_alive(&channel).await;
            let _ = self.sync(&channel).await;
        }
    }

    /// Marks a log as read, so that it does not expire, however long nothing is published.
    async fn keep_alive(&self, channel: &TailedChannel) {
        let topic = channel.topic.lock().clone();
        let now = self.context.topics.now();
        let Ok(keep) = self.retention.for_write(&channel.channel, deadline()).await else { return };
        // Well before the log would expire, and not much more often.
        let often = (keep.age.as_millis() as u64 / 4).clamp(AUDIT.as_millis() as u64 / 2, 3_600_000);
        let absent = topic.lock().epoch().is_absent();
        if absent || now.saturating_sub(channel.touched.load(SeqCst)) < often {
            return;
        }
        if self.reader.touch(&channel.keys, &keep).await.is_ok() {
            channel.touched.store(now, SeqCst);
        }
    }

    fn unsubscribe(&self, channel: &TailedChannel) {
        let mut channels = self.channels.lock();
        let left = channel.left.lock().is_some_and(|left| left.elapsed() > LINGER);
        if left && channel.guard.lock().strong_count() == 0 && self.pubsub.unsubscribe(&channel.events) {
            channels.remove(&channel.events);
        }
    }
}

async fn back_off(pause: &mut Duration) {
    sleep(pause.mul_f64(0.5 + fastrand::f64())).await;
    *pause = (*pause * 2).min(LONGEST_PAUSE);
}

impl TailedChannel {
    fn new(topic: &Arc<Topic>, keys: ChannelKeys, events: Bytes) -> Self {
        TailedChannel {
            channel: topic.channel().clone(),
            keys,
            events,
            topic: Mutex::new(topic.clone()),
            guard: Mutex::default(),
            left: Mutex::default(),
            subscribed: Notify::new(),
            begun: AtomicU64::new(0),
            last: tokio::sync::Mutex::default(),
            resyncing: AtomicBool::new(false),
            again: AtomicBool::new(false),
            last_message: Mutex::new(Instant::now()),
            touched: AtomicU64::new(0),
        }
    }

    fn is_left(&self) -> bool {
        self.left.lock().is_some() && self.guard.lock().strong_count() == 0
    }
}

// === impl TailGuard ===

impl Backfill for TailGuard {
    fn fetch(&self) {
        if let Some(tails) = self.tails.upgrade() {
            tokio::spawn(tails.fetch(self.channel.clone()));
        }
    }
}

impl Drop for TailGuard {
    fn drop(&mut self) {
        *self.channel.left.lock() = Some(Instant::now());
    }
}

// === impl EventHandler ===

impl PubSubHandler for EventHandler {
    fn on_message(&self, channel: &[u8], message: Bytes) {
        let Some(tails) = self.tails.upgrade() else { return };
        match tails.get(channel) {
            Some(channel) => tails.on_message(&channel, &message),
            None => self.probes.on_message(channel),
        }
    }

    fn on_subscribed(&self, channel: &[u8]) {
        let Some(tails) = self.tails.upgrade() else { return };
        let Some(channel) = tails.get(channel) else { return };
        // Messages from before the subscription do not come.
        if channel.begun.load(SeqCst) > 0 {
            tails.resync(&channel);
        }
        channel.subscribed.notify_waiters();
    }
}
