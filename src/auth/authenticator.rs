//! [`Authenticator`]: from the credentials of a request to an [`Identity`].

use std::{collections::HashMap, fs, sync::Arc};

use http::{HeaderMap, HeaderValue, header, request::Parts};
use indexmap::IndexMap;
use jsonwebtoken::Algorithm;
use parking_lot::{Mutex, RwLock};
use serde_json::{Value, json};
use time::{OffsetDateTime, format_description::well_known::Rfc3339};
use tokio::task::JoinHandle;

use super::{
    grant::{GrantRules, Label, Role, TemplateValues, Verb},
    identity::{Identity, Principal},
    jwks::JwksSource,
    jwt::{Issuer, TokenError, UnverifiedToken, VerificationKey, VerifiedClaims},
    key::{KeyDigest, MIN_LENGTH, PREFIX},
};
use crate::{
    config::{AuthSection, JwtSection, KeyRule},
    error::{Code, Error, Result},
};

/// Maximum number of verified tokens that are remembered.
const MAX_VERIFIED: usize = 10_000;
/// Names of query parameters that would put a credential into logs of proxies and into the history of browsers.
const IN_URL: [&str; 4] = ["token", "access_token", "jwt", "api_key"];

/// The credentials and roles of the configuration.
pub(crate) struct Authenticator {
    /// `None` while authentication is off.
    anonymous: Option<Identity>,
    keys: HashMap<KeyDigest, (Credential, Identity)>,
    roles: HashMap<Box<str>, Arc<Role>>,
    /// Names of the roles of every client.
    common: Vec<String>,
    issuers: Vec<Arc<TokenIssuer>>,
    /// Identities of tokens, by the digest of the token. A rejected token is not remembered: it could be accepted later.
    verified: Mutex<IndexMap<KeyDigest, VerifiedToken>>,
    now: fn() -> u64,
}

/// A token that was verified, and is valid while its issuer has the same keys.
#[derive(Clone)]
struct VerifiedToken {
    identity: Identity,
    issuer: Arc<TokenIssuer>,
    generation: u64,
}

struct TokenIssuer {
    issuer: Arc<Issuer>,
    jwks: Option<Arc<JwksSource>>,
    /// Names of the roles of every token.
    roles: Vec<String>,
}

/// What a valid key or token grants.
#[derive(Default)]
struct Credential {
    subject: String,
    labels: Vec<Label>,
    /// Names of roles, besides those of every client.
    roles: Vec<String>,
    rules: GrantRules,
    /// Unix milliseconds.
    expires: Option<u64>,
}

/// Errors of settings, as pairs of key and reason.
pub(crate) type AuthProblems = Vec<(String, String)>;

/// Tasks that fetch keys of issuers; they end on drop.
pub(crate) struct JwksTasks(Vec<JoinHandle<()>>);

// === impl Authenticator ===

