//! Responses of origins and of the proxy.

use axum::body::Body as AxumBody;
use bytes::Bytes;
use http::{HeaderMap, HeaderValue, Response, StatusCode, header};
use http_body::Frame;
use http_body_util::BodyExt as _;
use hyper::body::Incoming;

use super::headers::strip_grip;

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
        // Grip-Status may have replaced a status that allows a body.
        if matches!(self.status, StatusCode::NO_CONTENT | StatusCode::NOT_MODIFIED) {
            *response.body_mut() = AxumBody::empty();
            response.headers_mut().remove(header::CONTENT_LENGTH);
        }
        response
    }
}

/// Streams the body of an origin's response to the client.
pub(super) fn pass_through(response: Response<Incoming>) -> Response<AxumBody> {
    response.map(|body| {
        AxumBody::new(body.map_frame(|frame| match frame.into_trailers() {
            Ok(mut trailers) => {
                strip_grip(&mut trailers);
                Frame::trailers(trailers)
            }
            Err(frame) => frame.into_data().map_or_else(|_| Frame::data(Bytes::new()), Frame::data),
        }))
    })
}

pub(super) fn text_response(status: StatusCode, text: impl Into<String>) -> Response<AxumBody> {
    let mut response = Response::new(AxumBody::from(text.into()));
    *response.status_mut() = status;
    response.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static("text/plain"));
    response
}
