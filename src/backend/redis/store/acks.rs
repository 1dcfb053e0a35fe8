//! [`ReplicaAcks`]: waiting for replicas, for `bus.redis.ack = "replicated"`. One WAIT serves all publishes of a server
//! that were placed since the last one, on a connection of its own, for WAIT blocks the commands behind it.

use std::{
    collections::BTreeMap,
    sync::{Arc, Weak},
    time::Duration,
};

use parking_lot::Mutex;
use redis::cmd;
use tokio::{
    sync::{mpsc, oneshot, watch},
    time::{Instant, timeout},
};

use super::context::LogContext;
use crate::{
    backend::redis::client::{Address, CommandError, NoPush, ReconnectingConnection, RedisConnection},
    metrics::RedisConnectionKind,
};

/// How long replicas may take.
const WAIT: Duration = Duration::from_secs(2);
const CONNECT: Duration = Duration::from_secs(2);
/// How long Redis keeps the key that is written so that WAIT has a write to wait for.
const MARK: Duration = Duration::from_secs(10);

/// A publish that waits: the generation of the server that placed it, and where the result goes.
type WaitingAck = (Box<str>, oneshot::Sender<bool>);

pub(super) struct ReplicaAcks {
    context: Arc<LogContext>,
    waiters: Mutex<BTreeMap<Address, mpsc::UnboundedSender<WaitingAck>>>,
}

/// Waits for the replicas of one server.
struct ReplicaWaiter {
    acks: Weak<ReplicaAcks>,
    server: Address,
    reconnecting: ReconnectingConnection,
    /// A key in a slot of this server.
    mark: String,
}

impl ReplicaAcks {
    pub(super) fn new(context: Arc<LogContext>) -> Arc<Self> {
        Arc::new(ReplicaAcks { context, waiters: Mutex::default() })
    }

    /// Completes when a replica has what was placed over `connection`. If that cannot be known, the error is
    /// [`CommandError::Unconfirmed`].
    pub(super) async fn replicated(
        self: &Arc<Self>,
        key: &[u8],
        connection: &RedisConnection,
    ) -> Result<(), CommandError> {
        let topology = &self.context.topology;
        let (server, connect_to) = topology.owner_address(key).ok_or(CommandError::Unconfirmed)?;
        let (tx, rx) = oneshot::channel();
        {
            let mut waiters = self.waiters.lock();
            // Without a bound: each message is a publish in flight, and those are bounded.
            let waiter = waiters.entry(server).or_insert_with_key(|server| {
                let (tx, rx) = mpsc::unbounded_channel();
                let reconnecting =
                    topology.connect(&connect_to, RedisConnectionKind::Acks, Arc::new(|_| Arc::new(NoPush)));
                let (server, mark) = (server.clone(), self.mark_at(server));
                let waiter = ReplicaWaiter { acks: Arc::downgrade(self), server, reconnecting, mark };
                tokio::spawn(waiter.run(rx, topology.changes()));
                tx
            });
            let waiting = (connection.server.generation.clone(), tx);
            waiter.send(waiting).map_err(|_| CommandError::Unconfirmed)?;
        }
        match rx.await {
            Ok(true) => Ok(()),
            _ => Err(CommandError::Unconfirmed),
        }
    }

    /// A key in a slot that `server` owns, if it owns any.
    fn mark_at(&self, server: &Address) -> String {
        let LogContext { topology, keys, .. } = &*self.context;
        let owned = |mark: &String| topology.owner_address(mark.as_bytes()).is_some_and(|(at, _)| at == *server);
        (0..1 << 16).map(|n| keys.mark(n)).find(owned).unwrap_or_else(|| keys.mark(0))
    }

    /// The number of servers whose replicas are waited for.
    pub(super) fn len(&self) -> usize {
        self.waiters.lock().len()
    }
}

impl ReplicaWaiter {
    async fn run(mut self, mut waiting: mpsc::UnboundedReceiver<WaitingAck>, mut changes: watch::Receiver<u64>) {
        let (mut batch, mut owns_slots) = (Vec::new(), true);
        // Slots may have moved since the first publish was sent here.
        changes.mark_changed();
        loop {
            tokio::select! {
                count = waiting.recv_many(&mut batch, 10_000) => match count {
                    0 => return,
                    _ => self.acknowledge(&mut batch).await,
                },
                Ok(()) = changes.changed(), if owns_slots => owns_slots = self.on_moved(),
            }
        }
    }

    /// Slots have moved. False if the server owns none any more: then this ends with the last publish that waits.
    fn on_moved(&mut self) -> bool {
        let Some(acks) = self.acks.upgrade() else { return false };
        let topology = &acks.context.topology;
        let owns_slots = topology.slot_owners().contains(&self.server);
        if !owns_slots {
            acks.waiters.lock().remove(&self.server);
        } else if topology.owner_address(self.mark.as_bytes()).is_none_or(|(at, _)| at != self.server) {
            self.mark = acks.mark_at(&self.server);
        }
        owns_slots
    }

    async fn acknowledge(&self, batch: &mut Vec<WaitingAck>) {
        let connection = self.reconnecting.ready(Instant::now() + CONNECT).await.ok();
        let replicated = match &connection {
            Some(connection) => self.wait(connection).await,
            None => false,
        };
        let mut elsewhere = false;
        for (generation, result) in batch.drain(..) {
            // The replicas of another server prove nothing.
            let same = connection.as_ref().is_some_and(|connection| connection.server.generation == generation);
            elsewhere |= !same;
            let _ = result.send(replicated && same);
        }
        if elsewhere {
            self.reconnecting.replace();
        }
    }

    /// Whether a replica has everything that was written before.
    async fn wait(&self, connection: &RedisConnection) -> bool {
        // WAIT waits for the last write of its own connection, and returns at once without one. PUBLISH would not do:
        // in a Cluster it is sent to every server, and not to the replicas.
        let mark = connection.ask(cmd("SET").arg(&self.mark).arg("").arg("PX").arg(MARK.as_millis() as u64));
        let wait = connection.ask(cmd("WAIT").arg(1).arg(WAIT.as_millis() as u64));
        let replies = async { (mark.await.is_ok(), wait.parse::<u64>().await) };
        matches!(timeout(WAIT * 2, replies).await, Ok((true, Ok(1..))))
    }
}
