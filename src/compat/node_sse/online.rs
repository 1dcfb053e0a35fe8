//! [`OnlineClients`]: the list of clients that are online, which all clients receive whenever it changes.
//!
//! Each node publishes its own list as the info of a shared lease in the cluster, so the list disappears with the node.
//! (weir's presence is per channel, slightly delayed, and does not report a second connection of a client.)
//!
//! The frame is encoded once per change. With few connections every change is sent, as in the original. With many,
//! changes are combined if they are more frequent than they can be sent: a thousand reconnecting browsers would
//! otherwise cause a million frames of a thousand names each.

use std::{
    collections::{BTreeMap, VecDeque},
    sync::{
        Arc,
        atomic::{AtomicU32, Ordering::Relaxed},
    },
    task::{Context, Waker},
    time::Duration,
};

use bytes::Bytes;
use indexmap::{IndexMap, IndexSet};
use parking_lot::Mutex;
use slab::Slab;
use tokio::time::{Instant, sleep_until};

use super::wire;
use crate::{
    cluster::{Claim, Cluster, Lease, NodeId, Roster, RosterEntry},
    json::write_json_str,
};

/// The lease whose info is the list of a node.
const LEASE: &str = "node-sse:online";
/// Delay before a failed claim is retried.
const RETRY: Duration = Duration::from_secs(1);

/// Number of connections up to which every change is sent.
const UNTHROTTLED: usize = 100;
/// Estimated time to send a frame to one connection, besides its bytes at 1 GB/s.
const COST: Duration = Duration::from_micros(20);
/// Frames kept for connections that are behind. A connection that is further behind gets the newest only.
const KEPT: usize = 32;
/// Connections woken before the task yields.
const WAKE_BATCH: usize = 32;

/// The clients that are online.
#[derive(Default)]
pub(super) struct OnlineClients {
    /// The number of frames so far.
    version: AtomicU32,
    state: Mutex<OnlineState>,
}

#[derive(Default)]
struct OnlineState {
    /// Numbers of connections by `clientId`, in the order in which the clients connected.
    clients: IndexMap<Box<str>, usize>,
    connections: usize,
    /// The clients of other nodes.
    remote: BTreeMap<NodeId, Vec<Box<str>>>,
    /// Set while this node's list is published.
    lease: Option<Arc<Lease>>,
    /// The newest frames; the last is number `version`.
    frames: VecDeque<Bytes>,
    parked: Slab<Waker>,
    /// When the next frame may be sent.
    next_frame: Option<Instant>,
    /// Whether a task waits for that time.
    is_scheduled: bool,
}

/// A connection. Its client is online until it is dropped.
pub(super) struct OnlineMember {
    online: Arc<OnlineClients>,
    client: Box<str>,
    /// The last frame that this connection received.
    seen: u32,
    parked: Option<u32>,
    /// The task whose waker is parked.
    task: usize,
}

impl OnlineClients {
    /// Adds a connection, and sends the list to all connections including this one.
    pub(super) fn join(this: &Arc<Self>, client: &str) -> OnlineMember {
        let mut state = this.state.lock();
        let seen = this.version.load(Relaxed);
        state.connections += 1;
        match state.clients.get_mut(client) {
            Some(connections) => *connections += 1,
            None => drop(state.clients.insert(client.into(), 1)),
        }
        drop(state);
        Self::announce(this);
        OnlineMember { online: this.clone(), client: client.into(), seen, parked: None, task: 0 }
    }

    /// Sends the list now, or when the throttle permits it.
    fn announce(this: &Arc<Self>) {
        let mut state = this.state.lock();
        let now = Instant::now();
        let next_frame = state.next_frame.filter(|next_frame| *next_frame > now);
        let runtime = tokio::runtime::Handle::try_current();
        if let (Some(next_frame), Ok(runtime)) = (next_frame, runtime) {
            if !std::mem::replace(&mut state.is_scheduled, true) {
                let online = this.clone();
                runtime.spawn(async move {
                    sleep_until(next_frame).await;
                    online.state.lock().is_scheduled = false;
                    online.send();
                });
            }
            return;
        }
        drop(state);
        this.send();
    }

