//! API keys: random text that weir stores, and finds, as its SHA-256.
//!
//! A key of 256 random bits cannot be guessed, so a slow hash would only help floods.

use base64::{Engine, engine::general_purpose::URL_SAFE_NO_PAD as BASE64URL};
use rustix::rand::{GetRandomFlags, getrandom};
use sha2::{Digest, Sha256};

/// Prefix of the keys that weir generates.
pub(crate) const PREFIX: &str = "weir_";
/// Minimum length of a key, in characters.
pub(crate) const MIN_LENGTH: usize = 32;

/// SHA-256 of a key, prefix included.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct KeyDigest([u8; 32]);

/// A new key: [`PREFIX`] and 43 characters of base64url.
pub(crate) fn generate() -> String {
    let mut secret = [0; 32];
    // Fails only if it is interrupted while the kernel still waits for entropy.
    while getrandom(&mut secret, GetRandomFlags::empty()) != Ok(secret.len()) {}
    format!("{PREFIX}{}", BASE64URL.encode(secret))
}

impl KeyDigest {
    pub(crate) fn of(key: &str) -> Self {
        KeyDigest(Sha256::digest(key.as_bytes()).into())
    }

    /// Reads `sha256:HEX`.
    ///
    /// # Errors
    /// A sentence without its subject.
    pub(crate) fn parse(text: &str) -> Result<Self, String> {
        let wrong = || "needs sha256: and 64 hexadecimal digits; `weir key hash` prints it".to_owned();
        let hex = text.strip_prefix("sha256:").filter(|hex| hex.len() == 64 && hex.is_ascii()).ok_or_else(wrong)?;
        let mut digest = [0; 32];
        for (n, byte) in digest.iter_mut().enumerate() {
            *byte = u8::from_str_radix(&hex[2 * n..2 * n + 2], 16).map_err(|_| wrong())?;
        }
        Ok(KeyDigest(digest))
    }
}

impl std::fmt::Display for KeyDigest {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("sha256:")?;
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_has_a_digest() {
        let key = generate();
        assert_eq!(key.len(), PREFIX.len() + 43);
        assert_ne!(key, generate());
        let digest = KeyDigest::parse(&KeyDigest::of(&key).to_string()).unwrap();
        assert!(digest == KeyDigest::of(&key) && digest != KeyDigest::of("weir_other"));
        // echo -n abc | sha256sum
        assert!(KeyDigest::of("abc").to_string().starts_with("sha256:ba7816bf"));
        for bad in ["", "sha256:", "sha256:xyz", &format!("sha256:{}", "g".repeat(64)), &"a".repeat(64)] {
            assert!(KeyDigest::parse(bad).is_err(), "{bad}");
        }
    }
}
