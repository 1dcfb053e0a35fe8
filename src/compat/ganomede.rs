//! ganomede-events: durable long-poll over HTTP, at `/events/v1/…`, `/latest` and `/about`.
//!
//! An id is weir's offset, a `clientId` is a consumer and its position the consumer's cursor; only its `after` may also
//! move back. What the original answers it answers, to the byte; what it crashes on it answers too.

mod config;
mod events;
mod indices;
mod poll;
mod wire;

use std::{sync::Arc, time::Duration};

use axum::{
    Router,
    body::{Body, Bytes},
    extract::State,
    http::{HeaderValue, Method, Request, Response, StatusCode, header, request::Parts as Head},
};
use base64::{Engine as _, engine::general_purpose::STANDARD as BASE64};
use indexmap::IndexMap;
use md5::{Digest as _, Md5};
use serde_json::value::RawValue;

use self::wire::Refusal;
pub use self::config::Config;
pub use self::{
    indices::Indices,
    poll::consumer,
    wire::VOID,
};
use super::{adapter::Adapter, form::Form};
use crate::{error::Result, net::body::read_body, node::Node, transport::query::decode};

const PREFIX: &str = "/events/v1";
/// How long a failed poll waits for its answer: the client asks again at once, whatever it was told.
const PAUSE_MS: std::ops::Range<u64> = 250..1000;

/// What all requests share.
struct Ganomede {
    node: Arc<Node>,
    config: Config,
    about: Bytes,
    indices: Indices,
}

/// The paths, with what is in them.
enum Route {
    Events,
    Latest,
    Indices,
    Index { id: String, value: String },
    About,
    Ping { token: String },
}

/// What came with a request, besides its path.
struct Asked<'a> {
    query: Form<'a>,
    body: Given<'a>,
}

/// A body, read by its declared type.
enum Given<'a> {
    Nothing,
    Form(Form<'a>),
    Json(IndexMap<String, &'a RawValue>),
}

pub(super) fn build(node: &Arc<Node>) -> Result<Adapter> {
    let it = Ganomede {
        config: node.config.compat.get(),
        about: wire::about(),
        indices: Indices::new(node.bus.clone(), node.config.limits.event)?,
        node: node.clone(),
    };
    let owns = |path: &str| {
        let below = path.strip_prefix(PREFIX).is_some_and(|rest| rest.is_empty() || rest.starts_with('/'));
        below || path == "/latest" || path == "/about"
    };
    Ok(Adapter::new(owns, Router::new().fallback(answer).with_state(Arc::new(it))))
}

async fn answer(State(it): State<Arc<Ganomede>>, request: Request<Body>) -> Response<Body> {
    let (head, body) = request.into_parts();
    let Some(route) = Route::find(head.uri.path()) else {
        let message = format!("{} does not exist", head.uri.path());
        return Refusal::new(StatusCode::NOT_FOUND, "ResourceNotFound", message).into();
    };
    let takes = route.takes();
    if !takes.contains(&head.method) {
        let message = format!("{} is not allowed", head.method);
        let mut answer = Response::from(Refusal::new(StatusCode::METHOD_NOT_ALLOWED, "MethodNotAllowed", message));
        let takes: Vec<&str> = takes.iter().map(Method::as_str).collect();
        // Method names only: always a legal value.
        let allow = HeaderValue::from_str(&takes.join(", ")).unwrap_or(HeaderValue::from_static("GET"));
        answer.headers_mut().insert(header::ALLOW, allow);
        return answer;
    }
    let polls = matches!(route, Route::Events) && head.method == Method::GET;
    let mut answer = match it.answer(route, &head, body).await {
        Ok(answer) => answer,
        Err(refusal) => {
            tracing::debug!(path = head.uri.path(), code = refusal.code, refusal.message, "refused a ganomede client");
            if polls {
                tokio::time::sleep(Duration::from_millis(fastrand::u64(PAUSE_MS))).await;
            }
            refusal.into()
        }
    };
    answer.headers_mut().insert("x-request-id", wire::uuid());
    answer
}

impl Ganomede {
    async fn answer(&self, route: Route, head: &Head, body: Body) -> Result<Response<Body>, Refusal> {
        let limits = &self.node.config.limits;
        let body = match head.method {
            // Of a GET it is not read; hyper throws it away.
            Method::GET | Method::HEAD => Bytes::new(),
            _ => read_body(body, limits.publish_bytes, "limits.publish_bytes", limits.body_time).await?,
        };
        let asked = Asked { query: Form::parse(head.uri.query().unwrap_or_default()), body: Given::read(head, &body)? };
        if route.is_secret() && !asked.knows(self.config.secret.reveal()) {
            // The original means to say "Invalid credentials", and says nothing.
            return Err(Refusal::new(StatusCode::UNAUTHORIZED, "InvalidCredentialsError", ""));
        }
        match route {
            Route::Events if head.method == Method::GET => self.poll(head, &asked.query).await.map(wire::json),
            Route::Events => self.emit(&asked.body).await.map(wire::json),
            Route::Latest => self.latest(&asked.query).await.map(wire::json),
            Route::Indices => self.define(&asked.body).await.map(wire::json),
            Route::Index { id, value } => self.look_up(&id, &value).await.map(wire::json),
            Route::About => {
                let mut answer = wire::json(self.about.clone());
                let kind = HeaderValue::from_static("application/json; charset=UTF-8");
                answer.headers_mut().insert(header::CONTENT_TYPE, kind);
                Ok(answer)
            }
            Route::Ping { .. } if head.method == Method::HEAD => Ok(Response::new(Body::empty())),
            Route::Ping { token } => Ok(wire::json(wire::string(&format!("pong/{token}")))),
        }
    }
}

// === impl Route ===

impl Route {
    /// Exact paths: a slash at the end makes another one.
    fn find(path: &str) -> Option<Self> {
        let below = match path {
            "/latest" | "/about" => path,
            _ => path.strip_prefix(PREFIX)?,
        };
        let text = |part: &str| Some(decode(part, false).ok()?.into_owned()).filter(|text| !text.is_empty());
        let parts: Vec<&str> = below.split('/').skip(1).collect();
        match *parts {
            ["events"] => Some(Route::Events),
            ["latest"] => Some(Route::Latest),
            ["indices"] => Some(Route::Indices),
            ["indices", id, value] => Some(Route::Index { id: text(id)?, value: text(value)? }),
            ["about"] => Some(Route::About),
            ["ping", token] => Some(Route::Ping { token: text(token)? }),
            _ => None,
        }
    }

    fn takes(&self) -> &'static [Method] {
        match self {
            Route::Events => &[Method::GET, Method::POST],
            Route::Indices => &[Method::POST],
            Route::Ping { .. } => &[Method::GET, Method::HEAD],
            Route::Latest | Route::Index { .. } | Route::About => &[Method::GET],
        }
    }

    fn is_secret(&self) -> bool {
        !matches!(self, Route::About | Route::Ping { .. })
    }
}

