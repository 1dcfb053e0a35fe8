//! The client: commands, scripts and subscriptions on one server, on the master that Sentinel names, or on a Redis
//! Cluster.
//!
//! Commands, values and typed replies come from the `redis` crate, but not the parser, which costs too much there. The
//! rest is what its connections do not promise: whether a lost command ever left this process, bounded queues, the order of commands of many callers, and
//! connections and subscriptions that are opened again for as long as they are wanted.

mod connection;
mod crate_client;
mod error_reply;
mod majority;
mod pipeline;
mod pubsub;
mod reconnect;
mod resp;
mod script;
mod sentinel;
mod slots;
mod tls;
mod topology;
mod url;

#[cfg(test)]
pub(crate) use self::slots::slot;
pub use self::{
    connection::RedisConnection,
    pipeline::CommandError,
    pubsub::{PubSub, PubSubHandler},
    script::Script,
    topology::{CommandResult, OnLostReply, Topology},
    url::RedisUrl,
};
pub(crate) use self::{
    crate_client::crate_client,
    pipeline::NoPush,
    reconnect::ReconnectingConnection,
    topology::{Deadline, deadline},
    url::{Address, TopologyKind},
};
