//! [`Ring`]: the newest events of one channel in use, with its readers' parking and their shared frames.
//!
//! One synchronous type, always behind its topic's lock. A backend fills it; readers only touch the ring. In the
//! memory backend the ring *is* the log.

use std::{
    collections::{HashMap, VecDeque},
    sync::Arc,
    time::Duration,
};

use bytes::Bytes;
use slab::Slab;

use super::{
    format::{Filter, Format},
    log::{Gap, Limit, Page, Placed, Reason},
    subscription::{Inbox, Parked, Ticket},
};
use crate::{
    error::{Code, Error, Result},
    event::{Channel, Draft, Event},
    position::{Epoch, Position, Start},
};

/// What an event costs beside its encoded body: its header, two reference counts, its place in the queue.
const EVENT_COST: usize = 96;
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
pub struct Keep {
    pub count: usize,
    pub age: Duration,
    pub bytes: usize,
}

pub struct Ring {
    epoch: Epoch,
    /// Offset of `events[0]`, or of the next event if there is none.
    first: u64,
    events: VecDeque<Arc<Event>>,
    bytes: usize,
    /// Of the newest event, Unix milliseconds.
    time: u64,
    /// From this second on the channel is known to have had no log, until (if it has one) `born`.
    absent: u64,
    born: u64,
    /// The life before this one, while it is remembered.
    past: Option<Past>,
    /// Why the events before `first` are gone.
    cut: Reason,
    /// Subscriptions, parked or not.
    readers: u32,
    /// Readers that have seen everything. A ticket is good for one round: an append takes all of them.
    parked: Slab<Ticket>,
    round: u32,
    frames: VecDeque<Frame>,
    keys: Option<Box<Keys>>,
    /// Nobody will look here again: the topic has left the table.
    pub(super) retired: bool,
}

/// How a life of the channel ended.
#[derive(Clone, Copy, Debug)]
pub(super) struct Past {
    pub epoch: Epoch,
    pub top: u64,
    pub reason: Reason,
}

/// Encoded once, given to every reader that needs the same.
struct Frame {
    format: usize,
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
    pub(super) fn new(absent: u64, past: Option<Past>) -> Self {
        Ring {
            epoch: Epoch::ABSENT,
            first: 1,
            events: VecDeque::new(),
            bytes: 0,
            time: 0,
            absent,
            born: 0,
            past,
            cut: Reason::Trimmed,
            readers: 0,
            parked: Slab::new(),
            round: 0,
            frames: VecDeque::new(),
            keys: None,
            retired: false,
        }
    }

    pub fn epoch(&self) -> Epoch {
        self.epoch
    }

    pub fn first(&self) -> u64 {
        self.first
    }

    /// Offset of the newest event ever placed in this life; 0 if there was none.
    pub fn top(&self) -> u64 {
        self.first + self.events.len() as u64 - 1
    }

    /// Memory of the events kept.
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// Memory of all that the budget has to know: the events, and the keys, which outlive them.
    pub fn memory(&self) -> usize {
        self.bytes + self.keys.as_ref().map_or(0, |keys| keys.order.len() * KEY_COST)
    }

    pub fn time(&self) -> Option<u64> {
        (self.time > 0).then_some(self.time)
    }

    pub fn readers(&self) -> u32 {
        self.readers
    }

    #[cfg(test)]
    pub(super) fn parked(&self) -> usize {
        self.parked.len()
    }

    pub(super) fn past(&self) -> Option<Past> {
        match self.epoch.is_absent() {
            true => self.past,
            false => Some(Past { epoch: self.epoch, top: self.top(), reason: Reason::Reset }),
        }
    }

    /// From which second on there is no log, if this life ends now.
    pub(super) fn end(&self, now: u64) -> u64 {
        match self.epoch.is_absent() {
            true => self.absent,
            // A position of this very second may be older than the end.
            false => self.absent.max(self.born).max(now / 1000) + 1,
        }
    }

    /// Unix milliseconds of the oldest event.
    pub(super) fn oldest(&self) -> Option<u64> {
        self.events.front().map(|event| event.time)
    }

