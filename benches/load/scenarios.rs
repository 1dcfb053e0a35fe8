//! The scenarios by name.

use std::{
    io::{BufRead, BufReader, Write},
    net::SocketAddr,
    process::{Command, Stdio},
    time::Duration,
};

use anyhow::{Context, Result, bail, ensure};

use crate::{
    calls,
    fan::{self, Pace},
    idle,
    link::Transport::{self, H2, NodeSse, Sse, Ws},
    redis::{self, Hops, Pipe, Publishers},
    report::{Measure, Report},
    requests::{Dialect, Polls, Posts, SECRET},
    stamp::{self, Faults},
    sys::{self, Process, Server, Weir},
    wire,
};

/// The options of all scenarios.
pub struct Options {
    pub weir: Weir,
    pub floor_core: usize,
    pub load_core: usize,
    pub repeat: usize,
    /// The duration of a slice of weir. A floor runs for half of it before and half after.
    pub slice: Duration,
    pub size: usize,
    pub busy_poll: bool,
    /// Another MicroStream hub to compare with: its process and address.
    pub hub: Option<(u32, SocketAddr)>,
    /// The factor for the numbers of readers, connections and channels of a scenario.
    pub scale: f64,
}

pub struct Scenario {
    pub name: &'static str,
    pub what: &'static str,
    kind: Kind,
}

enum Kind {
    Fan {
        transport: Transport,
        readers: usize,
        channels: usize,
        per_reader: usize,
        pace: Pace,
    },
    Calls {
        callers: usize,
        providers: usize,
        in_flight: usize,
    },
    /// The same with MicroStream clients.
    MicroStream {
        callers: usize,
        in_flight: usize,
    },
    /// Calls 1 × 1 without and with a channel with a number of readers and a publishing rate.
    Beside {
        readers: usize,
        rate: f64,
    },
    Polls {
        consumers: usize,
        rate: f64,
        dialect: Dialect,
    },
    /// Readers of an adapter, and as many native streams of another weir.
    Adapter {
        transport: Transport,
        name: &'static str,
        readers: usize,
        pace: Pace,
    },
    Posts {
        connections: usize,
    },
    Idle {
        transport: Transport,
        readers: usize,
        channels: usize,
        per_reader: usize,
    },
    Churn {
        connections: usize,
    },
    /// 64 publishes in flight, with Redis.
    Append {
        over: Over,
        keyed: bool,
    },
    /// Published on one node and read on another.
    Deliver,
    /// Called on one node and provided on another.
    CallNode {
        callers: usize,
        in_flight: usize,
    },
    /// Only the floor.
    Floors,
}

/// The pace of publishes.
#[derive(Clone, Copy, PartialEq)]
enum Over {
    WebSocket,
    Http,
}

/// The number of publishes in flight with Redis.
const UNDER_WAY: usize = 64;

const fn fan(name: &'static str, what: &'static str, transport: Transport, pace: Pace) -> Scenario {
    Scenario { name, what, kind: Kind::Fan { transport, readers: 1000, channels: 1, per_reader: 1, pace } }
}

const fn spread(
    name: &'static str,
    what: &'static str,
    transport: Transport,
    [readers, channels, per_reader]: [usize; 3],
    rate: f64,
) -> Scenario {
    Scenario { name, what, kind: Kind::Fan { transport, readers, channels, per_reader, pace: Pace::Rate(rate) } }
}

const fn idle(name: &'static str, what: &'static str, transport: Transport, layout: [usize; 3]) -> Scenario {
    let [readers, channels, per_reader] = layout;
    Scenario { name, what, kind: Kind::Idle { transport, readers, channels, per_reader } }
}

