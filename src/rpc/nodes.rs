//! The other nodes: what they have, what they send, and what is over when one of them is gone.

use std::{
    collections::{HashMap, HashSet},
    sync::{
        Arc,
        atomic::Ordering::{Relaxed, SeqCst},
    },
};

use bytes::Bytes;
use parking_lot::Mutex;

use super::{
    Hub, HubConnection,
    link::Link,
    mail::{self, Called, Mail, Why},
    pending::{CallId, Conn, Registration},
    provide::Heard,
    route::{Refused, Tried},
    services::Info,
};
use crate::{
    cluster::{Inbox, InboxEvent, Members, NodeId, Priority, Roster, RosterEntry},
    error::Code,
};

/// How often a link with open calls shows that it is whole, in milliseconds.
const BEAT: u64 = 1_000;

/// What the hub reads of the cluster.
pub(super) struct Nodes {
    members: Members,
    roster: Roster,
    inbox: Inbox,
    table: Mutex<HashMap<NodeId, Node>>,
}

#[derive(Default)]
struct Node {
    /// None: it cannot be reached.
    line: Option<Line>,
    /// What it told of its services.
    has: HashMap<Arc<str>, (u64, Info)>,
}

/// A link and its hold on this hub: providers and callers of the other node.
#[derive(Clone)]
struct Line {
    link: Arc<Link>,
    connection: Arc<HubConnection>,
}

impl Nodes {
    pub fn new(members: Members, roster: Roster, inbox: Inbox) -> Self {
        Nodes { members, roster, inbox, table: Mutex::default() }
    }

    /// Other nodes that can be reached.
    pub fn links(&self) -> usize {
        self.table.lock().values().filter(|node| node.line.is_some()).count()
    }
}

impl Hub {
    /// Attends to the other nodes for as long as it is polled.
    pub async fn run_links(self: &Arc<Self>) {
        loop {
            tokio::select! {
                () = self.nodes.inbox.ready() => {}
                () = self.nodes.members.ready() => {}
                () = self.nodes.roster.ready() => {}
            }
            self.exchange();
        }
    }

    /// Takes in what has come from other nodes. True: there was something.
    pub fn exchange(self: &Arc<Self>) -> bool {
        // Members first: whose link was lost and who is up again is not to be seen as up and then lost.
        let members = self.nodes.members.take();
        let mail = self.nodes.inbox.take();
        let roster = self.nodes.roster.take();
        let some = !(mail.is_empty() && members.is_empty() && roster.is_empty());
        let mut cancelled: HashMap<NodeId, HashSet<u64>> = HashMap::new();
        for incoming in mail {
            match incoming {
                InboxEvent::Message { from, body: mail } => {
                    self.metrics.mail_received.add(1);
                    match Mail::read(&mail) {
                        Some(Mail::Cancel { id }) => {
                            cancelled.entry(from).or_default().insert(id);
                        }
                        Some(read) => self.read(from, &mail, read),
                        None => {}
                    }
                }
                // What was still to be returned came before this.
                InboxEvent::Returned { to, body: mail } => self.undelivered(to, &mail),
                InboxEvent::LinkLost { peer: with, gone } => {
                    self.metrics.links_lost.add(1);
                    cancelled.remove(&with);
                    self.hang_up(with);
                    if !gone {
                        self.line(with);
                    }
                }
            }
        }
        // All at once: a caller that goes may have a thousand calls.
        for (node, ids) in cancelled {
            if let Some(line) = self.known_line(node) {
                line.connection.forget(&ids);
            }
        }
        for member in members {
            if member.up {
                self.line(member.node);
            } else {
                self.hang_up(member.node);
            }
        }
        for holding in roster {
            self.learn(holding);
        }
        self.nodes.table.lock().retain(|_, node| node.line.is_some() || !node.has.is_empty());
        some
    }

    /// Shows the other ends of links with open calls that this one is whole, and whether all it sent has come.
    pub(super) fn beat(&self, now: u64) {
        let lines: Vec<Line> = self.nodes.table.lock().values().filter_map(|node| node.line.clone()).collect();
        for Line { link, connection } in lines {
            let quiet = link.sent.load(Relaxed).min(link.heard.load(Relaxed)).max(link.beat.load(Relaxed));
            if now < quiet + BEAT {
                continue;
            }
            if !link.open.load(SeqCst) && connection.in_flight() == 0 {
                continue;
            }
            link.open.store(false, SeqCst);
            let open = connection.in_flight() > 0 || connection.has_calls();
            if open {
                link.open.store(true, SeqCst);
                link.beat.store(now, Relaxed);
                link.send(Priority::High, mail::BEAT_MAIL);
            }
        }
    }

