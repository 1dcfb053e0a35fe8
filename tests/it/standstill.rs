//! A process that stood still, as under `docker pause` or in a frozen virtual machine: none of its peers is to blame.

use std::time::Duration;

use rustix::process::Signal;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
};

use crate::support::{Client, Process, Socket, in_time};

/// Longer than all timeouts that the tests set.
const PAUSE: Duration = Duration::from_secs(4);

fn pause(weir: &Process) -> Paused<'_> {
    weir.signal(Signal::STOP);
    Paused(weir)
}

/// Continues the process when it is dropped.
struct Paused<'a>(&'a Process);

impl Drop for Paused<'_> {
    fn drop(&mut self) {
        self.0.signal(Signal::CONT);
    }
}

/// Answers pings until so many were received.
async fn answer_pings(socket: &mut TcpStream, count: usize) {
    for _ in 0..count {
        let mut head = [0; 2];
        in_time(socket.read_exact(&mut head)).await.unwrap();
        assert_eq!(head, [0x89, 0], "not a ping");
        socket.write_all(&[0x8a, 0x80, 0, 0, 0, 0]).await.unwrap();
    }
}

#[tokio::test]
async fn sockets_that_answer_pings_stay_open() {
    let weir = Process::start(&[("WEIR__WS__PING", "1s")]);
    let mut sockets = Vec::new();
    for _ in 0..20 {
        sockets.push(Socket::open(weir.address).await.tcp());
    }
    for socket in &mut sockets {
        answer_pings(socket, 1).await;
    }
    let paused = pause(&weir);
    tokio::time::sleep(PAUSE).await;
    drop(paused);
    // Twice, so that the answers to the pings before and after the pause have been judged.
    for _ in 0..2 {
        for socket in &mut sockets {
            answer_pings(socket, 1).await;
        }
    }
    let metrics = Client::connect(weir.address).await.get("/metrics").await;
    let dead = metrics.text().lines().filter(|line| line.contains("dead_peer")).map(str::to_owned);
    assert_eq!(dead.filter(|line| !line.ends_with(" 0")).collect::<Vec<_>>(), [""; 0]);
    assert!(weir.log().contains("stood still"));
}

#[tokio::test]
async fn what_arrived_during_the_pause_is_read_before_time_is_judged() {
    let weir = Process::start(&[("WEIR__LIMITS__HEADER_TIME", "2s"), ("WEIR__LIMITS__BODY_TIME", "2s")]);
    let mut head = Client::connect(weir.address).await;
    head.write("GET /health/live HTTP/1.1\r\nhost: local").await;
    let mut body = Client::connect(weir.address).await;
    body.write("POST /v1/events?channel=a HTTP/1.1\r\nhost: localhost\r\ncontent-length: 4\r\n\r\n1").await;
    let paused = pause(&weir);
    tokio::time::sleep(PAUSE).await;
    head.write("host\r\n\r\n").await;
    body.write("234").await;
    drop(paused);
    assert_eq!(head.response().await.status, 200);
    assert_eq!(body.response().await.status, 201);
}

#[tokio::test]
async fn a_reply_that_arrived_during_the_pause_answers_its_call() {
    let weir = Process::start(&[]);
    let mut provider = Socket::open(weir.address).await;
    provider.provide("s").await;
    let mut caller = Socket::open(weir.address).await;
    let call = r#"{"jsonrpc":"2.0","id":1,"method":"weir.call","params":{"service":"s","method":"m","timeout":"3s"}}"#;
    caller.send(call).await;
    let request = provider.next_request().await;
    let paused = pause(&weir);
    tokio::time::sleep(PAUSE).await;
    provider.reply(&request, true.into()).await;
    drop(paused);
    assert_eq!(caller.next().await["result"], true);
}

#[tokio::test]
async fn clients_of_socket_io_that_answer_pings_stay_connected() {
    let weir = Process::start(&[
        ("WEIR__COMPAT__ENABLE", "microstream"),
        ("WEIR__COMPAT__MICROSTREAM__PING", "1s"),
        ("WEIR__COMPAT__MICROSTREAM__PING_TIMEOUT", "1s"),
    ]);
    let mut clients = Vec::new();
    for n in 0..10 {
        let path = format!("/socket.io/?EIO=4&transport=websocket&serviceName=s{n}");
        let mut client = Socket::open_at(weir.address, &path).await;
        assert!(client.text().await.starts_with("0{"));
        client.send("40").await;
        assert!(client.text().await.starts_with("40{"));
        clients.push(client);
    }
    let paused = pause(&weir);
    tokio::time::sleep(PAUSE).await;
    drop(paused);
    for _ in 0..2 {
        for client in &mut clients {
            assert_eq!(client.text().await, "2");
            client.send("3").await;
        }
    }
}
