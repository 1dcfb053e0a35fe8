//! The client: commands, scripts and subscriptions on one server, on the master that Sentinel names, or on a Redis Cluster.
//!
//! It promises what the `redis` crate does not: whether a lost command ever left this process, bounded queues, and
//! connections and subscriptions that are made again for as long as they are wanted.

mod connection;
mod pubsub;
mod reconnect;
mod resp;
mod script;
mod topology;
mod url;

#[cfg(test)]
pub(crate) use self::topology::slot;
pub use self::{
    connection::CommandError,
    pubsub::{PubSub, PubSubHandler},
    resp::{Command, Value},
    script::Script,
    topology::{OnLostReply, Topology},
    url::RedisUrl,
};
pub(crate) use self::{
    connection::{NoPush, RedisConnection},
    reconnect::ReconnectingConnection,
    url::{Address, TopologyKind},
};
