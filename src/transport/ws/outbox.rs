//! [`Outbox`]: what waits to be written to one connection, put there by whoever has something to say to it.
//!
//! The hub and other connections' tasks encode into its buffer directly: a call costs no allocation and no queue. The
//! connection's task swaps the buffer for an empty one and writes all of it at once.

use std::{
    sync::atomic::{
        AtomicBool,
        Ordering::{Acquire, Release},
    },
    task::{Context, Poll, Waker},
};

use parking_lot::{Mutex, MutexGuard};
use slab::Slab;

use super::jsonrpc;
use crate::{
    error::{Code, Error},
    net::websocket::frame,
    rpc::{CallAnswer, CallId, CallerId, ForwardedCall, MethodNames, Peer, WriteOutcome},
};

/// Beyond so many times its limit nothing is kept for a peer: it does not read what it asked for.
const HARD: usize = 4;

/// The outbound side of one connection, shared with the hub.
pub struct Outbox {
    /// Bytes, beyond which a provider gets no more calls and its own requests wait.
    most: usize,
    /// Wrap each message into a WebSocket frame. (Over HTTP there is one message, and it is the body.)
    framed: bool,
    /// The waker was used, or never left: the task has to look. Spares it the lock while it is busy with other things.
    called: AtomicBool,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    bytes: Vec<u8>,
    /// Of these, what others' calls are: the rest is what the peer asked for itself.
    calls: usize,
    batches: Slab<Batch>,
    /// Bytes of the answers in `batches`.
    held: usize,
    end: End,
    /// Nothing while the connection's task is awake: it looks here before it sleeps.
    waker: Option<Waker>,
}

#[derive(Default, PartialEq, Eq)]
enum End {
    #[default]
    Open,
    /// To be closed for this reason; nothing more is kept.
    Closing(Code),
    /// The connection is no more.
    Gone,
}

/// Answers to an array, until all are there.
struct Batch {
    out: Vec<u8>,
    left: usize,
}

/// What [`Outbox::poll_take`] found.
pub enum Taken {
    /// The buffer given was empty and now holds frames.
    Frames,
    /// The connection is to be closed.
    Close(Code),
}

// === impl Outbox ===

impl Outbox {
    /// Of a WebSocket; `most` is `limits.queued` in bytes.
    pub fn framed(most: usize) -> Self {
        Outbox { most, framed: true, called: AtomicBool::new(true), state: Mutex::default() }
    }

    /// For one answer.
    pub fn bare(most: usize) -> Self {
        Outbox { most, framed: false, called: AtomicBool::new(true), state: Mutex::default() }
    }

    /// Swaps what waits for the empty `into`. `Pending`: nothing waits, and the task will be woken.
    pub fn poll_take(&self, cx: &mut Context<'_>, into: &mut Vec<u8>) -> Poll<Taken> {
        debug_assert!(into.is_empty());
        if !self.called.load(Acquire) {
            return Poll::Pending;
        }
        let mut state = self.state.lock();
        if let End::Closing(code) = state.end {
            return Poll::Ready(Taken::Close(code));
        }
        if !state.bytes.is_empty() {
            std::mem::swap(&mut state.bytes, into);
            state.calls = 0;
            return Poll::Ready(Taken::Frames);
        }
        if state.waker.as_ref().is_none_or(|waker| !waker.will_wake(cx.waker())) {
            state.waker = Some(cx.waker().clone());
        }
        self.called.store(false, Release);
        Poll::Pending
    }

    /// Takes what waits, for the last time.
    pub fn drain(&self, into: &mut Vec<u8>) {
        let mut state = self.state.lock();
        into.append(&mut state.bytes);
        state.calls = 0;
    }

    /// Whether so much of what the peer asked for waits that it should read before it asks for more. Calls of others do
    /// not count: their replies have to be read.
    pub fn is_full(&self) -> bool {
        let state = self.state.lock();
        state.bytes.len() - state.calls + state.held >= self.most
    }

    /// Whether so many answers wait to be written that no more should be made. Parts of a batch do not count: it is
    /// written when it is complete, and would never be.
    pub fn is_behind(&self) -> bool {
        let state = self.state.lock();
        state.bytes.len() - state.calls >= self.most
    }

    /// Gives back what an idle connection does not need.
    pub fn relax(&self) {
        let mut state = self.state.lock();
        if state.bytes.is_empty() {
            state.bytes = Vec::new();
        }
        if state.batches.is_empty() {
            state.batches = Slab::new();
        }
    }

    /// Nothing is kept from now on.
    pub fn close(&self) {
        let mut state = self.state.lock();
        *state = State { end: End::Gone, ..State::default() };
    }

    /// Has the connection closed.
    pub fn end(&self, code: Code) {
        self.change(|state| state.end(code));
    }

    /// Appends whole frames: control frames, as a rule.
    pub fn raw(&self, frames: &[u8]) {
        self.change(|state| state.bytes.extend_from_slice(frames));
    }

