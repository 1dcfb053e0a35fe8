//! The command line: what can be typed, and the commands that talk to a node as any client does.
//!
//! They use nothing of the node but its wire; [`crate::config`] and small helpers of the library aside.

mod args;
mod client;
mod commands;
mod connect;
mod doctor;
mod provide;
mod publish;
mod sse;
mod welcome;

use std::{fmt, process::ExitCode, time::Duration};

use serde::Serialize;
use serde_json::value::RawValue;

pub use args::{Cli, ClientCommand, Command, ConfigCommand, ImportCommand, Serve};
pub use welcome::welcome;

pub use crate::terminal::USAGE;
use crate::{
    config::Config,
    terminal::{Failure, Output, note},
};

/// Runs a client command to its end. Blocks; has a runtime of its own.
pub fn run(command: ClientCommand) -> ExitCode {
    block_on(commands::run(command))
}

/// Imports into the bus of a configuration. Blocks, with a runtime of its own.
pub fn import(command: &ImportCommand, config: Config) -> ExitCode {
    block_on(async {
        let mut out = Output::new();
        let done = command.run(config, &mut out).await;
        out.flush()?;
        done
    })
}

fn block_on(work: impl Future<Output = Result<(), Failure>>) -> ExitCode {
    // One thread is plenty for one connection.
    let runtime = match tokio::runtime::Builder::new_current_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => return Failure::Failed(error.to_string()).exit(),
    };
    let done = runtime.block_on(work);
    // Whoever still reads standard input is not waited for.
    runtime.shutdown_background();
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => failure.exit(),
    }
}

// === Target ===

/// Path and query of a request, written piece by piece.
#[derive(Clone, Debug)]
pub struct Target(String);

impl Target {
    /// `path` is weir's own and needs no escape.
    fn new(path: &str) -> Self {
        Target(path.to_owned())
    }

    /// Adds to the path; `/` stays what it is.
    fn path(mut self, name: &str) -> Self {
        escape(name, b"/", &mut self.0);
        self
    }

    /// Adds to the path as one segment.
    fn segment(mut self, name: &str) -> Self {
        escape(name, b"", &mut self.0);
        self
    }

    fn query(mut self, name: &str, value: impl fmt::Display) -> Self {
        self.0.push(if self.0.contains('?') { '&' } else { '?' });
        self.0.push_str(name);
        self.0.push('=');
        escape(&value.to_string(), b"", &mut self.0);
        self
    }

    fn maybe(self, name: &str, value: Option<impl fmt::Display>) -> Self {
        match value {
            Some(value) => self.query(name, value),
            None => self,
        }
    }

    fn each<T: fmt::Display>(self, name: &str, values: impl IntoIterator<Item = T>) -> Self {
        values.into_iter().fold(self, |target, value| target.query(name, value))
    }
}

impl fmt::Display for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

fn escape(text: &str, also: &[u8], out: &mut String) {
    for byte in text.bytes() {
        if byte.is_ascii_alphanumeric() || b"-._~".contains(&byte) || also.contains(&byte) {
            out.push(char::from(byte));
        } else {
            out.push_str(&format!("%{byte:02X}"));
        }
    }
}

// === Backoff ===

/// How long to wait before the next attempt: doubling from a quarter of a second to ten, with jitter so that many
/// clients of a node that restarts do not all come back at once.
#[derive(Debug, Default)]
struct Backoff {
    failures: u32,
}

impl Backoff {
    fn next(&mut self) -> Duration {
        let longest = Duration::from_millis(250 << self.failures.min(6)).min(Duration::from_secs(10));
        self.failures = self.failures.saturating_add(1);
        longest.mul_f64(0.5 + fastrand::f64() / 2.0)
    }

    fn reset(&mut self) {
        self.failures = 0;
    }
}

// === Lenient ===

/// Text that is JSON goes as it is, any other as a JSON string.
#[derive(Serialize)]
#[serde(untagged)]
enum Lenient<'a> {
    Json(&'a RawValue),
    Text(&'a str),
}

impl<'a> Lenient<'a> {
    fn of(text: &'a str) -> Self {
        serde_json::from_str(text).map_or(Lenient::Text(text), Lenient::Json)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_survive_the_url() {
        let target = Target::new("/v1/services/").path("a/b c?d").query("x", "1&2=3").maybe("y", None::<&str>);
        assert_eq!(target.each("c", ["ü", "*"]).to_string(), "/v1/services/a/b%20c%3Fd?x=1%262%3D3&c=%C3%BC&c=%2A");
    }

    #[test]
    fn waits_grow_and_end() {
        let mut backoff = Backoff::default();
        let first = backoff.next();
        assert!(first >= Duration::from_millis(125) && first <= Duration::from_millis(250));
        for _ in 0..100 {
            assert!(backoff.next() <= Duration::from_secs(10));
        }
        backoff.reset();
        assert!(backoff.next() <= Duration::from_millis(250));
    }

    #[test]
    fn the_command_line_makes_sense() {
        <Cli as clap::CommandFactory>::command().debug_assert();
    }
}