impl Authenticator {
    /// # Errors
    /// All settings that are not valid.
    pub(crate) fn new(config: &AuthSection) -> Result<Self, AuthProblems> {
        let mut problems = AuthProblems::new();
        let mut roles = HashMap::from(["admin", "client"].map(|name| {
            let role = if name == "admin" { Role::admin() } else { Role::client() };
            (name.into(), Arc::new(role))
        }));
        for (n, rule) in config.roles.iter().enumerate() {
            let mut rules = GrantRules::default();
            for (name, patterns) in rule.permissions() {
                let Some(verb) = Verb::parse(name) else { continue };
                for pattern in patterns {
                    if let Err(reason) = rules.add(verb, pattern) {
                        problems.push((format!("auth.roles[{n}].{name}"), reason));
                    }
                }
            }
            if rule.name.is_empty()
                || roles.insert(rule.name.as_str().into(), Arc::new(Role::new(&rule.name, rules))).is_some()
            {
                problems.push((format!("auth.roles[{n}].name"), "is empty, or the name of another role".into()));
            }
        }
        let check_roles = |key: String, names: &[String], problems: &mut AuthProblems| {
            for name in names.iter().filter(|name| !roles.contains_key(name.as_str())) {
                problems.push((key.clone(), format!("{name:?} is not a role: add it to auth.roles")));
            }
        };
        check_roles("auth.anonymous".into(), &config.anonymous, &mut problems);
        let keys = keys(config, &mut problems);
        for (n, key) in config.keys.iter().enumerate() {
            check_roles(format!("auth.keys[{n}].roles"), &key.roles, &mut problems);
        }
        let mut issuers: Vec<Arc<TokenIssuer>> = Vec::new();
        for (key, section) in config.issuers() {
            check_roles(format!("{key}.roles"), &section.roles, &mut problems);
            match token_issuer(section) {
                Ok(issuer) => {
                    for other in &issuers {
                        if other.issuer.issuer == issuer.issuer.issuer {
                            problems.push((format!("{key}.issuer"), "is the issuer of another entry".into()));
                        }
                        let (one, two) = (&other.issuer.prefix, &issuer.issuer.prefix);
                        if one.starts_with(two.as_str()) || two.starts_with(one.as_str()) {
                            let reason = "begins like the prefix of another entry, so their subjects could be the same";
                            problems.push((format!("{key}.prefix"), reason.into()));
                        }
                    }
                    issuers.push(Arc::new(issuer));
                }
                Err((name, reason)) => problems.push((format!("{key}.{name}"), reason)),
            }
        }
        if config.is_on() && config.allow_anonymous {
            let reason = "contradicts credentials: grant roles to every client with auth.anonymous";
            problems.push(("auth.allow_anonymous".into(), reason.into()));
        }
        if !problems.is_empty() {
            return Err(problems);
        }
        let common = config.anonymous.clone();
        let mut authenticator = Authenticator {
            anonymous: None,
            keys: HashMap::new(),
            roles,
            common,
            issuers,
            verified: Mutex::default(),
            now: unix_ms,
        };
        if config.is_on() {
            let identified = |(digest, key)| (digest, (authenticator.identity(&key), key));
            let keys: Vec<_> = keys.into_iter().map(identified).collect();
            authenticator.keys = keys.into_iter().map(|(digest, (identity, key))| (digest, (key, identity))).collect();
            authenticator.anonymous = Some(authenticator.identity(&Credential::default()));
        }
        Ok(authenticator)
    }

    /// Begins to fetch the keys of issuers. Requires a tokio runtime.
    pub(crate) fn start(&self) -> JwksTasks {
        let run =
            |issuer: &Arc<TokenIssuer>| issuer.jwks.clone().map(|jwks| tokio::spawn(jwks.run(issuer.issuer.clone())));
        JwksTasks(self.issuers.iter().filter_map(run).collect())
    }

    pub(crate) fn is_on(&self) -> bool {
        self.anonymous.is_some()
    }

    /// The identity of a client that has no credentials. `admin`: whether it may administer while authentication is off.
    pub(crate) fn anonymous(&self, admin: bool) -> Identity {
        self.anonymous.clone().unwrap_or_else(|| Identity::open(admin))
    }

    /// An identity with the permissions of roles, without credentials.
    pub(crate) fn with_roles(&self, subject: &str, roles: &[String], admin: bool) -> Identity {
        match self.is_on() {
            true => {
                let (subject, roles) = (subject.to_owned(), roles.to_vec());
                self.identity(&Credential { subject, roles, ..Credential::default() })
            }
            false => Identity::open(admin),
        }
    }

    /// Authenticates a request by its headers.
    ///
    /// # Errors
    /// `unauthorized`, `token_expired`, `invalid_request`, `invalid_params`, `auth_unavailable`. An invalid credential is
    /// never taken for none.
    pub(crate) async fn authenticate(&self, head: &Parts, admin: bool) -> Result<Identity> {
        if !self.is_on() {
            return Ok(Identity::open(admin));
        }
        reject_credentials_in_url(head)?;
        match bearer(&head.headers)? {
            Some(credential) => self.verify(credential).await,
            None => Ok(self.anonymous(admin)),
        }
    }

