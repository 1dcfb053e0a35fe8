//! The native transports. Each decodes requests, calls the bus or the hub, and encodes results. `ws` and `sse` do not
//! import each other; what they share is in files of its own: `publishing`, `reading`, `present`, `query` and
//! `subscription_stream`.

pub(crate) mod accept;
pub(crate) mod present;
pub(crate) mod publishing;
pub(crate) mod query;
pub(crate) mod reading;
pub mod sse;
pub(crate) mod subscription_stream;
pub(crate) mod ws;
