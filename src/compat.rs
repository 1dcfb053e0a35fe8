//! Adapters: somebody else's wire, translated to the same few calls (publish, read, subscribe, provide, call). Each can
//! be deleted without touching the core, and costs nothing while it is off.
//!
//! An adapter owns some paths of the listeners for clients and answers them by its original's rules: its own errors,
//! its own CORS. weir's own paths are not among them, but for the page at `/`.

use std::sync::Arc;

use axum::{
    Router,
    body::Body,
    http::{Request, Response},
};
use tokio_util::sync::CancellationToken;
use tower::ServiceExt as _;

use crate::{
    bus::Bus,
    config::{Adapter as Name, Config},
    metrics::Metrics,
    rpc::Hub,
    transport::wheel::Wheel,
};

/// What adapters are made of.
#[derive(Clone)]
pub struct Parts {
    pub bus: Arc<Bus>,
    pub hub: Arc<Hub>,
    pub config: Arc<Config>,
    pub metrics: Arc<Metrics>,
    pub wheel: Arc<Wheel>,
    /// Cancelled when this node begins to leave.
    pub draining: CancellationToken,
}

/// Those that are on.
pub struct Compat(Vec<Adapter>);

/// One foreign protocol on the listeners for clients.
pub struct Adapter {
    /// Whether a path is this adapter's.
    owns: fn(&str) -> bool,
    router: Router,
}

impl Compat {
    /// The adapters of `compat.enable`.
    pub fn new(parts: &Parts) -> Self {
        let adapter = |name: &Name| match name {
            Name::MicroStream | Name::Ganomede | Name::NodeSse | Name::Grip => None,
        };
        Compat(parts.config.compat.enable.iter().filter_map(adapter).collect())
    }

    /// Whose path it is, if any adapter's.
    pub fn find(&self, path: &str) -> Option<&Adapter> {
        self.0.iter().find(|adapter| (adapter.owns)(path))
    }
}

impl Adapter {
    pub async fn answer(&self, request: Request<Body>) -> Response<Body> {
        match self.router.clone().oneshot(request).await {
            Ok(answer) => answer,
            Err(never) => match never {},
        }
    }
}
