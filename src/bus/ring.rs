//! [`Ring`]: the newest events of one channel in use, with its readers' parking and their shared frames.
//!
//! One synchronous type, always behind its topic's lock. A backend fills it; readers only touch the ring. In the
//! memory backend the ring *is* the log; elsewhere it is a [window](super::window) on the log's newest events.

use std::{
    collections::{HashMap, VecDeque},
    sync::Arc,
    time::Duration,
};

use bytes::Bytes;
use slab::Slab;

use super::{
    filter::Filter,
    format::Format,
    log::{Gap, GapReason, LogPage, Placed, ReadLimit},
    log_bounds::{LogBounds, PreviousLife},
    subscription::{Inbox, Ticket, WakeList},
    window::Window,
};
use crate::{
    channel::Channel,
    error::{Code, Error, Result},
    event::{Draft, Event},
    position::{Epoch, Position, Start},
};

/// Marks the key of a reader that waits for older events.
pub(super) const OLDER: u32 = 1 << 31;
/// What an event costs beside its encoded body: its header, two reference counts, its place in the queue.
pub(super) const EVENT_COST: usize = 96;
/// A reader gets at most so much at once, so that nobody waits for one who is far behind.
const TURN_BYTES: usize = 16 * 1024;
pub(super) const TURN_EVENTS: usize = 64;
/// A filtered reader looks at most at so many events at once.
const TURN_SCAN: usize = 512;
/// Shared frames and batches that are remembered; of all but the newest, so many bytes at most.
const FRAMES: usize = 16;
const FRAME_BYTES: usize = 256 * 1024;
/// What an idempotency key costs: its place in the table, which is at most half empty, and in the order.
const KEY_COST: usize = 128;

/// How much of a channel is kept. All three bounds hold, but that the newest event stays, whatever its size, until it
/// is too old.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Retention {
    pub count: usize,
    pub age: Duration,
    pub bytes: usize,
}

pub struct Ring {
    pub(super) bounds: LogBounds,
    /// The newest of the log: all of it, unless this is a window.
    pub(super) events: VecDeque<Arc<Event>>,
    pub(super) bytes: usize,
    /// Where the log itself is elsewhere.
    pub(super) window: Option<Box<Window>>,
    /// Subscriptions, parked or not.
    readers: u32,
    /// Readers that have seen everything. A ticket is good for one round: an append takes all of them.
    parked: Slab<Ticket>,
    round: u32,
    pub(super) frames: VecDeque<Frame>,
    keys: Option<Box<Keys>>,
    /// Nobody will look here again: the topic has left the table.
    pub(super) retired: bool,
}

/// Encoded once, given to every reader that needs the same.
pub(super) struct Frame {
    format: &'static Format,
    from: u64,
    to: u64,
    bytes: Bytes,
}

/// Idempotency keys that were used lately.
#[derive(Default)]
struct Keys {
    used: HashMap<Key, Used, foldhash::fast::RandomState>,
    order: VecDeque<(u64, Key)>,
}

/// A hash of (subject, key): 64 bits of a keyed hash nobody outside knows, so that nobody can make two keys meet.
type Key = u64;

struct Used {
    body: u64,
    placed: Placed,
}

/// How long idempotency keys are kept, and how many.
#[derive(Clone, Copy, Debug)]
pub struct KeyLimits {
    pub window: Duration,
    pub count: usize,
}

/// What a reader gets from one look.
pub(super) enum Step {
    Events {
        bytes: Bytes,
        count: u32,
    },
    Gap(Gap),
    /// It must be fetched from the log first.
    Older,
    /// Nothing shown, but there is more to look at.
    Scanned,
    Nothing,
}

/// Where a parked reader is to be found.
#[derive(Clone, Copy, Debug)]
pub(super) struct Parking {
    pub key: u32,
    pub round: u32,
}

impl Ring {
    pub(super) fn new(absent: u64, past: Option<PreviousLife>) -> Self {
        Ring {
            bounds: LogBounds::absent(absent, past),
            events: VecDeque::new(),
            bytes: 0,
            window: None,
            readers: 0,
            parked: Slab::new(),
            round: 0,
            frames: VecDeque::new(),
            keys: None,
            retired: false,
        }
    }

    pub(super) fn is_window(&self) -> bool {
        self.window.is_some()
    }

