//! Calls between nodes on one Redis: nodes in this process, and processes that are killed and paused.

use std::{
    collections::BTreeMap,
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering::SeqCst},
    },
    time::Duration,
};

use rustix::process::Signal;
use serde_json::json;
use tokio::task::JoinHandle;

use crate::support::proxy::TcpProxy;
use crate::support::{
    MINUTE, Process, RedisDeployment, RedisServer, Socket, eventually, eventually_within, get_json,
    redis::{AOF, on_each_deployment},
    service::{call, listed},
    weir_on,
};

on_each_deployment!(calls_exclusive_names_and_service_changes_cross_nodes
    a_killed_node_fails_its_calls_and_frees_its_names
    a_node_paused_past_its_lease_loses_its_exclusive_services
    a_provider_of_a_draining_node_continues_on_another
    a_provider_that_disconnects_during_registration_holds_nothing
    links_between_nodes_recover_after_lost_connections_and_a_restart_of_redis);

async fn calls_exclusive_names_and_service_changes_cross_nodes<D: RedisDeployment>() {
    let redis = D::start().await;
    let url = redis.url();
    let nodes = [weir_on(&url).await, weir_on(&url).await, weir_on(&url).await];
    let mut provider = nodes[0].socket().await;
    provider.provide("jwt").await;
    listed(nodes[1].address, "jwt").await;
    let mut caller = nodes[1].socket().await;
    caller.send_json(json!({ "jsonrpc": "2.0", "id": 7, "method": "jwt/make", "params": [1] })).await;
    let request = provider.next_request().await;
    assert_eq!((&request["method"], &request["params"]), (&json!("make"), &json!([1])));
    provider.reply(&request, json!({ "token": "x" })).await;
    assert_eq!(caller.next().await, json!({ "jsonrpc": "2.0", "id": 7, "result": { "token": "x" } }));

    // An exclusive service has one provider in the cluster. The same subject may take it over; a withdrawn name is free
    // at once.
    let own = json!({ "service": "own", "exclusive": true });
    let mut first = nodes[0].socket().await;
    let mut second = nodes[1].socket().await;
    let fence = first.call("weir.provide", own.clone()).await["fence"].as_u64().unwrap();
    assert_eq!(second.call_error("weir.provide", own.clone()).await["data"]["code"], "service_taken");
    assert_eq!(second.call_error("weir.provide", json!({ "service": "own" })).await["data"]["code"], "service_taken");
    let takeover = json!({ "service": "own", "exclusive": true, "takeover": true });
    let later = second.call("weir.provide", takeover).await["fence"].as_u64().unwrap();
    assert!(later > fence);
    assert_eq!(first.notification("weir.withdrawn").await, json!({ "service": "own", "reason": "replaced" }));
    second.call("weir.withdraw", json!({ "service": "own" })).await;
    let last = first.call("weir.provide", own).await["fence"].as_u64().unwrap();
    assert!(last > later);

    // All nodes release everything.
    drop((provider, first, second, caller));
    for node in &nodes {
        eventually("nothing is left", async || {
            let counts = node.node().hub.counts();
            (counts.connections, counts.providers, counts.pending) == (0, 0, 0)
                && node.node().hub.services("", 10).len() == 1
        })
        .await;
    }
}

async fn a_killed_node_fails_its_calls_and_frees_its_names<D: RedisDeployment>() {
    let redis = D::start().await;
    let url = redis.url();
    let (local, killed) = (weir_on(&url).await, Process::start_on(&url));
    let remote = killed.address;
    let mut provider = Socket::open(remote).await;
    provider.call("weir.provide", json!({ "service": "own", "exclusive": true })).await;
    provider.call("weir.provide", json!({ "service": "shared", "names": "full" })).await;
    listed(local.address, "own").await;
    let pending = tokio::spawn(call(local.address, "own", "60s"));
    provider.next_request().await;
    drop(killed);
    let (status, answer) = pending.await.unwrap();
    assert_eq!((status, answer["code"].as_str()), (502, Some("provider_gone")), "{answer}");
    // The name is free when the lease of the dead node has expired.
    for service in ["own", "shared"] {
        let mut successor = local.socket().await;
        let own = json!({ "service": service, "exclusive": true });
        tokio::time::timeout(Duration::from_secs(60), successor.call("weir.provide", own)).await.unwrap();
    }
}

