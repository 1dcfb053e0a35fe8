//! Examines a Redis as weir uses it: one server, the master that Sentinel names, or every master of a cluster.

mod cluster_nodes;
mod commands;
mod error;
mod server;

use std::{collections::HashMap, time::Duration};

use redis::{RedisError, Value, cmd};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
    time::timeout,
};

use self::{
    cluster_nodes::parse_nodes,
    error::{is_rejected, reason, remedy},
    server::{ExaminedServer, ServerRole},
};
use super::report::Report;
use crate::{
    backend::redis::client::{Address, RedisUrl, TopologyKind},
    terminal::Failure,
};

/// How long a server without TLS may take to reply.
const PLAIN: Duration = Duration::from_secs(2);

/// Examines the servers of `url`. `prefix` is `bus.redis.prefix`.
pub(crate) async fn examine(url: &str, prefix: &str, report: &mut Report<'_>) -> Result<(), Failure> {
    let url = RedisUrl::parse(url).map_err(Failure::Usage)?;
    match &url.kind {
        TopologyKind::Standalone(address) => {
            let mut server = reach(&url, address, report).await?;
            server.examine(ServerRole::Alone, prefix, report).await
        }
        TopologyKind::Sentinel { sentinels, master } => sentinel(&url, sentinels, master, prefix, report).await,
        TopologyKind::Cluster(seeds) => cluster(&url, seeds, prefix, report).await,
    }
}

/// Connects to a server without which nothing can be examined.
async fn reach(url: &RedisUrl, address: &Address, report: &mut Report<'_>) -> Result<ExaminedServer, Failure> {
    report.of(address.to_string());
    match ExaminedServer::connect(url, address, true).await {
        Ok(server) => Ok(server),
        Err(error) => {
            unreachable(url, address, &error, "reach", remedy(&error), report).await?;
            Err(match is_rejected(&error) {
                true => Failure::Rejected("Redis rejects the credentials".into()),
                false => Failure::Unavailable("there is no server to examine".into()),
            })
        }
    }
}

async fn sentinel(
    url: &RedisUrl,
    sentinels: &[Address],
    name: &str,
    prefix: &str,
    report: &mut Report<'_>,
) -> Result<(), Failure> {
    let mut masters: Vec<String> = Vec::new();
    for address in sentinels {
        report.of(format!("sentinel {address}"));
        let mut server = match ExaminedServer::connect(url, address, false).await {
            Ok(server) => server,
            Err(error) => {
                unreachable(url, address, &error, "sentinel", UNREACHABLE, report).await?;
                continue;
            }
        };
        let known: Result<HashMap<String, String>, RedisError> =
            server.query(cmd("SENTINEL").arg("MASTER").arg(name)).await;
        let known = match known {
            Ok(known) => known,
            Err(error) => {
                let change = format!("is {name} the name in `sentinel monitor`?");
                report.problem("sentinel", reason(&error), change)?;
                continue;
            }
        };
        let number = |field: &str| known.get(field).and_then(|value| value.parse::<u64>().ok()).unwrap_or(0);
        let field = |field: &str| known.get(field).map_or("?", String::as_str);
        let (others, replicas, quorum) = (number("num-other-sentinels"), number("num-slaves"), number("quorum"));
        let found = format!(
            "{name} is {}:{}, flags {}; {replicas} replicas, {others} other sentinels, quorum {quorum}, down after {} ms",
            field("ip"),
            field("port"),
            field("flags"),
            field("down-after-milliseconds")
        );
        let able: Result<Value, RedisError> = server.query(cmd("SENTINEL").arg("CKQUORUM").arg(name)).await;
        if field("flags") != "master" {
            report.problem("sentinel", found, "this sentinel considers the master to be down: see its log")?;
        } else if let Err(error) = able {
            report.problem(
                "sentinel",
                format!("{found}; {}", reason(&error)),
                "failover is impossible: start more sentinels",
            )?;
        } else if replicas == 0 {
            report.problem("sentinel", found, "failover is impossible: add a replica")?;
        } else if others < 2 {
            report.advice("sentinel", found, "three sentinels on three machines survive the loss of one")?;
        } else {
            report.ok("sentinel", found)?;
        }
        let master = format!("{}:{}", field("ip"), field("port"));
        if !masters.contains(&master) {
            masters.push(master);
        }
    }
    let Some(master) = masters.first() else {
        report.of(None);
        return Err(Failure::Unavailable("no sentinel names a master".into()));
    };
    if masters.len() > 1 {
        let found = format!("the sentinels name different masters: {}", masters.join(", "));
        report.problem("sentinel", found, "a failover is under way, or the sentinels cannot reach each other")?;
    }
    let address = Address::parse(master, 6379).map_err(Failure::Failed)?;
    let mut server = reach(url, &address, report).await?;
    server.examine(ServerRole::Replicated, prefix, report).await
}

