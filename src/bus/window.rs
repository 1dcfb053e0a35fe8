//! A ring that is a window: the newest events of a log that is elsewhere, and older ones that readers behind it wait for.
//!
//! A backend fills it with what it hears ([`Ring::apply_live`]), sets it right after it may have missed something
//! ([`Ring::apply_snapshot`]), and fetches what is older once for all who wait for the same ([`Ring::add_older`]).

use std::{collections::VecDeque, sync::Arc};

use slab::Slab;

use super::{
    log_bounds::LogBounds,
    ring::{EVENT_COST, OLDER, Parking, Retention, Ring},
    subscription::{Inbox, Ticket, WakeList},
};
use crate::{
    channel::Channel,
    event::Event,
    position::{Position, Start},
};

/// How much of a log's end is kept on each node that reads it.
const EVENTS: usize = 256;
const BYTES: usize = 64 << 10;

#[derive(Default)]
pub(super) struct Window {
    /// Older than the window, one after the other, of one term: what was fetched last.
    pub events: VecDeque<Arc<Event>>,
    bytes: usize,
    /// Readers that need what must be fetched first. Each has a number, for its place is given to others.
    waiting: Slab<(Ticket, Position, u32)>,
    numbers: u32,
    /// Whose turn it was last.
    hand: usize,
    /// Somebody is at it.
    fetching: bool,
    /// A backend fills it.
    pub tailed: bool,
}

/// What became of an event that a backend heard of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LiveOutcome {
    /// It is the next.
    Next,
    /// It was there already.
    Old,
    /// Something before it is missing, or it is of another term: the log must be looked at.
    Beyond,
}

impl Window {
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    #[cfg(test)]
    pub fn waiting(&self) -> usize {
        self.waiting.len()
    }

    /// Whether what follows `position` was fetched.
    pub fn older(&self, position: Position) -> Option<()> {
        let (first, last) = (self.events.front()?, self.events.back()?);
        let follows = first.offset <= position.offset + 1 && position.offset < last.offset;
        (first.epoch == position.epoch && follows).then_some(())
    }

    /// False if it was served: then word is, or will be, in the inbox.
    pub fn unpark(&mut self, parking: Parking) -> bool {
        let key = (parking.key & !OLDER) as usize;
        match self.waiting.get(key) {
            Some((_, _, number)) if *number == parking.round => {
                self.waiting.remove(key);
                true
            }
            _ => false,
        }
    }

    /// Gives back what was fetched, when nobody waits for more of it.
    pub fn cool(&mut self) {
        if self.waiting.is_empty() && !self.fetching {
            self.events = VecDeque::new();
            self.bytes = 0;
            self.waiting = Slab::new();
        }
    }
}

impl Ring {
    /// A backend begins to fill it, or ends to.
    pub fn set_tailed(&mut self, tailed: bool) {
        self.window.get_or_insert_default().tailed = tailed;
    }

    /// An event, as it is published.
    pub fn apply_live(&mut self, event: Event, keep: &Retention) -> LiveOutcome {
        if event.epoch != self.epoch() || event.offset > self.top() + 1 {
            return LiveOutcome::Beyond;
        }
        if event.offset <= self.top() {
            return LiveOutcome::Old;
        }
        self.push(Arc::new(event), keep);
        LiveOutcome::Next
    }

    fn push(&mut self, event: Arc<Event>, keep: &Retention) {
        (self.bounds.top, self.bounds.time) = (event.offset, event.time);
        self.bytes += event.size() + EVENT_COST;
        self.events.push_back(event);
        // What the log no longer shows is not shown here.
        let first = (self.bounds.top + 1).saturating_sub(keep.count as u64);
        self.bounds.first = self.bounds.first.max(first);
        let most = EVENTS.min(keep.count);
        while self.events.len() > most || (self.bytes > BYTES && self.events.len() > 1) {
            let Some(oldest) = self.events.pop_front() else { break };
            self.bytes -= oldest.size() + EVENT_COST;
        }
    }

    fn clear(&mut self) {
        self.events = VecDeque::new();
        self.frames.clear();
        self.bytes = 0;
    }

