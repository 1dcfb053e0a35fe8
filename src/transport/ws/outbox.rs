//! [`RpcOutbox`]: the JSON-RPC messages that wait for one client.

use std::task::{Context, Poll};

use slab::Slab;

use super::jsonrpc;
use crate::{
    error::{Code, Error, Executed},
    net::websocket::{
        frame,
        outbox::{OfferOutcome, Outbox, OutboxContent, OutboxExtra, OutboxState},
    },
    rpc::{CallAnswer, CallId, CallerId, ForwardedCall, MethodNames, Peer, PeerRoom, WriteOutcome},
};

/// An answer of up to this size, in bytes, is written however much waits: it is no larger than an error.
const SMALL_ANSWER: usize = 512;

/// The outbound side of one connection, shared with the hub, which encodes calls and answers into it.
pub(crate) struct RpcOutbox(Outbox<RpcQueue>);

struct RpcQueue {
    batches: Slab<AnswerBatch>,
    /// Bytes of the outbox that are calls of others; the rest is what the client asked for itself.
    calls: u32,
    /// Wrap each message into a WebSocket frame. An HTTP response has one message, which is its body.
    framed: bool,
}

/// The answers to a batch of requests, until all are there.
struct AnswerBatch {
    out: Vec<u8>,
    left: usize,
}

impl OutboxExtra for RpcQueue {
    fn discard(&mut self) {
        (self.batches, self.calls) = (Slab::new(), 0);
    }
}

impl RpcOutbox {
    /// The outbox of a WebSocket; `limit` is `limits.queued` in bytes.
    pub(crate) fn framed(limit: usize) -> Self {
        Self::new(limit, true)
    }

    /// The outbox of one request over HTTP.
    pub(crate) fn bare(limit: usize) -> Self {
        Self::new(limit, false)
    }

    fn new(limit: usize, framed: bool) -> Self {
        RpcOutbox(Outbox::new(limit, RpcQueue { batches: Slab::new(), calls: 0, framed }))
    }

    /// Swaps what waits for the empty `into`. `Pending`: nothing waits, and the task will be woken.
    pub(crate) fn poll_take(&self, cx: &mut Context<'_>, into: &mut Vec<u8>) -> Poll<OutboxContent> {
        self.0.poll_take(cx, into, |queue| queue.calls = 0)
    }

    /// Moves what waits to the end of `into`.
    pub(crate) fn drain(&self, into: &mut Vec<u8>) {
        let mut state = self.0.lock();
        into.append(&mut state.bytes);
        state.extra.calls = 0;
    }

    /// Whether so much of what the client asked for waits that it must read before it asks for more. Calls of others do
    /// not count: the replies to them must be read.
    pub(crate) fn is_full(&self) -> bool {
        let state = self.0.lock();
        state.bytes.len() - state.extra.calls as usize + state.held as usize >= self.0.limit()
    }

    /// Whether so many answers wait to be written that no more should be produced. Parts of a batch do not count: it is
    /// written only when it is complete.
    pub(crate) fn is_behind(&self) -> bool {
        let state = self.0.lock();
        state.bytes.len() - state.extra.calls as usize >= self.0.limit()
    }

    /// Frees what an idle connection does not need.
    pub(crate) fn shrink(&self) {
        let mut state = self.0.lock();
        state.shrink();
        if state.extra.batches.is_empty() {
            state.extra.batches = Slab::new();
        }
    }

    /// Nothing is kept from now on.
    pub(crate) fn close(&self) {
        self.0.update(|state| state.close());
    }

    /// Has the connection closed for this reason.
    pub(crate) fn close_with(&self, code: Code) {
        self.0.append(|state| state.close_with(code));
    }

    /// Appends a notification.
    pub(crate) fn send(&self, write: impl FnOnce(&mut Vec<u8>)) {
        self.0.append(|state| {
            // Over HTTP the first message is the answer: a late reply must not be taken for it.
            if state.extra.framed {
                message(state, write);
            }
        });
    }

    /// Answers the request with the id `to`: alone, or as part of its batch. An answer for which there is no room left is
    /// replaced by an error.
    pub(crate) fn answer(&self, to: &CallerId, write: impl FnOnce(&mut Vec<u8>)) -> PeerRoom {
        let mut room = PeerRoom::Free;
        self.0.append(|state| {
            let overfull = self.0.is_overfull(state);
            let write = |out: &mut Vec<u8>| {
                let before = out.len();
                write(out);
                if overfull && out.len() - before > SMALL_ANSWER {
                    out.truncate(before);
                    jsonrpc::error(out, to.id(), &no_room());
                }
            };
            let Some(note) = to.note.checked_sub(1) else {
                message(state, write);
                if self.0.is_full(state) {
                    room = PeerRoom::Full;
                }
                return;
            };
            let Some(batch) = state.extra.batches.get_mut(note as usize) else { return };
            let before = batch.out.len();
            if before > 1 {
                batch.out.push(b',');
            }
            write(&mut batch.out);
            state.held += (batch.out.len() - before) as u32;
            settle(state, note);
        });
        room
    }