    /// Appends one message of weir's own accord.
    pub fn send(&self, write: impl FnOnce(&mut Vec<u8>)) {
        // Over HTTP the first message is the answer: a late reply must not be taken for it.
        if !self.framed {
            return;
        }
        self.change(|state| self.message(&mut state.bytes, write));
    }

    /// Answers the request that `to` is of: alone, or as part of its batch.
    pub fn answer(&self, to: &CallerId, write: impl FnOnce(&mut Vec<u8>)) {
        self.change(|state| {
            let Some(note) = to.note.checked_sub(1) else {
                return self.message(&mut state.bytes, write);
            };
            let Some(batch) = state.batches.get_mut(note as usize) else { return };
            let before = batch.out.len();
            if before > 1 {
                batch.out.push(b',');
            }
            write(&mut batch.out);
            state.held += batch.out.len() - before;
            self.settle(state, note);
        });
    }

    /// Opens an answer of `requests` parts; the note is for their [`CallerId`]s. Each has to be answered, and the batch
    /// [closed](Self::close_batch) when it has been dispatched.
    pub fn open_batch(&self, requests: usize) -> u32 {
        let mut state = self.state.lock();
        // One more than there are: what answers itself must not finish the batch while it is being dispatched.
        let batch = Batch { out: vec![b'['], left: requests + 1 };
        state.batches.insert(batch) as u32 + 1
    }

    /// All of the batch has been dispatched.
    pub fn close_batch(&self, note: u32) {
        self.change(|state| self.settle(state, note - 1));
    }

    /// Whether parts of the batch have not been answered.
    pub fn has_batch(&self, note: u32) -> bool {
        self.state.lock().batches.contains(note as usize - 1)
    }

    /// One part of a batch is settled.
    fn settle(&self, state: &mut State, at: u32) {
        let Some(batch) = state.batches.get_mut(at as usize) else { return };
        batch.left -= 1;
        if batch.left > 0 {
            return;
        }
        let batch = state.batches.remove(at as usize);
        state.held -= batch.out.len() - 1;
        // Of nothing but notifications nothing is answered, not even an empty array.
        if batch.out.len() > 1 {
            self.message(&mut state.bytes, |out| {
                out.extend_from_slice(&batch.out);
                out.push(b']');
            });
        }
    }

    fn message(&self, out: &mut Vec<u8>, write: impl FnOnce(&mut Vec<u8>)) {
        match self.framed {
            true => frame::text(out, write),
            false => write(out),
        }
    }

    fn change(&self, change: impl FnOnce(&mut State)) {
        let mut state = self.state.lock();
        if state.end != End::Open {
            return;
        }
        change(&mut state);
        if state.bytes.len() + state.held > self.most * HARD {
            state.end(Code::Slow);
        }
        self.wake(state);
    }

    /// Wakes the connection's task, unless it is awake.
    fn wake(&self, mut state: MutexGuard<'_, State>) {
        let Some(waker) = state.waker.take() else { return };
        self.called.store(true, Release);
        drop(state);
        waker.wake();
    }
}

impl State {
    fn end(&mut self, code: Code) {
        *self = State { end: End::Closing(code), waker: self.waker.take(), ..State::default() };
    }
}

impl Peer for Outbox {
    fn call(&self, call: &ForwardedCall<'_>) -> WriteOutcome {
        let mut state = self.state.lock();
        if state.end != End::Open {
            return WriteOutcome::Gone;
        }
        if state.bytes.len() + state.held >= self.most {
            return WriteOutcome::Full;
        }
        let before = state.bytes.len();
        self.message(&mut state.bytes, |out| {
            let id = call.id.map(CallId::text);
            let prefix = (call.names == MethodNames::Qualified).then_some(call.service);
            let params = call.params.map(|params| params.get().as_bytes());
            let id = id.as_ref().map(|id| id.as_bytes());
            jsonrpc::request(out, id, prefix, call.method, params, call.meta.as_ref());
        });
        state.calls += state.bytes.len() - before;
        self.wake(state);
        WriteOutcome::Written
    }

    fn cancel(&self, id: CallId) {
        self.send(|out| {
            jsonrpc::notification(out, "weir.cancel", &serde_json::json!({ "id": id.text().as_str() }));
        });
    }

    fn answer(&self, to: &CallerId, answer: CallAnswer<'_>) {
        Outbox::answer(self, to, |out| match answer {
            CallAnswer::Result(result) => jsonrpc::result(out, to.id(), result.get().as_bytes()),
            CallAnswer::Error(error) => jsonrpc::error_json(out, to.id(), error.to_raw().get().as_bytes()),
            CallAnswer::Failed(error) => jsonrpc::error(out, to.id(), &error),
        });
    }

