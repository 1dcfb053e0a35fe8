//! Cross-origin rules: CORS, and the protection of loopback listeners from web pages.
//!
//! Any page in a browser can send requests to `localhost`, and by DNS rebinding even read the responses under its own host
//! name. On a loopback listener the `Host` must therefore name this machine, and pages of other origins can neither write
//! nor open WebSockets.

use std::net::{IpAddr, Ipv6Addr};

use axum::http::{HeaderMap, HeaderValue, Method, Version, request::Parts};
use http::header;

use crate::{
    error::{Code, Error, Result},
    pattern::Pattern,
};

const ALLOW_HEADERS: HeaderValue =
    HeaderValue::from_static("Authorization, Content-Type, Last-Event-ID, Idempotency-Key, traceparent");
const EXPOSE_HEADERS: HeaderValue = HeaderValue::from_static("Retry-After, traceparent");
const MAX_AGE: HeaderValue = HeaderValue::from_static("600");

/// The cross-origin rules of one listener.
#[derive(Clone, Debug)]
pub(crate) struct OriginPolicy {
    /// The listener has a loopback address.
    pub(crate) loopback: bool,
    /// Clients need no credentials. Then a loopback listener also allows the pages of this machine.
    pub(crate) anonymous: bool,
    /// `cors.origins`, besides the same origin.
    pub(crate) allowed: Vec<Pattern>,
}

/// The web page that a request comes from.
#[derive(Debug)]
pub(crate) enum RequestOrigin {
    /// No `Origin`: not a page, or a navigation.
    None,
    /// A page that may read the response; the value is its origin.
    Allowed(HeaderValue),
    /// A page that may not.
    Denied,
}

impl OriginPolicy {
    /// Rejects requests to a loopback listener whose `Host` does not name this machine (DNS rebinding).
    pub(crate) fn check_host(&self, head: &Parts) -> Result<()> {
        let host = match (head.uri.authority(), head.headers.get(header::HOST)) {
            (Some(authority), _) => authority.as_str(),
            (None, Some(host)) => host.to_str().unwrap_or_default(),
            // HTTP/1.0, which no browser uses.
            (None, None) if head.version < Version::HTTP_11 => return Ok(()),
            (None, None) => return Err(Error::new(Code::InvalidRequest, "an HTTP/1.1 request must have a Host")),
        };
        if !self.loopback {
            return Ok(());
        }
        // A fast path for the usual names.
        let usual = host.strip_prefix("127.0.0.1").or_else(|| host.strip_prefix("localhost"));
        if usual.is_some_and(|rest| rest.is_empty() || rest.starts_with(':')) || is_this_machine(without_port(host)) {
            return Ok(());
        }
        Err(Error::new(
            Code::Forbidden,
            "this listener serves this machine only: use the host localhost or 127.0.0.1, \
             or listen on another address (server.listen)",
        )
        .with("permission", "host"))
    }

    /// Determines the origin of a request.
    pub(crate) fn classify(&self, head: &Parts) -> RequestOrigin {
        let Some(value) = head.headers.get(header::ORIGIN) else {
            // Requests for images, links and frames have no Origin.
            let site = head.headers.get("sec-fetch-site");
            return if site.is_some_and(|site| site == "cross-site") {
                RequestOrigin::Denied
            } else {
                RequestOrigin::None
            };
        };
        let Ok(origin) = value.to_str() else { return RequestOrigin::Denied };
        // The origin of every sandboxed frame, local file and redirect.
        if origin == "null" {
            return RequestOrigin::Denied;
        }
        let host = head.uri.authority().map(|host| host.as_str());
        let host = host.or_else(|| head.headers.get(header::HOST)?.to_str().ok());
        let same = host.is_some_and(|host| is_same(origin, host));
        let this_machine = self.loopback
            && self.anonymous
            && origin
                .strip_prefix("http://")
                .is_some_and(|host| matches!(without_port(host), "localhost" | "127.0.0.1"));
        if same || this_machine || self.allowed.iter().any(|pattern| pattern.matches(origin)) {
            RequestOrigin::Allowed(value.clone())
        } else {
            RequestOrigin::Denied
        }
    }

    /// Rejects requests of denied pages to a loopback listener that write, move the cursor of a consumer, or open a WebSocket
    /// (which CORS does not cover).
    pub(crate) fn check_origin(&self, head: &Parts, origin: &RequestOrigin) -> Result<()> {
        let writes = match head.method {
            Method::HEAD | Method::OPTIONS => false,
            Method::GET => head.uri.query().is_some_and(|query| query.contains("consumer=")),
            _ => true,
        };
        let socket = head.headers.get(header::UPGRADE).is_some();
        match origin {
            RequestOrigin::Denied if self.loopback && (writes || socket) => Err(Error::new(
                Code::Forbidden,
                "pages of this origin are not permitted to do this: add the origin to cors.origins",
            )
            .with("permission", "origin")),
            _ => Ok(()),
        }
    }
}

impl RequestOrigin {
    /// Adds the CORS headers of a response.
    pub(crate) fn mark(self, headers: &mut HeaderMap) {
        headers.append(header::VARY, HeaderValue::from_static("Origin"));
        if let RequestOrigin::Allowed(origin) = self {
            headers.insert(header::ACCESS_CONTROL_ALLOW_ORIGIN, origin);
            headers.insert(header::ACCESS_CONTROL_EXPOSE_HEADERS, EXPOSE_HEADERS);
        }
    }

