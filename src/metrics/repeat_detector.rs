//! [`RepeatDetector`]: detects consumers that read the same page in a hot loop because they do not commit.

use std::{
    hash::{BuildHasher as _, Hash},
    sync::atomic::{AtomicU64, Ordering::Relaxed},
    time::{SystemTime, UNIX_EPOCH},
};

use foldhash::fast::RandomState;

/// The number of reads within a second from which on a page counts as repeated.
const THRESHOLD: u64 = 3;
/// A slot holds a count in its lowest bits, then the second that it counts, then a part of the hash of the page.
const COUNT_BITS: u32 = 8;
const SECOND_BITS: u32 = 16;

/// Two busy consumers may share a slot and hide each other: the result is a hint, in exchange for bounded memory and no
/// locks.
#[derive(Debug)]
pub(super) struct RepeatDetector {
    slots: Box<[AtomicU64]>,
    hasher: RandomState,
}

impl Default for RepeatDetector {
    fn default() -> Self {
        RepeatDetector { slots: (0..1024).map(|_| AtomicU64::new(0)).collect(), hasher: RandomState::default() }
    }
}

impl RepeatDetector {
    /// Counts a read of `page`. True: it was read too often within this second.
    pub(super) fn is_repeated(&self, page: impl Hash) -> bool {
        let seconds = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |time| time.as_secs());
        self.is_repeated_at(page, seconds)
    }

    fn is_repeated_at(&self, page: impl Hash, seconds: u64) -> bool {
        let hash = self.hasher.hash_one(page);
        let slot = &self.slots[hash as usize % self.slots.len()];
        let second = (seconds % (1 << SECOND_BITS)) << COUNT_BITS;
        let low = COUNT_BITS + SECOND_BITS;
        let key = ((hash >> low) << low) | second;
        let before = slot.load(Relaxed);
        let max = (1 << COUNT_BITS) - 1;
        let count = if before & !max == key { (before & max) + 1 } else { 1 };
        // A concurrent update may be lost, which is harmless.
        slot.store(key | count.min(max), Relaxed);
        count >= THRESHOLD
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_third_read_within_a_second_is_a_repetition() {
        let detector = RepeatDetector::default();
        let read = |page, second| detector.is_repeated_at(page, second);
        assert_eq!([read("a", 1), read("a", 1), read("a", 1), read("a", 1)], [false, false, true, true]);
        assert_eq!([read("a", 2), read("b", 2), read("c", 2)], [false; 3]);
        assert!((0..1000).all(|n| !read("slow", n + 10)));
        assert!((0..1000).map(|_| read("hot", 9)).filter(|hot| *hot).count() == 998);
    }
}
