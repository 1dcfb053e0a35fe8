//! Reads over HTTP: pages and long-polls.

use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::support::{EventStream, Weir, event, eventually, weir};

fn data(page: &Value) -> Vec<i64> {
    page["events"].as_array().unwrap().iter().map(|event| event["data"].as_i64().unwrap()).collect()
}

fn next(page: &Value) -> &str {
    page["next"].as_str().unwrap()
}

/// Waits until `readers` long-polls wait on a channel.
async fn waiting(weir: &Weir, channel: &str, readers: u32) {
    let waiting = async || weir.bus().inspect(&event::channel(channel)).await.unwrap().readers >= readers;
    eventually("the readers wait", waiting).await;
}

#[tokio::test]
async fn an_empty_parameter_that_selects_nothing_is_as_if_absent() {
    let weir = weir().await;
    for n in 1..=3 {
        weir.publish("a", &n.to_string()).await;
    }
    let empty = "channel=a&after=&last=&last_event_id=&lastEventId=&limit=&wait=&min=";
    let page = weir.request("GET", format!("/v1/events?{empty}")).header("last-event-id", "").await.expect(200).json();
    assert_eq!((data(&page), &page["gaps"]), (vec![1, 2, 3], &json!([])));
    weir.get("/v1/events?channel=a&consumer=n&start=&commit=").await.expect(200);
    weir.get("/v1/channels?prefix=&limit=&page=").await.expect(200);
    weir.get("/v1/presence?channel=a&count=&limit=&page=").await.expect(200);
    weir.post("/v1/services/weir/echo?timeout=", "[1]").await.expect(200);
    let mut stream =
        EventStream::resume(weir.address, "channel=a&after=earliest&last_event_id=&format=&ids=&present=c&info=", "")
            .await;
    stream.opening().await;
    for n in 1..=3 {
        let block = stream.block().await.unwrap();
        assert_eq!((&*block.event, block.offset()), ("", n), "no gap");
    }
    let mut socket = weir.socket().await;
    let page = socket.call("weir.read", json!({ "channels": ["a"], "after": "", "last": 1 })).await;
    assert_eq!(data(&page), [3]);
    let subscribed = socket.call("weir.subscribe", json!({ "channels": ["a"], "after": "" })).await;
    assert_eq!(subscribed[0]["gap"], json!(null), "{subscribed}");
    // Without these, a request would do something else.
    for query in ["channel=", "channel=a&type=", "channel=a&consumer="] {
        weir.get(format!("/v1/events?{query}")).await.expect_problem("invalid_params");
    }
    weir.get("/v1/sse?channel=a&present=").await.expect_problem("invalid_params");
}

#[tokio::test]
async fn a_read_starts_at_the_requested_position() {
    let weir = weir().await;
    let mut at = Vec::new();
    for n in 1..=5 {
        at.push(weir.publish("a", &n.to_string()).await);
    }
    let read = |more: String| weir.get(format!("/v1/events?channel=a{more}"));
    for (more, expected) in [
        (String::new(), vec![1, 2, 3, 4, 5]),
        ("&after=earliest".into(), vec![1, 2, 3, 4, 5]),
        ("&after=now".into(), vec![]),
        ("&last=2".into(), vec![4, 5]),
        ("&last=0".into(), vec![]),
        ("&last=99".into(), vec![1, 2, 3, 4, 5]),
        (format!("&after={}", at[2]), vec![4, 5]),
        ("&after=3".into(), vec![4, 5]),
        (format!("&after=earliest&last_event_id={}", at[3]), vec![5]),
        (format!("&after=earliest&lastEventId={}", at[3]), vec![5]),
    ] {
        let page = read(more.clone()).await.expect(200).json();
        assert_eq!(data(&page), expected, "{more}");
        assert_eq!((next(&page), &page["more"], &page["gaps"]), (&*at[4], &json!(false), &json!([])), "{more}");
    }
    let resumed = weir.request("GET", "/v1/events?channel=a&after=earliest").header("last-event-id", &at[3]).await;
    assert_eq!(data(&resumed.json()), [5]);
    let page = read("&limit=2".into()).await.json();
    assert_eq!((data(&page), next(&page), &page["more"]), (vec![1, 2], &*at[1], &json!(true)));
    for bad in ["&after=x", "&after=k3Vq00", "&after=wAAAA", "&after=-1"] {
        read(bad.into()).await.expect_problem("invalid_position");
    }
    for bad in [
        "&after=now&last=1",
        "&limit=0",
        "&limit=1001",
        "&limit=x",
        "&limit=1&limit=2",
        "&last=-1",
        "&wait=5",
        "&wait=56s",
        "&wait=1h",
        "&min=0",
        "&min=101",
        "&type=",
        "&chanel=b",
        "&channels=b",
    ] {
        read(bad.into()).await.expect_problem("invalid_params");
    }
    assert_eq!(read("&wait=56s".into()).await.expect_problem("invalid_params")["limit"], "limits.wait");
    assert!(read("&wait=5".into()).await.json()["detail"].as_str().unwrap().contains("5s"));
    assert!(read("&channels=b".into()).await.json()["detail"].as_str().unwrap().contains("repeat channel"));
    weir.get("/v1/events").await.expect_problem("invalid_params");
    read("&_cache=1".into()).await.expect(200);
}

