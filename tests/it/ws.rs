//! WebSocket: frames, JSON-RPC by the letter of its specification, and the ends of connections.

use std::time::Duration;

use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio_tungstenite::tungstenite::{
    Message,
    protocol::frame::{
        Frame,
        coding::{Data, OpCode},
    },
};

use crate::support::{Socket, Weir, eventually, in_time, socket::members, weir};

fn closed(weir: &Weir, reason: &str) -> i64 {
    weir.metric(&format!("weir_connections_closed_total{{transport=\"ws\",reason=\"{reason}\"}}"))
}

// === the specification's own examples ===

/// Provides the methods of the examples of <https://www.jsonrpc.org/specification> as a service.
async fn spec_provider(weir: &Weir) -> tokio::task::JoinHandle<()> {
    let mut provider = weir.socket().await;
    provider.provide("spec").await;
    tokio::spawn(async move {
        loop {
            let request = provider.next_request().await;
            let params = &request["params"];
            let result = match request["method"].as_str().unwrap() {
                "subtract" if params.is_array() => json!(params[0].as_i64().unwrap() - params[1].as_i64().unwrap()),
                "subtract" => json!(params["minuend"].as_i64().unwrap() - params["subtrahend"].as_i64().unwrap()),
                "sum" => json!(params.as_array().unwrap().iter().map(|n| n.as_i64().unwrap()).sum::<i64>()),
                "get_data" => json!(["hello", 5]),
                // Notifications need no response.
                _ => continue,
            };
            if request.get("id").is_some() {
                provider.reply(&request, result).await;
            }
        }
    })
}

/// Sends a message and asserts its response. `message` and `data` of errors are not compared.
async fn example(socket: &mut Socket, sent: &str, received: &str) {
    socket.send(sent).await;
    let strip = |value: &mut Value| {
        if let Some(error) = value.get_mut("error").and_then(Value::as_object_mut) {
            assert!(error.keys().all(|name| ["code", "message", "data"].contains(&name.as_str())), "{error:?}");
            error.retain(|name, _| name == "code");
        }
    };
    let mut got: Value = serde_json::from_str(&socket.text().await).unwrap();
    let mut expected: Value = serde_json::from_str(received).unwrap();
    for value in [&mut got, &mut expected] {
        match value.as_array_mut() {
            Some(array) => {
                array.iter_mut().for_each(strip);
                // Responses of a batch may have any order.
                array.sort_by_key(|answer| answer["id"].to_string());
            }
            None => strip(value),
        }
    }
    assert_eq!(got, expected, "{sent}");
}

