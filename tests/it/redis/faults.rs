//! Failures of Redis, one at a time. The results of a writer are compared with what every reader received: acknowledged
//! events are delivered in order, or announced as a gap.

use weir::{
    backend::redis::Ack,
    bus::{GapReason, Retention},
    channel::Channel,
    error::Code,
    position::{Position, Start},
};

use super::bus_node::{ALL, BusNode, BusWriter, KEEP, draft, judge};
use crate::support::{
    MINUTE, RedisCluster, RedisSentinel, RedisServer,
    event::{channel, number},
    eventually_within,
    proxy::{ProxyMode, TcpProxy},
    redis::AOF,
};

fn numbers(page: &weir::bus::LogPage) -> Vec<u64> {
    page.events.iter().map(|event| number(event)).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn events_reach_readers_of_every_node() {
    let redis = RedisServer::start(&[]).await;
    let (a, b) = (BusNode::start(&redis.url()).await, BusNode::start(&redis.url()).await);
    let (one, two) = (a.reader("c", Start::Now).await, b.reader("c", Start::Earliest).await);
    let writer = BusWriter::start(&a, "c");
    writer.writes(500).await;
    let late = b.reader("c", Start::Earliest).await;
    let results = writer.stop().await;
    for reader in [&one, &two, &late] {
        reader.receives(results.len() as u64).await;
        judge(&results, reader);
        assert_eq!(reader.gaps(), []);
    }
    // Positions are valid on every node.
    let at = results[249].result.as_ref().unwrap().position;
    assert_eq!(numbers(&b.read("c", Start::After(at)).await), (251..=results.len() as u64).collect::<Vec<_>>());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_restart_without_persistence_is_announced_as_a_reset() {
    let mut redis = RedisServer::start(&[]).await;
    let (a, b) = (BusNode::start(&redis.url()).await, BusNode::start(&redis.url()).await);
    let (local, remote) = (a.reader("c", Start::Now).await, b.reader("c", Start::Now).await);
    let idle = b.reader("idle", Start::Now).await;
    a.publish("idle", 1).await.unwrap();
    idle.receives(1).await;
    let writer = BusWriter::start(&a, "c");
    writer.writes(50).await;
    redis.kill();
    writer.fails().await;
    redis.restart().await;
    writer.writes(50).await;
    let results = writer.stop().await;
    for reader in [&local, &remote] {
        reader.receives(results.len() as u64).await;
        judge(&results, reader);
        assert!(reader.gaps().iter().any(|gap| gap.reason == GapReason::Reset), "{:?}", reader.gaps());
    }
    // The reader of a channel without writes receives the gap with the next event.
    a.publish_until_accepted("idle", 2).await;
    idle.receives(2).await;
    assert_eq!(idle.gaps().len(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_restart_with_persistence_loses_nothing() {
    let mut redis = RedisServer::start(AOF).await;
    let (a, b) = (BusNode::start(&redis.url()).await, BusNode::start(&redis.url()).await);
    let reader = b.reader("c", Start::Now).await;
    let writer = BusWriter::start(&a, "c");
    writer.writes(50).await;
    redis.kill();
    writer.fails().await;
    redis.restart().await;
    writer.writes(50).await;
    let results = writer.stop().await;
    reader.receives(results.len() as u64).await;
    judge(&results, &reader);
    let gaps = reader.gaps();
    assert!(gaps.iter().all(|gap| gap.reason == GapReason::Failover && gap.missed.is_none()), "{gaps:?}");
    // Nothing was lost, so a reader of both terms receives everything.
    let (mut start, mut read) = (Start::Earliest, Vec::new());
    loop {
        let page = b.read("c", start).await;
        read.extend(numbers(&page));
        start = Start::After(page.next);
        if !page.more {
            break;
        }
    }
    let acknowledged = results.iter().filter(|publish| publish.result.is_ok()).map(|publish| publish.n);
    assert!(acknowledged.into_iter().all(|n| read.contains(&n)));
    assert!(read.is_sorted());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_paused_redis_loses_no_events() {
    let redis = RedisServer::start(&[]).await;
    let (a, b) = (BusNode::start(&redis.url()).await, BusNode::start(&redis.url()).await);
    let reader = b.reader("c", Start::Now).await;
    let writer = BusWriter::start(&a, "c");
    writer.writes(20).await;
    redis.pause();
    writer.fails().await;
    redis.resume();
    writer.writes(20).await;
    let results = writer.stop().await;
    reader.receives(results.len() as u64).await;
    judge(&results, &reader);
    assert_eq!(reader.gaps(), [], "the same server still has all data");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_node_cut_off_from_redis_catches_up() {
    let redis = RedisServer::start(&[]).await;
    let proxy = TcpProxy::start(redis.port).await;
    let (a, b) = (BusNode::start(&redis.url()).await, BusNode::start(&proxy.redis_url()).await);
    let reader = b.reader("c", Start::Now).await;
    let writer = BusWriter::start(&a, "c");
    for wire in [ProxyMode::Close, ProxyMode::Blackhole] {
        writer.writes(20).await;
        proxy.set(wire);
        // More events than a node keeps in memory.
        writer.writes(400).await;
        assert!(matches!(b.publish("other", 1).await, Err(Code::BusUnavailable | Code::Unconfirmed)));
        proxy.set(ProxyMode::Forward);
    }
    writer.writes(20).await;
    let results = writer.stop().await;
    reader.receives(results.len() as u64).await;
    judge(&results, &reader);
    assert_eq!(reader.gaps(), [], "what it missed it checked up");
    assert!(b.metrics.value("weir_redis_reconnects_total{lane=\"events\"}") >= 1.0);
}

/// The connection stays open, but to a server that was replaced and receives no more writes.
#[tokio::test(flavor = "multi_thread")]
async fn a_replaced_server_that_stays_up_is_left() {
    let (old, new) = (RedisServer::start(&[]).await, RedisServer::start(&[]).await);
    let proxy = TcpProxy::start(old.port).await;
    let node = BusNode::start(&proxy.redis_url()).await;
    eventually_within(MINUTE, "the probe is received", async || weir::bus::Log::ready(&*node.redis).is_ok()).await;
    // Only the subscription connection remains on the old server.
    proxy.redirect(new.port);
    old.cli(&["CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes"]).await;
    let reader = node.reader("c", Start::Now).await;
    node.publish_until_accepted("c", 1).await;
    reader.receives(1).await;
    eventually_within(MINUTE, "the subscription has moved", async || {
        new.cli(&["PUBSUB", "NUMSUB", "weir:{c}:e"]).await.ends_with('1')
    })
    .await;
}

/// The last writes are lost, and new events have reused their offsets before any reader noticed.
#[tokio::test(flavor = "multi_thread")]
async fn lost_events_whose_offsets_were_reused_are_announced() {
    let master = RedisServer::start(&[]).await;
    let replica = RedisServer::start(&["--replicaof", "127.0.0.1", &master.port.to_string()]).await;
    eventually_within(MINUTE, "the replica is in sync", async || {
        replica.info("master_link_status").await.as_deref() == Some("up")
    })
    .await;
    let (to_a, to_b) = (TcpProxy::start(master.port).await, TcpProxy::start(master.port).await);
    let (a, b) = (BusNode::start(&to_a.redis_url()).await, BusNode::start(&to_b.redis_url()).await);
    for n in 1..=47 {
        a.publish("c", n).await.unwrap();
    }
    let reader = b.reader("c", Start::Earliest).await;
    let behind = b.read("c", Start::Last(2)).await.events[0].position();
    reader.receives(47).await;
    let offset = master.info("master_repl_offset").await.unwrap();
    eventually_within(MINUTE, "everything is replicated", async || {
        replica.info("slave_repl_offset").await.as_ref() >= Some(&offset)
    })
    .await;
    // From here on nothing is replicated.
    replica.cli(&["REPLICAOF", "NO", "ONE"]).await;
    let lost: Vec<_> =
        [a.publish("c", 48).await, a.publish("c", 49).await, a.publish("c", 50).await].into_iter().flatten().collect();
    assert_eq!(lost.len(), 3, "acknowledged");
    reader.receives(50).await;

    to_b.set(ProxyMode::Blackhole);
    to_a.move_to(replica.port);
    eventually_within(MINUTE, "node a has moved", async || {
        replica.cli(&["CLIENT", "LIST"]).await.contains("name=weir-commands")
    })
    .await;
    for n in 51..=60 {
        a.publish_until_accepted("c", n).await;
    }
    to_b.move_to(replica.port);

    reader.receives(60).await;
    assert_eq!(reader.numbers(), (1..=60).collect::<Vec<_>>(), "all events published again are received");
    let [gap] = &reader.gaps()[..] else { panic!("{:?}", reader.gaps()) };
    assert_eq!((gap.reason, gap.after, gap.next.offset), (GapReason::Failover, Some(lost[2].position), 48));
    assert_ne!(gap.next.epoch, lost[2].position.epoch);
    // Clients that had read lost events resume on the other node.
    for (had, next, first) in [(lost[1].position, 48, 51), (lost[0].position, 48, 51)] {
        let page = a.read("c", Start::After(had)).await;
        let gap = page.gap.clone().unwrap();
        assert_eq!((gap.reason, gap.next.offset, numbers(&page)[0]), (GapReason::Failover, next, first));
    }
    let page = a.read("c", Start::After(behind)).await;
    assert_eq!(
        (numbers(&page), page.gap.is_none(), page.more),
        (vec![47], true, true),
        "the old term comes first, to its end"
    );
    let page = a.read("c", Start::After(page.next)).await;
    assert_eq!((numbers(&page)[0], page.gap.unwrap().reason), (51, GapReason::Failover));
    // A consumer that had committed a lost position continues at the new term.
    a.bus.commit("job", &channel("c"), lost[2].position).await.unwrap();
    let fresh = a.read("c", Start::Last(1)).await.events[0].position();
    a.bus.commit("job", &channel("c"), fresh).await.unwrap();
    assert_eq!(a.bus.cursor("job", &channel("c")).await.unwrap(), Some(fresh));
}

/// The same process is master again, without the data that it had before it was a replica.
#[tokio::test(flavor = "multi_thread")]
async fn a_master_that_was_a_replica_in_between_starts_a_new_term() {
    let (a, b) = (RedisServer::start(&[]).await, RedisServer::start(&[]).await);
    let follows = async |replica: &RedisServer, master: &RedisServer| {
        replica.cli(&["REPLICAOF", "127.0.0.1", &master.port.to_string()]).await;
        eventually_within(MINUTE, "the replica is in sync", async || {
            replica.info("master_link_status").await.as_deref() == Some("up")
        })
        .await;
    };
    // With its first replica a master changes its replication id, which begins a term by itself.
    follows(&b, &a).await;
    let node = BusNode::start(&a.url()).await;
    let reader = node.reader("c", Start::Now).await;
    for n in 1..=3 {
        node.publish("c", n).await.unwrap();
    }
    let offset = a.info("master_repl_offset").await.unwrap();
    eventually_within(MINUTE, "everything is replicated", async || {
        b.info("slave_repl_offset").await.as_ref() >= Some(&offset)
    })
    .await;
    b.cli(&["REPLICAOF", "NO", "ONE"]).await;
    let lost = [node.publish("c", 4).await.unwrap(), node.publish("c", 5).await.unwrap()];
    reader.receives(5).await;
    follows(&a, &b).await;
    eventually_within(MINUTE, "the node has noticed the replica", async || node.publish("other", 1).await.is_err())
        .await;
    a.cli(&["REPLICAOF", "NO", "ONE"]).await;
    node.publish_until_accepted("c", 6).await;
    reader.receives(6).await;
    assert_eq!(reader.gaps().iter().map(|gap| gap.reason).collect::<Vec<_>>(), [GapReason::Failover]);
    let page = node.read("c", Start::After(lost[1].position)).await;
    assert_eq!((numbers(&page), page.gap.unwrap().reason), (vec![6], GapReason::Failover));
}

/// A log with more terms than are remembered can be read completely.
#[tokio::test(flavor = "multi_thread")]
async fn events_of_forgotten_terms_can_be_read() {
    let redis = RedisServer::start(&[]).await;
    let node = BusNode::start(&redis.url()).await;
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
    reader.receives(12).await;
    assert_eq!(reader.numbers(), read);
}

/// Entries of a stream are deleted: readers that need them receive a gap, others are not affected.
#[tokio::test(flavor = "multi_thread")]
async fn deleted_stream_entries_are_announced_as_a_gap() {
    let redis = RedisServer::start(&[]).await;
    let (a, b) = (BusNode::start(&redis.url()).await, BusNode::start(&redis.url()).await);
    let mut placed = Vec::new();
    for n in 1..=10 {
        placed.push(a.publish("c", n).await.unwrap());
    }
    redis.cli(&["XDEL", "weir:{c}:s", "5-0"]).await;
    let (before, behind) =
        (b.reader("c", Start::After(placed[0].position)).await, b.reader("c", Start::After(placed[8].position)).await);
    behind.receives(10).await;
    before.receives(10).await;
    assert_eq!((behind.numbers(), behind.gaps()), (vec![10], vec![]));
    assert!(!before.gaps().is_empty() && before.numbers().ends_with(&[6, 7, 8, 9, 10]), "{:?}", before.numbers());
}

/// The loss is announced although no event is published after the failover.
#[tokio::test(flavor = "multi_thread")]
async fn a_loss_is_announced_without_further_writes() {
    let mut redis = RedisServer::start(AOF).await;
    let node = BusNode::start(&redis.url()).await;
    let reader = node.reader("c", Start::Now).await;
    let placed = node.publish("c", 1).await.unwrap();
    reader.receives(1).await;
    redis.restart().await;
    eventually_within(MINUTE, "the reader receives a gap", async || !reader.gaps().is_empty()).await;
    assert_eq!(reader.gaps()[0].reason, GapReason::Failover);
    let other = BusNode::start(&redis.url()).await;
    assert_eq!(other.read("c", Start::After(placed.position)).await.gap.unwrap().reason, GapReason::Failover);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_sentinel_failover_under_load_is_announced() {
    let mut sentinel = RedisSentinel::start().await;
    let (a, b) = (BusNode::start(&sentinel.url()).await, BusNode::start(&sentinel.url()).await);
    let (local, remote) = (a.reader("c", Start::Now).await, b.reader("c", Start::Now).await);
    let writer = BusWriter::start(&a, "c");
    writer.writes(100).await;
    let old = sentinel.master().await;
    // A wrong password keeps the replicas from reconnecting, so that they fall behind.
    for (n, server) in sentinel.servers.iter().enumerate() {
        if n != old {
            server.cli(&["CONFIG", "SET", "masterauth", "wrong"]).await;
        }
    }
    sentinel.servers[old].cli(&["CLIENT", "KILL", "TYPE", "replica"]).await;
    writer.writes(50).await;
    sentinel.servers[old].kill();
    // A publish may fail during the failover or wait for the new master, depending on milliseconds.
    sentinel.failed_over(old).await;
    writer.writes(100).await;
    let results = writer.stop().await;
    for reader in [&local, &remote] {
        reader.receives(results.len() as u64).await;
        judge(&results, reader);
        assert!(reader.gaps().iter().any(|gap| gap.reason == GapReason::Failover), "{:?}", reader.gaps());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn events_continue_after_a_slot_move_and_a_failover() {
    let mut cluster = RedisCluster::start(3, 3).await;
    let (a, b) = (BusNode::start(&cluster.url()).await, BusNode::start(&cluster.url()).await);
    let reader = b.reader("c", Start::Now).await;
    let writer = BusWriter::start(&a, "c");
    writer.writes(100).await;
    let slot = cluster.slot("weir:{c}:m").await;
    let from = cluster.owner(slot).await;
    cluster.move_slot(slot, (from + 1) % 3).await;
    writer.writes(100).await;
    let owner = cluster.owner(slot).await;
    assert_ne!(owner, from);
    cluster.servers[owner].kill();
    writer.writes(100).await;
    let results = writer.stop().await;
    reader.receives(results.len() as u64).await;
    judge(&results, &reader);
    assert!(reader.gaps().iter().all(|gap| gap.reason == GapReason::Failover), "{:?}", reader.gaps());
}

#[tokio::test(flavor = "multi_thread")]
async fn publishes_are_rejected_as_overloaded_when_redis_is_out_of_memory() {
    let redis = RedisServer::start(&[]).await;
    let node = BusNode::start(&redis.url()).await;
    let reader = node.reader("c", Start::Now).await;
    node.publish("c", 1).await.unwrap();
    redis.cli(&["CONFIG", "SET", "maxmemory", "1"]).await;
    assert_eq!(node.publish("c", 2).await, Err(Code::Overloaded));
    assert_eq!(node.publish("new", 2).await, Err(Code::Overloaded));
    assert_eq!(numbers(&node.read("c", Start::Earliest).await), [1], "reads still work");
    redis.cli(&["CONFIG", "SET", "maxmemory", "0"]).await;
    assert_eq!(node.publish("c", 3).await.unwrap().position.offset, 2);
    reader.receives(3).await;
    assert_eq!((reader.numbers(), reader.gaps()), (vec![1, 3], vec![]));
}

#[tokio::test(flavor = "multi_thread")]
async fn lost_scripts_and_connections_lose_no_events() {
    let redis = RedisServer::start(&[]).await;
    let (a, b) = (BusNode::start(&redis.url()).await, BusNode::start(&redis.url()).await);
    let reader = b.reader("c", Start::Now).await;
    let writer = BusWriter::start(&a, "c");
    for _ in 0..5 {
        writer.writes(20).await;
        redis.cli(&["SCRIPT", "FLUSH"]).await;
        for kind in ["pubsub", "normal"] {
            writer.writes(20).await;
            redis.cli(&["CLIENT", "KILL", "TYPE", kind, "SKIPME", "yes"]).await;
        }
    }
    writer.writes(20).await;
    let results = writer.stop().await;
    reader.receives(results.len() as u64).await;
    judge(&results, &reader);
    assert_eq!(reader.gaps(), [], "the same server still has all data");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_publish_with_a_lost_reply_is_found_by_its_key() {
    let redis = RedisServer::start(&[]).await;
    let proxy = TcpProxy::start(redis.port).await;
    let (a, b) = (BusNode::start(&redis.url()).await, BusNode::start(&proxy.redis_url()).await);
    let reader = a.reader("c", Start::Now).await;
    b.publish("c", 1).await.unwrap();
    proxy.set(ProxyMode::HoldReplies);
    let (bus, c) = (b.bus.clone(), channel("c"));
    let lost = tokio::spawn(async move { bus.publish_one("me", &c, draft(2, Some("k"))).await });
    reader.receives(2).await;
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

/// The owner of a slot on its way names the next one by an address, by its port alone, or by an unknown host.
#[tokio::test(flavor = "multi_thread")]
async fn a_channel_whose_slot_is_moving_is_written_and_read() {
    let cluster = RedisCluster::start(3, 0).await;
    for endpoint in ["ip", "unknown-endpoint", "hostname"] {
        for server in &cluster.servers {
            server.cli(&["CONFIG", "SET", "cluster-preferred-endpoint-type", endpoint]).await;
        }
        let node = BusNode::start(&cluster.url()).await;
        let reader = node.reader(endpoint, Start::Earliest).await;
        node.publish(endpoint, 1).await.unwrap();
        let slot = cluster.slot(&format!("{{{endpoint}}}")).await;
        let to = (cluster.owner(slot).await + 1) % 3;
        cluster.begin_move(slot, to).await;
        node.publish(endpoint, 2).await.unwrap();
        assert_eq!(node.read(endpoint, Start::Last(1)).await.events.len(), 1);
        cluster.move_slot(slot, to).await;
        node.publish_until_accepted(endpoint, 3).await;
        reader.receives(3).await;
        assert_eq!(reader.numbers(), [1, 2, 3], "{endpoint}");
    }
}

/// Keys are deleted one without the other, as by eviction.
#[tokio::test(flavor = "multi_thread")]
async fn evicted_keys_are_announced_as_a_gap() {
    let redis = RedisServer::start(&[]).await;
    let node = BusNode::start(&redis.url()).await;
    for (name, keys) in [("m", "m"), ("s", "s"), ("both", "ms")] {
        let reader = node.reader(name, Start::Now).await;
        let mut placed = Vec::new();
        for n in 1..=10 {
            placed.push(node.publish(name, n).await.unwrap());
        }
        reader.receives(10).await;
        for key in keys.chars() {
            assert_eq!(redis.cli(&["DEL", &format!("weir:{{{name}}}:{key}")]).await, "1");
        }
        // Before the next write.
        let gap = node.read(name, Start::After(placed[4].position)).await.gap.expect(name);
        assert!(matches!(gap.reason, GapReason::Reset | GapReason::Trimmed), "{gap:?}");
        for n in 11..=12 {
            node.publish(name, n).await.unwrap();
        }
        reader.receives(12).await;
        assert_eq!(reader.numbers(), (1..=12).collect::<Vec<_>>());
        let page = node.read(name, Start::After(placed[4].position)).await;
        assert!(page.gap.is_some() && numbers(&page) == [11, 12], "{name}: {page:?}");
        let had_all = node.read(name, Start::After(placed[9].position)).await;
        assert_eq!(numbers(&had_all), [11, 12]);
        assert_eq!(had_all.gap.is_none(), keys == "s", "{name}: a new life cannot know what it had");
        assert_eq!(numbers(&node.read(name, Start::Earliest).await), [11, 12]);
    }
}

/// Events published without a subscriber are read once for all readers.
#[tokio::test(flavor = "multi_thread")]
async fn many_readers_share_their_reads() {
    let redis = RedisServer::start(&[]).await;
    let (a, b) = (BusNode::start(&redis.url()).await, BusNode::start(&redis.url()).await);
    for n in 1..=1000 {
        a.publish("c", n).await.unwrap();
    }
    let before = redis.calls("evalsha").await;
    let opening = (0..200).map(|_| b.reader("c", Start::Earliest));
    let readers = futures_util::future::join_all(opening).await;
    for reader in &readers {
        reader.receives(1000).await;
        assert_eq!((reader.numbers().len(), reader.gaps()), (1000, vec![]));
    }
    let checked = redis.calls("evalsha").await - before;
    assert!(checked < 200, "{checked} reads for 200 readers of 1000 events");
    drop(readers);
    eventually_within(MINUTE, "no reader is left", async || b.topics.readers() == 0).await;
    eventually_within(MINUTE, "the channel is unsubscribed", async || {
        redis.cli(&["PUBSUB", "CHANNELS", "weir:{c}:e"]).await.is_empty()
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn channel_names_with_braces_and_wildcards_work_in_a_cluster() {
    let cluster = RedisCluster::start(3, 0).await;
    let (a, b) = (BusNode::start(&cluster.url()).await, BusNode::start(&cluster.url()).await);
    let names = ["{a}", "}{", "{}", "{a}{b}", "%7b", "a}", "{", "*[x]?\\", "ä/€"];
    for name in names {
        let reader = b.reader(name, Start::Now).await;
        let batch = (1..=3).map(|n| (channel(name), draft(n, (n == 2).then_some("k")))).collect();
        assert_eq!(a.bus.publish("me", batch).await.unwrap().len(), 3);
        reader.receives(3).await;
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
    let node = BusNode::with(&master.url(), KEEP, Ack::Replicated).await;
    assert_eq!(node.publish("c", 1).await, Err(Code::Unconfirmed), "there is no replica");
    let replica = RedisServer::start(&["--replicaof", "127.0.0.1", &master.port.to_string()]).await;
    eventually_within(MINUTE, "the replica is in sync", async || {
        replica.info("master_link_status").await.as_deref() == Some("up")
    })
    .await;
    // With its first replica a master changes its replication id, as if it had been a replica itself. Both connections
    // have to notice that.
    let first = Start::After(node.read("c", Start::Earliest).await.events[0].position());
    eventually_within(MINUTE, "a term has ended", async || node.read("c", first).await.gap.is_some()).await;
    eventually_within(MINUTE, "publishes are confirmed", async || node.publish("d", 1).await.is_ok()).await;
    let placed = futures_util::future::join_all((2..=100).map(|n| node.publish("c", n))).await;
    assert!(placed.iter().all(Result::is_ok), "{placed:?}");
    // Acknowledged events are on the replica.
    assert_eq!(replica.cli(&["XLEN", "weir:{c}:s"]).await, "100");
    assert_eq!(node.bus.read(&channel("c"), Start::Last(99), ALL, None).await.unwrap().events.len(), 99);
}

/// During a rolling update, a node with shorter retention does not trim logs that others keep, whichever node writes.
#[tokio::test(flavor = "multi_thread")]
async fn a_node_with_shorter_retention_trims_nothing_others_keep() {
    let redis = RedisServer::start(&[]).await;
    let less = Retention { count: 100, ..KEEP };
    let (a, b) = (BusNode::start(&redis.url()).await, BusNode::with(&redis.url(), less, Ack::Stored).await);
    let remote = b.reader("c", Start::Now).await;
    let mut placed = Vec::new();
    for n in 1..=500 {
        placed.push(a.publish("c", n).await.unwrap().position);
    }
    for n in 501..=700 {
        b.publish("c", n).await.unwrap();
    }
    remote.receives(700).await;
    for node in [&a, &b] {
        let late = node.reader("c", Start::After(placed[9])).await;
        late.receives(700).await;
        assert_eq!((late.numbers(), late.gaps()), ((11..=700).collect(), vec![]));
    }
    assert_eq!((remote.numbers(), remote.gaps()), ((1..=700).collect(), vec![]));
    // A single node trims according to its own settings.
    let another = RedisServer::start(&[]).await;
    let alone = BusNode::with(&another.url(), less, Ack::Stored).await;
    for n in 1..=300 {
        alone.publish_until_accepted("c", n).await;
    }
    assert_eq!(numbers(&alone.read("c", Start::Earliest).await), (201..=300).collect::<Vec<_>>());
}
