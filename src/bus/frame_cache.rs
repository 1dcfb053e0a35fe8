//! [`FrameCache`], the encoded events that the readers of a channel share.

use std::{collections::VecDeque, sync::Arc};

use bytes::Bytes;

use super::format::Format;
use crate::{channel::Channel, event::Event};

/// Largest number of frames in a cache.
const FRAMES: usize = 16;
/// Largest number of bytes in a cache, without its newest frame.
const FRAME_BYTES: usize = 256 * 1024;

/// Frames that were encoded lately, while the channel has several readers. The memory budget does not know of them.
#[derive(Default)]
pub(super) struct FrameCache {
    frames: VecDeque<CachedFrame>,
    readers: u32,
}

/// The events `from..=to`, encoded.
struct CachedFrame {
    format: &'static Format,
    from: u64,
    to: u64,
    bytes: Bytes,
}

impl FrameCache {
    /// Subscriptions of the channel, parked or not.
    pub(super) fn readers(&self) -> u32 {
        self.readers
    }

    pub(super) fn join(&mut self) {
        self.readers += 1;
    }

    pub(super) fn leave(&mut self) {
        self.readers -= 1;
        if self.readers <= 1 {
            self.shrink();
        }
    }

    /// The `events`, whose offsets are `from..=to`, encoded; shared if another reader may want the same.
    pub(super) fn encode<'a>(
        &mut self,
        channel: &Channel,
        format: &'static Format,
        (from, to): (u64, u64),
        events: impl Iterator<Item = &'a Arc<Event>>,
    ) -> Bytes {
        let known = |frame: &&CachedFrame| (frame.to, frame.from) == (to, from) && std::ptr::eq(frame.format, format);
        if let Some(frame) = self.frames.iter().rev().find(known) {
            return frame.bytes.clone();
        }
        let bytes = format.encode(channel, events);
        if self.readers > 1 {
            // A channel of large events must not store all of them twice.
            let mut held: usize = self.frames.iter().map(|frame| frame.bytes.len()).sum();
            while self.frames.len() == FRAMES || held > FRAME_BYTES {
                let Some(oldest) = self.frames.pop_front() else { break };
                held -= oldest.bytes.len();
            }
            self.frames.push_back(CachedFrame { format, from, to, bytes: bytes.clone() });
        }
        bytes
    }

    /// Removes the frames of events that no longer exist.
    pub(super) fn clear(&mut self) {
        self.frames.clear();
    }

    /// Frees all frames.
    pub(super) fn shrink(&mut self) {
        if self.frames.capacity() > 0 {
            self.frames = VecDeque::new();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        event::{Draft, DraftParts, EventData},
        position::{Epoch, Position},
    };

    #[test]
    fn frames_of_large_events_are_not_all_cached() {
        static TEXT: Format =
            Format { open: |_| {}, event: |channel, event, out| event.write_json(channel, out), close: |_| {} };
        let channel = Channel::parse("a").unwrap();
        let mut cache = FrameCache::default();
        cache.join();
        cache.join();
        let text = "x".repeat(100_000);
        let epoch = Epoch::random();
        for offset in 1..=20 {
            let parts = DraftParts { data: EventData::Text(&text), ..DraftParts::default() };
            let event = Arc::new(Draft::new(parts, 1_000_000).unwrap().place(Position { epoch, offset }, 1000));
            let mut encode = || cache.encode(&channel, &TEXT, (offset, offset), [&event].into_iter());
            let frame = encode();
            assert_eq!(encode().as_ptr(), frame.as_ptr(), "the newest is shared");
            let held: usize = cache.frames.iter().map(|frame| frame.bytes.len()).sum();
            assert!(held <= FRAME_BYTES + frame.len(), "{held}");
        }
    }
}
