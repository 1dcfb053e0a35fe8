//! Providers: choice, exclusive names, waiting, withdrawal, discovery.

use super::{
    SECOND,
    fake::{Socket, World},
    *,
};

fn codes(result: &Result<(usize, Option<u64>)>) -> Code {
    result.as_ref().unwrap_err().code()
}

#[test]
fn the_provider_with_the_fewest_calls_for_its_concurrency_is_chosen() {
    let world = World::new();
    let (small, large, caller) = (world.socket(), world.socket(), world.socket());
    small.provide("a", |request| request.concurrency = 2).unwrap();
    large.provide("a", |request| request.concurrency = 8).unwrap();
    for n in 0..10 {
        caller.call(&n.to_string(), "a/x");
    }
    assert_eq!((small.got().len(), large.got().len()), (2, 8));
    caller.call("full", "a/x");
    assert_eq!(caller.answers(), ["full: busy no"]);
    small.reply(0, "1");
    caller.call("again", "a/x");
    assert_eq!(small.got().last().unwrap(), "again");
}

#[test]
fn equal_providers_take_turns() {
    let world = World::new();
    let providers: Vec<_> = (0..4).map(|_| world.provider("a")).collect();
    let caller = world.socket();
    for n in 0..12 {
        caller.call(&n.to_string(), "a/x");
    }
    assert!(providers.iter().all(|provider| provider.got().len() == 3));
}

#[test]
fn many_providers_share_calls_evenly() {
    let world = World::new();
    let providers: Vec<_> = (0..50).map(|_| world.socket()).collect();
    for provider in &providers {
        provider.provide("a", |request| request.concurrency = 10).unwrap();
    }
    let caller = world.socket();
    for n in 0..250 {
        caller.call(&n.to_string(), "a/x");
    }
    assert!(
        providers.iter().all(|provider| provider.got().len() <= 9),
        "two choices keep the fullest near the mean of 5"
    );
    for n in 250..500 {
        caller.call(&n.to_string(), "a/x");
    }
    assert!(providers.iter().all(|provider| provider.got().len() == 10));
    caller.call("full", "a/x");
    assert_eq!(caller.answers(), ["full: busy no"]);
}

#[test]
fn shared_and_exclusive_do_not_mix() {
    let world = World::new();
    let (one, two) = (world.socket(), world.socket());
    assert_eq!(one.provide("shared", |_| {}).unwrap(), (1, None));
    assert_eq!(two.provide("shared", |_| {}).unwrap(), (2, None));
    assert_eq!(codes(&two.provide("shared", |request| request.exclusive = true)), Code::ServiceTaken);
    assert_eq!(one.provide("own", |request| request.exclusive = true).unwrap(), (1, Some(1)));
    assert_eq!(codes(&two.provide("own", |_| {})), Code::ServiceTaken);
    assert_eq!(codes(&two.provide("own", |request| request.exclusive = true)), Code::ServiceTaken);
    assert_eq!(codes(&two.provide("own", |request| request.takeover = true)), Code::InvalidParams);
    // The name is free when its holder disconnects.
    drop(one);
    assert_eq!(two.provide("own", |request| request.exclusive = true).unwrap(), (1, Some(2)));
    assert_eq!(two.provide("shared", |request| request.exclusive = true).unwrap(), (1, Some(2)));
}

#[test]
fn a_second_registration_of_a_connection_is_an_update() {
    let world = World::new();
    let (one, two, caller) = (world.socket(), world.socket(), world.socket());
    one.provide("a", |request| request.concurrency = 1).unwrap();
    assert_eq!(one.provide("a", |request| (request.concurrency, request.meta) = (2, true)).unwrap(), (1, None));
    for tag in ["1", "2", "3"] {
        caller.call(tag, "a/x");
    }
    assert_eq!((one.got().len(), caller.answers()), (2, vec!["3: busy no".to_owned()]));
    assert!(one.saw.calls.lock()[0].meta.is_some());
    assert_eq!(one.provide("a", |request| request.exclusive = true).unwrap(), (1, Some(1)));
    assert_eq!(one.provide("a", |request| request.exclusive = true).unwrap(), (1, Some(1)));
    assert_eq!(codes(&two.provide("a", |_| {})), Code::ServiceTaken);
    assert_eq!(one.provide("a", |_| {}).unwrap(), (1, None));
    assert_eq!(two.provide("a", |_| {}).unwrap(), (2, None));
    assert_eq!((one.reply(0, "1"), one.reply(1, "1")), (ReplyOutcome::Answered, ReplyOutcome::Answered));
    drop((one, two, caller));
    world.assert_empty_after_a_minute();
}

