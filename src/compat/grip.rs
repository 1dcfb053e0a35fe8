//! GRIP, as Pushpin speaks it: weir is the proxy in front of HTTP servers (origins). An origin answers a request with
//! instructions in its headers, and weir holds the answer open: as a stream that published items are added to, or until an
//! item answers it. What is published becomes events of the bus, so every other world sees it, and theirs are seen here.
//!
//! The proxy has a listener of its own, for every path of it is an origin's; where origins publish is another.

mod at;
mod config;
mod filter;
mod frame;
mod hold;
mod instruct;
mod item;
mod link;
mod mark;
mod members;
mod patch;
mod poll;
mod proxy;
mod publish;
mod token;

use std::sync::Arc;

use axum::body::Body as AxumBody;
use bytes::Bytes;
use http::{
    HeaderMap, HeaderValue, Method, Request, Response, StatusCode, header,
    uri::{Authority, PathAndQuery, Scheme},
};
use http_body_util::{BodyExt as _, LengthLimitError, Limited};
use hyper::body::Incoming;

pub use self::config::{Config, GripRoute};
use self::{
    at::At,
    instruct::{Hold, Instead, Instruct},
    poll::Again,
    proxy::{Ask, Failure, Origins},
    token::Key,
};
use super::adapter::{Adapter, AdapterEntry, Listener, handler};
use crate::{
    channel::Channel,
    error::{Error, Result},
    net::server::PeerAddr,
    node::Node,
};

/// How often one request is asked again because what it waits for had changed already.
const MOST_ASKED: usize = 16;

/// The proxy, and where its origins publish.
pub struct Grip {
    node: Arc<Node>,
    config: Config,
    origins: Origins,
    /// The longest path first.
    routes: Vec<Route>,
}

/// An origin, and the paths that are its own.
pub struct Route {
    path: String,
    scheme: Scheme,
    authority: Authority,
    prefix: String,
    /// The issuer that tokens for publishing must name, if any.
    iss: Option<String>,
    /// Publishing asks for it.
    key: Option<Secret>,
    /// Signs what goes to the origin. Without a key of the route it is one that nobody else has: an origin that verifies
    /// finds it wrong, and one that does not knows that it is asked by a proxy.
    signer: Key,
}

struct Secret {
    key: Key,
    bytes: Vec<u8>,
    /// As it is configured.
    text: String,
}

pub(super) const ADAPTER: AdapterEntry =
    AdapterEntry { config: || Box::<Config>::default(), build, importer: None };

/// Publishing on the main listeners, and two listeners: the proxy, and one for publishing.
fn build(node: &Arc<Node>) -> Result<Adapter> {
    let grip = Arc::new(Grip::new(node)?);
    let proxy = grip.config.listen.map(|address| Listener {
        address,
        purpose: "GRIP proxy",
        if_in_use: ": is Pushpin still running? compat.grip.listen sets another address",
        tcp_keepalive: true,
        // The host is an origin's.
        check_host: false,
        handler: handler(&grip, |grip, request| async move { grip.proxy(request).await }),
    });
    let publish = grip.config.publish_listen.map(|address| Listener {
        address,
        purpose: "GRIP publish",
        if_in_use: ": is Pushpin still running? compat.grip.publish_listen sets another address",
        tcp_keepalive: false,
        check_host: true,
        handler: handler(&grip, |grip, request| async move { grip.publish(request).await }),
    });
    let owns = |path: &str| matches!(path, "/grip/publish" | "/grip/publish/");
    let router = axum::Router::new().fallback(async move |request| grip.publish(request).await);
    Ok(Adapter::new(owns, router).with_listeners(proxy.into_iter().chain(publish).collect()))
}

/// What an origin answered, when it is not simply passed on.
struct Answer {
    status: StatusCode,
    headers: HeaderMap,
    body: Content,
}

/// The body of an answer.
enum Content {
    Incoming(Incoming),
    Bytes(Bytes),
}

/// What became of an origin's answer.
enum Outcome {
    Done(Response<AxumBody>),
    /// The origin has to be asked again, and told the ids that it gave.
    Again(HeaderMap),
}

// === impl Grip ===

