//! The Redis backend and clusters of nodes, on real servers with real failures.

mod apps;
mod bounds;
mod calls;
mod connections;
mod faults;
mod nodes;
mod presence;
mod tls;
