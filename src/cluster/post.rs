//! [`Post`]: mail between nodes over any way that carries bytes, may lose them, but keeps their order.
//!
//! ```text
//! batch   version:1 · from:8 · mine:4 · yours:4 · seq:8 · mail*        little endian
//! mail    topic:1 · length:4 · bytes
//! ```
//!
//! Two nodes have a **link**, which is like a connection. Each end numbers its lives, upwards; a link is a pair of them, one
//! of each end. A batch with mail is for one link: it names both lives, and counts from 1. What is for another is dropped,
//! and its sender told which life there is now. Until both ends know both lives only that is said, in batches without mail
//! and number.
//!
//! A batch that repeats is dropped, so whoever sends may try again. A number left out means that something was lost: the link
//! breaks, and this end begins a new life. The other end goes on in its own, so that two who break at once do not chase each
//! other.
//!
//! Nothing here waits and nothing knows how bytes travel: a backend takes what is to be sent and brings what comes.

use std::collections::{HashMap, VecDeque};

use bytes::{BufMut, Bytes, BytesMut};
use parking_lot::Mutex;
use tokio::sync::Notify;

use super::{Incoming, Mailbox, NodeId, Sent, Topic, Weight, mailbox::Slot};

/// The version of batches that this node writes, and the highest that it reads.
pub const VERSION: u8 = 1;

const HEAD: usize = 25;
const MAIL_HEAD: usize = 5;
/// Bytes of a batch, unless one mail is larger.
const BATCH: usize = 256 << 10;
/// Bytes that wait for one node, beyond which mail that [`May`](Weight::May) be refused is.
const SOFT: usize = 4 << 20;
/// And beyond which all is.
const HARD: usize = 32 << 20;

/// One node's mail, both ways.
pub struct Post {
    state: Mutex<State>,
    some: Notify,
}

struct State {
    me: NodeId,
    links: HashMap<NodeId, Link>,
    /// Lives of links so far.
    lives: u32,
    /// Nodes for which something waits and nothing is under way.
    due: VecDeque<NodeId>,
    boxes: [Slot; Topic::ALL.len()],
    /// Mailboxes nobody has asked for yet: others may be quicker with their mail than this node is with its start.
    kept: [Option<Mailbox>; Topic::ALL.len()],
}

struct Link {
    mine: u32,
    /// 0: not known yet.
    yours: u32,
    next_in: u64,
    next_out: u64,
    /// Mail that waits.
    waiting: BytesMut,
    /// The batch that is under way.
    flying: Option<Bytes>,
    /// It may have reached the other end.
    out: bool,
    /// A batch has to go out even if it is empty: the other end has to learn of this life.
    hello: bool,
    /// Is among those that are due.
    queued: bool,
}

/// A batch to be sent. One per node at a time: [`Post::landed`] says when the next may go.
#[derive(Clone, Debug)]
pub struct Batch {
    pub to: NodeId,
    pub bytes: Bytes,
}

/// What became of a batch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Landed {
    /// It was handed to the other node.
    Taken,
    /// Surely nobody got it.
    Nobody,
    /// Nobody knows.
    Unknown,
}

/// Who sent a batch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Received {
    /// A member, and what it sent is where it belongs.
    Member,
    /// Nobody that was admitted. Nothing was done: admit it and try again, or leave it.
    Stranger(NodeId),
    /// No batch at all.
    Unreadable,
}

impl Post {
    pub fn new(me: NodeId) -> Self {
        let [(calls, one), (connections, two), (presence, three)] = Topic::ALL.map(|_| Mailbox::new());
        let (boxes, kept) = ([one, two, three], [Some(calls), Some(connections), Some(presence)]);
        let state = State { me, links: HashMap::new(), lives: 0, due: VecDeque::new(), boxes, kept };
        Post { state: Mutex::new(state), some: Notify::new() }
    }

    pub fn mailbox(&self, topic: Topic) -> Mailbox {
        let mut state = self.state.lock();
        if let Some(mailbox) = state.kept[topic.index()].take() {
            return mailbox;
        }
        let (mailbox, slot) = Mailbox::new();
        state.boxes[topic.index()] = slot;
        mailbox
    }

    /// From now on this node is known to others as `me`: no link survives.
    pub fn reborn(&self, me: NodeId) {
        let mut state = self.state.lock();
        state.me = me;
        let nodes: Vec<NodeId> = state.links.keys().copied().collect();
        for node in nodes {
            state.expel(node);
        }
    }

    /// Mail to and from `node` goes its way from now on.
    /// True: it did not before.
    pub fn admit(&self, node: NodeId) -> bool {
        let mut state = self.state.lock();
        if node == state.me {
            return false;
        }
        let new = !state.links.contains_key(&node);
        if new {
            let link = state.new_link();
            state.links.insert(node, link);
        }
        // Also to one that was here before: it listens now, and what was said may have been lost.
        if let Some(link) = state.links.get_mut(&node) {
            link.hello |= link.yours == 0;
        }
        state.schedule(node);
        drop(state);
        self.some.notify_one();
        new
    }

