//! JSON Web Tokens by HS256, the only kind that GRIP's proxies and publishers exchange.

use std::time::{SystemTime, UNIX_EPOCH};

use aws_lc_rs::{constant_time, hmac};
use base64::{Engine, engine::general_purpose::URL_SAFE_NO_PAD as BASE64URL};
use serde::Deserialize;

/// Clocks of two machines may differ by so much.
const LEEWAY: u64 = 60;
/// How long what weir signs is good.
const LIFE: u64 = 60 * 60;

/// Signs, and verifies what others signed.
pub struct Key(hmac::Key);

#[derive(Deserialize)]
struct Header<'a> {
    #[serde(borrow)]
    alg: std::borrow::Cow<'a, str>,
}

/// What a token claims. More than this is nobody's business here.
#[derive(Debug, Deserialize)]
struct Claims {
    iss: Option<String>,
    /// A fraction is legal.
    exp: Option<f64>,
    nbf: Option<f64>,
}

impl Key {
    pub fn new(secret: &[u8]) -> Self {
        Key(hmac::Key::new(hmac::HMAC_SHA256, secret))
    }

    /// A key that nobody else has.
    pub fn random() -> Self {
        let mut secret = [0; 32];
        // Fails only where the system has no randomness, and then TLS has none either.
        let _ = aws_lc_rs::rand::fill(&mut secret);
        Self::new(&secret)
    }

    /// A token of `iss` that is good for an hour.
    pub fn sign(&self, iss: &str) -> String {
        self.sign_until(iss, now() + LIFE)
    }

    fn sign_until(&self, iss: &str, exp: u64) -> String {
        let claims = serde_json::json!({ "exp": exp, "iss": iss }).to_string();
        let mut token = BASE64URL.encode(br#"{"typ":"JWT","alg":"HS256"}"#);
        token.push('.');
        BASE64URL.encode_string(claims, &mut token);
        let signature = hmac::sign(&self.0, token.as_bytes());
        token.push('.');
        BASE64URL.encode_string(signature.as_ref(), &mut token);
        token
    }

    /// Why a token is not good, if it is not. Without `iss` any issuer will do.
    pub fn verify(&self, token: &str, iss: Option<&str>) -> Result<(), &'static str> {
        const MALFORMED: &str = "the token is malformed";
        let (signed, signature) = token.rsplit_once('.').ok_or(MALFORMED)?;
        let (header, claims) = signed.split_once('.').ok_or(MALFORMED)?;
        let decode = |part: &str| BASE64URL.decode(part.trim_end_matches('=')).map_err(|_| MALFORMED);
        // Before anything is believed: a token may claim to need no signature.
        hmac::verify(&self.0, signed.as_bytes(), &decode(signature)?)
            .map_err(|_| "the signature is not of this key")?;
        let header = decode(header)?;
        let header: Header<'_> = serde_json::from_slice(&header).map_err(|_| MALFORMED)?;
        if header.alg != "HS256" {
            return Err("the token is not signed by HS256");
        }
        let claims: Claims = serde_json::from_slice(&decode(claims)?).map_err(|_| MALFORMED)?;
        let now = now();
        match claims.exp {
            None => return Err("the token never expires"),
            Some(exp) if exp + LEEWAY as f64 <= now as f64 => return Err("the token has expired"),
            Some(_) => {}
        }
        if claims.nbf.is_some_and(|nbf| nbf > (now + LEEWAY) as f64) {
            return Err("the token is not valid yet");
        }
        match iss {
            Some(iss) if claims.iss.as_deref() != Some(iss) => Err("the token is of another issuer"),
            _ => Ok(()),
        }
    }
}

/// Whether two secrets are the same, in a time that does not tell where they differ.
pub fn is_same(one: &[u8], other: &[u8]) -> bool {
    constant_time::verify_slices_are_equal(one, other).is_ok()
}

/// A short name for something long.
pub fn digest(bytes: &[u8]) -> String {
    BASE64URL.encode(aws_lc_rs::digest::digest(&aws_lc_rs::digest::SHA256, bytes))
}

fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |time| time.as_secs())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_signed_is_believed_and_nothing_else() {
        let key = Key::new(b"secret");
        let token = key.sign("pushpin");
        assert_eq!(key.verify(&token, None), Ok(()));
        assert_eq!(key.verify(&token, Some("pushpin")), Ok(()));
        assert_eq!(key.verify(&token, Some("other")), Err("the token is of another issuer"));
        assert_eq!(Key::new(b"secreT").verify(&token, None), Err("the signature is not of this key"));
        assert_eq!(key.verify(&key.sign_until("a", now() - 100), None), Err("the token has expired"));
        assert_eq!(key.verify(&key.sign_until("a", now() - 10), None), Ok(()));
        for token in ["", "a", "a.b", "a.b.c", "..", &token[..token.len() - 5]] {
            assert!(key.verify(token, None).is_err(), "{token}");
        }
    }

    /// Made by jose 5 (`new SignJWT({iss: "realm"}).setProtectedHeader({alg: "HS256"}).setExpirationTime(4102444800)`).
    #[test]
    fn a_token_of_another_library() {
        let token = "eyJhbGciOiJIUzI1NiJ9.eyJpc3MiOiJyZWFsbSIsImV4cCI6NDEwMjQ0NDgwMH0.oXse0DbDkJISlsXHoqm8ienl9wigti0oU9uV1lS0GZA";
        assert_eq!(Key::new(b"secret").verify(token, Some("realm")), Ok(()));
    }

    #[test]
    fn no_signature_is_no_signature() {
        let key = Key::new(b"secret");
        let none = BASE64URL.encode(br#"{"alg":"none"}"#);
        let claims = BASE64URL.encode(br#"{"exp":99999999999}"#);
        assert!(key.verify(&format!("{none}.{claims}."), None).is_err());
        let signed = format!("{none}.{claims}");
        let signature = BASE64URL.encode(hmac::sign(&key.0, signed.as_bytes()).as_ref());
        assert_eq!(key.verify(&format!("{signed}.{signature}"), None), Err("the token is not signed by HS256"));
        let lasting = format!("{}.{}", BASE64URL.encode(br#"{"alg":"HS256"}"#), BASE64URL.encode(b"{}"));
        let signature = BASE64URL.encode(hmac::sign(&key.0, lasting.as_bytes()).as_ref());
        assert_eq!(key.verify(&format!("{lasting}.{signature}"), None), Err("the token never expires"));
    }
}
