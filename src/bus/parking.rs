//! Readers without anything to read: [`ParkingLot`], where a channel keeps them, and [`ReadyQueue`], where they are put
//! when they can go on.

use std::{sync::Arc, task::Waker};

use futures_util::task::AtomicWaker;
use parking_lot::Mutex;
use slab::Slab;

/// Readers woken at once; the rest are woken by a task.
const INLINE: usize = 32;
/// A queue of ready readers that grew beyond this is freed when it is empty.
const SPARE: usize = 64;

/// The subscriptions of one connection that have something to read.
#[derive(Default)]
pub(super) struct ReadyQueue {
    waker: AtomicWaker,
    ready: Mutex<Vec<ReaderId>>,
}

/// A subscription of a connection. The generation tells it from the one that had the slot before.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct ReaderId {
    pub(super) slot: u32,
    pub(super) generation: u32,
}

/// A reader that waits in a channel.
pub(super) struct ParkedReader {
    pub(super) queue: Arc<ReadyQueue>,
    pub(super) reader: ReaderId,
}

/// The readers of a channel that have read everything.
#[derive(Default)]
pub(super) struct ParkingLot {
    parked: Slab<ParkedReader>,
    /// Counts the appends that took all readers: a key is valid for one round.
    round: u32,
}

/// Place of a parked reader.
#[derive(Clone, Copy, Debug)]
pub(super) struct ParkingKey {
    index: u32,
    round: u32,
}

/// Readers to wake. The caller wakes them after it has released the lock of their channel.
#[must_use = "a reader that is not woken waits forever"]
#[derive(Default)]
pub(crate) struct WakeList(Slab<ParkedReader>);

// === impl ReadyQueue ===

impl ReadyQueue {
    /// Registers the task to wake, then passes each ready reader to `each`.
    pub(super) fn drain(&self, waker: &Waker, each: impl FnMut(ReaderId)) {
        // Registered first: a wake-up between the two would be lost otherwise.
        self.waker.register(waker);
        let mut ready = self.ready.lock();
        ready.drain(..).for_each(each);
        if ready.capacity() > SPARE {
            *ready = Vec::new();
        }
    }

    #[cfg(test)]
    pub(super) fn readers(&self) -> Vec<ReaderId> {
        self.ready.lock().clone()
    }
}

// === impl ParkedReader ===

impl ParkedReader {
    /// Puts the reader into its queue, and wakes the task if the queue was empty.
    fn wake(self) {
        let mut ready = self.queue.ready.lock();
        let first = ready.is_empty();
        ready.push(self.reader);
        drop(ready);
        if first {
            self.queue.waker.wake();
        }
    }
}

// === impl ParkingLot ===

impl ParkingLot {
    pub(super) fn park(&mut self, reader: ParkedReader) -> ParkingKey {
        if self.parked.capacity() == 0 {
            // Most channels have one reader, and a slab begins with room for four.
            self.parked = Slab::with_capacity(1);
        }
        ParkingKey { index: self.parked.insert(reader) as u32, round: self.round }
    }

    /// False if the reader was taken: then it is, or will be, in its ready queue.
    pub(super) fn unpark(&mut self, key: ParkingKey) -> bool {
        key.round == self.round && self.parked.try_remove(key.index as usize).is_some()
    }

    /// Takes all readers, to wake them.
    pub(super) fn take(&mut self) -> WakeList {
        self.round = self.round.wrapping_add(1);
        let room = Slab::with_capacity(if self.parked.len() > 1 { self.parked.len() } else { 0 });
        WakeList(std::mem::replace(&mut self.parked, room))
    }

    #[cfg(test)]
    pub(super) fn len(&self) -> usize {
        self.parked.len()
    }
}

// === impl WakeList ===

impl WakeList {
    pub(crate) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    pub(super) fn push(&mut self, reader: ParkedReader) {
        self.0.insert(reader);
    }

    /// Wakes a few readers at once and the rest from a task that yields in between: otherwise a channel with 100,000
    /// readers delays every call by half a second.
    pub(crate) fn wake(self) {
        let mut readers = self.0.into_iter().map(|(_, reader)| reader);
        if readers.len() > INLINE
            && let Ok(runtime) = tokio::runtime::Handle::try_current()
        {
            runtime.spawn(async move {
                loop {
                    readers.by_ref().take(INLINE).for_each(ParkedReader::wake);
                    if readers.len() == 0 {
                        break;
                    }
                    tokio::task::yield_now().await;
                }
            });
        } else {
            readers.for_each(ParkedReader::wake);
        }
    }
}
