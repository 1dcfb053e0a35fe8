//! Requests and responses that pass the proxy.

use base64::{Engine, engine::general_purpose::URL_SAFE_NO_PAD as BASE64URL};
use serde_json::Value;
use std::time::Duration;

use super::{Origin, before, behind, route};
use crate::support::{Client, redis::free_port, weir};

fn claims(token: &str) -> Value {
    serde_json::from_slice(&BASE64URL.decode(token.split('.').nth(1).unwrap()).unwrap()).unwrap()
}

#[tokio::test]
async fn requests_and_responses_are_forwarded_without_hop_by_hop_headers() {
    let mut origin = Origin::start().await;
    let grip = before(&origin).await;
    let pending = grip
        .request("POST", "/a%20b/c?d=e&f")
        .header("Host", "example.com")
        .header("Cookie", "a=1; b=2")
        .header("Connection", "X-Mine")
        .header("X-Mine", "hop")
        .header("Grip-Sig", "forged")
        .header("Grip-Anything", "forged")
        .header("X-Forwarded-For", "10.1.1.1")
        .body("hello");
    let pending = tokio::spawn(async move { pending.await });
    let mut exchange = origin.next().await;
    assert_eq!(exchange.line(), "POST /a%20b/c?d=e&f");
    assert_eq!(exchange.body(5).await, b"hello");
    assert_eq!((exchange.header("host"), exchange.header("cookie")), (Some("example.com"), Some("a=1; b=2")));
    assert_eq!((exchange.header("x-mine"), exchange.header("grip-anything")), (None, None));
    assert_eq!(exchange.header("x-forwarded-for"), Some("10.1.1.1, 127.0.0.1"));
    assert_eq!(exchange.header("x-forwarded-proto"), Some("http"));
    assert!(exchange.header("grip-feature").unwrap().contains("link:next"));
    assert_eq!(exchange.head.to_ascii_lowercase().matches("grip-sig").count(), 1);
    let claims = claims(exchange.header("grip-sig").unwrap());
    assert_eq!(claims["iss"], "pushpin");
    assert!(claims["exp"].as_u64().unwrap() > 1_700_000_000);
    let answer = "HTTP/1.1 418 Teapot\r\nContent-Length: 3\r\nX-A: 1\r\nX-A: 2\r\nSet-Cookie: x\r\nGrip-Status: 299\r\n\
                  Connection: x-hop\r\nX-Hop: 1\r\nGrip-Foo: bar\r\n\r\nabc";
    exchange.write(answer.replace("Grip-Status: 299\r\n", "")).await;
    let reply = pending.await.unwrap().expect(418);
    assert_eq!((reply.text(), reply.all("x-a").as_str(), reply.header("set-cookie")), ("abc", "1, 2", Some("x")));
    assert_eq!((reply.header("x-hop"), reply.header("grip-foo")), (None, None));
}

#[tokio::test]
async fn the_longest_matching_route_is_used() {
    let (mut all, mut api) = (Origin::start().await, Origin::start().await);
    let mut keyed = route("/api", &api);
    keyed.key = "secret".into();
    let grip = behind(weir(), vec![route("/", &all), keyed]).await;
    for (path, is_api) in [("/", false), ("/api", true), ("/api/x", true), ("/apiary", false), ("/api?x", true)] {
        let pending = tokio::spawn(grip.request("GET", path).into_future());
        let exchange = if is_api { api.next().await } else { all.next().await };
        assert_eq!(exchange.line(), format!("GET {path}"));
        exchange.answer(&[], "x").await;
        pending.await.unwrap().expect(200);
    }
    let nowhere = behind(weir(), vec![route("/api", &api)]).await;
    let reply = nowhere.request("GET", "/other").await.expect(502);
    assert_eq!(reply.text(), "No route for /other.\n");
}

