//! Events over WebSocket: publish, subscribe, read, and the order of messages.

use std::time::Duration;

use serde_json::{Value, json};

use crate::support::{Socket, eventually, socket::members, weir};

fn position(event: &Value) -> String {
    format!("{}-{}", event["epoch"].as_str().unwrap(), event["offset"])
}

#[tokio::test]
async fn publish_accepts_all_its_forms() {
    let weir = weir().await;
    let mut socket = weir.socket().await;
    let placed = socket
        .call(
            "weir.publish",
            json!({ "channel": "a", "type": "t", "from": "me", "data": null, "meta": { "traceparent": "00-1" } }),
        )
        .await;
    assert_eq!(members(&placed), ["channel", "epoch", "offset", "time"]);
    socket.call("weir.publish", json!({ "channel": "a", "data_base64": "AP8=" })).await;
    socket.call("weir.publish", json!({ "channel": "a" })).await;
    let many = socket
        .call("weir.publish", json!({ "events": [{ "channel": "a", "data": 4 }, { "channel": "b", "data": 1 }] }))
        .await;
    assert_eq!((&many[0]["offset"], &many[1]["channel"]), (&json!(4), &json!("b")));
    // The whole batch is validated before any event is published.
    let refused = socket.call_error("weir.publish", json!({ "events": [{ "channel": "a" }, { "channel": "" }] })).await;
    assert_eq!(refused["code"], -32602);
    socket.call_error("weir.publish", json!({ "events": [] })).await;

    let key = json!({ "channel": "k", "data": 1, "key": "one" });
    let first = socket.call("weir.publish", key.clone()).await;
    let again = socket.call("weir.publish", key).await;
    assert_eq!((&again["offset"], &again["duplicate"]), (&first["offset"], &json!(true)));
    let reused = socket.call_error("weir.publish", json!({ "channel": "k", "data": 2, "key": "one" })).await;
    assert_eq!(reused["code"], -32034);

    let page = socket.call("weir.read", json!({ "channels": ["a"] })).await;
    let events = page["events"].as_array().unwrap();
    assert_eq!(events.len(), 4);
    assert_eq!((&events[0]["data"], &events[0]["type"], &events[0]["from"]), (&Value::Null, &json!("t"), &json!("me")));
    assert!(events[0].as_object().unwrap().contains_key("data"));
    assert_eq!(events[1]["data_base64"], "AP8=");
    assert!(!events[2].as_object().unwrap().contains_key("data"));
    assert_eq!(weir.metric("weir_events_published_total{transport=\"ws\"}"), 6);
    assert_eq!(weir.metric("weir_publish_duplicates_total"), 1);
}

