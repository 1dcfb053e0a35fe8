//! [`Ring`], the newest events of a channel in use, with its readers and the frames that they share.
//!
//! It is synchronous and always behind the lock of its topic. A backend fills it and the readers touch nothing else. In
//! the memory backend the ring *is* the log; elsewhere it is the newest part of it, inside a
//! [`Window`](super::window::Window).

use std::{collections::VecDeque, sync::Arc};

use bytes::Bytes;

use super::{
    filter::Filter,
    format::Format,
    frame_cache::FrameCache,
    gap::Gap,
    log_bounds::LogBounds,
    parking::{ParkedReader, ParkingKey, ParkingLot, WakeList},
};
use crate::{
    channel::Channel,
    event::Event,
    position::{Epoch, Position, Start},
};

/// Memory of an event beside its encoded body: its header, two reference counts, its place in the queue.
pub(crate) const EVENT_COST: usize = 96;
/// Bytes and events that a reader gets at once, so that a reader far behind does not delay the others.
const STEP_BYTES: usize = 16 * 1024;
pub(super) const STEP_EVENTS: usize = 64;
/// Events that are compared with a filter at once.
const STEP_SCAN: usize = 512;
/// A queue of events that shrank frees its memory above this capacity.
const SPARE: usize = 64;

pub(crate) struct Ring {
    bounds: LogBounds,
    /// The newest events of the log, contiguous up to its top.
    events: VecDeque<Arc<Event>>,
    bytes: usize,
    parking: ParkingLot,
    frames: FrameCache,
}

/// How a reader wants its events.
pub(super) struct StepRequest<'a> {
    pub(super) channel: &'a Channel,
    pub(super) filter: Option<&'a Filter>,
    pub(super) format: &'static Format,
    pub(super) max_events: usize,
}

/// The result of one read from a ring.
pub(super) enum ReadStep {
    Events {
        bytes: Bytes,
        count: u32,
    },
    Gap(Gap),
    /// The next event is older than the ring and must be fetched from the log.
    Older,
    /// There is nothing to show, although there may be more to scan.
    Nothing,
}

impl Ring {
    pub(super) fn new(bounds: LogBounds) -> Self {
        Ring {
            bounds,
            events: VecDeque::new(),
            bytes: 0,
            parking: ParkingLot::default(),
            frames: FrameCache::default(),
        }
    }

    pub(crate) fn bounds(&self) -> &LogBounds {
        &self.bounds
    }

    pub(crate) fn bounds_mut(&mut self) -> &mut LogBounds {
        &mut self.bounds
    }

    pub(crate) fn epoch(&self) -> Epoch {
        self.bounds.epoch
    }

    /// Offset of the newest event ever placed in this life; 0 if there is none.
    pub(crate) fn top(&self) -> u64 {
        self.bounds.top
    }

    /// Offset of the oldest event in the ring, or of the next event if the ring is empty.
    pub(super) fn start(&self) -> u64 {
        self.bounds.top + 1 - self.events.len() as u64
    }

    pub(crate) fn events(&self) -> &VecDeque<Arc<Event>> {
        &self.events
    }

    /// Memory of the events, in bytes.
    pub(crate) fn bytes(&self) -> usize {
        self.bytes
    }

    /// Subscriptions, parked or not.
    pub(crate) fn readers(&self) -> u32 {
        self.frames.readers()
    }

    // === filling ===

    /// Appends the next event and moves the top of the bounds to it.
    pub(crate) fn push(&mut self, event: Arc<Event>) {
        (self.bounds.top, self.bounds.time) = (event.offset, event.time);
        self.bytes += event.size() + EVENT_COST;
        self.events.push_back(event);
    }

    /// Removes the oldest event from the ring; the bounds stay. False if there is none.
    pub(crate) fn pop_oldest(&mut self) -> bool {
        let popped = self.events.pop_front();
        if let Some(event) = &popped {
            self.bytes -= event.size() + EVENT_COST;
        }
        if self.events.is_empty() {
            self.events = VecDeque::new();
        }
        popped.is_some()
    }

    /// Removes all events and replaces the bounds. The readers stay.
    pub(crate) fn reset(&mut self, bounds: LogBounds) {
        self.bounds = bounds;
        self.events = VecDeque::new();
        self.bytes = 0;
        self.frames.clear();
    }

