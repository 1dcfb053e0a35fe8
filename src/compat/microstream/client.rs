//! [`MicroStreamClient`]: the conversation with one MicroStream client.

use std::{
    sync::{
        Arc, Weak,
        atomic::{AtomicU32, Ordering::Relaxed},
    },
    task::{Context, Poll},
};

use parking_lot::Mutex;
use serde_json::value::RawValue;
use tokio::task::JoinHandle;

use super::{
    bytes,
    hub::{ATTACHED, CONNECT, MicroStreamHub},
    port::{self, Port},
    translate::{self, HeartbeatEvent, RequestEvent, RequestPayload, ResponseEvent},
};
use crate::{
    auth::Identity,
    compat::{
        engineio::{EngineSession, ProtocolError, SessionHandler, new_sid},
        socketio::{SocketIoEvent, SocketIoKind, SocketIoPacket, connect_error},
    },
    error::{Code, Error, Retry},
    net::timer::TimerWheel,
    rpc::{AcceptedProvider, Call, CallAnswer, CallerId, HubConnection, Peer as _, ProvideFuture, ProvideRequest},
};

/// One client and its packets.
pub(super) struct MicroStreamClient {
    hub: Arc<MicroStreamHub>,
    session: Weak<EngineSession>,
    /// The client of the first request.
    handshake: Identity,
    /// The client of the connect packet.
    identity: Identity,
    port: Arc<Port>,
    /// Set while the client is connected.
    link: Option<HubConnection>,
    name: Box<str>,
    /// Whether the query of its URL contained the name.
    named: bool,
    stage: ClientStage,
    registering: Option<PendingRegistration>,
    /// The tick at which the session began without being connected.
    since: u32,
    /// The tick of its last heartbeat.
    beat: Arc<AtomicU32>,
    /// The tick of the last check for a missing heartbeat.
    looked: u32,
    /// A packet whose attachments are incomplete.
    partial: Option<Box<PartialPacket>>,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum ClientStage {
    Fresh,
    /// The name is being claimed from other nodes, or the client that has it is being probed.
    Registering,
    Connected,
}

/// A registration that waits for other nodes or a probe. Dropping it cancels it.
struct PendingRegistration {
    done: Arc<Mutex<Option<RegistrationResult>>>,
    task: JoinHandle<()>,
}

type RegistrationResult = Result<(Identity, HubConnection, AcceptedProvider), Error>;

impl Drop for PendingRegistration {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// What a registration needs besides the identity of the client.
struct RegistrationRequest {
    hub: Arc<MicroStreamHub>,
    port: Arc<Port>,
    name: Box<str>,
}

impl RegistrationRequest {
    fn provide(&self, identity: &Identity) -> Result<(HubConnection, ProvideFuture), Error> {
        let permit = identity.may_provide(&self.name)?;
        let link = HubConnection::with_max_calls(&self.hub.rpc, self.port.clone(), self.hub.config.calls);
        let providing = link.provide(&ProvideRequest {
            subject: permit.subject(),
            exclusive: true,
            // A client that reconnects after an unclean disconnect would find its own name taken.
            probe: true,
            concurrency: u32::try_from(self.hub.config.calls).unwrap_or(u32::MAX).saturating_mul(16),
            ..ProvideRequest::new(&self.name)
        });
        Ok((link, providing))
    }
}

struct PartialPacket {
    kind: SocketIoKind,
    payload: String,
    left: usize,
    bytes: Vec<Vec<u8>>,
    size: usize,
}

// === impl MicroStreamClient: packets ===

impl MicroStreamClient {
    pub(super) fn new(
        hub: Arc<MicroStreamHub>,
        session: &Arc<EngineSession>,
        identity: Identity,
        name: Option<&str>,
    ) -> Self {
        let now = hub.wheel.now();
        MicroStreamClient {
            session: Arc::downgrade(session),
            handshake: identity.clone(),
            identity,
            port: Arc::new(Port::new(Arc::downgrade(session), session.outbox.clone(), hub.wheel.clone())),
            link: None,
            // The original registers clients without a name as this.
            name: name.unwrap_or("undefined").into(),
            named: name.is_some(),
            stage: ClientStage::Fresh,
            registering: None,
            since: now,
            beat: Arc::new(AtomicU32::new(now)),
            looked: now,
            partial: None,
            hub,
        }
    }

