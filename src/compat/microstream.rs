//! A MicroStream hub: services of Socket.IO clients that call each other by name, and weir's services with them.
//!
//! A client's `serviceName` is a service of weir's, its events are methods: it is provided exclusively, for a hub of
//! MicroStream knows one client by a name. A request between two such clients goes as it was sent; [`translate`] says what
//! becomes of it elsewhere.

mod bytes;
mod client;
mod config;
mod port;
mod translate;

use std::{
    collections::HashMap,
    sync::{
        Arc,
        atomic::{AtomicU32, Ordering::Relaxed},
    },
    time::Duration,
};

use axum::{Router, body::Body, extract::State, http::Request};
use foldhash::fast::RandomState;
use parking_lot::Mutex;

pub use self::config::Config;
use self::client::Client;
use super::{
    adapter::Adapter,
    engineio::{self, Server},
};
use crate::{error::Result, net::timer::TimerWheel, node::Node, rpc::Hub};

/// Where the original is.
const PATH: &str = "/socket.io/";

/// Bytes of one packet's attachments, in messages of the largest size.
const ATTACHED: usize = 8;
/// How long a client may be connected without joining: the original's.
const CONNECT: Duration = Duration::from_secs(45);
/// How long a socket that wants to take over from polls may take: the original's.
const UPGRADE: Duration = Duration::from_secs(10);
const FAREWELL: Duration = Duration::from_secs(5);

/// What its clients share.
pub struct MicroStream {
    rpc: Arc<Hub>,
    wheel: Arc<TimerWheel>,
    settings: Settings,
    /// For so many ticks an answer may be waited for.
    memory: u32,
    /// The clients that are connected to this node.
    names: Mutex<HashMap<Box<str>, Beat, RandomState>>,
}

struct Settings {
    heartbeat_timeout: Duration,
    sweep: Duration,
    connect: Duration,
    calls: usize,
    max_bytes: usize,
}

/// The tick of a client's last heartbeat.
type Beat = Arc<AtomicU32>;

pub(super) fn build(node: &Arc<Node>) -> Result<Adapter> {
    let server = serve(node);
    let answer =
        |State(server): State<Arc<Server>>, request: Request<Body>| async move { server.answer(request).await };
    Ok(Adapter::new(|path| path.starts_with(PATH), Router::new().fallback(answer).with_state(server)))
}

fn serve(node: &Arc<Node>) -> Arc<Server> {
    let hub = Arc::new(MicroStream::new(node));
    Server::start(
        Arc::new(settings(node)),
        node.clone(),
        Box::new(move |session, mut query| {
            // Of several the first, as far as anybody can tell.
            let names = query.take_all("serviceName");
            Box::new(Client::new(hub.clone(), session, names.first().map(|name| &**name)))
        }),
    )
}

fn settings(node: &Node) -> engineio::Settings {
    let (own, config): (Config, _) = (node.config.compat.get(), &node.config);
    engineio::Settings {
        ping: own.ping,
        ping_timeout: own.ping_timeout,
        probe: own.probe,
        max_payload: own.max_payload,
        queued: own.queued,
        sessions: config.limits.connections,
        body_time: config.limits.body_time,
        stalled: config.limits.stalled,
        upgrade: UPGRADE,
        farewell: FAREWELL,
        grace: config.drain.grace,
    }
}

impl MicroStream {
    fn new(node: &Arc<Node>) -> Self {
        let (own, rpc): (Config, _) = (node.config.compat.get(), &node.config.rpc);
        MicroStream {
            rpc: node.hub.clone(),
            wheel: node.timers.clone(),
            settings: Settings {
                heartbeat_timeout: own.heartbeat_timeout,
                sweep: own.sweep,
                connect: CONNECT,
                calls: own.calls,
                max_bytes: own.max_payload.saturating_mul(ATTACHED),
            },
            memory: TimerWheel::ticks(rpc.timeout.min(rpc.max_timeout) + rpc.late_window),
            names: Mutex::default(),
        }
    }

    fn comes(&self, name: &str, beat: &Beat) {
        self.names.lock().insert(name.into(), beat.clone());
    }

    /// Forgets a name, unless somebody else has it by now.
    fn leaves(&self, name: &str, beat: &Beat) {
        let mut names = self.names.lock();
        if names.get(name).is_some_and(|other| Arc::ptr_eq(other, beat)) {
            names.remove(name);
            if names.is_empty() {
                names.shrink_to_fit();
            }
        }
    }

    /// A heartbeat in somebody else's name counts, as with the original.
    fn beats(&self, name: &str) {
        if let Some(beat) = self.names.lock().get(name) {
            beat.store(self.wheel.now(), Relaxed);
        }
    }
}
