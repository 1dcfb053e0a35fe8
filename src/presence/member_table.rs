//! [`MemberTable`]: the members that are held, and those that are announced. Without clock, bus and cluster.

use std::{
    collections::{BTreeMap, HashMap, VecDeque},
    ops::Bound,
    sync::Arc,
};

use foldhash::fast::RandomState;
use indexmap::IndexSet;

use super::member::MemberInfo;
use crate::{channel::Channel, cluster::NodeId, position::Position};

/// Milliseconds for which a difference has to last before it is announced.
pub(super) const DEBOUNCE: u64 = 250;
/// Milliseconds for which the position of a channel is kept once the channel has no members. Later the log yields the
/// position as soon as `REPLICATED_AFTER` has passed; this is much longer, because clocks differ.
const EMPTY_RETENTION: u64 = 30_000;

/// A client on a channel.
pub(super) type MemberKey = (Channel, Arc<str>);

/// All members that this node knows.
#[derive(Default)]
pub(super) struct MemberTable {
    channels: HashMap<Channel, ChannelMembers, RandomState>,
    /// Members whose held and announced states differ, by the time of the announcement. Only kept by the announcer.
    due: BTreeMap<(u64, u64), MemberKey>,
    /// Members for which this node's leases have changed since they were last sent. Only kept while there are peers.
    unsent: IndexSet<MemberKey, RandomState>,
    /// Channels without members, each once, by the time at which to remove them.
    empty: VecDeque<(u64, Channel)>,
    /// Numbers given to leases and to entries of `due`.
    numbers: u64,
    announcing: bool,
    has_peers: bool,
    leases: usize,
    announced: usize,
}

#[derive(Default)]
struct ChannelMembers {
    members: BTreeMap<Arc<str>, MemberEntry>,
    /// Number of announced members.
    announced: usize,
    /// The last announcement that the members reflect. It never goes back within an epoch.
    position: Option<Position>,
    /// The time at which the last member was removed.
    empty_since: u64,
    /// The channel is in [`MemberTable::empty`].
    in_empty: bool,
}

#[derive(Default)]
struct MemberEntry {
    held: Vec<HeldMember>,
    /// As last announced. `None`: not announced, or announced to have left.
    announced: Option<Arc<MemberInfo>>,
    /// The time at which the held state last changed.
    changed: u64,
    /// The member is in [`MemberTable::due`].
    queued: bool,
}

struct HeldMember {
    by: Holder,
    info: Arc<MemberInfo>,
}

#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Holder {
    /// A lease of this node, by number.
    Lease(u64),
    Node {
        id: NodeId,
        /// The node is sending a snapshot, which has not contained this member so far.
        stale: bool,
    },
}

/// A difference to announce.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct MemberChange {
    pub(super) channel: Channel,
    pub(super) client: Arc<str>,
    /// The member at present. `None`: it has left.
    pub(super) info: Option<Arc<MemberInfo>>,
    /// As last announced.
    pub(super) before: Option<Arc<MemberInfo>>,
}

/// A part of the announced members of a channel.
#[derive(Debug, Default)]
pub struct MemberPage {
    /// Number of all members of the channel.
    pub count: usize,
    pub members: Vec<(Arc<str>, Arc<MemberInfo>)>,
    pub(crate) more: bool,
    /// The last announcement that the page reflects.
    pub(super) position: Option<Position>,
}

// === impl MemberTable ===

impl MemberTable {
    /// Adds a lease of this node. Returns its number, for [`remove_lease`](Self::remove_lease), and the shared name.
    pub(super) fn add_lease(&mut self, channel: &Channel, client: &str, info: MemberInfo, now: u64) -> (u64, Arc<str>) {
        self.numbers += 1;
        self.leases += 1;
        let number = self.numbers;
        let known = self.channels.get(channel).and_then(|entry| entry.members.get_key_value(client));
        let client: Arc<str> = known.map_or_else(|| client.into(), |(client, _)| client.clone());
        self.update((channel.clone(), client.clone()), now, |member| {
            member.held.push(HeldMember { by: Holder::Lease(number), info: Arc::new(info) });
        });
        (number, client)
    }

    pub(super) fn remove_lease(&mut self, key: MemberKey, number: u64, now: u64) {
        self.update(key, now, |member| member.release(|by| by == Holder::Lease(number)));
        self.leases -= 1;
    }

    /// Number of leases of this node.
    pub(super) fn lease_count(&self) -> usize {
        self.leases
    }

    // --- replication ---

