//! Server-sent events, byte for byte over real sockets.

use std::{
    collections::BTreeMap,
    time::{Duration, Instant},
};

use serde_json::json;
use weir::position::Position;

use crate::support::{event::channel, weir};

// === one channel ===

#[tokio::test]
async fn a_stream_has_a_head_an_opening_and_events() {
    let weir = weir().await;
    let before = weir.append("orders", "1").await;
    let mut client = weir.sse("channel=orders").await;
    let head = client.head().await.expect(200);
    assert_eq!(head.version, "HTTP/1.1");
    for (name, value) in [
        ("content-type", "text/event-stream"),
        ("cache-control", "no-store, no-transform"),
        ("x-accel-buffering", "no"),
        ("transfer-encoding", "chunked"),
    ] {
        assert_eq!(head.all(name), value, "{name}");
    }
    assert!(head.header("date").is_some());
    // Some clients take an interrupted connection for a stream that has ended if the response announced the close.
    assert_ne!(head.header("connection"), Some("close"), "{head:?}");
    let open = client.opening().await;
    assert_eq!(open.id, before.to_string());
    assert_eq!(open.json(), json!({"channels": [{"channel": "orders", "position": before.to_string()}]}));
    let at = weir.append_typed("orders", Some("created"), r#"{"id":7}"#).await;
    let block = client.next().await;
    assert_eq!((block.id.as_str(), block.event.as_str()), (at.to_string().as_str(), ""));
    let event = block.json();
    assert_eq!((&event["type"], &event["data"]), (&json!("created"), &json!({"id": 7})));
    assert_eq!(weir.open_counts(), (1, 1, 1, 1));
    drop(client);
    weir.idle().await;
    let closed = weir.node().metrics.render();
    assert!(closed.contains(r#"weir_connections_closed_total{transport="sse",reason="peer"} 1"#), "{closed}");
    assert!(closed.contains(r#"weir_events_delivered_total{transport="sse"} 1"#));
}

#[tokio::test]
async fn format_data_sends_only_data() {
    let weir = weir().await;
    let mut client = weir.sse("channel=a&format=data").await;
    client.opening().await;
    weir.append_typed("a", Some("note"), r#""<li>1</li>\n<li>2</li>""#).await;
    weir.append("a", r#"{"n": [1, 2]}"#).await;
    let (one, two) = (client.next().await, client.next().await);
    assert_eq!((one.event.as_str(), one.data.as_str()), ("note", "<li>1</li>\n<li>2</li>"));
    assert_eq!((two.event.as_str(), two.data.as_str()), ("", r#"{"n": [1, 2]}"#));
}

#[tokio::test]
async fn events_published_before_the_resume_are_delivered() {
    let weir = weir().await;
    for name in ["born", "unborn"] {
        if name == "born" {
            weir.append(name, "0").await;
        }
        let mut client = weir.sse(&format!("channel={name}")).await;
        let id = client.opening().await.id;
        drop(client);
        weir.idle().await;
        weir.append(name, "1").await;
        let mut client = weir.sse_after(&format!("channel={name}"), &id).await;
        client.opening().await;
        assert_eq!(client.next().await.json()["data"], 1, "{name}");
        drop(client);
        weir.idle().await;
    }
}

#[tokio::test]
async fn the_start_position_is_chosen_by_precedence() {
    let weir = weir().await;
    let mut at = Vec::new();
    for n in 0..5 {
        at.push(weir.append("a", &n.to_string()).await.to_string());
    }
    for (query, header, first) in [
        ("after=earliest".to_owned(), None, 0),
        ("last=2".to_owned(), None, 3),
        ("after=2".to_owned(), None, 2),
        (format!("after={}", at[0]), None, 1),
        (format!("after=earliest&last_event_id={}", at[2]), None, 3),
        (format!("last=1&lastEventId={}", at[1]), None, 2),
        (format!("after=earliest&last_event_id={}", at[0]), Some(&at[3]), 4),
    ] {
        let query = format!("channel=a&{query}");
        let mut client = match header {
            None => weir.sse(&query).await,
            Some(id) => weir.sse_after(&query, id).await,
        };
        client.opening().await;
        assert_eq!(client.next().await.json()["data"], first, "{query} {header:?}");
    }
}

#[tokio::test]
async fn an_invalid_position_is_a_gap_and_not_an_error_status() {
    let weir = weir().await;
    let top = weir.append("a", "0").await;
    let next = Position { offset: top.offset + 1, ..top }.to_string();
    for (query, header) in [
        ("after=what", None),
        ("last_event_id=+", None),
        ("", Some("nonsense")),
        ("after=earliest", Some("\u{fffd}\u{e9}")),
        ("", Some("wAAAA")),
    ] {
        let query = format!("channel=a&{query}");
        let mut client = match header {
            None => weir.sse(&query).await,
            Some(id) => weir.sse_after(&query, id).await,
        };
        assert_eq!(client.opening().await.id, top.to_string());
        let gap = client.next().await;
        assert_eq!((gap.event.as_str(), gap.id.clone()), ("weir.gap", top.to_string()));
        assert_eq!(
            gap.json(),
            json!({"channel": "a", "reason": "bad_position", "after": null, "next": next, "missed": null})
        );
    }
    // A well-formed position of a log that never existed.
    let mut client = weir.sse_after("channel=a", "zzzzzz-7").await;
    client.opening().await;
    assert_eq!(client.next().await.json()["reason"], "reset");
    assert_eq!(client.next().await.json()["data"], 0);
}

#[tokio::test]
async fn trimmed_history_is_announced_as_a_gap() {
    let weir = weir().with(|config| config.channels[0].keep.count = 10).await;
    let first = weir.append("a", "1").await;
    for n in 2..=20 {
        weir.append("a", &n.to_string()).await;
    }
    let mut client = weir.sse_after("channel=a", &first.to_string()).await;
    let open = client.opening().await;
    let gap = client.next().await;
    let at = |offset| Position { offset, ..first }.to_string();
    // The opening has the old position: a client that disconnects before the gap receives it after its reconnect.
    assert_eq!((open.id, gap.event.as_str(), &gap.id), (at(1), "weir.gap", &at(10)));
    assert_eq!(gap.json(), json!({"channel": "a", "reason": "trimmed", "after": at(1), "next": at(11), "missed": 9}));
    for n in 11..=20 {
        assert_eq!(client.next().await.json()["data"], n);
    }
    // A reader that has received everything continues without a gap after the log is deleted.
    weir.bus().remove(&channel("a"), None).await.unwrap();
    let born = weir.append("a", "21").await;
    let block = client.next().await;
    assert_eq!((block.event.as_str(), block.id, block.data.contains("21}")), ("", born.to_string(), true));
    assert_eq!(born.offset, 1);
}

#[tokio::test]
async fn heartbeats_are_comments() {
    let weir = weir().with(|config| config.sse.heartbeat = Duration::from_millis(400)).await;
    let mut client = weir.sse("channel=a").await;
    client.opening().await;
    while client.text.len() < 6 {
        assert!(client.fill().await);
    }
    assert_eq!(client.text, b":\n".repeat(client.text.len() / 2));
    weir.append("a", "1").await;
    assert_eq!(client.next().await.json()["data"], 1);
    assert!(client.comments >= 3);
}

#[tokio::test]
async fn filtered_events_advance_the_position() {
    let weir = weir().with(|config| config.sse.heartbeat = Duration::from_millis(400)).await;
    let mut client = weir.sse("channel=a&type=seen&type=also").await;
    client.opening().await;
    weir.append_typed("a", Some("seen"), "1").await;
    assert_eq!(client.next().await.json()["data"], 1);
    weir.append_typed("a", Some("hidden"), "2").await;
    let top = weir.append("a", "3").await;
    let position = client.next().await;
    assert_eq!((position.event.as_str(), position.data.as_str()), ("weir.position", "{}"));
    assert_eq!(position.id, top.to_string());
    // The position is sent once.
    let comments = client.comments;
    while client.comments < comments + 2 {
        assert!(client.fill().await);
        client.comments += client.text.len() / 2;
        assert!(client.text.drain(..).all(|byte| byte == b':' || byte == b'\n'));
    }
    weir.append_typed("a", Some("also"), "4").await;
    assert_eq!(client.next().await.json()["data"], 4);
}

// === many channels ===

#[tokio::test]
async fn many_channels_resume_with_one_token() {
    let weir = weir().await;
    let names: Vec<String> = (0..5).map(|n| format!("c{n}")).collect();
    let query = names.iter().map(|name| format!("channel={name}")).collect::<Vec<_>>().join("&");
    let mut client = weir.sse(&query).await;
    let open = client.opening().await;
    let listed: Vec<_> = open.json()["channels"].as_array().unwrap().iter().map(|at| at["channel"].clone()).collect();
    assert_eq!(listed, names.iter().map(|name| json!(name)).collect::<Vec<_>>());

    let mut want: BTreeMap<String, u64> = BTreeMap::new();
    let mut seen: BTreeMap<String, u64> = BTreeMap::new();
    let mut id = open.id;
    for round in 0..20 {
        for n in 0..200 {
            let name = &names[(n * 7 + round) % names.len()];
            weir.append(name, "0").await;
            *want.entry(name.clone()).or_default() += 1;
        }
        // Disconnects at any point and resumes with the last id, as a browser does.
        for _ in 0..(fastrand::usize(1..150)) {
            if seen == want {
                break;
            }
            let block = client.next().await;
            assert_eq!(block.event, "");
            let event = block.json();
            let last = seen.entry(event["channel"].as_str().unwrap().to_owned()).or_default();
            // At least once, in order, without omissions.
            assert!(block.offset() <= *last + 1, "{} after {last}", block.offset());
            *last = block.offset().max(*last);
            id = block.id;
        }
        if round % 3 == 0 {
            drop(client);
            client = weir.sse_after(&query, &id).await;
            client.opening().await;
        }
    }
    while seen != want {
        let block = client.next().await;
        let event = block.json();
        let last = seen.entry(event["channel"].as_str().unwrap().to_owned()).or_default();
        assert!(block.offset() <= *last + 1, "{} after {last}", block.offset());
        *last = block.offset().max(*last);
    }
    drop(client);
    weir.idle().await;
}

#[tokio::test]
async fn a_token_of_other_channels_is_a_gap_for_each() {
    let weir = weir().await;
    let mut client = weir.sse("channel=a&channel=b").await;
    let id = client.opening().await.id;
    let mut client = weir.sse_after("channel=a&channel=c", &id).await;
    client.opening().await;
    for name in ["a", "c"] {
        let gap = client.next().await.json();
        assert_eq!((&gap["channel"], &gap["reason"]), (&json!(name), &json!("bad_position")));
    }
}

#[tokio::test]
async fn ids_all_sends_an_exact_id_with_every_event() {
    let weir = weir().await;
    let start = weir.sse("channel=a&channel=b&ids=all").await.opening().await.id;
    for n in 0..100 {
        weir.append(["a", "b"][n % 2], &n.to_string()).await;
    }
    let mut client = weir.sse_after("channel=a&channel=b&ids=all", &start).await;
    client.opening().await;
    let (mut ids, mut all) = (Vec::new(), Vec::new());
    for _ in 0..100 {
        let block = client.next().await;
        all.push(block.json()["data"].as_u64().unwrap());
        ids.push(block.id);
    }
    ids.dedup();
    assert_eq!(ids.len(), 100);
    // Each id is exact: no event before it is repeated, and none after it is missing.
    for at in [0, 1, 63, 64, 98, 99] {
        let mut client = weir.sse_after("channel=a&channel=b", &ids[at]).await;
        client.opening().await;
        let mut rest = Vec::new();
        for _ in at + 1..100 {
            rest.push(client.next().await.json()["data"].as_u64().unwrap());
        }
        rest.sort();
        let mut want = all[at + 1..].to_vec();
        want.sort();
        assert_eq!(rest, want);
    }
}

#[tokio::test]
async fn long_tokens_are_rare_and_never_late() {
    let weir = weir().await;
    let query = (0..100).map(|n| format!("channel=channel-{n}")).collect::<Vec<_>>().join("&");
    for n in 0..100 {
        weir.append(&format!("channel-{n}"), "0").await;
    }
    let mut client = weir.sse(&query).await;
    let opened = client.opening().await.id;
    assert!(opened.len() > 64 && opened.len() <= 2048);
    let start = Instant::now();
    let mut ids = vec![opened];
    let mut n = 0;
    while start.elapsed() < Duration::from_millis(1500) {
        weir.append(&format!("channel-{}", n % 100), "1").await;
        ids.push(client.next().await.id);
        n += 1;
    }
    ids.dedup();
    // The token of the opening, and at most one per second.
    let most = 2 + start.elapsed().as_secs() as usize;
    assert!((2..=most).contains(&ids.len()), "{} tokens", ids.len());
    let position = loop {
        let block = client.next().await;
        if block.event == "weir.position" {
            break block;
        }
    };
    // The token covers every event received.
    let mut again = weir.sse_after(&query, &position.id).await;
    again.opening().await;
    weir.append("channel-0", "2").await;
    assert_eq!(again.next().await.json()["data"], 2);
}

// === errors ===

#[tokio::test]
async fn permanent_errors_are_an_http_status() {
    let weir = weir().await;
    let many = (0..101).map(|n| format!("channel=c{n}")).collect::<Vec<_>>().join("&");
    for (query, accept, status) in [
        ("", "*/*", 400),
        ("channel=", "*/*", 400),
        ("chanel=a", "*/*", 400),
        ("channel=a&format=xml", "*/*", 400),
        ("channel=a&ids=some", "*/*", 400),
        ("channel=a&last=x", "*/*", 400),
        ("channel=a&type=", "*/*", 400),
        (many.as_str(), "*/*", 400),
        ("channel=a", "application/json", 406),
    ] {
        let head = weir.request("GET", format!("/v1/sse?{query}")).header("accept", accept).await;
        assert_eq!(head.status, status, "{query}: {head:?}");
        assert_eq!(head.header("content-type"), Some("application/problem+json"));
    }
    let mut client = weir.sse("channel=a&_=1").await;
    client.opening().await;
}

#[tokio::test]
async fn temporary_errors_are_a_retry_event() {
    let weir = weir().await;
    let mut open = weir.sse("channel=a").await;
    open.opening().await;
    weir.timers().drain(Duration::from_millis(1));
    let retry = open.next().await;
    assert_eq!(retry.event, "weir.retry");
    assert_eq!(retry.json(), json!({"code": "draining", "after_ms": open.retry.unwrap()}));
    assert_eq!(open.block().await, None);
    assert!(open.ended, "the last chunk was received");
    open.closed().await;

    let mut late = weir.sse("channel=a").await;
    let retry = late.next().await;
    assert_eq!((retry.event.as_str(), retry.id.as_str()), ("weir.retry", ""));
    assert_eq!(retry.json(), json!({"code": "draining", "after_ms": late.retry.unwrap()}));
    assert!(late.retry.unwrap() >= 1000);
    assert_eq!(late.block().await, None);
}