    /// Adds the CORS headers of a preflight response. `allow` is the `Allow` of the route.
    pub(crate) fn preflight(&self, request: &HeaderMap, allow: HeaderValue, headers: &mut HeaderMap) {
        if matches!(self, RequestOrigin::Allowed(_)) && request.contains_key(header::ACCESS_CONTROL_REQUEST_METHOD) {
            headers.insert(header::ACCESS_CONTROL_ALLOW_METHODS, allow);
            headers.insert(header::ACCESS_CONTROL_ALLOW_HEADERS, ALLOW_HEADERS);
            headers.insert(header::ACCESS_CONTROL_MAX_AGE, MAX_AGE);
        }
    }
}

/// Whether `origin` (`scheme://host[:port]`) has the host `host[:port]`. The schemes are not compared, because a proxy can
/// terminate TLS.
fn is_same(origin: &str, host: &str) -> bool {
    let Some((scheme, from)) = origin.split_once("://") else { return false };
    let standard = match scheme {
        "http" => ":80",
        "https" => ":443",
        _ => return false,
    };
    let plain = |host: &str| host.strip_suffix(standard).unwrap_or(host).to_ascii_lowercase();
    plain(from) == plain(host)
}

fn without_port(host: &str) -> &str {
    if host.starts_with('[') {
        return host.split_inclusive(']').next().unwrap_or(host);
    }
    host.split(':').next().unwrap_or(host)
}

fn is_this_machine(host: &str) -> bool {
    let host = host.strip_suffix('.').unwrap_or(host);
    if host.eq_ignore_ascii_case("localhost") || host.to_ascii_lowercase().ends_with(".localhost") {
        return true;
    }
    let address = match host.strip_prefix('[').and_then(|host| host.strip_suffix(']')) {
        Some(host) => host.parse::<Ipv6Addr>().map(IpAddr::V6),
        None => host.parse(),
    };
    address.is_ok_and(|address| address.is_loopback())
}

#[cfg(test)]
mod tests {
    use super::*;
    use axum::http::Request;

    fn head(method: &str, headers: &[(&str, &str)]) -> Parts {
        let request =
            headers.iter().fold(Request::builder().method(method).uri("/v1/events"), |request, (name, value)| {
                request.header(*name, *value)
            });
        request.body(()).unwrap().into_parts().0
    }

    fn origins() -> OriginPolicy {
        OriginPolicy { loopback: true, anonymous: true, allowed: vec![] }
    }

    #[test]
    fn hosts_of_this_machine_are_recognized() {
        for host in
            ["localhost:8000", "LOCALHOST", "a.localhost:1", "127.0.0.1:8000", "127.8.8.8", "[::1]:8000", "[::1]"]
        {
            assert!(origins().check_host(&head("GET", &[("host", host)])).is_ok(), "{host}");
        }
        for host in ["evil.example", "localhost.evil.example", "10.0.0.1", "", "[::2]:1", "127.0.0.1.evil.example"] {
            assert!(origins().check_host(&head("GET", &[("host", host)])).is_err(), "{host}");
        }
        let open = OriginPolicy { loopback: false, ..origins() };
        assert!(open.check_host(&head("GET", &[("host", "weir.example")])).is_ok());
    }

    #[test]
    fn allowed_origins_are_recognized() {
        let allowed = |origins: &OriginPolicy, origin: &str, host: &str| {
            matches!(origins.classify(&head("GET", &[("host", host), ("origin", origin)])), RequestOrigin::Allowed(_))
        };
        assert!(allowed(&origins(), "http://localhost:3000", "localhost:8000"));
        assert!(allowed(&origins(), "http://127.0.0.1", "localhost:8000"));
        assert!(!allowed(&origins(), "http://localhost.evil.example", "localhost:8000"));
        assert!(!allowed(&origins(), "https://evil.example", "localhost:8000"));
        assert!(!allowed(&origins(), "null", "localhost:8000"));
        let open =
            OriginPolicy { loopback: false, anonymous: true, allowed: vec![Pattern::new("https://*.shop.example")] };
        assert!(!allowed(&open, "http://localhost:3000", "weir.example"));
        assert!(!allowed(&open, "null", "weir.example"));
        assert!(allowed(&open, "https://weir.example", "weir.example"));
        assert!(allowed(&open, "https://weir.example", "Weir.example:443"));
        assert!(!allowed(&open, "https://weir.example:444", "weir.example"));
        assert!(allowed(&open, "https://www.shop.example", "weir.example"));
    }

    #[test]
    fn denied_pages_cannot_write() {
        let check = |method, headers: &[(&str, &str)]| {
            let head = head(method, headers);
            origins().check_origin(&head, &origins().classify(&head)).is_ok()
        };
        let denied = ("origin", "https://evil.example");
        assert!(check("GET", &[denied]));
        assert!(!check("POST", &[denied]));
        assert!(!check("DELETE", &[denied]));
        assert!(!check("GET", &[denied, ("upgrade", "websocket")]));
        assert!(check("POST", &[]));
        let image = ("sec-fetch-site", "cross-site");
        assert!(check("GET", &[image]));
        assert!(!check("POST", &[image]));
        assert!(check("POST", &[("sec-fetch-site", "same-origin")]));
        assert!(check("POST", &[("origin", "http://localhost:5173")]));
        let poll = |site| {
            let request = Request::get("/v1/events?channel=a&consumer=n&commit=auto").header("sec-fetch-site", site);
            request.body(()).unwrap().into_parts().0
        };
        let allowed = |head: Parts| origins().check_origin(&head, &origins().classify(&head));
        assert!(allowed(poll("cross-site")).is_err());
        assert!(allowed(poll("same-site")).is_ok());
    }
}