    /// Verifies a key or token.
    ///
    /// # Errors
    /// `unauthorized`, `token_expired`, `auth_unavailable`.
    pub(crate) async fn verify(&self, credential: &str) -> Result<Identity> {
        let digest = KeyDigest::of(credential);
        let known = match self.keys.get(&digest) {
            Some((_, identity)) => Some(identity.clone()),
            None => {
                self.verified.lock().get(&digest).filter(|token| token.is_current()).map(|token| token.identity.clone())
            }
        };
        match known {
            Some(identity) if identity.expires().is_none_or(|expires| expires > (self.now)()) => Ok(identity),
            Some(_) => {
                self.verified.lock().swap_remove(&digest);
                Err(expired())
            }
            None => {
                let (credential, issuer, generation) = self.verify_token(credential).await?;
                let identity = self.identity(&credential);
                let mut verified = self.verified.lock();
                if verified.len() >= MAX_VERIFIED {
                    let victim = fastrand::usize(..verified.len());
                    verified.swap_remove_index(victim);
                }
                verified.insert(digest, VerifiedToken { identity: identity.clone(), issuer, generation });
                Ok(identity)
            }
        }
    }

    /// Also returns the issuer, and the generation of its keys before the verification.
    async fn verify_token(&self, token: &str) -> Result<(Credential, Arc<TokenIssuer>, u64)> {
        if token.starts_with(PREFIX) || self.issuers.is_empty() || !UnverifiedToken::is_token(token) {
            return Err(Error::new(Code::Unauthorized, "the key or token is not valid"));
        }
        let now = (self.now)() / 1000;
        let unknown = || Error::new(Code::Unauthorized, "no issuer of this token is configured");
        let first = UnverifiedToken::read(token).map_err(rejected)?;
        let issuer = self.issuers.iter().find(|issuer| issuer.issuer.issuer == first.issuer()).ok_or_else(unknown)?;
        let mut generation = issuer.generation();
        let verified = match &issuer.jwks {
            None => issuer.issuer.verify(first, now),
            Some(jwks) => {
                if !jwks.is_usable() {
                    jwks.demand().await;
                }
                if !jwks.is_usable() {
                    let detail = "the keys of the issuer of this token cannot be fetched now";
                    return Err(Error::new(Code::AuthUnavailable, detail));
                }
                generation = issuer.generation();
                match issuer.issuer.verify(first, now) {
                    Err(TokenError::UnknownKey) => {
                        jwks.demand().await;
                        generation = issuer.generation();
                        issuer.issuer.verify(UnverifiedToken::read(token).map_err(rejected)?, now)
                    }
                    verified => verified,
                }
            }
        };
        let VerifiedClaims { subject, expires, rules, roles, provider_roles, labels } = verified.map_err(rejected)?;
        if let Some(role) = roles.iter().find(|role| !self.roles.contains_key(role.as_str())) {
            return Err(Error::new(Code::Unauthorized, format!("the token names an unknown role: {role:?}")));
        }
        let roles = issuer.roles.iter().cloned().chain(roles).chain(provider_roles).collect();
        let expires = Some((expires + issuer.issuer.leeway) * 1000);
        Ok((Credential { subject, labels, roles, rules, expires }, issuer.clone(), generation))
    }

    /// Explains whether a credential permits something: the answer, and the role or claim that permits it, or the patterns
    /// that match nothing for its subject.
    ///
    /// # Errors
    /// As [`verify`](Self::verify), or `invalid_params` for an unknown verb.
    pub(crate) async fn explain(&self, credential: &str, verb: &str, name: &str) -> Result<(bool, Value)> {
        let unknown = || Error::params(format!("{verb:?} is not a permission"));
        let verb = Verb::parse(verb).ok_or_else(unknown)?;
        let identity = self.verify(credential).await?;
        let of_token;
        let granted = match self.keys.get(&KeyDigest::of(credential)) {
            Some((key, _)) => key,
            None => {
                (of_token, ..) = self.verify_token(credential).await?;
                &of_token
            }
        };
        let values = TemplateValues { subject: &granted.subject, labels: &granted.labels };
        let roles: Vec<_> = self.roles_of(granted).collect();
        if identity.allows(verb, name) {
            let by = match granted.rules.find(values, verb, name) {
                Some(pattern) => format!("the token: {pattern}"),
                None => {
                    let found = roles.iter().find_map(|role| Some((role, role.find(values, verb, name)?)));
                    found.map(|(role, pattern)| format!("role {}: {pattern}", role.name)).unwrap_or_default()
                }
            };
            return Ok((true, json!({ "allowed": true, "by": by })));
        }
        let void = roles.iter().flat_map(|role| role.rules.void(values)).chain(granted.rules.void(values));
        Ok((false, json!({ "allowed": false, "void": void.collect::<Vec<_>>() })))
    }

