//! [`ExaminedServer`]: one Redis server, what it reports about itself, and whether commands work.

use std::{
    collections::HashMap,
    fmt,
    time::{Duration, Instant},
};

use redis::{AsyncConnectionConfig, Cmd, FromRedisValue, ProtocolVersion, RedisError, aio::MultiplexedConnection, cmd};

use super::{
    commands,
    error::{is_rejected, reason},
};
use crate::{
    backend::redis::client::{Address, RedisUrl, crate_client},
    cli::doctor::{
        latency::{Latency, Span},
        report::{Report, unix_time},
    },
    terminal::Failure,
};

const CONNECT: Duration = Duration::from_secs(5);
const REPLY: Duration = Duration::from_secs(10);
const MIB: u64 = 1 << 20;
/// A round trip that slows every publish down.
const SLOW: Duration = Duration::from_millis(2);
/// Longer than a reply of an otherwise idle Redis takes.
const STALLED: Duration = Duration::from_millis(50);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum ServerRole {
    Alone,
    /// The master that Sentinel names.
    Replicated,
    /// A master of a cluster.
    Shard,
}

pub(super) struct ExaminedServer {
    connection: MultiplexedConnection,
    database: u32,
    /// The reply to INFO.
    info: HashMap<String, String>,
    /// The reply to CONFIG GET; empty if that is not permitted.
    settings: HashMap<String, String>,
    resp3: Result<(), String>,
    /// It rejects commands that need memory.
    full: bool,
}

impl ExaminedServer {
    /// `login`: with the credentials of the URL, which sentinels do not have.
    pub(super) async fn connect(url: &RedisUrl, address: &Address, login: bool) -> Result<Self, RedisError> {
        let config =
            || AsyncConnectionConfig::new().set_connection_timeout(Some(CONNECT)).set_response_timeout(Some(REPLY));
        let mut resp3 = Ok(());
        let connection = match crate_client(url, address, login, ProtocolVersion::RESP3)?
            .get_multiplexed_async_connection_with_config(&config())
            .await
        {
            Ok(connection) => connection,
            Err(error) if error.is_io_error() || is_rejected(&error) => return Err(error),
            Err(error) => {
                resp3 = Err(reason(&error));
                crate_client(url, address, login, ProtocolVersion::RESP2)?
                    .get_multiplexed_async_connection_with_config(&config())
                    .await?
            }
        };
        let mut server = ExaminedServer {
            connection,
            database: url.database,
            info: HashMap::new(),
            settings: HashMap::new(),
            resp3,
            full: false,
        };
        // The first command shows whether the credentials are accepted.
        let _: String = server.query(&cmd("PING")).await?;
        Ok(server)
    }

    pub(super) async fn query<T: FromRedisValue>(&mut self, command: &Cmd) -> Result<T, RedisError> {
        command.query_async(&mut self.connection).await
    }

    pub(super) async fn examine(
        &mut self,
        role: ServerRole,
        prefix: &str,
        report: &mut Report<'_>,
    ) -> Result<(), Failure> {
        let info = self.query::<String>(&cmd("INFO")).await;
        self.settings = self.query(cmd("CONFIG").arg("GET").arg("*")).await.unwrap_or_default();
        match &info {
            Ok(info) => {
                self.info = fields(info);
                self.version(role, report)?;
                self.role(report)?;
            }
            Err(error) => report.problem("info", reason(error), "permit INFO to the user (ACL: +info)")?,
        }
        self.commands(role, prefix, report).await?;
        self.latency(prefix, report).await?;
        self.clock(report).await?;
        if info.is_err() {
            // The remaining checks need INFO.
            return Ok(());
        }
        self.persistence(role, report)?;
        self.memory(report)?;
        self.buffers(report)?;
        self.connections(report)?;
        self.replicas(role, report)
    }

    fn field(&self, field: &str) -> &str {
        self.info.get(field).map_or("", String::as_str)
    }

    fn number(&self, field: &str) -> u64 {
        self.field(field).parse().unwrap_or(0)
    }

    /// None if CONFIG GET is not permitted.
    fn setting(&self, name: &str) -> Option<&str> {
        self.settings.get(name).map(String::as_str)
    }

