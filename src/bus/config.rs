//! [`Config`], the limits of the bus.

use std::time::Duration;

use super::retention::{Retention, RetentionRule};
use crate::channel::Channel;

/// Limits of the bus.
#[derive(Clone, Debug)]
pub struct Config {
    pub rules: Vec<RetentionRule>,
    /// Retention of channels that no rule matches.
    pub retention: Retention,
    /// Memory of all events, idempotency keys and topics, in bytes.
    pub budget: usize,
    pub keys: KeyLimits,
    /// A consumer that sends no request for this long is removed.
    pub consumer_idle: Duration,
    pub max_consumers: usize,
    /// Channels of one consumer.
    pub max_cursors: usize,
}

/// For how long idempotency keys are remembered, and how many per channel.
#[derive(Clone, Copy, Debug)]
pub struct KeyLimits {
    pub window: Duration,
    pub count: usize,
}

impl Config {
    /// Retention of a channel by this node's rules.
    pub(crate) fn retention_of(&self, channel: &Channel) -> Retention {
        let rule = self.rules.iter().find(|rule| rule.pattern.matches(channel.as_str()));
        rule.map_or(self.retention, |rule| rule.retention)
    }
}
