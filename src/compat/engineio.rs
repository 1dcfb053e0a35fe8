//! Engine.IO, revision 4, as a server: what Socket.IO's clients are connected by.
//!
//! ```text
//! GET /socket.io/?EIO=4&transport=polling            → 0{"sid":…,"upgrades":["websocket"],…}
//! POST …&sid=S  40                                   → ok
//! GET  …&sid=S                                       → what waits, or is held until something does
//! GET  …&transport=websocket&sid=S  (upgrade)        2probe → 3probe, 5: the polls are over
//! ```
//!
//! It knows nothing of what is said: a [`Conversation`] does. Errors, headers and CORS are those of the original, open to
//! every page.

mod outbox;
pub mod packet;
mod polling;
mod session;
mod socket;

use std::{
    collections::HashMap,
    net::SocketAddr,
    sync::{Arc, Weak},
    time::Duration,
};

use axum::{
    body::Body,
    http::{Request, Response},
};
use foldhash::fast::RandomState;
use http::{HeaderValue, Method, StatusCode, header, request::Parts};
use parking_lot::Mutex;

pub use self::{
    outbox::Outbox,
    session::{Broken, Conversation, Session, Sid, new_sid},
};
use self::{packet::Framing, session::Stage, socket::Socket};
use crate::{
    net::server::PeerAddr,
    net::{hijack::Hijack, timer::TICK, websocket::handshake::Handshake},
    node::Node,
    transport::query::Query,
};

/// What a server allows, and how long it waits.
#[derive(Clone, Debug)]
pub struct Settings {
    /// Between two pings, and for the answer to one.
    pub ping: Duration,
    pub ping_timeout: Duration,
    /// How long a client that is asked whether it lives may take.
    pub probe: Duration,
    /// The largest message, and the largest body.
    pub max_payload: usize,
    /// Bytes that wait for one client.
    pub queued: usize,
    /// Clients at a time.
    pub sessions: usize,
    /// How long a body may take to arrive.
    pub body_time: Duration,
    /// How long a socket may take nothing of what waits for it.
    pub stalled: Duration,
    /// How long a socket that wants to take over may take.
    pub upgrade: Duration,
    /// How long last words wait to be read.
    pub farewell: Duration,
    /// How long a drain waits for calls.
    pub grace: Duration,
}

