//! Connections: how they begin, what they carry at once, and every way in which they end.

use std::time::{Duration, Instant};

use bytes::Bytes;
use http_body_util::{BodyExt, Empty};
use hyper_util::rt::{TokioExecutor, TokioIo};
use serde_json::json;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpSocket, TcpStream},
};
use weir::net::hijack::Conn;

use crate::{
    start::{Server, eventually, soon},
    wire::Client,
};

const GET: &str = "GET /v1/sse?channel=a HTTP/1.1\r\nhost: localhost\r\n\r\n";
const OTHER: &str = "GET /v1/channels HTTP/1.1\r\nhost: localhost\r\n\r\n";

#[tokio::test]
async fn beyond_the_cap_of_connections() {
    let server = Server::with(|config| config.limits.connections = 2).await;
    let mut streams = vec![server.stream("channel=a").await, server.stream("channel=a").await];
    for client in &mut streams {
        client.opening().await;
    }
    let mut client = server.stream("channel=a").await;
    let retry = client.next().await;
    assert_eq!((retry.event.as_str(), &retry.json()["code"]), ("weir.retry", &json!("overloaded")));
    client.closed().await;
    let mut client = server.request("GET /v1/channels HTTP/1.1\r\nhost: localhost\r\n\r\n").await;
    let head = client.head().await;
    assert!(head.starts_with("http/1.1 503 ") && head.contains("retry-after: "), "{head}");
    client.closed().await;
    // Whoever looks after it must not take it for dead.
    for path in ["/health/live", "/health/ready", "/metrics"] {
        let mut probe = server.request(&format!("GET {path} HTTP/1.1\r\nhost: localhost\r\n\r\n")).await;
        let head = probe.head().await;
        assert!(head.starts_with("http/1.1 200 "), "{path}: {head}");
    }
    drop(streams);
    server.empty().await;
    server.stream("channel=a").await.opening().await;
}

#[tokio::test]
async fn requests_before_and_behind_in_one_segment() {
    let server = Server::start().await;
    let mut client = server.request(&format!("{OTHER}{OTHER}{GET}{OTHER}")).await;
    for _ in 0..2 {
        let head = client.head().await;
        assert!(client.body(&head).await.contains("channels"));
    }
    client.chunked = None;
    client.opening().await;
    server.publish("a", "1").await;
    assert_eq!(client.next().await.json()["data"], 1);
    drop(client);
    server.empty().await;
}

#[tokio::test]
async fn a_connection_leaves_only_when_its_head_is_written() {
    let server = Server::start().await;
    // A pipe of 64 bytes: the head needs several turns, and what hyper has not written when it is left is lost.
    let (mut ours, theirs) = tokio::io::duplex(64);
    server.connections.serve(Conn::Pipe(theirs), server.at, &server.endpoint());
    ours.write_all(GET.as_bytes()).await.unwrap();
    let mut text = String::new();
    let mut scrap = [0; 7];
    while !text.ends_with("data: {\"channels\":[{\"channel\":\"a\",\"position\":\"0-") {
        let n = soon(ours.read(&mut scrap)).await.unwrap();
        for byte in &scrap[..n] {
            text.push(*byte as char);
            if text.ends_with("\"0-") {
                break;
            }
        }
        assert!(n > 0, "{text}");
    }
    let (head, body) = text.split_once("\r\n\r\n").unwrap();
    assert!(head.starts_with("HTTP/1.1 200 OK\r\n") && head.contains("\r\ndate: "), "{head}");
    assert!(body.starts_with("0000") && body[6..].starts_with("\r\nretry: "), "{body}");
    drop(ours);
    server.empty().await;
}

#[tokio::test]
async fn a_request_byte_by_byte() {
    let server = Server::start().await;
    let mut client = server.request("").await;
    client.socket.set_nodelay(true).unwrap();
    for byte in GET.as_bytes() {
        client.socket.write_all(&[*byte]).await.unwrap();
        tokio::task::yield_now().await;
    }
    client.opening().await;
    server.publish("a", "1").await;
    assert_eq!(client.next().await.json()["data"], 1);
}

#[tokio::test]
async fn http_1_0_ends_with_the_connection() {
    let server = Server::start().await;
    for connection in ["", "connection: keep-alive\r\n"] {
        let request = format!("GET /v1/sse?channel=a HTTP/1.0\r\nhost: localhost\r\n{connection}\r\n");
        let mut client = server.request(&request).await;
        let head = client.head().await;
        assert!(head.starts_with("http/1.0 200 ") && !head.contains("chunked"), "{head}");
        client.opening().await;
        server.publish("a", "1").await;
        assert_eq!(client.next().await.json()["data"], 1);
    }
    let mut client = server.request("GET /v1/sse?channel=a HTTP/1.0\r\nhost: localhost\r\n\r\n").await;
    client.head().await;
    client.opening().await;
    server.wheel.drain(Duration::from_millis(1));
    assert_eq!(client.next().await.event, "weir.retry");
    assert_eq!(client.block().await, None);
}

