//! [`OwnSession`]: the session of this node, which it renews with each heartbeat, keeps up to date, and ends.

use std::{
    sync::{
        Arc,
        atomic::{AtomicU32, Ordering::SeqCst},
    },
    time::Duration,
};

use bytes::{BufMut, Bytes, BytesMut};
use futures_util::future::join_all;
use redis::cmd;
use tokio::time::{sleep, timeout};

use super::{
    announcement::{Announcement, SessionChange, VERSION},
    context::{ClusterContext, ClusterState, TTL},
    leases::LeaseManager,
    messages::MessageCarrier,
    peers::PeerSessions,
};
use crate::{
    backend::redis::client::{CommandResult, OnLostReply, PubSub, Script},
    cluster::{Claim, NodeId},
};

static BEAT: Script = Script::new(include_str!("beat.lua"));
static WRITE: Script = Script::new(include_str!("write_session.lua"));

const HEARTBEAT: Duration = Duration::from_secs(3);
/// Between two attempts.
const RETRY: Duration = Duration::from_millis(250);
/// Shared names renewed with a heartbeat: every name well within the time that Redis remembers it.
const SHARED: usize = 50;
/// How long the parts of a heartbeat may take that are not the session's own.
const PART: Duration = Duration::from_secs(1);
/// Notes to itself that may be under way, or lost with a connection that is being replaced.
const MAX_UNRECEIVED: u32 = 2;
/// How long leaving may take.
const LEAVE: Duration = Duration::from_secs(2);

pub(super) struct OwnSession {
    pub(super) context: Arc<ClusterContext>,
    pub(super) leases: Arc<LeaseManager>,
    pub(super) messages: Arc<MessageCarrier>,
    pub(super) peers: Arc<PeerSessions>,
    pub(super) pubsub: Arc<PubSub>,
    /// Notes to itself that this node has not received.
    pub(super) unreceived: AtomicU32,
}

impl OwnSession {
    /// Sends heartbeats for as long as the node lives.
    pub(super) async fn run_heartbeat(self: Arc<Self>) {
        let mut turn = 0;
        loop {
            let pause = if self.heartbeat(&mut turn).await { HEARTBEAT } else { RETRY };
            let _ = timeout(pause.mul_f64(0.9 + 0.2 * fastrand::f64()), self.context.beat.notified()).await;
        }
    }

    /// Writes and announces what changes.
    pub(super) async fn run_changes(self: Arc<Self>) {
        loop {
            if !self.write_changes().await {
                sleep(RETRY).await;
                self.context.changed.notify_one();
            }
            self.context.changed.notified().await;
        }
    }

    /// Releases all names, deletes the session, and announces it.
    pub(super) async fn leave(self: Arc<Self>) {
        let context = &self.context;
        let (id, leases) = {
            let mut state = context.state.lock();
            state.left = true;
            (state.id, std::mem::take(&mut state.leases))
        };
        let leave = async {
            join_all(leases.values().map(|lease| self.leases.release_name(&lease.name, lease.fence))).await;
            let (session, index) = (context.session_key(id), context.index_key());
            let _ = context.call::<u64>(&session, cmd("DEL").arg(&session)).await;
            let _ = context.call::<u64>(&index, cmd("ZREM").arg(&index).arg(id.to_string())).await;
            context.announce(&Announcement::Goodbye { from: id }).await;
        };
        // Steps that time out take effect when the session expires.
        let _ = timeout(LEAVE, leave).await;
    }

