//! Every route of weir, and the rules that hold for all of them.

pub mod admin;
pub mod api;
pub mod error;
pub mod extract;
pub mod openapi;
pub mod origin;

use std::{panic::AssertUnwindSafe, sync::Arc};

use axum::{
    Router,
    body::Body,
    extract::FromRequestParts,
    http::{HeaderValue, Method, Request, StatusCode, Uri, Version},
    response::{Html, IntoResponse, Response},
    routing::{any, delete, get, post},
};
use bytes::Bytes;
use futures_util::FutureExt;
use http::{header, request::Parts};
use hyper::body::Incoming;
use tower::ServiceExt;

use crate::{
    auth::Identity,
    compat::{Adapter, Compat},
    error::{Code, Error, Retry},
    metrics::StatusClass,
    net::server::{HttpService, ListenerOptions, Rejected},
    node::Node,
    pattern::Pattern,
    transport::sse,
};
use api::events;
use origin::Origins;

/// Who comes in by a listener.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ListenerRole {
    /// Everyone: there is one kind of listener.
    One,
    Clients,
    /// `admin.listen`.
    Operators,
    /// `compat.grip.listen`: every path is an origin's.
    Proxy,
    /// `compat.grip.publish_listen`.
    Publishers,
}

/// What is not for clients, where operators have a listener of their own.
const OPERATIONS: [&str; 4] = ["/metrics", "/v1/channels", "/v1/connections", "/v1/consumers"];

/// A listener's way in: the rules for every request, then the routes.
pub struct Endpoint {
    router: Router,
    role: ListenerRole,
    origins: Origins,
    node: Arc<Node>,
    compat: Arc<Compat>,
}

impl Endpoint {
    /// `loopback`: only this machine can reach the listener.
    pub fn new(node: Arc<Node>, compat: Arc<Compat>, loopback: bool, role: ListenerRole) -> Self {
        let allowed = node.config.cors.origins.iter().map(|origin| Pattern::new(origin)).collect();
        // Nobody has credentials yet.
        let origins = Origins { loopback, anonymous: true, allowed };
        Endpoint { router: router(node.clone(), role), role, origins, node, compat }
    }

    /// Answers one request. Never fails, and never panics.
    pub async fn answer<B>(self: Arc<Self>, request: Request<B>) -> Response
    where
        B: http_body::Body<Data = Bytes> + Send + 'static,
        B::Error: Into<axum::BoxError>,
    {
        let (mut head, body) = request.into_parts();
        let version = head.version;
        if matches!(self.role, ListenerRole::Proxy | ListenerRole::Publishers) {
            let answer = caught(self.grip(head, Body::new(body))).await;
            return self.finish(version, answer);
        }
        if self.role != ListenerRole::Operators
            && let Some(adapter) = self.compat.find(head.uri.path())
        {
            return self.answer_by(adapter, head, Body::new(body)).await;
        }
        let page = self.origins.page(&head);
        let admitted = match head.extensions.get::<Rejected>() {
            Some(Rejected(error)) => Err(error.clone()),
            None => self.origins.check_host(&head).and_then(|()| self.origins.check_page(&head, &page)),
        };
        let mut answer = match admitted {
            Err(error) if head.uri.path() != "/v1/ws" => refusal(&head, error),
            checked => {
                if let Err(error) = checked {
                    head.extensions.insert(Rejected(error));
                }
                let preflight = (head.method == Method::OPTIONS).then(|| head.headers.clone());
                let method = head.method.clone();
                // Pinned where it is: these futures are large, and would be moved twice.
                let mut answer = caught(std::pin::pin!(self.route(head, Body::new(body)))).await;
                if answer.status() == StatusCode::METHOD_NOT_ALLOWED {
                    answer = not_allowed(&answer, &method);
                    if let Some(asked) = preflight {
                        let allow = answer.headers()[header::ALLOW].clone();
                        page.preflight(&asked, allow, answer.headers_mut());
                    }
                }
                answer
            }
        };
        let headers = answer.headers_mut();
        headers.entry(header::CACHE_CONTROL).or_insert(HeaderValue::from_static("no-store"));
        page.mark(headers);
        self.finish(version, answer)
    }

