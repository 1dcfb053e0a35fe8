//! WebSocket: JSON-RPC 2.0 in both directions over one socket, `GET /v1/ws`; and over one request, `POST /v1/rpc`.
//!
//! The handshake is an ordinary response of the router with status 101 that takes the connection over. From there on
//! a [`Socket`](connection::Socket) is all there is: one task, no buffer of its own while it is idle.

mod connection;
mod dispatch;
mod jsonrpc;
mod outbox;
mod params;
mod reader;
mod work;

use std::{future::poll_fn, sync::Arc, task::Poll};

use axum::response::Response;
use http::{header, request::Parts};

use self::{
    connection::Socket,
    dispatch::Session,
    outbox::{Outbox, Taken},
    params::Wanted,
};
use crate::{
    auth::Identity,
    bus::{Filter, Watch},
    channel::Channel,
    error::{Code, Error, Result},
    metrics::{MetricLabel as _, Transport},
    net::{hijack::Hijack, websocket::handshake::Handshake},
    node::Node,
    position::Start,
    presence::{PresenceLease, PresentClient},
    sessions::ChannelSet,
    transport::{present, query::Query},
};

/// Subprotocols that mean what is spoken here anyway. A browser that offers some and gets none gives up.
const PROTOCOLS: [&str; 4] = ["weir.v1", "weir.jsonrpc", "jsonrpc", "jsonrpc2.0"];

/// A subscription that may begin: its channel is in use, and who is to be present is.
type Ready = (Wanted, Watch, Option<PresenceLease>);

/// Answers `GET /v1/ws`. `admitted` is who asks, or why they may not.
///
/// # Errors
/// `upgrade_required`, `invalid_request`, `invalid_params`, `draining`, or what `admitted` holds. A browser learns
/// nothing of a failed handshake: to one that is not admitted it is completed, and the socket closed with the code.
pub async fn upgrade(node: &Arc<Node>, head: &Parts, admitted: Result<Identity>) -> Result<Response> {
    let handshake = Handshake::read(head, &PROTOCOLS)?;
    let identity = match admitted {
        Ok(identity) => identity,
        Err(error) if error.code().close().is_some() && head.headers.contains_key(header::ORIGIN) => {
            let (node, code) = (node.clone(), error.code());
            return Ok(handshake.response(Hijack::new(move |taken| {
                let outbox = Arc::new(Outbox::framed(0));
                let session = Session::new(node.clone(), Identity::anonymous(), outbox.clone(), false);
                let mut socket = Socket::new(node, session, outbox, taken);
                socket.close(code);
                tokio::spawn(socket);
            })));
        }
        Err(error) => return Err(error),
    };
    if node.timers.is_draining() {
        return Err(Error::new(Code::Draining, "this node is leaving"));
    }
    let begun = begin(node, &identity, head).await?;
    let node = node.clone();
    Ok(handshake.response(Hijack::new(move |taken| {
        let outbox = Arc::new(Outbox::framed(node.config.limits.queued));
        let registration = node.sessions.register(Transport::Ws, &identity, Some(taken.peer), ChannelSet::Empty);
        let mut session = Session::new(node.clone(), identity, outbox.clone(), false);
        session.registration = Some(registration);
        if !begun.is_empty() {
            session.read_at_once(begun);
        }
        tokio::spawn(Socket::new(node, session, outbox, taken));
    })))
}

/// Has `client` be on `channel`, if there is one.
pub(super) fn enter(
    node: &Node,
    identity: &Identity,
    channel: &Channel,
    client: Option<&PresentClient>,
) -> Result<Option<PresenceLease>> {
    let enter = |client| node.presence.enter(channel, client, identity.subject(), Transport::Ws.value());
    client.map(enter).transpose()
}

/// What the URL subscribes to. The positions are taken here: what is published while the handshake is on its way is
/// not missed.
async fn begin(node: &Node, identity: &Identity, head: &Parts) -> Result<Vec<Ready>> {
    let mut query = Query::parse(head.uri.query())?;
    let channels = query.channels(node.config.limits.stream_channels, "limits.stream_channels")?;
    let begin = query.begin(None)?;
    let kinds = query.types()?;
    let client = present::from_query(&mut query, node.config.limits.present_info)?;
    query.finish()?;
    let starts = begin.starts(&channels, Start::Now)?;
    for channel in &channels {
        let _ = identity.may_subscribe(channel)?;
    }
    let watches = node.bus.watch(&channels).await?;
    let mut begun = Vec::with_capacity(channels.len());
    for ((channel, start), watch) in channels.into_iter().zip(starts).zip(watches) {
        let start = match start {
            Start::Now => Start::After(watch.resolve(start).0),
            start => start,
        };
        let lease = enter(node, identity, &channel, client.as_ref())?;
        begun.push((Wanted { channel, start: Some(start), filter: Filter::new(&kinds)? }, watch, lease));
    }
    Ok(begun)
}

/// Answers `POST /v1/rpc`: one message or batch. `None` if nothing in it asks for an answer.
///
/// Dropping the future cancels what it began.
///
/// # Errors
/// `too_large` if the answers together are.
pub async fn post(node: &Arc<Node>, identity: Identity, body: &[u8]) -> Result<Option<Vec<u8>>> {
    let outbox = Arc::new(Outbox::bare(node.config.limits.queued));
    let mut session = Session::new(node.clone(), identity, outbox.clone(), true);
    let awaited = session.receive(std::str::from_utf8(body)) > 0;
    let mut answer = Vec::new();
    poll_fn(|cx| {
        if session.poll(cx) {
            cx.waker().wake_by_ref();
        }
        match outbox.poll_take(cx, &mut answer) {
            Poll::Ready(Taken::Frames) => Poll::Ready(Ok(true)),
            Poll::Ready(Taken::Close(_)) => {
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
