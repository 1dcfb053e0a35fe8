//! Publishing: `POST /publish/` on a separate listener, or `/grip/publish/` on the main ones. The texts are Pushpin's.

use std::sync::Arc;

use axum::body::Body as AxumBody;
use base64::{
    Engine,
    engine::general_purpose::{STANDARD as BASE64, URL_SAFE_NO_PAD as BASE64URL},
};
use http::{HeaderMap, HeaderName, HeaderValue, Method, Request, Response, StatusCode, header};
use http_body_util::{BodyExt as _, LengthLimitError, Limited};
use sha2::{Digest as _, Sha256};

use super::{
    item::{self, PublishItem},
    item_event,
    proxy::GripProxy,
    response::text_response,
    route::OriginRoute,
    waiting_items::AcceptedItem,
};
use crate::{
    channel::{Channel, MAX_LABEL},
    error::{Code, Error},
    json::without_bom,
    transport::accept,
};

/// The media type of a success response.
#[derive(Clone, Copy)]
enum AckFormat {
    Text,
    Json,
}

/// An error response to a publisher.
struct PublishError {
    status: StatusCode,
    text: String,
    header: Option<(HeaderName, HeaderValue)>,
}

impl GripProxy {
    /// Answers a request to the publish listener.
    pub(super) async fn publish(self: &Arc<Self>, request: Request<AxumBody>) -> Response<AxumBody> {
        let path = request.uri().path();
        let path = path.strip_suffix('/').unwrap_or(path);
        match path.strip_prefix("/grip").unwrap_or(path) {
            "/publish" => {}
            "" => return text_response(StatusCode::OK, "Pushpin API\n"),
            _ => return text_response(StatusCode::NOT_FOUND, "Not Found\n"),
        }
        let Some(format) = AckFormat::of(request.headers()) else {
            let text = "Not Acceptable. Supported formats are text/plain and application/json.\n";
            return text_response(StatusCode::NOT_ACCEPTABLE, text);
        };
        if *request.method() != Method::POST {
            let text = format!("Method not allowed: {}.\n", request.method());
            let error = PublishError::new(StatusCode::METHOD_NOT_ALLOWED, text);
            return error.with(header::ALLOW, HeaderValue::from_static("POST")).respond();
        }
        match self.try_publish(request).await {
            Ok(()) => format.published(),
            Err(error) => error.respond(),
        }
    }

    async fn try_publish(self: &Arc<Self>, request: Request<AxumBody>) -> Result<(), PublishError> {
        let (head, body) = request.into_parts();
        let allowed = self.authorized(&head.headers)?;
        let limits = &self.node.config.limits;
        let collecting = Limited::new(body, limits.publish_bytes).collect();
        let body = match tokio::time::timeout(limits.body_time, collecting).await {
            Ok(Ok(body)) => body.to_bytes(),
            Ok(Err(error)) if error.is::<LengthLimitError>() => {
                let text = format!("Body has more than {} bytes (limits.publish_bytes).\n", limits.publish_bytes);
                return Err(PublishError::new(StatusCode::PAYLOAD_TOO_LARGE, text));
            }
            Ok(Err(_)) => return Err(PublishError::new(StatusCode::BAD_REQUEST, "Body ended early.\n")),
            Err(_) => return Err(PublishError::new(StatusCode::REQUEST_TIMEOUT, "Body did not arrive in time.\n")),
        };
        let items = item::read(without_bom(&body)).map_err(|text| PublishError::new(StatusCode::BAD_REQUEST, text))?;
        // All items are validated before the first is stored.
        let accepted: Result<Vec<_>, Error> =
            items.into_iter().filter_map(|item| self.accept(&allowed, item).transpose()).collect();
        let accepted = accepted.map_err(|error| rejected(&error))?;
        self.store_all(accepted).await.map_err(|error| rejected(&error))
    }

    /// `None` for an item without a supported format.
    fn accept(&self, allowed: &[&OriginRoute], item: PublishItem) -> Result<Option<AcceptedItem>, Error> {
        let channel = Channel::parse(&full_name(allowed, &item.channel))?;
        channel.writable()?;
        // An id becomes an idempotency key, but may be longer than one.
        let key = item.id.as_deref().filter(|id| !id.is_empty());
        let key = key.map(|id| match id.len() <= MAX_LABEL && !id.contains(char::is_control) {
            true => id.to_owned(),
            false => format!("sha256:{}", BASE64URL.encode(Sha256::digest(id))),
        });
        let draft = item_event::draft(&item, key.as_deref(), self.node.config.limits.event)?;
        let prev_id = item.prev_id.filter(|_| !item.unordered);
        Ok(draft.map(|draft| AcceptedItem { channel, id: item.id.filter(|id| !id.is_empty()), prev_id, draft }))
    }

