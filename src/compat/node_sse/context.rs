//! [`NodeSse`]: the state of the handlers, and their errors.

use std::sync::{
    Arc,
    atomic::{AtomicU64, Ordering::Relaxed},
};

use axum::http::StatusCode;
use tokio_util::task::AbortOnDropHandle;

use super::{
    config::{CLIENTS, Config},
    known_channels::KnownChannels,
    online::OnlineClients,
};
use crate::{
    channel::Channel,
    compat::adapter::AdapterClients,
    config::Backend,
    error::Error,
    event::{Draft, DraftParts},
    node::Node,
};

pub(super) struct NodeSse {
    pub(super) node: Arc<Node>,
    pub(super) access: AdapterClients,
    pub(super) online: Arc<OnlineClients>,
    pub(super) known: KnownChannels,
    /// The last number of a client, with the memory backend.
    clients: AtomicU64,
    _replication: AbortOnDropHandle<()>,
}

/// An error, by the way in which the original responds to it.
pub(super) enum NodeSseError {
    /// A sentence with the status 400.
    Text(String),
    /// An error page of Express, as for what its body parser rejects, but without the stack trace.
    Page(StatusCode, String),
    /// An error that the original does not have.
    Weir(Error),
}

impl From<Error> for NodeSseError {
    fn from(error: Error) -> Self {
        NodeSseError::Weir(error)
    }
}

impl NodeSse {
    pub(super) fn new(node: &Arc<Node>) -> Self {
        let online = Arc::<OnlineClients>::default();
        let replication = tokio::spawn(OnlineClients::replicate(online.clone(), node.cluster.clone()));
        NodeSse {
            node: node.clone(),
            access: AdapterClients::new(node, &node.config.compat.get::<Config>().roles),
            online,
            known: KnownChannels::default(),
            clients: AtomicU64::new(0),
            _replication: AbortOnDropHandle::new(replication),
        }
    }

    /// A number for a client without an id, unique among all nodes.
    pub(super) async fn next_client_number(&self) -> Result<u64, Error> {
        if self.node.config.bus.backend == Backend::Memory {
            return Ok(self.clients.fetch_add(1, Relaxed) + 1);
        }
        let draft = Draft::new(DraftParts::default(), self.node.config.limits.event)?;
        Ok(self.node.bus.publish_one("", &Channel::parse(CLIENTS)?, draft).await?.position.offset)
    }
}
