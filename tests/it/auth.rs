//! Authentication and permissions, on every transport.

use std::time::Duration;

use serde_json::json;
use weir::config::{AuthSection, Config, KeyRule, RoleRule};

use crate::support::{EventStream, Request, Response, Socket, Weir, eventually, weir};

mod adapters;
mod matrix;
mod tokens;

/// Keys of the tests. Their hashes are those that `sha256sum` prints.
pub(crate) const ADMIN: &str = "an-admin-key-of-32-characters-or-more";
pub(crate) const READER: &str = "weir_reader_key_of_32_characters_or_more";

pub(crate) fn role(name: &str, change: impl FnOnce(&mut RoleRule)) -> RoleRule {
    let mut role = RoleRule { name: name.into(), ..RoleRule::default() };
    change(&mut role);
    role
}

pub(crate) fn texts(list: &[&str]) -> Vec<String> {
    list.iter().map(|text| (*text).to_owned()).collect()
}

/// A node with an admin key, and a key of a role that may read `news.*`.
fn with_keys(config: &mut Config) {
    config.auth = AuthSection {
        key: ADMIN.into(),
        keys: vec![KeyRule {
            name: "reader".into(),
            hash: hash(READER),
            roles: texts(&["reader"]),
            expires: String::new(),
        }],
        roles: vec![
            role("reader", |role| role.subscribe = texts(&["news.*"])),
            role("public", |role| {
                role.subscribe = texts(&["open"]);
            }),
        ],
        anonymous: texts(&["public"]),
        ..AuthSection::default()
    };
}

pub(crate) fn hash(key: &str) -> String {
    use sha2::Digest as _;
    let digest = sha2::Sha256::digest(key.as_bytes());
    format!("sha256:{}", digest.iter().map(|byte| format!("{byte:02x}")).collect::<String>())
}

pub(crate) fn bearer(request: Request, key: &str) -> Request {
    request.header("authorization", &format!("Bearer {key}"))
}

async fn publish(weir: &Weir, key: Option<&str>, channel: &str) -> Response {
    let request = weir.request("POST", format!("/v1/events?channel={channel}")).body("1");
    match key {
        Some(key) => bearer(request, key).await,
        None => request.await,
    }
}

#[tokio::test]
async fn a_key_permits_what_its_roles_permit() {
    let weir = weir().with(with_keys).await;
    publish(&weir, Some(ADMIN), "news.eu").await.expect(201);
    let denied = publish(&weir, Some(READER), "news.eu").await;
    assert_eq!(denied.header("www-authenticate"), Some("Bearer error=\"insufficient_scope\""));
    assert_eq!(denied.expect_problem("forbidden")["permission"], "publish");
    let missing = publish(&weir, None, "news.eu").await;
    assert_eq!(missing.header("www-authenticate"), Some("Bearer"));
    missing.expect_problem("unauthorized");
    bearer(weir.request("GET", "/v1/events?channel=news.eu&after=earliest"), READER).await.expect(200);
    bearer(weir.request("GET", "/v1/events?channel=other"), READER).await.expect_problem("forbidden");
    // The roles of every client.
    weir.get("/v1/events?channel=open").await.expect(200);
    bearer(weir.request("GET", "/v1/events?channel=open"), READER).await.expect(200);
}

#[tokio::test]
async fn an_invalid_credential_is_never_taken_for_none() {
    let weir = weir().with(with_keys).await;
    for wrong in ["Bearer weir_unknown", "Bearer a.b.c", "Basic YTpi", "Bearer", "Bearer  ", "bearer x"] {
        let reply = weir.request("GET", "/v1/events?channel=open").header("authorization", wrong).await;
        assert_eq!(reply.header("www-authenticate"), Some("Bearer error=\"invalid_token\""), "{wrong}");
        reply.expect_problem("unauthorized");
    }
    let twice = bearer(bearer(weir.request("GET", "/v1/events?channel=open"), READER), READER).await;
    twice.expect_problem("invalid_request");
    for name in ["token", "access_token", "%74oken", "jwt", "api_key"] {
        weir.get(format!("/v1/events?channel=open&{name}=x")).await.expect_problem("invalid_params");
    }
    // Probes and the description of the API need no credentials, and take none.
    for path in ["/health/live", "/health/ready", "/openapi.json", "/"] {
        weir.request("GET", path).header("authorization", "Bearer weir_unknown").await.expect(200);
    }
}

