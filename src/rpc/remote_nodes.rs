//! The other nodes: their services, the messages from them, and what ends when one of them is gone.

use std::{
    collections::{HashMap, HashSet},
    future::poll_fn,
    sync::{
        Arc,
        atomic::Ordering::{Relaxed, SeqCst},
    },
    time::Duration,
};

use bytes::Bytes;
use futures_util::future::join_all;
use parking_lot::Mutex;

use super::{
    call_id::CallId,
    connection::HubConnection,
    hub::{CallRoute, Hub, NotDelivered},
    link::LinkPeer,
    message::{self, HubMessage, RejectReason, RemoteCall},
    peer::CallAnswer,
    registration::{self, NAME_PREFIX},
    remote_provider::Advertisement,
    tables::{PeerState, ProviderSlot},
};
use crate::{
    cluster::{ClusterMembers, Inbox, InboxEvent, MessageKind, NodeId, Priority, Roster, RosterEntry},
    error::Code,
};

/// How often a link with calls sends a heartbeat, in milliseconds.
const HEARTBEAT: u64 = 1_000;

/// How long all that other nodes send may wait for one caller that does not read.
const MAX_WAIT: Duration = Duration::from_millis(250);

/// The hub's links to the other nodes of the cluster.
pub struct RemoteNodes {
    hub: Arc<Hub>,
    members: ClusterMembers,
    roster: Roster,
    inbox: Inbox,
    nodes: Mutex<HashMap<NodeId, RemoteNode>>,
}

#[derive(Default)]
struct RemoteNode {
    /// None: it cannot be reached.
    link: Option<NodeLink>,
    /// By service, with the revision.
    advertised: HashMap<Arc<str>, (u64, Advertisement)>,
}

/// The two halves of a link: what this node sends, and the providers and calls of the other node in the hub.
#[derive(Clone)]
struct NodeLink {
    peer: Arc<LinkPeer>,
    connection: Arc<HubConnection>,
}

impl RemoteNodes {
    pub fn new(hub: &Arc<Hub>) -> Self {
        RemoteNodes {
            members: hub.cluster.members(),
            roster: hub.cluster.roster(NAME_PREFIX),
            inbox: hub.cluster.inbox(MessageKind::Calls),
            hub: hub.clone(),
            nodes: Mutex::default(),
        }
    }

    /// Links the hub with the other nodes for as long as it is polled.
    pub(crate) async fn run(&self) {
        loop {
            tokio::select! {
                () = self.inbox.ready() => {}
                () = self.members.ready() => {}
                () = self.roster.ready() => {}
            }
            self.process_events();
            self.wait_for_callers().await;
        }
    }

    /// Waits for a caller that has not read the answers of other nodes, so that the inbox, which is bounded, holds the
    /// rest.
    async fn wait_for_callers(&self) {
        let links: Vec<NodeLink> = self.nodes.lock().values().filter_map(|node| node.link.clone()).collect();
        // All at once: other nodes wait for the slowest of them, not for one after the other.
        let waits = links.iter().map(async |NodeLink { connection, .. }| {
            if tokio::time::timeout(MAX_WAIT, poll_fn(|cx| connection.poll_room(cx))).await.is_err() {
                connection.abandon_wait();
            }
        });
        join_all(waits).await;
    }

    /// Handles all that has come from the cluster. False: there was nothing.
    pub fn process_events(&self) -> bool {
        // Members first: a node whose link was lost and that is up again must not be seen as up and then lost.
        let members = self.members.take();
        let mail = self.inbox.take();
        let roster = self.roster.take();
        let some = !(mail.is_empty() && members.is_empty() && roster.is_empty());
        let mut cancelled: HashMap<NodeId, HashSet<u64>> = HashMap::new();
        for incoming in mail {
            match incoming {
                InboxEvent::Message { from, body: mail } => {
                    self.hub.metrics.mail_received.add(1);
                    match HubMessage::decode(&mail) {
                        Some(HubMessage::Cancel { id }) => {
                            cancelled.entry(from).or_default().insert(id);
                        }
                        Some(message) => self.receive(from, &mail, message),
                        None => {}
                    }
                }
                // All undelivered messages come before the link is reported as lost.
                InboxEvent::Returned { to, body: mail } => self.undelivered(to, &mail),
                InboxEvent::LinkLost { peer: with, gone } => {
                    self.hub.metrics.links_lost.add(1);
                    cancelled.remove(&with);
                    self.disconnect(with);
                    if !gone {
                        self.connect(with);
                    }
                }
            }
        }
        // All at once: a caller that disconnects may have a thousand calls.
        for (node, ids) in cancelled {
            if let Some(link) = self.find(node) {
                link.abandon(&ids);
            }
        }
        for member in members {
            if member.up {
                self.connect(member.node);
            } else {
                self.disconnect(member.node);
            }
        }
        for holding in roster {
            self.learn(holding);
        }
        let mut nodes = self.nodes.lock();
        nodes.retain(|_, node| node.link.is_some() || !node.advertised.is_empty());
        self.hub.metrics.links.set(nodes.values().filter(|node| node.link.is_some()).count() as i64);
        some
    }

