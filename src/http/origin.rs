//! Cross-origin rules: CORS, and the protection of loopback listeners from web pages.
//!
//! Any page in a browser can send requests to `localhost`, and by DNS rebinding even read the responses under its own host
//! name. On a loopback listener the `Host` must therefore name this machine, and pages of other origins can neither write
//! nor open WebSockets.

use std::{
    collections::HashSet,
    net::{IpAddr, Ipv6Addr},
};

use axum::http::{HeaderMap, HeaderValue, Method, Version, request::Parts};
use http::{HeaderName, header};
use parking_lot::Mutex;

use crate::{
    auth::foreign_page,
    error::{Code, Error, Result},
    pattern::Pattern,
};

const EXPOSE_HEADERS: HeaderValue = HeaderValue::from_static("Retry-After, traceparent");
const MAX_AGE: HeaderValue = HeaderValue::from_static("600");
const PREFLIGHT_VARY: HeaderValue =
    HeaderValue::from_static("Access-Control-Request-Method, Access-Control-Request-Headers");
static REQUEST_PRIVATE_NETWORK: HeaderName = HeaderName::from_static("access-control-request-private-network");
static ALLOW_PRIVATE_NETWORK: HeaderName = HeaderName::from_static("access-control-allow-private-network");

/// The cross-origin rules of one listener.
#[derive(Debug)]
pub(crate) struct OriginPolicy {
    /// The listener has a loopback address.
    loopback: bool,
    /// Clients need no credentials. Then a loopback listener also allows the pages of this machine.
    anonymous: bool,
    /// `cors.origins`, besides the same origin.
    allowed: Vec<Pattern>,
    /// `server.hosts`, besides the names of this machine.
    hosts: Vec<Pattern>,
    denied_origins: LogOnce,
    rejected_hosts: LogOnce,
}

/// Marks a request of a page that may only read.
#[derive(Clone, Copy)]
pub(crate) struct ForeignPage;

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

/// The values that a rejection has been logged for. Clients choose them, so their number and size are bounded.
#[derive(Debug, Default)]
struct LogOnce(Mutex<HashSet<Box<str>>>);

impl OriginPolicy {
    /// `loopback`: only this machine can reach the listener. `origins` are patterns of `cors.origins`, `hosts` those of
    /// `server.hosts`.
    pub(crate) fn new(loopback: bool, anonymous: bool, origins: &[String], hosts: &[String]) -> Self {
        let patterns = |texts: &[String]| {
            // An empty pattern would match an empty header.
            texts.iter().filter(|text| !text.is_empty()).map(|text| Pattern::new(text)).collect()
        };
        OriginPolicy {
            loopback,
            anonymous,
            allowed: patterns(origins),
            hosts: patterns(hosts),
            denied_origins: LogOnce::default(),
            rejected_hosts: LogOnce::default(),
        }
    }

    pub(crate) fn is_loopback(&self) -> bool {
        self.loopback
    }

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
        let name = without_port(host).to_ascii_lowercase();
        if self.hosts.iter().any(|pattern| pattern.matches(&name)) {
            return Ok(());
        }
        if self.rejected_hosts.is_first(host) {
            tracing::warn!(
                %host,
                "rejected a request: its Host does not name this machine, and the listener is on a loopback address. \
                 Behind a proxy, add the name to server.hosts or let the proxy send Host: localhost"
            );
        }
        Err(Error::new(
            Code::Forbidden,
            "the Host header does not name this machine, which is all that a listener on a loopback address serves: \
             use the host localhost or 127.0.0.1; behind a proxy, add the name to server.hosts or let the proxy send \
             Host: localhost; for clients on other machines, listen on another address (server.listen)",
        )
        .with("permission", "host"))
    }

    /// Determines the origin of a request.
    pub(crate) fn classify(&self, head: &Parts) -> RequestOrigin {
        let site = head.headers.get("sec-fetch-site");
        let Some(value) = head.headers.get(header::ORIGIN) else {
            // Requests for images, links and frames have no Origin.
            return if site.is_some_and(|site| site == "cross-site") {
                RequestOrigin::Denied
            } else {
                RequestOrigin::None
            };
        };
        let Ok(origin) = value.to_str() else { return RequestOrigin::Denied };
        // The origin of every sandboxed frame, local file and redirect.
        if origin == "null" {
            if self.denied_origins.is_first(origin) {
                tracing::warn!(
                    "restricted a page of the origin null (a file or a sandboxed frame), which is never allowed"
                );
            }
            return RequestOrigin::Denied;
        }
        let host = head.uri.authority().map(|host| host.as_str());
        let host = host.or_else(|| head.headers.get(header::HOST)?.to_str().ok());
        // No page can forge `Sec-Fetch-Site`. It also holds behind a proxy that changes the Host.
        let same = site.is_some_and(|site| site == "same-origin") || host.is_some_and(|host| is_same(origin, host));
        let this_machine = self.loopback
            && self.anonymous
            && origin
                .strip_prefix("http://")
                .is_some_and(|host| matches!(without_port(host), "localhost" | "127.0.0.1"));
        if same || this_machine || self.allowed.iter().any(|pattern| pattern.matches(origin)) {
            return RequestOrigin::Allowed(value.clone());
        }
        if self.denied_origins.is_first(origin) {
            tracing::warn!(%origin, "restricted a page of an origin that is not allowed: to allow it, add it to cors.origins");
        }
        RequestOrigin::Denied
    }

    /// Applies the rules for pages of denied origins. On a loopback listener they can neither write nor open a WebSocket
    /// (which CORS does not cover). `cors`: weir's CORS rules apply to the path, rather than those of an adapter, which
    /// allow every origin.
    ///
    /// A browser sends a `GET` without a preflight, so such a page gets an identity that may only read: the handler that
    /// has decoded the request decides whether it changes something.
    pub(crate) fn check_origin(&self, head: &mut Parts, origin: &RequestOrigin, cors: bool) -> Result<()> {
        if !matches!(origin, RequestOrigin::Denied) {
            return Ok(());
        }
        let reads = matches!(head.method, Method::GET | Method::HEAD | Method::OPTIONS);
        let socket = head.headers.contains_key(header::UPGRADE);
        if self.loopback && (!reads || socket) {
            return Err(foreign_page());
        }
        if reads && !socket && (self.loopback || cors) {
            head.extensions.insert(ForeignPage);
        }
        Ok(())
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

    /// Adds the CORS headers of a preflight response. `allow` is the `Allow` of the route. All headers that the page asks
    /// for are allowed: tracing and client libraries add their own, and none gives a page more rights.
    pub(crate) fn preflight(&self, request: &HeaderMap, allow: HeaderValue, headers: &mut HeaderMap) {
        if !request.contains_key(header::ACCESS_CONTROL_REQUEST_METHOD) {
            return;
        }
        headers.append(header::VARY, PREFLIGHT_VARY);
        if !matches!(self, RequestOrigin::Allowed(_)) {
            return;
        }
        headers.insert(header::ACCESS_CONTROL_ALLOW_METHODS, allow);
        for requested in request.get_all(header::ACCESS_CONTROL_REQUEST_HEADERS) {
            headers.append(header::ACCESS_CONTROL_ALLOW_HEADERS, requested.clone());
        }
        headers.insert(header::ACCESS_CONTROL_MAX_AGE, MAX_AGE);
        // A page of a public address asks for the permission to use a server on this machine or network.
        if request.get(&REQUEST_PRIVATE_NETWORK).is_some_and(|value| value == "true") {
            headers.insert(ALLOW_PRIVATE_NETWORK.clone(), HeaderValue::from_static("true"));
        }
    }
}