    /// Opens an answer of `requests` parts. The result is the note for their [`CallerId`]s. Each has to be answered,
    /// and the batch [closed](Self::close_batch) when it has been dispatched.
    pub(crate) fn open_batch(&self, requests: usize) -> u32 {
        let mut state = self.0.lock();
        // One more than there are: immediate answers must not complete the batch while it is being dispatched.
        let batch = AnswerBatch { out: vec![b'['], left: requests + 1 };
        state.extra.batches.insert(batch) as u32 + 1
    }

    /// All requests of the batch have been dispatched.
    pub(crate) fn close_batch(&self, note: u32) {
        self.0.append(|state| settle(state, note - 1));
    }

    /// Whether parts of the batch have not been answered.
    pub(crate) fn has_batch(&self, note: u32) -> bool {
        self.0.lock().extra.batches.contains(note as usize - 1)
    }
}

fn message(state: &mut OutboxState<RpcQueue>, write: impl FnOnce(&mut Vec<u8>)) {
    match state.extra.framed {
        true => frame::text(&mut state.bytes, write),
        false => write(&mut state.bytes),
    }
}

/// One part of a batch is settled. The batch is written if it was the last.
fn settle(state: &mut OutboxState<RpcQueue>, at: u32) {
    let Some(batch) = state.extra.batches.get_mut(at as usize) else { return };
    batch.left -= 1;
    if batch.left > 0 {
        return;
    }
    let batch = state.extra.batches.remove(at as usize);
    state.held -= batch.out.len() as u32 - 1;
    // A batch of notifications is not answered, not even by an empty array.
    if batch.out.len() > 1 {
        message(state, |out| {
            out.extend_from_slice(&batch.out);
            out.push(b']');
        });
    }
}

impl Peer for RpcOutbox {
    fn call(&self, call: &ForwardedCall<'_>) -> WriteOutcome {
        let outcome = self.0.offer(|state| {
            let before = state.bytes.len();
            message(state, |out| {
                let id = call.id.map(CallId::text);
                let prefix = (call.names == MethodNames::Qualified).then_some(call.service);
                let params = call.params.map(|params| params.get().as_bytes());
                let id = id.as_ref().map(|id| id.as_bytes());
                jsonrpc::request(out, id, prefix, call.method, params, call.meta.as_ref());
            });
            state.extra.calls += (state.bytes.len() - before) as u32;
        });
        match outcome {
            OfferOutcome::Written => WriteOutcome::Written,
            OfferOutcome::Full => WriteOutcome::Full,
            OfferOutcome::Closed => WriteOutcome::Gone,
        }
    }

    fn cancel(&self, id: CallId) {
        self.send(|out| {
            jsonrpc::notification(out, "weir.cancel", &serde_json::json!({ "id": id.text().as_str() }));
        });
    }

    fn answer(&self, to: &CallerId, answer: CallAnswer<'_>) -> PeerRoom {
        RpcOutbox::answer(self, to, |out| match answer {
            CallAnswer::Result(result) => jsonrpc::result(out, to.id(), result.get().as_bytes()),
            CallAnswer::Error(error) => jsonrpc::error_json(out, to.id(), error.to_raw().get().as_bytes()),
            CallAnswer::Failed(error) => jsonrpc::error(out, to.id(), &error),
        })
    }

    fn late(&self, to: &CallerId, answer: CallAnswer<'_>) -> PeerRoom {
        let mut room = PeerRoom::Free;
        self.0.append(|state| {
            // The call was answered with `timeout`: a late reply for which there is no room is dropped.
            if state.extra.framed && !self.0.is_overfull(state) {
                message(state, |out| match answer {
                    CallAnswer::Result(result) => jsonrpc::late(out, to.id(), "result", result.get().as_bytes()),
                    CallAnswer::Error(error) => jsonrpc::late(out, to.id(), "error", error.to_raw().get().as_bytes()),
                    CallAnswer::Failed(error) => {
                        jsonrpc::late(out, to.id(), "error", error.to_rpc().to_string().as_bytes());
                    }
                });
            }
            if self.0.is_full(state) {
                room = PeerRoom::Full;
            }
        });
        room
    }

    fn poll_room(&self, cx: &mut Context<'_>) -> Poll<()> {
        self.0.poll_room(cx)
    }

    fn abandon_wait(&self) {
        self.0.abandon_wait();
    }

    fn withdrawn(&self, service: &str, reason: &str) {
        self.send(|out| {
            let params = serde_json::json!({ "service": service, "reason": reason });
            jsonrpc::notification(out, "weir.withdrawn", &params);
        });
    }
}

/// The error in place of an answer that the client is too slow to read.
fn no_room() -> Error {
    let detail = "the answer was dropped: this connection has not read the ones before it (limits.queued)";
    Error::new(Code::TooLarge, detail).with("limit", "limits.queued").executed(Executed::Maybe)
}

/// Answers a failed request. A notification is not answered.
pub(super) fn reject(outbox: &RpcOutbox, to: Option<&CallerId>, error: &Error) {
    if let Some(to) = to {
        outbox.answer(to, |out| jsonrpc::error(out, to.id(), error));
    }
}

