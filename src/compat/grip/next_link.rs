//! [`StreamSite`]: the place of a held stream at its origin, from which next links are resolved and fetched.

use std::{net::SocketAddr, sync::Arc};

use axum::body::Body as AxumBody;
use http::{HeaderMap, HeaderValue, Method, header, uri::PathAndQuery};
use url::{Position, Url};

use super::{
    headers::sign,
    instructions::{self, HoldMode, Instructions, take_no_encoding},
    origin_client::{OriginError, OriginRequest},
    proxy::GripProxy,
    response::OriginBody,
    route::authority,
};

pub(super) struct StreamSite {
    pub(super) proxy: Arc<GripProxy>,
    /// An index into the routes of the proxy.
    pub(super) route: usize,
    pub(super) path: PathAndQuery,
    /// The `Host` of the client's request.
    pub(super) host: Option<HeaderValue>,
    pub(super) remote: Option<SocketAddr>,
}

/// The response to a next link.
pub(super) struct FetchedPart {
    pub(super) instructions: Instructions,
    pub(super) body: OriginBody,
    /// Its place: the links in it are resolved from here.
    pub(super) route: usize,
    pub(super) path: PathAndQuery,
}

impl StreamSite {
    /// Fetches a next link. The future does not borrow `self`.
    pub(super) fn fetch(
        &self,
        link: &str,
        last_ids: HeaderMap,
    ) -> impl Future<Output = Result<FetchedPart, OriginError>> + Send + 'static {
        let (proxy, host) = (self.proxy.clone(), self.host.clone());
        let target = self.resolve(link);
        async move {
            let (index, path) = target?;
            let route = &proxy.routes[index];
            let mut headers = last_ids;
            headers.extend(host.map(|host| (header::HOST, host)));
            headers.insert(header::ACCEPT_ENCODING, HeaderValue::from_static("identity"));
            sign(&mut headers, proxy.signature(route));
            let request = OriginRequest { method: Method::GET, path: path.clone(), headers, body: AxumBody::empty() };
            let response = proxy.send(route, request).await?;
            if !response.status().is_success() {
                return Err(OriginError::Invalid(format!("next link answered {}", response.status())));
            }
            let (mut head, body) = response.into_parts();
            let in_body = instructions::are_in_body(&head.headers);
            let mut instructions = Instructions::take(&mut head.headers).map_err(OriginError::Invalid)?;
            let mut body = OriginBody::Incoming(body);
            if in_body {
                let bytes = proxy.read_body(body).await?;
                let response = instructions.read_body(head.status, &bytes).map_err(OriginError::Invalid)?;
                body = OriginBody::Bytes(response.body.into());
            }
            if instructions.hold == Some(HoldMode::Response) {
                return Err(OriginError::Invalid("next link returned non-stream hold".into()));
            }
            take_no_encoding(&mut head.headers)?;
            proxy.check_limits(&instructions)?;
            Ok(FetchedPart { instructions, body, route: index, path })
        }
    }

    /// The route and the path of a link. Only origins of the configuration are valid targets.
    fn resolve(&self, link: &str) -> Result<(usize, PathAndQuery), OriginError> {
        let current = &self.proxy.routes[self.route];
        let base = format!("{}://{}{}", current.scheme, current.authority, self.path);
        let invalid = || OriginError::Invalid("Grip-Link contains invalid link".into());
        let (target, path) = join(&base, link).ok_or_else(invalid)?;
        let (scheme, target) = (target.scheme(), authority(&target));
        if current.authority == target {
            return Ok((self.route, path));
        }
        // The link may also name the host by which clients reach the proxy.
        let front = self.host.as_ref().is_some_and(|host| names_host(scheme, host, target));
        let mut routes = self.proxy.routes.iter();
        let route = routes.position(|route| if front { route.matches(path.path()) } else { route.authority == target });
        route
            .map(|route| (route, path))
            .ok_or_else(|| OriginError::Invalid("Grip-Link leads to no origin of this proxy".into()))
    }
}

/// Whether a `Host` is this authority, which has no default port of `scheme`.
fn names_host(scheme: &str, host: &HeaderValue, target: &str) -> bool {
    let url = host.to_str().ok().and_then(|host| Url::parse(&format!("{scheme}://{host}")).ok());
    url.is_some_and(|url| authority(&url) == target)
}

/// Resolves a reference (RFC 3986, section 5.2). A reference to another host must contain the scheme.
fn join(base: &str, link: &str) -> Option<(Url, PathAndQuery)> {
    if link.starts_with("//") || link.contains(' ') {
        return None;
    }
    let url = Url::parse(base).ok()?.join(link).ok()?;
    let path = url[Position::BeforePath..Position::AfterQuery].parse().ok()?;
    Some((url, path))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn links_resolve_against_the_current_path() {
        for (base, link, target) in [
            ("/a/b?c=1", "/x?y=2", "/x?y=2"),
            ("/a/b?c=1", "x?y=2#z", "/a/x?y=2"),
            ("/a/b?c=1", "?y=2", "/a/b?y=2"),
            ("/a/b?c=1", "", "/a/b?c=1"),
            ("/a/b", "../x/./y", "/x/y"),
            ("/a/b/", "..", "/a/"),
            ("/a", "../../../x", "/x"),
            ("/", "x?y=//z", "/x?y=//z"),
        ] {
            let joined = join(&format!("http://origin:3000{base}"), link).unwrap();
            assert_eq!((authority(&joined.0), joined.1.as_str()), ("origin:3000", target), "{base} {link}");
        }
        let (absolute, path) = join("http://origin:3000/a", "HTTPS://Other.Example:443?x=1#y").unwrap();
        assert_eq!((authority(&absolute), path.as_str()), ("other.example", "/?x=1"));
        for invalid in ["//elsewhere/x", "/a b", "http://", "http://a b/"] {
            assert_eq!(join("http://origin:3000/", invalid), None);
        }
    }

    #[test]
    fn the_default_port_of_a_host_does_not_matter() {
        for (link, host, expected) in [
            ("http://example.com:80/next", "example.com:80", true),
            ("http://example.com/next", "Example.com:80", true),
            ("http://example.com:80/next", "example.com", true),
            ("https://example.com:443/next", "example.com:443", true),
            ("https://example.com:80/next", "example.com:80", true),
            ("https://example.com/next", "example.com:80", false),
            ("http://example.com/next", "elsewhere:80", false),
            ("http://example.com/next", "", false),
        ] {
            let url = Url::parse(link).unwrap();
            let host = HeaderValue::from_static(host);
            assert_eq!(names_host(url.scheme(), &host, authority(&url)), expected, "{link} {host:?}");
        }
    }
}
