//! ganomede-events at `/events/v1`.

use std::time::{Duration, Instant};

use serde_json::{Value, json};
use weir::compat::ganomede;

use crate::support::{Response, Starter, Weir, eventually, weir};

fn ganomede() -> Starter {
    weir().with(|config| {
        config.compat.enable = vec!["ganomede"];
        config.compat.get_mut::<ganomede::Config>().unwrap().secret = "s3cret".into();
        config.compat.get_mut::<ganomede::Config>().unwrap().poll_timeout = Duration::from_secs(20);
    })
}

/// A node whose polls return at once.
fn without_waiting() -> Starter {
    ganomede().with(|config| config.compat.get_mut::<ganomede::Config>().unwrap().poll_timeout = Duration::ZERO)
}

async fn emit(weir: &Weir, channel: &str, kind: &str, data: Value) -> Response {
    let body =
        json!({"clientId": "w", "secret": "s3cret", "channel": channel, "from": "f/v1", "type": kind, "data": data});
    json_post(weir, "/events/v1/events", &body.to_string()).await
}

async fn json_post(weir: &Weir, path: &str, body: &str) -> Response {
    weir.request("POST", path).header("content-type", "application/json").body(body.to_owned()).await
}

fn path(query: &str) -> String {
    format!("/events/v1/events?secret=s3cret&{query}")
}

async fn ids(weir: &Weir, query: &str) -> Vec<u64> {
    let reply = weir.get(path(query)).await.expect(200);
    reply.json().as_array().unwrap().iter().map(|event| event["id"].as_u64().unwrap()).collect()
}

