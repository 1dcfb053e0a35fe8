//! [`PeerLinks`]: messages between nodes over any carrier that keeps the order of what it delivers, but may lose it.
//!
//! ```text
//! batch     version:1 · from:8 · mine:4 · yours:4 · seq:8 · message*     little endian
//! message   kind:1 · length:4 · bytes
//! ```
//!
//! Two nodes have a **link**, which behaves like a connection. Each end numbers its lives, upwards; a link is a pair of
//! lives, one of each end. A batch with messages belongs to one link: it names both lives, and its sequence number counts
//! from 1. A batch for another pair of lives is dropped, and its sender is sent the current life. Until both ends know
//! both lives, they exchange only batches without messages and with the sequence number 0.
//!
//! A repeated batch is dropped, so carriers may retry. A gap in the sequence means that messages were lost: the link
//! breaks, and the end that detects it begins a new life. The other end keeps its own, so that two ends that break at the
//! same time do not restart each other without end.
//!
//! Nothing here waits or performs I/O: a backend takes batches to send and hands in batches that it has received.

use std::{
    collections::{HashMap, VecDeque},
    task::{Context, Poll, Waker},
};

use bytes::{BufMut, Bytes, BytesMut};
use parking_lot::{Mutex, MutexGuard};
use tokio::sync::Notify;

use super::{
    inbox::{Inbox, InboxEvent, InboxSender},
    message::{MessageKind, Priority, SendOutcome},
    node_id::NodeId,
};

/// The version of batches that this node writes, and the highest that it reads.
const VERSION: u8 = 1;

const HEAD: usize = 25;
const MESSAGE_HEAD: usize = 5;
/// Bytes of a batch, unless a single message is larger.
const BATCH_BYTES: usize = 256 << 10;
/// Bytes in the send queue of one peer beyond which messages of [normal priority](Priority::Normal) are rejected.
const SOFT_LIMIT: usize = 4 << 20;
/// Bytes in the send queue of one peer beyond which all messages are rejected.
const HARD_LIMIT: usize = 32 << 20;

/// The links of one node.
pub struct PeerLinks {
    state: Mutex<PeerLinksState>,
    changed: Notify,
}

struct PeerLinksState {
    me: NodeId,
    links: HashMap<NodeId, PeerLink>,
    /// Lives of this end so far, over all links.
    lives: u32,
    /// Peers with something to send and no batch in flight.
    due: VecDeque<NodeId>,
    inboxes: [InboxSender; MessageKind::ALL.len()],
    /// Tasks that wait until a peer's queue is shorter.
    writers: Vec<Waker>,
    /// Inboxes that have not been asked for yet: messages may arrive while this node is still starting.
    unclaimed: [Option<Inbox>; MessageKind::ALL.len()],
}

struct PeerLink {
    /// The life of this end.
    mine: u32,
    /// The life of the other end; 0 while unknown.
    yours: u32,
    next_in: u64,
    next_out: u64,
    /// Messages that wait.
    waiting: BytesMut,
    /// The batch in flight.
    in_flight: Option<Bytes>,
    /// The batch in flight may have reached the other end.
    maybe_sent: bool,
    /// A batch has to be sent even without messages: the other end has to learn of this life.
    announce: bool,
    /// The peer is in `due`.
    queued: bool,
}

/// A batch to be sent. There is one per peer at a time: the next one follows once [`PeerLinks::complete`] was called.
#[derive(Clone, Debug)]
pub struct MessageBatch {
    pub to: NodeId,
    pub bytes: Bytes,
}

/// The result of sending a batch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BatchOutcome {
    /// It was handed to the other node.
    Delivered,
    /// It certainly did not reach the other node.
    Undelivered,
    Unknown,
}

/// The result of receiving a batch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ReceiveOutcome {
    /// The sender is a peer; the batch was processed.
    Accepted,
    /// The sender is not a peer, and the batch was ignored. The caller may add the peer and try again.
    UnknownSender(NodeId),
    /// Not a batch.
    Malformed,
}

impl PeerLinks {
    pub fn new(me: NodeId) -> Self {
        let [(calls, one), (connections, two), (presence, three)] = MessageKind::ALL.map(|_| Inbox::new());
        let (inboxes, unclaimed) = ([one, two, three], [Some(calls), Some(connections), Some(presence)]);
        let state = PeerLinksState {
            me,
            links: HashMap::new(),
            lives: 0,
            due: VecDeque::new(),
            inboxes,
            writers: Vec::new(),
            unclaimed,
        };
        PeerLinks { state: Mutex::new(state), changed: Notify::new() }
    }