async fn cluster(url: &RedisUrl, seeds: &[Address], prefix: &str, report: &mut Report<'_>) -> Result<(), Failure> {
    let mut first = None;
    for address in seeds {
        report.of(address.to_string());
        match ExaminedServer::connect(url, address, true).await {
            Ok(server) => {
                first = Some((server, address));
                break;
            }
            Err(error) if is_rejected(&error) => {
                report.problem("reach", reason(&error), remedy(&error))?;
                return Err(Failure::Rejected("Redis rejects the credentials".into()));
            }
            Err(error) => unreachable(url, address, &error, "reach", UNREACHABLE, report).await?,
        }
    }
    let Some((mut server, asked)) = first else {
        return Err(Failure::Unavailable("there is no server to examine".into()));
    };
    let known: String = match server.query(cmd("CLUSTER").arg("INFO")).await {
        Ok(known) => known,
        Err(error) => {
            report.problem("cluster", reason(&error), "use redis:// if it is not a cluster")?;
            return Ok(());
        }
    };
    let fields = server::fields(&known);
    let number = |field: &str| fields.get(field).and_then(|value| value.parse::<u64>().ok()).unwrap_or(0);
    let nodes: String = server.query(cmd("CLUSTER").arg("NODES")).await.unwrap_or_default();
    let nodes = parse_nodes(&nodes);
    let masters: Vec<_> = nodes.iter().filter(|node| node.master && node.slots > 0).collect();
    let (covered, failing) = (number("cluster_slots_ok"), nodes.iter().filter(|node| node.failing).count());
    let found = format!("{} masters, {} servers, {covered} of 16384 slots served", masters.len(), nodes.len());
    if fields.get("cluster_state").map(String::as_str) != Some("ok") || covered < 16384 {
        let change = "channels in slots without a server are unavailable: see `redis-cli --cluster check`";
        report.problem("cluster", found, change)?;
    } else if failing > 0 {
        report.problem(
            "cluster",
            format!("{found}; {failing} failing"),
            "restart the failed nodes, or remove them (CLUSTER FORGET)",
        )?;
    } else {
        report.ok("cluster", found)?;
    }
    let bare: Vec<&str> = masters
        .iter()
        .filter(|master| !nodes.iter().any(|node| node.replica_of == master.id && !node.failing))
        .map(|master| master.address.as_str())
        .collect();
    if !bare.is_empty() {
        let found = format!("no replica of {}", bare.join(", "));
        report.advice(
            "cluster",
            found,
            "without one, the channels of a failed master are unavailable until it is restarted",
        )?;
    }
    for master in masters.iter().filter(|master| !master.failing) {
        let Some(address) = Address::named_by(asked, &master.address) else { continue };
        report.of(address.to_string());
        match ExaminedServer::connect(url, &address, true).await {
            Ok(mut server) => server.examine(ServerRole::Shard, prefix, report).await?,
            Err(error) => unreachable(url, &address, &error, "reach", remedy(&error), report).await?,
        }
    }
    Ok(())
}

const UNREACHABLE: &str = "start it, or remove it from the URL";

/// Reports why there is no connection, as far as that can be known.
async fn unreachable(
    url: &RedisUrl,
    address: &Address,
    error: &RedisError,
    check: &str,
    change: &str,
    report: &mut Report<'_>,
) -> Result<(), Failure> {
    // A server without TLS takes the handshake for an incomplete command, so the connection only times out.
    if url.tls && !is_rejected(error) && is_plain(address).await {
        let change = "use redis:// instead of rediss://, or the TLS port (tls-port)";
        return report.problem(check, "the server responds, but does not speak TLS", change);
    }
    report.problem(check, reason(error), change)
}

/// Whether a server replies without TLS. No secret is sent.
async fn is_plain(address: &Address) -> bool {
    let exchange = async {
        let mut socket = TcpStream::connect((&*address.host, address.port)).await?;
        socket.write_all(b"PING\r\n").await?;
        socket.read_u8().await
    };
    // +PONG, or an error that authentication is required.
    matches!(timeout(PLAIN, exchange).await, Ok(Ok(b'+' | b'-')))
}