#[cfg(test)]
mod tests {
    use std::{
        sync::{
            Arc,
            atomic::{AtomicUsize, Ordering::Relaxed},
        },
        task::Waker,
    };

    use super::*;
    use crate::rpc::RelayInfo;

    struct WakeCounter(AtomicUsize);

    impl std::task::Wake for WakeCounter {
        fn wake(self: Arc<Self>) {
            self.0.fetch_add(1, Relaxed);
        }
    }

    fn take(outbox: &RpcOutbox, cx: &mut Context<'_>) -> Option<String> {
        let mut bytes = Vec::new();
        match outbox.poll_take(cx, &mut bytes) {
            Poll::Ready(OutboxContent::Bytes) => Some(String::from_utf8(bytes).unwrap()),
            Poll::Ready(OutboxContent::Close(code)) => Some(code.as_str().to_owned()),
            Poll::Ready(OutboxContent::Closed) | Poll::Pending => None,
        }
    }

    fn put(outbox: &RpcOutbox, note: u32, text: &str) {
        outbox.answer(&CallerId::new(b"1").with_note(note), |out| out.extend_from_slice(text.as_bytes()));
    }

    fn call(outbox: &RpcOutbox) -> WriteOutcome {
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
        let outbox = RpcOutbox::bare(1_000);
        let count = Arc::new(WakeCounter(AtomicUsize::new(0)));
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
        outbox.close_with(Code::Draining);
        assert_eq!(count.0.load(Relaxed), 2);
        assert_eq!(take(&outbox, &mut cx).unwrap(), "draining");
    }

    #[test]
    fn a_batch_is_one_array_once_it_is_complete() {
        let outbox = RpcOutbox::bare(1_000);
        let mut cx = Context::from_waker(Waker::noop());
        let (one, other) = (outbox.open_batch(2), outbox.open_batch(1));
        put(&outbox, one, "1");
        put(&outbox, other, "3");
        // All requests are answered, but not all dispatched.
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
        assert_eq!(outbox.0.lock().held, 0);
    }

    #[test]
    fn a_writer_waits_until_the_client_has_read() {
        let outbox = RpcOutbox::bare(100);
        let count = Arc::new(WakeCounter(AtomicUsize::new(0)));
        let waker = count.clone().into();
        let mut writer = Context::from_waker(&waker);
        let mut reader = Context::from_waker(Waker::noop());
        let answer = |size| outbox.answer(&CallerId::new(b"1"), |out| out.extend(std::iter::repeat_n(b'x', size)));
        assert_eq!(answer(50), PeerRoom::Free);
        assert!(outbox.poll_room(&mut writer).is_ready());
        assert_eq!(answer(50), PeerRoom::Full);
        assert!(outbox.poll_room(&mut writer).is_pending() && outbox.poll_room(&mut writer).is_pending());
        take(&outbox, &mut reader).unwrap();
        assert_eq!(count.0.load(Relaxed), 1);
        assert!(outbox.poll_room(&mut writer).is_ready());
        // A client that does not read is not waited for again until it does.
        assert_eq!(answer(100), PeerRoom::Full);
        assert!(outbox.poll_room(&mut writer).is_pending());
        outbox.abandon_wait();
        assert_eq!((count.0.load(Relaxed), answer(1)), (2, PeerRoom::Free));
        assert!(outbox.poll_room(&mut writer).is_ready());
        take(&outbox, &mut reader).unwrap();
        assert_eq!(answer(100), PeerRoom::Full);
        // The end of the client ends the wait.
        assert!(outbox.poll_room(&mut writer).is_pending());
        outbox.close();
        assert_eq!(count.0.load(Relaxed), 3);
        assert!(outbox.poll_room(&mut writer).is_ready());
    }

    #[test]
    fn unread_messages_are_bounded() {
        let outbox = RpcOutbox::framed(100);
        while call(&outbox) == WriteOutcome::Written {}
        assert_eq!(call(&outbox), WriteOutcome::Full);
        // Calls of others do not stop the reading of replies.
        assert!(!outbox.is_full());
        put(&outbox, 0, &"x".repeat(100));
        assert!(outbox.is_full());
        put(&outbox, 0, &"x".repeat(300));
        // What is large is replaced from here on; what is small is not, until the outbox is closed.
        let before = outbox.0.lock().bytes.len();
        put(&outbox, 0, &"x".repeat(100_000));
        assert!((before + 1..before + 400).contains(&outbox.0.lock().bytes.len()));
        (0..10).for_each(|_| put(&outbox, 0, &"x".repeat(100)));
        // The outbox is closed and empty, although its task has not taken anything yet.
        assert!(!outbox.is_full() && !outbox.is_behind());
        assert_eq!(take(&outbox, &mut Context::from_waker(Waker::noop())).unwrap(), "slow");
        assert_eq!(call(&outbox), WriteOutcome::Gone);
        outbox.close();
        assert_eq!(call(&outbox), WriteOutcome::Gone);
        put(&outbox, 0, "nowhere");
        assert!(outbox.0.lock().bytes.is_empty());
    }
}
