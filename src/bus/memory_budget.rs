//! [`MemoryBudget`], the memory that all topics of a node share.

use std::sync::{
    Arc,
    atomic::{AtomicU64, AtomicUsize, Ordering::Relaxed},
};

/// Memory of all topics and idempotency keys, in bytes, and its upper bound. Memory is
/// accounted for through guards, so that `used` goes down when its holder is dropped.
pub(crate) struct MemoryBudget {
    limit: usize,
    used: AtomicUsize,
    /// Events removed early to keep the limit.
    evicted: AtomicU64,
}

/// Memory accounted for until this is dropped.
pub(crate) struct MemoryCharge {
    budget: Arc<MemoryBudget>,
    bytes: usize,
}

impl MemoryBudget {
    pub(crate) fn new(limit: usize) -> Self {
        MemoryBudget { limit, used: AtomicUsize::new(0), evicted: AtomicU64::new(0) }
    }

    pub(crate) fn limit(&self) -> usize {
        self.limit
    }

    pub(crate) fn used(&self) -> usize {
        self.used.load(Relaxed)
    }

    pub(crate) fn evicted(&self) -> u64 {
        self.evicted.load(Relaxed)
    }

    pub(crate) fn add_evicted(&self, events: usize) {
        self.evicted.fetch_add(events as u64, Relaxed);
    }

    /// Accounts for memory that grew or shrank.
    pub(super) fn resize(&self, before: usize, after: usize) {
        match after.checked_sub(before) {
            Some(grown) => self.used.fetch_add(grown, Relaxed),
            None => self.used.fetch_sub(before - after, Relaxed),
        };
    }
}

impl MemoryCharge {
    pub(crate) fn new(budget: Arc<MemoryBudget>) -> Self {
        MemoryCharge { budget, bytes: 0 }
    }

    pub(crate) fn budget(&self) -> &MemoryBudget {
        &self.budget
    }

    pub(crate) fn resize(&mut self, bytes: usize) {
        self.budget.resize(self.bytes, bytes);
        self.bytes = bytes;
    }
}

impl Drop for MemoryCharge {
    fn drop(&mut self) {
        self.resize(0);
    }
}
