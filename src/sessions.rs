//! [`ConnectionRegistry`]: the streams, sockets and waiting reads that are open on this node, for listing and kicking
//! them. The delivery of events does not use it.

pub mod cluster;

use std::{
    collections::{HashMap, HashSet},
    net::{IpAddr, Ipv6Addr, SocketAddr},
    sync::{
        Arc, Weak,
        atomic::{AtomicU32, AtomicU64, Ordering::Relaxed},
    },
    task::Poll,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use foldhash::fast::RandomState;
use parking_lot::Mutex;
use serde::{Deserialize, Serialize};
use slab::Slab;
use utoipa::ToSchema;

use crate::{
    auth::Identity,
    channel::Channel,
    error::{Code, Error},
    metrics::{MetricLabel as _, Transport},
    net::timer::{Due, Timer, TimerWheel},
    rpc::ProvidedServices,
};

/// Passes over the timers when connections are kicked: one pass misses a timer that is moving to another bucket.
const KICK_PASSES: usize = 8;
/// Period of the timer of a waiting read. It is only there to be kicked: the request enforces its own deadline.
const READ_TIMER: Duration = Duration::from_secs(60 * 60);

/// The open streams, sockets and waiting reads of one node.
pub struct ConnectionRegistry {
    /// Identifies this run of the node in connection ids.
    node: u64,
    wheel: Arc<TimerWheel>,
    numbers: AtomicU32,
    entries: Mutex<Slab<ConnectionEntry>>,
    /// The earliest time at which a credential of a connection expires, in Unix milliseconds.
    next_expiry: AtomicU64,
}

/// One registered connection. Dropping it removes the entry.
pub struct ConnectionRegistration {
    registry: Arc<ConnectionRegistry>,
    key: u32,
    number: u32,
}

/// A registered request that waits for events, and the timer through which it is kicked.
pub(crate) struct WaitingRead {
    _registration: ConnectionRegistration,
    timer: Timer,
}

/// Kept small, at most eighty bytes: there is one per connection.
struct ConnectionEntry {
    number: u32,
    since: u64,
    /// IPv4 addresses are stored as IPv4-mapped IPv6. Port 0 means unknown.
    address: Ipv6Addr,
    port: u16,
    transport: Transport,
    identity: Identity,
    channels: ChannelSet,
    services: Option<ProvidedServices>,
}

/// The channels that a connection reads.
pub enum ChannelSet {
    Empty,
    One(Channel),
    Many(Arc<[Channel]>),
    /// The channels of a socket, which change.
    Live(Weak<Mutex<SubscribedChannels>>),
}

/// The channels of one socket, and the slot of each subscription.
pub type SubscribedChannels = HashMap<Channel, u32, RandomState>;

/// Selects connections: all given fields must match.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ConnectionFilter {
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub id: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub subject: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub channel: Option<String>,
}

/// A stream, a WebSocket or a waiting read. Lists are sorted by `id`.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
#[schema(as = Connection)]
pub struct ConnectionInfo {
    /// `NODE-NUMBER`: the node, and a number that increases with each connection.
    pub id: String,
    pub node: String,
    #[schema(example = "ws")]
    pub(crate) transport: String,
    /// The subject of its credentials.
    pub(crate) subject: String,
    /// The peer address (of the last proxy, if there is one); null if unknown.
    #[schema(value_type = String, nullable, required)]
    pub(crate) remote: Option<SocketAddr>,
    /// Unix milliseconds.
    pub(crate) since: u64,
    /// Number of channels that the connection reads.
    pub(crate) channels: usize,
    /// The services that it provides.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub(crate) services: Vec<String>,
}

// === impl ConnectionRegistry ===

impl ConnectionRegistry {
    pub fn new(wheel: Arc<TimerWheel>) -> Arc<Self> {
        let node = fastrand::u64(1..);
        Arc::new(ConnectionRegistry {
            node,
            wheel,
            numbers: AtomicU32::new(0),
            entries: Mutex::default(),
            next_expiry: AtomicU64::new(u64::MAX),
        })
    }

