//! The routes of weir, and the rules that apply to all of them.

pub(crate) mod admin;
pub(crate) mod api;
pub(crate) mod error;
pub(crate) mod extract;
pub(crate) mod openapi;
pub(crate) mod origin;
pub(crate) mod schema;

use std::{panic::AssertUnwindSafe, sync::Arc, time::Instant};

use axum::{
    Router,
    body::Body,
    http::{HeaderMap, HeaderValue, Method, Request, StatusCode, Uri, Version},
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
    compat::{Adapter, Listener},
    error::{Code, Error, Result, Retry},
    metrics::{RouteClass, StatusClass},
    net::{
        content_coding::{check_transfer_coding, decode_content},
        server::{HttpService, ListenerOptions, Rejected},
    },
    node::Node,
    transport::sse,
};
use api::events;
use error::problem;
use origin::{ForeignPage, OriginPolicy, RequestOrigin};

/// The purpose of a listener.
pub(crate) enum ListenerRole {
    /// Clients and administration: there is no `admin.listen`.
    All,
    Clients,
    /// `admin.listen`.
    Admin,
    Adapter(Listener),
}

/// The paths that are served at `admin.listen` only, if it is set. Paths that clients use too have their other methods
/// there: deleting events and consumers.
const ADMIN_PATHS: [&str; 4] = ["/metrics", "/v1/channels", "/v1/connections", "/v1/consumers"];

/// The HTTP service of a listener: the rules for every request, then the routes.
pub struct Endpoint {
    router: Router,
    role: ListenerRole,
    origins: OriginPolicy,
    node: Arc<Node>,
    adapters: Arc<[Adapter]>,
}

impl Endpoint {
    /// `loopback`: only this machine can reach the listener.
    pub(crate) fn new(node: Arc<Node>, adapters: Arc<[Adapter]>, loopback: bool, role: ListenerRole) -> Self {
        let origins =
            OriginPolicy::new(loopback, !node.auth.is_on(), &node.config.cors.origins, &node.config.server.hosts);
        Endpoint { router: router(node.clone(), &role), role, origins, node, adapters }
    }

    /// Answers one request. A panic of a handler is answered with `internal`.
    pub async fn answer<B>(self: Arc<Self>, request: Request<B>) -> Response
    where
        B: http_body::Body<Data = Bytes> + Send + 'static,
        B::Error: Into<axum::BoxError>,
    {
        let (mut head, body) = request.into_parts();
        let begun = RequestStart::new(&head);
        let body = self.decode(&mut head, Body::new(body));
        if let ListenerRole::Adapter(listener) = &self.role {
            let answer = catch_panic(self.answer_on(listener, head, body)).await;
            return self.finish(begun.of_adapter(), answer);
        }
        if !matches!(self.role, ListenerRole::Admin)
            && let Some(adapter) = self.adapters.iter().find(|adapter| adapter.owns(head.uri.path()))
        {
            return self.answer_by(adapter, begun.of_adapter(), head, body).await;
        }
        let origin = self.origins.classify(&head);
        let admitted = match self.admit(&mut head, true, Some((&origin, true))) {
            Ok(()) => self.authenticate(&head, &origin).await,
            Err(error) => Err(error),
        };
        let mut answer = match admitted {
            Err(error) if head.uri.path() != "/v1/ws" => rejection(&head, error),
            admitted => {
                match admitted {
                    Ok(identity) => drop(head.extensions.insert(identity)),
                    Err(error) => drop(head.extensions.insert(Rejected(error))),
                }
                let preflight = (head.method == Method::OPTIONS).then(|| head.headers.clone());
                let method = head.method.clone();
                // Pinned on the stack: these futures are large, and would otherwise be moved twice.
                let answer = catch_panic(std::pin::pin!(self.route(head, body))).await;
                complete_method_not_allowed(answer, &method, preflight, &origin)
            }
        };
        let headers = answer.headers_mut();
        headers.entry(header::CACHE_CONTROL).or_insert(HeaderValue::from_static("no-store"));
        origin.mark(headers);
        self.finish(begun, answer)
    }

