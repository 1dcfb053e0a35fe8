//! [`ReconnectingConnection`]: a connection to one server that is opened again whenever it breaks.

use std::{sync::Arc, time::Duration};

use tokio::{
    sync::watch,
    task::JoinHandle,
    time::{Instant, sleep, timeout_at},
};

use super::{
    connection::RedisConnection,
    pipeline::PushHandler,
    sentinel,
    url::{Address, RedisUrl, TopologyKind},
};
use crate::metrics::{MetricLabel as _, Metrics, RedisConnectionKind};

/// The back-off after the second failure in a row; it doubles up to...
const FIRST_WAIT: Duration = Duration::from_millis(50);
/// ...this, each time give or take a third, so that many nodes do not reconnect at the same moment.
const LONGEST_WAIT: Duration = Duration::from_secs(2);

/// The server to connect to.
#[derive(Clone, Debug)]
pub(crate) enum ConnectTo {
    Address(Address),
    /// The master, which Sentinel is asked for before each attempt.
    Master,
}

/// Makes a handler for each connection, so that a late push of the last one does not pass for the next one's. The
/// argument is the connection's number.
pub(crate) type MakePushHandler = Arc<dyn Fn(u64) -> Arc<dyn PushHandler> + Send + Sync>;

/// Reconnects for as long as it lives; dropped, it closes the connection.
pub(crate) struct ReconnectingConnection {
    state: watch::Receiver<ReconnectState>,
    task: JoinHandle<()>,
}

#[derive(Clone)]
pub(crate) enum ReconnectState {
    Up(Arc<RedisConnection>),
    /// With the reason, a sentence.
    Down(Arc<str>),
}

impl ReconnectingConnection {
    pub(super) fn start(
        url: Arc<RedisUrl>,
        to: ConnectTo,
        kind: RedisConnectionKind,
        handlers: MakePushHandler,
        metrics: Arc<Metrics>,
    ) -> Self {
        let (tx, state) = watch::channel(ReconnectState::Down("not connected yet".into()));
        let task = tokio::spawn(reconnect(url, to, kind, handlers, metrics, tx));
        ReconnectingConnection { state, task }
    }

    /// The current connection, if it is up.
    pub(crate) fn get(&self) -> Option<Arc<RedisConnection>> {
        match &*self.state.borrow() {
            ReconnectState::Up(connection) if !connection.is_closed() => Some(connection.clone()),
            _ => None,
        }
    }

    /// Waits for a connection until `deadline`. The error is why there is none.
    pub(crate) async fn ready(&self, deadline: Instant) -> Result<Arc<RedisConnection>, Arc<str>> {
        let mut state = self.state.clone();
        let up = state.wait_for(|state| matches!(state, ReconnectState::Up(connection) if !connection.is_closed()));
        if let Ok(Ok(state)) = timeout_at(deadline, up).await
            && let ReconnectState::Up(connection) = &*state
        {
            return Ok(connection.clone());
        }
        Err(match &*self.state.borrow() {
            ReconnectState::Up(_) => "the connection to Redis broke".into(),
            ReconnectState::Down(reason) => reason.clone(),
        })
    }

    pub(super) fn changes(&self) -> watch::Receiver<ReconnectState> {
        self.state.clone()
    }

    /// Ends the current connection, so that another is opened.
    pub(crate) fn replace(&self) {
        if let ReconnectState::Up(connection) = &*self.state.borrow() {
            connection.close();
        }
    }
}

impl Drop for ReconnectingConnection {
    fn drop(&mut self) {
        self.task.abort();
        // Others may hold the connection for a moment; without this their commands would still wait for replies.
        self.replace();
    }
}

async fn reconnect(
    url: Arc<RedisUrl>,
    to: ConnectTo,
    kind: RedisConnectionKind,
    handlers: MakePushHandler,
    metrics: Arc<Metrics>,
    state: watch::Sender<ReconnectState>,
) {
    let name = format!("weir-{}", kind.value());
    let mut wait = Duration::ZERO;
    let mut logged: Option<String> = None;
    let mut first = true;
    loop {
        let opened = match locate(&url, &to).await {
            Ok(address) => RedisConnection::open(&url, &address, &name, &*handlers).await,
            Err(reason) => Err(reason),
        };
        match opened {
            Ok(connection) => {
                let connection = Arc::new(connection);
                if !first {
                    metrics.redis_reconnects[kind].add(1);
                    tracing::info!(lane = kind.value(), server = %connection.address, "connected to Redis again");
                }
                (first, logged) = (false, None);
                let since = Instant::now();
                if state.send(ReconnectState::Up(connection.clone())).is_err() {
                    return;
                }
                connection.closed().await;
                tracing::warn!(lane = kind.value(), server = %connection.address, "the connection to Redis is lost");
                let _ = state.send(ReconnectState::Down("the connection to Redis is lost".into()));
                // The next attempt is immediate, unless connections never last.
                if since.elapsed() > LONGEST_WAIT {
                    wait = Duration::ZERO;
                }
            }
            Err(reason) => {
                // Each reason is logged once, not every two seconds.
                if logged.as_ref() != Some(&reason) {
                    tracing::warn!(lane = kind.value(), %reason, "cannot connect to Redis");
                    logged = Some(reason.clone());
                }
                let _ = state.send(ReconnectState::Down(reason.into()));
            }
        }
        sleep(wait.mul_f64(0.67 + 0.66 * fastrand::f64())).await;
        wait = (wait * 2).clamp(FIRST_WAIT, LONGEST_WAIT * 3 / 4);
    }
}

async fn locate(url: &RedisUrl, to: &ConnectTo) -> Result<Address, String> {
    match (to, &url.kind) {
        (ConnectTo::Address(address), _) | (ConnectTo::Master, TopologyKind::Standalone(address)) => {
            Ok(address.clone())
        }
        (ConnectTo::Master, TopologyKind::Sentinel { .. }) => sentinel::master(url).await,
        (ConnectTo::Master, TopologyKind::Cluster(_)) => Err("a Redis Cluster has no single master".into()),
    }
}