pub const ALL: &[Scenario] = &[
    fan("fan-sse", "1 channel × 1,000 SSE readers, 50 messages/s", Sse, Pace::Rate(50.0)),
    fan("fan-ws", "1 channel × 1,000 WebSocket readers, 50 messages/s", Ws, Pace::Rate(50.0)),
    fan("full-sse-1", "1,000 SSE readers, saturated, 1 message in flight", Sse, Pace::Window(1)),
    fan("full-sse-4", "1,000 SSE readers, saturated, 4 messages in flight", Sse, Pace::Window(4)),
    fan("full-sse-free", "1,000 SSE readers, saturated, 256 messages in flight", Sse, Pace::Window(256)),
    fan("full-ws-1", "1,000 WebSocket readers, saturated, 1 message in flight", Ws, Pace::Window(1)),
    fan("full-ws-4", "1,000 WebSocket readers, saturated, 4 messages in flight", Ws, Pace::Window(4)),
    fan("full-ws-free", "1,000 WebSocket readers, saturated, 256 messages in flight", Ws, Pace::Window(256)),
    spread("spread-sse", "1,000 channels × 1 SSE reader, 20,000 messages/s", Sse, [1000, 1000, 1], 20_000.0),
    spread("spread-ws", "1,000 channels × 1 WebSocket reader, 20,000 messages/s", Ws, [1000, 1000, 1], 20_000.0),
    spread("many-ws", "1 WebSocket × 1,000 channels, 50,000 messages/s", Ws, [1, 1000, 1000], 50_000.0),
    spread("many-sse", "1,000 SSE readers × 10 channels, 50 messages/s", Sse, [1000, 10, 10], 50.0),
    Scenario {
        name: "calls",
        what: "16 callers × 8 calls in flight, 1 provider",
        kind: Kind::Calls { callers: 16, providers: 1, in_flight: 8 },
    },
    Scenario {
        name: "calls-4",
        what: "16 callers × 8 calls in flight, 4 providers",
        kind: Kind::Calls { callers: 16, providers: 4, in_flight: 8 },
    },
    Scenario {
        name: "call",
        what: "1 caller × 1 call in flight, 1 provider",
        kind: Kind::Calls { callers: 1, providers: 1, in_flight: 1 },
    },
    Scenario {
        name: "microstream",
        what: "clients of MicroStream: 16 callers × 8 calls in flight, 1 provider",
        kind: Kind::MicroStream { callers: 16, in_flight: 8 },
    },
    Scenario {
        name: "microstream-1",
        what: "clients of MicroStream: 1 caller × 1 call in flight, 1 provider",
        kind: Kind::MicroStream { callers: 1, in_flight: 1 },
    },
    Scenario {
        name: "call-beside",
        what: "1 × 1, without and beside a channel with 15,000 SSE readers and 2 messages/s",
        kind: Kind::Beside { readers: 15_000, rate: 2.0 },
    },
    Scenario {
        name: "poll",
        what: "100 long-poll consumers × 20 messages/s, tokens",
        kind: Kind::Polls { consumers: 100, rate: 20.0, dialect: Dialect::Tokens },
    },
    Scenario {
        name: "poll-named",
        what: "100 long-poll consumers × 20 messages/s, cursors kept by weir",
        kind: Kind::Polls { consumers: 100, rate: 20.0, dialect: Dialect::Named },
    },
    Scenario {
        name: "compat-ganomede",
        what: "100 clients of ganomede-events × 20 messages/s",
        kind: Kind::Polls { consumers: 100, rate: 20.0, dialect: Dialect::Ganomede },
    },
    Scenario {
        name: "compat-node-sse",
        what: "1 channel × 1,000 browsers of node-sse-server, 50 messages/s, beside as many native SSE readers",
        kind: Kind::Adapter { transport: NodeSse, name: "node-sse", readers: 1000, pace: Pace::Rate(50.0) },
    },
    Scenario {
        name: "compat-node-sse-1",
        what: "1,000 browsers of node-sse-server, saturated, 1 message in flight, beside as many native SSE readers",
        kind: Kind::Adapter { transport: NodeSse, name: "node-sse", readers: 1000, pace: Pace::Window(1) },
    },
    Scenario {
        name: "publish",
        what: "publish over HTTP, 16 kept-alive connections, 1 request in flight each",
        kind: Kind::Posts { connections: 16 },
    },
    idle("idle-sse", "10,000 SSE connections on one channel", Sse, [10_000, 1, 1]),
    idle("idle-sse-own", "10,000 SSE connections, a channel each", Sse, [10_000, 10_000, 1]),
    idle("idle-ws", "10,000 WebSockets on one channel", Ws, [10_000, 1, 1]),
    idle("idle-ws-own", "10,000 WebSockets, a channel each", Ws, [10_000, 10_000, 1]),
    idle("idle-channels", "100,000 channels, 1,000 to a WebSocket", Ws, [100, 100_000, 1000]),
    idle("idle-h2", "10,000 SSE streams on one channel, 100 to an HTTP/2 connection", H2(100), [10_000, 1, 1]),
    Scenario {
        name: "churn",
        what: "20,000 SSE connections opened and reset, 64 at a time",
        kind: Kind::Churn { connections: 20_000 },
    },
    Scenario {
        name: "redis-append",
        what: "64 publishes in flight through Redis, over 4 WebSockets",
        kind: Kind::Append { over: Over::WebSocket, keyed: false },
    },
    Scenario {
        name: "redis-append-http",
        what: "64 publishes in flight through Redis, over 64 kept-alive connections",
        kind: Kind::Append { over: Over::Http, keyed: false },
    },
    Scenario {
        name: "redis-append-keyed",
        what: "64 publishes in flight through Redis, over 4 WebSockets, each with an idempotency key",
        kind: Kind::Append { over: Over::WebSocket, keyed: true },
    },
    Scenario {
        name: "redis-deliver",
        what: "published on one node, read from an SSE stream of another, 1 message in flight",
        kind: Kind::Deliver,
    },
    Scenario {
        name: "redis-call",
        what: "called on one node, provided on another, 1 call in flight",
        kind: Kind::CallNode { callers: 1, in_flight: 1 },
    },
    Scenario {
        name: "redis-calls",
        what: "called on one node, provided on another, 16 callers × 8 calls in flight",
        kind: Kind::CallNode { callers: 16, in_flight: 8 },
    },
    Scenario {
        name: "floors",
        what: "the floors alone, with frames made up: what the machine can do",
        kind: Kind::Floors,
    },
];