impl Grip {
    pub fn new(node: &Arc<Node>) -> Result<Self> {
        let config: Config = node.config.compat.get();
        let mut routes =
            config.routes.iter().map(Route::new).collect::<Result<Vec<_>, String>>().map_err(Error::params)?;
        routes.sort_by_key(|route| std::cmp::Reverse(route.path.len()));
        if routes.is_empty() {
            tracing::warn!("GRIP has no origin: name one in [[compat.grip.routes]]");
        }
        let tls = routes.iter().any(|route| route.scheme == Scheme::HTTPS);
        Ok(Grip {
            node: node.clone(),
            origins: Origins::new(&config, tls, node.timers.clone()).map_err(Error::params)?,
            routes,
            config,
        })
    }

    fn route(&self, path: &str) -> Option<usize> {
        self.routes.iter().position(|route| route.owns(path))
    }

    /// Answers a request of a client, by its origin.
    pub async fn proxy(self: &Arc<Self>, request: Request<AxumBody>) -> Response<AxumBody> {
        let (head, body) = request.into_parts();
        let Some(nth) = self.route(head.uri.path()) else {
            let text = format!("No route for {}.\n", head.uri.path());
            return proxy::text(StatusCode::BAD_GATEWAY, text);
        };
        let route = &self.routes[nth];
        let path = head.uri.path_and_query().cloned().unwrap_or(PathAndQuery::from_static("/"));
        let remote = PeerAddr::of(&head);
        let mut headers = head.headers;
        let socket = proxy::wants_socket(&headers);
        proxy::to_origin(&mut headers, &head.uri, remote.map(|remote| remote.ip()), self.signature(route));
        let host = headers.get(header::HOST).cloned();
        let at = || At { grip: self.clone(), route: nth, path: path.clone(), host: host.clone(), remote };
        // What had a body cannot be sent twice.
        let again = http_body::Body::is_end_stream(&body).then(|| headers.clone());
        let mut ask = Ask { method: head.method.clone(), path: path.clone(), headers, body };
        let mut asked = 0;
        loop {
            let repeat = match asked {
                _ if again.is_none() || asked == MOST_ASKED => Again::Never,
                0 => Again::First,
                _ => Again::More,
            };
            asked += 1;
            let outcome = match self.origins.ask(route, ask).await {
                Ok(answer) if answer.status() == StatusCode::SWITCHING_PROTOCOLS => match socket {
                    true => {
                        return proxy::tunnel(answer, self.node.clone());
                    }
                    // Nobody had asked for it.
                    false => Err(Failure::Broken),
                },
                Ok(answer) => self.treat(at(), &head.method, answer, repeat).await,
                Err(failure) => Err(failure),
            };
            let last = match outcome {
                Ok(Outcome::Done(response)) => return response,
                Ok(Outcome::Again(last)) => last,
                Err(failure) => return failure.answer(),
            };
            let mut headers = again.clone().unwrap_or_default();
            headers.extend(last);
            proxy::sign(&mut headers, self.signature(route));
            ask = Ask { method: head.method.clone(), path: path.clone(), headers, body: AxumBody::empty() };
        }
    }

    fn signature(&self, route: &Route) -> HeaderValue {
        // Base64 and dots.
        HeaderValue::try_from(route.signer.sign(&self.config.iss))
            .unwrap_or(HeaderValue::from_static(""))
    }

    /// Does with an answer what it says.
    async fn treat(
        self: &Arc<Self>,
        at: At,
        method: &Method,
        mut answer: Response<Incoming>,
        again: Again,
    ) -> Result<Outcome, Failure> {
        let held = *method != Method::HEAD && Instruct::is_in(answer.headers());
        let as_body = instruct::is_body(answer.headers());
        proxy::strip_hop(answer.headers_mut());
        let found = Instruct::take(answer.headers_mut());
        let (mut head, body) = answer.into_parts();
        if !held {
            if let Ok(Instruct { status: Some(status), .. }) = found {
                head.status = status;
            }
            return Ok(Outcome::Done(proxy::pass(Response::from_parts(head, body))));
        }
        let mut instruct = found.map_err(Failure::Wrong)?;
        let mut answer = Answer { status: head.status, headers: head.headers, body: Content::Incoming(body) };
        if as_body {
            let body = self.whole(answer.body).await?;
            let Instead { status, headers, body } = instruct.read_body(answer.status, &body).map_err(Failure::Wrong)?;
            let status = status.unwrap_or(answer.status);
            answer = Answer { status, headers, body: Content::Bytes(body.into()) };
        }
        answer.status = instruct.status.unwrap_or(answer.status);
        if answer.headers.contains_key(header::CONTENT_ENCODING) {
            // What is published would be added to it as plain text.
            return Err(Failure::Wrong("an answer that is held cannot have a Content-Encoding".into()));
        }
        self.check(&instruct)?;
        match (instruct.hold, &instruct.next) {
            (Some(Hold::Response), _) => self.hold_response(&at, instruct, answer, again).await,
            (Some(Hold::Stream), _) | (None, Some(_)) => {
                self.hold_stream(at, instruct, answer).await.map(Outcome::Done)
            }
            (None, None) => Ok(Outcome::Done(answer.respond())),
        }
    }

