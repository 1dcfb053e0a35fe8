//! [`Report`]: the findings, printed as they are made.

use std::{
    fmt,
    time::{Duration, SystemTime},
};

use serde::Serialize;

use super::latency::Span;
use crate::terminal::{Failure, Output, is_for_people, note};

/// The severity of a finding.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
enum FindingState {
    Ok,
    /// It works, but could be better or safer.
    Advice,
    /// It does not work, or breaks a guarantee of weir.
    Problem,
}

/// The result of a check.
#[derive(Debug, Serialize)]
struct Finding<'a> {
    check: &'a str,
    state: FindingState,
    /// The examined server, because there can be several.
    #[serde(skip_serializing_if = "Option::is_none")]
    server: Option<&'a str>,
    found: &'a str,
    /// The remedy.
    #[serde(skip_serializing_if = "Option::is_none")]
    change: Option<&'a str>,
}

/// Prints and counts findings.
pub(crate) struct Report<'a> {
    out: &'a mut Output,
    /// False on a terminal, where the prose suffices.
    json: bool,
    server: Option<String>,
    problems: usize,
    advice: usize,
}

// === impl Report ===

impl<'a> Report<'a> {
    /// `json`: lines of JSON on a terminal, too.
    pub(crate) fn new(json: bool, out: &'a mut Output) -> Self {
        Report { out, json: !is_for_people(json), server: None, problems: 0, advice: 0 }
    }

    /// Sets the server of the following findings.
    pub(super) fn of(&mut self, server: impl Into<Option<String>>) {
        self.server = server.into();
        if let Some(server) = &self.server {
            eprintln!("{server}");
        }
    }

    pub(super) fn ok(&mut self, check: &str, found: impl fmt::Display) -> Result<(), Failure> {
        self.add(FindingState::Ok, check, &found.to_string(), None)
    }

    pub(super) fn advice(
        &mut self,
        check: &str,
        found: impl fmt::Display,
        change: impl fmt::Display,
    ) -> Result<(), Failure> {
        self.add(FindingState::Advice, check, &found.to_string(), Some(&change.to_string()))
    }

    pub(super) fn problem(
        &mut self,
        check: &str,
        found: impl fmt::Display,
        change: impl fmt::Display,
    ) -> Result<(), Failure> {
        self.add(FindingState::Problem, check, &found.to_string(), Some(&change.to_string()))
    }

    fn add(&mut self, state: FindingState, check: &str, found: &str, change: Option<&str>) -> Result<(), Failure> {
        let word = match state {
            FindingState::Ok => "ok",
            FindingState::Advice => "advice",
            FindingState::Problem => "PROBLEM",
        };
        self.advice += usize::from(state == FindingState::Advice);
        self.problems += usize::from(state == FindingState::Problem);
        eprintln!("{word:<8} {check:<12} {found}");
        if let Some(change) = change {
            eprintln!("{:<21} → {change}", "");
        }
        if self.json {
            let finding = Finding { check, state, server: self.server.as_deref(), found, change };
            self.out.value(&finding)?;
        }
        Ok(())
    }

    /// Reports the difference of a clock to that of this machine. `theirs` was requested at `requested` and received `taken`
    /// later.
    pub(super) fn clock(
        &mut self,
        name: &str,
        theirs: Duration,
        requested: Duration,
        taken: Duration,
    ) -> Result<(), Failure> {
        let ours = requested + taken / 2;
        let difference = theirs.abs_diff(ours);
        if difference <= taken {
            let found = format!("{name} agrees with that of this machine, within {}", Span(taken));
            return self.ok("clock", found);
        }
        let direction = if theirs > ours { "ahead of" } else { "behind" };
        let found = format!("{name} is {} {direction} that of this machine", Span(difference));
        match difference.as_secs() {
            0 => self.ok("clock", found),
            _ => self.advice("clock", found, "synchronize both with NTP: event times and token expiry depend on it"),
        }
    }

    /// The summary: an error if there is a problem.
    pub(crate) fn verdict(self) -> Result<(), Failure> {
        let count = |n: usize, one: &str, many: &str| format!("{n} {}", if n == 1 { one } else { many });
        let advice = count(self.advice, "piece of advice", "pieces of advice");
        match self.problems {
            0 => {
                note(format_args!("no problem, {advice}"));
                Ok(())
            }
            problems => Err(Failure::Failed(format!("{}, {advice}", count(problems, "problem", "problems")))),
        }
    }
}

/// The current Unix time.
pub(super) fn unix_time() -> Duration {
    SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default()
}
