//! [`Book`]: who is held to be on which channel, and what of it was announced. No clock, no bus, no cluster.

use std::{
    collections::{BTreeMap, HashMap, VecDeque},
    ops::Bound,
    sync::Arc,
};

use foldhash::fast::RandomState;
use indexmap::IndexSet;

use super::about::About;
use crate::{channel::Channel, cluster::NodeId, position::Position};

/// Milliseconds for which a change has to last before it is announced: who comes back within it was not away.
pub const WINDOW: u64 = 250;
/// Milliseconds for which it is known of a channel that all have left up to where that was announced. After that the log
/// itself says where, as soon as `SETTLED` is over; much longer than that, for clocks differ.
pub const KEPT: u64 = 30_000;

/// All members that this node knows of.
#[derive(Default)]
pub struct Book {
    rooms: HashMap<Channel, Room, RandomState>,
    /// What differs from what was announced, by when it is to be. Kept only while leading.
    due: BTreeMap<(u64, u64), Name>,
    /// What this node holds otherwise than the others know. Kept only while there are others.
    news: IndexSet<Name, RandomState>,
    /// Channels that nobody is on, each once, and when they may be forgotten.
    deserted: VecDeque<(u64, Channel)>,
    numbers: u64,
    leading: bool,
    others: bool,
    own: usize,
    told: usize,
}

/// A client on a channel.
pub type Name = (Channel, Arc<str>);

/// One channel.
#[derive(Default)]
struct Room {
    members: BTreeMap<Arc<str>, Member>,
    /// Of them, those that were announced.
    told: usize,
    /// The last event that is reflected in that. It only goes forward.
    at: Option<Position>,
    /// Since when nobody is here, if so.
    empty: u64,
    /// Whether it is among those that are deserted.
    deserted: bool,
}

#[derive(Default)]
struct Member {
    held: Vec<Held>,
    /// As last announced; nothing: not at all, or as gone.
    told: Option<Arc<About>>,
    /// When the last change came, by the clock of this node.
    changed: u64,
    /// Whether it is among those that are due.
    queued: bool,
}

struct Held {
    by: Holder,
    about: Arc<About>,
}

#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Holder {
    /// A lease of this node.
    Lease(u64),
    Node {
        id: NodeId,
        /// The node tells all that it holds, and has not yet come to this.
        stale: bool,
    },
}

/// Something to announce.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Change {
    pub channel: Channel,
    pub client: Arc<str>,
    /// As it is now; nothing: it is gone.
    pub about: Option<Arc<About>>,
    /// As it was announced last.
    pub before: Option<Arc<About>>,
}

/// A piece of a list of members.
#[derive(Debug, Default)]
pub struct Page {
    /// All members of the channel.
    pub count: usize,
    pub members: Vec<(Arc<str>, Arc<About>)>,
    pub more: bool,
    /// The event up to which the list was brought, if there was one.
    pub at: Option<Position>,
}

// === impl Book ===

impl Book {
    /// A lease of this node begins. Returns its number, for [`leave`](Self::leave), and the client's name, shared.
    pub fn enter(&mut self, channel: &Channel, client: &str, about: About, now: u64) -> (u64, Arc<str>) {
        self.numbers += 1;
        self.own += 1;
        let number = self.numbers;
        let known = self.rooms.get(channel).and_then(|room| room.members.get_key_value(client));
        let name = (channel.clone(), known.map_or_else(|| client.into(), |(client, _)| client.clone()));
        let client = name.1.clone();
        self.change(name, now, |member| {
            member.held.push(Held { by: Holder::Lease(number), about: Arc::new(about) });
        });
        (number, client)
    }

    /// A lease ends.
    pub fn leave(&mut self, name: Name, number: u64, now: u64) {
        self.change(name, now, |member| member.remove(|by| by == Holder::Lease(number)));
        self.own -= 1;
    }

    /// Leases of this node.
    pub fn own(&self) -> usize {
        self.own
    }

    // --- other nodes ---

    /// Whether there is anybody to be told of [`news`](Self::news).
    pub fn set_others(&mut self, others: bool) {
        self.others = others;
        if !others {
            self.news = IndexSet::default();
        }
    }

    pub fn has_others(&self) -> bool {
        self.others
    }

