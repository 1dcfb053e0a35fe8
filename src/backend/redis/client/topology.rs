//! [`Topology`]: the servers of one Redis, and which of them owns which key.
//!
//! Standalone and Sentinel are one server, whose address is looked up for each connection. A Redis Cluster is several,
//! each with some of 16,384 slots; the text in a key's braces decides its slot.

use std::{
    collections::{BTreeMap, BTreeSet},
    future::Future,
    sync::{Arc, Weak},
    time::Duration,
};

use futures_util::{StreamExt, stream::FuturesUnordered};
use parking_lot::{Mutex, RwLock};
use redis::{Cmd, FromRedisValue, Value, cmd};
use tokio::{
    sync::{Notify, watch},
    task::JoinHandle,
    time::{Instant, sleep, timeout, timeout_at},
};

use super::{
    connection::RedisConnection,
    error_reply::ErrorReply,
    majority::majority,
    pipeline::{CommandError, NoPush, parse},
    reconnect::{ConnectTo, MakePushHandler, ReconnectingConnection},
    script::Script,
    sentinel,
    slots::{SLOTS, SlotRange, merge_views, parse_slots, slot},
    url::{Address, RedisUrl, TopologyKind},
};
use crate::metrics::{Metrics, RedisConnectionKind};

/// How long a command may take in all: the wait for a connection, or for a server that is loading or handing over a slot,
/// and for the reply. A little less than the two seconds within which clients get an answer.
const PATIENCE: Duration = Duration::from_millis(1_800);
/// Between two attempts.
const PAUSE: Duration = Duration::from_millis(25);
/// How often the slot map is read while nothing seems wrong: servers report moved slots by themselves...
const CALM: Duration = Duration::from_secs(5);
/// ...and how often Sentinel is asked for the master: one that was suspended while it was replaced takes writes that
/// will be lost until Sentinel demotes it, which takes ten seconds...
const WATCH: Duration = Duration::from_secs(1);
/// ...and how often the slot map is read while something does.
const ALARM: Duration = Duration::from_millis(300);
/// After Redis was away, or a slot has moved, every live node is connected to it within this.
const SETTLED: Duration = Duration::from_secs(3);
/// Servers of a Cluster that are asked for the slot map at the same time.
const WITNESSES: usize = 5;
/// A server that has lost its slots may still owe replies for this long.
const LEAVE: Duration = Duration::from_secs(5);

/// One server, with the connection for commands.
pub(crate) struct RedisServer {
    connect_to: ConnectTo,
    commands: ReconnectingConnection,
    /// The generation of the server, and the Unix second of its clock since which it is known.
    known: Mutex<(Box<str>, u64)>,
}

pub struct Topology {
    pub(crate) url: Arc<RedisUrl>,
    pub(crate) metrics: Arc<Metrics>,
    map: RwLock<ServerMap>,
    /// The map may be outdated.
    doubt: Arc<Notify>,
    changed: watch::Sender<u64>,
    refresher: Mutex<Option<JoinHandle<()>>>,
}

#[derive(Default)]
struct ServerMap {
    servers: BTreeMap<Address, Arc<RedisServer>>,
    /// Of a Cluster; else empty.
    slots: Vec<SlotOwner>,
}

#[derive(Clone, Default)]
struct SlotOwner {
    server: Option<Arc<RedisServer>>,
    /// When the slot was found there, if it was elsewhere before.
    since: Option<std::time::Instant>,
}

/// The treatment of a command whose reply was lost.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OnLostReply {
    /// It is retried: it is idempotent.
    Retry,
    /// The caller gets [`CommandError::Unconfirmed`].
    Report,
}

/// When a command that has no result yet fails.
pub(crate) type Deadline = Instant;

/// A reply, and the connection that it came from.
pub type CommandResult<T> = Result<(T, Arc<RedisConnection>), CommandError>;

/// The deadline of a command that begins now.
pub(crate) fn deadline() -> Deadline {
    Instant::now() + PATIENCE
}

