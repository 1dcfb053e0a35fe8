//! The WebSocket protocol (RFC 6455) on a hijacked connection.

pub(crate) mod frame;
pub(crate) mod handshake;
pub(crate) mod outbox;
pub(crate) mod output;
mod reader;
pub(crate) mod socket;
