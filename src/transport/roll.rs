//! [`Roll`]: who is connected to this node by a stream, a socket or a read that waits. For those who list and kick them;
//! nothing looks at it while events pass.

use std::{
    collections::{HashMap, HashSet},
    net::{IpAddr, Ipv6Addr, SocketAddr},
    sync::{
        Arc, Weak,
        atomic::{AtomicU32, Ordering::Relaxed},
    },
    task::Poll,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use foldhash::fast::RandomState;
use parking_lot::Mutex;
use serde::{Deserialize, Serialize};
use slab::Slab;

use super::wheel::{Due, Timer, Wheel};
use crate::{
    auth::Identity,
    event::Channel,
    metrics::{Label as _, Transport},
    rpc::Provides,
};

/// Attempts to reach those who are to be kicked: a timer on its way to another bucket is missed.
const ATTEMPTS: usize = 8;
/// Longer than a request waits: it keeps its time itself.
const LONG: Duration = Duration::from_secs(60 * 60);

/// Where a request comes from, as an extension of it.
#[derive(Clone, Copy, Debug)]
pub struct Remote(pub SocketAddr);

/// The connections of one node that last.
pub struct Roll {
    /// What this run of the node is called in the names of its connections.
    node: u64,
    wheel: Arc<Wheel>,
    numbers: AtomicU32,
    entries: Mutex<Slab<Entry>>,
}

/// A connection on the roll, until this is dropped.
pub struct Place {
    roll: Arc<Roll>,
    key: u32,
    number: u32,
}

/// A request that waits for events, on the roll meanwhile.
pub struct Waiting {
    _place: Place,
    timer: Timer,
}

/// Some seventy bytes per connection.
struct Entry {
    number: u32,
    since: u64,
    /// IPv4 as IPv6 has it. Unspecified: unknown.
    address: Ipv6Addr,
    port: u16,
    transport: Transport,
    identity: Identity,
    reads: Reads,
    provides: Option<Provides>,
}

/// What a connection reads.
pub enum Reads {
    Nothing,
    One(Channel),
    Some(Arc<[Channel]>),
    /// As it changes.
    Live(Weak<Mutex<Subscribed>>),
}

/// The channels of one socket, with whatever it notes of each.
pub type Subscribed = HashMap<Channel, u32, RandomState>;

/// Which connections are meant. All that is said has to fit.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Which {
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub id: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub subject: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub channel: Option<String>,
}

/// A connection as it is listed. Ordered by its id.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Listed {
    /// The node, and a number that grows.
    pub id: String,
    pub node: String,
    pub transport: String,
    pub subject: String,
    pub remote: Option<SocketAddr>,
    /// Unix milliseconds.
    pub since: u64,
    /// How many it reads.
    pub channels: usize,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub services: Vec<String>,
}

// === impl Remote ===

impl Remote {
    /// Where a request with this head comes from, if its listener said so.
    pub fn of(head: &http::request::Parts) -> Option<SocketAddr> {
        head.extensions.get::<Remote>().map(|Remote(remote)| *remote)
    }
}

// === impl Roll ===

impl Roll {
    pub fn new(wheel: Arc<Wheel>) -> Arc<Self> {
        let node = fastrand::u64(1..);
        Arc::new(Roll { node, wheel, numbers: AtomicU32::new(0), entries: Mutex::default() })
    }

    /// The name of this node.
    pub fn node(&self) -> String {
        format!("{:016x}", self.node)
    }

