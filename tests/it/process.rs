//! The real binary, started on a free port and killed with the test.

use std::{
    io::{BufRead, BufReader, Read},
    process::{Child, Command, Stdio},
    thread::JoinHandle,
};

use rustix::process::{Pid, Signal, kill_process};

pub struct Process {
    child: Child,
    log: Option<JoinHandle<String>>,
    /// Host and port.
    pub address: String,
}

impl Process {
    /// Starts `weir serve` with `WEIR__…` settings and returns when it listens.
    pub fn start(settings: &[(&str, &str)]) -> Self {
        let mut command = Command::new(env!("CARGO_BIN_EXE_weir"));
        for (name, _) in std::env::vars().filter(|(name, _)| name.starts_with("WEIR_")) {
            command.env_remove(name);
        }
        let mut child = command
            .args(["serve", "--listen", "127.0.0.1:0"])
            .current_dir(concat!(env!("CARGO_MANIFEST_DIR"), "/tests")) // no config.toml here
            .envs(settings.iter().copied())
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let mut log = BufReader::new(child.stderr.take().unwrap());
        let mut seen = String::new();
        let address = loop {
            let from = seen.len();
            assert_ne!(log.read_line(&mut seen).unwrap(), 0, "weir ended at start:\n{seen}");
            if let Some(address) = address(&seen[from..]) {
                break address;
            }
        };
        // The log is read on, or weir would stand still when the pipe is full.
        let log = std::thread::spawn(move || {
            log.read_to_string(&mut seen).unwrap();
            seen
        });
        Process { child, log: Some(log), address }
    }

    /// Waits until it has ended by itself. Answers its log.
    pub fn ended(mut self) -> String {
        assert!(self.child.wait().unwrap().success());
        self.log.take().unwrap().join().unwrap()
    }

    pub fn signal(&self, signal: Signal) {
        let pid = Pid::from_raw(i32::try_from(self.child.id()).unwrap()).unwrap();
        kill_process(pid, signal).unwrap();
        if signal == Signal::STOP {
            stands_still(pid);
        }
    }
}

/// Returns when a process that was told to stop has: on a busy machine some of its threads run on for a while.
pub fn stands_still(pid: Pid) {
    let path = format!("/proc/{}/task", pid.as_raw_nonzero());
    let stopped = |stat: &str| stat.rsplit(')').next().is_some_and(|rest| rest.trim_start().starts_with('T'));
    while !std::fs::read_dir(&path)
        .unwrap()
        .all(|task| stopped(&std::fs::read_to_string(task.unwrap().path().join("stat")).unwrap_or_default()))
    {
        std::thread::yield_now();
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn address(line: &str) -> Option<String> {
    // Redis may be named before.
    let (_, port) = line.split_once("http://127.0.0.1:")?;
    let port: String = port.chars().take_while(char::is_ascii_digit).collect();
    (!port.is_empty() && port != "0").then(|| format!("127.0.0.1:{port}"))
}

#[tokio::test]
async fn a_log_says_what_began_and_that_it_ended() {
    let redis = crate::redis::servers::Server::start(&[]).await;
    redis.cli(&["ACL", "SETUSER", "node", "on", ">secret", "~*", "&*", "+@all"]).await;
    let url = redis.url().replace("://", "://node:secret@");
    let process = Process::start(&[
        ("WEIR__BUS__BACKEND", "redis"),
        ("WEIR__BUS__REDIS__URL", &url),
        ("WEIR__ADMIN__LISTEN", "127.0.0.1:0"),
        ("WEIR__COMPAT__ENABLE", "grip"),
        ("WEIR__COMPAT__GRIP__LISTEN", "127.0.0.1:0"),
        ("WEIR__COMPAT__GRIP__PUBLISH_LISTEN", "127.0.0.1:0"),
        ("WEIR__COMPAT__GRIP__ROUTES", r#"[{ origin = "http://127.0.0.1:1" }]"#),
        ("WEIR__DRAIN__WINDOW", "0s"),
    ]);
    process.signal(Signal::TERM);
    let log = process.ended();
    assert!(!log.contains("secret"), "{log}");
    let lines: Vec<serde_json::Value> = log.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let said = |message: &str| lines.iter().filter(|line| line["message"] == message).collect::<Vec<_>>();
    let starting = said("starting");
    assert_eq!(starting[0]["bus"], format!("redis://{}/0", redis.address()));
    assert_eq!(starting[0]["node"].as_str().unwrap().len(), 16);
    let listening = said("listening");
    let purposes: Vec<_> = listening.iter().map(|line| line["for"].as_str().unwrap()).collect();
    assert_eq!(purposes, ["clients", "admin", "GRIP proxy", "GRIP publish"]);
    assert_eq!(lines.last().unwrap()["message"], "stopped");
}
