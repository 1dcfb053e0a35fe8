//! Opens the byte stream to a Redis server, with TLS for `rediss://`.

use std::{io, sync::Arc};

use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::TcpStream,
};
use tokio_rustls::{
    TlsConnector,
    rustls::{CertificateError, ClientConfig, Error, RootCertStore, crypto::aws_lc_rs, pki_types::ServerName},
};

use super::url::Address;

pub(super) trait ByteStream: AsyncRead + AsyncWrite + Send + Unpin {}
impl<S: AsyncRead + AsyncWrite + Send + Unpin> ByteStream for S {}

pub(super) async fn connect(address: &Address, tls: bool) -> io::Result<Box<dyn ByteStream>> {
    let tcp = TcpStream::connect((&*address.host, address.port)).await?;
    tcp.set_nodelay(true)?;
    if !tls {
        return Ok(Box::new(tcp));
    }
    let name = ServerName::try_from(address.host.to_string()).map_err(io::Error::other)?;
    Ok(Box::new(TlsConnector::from(config()?).connect(name, tcp).await.map_err(explain)?))
}

/// Rejected certificates as sentences that say what to change.
fn explain(error: io::Error) -> io::Error {
    use CertificateError as Bad;
    let Some(Error::InvalidCertificate(why)) = error.get_ref().and_then(|error| error.downcast_ref()) else {
        return error;
    };
    io::Error::other(match why {
        Bad::UnknownIssuer => {
            "its certificate is not signed by an authority that this machine trusts: SSL_CERT_FILE names a file of \
             those to trust"
                .to_owned()
        }
        Bad::NotValidForName | Bad::NotValidForNameContext { .. } => "its certificate is for another name".to_owned(),
        why => format!("its certificate is rejected: {why:?}"),
    })
}

fn config() -> io::Result<Arc<ClientConfig>> {
    let mut roots = RootCertStore::empty();
    roots.add_parsable_certificates(rustls_native_certs::load_native_certs().certs);
    if roots.is_empty() {
        return Err(io::Error::other(
            "there are no trusted certificates on this machine: install ca-certificates, or set SSL_CERT_FILE",
        ));
    }
    let config = ClientConfig::builder_with_provider(Arc::new(aws_lc_rs::default_provider()))
        .with_safe_default_protocol_versions()
        .map_err(io::Error::other)?;
    Ok(Arc::new(config.with_root_certificates(roots).with_no_client_auth()))
}
