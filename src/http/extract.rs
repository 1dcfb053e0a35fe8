//! Extractors of handlers. axum's own extractors are not used, because their errors are not problem documents.

use std::{convert::Infallible, sync::Arc};

use axum::{
    extract::FromRequestParts,
    http::{HeaderMap, request::Parts},
};
use http::{HeaderName, HeaderValue, header};

use crate::{
    auth::Identity,
    error::{Code, Error, Result},
    net::server::Rejected,
    node::Node,
};

pub(crate) use crate::net::body::read_body;

/// The client, or the reason why the request is rejected. `/v1/ws` rejects requests after the upgrade.
#[derive(Debug)]
pub(crate) struct Admitted(pub(crate) Result<Identity>);

impl FromRequestParts<Arc<Node>> for Identity {
    type Rejection = Error;

    /// The endpoint has authenticated the request.
    async fn from_request_parts(head: &mut Parts, _: &Arc<Node>) -> Result<Self> {
        Ok(Identity::of(&head.extensions))
    }
}

impl FromRequestParts<Arc<Node>> for Admitted {
    type Rejection = Infallible;

    async fn from_request_parts(head: &mut Parts, node: &Arc<Node>) -> Result<Self, Infallible> {
        Ok(Admitted(match head.extensions.remove::<Rejected>() {
            Some(Rejected(error)) => Err(error),
            None => Identity::from_request_parts(head, node).await,
        }))
    }
}

/// Rejects the body of a browser's request that is not declared as JSON.
///
/// A browser sends a preflight request only for such a declaration; without it any page could publish with the cookies of
/// its user. The body of other clients is read as JSON whatever its content type, because `curl -d` declares a form.
pub(crate) fn check_declared_json(headers: &HeaderMap) -> Result<()> {
    // Browsers send `Origin` with every POST, but older ones left it out of forms.
    let browser = headers.contains_key(header::ORIGIN)
        || headers.contains_key(header::COOKIE)
        || headers.get("sec-fetch-site").is_some_and(|site| site != "none");
    if !browser {
        return Ok(());
    }
    if is_json(headers) || is_ndjson(headers) {
        return Ok(());
    }
    Err(Error::new(
        Code::UnsupportedMediaType,
        "a request with an Origin or a Cookie must declare its body as application/json or application/x-ndjson",
    ))
}

/// Whether the body is declared as JSON: `application/json` or `application/…+json`. A `charset` has no meaning
/// (RFC 8259, section 11).
pub(crate) fn is_json(headers: &HeaderMap) -> bool {
    media_type(headers).is_some_and(|kind| {
        let kind = kind.to_ascii_lowercase();
        kind == "application/json" || (kind.starts_with("application/") && kind.ends_with("+json"))
    })
}

/// Whether the body is declared as newline-delimited JSON.
pub(crate) fn is_ndjson(headers: &HeaderMap) -> bool {
    media_type(headers).is_some_and(|kind| kind.eq_ignore_ascii_case("application/x-ndjson"))
}

/// `Content-Type` without its parameters.
fn media_type(headers: &HeaderMap) -> Option<&str> {
    Some(headers.get(header::CONTENT_TYPE)?.to_str().ok()?.split(';').next()?.trim())
}

/// The text of a header. A value that is not UTF-8 is an error, because an ignored idempotency key would allow duplicates.
pub(crate) fn header_text<'a>(headers: &'a HeaderMap, name: &HeaderName) -> Result<Option<&'a str>> {
    let read = |value: &'a HeaderValue| std::str::from_utf8(value.as_bytes());
    let mut values = headers.get_all(name).iter();
    let first = values.next();
    if values.any(|value| Some(value) != first) {
        return Err(Error::params(format!("the header {name} has more than one value")));
    }
    first.map(read).transpose().map_err(|_| Error::params(format!("the header {name} is not UTF-8")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn browsers_must_declare_json() {
        let headers = |pairs: &[(&'static str, &'static str)]| {
            pairs
                .iter()
                .map(|(name, value)| (name.parse().unwrap(), HeaderValue::from_static(value)))
                .collect::<HeaderMap>()
        };
        assert!(check_declared_json(&headers(&[("content-type", "text/plain")])).is_ok());
        assert!(check_declared_json(&headers(&[("origin", "null"), ("content-type", "text/plain")])).is_err());
        assert!(check_declared_json(&headers(&[("cookie", "a=1")])).is_err());
        assert!(check_declared_json(&headers(&[("sec-fetch-site", "cross-site")])).is_err());
        assert!(
            check_declared_json(&headers(&[("cookie", "a=1"), ("content-type", "Application/JSON; charset=utf-8")]))
                .is_ok()
        );
        assert!(
            check_declared_json(&headers(&[("origin", "http://a"), ("content-type", "application/x-ndjson")])).is_ok()
        );
    }
}
