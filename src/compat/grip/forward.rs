//! Forwards a client's request to its origin and follows the instructions in the response.

use std::sync::Arc;

use axum::body::Body as AxumBody;
use http::{Method, Request, Response, StatusCode, header, uri::PathAndQuery};
use hyper::body::Incoming;

use super::{
    headers::{merge_content_length, prepare_request, sign, strip_hop_by_hop, wants_websocket},
    instructions::{self, HoldMode, Instructions, take_no_encoding},
    next_link::StreamSite,
    origin_client::{OriginError, OriginRequest},
    proxy::GripProxy,
    response::{OriginBody, OriginResponse, pass_through, text_response, without_forbidden_body},
    response_hold::{HoldOutcome, Retries, hold_response},
    stream_hold::hold_stream,
    tunnel::tunnel,
};
use crate::net::server::PeerAddr;

/// How often a request is sent to the origin again, because what it waits for has changed meanwhile.
const MAX_RETRIES: usize = 16;

pub(super) async fn forward(proxy: Arc<GripProxy>, request: Request<AxumBody>) -> Response<AxumBody> {
    let (head, body) = request.into_parts();
    let Some(index) = proxy.route(head.uri.path()) else {
        return text_response(StatusCode::BAD_GATEWAY, format!("No route for {}.\n", head.uri.path()));
    };
    let route = &proxy.routes[index];
    let path = head.uri.path_and_query().cloned().unwrap_or(PathAndQuery::from_static("/"));
    let remote = PeerAddr::of(&head);
    let mut headers = head.headers;
    if headers.get_all(header::HOST).iter().nth(1).is_some() {
        // RFC 9112, section 3.2: the origin might choose another one than a proxy in between.
        return text_response(StatusCode::BAD_REQUEST, "A request has one Host.\n");
    }
    let websocket = wants_websocket(&headers);
    prepare_request(&mut headers, &head.uri, remote.map(|remote| remote.ip()), proxy.signature(route));
    let host = headers.get(header::HOST).cloned();
    let site = || StreamSite { proxy: proxy.clone(), route: index, path: path.clone(), host: host.clone(), remote };
    // A body cannot be sent twice.
    let repeatable = http_body::Body::is_end_stream(&body).then(|| headers.clone());
    let mut request = OriginRequest { method: head.method.clone(), path: path.clone(), headers, body };
    let mut sent = 0;
    loop {
        let retries = match sent {
            _ if repeatable.is_none() || sent == MAX_RETRIES => Retries::Exhausted,
            0 => Retries::Unused,
            _ => Retries::Used,
        };
        sent += 1;
        let outcome = match proxy.send(route, request).await {
            Ok(response) if response.status() == StatusCode::SWITCHING_PROTOCOLS => match websocket {
                true => return tunnel(response, proxy.node.clone()),
                // The client has not requested it.
                false => Err(OriginError::Broken),
            },
            Ok(response) => handle_response(site(), &head.method, response, retries).await,
            Err(error) => Err(error),
        };
        let last_ids = match outcome {
            Ok(HoldOutcome::Done(response)) => return without_forbidden_body(response),
            Ok(HoldOutcome::Retry(last_ids)) => last_ids,
            Err(error) => return error.into_response(),
        };
        let mut headers = repeatable.clone().unwrap_or_default();
        headers.extend(last_ids);
        sign(&mut headers, proxy.signature(route));
        let (method, path) = (head.method.clone(), path.clone());
        request = OriginRequest { method, path, headers, body: AxumBody::empty() };
    }
}

/// Passes a response on or holds it, as its instructions say.
async fn handle_response(
    site: StreamSite,
    method: &Method,
    mut response: Response<Incoming>,
    retries: Retries,
) -> Result<HoldOutcome, OriginError> {
    let instructed = *method != Method::HEAD && Instructions::are_in(response.headers());
    let in_body = instructions::are_in_body(response.headers());
    strip_hop_by_hop(response.headers_mut());
    merge_content_length(response.headers_mut());
    let taken = Instructions::take(response.headers_mut());
    let (mut head, body) = response.into_parts();
    if !instructed {
        if let Ok(Instructions { status: Some(status), .. }) = taken {
            head.status = status;
        }
        return Ok(HoldOutcome::Done(pass_through(Response::from_parts(head, body))));
    }
    let proxy = site.proxy.clone();
    let mut instructions = taken.map_err(OriginError::Invalid)?;
    let mut response = OriginResponse { status: head.status, headers: head.headers, body: OriginBody::Incoming(body) };
    if in_body {
        let body = proxy.read_body(response.body).await?;
        let read = instructions.read_body(response.status, &body).map_err(OriginError::Invalid)?;
        let status = read.status.unwrap_or(response.status);
        response = OriginResponse { status, headers: read.headers, body: OriginBody::Bytes(read.body.into()) };
    }
    response.status = instructions.status.unwrap_or(response.status);
    take_no_encoding(&mut response.headers)?;
    proxy.check_limits(&instructions)?;
    match (instructions.hold, &instructions.next) {
        (Some(HoldMode::Response), _) => hold_response(&site, instructions, response, retries).await,
        (Some(HoldMode::Stream), _) | (None, Some(_)) => {
            hold_stream(site, instructions, response).await.map(HoldOutcome::Done)
        }
        (None, None) => Ok(HoldOutcome::Done(response.into_response())),
    }
}
