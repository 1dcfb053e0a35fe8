//! [`Window`], the newest events of a log that another server stores, and older ones that readers behind it wait for.
//!
//! A backend applies the events it receives ([`Window::apply_live`]), resynchronizes the window after it may have missed
//! some ([`Window::apply_snapshot`]), and fetches older events once for all readers that wait for them
//! ([`Window::add_older`]).

use std::{
    collections::VecDeque,
    ops::{Deref, DerefMut},
    sync::Arc,
};

use slab::Slab;

use super::{
    log_bounds::LogBounds,
    parking::{ParkedReader, WakeList},
    retention::Retention,
    ring::{EVENT_COST, ReadStep, Ring, StepRequest},
};
use crate::{
    channel::Channel,
    event::Event,
    position::{Position, Start},
};

/// Events, and their memory in bytes, at the end of a log that each node keeps while it has readers.
const EVENTS: usize = 256;
const BYTES: usize = 64 << 10;

/// A ring that holds only the newest part of its log.
pub(crate) struct Window {
    ring: Ring,
    /// Present while readers are behind the ring.
    backlog: Option<Box<Backlog>>,
    /// Number of the last reader that waited for older events.
    last_ticket: u32,
}

/// Events that are older than the ring.
#[derive(Default)]
struct Backlog {
    /// Contiguous and of one term: those that were fetched last.
    events: VecDeque<Arc<Event>>,
    bytes: usize,
    waiting: Slab<WaitingReader>,
    /// Index of the reader whose position was fetched last.
    hand: usize,
    fetching: bool,
}

/// A reader whose next event must be fetched first.
struct WaitingReader {
    reader: ParkedReader,
    position: Position,
    /// Tells the reader from the one that had its index before.
    ticket: u32,
}

/// Place of a reader that waits for older events.
#[derive(Clone, Copy, Debug)]
pub(super) struct WaitingKey {
    index: u32,
    ticket: u32,
}

/// The outcome of applying a live event.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum LiveOutcome {
    /// It was the next one and has been appended.
    Appended,
    /// The window had it already.
    Known,
    /// Events before it are missing, or it is of another term: the window must be resynchronized.
    OutOfSequence,
}

// === impl Backlog ===

impl Backlog {
    /// Whether it has the event that follows `position`.
    fn follows(&self, position: Position) -> bool {
        let (Some(first), Some(last)) = (self.events.front(), self.events.back()) else { return false };
        let follows = first.offset <= position.offset + 1 && position.offset < last.offset;
        first.epoch == position.epoch && follows
    }
}

// === impl Window ===

impl Window {
    pub(super) fn new(ring: Ring) -> Self {
        Window { ring, backlog: None, last_ticket: 0 }
    }

    /// Memory of the events, in bytes.
    pub(super) fn memory(&self) -> usize {
        self.ring.bytes() + self.backlog.as_ref().map_or(0, |backlog| backlog.bytes)
    }

    #[cfg(test)]
    pub(super) fn waiting(&self) -> usize {
        self.backlog.as_ref().map_or(0, |backlog| backlog.waiting.len())
    }

    /// Frees memory that only a busy channel needs, and the backlog once no reader waits for it.
    pub(super) fn shrink(&mut self) {
        self.ring.shrink();
        self.backlog.take_if(|backlog| backlog.waiting.is_empty() && !backlog.fetching);
    }

    // === filling ===

    /// Applies an event as it is published.
    pub(crate) fn apply_live(&mut self, event: Event, retention: &Retention) -> LiveOutcome {
        if event.epoch != self.epoch() || event.offset > self.top() + 1 {
            return LiveOutcome::OutOfSequence;
        }
        if event.offset <= self.top() {
            return LiveOutcome::Known;
        }
        self.push(Arc::new(event), retention);
        LiveOutcome::Appended
    }

    fn push(&mut self, event: Arc<Event>, retention: &Retention) {
        // Events that the log no longer shows are not shown from the window either.
        let first = (event.offset + 1).saturating_sub(retention.count as u64);
        self.ring.push(event);
        self.raise_first(first);
        let most = EVENTS.min(retention.count);
        while self.events().len() > most || (self.bytes() > BYTES && self.events().len() > 1) {
            self.ring.pop_oldest();
        }
    }

    fn raise_first(&mut self, first: u64) {
        let bounds = self.ring.bounds_mut();
        bounds.first = bounds.first.max(first);
    }

    /// Empties the window, as one that begins after the offset `top`.
    fn restart_after(&mut self, top: u64) {
        let bounds = LogBounds { top, ..self.bounds().clone() };
        self.ring.reset(bounds);
    }

