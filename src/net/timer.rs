//! [`TimerWheel`]: one task that keeps the time for every connection of an App.
//!
//! A `tokio::time::Sleep` per connection costs memory and a lock of the runtime's own wheel; heartbeats, stalled
//! sockets, tokens and draining need no more than a quarter of a second of precision, and share one waker each here.

use std::{
    collections::HashSet,
    sync::{
        Arc, Weak,
        atomic::{
            AtomicU32, AtomicUsize,
            Ordering::{Acquire, Relaxed, Release},
        },
    },
    task::{Context, Poll, Waker},
    time::Duration,
};

use parking_lot::{Mutex, MutexGuard};
use slab::Slab;
use tokio::time::Instant;

/// The precision of everything that the wheel times.
pub const TICK: Duration = Duration::from_millis(250);
const BUCKETS: u32 = 128;
/// Wake-ups between two yields: a bucket may hold tens of thousands of connections.
const BURST: usize = 256;

/// Keeps the time for many connections. Made by [`TimerWheel::start`].
pub struct TimerWheel {
    /// Ticks since the start, from 1.
    now: AtomicU32,
    /// The tick at which the drain began (0: not draining), and the tick at which all must have left.
    drain: AtomicU32,
    drained: AtomicU32,
    /// Seats that may still be called; what the drain paces.
    seats: AtomicUsize,
    /// How often somebody was kicked.
    kicks: AtomicU32,
    buckets: [Bucket; BUCKETS as usize],
}

struct Bucket(Mutex<Slab<TimerSlot>>);

struct TimerSlot {
    due: u32,
    /// Which connection this is of; 0: of none that can be kicked.
    owner: u32,
    leave: bool,
    kicked: bool,
    waker: Option<Waker>,
}

/// One connection's place on the wheel, given back on drop.
pub struct Timer {
    wheel: Arc<TimerWheel>,
    due: u32,
    key: u32,
    /// How often somebody had been kicked when this last looked whether it was it.
    kicks: u32,
    bucket: u8,
    left: bool,
    /// Which task the seat's waker belongs to, so that a poll needs no lock.
    task: usize,
}

/// Why a [`Timer`] fired.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Due {
    /// The time that was asked for has come. Ask for the next with [`Timer::reset`].
    Time,
    /// The node drains, and it is this connection's turn to go. Said once.
    Leave,
    /// Somebody wants this connection to end. Said once.
    Kicked,
}

// === impl TimerWheel ===

impl TimerWheel {
    /// Starts the task that turns the wheel; it ends when the wheel is dropped. Needs a tokio runtime.
    pub fn start() -> Arc<Self> {
        let wheel = Arc::new(TimerWheel {
            now: AtomicU32::new(1),
            drain: AtomicU32::new(0),
            drained: AtomicU32::new(0),
            seats: AtomicUsize::new(0),
            kicks: AtomicU32::new(0),
            buckets: std::array::from_fn(|_| Bucket(Mutex::new(Slab::new()))),
        });
        tokio::spawn(turn(Arc::downgrade(&wheel)));
        wheel
    }

    /// Ticks since the start: a clock that costs one load.
    pub fn now(&self) -> u32 {
        self.now.load(Relaxed)
    }

    /// `time` in ticks, rounded up; at least one, and so few that they can be added to any tick.
    pub fn ticks(time: Duration) -> u32 {
        u32::try_from(time.as_millis().div_ceil(TICK.as_millis())).unwrap_or(u32::MAX).clamp(1, u32::MAX / 2)
    }

    /// The time from tick `since` to tick `now`.
    pub fn span(since: u32, now: u32) -> Duration {
        TICK * now.saturating_sub(since)
    }

    /// A timer that fires after `after`, rounded up to ticks.
    pub fn timer(self: &Arc<Self>, after: Duration) -> Timer {
        let due = self.now() + TimerWheel::ticks(after);
        let bucket = (due % BUCKETS) as u8;
        let key = self.buckets[bucket as usize].lock().insert(TimerSlot {
            due,
            owner: 0,
            leave: false,
            kicked: false,
            waker: None,
        }) as u32;
        self.seats.fetch_add(1, Relaxed);
        Timer { wheel: self.clone(), due, key, kicks: 0, bucket, left: false, task: 0 }
    }

