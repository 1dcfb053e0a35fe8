//! Redis: one bus for many nodes. Its Lua scripts append, store and read in one atomic step; the messages that they
//! publish fill the rings of every node with readers; a node that may have missed some reads the log once, for all of
//! its readers.

pub mod client;
mod cluster;
mod store;

pub(crate) use self::cluster::RedisCluster;
pub use self::store::{Redis, RedisSettings};
pub use crate::config::Ack;
