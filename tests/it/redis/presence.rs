//! Presence and connections of several nodes, one of them a process of its own.

use rustix::process::Signal;
use serde_json::{Value, json};

use crate::support::{
    EventStream, MINUTE, PresenceReplay, Process, RedisDeployment, Request, Socket, eventually_within, get_json,
    redis::on_each_deployment, socket::members, weir_on,
};

on_each_deployment!(members_of_a_killed_process_are_announced_as_gone
    members_stay_while_redis_loses_the_sessions_of_their_nodes
    connections_of_several_processes_are_listed_and_kicked);

fn names(list: &Value) -> Vec<&str> {
    list["members"].as_array().unwrap().iter().map(|member| member["client"].as_str().unwrap()).collect()
}

/// Waits until every node lists exactly these clients, and asserts that all lists are equal.
async fn lists(at: &[std::net::SocketAddr], clients: &[&str]) {
    let mut first: Option<Value> = None;
    for at in at {
        let path = "/v1/presence?channel=chat";
        eventually_within(MINUTE, &format!("{clients:?} are listed"), async || {
            names(&get_json(*at, path).await) == clients
        })
        .await;
        let mut list = get_json(*at, path).await;
        assert_eq!(list["count"], clients.len());
        let members = list["members"].take();
        assert_eq!(*first.get_or_insert_with(|| members.clone()), members);
    }
}

async fn members_of_a_killed_process_are_announced_as_gone<D: RedisDeployment>() {
    let redis = D::start().await;
    let url = redis.url();
    let (local, killed) = (weir_on(&url).await, Process::start_on(&url));
    let remote = killed.address;
    let both = [local.address, remote];
    let ann = EventStream::opened(local.address, "channel=chat&present=ann").await;
    let mut bob = Socket::open(remote).await;
    bob.call("weir.subscribe", json!({ "channels": ["chat"], "present": { "client": "bob", "info": { "n": 1 } } }))
        .await;
    lists(&both, &["ann", "bob"]).await;
    let listed = get_json(remote, "/v1/presence?channel=chat").await;
    assert_eq!(members(&listed["members"][1]), ["client", "info", "since", "subject", "transport"]);
    drop(bob);
    lists(&both, &["ann"]).await;
    let _carl = EventStream::opened(remote, "channel=chat&present=carl").await;
    let _dora = EventStream::opened(remote, "channel=chat&present=dora").await;
    lists(&both, &["ann", "carl", "dora"]).await;
    // The members of the killed node are announced as gone once, and the log equals the list.
    drop(killed);
    lists(&both[..1], &["ann"]).await;
    let replay = PresenceReplay::of(&local, "chat", "earliest").await;
    assert_eq!(replay.members.keys().collect::<Vec<_>>(), ["ann"]);
    assert_eq!((replay.joins, replay.leaves), (4, 3));
    drop(ann);
    lists(&both[..1], &[]).await;
}

/// Session keys are lost while their nodes live: by eviction, in a failover, or if the clock of Redis is set forward.
async fn members_stay_while_redis_loses_the_sessions_of_their_nodes<D: RedisDeployment>() {
    let mut redis = D::start().await;
    let url = redis.url();
    let nodes = [weir_on(&url).await, weir_on(&url).await, weir_on(&url).await];
    let at = nodes.each_ref().map(|node| node.address);
    let _ann = EventStream::opened(at[0], "channel=chat&present=ann").await;
    let _bob = EventStream::opened(at[1], "channel=chat&present=bob").await;
    lists(&at, &["ann", "bob"]).await;
    let mut provider = nodes[1].socket().await;
    provider.call("weir.provide", json!({ "service": "own", "exclusive": true })).await;
    let mut other = nodes[2].socket().await;
    let own = json!({ "service": "own", "exclusive": true });
    let mut masters = Vec::new();
    for server in &*redis.servers() {
        if server.info("role").await.as_deref() == Some("master") {
            masters.push(server);
        }
    }
    let masters = &masters;
    // More often than once: right after they have connected, nodes do not draw conclusions from an absent key.
    for _ in 0..3 {
        for server in masters {
            for key in server.cli(&["KEYS", "weir:{n*"]).await.lines().filter(|key| !key.is_empty()) {
                server.cli(&["DEL", key]).await;
            }
        }
        assert_eq!(other.call_error("weir.provide", own.clone()).await["data"]["code"], "service_taken");
        eventually_within(MINUTE, "the nodes have written their sessions again", async || {
            let mut sessions = 0;
            for server in masters {
                let keys = server.cli(&["KEYS", "weir:{node:*"]).await;
                sessions += keys.lines().filter(|key| !key.is_empty()).count();
            }
            sessions == 3
        })
        .await;
    }
    lists(&at, &["ann", "bob"]).await;
    let replay = PresenceReplay::of(&nodes[0], "chat", "earliest").await;
    assert_eq!((replay.joins, replay.leaves), (2, 0));
    // The links between the nodes are as before.
    let listed = get_json(at[2], "/v1/connections").await;
    assert!(listed["silent"].is_null(), "{listed}");
    assert_eq!(listed["connections"].as_array().unwrap().len(), 4, "{listed}");
}

async fn connections_of_several_processes_are_listed_and_kicked<D: RedisDeployment>() {
    let redis = D::start().await;
    let url = redis.url();
    let (local, other) = (weir_on(&url).await, Process::start_on(&url));
    let remote = other.address;
    let mut near = Socket::open(local.address).await;
    let (mut one, mut two) = (Socket::open(remote).await, Socket::open(remote).await);
    for socket in [&mut near, &mut one, &mut two] {
        socket.call("weir.ping", json!({})).await;
    }
    one.call("weir.subscribe", json!({ "channels": ["only"] })).await;
    let list = async |at, query: &str| get_json(at, &format!("/v1/connections{query}")).await;
    for at in [local.address, remote] {
        eventually_within(MINUTE, "all are listed", async || {
            list(at, "").await["connections"].as_array().unwrap().len() == 3
        })
        .await;
    }
    let kick = async |query: &str| {
        let path = format!("/v1/connections?{query}");
        Request::new(local.address, "DELETE", path).await.expect(200).json()
    };
    let on_only = list(local.address, "?channel=only").await;
    assert_eq!(on_only["connections"].as_array().unwrap().len(), 1, "{on_only}");
    let id = on_only["connections"][0]["id"].as_str().unwrap();
    assert_eq!(kick(&format!("id={id}")).await, json!({ "kicked": 1 }));
    assert_eq!(one.closed().await, (4503, "kicked".to_owned()));
    // A node that does not answer is named, and clients of other nodes are kicked.
    let name = id.split('-').next().unwrap().to_owned();
    let all = list(local.address, "").await;
    let ids = all["connections"].as_array().unwrap().iter().map(|connection| connection["id"].as_str().unwrap());
    let (there, here): (Vec<_>, Vec<_>) = ids.filter(|other| *other != id).partition(|id| id.starts_with(&name));
    other.signal(Signal::STOP);
    for (id, kicked) in [(here[0], 1), (there[0], 0)] {
        let silent = kick(&format!("id={id}")).await;
        assert_eq!((&silent["kicked"], silent["silent"].as_array().unwrap().len()), (&json!(kicked), 1), "{silent}");
        assert!(silent["silent"][0].as_str().unwrap().starts_with(&name), "{silent} {id}");
    }
    assert_eq!(near.closed().await, (4503, "kicked".to_owned()));
    other.signal(Signal::CONT);
    // The node executes the kick when it continues.
    assert_eq!(two.closed().await, (4503, "kicked".to_owned()));
}