    /// Sends heartbeats on quiet links with calls, which is how each end notices lost messages. One task calls it after
    /// every [`Hub::sweep`].
    pub fn send_heartbeats(&self) {
        let now = self.hub.clock.now();
        let links: Vec<NodeLink> = self.nodes.lock().values().filter_map(|node| node.link.clone()).collect();
        for NodeLink { peer, connection } in links {
            let quiet = peer.sent.load(Relaxed).min(peer.received.load(Relaxed)).max(peer.heartbeat.load(Relaxed));
            if now < quiet + HEARTBEAT {
                continue;
            }
            if !peer.has_calls.load(SeqCst) && connection.in_flight() == 0 {
                continue;
            }
            peer.has_calls.store(false, SeqCst);
            if connection.in_flight() > 0 || has_calls(&connection.conn) {
                peer.has_calls.store(true, SeqCst);
                peer.heartbeat.store(now, Relaxed);
                peer.send(Priority::High, message::HEARTBEAT_MESSAGE);
            }
        }
    }

    fn find(&self, node: NodeId) -> Option<NodeLink> {
        self.nodes.lock().get(&node)?.link.clone()
    }

    /// The link to `node`. A new one is entered with all that the node advertises.
    fn connect(&self, node: NodeId) -> NodeLink {
        if let Some(link) = self.find(node) {
            return link;
        }
        let peer = Arc::new(LinkPeer::new(&self.hub, node));
        let conn = PeerState::new(peer.clone(), usize::MAX, Some(node));
        let link = NodeLink { peer, connection: Arc::new(HubConnection::with_conn(&self.hub, conn)) };
        let advertised: Vec<_> = {
            let mut nodes = self.nodes.lock();
            let node = nodes.entry(node).or_default();
            node.link = Some(link.clone());
            node.advertised.iter().map(|(name, (rev, info))| (name.clone(), *rev, info.clone())).collect()
        };
        for (name, rev, info) in advertised {
            self.set_remote(&link.connection.conn, &name, rev, &info);
        }
        link
    }

    /// Ends a link: calls to the node fail, calls of the node are cancelled.
    fn disconnect(&self, node: NodeId) {
        let link = self.nodes.lock().get_mut(&node).and_then(|node| node.link.take());
        drop(link);
        self.hub.name_queries.remove_node(node);
    }

    fn learn(&self, holding: RosterEntry) {
        let RosterEntry { name, node, rev, info } = holding;
        let Some(service) = name.strip_prefix(NAME_PREFIX) else { return };
        let info: Option<Advertisement> = info.and_then(|info: Bytes| serde_json::from_slice(&info).ok());
        let link = {
            let mut nodes = self.nodes.lock();
            let node = nodes.entry(node).or_default();
            match &info {
                Some(info) => node.advertised.insert(service.into(), (rev, info.clone())),
                None => node.advertised.remove(service),
            };
            node.link.clone()
        };
        let Some(link) = link else { return };
        match info {
            Some(info) => self.set_remote(&link.connection.conn, service, rev, &info),
            None => {
                let Some(service) = self.hub.registry.find(service) else { return };
                self.hub.edit(&service).unset_remote(&link.connection.conn, None);
            }
        }
    }

    fn set_remote(&self, conn: &Arc<PeerState>, name: &str, rev: u64, info: &Advertisement) {
        loop {
            let service = self.hub.registry.find_or_create(name);
            let mut provides = conn.provides.lock();
            let mut state = self.hub.edit(&service);
            if state.marks.dead {
                continue;
            }
            let slot = provides.vacant_key() as u32;
            if let Some(provider) = state.set_remote(conn, slot, rev, info) {
                provides.insert(ProviderSlot { service: service.clone(), provider });
            }
            let follow_up = state.unlock();
            drop(provides);
            drop(follow_up);
            return;
        }
    }

    fn receive(&self, from: NodeId, mail: &Bytes, message: HubMessage<'_>) {
        let hub = &*self.hub;
        let link = self.connect(from);
        link.peer.received.store(hub.clock.now(), Relaxed);
        match message {
            HubMessage::Call(call) => {
                if let Err(reason) = link.accept(&call) {
                    link.peer.send(Priority::High, &message::encode_reject(reason, mail));
                }
            }
            HubMessage::Reply { caller_id, load, answer } => {
                let Some((id, service)) = message::parse_remote_caller_id(caller_id) else { return };
                let conn = &link.connection.conn;
                match hub.registry.find(service) {
                    Some(service) => hub.reply_from_node(conn, &service, id, load, answer),
                    None => hub.reply(conn, id, answer),
                };
            }
            HubMessage::Reject { reason, message } => {
                if let Some(HubMessage::Call(call)) = HubMessage::decode(message) {
                    self.rejected(&link, from, call, reason);
                }
            }
            HubMessage::NameQuery(query) => {
                let (peer, number) = (link.peer.clone(), query.number);
                let respond = move |held| {
                    peer.send(Priority::High, &message::encode_name_reply(number, held));
                };
                registration::answer_query(hub, &query, Box::new(respond));
            }
            HubMessage::NameReply { number, held } => hub.name_queries.answer(number, held),
            HubMessage::Heartbeat { ack: false } => {
                link.peer.send(Priority::High, message::HEARTBEAT_ACK_MESSAGE);
            }
            HubMessage::Heartbeat { ack: true } | HubMessage::Cancel { .. } => {}
        }
    }

