//! Held streams without a link, and held responses.

use bytes::Bytes;
use http_body_util::{BodyExt as _, Empty};
use hyper_util::rt::{TokioExecutor, TokioIo};
use serde_json::json;
use std::time::Duration;
use tokio::net::TcpStream;

use super::{Grip, Origin, before, behind, route};
use crate::support::{Client, Request, eventually, weir};

const HELD: &[(&str, &str)] = &[("Grip-Hold", "stream"), ("Grip-Channel", "a, b")];

/// A client whose response is held as a stream.
pub async fn held(grip: &Grip, origin: &mut Origin, headers: &[(&str, &str)], body: &str) -> Client {
    let mut client = Client::connect(grip.proxy).await;
    client.send("GET", "/x?y=1", &[], b"").await;
    origin.next().await.answer(headers, body).await;
    let reply = client.head().await;
    assert_eq!(reply.status, 200);
    assert_eq!(reply.header("content-length"), None);
    assert_eq!(reply.header("transfer-encoding"), Some("chunked"));
    assert!(!reply.headers.iter().any(|(name, _)| name.starts_with("grip-")), "{reply:?}");
    client
}

#[tokio::test]
async fn a_held_stream_is_the_origins_body_followed_by_published_bytes() {
    let mut origin = Origin::start().await;
    let grip = before(&origin).await;
    let mut client = held(&grip, &mut origin, HELD, "open\n").await;
    // An item published right after the head is not lost.
    grip.stream("a", "event: message\ndata: {\"a\":1}\n\n").await;
    assert_eq!(client.chunks(35).await, "open\nevent: message\ndata: {\"a\":1}\n\n");
    grip.stream("b", "no block").await;
    grip.stream("c", "somebody else's").await;
    grip.weir.publish("a", r#"{"from":"elsewhere"}"#).await;
    assert_eq!(client.chunks(8).await, "no block");
    assert_eq!(client.chunks(28).await, "data: {\"from\":\"elsewhere\"}\n\n");
    let bytes: Vec<u8> = (0..=255).collect();
    let binary = base64::Engine::encode(&base64::engine::general_purpose::STANDARD, &bytes);
    grip.publish("a", json!({"formats": {"http-stream": {"content-bin": binary}}})).await;
    assert_eq!(client.chunk().await.unwrap(), bytes);
    grip.publish("b", json!({"formats": {"http-stream": {"action": "close"}}})).await;
    assert_eq!(client.chunk().await, None);
    assert!(client.is_closed().await);
    grip.weir.idle().await;
}

#[tokio::test]
async fn items_of_one_request_keep_their_order() {
    let mut origin = Origin::start().await;
    let grip = before(&origin).await;
    let mut client = held(&grip, &mut origin, HELD, "").await;
    let item = |n: usize| json!({"channel": "a", "formats": {"http-stream": {"content": format!("{n};")}}});
    let items: Vec<_> =
        (0..300).map(item).chain([json!({"channel": "a", "http-stream": {"action": "close"}}), item(300)]).collect();
    grip.publish_raw(json!({ "items": items }).to_string()).await.expect(200);
    let mut got = Vec::new();
    while let Some(chunk) = client.chunk().await {
        got.extend_from_slice(&chunk);
    }
    let expected: String = (0..300).map(|n| format!("{n};")).collect();
    assert_eq!(String::from_utf8(got).unwrap(), expected);
}

#[tokio::test]
async fn published_items_wait_for_the_end_of_the_origins_body() {
    let mut origin = Origin::start().await;
    let grip = before(&origin).await;
    let mut client = Client::connect(grip.proxy).await;
    client.send("GET", "/", &[], b"").await;
    let mut exchange = origin.next().await;
    exchange.write("HTTP/1.1 200 OK\r\nGrip-Hold: stream\r\nGrip-Channel: a\r\nContent-Length: 10\r\n\r\nfirst").await;
    client.head().await;
    assert_eq!(client.chunks(5).await, "first");
    grip.stream("a", "later").await;
    exchange.write("words").await;
    assert_eq!(client.chunks(10).await, "wordslater");
}

#[tokio::test]
async fn keep_alives_are_sent_when_idle_or_at_an_interval() {
    let mut origin = Origin::start().await;
    let grip = before(&origin).await;
    for (alive, bytes) in [
        (r"event: keep-alive\ndata: \n\n; format=cstring; timeout=1", "event: keep-alive\ndata: \n\n"),
        ("Ogo=; format=base64; timeout=1; mode=interval", ":\n"),
        ("raw; timeout=1", "raw"),
    ] {
        let headers = [HELD, &[("Grip-Keep-Alive", alive)]].concat();
        let mut client = held(&grip, &mut origin, &headers, "open\n").await;
        assert_eq!(client.chunks(5).await, "open\n");
        for _ in 0..2 {
            assert_eq!(client.chunks(1).await, bytes);
        }
        grip.stream("a", "x").await;
        assert!([format!("x{bytes}"), format!("{bytes}x")].contains(&client.chunks(1 + bytes.len()).await));
    }
}

#[tokio::test]
async fn grip_instructions_in_a_body_are_applied() {
    let mut origin = Origin::start().await;
    let grip = before(&origin).await;
    let body = json!({
        "hold": {"mode": "stream", "channels": [{"name": "a"}]},
        "response": {"headers": {"X-A": "1"}, "body": "open\n"},
    });
    let kind = [("Content-Type", "application/grip-instruct")];
    let mut client = Client::connect(grip.proxy).await;
    client.send("GET", "/", &[], b"").await;
    origin.next().await.answer(&kind, body.to_string()).await;
    let reply = client.head().await;
    assert_eq!((reply.status, reply.header("x-a"), reply.header("content-type")), (200, Some("1"), None));
    grip.stream("a", "x").await;
    assert_eq!(client.chunks(6).await, "open\nx");
    // Without a hold the instructions are the response.
    let pending = tokio::spawn(grip.request("GET", "/").into_future());
    origin.next().await.answer(&kind, r#"{"response":{"code":404,"body-bin":"AP8="}}"#).await;
    assert_eq!(pending.await.unwrap().expect(404).body, [0, 255][..]);
}

#[tokio::test]
async fn grip_status_and_http_1_0_are_respected() {
    let mut origin = Origin::start().await;
    let grip = before(&origin).await;
    // A status other than 200, and no chunks with HTTP/1.0.
    let mut client = Client::connect(grip.proxy).await;
    client.write("GET / HTTP/1.0\r\nHost: a\r\n\r\n").await;
    origin.next().await.answer(&[HELD, &[("Grip-Status", "201")]].concat(), "open\n").await;
    let reply = client.head().await;
    assert_eq!((reply.status, reply.header("transfer-encoding")), (201, None));
    grip.stream("a", "x").await;
    assert_eq!(client.read(6).await, b"open\nx");
    grip.publish("a", json!({"formats": {"http-stream": {"action": "close"}}})).await;
    assert!(client.is_closed().await);
}

#[tokio::test]
async fn prefixes_separate_the_channels_of_routes() {
    let (mut one, mut two) = (Origin::start().await, Origin::start().await);
    let keyed = |path, origin, name: &str| {
        let mut route = route(path, origin);
        (route.prefix, route.key) = (format!("{name}-"), name.into());
        route
    };
    let grip = behind(weir(), vec![keyed("/one", &one, "one"), keyed("/two", &two, "two")]).await;
    let mut clients = Vec::new();
    for (path, origin) in [("/one", &mut one), ("/two", &mut two)] {
        let mut client = Client::connect(grip.proxy).await;
        client.send("GET", path, &[], b"").await;
        origin.next().await.answer(HELD, "").await;
        assert_eq!(client.head().await.status, 200);
        clients.push(client);
    }
    let item =
        |channel: &str| json!({"items": [{"channel": channel, "http-stream": {"content": channel}}]}).to_string();
    for (key, channel) in [("one", "a"), ("two", "a"), ("two", "two-b")] {
        let bearer = format!("Bearer {key}");
        let request = Request::new(grip.publish, "POST", "/publish/");
        request.header("Authorization", &bearer).body(item(channel)).await.expect(200);
    }
    assert_eq!(clients[0].chunks(1).await, "a");
    assert_eq!(clients[1].chunks(6).await, "atwo-b");
    let channels = grip.weir.get("/v1/channels").await.expect(200).json();
    let names: Vec<_> = channels["channels"].as_array().unwrap().iter().map(|info| &info["channel"]).collect();
    assert_eq!(names, ["one-a", "two-a", "two-b"]);
}

#[tokio::test]
async fn a_drain_ends_held_responses() {
    let mut origin = Origin::start().await;
    let starter = weir().with(|config| config.drain.window = Duration::from_millis(100));
    let grip = behind(starter, vec![route("/", &origin)]).await;
    let mut client = held(&grip, &mut origin, HELD, "open\n").await;
    assert_eq!(client.chunks(5).await, "open\n");
    let waiting = tokio::spawn(grip.request("GET", "/wait").into_future());
    origin.next().await.answer(&[("Grip-Hold", "response"), ("Grip-Channel", "answers")], "timeout").await;
    grip.readers("answers", 1).await;
    grip.weir.shut_down();
    assert_eq!(waiting.await.unwrap().expect(200).text(), "timeout");
    assert_eq!(client.chunk().await, None);
    grip.weir.stopped().await;
}

#[tokio::test]
async fn a_held_stream_that_falls_behind_retention_ends() {
    let mut origin = Origin::start().await;
    let starter = weir().with(|config| config.channels[0].keep.count = 5);
    let grip = behind(starter, vec![route("/", &origin)]).await;
    let mut client = Client::connect(grip.proxy).await;
    client.send("GET", "/", &[], b"").await;
    let mut exchange = origin.next().await;
    exchange.write("HTTP/1.1 200 OK\r\nGrip-Hold: stream\r\nGrip-Channel: a\r\nContent-Length: 4\r\n\r\nop").await;
    client.head().await;
    for n in 0..10 {
        grip.stream("a", &n.to_string()).await;
    }
    exchange.write("en").await;
    assert_eq!(client.chunks(4).await, "open");
    assert_eq!(client.chunk().await, None);
    assert_eq!(grip.metric("weir_gaps_total{reason=\"trimmed\"}"), 1);
}

#[tokio::test]
async fn held_responses_and_tunnels_are_listed_and_kicked() {
    let mut origin = Origin::start().await;
    let grip = before(&origin).await;
    let mut stream = held(&grip, &mut origin, HELD, "open\n").await;
    let waiting = tokio::spawn(grip.request("GET", "/wait").into_future());
    origin.next().await.answer(WAITS, "in time").await;
    grip.readers("answers", 1).await;
    let mut tunnel = Client::connect(grip.proxy).await;
    tunnel.send("GET", "/ws", &[("Connection", "Upgrade"), ("Upgrade", "websocket")], b"").await;
    let mut exchange = origin.next().await;
    exchange.write("HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n").await;
    assert_eq!(tunnel.head().await.status, 101);
    let sessions = grip.weir.node().cluster_connections.local();
    eventually("three are listed", async || sessions.len() == 3).await;
    let all = grip.weir.get("/v1/connections").await.expect(200).json();
    let all = all["connections"].as_array().unwrap();
    let listed: Vec<_> = all.iter().map(|it| json!([it["transport"], it["channels"]])).collect();
    assert_eq!(listed, [json!(["sse", 2]), json!(["poll", 1]), json!(["ws", 0])]);
    for it in all {
        assert!(it["remote"].as_str().unwrap().starts_with("127.0.0.1:"), "{it}");
        let kicked = grip.weir.delete(format!("/v1/connections?id={}", it["id"].as_str().unwrap())).await;
        assert_eq!(kicked.expect(200).json(), json!({ "kicked": 1 }));
    }
    assert_eq!(stream.chunks(5).await, "open\n");
    assert_eq!(stream.chunk().await, None);
    // A kicked response is answered as after its timeout.
    assert_eq!(waiting.await.unwrap().expect(200).text(), "in time");
    assert!(exchange.is_cancelled().await && tunnel.is_closed().await);
    drop((stream, tunnel));
    grip.weir.idle().await;
    assert!(sessions.is_empty());
}

// === responses ===

const WAITS: &[(&str, &str)] =
    &[("Grip-Hold", "response"), ("Grip-Channel", "answers"), ("X-Origin", "1"), ("Content-Type", "a/b")];

#[tokio::test]
async fn a_published_item_answers_a_held_response() {
    let mut origin = Origin::start().await;
    let grip = before(&origin).await;
    for (item, status, body) in [
        (json!({"body": "{\"a\":1}"}), 200, r#"{"a":1}"#),
        (
            json!({"code": 404, "reason": "No", "headers": [["X-Item", "1"], ["Grip-X", "1"], ["Content-Type", "c/d"]], "body": ""}),
            404,
            "",
        ),
        (json!({"body-patch": [{"op": "replace", "path": "/n", "value": 2}]}), 200, r#"{"n":2}"#),
    ] {
        let pending = tokio::spawn(grip.request("GET", "/").into_future());
        origin.next().await.answer(WAITS, r#"{"n":1}"#).await;
        grip.readers("answers", 1).await;
        // Items for streams do not answer responses.
        grip.stream("answers", "x").await;
        grip.weir.publish("answers", "1").await;
        let items = json!({"formats": {"http-response": item}});
        grip.publish("answers", items).await;
        let reply = pending.await.unwrap().expect(status);
        assert_eq!((reply.text(), reply.header("x-origin"), reply.header("grip-x")), (body, Some("1"), None));
        assert_eq!(reply.header("content-type"), Some(if status == 404 { "c/d" } else { "a/b" }));
        assert_eq!(reply.header("content-length"), Some(&*body.len().to_string()));
    }
    grip.readers("answers", 0).await;
    // An item without a stream format is stored as an event and is not sent to held streams.
    let read = grip.weir.get("/v1/events?channel=answers&last=1").await.expect(200).json();
    assert_eq!((&read["events"][0]["type"], &read["events"][0]["data"]), (&json!("grip"), &json!(null)));
    grip.weir.idle().await;
}

#[tokio::test]
async fn a_held_response_times_out_with_the_response_of_the_origin() {
    let mut origin = Origin::start().await;
    let grip = before(&origin).await;
    let pending = tokio::spawn(grip.request("POST", "/").body("x").into_future());
    let headers = [WAITS, &[("Grip-Timeout", "0"), ("Grip-Status", "304")]].concat();
    origin.next().await.answer(&headers, "late").await;
    let reply = pending.await.unwrap().expect(304);
    assert_eq!((reply.text(), reply.header("x-origin")), ("", Some("1")));
    grip.weir.idle().await;
    // A client that disconnects ends its hold.
    let mut client = Client::connect(grip.proxy).await;
    client.send("GET", "/", &[], b"").await;
    origin.next().await.answer(WAITS, "late").await;
    grip.readers("answers", 1).await;
    drop(client);
    grip.weir.idle().await;
}

#[tokio::test]
async fn an_outdated_held_response_is_requested_again() {
    let mut origin = Origin::start().await;
    let grip = before(&origin).await;
    grip.publish("answers", json!({"id": "2", "formats": {"http-response": {"body": "two"}}})).await;
    let pending = tokio::spawn(grip.request("GET", "/p").header("X-A", "1").into_future());
    let outdated = [("Grip-Hold", "response"), ("Grip-Channel", "answers; prev-id=1")];
    origin.next().await.answer(&outdated, "").await;
    let exchange = origin.next().await;
    assert_eq!((exchange.line(), exchange.header("x-a")), ("GET /p", Some("1")));
    assert_eq!(exchange.header("grip-last"), Some("answers; last-id=1"));
    let current = [("Grip-Hold", "response"), ("Grip-Channel", "answers; prev-id=2")];
    exchange.answer(&current, "").await;
    grip.readers("answers", 1).await;
    // A hint requests the response again, too.
    grip.publish("answers", json!({"id": "3", "prev-id": "2", "formats": {"http-response": {"action": "hint"}}})).await;
    let exchange = origin.next().await;
    assert_eq!(exchange.header("grip-last"), Some("answers; last-id=2"));
    exchange.answer(&[], "fresh").await;
    assert_eq!(pending.await.unwrap().expect(200).text(), "fresh");
    grip.weir.idle().await;
}

#[tokio::test]
async fn a_stream_with_skip_self_omits_its_own_items() {
    let mut origin = Origin::start().await;
    let grip = before(&origin).await;
    let filtered = [("Grip-Hold", "stream"), ("Grip-Channel", "a; filter=skip-self"), ("Grip-Set-Meta", "user=alice")];
    let mut client = held(&grip, &mut origin, &filtered, "").await;
    for (sender, content) in [("alice", "mine"), ("bob", "his")] {
        grip.publish("a", json!({"meta": {"sender": sender}, "formats": {"http-stream": {"content": content}}})).await;
    }
    assert_eq!(client.chunks(3).await, "his");
    drop(client);
    eventually("no connection is left", async || grip.weir.connections().is_empty()).await;
}

#[tokio::test]
async fn an_answer_that_names_no_encoding_is_held() {
    let mut origin = Origin::start().await;
    let grip = before(&origin).await;
    for encoding in ["identity", "None", "identity, none", ""] {
        let mut client = Client::connect(grip.proxy).await;
        client.send("GET", "/x", &[], b"").await;
        let headers = [("Grip-Hold", "stream"), ("Grip-Channel", "a"), ("Content-Encoding", encoding)];
        origin.next().await.answer(&headers, "open;").await;
        let head = client.head().await;
        assert_eq!((head.status, head.header("content-encoding")), (200, None), "{encoding}");
        grip.stream("a", "item;").await;
        assert_eq!(client.chunks(10).await, "open;item;", "{encoding}");
    }
    let pending = tokio::spawn(grip.request("GET", "/x").into_future());
    let headers = [("Grip-Hold", "stream"), ("Grip-Channel", "a"), ("Content-Encoding", "identity, gzip")];
    origin.next().await.answer(&headers, "").await;
    pending.await.unwrap().expect(502);
}

#[tokio::test]
async fn a_status_without_a_body_is_sent_without_one() {
    let mut origin = Origin::start().await;
    let grip = before(&origin).await;
    let socket = TokioIo::new(TcpStream::connect(grip.proxy).await.unwrap());
    let (mut http2, connection) = hyper::client::conn::http2::handshake(TokioExecutor::new(), socket).await.unwrap();
    tokio::spawn(connection);
    for status in [204, 205, 304] {
        // The status of an item, of Grip-Status for a held response, a held stream, and a response that is passed on.
        for (hold, published) in [("response", true), ("response", false), ("stream", false), ("", false)] {
            let request = http::Request::get("http://localhost/x").body(Empty::<Bytes>::new()).unwrap();
            let pending = tokio::spawn(http2.send_request(request));
            let status = status.to_string();
            let mut headers = vec![("ETag", "1")];
            if !published {
                headers.push(("Grip-Status", status.as_str()));
            }
            if !hold.is_empty() {
                headers.extend([("Grip-Hold", hold), ("Grip-Channel", "a")]);
            }
            if hold == "response" && !published {
                headers.push(("Grip-Timeout", "0"));
            }
            origin.next().await.answer(&headers, "a body").await;
            if published {
                grip.readers("a", 1).await;
                grip.publish("a", json!({"http-response": {"code": status, "body": "BODY"}})).await;
            }
            let reply = pending.await.unwrap().unwrap();
            assert_eq!((reply.status().as_str(), &reply.headers()["etag"]), (&*status, &"1".parse().unwrap()));
            assert_eq!(reply.into_body().collect().await.unwrap().to_bytes(), "", "{status} {hold}");
        }
    }
    drop(http2);
    grip.weir.idle().await;
}