#[tokio::test]
async fn refusals_do_not_depend_on_existence() {
    let weir = weir().with(with_keys).await;
    publish(&weir, Some(ADMIN), "secret").await.expect(201);
    for channel in ["secret", "absent"] {
        let reply = bearer(weir.request("GET", format!("/v1/channels?channel={channel}")), READER).await;
        let problem = reply.expect_problem("forbidden");
        assert_eq!(problem["detail"], format!("key:reader is not permitted to subscribe: {channel}"));
    }
    for name in ["n", "absent"] {
        let path = format!("/v1/consumers/{name}");
        bearer(weir.request("GET", &path), READER).await.expect_problem("forbidden");
        bearer(weir.request("DELETE", &path), READER).await.expect_problem("forbidden");
    }
}

#[tokio::test]
async fn a_consumer_shows_and_commits_only_channels_that_the_client_may_read() {
    let weir = weir()
        .with(|config| {
            with_keys(config);
            config.auth.roles[0].consume = texts(&["n"]);
        })
        .await;
    let read = "/v1/events?channel=news.eu&channel=secret&consumer=n&limit=2";
    bearer(weir.request("GET", read), ADMIN).await.expect(200);
    for channel in ["news.eu", "secret"] {
        publish(&weir, Some(ADMIN), channel).await.expect(201);
        publish(&weir, Some(ADMIN), channel).await.expect(201);
    }
    let page = bearer(weir.request("GET", read), ADMIN).await.expect(200).json();
    let commit = json!({ "after": page["next"] }).to_string();
    let channels = async |key| {
        let shown = bearer(weir.request("GET", "/v1/consumers/n"), key).await.expect(200).json();
        let channels = shown["channels"].as_array().unwrap().clone();
        channels.into_iter().map(|it| (it["channel"].clone(), it["lag"].clone())).collect::<Vec<_>>()
    };
    let before = channels(ADMIN).await;
    assert_eq!(channels(READER).await, before[..1]);
    bearer(weir.request("POST", "/v1/consumers/n/commit").body(commit.clone()), READER).await.expect(204);
    let after = channels(ADMIN).await;
    assert_ne!(after[0], before[0]);
    assert_eq!(after[1], before[1]);
    let explicit = json!({ "after": page["next"], "channels": ["secret"] }).to_string();
    bearer(weir.request("POST", "/v1/consumers/n/commit").body(explicit), READER).await.expect_problem("forbidden");
}

#[tokio::test]
async fn from_is_the_subject_or_needs_a_permission() {
    let weir = weir()
        .with(|config| {
            with_keys(config);
            config.auth.roles[0].publish = texts(&["news.*"]);
        })
        .await;
    let send = async |from: &str| {
        let body = json!({ "channel": "news.eu", "data": 1, "from": from }).to_string();
        let request = weir.request("POST", "/v1/events").header("content-type", "application/json").body(body);
        bearer(request, READER).await
    };
    send("key:reader").await.expect(201);
    assert_eq!(send("someone").await.expect_problem("forbidden")["permission"], "publish_as");
}

#[tokio::test]
async fn streams_and_sockets_are_refused_as_their_clients_can_read() {
    let weir = weir().with(with_keys).await;
    weir.get("/v1/sse?channel=secret").await.expect_problem("unauthorized");
    weir.request("GET", "/v1/sse?channel=secret").header("origin", "http://app.example").await.expect(401);
    // A script in a browser cannot read the response of a handshake.
    let origin = format!("http://{}", weir.address);
    let headers = [("origin", origin.as_str()), ("authorization", "Bearer weir_unknown")];
    let (mut socket, _) = Socket::handshake(weir.address, "/v1/ws", &headers).await.unwrap();
    assert_eq!(socket.closed().await, (4500, "unauthorized".to_owned()));
    let refused = Socket::handshake(weir.address, "/v1/ws?channel=secret", &[]).await;
    assert!(refused.is_err());
    weir.idle().await;
}