// === impl Asked ===

impl Asked<'_> {
    fn knows(&self, secret: &str) -> bool {
        let said = |text: Option<&str>| text.is_some_and(|text| !text.is_empty() && same(text, secret));
        said(self.body.text("secret").as_deref()) || said(self.query.text("secret"))
    }
}

/// Takes as long for a wrong secret as for the right one.
fn same(one: &str, other: &str) -> bool {
    one.len() == other.len() && one.bytes().zip(other.bytes()).fold(0, |all, (a, b)| all | (a ^ b)) == 0
}

// === impl Given ===

impl<'a> Given<'a> {
    fn read(head: &Head, body: &'a Bytes) -> Result<Self, Refusal> {
        if body.is_empty() {
            return Ok(Given::Nothing);
        }
        if let Some(claimed) = head.headers.get("content-md5") {
            let digest = BASE64.encode(Md5::digest(body));
            if claimed != digest.as_str() {
                let claimed = String::from_utf8_lossy(claimed.as_bytes()).into_owned();
                let message = format!("Content-MD5 '{claimed}' didn't match '{digest}'");
                return Err(Refusal::new(StatusCode::BAD_REQUEST, "BadDigest", message));
            }
        }
        let kind = head.headers.get(header::CONTENT_TYPE).and_then(|kind| kind.to_str().ok()).unwrap_or_default();
        let kind = kind.split(';').next().unwrap_or_default().trim().to_ascii_lowercase();
        let text = std::str::from_utf8(body);
        if kind == "application/json" || kind.ends_with("+json") {
            let invalid = |error: &dyn std::fmt::Display| Refusal::invalid(format!("Invalid JSON: {error}"));
            let text = text.map_err(|error| invalid(&error))?;
            let json: &RawValue = serde_json::from_str(text).map_err(|error| invalid(&error))?;
            // What is no object has no members that anybody asks for.
            return Ok(serde_json::from_str(json.get()).map_or(Given::Nothing, Given::Json));
        }
        Ok(match text {
            Ok(text) if kind == "application/x-www-form-urlencoded" => Given::Form(Form::parse(text)),
            _ => Given::Nothing,
        })
    }

    /// A member that is a text, and not empty.
    fn text(&self, name: &str) -> Option<String> {
        let text = match self {
            Given::Nothing => None,
            Given::Form(form) => form.text(name).map(str::to_owned),
            Given::Json(members) => serde_json::from_str(members.get(name)?.get()).ok(),
        };
        text.filter(|text| !text.is_empty())
    }
}