impl Topology {
    /// Begins to connect. Needs a tokio runtime.
    pub fn start(url: RedisUrl, metrics: Arc<Metrics>) -> Arc<Self> {
        metrics.use_redis();
        let topology = Arc::new(Topology {
            url: Arc::new(url),
            metrics,
            map: RwLock::default(),
            doubt: Arc::default(),
            changed: watch::Sender::new(0),
            refresher: Mutex::default(),
        });
        if !topology.is_cluster() {
            topology.map.write().servers.insert(only(), topology.server_at(ConnectTo::Master));
        }
        *topology.refresher.lock() = Some(tokio::spawn(refresh(Arc::downgrade(&topology))));
        topology
    }

    fn server_at(&self, connect_to: ConnectTo) -> Arc<RedisServer> {
        let commands = self.connect(&connect_to, RedisConnectionKind::Commands, Arc::new(|_| Arc::new(NoPush)));
        Arc::new(RedisServer { connect_to, commands, known: Mutex::default() })
    }

    /// Opens another connection to a server.
    pub(crate) fn connect(
        &self,
        to: &ConnectTo,
        kind: RedisConnectionKind,
        handlers: MakePushHandler,
    ) -> ReconnectingConnection {
        ReconnectingConnection::start(self.url.clone(), to.clone(), kind, handlers, self.metrics.clone())
    }

    /// Waits until every server is connected. The error is the reason why one is not.
    pub async fn ready(&self, patience: Duration) -> Result<(), String> {
        let deadline = Instant::now() + patience;
        let mut reason = "no server replies".to_owned();
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

    pub(crate) fn is_cluster(&self) -> bool {
        self.url.is_cluster()
    }

    /// All servers: the masters of a Cluster.
    pub(crate) fn servers(&self) -> Vec<Arc<RedisServer>> {
        self.map.read().servers.values().cloned().collect()
    }

    /// The server that owns the slot of `key`, and since when, if the slot has moved there.
    fn owner_of(&self, key: &[u8]) -> Option<(Arc<RedisServer>, Option<std::time::Instant>)> {
        let map = self.map.read();
        match self.is_cluster() {
            true => map.slots.get(slot(key)).and_then(|slot| Some((slot.server.clone()?, slot.since))),
            false => map.servers.values().next().map(|server| (server.clone(), None)),
        }
    }

    /// The servers that own slots.
    pub(crate) fn slot_owners(&self) -> Vec<Address> {
        let map = self.map.read();
        let owns = |server: &Arc<RedisServer>| {
            map.slots.iter().any(|slot| slot.server.as_ref().is_some_and(|owner| Arc::ptr_eq(owner, server)))
        };
        let owners = map.servers.iter().filter(|(_, server)| !self.is_cluster() || owns(server));
        owners.map(|(address, _)| address.clone()).collect()
    }

    /// The name of the server that owns the slot of `key`, and how to connect to it.
    pub(crate) fn owner_address(&self, key: &[u8]) -> Option<(Address, ConnectTo)> {
        let connect_to = self.owner_of(key)?.0.connect_to.clone();
        match &connect_to {
            ConnectTo::Address(address) => Some((address.clone(), connect_to)),
            ConnectTo::Master => Some((only(), connect_to)),
        }
    }

    /// The Unix second from which on a key that is absent is known never to have existed: before it, this process of
    /// Redis was not known, or did not own the slot. None if that cannot be known, because Redis may evict keys.
    pub(crate) fn horizon(&self, key: &[u8], connection: &RedisConnection) -> Option<u64> {
        if connection.server.evicts {
            return None;
        }
        let (server, since) = self.owner_of(key)?;
        let mut known = server.known.lock();
        if known.0 != connection.server.generation {
            *known = (connection.server.generation.clone(), connection.server.since);
        }
        Some(since.map_or(known.1, |since| known.1.max(connection.time_at(since) / 1000 + 1)))
    }

    /// The command that publishes: in a Cluster to the server that owns the slot, and not to all servers.
    pub(crate) fn publish_verb(&self) -> &'static str {
        if self.is_cluster() { "SPUBLISH" } else { "PUBLISH" }
    }

    /// Whether the absence of a subscriber or key behind `connection` is conclusive: directly after Redis was away, or
    /// the slot of `key` has moved, the other nodes may not have reconnected yet.
    pub(crate) fn is_settled(&self, key: &[u8], connection: &RedisConnection) -> bool {
        let moved = self.map.read().slots.get(slot(key)).and_then(|slot| slot.since);
        connection.age() > SETTLED && moved.is_none_or(|moved| moved.elapsed() > SETTLED)
    }

