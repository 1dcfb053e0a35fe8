//! A Redis that cannot be reached, in each way in which that happens: every request gets its answer all the same, from
//! the first moment of a node on.

use std::{net::Ipv4Addr, time::Duration};

use serde_json::json;
use tokio::{
    io::AsyncReadExt as _,
    net::{TcpListener, TcpSocket, TcpStream},
    time::timeout,
};

use crate::support::{MINUTE, RedisCluster, RedisServer, Response, Weir, eventually_within, redis::free_port, weir_on};

/// Several times the two seconds of the documentation, for a busy machine; and less than requests take that wait for
/// each other.
const ANSWER: Duration = Duration::from_secs(10);

/// Something that takes the place of Redis.
enum Absent {
    /// Nothing listens.
    Refused,
    /// Connections are accepted, and nothing is ever said.
    Silent,
    /// SYN packets get no reply.
    Dropped,
    /// It loads its data, for ever.
    Loading,
    /// It is suspended.
    Stopped,
}

/// The URL, and what has to stay alive.
async fn absent(how: &Absent) -> (String, Box<dyn Send>) {
    match how {
        Absent::Refused => (format!("redis://127.0.0.1:{}", free_port()), Box::new(())),
        Absent::Silent => {
            let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
            let url = format!("redis://{}", listener.local_addr().unwrap());
            let accept = tokio::spawn(async move {
                let mut accepted = Vec::new();
                while let Ok((socket, _)) = listener.accept().await {
                    accepted.push(socket);
                }
            });
            (url, Box::new(accept))
        }
        Absent::Dropped => {
            // A full backlog: the kernel drops what else comes.
            let socket = TcpSocket::new_v4().unwrap();
            socket.bind((Ipv4Addr::LOCALHOST, 0).into()).unwrap();
            let listener = socket.listen(0).unwrap();
            let address = listener.local_addr().unwrap();
            let mut fill = Vec::new();
            while let Ok(Ok(stream)) = timeout(Duration::from_millis(200), TcpStream::connect(address)).await {
                fill.push(stream);
            }
            (format!("redis://{address}"), Box::new((listener, fill)))
        }
        Absent::Loading => {
            let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
            let url = format!("redis://{}", listener.local_addr().unwrap());
            let accept = tokio::spawn(async move {
                while let Ok((mut socket, _)) = listener.accept().await {
                    tokio::spawn(async move {
                        let mut request = [0; 4096];
                        while let Ok(1..) = socket.read(&mut request).await {
                            let error = b"-LOADING Redis is loading the dataset in memory\r\n";
                            if tokio::io::AsyncWriteExt::write_all(&mut socket, error).await.is_err() {
                                return;
                            }
                        }
                    });
                }
            });
            (url, Box::new(accept))
        }
        Absent::Stopped => {
            let redis = RedisServer::start(&[]).await;
            redis.pause();
            (redis.url(), Box::new(redis))
        }
    }
}

async fn answer(node: &Weir, method: &'static str, path: &str, body: &'static str) -> Response {
    let answer = node.request(method, path).body(body).into_future();
    timeout(ANSWER, answer).await.unwrap_or_else(|_| panic!("{method} {path} is not answered"))
}

