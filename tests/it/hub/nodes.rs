//! Several nodes with a manual clock, and messages that are lost on purpose.

use std::sync::atomic::{AtomicU64, Ordering::SeqCst};

use super::{
    SECOND,
    fake::{Socket, World, raw},
    *,
};
use weir::cluster::MonotonicClock;

use crate::support::test_network::{TTL, TestNetwork};

const MS: Duration = Duration::from_millis(1);

/// Nodes of one cluster.
pub struct Cluster {
    pub nodes: Vec<World>,
    pub net: Arc<TestNetwork>,
    clock: Arc<AtomicU64>,
}

impl Cluster {
    pub fn new(nodes: usize) -> Self {
        let clock = Arc::new(AtomicU64::new(1_000));
        let net = TestNetwork::new(MonotonicClock::Manual(clock.clone()));
        let nodes = (0..nodes).map(|_| World::join(&net, &clock, Arc::default())).collect();
        let cluster = Cluster { nodes, net, clock };
        cluster.settle();
        cluster
    }

    /// Carries messages and events until none are left.
    pub fn settle(&self) {
        loop {
            let mut some = self.net.carry();
            for node in self.nodes.iter().filter(|node| !node.node.is_stopped()) {
                some |= node.remote.process_events();
            }
            if !some {
                return;
            }
        }
    }

    pub fn pass(&self, time: Duration) {
        let mut left = time.as_millis() as u64;
        loop {
            let step = left.min(1_000);
            self.clock.fetch_add(step, SeqCst);
            self.net.beat();
            for node in self.nodes.iter().filter(|node| !node.node.is_stopped()) {
                node.sweep();
            }
            self.settle();
            left -= step;
            if left == 0 {
                return;
            }
        }
    }

    /// Stops a node as if its process had been killed.
    pub fn kill(&mut self, at: usize) -> World {
        let node = self.nodes.remove(at);
        self.net.kill(&node.node);
        node
    }

