//! Providers that came and went, for the channel `$services`.

use std::{collections::VecDeque, sync::Arc};

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
#[derive(Default)]
pub(super) struct Changes {
    queue: Mutex<VecDeque<Arc<Service>>>,
    some: Notify,
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

    pub async fn next(&self) -> Vec<Change> {
        loop {
            let changes = self.take();
            if !changes.is_empty() {
                return changes;
            }
            self.some.notified().await;
        }
    }

    pub fn take(&self) -> Vec<Change> {
        let changed = std::mem::take(&mut *self.queue.lock());
        changed.iter().filter_map(|service| Self::settle(service)).collect()
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