    /// This run of the node, as in [`ConnectionInfo::node`].
    pub fn node(&self) -> String {
        format!("{:016x}", self.node)
    }

    /// Adds a connection. It can only be kicked once its timer has the registration's
    /// [`number`](ConnectionRegistration::number) as its [owner](Timer::set_owner).
    pub fn register(
        self: &Arc<Self>,
        transport: Transport,
        identity: &Identity,
        remote: Option<SocketAddr>,
        channels: ChannelSet,
    ) -> ConnectionRegistration {
        // 0 marks a timer without an owner. Numbers wrap after four billion connections; the previous holder has closed
        // by then.
        let number = self.numbers.fetch_add(1, Relaxed).wrapping_add(1).max(1);
        let since = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |time| time.as_millis() as u64);
        let (address, port) = remote.map_or((Ipv6Addr::UNSPECIFIED, 0), split);
        let entry = ConnectionEntry {
            number,
            since,
            address,
            port,
            transport,
            identity: identity.clone(),
            channels,
            services: None,
        };
        let mut entries = self.entries.lock();
        if entries.len() == entries.capacity() {
            // Grow by an eighth: doubling would leave up to half of the memory unused.
            let more = (entries.len() / 8).max(16);
            entries.reserve_exact(more);
        }
        if let Some(expires) = identity.expires() {
            self.next_expiry.fetch_min(expires, Relaxed);
        }
        let key = entries.insert(entry) as u32;
        ConnectionRegistration { registry: self.clone(), key, number }
    }

    /// As [`register`](Self::register), for a request that waits for events of `channels`.
    pub(crate) fn register_read(
        self: &Arc<Self>,
        identity: &Identity,
        remote: Option<SocketAddr>,
        channels: Vec<Channel>,
    ) -> WaitingRead {
        let registration = self.register(Transport::Poll, identity, remote, ChannelSet::new(channels));
        let mut timer = self.wheel.timer(READ_TIMER);
        timer.set_owner(registration.number());
        WaitingRead { _registration: registration, timer }
    }

    /// Number of registered connections.
    pub fn len(&self) -> usize {
        self.entries.lock().len()
    }

    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Up to `limit` connections that match `filter`, in the order of ids, starting after the id `after`.
    pub(crate) fn list(&self, filter: &ConnectionFilter, after: Option<&str>, limit: usize) -> Vec<ConnectionInfo> {
        let node = self.node();
        let after = after.map_or(Some(0), |after| self.after(after));
        let Some(after) = after else { return Vec::new() };
        let entries = self.entries.lock();
        let mut found: Vec<&ConnectionEntry> = entries
            .iter()
            .map(|(_, entry)| entry)
            .filter(|entry| entry.number > after && self.matches(entry, filter))
            .collect();
        if found.len() > limit {
            found.select_nth_unstable_by_key(limit, |entry| entry.number);
            found.truncate(limit);
        }
        found.sort_unstable_by_key(|entry| entry.number);
        found.into_iter().map(|entry| entry.info(&node)).collect()
    }

    /// The number after which a list continues on this node. `None`: all ids of this node precede `id`.
    fn after(&self, id: &str) -> Option<u32> {
        match parse(id)? {
            (node, number) if node == self.node => Some(number),
            (node, _) => (node < self.node).then_some(0),
        }
    }

    /// Ends the connections that match `filter` and returns their number.
    pub(crate) fn kick(&self, filter: &ConnectionFilter) -> usize {
        self.close(Code::Kicked, |entry| self.matches(entry, filter))
    }

    /// Ends the connections whose credentials have expired. `now`: Unix milliseconds.
    pub(crate) fn close_expired(&self, now: u64) {
        if now < self.next_expiry.load(Relaxed) {
            return;
        }
        let is_expired = |entry: &ConnectionEntry| entry.identity.expires().is_some_and(|expires| expires <= now);
        self.close(Code::TokenExpired, is_expired);
        let entries = self.entries.lock();
        // Those that have just been closed are still there: they are looked at again, as their timer may have been missed.
        let next = entries.iter().filter_map(|(_, entry)| entry.identity.expires()).min();
        // Under the lock, so that a registration meanwhile is not forgotten.
        self.next_expiry.store(next.unwrap_or(u64::MAX), Relaxed);
    }

    fn close(&self, code: Code, matches: impl Fn(&ConnectionEntry) -> bool) -> usize {
        let matching: HashSet<u32> = {
            let entries = self.entries.lock();
            entries.iter().filter(|(_, entry)| matches(entry)).map(|(_, entry)| entry.number).collect()
        };
        let mut left = matching.clone();
        for _ in 0..KICK_PASSES {
            if left.is_empty() {
                break;
            }
            self.wheel.kick(&mut left, code);
        }
        matching.len() - left.len()
    }

    fn matches(&self, entry: &ConnectionEntry, filter: &ConnectionFilter) -> bool {
        filter.id.as_ref().is_none_or(|id| parse(id) == Some((self.node, entry.number)))
            && filter.subject.as_ref().is_none_or(|subject| entry.identity.subject() == subject)
            && filter.channel.as_ref().is_none_or(|channel| entry.channels.contains(channel))
    }
}

