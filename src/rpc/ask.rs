//! A call without a connection, as a held HTTP request makes it.

use std::{
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
};

use parking_lot::Mutex;
use serde_json::value::RawValue;
use tokio::sync::oneshot;

use super::{Answer, Call, Connection, Forward, Hub, Peer, ProviderError, Tag, Written, pending::CallId};
use crate::error::Error;

/// The answer to come. Dropping it cancels the call.
#[must_use = "dropping it cancels the call"]
pub struct Asked {
    answer: oneshot::Receiver<Outcome>,
    _connection: Connection,
}

/// Why there is no result.
#[derive(Clone, Debug)]
pub enum Refusal {
    /// The provider answered with an error.
    Provider(ProviderError<'static>),
    /// weir could not get an answer.
    Weir(Error),
}

type Outcome = Result<Box<RawValue>, Refusal>;

struct Waiter(Mutex<Option<oneshot::Sender<Outcome>>>);

impl Hub {
    /// Makes a call and waits for its answer. The call is made at once, not when the future is first polled.
    pub fn ask(self: &Arc<Self>, call: &Call<'_>) -> Asked {
        let (answered, answer) = oneshot::channel();
        let connection = self.connect(Arc::new(Waiter(Mutex::new(Some(answered)))));
        connection.call(Tag::new(b""), call);
        Asked { answer, _connection: connection }
    }
}

impl Future for Asked {
    type Output = Outcome;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        Pin::new(&mut self.answer).poll(cx).map(|answer| {
            answer.unwrap_or_else(|_| Err(Refusal::Weir(Error::internal("a call was left without an answer"))))
        })
    }
}

impl Peer for Waiter {
    fn call(&self, _: &Forward<'_>) -> Written {
        // It provides nothing.
        Written::Gone
    }

    fn cancel(&self, _: CallId) {}

    fn answer(&self, _: &Tag, answer: Answer<'_>) {
        let answer = match answer {
            Answer::Result(result) => Ok(result.to_owned()),
            Answer::Error(error) => Err(Refusal::Provider(error.into_owned())),
            Answer::Failed(error) => Err(Refusal::Weir(error)),
        };
        if let Some(answered) = self.0.lock().take() {
            // Nobody there: the request was given up at the same moment.
            let _ = answered.send(answer);
        }
    }

    fn late(&self, _: &Tag, _: Answer<'_>) {}

    fn withdrawn(&self, _: &str, _: &str) {}
}