async fn a_node_paused_past_its_lease_loses_its_exclusive_services<D: RedisDeployment>() {
    let redis = D::start().await;
    let url = redis.url();
    let (local, paused) = (weir_on(&url).await, Process::start_on(&url));
    let remote = paused.address;
    let mut provider = Socket::open(remote).await;
    let own = json!({ "service": "own", "exclusive": true });
    let fence = provider.call("weir.provide", own.clone()).await["fence"].as_u64().unwrap();
    listed(local.address, "own").await;
    paused.signal(Signal::STOP);
    let mut successor = local.socket().await;
    let next = tokio::time::timeout(Duration::from_secs(60), successor.call("weir.provide", own)).await.unwrap();
    assert!(next["fence"].as_u64().unwrap() > fence);
    paused.signal(Signal::CONT);
    assert_eq!(provider.notification("weir.withdrawn").await, json!({ "service": "own", "reason": "lost" }));
    // The node that was paused forwards calls to the new provider.
    listed(remote, "own").await;
    answer_a_call(remote, "own", &mut successor).await;
    provider.expect_nothing().await;
}

async fn a_provider_that_disconnects_during_registration_holds_nothing<D: RedisDeployment>() {
    let mut redis = D::start().await;
    let url = redis.url();
    let (a, b) = (weir_on(&url).await, weir_on(&url).await);
    // Both nodes know each other's services.
    let mut sockets = [a.socket().await, b.socket().await];
    for (n, socket) in sockets.iter_mut().enumerate() {
        socket.provide(&format!("mine{n}")).await;
    }
    listed(a.address, "mine1").await;
    listed(b.address, "mine0").await;
    redis.servers().iter().for_each(RedisServer::pause);
    let asks = |id: &str, service: &str, exclusive: bool| {
        let params = json!({ "service": service, "exclusive": exclusive, "names": "full" });
        json!({ "jsonrpc": "2.0", "id": id, "method": "weir.provide", "params": params })
    };
    let mut withdraws = a.socket().await;
    for (service, exclusive) in [("w1", false), ("w2", true)] {
        withdraws.send_json(asks(service, service, exclusive)).await;
        // The withdrawal does not wait for Redis.
        let withdrawn = withdraws.call("weir.withdraw", json!({ "service": service })).await;
        assert_eq!(withdrawn, json!({ "in_flight": 0 }));
        let refused = withdraws.next_where(|message| message["id"] == service).await;
        assert_eq!(refused["error"]["data"]["code"], "cancelled", "{refused}");
        assert_eq!(
            withdraws.call_error("weir.withdraw", json!({ "service": service })).await["data"]["code"],
            "not_found"
        );
    }
    let mut goes = a.socket().await;
    goes.send_json(asks("1", "g1", false)).await;
    goes.send_json(asks("2", "g2", true)).await;
    // Both registrations are in progress.
    goes.call("weir.ping", json!({})).await;
    drop(goes);
    redis.servers().iter().for_each(RedisServer::resume);
    let mut successor = b.socket().await;
    for service in ["w1", "w2", "g1", "g2"] {
        take_over(&mut successor, service).await;
    }
    drop((withdraws, successor, sockets));
    for node in [&a, &b] {
        eventually("nothing is left", async || {
            let counts = node.node().hub.counts();
            (counts.connections, counts.providers, counts.pending) == (0, 0, 0)
        })
        .await;
    }
}

/// Registers an exclusive service as soon as it is free: Redis may still be down, or the release still in progress.
async fn take_over(successor: &mut Socket, service: &str) {
    let successor = tokio::sync::Mutex::new(successor);
    eventually_within(MINUTE, &format!("{service} is free"), async || {
        let answer = successor
            .lock()
            .await
            .request("weir.provide", json!({ "service": service, "exclusive": true, "names": "full" }))
            .await;
        let code = answer["error"]["data"]["code"].as_str().unwrap_or_default();
        assert!(
            answer.get("result").is_some() || matches!(code, "bus_unavailable" | "service_taken"),
            "{service}: {answer}"
        );
        answer.get("result").is_some()
    })
    .await;
}

/// The release is repeated when Redis is available again.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_name_released_while_redis_is_down_is_free_afterwards() {
    let mut redis = RedisServer::start(AOF).await;
    let url = redis.url();
    let (a, b) = (weir_on(&url).await, weir_on(&url).await);
    let (mut one, mut two) = (a.socket().await, a.socket().await);
    one.provide("shared").await;
    two.call("weir.provide", json!({ "service": "own", "exclusive": true })).await;
    listed(b.address, "shared").await;
    redis.kill();
    one.call("weir.withdraw", json!({ "service": "shared" })).await;
    drop(two);
    redis.restart().await;
    let mut successor = b.socket().await;
    for service in ["shared", "own"] {
        take_over(&mut successor, service).await;
    }
}

