//! Clients of other systems, byte by byte over real sockets.

mod event_stream;
mod ganomede;
mod node_sse;
mod worlds;

use crate::{
    start::eventually,
    support::{Client, Reply, Weir, metric},
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

/// Waits until every client, subscription and timer is given back.
async fn empty(weir: &Weir) {
    eventually("all counts are back at zero", || {
        let gauge = |name: &str| metric(weir, &format!("{name}{{transport=\"sse\"}}"));
        (gauge("weir_connections"), gauge("weir_subscriptions"), weir.gateway().bus.topics().readers()) == (0, 0, 0)
    })
    .await;
}
