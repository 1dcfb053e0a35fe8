//! Which web pages may talk to weir: CORS, and the checks that keep other people's pages off a developer's machine.
//!
//! Any page in a browser can send requests to `localhost`, and by DNS rebinding even read the answers under a name of
//! its own. Hence on loopback the `Host` must be the machine itself, and pages from elsewhere may neither write nor
//! open sockets.

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

/// What one listener thinks of pages.
#[derive(Clone, Debug)]
pub struct Origins {
    /// Every address of the listener is of this machine.
    pub loopback: bool,
    /// Everyone is served: then pages of this machine are, if it is also `loopback`.
    pub anonymous: bool,
    /// `cors.origins`, besides the same origin.
    pub allowed: Vec<Pattern>,
}

/// What is known of the page behind one request.
#[derive(Debug)]
pub enum Page {
    /// No `Origin`: no page, or a navigation.
    None,
    /// May see the answer.
    Friend(HeaderValue),
    /// May not.
    Stranger,
}

impl Origins {
    /// Refuses requests that reached this machine under a name that is not its own.
    pub fn check_host(&self, head: &Parts) -> Result<()> {
        let host = match (head.uri.authority(), head.headers.get(header::HOST)) {
            (Some(authority), _) => authority.as_str(),
            (None, Some(host)) => host.to_str().unwrap_or_default(),
            // No browser leaves it out.
            (None, None) if head.version < Version::HTTP_11 => return Ok(()),
            (None, None) => return Err(Error::new(Code::InvalidRequest, "a request of HTTP/1.1 has a Host")),
        };
        if !self.loopback {
            return Ok(());
        }
        // Nearly always one of these.
        let usual = host.strip_prefix("127.0.0.1").or_else(|| host.strip_prefix("localhost"));
        if usual.is_some_and(|rest| rest.is_empty() || rest.starts_with(':')) || is_this_machine(without_port(host)) {
            return Ok(());
        }
        Err(Error::new(
            Code::Forbidden,
            "this listener is open to this machine only: reach it as localhost or 127.0.0.1, \
             or let it listen elsewhere (server.listen)",
        )
        .with("permission", "host"))
    }

    /// Who is behind the request.
    pub fn page(&self, head: &Parts) -> Page {
        let Some(value) = head.headers.get(header::ORIGIN) else {
            // Images, links and frames send no Origin.
            let site = head.headers.get("sec-fetch-site");
            return if site.is_some_and(|site| site == "cross-site") { Page::Stranger } else { Page::None };
        };
        let Ok(origin) = value.to_str() else { return Page::Stranger };
        // Sandboxed frames, files and redirects: anyone at all.
        if origin == "null" {
            return Page::Stranger;
        }
        let host = head.uri.authority().map(|host| host.as_str());
        let host = host.or_else(|| head.headers.get(header::HOST)?.to_str().ok());
        let same = host.is_some_and(|host| is_same(origin, host));
        let neighbour = self.loopback
            && self.anonymous
            && origin
                .strip_prefix("http://")
                .is_some_and(|host| matches!(without_port(host), "localhost" | "127.0.0.1"));
        if same || neighbour || self.allowed.iter().any(|pattern| pattern.matches(origin)) {
            Page::Friend(value.clone())
        } else {
            Page::Stranger
        }
    }

    /// Refuses what a page from elsewhere must not do here: write, move a consumer's cursor, or open a socket (which CORS
    /// does not cover).
    pub fn check_page(&self, head: &Parts, page: &Page) -> Result<()> {
        let writes = match head.method {
            Method::HEAD | Method::OPTIONS => false,
            Method::GET => head.uri.query().is_some_and(|query| query.contains("consumer=")),
            _ => true,
        };
        let socket = head.headers.get(header::UPGRADE).is_some();
        match page {
            Page::Stranger if self.loopback && (writes || socket) => Err(Error::new(
                Code::Forbidden,
                "pages of this origin may not do that here: name the origin in cors.origins",
            )
            .with("permission", "origin")),
            _ => Ok(()),
        }
    }
}

