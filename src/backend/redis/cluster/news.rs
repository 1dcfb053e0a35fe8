//! What nodes tell all others, and what this one makes of it.

use std::{
    collections::HashMap,
    sync::{Arc, Weak},
};

use bytes::{Buf, BufMut, Bytes, BytesMut};
use futures_util::future::join_all;
use tokio::time::timeout;

use super::{Inner, LOOK, Other, State, session::VERSION};
use crate::{
    backend::redis::client::{Command, OnLostReply, Value},
    cluster::{NodeId, RosterEntry},
};

/// `version:1 · kind:1 · from:8 · …`, little endian.
pub(super) enum News {
    /// It can be reached, now. Its session has this revision.
    Hello {
        from: NodeId,
        joined: u64,
        rev: u64,
    },
    Bye {
        from: NodeId,
    },
    /// What changed from one revision to another.
    Told {
        from: NodeId,
        after: u64,
        rev: u64,
        told: Vec<Told>,
    },
}

pub(super) struct Told {
    pub name: Arc<str>,
    pub rev: u64,
    pub info: Option<Bytes>,
}

const HELLO: u8 = 1;
const BYE: u8 = 2;
const TOLD: u8 = 3;
const NOTHING: u32 = u32::MAX;

impl News {
    pub fn write(&self) -> Bytes {
        let mut out = BytesMut::new();
        out.put_u8(VERSION);
        match self {
            News::Hello { from, joined, rev } => {
                out.put_u8(HELLO);
                for number in [from.0, *joined, *rev] {
                    out.put_u64_le(number);
                }
            }
            News::Bye { from } => {
                out.put_u8(BYE);
                out.put_u64_le(from.0);
            }
            News::Told { from, after, rev, told } => {
                out.put_u8(TOLD);
                for number in [from.0, *after, *rev] {
                    out.put_u64_le(number);
                }
                for Told { name, rev, info } in told {
                    out.put_u64_le(*rev);
                    out.put_u32_le(name.len() as u32);
                    out.put_u32_le(info.as_ref().map_or(NOTHING, |info| info.len() as u32));
                    out.put_slice(name.as_bytes());
                    out.put_slice(info.as_deref().unwrap_or_default());
                }
            }
        }
        out.freeze()
    }

    /// None: of another version, or of a kind that this one does not know. The sessions say it too.
    pub fn read(message: &Bytes) -> Option<Self> {
        let mut from = message.clone();
        if from.try_get_u8().ok()? != VERSION {
            return None;
        }
        let kind = from.try_get_u8().ok()?;
        let node = NodeId(from.try_get_u64_le().ok()?);
        match kind {
            HELLO => {
                let (joined, rev) = (from.try_get_u64_le().ok()?, from.try_get_u64_le().ok()?);
                Some(News::Hello { from: node, joined, rev })
            }
            BYE => Some(News::Bye { from: node }),
            TOLD => {
                let (after, rev) = (from.try_get_u64_le().ok()?, from.try_get_u64_le().ok()?);
                let mut told = Vec::new();
                while from.has_remaining() {
                    let rev = from.try_get_u64_le().ok()?;
                    let (name, info) = (from.try_get_u32_le().ok()?, from.try_get_u32_le().ok()?);
                    let mut take = |length: u32| {
                        let length = length as usize;
                        (from.remaining() >= length).then(|| from.split_to(length))
                    };
                    let name = take(name)?;
                    let info = if info == NOTHING { None } else { Some(take(info)?) };
                    told.push(Told { name: std::str::from_utf8(&name).ok()?.into(), rev, info });
                }
                Some(News::Told { from: node, after, rev, told })
            }
            _ => None,
        }
    }
}

/// Looks at the sessions of others, now and then and whenever there is a reason.
pub(super) async fn watch(inner: Weak<Inner>) {
    loop {
        let Some(this) = inner.upgrade() else { return };
        this.look_around().await;
        let _ = timeout(LOOK, this.look.notified()).await;
    }
}