#[tokio::test]
async fn head_opens_nothing_and_the_connection_goes_on() {
    let server = Server::start().await;
    let mut client = server.request(&format!("{}{OTHER}", GET.replace("GET", "HEAD"))).await;
    let head = client.head().await;
    assert!(head.starts_with("http/1.1 200 ") && head.contains("text/event-stream"), "{head}");
    let head = client.head().await;
    assert!(client.body(&head).await.contains("channels"));
    assert_eq!(server.open().2, 0);
    assert_eq!(server.metrics.value("weir_connections_accepted_total{transport=\"sse\"}"), 0.0);
}

#[tokio::test]
async fn the_same_resource_by_accept() {
    let server = Server::start().await;
    let request = "GET /v1/events?channel=a HTTP/1.1\r\nhost: localhost\r\norigin: http://localhost:5000\r\n\
                   accept: text/event-stream\r\n\r\n";
    let mut client = server.request(request).await;
    let head = client.head().await;
    assert!(head.contains("\r\nvary: accept"), "{head}");
    assert!(head.contains("\r\naccess-control-allow-origin: http://localhost:5000\r\n"), "{head}");
    client.opening().await;
}

#[tokio::test]
async fn a_client_that_goes_in_any_way() {
    let server = Server::start().await;
    // Half closed: nobody who streams says so and reads on.
    let mut client = server.stream("channel=a").await;
    client.opening().await;
    client.socket.shutdown().await.unwrap();
    client.closed().await;
    server.empty().await;
    // Reset.
    let mut client = server.stream("channel=a").await;
    client.opening().await;
    socket2::SockRef::from(&client.socket).set_linger(Some(Duration::ZERO)).unwrap();
    drop(client);
    server.empty().await;
    // Gone with the request.
    let mut client = server.request(GET).await;
    client.socket.shutdown().await.unwrap();
    client.closed().await;
    server.empty().await;
    // With much to say.
    let mut client = server.stream("channel=a").await;
    client.opening().await;
    let _ = client.socket.write_all(&[b'x'; 20_000]).await;
    client.closed().await;
    server.empty().await;
}

#[tokio::test]
async fn ten_thousand_abrupt_disconnects() {
    let server = Server::start().await;
    let mut n = 0;
    for round in 0..40 {
        let mut clients = Vec::new();
        for _ in 0..250 {
            n += 1;
            let query = if n % 3 == 0 { "channel=a&channel=b" } else { "channel=a" };
            clients.push(server.stream(query).await);
        }
        for (at, client) in clients.iter_mut().enumerate() {
            match (at + round) % 4 {
                0 => {}
                1 => drop(client.head().await),
                2 => drop(client.opening().await),
                _ => socket2::SockRef::from(&client.socket).set_linger(Some(Duration::ZERO)).unwrap(),
            }
            if at % 50 == 0 {
                server.publish("a", "1").await;
            }
        }
    }
    assert_eq!(n, 10_000);
    server.empty().await;
}

