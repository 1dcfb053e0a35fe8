//! `weir doctor` with faulty proxies and badly configured Redis servers.

use std::sync::Arc;

use serde_json::Value;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{TcpListener, TcpStream, tcp},
    time::{Duration, timeout},
};

use crate::support::{
    MINUTE, RedisCluster, RedisSentinel, RedisServer,
    command::{Finished, finish, weir_command},
    eventually_within, weir,
};

/// Runs the command.
async fn doctor(args: &[&str]) -> Finished {
    let mut command = weir_command();
    command.arg("doctor").args(args);
    finish(command).await
}

trait Findings {
    /// The worst finding of a check.
    fn of(&self, check: &str) -> &Value;

    /// Asserts the state of a check and what its finding says.
    fn is(&self, check: &str, state: &str, text: &str);
}

impl Findings for Finished {
    #[track_caller]
    fn of(&self, check: &str) -> &Value {
        let rank = |finding: &&Value| ["ok", "advice", "problem"].iter().position(|state| finding["state"] == *state);
        let found = self.lines.iter().filter(|finding| finding["check"] == check).max_by_key(rank);
        found.unwrap_or_else(|| panic!("no finding of {check}:\n{}", self.notes))
    }

    #[track_caller]
    fn is(&self, check: &str, state: &str, text: &str) {
        let finding = self.of(check);
        let found = finding["found"].as_str().unwrap();
        assert!(finding["state"] == state && found.contains(text), "{check}: {finding}");
        assert_eq!(finding.get("change").is_some(), state != "ok", "{finding}");
        assert!(self.notes.contains(found), "{}", self.notes);
    }
}

// === a node and the proxy before it ===

/// The fault of a proxy.
#[derive(Clone, Copy, PartialEq)]
enum Fault {
    /// Holds event streams back until a buffer is full.
    Buffers,
    /// Closes connections after a second without data.
    Idle,
    /// Drops the Upgrade header and rejects large bodies.
    OldFashioned,
}

/// A faulty proxy before `upstream`. Returns its URL.
async fn faulty_proxy(upstream: std::net::SocketAddr, fault: Fault) -> String {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    tokio::spawn(async move {
        while let Ok((client, _)) = listener.accept().await {
            tokio::spawn(async move {
                let node = TcpStream::connect(upstream).await.unwrap();
                let (from_client, to_client) = client.into_split();
                let (from_node, to_node) = node.into_split();
                let to_client = Arc::new(tokio::sync::Mutex::new(to_client));
                // Either end closes both.
                tokio::select! {
                    () = requests(from_client, to_node, to_client.clone(), fault) => {}
                    () = responses(from_node, to_client, fault) => {}
                }
            });
        }
    });
    url
}

type ClientWriter = Arc<tokio::sync::Mutex<tcp::OwnedWriteHalf>>;

async fn requests(mut from: tcp::OwnedReadHalf, mut to: tcp::OwnedWriteHalf, back: ClientWriter, fault: Fault) {
    let mut buf = vec![0; 64 << 10];
    while let Ok(n @ 1..) = from.read(&mut buf).await {
        let mut bytes = buf[..n].to_vec();
        if fault == Fault::OldFashioned {
            let text = String::from_utf8_lossy(&bytes).to_lowercase();
            if let Some((_, length)) = text.split_once("content-length: ")
                && length.split("\r\n").next().unwrap().parse::<usize>().unwrap() > 1 << 20
            {
                let answer = "HTTP/1.1 413 Request Entity Too Large\r\nContent-Length: 12\r\nConnection: close\r\n\r\n<h1>413</h1>";
                back.lock().await.write_all(answer.as_bytes()).await.unwrap();
                // The rest is read, so that a reset does not discard the response.
                while let Ok(1..) = from.read(&mut buf).await {}
                return;
            }
            if let Some(at) = text.find("\r\nupgrade:") {
                bytes[at + 2] = b'x';
            }
        }
        if to.write_all(&bytes).await.is_err() {
            return;
        }
    }
}

