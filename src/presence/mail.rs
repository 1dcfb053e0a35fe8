//! What nodes tell each other of their members: all of it when they meet or may have missed something, then what changes.

use std::{
    collections::{HashMap, VecDeque},
    sync::atomic::Ordering::Relaxed,
    time::Duration,
};

use bytes::Bytes;

use super::{
    About, Presence, Said, State,
    book::Name,
    pause,
    wire::{self, Mails, Note},
};
use crate::{
    channel::Channel,
    cluster::{InboxEvent, Member, MessageKind, NodeId, Priority, SendOutcome},
    position::Position,
};

/// Bytes of one mail, about.
const MAIL: usize = 48 << 10;
/// Between two rounds of mail, so that what comes together goes together.
const PAUSE: Duration = Duration::from_millis(10);
/// How often what could not be sent, or did not come, is looked at.
const LOOK: Duration = Duration::from_millis(100);
/// How long what a node held counts after its link broke, unless it says so again. Milliseconds.
const LOST: u64 = 15_000;
/// Mails that wait for one node; if there are more, it will be told all anew instead.
const BACKLOG: usize = 2_000;
/// When that is. Milliseconds.
const ANEW: u64 = 1_000;

/// Another node.
#[derive(Default)]
struct Node {
    /// It is to be told all, from this time on.
    greet: Option<u64>,
    /// Mail that does not fit yet.
    backlog: VecDeque<Bytes>,
    /// Since when it is not known whether it still holds what it said.
    lost: Option<u64>,
    /// What it says was announced, until it has said the whole of it: all of one event, or all that ever was.
    told: Vec<(Name, Option<About>)>,
    /// All that ever was, and up to where.
    all: Option<Vec<(Channel, Position)>>,
}

impl Presence {
    pub(super) async fn correspond(&self) {
        let (members, inbox) = (self.cluster.members(), self.cluster.inbox(MessageKind::Presence));
        let mut nodes: HashMap<NodeId, Node> = HashMap::new();
        loop {
            let waits =
                nodes.values().any(|node| node.greet.is_some() || node.lost.is_some() || !node.backlog.is_empty());
            tokio::select! {
                () = inbox.ready() => {}
                () = members.ready() => {}
                () = self.news.notified() => {}
                () = tokio::time::sleep(LOOK), if waits => {}
            }
            let now = self.now();
            // Before the mail: what went before somebody left is not to bring it back.
            let changed = members.take();
            for incoming in inbox.take() {
                self.take(incoming, &mut nodes, now);
            }
            for Member { node, up } in changed {
                if up {
                    nodes.entry(node).or_default().greet = Some(now);
                } else {
                    nodes.remove(&node);
                    self.state.lock().book.forget(node, now);
                }
            }
            for (id, node) in &mut nodes {
                if node.lost.is_some_and(|since| now >= since + LOST) {
                    node.lost = None;
                    self.state.lock().book.forget(*id, now);
                }
            }
            self.write(&mut nodes, now);
            for (id, node) in &mut nodes {
                self.send(*id, node, now);
            }
            pause(PAUSE).await;
        }
    }

    fn take(&self, incoming: InboxEvent, nodes: &mut HashMap<NodeId, Node>, now: u64) {
        match incoming {
            InboxEvent::Message { from, body: mail } => {
                let node = nodes.entry(from).or_insert_with(|| Node { greet: Some(now), ..Node::default() });
                let notes = wire::read(&mail);
                let mut state = self.state.lock();
                for note in notes {
                    self.hear(&mut state, from, node, note, now);
                }
            }
            InboxEvent::Returned { to, .. } => {
                if let Some(node) = nodes.get_mut(&to) {
                    node.greet.get_or_insert(now);
                }
            }
            InboxEvent::LinkLost { peer: with, .. } => {
                if let Some(node) = nodes.get_mut(&with) {
                    node.backlog.clear();
                    (node.told, node.all) = (Vec::new(), None);
                    node.greet = Some(now);
                    node.lost.get_or_insert(now);
                }
            }
        }
    }

