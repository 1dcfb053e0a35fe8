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
    transport::subscription_stream::{Beat, StreamHandler, SubscriptionStream, Then},
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
    pub beat: Beat,
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
        let beat = if always { Beat::Always(timeout) } else { Beat::Silence(timeout) };
        Alive { data: chunk::of(&data), beat }
    }
}

/// Pushes what an origin says, until all is said.
pub fn pour(from: &mut Option<Box<Incoming>>, cx: &mut Context<'_>, out: &mut StreamOutput) -> Then {
    let Some(body) = from else { return Then::GoOn };
    while !out.is_full() {
        match Pin::new(&mut **body).poll_frame(cx) {
            Poll::Pending => return Then::Wait,
            Poll::Ready(None) => {
                *from = None;
                return Then::GoOn;
            }
            Poll::Ready(Some(Ok(frame))) => {
                if let Ok(data) = frame.into_data() {
                    out.push(chunk::of(&data));
                }
            }
            Poll::Ready(Some(Err(_))) => return Then::End(Code::ProviderGone),
        }
    }
    Then::Wait
}

impl StreamHandler for Plain {
    fn beat(&self) -> Option<Beat> {
        self.keep_alive.as_ref().map(|alive| alive.beat)
    }

    fn keep_alive(&mut self) -> Bytes {
        match (&self.opening, &self.keep_alive) {
            (None, Some(alive)) => alive.data.clone(),
            // In the midst of what the origin says it would break it.
            _ => Bytes::new(),
        }
    }

    fn poll_aside(&mut self, cx: &mut Context<'_>, out: &mut StreamOutput) -> Then {
        pour(&mut self.opening, cx, out)
    }

    fn events(&mut self, _: u32, bytes: Bytes, _: u32, out: &mut StreamOutput) -> Then {
        let (chunk, closes) = frame::unpack(bytes);
        if let Some(chunk) = chunk {
            out.push(chunk);
        }
        if closes { Then::Done } else { Then::GoOn }
    }
}