    /// Applies the bounds of the log at one moment, and contiguous events of it. Snapshots must be applied in the order
    /// in which they were taken; events that were received since are kept. Returns the readers to wake.
    pub(crate) fn apply_snapshot(
        &mut self,
        channel: &Channel,
        retention: &Retention,
        seen: LogBounds,
        mut events: Vec<Arc<Event>>,
    ) -> WakeList {
        let (epoch, top) = (self.epoch(), self.top());
        if seen.epoch == epoch && !seen.is_absent() {
            // If the log has fewer events than were received, they were published after the snapshot; or they are lost,
            // which the next term will show.
            let newest = seen.top;
            let LogBounds { top, time, first, .. } = *self.bounds();
            *self.ring.bounds_mut() = LogBounds { top, time, first: seen.first.max(first), ..seen };
            for event in events {
                if event.epoch == epoch && event.offset > self.top() {
                    if event.offset > self.top() + 1 {
                        // Too many were missed: readers that need them fetch them.
                        self.restart_after(event.offset - 1);
                    }
                    self.push(event, retention);
                }
            }
            if self.top() < newest {
                self.restart_after(newest);
            }
        } else {
            // Where an event is missing that should exist, the window begins after it: readers that need it get a gap when
            // they fetch it.
            let broken = events.windows(2).rposition(|pair| pair[0].offset + 1 != pair[1].offset);
            events.drain(..broken.map_or(0, |at| at + 1));
            let is_end = |event: &Arc<Event>| (event.epoch, event.offset) == (seen.epoch, seen.top);
            events.truncate(if events.last().is_some_and(is_end) { events.len() } else { 0 });
            let top = events.first().map_or(seen.top, |first| first.offset - 1);
            self.ring.reset(LogBounds { top, ..seen });
            events.into_iter().for_each(|event| self.push(event, retention));
        }
        let mut wake = match (self.epoch(), self.top()) == (epoch, top) {
            true => WakeList::default(),
            false => self.ring.take_parked(),
        };
        self.take_served(channel, &mut wake);
        wake
    }

    /// Adds the older events that follow [`next_wanted`](Self::next_wanted), with the bounds of the log when they were
    /// read. Returns the readers to wake; `None` if the log is in another term, so that a snapshot must be applied first.
    pub(crate) fn add_older(
        &mut self,
        channel: &Channel,
        seen: &LogBounds,
        events: Vec<Arc<Event>>,
    ) -> Option<WakeList> {
        if seen.epoch != self.epoch() {
            return None;
        }
        self.raise_first(seen.first);
        let backlog = self.backlog.get_or_insert_default();
        backlog.bytes = events.iter().map(|event| event.size() + EVENT_COST).sum();
        backlog.events = events.into();
        let mut wake = WakeList::default();
        self.take_served(channel, &mut wake);
        Some(wake)
    }

    /// Takes the readers that waited for older events and can go on.
    fn take_served(&mut self, channel: &Channel, wake: &mut WakeList) {
        let Some(mut backlog) = self.backlog.take() else { return };
        let served: Vec<usize> = backlog
            .waiting
            .iter()
            .filter(|(_, waiting)| !self.lacks(&backlog, channel, waiting.position))
            .map(|(index, _)| index)
            .collect();
        for index in served {
            wake.push(backlog.waiting.remove(index).reader);
        }
        self.backlog = Some(backlog);
    }

    /// Whether a reader at `position` cannot go on before something is fetched.
    fn lacks(&self, backlog: &Backlog, channel: &Channel, position: Position) -> bool {
        let (at, gap) = self.bounds().resolve(channel, Start::After(position), self.bounds().time);
        let inside = at.epoch == self.epoch() && at.offset + 1 >= self.start();
        gap.is_none() && !self.bounds().is_absent() && !inside && !backlog.follows(at)
    }

    // === reading ===

    /// The next events for a reader at `position`, which moves past them.
    pub(super) fn step(&mut self, request: &StepRequest<'_>, position: &mut Position) -> ReadStep {
        match (self.ring.step(request, position), &self.backlog) {
            (ReadStep::Older, Some(backlog)) if backlog.follows(*position) => {
                self.ring.step_older(&backlog.events, request, position)
            }
            (step, _) => step,
        }
    }

    /// Parks a reader until the events that follow `position` have been fetched. True if nothing is being fetched yet.
    pub(super) fn park_behind(&mut self, position: Position, reader: ParkedReader) -> (WaitingKey, bool) {
        self.last_ticket = self.last_ticket.wrapping_add(1);
        let ticket = self.last_ticket;
        let backlog = self.backlog.get_or_insert_default();
        let index = backlog.waiting.insert(WaitingReader { reader, position, ticket }) as u32;
        (WaitingKey { index, ticket }, !std::mem::replace(&mut backlog.fetching, true))
    }