    /// A connection begins. Its timer is to be [its](super::wheel::Timer::set_owner), or it cannot be kicked.
    pub fn enter(
        self: &Arc<Self>,
        transport: Transport,
        identity: &Identity,
        remote: Option<SocketAddr>,
        reads: Reads,
    ) -> Place {
        // 0 is of nobody. Four billion later a number comes again; whoever had it is gone by then.
        let number = self.numbers.fetch_add(1, Relaxed).wrapping_add(1).max(1);
        let since = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |time| time.as_millis() as u64);
        let (address, port) = remote.map_or((Ipv6Addr::UNSPECIFIED, 0), split);
        let entry =
            Entry { number, since, address, port, transport, identity: identity.clone(), reads, provides: None };
        let mut entries = self.entries.lock();
        if entries.len() == entries.capacity() {
            // By an eighth: doubling would waste half of it.
            let more = (entries.len() / 8).max(16);
            entries.reserve_exact(more);
        }
        let key = entries.insert(entry) as u32;
        Place { roll: self.clone(), key, number }
    }

    /// As [`enter`](Self::enter), for a request that waits for events of `channels`.
    pub fn waiting(
        self: &Arc<Self>,
        identity: &Identity,
        remote: Option<SocketAddr>,
        channels: Vec<Channel>,
    ) -> Waiting {
        let place = self.enter(Transport::Poll, identity, remote, Reads::of(channels));
        let mut timer = self.wheel.timer(LONG);
        timer.set_owner(place.number());
        Waiting { _place: place, timer }
    }

    /// Connections now.
    pub fn len(&self) -> usize {
        self.entries.lock().len()
    }

    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Up to `most` of those that are meant, in the order of their ids from the first after `after` on.
    pub fn list(&self, which: &Which, after: Option<&str>, most: usize) -> Vec<Listed> {
        let node = self.node();
        let after = after.map_or(Some(0), |after| self.after(after));
        let Some(after) = after else { return Vec::new() };
        let entries = self.entries.lock();
        let mut found: Vec<&Entry> = entries
            .iter()
            .map(|(_, entry)| entry)
            .filter(|entry| entry.number > after && self.fits(entry, which))
            .collect();
        if found.len() > most {
            found.select_nth_unstable_by_key(most, |entry| entry.number);
            found.truncate(most);
        }
        found.sort_unstable_by_key(|entry| entry.number);
        found.into_iter().map(|entry| entry.listed(&node)).collect()
    }

    /// The number behind which a list goes on here; `None`: all of this node come before.
    fn after(&self, id: &str) -> Option<u32> {
        match parse(id)? {
            (node, number) if node == self.node => Some(number),
            (node, _) => (node < self.node).then_some(0),
        }
    }

    /// Has those that are meant end. Returns how many.
    pub fn kick(&self, which: &Which) -> usize {
        let meant: HashSet<u32> = {
            let entries = self.entries.lock();
            entries.iter().filter(|(_, entry)| self.fits(entry, which)).map(|(_, entry)| entry.number).collect()
        };
        let mut left = meant.clone();
        for _ in 0..ATTEMPTS {
            if left.is_empty() {
                break;
            }
            self.wheel.kick(&mut left);
        }
        meant.len() - left.len()
    }

    fn fits(&self, entry: &Entry, which: &Which) -> bool {
        which.id.as_ref().is_none_or(|id| parse(id) == Some((self.node, entry.number)))
            && which.subject.as_ref().is_none_or(|subject| entry.identity.subject() == subject)
            && which.channel.as_ref().is_none_or(|channel| entry.reads.has(channel))
    }
}

/// `NODE-NUMBER`.
fn parse(id: &str) -> Option<(u64, u32)> {
    let (node, number) = id.split_once('-').filter(|(node, number)| node.len() == 16 && number.len() == 8)?;
    Some((u64::from_str_radix(node, 16).ok()?, u32::from_str_radix(number, 16).ok()?))
}

fn split(remote: SocketAddr) -> (Ipv6Addr, u16) {
    let address = match remote.ip() {
        IpAddr::V4(address) => address.to_ipv6_mapped(),
        IpAddr::V6(address) => address,
    };
    (address, remote.port())
}

// === impl Entry ===

impl Entry {
    fn listed(&self, node: &str) -> Listed {
        Listed {
            // Of equal length, so that text has the order of numbers.
            id: format!("{node}-{:08x}", self.number),
            node: node.to_owned(),
            transport: self.transport.value().to_owned(),
            subject: self.identity.subject().to_owned(),
            remote: (self.port != 0).then(|| SocketAddr::new(self.address.to_canonical(), self.port)),
            since: self.since,
            channels: self.reads.count(),
            services: self.provides.as_ref().map(Provides::names).unwrap_or_default(),
        }
    }
}

// === impl Waiting ===

impl Waiting {
    /// Waits until somebody wants it to end.
    pub async fn kicked(&mut self) {
        std::future::poll_fn(|cx| {
            loop {
                match self.timer.poll(cx) {
                    Poll::Ready(Due::Kicked) => return Poll::Ready(()),
                    // Whoever waits looks after that.
                    Poll::Ready(Due::Leave) => {}
                    Poll::Ready(Due::Time) => self.timer.reset(LONG),
                    Poll::Pending => return Poll::Pending,
                }
            }
        })
        .await;
    }
}