    /// The roles of every client, and those of a credential.
    fn roles_of<'a>(&'a self, credential: &'a Credential) -> impl Iterator<Item = &'a Arc<Role>> {
        self.common.iter().chain(&credential.roles).filter_map(|name| self.roles.get(name.as_str()))
    }

    fn identity(&self, credential: &Credential) -> Identity {
        let Credential { subject, labels, rules, expires, .. } = credential;
        let values = TemplateValues { subject, labels };
        let mut grants: Vec<_> = self.roles_of(credential).flat_map(|role| role.grants(values)).collect();
        if !rules.is_empty() {
            grants.push(Arc::new(rules.compile(values)));
        }
        Identity::new(Principal { subject: subject.as_str().into(), grants, expires: *expires })
    }
}

fn unix_ms() -> u64 {
    let now = OffsetDateTime::now_utc().unix_timestamp_nanos() / 1_000_000;
    u64::try_from(now).unwrap_or_default()
}

fn expired() -> Error {
    Error::new(Code::TokenExpired, "the token has expired: get a new one")
}

fn rejected(error: TokenError) -> Error {
    match error {
        TokenError::Invalid(reason) => Error::new(Code::Unauthorized, reason),
        TokenError::Expired => expired(),
        TokenError::UnknownKey => Error::new(Code::Unauthorized, "the issuer has no key that fits the token"),
    }
}

/// The credential of `Authorization: Bearer`.
fn bearer(headers: &HeaderMap) -> Result<Option<&str>> {
    let mut values = headers.get_all(header::AUTHORIZATION).iter();
    let Some(value) = values.next() else { return Ok(None) };
    if values.next().is_some() {
        return Err(Error::new(Code::InvalidRequest, "the request has two Authorization headers"));
    }
    let credential = |value: &'_ HeaderValue| -> Option<(usize, usize)> {
        let text = value.to_str().ok()?;
        let (scheme, _) = text.split_once(' ')?;
        scheme.eq_ignore_ascii_case("bearer").then_some((scheme.len() + 1, text.len()))
    };
    let wrong = || Error::new(Code::Unauthorized, "Authorization must be Bearer with a key or token");
    let (start, end) = credential(value).ok_or_else(wrong)?;
    let text = value.to_str().map_err(|_| wrong())?[start..end].trim();
    if text.is_empty() { Err(wrong()) } else { Ok(Some(text)) }
}