    /// What this node holds of what has changed since the last time.
    pub fn news(&mut self) -> Vec<(Name, Option<Arc<About>>)> {
        let news = std::mem::take(&mut self.news);
        news.into_iter().map(|name| self.own_of(name)).collect()
    }

    /// Whether there are [`news`](Self::news).
    pub fn has_news(&self) -> bool {
        !self.news.is_empty()
    }

    fn own_of(&self, name: Name) -> (Name, Option<Arc<About>>) {
        let member = self.rooms.get(&name.0).and_then(|room| room.members.get(&name.1));
        let about = member.and_then(|member| member.of(|by| by.lease().is_some()));
        (name, about)
    }

    /// All that this node holds.
    pub fn all_own(&self) -> impl Iterator<Item = (&Channel, &Arc<str>, Arc<About>)> {
        self.each()
            .filter_map(|(channel, client, member)| Some((channel, client, member.of(|by| by.lease().is_some())?)))
    }

    /// Another node holds a member, or no longer.
    pub fn hear(&mut self, node: NodeId, name: Name, about: Option<About>, now: u64) {
        self.change(name, now, |member| {
            let fresh = Holder::Node { id: node, stale: false };
            let held = member.held.iter_mut().find(|held| held.by.is(node));
            match (held, about) {
                (Some(held), Some(about)) => {
                    held.by = fresh;
                    if *held.about != about {
                        held.about = about.into();
                    }
                }
                (None, Some(about)) => {
                    // What was announced is usually the same: kept once.
                    let told = member.told.as_ref().filter(|told| ***told == about);
                    let about = told.cloned().unwrap_or_else(|| about.into());
                    member.held.push(Held { by: fresh, about });
                }
                (_, None) => member.remove(|by| by.is(node)),
            }
        });
    }

    /// The node will now tell all that it holds.
    pub fn begin_all(&mut self, node: NodeId) {
        let held =
            self.rooms.values_mut().flat_map(|room| room.members.values_mut()).flat_map(|member| &mut member.held);
        held.filter(|held| held.by.is(node)).for_each(|held| held.by = Holder::Node { id: node, stale: true });
    }

    /// It has. What it did not come to it does not hold.
    pub fn end_all(&mut self, node: NodeId, now: u64) {
        self.forget_where(now, |by| by == Holder::Node { id: node, stale: true });
    }

    /// The node is no more.
    pub fn forget(&mut self, node: NodeId, now: u64) {
        self.forget_where(now, |by| by.is(node));
    }

    fn forget_where(&mut self, now: u64, which: impl Fn(Holder) -> bool) {
        let of = |member: &Member| member.held.iter().any(|held| which(held.by));
        let gone: Vec<Name> = self
            .each()
            .filter(|(_, _, member)| of(member))
            .map(|(channel, client, _)| (channel.clone(), client.clone()))
            .collect();
        for name in gone {
            self.change(name, now, |member| member.remove(&which));
        }
    }

    // --- what was announced ---

    /// This node announces what differs, from now on or no longer.
    pub fn lead(&mut self, leading: bool, now: u64) {
        if self.leading == leading {
            return;
        }
        self.leading = leading;
        self.due.clear();
        let all: Vec<Name> = self
            .each()
            .filter(|(_, _, member)| member.queued || member.differs())
            .map(|(channel, client, _)| (channel.clone(), client.clone()))
            .collect();
        for name in all {
            if let Some(member) = self.member(&name) {
                // What lasted until now may not be known here yet.
                (member.queued, member.changed) = (false, now);
            }
            self.settle(name, now);
        }
    }

    pub fn leads(&self) -> bool {
        self.leading
    }

    /// Takes up to `most` of what is to be announced by now.
    pub fn due(&mut self, now: u64, most: usize) -> Vec<Change> {
        let mut changes = Vec::new();
        while changes.len() < most
            && let Some(first) = self.due.first_entry().filter(|first| first.key().0 <= now)
        {
            let (channel, client) = first.remove();
            let Some(member) = self.rooms.get_mut(&channel).and_then(|room| room.members.get_mut(&client)) else {
                continue;
            };
            member.queued = false;
            if member.differs() {
                if now < member.changed + WINDOW {
                    self.queue((channel, client), now);
                    continue;
                }
                let (about, before) = (member.to_tell(), member.told.clone());
                changes.push(Change { channel, client, about, before });
            } else {
                self.tidy(&channel, &client, now);
            }
        }
        changes
    }