    /// Whether this node holds as much as is asked.
    fn check(&self, instruct: &Instruct) -> Result<(), Failure> {
        let most = self.node.config.limits.stream_channels;
        if instruct.channels.len() > most {
            return Err(Failure::Wrong(format!(
                "an answer is held on at most {most} channels (limits.stream_channels)"
            )));
        }
        Ok(())
    }

    /// The channels of the bus that an origin means.
    fn channels(&self, route: &Route, instruct: &Instruct) -> Result<Vec<Channel>, Failure> {
        let wrong = |error: Error| Failure::Wrong(format!("Grip-Channel: {}", error.detail()));
        let parse =
            |channel: &instruct::Channel| Channel::parse(&format!("{}{}", route.prefix, channel.name)).map_err(wrong);
        instruct.channels.iter().map(parse).collect()
    }

    /// A whole body, of at most `limits.publish_bytes`.
    async fn whole(&self, body: Content) -> Result<Bytes, Failure> {
        let incoming = match body {
            Content::Incoming(incoming) => incoming,
            Content::Bytes(bytes) => return Ok(bytes),
        };
        let most = self.node.config.limits.publish_bytes;
        let collecting = Limited::new(incoming, most).collect();
        let timeout = self.config.timeout;
        match tokio::time::timeout(timeout, collecting).await {
            Ok(Ok(whole)) => Ok(whole.to_bytes()),
            Ok(Err(error)) if error.is::<LengthLimitError>() => {
                Err(Failure::Wrong(format!("its answer has more than {most} bytes (limits.publish_bytes)")))
            }
            Ok(Err(_)) => Err(Failure::Broken),
            Err(_) => Err(Failure::Late(timeout)),
        }
    }
}

// === impl Answer ===

impl Answer {
    /// As it is.
    fn respond(self) -> Response<AxumBody> {
        let mut response = match self.body {
            Content::Incoming(incoming) => proxy::pass(Response::new(incoming)),
            Content::Bytes(bytes) => Response::new(AxumBody::from(bytes)),
        };
        *response.status_mut() = self.status;
        *response.headers_mut() = self.headers;
        // The origin answered with another status, which had a body.
        if matches!(self.status, StatusCode::NO_CONTENT | StatusCode::NOT_MODIFIED) {
            *response.body_mut() = AxumBody::empty();
            response.headers_mut().remove(header::CONTENT_LENGTH);
        }
        response
    }
}

// === impl Route ===

impl Route {
    fn new(route: &GripRoute) -> Result<Self, String> {
        let (scheme, authority) =
            proxy::server(&route.origin).ok_or_else(|| format!("{} is not where a server is", route.origin))?;
        let bytes = route.key_bytes().ok_or_else(|| format!("the key of {} is not base64", route.path))?;
        let key = (!bytes.is_empty()).then(|| Secret {
            key: Key::new(&bytes),
            text: route.key.reveal().to_owned(),
            bytes: bytes.clone(),
        });
        Ok(Route {
            path: route.path.clone(),
            scheme,
            authority,
            prefix: route.prefix.clone(),
            iss: (!route.iss.is_empty()).then(|| route.iss.clone()),
            signer: if key.is_some() { Key::new(&bytes) } else { Key::random() },
            key,
        })
    }

    /// Whether a path is this or below it: `/api` has `/api/x`, and not `/apiary`.
    fn owns(&self, path: &str) -> bool {
        path.strip_prefix(&self.path)
            .is_some_and(|rest| rest.is_empty() || rest.starts_with('/') || self.path.ends_with('/'))
    }
}
