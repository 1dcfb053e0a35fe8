//! [`LinkPeer`]: another node as a peer of the hub. It provides what its own providers provide, and it calls.
//!
//! ```text
//! caller ─▶ Hub ─ LinkPeer::call ═▶ message ═▶ RemoteNodes::process_events ─▶ provider
//! caller ◀─ Hub ◀─ RemoteNodes::process_events ◀═ message ◀═ LinkPeer::answer ◀─ provider
//! ```
//!
//! A node places a call of another node with a provider of its own and does not let it wait. If it has none, it rejects the
//! call unmodified, and the caller's node, which knows all nodes, places it elsewhere or lets it wait.

use std::{
    sync::{
        Arc, Weak,
        atomic::{
            AtomicBool, AtomicU64,
            Ordering::{Relaxed, SeqCst},
        },
    },
    task::{Context, Poll},
};

use super::{
    call::CallRequest,
    call_id::{CallId, CallerId},
    hub::Hub,
    message::{self, RemoteCall},
    peer::{CallAnswer, ForwardedCall, Peer, PeerRoom, WriteOutcome},
};
use crate::{
    cluster::{Cluster, MessageKind, NodeId, Priority, SendOutcome},
    error::Code,
};

pub(super) struct LinkPeer {
    node: NodeId,
    cluster: Arc<dyn Cluster>,
    hub: Weak<Hub>,
    /// When something was last sent and received, and when the last heartbeat was sent: with each message the receiver
    /// finds out whether all before it have arrived.
    pub(super) sent: AtomicU64,
    pub(super) received: AtomicU64,
    pub(super) heartbeat: AtomicU64,
    /// There may be calls between the two nodes.
    pub(super) has_calls: AtomicBool,
}

impl LinkPeer {
    pub(super) fn new(hub: &Arc<Hub>, node: NodeId) -> Self {
        LinkPeer {
            node,
            cluster: hub.cluster.clone(),
            hub: Arc::downgrade(hub),
            sent: AtomicU64::new(0),
            received: AtomicU64::new(0),
            heartbeat: AtomicU64::new(0),
            has_calls: AtomicBool::new(false),
        }
    }

    pub(super) fn send(&self, weight: Priority, message: &[u8]) -> SendOutcome {
        let sent = self.cluster.send(self.node, MessageKind::Calls, weight, message);
        if let (SendOutcome::Queued, Some(hub)) = (sent, self.hub.upgrade()) {
            self.sent.store(hub.clock.now(), Relaxed);
            hub.metrics.mail_sent.add(1);
        }
        sent
    }

    /// The result is always `Full`: only [`Peer::poll_room`] knows whether the link is.
    fn reply(&self, to: &CallerId, answer: &CallAnswer<'_>) -> PeerRoom {
        let service = message::parse_remote_caller_id(to.id()).map(|(_, service)| service);
        let service = self.hub.upgrade().zip(service).and_then(|(hub, service)| hub.registry.find(service));
        let load = service.map_or(0, |service| service.state.lock().local_load());
        // A reply that is not accepted counts as lost: the call ends with its deadline.
        self.send(Priority::High, &message::encode_reply(to.id(), load as u64, answer));
        PeerRoom::Full
    }
}

impl Peer for LinkPeer {
    fn call(&self, call: &ForwardedCall<'_>) -> WriteOutcome {
        let meta = call.meta.unwrap_or_default();
        let request = CallRequest {
            method: call.method,
            params: call.params,
            as_sent: call.as_sent,
            caller: meta.caller,
            traceparent: meta.traceparent,
            wait: call.relay.wait,
            late: call.relay.late,
        };
        let call = RemoteCall {
            id: call.id.map(CallId::to_u64),
            service: call.service,
            request,
            time_left: meta.deadline_ms.unwrap_or_default(),
            rev: call.relay.rev,
            tried: call.relay.tried.to_vec(),
        };
        self.has_calls.store(true, SeqCst);
        match self.send(Priority::Normal, &call.encode()) {
            SendOutcome::Queued => WriteOutcome::Written,
            SendOutcome::Full => WriteOutcome::Full,
            SendOutcome::NoSuchNode => WriteOutcome::Gone,
        }
    }

    fn cancel(&self, id: CallId) {
        self.send(Priority::High, &message::encode_cancel(id.to_u64()));
    }

    fn answer(&self, to: &CallerId, answer: CallAnswer<'_>) -> PeerRoom {
        // The caller's node has the same deadline and answers by itself.
        match &answer {
            CallAnswer::Failed(error) if error.code() == Code::Timeout => PeerRoom::Free,
            _ => self.reply(to, &answer),
        }
    }

    fn late(&self, to: &CallerId, answer: CallAnswer<'_>) -> PeerRoom {
        self.reply(to, &answer)
    }

    fn poll_room(&self, cx: &mut Context<'_>) -> Poll<()> {
        self.cluster.poll_room(self.node, cx)
    }

    fn withdrawn(&self, _: &str, _: &str) {
        // Its own node removes its providers.
    }
}
