//! Who is online: [`Presence`], told to everybody whenever it changes.
//!
//! Each node tells the others who is online there, in a name that all of them hold in the cluster: it is forgotten with
//! the node. (weir's own presence is of channels, a moment late, and says nothing of who comes a second time.)
//!
//! The list is made once per change, and every reader is woken for it. With few readers each change is told, as in the
//! original; with many, changes that come faster than everybody can be told of them are told together, or a thousand
//! browsers that reconnect would be a million frames of a thousand names.

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

/// What nodes tell each other who is online by.
const NAME: &str = "node-sse:online";
/// How long before a name that was not given is claimed again.
const AGAIN: Duration = Duration::from_secs(1);

/// Readers of whom each hears of every change.
const FEW: usize = 100;
/// What telling one reader may take, beside its bytes at a gigabyte a second.
const COST: Duration = Duration::from_micros(20);
/// Changes remembered for readers that are behind; who is further behind gets the newest only.
const KEPT: usize = 32;
/// Readers woken in one go.
const INLINE: usize = 32;

/// Everybody online.
#[derive(Default)]
pub struct Presence {
    /// Changes told so far.
    told: AtomicU32,
    inner: Mutex<Inner>,
}

#[derive(Default)]
struct Inner {
    /// Connections by `clientId`, in the order of their first.
    clients: IndexMap<Box<str>, usize>,
    connections: usize,
    /// Those of other nodes.
    elsewhere: BTreeMap<NodeId, Vec<Box<str>>>,
    /// By which the others are told.
    lease: Option<Arc<Lease>>,
    /// The newest frames: the last one has the number `told`.
    frames: VecDeque<Bytes>,
    parked: Slab<Waker>,
    /// When the next change may be told.
    free: Option<Instant>,
    /// A task waits for that time.
    waiting: bool,
}

/// One connection, online while it lives.
pub struct Member {
    presence: Arc<Presence>,
    client: Box<str>,
    /// The last change that this connection was told.
    seen: u32,
    parked: Option<u32>,
    /// Whose waker is parked.
    task: usize,
}

impl Presence {
    /// Counts a connection in, and tells everybody, itself included.
    pub fn join(this: &Arc<Self>, client: &str) -> Member {
        let mut inner = this.inner.lock();
        let seen = this.told.load(Relaxed);
        inner.connections += 1;
        match inner.clients.get_mut(client) {
            Some(connections) => *connections += 1,
            None => drop(inner.clients.insert(client.into(), 1)),
        }
        drop(inner);
        Self::changed(this);
        Member { presence: this.clone(), client: client.into(), seen, parked: None, task: 0 }
    }

    /// Tells everybody, now or as soon as they can be told again.
    fn changed(this: &Arc<Self>) {
        let mut inner = this.inner.lock();
        let now = Instant::now();
        let free = inner.free.filter(|free| *free > now);
        let runtime = tokio::runtime::Handle::try_current();
        if let (Some(free), Ok(runtime)) = (free, runtime) {
            if !std::mem::replace(&mut inner.waiting, true) {
                let presence = this.clone();
                runtime.spawn(async move {
                    sleep_until(free).await;
                    presence.inner.lock().waiting = false;
                    presence.tell();
                });
            }
            return;
        }
        drop(inner);
        this.tell();
    }

    fn tell(&self) {
        let mut inner = self.inner.lock();
        inner.tell_others();
        if inner.connections == 0 {
            return;
        }
        let frame = wire::frame(None, "online-presence", &inner.list());
        let pause = match inner.connections {
            ..=FEW => Duration::ZERO,
            many => (COST + Duration::from_nanos(frame.len() as u64)) * many as u32,
        };
        inner.free = Some(Instant::now() + pause);
        inner.frames.push_back(frame);
        if inner.frames.len() > KEPT {
            inner.frames.pop_front();
        }
        // Under the lock: who parks afterwards has seen it.
        self.told.fetch_add(1, Relaxed);
        let mut wakers = std::mem::take(&mut inner.parked).into_iter().map(|(_, waker)| waker);
        drop(inner);
        if wakers.len() > INLINE
            && let Ok(runtime) = tokio::runtime::Handle::try_current()
        {
            runtime.spawn(async move {
                while wakers.len() > 0 {
                    wakers.by_ref().take(INLINE).for_each(Waker::wake);
                    tokio::task::yield_now().await;
                }
            });
        } else {
            wakers.for_each(Waker::wake);
        }
    }
}

// === impl Presence: other nodes ===

impl Presence {
    /// Tells the other nodes and hears of theirs, for as long as it is polled.
    pub async fn share(this: Arc<Self>, cluster: Arc<dyn Cluster>) {
        let roster = cluster.roster(NAME);
        tokio::join!(this.hold(&*cluster), Self::hear(&this, &roster));
    }

    async fn hold(&self, cluster: &dyn Cluster) {
        loop {
            match cluster.claim(NAME, Claim::Shared).await {
                Ok(lease) if lease.is_single_node() => return,
                Ok(lease) => {
                    let lease = Arc::new(lease);
                    self.held_by(Some(lease.clone()));
                    lease.lost().await;
                    self.held_by(None);
                }
                Err(_) => tokio::time::sleep(AGAIN).await,
            }
        }
    }

    fn held_by(&self, lease: Option<Arc<Lease>>) {
        let mut inner = self.inner.lock();
        inner.lease = lease;
        inner.tell_others();
    }