    /// `node` is gone, or cannot be reached. True: it was there.
    pub fn expel(&self, node: NodeId) -> bool {
        self.state.lock().expel(node)
    }

    pub fn knows(&self, node: NodeId) -> bool {
        self.state.lock().links.contains_key(&node)
    }

    pub fn links(&self) -> usize {
        self.state.lock().links.len()
    }

    pub fn send(&self, to: NodeId, topic: Topic, weight: Weight, mail: &[u8]) -> Sent {
        let mut state = self.state.lock();
        let Some(link) = state.links.get_mut(&to) else { return Sent::NoSuchNode };
        let most = match weight {
            Weight::May => SOFT,
            Weight::Must => HARD,
        };
        if link.waiting.len() + mail.len() > most {
            return Sent::Full;
        }
        link.waiting.put_u8(topic as u8);
        link.waiting.put_u32_le(mail.len() as u32);
        link.waiting.put_slice(mail);
        link.hello |= link.yours == 0;
        if state.schedule(to) {
            drop(state);
            self.some.notify_one();
        }
        Sent::Taken
    }

    /// The next batch, if there is one.
    pub fn next(&self) -> Option<Batch> {
        self.state.lock().next()
    }

    /// Waits until there may be a next batch. For one task.
    pub async fn some(&self) {
        self.some.notified().await;
    }

    /// Asks, right before it goes out, whether a batch is still to be sent: its link may be over, and its mail have come
    /// back. From here on it may have reached the other end.
    pub fn may_go(&self, batch: &Batch) -> bool {
        let mut state = self.state.lock();
        let link = state.links.get_mut(&batch.to).filter(|link| link.carries(batch));
        link.map(|link| link.out = true).is_some()
    }

    /// Says that a batch surely has not gone out yet. Its mail comes back if the link ends now.
    pub fn stays(&self, batch: &Batch) {
        if let Some(link) = self.state.lock().links.get_mut(&batch.to).filter(|link| link.carries(batch)) {
            link.out = false;
        }
    }

    /// What became of the batch under way to `batch.to`.
    pub fn landed(&self, batch: &Batch, landed: Landed) {
        let mut state = self.state.lock();
        let Some(link) = state.links.get_mut(&batch.to).filter(|link| link.carries(batch)) else { return };
        link.out = landed != Landed::Nobody;
        match landed {
            Landed::Taken => {
                link.flying = None;
                state.schedule(batch.to);
            }
            Landed::Nobody => {
                state.expel(batch.to);
            }
            Landed::Unknown => state.broken(batch.to),
        }
        drop(state);
        self.some.notify_one();
    }

    /// Takes what came.
    pub fn receive(&self, batch: &Bytes) -> Received {
        let mut state = self.state.lock();
        let received = state.receive(batch);
        drop(state);
        self.some.notify_one();
        received
    }
}

impl Link {
    fn new(mine: u32) -> Self {
        Link {
            mine,
            yours: 0,
            next_in: 1,
            next_out: 1,
            waiting: BytesMut::new(),
            flying: None,
            out: false,
            hello: false,
            queued: false,
        }
    }

    /// Whether this is the batch under way: the link may have been broken, and be a new one by now with one of its own.
    fn carries(&self, batch: &Batch) -> bool {
        self.flying.as_ref().is_some_and(|flying| flying.as_ptr() == batch.bytes.as_ptr())
    }

    /// Has something to send.
    fn is_due(&self) -> bool {
        self.flying.is_none() && (self.hello || self.yours != 0 && !self.waiting.is_empty())
    }
}

impl State {
    fn new_link(&mut self) -> Link {
        self.lives += 1;
        Link::new(self.lives)
    }

    fn next(&mut self) -> Option<Batch> {
        loop {
            let to = self.due.pop_front()?;
            let me = self.me;
            let Some(link) = self.links.get_mut(&to) else { continue };
            link.queued = false;
            if !link.is_due() {
                continue;
            }
            let whole = if link.yours == 0 { 0 } else { first_batch(&link.waiting) };
            let mails = link.waiting.split_to(whole);
            let mut bytes = BytesMut::with_capacity(HEAD + mails.len());
            bytes.put_u8(VERSION);
            bytes.put_u64_le(me.0);
            bytes.put_u32_le(link.mine);
            bytes.put_u32_le(link.yours);
            bytes.put_u64_le(if mails.is_empty() { 0 } else { link.next_out });
            bytes.put_slice(&mails);
            link.next_out += u64::from(!mails.is_empty());
            link.hello = false;
            let bytes = bytes.freeze();
            (link.flying, link.out) = (Some(bytes.clone()), true);
            return Some(Batch { to, bytes });
        }
    }

