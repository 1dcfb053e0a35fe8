//! [`RpcSession`]: the state of one JSON-RPC client.

use std::sync::Arc;

use futures_util::future::BoxFuture;

use super::{
    outbox::RpcOutbox,
    subscriptions::SocketSubscriptions,
    work::{JobOrder, JobOutput, WorkQueue},
};
use crate::{auth::Identity, error::Result, node::Node, rpc::HubConnection, sessions::ConnectionRegistration};

/// One JSON-RPC client: a WebSocket, or one request over HTTP.
pub(super) struct RpcSession {
    pub(super) node: Arc<Node>,
    pub(super) identity: Identity,
    pub(super) outbox: Arc<RpcOutbox>,
    /// Its connection to the hub, from the first call on.
    pub(super) hub: Option<HubConnection>,
    /// Its subscriptions, from the first on.
    pub(super) subscriptions: Option<Box<SocketSubscriptions>>,
    pub(super) work: Option<Box<WorkQueue>>,
    /// The client has called a method of weir, so that it understands weir's notifications.
    pub(super) knows_weir: bool,
    /// The node drains: this session provides no services any more.
    pub(super) leaving: bool,
    /// `None` for a request over HTTP.
    pub(super) registration: Option<ConnectionRegistration>,
    /// One request over HTTP, which can neither subscribe nor provide.
    pub(super) over_http: bool,
    /// Unreadable messages, since this tick.
    pub(super) unreadable: (u32, u32),
    pub(super) failed_logins: u8,
}

/// The result of a method of weir.
pub(super) enum MethodOutcome {
    /// This JSON, at once.
    Result(Vec<u8>),
    /// The output of this job, which holds `bytes` of events.
    Later { work: BoxFuture<'static, Result<JobOutput>>, bytes: usize, order: JobOrder },
    /// The method has answered the request itself, if it is to be answered.
    Answered,
}

pub(super) const NULL: &[u8] = b"null";

impl RpcSession {
    pub(super) fn new(node: Arc<Node>, identity: Identity, outbox: Arc<RpcOutbox>, over_http: bool) -> Self {
        RpcSession {
            node,
            identity,
            outbox,
            hub: None,
            subscriptions: None,
            work: None,
            knows_weir: false,
            leaving: false,
            registration: None,
            over_http,
            unreadable: (0, 0),
            failed_logins: 0,
        }
    }
}