// === impl Reads ===

impl Reads {
    pub fn of(channels: Vec<Channel>) -> Self {
        match <[Channel; 1]>::try_from(channels) {
            Ok([one]) => Reads::One(one),
            Err(channels) if channels.is_empty() => Reads::Nothing,
            Err(channels) => Reads::Some(channels.into()),
        }
    }

    fn count(&self) -> usize {
        match self {
            Reads::Nothing => 0,
            Reads::One(_) => 1,
            Reads::Some(channels) => channels.len(),
            Reads::Live(live) => live.upgrade().map_or(0, |live| live.lock().len()),
        }
    }

    fn has(&self, channel: &str) -> bool {
        match self {
            Reads::Nothing => false,
            Reads::One(one) => one.as_str() == channel,
            Reads::Some(channels) => channels.iter().any(|it| it.as_str() == channel),
            Reads::Live(live) => live.upgrade().is_some_and(|live| live.lock().contains_key(channel)),
        }
    }
}

// === impl Place ===

impl Place {
    /// For the connection's timer.
    pub fn number(&self) -> u32 {
        self.number
    }

    /// Where it comes from is known now.
    pub fn met(&self, remote: SocketAddr) {
        self.change(|entry| (entry.address, entry.port) = split(remote));
    }

    /// What it reads from now on.
    pub fn reads(&self, reads: Reads) {
        self.change(|entry| entry.reads = reads);
    }

    /// It provides, or may do so.
    pub fn provides(&self, provides: Provides) {
        self.change(|entry| entry.provides = Some(provides));
    }

    fn change(&self, change: impl FnOnce(&mut Entry)) {
        if let Some(entry) = self.roll.entries.lock().get_mut(self.key as usize) {
            change(entry);
        }
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut entries = self.roll.entries.lock();
        entries.try_remove(self.key as usize);
        if entries.is_empty() {
            *entries = Slab::new();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn pages_are_in_order_and_whole() {
        let roll = Roll::new(Wheel::start());
        let channels = |names: &[&str]| Reads::of(names.iter().map(|name| Channel::parse(name).unwrap()).collect());
        let remote = Some("127.0.0.1:7".parse().unwrap());
        let mut places: Vec<_> = (0..100)
            .map(|n| {
                let reads = channels([&["a", "b"][..], &["a"], &[]][n % 3]);
                roll.enter(Transport::Sse, &Identity::anonymous(), remote, reads)
            })
            .collect();
        // Slots are used again, numbers are not.
        drop(places.drain(10..30));
        places.extend((0..20).map(|_| roll.enter(Transport::Ws, &Identity::anonymous(), None, channels(&["b"]))));
        let (mut all, mut after): (Vec<Listed>, Option<String>) = (Vec::new(), None);
        loop {
            let page = roll.list(&Which::default(), after.as_deref(), 7);
            let Some(last) = page.last() else { break };
            after = Some(last.id.clone());
            all.extend(page);
        }
        assert_eq!(all.len(), 100);
        assert!(all.is_sorted_by(|one, other| one.id < other.id));
        assert_eq!(all[0].remote, remote);
        assert_eq!((all[99].remote, &*all[99].transport, all[99].channels), (None, "ws", 1));
        let of = |channel: &str| {
            let which = Which { channel: Some(channel.into()), ..Which::default() };
            roll.list(&which, None, 1000).len()
        };
        let read_b = |it: &&Listed| it.channels == 2 || it.transport == "ws";
        assert_eq!(of("b"), all.iter().filter(read_b).count());
        let id = Which { id: Some(all[42].id.clone()), ..Which::default() };
        assert_eq!(roll.list(&id, None, 9)[0].id, all[42].id);
        let other = Which { subject: Some("u7".into()), ..Which::default() };
        assert!(roll.list(&other, None, 9).is_empty());
        drop(places);
        assert!(roll.is_empty());
    }

    #[test]
    fn an_entry_is_small() {
        assert!(size_of::<Entry>() <= 72, "{}", size_of::<Entry>());
    }
}
