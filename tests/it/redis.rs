//! The Redis backend and clusters of nodes, on real servers with real failures.

mod bounds;
mod bus_node;
mod calls;
mod client;
mod faults;
mod node;
mod presence;
mod rejected_writes;
mod tls;
mod unavailable;