#[tokio::test]
async fn an_emitted_event_is_polled() {
    let weir = ganomede().await;
    let posted = emit(&weir, "users/v1", "add", json!({"b": 1, "a": [2]})).await.expect(200);
    assert_eq!(posted.header("content-type"), Some("application/json"));
    assert_eq!(posted.header("x-request-id").unwrap().len(), 36);
    assert_eq!(posted.header("access-control-allow-origin"), None);
    let time = posted.json()["timestamp"].as_u64().unwrap();
    let event = format!(r#"{{"id":1,"timestamp":{time},"type":"add","from":"f/v1","data":{{"b":1,"a":[2]}}}}"#);
    assert_eq!(posted.text(), event);
    let polled = weir.get(path("clientId=c&channel=users%2Fv1")).await.expect(200);
    assert_eq!(polled.text(), format!("[{event}]"));
    // A channel name with a colon is not split into a channel and a type, unlike the README of the original says.
    assert_eq!(emit(&weir, "users/v1:add", "t", json!({})).await.json()["id"], 1);
    let native = weir.get("/v1/events?channel=users/v1").await.expect(200).json();
    assert_eq!(native["events"][0]["data"], json!({"b": 1, "a": [2]}));
    assert_eq!(weir.metric(r#"weir_events_published_total{transport="http"}"#), 2);
}

#[tokio::test]
async fn fields_are_validated_in_the_order_of_the_original() {
    let weir = ganomede().await;
    let refused = async |body: &str, message: &str| {
        let reply = json_post(&weir, "/events/v1/events?secret=s3cret", body).await.expect(400);
        assert_eq!(reply.text(), json!({"code": "InvalidContent", "message": message}).to_string(), "{body}");
    };
    refused("{}", "Invalid Client ID").await;
    refused("", "Invalid Client ID").await;
    refused("[]", "Invalid Client ID").await;
    refused(r#"{"clientId":1}"#, "Invalid Client ID").await;
    refused(r#"{"clientId":"c","channel":""}"#, "Invalid Channel").await;
    refused(&json!({"clientId": "c", "channel": "x".repeat(256)}).to_string(), "Invalid Channel").await;
    refused(r#"{"clientId":"c","channel":"$services"}"#, "Invalid Channel").await;
    refused(r#"{"clientId":"c","channel":"a","type":"t"}"#, "Invalid from").await;
    refused(r#"{"clientId":"c","channel":"a","from":"f"}"#, "Invalid type").await;
    refused(r#"{"clientId":"c","channel":"a","from":"f","type":"weir.gap"}"#, "Invalid type").await;
    for data in ["null", "1", "\"x\"", "true"] {
        let body = format!(r#"{{"clientId":"c","channel":"a","from":"f","type":"t","data":{data}}}"#);
        refused(&body, "Invalid data").await;
    }
    let broken = json_post(&weir, "/events/v1/events", "{").await.expect(400).json();
    assert!(broken["message"].as_str().unwrap().starts_with("Invalid JSON: "), "{broken}");
    let bare = r#"{"clientId":"c","channel":"a","from":"f","type":"t","id":9,"x":1}"#;
    let bare = json_post(&weir, "/events/v1/events?secret=s3cret", bare).await.expect(200);
    assert_eq!(bare.json(), json!({"id": 1, "timestamp": bare.json()["timestamp"], "type": "t", "from": "f"}));
    let form = weir
        .request("POST", "/events/v1/events")
        .header("content-type", "application/x-www-form-urlencoded; charset=utf-8")
        .body("secret=s3cret&clientId=c&channel=a&from=f&type=t+u");
    assert_eq!(form.await.expect(200).json()["type"], "t u");
    let text = weir.request("POST", "/events/v1/events").header("content-type", "text/plain").body(bare.body);
    text.await.expect(401);
}

#[tokio::test]
async fn content_md5_is_verified() {
    let weir = ganomede().await;
    let body = r#"{"clientId":"c","secret":"s3cret","channel":"a","from":"f","type":"t"}"#;
    let post = |digest: &str| {
        let post = weir.request("POST", "/events/v1/events").header("content-type", "application/json");
        post.header("content-md5", digest).body(body)
    };
    post("DL5UX6tWgbQJePdUoQ4bfA==").await.expect(400);
    let refused = post("AAAA").await.expect(400).json();
    assert_eq!(refused["code"], "BadDigest");
    let message = refused["message"].as_str().unwrap();
    let right = message.strip_prefix("Content-MD5 'AAAA' didn't match '").unwrap().strip_suffix('\'').unwrap();
    post(right).await.expect(200);
}

#[tokio::test]
async fn a_missing_or_wrong_secret_is_rejected() {
    let weir = without_waiting().await;
    for query in ["", "?secret=", "?secret=wrong", "?secret=s3cret&secret=s3cret", "?secret[]=s3cret"] {
        for (method, path) in [("GET", "/events/v1/latest"), ("POST", "/events/v1/events"), ("GET", "/latest")] {
            let reply = weir.request(method, format!("{path}{query}")).await.expect(401);
            assert_eq!(reply.text(), r#"{"code":"InvalidCredentialsError","message":""}"#);
        }
    }
    // A rejected poll is delayed, because the client retries at once.
    let before = Instant::now();
    weir.get("/events/v1/events?clientId=c&channel=a").await.expect(401);
    assert!(before.elapsed() >= Duration::from_millis(250));
    let array = r#"{"secret":["s3cret"],"clientId":"c","channel":"a","from":"f","type":"t"}"#;
    json_post(&weir, "/events/v1/events", array).await.expect(401);
    // With the secret in the query the response names the next error.
    let both = r#"{"secret":"wrong"}"#;
    json_post(&weir, "/events/v1/events?secret=s3cret", both).await.expect(400);
}

#[tokio::test]
async fn unknown_paths_and_methods_are_rejected_as_by_the_original() {
    let weir = ganomede().await;
    for path in ["/events/v1", "/events/v1/", "/events/v1/events/", "/events/v1/nope", "/events/v1/indices/x"] {
        let reply = weir.get(path).await.expect(404);
        assert_eq!(reply.text(), format!(r#"{{"code":"ResourceNotFound","message":"{path} does not exist"}}"#));
        assert_eq!(reply.header("x-request-id"), None);
    }
    for (method, path, allow) in [
        ("PUT", "/events/v1/events", "GET, POST"),
        ("OPTIONS", "/events/v1/events", "GET, POST"),
        ("DELETE", "/latest", "GET"),
        ("GET", "/events/v1/indices", "POST"),
    ] {
        let reply = weir.request(method, path).await.expect(405);
        assert_eq!(reply.text(), format!(r#"{{"code":"MethodNotAllowed","message":"{method} is not allowed"}}"#));
        assert_eq!(reply.header("allow"), Some(allow));
    }
    assert_eq!(weir.request("HEAD", "/events/v1/events").await.status, 405);
    assert_eq!(weir.get("/events/v1/ping/a%20b").await.expect(200).text(), r#""pong/a b""#);
    assert_eq!(weir.request("HEAD", "/events/v1/ping/x").await.status, 200);
    for path in ["/about", "/events/v1/about"] {
        let about = weir.get(path).await.expect(200);
        assert_eq!(about.header("content-type"), Some("application/json; charset=UTF-8"));
        let about = about.json();
        assert_eq!(about["type"], "ganomede-events");
        let names: Vec<_> =
            about.as_object().unwrap().iter().map(|(name, value)| (&**name, value.is_string())).collect();
        let all = ["hostname", "type", "version", "description", "startDate"].map(|name| (name, true));
        assert_eq!(names, all);
    }
    // The native routes are still served.
    weir.get("/v1/events?channel=a").await.expect(200);
    weir.get("/nope").await.expect_problem("not_found");
}

#[tokio::test]
async fn positions_of_clients_are_consumers() {
    let weir = without_waiting().await;
    for n in 1..=5 {
        emit(&weir, "a", "t", json!({"n": n})).await.expect(200);
    }
    assert_eq!(ids(&weir, "clientId=c/1&channel=a").await, [1, 2, 3, 4, 5]);
    // Reading does not move the position. Only `after` does, also backwards.
    assert_eq!(ids(&weir, "clientId=c/1&channel=a&limit=2").await, [1, 2]);
    assert_eq!(ids(&weir, "clientId=c/1&channel=a&after=3").await, [4, 5]);
    assert_eq!(ids(&weir, "clientId=c/1&channel=a").await, [4, 5]);
    assert_eq!(ids(&weir, "clientId=other&channel=a").await, [1, 2, 3, 4, 5]);
    let consumer = weir.get("/v1/consumers/c..2f1").await.expect(200).json();
    assert!(consumer["channels"][0]["position"].as_str().unwrap().ends_with("-3"), "{consumer}");
    assert_eq!(ids(&weir, "clientId=c/1&channel=a&after=1").await, [2, 3, 4, 5]);
    assert_eq!(ids(&weir, "clientId=c/1&channel=a").await, [2, 3, 4, 5]);
    for garbage in ["after", "after=", "after=2x", "after=%202", "after=1.5", "after=-1", "after=1&after=2"] {
        assert_eq!(ids(&weir, "clientId=c/1&channel=a&after=4").await, [5]);
        assert_eq!(ids(&weir, &format!("clientId=c/1&channel=a&{garbage}")).await, [1, 2, 3, 4, 5], "{garbage}");
    }
    for garbage in ["limit=0", "limit=x", "limit=-1", "afterTs=3"] {
        assert_eq!(ids(&weir, &format!("clientId=c/1&channel=a&{garbage}")).await.len(), 5, "{garbage}");
    }
    for (query, message) in [
        ("channel=a", "Invalid Client ID"),
        ("clientId=&channel=a", "Invalid Client ID"),
        ("clientId=c&clientId=d&channel=a", "Invalid Client ID"),
        ("clientId=c", "Invalid Channel"),
        ("clientId=c&channel=a&channel=b", "Invalid Channel"),
        ("clientId=c&channel=a%0Ab", "Invalid Channel"),
    ] {
        let reply = weir.get(path(query)).await.expect(400);
        assert_eq!(reply.text(), json!({"code": "InvalidContent", "message": message}).to_string());
    }
}

#[tokio::test]
async fn a_poll_waits_until_an_event_is_published() {
    let weir = ganomede().await;
    let mut held = Vec::new();
    for client in 0..10 {
        let mut connection = weir.client().await;
        connection.send("GET", &path(&format!("clientId=c{client}&channel=a&after=0")), &[], b"").await;
        held.push(connection);
    }
    eventually("ten polls wait", async || readers(&weir) == 10).await;
    // The event wakes every poll.
    emit(&weir, "a", "t", json!({})).await.expect(200);
    for connection in &mut held {
        assert_eq!(connection.response().await.expect(200).json()[0]["id"], 1);
    }
    // The next `after` acknowledges the event.
    for (client, connection) in held.iter_mut().enumerate() {
        connection.send("GET", &path(&format!("clientId=c{client}&channel=a&after=1")), &[], b"").await;
    }
    eventually("ten polls wait again", async || readers(&weir) == 10).await;
    held.truncate(5);
    eventually("disconnected polls are released", async || readers(&weir) == 5).await;
    weir.shut_down();
    for connection in &mut held {
        assert_eq!(connection.response().await.expect(200).text(), "[]");
    }
    drop(held);
    weir.stopped().await;
}

fn readers(weir: &Weir) -> usize {
    weir.bus().topics().readers()
}

#[tokio::test]
async fn a_poll_times_out_with_an_empty_list() {
    let weir = ganomede()
        .with(|config| config.compat.get_mut::<ganomede::Config>().unwrap().poll_timeout = Duration::from_millis(300))
        .await;
    let before = Instant::now();
    assert_eq!(weir.get(path("clientId=c&channel=a")).await.expect(200).text(), "[]");
    assert!(before.elapsed() >= Duration::from_millis(300));
    assert_eq!(readers(&weir), 0);
}

#[tokio::test]
async fn a_position_ahead_of_the_log_restarts_the_client_at_its_beginning() {
    let weir = ganomede().await;
    emit(&weir, "a", "t", json!({})).await.expect(200);
    assert_eq!(ids(&weir, "clientId=c&channel=a&after=0").await, [1]);
    // As in the original, the event ends the poll and is not returned, because its id is not after 7.
    let mut ahead = weir.client().await;
    ahead.send("GET", &path("clientId=c&channel=a&after=7"), &[], b"").await;
    eventually("the poll waits", async || readers(&weir) == 1).await;
    emit(&weir, "a", "t", json!({})).await.expect(200);
    assert_eq!(ahead.response().await.expect(200).text(), "[]");
    // If the client repeats the position, it belongs to an earlier log of the channel.
    assert_eq!(ids(&weir, "clientId=c&channel=a&after=7").await, [1, 2]);
    assert_eq!(ids(&weir, "clientId=c&channel=a&after=1").await, [2]);
}

#[tokio::test]
async fn a_recreated_channel_is_read_from_its_beginning() {
    let weir = without_waiting().await;
    for _ in 0..3 {
        emit(&weir, "a", "t", json!({})).await.expect(200);
    }
    assert_eq!(ids(&weir, "clientId=c&channel=a&after=2").await, [3]);
    weir.delete("/v1/events?channel=a").await.expect(204);
    assert_eq!(ids(&weir, "clientId=c&channel=a&after=3").await, [0; 0]);
    for _ in 0..4 {
        emit(&weir, "a", "t", json!({})).await.expect(200);
    }
    // By the id alone only the fourth event would be new.
    assert_eq!(ids(&weir, "clientId=c&channel=a&after=3").await, [1, 2, 3, 4]);
    assert_eq!(ids(&weir, "clientId=c&channel=a&after=3").await, [4]);
    // A client that resumes at the stored position reads from the beginning as well.
    assert_eq!(ids(&weir, "clientId=d&channel=a&after=4").await, [0; 0]);
    weir.delete("/v1/events?channel=a").await.expect(204);
    emit(&weir, "a", "t", json!({})).await.expect(200);
    assert_eq!(ids(&weir, "clientId=d&channel=a").await, [1]);
}

#[tokio::test]
async fn a_poll_on_an_absent_channel_receives_its_first_event() {
    let weir = ganomede().await;
    let mut first = weir.client().await;
    first.send("GET", &path("clientId=c&channel=new&after=0"), &[], b"").await;
    eventually("the poll waits", async || readers(&weir) == 1).await;
    emit(&weir, "new", "t", json!({})).await.expect(200);
    assert_eq!(first.response().await.expect(200).json()[0]["id"], 1);
    first.send("GET", &path("clientId=c&channel=new&after=1"), &[], b"").await;
    eventually("the poll waits again", async || readers(&weir) == 1).await;
    emit(&weir, "new", "t", json!({})).await.expect(200);
    assert_eq!(first.response().await.expect(200).json()[0]["id"], 2);
}

#[tokio::test]
async fn latest_returns_the_last_events_up_to_a_limit() {
    let weir = ganomede().await;
    assert_eq!(weir.get("/events/v1/latest?secret=s3cret&channel=a").await.expect(200).text(), "[]");
    let missing = weir.get("/latest?secret=s3cret").await.expect(400).json();
    assert_eq!(missing["message"], "Invalid Channel");
    for _ in 0..120 {
        emit(&weir, "a", "t", json!({})).await.expect(200);
    }
    let latest = async |query: &str| -> Vec<u64> {
        let reply = weir.get(format!("/latest?secret=s3cret&channel=a{query}")).await.expect(200).json();
        reply.as_array().unwrap().iter().map(|event| event["id"].as_u64().unwrap()).collect()
    };
    assert_eq!(latest("&limit=3").await, [118, 119, 120]);
    assert_eq!(latest("").await, (21..=120).collect::<Vec<_>>());
}

#[tokio::test]
async fn latest_drops_the_oldest_of_large_events() {
    let weir = ganomede().await;
    let big = "x".repeat(400_000);
    for _ in 0..30 {
        emit(&weir, "a", "t", json!({"big": big})).await.expect(200);
    }
    let reply = weir.get("/latest?secret=s3cret&channel=a").await.expect(200).json();
    let ids: Vec<_> = reply.as_array().unwrap().iter().map(|event| event["id"].as_u64().unwrap()).collect();
    assert_eq!((ids.len() < 25, ids.last()), (true, Some(&30)), "{ids:?}");
}

#[tokio::test]
async fn indices_find_events_by_field() {
    let weir = ganomede().await;
    let define = async |id: &str, channel: &str, field: &str| {
        let body = json!({"secret": "s3cret", "id": id, "channel": channel, "field": field}).to_string();
        json_post(&weir, "/events/v1/indices", &body).await
    };
    emit(&weir, "bans", "ban", json!({"user": "ann"})).await.expect(200);
    emit(&weir, "bans", "ban", json!({"user": "bob"})).await.expect(200);
    // An index finds earlier events, too, and may have the name of a channel.
    assert_eq!(define("bans", "bans", "data.user").await.expect(200).text(), r#""OK""#);
    assert_eq!(define("bans", "elsewhere", "type").await.expect(200).text(), "null");
    emit(&weir, "bans", "unban", json!({"user": "ann"})).await.expect(200);
    emit(&weir, "bans", "ban", json!({"user": 7})).await.expect(200);
    let find = async |path: &str| weir.get(format!("/events/v1/indices/{path}?secret=s3cret")).await;
    let found = find("bans/ann").await.expect(200).json();
    let members: Vec<_> = found.as_object().unwrap().keys().collect();
    assert_eq!(members, ["id", "field", "value", "rows"]);
    assert_eq!((&found["field"], &found["value"]), (&json!("data.user"), &json!("ann")));
    let ids: Vec<_> = found["rows"].as_array().unwrap().iter().map(|event| event["id"].as_u64().unwrap()).collect();
    assert_eq!(ids, [3, 1], "newest first");
    assert_eq!(find("bans/7").await.expect(200).json()["rows"], json!([]));
    assert_eq!(find("bans/no%20body").await.expect(200).json()["value"], "no body");
    assert_eq!(find("nope/x").await.expect(404).json()["code"], "NotFound");
    define("empty", "never-written", "type").await.expect(200);
    assert_eq!(find("empty/t").await.expect(200).json()["rows"], json!([]));
    for (id, channel, field, message) in
        [("", "a", "f", "Invalid index ID"), ("i", "", "f", "Invalid Channel"), ("i", "a", "", "Invalid field")]
    {
        assert_eq!(define(id, channel, field).await.expect(400).json()["message"], message);
    }
    // Only the first of two concurrent definitions succeeds.
    let (one, two) = tokio::join!(define("same", "a", "type"), define("same", "a", "type"));
    let mut outcomes = [one.text().to_owned(), two.text().to_owned()];
    outcomes.sort();
    assert_eq!(outcomes, [r#""OK""#, "null"]);
}

#[tokio::test]
async fn a_rejected_large_event_names_the_limit() {
    let weir = ganomede().with(|config| config.limits.event = 500).await;
    let refused = emit(&weir, "a", "t", json!({"x": "x".repeat(600)})).await.expect(413).json();
    assert_eq!(refused["code"], "PayloadTooLarge");
    assert!(refused["message"].as_str().unwrap().contains("limits.event"));
}

#[tokio::test]
async fn a_disabled_adapter_has_no_routes() {
    let weir = weir().await;
    weir.get("/events/v1/about").await.expect_problem("not_found");
}