    /// Removes the coding of the body, on every path. A request with an unsupported one gets the error as its
    /// [`Rejected`].
    fn decode(&self, head: &mut Parts, body: Body) -> Body {
        // A proxy forwards the body as it is.
        let proxy = matches!(&self.role, ListenerRole::Adapter(listener) if listener.is_proxy);
        let decoded = check_transfer_coding(&head.headers).and_then(|()| match proxy {
            true => Ok(body),
            false => decode_content(head, body),
        });
        decoded.unwrap_or_else(|error| {
            head.extensions.get_or_insert_with(|| Rejected(error));
            Body::empty()
        })
    }

    /// The client of a request. Requests that need no permission are not authenticated.
    async fn authenticate(&self, head: &Parts, origin: &RequestOrigin) -> Result<Identity> {
        let path = head.uri.path();
        let public = matches!(path, "/" | "/openapi.json") || path.starts_with("/health/");
        if public || head.method == Method::OPTIONS {
            return Ok(self.node.auth.anonymous(false));
        }
        let at_admin = matches!(self.role, ListenerRole::Admin);
        // Scrapers have no credentials; clients cannot reach admin.listen.
        if path == "/metrics" && at_admin {
            return Ok(Identity::open(true));
        }
        let identity = self.node.auth.authenticate(head, self.origins.is_loopback() || at_admin).await?;
        // The roles of clients without credentials let no page of another origin write.
        let denied = matches!(origin, RequestOrigin::Denied) && self.node.auth.is_on() && identity.subject().is_empty();
        let foreign = denied || head.extensions.get::<ForeignPage>().is_some();
        Ok(if foreign { identity.read_only() } else { identity })
    }

    /// The purpose of the listener, for the log.
    pub(crate) fn purpose(&self) -> &'static str {
        match &self.role {
            ListenerRole::All => "clients and admin",
            ListenerRole::Clients => "clients",
            ListenerRole::Admin => "admin",
            ListenerRole::Adapter(listener) => listener.purpose,
        }
    }

    /// Answers on an adapter's listener, to which weir's rules for origins and paths do not apply.
    async fn answer_on(&self, listener: &Listener, mut head: Parts, body: Body) -> Response {
        match self.admit(&mut head, !listener.is_proxy, None) {
            Ok(()) => (listener.handler)(Request::from_parts(head, body)).await,
            Err(error) => rejection(&head, error),
        }
    }

    /// Answers at an adapter's path on a main listener. weir's CORS rules apply if the adapter asks for them.
    async fn answer_by(&self, adapter: &Adapter, begun: RequestStart, mut head: Parts, body: Body) -> Response {
        let origin = self.origins.classify(&head);
        let admitted = match self.admit(&mut head, true, Some((&origin, adapter.our_cors))) {
            Ok(()) if adapter.authenticates => self.authenticate(&head, &origin).await,
            Ok(()) => Ok(self.node.auth.anonymous(false)),
            Err(error) => Err(error),
        };
        let origin = adapter.our_cors.then_some(origin);
        match admitted {
            Ok(identity) => drop(head.extensions.insert(identity)),
            Err(error) => {
                let mut answer = rejection(&head, error);
                match origin {
                    Some(origin) => origin.mark(answer.headers_mut()),
                    // The originals allow every origin. A page that cannot read the error would not reconnect.
                    None => {
                        let every = HeaderValue::from_static("*");
                        answer.headers_mut().insert(header::ACCESS_CONTROL_ALLOW_ORIGIN, every);
                    }
                }
                return self.finish(begun, answer);
            }
        }
        let preflight = (head.method == Method::OPTIONS).then(|| head.headers.clone());
        let method = head.method.clone();
        let mut answer = catch_panic(adapter.answer(Request::from_parts(head, body))).await;
        if let Some(origin) = origin {
            answer = complete_method_not_allowed(answer, &method, preflight, &origin);
            origin.mark(answer.headers_mut());
        }
        self.finish(begun, answer)
    }

    /// Applies the rules of the server and for hosts, and those for origins if there is one; with it comes whether weir's
    /// CORS rules apply.
    fn admit(&self, head: &mut Parts, check_host: bool, origin: Option<(&RequestOrigin, bool)>) -> Result<()> {
        if let Some(Rejected(error)) = head.extensions.get() {
            return Err(error.clone());
        }
        if check_host {
            self.origins.check_host(head)?;
        }
        origin.map_or(Ok(()), |(origin, cors)| self.origins.check_origin(head, origin, cors))
    }

    async fn route(&self, head: Parts, body: Body) -> Response {
        // The most frequent requests bypass the router, whose boxed futures would cost a sixth of a publish.
        let frequent = head.uri.path() == "/v1/events" && !matches!(self.role, ListenerRole::Admin);
        if frequent && (head.method == Method::POST || head.method == Method::GET) {
            let identity = Identity::of(&head.extensions);
            return match head.method {
                Method::POST => events::publish(&self.node, &identity, &head, body).await.into_response(),
                _ => events::get(&self.node, &identity, &head).await,
            };
        }
        match self.router.clone().oneshot(Request::from_parts(head, body)).await {
            Ok(answer) => answer,
            Err(never) => match never {},
        }
    }

    /// Completes every response, including those of adapters.
    fn finish(&self, begun: RequestStart, mut answer: Response) -> Response {
        let RequestStart { version, route, time } = begun;
        self.node.metrics.requests[StatusClass::new(answer.status().as_u16())].add(1);
        self.node.metrics.request_seconds[route].record(time.elapsed());
        let upgrades = answer.status() == StatusCode::SWITCHING_PROTOCOLS;
        // `Connection: close` while draining, so that clients reconnect to another node. HTTP/2 has a GOAWAY frame
        // instead.
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
            exempt_from_limit: matches!(self.role, ListenerRole::Admin),
            tcp_keepalive: matches!(&self.role, ListenerRole::Adapter(listener) if listener.tcp_keepalive),
        }
    }

    fn is_probe(&self, path: &str) -> bool {
        matches!(path, "/health/live" | "/health/ready" | "/metrics")
    }

    fn reject(&self, head: &Parts, status: StatusCode, error: &Error) -> Response {
        let mut answer = problem(error, Some(status.as_u16()), None);
        answer.headers_mut().insert(header::CACHE_CONTROL, HeaderValue::from_static("no-store"));
        let adapter = self.adapters.iter().find(|adapter| adapter.owns(head.uri.path()));
        if matches!(self.role, ListenerRole::Adapter(_)) || adapter.is_some_and(|adapter| !adapter.our_cors) {
            // The originals allow every origin.
            answer.headers_mut().insert(header::ACCESS_CONTROL_ALLOW_ORIGIN, HeaderValue::from_static("*"));
        } else {
            self.origins.classify(head).mark(answer.headers_mut());
        }
        let begun = RequestStart { version: Version::HTTP_11, route: RouteClass::Other, time: Instant::now() };
        self.finish(begun, answer)
    }
}