impl Scenario {
    pub fn run(&self, options: &Options) -> Result<Report> {
        let scaled = |count: usize| ((count as f64 * options.scale).round() as usize).max(1);
        let mut report = Report {
            scenario: self.name.to_owned(),
            what: format!("{}, {} B of data", self.what, options.size),
            ratio_of: "cpu_us",
            repeats: Vec::new(),
        };
        ensure!(options.size >= stamp::SMALLEST, "data has at least {} bytes", stamp::SMALLEST);
        match self.kind {
            Kind::Fan { transport, readers, channels, per_reader, pace } => {
                let shrink = |count: usize| if count >= 1000 { scaled(count) } else { count };
                let per_reader = shrink(per_reader);
                let layout = fan::Layout {
                    transport,
                    readers: shrink(readers),
                    channels: if channels == 1 { 1 } else { shrink(channels) },
                    per_reader,
                    size: options.size,
                };
                fan_out(&mut report, layout, pace, options)?;
            }
            Kind::Calls { callers, providers, in_flight } => {
                let layout = calls::Layout { callers, providers, in_flight, size: options.size };
                call(&mut report, layout, options)?;
            }
            Kind::MicroStream { callers, in_flight } => {
                let layout = calls::Layout { callers, providers: 1, in_flight, size: options.size };
                microstream(&mut report, layout, options)?;
            }
            Kind::Beside { readers, rate } => {
                report.ratio_of = "p99_us";
                beside(&mut report, scaled(readers), rate, options)?;
            }
            Kind::Polls { consumers, rate, dialect } => polls(&mut report, scaled(consumers), rate, dialect, options)?,
            Kind::Adapter { transport, name, readers, pace } => {
                let layout =
                    fan::Layout { transport, readers: scaled(readers), channels: 1, per_reader: 1, size: options.size };
                adapter(&mut report, layout, name, pace, options)?;
            }
            Kind::Posts { connections } => posts(&mut report, connections, options)?,
            Kind::Idle { transport, readers, channels, per_reader } => {
                let readers =
                    if let H2(streams) = transport { scaled(readers / streams) * streams } else { scaled(readers) };
                let channels = if channels == 1 { 1 } else { scaled(channels).max(readers * per_reader) };
                let layout = fan::Layout { transport, readers, channels, per_reader, size: options.size };
                report.ratio_of = "bytes_each";
                for _ in 0..options.repeat {
                    let server = Process::weir(&options.weir)?;
                    let measure = logged(idle::idle(&server, layout, readers * per_reader), &server)?;
                    report.repeats.push(vec![measure]);
                }
            }
            Kind::Append { over, keyed } => {
                report.ratio_of = "per_s";
                append(&mut report, over, keyed, options)?;
            }
            Kind::Deliver => {
                report.ratio_of = "p50_us";
                deliver(&mut report, options)?;
            }
            Kind::CallNode { callers, in_flight } => {
                report.ratio_of = "p50_us";
                let layout = calls::Layout { callers, providers: 1, in_flight, size: options.size };
                call_node(&mut report, layout, options)?;
            }
            Kind::Floors => floors(&mut report, options)?,
            Kind::Churn { connections } => {
                for _ in 0..options.repeat {
                    let server = Process::weir(&options.weir)?;
                    let measure = logged(idle::churn(&server, scaled(connections), 64), &server)?;
                    report.repeats.push(vec![measure]);
                }
            }
        }
        Ok(report)
    }
}

