//! [`LogBounds`]: what is known of a channel's log beside its events, and what a position is worth in it.

use super::log::{Gap, GapReason};
use crate::{
    channel::Channel,
    position::{Epoch, Position, Start},
};

/// Where a log begins and ends, and what was before it.
///
/// A *life* begins with offset 1, where there was no log. It has one *term* or several: a new one begins, and offsets go
/// on, when writes may have been lost. Each has an epoch of its own.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LogBounds {
    /// The term that goes on; [`Epoch::ABSENT`] if there is no log.
    pub epoch: Epoch,
    /// Oldest offset that can be read, or of the next event if none can.
    pub first: u64,
    /// Newest offset ever placed in this life; 0 if there was none.
    pub top: u64,
    /// Of the newest event, Unix milliseconds.
    pub time: u64,
    /// From this second on the channel is known to have had no log, until (if it has one) `born`.
    pub absent_since: u64,
    pub born: u64,
    /// Terms of this life that have ended, oldest first, as far as they are remembered.
    pub terms: Vec<Term>,
    /// The life before this one, while it is remembered.
    pub previous: Option<PreviousLife>,
    /// Why the events before `first` are gone.
    pub trim_reason: GapReason,
}

/// A term that has ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Term {
    pub epoch: Epoch,
    /// Its newest offset that was not lost.
    pub end: u64,
}

/// How a life of the channel ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PreviousLife {
    pub epoch: Epoch,
    pub top: u64,
    pub reason: GapReason,
}

impl LogBounds {
    /// No log, known since the second `absent`.
    pub fn absent(since: u64, previous: Option<PreviousLife>) -> Self {
        LogBounds {
            epoch: Epoch::ABSENT,
            first: 1,
            top: 0,
            time: 0,
            absent_since: since,
            born: 0,
            terms: Vec::new(),
            previous,
            trim_reason: GapReason::Trimmed,
        }
    }

    pub fn is_absent(&self) -> bool {
        self.epoch.is_absent()
    }

    /// Where a reader is who has seen everything.
    pub fn head(&self, now: u64) -> Position {
        match self.is_absent() {
            true => Position::absent(self.absent_since.max(now / 1000)),
            false => Position { epoch: self.epoch, offset: self.top },
        }
    }

    /// Whether this is the current term, or one that has ended and is remembered.
    pub fn remembers(&self, epoch: Epoch) -> bool {
        epoch == self.epoch || self.terms.iter().any(|term| term.epoch == epoch)
    }

    /// The term in which the event `offset` is, or will be.
    pub fn epoch_of(&self, offset: u64) -> Epoch {
        self.terms.iter().find(|term| offset <= term.end).map_or(self.epoch, |term| term.epoch)
    }

    /// Where a reader is who has read up to and including `offset`.
    fn after(&self, offset: u64) -> Position {
        Position { epoch: self.epoch_of(offset + 1), offset }
    }

    /// The first position of `start`, and what is missing before it. A position in a term that has ended stays there
    /// until that is read to its end: then the next term begins with a gap.
    pub fn resolve(&self, channel: &Channel, start: Start, now: u64) -> (Position, Option<Gap>) {
        let absent = self.is_absent();
        let asked = match start {
            Start::Now => return (self.head(now), None),
            _ if absent && !matches!(start, Start::After(_)) => return (self.head(now), None),
            Start::Earliest => return (self.after(self.first - 1), None),
            Start::Last(n) => return (self.after(self.top.saturating_sub(n).max(self.first - 1)), None),
            Start::AfterOffset(offset) if offset < self.top => self.after(offset),
            Start::AfterOffset(offset) => Position { epoch: self.epoch, offset },
            Start::After(position) => position,
        };
        let gap = |reason, next, missed| {
            let gap = Gap { channel: channel.clone(), reason, after: Some(asked), next, missed };
            (gap.resume(), Some(gap))
        };
        let at = |offset| Position { epoch: self.epoch_of(offset), offset };
        let lost = |reason, missed| gap(reason, if absent { self.head(now) } else { at(self.first) }, missed);
        let term = self.terms.iter().find(|term| term.epoch == asked.epoch);
        // Everything this life has, or will have, follows.
        let contiguous = match (self.previous, term) {
            _ if asked.epoch == self.epoch && !absent => {
                if asked.offset > self.top {
                    return gap(GapReason::BadPosition, at(self.top + 1), None);
                }
                asked.offset
            }
            _ if asked.epoch.is_absent() => {
                if asked.offset < self.absent_since || (!absent && asked.offset > self.born) {
                    return lost(GapReason::Reset, None);
                }
                0
            }
            (_, Some(term)) => {
                // What else this term had is lost, and nobody knows how much it was.
                if asked.offset >= term.end {
                    return gap(GapReason::Failover, at((term.end + 1).max(self.first)), None);
                }
                if term.end < self.first {
                    return lost(GapReason::Failover, None);
                }
                asked.offset
            }
            (Some(previous), None) if previous.epoch == asked.epoch => {
                if asked.offset != previous.top {
                    let reason = if asked.offset > previous.top { GapReason::BadPosition } else { previous.reason };
                    return lost(reason, None);
                }
                0
            }
            _ => return lost(GapReason::Reset, None),
        };
        if absent {
            (self.head(now), None)
        } else if contiguous + 1 < self.first {
            lost(self.trim_reason, Some(self.first - contiguous - 1))
        } else {
            (self.after(contiguous), None)
        }
    }

