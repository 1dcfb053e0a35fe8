//! Calls between nodes on one Redis: several in this process, and real ones that are killed and stopped.

use std::{net::SocketAddr, time::Duration};

use rustix::process::Signal;
use serde_json::{Value, json};
use weir::config::Backend;

use super::servers::{Server, until};
use crate::{
    process::Process,
    socket::{Socket, eventually},
    support::{Weir, weir},
};

async fn node(redis: &Server) -> Weir {
    weir()
        .with(|config| {
            config.bus.backend = Backend::Redis;
            config.bus.redis.url = redis.url().as_str().into();
        })
        .await
}

fn process(redis: &Server) -> (Process, SocketAddr) {
    let process = Process::start(&[("WEIR__BUS__BACKEND", "redis"), ("WEIR__BUS__REDIS__URL", redis.url().as_str())]);
    let address = process.address.parse().unwrap();
    (process, address)
}

/// Until the node there knows a provider of `service`.
async fn knows(at: SocketAddr, service: &str) {
    until("a node learns of a provider", async || {
        let listed = crate::support::Request::new(at, "GET", format!("/v1/services?prefix={service}")).await;
        !listed.expect(200).json()["services"].as_array().unwrap().is_empty()
    })
    .await;
}

async fn call(at: SocketAddr, service: &str, timeout: &str) -> (u16, Value) {
    let path = format!("/v1/services/{service}/x?timeout={timeout}");
    let reply = crate::support::Request::new(at, "POST", path).body("[1]").await;
    (reply.status, reply.json())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn calls_names_and_news_cross() {
    let redis = Server::start(&[]).await;
    let nodes = [node(&redis).await, node(&redis).await, node(&redis).await];
    let mut provider = Socket::open(nodes[0].address).await;
    provider.provide("jwt").await;
    knows(nodes[1].address, "jwt").await;
    let mut caller = Socket::open(nodes[1].address).await;
    caller.json(json!({ "jsonrpc": "2.0", "id": 7, "method": "jwt/make", "params": [1] })).await;
    let request = provider.request().await;
    assert_eq!((&request["method"], &request["params"]), (&json!("make"), &json!([1])));
    provider.reply(&request, json!({ "token": "x" })).await;
    assert_eq!(caller.next().await, json!({ "jsonrpc": "2.0", "id": 7, "result": { "token": "x" } }));

    // One exclusive holder for all, whom the same subject replaces; the name is free at once when it goes.
    let own = json!({ "service": "own", "exclusive": true });
    let mut first = Socket::open(nodes[0].address).await;
    let mut second = Socket::open(nodes[1].address).await;
    let fence = first.ok("weir.provide", own.clone()).await["fence"].as_u64().unwrap();
    assert_eq!(second.refused("weir.provide", own.clone()).await["data"]["code"], "service_taken");
    assert_eq!(second.refused("weir.provide", json!({ "service": "own" })).await["data"]["code"], "service_taken");
    let takeover = json!({ "service": "own", "exclusive": true, "takeover": true });
    let later = second.ok("weir.provide", takeover).await["fence"].as_u64().unwrap();
    assert!(later > fence);
    assert_eq!(first.notice("weir.withdrawn").await, json!({ "service": "own", "reason": "replaced" }));
    second.ok("weir.withdraw", json!({ "service": "own" })).await;
    let last = first.ok("weir.provide", own).await["fence"].as_u64().unwrap();
    assert!(last > later);

    // Everything is given back, on all nodes.
    drop((provider, first, second, caller));
    for node in &nodes {
        eventually("nothing is left", || {
            let counts = node.gateway().hub.counts();
            (counts.connections, counts.providers, counts.pending) == (0, 0, 0)
                && node.gateway().hub.services("", 10).len() == 1
        })
        .await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_that_is_killed_fails_its_calls_and_frees_its_names() {
    let redis = Server::start(&[]).await;
    let (here, (doomed, there)) = (node(&redis).await, process(&redis));
    let mut provider = Socket::open(there).await;
    provider.ok("weir.provide", json!({ "service": "own", "exclusive": true })).await;
    knows(here.address, "own").await;
    let pending = tokio::spawn(call(here.address, "own", "60s"));
    provider.request().await;
    drop(doomed);
    let (status, answer) = pending.await.unwrap();
    assert_eq!((status, answer["code"].as_str()), (502, Some("provider_gone")), "{answer}");
    // Waits for the end of the dead node's lease, and no longer.
    let mut heir = Socket::open(here.address).await;
    let own = json!({ "service": "own", "exclusive": true });
    tokio::time::timeout(Duration::from_secs(60), heir.ok("weir.provide", own)).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_that_stood_still_too_long_runs_nothing_exclusive() {
    let redis = Server::start(&[]).await;
    let (here, (stopped, there)) = (node(&redis).await, process(&redis));
    let mut provider = Socket::open(there).await;
    let own = json!({ "service": "own", "exclusive": true });
    let fence = provider.ok("weir.provide", own.clone()).await["fence"].as_u64().unwrap();
    knows(here.address, "own").await;
    stopped.signal(Signal::STOP);
    let mut heir = Socket::open(here.address).await;
    let next = tokio::time::timeout(Duration::from_secs(60), heir.ok("weir.provide", own)).await.unwrap();
    assert!(next["fence"].as_u64().unwrap() > fence);
    stopped.signal(Signal::CONT);
    assert_eq!(provider.notice("weir.withdrawn").await, json!({ "service": "own", "reason": "lost" }));
    // Called at the node that was stopped, the other one runs it.
    knows(there, "own").await;
    answers(there, "own", &mut heir).await;
    provider.quiet().await;
}

/// Calls until the provider gets to answer: a call that was on a link when it broke is told so, and is not made again.
async fn answers(at: SocketAddr, service: &'static str, provider: &mut Socket) {
    for _ in 0..60 {
        let pending = tokio::spawn(call(at, service, "2s"));
        if let Ok(request) = tokio::time::timeout(Duration::from_secs(2), provider.request()).await {
            provider.reply(&request, json!(1)).await;
        }
        if pending.await.unwrap() == (200, json!(1)) {
            return;
        }
    }
    panic!("no call is answered");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn links_come_back_after_their_connections_and_after_redis() {
    let mut redis = Server::start(&[]).await;
    let nodes = [node(&redis).await, node(&redis).await];
    let mut provider = Socket::open(nodes[0].address).await;
    provider.provide("a").await;
    knows(nodes[1].address, "a").await;
    answers(nodes[1].address, "a", &mut provider).await;
    redis.cli(&["CLIENT", "KILL", "TYPE", "pubsub"]).await;
    answers(nodes[1].address, "a", &mut provider).await;
    redis.kill();
    // What is here works on.
    let mut near = Socket::open(nodes[0].address).await;
    near.json(json!({ "jsonrpc": "2.0", "id": 1, "method": "a/x" })).await;
    let request = provider.request().await;
    provider.reply(&request, json!(2)).await;
    assert_eq!(near.next().await["result"], 2);
    redis.restart().await;
    answers(nodes[1].address, "a", &mut provider).await;
}
