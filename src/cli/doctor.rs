//! `weir doctor`: examines a node as its clients use it, or a Redis as weir would use it.
//!
//! A finding is a line of JSON on standard output, and prose on standard error. Checks try what weir needs instead of
//! judging by settings, wherever they can.

mod latency;
mod node;
mod redis;
mod report;

pub(super) use self::{node::examine as node, redis::examine as redis, report::Report};
