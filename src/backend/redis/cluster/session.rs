//! The session of this node: it beats, tells, and ends.

use std::{
    sync::{Arc, Weak, atomic::Ordering::SeqCst},
    time::Duration,
};

use bytes::{BufMut, Bytes, BytesMut};
use tokio::time::{sleep, timeout};

use super::{
    BEAT, Inner, LOOK, State, TTL,
    news::{News, Told},
};
use crate::{
    backend::redis::client::{Command, OnLostReply, Script, Value},
    cluster::{Claim, NodeId},
};

static BEAT_SCRIPT: Script = Script::new(include_str!("beat.lua"));
static TELL: Script = Script::new(include_str!("announce.lua"));

/// Of what is stored and sent.
pub(super) const VERSION: u8 = 1;
/// Shared names renewed with a beat: all of them well within the time that Redis remembers them.
const SHARED: usize = 50;
/// How long the parts of a beat may take that are not the session's own.
const PART: Duration = Duration::from_secs(1);
/// So many notes to itself may be on their way, or lost with a connection that is being made again.
const UNHEARD: u32 = 2;
/// How long goodbye may take.
const GOODBYE: Duration = Duration::from_secs(2);

/// Beats for as long as the node lives.
pub(super) async fn keep(inner: Weak<Inner>) {
    let mut turn = 0;
    loop {
        let Some(this) = inner.upgrade() else { return };
        let beat = match this.beat(&mut turn).await {
            true => BEAT,
            false => LOOK / 4,
        };
        let _ = timeout(beat.mul_f64(0.9 + 0.2 * fastrand::f64()), this.beat.notified()).await;
    }
}

/// Tells what changes.
pub(super) async fn tell(inner: Weak<Inner>) {
    loop {
        let Some(this) = inner.upgrade() else { return };
        if !this.tell_changes().await {
            sleep(LOOK / 4).await;
            this.changed.notify_one();
        }
        this.changed.notified().await;
    }
}

/// Says goodbye.
pub(super) async fn leave(inner: Arc<Inner>) {
    let (id, leases) = {
        let mut state = inner.state.lock();
        state.left = true;
        (state.id, std::mem::take(&mut state.leases))
    };
    let goodbye = async {
        let free = leases.values().map(|lease| inner.insist(&lease.name, lease.fence));
        futures_util::future::join_all(free).await;
        let session = inner.session_key(id);
        let delete = Command::new("DEL").arg(&session);
        let _ = inner.topology.call(session.as_bytes(), OnLostReply::Retry, |_| delete.clone()).await;
        let index = inner.index_key();
        let remove = Command::new("ZREM").arg(&index).arg(id.to_string());
        let _ = inner.topology.call(index.as_bytes(), OnLostReply::Retry, |_| remove.clone()).await;
        inner.say(&News::Bye { from: id }).await;
    };
    // What is not said is known when the session is over.
    let _ = timeout(GOODBYE, goodbye).await;
}

impl Inner {
    /// True: Redis has heard it.
    async fn beat(&self, turn: &mut usize) -> bool {
        if self.state.lock().left {
            return true;
        }
        let before = self.state.lock().id;
        let asked = self.clock.now();
        let session = self.session_key(before);
        let answer = self
            .topology
            .run(&BEAT_SCRIPT, &[session.as_bytes()], OnLostReply::Retry, |_, command| {
                command.push_int(TTL.as_millis() as u64);
            })
            .await;
        let Ok((value, _)) = answer else {
            if !self.is_heard() {
                self.cut_off();
            }
            return false;
        };
        let parts = value.list().unwrap_or_default();
        let rev = parts.first().and_then(Value::int);
        let time = parts.get(1).and_then(Value::int).unwrap_or_default();
        let reborn = {
            let mut state = self.state.lock();
            if state.left {
                return true;
            }
            let late = state.joined != 0 && asked >= state.until;
            if late {
                // Others took this node for dead, and what it held for free: it comes back as another.
                tracing::warn!("this node was not heard for {}s: its calls across nodes have failed", TTL.as_secs());
                state.id = NodeId::random();
                self.links.reset(state.id);
                let nodes: Vec<NodeId> = state.others.keys().copied().collect();
                for node in nodes {
                    // Links begin anew; who is up is up.
                    state.watchers.member_changed(node, false);
                    self.admit(&mut state, node);
                }
            }
            if late || state.joined == 0 {
                state.joined = time.max(1);
            }
            if late || rev.is_none() || rev.is_some_and(|rev| rev > state.rev) {
                state.unknown = true;
            }
            state.until = asked + TTL.as_millis() as u64;
            late.then_some(state.id)
        };
        if let Some(id) = reborn {
            if let Some(pubsub) = &*self.pubsub.lock() {
                pubsub.unsubscribe(self.mail_channel(before).as_bytes());
                pubsub.subscribe(self.mail_channel(id).into());
            }
            let gone = Command::new("DEL").arg(&session);
            let _ = self.topology.call(session.as_bytes(), OnLostReply::Retry, |_| gone.clone()).await;
        }
        let unknown = self.state.lock().unknown;
        // Each on its own server of a Cluster: one that hangs must not cost this node its session on another.
        let told = match unknown {
            true => self.tell_all().await,
            false => timeout(PART, self.list(before)).await.unwrap_or(false),
        };
        let _ = timeout(PART, self.renew_names(before, reborn.is_some(), turn)).await;
        let _ = timeout(PART, self.note_to_itself()).await;
        self.choose_leader();
        told
    }

