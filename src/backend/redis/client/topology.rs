//! [`Topology`]: the servers that are one Redis, and which of them has what.
//!
//! Standalone and Sentinel are one server, whose address is asked each time. A Cluster is several, each with some of
//! 16,384 slots; a key's slot is told by what stands in its braces.

use std::{
    collections::BTreeMap,
    future::Future,
    sync::{Arc, Weak},
    time::Duration,
};

use futures_util::{StreamExt, stream::FuturesUnordered};
use parking_lot::{Mutex, RwLock};
use tokio::{
    sync::{Notify, watch},
    task::JoinHandle,
    time::{Instant, sleep, timeout},
};

use super::{
    connection::{CommandError, NoPush, RedisConnection},
    reconnect::{Ears, ReconnectingConnection, Target, master, most},
    resp::{Command, Value},
    script::Script,
    url::{Address, RedisUrl, TopologyKind},
};
use crate::metrics::{Metrics, RedisConnectionKind};

pub const SLOTS: usize = 16384;
/// How long a command may wait for a connection, or for a server that is loading or handing over.
const PATIENCE: Duration = Duration::from_secs(2);
/// Between two tries.
const PAUSE: Duration = Duration::from_millis(25);
/// How often it is asked who has which slots while nothing seems wrong: servers say themselves what has moved...
const CALM: Duration = Duration::from_secs(5);
/// ...and who is the master: a master that slept through its deposition takes writes that will be lost, for as long as
/// nobody tells it, and Sentinel takes ten seconds...
const WATCH: Duration = Duration::from_secs(1);
/// ...and while something does.
const ALARM: Duration = Duration::from_millis(300);
/// When a server was away, or has changed, whoever lives is back on it within this.
const SETTLED: Duration = Duration::from_secs(3);
/// Servers of a Cluster asked at the same time who has which slots.
const WITNESSES: usize = 5;
/// A server that has lost its slots may still owe answers.
const LEAVE: Duration = Duration::from_secs(5);

/// One server, with its lane for commands.
pub struct RedisServer {
    pub target: Target,
    commands: ReconnectingConnection,
    /// The process that answers, and since when we know it: Unix seconds of its own clock.
    known: Mutex<(Box<str>, u64)>,
}

pub struct Topology {
    pub url: Arc<RedisUrl>,
    pub metrics: Arc<Metrics>,
    map: RwLock<Map>,
    /// Something seems to have moved.
    doubt: Arc<Notify>,
    changed: watch::Sender<u64>,
    guard: Mutex<Option<JoinHandle<()>>>,
}

#[derive(Default)]
struct Map {
    servers: BTreeMap<Address, Arc<RedisServer>>,
    /// Of a Cluster; else empty.
    slots: Vec<Slot>,
}

#[derive(Clone, Default)]
struct Slot {
    server: Option<Arc<RedisServer>>,
    /// When it was found to have come there, if it was elsewhere before.
    since: Option<std::time::Instant>,
}

/// What to do with a command whose answer was lost.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OnLostReply {
    /// Once more: it does the same again, or nothing.
    Retry,
    /// Say so.
    Report,
}

/// An answer, and the connection that it came over.
pub type Answered = (Value, Arc<RedisConnection>);

impl Topology {
    /// Begins to connect. Needs a tokio runtime.
    pub fn start(url: RedisUrl, metrics: Arc<Metrics>) -> Arc<Self> {
        let topology = Arc::new(Topology {
            url: Arc::new(url),
            metrics,
            map: RwLock::default(),
            doubt: Arc::default(),
            changed: watch::Sender::new(0),
            guard: Mutex::default(),
        });
        if !topology.url.is_cluster() {
            topology.map.write().servers.insert(only(), topology.server_at(Target::Master));
        }
        *topology.guard.lock() = Some(tokio::spawn(guard(Arc::downgrade(&topology))));
        topology
    }

    fn server_at(&self, target: Target) -> Arc<RedisServer> {
        let commands = self.lane(&target, RedisConnectionKind::Commands, Arc::new(|_| Arc::new(NoPush)));
        Arc::new(RedisServer { target, commands, known: Mutex::default() })
    }