async fn responses(mut from: tcp::OwnedReadHalf, to: ClientWriter, fault: Fault) {
    let patience = Duration::from_secs(if fault == Fault::Idle { 1 } else { 600 });
    let mut buf = vec![0; 64 << 10];
    let (mut held, mut holds) = (Vec::new(), false);
    while let Ok(Ok(n @ 1..)) = timeout(patience, from.read(&mut buf)).await {
        held.extend_from_slice(&buf[..n]);
        let head = String::from_utf8_lossy(&held);
        if fault == Fault::Buffers && !holds && head.contains("content-type: text/event-stream") {
            holds = true;
            // The head is forwarded at once with the first event.
        } else if holds && held.len() < 32 << 10 {
            continue;
        }
        if to.lock().await.write_all(&held).await.is_err() {
            return;
        }
        held.clear();
    }
}

#[tokio::test]
async fn a_healthy_node_has_no_problem() {
    let weir = weir().await;
    let found = doctor(&[&format!("http://{}", weir.address)]).await;
    assert_eq!(found.code, Some(0), "{}", found.notes);
    for (check, text) in [
        ("reach", "responds in"),
        ("ready", "accepts clients"),
        ("version", env!("CARGO_PKG_VERSION")),
        ("stream", "events arrive"),
        ("long-poll", "an event ends it"),
        ("websocket", "a call takes"),
        ("body", "arrive"),
    ] {
        assert_eq!(found.of(check)["state"], "ok", "{}", found.notes);
        assert!(found.of(check)["found"].as_str().unwrap().contains(text), "{}", found.of(check));
    }
    let left = weir.get("/v1/channels?prefix=weir.doctor").await.expect(200).json();
    assert_eq!(left["channels"], Value::Array(Vec::new()), "the command removes what it created");
}

#[tokio::test]
async fn unreachable_and_foreign_servers_are_reported() {
    let found = doctor(&["127.0.0.1:1"]).await;
    assert_eq!(found.code, Some(4), "{}", found.notes);
    found.is("reach", "problem", "cannot connect");
    let found = doctor(&[&server_with("HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\nhello").await.0]).await;
    assert_eq!(found.code, Some(4), "{}", found.notes);
    found.is("reach", "problem", "is this a weir node?");
    for args in [&["--redis", "http://127.0.0.1"][..], &["--redis"]] {
        let found = doctor(args).await;
        assert_eq!(found.code, Some(2), "{}", found.notes);
    }
}

/// A server with the same response to every request. Returns its address and the requests.
async fn server_with(response: &str) -> (String, Arc<parking_lot::Mutex<String>>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap().to_string();
    let (response, requests) = (response.to_owned(), Arc::new(parking_lot::Mutex::new(String::new())));
    let received = requests.clone();
    tokio::spawn(async move {
        while let Ok((mut socket, _)) = listener.accept().await {
            let (response, received) = (response.clone(), received.clone());
            tokio::spawn(async move {
                let mut buf = [0; 4096];
                let n = socket.read(&mut buf).await.unwrap_or(0);
                received.lock().push_str(&String::from_utf8_lossy(&buf[..n]));
                let _ = socket.write_all(response.as_bytes()).await;
            });
        }
    });
    (address, requests)
}

#[tokio::test]
async fn an_error_of_weir_is_reported_as_it_is() {
    let weir = weir().await;
    // A Host that a loopback listener rejects.
    let found = doctor(&[&format!("http://0.0.0.0:{}", weir.address.port())]).await;
    assert_eq!(found.code, Some(3), "{}", found.notes);
    found.is("reach", "problem", "weir responds 403 Forbidden, Not permitted (forbidden): the Host header");
    assert!(!found.notes.contains("another server"), "{}", found.notes);
    weir.shut_down();
    let node = |code: &str, status: u16, title: &str| {
        let body = format!(
            r#"{{"type":"urn:weir:error:{code}","title":"{title}","status":{status},"code":"{code}","detail":"why"}}"#
        );
        format!("HTTP/1.1 {status} X\r\ncontent-length: {}\r\n\r\n{body}", body.len())
    };
    let found = doctor(&[&server_with(&node("unauthorized", 401, "No")).await.0]).await;
    found.fails(3, "weir responds 401 Unauthorized, No (unauthorized): why");
    assert!(found.of("reach")["change"].as_str().unwrap().contains("--token"));
    let found = doctor(&[&server_with(&node("overloaded", 503, "Busy")).await.0]).await;
    found.fails(4, "weir responds 503 Service Unavailable, Busy (overloaded): why");
}