    /// False if the reader was served: then it is, or will be, in its ready queue.
    pub(super) fn unpark_behind(&mut self, key: WaitingKey) -> bool {
        let Some(backlog) = &mut self.backlog else { return false };
        let index = key.index as usize;
        let waits = backlog.waiting.get(index).is_some_and(|waiting| waiting.ticket == key.ticket);
        if waits {
            backlog.waiting.remove(index);
        }
        waits
    }

    /// The position after which a reader waits for events; each reader has its turn. `None` if no reader waits: then the
    /// fetching ends.
    pub(crate) fn next_wanted(&mut self) -> Option<Position> {
        let backlog = self.backlog.as_mut()?;
        let next = backlog.waiting.iter().find(|(index, _)| *index > backlog.hand);
        match next.or_else(|| backlog.waiting.iter().next()) {
            Some((index, waiting)) => {
                backlog.hand = index;
                Some(waiting.position)
            }
            None => {
                (backlog.fetching, backlog.hand) = (false, 0);
                None
            }
        }
    }
}

impl Deref for Window {
    type Target = Ring;

    fn deref(&self) -> &Ring {
        &self.ring
    }
}

impl DerefMut for Window {
    fn deref_mut(&mut self) -> &mut Ring {
        &mut self.ring
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::{
        bus::{gap::GapReason, log_bounds::Term},
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

    fn window() -> (Window, Channel) {
        (Window::new(Ring::new(LogBounds::absent(0, None))), Channel::parse("a").unwrap())
    }

    const KEEP: Retention = Retention { count: 10_000, age: Duration::from_secs(60), bytes: 1 << 20 };

    fn held(window: &Window) -> (u64, u64, usize) {
        (window.start(), window.top(), window.events().len())
    }

    #[test]
    fn live_events_are_appended_known_or_out_of_sequence() {
        let (mut window, channel) = window();
        let e = Epoch::random();
        assert_eq!(
            window.apply_live(event(e, 1), &KEEP),
            LiveOutcome::OutOfSequence,
            "the beginning of this life is unknown"
        );
        window.apply_snapshot(&channel, &KEEP, log(e, 3), events(e, 1..=3)).wake();
        assert_eq!(held(&window), (1, 3, 3));
        assert_eq!(
            (
                window.apply_live(event(e, 3), &KEEP),
                window.apply_live(event(e, 4), &KEEP),
                window.apply_live(event(e, 6), &KEEP)
            ),
            (LiveOutcome::Known, LiveOutcome::Appended, LiveOutcome::OutOfSequence)
        );
        // A snapshot from before the fourth event changes nothing; one from after it fills the hole.
        window.apply_snapshot(&channel, &KEEP, log(e, 3), vec![]).wake();
        assert_eq!(held(&window), (1, 4, 4));
        window.apply_snapshot(&channel, &KEEP, log(e, 6), events(e, 4..=6)).wake();
        assert_eq!(held(&window), (1, 6, 6));
        // Too far ahead: the window restarts at the head.
        window.apply_snapshot(&channel, &KEEP, log(e, 5000), events(e, 7..=300)).wake();
        assert_eq!(held(&window), (5001, 5000, 0));
        for offset in 5001..6000 {
            assert_eq!(window.apply_live(event(e, offset), &KEEP), LiveOutcome::Appended);
        }
        assert_eq!(held(&window), (5999 - 255, 5999, 256));
    }

    #[test]
    fn another_term_empties_the_window() {
        let (mut window, channel) = window();
        let (a, b) = (Epoch::random(), Epoch::random());
        window.apply_snapshot(&channel, &KEEP, log(a, 50), events(a, 1..=50)).wake();
        let next = LogBounds { terms: vec![Term { epoch: a, end: 47 }], ..log(b, 49) };
        assert_eq!(window.apply_live(event(b, 49), &KEEP), LiveOutcome::OutOfSequence);
        window.apply_snapshot(&channel, &KEEP, next, events(b, 48..=49)).wake();
        assert_eq!(held(&window), (48, 49, 2));
        let failover = |offset| window.bounds().resolve(&channel, Start::After(Position { epoch: a, offset }), 0).1;
        for offset in [47, 50] {
            let gap = failover(offset).unwrap();
            assert_eq!((gap.reason, gap.next), (GapReason::Failover, Position { epoch: b, offset: 48 }));
        }
        assert_eq!(failover(46), None, "it has one event to read first");
        window.apply_snapshot(&channel, &KEEP, LogBounds::absent(7, None), vec![]).wake();
        assert!(window.epoch().is_absent());
    }
}
