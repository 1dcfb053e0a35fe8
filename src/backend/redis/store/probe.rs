//! Whether the bus works, asked the way an event goes: through the script that places it, and back through the
//! subscription. A connection may be alive and lead to a server that nobody else writes to.

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

use super::{Inner, append::Publish};
use crate::backend::redis::client::Address;
use crate::{
    bus::Retention,
    event::{Draft, DraftParts},
};

/// A connection for events whose probe was placed and did not come back in this time is replaced.
const ECHO: Duration = Duration::from_secs(2);
/// Without an echo for so long, this node is not ready.
const RED: Duration = Duration::from_secs(10);
/// What is kept of a probe's channel.
const KEEP: Retention = Retention { count: 1, age: Duration::from_secs(60), bytes: 1000 };

pub(super) struct Probes {
    state: Mutex<BTreeMap<Address, Probe>>,
    /// Tells the probes of this node from others'.
    node: String,
}

struct Probe {
    name: String,
    events: Bytes,
    echo: Option<Instant>,
    /// Placed, and not come back.
    placed: Option<Instant>,
    busy: Arc<AtomicBool>,
}

impl Default for Probes {
    fn default() -> Self {
        let node = format!("{:016x}", fastrand::u64(..));
        Probes { state: Mutex::default(), node }
    }
}

impl Inner {
    /// One beat: a probe for each server, and a look what became of the last.
    pub(super) fn probe(self: &Arc<Self>) {
        let places = self.topology.places();
        let mut state = self.probes.state.lock();
        state.retain(|place, probe| {
            let stays = places.contains(place);
            if !stays {
                self.pubsub.unsubscribe(&probe.events);
            }
            stays
        });
        for place in &places {
            let probe = state.entry(place.clone()).or_insert_with(|| self.probes.of(self, place));
            if self.topology.place_of(&probe.events).is_none_or(|(at, _)| at != *place) {
                self.pubsub.unsubscribe(&probe.events);
                *probe = self.probes.of(self, place);
            }
            self.pubsub.subscribe(probe.events.clone());
            if probe.placed.is_some_and(|placed| placed.elapsed() > ECHO) {
                tracing::warn!(server = %place, "Redis took a probe and did not send it back: connecting again");
                self.pubsub.replace(&probe.events);
                probe.placed = None;
            }
            if probe.placed.is_none() && self.pubsub.is_subscribed(&probe.events) && !probe.busy.swap(true, SeqCst) {
                let (owner, place, name, busy) = (self.clone(), place.clone(), probe.name.clone(), probe.busy.clone());
                tokio::spawn(async move {
                    owner.place_probe(&place, &name).await;
                    busy.store(false, SeqCst);
                });
            }
        }
        let echoing = state.values().filter(|probe| probe.echoes()).count();
        self.topology.metrics.redis_echoing.set(echoing as i64);
    }

    async fn place_probe(&self, place: &Address, name: &str) {
        let begun = Instant::now();
        let Ok(draft) = Draft::new(DraftParts::default(), 1000) else { return };
        let publish = Publish { subject: "".into(), drafts: vec![draft] };
        let placed = self.store(&self.keys.tagged(name), &KEEP, &[&publish]).await.is_ok();
        let mut state = self.probes.state.lock();
        let Some(probe) = state.get_mut(place) else { return };
        // What was not placed proves nothing about what is heard; and it may have come back already.
        if placed && probe.echo.is_none_or(|echo| echo < begun) {
            probe.placed = Some(begun);
        }
    }

    /// A message that is of no channel that is read here.
    pub(super) fn echo(&self, events: &Bytes) {
        let mut state = self.probes.state.lock();
        if let Some(probe) = state.values_mut().find(|probe| probe.events == *events) {
            probe.echo = Some(Instant::now());
            probe.placed = None;
        }
    }

    /// Whether most servers have sent a probe back lately.
    pub(super) fn is_ready(&self) -> bool {
        let state = self.probes.state.lock();
        let echoing = state.values().filter(|probe| probe.echoes()).count();
        !state.is_empty() && 2 * echoing >= state.len().max(1) && echoing > 0
    }
}

impl Probe {
    fn echoes(&self) -> bool {
        self.echo.is_some_and(|echo| echo.elapsed() < RED)
    }
}

impl Probes {
    /// A name in a slot that the server has, and that no client can use.
    fn of(&self, owner: &Inner, place: &Address) -> Probe {
        let mut n = 0;
        loop {
            let name = format!("\u{1}probe:{}:{n}", self.node);
            let events = owner.keys.tagged(&name).events();
            n += 1;
            let at = owner.topology.place_of(&events).map(|(at, _)| at);
            // A server that loses its slots at this very moment leaves the list of places as well.
            if at.as_ref() == Some(place) || n > 1 << 16 {
                return Probe { name, events, echo: None, placed: None, busy: Arc::default() };
            }
        }
    }
}
