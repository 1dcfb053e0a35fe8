//! Nodes in one process: the one node of a weir without Redis, and the several of a test whose clock stands still.

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    sync::{
        Arc, Weak,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    time::{SystemTime, UNIX_EPOCH},
};

use bytes::Bytes;
use futures_util::future::{BoxFuture, ready};
use parking_lot::Mutex;

use super::{
    Claim, Cluster, Feed, Holding, Keeper, Lease, Mailbox, Members, MonotonicClock, NodeId, Readers, Roster, Sent,
    Tenure, Topic, Unclaimed, Weight,
    post::{Batch, Landed, Post, Received},
};

// === the one node ===

/// The cluster of a weir that is alone: every claim succeeds, and fences grow also across restarts.
pub fn alone() -> Arc<dyn Cluster> {
    let micros = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_micros() as u64;
    Arc::new(Alone { fence: AtomicU64::new(micros), post: Post::new(NodeId::random()), clock: MonotonicClock::real() })
}

struct Alone {
    fence: AtomicU64,
    post: Post,
    clock: MonotonicClock,
}

struct Nobody;

impl Cluster for Alone {
    fn members(&self) -> Members {
        Feed::new().0
    }

    fn claim(&self, name: &str, claim: Claim) -> BoxFuture<'static, Result<Lease, Unclaimed>> {
        let fence = match claim {
            Claim::Shared => 0,
            Claim::Exclusive => self.fence.fetch_add(1, Relaxed) + 1,
        };
        let tenure = Tenure::new(name.into(), claim, fence, self.clock.clone(), u64::MAX);
        Box::pin(ready(Ok(Lease::new(tenure, Arc::new(Nobody)))))
    }

    fn roster(&self, _: &str) -> Roster {
        Feed::new().0
    }

    fn send(&self, to: NodeId, topic: Topic, weight: Weight, mail: &[u8]) -> Sent {
        self.post.send(to, topic, weight, mail)
    }

    fn mailbox(&self, topic: Topic) -> Mailbox {
        self.post.mailbox(topic)
    }

    fn leads(&self) -> bool {
        true
    }

    fn is_cut_off(&self) -> bool {
        false
    }

    fn leave(&self) -> BoxFuture<'static, ()> {
        Box::pin(ready(()))
    }
}

impl Keeper for Nobody {
    fn told(&self, _: &Arc<Tenure>) {}

    fn released(&self, _: &Arc<Tenure>) {}

    fn is_alone(&self) -> bool {
        true
    }
}

// === several nodes ===

/// How long a node that is not heard of counts as up, and an exclusive name that is not renewed as held. Milliseconds.
pub const TTL: u64 = 10_000;
/// How long before that its holder stops.
pub const MARGIN: u64 = 2_000;

/// What the nodes share.
pub struct Net {
    clock: MonotonicClock,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    /// Those that run, be they cut off or stopped.
    nodes: Vec<Arc<Node>>,
    /// Those that count as up, by the order in which they joined.
    sessions: BTreeMap<u64, Session>,
    joined: u64,
    names: HashMap<Arc<str>, Name>,
    /// Names that are forgotten had no higher fence.
    fence: u64,
    /// What the first sends to the second is lost, though it seems to arrive.
    deaf: HashSet<(NodeId, NodeId)>,
}

struct Session {
    id: NodeId,
    /// None: killed.
    node: Option<Arc<Node>>,
    beat: u64,
    told: HashMap<Arc<str>, (u64, Bytes)>,
    rev: u64,
}

#[derive(Default)]
struct Name {
    fence: u64,
    /// The exclusive holder, and until when.
    exclusive: Option<(NodeId, u64)>,
    shared: HashSet<NodeId>,
}

/// One of them.
pub struct Node {
    net: Arc<Net>,
    me: Weak<Node>,
    post: Post,
    own: Mutex<Own>,
}

struct Own {
    id: NodeId,
    /// Can neither reach anybody nor be reached.
    cut: bool,
    /// Does not run.
    stopped: bool,
    leases: HashMap<Arc<str>, Arc<Tenure>>,
    /// Who is up, as far as it knows.
    up: HashSet<NodeId>,
    /// What others hold, as far as it knows.
    seen: HashMap<(Arc<str>, NodeId), (u64, Bytes)>,
    readers: Readers,
}

impl Net {
    pub fn new(clock: MonotonicClock) -> Arc<Self> {
        Arc::new(Net { clock, state: Mutex::default() })
    }

    /// A node that joins.
    pub fn join(self: &Arc<Self>) -> Arc<Node> {
        let id = NodeId::random();
        let node = Arc::new_cyclic(|me| Node {
            net: self.clone(),
            me: me.clone(),
            post: Post::new(id),
            own: Mutex::new(Own {
                id,
                cut: false,
                stopped: false,
                leases: HashMap::new(),
                up: HashSet::new(),
                seen: HashMap::new(),
                readers: Readers::default(),
            }),
        });
        let mut state = self.state.lock();
        state.enter(id, node.clone(), self.clock.now());
        state.nodes.push(node.clone());
        drop(state);
        self.look();
        node
    }

