//! Output of commands: results as lines of JSON on standard output, sentences on standard error.

use std::{
    fmt,
    io::{self, StdoutLock, Write as _},
    process::ExitCode,
};

use serde::Serialize;
use serde_json::value::RawValue;

use crate::json::write_json_line;

/// Why a command fails, with its exit code and the text for standard error.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Failure {
    /// Exit code 1: the operation failed.
    Failed(String),
    /// Exit code 2: invalid arguments or settings.
    Usage(String),
    /// Exit code 3: the node rejected the request, and would reject it again.
    Rejected(String),
    /// Exit code 4: the node, or a server that it needs, is unavailable.
    Unavailable(String),
    /// Exit code 0: the reader of standard output has closed it.
    OutputClosed,
}

/// The exit code for invalid arguments and settings.
pub const USAGE: u8 = 2;

/// Buffered standard output, written by [`flush`](Output::flush).
pub(crate) struct Output(io::BufWriter<StdoutLock<'static>>);

impl Output {
    pub(crate) fn new() -> Self {
        Output(io::BufWriter::new(io::stdout().lock()))
    }

    /// Writes a line of JSON.
    pub(crate) fn line(&mut self, json: &str) -> Result<(), Failure> {
        writeln!(self.0, "{json}").map_err(write_failure)
    }

    /// Writes a value on one line. Numbers keep all their digits.
    pub(crate) fn json(&mut self, json: &RawValue) -> Result<(), Failure> {
        let mut line = Vec::with_capacity(json.get().len() + 1);
        write_json_line(json, &mut line);
        line.push(b'\n');
        self.0.write_all(&line).map_err(write_failure)
    }

    /// Serializes a value, and flushes it so that a slow command shows its progress.
    pub(crate) fn value(&mut self, value: &impl Serialize) -> Result<(), Failure> {
        let line = serde_json::to_string(value).map_err(|error| Failure::Failed(error.to_string()))?;
        writeln!(self.0, "{line}").map_err(write_failure)?;
        self.flush()
    }

    pub(crate) fn flush(&mut self) -> Result<(), Failure> {
        self.0.flush().map_err(write_failure)
    }
}

/// A closed pipe, as in `weir tail … | head -1`, is not a failure of the command.
fn write_failure(error: io::Error) -> Failure {
    match error.kind() {
        io::ErrorKind::BrokenPipe => Failure::OutputClosed,
        _ => Failure::Failed(format!("standard output: {error}")),
    }
}

/// Prints a message for the user to standard error.
pub(crate) fn note(text: fmt::Arguments<'_>) {
    eprintln!("weir: {text}");
}

// === impl Failure ===

impl Failure {
    /// Prints the failure, and returns its exit code.
    pub(crate) fn exit(self) -> ExitCode {
        let (code, text) = match self {
            Failure::OutputClosed => return ExitCode::SUCCESS,
            Failure::Failed(text) => (1, text),
            Failure::Usage(text) => (USAGE, text),
            Failure::Rejected(text) => (3, text),
            Failure::Unavailable(text) => (4, text),
        };
        note(format_args!("{text}"));
        ExitCode::from(code)
    }
}
