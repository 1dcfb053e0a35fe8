//! RedisCluster on one Redis: sessions, names and mail.
//!
//! ```text
//! weir:{nodes}              ZSET   nodes by the time at which they joined; only where to look
//! weir:{node:ID}            HASH   a session, 10 s from each beat: what the node is, and tells of its names
//! weir:{name:N}             HASH   f: the last fence of the name · a node: it holds the name, shared
//! weir:{name:N}:x           STRING the node that holds it exclusively, 10 s from each renewal
//! weir:{nodes}:news         channel   hello, goodbye, and what changes in sessions
//! weir:{node:ID}:mail       channel   batches for a node
//! ```
//!
//! A node reads all sessions when it joins and after every break of its news, then follows the news; each second it compares
//! their revisions with what it knows. No decision compares the clocks of two machines: Redis lets keys expire, and a node
//! measures with its own clock since when it was not heard.

mod names;
mod news;
mod session;

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    sync::{
        Arc, Weak,
        atomic::{AtomicBool, AtomicU32, Ordering::SeqCst},
    },
    time::Duration,
};

use bytes::Bytes;
use futures_util::future::BoxFuture;
use parking_lot::Mutex;
use tokio::{sync::Notify, task::JoinHandle, time::sleep};

use self::news::News;
use super::store::keys::escape;
use crate::backend::redis::client::{
    Command, CommandError, OnLostReply, PubSub, PubSubHandler, RedisConnection, Topology, Value,
};
use crate::{
    cluster::{
        Batch, BatchOutcome, Claim, ClaimError, Cluster, Inbox, Lease, LeaseBackend, LeaseState, Members, MessageKind,
        MonotonicClock, NodeId, PeerLinks, Priority, ReceiveOutcome, Roster, RosterEntry, SendOutcome, Watchers,
    },
    metrics::RedisConnectionKind,
};

/// How long a node that is not heard of counts as up, and an exclusive name that is not renewed as held.
const TTL: Duration = Duration::from_secs(10);
/// How long before that its holder stops.
const MARGIN: Duration = Duration::from_secs(2);
const BEAT: Duration = Duration::from_secs(3);
/// How often sessions of others are looked at.
const LOOK: Duration = Duration::from_secs(1);
/// A mail connection that broke is back within this: until then nobody may be there to take a batch, though the node lives.
const RETURN: Duration = Duration::from_millis(50);
const RETURNS: usize = 3;
/// Batches of one node that is not known yet, while it is looked for.
const STRANGE: usize = 256;

/// This node among the others.
pub struct RedisCluster(Arc<Inner>);

struct Inner {
    me: Weak<Inner>,
    prefix: Box<str>,
    topology: Arc<Topology>,
    clock: MonotonicClock,
    links: PeerLinks,
    state: Mutex<State>,
    /// Something in the session has changed.
    changed: Notify,
    /// The sessions of others have to be looked at.
    look: Notify,
    /// Redis may not know this node.
    beat: Notify,
    /// Notes to itself that this node has not heard.
    unheard: AtomicU32,
    /// A name was given back.
    freed: Notify,
    leads: AtomicBool,
    pubsub: Mutex<Option<Arc<PubSub>>>,
    tasks: Mutex<Vec<JoinHandle<()>>>,
}

struct State {
    id: NodeId,
    /// Microseconds of Redis; 0: never heard by it.
    joined: u64,
    /// By the clock's milliseconds: until then nobody takes this node for dead.
    until: u64,
    left: bool,
    leases: HashMap<Arc<str>, Arc<LeaseState>>,
    /// Names that are being given back, and how often.
    freeing: HashMap<Arc<str>, usize>,
    /// What this node tells, of each name with its revision.
    told: HashMap<Arc<str>, (u64, Bytes)>,
    rev: u64,
    /// The revision that Redis was told last.
    shown: u64,
    /// Names of which Redis does not know yet what is told.
    dirty: HashSet<Arc<str>>,
    /// Redis knows nothing of the session.
    unknown: bool,
    others: BTreeMap<NodeId, Other>,
    /// Batches of nodes that are not known yet.
    strange: HashMap<NodeId, Vec<Bytes>>,
    watchers: Watchers,
}

/// Another node.
#[derive(Default)]
struct Other {
    joined: u64,
    rev: u64,
    told: HashMap<Arc<str>, (u64, Bytes)>,
    /// Its news have a hole: the session has to be read.
    stale: bool,
}

