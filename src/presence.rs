//! Presence: the members of channels, held by leases, and announced by `join` and `leave` events on `$presence/CHANNEL`.
//!
//! Each node replicates the members that it holds to all others, so that every node knows all members; those of a dead
//! node are removed with it. One node, the [leader](Cluster::is_leader), publishes the difference between the members that
//! are **held** and those that are **announced**, once it has lasted for a quarter of a second: a client that reconnects
//! within that time, to any node, does not leave. Two states are compared and no history is queued, so the cost of a burst
//! of connects and disconnects depends only on the members that differ after it.
//!
//! Lists show the announced members and the position of the last announcement, so that lists and events cannot disagree.

mod announcer;
mod core;
mod member;
mod member_table;
mod record;
mod replication;

use std::sync::Arc;

pub use self::{
    member::{MemberInfo, PresentClient},
    member_table::MemberPage,
};

use self::{announcer::Announcer, core::PresenceCore, member_table::MemberKey, replication::Replication};
use crate::{
    bus::{Bus, ReadLimit},
    channel::Channel,
    cluster::Cluster,
    config::Config,
    error::{Code, Error, Result},
    event::Event,
    metrics::Metrics,
    position::{Position, Start},
};

/// Age in milliseconds at which an announcement is taken to have reached all nodes.
const REPLICATED_AFTER: u64 = 10_000;
/// Number of events that are searched for one of that age.
const LOOK_BACK: usize = 100;

/// The members of all channels.
pub struct Presence {
    core: PresenceCore,
}

/// Makes a client a member of a channel. Dropping the lease ends that.
pub struct PresenceLease {
    presence: Arc<Presence>,
    key: MemberKey,
    number: u64,
}

/// A page of the members of one channel.
pub struct MemberList {
    pub page: MemberPage,
    /// Reading `$presence/…` from here on keeps the list up to date. `None` while the bus is unavailable.
    pub position: Option<Position>,
}

// === impl Presence ===

impl Presence {
    pub fn new(config: Arc<Config>, bus: Arc<Bus>, cluster: Arc<dyn Cluster>, metrics: Arc<Metrics>) -> Arc<Self> {
        Arc::new(Presence { core: PresenceCore::new(config, bus, cluster, metrics) })
    }

    /// Replicates members to other nodes and announces them, until it is dropped.
    pub async fn run(self: Arc<Self>) {
        tokio::join!(Replication::new(&self.core).run(), Announcer::new(&self.core).run());
    }

    /// Announces at shutdown what has not been announced yet. All members of this node should have left.
    pub(crate) async fn close(&self) {
        Announcer::new(&self.core).close().await;
    }

    /// Makes `client` a member of `channel` until the lease is dropped. Several leases of the same name are one member.
    ///
    /// # Errors
    /// `limit_reached`; `invalid_params` for a channel that cannot have presence.
    pub fn enter(
        self: &Arc<Self>,
        channel: &Channel,
        client: &PresentClient,
        subject: &str,
        transport: &str,
    ) -> Result<PresenceLease> {
        channel.presence()?;
        let core = &self.core;
        let info = client.info(subject, transport, core.bus.now());
        let mut state = core.state.lock();
        let limit = core.config.limits.presences;
        if state.table.lease_count() >= limit {
            let detail = format!("this node holds {limit} members, as limits.presences allows");
            return Err(Error::new(Code::LimitReached, detail).with("limit", "limits.presences"));
        }
        let (number, client) = state.table.add_lease(channel, client.name(), info, core.now());
        core.notify_replication(&state);
        drop(state);
        core.metrics.presence_leases.add(1);
        Ok(PresenceLease { presence: self.clone(), key: (channel.clone(), client), number })
    }

    /// Members of a channel in the order of names, starting after the name `after`: at most `limit`, and about `bytes` of
    /// JSON.
    pub async fn list(&self, channel: &Channel, after: Option<&str>, limit: usize, bytes: usize) -> Result<MemberList> {
        let events = channel.presence()?;
        let page = self.core.state.lock().table.page(channel, after, limit, bytes);
        let position = match page.position {
            Some(position) => Some(position),
            None => self.replicated_position(&events).await.ok(),
        };
        Ok(MemberList { page, position })
    }

    /// A position up to which the lists of all nodes reflect every event. It may be too early: reading an event twice does
    /// no harm.
    async fn replicated_position(&self, events: &Channel) -> Result<Position> {
        let bus = &self.core.bus;
        let limit = ReadLimit { events: LOOK_BACK, bytes: usize::MAX };
        let page = bus.read(events, Start::Last(LOOK_BACK as u64), limit, None).await?;
        let now = bus.now();
        let old = page.events.iter().rev().find(|event| event.time + REPLICATED_AFTER <= now);
        let before = |event: &Arc<Event>| Position { offset: event.offset - 1, ..event.position() };
        Ok(old.map(|event| event.position()).or(page.events.first().map(before)).unwrap_or(page.next))
    }

    /// Number of announced members, over all channels.
    pub(crate) fn members(&self) -> usize {
        self.core.state.lock().table.announced_count()
    }

    /// Leases of this node, announced members, and channels with members: for tests that check for leaks.
    pub fn counts(&self) -> (usize, usize, usize) {
        let table = &self.core.state.lock().table;
        (table.lease_count(), table.announced_count(), table.channel_count())
    }
}

impl Drop for PresenceLease {
    fn drop(&mut self) {
        let core = &self.presence.core;
        let mut state = core.state.lock();
        state.table.remove_lease(self.key.clone(), self.number, core.now());
        core.notify_replication(&state);
        drop(state);
        core.metrics.presence_leases.add(-1);
    }
}
