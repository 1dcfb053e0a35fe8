//! ganomede-events: durable long-poll over HTTP, at `/events/v1/…`, `/latest` and `/about`.
//!
//! An id is an offset. A `clientId` is a consumer, and its position the consumer's cursor, which `after` may also move
//! back. Responses equal those of the original to the byte. Requests that crash the original are answered.

mod body;
mod config;
mod context;
mod events;
mod import;
mod indices;
mod lookup;
mod poll;
mod wire;

use std::{sync::Arc, time::Duration};

use axum::{
    Router,
    body::{Body, Bytes},
    extract::State,
    http::{HeaderValue, Method, Request, Response, StatusCode, header, request::Parts as Head},
};
use subtle::ConstantTimeEq as _;

pub use self::config::Config;
use self::{body::GanomedeBody, context::Ganomede, wire::GanomedeError};
use super::{
    adapter::{Adapter, AdapterEntry},
    form::Form,
};
use crate::{error::Result, net::body::read_body, node::Node, transport::query::decode};

const PREFIX: &str = "/events/v1";
/// How long the response of a failed poll is delayed. Clients repeat a poll as soon as it is answered, even by an
/// error.
const PAUSE_MS: std::ops::Range<u64> = 250..1000;

/// The paths, with their parameters.
enum GanomedeRoute {
    Events,
    Latest,
    Indices,
    Index { id: String, value: String },
    About,
    Ping { token: String },
}

pub(super) const ADAPTER: AdapterEntry =
    AdapterEntry { config: || Box::<Config>::default(), build, importer: Some(import::IMPORTER) };

fn build(node: &Arc<Node>) -> Result<Adapter> {
    let ganomede = Arc::new(Ganomede::new(node)?);
    let owns = |path: &str| {
        let below = path.strip_prefix(PREFIX).is_some_and(|rest| rest.is_empty() || rest.starts_with('/'));
        below || path == "/latest" || path == "/about"
    };
    Ok(Adapter::new(owns, Router::new().fallback(answer).with_state(ganomede)))
}

async fn answer(State(it): State<Arc<Ganomede>>, request: Request<Body>) -> Response<Body> {
    let (head, body) = request.into_parts();
    let Some(route) = GanomedeRoute::find(head.uri.path()) else {
        let message = format!("{} does not exist", head.uri.path());
        return GanomedeError::new(StatusCode::NOT_FOUND, "ResourceNotFound", message).into();
    };
    let methods = route.methods();
    if !methods.contains(&head.method) {
        let message = format!("{} is not allowed", head.method);
        let mut answer =
            Response::from(GanomedeError::new(StatusCode::METHOD_NOT_ALLOWED, "MethodNotAllowed", message));
        let methods: Vec<&str> = methods.iter().map(Method::as_str).collect();
        // Names of methods are valid in a header.
        let allow = HeaderValue::from_str(&methods.join(", ")).unwrap_or(HeaderValue::from_static("GET"));
        answer.headers_mut().insert(header::ALLOW, allow);
        return answer;
    }
    let polls = matches!(route, GanomedeRoute::Events) && head.method == Method::GET;
    let mut answer = match it.answer(route, &head, body).await {
        Ok(answer) => answer,
        Err(error) => {
            tracing::debug!(path = head.uri.path(), code = error.code, error.message, "refused a ganomede client");
            if polls {
                tokio::time::sleep(Duration::from_millis(fastrand::u64(PAUSE_MS))).await;
            }
            error.into()
        }
    };
    answer.headers_mut().insert("x-request-id", wire::uuid());
    answer
}

impl Ganomede {
    async fn answer(&self, route: GanomedeRoute, head: &Head, body: Body) -> Result<Response<Body>, GanomedeError> {
        let limits = &self.node.config.limits;
        let body = match head.method {
            // hyper discards the body of a GET.
            Method::GET | Method::HEAD => Bytes::new(),
            _ => read_body(body, limits.publish_bytes, "limits.publish_bytes", limits.body_time).await?,
        };
        let query = Form::parse(head.uri.query().unwrap_or_default());
        let body = GanomedeBody::read(head, &body)?;
        let secret = self.config.secret.reveal();
        // Compares in constant time.
        let is_equal = |text: &str| text.as_bytes().ct_eq(secret.as_bytes()).into();
        let is_secret = |text: Option<&str>| text.is_some_and(|text| !text.is_empty() && is_equal(text));
        let knows_secret = is_secret(body.text("secret").as_deref()) || is_secret(query.text("secret"));
        let identity = self.identity(head, knows_secret);
        if route.requires_secret() && !knows_secret && identity.subject().is_empty() {
            // The original sends an empty message by mistake.
            return Err(GanomedeError::new(StatusCode::UNAUTHORIZED, "InvalidCredentialsError", ""));
        }
        match route {
            GanomedeRoute::Events if head.method == Method::GET => {
                self.poll(head, &identity, &query).await.map(wire::json)
            }
            GanomedeRoute::Events => self.emit(&identity, &body).await.map(wire::json),
            GanomedeRoute::Latest => self.latest(&identity, &query).await.map(wire::json),
            GanomedeRoute::Indices => self.define(&identity, &body).await.map(wire::json),
            GanomedeRoute::Index { id, value } => self.look_up(&identity, &id, &value).await.map(wire::json),
            GanomedeRoute::About => {
                let mut answer = wire::json(self.about.clone());
                let kind = HeaderValue::from_static("application/json; charset=UTF-8");
                answer.headers_mut().insert(header::CONTENT_TYPE, kind);
                Ok(answer)
            }
            GanomedeRoute::Ping { token } => Ok(wire::json(wire::string(&format!("pong/{token}")))),
        }
    }
}

impl GanomedeRoute {
    /// Paths are exact: with a slash at the end it is another path.
    fn find(path: &str) -> Option<Self> {
        let below = match path {
            "/latest" | "/about" => path,
            _ => path.strip_prefix(PREFIX)?,
        };
        let text = |part: &str| Some(decode(part, false).ok()?.into_owned()).filter(|text| !text.is_empty());
        let parts: Vec<&str> = below.split('/').skip(1).collect();
        match *parts {
            ["events"] => Some(GanomedeRoute::Events),
            ["latest"] => Some(GanomedeRoute::Latest),
            ["indices"] => Some(GanomedeRoute::Indices),
            ["indices", id, value] => Some(GanomedeRoute::Index { id: text(id)?, value: text(value)? }),
            ["about"] => Some(GanomedeRoute::About),
            ["ping", token] => Some(GanomedeRoute::Ping { token: text(token)? }),
            _ => None,
        }
    }

    fn methods(&self) -> &'static [Method] {
        match self {
            GanomedeRoute::Events => &[Method::GET, Method::POST],
            GanomedeRoute::Indices => &[Method::POST],
            GanomedeRoute::Ping { .. } => &[Method::GET, Method::HEAD],
            GanomedeRoute::Latest | GanomedeRoute::Index { .. } | GanomedeRoute::About => &[Method::GET],
        }
    }

    fn requires_secret(&self) -> bool {
        !matches!(self, GanomedeRoute::About | GanomedeRoute::Ping { .. })
    }
}
