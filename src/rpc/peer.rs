//! What the hub knows of a connection, and what it says to it.

use std::borrow::Cow;

use serde_json::value::{RawValue, to_raw_value};

use super::pending::{CallId, CallerId};
use crate::{
    cluster::NodeId,
    error::{Code, Error},
};

/// The outbound half of a connection: a WebSocket, a held HTTP request, another node.
///
/// Called with no lock of the hub held, from whichever thread caused it, also from inside [`HubConnection`] methods of the
/// same connection. It appends to the connection's outbound buffer and returns: it neither blocks nor fails.
///
/// [`HubConnection`]: super::HubConnection
pub trait Peer: Send + Sync {
    /// Writes a call or notification to this provider, now.
    fn call(&self, call: &ForwardedCall<'_>) -> WriteOutcome;

    /// The caller gave up. Only for providers that asked for meta.
    fn cancel(&self, id: CallId);

    /// The one answer to the call that this connection made under `to`.
    fn answer(&self, to: &CallerId, answer: CallAnswer<'_>);

    /// The reply to a call that was answered as `timeout` and asked for late replies.
    fn late(&self, to: &CallerId, answer: CallAnswer<'_>);

    /// This connection no longer provides `service`; its replies are dropped. `reason` is `replaced` or
    /// `lost`.
    fn withdrawn(&self, service: &str, reason: &str);

    /// Finds out whether the client lives, since somebody else wants a name that it has. One that does not is gone, with
    /// all that it provides, before `told` is told so.
    fn probe(&self, told: ProbeCallback) {
        // As far as anybody knows.
        told(true);
    }
}

/// Told once whether a client lives.
pub type ProbeCallback = Box<dyn FnOnce(bool) + Send>;

/// Whether a call is in the outbound buffer. Anything but `Written` promises that no byte of it will reach the provider.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WriteOutcome {
    Written,
    /// The buffer is full; the connection lives.
    Full,
    /// The connection is over: the hub forgets everything that it provides of this service.
    Gone,
}

/// A call as a provider gets it.
#[derive(Clone, Copy, Debug)]
pub struct ForwardedCall<'a> {
    /// None: a notification.
    pub id: Option<CallId>,
    pub service: &'a str,
    pub method: &'a str,
    pub names: MethodNames,
    pub params: Option<&'a RawValue>,
    /// The same as the caller's own world wrote it; see [`Call::as_sent`](super::Call::as_sent).
    pub as_sent: Option<&'a RawValue>,
    /// Beside params, if the provider asked.
    pub meta: Option<CallMeta<'a>>,
    /// For another node, which has to place it.
    pub relay: RelayInfo<'a>,
}

/// What another node has to know of a call, beside what a provider gets.
#[derive(Clone, Copy, Debug, Default)]
pub struct RelayInfo<'a> {
    /// Milliseconds that the caller would wait for a provider.
    pub wait: Option<u64>,
    /// A late reply is wanted.
    pub late: bool,
    /// What is known of that node.
    pub rev: u64,
    /// Nodes that returned it.
    pub tried: &'a [NodeId],
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

/// What weir knows of a call.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize)]
pub struct CallMeta<'a> {
    /// Subject of the caller; `""` is anonymous.
    pub caller: &'a str,
    /// What is left of the time. Not of notifications.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub deadline_ms: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub traceparent: Option<&'a str>,
    /// Of exclusive providers: higher than that of every provider before.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub fence: Option<u64>,
}

/// How a call ended.
#[derive(Clone, Debug)]
pub enum CallAnswer<'a> {
    /// Of the provider, as it wrote it; `null` for void.
    Result(&'a RawValue),
    /// Of the provider.
    Error(ProviderError<'a>),
    /// Of weir.
    Failed(Error),
}

/// A provider's error, passed on as it is.
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
    /// The same, on its own feet.
    pub fn into_owned(self) -> ProviderError<'static> {
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
        struct Wire<'a> {
            code: i64,
            message: &'a str,
            #[serde(skip_serializing_if = "Option::is_none")]
            data: Option<&'a RawValue>,
        }
        let wire = Wire { code: self.code, message: &self.message, data: self.data.as_deref() };
        to_raw_value(&wire).unwrap_or_else(|_| RawValue::NULL.to_owned())
    }
}
