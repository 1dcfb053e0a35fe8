//! A session over HTTP: one request at a time that waits until there is something to read, and one that writes.

use std::{future::poll_fn, sync::Arc, task::ready, time::Duration};

use axum::{
    body::{Body, Bytes},
    http::Response,
};
use http::{HeaderValue, StatusCode, header, request::Parts};
use http_body_util::{BodyExt, LengthLimitError, Limited};

use super::{
    error::EngineError,
    packet::{self, Framing},
    session::EngineSession,
    settings::EngineSettings,
};
use crate::{
    error::Code,
    net::{timer, websocket::outbox::OutboxContent},
};

/// How long the packets of a body wait for clients that have not read what they are sent.
const MAX_HELD: Duration = Duration::from_secs(2);

/// Answers a poll with the packets that wait for the client, or as soon as there are some.
pub(super) async fn poll(session: &Arc<EngineSession>) -> Result<Response<Body>, EngineError> {
    session.client_alive();
    let Some(request) = session.begin_request(true) else {
        // Two polls at once are an error of the client, as with the original.
        session.close(Code::Protocol);
        return Err(EngineError::BadRequest);
    };
    let mut body = Vec::new();
    let content = poll_fn(|cx| session.outbox.poll_take(cx, Framing::Polling, &mut body)).await;
    request.done();
    match content {
        OutboxContent::Bytes if session.outbox.is_finished() => session.close(Code::Kicked),
        OutboxContent::Bytes => {}
        OutboxContent::Close(code) => session.close(code),
        OutboxContent::Closed => {}
    }
    if body.is_empty() {
        // Nothing more comes over polls, but a poll must be answered by a packet.
        body.push(b'6');
    }
    Ok(response("text/plain; charset=UTF-8", body.into()))
}

/// Handles a body of packets from the client.
pub(super) async fn post(
    settings: &EngineSettings,
    session: &Arc<EngineSession>,
    head: &Parts,
    body: Body,
) -> Result<Response<Body>, EngineError> {
    session.client_alive();
    let Some(request) = session.begin_request(false) else {
        session.close(Code::Protocol);
        return Err(EngineError::BadRequest);
    };
    if head.headers.get(header::CONTENT_TYPE).is_some_and(|kind| kind == "application/octet-stream") {
        // Bytes travel as base64 in this revision.
        session.close(Code::Protocol);
        return Err(EngineError::BadRequest);
    }
    // If this future is dropped, `request` ends the session: it is unknown how much of the body was received.
    let body = match read(settings, body).await {
        Ok(body) => body,
        Err(code) => {
            session.close(code);
            let mut response = Response::new(Body::empty());
            *response.status_mut() = match code {
                Code::TooLarge => StatusCode::PAYLOAD_TOO_LARGE,
                _ => StatusCode::BAD_REQUEST,
            };
            return Ok(response);
        }
    };
    let read = receive(session, &body).await;
    request.done();
    if read.is_none() {
        session.close(Code::Protocol);
        return Err(EngineError::BadRequest);
    }
    Ok(response("text/html", Bytes::from_static(b"ok")))
}

/// Handles the packets of a body, which waits while the client or the receivers of its responses have too much to read.
/// `None` if a packet violates the protocol.
async fn receive(session: &EngineSession, body: &[u8]) -> Option<()> {
    for packet in packet::read_body(str::from_utf8(body).ok()?) {
        let ready = poll_fn(|cx| {
            ready!(session.outbox.poll_room(cx));
            session.poll_ready(cx)
        });
        if tokio::time::timeout(MAX_HELD, ready).await.is_err() {
            session.outbox.abandon_wait();
            session.abandon_wait();
        }
        session.receive(&packet?).ok()?;
    }
    Some(())
}

async fn read(settings: &EngineSettings, body: Body) -> Result<Bytes, Code> {
    if http_body::Body::size_hint(&body).lower() > settings.max_payload as u64 {
        return Err(Code::TooLarge);
    }
    match timer::timeout(settings.body_time, Limited::new(body, settings.max_payload).collect()).await {
        Ok(Ok(body)) => Ok(body.to_bytes()),
        Ok(Err(error)) if error.is::<LengthLimitError>() => Err(Code::TooLarge),
        Ok(Err(_)) => Err(Code::Protocol),
        Err(_) => Err(Code::Timeout),
    }
}

fn response(kind: &'static str, body: Bytes) -> Response<Body> {
    let mut response = Response::new(Body::from(body));
    let headers = response.headers_mut();
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static(kind));
    headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-store"));
    response
}
