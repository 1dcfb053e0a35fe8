//! [`ClusterContext`]: what the parts of this node's membership share.

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering::SeqCst},
    },
    time::Duration,
};

use bytes::Bytes;
use parking_lot::Mutex;
use redis::{Cmd, FromRedisValue, cmd};
use tokio::sync::Notify;

use super::announcement::Announcement;
use crate::{
    backend::redis::{
        client::{CommandResult, OnLostReply, Topology},
        store::keys::escape,
    },
    cluster::{LeaseState, MonotonicClock, NodeId, PeerLinks, Watchers},
};

/// How long a node without a heartbeat counts as a member, and an exclusive name without a renewal as held.
pub(super) const TTL: Duration = Duration::from_secs(10);
/// How often the sessions of other nodes are read.
pub(super) const REFRESH: Duration = Duration::from_secs(1);

pub(super) struct ClusterContext {
    pub(super) topology: Arc<Topology>,
    pub(super) clock: MonotonicClock,
    pub(super) links: PeerLinks,
    pub(super) state: Mutex<ClusterState>,
    pub(super) leads: AtomicBool,
    /// The session of this node has changed.
    pub(super) changed: Notify,
    /// The sessions of other nodes have to be read.
    pub(super) refresh: Notify,
    /// Redis may not know this node: a heartbeat is due.
    pub(super) beat: Notify,
    prefix: Box<str>,
}

pub(super) struct ClusterState {
    pub(super) id: NodeId,
    /// Microseconds of the clock of Redis; 0 before the first heartbeat.
    pub(super) joined: u64,
    /// Milliseconds of the node's clock: until then no other node can take this one for dead.
    pub(super) until: u64,
    pub(super) left: bool,
    pub(super) leases: HashMap<Arc<str>, Arc<LeaseState>>,
    /// Names that are being released, and how often.
    pub(super) releasing: HashMap<Arc<str>, usize>,
    /// The info that this node publishes about its names, each with its revision.
    pub(super) infos: HashMap<Arc<str>, (u64, Bytes)>,
    pub(super) rev: u64,
    /// The revision that was last written to Redis.
    pub(super) written: u64,
    /// Names whose info is not yet written to Redis.
    pub(super) dirty: HashSet<Arc<str>>,
    /// Redis has no session of this node, and gets the whole with the next heartbeat.
    pub(super) unknown: bool,
    pub(super) peers: BTreeMap<NodeId, PeerSession>,
    /// Batches of nodes that are not known yet.
    pub(super) early: HashMap<NodeId, Vec<Bytes>>,
    pub(super) watchers: Watchers,
}

/// The session of another node.
#[derive(Default)]
pub(super) struct PeerSession {
    pub(super) joined: u64,
    /// When it last announced something, in milliseconds of this node's clock.
    pub(super) heard: Option<u64>,
    pub(super) rev: u64,
    pub(super) infos: HashMap<Arc<str>, (u64, Bytes)>,
    /// An announcement is missing: the session has to be read.
    pub(super) stale: bool,
}

impl ClusterContext {
    pub(super) fn new(topology: Arc<Topology>, prefix: &str) -> Self {
        let id = NodeId::random();
        ClusterContext {
            topology,
            clock: MonotonicClock::real(),
            links: PeerLinks::new(id),
            state: Mutex::new(ClusterState {
                id,
                joined: 0,
                until: 0,
                left: false,
                leases: HashMap::new(),
                releasing: HashMap::new(),
                infos: HashMap::new(),
                rev: 0,
                written: 0,
                dirty: HashSet::new(),
                unknown: true,
                peers: BTreeMap::new(),
                early: HashMap::new(),
                watchers: Watchers::default(),
            }),
            leads: AtomicBool::new(false),
            changed: Notify::new(),
            refresh: Notify::new(),
            beat: Notify::new(),
            prefix: prefix.into(),
        }
    }

    pub(super) fn id(&self) -> NodeId {
        self.state.lock().id
    }

    pub(super) fn session_key(&self, node: NodeId) -> String {
        format!("{}{{node:{node}}}", self.prefix)
    }

    pub(super) fn mail_channel(&self, node: NodeId) -> String {
        format!("{}{{node:{node}}}:mail", self.prefix)
    }

    pub(super) fn index_key(&self) -> String {
        format!("{}{{nodes}}", self.prefix)
    }

    pub(super) fn news_channel(&self) -> String {
        format!("{}{{nodes}}:news", self.prefix)
    }

    /// The keys of the holders of a name, and of its exclusive holder.
    pub(super) fn name_keys(&self, name: &str) -> (String, String) {
        let mut holders = format!("{}{{name:", self.prefix);
        escape(name, &mut holders);
        holders.push('}');
        let exclusive = format!("{holders}:x");
        (holders, exclusive)
    }

    pub(super) fn publish(&self, channel: &str, message: &[u8]) -> Cmd {
        let mut publish = cmd(self.topology.publish_verb());
        publish.arg(channel).arg(message);
        publish
    }

    /// Runs an idempotent command about `key`.
    pub(super) async fn call<T: FromRedisValue>(&self, key: &str, command: &Cmd) -> CommandResult<T> {
        self.topology.call(key.as_bytes(), OnLostReply::Retry, command).await
    }

    /// Publishes to all nodes. False if Redis did not confirm it.
    pub(super) async fn announce(&self, announcement: &Announcement) -> bool {
        let channel = self.news_channel();
        self.call::<u64>(&channel, &self.publish(&channel, &announcement.encode())).await.is_ok()
    }

    /// Whether no other node can take this one for dead.
    pub(super) fn is_alive(&self) -> bool {
        let state = self.state.lock();
        !state.left && self.clock.now() < state.until
    }

    /// Whether a node has announced itself lately, whether or not Redis has its session: that key is lost early if the
    /// clock of Redis is set forward, if it is evicted, or with the data of a failover.
    pub(super) fn is_heard(&self, node: NodeId) -> bool {
        let heard = self.state.lock().peers.get(&node).and_then(|peer| peer.heard);
        heard.is_some_and(|heard| self.clock.now() < heard + TTL.as_millis() as u64)
    }

    /// The nodes that have announced `name` and live.
    pub(super) fn announcers(&self, name: &str) -> Vec<NodeId> {
        let announcers: Vec<NodeId> = {
            let state = self.state.lock();
            let peers = state.peers.iter().filter(|(_, peer)| peer.infos.contains_key(name));
            peers.map(|(node, _)| *node).collect()
        };
        announcers.into_iter().filter(|node| self.is_heard(*node)).collect()
    }

    /// The node that joined first is the leader.
    pub(super) fn choose_leader(&self) {
        let state = self.state.lock();
        let mine = (state.joined, state.id);
        let first = state.peers.iter().all(|(node, peer)| mine < (peer.joined, *node));
        self.leads.store(state.joined != 0 && first && self.clock.now() < state.until, SeqCst);
    }
}

impl ClusterState {
    /// Changes what this node publishes about a name.
    pub(super) fn set_info(&mut self, name: &Arc<str>, info: Option<Bytes>) {
        self.rev += 1;
        match info {
            Some(info) => self.infos.insert(name.clone(), (self.rev, info)),
            None => self.infos.remove(name),
        };
        self.dirty.insert(name.clone());
    }

    /// Whether `lease` is the present lease of its name, and not an earlier one.
    pub(super) fn holds(&self, lease: &Arc<LeaseState>) -> bool {
        self.leases.get(&lease.name).is_some_and(|mine| Arc::ptr_eq(mine, lease))
    }
}
