//! Connections of streams: their start, several requests on one connection, and every way to end.

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

use crate::support::{Client, EventStream, Process, Weir, eventually, in_time, weir};

const GET: &str = "GET /v1/sse?channel=a HTTP/1.1\r\nhost: localhost\r\n\r\n";
const OTHER: &str = "GET /v1/channels HTTP/1.1\r\nhost: localhost\r\n\r\n";

#[tokio::test]
async fn connections_over_the_limit_are_rejected_except_for_health_and_metrics() {
    let weir = weir().with(|config| config.limits.connections = 2).await;
    let mut streams = vec![weir.sse("channel=a").await, weir.sse("channel=a").await];
    for client in &mut streams {
        client.opening().await;
    }
    let mut client = weir.sse("channel=a").await;
    let retry = client.next().await;
    assert_eq!((retry.event.as_str(), &retry.json()["code"]), ("weir.retry", &json!("overloaded")));
    client.closed().await;
    let mut client = weir.write(OTHER).await;
    let refused = client.head().await.expect(503);
    assert!(refused.header("retry-after").is_some(), "{refused:?}");
    client.closed().await;
    // Health checks must not report a full node as dead.
    for path in ["/health/live", "/health/ready", "/metrics"] {
        assert_eq!(weir.get(path).await.status, 200, "{path}");
    }
    drop(streams);
    weir.idle().await;
    weir.sse("channel=a").await.opening().await;
}

#[tokio::test]
async fn pipelined_requests_are_served_before_a_stream() {
    let weir = weir().await;
    let mut client = weir.write(format!("{OTHER}{OTHER}{GET}{OTHER}")).await;
    for _ in 0..2 {
        assert!(client.response().await.text().contains("channels"));
    }
    let mut client = EventStream::new(client);
    client.opening().await;
    weir.append("a", "1").await;
    assert_eq!(client.next().await.json()["data"], 1);
    drop(client);
    weir.idle().await;
}