    fn version(&self, role: ServerRole, report: &mut Report<'_>) -> Result<(), Failure> {
        let speaks = self.field("redis_version");
        let (name, version) = match (self.field("valkey_version"), self.field("dragonfly_version")) {
            ("", "") => ("Redis", speaks),
            ("", dragonfly) => ("Dragonfly", dragonfly),
            (valkey, _) => ("Valkey", valkey),
        };
        let found = match name {
            "Redis" => format!("Redis {version}"),
            _ => format!("{name} {version} (as Redis {speaks})"),
        };
        let mut parts = speaks.split('.').map(|part| part.parse::<u32>().unwrap_or(0));
        let speaks = (parts.next().unwrap_or(0), parts.next().unwrap_or(0));
        match (&self.resp3, role) {
            _ if speaks < (6, 2) => report.problem("version", found, "weir needs Redis 6.2 or later, or Valkey")?,
            (Err(reason), _) => {
                let change = "events are pushed over RESP3: is there a proxy that does not support it?";
                report.problem("version", format!("{found}; no RESP3: {reason}"), change)?;
            }
            (_, ServerRole::Shard) if speaks < (7, 0) => {
                report.problem("version", found, "weir needs the sharded pub/sub of Redis Cluster 7.0 or later")?;
            }
            _ if name == "Dragonfly" => report.advice("version", found, "weir is tested with Redis and Valkey")?,
            _ => report.ok("version", format!("{found}, RESP3"))?,
        }
        if self.database != 0 {
            let found = format!("database {}", self.database);
            let change = "pub/sub ignores databases: two buses on one server need different prefixes even in different databases";
            report.advice("database", found, change)?;
        }
        Ok(())
    }

    fn role(&self, report: &mut Report<'_>) -> Result<(), Failure> {
        if self.field("role") == "slave" {
            let found = format!("a replica of {}:{}", self.field("master_host"), self.field("master_port"));
            report.problem("role", found, "weir needs write access: use the URL of the master or of the sentinels")?;
        }
        if self.field("loading") == "1" {
            report.problem("role", "it is still loading its data", "wait until it is ready")?;
        }
        Ok(())
    }

    /// Tries every command that weir uses, on keys that expire.
    async fn commands(&mut self, role: ServerRole, prefix: &str, report: &mut Report<'_>) -> Result<(), Failure> {
        let scratch = format!("{prefix}{{$doctor-{:08x}}}", fastrand::u32(..));
        // Grouped by reason, because each reason has one remedy.
        let mut rejected: Vec<(String, Vec<&str>)> = Vec::new();
        let (mut full, mut denied, mut follows) = (Vec::new(), false, Vec::new());
        let all = commands::all(&scratch, role == ServerRole::Shard);
        for (name, command) in &all {
            let Err(error) = self.query::<redis::Value>(command).await else { continue };
            // Another master of the cluster owns the slot of the keys.
            if matches!(error.code(), Some("MOVED" | "ASK")) {
                continue;
            }
            if error.code() == Some("OOM") {
                full.push(*name);
                continue;
            }
            let why = reason(&error);
            // A consequence: the command that should have written the key failed.
            if error.code() == Some("NOSCRIPT") || why.contains("no such key") {
                follows.push((why, vec![*name]));
                continue;
            }
            denied |= error.code() == Some("NOPERM");
            let why = match error.code() {
                Some("NOPERM") if why.contains("keys used") => format!("keys that begin with {prefix} are not allowed"),
                Some("NOPERM") if why.contains("channels") => {
                    format!("channels that begin with {prefix} are not allowed")
                }
                Some("NOPERM") => "the command is not allowed".to_owned(),
                _ => why,
            };
            match rejected.iter_mut().find(|(known, _)| *known == why) {
                Some((_, names)) if names.contains(name) => {}
                Some((_, names)) => names.push(name),
                None => rejected.push((why, vec![name])),
            }
        }
        let _: Result<redis::Value, _> = self.query(cmd("DEL").arg(&commands::keys(&scratch))).await;
        self.full = !full.is_empty();
        if self.full {
            let (used, most) = (self.number("used_memory"), self.number("maxmemory"));
            let known = match most {
                0 => String::new(),
                _ => format!(", with {} used and a maxmemory of {}", ByteSize(used), ByteSize(most)),
            };
            let found = format!("full: {} are rejected (OOM){known}", full.join(" "));
            report.problem(
                "memory",
                found,
                "publishes fail now: raise maxmemory, or reduce the retention of channels",
            )?;
        } else if rejected.is_empty() {
            // No other finding reports their cause.
            rejected = follows;
        }
        if rejected.is_empty() {
            let all = all.len() - full.len();
            let which = if self.full { "all else that weir uses works" } else { "all that weir uses work" };
            return report.ok("commands", format!("{which} ({all})"));
        }
        let rejected: Vec<String> = rejected.iter().map(|(why, names)| format!("{}: {why}", names.join(" "))).collect();
        let change = match denied {
            true => format!(
                "ACL SETUSER NAME ~{prefix}* &{prefix}* +@all -@admin -@dangerous +info +role +config|get allows what weir needs"
            ),
            false => {
                "weir needs these commands: see the log of Redis, and rename-command in its configuration".to_owned()
            }
        };
        report.problem("commands", rejected.join("; "), change)
    }