impl RedisCluster {
    /// Joins. Needs a tokio runtime. Whether Redis can be reached shows later.
    pub fn start(topology: Arc<Topology>, prefix: &str) -> Arc<Self> {
        let id = NodeId::random();
        let inner = Arc::new_cyclic(|me| Inner {
            me: me.clone(),
            prefix: prefix.into(),
            topology: topology.clone(),
            clock: MonotonicClock::real(),
            links: PeerLinks::new(id),
            state: Mutex::new(State {
                id,
                joined: 0,
                until: 0,
                left: false,
                leases: HashMap::new(),
                freeing: HashMap::new(),
                told: HashMap::new(),
                rev: 0,
                shown: 0,
                dirty: HashSet::new(),
                unknown: true,
                others: BTreeMap::new(),
                strange: HashMap::new(),
                watchers: Watchers::default(),
            }),
            changed: Notify::new(),
            look: Notify::new(),
            beat: Notify::new(),
            unheard: AtomicU32::new(0),
            freed: Notify::new(),
            leads: AtomicBool::new(false),
            pubsub: Mutex::default(),
            tasks: Mutex::default(),
        });
        let pubsub = PubSub::start(topology, RedisConnectionKind::Mail, Arc::new(Ears(Arc::downgrade(&inner))));
        pubsub.subscribe(inner.mail_channel(id).into());
        pubsub.subscribe(inner.news_channel().into());
        *inner.pubsub.lock() = Some(pubsub);
        inner.tasks.lock().extend([
            tokio::spawn(session::keep(Arc::downgrade(&inner))),
            tokio::spawn(session::tell(Arc::downgrade(&inner))),
            tokio::spawn(news::watch(Arc::downgrade(&inner))),
            tokio::spawn(carry(Arc::downgrade(&inner))),
        ]);
        Arc::new(RedisCluster(inner))
    }

    /// Who it is now: another when it was away for too long.
    pub fn id(&self) -> NodeId {
        self.0.state.lock().id
    }

    /// Other nodes that are up.
    pub fn others(&self) -> Vec<NodeId> {
        self.0.state.lock().others.keys().copied().collect()
    }

    /// Leases held, and being given back: for tests that count what is left.
    pub fn held(&self) -> usize {
        let state = self.0.state.lock();
        state.leases.len() + state.freeing.len()
    }
}

impl Drop for RedisCluster {
    fn drop(&mut self) {
        self.0.tasks.lock().drain(..).for_each(|task| task.abort());
        *self.0.pubsub.lock() = None;
    }
}

// === keys ===

impl Inner {
    fn session_key(&self, node: NodeId) -> String {
        format!("{}{{node:{node}}}", self.prefix)
    }

    fn mail_channel(&self, node: NodeId) -> String {
        format!("{}{{node:{node}}}:mail", self.prefix)
    }

    fn index_key(&self) -> String {
        format!("{}{{nodes}}", self.prefix)
    }

    fn news_channel(&self) -> String {
        format!("{}{{nodes}}:news", self.prefix)
    }

    /// Holders of a name, and its exclusive holder.
    fn name_keys(&self, name: &str) -> (String, String) {
        let mut holders = format!("{}{{name:", self.prefix);
        escape(name, &mut holders);
        holders.push('}');
        let exclusive = format!("{holders}:x");
        (holders, exclusive)
    }

    fn publish(&self, channel: &str, message: &[u8]) -> Command {
        Command::new(self.topology.publish_verb()).arg(channel).arg(message)
    }
}

// === mail ===

/// Sends what is to be sent, one batch at a time to each node.
async fn carry(inner: Weak<Inner>) {
    loop {
        let Some(this) = inner.upgrade() else { return };
        while let Some(batch) = this.links.next_batch() {
            tokio::spawn(deliver(this.clone(), batch));
        }
        this.links.batch_ready().await;
    }
}

async fn deliver(inner: Arc<Inner>, batch: Batch) {
    let channel = inner.mail_channel(batch.to);
    let publish = inner.publish(&channel, &batch.bytes);
    // The answer to one try was lost: somebody may have got it then, whatever the next one says.
    let (mut absent, mut perhaps) = (0, false);
    let surely_not = |perhaps| if perhaps { BatchOutcome::Unknown } else { BatchOutcome::Undelivered };
    let outcome = loop {
        // Whoever gets it twice drops the second.
        let go = |_: &RedisConnection| inner.links.begin_send(&batch).then(|| publish.clone());
        let sent = inner.topology.call_if(channel.as_bytes(), OnLostReply::Report, go).await;
        perhaps |= matches!(sent, Err(CommandError::Unconfirmed));
        match sent {
            Ok((value, _)) if value.int().is_some_and(|takers| takers > 0) => break BatchOutcome::Delivered,
            // While calls come back their nodes find others, so it is worth being quick, but not with one that lives.
            Ok((_, connection)) if absent >= RETURNS && inner.topology.is_settled(channel.as_bytes(), &connection) => {
                break surely_not(perhaps);
            }
            // The session says when it is too late to go on.
            Ok(_) | Err(CommandError::NotExecuted(_) | CommandError::Unconfirmed)
                if inner.is_heard() && inner.links.has_peer(batch.to) => {}
            _ => break surely_not(perhaps),
        }
        if !perhaps {
            inner.links.not_sent(&batch);
        }
        if sent.is_ok() {
            absent += 1;
            sleep(RETURN).await;
        }
    };
    inner.links.complete(&batch, outcome);
    if outcome == BatchOutcome::Undelivered {
        inner.look.notify_one();
    }
}

