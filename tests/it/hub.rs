//! The life of a call, with connections that record what the hub writes to them.

mod fake;
mod nodes;
mod providers;
mod random;

use std::{
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering::Relaxed},
    },
    time::Duration,
};

use parking_lot::Mutex;
use serde_json::value::RawValue;

use weir::{
    error::{Code, Result},
    rpc::*,
};

use fake::{World, raw};

const SECOND: Duration = Duration::from_secs(1);

#[test]
fn a_call_and_its_answer() {
    let world = World::new();
    let (provider, caller) = (world.provider("jwt"), world.socket());
    caller.call("a1", "jwt/make");
    let got = provider.saw.calls.lock()[0].clone();
    assert!(got.id.unwrap().to_string().starts_with("w:"));
    assert_eq!((got.name.as_str(), got.params.as_deref(), got.meta), ("make", Some(r#"["a1"]"#), None));
    assert_eq!((world.hub.counts().pending, caller.hub.in_flight()), (1, 1));
    assert_eq!(provider.reply(0, r#"{"token": "x" }"#), ReplyOutcome::Answered);
    assert_eq!(caller.answers(), [r#"a1: {"token": "x" }"#]);
    assert_eq!((world.hub.counts().pending, caller.hub.in_flight()), (0, 0));
    drop((provider, caller));
    world.assert_empty_after_a_minute();
}

#[test]
fn a_provider_s_error_is_passed_on() {
    let world = World::new();
    let (provider, caller) = (world.provider("jwt"), world.socket());
    caller.call("1", "jwt/make");
    let data = raw(r#"{"a":1}"#);
    let error =
        ProviderError { code: 42, message: "no such user".into(), data: Some(std::borrow::Cow::Borrowed(data)) };
    assert_eq!(error.to_raw().get(), r#"{"code":42,"message":"no such user","data":{"a":1}}"#);
    let id = provider.saw.calls.lock()[0].id.unwrap();
    provider.hub.reply(id, CallAnswer::Error(error));
    assert_eq!(caller.answers(), ["1: error 42 no such user"]);
}

#[test]
fn a_reply_without_result_or_error_fails_the_call() {
    let world = World::new();
    let (provider, caller) = (world.provider("jwt"), world.socket());
    caller.call("1", "jwt/make");
    let id = provider.saw.calls.lock()[0].id.unwrap();
    provider.hub.reply(id, CallAnswer::bad_reply("has neither a result nor an error"));
    assert_eq!(caller.answers(), ["1: bad_reply maybe"]);
}

#[test]
fn only_the_provider_that_has_the_call_can_answer_and_only_once() {
    let world = World::new();
    let (one, caller) = (world.provider("a"), world.socket());
    caller.call("1", "a/x");
    let other = world.provider("a");
    let elsewhere = world.provider("b");
    let id = one.saw.calls.lock()[0].id.unwrap();
    for stranger in [&other, &elsewhere, &caller] {
        assert_eq!(stranger.hub.reply(id, CallAnswer::Result(raw("1"))), ReplyOutcome::Unmatched);
    }
    assert_eq!(one.reply(0, "2"), ReplyOutcome::Answered);
    assert_eq!(one.reply(0, "3"), ReplyOutcome::Unmatched);
    // The entry is reused with another sequence number.
    caller.call("2", "a/x");
    caller.call("3", "a/x");
    assert_eq!(one.reply(0, "4"), ReplyOutcome::Unmatched);
    assert_eq!(caller.answers(), ["1: 2"]);
}

#[test]
fn equal_caller_ids_are_answered_separately() {
    let world = World::new();
    let (provider, one, two) = (world.provider("a"), world.socket(), world.socket());
    one.call("7", "a/x");
    two.call("7", "a/x");
    two.call("7", "a/y");
    for nth in 0..3 {
        provider.reply(nth, &nth.to_string());
    }
    assert_eq!(one.answers(), ["7: 0"]);
    assert_eq!(two.answers(), ["7: 1", "7: 2"]);
    two.call("7", "a/x");
    two.call("7", "a/x");
    assert_eq!(two.hub.cancel(b"7"), 2);
    assert_eq!(two.answers()[2..], ["7: cancelled maybe", "7: cancelled maybe"]);
}

#[test]
fn an_overdue_call_times_out_and_may_have_been_executed() {
    let world = World::new();
    let (provider, caller) = (world.provider("a"), world.socket());
    caller.call("usual", "a/x");
    caller.call_with("own", "a/x", |call| call.timeout = Some(5 * SECOND));
    world.pass(5 * SECOND - Duration::from_millis(1));
    assert_eq!(caller.answers(), [""; 0]);
    world.pass(Duration::from_millis(1));
    assert_eq!(caller.answers(), ["own: timeout maybe"]);
    world.pass(25 * SECOND);
    assert_eq!(caller.answers()[1..], ["usual: timeout maybe"]);
    // Counted, and not delivered.
    assert_eq!((provider.reply(0, "1"), provider.reply(0, "1")), (ReplyOutcome::Late, ReplyOutcome::Unmatched));
    assert_eq!((caller.late().len(), caller.answers().len()), (0, 2));
    assert_eq!(world.metrics.value("weir_rpc_late_total"), 1.0);
}

#[test]
fn invalid_timeouts_are_rejected() {
    let world = World::new();
    let (_provider, caller) = (world.provider("a"), world.socket());
    caller.call_with("long", "a/x", |call| call.timeout = Some(601 * SECOND));
    caller.call_with("zero", "a/x", |call| call.timeout = Some(Duration::ZERO));
    caller.call_with("wait", "a/x", |call| call.wait = Some(601 * SECOND));
    caller.call_with("fine", "a/x", |call| call.timeout = Some(600 * SECOND));
    assert_eq!(caller.answers(), ["long: invalid_params -", "zero: invalid_params -", "wait: invalid_params -"]);
}

#[test]
fn a_late_reply_is_delivered_within_the_window_if_requested() {
    let world = World::new();
    let (provider, caller) = (world.provider("a"), world.socket());
    for tag in ["1", "2"] {
        caller.call_with(tag, "a/x", |call| (call.late, call.timeout) = (true, Some(SECOND)));
    }
    world.pass(SECOND);
    assert_eq!(world.hub.counts().late, 2);
    world.pass(299 * SECOND);
    assert_eq!(provider.reply(0, "true"), ReplyOutcome::Late);
    assert_eq!(caller.late(), ["1: true"]);
    world.pass(SECOND);
    assert_eq!(world.hub.counts().late, 0);
    assert_eq!(provider.reply(1, "true"), ReplyOutcome::Unmatched);
    assert_eq!(caller.late().len(), 1);
}

#[test]
fn late_calls_are_bounded_and_end_with_either_connection() {
    let world = World::with(|limits| limits.late = 2);
    let (provider, other, caller) = (world.provider("a"), world.provider("b"), world.socket());
    for tag in ["1", "2", "3"] {
        caller.call_with(tag, "a/x", |call| (call.late, call.timeout) = (true, Some(SECOND)));
        world.pass(SECOND);
    }
    assert_eq!(world.hub.counts().late, 2);
    assert_eq!(provider.reply(0, "0"), ReplyOutcome::Unmatched);
    assert_eq!(provider.reply(1, "1"), ReplyOutcome::Late);
    drop(provider);
    assert_eq!(world.hub.counts().late, 0);
    caller.call_with("4", "b/x", |call| (call.late, call.timeout) = (true, Some(SECOND)));
    world.pass(SECOND);
    assert_eq!(world.hub.counts().late, 1);
    drop(caller);
    assert_eq!((world.hub.counts().late, other.reply(0, "1")), (0, ReplyOutcome::Unmatched));
}

#[test]
fn a_cancelled_call_is_answered_at_once() {
    let world = World::new();
    let (plain, caller) = (world.provider("plain"), world.socket());
    let notified = world.socket();
    notified.provide("notified", |request| request.meta = true).unwrap();
    caller.call("1", "plain/x");
    caller.call("2", "notified/x");
    assert_eq!((caller.hub.cancel(b"1"), caller.hub.cancel(b"2"), caller.hub.cancel(b"3")), (1, 1, 0));
    assert_eq!(caller.answers(), ["1: cancelled maybe", "2: cancelled maybe"]);
    assert!(plain.saw.cancels.lock().is_empty());
    let id = notified.saw.calls.lock()[0].id.unwrap();
    assert_eq!(*notified.saw.cancels.lock(), [id]);
    // A reply to a cancelled call is dropped.
    assert_eq!((plain.reply(0, "1"), notified.reply(0, "1")), (ReplyOutcome::Unmatched, ReplyOutcome::Unmatched));
    assert_eq!((caller.answers().len(), world.hub.counts().pending), (2, 0));
}

#[test]
fn a_closed_caller_cancels_its_calls() {
    let world = World::new();
    let (caller, notified) = (world.socket(), world.socket());
    notified.provide("notified", |request| (request.meta, request.concurrency) = (true, 1)).unwrap();
    caller.call("1", "notified/x");
    let saw = caller.saw.clone();
    drop(caller);
    assert_eq!((notified.saw.cancels.lock().len(), world.hub.counts().pending), (1, 0));
    assert_eq!(notified.reply(0, "1"), ReplyOutcome::Unmatched);
    assert!(saw.answers.lock().is_empty());
}

#[test]
fn a_closed_provider_fails_its_calls_at_once() {
    let world = World::new();
    let (provider, other, caller) = (world.provider("a"), world.provider("b"), world.socket());
    for tag in ["1", "2", "3"] {
        caller.call(tag, "a/x");
    }
    caller.call("4", "b/x");
    provider.reply(1, "true");
    drop(provider);
    let mut answers = caller.answers();
    answers[1..].sort();
    assert_eq!(answers, ["2: true", "1: provider_gone maybe", "3: provider_gone maybe"]);
    assert_eq!(other.reply(0, "1"), ReplyOutcome::Answered);
}

#[test]
fn calls_in_flight_are_limited_per_connection() {
    let world = World::with(|limits| limits.calls = 2);
    let (provider, caller) = (world.provider("a"), world.socket());
    for tag in ["1", "2", "3"] {
        caller.call(tag, "a/x");
    }
    assert_eq!(caller.answers(), ["3: limit_reached -"]);
    provider.reply(0, "1");
    caller.call("4", "a/x");
    assert_eq!(provider.got(), ["1", "2", "4"]);
}

#[test]
fn a_notification_reaches_one_provider_and_has_no_answer() {
    let world = World::new();
    let (one, two, caller) = (world.socket(), world.socket(), world.socket());
    for provider in [&one, &two] {
        provider.provide("mail", |request| (request.concurrency, request.meta) = (1, true)).unwrap();
    }
    for _ in 0..4 {
        caller.hub.notify(&Call::new("mail", "send", None));
    }
    assert_eq!(one.saw.calls.lock().len() + two.saw.calls.lock().len(), 4);
    assert_eq!(one.saw.calls.lock()[0].id, None);
    assert_eq!(one.saw.calls.lock()[0].meta, Some(serde_json::json!({ "caller": "" })));
    caller.hub.notify(&Call::new("nobody", "send", None));
    caller.hub.notify(&Call::new("mail", "se\nnd", None));
    assert_eq!((caller.answers().len(), world.hub.counts().pending), (0, 0));
    // Like a call, it waits for a provider of a service that had one.
    drop((one, two));
    caller.hub.notify(&Call::new("mail", "send", Some(raw(r#"["waited"]"#))));
    assert_eq!(world.hub.counts().waiting, 1);
    assert_eq!(world.provider("mail").got(), ["waited"]);
    caller.hub.notify(&Call::new("mail", "send", None));
    world.pass(2 * SECOND);
    assert_eq!((world.hub.counts().waiting, caller.answers().len()), (0, 0));
}

#[test]
fn the_built_in_service() {
    let world = World::new();
    let caller = world.socket();
    caller.call("1", "weir/echo");
    caller.hub.call(CallerId::new(b"2"), &Call::new("weir", "echo", None));
    caller.call("3", "weir/nothing");
    caller.hub.call(CallerId::new(b"4"), &Call::new("weir", "time", None));
    let answers = caller.answers();
    assert_eq!(answers[..3], [r#"1: ["1"]"#, "2: null", "3: method_not_found -"]);
    assert!(answers[3].starts_with(r#"4: {"time":1"#), "{}", answers[3]);
}

#[test]
fn names_of_calls_are_checked() {
    assert_eq!(Call::split("a/b/c").unwrap(), ("a/b", "c"));
    assert_eq!(Call::split("ab").unwrap_err().code(), Code::MethodNotFound);
    let world = World::new();
    let caller = world.socket();
    for (tag, service, method) in [("1", "a", ""), ("2", "a", "x\ty"), ("3", "", "x")] {
        caller.hub.call(CallerId::new(tag.as_bytes()), &Call::new(service, method, None));
    }
    assert!(caller.answers().iter().all(|answer| answer.ends_with("invalid_params -")), "{:?}", caller.answers());
}

#[test]
fn a_provider_receives_meta_if_it_asks() {
    let world = World::new();
    let (provider, caller) = (world.socket(), world.socket());
    let registered = provider.provide("a", |request| {
        (request.meta, request.names, request.exclusive) = (true, MethodNames::Qualified, true)
    });
    assert_eq!(registered.unwrap(), (1, Some(1)));
    caller.call_with("1", "a/x", |call| {
        (call.caller, call.traceparent, call.timeout) = ("user-7", Some("00-1-2-03"), Some(SECOND));
    });
    let got = provider.saw.calls.lock()[0].clone();
    assert_eq!(got.name, "a/x");
    let meta = serde_json::json!({ "caller": "user-7", "deadline_ms": 1_000, "traceparent": "00-1-2-03", "fence": 1 });
    assert_eq!(got.meta, Some(meta));
}

/// A transport may reply from inside `Peer::call`, and a connection may call itself.
#[test]
fn a_provider_that_replies_at_once() {
    struct ReplyingPeer(Mutex<Option<std::sync::Weak<HubConnection>>>, AtomicUsize);
    impl Peer for ReplyingPeer {
        fn call(&self, call: &ForwardedCall<'_>) -> WriteOutcome {
            let connection = self.0.lock().as_ref().and_then(std::sync::Weak::upgrade).unwrap();
            connection.reply(call.id.unwrap(), CallAnswer::Result(raw("1")));
            WriteOutcome::Written
        }
        fn cancel(&self, _: CallId) {}
        fn answer(&self, _: &CallerId, _: CallAnswer<'_>) -> PeerRoom {
            self.1.fetch_add(1, Relaxed);
            PeerRoom::Free
        }
        fn late(&self, _: &CallerId, _: CallAnswer<'_>) -> PeerRoom {
            PeerRoom::Free
        }
        fn withdrawn(&self, _: &str, _: &str) {}
    }
    let world = World::new();
    let peer = Arc::new(ReplyingPeer(Mutex::default(), AtomicUsize::new(0)));
    let connection = Arc::new(HubConnection::new(&world.hub, peer.clone()));
    *peer.0.lock() = Some(Arc::downgrade(&connection));
    drop(connection.provide(&ProvideRequest::new("self")).try_finish().ok().unwrap().unwrap());
    connection.call(CallerId::new(b"1"), &Call::new("self", "x", None));
    assert_eq!((peer.1.load(Relaxed), world.hub.counts().pending), (1, 0));
    drop(connection);
    world.assert_empty_after_a_minute();
}

#[tokio::test]
async fn a_call_without_a_connection() {
    let world = World::new();
    let provider = world.socket();
    provider.provide("a", |request| request.meta = true).unwrap();
    let answer = call_once(&world.hub, &Call::new("a", "x", None));
    provider.reply(0, "[1]");
    assert_eq!(answer.await.unwrap().get(), "[1]");
    let Err(CallError::Weir(error)) = call_once(&world.hub, &Call::new("b", "x", None)).await else {
        panic!("b has no provider")
    };
    assert_eq!(error.code(), Code::NoProvider);
    drop(call_once(&world.hub, &Call::new("a", "x", None)));
    assert_eq!(provider.saw.cancels.lock().len(), 1);
    drop(provider);
    world.assert_empty_after_a_minute();
}