    /// True if Redis has this node's session.
    async fn heartbeat(&self, turn: &mut usize) -> bool {
        let context = &self.context;
        if context.state.lock().left {
            return true;
        }
        let before = context.id();
        let asked = context.clock.now();
        let session = context.session_key(before);
        let keys = [session.as_bytes()];
        let beat = context.topology.run(&BEAT, &keys, OnLostReply::Retry, |_, command| {
            command.arg(TTL.as_millis() as u64);
        });
        let Ok(((rev, time, renewed), _)): CommandResult<(Option<u64>, u64, u8)> = beat.await else {
            if !context.is_alive() {
                self.peers.disconnect();
            }
            return false;
        };
        let (joined, until) = {
            let state = context.state.lock();
            (state.joined, state.until)
        };
        let late = joined != 0 && asked >= until;
        let joined = if late || joined == 0 { self.next_joined(time).await } else { joined };
        let renamed = {
            let mut state = context.state.lock();
            if state.left {
                return true;
            }
            if late {
                // Other nodes took this one for dead, and its names for free: it comes back under another id.
                tracing::warn!(
                    "this node had no heartbeat for {}s: its calls to and from other nodes have failed",
                    TTL.as_secs()
                );
                state.id = NodeId::random();
                context.links.reset(state.id);
                let nodes: Vec<NodeId> = state.peers.keys().copied().collect();
                for node in nodes {
                    // The links begin again; the peers are up.
                    state.watchers.member_changed(node, false);
                    self.messages.add_peer(&mut state, node);
                }
            }
            state.joined = joined;
            if late || rev.is_none_or(|rev| rev > state.rev) {
                state.unknown = true;
            }
            if renewed == 1 {
                state.until = asked + TTL.as_millis() as u64;
            }
            late.then_some(state.id)
        };
        let heard = timeout(PART, self.announce_itself()).await.unwrap_or(false);
        // A session expires that Redis does not renew, because it rejects writes. Then announcements keep the node.
        if renewed == 0 && heard {
            context.state.lock().until = asked + TTL.as_millis() as u64;
        } else if !context.is_alive() {
            self.peers.disconnect();
        }
        if let Some(id) = renamed {
            self.pubsub.unsubscribe(context.mail_channel(before).as_bytes());
            self.pubsub.subscribe(context.mail_channel(id).into());
            let _ = context.call::<u64>(&session, cmd("DEL").arg(&session)).await;
        }
        let unknown = context.state.lock().unknown;
        // Each key is on its own server of a Cluster: one that hangs must not cost this node its session on another.
        let written = match unknown {
            true => self.write_all().await,
            false => timeout(PART, self.add_to_index(before)).await.unwrap_or(false),
        };
        let _ = timeout(PART, self.renew_leases(before, renamed.is_some(), turn)).await;
        let _ = timeout(PART, self.send_note()).await;
        context.choose_leader();
        // What Redis rejects now is written with a later heartbeat.
        written || renewed == 0
    }

    /// The time at which a node joins now: later than all others, also if the clock of Redis was set back. A node
    /// that knows nothing yet must not become the leader.
    async fn next_joined(&self, now: u64) -> u64 {
        let index = self.context.index_key();
        let last = cmd("ZRANGE").arg(&index).arg(-1).arg(-1).arg("WITHSCORES").take();
        let last = timeout(PART, self.context.call::<Vec<(String, f64)>>(&index, &last)).await;
        let last = last.ok().and_then(Result::ok).and_then(|(last, _)| last.first().map(|(_, joined)| *joined as u64));
        last.map_or(0, |last| last + 1).max(now).max(1)
    }

    /// Announces that this node lives and can be reached.
    async fn announce_itself(&self) -> bool {
        if !self.pubsub.is_subscribed(self.context.mail_channel(self.context.id()).as_bytes()) {
            return false;
        }
        let hello = {
            let state = self.context.state.lock();
            Announcement::Hello { from: state.id, joined: state.joined, rev: state.written }
        };
        self.context.announce(&hello).await
    }

    /// Sends a note to this node itself. The connection for messages may lead to a server that no other node writes to
    /// any more, though it is alive: if notes do not come back, it is replaced.
    async fn send_note(&self) {
        let channel = self.context.mail_channel(self.context.id());
        if self.unreceived.fetch_add(1, SeqCst) >= MAX_UNRECEIVED {
            tracing::warn!("Redis took messages for this node and did not send them: reconnecting");
            self.unreceived.store(0, SeqCst);
            self.pubsub.reconnect(channel.as_bytes());
        }
        let _ = self.context.call::<u64>(&channel, &self.context.publish(&channel, b"")).await;
    }

    /// Renews all exclusive names, and some of the shared ones; all of them after this node got another id.
    async fn renew_leases(&self, before: NodeId, all: bool, turn: &mut usize) {
        let leases: Vec<_> = self.context.state.lock().leases.values().cloned().collect();
        let (exclusive, shared): (Vec<_>, Vec<_>) =
            leases.into_iter().partition(|lease| lease.claim == Claim::Exclusive);
        let some = if all { shared.len() } else { SHARED.min(shared.len()) };
        let from = if shared.is_empty() { 0 } else { *turn % shared.len() };
        *turn += some;
        let due = exclusive.iter().chain(shared.iter().cycle().skip(from).take(some));
        join_all(due.map(|lease| self.leases.renew(lease, before))).await;
    }

