//! [`Channel`], the name of a channel, and the rules of other names ([`check_label`]).

use std::{fmt, sync::Arc};

use crate::error::{Code, Error, Result};

/// Longest channel name, in bytes.
pub(crate) const MAX_CHANNEL: usize = 255;
/// Longest `type`, `from`, `key`, service and method name, in bytes.
pub(crate) const MAX_LABEL: usize = 128;
/// Prefix of the channels on which joins and leaves of other channels are announced.
pub(crate) const PRESENCE: &str = "$presence/";

/// The name of a channel: 1–255 bytes of UTF-8 without control characters. Cheap to clone.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Channel(Arc<str>);

// === impl Channel ===

impl Channel {
    /// Validates a name that a client sent.
    ///
    /// # Errors
    /// `invalid_params`.
    pub fn parse(name: &str) -> Result<Self> {
        if name.is_empty() || name.len() > MAX_CHANNEL {
            return Err(Error::params(format!(
                "a channel name has 1 to {MAX_CHANNEL} bytes, this one has {}",
                name.len()
            )));
        }
        if has_control(name) {
            return Err(Error::params("a channel name has no control characters"));
        }
        Ok(Channel(name.into()))
    }

    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// Whether the name begins with `$`: clients may read such channels but not publish to them.
    pub(crate) fn is_reserved(&self) -> bool {
        self.0.starts_with('$')
    }

    /// The channel on which joins and leaves of this one are announced.
    ///
    /// # Errors
    /// `invalid_params` for reserved channels, and for names that are too long for the prefix.
    pub fn presence(&self) -> Result<Channel> {
        if self.is_reserved() {
            return Err(Error::params(format!(
                "channel {self} has no presence: names beginning with $ are weir's own"
            )));
        }
        let most = MAX_CHANNEL - PRESENCE.len();
        if self.0.len() > most {
            return Err(Error::params(format!("a channel with presence has a name of at most {most} bytes")));
        }
        Ok(Channel(format!("{PRESENCE}{self}").into()))
    }

    /// Rejects channels that a client may not publish to, as `forbidden`.
    pub(crate) fn writable(&self) -> Result<()> {
        if self.is_reserved() {
            return Err(Error::new(
                Code::Forbidden,
                format!("channel {self} is read-only: names beginning with $ are weir's own"),
            )
            .with("permission", "publish"));
        }
        Ok(())
    }
}

impl fmt::Display for Channel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Debug for Channel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(&self.0, f)
    }
}

impl std::borrow::Borrow<str> for Channel {
    fn borrow(&self) -> &str {
        &self.0
    }
}

/// Validates a `type`, `from`, `key`, or the name of a service or method. `what` names it in the error.
///
/// # Errors
/// `invalid_params`.
pub(crate) fn check_label(what: &str, text: &str) -> Result<()> {
    if text.is_empty() || text.len() > MAX_LABEL {
        return Err(Error::params(format!("{what} has 1 to {MAX_LABEL} bytes, this one has {}", text.len())));
    }
    if has_control(text) {
        return Err(Error::params(format!("{what} has no control characters")));
    }
    Ok(())
}

fn has_control(text: &str) -> bool {
    // Nearly all names are plain ASCII, and every call and every publish has some.
    let plain = text.bytes().all(|byte| (b' '..=b'~').contains(&byte));
    !plain && text.chars().any(char::is_control)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn channel_names() {
        for good in ["a", "users/v1:add", "a,b", "50%", "é", &"x".repeat(255)] {
            assert!(Channel::parse(good).is_ok(), "{good}");
        }
        for bad in ["", "a\nb", "a\u{7f}", &"x".repeat(256)] {
            assert!(Channel::parse(bad).is_err(), "{bad:?}");
        }
        assert!(Channel::parse("$services").unwrap().writable().is_err());
    }
}
