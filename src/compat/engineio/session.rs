//! [`EngineSession`]: one client, connected by polls, by a WebSocket, or first by polls and then by a WebSocket.
//!
//! Its messages go to a [`SessionHandler`], which is dropped as soon as the session is to end, so that everything it
//! holds is released at once. The session itself may stay a moment, until its last packets are read.

use std::{
    net::SocketAddr,
    sync::Arc,
    task::{Context, Poll, Waker},
    time::Duration,
};

use parking_lot::Mutex;

use super::{
    outbox::PacketOutbox,
    packet::{EnginePacket, Framing},
    settings::EngineSettings,
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

/// Longer than anything that a session waits for: its timer exists only for drains and kicks.
const LONG: Duration = Duration::from_secs(60 * 60);

/// The protocol on top of a session. Called by one task at a time, in the order of the client's messages.
pub(crate) trait SessionHandler: Send {
    /// Handles a text message.
    fn on_text(&mut self, text: &str) -> Result<(), ProtocolError>;

    /// Handles a binary message.
    fn on_bytes(&mut self, bytes: &[u8]) -> Result<(), ProtocolError>;

    /// Called about every 250 ms, with the current tick.
    fn on_tick(&mut self, now: u32) -> Result<(), ProtocolError>;

    /// Called after [`EngineSession::wake`].
    fn on_wake(&mut self);

    /// The node drains: the handler accepts nothing new.
    fn on_leave(&mut self);

    /// An administrator disconnects the client, which should not reconnect.
    fn on_kick(&mut self);

    /// Whether nothing is in flight.
    fn is_quiet(&self) -> bool;

    /// Waits until others have taken what earlier messages of the client have caused. Until then none are read.
    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<()>;

    /// Ends the wait of [`poll_ready`](Self::poll_ready), which takes too long.
    fn abandon_wait(&mut self);
}

/// The client violated the protocol: its session ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct ProtocolError;

/// The id of a session, which must not be guessable.
pub(crate) type Sid = [u8; 20];

/// One client.
pub(crate) struct EngineSession {
    pub(super) sid: Sid,
    pub(crate) outbox: Arc<PacketOutbox>,
    settings: Arc<EngineSettings>,
    node: Arc<Node>,
    handler: Mutex<Option<Box<dyn SessionHandler>>>,
    state: Mutex<SessionState>,
}

struct SessionState {
    stage: SessionStage,
    /// A poll is waiting; a body is being read.
    polled: bool,
    posted: bool,
    /// The tick at which the next ping is due or, once the client is `pinged`, its answer.
    ping: u32,
    pinged: bool,
    /// The tick at which an ending session is removed, even if its last packets are not read. 0: it is not ending.
    until: u32,
    leaving: bool,
    kicked: bool,
    /// Liveness probes: the tick until which the client must answer, and the callback for the result.
    probes: Vec<(u32, ProbeCallback)>,
    /// The handler is dropped, and what it held is released.
    handler_dropped: bool,
    /// Until the session is over.
    listing: Option<SessionListing>,
}

/// Makes a session count as a connection, appear in the list, and receive drains and kicks.
struct SessionListing {
    connected: OpenConnection,
    registration: ConnectionRegistration,
    timer: Timer,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum SessionStage {
    Polling,
    /// A WebSocket is about to take over from polls.
    Upgrading,
    Socket,
    Over,
}

/// One of the two requests that a session may have at a time. Ends the session if it is dropped before it is done.
pub(crate) struct RequestGuard<'a> {
    session: &'a EngineSession,
    poll: bool,
    done: bool,
}

// === impl EngineSession ===

impl EngineSession {
    pub(crate) fn new(
        settings: &Arc<EngineSettings>,
        node: &Arc<Node>,
        framing: Framing,
        identity: &Identity,
        remote: Option<SocketAddr>,
    ) -> Arc<Self> {
        let now = node.timers.now();
        let connected = node.metrics.connected(Transport::SocketIo);
        let registration = node.sessions.register(Transport::SocketIo, identity, remote, ChannelSet::Empty);
        let mut timer = node.timers.timer(LONG);
        timer.set_owner(registration.number());
        Arc::new(EngineSession {
            sid: new_sid(),
            settings: settings.clone(),
            node: node.clone(),
            outbox: Arc::new(PacketOutbox::new(framing, settings.queued)),
            handler: Mutex::new(None),
            state: Mutex::new(SessionState {
                stage: if framing == Framing::Polling { SessionStage::Polling } else { SessionStage::Socket },
                polled: false,
                posted: false,
                ping: now + TimerWheel::ticks(settings.ping),
                pinged: false,
                until: 0,
                leaving: false,
                kicked: false,
                probes: Vec::new(),
                handler_dropped: false,
                listing: Some(SessionListing { connected, registration, timer }),
            }),
        })
    }

    pub(crate) fn begin(&self, handler: Box<dyn SessionHandler>) {
        *self.handler.lock() = Some(handler);
    }

    /// Something that the handler waits for may have happened.
    pub(crate) fn wake(&self) {
        if let Some(handler) = self.handler.lock().as_deref_mut() {
            handler.on_wake();
        }
    }

    /// Changes the entry in the list of connections.
    pub(crate) fn with_registration(&self, change: impl FnOnce(&ConnectionRegistration)) {
        if let Some(listing) = &self.state.lock().listing {
            change(&listing.registration);
        }
    }

    pub(crate) fn stage(&self) -> SessionStage {
        self.state.lock().stage
    }

    pub(crate) fn sid(&self) -> &str {
        str::from_utf8(&self.sid).unwrap_or_default()
    }

    /// Handles one packet of an open session.
    pub(crate) fn receive(&self, packet: &EnginePacket<'_>) -> Result<(), ProtocolError> {
        let result = match packet {
            EnginePacket::Message(text) => self.with(|handler| handler.on_text(text)),
            EnginePacket::Binary(bytes) => self.with(|handler| handler.on_bytes(bytes)),
            EnginePacket::Pong | EnginePacket::Noop => Ok(()),
            EnginePacket::Close => {
                self.close_because(None);
                return Ok(());
            }
            // In this revision the server pings.
            EnginePacket::Ping(_) | EnginePacket::Upgrade => Err(ProtocolError),
        };
        match result {
            Ok(()) if !self.outbox.is_ending() => {}
            Ok(()) => self.end(),
            Err(ProtocolError) => self.close(Code::Protocol),
        }
        result
    }

    /// See [`SessionHandler::poll_ready`].
    pub(super) fn poll_ready(&self, cx: &mut Context<'_>) -> Poll<()> {
        self.handler.lock().as_deref_mut().map_or(Poll::Ready(()), |handler| handler.poll_ready(cx))
    }

    pub(super) fn abandon_wait(&self) {
        if let Some(handler) = self.handler.lock().as_deref_mut() {
            handler.abandon_wait();
        }
    }

    fn with(
        &self,
        act: impl FnOnce(&mut dyn SessionHandler) -> Result<(), ProtocolError>,
    ) -> Result<(), ProtocolError> {
        match self.handler.lock().as_deref_mut() {
            Some(handler) => act(handler),
            None => Ok(()),
        }
    }

    /// The client has sent something: it is alive.
    pub(crate) fn client_alive(&self) {
        let mut state = self.state.lock();
        if state.pinged {
            state.pinged = false;
            state.ping = self.node.timers.now() + TimerWheel::ticks(self.settings.ping);
        }
        if !state.probes.is_empty() {
            let probes = std::mem::take(&mut state.probes);
            drop(state);
            report_probes(probes, true);
        }
    }

    /// Probes whether the client is alive. If it does not answer in time, its session is closed, and what it held is
    /// released before the callback is called.
    pub(crate) fn probe(&self, callback: ProbeCallback) {
        let mut state = self.state.lock();
        if state.handler_dropped {
            drop(state);
            return callback(false);
        }
        let until = self.node.timers.now() + TimerWheel::ticks(self.settings.probe) + 1;
        state.probes.push((until, callback));
        drop(state);
        self.outbox.text("2");
    }

    /// Handles everything that depends on time. False if the session is over and is to be removed.
    pub(crate) fn tick(&self) -> bool {
        let now = self.node.timers.now();
        let mut state = self.state.lock();
        if state.stage == SessionStage::Over {
            return false;
        }
        let unanswered = state.pinged && now >= state.ping || state.probes.iter().any(|(until, _)| now >= *until);
        if state.until != 0 && now >= state.until || unanswered {
            drop(state);
            self.close(Code::DeadPeer);
            return false;
        }
        let ping = now >= state.ping && state.until == 0;
        if ping {
            state.pinged = true;
            state.ping = now + TimerWheel::ticks(self.settings.ping_timeout);
        }
        let due = state.listing.as_mut().and_then(SessionListing::poll_due);
        let ending = state.until != 0;
        state.kicked |= matches!(due, Some(Due::Kicked(_)));
        drop(state);
        match due {
            Some(Due::Leave) => self.leave(),
            Some(Due::Kicked(_)) => {
                if let Some(handler) = self.handler.lock().as_deref_mut() {
                    handler.on_kick();
                }
            }
            Some(Due::Time) | None => {}
        }
        if ping {
            self.outbox.shrink();
            self.outbox.text("2");
        }
        if ending {
            return true;
        }
        let leaving = self.is_leaving();
        let quiet = leaving && self.handler.lock().as_ref().is_none_or(|handler| handler.is_quiet());
        if quiet || leaving && self.node.timers.draining_for() >= self.settings.grace {
            self.outbox.finish();
        }
        let ticked = self.with(|handler| handler.on_tick(now));
        match ticked {
            Ok(()) if self.outbox.is_ending() => self.end(),
            Ok(()) => {}
            Err(ProtocolError) => self.close(Code::Protocol),
        }
        true
    }

    /// It is this session's turn to leave, in a drain.
    fn leave(&self) {
        if !std::mem::replace(&mut self.state.lock().leaving, true)
            && let Some(handler) = self.handler.lock().as_deref_mut()
        {
            handler.on_leave();
        }
    }

    pub(crate) fn is_leaving(&self) -> bool {
        self.state.lock().leaving
    }

    /// Drops the handler; what waits for the client is still delivered.
    fn end(&self) {
        let mut state = self.state.lock();
        if state.until == 0 {
            state.until = self.node.timers.now() + TimerWheel::ticks(self.settings.linger);
        }
        drop(state);
        self.drop_handler();
    }

    /// Ends at once, for this reason.
    pub(crate) fn close(&self, code: Code) {
        self.close_because(Some(code));
    }

    /// Ends at once; without a code the client left.
    pub(crate) fn close_because(&self, code: Option<Code>) {
        let mut state = self.state.lock();
        if state.stage == SessionStage::Over {
            return;
        }
        state.stage = SessionStage::Over;
        // A kicked client leaves by itself, if it behaves.
        let code = if state.kicked { Some(Code::Kicked) } else { code };
        let mut listing = state.listing.take();
        if let Some(SessionListing { connected, .. }) = &mut listing {
            match code {
                Some(code) => connected.closed_with(code),
                None => connected.closed_by_peer(),
            }
        }
        drop(state);
        drop(listing);
        self.outbox.close();
        self.drop_handler();
    }

    fn drop_handler(&self) {
        // Not under the lock: its drop calls back into the session.
        let Some(handler) = self.handler.lock().take() else { return };
        drop(handler);
        // The probes wait until everything that the handler held is released, as it is by now.
        let mut state = self.state.lock();
        state.handler_dropped = true;
        let probes = std::mem::take(&mut state.probes);
        drop(state);
        report_probes(probes, false);
    }

    // --- polls ---

    /// Begins a poll, or the reading of a body. `None`: there is one already, or a WebSocket carries the session.
    pub(crate) fn begin_request(&self, poll: bool) -> Option<RequestGuard<'_>> {
        let mut state = self.state.lock();
        if !matches!(state.stage, SessionStage::Polling | SessionStage::Upgrading) {
            return None;
        }
        let busy = if poll { &mut state.polled } else { &mut state.posted };
        // Lazily: a guard that is not created must not be dropped.
        (!std::mem::replace(busy, true)).then(|| RequestGuard { session: self, poll, done: false })
    }

    // --- upgrade ---

    /// A WebSocket is to take over. False if one does already, or has.
    pub(crate) fn begin_upgrade(&self) -> bool {
        let mut state = self.state.lock();
        let may = state.stage == SessionStage::Polling && state.until == 0;
        if may {
            state.stage = SessionStage::Upgrading;
        }
        may
    }

    /// The WebSocket did not take over: the polls go on.
    pub(crate) fn abandon_upgrade(&self) {
        let mut state = self.state.lock();
        if state.stage == SessionStage::Upgrading {
            state.stage = SessionStage::Polling;
            drop(state);
            self.outbox.set_upgrading(false);
        }
    }

    /// The WebSocket takes over. False if the session has ended meanwhile.
    pub(crate) fn upgrade(&self) -> bool {
        let mut state = self.state.lock();
        if state.stage != SessionStage::Upgrading {
            return false;
        }
        state.stage = SessionStage::Socket;
        drop(state);
        self.outbox.upgrade();
        true
    }
}

