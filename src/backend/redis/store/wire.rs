//! The formats of the scripts, for what they store and publish. Everything begins with the version, 1.
//!
//! ```text
//! event    1 'e' epoch[6] time[6] offset[6] body        an entry of the stream, and a message
//! batch    1 'b' (length[4] event)…                     a message
//! changed  1 'x'                                        a message: the log was changed other than by an append
//! ```
//! Numbers are big-endian.

use std::sync::Arc;

use bytes::Bytes;
use redis::{Value, from_redis_value};

use crate::{
    bus::{GapReason, LogBounds, PreviousLife, Term},
    event::Event,
    position::{Epoch, Position},
};

const VERSION: u8 = 1;
/// As in `limits.lua`, milliseconds.
const LINGER: u64 = 60_000;

/// A message on the channel of events.
pub(super) enum EventMessage {
    /// In their order.
    Events(Vec<Event>),
    /// The log was changed other than by an append.
    Changed,
    /// Of a newer weir, or of another program.
    Unknown,
}

/// The state of a log at one moment, and some of its events.
#[derive(Debug)]
pub(super) struct LogSnapshot {
    /// The clock of Redis, Unix milliseconds.
    pub(super) now: u64,
    pub(super) bounds: LogBounds,
    /// In their order, of one term.
    pub(super) events: Vec<Arc<Event>>,
    /// Memory of the events kept.
    pub(super) bytes: u64,
    /// The generation of the server that wrote last.
    pub(super) generation: Bytes,
    /// A newer weir wrote it.
    pub(super) newer: bool,
}

#[derive(Clone, Copy, Debug)]
pub(super) struct SnapshotParams {
    /// The Unix second from which on a log that is absent is known never to have existed. None: the next second.
    pub(super) horizon: Option<u64>,
    /// Retention: a number of events.
    pub(super) count: u64,
    /// Retention: milliseconds.
    pub(super) age: u64,
}

/// The first elements of the reply of `snapshot.lua`; the events follow.
type SnapshotHead = (
    u64,
    Option<Bytes>,
    Option<String>,
    Option<Bytes>,
    Option<String>,
    Option<String>,
    Option<u64>,
    Option<u64>,
    Option<u64>,
    Option<Bytes>,
    Option<u64>,
    u64,
);

fn number(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0, |number, byte| number << 8 | u64::from(*byte))
}

fn parse_event(stored: &[u8]) -> Option<Event> {
    let (_, body) = stored.split_at_checked(20)?;
    Event::restore(position(stored)?, number(&stored[8..14]), body)
}

/// The position of a message that is one event, without parsing the rest.
pub(super) fn position(message: &[u8]) -> Option<Position> {
    match message {
        [VERSION, b'e', head @ ..] if head.len() >= 18 => {
            let epoch = std::str::from_utf8(&head[..6]).ok()?.parse().ok()?;
            Some(Position { epoch, offset: number(&head[12..18]) })
        }
        _ => None,
    }
}

impl EventMessage {
    pub(super) fn parse(message: &[u8]) -> Self {
        let events = match message {
            [VERSION, b'x', ..] => return EventMessage::Changed,
            [VERSION, b'e', ..] => parse_event(message).map(|event| vec![event]),
            [VERSION, b'b', rest @ ..] => parse_batch(rest),
            _ => None,
        };
        events.map_or(EventMessage::Unknown, EventMessage::Events)
    }
}

fn parse_batch(mut rest: &[u8]) -> Option<Vec<Event>> {
    let mut events = Vec::new();
    while !rest.is_empty() {
        let (length, after) = rest.split_at_checked(4)?;
        let (one, after) = after.split_at_checked(number(length) as usize)?;
        events.push(parse_event(one)?);
        rest = after;
    }
    Some(events)
}

