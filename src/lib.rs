//! **weir** is one binary that services, browsers and batch jobs all connect to. Services call each other through it
//! over WebSocket, browsers stream from it over SSE, batch consumers read from it by durable long-poll; all of them
//! see the same channels, because all of them are cursors over one bus.
#![forbid(unsafe_code)]

pub mod app;
pub mod auth;
pub mod backend;
pub mod bus;
pub mod channel;
pub mod cli;
pub mod cluster;
pub mod compat;
pub mod config;
pub mod duration;
pub mod error;
pub mod event;
pub mod http;
pub mod json;
pub mod metrics;
pub mod net;
pub mod node;
pub mod pattern;
pub mod position;
pub mod presence;
pub mod rpc;
pub mod sessions;
pub mod telemetry;
pub mod terminal;
pub mod token;
pub mod transport;