    fn known_line(&self, node: NodeId) -> Option<Line> {
        self.nodes.table.lock().get(&node)?.line.clone()
    }

    /// The link to `node`, with all that it is known to have.
    fn line(self: &Arc<Self>, node: NodeId) -> Line {
        if let Some(line) = self.known_line(node) {
            return line;
        }
        let link = Arc::new(Link::new(self, node));
        let conn = Arc::new(Conn::new(link.clone(), usize::MAX, Some(node)));
        let line = Line { link, connection: Arc::new(HubConnection::new(self.clone(), conn)) };
        let has: Vec<_> = {
            let mut table = self.nodes.table.lock();
            let entry = table.entry(node).or_default();
            entry.line = Some(line.clone());
            entry.has.iter().map(|(name, (rev, info))| (name.clone(), *rev, info.clone())).collect()
        };
        for (name, rev, info) in has {
            self.set_far(&line.connection, &name, rev, &info);
        }
        line
    }

    /// The link is over: calls with that node fail, its own are given up.
    fn hang_up(&self, node: NodeId) {
        let line = self.nodes.table.lock().get_mut(&node).and_then(|node| node.line.take());
        drop(line);
        // Whoever asked it for a name need not wait.
        self.asks.lock().retain(|_, (asked, _)| *asked != node);
    }

    fn learn(self: &Arc<Self>, holding: RosterEntry) {
        let RosterEntry { name, node, rev, info } = holding;
        let Some(service) = name.strip_prefix(Self::PREFIX) else { return };
        let info: Option<Info> = info.and_then(|info: Bytes| serde_json::from_slice(&info).ok());
        let line = {
            let mut table = self.nodes.table.lock();
            let entry = table.entry(node).or_default();
            match &info {
                Some(info) => entry.has.insert(service.into(), (rev, info.clone())),
                None => entry.has.remove(service),
            };
            entry.line.clone()
        };
        let Some(line) = line else { return };
        match info {
            Some(info) => self.set_far(&line.connection, service, rev, &info),
            None => {
                let Some(service) = self.find(service) else { return };
                let mut state = service.state.lock();
                let after = state.unset_far(&line.connection.conn, None);
                if after.is_some() {
                    self.touched(&service, &mut state);
                }
                drop(state);
                self.after(&service, after.unwrap_or_default());
                self.forget(&service, self.clock.now(), false);
            }
        }
    }

    fn set_far(&self, connection: &HubConnection, name: &str, rev: u64, info: &Info) {
        loop {
            let service = self.find_or_create(name);
            let mut provides = connection.conn.provides.lock();
            let mut state = service.state.lock();
            if state.dead {
                continue;
            }
            let slot = provides.vacant_key() as u32;
            if let Some(provider) = state.set_far(&connection.conn, slot, rev, info) {
                provides.insert(Registration { service: service.clone(), provider });
            }
            self.touched(&service, &mut state);
            drop(state);
            drop(provides);
            return self.flush(&service);
        }
    }

    fn read(self: &Arc<Self>, from: NodeId, mail: &Bytes, read: Mail<'_>) {
        let line = self.line(from);
        line.link.heard.store(self.clock.now(), Relaxed);
        match read {
            Mail::Call(called) => {
                if let Err(why) = line.connection.accept(&called) {
                    line.link.send(Priority::High, &mail::give_back(why, mail));
                }
            }
            Mail::Reply { tag, load, answer } => {
                let Some((id, service)) = mail::read_tag(tag) else { return };
                match self.find(service) {
                    Some(service) => line.connection.reply_of(&service, id, load, answer),
                    None => line.connection.reply(id, answer),
                };
            }
            Mail::Return { why, mail } => {
                if let Some(Mail::Call(called)) = Mail::read(mail) {
                    self.returned(&line, from, called, why);
                }
            }
            Mail::Ask(ask) => {
                let (link, number) = (line.link.clone(), ask.ask);
                self.is_held(
                    &ask,
                    Box::new(move |held| {
                        link.send(Priority::High, &mail::told(number, held));
                    }),
                );
            }
            Mail::Told { ask, held } => {
                let asked = self.asks.lock().remove(&ask);
                if let Some((_, asked)) = asked {
                    // Who asked may have left.
                    let _ = asked.send(if held { Heard::Held } else { Heard::Free });
                }
            }
            Mail::Beat { back: false } => {
                line.link.send(Priority::High, mail::BEAT_BACK_MAIL);
            }
            Mail::Beat { back: true } | Mail::Cancel { .. } => {}
        }
    }