    /// Carries mail until there is none. True: there was some.
    pub fn carry(&self) -> bool {
        let mut some = false;
        loop {
            let mut more = false;
            for node in self.nodes() {
                if node.is_stopped() {
                    continue;
                }
                while let Some(batch) = node.post.next() {
                    let landed = self.deliver(&node, &batch);
                    node.post.landed(&batch, landed);
                    if landed == Landed::Unknown {
                        // It will try again: not within this moment.
                        break;
                    }
                    more = true;
                }
            }
            if !more {
                return some;
            }
            some = true;
        }
    }

    fn deliver(&self, from: &Node, batch: &Batch) -> Landed {
        let (sender, cut) = {
            let own = from.own.lock();
            (own.id, own.cut)
        };
        if cut {
            return Landed::Unknown;
        }
        let (to, deaf) = {
            let state = self.state.lock();
            let to = state.sessions.values().find(|session| session.id == batch.to);
            (to.and_then(|session| session.node.clone()), state.deaf.contains(&(sender, batch.to)))
        };
        let Some(to) = to.filter(|to| !to.own.lock().cut) else { return Landed::Nobody };
        if !deaf && to.post.receive(&batch.bytes) == Received::Stranger(sender) && to.meet(sender) {
            to.post.receive(&batch.bytes);
        }
        Landed::Taken
    }

    /// Whether what `from` sends to `to` is lost from now on.
    pub fn lose(&self, from: &Node, to: &Node, lose: bool) {
        let between = (from.id(), to.id());
        let mut state = self.state.lock();
        if lose {
            state.deaf.insert(between);
        } else {
            state.deaf.remove(&between);
        }
    }

    /// `node` ends without a word.
    pub fn kill(&self, node: &Node) {
        let id = node.id();
        let mut state = self.state.lock();
        state.nodes.retain(|other| !std::ptr::eq(&**other, node));
        if let Some(session) = state.session(id) {
            session.node = None;
        }
    }

    /// Who can says that it is up; and what is over is over.
    pub fn beat(&self) {
        let now = self.clock.now();
        for node in self.nodes() {
            node.beat(now);
        }
        let mut state = self.state.lock();
        state.sessions.retain(|_, session| now < session.beat + TTL);
        let State { sessions, names, fence, .. } = &mut *state;
        let up: HashSet<NodeId> = sessions.values().map(|session| session.id).collect();
        names.retain(|_, name| {
            name.exclusive = name.exclusive.filter(|(_, until)| now < *until);
            name.shared.retain(|node| up.contains(node));
            let held = name.exclusive.is_some() || !name.shared.is_empty();
            if !held {
                *fence = name.fence.max(*fence);
            }
            held
        });
        drop(state);
        self.look();
    }

    /// Names that somebody holds.
    pub fn names(&self) -> usize {
        self.state.lock().names.len()
    }

    fn nodes(&self) -> Vec<Arc<Node>> {
        self.state.lock().nodes.clone()
    }

    /// Everybody who can sees what there is.
    fn look(&self) {
        for node in self.nodes() {
            node.look();
        }
    }
}

impl State {
    fn enter(&mut self, id: NodeId, node: Arc<Node>, now: u64) {
        self.joined += 1;
        let session = Session { id, node: Some(node), beat: now, told: HashMap::new(), rev: 0 };
        self.sessions.insert(self.joined, session);
    }

    fn session(&mut self, id: NodeId) -> Option<&mut Session> {
        self.sessions.values_mut().find(|session| session.id == id)
    }

    fn claim(&mut self, name: &Arc<str>, claim: Claim, me: NodeId, now: u64) -> Result<u64, Unclaimed> {
        let least = self.fence;
        let held = self.names.entry(name.clone()).or_default();
        held.fence = held.fence.max(least);
        held.exclusive = held.exclusive.filter(|(_, until)| now < *until);
        let mut others: Vec<NodeId> = held.exclusive.iter().map(|(node, _)| *node).collect();
        if claim == Claim::Exclusive {
            others.extend(&held.shared);
        }
        others.retain(|other| *other != me);
        if !others.is_empty() {
            return Err(Unclaimed::Taken(others));
        }
        held.exclusive = None;
        held.shared.remove(&me);
        match claim {
            Claim::Shared => {
                held.shared.insert(me);
                Ok(0)
            }
            Claim::Exclusive => {
                held.exclusive = Some((me, now + TTL));
                held.fence += 1;
                Ok(held.fence)
            }
        }
    }
}

