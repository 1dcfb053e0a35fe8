//! Real Redis servers on free ports, given back when the value is dropped or the test process dies, however it dies.
//!
//! ```ignore
//! let mut redis = Server::start(&[]).await;               // one server, nothing on disk
//! let mut redis = Server::start(&["--appendonly", "yes"]).await;
//! let sentinel = Sentinel::start().await;                 // a master, two replicas, three sentinels
//! let cluster = Cluster::start(3, 0).await;               // three masters, no replicas
//! redis.url(); redis.cli(&["CLIENT", "LIST"]).await; redis.pause(); redis.resume(); redis.kill(); redis.restart().await;
//! ```

use std::{
    fs,
    io::{BufRead, BufReader, Write as _},
    net::{Ipv4Addr, TcpListener},
    path::PathBuf,
    process::{Child, ChildStdin, Command, Stdio},
    sync::atomic::{AtomicU32, Ordering},
    time::Duration,
};

use rustix::process::{Pid, Signal, kill_process};

/// Longer than anything takes here, however busy the machine is.
const PATIENCE: Duration = Duration::from_secs(60);

/// Waits until `done` says so; `what` is what did not happen if it never does.
pub async fn until<F: Future<Output = bool>>(what: &str, mut done: impl FnMut() -> F) {
    let give_up = tokio::time::Instant::now() + PATIENCE;
    while !done().await {
        assert!(tokio::time::Instant::now() < give_up, "{what}: not within a minute");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

/// What a test may run on, whichever it is.
pub trait Deployed: Sized + Send + Sync + 'static {
    fn start() -> impl Future<Output = Self> + Send;

    fn url(&self) -> String;

    /// Those that hold data.
    fn servers(&mut self) -> &mut [Server];
}

/// The same tests on each kind of deployment.
macro_rules! everywhere {
    ($($case:ident)+) => {
        everywhere!(@ standalone Server: $($case)+);
        everywhere!(@ sentinel Sentinel: $($case)+);
        everywhere!(@ cluster Cluster: $($case)+);
    };
    (@ $name:ident $deployed:ident: $($case:ident)+) => {
        mod $name {
            use crate::redis::servers::$deployed;
            $(#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
            async fn $case() {
                super::$case::<$deployed>().await;
            })+
        }
    };
}
pub(super) use everywhere;

/// One redis-server or redis-sentinel.
pub struct Server {
    pub port: u16,
    program: String,
    dir: PathBuf,
    args: Vec<String>,
    process: Option<Process>,
}

/// A shell that ends the server, and removes its files, when its standard input is closed: also if we are killed.
struct Process {
    shell: Child,
    stdin: Option<ChildStdin>,
    pid: Pid,
}

impl Process {
    fn spawn(program: &str, dir: &str, args: &[String]) -> Self {
        // The files go when the caller goes, not when a server is killed to be started again on them.
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
        Process { shell, stdin, pid }
    }

    fn end(&mut self, verdict: &str) {
        if let Some(mut stdin) = self.stdin.take() {
            let _ = writeln!(stdin, "{verdict}");
        }
        let _ = self.shell.wait();
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.end("remove");
    }
}

pub fn free_port() -> u16 {
    TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap().local_addr().unwrap().port()
}

impl Server {
    /// Starts a server with nothing on disk but what `args` ask for, and waits until it answers.
    pub async fn start(args: &[&str]) -> Self {
        Server::start_of("redis-server", args).await
    }

    /// As [`start`](Self::start), another program: an older Redis, or Valkey.
    pub async fn start_of(program: &str, args: &[&str]) -> Self {
        let mut server = Server::prepared(program, args);
        server.run().await;
        server
    }

    fn prepared(program: &str, args: &[&str]) -> Self {
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let dir = std::env::temp_dir().join(format!("weir-redis-{}-{number}", std::process::id()));
        fs::create_dir_all(&dir).unwrap();
        Server {
            port: 0,
            program: program.into(),
            dir,
            args: args.iter().map(|arg| (*arg).to_owned()).collect(),
            process: None,
        }
    }

    async fn run(&mut self) {
        // Between the look for a free port and its use somebody else may take it.
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

    /// False if it ended at once.
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
        let process = Process::spawn(&program, &dir, &args);
        let pid = process.pid.as_raw_nonzero();
        self.process = Some(process);
        let give_up = tokio::time::Instant::now() + PATIENCE;
        while self.try_cli(&["PING"]).await.as_deref() != Some("PONG") {
            // A zombie has an empty command line.
            if fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default().is_empty() {
                if let Some(mut process) = self.process.take() {
                    process.end("keep");
                }
                return false;
            }
            assert!(tokio::time::Instant::now() < give_up, "{program} does not answer:\n{}", self.log());
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        true
    }

    fn log(&self) -> String {
        fs::read_to_string(self.dir.join("log")).unwrap_or_default()
    }

    pub fn address(&self) -> String {
        format!("127.0.0.1:{}", self.port)
    }

    pub fn url(&self) -> String {
        format!("redis://{}", self.address())
    }

    /// What redis-cli prints for a command. Panics if Redis is away.
    pub async fn cli(&self, args: &[&str]) -> String {
        self.try_cli(args).await.unwrap_or_else(|| panic!("redis-cli {args:?}: no answer"))
    }

    async fn try_cli(&self, args: &[&str]) -> Option<String> {
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
        let process = self.process.as_ref().expect("it runs");
        kill_process(process.pid, signal).unwrap();
        if signal == Signal::STOP {
            crate::process::stands_still(process.pid);
        }
    }

    /// How often it has run `command`, from scripts too.
    pub async fn calls(&self, command: &str) -> u64 {
        let stats = self.cli(&["INFO", "commandstats"]).await;
        let line = stats
            .lines()
            .find_map(|line| line.strip_prefix("cmdstat_")?.strip_prefix(command)?.strip_prefix(":calls="));
        line.and_then(|rest| rest.split(',').next()?.parse().ok()).unwrap_or(0)
    }

    /// It keeps its connections and says nothing more.
    pub fn pause(&self) {
        self.signal(Signal::STOP);
    }

    pub fn resume(&self) {
        self.signal(Signal::CONT);
    }

    /// As `kill -9`. Its files stay.
    pub fn kill(&mut self) {
        if let Some(mut process) = self.process.take() {
            process.end("keep");
        }
    }

    /// On the same port, with the files it left.
    pub async fn restart(&mut self) {
        self.kill();
        assert!(self.spawn().await, "its port was taken:\n{}", self.log());
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        if self.process.is_none() {
            let _ = fs::remove_dir_all(&self.dir);
        }
    }
}

/// A master with two replicas, and three sentinels that watch it under the name `weir`.
pub struct Sentinel {
    pub servers: Vec<Server>,
    pub sentinels: Vec<Server>,
}

impl Sentinel {
    pub async fn start() -> Self {
        let master = Server::start(&[]).await;
        let port = master.port.to_string();
        let mut servers = vec![master];
        for _ in 0..2 {
            servers.push(Server::start(&["--replicaof", "127.0.0.1", &port]).await);
        }
        until("replicas", || async { servers[0].info("connected_slaves").await.as_deref() == Some("2") }).await;
        for replica in &servers[1..] {
            until("a replica in step", || async { replica.info("master_link_status").await.as_deref() == Some("up") })
                .await;
        }
        let mut sentinels = Vec::new();
        for _ in 0..3 {
            let mut sentinel = Server::prepared("redis-sentinel", &[]);
            let conf = format!(
                "bind 127.0.0.1\nsentinel monitor weir 127.0.0.1 {port} 2\nsentinel down-after-milliseconds weir 1500\n\
                 sentinel failover-timeout weir 4000\nsentinel parallel-syncs weir 2\n"
            );
            fs::write(sentinel.dir.join("sentinel.conf"), conf).unwrap();
            sentinel.run().await;
            sentinels.push(sentinel);
        }
        let all = Sentinel { servers, sentinels };
        for sentinel in &all.sentinels {
            until("sentinels that know each other", || async {
                let known = sentinel.cli(&["SENTINEL", "MASTER", "weir"]).await;
                let lines: Vec<&str> = known.lines().collect();
                let field = |name: &str| lines.windows(2).find(|pair| pair[0] == name).map(|pair| pair[1]);
                field("num-other-sentinels") == Some("2") && field("num-slaves") == Some("2")
            })
            .await;
        }
        all
    }

    pub fn url(&self) -> String {
        let sentinels: Vec<String> = self.sentinels.iter().map(Server::address).collect();
        format!("redis+sentinel://{}/weir", sentinels.join(","))
    }

    /// Index of the server that the first sentinel takes for the master.
    pub async fn master(&self) -> usize {
        let answer = self.sentinels[0].cli(&["SENTINEL", "GET-MASTER-ADDR-BY-NAME", "weir"]).await;
        let port: u16 = answer.lines().nth(1).and_then(|port| port.parse().ok()).expect("a master");
        self.servers.iter().position(|server| server.port == port).expect("one of ours")
    }

    /// Waits until all sentinels agree on another master than the server `old`, and it is one.
    pub async fn failed_over(&self, old: usize) -> usize {
        let mut new = old;
        until("a failover", || async {
            for sentinel in &self.sentinels {
                let answer = sentinel.cli(&["SENTINEL", "GET-MASTER-ADDR-BY-NAME", "weir"]).await;
                if answer.lines().nth(1) == Some(&self.servers[old].port.to_string()) {
                    return false;
                }
            }
            true
        })
        .await;
        until("a new master", || {
            let found = self.master();
            async {
                let found = found.await;
                self.servers[found].info("role").await.as_deref() == Some("master")
            }
        })
        .await;
        while new == old {
            new = self.master().await;
        }
        new
    }
}

/// A Redis Cluster: the masters first, then their replicas in the same order.
pub struct Cluster {
    pub servers: Vec<Server>,
    pub masters: usize,
}

impl Cluster {
    /// `replicas` in all; the first is of the first master, and so on.
    pub async fn start(masters: usize, replicas: usize) -> Self {
        let mut servers = Vec::new();
        for _ in 0..masters + replicas {
            let bus = free_port().to_string();
            let args = [
                "--cluster-enabled",
                "yes",
                "--cluster-node-timeout",
                "1500",
                "--cluster-port",
                &bus,
                "--cluster-require-full-coverage",
                "no",
                "--cluster-config-file",
                "nodes.conf",
            ];
            servers.push((Server::start(&args).await, bus));
        }
        for (n, (server, _)) in servers.iter().enumerate().take(masters) {
            let (from, to) = (n * 16384 / masters, (n + 1) * 16384 / masters - 1);
            server.cli(&["CLUSTER", "ADDSLOTSRANGE", &from.to_string(), &to.to_string()]).await;
            server.cli(&["CLUSTER", "SET-CONFIG-EPOCH", &(n + 1).to_string()]).await;
        }
        let (first, others) = servers.split_first().unwrap();
        for (server, bus) in others {
            first.0.cli(&["CLUSTER", "MEET", "127.0.0.1", &server.port.to_string(), bus]).await;
        }
        let cluster = Cluster { servers: servers.into_iter().map(|(server, _)| server).collect(), masters };
        for server in &cluster.servers {
            let count = (masters + replicas).to_string();
            until("nodes that know each other", || async {
                let info = server.cli(&["CLUSTER", "INFO"]).await;
                info.contains(&format!("cluster_known_nodes:{count}")) && info.contains("cluster_slots_assigned:16384")
            })
            .await;
        }
        for n in 0..replicas {
            let master = cluster.servers[n % masters].cli(&["CLUSTER", "MYID"]).await;
            let replica = &cluster.servers[masters + n];
            until("a replica", || async { replica.cli(&["CLUSTER", "REPLICATE", &master]).await == "OK" }).await;
            until("a replica in step", || async { replica.info("master_link_status").await.as_deref() == Some("up") })
                .await;
        }
        cluster.is_ok().await;
        cluster
    }

    /// Waits until every server that runs takes the cluster for healthy.
    pub async fn is_ok(&self) {
        for server in self.servers.iter().filter(|server| server.process.is_some()) {
            until("a healthy cluster", || async {
                let info = server.try_cli(&["CLUSTER", "INFO"]).await.unwrap_or_default();
                info.contains("cluster_state:ok") && info.contains("cluster_slots_fail:0")
            })
            .await;
        }
    }

    pub fn url(&self) -> String {
        let seeds: Vec<String> = self.servers.iter().take(2).map(Server::address).collect();
        format!("redis-cluster://{}", seeds.join(","))
    }

    pub async fn slot(&self, key: &str) -> u16 {
        self.servers[0].cli(&["CLUSTER", "KEYSLOT", key]).await.parse().unwrap()
    }

    /// Index of the master that has a slot.
    pub async fn owner(&self, slot: u16) -> usize {
        for (n, server) in self.servers.iter().enumerate() {
            let nodes = server.try_cli(&["CLUSTER", "NODES"]).await.unwrap_or_default();
            let Some(me) = nodes.lines().find(|line| line.contains("myself,master")) else { continue };
            let mine = me.split(' ').skip(8).filter(|range| !range.starts_with('[')).any(|range| {
                let (from, to) = range.split_once('-').unwrap_or((range, range));
                (from.parse().unwrap()..=to.parse::<u16>().unwrap()).contains(&slot)
            });
            if mine {
                return n;
            }
        }
        panic!("nobody has slot {slot}");
    }

    /// Moves a slot with its keys, one by one, as `redis-cli --cluster reshard` does.
    pub async fn move_slot(&self, slot: u16, to: usize) {
        let from = self.owner(slot).await;
        let (source, target) = (&self.servers[from], &self.servers[to]);
        let (source_id, target_id) = (source.cli(&["CLUSTER", "MYID"]).await, target.cli(&["CLUSTER", "MYID"]).await);
        let (slot, port) = (slot.to_string(), target.port.to_string());
        target.cli(&["CLUSTER", "SETSLOT", &slot, "IMPORTING", &source_id]).await;
        source.cli(&["CLUSTER", "SETSLOT", &slot, "MIGRATING", &target_id]).await;
        loop {
            let keys = source.cli(&["CLUSTER", "GETKEYSINSLOT", &slot, "10"]).await;
            let keys: Vec<&str> = keys.lines().filter(|line| !line.is_empty()).collect();
            if keys.is_empty() {
                break;
            }
            for key in keys {
                source.cli(&["MIGRATE", "127.0.0.1", &port, key, "0", "5000"]).await;
            }
        }
        for server in [target, source] {
            server.cli(&["CLUSTER", "SETSLOT", &slot, "NODE", &target_id]).await;
        }
    }
}

impl Deployed for Server {
    async fn start() -> Self {
        Server::start(&[]).await
    }

    fn url(&self) -> String {
        Server::url(self)
    }

    fn servers(&mut self) -> &mut [Server] {
        std::slice::from_mut(self)
    }
}

impl Deployed for Sentinel {
    async fn start() -> Self {
        Sentinel::start().await
    }

    fn url(&self) -> String {
        Sentinel::url(self)
    }

    fn servers(&mut self) -> &mut [Server] {
        &mut self.servers
    }
}

impl Deployed for Cluster {
    async fn start() -> Self {
        Cluster::start(3, 0).await
    }

    fn url(&self) -> String {
        Cluster::url(self)
    }

    fn servers(&mut self) -> &mut [Server] {
        &mut self.servers
    }
}

mod tests {
    use super::*;

    #[tokio::test]
    async fn a_server_is_killed_paused_and_given_back() {
        let mut server = Server::start(&["--appendonly", "yes", "--appendfsync", "always"]).await;
        server.cli(&["SET", "a", "1"]).await;
        server.kill();
        assert!(server.try_cli(&["PING"]).await.is_none());
        server.restart().await;
        assert_eq!(server.cli(&["GET", "a"]).await, "1");
        server.pause();
        server.resume();
        assert_eq!(server.cli(&["PING"]).await, "PONG");
        let dir = server.dir.clone();
        drop(server);
        assert!(!dir.exists());
    }

    #[tokio::test]
    async fn sentinels_fail_over() {
        let mut sentinel = Sentinel::start().await;
        let old = sentinel.master().await;
        sentinel.servers[old].kill();
        assert_ne!(sentinel.failed_over(old).await, old);
    }

    #[tokio::test]
    async fn a_slot_is_moved() {
        let cluster = Cluster::start(3, 1).await;
        let slot = cluster.slot("{a}").await;
        let from = cluster.owner(slot).await;
        cluster.servers[from].cli(&["SET", "{a}", "1"]).await;
        let to = (from + 1) % 3;
        cluster.move_slot(slot, to).await;
        assert_eq!(cluster.owner(slot).await, to);
        assert_eq!(cluster.servers[to].cli(&["GET", "{a}"]).await, "1");
    }
}
