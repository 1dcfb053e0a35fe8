//! [`Replication`]: sends the members of this node to all others, and receives theirs. Nodes exchange snapshots when they
//! meet or may have missed something, and changes from then on.

use std::{
    collections::{HashMap, VecDeque},
    time::Duration,
};

use bytes::Bytes;
use tokio::time::sleep;

use super::{
    core::{Announced, PresenceCore, PresenceState},
    member::MemberInfo,
    member_table::MemberKey,
    record::{PresenceRecord, RecordWriter, read_records},
};
use crate::{
    channel::Channel,
    cluster::{ClusterMember, InboxEvent, MessageKind, NodeId, Priority, SendOutcome},
    position::Position,
};

/// Bytes of one message, approximately.
const MESSAGE_BYTES: usize = 48 << 10;
/// Pause between two rounds, so that changes share messages.
const PACE: Duration = Duration::from_millis(10);
/// Interval at which pending work is checked: messages that could not be sent, and deadlines.
const CHECK: Duration = Duration::from_millis(100);
/// Milliseconds for which the members of a node are kept after its link broke, unless it sends them again.
const LINK_GRACE: u64 = 15_000;
/// Messages queued for one node. With more, the queue is replaced by a snapshot...
const BACKLOG: usize = 2_000;
/// ...after so many milliseconds.
const SNAPSHOT_DELAY: u64 = 1_000;

pub(super) struct Replication<'a> {
    core: &'a PresenceCore,
    peers: HashMap<NodeId, PresencePeer>,
}

#[derive(Default)]
struct PresencePeer {
    /// The time at which a snapshot is to be sent.
    snapshot_at: Option<u64>,
    /// Messages that the cluster does not take yet.
    backlog: VecDeque<Bytes>,
    /// The time at which the link broke, if the peer has not sent a snapshot since.
    link_lost: Option<u64>,
    /// Announced members received so far, until those of the event, or of the snapshot, are complete.
    announced: Vec<(MemberKey, Option<MemberInfo>)>,
    /// Positions received so far, while the peer sends a snapshot of announced members.
    positions: Option<Vec<(Channel, Position)>>,
}

impl<'a> Replication<'a> {
    pub(super) fn new(core: &'a PresenceCore) -> Self {
        Replication { core, peers: HashMap::new() }
    }

    /// Never returns.
    pub(super) async fn run(mut self) {
        let core = self.core;
        let (members, inbox) = (core.cluster.members(), core.cluster.inbox(MessageKind::Presence));
        loop {
            let is_pending = self.peers.values().any(PresencePeer::is_pending);
            tokio::select! {
                () = inbox.ready() => {}
                () = members.ready() => {}
                () = core.changed.notified() => {}
                () = sleep(CHECK), if is_pending => {}
            }
            let now = core.now();
            // Taken before messages, and processed after them: an older message must not restore a node that has left.
            let changed = members.take();
            for event in inbox.take() {
                self.receive(event, now);
            }
            for ClusterMember { node, up } in changed {
                if up {
                    self.peers.entry(node).or_default().snapshot_at = Some(now);
                } else {
                    self.peers.remove(&node);
                    core.state.lock().table.remove_node(node, now);
                }
            }
            for (node, peer) in &mut self.peers {
                if peer.link_lost.is_some_and(|since| now >= since + LINK_GRACE) {
                    peer.link_lost = None;
                    core.state.lock().table.remove_node(*node, now);
                }
            }
            self.queue_messages(now);
            self.send_messages(now);
            sleep(PACE).await;
        }
    }

    fn receive(&mut self, event: InboxEvent, now: u64) {
        match event {
            InboxEvent::Message { from, body } => {
                let new = || PresencePeer { snapshot_at: Some(now), ..PresencePeer::default() };
                let peer = self.peers.entry(from).or_insert_with(new);
                let records = read_records(&body);
                let mut state = self.core.state.lock();
                for record in records {
                    Self::apply(self.core, &mut state, from, peer, record, now);
                }
            }
            InboxEvent::Returned { to, .. } => {
                if let Some(peer) = self.peers.get_mut(&to) {
                    peer.snapshot_at.get_or_insert(now);
                }
            }
            InboxEvent::LinkLost { peer, .. } => {
                if let Some(peer) = self.peers.get_mut(&peer) {
                    let link_lost = peer.link_lost.or(Some(now));
                    *peer = PresencePeer { snapshot_at: Some(now), link_lost, ..PresencePeer::default() };
                }
            }
        }
    }

