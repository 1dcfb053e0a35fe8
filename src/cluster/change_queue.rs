//! [`ChangeQueue`]: changes for one reader, only the latest of each key, in the order in which the keys first changed.

use std::{
    hash::Hash,
    sync::{Arc, Weak},
};

use foldhash::fast::RandomState;
use indexmap::IndexMap;
use parking_lot::Mutex;
use tokio::sync::Notify;

/// Its size is bounded by the number of keys, however often they change. Dropping it ends the subscription.
pub struct ChangeQueue<K, V>(Arc<ChangeMap<K, V>>);

/// The sending end of a [`ChangeQueue`].
pub(crate) struct ChangeSender<K, V>(Weak<ChangeMap<K, V>>);

struct ChangeMap<K, V> {
    changes: Mutex<IndexMap<K, V, RandomState>>,
    added: Notify,
}

impl<K: Hash + Eq, V> ChangeQueue<K, V> {
    pub(crate) fn new() -> (Self, ChangeSender<K, V>) {
        let map = Arc::new(ChangeMap { changes: Mutex::default(), added: Notify::new() });
        let sender = ChangeSender(Arc::downgrade(&map));
        (ChangeQueue(map), sender)
    }

    /// Takes all changes since the last call.
    pub fn take(&self) -> Vec<V> {
        std::mem::take(&mut *self.0.changes.lock()).into_values().collect()
    }

    /// Waits until there is something to take. For one task only.
    pub(crate) async fn ready(&self) {
        while self.0.changes.lock().is_empty() {
            self.0.added.notified().await;
        }
    }
}

impl<K: Hash + Eq, V> ChangeSender<K, V> {
    /// False: the queue was dropped.
    pub(crate) fn send(&self, key: K, value: V) -> bool {
        let Some(map) = self.0.upgrade() else { return false };
        map.changes.lock().insert(key, value);
        map.added.notify_one();
        true
    }
}