/// If Redis is down for less than a lease, calls between nodes wait for it, whether or not it loses its data.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn calls_survive_a_restart_of_redis() {
    for args in [&[][..], AOF] {
        let mut redis = RedisServer::start(args).await;
        let url = redis.url();
        let nodes = [weir_on(&url).await, weir_on(&url).await];
        let mut provider = nodes[0].socket().await;
        provider.provide("a").await;
        let at = nodes[1].address;
        listed(at, "a").await;
        answer_a_call(at, "a", &mut provider).await;
        let early = tokio::spawn(call(at, "a", "60s"));
        let request = provider.next_request().await;
        redis.kill();
        provider.reply(&request, json!("early")).await;
        let late: Vec<_> = (0..20).map(|_| tokio::spawn(call(at, "a", "60s"))).collect();
        redis.restart().await;
        for _ in &late {
            let request = provider.next_request().await;
            provider.reply(&request, json!("late")).await;
        }
        assert_eq!(early.await.unwrap(), (200, json!("early")), "{args:?}");
        for late in late {
            assert_eq!(late.await.unwrap(), (200, json!("late")), "{args:?}");
        }
        provider.expect_nothing().await;
    }
}

/// The last announcement of each service in `$services`.
async fn last_announcements(at: SocketAddr) -> BTreeMap<String, u64> {
    let (mut announced, mut after) = (BTreeMap::new(), "earliest".to_owned());
    loop {
        let page = get_json(at, &format!("/v1/events?channel=$services&after={after}")).await;
        for event in page["events"].as_array().unwrap() {
            let (service, providers) = (&event["data"]["service"], &event["data"]["providers"]);
            announced.insert(service.as_str().unwrap().to_owned(), providers.as_u64().unwrap());
        }
        after = page["next"].as_str().unwrap().to_owned();
        if page["more"] == false {
            return announced;
        }
    }
}

async fn announces(at: SocketAddr, services: &[(&str, u64)]) {
    let expected: BTreeMap<String, u64> = services.iter().map(|(name, count)| ((*name).to_owned(), *count)).collect();
    eventually_within(MINUTE, &format!("{expected:?} is announced"), async || last_announcements(at).await == expected)
        .await;
}

/// `$services` is eventually correct, whatever writes Redis rejected and however long it was down.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn service_changes_are_announced_when_redis_accepts_writes_again() {
    let mut redis = RedisServer::start(AOF).await;
    let url = redis.url();
    let nodes = [weir_on(&url).await, weir_on(&url).await];
    let mut providers = Vec::new();
    for (at, service) in [(0, "a"), (0, "b"), (1, "c"), (1, "d")] {
        let mut provider = nodes[at].socket().await;
        provider.provide(service).await;
        providers.push(provider);
    }
    let at = nodes[1].address;
    announces(at, &[("a", 1), ("b", 1), ("c", 1), ("d", 1)]).await;
    // Redis is out of memory and rejects writes.
    redis.cli(&["CONFIG", "SET", "maxmemory", "1"]).await;
    let refused = redis.info("errorstat_OOM").await;
    drop(providers.remove(0));
    eventually_within(MINUTE, "Redis has rejected the announcement", async || {
        redis.info("errorstat_OOM").await != refused
    })
    .await;
    redis.cli(&["CONFIG", "SET", "maxmemory", "0"]).await;
    announces(at, &[("a", 0), ("b", 1), ("c", 1), ("d", 1)]).await;
    // Redis is down for longer than the sessions of nodes last.
    let ready = async |status| {
        for node in &nodes {
            eventually_within(MINUTE, "the readiness changes", async || {
                node.get("/health/ready").await.status == status
            })
            .await;
        }
    };
    ready(200).await;
    redis.kill();
    drop(providers.remove(0));
    ready(503).await;
    drop(providers.remove(0));
    redis.restart().await;
    for node in &nodes {
        announces(node.address, &[("a", 0), ("b", 0), ("c", 0), ("d", 1)]).await;
    }
}

/// Answers calls until its node announces a drain.
async fn serve(mut provider: Socket) -> Socket {
    loop {
        let message = provider.next().await;
        match message["method"].as_str() {
            Some("weir.drain") => return provider,
            Some(_) => provider.reply(&message, json!(1)).await,
            None => panic!("{message}"),
        }
    }
}

