//! Reliable streams: held streams with a link that fetches missing items.

use serde_json::json;

use super::{Grip, Origin, before, behind, hold::held, route};
use crate::support::weir;

const LINKED: &[(&str, &str)] =
    &[("Grip-Hold", "stream"), ("Grip-Channel", "a; prev-id=1"), ("Grip-Link", "<next?from=1>; rel=next")];

async fn item(grip: &Grip, prev: &str, id: &str, content: &str) {
    let item = json!({"id": id, "prev-id": prev, "no-seq": true, "formats": {"http-stream": {"content": content}}});
    grip.publish("a", item).await;
}

#[tokio::test]
async fn consecutive_items_are_delivered_without_following_the_link() {
    let mut origin = Origin::start().await;
    let grip = before(&origin).await;
    let mut client = held(&grip, &mut origin, LINKED, "0-1;").await;
    item(&grip, "0", "1", "the client has it;").await;
    item(&grip, "1", "2", "2;").await;
    item(&grip, "2", "3", "3;").await;
    grip.weir.publish("a", "4").await;
    item(&grip, "3", "4", "4;").await;
    assert_eq!(client.chunks(19).await, "0-1;2;3;data: 4\n\n4;");
    assert!(origin.is_quiet());
    drop(client);
    grip.weir.idle().await;
}

#[tokio::test]
async fn missing_items_are_fetched_once_and_delivered_once() {
    let mut origin = Origin::start().await;
    let grip = before(&origin).await;
    let mut client = held(&grip, &mut origin, LINKED, "0-1;").await;
    assert_eq!(client.chunks(4).await, "0-1;");
    item(&grip, "2", "3", "3;").await;
    let exchange = origin.next().await;
    assert_eq!(exchange.line(), "GET /next?from=1");
    assert_eq!((exchange.header("grip-last"), exchange.header("cookie")), (Some("a; last-id=1"), None));
    assert!(exchange.header("grip-sig").is_some() && exchange.header("host").is_some());
    // More items arrive during the request; its response contains one of them.
    item(&grip, "3", "4", "4;").await;
    item(&grip, "4", "5", "5;").await;
    let next = [("Grip-Hold", "stream"), ("Grip-Channel", "a; prev-id=4"), ("Grip-Link", "</next?from=4>; rel=next")];
    exchange.answer(&next, "2-4;").await;
    assert_eq!(client.chunks(6).await, "2-4;5;");
    item(&grip, "5", "6", "6;").await;
    assert_eq!(client.chunks(2).await, "6;");
    assert!(origin.is_quiet());
}

#[tokio::test]
async fn an_outdated_hold_follows_its_link_at_once() {
    let mut origin = Origin::start().await;
    let grip = before(&origin).await;
    item(&grip, "1", "2", "2;").await;
    let mut client = held(&grip, &mut origin, LINKED, "0-1;").await;
    let exchange = origin.next().await;
    assert_eq!((exchange.line(), exchange.header("grip-last")), ("GET /next?from=1", Some("a; last-id=1")));
    let next = [("Grip-Hold", "stream"), ("Grip-Channel", "a; prev-id=2"), ("Grip-Link", "<next>; rel=next")];
    exchange.answer(&next, "2;").await;
    item(&grip, "2", "3", "3;").await;
    assert_eq!(client.chunks(8).await, "0-1;2;3;");
    assert!(origin.is_quiet());
}

#[tokio::test]
async fn link_timeouts_and_hints_follow_the_link() {
    let mut origin = Origin::start().await;
    let grip = before(&origin).await;
    let with_timeout = [("Grip-Hold", "stream"), ("Grip-Channel", "a"), ("Grip-Link", "</next>; rel=next; timeout=1")];
    let mut client = held(&grip, &mut origin, &with_timeout, "open;").await;
    let exchange = origin.next().await;
    assert_eq!((exchange.line(), exchange.header("grip-last")), ("GET /next", None));
    let patient = [("Grip-Hold", "stream"), ("Grip-Channel", "a"), ("Grip-Link", "</hint>; rel=next")];
    exchange.answer(&patient, "next;").await;
    assert_eq!(client.chunks(10).await, "open;next;");
    grip.publish("a", json!({"formats": {"http-stream": {"action": "hint"}}})).await;
    let exchange = origin.next().await;
    assert_eq!(exchange.line(), "GET /hint");
    // A response without a hold ends the stream.
    exchange.answer(&[], "end").await;
    assert_eq!(client.chunks(3).await, "end");
    assert_eq!(client.chunk().await, None);
    grip.weir.idle().await;
}

