//! JSON Web Tokens (RFC 7519) as bearer tokens.
//!
//! The claim `iss` selects the [`Issuer`]; exactly one key and one algorithm of it verify the signature. The header selects
//! neither a key that the issuer does not have nor an algorithm that is not configured (RFC 8725, sections 3.1 and 3.2).

use std::{sync::Arc, time::Duration};

use base64::{Engine, engine::general_purpose::URL_SAFE_NO_PAD as BASE64URL};
use jsonwebtoken::{
    Algorithm, AlgorithmFamily, DecodingKey, EncodingKey, Header,
    jwk::{AlgorithmParameters, EllipticCurve, Jwk, PublicKeyUse},
};
use parking_lot::RwLock;
use serde_json::{Map, Value};

use super::grant::{GrantRules, Label};
use crate::config::JwtSection;

/// Maximum length of a token, in bytes.
pub(crate) const MAX_TOKEN: usize = 8 * 1024;
/// Maximum length of a subject, in bytes.
pub(crate) const MAX_SUBJECT: usize = 128;
/// Maximum number of labels, and the maximum length of a name or value in bytes.
const MAX_LABELS: usize = 8;
const MAX_LABEL: usize = 64;
/// Minimum length of a shared secret, in bytes (RFC 7518, section 3.2).
const MIN_SECRET: usize = 32;
/// Prefixes of the subjects that only weir itself assigns.
const RESERVED_SUBJECTS: [&str; 3] = ["key:", "cert:", "compat:"];

/// The tokens of one issuer.
pub(crate) struct Issuer {
    pub(crate) issuer: String,
    pub(crate) audience: String,
    pub(crate) algorithms: Vec<Algorithm>,
    /// Tolerated difference of clocks, in seconds.
    pub(crate) leeway: u64,
    /// Maximum of `exp` − `iat`, in seconds.
    pub(crate) max_ttl: u64,
    /// The claim with the permissions.
    pub(crate) claim: String,
    /// Dotted path of a claim with names of roles, if there is one.
    pub(crate) roles_claim: String,
    /// Precedes every subject.
    pub(crate) prefix: String,
    pub(crate) keys: RwLock<Arc<[VerificationKey]>>,
}

/// A key that verifies signatures.
pub(crate) struct VerificationKey {
    id: Option<String>,
    key: DecodingKey,
    /// The secret before the last rotation.
    previous: Option<DecodingKey>,
    /// The algorithms that fit the key.
    algorithms: Vec<Algorithm>,
}

/// The claims of a token whose signature and times are valid.
#[derive(Debug)]
pub(crate) struct VerifiedClaims {
    pub(crate) subject: String,
    /// Unix seconds, without the leeway.
    pub(crate) expires: u64,
    pub(crate) rules: GrantRules,
    /// Roles that the permissions name: an unknown one is an error.
    pub(crate) roles: Vec<String>,
    /// Roles of `roles_claim`: unknown ones are ignored.
    pub(crate) provider_roles: Vec<String>,
    pub(crate) labels: Vec<Label>,
}

/// The reason to reject a token.
#[derive(Debug, PartialEq)]
pub(crate) enum TokenError {
    /// Not valid. The text is a sentence that does not quote claims unless the signature is valid.
    Invalid(String),
    Expired,
    /// The issuer is known and has no key that fits. New keys may have been published.
    UnknownKey,
}

/// A token that has been read, but not verified.
pub(crate) struct UnverifiedToken<'a> {
    signed: &'a str,
    signature: &'a str,
    algorithm: Algorithm,
    key_id: Option<String>,
    claims: Map<String, Value>,
}

// === impl UnverifiedToken ===

impl<'a> UnverifiedToken<'a> {
    /// Whether a credential has the form of a token: three parts separated by dots.
    pub(crate) fn is_token(text: &str) -> bool {
        text.bytes().filter(|byte| *byte == b'.').count() == 2
    }

    pub(crate) fn read(text: &'a str) -> Result<Self, TokenError> {
        if text.len() > MAX_TOKEN {
            return Err(invalid("the token is longer than 8 KiB"));
        }
        let (signed, signature) = text.rsplit_once('.').ok_or_else(malformed)?;
        let (header, claims) = signed.split_once('.').ok_or_else(malformed)?;
        let mut header = object(header)?;
        if header.contains_key("crit") || header.contains_key("b64") {
            return Err(invalid("the header has a critical extension"));
        }
        match header.get("typ") {
            None => {}
            Some(Value::String(kind)) if ["JWT", "at+jwt"].iter().any(|known| kind.eq_ignore_ascii_case(known)) => {}
            Some(_) => return Err(invalid("typ must be JWT, at+jwt or absent")),
        }
        let algorithm = match header.remove("alg") {
            Some(Value::String(name)) => name.parse().map_err(|_| invalid("the algorithm is not accepted"))?,
            _ => return Err(malformed()),
        };
        let key_id = match header.remove("kid") {
            None => None,
            Some(Value::String(id)) => Some(id),
            Some(_) => return Err(malformed()),
        };
        Ok(UnverifiedToken { signed, signature, algorithm, key_id, claims: object(claims)? })
    }

