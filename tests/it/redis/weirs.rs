//! Whole nodes of weir on one Redis: in this process, and real ones that can be killed and stopped.

use std::net::SocketAddr;

use serde_json::Value;
use weir::config::Backend;

use super::servers::until;
use crate::{
    process::Process,
    support::{Request, Weir, weir},
};

pub async fn node(url: &str) -> Weir {
    weir()
        .with(|config| {
            config.bus.backend = Backend::Redis;
            config.bus.redis.url = url.into();
        })
        .await
}

pub fn process(url: &str) -> (Process, SocketAddr) {
    let process = Process::start(&[("WEIR__BUS__BACKEND", "redis"), ("WEIR__BUS__REDIS__URL", url)]);
    let address = process.address.parse().unwrap();
    (process, address)
}

pub async fn get(at: SocketAddr, path: &str) -> Value {
    Request::new(at, "GET", path.to_owned()).await.expect(200).json()
}

/// Until the node there knows a provider of `service`.
pub async fn knows(at: SocketAddr, service: &str) {
    until("a node learns of a provider", async || {
        let listed = get(at, &format!("/v1/services?prefix={service}")).await;
        !listed["services"].as_array().unwrap().is_empty()
    })
    .await;
}

/// The status of a call, and what came of it.
pub async fn call(at: SocketAddr, service: &str, timeout: &str) -> (u16, Value) {
    let path = format!("/v1/services/{service}/x?timeout={timeout}");
    let reply = Request::new(at, "POST", path).body("[1]").await;
    (reply.status, reply.json())
}