    /// See [`Cluster::inbox`](super::Cluster::inbox).
    pub fn inbox(&self, kind: MessageKind) -> Inbox {
        let mut state = self.state.lock();
        if let Some(inbox) = state.unclaimed[kind.index()].take() {
            return inbox;
        }
        let (inbox, sender) = Inbox::new();
        state.inboxes[kind.index()] = sender;
        inbox
    }

    /// Gives this node a new id, which removes all peers.
    pub fn reset(&self, me: NodeId) {
        let mut state = self.state.lock();
        state.me = me;
        let peers: Vec<NodeId> = state.links.keys().copied().collect();
        for peer in peers {
            state.remove_peer(peer);
        }
        wake_writers(state);
    }

    /// Starts exchanging messages with `peer`. False: it is a peer already, or this node itself.
    pub fn add_peer(&self, peer: NodeId) -> bool {
        let mut state = self.state.lock();
        if peer == state.me {
            return false;
        }
        let new = !state.links.contains_key(&peer);
        if new {
            let link = state.new_link();
            state.links.insert(peer, link);
        }
        // A peer that was known before can receive now, and may have missed the earlier announcement.
        if let Some(link) = state.links.get_mut(&peer) {
            link.announce |= link.yours == 0;
        }
        state.schedule(peer);
        drop(state);
        self.changed.notify_one();
        new
    }

    /// Ends the link to a node that is gone or cannot be reached. False: it was not a peer.
    pub fn remove_peer(&self, peer: NodeId) -> bool {
        let mut state = self.state.lock();
        let removed = state.remove_peer(peer);
        wake_writers(state);
        removed
    }

    pub fn has_peer(&self, node: NodeId) -> bool {
        self.state.lock().links.contains_key(&node)
    }

    /// See [`Cluster::send`](super::Cluster::send).
    pub fn send(&self, to: NodeId, kind: MessageKind, priority: Priority, message: &[u8]) -> SendOutcome {
        let mut state = self.state.lock();
        let Some(link) = state.links.get_mut(&to) else { return SendOutcome::NoSuchNode };
        let limit = match priority {
            Priority::Normal => SOFT_LIMIT,
            Priority::High => HARD_LIMIT,
        };
        if link.waiting.len() + message.len() > limit {
            return SendOutcome::Full;
        }
        link.waiting.put_u8(kind as u8);
        link.waiting.put_u32_le(message.len() as u32);
        link.waiting.put_slice(message);
        link.announce |= link.yours == 0;
        if state.schedule(to) {
            drop(state);
            self.changed.notify_one();
        }
        SendOutcome::Queued
    }

    /// See [`Cluster::poll_room`](super::Cluster::poll_room).
    pub fn poll_room(&self, to: NodeId, cx: &mut Context<'_>) -> Poll<()> {
        let mut state = self.state.lock();
        if state.links.get(&to).is_none_or(|link| link.waiting.len() < SOFT_LIMIT) {
            return Poll::Ready(());
        }
        if !state.writers.iter().any(|waker| waker.will_wake(cx.waker())) {
            state.writers.push(cx.waker().clone());
        }
        Poll::Pending
    }

    /// The next batch to send, if there is one.
    pub fn next_batch(&self) -> Option<MessageBatch> {
        let mut state = self.state.lock();
        let batch = state.next_batch();
        wake_writers(state);
        batch
    }

    /// Waits until there may be a [next batch](Self::next_batch). For one task only.
    pub(crate) async fn batch_ready(&self) {
        self.changed.notified().await;
    }

    /// To be called right before a batch is written. From then on it may have reached the other end. False: it must not be
    /// sent any more, because its link has ended and its messages were returned.
    pub fn begin_send(&self, batch: &MessageBatch) -> bool {
        let mut state = self.state.lock();
        let link = state.links.get_mut(&batch.to).filter(|link| link.carries(batch));
        link.map(|link| link.maybe_sent = true).is_some()
    }

