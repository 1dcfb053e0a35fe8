//! `Grip-Hold: stream`: the response is sent at once and held open, and published items are appended.

use std::task::Context;

use axum::body::Body as AxumBody;
use bytes::Bytes;
use http::{HeaderMap, Response, StatusCode, header};
use hyper::body::Incoming;

use super::{
    frame,
    instructions::Instructions,
    next_link::StreamSite,
    origin_client::OriginError,
    reliable_stream::ReliableStream,
    response::{OriginBody, OriginResponse},
    stream_parts::{StreamKeepAlive, forward_body},
};
use crate::{
    bus::Subscriptions,
    net::chunk,
    node::Node,
    position::Start,
    transport::subscription_stream::{HeartbeatPolicy, StreamAction, StreamContext, StreamHandler, SubscriptionStream},
};

/// A stream without next link, ids and filters: the content of items is shared with all other such streams.
struct ContentStream {
    /// The rest of the origin's body.
    body: Option<Box<Incoming>>,
    keep_alive: Option<Box<StreamKeepAlive>>,
}

pub(super) async fn hold_stream(
    site: StreamSite,
    instructions: Instructions,
    response: OriginResponse,
) -> Result<Response<AxumBody>, OriginError> {
    let proxy = site.proxy.clone();
    let (identity, remote) = (proxy.node.auth.anonymous(false), site.remote);
    let channels = proxy.channels(&proxy.routes[site.route], &instructions)?;
    let per_item = instructions.inspect_items();
    let mut subs = match per_item {
        true => Subscriptions::new(&frame::WITH_RECORD).one_by_one(),
        false => Subscriptions::new(&frame::CONTENT),
    };
    // Subscribed before the client gets the head, so that a client that has received it misses no later item.
    let mut slots = Vec::with_capacity(channels.len());
    for watch in proxy.node.bus.watch(&channels).await.map_err(OriginError::bus_unavailable)? {
        let channel = watch.channel().clone();
        slots.push((subs.add(watch, Start::Now, None).slot, channel));
    }
    let (body, first) = match response.body {
        OriginBody::Incoming(incoming) => (Some(Box::new(incoming)), Vec::new()),
        OriginBody::Bytes(bytes) => (None, vec![chunk::of(&bytes)]),
    };
    let head = stream_head(response.status, response.headers);
    if !per_item {
        let keep_alive = instructions.keep_alive.map(|keep_alive| Box::new(StreamKeepAlive::new(keep_alive)));
        let stream = ContentStream { body, keep_alive };
        return Ok(SubscriptionStream::new(&proxy.node, &identity, remote, subs, stream).respond(head, first));
    }
    let mut outdated = false;
    for (channel, held) in channels.iter().zip(&instructions.channels) {
        let Some(prev) = &held.prev_id else { continue };
        if instructions.next.is_none() {
            let name = &held.name;
            return Err(OriginError::Invalid(format!("channel '{name}' specifies prev-id, but no next link found")));
        }
        // An item may have been published between the origin's read and this subscription.
        outdated |= proxy.last_item_id(channel).await.is_some_and(|last| last != *prev);
    }
    let stream = ReliableStream::new(site, instructions, slots, body, outdated);
    Ok(SubscriptionStream::new(&proxy.node, &identity, remote, subs, stream).respond(head, first))
}

/// The head of a response of unknown length.
fn stream_head(status: StatusCode, headers: HeaderMap) -> Response<()> {
    let mut head = Response::new(());
    *head.status_mut() = status;
    *head.headers_mut() = headers;
    head.headers_mut().remove(header::CONTENT_LENGTH);
    head
}

impl StreamHandler for ContentStream {
    fn heartbeat(&self, _: &Node) -> Option<HeartbeatPolicy> {
        self.keep_alive.as_ref().map(|keep_alive| keep_alive.policy)
    }

    fn on_heartbeat(&mut self, stream: &mut StreamContext<'_>) {
        // In the middle of the origin's body it would corrupt it.
        if let (None, Some(keep_alive)) = (&self.body, &self.keep_alive) {
            stream.out.push(keep_alive.chunk.clone());
        }
    }

    fn poll_direct(&mut self, cx: &mut Context<'_>, stream: &mut StreamContext<'_>) -> StreamAction {
        forward_body(&mut self.body, cx, stream.out)
    }

    fn on_events(&mut self, stream: &mut StreamContext<'_>, _: u32, bytes: Bytes, _: u32) -> StreamAction {
        let (chunk, closes) = frame::split_close(bytes);
        if let Some(chunk) = chunk {
            stream.out.push(chunk);
        }
        if closes { StreamAction::Finish } else { StreamAction::Continue }
    }
}
