//! [`KnownChannels`]: the channels that exist though they may have no events.

use std::collections::{HashSet, VecDeque};

use parking_lot::Mutex;

use crate::channel::Channel;

/// Maximum number of channels; beyond it the oldest are forgotten.
const MAX_KNOWN: usize = 10_000;

/// The channels that a client of this node has subscribed or published to. The original never forgets any.
#[derive(Default)]
pub(super) struct KnownChannels(Mutex<(HashSet<Channel>, VecDeque<Channel>)>);

impl KnownChannels {
    pub(super) fn has(&self, channel: &Channel) -> bool {
        self.0.lock().0.contains(channel)
    }

    pub(super) fn add(&self, channel: &Channel) {
        let (names, order) = &mut *self.0.lock();
        if names.insert(channel.clone()) {
            order.push_back(channel.clone());
            if order.len() > MAX_KNOWN
                && let Some(oldest) = order.pop_front()
            {
                names.remove(&oldest);
            }
        }
    }
}
