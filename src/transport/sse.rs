//! Server-sent events: `GET /v1/sse`, and `GET /v1/events` for whoever accepts `text/event-stream`.
//!
//! An `EventSource` gives up for good at any status but 200. So what is wrong for ever (a parameter, a permission) is
//! a status, and what will pass (a drain, an overload) is a stream that says `weir.retry` and ends.

pub mod frame;
mod handler;

use std::{net::SocketAddr, sync::Arc};

use axum::{body::Body, response::Response};
use bytes::Bytes;
use http::{HeaderMap, HeaderValue, Method, header, request::Parts};

use self::handler::{Ids, SseHandler};
use crate::{
    auth::Identity,
    bus::{Filter, Format, Gap, GapReason, Subscriptions},
    channel::Channel,
    error::{Code, Error, Result, Retry},
    metrics::{MetricLabel as _, Transport},
    net::{chunk, server::PeerAddr},
    node::Node,
    position::{Position, Start},
    presence::{PresenceLease, PresentClient},
    transport::{
        present,
        query::{Begin, Query},
        subscription_stream::SubscriptionStream,
    },
};

const EVENT_STREAM: &str = "text/event-stream";

/// What a client asked for.
struct Asked {
    channels: Vec<Channel>,
    begin: Begin,
    filter: Option<Arc<Filter>>,
    bare_data: bool,
    ids_of_all: bool,
    present: Option<PresentClient>,
}

/// Whether a request to a path with several representations wants a stream.
pub fn is_wanted(headers: &HeaderMap) -> bool {
    accepted(headers).any(|kind| kind.eq_ignore_ascii_case(EVENT_STREAM))
}

/// Whether a client can read a stream, as far as it says.
pub fn is_acceptable(headers: &HeaderMap) -> bool {
    !headers.contains_key(header::ACCEPT)
        || accepted(headers)
            .any(|kind| kind.eq_ignore_ascii_case(EVENT_STREAM) || kind.eq_ignore_ascii_case("text/*") || kind == "*/*")
}

/// The media types of `Accept` that are not excluded by `q=0`.
fn accepted(headers: &HeaderMap) -> impl Iterator<Item = &str> {
    headers
        .get_all(header::ACCEPT)
        .iter()
        .filter_map(|value| value.to_str().ok())
        .flat_map(|value| value.split(','))
        .filter_map(|range| {
            let mut parts = range.split(';').map(str::trim);
            let kind = parts.next()?;
            let refused = parts.filter_map(|part| part.strip_prefix("q=")).any(|q| q.parse() == Ok(0.0));
            (!refused).then_some(kind)
        })
}

/// A stream that only says when to come back.
pub fn refusal(error: &Error) -> Response {
    let after = error.retry_after_ms().unwrap_or_default().max(retry_ms().into());
    response(Body::from(chunk::text(&frame::retry(error.code().as_str(), after, true))))
}

fn response<B>(body: B) -> Response<B> {
    let mut response = Response::new(body);
    let headers = response.headers_mut();
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static(EVENT_STREAM));
    headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-store, no-transform"));
    // nginx would hold back what is small.
    headers.insert("x-accel-buffering", HeaderValue::from_static("no"));
    response
}

/// When to reconnect. Different for each client: all of them lose their streams at the same moment.
fn retry_ms() -> u16 {
    fastrand::u16(1_000..4_000)
}

/// Answers a request for a stream, whatever its path. Fails only with what will not pass by itself.
pub async fn open(node: &Arc<Node>, identity: &Identity, head: &Parts) -> Result<Response> {
    match try_open(node, identity, head).await {
        Err(error) if error.code().retry() == Retry::Yes => Ok(refusal(&error)),
        opened => opened,
    }
}