    fn send_packet(&self, packet: &str) {
        if let Some(session) = self.session.upgrade() {
            session.outbox.text(packet);
        }
    }

    fn packet(&mut self, packet: &SocketIoPacket<'_>) -> Result<(), ProtocolError> {
        if packet.kind == SocketIoKind::Connect {
            if packet.namespace != "/" {
                self.send_packet(&connect_error(packet.namespace, "Invalid namespace", None));
                return Ok(());
            }
            if self.stage != ClientStage::Fresh {
                return Err(ProtocolError);
            }
            self.register(packet.payload);
            return Ok(());
        }
        if packet.namespace != "/" || self.stage == ClientStage::Fresh {
            return Err(ProtocolError);
        }
        match packet.kind {
            SocketIoKind::Disconnect => self.part(),
            SocketIoKind::Event | SocketIoKind::Ack if packet.attachments > 0 => {
                let (kind, payload, left) = (packet.kind, packet.payload.to_owned(), packet.attachments);
                self.partial = Some(Box::new(PartialPacket { kind, payload, left, bytes: Vec::new(), size: 0 }));
            }
            SocketIoKind::Event if !packet.payload.is_empty() => self.event(packet.payload)?,
            SocketIoKind::Event | SocketIoKind::Ack => {}
            SocketIoKind::Connect | SocketIoKind::ConnectError => return Err(ProtocolError),
        }
        Ok(())
    }

    fn event(&mut self, payload: &str) -> Result<(), ProtocolError> {
        let SocketIoEvent { name, argument } = serde_json::from_str(payload).map_err(|_| ProtocolError)?;
        if let Some(link) = &self.link {
            match &*name.0 {
                "request" => self.request(link, argument),
                "response" => self.response(link, argument),
                "heartbeat" => self.heartbeat(argument),
                // The original ignores other events.
                _ => {}
            }
        }
        Ok(())
    }

    /// The client disconnects or is disconnected. Its name is released at once.
    fn part(&mut self) {
        self.stage = ClientStage::Fresh;
        self.since = self.hub.wheel.now();
        self.partial = None;
        self.registering = None;
        // Before anything else: a registration that finds the name taken must find the new owner.
        self.link = None;
        self.hub.disconnected(&self.name, &self.beat);
        self.set_identity(self.handshake.clone());
    }

    /// A connection is listed, kicked, and ends with its credential, by its identity.
    fn set_identity(&mut self, identity: Identity) {
        if let Some(session) = self.session.upgrade() {
            session.with_registration(|registration| registration.set_identity(identity.clone()));
        }
        self.identity = identity;
    }

    // --- registration ---

    /// `auth` is the payload of the connect packet. Its `token` is a credential.
    fn register(&mut self, auth: &str) {
        #[derive(serde::Deserialize)]
        struct ConnectAuth {
            token: String,
        }
        let token = serde_json::from_str::<ConnectAuth>(auth).ok().map(|auth| auth.token);
        let token = token.filter(|_| self.hub.node.auth.is_on());
        let handshake = self.handshake.clone();
        let request = RegistrationRequest { hub: self.hub.clone(), port: self.port.clone(), name: self.name.clone() };
        let done = match token {
            None => match request.provide(&self.identity) {
                Err(error) => return self.refuse(&error),
                Ok((link, providing)) => match providing.try_finish() {
                    Err(providing) => {
                        let identity = self.identity.clone();
                        self.wait(async move { Ok((identity, link, providing.await?)) })
                    }
                    Ok(Ok(provided)) => return self.connected(link, provided),
                    Ok(Err(error)) => return self.refuse(&error),
                },
            },
            Some(token) => self.wait(async move {
                let identity = request.hub.node.auth.verify(&token).await?;
                if !handshake.subject().is_empty() && handshake.subject() != identity.subject() {
                    return Err(Error::new(Code::Forbidden, "this connection belongs to another subject"));
                }
                let (link, providing) = request.provide(&identity)?;
                Ok((identity, link, providing.await?))
            }),
        };
        self.registering = Some(done);
        self.stage = ClientStage::Registering;
    }

