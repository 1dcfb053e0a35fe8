//! [`Node`]: the parts of one running weir that handlers and adapters share.

use std::sync::Arc;

use tokio_util::{sync::CancellationToken, task::TaskTracker};

use crate::{
    auth::Authenticator,
    bus::Bus,
    cluster::Cluster,
    config::Config,
    metrics::Metrics,
    net::timer::TimerWheel,
    presence::Presence,
    rpc::Hub,
    sessions::{ConnectionRegistry, cluster::ClusterConnections},
};

/// One running weir. Built by `app`, shared by every transport, HTTP handler and adapter.
pub struct Node {
    pub(crate) auth: Authenticator,
    pub bus: Arc<Bus>,
    pub hub: Arc<Hub>,
    pub presence: Arc<Presence>,
    /// The connections of this node.
    pub sessions: Arc<ConnectionRegistry>,
    /// The connections of all nodes.
    pub cluster_connections: Arc<ClusterConnections>,
    pub cluster: Arc<dyn Cluster>,
    pub timers: Arc<TimerWheel>,
    pub metrics: Arc<Metrics>,
    pub config: Arc<Config>,
    /// Cancelled when this node begins to shut down: waiting reads answer, streams and sockets end.
    pub draining: CancellationToken,
    /// Work that was acknowledged before it is done: a shutdown waits for it.
    pub background: TaskTracker,
}
