//! Calls between nodes on one Redis: several in this process, and real ones that are killed and stopped.

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

use super::{
    proxy::Proxy,
    servers::{Deployed, Server, everywhere, until},
    weirs::{call, get, knows, node, process},
};
use crate::socket::{Socket, eventually};

const AOF: &[&str] = &["--appendonly", "yes", "--appendfsync", "always"];

everywhere!(calls_names_and_news_cross
    a_node_that_is_killed_fails_its_calls_and_frees_its_names
    a_node_that_stood_still_too_long_runs_nothing_exclusive
    a_provider_whose_node_leaves_goes_on_at_another
    who_leaves_while_it_is_being_registered_holds_nothing
    links_come_back_after_their_connections_and_after_redis);

async fn calls_names_and_news_cross<D: Deployed>() {
    let redis = D::start().await;
    let url = redis.url();
    let nodes = [node(&url).await, node(&url).await, node(&url).await];
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
            let counts = node.node().hub.counts();
            (counts.connections, counts.providers, counts.pending) == (0, 0, 0)
                && node.node().hub.services("", 10).len() == 1
        })
        .await;
    }
}

async fn a_node_that_is_killed_fails_its_calls_and_frees_its_names<D: Deployed>() {
    let redis = D::start().await;
    let url = redis.url();
    let (here, (doomed, there)) = (node(&url).await, process(&url));
    let mut provider = Socket::open(there).await;
    provider.ok("weir.provide", json!({ "service": "own", "exclusive": true })).await;
    provider.ok("weir.provide", json!({ "service": "shared", "names": "full" })).await;
    knows(here.address, "own").await;
    let pending = tokio::spawn(call(here.address, "own", "60s"));
    provider.request().await;
    drop(doomed);
    let (status, answer) = pending.await.unwrap();
    assert_eq!((status, answer["code"].as_str()), (502, Some("provider_gone")), "{answer}");
    // Waits for the end of the dead node's lease, and no longer.
    for service in ["own", "shared"] {
        let mut heir = Socket::open(here.address).await;
        let own = json!({ "service": service, "exclusive": true });
        tokio::time::timeout(Duration::from_secs(60), heir.ok("weir.provide", own)).await.unwrap();
    }
}

