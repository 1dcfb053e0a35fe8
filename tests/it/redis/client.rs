//! The Redis client: commands find their server and subscriptions are restored after any failure.

use std::{net::Ipv4Addr, sync::Arc, time::Duration};

use ::redis::{Cmd, Value, cmd};
use bytes::Bytes;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpListener,
    sync::mpsc,
};
use weir::{
    backend::redis::client::{CommandError, OnLostReply, PubSub, PubSubHandler, RedisUrl, Script, Topology},
    metrics::{Metrics, RedisConnectionKind},
};

use crate::support::{
    MINUTE, RedisCluster, RedisSentinel, RedisServer, eventually_within,
    proxy::{ProxyMode, TcpProxy},
};

/// The messages of a subscription connection, in order.
struct ChannelHandler(mpsc::UnboundedSender<String>);

impl PubSubHandler for ChannelHandler {
    fn on_message(&self, channel: &[u8], message: Bytes) {
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        let _ = self.0.send(format!("{} {}", text(channel), text(&message)));
    }

    fn on_subscribed(&self, channel: &[u8]) {
        let _ = self.0.send(format!("+{}", String::from_utf8_lossy(channel)));
    }
}

async fn topology(url: &str) -> Arc<Topology> {
    let topology = Topology::start(RedisUrl::parse(url).unwrap(), Arc::new(Metrics::new()));
    topology.ready(Duration::from_secs(20)).await.unwrap();
    topology
}

fn pubsub(topology: &Arc<Topology>) -> (Arc<PubSub>, mpsc::UnboundedReceiver<String>) {
    let (tx, rx) = mpsc::unbounded_channel();
    (PubSub::start(topology.clone(), RedisConnectionKind::Events, Arc::new(ChannelHandler(tx))), rx)
}

async fn next(messages: &mut mpsc::UnboundedReceiver<String>) -> String {
    tokio::time::timeout(Duration::from_secs(30), messages.recv()).await.expect("a message in time").unwrap()
}

async fn call(topology: &Topology, args: &[&str]) -> Result<Value, CommandError> {
    let command = cmd(args[0]).arg(&args[1..]).take();
    topology.call(args[1].as_bytes(), OnLostReply::Retry, &command).await.map(|(value, _)| value)
}

/// Retries until Redis has executed the command: it may be down.
async fn call_until_done(topology: &Topology, args: &[&str]) -> Value {
    for _ in 0..30 {
        if let Ok(value) = call(topology, args).await {
            return value;
        }
    }
    panic!("{args:?} never succeeds");
}

static ECHO: Script = Script::new("return {KEYS[1], ARGV[1]}");