#[tokio::test]
async fn a_socket_logs_in_and_has_the_permissions_of_its_credential() {
    let weir = weir().with(with_keys).await;
    let mut socket = weir.socket().await;
    let denied = socket.call_error("weir.subscribe", json!({ "channels": ["news.eu"] })).await;
    assert_eq!(denied["data"]["code"], "unauthorized");
    let answer = socket.call("weir.auth", json!({ "token": READER })).await;
    assert_eq!(
        answer,
        json!({ "subject": "key:reader", "expires": null, "ended": { "channels": [], "services": [] } })
    );
    socket.call("weir.subscribe", json!({ "channels": ["news.eu"] })).await;
    let denied = socket.call_error("weir.publish", json!({ "channel": "news.eu", "data": 1 })).await;
    assert_eq!(denied["data"]["code"], "forbidden");
    // Another subject needs another connection.
    let other = socket.call_error("weir.auth", json!({ "token": ADMIN })).await;
    assert_eq!(other["data"]["code"], "forbidden");
    publish(&weir, Some(ADMIN), "news.eu").await.expect(201);
    assert_eq!(socket.notification("weir.event").await["data"], 1);
    for _ in 0..5 {
        socket.send_json(json!({ "jsonrpc": "2.0", "method": "weir.auth", "params": { "token": "weir_wrong" } })).await;
    }
    assert_eq!(socket.closed().await, (4500, "unauthorized".to_owned()));
    weir.idle().await;
}

#[tokio::test]
async fn calls_are_permitted_by_method_and_services_by_name() {
    let weir = weir()
        .with(|config| {
            with_keys(config);
            config.auth.roles[0].call = texts(&["orders/list"]);
            config.auth.roles[1].provide = texts(&["orders"]);
        })
        .await;
    let mut provider = weir.socket().await;
    provider.provide("orders").await;
    assert_eq!(
        provider.call_error("weir.provide", json!({ "service": "other" })).await["data"]["code"],
        "unauthorized"
    );
    let calling =
        tokio::spawn(bearer(weir.request("POST", "/v1/services/orders/list").body("[]"), READER).into_future());
    let request = provider.next_request().await;
    provider.reply(&request, json!(7)).await;
    assert_eq!(calling.await.unwrap().expect(200).json(), 7);
    for path in ["/v1/services/orders/refund", "/v1/services/orders/list%2Fx", "/v1/services/absent/list"] {
        bearer(weir.request("POST", path).body("[]"), READER).await.expect_problem("forbidden");
    }
    let listed = async |request: Request| request.await.expect(200).json()["services"].as_array().unwrap().len();
    assert_eq!(listed(bearer(weir.request("GET", "/v1/services"), READER)).await, 1);
    assert_eq!(listed(weir.request("GET", "/v1/services")).await, 0);
    let mut caller = weir.socket().await;
    caller.call("weir.auth", json!({ "token": READER })).await;
    let denied = caller.call_error("orders/refund", json!([])).await;
    assert_eq!(denied["data"]["code"], "forbidden");
}