    /// What to take for the time of day: here and where the log is, it may differ. A position of a channel without a log
    /// says since when it is known; that an older one says the same costs nothing.
    pub(super) fn clock(&self, now: u64) -> u64 {
        if self.is_window() { self.bounds.time } else { now }
    }

    pub fn bounds(&self) -> &LogBounds {
        &self.bounds
    }

    pub fn epoch(&self) -> Epoch {
        self.bounds.epoch
    }

    /// Oldest offset that can be read.
    pub fn first(&self) -> u64 {
        self.bounds.first
    }

    /// Offset of the newest event ever placed in this life; 0 if there was none.
    pub fn top(&self) -> u64 {
        self.bounds.top
    }

    /// Offset of `events[0]`, or of the next event if there is none.
    pub(super) fn start(&self) -> u64 {
        self.bounds.top + 1 - self.events.len() as u64
    }

    /// Memory of the events kept.
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// Memory of all that the budget has to know: the events, and the keys, which outlive them.
    pub fn memory(&self) -> usize {
        let older = self.window.as_ref().map_or(0, |window| window.bytes());
        self.bytes + older + self.keys.as_ref().map_or(0, |keys| keys.order.len() * KEY_COST)
    }

    pub fn time(&self) -> Option<u64> {
        (self.bounds.time > 0).then_some(self.bounds.time)
    }

    pub fn readers(&self) -> u32 {
        self.readers
    }

    #[cfg(test)]
    pub(super) fn parked(&self) -> usize {
        self.parked.len() + self.window.as_ref().map_or(0, |window| window.waiting())
    }

    pub(super) fn past(&self) -> Option<PreviousLife> {
        match self.bounds.is_absent() {
            true => self.bounds.previous,
            false => Some(PreviousLife { epoch: self.epoch(), top: self.top(), reason: GapReason::Reset }),
        }
    }

    /// From which second on there is no log, if this life ends now.
    pub(super) fn end(&self, now: u64) -> u64 {
        let LogBounds { absent_since: absent, born, .. } = self.bounds;
        match self.bounds.is_absent() {
            true => absent,
            // A position of this very second may be older than the end.
            false => absent.max(born).max(now / 1000) + 1,
        }
    }

    /// Unix milliseconds of the oldest event.
    pub(super) fn oldest(&self) -> Option<u64> {
        self.events.front().map(|event| event.time)
    }

    // === filling ===

    /// Places drafts, all or none. Returns where, and how much memory the ring grew (or shrank).
    ///
    /// The caller wakes the [`take_parked`](Self::take_parked) afterwards, outside the lock.
    pub fn append(
        &mut self,
        channel: &Channel,
        subject: &str,
        drafts: Vec<Draft>,
        keep: &Retention,
        limits: &KeyLimits,
        now: u64,
    ) -> Result<Vec<Placed>> {
        self.check_keys(channel, subject, &drafts)?;
        self.begin(now);
        let time = self.bounds.time.max(now);
        let mut placed = Vec::with_capacity(drafts.len());
        for mut draft in drafts {
            let key = draft.key.take().map(|key| (hash_key(subject, &key), draft.body.fingerprint()));
            if let Some((key, _)) = key
                && let Some(used) = self.keys.as_ref().and_then(|keys| keys.used.get(&key))
            {
                placed.push(Placed { duplicate: true, ..used.placed });
                continue;
            }
            let position = Position { epoch: self.epoch(), offset: self.top() + 1 };
            let here = Placed { position, time, duplicate: false };
            if let Some((key, body)) = key {
                let keys = self.keys.get_or_insert_default();
                keys.used.insert(key, Used { body, placed: here });
                keys.order.push_back((now, key));
            }
            self.place(draft, position, time);
            placed.push(here);
        }
        self.expire_keys(limits, now);
        self.trim(keep, now);
        Ok(placed)
    }

    /// Begins a life, if there is none.
    fn begin(&mut self, now: u64) {
        if self.bounds.is_absent() {
            let LogBounds { absent_since: absent, time, previous: past, .. } = self.bounds;
            let born = absent.max(now / 1000);
            self.bounds = LogBounds { epoch: Epoch::random(), born, time, ..LogBounds::absent(absent, past) };
        }
    }

    fn place(&mut self, draft: Draft, position: Position, time: u64) {
        (self.bounds.time, self.bounds.top) = (time, position.offset);
        self.bytes += draft.size() + EVENT_COST;
        self.events.push_back(Arc::new(draft.place(position, time)));
    }

