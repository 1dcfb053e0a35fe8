//! What handlers ask a request for. Every refusal is a problem document, so axum's own extractors are not used.

use std::{convert::Infallible, sync::Arc, time::Duration};

use axum::{
    body::{Body, Bytes},
    extract::FromRequestParts,
    http::{HeaderMap, request::Parts},
};
use http::{HeaderName, HeaderValue, header};
use http_body_util::BodyExt;

use super::Gateway;
use crate::{
    auth::Identity,
    duration,
    error::{Code, Error, Result},
};

/// Why a request must not go on, for the one route that tells browsers so in its own way: a refused WebSocket upgrade
/// is completed and closed with the code, for a failed one says nothing to them.
#[derive(Clone, Debug)]
pub struct Refused(pub Error);

/// Who asks, or why they may not: for `/v1/ws`.
#[derive(Debug)]
pub struct Admitted(pub Result<Identity>);

impl FromRequestParts<Arc<Gateway>> for Identity {
    type Rejection = Error;

    async fn from_request_parts(_: &mut Parts, _: &Arc<Gateway>) -> Result<Self> {
        Ok(Identity::anonymous())
    }
}

impl FromRequestParts<Arc<Gateway>> for Admitted {
    type Rejection = Infallible;

    async fn from_request_parts(head: &mut Parts, gateway: &Arc<Gateway>) -> Result<Self, Infallible> {
        Ok(Admitted(match head.extensions.remove::<Refused>() {
            Some(Refused(error)) => Err(error),
            None => Identity::from_request_parts(head, gateway).await,
        }))
    }
}

/// Refuses a browser's body that is not declared JSON.
///
/// Only such a declaration makes a browser ask first (a preflight): without it any page could post, with the cookies
/// of whoever looks at it. Everyone else's body is read as JSON whatever it is called, for `curl -d` calls it a form.
pub fn declared(headers: &HeaderMap) -> Result<()> {
    if !headers.contains_key(header::ORIGIN) && !headers.contains_key(header::COOKIE) {
        return Ok(());
    }
    if is_json(headers) || is_ndjson(headers) {
        return Ok(());
    }
    Err(Error::new(
        Code::UnsupportedMediaType,
        "a request with an Origin or a Cookie declares its body as application/json or application/x-ndjson",
    ))
}

fn is_json(headers: &HeaderMap) -> bool {
    media_type(headers).is_some_and(|kind| kind.eq_ignore_ascii_case("application/json"))
}

/// Whether the body is declared as lines of JSON.
pub fn is_ndjson(headers: &HeaderMap) -> bool {
    media_type(headers).is_some_and(|kind| kind.eq_ignore_ascii_case("application/x-ndjson"))
}

/// `Content-Type` without its parameters.
fn media_type(headers: &HeaderMap) -> Option<&str> {
    Some(headers.get(header::CONTENT_TYPE)?.to_str().ok()?.split(';').next()?.trim())
}

/// The whole body, at most `limit` bytes (`name` is what the limit is called), if it arrives within `time`.
pub async fn read_body(body: Body, limit: usize, name: &'static str, time: Duration) -> Result<Bytes> {
    // The timer costs nothing where the body came with the head: it is registered when it is first waited for.
    tokio::time::timeout(time, collect(body, limit, name)).await.unwrap_or_else(|_| {
        let time = duration::format(time);
        Err(Error::new(Code::InvalidRequest, format!("the body did not arrive within {time} (limits.body_time)")))
    })
}

async fn collect(mut body: Body, limit: usize, name: &'static str) -> Result<Bytes> {
    let too_large =
        || Error::new(Code::TooLarge, format!("the body has more than {limit} bytes ({name})")).with("limit", name);
    // Before the first byte is taken: a client that declares too much is not read to the limit.
    if http_body::Body::size_hint(&body).lower() > limit as u64 {
        return Err(too_large());
    }
    let mut first = Bytes::new();
    let mut rest: Vec<u8> = Vec::new();
    while let Some(frame) = body.frame().await {
        let frame = frame.map_err(|_| Error::new(Code::InvalidRequest, "the body ended early"))?;
        let Ok(data) = frame.into_data() else { continue };
        if first.len() + rest.len() + data.len() > limit {
            return Err(too_large());
        }
        if first.is_empty() {
            first = data;
        } else {
            rest.extend_from_slice(&data);
        }
    }
    if rest.is_empty() {
        return Ok(first);
    }
    // Several frames: `rest` grew by doubling, so one more copy of the first frame is no worse.
    rest.splice(..0, first.iter().copied());
    Ok(rest.into())
}

/// One header's text. What is not text is refused: a key that is overlooked would place an event twice.
pub fn text<'a>(headers: &'a HeaderMap, name: &HeaderName) -> Result<Option<&'a str>> {
    let read = |value: &'a HeaderValue| std::str::from_utf8(value.as_bytes());
    headers.get(name).map(read).transpose().map_err(|_| Error::params(format!("the header {name} is not UTF-8")))
}

#[cfg(test)]
mod tests {
    use super::*;
    use futures_util::stream;

    async fn body(frames: &[&'static str], limit: usize) -> Result<Bytes> {
        let frames: Vec<_> =
            frames.iter().map(|frame| Ok::<_, Infallible>(Bytes::from_static(frame.as_bytes()))).collect();
        read_body(Body::from_stream(stream::iter(frames)), limit, "limits.x", Duration::MAX).await
    }

    #[tokio::test]
    async fn bodies_in_one_piece_and_in_many() {
        assert_eq!(body(&[], 10).await.unwrap(), "");
        assert_eq!(body(&["abc"], 10).await.unwrap(), "abc");
        assert_eq!(body(&["abc", "d", "efgh"], 8).await.unwrap(), "abcdefgh");
        assert_eq!(body(&["abc", "d", "efgh"], 7).await.unwrap_err().code(), Code::TooLarge);
        assert_eq!(
            read_body(Body::from("abc"), 2, "limits.x", Duration::MAX).await.unwrap_err().code(),
            Code::TooLarge
        );
    }

    #[test]
    fn browsers_declare_their_json() {
        let headers = |pairs: &[(&'static str, &'static str)]| {
            pairs
                .iter()
                .map(|(name, value)| (name.parse().unwrap(), HeaderValue::from_static(value)))
                .collect::<HeaderMap>()
        };
        assert!(declared(&headers(&[("content-type", "text/plain")])).is_ok());
        assert!(declared(&headers(&[("origin", "null"), ("content-type", "text/plain")])).is_err());
        assert!(declared(&headers(&[("cookie", "a=1")])).is_err());
        assert!(declared(&headers(&[("cookie", "a=1"), ("content-type", "Application/JSON; charset=utf-8")])).is_ok());
        assert!(declared(&headers(&[("origin", "http://a"), ("content-type", "application/x-ndjson")])).is_ok());
    }
}