    fn expel(&mut self, node: NodeId) -> bool {
        if !self.links.contains_key(&node) {
            return false;
        }
        self.bounce_all(node);
        self.links.remove(&node);
        self.tell_all(&Incoming::Lost { with: node, gone: true });
        true
    }

    /// Gives back what surely did not arrive.
    fn bounce_all(&mut self, to: NodeId) {
        let Some(link) = self.links.get_mut(&to) else { return };
        let under_way = link.flying.take().filter(|_| !link.out).map(|batch| batch.slice(HEAD..));
        let waiting = std::mem::take(&mut link.waiting).freeze();
        for mails in under_way.into_iter().chain([waiting]) {
            for (topic, mail) in split(&mails) {
                if let Some(topic) = topic {
                    self.boxes[topic.index()].put(Incoming::Returned { to, mail });
                }
            }
        }
    }

    /// Puts a link among those that are due, if it is. True: it was not there.
    fn schedule(&mut self, to: NodeId) -> bool {
        let Some(link) = self.links.get_mut(&to).filter(|link| link.is_due() && !link.queued) else { return false };
        link.queued = true;
        self.due.push_back(to);
        true
    }

    /// A new life for this end, of which the other has to be told.
    fn broken(&mut self, with: NodeId) {
        let yours = self.links.get(&with).map_or(0, |link| link.yours);
        let link = self.new_link();
        self.restart(with, Link { yours, hello: true, ..link });
    }

    /// The link is over, and `link` begins in its place.
    fn restart(&mut self, with: NodeId, link: Link) {
        self.bounce_all(with);
        let queued = self.links.get(&with).is_some_and(|link| link.queued);
        self.links.insert(with, Link { queued, ..link });
        self.schedule(with);
        self.tell_all(&Incoming::Lost { with, gone: false });
    }

    fn tell_all(&self, what: &Incoming) {
        for slot in &self.boxes {
            slot.put(what.clone());
        }
    }

    fn receive(&mut self, batch: &Bytes) -> Received {
        if batch.len() < HEAD {
            return Received::Unreadable;
        }
        // The sender stands in the same place in every version.
        let from = NodeId(number(&batch[1..9]));
        let Some(link) = self.links.get_mut(&from) else { return Received::Stranger(from) };
        if batch[0] != VERSION {
            // It may have said anything: no call may go on waiting for it.
            self.broken(from);
            return Received::Member;
        }
        let field = |at: usize| number(&batch[at..at + 4]) as u32;
        let (mine, yours, seq) = (field(9), field(13), number(&batch[17..HEAD]));
        if mine < link.yours {
            // Of a life that is over.
            return Received::Member;
        }
        if mine > link.yours {
            match link.yours {
                0 => link.yours = mine,
                // The other end began anew, and knows nothing of what was.
                _ => {
                    let link = Link::new(link.mine);
                    self.restart(from, Link { yours: mine, ..link });
                }
            }
        }
        let Some(link) = self.links.get_mut(&from) else { return Received::Member };
        link.hello |= yours != link.mine;
        if yours == link.mine && seq == link.next_in {
            link.next_in += 1;
            for (topic, mail) in split(&batch.slice(HEAD..)) {
                // Topics of a later version are left out.
                let Some(topic) = topic else { continue };
                if !self.boxes[topic.index()].put(Incoming::Mail { from, mail }) {
                    self.broken(from);
                    break;
                }
            }
        } else if yours == link.mine && seq > link.next_in {
            self.broken(from);
        }
        self.schedule(from);
        Received::Member
    }
}

/// How many of these bytes go into the next batch: whole mails.
fn first_batch(mails: &[u8]) -> usize {
    let mut end = 0;
    while mails.len() - end >= MAIL_HEAD {
        let next = end + MAIL_HEAD + number(&mails[end + 1..end + MAIL_HEAD]) as usize;
        if end > 0 && next > BATCH {
            break;
        }
        end = next;
    }
    end.min(mails.len())
}

fn split(mails: &Bytes) -> impl Iterator<Item = (Option<Topic>, Bytes)> {
    let mut rest = mails.clone();
    std::iter::from_fn(move || {
        if rest.len() < MAIL_HEAD {
            return None;
        }
        let topic = Topic::of(rest[0]);
        let length = number(&rest[1..MAIL_HEAD]) as usize;
        if rest.len() < MAIL_HEAD + length {
            return None;
        }
        let mail = rest.slice(MAIL_HEAD..MAIL_HEAD + length);
        rest = rest.slice(MAIL_HEAD + length..);
        Some((topic, mail))
    })
}

fn number(bytes: &[u8]) -> u64 {
    bytes.iter().rev().fold(0, |number, byte| number << 8 | u64::from(*byte))
}
