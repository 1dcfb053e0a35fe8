//! Notices a consumer that polls in a hot loop: the same page again and again, because nobody commits.

use std::{
    hash::{BuildHasher as _, Hash},
    sync::atomic::{AtomicU64, Ordering::Relaxed},
    time::{SystemTime, UNIX_EPOCH},
};

use foldhash::fast::RandomState;

/// From this serving on within a second, a page counts as repeated.
const TOO_OFTEN: u64 = 3;
/// Bits of a place that are the count, and above them those that are the second.
const COUNT_BITS: u32 = 8;
const SECOND_BITS: u32 = 16;

/// A place per hash: two busy consumers may share one and hide each other. It is a hint, and so bounded and without locks.
#[derive(Debug)]
pub(super) struct Repeats {
    places: Box<[AtomicU64]>,
    hasher: RandomState,
}

impl Default for Repeats {
    fn default() -> Self {
        Repeats { places: (0..1024).map(|_| AtomicU64::new(0)).collect(), hasher: RandomState::default() }
    }
}

impl Repeats {
    /// Whether `page` was served too often within the second that is now.
    pub fn served(&self, page: impl Hash) -> bool {
        let seconds = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |time| time.as_secs());
        self.served_at(page, seconds)
    }

    fn served_at(&self, page: impl Hash, seconds: u64) -> bool {
        let hash = self.hasher.hash_one(page);
        let place = &self.places[hash as usize % self.places.len()];
        let second = (seconds % (1 << SECOND_BITS)) << COUNT_BITS;
        let low = COUNT_BITS + SECOND_BITS;
        let name = ((hash >> low) << low) | second;
        let before = place.load(Relaxed);
        let most = (1 << COUNT_BITS) - 1;
        let count = if before & !most == name { (before & most) + 1 } else { 1 };
        // A serving that is lost to another at the same moment makes no difference.
        place.store(name | count.min(most), Relaxed);
        count >= TOO_OFTEN
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_third_within_a_second() {
        let repeats = Repeats::default();
        let served = |page, second| repeats.served_at(page, second);
        assert_eq!([served("a", 1), served("a", 1), served("a", 1), served("a", 1)], [false, false, true, true]);
        assert_eq!([served("a", 2), served("b", 2), served("c", 2)], [false; 3]);
        assert!((0..1000).all(|n| !served("slow", n + 10)));
        assert!((0..1000).map(|_| served("hot", 9)).filter(|hot| *hot).count() == 998);
    }
}
