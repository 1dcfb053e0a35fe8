//! Real Redis servers that tests start, kill and pause.
//!
//! ```ignore
//! let mut redis = RedisServer::start(&[]).await;                 // one server, nothing on disk
//! let mut redis = RedisServer::start(&["--appendonly", "yes"]).await;
//! let sentinel = RedisSentinel::start().await;                   // a master, two replicas, three sentinels
//! let cluster = RedisCluster::start(3, 0).await;                 // three masters, no replicas
//! redis.url(); redis.cli(&["CLIENT", "LIST"]).await; redis.pause(); redis.resume(); redis.kill(); redis.restart().await;
//! ```

mod cluster;
mod sentinel;
mod server;

pub use cluster::RedisCluster;
pub use sentinel::RedisSentinel;
pub use server::{RedisServer, free_port};

/// Arguments of a server that loses no acknowledged write in a restart.
pub const AOF: &[&str] = &["--appendonly", "yes", "--appendfsync", "always"];

/// A kind of deployment: one server, Sentinel or Cluster.
pub trait RedisDeployment: Sized + Send + Sync + 'static {
    fn start() -> impl Future<Output = Self> + Send;

    fn url(&self) -> String;

    /// The servers that hold data.
    fn servers(&mut self) -> &mut [RedisServer];
}

/// Runs tests that are generic over [`RedisDeployment`] on each kind.
macro_rules! on_each_deployment {
    ($($case:ident)+) => {
        on_each_deployment!(@ standalone RedisServer: $($case)+);
        on_each_deployment!(@ sentinel RedisSentinel: $($case)+);
        on_each_deployment!(@ cluster RedisCluster: $($case)+);
    };
    (@ $name:ident $deployed:ident: $($case:ident)+) => {
        mod $name {
            use crate::support::$deployed;
            $(#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
            async fn $case() {
                super::$case::<$deployed>().await;
            })+
        }
    };
}
pub(crate) use on_each_deployment;

impl RedisDeployment for RedisServer {
    async fn start() -> Self {
        RedisServer::start(&[]).await
    }

    fn url(&self) -> String {
        RedisServer::url(self)
    }

    fn servers(&mut self) -> &mut [RedisServer] {
        std::slice::from_mut(self)
    }
}

impl RedisDeployment for RedisSentinel {
    async fn start() -> Self {
        RedisSentinel::start().await
    }

    fn url(&self) -> String {
        RedisSentinel::url(self)
    }

    fn servers(&mut self) -> &mut [RedisServer] {
        &mut self.servers
    }
}

impl RedisDeployment for RedisCluster {
    async fn start() -> Self {
        RedisCluster::start(3, 0).await
    }

    fn url(&self) -> String {
        RedisCluster::url(self)
    }

    fn servers(&mut self) -> &mut [RedisServer] {
        &mut self.servers
    }
}

mod tests {
    use super::*;

    #[tokio::test]
    async fn a_server_is_killed_restarted_paused_and_removed() {
        let mut server = RedisServer::start(AOF).await;
        server.cli(&["SET", "a", "1"]).await;
        server.kill();
        assert!(server.try_cli(&["PING"]).await.is_none());
        server.restart().await;
        assert_eq!(server.cli(&["GET", "a"]).await, "1");
        server.pause();
        server.resume();
        assert_eq!(server.cli(&["PING"]).await, "PONG");
        let dir = server.dir.clone();
        drop(server);
        assert!(!dir.exists());
    }

    #[tokio::test]
    async fn sentinels_elect_another_master() {
        let mut sentinel = RedisSentinel::start().await;
        let old = sentinel.master().await;
        sentinel.servers[old].kill();
        assert_ne!(sentinel.failed_over(old).await, old);
    }

    #[tokio::test]
    async fn a_slot_moves_with_its_keys() {
        let cluster = RedisCluster::start(3, 1).await;
        let slot = cluster.slot("{a}").await;
        let from = cluster.owner(slot).await;
        cluster.servers[from].cli(&["SET", "{a}", "1"]).await;
        let to = (from + 1) % 3;
        cluster.move_slot(slot, to).await;
        assert_eq!(cluster.owner(slot).await, to);
        assert_eq!(cluster.servers[to].cli(&["GET", "{a}"]).await, "1");
    }
}