    pub(crate) fn clear_frames(&mut self) {
        self.frames.clear();
    }

    /// Frees memory that only a busy channel needs.
    pub(super) fn shrink(&mut self) {
        self.frames.shrink();
        if self.events.capacity() > SPARE && self.events.capacity() > self.events.len() * 4 {
            self.events.shrink_to_fit();
        }
    }

    // === reading ===

    /// The next events for a reader at `position`, which moves past them.
    #[inline]
    pub(super) fn step(&mut self, request: &StepRequest<'_>, position: &mut Position) -> ReadStep {
        if position.epoch != self.epoch() || position.offset + 1 < self.start() {
            let (at, gap) = self.bounds.resolve(request.channel, Start::After(*position), self.bounds.time);
            if let Some(gap) = gap {
                *position = at;
                return ReadStep::Gap(gap);
            }
            if self.bounds.is_absent() {
                // The position is kept: a new life is resolved from it.
                return ReadStep::Nothing;
            }
            *position = at;
            if at.epoch != self.epoch() || at.offset + 1 < self.start() {
                return ReadStep::Older;
            }
        }
        if position.offset >= self.top() {
            return ReadStep::Nothing;
        }
        Self::step_through(&self.events, &mut self.frames, request, position)
    }

    /// As [`step`](Self::step), but through older events than those of the ring. One of them must follow `position`.
    pub(super) fn step_older(
        &mut self,
        older: &VecDeque<Arc<Event>>,
        request: &StepRequest<'_>,
        position: &mut Position,
    ) -> ReadStep {
        Self::step_through(older, &mut self.frames, request, position)
    }

    #[inline]
    fn step_through(
        events: &VecDeque<Arc<Event>>,
        frames: &mut FrameCache,
        request: &StepRequest<'_>,
        position: &mut Position,
    ) -> ReadStep {
        let &StepRequest { channel, filter, format, max_events } = request;
        let first = events.front().map_or(position.offset + 1, |event| event.offset);
        let after = |offset: u64| events.range((offset + 1 - first) as usize..);
        let mut bytes = 0;
        let Some(filter) = filter else {
            let from = position.offset + 1;
            let mut to = position.offset;
            for event in after(position.offset).take(max_events) {
                bytes += event.size() + EVENT_COST;
                if bytes > STEP_BYTES && to >= from {
                    break;
                }
                to = event.offset;
            }
            position.offset = to;
            let count = to + 1 - from;
            let bytes = frames.encode(channel, format, (from, to), after(from - 1).take(count as usize));
            return ReadStep::Events { bytes, count: count as u32 };
        };
        let mut shown = Vec::new();
        for event in after(position.offset).take(STEP_SCAN) {
            if filter.matches(event) {
                bytes += event.size() + EVENT_COST;
                if shown.len() == max_events || (bytes > STEP_BYTES && !shown.is_empty()) {
                    break;
                }
                shown.push(event);
            }
            position.offset = event.offset;
        }
        let bytes = match shown.as_slice() {
            [] => return ReadStep::Nothing,
            [one] => frames.encode(channel, format, (one.offset, one.offset), [*one].into_iter()),
            // Which events a filter selects differs from reader to reader: a frame of several is not cached.
            many => format.encode(channel, many.iter().copied()),
        };
        ReadStep::Events { bytes, count: shown.len() as u32 }
    }

    /// Whether a reader at `position` has something to read or to scan.
    pub(super) fn is_behind(&self, position: Position) -> bool {
        !self.bounds.is_absent() && (position.epoch != self.epoch() || position.offset < self.top())
    }

    // === waiting ===

    pub(super) fn join(&mut self) {
        self.frames.join();
    }

    pub(super) fn leave(&mut self) {
        self.frames.leave();
    }

    /// Parks a reader that has read everything.
    pub(super) fn park(&mut self, reader: ParkedReader) -> ParkingKey {
        self.parking.park(reader)
    }

    /// False if the reader was taken: then it is, or will be, in its ready queue.
    pub(super) fn unpark(&mut self, key: ParkingKey) -> bool {
        self.parking.unpark(key)
    }

    /// Takes the readers to wake after an append, once the lock is released.
    pub(crate) fn take_parked(&mut self) -> WakeList {
        self.parking.take()
    }

    #[cfg(test)]
    pub(super) fn parked(&self) -> usize {
        self.parking.len()
    }
}
