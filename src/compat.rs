//! Adapters: each serves the protocol of another system on the bus and the services of weir, for unmodified clients.
//!
//! An adapter owns some paths of the main listeners, and can bring listeners of its own. It answers by the rules of its
//! original: its own errors, its own CORS. Its settings are the section `compat.NAME`. A disabled adapter uses no
//! resources.
//!
//! To remove an adapter, delete its `pub mod` line, its line in [`ADAPTERS`], its file and its folder.

mod adapter;
mod engineio;
mod form;
mod publish;
mod socketio;

pub mod event_stream;
pub mod ganomede;
pub mod grip;
pub mod microstream;
pub mod node_sse;

use std::sync::Arc;

use adapter::AdapterEntry;
pub(crate) use adapter::{Adapter, Importer, Listener};

use crate::{
    config::{CompatSection, Config},
    error::Result,
    node::Node,
};

/// The adapters. A path that two of them own is answered by the first.
#[rustfmt::skip] // a line each, so that one can be deleted
const ADAPTERS: &[AdapterEntry] = &[
    microstream::ADAPTER,
    ganomede::ADAPTER,
    node_sse::ADAPTER,
    event_stream::ADAPTER,
    grip::ADAPTER,
];

/// The default configuration, with the settings of all adapters.
pub fn default_config() -> Config {
    let compat = CompatSection::new(ADAPTERS.iter().map(|entry| (entry.config)()));
    Config { compat, ..Config::default() }
}

/// The names that `compat.enable` may contain.
pub(crate) fn names() -> Vec<&'static str> {
    default_config().compat.names()
}

/// The importers of all adapters.
pub(crate) fn importers() -> impl Iterator<Item = &'static Importer> {
    ADAPTERS.iter().filter_map(|entry| entry.importer.as_ref())
}

/// Builds the enabled adapters.
pub(crate) fn build(node: &Arc<Node>) -> Result<Vec<Adapter>> {
    let enabled: Vec<_> = node.config.compat.enabled().map(|config| config.name()).collect();
    let entries = ADAPTERS.iter().filter(|entry| enabled.contains(&(entry.config)().name()));
    entries.map(|entry| (entry.build)(node)).collect()
}
