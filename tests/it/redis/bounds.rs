//! Retries, releases and bounded costs: what Redis rejects is retried, and no request costs more than its limit.

use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};

use serde_json::{Value, value::RawValue};
use weir::{
    backend::redis::{Ack, RedisSettings},
    error::Code,
    event::{Draft, DraftParts, EventData},
    position::Start,
};

use super::bus_node::{BusNode, KEEP, draft};
use crate::support::{MINUTE, RedisCluster, RedisServer, event::channel, eventually_within};

/// A rejected subscription succeeds later, although new ones are made all the time.
#[tokio::test(flavor = "multi_thread")]
async fn a_rejected_subscription_is_retried_while_others_are_made() {
    let redis = RedisServer::start(&[]).await;
    let node = BusNode::start(&redis.url()).await;
    redis.cli(&["ACL", "SETUSER", "default", "resetchannels", "&weir:{?probe*", "&weir:{other*"]).await;
    let refused = tokio::spawn({
        let bus = node.bus.clone();
        async move { while bus.watch(&[channel("refused")]).await.is_err() {} }
    });
    eventually_within(MINUTE, "the subscription is rejected", async || {
        redis.cli(&["ACL", "LOG"]).await.contains("weir:{refused}:e")
    })
    .await;
    redis.cli(&["ACL", "SETUSER", "default", "allchannels"]).await;
    let others = AtomicUsize::new(0);
    eventually_within(MINUTE, "the subscription is retried", async || {
        let name = format!("other{}", others.fetch_add(1, SeqCst));
        node.bus.watch(&[channel(&name)]).await.unwrap();
        refused.is_finished()
    })
    .await;
}

/// The user of `proto-docs/redis.md` has the permissions for `ack = "replicated"`, also with another prefix.
#[tokio::test(flavor = "multi_thread")]
async fn the_documented_user_may_wait_for_replicas_under_another_prefix() {
    let master = RedisServer::start(&[]).await;
    let page = include_str!("../../../proto-docs/redis.md");
    let rule = page.lines().find(|line| line.starts_with("ACL SETUSER weir ")).expect("the user of the documentation");
    let rule = rule.replace("PASSWORD", "secret").replace("weir:*", "other:*");
    assert_eq!(master.cli(&rule.split(' ').collect::<Vec<_>>()).await, "OK");
    let replica = RedisServer::start(&["--replicaof", "127.0.0.1", &master.port.to_string()]).await;
    eventually_within(MINUTE, "the replica is in sync", async || {
        replica.info("master_link_status").await.as_deref() == Some("up")
    })
    .await;
    let settings = RedisSettings { prefix: "other:".into(), ack: Ack::Replicated };
    let node = BusNode::of(&format!("redis://weir:secret@{}", master.address()), KEEP, settings).await;
    for n in 1..=10 {
        node.publish("c", n).await.unwrap();
    }
    assert_eq!(replica.cli(&["XLEN", "other:{c}:s"]).await, "10");
    assert_eq!(master.cli(&["ACL", "LOG"]).await, "", "no command was rejected");
}

/// Each master of a Cluster waits for its own replicas, publishes nothing to the others, and is dropped when it has no
/// slots.
#[tokio::test(flavor = "multi_thread")]
async fn replicated_publishes_wait_for_the_replicas_of_each_master() {
    let mut cluster = RedisCluster::start(3, 3).await;
    let node = BusNode::with(&cluster.url(), KEEP, Ack::Replicated).await;
    let mut names: Vec<String> = Vec::new();
    for owner in 0..3 {
        for n in 0.. {
            let name = format!("c{n}");
            if cluster.owner(cluster.slot(&format!("{{{name}}}")).await).await == owner {
                names.push(name);
                break;
            }
        }
    }
    for (n, name) in names.iter().enumerate() {
        node.publish(name, 1).await.unwrap();
        // The replica has the event when the publish is acknowledged.
        let keys = cluster.servers[3 + n].info("db0").await.unwrap_or_default();
        assert!(keys.starts_with("keys="), "{keys}");
    }
    assert_eq!(node.redis.waits(), 3);
    for server in &cluster.servers {
        assert_eq!(server.calls("publish").await, 0, "a Cluster forwards PUBLISH to every server");
    }
    cluster.servers[0].kill();
    eventually_within(MINUTE, "the new master has a connection for WAIT", async || {
        // The new master has no replica, so this is not confirmed.
        let _ = node.publish(&names[0], 2).await;
        cluster.servers[3].cli(&["CLIENT", "LIST"]).await.contains("name=weir-acks")
    })
    .await;
    eventually_within(MINUTE, "the old master is dropped", async || node.redis.waits() == 3).await;
    node.publish(&names[1], 2).await.unwrap();
}

