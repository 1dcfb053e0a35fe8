//! [`Subscriptions`], the cursors of one reader over the channels that it watches: the loop of every live transport.
//!
//! A subscription is parked in its channel, or in the [`ReadyQueue`], or in the run queue: always in exactly one of
//! them. A reader is woken once however many of its channels have news, and visits only those that do.

use std::{
    collections::VecDeque,
    sync::Arc,
    task::{Context, Poll},
};

use bytes::Bytes;
use slab::Slab;

use super::{
    filter::Filter,
    format::Format,
    gap::Gap,
    parking::{ParkedReader, ReaderId, ReadyQueue},
    ring::{ReadStep, STEP_EVENTS, StepRequest},
    topic::Parking,
    watch::Watch,
};
use crate::{
    channel::Channel,
    position::{Position, Start},
};

/// A run queue that grew beyond this is freed when it is empty.
const SPARE: usize = 64;

/// The cursors of one connection or request. Dropping it ends them.
pub struct Subscriptions {
    ready: Arc<ReadyQueue>,
    subs: Slab<Subscription>,
    /// Slots to visit.
    run: VecDeque<u32>,
    format: &'static Format,
    generations: u32,
    /// Largest number of events in a delivery.
    max_events: u32,
}

struct Subscription {
    watch: Watch,
    position: Position,
    filter: Option<Arc<Filter>>,
    generation: u32,
    /// `None` while it is ready or in the run queue.
    parking: Option<Parking>,
}

/// Where a new subscription begins.
#[derive(Debug)]
pub struct SubscriptionStart {
    /// Identifies the subscription in its reader.
    pub slot: u32,
    pub position: Position,
    /// The history that is missing before `position`.
    pub gap: Option<Gap>,
}

/// Something to write for one subscription.
#[derive(Debug)]
pub struct Delivery {
    pub slot: u32,
    pub item: DeliveryItem,
}

#[derive(Debug)]
pub enum DeliveryItem {
    /// One frame of one or more events, encoded; shared with every reader that needs the same.
    Events { bytes: Bytes, count: u32 },
    /// Precedes anything newer of its channel.
    Gap(Gap),
}

// === impl Subscriptions ===

impl Subscriptions {
    /// A reader without subscriptions, whose events are encoded in `format`.
    pub fn new(format: &'static Format) -> Self {
        Subscriptions {
            ready: Arc::default(),
            subs: Slab::new(),
            run: VecDeque::new(),
            format,
            generations: 0,
            max_events: STEP_EVENTS as u32,
        }
    }

    /// Delivers one event at a time, for a reader that reports its position after each event.
    pub(crate) fn one_by_one(mut self) -> Self {
        self.max_events = 1;
        self
    }

    /// Subscribes to a channel. Its events come from [`poll_next`](Self::poll_next).
    pub fn add(&mut self, watch: Watch, start: Start, filter: Option<Arc<Filter>>) -> SubscriptionStart {
        let (position, gap) = watch.resolve(start);
        if self.subs.capacity() == 0 {
            self.subs = Slab::with_capacity(1);
        }
        self.generations = self.generations.wrapping_add(1);
        let sub = Subscription { watch, position, filter, generation: self.generations, parking: None };
        let slot = self.subs.insert(sub) as u32;
        self.run.push_back(slot);
        SubscriptionStart { slot, position, gap }
    }

    /// Ends a subscription.
    pub fn remove(&mut self, slot: u32) {
        if let Some(sub) = self.subs.try_remove(slot as usize) {
            sub.unpark();
        }
        self.run.retain(|ready| *ready != slot);
    }

    pub fn len(&self) -> usize {
        self.subs.len()
    }

    pub fn is_empty(&self) -> bool {
        self.subs.is_empty()
    }

    /// Position up to which a subscription has read, including the events that a filter hides.
    pub fn position(&self, slot: u32) -> Option<Position> {
        Some(self.subs.get(slot as usize)?.position)
    }

    pub fn channel(&self, slot: u32) -> Option<&Channel> {
        Some(self.subs.get(slot as usize)?.watch.channel())
    }