    /// Calls on the connections with these numbers to end, and leaves in `who` those that were not found: they are gone,
    /// or were on their way to another bucket.
    pub fn kick(&self, who: &mut HashSet<u32>) {
        let mut calls = Vec::new();
        for bucket in &self.buckets {
            for (_, seat) in bucket.lock().iter_mut() {
                if seat.owner != 0 && who.remove(&seat.owner) {
                    seat.kicked = true;
                    calls.extend(seat.waker.take());
                }
            }
        }
        // Before they are woken, or they would not look.
        self.kicks.fetch_add(1, Release);
        calls.into_iter().for_each(Waker::wake);
    }

    /// Calls on every connection to leave, spread evenly over `window`; those that come later too.
    pub fn drain(&self, window: Duration) {
        let now = self.now();
        self.drained.store(now + TimerWheel::ticks(window), Relaxed);
        self.drain.store(now, Relaxed);
    }

    pub fn is_draining(&self) -> bool {
        self.drain.load(Relaxed) != 0
    }

    /// Since when it drains, as of now; zero if it does not.
    pub fn draining_for(&self) -> Duration {
        match self.drain.load(Relaxed) {
            0 => Duration::ZERO,
            since => Self::span(since, self.now()),
        }
    }

    /// Live timers.
    pub fn len(&self) -> usize {
        self.seats.load(Relaxed)
    }

    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Moves the time on by one tick; returns whom to wake.
    fn tick(&self, calls: &mut Vec<Waker>) {
        let now = self.now.fetch_add(1, Relaxed) + 1;
        for (_, seat) in self.buckets[(now % BUCKETS) as usize].lock().iter_mut() {
            if seat.due <= now {
                // Not again before the connection asks: it may be busy for longer than a tick.
                seat.due = u32::MAX;
                calls.extend(seat.waker.take());
            }
        }
        if self.is_draining() {
            self.call_to_leave(now, calls);
        }
    }

    /// This tick's share of those who have not been called yet, rounded up: a few go at once.
    /// What is born during the drain is called too.
    fn call_to_leave(&self, now: u32, calls: &mut Vec<Waker>) {
        let ticks = self.drained.load(Relaxed).saturating_sub(now) as usize + 1;
        let waiting: usize =
            self.buckets.iter().map(|bucket| bucket.lock().iter().filter(|(_, seat)| !seat.leave).count()).sum();
        let mut share = waiting.div_ceil(ticks);
        for bucket in &self.buckets {
            for (_, seat) in bucket.lock().iter_mut().filter(|(_, seat)| !seat.leave) {
                if share == 0 {
                    return;
                }
                share -= 1;
                seat.leave = true;
                calls.extend(seat.waker.take());
            }
        }
    }
}

async fn turn(wheel: Weak<TimerWheel>) {
    let start = Instant::now();
    let mut calls = Vec::new();
    for tick in 1.. {
        tokio::time::sleep_until(start + TICK * tick).await;
        // Gone with the App; between ticks nothing is held.
        let Some(wheel) = wheel.upgrade() else { return };
        wheel.tick(&mut calls);
        drop(wheel);
        while !calls.is_empty() {
            calls.drain(calls.len().saturating_sub(BURST)..).for_each(Waker::wake);
            tokio::task::yield_now().await;
        }
        calls.shrink_to(BURST);
    }
}

// === impl Bucket ===

impl Bucket {
    fn lock(&self) -> MutexGuard<'_, Slab<TimerSlot>> {
        self.0.lock()
    }

    /// Gives the room back with the last seat: timers walk round the wheel, and would else leave it in every bucket.
    fn remove(&self, key: u32) -> Option<TimerSlot> {
        let mut seats = self.lock();
        let seat = seats.try_remove(key as usize);
        if seats.is_empty() {
            *seats = Slab::new();
        }
        seat
    }
}

// === impl Timer ===

impl Timer {
    /// Ticks since the wheel's start.
    pub fn now(&self) -> u32 {
        self.wheel.now()
    }

    pub fn wheel(&self) -> &Arc<TimerWheel> {
        &self.wheel
    }

    /// Says which connection this is of, for [`TimerWheel::kick`]. Not 0.
    pub fn set_owner(&mut self, owner: u32) {
        if let Some(seat) = self.wheel.buckets[self.bucket as usize].lock().get_mut(self.key as usize) {
            seat.owner = owner;
        }
    }