/// All at once: none waits for another.
async fn everything_is_answered(node: &Weir) {
    let requests = [
        ("POST", "/v1/events?channel=a", "1"),
        ("POST", "/v1/events?channel=b&key=k", "1"),
        ("GET", "/v1/events?channel=a", ""),
        ("GET", "/v1/events?channel=a&wait=30s", ""),
        ("GET", "/v1/events?channel=a&consumer=m", ""),
        ("DELETE", "/v1/events?channel=a", ""),
        ("GET", "/v1/consumers", ""),
        ("GET", "/v1/consumers/m", ""),
        ("POST", "/v1/consumers/m/commit", r#"{"after":"k3Vq7a-1"}"#),
        ("DELETE", "/v1/consumers/m", ""),
        ("GET", "/v1/channels", ""),
        ("GET", "/v1/presence?channel=a", ""),
        ("GET", "/v1/connections", ""),
        ("GET", "/v1/services", ""),
        ("GET", "/health/ready", ""),
    ];
    let many = (0..5).flat_map(|_| requests);
    let answers = many.map(|(method, path, body)| async move { (path, answer(node, method, path, body).await) });
    for (path, response) in futures_util::future::join_all(answers).await {
        assert!(matches!(response.status, 200 | 503 | 504), "{path}: {} {}", response.status, response.text());
    }
    let mut socket = node.socket().await;
    let provide = |id| json!({ "jsonrpc": "2.0", "id": id, "method": "weir.provide", "params": { "service": "s" } });
    for id in 1..=3 {
        socket.send_json(provide(id)).await;
    }
    for _ in 1..=3 {
        let answer = timeout(ANSWER, socket.next()).await.expect("registrations do not wait for each other");
        assert_eq!(answer["error"]["data"]["code"], "bus_unavailable", "{answer}");
    }
    // A stream says that it lives, and then when to come back.
    let mut stream = node.client().await;
    stream.send("GET", "/v1/sse?channel=a", &[("accept", "text/event-stream")], b"").await;
    let head = timeout(ANSWER, stream.head()).await.expect("a stream begins at once");
    assert_eq!(head.status, 200);
    assert_eq!(stream.chunk().await.unwrap(), ":\n", "before the bus has replied");
    let retry = timeout(ANSWER, stream.chunk()).await.expect("a stream is told when to come back").unwrap();
    let retry = std::str::from_utf8(&retry).unwrap().to_owned();
    assert!(retry.starts_with("retry: ") && retry.contains("weir.retry"), "{retry}");
}

async fn a_node_answers_without(how: Absent) {
    let (url, _absent) = absent(&how).await;
    let node = timeout(ANSWER, weir_on(&url).into_future()).await.expect("a start does not wait for Redis");
    everything_is_answered(&node).await;
    everything_is_answered(&node).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_node_answers_while_connections_to_redis_are_refused() {
    a_node_answers_without(Absent::Refused).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_node_answers_while_redis_accepts_connections_and_is_silent() {
    a_node_answers_without(Absent::Silent).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_node_answers_while_packets_to_redis_are_dropped() {
    a_node_answers_without(Absent::Dropped).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_node_answers_while_redis_is_loading() {
    a_node_answers_without(Absent::Loading).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_node_answers_while_redis_is_stopped() {
    a_node_answers_without(Absent::Stopped).await;
}

/// Redis stops under a node that works.
#[tokio::test(flavor = "multi_thread")]
async fn a_running_node_answers_while_redis_is_stopped() {
    let redis = RedisServer::start(&[]).await;
    let node = weir_on(&redis.url()).await;
    node.publish("a", "1").await;
    redis.pause();
    everything_is_answered(&node).await;
    redis.resume();
    eventually_within(MINUTE, "publishes are accepted", async || {
        node.post("/v1/events?channel=a", "2").await.status == 201
    })
    .await;
}

/// What is on the servers that work is read, whatever else is on the others.
#[tokio::test(flavor = "multi_thread")]
async fn a_node_that_starts_with_a_part_of_a_cluster_reads_that_part() {
    let mut cluster = RedisCluster::start(3, 0).await;
    let url = cluster.url();
    // The retention rules of all nodes are on one server.
    let rules = cluster.owner(cluster.slot("weir:{keep}").await).await;
    let mut names = (0..).map(|n| format!("c{n}"));
    let name = loop {
        let name = names.next().unwrap();
        if cluster.owner(cluster.slot(&format!("weir:{{{name}}}:m")).await).await != rules {
            break name;
        }
    };
    weir_on(&url).await.publish(&name, "1").await;
    cluster.servers[rules].kill();
    let node = weir_on(&url).await;
    let path = format!("/v1/events?channel={name}");
    eventually_within(MINUTE, "the channel is read", async || answer(&node, "GET", &path, "").await.status == 200)
        .await;
    assert_eq!(answer(&node, "GET", &path, "").await.json()["events"][0]["data"], 1);
}