#[tokio::test]
async fn a_type_filter_advances_the_position() {
    let weir = weir().await;
    for n in 0..300 {
        let kind = if n % 100 == 50 { "rare" } else { "common" };
        weir.append_typed("a", Some(kind), &n.to_string()).await;
    }
    let page = weir.get("/v1/events?channel=a&type=rare&type=other&limit=2").await.json();
    assert_eq!((data(&page), &page["more"]), (vec![50, 150], &json!(true)));
    let rest = weir.get(format!("/v1/events?channel=a&type=rare&after={}", next(&page))).await.json();
    assert_eq!((data(&rest), &rest["more"]), (vec![250], &json!(false)));
    assert!(next(&rest).ends_with("-300"), "the position is after the filtered events: {rest}");
    let none = weir.get("/v1/events?channel=a&type=never").await.json();
    assert!(none["events"] == json!([]) && next(&none).ends_with("-300"), "{none}");
}

#[tokio::test]
async fn pages_are_limited_in_bytes_and_hold_at_least_one_event() {
    let weir = weir().with(|config| config.limits.page_bytes = 10_000).await;
    for _ in 0..20 {
        weir.publish("a", &format!("\"{}\"", "x".repeat(4_000))).await;
    }
    weir.publish("b", &format!("\"{}\"", "x".repeat(50_000))).await;
    let mut path = "/v1/events?channel=a&channel=b".to_owned();
    let mut events = 0;
    loop {
        let reply = weir.get(path).await.expect(200);
        let page = reply.json();
        let count = page["events"].as_array().unwrap().len();
        assert!(
            count >= 1 && (count == 1 || reply.body.len() < 62_000),
            "{count} events in {} bytes",
            reply.body.len()
        );
        events += count;
        if page["more"] == json!(false) {
            break;
        }
        path = format!("/v1/events?channel=a&channel=b&after={}", next(&page));
    }
    assert_eq!(events, 21);
}

#[tokio::test]
async fn several_channels_share_a_page_and_a_token() {
    let weir = weir().await;
    for n in 0..30 {
        weir.publish("busy", &n.to_string()).await;
    }
    weir.publish("quiet", "100").await;
    let page = weir.get("/v1/events?channel=busy&channel=quiet&channel=never&channel=busy&limit=10").await.json();
    assert!(data(&page).contains(&100), "a busy channel does not fill the page alone: {page}");
    assert_eq!((data(&page).len(), &page["more"]), (10, &json!(true)));
    let mut seen = data(&page);
    let mut token = next(&page).to_owned();
    assert!(token.starts_with('w'));
    loop {
        // The channels may be in any order.
        let page = weir
            .get(format!("/v1/events?channel=never&channel=quiet&channel=busy&limit=10&after={token}"))
            .await
            .expect(200)
            .json();
        seen.extend(data(&page));
        token = next(&page).to_owned();
        if page["more"] == json!(false) {
            break;
        }
    }
    seen.sort_unstable();
    assert_eq!(seen, (0..30).chain([100]).collect::<Vec<_>>());
    // A page of one event keeps the positions of the other channels.
    let page = weir.get("/v1/events?channel=busy&channel=quiet&channel=never&limit=1&after=earliest").await.json();
    assert_eq!((data(&page).len(), &page["more"]), (1, &json!(true)));
    weir.get(format!("/v1/events?channel=busy&after={token}")).await.expect_problem("invalid_position");
    let position = weir.publish("busy", "1").await;
    weir.get(format!("/v1/events?channel=busy&channel=quiet&after={position}"))
        .await
        .expect_problem("invalid_position");
    let many: String = (0..101).map(|n| format!("channel=c{n}&")).collect();
    assert_eq!(
        weir.get(format!("/v1/events?{many}")).await.expect_problem("invalid_params")["limit"],
        "limits.stream_channels"
    );
}

