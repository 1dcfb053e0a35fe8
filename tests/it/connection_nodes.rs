//! Listing and kicking the connections of several nodes in one process.

use std::{
    collections::BTreeSet,
    sync::{Arc, atomic::AtomicU64},
    task::Poll,
    time::{Duration, Instant},
};

use weir::{
    auth::Identity,
    cluster::MonotonicClock,
    error::Code,
    metrics::Transport,
    net::timer::{Due, TimerWheel},
    sessions::{ChannelSet, ConnectionFilter, ConnectionRegistry, cluster::ClusterConnections},
};

use crate::support::test_network::TestNetwork;

#[tokio::test]
async fn requests_reach_all_nodes_and_silent_nodes_are_named() {
    let time = Arc::new(AtomicU64::new(0));
    let net = TestNetwork::new(MonotonicClock::Manual(time));
    let nodes: Vec<_> = (0..3).map(|_| net.join()).collect();
    let carrier = net.clone();
    tokio::spawn(async move {
        loop {
            carrier.carry();
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    });
    let mut clusters = Vec::new();
    let mut registrations = Vec::new();
    for node in &nodes {
        let wheel = TimerWheel::start();
        let connections = ClusterConnections::new(ConnectionRegistry::new(wheel.clone()), node.clone());
        tokio::spawn(connections.clone().run());
        for _ in 0..50 {
            let registration =
                connections.local().register(Transport::Ws, &Identity::default(), None, ChannelSet::Empty);
            let mut timer = wheel.timer(Duration::from_secs(1_000));
            timer.set_owner(registration.number());
            registrations.push((registration, timer));
        }
        clusters.push(connections);
    }
    let all = |from: usize| {
        let connections = clusters[from].clone();
        async move { connections.list(&ConnectionFilter::default(), None, 1000).await }
    };
    for from in 0..3 {
        let start = Instant::now();
        while all(from).await.found.len() < 150 {
            assert!(start.elapsed() < Duration::from_secs(20));
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        assert!(all(from).await.silent.is_empty());
    }
    // Pages over all nodes.
    let (mut ids, mut after) = (Vec::new(), None::<String>);
    loop {
        let page = clusters[1].list(&ConnectionFilter::default(), after.as_deref(), 40).await.found;
        let Some(last) = page.last() else { break };
        after = Some(last.id.clone());
        ids.extend(page.into_iter().map(|it| it.id));
    }
    assert_eq!(ids.len(), 150);
    assert!(ids.is_sorted());
    // A connection of another node.
    let (own, other) = (clusters[0].local().node(), clusters[2].local().node());
    let id = ids.iter().find(|id| id.starts_with(&other)).unwrap();
    let filter = ConnectionFilter { id: Some(id.clone()), ..ConnectionFilter::default() };
    assert_eq!(clusters[0].kick(&filter).await.found, 1);
    let mut kicked = 0;
    for (_, timer) in &mut registrations {
        let polled = std::future::poll_fn(|cx| Poll::Ready(timer.poll(cx))).await;
        kicked += usize::from(polled == Poll::Ready(Due::Kicked(Code::Kicked)));
    }
    assert_eq!(kicked, 1);

    nodes[2].stop(true);
    let found = tokio::time::timeout(Duration::from_secs(20), all(0)).await.unwrap();
    assert_eq!((found.found.len(), found.silent), (100, vec![other.clone()]));
    let names: BTreeSet<String> = found.found.into_iter().map(|it| it.node).collect();
    assert!(names.contains(&own) && !names.contains(&other));
    let kicked =
        clusters[0].kick(&ConnectionFilter { subject: Some(String::new()), ..ConnectionFilter::default() }).await;
    assert_eq!((kicked.found, kicked.silent), (100, vec![other]));
}
