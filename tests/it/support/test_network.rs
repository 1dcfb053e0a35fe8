//! [`TestNetwork`]: several nodes in one process, under a clock that only the test advances.

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    sync::{Arc, Weak},
    task::{Context, Poll},
};

use bytes::Bytes;
use futures_util::future::{BoxFuture, ready};
use parking_lot::Mutex;

use weir::cluster::{
    BatchOutcome, Claim, ClaimError, Cluster, ClusterMembers, Inbox, Lease, LeaseBackend, LeaseState, MessageBatch,
    MessageKind, MonotonicClock, NodeId, PeerLinks, Priority, ReceiveOutcome, Roster, RosterEntry, SendOutcome,
    Watchers,
};

/// Lifetime of a membership and of an exclusive name without renewal, in milliseconds.
pub const TTL: u64 = 10_000;
/// A lease becomes invalid this long before its exclusive name expires, in milliseconds.
const MARGIN: u64 = 2_000;

/// The state that the nodes share, as a backend would store it, and the way between them.
pub struct TestNetwork {
    clock: MonotonicClock,
    state: Mutex<NetworkState>,
}

#[derive(Default)]
struct NetworkState {
    /// All nodes that were not killed, including those that are cut off or stopped.
    nodes: Vec<Arc<TestNode>>,
    /// The members, in the order in which they joined.
    memberships: BTreeMap<u64, Membership>,
    joined: u64,
    names: HashMap<Arc<str>, NameHolders>,
    /// The highest fencing token of a name without a holder.
    fence: u64,
    /// Batches from the first node to the second are lost, though the sender believes that they arrive.
    lossy: HashSet<(NodeId, NodeId)>,
}

struct Membership {
    id: NodeId,
    /// `None`: killed.
    node: Option<Arc<TestNode>>,
    beat: u64,
    published: HashMap<Arc<str>, (u64, Bytes)>,
    rev: u64,
}

#[derive(Default)]
struct NameHolders {
    fence: u64,
    /// The exclusive holder, and when its claim expires.
    exclusive: Option<(NodeId, u64)>,
    shared: HashSet<NodeId>,
}

/// A node of a [`TestNetwork`].
pub struct TestNode {
    net: Arc<TestNetwork>,
    me: Weak<TestNode>,
    links: PeerLinks,
    own: Mutex<TestNodeState>,
}

struct TestNodeState {
    id: NodeId,
    /// Can neither reach another node nor be reached.
    cut: bool,
    /// Does nothing, like a suspended process.
    stopped: bool,
    leases: HashMap<Arc<str>, Arc<LeaseState>>,
    /// The other members, as far as this node knows.
    up: HashSet<NodeId>,
    /// The roster entries of other nodes, as far as this node knows.
    seen: HashMap<(Arc<str>, NodeId), (u64, Bytes)>,
    watchers: Watchers,
}

impl TestNetwork {
    pub fn new(clock: MonotonicClock) -> Arc<Self> {
        Arc::new(TestNetwork { clock, state: Mutex::default() })
    }

    /// Adds a node.
    pub fn join(self: &Arc<Self>) -> Arc<TestNode> {
        let id = NodeId::random();
        let node = Arc::new_cyclic(|me| TestNode {
            net: self.clone(),
            me: me.clone(),
            links: PeerLinks::new(id),
            own: Mutex::new(TestNodeState {
                id,
                cut: false,
                stopped: false,
                leases: HashMap::new(),
                up: HashSet::new(),
                seen: HashMap::new(),
                watchers: Watchers::default(),
            }),
        });
        let mut state = self.state.lock();
        state.join(id, node.clone(), self.clock.now());
        state.nodes.push(node.clone());
        drop(state);
        self.sync();
        node
    }

