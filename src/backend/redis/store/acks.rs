//! Waiting for replicas: `bus.redis.ack = "replicated"`. One WAIT for all publishes of a server that were answered since
//! the last one, on a lane of its own, for WAIT holds up whatever comes behind it.

use std::{
    collections::BTreeMap,
    sync::{Arc, Weak},
    time::Duration,
};

use parking_lot::Mutex;
use tokio::{
    sync::{mpsc, oneshot, watch},
    time::{Instant, timeout},
};

use super::{Inner, Redis, append::Failed};
use crate::backend::redis::client::{Address, Command, CommandError, NoPush, ReconnectingConnection, RedisConnection};
use crate::metrics::RedisConnectionKind;

/// How long replicas may take.
const WAIT: Duration = Duration::from_secs(2);
const CONNECT: Duration = Duration::from_secs(2);
/// How long Redis keeps the key that is written so that there is something to wait for.
const MARK: Duration = Duration::from_secs(10);

/// When a publish is answered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ack {
    /// When the master has it.
    Stored,
    /// When a replica has it as well.
    Replicated,
}

/// A publish that waits: which server placed it, and whom to tell.
type Waiting = (Box<str>, oneshot::Sender<bool>);

#[derive(Default)]
pub(super) struct Acks(Mutex<BTreeMap<Address, mpsc::UnboundedSender<Waiting>>>);

/// What waits on one server.
struct Waits {
    inner: Weak<Inner>,
    place: Address,
    lane: ReconnectingConnection,
    /// A key in a slot of this server, under the prefix.
    mark: String,
}

impl Inner {
    /// Returns when a replica has what was placed over `connection`. If that cannot be known, the publish is unconfirmed.
    pub(super) async fn replicated(self: &Arc<Self>, key: &[u8], connection: &RedisConnection) -> Result<(), Failed> {
        let (Some(acks), Some((place, target))) = (&self.acks, self.topology.place_of(key)) else {
            return Err(Failed::CommandError(CommandError::Unconfirmed));
        };
        let (tx, rx) = oneshot::channel();
        let waiting = (connection.server.generation.clone(), tx);
        {
            let mut lanes = acks.0.lock();
            // No bound is needed: each of them is a publish in flight, and those have one.
            let lane = lanes.entry(place).or_insert_with_key(|place| {
                let (tx, rx) = mpsc::unbounded_channel();
                let lane = self.topology.lane(&target, RedisConnectionKind::Acks, Arc::new(|_| Arc::new(NoPush)));
                let mark = self.mark_at(place);
                let waits = Waits { inner: Arc::downgrade(self), place: place.clone(), lane, mark };
                tokio::spawn(waits.run(rx, self.topology.changes()));
                tx
            });
            if lane.send(waiting).is_err() {
                return Err(Failed::CommandError(CommandError::Unconfirmed));
            }
        }
        match rx.await {
            Ok(true) => Ok(()),
            _ => Err(Failed::CommandError(CommandError::Unconfirmed)),
        }
    }

    /// A key that the server at `place` has the slot of, if it has any.
    fn mark_at(&self, place: &Address) -> String {
        let here = |mark: &String| self.topology.place_of(mark.as_bytes()).is_some_and(|(at, _)| at == *place);
        (0..1 << 16).map(|n| self.keys.mark(n)).find(here).unwrap_or_else(|| self.keys.mark(0))
    }
}

impl Redis {
    /// Servers whose replicas are waited for: for tests that count what is left.
    pub fn waits(&self) -> usize {
        self.0.acks.as_ref().map_or(0, |acks| acks.0.lock().len())
    }
}

impl Waits {
    async fn run(mut self, mut waiting: mpsc::UnboundedReceiver<Waiting>, mut changes: watch::Receiver<u64>) {
        let (mut batch, mut stays) = (Vec::new(), true);
        // They may have changed since somebody was sent here.
        changes.mark_changed();
        loop {
            tokio::select! {
                count = waiting.recv_many(&mut batch, 10_000) => match count {
                    0 => return,
                    _ => self.answer(&mut batch).await,
                },
                Ok(()) = changes.changed(), if stays => stays = self.stays(),
            }
        }
    }

    /// Slots have moved. A server that has none is given up: this ends with the last that waits.
    fn stays(&mut self) -> bool {
        let Some(inner) = self.inner.upgrade() else { return false };
        let stays = inner.topology.places().contains(&self.place);
        if !stays && let Some(acks) = &inner.acks {
            acks.0.lock().remove(&self.place);
        } else if inner.topology.place_of(self.mark.as_bytes()).is_none_or(|(at, _)| at != self.place) {
            self.mark = inner.mark_at(&self.place);
        }
        stays
    }

    async fn answer(&self, batch: &mut Vec<Waiting>) {
        let connection = self.lane.ready(Instant::now() + CONNECT).await.ok();
        let done = match &connection {
            Some(connection) => self.all_have_it(connection).await,
            None => false,
        };
        let mut elsewhere = false;
        for (server, tell) in batch.drain(..) {
            // What the replicas of another have does not matter.
            let same = connection.as_ref().is_some_and(|connection| connection.server.generation == server);
            elsewhere |= !same;
            let _ = tell.send(done && same);
        }
        if elsewhere {
            self.lane.replace();
        }
    }

    /// Whether a replica has everything that was written before.
    async fn all_have_it(&self, connection: &RedisConnection) -> bool {
        // WAIT waits for what its own connection wrote last, and for nothing if it wrote nothing. PUBLISH would not do: in
        // a Cluster it goes to every server, and past the replicas.
        let mark = connection.ask(&Command::new("SET").arg(&self.mark).arg("").arg("PX").int(MARK.as_millis() as u64));
        let ms = WAIT.as_millis() as u64;
        let wait = connection.ask(&Command::new("WAIT").int(1).int(ms));
        let answers = async { (mark.await.is_ok(), wait.await.ok().and_then(|count| count.int())) };
        matches!(timeout(WAIT * 2, answers).await, Ok((true, Some(1..))))
    }
}