#[tokio::test(flavor = "multi_thread")]
async fn commands_and_subscriptions_recover_after_a_restart() {
    let mut redis = RedisServer::start(&[]).await;
    let topology = topology(&redis.url()).await;
    let (pubsub, mut messages) = pubsub(&topology);
    for n in 0..1500 {
        pubsub.subscribe(Bytes::from(format!("c{n}")));
    }
    for _ in 0..1500 {
        assert!(next(&mut messages).await.starts_with("+c"));
    }
    assert!(pubsub.is_subscribed(b"c7"));
    assert_eq!(redis.cli(&["PUBLISH", "c7", "one"]).await, "1");
    assert_eq!(next(&mut messages).await, "c7 one");
    redis.kill();
    assert!(call(&topology, &["GET", "a"]).await.is_err());
    redis.restart().await;
    call_until_done(&topology, &["SET", "a", "1"]).await;
    for _ in 0..1500 {
        assert!(next(&mut messages).await.starts_with("+c"), "all subscriptions are restored");
    }
    assert!(pubsub.unsubscribe(b"c7") && !pubsub.is_subscribed(b"c7"));
    eventually_within(MINUTE, "the subscription has ended", async || redis.cli(&["PUBLISH", "c7", "two"]).await == "0")
        .await;
    assert_eq!(redis.cli(&["PUBLISH", "c8", "two"]).await, "1");
    // A message that was published before the server has ended the subscription still arrives.
    let mut message = next(&mut messages).await;
    while message == "c7 two" {
        message = next(&mut messages).await;
    }
    assert_eq!(message, "c8 two");
    for kind in ["normal", "pubsub"] {
        redis.cli(&["CLIENT", "KILL", "TYPE", kind, "SKIPME", "yes"]).await;
    }
    assert_eq!(call_until_done(&topology, &["GET", "a"]).await, Value::BulkString(b"1".to_vec()));
    eventually_within(MINUTE, "the subscription is restored", async || pubsub.is_subscribed(b"c8")).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_lost_reply_is_unconfirmed_and_an_unsent_command_is_not_executed() {
    let redis = RedisServer::start(&[]).await;
    let proxy = TcpProxy::start(redis.port).await;
    let topology = topology(&proxy.redis_url()).await;
    let incr: Cmd = cmd("INCR").arg("n").take();
    let add = |lost| topology.call::<i64>(b"n", lost, &incr);
    assert!(add(OnLostReply::Report).await.is_ok());
    proxy.set(ProxyMode::HoldReplies);
    let (one, two) = tokio::join!(add(OnLostReply::Report), async {
        eventually_within(MINUTE, "the command is executed", async || redis.cli(&["GET", "n"]).await == "2").await;
        proxy.set(ProxyMode::Close);
    });
    assert_eq!((one.map(|(value, _)| value), two), (Err(CommandError::Unconfirmed), ()));
    assert!(matches!(add(OnLostReply::Report).await, Err(CommandError::NotExecuted(_))));
    proxy.set(ProxyMode::Forward);
    eventually_within(MINUTE, "commands succeed", async || add(OnLostReply::Report).await.is_ok()).await;
    assert_eq!(redis.cli(&["GET", "n"]).await, "3", "each was executed once");
    proxy.set(ProxyMode::Blackhole);
    assert!(add(OnLostReply::Report).await.is_err(), "a dead connection is noticed");
}

#[tokio::test(flavor = "multi_thread")]
async fn scripts_are_loaded_on_demand() {
    let redis = RedisServer::start(&[]).await;
    let topology = topology(&redis.url()).await;
    for _ in 0..3 {
        let fill = |_: &_, command: &mut Cmd| {
            command.arg("v");
        };
        let done = topology.run::<(String, String)>(&ECHO, &[b"{k}"], OnLostReply::Report, fill).await;
        assert_eq!(done.unwrap().0.1, "v");
        redis.cli(&["SCRIPT", "FLUSH"]).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn commands_and_subscriptions_follow_the_sentinel_master() {
    let mut sentinel = RedisSentinel::start().await;
    let topology = topology(&sentinel.url()).await;
    let (pubsub, mut messages) = pubsub(&topology);
    pubsub.subscribe(Bytes::from_static(b"c"));
    assert_eq!(next(&mut messages).await, "+c");
    let old = sentinel.master().await;
    sentinel.servers[old].kill();
    let new = sentinel.failed_over(old).await;
    call_until_done(&topology, &["SET", "a", "1"]).await;
    assert_eq!(sentinel.servers[new].cli(&["GET", "a"]).await, "1");
    // Sentinel may close connections again when it has reconfigured all servers.
    let mut message = next(&mut messages).await;
    while message == "+c" {
        sentinel.servers[new].cli(&["PUBLISH", "c", "x"]).await;
        message = next(&mut messages).await;
    }
    assert_eq!(message, "c x");
}

#[tokio::test(flavor = "multi_thread")]
async fn commands_and_subscriptions_follow_slot_moves_and_failovers() {
    let mut cluster = RedisCluster::start(3, 3).await;
    let topology = topology(&cluster.url()).await;
    let (pubsub, mut messages) = pubsub(&topology);
    let keys: Vec<String> = (0..30).map(|n| format!("{{k{n}}}")).collect();
    for key in &keys {
        call_until_done(&topology, &["SET", key, "1"]).await;
        pubsub.subscribe(Bytes::from(key.clone()));
    }
    for _ in &keys {
        assert!(next(&mut messages).await.starts_with('+'));
    }
    let slot = cluster.slot(&keys[0]).await;
    let from = cluster.owner(slot).await;
    cluster.move_slot(slot, (from + 1) % 3).await;
    assert_eq!(call_until_done(&topology, &["GET", &keys[0]]).await, Value::BulkString(b"1".to_vec()));
    assert_eq!(next(&mut messages).await, format!("+{}", keys[0]));
    call_until_done(&topology, &["SPUBLISH", &keys[0], "moved"]).await;
    assert_eq!(next(&mut messages).await, format!("{} moved", keys[0]));

    let victim = cluster.owner(slot).await;
    cluster.servers[victim].kill();
    eventually_within(MINUTE, "all slots answer", async || {
        for key in &keys {
            if call(&topology, &["SET", key, "2"]).await.is_err() {
                return false;
            }
        }
        true
    })
    .await;
    eventually_within(MINUTE, "all subscriptions are restored", async || {
        keys.iter().all(|key| pubsub.is_subscribed(key.as_bytes()))
    })
    .await;
}

/// A server that reports a version and answers nothing else.
async fn of_version(version: &'static str) -> String {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
    let url = format!("redis://{}", listener.local_addr().unwrap());
    tokio::spawn(async move {
        loop {
            let (mut socket, _) = listener.accept().await.unwrap();
            tokio::spawn(async move {
                let mut request = vec![0; 4096];
                // One command arrives at a time.
                while let Ok(count @ 1..) = socket.read(&mut request).await {
                    let request = String::from_utf8_lossy(&request[..count]).into_owned();
                    let info = format!(
                        "redis_version:{version}\r\nredis_mode:standalone\r\nrole:master\r\nrun_id:{}\r\nmaster_replid:{}\r\n",
                        "a".repeat(40),
                        "b".repeat(40)
                    );
                    let answer = match () {
                        () if request.contains("HELLO") && version < "6" => {
                            "-ERR unknown command `HELLO`\r\n".to_owned()
                        }
                        () if request.contains("INFO") => format!("${}\r\n{info}\r\n", info.len()),
                        () if request.contains("TIME") => "*2\r\n$10\r\n1763640000\r\n$1\r\n0\r\n".to_owned(),
                        () => "%0\r\n".to_owned(),
                    };
                    let _ = socket.write_all(answer.as_bytes()).await;
                }
            });
        }
    });
    url
}

#[tokio::test(flavor = "multi_thread")]
async fn an_unsupported_redis_version_is_rejected_with_the_reason() {
    for version in ["5.0.14", "6.0.16"] {
        let url = RedisUrl::parse(&of_version(version).await).unwrap();
        let topology = Topology::start(url, Arc::new(Metrics::new()));
        // The reason is known with the first reply.
        let reason = topology.ready(Duration::from_secs(5)).await.unwrap_err();
        assert!(reason.contains("6.2 or newer, or Valkey"), "{version}: {reason}");
    }
    let recent = RedisUrl::parse(&of_version("6.2.0").await).unwrap();
    Topology::start(recent, Arc::new(Metrics::new())).ready(Duration::from_secs(30)).await.unwrap();
}
