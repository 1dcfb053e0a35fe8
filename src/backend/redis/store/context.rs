//! [`LogContext`]: what all parts of the log share, and the errors that clients see.

use std::{sync::Arc, time::Duration};

use super::keys::KeyNames;
use crate::{
    backend::redis::client::{CommandError, Topology},
    bus::Topics,
    error::{Code, Error},
};

/// The largest number for scripts, which Lua counts exactly; in milliseconds ten thousand years.
pub(super) const MAX_NUMBER: u64 = 1 << 48;

pub(super) struct LogContext {
    pub(super) topology: Arc<Topology>,
    pub(super) topics: Arc<Topics>,
    pub(super) keys: KeyNames,
}

impl LogContext {
    /// The present time as scripts take it: 0 is the clock of Redis; a test or an import has its own.
    pub(super) fn script_now(&self) -> u64 {
        if self.topics.is_manual() { self.topics.now() } else { 0 }
    }
}

pub(super) fn millis(time: Duration) -> u64 {
    u64::try_from(time.as_millis()).unwrap_or(MAX_NUMBER).min(MAX_NUMBER)
}

/// A reply that no script of weir returns.
pub(super) fn unexpected_reply() -> CommandError {
    CommandError::Rejected("ERR unexpected reply".into())
}

/// For writes. Reads map the error with [`CommandError::of_read`] first: a lost reply changed nothing.
impl From<CommandError> for Error {
    fn from(error: CommandError) -> Self {
        let error = match error {
            CommandError::NotExecuted(reason) => {
                tracing::debug!(%reason, "Redis is unavailable");
                return Error::new(Code::BusUnavailable, "Redis cannot be reached now");
            }
            CommandError::Unconfirmed => {
                return Error::new(Code::Unconfirmed, "the command was sent to Redis, and its reply is lost");
            }
            CommandError::Rejected(error) => error,
        };
        match error.split(' ').next().unwrap_or_default() {
            "OOM" => Error::new(Code::Overloaded, "Redis has no memory left (its maxmemory)")
                .with("limit", "maxmemory")
                .read_only(),
            "VERSION" => Error::new(Code::BusUnavailable, "a newer weir wrote this channel: this node must be updated"),
            code @ ("MISCONF" | "NOREPLICAS" | "NOPERM" | "NOAUTH" | "WRONGTYPE") => {
                tracing::warn!(%error, "Redis rejects a command");
                let reason = format!("Redis rejects the command ({code}); the reason is in the log of this node");
                let rejected = Error::new(Code::BusUnavailable, reason);
                if matches!(code, "MISCONF" | "NOREPLICAS" | "NOPERM") { rejected.read_only() } else { rejected }
            }
            _ => Error::internal(format!("Redis: {error}")),
        }
    }
}