#[tokio::test]
async fn the_examples_of_the_specification() {
    let weir = weir().await;
    let provider = spec_provider(&weir).await;
    let mut socket = weir.socket().await;
    for (sent, received) in [
        // rpc call with positional parameters
        (
            r#"{"jsonrpc": "2.0", "method": "spec/subtract", "params": [42, 23], "id": 1}"#,
            r#"{"jsonrpc": "2.0", "result": 19, "id": 1}"#,
        ),
        (
            r#"{"jsonrpc": "2.0", "method": "spec/subtract", "params": [23, 42], "id": 2}"#,
            r#"{"jsonrpc": "2.0", "result": -19, "id": 2}"#,
        ),
        // rpc call with named parameters
        (
            r#"{"jsonrpc": "2.0", "method": "spec/subtract", "params": {"subtrahend": 23, "minuend": 42}, "id": 3}"#,
            r#"{"jsonrpc": "2.0", "result": 19, "id": 3}"#,
        ),
        (
            r#"{"jsonrpc": "2.0", "method": "spec/subtract", "params": {"minuend": 42, "subtrahend": 23}, "id": 4}"#,
            r#"{"jsonrpc": "2.0", "result": 19, "id": 4}"#,
        ),
        // rpc call of non-existent method
        (
            r#"{"jsonrpc": "2.0", "method": "foobar", "id": "1"}"#,
            r#"{"jsonrpc": "2.0", "error": {"code": -32601, "message": "Method not found"}, "id": "1"}"#,
        ),
        // rpc call with invalid JSON
        (
            r#"{"jsonrpc": "2.0", "method": "foobar, "params": "bar", "baz]"#,
            r#"{"jsonrpc": "2.0", "error": {"code": -32700, "message": "Parse error"}, "id": null}"#,
        ),
        // rpc call with invalid Request object
        (
            r#"{"jsonrpc": "2.0", "method": 1, "params": "bar"}"#,
            r#"{"jsonrpc": "2.0", "error": {"code": -32600, "message": "Invalid Request"}, "id": null}"#,
        ),
        // rpc call Batch, invalid JSON
        (
            r#"[
  {"jsonrpc": "2.0", "method": "sum", "params": [1,2,4], "id": "1"},
  {"jsonrpc": "2.0", "method"
]"#,
            r#"{"jsonrpc": "2.0", "error": {"code": -32700, "message": "Parse error"}, "id": null}"#,
        ),
        // rpc call with an empty Array
        ("[]", r#"{"jsonrpc": "2.0", "error": {"code": -32600, "message": "Invalid Request"}, "id": null}"#),
        // rpc call with an invalid Batch (but not empty)
        ("[1]", r#"[{"jsonrpc": "2.0", "error": {"code": -32600, "message": "Invalid Request"}, "id": null}]"#),
        // rpc call with invalid Batch
        (
            "[1,2,3]",
            r#"[
  {"jsonrpc": "2.0", "error": {"code": -32600, "message": "Invalid Request"}, "id": null},
  {"jsonrpc": "2.0", "error": {"code": -32600, "message": "Invalid Request"}, "id": null},
  {"jsonrpc": "2.0", "error": {"code": -32600, "message": "Invalid Request"}, "id": null}
]"#,
        ),
        // rpc call Batch
        (
            r#"[
        {"jsonrpc": "2.0", "method": "spec/sum", "params": [1,2,4], "id": "1"},
        {"jsonrpc": "2.0", "method": "spec/notify_hello", "params": [7]},
        {"jsonrpc": "2.0", "method": "spec/subtract", "params": [42,23], "id": "2"},
        {"foo": "boo"},
        {"jsonrpc": "2.0", "method": "foo.get", "params": {"name": "myself"}, "id": "5"},
        {"jsonrpc": "2.0", "method": "spec/get_data", "id": "9"}
    ]"#,
            r#"[
        {"jsonrpc": "2.0", "result": 7, "id": "1"},
        {"jsonrpc": "2.0", "result": 19, "id": "2"},
        {"jsonrpc": "2.0", "error": {"code": -32600, "message": "Invalid Request"}, "id": null},
        {"jsonrpc": "2.0", "error": {"code": -32601, "message": "Method not found"}, "id": "5"},
        {"jsonrpc": "2.0", "result": ["hello", 5], "id": "9"}
    ]"#,
        ),
    ] {
        example(&mut socket, sent, received).await;
    }
    // a Notification, of methods that exist and that do not; rpc call Batch (all notifications): nothing is returned
    for silent in [
        r#"{"jsonrpc": "2.0", "method": "spec/update", "params": [1,2,3,4,5]}"#,
        r#"{"jsonrpc": "2.0", "method": "foobar"}"#,
        r#"[
        {"jsonrpc": "2.0", "method": "spec/notify_sum", "params": [1,2,4]},
        {"jsonrpc": "2.0", "method": "spec/notify_hello", "params": [7]}
    ]"#,
    ] {
        socket.send(silent).await;
    }
    socket.expect_nothing().await;
    provider.abort();
}

// === JSON-RPC details on which clients depend ===