    fn apply(
        core: &PresenceCore,
        state: &mut PresenceState,
        from: NodeId,
        peer: &mut PresencePeer,
        record: PresenceRecord,
        now: u64,
    ) {
        let table = &mut state.table;
        match record {
            PresenceRecord::BeginHeld => table.begin_snapshot(from),
            PresenceRecord::Held(key, info) => table.set_held_by_node(from, key, Some(info), now),
            PresenceRecord::Released(key) => table.set_held_by_node(from, key, None, now),
            PresenceRecord::EndHeld => {
                table.end_snapshot(from, now);
                peer.link_lost = None;
            }
            // The announcer takes them too: another node that announced, because it took itself for the leader, is to be
            // corrected, and its events are in the log.
            PresenceRecord::BeginAnnounced => (peer.announced, peer.positions) = (Vec::new(), Some(Vec::new())),
            PresenceRecord::Joined(key, info) => peer.announced.push((key, Some(info))),
            PresenceRecord::Left(key) => peer.announced.push((key, None)),
            PresenceRecord::Position(channel, position) => match &mut peer.positions {
                Some(positions) => positions.push((channel, position)),
                // Applied as a whole: a list with a part of an event would have no position.
                None => {
                    for (key, info) in peer.announced.drain(..) {
                        table.set_announced(key, info.map(Into::into), now);
                    }
                    table.set_position(&channel, position, now);
                }
            },
            PresenceRecord::EndAnnounced => {
                let Some(positions) = peer.positions.take() else { return };
                table.clear_announced(now);
                for (key, info) in std::mem::take(&mut peer.announced) {
                    table.set_announced(key, info.map(Into::into), now);
                }
                for (channel, position) in positions {
                    table.set_position(&channel, position, now);
                }
                core.set_synced();
            }
        }
    }

    /// Queues changes, or a snapshot, for each peer.
    fn queue_messages(&mut self, now: u64) {
        let mut state = self.core.state.lock();
        if std::mem::take(&mut state.resend_all) {
            self.peers.values_mut().for_each(|peer| peer.snapshot_at = Some(now));
        }
        let is_due = |peer: &PresencePeer| peer.snapshot_at.is_some_and(|at| at <= now);
        state.table.set_has_peers(!self.peers.is_empty());
        let (held, announced) = (state.table.take_unsent(), std::mem::take(&mut state.announced));
        let snapshot = if self.peers.values().any(is_due) { Self::snapshot(&state) } else { Vec::new() };
        drop(state);
        let mut writer = RecordWriter::new(MESSAGE_BYTES);
        for ((channel, client), info) in &held {
            match info {
                Some(info) => writer.held((channel, client), info),
                None => writer.released((channel, client)),
            }
        }
        for Announced { channel, position, members } in &announced {
            for (client, info) in members {
                writer.announced((channel, client), info.as_deref());
            }
            writer.position(channel, *position);
        }
        let changes = writer.finish();
        for peer in self.peers.values_mut() {
            if is_due(peer) {
                peer.snapshot_at = None;
                peer.backlog = snapshot.iter().cloned().collect();
            } else if peer.snapshot_at.is_none() {
                peer.backlog.extend(changes.iter().cloned());
                if peer.backlog.len() > BACKLOG.max(2 * snapshot.len()) {
                    peer.backlog = VecDeque::new();
                    peer.snapshot_at = Some(now + SNAPSHOT_DELAY);
                }
            }
        }
    }

    /// All members that this node holds and, from the announcer, all that are announced.
    fn snapshot(state: &PresenceState) -> Vec<Bytes> {
        let (table, mut writer) = (&state.table, RecordWriter::new(MESSAGE_BYTES));
        writer.begin_held();
        for (channel, client, info) in table.held_by_leases() {
            writer.held((channel, client), &info);
        }
        writer.end_held();
        if table.is_announcing() {
            writer.begin_announced();
            for (channel, client, info) in table.announced() {
                writer.announced((channel, client), Some(info));
            }
            for (channel, position) in table.positions() {
                writer.position(channel, position);
            }
            writer.end_announced();
        }
        writer.finish()
    }

    fn send_messages(&mut self, now: u64) {
        for (node, peer) in &mut self.peers {
            while let Some(message) = peer.backlog.front() {
                match self.core.cluster.send(*node, MessageKind::Presence, Priority::Normal, message) {
                    SendOutcome::Queued => drop(peer.backlog.pop_front()),
                    SendOutcome::Full => break,
                    // The snapshot follows when the node is up again, if ever.
                    SendOutcome::NoSuchNode => {
                        peer.backlog = VecDeque::new();
                        peer.link_lost.get_or_insert(now);
                    }
                }
            }
        }
    }
}

impl PresencePeer {
    fn is_pending(&self) -> bool {
        self.snapshot_at.is_some() || self.link_lost.is_some() || !self.backlog.is_empty()
    }
}