    /// Whether there are nodes to send changes to.
    pub(super) fn set_has_peers(&mut self, has_peers: bool) {
        self.has_peers = has_peers;
        if !has_peers {
            self.unsent = IndexSet::default();
        }
    }

    pub(super) fn has_peers(&self) -> bool {
        self.has_peers
    }

    /// Takes the members for which this node's leases have changed since the last call, and what it holds of them.
    pub(super) fn take_unsent(&mut self) -> Vec<(MemberKey, Option<Arc<MemberInfo>>)> {
        let unsent = std::mem::take(&mut self.unsent);
        unsent
            .into_iter()
            .map(|key| {
                let info = self.get_mut(&key).and_then(|member| member.merged(|by| by.lease().is_some()));
                (key, info)
            })
            .collect()
    }

    /// Whether [`take_unsent`](Self::take_unsent) has something.
    pub(super) fn has_unsent(&self) -> bool {
        !self.unsent.is_empty()
    }

    /// All members for which this node has leases.
    pub(super) fn held_by_leases(&self) -> impl Iterator<Item = (&Channel, &Arc<str>, Arc<MemberInfo>)> {
        self.iter()
            .filter_map(|(channel, client, member)| Some((channel, client, member.merged(|by| by.lease().is_some())?)))
    }

    /// Sets what another node holds of a member.
    pub(super) fn set_held_by_node(&mut self, node: NodeId, key: MemberKey, info: Option<MemberInfo>, now: u64) {
        self.update(key, now, |member| {
            let fresh = Holder::Node { id: node, stale: false };
            let held = member.held.iter_mut().find(|held| held.by.is_node(node));
            match (held, info) {
                (Some(held), Some(info)) => {
                    held.by = fresh;
                    if *held.info != info {
                        held.info = info.into();
                    }
                }
                (None, Some(info)) => {
                    // Shares the allocation of the announced info, which is usually equal.
                    let announced = member.announced.as_ref().filter(|announced| ***announced == info);
                    let info = announced.cloned().unwrap_or_else(|| info.into());
                    member.held.push(HeldMember { by: fresh, info });
                }
                (_, None) => member.release(|by| by.is_node(node)),
            }
        });
    }

    /// Another node begins to send all members that it holds.
    pub(super) fn begin_snapshot(&mut self, node: NodeId) {
        let members = self.channels.values_mut().flat_map(|entry| entry.members.values_mut());
        let held = members.flat_map(|member| &mut member.held).filter(|held| held.by.is_node(node));
        held.for_each(|held| held.by = Holder::Node { id: node, stale: true });
    }

    /// The snapshot is complete: the node does not hold the members that it did not contain.
    pub(super) fn end_snapshot(&mut self, node: NodeId, now: u64) {
        self.release_where(now, |by| by == Holder::Node { id: node, stale: true });
    }

    /// Removes all that a node holds.
    pub(super) fn remove_node(&mut self, node: NodeId, now: u64) {
        self.release_where(now, |by| by.is_node(node));
    }

    fn release_where(&mut self, now: u64, which: impl Fn(Holder) -> bool) {
        for key in self.keys_where(|member| member.held.iter().any(|held| which(held.by))) {
            self.update(key, now, |member| member.release(&which));
        }
    }

    // --- announcements ---

    /// Starts or stops to queue differences for announcement.
    pub(super) fn set_announcing(&mut self, announcing: bool, now: u64) {
        if self.announcing == announcing {
            return;
        }
        self.announcing = announcing;
        self.due.clear();
        for key in self.keys_where(|member| member.queued || member.is_different()) {
            if let Some(member) = self.get_mut(&key) {
                // Debounce again: this node may not know the newest changes of other nodes yet.
                (member.queued, member.changed) = (false, now);
            }
            self.settle(key, now);
        }
    }

    pub(super) fn is_announcing(&self) -> bool {
        self.announcing
    }

    /// Takes up to `limit` changes that are to be announced by `now`.
    pub(super) fn take_due(&mut self, now: u64, limit: usize) -> Vec<MemberChange> {
        let mut changes = Vec::new();
        while changes.len() < limit
            && let Some(first) = self.due.first_entry().filter(|first| first.key().0 <= now)
        {
            let key = first.remove();
            let Some(member) = self.get_mut(&key) else { continue };
            member.queued = false;
            if !member.is_different() {
                self.remove_if_unused(&key, now);
            } else if now < member.changed + DEBOUNCE {
                self.queue(key, now);
            } else {
                let (info, before) = (member.to_announce(), member.announced.clone());
                let (channel, client) = key;
                changes.push(MemberChange { channel, client, info, before });
            }
        }
        changes
    }