impl Node {
    pub fn id(&self) -> NodeId {
        self.own.lock().id
    }

    /// Whether it can neither reach anybody nor be reached, from now on.
    pub fn cut(&self, cut: bool) {
        self.own.lock().cut = cut;
        self.look();
    }

    /// Whether it does not run, from now on.
    pub fn stop(&self, stop: bool) {
        self.own.lock().stopped = stop;
    }

    pub fn is_stopped(&self) -> bool {
        self.own.lock().stopped
    }

    /// Leases that it holds.
    pub fn leases(&self) -> usize {
        self.own.lock().leases.len()
    }

    fn beat(&self, now: u64) {
        let Some(me) = self.me.upgrade() else { return };
        let mut own = self.own.lock();
        if own.cut || own.stopped {
            return;
        }
        let mut state = self.net.state.lock();
        let id = own.id;
        match state.session(id).filter(|session| now < session.beat + TTL) {
            Some(session) => {
                session.beat = now;
                // What was given back or told while it was cut off.
                session.told.retain(|name, _| own.leases.get(name).is_some_and(|tenure| tenure.info().is_some()));
                for (name, tenure) in &own.leases {
                    let Some(info) = tenure.info() else { continue };
                    if session.told.get(name).is_none_or(|(_, told)| *told != info) {
                        session.rev += 1;
                        session.told.insert(name.clone(), (session.rev, info));
                    }
                }
                for (name, held) in &mut state.names {
                    if !own.leases.contains_key(name) {
                        held.shared.remove(&id);
                        held.exclusive = held.exclusive.filter(|(node, _)| *node != id);
                    }
                }
                for tenure in own.leases.values().filter(|tenure| tenure.claim == Claim::Exclusive) {
                    let Some(name) = state.names.get_mut(&tenure.name) else { continue };
                    if name.exclusive.is_some_and(|(node, until)| node == id && now < until)
                        && name.fence == tenure.fence
                    {
                        name.exclusive = Some((id, now + TTL));
                        tenure.renew(now + TTL - MARGIN);
                    }
                }
            }
            None => {
                // Others took it for dead, and perhaps what it held: it comes back as another.
                state.sessions.retain(|_, session| session.id != id);
                own.id = NodeId::random();
                let id = own.id;
                state.enter(id, me, now);
                own.up.clear();
                self.post.reborn(id);
                let leases: Vec<_> = own.leases.values().cloned().collect();
                for tenure in leases {
                    self.claim_again(&mut state, id, &tenure, now);
                }
            }
        }
    }

    fn claim_again(&self, state: &mut State, id: NodeId, tenure: &Arc<Tenure>, now: u64) {
        let last = state.names.get(&tenure.name).map_or(0, |name| name.fence).max(state.fence);
        let claimed = match tenure.claim {
            // Somebody had it since.
            Claim::Exclusive if last > tenure.fence => false,
            claim => state.claim(&tenure.name, claim, id, now).is_ok(),
        };
        if !claimed {
            return tenure.lose();
        }
        if let Some(name) = state.names.get_mut(&tenure.name).filter(|_| tenure.claim == Claim::Exclusive) {
            name.fence = tenure.fence;
            tenure.renew(now + TTL - MARGIN);
        }
        if let (Some(info), Some(session)) = (tenure.info(), state.session(id)) {
            session.rev += 1;
            session.told.insert(tenure.name.clone(), (session.rev, info));
        }
    }

    /// Whether `other` is up; if so its mail is welcome.
    fn meet(&self, other: NodeId) -> bool {
        let up = self.net.state.lock().session(other).is_some();
        up && {
            let mut own = self.own.lock();
            self.admit(&mut own, other);
            true
        }
    }

    fn admit(&self, own: &mut Own, other: NodeId) {
        if own.id != other && self.post.admit(other) {
            own.up.insert(other);
            own.readers.member(other, true);
        }
    }

    fn look(&self) {
        let mut own = self.own.lock();
        if own.cut || own.stopped {
            return;
        }
        let state = self.net.state.lock();
        let others: Vec<&Session> = state.sessions.values().filter(|session| session.id != own.id).collect();
        for other in &others {
            if other.node.as_ref().is_some_and(|node| !std::ptr::eq(&**node, self) && !node.is_cut()) {
                self.admit(&mut own, other.id);
            }
        }
        let gone: Vec<NodeId> =
            own.up.iter().filter(|id| others.iter().all(|session| session.id != **id)).copied().collect();
        for node in gone {
            own.up.remove(&node);
            self.post.expel(node);
            own.readers.member(node, false);
        }
        let now: HashMap<(Arc<str>, NodeId), (u64, Bytes)> = others
            .iter()
            .flat_map(|session| session.told.iter().map(|(name, told)| ((name.clone(), session.id), told.clone())))
            .collect();
        let before = std::mem::replace(&mut own.seen, now);
        let changed: Vec<_> = own.seen.iter().filter(|(key, told)| before.get(key) != Some(told)).collect();
        let mut news: Vec<Holding> = changed
            .into_iter()
            .map(|((name, node), (rev, info))| Holding {
                name: name.clone(),
                node: *node,
                rev: *rev,
                info: Some(info.clone()),
            })
            .collect();
        let over = before.into_iter().filter(|(key, _)| !own.seen.contains_key(key));
        news.extend(over.map(|((name, node), (rev, _))| Holding { name, node, rev: rev + 1, info: None }));
        for holding in news {
            own.readers.holding(&holding);
        }
    }

