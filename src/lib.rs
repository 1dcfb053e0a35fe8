//! **weir** is one binary that services, browsers and batch jobs all connect to. Services call each other through it
//! over WebSocket, browsers stream from it over SSE, batch consumers read from it by durable long-poll; all of them
//! see the same channels, because all of them are cursors over one bus.
#![forbid(unsafe_code)]

pub mod app; // builds the parts and shuts them down
pub mod auth; // identities and permits
pub mod backend; // where events are kept: in memory or in Redis
pub mod bus; // channels, readers, positions
pub mod channel; // names of channels
pub mod cli; // client commands, `weir doctor`, `weir import`
pub mod cluster; // what nodes know of each other
pub mod compat; // adapters for clients of other systems
pub mod config; // every setting
mod duration; // durations with a unit, as `500ms`
pub mod error; // error codes, their status and their retry advice
pub mod event; // events and drafts
pub mod http; // routes, HTTP API, cross-origin rules
mod json; // JSON as text: validation and error positions
pub mod metrics; // every metric
pub mod net; // sockets and HTTP connections
pub mod node; // what handlers and adapters share
pub mod pattern; // patterns with `*`
pub mod position; // epochs, offsets and positions
pub mod presence; // members of channels
pub mod rpc; // the RPC hub: services, providers, calls
pub mod sessions; // open connections, on this node and on all
pub mod telemetry; // logging
mod terminal; // what commands write: JSON lines or sentences
pub mod token; // resume tokens of several channels
pub mod transport; // SSE, WebSocket and long-poll
