//! node-sse-server: `/subscribe`, `/publish`, `/lastEvent` and `/`.
//!
//! Channels and their last events are those of the bus: clients receive events of any publisher on any node. All nodes
//! share the list of clients that are online.

mod config;
mod context;
mod js;
mod known_channels;
mod online;
mod publish;
mod subscribe;
mod wire;

use std::sync::Arc;

use axum::{
    Router,
    body::Body,
    extract::State,
    http::{HeaderValue, Method, Request, Response, StatusCode, header, request::Parts as Head},
};

pub use self::config::Config;
use self::context::{NodeSse, NodeSseError};
use super::{
    adapter::{Adapter, AdapterEntry, preflight},
    form::Form,
};
use crate::{
    error::{Result, Retry},
    node::Node,
    transport::sse,
};

#[derive(Clone, Copy)]
enum NodeSseRoute {
    Root,
    Subscribe,
    Publish,
    LastEvent,
}

pub(super) const ADAPTER: AdapterEntry = AdapterEntry { config: || Box::<Config>::default(), build, importer: None };

fn build(node: &Arc<Node>) -> Result<Adapter> {
    let node_sse = Arc::new(NodeSse::new(node));
    let router = Router::new().fallback(answer).with_state(node_sse);
    Ok(Adapter::new(|path| NodeSseRoute::find(path).is_some(), router))
}

async fn answer(State(it): State<Arc<NodeSse>>, request: Request<Body>) -> Response<Body> {
    let (head, body) = request.into_parts();
    let streams = matches!(NodeSseRoute::find(head.uri.path()), Some(NodeSseRoute::Subscribe));
    let answer =
        if head.method == Method::OPTIONS { Ok(preflight(&head.headers)) } else { it.answer(&head, body).await };
    let mut answer = match answer {
        Ok(answer) => answer,
        Err(NodeSseError::Text(text)) => wire::bad_request(text),
        Err(NodeSseError::Page(status, text)) => wire::page(status, &text),
        // An `EventSource` does not reconnect after another status.
        Err(NodeSseError::Weir(error)) if streams && error.code().retry() == Retry::Yes => sse::retry_response(&error),
        Err(NodeSseError::Weir(error)) => wire::failure(&error),
    };
    answer.headers_mut().insert(header::ACCESS_CONTROL_ALLOW_ORIGIN, HeaderValue::from_static("*"));
    answer
}

impl NodeSse {
    async fn answer(&self, head: &Head, body: Body) -> Result<Response<Body>, NodeSseError> {
        let path = head.uri.path();
        let query = Form::parse(head.uri.query().unwrap_or_default());
        let reads = matches!(head.method, Method::GET | Method::HEAD);
        match NodeSseRoute::find(path) {
            Some(NodeSseRoute::Root) if reads => Ok(Response::new(Body::from("ROOT"))),
            Some(NodeSseRoute::Subscribe) if reads => self.subscribe(head, &query).await,
            Some(NodeSseRoute::LastEvent) if reads => self.last_event(head, &query).await,
            Some(NodeSseRoute::Publish) if head.method == Method::POST => self.publish(head, body).await,
            _ => Err(NodeSseError::Page(StatusCode::NOT_FOUND, format!("Cannot {} {path}", head.method))),
        }
    }
}

impl NodeSseRoute {
    /// Express ignores case and a slash at the end.
    fn find(path: &str) -> Option<Self> {
        if path == "/" {
            return Some(NodeSseRoute::Root);
        }
        let bare = path.strip_suffix('/').unwrap_or(path);
        let all = [
            ("/subscribe", NodeSseRoute::Subscribe),
            ("/publish", NodeSseRoute::Publish),
            ("/lastEvent", NodeSseRoute::LastEvent),
        ];
        all.into_iter().find(|(name, _)| bare.eq_ignore_ascii_case(name)).map(|(_, route)| route)
    }
}
