//! [`Retention`], how much of a channel is kept.

use std::time::Duration;

use crate::pattern::Pattern;

/// How much of a channel is kept. All three bounds hold, except that the newest event is kept whatever its size, until
/// it is too old.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Retention {
    pub count: usize,
    pub age: Duration,
    /// Memory of the events, see [`ChannelInfo::bytes`](super::ChannelInfo::bytes).
    pub bytes: usize,
}

/// Retention of the channels whose name matches a pattern. The first rule that matches wins.
#[derive(Clone, Debug)]
pub struct RetentionRule {
    pub pattern: Pattern,
    pub retention: Retention,
}
