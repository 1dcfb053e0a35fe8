//! The adapters on two nodes of one Redis.

use std::time::Duration;

use serde_json::{Value, json};
use weir::compat::{
    event_stream::{self, SseRoute},
    ganomede, microstream,
};

use super::{
    grip::{Grip, Origin, behind, hold::held, route},
    microstream::{SOCKET, client},
};
use crate::support::{
    MINUTE, RedisServer, Request, Socket, Starter, TextStream, Weir, eventually, eventually_within, in_time,
    service::listed, weir_on,
};

// === MicroStream ===

/// A node that sends no pings or heartbeats during a test.
fn without_pings(redis: &RedisServer) -> Starter {
    weir_on(&redis.url()).with(|config| {
        config.compat.enable = vec!["microstream"];
        let never = Duration::from_secs(600);
        let microstream = config.compat.get_mut::<microstream::Config>().unwrap();
        (microstream.heartbeat_timeout, microstream.ping) = (never, never);
        microstream.probe = Duration::from_secs(1);
    })
}

/// The name and the argument of the next event.
async fn event(client: &mut Socket) -> (String, Value) {
    let text = client.text().await;
    let event: Value = serde_json::from_str(text.strip_prefix("42").expect(&text)).unwrap();
    (event[0].as_str().unwrap().to_owned(), event[1].clone())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn services_of_microstream_and_json_rpc_call_each_other_across_nodes() {
    let redis = RedisServer::start(&[]).await;
    let (local, remote) = (without_pings(&redis).await, without_pings(&redis).await);
    let mut stock = client(&local, "stock").await;
    let mut shop = client(&remote, "shop").await;
    listed(remote.address, "stock").await;
    listed(local.address, "shop").await;

    // Calls by JSON-RPC from the other node, and by HTTP.
    let mut caller = Socket::open(remote.address).await;
    let call = json!({ "jsonrpc": "2.0", "id": 7, "method": "stock/count", "params": { "item": 7 } });
    for (response, answer) in [
        (json!({ "left": 3 }), json!({ "result": { "left": 3 } })),
        (Value::Null, json!({ "result": {} })),
        (
            json!({ "error": { "code": "SOLD_OUT", "message": "none", "errorData": [1] } }),
            json!({ "error": { "code": -32000, "message": "none", "data": { "code": "SOLD_OUT", "errorData": [1] } } }),
        ),
    ] {
        caller.send_json(call.clone()).await;
        let (name, request) = event(&mut stock).await;
        let received = (name.as_str(), &request["event"], &request["data"]);
        assert_eq!(received, ("request", &json!("count"), &json!({ "item": 7 })));
        stock.send(format!("42{}", json!(["response", { "id": request["id"], "response": response }]))).await;
        let mut expected = json!({ "jsonrpc": "2.0", "id": 7 });
        expected.as_object_mut().unwrap().extend(answer.as_object().unwrap().clone());
        assert_eq!(caller.next().await, expected);
    }
    let pending = tokio::spawn(remote.request("POST", "/v1/services/stock/count").body("[1]").into_future());
    let (_, request) = event(&mut stock).await;
    stock.send(format!("42{}", json!(["response", { "id": request["id"], "response": "one" }]))).await;
    assert_eq!(pending.await.unwrap().expect(200).json(), "one");

    // Requests and responses between two MicroStream clients are forwarded unmodified, binary ones included.
    shop.send(r#"42["request",{"targetService":"stock","payload":{"id":"r1","event":"any event","more":[1]}}]"#).await;
    assert_eq!(stock.text().await, r#"42["request",{"id":"r1","event":"any event","more":[1]}]"#);
    let failed = r#"42["response",{"id":"r1","response":{"error":{"code":"EVENT_NOT_FOUND","message":"no","errorData":{"a":1}}}}]"#;
    stock.send(failed).await;
    assert_eq!(shop.text().await, failed);
    shop.send(r#"451-["request",{"targetService":"stock","payload":{"id":"r2","event":"e","data":{"_placeholder":true,"num":0}}}]"#).await;
    let bytes = tokio_tungstenite::tungstenite::Message::binary(vec![1, 2, 255]);
    shop.send_frame(bytes.clone()).await;
    assert_eq!(stock.text().await, r#"451-["request",{"id":"r2","event":"e","data":{"_placeholder":true,"num":0}}]"#);
    assert_eq!(in_time(stock.frame()).await, bytes);
    stock.send(r#"42["response",{"id":"r2"}]"#).await;
    assert_eq!(shop.text().await, r#"42["response",{"id":"r2","response":{}}]"#);

    // The reverse: a JSON-RPC provider on the other node, and a service without provider.
    let mut math = Socket::open(local.address).await;
    math.provide("math").await;
    listed(remote.address, "math").await;
    let ask = |id: &str, target: &str| {
        let payload = json!({ "id": id, "event": "add", "data": 5 });
        format!("42{}", json!(["request", { "targetService": target, "payload": payload }]))
    };
    shop.send(ask("r3", "math")).await;
    let request = math.next_request().await;
    assert_eq!((&request["method"], &request["params"]), (&json!("add"), &json!([5])));
    math.reply(&request, json!({ "sum": 5 })).await;
    assert_eq!(shop.text().await, r#"42["response",{"id":"r3","response":{"sum":5}}]"#);
    shop.send(ask("r4", "nobody")).await;
    let (_, response) = event(&mut shop).await;
    assert_eq!(response["response"]["error"]["code"], "TARGET_SERVICE_NOT_FOUND");
    // A disconnected client frees its name on all nodes. A caller that waits for it receives nothing.
    shop.send(ask("r5", "stock")).await;
    stock.text().await;
    drop(stock);
    let _stock = client(&remote, "stock").await;
    shop.send(ask("r6", "weir")).await;
    let (_, response) = event(&mut shop).await;
    assert_eq!((&response["id"], &response["response"]["error"]["code"]), (&json!("r6"), &json!("EVENT_NOT_FOUND")));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_reconnecting_service_replaces_an_unresponsive_registration_and_no_live_one() {
    let redis = RedisServer::start(&[]).await;
    let (local, remote) = (without_pings(&redis).await, without_pings(&redis).await);
    let mut old = client(&local, "worker").await;
    listed(remote.address, "worker").await;
    let mut new = Socket::open_at(remote.address, &format!("{SOCKET}&serviceName=worker")).await;
    assert!(new.text().await.starts_with("0{"));
    new.send("40").await;
    assert_eq!(old.text().await, "2");
    old.send("3").await;
    let rejected = new.text().await;
    assert!(rejected.starts_with(r#"44{"message":"DUPLICATE_SERVICE_REGISTRATION","data":{"code":"DUP"#), "{rejected}");
    // The old client does not answer the ping this time.
    new.send("40").await;
    let joined = new.text().await;
    assert!(joined.starts_with(r#"40{"sid":""#), "{joined}");
    // The old client is closed, whatever it sends.
    assert_eq!(old.text().await, "2");
    old.closed().await;
    eventually_within(MINUTE, "the old registration is gone", async || local.node().hub.counts().providers == 0).await;
    listed(local.address, "worker").await;
    let pending = tokio::spawn(local.request("POST", "/v1/services/worker/x").body("{}").into_future());
    let (_, request) = event(&mut new).await;
    new.send(format!("42{}", json!(["response", { "id": request["id"], "response": "new" }]))).await;
    assert_eq!(pending.await.unwrap().expect(200).json(), "new");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn requests_keep_their_order_and_late_responses_arrive_across_nodes() {
    let redis = RedisServer::start(&[]).await;
    let node = || without_pings(&redis).with(|config| config.rpc.timeout = Duration::from_millis(500));
    let (local, remote) = (node().await, node().await);
    let mut slow = client(&local, "slow").await;
    let mut caller = client(&remote, "caller").await;
    listed(remote.address, "slow").await;
    let ids: Vec<String> = (0..200).map(|n| format!("r{n}")).collect();
    for id in &ids {
        let payload = json!({ "id": id, "event": "e" });
        caller.send(format!("42{}", json!(["request", { "targetService": "slow", "payload": payload }]))).await;
    }
    for id in &ids {
        assert_eq!(event(&mut slow).await.1["id"], json!(id));
    }
    // The timeout of weir is over and the caller received nothing: it has a timeout of its own.
    eventually("all calls are late", async || local.node().hub.counts().late >= 200).await;
    slow.send(r#"42["response",{"id":"r7","response":{"at":"last"}}]"#).await;
    assert_eq!(caller.text().await, r#"42["response",{"id":"r7","response":{"at":"last"}}]"#);
}

// === while Redis is down ===

/// Each response is one after which the client library reconnects by itself.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn clients_of_adapters_reconnect_after_redis_was_down() {
    let mut redis = RedisServer::start(&[]).await;
    let node = without_pings(&redis).with(|config| {
        config.compat.enable = vec!["microstream", "node-sse", "ganomede"];
        config.compat.get_mut::<ganomede::Config>().unwrap().secret = "s".into();
        config.compat.get_mut::<ganomede::Config>().unwrap().poll_timeout = Duration::ZERO;
        config.compat.get_mut::<event_stream::Config>().unwrap().routes =
            vec![SseRoute { path: "/api/{id}".into(), channels: vec!["{id}".into()] }];
    });
    let node = node.await;
    redis.kill();
    // MicroStream clients are disconnected without an error: after an error the library does not reconnect.
    let mut service = Socket::open_at(node.address, &format!("{SOCKET}&serviceName=worker")).await;
    assert!(service.text().await.starts_with("0{"));
    service.send("40").await;
    service.closed().await;
    // An EventSource does not reconnect after any status other than 200.
    for path in ["/subscribe?channels=a&clientId=c", "/api/a"] {
        let answer = node.get(path).await.expect(200);
        assert_eq!(answer.header("content-type"), Some("text/event-stream"), "{path}");
        assert!(answer.text().starts_with("retry: "), "{path}: {}", answer.text());
    }
    // ganomede's client expects errors as JSON.
    let poll = "/events/v1/events?clientId=c&channel=a&secret=s";
    assert_eq!(node.get(poll).await.expect(503).json()["code"], "ServiceUnavailable");
    redis.restart().await;
    eventually_within(MINUTE, "polls succeed", async || node.get(poll).await.status == 200).await;
    eventually_within(MINUTE, "the service may register", async || {
        let mut service = Socket::open_at(node.address, &format!("{SOCKET}&serviceName=worker")).await;
        service.text().await;
        service.send("40").await;
        let message = service.frame().await;
        message.is_text() && message.to_text().unwrap().starts_with("40{")
    })
    .await;
    online(&mut browser(&node, "&clientId=c").await, &["c"]).await;
}

// === node-sse-server ===

/// A browser that has received its registration.
async fn browser(weir: &Weir, query: &str) -> TextStream {
    let mut browser = TextStream::open(weir.address, &format!("/subscribe?channels=a{query}")).await;
    browser.read_until(|text| text.contains("event: lastEvent")).await;
    browser
}

/// Reads until an announcement names exactly these as online, in any order.
async fn online(browser: &mut TextStream, names: &[&str]) {
    let mut wanted = names.to_vec();
    wanted.sort_unstable();
    let announced = |text: &str| {
        text.lines().filter(|line| line.contains("online-presence") && line.starts_with("data: ")).any(|line| {
            let Ok(frame) = serde_json::from_str::<Value>(&line[6..]) else { return false };
            let mut online: Vec<String> = serde_json::from_str(frame["payload"].as_str().unwrap()).unwrap();
            online.sort_unstable();
            online == wanted
        })
    };
    browser.read_until(announced).await;
    browser.skip();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn online_clients_are_known_on_all_nodes() {
    let redis = RedisServer::start(&[]).await;
    let node = async || weir_on(&redis.url()).with(|config| config.compat.enable = vec!["node-sse"]).await;
    let (local, remote) = (node().await, node().await);
    let mut ann = browser(&local, "&clientId=ann").await;
    online(&mut ann, &["ann"]).await;
    let mut bob = browser(&remote, "&clientId=bob").await;
    online(&mut bob, &["bob", "ann"]).await;
    online(&mut ann, &["ann", "bob"]).await;
    // Clients without an id are numbered across all nodes.
    let mut one = browser(&local, "").await;
    assert!(one.text.contains(r#""payload":"{\"clientId\":1}""#), "{}", one.text);
    online(&mut one, &["1", "ann", "bob"]).await;
    let two = browser(&remote, "").await;
    assert!(two.text.contains(r#""payload":"{\"clientId\":2}""#), "{}", two.text);
    online(&mut ann, &["1", "2", "ann", "bob"]).await;
    // A client is online as long as it is connected to any node.
    let also = browser(&local, "&clientId=bob").await;
    online(&mut ann, &["1", "2", "ann", "bob"]).await;
    drop(bob);
    eventually_within(MINUTE, "the node has noticed the disconnect", async || {
        remote.node().cluster_connections.local().len() == 1
    })
    .await;
    drop(two);
    online(&mut ann, &["1", "ann", "bob"]).await;
    drop(also);
    online(&mut ann, &["1", "ann"]).await;
    // The clients of a node that shuts down go offline.
    let _zoe = browser(&remote, "&clientId=zoe").await;
    online(&mut ann, &["1", "ann", "zoe"]).await;
    remote.shut_down();
    online(&mut ann, &["1", "ann"]).await;
}

// === GRIP ===

/// Two proxies with the same origin.
async fn proxies(redis: &RedisServer, origin: &Origin) -> (Grip, Grip) {
    let proxy = async || behind(weir_on(&redis.url()), vec![route("/", origin)]).await;
    (proxy().await, proxy().await)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn published_items_reach_held_streams_of_other_nodes_unchanged() {
    let redis = RedisServer::start(&[]).await;
    let mut origin = Origin::start().await;
    let (local, remote) = proxies(&redis, &origin).await;
    let hold = [("Grip-Hold", "stream"), ("Grip-Channel", "a")];
    let mut stream = held(&local, &mut origin, &hold, "open\n").await;
    assert_eq!(stream.chunks(5).await, "open\n");
    for content in
        ["event: message\ndata: {\"a\": 1}\n\n", "event:e\r\ndata:x\r\n\r\n", "no block", "data: 1\n\ndata: 2\n\n"]
    {
        remote.stream("a", content).await;
        assert_eq!(stream.chunks(content.len()).await, content);
    }
    let bytes: Vec<u8> = (0..=255).collect();
    let binary = base64::Engine::encode(&base64::engine::general_purpose::STANDARD, &bytes);
    remote.publish("a", json!({ "formats": { "http-stream": { "content-bin": binary } } })).await;
    assert_eq!(stream.chunk().await.unwrap(), bytes);
    // Events of the native API reach held streams, and items are events of the native API.
    remote.weir.publish("a", r#"{"native":1}"#).await;
    assert_eq!(stream.chunks(20).await, "data: {\"native\":1}\n\n");
    let page = local.weir.get("/v1/events?channel=a&last=6").await.expect(200).json();
    assert_eq!(page["events"][0]["data"], json!({ "a": 1 }));
    // An id is published once, on any node.
    for node in [&remote, &local] {
        node.publish("a", json!({ "id": "1", "formats": { "http-stream": { "content": "once;" } } })).await;
    }
    // An item published on the other node answers a held response.
    let waiting = tokio::spawn(local.request("GET", "/wait").into_future());
    let response = [("Grip-Hold", "response"), ("Grip-Channel", "answers"), ("X-Origin", "1")];
    origin.next().await.answer(&response, "timeout").await;
    local.readers("answers", 1).await;
    remote
        .publish("answers", json!({ "formats": { "http-response": { "code": 202, "body": "from the other node" } } }))
        .await;
    let answer = waiting.await.unwrap().expect(202);
    assert_eq!((answer.text(), answer.header("x-origin")), ("from the other node", Some("1")));
    remote.publish("a", json!({ "formats": { "http-stream": { "action": "close" } } })).await;
    assert_eq!(stream.chunks(5).await, "once;");
    assert_eq!(stream.chunk().await, None);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn reliable_streams_recover_missing_items_across_nodes() {
    let redis = RedisServer::start(&[]).await;
    let mut origin = Origin::start().await;
    let (local, remote) = proxies(&redis, &origin).await;
    let linked = |id: &str| {
        let channel = format!("a; prev-id={id}");
        [("Grip-Hold", "stream".to_owned()), ("Grip-Channel", channel), ("Grip-Link", "</next>; rel=next".to_owned())]
    };
    let first = linked("1");
    let first = first.each_ref().map(|(name, value)| (*name, value.as_str()));
    let mut stream = held(&local, &mut origin, &first, "0-1;").await;
    let item = |prev: u32, id: u32| {
        let format = json!({ "http-stream": { "content": format!("{id};") } });
        json!({ "id": id.to_string(), "prev-id": prev.to_string(), "formats": format })
    };
    remote.publish("a", item(1, 2)).await;
    local.publish("a", item(2, 3)).await;
    remote.publish("a", item(3, 4)).await;
    assert_eq!(stream.chunks(10).await, "0-1;2;3;4;");
    // An item waits for its predecessor, which is published on the other node.
    let sixth = {
        let mut sixth = item(5, 6);
        sixth["channel"] = json!("a");
        Request::new(local.publish, "POST", "/publish/").body(json!({ "items": [sixth] }).to_string())
    };
    let sixth = tokio::spawn(sixth.into_future());
    local.readers("a", 2).await;
    remote.publish("a", item(4, 5)).await;
    sixth.await.unwrap().expect(200);
    assert_eq!(stream.chunks(4).await, "5;6;");
    assert!(origin.is_quiet());
    // An item is missing and is fetched from the origin.
    let mut eighth = item(7, 8);
    eighth["no-seq"] = json!(true);
    remote.publish("a", eighth).await;
    let exchange = origin.next().await;
    assert_eq!((exchange.line(), exchange.header("grip-last")), ("GET /next", Some("a; last-id=6")));
    let next = linked("8");
    exchange.answer(&next.each_ref().map(|(name, value)| (*name, value.as_str())), "7-8;").await;
    remote.publish("a", item(8, 9)).await;
    assert_eq!(stream.chunks(6).await, "7-8;9;");
    // A stream on the other node that starts at an outdated id follows its link at once.
    let mut late = held(&remote, &mut origin, &first, "0-1;").await;
    let exchange = origin.next().await;
    assert_eq!(exchange.header("grip-last"), Some("a; last-id=1"));
    let next = linked("9");
    exchange.answer(&next.each_ref().map(|(name, value)| (*name, value.as_str())), "2-9;").await;
    local.publish("a", item(9, 10)).await;
    assert_eq!(late.chunks(11).await, "0-1;2-9;10;");
    assert_eq!(stream.chunks(3).await, "10;");
    assert!(origin.is_quiet());
    drop((stream, late));
    eventually("no connection is left", async || {
        local.weir.connections().is_empty() && remote.weir.connections().is_empty()
    })
    .await;
}