impl Inner {
    pub(super) fn hear(&self, news: News) {
        let mut state = self.state.lock();
        match news {
            News::Hello { from, .. } | News::Bye { from } | News::Told { from, .. } if from == state.id => return,
            News::Bye { from } => self.gone(&mut state, from),
            News::Hello { from, joined, rev } => {
                let other = state.others.entry(from).or_default();
                other.joined = joined;
                other.stale |= other.rev != rev;
                if other.stale {
                    self.look.notify_one();
                }
                self.admit(&mut state, from);
            }
            News::Told { from, after, rev, told } => {
                let State { others, watchers, .. } = &mut *state;
                let other = others.entry(from).or_insert_with(|| Other { stale: true, ..Other::default() });
                if other.stale || other.rev != after {
                    if rev > other.rev {
                        other.stale = true;
                        self.look.notify_one();
                    }
                    return;
                }
                other.rev = rev;
                for Told { name, rev, info } in told {
                    match &info {
                        Some(info) => other.told.insert(name.clone(), (rev, info.clone())),
                        None => other.told.remove(&name),
                    };
                    watchers.roster_changed(&RosterEntry { name, node: from, rev, info });
                }
            }
        }
        drop(state);
        self.choose_leader();
    }

    /// A node is no more.
    fn gone(&self, state: &mut State, node: NodeId) {
        let Some(other) = state.others.remove(&node) else { return };
        self.links.remove_peer(node);
        state.watchers.member_changed(node, false);
        for (name, (rev, _)) in other.told {
            state.watchers.roster_changed(&RosterEntry { name, node, rev: rev + 1, info: None });
        }
    }

    /// Nobody can be reached.
    pub(super) fn cut_off(&self) {
        let mut state = self.state.lock();
        let nodes: Vec<NodeId> = state.others.keys().copied().collect();
        for node in nodes {
            if self.links.remove_peer(node) {
                state.watchers.member_changed(node, false);
            }
        }
        drop(state);
        self.choose_leader();
    }

    async fn look_around(&self) {
        let index = self.index_key();
        let range = Command::new("ZRANGE").arg(&index).arg("0").arg("-1");
        let Ok((value, _)) = self.topology.call(index.as_bytes(), OnLostReply::Retry, |_| range.clone()).await else {
            return;
        };
        let indexed: Vec<NodeId> = super::texts(&value).iter().filter_map(|text| NodeId::parse(text)).collect();
        let mut nodes = indexed.clone();
        {
            let state = self.state.lock();
            nodes.extend(state.others.keys());
            nodes.extend(state.strange.keys());
            nodes.sort();
            nodes.dedup();
            nodes.retain(|node| *node != state.id);
        }
        join_all(nodes.iter().map(|node| self.look_at(*node, indexed.contains(node)))).await;
        // Who sends and has no session is nobody.
        self.state.lock().strange.retain(|node, _| !nodes.contains(node));
        self.choose_leader();
    }

    async fn look_at(&self, node: NodeId, indexed: bool) {
        let session = self.session_key(node);
        let ask = Command::new("HMGET").arg(&session).arg("v").arg("r");
        let Ok((value, connection)) = self.topology.call(session.as_bytes(), OnLostReply::Retry, |_| ask.clone()).await
        else {
            return;
        };
        let parts = value.list().unwrap_or_default();
        let header = parts.first().and_then(Value::bytes);
        let Some(joined) = header.and_then(joined) else {
            if !self.topology.is_settled(session.as_bytes(), &connection) {
                // A Redis that has forgotten everything is told again by those who live.
                return;
            }
            self.gone(&mut self.state.lock(), node);
            if indexed && self.leads.load(std::sync::atomic::Ordering::SeqCst) {
                // A node that lives puts itself there again with its next beat.
                let index = self.index_key();
                let remove = Command::new("ZREM").arg(&index).arg(node.to_string());
                let _ = self.topology.call(index.as_bytes(), OnLostReply::Retry, |_| remove.clone()).await;
            }
            return;
        };
        let rev = parts.get(1).and_then(Value::int).unwrap_or_default();
        let (fresh, stale) = {
            let mut state = self.state.lock();
            let fresh = !state.others.contains_key(&node);
            let other = state.others.entry(node).or_insert_with(|| Other { stale: true, ..Other::default() });
            other.joined = joined;
            (fresh, other.stale || rev > other.rev)
        };
        if stale {
            self.read_session(node).await;
        }
        let sent = self.state.lock().strange.contains_key(&node);
        // One that nobody could reach is up again when it listens.
        if fresh || sent || !self.links.has_peer(node) && self.listens(node).await {
            self.admit(&mut self.state.lock(), node);
        }
    }