    /// Who comes in here, for people.
    pub fn purpose(&self) -> &'static str {
        match self.role {
            ListenerRole::One => "clients and admin",
            ListenerRole::Clients => "clients",
            ListenerRole::Operators => "admin",
            ListenerRole::Proxy => "GRIP proxy",
            ListenerRole::Publishers => "GRIP publish",
        }
    }

    /// None of weir's own rules hold before an origin: it has its own.
    async fn grip(&self, head: Parts, body: Body) -> Response {
        let refused = head.extensions.get::<Rejected>().map(|Rejected(error)| error.clone());
        let checked = match (refused, self.role) {
            (Some(error), _) => Err(error),
            (None, ListenerRole::Publishers) => self.origins.check_host(&head),
            _ => Ok(()),
        };
        if let Err(error) = checked {
            return refusal(&head, error);
        }
        let request = Request::from_parts(head, body);
        match &self.compat.grip {
            Some(grip) if self.role == ListenerRole::Proxy => grip.proxy(request).await,
            Some(grip) => grip.publish(request).await,
            None => StatusCode::NOT_FOUND.into_response(),
        }
    }

    /// Answers by an adapter's rules, which may have none of their own for pages of other origins.
    async fn answer_by(&self, adapter: &Adapter, head: Parts, body: Body) -> Response {
        let version = head.version;
        let page = adapter.our_cors.then(|| self.origins.page(&head));
        let admitted = match head.extensions.get::<Rejected>() {
            Some(Rejected(error)) => Err(error.clone()),
            None => self.origins.check_host(&head),
        };
        let admitted =
            admitted.and_then(|()| page.as_ref().map_or(Ok(()), |page| self.origins.check_page(&head, page)));
        if let Err(error) = admitted {
            let mut answer = refusal(&head, error);
            match page {
                Some(page) => page.mark(answer.headers_mut()),
                // The originals are open to every page; one that cannot read this takes it for the end.
                None => {
                    let every = HeaderValue::from_static("*");
                    answer.headers_mut().insert(header::ACCESS_CONTROL_ALLOW_ORIGIN, every);
                }
            }
            return self.finish(version, answer);
        }
        let preflight = (head.method == Method::OPTIONS).then(|| head.headers.clone());
        let method = head.method.clone();
        let mut answer = caught(adapter.answer(Request::from_parts(head, body))).await;
        if let Some(page) = page {
            if answer.status() == StatusCode::METHOD_NOT_ALLOWED {
                answer = not_allowed(&answer, &method);
                if let Some(asked) = preflight {
                    let allow = answer.headers()[header::ALLOW].clone();
                    page.preflight(&asked, allow, answer.headers_mut());
                }
            }
            page.mark(answer.headers_mut());
        }
        self.finish(version, answer)
    }

    async fn route(&self, mut head: Parts, body: Body) -> Response {
        // What comes ten thousand times a second goes by no router: its boxes would cost a sixth of a publish.
        let frequent = head.uri.path() == "/v1/events" && self.role != ListenerRole::Operators;
        if frequent && (head.method == Method::POST || head.method == Method::GET) {
            return match Identity::from_request_parts(&mut head, &self.node).await {
                Ok(identity) if head.method == Method::POST => {
                    events::publish(&self.node, &identity, &head, body).await.into_response()
                }
                Ok(identity) => events::get(&self.node, &identity, &head).await,
                Err(error) => error.into_response(),
            };
        }
        match self.router.clone().oneshot(Request::from_parts(head, body)).await {
            Ok(answer) => answer,
            Err(never) => match never {},
        }
    }

    /// What holds for every answer, an adapter's too.
    fn finish(&self, version: Version, mut answer: Response) -> Response {
        self.node.metrics.requests[StatusClass::new(answer.status().as_u16())].add(1);
        let upgrades = answer.status() == StatusCode::SWITCHING_PROTOCOLS;
        // Whoever comes back, comes back to a node that stays. (HTTP/2 has a frame for it, not a header.)
        if self.node.draining.is_cancelled() && version <= Version::HTTP_11 && !upgrades {
            answer.headers_mut().insert(header::CONNECTION, HeaderValue::from_static("close"));
        }
        answer
    }
}

impl HttpService for Endpoint {
    fn respond(self: Arc<Self>, request: Request<Incoming>) -> impl Future<Output = Response> + Send {
        self.answer(request)
    }

    fn options(&self) -> ListenerOptions {
        ListenerOptions {
            exempt_from_limit: self.role == ListenerRole::Operators,
            tcp_keepalive: self.role == ListenerRole::Proxy,
        }
    }

    fn is_probe(&self, path: &str) -> bool {
        matches!(path, "/health/live" | "/health/ready" | "/metrics")
    }
}