#[test]
fn a_takeover_by_the_same_subject() {
    let world = World::new();
    let (old, new, stranger, caller) = (world.socket(), world.socket(), world.socket(), world.socket());
    fn exclusive(socket: &Socket, subject: &str) -> Result<(usize, Option<u64>)> {
        let mut request = ProvideRequest::new("a");
        (request.exclusive, request.takeover, request.subject) = (true, true, subject);
        socket.hub.provide(&request).try_finish().ok().unwrap().map(|provided| (provided.providers, provided.fence))
    }
    assert_eq!(exclusive(&old, "svc").unwrap(), (1, Some(1)));
    caller.call("1", "a/x");
    caller.call_with("2", "a/x", |call| (call.timeout, call.late) = (Some(SECOND), true));
    world.pass(SECOND);
    assert_eq!(codes(&exclusive(&stranger, "other")), Code::ServiceTaken);
    assert_eq!(exclusive(&new, "svc").unwrap(), (1, Some(2)));
    assert_eq!(*old.saw.withdrawn.lock(), ["a replaced"]);
    assert_eq!(caller.answers(), ["2: timeout maybe", "1: provider_gone maybe"]);
    assert_eq!((old.reply(0, "1"), old.reply(1, "1")), (ReplyOutcome::Unmatched, ReplyOutcome::Unmatched));
    caller.call("3", "a/x");
    assert_eq!((old.got().len(), new.got()), (2, vec!["3".to_owned()]));
    // The replaced provider may register again, and its disconnection does no harm.
    assert_eq!(old.hub.withdraw("a").unwrap_err().code(), Code::NotFound);
    assert_eq!(exclusive(&old, "svc").unwrap(), (1, Some(3)));
    drop((old, new, stranger, caller));
    world.assert_empty_after_a_minute();
}

#[test]
fn fencing_tokens_grow_even_if_the_name_was_forgotten() {
    let world = World::new();
    for fence in 1..=3 {
        let socket = world.socket();
        assert_eq!(socket.provide("a", |request| request.exclusive = true).unwrap().1, Some(fence));
        drop(socket);
        world.assert_empty_after_a_minute();
    }
}

#[test]
fn withdrawn_providers_finish_their_calls() {
    let world = World::new();
    let (provider, caller) = (world.provider("a"), world.socket());
    assert_eq!(provider.hub.withdraw("b").unwrap_err().code(), Code::NotFound);
    caller.call("1", "a/x");
    assert_eq!(provider.hub.withdraw("a").unwrap(), 1);
    assert_eq!(provider.hub.withdraw("a").unwrap(), 1);
    caller.call_with("2", "a/x", |call| call.wait = Some(Duration::ZERO));
    assert_eq!((caller.answers(), world.hub.counts().providers), (vec!["2: no_provider no".to_owned()], 0));
    // The name is free for others meanwhile.
    let heir = world.socket();
    heir.provide("a", |request| request.exclusive = true).unwrap();
    assert_eq!(provider.reply(0, "1"), ReplyOutcome::Answered);
    assert_eq!(provider.hub.withdraw("a").unwrap_err().code(), Code::NotFound);
    drop((heir, provider, caller));
    world.assert_empty_after_a_minute();
}

#[test]
fn a_withdrawn_provider_may_register_again_and_a_node_may_drain() {
    let world = World::new();
    let (provider, caller) = (world.provider("a"), world.socket());
    caller.call("1", "a/x");
    provider.hub.withdraw("a").unwrap();
    assert_eq!(provider.provide("a", |_| {}).unwrap(), (1, None));
    caller.call("2", "a/x");
    provider.provide("b", |_| {}).unwrap();
    assert_eq!(provider.hub.withdraw_all(), 2);
    assert_eq!((world.hub.counts().providers, world.hub.counts().services), (0, 0));
    provider.reply(0, "1");
    provider.reply(1, "2");
    assert_eq!(caller.answers(), ["1: 1", "2: 2"]);
    assert_eq!(provider.hub.withdraw_all(), 0);
}

