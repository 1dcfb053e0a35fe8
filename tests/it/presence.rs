//! Presence as clients see it: leases of streams and sockets, lists, joins and leaves.

use std::time::Duration;

use serde_json::{Value, json};

use crate::support::{EventStream, PresenceReplay, Socket, Weir, eventually, weir};

async fn list(weir: &Weir, channel: &str) -> Value {
    weir.get(format!("/v1/presence?channel={channel}")).await.expect(200).json()
}

/// Waits until a channel has `count` members, and lists them.
async fn until(weir: &Weir, channel: &str, count: usize) -> Value {
    eventually(&format!("{count} members of {channel}"), async || list(weir, channel).await["count"] == count).await;
    list(weir, channel).await
}

fn names(list: &Value) -> Vec<&str> {
    list["members"].as_array().unwrap().iter().map(|member| member["client"].as_str().unwrap()).collect()
}

#[tokio::test]
async fn members_are_listed_and_announced() {
    let weir = weir().await;
    let mut watcher = weir.socket().await;
    watcher.call("weir.subscribe", json!({ "channels": ["$presence/chat"] })).await;
    assert_eq!(list(&weir, "chat").await["members"], json!([]));

    let one = EventStream::opened(
        weir.address,
        "channel=chat&channel=other&present=c1&info=%7B%22nick%22:%20%22%C3%A9%22%7D",
    )
    .await;
    let join = watcher.notification("weir.event").await;
    let mut two = weir.socket().await;
    two.call("weir.subscribe", json!({ "channels": ["chat"], "present": { "client": "c2" } })).await;
    let second = watcher.notification("weir.event").await;
    let listed = until(&weir, "chat", 2).await;
    let members = listed["members"].as_array().unwrap();
    assert_eq!((&join["type"], &join["data"]["members"]), (&json!("join"), &json!([members[0]])));
    assert_eq!(second["data"]["members"], json!([members[1]]));
    let since = members[0]["since"].as_u64().unwrap();
    assert_eq!(
        members[0],
        json!({ "client": "c1", "subject": "", "transport": "sse", "info": { "nick": "é" }, "since": since })
    );
    assert_eq!(members[1]["transport"], "ws");
    assert!(members[1].get("info").is_none());
    assert_eq!(listed["position"], format!("{}-{}", second["epoch"].as_str().unwrap(), second["offset"]));
    assert_eq!(until(&weir, "other", 1).await["members"][0]["client"], "c1");
    assert_eq!(two.call("weir.presence", json!({ "channel": "chat" })).await, listed);
    let counted = weir.get("/v1/presence?channel=chat&count=true").await.expect(200).json();
    assert_eq!(counted, json!({ "channel": "chat", "count": 2, "position": listed["position"] }));

    drop(one);
    let leave = watcher.notification("weir.event").await;
    assert_eq!(
        (&leave["type"], &leave["data"]),
        (&json!("leave"), &json!({ "members": [{ "client": "c1", "subject": "" }] }))
    );
    two.call("weir.unsubscribe", json!({ "channels": ["chat"] })).await;
    assert_eq!(watcher.notification("weir.event").await["data"]["members"][0]["client"], "c2");
    until(&weir, "other", 0).await;
    eventually("nothing is left", async || weir.node().presence.counts() == (0, 0, 0)).await;
    assert_eq!(weir.metric("weir_presence_leases"), 0);
    // The position of an empty list is a valid start for reading the log.
    let position = list(&weir, "chat").await["position"].as_str().unwrap().to_owned();
    assert_eq!(PresenceReplay::of(&weir, "chat", &position).await.list(), Vec::<&Value>::new());
}

#[tokio::test]
async fn connections_with_the_same_client_name_are_one_member() {
    let weir = weir().await;
    let first = EventStream::opened(weir.address, "channel=a&present=c&info=1").await;
    let alone = until(&weir, "a", 1).await;
    let mut second = Socket::open_at(weir.address, "/v1/ws?channel=a&present=c&info=1").await;
    let other = EventStream::opened(weir.address, "channel=a&present=d").await;
    let both = until(&weir, "a", 2).await;
    assert_eq!(names(&both), ["c", "d"]);
    assert_eq!(both["members"][0]["since"], alone["members"][0]["since"]);
    drop(first);
    drop(other);
    until(&weir, "a", 1).await;
    // The info of the latest connection applies and is announced as another join.
    second.call("weir.subscribe", json!({ "channels": ["a"], "present": { "client": "c", "info": [2] } })).await;
    let changed = async || list(&weir, "a").await["members"][0]["info"] == json!([2]);
    eventually("the member has the new info", changed).await;
    let now = list(&weir, "a").await;
    assert_eq!(now["members"][0]["since"], alone["members"][0]["since"]);
    let replay = PresenceReplay::of(&weir, "a", "earliest").await;
    assert_eq!(json!(replay.list()), now["members"]);
    // Another subscribe without `present` changes nothing.
    second.call("weir.subscribe", json!({ "channels": ["a"] })).await;
    assert_eq!(weir.node().presence.counts().0, 1);
    // Another name replaces the first.
    second.call("weir.subscribe", json!({ "channels": ["a"], "present": { "client": "e" } })).await;
    eventually("only the new name is a member", async || names(&list(&weir, "a").await) == ["e"]).await;
    drop(second);
    until(&weir, "a", 0).await;
}

