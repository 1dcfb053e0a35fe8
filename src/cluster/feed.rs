//! Changes for one reader: of each thing the latest, in the order in which they first changed.

use std::{
    hash::Hash,
    sync::{Arc, Weak},
};

use foldhash::fast::RandomState;
use indexmap::IndexMap;
use parking_lot::Mutex;
use tokio::sync::Notify;

/// Grows with the things that change and not with how often they do. Dropping it ends it.
pub struct Feed<K, V>(Arc<Inner<K, V>>);

/// The other end. A backend keeps one per reader, and forgets it when the reader is gone.
pub struct Writer<K, V>(Weak<Inner<K, V>>);

struct Inner<K, V> {
    changes: Mutex<IndexMap<K, V, RandomState>>,
    some: Notify,
}

impl<K: Hash + Eq, V> Feed<K, V> {
    pub fn new() -> (Self, Writer<K, V>) {
        let inner = Arc::new(Inner { changes: Mutex::default(), some: Notify::new() });
        let writer = Writer(Arc::downgrade(&inner));
        (Feed(inner), writer)
    }

    /// What has changed since the last time.
    pub fn take(&self) -> Vec<V> {
        std::mem::take(&mut *self.0.changes.lock()).into_values().collect()
    }

    /// Waits until there is something to take. For one task.
    pub async fn ready(&self) {
        while self.0.changes.lock().is_empty() {
            self.0.some.notified().await;
        }
    }
}

impl<K: Hash + Eq, V> Writer<K, V> {
    /// False: nobody reads it any more.
    pub fn put(&self, key: K, value: V) -> bool {
        let Some(inner) = self.0.upgrade() else { return false };
        inner.changes.lock().insert(key, value);
        inner.some.notify_one();
        true
    }
}
