//! The HTTP API: publish, channels, consumers, operations.

use std::io::Write as _;

use serde_json::json;
use weir::compat::ganomede::Config as Ganomede;

use crate::support::{Request, Weir, weir};

// === publish ===

#[tokio::test]
async fn an_event_object_is_published_with_all_its_members() {
    let weir = weir().await;
    let event =
        r#"{"channel":"orders","type":"created","from":"shop/v1","data":{"id":7},"meta":{"traceparent":"00-1"}}"#;
    let placed = weir.post("/v1/events", event).await.expect(201);
    assert_eq!(placed.header("content-type"), Some("application/json"));
    let placed = placed.json();
    assert_eq!((placed["channel"].as_str(), placed["offset"].as_u64()), (Some("orders"), Some(1)));
    assert!(placed["time"].as_u64().unwrap() > 1_700_000_000_000);
    assert_eq!(placed.as_object().unwrap().len(), 4);
    let page = weir.get("/v1/events?channel=orders").await.expect(200).json();
    assert_eq!(
        page["events"][0],
        json!({"channel": "orders", "epoch": placed["epoch"], "offset": 1, "time": placed["time"],
            "type": "created", "from": "shop/v1", "data": {"id": 7}, "meta": {"traceparent": "00-1"}})
    );
}

#[tokio::test]
async fn the_body_is_published_as_data() {
    let weir = weir().await;
    let as_read = [
        ("{\"id\":7}", json!({"id": 7})),
        ("[1,2]", json!([1, 2])),
        ("null", json!(null)),
        ("\"text\"", json!("text")),
        ("hello, world", json!("hello, world")),
        ("{\"half\":", json!("{\"half\":")),
        ("1 2", json!("1 2")),
    ];
    for (body, data) in &as_read {
        // The content type of curl -d.
        let form = "application/x-www-form-urlencoded";
        weir.request("POST", "/v1/events?channel=a&type=t&from=f&_=1")
            .header("content-type", form)
            .body(*body)
            .await
            .expect(201);
        let page = weir.get("/v1/events?channel=a&last=1").await.json();
        assert_eq!(page["events"][0]["data"], *data);
        assert_eq!((&page["events"][0]["type"], &page["events"][0]["from"]), (&json!("t"), &json!("f")));
    }
    weir.post("/v1/events?channel=b", "").await.expect(201);
    weir.post("/v1/events?channel=b", &b"\0\xff"[..]).await.expect(201);
    let page = weir.get("/v1/events?channel=b").await.json();
    assert_eq!(page["events"][0].get("data"), None);
    assert_eq!(page["events"][1]["data_base64"], "AP8=");
}

#[tokio::test]
async fn a_body_that_is_declared_as_json_must_be_json() {
    let weir = weir().await;
    let post = |kind: &str, path: &str, body: &'static [u8]| {
        weir.request("POST", path).header("content-type", kind).body(body)
    };
    let data = "/v1/events?channel=a";
    for kind in [
        "application/json",
        "Application/JSON; charset=utf-8",
        "application/json;charset=iso-8859-1",
        "application/cloudevents+json",
        "application/x-ndjson",
    ] {
        for body in [&b"{\"id\":7"[..], b"hello", b"1 2", b"{} x", b"\xff", b"\"\xff\"", b" "] {
            post(kind, data, body).await.expect_problem("parse_error");
        }
        post(kind, data, b" {\"id\":7}\n").await.expect(201);
        // An event without data.
        post(kind, data, b"").await.expect(201);
    }
    for kind in ["text/plain", "application/octet-stream", "application/x-json", "text/csv"] {
        post(kind, data, b"{\"id\":7").await.expect(201);
    }
    assert_eq!(weir.get("/v1/channels?channel=a").await.json()["top"], 14);
    assert_eq!(weir.get("/v1/events?channel=a&last=1").await.json()["events"][0]["data"], "{\"id\":7");
}

