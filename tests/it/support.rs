//! Shared parts of the tests, one file per noun. Tests use the real application, real sockets and real Redis servers.
//!
//! ```ignore
//! let weir = weir().await;                                                // in this process, on a free port
//! let strict = weir().with(|config| config.limits.event = 100).await;     // with another setting
//! weir.post("/v1/events?channel=a", "1").await.expect(201);
//! let mut stream = weir.sse("channel=a").await;
//! let mut socket = weir.socket().await;
//! let process = Process::start(&[("WEIR__LIMITS__EVENT", "100")]);        // the binary, as a process of its own
//! let redis = RedisServer::start(&[]).await;
//! eventually("no reader is left", async || weir.bus().topics().readers() == 0).await;
//! ```

pub mod command;
pub mod event;
pub mod eventually;
pub mod http;
pub mod presence;
pub mod process;
// Servers and proxies have all operations of a deployment, used by a test or not.
#[allow(dead_code)]
pub mod proxy;
#[allow(dead_code)]
pub mod redis;
pub mod service;
pub mod socket;
pub mod sse;
pub mod start;
pub mod test_network;

pub use eventually::{MINUTE, eventually, eventually_blocking, eventually_within, in_time};
pub use http::{Client, Request, Response, get_json};
pub use presence::PresenceReplay;
pub use process::Process;
pub use redis::{RedisCluster, RedisDeployment, RedisSentinel, RedisServer};
pub use socket::Socket;
pub use sse::{EventStream, TextStream};
pub use start::{Starter, Weir, weir, weir_on};
