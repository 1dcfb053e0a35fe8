//! Calls over HTTP.

use std::sync::Arc;

use serde_json::{Value, json, value::RawValue};
use tokio::sync::mpsc;
use weir::rpc::{
    CallAnswer, CallId, CallerId, ForwardedCall, HubConnection, Peer, PeerRoom, ProvideRequest, ProviderError,
    WriteOutcome,
};

use crate::support::{Weir, weir};

/// A provider in this process. Its calls are received from `calls`.
struct Provider {
    connection: HubConnection,
    calls: mpsc::UnboundedReceiver<ProviderMessage>,
}

#[derive(Debug)]
enum ProviderMessage {
    Call { id: CallId, method: String, params: Option<String>, meta: Option<Value> },
    Cancelled(CallId),
}

struct ChannelPeer(mpsc::UnboundedSender<ProviderMessage>);

impl Peer for ChannelPeer {
    fn call(&self, call: &ForwardedCall<'_>) -> WriteOutcome {
        let call = ProviderMessage::Call {
            id: call.id.unwrap(),
            method: call.method.to_owned(),
            params: call.params.map(|params| params.get().to_owned()),
            meta: call.meta.map(|meta| serde_json::to_value(meta).unwrap()),
        };
        if self.0.send(call).is_ok() { WriteOutcome::Written } else { WriteOutcome::Gone }
    }

    fn cancel(&self, id: CallId) {
        let _ = self.0.send(ProviderMessage::Cancelled(id));
    }

    fn answer(&self, _: &CallerId, _: CallAnswer<'_>) -> PeerRoom {
        PeerRoom::Free
    }

    fn late(&self, _: &CallerId, _: CallAnswer<'_>) -> PeerRoom {
        PeerRoom::Free
    }

    fn withdrawn(&self, _: &str, _: &str) {}
}

fn provide(weir: &Weir, service: &str, concurrency: u32) -> Provider {
    let (tx, calls) = mpsc::unbounded_channel();
    let connection = HubConnection::new(&weir.node().hub, Arc::new(ChannelPeer(tx)));
    drop(
        connection
            .provide(&ProvideRequest { meta: true, concurrency, ..ProvideRequest::new(service) })
            .try_finish()
            .ok()
            .unwrap()
            .unwrap(),
    );
    Provider { connection, calls }
}

impl Provider {
    async fn next(&mut self) -> (CallId, String, Option<String>, Option<Value>) {
        match self.calls.recv().await.unwrap() {
            ProviderMessage::Call { id, method, params, meta } => (id, method, params, meta),
            ProviderMessage::Cancelled(id) => panic!("{id:?} was cancelled"),
        }
    }

    /// Answers method `error:CODE` with that error and every other method with its params.
    async fn serve(mut self) {
        loop {
            let (id, method, params, _) = self.next().await;
            let data = RawValue::from_string(params.clone().unwrap_or("null".into())).unwrap();
            let answer = match method.strip_prefix("error:") {
                Some(code) => CallAnswer::Error(ProviderError {
                    code: code.parse().unwrap(),
                    message: "no such user".into(),
                    data: params.is_some().then_some(std::borrow::Cow::Borrowed(&*data)),
                }),
                None => CallAnswer::Result(&data),
            };
            self.connection.reply(id, answer);
        }
    }
}

