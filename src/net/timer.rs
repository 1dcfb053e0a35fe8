//! [`TimerWheel`]: one task that keeps the time for all connections of a node.
//!
//! A `tokio::time::Sleep` per connection costs memory and a lock of the runtime's own wheel. Heartbeats, stall timeouts
//! and draining need no more precision than 250 ms, and here share one waker per connection.
//!
//! The wheel counts the time in which the process **runs**. A process that stood still (SIGSTOP, a frozen container or
//! virtual machine) has neither read what its peers sent nor written what they wait for, so the pause counts for no
//! deadline of a peer: every one of them is as far away as before. The wheel also rests for a moment afterwards, in which
//! the sockets are read.

use std::{
    collections::HashSet,
    sync::{
        Arc, Weak,
        atomic::{
            AtomicU32,
            Ordering::{Acquire, Relaxed, Release},
        },
    },
    task::{Context, Poll, Waker},
    time::Duration,
};

use parking_lot::{Mutex, MutexGuard};
use slab::Slab;
use tokio::time::{Instant, error::Elapsed};

use crate::error::Code;

/// The precision of all timers.
pub(crate) const TICK: Duration = Duration::from_millis(250);
const BUCKETS: u32 = 128;
/// Wake-ups between two yields: a bucket may hold tens of thousands of timers.
const BURST: usize = 256;

/// Keeps the time for many connections. Created by [`TimerWheel::start`].
pub struct TimerWheel {
    /// Ticks since the start, from 1.
    now: AtomicU32,
    /// The tick at which the drain began (0: not draining), and the tick at which all must have left.
    drain: AtomicU32,
    drained: AtomicU32,
    /// How often [`kick`](TimerWheel::kick) was called.
    kicks: AtomicU32,
    buckets: [Bucket; BUCKETS as usize],
}

struct Bucket(Mutex<Slab<TimerSlot>>);

struct TimerSlot {
    due: u32,
    /// The connection's number; 0 if it cannot be kicked.
    owner: u32,
    leave: bool,
    kicked: Option<Code>,
    waker: Option<Waker>,
}

/// One connection's timer, which is removed from the wheel on drop.
pub struct Timer {
    wheel: Arc<TimerWheel>,
    due: u32,
    key: u32,
    /// The value of the wheel's `kicks` at the last poll.
    kicks: u32,
    bucket: u8,
    left: bool,
    /// Identifies the task whose waker is in the slot, so that a poll needs no lock. 0: none.
    task: usize,
}

/// The reason why a [`Timer`] fired.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Due {
    /// The time has come. Set the next with [`Timer::reset`].
    Time,
    /// The node drains, and it is this connection's turn to leave. Reported once.
    Leave,
    /// The connection is closed with this code. Reported once.
    Kicked(Code),
}

// === impl TimerWheel ===

impl TimerWheel {
    /// Starts the task that turns the wheel; it ends when the wheel is dropped. Needs a tokio runtime.
    pub fn start() -> Arc<Self> {
        let wheel = Arc::new(TimerWheel {
            now: AtomicU32::new(1),
            drain: AtomicU32::new(0),
            drained: AtomicU32::new(0),
            kicks: AtomicU32::new(0),
            buckets: std::array::from_fn(|_| Bucket(Mutex::new(Slab::new()))),
        });
        tokio::spawn(run(Arc::downgrade(&wheel)));
        wheel
    }

    /// Ticks since the start. Costs one atomic load.
    pub(crate) fn now(&self) -> u32 {
        self.now.load(Relaxed)
    }

    /// `time` in ticks, rounded up; at least one, and so few that they can be added to any tick.
    pub(crate) fn ticks(time: Duration) -> u32 {
        u32::try_from(time.as_millis().div_ceil(TICK.as_millis())).unwrap_or(u32::MAX).clamp(1, u32::MAX / 2)
    }