async fn a_node_that_stood_still_too_long_runs_nothing_exclusive<D: Deployed>() {
    let redis = D::start().await;
    let url = redis.url();
    let (here, (stopped, there)) = (node(&url).await, process(&url));
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

async fn who_leaves_while_it_is_being_registered_holds_nothing<D: Deployed>() {
    let mut redis = D::start().await;
    let url = redis.url();
    let (a, b) = (node(&url).await, node(&url).await);
    // They are known, so that they can be asked.
    let mut sockets = [Socket::open(a.address).await, Socket::open(b.address).await];
    for (n, socket) in sockets.iter_mut().enumerate() {
        socket.provide(&format!("mine{n}")).await;
    }
    knows(a.address, "mine1").await;
    knows(b.address, "mine0").await;
    redis.servers().iter().for_each(Server::pause);
    let asks = |id: &str, service: &str, exclusive: bool| {
        let params = json!({ "service": service, "exclusive": exclusive, "names": "full" });
        json!({ "jsonrpc": "2.0", "id": id, "method": "weir.provide", "params": params })
    };
    let mut withdraws = Socket::open(a.address).await;
    for (service, exclusive) in [("w1", false), ("w2", true)] {
        withdraws.json(asks(service, service, exclusive)).await;
        // Not when Redis answers, but now.
        let withdrawn = withdraws.ok("weir.withdraw", json!({ "service": service })).await;
        assert_eq!(withdrawn, json!({ "in_flight": 0 }));
        let refused = withdraws.pick(|message| message["id"] == service).await;
        assert_eq!(refused["error"]["data"]["code"], "cancelled", "{refused}");
        assert_eq!(
            withdraws.refused("weir.withdraw", json!({ "service": service })).await["data"]["code"],
            "not_found"
        );
    }
    let mut goes = Socket::open(a.address).await;
    goes.json(asks("1", "g1", false)).await;
    goes.json(asks("2", "g2", true)).await;
    // Both are under way.
    goes.ok("weir.ping", json!({})).await;
    drop(goes);
    redis.servers().iter().for_each(Server::resume);
    let mut heir = Socket::open(b.address).await;
    for service in ["w1", "w2", "g1", "g2"] {
        inherits(&mut heir, service).await;
    }
    drop((withdraws, heir, sockets));
    for node in [&a, &b] {
        eventually("nothing is left", || {
            let counts = node.node().hub.counts();
            (counts.connections, counts.providers, counts.pending) == (0, 0, 0)
        })
        .await;
    }
}

/// Gets a service for itself alone, soon: Redis may still be away, or the name just on its way back.
async fn inherits(heir: &mut Socket, service: &str) {
    let give_up = tokio::time::Instant::now() + Duration::from_secs(60);
    loop {
        let answer = heir.ask("weir.provide", json!({ "service": service, "exclusive": true, "names": "full" })).await;
        if answer.get("result").is_some() {
            return;
        }
        let code = answer["error"]["data"]["code"].as_str().unwrap_or_default();
        assert!(matches!(code, "bus_unavailable" | "service_taken"), "{service}: {answer}");
        assert!(tokio::time::Instant::now() < give_up, "{service} does not come back: {answer}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

/// A name that was given back while Redis was away is not in it afterwards.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_name_given_back_while_redis_is_away_is_free_afterwards() {
    let mut redis = Server::start(AOF).await;
    let url = redis.url();
    let (a, b) = (node(&url).await, node(&url).await);
    let (mut one, mut two) = (Socket::open(a.address).await, Socket::open(a.address).await);
    one.provide("shared").await;
    two.ok("weir.provide", json!({ "service": "own", "exclusive": true })).await;
    knows(b.address, "shared").await;
    redis.kill();
    one.ok("weir.withdraw", json!({ "service": "shared" })).await;
    drop(two);
    redis.restart().await;
    let mut heir = Socket::open(b.address).await;
    for service in ["shared", "own"] {
        inherits(&mut heir, service).await;
    }
}

/// Redis is away for less than a lease: calls between nodes wait for it, whether or not it forgets everything.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn calls_outlive_a_restart_of_redis() {
    for args in [&[][..], AOF] {
        let mut redis = Server::start(args).await;
        let url = redis.url();
        let nodes = [node(&url).await, node(&url).await];
        let mut provider = Socket::open(nodes[0].address).await;
        provider.provide("a").await;
        let at = nodes[1].address;
        knows(at, "a").await;
        answers(at, "a", &mut provider).await;
        let early = tokio::spawn(call(at, "a", "60s"));
        let request = provider.request().await;
        redis.kill();
        provider.reply(&request, json!("early")).await;
        let late: Vec<_> = (0..20).map(|_| tokio::spawn(call(at, "a", "60s"))).collect();
        redis.restart().await;
        for _ in &late {
            let request = provider.request().await;
            provider.reply(&request, json!("late")).await;
        }
        assert_eq!(early.await.unwrap(), (200, json!("early")), "{args:?}");
        for late in late {
            assert_eq!(late.await.unwrap(), (200, json!("late")), "{args:?}");
        }
        provider.quiet().await;
    }
}

/// What `$services` said last of each service.
async fn told_last(at: SocketAddr) -> BTreeMap<String, u64> {
    let (mut told, mut after) = (BTreeMap::new(), "earliest".to_owned());
    loop {
        let page = get(at, &format!("/v1/events?channel=$services&after={after}")).await;
        for event in page["events"].as_array().unwrap() {
            let (service, providers) = (&event["data"]["service"], &event["data"]["providers"]);
            told.insert(service.as_str().unwrap().to_owned(), providers.as_u64().unwrap());
        }
        after = page["next"].as_str().unwrap().to_owned();
        if page["more"] == false {
            return told;
        }
    }
}

async fn tells(at: SocketAddr, services: &[(&str, u64)]) {
    let expected: BTreeMap<String, u64> = services.iter().map(|(name, count)| ((*name).to_owned(), *count)).collect();
    until(&format!("{expected:?} is told"), async || told_last(at).await == expected).await;
}

/// The feed is right in the end, whatever Redis refused, and however long it was away.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn news_of_services_are_told_when_redis_takes_them_again() {
    let mut redis = Server::start(AOF).await;
    let url = redis.url();
    let nodes = [node(&url).await, node(&url).await];
    let mut providers = Vec::new();
    for (at, service) in [(0, "a"), (0, "b"), (1, "c"), (1, "d")] {
        let mut provider = Socket::open(nodes[at].address).await;
        provider.provide(service).await;
        providers.push(provider);
    }
    let at = nodes[1].address;
    tells(at, &[("a", 1), ("b", 1), ("c", 1), ("d", 1)]).await;
    // It has no memory left, and says so.
    redis.cli(&["CONFIG", "SET", "maxmemory", "1"]).await;
    let refused = redis.info("errorstat_OOM").await;
    drop(providers.remove(0));
    until("the news is refused", async || redis.info("errorstat_OOM").await != refused).await;
    redis.cli(&["CONFIG", "SET", "maxmemory", "0"]).await;
    tells(at, &[("a", 0), ("b", 1), ("c", 1), ("d", 1)]).await;
    // It is away for longer than nodes know of each other.
    let ready = async |status| {
        for node in &nodes {
            until("readiness changes", async || node.get("/health/ready").await.status == status).await;
        }
    };
    ready(200).await;
    redis.kill();
    drop(providers.remove(0));
    ready(503).await;
    drop(providers.remove(0));
    redis.restart().await;
    for node in &nodes {
        tells(node.address, &[("a", 0), ("b", 0), ("c", 0), ("d", 1)]).await;
    }
}

/// Answers calls until its node says that it leaves.
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

async fn a_provider_whose_node_leaves_goes_on_at_another<D: Deployed>() {
    let redis = D::start().await;
    let url = redis.url();
    let [from, to, caller] = [node(&url).await, node(&url).await, node(&url).await];
    let mut provider = Socket::open(from.address).await;
    provider.provide("a").await;
    knows(caller.address, "a").await;
    let serving = tokio::spawn(serve(provider));
    // Calls go on all the time, and none of them fails.
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
        until("calls are answered", async || calls.is_finished() || answered.load(SeqCst) >= from + count).await;
        assert!(!calls.is_finished(), "a call failed");
    };
    more(20).await;
    from.leave();
    // Its calls are over when it hears of it, and nobody knows it here any more.
    let old = serving.await.unwrap();
    let mut provider = Socket::open(to.address).await;
    provider.provide("a").await;
    let serving = tokio::spawn(serve(provider));
    more(20).await;
    assert_eq!(get(at, "/v1/services?prefix=a").await["services"][0]["providers"], 1);
    calls.abort();
    serving.abort();
    drop(old);
}