/// What a request that must not go on hears. A stream hears in-band of what will pass.
fn refusal(head: &Parts, error: Error) -> Response {
    let stream = head.uri.path() == "/v1/sse" || sse::is_wanted(&head.headers);
    if stream && error.code().retry() == Retry::Yes { sse::refusal(&error) } else { error.into_response() }
}

/// The router's bare 405 knows what the path takes. `OPTIONS` asks for just that.
fn not_allowed(bare: &Response, method: &Method) -> Response {
    let takes = bare.headers().get(header::ALLOW).and_then(|allow| allow.to_str().ok()).unwrap_or_default();
    let takes: Vec<_> =
        takes.split(',').map(str::trim).filter(|method| !method.is_empty()).chain(["OPTIONS"]).collect();
    let takes = takes.join(", ");
    let mut answer = match *method {
        Method::OPTIONS => StatusCode::NO_CONTENT.into_response(),
        _ => Error::new(Code::MethodNotAllowed, format!("this path takes {takes}")).into_response(),
    };
    // Method names only: always a legal value.
    let allow = HeaderValue::from_str(&takes).unwrap_or(HeaderValue::from_static("OPTIONS"));
    answer.headers_mut().insert(header::ALLOW, allow);
    answer
}

async fn not_found(uri: Uri) -> Error {
    Error::new(Code::NotFound, format!("there is no {}; GET /openapi.json lists what there is", uri.path()))
}

async fn elsewhere(uri: Uri) -> Error {
    let detail = format!("{} is for operators, who have a listener of their own here: ask at admin.listen", uri.path());
    Error::new(Code::NotFound, detail)
}

/// The answer, or `internal` if the handler panics.
async fn caught(answering: impl Future<Output = Response>) -> Response {
    // Unwind safety: what a handler shares is behind locks that do not poison, and the rest is gone.
    match AssertUnwindSafe(answering).catch_unwind().await {
        Ok(answer) => answer,
        Err(panic) => Error::internal(cause(&*panic)).into_response(),
    }
}

fn cause(panic: &(dyn std::any::Any + Send)) -> String {
    let text = panic.downcast_ref::<String>().map(String::as_str).or_else(|| panic.downcast_ref::<&str>().copied());
    format!("panic: {}", text.unwrap_or("without a message"))
}

/// Every route.
pub fn router(node: Arc<Node>, endpoint: ListenerRole) -> Router {
    use api::{channels, connections, consumers, jsonrpc, presence, services, stream};
    let health = Router::new().route("/health/live", get(admin::live)).route("/health/ready", get(admin::ready));
    let clients = Router::new()
        .route("/", get(page))
        .route("/openapi.json", get(openapi::document))
        .route("/v1/events", get(events::get_by_route).post(events::publish_by_route))
        .route("/v1/sse", get(stream::get))
        .route("/v1/ws", get(jsonrpc::upgrade))
        .route("/v1/rpc", post(jsonrpc::post))
        .route("/v1/presence", get(presence::get))
        .route("/v1/consumers/{name}", get(consumers::get).delete(consumers::delete))
        .route("/v1/consumers/{name}/commit", post(consumers::commit))
        .route("/v1/consumers/{name}/seek", post(consumers::seek))
        .route("/v1/services", get(services::list))
        .route("/v1/services/{*path}", post(services::call));
    let operators = Router::new()
        .route("/metrics", get(admin::metrics))
        .route("/v1/events", delete(events::delete))
        .route("/v1/channels", get(channels::get))
        .route("/v1/connections", get(connections::list).delete(connections::kick))
        .route("/v1/consumers", get(consumers::list));
    let routes = match endpoint {
        ListenerRole::One => health.merge(clients).merge(operators),
        ListenerRole::Clients => {
            OPERATIONS.into_iter().fold(health.merge(clients), |routes, path| routes.route(path, any(elsewhere)))
        }
        ListenerRole::Operators => health.merge(operators),
        ListenerRole::Proxy | ListenerRole::Publishers => Router::new(),
    };
    routes.fallback(not_found).with_state(node)
}

/// `GET /`: a page to try weir with.
async fn page() -> Html<&'static str> {
    Html(include_str!("http/page.html"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_panic_is_an_answer_that_tells_nothing() {
        let answer = caught(async { panic!("the secret is {}", 42) }).await;
        assert_eq!(answer.status(), 500);
        let body = axum::body::to_bytes(answer.into_body(), 10_000).await.unwrap();
        let problem: serde_json::Value = serde_json::from_slice(&body).unwrap();
        assert_eq!(problem["code"], "internal");
        assert!(problem["id"].is_string() && !problem.to_string().contains("secret"), "{problem}");
    }
}
