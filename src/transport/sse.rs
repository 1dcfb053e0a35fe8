//! Server-sent events: `GET /v1/sse`, and `GET /v1/events` for clients that accept `text/event-stream`.
//!
//! An `EventSource` never reconnects after a status other than 200. So permanent errors (a parameter, a permission) are
//! a status, and temporary ones (a drain, an overload) are a stream that sends `weir.retry` and ends.

pub mod frame;
mod handler;

use std::{net::SocketAddr, sync::Arc, time::Duration};

use axum::{body::Body, response::Response};
use bytes::Bytes;
use futures_util::FutureExt as _;
use http::{HeaderMap, HeaderValue, Method, header, request::Parts};
use tokio::time::timeout;

use self::handler::{Ids, SseHandler, SseOpening};
use crate::{
    auth::Identity,
    bus::{Filter, Format, Subscriptions},
    channel::Channel,
    error::{Code, Error, Result, Retry},
    metrics::Transport,
    net::{body::not_generated, chunk, server::PeerAddr},
    node::Node,
    position::Start,
    presence::{PresenceLease, PresentClient},
    sessions::ChannelSet,
    transport::{
        accept, present,
        query::{Query, StartParam},
        subscription_stream::SubscriptionStream,
    },
};

const EVENT_STREAM: &str = "text/event-stream";

/// How long the response waits for the positions of its channels. It does not wait for a bus that is unavailable: clients
/// and proxies give up streams that say nothing.
const FIRST_BYTES: Duration = Duration::from_millis(250);

/// The parameters of a stream.
struct SseParams {
    channels: Vec<Channel>,
    start: StartParam,
    filter: Option<Arc<Filter>>,
    bare_data: bool,
    ids_of_all: bool,
    present: Option<PresentClient>,
}

/// Whether a request to a path with several representations wants a stream: `Accept` names `text/event-stream`, and does not
/// prefer JSON.
pub(crate) fn is_wanted(headers: &HeaderMap) -> bool {
    let json = accept::preference(headers, "application/json").map_or(0, |json| json.quality);
    accept::preference(headers, EVENT_STREAM)
        .is_some_and(|stream| stream.exact && stream.quality > 0 && stream.quality >= json)
}

/// Whether the `Accept` header allows a stream.
pub(crate) fn is_acceptable(headers: &HeaderMap) -> bool {
    accept::preference(headers, EVENT_STREAM).is_some_and(|stream| stream.quality > 0)
}

/// A stream that only tells the client when to reconnect.
pub(crate) fn retry_response(error: &Error) -> Response {
    let after = error.retry_after_ms().unwrap_or_default().max(frame::retry_ms().into());
    response(Body::from(chunk::text(&frame::retry(error.code().as_str(), after, true))))
}

pub(crate) fn response<B>(body: B) -> Response<B> {
    let mut response = Response::new(body);
    let headers = response.headers_mut();
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static(EVENT_STREAM));
    headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-store, no-transform"));
    // Otherwise nginx buffers small writes.
    headers.insert("x-accel-buffering", HeaderValue::from_static("no"));
    response
}

/// Answers a request for a stream, whatever its path.
///
/// # Errors
/// Permanent errors only; the response to a temporary one is a stream.
pub(crate) async fn open(node: &Arc<Node>, identity: &Identity, head: &Parts) -> Result<Response> {
    match try_open(node, identity, head).await {
        Err(error) if error.code().retry() == Retry::Yes => Ok(retry_response(&error)),
        opened => opened,
    }
}

async fn try_open(node: &Arc<Node>, identity: &Identity, head: &Parts) -> Result<Response> {
    if !is_acceptable(&head.headers) {
        return Err(Error::new(Code::NotAcceptable, "this is a stream of text/event-stream, which Accept excludes"));
    }
    let params = read(node, head)?;
    for channel in &params.channels {
        let _permit = identity.may_subscribe(channel)?;
    }
    if head.method == Method::HEAD {
        return Ok(response(not_generated()));
    }
    if node.timers.is_draining() {
        return Err(Error::new(Code::Draining, "this node is shutting down"));
    }
    let remote = PeerAddr::of(head);
    let (stream, first) = begin(node, identity, remote, params).await?;
    Ok(stream.respond(response(()), first))
}

