//! What the bus is plugged onto. Only `app` names one of these.

pub mod memory;
pub mod redis;