#[tokio::test]
async fn a_slow_reader_gets_everything_in_order() {
    let server = Server::start().await;
    let socket = TcpSocket::new_v4().unwrap();
    socket.set_recv_buffer_size(4096).unwrap();
    let mut client = Client::new(socket.connect(server.at).await.unwrap());
    client.socket.write_all(GET.as_bytes()).await.unwrap();
    client.opening().await;
    let text = "x".repeat(20_000);
    for n in 0..400 {
        server.publish("a", &format!(r#"[{n},"{text}"]"#)).await;
    }
    for n in 0..400 {
        let data = &client.next().await.json()["data"];
        assert_eq!((&data[0], data[1].as_str().unwrap().len()), (&json!(n), text.len()));
    }
}

#[tokio::test]
async fn who_does_not_read_at_all_is_closed() {
    let server = Server::with(|config| config.limits.stalled = Duration::from_secs(1)).await;
    let mut client = server.stream("channel=a").await;
    client.opening().await;
    let text = format!(r#""{}""#, "x".repeat(500_000));
    for _ in 0..40 {
        server.publish("a", &text).await;
    }
    server.empty().await;
    let closed = server.metrics.render();
    assert!(closed.contains(r#"weir_connections_closed_total{transport="sse",reason="slow"} 1"#), "{closed}");
}

#[tokio::test]
async fn who_never_finishes_a_head_or_asks_nothing_is_closed() {
    let server = Server::with(|config| {
        config.limits.header_time = Duration::from_secs(1);
        config.limits.idle = Duration::from_secs(1);
    })
    .await;
    let mut clients = Vec::new();
    for begun in ["", "P", "PRI * HTTP/2.0\r\n", "GET /v1/sse?channel=a HTTP/1.1\r\nhost: ", OTHER] {
        clients.push(server.request(begun).await);
    }
    let mut stream = server.stream("channel=a").await;
    stream.opening().await;
    for mut client in clients {
        client.closed().await;
    }
    eventually("the stream alone is open", || server.open() == (1, 1, 1, 1)).await;
}

#[tokio::test]
async fn a_head_too_large_is_refused() {
    let server = Server::start().await;
    let request = format!("GET /v1/sse?channel=a HTTP/1.1\r\nhost: localhost\r\nx: {}\r\n\r\n", "x".repeat(20_000));
    let mut client = server.request(&request).await;
    assert!(client.head().await.starts_with("http/1.1 431 "));
}

#[tokio::test]
async fn draining_closes_what_is_idle_and_waits_for_the_rest() {
    let server = Server::with(|config| config.drain.window = Duration::from_secs(1)).await;
    let mut idle = server.request(OTHER).await;
    let head = idle.head().await;
    idle.body(&head).await;
    let mut streams = Vec::new();
    for _ in 0..50 {
        streams.push(server.stream("channel=a&channel=b").await);
    }
    for client in &mut streams {
        client.opening().await;
    }
    server.stop.cancel();
    let start = Instant::now();
    eventually("the app has ended", || server.running.is_finished()).await;
    assert!(start.elapsed() < Duration::from_secs(5));
    for client in &mut streams {
        assert_eq!(client.next().await.event, "weir.retry");
        assert_eq!(client.block().await, None);
        assert!(client.ended);
    }
    idle.closed().await;
    assert!(TcpStream::connect(server.at).await.is_err(), "the listener is closed");
}

// === HTTP/2 ===

#[tokio::test]
async fn http_2_by_prior_knowledge() {
    let server = Server::start().await;
    let mut sender = h2(&server).await;
    let mut bodies = Vec::new();
    for _ in 0..100 {
        let response = get(&server, &mut sender, "/v1/sse?channel=a").await;
        assert_eq!((response.status().as_u16(), response.version()), (200, http::Version::HTTP_2));
        bodies.push(response.into_body());
    }
    assert_eq!((server.open().0, server.open().2), (1, 100));
    let at = server.publish("a", "1").await;
    for body in &mut bodies {
        let mut text = Vec::new();
        while !text.ends_with(b"\"data\":1}\n\n") {
            text.extend_from_slice(&soon(body.frame()).await.unwrap().unwrap().into_data().unwrap());
        }
        let text = String::from_utf8(text).unwrap();
        assert!(text.starts_with("retry: ") && text.contains(&format!("\n\nid: {at}\ndata: {{")), "{text}");
    }
    drop(bodies);
    eventually("the streams are gone", || server.open().2 == 0).await;
    drop(sender);
    server.empty().await;
}

#[tokio::test]
async fn http_2_is_idle_without_streams_and_drains_with_them() {
    let server = Server::with(|config| {
        config.limits.idle = Duration::from_secs(1);
        config.drain.window = Duration::from_secs(1);
    })
    .await;
    let mut idle = h2(&server).await;
    let mut busy = h2(&server).await;
    assert_eq!(get(&server, &mut idle, "/v1/channels").await.status(), 200);
    let mut stream = get(&server, &mut busy, "/v1/sse?channel=a").await.into_body();
    soon(stream.frame()).await.unwrap().unwrap();
    eventually("the idle connection is closed", || idle.is_closed()).await;
    assert!(!busy.is_closed());
    server.stop.cancel();
    let mut text = Vec::new();
    while let Some(frame) = soon(stream.frame()).await {
        text.extend_from_slice(&frame.unwrap().into_data().unwrap());
    }
    let text = String::from_utf8(text).unwrap();
    assert!(text.starts_with("event: weir.retry\ndata: {\"code\":\"draining\",") && text.ends_with("}\n\n"), "{text}");
    eventually("the app has ended", || server.running.is_finished()).await;
}

type Sender = hyper::client::conn::http2::SendRequest<Empty<Bytes>>;

async fn h2(server: &Server) -> Sender {
    let socket = TokioIo::new(TcpStream::connect(server.at).await.unwrap());
    let (sender, connection) = hyper::client::conn::http2::handshake(TokioExecutor::new(), socket).await.unwrap();
    tokio::spawn(connection);
    sender
}

async fn get(server: &Server, sender: &mut Sender, path: &str) -> http::Response<hyper::body::Incoming> {
    let uri = format!("http://localhost:{}{path}", server.at.port());
    soon(sender.send_request(http::Request::get(uri).body(Empty::new()).unwrap())).await.unwrap()
}
