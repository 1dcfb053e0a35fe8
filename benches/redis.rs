//! Appends through Redis, beside what a bare client gets out of the same Redis in the same run.
//!
//! `cargo bench --bench redis [-- SECONDS]`. Needs redis-server. All processes share the machine: ratios count, not rates.

use std::{
    io::{Read, Write},
    net::TcpStream,
    process::{Child, Command, Stdio},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering::Relaxed},
    },
    time::{Duration, Instant},
};

use serde_json::value::RawValue;
use weir::{
    backend::redis::{Ack, Redis, Settings, address::Url, deployment::Deployment},
    bus::{Bus, Clock, Config, Keep, KeyLimits, Topics},
    event::{Channel, Data, Draft, Parts},
    metrics::Metrics,
};

/// Publishes under way.
const FLIGHT: usize = 64;
const CHANNELS: usize = 100;
const KEEP: Keep = Keep { count: 10_000, age: Duration::from_secs(86_400), bytes: 16 << 20 };

/// What a bus on Redis cannot do without: store, remember where it ends, show.
const BARE: &str = "local top = redis.call('HINCRBY', KEYS[1], 'n', 1) \
    redis.call('XADD', KEYS[2], 'MAXLEN', '~', 10000, top .. '-0', 'e', ARGV[1]) \
    redis.call('PUBLISH', ARGV[2], ARGV[1]) return top";

struct Server {
    child: Child,
    port: u16,
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Server {
    fn start() -> Self {
        let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        let text = port.to_string();
        let child = Command::new("redis-server")
            .args(["--port", &text, "--bind", "127.0.0.1", "--save", "", "--appendonly", "no"])
            .stdout(Stdio::null())
            .spawn()
            .expect("redis-server");
        let server = Server { child, port };
        while TcpStream::connect(("127.0.0.1", port)).is_err() {
            std::thread::sleep(Duration::from_millis(10));
        }
        server
    }

    fn cli(&self, args: &[&str]) -> String {
        let out = Command::new("redis-cli").args(["-p", &self.port.to_string()]).args(args).output().unwrap();
        String::from_utf8_lossy(&out.stdout).trim().to_owned()
    }

    /// CPU that Redis has used, seconds.
    fn cpu(&self) -> f64 {
        let info = self.cli(&["INFO", "cpu"]);
        let field = |name: &str| {
            let line = info.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':')).unwrap();
            line.trim().parse::<f64>().unwrap()
        };
        field("used_cpu_user") + field("used_cpu_sys")
    }
}

fn command(args: &[&[u8]]) -> Vec<u8> {
    let mut out = format!("*{}\r\n", args.len()).into_bytes();
    for arg in args {
        out.extend_from_slice(format!("${}\r\n", arg.len()).as_bytes());
        out.extend_from_slice(arg);
        out.extend_from_slice(b"\r\n");
    }
    out
}

/// A bare client that keeps `FLIGHT` commands under way: their rate. `lines` are in each answer.
fn bare(server: &Server, commands: &[Vec<u8>], lines: usize, time: Duration) -> f64 {
    let mut socket = TcpStream::connect(("127.0.0.1", server.port)).unwrap();
    socket.set_nodelay(true).unwrap();
    let (mut sent, mut heard, mut buffer) = (0usize, 0usize, vec![0; 64 << 10]);
    let mut out = Vec::new();
    let begun = Instant::now();
    while begun.elapsed() < time {
        out.clear();
        while sent - heard / lines < FLIGHT {
            out.extend_from_slice(&commands[sent % commands.len()]);
            sent += 1;
        }
        socket.write_all(&out).unwrap();
        let n = socket.read(&mut buffer).unwrap();
        assert!(n > 0 && buffer[0] != b'-', "{}", String::from_utf8_lossy(&buffer[..n]));
        heard += memchr::memchr_iter(b'\n', &buffer[..n]).count();
    }
    (heard / lines) as f64 / begun.elapsed().as_secs_f64()
}

