//! Sockets and HTTP connections: accepting them, hijacking them from hyper, writing to them and timing them. Nothing in
//! this module knows a route, the bus or the hub.

pub(crate) mod body;
pub mod chunk;
pub(crate) mod content_coding;
pub mod hijack;
pub(crate) mod linger;
pub mod server;
pub(crate) mod stream;
pub mod timer;
pub(crate) mod websocket;
pub(crate) mod write_queue;
