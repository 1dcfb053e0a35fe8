//! Listing and kicking the connections of one node, over real sockets.

use std::time::Duration;

use serde_json::{Value, json};
use weir::compat::ganomede;

use crate::support::{Client, Request, Weir, eventually, weir};

async fn list(weir: &Weir, query: &str) -> Vec<Value> {
    weir.get(format!("/v1/connections?{query}")).await.expect(200).json()["connections"].as_array().unwrap().clone()
}

async fn kick(weir: &Weir, id: &Value) -> Value {
    weir.delete(format!("/v1/connections?id={}", id.as_str().unwrap())).await.expect(200).json()
}

async fn open(weir: &Weir, path: &str) -> Client {
    let mut client = weir.client().await;
    client.send("GET", path, &[], b"").await;
    client
}

#[tokio::test]
async fn streams_sockets_and_long_polls_are_listed() {
    let weir = weir().await;
    let mut stream = open(&weir, "/v1/sse?channel=a&channel=b").await;
    stream.head().await;
    let mut socket = weir.socket().await;
    socket.call("weir.subscribe", json!({ "channels": ["a"] })).await;
    socket.provide("math").await;
    let mut poll = open(&weir, "/v1/events?channel=b&wait=50s").await;
    eventually("three are listed", async || weir.node().cluster_connections.local().len() == 3).await;

    let all = list(&weir, "").await;
    let transports: Vec<_> =
        all.iter().map(|it| (it["transport"].as_str().unwrap(), it["channels"].as_u64().unwrap())).collect();
    assert_eq!(transports, [("sse", 2), ("ws", 1), ("poll", 1)]);
    let node = all[0]["node"].as_str().unwrap();
    for it in &all {
        assert!(
            it["id"].as_str().unwrap().starts_with(node) && it["remote"].as_str().unwrap().starts_with("127.0.0.1:"),
            "{it}"
        );
        assert_eq!(it["subject"], "");
        assert!(it["since"].as_u64().unwrap() > 1_700_000_000_000);
    }
    assert_eq!(all[1]["services"], json!(["math"]));
    assert_eq!(list(&weir, "channel=a").await, all[..2]);
    assert_eq!(list(&weir, "channel=b").await, [all[0].clone(), all[2].clone()]);
    assert_eq!(list(&weir, "subject=nobody").await, Vec::<Value>::new());
    // Pages cover the whole list.
    let (mut paged, mut page) = (Vec::new(), String::new());
    loop {
        let answer = weir.get(format!("/v1/connections?limit=1{page}")).await.expect(200).json();
        paged.extend(answer["connections"].as_array().unwrap().clone());
        let Some(next) = answer.get("page") else { break };
        page = format!("&page={}", next.as_str().unwrap());
    }
    assert_eq!(paged, all);
    // Changes are listed.
    socket.call("weir.unsubscribe", json!({ "channels": ["a"] })).await;
    socket.call("weir.withdraw", json!({ "service": "math" })).await;
    let now = list(&weir, "").await;
    assert_eq!((&now[1]["channels"], now[1].get("services")), (&json!(0), None));
    for bad in ["prefix=a", "limit=0", "what=1", "page=x"] {
        weir.get(format!("/v1/connections?{bad}")).await.expect_problem("invalid_params");
    }
    weir.delete("/v1/connections?channel=a").await.expect_problem("invalid_params");

    weir.publish("b", "1").await;
    poll.response().await.expect(200);
    drop((stream, socket));
    eventually("no connection is left", async || weir.node().cluster_connections.local().is_empty()).await;
    eventually("no timer is left", async || {
        weir.connections().is_empty() || weir.metric("weir_connections{transport=\"ws\"}") == 0
    })
    .await;
}

