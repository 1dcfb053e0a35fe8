//! [`Session`]: one client, by whatever it is connected: polls, a socket, or first the one and then the other.
//!
//! What is said on it is the affair of a [`Conversation`]. It is dropped as soon as the session is to end, so that what
//! it holds is free at once; the session itself may stay a moment for its last words to be read.

use std::{
    net::SocketAddr,
    sync::Arc,
    task::{Context, Poll, Waker},
    time::Duration,
};

use parking_lot::Mutex;

use super::{
    Settings,
    outbox::Outbox,
    packet::{Framing, Packet},
};
use crate::{
    auth::Identity,
    error::Code,
    metrics::{OpenConnection, Transport},
    net::timer::{Due, Timer, TimerWheel},
    node::Node,
    rpc::ProbeCallback,
    sessions::{ChannelSet, ConnectionRegistration},
};

/// Longer than anything that a session waits for: its seat on the wheel is there for those who call on it.
const LONG: Duration = Duration::from_secs(60 * 60);

/// What a session is about. Called by one task at a time, in the order of what the client sent.
pub trait Conversation: Send {
    /// A message of text.
    fn text(&mut self, text: &str) -> Result<(), Broken>;

    /// A message of bytes.
    fn bytes(&mut self, bytes: &[u8]) -> Result<(), Broken>;

    /// Some time has passed: a quarter of a second or so.
    fn tick(&mut self, now: u32) -> Result<(), Broken>;

    /// What this one waits for may have happened.
    fn woken(&mut self);

    /// The node goes: nothing new is taken on.
    fn leave(&mut self);

    /// An operator wants the client to go, and to stay away.
    fn kicked(&mut self);

    /// Whether nobody waits for it, nor it for anybody.
    fn is_quiet(&self) -> bool;
}

/// The client said what makes no sense: its session ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Broken;

/// The id of a session: nobody else may guess it.
pub type Sid = [u8; 20];

/// One client.
pub struct Session {
    pub sid: Sid,
    pub outbox: Arc<Outbox>,
    settings: Arc<Settings>,
    node: Arc<Node>,
    conversation: Mutex<Option<Box<dyn Conversation>>>,
    state: Mutex<State>,
}

struct State {
    stage: Stage,
    /// A poll is held; a body is being read.
    polled: bool,
    posted: bool,
    /// When the next ping is due; or, once it is `asked`, its answer.
    ping: u32,
    asked: bool,
    /// When a session whose last words were not read is forgotten. 0: it is not ending.
    until: u32,
    leaving: bool,
    kicked: bool,
    /// Who wants to know whether the client lives, and until when it has to say so.
    askers: Vec<(u32, ProbeCallback)>,
    /// The conversation is over, and nothing left of it.
    gone: bool,
    /// Until it is over.
    present: Option<Present>,
}

/// A client where connections are counted, listed and called on.
struct Present {
    connected: OpenConnection,
    registration: ConnectionRegistration,
    timer: Timer,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stage {
    Polling,
    /// A socket wants to take over from the polls.
    Upgrading,
    Socket,
    Over,
}

/// One of the two requests that a session has at a time; given back on drop.
pub struct Turn<'a> {
    session: &'a Session,
    poll: bool,
    done: bool,
}

// === impl Session ===

impl Session {
    pub fn new(settings: &Arc<Settings>, node: &Arc<Node>, framing: Framing, remote: Option<SocketAddr>) -> Arc<Self> {
        let now = node.timers.now();
        let connected = node.metrics.connected(Transport::SocketIo);
        let registration =
            node.sessions.register(Transport::SocketIo, &Identity::anonymous(), remote, ChannelSet::Empty);
        let mut timer = node.timers.timer(LONG);
        timer.set_owner(registration.number());
        Arc::new(Session {
            sid: new_sid(),
            settings: settings.clone(),
            node: node.clone(),
            outbox: Arc::new(Outbox::new(framing, settings.queued)),
            conversation: Mutex::new(None),
            state: Mutex::new(State {
                stage: if framing == Framing::Polling { Stage::Polling } else { Stage::Socket },
                polled: false,
                posted: false,
                ping: now + TimerWheel::ticks(settings.ping),
                asked: false,
                until: 0,
                leaving: false,
                kicked: false,
                askers: Vec::new(),
                gone: false,
                present: Some(Present { connected, registration, timer }),
            }),
        })
    }

    pub fn begin(&self, conversation: Box<dyn Conversation>) {
        *self.conversation.lock() = Some(conversation);
    }