/// Adds the log of weir to an error.
fn logged<T>(result: Result<T>, weir: &Process) -> Result<T> {
    result.with_context(|| format!("weir's log: {}", weir.log()))
}

/// Repeats on the same connections: the first half of the floor, weir, the second half of the floor.
fn fan_out(report: &mut Report, layout: fan::Layout, pace: Pace, options: &Options) -> Result<()> {
    let warm = Duration::from_millis(300);
    let server = Process::weir(&options.weir)?;
    let mut weir = logged(fan::Rig::weir(&server, layout, options.busy_poll), &server)?;
    // The floors repeat a frame of weir, which the slowest pace shows alone.
    let (_, sample) = logged(weir.run(Pace::Rate(20.0), warm), &server)?;
    let sample = sample.context("no event came alone in the warm-up")?;
    let each = Process::floor("fan", options.floor_core, &[])?;
    let batched = Process::floor("fan-batched", options.floor_core, &[])?;
    let mut each_rig = fan::Rig::floor("floor", &each, layout, sample.clone(), options.busy_poll)?;
    let mut batched_rig = fan::Rig::floor("floor, batched", &batched, layout, sample, options.busy_poll)?;
    // With one message at a time both floors are equal.
    let alone = matches!(pace, Pace::Window(1)) || matches!(pace, Pace::Rate(rate) if rate < 1000.0);
    logged(weir.run(pace, warm), &server)?;
    each_rig.run(pace, warm)?;
    for _ in 0..options.repeat {
        let half = options.slice / 2;
        let mut repeat = vec![each_rig.run(pace, half)?.0, logged(weir.run(pace, options.slice), &server)?.0];
        repeat.push(each_rig.run(pace, half)?.0);
        if !alone {
            repeat.push(batched_rig.run(pace, half)?.0);
        }
        report.repeats.push(repeat);
    }
    Ok(())
}

