//! Runs of the binary's client commands, in processes of their own.

use std::{
    io::{BufRead as _, BufReader, Write as _},
    process::{Child, Command, Output, Stdio},
    sync::{Arc, mpsc},
    thread,
};

use parking_lot::Mutex;
use serde_json::Value;

use super::{MINUTE, eventually::PATIENCE, eventually_blocking};

/// The binary, without any setting of the environment or of a file.
pub fn weir_command() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_weir"));
    for (name, _) in std::env::vars_os().filter(|(name, _)| name.to_string_lossy().starts_with("WEIR")) {
        command.env_remove(name);
    }
    // There is no config.toml.
    command.current_dir(concat!(env!("CARGO_MANIFEST_DIR"), "/tests"));
    command
}

/// A command that has ended.
pub struct Finished {
    pub code: Option<i32>,
    /// Of standard output, each of which is JSON.
    pub lines: Vec<Value>,
    /// Standard error.
    pub notes: String,
}

impl From<Output> for Finished {
    fn from(output: Output) -> Self {
        let lines = String::from_utf8(output.stdout).unwrap();
        let lines = lines.lines().map(|line| serde_json::from_str(line).expect(line)).collect();
        Finished { code: output.status.code(), lines, notes: String::from_utf8(output.stderr).unwrap() }
    }
}

impl Finished {
    #[track_caller]
    pub fn ok(self) -> Vec<Value> {
        assert_eq!(self.code, Some(0), "{}", self.notes);
        self.lines
    }

    #[track_caller]
    pub fn fails(&self, code: i32, notes: &str) {
        assert_eq!(self.code, Some(code), "{}", self.notes);
        assert!(self.notes.contains(notes), "{}", self.notes);
    }
}

/// Runs a command to its end without blocking the runtime, on which servers of the test may run.
pub async fn finish(command: Command) -> Finished {
    let output = tokio::process::Command::from(command).stdin(Stdio::null()).kill_on_drop(true).output();
    // `weir doctor` waits for several timeouts, one after the other.
    tokio::time::timeout(2 * MINUTE, output).await.expect("it ends").unwrap().into()
}

/// Runs a command of a node to its end, with `input` as standard input.
pub fn finish_blocking(url: &str, args: &[&str], input: &str) -> Finished {
    let mut command = weir_command();
    command.args(args).env("WEIR_URL", url).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut process = command.spawn().unwrap();
    // Fails for a command that does not read its input.
    let _ = process.stdin.take().unwrap().write_all(input.as_bytes());
    process.wait_with_output().unwrap().into()
}

/// A command that goes on until it is killed, at the latest when this is dropped.
pub struct Running {
    pub process: Child,
    lines: mpsc::Receiver<String>,
    notes: Arc<Mutex<String>>,
}

impl Running {
    pub fn start(url: &str, args: &[&str]) -> Self {
        let mut command = weir_command();
        command.args(args).env("WEIR_URL", url).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut process = command.spawn().unwrap();
        let (tx, lines) = mpsc::channel();
        let out = BufReader::new(process.stdout.take().unwrap());
        thread::spawn(move || {
            for line in out.lines().map_while(Result::ok) {
                let _ = tx.send(line);
            }
        });
        let notes = Arc::new(Mutex::new(String::new()));
        let (collected, mut errors) = (notes.clone(), BufReader::new(process.stderr.take().unwrap()));
        thread::spawn(move || {
            let mut line = String::new();
            while errors.read_line(&mut line).is_ok_and(|n| n > 0) {
                collected.lock().push_str(&std::mem::take(&mut line));
            }
        });
        Running { process, lines, notes }
    }

    /// The next line of standard output.
    pub fn next(&self) -> Value {
        let line = self.lines.recv_timeout(PATIENCE).unwrap_or_else(|_| panic!("no line; notes: {}", self.notes()));
        serde_json::from_str(&line).expect(&line)
    }

    /// Standard error so far.
    pub fn notes(&self) -> String {
        self.notes.lock().clone()
    }

    /// Waits until standard error contains `text`.
    pub fn notes_contain(&self, text: &str) {
        eventually_blocking(text, || self.notes().contains(text));
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}