/// The error of a request that the registry has closed.
pub(crate) fn closed(code: Code) -> Error {
    match code {
        Code::TokenExpired => Error::new(code, "the credential has expired during this request: get a new one"),
        code => Error::new(code, "this request was closed by an administrator"),
    }
}

/// Parses `NODE-NUMBER`.
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

// === impl ConnectionEntry ===

impl ConnectionEntry {
    fn info(&self, node: &str) -> ConnectionInfo {
        ConnectionInfo {
            // Fixed width, so that ids sort as their numbers do.
            id: format!("{node}-{:08x}", self.number),
            node: node.to_owned(),
            transport: self.transport.value().to_owned(),
            subject: self.identity.subject().to_owned(),
            remote: (self.port != 0).then(|| SocketAddr::new(self.address.to_canonical(), self.port)),
            since: self.since,
            channels: self.channels.len(),
            services: self.services.as_ref().map(ProvidedServices::names).unwrap_or_default(),
        }
    }
}

// === impl WaitingRead ===

impl WaitingRead {
    /// Waits until the request is closed by the registry, and returns the code.
    pub(crate) async fn kicked(&mut self) -> Code {
        std::future::poll_fn(|cx| {
            loop {
                match self.timer.poll(cx) {
                    Poll::Ready(Due::Kicked(code)) => return Poll::Ready(code),
                    // The handler itself ends the read when the node drains.
                    Poll::Ready(Due::Leave) => {}
                    Poll::Ready(Due::Time) => self.timer.reset(READ_TIMER),
                    Poll::Pending => return Poll::Pending,
                }
            }
        })
        .await
    }
}

// === impl ChannelSet ===

impl ChannelSet {
    pub(crate) fn new(channels: Vec<Channel>) -> Self {
        match <[Channel; 1]>::try_from(channels) {
            Ok([one]) => ChannelSet::One(one),
            Err(channels) if channels.is_empty() => ChannelSet::Empty,
            Err(channels) => ChannelSet::Many(channels.into()),
        }
    }

    fn len(&self) -> usize {
        match self {
            ChannelSet::Empty => 0,
            ChannelSet::One(_) => 1,
            ChannelSet::Many(channels) => channels.len(),
            ChannelSet::Live(live) => live.upgrade().map_or(0, |live| live.lock().len()),
        }
    }

