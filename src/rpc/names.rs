//! Which services there are: a table of names that gives back what came and went.

use std::sync::{Arc, atomic::Ordering::Relaxed};

use super::{
    Hub, REMEMBERED, Shard,
    route::no_provider,
    services::{Request, Service, State},
};
use crate::{channel::check_label, error::Result};

impl Hub {
    fn shard(&self, name: &str) -> &Shard {
        let bytes = name.as_bytes();
        let mixed = bytes.len() + usize::from(*bytes.first().unwrap_or(&0)) + usize::from(*bytes.last().unwrap_or(&0));
        &self.names[mixed % Self::SHARDS]
    }

    pub(super) fn find(&self, name: &str) -> Option<Arc<Service>> {
        self.shard(name).lock().get(name).cloned()
    }

    pub(super) fn find_or_create(&self, name: &str) -> Arc<Service> {
        let mut shard = self.shard(name).lock();
        if let Some(service) = shard.get(name) {
            return service.clone();
        }
        let service = Arc::new(Service::new(name));
        shard.insert(service.name.clone(), service.clone());
        service
    }

    /// The service of a call; one that nobody ever provided only if the call is to wait for it.
    pub(super) fn find_for(&self, name: &str, request: &Request<'_>) -> Result<Arc<Service>> {
        if let Some(service) = self.find(name) {
            return Ok(service);
        }
        check_label("service", name)?;
        match request.wait {
            Some(1..) => Ok(self.find_or_create(name)),
            _ => Err(no_provider(name)),
        }
    }

    /// Takes back what [`find_for`](Self::find_for) may have made for a call that does not wait after all.
    pub(super) fn forget_unused(&self, service: &Arc<Service>, request: &Request<'_>) {
        if request.wait.is_some() {
            self.forget(service, self.clock.now(), false);
        }
    }

    /// Takes a service from the table that is deserted and whose time is over, or cut short.
    pub(super) fn forget(&self, service: &Arc<Service>, now: u64, cut: bool) {
        let mut shard = self.shard(&service.name).lock();
        let mut state = service.state.lock();
        if cut {
            // What is still in it may finish; after that nothing holds the name.
            state.left = None;
        }
        let over = state.left.is_none_or(|left| now >= left + REMEMBERED.as_millis() as u64);
        if over && state.is_deserted() && !state.dead {
            state.dead = true;
            shard.remove(&service.name);
        }
    }

    pub(super) fn forget_left(&self, now: u64) {
        let time = REMEMBERED.as_millis() as u64;
        loop {
            let (service, full) = {
                let mut remembered = self.remembered.lock();
                let full = remembered.len() > self.config.services;
                if !remembered.front().is_some_and(|(left, _)| full || now >= left + time) {
                    return;
                }
                let Some((_, service)) = remembered.pop_front() else { return };
                (service, full)
            };
            let mut state = service.state.lock();
            let left = state.left.filter(|left| !full && now < left + time);
            state.remembered = left.is_some();
            drop(state);
            match left {
                // It came and went again since.
                Some(left) => self.remembered.lock().push_back((left, service)),
                None => self.forget(&service, now, true),
            }
        }
    }

    /// Brings the hub's books up to date with a service whose providers changed. The lock of `state` is held.
    pub(super) fn touched(&self, service: &Arc<Service>, state: &mut State) {
        let here = state.here() > 0;
        if here != state.counted {
            state.counted = here;
            match here {
                true => self.provided.fetch_add(1, Relaxed),
                false => self.provided.fetch_sub(1, Relaxed),
            };
        }
        let providers = state.providers();
        if (providers > 0) != state.present {
            state.present = providers > 0;
            let now = self.clock.now();
            state.left = (!state.present).then_some(now);
            if !state.present && !std::mem::replace(&mut state.remembered, true) {
                self.remembered.lock().push_back((now, service.clone()));
            }
        }
        state.keep_or_release();
        if state.is_tenured() && !std::mem::replace(&mut state.tenured, true) {
            self.tenured.lock().push(service.clone());
        }
        if providers != state.announced || state.replaced {
            self.changes.mark(service, state);
        }
    }
}