    /// The whole batch is checked before the first write: a repeat with another body changes nothing.
    fn check_keys(&self, channel: &Channel, subject: &str, drafts: &[Draft]) -> Result<()> {
        if drafts.iter().all(|draft| draft.key.is_none()) {
            return Ok(());
        }
        let mut mine: HashMap<Key, u64> = HashMap::new();
        for draft in drafts {
            let Some(key) = &draft.key else { continue };
            let (hash, body) = (hash_key(subject, key), draft.body.fingerprint());
            let known = self.keys.as_ref().and_then(|keys| keys.used.get(&hash)).map(|used| used.body);
            if known.or(mine.insert(hash, body)).is_some_and(|known| known != body) {
                return Err(Error::new(
                    Code::KeyReused,
                    format!("the key {key:?} was used for another event of channel {channel}"),
                ));
            }
        }
        Ok(())
    }

    pub(super) fn expire_keys(&mut self, limits: &KeyLimits, now: u64) {
        let Some(keys) = &mut self.keys else { return };
        let old = now.saturating_sub(limits.window.as_millis() as u64);
        while keys.order.len() > limits.count || keys.order.front().is_some_and(|(used, _)| *used < old) {
            if let Some((_, key)) = keys.order.pop_front() {
                keys.used.remove(&key);
            }
        }
        if keys.order.is_empty() {
            self.keys = None;
        }
    }

    /// Lets go of what retention no longer keeps.
    pub(super) fn trim(&mut self, keep: &Retention, now: u64) {
        if self.window.is_some() {
            // What is kept is decided where the log is.
            return;
        }
        let old = now.saturating_sub(keep.age.as_millis() as u64);
        while self.events.len() > 1 && (self.events.len() > keep.count || self.bytes > keep.bytes) {
            self.drop_oldest(GapReason::Trimmed);
        }
        while self.oldest().is_some_and(|time| time < old) {
            self.drop_oldest(GapReason::Trimmed);
        }
    }

    /// Lets go of the older half, for the memory budget.
    pub(super) fn relieve(&mut self) {
        for _ in 0..self.events.len().div_ceil(2) {
            self.drop_oldest(GapReason::Budget);
        }
        self.frames.clear();
    }

    fn drop_oldest(&mut self, reason: GapReason) {
        if let Some(event) = self.events.pop_front() {
            self.bounds.first += 1;
            self.bytes -= event.size() + EVENT_COST;
            self.bounds.trim_reason = reason;
        }
        if self.events.is_empty() {
            self.events = VecDeque::new();
        }
    }

    /// Removes the events before `before`.
    pub fn trim_before(&mut self, before: Position) -> Result<()> {
        if before.epoch != self.epoch() || before.offset > self.top() + 1 {
            return Err(Error::new(Code::InvalidPosition, "before is a position in the channel as it is now"));
        }
        while self.first() < before.offset {
            self.drop_oldest(GapReason::Deleted);
        }
        self.frames.clear();
        Ok(())
    }

    /// Ends this life of the channel: the next event begins another. Readers stay.
    pub fn delete(&mut self, now: u64) {
        if self.bounds.is_absent() {
            return;
        }
        let past = PreviousLife { epoch: self.epoch(), top: self.top(), reason: GapReason::Deleted };
        let (readers, round, time) = (self.readers, self.round, self.bounds.time);
        let parked = std::mem::take(&mut self.parked);
        *self = Ring { readers, round, parked, ..Ring::new(self.end(now), Some(past)) };
        self.bounds.time = time;
    }

    // === reading ===

    /// A page for somebody who does not stay.
    pub fn page(&self, channel: &Channel, start: Start, limit: ReadLimit, now: u64) -> LogPage {
        let (mut next, gap) = self.bounds.resolve(channel, start, now);
        let mut events = Vec::new();
        if !self.bounds.is_absent() {
            let mut bytes = 0;
            for event in self.events.range((next.offset + 1 - self.start()) as usize..) {
                bytes += event.size() + channel.as_str().len() + EVENT_COST;
                if events.len() == limit.events || (bytes > limit.bytes && !events.is_empty()) {
                    break;
                }
                next.offset = event.offset;
                events.push(event.clone());
            }
        }
        let more = !self.bounds.is_absent() && next.offset < self.top();
        LogPage { events, next, more, gap }
    }

