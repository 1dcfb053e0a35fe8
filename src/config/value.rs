//! Types of settings with a fixed set of values, and [`Secret`].

use std::fmt;

use tracing_subscriber::filter::Targets;

/// Text that is neither printed nor logged.
#[derive(Clone, Default, PartialEq, Eq)]
pub struct Secret(String);

/// Where events are stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Backend {
    /// In the memory of this process.
    Memory,
    /// In Redis, shared by all nodes.
    Redis,
}

/// When a publish is acknowledged.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ack {
    /// After the master has applied it.
    Stored,
    /// After a replica has applied it, too.
    Replicated,
}

/// A level, or levels by target as in `info,weir=debug`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Level(String);

/// The format of log lines.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LogFormat {
    /// Text on a terminal, JSON otherwise.
    Auto,
    Text,
    Json,
}

// === impl Secret ===

impl Secret {
    /// The placeholder that is printed instead of a secret.
    pub(super) const HIDDEN: &str = "********";

    pub(super) fn parse(text: String) -> Result<Self, String> {
        match text == Self::HIDDEN {
            true => Err("is what weir shows instead of the secret".into()),
            false => Ok(Secret(text)),
        }
    }

    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// The secret itself, which must not be printed.
    pub fn reveal(&self) -> &str {
        &self.0
    }
}

impl From<&str> for Secret {
    fn from(text: &str) -> Self {
        Secret(text.to_owned())
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(if self.is_empty() { "Secret()" } else { "Secret(…)" })
    }
}

// === impl Level ===

impl Level {
    pub(super) fn as_str(&self) -> &str {
        &self.0
    }

    pub(super) fn info() -> Self {
        Level("info".into())
    }

    pub(super) fn parse(text: &str) -> Result<Self, String> {
        // tracing reads an unknown level as the name of a target, and enables all its levels.
        const NAMES: [&str; 6] = ["error", "warn", "info", "debug", "trace", "off"];
        let known = |part: &str| NAMES.contains(&part.rsplit_once('=').map_or(part, |(_, level)| level));
        if text.split(',').all(known) && text.parse::<Targets>().is_ok() {
            return Ok(Level(text.to_owned()));
        }
        Err(format!(
            "{text:?} is no level: write one of {}, or by target as \"info,weir::rpc=debug\"",
            NAMES.join(", ")
        ))
    }

    /// The filter for tracing.
    pub fn targets(&self) -> Targets {
        // `parse` has validated it.
        self.0.parse().unwrap_or_default()
    }
}