#[tokio::test]
async fn an_absent_channel_is_read_from_its_creation() {
    let weir = weir().await;
    let page = weir.get("/v1/events?channel=later").await.expect(200).json();
    assert!(page["events"] == json!([]) && next(&page).starts_with("0-"), "{page}");
    weir.publish("later", "1").await;
    let page = weir.get(format!("/v1/events?channel=later&after={}", next(&page))).await.json();
    assert_eq!((data(&page), &page["gaps"]), (vec![1], &json!([])));
    let odd = weir.get("/v1/events?channel=later&after=AAAAAB-7").await.json();
    assert_eq!((&odd["gaps"][0]["reason"], &odd["gaps"][0]["missed"]), (&json!("reset"), &json!(null)));
    assert_eq!(data(&odd), [1]);
}

// === waiting ===

#[tokio::test]
async fn an_event_ends_the_wait_at_once() {
    let weir = weir().await;
    for path in [
        "/v1/events?channel=a&after=now&wait=55s",
        "/v1/events?channel=b&channel=a&after=now&wait=55s",
        "/v1/events?channel=a&consumer=n&start=now&wait=55s&commit=auto",
    ] {
        let started = Instant::now();
        let poll = weir.get(path);
        let (page, ()) = tokio::join!(poll, async {
            waiting(&weir, "a", 1).await;
            weir.publish("a", "7").await;
        });
        assert_eq!(data(&page.expect(200).json()), [7], "{path}");
        assert!(started.elapsed() < Duration::from_secs(10));
    }
    assert_eq!(weir.get("/v1/channels?channel=a").await.json()["readers"], 0, "the reader is released");
}

#[tokio::test]
async fn a_wait_without_events_ends_with_the_same_position() {
    let weir = weir().await;
    let at = weir.publish("a", "1").await;
    let page = weir.get(format!("/v1/events?channel=a&after={at}&wait=20ms")).await.expect(200).json();
    assert_eq!(page, json!({"events": [], "next": at, "more": false, "gaps": []}));
}

#[tokio::test]
async fn an_event_wakes_every_waiting_reader() {
    let weir = weir().await;
    let polls: Vec<_> = (0..50)
        .map(|_| tokio::spawn(weir.request("GET", "/v1/events?channel=a&after=now&wait=55s").into_future()))
        .collect();
    waiting(&weir, "a", 50).await;
    weir.publish("a", "7").await;
    for poll in polls {
        assert_eq!(data(&poll.await.unwrap().json()), [7]);
    }
}

#[tokio::test]
async fn nothing_is_lost_between_a_read_and_the_wait() {
    let weir = weir().await;
    const EVENTS: i64 = 2_000;
    let publisher = async {
        let mut client = weir.client().await;
        for n in 1..=EVENTS {
            client.post("/v1/events?channel=a", &n.to_string()).await.expect(201);
        }
    };
    let reader = async |types: &str| {
        let mut client = weir.client().await;
        let (mut seen, mut after) = (0, "earliest".to_owned());
        while seen < EVENTS {
            let page = client
                .get(&format!("/v1/events?channel=a&after={after}&wait=20s&limit=1000{types}"))
                .await
                .expect(200)
                .json();
            assert_eq!(page["gaps"], json!([]));
            for n in data(&page) {
                assert_eq!(n, seen + 1);
                seen = n;
            }
            after = next(&page).to_owned();
        }
    };
    tokio::join!(publisher, reader(""), reader("&min=10"), reader("&channel=b"));
}