    /// The claim `iss`, which selects the issuer.
    pub(crate) fn issuer(&self) -> &str {
        self.claims.get("iss").and_then(Value::as_str).unwrap_or_default()
    }
}

/// Decodes a JSON object. A member that occurs twice is an error, because parsers differ in which one they take.
fn object(part: &str) -> Result<Map<String, Value>, TokenError> {
    let json = BASE64URL.decode(part).map_err(|_| malformed())?;
    match serde_json::from_slice(&json) {
        Ok(StrictValue(Value::Object(object))) => Ok(object),
        _ => Err(malformed()),
    }
}

fn invalid(reason: impl Into<String>) -> TokenError {
    TokenError::Invalid(reason.into())
}

fn malformed() -> TokenError {
    invalid("the token is malformed")
}

// === impl Issuer ===

impl Issuer {
    /// Verifies the signature, then the claims. `now`: Unix seconds.
    pub(crate) fn verify(&self, token: UnverifiedToken<'_>, now: u64) -> Result<VerifiedClaims, TokenError> {
        let UnverifiedToken { signed, signature, algorithm, key_id, claims } = token;
        if !self.algorithms.contains(&algorithm) {
            return Err(invalid("the algorithm is not accepted"));
        }
        let keys = self.keys.read().clone();
        let mut fitting = keys.iter().filter(|key| {
            key.algorithms.contains(&algorithm)
                && key_id.as_ref().is_none_or(|id| key.id.as_ref().is_none_or(|own| own == id))
        });
        let key = match (fitting.next(), fitting.next()) {
            (Some(key), None) => key,
            (None, _) => return Err(TokenError::UnknownKey),
            // Trying several keys would let a token choose its key.
            (Some(_), Some(_)) => return Err(invalid("the token does not name its key (kid)")),
        };
        let verifies =
            |key| matches!(jsonwebtoken::crypto::verify(signature, signed.as_bytes(), key, algorithm), Ok(true));
        if verifies(&key.key) || key.previous.as_ref().is_some_and(verifies) {
            self.check(&claims, now)
        } else {
            Err(invalid("the signature is not valid"))
        }
    }

    /// Checks the claims of a token whose signature is valid, so that errors may name them.
    fn check(&self, claims: &Map<String, Value>, now: u64) -> Result<VerifiedClaims, TokenError> {
        let time = |name: &str| match claims.get(name) {
            None => Ok(None),
            Some(Value::Number(number)) => match number.as_f64() {
                Some(seconds) if (0.0..1e12).contains(&seconds) => Ok(Some(seconds as u64)),
                _ => Err(invalid(format!("{name} is not a time in Unix seconds"))),
            },
            Some(_) => Err(invalid(format!("{name} is not a number"))),
        };
        let required = |name: &str| time(name)?.ok_or_else(|| invalid(format!("the claim {name} is missing")));
        let (expires, issued, not_before) = (required("exp")?, required("iat")?, time("nbf")?);
        if expires + self.leeway <= now {
            return Err(TokenError::Expired);
        }
        if issued > now + self.leeway || not_before.is_some_and(|time| time > now + self.leeway) {
            return Err(invalid("the token is not valid yet (iat, nbf)"));
        }
        if expires.saturating_sub(issued) > self.max_ttl {
            return Err(invalid(format!("exp − iat is longer than max_ttl ({} s)", self.max_ttl)));
        }
        let is_audience = |value: &Value| value.as_str() == Some(&*self.audience);
        if !claims
            .get("aud")
            .is_some_and(|aud| is_audience(aud) || aud.as_array().is_some_and(|all| all.iter().any(is_audience)))
        {
            return Err(invalid(format!("aud does not contain {}", self.audience)));
        }
        // Proof of possession needs a client certificate.
        if claims.contains_key("cnf") {
            return Err(invalid("the token is bound to a key (cnf)"));
        }
        let subject = match claims.get("sub") {
            Some(Value::String(subject)) => format!("{}{subject}", self.prefix),
            _ => return Err(invalid("the claim sub is missing or not text")),
        };
        check_subject(&subject).map_err(invalid)?;
        let empty = Map::new();
        let permissions = match claims.get(&self.claim) {
            None => &empty,
            Some(Value::Object(permissions)) => permissions,
            Some(_) => return Err(invalid(format!("the claim {} is not an object", self.claim))),
        };
        let rules = GrantRules::from_json(permissions, &["roles", "labels"])
            .map_err(|reason| invalid(format!("the claim {}: {reason}", self.claim)))?;
        Ok(VerifiedClaims {
            subject,
            expires,
            rules,
            roles: texts(permissions.get("roles")).ok_or_else(|| invalid("roles is not a list of text"))?,
            provider_roles: self.provider_roles(claims),
            labels: labels(permissions.get("labels"))?,
        })
    }

