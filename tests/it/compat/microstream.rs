//! MicroStream clients, byte for byte: disconnects, limits, and input that its library does not produce.
//! `tests/clients/node/microstream.test.mjs` tests the real library.

use std::time::Duration;

use serde_json::{Value, json};
use tokio_tungstenite::tungstenite::Message;
use weir::{compat::microstream, config::Config};

use crate::support::{Client, Socket, Weir, eventually, in_time, weir};

pub const SOCKET: &str = "/socket.io/?EIO=4&transport=websocket";
const POLL: &str = "/socket.io/?EIO=4&transport=polling";

async fn hub(change: impl FnOnce(&mut Config)) -> Weir {
    let on = |config: &mut Config| {
        config.compat.enable = vec!["microstream"];
        change(config);
    };
    weir().with(on).await
}

/// A client that has joined over a WebSocket.
pub async fn client(weir: &Weir, name: &str) -> Socket {
    let mut client = Socket::open_at(weir.address, &format!("{SOCKET}&serviceName={name}")).await;
    assert!(client.text().await.starts_with("0{\"sid\":\""));
    client.send("40").await;
    assert!(client.text().await.starts_with("40{\"sid\":\""));
    client
}

/// A client that has joined over long-polling.
async fn poller(weir: &Weir, name: &str) -> (Client, String) {
    let mut client = weir.client().await;
    let open = client.get(&format!("{POLL}&serviceName={name}")).await.expect(200);
    let (_, rest) = open.text().split_once("\"sid\":\"").unwrap();
    let path = format!("{POLL}&sid={}", rest.split_once('"').unwrap().0);
    assert_eq!(client.post(&path, "40").await.expect(200).text(), "ok");
    assert!(client.get(&path).await.expect(200).text().starts_with("40{"));
    (client, path)
}