    /// Another connection to the same server as a [`RedisServer`]'s.
    pub fn lane(&self, target: &Target, name: RedisConnectionKind, ears: Ears) -> ReconnectingConnection {
        ReconnectingConnection::start(self.url.clone(), target.clone(), name, ears, self.metrics.clone())
    }

    /// Waits until every slot can be asked for, or says what is in the way.
    pub async fn ready(&self, patience: Duration) -> Result<(), String> {
        let deadline = Instant::now() + patience;
        let mut reason = "no server answers".to_owned();
        loop {
            let servers = self.servers();
            let mut up = !servers.is_empty();
            for server in servers {
                if let Err(why) = server.commands.ready(deadline).await {
                    (up, reason) = (false, why.to_string());
                }
            }
            if up {
                return Ok(());
            }
            if Instant::now() >= deadline {
                return Err(reason);
            }
            sleep(PAUSE).await;
        }
    }

    /// All of them: the masters of a Cluster.
    pub fn servers(&self) -> Vec<Arc<RedisServer>> {
        self.map.read().servers.values().cloned().collect()
    }

    /// Who has the slot of `key`.
    pub fn server_of(&self, key: &[u8]) -> Option<Arc<RedisServer>> {
        let map = self.map.read();
        match self.url.is_cluster() {
            true => map.slots.get(slot(key))?.server.clone(),
            false => map.servers.values().next().cloned(),
        }
    }

    /// The servers that have slots.
    pub fn places(&self) -> Vec<Address> {
        let map = self.map.read();
        if !self.url.is_cluster() {
            return map.servers.keys().cloned().collect();
        }
        let has = |server: &&Arc<RedisServer>| {
            map.slots.iter().any(|slot| slot.server.as_ref().is_some_and(|of| Arc::ptr_eq(of, server)))
        };
        let places = map.servers.iter().filter(|(_, server)| has(server));
        places.map(|(address, _)| address.clone()).collect()
    }

    /// Names the server that has the slot of `key`, and says how to reach it.
    pub fn place_of(&self, key: &[u8]) -> Option<(Address, Target)> {
        match self.url.is_cluster() {
            true => match &self.server_of(key)?.target {
                Target::Address(address) => Some((address.clone(), Target::Address(address.clone()))),
                Target::Master => None,
            },
            false => Some((only(), self.server_of(key)?.target.clone())),
        }
    }

    /// From this second on, what is not in Redis is known never to have been there: before it, this process of Redis
    /// was not known, or had not got the slot.
    ///
    /// Nothing, where nobody can know: it may forget what it likes.
    pub fn horizon(&self, key: &[u8], connection: &RedisConnection) -> Option<u64> {
        if connection.server.evicts {
            return None;
        }
        let map = self.map.read();
        let (server, since) = match self.url.is_cluster() {
            true => match map.slots.get(slot(key)) {
                Some(Slot { server: Some(server), since }) => (server, *since),
                _ => return None,
            },
            false => match map.servers.values().next() {
                Some(server) => (server, None),
                None => return None,
            },
        };
        let mut known = server.known.lock();
        if known.0 != connection.server.generation {
            *known = (connection.server.generation.clone(), connection.server.since);
        }
        Some(since.map_or(known.1, |since| known.1.max(connection.time_at(since) / 1000 + 1)))
    }

