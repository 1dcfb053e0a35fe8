//! [`RedisConnection`], one connection to one server, for as long as it lasts.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering::Relaxed},
    },
    time::{Duration, Instant},
};

use redis::{Cmd, InfoDict, cmd};
use tokio::time::{sleep, timeout};

use super::{
    pipeline::{CommandError, HEARTBEAT, NoPush, PendingReply, Pipeline, PushHandler},
    tls,
    url::{Address, RedisUrl},
};

/// The warning about evictions is logged once, and not for each connection.
static EVICTION_REPORTED: AtomicBool = AtomicBool::new(false);

const CONNECT: Duration = Duration::from_secs(4);

/// The identity and settings that a server reported when the connection was opened.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct ServerIdentity {
    /// Changes whenever the process is started or promoted to master: writes from before may be lost since.
    pub(crate) generation: Box<str>,
    /// It may evict any key when its memory is full.
    pub(crate) evicts: bool,
    /// Its clock when the connection was opened, Unix milliseconds.
    pub(crate) time: u64,
    /// The Unix second since which it has been the master, as far as can be known.
    pub(crate) since: u64,
}

pub struct RedisConnection {
    /// Unique in this process.
    pub(crate) number: u64,
    pub(crate) address: Address,
    pub(crate) server: ServerIdentity,
    opened: Instant,
    pipeline: Arc<Pipeline>,
}

impl RedisConnection {
    /// Connects, and checks that the server is a master that weir can use. The error is a sentence.
    pub(super) async fn open(
        url: &RedisUrl,
        address: &Address,
        name: &str,
        handlers: &(dyn Fn(u64) -> Arc<dyn PushHandler> + Send + Sync),
    ) -> Result<Self, String> {
        let opening = async {
            let mut connection = Self::connect(url, address, handlers).await?;
            connection.server = connection.handshake(url, name).await?;
            connection.opened = Instant::now();
            tokio::spawn(watch_role(connection.pipeline.clone(), connection.server.generation.clone()));
            Ok(connection)
        };
        timeout(CONNECT, opening).await.unwrap_or_else(|_| Err(format!("{address}: no reply")))
    }

    /// Connects to a server that is only asked for the addresses of others: a sentinel, or any node of a Redis Cluster.
    pub(super) async fn open_guide(url: &RedisUrl, address: &Address) -> Result<Self, String> {
        let opening = async {
            let connection = Self::connect(url, address, &|_| Arc::new(NoPush)).await?;
            // A sentinel has credentials of its own, and most have none.
            if url.is_cluster() {
                connection.hello(url, "weir-guide").await?;
            }
            Ok(connection)
        };
        timeout(CONNECT, opening).await.unwrap_or_else(|_| Err(format!("{address}: no reply")))
    }

    async fn connect(
        url: &RedisUrl,
        address: &Address,
        handlers: &(dyn Fn(u64) -> Arc<dyn PushHandler> + Send + Sync),
    ) -> Result<Self, String> {
        static NUMBER: AtomicU64 = AtomicU64::new(1);
        let stream = tls::connect(address, url.tls).await.map_err(|error| format!("{address}: {error}"))?;
        let number = NUMBER.fetch_add(1, Relaxed);
        let pipeline = Pipeline::start(stream, handlers(number));
        let server = ServerIdentity { generation: "".into(), evicts: false, time: 0, since: 0 };
        Ok(RedisConnection { number, address: address.clone(), server, opened: Instant::now(), pipeline })
    }

    async fn hello(&self, url: &RedisUrl, name: &str) -> Result<(), String> {
        let mut hello = cmd("HELLO");
        hello.arg(3);
        if let Some(password) = &url.password {
            hello.arg("AUTH").arg(url.user.as_deref().unwrap_or("default")).arg(password);
        }
        match self.ask(hello.arg("SETNAME").arg(name)).await {
            Ok(_) => Ok(()),
            Err(CommandError::Rejected(error))
                if error.starts_with("ERR unknown command") || error.starts_with("NOPROTO") =>
            {
                Err(format!("{} is too old: weir needs Redis 6.2 or newer, or Valkey", self.address))
            }
            Err(error) => Err(self.explain("HELLO", error)),
        }
    }