    /// The time at which [`take_due`](Self::take_due) has the next change.
    pub(super) fn next_due(&self) -> Option<u64> {
        self.due.first_key_value().map(|((at, _), _)| *at)
    }

    /// Sets a member as announced, or with `None` as announced to have left. After all members of one event,
    /// [`set_position`](Self::set_position) follows.
    pub(super) fn set_announced(&mut self, key: MemberKey, info: Option<Arc<MemberInfo>>, now: u64) {
        let entry = self.channels.entry(key.0.clone()).or_default();
        let member = entry.members.entry(key.1.clone()).or_default();
        let same = member.held.iter().map(|held| &held.info).find(|held| info.as_ref() == Some(held));
        let info = same.cloned().or(info);
        match (member.announced.is_some(), info.is_some()) {
            (false, true) => (entry.announced, self.announced) = (entry.announced + 1, self.announced + 1),
            (true, false) => (entry.announced, self.announced) = (entry.announced - 1, self.announced - 1),
            _ => {}
        }
        member.announced = info;
        self.settle(key, now);
    }

    /// The table reflects all announcements on a channel up to `position`.
    pub(super) fn set_position(&mut self, channel: &Channel, position: Position, now: u64) {
        let entry = self.channels.entry(channel.clone()).or_default();
        if entry.position.is_none_or(|known| known.epoch != position.epoch || known.offset < position.offset) {
            entry.position = Some(position);
        }
        self.expire_if_empty(channel, now);
    }

    /// All announced members.
    pub(super) fn announced(&self) -> impl Iterator<Item = (&Channel, &Arc<str>, &Arc<MemberInfo>)> {
        self.iter().filter_map(|(channel, client, member)| Some((channel, client, member.announced.as_ref()?)))
    }

    /// The positions of all channels, including those without members.
    pub(super) fn positions(&self) -> impl Iterator<Item = (&Channel, Position)> {
        self.channels.iter().filter_map(|(channel, entry)| Some((channel, entry.position?)))
    }

    /// Sets all members as not announced.
    pub(super) fn clear_announced(&mut self, now: u64) {
        for key in self.keys_where(|member| member.announced.is_some()) {
            self.set_announced(key, None, now);
        }
    }

    /// Number of announced members, over all channels.
    pub(super) fn announced_count(&self) -> usize {
        self.announced
    }

    /// Number of channels with members, held or announced.
    pub(super) fn channel_count(&self) -> usize {
        self.channels.values().filter(|entry| !entry.members.is_empty()).count()
    }

    /// Removes the channels that have been without members for long.
    pub(super) fn sweep(&mut self, now: u64) {
        while let Some((_, channel)) = self.empty.pop_front_if(|(at, _)| *at <= now) {
            let Some(entry) = self.channels.get_mut(&channel) else { continue };
            let until = entry.empty_since.saturating_add(EMPTY_RETENTION);
            if !entry.members.is_empty() {
                entry.in_empty = false;
            } else if until > now {
                self.empty.push_back((until, channel));
            } else {
                self.channels.remove(&channel);
            }
        }
    }

    /// Announced members in the order of names: at most `limit`, and about `bytes` of JSON.
    pub(super) fn page(&self, channel: &Channel, after: Option<&str>, limit: usize, bytes: usize) -> MemberPage {
        let Some(entry) = self.channels.get(channel) else { return MemberPage::default() };
        let mut page = MemberPage { count: entry.announced, position: entry.position, ..MemberPage::default() };
        let from = after.map_or(Bound::Unbounded, Bound::Excluded);
        let mut size = 0;
        for (client, member) in entry.members.range::<str, _>((from, Bound::Unbounded)) {
            let Some(info) = &member.announced else { continue };
            size += info.size();
            if page.members.len() >= limit || (size > bytes && !page.members.is_empty()) {
                page.more = true;
                break;
            }
            page.members.push((client.clone(), info.clone()));
        }
        page
    }

    // ---

    fn iter(&self) -> impl Iterator<Item = (&Channel, &Arc<str>, &MemberEntry)> {
        self.channels
            .iter()
            .flat_map(|(channel, entry)| entry.members.iter().map(move |(client, member)| (channel, client, member)))
    }

    fn keys_where(&self, which: impl Fn(&MemberEntry) -> bool) -> Vec<MemberKey> {
        let found = self.iter().filter(|(_, _, member)| which(member));
        found.map(|(channel, client, _)| (channel.clone(), client.clone())).collect()
    }

    fn get_mut(&mut self, key: &MemberKey) -> Option<&mut MemberEntry> {
        self.channels.get_mut(&key.0)?.members.get_mut(&key.1)
    }

