//! Calls between sockets: messages of providers and callers, and the effects of their disconnects.

use std::time::Duration;

use serde_json::{Value, json};
use tokio::io::AsyncReadExt as _;

use crate::support::{Socket, Weir, eventually, in_time, socket::members, weir};

/// A node, a provider of service `s` and a caller.
async fn pair() -> (Weir, Socket, Socket) {
    let weir = weir().await;
    let mut provider = weir.socket().await;
    provider.provide("s").await;
    let caller = weir.socket().await;
    (weir, provider, caller)
}

fn call(id: u32, method: &str) -> String {
    format!(r#"{{"jsonrpc":"2.0","id":{id},"method":"{method}","params":[{id}]}}"#)
}

#[tokio::test]
async fn a_forwarded_request_has_four_members_and_a_hub_id() {
    let (weir, mut provider, mut caller) = pair().await;
    caller.send(r#"{"jsonrpc":"2.0","id":1,"method":"s/m","params":{"a": [1,  2]},"extra":7}"#).await;
    let text = provider.text().await;
    let request: Value = serde_json::from_str(&text).unwrap();
    assert_eq!(members(&request), ["id", "jsonrpc", "method", "params"]);
    assert!(request["id"].as_str().unwrap().starts_with("w:"), "{text}");
    assert_eq!(request["method"], "m");
    // Payloads are forwarded byte for byte.
    assert!(text.contains(r#""params":{"a": [1,  2]}"#), "{text}");
    provider.send(format!(r#"{{"jsonrpc":"2.0","result":{{"b": null }},"id":{}}}"#, request["id"])).await;
    assert_eq!(caller.text().await, r#"{"jsonrpc":"2.0","id":1,"result":{"b": null }}"#);

    // Missing params stay missing, and null counts as missing.
    for sent in
        [r#"{"jsonrpc":"2.0","id":2,"method":"s/m"}"#, r#"{"jsonrpc":"2.0","id":2,"method":"s/m","params":null}"#]
    {
        caller.send(sent).await;
        let request = provider.next_request().await;
        assert!(request.get("params").is_none(), "{request}");
        provider.reply(&request, Value::Null).await;
        assert_eq!(caller.text().await, r#"{"jsonrpc":"2.0","id":2,"result":null}"#);
    }
    drop(weir);
}

#[tokio::test]
async fn meta_is_sent_beside_params_if_requested() {
    let weir = weir().await;
    let mut provider = weir.socket().await;
    provider.call("weir.provide", json!({ "service": "s", "meta": true, "exclusive": true })).await;
    let mut caller = weir.socket().await;
    caller.send_json(json!({ "jsonrpc": "2.0", "id": 1, "method": "weir.call", "params": { "service": "s", "method": "m", "params": [], "timeout": "5s" } })).await;
    let request = provider.next_request().await;
    assert_eq!(request["params"], json!([]));
    let meta = &request["meta"];
    assert_eq!(meta["caller"], "");
    assert!((4_000..=5_000).contains(&meta["deadline_ms"].as_u64().unwrap()), "{meta}");
    assert!(meta["fence"].is_u64(), "{meta}");
    // The provider is notified of cancelled calls by either method, and the caller receives one response.
    for (id, cancel) in [(1, "weir.cancel"), (2, "$/cancelRequest")] {
        if id == 2 {
            caller.send(call(2, "s/m")).await;
        }
        caller.send_json(json!({ "jsonrpc": "2.0", "method": cancel, "params": { "id": id } })).await;
        let answer = caller.next().await;
        assert_eq!((&answer["id"], &answer["error"]["code"]), (&json!(id), &json!(-32024)));
        let forwarded = if id == 1 { request.clone() } else { provider.next_request().await };
        assert_eq!(provider.notification("weir.cancel").await["id"], forwarded["id"]);
        provider.reply(&forwarded, json!(1)).await;
    }
    caller.expect_nothing().await;
}

#[tokio::test]
async fn a_provider_error_is_forwarded_as_three_members() {
    let (_weir, mut provider, mut caller) = pair().await;
    for (error, seen) in [
        (
            r#"{"code":42,"message":"no such user","data":{"a": 1},"stack":"…"}"#,
            r#"{"code":42,"message":"no such user","data":{"a": 1}}"#,
        ),
        (r#"{"code":-32601,"message":"Method not found"}"#, r#"{"code":-32601,"message":"Method not found"}"#),
        (r#"{"data":null,"code":7,"message":"x"}"#, r#"{"code":7,"message":"x"}"#),
    ] {
        caller.send(call(1, "s/m")).await;
        let request = provider.next_request().await;
        provider.send(format!(r#"{{"jsonrpc":"2.0","id":{},"error":{error}}}"#, request["id"])).await;
        assert_eq!(caller.text().await, format!(r#"{{"jsonrpc":"2.0","id":1,"error":{seen}}}"#));
    }
    // Errors that cannot be forwarded.
    for error in ["7", "{}", r#"{"code":"x","message":"y"}"#, "null"] {
        caller.send(call(2, "s/m")).await;
        let request = provider.next_request().await;
        provider.send(format!(r#"{{"jsonrpc":"2.0","id":{},"error":{error}}}"#, request["id"])).await;
        let answer = caller.next().await;
        assert_eq!(answer["error"]["data"]["code"], "bad_reply", "{error}: {answer}");
        assert_eq!(answer["error"]["data"]["executed"], "maybe");
    }
    // Some libraries send both members, one of them null.
    caller.send(call(3, "s/m")).await;
    let request = provider.next_request().await;
    provider.send(format!(r#"{{"jsonrpc":"2.0","id":{},"result":5,"error":null}}"#, request["id"])).await;
    assert_eq!(caller.next().await["result"], 5);
}

#[tokio::test]
async fn equal_ids_of_two_callers_are_kept_apart() {
    let (weir, mut provider, mut one) = pair().await;
    let mut other = weir.socket().await;
    one.send(call(1, "s/one")).await;
    let first = provider.next_request().await;
    other.send(call(1, "s/other")).await;
    let second = provider.next_request().await;
    assert_ne!(first["id"], second["id"]);
    provider.reply(&second, json!("other")).await;
    provider.reply(&first, json!("one")).await;
    assert_eq!(one.next().await["result"], "one");
    assert_eq!(other.next().await["result"], "other");
    // A reply from a connection that did not receive the call is ignored.
    one.send(call(2, "s/one")).await;
    let request = provider.next_request().await;
    other.reply(&request, json!("forged")).await;
    other.expect_nothing().await;
    provider.reply(&request, json!("true")).await;
    assert_eq!(one.next().await["result"], "true");
}

#[tokio::test]
async fn calls_are_written_in_order_with_a_thousand_in_flight() {
    let (_weir, mut provider, mut caller) = pair().await;
    for id in 0..1_000 {
        caller.feed(call(id, "s/m")).await;
        if id % 100 == 0 {
            // Notifications keep their order among the calls.
            caller.feed(format!(r#"{{"jsonrpc":"2.0","method":"s/n","params":[{id}]}}"#)).await;
        }
    }
    caller.flush().await;
    let mut requests = Vec::new();
    for id in 0..1_000 {
        let request = provider.next_request().await;
        assert_eq!(request["params"], json!([id]));
        if id % 100 == 0 {
            let note = provider.next_request().await;
            assert_eq!((&note["params"], note.get("id")), (&json!([id]), None));
        }
        requests.push(request);
    }
    // One more call exceeds the limit, and the socket is still read.
    caller.send(call(1_000, "s/m")).await;
    let refused = caller.next().await;
    assert_eq!((&refused["id"], &refused["error"]["code"]), (&json!(1_000), &json!(-32007)));
    caller.send(r#"{"jsonrpc":"2.0","id":"p","method":"weir.ping"}"#).await;
    assert_eq!(caller.next().await["id"], "p");
    // Replies may have any order.
    for request in requests.iter().rev() {
        provider.reply(request, request["params"].clone()).await;
    }
    let mut seen: Vec<u64> = Vec::new();
    for _ in 0..1_000 {
        let answer = caller.next().await;
        assert_eq!(answer["result"], json!([answer["id"]]));
        seen.push(answer["id"].as_u64().unwrap());
    }
    seen.sort_unstable();
    assert_eq!(seen, (0..1_000).collect::<Vec<_>>());
    caller.expect_nothing().await;
}

#[tokio::test]
async fn a_provider_can_call_itself() {
    let weir = weir().with(|config| config.limits.calls = 4).await;
    let mut both = weir.socket().await;
    both.provide("s").await;
    for id in 0..6 {
        both.feed(call(id, "s/m")).await;
    }
    both.flush().await;
    let mut requests = Vec::new();
    for _ in 0..4 {
        requests.push(both.next_request().await);
    }
    for id in [4, 5] {
        let refused = both.next_where(|message| message["id"] == id).await;
        assert_eq!(refused["error"]["data"]["code"], "limit_reached");
    }
    for request in &requests {
        both.reply(request, json!("own")).await;
    }
    for id in 0..4 {
        assert_eq!(both.next_where(|message| message["id"] == id).await["result"], "own");
    }
}

#[tokio::test]
async fn a_second_service_of_a_connection_needs_qualified_names() {
    let (_weir, mut provider, mut caller) = pair().await;
    let refused = provider.call_error("weir.provide", json!({ "service": "a/b" })).await;
    assert_eq!(refused["code"], -32602);
    assert!(refused["message"].as_str().unwrap().contains("full"), "{refused}");
    provider.call("weir.provide", json!({ "service": "a/b", "names": "full" })).await;
    caller.send(call(1, "a/b/get")).await;
    assert_eq!(provider.next_request().await["method"], "a/b/get");
    caller.send(call(2, "s/get")).await;
    assert_eq!(provider.next_request().await["method"], "get");
}

#[tokio::test]
async fn an_exclusive_service_has_one_provider_and_growing_fences() {
    let weir = weir().await;
    let mut first = weir.socket().await;
    let provided = first.call("weir.provide", json!({ "service": "s", "exclusive": true })).await;
    let fence = provided["fence"].as_u64().unwrap();
    assert_eq!(provided["providers"], 1);
    let mut second = weir.socket().await;
    for params in [json!({ "service": "s" }), json!({ "service": "s", "exclusive": true })] {
        let refused = second.call_error("weir.provide", params).await;
        assert_eq!((&refused["code"], &refused["data"]["code"]), (&json!(-32025), &json!("service_taken")));
    }
    let taken = second.call("weir.provide", json!({ "service": "s", "exclusive": true, "takeover": true })).await;
    assert!(taken["fence"].as_u64().unwrap() > fence, "{taken}");
    assert_eq!(first.notification("weir.withdrawn").await, json!({ "service": "s", "reason": "replaced" }));
    let mut caller = weir.socket().await;
    caller.send(call(1, "s/m")).await;
    let request = second.next_request().await;
    second.reply(&request, json!("second")).await;
    assert_eq!(caller.next().await["result"], "second");
    first.expect_nothing().await;
}

#[tokio::test]
async fn a_withdrawn_provider_finishes_its_calls() {
    let (weir, mut provider, mut caller) = pair().await;
    caller.send(call(1, "s/m")).await;
    let request = provider.next_request().await;
    assert_eq!(provider.call("weir.withdraw", json!({ "service": "s" })).await, json!({ "in_flight": 1 }));
    let mut other = weir.socket().await;
    other.provide("s").await;
    caller.send(call(2, "s/m")).await;
    let second = other.next_request().await;
    other.reply(&second, json!("other")).await;
    assert_eq!(caller.next().await["result"], "other");
    provider.reply(&request, json!("first")).await;
    assert_eq!(caller.next().await["result"], "first");
    provider.expect_nothing().await;
}

#[tokio::test]
async fn a_full_provider_is_busy() {
    let weir = weir().await;
    let mut provider = weir.socket().await;
    provider.call("weir.provide", json!({ "service": "s", "concurrency": 1 })).await;
    let mut caller = weir.socket().await;
    caller.send(call(1, "s/m")).await;
    let request = provider.next_request().await;
    let refused = caller.call_error("s/m", json!([])).await;
    assert_eq!((&refused["code"], &refused["data"]["executed"]), (&json!(-32021), &json!("no")));
    provider.reply(&request, json!(1)).await;
    assert_eq!(caller.next().await["result"], 1);
}

#[tokio::test]
async fn a_call_waits_for_a_provider_to_reconnect() {
    let (weir, provider, mut caller) = pair().await;
    drop(provider);
    eventually("the provider is gone", async || weir.node().hub.counts().providers == 0).await;
    caller.send(call(1, "s/m")).await;
    caller.send(call(2, "s/m")).await;
    let mut again = weir.socket().await;
    again.send_json(json!({ "jsonrpc": "2.0", "id": 1, "method": "weir.provide", "params": { "service": "s" } })).await;
    // The response comes first, then the waiting calls in their order.
    assert_eq!(again.next().await["result"]["providers"], 1);
    for id in [1, 2] {
        let request = again.next().await;
        assert_eq!(request["params"], json!([id]));
        again.reply(&request, json!(id)).await;
        assert_eq!(caller.next().await["result"], id);
    }
    // A call to a service that never had a provider waits only if requested.
    let refused = caller.call_error("never/m", json!([])).await;
    assert_eq!(refused["code"], -32020);
    let params = json!({ "service": "new", "method": "m", "wait": "10s" });
    caller.send_json(json!({ "jsonrpc": "2.0", "id": 3, "method": "weir.call", "params": params })).await;
    again.call("weir.provide", json!({ "service": "new", "names": "full" })).await;
    let request = again.next_request().await;
    assert_eq!(request["method"], "new/m");
}

#[tokio::test]
async fn a_disconnect_of_either_side_is_reported_at_once() {
    let (weir, mut provider, mut caller) = pair().await;
    caller.send(call(1, "s/m")).await;
    provider.next_request().await;
    drop(provider.tcp());
    let answer = in_time(caller.next()).await;
    assert_eq!((&answer["error"]["code"], &answer["error"]["data"]["executed"]), (&json!(-32022), &json!("maybe")));

    let mut provider = weir.socket().await;
    provider.call("weir.provide", json!({ "service": "t", "meta": true })).await;
    caller.send(call(2, "t/m")).await;
    let request = provider.next_request().await;
    drop(caller.tcp());
    assert_eq!(provider.notification("weir.cancel").await["id"], request["id"]);
    provider.reply(&request, json!(1)).await;
    provider.expect_nothing().await;
    assert_eq!(weir.node().hub.counts().pending, 0);
}

#[tokio::test]
async fn late_replies_are_sent_only_if_requested() {
    let (weir, mut provider, mut caller) = pair().await;
    for late in [false, true] {
        let params = json!({ "service": "s", "method": "m", "timeout": "30ms", "late": late });
        let refused = caller.call_error("weir.call", params).await;
        assert_eq!((&refused["code"], &refused["data"]["executed"]), (&json!(-32023), &json!("maybe")));
        assert_eq!(refused["message"], "s did not answer within 30ms");
        let request = provider.next_request().await;
        provider.reply(&request, json!({ "late": late })).await;
        provider.expect_nothing().await;
    }
    assert_eq!(caller.notification("weir.late").await, json!({ "id": "t2", "result": { "late": true } }));
    caller.expect_nothing().await;
    assert_eq!(weir.node().hub.counts().late, 0);
}

#[tokio::test]
async fn calls_to_a_stalled_provider_are_rejected() {
    let weir = weir().with(|config| config.limits.queued = 100_000).await;
    let mut stuck = weir.socket().await;
    stuck.provide("s").await;
    let mut caller = weir.socket().await;
    let pad = "x".repeat(100_000);
    let mut refused = 0;
    for _ in 0..400 {
        caller.send_json(json!({ "jsonrpc": "2.0", "id": 1, "method": "s/m", "params": [pad] })).await;
    }
    caller.send_json(json!({ "jsonrpc": "2.0", "id": "end", "method": "weir.ping" })).await;
    loop {
        let answer = caller.next().await;
        if answer["id"] == "end" {
            break;
        }
        assert!(["busy", "no_provider"].contains(&answer["error"]["data"]["code"].as_str().unwrap()), "{answer}");
        refused += 1;
    }
    assert!(refused > 0);
    // Accepted calls are delivered and answered.
    for _ in 0..400 - refused {
        let request = stuck.next_request().await;
        stuck.reply(&request, json!(1)).await;
        assert_eq!(caller.next().await["result"], 1);
    }
}

#[tokio::test]
async fn services_are_listed_and_their_changes_are_events() {
    let weir = weir().await;
    let mut watcher = weir.socket().await;
    watcher.call("weir.subscribe", json!({ "channels": ["$services"] })).await;
    let mut provider = weir.socket().await;
    provider.call("weir.provide", json!({ "service": "jwt", "methods": ["sign", "check"] })).await;
    let listed = watcher.call("weir.services", json!({ "prefix": "j" })).await;
    assert_eq!(listed["services"][0]["service"], "jwt");
    assert_eq!(listed["services"][0]["methods"], json!(["check", "sign"]));
    let all = watcher.call("weir.services", json!({})).await;
    assert!(all["services"].as_array().unwrap().iter().any(|service| service["service"] == "weir"));
    let event = watcher.notification("weir.event").await;
    assert_eq!((&event["channel"], &event["data"]["service"]), (&json!("$services"), &json!("jwt")));
    drop(provider);
    let event = watcher.notification("weir.event").await;
    assert_eq!(event["data"]["providers"], 0);
}

#[tokio::test]
async fn the_built_in_service() {
    let weir = weir().await;
    let mut socket = weir.socket().await;
    assert_eq!(socket.call("weir/echo", json!({ "n": 1 })).await, json!({ "n": 1 }));
    assert!(socket.call("weir/time", json!([])).await["time"].is_u64());
}

#[tokio::test]
async fn notifications_reach_at_most_one_provider() {
    let (_weir, mut provider, mut caller) = pair().await;
    caller.send(r#"{"jsonrpc":"2.0","method":"s/send","params":{"to":"x"}}"#).await;
    assert_eq!(provider.text().await, r#"{"jsonrpc":"2.0","method":"send","params":{"to":"x"}}"#);
    caller.send(r#"{"jsonrpc":"2.0","method":"nobody/send","params":{"to":"x"}}"#).await;
    caller.expect_nothing().await;
    provider.expect_nothing().await;
}

// === JSON-RPC over HTTP ===

#[tokio::test]
async fn json_rpc_requests_over_http() {
    let (weir, mut provider, _) = pair().await;
    let answers = tokio::spawn(async move {
        loop {
            let request = provider.next_request().await;
            if request.get("id").is_some() {
                provider.reply(&request, request["params"].clone()).await;
            }
        }
    });
    let post = |body: &'static str| weir.post("/v1/rpc", body);
    assert_eq!(
        post(r#"{"jsonrpc":"2.0","id":1.50,"method":"s/m","params":[7]}"#).await.expect(200).text(),
        r#"{"jsonrpc":"2.0","id":1.50,"result":[7]}"#
    );
    let batch = post(r#"[{"jsonrpc":"2.0","id":1,"method":"s/m","params":[7]},{"jsonrpc":"2.0","method":"s/n"},1,{"jsonrpc":"2.0","id":2,"method":"weir.publish","params":{"channel":"a","data":1}}]"#).await.expect(200).json();
    assert_eq!(batch.as_array().unwrap().len(), 3, "{batch}");
    post(r#"{"jsonrpc":"2.0","method":"weir.publish","params":{"channel":"a","data":2}}"#).await.expect(204);
    assert_eq!(weir.get("/v1/channels?channel=a").await.expect(200).json()["top"], 2);
    post(r#"[{"jsonrpc":"2.0","method":"s/n"}]"#).await.expect(204);
    post(r#"{"jsonrpc":"2.0","id":1,"result":7}"#).await.expect(204);
    for (body, code) in [
        ("{", -32700),
        ("[]", -32600),
        ("1", -32600),
        (r#"{"jsonrpc":"2.0","id":1,"method":"weir.subscribe","params":{"channels":["a"]}}"#, -32601),
        (r#"{"jsonrpc":"2.0","id":1,"method":"weir.provide","params":{"service":"a"}}"#, -32601),
        (r#"{"jsonrpc":"2.0","id":1,"method":"no/body"}"#, -32020),
    ] {
        assert_eq!(weir.post("/v1/rpc", body).await.expect(200).json()["error"]["code"], code, "{body}");
    }
    let read =
        post(r#"{"jsonrpc":"2.0","id":1,"method":"weir.read","params":{"channels":["a"]}}"#).await.expect(200).json();
    assert_eq!(read["result"]["events"].as_array().unwrap().len(), 2);
    answers.abort();
    let _ = answers.await;
    eventually("no connection of the hub is left", async || weir.node().hub.counts().connections == 0).await;
}

#[tokio::test]
async fn a_disconnected_http_caller_cancels() {
    let weir = weir().await;
    let mut provider = weir.socket().await;
    provider.call("weir.provide", json!({ "service": "s", "meta": true })).await;
    let request = weir.post("/v1/rpc", r#"{"jsonrpc":"2.0","id":1,"method":"s/m"}"#);
    let gone = tokio::time::timeout(Duration::from_millis(300), request).await;
    assert!(gone.is_err());
    let request = provider.next_request().await;
    assert_eq!(provider.notification("weir.cancel").await["id"], request["id"]);
}

#[tokio::test]
async fn a_late_reply_over_http_is_dropped() {
    let (weir, mut provider, _) = pair().await;
    let answers = weir.post(
        "/v1/rpc",
        r#"[{"jsonrpc":"2.0","id":1,"method":"weir.call","params":{"service":"s","method":"m","timeout":"30ms","late":true}},
            {"jsonrpc":"2.0","id":2,"method":"s/n"}]"#,
    );
    let provide = async {
        let (late, other) = (provider.next_request().await, provider.next_request().await);
        eventually("one call is late", async || weir.node().hub.counts().late == 1).await;
        provider.reply(&late, json!("late")).await;
        provider.expect_nothing().await;
        provider.reply(&other, json!("other")).await;
    };
    let (answers, ()) = tokio::join!(async { answers.await.expect(200).json() }, provide);
    assert_eq!((&answers[0]["error"]["code"], &answers[1]["result"]), (&json!(-32023), &json!("other")), "{answers}");
}

/// Answers every call of the service `s` with a text of so many bytes.
async fn provide_texts(weir: &Weir, bytes: usize) -> tokio::task::JoinHandle<()> {
    let mut provider = weir.socket().await;
    provider.provide("s").await;
    let text = json!("x".repeat(bytes));
    tokio::spawn(async move {
        loop {
            let request = provider.next_request().await;
            provider.reply(&request, text.clone()).await;
        }
    })
}

#[tokio::test]
async fn a_caller_that_reads_gets_every_answer_however_many_wait() {
    let weir = weir().with(|config| config.limits.queued = 100_000).await;
    let provider = provide_texts(&weir, 20_000).await;
    let mut caller = weir.socket().await;
    for id in 0..500 {
        caller.feed(call(id, "s/m")).await;
    }
    caller.flush().await;
    for _ in 0..500 {
        let answer = caller.next().await;
        assert_eq!(answer["result"].as_str().map(str::len), Some(20_000), "{answer}");
    }
    // The same for large answers of weir itself to requests that arrive at once.
    let echo = json!({ "jsonrpc": "2.0", "id": 1, "method": "weir/echo", "params": ["x".repeat(20_000)] }).to_string();
    for _ in 0..100 {
        caller.feed(echo.clone()).await;
    }
    caller.flush().await;
    for _ in 0..100 {
        assert!(caller.next().await["result"].is_array());
    }
    provider.abort();
}

#[tokio::test]
async fn a_caller_that_does_not_read_is_closed_and_holds_up_others_only_for_a_moment() {
    let weir =
        weir().with(|config| (config.limits.queued, config.limits.stalled) = (100_000, Duration::from_secs(4))).await;
    let provider = provide_texts(&weir, 50_000).await;
    let mut stuck = weir.socket().await;
    for id in 0..900 {
        stuck.feed(call(id, "s/m")).await;
    }
    stuck.flush().await;
    let closed = || weir.metric(r#"weir_connections_closed_total{transport="ws",reason="slow"}"#);
    let mut other = weir.socket().await;
    for id in 0..20 {
        other.send(call(id, "s/m")).await;
        assert!(other.next().await["result"].is_string());
    }
    eventually("closed as slow", async || closed() == 1).await;
    // What it asked for is not kept: it reads some results, errors in place of others, and the reason.
    let mut end = Vec::new();
    in_time(stuck.tcp().read_to_end(&mut end)).await.ok();
    assert!(end.len() < 20 << 20, "{}", end.len());
    provider.abort();
}

#[tokio::test]
async fn the_parts_of_a_batch_for_which_there_is_no_room_are_errors() {
    let weir = weir().with(|config| config.limits.queued = 10_000).await;
    let provider = provide_texts(&weir, 9_000).await;
    let batch = (0..20).map(|id| call(id, "s/m")).collect::<Vec<_>>().join(",");
    let mut caller = weir.socket().await;
    caller.send(format!("[{batch}]")).await;
    let of_socket = caller.next().await;
    let of_request: Value = weir.post("/v1/rpc", format!("[{batch}]")).await.json();
    for answers in [of_socket, of_request] {
        let answers = answers.as_array().unwrap().clone();
        let (results, errors): (Vec<_>, Vec<_>) = answers.iter().partition(|answer| answer["result"].is_string());
        assert_eq!(answers.len(), 20);
        assert!(!results.is_empty() && !errors.is_empty(), "{} {}", results.len(), errors.len());
        for error in errors {
            let data = &error["error"]["data"];
            assert_eq!((&data["code"], &data["executed"]), (&json!("too_large"), &json!("maybe")), "{error}");
        }
    }
    provider.abort();
}

#[tokio::test]
async fn what_a_client_makes_weir_remember_is_bounded() {
    let weir = weir().await;
    let mut socket = weir.socket().await;
    let id = "i".repeat(255);
    socket.send_json(json!({ "jsonrpc": "2.0", "id": id, "method": "weir.ping" })).await;
    let refused = socket.next().await;
    assert_eq!((&refused["id"], &refused["error"]["data"]["code"]), (&Value::Null, &json!("invalid_request")));
    socket.send_json(json!({ "jsonrpc": "2.0", "id": id[1..], "method": "weir.ping" })).await;
    assert_eq!(socket.next().await["id"], id[1..]);
    let methods: Vec<_> = (0..400).map(|n| format!("{n:0100}")).collect();
    let refused = socket.call_error("weir.provide", json!({ "service": "s", "methods": methods })).await;
    assert_eq!(refused["data"]["code"], "invalid_params");
}
