//! [`PeerSessions`]: what this node knows of the others, from their announcements and from their sessions.

use std::{
    collections::HashMap,
    sync::{Arc, atomic::Ordering::SeqCst},
};

use bytes::{Buf, Bytes};
use futures_util::future::join_all;
use redis::cmd;
use tokio::time::timeout;

use super::{
    announcement::{Announcement, SessionChange},
    context::{ClusterContext, ClusterState, PeerSession, REFRESH, TTL},
    messages::MessageCarrier,
};
use crate::{
    backend::redis::client::{CommandResult, OnLostReply, Script},
    cluster::{NodeId, RosterEntry},
};

static READ: Script = Script::new(include_str!("read_session.lua"));

pub(super) struct PeerSessions {
    context: Arc<ClusterContext>,
    messages: Arc<MessageCarrier>,
}

impl PeerSessions {
    pub(super) fn new(context: Arc<ClusterContext>, messages: Arc<MessageCarrier>) -> Self {
        PeerSessions { context, messages }
    }

    /// Reads the sessions of others, at intervals and whenever there is a reason.
    pub(super) async fn run(self: Arc<Self>) {
        loop {
            self.refresh().await;
            let _ = timeout(REFRESH, self.context.refresh.notified()).await;
        }
    }

    pub(super) fn on_announcement(&self, announcement: Announcement) {
        let heard = Some(self.context.clock.now());
        let mut state = self.context.state.lock();
        if announcement.from() == state.id {
            return;
        }
        match announcement {
            Announcement::Goodbye { from } => self.remove(&mut state, from),
            Announcement::Hello { from, joined, rev } => {
                let peer = state.peers.entry(from).or_default();
                (peer.joined, peer.heard) = (joined, heard);
                peer.stale |= peer.rev != rev;
                if peer.stale {
                    self.context.refresh.notify_one();
                }
                self.messages.add_peer(&mut state, from);
            }
            Announcement::Changes { from, after, rev, changes } => {
                let ClusterState { peers, watchers, .. } = &mut *state;
                let peer = peers.entry(from).or_insert_with(|| PeerSession { stale: true, ..PeerSession::default() });
                peer.heard = heard;
                if peer.stale || peer.rev != after {
                    if rev > peer.rev {
                        peer.stale = true;
                        self.context.refresh.notify_one();
                    }
                    return;
                }
                peer.rev = rev;
                for SessionChange { name, rev, info } in changes {
                    match &info {
                        Some(info) => peer.infos.insert(name.clone(), (rev, info.clone())),
                        None => peer.infos.remove(&name),
                    };
                    watchers.roster_changed(&RosterEntry { name, node: from, rev, info });
                }
            }
        }
        drop(state);
        self.context.choose_leader();
    }

    /// Announcements may have been missed: all sessions are read again.
    pub(super) fn on_subscribed(&self) {
        self.context.state.lock().peers.values_mut().for_each(|peer| peer.stale = true);
        self.context.refresh.notify_one();
    }

    /// A node is gone.
    fn remove(&self, state: &mut ClusterState, node: NodeId) {
        let Some(peer) = state.peers.remove(&node) else { return };
        self.context.links.remove_peer(node);
        state.watchers.member_changed(node, false);
        for (name, (rev, _)) in peer.infos {
            state.watchers.roster_changed(&RosterEntry { name, node, rev: rev + 1, info: None });
        }
    }

    /// This node is isolated: no other node can be reached.
    pub(super) fn disconnect(&self) {
        let mut state = self.context.state.lock();
        let ClusterState { peers, watchers, .. } = &mut *state;
        for node in peers.keys() {
            if self.context.links.remove_peer(*node) {
                watchers.member_changed(*node, false);
            }
        }
        drop(state);
        self.context.choose_leader();
    }

    async fn refresh(&self) {
        let context = &self.context;
        let index = context.index_key();
        let range = context.call::<Vec<String>>(&index, cmd("ZRANGE").arg(&index).arg(0).arg(-1)).await;
        let Ok((indexed, _)) = range else { return };
        let indexed: Vec<NodeId> = indexed.iter().filter_map(|text| NodeId::parse(text)).collect();
        let mut nodes = indexed.clone();
        {
            let state = context.state.lock();
            nodes.extend(state.peers.keys());
            nodes.extend(state.early.keys());
            nodes.sort();
            nodes.dedup();
            nodes.retain(|node| *node != state.id);
        }
        join_all(nodes.iter().map(|node| self.refresh_node(*node, indexed.contains(node)))).await;
        // A sender without a session is no node.
        context.state.lock().early.retain(|node, _| !nodes.contains(node));
        context.choose_leader();
    }