impl LogSnapshot {
    /// Parses the reply of `snapshot.lua`.
    pub(super) fn parse(mut reply: Vec<Value>, params: SnapshotParams) -> Option<Self> {
        let events = reply.split_off(reply.len().min(12));
        let head: SnapshotHead = from_redis_value(Value::Array(reply)).ok()?;
        let (now, hot, epoch, generation, terms, past, absent, born, removed, marks, watched, old) = head;
        let past = past.as_deref().and_then(parse_past);
        let horizon = params.horizon.unwrap_or(now / 1000 + 1);
        let known_absent = absent.unwrap_or(0).max(horizon);
        let none = |absent, past, generation| LogSnapshot {
            now,
            bounds: LogBounds { time: now, ..LogBounds::absent(absent, past) },
            events: Vec::new(),
            bytes: 0,
            generation,
            newer: false,
        };
        let generation = generation.unwrap_or_default();
        let Some(hot) = hot else { return Some(none(known_absent, past, generation)) };
        if hot.first() != Some(&VERSION) {
            return Some(LogSnapshot { newer: true, ..none(known_absent, past, generation) });
        }
        let part = |at: usize| hot.get(1 + 6 * at..7 + 6 * at).map(number);
        let (top, time, total) = (part(0)?, part(1)?, part(2)?);
        let epoch: Epoch = epoch?.parse().ok()?;
        let born = born?;
        let idle_from = time.max(watched.unwrap_or(0)) + params.age + LINGER;
        if now > idle_from {
            // The log has expired: the next event begins another life, exactly as it is described here.
            let absent = absent.unwrap_or(0).max(born).max(idle_from / 1000 + 1) + 1;
            let past = PreviousLife { epoch, top, reason: GapReason::Reset };
            return Some(none(absent.max(horizon), Some(past), generation));
        }
        let oldest = now.saturating_sub(params.age);
        let mut first = (top + 1).saturating_sub(params.count).max(1);
        let mut before = 0;
        for (n, mark) in marks.unwrap_or_default().chunks_exact(18).enumerate() {
            let (offset, since, sum) = (number(&mark[..6]), number(&mark[6..12]), number(&mark[12..]));
            if n == 0 || since < oldest {
                first = first.max(offset);
                before = sum;
            }
        }
        let mut bounds = LogBounds {
            epoch,
            first,
            top,
            time,
            absent_since: known_absent,
            // An earlier reader may have been given the horizon, which lies a second ahead.
            born: born.max(horizon),
            terms: parse_terms(terms.as_deref().unwrap_or_default())?,
            previous: past,
            trim_reason: GapReason::Trimmed,
        };
        let one = |stored: &Value| {
            let Value::BulkString(stored) = stored else { return None };
            let mut event = parse_event(stored)?;
            if !bounds.remembers(event.epoch) {
                // Of a term that is forgotten: its readers get `reset`, and read the event as part of the oldest term.
                event.epoch = bounds.epoch_of(event.offset);
            }
            Some(Arc::new(event))
        };
        let mut events = events.iter().map(one).collect::<Option<Vec<_>>>()?;
        if time < oldest {
            bounds.first = top + 1;
            events.clear();
        }
        // Events that are too old, and not yet trimmed.
        if old > 0 {
            bounds.first = bounds.first.max(old + 1);
        }
        if removed == Some(bounds.first) {
            bounds.trim_reason = GapReason::Deleted;
        }
        Some(LogSnapshot { now, bounds, events, bytes: total - before.min(total), generation, newer: false })
    }
}

fn parse_past(text: &str) -> Option<PreviousLife> {
    let mut parts = text.split(':');
    let (epoch, top) = (parts.next()?.parse().ok()?, parts.next()?.parse().ok()?);
    let reason = if parts.next()? == "deleted" { GapReason::Deleted } else { GapReason::Reset };
    Some(PreviousLife { epoch, top, reason })
}

fn parse_terms(text: &str) -> Option<Vec<Term>> {
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
    fn malformed_messages_are_unknown() {
        for message in [&b""[..], b"\x01", b"\x02e", b"\x01exxx", b"\x01b\0\0\0\x09e", b"hello"] {
            assert!(matches!(EventMessage::parse(message), EventMessage::Unknown), "{message:?}");
        }
        assert!(matches!(EventMessage::parse(b"\x01x"), EventMessage::Changed));
    }
}