#[tokio::test]
async fn ids_come_back_byte_for_byte() {
    let weir = weir().await;
    let mut socket = weir.socket().await;
    for id in [
        "0",
        "-0",
        "1.5",
        "1.50",
        "1e3",
        "9007199254740993",
        "null",
        r#""a\u0041\/""#,
        r#""""#,
        &format!(r#""{}""#, "x".repeat(254)),
    ] {
        socket.send(format!(r#"{{"jsonrpc":"2.0","id": {id} ,"method":"weir/echo","params":[{id}]}}"#)).await;
        assert_eq!(socket.text().await, format!(r#"{{"jsonrpc":"2.0","id":{id},"result":[{id}]}}"#));
        socket.send(format!(r#"{{"jsonrpc":"2.0","id":{id},"method":"weir.nothing"}}"#)).await;
        assert!(socket.text().await.starts_with(&format!(r#"{{"jsonrpc":"2.0","id":{id},"error":{{"code":-32601,"#)));
    }
}

#[tokio::test]
async fn responses_have_either_result_or_error() {
    let weir = weir().await;
    let mut socket = weir.socket().await;
    let ping = socket.request("weir.ping", json!({})).await;
    assert_eq!(members(&ping), ["id", "jsonrpc", "result"]);
    assert!(ping["result"]["time"].as_u64().unwrap() > 1_600_000_000_000);
    let refused = socket.request("no/body", json!([])).await;
    assert_eq!(members(&refused), ["error", "id", "jsonrpc"]);
    assert_eq!(members(&refused["error"]), ["code", "data", "message"]);
    assert_eq!(refused["error"]["code"], -32020);
    assert_eq!(refused["error"]["data"]["code"], "no_provider");
    assert_eq!(refused["error"]["data"]["executed"], "no");
    assert_eq!(socket.request("weir.cancel", json!({ "id": 77 })).await["result"], Value::Null);
}

#[tokio::test]
async fn unexpected_messages_are_ignored() {
    let weir = weir().await;
    let mut socket = weir.socket().await;
    socket.provide("s").await;
    for nonsense in [
        r#"{"jsonrpc":"2.0","id":"w:1a","result":1}"#,
        r#"{"jsonrpc":"2.0","id":7,"result":1}"#,
        r#"{"jsonrpc":"2.0","error":{"code":1,"message":"unknown notification"}}"#,
        r#"{"id":null,"result":null,"error":{}}"#,
        r#"[{"id":1,"result":1},{"id":2,"error":1}]"#,
        r#"{"jsonrpc":"2.0","method":"weir.nothing"}"#,
        r#"{"jsonrpc":"2.0","method":"rpc.discover"}"#,
        r#"{"jsonrpc":"2.0","method":"weir.provide","params":{"service":"weir"}}"#,
    ] {
        socket.send(nonsense).await;
    }
    socket.expect_nothing().await;
    assert_eq!(weir.metric("weir_ws_ignored_total"), 6);
}

#[tokio::test]
async fn reserved_and_unknown_names() {
    let weir = weir().await;
    let mut socket = weir.socket().await;
    for (method, params, code) in [
        ("rpc.discover", json!({}), -32601),
        ("rpc.on", json!(["x"]), -32601),
        ("rpc.x/y", json!([]), -32601),
        ("weir.event", json!({}), -32601),
        ("subtract", json!([]), -32601),
        ("/", json!([]), -32602),
        ("a/", json!([]), -32602),
        ("a\n/b", json!([]), -32602),
        ("a/b\u{7f}", json!([]), -32602),
        ("weir/nothing", json!([]), -32601),
        ("weir.call", json!({ "service": "a", "method": "b", "stream": true }), -32602),
        ("weir.call", json!({ "service": "a", "method": "b", "all": true }), -32602),
        ("weir.call", json!({ "service": "a", "method": "b", "params": 1 }), -32602),
        ("weir.call", json!({ "service": "a", "method": "b", "timeout": 5 }), -32602),
        ("weir.call", json!({ "service": "a", "method": "b", "timeout": "5" }), -32602),
        ("weir.call", json!({ "service": "a", "method": "b", "timeout": "11m" }), -32602),
        ("weir.provide", json!({ "service": "a", "standby": true }), -32602),
        ("weir.provide", json!({ "service": "rpc.x" }), -32602),
        ("weir.provide", json!({ "service": "weir" }), -32602),
        ("weir.provide", json!({ "service": "a\tb" }), -32602),
        ("weir.publish", json!({ "channel": "a", "type": "weir.gap" }), -32602),
        ("weir.publish", json!({ "channel": "a", "from": "a\r" }), -32602),
        ("weir.publish", json!({ "channel": "a", "key": "\0" }), -32602),
        ("weir.publish", json!({ "channel": "$services" }), -32003),
        ("weir.commit", json!({ "consumer": "a b", "after": "1" }), -32602),
        ("weir.ping", json!({ "now": true }), -32602),
        ("weir.ping", json!([1]), -32602),
        ("weir.subscribe", json!({ "channels": ["a"], "befor": 1 }), -32602),
        ("weir.subscribe", json!({ "channels": [{ "channel": "a", "after": "x y" }] }), -32030),
        ("weir.withdraw", json!({ "service": "unprovided" }), -32004),
    ] {
        let error = socket.call_error(method, params.clone()).await;
        assert_eq!(error["code"], code, "{method} {params}: {error}");
    }
    // Positional params of one object are that object.
    assert_eq!(socket.call("weir.publish", json!([{ "channel": "a", "data": 1 }])).await["offset"], 1);
}

#[tokio::test]
async fn auth_reports_an_anonymous_client() {
    let weir = weir().await;
    let mut socket = weir.socket().await;
    let who = socket.call("weir.auth", json!({ "token": "ey" })).await;
    assert_eq!(who, json!({ "subject": "", "expires": null, "anonymous": true }));
}

#[tokio::test]
async fn invalid_json_is_answered_and_finally_closed() {
    let weir = weir().await;
    let mut socket = weir.socket().await;
    for _ in 0..20 {
        socket.send("{").await;
        let error = socket.next().await;
        assert_eq!((&error["error"]["code"], &error["id"]), (&json!(-32700), &Value::Null));
        assert!(error.as_object().unwrap().contains_key("id"));
    }
    socket.expect_nothing().await;
    socket.send("{").await;
    assert_eq!(socket.closed().await, (4502, "protocol".into()));
    assert_eq!(weir.metric("weir_ws_unreadable_total"), 21);
    weir.idle().await;
}

#[tokio::test]
async fn batches_have_one_response_and_a_size_limit() {
    let weir = weir().with(|config| config.limits.batch = 3).await;
    let mut socket = weir.socket().await;
    let one = |id: u32| format!(r#"{{"jsonrpc":"2.0","id":{id},"method":"weir/echo","params":[{id}]}}"#);
    socket.send(format!("[{},{},{}]", one(1), one(2), one(3))).await;
    assert_eq!(socket.next().await.as_array().unwrap().len(), 3);
    socket.send(format!("[{},{},{},{}]", one(1), one(2), one(3), one(4))).await;
    let refused = socket.next().await;
    assert_eq!((&refused["error"]["code"], &refused["id"]), (&json!(-32600), &Value::Null));
    assert_eq!(refused["error"]["data"]["limit"], "limits.batch");
    // A call in progress delays its batch and nothing else.
    let mut provider = weir.socket().await;
    provider.provide("slow").await;
    socket.send(format!(r#"[{},{{"jsonrpc":"2.0","id":2,"method":"slow/x"}},{{"jsonrpc":"2.0","id":3,"method":"weir.publish","params":{{"channel":"a"}}}}]"#, one(1))).await;
    let request = provider.next_request().await;
    assert_eq!(socket.call("weir/echo", json!([5])).await, json!([5]));
    provider.reply(&request, json!("done")).await;
    let answers = socket.next().await;
    let mut ids: Vec<_> = answers.as_array().unwrap().iter().map(|answer| answer["id"].as_u64().unwrap()).collect();
    ids.sort_unstable();
    assert_eq!(ids, [1, 2, 3]);
}

// === frames ===

#[tokio::test]
async fn binary_and_fragmented_messages_are_read_and_text_is_written() {
    let weir = weir().await;
    let mut socket = weir.socket().await;
    let text = r#"{"jsonrpc":"2.0","id":1,"method":"weir/echo","params":["é"]}"#;
    let answer = r#"{"jsonrpc":"2.0","id":1,"result":["é"]}"#;
    socket.send_frame(Message::binary(text.as_bytes().to_vec())).await;
    assert_eq!(socket.text().await, answer);
    // The split is within the bytes of é.
    let (first, last) = text.as_bytes().split_at(text.find('é').unwrap() + 1);
    socket.send_frame(Message::Frame(Frame::message(first.to_vec(), OpCode::Data(Data::Text), false))).await;
    socket.send_frame(Message::Ping(b"between".to_vec().into())).await;
    socket.send_frame(Message::Frame(Frame::message(last.to_vec(), OpCode::Data(Data::Continue), true))).await;
    assert_eq!(socket.text().await, answer);
    socket.send_frame(Message::binary(vec![0xff, 0xfe])).await;
    assert_eq!(socket.next().await["error"]["code"], -32700);
    let long = "x".repeat(1_000_000);
    assert_eq!(socket.call("weir/echo", json!([long])).await, json!([long]));
}

#[tokio::test]
async fn replies_are_not_delayed_by_pings() {
    const REQUESTS: usize = 4_000;
    let weir = weir().await;
    let mut socket = weir.socket().await;
    for id in 0..REQUESTS {
        socket.feed(json!({ "jsonrpc": "2.0", "id": id, "method": "weir/echo" }).to_string()).await;
        socket.feed_frame(Message::Ping(Default::default())).await;
    }
    socket.flush().await;
    // Every read of the node ends with pings, and the first one is followed by others.
    let (mut replies, mut pongs_before) = (0, 0);
    while replies < REQUESTS {
        match socket.frame().await {
            Message::Text(_) => replies += 1,
            Message::Pong(_) if replies == 0 => pongs_before += 1,
            Message::Pong(_) => {}
            other => panic!("{other:?}"),
        }
    }
    assert!(pongs_before < REQUESTS / 2, "{pongs_before}");
}

#[tokio::test]
async fn an_oversized_frame_is_closed() {
    let weir = weir().await;
    let mut socket = weir.socket().await;
    let limit = weir.node().config.limits.frame;
    assert_eq!(limit, (1 << 20) + (64 << 10));
    socket.send_frame(Message::text("x".repeat(limit + 1))).await;
    assert_eq!(socket.closed().await, (1009, "too_large".into()));
    // A message within the frame limit may exceed the event limit.
    let mut socket = weir.socket().await;
    let error = socket.call_error("weir.publish", json!({ "channel": "a", "data": "x".repeat(1_000_001) })).await;
    assert_eq!((&error["code"], &error["data"]["limit"]), (&json!(-32005), &json!("limits.event")));
    drop(socket);
    weir.idle().await;
}

#[tokio::test]
async fn websocket_protocol_violations_are_closed() {
    let weir = weir().await;
    for bytes in [
        &[0x81, 1, b'x'][..],
        &[0xc1, 0x81, 0, 0, 0, 0, b'x'],
        &[0x83, 0x80, 0, 0, 0, 0],
        &[0x81, 0x81, 0, 0, 0, 0, 0xff],
    ] {
        let mut tcp = weir.socket().await.tcp();
        tcp.write_all(bytes).await.unwrap();
        let mut end = Vec::new();
        in_time(tcp.read_to_end(&mut end)).await.ok();
        assert_eq!(end, [&[0x88, 10, 0x11, 0x96][..], b"protocol"].concat(), "{bytes:x?}");
    }
    weir.idle().await;
}

#[tokio::test]
async fn a_close_is_echoed() {
    let weir = weir().await;
    let mut socket = weir.socket().await;
    socket.call("weir.subscribe", json!({ "channels": ["a"] })).await;
    socket.close(1000).await;
    assert_eq!(socket.closed().await.0, 1000);
    let mut socket = weir.socket().await;
    socket.close(4321).await;
    assert_eq!(socket.closed().await.0, 4321);
    weir.idle().await;
    assert_eq!(closed(&weir, "peer"), 2);
}

// === the handshake ===

#[tokio::test]
async fn invalid_handshakes_are_rejected() {
    let weir = weir().await;
    let reply = weir.get("/v1/ws").await.expect(426);
    assert_eq!(reply.header("upgrade"), Some("websocket"));
    let refused = Socket::handshake(weir.address, "/v1/ws", &[("sec-websocket-version", "8")]).await.err().unwrap();
    assert_eq!(
        (refused.status(), refused.headers()["sec-websocket-version"].to_str().unwrap()),
        (426.try_into().unwrap(), "13")
    );
    let refused =
        Socket::handshake(weir.address, "/v1/ws", &[("sec-websocket-protocol", "soap, mqtt")]).await.err().unwrap();
    assert_eq!(refused.status(), 400);
    let refused = Socket::handshake(weir.address, "/v1/ws?chanel=a", &[]).await.err().unwrap();
    assert_eq!(refused.status(), 400);
    for (offered, chosen) in [
        ("weir.v1", "weir.v1"),
        ("soap, jsonrpc", "jsonrpc"),
        ("jsonrpc2.0,weir.v1", "jsonrpc2.0"),
        ("weir.jsonrpc", "weir.jsonrpc"),
    ] {
        let (_, response) =
            Socket::handshake(weir.address, "/v1/ws", &[("sec-websocket-protocol", offered)]).await.unwrap();
        assert_eq!(response.headers()["sec-websocket-protocol"], chosen);
    }
}

#[tokio::test]
async fn a_forbidden_origin_receives_the_close_reason() {
    let weir = weir().await;
    let (mut socket, _) =
        Socket::handshake(weir.address, "/v1/ws", &[("origin", "https://evil.example")]).await.unwrap();
    assert_eq!(socket.closed().await, (4501, "forbidden".into()));
    let local = format!("http://localhost:{}", weir.address.port());
    for origin in [local.as_str(), "http://127.0.0.1:3000"] {
        let (mut socket, _) = Socket::handshake(weir.address, "/v1/ws", &[("origin", origin)]).await.unwrap();
        socket.expect_nothing().await;
    }
    weir.idle().await;
}

#[tokio::test]
async fn frames_sent_with_the_handshake_are_read() {
    let weir = weir().await;
    let mut tcp = tokio::net::TcpStream::connect(weir.address).await.unwrap();
    let mut bytes = b"GET /v1/ws HTTP/1.1\r\nhost: localhost\r\nupgrade: websocket\r\nconnection: keep-alive, Upgrade\r\nsec-websocket-version: 13\r\nsec-websocket-key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n".to_vec();
    let text = br#"{"jsonrpc":"2.0","id":1,"method":"weir/echo"}"#;
    bytes.extend_from_slice(&[0x81, 0x80 | text.len() as u8, 0, 0, 0, 0]);
    bytes.extend_from_slice(text);
    tcp.write_all(&bytes).await.unwrap();
    let mut got = Vec::new();
    let answer = br#"{"jsonrpc":"2.0","id":1,"result":null}"#;
    while !got.ends_with(answer) {
        assert!(in_time(tcp.read_buf(&mut got)).await.unwrap() > 0, "{}", String::from_utf8_lossy(&got));
    }
    assert!(
        String::from_utf8_lossy(&got).to_lowercase().contains("sec-websocket-accept: s3pplmbitxaq9kygzzhzrbk+xoo=")
    );
}

// === ends of connections ===

#[tokio::test]
async fn dead_peers_are_evicted() {
    let weir = weir().with(|config| config.ws.ping = Duration::from_millis(500)).await;
    // This client reads and does not answer pings.
    let mut tcp = weir.socket().await.tcp();
    let mut end = Vec::new();
    in_time(tcp.read_to_end(&mut end)).await.ok();
    assert_eq!(end, [&[0x89, 0, 0x88, 11, 0x0f, 0xa0][..], b"dead_peer"].concat());
    // A client that answers pings stays connected.
    let mut socket = weir.socket().await;
    let alive = tokio::time::timeout(Duration::from_secs(3), socket.text()).await;
    assert!(alive.is_err(), "{alive:?}");
    socket.expect_nothing().await;
    drop(socket);
    weir.idle().await;
    assert_eq!(closed(&weir, "dead_peer"), 1);
}

#[tokio::test]
async fn a_socket_that_does_not_read_is_closed_as_slow() {
    let weir = weir().with(|config| config.limits.stalled = Duration::from_secs(4)).await;
    let mut slow = weir.socket().await;
    slow.call("weir.subscribe", json!({ "channels": ["big"] })).await;
    let mut tcp = slow.tcp();
    let data = format!("\"{}\"", "x".repeat(500_000));
    for _ in 0..30 {
        weir.publish("big", &data).await;
    }
    eventually("closed as slow", async || weir.metric("weir_subscriptions{transport=\"ws\"}") == 0).await;
    // The client reads again and receives the reason.
    let mut end = Vec::new();
    in_time(tcp.read_to_end(&mut end)).await.ok();
    assert!(
        end.ends_with(&[&[0x88, 6, 0x0f, 0xa1][..], b"slow"].concat()),
        "{:?}",
        &end[end.len().saturating_sub(20)..]
    );
    weir.idle().await;
    assert_eq!(closed(&weir, "slow"), 1);
}

#[tokio::test]
async fn a_client_that_floods_and_does_not_read_is_closed() {
    let weir = weir().with(|config| config.limits.stalled = Duration::from_secs(1)).await;
    let socket = weir.socket().await;
    let (mut read, mut write) = socket.tcp().into_split();
    let text = format!(r#"{{"jsonrpc":"2.0","id":1,"method":"weir/echo","params":["{}"]}}"#, "x".repeat(60_000));
    let mut frame = vec![0x81, 0x80 | 126];
    frame.extend_from_slice(&(text.len() as u16).to_be_bytes());
    frame.extend_from_slice(&[0; 4]);
    frame.extend_from_slice(text.as_bytes());
    // The server stops reading, so that writes block, and fail after the close.
    let flood = tokio::spawn(async move { while write.write_all(&frame).await.is_ok() {} });
    eventually("closed as slow", async || closed(&weir, "slow") == 1).await;
    let mut end = Vec::new();
    in_time(read.read_to_end(&mut end)).await.ok();
    assert!(end.len() < 40 << 20, "{}", end.len());
    in_time(flood).await.unwrap();
    weir.idle().await;
}

#[tokio::test]
async fn a_drain_lets_calls_finish_and_spreads_the_rest() {
    let weir = weir()
        .with(|config| {
            config.drain.window = Duration::from_secs(1);
            config.drain.grace = Duration::from_secs(10);
        })
        .await;
    let mut provider = weir.socket().await;
    provider.provide("s").await;
    // A client that uses no method of weir.
    let mut caller = weir.socket().await;
    caller.send(r#"{"jsonrpc":"2.0","id":1,"method":"s/m"}"#).await;
    let request = provider.next_request().await;
    let mut idle = weir.socket().await;
    idle.call("weir.ping", json!({})).await;

    weir.shut_down();
    let drain = provider.notification("weir.drain").await;
    assert!((1_000..4_000).contains(&drain["after_ms"].as_u64().unwrap()), "{drain}");
    assert!((1_000..=10_000).contains(&drain["deadline_ms"].as_u64().unwrap()), "{drain}");
    let end = in_time(idle.closed()).await;
    assert_eq!(end, (1012, "draining".into()));
    provider.reply(&request, json!("late")).await;
    // A client that uses no method of weir receives no drain notification.
    assert_eq!(caller.next().await["result"], "late");
    assert_eq!(provider.closed().await, (1012, "draining".into()));
    assert_eq!(caller.closed().await, (1012, "draining".into()));
    in_time(weir.stopped()).await;
}

#[tokio::test]
async fn the_drain_grace_period_ends_unfinished_calls() {
    let weir = weir()
        .with(|config| {
            config.drain.window = Duration::from_millis(500);
            config.drain.grace = Duration::from_secs(3);
        })
        .await;
    let mut provider = weir.socket().await;
    provider.provide("s").await;
    let mut caller = weir.socket().await;
    caller.send(r#"{"jsonrpc":"2.0","id":1,"method":"s/m"}"#).await;
    provider.next_request().await;
    weir.shut_down();
    assert_eq!(provider.closed().await, (1012, "draining".into()));
    let answer = caller.next().await;
    // The code depends on which of the two is closed first.
    let code = answer["error"]["data"]["code"].as_str();
    assert!(matches!(code, Some("provider_gone" | "draining")), "{answer}");
    assert_eq!(answer["error"]["data"]["executed"], "maybe");
    assert_eq!(caller.closed().await.0, 1012);
    in_time(weir.stopped()).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn ten_thousand_abrupt_disconnects_leave_nothing() {
    let weir = weir().await;
    let at = weir.address;
    let mut steady = Socket::open(at).await;
    steady.provide("steady").await;
    for _ in 0..10 {
        let visits = (0..1_000).map(|n| async move {
            let mut socket = Socket::open(at).await;
            match n % 5 {
                1 => drop(socket.call("weir.subscribe", json!({ "channels": [format!("c{}", n % 97), "all"] })).await),
                2 => socket.provide(&format!("s{}", n % 13)).await,
                3 => socket.send(r#"{"jsonrpc":"2.0","id":1,"method":"steady/never"}"#).await,
                // In the middle of a frame.
                4 => return drop(socket.tcp().write_all(&[0x81, 0xfe, 0xff]).await),
                _ => {}
            }
            // With a reset or a normal close of TCP.
            if n % 2 == 0 {
                drop(socket.tcp().set_zero_linger());
            }
        });
        futures_util::future::join_all(visits).await;
    }
    drop(steady);
    weir.idle().await;
}

/// Libraries send an empty array for a method without arguments.
#[tokio::test]
async fn methods_without_arguments_accept_every_form_of_no_params() {
    let weir = weir().await;
    let mut socket = weir.socket().await;
    let requests: Vec<_> = ["weir.ping", "weir.services"]
        .into_iter()
        .flat_map(|method| {
            ["", r#","params":null"#, r#","params":{}"#, r#","params":[]"#, r#","params":[{}]"#]
                .map(|params| (method, params))
        })
        .enumerate()
        .map(|(id, (method, params))| format!(r#"{{"jsonrpc":"2.0","id":{id},"method":"{method}"{params}}}"#))
        .collect();
    for request in &requests {
        socket.send(request.clone()).await;
        assert!(socket.next().await.get("result").is_some(), "{request}");
        assert!(weir.post("/v1/rpc", request.clone()).await.expect(200).json().get("result").is_some(), "{request}");
    }
    let batch = format!("[{}]", requests.join(","));
    for answer in weir.post("/v1/rpc", batch).await.expect(200).json().as_array().unwrap() {
        assert!(answer.get("result").is_some(), "{answer}");
    }
    // A method with arguments names the one that is missing.
    let error = socket.call_error("weir.publish", json!([])).await;
    assert!(error["message"].as_str().unwrap().contains("channel"), "{error}");
    socket.call_error("weir.ping", json!([1])).await;
}