#[test]
fn a_call_waits_for_a_service_that_had_a_provider() {
    let world = World::new();
    let caller = world.socket();
    caller.call("typo", "a/x");
    drop(world.provider("a"));
    for tag in ["1", "2", "3"] {
        caller.call(tag, "a/x");
    }
    caller.call_with("0", "a/x", |call| call.wait = Some(Duration::ZERO));
    assert_eq!(caller.answers(), ["typo: no_provider no", "0: no_provider no"]);
    assert_eq!(world.hub.counts().waiting, 3);
    assert_eq!(caller.hub.cancel(b"2"), 1);
    let provider = world.socket();
    let provided = provider.hub.provide(&ProvideRequest::new("a")).try_finish().ok().unwrap().unwrap();
    caller.call("4", "a/x");
    assert_eq!(provider.got(), [""; 0], "no call before the response to the registration");
    drop(provided);
    assert_eq!(provider.got(), ["1", "3", "4"]);
    assert_eq!(caller.answers()[2..], ["2: cancelled no"]);
    provider.reply(1, "1");
    assert_eq!(caller.answers()[3..], ["3: 1"]);

    drop(provider);
    caller.call("waits", "a/x");
    world.pass(2 * SECOND);
    assert_eq!(caller.answers().last().unwrap(), "waits: no_provider no");
    world.pass(58 * SECOND);
    caller.call("over", "a/x");
    assert_eq!(caller.answers().last().unwrap(), "over: no_provider no");
    assert_eq!(world.hub.counts().names, 0);
}

#[test]
fn a_call_may_set_its_wait_but_not_beyond_its_deadline() {
    let world = World::new();
    let caller = world.socket();
    caller.call_with("1", "new/x", |call| call.wait = Some(10 * SECOND));
    caller.call_with("2", "new/x", |call| (call.wait, call.timeout) = (Some(10 * SECOND), Some(3 * SECOND)));
    caller.call_with("3", "new/x", |call| (call.wait, call.timeout) = (Some(4 * SECOND), Some(5 * SECOND)));
    world.pass(3 * SECOND);
    assert_eq!(caller.answers(), ["2: timeout no"]);
    world.pass(SECOND);
    assert_eq!(caller.answers()[1..], ["3: no_provider no"]);
    let provider = world.provider("new");
    assert_eq!(provider.got(), ["1"]);
    world.pass(26 * SECOND);
    assert_eq!(caller.answers()[2..], ["1: timeout maybe"], "the wait counts");
    // A name without a provider is forgotten with its last call.
    caller.call_with("4", "typo/x", |call| call.wait = Some(SECOND));
    assert_eq!(world.hub.counts().names, 2);
    world.pass(SECOND);
    assert_eq!(world.hub.counts().names, 1);
}

#[test]
fn calls_beyond_the_limit_of_a_connection_create_no_names() {
    let world = World::with(|limits| limits.calls = 1);
    let caller = world.socket();
    for service in 0..101 {
        caller.call_with("1", &format!("new-{service}/x"), |call| call.wait = Some(SECOND));
    }
    assert_eq!((world.hub.counts().names, caller.answers()), (1, vec!["1: limit_reached -".to_owned(); 100]));
}

#[test]
fn waiting_calls_stay_queued_while_the_provider_is_busy() {
    let world = World::new();
    let (caller, provider) = (world.socket(), world.socket());
    drop(world.provider("a"));
    for tag in ["1", "2", "3"] {
        caller.call(tag, "a/x");
    }
    provider.provide("a", |request| request.concurrency = 1).unwrap();
    assert_eq!(provider.got(), ["1"]);
    caller.call("4", "a/x");
    assert_eq!(caller.answers(), ["4: busy no"]);
    provider.reply(0, "1");
    assert_eq!(provider.got(), ["1", "2"]);
    world.pass(2 * SECOND);
    assert_eq!(caller.answers()[2..], ["3: busy no"]);
}