    /// Handles a message to `node` that the node surely has not read.
    fn undelivered(&self, node: NodeId, mail: &Bytes) {
        let Some(link) = self.find(node) else { return };
        match HubMessage::decode(mail) {
            Some(HubMessage::Call(call)) => self.rejected(&link, node, call, RejectReason::NoProvider),
            Some(HubMessage::NameQuery(query)) => self.hub.name_queries.remove(query.number),
            _ => {}
        }
    }

    /// Handles a call that no provider of the node has received: it is placed elsewhere, waits, or fails.
    fn rejected(&self, link: &NodeLink, from: NodeId, call: RemoteCall<'_>, reason: RejectReason) {
        let hub = &*self.hub;
        let conn = &link.connection.conn;
        let Some(service) = hub.registry.find(call.service) else { return };
        let mut state = service.state.lock();
        let id = call.id.map(CallId::from_u64);
        let (provider, entry) = match id.map(|id| (id, state.find_call(id, conn))) {
            Some((id, Some((provider, seq)))) => (provider, Some((id.index(), seq))),
            // Cancelled meanwhile.
            Some((_, None)) => return,
            None => (state.providers.find_remote(conn).unwrap_or(u32::MAX), None),
        };
        let mut route = CallRoute::new(&service, &call.request, entry);
        route.tried = state.providers.keys_of(&call.tried);
        route.rejected_by = call.tried;
        let cause = match reason {
            RejectReason::Busy => {
                route.rejected_by.push(from);
                state.providers.record_full(conn, hub.clock.now());
                NotDelivered::Full
            }
            RejectReason::NoProvider => NotDelivered::NoProvider { rev: call.rev },
        };
        drop(state);
        let failed = match hub.reroute(&mut route, conn, provider, cause) {
            Ok(None) => None,
            Ok(Some(target)) => hub.try_deliver(&mut route, target),
            Err(failed) => Some(failed),
        };
        if let Some((call, error)) = failed {
            hub.settle(&call, CallAnswer::Failed(error));
        }
    }

    /// Nodes to which there is a link. For tests.
    pub fn links(&self) -> usize {
        self.nodes.lock().values().filter(|node| node.link.is_some()).count()
    }
}

impl NodeLink {
    /// Places a call of the other node with a provider of this one.
    ///
    /// # Errors
    /// No provider has received it, nor will.
    fn accept(&self, call: &RemoteCall<'_>) -> Result<(), RejectReason> {
        let HubConnection { hub, conn } = &*self.connection;
        let service = hub.registry.find(call.service).ok_or(RejectReason::NoProvider)?;
        let Some(id) = call.id else {
            let mut state = hub.edit(&service);
            let provider = state.pick(&[], true, true, hub.clock.now()).ok_or(RejectReason::NoProvider)?;
            let target = state.target(provider);
            drop(state);
            hub.deliver(&service, target, &call.request, None);
            return Ok(());
        };
        let timeout = u32::try_from(call.time_left).unwrap_or(u32::MAX).max(1);
        let reason = |code| if code == Code::Busy { RejectReason::Busy } else { RejectReason::NoProvider };
        match hub.enter(conn, &service, message::remote_caller_id(id, call.service), timeout, &call.request) {
            Ok(None) => Ok(()),
            Ok(Some((call, error))) => match call.caller.take(call.at, call.seq) {
                Some(_) => Err(reason(error.code())),
                None => Ok(()),
            },
            Err((_, Some(error))) => Err(reason(error.code())),
            Err((_, None)) => Err(RejectReason::NoProvider),
        }
    }

    /// Ends calls of the other node, which expects no answer.
    fn abandon(&self, ids: &HashSet<u64>) {
        let HubConnection { hub, conn } = &*self.connection;
        let is_one = |id: &[u8]| message::parse_remote_caller_id(id).is_some_and(|(id, _)| ids.contains(&id.to_u64()));
        for call in conn.take_all(|call| is_one(call.caller_id.id())) {
            hub.abandon(&call);
        }
    }
}

/// Whether providers at the other end of a link have calls of this node.
fn has_calls(conn: &Arc<PeerState>) -> bool {
    let provides: Vec<_> = conn.provides.lock().iter().map(|(_, slot)| (slot.service.clone(), slot.provider)).collect();
    provides.iter().any(|(service, provider)| service.state.lock().providers.has_calls(*provider, conn))
}