#[tokio::test]
async fn a_connection_is_hijacked_only_after_its_head_is_written() {
    let weir = weir().await;
    // The head needs several writes to a pipe of 64 bytes. A hijack before the last one would lose the rest.
    let (mut ours, theirs) = tokio::io::duplex(64);
    weir.connections().serve(Conn::Pipe(theirs), weir.address, weir.endpoint());
    ours.write_all(GET.as_bytes()).await.unwrap();
    let mut text = String::new();
    let mut scrap = [0; 7];
    while !text.ends_with("data: {\"channels\":[{\"channel\":\"a\",\"position\":\"0-") {
        let n = in_time(ours.read(&mut scrap)).await.unwrap();
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
    weir.idle().await;
}

#[tokio::test]
async fn a_request_is_accepted_byte_by_byte() {
    let weir = weir().await;
    let mut client = weir.client().await;
    client.socket.set_nodelay(true).unwrap();
    for byte in GET.as_bytes() {
        client.write([*byte]).await;
        tokio::task::yield_now().await;
    }
    let mut client = EventStream::new(client);
    client.opening().await;
    weir.append("a", "1").await;
    assert_eq!(client.next().await.json()["data"], 1);
}

#[tokio::test]
async fn http_1_0_ends_with_the_connection() {
    let weir = weir().await;
    for connection in ["", "connection: keep-alive\r\n"] {
        let request = format!("GET /v1/sse?channel=a HTTP/1.0\r\nhost: localhost\r\n{connection}\r\n");
        let mut client = EventStream::request(weir.address, &request).await;
        let head = client.head().await.expect(200);
        assert_eq!((head.version.as_str(), head.header("transfer-encoding")), ("HTTP/1.0", None));
        client.opening().await;
        weir.append("a", "1").await;
        assert_eq!(client.next().await.json()["data"], 1);
    }
    let request = GET.replace("HTTP/1.1", "HTTP/1.0");
    let mut client = EventStream::request(weir.address, &request).await;
    client.head().await;
    client.opening().await;
    weir.timers().drain(Duration::from_millis(1));
    assert_eq!(client.next().await.event, "weir.retry");
    assert_eq!(client.block().await, None);
}

#[tokio::test]
async fn head_opens_no_stream_and_keeps_the_connection() {
    let weir = weir().await;
    let mut client = weir.write(format!("{}{OTHER}", GET.replace("GET", "HEAD"))).await;
    assert_eq!(client.head().await.expect(200).header("content-type"), Some("text/event-stream"));
    assert!(client.response().await.text().contains("channels"));
    assert_eq!(weir.open_counts().2, 0);
    assert_eq!(weir.metric("weir_connections_accepted_total{transport=\"sse\"}"), 0);
}

#[tokio::test]
async fn accept_selects_the_stream_representation_of_events() {
    let weir = weir().await;
    let request = "GET /v1/events?channel=a HTTP/1.1\r\nhost: localhost\r\norigin: http://localhost:5000\r\n\
                   accept: text/event-stream\r\n\r\n";
    let mut client = EventStream::request(weir.address, request).await;
    let head = client.head().await;
    assert!(head.headers.iter().any(|(name, value)| name == "vary" && value.starts_with("Accept")), "{head:?}");
    assert_eq!(head.header("access-control-allow-origin"), Some("http://localhost:5000"));
    client.opening().await;
}

#[tokio::test]
async fn every_kind_of_disconnect_is_noticed() {
    let weir = weir().await;
    // Half closed: a client that closes its write side has gone.
    let mut client = weir.sse("channel=a").await;
    client.opening().await;
    client.client.socket.shutdown().await.unwrap();
    client.closed().await;
    weir.idle().await;
    // Reset.
    let mut client = weir.sse("channel=a").await;
    client.opening().await;
    socket2::SockRef::from(&client.client.socket).set_linger(Some(Duration::ZERO)).unwrap();
    drop(client);
    weir.idle().await;
    // Closed together with the request.
    let mut client = weir.write(GET).await;
    client.socket.shutdown().await.unwrap();
    client.closed().await;
    weir.idle().await;
    // Closed after the client has sent much data.
    let mut client = weir.sse("channel=a").await;
    client.opening().await;
    let _ = client.client.socket.write_all(&[b'x'; 20_000]).await;
    client.closed().await;
    weir.idle().await;
}

#[tokio::test]
async fn ten_thousand_abrupt_disconnects_of_streams_leave_nothing() {
    let weir = weir().await;
    let mut n = 0;
    for round in 0..40 {
        let mut clients = Vec::new();
        for _ in 0..250 {
            n += 1;
            let query = if n % 3 == 0 { "channel=a&channel=b" } else { "channel=a" };
            clients.push(weir.sse(query).await);
        }
        for (at, client) in clients.iter_mut().enumerate() {
            match (at + round) % 4 {
                0 => {}
                1 => drop(client.head().await),
                2 => drop(client.opening().await),
                _ => socket2::SockRef::from(&client.client.socket).set_linger(Some(Duration::ZERO)).unwrap(),
            }
            if at % 50 == 0 {
                weir.append("a", "1").await;
            }
        }
    }
    assert_eq!(n, 10_000);
    weir.idle().await;
}

#[tokio::test]
async fn a_slow_reader_receives_every_event_in_order() {
    let weir = weir().await;
    let socket = TcpSocket::new_v4().unwrap();
    socket.set_recv_buffer_size(4096).unwrap();
    let mut client = Client::new(socket.connect(weir.address).await.unwrap());
    client.write(GET).await;
    let mut client = EventStream::new(client);
    client.opening().await;
    let text = "x".repeat(20_000);
    for n in 0..400 {
        weir.append("a", &format!(r#"[{n},"{text}"]"#)).await;
    }
    for n in 0..400 {
        let data = &client.next().await.json()["data"];
        assert_eq!((&data[0], data[1].as_str().unwrap().len()), (&json!(n), text.len()));
    }
}

#[tokio::test]
async fn a_slow_reader_is_closed_after_the_stall_timeout() {
    let weir = weir().with(|config| config.limits.stalled = Duration::from_secs(1)).await;
    let mut client = weir.sse("channel=a").await;
    client.opening().await;
    let text = format!(r#""{}""#, "x".repeat(500_000));
    for _ in 0..40 {
        weir.append("a", &text).await;
    }
    weir.idle().await;
    assert_eq!(weir.metric(r#"weir_connections_closed_total{transport="sse",reason="slow"}"#), 1);
}

#[tokio::test]
async fn incomplete_requests_and_idle_connections_are_closed() {
    let weir = weir()
        .with(|config| {
            config.limits.header_time = Duration::from_secs(1);
            config.limits.idle = Duration::from_secs(1);
        })
        .await;
    let mut clients = Vec::new();
    for begun in ["", "P", "PRI * HTTP/2.0\r\n", "GET /v1/sse?channel=a HTTP/1.1\r\nhost: ", OTHER] {
        clients.push(weir.write(begun).await);
    }
    let mut stream = weir.sse("channel=a").await;
    stream.opening().await;
    for mut client in clients {
        client.closed().await;
    }
    eventually("the stream alone is open", async || weir.open_counts() == (1, 1, 1, 1)).await;
}

#[tokio::test]
async fn a_request_head_over_the_limit_is_rejected() {
    let weir = weir().await;
    let request = format!("GET /v1/sse?channel=a HTTP/1.1\r\nhost: localhost\r\nx: {}\r\n\r\n", "x".repeat(20_000));
    weir.write(request).await.head().await.expect(431);
}

#[tokio::test]
async fn heads_that_cannot_be_read_are_answered_with_problem_documents() {
    let weir = weir().with(|config| config.limits.header_time = Duration::from_secs(1)).await;
    let origin = "host: localhost\r\norigin: http://localhost:3000";
    let long = "x".repeat(20_000);
    for (request, status, code) in [
        (format!("GET /v1/sse?channel={long} HTTP/1.1\r\n{origin}\r\n\r\n"), 431, "too_large"),
        (format!("GET /v1/sse HTTP/1.1\r\n{origin}\r\nx: {long}\r\n\r\n"), 431, "too_large"),
        (format!("GET /v1/sse HTTP/1.1\r\n{origin}\r\nno colon\r\n\r\n"), 400, "invalid_request"),
        (format!("GET /v1/sse HTTP/3.0\r\n{origin}\r\n\r\n"), 400, "invalid_request"),
        (format!("POST /v1/events HTTP/1.1\r\n{origin}\r\ncontent-length: x\r\n\r\n"), 400, "invalid_request"),
        (
            format!(
                "POST /v1/rpc HTTP/1.1\r\n{origin}\r\ncontent-type: application/json\r\ntransfer-encoding: chunked\r\n\r\nx\r\n"
            ),
            400,
            "invalid_request",
        ),
        (format!("GET /v1/sse HTTP/1.1\r\n{origin}\r\nunfinished"), 408, "timeout"),
    ] {
        let mut client = weir.write(&request).await;
        let response = client.response().await;
        assert_eq!(response.status, status, "{request:.60}");
        assert_eq!(response.header("content-type"), Some("application/problem+json"), "{request:.60}");
        let problem = response.json();
        assert_eq!((&problem["status"], &problem["code"]), (&json!(status), &json!(code)), "{request:.60}");
        let page = response.header("access-control-allow-origin");
        // A browser sends no such length; by then hyper has dropped the head.
        let read = !request.contains("content-length: x");
        assert_eq!(page, read.then_some("http://localhost:3000"), "{request:.60}");
        client.closed().await;
    }
    // A response before it is complete.
    let mut client = weir.write(format!("{OTHER}GET / HTTP/1.1\r\nno colon\r\n\r\n")).await;
    assert!(client.response().await.text().contains("channels"));
    assert_eq!(client.response().await.json()["code"], "invalid_request");
    client.closed().await;
    weir.idle().await;
}

#[tokio::test]
async fn a_client_that_sends_everything_before_it_reads_gets_an_early_answer() {
    let weir = weir().await;
    for path in ["/v1/events?channel=a", "/v1/rpc", "/v1/services/weir/echo", "/nowhere"] {
        let head = format!("POST {path} HTTP/1.1\r\nhost: localhost\r\ncontent-length: 20000000\r\n\r\n");
        let mut client = weir.write(head).await;
        client.write(vec![b'x'; 20_000_000]).await;
        let response = client.response().await;
        assert_eq!(response.status, if path == "/nowhere" { 404 } else { 413 }, "{path}");
        client.closed().await;
    }
    let mut client = weir.write(format!("GET / HTTP/1.1\r\n{}\r\n\r\n", "x".repeat(1_000_000))).await;
    assert_eq!(client.response().await.status, 431);
    drop(client);
    weir.idle().await;
}

#[tokio::test]
async fn a_socket_that_sends_a_message_over_the_limit_can_read_why_it_is_closed() {
    let weir = weir().await;
    let mut tcp = weir.socket().await.tcp();
    let mut frame = vec![0x82, 0x80 | 127];
    frame.extend_from_slice(&20_000_000_u64.to_be_bytes());
    frame.resize(14 + 20_000_000, 0);
    in_time(tcp.write_all(&frame)).await.unwrap();
    let mut end = Vec::new();
    in_time(tcp.read_to_end(&mut end)).await.unwrap();
    assert_eq!(end, [&[0x88, 11, 0x03, 0xf1][..], b"too_large"].concat());
    drop(tcp);
    weir.idle().await;
}

// === descriptors ===

#[tokio::test]
async fn a_node_with_few_descriptors_lowers_its_limit_and_goes_on_answering_probes() {
    let weir = Process::start_with_files(160);
    assert!(weir.log().contains("limits.connections is lowered"), "{}", weir.log());
    let mut clients = Vec::new();
    for _ in 0..200 {
        let mut client = Client::connect(weir.address).await;
        client.write(GET).await;
        clients.push(client);
    }
    // Connections that ask for nothing do not keep probes out.
    for _ in 0..40 {
        clients.push(Client::connect(weir.address).await);
    }
    eventually("a probe is answered", async || {
        let mut probe = TcpStream::connect(weir.address).await.unwrap();
        let _ = probe.write_all(b"GET /metrics HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n").await;
        let mut metrics = Vec::new();
        let _ = in_time(probe.read_to_end(&mut metrics)).await;
        String::from_utf8_lossy(&metrics).contains("process_max_fds 160")
    })
    .await;
    // The limit is lowered below what is open: only the reserve is left.
    weir.limit_files(16);
    for _ in 0..3 {
        assert_eq!(Client::connect(weir.address).await.get("/health/live").await.status, 200);
    }
    assert_eq!(Client::connect(weir.address).await.get("/v1/channels").await.status, 503);
    assert!(weir.log().matches("cannot accept connections").count() == 1, "{}", weir.log());
    drop(clients);
}

#[tokio::test]
async fn draining_closes_idle_connections_and_waits_for_streams() {
    let weir = weir().with(|config| config.drain.window = Duration::from_secs(1)).await;
    let mut idle = weir.write(OTHER).await;
    idle.response().await;
    let mut streams = Vec::new();
    for _ in 0..50 {
        streams.push(weir.sse("channel=a&channel=b").await);
    }
    for client in &mut streams {
        client.opening().await;
    }
    weir.shut_down();
    let start = Instant::now();
    eventually("the node has stopped", async || weir.has_stopped()).await;
    assert!(start.elapsed() < Duration::from_secs(5));
    for client in &mut streams {
        assert_eq!(client.next().await.event, "weir.retry");
        assert_eq!(client.block().await, None);
        assert!(client.ended);
    }
    idle.closed().await;
    assert!(TcpStream::connect(weir.address).await.is_err(), "the listener is closed");
}

// === HTTP/2 ===

#[tokio::test]
async fn http_2_streams_share_a_connection() {
    let weir = weir().await;
    let mut sender = h2(&weir).await;
    let mut bodies = Vec::new();
    for _ in 0..100 {
        let response = get(&weir, &mut sender, "/v1/sse?channel=a").await;
        assert_eq!((response.status().as_u16(), response.version()), (200, http::Version::HTTP_2));
        bodies.push(response.into_body());
    }
    assert_eq!((weir.open_counts().0, weir.open_counts().2), (1, 100));
    let at = weir.append("a", "1").await;
    for body in &mut bodies {
        let mut text = Vec::new();
        while !text.ends_with(b"\"data\":1}\n\n") {
            text.extend_from_slice(&in_time(body.frame()).await.unwrap().unwrap().into_data().unwrap());
        }
        let text = String::from_utf8(text).unwrap();
        assert!(text.starts_with("retry: ") && text.contains(&format!("\n\nid: {at}\ndata: {{")), "{text}");
    }
    drop(bodies);
    eventually("the streams are gone", async || weir.open_counts().2 == 0).await;
    drop(sender);
    weir.idle().await;
}

#[tokio::test]
async fn http_2_connections_without_streams_are_closed_as_idle() {
    let weir = weir()
        .with(|config| {
            config.limits.idle = Duration::from_secs(1);
            config.drain.window = Duration::from_secs(1);
        })
        .await;
    let mut idle = h2(&weir).await;
    let mut busy = h2(&weir).await;
    assert_eq!(get(&weir, &mut idle, "/v1/channels").await.status(), 200);
    let mut stream = get(&weir, &mut busy, "/v1/sse?channel=a").await.into_body();
    in_time(stream.frame()).await.unwrap().unwrap();
    eventually("the idle connection is closed", async || idle.is_closed()).await;
    assert!(!busy.is_closed());
    weir.shut_down();
    let mut text = Vec::new();
    while let Some(frame) = in_time(stream.frame()).await {
        text.extend_from_slice(&frame.unwrap().into_data().unwrap());
    }
    let text = String::from_utf8(text).unwrap();
    assert!(text.starts_with("event: weir.retry\ndata: {\"code\":\"draining\",") && text.ends_with("}\n\n"), "{text}");
    eventually("the node has stopped", async || weir.has_stopped()).await;
}

type Sender = hyper::client::conn::http2::SendRequest<Empty<Bytes>>;

async fn h2(weir: &Weir) -> Sender {
    let socket = TokioIo::new(TcpStream::connect(weir.address).await.unwrap());
    let (sender, connection) = hyper::client::conn::http2::handshake(TokioExecutor::new(), socket).await.unwrap();
    tokio::spawn(connection);
    sender
}

async fn get(weir: &Weir, sender: &mut Sender, path: &str) -> http::Response<hyper::body::Incoming> {
    let uri = format!("http://localhost:{}{path}", weir.address.port());
    in_time(sender.send_request(http::Request::get(uri).body(Empty::new()).unwrap())).await.unwrap()
}
