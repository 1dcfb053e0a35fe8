//! A call without a connection, as a held HTTP request makes it.

use std::{
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
};

use parking_lot::Mutex;
use serde_json::value::RawValue;
use tokio::sync::oneshot;

use super::{
    Call, CallAnswer, CallerId, ForwardedCall, Hub, HubConnection, Peer, ProviderError, WriteOutcome, pending::CallId,
};
use crate::error::Error;

/// The answer to come. Dropping it cancels the call.
#[must_use = "dropping it cancels the call"]
pub struct CallFuture {
    answer: oneshot::Receiver<Outcome>,
    _connection: HubConnection,
}

/// Why there is no result.
#[derive(Clone, Debug)]
pub enum CallError {
    /// The provider answered with an error.
    Provider(ProviderError<'static>),
    /// weir could not get an answer.
    Weir(Error),
}

type Outcome = Result<Box<RawValue>, CallError>;

struct Waiter(Mutex<Option<oneshot::Sender<Outcome>>>);

impl Hub {
    /// Makes a call and waits for its answer. The call is made at once, not when the future is first polled.
    pub fn call_once(self: &Arc<Self>, call: &Call<'_>) -> CallFuture {
        let (answered, answer) = oneshot::channel();
        let connection = self.connect(Arc::new(Waiter(Mutex::new(Some(answered)))));
        connection.call(CallerId::new(b""), call);
        CallFuture { answer, _connection: connection }
    }
}

impl Future for CallFuture {
    type Output = Outcome;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        Pin::new(&mut self.answer).poll(cx).map(|answer| {
            answer.unwrap_or_else(|_| Err(CallError::Weir(Error::internal("a call was left without an answer"))))
        })
    }
}

impl Peer for Waiter {
    fn call(&self, _: &ForwardedCall<'_>) -> WriteOutcome {
        // It provides nothing.
        WriteOutcome::Gone
    }

    fn cancel(&self, _: CallId) {}

    fn answer(&self, _: &CallerId, answer: CallAnswer<'_>) {
        let answer = match answer {
            CallAnswer::Result(result) => Ok(result.to_owned()),
            CallAnswer::Error(error) => Err(CallError::Provider(error.into_owned())),
            CallAnswer::Failed(error) => Err(CallError::Weir(error)),
        };
        if let Some(answered) = self.0.lock().take() {
            // Nobody there: the request was given up at the same moment.
            let _ = answered.send(answer);
        }
    }

    fn late(&self, _: &CallerId, _: CallAnswer<'_>) {}

    fn withdrawn(&self, _: &str, _: &str) {}
}
