//! Waiting for replicas: `bus.redis.ack = "replicated"`. One WAIT for all publishes of a server that were answered since
//! the last one, on a lane of its own, for WAIT holds up whatever comes behind it.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use parking_lot::Mutex;
use tokio::{
    sync::{mpsc, oneshot},
    time::{Instant, timeout},
};

use super::{
    Inner,
    address::Address,
    append::Failed,
    lane::Lane,
    link::{Deaf, Fault, Link},
    resp::Command,
};
use crate::metrics::Lane as Name;

/// How long replicas may take.
const WAIT: Duration = Duration::from_secs(2);
const CONNECT: Duration = Duration::from_secs(2);

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

impl Inner {
    /// Returns when a replica has what was placed over `link`. If that cannot be known, the publish is unconfirmed.
    pub(super) async fn replicated(&self, key: &[u8], link: &Link) -> Result<(), Failed> {
        let (Some(acks), Some((place, target))) = (&self.acks, self.deployment.place_of(key)) else {
            return Err(Failed::Fault(Fault::Lost));
        };
        let (tx, rx) = oneshot::channel();
        let waiting = (link.server.generation.clone(), tx);
        {
            let mut lanes = acks.0.lock();
            // No bound is needed: each of them is a publish in flight, and those have one.
            let lane = lanes.entry(place).or_insert_with(|| {
                let (tx, rx) = mpsc::unbounded_channel();
                let lane = self.deployment.lane(&target, Name::Acks, Arc::new(|_| Arc::new(Deaf)));
                tokio::spawn(wait(lane, rx));
                tx
            });
            if lane.send(waiting).is_err() {
                return Err(Failed::Fault(Fault::Lost));
            }
        }
        match rx.await {
            Ok(true) => Ok(()),
            _ => Err(Failed::Fault(Fault::Lost)),
        }
    }
}

async fn wait(lane: Lane, mut waiting: mpsc::UnboundedReceiver<Waiting>) {
    let mut batch = Vec::new();
    while waiting.recv_many(&mut batch, 10_000).await > 0 {
        let link = lane.ready(Instant::now() + CONNECT).await.ok();
        let done = match &link {
            Some(link) => all_have_it(link).await,
            None => false,
        };
        let mut elsewhere = false;
        for (server, tell) in batch.drain(..) {
            // What the replicas of another have does not matter.
            let same = link.as_ref().is_some_and(|link| link.server.generation == server);
            elsewhere |= !same;
            let _ = tell.send(done && same);
        }
        if elsewhere {
            lane.replace();
        }
    }
}

/// Whether a replica has everything that was written before.
async fn all_have_it(link: &Link) -> bool {
    // WAIT waits for what its own connection wrote last. PUBLISH is passed on to replicas, and changes nothing.
    let mark = link.ask(&Command::new("PUBLISH").arg("weir:wait").arg(""));
    let ms = WAIT.as_millis() as u64;
    let wait = link.ask(&Command::new("WAIT").int(1).int(ms));
    let answers = async { (mark.await.is_ok(), wait.await.ok().and_then(|count| count.int())) };
    matches!(timeout(WAIT * 2, answers).await, Ok((true, Some(1..))))
}
