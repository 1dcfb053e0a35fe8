//! weir on Redis: real servers, real faults.

mod apps;
mod bounds;
mod calls;
mod connections;
mod faults;
mod nodes;
mod presence;
mod tls;
