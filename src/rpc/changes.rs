//! Providers that came and went, for the channel `$services`.

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

use super::services::{Service, State};

/// Where a service stands after its providers changed: the data of an event on `$services`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct ServiceChange {
    pub service: String,
    pub providers: usize,
    pub exclusive: bool,
    #[serde(skip)]
    pub kind: ServiceChangeKind,
}

/// A change that somebody is about to tell.
#[must_use = "what was not told has to be given back"]
pub struct UnpublishedChange {
    pub change: ServiceChange,
    service: Arc<Service>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ServiceChangeKind {
    /// More providers than last told, or an exclusive one replaced.
    Provided,
    Withdrawn,
}

/// Each service is in it at most once, so it grows with services and not with what they do.
///
/// All nodes see all changes, and the one that leads tells them. The others keep what they have seen last: of that, the one
/// that leads next may have told nothing. So does the one that leads with what it could not tell. What is told late is told
/// as it stands then.
#[derive(Default)]
pub(super) struct Changes {
    queue: Mutex<VecDeque<Arc<Service>>>,
    some: Notify,
    untold: Mutex<Untold>,
    /// When this node was last on its own, and none led it.
    alone: AtomicU64,
    leads: AtomicBool,
}

/// By name; since when.
type Untold = BTreeMap<Arc<str>, (u64, Arc<Service>)>;

impl ServiceChangeKind {
    /// The event's type.
    pub const fn as_str(self) -> &'static str {
        match self {
            ServiceChangeKind::Provided => "provided",
            ServiceChangeKind::Withdrawn => "withdrawn",
        }
    }
}

impl Changes {
    /// Services beyond which changes are not told.
    const MOST: usize = 65_536;
    /// How long another node has to tell a change: longer than it takes to see that the one which leads is gone.
    const REMEMBERED: u64 = 15_000;

    pub fn mark(&self, service: &Arc<Service>, state: &mut State) {
        if state.dirty {
            return;
        }
        let mut queue = self.queue.lock();
        if queue.len() < Self::MOST {
            state.dirty = true;
            queue.push_back(service.clone());
            drop(queue);
            self.some.notify_one();
        }
    }

    /// Waits until there may be something to tell.
    pub async fn some(&self) {
        self.some.notified().await;
    }

    /// What is to be told now, at `now`, by this node if it `leads`.
    pub fn take(&self, leads: bool, now: u64) -> Vec<UnpublishedChange> {
        let changed = std::mem::take(&mut *self.queue.lock());
        let mut untold = self.untold.lock();
        let mut told = Vec::new();
        // What it has to tell itself it does not forget.
        if !(self.leads.swap(leads, Relaxed) && leads) {
            let alone = self.alone.load(Relaxed);
            untold.retain(|_, (since, _)| now < alone.max(*since) + Self::REMEMBERED);
        }
        for service in changed {
            let Some(change) = Self::settle(&service) else { continue };
            if leads {
                untold.remove(&service.name);
                told.push(UnpublishedChange { change, service });
            } else {
                Self::keep(&mut untold, now, service);
            }
        }
        if leads {
            let late = std::mem::take(&mut *untold).into_values();
            told.extend(late.map(|(_, service)| UnpublishedChange { change: Self::stands(&service), service }));
        }
        told
    }

    /// Could not be told: it comes again, unless something newer is to be told of the same service.
    pub fn give_back(&self, tellings: impl Iterator<Item = UnpublishedChange>, now: u64) {
        let mut untold = self.untold.lock();
        for telling in tellings {
            if !untold.contains_key(&telling.service.name) {
                Self::keep(&mut untold, now, telling.service);
            }
        }
    }

    fn keep(untold: &mut Untold, now: u64, service: Arc<Service>) {
        if untold.len() < Self::MOST || untold.contains_key(&service.name) {
            untold.insert(service.name.clone(), (now, service));
        }
    }

    /// Whether this node leads and has something left to tell. `alone`: no other can be reached, so none tells anything.
    pub fn look(&self, leads: bool, alone: bool, now: u64) {
        if alone {
            self.alone.store(now, Relaxed);
        }
        if leads && !self.untold.lock().is_empty() {
            self.some.notify_one();
        }
    }

    fn stands(service: &Service) -> ServiceChange {
        let state = service.state.lock();
        let providers = state.providers();
        let kind = if providers > 0 { ServiceChangeKind::Provided } else { ServiceChangeKind::Withdrawn };
        ServiceChange { service: service.name.to_string(), providers, exclusive: state.is_exclusive(), kind }
    }

    fn settle(service: &Service) -> Option<ServiceChange> {
        let mut state = service.state.lock();
        state.dirty = false;
        let providers = state.providers();
        let replaced = std::mem::take(&mut state.replaced);
        let before = std::mem::replace(&mut state.announced, providers);
        let kind = match () {
            () if providers > before || replaced && providers > 0 => ServiceChangeKind::Provided,
            () if providers < before => ServiceChangeKind::Withdrawn,
            // Came and went between two questions.
            () => return None,
        };
        Some(ServiceChange { service: service.name.to_string(), providers, exclusive: state.is_exclusive(), kind })
    }
}
