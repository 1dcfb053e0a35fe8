//! A client of the `redis` crate for a URL of weir, for commands that do not need the backend.

use redis::{Client, ConnectionAddr, IntoConnectionInfo as _, ProtocolVersion, RedisResult};

use super::url::{Address, RedisUrl};

/// A client for one server of `url`. Without `login` for a sentinel, which does not share the credentials of the URL.
pub(crate) fn crate_client(
    url: &RedisUrl,
    address: &Address,
    login: bool,
    protocol: ProtocolVersion,
) -> RedisResult<Client> {
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