#[tokio::test]
async fn an_error_of_a_proxy_or_of_another_server_is_not_taken_for_one_of_weir() {
    for (status, headers, code, text) in [
        ("401 Unauthorized", "www-authenticate: Basic\r\n", 3, "pass the credentials that it requires"),
        ("403 Forbidden", "", 3, "a proxy rejects the request"),
        ("502 Bad Gateway", "", 4, "a proxy does not reach the node"),
        ("404 Not Found", "", 4, "another server responds"),
        (
            "301 Moved Permanently",
            "location: https://weir.example.com/\r\n",
            4,
            "a redirect to https://weir.example.com/",
        ),
    ] {
        let response = format!("HTTP/1.1 {status}\r\n{headers}content-length: 12\r\n\r\n<h1>No.</h1>");
        let (address, requests) = server_with(&response).await;
        let found = doctor(&[&address]).await;
        found.fails(code, text);
        found.is("reach", "problem", &format!("HTTP status {status}"));
        assert!(requests.lock().contains("\r\nuser-agent: weir-doctor/"), "{}", requests.lock());
    }
    let found = doctor(&[&server_with("\x15\x03\x01\0\x02\x02\x16").await.0]).await;
    found.fails(4, "use https://");
    // A server that is healthy, too.
    let json = r#"{"status":"ok","info":{"title":"Pet store"}}"#;
    let (address, _) =
        server_with(&format!("HTTP/1.1 200 OK\r\nconnection: close\r\ncontent-length: {}\r\n\r\n{json}", json.len()))
            .await;
    doctor(&[&address]).await.fails(4, "the server is not weir, but \"Pet store\"");
}

#[tokio::test]
async fn an_admin_listener_is_named_as_such() {
    let weir = weir().with(|config| config.admin.listen = Some(([127, 0, 0, 1], 0).into())).await;
    let found = doctor(&[&weir.addresses.last().unwrap().to_string()]).await;
    found.fails(1, "an admin listener (admin.listen) does not serve them");
    let found = doctor(&[&weir.address.to_string()]).await;
    assert_eq!(found.code, Some(0), "{}", found.notes);
}

#[tokio::test]
async fn a_run_without_a_problem_adds_to_no_failure_counter() {
    let weir = weir().await;
    let found = doctor(&[&weir.address.to_string()]).await;
    assert_eq!(found.code, Some(0), "{}", found.notes);
    let metrics = weir.get("/metrics").await.expect(200);
    let failed = ["weir_publish_failures_total{", "requests_total{status=\"4xx\"}", "requests_total{status=\"5xx\"}"];
    let series = metrics.text().lines().filter(|line| failed.iter().any(|name| line.contains(name)));
    let others =
        metrics.text().lines().filter(|line| line.starts_with("weir_rpc_calls_total{") && !line.contains("\"ok\""));
    for line in series.chain(others) {
        assert!(line.ends_with(" 0"), "{line}");
    }
}

#[tokio::test]
async fn a_buffering_proxy_is_reported() {
    let weir = weir().await;
    let found = doctor(&[&faulty_proxy(weir.address, Fault::Buffers).await]).await;
    assert_eq!(found.code, Some(1), "{}", found.notes);
    found.is("stream", "problem", "only after 65536 more bytes have been sent");
    assert!(found.of("stream")["change"].as_str().unwrap().contains("proxy_buffering off"));
    for check in ["long-poll", "websocket", "body"] {
        assert_eq!(found.of(check)["state"], "ok", "{}", found.of(check));
    }
}