#[tokio::test]
async fn publishes_are_appended_in_the_order_received() {
    let weir = weir().await;
    let mut socket = weir.socket().await;
    for n in 0..1_000 {
        // Requests, notifications and batches keep one order.
        let publish = format!(r#""method":"weir.publish","params":{{"channel":"a","data":{n}}}"#);
        socket
            .feed(match n % 3 {
                0 => format!(r#"{{"jsonrpc":"2.0","id":{n},{publish}}}"#),
                1 => format!(r#"{{"jsonrpc":"2.0",{publish}}}"#),
                _ => format!(r#"[{{"jsonrpc":"2.0",{publish}}}]"#),
            })
            .await;
        if n % 100 == 99 {
            // Stays within limits.calls.
            socket.flush().await;
            socket.next_where(|message| message["id"] == n / 3 * 3).await;
        }
    }
    socket.call("weir.ping", json!({})).await;
    let page = socket.call("weir.read", json!({ "channels": ["a"], "limit": 1000 })).await;
    let placed: Vec<u64> =
        page["events"].as_array().unwrap().iter().map(|event| event["data"].as_u64().unwrap()).collect();
    assert_eq!(placed, (0..1_000).collect::<Vec<_>>());
}

#[tokio::test]
async fn subscribe_starts_replaces_and_ends_subscriptions() {
    let weir = weir().await;
    for n in 1..=5 {
        weir.publish("log", &n.to_string()).await;
    }
    let third = weir.publish("orders", "1").await;
    let mut socket = weir.socket().await;
    let params = json!({ "channels": ["chat", { "channel": "orders", "after": "earliest", "type": ["created"] }, { "channel": "log", "last": 2 }] });
    let begun = socket.call("weir.subscribe", params).await;
    let channels: Vec<&str> =
        begun["channels"].as_array().unwrap().iter().map(|at| at["channel"].as_str().unwrap()).collect();
    assert_eq!(channels, ["chat", "orders", "log"]);
    assert!(begun["channels"][0]["position"].as_str().unwrap().starts_with("0-"));
    assert_eq!(begun["channels"][0].as_object().unwrap().len(), 2);
    assert!(begun["channels"][2]["position"].as_str().unwrap().ends_with("-3"));
    for n in [4, 5] {
        assert_eq!(socket.notification("weir.event").await["data"], n);
    }
    weir.post("/v1/events?channel=orders&type=changed", "2").await.expect(201);
    weir.post("/v1/events?channel=orders&type=created", "3").await.expect(201);
    let event = socket.notification("weir.event").await;
    assert_eq!((&event["data"], &event["type"], &event["offset"]), (&json!(3), &json!("created"), &json!(3)));
    weir.publish("chat", r#"{"text":"hi"}"#).await;
    assert_eq!(socket.notification("weir.event").await["data"]["text"], "hi");
    assert_eq!(weir.metric("weir_subscriptions{transport=\"ws\"}"), 3);

    // Another subscribe replaces the filter, and the position only if one is given.
    let begun = socket.call("weir.subscribe", json!({ "channels": ["orders"] })).await;
    assert!(begun["channels"][0]["position"].as_str().unwrap().ends_with("-3"), "{begun}");
    socket.expect_nothing().await;
    let begun = socket.call("weir.subscribe", json!({ "channels": [{ "channel": "orders", "after": third }] })).await;
    assert_eq!(begun["channels"][0]["position"], third);
    for n in [2, 3] {
        assert_eq!(socket.notification("weir.event").await["data"], n);
    }
    assert_eq!(weir.metric("weir_subscriptions{transport=\"ws\"}"), 3);

    let ended = socket.call("weir.unsubscribe", json!({ "channels": ["log", "other"] })).await;
    assert_eq!(ended, json!({ "channels": ["log"] }));
    weir.publish("log", "6").await;
    socket.call("weir.unsubscribe", json!({ "channels": ["chat", "orders"] })).await;
    socket.expect_nothing().await;
    assert_eq!(weir.metric("weir_subscriptions{transport=\"ws\"}"), 0);
}

#[tokio::test]
async fn a_rejected_subscribe_subscribes_to_nothing() {
    let weir = weir().with(|config| config.limits.subscriptions = 3).await;
    let mut socket = weir.socket().await;
    socket.call("weir.subscribe", json!({ "channels": ["a", "b"] })).await;
    let refused = socket.call_error("weir.subscribe", json!({ "channels": ["c", "d"] })).await;
    assert_eq!((&refused["code"], &refused["data"]["limit"]), (&json!(-32007), &json!("limits.subscriptions")));
    socket.call_error("weir.subscribe", json!({ "channels": ["c", ""] })).await;
    socket.call_error("weir.subscribe", json!({ "channels": ["c", { "channel": "x", "after": "w!" }] })).await;
    assert_eq!(weir.metric("weir_subscriptions{transport=\"ws\"}"), 2);
    socket.call("weir.subscribe", json!({ "channels": ["a", "b", "c"] })).await;
}

#[tokio::test]
async fn the_answer_comes_before_the_first_event() {
    let weir = weir().await;
    for n in 0..50 {
        weir.publish("a", &n.to_string()).await;
    }
    let mut socket = weir.socket().await;
    let subscribe = r#"{"jsonrpc":"2.0","id":1,"method":"weir.subscribe","params":{"channels":[{"channel":"a","after":"earliest"}]}}"#;
    socket.send(subscribe).await;
    assert_eq!(socket.next().await["id"], 1);
    for n in 0..50 {
        assert_eq!(socket.next().await["params"]["data"], n);
    }
    // The same holds for a batch with a slow call.
    let mut provider = weir.socket().await;
    provider.provide("slow").await;
    let mut socket = weir.socket().await;
    socket.send(format!(r#"[{subscribe},{{"jsonrpc":"2.0","id":2,"method":"slow/m"}}]"#)).await;
    let request = provider.next_request().await;
    weir.publish("a", "50").await;
    socket.expect_nothing().await;
    provider.reply(&request, json!(1)).await;
    assert!(socket.next().await.is_array());
    for n in 0..=50 {
        assert_eq!(socket.next().await["params"]["data"], n);
    }
    // A subscription that waits for its batch can be ended.
    socket
        .send(format!(r#"[{},{{"jsonrpc":"2.0","id":2,"method":"slow/m"}}]"#, subscribe.replace("\"a\"", "\"b\"")))
        .await;
    let request = provider.next_request().await;
    socket.call("weir.unsubscribe", json!({ "channels": ["b"] })).await;
    provider.reply(&request, json!(1)).await;
    socket.next().await;
    weir.publish("b", "1").await;
    socket.expect_nothing().await;
}

#[tokio::test]
async fn resuming_with_a_position_a_token_and_a_gap() {
    let weir = weir().with(|config| config.channels[0].keep.count = 10).await;
    let first = weir.publish("a", "1").await;
    for n in 2..=20 {
        weir.publish("a", &n.to_string()).await;
    }
    let mut socket = weir.socket().await;
    let begun = socket.call("weir.subscribe", json!({ "channels": [{ "channel": "a", "after": first }] })).await;
    let gap = &begun["channels"][0]["gap"];
    assert_eq!((&gap["reason"], &gap["after"], &gap["missed"]), (&json!("trimmed"), &json!(first), &json!(9)));
    let event = socket.notification("weir.event").await;
    assert_eq!((position(&event), &event["data"]), (gap["next"].as_str().unwrap().to_owned(), &json!(11)));
    for _ in 12..=20 {
        socket.notification("weir.event").await;
    }
    // The gap in the response is not sent again.
    socket.expect_nothing().await;
    assert_eq!(weir.metric("weir_gaps_total{reason=\"trimmed\"}"), 1);

    weir.publish("b", "1").await;
    let page = socket.call("weir.read", json!({ "channels": ["a", "b"], "last": 1 })).await;
    let token = page["next"].as_str().unwrap();
    weir.publish("a", "21").await;
    weir.publish("b", "2").await;
    let mut other = weir.socket().await;
    other.call("weir.subscribe", json!({ "channels": ["b", "a"], "after": token })).await;
    let mut seen = vec![
        other.notification("weir.event").await["data"].as_u64(),
        other.notification("weir.event").await["data"].as_u64(),
    ];
    seen.sort_unstable();
    assert_eq!(seen, [Some(2), Some(21)]);
    other.expect_nothing().await;
    let refused = other.call_error("weir.subscribe", json!({ "channels": ["a"], "after": token })).await;
    assert_eq!(refused["code"], -32030);
}

#[tokio::test]
async fn a_reader_that_falls_behind_receives_a_gap() {
    let weir = weir().with(|config| config.channels[0].keep.count = 100).await;
    let mut socket = weir.socket().await;
    socket.call("weir.subscribe", json!({ "channels": ["a"] })).await;
    let data = format!("\"{}\"", "x".repeat(100_000));
    for _ in 0..300 {
        weir.publish("a", &data).await;
    }
    // Every event once and in order, or a gap with the number of missed events.
    let (mut next, mut gaps) = (1, 0);
    while next <= 300 {
        let message = socket.next().await;
        let params = &message["params"];
        match message["method"].as_str().unwrap() {
            "weir.event" => {
                assert_eq!(params["offset"], next);
                next += 1;
            }
            "weir.gap" => {
                let missed = params["missed"].as_u64().unwrap();
                next += missed;
                assert_eq!(params["next"].as_str().unwrap().rsplit('-').next().unwrap(), next.to_string());
                gaps += 1;
            }
            other => panic!("{other}"),
        }
    }
    assert!(gaps > 0);
}

#[tokio::test]
async fn a_thousand_channels_on_one_socket() {
    let weir = weir().await;
    let mut socket = weir.socket().await;
    let names: Vec<String> = (0..1_000).map(|n| format!("c{n}")).collect();
    socket.call("weir.subscribe", json!({ "channels": names })).await;
    let mut publisher = weir.socket().await;
    for n in 0..1_000 {
        publisher
            .feed(format!(r#"{{"jsonrpc":"2.0","method":"weir.publish","params":{{"channel":"c{n}","data":{n}}}}}"#))
            .await;
        if n % 200 == 199 {
            publisher.expect_nothing().await;
        }
    }
    publisher.flush().await;
    let mut seen: Vec<u64> = Vec::new();
    for _ in 0..1_000 {
        let event = socket.notification("weir.event").await;
        assert_eq!(event["channel"], format!("c{}", event["data"]));
        seen.push(event["data"].as_u64().unwrap());
    }
    seen.sort_unstable();
    assert_eq!(seen, (0..1_000).collect::<Vec<_>>());
    drop(socket);
    eventually("no reader is left", async || weir.bus().topics().readers() == 0).await;
}

#[tokio::test]
async fn query_parameters_subscribe_the_socket() {
    let weir = weir().await;
    for n in 1..=3 {
        weir.post(format!("/v1/events?channel=a%2Cb&type=t{n}"), n.to_string()).await.expect(201);
    }
    let mut socket = Socket::open_at(weir.address, "/v1/ws?channel=a,b&last=2&type=t3&type=t2&_=1").await;
    for n in [2, 3] {
        assert_eq!(socket.notification("weir.event").await["data"], n);
    }
    let mut socket = Socket::open_at(weir.address, "/v1/ws?channel=x&channel=y").await;
    weir.publish("x", "1").await;
    weir.publish("y", "2").await;
    let mut seen = [
        socket.notification("weir.event").await["data"].as_u64(),
        socket.notification("weir.event").await["data"].as_u64(),
    ];
    seen.sort_unstable();
    assert_eq!(seen, [Some(1), Some(2)]);
    let mut socket = Socket::open_at(weir.address, "/v1/ws?channel=x&after=AAAAAB-7").await;
    assert_eq!(socket.notification("weir.gap").await["reason"], "reset");
    assert_eq!(Socket::handshake(weir.address, "/v1/ws?channel=x&after=x-y", &[]).await.err().unwrap().status(), 400);
}

#[tokio::test]
async fn a_waiting_read_does_not_block_the_socket() {
    let weir = weir().await;
    let mut socket = weir.socket().await;
    socket.send_json(json!({ "jsonrpc": "2.0", "id": "w", "method": "weir.read", "params": { "channels": ["a"], "wait": "20s" } })).await;
    // A publish behind the read is executed at once and ends the wait.
    socket.call("weir.publish", json!({ "channel": "a", "data": 7 })).await;
    let page = socket.next_where(|message| message["id"] == "w").await;
    assert_eq!(page["result"]["events"][0]["data"], 7);
    // A read sees earlier publishes whose response is still pending.
    socket.feed(r#"{"jsonrpc":"2.0","method":"weir.publish","params":{"channel":"b","data":8}}"#).await;
    socket.feed(r#"{"jsonrpc":"2.0","id":"r","method":"weir.read","params":{"channels":["b"],"wait":"20s"}}"#).await;
    socket.flush().await;
    assert_eq!(socket.next_where(|message| message["id"] == "r").await["result"]["events"][0]["data"], 8);
    let empty = socket.call("weir.read", json!({ "channels": ["c"], "wait": "50ms" })).await;
    assert_eq!(empty["events"], json!([]));
    assert_eq!(socket.call_error("weir.read", json!({ "channels": ["c"], "wait": "56s" })).await["code"], -32602);

    // A drain ends waiting reads with an empty page.
    socket.send_json(json!({ "jsonrpc": "2.0", "id": "d", "method": "weir.read", "params": { "channels": ["z"], "wait": "20s" } })).await;
    socket.call("weir.ping", json!({})).await;
    weir.shut_down();
    assert_eq!(socket.next_where(|message| message["id"] == "d").await["result"]["events"], json!([]));
}

#[tokio::test]
async fn consumers_read_and_commit() {
    let weir = weir().await;
    for n in 1..=3 {
        weir.publish("a", &n.to_string()).await;
    }
    let mut socket = weir.socket().await;
    let read = json!({ "channels": ["a"], "consumer": "batch", "limit": 2 });
    let page = socket.call("weir.read", read.clone()).await;
    assert_eq!(page["consumer"], json!({ "name": "batch", "new": true }));
    assert_eq!(socket.call("weir.commit", json!({ "consumer": "batch", "after": page["next"] })).await, Value::Null);
    let page = socket.call("weir.read", read).await;
    assert_eq!(page["events"][0]["data"], 3);
    assert_eq!(
        socket.call_error("weir.commit", json!({ "consumer": "nobody", "after": page["next"] })).await["code"],
        -32004
    );
}

#[tokio::test]
async fn waiting_requests_are_limited() {
    let weir = weir().with(|config| config.limits.calls = 3).await;
    let mut socket = weir.socket().await;
    for id in 0..4 {
        socket.send_json(json!({ "jsonrpc": "2.0", "id": id, "method": "weir.read", "params": { "channels": ["a"], "wait": "20s" } })).await;
    }
    let refused = socket.next_where(|message| message["id"] == 3).await;
    assert_eq!(refused["error"]["data"]["code"], "limit_reached");
    weir.publish("a", "1").await;
    for id in 0..3 {
        assert_eq!(socket.next_where(|message| message["id"] == id).await["result"]["events"][0]["data"], 1);
    }
}

#[tokio::test]
async fn nothing_unsolicited_is_sent() {
    let weir = weir().await;
    let mut socket = weir.socket().await;
    weir.publish("a", "1").await;
    socket.call("weir.publish", json!({ "channel": "a" })).await;
    let silent = tokio::time::timeout(Duration::from_millis(200), socket.text()).await;
    assert!(silent.is_err(), "{silent:?}");
}

#[tokio::test]
async fn pages_are_produced_at_the_pace_of_the_reader() {
    let weir = weir().with(|config| config.limits.queued = 100_000).await;
    weir.publish("a", &format!("{:?}", "x".repeat(90_000))).await;
    let mut socket = weir.socket().await;
    for id in 0..40 {
        socket
            .feed(
                json!({ "jsonrpc": "2.0", "id": id, "method": "weir.read", "params": { "channels": ["a"] } })
                    .to_string(),
            )
            .await;
    }
    socket.flush().await;
    for id in 0..40 {
        assert_eq!(socket.next().await["id"], id);
    }
}

#[tokio::test]
async fn subscription_limits_apply_in_the_order_of_requests() {
    let weir = weir().with(|config| config.limits.subscriptions = 2).await;
    let mut socket = weir.socket().await;
    let requests =
        [("subscribe", ["a", "b"]), ("unsubscribe", ["a", "x"]), ("subscribe", ["b", "c"]), ("subscribe", ["c", "d"])];
    for (method, channels) in requests {
        let method = format!("weir.{method}");
        socket
            .feed(
                json!({ "jsonrpc": "2.0", "id": 1, "method": method, "params": { "channels": channels } }).to_string(),
            )
            .await;
    }
    socket.flush().await;
    for _ in 0..3 {
        let answer = socket.next().await;
        assert!(answer["result"].is_object(), "{answer}");
    }
    assert_eq!(socket.next().await["error"]["data"]["limit"], "limits.subscriptions");
    assert_eq!(weir.bus().topics().readers(), 2);
}