    /// When [`due`](Self::due) has something next.
    pub fn next_due(&self) -> Option<u64> {
        self.due.first_key_value().map(|((at, _), _)| *at)
    }

    /// It was announced that a member is there, or gone. When all that one event says has been told, [`upto`](Self::upto)
    /// follows.
    pub fn told(&mut self, name: Name, about: Option<Arc<About>>, now: u64) {
        let room = self.rooms.entry(name.0.clone()).or_default();
        let member = room.members.entry(name.1.clone()).or_default();
        let was = member.told.is_some();
        let same = member.held.iter().map(|held| &held.about).find(|held| about.as_ref() == Some(held));
        member.told = same.cloned().or(about);
        let is = member.told.is_some();
        if is != was {
            room.told = if is { room.told + 1 } else { room.told - 1 };
            self.told = if is { self.told + 1 } else { self.told - 1 };
        }
        self.settle(name, now);
    }

    /// Whatever was announced on a channel up to the event at `at` is known.
    pub fn upto(&mut self, channel: &Channel, at: Position, now: u64) {
        let room = self.rooms.entry(channel.clone()).or_default();
        if room.at.is_none_or(|known| known.epoch != at.epoch || known.offset < at.offset) {
            room.at = Some(at);
        }
        self.desert(channel, now);
    }

    /// All that was announced.
    pub fn all_told(&self) -> impl Iterator<Item = (&Channel, &Arc<str>, &Arc<About>)> {
        self.each().filter_map(|(channel, client, member)| Some((channel, client, member.told.as_ref()?)))
    }

    /// And up to where, also on channels that all have left.
    pub fn all_upto(&self) -> impl Iterator<Item = (&Channel, Position)> {
        self.rooms.iter().filter_map(|(channel, room)| Some((channel, room.at?)))
    }

    /// Nothing of what was announced counts any more.
    pub fn untell(&mut self, now: u64) {
        let all: Vec<Name> = self.all_told().map(|(channel, client, _)| (channel.clone(), client.clone())).collect();
        for name in all {
            let Some(room) = self.rooms.get_mut(&name.0) else { continue };
            if room.members.get_mut(&name.1).and_then(|member| member.told.take()).is_some() {
                room.told -= 1;
                self.told -= 1;
            }
            self.settle(name, now);
        }
    }

    /// Members of all channels, as announced.
    pub fn members(&self) -> usize {
        self.told
    }

    /// Channels that anybody is or was announced to be on.
    pub fn channels(&self) -> usize {
        self.rooms.values().filter(|room| !room.members.is_empty()).count()
    }

    /// Forgets the channels that all left long ago.
    pub fn sweep(&mut self, now: u64) {
        while let Some((_, channel)) = self.deserted.pop_front_if(|(at, _)| *at <= now) {
            let Some(room) = self.rooms.get_mut(&channel) else { continue };
            let until = room.empty.saturating_add(KEPT);
            if !room.members.is_empty() {
                room.deserted = false;
            } else if until > now {
                self.deserted.push_back((until, channel));
            } else {
                self.rooms.remove(&channel);
            }
        }
    }

    /// Members of a channel by name, from the first after `after` on; at most `most`, and about `bytes` of JSON.
    pub fn page(&self, channel: &Channel, after: Option<&str>, most: usize, bytes: usize) -> Page {
        let Some(room) = self.rooms.get(channel) else { return Page::default() };
        let mut page = Page { count: room.told, at: room.at, ..Page::default() };
        let from = after.map_or(Bound::Unbounded, Bound::Excluded);
        let mut size = 0;
        for (client, member) in room.members.range::<str, _>((from, Bound::Unbounded)) {
            let Some(about) = &member.told else { continue };
            size += about.size();
            if page.members.len() >= most || (size > bytes && !page.members.is_empty()) {
                page.more = true;
                break;
            }
            page.members.push((client.clone(), about.clone()));
        }
        page
    }

    // ---

    fn each(&self) -> impl Iterator<Item = (&Channel, &Arc<str>, &Member)> {
        self.rooms
            .iter()
            .flat_map(|(channel, room)| room.members.iter().map(move |(client, member)| (channel, client, member)))
    }