#[tokio::test]
async fn a_proxy_with_an_idle_timeout_is_reported() {
    let weir = weir().await;
    let found = doctor(&[&faulty_proxy(weir.address, Fault::Idle).await, "--long"]).await;
    assert_eq!(found.code, Some(1), "{}", found.notes);
    found.is("long-poll", "problem", "requested to wait for 3.0 s");
    for check in ["idle stream", "idle socket", "idle poll"] {
        found.is(check, "problem", "closed after");
    }
}

#[tokio::test]
async fn a_proxy_without_upgrade_and_with_a_body_limit_is_reported() {
    let weir = weir().await;
    let found = doctor(&[&faulty_proxy(weir.address, Fault::OldFashioned).await]).await;
    assert_eq!(found.code, Some(1), "{}", found.notes);
    found.is("websocket", "problem", "without its Upgrade header");
    found.is("body", "problem", "413");
    assert_eq!(found.of("stream")["state"], "ok");
}

// === Redis ===

#[tokio::test]
async fn a_well_configured_redis_has_no_problem() {
    let redis = RedisServer::start(&["--appendonly", "yes", "--maxmemory", "1gb"]).await;
    let found = doctor(&["--redis", &redis.url()]).await;
    assert_eq!(found.code, Some(0), "{}", found.notes);
    found.is("version", "ok", "Redis 7");
    found.is("commands", "ok", "all that weir uses work");
    found.is("persistence", "ok", "AOF");
    found.is("eviction", "ok", "noeviction");
    found.is("memory", "ok", "of 1024 MiB used");
    found.is("buffers", "ok", "32 MiB");
    found.is("replicas", "advice", "none");
    assert_eq!(redis.cli(&["DBSIZE"]).await, "0", "the command removes what it created");
}

#[tokio::test]
async fn a_badly_configured_redis_is_reported() {
    let redis =
        RedisServer::start(&["--maxmemory", "100mb", "--maxmemory-policy", "allkeys-lru", "--timeout", "3"]).await;
    for setting in [["client-output-buffer-limit", "pubsub 1mb 512kb 10"], ["tcp-keepalive", "0"], ["maxclients", "5"]]
    {
        redis.cli(&["CONFIG", "SET", setting[0], setting[1]]).await;
    }
    let _others: Vec<_> = futures_util::future::join_all((0..3).map(|_| TcpStream::connect(redis.address()))).await;
    let found = doctor(&["--redis", &format!("{}/3", redis.url())]).await;
    assert_eq!(found.code, Some(1), "{}", found.notes);
    found.is("eviction", "problem", "allkeys-lru");
    found.is("buffers", "problem", "512 KiB for 10 s");
    found.is("persistence", "advice", "none");
    found.is("database", "advice", "database 3");
    assert!(found.notes.contains("PROBLEM  connections  timeout 3"), "{}", found.notes);
    assert!(found.notes.contains("tcp-keepalive 0"), "{}", found.notes);
    found.is("connections", "problem", "of 5 clients");
}

#[tokio::test]
async fn a_redis_out_of_memory_is_reported_once() {
    let redis = RedisServer::start(&[]).await;
    redis.cli(&["CONFIG", "SET", "maxmemory", "100kb"]).await;
    let found = doctor(&["--redis", &redis.url()]).await;
    assert_eq!(found.code, Some(1), "{}", found.notes);
    found.is("memory", "problem", "are rejected (OOM)");
    assert!(found.of("memory")["change"].as_str().unwrap().contains("publishes fail now"), "{}", found.notes);
    // There is one problem, and it is reported once.
    found.is("commands", "ok", "all else that weir uses works");
    assert_eq!(found.lines.iter().filter(|finding| finding["state"] == "problem").count(), 1, "{}", found.notes);
    assert!(!found.notes.contains("ACL") && !found.notes.contains("no such key"), "{}", found.notes);
}

