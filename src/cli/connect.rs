//! Connections to a node over TCP, and TLS if the URL has the scheme `https`.

use std::{fmt, io, sync::Arc, time::Duration};

use http::Uri;
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::TcpStream,
    time::timeout,
};
use tokio_rustls::{
    TlsConnector,
    rustls::{self, ClientConfig, RootCertStore, crypto::aws_lc_rs, pki_types::ServerName},
};

use super::request_target::RequestTarget;
use crate::terminal::Failure;

const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);

/// A TCP or TLS connection.
pub(super) trait NodeStream: AsyncRead + AsyncWrite + Send + Unpin {}

impl<S: AsyncRead + AsyncWrite + Send + Unpin> NodeStream for S {}

/// The URL of a node: `http` or `https`, a host, an optional port and an optional path prefix.
#[derive(Clone, Debug)]
pub struct BaseUrl {
    tls: bool,
    host: String,
    port: u16,
    /// Without a trailing slash.
    path: String,
}

/// Connects, each of TCP and TLS within [`CONNECT_TIMEOUT`].
pub(super) async fn connect(base: &BaseUrl) -> Result<Box<dyn NodeStream>, Failure> {
    let unreachable = |reason: &dyn fmt::Display| Failure::Unavailable(format!("cannot connect to {base}: {reason}"));
    let tcp = match timeout(CONNECT_TIMEOUT, TcpStream::connect((base.host.as_str(), base.port))).await {
        Ok(Ok(tcp)) => tcp,
        Ok(Err(error)) => return Err(unreachable(&error)),
        Err(_) => return Err(unreachable(&"no response within 10s")),
    };
    // Requests are small: Nagle's algorithm would delay them.
    tcp.set_nodelay(true).map_err(|error| unreachable(&error))?;
    if !base.tls {
        return Ok(Box::new(tcp));
    }
    let name = ServerName::try_from(base.host.clone()).map_err(|error| unreachable(&error))?;
    let config = tls().map_err(|error| unreachable(&error))?;
    match timeout(CONNECT_TIMEOUT, TlsConnector::from(Arc::new(config)).connect(name, tcp)).await {
        Ok(Ok(stream)) => Ok(Box::new(stream)),
        // Usually a node without TLS, which answers the handshake with an HTTP error.
        Ok(Err(error)) if matches!(tls_error(&error), Some(rustls::Error::InvalidMessage(_))) => {
            Err(unreachable(&"the server does not speak TLS: use http://?"))
        }
        Ok(Err(error)) => Err(unreachable(&error)),
        Err(_) => Err(unreachable(&"no TLS handshake within 10s")),
    }
}

fn tls_error(error: &io::Error) -> Option<&rustls::Error> {
    error.get_ref()?.downcast_ref()
}

/// Trusts the root certificates of the system, or those of `SSL_CERT_FILE`.
fn tls() -> io::Result<ClientConfig> {
    let mut roots = RootCertStore::empty();
    let found = rustls_native_certs::load_native_certs();
    roots.add_parsable_certificates(found.certs);
    if roots.is_empty() {
        let reason = found.errors.first().map_or_else(|| "none is installed".to_owned(), ToString::to_string);
        return Err(io::Error::other(format!("no trusted root certificates: {reason}")));
    }
    let config = ClientConfig::builder_with_provider(Arc::new(aws_lc_rs::default_provider()))
        .with_safe_default_protocol_versions()
        .map_err(io::Error::other)?;
    let mut config = config.with_root_certificates(roots).with_no_client_auth();
    config.alpn_protocols = vec![b"http/1.1".to_vec()];
    Ok(config)
}

// === impl BaseUrl ===

impl BaseUrl {
    /// Parses a URL. Without a scheme it is `http`, as in curl.
    pub(super) fn parse(text: &str) -> Result<Self, String> {
        let bad = |reason: &str| format!("{text:?} is not the URL of a node ({reason}): write http://127.0.0.1:8000");
        let whole = if text.contains("://") { text.to_owned() } else { format!("http://{text}") };
        let uri: Uri = whole.parse().map_err(|_| bad("not a URL"))?;
        let tls = match uri.scheme_str() {
            Some("http" | "ws") => false,
            Some("https" | "wss") => true,
            _ => return Err(bad("its scheme is neither http nor https")),
        };
        if uri.query().is_some() {
            return Err(bad("it has a query"));
        }
        let authority = uri.authority().ok_or_else(|| bad("no host"))?;
        if authority.as_str().contains('@') {
            return Err(bad("pass credentials with --token"));
        }
        // An IPv6 address has brackets only in a URL.
        let host = authority.host().trim_start_matches('[').trim_end_matches(']');
        if host.is_empty() {
            return Err(bad("no host"));
        }
        let port = authority.port_u16().unwrap_or(if tls { 443 } else { 80 });
        Ok(BaseUrl { tls, host: host.to_owned(), port, path: uri.path().trim_end_matches('/').to_owned() })
    }

    /// The value of the `Host` header.
    pub(super) fn authority(&self) -> String {
        let host = if self.host.contains(':') { format!("[{}]", self.host) } else { self.host.clone() };
        match (self.tls, self.port) {
            (false, 80) | (true, 443) => host,
            (_, port) => format!("{host}:{port}"),
        }
    }

    /// Path and query of a request.
    pub(super) fn path(&self, target: &RequestTarget) -> String {
        format!("{}{target}", self.path)
    }

    /// The URL of a WebSocket.
    pub(super) fn ws(&self, target: &RequestTarget) -> String {
        format!("{}://{}{}", if self.tls { "wss" } else { "ws" }, self.authority(), self.path(target))
    }
}

impl fmt::Display for BaseUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}://{}{}", if self.tls { "https" } else { "http" }, self.authority(), self.path)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn urls_are_parsed_or_rejected() {
        let target = RequestTarget::new("/v1/ws");
        for (text, shown, ws) in [
            ("http://127.0.0.1:8000", "http://127.0.0.1:8000", "ws://127.0.0.1:8000/v1/ws"),
            ("localhost:8000/", "http://localhost:8000", "ws://localhost:8000/v1/ws"),
            ("wss://weir.example.com/bus/", "https://weir.example.com/bus", "wss://weir.example.com/bus/v1/ws"),
            ("http://[::1]:80", "http://[::1]", "ws://[::1]/v1/ws"),
        ] {
            let base = BaseUrl::parse(text).unwrap();
            assert_eq!((base.to_string().as_str(), base.ws(&target).as_str()), (shown, ws));
        }
        for bad in ["", "ftp://x", "http://", "http://u:p@host", "http://host?x=1", "a b"] {
            assert!(BaseUrl::parse(bad).is_err(), "{bad}");
        }
    }
}