    /// What comes next for a reader at `position`, which moves: at most `turn` events.
    pub(super) fn step(
        &mut self,
        channel: &Channel,
        position: &mut Position,
        filter: Option<&Filter>,
        format: &'static Format,
        turn: usize,
    ) -> Step {
        if position.epoch != self.epoch() || position.offset + 1 < self.start() {
            let (at, gap) = self.bounds.resolve(channel, Start::After(*position), self.bounds.time);
            if let Some(gap) = gap {
                *position = at;
                return Step::Gap(gap);
            }
            if self.bounds.is_absent() {
                // The position is kept: it says what this reader has had when a new life begins.
                return Step::Nothing;
            }
            *position = at;
            if at.epoch != self.epoch() || at.offset + 1 < self.start() {
                return match self.window.as_ref().and_then(|window| window.older(at)) {
                    Some(_) => self.step_from(true, channel, position, filter, format, turn),
                    None => Step::Older,
                };
            }
        }
        if position.offset >= self.top() {
            return Step::Nothing;
        }
        self.step_from(false, channel, position, filter, format, turn)
    }

    /// What follows `position`, which has something behind it: in the ring, or among the older events that were fetched.
    fn step_from(
        &mut self,
        older: bool,
        channel: &Channel,
        position: &mut Position,
        filter: Option<&Filter>,
        format: &'static Format,
        turn: usize,
    ) -> Step {
        match filter {
            None => self.step_all(older, channel, position, format, turn),
            Some(filter) => self.step_some(older, channel, position, filter, format, turn),
        }
    }

    fn events(&self, older: bool) -> &VecDeque<Arc<Event>> {
        match &self.window {
            Some(window) if older => &window.events,
            _ => &self.events,
        }
    }

    /// The events after `offset`.
    fn events_after(&self, older: bool, offset: u64) -> impl Iterator<Item = &Arc<Event>> {
        let events = self.events(older);
        let first = events.front().map_or(offset + 1, |event| event.offset);
        events.range((offset + 1 - first) as usize..)
    }

    fn step_all(
        &mut self,
        older: bool,
        channel: &Channel,
        position: &mut Position,
        format: &'static Format,
        turn: usize,
    ) -> Step {
        let from = position.offset + 1;
        let (mut to, mut bytes) = (from - 1, 0);
        for event in self.events_after(older, position.offset).take(turn) {
            bytes += event.size() + EVENT_COST;
            if bytes > TURN_BYTES && to >= from {
                break;
            }
            to = event.offset;
        }
        position.offset = to;
        Step::Events { bytes: self.frame(older, channel, from, to, format), count: (to - from + 1) as u32 }
    }

    fn step_some(
        &mut self,
        older: bool,
        channel: &Channel,
        position: &mut Position,
        filter: &Filter,
        format: &'static Format,
        turn: usize,
    ) -> Step {
        let (mut shown, mut bytes) = (Vec::new(), 0);
        for event in self.events_after(older, position.offset).take(TURN_SCAN) {
            if filter.matches(event) {
                bytes += event.size() + EVENT_COST;
                if shown.len() == turn || (bytes > TURN_BYTES && !shown.is_empty()) {
                    break;
                }
                shown.push(event.clone());
            }
            position.offset = event.offset;
        }
        match shown.as_slice() {
            [] if position.offset == self.top() => Step::Nothing,
            [] => Step::Scanned,
            [one] => {
                let at = one.offset;
                Step::Events { bytes: self.frame(older, channel, at, at, format), count: 1 }
            }
            many => Step::Events { bytes: format.encode(channel, many), count: many.len() as u32 },
        }
    }

    /// The events `from..=to`, encoded; shared if anybody else may want the same.
    fn frame(&mut self, older: bool, channel: &Channel, from: u64, to: u64, format: &'static Format) -> Bytes {
        let known = |frame: &&Frame| (frame.to, frame.from) == (to, from) && std::ptr::eq(frame.format, format);
        if let Some(frame) = self.frames.iter().rev().find(known) {
            return frame.bytes.clone();
        }
        let count = (to - from + 1) as usize;
        let bytes = format.encode(channel, self.events_after(older, from - 1).take(count));
        if self.readers > 1 {
            // The budget does not know of them: a channel of large events must not keep all of them twice.
            let mut held: usize = self.frames.iter().map(|frame| frame.bytes.len()).sum();
            while self.frames.len() == FRAMES || held > FRAME_BYTES {
                let Some(oldest) = self.frames.pop_front() else { break };
                held -= oldest.bytes.len();
            }
            self.frames.push_back(Frame { format, from, to, bytes: bytes.clone() });
        }
        bytes
    }