#[tokio::test]
async fn missing_commands_and_missing_tls_are_reported() {
    let redis = RedisServer::start(&["--rename-command", "XTRIM", ""]).await;
    let found = doctor(&["--redis", &redis.url()]).await;
    assert_eq!(found.code, Some(1), "{}", found.notes);
    found.is("commands", "problem", "XTRIM: ");
    assert!(!found.notes.contains("ACL"), "{}", found.notes);
    // TLS with a server that does not support it.
    let found = doctor(&["--redis", &redis.url().replace("redis://", "rediss://")]).await;
    assert_eq!(found.code, Some(4), "{}", found.notes);
    found.is("reach", "problem", "does not speak TLS");
}

#[tokio::test]
async fn missing_permissions_of_the_redis_user_are_reported() {
    let redis = RedisServer::start(&[]).await;
    redis.cli(&["ACL", "SETUSER", "poor", "on", ">pw", "~other:*", "resetchannels", "+@all", "-xadd", "-config"]).await;
    let found = doctor(&["--redis", &format!("redis://poor:pw@{}", redis.address())]).await;
    assert_eq!(found.code, Some(1), "{}", found.notes);
    found.is("commands", "problem", "XADD: the command is not allowed");
    found.is("commands", "problem", "keys that begin with weir: are not allowed");
    found.is("commands", "problem", "channels that begin with weir: are not allowed");
    found.is("buffers", "advice", "CONFIG GET is not permitted");
    assert!(!found.notes.contains("no such key"), "that follows: {}", found.notes);
    // A user with the advised permissions passes.
    let advised = found.of("commands")["change"].as_str().unwrap().to_owned();
    let rules: Vec<&str> = advised.split(' ').filter(|word| word.starts_with(['~', '&', '+', '-'])).collect();
    redis.cli(&[&["ACL", "SETUSER", "rich", "on", ">pw"][..], &rules].concat()).await;
    let found = doctor(&["--redis", &format!("redis://rich:pw@{}", redis.address())]).await;
    found.is("commands", "ok", "all that weir uses work");
    let found = doctor(&["--redis", &format!("redis://rich:wrong@{}", redis.address())]).await;
    assert_eq!(found.code, Some(3), "{}", found.notes);
    found.is("reach", "problem", "WRONGPASS");
    assert!(!found.notes.contains("wrong@"), "a password is not shown: {}", found.notes);
}

#[tokio::test]
async fn sentinels_and_their_master_are_examined() {
    let mut sentinel = RedisSentinel::start().await;
    let found = doctor(&["--redis", &sentinel.url()]).await;
    assert_eq!(found.code, Some(0), "{}", found.notes);
    assert_eq!(found.lines.iter().filter(|finding| finding["check"] == "sentinel").count(), 3);
    found.is("sentinel", "ok", "2 replicas, 2 other sentinels");
    found.is("replicas", "advice", "min-replicas-to-write 0");
    // A replica does not accept writes.
    let replica = (sentinel.master().await + 1) % 3;
    let found = doctor(&["--redis", &sentinel.servers[replica].url()]).await;
    found.is("role", "problem", "a replica of");
    sentinel.sentinels.truncate(1);
    let url = sentinel.url();
    eventually_within(MINUTE, "the lone sentinel is reported", async || {
        doctor(&["--redis", &url]).await.of("sentinel")["state"] == "problem"
    })
    .await;
}

#[tokio::test]
async fn every_master_of_a_cluster_is_examined() {
    let mut cluster = RedisCluster::start(3, 0).await;
    let found = doctor(&["--redis", &cluster.url()]).await;
    assert_eq!(found.code, Some(0), "{}", found.notes);
    found.is("cluster", "advice", "no replica of");
    assert_eq!(found.lines.iter().filter(|finding| finding["check"] == "version").count(), 3);
    cluster.servers[2].kill();
    let url = cluster.url();
    eventually_within(MINUTE, "the loss of a master is reported", async || {
        doctor(&["--redis", &url]).await.of("cluster")["state"] == "problem"
    })
    .await;
}