#[tokio::test]
async fn a_quick_reconnect_is_not_announced() {
    let weir = weir().await;
    let mut held = EventStream::opened(weir.address, "channel=a&present=c").await;
    until(&weir, "a", 1).await;
    for _ in 0..20 {
        drop(held);
        held = EventStream::opened(weir.address, "channel=a&present=c").await;
    }
    // Connections shorter than 250 ms are not announced.
    for _ in 0..20 {
        drop(EventStream::opened(weir.address, "channel=a&present=guest").await);
    }
    let marker = EventStream::opened(weir.address, "channel=a&present=z").await;
    until(&weir, "a", 2).await;
    let replay = PresenceReplay::of(&weir, "a", "earliest").await;
    // On a machine that stalls for 250 ms more joins may be announced, but the list is the same.
    assert_eq!(replay.members.keys().collect::<Vec<_>>(), ["c", "z"]);
    assert!(replay.joins < 20, "{} joins", replay.joins);
    drop((held, marker));
}

#[tokio::test]
async fn ten_thousand_joins_and_leaves_are_announced_in_few_events() {
    let weir = weir().await;
    let mut watcher = weir.socket().await;
    watcher.call("weir.subscribe", json!({ "channels": ["$presence/hall"] })).await;
    // Leases without sockets: ten thousand sockets would measure the test and not weir.
    let presence = &weir.node().presence;
    let hall = weir::channel::Channel::parse("hall").unwrap();
    let leases: Vec<_> = (0..10_000)
        .map(|n| {
            let client = weir::presence::PresentClient::new(&format!("client-{n:05}"), None, 100).unwrap();
            presence.enter(&hall, &client, "", "ws").unwrap()
        })
        .collect();
    until(&weir, "hall", 10_000).await;
    let mut seen = PresenceReplay::default();
    while seen.members.len() < 10_000 {
        seen.take(&watcher.notification("weir.event").await);
    }
    assert!(seen.events < 100, "{} events", seen.events);
    // Pages cover the whole list.
    let (mut paged, mut page) = (Vec::new(), String::new());
    loop {
        let answer = weir.get(format!("/v1/presence?channel=hall&limit=999{page}")).await.expect(200).json();
        assert_eq!(answer["count"], 10_000);
        paged.extend(answer["members"].as_array().unwrap().clone());
        let Some(next) = answer.get("page") else { break };
        page = format!("&page={}", next.as_str().unwrap());
    }
    assert_eq!(json!(paged), json!(seen.list()));
    drop(leases);
    while !seen.members.is_empty() {
        seen.take(&watcher.notification("weir.event").await);
    }
    assert_eq!((seen.joins, seen.leaves), (10_000, 10_000));
    assert!(seen.events < 200, "{} events", seen.events);
    eventually("nothing is left", async || presence.counts() == (0, 0, 0)).await;
}

#[tokio::test]
async fn a_presence_list_equals_the_announcements_up_to_its_position() {
    let weir = weir().await;
    let hall = weir::channel::Channel::parse("hall").unwrap();
    let enter = |n: usize| {
        let client = weir::presence::PresentClient::new(&format!("client-{n:03}"), None, 100).unwrap();
        weir.node().presence.enter(&hall, &client, "", "ws").unwrap()
    };
    // More members than one event holds.
    let mut leases: Vec<_> = (0..900).map(enter).collect();
    let mut lists = Vec::new();
    let mut left = 20;
    while left > 0 {
        let list = list(&weir, "hall").await;
        match list["count"].as_u64().unwrap() {
            900 => leases.clear(),
            // Empty lists after the end have a position, too.
            0 if leases.is_empty() => left -= 1,
            _ => {}
        }
        lists.push(list);
    }
    let log = weir.get("/v1/events?channel=$presence/hall&after=earliest&limit=1000").await.expect(200).json();
    let mut events = log["events"].as_array().unwrap().iter().peekable();
    let (mut replay, mut last) = (PresenceReplay::default(), 0);
    for list in &lists {
        // An epoch may contain a hyphen.
        let (epoch, offset) = list["position"].as_str().unwrap().rsplit_once('-').unwrap();
        // Nothing has been announced yet.
        let offset = if epoch == "0" { 0 } else { offset.parse().unwrap() };
        assert!(offset >= last, "from {last} back to {offset}");
        last = offset;
        while let Some(event) = events.next_if(|event| event["offset"].as_u64().unwrap() <= offset) {
            replay.take(event);
        }
        // The list is the first page.
        let members = list["members"].as_array().unwrap();
        assert_eq!(list["count"], replay.members.len(), "at {offset}");
        assert!(members.iter().eq(replay.list().into_iter().take(members.len())), "at {offset}");
    }
    assert_eq!((replay.joins, replay.leaves, events.next()), (900, 900, None));
    assert!(replay.events > 2, "{} events", replay.events);
}