    /// Changes whenever a slot is found at another server, or another master is named.
    pub(crate) fn changes(&self) -> watch::Receiver<u64> {
        self.changed.subscribe()
    }

    /// Has the map refreshed soon.
    pub(super) fn doubt(&self) {
        self.doubt.notify_one();
    }

    /// Runs a command about `key` on the server that owns it.
    ///
    /// Retries for almost two seconds a command that was not executed, and one that may have been only as `lost` says.
    pub async fn call<T: FromRedisValue>(&self, key: &[u8], lost: OnLostReply, command: &Cmd) -> CommandResult<T> {
        self.call_while(key, lost, command, || true).await
    }

    /// Runs a command as [`call`](Self::call) does, but gives up, as rejected, before an attempt for which `wanted` is
    /// false.
    pub(crate) async fn call_while<T: FromRedisValue>(
        &self,
        key: &[u8],
        lost: OnLostReply,
        command: &Cmd,
        wanted: impl Fn() -> bool,
    ) -> CommandResult<T> {
        let make = |_| {
            let make = if wanted() { Ok(command.clone()) } else { Err(CommandError::Rejected("ERR given up".into())) };
            async { make }
        };
        let owner = || Some(self.owner_of(key)?.0);
        let (value, connection) = self.attempt(owner, lost, None, deadline(), make).await?;
        Ok((parse(value)?, connection))
    }

    /// Runs an idempotent command on one server.
    pub(crate) async fn call_at<T: FromRedisValue>(
        &self,
        server: &Arc<RedisServer>,
        command: &Cmd,
    ) -> CommandResult<T> {
        let make = |_| async { Ok(command.clone()) };
        let owner = || Some(server.clone());
        let (value, connection) = self.attempt(owner, OnLostReply::Retry, None, deadline(), make).await?;
        Ok((parse(value)?, connection))
    }

    /// Runs a script about keys of one slot. `fill` appends the arguments for the server that will run it.
    pub async fn run<T: FromRedisValue>(
        &self,
        script: &'static Script,
        keys: &[&[u8]],
        lost: OnLostReply,
        fill: impl Fn(&RedisConnection, &mut Cmd),
    ) -> CommandResult<T> {
        self.run_by(deadline(), script, keys, lost, fill).await
    }

    /// Runs a script as [`run`](Self::run) does. After `deadline` it is not sent any more, and its reply is not awaited.
    pub(crate) async fn run_by<T: FromRedisValue>(
        &self,
        deadline: Deadline,
        script: &'static Script,
        keys: &[&[u8]],
        lost: OnLostReply,
        fill: impl Fn(&RedisConnection, &mut Cmd),
    ) -> CommandResult<T> {
        let Some(first) = keys.first() else { return Err(CommandError::Rejected("ERR a script without keys".into())) };
        let fill = &fill;
        let make = |connection: Arc<RedisConnection>| async move {
            let mut command = script.call(&connection, keys).await?;
            fill(&connection, &mut command);
            Ok(command)
        };
        let owner = || Some(self.owner_of(first)?.0);
        let (value, connection) = self.attempt(owner, lost, Some(script), deadline, make).await?;
        Ok((parse(value)?, connection))
    }