    /// Runs a registration, and wakes the session when it has ended.
    fn wait(&self, registering: impl Future<Output = RegistrationResult> + Send + 'static) -> PendingRegistration {
        let done = Arc::new(Mutex::new(None));
        let task = tokio::spawn({
            let (done, session) = (done.clone(), self.session.clone());
            async move {
                let registered = registering.await;
                *done.lock() = Some(registered);
                if let Some(session) = session.upgrade() {
                    session.wake();
                }
            }
        });
        PendingRegistration { done, task }
    }

    fn refuse(&mut self, error: &Error) {
        self.stage = ClientStage::Fresh;
        self.since = self.hub.wheel.now();
        let (message, data) = match error.code() {
            // After an error message the client would not reconnect; after a closed connection it does.
            code if code.retry() == Retry::Yes => {
                if let Some(session) = self.session.upgrade() {
                    session.outbox.finish();
                }
                return;
            }
            Code::ServiceTaken => translate::duplicate(self.named.then_some(&*self.name)),
            _ => translate::refused(error, &self.name),
        };
        self.send_packet(&connect_error("/", &message, Some(&data)));
    }

    fn connected(&mut self, link: HubConnection, provided: AcceptedProvider) {
        self.stage = ClientStage::Connected;
        self.beat.store(self.hub.wheel.now(), Relaxed);
        self.hub.connected(&self.name, &self.beat);
        let id = new_sid();
        self.send_packet(&format!("40{{\"sid\":\"{}\"}}", str::from_utf8(&id).unwrap_or_default()));
        if let Some(session) = self.session.upgrade() {
            session.with_registration(|registration| registration.set_services(link.provided_services()));
        }
        // Requests may be sent from here on, after the response.
        drop(provided);
        self.link = Some(link);
    }

    // --- events ---

    fn request(&self, link: &HubConnection, argument: Option<&RawValue>) {
        // Invalid events crash the original; weir ignores them.
        let Some(RequestEvent { target_service: target, payload: Some(sent) }) = translate::object(argument) else {
            return;
        };
        let Some(RequestPayload { id, event, data }) = translate::object(Some(sent)) else { return };
        if id.is_some_and(|id| id.get().len() > CallerId::MAX) {
            let error = Error::new(Code::InvalidRequest, "an id has at most 256 bytes");
            self.port.answer(&port::tag(id, None), CallAnswer::Failed(error));
            return;
        }
        let (service, event) = (translate::name(target), translate::name(event));
        let params = translate::params(data);
        let permitted = self.identity.may_call(&service, &event).map(|permit| permit.subject());
        let caller = match permitted {
            Ok(subject) => subject,
            Err(error) => {
                self.port.answer(&port::tag(id, target), CallAnswer::Failed(error));
                return;
            }
        };
        let call = Call {
            // A caller that waits longer gets a late response, like any other.
            late: true,
            // The original responds at once, without waiting for a provider.
            wait: Some(std::time::Duration::ZERO),
            as_sent: Some(sent),
            caller,
            ..Call::new(&service, &event, params.as_deref())
        };
        link.call(port::tag(id, target), &call);
    }