fn reject_credentials_in_url(head: &Parts) -> Result<()> {
    let Some(query) = head.uri.query() else { return Ok(()) };
    let named = |(name, _): &(std::borrow::Cow<'_, str>, _)| IN_URL.contains(&&**name);
    match url::form_urlencoded::parse(query.as_bytes()).find(named) {
        Some((name, _)) => Err(Error::params(format!(
            "{name}: a key or token in a URL ends up in logs: send it as Authorization: Bearer"
        ))),
        None => Ok(()),
    }
}

// === settings ===

fn keys(config: &AuthSection, problems: &mut AuthProblems) -> HashMap<KeyDigest, Credential> {
    let mut keys = HashMap::new();
    let single = config.key.reveal();
    if !single.is_empty() {
        if single.chars().count() < MIN_LENGTH {
            problems
                .push(("auth.key".into(), format!("needs at least {MIN_LENGTH} characters: weir key new makes one")));
        }
        let (subject, roles) = ("key:admin".to_owned(), vec!["admin".to_owned()]);
        keys.insert(KeyDigest::of(single), Credential { subject, roles, ..Credential::default() });
    }
    for (n, rule) in config.keys.iter().enumerate() {
        let KeyRule { name, hash, roles, expires } = rule;
        let mut problem = |setting: &str, reason: String| problems.push((format!("auth.keys[{n}].{setting}"), reason));
        if name.is_empty() || name.len() > 64 || name.chars().any(char::is_control) {
            problem("name", "has 1 to 64 bytes without control characters".into());
        }
        let expires = match &**expires {
            "" => None,
            text => match OffsetDateTime::parse(text, &Rfc3339) {
                Ok(time) => Some(u64::try_from(time.unix_timestamp()).unwrap_or(0) * 1000),
                Err(_) => {
                    problem("expires", format!("{text:?} is not a time as 2027-01-31T00:00:00Z"));
                    None
                }
            },
        };
        match KeyDigest::parse(hash) {
            Ok(digest) => {
                let (subject, roles) = (format!("key:{name}"), roles.clone());
                if keys.insert(digest, Credential { subject, roles, expires, ..Credential::default() }).is_some() {
                    problem("hash", "is the hash of another key".into());
                }
            }
            Err(reason) => problem("hash", reason),
        }
    }
    keys
}

/// The issuer of a section, or the setting that is wrong.
fn token_issuer(section: &JwtSection) -> Result<TokenIssuer, (&'static str, String)> {
    let shared = !section.secret.is_empty();
    let sources = [shared, !section.public_key.is_empty(), !section.jwks.is_empty()];
    if sources.iter().filter(|set| **set).count() != 1 {
        return Err(("issuer", "needs exactly one of secret, public_key and jwks".into()));
    }
    let mut jwks = None;
    let keys = if shared {
        vec![
            VerificationKey::secret(section.secret.reveal(), section.secret_before.reveal())
                .map_err(|e| ("secret", e))?,
        ]
    } else if !section.public_key.is_empty() {
        let text = match section.public_key.strip_prefix("file:") {
            Some(path) => fs::read_to_string(path).map_err(|error| ("public_key", format!("{path}: {error}")))?,
            None => section.public_key.clone(),
        };
        vec![VerificationKey::pem(&text).map_err(|error| ("public_key", error))?]
    } else {
        let source = JwksSource::new(&section.jwks, section.refresh, section.stale).map_err(|error| ("jwks", error))?;
        jwks = Some(Arc::new(source));
        Vec::new()
    };
    let default: &[&str] = if shared { &["HS256"] } else { &["RS256", "ES256", "EdDSA"] };
    let names: Vec<&str> = match section.algorithms.is_empty() {
        true => default.to_vec(),
        false => section.algorithms.iter().map(String::as_str).collect(),
    };
    let algorithm = |name: &&str| {
        let unknown = || ("algorithms", format!("{name:?} is not an algorithm for this kind of key"));
        // A public key must not be taken for a shared secret (RFC 8725, section 2.1).
        name.parse::<Algorithm>().ok().filter(|_| name.starts_with("HS") == shared).ok_or_else(unknown)
    };
    let algorithms = names.iter().map(algorithm).collect::<Result<_, _>>()?;
    for (name, value) in [("issuer", &section.issuer), ("audience", &section.audience), ("claim", &section.claim)] {
        if value.is_empty() {
            return Err((name, "is empty".into()));
        }
    }
    let issuer = Issuer {
        issuer: section.issuer.clone(),
        audience: section.audience.clone(),
        algorithms,
        leeway: section.leeway.as_secs(),
        max_ttl: section.max_ttl.as_secs(),
        claim: section.claim.clone(),
        roles_claim: section.roles_claim.clone(),
        prefix: section.prefix.clone(),
        keys: RwLock::new(keys.into()),
    };
    Ok(TokenIssuer { issuer: Arc::new(issuer), jwks, roles: section.roles.clone() })
}

// === impl TokenIssuer ===

impl TokenIssuer {
    /// Changes with the keys.
    fn generation(&self) -> u64 {
        self.jwks.as_ref().map_or(0, |jwks| jwks.generation())
    }
}

impl VerifiedToken {
    fn is_current(&self) -> bool {
        self.generation == self.issuer.generation() && self.issuer.jwks.as_ref().is_none_or(|jwks| jwks.is_usable())
    }
}

// === impl JwksTasks ===

impl Drop for JwksTasks {
    fn drop(&mut self) {
        self.0.iter().for_each(JoinHandle::abort);
    }
}
