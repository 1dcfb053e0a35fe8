//! Ways in and out. A transport decodes, calls the bus or the hub, and encodes; transports do not import each other.

pub mod body;
pub mod carrier;
pub mod chunk;
pub mod egress;
pub mod frame;
pub mod handshake;
pub mod held;
pub mod inlet;
pub mod longpoll;
pub mod present;
pub mod query;
pub mod sse;
pub mod takeover;
pub mod wheel;
pub mod ws;