    /// The log as it was at one look, and events of it, one after the other. Looks must be shown in the order in which
    /// they were taken; what was heard since is kept. Answers whom to wake.
    pub fn apply_snapshot(
        &mut self,
        channel: &Channel,
        keep: &Retention,
        seen: LogBounds,
        mut events: Vec<Arc<Event>>,
    ) -> WakeList {
        let (epoch, top) = (self.epoch(), self.top());
        if seen.epoch == epoch && !seen.is_absent() {
            // If the log has fewer events than were heard of, they came in since it was looked at; or they are lost, and
            // the next term will tell.
            let (top, time) = (self.bounds.top, self.bounds.time);
            let newest = seen.top;
            self.bounds = LogBounds { top, time, first: seen.first.max(self.bounds.first), ..seen };
            for event in events {
                if event.epoch == epoch && event.offset > self.top() {
                    if event.offset > self.top() + 1 {
                        // Too many were missed: those who need them fetch them.
                        self.clear();
                        self.bounds.top = event.offset - 1;
                    }
                    self.push(event, keep);
                }
            }
            if self.top() < newest {
                self.clear();
                self.bounds.top = newest;
            }
        } else {
            self.clear();
            self.bounds = seen;
            // Where one is missing that should be there, the window begins behind it: who needs it is told when it is fetched.
            let broken = events.windows(2).rposition(|pair| pair[0].offset + 1 != pair[1].offset);
            events.drain(..broken.map_or(0, |at| at + 1));
            let first = events.first().map(|event| event.offset);
            let ends = events.last().map(|event| (event.epoch, event.offset));
            if let (Some(first), true) = (first, ends == Some((self.epoch(), self.top()))) {
                self.bounds.top = first - 1;
                events.into_iter().for_each(|event| self.push(event, keep));
            }
        }
        let mut parked = match (self.epoch(), self.top()) == (epoch, top) {
            true => WakeList(Slab::new()),
            false => self.take_parked(),
        };
        self.take_served(channel, &mut parked);
        parked
    }

    /// Older events that [`next_wanted`](Self::next_wanted) asked for, as the log was when they were read. Answers whom to wake; or
    /// nothing, if the log is another than this ring knows and must be shown first.
    pub fn add_older(&mut self, channel: &Channel, seen: &LogBounds, events: Vec<Arc<Event>>) -> Option<WakeList> {
        if seen.epoch != self.epoch() {
            return None;
        }
        self.bounds.first = self.bounds.first.max(seen.first);
        let window = self.window.get_or_insert_default();
        window.bytes = events.iter().map(|event| event.size() + EVENT_COST).sum();
        window.events = events.into();
        let mut parked = WakeList(Slab::new());
        self.take_served(channel, &mut parked);
        Some(parked)
    }

    /// Those who wait for older events, and can go on now.
    fn take_served(&mut self, channel: &Channel, parked: &mut WakeList) {
        let Some(mut window) = self.window.take() else { return };
        let served: Vec<usize> = window
            .waiting
            .iter()
            .filter(|(_, (_, position, _))| !self.lacks(&window, channel, *position))
            .map(|(key, _)| key)
            .collect();
        for key in served {
            parked.0.insert(window.waiting.remove(key).0);
        }
        self.window = Some(window);
    }

    /// Whether a reader at `position` can do nothing before something is fetched.
    fn lacks(&self, window: &Window, channel: &Channel, position: Position) -> bool {
        let (at, gap) = self.bounds.resolve(channel, Start::After(position), self.bounds.time);
        let inside = at.epoch == self.epoch() && at.offset + 1 >= self.start();
        gap.is_none() && !self.bounds.is_absent() && !inside && window.older(at).is_none()
    }

    /// Remembers to wake a reader when what follows `position` was fetched. True if nobody is at it yet.
    pub(super) fn park_older(
        &mut self,
        position: Position,
        inbox: &Arc<Inbox>,
        slot: u32,
        life: u32,
    ) -> (Parking, bool) {
        let window = self.window.get_or_insert_default();
        window.numbers = window.numbers.wrapping_add(1);
        let number = window.numbers;
        let key = window.waiting.insert((Ticket { inbox: inbox.clone(), slot, life }, position, number));
        let idle = !std::mem::replace(&mut window.fetching, true);
        (Parking { key: key as u32 | OLDER, round: number }, idle)
    }

