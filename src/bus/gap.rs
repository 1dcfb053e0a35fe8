//! [`Gap`], missing history, and its [`GapReason`].

use serde::{Serialize, Serializer, ser::SerializeMap};

use crate::{channel::Channel, position::Position};

/// History that a reader asked for and that no longer exists. Always announced before anything newer of its channel.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Gap {
    pub channel: Channel,
    pub reason: GapReason,
    /// The position that the reader asked to resume from; `None` if it was unreadable.
    pub after: Option<Position>,
    /// Position of the next event that the reader gets.
    pub next: Position,
    /// Number of missing events, if it is known.
    pub missed: Option<u64>,
}

/// Why history is missing.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum GapReason {
    /// Retention: count, age or bytes.
    Trimmed,
    /// The memory budget of the node.
    Budget,
    /// A new life of the channel.
    Reset,
    /// Writes may have been lost.
    Failover,
    /// The events or the log were deleted on request.
    Deleted,
    /// The position is unreadable, or lies ahead of the channel.
    BadPosition,
}

impl GapReason {
    pub(crate) const fn as_str(self) -> &'static str {
        match self {
            GapReason::Trimmed => "trimmed",
            GapReason::Budget => "budget",
            GapReason::Reset => "reset",
            GapReason::Failover => "failover",
            GapReason::Deleted => "deleted",
            GapReason::BadPosition => "bad_position",
        }
    }
}

impl Gap {
    /// Position of a reader once the gap has been announced to it.
    pub fn resume(&self) -> Position {
        match self.next.epoch.is_absent() {
            true => self.next,
            false => Position { offset: self.next.offset - 1, ..self.next },
        }
    }
}

impl Serialize for Gap {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut map = serializer.serialize_map(Some(5))?;
        map.serialize_entry("channel", self.channel.as_str())?;
        map.serialize_entry("reason", self.reason.as_str())?;
        map.serialize_entry("after", &self.after)?;
        map.serialize_entry("next", &self.next)?;
        map.serialize_entry("missed", &self.missed)?;
        map.end()
    }
}