    async fn listens(&self, node: NodeId) -> bool {
        let channel = self.mail_channel(node);
        let verb = if self.topology.url.is_cluster() { "SHARDNUMSUB" } else { "NUMSUB" };
        let ask = Command::new("PUBSUB").arg(verb).arg(&channel);
        let answer = self.topology.call(channel.as_bytes(), OnLostReply::Retry, |_| ask.clone()).await;
        let Ok((value, _)) = answer else { return false };
        value.list().and_then(|list| list.get(1)).and_then(Value::int).is_some_and(|count| count > 0)
    }

    async fn read_session(&self, node: NodeId) {
        let session = self.session_key(node);
        let ask = Command::new("HGETALL").arg(&session);
        let Ok((value, _)) = self.topology.call(session.as_bytes(), OnLostReply::Retry, |_| ask.clone()).await else {
            return;
        };
        let (mut rev, mut told) = (None, HashMap::new());
        for (field, value) in pairs(&value) {
            match field.strip_prefix(b"n:") {
                Some(name) if value.len() >= 8 => {
                    let Ok(name) = std::str::from_utf8(name) else { continue };
                    let mut value = value.clone();
                    told.insert(Arc::<str>::from(name), (value.get_u64_le(), value));
                }
                Some(_) => {}
                None if field == b"r" => rev = std::str::from_utf8(value).ok().and_then(|rev| rev.parse().ok()),
                None => {}
            }
        }
        let Some(rev) = rev else { return };
        let mut state = self.state.lock();
        let State { others, watchers, .. } = &mut *state;
        let Some(other) = others.get_mut(&node) else { return };
        if rev < other.rev {
            // The news were quicker. It stays in doubt until it is looked at again.
            return;
        }
        let before = std::mem::replace(&mut other.told, told);
        (other.rev, other.stale) = (rev, false);
        for (name, (rev, info)) in &other.told {
            if before.get(name).is_none_or(|(known, _)| known != rev) {
                watchers.roster_changed(&RosterEntry { name: name.clone(), node, rev: *rev, info: Some(info.clone()) });
            }
        }
        for (name, (rev, _)) in before {
            if !other.told.contains_key(&name) {
                watchers.roster_changed(&RosterEntry { name, node, rev: rev + 1, info: None });
            }
        }
    }
}

/// When a node joined, if its version is one that this one can talk to: any so far.
fn joined(header: &Bytes) -> Option<u64> {
    let mut header = header.clone();
    header.try_get_u8().ok()?;
    header.try_get_u64_le().ok()
}

/// A map, as RESP3 or as a list.
fn pairs(value: &Value) -> Vec<(&[u8], &Bytes)> {
    let list = value.list().unwrap_or_default();
    list.chunks_exact(2).filter_map(|pair| Some((&pair[0].bytes()?[..], pair[1].bytes()?))).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn news_are_read_as_they_were_written() {
        let told =
            |name: &str, info: Option<&'static str>| Told { name: name.into(), rev: 7, info: info.map(Bytes::from) };
        let news = News::Told {
            from: NodeId(1),
            after: 5,
            rev: 7,
            told: vec![told("a", Some("{}")), told("b", None), told("", Some(""))],
        };
        let bytes = news.write();
        let Some(News::Told { from, after: 5, rev: 7, told }) = News::read(&bytes) else { panic!("it is told") };
        let read: Vec<_> = told.iter().map(|told| (&*told.name, told.rev, told.info.as_deref())).collect();
        assert_eq!(read, [("a", 7, Some(&b"{}"[..])), ("b", 7, None), ("", 7, Some(&b""[..]))]);
        assert_eq!(from, NodeId(1));
        for end in 0..bytes.len() {
            // Nothing panics; a list cut between two is a shorter list.
            let _ = News::read(&bytes.slice(..end));
        }
        let mut later = bytes.to_vec();
        later[0] = 9;
        assert!(News::read(&later.into()).is_none());
    }
}
