//! [`RedisCluster`]: the membership of this node among those on one Redis.
//!
//! ```text
//! weir:{nodes}              ZSET   nodes by the time at which they joined: an index of sessions
//! weir:{node:ID}            HASH   a session, expires 10 s after the last heartbeat: infos of the node's names
//! weir:{name:N}             HASH   f: the last fencing token of the name · a node: it holds the name, shared or (x)
//!                                  exclusively
//! weir:{name:N}:x           STRING the node that holds it exclusively, expires 10 s after the last renewal
//! weir:{nodes}:news         channel   announcements: hello with each heartbeat, goodbye, and changes of sessions
//! weir:{node:ID}:mail       channel   batches of messages for a node
//! ```
//!
//! A node reads all sessions when it joins and whenever it has subscribed to the announcements again, then follows
//! these; each second it compares the revisions of the sessions with what it knows. No decision compares the clocks of
//! two machines, or trusts that of Redis alone: Redis lets keys expire, early if its clock is set forward, and a node is
//! gone once its session has expired and it has not announced itself for as long, by the clock of the node that waits.

mod announcement;
mod context;
mod leases;
mod messages;
mod peers;
mod session;

use std::{
    sync::{
        Arc, Weak,
        atomic::{AtomicU32, Ordering::SeqCst},
    },
    task::{Context, Poll},
};

use bytes::Bytes;
use futures_util::future::BoxFuture;
use tokio::task::JoinHandle;

use self::{
    announcement::Announcement,
    context::{ClusterContext, ClusterState},
    leases::LeaseManager,
    messages::MessageCarrier,
    peers::PeerSessions,
    session::OwnSession,
};
use super::client::{PubSub, PubSubHandler, Topology};
use crate::{
    cluster::{
        Claim, ClaimError, Cluster, ClusterMembers, Inbox, Lease, MessageKind, NodeId, Priority, Roster, RosterEntry,
        SendOutcome,
    },
    metrics::RedisConnectionKind,
};

pub(crate) struct RedisCluster {
    context: Arc<ClusterContext>,
    leases: Arc<LeaseManager>,
    session: Arc<OwnSession>,
    tasks: [JoinHandle<()>; 4],
}

/// Handles the announcements of all nodes, and the messages for this one.
struct ClusterHandler {
    messages: Arc<MessageCarrier>,
    peers: Arc<PeerSessions>,
    session: Weak<OwnSession>,
}

impl RedisCluster {
    /// Joins. Needs a tokio runtime. Does not wait for a connection.
    pub(crate) fn start(topology: Arc<Topology>, prefix: &str) -> Arc<Self> {
        let context = Arc::new(ClusterContext::new(topology.clone(), prefix));
        let leases = LeaseManager::new(context.clone());
        let messages = Arc::new(MessageCarrier(context.clone()));
        let peers = Arc::new(PeerSessions::new(context.clone(), messages.clone()));
        let session = Arc::new_cyclic(|session| {
            let handler = ClusterHandler { messages: messages.clone(), peers: peers.clone(), session: session.clone() };
            OwnSession {
                context: context.clone(),
                leases: leases.clone(),
                messages: messages.clone(),
                peers: peers.clone(),
                pubsub: PubSub::start(topology, RedisConnectionKind::Mail, Arc::new(handler)),
                unreceived: AtomicU32::new(0),
            }
        });
        session.pubsub.subscribe(context.mail_channel(context.id()).into());
        session.pubsub.subscribe(context.news_channel().into());
        let tasks = [
            tokio::spawn(session.clone().run_heartbeat()),
            tokio::spawn(session.clone().run_changes()),
            tokio::spawn(peers.run()),
            tokio::spawn(messages.run()),
        ];
        Arc::new(RedisCluster { context, leases, session, tasks })
    }
}

impl Drop for RedisCluster {
    fn drop(&mut self) {
        self.tasks.iter().for_each(JoinHandle::abort);
    }
}

impl PubSubHandler for ClusterHandler {
    fn on_message(&self, channel: &[u8], message: Bytes) {
        if channel.ends_with(b":news") {
            if let Some(announcement) = Announcement::decode(&message) {
                self.peers.on_announcement(announcement);
            }
        } else if !message.is_empty() {
            self.messages.receive(message);
        } else if let Some(session) = self.session.upgrade() {
            session.unreceived.store(0, SeqCst);
        }
    }

    fn on_subscribed(&self, channel: &[u8]) {
        if channel.ends_with(b":news") {
            self.peers.on_subscribed();
        } else if let Some(session) = self.session.upgrade() {
            session.on_subscribed();
        }
    }
}

impl Cluster for RedisCluster {
    fn members(&self) -> ClusterMembers {
        let ClusterState { watchers, peers, .. } = &mut *self.context.state.lock();
        watchers.members(peers.keys().copied().filter(|node| self.context.links.has_peer(*node)))
    }

    fn claim(&self, name: &str, claim: Claim) -> BoxFuture<'static, Result<Lease, ClaimError>> {
        Box::pin(self.leases.clone().claim(name.into(), claim))
    }

    fn roster(&self, prefix: &str) -> Roster {
        let ClusterState { watchers, peers, .. } = &mut *self.context.state.lock();
        let known = peers.iter().flat_map(|(node, peer)| {
            peer.infos.iter().map(|(name, (rev, info))| RosterEntry {
                name: name.clone(),
                node: *node,
                rev: *rev,
                info: Some(info.clone()),
            })
        });
        watchers.roster(prefix, known)
    }

    fn send(&self, to: NodeId, kind: MessageKind, priority: Priority, message: &[u8]) -> SendOutcome {
        self.context.links.send(to, kind, priority, message)
    }

    fn poll_room(&self, node: NodeId, cx: &mut Context<'_>) -> Poll<()> {
        self.context.links.poll_room(node, cx)
    }

    fn inbox(&self, kind: MessageKind) -> Inbox {
        self.context.links.inbox(kind)
    }

    fn is_leader(&self) -> bool {
        self.context.leads.load(SeqCst) && self.context.is_alive()
    }

    fn is_isolated(&self) -> bool {
        !self.context.is_alive()
    }

    fn leave(&self) -> BoxFuture<'static, ()> {
        Box::pin(self.session.clone().leave())
    }
}