    /// The roles at the dotted path `roles_claim`: a list, or text separated by spaces.
    fn provider_roles(&self, claims: &Map<String, Value>) -> Vec<String> {
        if self.roles_claim.is_empty() {
            return Vec::new();
        }
        let mut names = self.roles_claim.split('.');
        let first = names.next().and_then(|name| claims.get(name));
        match names.try_fold(first, |value, name| value.map(|value| value.get(name))) {
            Some(Some(Value::String(text))) => text.split_whitespace().map(str::to_owned).collect(),
            Some(list) => texts(list).unwrap_or_default(),
            None => Vec::new(),
        }
    }
}

/// Checks the subject of a credential that weir does not issue itself.
///
/// # Errors
/// A sentence.
pub(crate) fn check_subject(subject: &str) -> Result<(), String> {
    if subject.is_empty() || subject.len() > MAX_SUBJECT || subject.chars().any(char::is_control) {
        return Err(format!("a subject has 1 to {MAX_SUBJECT} bytes without control characters"));
    }
    match RESERVED_SUBJECTS.iter().find(|prefix| subject.starts_with(**prefix)) {
        Some(prefix) => Err(format!("subjects that begin with {prefix} are reserved")),
        None => Ok(()),
    }
}

fn texts(value: Option<&Value>) -> Option<Vec<String>> {
    match value {
        None => Some(Vec::new()),
        Some(value) => value.as_array()?.iter().map(|text| text.as_str().map(str::to_owned)).collect(),
    }
}

fn labels(value: Option<&Value>) -> Result<Vec<Label>, TokenError> {
    let wrong = || invalid(format!("labels is an object of at most {MAX_LABELS} texts of at most {MAX_LABEL} bytes"));
    let Some(value) = value else { return Ok(Vec::new()) };
    let object = value.as_object().filter(|object| object.len() <= MAX_LABELS).ok_or_else(wrong)?;
    let fits = |text: &str| text.len() <= MAX_LABEL && !text.chars().any(char::is_control);
    let label = |(name, value): (&String, &Value)| {
        let value = value.as_str().filter(|value| fits(name) && fits(value))?;
        Some((name.as_str().into(), value.into()))
    };
    object.iter().map(label).collect::<Option<_>>().ok_or_else(wrong)
}

// === impl VerificationKey ===

impl VerificationKey {
    /// A shared secret, and the one before it, which stays valid during a rotation.
    pub(crate) fn secret(secret: &str, previous: &str) -> Result<Self, String> {
        let key = |secret: &str| match secret.len() < MIN_SECRET {
            true => Err(format!("needs at least {MIN_SECRET} bytes")),
            false => DecodingKey::from_secret(secret.as_bytes()).map_err(|error| error.to_string()),
        };
        let previous = if previous.is_empty() { None } else { Some(key(previous)?) };
        Ok(VerificationKey { id: None, key: key(secret)?, previous, algorithms: fitting(AlgorithmFamily::Hmac, None) })
    }

    /// Reads a public key in PEM.
    pub(crate) fn pem(text: &str) -> Result<Self, String> {
        let bytes = text.as_bytes();
        let key = DecodingKey::from_rsa_pem(bytes)
            .or_else(|_| DecodingKey::from_ec_pem(bytes))
            .or_else(|_| DecodingKey::from_ed_pem(bytes))
            .map_err(|_| "needs a public key in PEM: RSA of 2048 bits or more, P-256, P-384 or Ed25519".to_owned())?;
        let algorithms = fitting(key.family(), None);
        Ok(VerificationKey { id: None, key, previous: None, algorithms })
    }

    /// `None` for keys that verify no token here: symmetric ones, those for encryption, unknown curves.
    pub(crate) fn jwk(jwk: &Jwk) -> Option<Self> {
        let curve = match &jwk.algorithm {
            AlgorithmParameters::EllipticCurve(key) => Some(&key.curve),
            AlgorithmParameters::OctetKeyPair(key) if key.curve == EllipticCurve::Ed25519 => None,
            AlgorithmParameters::RSA(_) => None,
            _ => return None,
        };
        if jwk.common.public_key_use.as_ref().is_some_and(|usage| *usage != PublicKeyUse::Signature) {
            return None;
        }
        let key = DecodingKey::from_jwk(jwk).ok()?;
        let mut algorithms = fitting(key.family(), curve);
        if let Some(algorithm) = jwk.common.key_algorithm {
            let algorithm = algorithm.to_string().parse().ok()?;
            algorithms.retain(|fitting| *fitting == algorithm);
        }
        (!algorithms.is_empty()).then(|| VerificationKey {
            id: jwk.common.key_id.clone(),
            key,
            previous: None,
            algorithms,
        })
    }
}

