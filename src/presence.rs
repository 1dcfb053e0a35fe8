//! Who is on a channel: leases held by subscriptions, and the events `join` and `leave` of `$presence/<channel>`.
//!
//! Each node tells the others what it holds, so that every node knows all members; what a dead node held is forgotten with
//! it. One node, whichever [leads](Cluster::leads), makes what is **announced** equal to what is **held**, a quarter of a
//! second behind: who comes back within that, here or on another node, was never away. It compares two states and keeps no
//! list of what happened, so a storm costs no more than the members that it leaves behind.
//!
//! Lists show what was announced and the position of the event that said so: list and events cannot disagree.

mod about;
mod announce;
mod book;
mod mail;
mod wire;

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering::Relaxed},
    },
    time::{Duration, Instant},
};

use parking_lot::Mutex;
use tokio::sync::Notify;

use self::book::{Book, Name};
pub use self::{
    about::{About, Client},
    book::Page,
};
use crate::{
    bus::{Bus, ReadLimit},
    channel::Channel,
    cluster::Cluster,
    error::{Code, Error, Result},
    metrics::Metrics,
    position::{Position, Start},
};

/// What was announced longer ago than this is known to all nodes. Milliseconds.
const SETTLED: u64 = 10_000;
/// Events that are looked at for one so old.
const LOOK_BACK: usize = 100;

#[derive(Clone, Debug)]
pub struct Config {
    /// Leases of this node.
    pub leases: usize,
    /// Bytes of one event.
    pub event: usize,
}

/// The members of all channels.
pub struct Presence {
    config: Config,
    bus: Arc<Bus>,
    cluster: Arc<dyn Cluster>,
    metrics: Arc<Metrics>,
    started: Instant,
    state: Mutex<State>,
    /// There is something to tell the other nodes.
    news: Notify,
    /// It is known what was announced: heard from whoever announces, or begun anew.
    sure: AtomicBool,
}

#[derive(Default)]
struct State {
    book: Book,
    /// What was announced here, and the others do not know yet.
    said: Vec<Said>,
    /// Those who know too little or too much are to be told all of it.
    anew: bool,
}

/// What one event announced.
struct Said {
    channel: Channel,
    at: Position,
    members: Vec<(Arc<str>, Option<Arc<About>>)>,
}

/// One subscription's word that a client is there. Dropped, it is taken back.
pub struct Lease {
    presence: Arc<Presence>,
    name: Name,
    number: u64,
}

/// Members of one channel, as asked for.
pub struct Listed {
    pub page: Page,
    /// Read `$presence/…` from here on to keep the list up to date. Unknown while the bus is away.
    pub position: Option<Position>,
}

// === impl Presence ===

impl Presence {
    pub fn new(config: Config, bus: Arc<Bus>, cluster: Arc<dyn Cluster>, metrics: Arc<Metrics>) -> Arc<Self> {
        Arc::new(Presence {
            config,
            bus,
            cluster,
            metrics,
            started: Instant::now(),
            state: Mutex::default(),
            news: Notify::new(),
            sure: AtomicBool::new(false),
        })
    }

    /// Tells other nodes and announces, until it is dropped.
    pub async fn run(self: Arc<Self>) {
        tokio::join!(self.correspond(), self.announce());
    }

    /// `client` is on `channel` until the lease is dropped. Several leases of one name are one member.
    ///
    /// # Errors
    /// `limit_reached`; `invalid_params` for a channel that can have no presence.
    pub fn enter(
        self: &Arc<Self>,
        channel: &Channel,
        client: &Client,
        subject: &str,
        transport: &str,
    ) -> Result<Lease> {
        channel.presence()?;
        let about = client.about(subject, transport, self.bus.now());
        let mut state = self.state.lock();
        let most = self.config.leases;
        if state.book.own() >= most {
            let detail = format!("this node holds {most} members, as limits.presences allows");
            return Err(Error::new(Code::LimitReached, detail).with("limit", "limits.presences"));
        }
        let (number, client) = state.book.enter(channel, &client.name, about, self.now());
        self.changed(&state);
        drop(state);
        self.metrics.presence_leases.add(1);
        Ok(Lease { presence: self.clone(), name: (channel.clone(), client), number })
    }

    /// Members of a channel by name, from the first after `after` on: at most `most`, and about `bytes` of JSON.
    pub async fn list(&self, channel: &Channel, after: Option<&str>, most: usize, bytes: usize) -> Result<Listed> {
        let on = channel.presence()?;
        let page = self.state.lock().book.page(channel, after, most, bytes);
        let position = match page.at {
            Some(at) => Some(at),
            None => self.settled(&on).await.ok(),
        };
        Ok(Listed { page, position })
    }

    /// Where every event has reached the lists of all nodes. Reading some of them once more does no harm.
    async fn settled(&self, on: &Channel) -> Result<Position> {
        let limit = ReadLimit { events: LOOK_BACK, bytes: usize::MAX };
        let page = self.bus.read(on, Start::Last(LOOK_BACK as u64), limit, None).await?;
        let now = self.bus.now();
        let old = page.events.iter().rev().find(|event| event.time + SETTLED <= now).map(|event| event.position());
        let before = |event: &Arc<crate::event::Event>| Position { offset: event.offset - 1, ..event.position() };
        Ok(old.or(page.events.first().map(before)).unwrap_or(page.next))
    }

    /// Members of all channels, as announced: for metrics.
    pub fn members(&self) -> usize {
        self.state.lock().book.members()
    }

    /// Leases of this node, members and channels: for tests that count what is left.
    pub fn counts(&self) -> (usize, usize, usize) {
        let state = self.state.lock();
        (state.book.own(), state.book.members(), state.book.channels())
    }

    /// Milliseconds that only run on.
    fn now(&self) -> u64 {
        self.started.elapsed().as_millis() as u64
    }

    fn changed(&self, state: &State) {
        if state.book.has_news() {
            self.news.notify_one();
        }
    }

    fn is_sure(&self) -> bool {
        self.sure.load(Relaxed)
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        let presence = &self.presence;
        let mut state = presence.state.lock();
        state.book.leave(self.name.clone(), self.number, presence.now());
        presence.changed(&state);
        drop(state);
        presence.metrics.presence_leases.add(-1);
    }
}

/// A little time in which more may come, so that it goes together.
async fn pause(time: Duration) {
    tokio::time::sleep(time).await;
}

#[cfg(test)]
mod tests;