    async fn refresh_node(&self, node: NodeId, indexed: bool) {
        let context = &self.context;
        let session = context.session_key(node);
        let keys = [session.as_bytes()];
        let read = context.topology.run(&READ, &keys, OnLostReply::Retry, |_, command| {
            command.arg(TTL.as_millis() as u64);
        });
        let Ok(((header, rev), connection)): CommandResult<(Option<Bytes>, Option<u64>)> = read.await else { return };
        let Some(joined) = header.and_then(parse_header) else {
            if !context.topology.is_settled(session.as_bytes(), &connection) {
                // A Redis that has lost its data gets the sessions of live nodes again.
                return;
            }
            if context.is_heard(node) {
                // It writes its session again with its next heartbeat.
                return;
            }
            self.remove(&mut context.state.lock(), node);
            if indexed && context.leads.load(SeqCst) {
                // A live node adds itself again with its next heartbeat.
                let index = context.index_key();
                let _ = context.call::<u64>(&index, cmd("ZREM").arg(&index).arg(node.to_string())).await;
            }
            return;
        };
        let (new, stale) = {
            let mut state = context.state.lock();
            let new = !state.peers.contains_key(&node);
            let peer = state.peers.entry(node).or_insert_with(|| PeerSession { stale: true, ..PeerSession::default() });
            peer.joined = joined;
            (new, peer.stale || rev.unwrap_or_default() > peer.rev)
        };
        if stale {
            self.read_session(node).await;
        }
        let has_sent = context.state.lock().early.contains_key(&node);
        // A node that could not be reached is up again when it has subscribed.
        if new || has_sent || !context.links.has_peer(node) && self.is_subscribed(node).await {
            self.messages.add_peer(&mut context.state.lock(), node);
        }
    }

    async fn is_subscribed(&self, node: NodeId) -> bool {
        let channel = self.context.mail_channel(node);
        let verb = if self.context.topology.is_cluster() { "SHARDNUMSUB" } else { "NUMSUB" };
        let reply = self.context.call::<(String, u64)>(&channel, cmd("PUBSUB").arg(verb).arg(&channel)).await;
        reply.is_ok_and(|((_, count), _)| count > 0)
    }

    async fn read_session(&self, node: NodeId) {
        let session = self.context.session_key(node);
        let fields = self.context.call::<HashMap<Bytes, Bytes>>(&session, cmd("HGETALL").arg(&session)).await;
        let Ok((fields, _)) = fields else { return };
        let (mut rev, mut infos) = (None, HashMap::new());
        for (field, mut value) in fields {
            match field.strip_prefix(b"n:") {
                Some(name) if value.len() >= 8 => {
                    let Ok(name) = std::str::from_utf8(name) else { continue };
                    infos.insert(Arc::<str>::from(name), (value.get_u64_le(), value));
                }
                Some(_) => {}
                None if *field == *b"r" => rev = std::str::from_utf8(&value).ok().and_then(|rev| rev.parse().ok()),
                None => {}
            }
        }
        let Some(rev) = rev else { return };
        let mut state = self.context.state.lock();
        let ClusterState { peers, watchers, .. } = &mut *state;
        let Some(peer) = peers.get_mut(&node) else { return };
        if rev < peer.rev {
            // An announcement was faster. If the peer is stale, it stays so until it is read again.
            return;
        }
        let before = std::mem::replace(&mut peer.infos, infos);
        (peer.rev, peer.stale) = (rev, false);
        for (name, (rev, info)) in &peer.infos {
            if before.get(name).is_none_or(|(known, _)| known != rev) {
                let info = Some(info.clone());
                watchers.roster_changed(&RosterEntry { name: name.clone(), node, rev: *rev, info });
            }
        }
        for (name, (rev, _)) in before {
            if !peer.infos.contains_key(&name) {
                watchers.roster_changed(&RosterEntry { name, node, rev: rev + 1, info: None });
            }
        }
    }
}

/// When a node joined. Every version so far is compatible.
fn parse_header(mut header: Bytes) -> Option<u64> {
    header.try_get_u8().ok()?;
    header.try_get_u64_le().ok()
}