    /// The time from tick `since` to tick `now`.
    pub(crate) fn span(since: u32, now: u32) -> Duration {
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
            kicked: None,
            waker: None,
        }) as u32;
        Timer { wheel: self.clone(), due, key, kicks: 0, bucket, left: false, task: 0 }
    }

    /// Closes the connections with these numbers with a code, and leaves in `owners` those that were not found: they are gone, or
    /// were moving to another bucket.
    pub(crate) fn kick(&self, owners: &mut HashSet<u32>, code: Code) {
        let mut wakers = Vec::new();
        for bucket in &self.buckets {
            for (_, slot) in bucket.lock().iter_mut() {
                if slot.owner != 0 && owners.remove(&slot.owner) {
                    slot.kicked = Some(code);
                    wakers.extend(slot.waker.take());
                }
            }
        }
        // Before they are woken: otherwise their poll would not look at the slot.
        self.kicks.fetch_add(1, Release);
        wakers.into_iter().for_each(Waker::wake);
    }

    /// Lets every connection leave, spread evenly over `window`. Includes connections that are opened later.
    pub fn drain(&self, window: Duration) {
        let now = self.now();
        self.drained.store(now + TimerWheel::ticks(window), Relaxed);
        self.drain.store(now, Relaxed);
    }

    pub(crate) fn is_draining(&self) -> bool {
        self.drain.load(Relaxed) != 0
    }

    /// For how long it has been draining; zero if it is not.
    pub(crate) fn draining_for(&self) -> Duration {
        match self.drain.load(Relaxed) {
            0 => Duration::ZERO,
            since => Self::span(since, self.now()),
        }
    }

    /// Live timers.
    #[cfg(test)]
    pub(crate) fn len(&self) -> usize {
        self.buckets.iter().map(|bucket| bucket.lock().len()).sum()
    }

    /// Whether there are no live timers.
    pub fn is_empty(&self) -> bool {
        self.buckets.iter().all(|bucket| bucket.lock().is_empty())
    }

    /// Advances the time by one tick, and appends the wakers of due timers to `wakers`.
    fn tick(&self, wakers: &mut Vec<Waker>) {
        let now = self.now.fetch_add(1, Relaxed) + 1;
        for (_, slot) in self.buckets[(now % BUCKETS) as usize].lock().iter_mut() {
            if slot.due <= now {
                // Not again before the next reset: the connection may be busy for longer than a tick.
                slot.due = u32::MAX;
                wakers.extend(slot.waker.take());
            }
        }
        if self.is_draining() {
            self.begin_leaving(now, wakers);
        }
    }

    /// Lets this tick's share of the remaining connections leave, rounded up. Includes connections that were opened
    /// during the drain.
    fn begin_leaving(&self, now: u32, wakers: &mut Vec<Waker>) {
        let ticks = self.drained.load(Relaxed).saturating_sub(now) as usize + 1;
        let waiting: usize =
            self.buckets.iter().map(|bucket| bucket.lock().iter().filter(|(_, slot)| !slot.leave).count()).sum();
        let mut share = waiting.div_ceil(ticks);
        for bucket in &self.buckets {
            for (_, slot) in bucket.lock().iter_mut().filter(|(_, slot)| !slot.leave) {
                if share == 0 {
                    return;
                }
                share -= 1;
                slot.leave = true;
                wakers.extend(slot.waker.take());
            }
        }
    }
}

/// A loop that is later than this has stood still, with the whole process.
const STANDSTILL: Duration = Duration::from_secs(1);
/// How long the sockets are read after a standstill before anything is judged by the time.
const RESUME: Duration = Duration::from_secs(1);

/// Notices that the process stood still, for a loop that does something in every `period`.
pub(crate) struct Standstill {
    period: Duration,
    expected: Instant,
}

impl Standstill {
    pub(crate) fn new(period: Duration) -> Self {
        Standstill { period, expected: Instant::now() + period }
    }

    /// To be awaited in each round, before its work: if the process stood still since the last round, lets the sockets be
    /// read first, and returns for how long it stood.
    pub(crate) async fn resume(&mut self) -> Option<Duration> {
        let late = Instant::now().saturating_duration_since(self.expected);
        let stood = (late >= STANDSTILL).then_some(late);
        if stood.is_some() {
            tokio::time::sleep(RESUME).await;
        }
        self.expected = Instant::now() + self.period;
        stood
    }
}