    async fn latency(&mut self, prefix: &str, report: &mut Report<'_>) -> Result<(), Failure> {
        let scratch = format!("{prefix}{{$doctor-{:08x}}}", fastrand::u32(..));
        for (check, command) in [("ping", cmd("PING")), ("script", commands::append(&scratch))] {
            let mut taken = Vec::new();
            for _ in 0..200 {
                let began = Instant::now();
                match self.query::<redis::Value>(&command).await {
                    Err(error) if error.is_io_error() => {
                        return report.problem(
                            check,
                            "the connection was lost",
                            "check the log of Redis, and the network",
                        );
                    }
                    // MOVED and ASK count: such a reply takes as long as a small script.
                    Err(error) if !matches!(error.code(), Some("MOVED" | "ASK")) => break,
                    _ => taken.push(began.elapsed()),
                }
            }
            if taken.is_empty() {
                // Rejected; `commands` has reported it.
                continue;
            }
            let latency = Latency::of(taken);
            let found = format!(
                "median {}, p99 {}, slowest of 200 {}",
                Span(latency.median()),
                Span(latency.p99()),
                Span(latency.longest())
            );
            if latency.median() > SLOW {
                report.advice(check, found, "every publish has this latency: run Redis near weir, in the same zone")?;
            } else if latency.p99() > STALLED {
                report.advice(check, found, "see SLOWLOG and LATENCY DOCTOR for the cause of the stalls")?;
            } else {
                report.ok(check, found)?;
            }
        }
        let _: Result<redis::Value, _> = self.query(cmd("DEL").arg(&commands::keys(&scratch))).await;
        Ok(())
    }

    async fn clock(&mut self, report: &mut Report<'_>) -> Result<(), Failure> {
        let (began, requested) = (Instant::now(), unix_time());
        match self.query::<(u64, u32)>(&cmd("TIME")).await {
            Ok((seconds, micros)) => {
                let taken = began.elapsed();
                let theirs = Duration::from_secs(seconds) + Duration::from_micros(micros.into());
                report.clock("the clock of Redis", theirs, requested, taken)
            }
            Err(error) => report.problem("clock", reason(&error), "weir uses TIME: permit it to the user (ACL: +time)"),
        }
    }

    fn persistence(&self, role: ServerRole, report: &mut Report<'_>) -> Result<(), Failure> {
        for (field, what) in
            [("rdb_last_bgsave_status", "the last snapshot"), ("aof_last_write_status", "the last write to the AOF")]
        {
            if self.field(field) == "err" {
                report.problem("persistence", format!("{what} failed"), "is the disk full? see the log of Redis")?;
            }
        }
        let snapshots = self.setting("save").filter(|save| !save.is_empty());
        if self.field("aof_enabled") == "1" {
            let (found, change) = match self.setting("appendfsync") {
                Some("always") => ("AOF, synced at each command: a crash loses no acknowledged event", None),
                Some("no") => (
                    "AOF, synced by the operating system: a crash of the machine may lose about 30 seconds",
                    Some("appendfsync everysec loses one second at most, at little cost"),
                ),
                _ => (
                    "AOF, synced each second: a crash of the machine may lose the last second; readers get a gap",
                    None,
                ),
            };
            return match change {
                Some(change) => report.advice("persistence", found, change),
                None => report.ok("persistence", found),
            };
        }
        let change = "set appendonly yes, appendfsync everysec: then a crash loses one second at most";
        if let Some(snapshots) = snapshots {
            let found =
                format!("snapshots only ({snapshots}): a crash loses the events since the last one; readers get a gap");
            return report.advice("persistence", found, change);
        }
        if self.settings.is_empty() {
            return report.advice("persistence", "no AOF; snapshots are unknown (CONFIG GET is not permitted)", change);
        }
        let found = match role {
            ServerRole::Alone => "none: a restart loses every event and cursor; readers get a gap",
            _ => "none: a master that restarts before the failover is empty, and its replicas copy that",
        };
        report.advice("persistence", found, change)
    }

