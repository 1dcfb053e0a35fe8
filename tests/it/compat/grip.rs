//! The GRIP proxy between clients and origins whose every byte the test controls.

pub mod hold;
mod link;
mod origin;
mod proxy;
mod publish;

use std::net::SocketAddr;

use serde_json::{Value, json};
use weir::compat::grip::{self, GripRoute};

use crate::support::{Request, Response, Starter, Weir, eventually, weir};

pub use origin::Origin;

/// A proxy with one route.
pub async fn before(origin: &Origin) -> Grip {
    behind(weir(), vec![route("/", origin)]).await
}

/// A proxy with these routes.
pub async fn behind(starter: Starter, routes: Vec<GripRoute>) -> Grip {
    let starter = starter.with(|config| {
        config.compat.enable.push("grip");
        let grip = config.compat.get_mut::<grip::Config>().unwrap();
        let free = Some(SocketAddr::from(([127, 0, 0, 1], 0)));
        (grip.listen, grip.publish_listen, grip.routes) = (free, free, routes);
    });
    let weir = starter.await;
    let [_, proxy, publish] = weir.addresses[..] else { panic!("{:?}", weir.addresses) };
    Grip { weir, proxy, publish }
}

pub fn route(path: &str, origin: &Origin) -> GripRoute {
    GripRoute { path: path.into(), origin: format!("http://{}", origin.address), ..GripRoute::default() }
}

/// A node with its two GRIP listeners.
pub struct Grip {
    pub weir: Weir,
    pub proxy: SocketAddr,
    pub publish: SocketAddr,
}

impl Grip {
    /// A request to the proxy.
    pub fn request(&self, method: &'static str, path: &str) -> Request {
        Request::new(self.proxy, method, path)
    }

    pub async fn publish_raw(&self, body: impl Into<String>) -> Response {
        Request::new(self.publish, "POST", "/publish/").body(body.into()).await
    }

    /// Publishes one item.
    pub async fn publish(&self, channel: &str, item: Value) {
        let mut item = item;
        item["channel"] = json!(channel);
        let reply = self.publish_raw(json!({ "items": [item] }).to_string()).await;
        assert_eq!((reply.status, reply.text()), (200, "Published\n"));
    }

    /// Publishes text to held streams.
    pub async fn stream(&self, channel: &str, content: &str) {
        self.publish(channel, json!({ "formats": { "http-stream": { "content": content } } })).await;
    }

    /// Waits until a channel has `count` readers.
    pub async fn readers(&self, channel: &str, count: u64) {
        eventually(&format!("{channel} has {count} readers"), async || {
            let info = self.weir.get(format!("/v1/channels?channel={channel}")).await.expect(200).json();
            info["readers"] == count
        })
        .await;
    }

    pub fn metric(&self, series: &str) -> i64 {
        self.weir.metric(series)
    }
}
