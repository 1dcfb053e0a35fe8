//! Where Redis is: the URL of `bus.redis.url`.

use std::fmt;

/// One server.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Address {
    pub host: Box<str>,
    pub port: u16,
}

/// What a URL says.
#[derive(Clone, PartialEq, Eq)]
pub struct RedisUrl {
    pub kind: TopologyKind,
    pub tls: bool,
    pub user: Option<String>,
    pub password: Option<String>,
    /// Of a single server or what Sentinel watches; a Cluster has only 0.
    pub database: u32,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum TopologyKind {
    /// `redis://[user:password@]host[:6379][/database]`, or `rediss://` over TLS.
    Standalone(Address),
    /// `redis+sentinel://[user:password@]host[:26379],host,…/master[/database]`.
    Sentinel { sentinels: Vec<Address>, master: String },
    /// `redis-cluster://[user:password@]host[:6379],host,…`: some of its servers, the others are found.
    Cluster(Vec<Address>),
}

impl RedisUrl {
    /// The error is a sentence without the password.
    pub fn parse(text: &str) -> Result<Self, String> {
        let forms = "write redis://HOST:6379, rediss:// for TLS, redis+sentinel://HOST,HOST/MASTER or redis-cluster://HOST,HOST";
        let (scheme, rest) = text.split_once("://").ok_or(forms)?;
        let (scheme, tls) = match scheme {
            "redis" | "redis+sentinel" | "redis-cluster" => (scheme, false),
            "rediss" => ("redis", true),
            "rediss+sentinel" => ("redis+sentinel", true),
            "rediss-cluster" => ("redis-cluster", true),
            _ => return Err(forms.into()),
        };
        if rest.contains(['?', '#']) {
            return Err("a Redis URL has no query here: what else there is to set are settings of their own".into());
        }
        let (place, path) = rest.split_once('/').unwrap_or((rest, ""));
        if path.contains('@') {
            return Err("in a password / is written %2F, and @ is written %40".into());
        }
        let (login, hosts) = match place.rsplit_once('@') {
            Some((login, hosts)) => (Some(login), hosts),
            None => (None, place),
        };
        let (user, password) = match login.map(|login| login.split_once(':').unwrap_or((login, ""))) {
            None => (None, None),
            Some((user, password)) => {
                let some = |text: &str| Ok::<_, String>(Some(unescape(text)?).filter(|text| !text.is_empty()));
                (some(user)?, some(password)?)
            }
        };
        if user.is_some() && password.is_none() {
            return Err("a user without a password: write redis://user:password@host".into());
        }
        let default = if scheme == "redis+sentinel" { 26379 } else { 6379 };
        let mut hosts =
            hosts.split(',').map(|host| Address::parse(host, default)).collect::<Result<Vec<_>, String>>()?;
        let mut path = path.trim_end_matches('/').splitn(2, '/');
        let mut next = || path.next().filter(|part| !part.is_empty());
        let number = |text: Option<&str>| match text {
            None => Ok(0),
            Some(text) => text.parse().map_err(|_| format!("{text:?} is not the number of a database")),
        };
        let (kind, database) = match scheme {
            "redis+sentinel" => {
                let master = next().ok_or("the name of the master is missing: redis+sentinel://HOST,HOST/MASTER")?;
                (TopologyKind::Sentinel { sentinels: hosts, master: unescape(master)? }, number(next())?)
            }
            "redis-cluster" => {
                if next().is_some() {
                    return Err("a Redis Cluster has no databases: leave out what follows the hosts".into());
                }
                (TopologyKind::Cluster(hosts), 0)
            }
            _ => {
                let database = number(next())?;
                match (hosts.pop(), hosts.is_empty()) {
                    (Some(one), true) => (TopologyKind::Standalone(one), database),
                    _ => return Err("several hosts: write redis+sentinel:// or redis-cluster://".into()),
                }
            }
        };
        if next().is_some() {
            return Err(forms.into());
        }
        Ok(RedisUrl { kind, tls, user, password, database })
    }

    pub fn is_cluster(&self) -> bool {
        matches!(self.kind, TopologyKind::Cluster(_))
    }
}

/// Without the password: it is for logs.
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
    pub fn parse(text: &str, default: u16) -> Result<Self, String> {
        let bad = || format!("{text:?} is not a host and a port");
        let (host, port) = match text.strip_prefix('[') {
            Some(rest) => {
                let (host, port) = rest.split_once(']').ok_or_else(bad)?;
                (host, port.strip_prefix(':'))
            }
            None => match text.rsplit_once(':') {
                // An address of IPv6 as CLUSTER SLOTS and MOVED write it.
                Some((host, port)) => (host, Some(port)),
                None => (text, None),
            },
        };
        let port = port.map_or(Ok(default), |port| port.parse().map_err(|_| bad()))?;
        let odd = |letter: char| letter.is_whitespace() || letter.is_control();
        if host.is_empty() || host.contains(odd) || port == 0 {
            return Err(bad());
        }
        Ok(Address { host: host.into(), port })
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

/// Percent-encoding, as passwords need it.
fn unescape(text: &str) -> Result<String, String> {
    let bad = || "a percent sign in a Redis URL is written %25".to_owned();
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let Some((byte, after)) = rest.split_first() {
        rest = after;
        if *byte != b'%' {
            bytes.push(*byte);
            continue;
        }
        let (digits, after) = rest.split_at_checked(2).ok_or_else(bad)?;
        let digits = std::str::from_utf8(digits).map_err(|_| bad())?;
        bytes.push(u8::from_str_radix(digits, 16).map_err(|_| bad())?);
        rest = after;
    }
    String::from_utf8(bytes).map_err(|_| bad())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_url_may_be() {
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
    fn a_password_is_not_shown() {
        let url = RedisUrl::parse("redis://u:secret@h").unwrap();
        assert!(!format!("{url} {url:?}").contains("secret"));
        assert!(!RedisUrl::parse("redis://u:secret@h:x").unwrap_err().contains("secret"));
    }
}
