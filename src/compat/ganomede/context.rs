//! [`Ganomede`]: the state of the handlers.

use std::sync::Arc;

use axum::body::Bytes;

use super::{config::Config, indices::Indices, wire};
use crate::{error::Result, node::Node};

pub(super) struct Ganomede {
    pub(super) node: Arc<Node>,
    pub(super) config: Config,
    /// The response of `/about`.
    pub(super) about: Bytes,
    pub(super) indices: Indices,
}

impl Ganomede {
    pub(super) fn new(node: &Arc<Node>) -> Result<Self> {
        Ok(Ganomede {
            config: node.config.compat.get(),
            about: wire::about(),
            indices: Indices::new(node.bus.clone(), node.config.limits.event)?,
            node: node.clone(),
        })
    }
}