    async fn handshake(&self, url: &RedisUrl, name: &str) -> Result<ServerIdentity, String> {
        let at = &self.address;
        self.hello(url, name).await?;
        if url.database > 0 {
            self.ask(cmd("SELECT").arg(url.database)).await.map_err(|error| self.explain("SELECT", error))?;
        }
        let info: InfoDict = self.ask(&cmd("INFO")).parse().await.map_err(|error| self.explain("INFO", error))?;
        let (seconds, micros): (u64, u64) =
            self.ask(&cmd("TIME")).parse().await.map_err(|error| self.explain("TIME", error))?;
        let field = |name: &str| info.get::<String>(name).unwrap_or_default();
        // Valkey reports Redis 7.2.4 in this field.
        let version = field("redis_version");
        let mut numbers = version.split('.').map(|part| part.parse().unwrap_or_default());
        let version = (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0));
        let (needed, what) = match url.is_cluster() {
            true => ((7, 0), "a Redis Cluster (sharded pub/sub)"),
            false => ((6, 2), "Redis"),
        };
        if version < needed {
            let ((major, minor), (is, of)) = (needed, version);
            return Err(format!("{at} is Redis {is}.{of}: of {what} weir needs {major}.{minor} or newer, or Valkey"));
        }
        let clustered = field("redis_mode") == "cluster" || field("cluster_enabled") == "1";
        if clustered && !url.is_cluster() {
            return Err(format!("{at} is part of a Redis Cluster: write redis-cluster://{at}"));
        }
        if !clustered && url.is_cluster() {
            return Err(format!("{at} is not part of a Redis Cluster: write redis://{at}"));
        }
        if field("role") != "master" {
            return Err(format!("{at} is a replica now, not the master"));
        }
        let (run_id, replid) = (field("run_id"), field("master_replid"));
        if run_id.is_empty() || replid.is_empty() {
            return Err(format!("{at} does not report its run_id and master_replid"));
        }
        // As `limits.lua` builds it.
        let generation = format!("{}{}", prefix(&run_id), prefix(&replid)).into();
        let evicts =
            !matches!(&*field("maxmemory"), "" | "0") && !matches!(&*field("maxmemory_policy"), "" | "noeviction");
        if evicts && !EVICTION_REPORTED.swap(true, Relaxed) {
            tracing::warn!(
                server = %at,
                "Redis may evict keys: set maxmemory-policy to noeviction, or events are lost and repeated publishes with \
                 an idempotency key are stored twice"
            );
        }
        // A replica that was promoted does not report when.
        let started_as_master = field("second_repl_offset") == "-1";
        let uptime = if started_as_master { info.get("uptime_in_seconds").unwrap_or(0) } else { 0 };
        let since = seconds.saturating_sub(uptime) + 1;
        Ok(ServerIdentity { generation, evicts, time: seconds * 1000 + micros / 1000, since })
    }

    fn explain(&self, command: &str, error: CommandError) -> String {
        let at = &self.address;
        match error {
            CommandError::Rejected(error) => format!("{at} rejects {command}: {error}"),
            CommandError::NotExecuted(reason) => format!("{at}: {reason}"),
            CommandError::Unconfirmed => format!("{at}: the connection broke at {command}"),
        }
    }

    /// Queues a command at once; the reply may be awaited later, or not at all.
    pub(crate) fn ask(&self, command: &Cmd) -> PendingReply {
        self.pipeline.ask(&[command])
    }

    /// Queues `command` directly behind `first`, as ASKING, whose reply does not matter.
    pub(super) fn ask_after(&self, first: &Cmd, command: &Cmd) -> PendingReply {
        self.pipeline.ask(&[first, command])
    }

    /// Queues a command that is confirmed by pushes and not by a reply, as SUBSCRIBE.
    pub(super) fn send(&self, command: &Cmd) -> Result<(), CommandError> {
        self.pipeline.send(command)
    }

    /// The server's clock at `moment`, Unix milliseconds, and not before the connection was opened.
    pub(super) fn time_at(&self, moment: Instant) -> u64 {
        self.server.time + moment.saturating_duration_since(self.opened).as_millis() as u64
    }

    /// The time since the connection was opened.
    pub(super) fn age(&self) -> Duration {
        self.opened.elapsed()
    }

    /// Ends the connection: commands that were sent are unconfirmed, the others not executed.
    pub(super) fn close(&self) {
        self.pipeline.close();
    }

    pub(super) fn is_closed(&self) -> bool {
        self.pipeline.is_closed()
    }

    /// Completes when the connection has ended.
    pub(super) async fn closed(&self) {
        self.pipeline.closed().await;
    }
}

impl Drop for RedisConnection {
    fn drop(&mut self) {
        self.close();
    }
}

/// Ends a connection whose server is no longer the same master: messages that are published there may reach no
/// subscriber, and what it lost as a replica must begin a new term. A connection without writes would not notice by
/// itself.
async fn watch_role(pipeline: Arc<Pipeline>, generation: Box<str>) {
    let mut info = cmd("INFO");
    info.arg("replication");
    loop {
        tokio::select! {
            () = pipeline.closed() => return,
            () = sleep(HEARTBEAT) => {}
        }
        let Ok(info) = pipeline.ask(&[&info]).parse::<InfoDict>().await else { continue };
        let replid: String = info.get("master_replid").unwrap_or_default();
        let is_master = info.get::<String>("role").is_some_and(|role| role == "master");
        if !is_master || replid.is_empty() || !generation.ends_with(prefix(&replid)) {
            pipeline.close();
        }
    }
}

/// Enough of an id to tell servers apart.
fn prefix(id: &str) -> &str {
    id.get(..16).unwrap_or(id)
}