#[tokio::test]
async fn bodies_are_streamed_both_ways() {
    let mut origin = Origin::start().await;
    let grip = before(&origin).await;
    let mut client = Client::connect(grip.proxy).await;
    client.write("POST /up HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n3\r\none\r\n").await;
    let mut exchange = origin.next().await;
    assert_eq!(exchange.body(8).await, b"3\r\none\r\n");
    // The response begins before the end of the request.
    exchange.write("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nTrailer: X-Sum\r\n\r\n2\r\nok\r\n").await;
    assert_eq!(client.head().await.status, 200);
    assert_eq!(client.chunk().await.unwrap(), "ok");
    client.write("3\r\ntwo\r\n0\r\n\r\n").await;
    assert_eq!(exchange.chunks().await, b"3\r\none\r\n3\r\ntwo\r\n0\r\n\r\n");
    exchange.write("4\r\nmore\r\n0\r\n\r\n").await;
    assert_eq!((client.chunk().await.unwrap(), client.chunk().await), ("more".into(), None));
}

#[tokio::test]
async fn responses_without_a_body_are_forwarded() {
    let mut origin = Origin::start().await;
    let grip = before(&origin).await;
    let pending = tokio::spawn(grip.request("HEAD", "/x").into_future());
    let mut exchange = origin.next().await;
    assert_eq!(exchange.line(), "HEAD /x");
    exchange.write("HTTP/1.1 200 OK\r\nContent-Length: 5\r\nGrip-Hold: stream\r\nGrip-Channel: a\r\n\r\n").await;
    let reply = pending.await.unwrap().expect(200);
    assert_eq!((reply.header("content-length"), reply.header("grip-hold")), (Some("5"), None));
    exchange.done();
    let pending = tokio::spawn(grip.request("GET", "/x").into_future());
    let mut exchange = origin.next().await;
    exchange
        .write("HTTP/1.1 103 Early Hints\r\nLink: </a>\r\n\r\nHTTP/1.1 304 Not Modified\r\nETag: \"1\"\r\n\r\n")
        .await;
    let reply = pending.await.unwrap().expect(304);
    assert_eq!(reply.header("etag"), Some("\"1\""));
}

#[tokio::test]
async fn errors_of_the_origin_are_answered_with_502_or_504() {
    let mut origin = Origin::start().await;
    let starter = weir().with(|config| {
        config.compat.get_mut::<weir::compat::grip::Config>().unwrap().timeout = Duration::from_millis(300)
    });
    let grip = behind(starter, vec![route("/", &origin)]).await;
    for (answer, says) in [
        ("", "it broke off"),
        ("nonsense\r\n\r\n", "it broke off"),
        ("HTTP/1.1 101 Switching Protocols\r\nConnection: upgrade\r\nUpgrade: x\r\n\r\n", "it broke off"),
        ("HTTP/1.1 200 OK\r\nGrip-Hold: forever\r\n\r\n", "Grip-Hold must be set to either 'response' or 'stream'"),
        ("HTTP/1.1 200 OK\r\nGrip-Hold: stream\r\nGrip-Channel: \u{1}\r\n\r\n", "it broke off"),
        (
            "HTTP/1.1 200 OK\r\nGrip-Hold: stream\r\nGrip-Channel: a\r\nGrip-Timeout: x\r\n\r\n",
            "failed to parse Grip-Timeout",
        ),
        (
            "HTTP/1.1 200 OK\r\nGrip-Hold: stream\r\nContent-Encoding: gzip\r\nGrip-Channel: a\r\n\r\n",
            "an answer that is held cannot have a Content-Encoding",
        ),
        (
            "HTTP/1.1 200 OK\r\nGrip-Hold: stream\r\nGrip-Channel: a; prev-id=1\r\n\r\n",
            "channel 'a' specifies prev-id, but no next link found",
        ),
        (
            "HTTP/1.1 200 OK\r\nContent-Type: application/grip-instruct\r\nContent-Length: 1\r\n\r\n{",
            "failed to parse application/grip-instruct content as JSON",
        ),
        ("HTTP/1.1 200 OK\r\nGrip-Hold: response\r\nContent-Length: 9\r\n\r\nabc", "it broke off"),
    ] {
        let pending = tokio::spawn(grip.request("POST", "/x").into_future());
        let mut exchange = origin.next().await;
        exchange.write(answer).await;
        drop(exchange);
        let reply = pending.await.unwrap().expect(502);
        assert_eq!(reply.text(), format!("Error while proxying to origin: {says}.\n"), "{answer}");
        assert_eq!(reply.header("content-type"), Some("text/plain"));
    }
    let pending = tokio::spawn(grip.request("GET", "/x").into_future());
    let mut exchange = origin.next().await;
    let reply = pending.await.unwrap().expect(504);
    assert_eq!(reply.text(), "Error while proxying to origin: it did not answer within 300ms.\n");
    assert!(exchange.is_cancelled().await);

    // If the origin closes in the middle of a body, the proxy closes the client's connection as well.
    let mut client = Client::connect(grip.proxy).await;
    client.send("GET", "/x", &[], b"").await;
    let mut exchange = origin.next().await;
    exchange.write("HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nabc").await;
    assert_eq!(client.head().await.header("content-length"), Some("10"));
    assert_eq!(client.read(3).await, b"abc");
    drop(exchange);
    assert!(client.is_closed().await);

    let mut nowhere = route("/", &origin);
    nowhere.origin = format!("http://127.0.0.1:{}", free_port());
    let grip = behind(weir(), vec![nowhere]).await;
    let reply = grip.request("GET", "/x").await.expect(502);
    assert_eq!(reply.text(), "Error while proxying to origin: it cannot be reached.\n");
}