async fn a_provider_of_a_draining_node_continues_on_another<D: RedisDeployment>() {
    let redis = D::start().await;
    let url = redis.url();
    let [from, to, caller] = [weir_on(&url).await, weir_on(&url).await, weir_on(&url).await];
    let mut provider = from.socket().await;
    provider.provide("a").await;
    listed(caller.address, "a").await;
    let serving = tokio::spawn(serve(provider));
    // Calls continue all the time, and none fails.
    let (at, answered) = (caller.address, Arc::new(AtomicUsize::new(0)));
    let calls: JoinHandle<()> = tokio::spawn({
        let answered = answered.clone();
        async move {
            loop {
                assert_eq!(call(at, "a", "20s").await, (200, json!(1)));
                answered.fetch_add(1, SeqCst);
            }
        }
    });
    let more = async |count| {
        let from = answered.load(SeqCst);
        eventually_within(MINUTE, "calls are answered", async || {
            calls.is_finished() || answered.load(SeqCst) >= from + count
        })
        .await;
        assert!(!calls.is_finished(), "a call failed");
    };
    more(20).await;
    from.shut_down();
    // The drain is announced after the last call of the provider, and no node lists it any more.
    let old = serving.await.unwrap();
    let mut provider = to.socket().await;
    provider.provide("a").await;
    let serving = tokio::spawn(serve(provider));
    more(20).await;
    assert_eq!(get_json(at, "/v1/services?prefix=a").await["services"][0]["providers"], 1);
    calls.abort();
    serving.abort();
    drop(old);
}

/// Calls until the provider answers: a call that was in flight on a lost link fails and is not retried.
async fn answer_a_call(at: SocketAddr, service: &'static str, provider: &mut Socket) {
    let mut last = Default::default();
    for _ in 0..60 {
        let pending = tokio::spawn(call(at, service, "2s"));
        if let Ok(request) = tokio::time::timeout(Duration::from_secs(2), provider.next_request()).await {
            provider.reply(&request, json!(1)).await;
        }
        last = pending.await.unwrap();
        if last == (200, json!(1)) {
            return;
        }
    }
    panic!("no call is answered: {last:?}");
}

async fn links_between_nodes_recover_after_lost_connections_and_a_restart_of_redis<D: RedisDeployment>() {
    let mut redis = D::start().await;
    let url = redis.url();
    let nodes = [weir_on(&url).await, weir_on(&url).await];
    let mut provider = nodes[0].socket().await;
    provider.provide("a").await;
    listed(nodes[1].address, "a").await;
    answer_a_call(nodes[1].address, "a", &mut provider).await;
    for server in redis.servers() {
        server.cli(&["CLIENT", "KILL", "TYPE", "pubsub"]).await;
    }
    answer_a_call(nodes[1].address, "a", &mut provider).await;
    redis.servers().iter_mut().for_each(RedisServer::kill);
    // Calls on one node still work.
    let mut local_caller = nodes[0].socket().await;
    local_caller.send_json(json!({ "jsonrpc": "2.0", "id": 1, "method": "a/x" })).await;
    let request = provider.next_request().await;
    provider.reply(&request, json!(2)).await;
    assert_eq!(local_caller.next().await["result"], 2);
    for server in redis.servers() {
        server.restart().await;
    }
    answer_a_call(nodes[1].address, "a", &mut provider).await;
}

/// The connection for messages stays open, but to a server that was replaced: other nodes publish to the new one.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn messages_are_received_after_the_redis_server_is_replaced() {
    let (old, new) = (RedisServer::start(&[]).await, RedisServer::start(&[]).await);
    let proxy = TcpProxy::start(old.port).await;
    let deaf = weir_on(&proxy.redis_url()).await;
    eventually_within(MINUTE, "the node has subscribed to its messages", async || {
        old.cli(&["PUBSUB", "CHANNELS", "*:mail"]).await.contains("mail")
    })
    .await;
    proxy.redirect(new.port);
    old.cli(&["CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes"]).await;
    let mut provider = deaf.socket().await;
    provider.provide("s").await;
    let other = weir_on(&new.url()).await;
    // The provider is announced at once, although everything the old server knew has to be repeated.
    listed(other.address, "s").await;
    eventually_within(MINUTE, "both nodes have subscribed at the new server", async || {
        new.cli(&["PUBSUB", "CHANNELS", "*:mail"]).await.lines().count() == 2
    })
    .await;
    let answering = tokio::spawn(async move {
        let request = provider.next_request().await;
        provider.reply(&request, json!("here")).await;
        provider
    });
    eventually_within(MINUTE, "a call succeeds", async || call(other.address, "s", "5s").await.0 == 200).await;
    drop(answering.await.unwrap());
}