    /// Whether somebody at `position` has something to read.
    pub(super) fn is_behind(&self, position: Position) -> bool {
        !self.bounds.is_absent() && (position.epoch != self.epoch() || position.offset < self.top())
    }

    // === waiting ===

    pub(super) fn join(&mut self) {
        self.readers += 1;
    }

    pub(super) fn leave(&mut self) {
        self.readers -= 1;
        if self.readers <= 1 {
            self.frames = VecDeque::new();
        }
    }

    /// Remembers to wake a reader that has seen everything.
    pub(super) fn park(&mut self, inbox: &Arc<Inbox>, slot: u32, life: u32) -> Parking {
        if self.parked.capacity() == 0 {
            // Most channels have one reader: a slab would begin with room for four.
            self.parked = Slab::with_capacity(1);
        }
        let key = self.parked.insert(Ticket { inbox: inbox.clone(), slot, life }) as u32;
        Parking { key, round: self.round }
    }

    /// False if an append has taken the ticket: then word is, or will be, in the inbox.
    pub(super) fn unpark(&mut self, parking: Parking) -> bool {
        if parking.key & OLDER != 0 {
            return self.window.as_mut().is_some_and(|window| window.unpark(parking));
        }
        parking.round == self.round && self.parked.try_remove(parking.key as usize).is_some()
    }

    /// Everybody to wake after an append, outside the lock.
    pub fn take_parked(&mut self) -> WakeList {
        self.round = self.round.wrapping_add(1);
        let room = Slab::with_capacity(if self.parked.len() > 1 { self.parked.len() } else { 0 });
        WakeList(std::mem::replace(&mut self.parked, room))
    }

    /// Gives back what only a busy channel needs.
    pub(super) fn cool(&mut self) {
        if !self.frames.is_empty() {
            self.frames = VecDeque::new();
        }
        if let Some(window) = &mut self.window {
            window.cool();
        }
        if self.events.capacity() > 64 && self.events.capacity() > self.events.len() * 4 {
            self.events.shrink_to_fit();
        }
    }

    /// Nothing is here that anybody could miss.
    pub(super) fn is_idle(&self) -> bool {
        match &self.window {
            // The log is elsewhere.
            Some(window) => self.readers == 0 && !window.tailed,
            None => self.events.is_empty() && self.readers == 0 && self.keys.is_none(),
        }
    }
}

fn hash_key(subject: &str, key: &str) -> Key {
    use std::{hash::BuildHasher, sync::LazyLock};
    static STATE: LazyLock<foldhash::quality::RandomState> = LazyLock::new(Default::default);
    STATE.hash_one((subject, key))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::event::{DraftParts, EventData};

    #[test]
    fn frames_of_large_events_are_not_all_remembered() {
        static TEXT: Format =
            Format { open: |_| {}, event: |channel, event, out| event.write_json(channel, out), close: |_| {} };
        let channel = Channel::parse("a").unwrap();
        let keep = Retention { count: 100, age: Duration::from_secs(60), bytes: usize::MAX };
        let keys = KeyLimits { window: Duration::ZERO, count: 0 };
        let mut ring = Ring::new(0, None);
        ring.join();
        ring.join();
        let text = "x".repeat(100_000);
        let draft =
            || Draft::new(DraftParts { data: EventData::Text(&text), ..DraftParts::default() }, 1_000_000).unwrap();
        for offset in 1..=20 {
            ring.append(&channel, "", vec![draft()], &keep, &keys, 1000).unwrap();
            let frame = ring.frame(false, &channel, offset, offset, &TEXT);
            assert_eq!(
                ring.frame(false, &channel, offset, offset, &TEXT).as_ptr(),
                frame.as_ptr(),
                "the newest is shared"
            );
            let held: usize = ring.frames.iter().map(|frame| frame.bytes.len()).sum();
            assert!(held <= FRAME_BYTES + frame.len(), "{held}");
        }
    }
}