#[tokio::test]
async fn a_disconnected_client_cancels_the_request_to_the_origin() {
    let mut origin = Origin::start().await;
    let grip = before(&origin).await;
    for answer in
        ["", "HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nabc", "HTTP/1.1 200 OK\r\nGrip-Hold: stream\r\n\r\nabc"]
    {
        let mut client = Client::connect(grip.proxy).await;
        client.send("GET", "/x", &[], b"").await;
        let mut exchange = origin.next().await;
        exchange.write(answer).await;
        if !answer.is_empty() {
            client.head().await;
        }
        drop(client);
        assert!(exchange.is_cancelled().await, "{answer}");
    }
    grip.weir.idle().await;
}

#[tokio::test]
async fn websockets_are_tunnelled_to_the_origin() {
    let mut origin = Origin::start().await;
    let grip = before(&origin).await;
    let mut client = Client::connect(grip.proxy).await;
    let upgrade = [
        ("Connection", "Upgrade"),
        ("Upgrade", "websocket"),
        ("Sec-WebSocket-Key", "abc"),
        ("Sec-WebSocket-Version", "13"),
    ];
    client.send("GET", "/ws", &upgrade, b"").await;
    let mut exchange = origin.next().await;
    assert_eq!((exchange.header("upgrade"), exchange.header("connection")), (Some("websocket"), Some("upgrade")));
    assert_eq!(exchange.header("sec-websocket-key"), Some("abc"));
    assert!(exchange.header("grip-sig").is_some());
    let head = "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Accept: xyz\r\n\r\nearly";
    exchange.write(head).await;
    let reply = client.head().await;
    assert_eq!(
        (reply.status, reply.header("upgrade"), reply.header("connection")),
        (101, Some("websocket"), Some("upgrade"))
    );
    assert_eq!(reply.header("sec-websocket-accept"), Some("xyz"));
    assert_eq!(client.read(5).await, b"early");
    client.write("from client").await;
    assert_eq!(exchange.read().await, b"from client");
    exchange.write("from origin").await;
    assert_eq!(client.read(11).await, b"from origin");
    assert_eq!(grip.metric("weir_connections{transport=\"ws\"}"), 1);
    drop(exchange);
    assert!(client.is_closed().await);
    drop(client);
    // A rejected upgrade is an ordinary response.
    let mut client = Client::connect(grip.proxy).await;
    client.send("GET", "/ws", &upgrade, b"").await;
    origin.next().await.answer(&[], "no").await;
    assert_eq!(client.response().await.text(), "no");
    drop(client);
    grip.weir.idle().await;
    // A drain closes tunnels.
    let mut client = Client::connect(grip.proxy).await;
    client.send("GET", "/ws", &upgrade, b"").await;
    let mut exchange = origin.next().await;
    exchange.write(head).await;
    assert_eq!(client.head().await.status, 101);
    grip.weir.shut_down();
    assert!(exchange.is_cancelled().await);
}