#[tokio::test]
async fn invalid_presence_requests_are_rejected() {
    let weir = weir().with(|config| (config.limits.presences, config.limits.present_info) = (2, 20)).await;
    for bad in [
        "/v1/sse?channel=a&present=",
        "/v1/sse?channel=a&info=1",
        "/v1/sse?channel=a&present=c&info=%7B",
        "/v1/sse?channel=$services&present=c",
        "/v1/sse?channel=$presence/a&present=c",
        "/v1/presence",
        "/v1/presence?channel=$services",
        "/v1/presence?channel=a&limit=0",
        "/v1/presence?channel=a&limit=1001",
        "/v1/presence?channel=a&page=x",
        "/v1/presence?channel=a&count=1",
        "/v1/presence?channel=a&prefix=b",
    ] {
        weir.get(bad).await.expect(400).expect_problem("invalid_params");
    }
    let long = "x".repeat(129);
    weir.get(format!("/v1/sse?channel=a&present={long}")).await.expect_problem("invalid_params");
    let long = "x".repeat(250);
    weir.get(format!("/v1/sse?channel={long}&present=c")).await.expect_problem("invalid_params");
    let problem = weir.get(format!("/v1/sse?channel=a&present=c&info=%22{long}%22")).await.expect_problem("too_large");
    assert_eq!(problem["limit"], "limits.present_info");
    weir.post("/v1/events?channel=$presence/a", "1").await.expect_problem("forbidden");
    // A rejected request joins none of its channels.
    let problem = weir.get("/v1/sse?channel=a&channel=b&channel=c&present=c").await.expect_problem("limit_reached");
    assert_eq!(problem["limit"], "limits.presences");
    let mut socket = weir.socket().await;
    let refused =
        socket.call_error("weir.subscribe", json!({ "channels": ["a", "b", "c"], "present": { "client": "c" } })).await;
    assert_eq!(refused["data"]["code"], "limit_reached");
    assert_eq!(weir.node().presence.counts().0, 0);
    assert_eq!(weir.metric("weir_subscriptions{transport=\"ws\"}"), 0);
    socket.call_error("weir.subscribe", json!({ "channels": ["$services"], "present": { "client": "c" } })).await;
    socket.call_error("weir.presence", json!({ "channel": "a", "limit": 5000 })).await;
    // HEAD starts no stream.
    weir.request("HEAD", "/v1/sse?channel=a&present=c").await.expect(200);
    assert_eq!(weir.node().presence.counts().0, 0);
}

/// A chat needs one stream for its events and its members, not two.
#[tokio::test]
async fn one_stream_shows_a_channel_and_its_members() {
    let weir = weir().await;
    let mut stream =
        EventStream::opened(weir.address, "channel=room&channel=$presence/room&channel=$services&present=ann").await;
    let join = stream.block().await.unwrap().json();
    assert_eq!((&join["channel"], &join["data"]["members"][0]["client"]), (&json!("$presence/room"), &json!("ann")));
    let mut socket = Socket::open_at(weir.address, "/v1/ws?channel=$presence/room&channel=room&present=bob").await;
    assert_eq!(stream.block().await.unwrap().json()["data"]["members"][0]["client"], "bob");
    let params = json!({ "channels": ["$presence/hall", "hall"], "present": { "client": "bob" } });
    socket.call("weir.subscribe", params).await;
    assert_eq!(names(&until(&weir, "room", 2).await), ["ann", "bob"]);
    assert_eq!(names(&until(&weir, "hall", 1).await), ["bob"]);
}

#[tokio::test]
async fn members_leave_before_the_node_stops() {
    let weir = weir().with(|config| config.drain.window = Duration::ZERO).await;
    let _held = EventStream::opened(weir.address, "channel=a&present=c").await;
    until(&weir, "a", 1).await;
    let (bus, presence) = (weir.bus().clone(), weir.node().presence.clone());
    weir.shut_down();
    weir.stopped().await;
    assert_eq!(presence.counts(), (0, 0, 0));
    let on = weir::channel::Channel::parse("$presence/a").unwrap();
    let limit = weir::bus::ReadLimit { events: 10, bytes: 100_000 };
    let page = bus.read(&on, weir::position::Start::Last(1), limit, None).await.unwrap();
    assert_eq!(page.events[0].kind_json(), Some("\"leave\""));
}
