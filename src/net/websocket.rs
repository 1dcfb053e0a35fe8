//! The WebSocket protocol (RFC 6455) on a hijacked connection.

pub mod frame;
pub mod handshake;
pub mod output;
pub mod reader;
