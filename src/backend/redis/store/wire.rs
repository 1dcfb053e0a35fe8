//! What is stored in Redis and sent through it, as the scripts write it. Everything begins with the version 1.
//!
//! ```text
//! event    1 'e' epoch[6] time[6] offset[6] body        an entry of the stream, and a message
//! batch    1 'b' (length[4] event)…                     a message
//! notice   1 'x'                                        a message: look at the log, it is another than it was
//! ```
//! Numbers have their big end first.

use std::sync::Arc;

use bytes::Bytes;

use crate::backend::redis::client::Value;
use crate::{
    bus::{GapReason, LogBounds, PreviousLife, Term},
    event::Event,
    position::{Epoch, Position},
};

const VERSION: u8 = 1;
/// As in `limits.lua`, milliseconds.
const LINGER: u64 = 60_000;

/// What a message says.
pub enum EventMessage {
    /// One after the other.
    Events(Vec<Event>),
    /// The log is another than it was.
    Changed,
    /// Of a newer weir, or of nobody we know.
    Unknown,
}

/// What one look at a log finds.
#[derive(Debug)]
pub struct LogSnapshot {
    /// The clock of Redis, Unix milliseconds.
    pub now: u64,
    pub bounds: LogBounds,
    /// One after the other, of one term.
    pub events: Vec<Arc<Event>>,
    /// Memory of the events kept.
    pub bytes: u64,
    /// Which server wrote last.
    pub generation: Bytes,
    /// A newer weir wrote it.
    pub newer: bool,
}

/// How a look is to be read.
#[derive(Clone, Copy, Debug)]
pub struct SnapshotParams {
    /// From this second on, what is not in Redis is known never to have been there. Nothing: from the look on.
    pub horizon: Option<u64>,
    pub count: u64,
    /// Milliseconds.
    pub age: u64,
}

fn number(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0, |number, byte| number << 8 | u64::from(*byte))
}

fn event(stored: &[u8]) -> Option<Event> {
    let (head, body) = stored.split_at_checked(20)?;
    if head[..2] != [VERSION, b'e'] {
        return None;
    }
    let epoch = std::str::from_utf8(&head[2..8]).ok()?.parse().ok()?;
    Event::restore(Position { epoch, offset: number(&head[14..20]) }, number(&head[8..14]), body)
}

/// Where the event of a message is, if it is one event; without a look at the rest.
pub fn position(message: &[u8]) -> Option<Position> {
    match message {
        [VERSION, b'e', head @ ..] if head.len() >= 18 => {
            let epoch = std::str::from_utf8(&head[..6]).ok()?.parse().ok()?;
            Some(Position { epoch, offset: number(&head[12..18]) })
        }
        _ => None,
    }
}

impl EventMessage {
    pub fn read(message: &[u8]) -> Self {
        let events = match message {
            [VERSION, b'x', ..] => return EventMessage::Changed,
            [VERSION, b'e', ..] => event(message).map(|event| vec![event]),
            [VERSION, b'b', rest @ ..] => batch(rest),
            _ => None,
        };
        events.map_or(EventMessage::Unknown, EventMessage::Events)
    }
}

fn batch(mut rest: &[u8]) -> Option<Vec<Event>> {
    let mut events = Vec::new();
    while !rest.is_empty() {
        let (length, after) = rest.split_at_checked(4)?;
        let (one, after) = after.split_at_checked(number(length) as usize)?;
        events.push(event(one)?);
        rest = after;
    }
    Some(events)
}

