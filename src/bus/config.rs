//! [`Config`], the limits of the bus.

use std::time::Duration;

use super::retention::{Retention, RetentionRule};
use crate::{channel::Channel, config, pattern::Pattern};

/// Limits of the bus.
#[derive(Clone, Debug)]
pub struct Config {
    pub rules: Vec<RetentionRule>,
    /// Retention of channels that no rule matches.
    pub retention: Retention,
    /// Memory of all events, idempotency keys and topics, in bytes.
    pub budget: usize,
    /// For how long an idempotency key is remembered.
    pub key_window: Duration,
    /// A consumer that sends no request for this long is removed.
    pub consumer_idle: Duration,
    pub max_consumers: usize,
    /// Channels of one consumer.
    pub max_cursors: usize,
}

impl Default for Config {
    fn default() -> Self {
        Config::new(&config::Config::default())
    }
}

impl Config {
    /// The limits of a configuration. Rules of adapters for their own channels precede those of `channels`.
    pub(crate) fn new(config: &config::Config) -> Self {
        let retention = |keep: &config::Keep| Retention { count: keep.count, age: keep.age, bytes: keep.bytes };
        let rule = |rule: &config::ChannelRule| RetentionRule {
            pattern: Pattern::new(&rule.pattern),
            retention: retention(&rule.keep),
        };
        let of_adapters: Vec<_> = config.compat.enabled().flat_map(|adapter| adapter.channels()).collect();
        Config {
            rules: of_adapters.iter().chain(&config.channels).map(rule).collect(),
            retention: retention(&config::Keep::default()),
            budget: config.bus.memory.budget,
            key_window: config.bus.idempotency_window,
            consumer_idle: config.consumers.idle,
            max_consumers: config.limits.consumers,
            max_cursors: config.limits.consumer_channels,
        }
    }

    /// Retention of a channel by this node's rules.
    pub(crate) fn retention_of(&self, channel: &Channel) -> Retention {
        let rule = self.rules.iter().find(|rule| rule.pattern.matches(channel.as_str()));
        rule.map_or(self.retention, |rule| rule.retention)
    }
}