    /// How something is published: in a Cluster where the slot is, and not to every server.
    pub fn publish_verb(&self) -> &'static str {
        if self.url.is_cluster() { "SPUBLISH" } else { "PUBLISH" }
    }

    /// Whether what is missing behind `connection` is missing: right after Redis was away, or the slot of `key` has moved, others
    /// may just not be back yet.
    pub fn is_settled(&self, key: &[u8], connection: &RedisConnection) -> bool {
        let moved = self.map.read().slots.get(slot(key)).and_then(|slot| slot.since);
        connection.age() > SETTLED && moved.is_none_or(|moved| moved.elapsed() > SETTLED)
    }

    /// Changes whenever a slot is found elsewhere.
    pub fn changes(&self) -> watch::Receiver<u64> {
        self.changed.subscribe()
    }

    /// Asks for a look at who has what.
    pub fn doubt(&self) {
        self.doubt.notify_one();
    }

    /// A command about `key`, as `make` makes it for the server that will answer.
    ///
    /// What was surely not done is tried again, for two seconds; what may have been done only if `lost` allows it.
    pub async fn call(
        &self,
        key: &[u8],
        lost: OnLostReply,
        make: impl Fn(&RedisConnection) -> Command,
    ) -> Result<Answered, CommandError> {
        self.call_if(key, lost, |connection| Some(make(connection))).await
    }

    /// As [`call`](Self::call). Where `make` makes nothing it is given up, as refused.
    pub async fn call_if(
        &self,
        key: &[u8],
        lost: OnLostReply,
        make: impl Fn(&RedisConnection) -> Option<Command>,
    ) -> Result<Answered, CommandError> {
        self.attempt(key, lost, None, |connection| {
            let command = make(&connection).ok_or_else(|| CommandError::Rejected("ERR given up".into()));
            async move { command }
        })
        .await
    }

    /// A script about keys of one slot. `fill` adds the keys and arguments for the server that will answer.
    pub async fn run(
        &self,
        script: &'static Script,
        keys: &[&[u8]],
        lost: OnLostReply,
        fill: impl Fn(&RedisConnection, &mut Command),
    ) -> Result<Answered, CommandError> {
        let Some(first) = keys.first() else { return Err(CommandError::Rejected("ERR a script without keys".into())) };
        let fill = &fill;
        self.attempt(first, lost, Some(script), |connection| async move {
            let mut command = script.call(&connection, keys.len() as u64).await?;
            keys.iter().for_each(|key| command.push(key));
            fill(&connection, &mut command);
            Ok(command)
        })
        .await
    }

    async fn attempt<F: Future<Output = Result<Command, CommandError>>>(
        &self,
        key: &[u8],
        lost: OnLostReply,
        script: Option<&Script>,
        make: impl Fn(Arc<RedisConnection>) -> F,
    ) -> Result<Answered, CommandError> {
        let deadline = Instant::now() + PATIENCE;
        let mut asking: Option<Address> = None;
        // An answer was lost: whatever is said of later tries, it may have been done.
        let mut perhaps = false;
        loop {
            let connection = match asking.take() {
                Some(address) => {
                    self.known_server(&address).commands.ready(deadline).await.map(|connection| (connection, true))
                }
                None => match self.server_of(key) {
                    Some(server) => server.commands.ready(deadline).await.map(|connection| (connection, false)),
                    None => Err("nobody has this slot of the Redis Cluster".into()),
                },
            };
            let fault = match connection {
                Err(reason) => CommandError::NotExecuted(reason.as_ref().into()),
                Ok((connection, asked)) => {
                    let done = match make(connection.clone()).await {
                        Ok(command) if asked => connection.ask_after(&Command::new("ASKING"), &command).await,
                        Ok(command) => connection.ask(&command).await,
                        Err(fault) => Err(fault),
                    };
                    match done {
                        Ok(value) => return Ok((value, connection)),
                        Err(CommandError::Unconfirmed) if lost == OnLostReply::Report => {
                            return Err(CommandError::Unconfirmed);
                        }
                        Err(CommandError::Rejected(error)) => match ErrorReply::of(&error) {
                            ErrorReply::Other => return Err(CommandError::Rejected(error)),
                            ErrorReply::Moved(slot, address) => {
                                self.moved(slot, &address);
                                CommandError::NotExecuted(error)
                            }
                            ErrorReply::Ask(address) => {
                                asking = Some(address);
                                CommandError::NotExecuted(error)
                            }
                            ErrorReply::NoScript => {
                                if let Some(script) = script
                                    && let Err(CommandError::Rejected(error)) = script.load(&connection).await
                                    && ErrorReply::of(&error) == ErrorReply::Other
                                {
                                    return Err(CommandError::Rejected(error));
                                }
                                CommandError::NotExecuted(error)
                            }
                            ErrorReply::NotMaster => {
                                // It was one. Who is now, the lane finds out.
                                connection.close();
                                self.doubt();
                                CommandError::NotExecuted(error)
                            }
                            ErrorReply::NotNow => {
                                self.doubt();
                                sleep(PAUSE.mul_f64(0.5 + fastrand::f64())).await;
                                CommandError::NotExecuted(error)
                            }
                        },
                        // The connection is up and full: there is no use in trying again, and no end to it.
                        Err(fault @ CommandError::NotExecuted(_)) if !connection.is_closed() => return Err(fault),
                        Err(fault) => {
                            self.doubt();
                            fault
                        }
                    }
                }
            };
            perhaps |= fault == CommandError::Unconfirmed;
            if Instant::now() >= deadline {
                return Err(if perhaps { CommandError::Unconfirmed } else { fault });
            }
            if asking.is_none() && matches!(fault, CommandError::NotExecuted(_)) && self.server_of(key).is_none() {
                self.doubt();
                sleep(PAUSE).await;
            }
        }
    }

    /// The server at an address that the Cluster named; a new one if we did not know it.
    fn known_server(&self, address: &Address) -> Arc<RedisServer> {
        if let Some(server) = self.map.read().servers.get(address) {
            return server.clone();
        }
        let server = self.server_at(Target::Address(address.clone()));
        self.map.write().servers.entry(address.clone()).or_insert(server).clone()
    }

    /// A server says who has the slot.
    pub fn moved(&self, slot: usize, address: &Address) {
        if !self.url.is_cluster() || slot >= SLOTS {
            return;
        }
        let server = self.known_server(address);
        let mut map = self.map.write();
        if let Some(slot) = map.slots.get_mut(slot)
            && !slot.server.as_ref().is_some_and(|known| Arc::ptr_eq(known, &server))
        {
            *slot = Slot { server: Some(server), since: Some(std::time::Instant::now()) };
            drop(map);
            self.changed.send_modify(|n| *n += 1);
        }
        self.doubt();
    }

    /// Looks who has what. True if nothing is in doubt.
    async fn look(&self) -> bool {
        match &self.url.kind {
            TopologyKind::Standalone(_) => true,
            TopologyKind::Sentinel { .. } => self.look_at_master().await,
            TopologyKind::Cluster(seeds) => self.look_at_slots(seeds).await,
        }
    }

    /// A master that was replaced may not know it, and keep its connections.
    async fn look_at_master(&self) -> bool {
        // Those there are before anybody is asked: what is said then may be older than a connection that is made meanwhile.
        let connections: Vec<_> = self.servers().iter().filter_map(|server| server.commands.connection()).collect();
        let Ok(address) = master(&self.url).await else { return true };
        for connection in connections {
            if connection.address != address && !connection.is_closed() {
                tracing::warn!(was = %connection.address, now = %address, "Sentinel names another master");
                connection.close();
                self.changed.send_modify(|n| *n += 1);
            }
        }
        true
    }

    /// Asks some servers at the same time: a single one may be cut off from the rest, and not know who has its slots now.
    async fn look_at_slots(&self, seeds: &[Address]) -> bool {
        let mut servers = self.servers();
        fastrand::shuffle(&mut servers);
        let connections: Vec<_> =
            servers.iter().filter_map(|server| server.commands.connection()).take(WITNESSES).collect();
        let of = connections.len();
        let mut asked: FuturesUnordered<_> = connections
            .iter()
            .map(|connection| async {
                let slots = timeout(PATIENCE, connection.ask(&Command::new("CLUSTER").arg("SLOTS"))).await;
                slots.ok()?.ok().and_then(|slots| ranges(&slots, &connection.address))
            })
            .collect();
        let mut views = Vec::new();
        while let Some(view) = asked.next().await {
            views.extend(view);
            // The usual: they all say the same.
            if let Some(view) = most(&views, of) {
                return self.adopt(view);
            }
        }
        if !views.is_empty() {
            return self.adopt(&agreed(&views));
        }
        let known = servers.iter().filter_map(|server| match &server.target {
            Target::Address(address) => Some(address.clone()),
            Target::Master => None,
        });
        for guide in known.chain(seeds.iter().cloned()) {
            if let Ok(connection) = RedisConnection::open_guide(&self.url, &guide).await
                && let Ok(Ok(slots)) = timeout(PATIENCE, connection.ask(&Command::new("CLUSTER").arg("SLOTS"))).await
                && let Some(ranges) = ranges(&slots, &guide)
            {
                return self.adopt(&ranges);
            }
        }
        false
    }

    /// True if every slot has a server that answers.
    fn adopt(&self, ranges: &[Range]) -> bool {
        let since = Some(std::time::Instant::now());
        let mut slots = vec![Slot::default(); SLOTS];
        let mut owners: BTreeMap<Address, Arc<RedisServer>> = BTreeMap::new();
        for (from, to, address) in ranges {
            let server = owners.entry(address.clone()).or_insert_with(|| self.known_server(address)).clone();
            slots[*from..=*to].fill(Slot { server: Some(server), since });
        }
        let whole = slots.iter().all(|slot| slot.server.is_some());
        let answering = owners.values().all(|server| server.commands.connection().is_some());
        let mut map = self.map.write();
        let fresh = map.slots.is_empty();
        let mut moved = fresh;
        for (n, slot) in slots.iter_mut().enumerate() {
            let before = map.slots.get(n);
            let same = match (before.and_then(|slot| slot.server.as_ref()), &slot.server) {
                (Some(was), Some(is)) => Arc::ptr_eq(was, is),
                (None, None) => true,
                _ => false,
            };
            match before {
                Some(before) if same => slot.since = before.since,
                _ if fresh => slot.since = None,
                _ => moved = true,
            }
        }
        map.slots = slots;
        let gone: Vec<_> = map.servers.keys().filter(|address| !owners.contains_key(*address)).cloned().collect();
        let gone: Vec<_> = gone.iter().filter_map(|address| map.servers.remove(address)).collect();
        drop(map);
        if !gone.is_empty() {
            tokio::spawn(async move {
                sleep(LEAVE).await;
                drop(gone);
            });
        }
        if moved {
            self.changed.send_modify(|n| *n += 1);
        }
        whole && answering
    }
}

