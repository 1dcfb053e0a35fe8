//! A session carried by HTTP: one request that is held until there is something to read, and one at a time that writes.

use std::{future::poll_fn, sync::Arc};

use axum::{
    body::{Body, Bytes},
    http::Response,
};
use http::{HeaderValue, StatusCode, header, request::Parts};
use http_body_util::{BodyExt, LengthLimitError, Limited};

use super::{
    Refusal, Server,
    outbox::Taken,
    packet::{self, Framing},
    session::Session,
};
use crate::error::Code;

/// What waits for the client, or will.
pub async fn poll(session: &Arc<Session>) -> Result<Response<Body>, Refusal> {
    session.heard();
    let Some(turn) = session.begin_request(true) else {
        // As the original: somebody else polls under the same id, or the client has lost count.
        session.close(Code::Protocol);
        return Err(Refusal::Request);
    };
    let mut body = Vec::new();
    let taken = poll_fn(|cx| session.outbox.poll_take(cx, Framing::Polling, &mut body)).await;
    turn.done();
    match taken {
        Taken::Packets if session.outbox.is_finished() => session.close(Code::Kicked),
        Taken::Packets => {}
        Taken::Slow => session.close(Code::Slow),
        Taken::Over | Taken::Elsewhere => {}
    }
    if body.is_empty() {
        // Nothing more comes this way: a poll ends with a packet nevertheless.
        body.push(b'6');
    }
    Ok(answer("text/plain; charset=UTF-8", body.into()))
}

/// What the client says.
pub async fn post(
    server: &Server,
    session: &Arc<Session>,
    head: &Parts,
    body: Body,
) -> Result<Response<Body>, Refusal> {
    session.heard();
    let Some(turn) = session.begin_request(false) else {
        session.close(Code::Protocol);
        return Err(Refusal::Request);
    };
    if head.headers.get(header::CONTENT_TYPE).is_some_and(|kind| kind == "application/octet-stream") {
        // Bytes travel as base64 in this revision.
        session.close(Code::Protocol);
        return Err(Refusal::Request);
    }
    // Dropped with this future, the turn ends the session: nobody knows how much of it came.
    let body = match read(server, body).await {
        Ok(body) => body,
        Err(code) => {
            session.close(code);
            let mut answer = Response::new(Body::empty());
            *answer.status_mut() = match code {
                Code::TooLarge => StatusCode::PAYLOAD_TOO_LARGE,
                _ => StatusCode::BAD_REQUEST,
            };
            return Ok(answer);
        }
    };
    let read = str::from_utf8(&body).map_err(drop).and_then(|body| {
        packet::read_body(body).try_for_each(|packet| session.receive(&packet.ok_or(())?).map_err(drop))
    });
    turn.done();
    if read.is_err() {
        session.close(Code::Protocol);
        return Err(Refusal::Request);
    }
    Ok(answer("text/html", Bytes::from_static(b"ok")))
}

async fn read(server: &Server, body: Body) -> Result<Bytes, Code> {
    let settings = &server.settings;
    if http_body::Body::size_hint(&body).lower() > settings.max_payload as u64 {
        return Err(Code::TooLarge);
    }
    match tokio::time::timeout(settings.body_time, Limited::new(body, settings.max_payload).collect()).await {
        Ok(Ok(body)) => Ok(body.to_bytes()),
        Ok(Err(error)) if error.is::<LengthLimitError>() => Err(Code::TooLarge),
        Ok(Err(_)) => Err(Code::Protocol),
        Err(_) => Err(Code::Timeout),
    }
}

fn answer(kind: &'static str, body: Bytes) -> Response<Body> {
    let mut answer = Response::new(Body::from(body));
    let headers = answer.headers_mut();
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static(kind));
    headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-store"));
    answer
}