impl Page {
    /// Says in an answer who may see it.
    pub fn mark(self, headers: &mut HeaderMap) {
        headers.append(header::VARY, HeaderValue::from_static("Origin"));
        if let Page::Friend(origin) = self {
            headers.insert(header::ACCESS_CONTROL_ALLOW_ORIGIN, origin);
            headers.insert(header::ACCESS_CONTROL_EXPOSE_HEADERS, EXPOSE_HEADERS);
        }
    }

    /// Answers the preflight of a friend. `allow` is the route's `Allow`.
    pub fn preflight(&self, request: &HeaderMap, allow: HeaderValue, headers: &mut HeaderMap) {
        if matches!(self, Page::Friend(_)) && request.contains_key(header::ACCESS_CONTROL_REQUEST_METHOD) {
            headers.insert(header::ACCESS_CONTROL_ALLOW_METHODS, allow);
            headers.insert(header::ACCESS_CONTROL_ALLOW_HEADERS, ALLOW_HEADERS);
            headers.insert(header::ACCESS_CONTROL_MAX_AGE, MAX_AGE);
        }
    }
}

/// Whether `origin` (`scheme://host[:port]`) is the page of `host[:port]`. The scheme is left to the proxy in front.
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

    fn origins() -> Origins {
        Origins { loopback: true, anonymous: true, allowed: vec![] }
    }

    #[test]
    fn names_of_this_machine() {
        for host in
            ["localhost:8000", "LOCALHOST", "a.localhost:1", "127.0.0.1:8000", "127.8.8.8", "[::1]:8000", "[::1]"]
        {
            assert!(origins().check_host(&head("GET", &[("host", host)])).is_ok(), "{host}");
        }
        for host in ["evil.example", "localhost.evil.example", "10.0.0.1", "", "[::2]:1", "127.0.0.1.evil.example"] {
            assert!(origins().check_host(&head("GET", &[("host", host)])).is_err(), "{host}");
        }
        let open = Origins { loopback: false, ..origins() };
        assert!(open.check_host(&head("GET", &[("host", "weir.example")])).is_ok());
    }

    #[test]
    fn pages() {
        let friend = |origins: &Origins, origin: &str, host: &str| {
            matches!(origins.page(&head("GET", &[("host", host), ("origin", origin)])), Page::Friend(_))
        };
        assert!(friend(&origins(), "http://localhost:3000", "localhost:8000"));
        assert!(friend(&origins(), "http://127.0.0.1", "localhost:8000"));
        assert!(!friend(&origins(), "http://localhost.evil.example", "localhost:8000"));
        assert!(!friend(&origins(), "https://evil.example", "localhost:8000"));
        assert!(!friend(&origins(), "null", "localhost:8000"));
        let open = Origins { loopback: false, anonymous: true, allowed: vec![Pattern::new("https://*.shop.example")] };
        assert!(!friend(&open, "http://localhost:3000", "weir.example"));
        assert!(!friend(&open, "null", "weir.example"));
        assert!(friend(&open, "https://weir.example", "weir.example"));
        assert!(friend(&open, "https://weir.example", "Weir.example:443"));
        assert!(!friend(&open, "https://weir.example:444", "weir.example"));
        assert!(friend(&open, "https://www.shop.example", "weir.example"));
    }

    #[test]
    fn strangers_read_blindly_and_never_write() {
        let check = |method, headers: &[(&str, &str)]| {
            let head = head(method, headers);
            origins().check_page(&head, &origins().page(&head)).is_ok()
        };
        let stranger = ("origin", "https://evil.example");
        assert!(check("GET", &[stranger]));
        assert!(!check("POST", &[stranger]));
        assert!(!check("DELETE", &[stranger]));
        assert!(!check("GET", &[stranger, ("upgrade", "websocket")]));
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
        let allowed = |head: Parts| origins().check_page(&head, &origins().page(&head));
        assert!(allowed(poll("cross-site")).is_err());
        assert!(allowed(poll("same-site")).is_ok());
    }
}
