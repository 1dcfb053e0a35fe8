//! [`Subscriptions`]: the cursors of one reader over the rings it watches. The loop of every live transport is here,
//! once.
//!
//! A subscription is parked in its ring, or ready in the [`Inbox`], or in the run queue: in one of them, always. A
//! reader is woken once however many of its channels fire, and looks only where there is something.

use std::{
    collections::VecDeque,
    sync::Arc,
    task::{Context, Poll},
};

use bytes::Bytes;
use futures_util::task::AtomicWaker;
use parking_lot::Mutex;
use slab::Slab;

use super::{
    Watch,
    filter::Filter,
    format::Format,
    log::Gap,
    ring::{Parking, Step, TURN_EVENTS},
};
use crate::{
    channel::Channel,
    position::{Position, Start},
};

/// Readers woken in one go.
const INLINE: usize = 32;

/// The cursors of one connection or request. Dropping it ends them.
pub struct Subscriptions {
    inbox: Arc<Inbox>,
    subs: Slab<Sub>,
    /// Slots to look at.
    run: VecDeque<u32>,
    format: &'static Format,
    lives: u32,
    /// Events of one delivery, at most.
    turn: u32,
}

/// Where rings leave word that a subscription has something to read. One per connection.
pub(super) struct Inbox {
    waker: AtomicWaker,
    ready: Mutex<Vec<(u32, u32)>>,
}

/// Readers to wake.
#[must_use = "a reader that is not woken sleeps for ever"]
pub struct WakeList(pub(super) Slab<Ticket>);

/// A parked reader: whom to tell, and what about. `life` tells a slot from its next user.
pub(super) struct Ticket {
    pub inbox: Arc<Inbox>,
    pub slot: u32,
    pub life: u32,
}

struct Sub {
    watch: Watch,
    position: Position,
    filter: Option<Arc<Filter>>,
    life: u32,
    /// Nothing while it is ready or in the run queue.
    parking: Option<Parking>,
}

/// Where a new subscription begins.
#[derive(Debug)]
pub struct SubscriptionStart {
    /// Names the subscription in this reader.
    pub slot: u32,
    pub position: Position,
    /// What is missing before it.
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
    /// One frame or batch, encoded; shared with every reader that needs the same.
    Events { bytes: Bytes, count: u32 },
    /// Before anything newer of its channel.
    Gap(Gap),
}

// === impl Subscriptions ===

impl Subscriptions {
    /// A reader of nothing yet, that wants its events in `format`.
    pub fn new(format: &'static Format) -> Self {
        let inbox = Arc::new(Inbox { waker: AtomicWaker::new(), ready: Mutex::new(Vec::new()) });
        Subscriptions { inbox, subs: Slab::new(), run: VecDeque::new(), format, lives: 0, turn: TURN_EVENTS as u32 }
    }

    /// One event at a time, for a reader that says after each where it is.
    pub fn one_by_one(mut self) -> Self {
        self.turn = 1;
        self
    }

