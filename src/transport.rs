//! Ways in and out. A transport decodes, calls the bus or the hub, and encodes; transports do not import each other.

pub mod present;
pub mod query;
pub mod reading;
pub mod sse;
pub mod subscription_stream;
pub mod ws;