fn floors(report: &mut Report, options: &Options) -> Result<()> {
    let layout = |transport| fan::Layout { transport, readers: 1000, channels: 1, per_reader: 1, size: options.size };
    let stamp = stamp::Stamp { sequence: 0, sent: 0, channel: 0 };
    let mut event = br#"{"channel":"bench-000000","epoch":"AAAAAA","offset":1,"time":1763640000123,"data":"#.to_vec();
    stamp.put(options.size, &mut event);
    event.push(b'}');
    let text = [b"id: AAAAAA-1\ndata: ".as_slice(), &event, b"\n\n"].concat();
    let sse = [format!("{:06x}\r\n", text.len()).as_bytes(), &text, b"\r\n"].concat();
    let text = [br#"{"jsonrpc":"2.0","method":"weir.event","params":"#.as_slice(), &event, b"}"].concat();
    let mut ws = Vec::new();
    wire::put_header(wire::TEXT, text.len(), 0, &mut ws);
    ws.extend_from_slice(&text);
    let fans = [
        ("SSE, 50/s", "fan", Sse, &sse, Pace::Rate(50.0)),
        ("SSE, window 1", "fan", Sse, &sse, Pace::Window(1)),
        ("SSE, window 4, batched", "fan-batched", Sse, &sse, Pace::Window(4)),
        ("WebSocket, 50/s", "fan", Ws, &ws, Pace::Rate(50.0)),
        ("WebSocket, window 256, batched", "fan-batched", Ws, &ws, Pace::Window(256)),
    ];
    let mut all = Vec::new();
    for (server_name, role, transport, frame, pace) in fans {
        let process = Process::floor(role, options.floor_core, &[])?;
        let mut rig = fan::Rig::floor(server_name, &process, layout(transport), frame.clone(), options.busy_poll)?;
        all.push(rig.run(pace, options.slice)?.0);
    }
    let many = calls::Layout { callers: 16, providers: 1, in_flight: 8, size: options.size };
    let one = calls::Layout { callers: 1, providers: 1, in_flight: 1, size: options.size };
    let relays =
        [("calls", "relay", many), ("calls, batched", "relay-batched", many), ("call 1 × 1", "relay-batched", one)];
    for (server_name, role, layout) in relays {
        let process = Process::floor(role, options.floor_core, &[])?;
        all.push(calls::Rig::floor(server_name, &process, layout, options.busy_poll)?.run(options.slice)?);
    }
    let body = [br#"{"events":["#.as_slice(), &event, br#"],"next":"AAAAAA-1","more":false,"gaps":[]}"#].concat();
    let answer = [format!("HTTP/1.1 200 OK\r\nContent-Length: {}\r\n\r\n", body.len()).as_bytes(), &body].concat();
    let process = Process::floor("hold", options.floor_core, &[])?;
    all.push(Measure {
        server_name: "long-poll",
        ..Polls::floor(&process, 100, options.size, Dialect::Tokens, answer)?.run(20.0, options.slice)?.0
    });
    let process = Process::floor("answer", options.floor_core, b"HTTP/1.1 201 Created\r\nContent-Length: 2\r\n\r\n{}")?;
    all.push(Measure { server_name: "publish", ..Posts::floor(&process, 16, options.size)?.run(options.slice)?.0 });
    report.repeats.push(all);
    Ok(())
}

fn call(report: &mut Report, layout: calls::Layout, options: &Options) -> Result<()> {
    let server = Process::weir(&options.weir)?;
    let batched = Process::floor("relay-batched", options.floor_core, &[])?;
    let each = Process::floor("relay", options.floor_core, &[])?;
    let mut weir = logged(calls::Rig::weir(&server, layout, options.busy_poll), &server)?;
    let mut floor = calls::Rig::floor("floor", &batched, layout, options.busy_poll)?;
    let mut each_rig = calls::Rig::floor("floor, a write each", &each, layout, options.busy_poll)?;
    logged(weir.run(Duration::from_millis(300)), &server)?;
    floor.run(Duration::from_millis(300))?;
    for _ in 0..options.repeat {
        let half = options.slice / 2;
        let repeat =
            vec![floor.run(half)?, logged(weir.run(options.slice), &server)?, floor.run(half)?, each_rig.run(half)?];
        report.repeats.push(repeat);
    }
    Ok(())
}

fn microstream(report: &mut Report, layout: calls::Layout, options: &Options) -> Result<()> {
    let mut with = options.weir.clone();
    with.args.extend(["--compat".into(), "microstream".into()]);
    let server = Process::weir(&with)?;
    let batched = Process::floor("relay-batched", options.floor_core, &[])?;
    let poll = options.busy_poll;
    let mut weir = logged(calls::Rig::microstream("weir", server.addr(), server.pid(), layout, poll), &server)?;
    // The same server and calls over JSON-RPC.
    let mut native = logged(calls::Rig::weir(&server, layout, poll), &server)?;
    let mut floor = calls::Rig::floor("floor", &batched, layout, poll)?;
    let mut hub = match options.hub {
        Some((pid, addr)) => Some(calls::Rig::microstream("the other hub", addr, pid, layout, poll)?),
        None => None,
    };
    logged(weir.run(Duration::from_millis(300)), &server)?;
    for _ in 0..options.repeat {
        let half = options.slice / 2;
        let mut repeat = vec![
            floor.run(half)?,
            logged(weir.run(options.slice), &server)?,
            Measure { server_name: "weir, JSON-RPC", ..logged(native.run(half), &server)? },
            floor.run(half)?,
        ];
        if let Some(hub) = &mut hub {
            repeat.push(hub.run(options.slice)?);
        }
        report.repeats.push(repeat);
    }
    Ok(())
}

fn beside(report: &mut Report, readers: usize, rate: f64, options: &Options) -> Result<()> {
    let layout = calls::Layout { callers: 1, providers: 1, in_flight: 1, size: options.size };
    let server = Process::weir(&options.weir)?;
    let relay = Process::floor("relay-batched", options.floor_core, &[])?;
    let mut weir = logged(calls::Rig::weir(&server, layout, options.busy_poll), &server)?;
    let mut floor = calls::Rig::floor("relay, alone", &relay, layout, options.busy_poll)?;
    weir.run(Duration::from_millis(300))?;
    let slice = options.slice.max(Duration::from_secs(4));
    for _ in 0..options.repeat {
        let before = floor.run(slice / 2)?;
        // The baseline: the same calls without other clients on the server.
        let alone = Measure { server_name: "floor", ..logged(weir.run(slice), &server)? };
        let (crowded, crowd) = logged(with_crowd(&mut weir, &server, readers, rate, slice, options), &server)?;
        report.repeats.push(vec![before, alone, Measure { server_name: "weir", ..crowded }, crowd]);
    }
    report.what.push_str("; here the floor is weir without other clients");
    Ok(())
}

/// Calls while another process reads with a number of readers. That process has a low priority, because its own speed
/// is not measured.
fn with_crowd(
    weir: &mut calls::Rig,
    server: &Process,
    readers: usize,
    rate: f64,
    slice: Duration,
    options: &Options,
) -> Result<(Measure, Measure)> {
    let mut command = Command::new(std::env::current_exe()?);
    let ms = slice.as_millis() + 1000;
    let arguments = [server.addr().to_string(), server.pid().to_string(), readers.to_string(), rate.to_string()];
    command.args(["--child", "crowd", "-"]).args(arguments).args([options.size.to_string(), ms.to_string()]);
    let mut child = Guard(command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn()?);
    let mut stdin = child.0.stdin.take().context("no stdin")?;
    let mut lines = BufReader::new(child.0.stdout.take().context("no stdout")?).lines();
    ensure!(lines.next().transpose()?.as_deref() == Some("ready"), "the crowd did not connect");
    stdin.write_all(b"go\n")?;
    std::thread::sleep(Duration::from_millis(500));
    let calls = weir.run(slice)?;
    let line = lines.next().transpose()?.context("the crowd printed nothing")?;
    let (figures, faults): (Vec<f64>, Vec<u64>) = serde_json::from_str(&line)?;
    let names = ["per_s", "p50_us", "p99_us", "max_us"];
    let faults = match faults[..] {
        [lost, duplicated, misordered, gaps, failed] => Faults { lost, duplicated, misordered, gaps, failed },
        _ => bail!("unexpected output of the crowd: {line}"),
    };
    Ok((
        calls,
        Measure { server_name: "(its readers)", figures: names.into_iter().zip(figures).collect(), done: 0, faults },
    ))
}

struct Guard(std::process::Child);

impl Drop for Guard {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// The child `crowd - ADDR PID READERS RATE SIZE MS`.
pub fn crowd(args: &[String]) -> Result<()> {
    let [addr, pid, readers, rate, size, ms] = args else { bail!("six arguments") };
    let _ = rustix::process::nice(19);
    let server = sys::ExternalServer { addr: addr.parse()?, pid: pid.parse()? };
    let layout =
        fan::Layout { transport: Sse, readers: readers.parse()?, channels: 1, per_reader: 1, size: size.parse()? };
    let mut rig = fan::Rig::weir(&server, layout, false)?;
    println!("ready");
    std::io::stdin().lines().next().transpose()?;
    let (measure, _) = rig.run(Pace::Rate(rate.parse()?), Duration::from_millis(ms.parse()?))?;
    let figure = |name: &str| measure.figures.iter().find(|(key, _)| *key == name).map_or(0.0, |(_, value)| *value);
    let faults = measure.faults;
    let faults = [faults.lost, faults.duplicated, faults.misordered, faults.gaps, faults.failed];
    println!(
        "{}",
        serde_json::json!([[figure("per_s"), figure("p50_us"), figure("p99_us"), figure("max_us")], faults])
    );
    Ok(())
}

/// A weir with an adapter.
fn compat(weir: &Weir, name: &str) -> Weir {
    let mut weir = weir.clone();
    weir.args.extend(["--compat".to_owned(), name.to_owned()]);
    weir.env.push(("WEIR__COMPAT__GANOMEDE__SECRET".to_owned(), SECRET.to_owned()));
    weir
}

/// The same work with native streams and with those of the adapter: the ratio is the cost of the adapter.
fn adapter(report: &mut Report, layout: fan::Layout, name: &str, pace: Pace, options: &Options) -> Result<()> {
    let warm = Duration::from_millis(500);
    let own = Process::weir(&options.weir)?;
    let server = Process::weir(&compat(&options.weir, name))?;
    let mut native = logged(fan::Rig::weir(&own, fan::Layout { transport: Sse, ..layout }, options.busy_poll), &own)?;
    let mut weir = logged(fan::Rig::weir(&server, layout, options.busy_poll), &server)?;
    logged(native.run(pace, warm), &own)?;
    logged(weir.run(pace, warm), &server)?;
    for _ in 0..options.repeat {
        let half = options.slice / 2;
        let floor = |(measure, _): (Measure, _)| Measure { server_name: "floor", ..measure };
        report.repeats.push(vec![
            floor(logged(native.run(pace, half), &own)?),
            logged(weir.run(pace, options.slice), &server)?.0,
            floor(logged(native.run(pace, half), &own)?),
        ]);
    }
    report.what.push_str("; the floor is weir's own SSE");
    Ok(())
}

fn polls(report: &mut Report, consumers: usize, rate: f64, dialect: Dialect, options: &Options) -> Result<()> {
    let how = if dialect == Dialect::Ganomede { compat(&options.weir, "ganomede") } else { options.weir.clone() };
    let server = Process::weir(&how)?;
    let mut weir = logged(Polls::weir(&server, consumers, options.size, dialect), &server)?;
    let (_, sample) = logged(weir.run(rate, Duration::from_millis(500)), &server)?;
    let floor = Process::floor("hold", options.floor_core, &[])?;
    let answer = sample.context("no event came alone in the warm-up")?;
    let mut floor = Polls::floor(&floor, consumers, options.size, dialect, answer).map(|polls| (polls, floor))?;
    (weir.busy_poll, floor.0.busy_poll) = (options.busy_poll, options.busy_poll);
    for _ in 0..options.repeat {
        let half = options.slice / 2;
        let repeat = vec![
            floor.0.run(rate, half)?.0,
            logged(weir.run(rate, options.slice), &server)?.0,
            floor.0.run(rate, half)?.0,
        ];
        report.repeats.push(repeat);
    }
    Ok(())
}

fn posts(report: &mut Report, connections: usize, options: &Options) -> Result<()> {
    let server = Process::weir(&options.weir)?;
    let mut weir = logged(Posts::weir(&server, connections, options.size), &server)?;
    let (_, sample) = logged(weir.run(Duration::from_millis(300)), &server)?;
    let process = Process::floor("answer", options.floor_core, &sample.context("no answer in the warm-up")?)?;
    let mut floor = Posts::floor(&process, connections, options.size)?;
    (weir.busy_poll, floor.busy_poll) = (options.busy_poll, options.busy_poll);
    for _ in 0..options.repeat {
        let half = options.slice / 2;
        let repeat = vec![floor.run(half)?.0, logged(weir.run(options.slice), &server)?.0, floor.run(half)?.0];
        report.repeats.push(repeat);
    }
    Ok(())
}

/// Redis has a core of its own, and weir and the load share the other: on the core of Redis, weir would measure how the
/// two share it.
fn append(report: &mut Report, over: Over, keyed: bool, options: &Options) -> Result<()> {
    let how = Weir { core: options.load_core, ..options.weir.clone() };
    let redis = Process::redis(options.floor_core)?;
    let command = redis::recorded(&how, &redis, options.size, keyed)?;
    let server = Process::weir(&redis::node(&how, redis.addr()))?;
    let mut floor = Pipe::new("floor", &redis, command, keyed, UNDER_WAY, options.busy_poll)?;
    let mut bare = Pipe::bare(&redis, options.size, UNDER_WAY, options.busy_poll)?;
    let mut posts = Posts::weir(&server, UNDER_WAY, options.size)?;
    let mut sockets = Publishers::new(&server, 4, UNDER_WAY / 4, options.size, keyed, false)?;
    let mut weir = |time| match over {
        Over::WebSocket => logged(sockets.run(time), &server),
        Over::Http => Ok(logged(posts.run(time), &server)?.0),
    };
    weir(Duration::from_millis(300))?;
    floor.run(Duration::from_millis(300))?;
    for _ in 0..options.repeat {
        let half = options.slice / 2;
        report.repeats.push(vec![
            redis::beside(&redis, || floor.run(half))?,
            redis::beside(&redis, || weir(options.slice))?,
            redis::beside(&redis, || floor.run(half))?,
            redis::beside(&redis, || bare.run(half))?,
        ]);
    }
    report.what.push_str("; the floor sends to Redis what weir sends, pipelined");
    Ok(())
}

fn deliver(report: &mut Report, options: &Options) -> Result<()> {
    let redis = Process::redis(options.floor_core)?;
    let how = redis::node(&options.weir, redis.addr());
    let (near, far) = (Process::weir(&how)?, Process::weir(&how)?);
    let layout = fan::Layout { transport: Sse, readers: 1, channels: 1, per_reader: 1, size: options.size };
    let mut weir = logged(fan::Rig::nodes(near.addr(), &far, layout, options.busy_poll), &far)?;
    let mut floor = Hops::new(&redis, false, 1, options.size, options.busy_poll)?;
    logged(weir.run(Pace::Window(1), Duration::from_millis(300)), &near)?;
    floor.run(Duration::from_millis(300))?;
    for _ in 0..options.repeat {
        let half = options.slice / 2;
        report.repeats.push(vec![
            redis::beside(&redis, || floor.run(half))?,
            redis::beside(&redis, || Ok(logged(weir.run(Pace::Window(1), options.slice), &far)?.0))?,
            redis::beside(&redis, || floor.run(half))?,
        ]);
    }
    report.what.push_str("; the floor is PUBLISH to message");
    Ok(())
}

fn call_node(report: &mut Report, layout: calls::Layout, options: &Options) -> Result<()> {
    let redis = Process::redis(options.floor_core)?;
    let how = redis::node(&options.weir, redis.addr());
    let (near, far) = (Process::weir(&how)?, Process::weir(&how)?);
    let mut weir = logged(calls::Rig::nodes(&far, &near, layout, options.busy_poll), &near)?;
    let pending = layout.callers * layout.in_flight;
    let mut floor = Hops::new(&redis, true, pending, options.size, options.busy_poll)?;
    logged(weir.run(Duration::from_millis(300)), &near)?;
    floor.run(Duration::from_millis(300))?;
    for _ in 0..options.repeat {
        let half = options.slice / 2;
        report.repeats.push(vec![
            redis::beside(&redis, || floor.run(half))?,
            redis::beside(&redis, || logged(weir.run(options.slice), &near))?,
            redis::beside(&redis, || floor.run(half))?,
        ]);
    }
    report.what.push_str("; the floor is PUBLISH to message, there and back");
    Ok(())
}