    fn response(&self, link: &HubConnection, argument: Option<&RawValue>) {
        let Some(ResponseEvent { id, response }) = translate::object(argument) else { return };
        // Responses to unknown requests, or to requests of other clients, are ignored.
        if let Some(call) = self.port.answered(id) {
            link.reply(call, translate::answer(response));
        }
    }

    fn heartbeat(&self, argument: Option<&RawValue>) {
        let Some(HeartbeatEvent { service_name }) = translate::object(argument) else { return };
        let name = translate::name(service_name);
        if *name == *self.name {
            self.beat.store(self.hub.wheel.now(), Relaxed);
        } else if !self.hub.node.auth.is_on() {
            self.hub.heartbeat(&name);
        }
    }

    /// Whether the heartbeat is overdue. Checked once per sweep.
    fn is_stale(&mut self, now: u32) -> bool {
        let sweep = TimerWheel::ticks(self.hub.config.sweep);
        let due = now / sweep != self.looked / sweep;
        self.looked = now;
        due && TimerWheel::span(self.beat.load(Relaxed), now) > self.hub.config.heartbeat_timeout
    }
}

impl SessionHandler for MicroStreamClient {
    fn on_text(&mut self, text: &str) -> Result<(), ProtocolError> {
        if self.partial.is_some() {
            // Its attachments are missing.
            return Err(ProtocolError);
        }
        self.packet(&SocketIoPacket::read(text).ok_or(ProtocolError)?)
    }

    fn on_bytes(&mut self, bytes: &[u8]) -> Result<(), ProtocolError> {
        let partial = self.partial.as_mut().ok_or(ProtocolError)?;
        // An empty one takes memory too.
        partial.size += bytes.len() + size_of::<Vec<u8>>();
        if partial.size > self.hub.config.max_payload.saturating_mul(ATTACHED) {
            return Err(ProtocolError);
        }
        partial.bytes.push(bytes.to_vec());
        partial.left -= 1;
        if partial.left > 0 {
            return Ok(());
        }
        let Some(whole) = self.partial.take() else { return Ok(()) };
        match whole.kind {
            SocketIoKind::Event => self.event(&bytes::inline(&whole.payload, &whole.bytes).ok_or(ProtocolError)?),
            _ => Ok(()),
        }
    }

    fn on_tick(&mut self, now: u32) -> Result<(), ProtocolError> {
        match self.stage {
            ClientStage::Fresh if TimerWheel::span(self.since, now) > CONNECT => {
                return Err(ProtocolError);
            }
            ClientStage::Fresh | ClientStage::Registering => {}
            ClientStage::Connected => {
                if self.is_stale(now) {
                    self.on_kick();
                } else if now.is_multiple_of(256) {
                    // Seldom, because the map is bounded anyway.
                    self.port.forget(self.hub.memory);
                }
            }
        }
        Ok(())
    }

    fn on_wake(&mut self) {
        let done = self.registering.as_ref().and_then(|registering| registering.done.lock().take());
        let Some(registered) = done else { return };
        self.registering = None;
        match registered {
            Ok((identity, link, provided)) => {
                self.set_identity(identity);
                self.connected(link, provided);
            }
            Err(error) => self.refuse(&error),
        }
    }

    /// Socket.IO clients do not reconnect after this by themselves.
    fn on_kick(&mut self) {
        self.part();
        if let Some(session) = self.session.upgrade() {
            session.outbox.send_last("41");
        }
    }

    fn on_leave(&mut self) {
        if let Some(link) = &self.link {
            link.withdraw_all();
        }
    }

    fn is_quiet(&self) -> bool {
        self.link.as_ref().is_none_or(HubConnection::is_idle)
    }

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        self.link.as_ref().map_or(Poll::Ready(()), |link| link.poll_room(cx))
    }

    fn abandon_wait(&mut self) {
        if let Some(link) = &self.link {
            link.abandon_wait();
        }
    }
}

impl Drop for MicroStreamClient {
    fn drop(&mut self) {
        if self.stage == ClientStage::Connected {
            self.part();
        }
    }
}