    /// Something that the conversation waits for may have happened.
    pub fn wake(&self) {
        if let Some(conversation) = self.conversation.lock().as_deref_mut() {
            conversation.woken();
        }
    }

    /// Changes how it is listed.
    pub fn with_registration(&self, change: impl FnOnce(&ConnectionRegistration)) {
        if let Some(present) = &self.state.lock().present {
            change(&present.registration);
        }
    }

    pub fn stage(&self) -> Stage {
        self.state.lock().stage
    }

    pub fn sid(&self) -> &str {
        str::from_utf8(&self.sid).unwrap_or_default()
    }

    /// Takes one packet of an open session.
    pub fn receive(&self, packet: &Packet<'_>) -> Result<(), Broken> {
        let taken = match packet {
            Packet::Message(text) => self.with(|conversation| conversation.text(text)),
            Packet::Binary(bytes) => self.with(|conversation| conversation.bytes(bytes)),
            Packet::Pong | Packet::Noop => Ok(()),
            Packet::Close => {
                self.close_because(None);
                return Ok(());
            }
            // Heartbeats go the other way in this revision.
            Packet::Ping(_) | Packet::Upgrade => Err(Broken),
        };
        match taken {
            Ok(()) if !self.outbox.is_ending() => {}
            Ok(()) => self.end(),
            Err(Broken) => self.close(Code::Protocol),
        }
        taken
    }

    fn with(&self, act: impl FnOnce(&mut dyn Conversation) -> Result<(), Broken>) -> Result<(), Broken> {
        match self.conversation.lock().as_deref_mut() {
            Some(conversation) => act(conversation),
            None => Ok(()),
        }
    }

    /// The client has sent something.
    pub fn heard(&self) {
        let mut state = self.state.lock();
        if state.asked {
            state.asked = false;
            state.ping = self.node.timers.now() + TimerWheel::ticks(self.settings.ping);
        }
        if !state.askers.is_empty() {
            let askers = std::mem::take(&mut state.askers);
            drop(state);
            tell(askers, true);
        }
    }

    /// Finds out whether the client lives. One that says nothing in time is gone: its session is closed, and what it held is
    /// free, before that is told.
    pub fn probe(&self, told: ProbeCallback) {
        let mut state = self.state.lock();
        if state.gone {
            drop(state);
            return told(false);
        }
        let until = self.node.timers.now() + TimerWheel::ticks(self.settings.probe) + 1;
        state.askers.push((until, told));
        drop(state);
        self.outbox.text("2");
    }

    /// Looks at the clock. False: the session is over, and to be forgotten.
    pub fn tick(&self) -> bool {
        let now = self.node.timers.now();
        let mut state = self.state.lock();
        if state.stage == Stage::Over {
            return false;
        }
        let unanswered = state.asked && now >= state.ping || state.askers.iter().any(|(until, _)| now >= *until);
        if state.until != 0 && now >= state.until || unanswered {
            drop(state);
            self.close(Code::DeadPeer);
            return false;
        }
        let ping = now >= state.ping && state.until == 0;
        if ping {
            state.asked = true;
            state.ping = now + TimerWheel::ticks(self.settings.ping_timeout);
        }
        let call = state.present.as_mut().and_then(Present::called);
        let ending = state.until != 0;
        state.kicked |= call == Some(Due::Kicked);
        drop(state);
        match call {
            Some(Due::Leave) => self.leave(),
            Some(Due::Kicked) => {
                if let Some(conversation) = self.conversation.lock().as_deref_mut() {
                    conversation.kicked();
                }
            }
            Some(Due::Time) | None => {}
        }
        if ping {
            self.outbox.relax();
            self.outbox.text("2");
        }
        if ending {
            return true;
        }
        let leaving = self.is_leaving();
        let quiet = leaving && self.conversation.lock().as_ref().is_none_or(|conversation| conversation.is_quiet());
        if quiet || leaving && self.node.timers.draining_for() >= self.settings.grace {
            self.outbox.finish();
        }
        let ticked = self.with(|conversation| conversation.tick(now));
        match ticked {
            Ok(()) if self.outbox.is_ending() => self.end(),
            Ok(()) => {}
            Err(Broken) => self.close(Code::Protocol),
        }
        true
    }

    /// This session's turn to go, in a drain.
    fn leave(&self) {
        if !std::mem::replace(&mut self.state.lock().leaving, true)
            && let Some(conversation) = self.conversation.lock().as_deref_mut()
        {
            conversation.leave();
        }
    }

