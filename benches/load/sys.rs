//! The operating system: clocks, cores, CPU time and memory of processes, and children that end with this process.

use std::{
    fs, io,
    io::{BufRead, BufReader, Write},
    net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream},
    os::unix::process::CommandExt,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail};
use rustix::{
    process::{Resource, Rlimit, Signal},
    thread::CpuSet,
};

/// Nanoseconds of the monotonic clock, which all processes of the machine share.
pub fn now() -> u64 {
    let time = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic);
    time.tv_sec as u64 * 1_000_000_000 + time.tv_nsec as u64
}

/// Pins this process to one core, if the machine has it.
pub fn pin(core: usize) {
    let mut set = CpuSet::new();
    set.set(core);
    if let Err(error) = rustix::thread::sched_setaffinity(None, &set) {
        eprintln!("load: not pinned to core {core}: {error}");
    }
}

/// Raises the limit of file descriptors to the maximum and returns it.
pub fn raise_descriptors() -> u64 {
    let limit = rustix::process::getrlimit(Resource::Nofile);
    let all = Rlimit { current: limit.maximum, maximum: limit.maximum };
    let limit = if rustix::process::setrlimit(Resource::Nofile, all).is_ok() { limit.maximum } else { limit.current };
    limit.unwrap_or(u64::MAX)
}

/// CPU time of all threads of a process, in nanoseconds. It is exact while the process sleeps; for a running thread it
/// lags by up to a tick.
pub fn cpu(pid: u32) -> u64 {
    let Ok(threads) = fs::read_dir(format!("/proc/{pid}/task")) else { return 0 };
    threads
        .flatten()
        .filter_map(|thread| fs::read_to_string(thread.path().join("schedstat")).ok())
        .filter_map(|line| line.split(' ').next()?.parse::<u64>().ok())
        .sum()
}

/// Resident memory of a process, in bytes.
pub fn memory(pid: u32) -> Result<u64> {
    let text = fs::read_to_string(format!("/proc/{pid}/smaps_rollup"))?;
    let line = text.lines().find(|line| line.starts_with("Rss:")).context("no Rss")?;
    Ok(line.split_whitespace().nth(1).context("no value")?.parse::<u64>()? * 1024)
}

/// Open descriptors of a process.
pub fn descriptors(pid: u32) -> usize {
    fs::read_dir(format!("/proc/{pid}/fd")).map_or(0, Iterator::count)
}

/// A child process that is killed on drop, and by the kernel if this process dies first.
pub struct Process {
    child: Child,
    addr: SocketAddr,
    log: Option<PathBuf>,
}

/// A listening server, started by this program or not.
pub trait Server {
    fn addr(&self) -> SocketAddr;
    fn pid(&self) -> u32;
}

/// A server that is already running.
pub struct ExternalServer {
    pub addr: SocketAddr,
    pub pid: u32,
}

impl Server for ExternalServer {
    fn addr(&self) -> SocketAddr {
        self.addr
    }

    fn pid(&self) -> u32 {
        self.pid
    }
}

impl Server for Process {
    fn addr(&self) -> SocketAddr {
        self.addr
    }

    fn pid(&self) -> u32 {
        self.child.id()
    }
}

/// The command line and environment of weir.
#[derive(Clone, Debug)]
pub struct Weir {
    pub program: PathBuf,
    pub core: usize,
    pub args: Vec<String>,
    pub env: Vec<(String, String)>,
}

impl Process {
    /// Starts weir on a free port and waits until it listens.
    pub fn weir(weir: &Weir) -> Result<Self> {
        let addr = free_address()?;
        let mut command = Command::new(&weir.program);
        command.args(["serve", "--listen", &addr.to_string()]).args(&weir.args);
        command.env("TOKIO_WORKER_THREADS", "1").envs(weir.env.iter().map(|(key, value)| (key, value)));
        Self::listening("weir", weir.core, addr, &command)
    }

    /// Starts a Redis without persistence on a free port and waits until it listens.
    pub fn redis(core: usize) -> Result<Self> {
        let addr = free_address()?;
        let mut command = Command::new("redis-server");
        command.args(["--bind", "127.0.0.1", "--port", &addr.port().to_string(), "--save", "", "--appendonly", "no"]);
        Self::listening("redis-server", core, addr, &command)
    }

    /// Starts a server, pinned to a core, in an empty directory, which has no configuration file.
    fn listening(name: &str, core: usize, addr: SocketAddr, server: &Command) -> Result<Self> {
        let home = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("{name}-{}", addr.port()));
        fs::create_dir_all(&home)?;
        let log = home.join("log");
        let output = fs::File::create(&log)?;
        let mut command = Command::new(std::env::current_exe()?);
        command.args(["--child", "exec", &core.to_string()]).arg(server.get_program()).args(server.get_args());
        command.envs(server.get_envs().filter_map(|(key, value)| Some((key, value?))));
        command.current_dir(&home).stdin(Stdio::null()).stdout(output.try_clone()?).stderr(output);
        let mut process = Process { child: command.spawn()?, addr, log: Some(log) };
        let started = Instant::now();
        while TcpStream::connect(addr).is_err() {
            if let Some(status) = process.child.try_wait()? {
                bail!("{name} ended with {status}, or is not installed: {}", process.log());
            }
            if started.elapsed() > Duration::from_secs(10) {
                bail!("{name} does not listen on {addr}: {}", process.log());
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        Ok(process)
    }

    /// Starts a floor, which is this program in another role. `bytes` is its response, if it has one.
    pub fn floor(role: &str, core: usize, bytes: &[u8]) -> Result<Self> {
        let mut command = Command::new(std::env::current_exe()?);
        command.args(["--child", role, &core.to_string()]).stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut child = command.spawn()?;
        child.stdin.take().context("no stdin")?.write_all(bytes)?;
        let mut line = String::new();
        let read = BufReader::new(child.stdout.take().context("no stdout")?).read_line(&mut line);
        let mut process = Process { child, addr: SocketAddr::from((Ipv4Addr::LOCALHOST, 0)), log: None };
        read?;
        process.addr = line.trim().parse().with_context(|| format!("floor {role} did not start"))?;
        Ok(process)
    }

    /// The last lines of the log.
    pub fn log(&self) -> String {
        let text = self.log.as_ref().and_then(|path| fs::read_to_string(path).ok()).unwrap_or_default();
        let lines: Vec<_> = text.lines().collect();
        lines[lines.len().saturating_sub(20)..].join("\n")
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        if let Some(home) = self.log.as_ref().and_then(|log| log.parent()) {
            let _ = fs::remove_dir_all(home);
        }
    }
}

fn free_address() -> Result<SocketAddr> {
    Ok(TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?.local_addr()?)
}

/// Lets this process end with its parent, however that ends. Called first in a child.
pub fn follow_parent() {
    let _ = rustix::process::set_parent_process_death_signal(Some(Signal::KILL));
}

/// The child `exec CORE PROGRAM ARGS…`: pins itself and executes the program.
pub fn become_program(args: &[String]) -> io::Error {
    raise_descriptors();
    match args.split_first() {
        Some((program, args)) => Command::new(program).args(args).exec(),
        None => io::ErrorKind::InvalidInput.into(),
    }
}