    /// Begins to read a channel. What it is at is known at once; what follows comes from
    /// [`poll_next`](Self::poll_next).
    pub fn add(&mut self, watch: Watch, start: Start, filter: Option<Arc<Filter>>) -> SubscriptionStart {
        let (position, gap) = watch.resolve(start);
        if self.subs.capacity() == 0 {
            self.subs = Slab::with_capacity(1);
        }
        self.lives = self.lives.wrapping_add(1);
        let sub = Sub { watch, position, filter, life: self.lives, parking: None };
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

    /// Up to where a subscription has read. Moves past what a filter hides.
    pub fn position(&self, slot: u32) -> Option<Position> {
        Some(self.subs.get(slot as usize)?.position)
    }

    pub fn channel(&self, slot: u32) -> Option<&Channel> {
        Some(self.subs.get(slot as usize)?.watch.channel())
    }

    /// Puts a subscription elsewhere, and says what is missing before the new place.
    pub fn seek(&mut self, slot: u32, start: Start) -> Option<(Position, Option<Gap>)> {
        let sub = self.subs.get_mut(slot as usize)?;
        let (position, gap) = sub.watch.resolve(start);
        sub.position = position;
        self.rerun(slot);
        Some((position, gap))
    }

    /// Changes what a subscription shows from now on.
    pub fn set_filter(&mut self, slot: u32, filter: Option<Arc<Filter>>) {
        if let Some(sub) = self.subs.get_mut(slot as usize) {
            sub.filter = filter;
        }
    }

    /// What to write next. Each subscription has its turn: a bounded piece, then the next one's.
    ///
    /// A reader whose socket is blocked must not call this: it is woken for nothing at most once.
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

    /// Begins a turn of a task: pending if there is nothing to [`take`](Self::take), and the task will be woken.
    ///
    /// For those who take until there is no more: they are woken for whatever comes from here on, and need not ask a
    /// second time, as [`poll_next`](Self::poll_next) does.
    pub fn poll_turn(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        match self.refill(cx) {
            true => Poll::Ready(()),
            false => Poll::Pending,
        }
    }

    /// What to write next in a turn that was begun by [`poll_turn`](Self::poll_turn).
    pub fn take(&mut self) -> Option<Delivery> {
        while let Some(slot) = self.run.pop_front() {
            if let Some(item) = self.look(slot) {
                return Some(Delivery { slot, item });
            }
        }
        None
    }

    /// Ready while any subscription has something newer than its position. Nothing moves:
    /// [`seek`](Self::seek) to where you have read.
    pub fn poll_changed(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        loop {
            while let Some(slot) = self.run.pop_front() {
                let Some(sub) = self.subs.get_mut(slot as usize) else { continue };
                let mut ring = sub.watch.lock();
                if ring.is_behind(sub.position) {
                    self.run.push_front(slot);
                    return Poll::Ready(());
                }
                sub.parking = Some(ring.park(&self.inbox, slot, sub.life));
            }
            if !self.refill(cx) {
                return Poll::Pending;
            }
        }
    }

    /// Looks once at a subscription that is in no queue, and parks it or puts it into the run queue.
    fn look(&mut self, slot: u32) -> Option<DeliveryItem> {
        let Sub { watch, position, filter, life, parking } = self.subs.get_mut(slot as usize)?;
        let mut ring = watch.lock();
        let step = ring.step(watch.channel(), position, filter.as_deref(), self.format, self.turn as usize);
        if matches!(step, Step::Older) {
            let (place, first) = ring.park_older(*position, &self.inbox, slot, *life);
            *parking = Some(place);
            drop(ring);
            if first {
                watch.fetch();
            }
            return None;
        }
        // Parked in the same breath as it reaches the head: one lock a delivery, not two.
        if !matches!(step, Step::Scanned) && !ring.is_behind(*position) {
            *parking = Some(ring.park(&self.inbox, slot, *life));
        } else {
            self.run.push_back(slot);
        }
        match step {
            Step::Events { bytes, count } => Some(DeliveryItem::Events { bytes, count }),
            Step::Gap(gap) => Some(DeliveryItem::Gap(gap)),
            Step::Scanned | Step::Nothing | Step::Older => None,
        }
    }

    fn rerun(&mut self, slot: u32) {
        let Some(sub) = self.subs.get_mut(slot as usize) else { return };
        if let Some(parking) = sub.parking.take() {
            if sub.watch.lock().unpark(parking) {
                self.run.push_back(slot);
            } else {
                // Taken by an append: it is, or will be, in the inbox.
                sub.parking = Some(parking);
            }
        }
    }

    /// Takes what became ready. False if there is nothing: then the task will be woken.
    fn refill(&mut self, cx: &mut Context<'_>) -> bool {
        // Before the look, or a wake between the two is lost.
        self.inbox.waker.register(cx.waker());
        let mut ready = self.inbox.ready.lock();
        for (slot, life) in ready.drain(..) {
            if let Some(sub) = self.subs.get_mut(slot as usize).filter(|sub| sub.life == life) {
                sub.parking = None;
                self.run.push_back(slot);
            }
        }
        if ready.capacity() > 64 {
            *ready = Vec::new();
        }
        drop(ready);
        if self.run.is_empty() && self.run.capacity() > 64 {
            self.run = VecDeque::new();
        }
        !self.run.is_empty()
    }

    /// Parked, ready and running subscriptions: always all of them.
    #[cfg(test)]
    pub(super) fn whereabouts(&self) -> (usize, usize, usize) {
        let inbox = self.inbox.ready.lock();
        let mine = |(slot, life): &&(u32, u32)| self.subs.get(*slot as usize).is_some_and(|sub| sub.life == *life);
        let ready = inbox.iter().filter(mine).count();
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

// === impl Sub ===

impl Sub {
    fn unpark(&self) {
        if let Some(parking) = self.parking {
            self.watch.lock().unpark(parking);
        }
    }
}

// === impl Parked ===

impl WakeList {
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Wakes a few at once and the rest by a task that lets others run in between: otherwise a channel with 100,000
    /// readers delays every call by half a second.
    pub fn wake(self) {
        let mut tickets = self.0.into_iter().map(|(_, ticket)| ticket);
        if tickets.len() > INLINE
            && let Ok(runtime) = tokio::runtime::Handle::try_current()
        {
            runtime.spawn(async move {
                loop {
                    tickets.by_ref().take(INLINE).for_each(Ticket::wake);
                    if tickets.len() == 0 {
                        break;
                    }
                    tokio::task::yield_now().await;
                }
            });
        } else {
            tickets.for_each(Ticket::wake);
        }
    }
}

// === impl Ticket ===

impl Ticket {
    /// Leaves word, and wakes the reader if this is the first.
    fn wake(self) {
        let mut ready = self.inbox.ready.lock();
        let first = ready.is_empty();
        ready.push((self.slot, self.life));
        drop(ready);
        if first {
            self.inbox.waker.wake();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{sync::Arc, task::Waker, time::Duration};

    use super::*;
    use crate::{
        backend::memory::Memory,
        bus::{Bus, Config, KeyLimits, Retention, Topics, WallClock},
        event::{Draft, DraftParts},
    };

    fn bus() -> Bus {
        let config = Config {
            rules: Vec::new(),
            retention: Retention { count: 20, age: Duration::from_secs(60), bytes: 1 << 20 },
            budget: 1 << 24,
            keys: KeyLimits { window: Duration::from_secs(60), count: 10 },
            consumer_idle: Duration::from_secs(60),
            max_consumers: 1,
            max_cursors: 1,
        };
        let topics = Arc::new(Topics::new(config, WallClock::System));
        Bus::new(Arc::new(Memory::new(topics.clone())), topics)
    }

    /// A reader that is polled two or three times per wake, as hyper polls a body, does not park twice.
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
        bus.topics().each(|topic| assert_eq!(topic.lock().parked(), 0, "a ticket was left behind"));
    }
}