    /// Moves a subscription to `start`. Returns its new position and the history that is missing before it.
    pub fn seek(&mut self, slot: u32, start: Start) -> Option<(Position, Option<Gap>)> {
        let sub = self.subs.get_mut(slot as usize)?;
        let (position, gap) = sub.watch.resolve(start);
        sub.position = position;
        self.unpark(slot);
        Some((position, gap))
    }

    /// Sets which events a subscription shows from its position on.
    pub(crate) fn set_filter(&mut self, slot: u32, filter: Option<Arc<Filter>>) {
        if let Some(sub) = self.subs.get_mut(slot as usize) {
            sub.filter = filter;
        }
    }

    /// The next delivery. Subscriptions take turns: a bounded piece of one, then of the next.
    ///
    /// A reader whose socket is blocked must not call this; meanwhile it is woken in vain at most once.
    pub fn poll_next(&mut self, cx: &mut Context<'_>) -> Poll<Delivery> {
        loop {
            if let Some(delivery) = self.take() {
                return Poll::Ready(delivery);
            }
            if !self.refill(cx) {
                return Poll::Pending;
            }
        }
    }

    /// Begins a turn of a task: ready if [`take`](Self::take) may return something. Otherwise the task will be woken.
    ///
    /// For a reader that takes until nothing is left: it is woken for everything that comes afterwards, and need not
    /// poll a second time, as with [`poll_next`](Self::poll_next).
    pub(crate) fn poll_turn(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        match self.refill(cx) {
            true => Poll::Ready(()),
            false => Poll::Pending,
        }
    }

    /// The next delivery of a turn that [`poll_turn`](Self::poll_turn) began.
    pub fn take(&mut self) -> Option<Delivery> {
        while let Some(slot) = self.run.pop_front() {
            if let Some(item) = self.step(slot) {
                return Some(Delivery { slot, item });
            }
        }
        None
    }

    /// Ready while any subscription has something newer than its position. No position moves: the reader must
    /// [`seek`](Self::seek) to where it has read by other means.
    pub fn poll_changed(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        loop {
            while let Some(slot) = self.run.pop_front() {
                let Some(sub) = self.subs.get_mut(slot as usize) else { continue };
                let mut buffer = sub.watch.lock();
                if buffer.is_behind(sub.position) {
                    self.run.push_front(slot);
                    return Poll::Ready(());
                }
                let reader = ReaderId { slot, generation: sub.generation };
                sub.parking = Some(Parking::Head(buffer.park(ParkedReader { queue: self.ready.clone(), reader })));
            }
            if !self.refill(cx) {
                return Poll::Pending;
            }
        }
    }

    /// Reads for a subscription that is in no queue, and parks it or puts it into the run queue.
    fn step(&mut self, slot: u32) -> Option<DeliveryItem> {
        let Subscription { watch, position, filter, generation, parking } = self.subs.get_mut(slot as usize)?;
        let parked = || ParkedReader { queue: self.ready.clone(), reader: ReaderId { slot, generation: *generation } };
        let request = StepRequest {
            channel: watch.channel(),
            filter: filter.as_deref(),
            format: self.format,
            max_events: self.max_events as usize,
        };
        let mut buffer = watch.lock();
        let step = buffer.step(&request, position);
        if matches!(step, ReadStep::Older) {
            let (place, first) = buffer.park_behind(*position, parked());
            *parking = Some(place);
            drop(buffer);
            if first {
                watch.fetch();
            }
            return None;
        }
        // Parked under the same lock as it reaches the head: one lock per delivery instead of two.
        if buffer.is_behind(*position) {
            self.run.push_back(slot);
        } else {
            *parking = Some(Parking::Head(buffer.park(parked())));
        }
        match step {
            ReadStep::Events { bytes, count } => Some(DeliveryItem::Events { bytes, count }),
            ReadStep::Gap(gap) => Some(DeliveryItem::Gap(gap)),
            ReadStep::Nothing | ReadStep::Older => None,
        }
    }

