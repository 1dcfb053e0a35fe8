//! Changes of the providers of services, for the channel `$services`.

use std::{
    collections::{BTreeMap, VecDeque},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering::Relaxed},
    },
};

use parking_lot::Mutex;
use serde::Serialize;
use tokio::sync::Notify;

use super::tables::{ServiceEntry, ServiceState};

/// A service after its providers changed: the data of an event on `$services`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct ServiceChange {
    pub service: String,
    pub providers: usize,
    pub exclusive: bool,
    #[serde(skip)]
    pub kind: ServiceChangeKind,
}

/// A change that is about to be published. Unless it [was published](Self::published) when it is dropped, it is queued
/// again, and returned with the providers of that moment.
pub struct UnpublishedChange {
    change: ServiceChange,
    taken: u64,
    /// None once it was published.
    service: Option<Arc<ServiceEntry>>,
    unpublished: Arc<Mutex<Unpublished>>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ServiceChangeKind {
    /// More providers than last published, or an exclusive one replaced.
    Provided,
    Withdrawn,
}

/// Queue of changes. It holds each service at most once and therefore grows with the services, not with their changes.
///
/// All nodes see all changes and the leader publishes them. The other nodes keep what they saw last, because a leader that
/// dies may not have published it; the leader keeps what it could not publish. A change that is published late reports the
/// providers of that moment.
#[derive(Default)]
pub(super) struct ServiceChanges {
    queue: Mutex<VecDeque<Arc<ServiceEntry>>>,
    ready: Notify,
    unpublished: Arc<Mutex<Unpublished>>,
    /// When this node was last cut off from all others, and had no leader.
    cut_off: AtomicU64,
    leads: AtomicBool,
}

/// By name, with the time of the change.
type Unpublished = BTreeMap<Arc<str>, (u64, Arc<ServiceEntry>)>;

impl UnpublishedChange {
    pub fn change(&self) -> &ServiceChange {
        &self.change
    }

    /// States that it was published, or never can be.
    pub fn published(mut self) {
        self.service = None;
    }
}

impl Drop for UnpublishedChange {
    fn drop(&mut self) {
        let Some(service) = self.service.take() else { return };
        let mut unpublished = self.unpublished.lock();
        // The same service may have changed again.
        if !unpublished.contains_key(&service.name) {
            ServiceChanges::keep(&mut unpublished, self.taken, service);
        }
    }
}

impl ServiceChangeKind {
    /// The event's type.
    pub const fn as_str(self) -> &'static str {
        match self {
            ServiceChangeKind::Provided => "provided",
            ServiceChangeKind::Withdrawn => "withdrawn",
        }
    }
}

impl ServiceChanges {
    /// Services beyond which changes are dropped.
    const MAX: usize = 65_536;
    /// How long this node keeps a change that the leader has to publish, in milliseconds: longer than it takes to notice
    /// that the leader is dead.
    const KEPT: u64 = 15_000;

    /// Queues a service whose state is locked by the caller.
    pub(super) fn mark(&self, service: &Arc<ServiceEntry>, state: &mut ServiceState) {
        if state.marks.changed {
            return;
        }
        let mut queue = self.queue.lock();
        if queue.len() < Self::MAX {
            state.marks.changed = true;
            queue.push_back(service.clone());
            drop(queue);
            self.ready.notify_one();
        }
    }

    /// Waits until there may be a change.
    pub(super) async fn ready(&self) {
        self.ready.notified().await;
    }

    /// The changes that this node has to publish, which are none unless it `leads`.
    pub(super) fn take(&self, leads: bool, now: u64) -> Vec<UnpublishedChange> {
        let changed = std::mem::take(&mut *self.queue.lock());
        let mut unpublished = self.unpublished.lock();
        let mut due = Vec::new();
        // A leader keeps its own backlog without limit of time.
        if !(self.leads.swap(leads, Relaxed) && leads) {
            let cut_off = self.cut_off.load(Relaxed);
            unpublished.retain(|_, (since, _)| now < cut_off.max(*since) + Self::KEPT);
        }
        for service in changed {
            let Some(change) = Self::take_change(&service) else { continue };
            if leads {
                unpublished.remove(&service.name);
                due.push(self.unpublished(change, service, now));
            } else {
                Self::keep(&mut unpublished, now, service);
            }
        }
        if leads {
            let backlog = std::mem::take(&mut *unpublished).into_values();
            due.extend(backlog.map(|(_, service)| self.unpublished(Self::current(&service), service, now)));
        }
        due
    }

    fn unpublished(&self, change: ServiceChange, service: Arc<ServiceEntry>, taken: u64) -> UnpublishedChange {
        UnpublishedChange { change, taken, service: Some(service), unpublished: self.unpublished.clone() }
    }

    fn keep(unpublished: &mut Unpublished, now: u64, service: Arc<ServiceEntry>) {
        if unpublished.len() < Self::MAX || unpublished.contains_key(&service.name) {
            unpublished.insert(service.name.clone(), (now, service));
        }
    }

    /// Wakes the publisher if this node leads and has a backlog. `cut_off`: no other node can be reached, so none leads.
    pub(super) fn sweep(&self, leads: bool, cut_off: bool, now: u64) {
        if cut_off {
            self.cut_off.store(now, Relaxed);
        }
        if leads && !self.unpublished.lock().is_empty() {
            self.ready.notify_one();
        }
    }

    fn current(service: &ServiceEntry) -> ServiceChange {
        let state = service.state.lock();
        let providers = state.providers.count();
        let kind = if providers > 0 { ServiceChangeKind::Provided } else { ServiceChangeKind::Withdrawn };
        ServiceChange { service: service.name.to_string(), providers, exclusive: state.providers.is_exclusive(), kind }
    }

    /// The change since this was last called, unless it was undone meanwhile.
    fn take_change(service: &ServiceEntry) -> Option<ServiceChange> {
        let mut state = service.state.lock();
        state.marks.changed = false;
        let providers = state.providers.count();
        let replaced = std::mem::take(&mut state.marks.replaced);
        let before = std::mem::replace(&mut state.marks.published, providers);
        let kind = match () {
            () if providers > before || replaced && providers > 0 => ServiceChangeKind::Provided,
            () if providers < before => ServiceChangeKind::Withdrawn,
            () => return None,
        };
        Some(ServiceChange {
            service: service.name.to_string(),
            providers,
            exclusive: state.providers.is_exclusive(),
            kind,
        })
    }
}