#[tokio::test]
async fn min_waits_for_several() {
    let weir = weir().await;
    let (page, ()) = tokio::join!(weir.get("/v1/events?channel=a&channel=b&min=3&wait=55s&limit=10"), async {
        waiting(&weir, "a", 1).await;
        for (channel, n) in [("a", "1"), ("b", "2"), ("a", "3")] {
            weir.publish(channel, n).await;
        }
    });
    let mut seen = data(&page.json());
    seen.sort_unstable();
    assert_eq!(seen, [1, 2, 3]);
    // At the deadline the page has the events that exist.
    let page = weir.get("/v1/events?channel=a&min=3&wait=20ms").await.json();
    assert_eq!(data(&page), [1, 3]);
}

#[tokio::test]
async fn a_gap_ends_the_wait_at_once() {
    let weir = weir().await;
    weir.publish("a", "1").await;
    let started = Instant::now();
    let page = weir.get("/v1/events?channel=a&after=AAAAAB-7&wait=55s&min=5").await.json();
    assert_eq!(page["gaps"][0]["reason"], "reset");
    assert!(started.elapsed() < Duration::from_secs(10));
}

#[tokio::test]
async fn hidden_events_do_not_end_the_wait() {
    let weir = weir().await;
    let (page, ()) = tokio::join!(weir.get("/v1/events?channel=a&type=x&wait=55s"), async {
        waiting(&weir, "a", 1).await;
        weir.post("/v1/events?channel=a&type=y", "1").await.expect(201);
        weir.post("/v1/events?channel=a&type=x", "2").await.expect(201);
    });
    assert_eq!(data(&page.json()), [2]);
}

#[tokio::test]
async fn a_disconnected_reader_is_removed() {
    let weir = weir().await;
    let mut client = weir.client().await;
    client.send("GET", "/v1/events?channel=a&wait=55s", &[], b"").await;
    waiting(&weir, "a", 1).await;
    drop(client);
    let readers = async || weir.bus().inspect(&event::channel("a")).await.unwrap().readers;
    eventually("no reader is left", async || readers().await == 0).await;
}

#[tokio::test]
async fn a_drain_answers_waiting_reads_with_an_empty_page() {
    let weir = weir().await;
    let at = weir.publish("a", "1").await;
    let path = format!("/v1/events?channel=a&after={at}&wait=55s");
    let (page, ()) = tokio::join!(weir.get(&*path), async {
        waiting(&weir, "a", 1).await;
        weir.node().draining.cancel();
    });
    assert_eq!(
        (page.header("connection"), page.json()),
        (Some("close"), json!({"events": [], "next": at, "more": false, "gaps": []}))
    );
    // A new read waits for a second, because a fast response would be followed by the next request at once.
    let started = Instant::now();
    let page = weir.get(&*path).await.expect(200).json();
    assert_eq!((&page["events"], next(&page)), (&json!([]), &*at));
    assert!((Duration::from_millis(900)..Duration::from_secs(10)).contains(&started.elapsed()));
    assert_eq!(data(&weir.get("/v1/events?channel=a&wait=55s").await.json()), [1]);
}

#[tokio::test]
async fn reading_creates_no_channel() {
    let weir = weir().await;
    for more in ["", "&after=now", "&last=3", "&consumer=c", "&consumer=d&start=now"] {
        weir.get(format!("/v1/events?channel=a&channel=b{more}")).await.expect(200);
    }
    weir.post("/v1/consumers/c/seek", r#"{"channel":"e","after":"earliest"}"#).await.expect(204);
    assert_eq!(weir.bus().topics().count(), 0);
    // A consumer with `start=now` starts at that position.
    weir.publish("a", "1").await;
    let page = weir.get("/v1/events?channel=a&consumer=d").await.json();
    assert_eq!((data(&page), &page["gaps"]), (vec![1], &json!([])));
    let page = weir.get("/v1/events?channel=a&consumer=f&start=now").await.json();
    assert_eq!(data(&page), [] as [i64; 0]);
    assert_eq!(data(&weir.get("/v1/events?channel=a&consumer=g&start=earliest").await.json()), [1]);
}