#[tokio::test]
async fn a_byte_order_mark_before_json_is_skipped() {
    let weir = weir().await;
    let bom = |json: &str| format!("\u{feff}{json}");
    weir.post("/v1/events?channel=a", bom(r#"{"id":7}"#)).await.expect(201);
    weir.post("/v1/events", bom(r#"{"channel":"a","data":{"id":7}}"#)).await.expect(201);
    weir.post("/v1/events", bom(r#"[{"channel":"a","data":{"id":7}}]"#)).await.expect(201);
    let lines = weir.request("POST", "/v1/events").header("content-type", "application/x-ndjson");
    lines.body(bom("{\"channel\":\"a\",\"data\":{\"id\":7}}\n")).await.expect(201);
    for event in weir.get("/v1/events?channel=a").await.json()["events"].as_array().unwrap() {
        assert_eq!(event["data"], json!({ "id": 7 }));
    }
    // Text remains as it is.
    weir.post("/v1/events?channel=text", bom("text")).await.expect(201);
    assert_eq!(weir.get("/v1/events?channel=text").await.json()["events"][0]["data"], "\u{feff}text");
    assert_eq!(weir.post("/v1/services/weir/echo", bom("[1]")).await.expect(200).text(), "[1]");
    let call = bom(r#"{"jsonrpc":"2.0","id":1,"method":"weir.ping"}"#);
    assert_eq!(weir.post("/v1/rpc", call).await.expect(200).json()["id"], 1);
    weir.get("/v1/events?channel=a&consumer=n").await.expect(200);
    weir.post("/v1/consumers/n/seek", bom(r#"{"channel":"a","after":"now"}"#)).await.expect(204);
}

#[tokio::test]
async fn two_different_idempotency_keys_are_rejected() {
    let weir = weir().await;
    let post = |keys: [&str; 2]| {
        let request = weir.request("POST", "/v1/events?channel=a").body("1");
        keys.into_iter().fold(request, |request, key| request.header("idempotency-key", key))
    };
    post(["a", "b"]).await.expect_problem("invalid_params");
    post(["a", "a"]).await.expect(201);
    weir.request("POST", "/v1/events?channel=a").header("idempotency-key", "").body("1").await.expect(400);
}

// === codings of bodies ===

fn gzip(data: &[u8]) -> Vec<u8> {
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    encoder.write_all(data).unwrap();
    encoder.finish().unwrap()
}

fn encoded(weir: &Weir, path: &str, coding: &str, body: impl Into<bytes::Bytes>) -> Request {
    let request = weir.request("POST", path).header("content-encoding", coding);
    request.header("content-type", "application/json").body(body)
}

#[tokio::test]
async fn encoded_bodies_are_decoded_on_every_route() {
    let weir = weir()
        .with(|config| {
            config.compat.enable = vec!["ganomede", "node-sse", "grip"];
            config.compat.get_mut::<Ganomede>().unwrap().secret = "s".into();
        })
        .await;
    encoded(&weir, "/v1/events?channel=a", "gzip", gzip(b"{\"id\":7}")).await.expect(201);
    encoded(&weir, "/v1/events", "x-gzip", gzip(br#"[{"channel":"a","data":{"id":7}}]"#)).await.expect(201);
    encoded(&weir, "/v1/events?channel=a", "identity", "{\"id\":7}").await.expect(201);
    let mut deflate = flate2::write::ZlibEncoder::new(Vec::new(), flate2::Compression::fast());
    deflate.write_all(b"{\"id\":7}").unwrap();
    encoded(&weir, "/v1/events?channel=a", "identity, deflate", deflate.finish().unwrap()).await.expect(201);
    let page = weir.get("/v1/events?channel=a&consumer=n").await.expect(200).json();
    let events = page["events"].as_array().unwrap();
    assert!(events.len() == 4 && events.iter().all(|event| event["data"] == json!({ "id": 7 })), "{page}");
    let seek = gzip(br#"{"channel":"a","after":"now"}"#);
    encoded(&weir, "/v1/consumers/n/seek", "gzip", seek).await.expect(204);
    assert_eq!(encoded(&weir, "/v1/services/weir/echo", "gzip", gzip(b"[1]")).await.expect(200).text(), "[1]");
    let call = gzip(br#"{"jsonrpc":"2.0","id":1,"method":"weir.ping"}"#);
    assert_eq!(encoded(&weir, "/v1/rpc", "gzip", call).await.expect(200).json()["id"], 1);
    // Adapters.
    let event = br#"{"clientId":"w","secret":"s","channel":"g","from":"f","type":"t"}"#;
    encoded(&weir, "/events/v1/events", "gzip", gzip(event)).await.expect(200);
    let event = br#"{"events":[{"channelName":"g","type":"t","payload":"p"}]}"#;
    encoded(&weir, "/publish", "gzip", gzip(event)).await.expect(200);
    let item = br#"{"items":[{"channel":"g","formats":{"http-stream":{"content":"x"}}}]}"#;
    encoded(&weir, "/grip/publish/", "gzip", gzip(item)).await.expect(200);
    assert_eq!(weir.get("/v1/channels?channel=g").await.json()["top"], 3);
}

#[tokio::test]
async fn other_codings_and_damaged_bodies_are_rejected() {
    let weir = weir()
        .with(|config| {
            config.compat.enable = vec!["ganomede", "node-sse", "microstream", "grip"];
            config.compat.get_mut::<Ganomede>().unwrap().secret = "s".into();
        })
        .await;
    for path in [
        "/v1/events?channel=a",
        "/v1/events",
        "/v1/rpc",
        "/v1/services/weir/echo",
        "/v1/consumers/n/commit",
        "/events/v1/events",
        "/publish",
        "/socket.io/?EIO=4&transport=polling&sid=x",
        "/grip/publish/",
    ] {
        for coding in ["br", "zstd", "x-made-up", "gzip, gzip"] {
            let reply = encoded(&weir, path, coding, gzip(b"{\"id\":7}")).await;
            assert_eq!(reply.header("accept-encoding"), Some("gzip, deflate"), "{path} {coding}");
            reply.expect_problem("unsupported_media_type");
        }
    }
    let whole = gzip(b"{\"id\":7}");
    for body in [&whole[..whole.len() - 3], b"{\"id\":7}", &[&whole[..], b"x"].concat()] {
        encoded(&weir, "/v1/events?channel=a", "gzip", body.to_vec()).await.expect_problem("invalid_request");
    }
    // A media type that is not supported has nothing to do with codings.
    let text = weir.request("POST", "/v1/events?channel=a").header("origin", "http://localhost:1").body("1").await;
    assert_eq!(text.header("accept-encoding"), None);
    text.expect_problem("unsupported_media_type");
    assert_eq!(weir.get("/v1/channels?channel=a").await.json()["top"], 0);
}

#[tokio::test]
async fn limits_apply_to_the_decoded_body() {
    let weir = weir().with(|config| config.limits.publish_bytes = 100_000).await;
    let bomb = gzip(&vec![b' '; 50_000_000]);
    let problem = encoded(&weir, "/v1/events?channel=a", "gzip", bomb).await.expect_problem("too_large");
    assert_eq!(problem["limit"], "limits.publish_bytes");
    encoded(&weir, "/v1/events?channel=a", "gzip", gzip(&vec![b'1'; 50_000])).await.expect(201);
}

#[tokio::test]
async fn chunked_is_the_only_transfer_coding() {
    let weir = weir().await;
    for coding in ["gzip, chunked", "chunked, chunked", "x, chunked"] {
        let head =
            format!("POST /v1/events?channel=a HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: {coding}\r\n\r\n");
        let mut client = weir.write(format!("{head}1\r\n1\r\n0\r\n\r\n")).await;
        client.response().await.expect(501).expect_problem("not_implemented");
    }
    assert_eq!(weir.get("/v1/channels?channel=a").await.json()["top"], 0);
}

#[tokio::test]
async fn arrays_and_json_lines_are_answered_with_arrays() {
    let weir = weir().await;
    let array = r#"[{"channel":"a","data":1},{"channel":"b","data":2},{"channel":"a","data":3}]"#;
    let placed = weir.post("/v1/events", array).await.expect(201).json();
    let offsets = |placed: &serde_json::Value| {
        placed
            .as_array()
            .unwrap()
            .iter()
            .map(|one| (one["channel"].as_str().unwrap().to_owned(), one["offset"].as_u64().unwrap()))
            .collect::<Vec<_>>()
    };
    assert_eq!(offsets(&placed), [("a".into(), 1), ("b".into(), 1), ("a".into(), 2)]);
    let lines = "{\"channel\":\"a\",\"data\":4}\n{\"channel\":\"b\",\"data\":5}\r\n\n";
    let placed = weir.post("/v1/events", lines).await.expect(201).json();
    assert_eq!(offsets(&placed), [("a".into(), 3), ("b".into(), 2)]);
    let placed = weir
        .request("POST", "/v1/events")
        .header("content-type", "application/x-ndjson")
        .body("{\"channel\":\"a\"}\n")
        .await;
    assert_eq!(offsets(&placed.expect(201).json()), [("a".into(), 4)]);
    // Pretty-printed JSON is one value.
    let placed = weir.post("/v1/events", "{\n  \"channel\": \"a\",\n  \"data\": [\n1]}\n").await.expect(201).json();
    assert_eq!(placed["offset"], 5);
    assert_eq!(weir.get("/v1/events?channel=a&last=1").await.json()["events"][0]["data"], json!([1]));
}

#[tokio::test]
async fn a_key_is_published_once() {
    let weir = weir().await;
    let publish = |key: &'static str, body: &'static str| {
        weir.request("POST", "/v1/events?channel=a").header("idempotency-key", key).body(body)
    };
    let first = publish("k", "1").await.expect(201).json();
    let again = publish("k", "1").await.expect(200).json();
    assert_eq!(
        (&again["offset"], &again["time"], &again["duplicate"]),
        (&first["offset"], &first["time"], &json!(true))
    );
    publish("k", "2").await.expect_problem("key_reused");
    assert_eq!(weir.post("/v1/events", r#"{"channel":"a","key":"k","data":1}"#).await.expect(200).json()["offset"], 1);
    assert_eq!(weir.post("/v1/events?channel=a&key=k", "1").await.expect(200).json()["offset"], 1);
    publish("l", "1").await.expect(201);
    let both = weir.request("POST", "/v1/events?channel=a&key=x").header("idempotency-key", "y").body("1").await;
    both.expect_problem("invalid_params");
    let array = r#"[{"channel":"a","key":"k","data":1},{"channel":"a","key":"l","data":1}]"#;
    let placed = weir.post("/v1/events", array).await.expect(200).json();
    assert_eq!((&placed[0]["offset"], &placed[1]["offset"]), (&json!(1), &json!(2)));
    let array = r#"[{"channel":"a","data":1},{"channel":"a","data":1}]"#;
    weir.request("POST", "/v1/events")
        .header("idempotency-key", "z")
        .body(array)
        .await
        .expect_problem("invalid_params");
    assert_eq!(weir.get("/v1/events?channel=a").await.json()["events"].as_array().unwrap().len(), 2);
}

#[tokio::test]
async fn a_retry_has_its_own_trace_context() {
    let weir = weir().await;
    let publish =
        |meta: &str| weir.post("/v1/events", format!(r#"{{"channel":"a","key":"k","data":1,"meta":{meta}}}"#));
    publish(r#"{"tenant":"7","traceparent":"00-1"}"#).await.expect(201);
    let again = publish(r#"{"traceparent":"00-2","tracestate":"v=1","tenant":"7"}"#).await.expect(200).json();
    assert_eq!((&again["offset"], &again["duplicate"]), (&json!(1), &json!(true)));
    publish(r#"{"tenant":"8","traceparent":"00-1"}"#).await.expect_problem("key_reused");
    let stored = weir.get("/v1/events?channel=a").await.json()["events"][0]["meta"].clone();
    assert_eq!(stored, json!({ "tenant": "7", "traceparent": "00-1" }));
}

#[tokio::test]
async fn a_key_that_cannot_be_remembered_is_rejected_and_the_others_stay() {
    let weir = weir().with(|config| config.bus.memory.budget = 1 << 20).await;
    let batch = |from: u64| {
        let events = (from..from + 100).map(|n| json!({ "channel": "a", "key": n.to_string(), "data": n }).to_string());
        weir.request("POST", "/v1/events")
            .header("content-type", "application/x-ndjson")
            .body(events.collect::<String>())
    };
    batch(0).await.expect(201);
    let mut from = 100;
    let problem = loop {
        let reply = batch(from).await;
        if reply.status != 201 {
            break reply.expect_problem("overloaded");
        }
        from += 100;
    };
    assert_eq!((&problem["limit"], &problem["executed"]), (&json!("bus.memory.budget"), &json!("no")));
    assert!(batch(0).await.expect(200).json().as_array().unwrap().iter().all(|placed| placed["duplicate"] == true));
    weir.post("/v1/events?channel=a", "without a key").await.expect(201);
}

#[tokio::test]
async fn rejected_publishes_append_nothing() {
    let weir = weir().with(|config| config.limits.event = 200).await;
    let long = format!(r#"{{"channel":"a","data":"{}"}}"#, "x".repeat(300));
    for (body, code) in [
        ("{", "parse_error"),
        ("", "invalid_request"),
        ("[]", "invalid_request"),
        ("[{\"channel\":\"a\"}", "parse_error"),
        ("[{\"channel\":\"a\"}] 1", "parse_error"),
        ("{\"channel\":\"a\"}\n{", "parse_error"),
        ("7", "invalid_params"),
        ("{}", "invalid_params"),
        (r#"{"channel":""}"#, "invalid_params"),
        (r#"{"channel":"a\n"}"#, "invalid_params"),
        (r#"{"channel":"a","typ":"x"}"#, "invalid_params"),
        (r#"{"channel":"a","type":"weir.x"}"#, "invalid_params"),
        (r#"{"channel":"a","type":"a\rb"}"#, "invalid_params"),
        (r#"{"channel":"a","from":"a\u0000b"}"#, "invalid_params"),
        (r#"{"channel":"a","key":"a\nb"}"#, "invalid_params"),
        (r#"{"channel":"a","meta":{"a":1}}"#, "invalid_params"),
        (r#"{"channel":"a","meta":{"weir.x":"1"}}"#, "invalid_params"),
        (r#"[{"channel":"a","data":1},{"channel":"b","meta":{"a":"1","weir\u002ex":"1"}}]"#, "invalid_params"),
        (r#"{"channel":"$services","data":1}"#, "forbidden"),
        (r#"[{"channel":"a","data":1},{"channel":"b","type":"weir.x"}]"#, "invalid_params"),
        (r#"[{"channel":"a","data":1},{"channel":"$b"}]"#, "forbidden"),
        (&long, "too_large"),
    ] {
        weir.post("/v1/events", body.to_owned()).await.expect_problem(code);
    }
    weir.post("/v1/events?channel=a&type=weir.x", "1").await.expect_problem("invalid_params");
    weir.post("/v1/events?channel=a&channel=b", "1").await.expect_problem("invalid_params");
    weir.post("/v1/events?channel=%24a", "1").await.expect_problem("forbidden");
    weir.post("/v1/events?type=x", r#"{"channel":"a"}"#).await.expect_problem("invalid_params");
    weir.post("/v1/events?channels=a", "1").await.expect_problem("invalid_params");
    weir.post("/v1/events", &b"{\"channel\":\"\xff\"}"[..]).await.expect_problem("parse_error");
    for channel in ["a", "b"] {
        assert_eq!(weir.get(format!("/v1/channels?channel={channel}")).await.json()["top"], 0);
    }
}

#[tokio::test]
async fn a_failed_batch_lists_the_events_it_published() {
    let weir = weir().await;
    weir.post("/v1/events?channel=b&key=k", "1").await.expect(201);
    let array =
        r#"[{"channel":"a","data":1},{"channel":"b","key":"k","data":2},{"channel":"a","data":3},{"channel":"c"}]"#;
    let problem = weir.post("/v1/events", array).await.expect_problem("key_reused");
    let placed = problem["placed"].as_array().unwrap();
    assert_eq!((&placed[0]["offset"], &placed[2]["offset"]), (&json!(1), &json!(2)));
    assert_eq!((&placed[1], &placed[3], placed.len()), (&json!(null), &json!(null), 4));
    assert_eq!(weir.get("/v1/channels?channel=c").await.json()["top"], 0);
}

#[tokio::test]
async fn a_publish_over_the_memory_budget_is_rejected_as_overloaded() {
    let weir = weir().with(|config| config.bus.memory.budget = 2_000).await;
    let full = weir.post("/v1/events?channel=a", "x".repeat(10_000)).await;
    assert_eq!(full.header("retry-after"), Some("2"));
    assert_eq!(full.expect_problem("overloaded")["executed"], "no");
}

#[tokio::test]
async fn rejected_publishes_name_the_limit_of_the_request() {
    let weir = weir().with(|config| (config.limits.publish_events, config.limits.publish_bytes) = (3, 1_000)).await;
    let events = |n: usize| format!("[{}]", vec![r#"{"channel":"a"}"#; n].join(","));
    weir.post("/v1/events", events(3)).await.expect(201);
    assert_eq!(weir.post("/v1/events", events(4)).await.expect_problem("too_large")["limit"], "limits.publish_events");
    let lines = "{\"channel\":\"a\"}\n".repeat(4);
    assert_eq!(weir.post("/v1/events", lines).await.expect_problem("too_large")["limit"], "limits.publish_events");
    assert_eq!(
        weir.post("/v1/events?channel=a", "x".repeat(1_001)).await.expect_problem("too_large")["limit"],
        "limits.publish_bytes"
    );
    assert_eq!(weir.get("/v1/channels?channel=a").await.json()["top"], 3);
}

#[tokio::test]
async fn a_chunked_body_is_read_up_to_the_limit() {
    let weir = weir().with(|config| config.limits.publish_bytes = 10).await;
    let mut client = weir.client().await;
    let head = "POST /v1/events?channel=a HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n";
    client.write(format!("{head}3\r\n\"ab\r\n3\r\ncd\"\r\n0\r\n\r\n")).await;
    client.response().await.expect(201);
    assert_eq!(weir.get("/v1/events?channel=a").await.json()["events"][0]["data"], "abcd");
    client.write(format!("{head}8\r\nxxxxxxxx\r\n8\r\nxxxxxxxx\r\n")).await;
    client.response().await.expect_problem("too_large");
}

// === trim and delete, channels ===

#[tokio::test]
async fn trims_and_deletes_are_shown_and_announced() {
    let weir = weir().await;
    let mut at = Vec::new();
    for n in 1..=5 {
        at.push(weir.publish("a,b/50%25", &n.to_string()).await);
    }
    weir.delete(format!("/v1/events?channel=a,b/50%25&before={}", at[2])).await.expect(204);
    let info = weir.get("/v1/channels?channel=a,b/50%25").await.expect(200).json();
    assert_eq!((&info["channel"], &info["first"], &info["top"]), (&json!("a,b/50%"), &json!(3), &json!(5)));
    assert_eq!(
        (info["epoch"].as_str(), info["readers"].as_u64()),
        (at[0].rsplit_once('-').map(|(epoch, _)| epoch), Some(0))
    );
    let page = weir.get(format!("/v1/events?channel=a,b/50%25&after={}", at[0])).await.json();
    // The reason of an explicit trim differs from that of retention.
    assert_eq!(page["gaps"][0]["reason"], "deleted");
    assert_eq!((&page["gaps"][0]["after"], &page["gaps"][0]["next"]), (&json!(at[0]), &json!(at[2])));
    assert_eq!((&page["gaps"][0]["missed"], &page["events"][0]["data"]), (&json!(1), &json!(3)));
    weir.delete("/v1/events?channel=a,b/50%25").await.expect(204);
    let page = weir.get(format!("/v1/events?channel=a,b/50%25&after={}", at[3])).await.json();
    assert_eq!(page["gaps"][0]["reason"], "deleted");
    // A reader that had received everything has no gap.
    let page = weir.get(format!("/v1/events?channel=a,b/50%25&after={}", at[4])).await.json();
    assert_eq!(page["gaps"], json!([]));
    // Nothing is left to delete, and a misspelled name is no success.
    weir.delete("/v1/events?channel=a,b/50%25").await.expect_problem("not_found");
    weir.delete("/v1/events?channel=nobody").await.expect_problem("not_found");
    weir.delete("/v1/events").await.expect_problem("invalid_params");
    weir.delete("/v1/events?channel=a&before=earliest").await.expect_problem("invalid_position");
    // An empty position is not an absent one, with which all events are deleted.
    weir.delete("/v1/events?channel=a&before=").await.expect_problem("invalid_position");
    weir.delete("/v1/events?channel=%24services").await.expect_problem("forbidden");
}

#[tokio::test]
async fn channels_are_listed_in_pages() {
    let weir = weir().await;
    for channel in ["b1", "a2", "a1", "é", "a,3"] {
        weir.publish(&channel.replace('é', "%C3%A9"), "1").await;
    }
    let names = |list: &serde_json::Value| {
        list["channels"]
            .as_array()
            .unwrap()
            .iter()
            .map(|info| info["channel"].as_str().unwrap().to_owned())
            .collect::<Vec<_>>()
    };
    let all = weir.get("/v1/channels").await.expect(200).json();
    assert_eq!((names(&all), all.get("page")), (["a,3", "a1", "a2", "b1", "é"].map(String::from).to_vec(), None));
    assert_eq!(names(&weir.get("/v1/channels?prefix=a").await.json()), ["a,3", "a1", "a2"]);
    let mut seen = Vec::new();
    let mut path = "/v1/channels?limit=2".to_owned();
    loop {
        let list = weir.get(path).await.expect(200).json();
        seen.extend(names(&list));
        let Some(page) = list.get("page") else { break };
        path = format!("/v1/channels?limit=2&page={}", page.as_str().unwrap());
    }
    assert_eq!(seen, names(&all));
    weir.get("/v1/channels?limit=0").await.expect_problem("invalid_params");
    weir.get("/v1/channels?page=!").await.expect_problem("invalid_params");
    let absent = weir.get("/v1/channels?channel=nobody").await.expect(200).json();
    assert_eq!((&absent["epoch"], &absent["top"], &absent["time"]), (&json!("0"), &json!(0), &json!(null)));
}

// === consumers ===

#[tokio::test]
async fn a_consumer_reads_commits_seeks_and_is_deleted() {
    let weir = weir().await;
    for n in 1..=3 {
        weir.publish("orders", &n.to_string()).await;
    }
    let poll = |more: String| weir.get(format!("/v1/events?channel=orders&consumer=mailer&limit=2{more}"));
    let data = |page: &serde_json::Value| {
        page["events"].as_array().unwrap().iter().map(|event| event["data"].as_i64().unwrap()).collect::<Vec<_>>()
    };
    let page = poll(String::new()).await.expect(200).json();
    assert_eq!((data(&page), &page["consumer"]), (vec![1, 2], &json!({"name": "mailer", "new": true})));
    // Without a commit the same page is returned, and the consumer is not new any more.
    let again = poll(String::new()).await.json();
    assert_eq!((data(&again), &again["consumer"]), (vec![1, 2], &json!({"name": "mailer"})));
    // The third repeat within a second is counted. On a busy machine it is a later one.
    while weir.metric("weir_consumer_repeats_total") == 0 {
        poll(String::new()).await.expect(200);
    }
    let rest = poll(format!("&after={}", page["next"].as_str().unwrap())).await.json();
    assert_eq!(data(&rest), [3]);
    // An older token does not move the consumer back.
    assert_eq!(data(&poll(format!("&after={}", page["next"].as_str().unwrap().replace("-2", "-1"))).await.json()), [3]);

    let shown = weir.get("/v1/consumers/mailer").await.expect(200).json();
    assert_eq!((&shown["name"], &shown["mode"]), (&json!("mailer"), &json!("cursor")));
    let lag = &shown["channels"][0];
    assert_eq!((&lag["channel"], &lag["position"], &lag["lag"]), (&json!("orders"), &page["next"], &json!(1)));
    assert!(lag["top"].as_str().unwrap().ends_with("-3") && lag["lag_ms"].is_u64());
    assert!(shown["expires"].as_u64() > shown["seen"].as_u64());
    assert_eq!(weir.get("/v1/consumers?prefix=mail").await.json()["consumers"][0]["name"], "mailer");
    assert_eq!(weir.get("/v1/consumers?prefix=x").await.json(), json!({"consumers": []}));

    let commit = |after: &str| weir.post("/v1/consumers/mailer/commit", json!({"after": after}).to_string());
    commit(rest["next"].as_str().unwrap()).await.expect(204);
    assert_eq!(weir.get("/v1/consumers/mailer").await.json()["channels"][0]["lag"], 0);
    commit(page["next"].as_str().unwrap()).await.expect(204);
    assert_eq!(data(&poll(String::new()).await.json()), [0; 0]);
    weir.post("/v1/consumers/mailer/seek", r#"{"channel":"orders","after":"earliest"}"#).await.expect(204);
    assert_eq!(data(&poll("&commit=auto".into()).await.json()), [1, 2]);
    assert_eq!(data(&poll("&commit=auto".into()).await.json()), [3]);
    assert_eq!(data(&poll(String::new()).await.json()), [0; 0]);

    weir.delete("/v1/consumers/mailer").await.expect(204);
    weir.delete("/v1/consumers/mailer").await.expect_problem("not_found");
    weir.get("/v1/consumers/mailer").await.expect_problem("not_found");
    commit("1-1").await.expect_problem("not_found");
    weir.post("/v1/consumers/mailer/seek", r#"{"channel":"orders","after":"now"}"#).await.expect_problem("not_found");
    assert_eq!(poll(String::new()).await.json()["consumer"]["new"], true);
}

#[tokio::test]
async fn a_consumer_from_now_misses_nothing_between_its_polls() {
    let weir = weir().await;
    weir.publish("a", "1").await;
    let path = "/v1/events?channel=a&channel=new&consumer=n&start=now";
    assert_eq!(weir.get(path).await.json()["events"], json!([]));
    weir.publish("a", "2").await;
    weir.publish("new", "3").await;
    let page = weir.get(path).await.json();
    assert_eq!((&page["events"][0]["data"], &page["events"][1]["data"]), (&json!(2), &json!(3)));
    assert_eq!(page["gaps"], json!([]));
    // The token covers both channels.
    weir.post("/v1/consumers/n/commit", json!({"after": page["next"]}).to_string()).await.expect(204);
    assert_eq!(weir.get(path).await.json()["events"], json!([]));
}

#[tokio::test]
async fn invalid_consumer_requests_are_rejected() {
    let weir = weir().await;
    let at = weir.publish("a", "1").await;
    let get = |more: &str| weir.get(format!("/v1/events?channel=a{more}"));
    for bad in [
        "&consumer=a%20b",
        "&consumer=",
        "&consumer=é",
        "&start=now",
        "&commit=auto",
        "&consumer=n&last=1",
        "&consumer=n&start=1",
        "&consumer=n&commit=yes",
        "&consumer=n&after=earliest",
        "&consumer=n&after=now",
        "&consumer=n&after=0",
    ] {
        get(bad).await.expect_problem("invalid_params");
    }
    get("&consumer=n&after=what").await.expect_problem("invalid_position");
    get(&format!("&consumer=n&after={}", at.replace("-1", "-9"))).await.expect_problem("invalid_position");
    get("&consumer=n").await.expect(200);
    weir.post("/v1/consumers/n/commit", json!({"after": at.replace("-1", "-9")}).to_string())
        .await
        .expect_problem("invalid_position");
    weir.post("/v1/consumers/n/commit", r#"{"after":"earliest"}"#).await.expect_problem("invalid_params");
    weir.post("/v1/consumers/n/commit", r#"{}"#).await.expect_problem("invalid_params");
    weir.post("/v1/consumers/n/commit", "{").await.expect_problem("parse_error");
    weir.post("/v1/consumers/n/seek", json!({"channel": "a", "after": at.replace("-1", "-9")}).to_string())
        .await
        .expect_problem("invalid_position");
    weir.post("/v1/consumers/a%20b/commit", json!({"after": at}).to_string()).await.expect_problem("invalid_params");
}

#[tokio::test]
async fn consumers_and_their_channels_are_limited() {
    let weir = weir().with(|config| (config.limits.consumers, config.limits.consumer_channels) = (1, 2)).await;
    weir.get("/v1/events?channel=a&channel=b&consumer=one").await.expect(200);
    weir.get("/v1/events?channel=c&consumer=one").await.expect_problem("limit_reached");
    weir.get("/v1/events?channel=a&consumer=two").await.expect_problem("limit_reached");
    weir.delete("/v1/consumers/one").await.expect(204);
    weir.get("/v1/events?channel=a&consumer=two").await.expect(200);
}

// === operations ===

#[tokio::test]
async fn health_metrics_index_and_openapi_are_served() {
    let weir = weir().await;
    weir.get("/health/live").await.expect(200);
    weir.get("/health/ready").await.expect(200);
    weir.publish("a", "1").await;
    let metrics = weir.get("/metrics").await.expect(200);
    assert_eq!(metrics.header("content-type"), Some("text/plain; version=0.0.4; charset=utf-8"));
    assert!(metrics.text().contains("weir_events_published_total{transport=\"http\"} 1\n"), "{}", metrics.text());
    assert!(weir.get("/").await.expect(200).text().contains("new EventSource"));
    let document = weir.get("/openapi.json").await.expect(200).json();
    assert!(document["openapi"].as_str().unwrap().starts_with("3."));
    weir.node().draining.cancel();
    weir.get("/health/ready").await.expect_problem("draining");
    let live = weir.get("/health/live").await.expect(200);
    assert_eq!(live.header("connection"), Some("close"));
}

/// Every path and method of the document exists.
#[tokio::test]
async fn the_openapi_document_names_only_routes_that_exist() {
    let weir = weir().await;
    let document = weir.get("/openapi.json").await.json();
    for (path, operations) in document["paths"].as_object().unwrap() {
        let path = path.replace("{name}", "n");
        let allow = weir.request("OPTIONS", &*path).await.expect(204);
        for method in operations.as_object().unwrap().keys() {
            let method = method.to_ascii_uppercase();
            assert!(allow.header("allow").unwrap().split(", ").any(|allowed| allowed == method), "{method} {path}");
        }
    }
    for path in ["/v1/events", "/v1/channels", "/v1/consumers", "/v1/consumers/{name}/seek"] {
        assert!(document["paths"].get(path).is_some(), "{path}");
    }
}
