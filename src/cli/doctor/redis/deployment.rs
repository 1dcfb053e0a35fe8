//! Who is where: a way in to each server of a deployment, and the nodes of a cluster.

use redis::{Client, ConnectionAddr, IntoConnectionInfo as _, ProtocolVersion, RedisResult};

use crate::backend::redis::client::{Address, RedisUrl};

/// A client for one of the servers. Sentinels have logins of their own, and most have none.
pub fn client(url: &RedisUrl, address: &Address, login: bool, protocol: ProtocolVersion) -> RedisResult<Client> {
    let (host, port) = (address.host.to_string(), address.port);
    let place = match url.tls {
        true => ConnectionAddr::TcpTls { host, port, insecure: false, tls_params: None },
        false => ConnectionAddr::Tcp(host, port),
    };
    let info = place.into_connection_info()?;
    let mut settings = info.redis_settings().clone().set_protocol(protocol);
    if login {
        settings = settings.set_db(url.database.into());
        if let Some(user) = &url.user {
            settings = settings.set_username(user);
        }
        if let Some(password) = &url.password {
            settings = settings.set_password(password);
        }
    }
    Client::open(info.set_redis_settings(settings))
}

/// A line of `CLUSTER NODES`.
#[derive(Debug)]
pub struct Node {
    pub id: String,
    pub address: String,
    pub master: bool,
    pub failing: bool,
    pub replica_of: String,
    pub slots: u32,
}

/// Reads `CLUSTER NODES`.
pub fn nodes(text: &str) -> Vec<Node> {
    text.lines().filter_map(node).collect()
}

fn node(line: &str) -> Option<Node> {
    let mut words = line.split_ascii_whitespace();
    let (id, address, flags, replica_of) = (words.next()?, words.next()?, words.next()?, words.next()?);
    let flag = |name: &str| flags.split(',').any(|flag| flag == name);
    // Pings, epoch and link are between.
    let slots = words.skip(4).filter(|range| !range.starts_with('[')).filter_map(|range| {
        let (from, to) = range.split_once('-').unwrap_or((range, range));
        Some(to.parse::<u32>().ok()?.checked_sub(from.parse().ok()?)? + 1)
    });
    Some(Node {
        id: id.to_owned(),
        address: address.split('@').next().unwrap_or_default().to_owned(),
        master: flag("master"),
        failing: ["fail", "fail?", "noaddr", "handshake"].into_iter().any(flag),
        replica_of: replica_of.to_owned(),
        slots: slots.sum(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_is_in_a_cluster() {
        let nodes = nodes(
            "07c3 127.0.0.1:30004@31004,host4 slave e7d1 0 1426238317239 4 connected\n\
             67ed 127.0.0.1:30002@31002 master,fail? - 0 1426238316232 2 connected 5461-10922 [93-<-292f]\n\
             e7d1 127.0.0.1:30001@31001 myself,master - 0 0 1 connected 0-5459 5460\n",
        );
        assert_eq!(nodes.iter().map(|node| node.slots).collect::<Vec<_>>(), [0, 5462, 5461]);
        assert_eq!((nodes[0].replica_of.as_str(), nodes[0].master), ("e7d1", false));
        assert!(nodes[1].failing && !nodes[2].failing);
        assert_eq!(nodes[2].address, "127.0.0.1:30001");
    }
}