    /// Where a reader is who has seen everything.
    pub fn head(&self, now: u64) -> Position {
        match self.epoch.is_absent() {
            true => Position::absent(self.absent.max(now / 1000)),
            false => Position { epoch: self.epoch, offset: self.top() },
        }
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
        keep: &Keep,
        limits: &KeyLimits,
        now: u64,
    ) -> Result<Vec<Placed>> {
        self.check_keys(channel, subject, &drafts)?;
        if self.epoch.is_absent() {
            self.epoch = Epoch::random();
            self.first = 1;
            self.born = self.absent.max(now / 1000);
            self.cut = Reason::Trimmed;
        }
        let time = self.time.max(now);
        let mut placed = Vec::with_capacity(drafts.len());
        for mut draft in drafts {
            let key = draft.key.take().map(|key| (hash_key(subject, &key), draft.body.fingerprint()));
            if let Some((key, _)) = key
                && let Some(used) = self.keys.as_ref().and_then(|keys| keys.used.get(&key))
            {
                placed.push(Placed { duplicate: true, ..used.placed });
                continue;
            }
            let position = Position { epoch: self.epoch, offset: self.top() + 1 };
            let here = Placed { position, time, duplicate: false };
            if let Some((key, body)) = key {
                let keys = self.keys.get_or_insert_default();
                keys.used.insert(key, Used { body, placed: here });
                keys.order.push_back((now, key));
            }
            self.time = time;
            self.bytes += draft.size() + EVENT_COST;
            self.events.push_back(Arc::new(draft.place(position, time)));
            placed.push(here);
        }
        self.expire_keys(limits, now);
        self.trim(keep, now);
        Ok(placed)
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
    pub(super) fn trim(&mut self, keep: &Keep, now: u64) {
        let old = now.saturating_sub(keep.age.as_millis() as u64);
        while self.events.len() > 1 && (self.events.len() > keep.count || self.bytes > keep.bytes) {
            self.drop_oldest(Reason::Trimmed);
        }
        while self.oldest().is_some_and(|time| time < old) {
            self.drop_oldest(Reason::Trimmed);
        }
    }

    /// Lets go of the older half, for the memory budget.
    pub(super) fn relieve(&mut self) {
        for _ in 0..self.events.len().div_ceil(2) {
            self.drop_oldest(Reason::Budget);
        }
        self.frames.clear();
    }

    fn drop_oldest(&mut self, reason: Reason) {
        if let Some(event) = self.events.pop_front() {
            self.first += 1;
            self.bytes -= event.size() + EVENT_COST;
            self.cut = reason;
        }
        if self.events.is_empty() {
            self.events = VecDeque::new();
        }
    }

    /// Removes the events before `before`.
    pub fn trim_before(&mut self, before: Position) -> Result<()> {
        if before.epoch != self.epoch || before.offset > self.top() + 1 {
            return Err(Error::new(Code::InvalidPosition, "before is a position in the channel as it is now"));
        }
        while self.first < before.offset {
            self.drop_oldest(Reason::Deleted);
        }
        self.frames.clear();
        Ok(())
    }

    /// Ends this life of the channel: the next event begins another. Readers stay.
    pub fn delete(&mut self, now: u64) {
        if self.epoch.is_absent() {
            return;
        }
        let past = Past { epoch: self.epoch, top: self.top(), reason: Reason::Deleted };
        let (readers, round, time) = (self.readers, self.round, self.time);
        let parked = std::mem::take(&mut self.parked);
        *self = Ring { readers, round, parked, time, ..Ring::new(self.end(now), Some(past)) };
    }

    // === reading ===

    /// The first position of `start`, and what is missing before it.
    pub fn resolve(&self, channel: &Channel, start: Start, now: u64) -> (Position, Option<Gap>) {
        let absent = self.epoch.is_absent();
        let at = |offset| Position { epoch: self.epoch, offset };
        let asked = match start {
            Start::Now => return (self.head(now), None),
            _ if absent && !matches!(start, Start::After(_)) => return (self.head(now), None),
            Start::Earliest => return (at(self.first - 1), None),
            Start::Last(n) => return (at(self.top().saturating_sub(n).max(self.first - 1)), None),
            Start::AfterOffset(offset) => at(offset),
            Start::After(position) => position,
        };
        let lost = |reason, missed| {
            let next = if absent { self.head(now) } else { at(self.first) };
            let gap = Gap { channel: channel.clone(), reason, after: Some(asked), next, missed };
            (gap.resume(), Some(gap))
        };
        // Everything this life has, or will have, follows.
        let contiguous = match self.past {
            _ if asked.epoch == self.epoch && !absent => {
                let top = self.top();
                if asked.offset > top {
                    let next = at(top + 1);
                    let reason = Reason::BadPosition;
                    let gap = Gap { channel: channel.clone(), reason, after: Some(asked), next, missed: None };
                    return (gap.resume(), Some(gap));
                }
                asked.offset
            }
            _ if asked.epoch.is_absent() => {
                if asked.offset < self.absent || (!absent && asked.offset > self.born) {
                    return lost(Reason::Reset, None);
                }
                0
            }
            Some(past) if past.epoch == asked.epoch => {
                if asked.offset != past.top {
                    let reason = if asked.offset > past.top { Reason::BadPosition } else { past.reason };
                    return lost(reason, None);
                }
                0
            }
            _ => return lost(Reason::Reset, None),
        };
        if absent {
            (self.head(now), None)
        } else if contiguous + 1 < self.first {
            lost(self.cut, Some(self.first - contiguous - 1))
        } else {
            (at(contiguous), None)
        }
    }

    /// Orders positions of one channel: those of unknown lives first, then the life before this one, then this one.
    pub fn rank(&self, position: Position) -> (u8, u64) {
        let absent = self.epoch.is_absent();
        match position.epoch {
            epoch if epoch.is_absent() && absent => (3, position.offset),
            epoch if epoch.is_absent() => (2, position.offset),
            epoch if epoch == self.epoch => (3, position.offset),
            epoch if self.past.is_some_and(|past| past.epoch == epoch) => (1, position.offset),
            _ => (0, 0),
        }
    }

    /// A page for somebody who does not stay.
    pub fn page(&self, channel: &Channel, start: Start, limit: Limit, now: u64) -> Page {
        let (mut next, gap) = self.resolve(channel, start, now);
        let mut events = Vec::new();
        if !self.epoch.is_absent() {
            let mut bytes = 0;
            for event in self.events.range((next.offset + 1 - self.first) as usize..) {
                bytes += event.size() + channel.as_str().len() + EVENT_COST;
                if events.len() == limit.events || (bytes > limit.bytes && !events.is_empty()) {
                    break;
                }
                next.offset = event.offset;
                events.push(event.clone());
            }
        }
        let more = !self.epoch.is_absent() && next.offset < self.top();
        Page { events, next, more, gap }
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
        if position.epoch != self.epoch || position.offset + 1 < self.first {
            let (at, gap) = self.resolve(channel, Start::After(*position), self.time);
            if let Some(gap) = gap {
                *position = at;
                return Step::Gap(gap);
            }
            if self.epoch.is_absent() {
                // The position is kept: it says what this reader has had when a new life begins.
                return Step::Nothing;
            }
            *position = at;
        }
        let from = position.offset + 1;
        if from > self.top() {
            return Step::Nothing;
        }
        match filter {
            None => self.step_all(channel, position, from, format, turn),
            Some(filter) => self.step_some(channel, position, from, filter, format, turn),
        }
    }

    fn step_all(
        &mut self,
        channel: &Channel,
        position: &mut Position,
        from: u64,
        format: &'static Format,
        turn: usize,
    ) -> Step {
        let start = (from - self.first) as usize;
        let (mut to, mut bytes) = (from - 1, 0);
        for event in self.events.range(start..).take(turn) {
            bytes += event.size() + EVENT_COST;
            if bytes > TURN_BYTES && to >= from {
                break;
            }
            to = event.offset;
        }
        position.offset = to;
        Step::Events { bytes: self.frame(channel, from, to, format), count: (to - from + 1) as u32 }
    }

    fn step_some(
        &mut self,
        channel: &Channel,
        position: &mut Position,
        from: u64,
        filter: &Filter,
        format: &'static Format,
        turn: usize,
    ) -> Step {
        let start = (from - self.first) as usize;
        let (mut shown, mut bytes) = (Vec::new(), 0);
        for event in self.events.range(start..).take(TURN_SCAN) {
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
                Step::Events { bytes: self.frame(channel, at, at, format), count: 1 }
            }
            many => Step::Events { bytes: format.encode(channel, many), count: many.len() as u32 },
        }
    }

