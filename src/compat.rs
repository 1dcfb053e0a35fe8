//! Adapters: somebody else's wire, translated to the same few calls (publish, read, subscribe, provide, call). Each can
//! be deleted without touching the core, and costs nothing while it is off.
//!
//! An adapter owns some paths of the listeners for clients and answers them by its original's rules: its own errors,
//! its own CORS. weir's own paths are not among them, but for the page at `/`.

mod engineio;
mod event_stream;
mod form;
pub mod ganomede;
pub mod grip;
mod js;
mod microstream;
pub mod node_sse;
mod socketio;

use std::sync::Arc;

use axum::{
    Router,
    body::Body,
    http::{Request, Response},
};
use tower::ServiceExt as _;

use self::grip::Grip;
use crate::{
    auth::Identity, bus::Placed, channel::Channel, config::Adapter as Name, error::Result, event::Draft,
    metrics::Transport, node::Node,
};

/// Those that are on.
pub struct Compat {
    adapters: Vec<Adapter>,
    /// It has listeners of its own besides.
    pub grip: Option<Arc<Grip>>,
}

/// One foreign protocol on the listeners for clients.
pub struct Adapter {
    /// Whether a path is this adapter's.
    owns: Box<dyn Fn(&str) -> bool + Send + Sync>,
    router: Router,
    /// Whose pages may read what is weir's to say (`cors.origins`), and not the original's.
    pub our_cors: bool,
}

impl Compat {
    /// The adapters of `compat.enable`, and the routes of `compat.sse`.
    pub fn new(node: &Arc<Node>) -> Result<Self> {
        let mut compat = Compat { adapters: Vec::new(), grip: None };
        for name in &node.config.compat.enable {
            match name {
                Name::Ganomede => compat.adapters.push(ganomede::adapter(node)?),
                Name::NodeSse => compat.adapters.push(node_sse::adapter(node)),
                Name::Grip => {
                    let grip = Arc::new(Grip::new(node)?);
                    compat.adapters.push(grip::adapter(&grip));
                    compat.grip = Some(grip);
                }
                Name::MicroStream => compat.adapters.push(microstream::adapter(node)),
            }
        }
        compat.adapters.extend(event_stream::adapter(node)?);
        Ok(compat)
    }

    /// Whose path it is, if any adapter's.
    pub fn find(&self, path: &str) -> Option<&Adapter> {
        self.adapters.iter().find(|adapter| (adapter.owns)(path))
    }
}

impl Adapter {
    /// What answers the paths that it `owns`. Every one of them gets to the router, whatever its method: 404 and 405 look as
    /// in the original.
    fn new(owns: impl Fn(&str) -> bool + Send + Sync + 'static, router: Router) -> Self {
        Adapter { owns: Box::new(owns), router, our_cors: false }
    }

    fn with_our_cors(self) -> Self {
        Adapter { our_cors: true, ..self }
    }

    pub async fn answer(&self, request: Request<Body>) -> Response<Body> {
        match self.router.clone().oneshot(request).await {
            Ok(answer) => answer,
            Err(never) => match never {},
        }
    }
}

impl Node {
    /// Publishes what a client of another system sent. It is counted as any publish over HTTP.
    async fn publish_compat(&self, events: Vec<(Channel, Draft)>) -> Result<Vec<Placed>> {
        let identity = Identity::anonymous();
        let sizes: Vec<usize> = events.iter().map(|(_, draft)| draft.size()).collect();
        for (channel, _) in &events {
            let _ = identity.may_publish(channel)?;
        }
        let (placed, failed) = match self.bus.publish(identity.subject(), events).await {
            Ok(placed) => (placed.into_iter().map(Some).collect(), None),
            Err(failed) => (failed.placed, Some(failed.error)),
        };
        for size in placed.iter().zip(sizes).filter_map(|(placed, size)| placed.is_some().then_some(size)) {
            self.metrics.published[Transport::Http].add(1);
            self.metrics.published_bytes[Transport::Http].add(size as u64);
        }
        match failed {
            None => Ok(placed.into_iter().flatten().collect()),
            Some(error) => {
                self.metrics.publish_failed(error.code());
                Err(error)
            }
        }
    }
}