#[test]
fn waiting_calls_are_bounded() {
    let world = World::with(|limits| limits.waiting = 2);
    let caller = world.socket();
    drop((world.provider("a"), world.provider("b")));
    caller.call("1", "a/x");
    caller.call("2", "b/x");
    caller.call("3", "a/x");
    assert_eq!(caller.answers(), ["3: no_provider no"]);
    caller.hub.cancel(b"1");
    caller.call("4", "a/x");
    assert_eq!(world.hub.counts().waiting, 2);

    let world = World::with(|limits| limits.waiting = 0);
    let caller = world.socket();
    caller.call_with("1", "new/x", |call| call.wait = Some(SECOND));
    let mut note = Call::new("newer", "x", None);
    note.wait = Some(SECOND);
    caller.hub.notify(&note);
    assert_eq!((caller.answers().len(), world.hub.counts().names), (1, 0));

    let world = World::with(|limits| limits.waiting_bytes = 50);
    let caller = world.socket();
    drop(world.provider("a"));
    caller.call(&"1".repeat(30), "a/x");
    caller.call("2".repeat(30).as_str(), "a/x");
    assert_eq!(world.hub.counts().waiting, 1);
    drop(caller);
    world.assert_empty_after_a_minute();
}

#[test]
fn a_call_that_was_not_written_goes_to_another_provider() {
    let world = World::new();
    let (one, two, caller) = (world.provider("a"), world.provider("a"), world.socket());
    *one.saw.written.lock() = Some(WriteOutcome::Full);
    for n in 0..4 {
        caller.call(&n.to_string(), "a/x");
    }
    assert_eq!((one.got().len(), two.got().len()), (0, 4));
    *two.saw.written.lock() = Some(WriteOutcome::Full);
    caller.call("full", "a/x");
    assert_eq!(caller.answers(), ["full: busy no"]);
    *one.saw.written.lock() = None;
    caller.call("freed", "a/x");
    assert_eq!(one.got(), ["freed"]);
    assert_eq!(world.hub.counts().pending, 5);
}

#[test]
fn a_provider_whose_connection_is_gone_is_removed() {
    let world = World::new();
    let (one, caller) = (world.socket(), world.socket());
    one.provide("a", |request| request.exclusive = true).unwrap();
    caller.call("1", "a/x");
    *one.saw.written.lock() = Some(WriteOutcome::Gone);
    caller.call("2", "a/x");
    caller.hub.notify(&Call::new("a", "n", Some(fake_params())));
    assert_eq!(caller.answers(), ["1: provider_gone maybe"]);
    assert_eq!((world.hub.counts().waiting, world.hub.counts().providers), (2, 0));
    let two = world.socket();
    two.provide("a", |request| request.exclusive = true).unwrap();
    assert_eq!(two.got(), ["2", "n"]);
    drop(one);
    two.reply(0, "1");
    assert_eq!(caller.answers()[1..], ["2: 1"]);
}

fn fake_params() -> &'static RawValue {
    serde_json::from_str(r#"["n"]"#).unwrap()
}

#[test]
fn a_full_provider_fails_the_waiting_calls() {
    let world = World::new();
    let (caller, provider) = (world.socket(), world.socket());
    drop(world.provider("a"));
    caller.call("1", "a/x");
    caller.hub.notify(&Call::new("a", "n", None));
    *provider.saw.written.lock() = Some(WriteOutcome::Full);
    provider.provide("a", |_| {}).unwrap();
    assert_eq!((caller.answers(), world.hub.counts().waiting), (vec!["1: busy no".to_owned()], 0));
}

#[test]
fn reserved_and_malformed_names_are_rejected() {
    let world = World::new();
    let socket = world.socket();
    for name in ["", "weir", "weir/x", "rpc.x", "$x", "a\nb", &"x".repeat(129)] {
        assert_eq!(codes(&socket.provide(name, |_| {})), Code::InvalidParams, "{name:?}");
    }
    assert_eq!(codes(&socket.provide("a", |request| request.concurrency = 0)), Code::InvalidParams);
    assert_eq!(codes(&socket.provide("a", |request| request.methods = &["x\n"])), Code::InvalidParams);
    assert_eq!(world.hub.counts(), HubCounts { connections: 1, ..HubCounts::default() });
}

#[test]
fn the_number_of_services_is_limited() {
    let world = World::with(|limits| (limits.services, limits.provides) = (3, 2));
    let (one, two) = (world.socket(), world.socket());
    one.provide("a", |_| {}).unwrap();
    one.provide("b", |_| {}).unwrap();
    assert_eq!(codes(&one.provide("c", |_| {})), Code::LimitReached);
    two.provide("c", |_| {}).unwrap();
    assert_eq!(codes(&two.provide("d", |_| {})), Code::LimitReached);
    two.provide("a", |_| {}).unwrap();
    assert_eq!((world.hub.counts().names, world.hub.counts().services), (3, 3));
}