impl SessionListing {
    /// Whether the session is to leave or is kicked. Polled often enough to need no waker.
    fn poll_due(&mut self) -> Option<Due> {
        loop {
            match self.timer.poll(&mut Context::from_waker(Waker::noop())) {
                Poll::Ready(Due::Time) => self.timer.reset(LONG),
                Poll::Ready(due) => return Some(due),
                Poll::Pending => return None,
            }
        }
    }
}

impl RequestGuard<'_> {
    /// The request was completed.
    pub(crate) fn done(mut self) {
        self.done = true;
    }
}

impl Drop for RequestGuard<'_> {
    fn drop(&mut self) {
        let mut state = self.session.state.lock();
        match self.poll {
            true => state.polled = false,
            false => state.posted = false,
        }
        drop(state);
        if !self.done {
            // The client has disconnected during a poll or a body: it is gone.
            self.session.close_because(None);
        }
    }
}

fn report_probes(probes: Vec<(u32, ProbeCallback)>, alive: bool) {
    probes.into_iter().for_each(|(_, callback)| callback(alive));
}

/// A random id in the form of the original's.
pub(crate) fn new_sid() -> Sid {
    const LETTERS: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_";
    let mut sid = [0; 20];
    let mut filled = 0;
    while filled < sid.len() {
        // Fails only if interrupted, or before the kernel's generator is initialized.
        filled += rustix::rand::getrandom(&mut sid[filled..], rustix::rand::GetRandomFlags::empty()).unwrap_or(0);
    }
    sid.map(|byte| LETTERS[usize::from(byte & 63)])
}
