//! `[[compat.sse.routes]]`: endpoints for clients of @fanoutio/eventstream.

use std::time::Duration;

use weir::compat::event_stream::{self, SseRoute};

use crate::support::{Starter, TextStream, Weir, weir};

fn routes() -> Starter {
    let route = |path: &str, channels: &[&str]| SseRoute {
        path: path.to_owned(),
        channels: channels.iter().map(|channel| channel.to_string()).collect(),
    };
    weir().with(|config| {
        config.drain.window = Duration::ZERO;
        config.compat.get_mut::<event_stream::Config>().unwrap().routes = vec![
            route("/api/events/{id}", &["{id}"]),
            route("/api/rooms/{room}/events", &["room-{room}", "user-{user}", " {extra} "]),
        ];
    })
}

async fn publish(weir: &Weir, channel: &str, query: &str, data: &str) {
    weir.post(format!("/v1/events?channel={channel}{query}"), data.to_owned()).await.expect(201);
}

const OPEN: &str = "event: stream-open\ndata: \n\n";

#[tokio::test]
async fn a_configured_route_is_a_stream() {
    let weir = routes().await;
    let mut stream = TextStream::open(weir.address, "/api/events/a%20b/").await;
    assert_eq!(stream.head.header("content-type"), Some("text/event-stream"));
    assert_eq!(stream.head.header("transfer-encoding"), Some("chunked"));
    // The subscription starts before the head is sent.
    publish(&weir, "a%20b", "&type=created", r#"{"id":[1, "x"]}"#).await;
    publish(&weir, "a%20b", "", r#""text""#).await;
    stream.expect(OPEN).await;
    stream.expect("event: created\ndata: {\"id\":[1, \"x\"]}\n\n").await;
    stream.expect("data: \"text\"\n\n").await;
    drop(stream);
    weir.idle().await;
}

#[tokio::test]
async fn channel_names_take_parameters_from_path_and_query() {
    let weir = routes().await;
    let mut stream = TextStream::open(weir.address, "/api/rooms/7/events?user=jo%20e&x=1").await;
    stream.expect(OPEN).await;
    publish(&weir, "room-7", "", "1").await;
    stream.expect("data: 1\n\n").await;
    publish(&weir, "user-jo%20e", "", "2").await;
    stream.expect("data: 2\n\n").await;
    assert_eq!(weir.bus().topics().readers(), 2, "an empty name is ignored");
    weir.shut_down();
    let end = stream.rest().await;
    assert!(end.starts_with("retry: ") && end.ends_with('\n') && !end.ends_with("\n\n"), "{end:?}");
    weir.stopped().await;
}

#[tokio::test]
async fn invalid_stream_requests_are_rejected() {
    let weir = routes().await;
    let refused = async |headers: &[(&str, &str)], path: &str, status: u16, text: &str| {
        let mut client = weir.client().await;
        client.send("GET", path, headers, b"").await;
        let reply = client.response().await.expect(status);
        assert_eq!(reply.text(), text);
        assert_eq!(reply.header("content-type"), Some("text/plain; charset=utf-8"));
    };
    let not_acceptable = "Not Acceptable.\n";
    refused(&[("accept", "application/json"), ("last-event-id", "error")], "/api/events/a", 406, not_acceptable).await;
    let error = "last-event-id header may not be 'error'.\n";
    refused(&[("accept", "*/*"), ("last-event-id", "error")], "/api/events/%20", 400, error).await;
    refused(&[], "/api/events/%20", 400, "No specified channels.\n").await;
    refused(&[], "/api/events/a%0Ab", 400, "a channel name has no control characters\n").await;
    weir.get("/api/events").await.expect_problem("not_found");
    let posted = weir.request("POST", "/api/events/a").await;
    assert_eq!(posted.header("allow"), Some("GET, HEAD, OPTIONS"));
    posted.expect_problem("method_not_allowed");
    let head = weir.request("HEAD", "/api/events/a").await.expect(200);
    assert_eq!(head.header("content-type"), Some("text/event-stream"));
    weir.idle().await;
}

#[tokio::test]
async fn cors_of_routes_follows_the_allowed_origins() {
    let weir = routes().with(|config| config.cors.origins = vec!["https://shop.example".into()]).await;
    for (origin, allowed) in [("https://shop.example", true), ("https://evil.example", false)] {
        let reply = weir.request("HEAD", "/api/events/a").header("origin", origin).await.expect(200);
        assert_eq!(reply.header("access-control-allow-origin"), allowed.then_some(origin));
        assert_eq!(reply.header("vary"), Some("Origin"));
        let preflight = weir.request("OPTIONS", "/api/events/a").header("origin", origin);
        let preflight = preflight.header("access-control-request-method", "GET").await.expect(204);
        assert_eq!(preflight.header("access-control-allow-methods"), allowed.then_some("GET, HEAD, OPTIONS"));
    }
}
