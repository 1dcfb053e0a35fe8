//! The section `compat.microstream`.

use std::time::Duration;

use crate::config::{
    AdapterConfig, OriginalVariables,
    section::{MIB, seconds, section},
};

section! {
    /// The `microstream` adapter: a hub for MicroStream clients, which use Socket.IO at /socket.io/. The defaults equal
    /// those of MicroStream.
    Config {
        /// Names of the roles of clients without credentials, if authentication is on.
        roles: Vec<String> as Texts = Vec::new(),
        /// A client that sends no heartbeat for this long is disconnected, and its name is released.
        heartbeat_timeout: Duration as Time = seconds(15),
        /// Interval at which missing heartbeats are checked.
        sweep: Duration as Time = seconds(5),
        /// Interval of Engine.IO pings.
        ping: Duration as Time = seconds(25),
        /// Timeout for the pong.
        ping_timeout: Duration as Time = seconds(20),
        /// When a second client connects with a name in use, the first client must respond within this time to keep the
        /// name.
        probe: Duration as Time = seconds(2),
        /// Maximum size of one message. A client that sends a larger one is disconnected.
        max_payload: usize as Size = 1_000_000,
        /// Size of the write queue of one client above which it gets no more requests.
        queued: usize as Size = 16 * MIB,
        /// Maximum number of requests in flight per client.
        calls: usize as Count = 10_000,
    }
}

impl AdapterConfig for Config {
    fn name(&self) -> &'static str {
        "microstream"
    }

    fn paths(&self) -> &'static [&'static str] {
        &["/socket.io/*"]
    }

    fn read_original(&self, variables: &mut OriginalVariables<'_>) {
        variables.set_listen(None);
        variables.set_log_level();
    }
}
