//! node-sse-server: `/subscribe`, `/publish`, `/lastEvent` and `/`.
//!
//! Channels and their last events are the bus's: what other worlds publish its browsers see, from every node, and after
//! a restart where the bus survives one. Who is online all nodes know of each other.

mod config;
mod js;
mod presence;
mod publish;
mod subscribe;
mod wire;

use std::sync::{
    Arc,
    atomic::{AtomicU64, Ordering::Relaxed},
};

use axum::{
    Router,
    body::Body,
    extract::State,
    http::{HeaderValue, Method, Request, Response, StatusCode, header, request::Parts as Head},
};
use tokio_util::task::AbortOnDropHandle;

use self::{config::CLIENTS, presence::Presence, subscribe::Known};
pub use self::config::Config;
use super::{adapter::Adapter, form::Form};
use crate::{
    channel::Channel,
    config::Backend,
    error::{Error, Result, Retry},
    event::{self, Draft},
    node::Node,
    transport::sse,
};

/// What all requests share.
struct NodeSse {
    node: Arc<Node>,
    presence: Arc<Presence>,
    /// The last `clientId` that was counted here.
    clients: AtomicU64,
    known: Known,
    _others: AbortOnDropHandle<()>,
}

#[derive(Clone, Copy)]
enum Route {
    Root,
    Subscribe,
    Publish,
    LastEvent,
}

/// A failure as the original tells it.
enum Refusal {
    /// A sentence.
    Text(String),
    /// A page of Express, for what its body parser refuses. Without the stack of calls that is in the original's.
    Page(StatusCode, String),
    /// Of what has no counterpart in the original.
    Weir(Error),
}

pub(super) fn build(node: &Arc<Node>) -> Result<Adapter> {
    let presence = Arc::<Presence>::default();
    let others = tokio::spawn(Presence::share(presence.clone(), node.cluster.clone()));
    let it = NodeSse {
        _others: AbortOnDropHandle::new(others),
        presence,
        clients: AtomicU64::new(0),
        known: Known::default(),
        node: node.clone(),
    };
    let router = Router::new().fallback(answer).with_state(Arc::new(it));
    Ok(Adapter::new(|path| Route::find(path).is_some(), router))
}

async fn answer(State(it): State<Arc<NodeSse>>, request: Request<Body>) -> Response<Body> {
    let (head, body) = request.into_parts();
    let streams = matches!(Route::find(head.uri.path()), Some(Route::Subscribe));
    let answer = if head.method == Method::OPTIONS { Ok(preflight(&head)) } else { it.answer(&head, body).await };
    let mut answer = match answer {
        Ok(answer) => answer,
        Err(Refusal::Text(text)) => wire::bad_request(text),
        Err(Refusal::Page(status, text)) => wire::page(status, &text),
        // Any other status would end an EventSource for good.
        Err(Refusal::Weir(error)) if streams && error.code().retry() == Retry::Yes => sse::refusal(&error),
        Err(Refusal::Weir(error)) => wire::failure(&error),
    };
    answer.headers_mut().insert(header::ACCESS_CONTROL_ALLOW_ORIGIN, HeaderValue::from_static("*"));
    answer
}

impl NodeSse {
    /// A number for a client without a name: the next, on whatever node.
    async fn number(&self) -> Result<u64, Error> {
        if self.node.config.bus.backend == Backend::Memory {
            return Ok(self.clients.fetch_add(1, Relaxed) + 1);
        }
        let draft = Draft::new(event::DraftParts::default(), self.node.config.limits.event)?;
        Ok(self.node.bus.publish_one("", &Channel::parse(CLIENTS)?, draft).await?.position.offset)
    }

    async fn answer(&self, head: &Head, body: Body) -> Result<Response<Body>, Refusal> {
        let path = head.uri.path();
        let query = Form::parse(head.uri.query().unwrap_or_default());
        let reads = matches!(head.method, Method::GET | Method::HEAD);
        match Route::find(path) {
            Some(Route::Root) if reads => Ok(Response::new(Body::from("ROOT"))),
            Some(Route::Subscribe) if reads => self.subscribe(head, &query).await,
            Some(Route::LastEvent) if reads => self.last_event(&query).await,
            Some(Route::Publish) if head.method == Method::POST => self.publish(head, body).await,
            _ => Err(Refusal::Page(StatusCode::NOT_FOUND, format!("Cannot {} {path}", head.method))),
        }
    }
}

/// As Express's `cors` answers, whoever asks.
fn preflight(head: &Head) -> Response<Body> {
    let mut answer = Response::new(Body::empty());
    *answer.status_mut() = StatusCode::NO_CONTENT;
    let headers = answer.headers_mut();
    let methods = HeaderValue::from_static("GET,HEAD,PUT,PATCH,POST,DELETE");
    headers.insert(header::ACCESS_CONTROL_ALLOW_METHODS, methods);
    headers.insert(header::VARY, HeaderValue::from_static("Access-Control-Request-Headers"));
    if let Some(asked) = head.headers.get(header::ACCESS_CONTROL_REQUEST_HEADERS) {
        headers.insert(header::ACCESS_CONTROL_ALLOW_HEADERS, asked.clone());
    }
    answer
}

// === impl Route ===

impl Route {
    /// Express minds neither letters' case nor one slash at the end.
    fn find(path: &str) -> Option<Self> {
        if path == "/" {
            return Some(Route::Root);
        }
        let bare = path.strip_suffix('/').unwrap_or(path);
        let all = [("/subscribe", Route::Subscribe), ("/publish", Route::Publish), ("/lastEvent", Route::LastEvent)];
        all.into_iter().find(|(name, _)| bare.eq_ignore_ascii_case(name)).map(|(_, route)| route)
    }
}

// === impl Refusal ===

impl From<Error> for Refusal {
    fn from(error: Error) -> Self {
        Refusal::Weir(error)
    }
}
