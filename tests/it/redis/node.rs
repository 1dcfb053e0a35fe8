//! Whole nodes on one Redis, as their clients see them.

use std::collections::BTreeMap;

use serde_json::json;
use weir::{config, error::Code};

use crate::support::{MINUTE, RedisServer, Response, Weir, eventually_within, redis::AOF, weir_on};

async fn ask(node: &Weir, method: &'static str, path: &str, body: &'static str) -> Response {
    node.request(method, path).body(body).await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_resumes_on_another_node() {
    let redis = RedisServer::start(&[]).await;
    let (a, b) = (weir_on(&redis.url()).await, weir_on(&redis.url()).await);
    let mut stream = a.sse("channel=orders").await;
    stream.head().await;
    let opened = stream.opening().await.id;
    assert!(opened.starts_with("0-"), "{opened}");
    let placed = ask(&b, "POST", "/v1/events?channel=orders", "1").await.expect(201).json();
    let first = stream.next().await;
    assert_eq!(first.json()["data"], json!(1));
    drop(stream);
    ask(&a, "POST", "/v1/events?channel=orders", "2").await.expect(201);
    // Ids of streams and positions of pages are valid on every node.
    let mut stream = b.sse_after("channel=orders", &first.id).await;
    stream.head().await;
    stream.opening().await;
    assert_eq!(stream.next().await.json()["data"], json!(2));
    let mut early = b.sse_after("channel=orders", &opened).await;
    early.head().await;
    early.opening().await;
    assert_eq!(early.next().await.json()["data"], json!(1));
    let after = format!("/v1/events?channel=orders&after={}-1", placed["epoch"].as_str().unwrap());
    let page = ask(&a, "GET", &after, "").await.expect(200).json();
    assert_eq!(page["events"][0]["data"], json!(2), "{page}");
    // A consumer long-polls both nodes in turn.
    let poll = "/v1/events?channel=orders&consumer=job&limit=1";
    let one = ask(&a, "GET", poll, "").await.expect(200).json();
    let next = one["next"].as_str().unwrap();
    let two = ask(&b, "GET", &format!("{poll}&after={next}"), "").await.expect(200).json();
    assert_eq!((&one["events"][0]["data"], &two["events"][0]["data"]), (&json!(1), &json!(2)), "{one} {two}");
    drop((stream, early));
    a.idle().await;
    b.idle().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn requests_fail_and_streams_stay_while_redis_is_down() {
    let mut redis = RedisServer::start(&[]).await;
    let node = weir_on(&redis.url()).await;
    let ready = async |status| {
        eventually_within(MINUTE, &format!("readiness is {status}"), async || {
            ask(&node, "GET", "/health/ready", "").await.status == status
        })
        .await;
    };
    ready(200).await;
    let mut stream = node.sse("channel=a").await;
    stream.head().await;
    stream.opening().await;
    ask(&node, "POST", "/v1/events?channel=a", "1").await.expect(201);
    assert_eq!(stream.next().await.json()["data"], json!(1));
    redis.kill();
    let refused = ask(&node, "POST", "/v1/events?channel=a", "2").await;
    assert!(matches!(refused.status, 503 | 504), "{}", refused.text());
    let refused = ask(&node, "POST", "/v1/events?channel=a", "3").await.expect(503);
    assert_eq!(refused.header("retry-after"), Some("2"));
    assert_eq!(refused.json()["code"], Code::BusUnavailable.as_str());
    // A new stream is accepted and receives a retry event, because an error status would end an EventSource.
    let mut late = node.sse("channel=b").await;
    late.head().await.expect(200);
    ready(503).await;
    ask(&node, "GET", "/health/live", "").await.expect(200);
    redis.restart().await;
    ready(200).await;
    ask(&node, "POST", "/v1/events?channel=a", "4").await.expect(201);
    let gap = stream.next().await;
    assert_eq!((gap.event.as_str(), &gap.json()["reason"]), ("weir.gap", &json!("reset")));
    assert_eq!(stream.next().await.json()["data"], json!(4), "on the same connection as before");
    drop((stream, late));
    node.idle().await;
}

/// Publishes of one connection do not wait for each other's response: those that arrive while Redis is busy are sent in
/// one script. A rejected publish does not affect the others.
#[tokio::test(flavor = "multi_thread")]
async fn concurrent_publishes_are_batched_in_order() {
    let redis = RedisServer::start(&[]).await;
    let node = weir_on(&redis.url()).await;
    let mut stream = node.sse("channel=a").await;
    stream.head().await;
    stream.opening().await;
    ask(&node, "POST", "/v1/events?channel=a&key=used", "0").await.expect(201);
    assert_eq!(stream.next().await.json()["data"], json!(0));
    let before = redis.calls("evalsha").await;
    redis.pause();
    let mut socket = node.socket().await;
    for n in 1..=500 {
        // Only the publish that reuses a key for other data is rejected.
        let params = match n {
            250 => json!({ "channel": "a", "key": "used", "data": n }),
            _ => json!({ "channel": "a", "data": n }),
        };
        socket.send_json(json!({ "jsonrpc": "2.0", "id": n, "method": "weir.publish", "params": params })).await;
    }
    redis.resume();
    let mut offsets = BTreeMap::new();
    for _ in 1..=500 {
        let answer = socket.next().await;
        let n = answer["id"].as_u64().unwrap();
        match n {
            250 => assert_eq!(answer["error"]["data"]["code"], "key_reused", "{answer}"),
            _ => assert!(offsets.insert(n, answer["result"]["offset"].as_u64().unwrap()).is_none()),
        }
    }
    let expected: Vec<u64> = (2..=500).collect();
    assert_eq!(offsets.into_values().collect::<Vec<_>>(), expected, "appended in the order received");
    for n in (1..=500).filter(|n| *n != 250) {
        assert_eq!(stream.next().await.json()["data"], json!(n));
    }
    let took = redis.calls("evalsha").await - before;
    assert!(took < 250, "{took} scripts for 500 publishes");
    drop((stream, socket));
    node.idle().await;
}

/// A page lists gaps before events, so a gap that follows events begins the next page.
#[tokio::test(flavor = "multi_thread")]
async fn a_page_ends_at_the_end_of_a_term() {
    let mut redis = RedisServer::start(AOF).await;
    let node = weir_on(&redis.url()).await;
    for _ in 0..3 {
        ask(&node, "POST", "/v1/events?channel=a", "1").await.expect(201);
    }
    let poll = node.request("GET", "/v1/events?channel=a&after=earliest&min=5&wait=50s");
    let poll = tokio::spawn(async move { poll.await.expect(200).json() });
    eventually_within(MINUTE, "the poll waits", async || node.bus().topics().readers() == 1).await;
    redis.restart().await;
    eventually_within(MINUTE, "publishes succeed", async || {
        ask(&node, "POST", "/v1/events?channel=a", "2").await.status == 201
    })
    .await;
    let page = poll.await.unwrap();
    assert_eq!((page["events"].as_array().unwrap().len(), &page["gaps"], &page["more"]), (3, &json!([]), &json!(true)));
    let next = format!("/v1/events?channel=a&after={}", page["next"].as_str().unwrap());
    let page = ask(&node, "GET", &next, "").await.expect(200).json();
    assert_eq!((&page["gaps"][0]["reason"], &page["events"][0]["data"]), (&json!("failover"), &json!(2)), "{page}");
}

#[tokio::test]
async fn an_invalid_redis_url_fails_the_start() {
    for (url, sentence) in [("http://a", "redis://"), ("redis://h:x", "not a host and a port")] {
        let mut config = config::Config::default();
        config.server.listen = vec![([127, 0, 0, 1], 0).into()];
        config.bus.backend = config::Backend::Redis;
        config.bus.redis.url = url.into();
        let error = weir::app::App::build(config).await.err().unwrap().to_string();
        assert!(error.contains("bus.redis.url") && error.contains(sentence), "{error}");
    }
}

/// During a rolling update, data of a newer version is neither misread nor overwritten, and streams stay open.
#[tokio::test(flavor = "multi_thread")]
async fn a_channel_written_by_a_newer_version_is_not_modified() {
    let redis = RedisServer::start(&[]).await;
    let node = weir_on(&redis.url()).await;
    let mut stream = node.sse("channel=a").await;
    stream.head().await;
    stream.opening().await;
    ask(&node, "POST", "/v1/events?channel=a", "1").await.expect(201);
    assert_eq!(stream.next().await.json()["data"], json!(1));
    let version = async |byte: &str| {
        let script = format!(
            "local h = redis.call('HGET', KEYS[1], 'h') \
                              return redis.call('HSET', KEYS[1], 'h', '\\{byte}' .. string.sub(h, 2))"
        );
        assert_eq!(redis.cli(&["EVAL", &script, "1", "weir:{a}:m"]).await, "0");
    };
    version("2").await;
    let refused = [
        ask(&node, "POST", "/v1/events?channel=a", "2").await,
        ask(&node, "GET", "/v1/events?channel=a", "").await,
        ask(&node, "DELETE", "/v1/events?channel=a", "").await,
    ];
    for refused in refused {
        let problem = refused.expect(503).json();
        assert_eq!(problem["code"], Code::BusUnavailable.as_str());
        assert!(problem["detail"].as_str().unwrap().contains("a newer weir wrote this channel"), "{problem}");
    }
    // Messages of a newer version are ignored and counted.
    redis.cli(&["PUBLISH", "weir:{a}:e", "\u{2}e what it says"]).await;
    redis.cli(&["PUBLISH", "weir:{nodes}:news", "\u{2}what it tells"]).await;
    eventually_within(MINUTE, "the message is counted", async || node.metric("weir_redis_unreadable_total") >= 1).await;
    ask(&node, "POST", "/v1/events?channel=other", "1").await.expect(201);
    version("1").await;
    let placed = ask(&node, "POST", "/v1/events?channel=a", "3").await.expect(201).json();
    assert_eq!(placed["offset"], json!(2));
    assert_eq!(stream.next().await.json()["data"], json!(3), "on the same connection as before");
    drop(stream);
    node.idle().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn idempotency_keys_in_redis_expire_by_themselves() {
    let redis = RedisServer::start(&[]).await;
    let node = weir_on(&redis.url()).await;
    for n in 1..=10 {
        let path = format!("/v1/events?channel=a&key=k{n}");
        node.post(path, "1").await.expect(201);
    }
    let again = ask(&node, "POST", "/v1/events?channel=a&key=k1", "1").await.expect(200).json();
    assert_eq!((&again["offset"], &again["duplicate"]), (&json!(1), &json!(true)));
    let keys = redis.cli(&["KEYS", "weir:{a}:k:*"]).await;
    assert_eq!(keys.lines().count(), 10);
    let window = config::Config::default().bus.idempotency_window.as_millis() as u64;
    for key in keys.lines() {
        let left: u64 = redis.cli(&["PTTL", key]).await.parse().unwrap();
        assert!((1..=window).contains(&left), "{key} ends in {left} ms");
    }
}