    fn memory(&self, report: &mut Report<'_>) -> Result<(), Failure> {
        let (used, most) = (self.number("used_memory"), self.number("maxmemory"));
        let policy = self.field("maxmemory_policy");
        let full = used * 100 / most.max(1);
        if self.full {
            // Reported by the commands.
        } else if most == 0 {
            let found = format!("{} used, no maxmemory", ByteSize(used));
            let change = "set maxmemory to about two thirds of the machine's memory: a full Redis then rejects publishes, and \
                          is not killed by the system";
            report.advice("memory", found, change)?;
        } else {
            let found = format!("{} of {} used", ByteSize(used), ByteSize(most));
            match full {
                95.. => report.problem(
                    "memory",
                    found,
                    "publishes will fail soon: raise maxmemory, or reduce the retention of channels",
                )?,
                80.. => report.advice("memory", found, "raise maxmemory, or reduce the retention of channels")?,
                _ => report.ok("memory", found)?,
            }
        }
        let keep = "maxmemory-policy noeviction: a full channel rejects publishes, an evicted one loses events";
        match (policy, most) {
            ("noeviction", _) => report.ok("eviction", "noeviction")?,
            ("", _) => {}
            (policy, 0) => report.advice("eviction", format!("{policy}, which takes effect with maxmemory"), keep)?,
            (policy, _) => report.problem("eviction", format!("{policy}: events and cursors can be evicted"), keep)?,
        }
        match self.number("evicted_keys") {
            0 => Ok(()),
            evicted => report.advice("eviction", format!("{evicted} keys evicted since it started"), keep),
        }
    }

    /// The output buffer limits above which Redis closes the pub/sub connection of a node.
    fn buffers(&self, report: &mut Report<'_>) -> Result<(), Failure> {
        let Some(limits) = self.setting("client-output-buffer-limit").and_then(pubsub_limit) else {
            return report.advice(
                "buffers",
                "unknown (CONFIG GET is not permitted)",
                "client-output-buffer-limit pubsub should be 32mb 8mb 60 or more",
            );
        };
        let (hard, soft, seconds) = limits;
        let found = match (hard, soft) {
            (0, 0) => "no limit for pub/sub".to_owned(),
            _ => {
                format!("the output buffer of pub/sub may be {}, or {} for {seconds} s", ByteSize(hard), ByteSize(soft))
            }
        };
        let change = "set client-output-buffer-limit pubsub 32mb 8mb 60: with less, a burst of events closes the pub/sub \
                      connections, and every node reads the events again";
        let below = |limit: u64, least: u64| limit != 0 && limit < least;
        if below(hard, 2 * MIB) || below(soft, MIB) {
            report.problem("buffers", format!("{found}: one large event can exceed it"), change)
        } else if below(hard, 32 * MIB) || below(soft, 8 * MIB) {
            report.advice("buffers", found, change)
        } else {
            report.ok("buffers", found)
        }
    }