    /// Writes the whole session, for a Redis that does not have it, and announces this node.
    async fn write_all(&self) -> bool {
        let context = &self.context;
        let (id, header, rev, infos) = {
            let mut state = context.state.lock();
            state.dirty.clear();
            state.written = state.rev;
            let infos: Vec<_> = state.infos.iter().map(|(name, info)| (name.clone(), info.clone())).collect();
            (state.id, encode_header(state.joined), state.rev, infos)
        };
        let session = context.session_key(id);
        let keys = [session.as_bytes()];
        let write = context.topology.run::<u64>(&WRITE, &keys, OnLostReply::Retry, |_, command| {
            command.arg(TTL.as_millis() as u64).arg("v").arg(&*header).arg("r").arg(rev);
            for (name, (rev, info)) in &infos {
                command.arg(field(name)).arg(&*encode_info(*rev, info));
            }
        });
        if write.await.is_err() || !self.add_to_index(id).await {
            return false;
        }
        let joined = {
            let mut state = context.state.lock();
            state.unknown = false;
            state.joined
        };
        // There may be changes since.
        context.changed.notify_one();
        context.announce(&Announcement::Hello { from: id, joined, rev }).await
    }

    /// Adds this node to the index in which others find it; the leader may have removed it.
    async fn add_to_index(&self, id: NodeId) -> bool {
        let (index, joined) = (self.context.index_key(), self.context.state.lock().joined);
        self.context.call::<u64>(&index, cmd("ZADD").arg(&index).arg(joined).arg(id.to_string())).await.is_ok()
    }

    /// Writes and announces the changes. False if Redis did not confirm it.
    async fn write_changes(&self) -> bool {
        let context = &self.context;
        let (id, after, rev, changes) = {
            let mut state = context.state.lock();
            // A session that Redis does not have is written as a whole, by the heartbeat.
            if state.dirty.is_empty() || state.unknown || state.left {
                return true;
            }
            let ClusterState { dirty, infos, rev, .. } = &mut *state;
            let changes: Vec<SessionChange> = dirty
                .drain()
                .map(|name| match infos.get(&name) {
                    Some((rev, info)) => SessionChange { name, rev: *rev, info: Some(info.clone()) },
                    None => SessionChange { name, rev: *rev, info: None },
                })
                .collect();
            let after = state.written;
            state.written = state.rev;
            (state.id, after, state.rev, changes)
        };
        let session = context.session_key(id);
        let (mut set, mut remove) = (cmd("HSET"), cmd("HDEL"));
        set.arg(&session).arg("r").arg(rev);
        remove.arg(&session).arg("-");
        for change in &changes {
            match &change.info {
                Some(info) => set.arg(field(&change.name)).arg(&*encode_info(change.rev, info)),
                None => remove.arg(field(&change.name)),
            };
        }
        for command in [remove, set] {
            if context.call::<u64>(&session, &command).await.is_err() {
                context.state.lock().unknown = true;
                context.beat.notify_one();
                return false;
            }
        }
        context.announce(&Announcement::Changes { from: id, after, rev, changes }).await
    }

    /// The channel of this node is subscribed to, perhaps again.
    pub(super) fn on_subscribed(self: &Arc<Self>) {
        self.unreceived.store(0, SeqCst);
        // Other nodes may have found no subscriber.
        if self.context.state.lock().joined != 0 {
            let this = self.clone();
            tokio::spawn(async move { this.announce_itself().await });
        }
        // A Redis that was away may have lost the session.
        self.context.beat.notify_one();
    }
}

/// The field of a name in the session.
fn field(name: &str) -> String {
    format!("n:{name}")
}

fn encode_header(joined: u64) -> Bytes {
    let mut header = BytesMut::new();
    header.put_u8(VERSION);
    header.put_u64_le(joined);
    header.freeze()
}

fn encode_info(rev: u64, info: &Bytes) -> Bytes {
    let mut encoded = BytesMut::with_capacity(8 + info.len());
    encoded.put_u64_le(rev);
    encoded.put_slice(info);
    encoded.freeze()
}
