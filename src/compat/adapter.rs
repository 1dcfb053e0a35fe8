//! [`Adapter`]: the paths and listeners that an adapter serves.

use std::{net::SocketAddr, sync::Arc, time::Duration};

use axum::{
    Router,
    body::Body,
    http::{HeaderMap, HeaderValue, Request, Response, StatusCode, header, request::Parts},
};
use clap::ArgMatches;
use futures_util::future::{BoxFuture, LocalBoxFuture};
use tower::ServiceExt as _;

use crate::{
    auth::Identity,
    config::{AdapterConfig, ChannelRule, Config, Keep},
    error::Result,
    node::Node,
    terminal::{Failure, Output},
};

/// An entry of the list of adapters.
pub(super) struct AdapterEntry {
    /// The default settings.
    pub(super) config: fn() -> Box<dyn AdapterConfig>,
    pub(super) build: fn(&Arc<Node>) -> Result<Adapter>,
    pub(super) importer: Option<Importer>,
}

/// `weir import NAME`, which copies the data of the original into weir. The configuration file is the argument
/// `config`.
pub(crate) struct Importer {
    pub(crate) name: &'static str,
    /// Adds the arguments and the help.
    pub(crate) args: fn(clap::Command) -> clap::Command,
    pub(crate) run:
        for<'a> fn(&'a ArgMatches, Config, &'a mut Output) -> LocalBoxFuture<'a, std::result::Result<(), Failure>>,
}

/// A running adapter.
pub(crate) struct Adapter {
    owns: Box<dyn Fn(&str) -> bool + Send + Sync>,
    router: Router,
    /// Whether weir's CORS rules (`cors.origins`) apply to its paths. Otherwise the adapter sets its own headers.
    pub(crate) our_cors: bool,
    /// Whether clients are authenticated by weir's rules. Otherwise the adapter has its own.
    pub(crate) authenticates: bool,
    /// Taken by the application, which binds them.
    pub(crate) listeners: Vec<Listener>,
}

/// A listener of an adapter, all of whose paths are the adapter's.
pub(crate) struct Listener {
    pub(crate) address: SocketAddr,
    /// Shown when the listener starts.
    pub(crate) purpose: &'static str,
    /// Shown after the error if the address is in use.
    pub(crate) if_in_use: &'static str,
    pub(crate) tcp_keepalive: bool,
    /// Requests are for the servers behind it: their `Host` need not name this machine, and their bodies stay encoded.
    pub(crate) is_proxy: bool,
    pub(crate) handler: Handler,
}

/// Answers the requests of a [`Listener`].
pub(crate) type Handler = Box<dyn Fn(Request<Body>) -> BoxFuture<'static, Response<Body>> + Send + Sync>;

/// The clients of an adapter: those with weir's credentials have the permissions of these, others the roles of the adapter.
pub(super) struct AdapterClients {
    without_credentials: Identity,
}

impl AdapterClients {
    /// `roles` is the setting `compat.NAME.roles`.
    pub(super) fn new(node: &Node, roles: &[String]) -> Self {
        AdapterClients { without_credentials: node.auth.with_roles("", roles, false) }
    }

    /// The client of a request. The roles of the adapter do not serve pages of other origins.
    pub(super) fn identity(&self, head: &Parts) -> Identity {
        let identity = Identity::of(&head.extensions);
        match identity.subject().is_empty() && !identity.is_read_only() {
            true => self.without_credentials.clone(),
            false => identity,
        }
    }
}

impl Adapter {
    /// An adapter on the main listeners. `router` gets every request whose path is one that it `owns`, of any method,
    /// so that 404 and 405 are the original's.
    pub(super) fn new(owns: impl Fn(&str) -> bool + Send + Sync + 'static, router: Router) -> Self {
        Adapter { owns: Box::new(owns), router, our_cors: false, authenticates: true, listeners: Vec::new() }
    }

    pub(super) fn with_our_cors(self) -> Self {
        Adapter { our_cors: true, ..self }
    }

    pub(super) fn without_authentication(self) -> Self {
        Adapter { authenticates: false, ..self }
    }

    pub(super) fn with_listeners(self, listeners: Vec<Listener>) -> Self {
        Adapter { listeners, ..self }
    }

    pub(crate) fn owns(&self, path: &str) -> bool {
        (self.owns)(path)
    }

    pub(crate) async fn answer(&self, request: Request<Body>) -> Response<Body> {
        match self.router.clone().oneshot(request).await {
            Ok(answer) => answer,
            Err(never) => match never {},
        }
    }
}

/// A [`Handler`] that calls `answer` with shared state.
pub(super) fn handler<T, F>(state: &Arc<T>, answer: fn(Arc<T>, Request<Body>) -> F) -> Handler
where
    T: Send + Sync + 'static,
    F: Future<Output = Response<Body>> + Send + 'static,
{
    let state = state.clone();
    Box::new(move |request| Box::pin(answer(state.clone(), request)))
}

/// The response of Express's `cors` to a preflight with the headers `request`: allows requests from every origin.
pub(super) fn preflight(request: &HeaderMap) -> Response<Body> {
    let mut answer = Response::new(Body::empty());
    *answer.status_mut() = StatusCode::NO_CONTENT;
    let headers = answer.headers_mut();
    let methods = HeaderValue::from_static("GET,HEAD,PUT,PATCH,POST,DELETE");
    headers.insert(header::ACCESS_CONTROL_ALLOW_METHODS, methods);
    headers.insert(header::VARY, HeaderValue::from_static("Access-Control-Request-Headers"));
    if let Some(requested) = request.get(header::ACCESS_CONTROL_REQUEST_HEADERS) {
        headers.insert(header::ACCESS_CONTROL_ALLOW_HEADERS, requested.clone());
    }
    answer
}

/// Retention of a channel whose `count` newest events are kept for good.
pub(super) fn permanent(channel: &str, count: usize) -> ChannelRule {
    let age = Duration::from_secs(100 * 365 * 24 * 60 * 60);
    ChannelRule { pattern: channel.to_owned(), keep: Keep { count, age, bytes: 1 << 30 } }
}
