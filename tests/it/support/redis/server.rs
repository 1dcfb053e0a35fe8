//! One redis-server or redis-sentinel on a free port, stopped when the value is dropped or the test process dies,
//! however it dies.

use std::{
    fs,
    io::{BufRead, BufReader, Write as _},
    net::{Ipv4Addr, TcpListener},
    path::PathBuf,
    process::{Child, ChildStdin, Command, Stdio},
    sync::atomic::{AtomicU32, Ordering},
    time::Duration,
};

use rustix::process::{Pid, Signal};

use crate::support::{MINUTE, eventually_within, process::send_signal_to};

/// A server program with its files in a directory of its own.
pub struct RedisServer {
    pub port: u16,
    program: String,
    pub(super) dir: PathBuf,
    args: Vec<String>,
    process: Option<ServerProcess>,
}

/// A shell that kills the server and removes its files when its standard input is closed, which happens also when the
/// test process is killed.
struct ServerProcess {
    shell: Child,
    stdin: Option<ChildStdin>,
    pid: Pid,
}

impl ServerProcess {
    fn spawn(program: &str, dir: &str, args: &[String]) -> Self {
        // The files stay when a server is killed to be restarted on them, and are removed otherwise.
        let script = r#"program=$1; dir=$2; shift 2
            "$program" "$@" >>"$dir/log" 2>&1 </dev/null & pid=$!
            echo $pid; read -r verdict; kill -9 $pid 2>/dev/null; wait $pid 2>/dev/null
            [ "$verdict" = keep ] || rm -rf "$dir""#;
        let mut shell = Command::new("sh")
            .args(["-c", script, "sh", program, dir])
            .args(args)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("sh");
        let mut line = String::new();
        BufReader::new(shell.stdout.take().unwrap()).read_line(&mut line).unwrap();
        let pid = Pid::from_raw(line.trim().parse().unwrap()).unwrap();
        let stdin = shell.stdin.take();
        ServerProcess { shell, stdin, pid }
    }

    fn end(&mut self, verdict: &str) {
        if let Some(mut stdin) = self.stdin.take() {
            let _ = writeln!(stdin, "{verdict}");
        }
        let _ = self.shell.wait();
    }
}

impl Drop for ServerProcess {
    fn drop(&mut self) {
        self.end("remove");
    }
}

pub fn free_port() -> u16 {
    TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap().local_addr().unwrap().port()
}

impl RedisServer {
    /// Starts a server that writes nothing to disk unless `args` say so, and waits until it answers.
    pub async fn start(args: &[&str]) -> Self {
        RedisServer::start_of("redis-server", args).await
    }

    /// As [`start`](Self::start), with another program: an older Redis, or Valkey.
    pub async fn start_of(program: &str, args: &[&str]) -> Self {
        let mut server = RedisServer::prepared(program, args);
        server.run().await;
        server
    }

    pub(super) fn prepared(program: &str, args: &[&str]) -> Self {
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let dir = std::env::temp_dir().join(format!("weir-redis-{}-{number}", std::process::id()));
        fs::create_dir_all(&dir).unwrap();
        RedisServer {
            port: 0,
            program: program.into(),
            dir,
            args: args.iter().map(|arg| (*arg).to_owned()).collect(),
            process: None,
        }
    }

    pub(super) async fn run(&mut self) {
        // Another process may bind the port between the search for a free one and its use.
        for _ in 0..10 {
            if self.port == 0 {
                self.port = free_port();
            }
            if self.spawn().await {
                return;
            }
            self.port = 0;
        }
        panic!("{} does not start:\n{}", self.program, self.log());
    }

    /// False if the process ended at once.
    async fn spawn(&mut self) -> bool {
        let program = self.program.clone();
        let dir = self.dir.display().to_string();
        let mut args: Vec<String> = Vec::new();
        if program == "redis-sentinel" {
            args.push(format!("{dir}/sentinel.conf"));
        }
        let plain = ["--bind", "127.0.0.1", "--save", "", "--appendonly", "no", "--repl-diskless-sync-delay", "0"];
        if program != "redis-sentinel" {
            args.extend(plain.map(str::to_owned));
        }
        args.extend(["--dir".into(), dir.clone(), "--port".into(), self.port.to_string()]);
        args.extend(self.args.iter().map(|arg| arg.replace("{port}", &self.port.to_string())));
        let process = ServerProcess::spawn(&program, &dir, &args);
        let pid = process.pid.as_raw_nonzero();
        self.process = Some(process);
        // A zombie has an empty command line.
        let has_ended = || fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default().is_empty();
        eventually_within(MINUTE, &format!("{program} answers or ends"), async || {
            self.try_cli(&["PING"]).await.as_deref() == Some("PONG") || has_ended()
        })
        .await;
        if has_ended() {
            if let Some(mut process) = self.process.take() {
                process.end("keep");
            }
            return false;
        }
        true
    }

    fn log(&self) -> String {
        fs::read_to_string(self.dir.join("log")).unwrap_or_default()
    }

    pub(super) fn is_running(&self) -> bool {
        self.process.is_some()
    }

    pub fn address(&self) -> String {
        format!("127.0.0.1:{}", self.port)
    }

    pub fn url(&self) -> String {
        format!("redis://{}", self.address())
    }

    /// What redis-cli prints for a command. Panics if Redis does not answer.
    pub async fn cli(&self, args: &[&str]) -> String {
        self.try_cli(args).await.unwrap_or_else(|| panic!("redis-cli {args:?}: no answer"))
    }

    pub(super) async fn try_cli(&self, args: &[&str]) -> Option<String> {
        let port = self.port.to_string();
        let done = tokio::process::Command::new("redis-cli")
            .args(["-p", &port])
            .args(args)
            .stdin(Stdio::null())
            .kill_on_drop(true)
            .output();
        let done = tokio::time::timeout(Duration::from_secs(10), done).await.ok()?.ok()?;
        done.status.success().then(|| String::from_utf8_lossy(&done.stdout).trim_end().to_owned())
    }

    /// A field of INFO.
    pub async fn info(&self, field: &str) -> Option<String> {
        let info = self.try_cli(&["INFO"]).await?;
        let found = info.lines().find_map(|line| line.trim_end().strip_prefix(field)?.strip_prefix(':'))?;
        Some(found.to_owned())
    }

    fn signal(&self, signal: Signal) {
        let process = self.process.as_ref().expect("a running server");
        send_signal_to(process.pid, signal);
    }

    /// How often the server has run `command`, calls from scripts included.
    pub async fn calls(&self, command: &str) -> u64 {
        let stats = self.cli(&["INFO", "commandstats"]).await;
        let line = stats
            .lines()
            .find_map(|line| line.strip_prefix("cmdstat_")?.strip_prefix(command)?.strip_prefix(":calls="));
        line.and_then(|rest| rest.split(',').next()?.parse().ok()).unwrap_or(0)
    }

    /// Stops the process with SIGSTOP: connections stay open and nothing is answered.
    pub fn pause(&self) {
        self.signal(Signal::STOP);
    }

    pub fn resume(&self) {
        self.signal(Signal::CONT);
    }

    /// Kills the process with SIGKILL. Its files stay.
    pub fn kill(&mut self) {
        if let Some(mut process) = self.process.take() {
            process.end("keep");
        }
    }

    /// Starts it again on the same port with the files it left.
    pub async fn restart(&mut self) {
        self.kill();
        assert!(self.spawn().await, "another process has its port:\n{}", self.log());
    }
}

impl Drop for RedisServer {
    fn drop(&mut self) {
        if self.process.is_none() {
            let _ = fs::remove_dir_all(&self.dir);
        }
    }
}
