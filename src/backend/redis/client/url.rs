//! [`RedisUrl`]: how to reach Redis, the value of `bus.redis.url`.
//!
//! The `redis` crate parses URLs of one host only, ignores malformed escapes, and knows no default port of Sentinel; so
//! all of it is parsed here.

use std::fmt;

const FORMS: &str =
    "write redis://HOST:6379, rediss:// for TLS, redis+sentinel://HOST,HOST/MASTER or redis-cluster://HOST,HOST";

/// One server.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) struct Address {
    pub(crate) host: Box<str>,
    pub(crate) port: u16,
}

#[derive(Clone, PartialEq, Eq)]
pub struct RedisUrl {
    pub(crate) kind: TopologyKind,
    pub(crate) tls: bool,
    pub(crate) user: Option<String>,
    pub(crate) password: Option<String>,
    /// Always 0 in a Cluster.
    pub(crate) database: u32,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum TopologyKind {
    /// `redis://[user:password@]host[:6379][/database]`, or `rediss://` over TLS.
    Standalone(Address),
    /// `redis+sentinel://[user:password@]host[:26379],host,…/master[/database]`.
    Sentinel { sentinels: Vec<Address>, master: String },
    /// `redis-cluster://[user:password@]host[:6379],host,…`: some of its servers, from which the others are found.
    Cluster(Vec<Address>),
}

impl RedisUrl {
    /// The error is a sentence without the password.
    pub fn parse(text: &str) -> Result<Self, String> {
        let (scheme, rest) = text.split_once("://").ok_or(FORMS)?;
        let (form, tls) = match scheme.strip_prefix("rediss") {
            Some(form) => (form, true),
            None => (scheme.strip_prefix("redis").ok_or(FORMS)?, false),
        };
        if rest.contains(['?', '#']) {
            return Err("a Redis URL has no query: other options have settings of their own".into());
        }
        let (authority, path) = rest.split_once('/').unwrap_or((rest, ""));
        if path.contains('@') {
            return Err("in a password / is written %2F, and @ is written %40".into());
        }
        let (login, hosts) = authority.rsplit_once('@').unwrap_or(("", authority));
        let (user, password) = login.split_once(':').unwrap_or((login, ""));
        let (user, password) = (unescape(user)?, unescape(password)?);
        if !user.is_empty() && password.is_empty() {
            return Err("a user without a password: write redis://user:password@host".into());
        }
        let default = if form == "+sentinel" { 26379 } else { 6379 };
        let mut hosts =
            hosts.split(',').map(|host| Address::parse(host, default)).collect::<Result<Vec<_>, String>>()?;
        let path = path.trim_end_matches('/');
        let (kind, database) = match form {
            "+sentinel" => {
                let (master, database) = path.split_once('/').unwrap_or((path, ""));
                if master.is_empty() {
                    return Err("the name of the master is missing: redis+sentinel://HOST,HOST/MASTER".into());
                }
                (TopologyKind::Sentinel { sentinels: hosts, master: unescape(master)? }, database)
            }
            "-cluster" if path.is_empty() => (TopologyKind::Cluster(hosts), path),
            "-cluster" => {
                return Err("a Redis Cluster has no databases: leave out the path after the hosts".into());
            }
            "" if hosts.len() == 1 => (TopologyKind::Standalone(hosts.remove(0)), path),
            "" => return Err("several hosts: write redis+sentinel:// or redis-cluster://".into()),
            _ => return Err(FORMS.into()),
        };
        let database = match database {
            "" => 0,
            number => number.parse().map_err(|_| format!("{number:?} is not the number of a database"))?,
        };
        let some = |text: String| Some(text).filter(|text| !text.is_empty());
        Ok(RedisUrl { kind, tls, user: some(user), password: some(password), database })
    }

    pub(crate) fn is_cluster(&self) -> bool {
        matches!(self.kind, TopologyKind::Cluster(_))
    }
}

/// For logs: without user and password.
impl fmt::Display for RedisUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let list = |list: &[Address]| list.iter().map(Address::to_string).collect::<Vec<_>>().join(",");
        let tls = if self.tls { "rediss" } else { "redis" };
        match &self.kind {
            TopologyKind::Standalone(address) => write!(f, "{tls}://{address}/{}", self.database),
            TopologyKind::Sentinel { sentinels, master } => {
                write!(f, "{tls}+sentinel://{}/{master}/{}", list(sentinels), self.database)
            }
            TopologyKind::Cluster(seeds) => write!(f, "{tls}-cluster://{}", list(seeds)),
        }
    }
}