    /// Does something to a member.
    fn change(&mut self, name: Name, now: u64, act: impl FnOnce(&mut Member)) {
        let room = self.rooms.entry(name.0.clone()).or_default();
        let member = room.members.entry(name.1.clone()).or_default();
        let (before, own) = (member.latest().cloned(), member.newest_lease());
        act(member);
        if !same(before.as_ref(), member.latest()) {
            member.changed = now;
        }
        if self.others && own != member.newest_lease() {
            self.news.insert(name.clone());
        }
        self.settle(name, now);
    }

    /// Queues a member that has to be announced, and drops one of which there is nothing to know.
    fn settle(&mut self, name: Name, now: u64) {
        let leading = self.leading;
        let Some(member) = self.member(&name) else { return };
        if leading && !member.queued && member.differs() {
            self.queue(name, now);
        } else {
            self.tidy(&name.0, &name.1, now);
        }
    }

    fn queue(&mut self, name: Name, now: u64) {
        let Some(member) = self.member(&name) else { return };
        member.queued = true;
        let at = (member.changed + WINDOW).max(now);
        self.numbers += 1;
        self.due.insert((at, self.numbers), name);
    }

    fn member(&mut self, name: &Name) -> Option<&mut Member> {
        self.rooms.get_mut(&name.0)?.members.get_mut(&name.1)
    }

    fn tidy(&mut self, channel: &Channel, client: &str, now: u64) {
        let Some(room) = self.rooms.get_mut(channel) else { return };
        if room
            .members
            .get(client)
            .is_some_and(|member| member.held.is_empty() && member.told.is_none() && !member.queued)
        {
            room.members.remove(client);
            self.desert(channel, now);
        }
    }

    /// Keeps what is known of a channel that nobody is on for a while: a list that forgot it at once would begin further
    /// back than the one before.
    fn desert(&mut self, channel: &Channel, now: u64) {
        let Some(room) = self.rooms.get_mut(channel).filter(|room| room.members.is_empty()) else { return };
        if room.at.is_none() {
            self.rooms.remove(channel);
            return;
        }
        room.empty = now;
        if !std::mem::replace(&mut room.deserted, true) {
            self.deserted.push_back((now.saturating_add(KEPT), channel.clone()));
        }
    }
}

impl Member {
    /// Of those that `by` picks: what the latest says, since the earliest.
    fn of(&self, by: impl Fn(Holder) -> bool) -> Option<Arc<About>> {
        let mine = || self.held.iter().filter(|held| by(held.by));
        // By the clocks of the nodes where it is on several. Only what is shown hangs on it, and only one node chooses.
        let latest = mine().max_by_key(|held| (held.about.since, held.by))?;
        let since = mine().map(|held| held.about.since).min().unwrap_or_default();
        Some(with_since(&latest.about, since))
    }

    /// What is to be announced. Who was announced once has been here since then, wherever it went.
    fn to_tell(&self) -> Option<Arc<About>> {
        let about = self.of(|_| true)?;
        let since = self.told.as_ref().map_or(about.since, |told| told.since);
        Some(with_since(&about, since))
    }

    fn differs(&self) -> bool {
        !same(self.told.as_ref(), self.latest())
    }

    fn latest(&self) -> Option<&Arc<About>> {
        self.held.iter().max_by_key(|held| (held.about.since, held.by)).map(|held| &held.about)
    }

    /// The number of this node's newest lease.
    fn newest_lease(&self) -> Option<u64> {
        self.held.iter().filter_map(|held| held.by.lease()).max()
    }

    fn remove(&mut self, which: impl Fn(Holder) -> bool) {
        self.held.retain(|held| !which(held.by));
    }
}

impl Holder {
    fn lease(self) -> Option<u64> {
        match self {
            Holder::Lease(number) => Some(number),
            Holder::Node { .. } => None,
        }
    }

    fn is(self, node: NodeId) -> bool {
        matches!(self, Holder::Node { id, .. } if id == node)
    }
}

/// Whether there is nothing new to say.
fn same(before: Option<&Arc<About>>, after: Option<&Arc<About>>) -> bool {
    match (before, after) {
        (Some(before), Some(after)) => before.says(after),
        (before, after) => before.is_none() && after.is_none(),
    }
}

fn with_since(about: &Arc<About>, since: u64) -> Arc<About> {
    if about.since == since { about.clone() } else { Arc::new(About { since, ..About::clone(about) }) }
}

#[cfg(test)]
#[path = "book_tests.rs"]
mod tests;
