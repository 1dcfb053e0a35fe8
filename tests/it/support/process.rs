//! The real binary as a child process, killed with the test.

use std::{
    io::{BufRead, BufReader},
    net::SocketAddr,
    process::{Child, Command, ExitStatus, Stdio},
    sync::{Arc, mpsc},
    thread::JoinHandle,
};

use parking_lot::Mutex;
use rustix::process::{Pid, Resource, Rlimit, Signal, kill_process, prlimit};
use serde_json::Value;

use super::{command::weir_command, eventually::PATIENCE, eventually_blocking};

/// A running `weir serve`.
pub struct Process {
    child: Child,
    log: Arc<Mutex<String>>,
    reader: Option<JoinHandle<()>>,
    pub address: SocketAddr,
}

impl Process {
    /// Starts `weir serve` on a free port, with environment variables, and returns when it listens.
    pub fn start(environment: &[(&str, &str)]) -> Self {
        let mut command = weir_command();
        command.envs(environment.iter().copied());
        Process::spawn(command)
    }

    /// Starts `weir serve` in a shell that allows it to open so many files.
    pub fn start_with_files(files: u32) -> Self {
        let weir = weir_command();
        let mut shell = Command::new("sh");
        shell.args(["-c", &format!("ulimit -n {files}; exec \"$0\" \"$@\"")]).arg(weir.get_program());
        for (name, value) in weir.get_envs() {
            match value {
                Some(value) => shell.env(name, value),
                None => shell.env_remove(name),
            };
        }
        if let Some(dir) = weir.get_current_dir() {
            shell.current_dir(dir);
        }
        Process::spawn(shell)
    }

    fn spawn(mut command: Command) -> Self {
        let mut child = command
            .args(["serve", "--listen", "127.0.0.1:0"])
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let log = Arc::new(Mutex::new(String::new()));
        let (tx, rx) = mpsc::channel();
        let (lines, mut stderr) = (log.clone(), BufReader::new(child.stderr.take().unwrap()));
        // The log is read to its end: weir would block when the pipe is full.
        let reader = std::thread::spawn(move || {
            let mut line = String::new();
            while stderr.read_line(&mut line).is_ok_and(|n| n > 0) {
                if let Some(address) = address(&line) {
                    let _ = tx.send(address);
                }
                lines.lock().push_str(&std::mem::take(&mut line));
            }
        });
        let address = rx.recv_timeout(PATIENCE).unwrap_or_else(|_| {
            let _ = (child.kill(), child.wait());
            panic!("weir does not listen:\n{}", log.lock())
        });
        Process { child, log, reader: Some(reader), address }
    }

    /// Starts a node on Redis.
    pub fn start_on(redis: &str) -> Self {
        Process::start(&[("WEIR__BUS__BACKEND", "redis"), ("WEIR__BUS__REDIS__URL", redis)])
    }

    pub fn url(&self) -> String {
        format!("http://{}", self.address)
    }

    /// The log so far.
    pub fn log(&self) -> String {
        self.log.lock().clone()
    }

    /// Waits until it has ended by itself, with success. Returns the whole log.
    pub fn ended(mut self) -> String {
        assert!(exit_status(&mut self.child).success());
        self.reader.take().unwrap().join().unwrap();
        self.log()
    }

    /// Changes how many files the running process may open.
    pub fn limit_files(&self, files: u64) {
        let limit = Rlimit { current: Some(files), maximum: Some(files) };
        prlimit(Pid::from_raw(i32::try_from(self.child.id()).unwrap()), Resource::Nofile, limit).unwrap();
    }

    pub fn signal(&self, signal: Signal) {
        send_signal(&self.child, signal);
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// The address in the first line that names one of weir's own listeners.
fn address(line: &str) -> Option<SocketAddr> {
    let line: Value = serde_json::from_str(line).ok()?;
    line["url"].as_str()?.strip_prefix("http://")?.parse().ok()
}

pub fn send_signal(child: &Child, signal: Signal) {
    send_signal_to(Pid::from_raw(i32::try_from(child.id()).unwrap()).unwrap(), signal);
}

/// Waits until a process has ended.
pub fn exit_status(child: &mut Child) -> ExitStatus {
    let mut status = None;
    eventually_blocking("the process has ended", || {
        status = child.try_wait().unwrap();
        status.is_some()
    });
    status.unwrap()
}

/// Sends a signal. After SIGSTOP, returns when every thread has stopped: on a busy machine some run on for a while.
pub fn send_signal_to(pid: Pid, signal: Signal) {
    kill_process(pid, signal).unwrap();
    if signal != Signal::STOP {
        return;
    }
    let path = format!("/proc/{}/task", pid.as_raw_nonzero());
    let stopped = |stat: &str| stat.rsplit(')').next().is_some_and(|rest| rest.trim_start().starts_with('T'));
    while !std::fs::read_dir(&path)
        .unwrap()
        .all(|task| stopped(&std::fs::read_to_string(task.unwrap().path().join("stat")).unwrap_or_default()))
    {
        std::thread::yield_now();
    }
}
