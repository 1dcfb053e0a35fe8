//! Adapters while authentication is on.

use serde_json::json;
use weir::{
    compat::{event_stream, ganomede, grip, microstream, node_sse},
    config::Config,
};

use super::{READER, bearer, texts, with_keys};
use crate::{
    compat::microstream::SOCKET,
    support::{Socket, TextStream, Weir, weir},
};

async fn adapted(name: &'static str, change: impl FnOnce(&mut Config)) -> Weir {
    weir()
        .with(|config| {
            with_keys(config);
            config.compat.enable = vec![name];
            change(config);
        })
        .await
}

#[tokio::test]
async fn node_sse_is_closed_but_for_credentials_and_its_roles() {
    let weir = adapted("node-sse", |_| {}).await;
    let event = json!({ "events": [{ "channelName": "news.eu", "type": "t", "payload": "x" }] }).to_string();
    let publish =
        |weir: &Weir| weir.request("POST", "/publish").header("content-type", "application/json").body(event.clone());
    publish(&weir).await.expect(401);
    weir.get("/lastEvent?channel=news.eu").await.expect(401);
    weir.get("/subscribe?channels=news.eu").await.expect(401);
    bearer(weir.request("GET", "/lastEvent?channel=news.eu"), READER).await.expect(200);
    bearer(publish(&weir), READER).await.expect(403);

    let weir = adapted("node-sse", |config| {
        config.auth.roles[1].publish = texts(&["news.*"]);
        config.auth.roles[1].subscribe = texts(&["news.*"]);
        config.auth.anonymous = Vec::new();
        let roles = texts(&["public"]);
        config.compat.get_mut::<node_sse::Config>().unwrap().roles = roles;
    })
    .await;
    publish(&weir).await.expect(200);
    weir.get("/lastEvent?channel=news.eu").await.expect(200);
    weir.get("/lastEvent?channel=other").await.expect(401);
    // The roles of the adapter are not those of weir's own routes.
    weir.get("/v1/events?channel=news.eu").await.expect_problem("unauthorized");
    // A page of another origin has no role.
    publish(&weir).header("origin", "http://evil.example").await.expect(403);
    weir.request("GET", "/lastEvent?channel=news.eu").header("origin", "http://evil.example").await.expect(401);
}

#[tokio::test]
async fn event_streams_need_the_permission_to_read() {
    let weir = adapted("sse", |config| {
        config.compat.get_mut::<event_stream::Config>().unwrap().routes =
            vec![event_stream::SseRoute { path: "/api/{id}".into(), channels: texts(&["{id}"]) }];
    })
    .await;
    weir.get("/api/news.eu").await.expect(401);
    weir.request("GET", "/api/news.eu").header("authorization", "Bearer weir_unknown").await.expect(401);
    bearer(weir.request("GET", "/api/other"), READER).await.expect(403);
    let mut open = TextStream::open(weir.address, "/api/open").await;
    open.expect("event: stream-open").await;
}

#[tokio::test]
async fn ganomede_takes_its_secret_or_credentials() {
    let weir = adapted("ganomede", |config| {
        config.auth.roles[0].consume = texts(&["c1"]);
        let ganomede = config.compat.get_mut::<ganomede::Config>().unwrap();
        ganomede.secret = "s3cret".into();
        ganomede.poll_timeout = std::time::Duration::ZERO;
    })
    .await;
    let poll = "/events/v1/events?clientId=c1&channel=news.eu&after=0";
    weir.get(poll).await.expect(401);
    weir.get(format!("{poll}&secret=wrong")).await.expect(401);
    weir.get(format!("{poll}&secret=s3cret")).await.expect(200);
    bearer(weir.request("GET", poll), READER).await.expect(200);
    bearer(weir.request("GET", poll.replace("c1", "c2")), READER).await.expect(403);
    let event =
        json!({ "clientId": "c1", "channel": "news.eu", "from": "x", "type": "t", "data": {}, "secret": "s3cret" });
    let emit = weir.request("POST", "/events/v1/events").header("content-type", "application/json");
    emit.body(event.to_string()).await.expect(200);
}

#[tokio::test]
async fn microstream_clients_log_in_when_they_connect() {
    let weir = adapted("microstream", |config| {
        config.auth.roles[0].provide = texts(&["orders"]);
    })
    .await;
    let open = async |name: &str| {
        let mut client = Socket::open_at(weir.address, &format!("{SOCKET}&serviceName={name}")).await;
        assert!(client.text().await.starts_with("0{"));
        client
    };
    let mut client = open("orders").await;
    client.send("40").await;
    assert!(client.text().await.starts_with("44{\"message\":\"UNAUTHORIZED\""));
    let mut client = open("orders").await;
    client.send(format!("40{}", json!({ "token": "weir_unknown" }))).await;
    assert!(client.text().await.starts_with("44{\"message\":\"UNAUTHORIZED\""));
    let mut client = open("other").await;
    client.send(format!("40{}", json!({ "token": READER }))).await;
    assert!(client.text().await.starts_with("44{\"message\":\"FORBIDDEN\""));
    let mut client = open("orders").await;
    client.send(format!("40{}", json!({ "token": READER }))).await;
    assert!(client.text().await.starts_with("40{\"sid\""));
    // The connection is listed by its subject, so that it can be kicked, and ends with the credential.
    let listed =
        bearer(weir.request("GET", "/v1/connections?subject=key:reader"), super::ADMIN).await.expect(200).json();
    assert_eq!(listed["connections"].as_array().unwrap().len(), 1, "{listed}");
    let request = json!(["request", { "targetService": "billing", "payload": { "id": "r1", "event": "pay" } }]);
    client.send(format!("42{request}")).await;
    let response = client.text().await;
    assert!(response.starts_with("42[\"response\"") && response.contains("FORBIDDEN"), "{response}");

    let weir = adapted("microstream", |config| {
        config.compat.get_mut::<microstream::Config>().unwrap().roles = texts(&["client"]);
    })
    .await;
    let mut client = Socket::open_at(weir.address, &format!("{SOCKET}&serviceName=orders")).await;
    assert!(client.text().await.starts_with("0{"));
    client.send("40").await;
    assert!(client.text().await.starts_with("40{\"sid\""));
}

#[tokio::test]
async fn grip_publishers_need_a_key() {
    let item = json!({ "items": [{ "channel": "c", "formats": { "http-stream": { "content": "x" } } }] }).to_string();
    let weir = adapted("grip", |config| {
        config.compat.get_mut::<grip::Config>().unwrap().routes =
            vec![grip::GripRoute { origin: "http://127.0.0.1:9".into(), ..grip::GripRoute::default() }];
    })
    .await;
    weir.post("/grip/publish", item.clone()).await.expect(403);
    bearer(weir.request("POST", "/grip/publish").body(item), super::ADMIN).await.expect(403);
}
