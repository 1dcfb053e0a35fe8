//! Conversions between the APIs: one channel, written and read by each, in the same order and with the same content.

use std::time::Duration;

use serde_json::{Value, json};
use weir::compat::{
    event_stream::{self, SseRoute},
    ganomede,
};

use crate::support::{TextStream, Weir, weir};

/// One event as each API represents it.
struct Seen {
    native: Value,
    ganomede: Value,
    node_sse: (&'static str, &'static str),
    stream: &'static str,
}

async fn post(weir: &Weir, path: &str, body: Value) {
    let reply = weir.request("POST", path).header("content-type", "application/json").body(body.to_string()).await;
    assert!(reply.status < 300, "{reply:?}");
}

#[tokio::test]
async fn an_event_written_by_any_api_is_read_by_all() {
    let weir = weir()
        .with(|config| {
            config.compat.enable = vec!["ganomede", "node-sse"];
            config.compat.get_mut::<ganomede::Config>().unwrap().secret = "s".into();
            config.compat.get_mut::<ganomede::Config>().unwrap().poll_timeout = Duration::ZERO;
            config.compat.get_mut::<event_stream::Config>().unwrap().routes =
                vec![SseRoute { path: "/events/{id}".into(), channels: vec!["{id}".into()] }];
        })
        .await;
    let mut node_sse = TextStream::open(weir.address, "/subscribe?channels=c&clientId=me").await;
    node_sse
        .expect(
            "\nevent: registered\ndata: {\"type\":\"registered\",\"payload\":\"{\\\"clientId\\\":\\\"me\\\"}\"}\n\n\
             event: lastEvent\ndata: {\"channelName\":\"c\",\"type\":\"lastEvent\",\"payload\":\"{}\"}\n\n\
             event: online-presence\ndata: {\"type\":\"online-presence\",\"payload\":\"[\\\"me\\\"]\"}\n\n",
        )
        .await;
    let mut stream = TextStream::open(weir.address, "/events/c").await;
    stream.expect("event: stream-open\ndata: \n\n").await;

    // Written.
    post(&weir, "/v1/events", json!({"channel": "c", "type": "created", "from": "shop", "data": {"id": 7}})).await;
    post(&weir, "/v1/events", json!({"channel": "c"})).await;
    post(&weir, "/v1/events", json!({"channel": "c", "data": "text"})).await;
    post(&weir, "/v1/events", json!({"channel": "c", "data": null})).await;
    let emitted = json!({"clientId": "w", "secret": "s", "channel": "c", "from": "g/v1", "type": "add", "data": [1]});
    post(&weir, "/events/v1/events", emitted).await;
    let emitted = json!({"clientId": "w", "secret": "s", "channel": "c", "from": "g/v1", "type": "bare"});
    post(&weir, "/events/v1/events", emitted).await;
    let fired = json!([
        {"channelName": "c", "type": "note", "payload": "{\"a\":1}"},
        {"channelName": "c", "type": "raw", "payload": {"a": 1}},
        {"channelName": "c", "type": "list", "payload": [1, 2]},
    ]);
    post(&weir, "/publish", json!({ "events": fired })).await;

    // Read.
    let all = [
        Seen {
            native: json!({"type": "created", "from": "shop", "data": {"id": 7}}),
            ganomede: json!({"type": "created", "from": "shop", "data": {"id": 7}}),
            node_sse: ("created", r#"{\"id\":7}"#),
            stream: "event: created\ndata: {\"id\":7}\n\n",
        },
        Seen {
            native: json!({}),
            ganomede: json!({"type": "message", "from": ""}),
            node_sse: ("message", ""),
            stream: "data: \n\n",
        },
        Seen {
            native: json!({"data": "text"}),
            ganomede: json!({"type": "message", "from": "", "data": {"value": "text"}}),
            node_sse: ("message", "text"),
            stream: "data: \"text\"\n\n",
        },
        Seen {
            native: json!({"data": null}),
            ganomede: json!({"type": "message", "from": "", "data": {"value": null}}),
            node_sse: ("message", "null"),
            stream: "data: null\n\n",
        },
        Seen {
            native: json!({"type": "add", "from": "g/v1", "data": [1]}),
            ganomede: json!({"type": "add", "from": "g/v1", "data": [1]}),
            node_sse: ("add", "[1]"),
            stream: "event: add\ndata: [1]\n\n",
        },
        Seen {
            native: json!({"type": "bare", "from": "g/v1"}),
            ganomede: json!({"type": "bare", "from": "g/v1"}),
            node_sse: ("bare", ""),
            stream: "event: bare\ndata: \n\n",
        },
        Seen {
            native: json!({"type": "note", "data": "{\"a\":1}"}),
            ganomede: json!({"type": "note", "from": "", "data": {"value": "{\"a\":1}"}}),
            node_sse: ("note", r#"{\"a\":1}"#),
            stream: "event: note\ndata: \"{\\\"a\\\":1}\"\n\n",
        },
        Seen {
            native: json!({"type": "raw", "data": {"a": 1}, "meta": {"weir.node-sse": "value"}}),
            ganomede: json!({"type": "raw", "from": "", "data": {"a": 1}}),
            node_sse: ("raw", "[object Object]"),
            stream: "event: raw\ndata: {\"a\":1}\n\n",
        },
        Seen {
            native: json!({"type": "list", "data": [1, 2], "meta": {"weir.node-sse": "value"}}),
            ganomede: json!({"type": "list", "from": "", "data": [1, 2]}),
            node_sse: ("list", "1,2"),
            stream: "event: list\ndata: [1,2]\n\n",
        },
    ];
    let native = weir.get("/v1/events?channel=c").await.expect(200).json();
    let polled = weir.get("/events/v1/events?clientId=r&channel=c&secret=s").await.expect(200).json();
    assert_eq!(native["events"].as_array().unwrap().len(), all.len());
    assert_eq!(polled.as_array().unwrap().len(), all.len());
    for (at, seen) in all.iter().enumerate() {
        let mut event = native["events"][at].clone();
        for known in ["channel", "epoch", "offset", "time"] {
            event.as_object_mut().unwrap().remove(known);
        }
        assert_eq!(event, seen.native);
        let mut event = polled[at].clone();
        assert_eq!(event["id"], at + 1);
        assert_eq!(event["timestamp"], native["events"][at]["time"]);
        event.as_object_mut().unwrap().retain(|name, _| name != "id" && name != "timestamp");
        assert_eq!(event, seen.ganomede);
        let (kind, payload) = seen.node_sse;
        let data = format!(r#"{{"channelName":"c","type":"{kind}","payload":"{payload}"}}"#);
        node_sse.expect(&format!("event: {kind}\ndata: {data}\n\n")).await;
        stream.expect(seen.stream).await;
    }
    // The native routes are still served, except `/`.
    assert_eq!(weir.get("/").await.expect(200).text(), "ROOT");
    weir.get("/health/live").await.expect(200);
}

/// JavaScript cuts emoji in two: `"\ud83d"` is valid JSON and no character. JSON keeps it, and text has U+FFFD for it.
#[tokio::test]
async fn half_a_surrogate_pair_becomes_u_fffd_where_text_is_taken_out_of_json() {
    let weir = weir()
        .with(|config| {
            config.compat.enable = vec!["ganomede", "node-sse"];
            config.compat.get_mut::<ganomede::Config>().unwrap().secret = "s".into();
            config.compat.get_mut::<ganomede::Config>().unwrap().poll_timeout = Duration::ZERO;
        })
        .await;
    let channel = "c%EF%BF%BD";
    let mut sse = weir.sse(&format!("channel={channel}&format=data")).await;
    sse.opening().await;
    let mut node_sse = TextStream::open(weir.address, &format!("/subscribe?channels={channel}&clientId=me")).await;
    node_sse.read_until(|text| text.contains("online-presence") && text.ends_with("\n\n")).await;
    node_sse.skip();
    let data = r#""one\ntwo \"q\" \u00e9 \ud83d""#;
    let fields = r#""type":"t\ud83d","from":"\ude00\ud83d","meta":{"m\ud83d":"\ude00"}"#;
    let event = format!(r#"{{"channel":"c\ud83d",{fields},"key":"k\ud83d","data":{data}}}"#);
    let text = "one\ntwo \"q\" é \u{fffd}";

    let placed = weir.post("/v1/events", event.clone()).await.expect(201).json();
    assert_eq!(placed["channel"], "c\u{fffd}");
    assert_eq!(weir.post("/v1/events", event.clone()).await.expect(200).json()["duplicate"], true);
    let page = weir.get(format!("/v1/events?channel={channel}")).await.expect(200);
    assert!(page.text().contains(&format!(r#""data":{data}"#)), "JSON stays as it was written: {}", page.text());
    assert!(page.text().contains(r#""type":"t�","from":"��""#), "{}", page.text());
    let block = sse.next().await;
    assert_eq!((block.event.as_str(), block.data.as_str()), ("t\u{fffd}", text));
    let payload = json!({ "channelName": "c\u{fffd}", "type": "t\u{fffd}", "payload": text });
    node_sse.expect(&format!("event: t\u{fffd}\ndata: {payload}\n\n")).await;

    let mut socket = weir.socket().await;
    socket
        .send(format!(r#"{{"\ud83d":1,"jsonrpc":"2.0","id":"\ud83d","method":"weir.publish","params":{event}}}"#))
        .await;
    let answer = socket.text().await;
    assert!(answer.contains(r#""id":"\ud83d""#) && answer.contains(r#""duplicate":true"#), "{answer}");
    socket.send(r#"{"jsonrpc":"2.0","id":2,"method":"weir.subscribe","params":{"channels":["c\ud83d"]}}"#).await;
    let answer = socket.text().await;
    assert!(answer.contains("c\u{fffd}"), "{answer}");
    socket.send(r#"{"jsonrpc":"2.0","id":3,"method":"weir.subscribe","params":{"\ud83d":1}}"#).await;
    let answer = socket.text().await;
    assert!(answer.contains("invalid_params"), "valid JSON with an unknown member: {answer}");

    weir.get(format!("/v1/events?channel={channel}&consumer=me&start=earliest")).await.expect(200);
    weir.post("/v1/consumers/me/seek", r#"{"channel":"c\ud83d","after":"earliest"}"#).await.expect(204);
    let emitted = r#"{"clientId":"\ud83d","secret":"s","channel":"c\ud83d","from":"g","type":"add","data":["\ud83d"]}"#;
    let request = weir.request("POST", "/events/v1/events").header("content-type", "application/json").body(emitted);
    assert!(request.await.expect(200).text().contains(r#""data":["\ud83d"]"#));
    let fired = r#"{"events":[{"channelName":"c\ud83d","type":"note","payload":"\ud83d"}]}"#;
    weir.request("POST", "/publish").header("content-type", "application/json").body(fired).await.expect(200);
    let last = weir.get(format!("/v1/events?channel={channel}&last=2")).await.expect(200);
    assert!(last.text().contains(r#""type":"add""#) && last.text().contains(r#""type":"note""#), "{}", last.text());
}