    /// Changes what is held of a member.
    fn update(&mut self, key: MemberKey, now: u64, change: impl FnOnce(&mut MemberEntry)) {
        let entry = self.channels.entry(key.0.clone()).or_default();
        let member = entry.members.entry(key.1.clone()).or_default();
        let (before, lease) = (member.latest().cloned(), member.newest_lease());
        change(member);
        if !is_same(before.as_ref(), member.latest()) {
            member.changed = now;
        }
        if self.has_peers && lease != member.newest_lease() {
            self.unsent.insert(key.clone());
        }
        self.settle(key, now);
    }

    /// Queues a member that has to be announced, or removes one that is neither held nor announced.
    fn settle(&mut self, key: MemberKey, now: u64) {
        let announcing = self.announcing;
        let Some(member) = self.get_mut(&key) else { return };
        if announcing && !member.queued && member.is_different() {
            self.queue(key, now);
        } else {
            self.remove_if_unused(&key, now);
        }
    }

    fn queue(&mut self, key: MemberKey, now: u64) {
        let Some(member) = self.get_mut(&key) else { return };
        member.queued = true;
        let at = (member.changed + DEBOUNCE).max(now);
        self.numbers += 1;
        self.due.insert((at, self.numbers), key);
    }

    fn remove_if_unused(&mut self, (channel, client): &MemberKey, now: u64) {
        let Some(entry) = self.channels.get_mut(channel) else { return };
        let is_unused = |member: &MemberEntry| member.held.is_empty() && member.announced.is_none() && !member.queued;
        if entry.members.get(client).is_some_and(is_unused) {
            entry.members.remove(client);
            self.expire_if_empty(channel, now);
        }
    }

    /// Keeps the position of a channel without members for a while. If it were dropped at once, the next list would have
    /// an earlier position than the one before.
    fn expire_if_empty(&mut self, channel: &Channel, now: u64) {
        let Some(entry) = self.channels.get_mut(channel).filter(|entry| entry.members.is_empty()) else { return };
        if entry.position.is_none() {
            self.channels.remove(channel);
            return;
        }
        entry.empty_since = now;
        if !std::mem::replace(&mut entry.in_empty, true) {
            self.empty.push_back((now.saturating_add(EMPTY_RETENTION), channel.clone()));
        }
    }
}

impl MemberEntry {
    /// Over the holders that `by` selects: the latest info, since the earliest time.
    fn merged(&self, by: impl Fn(Holder) -> bool) -> Option<Arc<MemberInfo>> {
        let selected = || self.held.iter().filter(|held| by(held.by));
        // Compares the clocks of several nodes. This only affects which info is shown, and only the announcer chooses it.
        let latest = selected().max_by_key(|held| (held.info.since, held.by))?;
        let since = selected().map(|held| held.info.since).min().unwrap_or_default();
        Some(with_since(&latest.info, since))
    }

    /// The info to announce. An announced member keeps its `since`, wherever it has moved.
    fn to_announce(&self) -> Option<Arc<MemberInfo>> {
        let info = self.merged(|_| true)?;
        let since = self.announced.as_ref().map_or(info.since, |announced| announced.since);
        Some(with_since(&info, since))
    }

    /// Whether the held state differs from the announced one.
    fn is_different(&self) -> bool {
        !is_same(self.announced.as_ref(), self.latest())
    }

    fn latest(&self) -> Option<&Arc<MemberInfo>> {
        self.held.iter().max_by_key(|held| (held.info.since, held.by)).map(|held| &held.info)
    }

    /// The number of this node's newest lease.
    fn newest_lease(&self) -> Option<u64> {
        self.held.iter().filter_map(|held| held.by.lease()).max()
    }

    fn release(&mut self, which: impl Fn(Holder) -> bool) {
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

    fn is_node(self, node: NodeId) -> bool {
        matches!(self, Holder::Node { id, .. } if id == node)
    }
}

/// Whether there is nothing to announce.
fn is_same(before: Option<&Arc<MemberInfo>>, after: Option<&Arc<MemberInfo>>) -> bool {
    match (before, after) {
        (Some(before), Some(after)) => before.equals_but_since(after),
        (before, after) => before.is_none() && after.is_none(),
    }
}

fn with_since(info: &Arc<MemberInfo>, since: u64) -> Arc<MemberInfo> {
    if info.since == since { info.clone() } else { Arc::new(MemberInfo { since, ..MemberInfo::clone(info) }) }
}

#[cfg(test)]
mod tests;
