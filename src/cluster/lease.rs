//! [`Lease`]: a name held.

use std::sync::{
    Arc,
    atomic::{AtomicBool, AtomicU64, Ordering::SeqCst},
};

use bytes::Bytes;
use parking_lot::Mutex;
use tokio::sync::Notify;

use super::{Claim, MonotonicClock};

/// A name that this node holds until this is dropped.
#[must_use = "dropped, the name is given back"]
pub struct Lease {
    tenure: Arc<Tenure>,
    keeper: Arc<dyn Keeper>,
}

/// What the holder and the backend share of a lease.
pub struct Tenure {
    pub name: Arc<str>,
    pub claim: Claim,
    /// Of exclusive names; 0 of shared ones.
    pub fence: u64,
    clock: MonotonicClock,
    /// By the clock's milliseconds, with a margin; moved on by each renewal.
    until: AtomicU64,
    lost: AtomicBool,
    changed: Notify,
    info: Mutex<Option<Bytes>>,
}

/// The backend behind a lease.
pub trait Keeper: Send + Sync {
    /// The holder has something else to tell, or nothing.
    fn told(&self, tenure: &Arc<Tenure>);

    /// The lease was dropped. A newer lease of the same name may be there already and stays.
    fn released(&self, tenure: &Arc<Tenure>);

    /// Whether nobody would read what a holder tells.
    fn is_alone(&self) -> bool {
        false
    }
}

impl Lease {
    pub fn new(tenure: Arc<Tenure>, keeper: Arc<dyn Keeper>) -> Self {
        Lease { tenure, keeper }
    }

    /// Of exclusive names.
    pub fn fence(&self) -> Option<u64> {
        (self.tenure.claim == Claim::Exclusive).then_some(self.tenure.fence)
    }

    pub fn claim(&self) -> Claim {
        self.tenure.claim
    }

    /// Whether the name is surely held at this moment. While the others cannot be reached an exclusive lease ceases to
    /// stand before anybody else can have it, and stands again if nobody took it.
    pub fn stands(&self) -> bool {
        self.tenure.stands()
    }

    /// Whether somebody else has it, or may have had it: it will not stand again.
    pub fn is_lost(&self) -> bool {
        self.tenure.is_lost()
    }

    /// Waits until it is lost.
    pub async fn lost(&self) {
        while !self.is_lost() {
            let changed = self.tenure.changed.notified();
            if self.is_lost() {
                return;
            }
            changed.await;
        }
    }

    /// What the others are to know of it. Nothing (`None`) at first.
    pub fn tell(&self, info: Option<Bytes>) {
        if self.keeper.is_alone() || *self.tenure.info.lock() == info {
            return;
        }
        *self.tenure.info.lock() = info;
        self.keeper.told(&self.tenure);
    }

    /// Whether there is nobody to be told.
    pub fn is_alone(&self) -> bool {
        self.keeper.is_alone()
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        self.keeper.released(&self.tenure);
    }
}

impl Tenure {
    /// `until`: milliseconds of `clock`.
    pub fn new(name: Arc<str>, claim: Claim, fence: u64, clock: MonotonicClock, until: u64) -> Arc<Self> {
        Arc::new(Tenure {
            name,
            claim,
            fence,
            clock,
            until: AtomicU64::new(until),
            lost: AtomicBool::new(false),
            changed: Notify::new(),
            info: Mutex::default(),
        })
    }

    pub fn stands(&self) -> bool {
        !self.lost.load(SeqCst) && {
            let until = self.until.load(SeqCst);
            // A name without a limit needs no look at the clock.
            until == u64::MAX || self.clock.now() < until
        }
    }

    pub fn is_lost(&self) -> bool {
        self.lost.load(SeqCst)
    }

    pub fn renew(&self, until: u64) {
        self.until.store(until, SeqCst);
    }

    pub fn lose(&self) {
        self.lost.store(true, SeqCst);
        self.changed.notify_waiters();
    }

    pub fn info(&self) -> Option<Bytes> {
        self.info.lock().clone()
    }
}
