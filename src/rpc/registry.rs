//! The registry of services: a table of names that keeps a name for a minute after its last provider, and no longer.

use std::{
    collections::{HashMap, VecDeque},
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering::Relaxed},
    },
    time::Duration,
};

use foldhash::fast::RandomState;
use parking_lot::Mutex;

use super::{
    changes::ServiceChanges,
    tables::{ServiceEntry, ServiceState},
};

/// How long a service without providers stays known: its calls wait for a new provider, as during a deployment.
const REMEMBERED: Duration = Duration::from_secs(60);

const SHARDS: usize = 16;

type RegistryShard = Mutex<HashMap<Arc<str>, Arc<ServiceEntry>, RandomState>>;

#[derive(Default)]
pub(super) struct ServiceRegistry {
    shards: [RegistryShard; SHARDS],
    /// Services that have a provider on this node.
    provided: AtomicUsize,
    /// Services that have calls, and therefore deadlines.
    ticking: Mutex<Vec<Arc<ServiceEntry>>>,
    /// Services whose last provider left, and when.
    remembered: Mutex<VecDeque<(u64, Arc<ServiceEntry>)>>,
    /// Services whose names this node holds in the cluster.
    leased: Mutex<Vec<Arc<ServiceEntry>>>,
    pub(super) changes: ServiceChanges,
}

impl ServiceRegistry {
    fn shard(&self, name: &str) -> &RegistryShard {
        let bytes = name.as_bytes();
        let mixed = bytes.len() + usize::from(*bytes.first().unwrap_or(&0)) + usize::from(*bytes.last().unwrap_or(&0));
        &self.shards[mixed % SHARDS]
    }

    pub(super) fn find(&self, name: &str) -> Option<Arc<ServiceEntry>> {
        self.shard(name).lock().get(name).cloned()
    }

    pub(super) fn find_or_create(&self, name: &str) -> Arc<ServiceEntry> {
        let mut shard = self.shard(name).lock();
        if let Some(service) = shard.get(name) {
            return service.clone();
        }
        let service = Arc::new(ServiceEntry::new(name));
        shard.insert(service.name.clone(), service.clone());
        service
    }

    /// All services whose name begins with `prefix`, by name.
    pub(super) fn list(&self, prefix: &str) -> Vec<Arc<ServiceEntry>> {
        let mut found = Vec::new();
        for shard in &self.shards {
            let shard = shard.lock();
            found.extend(shard.values().filter(|service| service.name.starts_with(prefix)).cloned());
        }
        found.sort_by(|a, b| a.name.cmp(&b.name));
        found
    }

    /// Services that have a provider on this node.
    pub(super) fn provided(&self) -> usize {
        self.provided.load(Relaxed)
    }

    /// Whether calls may expect a provider: one is here, or left within the last minute.
    pub(super) fn is_expected(state: &ServiceState, now: u64) -> bool {
        state.providers.count() > 0
            || state.calls.flushing
            || state.marks.left.is_some_and(|left| now < left + REMEMBERED.as_millis() as u64)
    }

    /// Has every sweep visit a service, for its calls have deadlines. The lock of `state` is held.
    pub(super) fn tick(&self, service: &Arc<ServiceEntry>, state: &mut ServiceState) {
        if !state.calls.entries.is_empty() && !std::mem::replace(&mut state.marks.ticking, true) {
            self.ticking.lock().push(service.clone());
        }
    }

    /// Visits the services that have calls; false: the service has none left.
    pub(super) fn retain_ticking(&self, visit: impl FnMut(&Arc<ServiceEntry>) -> bool) {
        retain(&self.ticking, visit);
    }

    /// Visits the services whose names this node holds; false: it no longer does.
    pub(super) fn retain_leased(&self, visit: impl FnMut(&Arc<ServiceEntry>) -> bool) {
        retain(&self.leased, visit);
    }

    pub(super) fn remembered(&self) -> usize {
        self.remembered.lock().len()
    }

    pub(super) fn leased(&self) -> usize {
        self.leased.lock().len()
    }

    /// Follows a change of a service's providers. The lock of `state` is held.
    pub(super) fn update(&self, service: &Arc<ServiceEntry>, state: &mut ServiceState, now: u64) {
        let provided = state.providers.count_local() > 0;
        if provided != state.marks.counted {
            state.marks.counted = provided;
            match provided {
                true => self.provided.fetch_add(1, Relaxed),
                false => self.provided.fetch_sub(1, Relaxed),
            };
        }
        let providers = state.providers.count();
        if (providers > 0) != state.marks.present {
            state.marks.present = providers > 0;
            state.marks.left = (!state.marks.present).then_some(now);
            if !state.marks.present && !std::mem::replace(&mut state.marks.remembered, true) {
                self.remembered.lock().push_back((now, service.clone()));
            }
        }
        state.advertise_or_release();
        if state.is_leased() && !std::mem::replace(&mut state.marks.leased, true) {
            self.leased.lock().push(service.clone());
        }
        if providers != state.marks.published || state.marks.replaced {
            self.changes.mark(service, state);
        }
    }

    /// Removes a service that is not in use and whose minute is over. `early`: ends the minute now.
    pub(super) fn forget(&self, service: &Arc<ServiceEntry>, now: u64, early: bool) {
        let mut shard = self.shard(&service.name).lock();
        let mut state = service.state.lock();
        if early {
            // Calls that it still has may finish; after that nothing keeps the name.
            state.marks.left = None;
        }
        if Self::is_forgettable(&state, now) {
            state.marks.dead = true;
            shard.remove(&service.name);
        }
    }

    pub(super) fn is_forgettable(state: &ServiceState, now: u64) -> bool {
        let over = state.marks.left.is_none_or(|left| now >= left + REMEMBERED.as_millis() as u64);
        over && state.is_unused() && !state.marks.dead
    }

    /// Removes the services whose minute is over, and the oldest of more than `max`.
    pub(super) fn forget_expired(&self, now: u64, max: usize) {
        let time = REMEMBERED.as_millis() as u64;
        loop {
            let (service, full) = {
                let mut remembered = self.remembered.lock();
                let full = remembered.len() > max;
                if !remembered.front().is_some_and(|(left, _)| full || now >= left + time) {
                    return;
                }
                let Some((_, service)) = remembered.pop_front() else { return };
                (service, full)
            };
            let mut state = service.state.lock();
            let left = state.marks.left.filter(|left| !full && now < left + time);
            state.marks.remembered = left.is_some();
            drop(state);
            match left {
                // A provider came and left again since.
                Some(left) => self.remembered.lock().push_back((left, service)),
                None => self.forget(&service, now, true),
            }
        }
    }
}

/// The list is not locked while its services are visited.
fn retain(list: &Mutex<Vec<Arc<ServiceEntry>>>, visit: impl FnMut(&Arc<ServiceEntry>) -> bool) {
    let mut services = std::mem::take(&mut *list.lock());
    services.retain(visit);
    list.lock().append(&mut services);
}