    /// Delivers messages until none is left. True: there were some.
    pub fn carry(&self) -> bool {
        let mut some = false;
        loop {
            let mut more = false;
            for node in self.nodes() {
                if node.is_stopped() {
                    continue;
                }
                while let Some(batch) = node.links.next_batch() {
                    let outcome = self.deliver(&node, &batch);
                    node.links.complete(&batch, outcome);
                    if outcome == BatchOutcome::Unknown {
                        // The broken link has a batch again: it would repeat without end.
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

    fn deliver(&self, from: &TestNode, batch: &MessageBatch) -> BatchOutcome {
        let (sender, cut) = {
            let own = from.own.lock();
            (own.id, own.cut)
        };
        if cut {
            return BatchOutcome::Unknown;
        }
        let (to, lossy) = {
            let state = self.state.lock();
            let to = state.memberships.values().find(|membership| membership.id == batch.to);
            (to.and_then(|membership| membership.node.clone()), state.lossy.contains(&(sender, batch.to)))
        };
        let Some(to) = to.filter(|to| !to.own.lock().cut) else { return BatchOutcome::Undelivered };
        if !lossy && to.links.receive(&batch.bytes) == ReceiveOutcome::UnknownSender(sender) && to.add_member(sender) {
            to.links.receive(&batch.bytes);
        }
        BatchOutcome::Delivered
    }

    /// Sets whether messages from `from` to `to` are lost.
    pub fn set_lossy(&self, from: &TestNode, to: &TestNode, is_lossy: bool) {
        let between = (from.id(), to.id());
        let mut state = self.state.lock();
        if is_lossy {
            state.lossy.insert(between);
        } else {
            state.lossy.remove(&between);
        }
    }

    /// Ends `node` without notice to the others.
    pub fn kill(&self, node: &TestNode) {
        let id = node.id();
        let mut state = self.state.lock();
        state.nodes.retain(|other| !std::ptr::eq(&**other, node));
        if let Some(membership) = state.membership(id) {
            membership.node = None;
        }
    }

    /// Renews the membership of every node that can, and ends what has expired.
    pub fn beat(&self) {
        let now = self.clock.now();
        for node in self.nodes() {
            node.beat(now);
        }
        let mut state = self.state.lock();
        state.memberships.retain(|_, membership| now < membership.beat + TTL);
        let NetworkState { memberships, names, fence, .. } = &mut *state;
        let up: HashSet<NodeId> = memberships.values().map(|membership| membership.id).collect();
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
        self.sync();
    }

    /// Number of names that are held.
    pub fn names(&self) -> usize {
        self.state.lock().names.len()
    }

    fn nodes(&self) -> Vec<Arc<TestNode>> {
        self.state.lock().nodes.clone()
    }

    /// Lets every node that can read the shared state.
    fn sync(&self) {
        for node in self.nodes() {
            node.sync();
        }
    }
}

impl NetworkState {
    fn join(&mut self, id: NodeId, node: Arc<TestNode>, now: u64) {
        self.joined += 1;
        let membership = Membership { id, node: Some(node), beat: now, published: HashMap::new(), rev: 0 };
        self.memberships.insert(self.joined, membership);
    }

    fn membership(&mut self, id: NodeId) -> Option<&mut Membership> {
        self.memberships.values_mut().find(|membership| membership.id == id)
    }

    fn claim(&mut self, name: &Arc<str>, claim: Claim, me: NodeId, now: u64) -> Result<u64, ClaimError> {
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
            return Err(ClaimError::Held(others));
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

impl TestNode {
    pub fn id(&self) -> NodeId {
        self.own.lock().id
    }

    /// Sets whether the node is cut off from all others.
    pub fn cut(&self, cut: bool) {
        self.own.lock().cut = cut;
        self.sync();
    }

    /// Sets whether the node is suspended.
    pub fn stop(&self, stop: bool) {
        self.own.lock().stopped = stop;
    }

    pub fn is_stopped(&self) -> bool {
        self.own.lock().stopped
    }

    /// Number of leases that this node holds.
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
        match state.membership(id).filter(|membership| now < membership.beat + TTL) {
            Some(membership) => {
                membership.beat = now;
                // Apply what was released or published while the node was cut off.
                membership.published.retain(|name, _| own.leases.get(name).is_some_and(|lease| lease.info().is_some()));
                for (name, lease) in &own.leases {
                    let Some(info) = lease.info() else { continue };
                    if membership.published.get(name).is_none_or(|(_, published)| *published != info) {
                        membership.rev += 1;
                        membership.published.insert(name.clone(), (membership.rev, info));
                    }
                }
                for (name, held) in &mut state.names {
                    if !own.leases.contains_key(name) {
                        held.shared.remove(&id);
                        held.exclusive = held.exclusive.filter(|(node, _)| *node != id);
                    }
                }
                for lease in own.leases.values().filter(|lease| lease.claim == Claim::Exclusive) {
                    let Some(name) = state.names.get_mut(&lease.name) else { continue };
                    if name.exclusive.is_some_and(|(node, until)| node == id && now < until)
                        && name.fence == lease.fence
                    {
                        name.exclusive = Some((id, now + TTL));
                        lease.renew(now + TTL - MARGIN);
                    }
                }
            }
            None => {
                // The membership has expired, and other nodes may have claimed the names: join again under a new id.
                state.memberships.retain(|_, membership| membership.id != id);
                own.id = NodeId::random();
                let id = own.id;
                state.join(id, me, now);
                own.up.clear();
                self.links.reset(id);
                let leases: Vec<_> = own.leases.values().cloned().collect();
                for lease in leases {
                    self.reclaim(&mut state, id, &lease, now);
                }
            }
        }
    }

    fn reclaim(&self, state: &mut NetworkState, id: NodeId, lease: &Arc<LeaseState>, now: u64) {
        let last = state.names.get(&lease.name).map_or(0, |name| name.fence).max(state.fence);
        let claimed = match lease.claim {
            // Another node has held the name since.
            Claim::Exclusive if last > lease.fence => false,
            claim => state.claim(&lease.name, claim, id, now).is_ok(),
        };
        if !claimed {
            return lease.mark_lost();
        }
        if let Some(name) = state.names.get_mut(&lease.name).filter(|_| lease.claim == Claim::Exclusive) {
            name.fence = lease.fence;
            lease.renew(now + TTL - MARGIN);
        }
        if let (Some(info), Some(membership)) = (lease.info(), state.membership(id)) {
            membership.rev += 1;
            membership.published.insert(lease.name.clone(), (membership.rev, info));
        }
    }

    /// Adds `other` as a peer if it is a member.
    fn add_member(&self, other: NodeId) -> bool {
        let up = self.net.state.lock().membership(other).is_some();
        up && {
            let mut own = self.own.lock();
            self.add_peer(&mut own, other);
            true
        }
    }

    fn add_peer(&self, own: &mut TestNodeState, other: NodeId) {
        if own.id != other && self.links.add_peer(other) {
            own.up.insert(other);
            own.watchers.member_changed(other, true);
        }
    }

    fn sync(&self) {
        let mut own = self.own.lock();
        if own.cut || own.stopped {
            return;
        }
        let state = self.net.state.lock();
        let others: Vec<&Membership> =
            state.memberships.values().filter(|membership| membership.id != own.id).collect();
        for other in &others {
            if other.node.as_ref().is_some_and(|node| !std::ptr::eq(&**node, self) && !node.is_cut()) {
                self.add_peer(&mut own, other.id);
            }
        }
        let gone: Vec<NodeId> =
            own.up.iter().filter(|id| others.iter().all(|membership| membership.id != **id)).copied().collect();
        for node in gone {
            own.up.remove(&node);
            self.links.remove_peer(node);
            own.watchers.member_changed(node, false);
        }
        let now: HashMap<(Arc<str>, NodeId), (u64, Bytes)> = others
            .iter()
            .flat_map(|membership| {
                membership.published.iter().map(|(name, published)| ((name.clone(), membership.id), published.clone()))
            })
            .collect();
        let before = std::mem::replace(&mut own.seen, now);
        let changed: Vec<_> = own.seen.iter().filter(|(key, published)| before.get(key) != Some(published)).collect();
        let mut news: Vec<RosterEntry> = changed
            .into_iter()
            .map(|((name, node), (rev, info))| RosterEntry {
                name: name.clone(),
                node: *node,
                rev: *rev,
                info: Some(info.clone()),
            })
            .collect();
        let over = before.into_iter().filter(|(key, _)| !own.seen.contains_key(key));
        news.extend(over.map(|((name, node), (rev, _))| RosterEntry { name, node, rev: rev + 1, info: None }));
        for holding in news {
            own.watchers.roster_changed(&holding);
        }
    }

    fn is_cut(&self) -> bool {
        // A node that is locked is the one that calls this: it is not cut off.
        self.own.try_lock().is_some_and(|own| own.cut)
    }
}

impl Cluster for TestNode {
    fn members(&self) -> ClusterMembers {
        let TestNodeState { watchers, up, .. } = &mut *self.own.lock();
        watchers.members(up.iter().copied())
    }

    fn claim(&self, name: &str, claim: Claim) -> BoxFuture<'static, Result<Lease, ClaimError>> {
        let claimed = (|| {
            let mut own = self.own.lock();
            if own.cut || own.stopped {
                return Err(ClaimError::Unreachable);
            }
            let (name, now): (Arc<str>, u64) = (name.into(), self.net.clock.now());
            let fence = self.net.state.lock().claim(&name, claim, own.id, now)?;
            let until = if claim == Claim::Exclusive { now + TTL - MARGIN } else { u64::MAX };
            let lease = LeaseState::new(name.clone(), claim, fence, self.net.clock.clone(), until);
            own.leases.insert(name, lease.clone());
            let backend = self.me.upgrade().ok_or(ClaimError::Unreachable)?;
            Ok(Lease::new(lease, backend))
        })();
        Box::pin(ready(claimed))
    }

    fn roster(&self, prefix: &str) -> Roster {
        let TestNodeState { watchers, seen, .. } = &mut *self.own.lock();
        let known = seen.iter().map(|((name, node), (rev, info))| RosterEntry {
            name: name.clone(),
            node: *node,
            rev: *rev,
            info: Some(info.clone()),
        });
        watchers.roster(prefix, known)
    }

    fn send(&self, to: NodeId, kind: MessageKind, priority: Priority, message: &[u8]) -> SendOutcome {
        self.links.send(to, kind, priority, message)
    }

    fn poll_room(&self, node: NodeId, cx: &mut Context<'_>) -> Poll<()> {
        self.links.poll_room(node, cx)
    }

    fn inbox(&self, kind: MessageKind) -> Inbox {
        self.links.inbox(kind)
    }

    fn is_leader(&self) -> bool {
        let id = self.id();
        self.net.state.lock().memberships.values().next().is_some_and(|membership| membership.id == id)
    }

    fn is_isolated(&self) -> bool {
        self.own.lock().cut
    }

    fn leave(&self) -> BoxFuture<'static, ()> {
        let id = self.id();
        {
            let mut state = self.net.state.lock();
            state.memberships.retain(|_, membership| membership.id != id);
            state.nodes.retain(|other| !std::ptr::eq(&**other, self));
            state.names.values_mut().for_each(|name| {
                name.shared.remove(&id);
                name.exclusive = name.exclusive.filter(|(node, _)| *node != id);
            });
        }
        self.net.sync();
        Box::pin(ready(()))
    }
}

impl LeaseBackend for TestNode {
    fn info_changed(&self, lease: &Arc<LeaseState>) {
        {
            let own = self.own.lock();
            let mut state = self.net.state.lock();
            let is_mine = own.leases.get(&lease.name).is_some_and(|mine| Arc::ptr_eq(mine, lease));
            let Some(membership) = state.membership(own.id).filter(|_| is_mine && !own.cut) else { return };
            membership.rev += 1;
            match lease.info() {
                Some(info) => membership.published.insert(lease.name.clone(), (membership.rev, info)),
                None => membership.published.remove(&lease.name),
            };
        }
        self.net.sync();
    }

    fn release(&self, lease: &Arc<LeaseState>) {
        {
            let mut own = self.own.lock();
            if !own.leases.get(&lease.name).is_some_and(|mine| Arc::ptr_eq(mine, lease)) {
                return;
            }
            own.leases.remove(&lease.name);
            let id = own.id;
            if own.cut {
                return;
            }
            let state = &mut *self.net.state.lock();
            if let Some(membership) = state.membership(id) {
                membership.published.remove(&lease.name);
            }
            if let Some(name) = state.names.get_mut(&lease.name) {
                name.shared.remove(&id);
                name.exclusive = name.exclusive.filter(|(node, _)| *node != id);
                if name.shared.is_empty() && name.exclusive.is_none() {
                    state.fence = state.fence.max(name.fence);
                    state.names.remove(&lease.name);
                }
            }
        }
        self.net.sync();
    }
}
