//! What goes wrong with Redis, one fault at a time. The writer's log is held against every reader's: what was acknowledged
//! is delivered exactly in order, or announced as a gap.

use weir::{
    backend::redis::Ack,
    bus::{GapReason, Retention},
    channel::Channel,
    error::Code,
    position::{Position, Start},
};

use super::nodes::{ALL, KEEP, Node, Writer, draft, judge};
use crate::support::{
    MINUTE, RedisCluster, RedisSentinel, RedisServer,
    event::{channel, number},
    eventually_within,
    proxy::{ProxyMode, TcpProxy},
};

const AOF: &[&str] = &["--appendonly", "yes", "--appendfsync", "always"];

fn numbers(page: &weir::bus::LogPage) -> Vec<u64> {
    page.events.iter().map(|event| number(event)).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn events_reach_readers_of_every_node() {
    let redis = RedisServer::start(&[]).await;
    let (a, b) = (Node::start(&redis.url()).await, Node::start(&redis.url()).await);
    let (one, two) = (a.reader("c", Start::Now).await, b.reader("c", Start::Earliest).await);
    let writer = Writer::start(&a, "c");
    writer.writes(500).await;
    let late = b.reader("c", Start::Earliest).await;
    let told = writer.stop().await;
    for reader in [&one, &two, &late] {
        reader.sees(told.len() as u64).await;
        judge(&told, reader);
        assert_eq!(reader.gaps(), []);
    }
    // A position of one node is a position of the other.
    let at = told[249].what.as_ref().unwrap().position;
    assert_eq!(numbers(&b.read("c", Start::After(at)).await), (251..=told.len() as u64).collect::<Vec<_>>());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_restart_without_persistence_is_announced_as_a_reset() {
    let mut redis = RedisServer::start(&[]).await;
    let (a, b) = (Node::start(&redis.url()).await, Node::start(&redis.url()).await);
    let (here, there) = (a.reader("c", Start::Now).await, b.reader("c", Start::Now).await);
    let idle = b.reader("idle", Start::Now).await;
    a.publish("idle", 1).await.unwrap();
    idle.sees(1).await;
    let writer = Writer::start(&a, "c");
    writer.writes(50).await;
    redis.kill();
    writer.fails().await;
    redis.restart().await;
    writer.writes(50).await;
    let told = writer.stop().await;
    for reader in [&here, &there] {
        reader.sees(told.len() as u64).await;
        judge(&told, reader);
        assert!(reader.gaps().iter().any(|gap| gap.reason == GapReason::Reset), "{:?}", reader.gaps());
    }
    // Nobody writes there: the next who does finds a reader that is told.
    a.insist("idle", 2).await;
    idle.sees(2).await;
    assert_eq!(idle.gaps().len(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_restart_with_persistence_loses_nothing() {
    let mut redis = RedisServer::start(AOF).await;
    let (a, b) = (Node::start(&redis.url()).await, Node::start(&redis.url()).await);
    let reader = b.reader("c", Start::Now).await;
    let writer = Writer::start(&a, "c");
    writer.writes(50).await;
    redis.kill();
    writer.fails().await;
    redis.restart().await;
    writer.writes(50).await;
    let told = writer.stop().await;
    reader.sees(told.len() as u64).await;
    judge(&told, &reader);
    let gaps = reader.gaps();
    assert!(gaps.iter().all(|gap| gap.reason == GapReason::Failover && gap.missed.is_none()), "{gaps:?}");
    // Nothing was lost, so whoever reads both terms gets all of it.
    let (mut start, mut read) = (Start::Earliest, Vec::new());
    loop {
        let page = b.read("c", start).await;
        read.extend(numbers(&page));
        start = Start::After(page.next);
        if !page.more {
            break;
        }
    }
    let acknowledged = told.iter().filter(|told| told.what.is_ok()).map(|told| told.n);
    assert!(acknowledged.into_iter().all(|n| read.contains(&n)));
    assert!(read.is_sorted());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_paused_redis_loses_no_events() {
    let redis = RedisServer::start(&[]).await;
    let (a, b) = (Node::start(&redis.url()).await, Node::start(&redis.url()).await);
    let reader = b.reader("c", Start::Now).await;
    let writer = Writer::start(&a, "c");
    writer.writes(20).await;
    redis.pause();
    writer.fails().await;
    redis.resume();
    writer.writes(20).await;
    let told = writer.stop().await;
    reader.sees(told.len() as u64).await;
    judge(&told, &reader);
    assert_eq!(reader.gaps(), [], "it is the same server, with all it had");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_node_cut_off_from_redis_catches_up() {
    let redis = RedisServer::start(&[]).await;
    let proxy = TcpProxy::start(redis.port).await;
    let (a, b) = (Node::start(&redis.url()).await, Node::start(&proxy.redis_url()).await);
    let reader = b.reader("c", Start::Now).await;
    let writer = Writer::start(&a, "c");
    for wire in [ProxyMode::Close, ProxyMode::Blackhole] {
        writer.writes(20).await;
        proxy.set(wire);
        // More than the window of a node.
        writer.writes(400).await;
        assert!(matches!(b.publish("other", 1).await, Err(Code::BusUnavailable | Code::Unconfirmed)));
        proxy.set(ProxyMode::Forward);
    }
    writer.writes(20).await;
    let told = writer.stop().await;
    reader.sees(told.len() as u64).await;
    judge(&told, &reader);
    assert_eq!(reader.gaps(), [], "what it missed it looked up");
    assert!(b.metrics.value("weir_redis_reconnects_total{lane=\"events\"}") >= 1.0);
}

/// The wire of the connections stays whole, but at its end is a server that was replaced: nobody writes there any more.
#[tokio::test(flavor = "multi_thread")]
async fn a_replaced_server_that_stays_up_is_left() {
    let (old, new) = (RedisServer::start(&[]).await, RedisServer::start(&[]).await);
    let proxy = TcpProxy::start(old.port).await;
    let node = Node::start(&proxy.redis_url()).await;
    eventually_within(MINUTE, "the probe comes back", async || weir::bus::Log::ready(&*node.redis).is_ok()).await;
    // Only the connection of subscriptions stays behind.
    proxy.redirect(new.port);
    old.cli(&["CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes"]).await;
    let reader = node.reader("c", Start::Now).await;
    node.insist("c", 1).await;
    reader.sees(1).await;
    eventually_within(MINUTE, "it has moved", async || {
        new.cli(&["PUBSUB", "NUMSUB", "weir:{c}:e"]).await.ends_with('1')
    })
    .await;
}

/// The last writes are lost, and new events have taken their places before anybody looked.
#[tokio::test(flavor = "multi_thread")]
async fn lost_events_whose_offsets_were_reused_are_announced() {
    let master = RedisServer::start(&[]).await;
    let replica = RedisServer::start(&["--replicaof", "127.0.0.1", &master.port.to_string()]).await;
    eventually_within(MINUTE, "in step", async || replica.info("master_link_status").await.as_deref() == Some("up"))
        .await;
    let (to_a, to_b) = (TcpProxy::start(master.port).await, TcpProxy::start(master.port).await);
    let (a, b) = (Node::start(&to_a.redis_url()).await, Node::start(&to_b.redis_url()).await);
    for n in 1..=47 {
        a.publish("c", n).await.unwrap();
    }
    let reader = b.reader("c", Start::Earliest).await;
    let behind = b.read("c", Start::Last(2)).await.events[0].position();
    reader.sees(47).await;
    let offset = master.info("master_repl_offset").await.unwrap();
    eventually_within(MINUTE, "all is copied", async || {
        replica.info("slave_repl_offset").await.as_ref() >= Some(&offset)
    })
    .await;
    // From here on nothing is copied.
    replica.cli(&["REPLICAOF", "NO", "ONE"]).await;
    let lost: Vec<_> =
        [a.publish("c", 48).await, a.publish("c", 49).await, a.publish("c", 50).await].into_iter().flatten().collect();
    assert_eq!(lost.len(), 3, "acknowledged");
    reader.sees(50).await;

    to_b.set(ProxyMode::Blackhole);
    to_a.move_to(replica.port);
    eventually_within(MINUTE, "a has moved", async || {
        replica.cli(&["CLIENT", "LIST"]).await.contains("name=weir-commands")
    })
    .await;
    for n in 51..=60 {
        a.insist("c", n).await;
    }
    to_b.move_to(replica.port);

    reader.sees(60).await;
    assert_eq!(reader.numbers(), (1..=60).collect::<Vec<_>>(), "all that was placed again is seen");
    let [gap] = &reader.gaps()[..] else { panic!("{:?}", reader.gaps()) };
    assert_eq!((gap.reason, gap.after, gap.next.offset), (GapReason::Failover, Some(lost[2].position), 48));
    assert_ne!(gap.next.epoch, lost[2].position.epoch);
    // A client that had read lost events, and one that had not, resume on the other node.
    for (had, next, first) in [(lost[1].position, 48, 51), (lost[0].position, 48, 51)] {
        let page = a.read("c", Start::After(had)).await;
        let gap = page.gap.clone().unwrap();
        assert_eq!((gap.reason, gap.next.offset, numbers(&page)[0]), (GapReason::Failover, next, first));
    }
    let page = a.read("c", Start::After(behind)).await;
    assert_eq!(
        (numbers(&page), page.gap.is_none(), page.more),
        (vec![47], true, true),
        "the old term first, to its end"
    );
    let page = a.read("c", Start::After(page.next)).await;
    assert_eq!((numbers(&page)[0], page.gap.unwrap().reason), (51, GapReason::Failover));
    // The consumer that had committed a lost position goes back, never forward.
    a.bus.commit("job", &channel("c"), lost[2].position).await.unwrap();
    let fresh = a.read("c", Start::Last(1)).await.events[0].position();
    a.bus.commit("job", &channel("c"), fresh).await.unwrap();
    assert_eq!(a.bus.cursor("job", &channel("c")).await.unwrap(), Some(fresh));
}

/// Away and back: the same process is master again, without what it had before it was a replica.
#[tokio::test(flavor = "multi_thread")]
async fn a_master_that_was_a_replica_in_between_starts_a_new_term() {
    let (a, b) = (RedisServer::start(&[]).await, RedisServer::start(&[]).await);
    let follows = async |replica: &RedisServer, master: &RedisServer| {
        replica.cli(&["REPLICAOF", "127.0.0.1", &master.port.to_string()]).await;
        eventually_within(MINUTE, "in step", async || {
            replica.info("master_link_status").await.as_deref() == Some("up")
        })
        .await;
    };
    let node = Node::start(&a.url()).await;
    let reader = node.reader("c", Start::Now).await;
    for n in 1..=3 {
        node.publish("c", n).await.unwrap();
    }
    follows(&b, &a).await;
    b.cli(&["REPLICAOF", "NO", "ONE"]).await;
    let lost = [node.publish("c", 4).await.unwrap(), node.publish("c", 5).await.unwrap()];
    reader.sees(5).await;
    follows(&a, &b).await;
    eventually_within(MINUTE, "the node has seen it", async || node.publish("other", 1).await.is_err()).await;
    a.cli(&["REPLICAOF", "NO", "ONE"]).await;
    node.insist("c", 6).await;
    reader.sees(6).await;
    assert_eq!(reader.gaps().iter().map(|gap| gap.reason).collect::<Vec<_>>(), [GapReason::Failover]);
    let page = node.read("c", Start::After(lost[1].position)).await;
    assert_eq!((numbers(&page), page.gap.unwrap().reason), (vec![6], GapReason::Failover));
}

/// More terms in one life than are remembered: all of it can be read.
#[tokio::test(flavor = "multi_thread")]
async fn events_of_forgotten_terms_can_be_read() {
    let redis = RedisServer::start(&[]).await;
    let node = Node::start(&redis.url()).await;
    for n in 1..=12 {
        node.publish("c", n).await.unwrap();
        redis.cli(&["HSET", "weir:{c}:m", "g", "another"]).await;
    }
    let (mut start, mut read) = (Start::Earliest, Vec::new());
    loop {
        let page = node.read("c", start).await;
        assert!(page.gap.is_some() || !page.events.is_empty(), "an empty page, and more: {page:?}");
        read.extend(numbers(&page));
        start = Start::After(page.next);
        if !page.more {
            break;
        }
    }
    assert_eq!(read, (1..=12).collect::<Vec<_>>());
    let reader = node.reader("c", Start::Earliest).await;
    reader.sees(12).await;
    assert_eq!(reader.numbers(), read);
}

/// Somebody deletes entries of a stream: whoever needs them is told, and whoever does not reads on.
#[tokio::test(flavor = "multi_thread")]
async fn deleted_stream_entries_are_announced_as_a_gap() {
    let redis = RedisServer::start(&[]).await;
    let (a, b) = (Node::start(&redis.url()).await, Node::start(&redis.url()).await);
    let mut placed = Vec::new();
    for n in 1..=10 {
        placed.push(a.publish("c", n).await.unwrap());
    }
    redis.cli(&["XDEL", "weir:{c}:s", "5-0"]).await;
    let (before, behind) =
        (b.reader("c", Start::After(placed[0].position)).await, b.reader("c", Start::After(placed[8].position)).await);
    behind.sees(10).await;
    before.sees(10).await;
    assert_eq!((behind.numbers(), behind.gaps()), (vec![10], vec![]));
    assert!(!before.gaps().is_empty() && before.numbers().ends_with(&[6, 7, 8, 9, 10]), "{:?}", before.numbers());
}

/// Nobody writes after the failover, and the loss is announced all the same.
#[tokio::test(flavor = "multi_thread")]
async fn a_loss_is_announced_without_further_writes() {
    let mut redis = RedisServer::start(AOF).await;
    let node = Node::start(&redis.url()).await;
    let reader = node.reader("c", Start::Now).await;
    let placed = node.publish("c", 1).await.unwrap();
    reader.sees(1).await;
    redis.restart().await;
    eventually_within(MINUTE, "a gap", async || !reader.gaps().is_empty()).await;
    assert_eq!(reader.gaps()[0].reason, GapReason::Failover);
    let other = Node::start(&redis.url()).await;
    assert_eq!(other.read("c", Start::After(placed.position)).await.gap.unwrap().reason, GapReason::Failover);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_sentinel_failover_under_load_is_announced() {
    let mut sentinel = RedisSentinel::start().await;
    let (a, b) = (Node::start(&sentinel.url()).await, Node::start(&sentinel.url()).await);
    let (here, there) = (a.reader("c", Start::Now).await, b.reader("c", Start::Now).await);
    let writer = Writer::start(&a, "c");
    writer.writes(100).await;
    let old = sentinel.master().await;
    // The replicas come no further: a password that nobody asked for keeps them from connecting again.
    for (n, server) in sentinel.servers.iter().enumerate() {
        if n != old {
            server.cli(&["CONFIG", "SET", "masterauth", "wrong"]).await;
        }
    }
    sentinel.servers[old].cli(&["CLIENT", "KILL", "TYPE", "replica"]).await;
    writer.writes(50).await;
    sentinel.servers[old].kill();
    // Whether a publish fails meanwhile, or waits for the new master, is a matter of milliseconds.
    sentinel.failed_over(old).await;
    writer.writes(100).await;
    let told = writer.stop().await;
    for reader in [&here, &there] {
        reader.sees(told.len() as u64).await;
        judge(&told, reader);
        assert!(reader.gaps().iter().any(|gap| gap.reason == GapReason::Failover), "{:?}", reader.gaps());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn events_continue_after_a_slot_move_and_a_failover() {
    let mut cluster = RedisCluster::start(3, 3).await;
    let (a, b) = (Node::start(&cluster.url()).await, Node::start(&cluster.url()).await);
    let reader = b.reader("c", Start::Now).await;
    let writer = Writer::start(&a, "c");
    writer.writes(100).await;
    let slot = cluster.slot("weir:{c}:m").await;
    let from = cluster.owner(slot).await;
    cluster.move_slot(slot, (from + 1) % 3).await;
    writer.writes(100).await;
    let owner = cluster.owner(slot).await;
    assert_ne!(owner, from);
    cluster.servers[owner].kill();
    writer.writes(100).await;
    let told = writer.stop().await;
    reader.sees(told.len() as u64).await;
    judge(&told, &reader);
    assert!(reader.gaps().iter().all(|gap| gap.reason == GapReason::Failover), "{:?}", reader.gaps());
}

#[tokio::test(flavor = "multi_thread")]
async fn publishes_are_rejected_as_overloaded_when_redis_is_out_of_memory() {
    let redis = RedisServer::start(&[]).await;
    let node = Node::start(&redis.url()).await;
    let reader = node.reader("c", Start::Now).await;
    node.publish("c", 1).await.unwrap();
    redis.cli(&["CONFIG", "SET", "maxmemory", "1"]).await;
    assert_eq!(node.publish("c", 2).await, Err(Code::Overloaded));
    assert_eq!(node.publish("new", 2).await, Err(Code::Overloaded));
    assert_eq!(numbers(&node.read("c", Start::Earliest).await), [1], "it can be read");
    redis.cli(&["CONFIG", "SET", "maxmemory", "0"]).await;
    assert_eq!(node.publish("c", 3).await.unwrap().position.offset, 2);
    reader.sees(3).await;
    assert_eq!((reader.numbers(), reader.gaps()), (vec![1, 3], vec![]));
}

#[tokio::test(flavor = "multi_thread")]
async fn lost_scripts_and_connections_lose_no_events() {
    let redis = RedisServer::start(&[]).await;
    let (a, b) = (Node::start(&redis.url()).await, Node::start(&redis.url()).await);
    let reader = b.reader("c", Start::Now).await;
    let writer = Writer::start(&a, "c");
    for _ in 0..5 {
        writer.writes(20).await;
        redis.cli(&["SCRIPT", "FLUSH"]).await;
        for kind in ["pubsub", "normal"] {
            writer.writes(20).await;
            redis.cli(&["CLIENT", "KILL", "TYPE", kind, "SKIPME", "yes"]).await;
        }
    }
    writer.writes(20).await;
    let told = writer.stop().await;
    reader.sees(told.len() as u64).await;
    judge(&told, &reader);
    assert_eq!(reader.gaps(), [], "it is the same server, with all it had");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_publish_with_a_lost_reply_is_found_by_its_key() {
    let redis = RedisServer::start(&[]).await;
    let proxy = TcpProxy::start(redis.port).await;
    let (a, b) = (Node::start(&redis.url()).await, Node::start(&proxy.redis_url()).await);
    let reader = a.reader("c", Start::Now).await;
    b.publish("c", 1).await.unwrap();
    proxy.set(ProxyMode::HoldReplies);
    let (bus, c) = (b.bus.clone(), channel("c"));
    let lost = tokio::spawn(async move { bus.publish_one("me", &c, draft(2, Some("k"))).await });
    reader.sees(2).await;
    proxy.set(ProxyMode::Close);
    assert_eq!(lost.await.unwrap().unwrap_err().code(), Code::Unconfirmed);
    proxy.set(ProxyMode::Forward);
    let again = loop {
        match b.bus.publish_one("me", &channel("c"), draft(2, Some("k"))).await {
            Ok(placed) => break placed,
            Err(error) => assert_eq!(error.code(), Code::BusUnavailable),
        }
    };
    assert!(again.duplicate && again.position.offset == 2, "{again:?}");
    assert_eq!(a.bus.publish_one("me", &channel("c"), draft(3, Some("k"))).await.unwrap_err().code(), Code::KeyReused);
    assert_eq!(numbers(&a.read("c", Start::Earliest).await), [1, 2]);
}

/// As eviction does it: keys vanish, one without the other.
#[tokio::test(flavor = "multi_thread")]
async fn evicted_keys_are_announced_as_a_gap() {
    let redis = RedisServer::start(&[]).await;
    let node = Node::start(&redis.url()).await;
    for (name, keys) in [("m", "m"), ("s", "s"), ("both", "ms")] {
        let reader = node.reader(name, Start::Now).await;
        let mut placed = Vec::new();
        for n in 1..=10 {
            placed.push(node.publish(name, n).await.unwrap());
        }
        reader.sees(10).await;
        for key in keys.chars() {
            assert_eq!(redis.cli(&["DEL", &format!("weir:{{{name}}}:{key}")]).await, "1");
        }
        // Before anybody writes again.
        let gap = node.read(name, Start::After(placed[4].position)).await.gap.expect(name);
        assert!(matches!(gap.reason, GapReason::Reset | GapReason::Trimmed), "{gap:?}");
        for n in 11..=12 {
            node.publish(name, n).await.unwrap();
        }
        reader.sees(12).await;
        assert_eq!(reader.numbers(), (1..=12).collect::<Vec<_>>());
        let page = node.read(name, Start::After(placed[4].position)).await;
        assert!(page.gap.is_some() && numbers(&page) == [11, 12], "{name}: {page:?}");
        let had_all = node.read(name, Start::After(placed[9].position)).await;
        assert_eq!(numbers(&had_all), [11, 12]);
        assert_eq!(had_all.gap.is_none(), keys == "s", "{name}: a new life cannot know what it had");
        assert_eq!(numbers(&node.read(name, Start::Earliest).await), [11, 12]);
    }
}

/// What is published while nobody is subscribed is looked up, by all at once and only once.
#[tokio::test(flavor = "multi_thread")]
async fn many_readers_share_their_reads() {
    let redis = RedisServer::start(&[]).await;
    let (a, b) = (Node::start(&redis.url()).await, Node::start(&redis.url()).await);
    for n in 1..=1000 {
        a.publish("c", n).await.unwrap();
    }
    let before = redis.calls("evalsha").await;
    let opening = (0..200).map(|_| b.reader("c", Start::Earliest));
    let readers = futures_util::future::join_all(opening).await;
    for reader in &readers {
        reader.sees(1000).await;
        assert_eq!((reader.numbers().len(), reader.gaps()), (1000, vec![]));
    }
    let looked = redis.calls("evalsha").await - before;
    assert!(looked < 200, "{looked} reads for 200 readers of 1000 events");
    drop(readers);
    eventually_within(MINUTE, "readers are given back", async || b.topics.readers() == 0).await;
    eventually_within(MINUTE, "the channel is let go of", async || {
        redis.cli(&["PUBSUB", "CHANNELS", "weir:{c}:e"]).await.is_empty()
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn channel_names_with_braces_and_wildcards_work_in_a_cluster() {
    let cluster = RedisCluster::start(3, 0).await;
    let (a, b) = (Node::start(&cluster.url()).await, Node::start(&cluster.url()).await);
    let names = ["{a}", "}{", "{}", "{a}{b}", "%7b", "a}", "{", "*[x]?\\", "ä/€"];
    for name in names {
        let reader = b.reader(name, Start::Now).await;
        let batch = (1..=3).map(|n| (channel(name), draft(n, (n == 2).then_some("k")))).collect();
        assert_eq!(a.bus.publish("me", batch).await.unwrap().len(), 3);
        reader.sees(3).await;
        a.bus
            .commit("{c}", &channel(name), Position { offset: 2, ..b.bus.head(&channel(name)).await.unwrap() })
            .await
            .unwrap();
    }
    let listed = b.bus.list("", None, 100).await.unwrap();
    let mut sorted: Vec<Channel> = names.iter().map(|name| channel(name)).collect();
    sorted.sort();
    assert_eq!(listed.into_iter().map(|info| info.channel).collect::<Vec<_>>(), sorted);
    assert_eq!(b.bus.list("{a", None, 100).await.unwrap().len(), 2);
    assert_eq!(b.bus.consumer("{c}").await.unwrap().unwrap().cursors.len(), names.len());
    for name in names {
        a.bus.remove(&channel(name), None).await.unwrap();
    }
    assert!(b.bus.list("", None, 100).await.unwrap().is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn replicated_publishes_are_confirmed_by_a_replica() {
    let master = RedisServer::start(&[]).await;
    let node = Node::with(&master.url(), KEEP, Ack::Replicated).await;
    assert_eq!(node.publish("c", 1).await, Err(Code::Unconfirmed), "there is no replica");
    let replica = RedisServer::start(&["--replicaof", "127.0.0.1", &master.port.to_string()]).await;
    eventually_within(MINUTE, "in step", async || replica.info("master_link_status").await.as_deref() == Some("up"))
        .await;
    // With its first replica a master begins anew: nobody can tell that from having been a replica itself. Both
    // connections have to find out.
    let first = Start::After(node.read("c", Start::Earliest).await.events[0].position());
    eventually_within(MINUTE, "a term ends", async || node.read("c", first).await.gap.is_some()).await;
    eventually_within(MINUTE, "a replica is waited for", async || node.publish("d", 1).await.is_ok()).await;
    let placed = futures_util::future::join_all((2..=100).map(|n| node.publish("c", n))).await;
    assert!(placed.iter().all(Result::is_ok), "{placed:?}");
    // Whoever was answered is there, though nobody waited for it here.
    assert_eq!(replica.cli(&["XLEN", "weir:{c}:s"]).await, "100");
    assert_eq!(node.bus.read(&channel("c"), Start::Last(99), ALL, None).await.unwrap().events.len(), 99);
}

/// In the middle of an update: a node that keeps less cuts nobody's log, whoever writes.
#[tokio::test(flavor = "multi_thread")]
async fn a_node_with_shorter_retention_trims_nothing_others_keep() {
    let redis = RedisServer::start(&[]).await;
    let less = Retention { count: 100, ..KEEP };
    let (a, b) = (Node::start(&redis.url()).await, Node::with(&redis.url(), less, Ack::Stored).await);
    let there = b.reader("c", Start::Now).await;
    let mut placed = Vec::new();
    for n in 1..=500 {
        placed.push(a.publish("c", n).await.unwrap().position);
    }
    for n in 501..=700 {
        b.publish("c", n).await.unwrap();
    }
    there.sees(700).await;
    for node in [&a, &b] {
        let late = node.reader("c", Start::After(placed[9])).await;
        late.sees(700).await;
        assert_eq!((late.numbers(), late.gaps()), ((11..=700).collect(), vec![]));
    }
    assert_eq!((there.numbers(), there.gaps()), ((1..=700).collect(), vec![]));
    // Alone, it would have kept what its own settings say.
    let another = RedisServer::start(&[]).await;
    let alone = Node::with(&another.url(), less, Ack::Stored).await;
    for n in 1..=300 {
        alone.insist("c", n).await;
    }
    assert_eq!(numbers(&alone.read("c", Start::Earliest).await), (201..=300).collect::<Vec<_>>());
}
