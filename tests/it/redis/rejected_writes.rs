//! A Redis that rejects writes and can be read: so can weir, on nodes that run and on nodes that start.

use serde_json::{Value, json};
use weir::error::Code;

use crate::support::{EventStream, MINUTE, RedisServer, Weir, eventually_within, redis::AOF, weir_on};

/// Five events, and a consumer that has committed two of them.
async fn fill(node: &Weir) {
    for n in 1..=5 {
        node.publish("c", &n.to_string()).await;
    }
    let page = node.get("/v1/events?channel=c&consumer=m&limit=2").await.expect(200).json();
    node.post("/v1/consumers/m/commit", json!({ "after": page["next"] }).to_string()).await.expect(204);
}

fn data(page: &Value) -> Vec<u64> {
    page["events"].as_array().unwrap().iter().map(|event| event["data"].as_u64().unwrap()).collect()
}

/// Everything is read, and what would have to be stored is reported as not stored.
async fn everything_is_read(node: &Weir) {
    let page = node.get("/v1/events?channel=c&after=earliest").await.expect(200).json();
    assert_eq!((data(&page), &page["gaps"]), (vec![1, 2, 3, 4, 5], &json!([])));
    let channels = node.get("/v1/channels").await.expect(200).json();
    assert_eq!(channels["channels"][0]["channel"], "c");
    let consumer = node.get("/v1/consumers/m").await.expect(200).json();
    assert_eq!(consumer["channels"][0]["lag"], 3);
    assert_eq!(node.get("/v1/consumers").await.expect(200).json()["consumers"][0]["name"], "m");
    let mut stream = EventStream::opened(node.address, "channel=c&after=earliest").await;
    for n in 1..=5 {
        assert_eq!(stream.next().await.json()["data"], n);
    }
    // The cursor is read, and where it cannot be moved the page says so.
    let page = node.get("/v1/events?channel=c&consumer=m&limit=2").await.expect(200).json();
    assert_eq!((data(&page), &page["consumer"]), (vec![3, 4], &json!({ "name": "m" })));
    let next = page["next"].as_str().unwrap();
    let on = node.get(format!("/v1/events?channel=c&consumer=m&after={next}")).await.expect(200).json();
    assert_eq!((data(&on), &on["consumer"]), (vec![5], &json!({ "name": "m", "committed": false })));
    let auto = node.get("/v1/events?channel=c&consumer=m&commit=auto").await.expect(200).json();
    assert_eq!((data(&auto), &auto["consumer"]["committed"]), (vec![3, 4, 5], &json!(false)));
    let new = node.get("/v1/events?channel=c&consumer=other").await.expect(200).json();
    assert_eq!(new["consumer"], json!({ "name": "other", "new": true, "committed": false }));
    assert_eq!(data(&new), [1, 2, 3, 4, 5]);
    // A request that only writes fails.
    for write in [
        node.post("/v1/consumers/m/commit", json!({ "after": next }).to_string()).await,
        node.post("/v1/events?channel=c", "6").await,
    ] {
        let code = write.expect(503).json()["code"].as_str().unwrap().to_owned();
        assert!([Code::BusUnavailable.as_str(), Code::Overloaded.as_str()].contains(&&*code), "{code}");
    }
}

async fn everything_is_written_again(node: &Weir) {
    eventually_within(MINUTE, "publishes are accepted", async || {
        node.post("/v1/events?channel=c", "6").await.status == 201
    })
    .await;
    let page = node.get("/v1/events?channel=c&consumer=m&limit=2").await.expect(200).json();
    assert_eq!(data(&page), [3, 4], "nothing that was reported as not committed was");
}

#[tokio::test(flavor = "multi_thread")]
async fn everything_is_read_from_a_redis_without_memory() {
    let mut redis = RedisServer::start(AOF).await;
    let node = weir_on(&redis.url()).await;
    fill(&node).await;
    let full = ["CONFIG", "SET", "maxmemory", "1mb"];
    redis.cli(&full).await;
    everything_is_read(&node).await;
    everything_is_read(&weir_on(&redis.url()).await).await;
    // A new process would begin a new term, which it cannot write.
    redis.restart().await;
    redis.cli(&full).await;
    everything_is_read(&weir_on(&redis.url()).await).await;
    redis.cli(&["CONFIG", "SET", "maxmemory", "0"]).await;
    everything_is_written_again(&node).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn everything_is_read_from_a_redis_without_replicas() {
    let redis = RedisServer::start(&[]).await;
    let node = weir_on(&redis.url()).await;
    fill(&node).await;
    redis.cli(&["CONFIG", "SET", "min-replicas-to-write", "1"]).await;
    everything_is_read(&node).await;
    everything_is_read(&weir_on(&redis.url()).await).await;
    redis.cli(&["CONFIG", "SET", "min-replicas-to-write", "0"]).await;
    everything_is_written_again(&node).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn everything_is_read_by_a_user_who_may_only_read() {
    let redis = RedisServer::start(&[]).await;
    let node = weir_on(&redis.url()).await;
    fill(&node).await;
    redis.cli(&["ACL", "SETUSER", "reader", "on", ">secret", "~*", "&*", "+@all", "-@write"]).await;
    let reader = weir_on(&format!("redis://reader:secret@{}", redis.address())).await;
    everything_is_read(&reader).await;
}

/// A node whose sessions Redis does not store is still known to the others, which reach its clients.
#[tokio::test(flavor = "multi_thread")]
async fn nodes_know_each_other_while_redis_rejects_writes() {
    let redis = RedisServer::start(&[]).await;
    let one = weir_on(&redis.url()).await;
    let _socket = one.socket().await;
    redis.cli(&["CONFIG", "SET", "min-replicas-to-write", "1"]).await;
    let two = weir_on(&redis.url()).await;
    // As after ten seconds without a heartbeat that Redis stored.
    let sessions = redis.cli(&["KEYS", "weir:{node:*}"]).await;
    for session in sessions.lines() {
        redis.cli(&["CONFIG", "SET", "min-replicas-to-write", "0"]).await;
        redis.cli(&["DEL", session]).await;
        redis.cli(&["CONFIG", "SET", "min-replicas-to-write", "1"]).await;
    }
    eventually_within(MINUTE, "the connection of the other node is listed", async || {
        let listed = two.get("/v1/connections").await.expect(200).json();
        listed["connections"].as_array().unwrap().iter().any(|connection| connection["transport"] == "ws")
    })
    .await;
}