    fn connections(&self, report: &mut Report<'_>) -> Result<(), Failure> {
        let timeout: u64 = self.setting("timeout").and_then(|timeout| timeout.parse().ok()).unwrap_or(0);
        if (1..10).contains(&timeout) {
            let found = format!("timeout {timeout}: Redis closes connections that are idle for so many seconds");
            report.problem(
                "connections",
                found,
                "set timeout 0: a node that is busy for a moment would lose its connections",
            )?;
        }
        if self.setting("tcp-keepalive") == Some("0") {
            let change = "set tcp-keepalive 60: otherwise connections of dead machines stay open";
            report.advice("connections", "tcp-keepalive 0", change)?;
        }
        let open = self.number("connected_clients");
        let most = self.setting("maxclients").unwrap_or_else(|| self.field("maxclients")).parse().unwrap_or(0);
        let found = format!("{open} of {most} clients");
        if most > 0 && open * 10 >= most * 8 {
            report.problem(
                "connections",
                found,
                "raise maxclients: each node needs three connections, and reconnects after every loss",
            )
        } else if self.number("rejected_connections") > 0 {
            let found = format!("{found}; {} were rejected since it started", self.field("rejected_connections"));
            report.advice("connections", found, "raise maxclients")
        } else if most > 0 {
            report.ok("connections", found)
        } else {
            report.ok("connections", format!("{open} clients"))
        }
    }

    fn replicas(&self, role: ServerRole, report: &mut Report<'_>) -> Result<(), Failure> {
        let count = self.number("connected_slaves");
        if count == 0 {
            return match role {
                ServerRole::Alone => report.advice(
                    "replicas",
                    "none: while this server is unavailable, the bus is unavailable",
                    "use Sentinel or a cluster, which fail over within seconds",
                ),
                // Reported by `sentinel` or `cluster`, for all servers together.
                ServerRole::Replicated | ServerRole::Shard => Ok(()),
            };
        }
        let behind: Vec<String> = (0..count)
            .filter_map(|n| {
                let line = self.info.get(&format!("slave{n}"))?;
                let part = |name: &str| line.split(',').find_map(|part| part.strip_prefix(name)).unwrap_or("?");
                let late = part("lag=").parse::<u64>().is_ok_and(|lag| lag > 10);
                (part("state=") != "online" || late).then(|| {
                    format!("{}:{} is {}, {} s behind", part("ip="), part("port="), part("state="), part("lag="))
                })
            })
            .collect();
        if !behind.is_empty() {
            return report.problem(
                "replicas",
                behind.join("; "),
                "a failover to this replica loses events: see its log",
            );
        }
        let found = format!("{count} replicas in sync");
        match self.setting("min-replicas-to-write") {
            Some("0") => report.advice(
                "replicas",
                format!("{found}; min-replicas-to-write 0"),
                "set min-replicas-to-write 1, min-replicas-max-lag 10: a partitioned master then rejects events, which \
                 its successor would not have",
            ),
            _ => report.ok("replicas", found),
        }
    }
}

/// `512 KiB`, `3.2 MiB`, `48 GiB`.
struct ByteSize(u64);

impl fmt::Display for ByteSize {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mib = self.0 as f64 / MIB as f64;
        match mib {
            10240.0.. => write!(f, "{:.0} GiB", mib / 1024.0),
            10.0.. => write!(f, "{mib:.0} MiB"),
            1.0.. => write!(f, "{mib:.1} MiB"),
            _ => write!(f, "{:.0} KiB", mib * 1024.0),
        }
    }
}

/// Parses the lines `name:value` of INFO and CLUSTER INFO.
pub(super) fn fields(text: &str) -> HashMap<String, String> {
    let fields = text.lines().filter_map(|line| line.trim_end().split_once(':'));
    fields.map(|(name, value)| (name.to_owned(), value.to_owned())).collect()
}

/// Parses the pub/sub limits (hard, soft, seconds) of `normal 0 0 0 slave 268435456 67108864 60 pubsub 33554432 8388608 60`.
fn pubsub_limit(limits: &str) -> Option<(u64, u64, u64)> {
    let mut words = limits.split_ascii_whitespace().skip_while(|word| *word != "pubsub").skip(1);
    let mut next = || words.next()?.parse().ok();
    Some((next()?, next()?, next()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pubsub_limits_are_parsed() {
        let limits = "normal 0 0 0 slave 268435456 67108864 60 pubsub 33554432 8388608 60";
        assert_eq!(pubsub_limit(limits), Some((32 * MIB, 8 * MIB, 60)));
        assert_eq!(pubsub_limit("normal 0 0 0"), None);
    }
}
