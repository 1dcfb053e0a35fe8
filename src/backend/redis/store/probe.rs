//! [`Probes`]: whether the bus works, tested the way an event goes: through the append script, and back through the
//! subscription. A connection may be alive and lead to a server that no other node writes to.

use std::{
    collections::BTreeMap,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering::SeqCst},
    },
    time::Duration,
};

use bytes::Bytes;
use parking_lot::Mutex;
use tokio::time::Instant;

use super::{
    context::LogContext,
    write::{LogWriter, PublishBatch},
};
use crate::{
    backend::redis::client::{Address, PubSub, deadline},
    bus::Retention,
    event::{Draft, DraftParts},
};

/// A connection for events is replaced if a probe was placed and did not come back within this.
const ECHO: Duration = Duration::from_secs(2);
/// Without an echo for this long, a server does not count as working.
const DEAD: Duration = Duration::from_secs(10);
/// The retention of a probe's channel.
const KEEP: Retention = Retention { count: 1, age: Duration::from_secs(60), bytes: 1000 };

pub(super) struct Probes {
    context: Arc<LogContext>,
    writer: Arc<LogWriter>,
    probes: Mutex<BTreeMap<Address, ServerProbe>>,
    /// Random: tells the probes of this node from those of others.
    node: String,
}

struct ServerProbe {
    name: String,
    events: Bytes,
    echo: Option<Instant>,
    /// When it was placed, until it comes back.
    placed: Option<Instant>,
    busy: Arc<AtomicBool>,
}

impl Probes {
    pub(super) fn new(context: Arc<LogContext>, writer: Arc<LogWriter>) -> Arc<Self> {
        let node = format!("{:016x}", fastrand::u64(..));
        Arc::new(Probes { context, writer, probes: Mutex::default(), node })
    }

    /// Checks the last probe of each server, and publishes another.
    pub(super) fn tick(self: &Arc<Self>, pubsub: &Arc<PubSub>) {
        let topology = &self.context.topology;
        let servers = topology.slot_owners();
        let mut probes = self.probes.lock();
        probes.retain(|server, probe| {
            let stays = servers.contains(server);
            if !stays {
                pubsub.unsubscribe(&probe.events);
            }
            stays
        });
        for server in &servers {
            let probe = probes.entry(server.clone()).or_insert_with(|| self.probe_of(server));
            if topology.owner_address(&probe.events).is_none_or(|(at, _)| at != *server) {
                pubsub.unsubscribe(&probe.events);
                *probe = self.probe_of(server);
            }
            pubsub.subscribe(probe.events.clone());
            if probe.placed.is_some_and(|placed| placed.elapsed() > ECHO) {
                tracing::warn!(%server, "Redis took a probe and did not send it back: reconnecting");
                pubsub.reconnect(&probe.events);
                probe.placed = None;
            }
            if probe.placed.is_none() && pubsub.is_subscribed(&probe.events) && !probe.busy.swap(true, SeqCst) {
                let (this, server, name, busy) = (self.clone(), server.clone(), probe.name.clone(), probe.busy.clone());
                tokio::spawn(async move {
                    this.publish(&server, &name).await;
                    busy.store(false, SeqCst);
                });
            }
        }
        let working = probes.values().filter(|probe| probe.works()).count();
        topology.metrics.redis_echoing.set(working as i64);
    }

    async fn publish(&self, server: &Address, name: &str) {
        let begun = Instant::now();
        let Ok(draft) = Draft::new(DraftParts::default(), 1000) else { return };
        let batch = PublishBatch { subject: "".into(), drafts: vec![draft] };
        let keys = self.context.keys.tagged(name);
        let placed = self.writer.append(&keys, &KEEP, &[&batch], deadline()).await.is_ok();
        let mut probes = self.probes.lock();
        let Some(probe) = probes.get_mut(server) else { return };
        // A probe that was not placed proves nothing about the subscription; and it may have come back already.
        if placed && probe.echo.is_none_or(|echo| echo < begun) {
            probe.placed = Some(begun);
        }
    }

    /// A message on a channel without readers here, which may be a probe's.
    pub(super) fn on_message(&self, events: &[u8]) {
        let mut probes = self.probes.lock();
        if let Some(probe) = probes.values_mut().find(|probe| probe.events == *events) {
            probe.echo = Some(Instant::now());
            probe.placed = None;
        }
    }

    /// Whether at least half of the servers have sent a probe back lately.
    pub(super) fn is_ready(&self) -> bool {
        let probes = self.probes.lock();
        let working = probes.values().filter(|probe| probe.works()).count();
        working > 0 && 2 * working >= probes.len()
    }

    /// A probe whose name is in a slot that the server owns, and that no client can use.
    fn probe_of(&self, server: &Address) -> ServerProbe {
        let LogContext { topology, keys, .. } = &*self.context;
        let mut n = 0;
        loop {
            let name = format!("\u{1}probe:{}:{n}", self.node);
            let events = keys.tagged(&name).events();
            n += 1;
            // A server that loses its slots at this very moment leaves the list of servers as well.
            if topology.owner_address(&events).is_some_and(|(at, _)| at == *server) || n > 1 << 16 {
                return ServerProbe { name, events, echo: None, placed: None, busy: Arc::default() };
            }
        }
    }
}

impl ServerProbe {
    fn works(&self) -> bool {
        self.echo.is_some_and(|echo| echo.elapsed() < DEAD)
    }
}
