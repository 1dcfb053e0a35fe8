//! The adapters, byte for byte over real sockets.

mod cluster;
mod conversions;
mod event_stream;
mod ganomede;
mod grip;
pub mod microstream;
mod node_sse;

use weir::compat::event_stream::{Config as EventStreamConfig, SseRoute};

use crate::support::weir;

/// An `EventSource` does not reconnect after any status other than 200.
#[tokio::test]
async fn an_event_source_retries_when_the_node_is_full() {
    let weir = weir()
        .with(|config| {
            config.limits.connections = 1;
            config.compat.enable = vec!["node-sse", "microstream"];
            config.compat.get_mut::<EventStreamConfig>().unwrap().routes =
                vec![SseRoute { path: "/api/{id}".into(), channels: vec!["{id}".into()] }];
            config.cors.origins = vec!["https://shop.example".into()];
        })
        .await;
    let mut only = weir.client().await;
    only.get("/").await.expect(200);
    for (path, allowed) in [("/subscribe?channels=a", "*"), ("/api/7", "https://shop.example")] {
        let request = weir.request("GET", path).header("accept", "text/event-stream");
        let response = request.header("origin", "https://shop.example").await.expect(200);
        assert_eq!(response.header("content-type"), Some("text/event-stream"), "{path}");
        assert_eq!(response.header("access-control-allow-origin"), Some(allowed), "{path}");
        assert!(response.text().starts_with("retry: "), "{}", response.text());
    }
    // Other clients receive the error.
    weir.get("/socket.io/?EIO=4&transport=polling").await.expect_problem("overloaded");
}