    /// Registers a provider, with all messages that takes.
    pub fn provide(
        &self,
        socket: &Socket,
        service: &str,
        change: impl FnOnce(&mut ProvideRequest<'_>),
    ) -> Result<Option<u64>> {
        let mut request = ProvideRequest::new(service);
        change(&mut request);
        let providing = socket.hub.provide(&request);
        self.finish(providing).map(|provided| provided.fence)
    }

    /// Lets time pass until a registration is done.
    pub fn finish(&self, providing: ProvideFuture) -> Result<AcceptedProvider> {
        let mut providing = Box::pin(providing);
        for _ in 0..1_000 {
            if let Some(done) = futures_util::FutureExt::now_or_never(providing.as_mut()) {
                return done;
            }
            self.settle();
            if let Some(done) = futures_util::FutureExt::now_or_never(providing.as_mut()) {
                return done;
            }
            self.pass(20 * MS);
        }
        panic!("a registration did not end");
    }

    /// A socket of the node `at` that provides `service`, shared.
    pub fn provider(&self, at: usize, service: &str) -> Socket {
        let socket = self.nodes[at].socket();
        self.provide(&socket, service, |_| {}).unwrap();
        self.settle();
        socket
    }

    /// Asserts that nothing is left of all connections, services and calls.
    pub fn assert_empty_after_a_minute(&self) {
        self.pass(Duration::from_secs(62));
        for node in &self.nodes {
            assert_eq!(node.hub.counts(), HubCounts::default());
            assert_eq!(node.node.leases(), 0);
            assert_eq!(node.remote.links(), self.nodes.len() - 1);
        }
        assert_eq!(self.net.names(), 0);
    }
}

#[test]
fn a_call_to_another_node() {
    let cluster = Cluster::new(2);
    let (provider, caller) = (cluster.nodes[0].socket(), cluster.nodes[1].socket());
    cluster
        .provide(&provider, "jwt", |request| (request.meta, request.names) = (true, MethodNames::Qualified))
        .unwrap();
    cluster.settle();
    caller.call_with("1", "jwt/make", |call| (call.caller, call.traceparent) = ("u7", Some("00-1")));
    cluster.settle();
    let got = provider.saw.calls.lock()[0].clone();
    let meta = serde_json::json!({ "caller": "u7", "deadline_ms": 30_000, "traceparent": "00-1" });
    assert_eq!((got.name.as_str(), got.params.as_deref(), got.meta), ("jwt/make", Some(r#"["1"]"#), Some(meta)));
    assert_eq!(provider.reply(0, r#"{"token": "x" }"#), ReplyOutcome::Answered);
    cluster.settle();
    assert_eq!(caller.answers(), [r#"1: {"token": "x" }"#]);
    caller.call("2", "jwt/make");
    cluster.settle();
    let id = provider.saw.calls.lock()[1].id.unwrap();
    let data = raw(r#"{"a":1}"#);
    let error = ProviderError { code: 42, message: "no".into(), data: Some(std::borrow::Cow::Borrowed(data)) };
    provider.hub.reply(id, CallAnswer::Error(error));
    caller.call("3", "jwt/make");
    cluster.settle();
    provider.hub.reply(provider.saw.calls.lock()[2].id.unwrap(), CallAnswer::bad_reply("is empty"));
    cluster.settle();
    assert_eq!(caller.answers()[1..], ["2: error 42 no", "3: bad_reply maybe"]);
    // Counted on the caller's node.
    assert_eq!(cluster.nodes[1].metrics.value("weir_rpc_calls_total{result=\"ok\"}"), 1.0);
    assert_eq!(cluster.nodes[0].metrics.value("weir_rpc_calls_total{result=\"ok\"}"), 0.0);
    caller.hub.notify(&Call::new("jwt", "note", None));
    cluster.settle();
    let calls = provider.saw.calls.lock().clone();
    assert_eq!((calls.len(), calls[3].id), (4, None));
    drop((provider, caller));
    cluster.assert_empty_after_a_minute();
}

#[test]
fn deadlines_cancellations_and_late_replies_between_nodes() {
    let cluster = Cluster::new(2);
    let (provider, caller) = (cluster.nodes[0].socket(), cluster.nodes[1].socket());
    cluster.provide(&provider, "a", |request| request.meta = true).unwrap();
    cluster.settle();
    caller.call_with("late", "a/x", |call| (call.timeout, call.late) = (Some(SECOND), true));
    caller.call_with("never", "a/x", |call| call.timeout = Some(SECOND));
    caller.call("gone", "a/x");
    cluster.settle();
    cluster.pass(SECOND);
    assert_eq!(caller.answers(), ["late: timeout maybe", "never: timeout maybe"]);
    assert_eq!((provider.reply(0, "1"), provider.reply(1, "2")), (ReplyOutcome::Late, ReplyOutcome::Late));
    cluster.settle();
    assert_eq!((caller.late(), caller.answers().len()), (vec!["late: 1".to_owned()], 2));
    let late = |at: usize| cluster.nodes[at].metrics.value("weir_rpc_late_total");
    assert_eq!((late(0), late(1)), (2.0, 0.0), "counted once");
    assert_eq!(caller.hub.cancel(b"gone"), 1);
    cluster.settle();
    assert_eq!(*provider.saw.cancels.lock(), [provider.saw.calls.lock()[2].id.unwrap()]);
    assert_eq!(provider.reply(2, "3"), ReplyOutcome::Unmatched);
    // A closed caller cancels its calls.
    caller.call("4", "a/x");
    caller.call("5", "a/x");
    cluster.settle();
    drop(caller);
    cluster.settle();
    assert_eq!(provider.saw.cancels.lock().len(), 3);
    assert_eq!(cluster.nodes[0].hub.counts().pending, 0);
    drop(provider);
    cluster.assert_empty_after_a_minute();
}

#[test]
fn local_providers_are_preferred_but_not_overloaded() {
    let cluster = Cluster::new(3);
    let near = cluster.provider(0, "a");
    let far = [cluster.provider(1, "a"), cluster.provider(2, "a")];
    let caller = cluster.nodes[0].socket();
    for n in 0..400 {
        caller.call(&n.to_string(), "a/x");
        cluster.settle();
    }
    let got: Vec<_> = [&near, &far[0], &far[1]].iter().map(|provider| provider.got().len()).collect();
    assert_eq!(got.iter().sum::<usize>(), 400);
    // About twice as many as either of the others: the choice is between two at random.
    assert!((180..=230).contains(&got[0]), "{got:?}");
    assert!(got[1] > 70 && got[2] > 70, "{got:?}");
}

#[test]
fn concurrency_holds_across_nodes() {
    let cluster = Cluster::new(3);
    let sockets: Vec<_> = (1..3).map(|at| cluster.nodes[at].socket()).collect();
    for socket in &sockets {
        cluster.provide(socket, "a", |request| request.concurrency = 3).unwrap();
    }
    cluster.settle();
    // Two nodes call without knowing of each other.
    let callers = [cluster.nodes[0].socket(), cluster.nodes[1].socket()];
    for n in 0..8 {
        callers[n % 2].call(&n.to_string(), "a/x");
        cluster.settle();
    }
    assert_eq!(sockets.iter().map(|socket| socket.got().len()).collect::<Vec<_>>(), [3, 3]);
    let answers: Vec<_> = callers.iter().flat_map(Socket::answers).collect();
    assert_eq!(answers.len(), 2, "{answers:?}");
    assert!(answers.iter().all(|answer| answer.ends_with("busy no")), "{answers:?}");
    sockets[0].reply(0, "1");
    cluster.settle();
    cluster.pass(SECOND);
    callers[0].call("again", "a/x");
    cluster.settle();
    assert_eq!(sockets[0].got().last().unwrap(), "again");
}

#[test]
fn a_provider_that_moves_to_another_node_is_found_at_once() {
    let cluster = Cluster::new(3);
    let caller = cluster.nodes[0].socket();
    let mut provider = cluster.provider(1, "a");
    for round in 0..6usize {
        // Calls on their way to the old node are neither lost nor executed twice.
        caller.call(&format!("{round}a"), "a/x");
        provider.hub.withdraw("a").unwrap();
        caller.call(&format!("{round}b"), "a/x");
        cluster.settle();
        assert_eq!(provider.got().len(), 0);
        provider = cluster.provider(1 + round % 2, "a");
        assert_eq!(provider.got(), [format!("{round}a"), format!("{round}b")]);
        provider.reply(0, "1");
        provider.reply(1, "1");
        drop(provider);
        provider = cluster.provider(2 - round % 2, "a");
    }
    assert_eq!(caller.answers().len(), 12);
    drop((caller, provider));
    cluster.assert_empty_after_a_minute();
}

#[test]
fn a_withdrawn_provider_finishes_calls_of_other_nodes() {
    let cluster = Cluster::new(2);
    let (provider, caller) = (cluster.provider(0, "a"), cluster.nodes[1].socket());
    caller.call("1", "a/x");
    cluster.settle();
    assert_eq!(provider.hub.withdraw("a").unwrap(), 1);
    cluster.settle();
    caller.call_with("2", "a/x", |call| call.wait = Some(Duration::ZERO));
    assert_eq!(caller.answers(), ["2: no_provider no"]);
    assert_eq!(provider.reply(0, "1"), ReplyOutcome::Answered);
    cluster.settle();
    assert_eq!(caller.answers()[1..], ["1: 1"]);
    drop((caller, provider));
    cluster.assert_empty_after_a_minute();
}

#[test]
fn a_call_waits_for_a_provider_on_any_node() {
    let cluster = Cluster::new(3);
    let caller = cluster.nodes[0].socket();
    caller.call_with("1", "new/x", |call| call.wait = Some(5 * SECOND));
    let mut note = Call::new("new", "n", Some(raw(r#"["note"]"#)));
    note.wait = Some(5 * SECOND);
    caller.hub.notify(&note);
    cluster.pass(SECOND);
    let provider = cluster.provider(2, "new");
    assert_eq!(provider.got(), ["1", "note"]);
    drop(provider);
    cluster.settle();
    assert_eq!(caller.answers(), ["1: provider_gone maybe"]);
    caller.call("2", "new/x");
    cluster.pass(2 * SECOND);
    assert_eq!(caller.answers()[1..], ["2: no_provider no"]);
}

#[test]
fn calls_to_a_dead_node_fail_when_its_death_is_detected() {
    let mut cluster = Cluster::new(3);
    let (doomed, other) = (cluster.provider(0, "a"), cluster.provider(1, "b"));
    let caller = cluster.nodes[2].socket();
    caller.call("1", "a/x");
    caller.call("2", "b/x");
    cluster.settle();
    let _dead = cluster.kill(0);
    caller.call("3", "a/x");
    assert_eq!(caller.answers(), [""; 0]);
    // The message comes back undelivered: its call may be placed elsewhere, the earlier one may have been executed.
    cluster.settle();
    assert_eq!(caller.answers(), ["1: provider_gone maybe"]);
    let heir = cluster.provider(0, "a");
    assert_eq!(heir.got(), ["3"]);
    heir.reply(0, "3");
    other.reply(0, "2");
    cluster.settle();
    assert_eq!(caller.answers()[1..], ["3: 3", "2: 2"]);
    drop((doomed, other, caller, heir));
    cluster.assert_empty_after_a_minute();
}

#[test]
fn calls_of_a_dead_node_are_cancelled_within_a_heartbeat() {
    let mut cluster = Cluster::new(2);
    let provider = cluster.nodes[0].socket();
    cluster.provide(&provider, "a", |request| (request.meta, request.concurrency) = (true, 1)).unwrap();
    cluster.settle();
    let caller = cluster.nodes[1].socket();
    caller.call("1", "a/x");
    cluster.settle();
    let dead = cluster.kill(1);
    cluster.pass(1_020 * MS);
    assert_eq!(provider.saw.cancels.lock().len(), 1);
    assert_eq!(cluster.nodes[0].hub.counts().pending, 0);
    drop((dead, caller, provider));
    cluster.assert_empty_after_a_minute();
}

#[test]
fn lost_messages_are_detected_within_a_second() {
    for (from, to) in [(0, 1), (1, 0)] {
        let cluster = Cluster::new(2);
        let (provider, caller) = (cluster.provider(0, "a"), cluster.nodes[1].socket());
        caller.call("before", "a/x");
        cluster.settle();
        provider.reply(0, "1");
        cluster.settle();
        cluster.net.set_lossy(&cluster.nodes[from].node, &cluster.nodes[to].node, true);
        caller.call("lost", "a/x");
        cluster.settle();
        if from == 0 {
            provider.reply(1, "2");
            cluster.settle();
        }
        assert_eq!(caller.answers().len(), 1);
        cluster.net.set_lossy(&cluster.nodes[from].node, &cluster.nodes[to].node, false);
        cluster.pass(1_040 * MS);
        assert_eq!(caller.answers()[1..], ["lost: provider_gone maybe"], "{from} {to}");
        assert_eq!(provider.got().len(), if from == 0 { 2 } else { 1 });
        // The link works again.
        caller.call("after", "a/x");
        cluster.settle();
        assert_eq!(provider.got().last().unwrap(), "after");
        provider.reply(provider.got().len() - 1, "3");
        cluster.settle();
        assert_eq!(caller.answers()[2..], ["after: 3"]);
        drop((provider, caller));
        cluster.assert_empty_after_a_minute();
    }
}

#[test]
fn an_exclusive_service_has_one_provider_on_all_nodes() {
    let cluster = Cluster::new(3);
    let (one, two, caller) = (cluster.nodes[0].socket(), cluster.nodes[1].socket(), cluster.nodes[2].socket());
    let first = cluster.provide(&one, "own", |request| request.exclusive = true).unwrap().unwrap();
    for exclusive in [true, false] {
        let refused = cluster.provide(&two, "own", |request| request.exclusive = exclusive);
        assert_eq!(refused.unwrap_err().code(), Code::ServiceTaken);
    }
    caller.call("1", "own/x");
    cluster.settle();
    assert_eq!(one.got(), ["1"]);
    drop(one);
    let second = cluster.provide(&two, "own", |request| request.exclusive = true).unwrap().unwrap();
    assert!(second > first);
    cluster.settle();
    assert_eq!(caller.answers(), ["1: provider_gone maybe"]);
    caller.call("2", "own/x");
    cluster.settle();
    assert_eq!(two.got(), ["2"]);
    // Shared providers exclude an exclusive one.
    let shared = cluster.provider(0, "shared");
    let refused = cluster.provide(&two, "shared", |request| request.exclusive = true);
    assert_eq!(refused.unwrap_err().code(), Code::ServiceTaken);
    assert_eq!(cluster.provide(&two, "shared", |_| {}).unwrap(), None);
    drop((two, caller, shared));
    cluster.assert_empty_after_a_minute();
}

#[test]
fn the_same_subject_takes_over_from_another_node() {
    let cluster = Cluster::new(3);
    let (old, new, stranger) = (cluster.nodes[0].socket(), cluster.nodes[1].socket(), cluster.nodes[2].socket());
    let caller = cluster.nodes[2].socket();
    let exclusive = |socket: &Socket, subject: &'static str, takeover| {
        cluster.provide(socket, "a", |request| {
            (request.exclusive, request.takeover, request.subject) = (true, takeover, subject)
        })
    };
    let first = exclusive(&old, "svc", false).unwrap();
    cluster.settle();
    caller.call("1", "a/x");
    cluster.settle();
    assert_eq!(exclusive(&stranger, "other", true).unwrap_err().code(), Code::ServiceTaken);
    assert_eq!(exclusive(&new, "svc", false).unwrap_err().code(), Code::ServiceTaken);
    let second = exclusive(&new, "svc", true).unwrap();
    assert!(second > first);
    cluster.settle();
    assert_eq!(*old.saw.withdrawn.lock(), ["a replaced"]);
    assert_eq!(caller.answers(), ["1: provider_gone maybe"]);
    assert_eq!(old.reply(0, "1"), ReplyOutcome::Unmatched);
    caller.call("2", "a/x");
    cluster.settle();
    assert_eq!((old.got().len(), new.got().len()), (1, 1));
    drop((old, new, stranger, caller));
    cluster.assert_empty_after_a_minute();
}

#[test]
fn a_dead_client_holds_no_name_on_any_node() {
    let cluster = Cluster::new(2);
    let mut request = ProvideRequest::new("a");
    (request.exclusive, request.probe) = (true, true);
    for at in 0..2 {
        let (holder, heir) = (cluster.nodes[0].socket(), cluster.nodes[at].socket());
        cluster.provide(&holder, "a", |it| *it = request).unwrap();
        cluster.settle();
        // Without a probe the registration is rejected at once.
        let refused = cluster.provide(&heir, "a", |request| request.exclusive = true).unwrap_err();
        assert_eq!((refused.code(), holder.saw.probes.lock().len()), (Code::ServiceTaken, 0));
        let probed = || {
            let providing = heir.hub.provide(&request);
            cluster.settle();
            let callback = holder.saw.probes.lock().pop().expect("the holder is probed");
            (providing, callback)
        };
        let (providing, callback) = probed();
        callback(true);
        assert_eq!(cluster.finish(providing).err().unwrap().code(), Code::ServiceTaken);
        let (providing, callback) = probed();
        drop(holder);
        callback(false);
        drop(cluster.finish(providing).unwrap());
        assert!(heir.saw.probes.lock().is_empty());
        drop(heir);
        cluster.settle();
    }
    cluster.assert_empty_after_a_minute();
}

#[test]
fn the_name_of_a_dead_node_is_free_when_its_lease_expires() {
    let mut cluster = Cluster::new(2);
    let doomed = cluster.nodes[0].socket();
    let first = cluster.provide(&doomed, "own", |request| request.exclusive = true).unwrap();
    cluster.settle();
    let _dead = cluster.kill(0);
    let heir = cluster.nodes[0].socket();
    let mut request = ProvideRequest::new("own");
    request.exclusive = true;
    let mut providing = Box::pin(heir.hub.provide(&request));
    // Neither rejected, for no node confirms that the name is held, nor accepted, for its holder may be alive.
    cluster.pass(Duration::from_millis(TTL) - 100 * MS);
    assert!(futures_util::FutureExt::now_or_never(providing.as_mut()).is_none());
    for _ in 0..40 {
        cluster.pass(20 * MS);
        if let Some(done) = futures_util::FutureExt::now_or_never(providing.as_mut()) {
            assert!(done.unwrap().fence > first);
            return;
        }
    }
    panic!("the name should be free by now");
}

#[test]
fn an_exclusive_provider_gets_no_calls_without_a_valid_lease() {
    let cluster = Cluster::new(2);
    let (own, shared) = (cluster.nodes[0].socket(), cluster.provider(0, "shared"));
    let caller = cluster.nodes[0].socket();
    let first = cluster.provide(&own, "own", |request| request.exclusive = true).unwrap();
    cluster.nodes[0].node.cut(true);
    cluster.pass(Duration::from_millis(TTL) - 2 * SECOND - MS);
    caller.call("1", "own/x");
    assert_eq!(own.got(), ["1"]);
    cluster.pass(MS);
    caller.call("2", "own/x");
    caller.call("3", "shared/x");
    assert_eq!((own.got().len(), shared.got()), (1, vec!["3".to_owned()]), "shared calls go on");
    let refused = cluster.provide(&cluster.nodes[0].socket(), "new", |_| {});
    assert_eq!(refused.unwrap_err().code(), Code::BusUnavailable);
    // Reconnected in time: it still holds the name and receives the waiting call.
    cluster.nodes[0].node.cut(false);
    cluster.pass(20 * MS);
    assert_eq!(own.got(), ["1", "2"]);
    // Cut off for too long: another provider has taken the name.
    cluster.nodes[0].node.cut(true);
    cluster.pass(Duration::from_millis(TTL) + SECOND);
    let heir = cluster.nodes[1].socket();
    let second = cluster.provide(&heir, "own", |request| request.exclusive = true).unwrap();
    assert!(second > first);
    cluster.nodes[0].node.cut(false);
    cluster.pass(200 * MS);
    assert_eq!(*own.saw.withdrawn.lock(), ["own lost"]);
    caller.call("4", "own/x");
    cluster.settle();
    assert_eq!((own.got().len(), heir.got()), (2, vec!["4".to_owned()]));
    assert_eq!(cluster.nodes[0].hub.counts().providers, 1);
    // The shared name is held again, by the new session.
    let elsewhere = cluster.nodes[1].socket();
    elsewhere.call("5", "shared/x");
    cluster.settle();
    assert_eq!(shared.got().last().unwrap(), "5");
    drop((own, shared, caller, heir, elsewhere));
    cluster.assert_empty_after_a_minute();
}

#[test]
fn a_paused_node_executes_nothing_for_a_name_that_it_lost() {
    let cluster = Cluster::new(2);
    let (own, heir) = (cluster.nodes[0].socket(), cluster.nodes[1].socket());
    let callers = [cluster.nodes[0].socket(), cluster.nodes[1].socket()];
    cluster.provide(&own, "own", |request| request.exclusive = true).unwrap();
    cluster.settle();
    // The nodes know each other: a link is not used before the other end has confirmed it.
    callers[1].call("0", "own/x");
    cluster.settle();
    own.reply(0, "1");
    cluster.settle();
    cluster.nodes[0].node.stop(true);
    callers[1].call("1", "own/x");
    cluster.pass(Duration::from_millis(TTL) + SECOND);
    assert_eq!(callers[1].answers()[1..], ["1: provider_gone maybe"]);
    cluster.provide(&heir, "own", |request| request.exclusive = true).unwrap();
    cluster.settle();
    // It resumes, and before it learns anything it is called by a client of its own and by an old message.
    cluster.nodes[0].node.stop(false);
    callers[0].call("2", "own/x");
    cluster.nodes[0].remote.process_events();
    assert_eq!(own.got(), ["0"]);
    cluster.pass(SECOND);
    assert_eq!(*own.saw.withdrawn.lock(), ["own lost"]);
    assert_eq!(heir.got(), ["2"]);
    drop((own, heir, callers));
    cluster.assert_empty_after_a_minute();
}

#[test]
fn services_of_all_nodes_are_listed_and_the_leader_publishes_changes() {
    let mut cluster = Cluster::new(3);
    let here = cluster.nodes[1].socket();
    cluster.provide(&here, "a", |request| request.methods = &["x"]).unwrap();
    cluster.settle();
    let there = cluster.nodes[2].socket();
    cluster.provide(&there, "a", |request| request.methods = &["y"]).unwrap();
    cluster.settle();
    for node in &cluster.nodes {
        let services = node.hub.services("a", 10);
        assert_eq!(services[0].providers, 2);
        assert_eq!(services[0].methods, ["x", "y"]);
    }
    let changes: Vec<_> = cluster.nodes.iter().map(World::take_changes).collect();
    let change = |providers, kind| ServiceChange { service: "a".into(), providers, exclusive: false, kind };
    assert_eq!(changes, [vec![change(2, ServiceChangeKind::Provided)], vec![], vec![]]);
    drop(there);
    cluster.settle();
    let changes: Vec<_> = cluster.nodes[1..].iter().map(World::take_changes).collect();
    assert_eq!(changes, [vec![], vec![]]);
    // The leader dies before it has published the change: the next leader does.
    let _dead = cluster.kill(0);
    cluster.pass(Duration::from_millis(TTL) + SECOND);
    let changes: Vec<_> = cluster.nodes.iter().map(World::take_changes).collect();
    assert_eq!(changes, [vec![change(1, ServiceChangeKind::Provided)], vec![]]);
}

/// There is no leader while no node can reach another. The next leader publishes all changes of that time.
#[test]
fn changes_without_a_leader_are_published_afterwards() {
    let cluster = Cluster::new(2);
    let there = cluster.provider(1, "a");
    let _stays = cluster.provider(1, "b");
    assert_eq!(cluster.nodes[0].take_changes().len(), 2);
    cluster.nodes[1].take_changes();
    cluster.nodes.iter().for_each(|node| node.node.cut(true));
    cluster.pass(Duration::from_secs(60));
    drop(there);
    cluster.pass(Duration::from_secs(60));
    assert!(cluster.nodes.iter().all(|node| node.take_changes().is_empty()), "there is no leader");
    cluster.nodes.iter().for_each(|node| node.node.cut(false));
    cluster.pass(SECOND);
    let changes: Vec<_> = cluster.nodes.iter().flat_map(World::take_changes).collect();
    let changes: Vec<_> = changes.iter().map(|it| (it.service.as_str(), it.providers)).collect();
    assert!(changes.contains(&("a", 0)), "{changes:?}");
    // The node that provides b never saw it leave.
    assert!(changes.iter().all(|changes| [("a", 0), ("b", 1)].contains(changes)), "{changes:?}");
}

#[test]
fn changes_that_were_not_published_report_the_providers_of_a_later_moment() {
    let cluster = Cluster::new(2);
    let one = cluster.provider(1, "a");
    let hub = &cluster.nodes[0].hub;
    let changes = hub.take_changes();
    assert_eq!(changes[0].change().providers, 1);
    drop(changes);
    let two = cluster.provider(0, "a");
    let changes = hub.take_changes();
    assert_eq!(changes.iter().map(|it| it.change().providers).collect::<Vec<_>>(), [2], "once, and the newest");
    // Longer than another node would keep it, and after the hub has forgotten the service.
    drop(changes);
    drop((one, two));
    cluster.settle();
    for _ in 0..3 {
        let changes = hub.take_changes();
        assert_eq!(changes.iter().map(|it| it.change().providers).collect::<Vec<_>>(), [0]);
        drop(changes);
        cluster.pass(Duration::from_secs(100));
    }
    assert_eq!(hub.counts(), HubCounts::default());
    assert_eq!(cluster.nodes[0].take_changes().len(), 1);
    assert_eq!(cluster.nodes[0].take_changes(), []);
}
