//! [`Peer`]: the hub writes calls to a provider and answers to a caller.

use std::{
    borrow::Cow,
    task::{Context, Poll},
};

use serde_json::value::{RawValue, to_raw_value};

use super::call_id::{CallId, CallerId};
use crate::{
    cluster::NodeId,
    error::{Code, Error},
};

/// The outbound half of a connection: a WebSocket, an HTTP request that waits for its response, another node.
///
/// The hub holds no lock while it calls a peer, and calls it from the thread that caused the call, also from inside
/// [`HubConnection`](super::HubConnection) methods of the same connection. A peer appends to its outbound buffer and
/// returns: it neither blocks nor fails.
pub trait Peer: Send + Sync {
    /// Writes a call or notification to this provider.
    fn call(&self, call: &ForwardedCall<'_>) -> WriteOutcome;

    /// The caller no longer waits for the answer. Only for providers that asked for [`CallMeta`].
    fn cancel(&self, id: CallId);

    /// The one answer to the call that this connection made under `to`.
    fn answer(&self, to: &CallerId, answer: CallAnswer<'_>) -> PeerRoom;

    /// The reply to a call that was answered with `timeout` and that asked for late replies.
    fn late(&self, to: &CallerId, answer: CallAnswer<'_>) -> PeerRoom;

    /// After [`PeerRoom::Full`]: waits until the caller has read, or ends.
    fn poll_room(&self, _: &mut Context<'_>) -> Poll<()> {
        Poll::Ready(())
    }

    /// Nothing waits for this caller any more until it has read.
    fn abandon_wait(&self) {}

    /// This connection no longer provides `service`, and its replies are dropped. `reason` is `replaced` or `lost`.
    fn withdrawn(&self, service: &str, reason: &str);

    /// Finds out whether the client is alive, because another connection wants a name that it holds. The connection of a
    /// dead client is closed, with all that it provides, before `callback` is called with false.
    fn probe(&self, callback: ProbeCallback) {
        // A peer without a probe counts as alive.
        callback(true);
    }
}

/// Whether a caller has room for more answers. One that has not still takes them, within hard limits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PeerRoom {
    Free,
    /// The provider should be held back until [`Peer::poll_room`] is ready.
    Full,
}

/// Called once, with whether the client is alive.
pub type ProbeCallback = Box<dyn FnOnce(bool) + Send>;

/// Whether a call is in the outbound buffer. Anything but `Written` promises that no byte of it reaches the provider.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WriteOutcome {
    Written,
    /// The buffer is full; the connection is alive.
    Full,
    /// The connection is closed: the hub removes it from the providers of this service.
    Gone,
}

/// A call as a provider receives it.
#[derive(Clone, Copy, Debug)]
pub struct ForwardedCall<'a> {
    /// None: a notification.
    pub id: Option<CallId>,
    pub service: &'a str,
    pub method: &'a str,
    pub names: MethodNames,
    pub params: Option<&'a RawValue>,
    /// The call in the caller's own protocol; see [`Call::as_sent`](super::Call::as_sent).
    pub as_sent: Option<&'a RawValue>,
    /// Sent along with the params, if the provider asked for it.
    pub meta: Option<CallMeta<'a>>,
    /// For another node, which places the call with a provider of its own.
    pub(crate) relay: RelayInfo<'a>,
}

/// Additional members that another node needs in order to place a call.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct RelayInfo<'a> {
    /// Milliseconds that the caller is ready to wait for a provider.
    pub(crate) wait: Option<u64>,
    /// The caller wants a late reply.
    pub(crate) late: bool,
    /// Revision of the node's advertisement by which it was chosen.
    pub(crate) rev: u64,
    /// Nodes that rejected the call.
    pub(crate) tried: &'a [NodeId],
}

/// How a provider wants its methods named.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum MethodNames {
    /// `method`
    #[default]
    Short,
    /// `service/method`
    Qualified,
}

/// Facts about a call that only weir knows.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize)]
pub struct CallMeta<'a> {
    /// Subject of the caller; `""` is anonymous.
    pub caller: &'a str,
    /// Milliseconds until the deadline. None: a notification.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub deadline_ms: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub traceparent: Option<&'a str>,
    /// Fencing token of an exclusive provider: higher than that of every provider before.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub fence: Option<u64>,
}

/// How a call ended.
#[derive(Clone, Debug)]
pub enum CallAnswer<'a> {
    /// The provider's result as it was sent; `null` for void.
    Result(&'a RawValue),
    /// The provider's error.
    Error(ProviderError<'a>),
    /// The hub could not get an answer.
    Failed(Error),
}

/// A provider's error, passed on unchanged.
#[derive(Clone, Debug)]
pub struct ProviderError<'a> {
    pub code: i64,
    pub message: Cow<'a, str>,
    pub data: Option<Cow<'a, RawValue>>,
}

impl CallAnswer<'static> {
    /// For a reply that has neither a result nor an error, or is too large: `why` completes "the reply of the provider…".
    pub fn bad_reply(why: &str) -> Self {
        CallAnswer::Failed(Error::new(Code::BadReply, format!("the reply of the provider {why}")))
    }
}

impl ProviderError<'_> {
    pub(crate) fn into_owned(self) -> ProviderError<'static> {
        let ProviderError { code, message, data } = self;
        ProviderError {
            code,
            message: Cow::Owned(message.into_owned()),
            data: data.map(|data| Cow::Owned(data.into_owned())),
        }
    }

    /// The `error` member of a JSON-RPC response: exactly `code`, `message` and, where given, `data`.
    pub fn to_raw(&self) -> Box<RawValue> {
        #[derive(serde::Serialize)]
        struct ErrorObject<'a> {
            code: i64,
            message: &'a str,
            #[serde(skip_serializing_if = "Option::is_none")]
            data: Option<&'a RawValue>,
        }
        let wire = ErrorObject { code: self.code, message: &self.message, data: self.data.as_deref() };
        to_raw_value(&wire).unwrap_or_else(|_| RawValue::NULL.to_owned())
    }
}
