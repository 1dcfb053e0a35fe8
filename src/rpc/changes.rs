//! Providers that came and went, for the channel `$services`.

use std::{
    collections::VecDeque,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering::SeqCst},
    },
};

use parking_lot::Mutex;
use serde::Serialize;
use tokio::sync::Notify;

use super::services::{Service, State};

/// Where a service stands after its providers changed: the data of an event on `$services`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Change {
    pub service: String,
    pub providers: usize,
    pub exclusive: bool,
    #[serde(skip)]
    pub kind: ChangeKind,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ChangeKind {
    /// More providers than last told, or an exclusive one replaced.
    Provided,
    Withdrawn,
}

/// Each service is in it at most once, so it grows with services and not with what they do.
///
/// All nodes see all changes, and the one that leads tells them. The others keep what they have seen last: of that, the one
/// that leads next may have told nothing.
#[derive(Default)]
pub(super) struct Changes {
    queue: Mutex<VecDeque<Arc<Service>>>,
    some: Notify,
    untold: Mutex<VecDeque<(u64, Arc<Service>)>>,
    leads: AtomicBool,
}

impl ChangeKind {
    /// The event's type.
    pub const fn as_str(self) -> &'static str {
        match self {
            ChangeKind::Provided => "provided",
            ChangeKind::Withdrawn => "withdrawn",
        }
    }
}

impl Changes {
    /// Services that came and went while nobody asked, beyond which changes are not told.
    const MOST: usize = 65_536;
    /// Changes that another node should tell.
    const MOST_UNTOLD: usize = 4_096;
    /// How long they are kept: longer than it takes to see that the node which leads is gone.
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
    pub fn take(&self, leads: bool, now: u64) -> Vec<Change> {
        let changed = std::mem::take(&mut *self.queue.lock());
        let mut untold = self.untold.lock();
        untold.retain(|(since, _)| now < since + Self::REMEMBERED);
        let led = self.leads.swap(leads, SeqCst);
        let mut told = Vec::new();
        for service in changed {
            let Some(change) = Self::settle(&service) else { continue };
            untold.retain(|(_, other)| !Arc::ptr_eq(other, &service));
            if leads {
                told.push(change);
            } else if untold.len() < Self::MOST_UNTOLD {
                untold.push_back((now, service));
            }
        }
        if leads && !led {
            told.extend(untold.drain(..).map(|(_, service)| Self::stands(&service)));
        }
        told
    }

    /// Whether this node has come to lead and may have something to tell.
    pub fn look(&self, leads: bool) {
        if leads && !self.leads.load(SeqCst) && !self.untold.lock().is_empty() {
            self.some.notify_one();
        }
    }

    fn stands(service: &Service) -> Change {
        let state = service.state.lock();
        let providers = state.providers();
        let kind = if providers > 0 { ChangeKind::Provided } else { ChangeKind::Withdrawn };
        Change { service: service.name.to_string(), providers, exclusive: state.is_exclusive(), kind }
    }

    fn settle(service: &Service) -> Option<Change> {
        let mut state = service.state.lock();
        state.dirty = false;
        let providers = state.providers();
        let replaced = std::mem::take(&mut state.replaced);
        let before = std::mem::replace(&mut state.announced, providers);
        let kind = match () {
            () if providers > before || replaced && providers > 0 => ChangeKind::Provided,
            () if providers < before => ChangeKind::Withdrawn,
            // Came and went between two questions.
            () => return None,
        };
        Some(Change { service: service.name.to_string(), providers, exclusive: state.is_exclusive(), kind })
    }
}