fn read(node: &Node, head: &Parts) -> Result<SseParams> {
    let mut query = Query::parse(head.uri.query())?;
    let channels = query.some_channels(node.config.limits.stream_channels, "limits.stream_channels")?;
    let filter = Filter::new(&query.types()?)?.map(Arc::new);
    // Any bytes: an invalid position is answered by a gap.
    let last_event_id = head.headers.get("last-event-id").map(|id| String::from_utf8_lossy(id.as_bytes()));
    let start = query.start(last_event_id.as_deref())?;
    let bare_data = match query.take_nonempty("format")?.as_deref() {
        None | Some("event") => false,
        Some("data") => true,
        Some(_) => return Err(Error::params("format is event or data")),
    };
    let ids_of_all = match query.take_nonempty("ids")?.as_deref() {
        None => false,
        Some("all") => true,
        Some(_) => return Err(Error::params("ids is all, or left out")),
    };
    let present = present::from_query(&mut query, node.config.limits.present_info)?;
    query.finish()?;
    Ok(SseParams { channels, start, filter, bare_data, ids_of_all, present })
}

/// The positions are resolved here, so that events which are published before the client has read the head are not
/// missed; unless the bus takes long: then the stream says that it lives, and `weir.open` follows.
async fn begin(
    node: &Arc<Node>,
    identity: &Identity,
    remote: Option<SocketAddr>,
    params: SseParams,
) -> Result<(SubscriptionStream<SseHandler>, Vec<Bytes>)> {
    let SseParams { channels, start, filter, bare_data, ids_of_all, present } = params;
    let (starts, unreadable) = match start.starts(&channels, Start::Now) {
        Ok(starts) => (starts, false),
        // Not a status: an EventSource would not reconnect.
        Err(error) if error.code() == Code::InvalidPosition => (vec![Start::Now; channels.len()], true),
        Err(error) => return Err(error),
    };
    let (format, ids): (&'static Format, _) = match (channels.len(), bare_data) {
        (1, false) => (&frame::EVENT, Ids::Shared),
        (1, true) => (&frame::DATA, Ids::Shared),
        (_, false) => (&frame::EVENT_BARE, if ids_of_all { Ids::Each } else { Ids::Token }),
        (_, true) => (&frame::DATA_BARE, if ids_of_all { Ids::Each } else { Ids::Token }),
    };
    let mut subs = Subscriptions::new(format);
    if ids == Ids::Each {
        subs = subs.one_by_one();
    }
    let leases = present::enter(&node.presence, identity, channels.iter(), present.as_ref(), Transport::Sse)?;
    let leases: Box<[PresenceLease]> = leases.into_iter().flatten().collect();
    let now = node.timers.now();
    let mut handler = SseHandler::new(leases, ids, filter.is_some(), now);
    let mut watches = {
        let (node, channels) = (node.clone(), channels.clone());
        async move { node.bus.watch(&channels).await }.boxed()
    };
    let watched = timeout(FIRST_BYTES, &mut watches).await;
    let opening = SseOpening { watches, starts, unreadable, filter, metrics: node.metrics.clone() };
    let first = match watched {
        Ok(watches) => handler.open(opening.subscribe(watches?, &mut subs), &subs, now),
        Err(_) => vec![handler.open_later(opening)],
    };
    let channels = ChannelSet::new(channels);
    Ok((SubscriptionStream::for_channels(node, identity, remote, channels, subs, handler), first))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_accept_header() {
        let headers = |accept: &'static str| HeaderMap::from_iter([(header::ACCEPT, HeaderValue::from_static(accept))]);
        for (accept, acceptable, wanted) in [
            ("text/event-stream", true, true),
            ("application/json, Text/Event-Stream;q=0.5", true, false),
            ("application/json, Text/Event-Stream", true, true),
            ("application/json;q=0.4, text/event-stream;q=0.5", true, true),
            ("text/event-stream, */*;q=0.1", true, true),
            ("text/event-stream;q=0.5, */*", true, false),
            ("*/*", true, false),
            ("text/*;q=0.1", true, false),
            ("application/json", false, false),
            ("text/event-stream;q=0", false, false),
            ("text/event-stream; q=0.0, */*", false, false),
            ("", true, false),
        ] {
            assert_eq!(
                (is_acceptable(&headers(accept)), is_wanted(&headers(accept))),
                (acceptable, wanted),
                "{accept}"
            );
        }
        assert_eq!((is_acceptable(&HeaderMap::new()), is_wanted(&HeaderMap::new())), (true, false));
    }
}
