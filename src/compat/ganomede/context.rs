//! [`Ganomede`]: the state of the handlers.

use std::sync::Arc;

use axum::{body::Bytes, http::request::Parts};

use super::{config::Config, indices::Indices, wire};
use crate::{auth::Identity, error::Result, node::Node};

pub(super) struct Ganomede {
    pub(super) node: Arc<Node>,
    pub(super) config: Config,
    /// The client that sends the secret.
    trusted: Identity,
    /// The response of `/about`.
    pub(super) about: Bytes,
    pub(super) indices: Indices,
}

impl Ganomede {
    pub(super) fn new(node: &Arc<Node>) -> Result<Self> {
        let config: Config = node.config.compat.get();
        Ok(Ganomede {
            trusted: node.auth.with_roles("compat:ganomede", &config.roles, false),
            config,
            about: wire::about(),
            indices: Indices::new(node.bus.clone(), node.config.limits.event)?,
            node: node.clone(),
        })
    }

    /// The client of a request: the secret is a credential, as are those of weir.
    pub(super) fn identity(&self, head: &Parts, knows_secret: bool) -> Identity {
        let identity = Identity::of(&head.extensions);
        if knows_secret && !identity.is_read_only() { self.trusted.clone() } else { identity }
    }
}