#[tokio::test]
async fn a_link_changes_channels_or_names_another_page() {
    let mut origin = Origin::start().await;
    let grip = before(&origin).await;
    let mut client = held(&grip, &mut origin, &[("Grip-Link", "</page/2>; rel=next")], "1;").await;
    let exchange = origin.next().await;
    assert_eq!(exchange.line(), "GET /page/2");
    exchange.answer(&[("Grip-Link", "<3>; rel=next")], "2;").await;
    let exchange = origin.next().await;
    assert_eq!(exchange.line(), "GET /page/3");
    let both = [("Grip-Hold", "stream"), ("Grip-Channel", "a, b"), ("Grip-Link", "</again>; rel=next")];
    exchange.answer(&both, "3;").await;
    grip.readers("b", 1).await;
    grip.stream("a", "a;").await;
    grip.publish("a", json!({"formats": {"http-stream": {"action": "hint"}}})).await;
    let other = [("Grip-Hold", "stream"), ("Grip-Channel", "b, c"), ("Grip-Link", "</again>; rel=next")];
    origin.next().await.answer(&other, "4;").await;
    grip.readers("a", 0).await;
    grip.readers("c", 1).await;
    assert_eq!(grip.metric("weir_subscriptions{transport=\"sse\"}"), 2);
    grip.stream("b", "b;").await;
    grip.stream("c", "c;").await;
    assert_eq!(client.chunks(10).await, "1;2;3;a;4;");
    let last = client.chunks(4).await;
    assert!(["b;c;", "c;b;"].contains(&last.as_str()), "{last}");
    drop(client);
    grip.weir.idle().await;
}

#[tokio::test]
async fn a_failed_link_is_retried() {
    let mut origin = Origin::start().await;
    let grip = before(&origin).await;
    let mut client = held(&grip, &mut origin, LINKED, "0-1;").await;
    item(&grip, "2", "3", "3;").await;
    let mut exchange = origin.next().await;
    exchange.write("HTTP/1.1 500 Oh\r\nContent-Length: 0\r\n\r\n").await;
    exchange.done();
    let next = [("Grip-Hold", "stream"), ("Grip-Channel", "a; prev-id=2"), ("Grip-Link", "<next>; rel=next")];
    origin.next().await.answer(&next, "2;").await;
    assert_eq!(client.chunks(8).await, "0-1;2;3;");
}

#[tokio::test]
async fn links_are_followed_only_to_configured_origins() {
    let (mut origin, mut other) = (Origin::start().await, Origin::start().await);
    let mut stranger = Origin::start().await;
    let grip = behind(weir(), vec![route("/", &origin), route("/other", &other)]).await;
    for (link, path) in
        [(format!("http://{}/other/x", grip.proxy), "GET /other/x"), (format!("http://{}/y", other.address), "GET /y")]
    {
        let client = held(&grip, &mut origin, &[("Grip-Link", &*format!("<{link}>; rel=next"))], "1;").await;
        let exchange = other.next().await;
        assert_eq!(exchange.line(), path);
        exchange.answer(&[], "").await;
        drop(client);
    }
    let link = format!("<http://{}/secret>; rel=next", stranger.address);
    let mut client = held(&grip, &mut origin, &[("Grip-Link", &*link)], "1;").await;
    assert_eq!(client.chunks(2).await, "1;");
    drop(client);
    grip.weir.idle().await;
    assert!(stranger.is_quiet());
}
