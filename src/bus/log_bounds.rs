//! [`LogBounds`], where a channel's log begins and ends, and what a position is worth in it.

use super::gap::{Gap, GapReason};
use crate::{
    channel::Channel,
    position::{Epoch, Position, Start},
};

/// Where a log begins and ends, and what preceded it.
///
/// A *life* begins with offset 1, where there was no log. It has one or more *terms*: a new term begins, and offsets go
/// on, when writes may have been lost. Each term has its own epoch.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct LogBounds {
    /// The current term; [`Epoch::ABSENT`] if there is no log.
    pub(crate) epoch: Epoch,
    /// Oldest offset that can be read; `top + 1` if there is none.
    pub(crate) first: u64,
    /// Newest offset ever placed in this life; 0 if there is none.
    pub(crate) top: u64,
    /// Time of the newest event, Unix milliseconds.
    pub(crate) time: u64,
    /// Unix second from which on the channel is known to have had no log, until `born` if it has one now.
    pub(crate) absent_since: u64,
    /// Unix second in which this life began.
    pub(crate) born: u64,
    /// Ended terms of this life that are remembered, oldest first.
    pub(crate) terms: Vec<Term>,
    /// The life before this one, while it is remembered.
    pub(crate) previous: Option<PreviousLife>,
    /// Why the events before `first` are gone.
    pub(crate) trim_reason: GapReason,
}

/// A term that has ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Term {
    pub(crate) epoch: Epoch,
    /// Its newest offset that was not lost.
    pub(crate) end: u64,
}

/// How the previous life of a channel ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct PreviousLife {
    pub(crate) epoch: Epoch,
    pub(crate) top: u64,
    pub(crate) reason: GapReason,
}