    async fn attempt<F: Future<Output = Result<Cmd, CommandError>>>(
        &self,
        owner: impl Fn() -> Option<Arc<RedisServer>>,
        lost: OnLostReply,
        script: Option<&Script>,
        deadline: Deadline,
        make: impl Fn(Arc<RedisConnection>) -> F,
    ) -> CommandResult<Value> {
        let mut ask: Option<Address> = None;
        // Once a reply was lost, the command may have been executed, whatever later attempts say.
        let mut unconfirmed = false;
        loop {
            let redirected = ask.is_some();
            let server = match ask.take() {
                Some(address) => Some(self.server(&address)),
                None => owner(),
            };
            let connection = match &server {
                Some(server) => server.commands.ready(deadline).await,
                None => Err("no server of the Redis Cluster owns this slot".into()),
            };
            let error = match connection {
                Err(reason) => CommandError::NotExecuted(reason.as_ref().into()),
                Ok(_) if Instant::now() >= deadline => CommandError::NotExecuted("Redis is too slow".into()),
                Ok(connection) => {
                    // A server that accepts commands and does not reply, as a suspended one, keeps its connection.
                    let reply = match timeout_at(deadline, make(connection.clone())).await {
                        Ok(Ok(command)) => {
                            let reply = match redirected {
                                true => connection.ask_after(&cmd("ASKING"), &command),
                                false => connection.ask(&command),
                            };
                            timeout_at(deadline, reply).await.unwrap_or(Err(CommandError::Unconfirmed))
                        }
                        Ok(Err(error)) => Err(error),
                        Err(_) => Err(CommandError::NotExecuted("Redis does not reply".into())),
                    };
                    match reply {
                        Ok(value) => return Ok((value, connection)),
                        Err(CommandError::Unconfirmed) if lost == OnLostReply::Report => {
                            return Err(CommandError::Unconfirmed);
                        }
                        Err(CommandError::Rejected(error)) => {
                            match ErrorReply::parse(&error, &connection.address) {
                                ErrorReply::Final => return Err(CommandError::Rejected(error)),
                                ErrorReply::Moved(slot, address) => self.moved(slot, &address),
                                ErrorReply::Ask(address) => ask = Some(address),
                                ErrorReply::NoScript => {
                                    if let Some(script) = script
                                        && let Ok(Err(CommandError::Rejected(error))) =
                                            timeout_at(deadline, script.load(&connection)).await
                                        && ErrorReply::parse(&error, &connection.address) == ErrorReply::Final
                                    {
                                        return Err(CommandError::Rejected(error));
                                    }
                                }
                                ErrorReply::NotMaster => {
                                    // It was the master; the next connection goes to the present one.
                                    connection.close();
                                    self.doubt();
                                }
                                ErrorReply::TryAgain => {
                                    self.doubt();
                                    sleep(PAUSE.mul_f64(0.5 + fastrand::f64())).await;
                                }
                            }
                            CommandError::NotExecuted(error)
                        }
                        // The connection is up and its queue is full: a retry would only add load.
                        Err(error @ CommandError::NotExecuted(_)) if !connection.is_closed() => return Err(error),
                        Err(error) => {
                            self.doubt();
                            error
                        }
                    }
                }
            };
            unconfirmed |= error == CommandError::Unconfirmed;
            if Instant::now() >= deadline {
                return Err(if unconfirmed { CommandError::Unconfirmed } else { error });
            }
            if ask.is_none() && matches!(error, CommandError::NotExecuted(_)) && owner().is_none() {
                self.doubt();
                sleep(PAUSE).await;
            }
        }
    }

    /// The server at an address that the Cluster named, which may be new.
    fn server(&self, address: &Address) -> Arc<RedisServer> {
        if let Some(server) = self.map.read().servers.get(address) {
            return server.clone();
        }
        let server = self.server_at(ConnectTo::Address(address.clone()));
        self.map.write().servers.entry(address.clone()).or_insert(server).clone()
    }

    /// A server has replied that another one owns the slot.
    pub(super) fn moved(&self, slot: usize, address: &Address) {
        if !self.is_cluster() || slot >= SLOTS {
            return;
        }
        let server = self.server(address);
        let mut map = self.map.write();
        if let Some(slot) = map.slots.get_mut(slot)
            && !slot.server.as_ref().is_some_and(|known| Arc::ptr_eq(known, &server))
        {
            *slot = SlotOwner { server: Some(server), since: Some(std::time::Instant::now()) };
            drop(map);
            self.changed.send_modify(|n| *n += 1);
        }
        self.doubt();
    }

    /// Refreshes the map. True if nothing is in doubt.
    async fn refresh(&self) -> bool {
        match &self.url.kind {
            TopologyKind::Standalone(_) => true,
            TopologyKind::Sentinel { .. } => {
                self.refresh_master().await;
                true
            }
            TopologyKind::Cluster(seeds) => self.refresh_slots(seeds).await,
        }
    }

    /// Closes connections to a master that was replaced: it may not know, and keep them.
    async fn refresh_master(&self) {
        // Taken before Sentinel is asked: its reply may be older than a connection that is opened meanwhile.
        let connections: Vec<_> = self.servers().iter().filter_map(|server| server.commands.get()).collect();
        let Ok(address) = sentinel::master(&self.url).await else { return };
        for connection in connections {
            if connection.address != address && !connection.is_closed() {
                tracing::warn!(was = %connection.address, now = %address, "Sentinel names another master");
                connection.close();
                self.changed.send_modify(|n| *n += 1);
            }
        }
    }

