//! Output of commands: results as lines of JSON on standard output, sentences on standard error.

use std::{
    fmt,
    io::{self, StdoutLock, Write as _},
    process::ExitCode,
};

use serde_json::value::RawValue;

use crate::json::write_json_line;

/// Why a command fails, with its exit code and the text for standard error.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Failure {
    /// 1: it was tried and failed.
    Failed(String),
    /// 2: invalid arguments or settings.
    Usage(String),
    /// 3: the node rejected it; to repeat it does not help.
    Refused(String),
    /// 4: the node, or what it needs, is not available.
    Unavailable(String),
    /// 0: the reader of standard output has closed it.
    OutputClosed,
}

/// The exit code for invalid arguments and settings.
pub const USAGE: u8 = 2;

/// Standard output, written when [`flush`](Output::flush)ed.
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

    pub(crate) fn flush(&mut self) -> Result<(), Failure> {
        self.0.flush().map_err(write_failure)
    }
}

/// A closed pipe, as in `weir tail … | head -1`, is no failure of the command.
fn write_failure(error: io::Error) -> Failure {
    match error.kind() {
        io::ErrorKind::BrokenPipe => Failure::OutputClosed,
        _ => Failure::Failed(format!("standard output: {error}")),
    }
}

/// Prints a sentence for the user to standard error.
pub(crate) fn note(text: fmt::Arguments<'_>) {
    eprintln!("weir: {text}");
}

// === impl Failure ===

impl Failure {
    pub(crate) fn exit(self) -> ExitCode {
        let (code, text) = match self {
            Failure::OutputClosed => return ExitCode::SUCCESS,
            Failure::Failed(text) => (1, text),
            Failure::Usage(text) => (USAGE, text),
            Failure::Refused(text) => (3, text),
            Failure::Unavailable(text) => (4, text),
        };
        note(format_args!("{text}"));
        ExitCode::from(code)
    }
}