    /// Orders positions of one channel: those of unknown lives first, then the life before this one, then the terms of
    /// this one.
    pub fn rank(&self, position: Position) -> (usize, u64) {
        let term = || self.terms.iter().position(|term| term.epoch == position.epoch);
        match position.epoch {
            epoch if epoch.is_absent() && self.is_absent() => (3, position.offset),
            epoch if epoch.is_absent() => (2, position.offset),
            epoch if epoch == self.epoch => (3 + self.terms.len(), position.offset),
            epoch if self.previous.is_some_and(|previous| previous.epoch == epoch) => (1, position.offset),
            _ => term().map_or((0, 0), |term| (3 + term, position.offset)),
        }
    }

    /// Whether `position` is one of a reader that has read no further than this knows of.
    pub fn knows(&self, position: Position) -> bool {
        match position.epoch {
            epoch if epoch == self.epoch => epoch.is_absent() || position.offset <= self.top,
            epoch => self.terms.iter().any(|term| term.epoch == epoch && position.offset <= term.end),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn epoch(name: &str) -> Epoch {
        name.parse().unwrap()
    }

    /// Offsets 1–47 in term a, of which 48 and more were lost; 48–60 in b, nothing in c, from 61 on in d.
    fn terms() -> LogBounds {
        let ended = |name, end| Term { epoch: epoch(name), end };
        LogBounds {
            epoch: epoch("dddddd"),
            top: 70,
            born: 100,
            terms: vec![ended("aaaaaa", 47), ended("bbbbbb", 60), ended("cccccc", 60)],
            ..LogBounds::absent(50, None)
        }
    }

    fn resolve(bounds: &LogBounds, start: Start) -> (String, Option<(GapReason, String, Option<u64>)>) {
        let channel = Channel::parse("a").unwrap();
        let (at, gap) = bounds.resolve(&channel, start, 200_000);
        (at.to_string(), gap.map(|gap| (gap.reason, gap.next.to_string(), gap.missed)))
    }

    fn after(name: &str, offset: u64) -> Start {
        Start::After(Position { epoch: epoch(name), offset })
    }

    #[test]
    fn a_term_is_read_to_its_end_and_the_next_is_announced() {
        let log = terms();
        assert_eq!(resolve(&log, after("aaaaaa", 46)), ("aaaaaa-46".into(), None));
        let crossing = |next: &str| Some((GapReason::Failover, next.to_owned(), None));
        for had in [47, 48, 50] {
            assert_eq!(resolve(&log, after("aaaaaa", had)), ("bbbbbb-47".into(), crossing("bbbbbb-48")));
        }
        assert_eq!(resolve(&log, after("bbbbbb", 60)), ("dddddd-60".into(), crossing("dddddd-61")));
        assert_eq!(resolve(&log, after("cccccc", 60)), ("dddddd-60".into(), crossing("dddddd-61")));
        assert_eq!(resolve(&log, after("dddddd", 61)), ("dddddd-61".into(), None));
        assert_eq!(resolve(&log, after("eeeeee", 61)).1, Some((GapReason::Reset, "aaaaaa-1".into(), None)));
        assert_eq!(resolve(&log, Start::Earliest), ("aaaaaa-0".into(), None));
        assert_eq!(resolve(&log, Start::Last(15)), ("bbbbbb-55".into(), None));
        assert_eq!(resolve(&log, Start::AfterOffset(47)), ("bbbbbb-47".into(), None));
        assert_eq!(resolve(&log, Start::AfterOffset(70)), ("dddddd-70".into(), None));
        assert_eq!(resolve(&log, Start::After(Position::absent(60))), ("aaaaaa-0".into(), None));
    }

    #[test]
    fn what_is_trimmed_may_hide_a_crossing() {
        let log = LogBounds { first: 50, ..terms() };
        let lost = resolve(&log, after("aaaaaa", 20)).1;
        assert_eq!(lost, Some((GapReason::Failover, "bbbbbb-50".into(), None)));
        assert_eq!(resolve(&log, after("aaaaaa", 47)).1, Some((GapReason::Failover, "bbbbbb-50".into(), None)));
        assert_eq!(resolve(&log, after("bbbbbb", 48)).1, Some((GapReason::Trimmed, "bbbbbb-50".into(), Some(1))));
        assert_eq!(resolve(&log, Start::Earliest), ("bbbbbb-49".into(), None));
    }

    #[test]
    fn later_terms_are_later() {
        let log = terms();
        let rank = |name: &str, offset| log.rank(Position { epoch: epoch(name), offset });
        assert!(rank("aaaaaa", 50) < rank("bbbbbb", 48) && rank("bbbbbb", 60) < rank("dddddd", 61));
        assert!(rank("eeeeee", 99) < rank("aaaaaa", 1));
    }
}