#[tokio::test]
async fn the_built_in_service_is_listed_and_called() {
    let weir = weir().await;
    let echo = weir.post("/v1/services/weir/echo", r#"{"n": 1}"#).await.expect(200);
    assert_eq!((echo.header("content-type"), echo.text()), (Some("application/json"), r#"{"n": 1}"#));
    weir.post("/v1/services/weir/time", "").await.expect(200);
    let list = weir.get("/v1/services").await.expect(200).json();
    assert_eq!(list["services"][0]["service"], "weir");
    assert_eq!(weir.get("/v1/services?prefix=x").await.json(), json!({"services": []}));
    weir.get("/v1/services?prefx=x").await.expect_problem("invalid_params");
}

#[tokio::test]
async fn the_last_segment_is_the_method_and_the_result_is_the_body() {
    let weir = weir().await;
    let mut provider = provide(&weir, "billing/v2", 1_000);
    let call = tokio::spawn(
        weir.request("POST", "/v1/services/billing/v2/charge%21?timeout=5s&_=1")
            .header("content-type", "text/plain")
            .header("traceparent", "00-1")
            .body("[12345678901234567890123, 1.0]")
            .into_future(),
    );
    let (id, method, params, meta) = provider.next().await;
    assert_eq!((&*method, params.as_deref()), ("charge!", Some("[12345678901234567890123, 1.0]")));
    let meta = meta.unwrap();
    assert_eq!((&meta["caller"], &meta["traceparent"]), (&json!(""), &json!("00-1")));
    assert!((1..=5_000).contains(&meta["deadline_ms"].as_u64().unwrap()));
    let result = RawValue::from_string(r#"{"big": 12345678901234567890123}"#.into()).unwrap();
    provider.connection.reply(id, CallAnswer::Result(&result));
    assert_eq!(call.await.unwrap().expect(200).text(), r#"{"big": 12345678901234567890123}"#);
    let call = tokio::spawn(weir.request("POST", "/v1/services/billing/v2/void").into_future());
    let (id, _, params, _) = provider.next().await;
    assert_eq!(params, None);
    provider.connection.reply(id, CallAnswer::Result(RawValue::NULL));
    assert_eq!(call.await.unwrap().expect(200).text(), "null");
}

#[tokio::test]
async fn errors_of_a_provider_become_problem_documents() {
    let weir = weir().await;
    tokio::spawn(provide(&weir, "s", 1_000).serve());
    for (code, body, status, name) in [
        (-32601, "", 404, "method_not_found"),
        (-32602, "", 400, "invalid_params"),
        (-32603, "", 500, "internal"),
        (42, "", 422, "service_error"),
        (-32000, r#"{"status":409,"big":12345678901234567890123}"#, 409, "service_error"),
        (-32602, r#"{"status":451}"#, 451, "invalid_params"),
        (42, r#"{"status":200}"#, 422, "service_error"),
        (42, r#"{"status":"409"}"#, 422, "service_error"),
        (42, r#"[409]"#, 422, "service_error"),
    ] {
        let reply = weir.post(format!("/v1/services/s/error:{code}"), body).await.expect(status);
        let problem = reply.json();
        assert_eq!((problem["code"].as_str(), problem["status"].as_u64()), (Some(name), Some(status.into())));
        assert_eq!((&problem["error"]["code"], &problem["error"]["message"]), (&json!(code), &json!("no such user")));
        assert_eq!(reply.header("content-type"), Some("application/problem+json"));
        match body {
            "" => assert_eq!(problem["error"].get("data"), None),
            data => assert!(reply.text().contains(&format!(r#""data":{data}"#)), "verbatim: {}", reply.text()),
        }
    }
}

#[tokio::test]
async fn invalid_calls_are_rejected() {
    let weir = weir().with(|config| config.limits.frame = 100).await;
    let call = |path: &str, body: &str| weir.post(format!("/v1/services/{path}"), body.to_owned());
    call("weir/echo", "{").await.expect_problem("parse_error");
    call("weir/echo", "7").await.expect_problem("invalid_params");
    call("weir/echo", "\"text\"").await.expect_problem("invalid_params");
    call("weir/echo", &format!("[\"{}\"]", "x".repeat(100))).await.expect_problem("too_large");
    call("weir/echo?timeout=5", "").await.expect_problem("invalid_params");
    call("weir/echo?timeout=11m", "").await.expect_problem("invalid_params");
    call("weir/echo?time=5s", "").await.expect_problem("invalid_params");
    call("weir/nothing", "").await.expect_problem("method_not_found");
    call("weir", "").await.expect_problem("method_not_found");
    let problem = call("nobody/x", "").await;
    assert_eq!(problem.header("retry-after"), Some("1"));
    let problem = problem.expect_problem("no_provider");
    assert_eq!((&problem["executed"], &problem["retry_after_ms"]), (&json!("no"), &json!(1_000)));
    weir.get("/v1/services/weir/echo").await.expect_problem("method_not_allowed");
    let foreign = weir.request("POST", "/v1/services/weir/echo").header("origin", "http://localhost:1");
    foreign.body("{}").await.expect_problem("unsupported_media_type");
}

#[tokio::test]
async fn calls_fail_when_a_provider_is_busy_slow_or_gone() {
    let weir = weir().await;
    let mut provider = provide(&weir, "s", 1);
    let slow = tokio::spawn(weir.request("POST", "/v1/services/s/x?timeout=100ms").into_future());
    provider.next().await;
    assert_eq!(weir.post("/v1/services/s/y", "").await.expect_problem("busy")["executed"], "no");
    assert_eq!(slow.await.unwrap().expect_problem("timeout")["executed"], "maybe");

    let mut provider = provide(&weir, "t", 1);
    let call = tokio::spawn(weir.request("POST", "/v1/services/t/x").into_future());
    let (id, ..) = provider.next().await;
    provider.connection.reply(id, CallAnswer::bad_reply("has neither result nor error"));
    assert_eq!(call.await.unwrap().expect_problem("bad_reply")["executed"], "maybe");
    let call = tokio::spawn(weir.request("POST", "/v1/services/t/x").into_future());
    provider.next().await;
    drop(provider);
    assert_eq!(call.await.unwrap().expect_problem("provider_gone")["executed"], "maybe");
}

#[tokio::test]
async fn a_disconnected_caller_cancels_its_call() {
    let weir = weir().await;
    let mut provider = provide(&weir, "s", 1);
    let mut client = weir.client().await;
    client.send("POST", "/v1/services/s/x", &[], b"").await;
    let (called, ..) = provider.next().await;
    drop(client);
    match provider.calls.recv().await.unwrap() {
        ProviderMessage::Cancelled(id) => assert_eq!(id, called),
        other => panic!("{other:?}"),
    }
}
