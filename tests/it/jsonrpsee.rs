//! jsonrpsee, the strictest Rust client: a response with an unknown id or an extra member in `error` ends its
//! connection. It is used as caller and subscriber. It cannot provide, because it treats a request of the hub as a
//! notification.

use std::{collections::BTreeSet, time::Duration};

use jsonrpsee_core::{
    client::{Client, ClientT, Error, Subscription, SubscriptionClientT},
    params::{ArrayParams, BatchRequestBuilder, ObjectParams},
};
use jsonrpsee_ws_client::WsClientBuilder;
use serde_json::{Value, json};

use crate::support::{Process, in_time};

async fn connect(weir: &Process) -> Client {
    WsClientBuilder::default().build(format!("ws://{}/v1/ws", weir.address)).await.unwrap()
}

fn object(value: Value) -> ObjectParams {
    let mut params = ObjectParams::new();
    for (name, value) in value.as_object().unwrap() {
        params.insert(name, value).unwrap();
    }
    params
}

fn array(value: Value) -> ArrayParams {
    let mut params = ArrayParams::new();
    params.insert(value).unwrap();
    params
}

fn code(outcome: Result<Value, Error>) -> i32 {
    match outcome {
        Err(Error::Call(error)) => error.code(),
        other => panic!("an error was expected: {other:?}"),
    }
}

#[tokio::test]
async fn calls_take_named_and_positional_params() {
    let weir = Process::start(&[]);
    let client = connect(&weir).await;
    let echo: Value = client.request("weir/echo", object(json!({"n": 1}))).await.unwrap();
    assert_eq!(echo, json!({"n": 1}));
    // `rpc_params!` creates arrays: weir takes an array of one object as that object.
    let placed: Value = client.request("weir.publish", array(json!({"channel": "a", "data": 1}))).await.unwrap();
    assert_eq!(placed["offset"], 1);
    let page: Value = client.request("weir.read", object(json!({"channels": ["a"], "consumer": "c"}))).await.unwrap();
    let commit = object(json!({"consumer": "c", "after": page["next"]}));
    let nothing: Value = client.request("weir.commit", commit).await.unwrap();
    assert_eq!(nothing, Value::Null);
}

#[tokio::test]
async fn errors_keep_the_connection_open() {
    let weir = Process::start(&[]);
    let client = connect(&weir).await;
    assert_eq!(code(client.request("nobody/home", ArrayParams::new()).await), -32020);
    assert_eq!(code(client.request("weir.nonsense", ArrayParams::new()).await), -32601);
    assert_eq!(code(client.request("weir.publish", array(json!(5))).await), -32602);
    // The client times out before the server. No late response is sent.
    let hurried = WsClientBuilder::default()
        .request_timeout(Duration::from_millis(50))
        .build(format!("ws://{}/v1/ws", weir.address))
        .await
        .unwrap();
    let outcome: Result<Value, Error> =
        hurried.request("weir.read", object(json!({"channels": ["quiet"], "wait": "300ms"}))).await;
    assert!(matches!(outcome, Err(Error::RequestTimeout)), "{outcome:?}");
    for client in [&client, &hurried] {
        let echo: Value = client.request("weir/echo", array(json!(1))).await.unwrap();
        assert_eq!(echo, json!([1]));
        assert!(client.is_connected());
    }
}

#[tokio::test]
async fn a_batch_is_answered_with_one_response_per_call() {
    let weir = Process::start(&[]);
    let client = connect(&weir).await;
    let mut batch = BatchRequestBuilder::new();
    for n in 0..50 {
        batch.insert("weir/echo", array(json!(n))).unwrap();
    }
    batch.insert("nobody/home", ArrayParams::new()).unwrap();
    let answers = client.batch_request::<Value>(batch).await.unwrap();
    assert_eq!((answers.num_successful_calls(), answers.num_failed_calls()), (50, 1));
}

#[tokio::test]
async fn subscribe_to_method_receives_events() {
    let weir = Process::start(&[]);
    let client = connect(&weir).await;
    let mut events: Subscription<Value> = client.subscribe_to_method("weir.event").await.unwrap();
    let answer: Value = client.request("weir.subscribe", object(json!({"channels": ["news"]}))).await.unwrap();
    assert_eq!(answer["channels"][0]["channel"], "news");
    // From another connection and from the subscribed one.
    let other = connect(&weir).await;
    for n in 0..200 {
        let from = if n % 2 == 0 { &client } else { &other };
        let _: Value = from.request("weir.publish", object(json!({"channel": "news", "data": n}))).await.unwrap();
    }
    let mut seen = Vec::new();
    while seen.len() < 200 {
        let event = in_time(events.next()).await.expect("the subscription goes on").unwrap();
        seen.push(event["data"].as_u64().unwrap());
    }
    assert_eq!(seen, (0..200).collect::<Vec<_>>());
}

#[tokio::test]
async fn a_thousand_concurrent_calls_are_answered() {
    let weir = Process::start(&[]);
    let client = connect(&weir).await;
    let calls = (0..1000).map(|n| client.request::<Value, _>("weir/echo", array(json!(n))));
    let answers = in_time(futures_util::future::join_all(calls)).await;
    let seen: BTreeSet<u64> = answers.into_iter().map(|answer| answer.unwrap()[0].as_u64().unwrap()).collect();
    assert_eq!(seen.len(), 1000);
}
