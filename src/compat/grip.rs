//! The adapter for GRIP, in Pushpin's place: a reverse proxy in front of HTTP servers (origins).
//!
//! An origin responds with instructions in its headers, and weir holds the response open: as a stream to which published
//! items are appended, or until an item is published as the response. Items are events of the bus: native clients can read
//! them, and their events reach the held streams.
//!
//! The proxy has a listener of its own, because all its paths belong to the origins. Publishing has another.

mod config;
mod filter;
mod forward;
mod frame;
mod headers;
mod instructions;
mod item;
mod item_event;
mod members;
mod next_link;
mod origin_client;
mod patch;
mod proxy;
mod publish;
mod reliable_stream;
mod response;
mod response_hold;
mod route;
mod sequence;
mod stream_hold;
mod stream_parts;
mod token;
mod tunnel;
mod waiting_items;

use std::sync::Arc;

pub use self::config::{Config, GripRoute};
use self::{forward::forward, proxy::GripProxy};
use super::adapter::{Adapter, AdapterEntry, Listener, handler};
use crate::{error::Result, node::Node};

pub(super) const ADAPTER: AdapterEntry = AdapterEntry { config: || Box::<Config>::default(), build, importer: None };

/// Publishing on the main listeners, and two listeners: the proxy, and one for publishing.
fn build(node: &Arc<Node>) -> Result<Adapter> {
    let proxy = Arc::new(GripProxy::new(node)?);
    let proxy_listener = proxy.config.listen.map(|address| Listener {
        address,
        purpose: "GRIP proxy",
        if_in_use: ": is Pushpin still running? compat.grip.listen sets another address",
        tcp_keepalive: true,
        is_proxy: true,
        handler: handler(&proxy, forward),
    });
    let publish_listener = proxy.config.publish_listen.map(|address| Listener {
        address,
        purpose: "GRIP publish",
        if_in_use: ": is Pushpin still running? compat.grip.publish_listen sets another address",
        tcp_keepalive: false,
        is_proxy: false,
        handler: handler(&proxy, |proxy, request| async move { proxy.publish(request).await }),
    });
    let owns = |path: &str| matches!(path, "/grip/publish" | "/grip/publish/");
    let router = axum::Router::new().fallback(async move |request| proxy.publish(request).await);
    let listeners = proxy_listener.into_iter().chain(publish_listener).collect();
    Ok(Adapter::new(owns, router).without_authentication().with_listeners(listeners))
}
