//! An Engine.IO server, revision 4: the transport below Socket.IO.
//!
//! ```text
//! GET /socket.io/?EIO=4&transport=polling            → 0{"sid":…,"upgrades":["websocket"],…}
//! POST …&sid=S  40                                   → ok
//! GET  …&sid=S                                       → the packets that wait, or as soon as there are some
//! GET  …&transport=websocket&sid=S  (upgrade)        2probe → 3probe, 5: the polls are over
//! ```
//!
//! Messages are handled by a [`SessionHandler`]. Errors, headers and CORS (every origin is allowed) are those of the
//! original.

mod error;
mod outbox;
pub(crate) mod packet;
mod polling;
mod session;
mod session_table;
mod settings;
mod socket;

use std::sync::Arc;

use axum::{
    body::Body,
    http::{Request, Response},
};
use http::{HeaderValue, Method, StatusCode, header, request::Parts};

use self::{
    error::EngineError, packet::Framing, session::SessionStage, session_table::SessionTable, socket::EngineSocket,
};
pub(crate) use self::{
    outbox::PacketOutbox,
    session::{EngineSession, ProtocolError, SessionHandler, new_sid},
    settings::EngineSettings,
};
use super::adapter::preflight;
use crate::{
    auth::Identity,
    net::{
        hijack::{Hijack, HijackedConn},
        server::PeerAddr,
        websocket::handshake::Handshake,
    },
    node::Node,
    transport::query::Query,
};

