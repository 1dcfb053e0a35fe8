//! `GET /subscribe` and `GET /lastEvent`.

use std::{sync::Arc, task::Context, time::Duration};

use axum::{
    body::{Body, Bytes},
    http::{HeaderValue, Method, Response, StatusCode, Version, header, request::Parts as Head},
};
use serde_json::{Value, json};

use super::{
    context::{NodeSse, NodeSseError},
    js,
    online::{OnlineClients, OnlineMember},
    wire,
};
use crate::{
    bus::{ReadLimit, Subscriptions},
    channel::Channel,
    compat::form::Form,
    error::{Code, Error, Result},
    event::Event,
    net::{body::not_generated, chunk, server::PeerAddr},
    node::Node,
    position::{Position, Start},
    transport::{
        sse::frame::HEARTBEAT,
        subscription_stream::{
            HeartbeatPolicy, StreamAction, StreamContext, StreamHandler, SubscriptionStream, retry_chunk,
        },
    },
};

/// Maximum size of a `clientId` in bytes. All clients receive the ids of all.
const MAX_CLIENT: usize = 255;

/// The handler of a stream: sends the list of clients, and comments as heartbeats.
struct NodeSseStream {
    member: OnlineMember,
    /// Heartbeat interval in milliseconds, randomized so that the streams are not in step.
    heartbeat: u32,
}

impl NodeSse {
    pub(super) async fn subscribe(&self, head: &Head, query: &Form<'_>) -> Result<Response<Body>, NodeSseError> {
        let bad = || NodeSseError::Text("Bad Request".to_owned());
        let mut channels = Vec::new();
        for name in query.texts("channels").flat_map(|names| names.split(',')).filter(|name| !name.is_empty()) {
            let channel = Channel::parse(name).map_err(|_| bad())?;
            if !channels.contains(&channel) {
                channels.push(channel);
            }
        }
        if channels.is_empty() || channels.len() > self.node.config.limits.stream_channels {
            return Err(bad());
        }
        let identity = self.access.identity(head);
        for channel in &channels {
            let _ = identity.may_subscribe(channel)?;
        }
        // The list of online clients is sent to all of them.
        let forbidden = |error: Error| NodeSseError::Page(StatusCode::FORBIDDEN, error.detail().to_owned());
        let _ = identity.may_connect().map_err(forbidden)?;
        let given = query.texts("clientId").collect::<Vec<_>>().join(",");
        if given.len() > MAX_CLIENT {
            return Err(bad());
        }
        let mut answer = Response::new(());
        let headers = answer.headers_mut();
        headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("text/event-stream"));
        headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-cache"));
        headers.insert("x-accel-buffering", HeaderValue::from_static("no"));
        // HTTP/2 has no such header.
        if head.version <= Version::HTTP_11 {
            headers.insert(header::CONNECTION, HeaderValue::from_static("keep-alive"));
        }
        if head.method == Method::HEAD {
            return Ok(answer.map(|()| not_generated()));
        }

        let mut subs = Subscriptions::new(&wire::EVENT);
        let mut first = vec![chunk::of(b"\n")];
        let watches = self.node.bus.watch(&channels).await?;
        let mut places = Vec::with_capacity(channels.len());
        for watch in watches {
            places.push(subs.add(watch, Start::Now, None).position);
        }
        let id = match given.is_empty() {
            true => Value::from(self.next_client_number().await?),
            false => Value::from(given),
        };
        first.push(wire::frame(None, "registered", &json!({ "clientId": id }).to_string()));
        for (channel, at) in channels.iter().zip(places) {
            self.known.add(channel);
            let last = match self.event_at(channel, at).await? {
                Some(event) => js::text(&wire::last_event(&event)),
                None => "{}".to_owned(),
            };
            first.push(wire::frame(Some(channel), "lastEvent", &last));
        }
        let heartbeat = self.node.config.sse.heartbeat.mul_f64(fastrand::f64() / 2.0 + 0.75);
        let heartbeat = u32::try_from(heartbeat.as_millis()).unwrap_or(u32::MAX);
        // Last, because it sends the list to all clients including this one.
        let member = OnlineClients::join(&self.online, &js::text(&id));
        Ok(SubscriptionStream::new(
            &self.node,
            &identity,
            PeerAddr::of(head),
            subs,
            NodeSseStream { member, heartbeat },
        )
        .respond(answer, first))
    }

    pub(super) async fn last_event(&self, head: &Head, query: &Form<'_>) -> Result<Response<Body>, NodeSseError> {
        let channel = query.text("channel").and_then(|name| Channel::parse(name).ok());
        let channel = channel.ok_or_else(|| NodeSseError::Text("Bad Request".to_owned()))?;
        let _ = self.access.identity(head).may_subscribe(&channel)?;
        let newest = ReadLimit { events: 1, bytes: 0 };
        let page = self.node.bus.read(&channel, Start::Last(1), newest, None).await?;
        let mut out = Vec::new();
        match page.events.last() {
            Some(event) => {
                out.extend_from_slice(br#"{"response":"#);
                js::stringify(&wire::last_event(event), &mut out);
                out.push(b'}');
            }
            None if self.exists(&channel).await? => out.extend_from_slice(br#"{"response":"{}"}"#),
            None => out.extend_from_slice(b"{}"),
        }
        let mut answer = Response::new(Body::from(out));
        let kind = HeaderValue::from_static("application/json; charset=utf-8");
        answer.headers_mut().insert(header::CONTENT_TYPE, kind);
        Ok(answer)
    }

    /// The event at a position, if it is still there.
    async fn event_at(&self, channel: &Channel, at: Position) -> Result<Option<Arc<Event>>> {
        if at.epoch.is_absent() || at.offset == 0 {
            return Ok(None);
        }
        let before = Start::After(Position { offset: at.offset - 1, ..at });
        let page = self.node.bus.read(channel, before, ReadLimit { events: 1, bytes: 0 }, None).await?;
        Ok(page.events.into_iter().next().filter(|event| event.position() == at))
    }
}

impl StreamHandler for NodeSseStream {
    fn heartbeat(&self, _: &Node) -> Option<HeartbeatPolicy> {
        Some(HeartbeatPolicy::WhenIdle(Duration::from_millis(self.heartbeat.into())))
    }

    /// A comment, which an `EventSource` ignores. The original sends none, and keeps dead connections.
    fn on_heartbeat(&mut self, stream: &mut StreamContext<'_>) {
        stream.out.push(Bytes::from_static(HEARTBEAT));
    }

    fn poll_direct(&mut self, cx: &mut Context<'_>, stream: &mut StreamContext<'_>) -> StreamAction {
        self.member.poll(cx, |frame| stream.out.push(frame));
        StreamAction::Continue
    }

    fn on_end(&mut self, stream: &mut StreamContext<'_>, code: Code) {
        stream.out.push(retry_chunk(code));
    }
}
