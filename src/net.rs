//! Sockets and HTTP connections: accepting them, taking them over from hyper, writing to them and timing them. Nothing
//! in this module knows a route, the bus or the hub.

pub mod body;
pub mod chunk;
pub mod hijack;
pub mod server;
pub mod stream;
pub mod timer;
pub mod websocket;
pub mod write_queue;