impl LogBounds {
    /// No log, as it is known to have been from the second `since` on.
    pub(crate) fn absent(since: u64, previous: Option<PreviousLife>) -> Self {
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

    /// Begins a life if there is none. `now` is in Unix milliseconds.
    pub(crate) fn begin(&mut self, now: u64) {
        if self.is_absent() {
            let Self { absent_since, time, previous, .. } = *self;
            let born = absent_since.max(now / 1000);
            *self = Self { epoch: Epoch::random(), born, time, ..Self::absent(absent_since, previous) };
        }
    }

    /// The bounds once this life has ended; unchanged if there is none. `now` is in Unix milliseconds.
    pub(crate) fn ended(&self, now: u64, reason: GapReason) -> Self {
        if self.is_absent() {
            return self.clone();
        }
        // A position of this very second may be older than the end.
        let since = self.absent_since.max(self.born).max(now / 1000) + 1;
        let previous = PreviousLife { epoch: self.epoch, top: self.top, reason };
        Self { time: self.time, ..Self::absent(since, Some(previous)) }
    }

    pub(crate) fn is_absent(&self) -> bool {
        self.epoch.is_absent()
    }

    /// Position of a reader that has read everything. `now` is in Unix milliseconds.
    pub(crate) fn head(&self, now: u64) -> Position {
        match self.is_absent() {
            true => Position::absent(self.absent_since.max(now / 1000)),
            false => Position { epoch: self.epoch, offset: self.top },
        }
    }

    /// Whether `epoch` is the current term, or an ended one that is remembered.
    pub(crate) fn remembers(&self, epoch: Epoch) -> bool {
        epoch == self.epoch || self.terms.iter().any(|term| term.epoch == epoch)
    }

    /// The term that the event `offset` belongs, or will belong, to.
    pub(crate) fn epoch_of(&self, offset: u64) -> Epoch {
        self.terms.iter().find(|term| offset <= term.end).map_or(self.epoch, |term| term.epoch)
    }

    /// Position of a reader that has read up to and including `offset`.
    fn after(&self, offset: u64) -> Position {
        Position { epoch: self.epoch_of(offset + 1), offset }
    }

    /// The first position of `start`, and the history that is missing before it. A position in an ended term stays there
    /// until the term is read to its end; then the next term begins with a gap. `now` is in Unix milliseconds.
    pub(crate) fn resolve(&self, channel: &Channel, start: Start, now: u64) -> (Position, Option<Gap>) {
        let absent = self.is_absent();
        let requested = match start {
            Start::Now => return (self.head(now), None),
            _ if absent && !matches!(start, Start::After(_)) => return (self.head(now), None),
            Start::Earliest => return (self.after(self.first - 1), None),
            Start::Last(n) => return (self.after(self.top.saturating_sub(n).max(self.first - 1)), None),
            Start::AfterOffset(offset) if offset < self.top => self.after(offset),
            Start::AfterOffset(offset) => Position { epoch: self.epoch, offset },
            Start::After(position) => position,
        };
        let gap = |reason, next, missed| {
            let gap = Gap { channel: channel.clone(), reason, after: Some(requested), next, missed };
            (gap.resume(), Some(gap))
        };
        let at = |offset| Position { epoch: self.epoch_of(offset), offset };
        let lost = |reason, missed| gap(reason, if absent { self.head(now) } else { at(self.first) }, missed);
        let term = self.terms.iter().find(|term| term.epoch == requested.epoch);
        // The offset that the remaining events of this life follow without a gap.
        let contiguous = match (self.previous, term) {
            _ if requested.epoch == self.epoch && !absent => {
                if requested.offset > self.top {
                    return gap(GapReason::BadPosition, at(self.top + 1), None);
                }
                requested.offset
            }
            _ if requested.epoch.is_absent() => {
                if requested.offset < self.absent_since || (!absent && requested.offset > self.born) {
                    return lost(GapReason::Reset, None);
                }
                0
            }
            (_, Some(term)) => {
                // The rest of this term is lost, and its length is unknown.
                if requested.offset >= term.end {
                    return gap(GapReason::Failover, at((term.end + 1).max(self.first)), None);
                }
                if term.end < self.first {
                    return lost(GapReason::Failover, None);
                }
                requested.offset
            }
            (Some(previous), None) if previous.epoch == requested.epoch => {
                if requested.offset != previous.top {
                    let reason = if requested.offset > previous.top { GapReason::BadPosition } else { previous.reason };
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

    /// Orders the positions of one channel: first those of unknown lives, then the previous life, then the terms of this
    /// life.
    pub(crate) fn rank(&self, position: Position) -> (usize, u64) {
        let term = || self.terms.iter().position(|term| term.epoch == position.epoch);
        match position.epoch {
            epoch if epoch.is_absent() && self.is_absent() => (3, position.offset),
            epoch if epoch.is_absent() => (2, position.offset),
            epoch if epoch == self.epoch => (3 + self.terms.len(), position.offset),
            epoch if self.previous.is_some_and(|previous| previous.epoch == epoch) => (1, position.offset),
            _ => term().map_or((0, 0), |term| (3 + term, position.offset)),
        }
    }

    /// Whether a reader at `position` has read no further than these bounds reach.
    pub(crate) fn covers(&self, position: Position) -> bool {
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

    /// Offsets 1–47 in term a, whose offsets from 48 on were lost; 48–60 in b; none in c; from 61 on in d.
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
    fn a_term_is_read_to_its_end_and_the_next_one_is_announced() {
        let log = terms();
        assert_eq!(resolve(&log, after("aaaaaa", 46)), ("aaaaaa-46".into(), None));
        let failover = |next: &str| Some((GapReason::Failover, next.to_owned(), None));
        for offset in [47, 48, 50] {
            assert_eq!(resolve(&log, after("aaaaaa", offset)), ("bbbbbb-47".into(), failover("bbbbbb-48")));
        }
        assert_eq!(resolve(&log, after("bbbbbb", 60)), ("dddddd-60".into(), failover("dddddd-61")));
        assert_eq!(resolve(&log, after("cccccc", 60)), ("dddddd-60".into(), failover("dddddd-61")));
        assert_eq!(resolve(&log, after("dddddd", 61)), ("dddddd-61".into(), None));
        assert_eq!(resolve(&log, after("eeeeee", 61)).1, Some((GapReason::Reset, "aaaaaa-1".into(), None)));
        assert_eq!(resolve(&log, Start::Earliest), ("aaaaaa-0".into(), None));
        assert_eq!(resolve(&log, Start::Last(15)), ("bbbbbb-55".into(), None));
        assert_eq!(resolve(&log, Start::AfterOffset(47)), ("bbbbbb-47".into(), None));
        assert_eq!(resolve(&log, Start::AfterOffset(70)), ("dddddd-70".into(), None));
        assert_eq!(resolve(&log, Start::After(Position::absent(60))), ("aaaaaa-0".into(), None));
    }

    #[test]
    fn trimming_may_hide_the_end_of_a_term() {
        let log = LogBounds { first: 50, ..terms() };
        let lost = resolve(&log, after("aaaaaa", 20)).1;
        assert_eq!(lost, Some((GapReason::Failover, "bbbbbb-50".into(), None)));
        assert_eq!(resolve(&log, after("aaaaaa", 47)).1, Some((GapReason::Failover, "bbbbbb-50".into(), None)));
        assert_eq!(resolve(&log, after("bbbbbb", 48)).1, Some((GapReason::Trimmed, "bbbbbb-50".into(), Some(1))));
        assert_eq!(resolve(&log, Start::Earliest), ("bbbbbb-49".into(), None));
    }

    #[test]
    fn later_terms_rank_higher() {
        let log = terms();
        let rank = |name: &str, offset| log.rank(Position { epoch: epoch(name), offset });
        assert!(rank("aaaaaa", 50) < rank("bbbbbb", 48) && rank("bbbbbb", 60) < rank("dddddd", 61));
        assert!(rank("eeeeee", 99) < rank("aaaaaa", 1));
    }
}