    /// Fires after `after` from now instead, rounded up to ticks.
    pub fn reset(&mut self, after: Duration) {
        let due = self.wheel.now() + TimerWheel::ticks(after);
        let bucket = (due % BUCKETS) as u8;
        self.due = due;
        if bucket != self.bucket {
            let Some(seat) = self.wheel.buckets[self.bucket as usize].remove(self.key) else { return };
            self.key = self.wheel.buckets[bucket as usize].lock().insert(seat) as u32;
            self.bucket = bucket;
        }
        let mut bucket = self.wheel.buckets[bucket as usize].lock();
        let Some(seat) = bucket.get_mut(self.key as usize) else { return };
        seat.due = due;
        if self.wheel.now() >= due {
            // The hand may have passed while the seat was moved: it will not come back for half a minute.
            self.task = 0;
            if let Some(waker) = seat.waker.take() {
                drop(bucket);
                waker.wake();
            }
        }
    }

    /// As [`reset`](Self::reset), but never later than what is set already.
    pub fn shorten(&mut self, after: Duration) {
        if self.wheel.now() + TimerWheel::ticks(after) < self.due {
            self.reset(after);
        }
    }

    /// Ready when the time has come or the node drains. After [`Due::Time`] it is pending until the next
    /// [`reset`](Self::reset).
    pub fn poll(&mut self, cx: &mut Context<'_>) -> Poll<Due> {
        let now = self.wheel.now();
        let task = cx.waker().data() as usize;
        let kicks = self.wheel.kicks.load(Acquire);
        if now < self.due && self.task == task && self.kicks == kicks && (self.left || !self.wheel.is_draining()) {
            return Poll::Pending;
        }
        self.kicks = kicks;
        let mut bucket = self.wheel.buckets[self.bucket as usize].lock();
        let Some(seat) = bucket.get_mut(self.key as usize) else { return Poll::Pending };
        // The waker may have been taken to fire: the next poll has to leave one again.
        if std::mem::take(&mut seat.kicked) {
            self.task = 0;
            return Poll::Ready(Due::Kicked);
        }
        if !self.left && seat.leave {
            self.left = true;
            self.task = 0;
            return Poll::Ready(Due::Leave);
        }
        if now >= self.due {
            self.due = u32::MAX;
            seat.due = u32::MAX;
            self.task = 0;
            return Poll::Ready(Due::Time);
        }
        if seat.waker.as_ref().is_none_or(|waker| !waker.will_wake(cx.waker())) {
            seat.waker = Some(cx.waker().clone());
        }
        self.task = task;
        Poll::Pending
    }
}

