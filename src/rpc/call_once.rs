//! A call without a connection, as an HTTP request makes it.

use std::{
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
};

use parking_lot::Mutex;
use serde_json::value::RawValue;
use tokio::sync::oneshot;

use super::{
    call::Call,
    call_id::{CallId, CallerId},
    connection::HubConnection,
    hub::Hub,
    peer::{CallAnswer, ForwardedCall, Peer, PeerRoom, ProviderError, WriteOutcome},
};
use crate::error::Error;

/// The answer, in the future. Dropping it cancels the call.
#[must_use = "dropping it cancels the call"]
pub struct CallFuture {
    answer: oneshot::Receiver<CallResult>,
    _connection: HubConnection,
}

/// Why a call has no result.
#[derive(Clone, Debug)]
pub enum CallError {
    /// The provider answered with an error.
    Provider(ProviderError<'static>),
    /// The hub could not get an answer.
    Weir(Error),
}

type CallResult = Result<Box<RawValue>, CallError>;

/// A peer that makes one call.
struct OneCall(Mutex<Option<oneshot::Sender<CallResult>>>);

/// Makes a call and waits for its answer. The call is made at once, not when the future is first polled.
pub fn call_once(hub: &Arc<Hub>, call: &Call<'_>) -> CallFuture {
    let (sender, answer) = oneshot::channel();
    let connection = HubConnection::new(hub, Arc::new(OneCall(Mutex::new(Some(sender)))));
    connection.call(CallerId::new(b""), call);
    CallFuture { answer, _connection: connection }
}

impl Future for CallFuture {
    type Output = CallResult;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        Pin::new(&mut self.answer).poll(cx).map(|answer| {
            answer.unwrap_or_else(|_| Err(CallError::Weir(Error::internal("a call was left without an answer"))))
        })
    }
}

impl Peer for OneCall {
    fn call(&self, _: &ForwardedCall<'_>) -> WriteOutcome {
        // It provides nothing.
        WriteOutcome::Gone
    }

    fn cancel(&self, _: CallId) {}

    fn answer(&self, _: &CallerId, answer: CallAnswer<'_>) -> PeerRoom {
        let answer = match answer {
            CallAnswer::Result(result) => Ok(result.to_owned()),
            CallAnswer::Error(error) => Err(CallError::Provider(error.into_owned())),
            CallAnswer::Failed(error) => Err(CallError::Weir(error)),
        };
        if let Some(sender) = self.0.lock().take() {
            // The future may have been dropped.
            let _ = sender.send(answer);
        }
        PeerRoom::Free
    }

    fn late(&self, _: &CallerId, _: CallAnswer<'_>) -> PeerRoom {
        PeerRoom::Free
    }

    fn withdrawn(&self, _: &str, _: &str) {}
}