impl LogSnapshot {
    /// Reads what `look.lua` answers.
    pub fn read(answer: &Value, reading: SnapshotParams) -> Option<Self> {
        let [now, hot, epoch, generation, terms, past, absent, born, cut, marks, watched, old, events @ ..] =
            answer.list()?
        else {
            return None;
        };
        let now = now.int()?;
        let past = past.text().and_then(read_past);
        let horizon = reading.horizon.unwrap_or(now / 1000 + 1);
        let known_absent = absent.int().unwrap_or(0).max(horizon);
        let none = |absent, past, generation| LogSnapshot {
            now,
            bounds: LogBounds { time: now, ..LogBounds::absent(absent, past) },
            events: Vec::new(),
            bytes: 0,
            generation,
            newer: false,
        };
        let generation = generation.bytes().cloned().unwrap_or_default();
        let Some(hot) = hot.bytes() else { return Some(none(known_absent, past, generation)) };
        if hot.first() != Some(&VERSION) {
            return Some(LogSnapshot { newer: true, ..none(known_absent, past, generation) });
        }
        let part = |at: usize| hot.get(1 + 6 * at..7 + 6 * at).map(number);
        let (top, time, total) = (part(0)?, part(1)?, part(2)?);
        let epoch: Epoch = epoch.text()?.parse().ok()?;
        let born = born.int()?;
        let idle_from = time.max(watched.int().unwrap_or(0)) + reading.age + LINGER;
        if now > idle_from {
            // Nobody is there any more: the next event begins another life, exactly as it will be told here.
            let absent = absent.int().unwrap_or(0).max(born).max(idle_from / 1000 + 1) + 1;
            let past = PreviousLife { epoch, top, reason: GapReason::Reset };
            return Some(none(absent.max(horizon), Some(past), generation));
        }
        let oldest = now.saturating_sub(reading.age);
        let marks = marks.bytes().map_or(&[][..], |marks| marks);
        let mut first = (top + 1).saturating_sub(reading.count).max(1);
        let mut before = 0;
        for (n, mark) in marks.chunks_exact(18).enumerate() {
            let (offset, since, sum) = (number(&mark[..6]), number(&mark[6..12]), number(&mark[12..]));
            if n == 0 || since < oldest {
                first = first.max(offset);
                before = sum;
            }
        }
        let removed = cut.int();
        let mut bounds = LogBounds {
            epoch,
            first,
            top,
            time,
            absent_since: known_absent,
            // Whoever asked before may have been told the horizon, which lies a second ahead.
            born: born.max(horizon),
            terms: read_terms(terms.text().unwrap_or_default())?,
            previous: past,
            trim_reason: GapReason::Trimmed,
        };
        let one = |stored: &Value| {
            let mut event = event(stored.bytes()?)?;
            if !bounds.remembers(event.epoch) {
                // Of a term that is forgotten: those who were in it are told `reset`, and read it as part of the oldest.
                event.epoch = bounds.epoch_of(event.offset);
            }
            Some(Arc::new(event))
        };
        let mut events = events.iter().map(one).collect::<Option<Vec<_>>>()?;
        if time < oldest {
            bounds.first = top + 1;
            events.clear();
        }
        // Too old, and not let go of yet.
        if let Some(old @ 1..) = old.int() {
            bounds.first = bounds.first.max(old + 1);
        }
        if removed == Some(bounds.first) {
            bounds.trim_reason = GapReason::Deleted;
        }
        Some(LogSnapshot { now, bounds, events, bytes: total - before.min(total), generation, newer: false })
    }
}

fn read_past(text: &str) -> Option<PreviousLife> {
    let mut parts = text.split(':');
    let (epoch, top) = (parts.next()?.parse().ok()?, parts.next()?.parse().ok()?);
    let reason = if parts.next()? == "deleted" { GapReason::Deleted } else { GapReason::Reset };
    Some(PreviousLife { epoch, top, reason })
}

fn read_terms(text: &str) -> Option<Vec<Term>> {
    let term = |text: &str| {
        let (epoch, end) = text.split_once(':')?;
        Some(Term { epoch: epoch.parse().ok()?, end: end.parse().ok()? })
    };
    text.split(',').filter(|text| !text.is_empty()).map(term).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_nobody_wrote_is_unknown() {
        for message in [&b""[..], b"\x01", b"\x02e", b"\x01exxx", b"\x01b\0\0\0\x09e", b"hello"] {
            assert!(matches!(EventMessage::read(message), EventMessage::Unknown), "{message:?}");
        }
        assert!(matches!(EventMessage::read(b"\x01x"), EventMessage::Changed));
    }
}
