//! [`EngineSettings`]: limits and timeouts of an Engine.IO server.

use std::time::Duration;

#[derive(Clone, Debug)]
pub(crate) struct EngineSettings {
    /// Between two pings.
    pub(crate) ping: Duration,
    /// For the answer to a ping.
    pub(crate) ping_timeout: Duration,
    /// For the answer to a liveness probe.
    pub(crate) probe: Duration,
    /// Bytes of a message and of a request body.
    pub(crate) max_payload: usize,
    /// Bytes that may wait for one client.
    pub(crate) queued: usize,
    /// Sessions at a time.
    pub(crate) sessions: usize,
    /// For a request body to arrive.
    pub(crate) body_time: Duration,
    /// How long a WebSocket's peer may read nothing of what waits for it.
    pub(crate) stalled: Duration,
    /// For a WebSocket to complete the upgrade from polling.
    pub(crate) upgrade: Duration,
    /// For the last packets of an ending session to be read.
    pub(crate) linger: Duration,
    /// For calls in flight, while the node drains.
    pub(crate) grace: Duration,
}
