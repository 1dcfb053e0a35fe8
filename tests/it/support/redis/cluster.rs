//! A Redis Cluster.

use super::{RedisServer, server::free_port};
use crate::support::{MINUTE, eventually_within};

/// The masters first, then their replicas in the same order.
pub struct RedisCluster {
    pub servers: Vec<RedisServer>,
    pub masters: usize,
}

impl RedisCluster {
    /// `replicas` is the number of all replicas; the first belongs to the first master, and so on.
    pub async fn start(masters: usize, replicas: usize) -> Self {
        let mut servers = Vec::new();
        for _ in 0..masters + replicas {
            let bus = free_port().to_string();
            let args = [
                "--cluster-enabled",
                "yes",
                "--cluster-node-timeout",
                "1500",
                "--cluster-port",
                &bus,
                "--cluster-require-full-coverage",
                "no",
                "--cluster-config-file",
                "nodes.conf",
            ];
            servers.push((RedisServer::start(&args).await, bus));
        }
        for (n, (server, _)) in servers.iter().enumerate().take(masters) {
            let (from, to) = (n * 16384 / masters, (n + 1) * 16384 / masters - 1);
            server.cli(&["CLUSTER", "ADDSLOTSRANGE", &from.to_string(), &to.to_string()]).await;
            server.cli(&["CLUSTER", "SET-CONFIG-EPOCH", &(n + 1).to_string()]).await;
        }
        let (first, others) = servers.split_first().unwrap();
        for (server, bus) in others {
            first.0.cli(&["CLUSTER", "MEET", "127.0.0.1", &server.port.to_string(), bus]).await;
        }
        let cluster = RedisCluster { servers: servers.into_iter().map(|(server, _)| server).collect(), masters };
        for server in &cluster.servers {
            let count = (masters + replicas).to_string();
            eventually_within(MINUTE, "the nodes know each other", || async {
                let info = server.cli(&["CLUSTER", "INFO"]).await;
                info.contains(&format!("cluster_known_nodes:{count}")) && info.contains("cluster_slots_assigned:16384")
            })
            .await;
        }
        for n in 0..replicas {
            let master = cluster.servers[n % masters].cli(&["CLUSTER", "MYID"]).await;
            let replica = &cluster.servers[masters + n];
            eventually_within(MINUTE, "a master has its replica", || async {
                replica.cli(&["CLUSTER", "REPLICATE", &master]).await == "OK"
            })
            .await;
            eventually_within(MINUTE, "a replica is in sync", || async {
                replica.info("master_link_status").await.as_deref() == Some("up")
            })
            .await;
        }
        cluster.is_ok().await;
        cluster
    }

    /// Waits until every running server reports a healthy cluster.
    pub async fn is_ok(&self) {
        for server in self.servers.iter().filter(|server| server.is_running()) {
            eventually_within(MINUTE, "the cluster is healthy", || async {
                let info = server.try_cli(&["CLUSTER", "INFO"]).await.unwrap_or_default();
                info.contains("cluster_state:ok") && info.contains("cluster_slots_fail:0")
            })
            .await;
        }
    }

    pub fn url(&self) -> String {
        let seeds: Vec<String> = self.servers.iter().take(2).map(RedisServer::address).collect();
        format!("redis-cluster://{}", seeds.join(","))
    }

    pub async fn slot(&self, key: &str) -> u16 {
        self.servers[0].cli(&["CLUSTER", "KEYSLOT", key]).await.parse().unwrap()
    }

    /// Index of the master that owns a slot.
    pub async fn owner(&self, slot: u16) -> usize {
        for (n, server) in self.servers.iter().enumerate() {
            let nodes = server.try_cli(&["CLUSTER", "NODES"]).await.unwrap_or_default();
            let Some(me) = nodes.lines().find(|line| line.contains("myself,master")) else { continue };
            let mine = me.split(' ').skip(8).filter(|range| !range.starts_with('[')).any(|range| {
                let (from, to) = range.split_once('-').unwrap_or((range, range));
                (from.parse().unwrap()..=to.parse::<u16>().unwrap()).contains(&slot)
            });
            if mine {
                return n;
            }
        }
        panic!("no master owns slot {slot}");
    }

    /// Moves a slot with its keys, one key after the other, as `redis-cli --cluster reshard` does.
    pub async fn move_slot(&self, slot: u16, to: usize) {
        let from = self.owner(slot).await;
        self.begin_move(slot, to).await;
        let target_id = self.servers[to].cli(&["CLUSTER", "MYID"]).await;
        for server in [&self.servers[to], &self.servers[from]] {
            server.cli(&["CLUSTER", "SETSLOT", &slot.to_string(), "NODE", &target_id]).await;
        }
    }

    /// Moves the keys of a slot, and leaves the slot on its way: its owner answers with ASK.
    pub async fn begin_move(&self, slot: u16, to: usize) {
        let from = self.owner(slot).await;
        let (source, target) = (&self.servers[from], &self.servers[to]);
        let (source_id, target_id) = (source.cli(&["CLUSTER", "MYID"]).await, target.cli(&["CLUSTER", "MYID"]).await);
        let (slot, port) = (slot.to_string(), target.port.to_string());
        target.cli(&["CLUSTER", "SETSLOT", &slot, "IMPORTING", &source_id]).await;
        source.cli(&["CLUSTER", "SETSLOT", &slot, "MIGRATING", &target_id]).await;
        loop {
            let keys = source.cli(&["CLUSTER", "GETKEYSINSLOT", &slot, "10"]).await;
            let keys: Vec<&str> = keys.lines().filter(|line| !line.is_empty()).collect();
            if keys.is_empty() {
                break;
            }
            for key in keys {
                source.cli(&["MIGRATE", "127.0.0.1", &port, key, "0", "5000"]).await;
            }
        }
    }
}