/// Opens the conversation of a session; gets the query of the client's first request.
pub type Open = Box<dyn Fn(&Arc<Session>, Query<'_>) -> Box<dyn Conversation> + Send + Sync>;

/// All sessions of one adapter.
pub struct Server {
    settings: Arc<Settings>,
    node: Arc<Node>,
    open: Open,
    sessions: Mutex<HashMap<Sid, Arc<Session>, RandomState>>,
}

/// Why a request is refused, with the original's numbers and words.
#[derive(Clone, Copy, Debug)]
enum Refusal {
    Transport,
    Session,
    Method,
    Request,
    Version,
}

// === impl Server ===

impl Server {
    /// Needs a tokio runtime: one task keeps the time of all sessions, and ends with the server.
    pub fn start(settings: Arc<Settings>, node: Arc<Node>, open: Open) -> Arc<Self> {
        let server = Arc::new(Server { settings, node, open, sessions: Mutex::default() });
        tokio::spawn(keep_time(Arc::downgrade(&server)));
        server
    }

    /// Answers a request to the path of Engine.IO, whatever it is.
    pub async fn answer(self: &Arc<Self>, request: Request<Body>) -> Response<Body> {
        let (head, body) = request.into_parts();
        let asked = head.headers.get(header::ACCESS_CONTROL_REQUEST_HEADERS).cloned();
        let mut answer = match head.method {
            Method::OPTIONS => preflight(asked),
            _ => match self.route(&head, body).await {
                Ok(answer) => answer,
                Err(refusal) => refusal.response(),
            },
        };
        let headers = answer.headers_mut();
        headers.insert(header::ACCESS_CONTROL_ALLOW_ORIGIN, HeaderValue::from_static("*"));
        answer
    }

    async fn route(self: &Arc<Self>, head: &Parts, body: Body) -> Result<Response<Body>, Refusal> {
        let mut query = Query::parse(head.uri.query()).map_err(|_| Refusal::Request)?;
        let mut take = |name| query.take(name).map_err(|_| Refusal::Request);
        let (transport, sid, version) = (take("transport")?, take("sid")?, take("EIO")?);
        let framing = match transport.as_deref() {
            Some("polling") => Framing::Polling,
            Some("websocket") => Framing::WebSocket,
            _ => return Err(Refusal::Transport),
        };
        let upgrade = Handshake::is_wanted(head);
        let remote = PeerAddr::of(head);
        match sid.filter(|sid| !sid.is_empty()) {
            Some(sid) => {
                let session = self.find(&sid).ok_or(Refusal::Session)?;
                match framing {
                    Framing::WebSocket if upgrade => self.take_over(head, session),
                    Framing::Polling if session.stage() != Stage::Socket => match head.method {
                        Method::GET => polling::poll(&session).await,
                        Method::POST => polling::post(self, &session, head, body).await,
                        _ => Err(Refusal::Request),
                    },
                    _ => Err(Refusal::Request),
                }
            }
            None if head.method != Method::GET => Err(Refusal::Method),
            None if framing == Framing::WebSocket && !upgrade => Err(Refusal::Request),
            None if version.as_deref() != Some("4") => Err(Refusal::Version),
            None if self.node.timers.is_draining() || self.sessions.lock().len() >= self.settings.sessions => {
                // The client tries again, with patience.
                let mut answer = Response::new(Body::empty());
                *answer.status_mut() = StatusCode::SERVICE_UNAVAILABLE;
                Ok(answer)
            }
            None if framing == Framing::WebSocket => {
                let handshake = Handshake::read(head, &[]).map_err(|_| Refusal::Request)?;
                let session = self.begin(framing, query, remote);
                // Ends a session whose client is gone before it is taken over.
                let unclaimed = Unclaimed(Some(session));
                let server = self.clone();
                Ok(handshake.response(Hijack::new(move |taken| {
                    if let Some(session) = unclaimed.claim() {
                        tokio::spawn(Socket::new(server, session, false, taken));
                    }
                })))
            }
            None => {
                let session = self.begin(framing, query, remote);
                polling::poll(&session).await
            }
        }
    }

    /// A new session; what waits for it is its opening packet.
    fn begin(&self, framing: Framing, query: Query<'_>, remote: Option<SocketAddr>) -> Arc<Session> {
        let session = Session::new(&self.settings, &self.node, framing, remote);
        let Settings { ping, ping_timeout, max_payload, .. } = &*self.settings;
        let upgrades = if framing == Framing::Polling { r#"["websocket"]"# } else { "[]" };
        session.outbox.text(&format!(
            r#"0{{"sid":"{}","upgrades":{upgrades},"pingInterval":{},"pingTimeout":{},"maxPayload":{max_payload}}}"#,
            session.sid(),
            ping.as_millis(),
            ping_timeout.as_millis(),
        ));
        session.begin((self.open)(&session, query));
        self.sessions.lock().insert(session.sid, session.clone());
        session
    }

    fn take_over(self: &Arc<Self>, head: &Parts, session: Arc<Session>) -> Result<Response<Body>, Refusal> {
        let handshake = Handshake::read(head, &[]).map_err(|_| Refusal::Request)?;
        if !session.begin_upgrade() {
            return Err(Refusal::Request);
        }
        let upgrading = Upgrading(Some(session));
        let server = self.clone();
        Ok(handshake.response(Hijack::new(move |taken| {
            if let Some(session) = upgrading.claim() {
                tokio::spawn(Socket::new(server, session, true, taken));
            }
        })))
    }

    fn find(&self, sid: &str) -> Option<Arc<Session>> {
        let sid: &Sid = sid.as_bytes().try_into().ok()?;
        let session = self.sessions.lock().get(sid).cloned()?;
        (session.stage() != Stage::Over).then_some(session)
    }

    /// Looks at all sessions: whom to ping, whom to give up, who is called on, who is over.
    fn sweep(&self, sessions: &mut Vec<Arc<Session>>) {
        sessions.extend(self.sessions.lock().values().cloned());
        for session in sessions.drain(..) {
            if !session.tick() {
                let mut table = self.sessions.lock();
                table.remove(&session.sid);
                if table.is_empty() {
                    // A storm of clients leaves no room behind.
                    table.shrink_to_fit();
                }
            }
        }
        sessions.shrink_to(1_000);
    }
}

async fn keep_time(server: Weak<Server>) {
    let mut ticks = tokio::time::interval(TICK);
    ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    let mut sessions = Vec::new();
    loop {
        ticks.tick().await;
        let Some(server) = server.upgrade() else { return };
        server.sweep(&mut sessions);
    }
}

/// A session that no socket has yet.
struct Unclaimed(Option<Arc<Session>>);

/// A session whose polls a socket is about to replace.
struct Upgrading(Option<Arc<Session>>);

impl Unclaimed {
    fn claim(mut self) -> Option<Arc<Session>> {
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
    fn claim(mut self) -> Option<Arc<Session>> {
        self.0.take()
    }
}

impl Drop for Upgrading {
    fn drop(&mut self) {
        if let Some(session) = &self.0 {
            session.give_up_upgrade();
        }
    }
}

// === impl Refusal ===

impl Refusal {
    fn response(self) -> Response<Body> {
        let (code, message) = match self {
            Refusal::Transport => (0, "Transport unknown"),
            Refusal::Session => (1, "Session ID unknown"),
            Refusal::Method => (2, "Bad handshake method"),
            Refusal::Request => (3, "Bad request"),
            Refusal::Version => (5, "Unsupported protocol version"),
        };
        let mut answer = Response::new(Body::from(format!(r#"{{"code":{code},"message":"{message}"}}"#)));
        *answer.status_mut() = StatusCode::BAD_REQUEST;
        answer.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
        answer
    }
}

/// Every page may, as with the original.
fn preflight(asked: Option<HeaderValue>) -> Response<Body> {
    let mut answer = Response::new(Body::empty());
    *answer.status_mut() = StatusCode::NO_CONTENT;
    let headers = answer.headers_mut();
    let methods = HeaderValue::from_static("GET,HEAD,PUT,PATCH,POST,DELETE");
    headers.insert(header::ACCESS_CONTROL_ALLOW_METHODS, methods);
    headers.insert(header::VARY, HeaderValue::from_static("Access-Control-Request-Headers"));
    headers.insert(header::CONTENT_LENGTH, HeaderValue::from_static("0"));
    if let Some(asked) = asked {
        headers.insert(header::ACCESS_CONTROL_ALLOW_HEADERS, asked);
    }
    answer
}