/// The algorithms of a family of keys, of one curve if it is known.
fn fitting(family: AlgorithmFamily, curve: Option<&EllipticCurve>) -> Vec<Algorithm> {
    let mut algorithms = family.algorithms().to_vec();
    algorithms.retain(|algorithm| match curve {
        Some(EllipticCurve::P256) => *algorithm == Algorithm::ES256,
        Some(EllipticCurve::P384) => *algorithm == Algorithm::ES384,
        Some(_) => false,
        None => true,
    });
    algorithms
}

// === impl TokenRequest ===

/// A token to be signed.
pub(crate) struct TokenRequest<'a> {
    pub(crate) subject: &'a str,
    /// `VERB=PATTERN`.
    pub(crate) grants: &'a [String],
    pub(crate) roles: &'a [String],
    pub(crate) ttl: Duration,
}

impl TokenRequest<'_> {
    /// Signs the token by the secret of an issuer. Returns it with its end, in Unix milliseconds.
    ///
    /// # Errors
    /// A sentence.
    pub(crate) fn sign(&self, issuer: &JwtSection) -> Result<(String, u64), String> {
        if issuer.secret.is_empty() {
            return Err("auth.jwt.secret is missing: tokens are signed with it".into());
        }
        if self.ttl > issuer.max_ttl {
            return Err(format!("a token lives for at most auth.jwt.max_ttl ({} s)", issuer.max_ttl.as_secs()));
        }
        check_subject(&format!("{}{}", issuer.prefix, self.subject))?;
        let mut permissions = Map::new();
        for grant in self.grants {
            let (verb, pattern) = grant.split_once('=').ok_or_else(|| format!("{grant:?} is not VERB=PATTERN"))?;
            let list = permissions.entry(verb).or_insert_with(|| Value::Array(Vec::new()));
            if let Value::Array(list) = list {
                list.push(pattern.into());
            }
        }
        if !self.roles.is_empty() {
            permissions.insert("roles".into(), self.roles.into());
        }
        GrantRules::from_json(&permissions, &["roles"])?;
        let issued = jsonwebtoken::get_current_timestamp();
        let expires = issued + self.ttl.as_secs();
        let claims = serde_json::json!({
            "iss": issuer.issuer,
            "aud": issuer.audience,
            "sub": self.subject,
            "iat": issued,
            "exp": expires,
            &*issuer.claim: permissions,
        });
        let algorithm = issuer.algorithms.first().map_or("HS256", String::as_str);
        let algorithm = algorithm.parse().map_err(|_| format!("{algorithm:?} is not an algorithm"))?;
        let signed = EncodingKey::from_secret(issuer.secret.reveal().as_bytes())
            .and_then(|key| jsonwebtoken::encode(&Header::new(algorithm), &claims, &key));
        signed.map(|token| (token, expires * 1000)).map_err(|error| error.to_string())
    }
}

// === StrictValue ===

/// A JSON value whose objects have no member twice.
struct StrictValue(Value);

impl<'de> serde::Deserialize<'de> for StrictValue {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(StrictVisitor).map(StrictValue)
    }
}

struct StrictVisitor;

impl<'de> serde::de::Visitor<'de> for StrictVisitor {
    type Value = Value;

    fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("JSON without repeated members")
    }

    fn visit_bool<E>(self, value: bool) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_i64<E>(self, value: i64) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_u64<E>(self, value: u64) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_f64<E>(self, value: f64) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_str<E>(self, value: &str) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_unit<E>(self) -> Result<Value, E> {
        Ok(Value::Null)
    }

    fn visit_seq<A: serde::de::SeqAccess<'de>>(self, mut items: A) -> Result<Value, A::Error> {
        let mut list = Vec::new();
        while let Some(StrictValue(item)) = items.next_element()? {
            list.push(item);
        }
        Ok(list.into())
    }

    fn visit_map<A: serde::de::MapAccess<'de>>(self, mut members: A) -> Result<Value, A::Error> {
        let mut object = Map::new();
        while let Some((name, StrictValue(value))) = members.next_entry::<String, _>()? {
            if object.insert(name, value).is_some() {
                return Err(serde::de::Error::custom("a member is repeated"));
            }
        }
        Ok(object.into())
    }
}
