//! Standard output: JSON, a line each.

use std::io::{self, StdoutLock, Write as _};

use serde_json::value::RawValue;

use super::Failure;
use crate::json::write_json_line;

/// Standard output, written when [`flush`](Output::flush)ed.
pub struct Output(io::BufWriter<StdoutLock<'static>>);

impl Output {
    pub fn new() -> Self {
        Output(io::BufWriter::new(io::stdout().lock()))
    }

    /// A value that is JSON already, and has no line break in it.
    pub fn line(&mut self, json: &str) -> Result<(), Failure> {
        writeln!(self.0, "{json}").map_err(closed)
    }

    /// A value as it came, on one line: its numbers keep every digit.
    pub fn json(&mut self, json: &RawValue) -> Result<(), Failure> {
        let mut line = Vec::with_capacity(json.get().len() + 1);
        write_json_line(json, &mut line);
        line.push(b'\n');
        self.0.write_all(&line).map_err(closed)
    }

    pub fn flush(&mut self) -> Result<(), Failure> {
        self.0.flush().map_err(closed)
    }
}

/// `weir tail … | head -1` has what it wanted: no failure.
fn closed(error: io::Error) -> Failure {
    match error.kind() {
        io::ErrorKind::BrokenPipe => Failure::NobodyListens,
        _ => Failure::Failed(format!("standard output: {error}")),
    }
}