    fn late(&self, to: &CallerId, answer: CallAnswer<'_>) {
        self.send(|out| match answer {
            CallAnswer::Result(result) => jsonrpc::late(out, to.id(), "result", result.get().as_bytes()),
            CallAnswer::Error(error) => jsonrpc::late(out, to.id(), "error", error.to_raw().get().as_bytes()),
            CallAnswer::Failed(error) => jsonrpc::late(out, to.id(), "error", error.to_rpc().to_string().as_bytes()),
        });
    }

    fn withdrawn(&self, service: &str, reason: &str) {
        self.send(|out| {
            let params = serde_json::json!({ "service": service, "reason": reason });
            jsonrpc::notification(out, "weir.withdrawn", &params);
        });
    }
}

/// The answer to a failed request, or nothing if it was a notification.
pub fn refuse(outbox: &Outbox, to: Option<&CallerId>, error: &Error) {
    if let Some(to) = to {
        outbox.answer(to, |out| jsonrpc::error(out, to.id(), error));
    }
}

#[cfg(test)]
mod tests {
    use std::sync::{
        Arc,
        atomic::{AtomicUsize, Ordering::Relaxed},
    };

    use super::*;
    use crate::rpc::RelayInfo;

    struct Count(AtomicUsize);

    impl std::task::Wake for Count {
        fn wake(self: Arc<Self>) {
            self.0.fetch_add(1, Relaxed);
        }
    }

    fn take(outbox: &Outbox, cx: &mut Context<'_>) -> Option<String> {
        let mut bytes = Vec::new();
        match outbox.poll_take(cx, &mut bytes) {
            Poll::Ready(Taken::Frames) => Some(String::from_utf8(bytes).unwrap()),
            Poll::Ready(Taken::Close(code)) => Some(code.as_str().to_owned()),
            Poll::Pending => None,
        }
    }

    fn put(outbox: &Outbox, note: u32, text: &str) {
        outbox.answer(&CallerId::new(b"1").with_note(note), |out| out.extend_from_slice(text.as_bytes()));
    }

    fn call(outbox: &Outbox) -> WriteOutcome {
        let call = ForwardedCall {
            id: None,
            service: "s",
            method: "method",
            names: MethodNames::Short,
            params: None,
            as_sent: None,
            meta: None,
            relay: RelayInfo::default(),
        };
        outbox.call(&call)
    }

    #[test]
    fn a_sleeping_task_is_woken_once() {
        let outbox = Outbox::bare(1_000);
        let count = Arc::new(Count(AtomicUsize::new(0)));
        let waker = count.clone().into();
        let mut cx = Context::from_waker(&waker);
        put(&outbox, 0, "a");
        assert_eq!(take(&outbox, &mut cx).unwrap(), "a");
        assert_eq!((take(&outbox, &mut cx), take(&outbox, &mut cx), count.0.load(Relaxed)), (None, None, 0));
        put(&outbox, 0, "b");
        put(&outbox, 0, "c");
        assert_eq!(count.0.load(Relaxed), 1);
        assert_eq!(take(&outbox, &mut cx).unwrap(), "bc");
        assert_eq!(take(&outbox, &mut cx), None);
        outbox.end(Code::Draining);
        assert_eq!(count.0.load(Relaxed), 2);
        assert_eq!(take(&outbox, &mut cx).unwrap(), "draining");
    }

    #[test]
    fn a_batch_is_one_array_when_all_is_there() {
        let outbox = Outbox::bare(1_000);
        let mut cx = Context::from_waker(Waker::noop());
        let (one, other) = (outbox.open_batch(2), outbox.open_batch(1));
        put(&outbox, one, "1");
        put(&outbox, other, "3");
        // All answered, but not all dispatched.
        assert!(outbox.has_batch(other));
        outbox.close_batch(other);
        outbox.close_batch(one);
        assert_eq!(take(&outbox, &mut cx).unwrap(), "[3]");
        put(&outbox, one, "2");
        assert_eq!(take(&outbox, &mut cx).unwrap(), "[1,2]");
        assert!(!outbox.has_batch(one));
        let silent = outbox.open_batch(0);
        outbox.close_batch(silent);
        assert_eq!(take(&outbox, &mut cx), None);
        assert_eq!(outbox.state.lock().held, 0);
    }

    #[test]
    fn what_is_not_read_has_an_end() {
        let outbox = Outbox::framed(100);
        while call(&outbox) == WriteOutcome::Written {}
        assert_eq!(call(&outbox), WriteOutcome::Full);
        // Not what it asked for itself: it is read on.
        assert!(!outbox.is_full());
        put(&outbox, 0, &"x".repeat(100));
        assert!(outbox.is_full());
        put(&outbox, 0, &"x".repeat(300));
        assert_eq!(take(&outbox, &mut Context::from_waker(Waker::noop())).unwrap(), "slow");
        assert_eq!(call(&outbox), WriteOutcome::Gone);
        outbox.close();
        assert_eq!(call(&outbox), WriteOutcome::Gone);
        put(&outbox, 0, "nowhere");
        assert!(outbox.state.lock().bytes.is_empty());
    }
}