/// Like [`tokio::time::timeout`], for a deadline that judges a peer: after a standstill of the process, what the peer has
/// sent meanwhile is read first.
///
/// # Errors
/// The future is not ready in time.
pub(crate) async fn timeout<F: Future>(time: Duration, future: F) -> Result<F::Output, Elapsed> {
    let mut future = std::pin::pin!(future);
    let start = Instant::now();
    match tokio::time::timeout(time, &mut future).await {
        Err(_) if start.elapsed() >= time.saturating_add(STANDSTILL) => tokio::time::timeout(RESUME, future).await,
        result => result,
    }
}

async fn run(wheel: Weak<TimerWheel>) {
    let mut next = Instant::now() + TICK;
    let mut standstill = Standstill::new(TICK);
    let mut wakers = Vec::new();
    loop {
        tokio::time::sleep_until(next).await;
        // A little delay is made up for, so that the wheel does not lag behind the time.
        next += TICK;
        if let Some(stood) = standstill.resume().await {
            tracing::warn!(?stood, "this process stood still: the deadlines of its connections are postponed");
            next = Instant::now() + TICK;
        }
        // Ends when the wheel is dropped: it is not held between ticks.
        let Some(wheel) = wheel.upgrade() else { return };
        wheel.tick(&mut wakers);
        drop(wheel);
        while !wakers.is_empty() {
            wakers.drain(wakers.len().saturating_sub(BURST)..).for_each(Waker::wake);
            tokio::task::yield_now().await;
        }
        wakers.shrink_to(BURST);
    }
}

// === impl Bucket ===

impl Bucket {
    fn lock(&self) -> MutexGuard<'_, Slab<TimerSlot>> {
        self.0.lock()
    }

    /// Frees the bucket's memory with its last slot: timers move around the wheel, and would leave capacity in every
    /// bucket.
    fn remove(&self, key: u32) -> Option<TimerSlot> {
        let mut slots = self.lock();
        let slot = slots.try_remove(key as usize);
        if slots.is_empty() {
            *slots = Slab::new();
        }
        slot
    }
}

// === impl Timer ===

impl Timer {
    /// Ticks since the wheel's start.
    pub(crate) fn now(&self) -> u32 {
        self.wheel.now()
    }

    /// Sets the connection's number, for [`TimerWheel::kick`]. Must not be 0.
    pub fn set_owner(&mut self, owner: u32) {
        if let Some(slot) = self.wheel.buckets[self.bucket as usize].lock().get_mut(self.key as usize) {
            slot.owner = owner;
        }
    }

    /// Fires after `after` from now instead, rounded up to ticks.
    pub(crate) fn reset(&mut self, after: Duration) {
        let due = self.wheel.now() + TimerWheel::ticks(after);
        let bucket = (due % BUCKETS) as u8;
        self.due = due;
        if bucket != self.bucket {
            let Some(slot) = self.wheel.buckets[self.bucket as usize].remove(self.key) else { return };
            self.key = self.wheel.buckets[bucket as usize].lock().insert(slot) as u32;
            self.bucket = bucket;
        }
        let mut bucket = self.wheel.buckets[bucket as usize].lock();
        let Some(slot) = bucket.get_mut(self.key as usize) else { return };
        slot.due = due;
        if self.wheel.now() >= due {
            // The wheel may have passed the bucket while the slot was moved, and returns only after a round of 32 s.
            self.task = 0;
            if let Some(waker) = slot.waker.take() {
                drop(bucket);
                waker.wake();
            }
        }
    }

    /// Like [`reset`](Self::reset), but never later than the current setting.
    pub(crate) fn shorten(&mut self, after: Duration) {
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
        let Some(slot) = bucket.get_mut(self.key as usize) else { return Poll::Pending };
        // The waker may have been used: the next poll has to leave one again.
        if let Some(code) = slot.kicked.take() {
            self.task = 0;
            return Poll::Ready(Due::Kicked(code));
        }
        if !self.left && slot.leave {
            self.left = true;
            self.task = 0;
            return Poll::Ready(Due::Leave);
        }
        if now >= self.due {
            self.due = u32::MAX;
            slot.due = u32::MAX;
            self.task = 0;
            return Poll::Ready(Due::Time);
        }
        if slot.waker.as_ref().is_none_or(|waker| !waker.will_wake(cx.waker())) {
            slot.waker = Some(cx.waker().clone());
        }
        self.task = task;
        Poll::Pending
    }
}