/// Calls until the provider gets to answer: a call that was on a link when it broke is told so, and is not made again.
async fn answers(at: SocketAddr, service: &'static str, provider: &mut Socket) {
    let mut last = Default::default();
    for _ in 0..60 {
        let pending = tokio::spawn(call(at, service, "2s"));
        if let Ok(request) = tokio::time::timeout(Duration::from_secs(2), provider.request()).await {
            provider.reply(&request, json!(1)).await;
        }
        last = pending.await.unwrap();
        if last == (200, json!(1)) {
            return;
        }
    }
    panic!("no call is answered: {last:?}");
}

async fn links_come_back_after_their_connections_and_after_redis<D: Deployed>() {
    let mut redis = D::start().await;
    let url = redis.url();
    let nodes = [node(&url).await, node(&url).await];
    let mut provider = Socket::open(nodes[0].address).await;
    provider.provide("a").await;
    knows(nodes[1].address, "a").await;
    answers(nodes[1].address, "a", &mut provider).await;
    for server in redis.servers() {
        server.cli(&["CLIENT", "KILL", "TYPE", "pubsub"]).await;
    }
    answers(nodes[1].address, "a", &mut provider).await;
    redis.servers().iter_mut().for_each(Server::kill);
    // What is here works on.
    let mut near = Socket::open(nodes[0].address).await;
    near.json(json!({ "jsonrpc": "2.0", "id": 1, "method": "a/x" })).await;
    let request = provider.request().await;
    provider.reply(&request, json!(2)).await;
    assert_eq!(near.next().await["result"], 2);
    for server in redis.servers() {
        server.restart().await;
    }
    answers(nodes[1].address, "a", &mut provider).await;
}

/// The connection for mail stays whole, but leads to a server that was replaced: others write to another.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn mail_is_not_waited_for_at_a_replaced_server() {
    let (old, new) = (Server::start(&[]).await, Server::start(&[]).await);
    let proxy = Proxy::start(old.port).await;
    let deaf = node(&proxy.url()).await;
    until("its mail is awaited", || async { old.cli(&["PUBSUB", "CHANNELS", "*:mail"]).await.contains("mail") }).await;
    proxy.lead_to(new.port);
    old.cli(&["CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes"]).await;
    let mut provider = Socket::open(deaf.address).await;
    provider.provide("s").await;
    let other = node(&new.url()).await;
    // It is told of at once, though all that the old server knew has to be told anew.
    knows(other.address, "s").await;
    until("it listens where others write", || async {
        new.cli(&["PUBSUB", "CHANNELS", "*:mail"]).await.lines().count() == 2
    })
    .await;
    let answering = tokio::spawn(async move {
        let request = provider.request().await;
        provider.reply(&request, json!("here")).await;
        provider
    });
    until("a call arrives", || async { call(other.address, "s", "5s").await.0 == 200 }).await;
    drop(answering.await.unwrap());
}
