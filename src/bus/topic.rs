//! [`Topic`], a channel in use on this node, and its [`Buffer`].

use std::{
    ops::{Deref, DerefMut},
    sync::Arc,
};

use parking_lot::{Mutex, MutexGuard};

use super::{
    gap::{Gap, GapReason},
    log_bounds::LogBounds,
    memory_budget::MemoryBudget,
    parking::{ParkedReader, ParkingKey},
    retention::Retention,
    ring::{ReadStep, Ring, StepRequest},
    wall_clock::WallClock,
    window::{WaitingKey, Window},
};
use crate::{
    channel::Channel,
    position::{Position, Start},
};

/// Memory of a topic beside its events, in bytes.
const TOPIC_COST: usize = 360;

/// A channel in use on this node. It stays in use while anything but the table of topics refers to it.
pub struct Topic {
    channel: Channel,
    retention: Retention,
    clock: WallClock,
    budget: Arc<MemoryBudget>,
    buffer: Mutex<Buffer>,
}

/// The events of a topic: the log itself, or the newest part of one that another server stores.
pub(crate) enum Buffer {
    Log(Ring),
    Window(Window),
}

/// Exclusive access to a buffer. On drop, the change of its memory is accounted for in the budget.
pub(crate) struct BufferGuard<'a> {
    buffer: MutexGuard<'a, Buffer>,
    /// Its memory when the guard was made.
    memory: usize,
    budget: &'a MemoryBudget,
}

/// Place of a reader that waits in a buffer.
#[derive(Clone, Copy, Debug)]
pub(super) enum Parking {
    /// At the head, for the next event.
    Head(ParkingKey),
    /// Behind a window, for older events.
    Behind(WaitingKey),
}

// === impl Topic ===

impl Topic {
    pub(super) fn new(
        channel: Channel,
        retention: Retention,
        clock: WallClock,
        budget: Arc<MemoryBudget>,
        bounds: LogBounds,
    ) -> Self {
        budget.resize(0, TOPIC_COST);
        Topic { channel, retention, clock, budget, buffer: Mutex::new(Buffer::Log(Ring::new(bounds))) }
    }

    pub(crate) fn channel(&self) -> &Channel {
        &self.channel
    }

    /// Retention by this node's rules.
    pub(crate) fn retention(&self) -> &Retention {
        &self.retention
    }

    /// Locks the buffer for reading.
    pub(crate) fn lock(&self) -> MutexGuard<'_, Buffer> {
        self.buffer.lock()
    }

    /// Locks the buffer for a change of its events.
    pub(crate) fn edit(&self) -> BufferGuard<'_> {
        let buffer = self.lock();
        BufferGuard { memory: buffer.memory(), budget: &self.budget, buffer }
    }

    /// See [`LogBounds::resolve`].
    pub(super) fn resolve(&self, start: Start) -> (Position, Option<Gap>) {
        let buffer = self.lock();
        // The clocks of this node and of another server may differ. A position of a channel without a log says since when
        // that is known: one older than necessary is always right.
        let now = if let Buffer::Window(window) = &*buffer { window.bounds().time } else { self.clock.now() };
        buffer.bounds().resolve(&self.channel, start, now)
    }
}

impl Drop for Topic {
    fn drop(&mut self) {
        self.budget.resize(TOPIC_COST + self.buffer.get_mut().memory(), 0);
    }
}

// === impl Buffer ===

impl Buffer {
    fn memory(&self) -> usize {
        match self {
            Buffer::Log(ring) => ring.bytes(),
            Buffer::Window(window) => window.memory(),
        }
    }

    /// The buffer as a window; the first call makes it one.
    pub(crate) fn window(&mut self) -> &mut Window {
        if let Buffer::Log(ring) = self {
            let ring = std::mem::replace(ring, Ring::new(LogBounds::absent(0, None)));
            *self = Buffer::Window(Window::new(ring));
        }
        match self {
            Buffer::Window(window) => window,
            Buffer::Log(_) => unreachable!("it has just been made a window"),
        }
    }

    /// See [`Ring::step`] and [`Window::step`].
    #[inline]
    pub(super) fn step(&mut self, request: &StepRequest<'_>, position: &mut Position) -> ReadStep {
        match self {
            Buffer::Log(ring) => ring.step(request, position),
            Buffer::Window(window) => window.step(request, position),
        }
    }

    /// False if the reader was taken: then it is, or will be, in its ready queue.
    pub(super) fn unpark(&mut self, parking: Parking) -> bool {
        match (parking, self) {
            (Parking::Head(key), buffer) => buffer.deref_mut().unpark(key),
            (Parking::Behind(key), Buffer::Window(window)) => window.unpark_behind(key),
            (Parking::Behind(_), Buffer::Log(_)) => false,
        }
    }

    /// See [`Window::park_behind`].
    pub(super) fn park_behind(&mut self, position: Position, reader: ParkedReader) -> (Parking, bool) {
        let (key, first) = self.window().park_behind(position, reader);
        (Parking::Behind(key), first)
    }

    pub(super) fn shrink(&mut self) {
        match self {
            Buffer::Log(ring) => ring.shrink(),
            Buffer::Window(window) => window.shrink(),
        }
    }

    /// Whether the topic can leave the table without a loss of events.
    pub(super) fn is_disposable(&self) -> bool {
        matches!(self, Buffer::Window(_)) || self.events().is_empty()
    }

    /// The bounds to remember when the topic leaves the table; `None` if another server stores the log. `now` is in Unix
    /// milliseconds.
    pub(super) fn ended(&self, now: u64) -> Option<LogBounds> {
        let Buffer::Log(ring) = self else { return None };
        Some(ring.bounds().ended(now, GapReason::Reset)).filter(|ended| ended.previous.is_some())
    }

    /// Readers that wait in the buffer.
    #[cfg(test)]
    pub(super) fn parked(&self) -> usize {
        let behind = if let Buffer::Window(window) = self { window.waiting() } else { 0 };
        self.deref().parked() + behind
    }
}

impl Deref for Buffer {
    type Target = Ring;

    fn deref(&self) -> &Ring {
        match self {
            Buffer::Log(ring) => ring,
            Buffer::Window(window) => window,
        }
    }
}

impl DerefMut for Buffer {
    fn deref_mut(&mut self) -> &mut Ring {
        match self {
            Buffer::Log(ring) => ring,
            Buffer::Window(window) => window,
        }
    }
}

// === impl BufferGuard ===

impl Deref for BufferGuard<'_> {
    type Target = Buffer;

    fn deref(&self) -> &Buffer {
        &self.buffer
    }
}

impl DerefMut for BufferGuard<'_> {
    fn deref_mut(&mut self) -> &mut Buffer {
        &mut self.buffer
    }
}

impl Drop for BufferGuard<'_> {
    fn drop(&mut self) {
        self.budget.resize(self.memory, self.buffer.memory());
    }
}