impl Drop for Timer {
    fn drop(&mut self) {
        self.wheel.buckets[self.bucket as usize].remove(self.key);
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicU32;

    use super::*;

    struct WakeCount(AtomicU32);

    impl std::task::Wake for WakeCount {
        fn wake(self: Arc<Self>) {
            self.0.fetch_add(1, Relaxed);
        }
    }

    fn waker() -> (Arc<WakeCount>, Waker) {
        let count = Arc::new(WakeCount(AtomicU32::new(0)));
        (count.clone(), count.into())
    }

    fn left(timers: &mut [Timer], cx: &mut Context<'_>) -> usize {
        timers.iter_mut().map(|timer| timer.poll(cx)).filter(|due| *due == Poll::Ready(Due::Leave)).count()
    }

    fn turn(wheel: &TimerWheel, ticks: u32) {
        let mut wakers = Vec::new();
        for _ in 0..ticks {
            wheel.tick(&mut wakers);
            wakers.drain(..).for_each(Waker::wake);
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

        // Also longer than a round, and in any bucket.
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
    fn an_endless_time_is_a_long_one() {
        for years in [1, 20, 33, 100] {
            let ticks = TimerWheel::ticks(Duration::from_secs(years * 365 * 24 * 60 * 60));
            assert!(ticks > 126_000_000 && ticks.checked_add(u32::MAX / 2).is_some(), "{years}: {ticks}");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn shorten_never_postpones() {
        let wheel = TimerWheel::start();
        let mut timer = wheel.timer(Duration::from_secs(20));
        timer.shorten(Duration::from_secs(1));
        timer.shorten(Duration::from_secs(30));
        turn(&wheel, 4);
        assert_eq!(timer.poll(&mut Context::from_waker(Waker::noop())), Poll::Ready(Due::Time));
    }

    #[tokio::test(start_paused = true)]
    async fn a_drain_is_spread_and_reaches_each_timer_once() {
        let wheel = TimerWheel::start();
        let (count, waker) = waker();
        let mut cx = Context::from_waker(&waker);
        let mut timers: Vec<_> = (0..1000).map(|i| wheel.timer(Duration::from_secs(3600 + i))).collect();
        assert!(timers.iter_mut().all(|timer| timer.poll(&mut cx).is_pending()));
        wheel.drain(Duration::from_secs(10));
        turn(&wheel, 20);
        let half = left(&mut timers, &mut cx);
        assert!((480..=520).contains(&half) && count.0.load(Relaxed) as usize == half, "{half}");
        // Created during the drain, and due to leave before its first poll.
        timers.push(wheel.timer(Duration::from_secs(3600)));
        turn(&wheel, 21);
        let rest = left(&mut timers, &mut cx);
        assert_eq!((half + rest, count.0.load(Relaxed)), (1001, 1000));
        assert!(timers.iter_mut().all(|timer| timer.poll(&mut cx).is_pending()));
    }

    #[tokio::test(start_paused = true)]
    async fn a_kicked_timer_is_woken_once() {
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
        let mut owners = HashSet::from([3, 7, 99]);
        wheel.kick(&mut owners, Code::Kicked);
        assert_eq!((owners, count.0.load(Relaxed) - woken), (HashSet::from([99]), 2));
        let kicked: Vec<usize> =
            (0..10).filter(|at| timers[*at].poll(&mut cx) == Poll::Ready(Due::Kicked(Code::Kicked))).collect();
        assert_eq!(kicked, [2, 6]);
        assert!(timers.iter_mut().all(|timer| timer.poll(&mut cx).is_pending()));
    }

    #[tokio::test(start_paused = true)]
    async fn the_task_turns_the_wheel_and_ends_with_it() {
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