    /// The events `from..=to`, encoded; shared if anybody else may want the same.
    fn frame(&mut self, channel: &Channel, from: u64, to: u64, format: &'static Format) -> Bytes {
        let known = |frame: &&Frame| (frame.to, frame.from, frame.format) == (to, from, format.index);
        if let Some(frame) = self.frames.iter().rev().find(known) {
            return frame.bytes.clone();
        }
        let range = (from - self.first) as usize..=(to - self.first) as usize;
        let bytes = format.encode(channel, self.events.range(range));
        if self.readers > 1 {
            // The budget does not know of them: a channel of large events must not keep all of them twice.
            let mut held: usize = self.frames.iter().map(|frame| frame.bytes.len()).sum();
            while self.frames.len() == FRAMES || held > FRAME_BYTES {
                let Some(oldest) = self.frames.pop_front() else { break };
                held -= oldest.bytes.len();
            }
            self.frames.push_back(Frame { format: format.index, from, to, bytes: bytes.clone() });
        }
        bytes
    }

    /// Whether somebody at `position` has something to read.
    pub(super) fn is_behind(&self, position: Position) -> bool {
        !self.epoch.is_absent() && (position.epoch != self.epoch || position.offset < self.top())
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
        parking.round == self.round && self.parked.try_remove(parking.key as usize).is_some()
    }