impl fmt::Debug for RedisUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl Address {
    /// `host`, `host:port` or `[::1]:port`.
    pub(crate) fn parse(text: &str, default: u16) -> Result<Self, String> {
        let invalid = || format!("{text:?} is not a host and a port");
        let (host, port) = match text.strip_prefix('[') {
            Some(rest) => {
                let (host, port) = rest.split_once(']').ok_or_else(invalid)?;
                (host, port.strip_prefix(':'))
            }
            None => match text.rsplit_once(':') {
                // CLUSTER SLOTS and MOVED write IPv6 addresses without brackets.
                Some((host, port)) => (host, Some(port)),
                None => (text, None),
            },
        };
        let port = port.map_or(Ok(default), |port| port.parse().map_err(|_| invalid()))?;
        let forbidden = |letter: char| letter.is_whitespace() || letter.is_control();
        if host.is_empty() || host.contains(forbidden) || port == 0 {
            return Err(invalid());
        }
        Ok(Address { host: host.into(), port })
    }
}

impl Address {
    /// The address `host:port` that the server at `asked` has named. IPv6 addresses have brackets or none.
    pub(crate) fn named_by(asked: &Address, text: &str) -> Option<Self> {
        let (host, port) = text.rsplit_once(':')?;
        Self::of_host(asked, host, port.parse().ok()?)
    }

    /// The address of a host and a port that the server at `asked` has named. No host, or an unknown one, stands for
    /// the host that was asked: the server does not know by which name clients reach it.
    pub(super) fn of_host(asked: &Address, host: &str, port: u16) -> Option<Self> {
        let host = host.strip_prefix('[').and_then(|host| host.strip_suffix(']')).unwrap_or(host);
        let host = if matches!(host, "" | "?") { &asked.host } else { host };
        (port > 0).then(|| Address { host: host.into(), port })
    }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.host.contains(':') {
            true => write!(f, "[{}]:{}", self.host, self.port),
            false => write!(f, "{}:{}", self.host, self.port),
        }
    }
}

/// Decodes percent-encoding, strictly: a mistyped password is an error here and not at the server.
fn unescape(text: &str) -> Result<String, String> {
    let invalid = || "a percent sign in a Redis URL is written %25".to_owned();
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let Some((byte, after)) = rest.split_first() {
        rest = after;
        if *byte != b'%' {
            bytes.push(*byte);
            continue;
        }
        let (digits, after) = rest.split_at_checked(2).ok_or_else(invalid)?;
        let digits = std::str::from_utf8(digits).map_err(|_| invalid())?;
        bytes.push(u8::from_str_radix(digits, 16).map_err(|_| invalid())?);
        rest = after;
    }
    String::from_utf8(bytes).map_err(|_| invalid())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn urls_are_parsed() {
        let shown = |text: &str| RedisUrl::parse(text).map(|url| url.to_string());
        assert_eq!(shown("redis://localhost"), Ok("redis://localhost:6379/0".into()));
        assert_eq!(shown("rediss://u:p@[::1]:1/2"), Ok("rediss://[::1]:1/2".into()));
        assert_eq!(shown("redis+sentinel://a,b:7/main"), Ok("redis+sentinel://a:26379,b:7/main/0".into()));
        assert_eq!(shown("redis-cluster://a,b/"), Ok("redis-cluster://a:6379,b:6379".into()));
        let url = RedisUrl::parse("redis://:p%40%2Fss@h").unwrap();
        assert_eq!((url.user, url.password.as_deref()), (None, Some("p@/ss")));
        for bad in [
            "",
            "localhost",
            "http://a",
            "redis://",
            "redis://a,b",
            "redis://a:x",
            "redis://a/b",
            "redis://a?db=1",
            "redis://user@a",
            "redis+sentinel://a",
            "redis-cluster://a/1",
            "redis://a/1/2",
            "redis://%zz:b@a",
        ] {
            assert!(RedisUrl::parse(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn the_password_is_never_displayed() {
        let url = RedisUrl::parse("redis://u:secret@h").unwrap();
        assert!(!format!("{url} {url:?}").contains("secret"));
        assert!(!RedisUrl::parse("redis://u:secret@h:x").unwrap_err().contains("secret"));
    }
}
