//! node-sse-server at `/subscribe`, `/publish`, `/lastEvent` and `/`.

use std::time::Duration;

use serde_json::{Value, json};

use crate::support::{Response, Starter, TextStream, Weir, eventually, weir};

fn node_sse() -> Starter {
    weir().with(|config| config.compat.enable = vec!["node-sse"])
}

async fn publish(weir: &Weir, events: Value) -> Response {
    post(weir, &json!({ "events": events }).to_string()).await
}

async fn post(weir: &Weir, body: &str) -> Response {
    weir.request("POST", "/publish").header("content-type", "application/json").body(body.to_owned()).await
}

fn event(channel: &str, kind: &str, payload: Value) -> Value {
    json!({"channelName": channel, "type": kind, "payload": payload})
}

/// The frame of an event of a channel.
fn frame(channel: &str, kind: &str, payload: &str) -> String {
    format!("event: {kind}\ndata: {}\n\n", json!({"channelName": channel, "type": kind, "payload": payload}))
}

fn registered(id: Value) -> String {
    format!(
        "event: registered\ndata: {}\n\n",
        json!({"type": "registered", "payload": json!({"clientId": id}).to_string()})
    )
}

fn online(ids: &[&str]) -> String {
    format!(
        "event: online-presence\ndata: {}\n\n",
        json!({"type": "online-presence", "payload": json!(ids).to_string()})
    )
}

#[tokio::test]
async fn a_browser_receives_its_registration_and_events() {
    let weir = node_sse().await;
    let mut stream = TextStream::open(weir.address, "/subscribe?channels=a,b&clientId=z").await;
    for (name, value) in [
        ("content-type", "text/event-stream"),
        ("cache-control", "no-cache"),
        ("connection", "keep-alive"),
        ("x-accel-buffering", "no"),
        ("access-control-allow-origin", "*"),
        ("transfer-encoding", "chunked"),
    ] {
        assert_eq!(stream.head.all(name), value, "{name}");
    }
    stream.expect("\n").await;
    stream
        .expect("event: registered\ndata: {\"type\":\"registered\",\"payload\":\"{\\\"clientId\\\":\\\"z\\\"}\"}\n\n")
        .await;
    for channel in ["a", "b"] {
        let last = format!("{{\"channelName\":\"{channel}\",\"type\":\"lastEvent\",\"payload\":\"{{}}\"}}");
        stream.expect(&format!("event: lastEvent\ndata: {last}\n\n")).await;
    }
    stream.expect("event: online-presence\ndata: {\"type\":\"online-presence\",\"payload\":\"[\\\"z\\\"]\"}\n\n").await;

    let posted =
        publish(&weir, json!([event("b", "t", json!("{\"x\":1}")), event("a", "u", json!("y"))])).await.expect(200);
    assert_eq!((posted.text(), posted.header("access-control-allow-origin")), ("", Some("*")));
    let data = r#"{"channelName":"b","type":"t","payload":"{\"x\":1}"}"#;
    stream.expect(&format!("event: t\ndata: {data}\n\n")).await;
    stream.expect(&frame("a", "u", "y")).await;
    drop(stream);
    weir.idle().await;
    assert!(weir.node().config.compat.enable.len() == 1 && weir.connections().is_empty());
}

#[tokio::test]
async fn clients_without_an_id_are_numbered() {
    let weir = node_sse().await;
    let mut one = TextStream::open(weir.address, "/subscribe/?channels=a").await;
    one.expect(&format!("\n{}{}{}", registered(json!(1)), frame("a", "lastEvent", "{}"), online(&["1"]))).await;
    let mut two = TextStream::open(weir.address, "/SUBSCRIBE?channels=a").await;
    two.expect(&format!("\n{}{}{}", registered(json!(2)), frame("a", "lastEvent", "{}"), online(&["1", "2"]))).await;
    one.expect(&online(&["1", "2"])).await;
    let mut named = TextStream::open(weir.address, "/subscribe?channels=b&clientId=1").await;
    named.expect(&format!("\n{}", registered(json!("1")))).await;
    one.expect(&online(&["1", "2"])).await;
    // The end of one of two connections with the same id is not announced, that of the last one is.
    drop(named);
    eventually("the connection is gone", async || weir.bus().topics().readers() == 2).await;
    drop(one);
    two.expect(&(online(&["1", "2"]) + &online(&["2"]))).await;
}