    /// Everybody to wake after an append, outside the lock.
    pub fn take_parked(&mut self) -> Parked {
        self.round = self.round.wrapping_add(1);
        let room = Slab::with_capacity(if self.parked.len() > 1 { self.parked.len() } else { 0 });
        Parked(std::mem::replace(&mut self.parked, room))
    }

    /// Gives back what only a busy channel needs.
    pub(super) fn cool(&mut self) {
        if !self.frames.is_empty() {
            self.frames = VecDeque::new();
        }
        if self.events.capacity() > 64 && self.events.capacity() > self.events.len() * 4 {
            self.events.shrink_to_fit();
        }
    }

    /// Nothing is here that anybody could miss.
    pub(super) fn is_idle(&self) -> bool {
        self.events.is_empty() && self.readers == 0 && self.keys.is_none()
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
    use crate::event::{Data, Parts};

    #[test]
    fn frames_of_large_events_are_not_all_remembered() {
        static TEXT: Format = Format {
            index: 62,
            open: |_| {},
            event: |channel, event, out| event.write_json(channel, out),
            close: |_| {},
        };
        let channel = Channel::parse("a").unwrap();
        let keep = Keep { count: 100, age: Duration::from_secs(60), bytes: usize::MAX };
        let keys = KeyLimits { window: Duration::ZERO, count: 0 };
        let mut ring = Ring::new(0, None);
        ring.join();
        ring.join();
        let text = "x".repeat(100_000);
        let draft = || Draft::new(Parts { data: Data::Text(&text), ..Parts::default() }, 1_000_000).unwrap();
        for offset in 1..=20 {
            ring.append(&channel, "", vec![draft()], &keep, &keys, 1000).unwrap();
            let frame = ring.frame(&channel, offset, offset, &TEXT);
            assert_eq!(ring.frame(&channel, offset, offset, &TEXT).as_ptr(), frame.as_ptr(), "the newest is shared");
            let held: usize = ring.frames.iter().map(|frame| frame.bytes.len()).sum();
            assert!(held <= FRAME_BYTES + frame.len(), "{held}");
        }
    }
}
