//! `Grip-Hold: stream`: the origin's answer goes out at once and stays open, and what is published is added to it.

use std::{
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
};

use axum::body::Body as AxumBody;
use bytes::Bytes;
use http::{HeaderMap, Response, StatusCode, header};
use http_body::Body;
use hyper::body::Incoming;

use super::{
    Answer, Content, Grip,
    at::At,
    frame,
    instruct::{Instruct, KeepAlive},
    link::Linked,
    proxy::Failure,
};
use crate::{
    bus::Subscriptions,
    error::{Code, Error},
    net::{chunk, stream::StreamOutput},
    position::Start,
    transport::subscription_stream::{HeartbeatPolicy, StreamAction, StreamContext, StreamHandler, SubscriptionStream},
};

/// A stream that follows nothing: what is published goes to all of them as it is.
struct Plain {
    /// The origin's own words, until they are all said.
    opening: Option<Box<Incoming>>,
    keep_alive: Option<Box<Alive>>,
}

/// How a stream is kept alive.
pub struct Alive {
    pub data: Bytes,
    pub policy: HeartbeatPolicy,
}

impl Grip {
    pub(super) async fn hold_stream(
        self: &Arc<Self>,
        at: At,
        instruct: Instruct,
        answer: Answer,
    ) -> Result<Response<AxumBody>, Failure> {
        let channels = self.channels(&self.routes[at.route], &instruct)?;
        let linked = instruct.is_followed();
        let mut subs = match linked {
            true => Subscriptions::new(&frame::MARKED).one_by_one(),
            false => Subscriptions::new(&frame::PLAIN),
        };
        // Before the client is told anything: what is published once it has read the head is not missed.
        let mut slots = Vec::with_capacity(channels.len());
        for watch in self.node.bus.watch(&channels).await.map_err(away)? {
            let channel = watch.channel().clone();
            slots.push((subs.add(watch, Start::Now, None).slot, channel));
        }
        let (opening, first) = match answer.body {
            Content::Incoming(incoming) => (Some(Box::new(incoming)), Vec::new()),
            Content::Bytes(bytes) => (None, vec![chunk::of(&bytes)]),
        };
        let head = head(answer.status, answer.headers);
        if !linked {
            let plain = Plain { opening, keep_alive: instruct.keep_alive.map(|alive| Box::new(Alive::new(alive))) };
            return Ok(SubscriptionStream::new(&self.node, subs, plain).respond(head, first));
        }
        let mut outdated = false;
        for (channel, asked) in channels.iter().zip(&instruct.channels) {
            let Some(prev) = &asked.prev_id else { continue };
            if instruct.next.is_none() {
                let name = &asked.name;
                return Err(Failure::Wrong(format!("channel '{name}' specifies prev-id, but no next link found")));
            }
            // An item may have come between the origin's look and ours.
            outdated |= self.last_id(channel).await.is_some_and(|last| last != *prev);
        }
        let linked = Linked::new(self, at, instruct, slots, opening, outdated);
        Ok(SubscriptionStream::new(&self.node, subs, linked).respond(head, first))
    }
}

/// The head of a stream: of any length.
fn head(status: StatusCode, headers: HeaderMap) -> Response<()> {
    let mut head = Response::new(());
    *head.status_mut() = status;
    *head.headers_mut() = headers;
    head.headers_mut().remove(header::CONTENT_LENGTH);
    head
}

/// What the bus cannot do now.
pub fn away(error: Error) -> Failure {
    tracing::debug!(%error, "could not hold an answer");
    Failure::Wrong("what it wants to hold cannot be held now".into())
}

impl Alive {
    pub fn new(KeepAlive { data, timeout, always }: KeepAlive) -> Self {
        let policy = if always { HeartbeatPolicy::Periodic(timeout) } else { HeartbeatPolicy::WhenIdle(timeout) };
        Alive { data: chunk::of(&data), policy }
    }
}

/// Pushes what an origin says, until all is said.
pub fn pour(from: &mut Option<Box<Incoming>>, cx: &mut Context<'_>, out: &mut StreamOutput) -> StreamAction {
    let Some(body) = from else { return StreamAction::Continue };
    while !out.is_full() {
        match Pin::new(&mut **body).poll_frame(cx) {
            Poll::Pending => return StreamAction::Wait,
            Poll::Ready(None) => {
                *from = None;
                return StreamAction::Continue;
            }
            Poll::Ready(Some(Ok(frame))) => {
                if let Ok(data) = frame.into_data() {
                    out.push(chunk::of(&data));
                }
            }
            Poll::Ready(Some(Err(_))) => return StreamAction::Close(Code::ProviderGone),
        }
    }
    StreamAction::Wait
}

impl StreamHandler for Plain {
    fn heartbeat(&self) -> Option<HeartbeatPolicy> {
        self.keep_alive.as_ref().map(|alive| alive.policy)
    }

    fn on_heartbeat(&mut self, stream: &mut StreamContext<'_>) {
        // In the midst of the origin's body it would corrupt it.
        if let (None, Some(alive)) = (&self.opening, &self.keep_alive) {
            stream.out.push(alive.data.clone());
        }
    }

    fn poll_direct(&mut self, cx: &mut Context<'_>, stream: &mut StreamContext<'_>) -> StreamAction {
        pour(&mut self.opening, cx, stream.out)
    }

    fn on_events(&mut self, stream: &mut StreamContext<'_>, _: u32, bytes: Bytes, _: u32) -> StreamAction {
        let (chunk, closes) = frame::unpack(bytes);
        if let Some(chunk) = chunk {
            stream.out.push(chunk);
        }
        if closes { StreamAction::Finish } else { StreamAction::Continue }
    }
}