    /// The connection for mail may lead to a server that nobody writes to any more, though it lives: what this node says to
    /// itself must come back.
    async fn note_to_itself(&self) {
        let channel = self.mail_channel(self.state.lock().id);
        if self.unheard.fetch_add(1, SeqCst) >= UNHEARD {
            tracing::warn!("Redis took mail for this node and did not send it: connecting again");
            self.unheard.store(0, SeqCst);
            if let Some(pubsub) = &*self.pubsub.lock() {
                pubsub.replace(channel.as_bytes());
            }
        }
        let note = self.publish(&channel, b"");
        let _ = self.topology.call(channel.as_bytes(), OnLostReply::Retry, |_| note.clone()).await;
    }

    /// All exclusive names, and some of the shared ones; all of them after this node has become another, or was forgotten.
    async fn renew_names(&self, before: NodeId, all: bool, turn: &mut usize) {
        let leases: Vec<_> = self.state.lock().leases.values().cloned().collect();
        let (exclusive, shared): (Vec<_>, Vec<_>) =
            leases.into_iter().partition(|lease| lease.claim == Claim::Exclusive);
        let some = if all { shared.len() } else { SHARED.min(shared.len()) };
        let from = if shared.is_empty() { 0 } else { *turn % shared.len() };
        *turn += some;
        let due = exclusive.iter().chain(shared.iter().cycle().skip(from).take(some));
        futures_util::future::join_all(due.map(|lease| self.renew(lease, before))).await;
    }

    /// The whole session, for a Redis that knows nothing of it.
    async fn tell_all(&self) -> bool {
        let (id, header, rev, told) = {
            let mut state = self.state.lock();
            state.dirty.clear();
            state.shown = state.rev;
            let told: Vec<_> = state.told.iter().map(|(name, told)| (name.clone(), told.clone())).collect();
            (state.id, header(state.joined), state.rev, told)
        };
        let session = self.session_key(id);
        let written = self
            .topology
            .run(&TELL, &[session.as_bytes()], OnLostReply::Retry, |_, command| {
                command.push_int(TTL.as_millis() as u64);
                for (what, value) in [("v", &header[..]), ("r", rev.to_string().as_bytes())] {
                    command.push(what);
                    command.push(value);
                }
                for (name, (rev, info)) in &told {
                    command.push(field(name));
                    command.push(stored(*rev, info));
                }
            })
            .await;
        if written.is_err() || !self.list(id).await {
            return false;
        }
        let joined = {
            let mut state = self.state.lock();
            state.unknown = false;
            state.joined
        };
        // What has changed meanwhile.
        self.changed.notify_one();
        self.say(&News::Hello { from: id, joined, rev }).await
    }

    /// Where others look for nodes; one that was taken for dead comes back with this.
    async fn list(&self, id: NodeId) -> bool {
        let (index, joined) = (self.index_key(), self.state.lock().joined);
        let add = Command::new("ZADD").arg(&index).int(joined).arg(id.to_string());
        self.topology.call(index.as_bytes(), OnLostReply::Retry, |_| add.clone()).await.is_ok()
    }

    /// What has changed. False: Redis did not take it.
    async fn tell_changes(&self) -> bool {
        let (id, from, rev, told) = {
            let mut state = self.state.lock();
            // A session that Redis does not know is told as a whole, by the beat.
            if state.dirty.is_empty() || state.unknown || state.left {
                return true;
            }
            let State { dirty, told, rev, .. } = &mut *state;
            let told: Vec<Told> = dirty
                .drain()
                .map(|name| match told.get(&name) {
                    Some((rev, info)) => Told { name, rev: *rev, info: Some(info.clone()) },
                    None => Told { name, rev: *rev, info: None },
                })
                .collect();
            let from = state.shown;
            state.shown = state.rev;
            (state.id, from, state.rev, told)
        };
        let session = self.session_key(id);
        let mut set = Command::new("HSET").arg(&session).arg("r").int(rev);
        let mut remove = Command::new("HDEL").arg(&session).arg("-");
        for told in &told {
            match &told.info {
                Some(info) => {
                    set.push(field(&told.name));
                    set.push(stored(told.rev, info));
                }
                None => remove.push(field(&told.name)),
            }
        }
        for command in [remove, set] {
            if self.topology.call(session.as_bytes(), OnLostReply::Retry, |_| command.clone()).await.is_err() {
                self.state.lock().unknown = true;
                self.beat.notify_one();
                return false;
            }
        }
        self.say(&News::Told { from: id, after: from, rev, told }).await
    }

    pub(super) fn say_hello(&self) {
        let (id, joined, rev) = {
            let state = self.state.lock();
            (state.id, state.joined, state.shown)
        };
        if let Some(this) = self.me.upgrade().filter(|_| joined != 0) {
            tokio::spawn(async move { this.say(&News::Hello { from: id, joined, rev }).await });
        }
    }

    pub(super) async fn say(&self, news: &News) -> bool {
        let channel = self.news_channel();
        let publish = self.publish(&channel, &news.write());
        self.topology.call(channel.as_bytes(), OnLostReply::Retry, |_| publish.clone()).await.is_ok()
    }

    /// Who has been here longest speaks for all.
    pub(super) fn choose_leader(&self) {
        let state = self.state.lock();
        let mine = (state.joined, state.id);
        let first = state.others.iter().all(|(node, other)| mine < (other.joined, *node));
        self.leads.store(state.joined != 0 && first && self.clock.now() < state.until, SeqCst);
    }
}

fn field(name: &str) -> String {
    format!("n:{name}")
}

/// What a session says of its node.
fn header(joined: u64) -> Bytes {
    let mut header = BytesMut::new();
    header.put_u8(VERSION);
    header.put_u64_le(joined);
    header.freeze()
}

fn stored(rev: u64, info: &Bytes) -> Bytes {
    let mut stored = BytesMut::with_capacity(8 + info.len());
    stored.put_u64_le(rev);
    stored.put_slice(info);
    stored.freeze()
}