fn request(target: &str, id: u32, data: &str) -> String {
    format!(r#"42["request",{{"targetService":"{target}","payload":{{"id":"{id}","event":"e","data":{data}}}}}]"#)
}

#[tokio::test]
async fn disconnected_clients_leave_no_state() {
    let weir = hub(|config| config.rpc.timeout = Duration::from_millis(100)).await;
    let mut target = client(&weir, "target").await;
    let (mut sockets, mut polls) = (Vec::new(), Vec::new());
    for n in 0..40 {
        let mut socket = client(&weir, &format!("socket-{n}")).await;
        socket.send(request("target", n, "1")).await;
        // Some disconnect in the middle of a packet.
        if n % 3 == 0 {
            socket.send(r#"452-["request",{"targetService":"target","payload":{"id":"b"}}]"#).await;
            socket.send_frame(Message::binary(vec![1, 2, 3])).await;
        }
        sockets.push(socket);
        let (mut poll, path) = poller(&weir, &format!("poll-{n}")).await;
        poll.post(&path, &request("target", n, "{}")).await.expect(200);
        // A pending poll.
        poll.send("GET", &path, &[], b"").await;
        if n % 4 == 0 {
            // Some upgrade to a WebSocket.
            let mut upgrade = Socket::open_at(weir.address, &path.replace("polling", "websocket")).await;
            upgrade.send("2probe").await;
            assert_eq!(upgrade.text().await, "3probe");
            upgrade.send("5").await;
            sockets.push(upgrade);
        }
        polls.push(poll);
    }
    for _ in 0..80 {
        assert!(target.text().await.starts_with("42[\"request\",{"));
    }
    assert_eq!(weir.metric("weir_connections{transport=\"socketio\"}"), 81);
    eventually("the calls are late", async || weir.node().hub.counts().late == 80).await;
    drop((sockets, polls));
    eventually("the clients are gone", async || weir.metric("weir_connections{transport=\"socketio\"}") == 1).await;
    // Responses to disconnected clients are dropped.
    for n in 0..80 {
        target.send(format!(r#"42["response",{{"id":"{n}","response":{{}}}}]"#)).await;
    }
    target.send(request("target", 7, "null")).await;
    assert_eq!(target.text().await, r#"42["request",{"id":"7","event":"e","data":null}]"#);
    drop(target);
    weir.idle().await;
}

#[tokio::test]
async fn requests_to_a_stalled_target_are_answered_busy() {
    let weir = hub(|config| config.compat.get_mut::<microstream::Config>().unwrap().queued = 200_000).await;
    let (_deaf, path) = poller(&weir, "deaf").await;
    let mut caller = client(&weir, "caller").await;
    let data = format!("\"{}\"", "x".repeat(50_000));
    let mut refused = 0;
    for n in 0..10 {
        caller.send(request("deaf", n, &data)).await;
    }
    caller.send(request("nobody", 10, "1")).await;
    loop {
        let answer = caller.text().await;
        if answer.contains("TARGET_SERVICE_NOT_FOUND") {
            break;
        }
        assert!(answer.contains(r#""code":"BUSY""#), "{answer}");
        refused += 1;
    }
    // The queue accepts requests until they exceed its size.
    assert_eq!(refused, 6);
    assert_eq!(weir.get(&path).await.expect(200).text().matches("42[\"request\"").count(), 4);
    assert_eq!(weir.node().hub.counts().pending, 4);
}

#[tokio::test]
async fn a_client_that_does_not_read_its_responses_is_closed() {
    let weir = hub(|config| {
        let microstream = config.compat.get_mut::<microstream::Config>().unwrap();
        microstream.queued = 20_000;
        (microstream.ping, microstream.ping_timeout) = (Duration::from_secs(1), Duration::from_secs(1));
    })
    .await;
    let (mut client, path) = poller(&weir, "client").await;
    let echo = r#"42["request",{"targetService":"weir","payload":{"id":"1","event":"echo","data":{"x":"DATA"}}}]"#;
    let echo = echo.replace("DATA", &"x".repeat(9_000));
    let requests = [&*echo; 10].join("\u{1e}");
    assert_eq!(client.post(&path, &requests).await.expect(200).text(), "ok");
    eventually("the client is gone", async || weir.metric("weir_connections{transport=\"socketio\"}") == 0).await;
    drop(client);
    weir.idle().await;
}

#[tokio::test]
async fn a_client_that_reads_gets_every_response_however_many_wait() {
    let weir = hub(|config| config.compat.get_mut::<microstream::Config>().unwrap().queued = 20_000).await;
    let (mut caller, mut provider) = (client(&weir, "caller").await, client(&weir, "provider").await);
    let data = "x".repeat(5_000);
    let providing = tokio::spawn(async move {
        loop {
            let text = provider.text().await;
            let request: Value = serde_json::from_str(text.strip_prefix("42").unwrap_or("[]")).unwrap();
            let response = json!(["response", { "id": request[1]["id"], "response": data }]);
            provider.send(format!("42{response}")).await;
        }
    });
    for id in 0..200 {
        caller.feed(request("provider", id, "1")).await;
    }
    caller.flush().await;
    for _ in 0..200 {
        let text = caller.text().await;
        assert!(text.len() > 5_000, "{text}");
    }
    providing.abort();
}

#[tokio::test]
async fn only_heartbeats_keep_a_service_and_any_client_may_send_them() {
    let weir = hub(|config| {
        let microstream = config.compat.get_mut::<microstream::Config>().unwrap();
        (microstream.heartbeat_timeout, microstream.sweep) = (Duration::from_secs(3), Duration::from_millis(250));
    })
    .await;
    let (mut busy, mut kept) = (client(&weir, "busy").await, client(&weir, "kept").await);
    let mut friend = client(&weir, "friend").await;
    loop {
        for name in ["friend", "kept", "nobody"] {
            friend.send(format!(r#"42["heartbeat",{{"serviceName":"{name}"}}]"#)).await;
        }
        friend.send(request("weir", 0, "{}")).await;
        assert!(friend.text().await.contains(r#"{"id":"0","response""#));
        // Requests and pongs do not count as heartbeats.
        busy.send("3").await;
        busy.send(request("weir", 1, "{}")).await;
        let message = busy.text().await;
        if message == "41" {
            break;
        }
        assert!(message.contains(r#"{"id":"1","response""#), "{message}");
    }
    friend.send(request("busy", 2, "{}")).await;
    assert!(friend.text().await.contains("TARGET_SERVICE_NOT_FOUND"));
    friend.send(request("kept", 3, "{}")).await;
    assert_eq!(kept.text().await, r#"42["request",{"id":"3","event":"e","data":{}}]"#);
}

async fn listed(weir: &Weir, query: &str) -> Vec<Value> {
    let answer = weir.get(format!("/v1/connections?{query}")).await.expect(200).json();
    answer["connections"].as_array().unwrap().clone()
}

#[tokio::test]
async fn clients_are_listed_by_their_services_and_kicked() {
    let weir = hub(|_| {}).await;
    let mut socket = client(&weir, "socket").await;
    let (mut poll, path) = poller(&weir, "poll").await;
    let (mut upgraded, old) = poller(&weir, "upgraded").await;
    let mut upgrade = Socket::open_at(weir.address, &old.replace("polling", "websocket")).await;
    upgrade.send("2probe").await;
    assert_eq!(upgrade.text().await, "3probe");
    upgrade.send("5").await;
    let all = listed(&weir, "").await;
    let listed_clients: Vec<_> =
        all.iter().map(|it| json!([it["transport"], it["services"], it["channels"]])).collect();
    let expected = ["socket", "poll", "upgraded"].map(|name| json!(["socketio", [name], 0]));
    assert_eq!(listed_clients, expected);
    assert!(all.iter().all(|it| it["remote"].as_str().unwrap().starts_with("127.0.0.1:")), "{all:?}");
    // The third client has upgraded its connection.
    assert_eq!(upgraded.get(&old).await.expect(400).text(), r#"{"code":3,"message":"Bad request"}"#);

    // The disconnect packet keeps the library from reconnecting. The name is free at once.
    let kick = async |it: &Value| {
        let path = format!("/v1/connections?id={}", it["id"].as_str().unwrap());
        assert_eq!(weir.delete(path).await.expect(200).json(), json!({ "kicked": 1 }));
    };
    poll.send("GET", &path, &[], b"").await;
    for it in &all {
        kick(it).await;
    }
    assert_eq!((socket.text().await, upgrade.text().await), ("41".to_owned(), "41".to_owned()));
    assert_eq!(poll.response().await.expect(200).text(), "41");
    assert_eq!(weir.node().hub.counts().providers, 0);
    let mut successor = client(&weir, "socket").await;
    // One client closes by itself, the other connections are closed by weir.
    drop(socket);
    assert_eq!(in_time(upgrade.closed()).await, (4503, "kicked".to_owned()));
    let series = "weir_connections_closed_total{transport=\"socketio\",reason=\"kicked\"}";
    eventually("all three are gone", async || weir.metric(series) == 3).await;
    assert_eq!(listed(&weir, "").await.len(), 1);
    successor.send("1").await;
    drop((successor, poll, upgraded, upgrade));
    weir.idle().await;
}

#[tokio::test]
async fn a_draining_node_closes_its_clients_so_that_they_reconnect() {
    let weir = hub(|config| config.drain.window = Duration::ZERO).await;
    let (mut poll, path) = poller(&weir, "poll").await;
    let mut socket = client(&weir, "socket").await;
    poll.send("GET", &path, &[], b"").await;
    weir.shut_down();
    // The connection is closed without a disconnect packet, so that the library reconnects.
    assert_eq!(poll.response().await.expect(200).text(), "1");
    assert_eq!(in_time(socket.closed()).await.1, "draining");
    in_time(weir.stopped()).await;
}
