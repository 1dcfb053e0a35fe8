//! weir on Redis: real servers, real faults.

mod apps;
mod bounds;
mod calls;
mod compat;
mod connections;
mod faults;
mod nodes;
mod presence;
// Starters offer what a deployment can do, whether or not a test asks for it yet.
#[allow(dead_code)]
pub mod proxy;
#[allow(dead_code)]
pub mod servers;
mod tls;
mod weirs;