/// Expired consumers free their slots at once. While none has expired, requests do not search for them.
#[tokio::test(flavor = "multi_thread")]
async fn expired_consumers_free_their_slots() {
    const FILL: &str = "for n = 1, 1000 do redis.call('ZADD', KEYS[1], 0, string.format('x%d', n)) end";
    let redis = RedisServer::start(&[]).await;
    let node = BusNode::start(&redis.url()).await;
    let at = node.publish("c", 1).await.unwrap().position;
    let index = "weir:{consumers}";
    redis.cli(&["EVAL", FILL, "1", index]).await;
    node.bus.commit("a", &channel("c"), at).await.unwrap();
    assert_eq!(redis.cli(&["ZRANGE", index, "0", "-1"]).await, "a");
    // A list removes the names that it does not find.
    redis.cli(&["EVAL", FILL, "1", index]).await;
    let listed = node.bus.consumers("", None, 10).await.unwrap();
    assert_eq!(listed.iter().map(|consumer| &*consumer.name).collect::<Vec<_>>(), ["a"]);
    assert_eq!(redis.cli(&["ZRANGE", index, "0", "-1"]).await, "a");

    let lives = "local time = redis.call('TIME')[1] .. '000'
        for n = 1, 1000 do redis.call('HSET', string.format('weir:{consumer:x%d}', n), 's', time) end";
    redis.cli(&["EVAL", FILL, "1", index]).await;
    redis.cli(&["EVAL", lives, "0"]).await;
    let before = redis.calls("evalsha").await;
    for n in 0..50 {
        let refused = node.bus.commit(&format!("b{n}"), &channel("c"), at).await.unwrap_err();
        assert_eq!(refused.code(), Code::LimitReached);
    }
    let scripts = redis.calls("evalsha").await - before;
    assert!(scripts < 5_000, "{scripts} scripts for 50 requests: one look at 1000 consumers is enough");
    // A known consumer continues.
    let at = node.publish("c", 2).await.unwrap().position;
    node.bus.commit("a", &channel("c"), at).await.unwrap();
}

/// Keys of deleted channels do not make a list scan all keys repeatedly.
#[tokio::test(flavor = "multi_thread")]
async fn a_list_skips_deleted_channels_with_one_scan() {
    let redis = RedisServer::start(&[]).await;
    let node = BusNode::start(&redis.url()).await;
    for n in 0..60 {
        let name = format!("c{n:02}");
        node.publish(&name, 1).await.unwrap();
        if n % 3 != 2 {
            node.bus.remove(&channel(&name), None).await.unwrap();
        }
    }
    let before = redis.calls("scan").await;
    let page = node.bus.list("", None, 15).await.unwrap();
    let once = redis.calls("scan").await - before;
    let names: Vec<&str> = page.iter().map(|info| info.channel.as_str()).collect();
    assert_eq!((names.len(), names[0], names[14]), (15, "c02", "c44"));
    let rest = node.bus.list("", Some("c44"), 15).await.unwrap();
    assert_eq!(rest.iter().map(|info| info.channel.as_str()).collect::<Vec<_>>(), ["c47", "c50", "c53", "c56", "c59"]);
    // One SCAN covers a database of this size.
    assert_eq!(once, 1);
}

/// A read of large events behind many small ones stays within its limit at every moment of the script.
#[tokio::test(flavor = "multi_thread")]
async fn a_read_uses_no_more_memory_than_its_limit() {
    const LARGE: usize = 100_000;
    let redis = RedisServer::start(&[]).await;
    let node = BusNode::start(&redis.url()).await;
    for _ in 0..50 {
        let batch = (0..1000).map(|n| (channel("c"), draft(n, None))).collect();
        node.bus.publish("", batch).await.unwrap();
    }
    let text = Value::String("x".repeat(LARGE)).to_string();
    let large = RawValue::from_string(text).unwrap();
    let mut first = None;
    for _ in 0..200 {
        let draft =
            Draft::new(DraftParts { data: EventData::Json(&large), ..DraftParts::default() }, 1_000_000).unwrap();
        let placed = node.bus.publish_one("", &channel("c"), draft).await.unwrap();
        first.get_or_insert(placed.position);
    }
    let start = Start::After(first.unwrap());
    let limit = weir::bus::ReadLimit { events: 256, bytes: 64 << 10 };
    redis.cli(&["CONFIG", "RESETSTAT"]).await;
    let memory = async |field: &str| redis.info(field).await.unwrap().parse::<usize>().unwrap();
    let used = memory("used_memory").await;
    let page = node.bus.read(&channel("c"), start, limit, None).await.unwrap();
    assert_eq!((page.events.len(), page.more), (1, true));
    let peak = memory("used_memory_peak").await;
    assert!(peak < used + 40 * LARGE, "{peak} bytes, {used} before");
}