impl Drop for Topology {
    fn drop(&mut self) {
        if let Some(guard) = self.guard.lock().take() {
            guard.abort();
        }
    }
}

impl RedisServer {
    /// The connection for commands, if there is one.
    pub fn connection(&self) -> Option<Arc<RedisConnection>> {
        self.commands.connection()
    }
}

/// The name of the only server there is: its address may change.
fn only() -> Address {
    Address { host: "master".into(), port: 1 }
}

/// Looks at the servers now and then, and at once when somebody has doubts.
async fn guard(topology: Weak<Topology>) {
    loop {
        let (pause, doubt) = {
            let Some(this) = topology.upgrade() else { return };
            let pause = match this.look().await {
                false => ALARM,
                true if matches!(this.url.kind, TopologyKind::Sentinel { .. }) => WATCH,
                true => CALM,
            };
            (pause, this.doubt.clone())
        };
        let _ = timeout(pause, doubt.notified()).await;
        // Everybody has the same doubt at the same time.
        sleep(PAUSE).await;
    }
}

/// What an error of Redis means for the command: in none of these cases was anything done.
#[derive(Debug, PartialEq, Eq)]
pub enum ErrorReply {
    Moved(usize, Address),
    Ask(Address),
    NoScript,
    /// A replica.
    NotMaster,
    /// Later: loading, handing over, without a majority.
    NotNow,
    /// It will not be different the next time.
    Other,
}

