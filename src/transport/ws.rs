//! WebSocket: JSON-RPC 2.0 in both directions over one socket, `GET /v1/ws`; and over one request, `POST /v1/rpc`.
//!
//! The handshake is an ordinary response of the router with status 101 that hijacks the connection. From there on a
//! [`WebSocket`](crate::net::websocket::socket::WebSocket) with an [`RpcSocket`] is all there is: one task without
//! buffers while it is idle.

mod bus_methods;
mod connection;
mod dispatch;
mod jsonrpc;
mod login;
mod outbox;
mod params;
mod session;
mod subscriptions;
mod work;

use std::{future::poll_fn, sync::Arc, task::Poll};

use axum::response::Response;
use http::{header, request::Parts};

use self::{
    connection::RpcSocket, outbox::RpcOutbox, params::SubscribeRequest, session::RpcSession,
    subscriptions::ReadySubscription,
};
use crate::{
    auth::Identity,
    bus::Filter,
    error::{Code, Error, Result},
    metrics::Transport,
    net::{
        hijack::Hijack,
        websocket::{handshake::Handshake, outbox::OutboxContent},
    },
    node::Node,
    position::Start,
    sessions::ChannelSet,
    transport::{present, query::Query},
};

/// Accepted subprotocols. All mean the same; a browser that offers some and gets none closes the connection.
const PROTOCOLS: [&str; 4] = ["weir.v1", "weir.jsonrpc", "jsonrpc", "jsonrpc2.0"];

/// Answers `GET /v1/ws`. `admitted` is the client's identity, or the reason to reject it.
///
/// # Errors
/// `upgrade_required`, `invalid_request`, `invalid_params`, `draining`, or what `admitted` holds. A script in a browser
/// cannot read the response of a failed handshake: a browser that is not admitted completes the handshake, and the
/// WebSocket is closed with the code.
pub(crate) async fn upgrade(node: &Arc<Node>, head: &Parts, admitted: Result<Identity>) -> Result<Response> {
    let handshake = Handshake::read(head, &PROTOCOLS)?;
    let identity = match admitted {
        Ok(identity) => identity,
        Err(error) if error.code().close().is_some() && head.headers.contains_key(header::ORIGIN) => {
            let (node, code) = (node.clone(), error.code());
            return Ok(handshake.response(Hijack::new(move |conn| {
                let outbox = Arc::new(RpcOutbox::framed(0));
                let session = RpcSession::new(node.clone(), node.auth.anonymous(false), outbox, false);
                let mut socket = RpcSocket::open(node, session, conn);
                socket.close(code);
                tokio::spawn(socket);
            })));
        }
        Err(error) => return Err(error),
    };
    if node.timers.is_draining() {
        return Err(Error::new(Code::Draining, "this node is shutting down"));
    }
    let ready = subscriptions_of_url(node, &identity, head).await?;
    let node = node.clone();
    Ok(handshake.response(Hijack::new(move |conn| {
        let outbox = Arc::new(RpcOutbox::framed(node.config.limits.queued));
        let registration = node.sessions.register(Transport::Ws, &identity, Some(conn.peer), ChannelSet::Empty);
        let mut session = RpcSession::new(node.clone(), identity, outbox, false);
        session.registration = Some(registration);
        if !ready.is_empty() {
            session.subscribe_now(ready);
        }
        tokio::spawn(RpcSocket::open(node, session, conn));
    })))
}

/// The subscriptions that the URL asks for. Their positions are resolved here, so that events which are published
/// during the handshake are not missed.
async fn subscriptions_of_url(node: &Node, identity: &Identity, head: &Parts) -> Result<Vec<ReadySubscription>> {
    let mut query = Query::parse(head.uri.query())?;
    let channels = query.channels(node.config.limits.stream_channels, "limits.stream_channels")?;
    let start = query.start(None)?;
    let kinds = query.types()?;
    let client = present::from_query(&mut query, node.config.limits.present_info)?;
    query.finish()?;
    let starts = start.starts(&channels, Start::Now)?;
    for channel in &channels {
        let _ = identity.may_subscribe(channel)?;
    }
    let watches = node.bus.watch(&channels).await?;
    let leases = present::enter(&node.presence, identity, channels.iter(), client.as_ref(), Transport::Ws)?;
    let mut ready = Vec::with_capacity(channels.len());
    for (((channel, start), watch), lease) in channels.into_iter().zip(starts).zip(watches).zip(leases) {
        let start = match start {
            Start::Now => Start::After(watch.resolve(start).0),
            start => start,
        };
        ready.push((SubscribeRequest { channel, start: Some(start), filter: Filter::new(&kinds)? }, watch, lease));
    }
    Ok(ready)
}

/// Answers `POST /v1/rpc`: one message or batch. `None` if nothing in it asks for an answer.
///
/// Dropping the future cancels its calls and jobs.
///
/// # Errors
/// `too_large` if the answers together are.
pub(crate) async fn post(node: &Arc<Node>, identity: Identity, body: &[u8]) -> Result<Option<Vec<u8>>> {
    let outbox = Arc::new(RpcOutbox::bare(node.config.limits.queued));
    let mut session = RpcSession::new(node.clone(), identity, outbox.clone(), true);
    let awaited = session.receive(std::str::from_utf8(body)) > 0;
    let mut answer = Vec::new();
    poll_fn(|cx| {
        if session.poll(cx) {
            cx.waker().wake_by_ref();
        }
        match outbox.poll_take(cx, &mut answer) {
            Poll::Ready(OutboxContent::Bytes) => Poll::Ready(Ok(true)),
            Poll::Ready(OutboxContent::Close(_) | OutboxContent::Closed) => {
                let error = Error::new(Code::TooLarge, "the answers are larger than limits.queued allows");
                Poll::Ready(Err(error.with("limit", "limits.queued")))
            }
            Poll::Pending if !awaited && session.is_idle() => Poll::Ready(Ok(false)),
            Poll::Pending => Poll::Pending,
        }
    })
    .await
    .map(|answered| answered.then_some(answer))
}
