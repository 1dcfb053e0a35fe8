//! Responses of origins and of the proxy.

use axum::body::Body as AxumBody;
use bytes::Bytes;
use http::{HeaderMap, HeaderValue, Response, StatusCode, header};
use http_body::{Body as _, Frame};
use http_body_util::BodyExt as _;
use hyper::body::Incoming;

use super::headers::strip_trailers;

/// A response of an origin, after its instructions were taken out.
pub(super) struct OriginResponse {
    pub(super) status: StatusCode,
    pub(super) headers: HeaderMap,
    pub(super) body: OriginBody,
}

pub(super) enum OriginBody {
    Incoming(Incoming),
    Bytes(Bytes),
}

impl OriginResponse {
    pub(super) fn into_response(self) -> Response<AxumBody> {
        let mut response = match self.body {
            OriginBody::Incoming(incoming) => pass_through(Response::new(incoming)),
            OriginBody::Bytes(bytes) => Response::new(AxumBody::from(bytes)),
        };
        *response.status_mut() = self.status;
        *response.headers_mut() = self.headers;
        response
    }
}

/// Streams the body of an origin's response to the client.
pub(super) fn pass_through(response: Response<Incoming>) -> Response<AxumBody> {
    response.map(|body| {
        AxumBody::new(body.map_frame(|frame| match frame.into_trailers() {
            Ok(mut trailers) => {
                strip_trailers(&mut trailers);
                Frame::trailers(trailers)
            }
            Err(frame) => frame.into_data().map_or_else(|_| Frame::data(Bytes::new()), Frame::data),
        }))
    })
}

/// Removes the body that the status of a response forbids (RFC 9110, sections 15.3.5, 15.3.6 and 15.4.5): over HTTP/2 it
/// would break the stream. `Grip-Status` or an item may have set the status.
pub(super) fn without_forbidden_body(mut response: Response<AxumBody>) -> Response<AxumBody> {
    let forbidden = [StatusCode::NO_CONTENT, StatusCode::RESET_CONTENT, StatusCode::NOT_MODIFIED];
    let has_body = !response.body().is_end_stream();
    if forbidden.contains(&response.status()) && (has_body || response.status() == StatusCode::NO_CONTENT) {
        *response.body_mut() = AxumBody::empty();
        response.headers_mut().remove(header::CONTENT_LENGTH);
    }
    response
}

pub(super) fn text_response(status: StatusCode, text: impl Into<String>) -> Response<AxumBody> {
    let mut response = Response::new(AxumBody::from(text.into()));
    *response.status_mut() = status;
    response.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static("text/plain"));
    response
}