    /// Puts a parked subscription into the run queue.
    fn unpark(&mut self, slot: u32) {
        let Some(sub) = self.subs.get_mut(slot as usize) else { return };
        if let Some(parking) = sub.parking.take() {
            if sub.watch.lock().unpark(parking) {
                self.run.push_back(slot);
            } else {
                // It was taken by an append: it is, or will be, in the ready queue.
                sub.parking = Some(parking);
            }
        }
    }

    /// Moves the ready subscriptions to the run queue. False if that is empty: then the task will be woken.
    fn refill(&mut self, cx: &mut Context<'_>) -> bool {
        self.ready.drain(cx.waker(), |reader| {
            let sub = self.subs.get_mut(reader.slot as usize);
            if let Some(sub) = sub.filter(|sub| sub.generation == reader.generation) {
                sub.parking = None;
                self.run.push_back(reader.slot);
            }
        });
        if self.run.is_empty() && self.run.capacity() > SPARE {
            self.run = VecDeque::new();
        }
        !self.run.is_empty()
    }

    /// Numbers of parked, ready and running subscriptions. Their sum is the number of subscriptions.
    #[cfg(test)]
    fn whereabouts(&self) -> (usize, usize, usize) {
        let live = |reader: &ReaderId| {
            self.subs.get(reader.slot as usize).is_some_and(|sub| sub.generation == reader.generation)
        };
        let ready = self.ready.readers().iter().filter(|reader| live(reader)).count();
        let unparked = self.subs.iter().filter(|(_, sub)| sub.parking.is_none()).count();
        (self.subs.len() - unparked - ready, ready, self.run.len())
    }
}

impl Drop for Subscriptions {
    fn drop(&mut self) {
        for (_, sub) in &self.subs {
            sub.unpark();
        }
    }
}

// === impl Subscription ===

impl Subscription {
    fn unpark(&self) {
        if let Some(parking) = self.parking {
            self.watch.lock().unpark(parking);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::task::Waker;

    use super::*;
    use crate::{
        backend::memory,
        bus::{Bus, Config, Retention, WallClock},
        event::{Draft, DraftParts},
    };

    fn bus() -> Bus {
        let retention = Retention { count: 20, ..Config::default().retention };
        memory::bus(Config { rules: Vec::new(), retention, ..Config::default() }, WallClock::System)
    }

    /// A reader that is polled two or three times per wake-up, as hyper polls a body, does not park twice.
    #[tokio::test]
    async fn every_subscription_is_in_one_place() {
        let bus = bus();
        let names: Vec<Channel> = (0..7).map(|n| Channel::parse(&n.to_string()).unwrap()).collect();
        let mut cx = Context::from_waker(Waker::noop());
        let mut subs = Subscriptions::new(Format::NONE);
        let mut slots = Vec::new();
        for _ in 0..5000 {
            match fastrand::u8(..100) {
                0..30 => {
                    for watch in bus.watch(&names[..fastrand::usize(1..4)]).await.unwrap() {
                        slots.push(subs.add(watch, Start::Earliest, None).slot);
                    }
                }
                30..50 if !slots.is_empty() => subs.remove(slots.swap_remove(fastrand::usize(..slots.len()))),
                50..60 if !slots.is_empty() => {
                    subs.seek(slots[fastrand::usize(..slots.len())], Start::Last(3));
                }
                60..65 => bus.remove(&names[fastrand::usize(..names.len())], None).await.unwrap(),
                65..85 => {
                    let draft = Draft::new(DraftParts::default(), 1000).unwrap();
                    bus.publish_one("", &names[fastrand::usize(..names.len())], draft).await.unwrap();
                }
                _ => while fastrand::u8(..4) > 0 && subs.poll_next(&mut cx).is_ready() {},
            }
            let (parked, ready, running) = subs.whereabouts();
            assert_eq!(parked + ready + running, subs.len());
            assert_eq!(bus.topics().readers(), subs.len());
        }
        drop(subs);
        assert_eq!(bus.topics().readers(), 0);
        bus.topics().each(|topic| assert_eq!(topic.lock().parked(), 0, "a reader was left behind"));
    }
}
