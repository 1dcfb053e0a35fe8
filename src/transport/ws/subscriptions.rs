//! [`SocketSubscriptions`]: what one WebSocket is subscribed to. Created with the first subscription, as most providers
//! never have one.

use std::{
    collections::HashMap,
    sync::Arc,
    task::{Context, Poll},
};

use bytes::Bytes;
use foldhash::fast::RandomState;
use parking_lot::Mutex;
use serde::Serialize;

use super::{jsonrpc, params::SubscribeRequest};
use crate::{
    bus::{Delivery, DeliveryItem, Format, Gap, Subscriptions, Watch},
    channel::Channel,
    metrics::Gauge,
    net::websocket::frame,
    position::{Position, Start},
    presence::PresenceLease,
    sessions::{ChannelSet, SubscribedChannels},
};

/// `{"jsonrpc":"2.0","method":"weir.event","params":<event>}`: one whole frame per event, for a frame holds one
/// message.
pub(super) static FORMAT: Format = Format {
    open: |_| {},
    event: |channel, event, out| {
        frame::text(out, |out| jsonrpc::event(out, |out| event.write_json(channel, out)));
    },
    close: |_| {},
};

/// A subscription that can begin: its channel is watched, and its client is present if it asked to be.
pub(super) type ReadySubscription = (SubscribeRequest, Watch, Option<PresenceLease>);

/// The subscriptions of one socket, one per channel.
pub(super) struct SocketSubscriptions {
    slots: Subscriptions,
    /// The slot of each channel, or [`PENDING`].
    places: Arc<Mutex<SubscribedChannels>>,
    /// Accepted, but their answer is part of an incomplete batch: it has to precede the first event.
    pending: Vec<PendingSubscription>,
    /// Keep the client present on its channels.
    leases: Option<Box<ChannelLeases>>,
    gauge: Gauge,
}

#[derive(Default)]
struct ChannelLeases(HashMap<Channel, PresenceLease, RandomState>);

/// Stands for the slot of a subscription that is pending.
const PENDING: u32 = u32::MAX;

struct PendingSubscription {
    batch: u32,
    channel: Channel,
    watch: Watch,
    position: Position,
    filter: Option<Arc<crate::bus::Filter>>,
}

/// The start of a subscription, as `weir.subscribe` answers it.
#[derive(Serialize)]
pub(super) struct StartedSubscription {
    #[serde(serialize_with = "as_text")]
    channel: Channel,
    position: Position,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) gap: Option<Gap>,
}

/// Something to be written next.
pub(super) enum SocketDelivery {
    Events { bytes: Bytes, count: u32 },
    Gap(Gap),
}

impl SocketSubscriptions {
    /// `gauge` counts subscriptions.
    pub(super) fn new(gauge: Gauge) -> Self {
        let slots = Subscriptions::new(&FORMAT);
        SocketSubscriptions { slots, places: Arc::default(), pending: Vec::new(), leases: None, gauge }
    }

    /// The subscribed channels, for the list of connections.
    pub(super) fn channel_set(&self) -> ChannelSet {
        ChannelSet::Live(Arc::downgrade(&self.places))
    }

    pub(super) fn len(&self) -> usize {
        self.places.lock().len()
    }

    pub(super) fn has(&self, channel: &Channel) -> bool {
        self.places.lock().contains_key(channel)
    }

    /// Subscribes to a channel, or changes its subscription. `batch` is that of the request, or 0.
    pub(super) fn subscribe(&mut self, (wanted, watch, lease): ReadySubscription, batch: u32) -> StartedSubscription {
        let SubscribeRequest { channel, start, filter } = wanted;
        if let Some(lease) = lease {
            self.leases.get_or_insert_default().0.insert(channel.clone(), lease);
        }
        let filter = filter.map(Arc::new);
        let place = self.places.lock().get(&channel).copied();
        if place == Some(PENDING) {
            // Twice in the same batch: the later replaces the earlier.
            self.pending.retain(|pending| pending.channel != channel);
        }
        let (position, gap) = match place {
            None | Some(PENDING) => {
                let (position, gap) = watch.resolve(start.unwrap_or(Start::Now));
                let slot = if batch == 0 {
                    self.slots.add(watch, Start::After(position), filter).slot
                } else {
                    self.pending.push(PendingSubscription { batch, channel: channel.clone(), watch, position, filter });
                    PENDING
                };
                if self.places.lock().insert(channel.clone(), slot).is_none() {
                    self.gauge.add(1);
                }
                (position, gap)
            }
            Some(slot) => {
                self.slots.set_filter(slot, filter);
                let moved = start.and_then(|start| self.slots.seek(slot, start));
                moved.or_else(|| Some((self.slots.position(slot)?, None))).unwrap_or_else(|| {
                    // Not reached: the slot lives as long as its place.
                    watch.resolve(Start::Now)
                })
            }
        };
        StartedSubscription { channel, position, gap }
    }

    /// Ends a subscription. False if there was none.
    pub(super) fn unsubscribe(&mut self, channel: &Channel) -> bool {
        let Some(slot) = self.places.lock().remove(channel) else { return false };
        self.gauge.add(-1);
        if let Some(leases) = &mut self.leases {
            leases.0.remove(channel);
        }
        match slot {
            PENDING => self.pending.retain(|pending| pending.channel != *channel),
            slot => self.slots.remove(slot),
        }
        true
    }

    /// Ends the subscriptions of channels that the client may not read, and its presence where it may not join. Returns the
    /// channels of the former.
    pub(super) fn end_unless(
        &mut self,
        may_read: impl Fn(&Channel) -> bool,
        may_join: impl Fn(&Channel) -> bool,
    ) -> Vec<String> {
        let ended: Vec<_> = self.places.lock().keys().filter(|channel| !may_read(channel)).cloned().collect();
        for channel in &ended {
            self.unsubscribe(channel);
        }
        if let Some(leases) = &mut self.leases {
            leases.0.retain(|channel, _| may_join(channel));
        }
        ended.into_iter().map(|channel| channel.as_str().to_owned()).collect()
    }

    /// Begins the subscriptions whose answer is no longer held by an open batch.
    #[inline]
    pub(super) fn begin_answered(&mut self, is_open: impl Fn(u32) -> bool) {
        if self.pending.is_empty() {
            return;
        }
        self.begin_pending(is_open);
    }

    #[cold]
    fn begin_pending(&mut self, is_open: impl Fn(u32) -> bool) {
        let (open, done) = std::mem::take(&mut self.pending).into_iter().partition(|pending| is_open(pending.batch));
        self.pending = open;
        for PendingSubscription { channel, watch, position, filter, .. } in done {
            let slot = self.slots.add(watch, Start::After(position), filter).slot;
            self.places.lock().insert(channel, slot);
        }
    }

    /// Begins a turn: pending if there is nothing to [`take`](Self::take), and the task will be woken.
    pub(super) fn poll_turn(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        self.slots.poll_turn(cx)
    }

    /// Takes what is to be written next. After `None` the task will be woken.
    pub(super) fn take(&mut self) -> Option<SocketDelivery> {
        self.slots.take().map(|Delivery { item, .. }| match item {
            DeliveryItem::Events { bytes, count } => SocketDelivery::Events { bytes, count },
            DeliveryItem::Gap(gap) => SocketDelivery::Gap(gap),
        })
    }
}

impl Drop for SocketSubscriptions {
    fn drop(&mut self) {
        self.gauge.add(-(self.len() as i64));
    }
}

fn as_text<S: serde::Serializer>(channel: &Channel, serializer: S) -> std::result::Result<S::Ok, S::Error> {
    serializer.serialize_str(channel.as_str())
}
