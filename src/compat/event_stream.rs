//! Endpoints of @fanoutio/eventstream: `[[compat.sse.routes]]` configures paths and the channels that are streamed
//! there, as its Express handlers do.

mod config;
mod path_template;

use std::{borrow::Cow, sync::Arc, time::Duration};

use axum::{
    Router,
    body::Body,
    extract::State,
    http::{HeaderValue, Method, Request, Response, StatusCode, header, request::Parts as Head},
};

pub use self::config::{Config, SseRoute};
use self::path_template::{PathTemplate, fill};
use super::{
    adapter::{Adapter, AdapterClients, AdapterEntry},
    form::Form,
};
use crate::{
    bus::{Format, Subscriptions},
    channel::Channel,
    error::{Code, Error, Result, Retry},
    event::Event,
    json::read_json_str,
    net::{body::not_generated, chunk, server::PeerAddr},
    node::Node,
    position::Start,
    transport::{
        query::decode,
        sse::{self, is_acceptable, retry_response},
        subscription_stream::{HeartbeatPolicy, StreamContext, StreamHandler, SubscriptionStream, retry_chunk},
    },
};

/// The first block of a stream, and the heartbeat.
const OPEN: &[u8] = b"event: stream-open\ndata: \n\n";
const KEEP_ALIVE: &[u8] = b"event: keep-alive\ndata: \n\n";
/// The heartbeat interval of the original.
const SILENCE: Duration = Duration::from_secs(20);

/// State of the handlers.
struct EventStream {
    node: Arc<Node>,
    access: AdapterClients,
    routes: Arc<[SseStreamRoute]>,
}

struct SseStreamRoute {
    path: PathTemplate,
    channels: Vec<String>,
}

/// The original's encoding of events.
static BLOCK: Format = Format { open: chunk::open, event, close: chunk::close };

fn event(_: &Channel, event: &Event, out: &mut Vec<u8>) {
    if let Some(kind) = event.kind_json() {
        out.extend_from_slice(b"event: ");
        // A type contains no control characters, and stored JSON no line breaks: each is one line.
        out.extend_from_slice(read_json_str(kind).as_bytes());
        out.push(b'\n');
    }
    out.extend_from_slice(b"data: ");
    out.extend_from_slice(event.data_json().or(event.data_base64()).unwrap_or_default().as_bytes());
    out.extend_from_slice(b"\n\n");
}

pub(super) const ADAPTER: AdapterEntry = AdapterEntry { config: || Box::<Config>::default(), build, importer: None };

fn build(node: &Arc<Node>) -> Result<Adapter> {
    let Config { routes } = node.config.compat.get();
    let route = |route: &SseRoute| {
        let path = PathTemplate::parse(&route.path).map_err(Error::internal)?;
        Ok(SseStreamRoute { path, channels: route.channels.clone() })
    };
    let routes: Arc<[SseStreamRoute]> = routes.iter().map(route).collect::<Result<_>>()?;
    let own = routes.clone();
    let owns = move |path: &str| own.iter().any(|route| route.path.matches(path).is_some());
    let it = EventStream { node: node.clone(), access: AdapterClients::new(node, &[]), routes };
    Ok(Adapter::new(owns, Router::new().fallback(answer).with_state(Arc::new(it))).with_our_cors())
}

async fn answer(State(it): State<Arc<EventStream>>, request: Request<Body>) -> Response<Body> {
    let (head, _) = request.into_parts();
    if !matches!(head.method, Method::GET | Method::HEAD) {
        // The endpoint applies weir's CORS rules, and completes this response with the methods of `Allow`.
        let mut answer = refused(StatusCode::METHOD_NOT_ALLOWED, "Method Not Allowed.\n");
        answer.headers_mut().insert(header::ALLOW, HeaderValue::from_static("GET, HEAD"));
        return answer;
    }
    match it.stream(&head).await {
        Ok(answer) => answer,
        // An `EventSource` does not reconnect after another status.
        Err(error) if error.code().retry() == Retry::Yes => retry_response(&error),
        Err(error) => {
            let status = StatusCode::from_u16(error.code().status()).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
            refused(status, format!("{}\n", error.detail()))
        }
    }
}

impl EventStream {
    async fn stream(&self, head: &Head) -> Result<Response<Body>> {
        if !is_acceptable(&head.headers) {
            return Err(Error::new(Code::NotAcceptable, "Not Acceptable."));
        }
        if head.headers.get("last-event-id").is_some_and(|id| id == "error") {
            return Err(Error::params("last-event-id header may not be 'error'."));
        }
        let channels = self.channels(head)?;
        if channels.is_empty() {
            return Err(Error::params("No specified channels."));
        }
        let most = self.node.config.limits.stream_channels;
        if channels.len() > most {
            let detail = format!("{} channels, limits.stream_channels is {most}.", channels.len());
            return Err(Error::params(detail));
        }
        let identity = self.access.identity(head);
        for channel in &channels {
            let _ = identity.may_subscribe(channel)?;
        }
        if head.method == Method::HEAD {
            return Ok(sse::response(not_generated()));
        }
        let mut subs = Subscriptions::new(&BLOCK);
        for watch in self.node.bus.watch(&channels).await? {
            subs.add(watch, Start::Now, None);
        }
        Ok(SubscriptionStream::new(&self.node, &identity, PeerAddr::of(head), subs, EventStreamHandler)
            .respond(sse::response(()), vec![chunk::of(OPEN)]))
    }

    /// The channels of a request, without repetitions.
    fn channels(&self, head: &Head) -> Result<Vec<Channel>> {
        let path = head.uri.path();
        let found = self.routes.iter().find_map(|route| Some((route, route.path.matches(path)?)));
        let Some((route, tokens)) = found else { return Ok(Vec::new()) };
        let query = Form::parse(head.uri.query().unwrap_or_default());
        let value = |name: &str| match tokens.iter().find(|(token, _)| *token == name) {
            Some((_, text)) => decode(text, false).unwrap_or(Cow::Borrowed(text)),
            None => query.texts(name).collect::<Vec<_>>().join(",").into(),
        };
        let mut channels = Vec::new();
        for template in &route.channels {
            let name = fill(template, value);
            let name = name.trim();
            if name.is_empty() {
                continue;
            }
            let channel = Channel::parse(name)?;
            if !channels.contains(&channel) {
                channels.push(channel);
            }
        }
        Ok(channels)
    }
}

fn refused(status: StatusCode, text: impl Into<Body>) -> Response<Body> {
    let mut answer = Response::new(text.into());
    *answer.status_mut() = status;
    answer.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static("text/plain; charset=utf-8"));
    answer
}

/// Sends heartbeats only.
struct EventStreamHandler;

impl StreamHandler for EventStreamHandler {
    fn heartbeat(&self, _: &Node) -> Option<HeartbeatPolicy> {
        Some(HeartbeatPolicy::WhenIdle(SILENCE))
    }

    fn on_heartbeat(&mut self, stream: &mut StreamContext<'_>) {
        stream.out.push(chunk::of(KEEP_ALIVE));
    }

    fn on_end(&mut self, stream: &mut StreamContext<'_>, code: Code) {
        stream.out.push(retry_chunk(code));
    }
}