/// What a response is finished with.
struct RequestStart {
    version: Version,
    route: RouteClass,
    time: Instant,
}

impl RequestStart {
    fn new(head: &Parts) -> Self {
        RequestStart { version: head.version, route: route_class(&head.method, head.uri.path()), time: Instant::now() }
    }

    fn of_adapter(self) -> Self {
        RequestStart { route: RouteClass::Adapter, ..self }
    }
}

fn route_class(method: &Method, path: &str) -> RouteClass {
    let (first, rest) = path.strip_prefix("/v1/").map_or(("", path), |path| path.split_once('/').unwrap_or((path, "")));
    match (first, rest) {
        ("events", "") if *method == Method::POST => RouteClass::Publish,
        ("events", "") if *method == Method::GET => RouteClass::Read,
        ("events" | "channels", "") => RouteClass::Channels,
        ("consumers", _) => RouteClass::Consumers,
        ("presence", "") => RouteClass::Presence,
        ("connections", "") => RouteClass::Connections,
        ("services", "") => RouteClass::Services,
        ("services", _) => RouteClass::Call,
        ("rpc", "") => RouteClass::Rpc,
        ("sse" | "ws", "") => RouteClass::Stream,
        ("", "/" | "/health/live" | "/health/ready" | "/metrics" | "/openapi.json") => RouteClass::Operations,
        _ => RouteClass::Other,
    }
}

/// The response to a rejected request. A stream is rejected in-band if the client may retry, because an `EventSource`
/// gives up on an error status.
fn rejection(head: &Parts, error: Error) -> Response {
    let stream = head.uri.path() == "/v1/sse" || sse::is_wanted(&head.headers);
    if stream && error.code().retry() == Retry::Yes { sse::retry_response(&error) } else { error.into_response() }
}

