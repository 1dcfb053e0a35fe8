//! [`Outbox`]: bytes for one client, which any task may append and the client's own task writes.
//!
//! Writers encode directly into one buffer: a message costs neither an allocation nor a queue entry. The client's task
//! swaps the buffer for an empty one and writes all of it at once.

use std::{
    sync::atomic::{
        AtomicBool,
        Ordering::{Acquire, Release},
    },
    task::{Context, Poll, Waker},
};

use parking_lot::{Mutex, MutexGuard};

use crate::error::Code;

/// So many times the limit, an outbox [takes no more](Outbox::is_overfull) large messages.
const HARD_LIMIT: usize = 4;
/// So many times the limit, the client is closed: it reads nothing, and small messages alone have filled the outbox.
const CLOSE_LIMIT: usize = 8;

/// State that a protocol keeps beside the bytes of an [`Outbox`], under the same lock.
pub(crate) trait OutboxExtra {
    /// Called when the outbox is closed and its bytes are dropped: frees and resets what belongs to them.
    fn discard(&mut self);
}

pub(crate) struct Outbox<X> {
    /// Bytes beyond which [`offer`](Self::offer) rejects.
    limit: usize,
    /// The waker was used, or never left: the task must take the lock and look.
    woken: AtomicBool,
    state: Mutex<OutboxState<X>>,
}

pub(crate) struct OutboxState<X> {
    pub(crate) bytes: Vec<u8>,
    /// Bytes that `extra` holds, and that count towards the limit too.
    pub(crate) held: u32,
    pub(crate) extra: X,
    end: OutboxEnd,
    /// `None` while the task is awake: it looks at the outbox before it sleeps.
    waker: Option<Waker>,
    /// The writers that wait for room; `None` while there are none.
    writers: Option<Box<WaitingWriters>>,
}

/// The tasks that write to an outbox beyond its limit and wait until its client has read.
#[derive(Default)]
struct WaitingWriters {
    wakers: Vec<Waker>,
    /// The client is too slow to be waited for, until it has read what was over the limit.
    abandoned: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum OutboxEnd {
    Open,
    /// Nothing can be appended; the client is expected to close.
    Sealed,
    /// Nothing can be appended; ends when all bytes are taken.
    Finishing,
    /// The connection is to be closed for this reason; nothing is kept.
    Closing(Code),
    Closed,
}

/// The content of an outbox, for its reader.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum OutboxContent {
    /// The buffer that was passed was empty and now holds bytes.
    Bytes,
    /// The connection is to be closed for this reason.
    Close(Code),
    /// Nothing more will come.
    Closed,
}

/// The result of offering a message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum OfferOutcome {
    Written,
    /// The limit is reached: nothing was written.
    Full,
    /// Nothing is written any more.
    Closed,
}

impl<X: OutboxExtra> Outbox<X> {
    pub(crate) fn new(limit: usize, extra: X) -> Self {
        let state = OutboxState { bytes: Vec::new(), held: 0, extra, end: OutboxEnd::Open, waker: None, writers: None };
        Outbox { limit, woken: AtomicBool::new(true), state: Mutex::new(state) }
    }

    pub(crate) fn limit(&self) -> usize {
        self.limit
    }

