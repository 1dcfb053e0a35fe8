//! [`Reader`]: what one socket is subscribed to. Made with the first subscription: most providers never have one.

use std::{
    collections::HashMap,
    sync::Arc,
    task::{Context, Poll},
};

use bytes::Bytes;
use foldhash::fast::RandomState;
use parking_lot::Mutex;
use serde::Serialize;

use super::{Ready, jsonrpc, params::Wanted};
use crate::{
    bus::{Delivery, DeliveryItem, Format, Gap, Subscriptions, Watch},
    channel::Channel,
    metrics::Gauge,
    net::websocket::frame,
    position::{Position, Start},
    presence::PresenceLease,
    sessions::{ChannelSet, SubscribedChannels},
};

/// `{"jsonrpc":"2.0","method":"weir.event","params":<event>}`: one whole frame per event, for a frame holds one message.
pub static FORMAT: Format = Format {
    open: |_| {},
    event: |channel, event, out| {
        frame::text(out, |out| jsonrpc::event(out, |out| event.write_json(channel, out)));
    },
    close: |_| {},
};

/// The subscriptions of one socket, one per channel.
pub struct Reader {
    subscriptions: Subscriptions,
    /// The slot of each channel, or [`WAITING`].
    places: Arc<Mutex<SubscribedChannels>>,
    /// Accepted, but their answer is part of a batch that is not complete: it has to precede the first event.
    waiting: Vec<Waiting>,
    /// Who is present where, if anybody.
    leases: Option<Box<Leases>>,
    gauge: Gauge,
}

#[derive(Default)]
struct Leases(HashMap<Channel, PresenceLease, RandomState>);

/// The slot of a channel that is one of those that wait.
const WAITING: u32 = u32::MAX;

struct Waiting {
    batch: u32,
    channel: Channel,
    watch: Watch,
    position: Position,
    filter: Option<Arc<crate::bus::Filter>>,
}

/// Where a subscription begins, as `weir.subscribe` answers it.
#[derive(Serialize)]
pub struct Begun {
    #[serde(serialize_with = "as_text")]
    channel: Channel,
    position: Position,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub gap: Option<Gap>,
}

/// Something to write, and what it is.
pub enum Shown {
    Events { bytes: Bytes, count: u32 },
    Gap(Gap),
}

impl Reader {
    /// Reads nothing yet. `gauge` counts subscriptions.
    pub fn new(gauge: Gauge) -> Self {
        let subscriptions = Subscriptions::new(&FORMAT);
        Reader { subscriptions, places: Arc::default(), waiting: Vec::new(), leases: None, gauge }
    }

    /// What it is subscribed to, for whoever lists connections.
    pub fn channel_set(&self) -> ChannelSet {
        ChannelSet::Live(Arc::downgrade(&self.places))
    }

    pub fn len(&self) -> usize {
        self.places.lock().len()
    }

    pub fn has(&self, channel: &Channel) -> bool {
        self.places.lock().contains_key(channel)
    }

    /// Begins to read a channel, or changes how it is read. `batch` is that of the request, or 0.
    pub(super) fn subscribe(&mut self, (wanted, watch, lease): Ready, batch: u32) -> Begun {
        let Wanted { channel, start, filter } = wanted;
        if let Some(lease) = lease {
            self.leases.get_or_insert_default().0.insert(channel.clone(), lease);
        }
        let filter = filter.map(Arc::new);
        let place = self.places.lock().get(&channel).copied();
        if place == Some(WAITING) {
            // In the same batch twice: the later counts.
            self.waiting.retain(|waiting| waiting.channel != channel);
        }
        let (position, gap) = match place {
            None | Some(WAITING) => {
                let (position, gap) = watch.resolve(start.unwrap_or(Start::Now));
                let slot = if batch == 0 {
                    self.subscriptions.add(watch, Start::After(position), filter).slot
                } else {
                    self.waiting.push(Waiting { batch, channel: channel.clone(), watch, position, filter });
                    WAITING
                };
                if self.places.lock().insert(channel.clone(), slot).is_none() {
                    self.gauge.add(1);
                }
                (position, gap)
            }
            Some(slot) => {
                self.subscriptions.set_filter(slot, filter);
                let moved = start.and_then(|start| self.subscriptions.seek(slot, start));
                moved.or_else(|| Some((self.subscriptions.position(slot)?, None))).unwrap_or_else(|| {
                    // Not reached: the slot is there as long as its place is.
                    watch.resolve(Start::Now)
                })
            }
        };
        Begun { channel, position, gap }
    }

    /// Ends a subscription. False if there was none.
    pub fn unsubscribe(&mut self, channel: &Channel) -> bool {
        let Some(slot) = self.places.lock().remove(channel) else { return false };
        self.gauge.add(-1);
        if let Some(leases) = &mut self.leases {
            leases.0.remove(channel);
        }
        match slot {
            WAITING => self.waiting.retain(|waiting| waiting.channel != *channel),
            slot => self.subscriptions.remove(slot),
        }
        true
    }

    /// Begins the subscriptions whose answer is on its way by now.
    #[inline]
    pub fn begin(&mut self, is_open: impl Fn(u32) -> bool) {
        if self.waiting.is_empty() {
            return;
        }
        self.begin_waiting(is_open);
    }

    #[cold]
    fn begin_waiting(&mut self, is_open: impl Fn(u32) -> bool) {
        let (open, done) = std::mem::take(&mut self.waiting).into_iter().partition(|waiting| is_open(waiting.batch));
        self.waiting = open;
        for Waiting { channel, watch, position, filter, .. } in done {
            let slot = self.subscriptions.add(watch, Start::After(position), filter).slot;
            self.places.lock().insert(channel, slot);
        }
    }

    /// Begins a turn: pending if there is nothing to [`take`](Self::take), and the task will be woken.
    pub fn poll_turn(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        self.subscriptions.poll_turn(cx)
    }

    /// What to write next. After `None` the task will be woken.
    pub fn take(&mut self) -> Option<Shown> {
        self.subscriptions.take().map(|Delivery { item, .. }| match item {
            DeliveryItem::Events { bytes, count } => Shown::Events { bytes, count },
            DeliveryItem::Gap(gap) => Shown::Gap(gap),
        })
    }
}

impl Drop for Reader {
    fn drop(&mut self) {
        self.gauge.add(-(self.len() as i64));
    }
}

fn as_text<S: serde::Serializer>(channel: &Channel, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_str(channel.as_str())
}