    /// The routes whose keys a request has.
    fn authorized(&self, headers: &HeaderMap) -> Result<Vec<&OriginRoute>, PublishError> {
        if self.routes.iter().all(|route| route.publish_key.is_none()) {
            if self.node.auth.is_on() {
                let text = "Publishing needs the key of a route: set it in compat.grip.routes.\n";
                return Err(PublishError::new(StatusCode::FORBIDDEN, text));
            }
            // Otherwise any web page that a user on this network visits could publish.
            return match headers.contains_key(header::ORIGIN) {
                true => Err(PublishError::new(StatusCode::FORBIDDEN, "Pages may not publish without a key.\n")),
                false => Ok(self.routes.iter().collect()),
            };
        }
        let header = headers.get(header::AUTHORIZATION).and_then(|value| value.to_str().ok()).unwrap_or_default();
        let (scheme, credentials) = header.split_once(' ').unwrap_or((header, ""));
        let credentials = credentials.trim();
        let mut reason = "no route has this key";
        let mut authenticates = |route: &&OriginRoute| {
            let Some(key) = &route.publish_key else { return false };
            match scheme.to_ascii_lowercase().as_str() {
                "bearer" if key.matches(credentials.as_bytes()) => true,
                "bearer" => match route.signer.verify(credentials, route.publish_iss.as_deref()) {
                    Ok(()) => true,
                    Err(error) => {
                        reason = error;
                        false
                    }
                },
                "basic" => BASE64.decode(credentials).is_ok_and(|pair| {
                    let colon = memchr::memchr(b':', &pair);
                    colon.is_some_and(|colon| key.matches(&pair[colon + 1..]))
                }),
                _ => {
                    reason = "publishing asks for a key";
                    false
                }
            }
        };
        let allowed: Vec<_> = self.routes.iter().filter(|route| authenticates(route)).collect();
        if allowed.is_empty() {
            let error = PublishError::new(StatusCode::UNAUTHORIZED, format!("Unauthorized: {reason}.\n"));
            return Err(error.with(header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer")));
        }
        Ok(allowed)
    }
}

/// The full name of a channel: the prefix of the publisher's route is prepended, as in holds, unless the name already has
/// it. If the publisher may belong to several routes, the name is taken as the full name.
fn full_name(allowed: &[&OriginRoute], name: &str) -> String {
    let prefixed = allowed.iter().any(|route| !route.prefix.is_empty() && name.starts_with(&route.prefix));
    match allowed {
        [route] if !prefixed => format!("{}{name}", route.prefix),
        _ => name.to_owned(),
    }
}

/// The error response for an item that cannot be stored.
fn rejected(error: &Error) -> PublishError {
    let status = match error.code() {
        Code::InvalidParams | Code::InvalidRequest => StatusCode::BAD_REQUEST,
        code => StatusCode::from_u16(code.status()).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR),
    };
    let what = if status == StatusCode::BAD_REQUEST { "Invalid format" } else { "Not published" };
    let response = PublishError::new(status, format!("{what}: {}\n", error.detail()));
    match error.retry_after_ms() {
        Some(ms) => response.with(header::RETRY_AFTER, HeaderValue::from(ms.div_ceil(1_000).max(1))),
        None => response,
    }
}

impl PublishError {
    fn new(status: StatusCode, text: impl Into<String>) -> Self {
        PublishError { status, text: text.into(), header: None }
    }

    fn with(self, name: HeaderName, value: HeaderValue) -> Self {
        PublishError { header: Some((name, value)), ..self }
    }

    fn respond(self) -> Response<AxumBody> {
        let mut response = text_response(self.status, self.text);
        response.headers_mut().extend(self.header);
        response
    }
}

impl AckFormat {
    /// The first acceptable format of `Accept`, if any.
    fn of(headers: &HeaderMap) -> Option<Self> {
        let mut ranges = accept::ranges(headers).peekable();
        if ranges.peek().is_none() {
            return Some(AckFormat::Text);
        }
        // The first of those with the highest quality.
        let formats = ranges.filter_map(|(kind, quality)| match &*kind {
            "text/plain" | "text/*" | "*/*" => Some((quality, AckFormat::Text)),
            "application/json" | "application/*" => Some((quality, AckFormat::Json)),
            _ => None,
        });
        let best =
            formats.filter(|(quality, _)| *quality > 0).reduce(|best, next| if next.0 > best.0 { next } else { best });
        best.map(|(_, format)| format)
    }

    fn published(self) -> Response<AxumBody> {
        match self {
            AckFormat::Text => text_response(StatusCode::OK, "Published\n"),
            AckFormat::Json => {
                let mut response = text_response(StatusCode::OK, "{\"message\":\"Published\"}\n");
                response.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
                response
            }
        }
    }
}