    async fn hear(this: &Arc<Self>, roster: &Roster) {
        loop {
            roster.ready().await;
            let mut inner = this.inner.lock();
            let before = inner.list();
            for RosterEntry { node, info, .. } in roster.take() {
                let names: Option<Vec<Box<str>>> = info.and_then(|info| serde_json::from_slice(&info).ok());
                match names {
                    Some(names) => drop(inner.elsewhere.insert(node, names)),
                    None => drop(inner.elsewhere.remove(&node)),
                }
            }
            let changed = inner.list() != before;
            drop(inner);
            if changed {
                Self::changed(this);
            }
        }
    }
}

// === impl Inner ===

impl Inner {
    /// Everybody: who is here, and who is elsewhere.
    fn list(&self) -> String {
        let elsewhere = self.elsewhere.values().flatten().map(|name| &**name);
        let others: IndexSet<&str> = elsewhere.filter(|name| !self.clients.contains_key(*name)).collect();
        json(self.clients.keys().map(|name| &**name).chain(others))
    }

    fn is_elsewhere(&self, client: &str) -> bool {
        self.elsewhere.values().flatten().any(|name| **name == *client)
    }

    /// Of those who are here.
    fn tell_others(&self) {
        if let Some(lease) = &self.lease {
            let some = !self.clients.is_empty();
            lease.set_info(some.then(|| json(self.clients.keys().map(|name| &**name)).into()));
        }
    }
}

/// The names as JavaScript orders the members of an object: whole numbers first, then as they came.
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

impl Member {
    /// Hands over what this connection was not told yet, and leaves its task's waker for what comes.
    ///
    /// Asked at every turn of every stream: usually one load.
    pub fn poll(&mut self, cx: &mut Context<'_>, mut push: impl FnMut(Bytes)) {
        let task = cx.waker().data() as usize;
        if self.presence.told.load(Relaxed) == self.seen && self.task == task {
            return;
        }
        let mut inner = self.presence.inner.lock();
        let told = self.presence.told.load(Relaxed);
        if told != self.seen {
            // Whoever told has taken all wakers.
            self.parked = None;
            let missed = told.wrapping_sub(self.seen) as usize;
            let from = match missed <= inner.frames.len() {
                true => inner.frames.len() - missed,
                false => inner.frames.len() - 1,
            };
            inner.frames.iter().skip(from).cloned().for_each(&mut push);
            self.seen = told;
        }
        match self.parked {
            Some(key) => {
                if let Some(waker) = inner.parked.get_mut(key as usize) {
                    waker.clone_from(cx.waker());
                }
            }
            None => self.parked = Some(inner.parked.insert(cx.waker().clone()) as u32),
        }
        self.task = task;
    }
}

impl Drop for Member {
    fn drop(&mut self) {
        let mut inner = self.presence.inner.lock();
        if let Some(key) = self.parked
            && self.presence.told.load(Relaxed) == self.seen
        {
            inner.parked.try_remove(key as usize);
        }
        inner.connections -= 1;
        let gone = inner.clients.get_mut(&self.client).is_some_and(|connections| {
            *connections -= 1;
            *connections == 0
        });
        if !gone {
            return;
        }
        inner.clients.shift_remove(&self.client);
        if inner.connections == 0 {
            // Nobody is left to be told, or to catch up.
            inner.frames = VecDeque::new();
            inner.parked = Slab::new();
        }
        if inner.connections == 0 || inner.is_elsewhere(&self.client) {
            // For those who are here nothing has changed.
            return inner.tell_others();
        }
        drop(inner);
        Presence::changed(&self.presence);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::net::chunk;

    fn told(member: &mut Member) -> Vec<String> {
        let mut frames = Vec::new();
        member.poll(&mut Context::from_waker(Waker::noop()), |frame| {
            let text = String::from_utf8(chunk::text(&frame).into()).unwrap();
            let (_, payload) = text.split_once(r#""payload":""#).unwrap();
            frames.push(payload.trim_end().trim_end_matches("\"}").replace('\\', ""));
        });
        frames
    }

    #[test]
    fn everybody_hears_of_everybody() {
        let presence = Arc::new(Presence::default());
        let mut z = Presence::join(&presence, "z");
        assert_eq!(told(&mut z), [r#"["z"]"#]);
        let mut ten = Presence::join(&presence, "10");
        let mut two = Presence::join(&presence, "2");
        assert_eq!(told(&mut z), [r#"["10","z"]"#, r#"["2","10","z"]"#]);
        assert_eq!(told(&mut two), [r#"["2","10","z"]"#]);
        // A second connection of the same client is told, and its end is not.
        let again = Presence::join(&presence, "z");
        assert_eq!(told(&mut two), [r#"["2","10","z"]"#]);
        drop(again);
        assert!(told(&mut two).is_empty());
        drop(z);
        assert_eq!(told(&mut two), [r#"["2","10"]"#]);
        assert_eq!(told(&mut ten).len(), 4);
        drop((ten, two));
        let inner = presence.inner.lock();
        assert_eq!((inner.connections, inner.clients.len(), inner.parked.len()), (0, 0, 0));
    }

    #[tokio::test(start_paused = true)]
    async fn many_are_told_of_many_changes_at_once() {
        let presence = Arc::new(Presence::default());
        let mut members: Vec<_> = (0..1000).map(|n| Presence::join(&presence, &n.to_string())).collect();
        tokio::time::sleep(Duration::from_secs(5)).await;
        let frames = told(&mut members[0]);
        assert!(frames.len() <= KEPT, "{}", frames.len());
        assert!(frames.last().unwrap().ends_with(r#""999"]"#));
        assert!(presence.told.load(Relaxed) <= 110);
    }
}