#[tokio::test]
async fn fields_of_a_client_cannot_pass_for_those_of_a_proxy() {
    let mut origin = Origin::start().await;
    let grip = before(&origin).await;
    let pending = grip.request("GET", "/x").header("Grip_Sig", "forged").header("X_Forwarded_For", "10.0.0.9");
    let pending = pending.header("X.User", "admin").header("X-User", "me");
    let pending = tokio::spawn(pending.into_future());
    let exchange = origin.next().await;
    let head = exchange.head.to_ascii_lowercase();
    assert!(!head.contains("forged") && !head.contains("10.0.0.9") && !head.contains("admin"), "{head}");
    assert_eq!(exchange.header("x-user"), Some("me"));
    exchange.answer(&[], "ok").await;
    pending.await.unwrap().expect(200);

    // Trailers of a client are no way around it.
    let mut client = Client::connect(grip.proxy).await;
    let head = "POST /up HTTP/1.1\r\nHost: a\r\nTE: trailers\r\nTrailer: Grip-Sig, X-Sum\r\nTransfer-Encoding: chunked\r\n\r\n";
    client.write(format!("{head}3\r\none\r\n0\r\nGrip-Sig: forged\r\nX-Sum: 1\r\n\r\n")).await;
    let mut exchange = origin.next().await;
    while !exchange.body.ends_with(b"\r\n\r\n") {
        let more = exchange.read().await;
        assert!(!more.is_empty(), "the request ended early");
        exchange.body.extend(more);
    }
    assert!(!String::from_utf8_lossy(&exchange.body).to_ascii_lowercase().contains("grip-sig"));
    exchange.answer(&[], "ok").await;
    assert_eq!(client.response().await.text(), "ok");

    // RFC 9112, sections 3.2, 5.1 and 5.2: these are errors in a request.
    for field in ["Host: b", "Grip-Sig : forged", "X-A: 1\r\n folded"] {
        let mut client = Client::connect(grip.proxy).await;
        client.write(format!("GET /x HTTP/1.1\r\nHost: a\r\n{field}\r\n\r\n")).await;
        assert_eq!(client.head().await.status, 400, "{field}");
    }
    assert!(origin.is_quiet());
}

#[tokio::test]
async fn unusual_heads_of_an_origin_are_put_in_order() {
    let mut origin = Origin::start().await;
    let grip = before(&origin).await;
    let cookies: String = (0..500).map(|n| format!("Set-Cookie: c{n}=1\r\n")).collect();
    for (fields, name, value) in [
        (cookies.as_str(), "set-cookie", (0..500).map(|n| format!("c{n}=1")).collect::<Vec<_>>().join(", ")),
        ("X-Space : a\r\n", "x-space", "a".into()),
        ("X-Fold: a\r\n b\r\n", "x-fold", "a b".into()),
        ("Content-Length: 2\r\n", "content-length", "2".into()),
    ] {
        let pending = tokio::spawn(grip.request("GET", "/x").into_future());
        let mut exchange = origin.next().await;
        exchange.write(format!("HTTP/1.1 200 OK\r\nContent-Length: 2\r\n{fields}\r\nok")).await;
        exchange.done();
        let reply = pending.await.unwrap().expect(200);
        assert_eq!((reply.text(), reply.all(name)), ("ok", value), "{fields}");
    }
}

#[tokio::test]
async fn an_idempotent_request_is_repeated_if_its_connection_closes_unanswered() {
    let mut origin = Origin::start().await;
    let grip = before(&origin).await;
    for method in ["GET", "DELETE"] {
        let pending = tokio::spawn(grip.request(method, "/x").into_future());
        origin.next().await.answer(&[], "first").await;
        assert_eq!(pending.await.unwrap().expect(200).text(), "first");
        let pending = tokio::spawn(grip.request(method, "/x?again").into_future());
        drop(origin.next().await);
        let exchange = origin.next().await;
        assert_eq!(exchange.line(), format!("{method} /x?again"));
        exchange.answer(&[], "second").await;
        assert_eq!(pending.await.unwrap().expect(200).text(), "second");
    }
    // Once, and not a request that the origin may have executed.
    for (method, times) in [("GET", 2), ("POST", 1)] {
        let pending = tokio::spawn(grip.request(method, "/x").into_future());
        for _ in 0..times {
            drop(origin.next().await);
        }
        let reply = pending.await.unwrap().expect(502);
        assert_eq!(reply.text(), "Error while proxying to origin: it broke off.\n");
        assert!(origin.is_quiet());
    }
}
