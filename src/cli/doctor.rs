//! `weir doctor`: looks at a node as clients use it, or at a Redis as weir would use it, and says what to change.
//!
//! A finding is a line of JSON on standard output and a line for a person on standard error. Nothing here guesses
//! from settings what it can see by trying.

mod latency;
mod node;
mod redis;

use std::{
    fmt,
    io::{IsTerminal as _, stdout},
    time::Duration,
};

use latency::Span;
use serde::Serialize;

use super::{Failure, Output};

pub(super) use self::{node::examine as node, redis::examine as redis};

/// How bad it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
enum State {
    Ok,
    /// It works, and could be better or safer.
    Advice,
    /// It does not work, or loses something that weir promises.
    Problem,
}

/// One thing that was looked at.
#[derive(Debug, Serialize)]
struct Finding<'a> {
    check: &'a str,
    state: State,
    /// Which of several servers, if there are several.
    #[serde(skip_serializing_if = "Option::is_none")]
    server: Option<&'a str>,
    found: &'a str,
    /// What to do about it.
    #[serde(skip_serializing_if = "Option::is_none")]
    change: Option<&'a str>,
}

/// Where findings go as they are made: an examination that takes a minute shall not be silent for a minute.
pub struct Report<'a> {
    out: &'a mut Output,
    /// A person at a terminal gets the prose, and not each thing twice.
    json: bool,
    server: Option<String>,
    problems: usize,
    advice: usize,
}

/// Compares a clock with ours, read in the middle of an exchange that took `taken`.
fn clock(
    whose: &str,
    theirs: Duration,
    ours: Duration,
    taken: Duration,
    report: &mut Report<'_>,
) -> Result<(), Failure> {
    let (apart, word) = match theirs.checked_sub(ours) {
        Some(ahead) => (ahead, "ahead of"),
        None => (ours - theirs, "behind"),
    };
    if apart <= taken {
        return report
            .ok("clock", format!("{whose} agrees with this machine's, as far as can be seen ({})", Span(taken)));
    }
    let found = format!("{whose} is {} {word} this machine's", Span(apart));
    match apart.as_secs() {
        0 => report.ok("clock", found),
        _ => report.advice("clock", found, "let NTP set both: times of events and the expiry of tokens go by it"),
    }
}

// === impl Report ===

impl<'a> Report<'a> {
    pub fn new(out: &'a mut Output) -> Self {
        Report { out, json: !stdout().is_terminal(), server: None, problems: 0, advice: 0 }
    }

    /// Findings from here on are of this server.
    fn of(&mut self, server: impl Into<Option<String>>) {
        self.server = server.into();
        if let Some(server) = &self.server {
            eprintln!("{server}");
        }
    }

    fn ok(&mut self, check: &str, found: impl fmt::Display) -> Result<(), Failure> {
        self.add(State::Ok, check, &found.to_string(), None)
    }

    fn advice(&mut self, check: &str, found: impl fmt::Display, change: impl fmt::Display) -> Result<(), Failure> {
        self.add(State::Advice, check, &found.to_string(), Some(&change.to_string()))
    }

    fn problem(&mut self, check: &str, found: impl fmt::Display, change: impl fmt::Display) -> Result<(), Failure> {
        self.add(State::Problem, check, &found.to_string(), Some(&change.to_string()))
    }

    fn add(&mut self, state: State, check: &str, found: &str, change: Option<&str>) -> Result<(), Failure> {
        let word = match state {
            State::Ok => "ok",
            State::Advice => "advice",
            State::Problem => "PROBLEM",
        };
        self.advice += usize::from(state == State::Advice);
        self.problems += usize::from(state == State::Problem);
        eprintln!("{word:<8} {check:<12} {found}");
        if let Some(change) = change {
            eprintln!("{:<21} → {change}", "");
        }
        if self.json {
            let finding = Finding { check, state, server: self.server.as_deref(), found, change };
            let line = serde_json::to_string(&finding).map_err(|error| Failure::Failed(error.to_string()))?;
            self.out.line(&line)?;
            self.out.flush()?;
        }
        Ok(())
    }

    /// How it went as a whole. Advice is no failure.
    pub fn verdict(self) -> Result<(), Failure> {
        let count = |n: usize, one: &str, many: &str| format!("{n} {}", if n == 1 { one } else { many });
        let advice = count(self.advice, "piece of advice", "pieces of advice");
        match self.problems {
            0 => {
                super::note(format_args!("no problem, {advice}"));
                Ok(())
            }
            problems => Err(Failure::Failed(format!("{}, {advice}", count(problems, "problem", "problems")))),
        }
    }
}