    pub fn is_leaving(&self) -> bool {
        self.state.lock().leaving
    }

    /// Nothing more is done for the client; what waits for it is still delivered.
    fn end(&self) {
        let mut state = self.state.lock();
        if state.until == 0 {
            state.until = self.node.timers.now() + TimerWheel::ticks(self.settings.farewell);
        }
        drop(state);
        self.forget();
    }

    /// Ends at once, from our side.
    pub fn close(&self, code: Code) {
        self.close_because(Some(code));
    }

    /// Ends at once; without a code the client left.
    pub fn close_because(&self, code: Option<Code>) {
        let mut state = self.state.lock();
        if state.stage == Stage::Over {
            return;
        }
        state.stage = Stage::Over;
        // Whoever was kicked has left by itself, if it is polite.
        let code = if state.kicked { Some(Code::Kicked) } else { code };
        let mut present = state.present.take();
        if let Some(Present { connected, .. }) = &mut present {
            match code {
                Some(code) => connected.closed_with(code),
                None => connected.closed_by_peer(),
            }
        }
        drop(state);
        drop(present);
        self.outbox.close();
        self.forget();
    }

    fn forget(&self) {
        // Not under its own lock: it says goodbye to others.
        let Some(conversation) = self.conversation.lock().take() else { return };
        drop(conversation);
        // What it held is free by now: that is what they wait for.
        let mut state = self.state.lock();
        state.gone = true;
        let askers = std::mem::take(&mut state.askers);
        drop(state);
        tell(askers, false);
    }

    // --- polls ---

    /// Begins a poll, or the reading of a body. `None`: there is one already, or the client reads elsewhere.
    pub fn begin_request(&self, poll: bool) -> Option<Turn<'_>> {
        let mut state = self.state.lock();
        if !matches!(state.stage, Stage::Polling | Stage::Upgrading) {
            return None;
        }
        let busy = if poll { &mut state.polled } else { &mut state.posted };
        // Lazily: a turn that is not taken must not be given back.
        (!std::mem::replace(busy, true)).then(|| Turn { session: self, poll, done: false })
    }

    // --- upgrade ---

    /// A socket wants to take over. False: one does already, or has.
    pub fn begin_upgrade(&self) -> bool {
        let mut state = self.state.lock();
        let may = state.stage == Stage::Polling && state.until == 0;
        if may {
            state.stage = Stage::Upgrading;
        }
        may
    }

    /// The socket did not make it.
    pub fn give_up_upgrade(&self) {
        let mut state = self.state.lock();
        if state.stage == Stage::Upgrading {
            state.stage = Stage::Polling;
            drop(state);
            self.outbox.upgrading(false);
        }
    }

    /// The socket has taken over. False: the session has ended meanwhile.
    pub fn upgrade(&self) -> bool {
        let mut state = self.state.lock();
        if state.stage != Stage::Upgrading {
            return false;
        }
        state.stage = Stage::Socket;
        drop(state);
        self.outbox.upgrade();
        true
    }
}

impl Present {
    /// Whether somebody calls on it to go. It is asked often enough to need no waker.
    fn called(&mut self) -> Option<Due> {
        loop {
            match self.timer.poll(&mut Context::from_waker(Waker::noop())) {
                Poll::Ready(Due::Time) => self.timer.reset(LONG),
                Poll::Ready(due) => return Some(due),
                Poll::Pending => return None,
            }
        }
    }
}

impl Turn<'_> {
    /// The request is answered as it should be.
    pub fn done(mut self) {
        self.done = true;
    }
}

impl Drop for Turn<'_> {
    fn drop(&mut self) {
        let mut state = self.session.state.lock();
        match self.poll {
            true => state.polled = false,
            false => state.posted = false,
        }
        drop(state);
        if !self.done {
            // The client hung up on a held poll, or in the middle of a body: it is gone, and its name is free.
            self.session.close_because(None);
        }
    }
}

fn tell(askers: Vec<(u32, ProbeCallback)>, alive: bool) {
    askers.into_iter().for_each(|(_, told)| told(alive));
}

/// As the original's look.
pub fn new_sid() -> Sid {
    const LETTERS: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_";
    let mut sid = [0; 20];
    let mut filled = 0;
    while filled < sid.len() {
        // Interrupted, or before the kernel has any: it will.
        filled += rustix::rand::getrandom(&mut sid[filled..], rustix::rand::GetRandomFlags::empty()).unwrap_or(0);
    }
    sid.map(|byte| LETTERS[usize::from(byte & 63)])
}