    /// The position of somebody who waits for what follows it: everybody in turn. If nobody does, the fetching ends.
    pub fn next_wanted(&mut self) -> Option<Position> {
        let window = self.window.get_or_insert_default();
        let behind = window.waiting.iter().find(|(key, _)| *key > window.hand);
        match behind.or_else(|| window.waiting.iter().next()) {
            Some((key, (_, position, _))) => {
                window.hand = key;
                Some(*position)
            }
            None => {
                (window.fetching, window.hand) = (false, 0);
                None
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::{
        bus::{GapReason, log_bounds::Term},
        event::{Draft, DraftParts},
        position::Epoch,
    };

    fn event(epoch: Epoch, offset: u64) -> Event {
        Draft::new(DraftParts::default(), 1000).unwrap().place(Position { epoch, offset }, offset)
    }

    fn events(epoch: Epoch, offsets: std::ops::RangeInclusive<u64>) -> Vec<Arc<Event>> {
        offsets.map(|offset| Arc::new(event(epoch, offset))).collect()
    }

    fn log(epoch: Epoch, top: u64) -> LogBounds {
        LogBounds { epoch, top, ..LogBounds::absent(0, None) }
    }

    fn window() -> (Ring, Channel) {
        let mut ring = Ring::new(0, None);
        ring.set_tailed(true);
        (ring, Channel::parse("a").unwrap())
    }

    const KEEP: Retention = Retention { count: 10_000, age: Duration::from_secs(60), bytes: 1 << 20 };

    fn held(ring: &Ring) -> (u64, u64, usize) {
        (ring.start(), ring.top(), ring.events.len())
    }

    #[test]
    fn what_is_heard_is_next_old_or_beyond() {
        let (mut ring, channel) = window();
        let e = Epoch::random();
        assert_eq!(ring.apply_live(event(e, 1), &KEEP), LiveOutcome::Beyond, "a life nobody has seen the beginning of");
        ring.apply_snapshot(&channel, &KEEP, log(e, 3), events(e, 1..=3)).wake();
        assert_eq!(held(&ring), (1, 3, 3));
        assert_eq!(
            (
                ring.apply_live(event(e, 3), &KEEP),
                ring.apply_live(event(e, 4), &KEEP),
                ring.apply_live(event(e, 6), &KEEP)
            ),
            (LiveOutcome::Old, LiveOutcome::Next, LiveOutcome::Beyond)
        );
        // A look from before the fourth came changes nothing; one from after it fills the hole.
        ring.apply_snapshot(&channel, &KEEP, log(e, 3), vec![]).wake();
        assert_eq!(held(&ring), (1, 4, 4));
        ring.apply_snapshot(&channel, &KEEP, log(e, 6), events(e, 4..=6)).wake();
        assert_eq!(held(&ring), (1, 6, 6));
        // Too far ahead: the window begins anew at its head.
        ring.apply_snapshot(&channel, &KEEP, log(e, 5000), events(e, 7..=300)).wake();
        assert_eq!(held(&ring), (5001, 5000, 0));
        for offset in 5001..6000 {
            assert_eq!(ring.apply_live(event(e, offset), &KEEP), LiveOutcome::Next);
        }
        assert_eq!(held(&ring), (5999 - 255, 5999, 256));
    }

    #[test]
    fn another_term_empties_the_window() {
        let (mut ring, channel) = window();
        let (a, b) = (Epoch::random(), Epoch::random());
        ring.apply_snapshot(&channel, &KEEP, log(a, 50), events(a, 1..=50)).wake();
        let next = LogBounds { terms: vec![Term { epoch: a, end: 47 }], ..log(b, 49) };
        assert_eq!(ring.apply_live(event(b, 49), &KEEP), LiveOutcome::Beyond);
        ring.apply_snapshot(&channel, &KEEP, next, events(b, 48..=49)).wake();
        assert_eq!(held(&ring), (48, 49, 2));
        let crossing = |offset| ring.bounds().resolve(&channel, Start::After(Position { epoch: a, offset }), 0).1;
        for had in [47, 50] {
            let gap = crossing(had).unwrap();
            assert_eq!((gap.reason, gap.next), (GapReason::Failover, Position { epoch: b, offset: 48 }));
        }
        assert_eq!(crossing(46), None, "it has one to read first");
        ring.apply_snapshot(&channel, &KEEP, LogBounds::absent(7, None), vec![]).wake();
        assert!(ring.epoch().is_absent());
    }
}
