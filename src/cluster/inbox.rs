//! [`Inbox`]: the messages of one kind for this node.

use std::{
    collections::VecDeque,
    sync::{Arc, Weak},
};

use bytes::Bytes;
use parking_lot::Mutex;
use tokio::sync::Notify;

use super::node_id::NodeId;

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum InboxEvent {
    Message {
        from: NodeId,
        body: Bytes,
    },
    /// The message could not be delivered, and certainly was not read.
    Returned {
        to: NodeId,
        body: Bytes,
    },
    /// The link is broken, like a broken connection: messages in either direction that have not arrived by now never will,
    /// and the peer, if it lives and knew the link, gets the same event. Later messages use a new link. If `gone`, there
    /// is none until [`ClusterMembers`](super::ClusterMembers) reports the node as up again.
    LinkLost {
        peer: NodeId,
        gone: bool,
    },
}

/// Bounded in bytes. The links of a node that does not read its inbox are broken.
pub struct Inbox(Arc<InboxQueue>);

/// The sending end of an [`Inbox`].
pub(super) struct InboxSender(Weak<InboxQueue>);

#[derive(Default)]
struct InboxQueue {
    events: Mutex<InboxEvents>,
    added: Notify,
}

#[derive(Default)]
struct InboxEvents {
    queue: VecDeque<InboxEvent>,
    bytes: usize,
}

impl Inbox {
    pub(super) fn new() -> (Self, InboxSender) {
        let queue = Arc::<InboxQueue>::default();
        let sender = InboxSender(Arc::downgrade(&queue));
        (Inbox(queue), sender)
    }

    /// Takes all events since the last call.
    pub fn take(&self) -> VecDeque<InboxEvent> {
        std::mem::take(&mut *self.0.events.lock()).queue
    }

    /// Waits until there is something to take. For one task only.
    pub(crate) async fn ready(&self) {
        while self.0.events.lock().queue.is_empty() {
            self.0.added.notified().await;
        }
    }
}

impl InboxSender {
    const MAX_BYTES: usize = 64 << 20;

    /// False: the inbox is full. Without a reader events are discarded. Only messages count: the events that report a
    /// loss must always fit.
    pub(super) fn send(&self, event: InboxEvent) -> bool {
        let Some(inbox) = self.0.upgrade() else { return true };
        let mut events = inbox.events.lock();
        if let InboxEvent::Message { body, .. } = &event {
            if events.bytes > Self::MAX_BYTES {
                return false;
            }
            events.bytes += body.len() + size_of::<InboxEvent>();
        }
        events.queue.push_back(event);
        drop(events);
        inbox.added.notify_one();
        true
    }
}
