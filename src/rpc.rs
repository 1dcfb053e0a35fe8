//! The hub: services register providers, callers call, and every call gets one answer.
//!
//! ```text
//! transport ── HubConnection::call ──▶ Hub ── Peer::call ──▶ provider's transport
//! transport ◀── Peer::answer ───────── Hub ◀── HubConnection::reply ── provider's transport
//! ```
//!
//! All of it is synchronous, and a call needs no task, timer, future or allocation: a transport calls the hub with what it
//! read, and the hub calls [`Peer`]s that append to their outbound buffers. These rules hold everywhere:
//!
//! * No lock is held while a [`Peer`] is called. Locks are taken in the order *connection, service, registry*.
//! * A call is delivered at most once: when it may have been written to a provider, it is never placed again.
//! * Time is read from one [`MonotonicClock`](crate::cluster::MonotonicClock); [`Hub::sweep`] finds what is due, so deadlines are kept to about its interval.

mod call;
mod call_id;
mod call_once;
mod changes;
mod choice;
mod connection;
mod hub;
mod in_flight;
mod late;
mod link;
mod message;
mod name_queries;
mod peer;
mod provider;
mod registration;
mod registry;
mod remote_nodes;
mod remote_provider;
mod service;
mod tables;

pub use call::Call;
pub use call_id::{CallId, CallerId};
pub use call_once::{CallError, CallFuture, call_once};
pub use changes::{ServiceChange, ServiceChangeKind, UnpublishedChange};
pub use connection::HubConnection;
pub(crate) use connection::ProvidedServices;
pub use hub::{Hub, HubCounts, ReplyOutcome};
#[cfg(test)]
pub(crate) use peer::RelayInfo;
pub use peer::{
    CallAnswer, CallMeta, ForwardedCall, MethodNames, Peer, PeerRoom, ProbeCallback, ProviderError, WriteOutcome,
};
pub use provider::ProvideRequest;
pub use registration::{AcceptedProvider, ProvideFuture};
pub use remote_nodes::RemoteNodes;
pub use service::ServiceInfo;