/// Completes a 405 of the router, whose `Allow` lists the methods of the path. `OPTIONS` gets the list as a 204; `preflight`
/// are its headers.
fn complete_method_not_allowed(
    bare: Response,
    method: &Method,
    preflight: Option<HeaderMap>,
    origin: &RequestOrigin,
) -> Response {
    if bare.status() != StatusCode::METHOD_NOT_ALLOWED {
        return bare;
    }
    let methods = bare.headers().get(header::ALLOW).and_then(|allow| allow.to_str().ok()).unwrap_or_default();
    let methods = methods.split(',').map(str::trim).filter(|method| !method.is_empty()).chain(["OPTIONS"]);
    let methods = Vec::from_iter(methods).join(", ");
    // Method names are always valid in a header.
    let allow = HeaderValue::from_str(&methods).unwrap_or(HeaderValue::from_static("OPTIONS"));
    let mut answer = match *method {
        Method::OPTIONS => StatusCode::NO_CONTENT.into_response(),
        _ => Error::new(Code::MethodNotAllowed, format!("this path supports {methods}")).into_response(),
    };
    answer.headers_mut().insert(header::ALLOW, allow.clone());
    if let Some(request) = preflight {
        origin.preflight(&request, allow, answer.headers_mut());
    }
    answer
}

async fn not_found(uri: Uri) -> Error {
    Error::new(Code::NotFound, format!("there is no {}; GET /openapi.json describes all paths", uri.path()))
}

async fn at_admin_listener(uri: Uri) -> Error {
    let detail = format!("{} is served at admin.listen only", uri.path());
    Error::new(Code::NotFound, detail)
}

/// The response, or `internal` if the handler panics.
async fn catch_panic(answering: impl Future<Output = Response>) -> Response {
    // Unwind safety: state that handlers share is behind locks that do not poison; the rest is dropped.
    match AssertUnwindSafe(answering).catch_unwind().await {
        Ok(answer) => answer,
        Err(panic) => Error::internal(cause(&*panic)).into_response(),
    }
}

fn cause(panic: &(dyn std::any::Any + Send)) -> String {
    let text = panic.downcast_ref::<String>().map(String::as_str).or_else(|| panic.downcast_ref::<&str>().copied());
    format!("panic: {}", text.unwrap_or("without a message"))
}

/// All routes of a listener.
fn router(node: Arc<Node>, role: &ListenerRole) -> Router {
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
        .route("/v1/consumers/{name}", get(consumers::get))
        .route("/v1/consumers/{name}/commit", post(consumers::commit))
        .route("/v1/consumers/{name}/seek", post(consumers::seek))
        .route("/v1/services", get(services::list))
        .route("/v1/services/{*path}", post(services::call));
    let admin = Router::new()
        .route("/metrics", get(admin::metrics))
        .route("/v1/events", delete(events::delete))
        .route("/v1/channels", get(channels::get))
        .route("/v1/connections", get(connections::list).delete(connections::kick))
        .route("/v1/consumers", get(consumers::list))
        .route("/v1/consumers/{name}", delete(consumers::delete));
    let routes = match role {
        ListenerRole::All => health.merge(clients).merge(admin),
        ListenerRole::Clients => ADMIN_PATHS
            .into_iter()
            .fold(health.merge(clients), |routes, path| routes.route(path, any(at_admin_listener))),
        ListenerRole::Admin => health.merge(admin),
        ListenerRole::Adapter(_) => Router::new(),
    };
    routes.fallback(not_found).with_state(node)
}

/// `GET /`: a page for trying weir.
async fn page() -> Html<&'static str> {
    Html(include_str!("http/page.html"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_panic_is_answered_without_its_message() {
        let answer = catch_panic(async { panic!("the secret is {}", 42) }).await;
        assert_eq!(answer.status(), 500);
        let body = axum::body::to_bytes(answer.into_body(), 10_000).await.unwrap();
        let problem: serde_json::Value = serde_json::from_slice(&body).unwrap();
        assert_eq!(problem["code"], "internal");
        assert!(problem["id"].is_string() && !problem.to_string().contains("secret"), "{problem}");
    }
}
