//! Clients of other systems, byte by byte over real sockets.

mod event_stream;
mod ganomede;
mod node_sse;
mod worlds;

use weir::config::{Adapter, SseRoute};

use crate::{
    start::eventually,
    support::{Client, Reply, Weir, metric, weir},
};

/// A stream, read as text.
struct Stream {
    client: Client,
    head: Reply,
    text: String,
}

impl Stream {
    async fn open(weir: &Weir, path: &str) -> Self {
        let mut client = weir.client().await;
        client.send("GET", path, &[], b"").await;
        let head = client.head().await.expect(200);
        Stream { client, head, text: String::new() }
    }

    /// Reads exactly this.
    #[track_caller]
    fn expect(&mut self, text: &str) -> impl Future<Output = ()> {
        let at = std::panic::Location::caller();
        async move {
            while self.text.len() < text.len() {
                let chunk = self.client.chunk().await.unwrap_or_else(|| panic!("ended after {:?} ({at})", self.text));
                self.text += std::str::from_utf8(&chunk).unwrap();
            }
            let rest = self.text.split_off(text.len());
            assert_eq!(self.text, text, "{at}");
            self.text = rest;
        }
    }

    /// Reads to the end.
    async fn rest(mut self) -> String {
        while let Some(chunk) = self.client.chunk().await {
            self.text += std::str::from_utf8(&chunk).unwrap();
        }
        self.text
    }
}

/// An `EventSource` that is answered with any status but 200 never comes back.
#[tokio::test]
async fn a_node_that_is_full_ends_no_event_source_for_good() {
    let weir = weir()
        .with(|config| {
            config.limits.connections = 1;
            config.compat.enable = vec![Adapter::NodeSse, Adapter::MicroStream];
            config.compat.sse.routes = vec![SseRoute { path: "/api/{id}".into(), channels: vec!["{id}".into()] }];
            config.cors.origins = vec!["https://shop.example".into()];
        })
        .await;
    let mut only = weir.client().await;
    only.get("/").await.expect(200);
    for (path, allowed) in [("/subscribe?channels=a", "*"), ("/api/7", "https://shop.example")] {
        let asked = weir.request("GET", path).header("accept", "text/event-stream");
        let refused = asked.header("origin", "https://shop.example").await.expect(200);
        assert_eq!(refused.header("content-type"), Some("text/event-stream"), "{path}");
        assert_eq!(refused.header("access-control-allow-origin"), Some(allowed), "{path}");
        assert!(refused.text().starts_with("retry: "), "{}", refused.text());
    }
    // Others are told as it is.
    weir.get("/socket.io/?EIO=4&transport=polling").await.refused("overloaded");
}

/// Waits until every client, subscription and timer is given back.
async fn empty(weir: &Weir) {
    eventually("all counts are back at zero", || {
        let gauge = |name: &str| metric(weir, &format!("{name}{{transport=\"sse\"}}"));
        (gauge("weir_connections"), gauge("weir_subscriptions"), weir.node().bus.topics().readers()) == (0, 0, 0)
    })
    .await;
}