    /// States that a batch has certainly not been sent yet, so that its messages are returned if the link ends now.
    pub fn not_sent(&self, batch: &MessageBatch) {
        if let Some(link) = self.state.lock().links.get_mut(&batch.to).filter(|link| link.carries(batch)) {
            link.maybe_sent = false;
        }
    }

    /// Ends the sending of a batch.
    pub fn complete(&self, batch: &MessageBatch, outcome: BatchOutcome) {
        let mut state = self.state.lock();
        let Some(link) = state.links.get_mut(&batch.to).filter(|link| link.carries(batch)) else { return };
        link.maybe_sent = outcome != BatchOutcome::Undelivered;
        match outcome {
            BatchOutcome::Delivered => {
                link.in_flight = None;
                state.schedule(batch.to);
            }
            BatchOutcome::Undelivered => {
                state.remove_peer(batch.to);
            }
            BatchOutcome::Unknown => state.break_link(batch.to),
        }
        wake_writers(state);
        self.changed.notify_one();
    }

    /// Processes a received batch.
    pub fn receive(&self, batch: &Bytes) -> ReceiveOutcome {
        let mut state = self.state.lock();
        let outcome = state.receive(batch);
        wake_writers(state);
        self.changed.notify_one();
        outcome
    }
}

impl PeerLink {
    fn new(mine: u32) -> Self {
        PeerLink {
            mine,
            yours: 0,
            next_in: 1,
            next_out: 1,
            waiting: BytesMut::new(),
            in_flight: None,
            maybe_sent: false,
            announce: false,
            queued: false,
        }
    }

    /// Whether `batch` is the batch in flight: the link may have been replaced by one with a batch of its own.
    fn carries(&self, batch: &MessageBatch) -> bool {
        self.in_flight.as_ref().is_some_and(|in_flight| in_flight.as_ptr() == batch.bytes.as_ptr())
    }

    /// Whether there is a batch to send, and none in flight.
    fn is_due(&self) -> bool {
        self.in_flight.is_none() && (self.announce || self.yours != 0 && !self.waiting.is_empty())
    }
}

impl PeerLinksState {
    fn new_link(&mut self) -> PeerLink {
        self.lives += 1;
        PeerLink::new(self.lives)
    }

    fn next_batch(&mut self) -> Option<MessageBatch> {
        loop {
            let to = self.due.pop_front()?;
            let me = self.me;
            let Some(link) = self.links.get_mut(&to) else { continue };
            link.queued = false;
            if !link.is_due() {
                continue;
            }
            let whole = if link.yours == 0 { 0 } else { first_batch(&link.waiting) };
            let messages = link.waiting.split_to(whole);
            let mut bytes = BytesMut::with_capacity(HEAD + messages.len());
            bytes.put_u8(VERSION);
            bytes.put_u64_le(me.0);
            bytes.put_u32_le(link.mine);
            bytes.put_u32_le(link.yours);
            bytes.put_u64_le(if messages.is_empty() { 0 } else { link.next_out });
            bytes.put_slice(&messages);
            link.next_out += u64::from(!messages.is_empty());
            link.announce = false;
            let bytes = bytes.freeze();
            (link.in_flight, link.maybe_sent) = (Some(bytes.clone()), true);
            return Some(MessageBatch { to, bytes });
        }
    }

    fn remove_peer(&mut self, peer: NodeId) -> bool {
        if !self.links.contains_key(&peer) {
            return false;
        }
        self.return_messages(peer);
        self.links.remove(&peer);
        self.notify_all(&InboxEvent::LinkLost { peer, gone: true });
        true
    }

    /// Returns the messages that have certainly not arrived.
    fn return_messages(&mut self, to: NodeId) {
        let Some(link) = self.links.get_mut(&to) else { return };
        let not_sent = link.in_flight.take().filter(|_| !link.maybe_sent).map(|batch| batch.slice(HEAD..));
        let waiting = std::mem::take(&mut link.waiting).freeze();
        for messages in not_sent.into_iter().chain([waiting]) {
            for (kind, body) in messages_in(&messages) {
                if let Some(kind) = kind {
                    self.inboxes[kind.index()].send(InboxEvent::Returned { to, body });
                }
            }
        }
    }

    /// Adds a link that has something to send to `due`. False: it has nothing, or was added before.
    fn schedule(&mut self, to: NodeId) -> bool {
        let Some(link) = self.links.get_mut(&to).filter(|link| link.is_due() && !link.queued) else { return false };
        link.queued = true;
        self.due.push_back(to);
        true
    }

