//! [`SigningKey`]: JSON Web Tokens with HS256, the only kind that GRIP proxies and publishers exchange.

use jsonwebtoken::{
    Algorithm, DecodingKey, EncodingKey, Header, Validation,
    errors::{ErrorKind, Result as JwtResult},
};
use rustix::rand::{GetRandomFlags, getrandom};
use serde::{Serialize, de::IgnoredAny};

/// Lifetime of the tokens that weir signs, in seconds.
const LIFETIME: u64 = 60 * 60;

/// A shared secret: signs the proxy's tokens and verifies those of publishers.
pub(super) struct SigningKey {
    signing: EncodingKey,
    verifying: DecodingKey,
}

#[derive(Serialize)]
struct TokenClaims<'a> {
    exp: u64,
    iss: &'a str,
}

impl SigningKey {
    /// Fails for an empty secret.
    pub(super) fn new(secret: &[u8]) -> JwtResult<Self> {
        Ok(SigningKey { signing: EncodingKey::from_secret(secret)?, verifying: DecodingKey::from_secret(secret)? })
    }

    /// A key that only this process has.
    pub(super) fn random() -> JwtResult<Self> {
        let mut secret = [0; 32];
        // Fails only if it is interrupted while the kernel still waits for entropy.
        while getrandom(&mut secret, GetRandomFlags::empty()) != Ok(secret.len()) {}
        Self::new(&secret)
    }

    /// A token of `iss` that is valid for an hour.
    pub(super) fn sign(&self, iss: &str) -> JwtResult<String> {
        self.sign_until(iss, jsonwebtoken::get_current_timestamp() + LIFETIME)
    }

    fn sign_until(&self, iss: &str, exp: u64) -> JwtResult<String> {
        jsonwebtoken::encode(&Header::new(Algorithm::HS256), &TokenClaims { exp, iss }, &self.signing)
    }

    /// Checks the signature, `exp` and `nbf` (with a leeway of one minute) and, if `iss` is given, the issuer. The
    /// error says why the token is rejected.
    pub(super) fn verify(&self, token: &str, iss: Option<&str>) -> Result<(), &'static str> {
        let mut validation = Validation::new(Algorithm::HS256);
        validation.validate_nbf = true;
        // GRIP defines no audience.
        validation.validate_aud = false;
        if let Some(iss) = iss {
            validation.set_issuer(&[iss]);
            validation.set_required_spec_claims(&["exp", "iss"]);
        }
        let decoded = jsonwebtoken::decode::<IgnoredAny>(token, &self.verifying, &validation);
        decoded.map(drop).map_err(|error| match error.kind() {
            ErrorKind::InvalidSignature => "the signature is not of this key",
            ErrorKind::InvalidAlgorithm => "the token is not signed by HS256",
            ErrorKind::MissingRequiredClaim(claim) if claim == "exp" => "the token never expires",
            ErrorKind::MissingRequiredClaim(_) | ErrorKind::InvalidIssuer => "the token is of another issuer",
            ErrorKind::ExpiredSignature => "the token has expired",
            ErrorKind::ImmatureSignature => "the token is not valid yet",
            _ => "the token is malformed",
        })
    }
}

#[cfg(test)]
mod tests {
    use base64::{Engine, engine::general_purpose::URL_SAFE_NO_PAD as BASE64URL};

    use super::*;

    fn key() -> SigningKey {
        SigningKey::new(b"secret").unwrap()
    }

    #[test]
    fn signed_tokens_are_accepted_and_all_others_rejected() {
        let key = key();
        let token = key.sign("pushpin").unwrap();
        assert!(token.starts_with(&BASE64URL.encode(r#"{"typ":"JWT","alg":"HS256"}"#)));
        assert_eq!(key.verify(&token, None), Ok(()));
        assert_eq!(key.verify(&token, Some("pushpin")), Ok(()));
        assert_eq!(key.verify(&token, Some("other")), Err("the token is of another issuer"));
        let other = SigningKey::new(b"secreT").unwrap();
        assert_eq!(other.verify(&token, None), Err("the signature is not of this key"));
        let now = jsonwebtoken::get_current_timestamp();
        assert_eq!(key.verify(&key.sign_until("a", now - 100).unwrap(), None), Err("the token has expired"));
        assert_eq!(key.verify(&key.sign_until("a", now - 10).unwrap(), None), Ok(()));
        for token in ["", "a", "a.b", "a.b.c", "..", &token[..token.len() - 5]] {
            assert!(key.verify(token, None).is_err(), "{token}");
        }
    }

    /// Made by jose 5 (`new SignJWT({iss: "realm"}).setProtectedHeader({alg: "HS256"}).setExpirationTime(4102444800)`).
    #[test]
    fn tokens_of_jose_are_accepted() {
        let token = "eyJhbGciOiJIUzI1NiJ9.eyJpc3MiOiJyZWFsbSIsImV4cCI6NDEwMjQ0NDgwMH0.oXse0DbDkJISlsXHoqm8ienl9wigti0oU9uV1lS0GZA";
        assert_eq!(key().verify(token, Some("realm")), Ok(()));
    }

    #[test]
    fn the_header_does_not_choose_the_algorithm() {
        let verify = |header: &str, claims: &str| {
            let signed = format!("{}.{}", BASE64URL.encode(header), BASE64URL.encode(claims));
            let signature = jsonwebtoken::crypto::sign(signed.as_bytes(), &key().signing, Algorithm::HS256).unwrap();
            (key().verify(&format!("{signed}."), None), key().verify(&format!("{signed}.{signature}"), None))
        };
        let lasting = r#"{"exp":99999999999}"#;
        let (unsigned, signed) = verify(r#"{"alg":"none"}"#, lasting);
        assert!(unsigned.is_err());
        assert_eq!(signed, Err("the token is malformed"));
        let (unsigned, signed) = verify(r#"{"alg":"HS512"}"#, lasting);
        assert_eq!(
            (unsigned, signed),
            (Err("the token is not signed by HS256"), Err("the token is not signed by HS256"))
        );
        let (unsigned, signed) = verify(r#"{"alg":"HS256"}"#, lasting);
        assert_eq!((unsigned, signed), (Err("the signature is not of this key"), Ok(())));
        assert_eq!(verify(r#"{"alg":"HS256"}"#, "{}").1, Err("the token never expires"));
        assert_eq!(verify(r#"{"alg":"HS256"}"#, r#"{"exp":99999999999,"aud":"other"}"#).1, Ok(()));
        let early = r#"{"exp":99999999999,"nbf":99999999990}"#;
        assert_eq!(verify(r#"{"alg":"HS256"}"#, early).1, Err("the token is not valid yet"));
    }
}
