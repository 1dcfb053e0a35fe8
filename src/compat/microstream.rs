//! A MicroStream hub: Socket.IO clients call each other by service name, and services of weir, which can call them.
//!
//! The `serviceName` of a client is a service of weir and its events are methods. The service is provided exclusively,
//! because a name has one client in MicroStream. A request between two MicroStream clients is forwarded unmodified;
//! [`translate`] converts it for other clients.

mod bytes;
mod client;
mod config;
mod hub;
mod port;
mod translate;

use std::{sync::Arc, time::Duration};

use axum::{Router, body::Body, extract::State, http::Request};

pub use self::config::Config;
use self::{client::MicroStreamClient, hub::MicroStreamHub};
use super::{
    adapter::{Adapter, AdapterClients, AdapterEntry},
    engineio::{EngineServer, EngineSettings},
};
use crate::{error::Result, node::Node};

/// The path of Socket.IO.
const PATH: &str = "/socket.io/";

/// Timeout for the upgrade from polling to a WebSocket, as in the original.
const UPGRADE: Duration = Duration::from_secs(10);
const LINGER: Duration = Duration::from_secs(5);

pub(super) const ADAPTER: AdapterEntry = AdapterEntry { config: || Box::<Config>::default(), build, importer: None };

fn build(node: &Arc<Node>) -> Result<Adapter> {
    let server = serve(node);
    let answer =
        |State(server): State<Arc<EngineServer>>, request: Request<Body>| async move { server.answer(request).await };
    Ok(Adapter::new(|path| path.starts_with(PATH), Router::new().fallback(answer).with_state(server)))
}

fn serve(node: &Arc<Node>) -> Arc<EngineServer> {
    let hub = Arc::new(MicroStreamHub::new(node));
    let access = AdapterClients::new(node, &node.config.compat.get::<Config>().roles);
    EngineServer::start(
        Arc::new(settings(node)),
        node.clone(),
        Box::new(move |session, head, mut query| {
            // If there are several, the first applies.
            let names = query.take_all("serviceName");
            Box::new(MicroStreamClient::new(
                hub.clone(),
                session,
                access.identity(head),
                names.first().map(|name| &**name),
            ))
        }),
    )
}

fn settings(node: &Node) -> EngineSettings {
    let (own, config): (Config, _) = (node.config.compat.get(), &node.config);
    EngineSettings {
        ping: own.ping,
        ping_timeout: own.ping_timeout,
        probe: own.probe,
        max_payload: own.max_payload,
        queued: own.queued,
        sessions: config.limits.connections,
        body_time: config.limits.body_time,
        stalled: config.limits.stalled,
        upgrade: UPGRADE,
        linger: LINGER,
        grace: config.drain.grace,
    }
}