/// What comes over the mail connection.
struct Ears(Weak<Inner>);

impl PubSubHandler for Ears {
    fn heard(&self, channel: &Bytes, message: Bytes) {
        let Some(inner) = self.0.upgrade() else { return };
        if channel.ends_with(b":news") {
            if let Some(news) = News::read(&message) {
                inner.hear(news);
            }
        } else if message.is_empty() {
            inner.unheard.store(0, SeqCst);
        } else {
            inner.receive(message);
        }
    }

    fn subscribed(&self, channel: &Bytes) {
        let Some(inner) = self.0.upgrade() else { return };
        if channel.ends_with(b":news") {
            // Some may have been missed.
            inner.state.lock().others.values_mut().for_each(|other| other.stale = true);
            inner.look.notify_one();
        } else {
            inner.unheard.store(0, SeqCst);
            // Others may have found nobody here, and a Redis that was away may have forgotten this node.
            inner.say_hello();
            inner.beat.notify_one();
        }
    }
}

impl Inner {
    fn receive(&self, batch: Bytes) {
        let mut state = self.state.lock();
        if let ReceiveOutcome::UnknownSender(node) = self.links.receive(&batch) {
            // It may be new, and its news still under way.
            let most = state.strange.len() < STRANGE;
            let batches = state.strange.entry(node);
            if most || matches!(batches, std::collections::hash_map::Entry::Occupied(_)) {
                let batches = batches.or_default();
                if batches.len() < STRANGE {
                    batches.push(batch);
                }
            }
            self.look.notify_one();
        }
    }

    /// `node` is up: its mail is welcome.
    fn admit(&self, state: &mut State, node: NodeId) {
        if node == state.id || !self.links.add_peer(node) {
            return;
        }
        state.watchers.member_changed(node, true);
        for batch in state.strange.remove(&node).into_iter().flatten() {
            self.links.receive(&batch);
        }
    }

    /// Whether nobody can take this node for dead.
    fn is_heard(&self) -> bool {
        let state = self.state.lock();
        !state.left && self.clock.now() < state.until
    }
}

// === the contract ===

impl Cluster for RedisCluster {
    fn members(&self) -> Members {
        let State { watchers, others, .. } = &mut *self.0.state.lock();
        watchers.members(others.keys().copied().filter(|node| self.0.links.has_peer(*node)))
    }

    fn claim(&self, name: &str, claim: Claim) -> BoxFuture<'static, Result<Lease, ClaimError>> {
        Box::pin(self.0.clone().claim(name.into(), claim))
    }

    fn roster(&self, prefix: &str) -> Roster {
        let State { watchers, others, .. } = &mut *self.0.state.lock();
        let known = others.iter().flat_map(|(node, other)| {
            other.told.iter().map(|(name, (rev, info))| RosterEntry {
                name: name.clone(),
                node: *node,
                rev: *rev,
                info: Some(info.clone()),
            })
        });
        watchers.roster(prefix, known)
    }

    fn send(&self, to: NodeId, kind: MessageKind, priority: Priority, message: &[u8]) -> SendOutcome {
        self.0.links.send(to, kind, priority, message)
    }

    fn inbox(&self, kind: MessageKind) -> Inbox {
        self.0.links.inbox(kind)
    }

    fn is_leader(&self) -> bool {
        self.0.leads.load(SeqCst) && self.0.is_heard()
    }

    fn is_isolated(&self) -> bool {
        !self.0.is_heard()
    }

    fn leave(&self) -> BoxFuture<'static, ()> {
        Box::pin(session::leave(self.0.clone()))
    }
}

impl LeaseBackend for Inner {
    fn info_changed(&self, lease: &Arc<LeaseState>) {
        let mut state = self.state.lock();
        if state.leases.get(&lease.name).is_some_and(|mine| Arc::ptr_eq(mine, lease)) {
            state.tell(&lease.name, lease.info());
            self.changed.notify_one();
        }
    }

    fn release(&self, lease: &Arc<LeaseState>) {
        let mut state = self.state.lock();
        if !state.leases.get(&lease.name).is_some_and(|mine| Arc::ptr_eq(mine, lease)) {
            return;
        }
        state.leases.remove(&lease.name);
        state.tell(&lease.name, None);
        self.changed.notify_one();
        if !lease.is_lost() && !state.left {
            self.set_free(&mut state, &lease.name, lease.fence);
        }
    }
}

impl State {
    fn tell(&mut self, name: &Arc<str>, info: Option<Bytes>) {
        self.rev += 1;
        match info {
            Some(info) => self.told.insert(name.clone(), (self.rev, info)),
            None => self.told.remove(name),
        };
        self.dirty.insert(name.clone());
    }
}

/// A list of answers, of which one may be nil.
fn texts(value: &Value) -> Vec<String> {
    value.list().unwrap_or_default().iter().filter_map(Value::text).map(ToOwned::to_owned).collect()
}
