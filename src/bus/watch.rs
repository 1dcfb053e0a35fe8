//! [`Watch`], a channel that is in use and filled on this node.

use std::sync::Arc;

use parking_lot::MutexGuard;

use super::{
    gap::Gap,
    tail::Tail,
    topic::{Buffer, Topic},
};
use crate::{
    channel::Channel,
    position::{Position, Start},
};

/// A channel that is in use and filled on this node while this lives. Made before the first read: an event that comes
/// after it wakes the reader, so none is lost in between.
pub struct Watch {
    topic: Arc<Topic>,
    tail: Tail,
}

impl Watch {
    /// Counts as a reader of the topic from here on.
    pub(super) fn new(topic: Arc<Topic>) -> Self {
        topic.lock().join();
        Watch { topic, tail: Tail::default() }
    }

    pub(super) fn topic(&self) -> &Arc<Topic> {
        &self.topic
    }

    /// Keeps the topic filled by `tail`.
    pub(super) fn fill(&mut self, tail: Tail) {
        self.tail = tail;
    }

    pub fn channel(&self) -> &Channel {
        self.topic.channel()
    }

    /// The first position of `start`, and the history that is missing before it.
    pub(crate) fn resolve(&self, start: Start) -> (Position, Option<Gap>) {
        self.topic.resolve(start)
    }

    /// Lets the backend fetch the events that are older than its window, for all readers that wait for them.
    pub(super) fn fetch(&self) {
        if let Some(tail) = &self.tail.0 {
            tail.fetch();
        }
    }

    pub(super) fn lock(&self) -> MutexGuard<'_, Buffer> {
        self.topic.lock()
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        self.topic.lock().leave();
    }
}