    fn send(&self) {
        let mut state = self.state.lock();
        state.publish_local();
        if state.connections == 0 {
            return;
        }
        let frame = wire::frame(None, "online-presence", &state.list());
        let pause = match state.connections {
            ..=UNTHROTTLED => Duration::ZERO,
            many => (COST + Duration::from_nanos(frame.len() as u64)) * many as u32,
        };
        state.next_frame = Some(Instant::now() + pause);
        state.frames.push_back(frame);
        if state.frames.len() > KEPT {
            state.frames.pop_front();
        }
        // Under the lock, so that a connection that parks afterwards has seen it.
        self.version.fetch_add(1, Relaxed);
        let mut wakers = std::mem::take(&mut state.parked).into_iter().map(|(_, waker)| waker);
        drop(state);
        if wakers.len() > WAKE_BATCH
            && let Ok(runtime) = tokio::runtime::Handle::try_current()
        {
            runtime.spawn(async move {
                while wakers.len() > 0 {
                    wakers.by_ref().take(WAKE_BATCH).for_each(Waker::wake);
                    tokio::task::yield_now().await;
                }
            });
        } else {
            wakers.for_each(Waker::wake);
        }
    }
}

// === impl OnlineClients: other nodes ===

impl OnlineClients {
    /// Exchanges lists with the other nodes until the future is dropped.
    pub(super) async fn replicate(this: Arc<Self>, cluster: Arc<dyn Cluster>) {
        let roster = cluster.roster(LEASE);
        tokio::join!(this.hold_lease(&*cluster), Self::receive(&this, &roster));
    }

    async fn hold_lease(&self, cluster: &dyn Cluster) {
        loop {
            match cluster.claim(LEASE, Claim::Shared).await {
                Ok(lease) if lease.is_single_node() => return,
                Ok(lease) => {
                    let lease = Arc::new(lease);
                    self.set_lease(Some(lease.clone()));
                    lease.lost().await;
                    self.set_lease(None);
                }
                Err(_) => tokio::time::sleep(RETRY).await,
            }
        }
    }

    fn set_lease(&self, lease: Option<Arc<Lease>>) {
        let mut state = self.state.lock();
        state.lease = lease;
        state.publish_local();
    }

    async fn receive(this: &Arc<Self>, roster: &Roster) {
        loop {
            roster.ready().await;
            let mut state = this.state.lock();
            let before = state.list();
            for RosterEntry { node, info, .. } in roster.take() {
                let names: Option<Vec<Box<str>>> = info.and_then(|info| serde_json::from_slice(&info).ok());
                match names {
                    Some(names) => drop(state.remote.insert(node, names)),
                    None => drop(state.remote.remove(&node)),
                }
            }
            let changed = state.list() != before;
            drop(state);
            if changed {
                Self::announce(this);
            }
        }
    }
}

// === impl OnlineState ===

impl OnlineState {
    /// The clients of all nodes.
    fn list(&self) -> String {
        let remote = self.remote.values().flatten().map(|name| &**name);
        let others: IndexSet<&str> = remote.filter(|name| !self.clients.contains_key(*name)).collect();
        json(self.clients.keys().map(|name| &**name).chain(others))
    }

    fn is_remote(&self, client: &str) -> bool {
        self.remote.values().flatten().any(|name| **name == *client)
    }

    /// Publishes the clients of this node to the others.
    fn publish_local(&self) {
        if let Some(lease) = &self.lease {
            let some = !self.clients.is_empty();
            lease.set_info(some.then(|| json(self.clients.keys().map(|name| &**name)).into()));
        }
    }
}

/// A JSON array in the order of the members of a JavaScript object: whole numbers first, then by insertion.
fn json<'a>(given: impl Iterator<Item = &'a str>) -> String {
    let number = |name: &str| name.parse::<u32>().ok().filter(|n| *n < u32::MAX && n.to_string() == name);
    let (mut numbers, mut names) = (Vec::new(), Vec::new());
    for name in given {
        match number(name) {
            Some(number) => numbers.push((number, name)),
            None => names.push(name),
        }
    }
    numbers.sort_unstable();
    let mut out = vec![b'['];
    for name in numbers.into_iter().map(|(_, name)| name).chain(names) {
        if out.len() > 1 {
            out.push(b',');
        }
        write_json_str(name, &mut out);
    }
    out.push(b']');
    String::from_utf8_lossy(&out).into_owned()
}