    /// Mail to `node` that surely nobody has read.
    fn undelivered(self: &Arc<Self>, node: NodeId, mail: &Bytes) {
        let Some(line) = self.known_line(node) else { return };
        match Mail::read(mail) {
            Some(Mail::Call(called)) => self.returned(&line, node, called, Why::NotHere),
            Some(Mail::Ask(ask)) => {
                self.asks.lock().remove(&ask.ask);
            }
            _ => {}
        }
    }

    /// A call came back, unread by any provider: it goes elsewhere, or waits, or fails.
    fn returned(&self, line: &Line, from: NodeId, called: Called<'_>, why: Why) {
        let conn = &line.connection.conn;
        let Some(service) = self.find(called.service) else { return };
        let (provider, entry, mut tried) = {
            let state = service.state.lock();
            let placed = called.id.map(CallId::from_number).map(|id| (id, state.with(id, conn)));
            let (provider, entry) = match placed {
                Some((id, Some((provider, seq)))) => (provider, Some((id.index(), seq))),
                // Given up meanwhile.
                Some((_, None)) => return,
                None => match state.far(conn) {
                    Some(provider) => (provider, None),
                    None => (u32::MAX, None),
                },
            };
            let keys = state.keys_of(&called.tried);
            (provider, entry, Tried { keys, nodes: called.tried })
        };
        let refused = match why {
            Why::Busy => {
                tried.nodes.push(from);
                service.state.lock().heard_full(conn, self.clock.now());
                Refused::Full
            }
            Why::NotHere => Refused::NotThere { rev: called.rev },
        };
        let request = called.request;
        let failed = match self.elsewhere(&service, conn, provider, refused, &request, entry, &mut tried) {
            Ok(None) => None,
            Ok(Some(target)) => self.try_deliver(&service, target, &request, entry, &mut tried),
            Err(failed) => Some(failed),
        };
        if let Some((done, error)) = failed {
            self.settle(&done, super::CallAnswer::Failed(error));
        }
    }
}

// === impl HubConnection: of a link ===

impl HubConnection {
    /// Places a call of another node with a provider here.
    ///
    /// # Errors
    /// Nobody here has got it, nor will.
    fn accept(&self, called: &Called<'_>) -> Result<(), Why> {
        let hub = &*self.hub;
        let service = hub.find(called.service).ok_or(Why::NotHere)?;
        let Some(id) = called.id else {
            let mut state = service.state.lock();
            let provider = state.pick(&[], true, true, hub.clock.now()).ok_or(Why::NotHere)?;
            let target = state.notify(provider);
            drop(state);
            hub.deliver(&service, target, &called.request, None);
            return Ok(());
        };
        let timeout = u32::try_from(called.left).unwrap_or(u32::MAX).max(1);
        let why = |code| if code == Code::Busy { Why::Busy } else { Why::NotHere };
        match self.enter_at(&service, mail::tag(id, called.service), timeout, &called.request) {
            Ok(None) => Ok(()),
            Ok(Some((done, error))) => match done.caller.take(done.live, done.seq) {
                Some(_) => Err(why(error.code())),
                None => Ok(()),
            },
            Err((_, Some(error))) => Err(why(error.code())),
            Err((_, None)) => Err(Why::NotHere),
        }
    }

    /// Gives up calls of another node, which expects no answer.
    fn forget(&self, ids: &HashSet<u64>) {
        let given_up: Vec<_> = {
            let mut live = self.conn.live.lock();
            let is_one = |tag: &[u8]| mail::read_tag(tag).is_some_and(|(id, _)| ids.contains(&id.number()));
            let found: Vec<usize> = live.iter().filter(|(_, call)| is_one(call.tag.id())).map(|(at, _)| at).collect();
            found.into_iter().map(|at| live.remove(at)).collect()
        };
        for call in given_up {
            self.hub.abandon(&call);
        }
    }

    /// Whether calls of this node are with the other.
    fn has_calls(&self) -> bool {
        let provides: Vec<_> =
            self.conn.provides.lock().iter().map(|(_, mine)| (mine.service.clone(), mine.provider)).collect();
        provides.iter().any(|(service, provider)| {
            let state = service.state.lock();
            state.is_of(*provider, &self.conn) && state.has_calls(*provider)
        })
    }
}
