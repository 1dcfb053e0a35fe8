//! Redis: one bus for many nodes.

pub mod address;
pub mod deployment;
pub mod feed;
pub mod lane;
pub mod link;
pub mod resp;
pub mod script;