impl LogOnce {
    const MAX_VALUES: usize = 100;
    const MAX_LENGTH: usize = 256;

    /// Whether `value` is to be logged, because it has not been yet.
    fn is_first(&self, value: &str) -> bool {
        let mut logged = self.0.lock();
        value.len() <= Self::MAX_LENGTH && logged.len() < Self::MAX_VALUES && logged.insert(value.into())
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
        OriginPolicy::new(true, true, &[], &[])
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
        let open = OriginPolicy::new(false, true, &[], &[]);
        assert!(open.check_host(&head("GET", &[("host", "weir.example")])).is_ok());
        let named =
            OriginPolicy::new(true, true, &[], &["weir.example".into(), "*.weir.example".into(), String::new()]);
        for (host, accepted) in [
            ("weir.example", true),
            ("Weir.Example:8443", true),
            ("eu.weir.example", true),
            ("localhost", true),
            ("weir.example.evil", false),
            ("", false),
        ] {
            assert_eq!(named.check_host(&head("GET", &[("host", host)])).is_ok(), accepted, "{host}");
        }
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
        let open = OriginPolicy::new(false, true, &["https://*.shop.example".into()], &[]);
        assert!(!allowed(&open, "http://localhost:3000", "weir.example"));
        assert!(!allowed(&open, "null", "weir.example"));
        assert!(allowed(&open, "https://weir.example", "weir.example"));
        assert!(allowed(&open, "https://weir.example", "Weir.example:443"));
        assert!(!allowed(&open, "https://weir.example:444", "weir.example"));
        assert!(allowed(&open, "https://www.shop.example", "weir.example"));
    }

    #[test]
    fn denied_pages_cannot_write() {
        let check = |policy: &OriginPolicy, method, headers: &[(&str, &str)]| {
            let mut head = head(method, headers);
            let origin = policy.classify(&head);
            policy.check_origin(&mut head, &origin, true).map(|()| head.extensions.get::<ForeignPage>().is_none())
        };
        let (local, public) = (origins(), OriginPolicy::new(false, true, &[], &[]));
        let page = ("origin", "https://evil.example");
        let image = ("sec-fetch-site", "cross-site");
        for denied in [page, image, ("origin", "null")] {
            for method in ["GET", "HEAD"] {
                assert!(!check(&local, method, &[denied]).unwrap(), "{method} {denied:?}");
                assert!(!check(&public, method, &[denied]).unwrap(), "{method} {denied:?}");
            }
            for method in ["POST", "DELETE", "PUT"] {
                assert!(check(&local, method, &[denied]).is_err(), "{method} {denied:?}");
                // Browsers ask before they send these.
                assert!(check(&public, method, &[denied]).unwrap(), "{method} {denied:?}");
            }
            assert!(check(&local, "GET", &[denied, ("upgrade", "websocket")]).is_err());
            assert!(check(&public, "GET", &[denied, ("upgrade", "websocket")]).unwrap());
        }
        for allowed in [
            &[][..],
            &[("sec-fetch-site", "same-origin")],
            &[("sec-fetch-site", "same-site")],
            &[("origin", "http://localhost:5173")],
            &[("origin", "https://weir.example"), ("sec-fetch-site", "same-origin")],
        ] {
            for method in ["GET", "POST"] {
                assert!(check(&local, method, allowed).unwrap(), "{method} {allowed:?}");
            }
        }
    }

    #[test]
    fn a_value_is_logged_once() {
        let once = LogOnce::default();
        assert!(once.is_first("a") && !once.is_first("a") && once.is_first("b"));
        assert!(!once.is_first(&"x".repeat(10_000)));
        assert_eq!((0..1_000).filter(|n| once.is_first(&n.to_string())).count(), LogOnce::MAX_VALUES - 2);
    }
}