#[tokio::test]
async fn kicked_clients_receive_the_reason_and_are_closed() {
    let weir = weir().await;
    let mut stream = open(&weir, "/v1/sse?channel=a&present=c").await;
    stream.head().await;
    stream.chunk().await;
    let mut other = open(&weir, "/v1/sse?channel=a").await;
    other.head().await;
    other.chunk().await;
    let mut socket = weir.socket().await;
    socket.call("weir.ping", json!({})).await;
    let mut poll = open(&weir, "/v1/events?channel=a&wait=50s").await;
    eventually("four are listed", async || weir.node().cluster_connections.local().len() == 4).await;
    let all = list(&weir, "").await;
    let of = |transport: &str| all.iter().find(|it| it["transport"] == transport).unwrap()["id"].clone();

    assert_eq!(kick(&weir, &of("sse")).await, json!({ "kicked": 1 }));
    let last = stream.chunk().await.unwrap();
    assert_eq!(last, "retry: 300000\nevent: weir.retry\ndata: {\"code\":\"kicked\",\"after_ms\":300000}\n\n");
    assert_eq!(stream.chunk().await, None);
    assert!(stream.is_closed().await);
    eventually("the client is not present any more", async || weir.node().presence.counts().0 == 0).await;
    kick(&weir, &of("ws")).await;
    assert_eq!(socket.closed().await, (4503, "kicked".to_owned()));
    kick(&weir, &of("poll")).await;
    poll.response().await.expect_problem("kicked");
    let gone = weir.delete(format!("/v1/connections?id={}", of("ws").as_str().unwrap())).await;
    gone.expect_problem("not_found");
    // An empty selector is neither all connections nor those of anonymous clients.
    for selector in ["subject=", "id=", "subject", "id=&subject=", "subject=&channel=a", "subject=u7&channel="] {
        weir.delete(format!("/v1/connections?{selector}")).await.expect_problem("invalid_params");
    }
    weir.get("/v1/connections?subject=").await.expect_problem("invalid_params");
    eventually("three are gone", async || weir.node().cluster_connections.local().len() == 1).await;
    for (transport, count) in [("sse", 1), ("ws", 1)] {
        let series = format!("weir_connections_closed_total{{transport=\"{transport}\",reason=\"kicked\"}}");
        eventually("the close is counted", async || weir.metric(&series) == count).await;
    }
    // The other connection stays open.
    weir.publish("a", "1").await;
    assert!(other.chunk().await.unwrap().starts_with(b"id: "));
    let all = list(&weir, "").await;
    kick(&weir, &all[0]["id"]).await;
    assert!(other.chunk().await.unwrap().ends_with(b"300000}\n\n"));
}

#[tokio::test]
async fn streams_and_polls_of_adapters_are_listed_and_kicked() {
    let weir = weir()
        .with(|config| {
            config.compat.enable = vec!["ganomede", "node-sse"];
            config.compat.get_mut::<ganomede::Config>().unwrap().secret = "s".into();
            config.compat.get_mut::<ganomede::Config>().unwrap().poll_timeout = Duration::from_secs(60);
        })
        .await;
    let mut browser = open(&weir, "/subscribe?channels=a,b").await;
    browser.head().await;
    let mut poll = open(&weir, "/events/v1/events?clientId=c&channel=a&secret=s").await;
    eventually("both are listed", async || weir.node().cluster_connections.local().len() == 2).await;
    let all = list(&weir, "channel=a").await;
    let listed: Vec<_> = all.iter().map(|it| json!([it["transport"], it["channels"]])).collect();
    assert_eq!(listed, [json!(["sse", 2]), json!(["poll", 1])]);
    for it in &all {
        assert!(it["remote"].as_str().unwrap().starts_with("127.0.0.1:"), "{it}");
        kick(&weir, &it["id"]).await;
    }
    assert_eq!(poll.response().await.expect(403).json()["code"], "Forbidden");
    // An EventSource reconnects, but not soon.
    let mut last = Vec::new();
    while let Some(chunk) = browser.chunk().await {
        last = chunk.to_vec();
    }
    assert_eq!(last, b"retry: 300000\n");
    eventually("no connection is left", async || weir.node().cluster_connections.local().is_empty()).await;
}

#[tokio::test]
async fn connections_are_listed_only_on_the_admin_listener() {
    let weir = weir().with(|config| config.admin.listen = Some(([127, 0, 0, 1], 0).into())).await;
    weir.get("/v1/connections").await.expect_problem("not_found");
    weir.delete("/v1/connections?id=x").await.expect_problem("not_found");
    weir.get("/v1/presence?channel=a").await.expect(200);
    let operator = |method, path: &str| Request::new(weir.addresses[1], method, path);
    operator("GET", "/v1/connections").await.expect(200);
    assert_eq!(operator("DELETE", "/v1/connections?subject=u7").await.expect(200).json(), json!({ "kicked": 0 }));
}
