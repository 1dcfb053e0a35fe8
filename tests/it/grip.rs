//! The GRIP proxy, between clients and origins of which every byte is known.

pub mod hold;
mod link;
mod origin;
mod proxy;
mod publish;

use std::net::SocketAddr;

use serde_json::{Value, json};
use weir::config::{Adapter, GripRoute};

use crate::support::{Reply, Request, Starter, Weir, weir};

pub use origin::Origin;

/// weir before one origin.
pub async fn before(origin: &Origin) -> Grip {
    behind(vec![route("/", origin)], |starter| starter).await
}

/// weir before these, and otherwise as `change` says.
pub async fn behind(routes: Vec<GripRoute>, change: impl FnOnce(Starter) -> Starter) -> Grip {
    let starter = weir().with(|config| {
        let grip = &mut config.compat.grip;
        config.compat.enable = vec![Adapter::Grip];
        let free = Some(SocketAddr::from(([127, 0, 0, 1], 0)));
        (grip.listen, grip.publish_listen, grip.routes) = (free, free, routes);
    });
    let weir = change(starter).await;
    let [_, proxy, publish] = weir.addresses[..] else { panic!("{:?}", weir.addresses) };
    Grip { weir, proxy, publish }
}

pub fn route(path: &str, origin: &Origin) -> GripRoute {
    GripRoute { path: path.into(), origin: format!("http://{}", origin.address), ..GripRoute::default() }
}

/// A running weir with its two other listeners.
pub struct Grip {
    pub weir: Weir,
    pub proxy: SocketAddr,
    pub publish: SocketAddr,
}

impl Grip {
    /// A request to the proxy.
    pub fn ask(&self, method: &'static str, path: &str) -> Request {
        Request::new(self.proxy, method, path.into())
    }

    pub async fn publish_raw(&self, body: impl Into<String>) -> Reply {
        Request::new(self.publish, "POST", "/publish/".into()).body(body.into()).await
    }

    /// Publishes one item.
    pub async fn publish(&self, channel: &str, item: Value) {
        let mut item = item;
        item["channel"] = json!(channel);
        let reply = self.publish_raw(json!({ "items": [item] }).to_string()).await;
        assert_eq!((reply.status, reply.text()), (200, "Published\n"));
    }

    /// Publishes text for held streams.
    pub async fn stream(&self, channel: &str, content: &str) {
        self.publish(channel, json!({ "formats": { "http-stream": { "content": content } } })).await;
    }

    /// Waits until so many readers follow a channel.
    pub async fn readers(&self, channel: &str, count: u64) {
        until(async || {
            let info = self.weir.get(format!("/v1/channels?channel={channel}")).await.expect(200).json();
            info["readers"] == count
        })
        .await;
    }

    pub fn metric(&self, series: &str) -> i64 {
        crate::support::metric(&self.weir, series)
    }
}

/// Waits for a condition, and fails if it never holds.
pub async fn until(mut holds: impl AsyncFnMut() -> bool) {
    let waiting = async {
        while !holds().await {
            tokio::time::sleep(std::time::Duration::from_millis(5)).await;
        }
    };
    tokio::time::timeout(std::time::Duration::from_secs(20), waiting).await.expect("the condition to hold in time");
}
