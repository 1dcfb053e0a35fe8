//! A master with two replicas and three sentinels.

use std::fs;

use super::RedisServer;
use crate::support::{MINUTE, eventually_within};

/// A master with two replicas, and three sentinels that watch it under the name `weir`.
pub struct RedisSentinel {
    pub servers: Vec<RedisServer>,
    pub sentinels: Vec<RedisServer>,
}

impl RedisSentinel {
    pub async fn start() -> Self {
        let master = RedisServer::start(&[]).await;
        let port = master.port.to_string();
        let mut servers = vec![master];
        for _ in 0..2 {
            servers.push(RedisServer::start(&["--replicaof", "127.0.0.1", &port]).await);
        }
        eventually_within(MINUTE, "two replicas are connected", || async {
            servers[0].info("connected_slaves").await.as_deref() == Some("2")
        })
        .await;
        for replica in &servers[1..] {
            eventually_within(MINUTE, "a replica is in sync", || async {
                replica.info("master_link_status").await.as_deref() == Some("up")
            })
            .await;
        }
        let mut sentinels = Vec::new();
        for _ in 0..3 {
            let mut sentinel = RedisServer::prepared("redis-sentinel", &[]);
            let conf = format!(
                "bind 127.0.0.1\nsentinel monitor weir 127.0.0.1 {port} 2\nsentinel down-after-milliseconds weir 1500\n\
                 sentinel failover-timeout weir 4000\nsentinel parallel-syncs weir 2\n"
            );
            fs::write(sentinel.dir.join("sentinel.conf"), conf).unwrap();
            sentinel.run().await;
            sentinels.push(sentinel);
        }
        let all = RedisSentinel { servers, sentinels };
        for sentinel in &all.sentinels {
            eventually_within(MINUTE, "the sentinels know each other", || async {
                let known = sentinel.cli(&["SENTINEL", "MASTER", "weir"]).await;
                let lines: Vec<&str> = known.lines().collect();
                let field = |name: &str| lines.windows(2).find(|pair| pair[0] == name).map(|pair| pair[1]);
                field("num-other-sentinels") == Some("2") && field("num-slaves") == Some("2")
            })
            .await;
        }
        all
    }

    pub fn url(&self) -> String {
        let sentinels: Vec<String> = self.sentinels.iter().map(RedisServer::address).collect();
        format!("redis+sentinel://{}/weir", sentinels.join(","))
    }

    /// Index of the master according to the first sentinel.
    pub async fn master(&self) -> usize {
        let answer = self.sentinels[0].cli(&["SENTINEL", "GET-MASTER-ADDR-BY-NAME", "weir"]).await;
        let port: u16 = answer.lines().nth(1).and_then(|port| port.parse().ok()).expect("a master");
        self.servers.iter().position(|server| server.port == port).expect("a server of this deployment")
    }

    /// Waits until all sentinels report another master than the server `old` and it has that role. Returns its index.
    pub async fn failed_over(&self, old: usize) -> usize {
        let mut new = old;
        eventually_within(MINUTE, "all sentinels report another master", || async {
            for sentinel in &self.sentinels {
                let answer = sentinel.cli(&["SENTINEL", "GET-MASTER-ADDR-BY-NAME", "weir"]).await;
                if answer.lines().nth(1) == Some(&self.servers[old].port.to_string()) {
                    return false;
                }
            }
            true
        })
        .await;
        eventually_within(MINUTE, "the new master has that role", || {
            let found = self.master();
            async {
                let found = found.await;
                self.servers[found].info("role").await.as_deref() == Some("master")
            }
        })
        .await;
        while new == old {
            new = self.master().await;
        }
        new
    }
}
