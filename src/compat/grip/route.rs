//! [`OriginRoute`]: an origin and the paths that belong to it.

use http::uri::{Authority, Scheme};
use subtle::ConstantTimeEq as _;
use url::{Position, Url};

use super::{config::GripRoute, token::SigningKey};

/// A route of the configuration.
pub(super) struct OriginRoute {
    pub(super) path: String,
    pub(super) scheme: Scheme,
    pub(super) authority: Authority,
    /// Prepended to channel names.
    pub(super) prefix: String,
    /// The `iss` claim that tokens of publishers must have, if any.
    pub(super) publish_iss: Option<String>,
    /// If set, publishers must have it.
    pub(super) publish_key: Option<PublishKey>,
    /// Signs `Grip-Sig`. Without a configured key it is random: an origin that verifies signatures rejects them, and one
    /// that does not still sees that a proxy sends the request.
    pub(super) signer: SigningKey,
}

/// The key of a route, as configured and decoded.
pub(super) struct PublishKey {
    text: String,
    bytes: Vec<u8>,
}

impl OriginRoute {
    /// The error is a sentence for the log.
    pub(super) fn new(route: &GripRoute) -> Result<Self, String> {
        let url = Url::parse(&route.origin).ok();
        let server = url.and_then(|url| Some((url.scheme().parse().ok()?, authority(&url).parse().ok()?)));
        let (scheme, authority) = server.ok_or_else(|| format!("{} is not the URL of a server", route.origin))?;
        let bytes = route.key_bytes().ok_or_else(|| format!("the key of {} is not base64", route.path))?;
        let signer = if bytes.is_empty() { SigningKey::random() } else { SigningKey::new(&bytes) };
        Ok(OriginRoute {
            path: route.path.clone(),
            scheme,
            authority,
            prefix: route.prefix.clone(),
            publish_iss: (!route.iss.is_empty()).then(|| route.iss.clone()),
            signer: signer.map_err(|error| error.to_string())?,
            publish_key: (!bytes.is_empty()).then(|| PublishKey { text: route.key.reveal().to_owned(), bytes }),
        })
    }

    /// Whether a path is this one or below it: `/api` matches `/api/x`, and not `/apiary`.
    pub(super) fn matches(&self, path: &str) -> bool {
        path.strip_prefix(&self.path)
            .is_some_and(|rest| rest.is_empty() || rest.starts_with('/') || self.path.ends_with('/'))
    }
}

impl PublishKey {
    /// Compares in constant time; both notations of the key are accepted.
    pub(super) fn matches(&self, key: &[u8]) -> bool {
        (key.ct_eq(self.text.as_bytes()) | key.ct_eq(&self.bytes)).into()
    }
}

/// Host and port of a URL, without the default port.
pub(super) fn authority(url: &Url) -> &str {
    &url[Position::BeforeHost..Position::AfterPort]
}