#[tokio::test]
async fn a_connection_ends_when_its_credential_expires() {
    let soon = || {
        let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap();
        let at = time::OffsetDateTime::from_unix_timestamp(now.as_secs() as i64 + 3).unwrap();
        at.format(&time::format_description::well_known::Rfc3339).unwrap()
    };
    let weir = weir()
        .with(|config| {
            with_keys(config);
            config.auth.keys[0].expires = soon();
        })
        .await;
    let mut socket = weir.socket().await;
    socket.call("weir.auth", json!({ "token": READER })).await;
    let head = format!(
        "GET /v1/sse?channel=news.eu HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {READER}\r\nAccept: text/event-stream\r\n\r\n"
    );
    let mut stream = EventStream::request(weir.address, &head).await;
    let poll = bearer(weir.request("GET", "/v1/events?channel=news.eu&after=now&wait=50s"), READER).into_future();
    let poll = tokio::spawn(poll);
    assert_eq!(socket.closed().await, (4003, "token_expired".to_owned()));
    let ended = loop {
        let block = stream.next().await;
        if block.event == "weir.retry" {
            break block;
        }
    };
    assert_eq!(ended.json()["code"], "token_expired");
    poll.await.unwrap().expect_problem("token_expired");
    bearer(weir.request("GET", "/v1/events?channel=news.eu"), READER).await.expect_problem("token_expired");
    weir.idle().await;
}

#[tokio::test]
async fn a_page_of_another_origin_writes_nothing_without_credentials() {
    let weir = weir()
        .with(|config| {
            with_keys(config);
            config.auth.roles[1].publish = texts(&["open"]);
            config.server.listen = vec!["0.0.0.0:0".parse().unwrap()];
        })
        .await;
    let foreign = |request: Request| request.header("origin", "https://evil.example");
    let post = || weir.request("POST", "/v1/events?channel=open").header("content-type", "application/json").body("1");
    post().await.expect(201);
    foreign(post()).await.expect(403);
    bearer(foreign(post()), ADMIN).await.expect(201);
    let headers = [("origin", "https://evil.example")];
    let (mut socket, _) = Socket::handshake(weir.address, "/v1/ws", &headers).await.unwrap();
    socket.call("weir.subscribe", json!({ "channels": ["open"] })).await;
    let denied = socket.call_error("weir.publish", json!({ "channel": "open", "data": 1 })).await;
    assert_eq!(denied["data"]["code"], "forbidden");
    socket.call("weir.auth", json!({ "token": ADMIN })).await;
    socket.call("weir.publish", json!({ "channel": "open", "data": 1 })).await;
}

#[tokio::test]
async fn a_login_ends_what_an_anonymous_client_provides() {
    let weir = weir()
        .with(|config| {
            with_keys(config);
            config.auth.roles[1].provide = texts(&["orders"]);
        })
        .await;
    let mut socket = weir.socket().await;
    socket.provide("orders").await;
    let answer = socket.call("weir.auth", json!({ "token": READER })).await;
    assert_eq!(answer["ended"], json!({ "channels": [], "services": ["orders"] }));
    socket.provide("orders").await;
}

#[tokio::test]
async fn administration_needs_a_permission_for_each_operation() {
    let weir = weir()
        .with(|config| {
            with_keys(config);
            config.auth.roles[0].admin = texts(&["connections:list"]);
        })
        .await;
    bearer(weir.request("GET", "/v1/connections"), READER).await.expect(200);
    for (method, path) in [
        ("DELETE", "/v1/connections?subject=x"),
        ("GET", "/v1/channels"),
        ("GET", "/v1/consumers"),
        ("GET", "/metrics"),
        ("DELETE", "/v1/events?channel=news.eu"),
    ] {
        bearer(weir.request(method, path), READER).await.expect_problem("forbidden");
        weir.request(method, path).await.expect_problem("unauthorized");
    }
}

#[tokio::test]
async fn a_listed_connection_has_the_subject_of_its_credential() {
    let weir = weir().with(with_keys).await;
    let mut socket = weir.socket().await;
    socket.call("weir.auth", json!({ "token": READER })).await;
    eventually("the connection is listed", async || {
        let list = bearer(weir.request("GET", "/v1/connections?subject=key:reader"), ADMIN).await.expect(200).json();
        list["connections"].as_array().unwrap().len() == 1
    })
    .await;
    bearer(weir.request("DELETE", "/v1/connections?subject=key:reader"), ADMIN).await.expect(200);
    assert_eq!(socket.closed().await, (4503, "kicked".to_owned()));
    tokio::time::timeout(Duration::from_secs(20), weir.idle()).await.unwrap();
}