    fn is_cut(&self) -> bool {
        // Not of the node that looks: its lock is held.
        self.own.try_lock().is_some_and(|own| own.cut)
    }
}

impl Cluster for Node {
    fn members(&self) -> Members {
        let Own { readers, up, .. } = &mut *self.own.lock();
        readers.members(up.iter().copied())
    }

    fn claim(&self, name: &str, claim: Claim) -> BoxFuture<'static, Result<Lease, Unclaimed>> {
        let claimed = (|| {
            let mut own = self.own.lock();
            if own.cut || own.stopped {
                return Err(Unclaimed::Away);
            }
            let (name, now): (Arc<str>, u64) = (name.into(), self.net.clock.now());
            let fence = self.net.state.lock().claim(&name, claim, own.id, now)?;
            let until = if claim == Claim::Exclusive { now + TTL - MARGIN } else { u64::MAX };
            let tenure = Tenure::new(name.clone(), claim, fence, self.net.clock.clone(), until);
            own.leases.insert(name, tenure.clone());
            let keeper = self.me.upgrade().ok_or(Unclaimed::Away)?;
            Ok(Lease::new(tenure, keeper))
        })();
        Box::pin(ready(claimed))
    }

    fn roster(&self, prefix: &str) -> Roster {
        let Own { readers, seen, .. } = &mut *self.own.lock();
        let known = seen.iter().map(|((name, node), (rev, info))| Holding {
            name: name.clone(),
            node: *node,
            rev: *rev,
            info: Some(info.clone()),
        });
        readers.roster(prefix, known)
    }

    fn send(&self, to: NodeId, topic: Topic, weight: Weight, mail: &[u8]) -> Sent {
        self.post.send(to, topic, weight, mail)
    }

    fn mailbox(&self, topic: Topic) -> Mailbox {
        self.post.mailbox(topic)
    }

    fn leads(&self) -> bool {
        let id = self.id();
        self.net.state.lock().sessions.values().next().is_some_and(|session| session.id == id)
    }

    fn is_cut_off(&self) -> bool {
        self.own.lock().cut
    }

    fn leave(&self) -> BoxFuture<'static, ()> {
        let id = self.id();
        {
            let mut state = self.net.state.lock();
            state.sessions.retain(|_, session| session.id != id);
            state.nodes.retain(|other| !std::ptr::eq(&**other, self));
            state.names.values_mut().for_each(|name| {
                name.shared.remove(&id);
                name.exclusive = name.exclusive.filter(|(node, _)| *node != id);
            });
        }
        self.net.look();
        Box::pin(ready(()))
    }
}

impl Keeper for Node {
    fn told(&self, tenure: &Arc<Tenure>) {
        {
            let own = self.own.lock();
            let mut state = self.net.state.lock();
            let is_mine = own.leases.get(&tenure.name).is_some_and(|mine| Arc::ptr_eq(mine, tenure));
            let Some(session) = state.session(own.id).filter(|_| is_mine && !own.cut) else { return };
            session.rev += 1;
            match tenure.info() {
                Some(info) => session.told.insert(tenure.name.clone(), (session.rev, info)),
                None => session.told.remove(&tenure.name),
            };
        }
        self.net.look();
    }

    fn released(&self, tenure: &Arc<Tenure>) {
        {
            let mut own = self.own.lock();
            if !own.leases.get(&tenure.name).is_some_and(|mine| Arc::ptr_eq(mine, tenure)) {
                return;
            }
            own.leases.remove(&tenure.name);
            let id = own.id;
            if own.cut {
                return;
            }
            let state = &mut *self.net.state.lock();
            if let Some(session) = state.session(id) {
                session.told.remove(&tenure.name);
            }
            if let Some(name) = state.names.get_mut(&tenure.name) {
                name.shared.remove(&id);
                name.exclusive = name.exclusive.filter(|(node, _)| *node != id);
                if name.shared.is_empty() && name.exclusive.is_none() {
                    state.fence = state.fence.max(name.fence);
                    state.names.remove(&tenure.name);
                }
            }
        }
        self.net.look();
    }
}