    fn contains(&self, channel: &str) -> bool {
        match self {
            ChannelSet::Empty => false,
            ChannelSet::One(one) => one.as_str() == channel,
            ChannelSet::Many(channels) => channels.iter().any(|it| it.as_str() == channel),
            ChannelSet::Live(live) => live.upgrade().is_some_and(|live| live.lock().contains_key(channel)),
        }
    }
}

// === impl ConnectionRegistration ===

impl ConnectionRegistration {
    /// The owner to set on the connection's timer.
    pub fn number(&self) -> u32 {
        self.number
    }

    /// Sets the peer address, once it is known.
    pub(crate) fn set_peer(&self, remote: SocketAddr) {
        self.change(|entry| (entry.address, entry.port) = split(remote));
    }

    /// Replaces the channels that the connection reads.
    pub(crate) fn set_channels(&self, channels: ChannelSet) {
        self.change(|entry| entry.channels = channels);
    }

    /// Replaces the client of the connection, which has logged in or sent a new token.
    pub(crate) fn set_identity(&self, identity: Identity) {
        self.change(|entry| {
            if let Some(expires) = identity.expires() {
                self.registry.next_expiry.fetch_min(expires, Relaxed);
            }
            entry.identity = identity;
        });
    }

    /// Sets the services that the connection provides.
    pub(crate) fn set_services(&self, services: ProvidedServices) {
        self.change(|entry| entry.services = Some(services));
    }

    fn change(&self, change: impl FnOnce(&mut ConnectionEntry)) {
        if let Some(entry) = self.registry.entries.lock().get_mut(self.key as usize) {
            change(entry);
        }
    }
}

impl Drop for ConnectionRegistration {
    fn drop(&mut self) {
        let mut entries = self.registry.entries.lock();
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
    async fn pages_are_ordered_and_complete() {
        let registry = ConnectionRegistry::new(TimerWheel::start());
        let channels =
            |names: &[&str]| ChannelSet::new(names.iter().map(|name| Channel::parse(name).unwrap()).collect());
        let remote = Some("127.0.0.1:7".parse().unwrap());
        let mut registrations: Vec<_> = (0..100)
            .map(|n| {
                let channels = channels([&["a", "b"][..], &["a"], &[]][n % 3]);
                registry.register(Transport::Sse, &Identity::open(false), remote, channels)
            })
            .collect();
        // Slots are reused, numbers are not.
        drop(registrations.drain(10..30));
        registrations
            .extend((0..20).map(|_| registry.register(Transport::Ws, &Identity::open(false), None, channels(&["b"]))));
        let (mut all, mut after): (Vec<ConnectionInfo>, Option<String>) = (Vec::new(), None);
        loop {
            let page = registry.list(&ConnectionFilter::default(), after.as_deref(), 7);
            let Some(last) = page.last() else { break };
            after = Some(last.id.clone());
            all.extend(page);
        }
        assert_eq!(all.len(), 100);
        assert!(all.is_sorted_by(|one, other| one.id < other.id));
        assert_eq!(all[0].remote, remote);
        assert_eq!((all[99].remote, &*all[99].transport, all[99].channels), (None, "ws", 1));
        let of = |channel: &str| {
            let filter = ConnectionFilter { channel: Some(channel.into()), ..ConnectionFilter::default() };
            registry.list(&filter, None, 1000).len()
        };
        let read_b = |it: &&ConnectionInfo| it.channels == 2 || it.transport == "ws";
        assert_eq!(of("b"), all.iter().filter(read_b).count());
        let id = ConnectionFilter { id: Some(all[42].id.clone()), ..ConnectionFilter::default() };
        assert_eq!(registry.list(&id, None, 9)[0].id, all[42].id);
        let other = ConnectionFilter { subject: Some("u7".into()), ..ConnectionFilter::default() };
        assert!(registry.list(&other, None, 9).is_empty());
        drop(registrations);
        assert!(registry.is_empty());
    }

    #[test]
    fn an_entry_is_small() {
        assert!(size_of::<ConnectionEntry>() <= 80, "{}", size_of::<ConnectionEntry>());
    }
}
