//! [`JwksSource`]: fetches the JSON Web Key Set (RFC 7517) of an issuer, and keeps it up to date.

use std::{fs, sync::Arc, time::Duration};

use bytes::Bytes;
use http::Uri;
use http_body_util::{BodyExt, Empty, Limited};
use hyper_rustls::{HttpsConnector, HttpsConnectorBuilder};
use hyper_util::{
    client::legacy::{Client, connect::HttpConnector},
    rt::TokioExecutor,
};
use jsonwebtoken::jwk::Jwk;
use parking_lot::Mutex;
use tokio::{
    sync::Notify,
    time::{Instant, timeout},
};

use super::jwt::{Issuer, VerificationKey};

/// Timeout of one fetch.
const TIMEOUT: Duration = Duration::from_secs(5);
/// Maximum size of a key set, in bytes.
const MAX_BYTES: usize = 64 * 1024;
/// Maximum number of keys in a set.
const MAX_KEYS: usize = 64;
/// A token with an unknown key causes at most one fetch in this time, so that forged tokens cannot flood the issuer.
const MIN_INTERVAL: Duration = Duration::from_secs(30);
/// Back-off after a failed fetch.
const MIN_RETRY: Duration = Duration::from_secs(1);
const MAX_RETRY: Duration = Duration::from_secs(60);
/// How long a request waits for a fetch.
const MAX_WAIT: Duration = Duration::from_secs(2);

/// The location of a key set.
enum JwksLocation {
    File(String),
    Http { uri: Uri, client: Box<Client<HttpsConnector<HttpConnector>, Empty<Bytes>>> },
}

/// Fetches the keys of an issuer in the background.
pub(super) struct JwksSource {
    location: JwksLocation,
    refresh: Duration,
    stale: Duration,
    state: Mutex<FetchState>,
    /// Wakes the task of [`run`](Self::run) before its interval ends.
    wanted: Notify,
    /// Wakes the requests that wait for a fetch.
    fetched: Notify,
}

#[derive(Default)]
struct FetchState {
    /// Counts the different key sets.
    generation: u64,
    /// The last key set, as fetched.
    text: Bytes,
    /// The last successful fetch.
    succeeded: Option<Instant>,
    /// The last fetch that a token with an unknown key has caused.
    demanded: Option<Instant>,
}

impl JwksSource {
    /// # Errors
    /// A sentence without its subject: the address is not accepted.
    pub(super) fn new(address: &str, refresh: Duration, stale: Duration) -> Result<Self, String> {
        let wrong = || "needs https://HOST/PATH, file:PATH, or http:// with a loopback address".to_owned();
        let location = match address.strip_prefix("file:") {
            Some(path) => JwksLocation::File(path.to_owned()),
            None => {
                let uri: Uri = address.parse().map_err(|_| wrong())?;
                let host = uri.host().unwrap_or_default();
                let loopback = matches!(host, "localhost" | "127.0.0.1" | "[::1]");
                match uri.scheme_str() {
                    Some("https") => {}
                    Some("http") if loopback => {}
                    _ => return Err(wrong()),
                }
                let connector = HttpsConnectorBuilder::new()
                    .with_native_roots()
                    .map_err(|error| {
                        format!("cannot be fetched, because this machine has no root certificates: {error}")
                    })?
                    .https_or_http()
                    .enable_http1()
                    .build();
                let client = Box::new(Client::builder(TokioExecutor::new()).build(connector));
                JwksLocation::Http { uri, client }
            }
        };
        let (wanted, fetched) = (Notify::new(), Notify::new());
        Ok(JwksSource { location, refresh, stale, state: Mutex::default(), wanted, fetched })
    }

    /// Increases whenever the key set changes.
    pub(super) fn generation(&self) -> u64 {
        self.state.lock().generation
    }

    /// Whether the keys are recent enough to be used.
    pub(super) fn is_usable(&self) -> bool {
        self.state.lock().succeeded.is_some_and(|at| at.elapsed() < self.stale)
    }

    /// Waits until the keys have been fetched once more, for a token whose key is unknown or before the first fetch. Returns
    /// at once if such a fetch was made recently.
    pub(super) async fn demand(&self) {
        let fetched = self.fetched.notified();
        {
            let mut state = self.state.lock();
            let first = state.succeeded.is_none();
            if !first && state.demanded.is_some_and(|at| at.elapsed() < MIN_INTERVAL) {
                return;
            }
            if !first {
                state.demanded = Some(Instant::now());
            }
        }
        self.wanted.notify_one();
        // On a timeout the keys are as they were.
        let _ = timeout(MAX_WAIT, fetched).await;
    }

    /// Fetches the keys for ever.
    pub(super) async fn run(self: Arc<Self>, issuer: Arc<Issuer>) {
        let mut retry = MIN_RETRY;
        loop {
            let pause = match timeout(TIMEOUT, self.fetch()).await.unwrap_or_else(|_| Err("timeout".to_owned())) {
                Ok((keys, text)) => {
                    *issuer.keys.write() = keys.into();
                    let mut state = self.state.lock();
                    state.succeeded = Some(Instant::now());
                    if state.text != text {
                        state.generation += 1;
                        state.text = text;
                    }
                    retry = MIN_RETRY;
                    self.refresh
                }
                Err(reason) => {
                    tracing::warn!(issuer = issuer.issuer, reason, "cannot fetch the keys of an issuer of tokens");
                    let pause = retry;
                    retry = (retry * 2).min(MAX_RETRY);
                    pause
                }
            };
            self.fetched.notify_waiters();
            // A demand during the back-off waits for its end, so that forged tokens do not shorten it.
            match retry == MIN_RETRY {
                true => drop(timeout(pause, self.wanted.notified()).await),
                false => tokio::time::sleep(pause).await,
            }
        }
    }

    async fn fetch(&self) -> Result<(Vec<VerificationKey>, Bytes), String> {
        let text = match &self.location {
            JwksLocation::File(path) => {
                let bytes = fs::read(path).map_err(|error| error.to_string())?;
                if bytes.len() > MAX_BYTES {
                    return Err("the key set is larger than 64 KiB".into());
                }
                Bytes::from(bytes)
            }
            JwksLocation::Http { uri, client } => {
                let response = client.get(uri.clone()).await.map_err(|error| error.to_string())?;
                // Redirects are not followed: the address is a setting.
                if !response.status().is_success() {
                    return Err(format!("the response has the status {}", response.status()));
                }
                let body = Limited::new(response.into_body(), MAX_BYTES).collect().await;
                body.map_err(|error| error.to_string())?.to_bytes()
            }
        };
        #[derive(serde::Deserialize)]
        struct KeySet {
            keys: Vec<serde_json::Value>,
        }
        let set: KeySet = serde_json::from_slice(&text).map_err(|error| format!("not a key set: {error}"))?;
        if set.keys.len() > MAX_KEYS {
            return Err(format!("the set has more than {MAX_KEYS} keys"));
        }
        // Keys of unknown kinds are ignored (RFC 7517, section 5).
        let usable = |key: serde_json::Value| VerificationKey::jwk(&serde_json::from_value::<Jwk>(key).ok()?);
        let keys: Vec<_> = set.keys.into_iter().filter_map(usable).collect();
        if keys.is_empty() {
            return Err("the set has no key that verifies signatures".into());
        }
        Ok((keys, text))
    }
}