/// Creates the handler of a session, from the client's first request and its query.
pub(crate) type OpenHandler =
    Box<dyn Fn(&Arc<EngineSession>, &Parts, Query<'_>) -> Box<dyn SessionHandler> + Send + Sync>;

/// The server of one adapter.
pub(crate) struct EngineServer {
    settings: Arc<EngineSettings>,
    node: Arc<Node>,
    open: OpenHandler,
    sessions: Arc<SessionTable>,
}

// === impl EngineServer ===

impl EngineServer {
    /// Needs a tokio runtime.
    pub(crate) fn start(settings: Arc<EngineSettings>, node: Arc<Node>, open: OpenHandler) -> Arc<Self> {
        Arc::new(EngineServer { settings, node, open, sessions: SessionTable::start() })
    }

    /// Answers any request to the path of Engine.IO.
    pub(crate) async fn answer(self: &Arc<Self>, request: Request<Body>) -> Response<Body> {
        let (head, body) = request.into_parts();
        let mut answer = match head.method {
            Method::OPTIONS => preflight(&head.headers),
            _ => match self.route(&head, body).await {
                Ok(answer) => answer,
                Err(error) => error.response(),
            },
        };
        let headers = answer.headers_mut();
        if head.method == Method::OPTIONS {
            headers.insert(header::CONTENT_LENGTH, HeaderValue::from_static("0"));
        }
        headers.insert(header::ACCESS_CONTROL_ALLOW_ORIGIN, HeaderValue::from_static("*"));
        answer
    }

    async fn route(self: &Arc<Self>, head: &Parts, body: Body) -> Result<Response<Body>, EngineError> {
        let mut query = Query::parse(head.uri.query()).map_err(|_| EngineError::BadRequest)?;
        let mut take = |name| query.take(name).map_err(|_| EngineError::BadRequest);
        let (transport, sid, version) = (take("transport")?, take("sid")?, take("EIO")?);
        let framing = match transport.as_deref() {
            Some("polling") => Framing::Polling,
            Some("websocket") => Framing::WebSocket,
            _ => return Err(EngineError::UnknownTransport),
        };
        let upgrade = Handshake::is_wanted(head);
        match sid.filter(|sid| !sid.is_empty()) {
            Some(sid) => {
                let session = self.sessions.find(&sid).ok_or(EngineError::UnknownSession)?;
                match framing {
                    Framing::WebSocket if upgrade => self.take_over(head, session),
                    Framing::Polling if session.stage() != SessionStage::Socket => match head.method {
                        Method::GET => polling::poll(&session).await,
                        Method::POST => polling::post(&self.settings, &session, head, body).await,
                        _ => Err(EngineError::BadRequest),
                    },
                    _ => Err(EngineError::BadRequest),
                }
            }
            None if head.method != Method::GET => Err(EngineError::HandshakeMethod),
            None if Identity::of(&head.extensions).may_connect().is_err() => Err(EngineError::Forbidden),
            None if framing == Framing::WebSocket && !upgrade => Err(EngineError::BadRequest),
            None if version.as_deref() != Some("4") => Err(EngineError::ProtocolVersion),
            None if self.node.timers.is_draining() || self.sessions.len() >= self.settings.sessions => {
                // The client retries with back-off.
                let mut answer = Response::new(Body::empty());
                *answer.status_mut() = StatusCode::SERVICE_UNAVAILABLE;
                Ok(answer)
            }
            None if framing == Framing::WebSocket => {
                let handshake = Handshake::read(head, &[]).map_err(|_| EngineError::BadRequest)?;
                let session = self.begin(framing, head, query);
                // Ends the session if the client disconnects before the connection is hijacked.
                let unclaimed = Unclaimed(Some(session));
                let server = self.clone();
                Ok(handshake.response(Hijack::new(move |conn| {
                    if let Some(session) = unclaimed.claim() {
                        server.start_socket(session, false, conn);
                    }
                })))
            }
            None => {
                let session = self.begin(framing, head, query);
                polling::poll(&session).await
            }
        }
    }

    /// Creates a session, with its opening packet in the outbox.
    fn begin(&self, framing: Framing, head: &Parts, query: Query<'_>) -> Arc<EngineSession> {
        let identity = Identity::of(&head.extensions);
        let session = EngineSession::new(&self.settings, &self.node, framing, &identity, PeerAddr::of(head));
        let EngineSettings { ping, ping_timeout, max_payload, .. } = &*self.settings;
        let upgrades = if framing == Framing::Polling { r#"["websocket"]"# } else { "[]" };
        session.outbox.text(&format!(
            r#"0{{"sid":"{}","upgrades":{upgrades},"pingInterval":{},"pingTimeout":{},"maxPayload":{max_payload}}}"#,
            session.sid(),
            ping.as_millis(),
            ping_timeout.as_millis(),
        ));
        session.begin((self.open)(&session, head, query));
        self.sessions.insert(session.clone());
        session
    }

    fn take_over(self: &Arc<Self>, head: &Parts, session: Arc<EngineSession>) -> Result<Response<Body>, EngineError> {
        let handshake = Handshake::read(head, &[]).map_err(|_| EngineError::BadRequest)?;
        if !session.begin_upgrade() {
            return Err(EngineError::BadRequest);
        }
        let upgrading = Upgrading(Some(session));
        let server = self.clone();
        Ok(handshake.response(Hijack::new(move |conn| {
            if let Some(session) = upgrading.claim() {
                server.start_socket(session, true, conn);
            }
        })))
    }

    fn start_socket(&self, session: Arc<EngineSession>, probing: bool, conn: HijackedConn) {
        let (sessions, settings) = (self.sessions.clone(), self.settings.clone());
        tokio::spawn(EngineSocket::open(session, sessions, settings, &self.node.timers, probing, conn));
    }
}

/// A session that waits for its connection to be hijacked.
struct Unclaimed(Option<Arc<EngineSession>>);

/// A session that waits for the connection which is to replace its polls.
struct Upgrading(Option<Arc<EngineSession>>);

impl Unclaimed {
    fn claim(mut self) -> Option<Arc<EngineSession>> {
        self.0.take()
    }
}

impl Drop for Unclaimed {
    fn drop(&mut self) {
        if let Some(session) = &self.0 {
            session.close_because(None);
        }
    }
}

impl Upgrading {
    fn claim(mut self) -> Option<Arc<EngineSession>> {
        self.0.take()
    }
}

impl Drop for Upgrading {
    fn drop(&mut self) {
        if let Some(session) = &self.0 {
            session.abandon_upgrade();
        }
    }
}
