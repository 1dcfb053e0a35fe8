//! [`AuthSection`]: credentials, and the permissions that they give.

use std::time::Duration;

use super::{
    section::{Table, seconds, section},
    value::Secret,
};

section! {
    /// Authentication and permissions. They are on as soon as there is a key or an issuer of tokens. Otherwise every client
    /// may do everything, and administration is limited to loopback listeners.
    AuthSection {
        /// An API key with the role `admin`, at least 32 characters (WEIR__AUTH__KEY from a secret store).
        key: Secret as Secret = Secret::default(),
        /// More API keys. `weir key new NAME` generates one.
        keys: Vec<KeyRule> as Tables = Vec::new(),
        /// Roles: sets of permissions with a name. `admin` (everything) and `client` (everything but administration) are
        /// built in.
        roles: Vec<RoleRule> as Tables = Vec::new(),
        /// Names of the roles of every client, with and without credentials.
        anonymous: Vec<String> as Texts = Vec::new(),
        /// More issuers of tokens, each with the keys of `auth.jwt`.
        issuers: Vec<JwtSection> as Tables = Vec::new(),
        /// Allows listeners on addresses that other machines can reach, without authentication.
        allow_anonymous: bool as Flag = false,
        jwt: JwtSection as Section = JwtSection::default(),
    }
}

section! {
    /// An API key. weir stores its hash only.
    KeyRule {
        /// The subject of the key is `key:NAME`. During a rotation, two keys have the same name.
        name: String as Text = String::new(),
        /// `sha256:` and the hexadecimal SHA-256 of the key, as `weir key new` prints it.
        hash: String as Text = String::new(),
        /// Names of roles.
        roles: Vec<String> as Texts = Vec::new(),
        /// Time at which the key expires (RFC 3339), as 2027-01-31T00:00:00Z. Empty: never.
        expires: String as Text = String::new(),
    }
}

section! {
    /// A role. Each permission is a list of patterns of the names that it covers.
    RoleRule {
        name: String as Text = String::new(),
        /// Channels.
        publish: Vec<String> as Texts = Vec::new(),
        /// Values of `from` besides the subject of the client.
        publish_as: Vec<String> as Texts = Vec::new(),
        /// Channels.
        subscribe: Vec<String> as Texts = Vec::new(),
        /// Channels, to appear in their presence lists.
        join: Vec<String> as Texts = Vec::new(),
        /// Channels, to list their members.
        presence: Vec<String> as Texts = Vec::new(),
        /// Consumers.
        consume: Vec<String> as Texts = Vec::new(),
        /// Services.
        provide: Vec<String> as Texts = Vec::new(),
        /// Methods, as `service/method`.
        call: Vec<String> as Texts = Vec::new(),
        /// Operations of administration, as `connections:kick`.
        admin: Vec<String> as Texts = Vec::new(),
    }
}

section! {
    /// JSON Web Tokens (JWT) of one issuer. One of `secret`, `public_key` and `jwks` switches them on.
    JwtSection {
        /// Shared secret of at least 32 bytes, for HS256, HS384 and HS512.
        secret: Secret as Secret = Secret::default(),
        /// The secret before the last rotation. Tokens that it signs are still accepted.
        secret_before: Secret as Secret = Secret::default(),
        /// Public key in PEM, or `file:PATH`: RSA of at least 2,048 bits, P-256, P-384 or Ed25519.
        public_key: String as Text = String::new(),
        /// Address of a JSON Web Key Set: `https:`, `file:`, or `http:` on this machine.
        jwks: String as Text = String::new(),
        /// Accepted algorithms. Empty: HS256 with `secret`; RS256, ES256 and EdDSA otherwise.
        algorithms: Vec<String> as Texts = Vec::new(),
        /// Value of the claim `iss`.
        issuer: String as Text = "weir".to_owned(),
        /// Value that the claim `aud` must have or contain.
        audience: String as Text = "weir".to_owned(),
        /// Tolerated difference between the clocks of weir and the issuer.
        leeway: Duration as Pause = seconds(30),
        /// Maximum lifetime of a token (`exp` − `iat`).
        max_ttl: Duration as Time = seconds(24 * 60 * 60),
        /// Interval at which `jwks` is fetched.
        refresh: Duration as Time = seconds(600),
        /// How long the last keys are used if `jwks` cannot be fetched.
        stale: Duration as Time = seconds(24 * 60 * 60),
        /// Name of the claim that holds permissions.
        claim: String as Text = "weir".to_owned(),
        /// Dotted path of a claim with names of roles, as `realm_access.roles`. Unknown roles are ignored.
        roles_claim: String as Text = String::new(),
        /// Names of the roles of every token.
        roles: Vec<String> as Texts = Vec::new(),
        /// Precedes the subjects of this issuer. Several issuers have different prefixes.
        prefix: String as Text = String::new(),
    }
}

// === impl AuthSection ===

impl AuthSection {
    /// Whether clients are asked for credentials.
    pub fn is_on(&self) -> bool {
        !self.key.is_empty() || !self.keys.is_empty() || self.issuers().next().is_some()
    }

    /// The issuers of tokens, each with its key.
    pub(crate) fn issuers(&self) -> impl Iterator<Item = (String, &JwtSection)> {
        let short = self.jwt.is_on().then(|| ("auth.jwt".to_owned(), &self.jwt));
        short
            .into_iter()
            .chain(self.issuers.iter().enumerate().map(|(n, issuer)| (format!("auth.issuers[{n}]"), issuer)))
    }
}

impl JwtSection {
    fn is_on(&self) -> bool {
        !self.secret.is_empty() || !self.public_key.is_empty() || !self.jwks.is_empty()
    }
}

impl RoleRule {
    /// The patterns of each permission.
    pub(crate) fn permissions(&self) -> [(&'static str, &[String]); 9] {
        [
            ("publish", &self.publish),
            ("publish_as", &self.publish_as),
            ("subscribe", &self.subscribe),
            ("join", &self.join),
            ("presence", &self.presence),
            ("consume", &self.consume),
            ("provide", &self.provide),
            ("call", &self.call),
            ("admin", &self.admin),
        ]
    }
}

impl Table for KeyRule {
    const REQUIRED: &'static [(&'static str, &'static str)] =
        &[("name", "how is the key called?"), ("hash", "what is its hash? `weir key new` prints it")];
    const EXAMPLE: &'static str = "{ name = \"ci\", hash = \"sha256:…\", roles = [\"client\"] }";
}

impl Table for RoleRule {
    const REQUIRED: &'static [(&'static str, &'static str)] = &[("name", "how is the role called?")];
    const EXAMPLE: &'static str = "{ name = \"public\", subscribe = [\"news.*\"] }";
}

impl Table for JwtSection {
    const REQUIRED: &'static [(&'static str, &'static str)] = &[("issuer", "what is the claim `iss` of its tokens?")];
    const EXAMPLE: &'static str = "{ issuer = \"https://id.example\", jwks = \"https://id.example/jwks.json\" }";
}