impl ErrorReply {
    pub fn of(error: &str) -> Self {
        let mut words = error.split(' ');
        let code = words.next().unwrap_or_default();
        let mut place = || {
            let slot = words.next()?.parse().ok()?;
            Some((slot, Address::parse(words.next()?, 6379).ok()?))
        };
        match code {
            "MOVED" => place().map_or(ErrorReply::NotNow, |(slot, address)| ErrorReply::Moved(slot, address)),
            "ASK" => place().map_or(ErrorReply::NotNow, |(_, address)| ErrorReply::Ask(address)),
            "NOSCRIPT" => ErrorReply::NoScript,
            "READONLY" => ErrorReply::NotMaster,
            "TRYAGAIN" | "LOADING" | "CLUSTERDOWN" | "MASTERDOWN" | "BUSY" | "UNBLOCKED" => ErrorReply::NotNow,
            _ => ErrorReply::Other,
        }
    }
}

/// The slot of a key: of what stands between the first `{` and the next `}`, if anything does.
pub fn slot(key: &[u8]) -> usize {
    let tag = memchr::memchr(b'{', key).and_then(|open| {
        let rest = &key[open + 1..];
        memchr::memchr(b'}', rest).filter(|close| *close > 0).map(|close| &rest[..close])
    });
    usize::from(crc16(tag.unwrap_or(key))) % SLOTS
}