    pub(crate) fn lock(&self) -> MutexGuard<'_, OutboxState<X>> {
        self.state.lock()
    }

    /// Like [`OutboxState::poll_take`], for an outbox that is always polled by the same task: needs no lock while nothing
    /// has changed. `taken` is called under the lock if there are bytes.
    pub(crate) fn poll_take(
        &self,
        cx: &mut Context<'_>,
        into: &mut Vec<u8>,
        taken: impl FnOnce(&mut X),
    ) -> Poll<OutboxContent> {
        if !self.woken.load(Acquire) {
            return Poll::Pending;
        }
        let mut state = self.state.lock();
        let content = state.poll_take(cx, into);
        match content {
            Poll::Pending => self.woken.store(false, Release),
            Poll::Ready(_) => taken(&mut state.extra),
        }
        self.wake_writers(state);
        content
    }

    /// Whether so much waits that writers should wait until the client has read. Bytes that `extra` holds do not count:
    /// they are not ready to be read.
    pub(crate) fn is_full(&self, state: &OutboxState<X>) -> bool {
        state.bytes.len() >= self.limit && state.writers.as_ref().is_none_or(|writers| !writers.abandoned)
    }

    /// Whether so much waits that a large message has to be replaced by a small one that reports its loss: the writers
    /// could not wait any longer.
    pub(crate) fn is_overfull(&self, state: &OutboxState<X>) -> bool {
        state.weight() >= self.limit.saturating_mul(HARD_LIMIT)
    }

    /// Waits until the outbox is not [full](Self::is_full).
    pub(crate) fn poll_room(&self, cx: &mut Context<'_>) -> Poll<()> {
        let mut state = self.state.lock();
        if !self.is_full(&state) {
            return Poll::Ready(());
        }
        let wakers = &mut state.writers.get_or_insert_default().wakers;
        if !wakers.iter().any(|waker| waker.will_wake(cx.waker())) {
            wakers.push(cx.waker().clone());
        }
        Poll::Pending
    }

    /// Ends the wait of all writers, which do not wait again before the client has read what is over the limit.
    pub(crate) fn abandon_wait(&self) {
        let mut state = self.state.lock();
        if self.is_full(&state) {
            state.writers.get_or_insert_default().abandoned = true;
            self.wake_writers(state);
        }
    }

    /// Wakes the writers if there is room for them.
    pub(crate) fn wake_writers(&self, mut state: MutexGuard<'_, OutboxState<X>>) {
        if state.writers.is_none() || self.is_full(&state) {
            return;
        }
        let writers = match state.bytes.len() >= self.limit {
            // They stay abandoned.
            true => state.writers.as_mut().map(|writers| std::mem::take(&mut writers.wakers)),
            false => state.writers.take().map(|writers| writers.wakers),
        };
        drop(state);
        writers.into_iter().flatten().for_each(Waker::wake);
    }

    /// Appends a message, unless the outbox is ending.
    pub(crate) fn append(&self, write: impl FnOnce(&mut OutboxState<X>)) {
        let mut state = self.state.lock();
        if state.end != OutboxEnd::Open {
            return;
        }
        write(&mut state);
        if state.weight() > self.limit.saturating_mul(CLOSE_LIMIT) {
            state.close_with(Code::Slow);
        }
        self.wake(state);
    }

    /// Appends a message if the limit is not reached.
    pub(crate) fn offer(&self, write: impl FnOnce(&mut OutboxState<X>)) -> OfferOutcome {
        let mut state = self.state.lock();
        if state.end != OutboxEnd::Open {
            return OfferOutcome::Closed;
        }
        if state.weight() >= self.limit {
            return OfferOutcome::Full;
        }
        write(&mut state);
        self.wake(state);
        OfferOutcome::Written
    }

    /// Changes the state, also of an outbox that is ending, and wakes the task.
    pub(crate) fn update(&self, change: impl FnOnce(&mut OutboxState<X>)) {
        let mut state = self.state.lock();
        change(&mut state);
        self.wake(state);
    }

    /// Wakes the client's task, unless it is awake, and the writers if there is room for them.
    fn wake(&self, mut state: MutexGuard<'_, OutboxState<X>>) {
        let waker = state.waker.take();
        if waker.is_some() {
            self.woken.store(true, Release);
        }
        self.wake_writers(state);
        if let Some(waker) = waker {
            waker.wake();
        }
    }
}

impl<X: OutboxExtra> OutboxState<X> {
    /// Bytes that wait, including those that `extra` holds.
    fn weight(&self) -> usize {
        self.bytes.len() + self.held as usize
    }

    /// Swaps the bytes for the empty `into`. `Pending`: there are none, and the task will be woken.
    pub(crate) fn poll_take(&mut self, cx: &mut Context<'_>, into: &mut Vec<u8>) -> Poll<OutboxContent> {
        debug_assert!(into.is_empty());
        if let OutboxEnd::Closing(code) = self.end {
            return Poll::Ready(OutboxContent::Close(code));
        }
        if !self.bytes.is_empty() {
            std::mem::swap(&mut self.bytes, into);
            return Poll::Ready(OutboxContent::Bytes);
        }
        if matches!(self.end, OutboxEnd::Finishing | OutboxEnd::Closed) {
            return Poll::Ready(OutboxContent::Closed);
        }
        if self.waker.as_ref().is_none_or(|waker| !waker.will_wake(cx.waker())) {
            self.waker = Some(cx.waker().clone());
        }
        Poll::Pending
    }

    pub(crate) fn is_open(&self) -> bool {
        self.end == OutboxEnd::Open
    }

    /// Nothing is appended any more; the client is expected to close.
    pub(crate) fn seal(&mut self) {
        if self.end == OutboxEnd::Open {
            self.end = OutboxEnd::Sealed;
        }
    }

    /// Nothing is appended any more; the outbox ends when all bytes are taken. False if it was ending already.
    pub(crate) fn finish(&mut self) -> bool {
        let first = matches!(self.end, OutboxEnd::Open | OutboxEnd::Sealed);
        if first {
            self.end = OutboxEnd::Finishing;
        }
        first
    }

    /// Whether it ends, and all bytes are taken.
    pub(crate) fn is_finished(&self) -> bool {
        self.end == OutboxEnd::Finishing && self.bytes.is_empty()
    }

    /// Has the connection closed for this reason. Drops all bytes.
    pub(crate) fn close_with(&mut self, code: Code) {
        self.discard(OutboxEnd::Closing(code));
    }

    /// Nothing is kept from now on.
    pub(crate) fn close(&mut self) {
        self.discard(OutboxEnd::Closed);
    }

    fn discard(&mut self, end: OutboxEnd) {
        self.end = end;
        (self.bytes, self.held) = (Vec::new(), 0);
        self.extra.discard();
    }

    /// Frees what an idle connection does not need.
    pub(crate) fn shrink(&mut self) {
        if self.bytes.is_empty() {
            self.bytes = Vec::new();
        }
    }
}
