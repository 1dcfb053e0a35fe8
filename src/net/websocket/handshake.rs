//! The opening handshake of a WebSocket (RFC 6455 §4.2).

use axum::{body::Body, response::Response};
use http::{HeaderMap, HeaderValue, Method, StatusCode, Version, header, request::Parts};
use tokio_tungstenite::tungstenite::handshake::derive_accept_key;

use crate::{
    error::{Code, Error, Result},
    net::hijack::Hijack,
};

/// A handshake that can be completed.
pub(crate) struct Handshake {
    accept: String,
    protocol: Option<&'static str>,
}

impl Handshake {
    /// Whether a request asks for a WebSocket.
    pub(crate) fn is_wanted(head: &Parts) -> bool {
        has_token(&head.headers, header::UPGRADE, "websocket")
    }

    /// Reads the request's head. Selects one of the subprotocols `known` if the client offers any; if none are known,
    /// offers are ignored.
    ///
    /// # Errors
    /// `upgrade_required`, `invalid_request`.
    pub(crate) fn read(head: &Parts, known: &[&'static str]) -> Result<Self> {
        let headers = &head.headers;
        let upgrade = head.method == Method::GET
            && head.version == Version::HTTP_11
            && has_token(headers, header::UPGRADE, "websocket")
            && has_token(headers, header::CONNECTION, "upgrade");
        if !upgrade {
            return Err(Error::new(
                Code::UpgradeRequired,
                "this path is a WebSocket: ask with Upgrade: websocket over HTTP/1.1; POST /v1/rpc takes one request",
            ));
        }
        if headers.get(header::SEC_WEBSOCKET_VERSION).is_none_or(|version| version != "13") {
            return Err(Error::new(Code::UpgradeRequired, "the version of WebSocket spoken here is 13"));
        }
        let Some(key) = headers.get(header::SEC_WEBSOCKET_KEY) else {
            return Err(Error::new(Code::InvalidRequest, "Sec-WebSocket-Key is missing"));
        };
        let mut offered = tokens(headers, header::SEC_WEBSOCKET_PROTOCOL).peekable();
        let any = offered.peek().is_some();
        let protocol = offered.find_map(|offer| known.iter().copied().find(|known| *known == offer));
        if any && protocol.is_none() && !known.is_empty() {
            return Err(Error::new(
                Code::InvalidRequest,
                format!("none of the subprotocols is known here: offer one of {}, or none", known.join(", ")),
            ));
        }
        Ok(Handshake { accept: derive_accept_key(key.as_bytes()), protocol })
    }

    /// The response with status 101, after which `hijack` gets the connection.
    pub(crate) fn response(self, hijack: Hijack) -> Response {
        let mut response = Response::new(Body::empty());
        *response.status_mut() = StatusCode::SWITCHING_PROTOCOLS;
        let headers = response.headers_mut();
        headers.insert(header::CONNECTION, HeaderValue::from_static("Upgrade"));
        headers.insert(header::UPGRADE, HeaderValue::from_static("websocket"));
        if let Ok(accept) = HeaderValue::try_from(self.accept) {
            headers.insert(header::SEC_WEBSOCKET_ACCEPT, accept);
        }
        if let Some(protocol) = self.protocol {
            headers.insert(header::SEC_WEBSOCKET_PROTOCOL, HeaderValue::from_static(protocol));
        }
        response.extensions_mut().insert(hijack);
        response
    }
}

/// The comma-separated elements of a header, from all its lines.
fn tokens(headers: &HeaderMap, name: header::HeaderName) -> impl Iterator<Item = &str> {
    let values = headers.get_all(name).into_iter().filter_map(|value| value.to_str().ok());
    values.flat_map(|value| value.split(',')).map(str::trim).filter(|token| !token.is_empty())
}

fn has_token(headers: &HeaderMap, name: header::HeaderName, wanted: &str) -> bool {
    tokens(headers, name).any(|token| token.eq_ignore_ascii_case(wanted))
}
