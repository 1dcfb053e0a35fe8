//! [`At`]: where a held stream is of its origin's, and where its links lead from there: never anywhere but to an origin of
//! the configuration.

use std::{net::SocketAddr, sync::Arc};

use axum::body::Body as AxumBody;
use http::{HeaderMap, HeaderValue, Method, header, uri::PathAndQuery};

use super::{
    Content, Grip,
    instruct::{self, Hold, Instruct},
    proxy::{self, Ask, Failure},
};

/// Where a stream is of the origin's.
pub struct At {
    pub grip: Arc<Grip>,
    /// Of `grip.routes`.
    pub route: usize,
    pub path: PathAndQuery,
    /// By which the client knows weir.
    pub host: Option<HeaderValue>,
    pub remote: Option<SocketAddr>,
}

/// What a link led to.
pub struct Fetched {
    pub instruct: Instruct,
    pub body: Content,
    /// Links in it are seen from here.
    pub route: usize,
    pub path: PathAndQuery,
}

impl At {
    /// Fetches the link: a future of its own, for it outlives the borrow.
    pub fn fetch(
        &self,
        link: &str,
        last: HeaderMap,
    ) -> impl Future<Output = Result<Fetched, Failure>> + Send + 'static {
        let (grip, route, host) = (self.grip.clone(), self.route, self.host.clone());
        let target = self.resolve(link);
        async move {
            let (nth, path) = target.map(|(other, path)| (other.unwrap_or(route), path))?;
            let route = &grip.routes[nth];
            let mut headers = last;
            headers.extend(host.map(|host| (header::HOST, host)));
            headers.insert(header::ACCEPT_ENCODING, HeaderValue::from_static("identity"));
            proxy::sign(&mut headers, grip.signature(route));
            let ask = Ask { method: Method::GET, path: path.clone(), headers, body: AxumBody::empty() };
            let answer = grip.origins.ask(route, ask).await?;
            if !answer.status().is_success() {
                return Err(Failure::Wrong(format!("next link answered {}", answer.status())));
            }
            let (mut head, body) = answer.into_parts();
            let as_body = instruct::is_body(&head.headers);
            let mut instruct = Instruct::take(&mut head.headers).map_err(Failure::Wrong)?;
            let mut body = Content::Incoming(body);
            if as_body {
                let whole = grip.whole(body).await?;
                let instead = instruct.read_body(head.status, &whole).map_err(Failure::Wrong)?;
                body = Content::Bytes(instead.body.into());
            }
            if instruct.hold == Some(Hold::Response) {
                return Err(Failure::Wrong("next link returned non-stream hold".into()));
            }
            grip.check(&instruct)?;
            Ok(Fetched { instruct, body, route: nth, path })
        }
    }

    /// Where a link leads from here: another route, if it names one, and the path. Never anywhere but to an origin of the
    /// configuration.
    fn resolve(&self, link: &str) -> Result<(Option<usize>, PathAndQuery), Failure> {
        let wrong = || Failure::Wrong("Grip-Link contains invalid link".into());
        let absolute = link.split_once("://").filter(|(scheme, _)| matches!(*scheme, "http" | "https"));
        let Some((_, rest)) = absolute else {
            return relative(self.path.as_str(), link).map(|path| (None, path)).ok_or_else(wrong);
        };
        let end = rest.find(['/', '?', '#']).unwrap_or(rest.len());
        let (authority, path) = rest.split_at(end);
        let path = relative("/", if path.is_empty() { "/" } else { path }).ok_or_else(wrong)?;
        let mine = &self.grip.routes[self.route];
        if authority.eq_ignore_ascii_case(mine.authority.as_str()) {
            return Ok((None, path));
        }
        // The way that clients take.
        let front = self.host.as_ref().is_some_and(|host| host.as_bytes().eq_ignore_ascii_case(authority.as_bytes()));
        let route = self.grip.routes.iter().position(|route| {
            if front { route.owns(path.path()) } else { authority.eq_ignore_ascii_case(route.authority.as_str()) }
        });
        match route {
            Some(route) => Ok((Some(route), path)),
            None => Err(Failure::Wrong("Grip-Link leads to no origin of this proxy".into())),
        }
    }
}

/// A relative reference (RFC 3986, 5.2), seen from `base`.
fn relative(base: &str, link: &str) -> Option<PathAndQuery> {
    let link = link.split('#').next()?;
    let base_path = base.split('?').next()?;
    if link.starts_with("//") {
        return None;
    }
    let target = match link.as_bytes().first() {
        None => base.to_owned(),
        Some(b'/') => link.to_owned(),
        Some(b'?') => format!("{base_path}{link}"),
        Some(_) => format!("{}/{link}", base_path.rsplit_once('/').map_or("", |(folder, _)| folder)),
    };
    let (path, query) = target.split_once('?').map_or((&*target, None), |(path, query)| (path, Some(query)));
    let mut names: Vec<&str> = Vec::new();
    let mut steps = path.split('/').skip(1).peekable();
    while let Some(step) = steps.next() {
        let last = steps.peek().is_none();
        match step {
            "." if last => names.push(""),
            "." => {}
            ".." => {
                names.pop();
                if last {
                    names.push("");
                }
            }
            step => names.push(step),
        }
    }
    let query = query.map_or(String::new(), |query| format!("?{query}"));
    format!("/{}{query}", names.join("/")).parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn links_are_seen_from_where_they_stand() {
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
            assert_eq!(relative(base, link).unwrap().as_str(), target, "{base} {link}");
        }
        assert_eq!(relative("/", "//elsewhere/x"), None);
        assert_eq!(relative("/", "/a b"), None);
    }
}
