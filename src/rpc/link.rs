//! [`Link`]: another node, as the hub sees it. A node is a peer: it provides what it has, and it calls.
//!
//! ```text
//! caller ─▶ Hub ─ Link::call ═▶ mail ═▶ Hub::exchange ─▶ provider
//! caller ◀─ Hub ◀─ Hub::exchange ◀═ mail ◀═ Link::answer ◀─ provider
//! ```
//!
//! A call that a node gets from another is for a provider of its own and does not wait there. If there is none it goes back as
//! it came, and the node of the caller, which alone knows all, finds another or lets it wait.

use std::sync::{
    Arc, Weak,
    atomic::{
        AtomicBool, AtomicU64,
        Ordering::{Relaxed, SeqCst},
    },
};

use super::{
    CallAnswer, CallId, CallerId, ForwardedCall, Hub, Peer, WriteOutcome,
    mail::{self, Called},
    services::Request,
};
use crate::{
    cluster::{Cluster, MessageKind, NodeId, Priority, SendOutcome},
    error::Code,
};

pub(super) struct Link {
    node: NodeId,
    cluster: Arc<dyn Cluster>,
    hub: Weak<Hub>,
    /// When something was last sent, heard, and asked to be heard: each end sees by the next mail whether all has come.
    pub sent: AtomicU64,
    pub heard: AtomicU64,
    pub beat: AtomicU64,
    /// Calls may be open between the two.
    pub open: AtomicBool,
}

impl Link {
    pub fn new(hub: &Arc<Hub>, node: NodeId) -> Self {
        Link {
            node,
            cluster: hub.cluster.clone(),
            hub: Arc::downgrade(hub),
            sent: AtomicU64::new(0),
            heard: AtomicU64::new(0),
            beat: AtomicU64::new(0),
            open: AtomicBool::new(false),
        }
    }

    pub fn send(&self, weight: Priority, mail: &[u8]) -> SendOutcome {
        let sent = self.cluster.send(self.node, MessageKind::Calls, weight, mail);
        if let (SendOutcome::Queued, Some(hub)) = (sent, self.hub.upgrade()) {
            self.sent.store(hub.clock.now(), Relaxed);
            hub.metrics.mail_sent.add(1);
        }
        sent
    }

    fn reply(&self, to: &CallerId, answer: &CallAnswer<'_>) {
        let service = mail::read_tag(to.id()).map(|(_, service)| service);
        let service = self.hub.upgrade().zip(service).and_then(|(hub, service)| hub.find(service));
        let load = service.map_or(0, |service| service.state.lock().load_here());
        // One that finds no room is as one that was lost: the caller's deadline ends it.
        self.send(Priority::High, &mail::reply(to.id(), load as u64, answer));
    }
}

impl Peer for Link {
    fn call(&self, call: &ForwardedCall<'_>) -> WriteOutcome {
        let meta = call.meta.unwrap_or_default();
        let request = Request {
            method: call.method,
            params: call.params,
            as_sent: call.as_sent,
            caller: meta.caller,
            traceparent: meta.traceparent,
            wait: call.relay.wait,
            late: call.relay.late,
        };
        let called = Called {
            id: call.id.map(CallId::number),
            service: call.service,
            request,
            left: meta.deadline_ms.unwrap_or_default(),
            rev: call.relay.rev,
            tried: call.relay.tried.to_vec(),
        };
        self.open.store(true, SeqCst);
        match self.send(Priority::Normal, &called.write()) {
            SendOutcome::Queued => WriteOutcome::Written,
            SendOutcome::Full => WriteOutcome::Full,
            SendOutcome::NoSuchNode => WriteOutcome::Gone,
        }
    }

    fn cancel(&self, id: CallId) {
        self.send(Priority::High, &mail::cancel(id.number()));
    }

    fn answer(&self, to: &CallerId, answer: CallAnswer<'_>) {
        // The caller's own node has the same deadline, and says it.
        if !matches!(&answer, CallAnswer::Failed(error) if error.code() == Code::Timeout) {
            self.reply(to, &answer);
        }
    }

    fn late(&self, to: &CallerId, answer: CallAnswer<'_>) {
        self.reply(to, &answer);
    }

    fn withdrawn(&self, _: &str, _: &str) {
        // Its own node takes its providers back.
    }
}