async fn try_open(node: &Arc<Node>, identity: &Identity, head: &Parts) -> Result<Response> {
    if !is_acceptable(&head.headers) {
        return Err(Error::new(Code::NotAcceptable, "this is a stream of text/event-stream, which Accept excludes"));
    }
    let asked = read(node, head)?;
    for channel in &asked.channels {
        let _permit = identity.may_subscribe(channel)?;
    }
    if head.method == Method::HEAD {
        return Ok(response(Body::empty()));
    }
    if node.timers.is_draining() {
        return Err(Error::new(Code::Draining, "this node is leaving"));
    }
    let remote = PeerAddr::of(head);
    let (stream, first) = begin(node, identity, remote, asked).await?;
    Ok(stream.respond(response(()), first))
}

fn read(node: &Node, head: &Parts) -> Result<Asked> {
    let mut query = Query::parse(head.uri.query())?;
    let channels = query.some_channels(node.config.limits.stream_channels, "limits.stream_channels")?;
    let filter = Filter::new(&query.types()?)?.map(Arc::new);
    // Whatever is in it: what is no position is answered by a gap.
    let last_event_id = head.headers.get("last-event-id").map(|id| String::from_utf8_lossy(id.as_bytes()));
    let begin = query.begin(last_event_id.as_deref())?;
    let bare_data = match query.take("format")?.as_deref() {
        None | Some("event") => false,
        Some("data") => true,
        Some(_) => return Err(Error::params("format is event or data")),
    };
    let ids_of_all = match query.take("ids")?.as_deref() {
        None => false,
        Some("all") => true,
        Some(_) => return Err(Error::params("ids is all, or left out")),
    };
    let present = present::from_query(&mut query, node.config.limits.present_info)?;
    query.finish()?;
    Ok(Asked { channels, begin, filter, bare_data, ids_of_all, present })
}

/// The positions are taken here: what is published while the head of the response is on its way is not missed.
async fn begin(
    node: &Arc<Node>,
    identity: &Identity,
    remote: Option<SocketAddr>,
    asked: Asked,
) -> Result<(SubscriptionStream<SseHandler>, Vec<Bytes>)> {
    let Asked { channels, begin, filter, bare_data, ids_of_all, present } = asked;
    let (starts, unreadable) = match begin.starts(&channels, Start::Now) {
        Ok(starts) => (starts, false),
        // Never a status: that would end an EventSource for good.
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
    let mut gaps = Vec::new();
    let watches = node.bus.watch(&channels).await?;
    for (watch, start) in watches.into_iter().zip(starts) {
        let added = subs.add(watch, start, filter.clone());
        gaps.extend(added.gap);
        if unreadable {
            gaps.extend(subs.channel(added.slot).map(|channel| bad_position(channel.clone(), added.position)));
        }
    }
    let leases: Result<Box<[PresenceLease]>> = present
        .iter()
        .flat_map(|client| {
            let sse = Transport::Sse.value();
            channels.iter().map(move |channel| node.presence.enter(channel, client, identity.subject(), sse))
        })
        .collect();
    gaps.iter().for_each(|gap| node.metrics.gap(gap.reason.as_str()));
    let (heartbeat, now) = (node.config.sse.heartbeat, node.timers.now());
    let (handler, first) = SseHandler::new(&subs, leases?, &gaps, ids, filter.is_some(), heartbeat, now);
    Ok((SubscriptionStream::for_client(node, identity, remote, subs, handler), first))
}

/// The reader said where it was, and nobody understood. It goes on at `at`.
fn bad_position(channel: Channel, at: Position) -> Gap {
    let next = if at.epoch.is_absent() { at } else { Position { offset: at.offset + 1, ..at } };
    Gap { channel, reason: GapReason::BadPosition, after: None, next, missed: None }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_accept_means() {
        let headers = |accept: &'static str| HeaderMap::from_iter([(header::ACCEPT, HeaderValue::from_static(accept))]);
        for (accept, acceptable, wanted) in [
            ("text/event-stream", true, true),
            ("application/json, Text/Event-Stream;q=0.5", true, true),
            ("*/*", true, false),
            ("text/*;q=0.1", true, false),
            ("application/json", false, false),
            ("text/event-stream;q=0", false, false),
            ("text/event-stream; q=0.0, */*", true, false),
            ("", false, false),
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