#[tokio::test]
async fn last_event_is_returned_and_replayed() {
    let weir = node_sse().await;
    let last = async |query: &str| weir.get(format!("/lastEvent{query}")).await;
    for query in ["", "?channel=", "?channel=a&channel=b"] {
        assert_eq!(last(query).await.expect(400).text(), "Bad Request");
    }
    assert_eq!(last("?channel=a").await.expect(200).text(), "{}");
    // The first event of a channel without subscribers keeps its payload as JSON, as in the original.
    publish(&weir, json!([event("a", "t", json!({"x": [1.0, null]}))])).await.expect(200);
    assert_eq!(last("?channel=a").await.text(), r#"{"response":{"x":[1,null]}}"#);
    let mut stream = TextStream::open(weir.address, "/subscribe?channels=a&clientId=c").await;
    stream.expect(&format!("\n{}{}", registered(json!("c")), frame("a", "lastEvent", "[object Object]"))).await;
    publish(&weir, json!([event("a", "t", json!({"x": 1}))])).await.expect(200);
    let last_event = r#"{"type":"t","payload":{"x":1}}"#;
    let reply = last("/?channel=a").await.expect(200);
    assert_eq!(reply.json(), json!({ "response": last_event }));
    assert_eq!(reply.header("content-type"), Some("application/json; charset=utf-8"));
    let mut late = TextStream::open(weir.address, "/subscribe?channels=a,c&clientId=d").await;
    let opening = registered(json!("d")) + &frame("a", "lastEvent", last_event) + &frame("c", "lastEvent", "{}");
    late.expect(&format!("\n{opening}")).await;
    assert_eq!(last("?channel=c").await.text(), r#"{"response":"{}"}"#);
    drop(late);
    // The channel exists because it had a subscriber.
    publish(&weir, json!([event("c", "t", json!("x"))])).await.expect(200);
    assert_eq!(last("?channel=c").await.json()["response"], r#"{"type":"t","payload":"x"}"#);
}

#[tokio::test]
async fn payloads_are_sent_as_text() {
    let weir = node_sse().await;
    let mut stream = TextStream::open(weir.address, "/subscribe?channels=a&clientId=c").await;
    stream.expect(&format!("\n{}{}{}", registered(json!("c")), frame("a", "lastEvent", "{}"), online(&["c"]))).await;
    for (payload, text) in [
        (json!(12.5), "12.5"),
        (json!(1.0), "1"),
        (json!(true), "true"),
        (json!([1, 2]), "1,2"),
        (json!({"a": 1}), "[object Object]"),
        (json!("é\n\"x\""), "é\n\"x\""),
    ] {
        publish(&weir, json!([event("a", "t", payload)])).await.expect(200);
        stream.expect(&frame("a", "t", text)).await;
    }
}

#[tokio::test]
async fn a_batch_with_an_invalid_event_publishes_nothing() {
    let weir = node_sse().await;
    let good = event("a", "t", json!("x"));
    for kind in ["registered", "lastEvent", "online-presence"] {
        let reply = publish(&weir, json!([good, event("a", kind, json!("x"))])).await.expect(400);
        assert_eq!(reply.text(), format!("Event type \"{kind}\" is reserved, can't fire!"));
        assert_eq!(reply.header("access-control-allow-origin"), Some("*"));
    }
    let incomplete = "Bad Request: 'channelName', 'type', and 'payload' are three required json fields in an event.";
    for bad in [
        event("", "t", json!("x")),
        event("a", "", json!("x")),
        event("a", "t", json!("")),
        event("a", "t", json!(0)),
        event("a", "t", json!(false)),
        event("a", "t", Value::Null),
        json!({"channelName": "a", "type": "t"}),
        json!({}),
    ] {
        let reply = publish(&weir, json!([good, bad])).await.expect(400);
        assert_eq!(reply.text(), incomplete, "{bad}");
    }
    for bad in [event("a", "x\ny", json!("x")), event("$services", "t", json!("x")), event("a", "weir.gap", json!("x"))]
    {
        publish(&weir, json!([good, bad])).await.expect(400);
    }
    for body in [r#"{"events":7}"#, r#"{"events":[null]}"#, "{", "nope", "3"] {
        post(&weir, body).await.expect(400);
    }
    for body in ["[]", "{}", r#"{"events":[]}"#, r#"{"events":null}"#, ""] {
        post(&weir, body).await.expect(200);
    }
    let form = weir
        .request("POST", "/publish")
        .header("content-type", "text/plain")
        .body(json!({"events": [good]}).to_string());
    form.await.expect(200);
    assert_eq!(weir.get("/v1/channels").await.json()["channels"], json!([]), "nothing was published");

    let large = publish(&weir, json!([event("a", "t", json!("x".repeat(102_400)))])).await.expect(413);
    assert_eq!(large.header("content-type"), Some("text/html; charset=utf-8"));
    assert!(large.text().contains("<pre>PayloadTooLargeError: request entity too large</pre>"));
    publish(&weir, json!([event("a", "t", json!("x".repeat(102_300)))])).await.expect(200);
}

#[tokio::test]
async fn root_page_preflights_and_unknown_routes_answer_as_the_original() {
    let weir = node_sse().await;
    let root = weir.get("/").await.expect(200);
    assert_eq!((root.text(), root.header("access-control-allow-origin")), ("ROOT", Some("*")));
    let preflight = weir.request("OPTIONS", "/publish").header("origin", "http://evil.example");
    let preflight = preflight.header("access-control-request-headers", "content-type,x-a").await.expect(204);
    for (name, value) in [
        ("access-control-allow-origin", "*"),
        ("access-control-allow-methods", "GET,HEAD,PUT,PATCH,POST,DELETE"),
        ("access-control-allow-headers", "content-type,x-a"),
        ("vary", "Access-Control-Request-Headers"),
    ] {
        assert_eq!(preflight.header(name), Some(value));
    }
    let posted = weir.request("POST", "/subscribe").await.expect(404);
    assert!(posted.text().contains("<pre>Cannot POST /subscribe</pre>"), "{}", posted.text());
    for query in ["", "?channels=", "?channels=,", "?channels=a%0Ab"] {
        assert_eq!(weir.get(format!("/subscribe{query}")).await.expect(400).text(), "Bad Request");
    }
    assert_eq!(weir.request("HEAD", "/subscribe?channels=a").await.status, 200);
    weir.idle().await;
}

#[tokio::test]
async fn inputs_that_crashed_the_original_are_served() {
    let weir = node_sse().await;
    let odd = "/subscribe?channels=a,a&channels=__proto__&clientId=c";
    let mut stream = TextStream::open(weir.address, odd).await;
    let opening = registered(json!("c")) + &frame("a", "lastEvent", "{}") + &frame("__proto__", "lastEvent", "{}");
    stream.expect(&format!("\n{opening}{}", online(&["c"]))).await;
    publish(&weir, json!([event("a", "t", json!("once")), event("__proto__", "t", json!("x"))])).await.expect(200);
    stream.expect(&(frame("a", "t", "once") + &frame("__proto__", "t", "x"))).await;
    drop(stream);
    weir.idle().await;
    publish(&weir, json!([event("a", "t", json!("x"))])).await.expect(200);
}

#[tokio::test]
async fn idle_streams_carry_comments_and_a_drain_sends_a_retry_delay() {
    let weir = node_sse()
        .with(|config| {
            config.sse.heartbeat = Duration::from_secs(1);
            config.drain.window = Duration::ZERO;
        })
        .await;
    let mut stream = TextStream::open(weir.address, "/subscribe?channels=a&clientId=c").await;
    let opening = format!("\n{}{}{}", registered(json!("c")), frame("a", "lastEvent", "{}"), online(&["c"]));
    stream.expect(&opening).await;
    stream.expect(":\n").await;
    weir.shut_down();
    let last = stream.rest().await;
    let retry = last.trim_start_matches(":\n").strip_prefix("retry: ").unwrap();
    assert!((1000..4000).contains(&retry.trim_end().parse::<u16>().unwrap()), "{last}");
    weir.stopped().await;
}

#[tokio::test]
async fn a_reader_that_falls_behind_retention_is_closed() {
    let weir = node_sse().with(|config| config.channels[0].keep.count = 5).await;
    let stream = TextStream::open(weir.address, "/subscribe?channels=a&clientId=c").await;
    let big = "x".repeat(100_000);
    for _ in 0..400 {
        publish(&weir, json!([event("a", "t", json!(big))])).await.expect(200);
    }
    // The stream ends between two frames with a retry delay, so that browsers reconnect.
    let text = stream.rest().await;
    assert!(text.len() < 400 * 100_000 && text.rsplit("\n\n").next().unwrap().starts_with("retry: "), "{}", text.len());
    weir.idle().await;
}
