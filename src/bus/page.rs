//! [`LogPage`], a piece of a channel's log, and [`Placed`], the result of a publish.

use std::sync::Arc;

use super::gap::Gap;
use crate::{channel::Channel, event::Event, json::write_json_str, position::Position};

/// Size of a page: both bounds hold, but a page always has at least one event if there is one.
#[derive(Clone, Copy, Debug)]
pub struct ReadLimit {
    pub events: usize,
    pub bytes: usize,
}

/// A piece of a channel's log.
#[derive(Clone, Debug)]
pub struct LogPage {
    pub events: Vec<Arc<Event>>,
    /// Where to read on: past every event that was scanned, including those that a filter hides.
    pub next: Position,
    /// The log had more events when this page was read.
    pub more: bool,
    /// History that was asked for and is missing. It precedes all `events`.
    pub gap: Option<Gap>,
}

/// Where a draft was placed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Placed {
    pub position: Position,
    /// Unix milliseconds.
    pub time: u64,
    /// The idempotency key was already used for the same event; this is the position of that event.
    pub duplicate: bool,
}

impl Placed {
    /// Appends the reply to a publish: `{"channel":…,"epoch":…,"offset":…,"time":…}`, and `"duplicate":true` if so.
    pub(crate) fn write_json(&self, channel: &Channel, out: &mut Vec<u8>) {
        out.reserve(channel.as_str().len() + 96);
        out.extend_from_slice(br#"{"channel":"#);
        write_json_str(channel.as_str(), out);
        out.extend_from_slice(br#","epoch":""#);
        out.extend_from_slice(&self.position.epoch.text());
        out.extend_from_slice(br#"","offset":"#);
        out.extend_from_slice(itoa::Buffer::new().format(self.position.offset).as_bytes());
        out.extend_from_slice(br#","time":"#);
        out.extend_from_slice(itoa::Buffer::new().format(self.time).as_bytes());
        out.extend_from_slice(if self.duplicate { br#","duplicate":true}"# } else { b"}" });
    }
}
