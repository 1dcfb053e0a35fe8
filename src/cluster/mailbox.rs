//! [`Mailbox`]: what other nodes sent, for one reader.

use std::{
    collections::VecDeque,
    sync::{Arc, Weak},
};

use bytes::Bytes;
use parking_lot::Mutex;
use tokio::sync::Notify;

use super::NodeId;

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Incoming {
    Mail {
        from: NodeId,
        mail: Bytes,
    },
    /// It could not be delivered, and surely nobody has read it.
    Returned {
        to: NodeId,
        mail: Bytes,
    },
    /// The link is broken, as a connection would be: what went either way and is not here by now never comes, and the other
    /// node, if it lives and had heard of this one, is told the same. What is sent from now on travels on a new link; `gone`: there is none, until
    /// [`Members`](super::Members) says that the node is up (again).
    Lost {
        with: NodeId,
        gone: bool,
    },
}

/// Bounded in bytes: a reader that does not keep up has its links broken.
pub struct Mailbox(Arc<Inner>);

pub(super) struct Slot(pub(super) Weak<Inner>);

#[derive(Default)]
pub(super) struct Inner {
    queue: Mutex<Queue>,
    some: Notify,
}

#[derive(Default)]
struct Queue {
    items: VecDeque<Incoming>,
    bytes: usize,
}

impl Mailbox {
    pub(super) fn new() -> (Self, Slot) {
        let inner = Arc::<Inner>::default();
        let slot = Slot(Arc::downgrade(&inner));
        (Mailbox(inner), slot)
    }

    /// What has come since the last time.
    pub fn take(&self) -> VecDeque<Incoming> {
        std::mem::take(&mut *self.0.queue.lock()).items
    }

    /// Waits until there is something to take. For one task.
    pub async fn ready(&self) {
        while self.0.queue.lock().items.is_empty() {
            self.0.some.notified().await;
        }
    }
}

impl Slot {
    const MOST: usize = 64 << 20;

    /// False: it is full. A mail that nobody wants to read is read.
    pub fn put(&self, item: Incoming) -> bool {
        let Some(inner) = self.0.upgrade() else { return true };
        let mut queue = inner.queue.lock();
        if let Incoming::Mail { mail, .. } = &item {
            if queue.bytes > Self::MOST {
                return false;
            }
            queue.bytes += mail.len() + size_of::<Incoming>();
        }
        queue.items.push_back(item);
        drop(queue);
        inner.some.notify_one();
        true
    }
}
