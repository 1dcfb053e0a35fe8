//! Output of commands: results as lines of JSON or as tables on standard output, sentences on standard error.

mod table;

use std::{
    fmt,
    io::{self, IsTerminal as _, StdoutLock, Write as _},
    process::ExitCode,
};

use serde::Serialize;
use serde_json::value::RawValue;

use self::table::TextTable;
pub(crate) use self::table::utc;
use crate::json::{parse_owned, write_json_line};

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

/// Prints the objects of a list: on a terminal as a table, otherwise as lines of JSON.
pub(crate) struct ObjectList<'a> {
    out: &'a mut Output,
    table: Option<TextTable>,
}

/// Whether results are printed for people: standard output is a terminal, and JSON is not requested.
pub(crate) fn is_for_people(json: bool) -> bool {
    !json && io::stdout().is_terminal()
}

impl<'a> ObjectList<'a> {
    /// `json`: lines of JSON on a terminal, too.
    pub(crate) fn new(json: bool, out: &'a mut Output) -> Self {
        ObjectList { out, table: is_for_people(json).then(TextTable::default) }
    }

    pub(crate) fn add(&mut self, object: &RawValue) -> Result<(), Failure> {
        match (&mut self.table, parse_owned(object.get().as_bytes())) {
            (Some(table), Ok(members)) => {
                table.add(&members);
                Ok(())
            }
            // Not an object.
            _ => self.out.json(object),
        }
    }

    /// Ends the list. On a terminal, an empty list is a message.
    pub(crate) fn finish(self) -> Result<(), Failure> {
        let Some(table) = self.table else { return self.out.flush() };
        let lines = table.lines();
        if lines.is_empty() {
            note(format_args!("the list is empty"));
        }
        lines.iter().try_for_each(|line| self.out.line(line))?;
        self.out.flush()
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