impl Drop for Timer {
    fn drop(&mut self) {
        self.wheel.buckets[self.bucket as usize].remove(self.key);
        self.wheel.seats.fetch_sub(1, Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicU32;

    use super::*;

    struct Count(AtomicU32);

    impl std::task::Wake for Count {
        fn wake(self: Arc<Self>) {
            self.0.fetch_add(1, Relaxed);
        }
    }

    fn waker() -> (Arc<Count>, Waker) {
        let count = Arc::new(Count(AtomicU32::new(0)));
        (count.clone(), count.into())
    }

    fn left(timers: &mut [Timer], cx: &mut Context<'_>) -> usize {
        timers.iter_mut().map(|timer| timer.poll(cx)).filter(|due| *due == Poll::Ready(Due::Leave)).count()
    }

    fn turn(wheel: &TimerWheel, ticks: u32) {
        let mut calls = Vec::new();
        for _ in 0..ticks {
            wheel.tick(&mut calls);
            calls.drain(..).for_each(Waker::wake);
        }
    }

    #[tokio::test(start_paused = true)]
    async fn fires_once_when_due_and_again_after_a_reset() {
        let wheel = TimerWheel::start();
        let (count, waker) = waker();
        let mut cx = Context::from_waker(&waker);
        let mut timer = wheel.timer(Duration::from_secs(1));
        assert_eq!(timer.poll(&mut cx), Poll::Pending);
        turn(&wheel, 3);
        assert_eq!((timer.poll(&mut cx), count.0.load(Relaxed)), (Poll::Pending, 0));
        turn(&wheel, 1);
        assert_eq!((timer.poll(&mut cx), count.0.load(Relaxed)), (Poll::Ready(Due::Time), 1));
        assert_eq!(timer.poll(&mut cx), Poll::Pending);
        turn(&wheel, 2 * BUCKETS);
        assert_eq!((timer.poll(&mut cx), count.0.load(Relaxed)), (Poll::Pending, 1));

        // Longer than a round, and in whatever bucket.
        for after in [Duration::from_millis(1), Duration::from_secs(20), Duration::from_secs(80)] {
            timer.reset(after);
            let before = count.0.load(Relaxed);
            assert_eq!(timer.poll(&mut cx), Poll::Pending);
            turn(&wheel, TimerWheel::ticks(after) - 1);
            assert_eq!(timer.poll(&mut cx), Poll::Pending, "{after:?}");
            turn(&wheel, 1);
            assert_eq!((timer.poll(&mut cx), count.0.load(Relaxed)), (Poll::Ready(Due::Time), before + 1), "{after:?}");
        }
        drop(timer);
        assert!(wheel.is_empty());
        assert!(wheel.buckets.iter().all(|bucket| bucket.lock().is_empty()));
    }

    #[test]
    fn a_time_without_end_is_a_long_one() {
        for years in [1, 20, 33, 100] {
            let ticks = TimerWheel::ticks(Duration::from_secs(years * 365 * 24 * 60 * 60));
            assert!(ticks > 126_000_000 && ticks.checked_add(u32::MAX / 2).is_some(), "{years}: {ticks}");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn at_most_only_brings_forward() {
        let wheel = TimerWheel::start();
        let mut timer = wheel.timer(Duration::from_secs(20));
        timer.shorten(Duration::from_secs(1));
        timer.shorten(Duration::from_secs(30));
        turn(&wheel, 4);
        assert_eq!(timer.poll(&mut Context::from_waker(Waker::noop())), Poll::Ready(Due::Time));
    }

    #[tokio::test(start_paused = true)]
    async fn a_drain_is_spread_and_reaches_everyone_once() {
        let wheel = TimerWheel::start();
        let (count, waker) = waker();
        let mut cx = Context::from_waker(&waker);
        let mut timers: Vec<_> = (0..1000).map(|i| wheel.timer(Duration::from_secs(3600 + i))).collect();
        assert!(timers.iter_mut().all(|timer| timer.poll(&mut cx).is_pending()));
        wheel.drain(Duration::from_secs(10));
        turn(&wheel, 20);
        let half = left(&mut timers, &mut cx);
        assert!((480..=520).contains(&half) && count.0.load(Relaxed) as usize == half, "{half}");
        // Born in the drain, and called before it has ever looked.
        timers.push(wheel.timer(Duration::from_secs(3600)));
        turn(&wheel, 21);
        let rest = left(&mut timers, &mut cx);
        assert_eq!((half + rest, count.0.load(Relaxed)), (1001, 1000));
        assert!(timers.iter_mut().all(|timer| timer.poll(&mut cx).is_pending()));
    }

    #[tokio::test(start_paused = true)]
    async fn who_is_kicked_is_woken_and_told_once() {
        let wheel = TimerWheel::start();
        let (count, waker) = waker();
        let mut cx = Context::from_waker(&waker);
        let mut timers: Vec<_> = (0..10).map(|i| wheel.timer(Duration::from_secs(i * 7))).collect();
        timers.iter_mut().zip(1..).for_each(|(timer, owner)| timer.set_owner(owner));
        turn(&wheel, 1);
        timers.iter_mut().for_each(|timer| {
            let _ = timer.poll(&mut cx);
            timer.reset(Duration::from_secs(60));
            assert_eq!(timer.poll(&mut cx), Poll::Pending);
        });
        let woken = count.0.load(Relaxed);
        let mut who = HashSet::from([3, 7, 99]);
        wheel.kick(&mut who);
        assert_eq!((who, count.0.load(Relaxed) - woken), (HashSet::from([99]), 2));
        let kicked: Vec<usize> = (0..10).filter(|at| timers[*at].poll(&mut cx) == Poll::Ready(Due::Kicked)).collect();
        assert_eq!(kicked, [2, 6]);
        assert!(timers.iter_mut().all(|timer| timer.poll(&mut cx).is_pending()));
    }

    #[tokio::test(start_paused = true)]
    async fn turns_by_itself_and_ends_with_its_owner() {
        let wheel = TimerWheel::start();
        let mut timer = wheel.timer(Duration::from_secs(20));
        let start = Instant::now();
        assert_eq!(std::future::poll_fn(|cx| timer.poll(cx)).await, Due::Time);
        let took = start.elapsed();
        assert!(took >= Duration::from_secs(20) && took <= Duration::from_secs(20) + TICK, "{took:?}");
        drop(timer);
        let weak = Arc::downgrade(&wheel);
        drop(wheel);
        assert_eq!(weak.strong_count(), 0);
    }
}
