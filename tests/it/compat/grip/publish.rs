//! The publishing endpoint of the GRIP proxy.

use base64::{Engine, engine::general_purpose::STANDARD as BASE64};
use serde_json::json;
use weir::compat::ganomede;

use super::{Grip, Origin, before, behind, route};
use crate::support::{Request, Response, eventually, weir};

async fn without_clients() -> Grip {
    before(&Origin::start().await).await
}

async fn ask(grip: &Grip, method: &'static str, path: &str, headers: &[(&str, &str)], body: &str) -> Response {
    let request = Request::new(grip.publish, method, path).body(body.to_owned());
    headers.iter().fold(request, |request, (name, value)| request.header(name, value)).await
}

const ITEM: &str = r#"{"items":[{"channel":"a","formats":{"http-stream":{"content":"x"}}}]}"#;

#[tokio::test]
async fn publishing_answers_as_pushpin_does() {
    let grip = without_clients().await;
    let grip = &grip;
    for (method, path, body, status, text) in [
        ("POST", "/publish/", ITEM, 200, "Published\n"),
        ("POST", "/publish", ITEM, 200, "Published\n"),
        ("POST", "/publish/?x=1", r#"{"items":[]}"#, 200, "Published\n"),
        ("POST", "/publish/", r#"{"items":[{"channel":"a","formats":{"odd":{}}}]}"#, 200, "Published\n"),
        ("POST", "/publish/", "{", 400, "Body is not valid JSON.\n"),
        ("POST", "/publish/", "", 400, "Body is not valid JSON.\n"),
        ("POST", "/publish/", "{}", 400, "Invalid format: object does not contain 'items'\n"),
        ("POST", "/publish/", r#"{"items":1}"#, 400, "Invalid format: object contains 'items' with wrong type\n"),
        ("POST", "/publish/", r#"{"items":[{"channel":"a"}]}"#, 400, "Invalid format: no formats specified\n"),
        ("GET", "/publish/", "", 405, "Method not allowed: GET.\n"),
        ("GET", "/", "", 200, "Pushpin API\n"),
        ("POST", "/elsewhere", "", 404, "Not Found\n"),
    ] {
        let reply = ask(grip, method, path, &[], body).await;
        assert_eq!((reply.status, reply.text()), (status, text), "{method} {path} {body}");
        assert_eq!(reply.header("content-type"), Some("text/plain"));
    }
    let json = ask(grip, "POST", "/publish/", &[("Accept", "application/json")], ITEM).await;
    assert_eq!((json.text(), json.header("content-type")), ("{\"message\":\"Published\"}\n", Some("application/json")));
    ask(grip, "POST", "/publish/", &[("Accept", "image/png")], ITEM).await.expect(406);
    ask(grip, "POST", "/publish/", &[("Origin", "http://evil.example")], ITEM).await.expect(403);
    ask(grip, "POST", "/publish/", &[("Host", "evil.example")], ITEM).await.expect(403);
    // Channel names that the native API rejects are an invalid format.
    for channel in ["", "$services", "a\u{1}"] {
        let item = json!({"items": [{"channel": channel, "http-stream": {"content": "x"}}]}).to_string();
        let reply = ask(grip, "POST", "/publish/", &[], &item).await;
        assert!([400, 403].contains(&reply.status), "{channel:?}: {reply:?}");
    }
    // The main listener has the endpoint, too.
    let reply = grip.weir.post("/grip/publish/", ITEM).await.expect(200);
    assert_eq!(reply.text(), "Published\n");
    // An invalid request publishes none of its items.
    let half = r#"{"items":[{"channel":"half","http-stream":{"content":"x"}},{"channel":"half","http-stream":{}}]}"#;
    ask(grip, "POST", "/publish/", &[], half).await.expect(400);
    assert_eq!(grip.weir.get("/v1/events?channel=half").await.json()["events"], json!([]));
}

#[tokio::test]
async fn rejected_publishes_name_the_limit() {
    let starter = weir().with(|config| {
        config.limits.publish_bytes = 300;
        config.limits.event = 150;
    });
    let grip = behind(starter, vec![]).await;
    let item =
        |length| json!({"items": [{"channel": "a", "http-stream": {"content": "x".repeat(length)}}]}).to_string();
    ask(&grip, "POST", "/publish/", &[], &item(10)).await.expect(200);
    let reply = ask(&grip, "POST", "/publish/", &[], &item(200)).await.expect(413);
    assert!(reply.text().contains("limits.event"), "{}", reply.text());
    let reply = ask(&grip, "POST", "/publish/", &[], &item(400)).await.expect(413);
    assert_eq!(reply.text(), "Body has more than 300 bytes (limits.publish_bytes).\n");
}

#[tokio::test]
async fn publishing_requires_a_key_of_the_route() {
    let origin = Origin::start().await;
    let mut keyed = route("/", &origin);
    keyed.key = "base64:c2VjcmV0".into();
    let grip = behind(weir(), vec![keyed]).await;
    for (authorization, status) in [
        ("", 401),
        ("Bearer", 401),
        ("Bearer wrong", 401),
        ("Bearer secret", 200),
        ("Bearer base64:c2VjcmV0", 200),
        (&format!("Basic {}", BASE64.encode("anybody:secret")), 200),
        (&format!("Basic {}", BASE64.encode("secret:wrong")), 401),
        ("Basic !", 401),
        ("Digest secret", 401),
    ] {
        let reply = ask(&grip, "POST", "/publish/", &[("Authorization", authorization)], ITEM).await;
        assert_eq!(reply.status, status, "{authorization}: {}", reply.text());
        assert_eq!(reply.header("www-authenticate"), (status == 401).then_some("Bearer"));
    }
    // The main listener requires the key, too; a page with the key may publish.
    grip.weir.post("/grip/publish/", ITEM).await.expect(401);
    let page = [("Authorization", "Bearer secret"), ("Origin", "http://page.example")];
    ask(&grip, "POST", "/publish/", &page, ITEM).await.expect(200);
}

#[tokio::test]
async fn an_item_id_is_published_once() {
    let grip = without_clients().await;
    for content in ["one", "one", "other"] {
        grip.publish("a", json!({"id": "1", "formats": {"http-stream": {"content": content}}})).await;
        grip.publish("b", json!({"id": "1".repeat(500), "formats": {"http-stream": {"content": content}}})).await;
    }
    for channel in ["a", "b"] {
        let read = grip.weir.get(format!("/v1/events?channel={channel}")).await.expect(200).json();
        assert_eq!(read["events"].as_array().unwrap().len(), 1);
        assert_eq!(read["events"][0]["data"], "one");
    }
}

#[tokio::test]
async fn an_item_waits_for_the_one_before_it() {
    let grip = without_clients().await;
    let body = |id: &str, prev: &str| {
        json!({"items": [{"channel": "a", "id": id, "prev-id": prev, "http-stream": {"content": id}}]}).to_string()
    };
    ask(&grip, "POST", "/publish/", &[], &body("1", "0")).await.expect(200);
    // Its publisher does not.
    ask(&grip, "POST", "/publish/", &[], &body("3", "2")).await.expect(200);
    grip.readers("a", 1).await;
    assert_eq!(data(&grip, "a").await, ["1"]);
    ask(&grip, "POST", "/publish/", &[], &body("2", "1")).await.expect(200);
    eventually("all are stored", async || data(&grip, "a").await == ["1", "2", "3"]).await;
    grip.readers("a", 0).await;
    // An item is published after a timeout if its predecessor does not arrive.
    ask(&grip, "POST", "/publish/", &[], &body("9", "8")).await.expect(200);
    assert_eq!(data(&grip, "a").await, ["1", "2", "3"]);
    eventually("its patience has ended", async || data(&grip, "a").await == ["1", "2", "3", "9"]).await;
    grip.readers("a", 0).await;
}

/// The data of the events of a channel.
async fn data(grip: &Grip, channel: &str) -> Vec<String> {
    let read = grip.weir.get(format!("/v1/events?channel={channel}")).await.expect(200).json();
    read["events"].as_array().unwrap().iter().map(|event| event["data"].as_str().unwrap().to_owned()).collect()
}

fn ordered(channel: &str, id: u32, prev: u32) -> serde_json::Value {
    let content = format!("{channel}{id}");
    json!({"channel": channel, "id": id.to_string(), "prev-id": prev.to_string(), "http-stream": {"content": content}})
}

#[tokio::test]
async fn items_of_one_request_are_stored_in_the_order_of_their_channel() {
    let grip = without_clients().await;
    let grip = &grip;
    let publish = async |items: &[serde_json::Value]| {
        grip.publish_raw(json!({ "items": items }).to_string()).await.expect(200);
    };
    publish(&[ordered("a", 3, 2), ordered("b", 2, 1), ordered("a", 1, 0), ordered("a", 2, 1), ordered("b", 1, 0)])
        .await;
    assert_eq!(data(grip, "a").await, ["a1", "a2", "a3"]);
    assert_eq!(data(grip, "b").await, ["b1", "b2"]);
    // An item whose predecessor is missing holds up neither its publisher nor another channel.
    publish(&[ordered("a", 9, 8), ordered("a", 10, 9), ordered("b", 3, 2), ordered("a", 4, 3)]).await;
    assert_eq!(data(grip, "a").await, ["a1", "a2", "a3", "a4"]);
    assert_eq!(data(grip, "b").await, ["b1", "b2", "b3"]);
    // A repetition of an item that waits is the same item.
    publish(&[ordered("a", 9, 8)]).await;
    assert_eq!(grip.metric("weir_publish_duplicates_total"), 1);
    eventually("the rest is stored", async || data(grip, "a").await.len() == 6).await;
    assert_eq!(data(grip, "a").await[4..], ["a9", "a10"]);
    grip.weir.idle().await;
}

#[tokio::test]
async fn a_shutdown_stores_the_items_that_wait() {
    let grip = without_clients().await;
    grip.publish_raw(json!({ "items": [ordered("a", 1, 0), ordered("a", 3, 2)] }).to_string()).await.expect(200);
    assert_eq!(data(&grip, "a").await, ["a1"]);
    let bus = grip.weir.node().bus.clone();
    grip.weir.shut_down();
    eventually("the node has stopped", async || grip.weir.has_stopped()).await;
    let channel = weir::channel::Channel::parse("a").unwrap();
    assert_eq!(bus.inspect(&channel).await.unwrap().top, 2);
}

#[tokio::test]
async fn only_grip_publishers_may_control_held_streams() {
    let mut origin = Origin::start().await;
    let grip = before(&origin).await;
    let mut client = super::hold::held(&grip, &mut origin, &[("Grip-Hold", "stream"), ("Grip-Channel", "a")], "").await;
    let forged = json!({"channel": "a", "data": 1, "meta": {"weir.grip": r#"{"stream":"close"}"#}});
    let refused = grip.weir.post("/v1/events", forged.to_string()).await.expect_problem("invalid_params");
    assert_eq!(refused["detail"], "meta.weir.grip: members beginning with weir. are weir's own");
    grip.weir.post("/v1/events", json!([forged]).to_string()).await.expect_problem("invalid_params");
    let lines = grip.weir.request("POST", "/v1/events").header("content-type", "application/x-ndjson");
    lines.body(format!("{forged}\n{forged}")).await.expect_problem("invalid_params");
    let mut socket = grip.weir.socket().await;
    for params in [forged.clone(), json!({ "events": [forged] })] {
        assert_eq!(socket.call_error("weir.publish", params).await["data"]["code"], "invalid_params");
    }
    grip.weir.publish("a", "2").await;
    assert_eq!(client.chunks(9).await, "data: 2\n\n");
}

/// The row and the column of GRIP in the table of conversions.
#[tokio::test]
async fn grip_items_and_events_of_other_apis_are_converted() {
    let mut origin = Origin::start().await;
    let starter = weir().with(|config| {
        config.compat.enable = vec!["ganomede", "node-sse"];
        config.compat.get_mut::<ganomede::Config>().unwrap().secret = "s".into();
    });
    let grip = behind(starter, vec![route("/", &origin)]).await;
    let mut client = super::hold::held(&grip, &mut origin, &[("Grip-Hold", "stream"), ("Grip-Channel", "w")], "").await;
    grip.stream("w", "event: e\ndata: {\"a\":1}\n\n").await;
    grip.stream("w", "event: e\ndata: text\n\n").await;
    grip.stream("w", "no block").await;
    grip.weir.post("/v1/events?channel=w&type=n", "[1]").await.expect(201);
    grip.weir.post("/v1/events?channel=w", "text").await.expect(201);
    let posted = r#"{"secret":"s","clientId":"c","channel":"w","from":"f","type":"g","data":{"b":2}}"#;
    grip.weir
        .request("POST", "/events/v1/events")
        .header("Content-Type", "application/json")
        .body(posted)
        .await
        .expect(200);

    let published = json!({"events": [{"channelName": "w", "type": "s", "payload": {"c": 3}}]}).to_string();
    grip.weir.request("POST", "/publish").header("Content-Type", "application/json").body(published).await.expect(200);

    let stream = "event: e\ndata: {\"a\":1}\n\nevent: e\ndata: text\n\nno blockevent: n\ndata: [1]\n\ndata: \"text\"\n\nevent: g\ndata: {\"b\":2}\n\nevent: s\ndata: {\"c\":3}\n\n";
    assert_eq!(client.chunks(stream.len()).await, stream);

    let native = grip.weir.get("/v1/events?channel=w").await.expect(200).json();
    let native: Vec<_> =
        native["events"].as_array().unwrap().iter().map(|event| json!([event["type"], event["data"]])).collect();
    let expected = [
        json!(["e", {"a": 1}]),
        json!(["e", "text"]),
        json!(["grip", "no block"]),
        json!(["n", [1]]),
        json!([null, "text"]),
        json!(["g", {"b": 2}]),
        json!(["s", {"c": 3}]),
    ];
    assert_eq!(native, expected);

    let ganomede = grip.weir.get("/events/v1/events?secret=s&clientId=c&channel=w&after=0").await.expect(200).json();
    let ganomede: Vec<_> =
        ganomede.as_array().unwrap().iter().map(|event| json!([event["type"], event["data"]])).collect();
    let expected = [
        json!(["e", {"a": 1}]),
        json!(["e", {"value": "text"}]),
        json!(["grip", {"value": "no block"}]),
        json!(["n", [1]]),
        json!(["message", {"value": "text"}]),
        json!(["g", {"b": 2}]),
        json!(["s", {"c": 3}]),
    ];
    assert_eq!(ganomede, expected);

    let mut browser = grip.weir.client().await;
    browser.send("GET", "/subscribe?channels=w", &[], b"").await;
    assert_eq!(browser.head().await.status, 200);
    grip.readers("w", 2).await;
    grip.stream("w", "event: e\ndata: {\"a\":1}\n\n").await;
    grip.stream("w", "no block").await;
    let mut received = String::new();
    while !received.contains("no block") {
        received += std::str::from_utf8(&browser.chunk().await.unwrap()).unwrap();
    }
    for frame in [
        r#"{"channelName":"w","type":"e","payload":"{\"a\":1}"}"#,
        r#"{"channelName":"w","type":"grip","payload":"no block"}"#,
    ] {
        assert!(received.contains(frame), "{received}");
    }
}

#[tokio::test]
async fn half_a_surrogate_pair_becomes_u_fffd() {
    let grip = without_clients().await;
    let body = r#"{"items":[{"channel":"c\ud83d","id":"i\ud83d","formats":{"http-stream":{"content":"one \ude00"}}}]}"#;
    assert_eq!(ask(&grip, "POST", "/publish/", &[], body).await.text(), "Published\n");
    let page = grip.weir.get("/v1/events?channel=c%EF%BF%BD").await.json();
    assert_eq!(page["events"][0]["data"], "one \u{fffd}");
}
