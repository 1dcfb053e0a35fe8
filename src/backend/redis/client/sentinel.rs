//! Asks Sentinel for the address of the master.

use std::time::Duration;

use futures_util::{StreamExt, stream::FuturesUnordered};
use redis::cmd;
use tokio::time::timeout;

use super::{
    connection::RedisConnection,
    majority::majority,
    pipeline::CommandError,
    url::{Address, RedisUrl, TopologyKind},
};

/// How long one sentinel may take to reply.
const PATIENCE: Duration = Duration::from_secs(1);

/// Asks all sentinels, and believes the majority of those that reply: a sentinel that was cut off together with an old
/// master still names that one.
pub(super) async fn master(url: &RedisUrl) -> Result<Address, String> {
    let TopologyKind::Sentinel { sentinels, master } = &url.kind else { return Err("there are no sentinels".into()) };
    let replies = sentinels.iter().map(|sentinel| async move {
        let reply = timeout(PATIENCE, master_of(url, sentinel, master)).await;
        reply.unwrap_or_else(|_| Err(format!("{sentinel}: no reply")))
    });
    let mut replies: FuturesUnordered<_> = replies.collect();
    let (mut named, mut reasons) = (Vec::new(), Vec::new());
    while let Some(reply) = replies.next().await {
        match reply {
            Ok(address) => named.push(address),
            Err(reason) => reasons.push(reason),
        }
        // The other replies, which may take a second, make no difference.
        if let Some(address) = majority(&named, sentinels.len()) {
            return Ok(address.clone());
        }
    }
    match majority(&named, named.len()) {
        Some(address) => Ok(address.clone()),
        None if named.is_empty() => Err(reasons.join("; ")),
        None => {
            let named: Vec<_> = named.iter().map(Address::to_string).collect();
            Err(format!("the sentinels name different masters: {}", named.join(", ")))
        }
    }
}

async fn master_of(url: &RedisUrl, sentinel: &Address, name: &str) -> Result<Address, String> {
    let connection = RedisConnection::open_guide(url, sentinel).await?;
    let reply = connection.ask(cmd("SENTINEL").arg("GET-MASTER-ADDR-BY-NAME").arg(name));
    match reply.parse::<Option<(String, u16)>>().await {
        // A sentinel that cannot resolve the name of the master replies with an empty host.
        Ok(Some((host, _))) if matches!(&*host, "" | "?") => Err(format!("{sentinel} knows no address of {name:?}")),
        Ok(Some((host, port))) => {
            Address::of_host(sentinel, &host, port).ok_or_else(|| format!("{sentinel} knows no port of {name:?}"))
        }
        Ok(None) => Err(format!("{sentinel} knows no master {name:?}")),
        Err(CommandError::Rejected(error)) => Err(format!("{sentinel}: {error}")),
        Err(_) => Err(format!("{sentinel}: the connection broke")),
    }
}

#[cfg(test)]
mod tests {
    use tokio::{
        io::{AsyncReadExt, AsyncWriteExt},
        net::TcpListener,
    };

    use super::*;

    /// A sentinel that answers every request with a master, or never.
    async fn sentinel(names: Option<u16>) -> u16 {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        tokio::spawn(async move {
            while let Ok((mut socket, _)) = listener.accept().await {
                tokio::spawn(async move {
                    let mut request = [0; 1000];
                    while let Ok(1..) = socket.read(&mut request).await {
                        if let Some(port) = names {
                            let port = port.to_string();
                            let reply = format!("*2\r\n$9\r\n127.0.0.1\r\n${}\r\n{port}\r\n", port.len());
                            let _ = socket.write_all(reply.as_bytes()).await;
                        }
                    }
                });
            }
        });
        port
    }

    async fn named_by(sentinels: &[Option<u16>]) -> Result<u16, String> {
        let mut addresses = Vec::new();
        for names in sentinels {
            addresses.push(format!("127.0.0.1:{}", sentinel(*names).await));
        }
        let url = RedisUrl::parse(&format!("redis+sentinel://{}/weir", addresses.join(","))).unwrap();
        master(&url).await.map(|address| address.port)
    }

    #[tokio::test]
    async fn the_majority_of_the_sentinels_decides() {
        let (old, new) = (Some(7001), Some(7002));
        for _ in 0..10 {
            assert_eq!(named_by(&[old, new, new]).await, Ok(7002));
        }
        assert_eq!(named_by(&[old, old, new, new, new]).await, Ok(7002));
        assert_eq!(named_by(&[new, new, None]).await, Ok(7002), "of those that answer");
        assert_eq!(named_by(&[None, None, new]).await, Ok(7002), "of those that answer");
        let split = named_by(&[old, new]).await.unwrap_err();
        assert!(split.contains("different masters"), "{split}");
        let dead = named_by(&[None]).await.unwrap_err();
        assert!(dead.contains("no reply"), "{dead}");
    }
}