impl OnlineMember {
    /// Pushes the frames that this connection has not received, and registers the waker for the next.
    ///
    /// Called whenever a stream is polled: usually it costs one atomic load.
    pub(super) fn poll(&mut self, cx: &mut Context<'_>, mut push: impl FnMut(Bytes)) {
        let task = cx.waker().data() as usize;
        if self.online.version.load(Relaxed) == self.seen && self.task == task {
            return;
        }
        let mut state = self.online.state.lock();
        let version = self.online.version.load(Relaxed);
        if version != self.seen {
            // `send` has taken all wakers.
            self.parked = None;
            let missed = version.wrapping_sub(self.seen) as usize;
            let from = match missed <= state.frames.len() {
                true => state.frames.len() - missed,
                false => state.frames.len() - 1,
            };
            state.frames.iter().skip(from).cloned().for_each(&mut push);
            self.seen = version;
        }
        match self.parked {
            Some(key) => {
                if let Some(waker) = state.parked.get_mut(key as usize) {
                    waker.clone_from(cx.waker());
                }
            }
            None => self.parked = Some(state.parked.insert(cx.waker().clone()) as u32),
        }
        self.task = task;
    }
}

impl Drop for OnlineMember {
    fn drop(&mut self) {
        let mut state = self.online.state.lock();
        if let Some(key) = self.parked
            && self.online.version.load(Relaxed) == self.seen
        {
            state.parked.try_remove(key as usize);
        }
        state.connections -= 1;
        let gone = state.clients.get_mut(&self.client).is_some_and(|connections| {
            *connections -= 1;
            *connections == 0
        });
        if !gone {
            return;
        }
        state.clients.shift_remove(&self.client);
        if state.connections == 0 {
            // No connection is left that needs the frames.
            state.frames = VecDeque::new();
            state.parked = Slab::new();
        }
        if state.connections == 0 || state.is_remote(&self.client) {
            // The list is the same for the clients of this node.
            return state.publish_local();
        }
        drop(state);
        OnlineClients::announce(&self.online);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::net::chunk;

    fn received(member: &mut OnlineMember) -> Vec<String> {
        let mut frames = Vec::new();
        member.poll(&mut Context::from_waker(Waker::noop()), |frame| {
            let text = String::from_utf8(chunk::text(&frame).into()).unwrap();
            let (_, payload) = text.split_once(r#""payload":""#).unwrap();
            frames.push(payload.trim_end().trim_end_matches("\"}").replace('\\', ""));
        });
        frames
    }

    #[test]
    fn every_connection_receives_every_change() {
        let online = Arc::new(OnlineClients::default());
        let mut z = OnlineClients::join(&online, "z");
        assert_eq!(received(&mut z), [r#"["z"]"#]);
        let mut ten = OnlineClients::join(&online, "10");
        let mut two = OnlineClients::join(&online, "2");
        assert_eq!(received(&mut z), [r#"["10","z"]"#, r#"["2","10","z"]"#]);
        assert_eq!(received(&mut two), [r#"["2","10","z"]"#]);
        // A second connection of a client is announced, and its end is not.
        let again = OnlineClients::join(&online, "z");
        assert_eq!(received(&mut two), [r#"["2","10","z"]"#]);
        drop(again);
        assert!(received(&mut two).is_empty());
        drop(z);
        assert_eq!(received(&mut two), [r#"["2","10"]"#]);
        assert_eq!(received(&mut ten).len(), 4);
        drop((ten, two));
        let state = online.state.lock();
        assert_eq!((state.connections, state.clients.len(), state.parked.len()), (0, 0, 0));
    }

    #[tokio::test(start_paused = true)]
    async fn many_are_told_of_many_changes_at_once() {
        let online = Arc::new(OnlineClients::default());
        let mut members: Vec<_> = (0..1000).map(|n| OnlineClients::join(&online, &n.to_string())).collect();
        tokio::time::sleep(Duration::from_secs(5)).await;
        let frames = received(&mut members[0]);
        assert!(frames.len() <= KEPT, "{}", frames.len());
        assert!(frames.last().unwrap().ends_with(r#""999"]"#));
        assert!(online.version.load(Relaxed) <= 110);
    }
}