    /// Begins a new life of this end, which the peer has to learn.
    fn break_link(&mut self, peer: NodeId) {
        let yours = self.links.get(&peer).map_or(0, |link| link.yours);
        let link = self.new_link();
        self.replace_link(peer, PeerLink { yours, announce: true, ..link });
    }

    fn replace_link(&mut self, peer: NodeId, link: PeerLink) {
        self.return_messages(peer);
        let queued = self.links.get(&peer).is_some_and(|link| link.queued);
        self.links.insert(peer, PeerLink { queued, ..link });
        self.schedule(peer);
        self.notify_all(&InboxEvent::LinkLost { peer, gone: false });
    }

    fn notify_all(&self, event: &InboxEvent) {
        for inbox in &self.inboxes {
            inbox.send(event.clone());
        }
    }

    fn receive(&mut self, batch: &Bytes) -> ReceiveOutcome {
        if batch.len() < HEAD {
            return ReceiveOutcome::Malformed;
        }
        // The sender's id is at the same offset in every version.
        let from = NodeId(number(&batch[1..9]));
        let Some(link) = self.links.get_mut(&from) else { return ReceiveOutcome::UnknownSender(from) };
        if batch[0] != VERSION {
            // Its content is unknown, so that messages count as lost: no call may go on waiting for them.
            self.break_link(from);
            return ReceiveOutcome::Accepted;
        }
        let field = |at: usize| number(&batch[at..at + 4]) as u32;
        let (mine, yours, seq) = (field(9), field(13), number(&batch[17..HEAD]));
        if mine < link.yours {
            // From a former life of the peer.
            return ReceiveOutcome::Accepted;
        }
        if mine > link.yours {
            match link.yours {
                0 => link.yours = mine,
                // The peer has begun a new life and lost the state of the former one.
                _ => {
                    let link = PeerLink::new(link.mine);
                    self.replace_link(from, PeerLink { yours: mine, ..link });
                }
            }
        }
        let Some(link) = self.links.get_mut(&from) else { return ReceiveOutcome::Accepted };
        link.announce |= yours != link.mine;
        if yours == link.mine && seq == link.next_in {
            link.next_in += 1;
            for (kind, body) in messages_in(&batch.slice(HEAD..)) {
                // Kinds of a later version are skipped.
                let Some(kind) = kind else { continue };
                if !self.inboxes[kind.index()].send(InboxEvent::Message { from, body }) {
                    self.break_link(from);
                    break;
                }
            }
        } else if yours == link.mine && seq > link.next_in {
            self.break_link(from);
        }
        self.schedule(from);
        ReceiveOutcome::Accepted
    }
}

/// Wakes the tasks that wait for shorter queues, after a change that may have shortened one.
fn wake_writers(mut state: MutexGuard<'_, PeerLinksState>) {
    let writers = std::mem::take(&mut state.writers);
    drop(state);
    writers.into_iter().for_each(Waker::wake);
}

/// The length of the messages at the start of `messages` that fit into one batch, at least one message.
fn first_batch(messages: &[u8]) -> usize {
    let mut end = 0;
    while messages.len() - end >= MESSAGE_HEAD {
        let next = end + MESSAGE_HEAD + number(&messages[end + 1..end + MESSAGE_HEAD]) as usize;
        if end > 0 && next > BATCH_BYTES {
            break;
        }
        end = next;
    }
    end.min(messages.len())
}

fn messages_in(messages: &Bytes) -> impl Iterator<Item = (Option<MessageKind>, Bytes)> {
    let mut rest = messages.clone();
    std::iter::from_fn(move || {
        if rest.len() < MESSAGE_HEAD {
            return None;
        }
        let kind = MessageKind::from_byte(rest[0]);
        let length = number(&rest[1..MESSAGE_HEAD]) as usize;
        if rest.len() < MESSAGE_HEAD + length {
            return None;
        }
        let body = rest.slice(MESSAGE_HEAD..MESSAGE_HEAD + length);
        rest = rest.slice(MESSAGE_HEAD + length..);
        Some((kind, body))
    })
}

fn number(bytes: &[u8]) -> u64 {
    bytes.iter().rev().fold(0, |number, byte| number << 8 | u64::from(*byte))
}