/// One weir with `FLIGHT` publishers: its rate.
async fn weir(server: &Server, time: Duration, keyed: bool) -> f64 {
    let config = Config {
        rules: Vec::new(),
        keep: KEEP,
        budget: 1 << 30,
        keys: KeyLimits { window: Duration::from_secs(300), count: 10_000 },
        consumer_idle: Duration::from_secs(3600),
        max_consumers: 1,
        max_cursors: 1,
    };
    let topics = Arc::new(Topics::new(config, Clock::System));
    let url = Url::parse(&format!("redis://127.0.0.1:{}", server.port)).unwrap();
    let deployment = Deployment::start(url, Arc::new(Metrics::new()));
    deployment.ready(Duration::from_secs(10)).await.unwrap();
    let settings = Settings { prefix: "weir:".into(), ack: Ack::Stored };
    let bus = Arc::new(Bus::new(Arc::new(Redis::start(deployment, topics.clone(), settings)), topics));
    let (stop, count) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
    let begun = Instant::now();
    let publishers: Vec<_> = (0..FLIGHT)
        .map(|publisher| {
            let (bus, stop, count) = (bus.clone(), stop.clone(), count.clone());
            tokio::spawn(async move {
                let channels: Vec<Channel> = (0..CHANNELS).map(|n| Channel::parse(&format!("c{n}")).unwrap()).collect();
                let data = RawValue::from_string(format!("{:?}", "x".repeat(98))).unwrap();
                for n in publisher.. {
                    let key = keyed.then(|| format!("{publisher}-{n}"));
                    let parts = Parts { data: Data::Json(&data), key: key.as_deref(), ..Parts::default() };
                    let draft = Draft::new(parts, 1000).unwrap();
                    bus.publish_one("", &channels[n % CHANNELS], draft).await.unwrap();
                    count.fetch_add(1, Relaxed);
                    if stop.load(Relaxed) {
                        return;
                    }
                }
            })
        })
        .collect();
    tokio::time::sleep(time).await;
    stop.store(true, Relaxed);
    for publisher in publishers {
        publisher.await.unwrap();
    }
    count.load(Relaxed) as f64 / begun.elapsed().as_secs_f64()
}

fn report(server: &Server, what: &str, work: impl FnOnce() -> f64) {
    server.cli(&["FLUSHALL"]);
    let (cpu, begun) = (server.cpu(), Instant::now());
    let rate = work();
    let count = rate * begun.elapsed().as_secs_f64();
    println!("{what:<44} {rate:>9.0}/s {:>7.2} µs of Redis's CPU", (server.cpu() - cpu) / count * 1e6);
}

fn main() {
    let seconds = std::env::args().skip(1).find_map(|arg| arg.parse().ok()).unwrap_or(3);
    let time = Duration::from_secs(seconds);
    let server = Server::start();
    let source =
        concat!(include_str!("../src/backend/redis/limits.lua"), include_str!("../src/backend/redis/append.lua"));
    let (ours, bare_hash) = (server.cli(&["SCRIPT", "LOAD", source]), server.cli(&["SCRIPT", "LOAD", BARE]));
    let body = [b"\0\0\0\0\0\0\0\0\0\x08\0,\"data\":\"".as_slice(), "x".repeat(98).as_bytes(), b"\"}"].concat();
    let scripts: Vec<Vec<u8>> = (0..CHANNELS)
        .map(|n| {
            let key = |suffix: &str| format!("weir:{{c{n}}}:{suffix}").into_bytes();
            let age = KEEP.age.as_millis().to_string();
            command(&[
                b"EVALSHA",
                ours.as_bytes(),
                b"2",
                &key("m"),
                &key("s"),
                b"0",
                b"generation",
                b"abcdef",
                b"PUBLISH",
                &key("e"),
                b"10000",
                age.as_bytes(),
                b"16777216",
                b"300000",
                b"0",
                b"",
                &body,
            ])
        })
        .collect();
    let three: Vec<Vec<u8>> = (0..CHANNELS)
        .map(|n| {
            let key = |suffix: &str| format!("bare:{{c{n}}}:{suffix}").into_bytes();
            command(&[b"EVALSHA", bare_hash.as_bytes(), b"2", &key("m"), &key("s"), &body, &key("e")])
        })
        .collect();
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().unwrap();
    for _ in 0..2 {
        report(&server, "a bare client, a script of three commands", || bare(&server, &three, 1, time));
        report(&server, "a bare client, weir's script", || bare(&server, &scripts, 5, time));
        report(&server, "weir, 64 publishers", || runtime.block_on(weir(&server, time, false)));
        report(&server, "weir, 64 publishers with keys", || runtime.block_on(weir(&server, time, true)));
        println!();
    }
}
