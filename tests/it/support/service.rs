//! Services as clients of HTTP see them: listed, and called.

use std::net::SocketAddr;

use serde_json::Value;

use super::{MINUTE, Request, eventually_within, get_json};

/// Waits until the node lists a provider of `service`.
pub async fn listed(address: SocketAddr, service: &str) {
    eventually_within(MINUTE, &format!("{service} is listed"), async || {
        let services = get_json(address, &format!("/v1/services?prefix={service}")).await;
        !services["services"].as_array().unwrap().is_empty()
    })
    .await;
}

/// Calls method `x` of a service. Returns the status and the body.
pub async fn call(address: SocketAddr, service: &str, timeout: &str) -> (u16, Value) {
    let path = format!("/v1/services/{service}/x?timeout={timeout}");
    let response = Request::new(address, "POST", path).body("[1]").await;
    (response.status, response.json())
}