    fn hear(&self, state: &mut State, from: NodeId, node: &mut Node, note: Note, now: u64) {
        let book = &mut state.book;
        match note {
            Note::All => book.begin_all(from),
            Note::Held(name, about) => book.hear(from, name, Some(about), now),
            Note::Gone(name) => book.hear(from, name, None, now),
            Note::That => {
                book.end_all(from, now);
                node.lost = None;
            }
            // Only one node announces, and hears of it from nobody.
            _ if book.leads() => {}
            Note::AllTold => (node.told, node.all) = (Vec::new(), Some(Vec::new())),
            Note::Told(name, about) => node.told.push((name, Some(about))),
            Note::Untold(name) => node.told.push((name, None)),
            Note::Upto(channel, at) => match &mut node.all {
                Some(all) => all.push((channel, at)),
                // A list that had a part of an event would be of no position.
                None => {
                    for (name, about) in node.told.drain(..) {
                        book.told(name, about.map(Into::into), now);
                    }
                    book.upto(&channel, at, now);
                }
            },
            Note::ThatTold => {
                let Some(all) = node.all.take() else { return };
                book.untell(now);
                for (name, about) in std::mem::take(&mut node.told) {
                    book.told(name, about.map(Into::into), now);
                }
                for (channel, at) in all {
                    book.upto(&channel, at, now);
                }
                self.sure.store(true, Relaxed);
            }
        }
    }

    /// Writes what each node is to be told.
    fn write(&self, nodes: &mut HashMap<NodeId, Node>, now: u64) {
        let mut state = self.state.lock();
        if std::mem::take(&mut state.anew) {
            nodes.values_mut().for_each(|node| node.greet = Some(now));
        }
        let greets = |node: &Node| node.greet.is_some_and(|at| at <= now);
        state.book.set_others(!nodes.is_empty());
        let (news, said) = (state.book.news(), std::mem::take(&mut state.said));
        let all = if nodes.values().any(greets) { self.all(&state) } else { Vec::new() };
        drop(state);
        let mut mails = Mails::new(MAIL);
        for ((channel, client), about) in &news {
            match about {
                Some(about) => mails.held((channel, client), about),
                None => mails.gone((channel, client)),
            }
        }
        for Said { channel, at, members } in &said {
            for (client, about) in members {
                mails.told((channel, client), about.as_deref());
            }
            mails.upto(channel, *at);
        }
        let news = mails.finish();
        for node in nodes.values_mut() {
            if greets(node) {
                node.greet = None;
                node.backlog = all.iter().cloned().collect();
            } else if node.greet.is_none() {
                node.backlog.extend(news.iter().cloned());
                if node.backlog.len() > BACKLOG.max(2 * all.len()) {
                    node.backlog = VecDeque::new();
                    node.greet = Some(now + ANEW);
                }
            }
        }
    }

    /// All that this node holds, and if it is the one that announces, all that was announced.
    fn all(&self, state: &State) -> Vec<Bytes> {
        let mut mails = Mails::new(MAIL);
        mails.all();
        for (channel, client, about) in state.book.all_own() {
            mails.held((channel, client), &about);
        }
        mails.that();
        if state.book.leads() {
            mails.all_told();
            for (channel, client, about) in state.book.all_told() {
                mails.told((channel, client), Some(about));
            }
            for (channel, at) in state.book.all_upto() {
                mails.upto(channel, at);
            }
            mails.that_told();
        }
        mails.finish()
    }

    fn send(&self, to: NodeId, node: &mut Node, now: u64) {
        while let Some(mail) = node.backlog.pop_front() {
            match self.cluster.send(to, MessageKind::Presence, Priority::Normal, &mail) {
                SendOutcome::Queued => {}
                SendOutcome::Full => return node.backlog.push_front(mail),
                // It will be up again, or never.
                SendOutcome::NoSuchNode => {
                    node.backlog = VecDeque::new();
                    node.lost.get_or_insert(now);
                }
            }
        }
    }
}