#[test]
fn forgotten_names_cost_nothing() {
    let world = World::with(|limits| limits.services = 100);
    for n in 0..10_000 {
        drop(world.provider(&n.to_string()));
        world.hub.sweep();
        assert!(world.hub.counts().names <= 101);
    }
    // A name whose provider flaps is remembered once.
    for _ in 0..1_000 {
        drop(world.provider("flapping"));
    }
    assert!(world.hub.counts().remembered <= 101);
    world.assert_empty_after_a_minute();
}

#[test]
fn discovery() {
    let world = World::new();
    let (one, two, caller) = (world.socket(), world.socket(), world.socket());
    one.provide("jwt", |request| request.methods = &["make", "check"]).unwrap();
    two.provide("jwt", |request| request.methods = &["make"]).unwrap();
    one.provide("job", |request| request.exclusive = true).unwrap();
    drop(world.provider("gone"));
    caller.call("1", "jwt/make");
    let info = |service: &str, providers, in_flight, exclusive, methods: &[&str]| ServiceInfo {
        service: service.into(),
        providers,
        in_flight,
        exclusive,
        methods: methods.iter().map(|method| method.to_string()).collect(),
    };
    let job = info("job", 1, 0, true, &[]);
    let jwt = info("jwt", 2, 1, false, &["check", "make"]);
    let weir = info("weir", 1, 0, true, &["echo", "time"]);
    assert_eq!(world.hub.services("j", 10), [job.clone(), jwt.clone()]);
    assert_eq!(world.hub.services("", 10), [job.clone(), jwt, weir]);
    assert_eq!(world.hub.services("", 1), [job]);
    assert_eq!(
        serde_json::to_string(&world.hub.services("job", 1)).unwrap(),
        r#"[{"service":"job","providers":1,"in_flight":0,"exclusive":true}]"#
    );
}

#[test]
fn changes_are_published_once_per_service() {
    let world = World::new();
    let published = || -> Vec<String> {
        let changes = world.take_changes();
        changes.iter().map(|it| format!("{} {} {}", it.service, it.kind.as_str(), it.providers)).collect()
    };
    let one = world.provider("a");
    let two = world.provider("a");
    assert_eq!(published(), ["a provided 2"]);
    drop(two);
    drop(world.provider("b"));
    assert_eq!(published(), ["a withdrawn 1"], "b has the same providers as before");
    for _ in 0..1_000 {
        one.hub.withdraw("a").unwrap();
        one.provide("a", |request| (request.exclusive, request.subject) = (true, "s")).unwrap();
    }
    assert_eq!(published(), [""; 0]);
    let three = world.socket();
    three.provide("a", |request| (request.exclusive, request.takeover, request.subject) = (true, true, "s")).unwrap();
    assert_eq!(published(), ["a provided 1"], "the provider was replaced");
    drop((one, three));
    assert_eq!(published(), ["a withdrawn 0"]);
}

#[tokio::test]
async fn a_change_wakes_the_publisher() {
    let world = World::new();
    let hub = world.hub.clone();
    let waiter = tokio::spawn(async move { hub.next_changes().await });
    tokio::task::yield_now().await;
    let _provider = world.provider("a");
    let changes = waiter.await.unwrap();
    let change = changes[0].change();
    assert_eq!(serde_json::to_string(change).unwrap(), r#"{"service":"a","providers":1,"exclusive":false}"#);
    assert_eq!((changes.len(), change.kind), (1, ServiceChangeKind::Provided));
}

#[test]
fn a_provider_withdrawn_during_its_last_failed_write_is_removed() {
    let world = World::new();
    let (provider, caller) = (Arc::new(world.provider("a")), world.socket());
    *provider.saw.written.lock() = Some(WriteOutcome::Full);
    let leaving = provider.clone();
    *provider.saw.meanwhile.lock() = Some(Box::new(move || assert_eq!(leaving.hub.withdraw("a").unwrap(), 1)));
    caller.call("1", "a/x");
    assert!(provider.hub.is_idle(), "its registration has ended");
    world.pass(3 * SECOND);
    assert_eq!(caller.answers(), ["1: no_provider no"]);
    drop((provider, caller));
    world.assert_empty_after_a_minute();
}