    /// Asks several servers at the same time: a single one may be partitioned from the rest, and have an old map.
    async fn refresh_slots(&self, seeds: &[Address]) -> bool {
        let slots_seen_by = async |connection: &RedisConnection| {
            let reply = connection.ask(cmd("CLUSTER").arg("SLOTS")).parse::<Vec<Vec<Value>>>();
            parse_slots(&timeout(PATIENCE, reply).await.ok()?.ok()?, &connection.address)
        };
        let mut servers = self.servers();
        fastrand::shuffle(&mut servers);
        let connections: Vec<_> = servers.iter().filter_map(|server| server.commands.get()).take(WITNESSES).collect();
        let mut replies: FuturesUnordered<_> = connections.iter().map(|connection| slots_seen_by(connection)).collect();
        let mut views = Vec::new();
        while let Some(view) = replies.next().await {
            views.extend(view);
            // The usual case: all of them agree.
            if let Some(view) = majority(&views, connections.len()) {
                return self.adopt(view);
            }
        }
        if !views.is_empty() {
            return self.adopt(&merge_views(&views));
        }
        let known = servers.iter().filter_map(|server| match &server.connect_to {
            ConnectTo::Address(address) => Some(address.clone()),
            ConnectTo::Master => None,
        });
        // All at the same time: one that does not reply must not delay the others.
        let guides: BTreeSet<Address> = known.chain(seeds.iter().cloned()).collect();
        let ask = async |guide: &Address| {
            let connection = RedisConnection::open_guide(&self.url, guide).await.ok()?;
            slots_seen_by(&connection).await
        };
        let mut replies: FuturesUnordered<_> = guides.iter().map(ask).collect();
        while let Some(reply) = replies.next().await {
            if let Some(ranges) = reply {
                return self.adopt(&ranges);
            }
        }
        false
    }

    /// Replaces the slot map. True if every slot has a server that is connected.
    fn adopt(&self, ranges: &[SlotRange]) -> bool {
        let since = Some(std::time::Instant::now());
        let mut slots = vec![SlotOwner::default(); SLOTS];
        let mut owners: BTreeMap<Address, Arc<RedisServer>> = BTreeMap::new();
        for (from, to, address) in ranges {
            let server = owners.entry(address.clone()).or_insert_with(|| self.server(address)).clone();
            slots[*from..=*to].fill(SlotOwner { server: Some(server), since });
        }
        let complete = slots.iter().all(|slot| slot.server.is_some());
        let connected = owners.values().all(|server| server.commands.get().is_some());
        let mut map = self.map.write();
        let first = map.slots.is_empty();
        let mut moved = first;
        for (n, slot) in slots.iter_mut().enumerate() {
            let before = map.slots.get(n);
            let same = match (before.and_then(|slot| slot.server.as_ref()), &slot.server) {
                (Some(was), Some(is)) => Arc::ptr_eq(was, is),
                (None, None) => true,
                _ => false,
            };
            match before {
                Some(before) if same => slot.since = before.since,
                _ if first => slot.since = None,
                _ => moved = true,
            }
        }
        map.slots = slots;
        let gone: Vec<_> = map.servers.extract_if(.., |address, _| !owners.contains_key(address)).collect();
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
        complete && connected
    }
}

impl Drop for Topology {
    fn drop(&mut self) {
        if let Some(refresher) = self.refresher.lock().take() {
            refresher.abort();
        }
    }
}

/// The name of the only server, whose address may change.
fn only() -> Address {
    Address { host: "master".into(), port: 1 }
}

/// Refreshes the map at intervals, and soon after each doubt.
async fn refresh(topology: Weak<Topology>) {
    loop {
        let (pause, doubt) = {
            let Some(this) = topology.upgrade() else { return };
            let pause = match this.refresh().await {
                false => ALARM,
                true if matches!(this.url.kind, TopologyKind::Sentinel { .. }) => WATCH,
                true => CALM,
            };
            (pause, this.doubt.clone())
        };
        let _ = timeout(pause, doubt.notified()).await;
        // All callers have the same doubt at the same time.
        sleep(PAUSE).await;
    }
}