/// CRC-16/XMODEM, as Redis Cluster has it.
fn crc16(bytes: &[u8]) -> u16 {
    bytes.iter().fold(0, |crc, byte| {
        (0..8).fold(crc ^ u16::from(*byte) << 8, |crc, _| if crc & 0x8000 == 0 { crc << 1 } else { crc << 1 ^ 0x1021 })
    })
}

/// From this slot to that one, and who has them.
type Range = (usize, usize, Address);

/// What most servers say of each slot; where they are at odds, what one of them says.
fn agreed(views: &[Vec<Range>]) -> Vec<Range> {
    let owners = views.iter().map(|view| {
        let mut owners = vec![None; SLOTS];
        view.iter().for_each(|(from, to, address)| owners[*from..=*to].fill(Some(address)));
        owners
    });
    let owners: Vec<Vec<Option<&Address>>> = owners.collect();
    let mut ranges: Vec<Range> = Vec::new();
    for slot in 0..SLOTS {
        let said: Vec<_> = owners.iter().map(|owners| owners[slot]).collect();
        let Some(owner) = most(&said, said.len()).or(said.first()).copied().flatten() else { continue };
        match ranges.last_mut() {
            Some((_, to, address)) if *to + 1 == slot && address == owner => *to = slot,
            _ => ranges.push((slot, slot, owner.clone())),
        }
    }
    ranges
}

/// What CLUSTER SLOTS says: ranges and their masters.
fn ranges(slots: &Value, asked: &Address) -> Option<Vec<Range>> {
    let mut ranges = Vec::new();
    for range in slots.list()? {
        let [from, to, master, ..] = range.list()? else { return None };
        let (from, to) = (from.int()? as usize, to.int()? as usize);
        let [host, port, ..] = master.list()? else { return None };
        let host = match host.text() {
            // It does not know its own name: then it is where it was asked.
            None | Some("" | "?") => asked.host.clone(),
            Some(host) => host.into(),
        };
        if from > to || to >= SLOTS {
            return None;
        }
        ranges.push((from, to, Address { host, port: u16::try_from(port.int()?).ok()? }));
    }
    (!ranges.is_empty()).then_some(ranges)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slots_are_those_of_redis() {
        // As CLUSTER KEYSLOT answers.
        assert_eq!(crc16(b"123456789"), 0x31c3);
        assert_eq!((slot(b"foo"), slot(b"weir:{foo}:m"), slot(b"{}foo")), (12182, 12182, slot(b"{}foo")));
        assert_ne!(slot(b"{}foo"), slot(b"foo"));
    }

    #[test]
    fn most_of_the_servers_are_believed() {
        let at = |port| Address { host: "h".into(), port };
        let (old, new) = (vec![(0, 99, at(1)), (100, 16383, at(2))], vec![(0, 99, at(3)), (100, 16383, at(2))]);
        for views in [[&old, &new, &new], [&new, &old, &new], [&new, &new, &old]] {
            assert_eq!(agreed(&views.map(Clone::clone)), new);
        }
        // Slots may be on their way: each is decided by itself.
        let moving = vec![(0, 99, at(3)), (100, 200, at(1)), (201, 16383, at(2))];
        assert_eq!(agreed(&[old.clone(), new.clone(), moving.clone()]), new);
        let half = vec![(0, 99, at(3))];
        assert_eq!(agreed(&[half.clone(), new.clone(), half.clone()]), half, "nobody has the rest");
        assert_eq!(agreed(&[moving.clone(), old]), moving, "at odds");
    }

    #[test]
    fn refusals_are_told_apart() {
        let at = |port| Address { host: "h".into(), port };
        assert_eq!(ErrorReply::of("MOVED 7 h:1"), ErrorReply::Moved(7, at(1)));
        assert_eq!(ErrorReply::of("ASK 7 h:2"), ErrorReply::Ask(at(2)));
        assert_eq!(ErrorReply::of("NOSCRIPT No matching script."), ErrorReply::NoScript);
        assert_eq!(ErrorReply::of("LOADING Redis is loading"), ErrorReply::NotNow);
        assert_eq!(ErrorReply::of("OOM command not allowed"), ErrorReply::Other);
    }
}
