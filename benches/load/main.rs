//! The end-to-end load program: starts weir on one core, loads it from another and measures a floor in the same run.
//!
//! `cargo bench --bench load -- --list` lists the scenarios; `benches/README.md` explains the figures.
//! It fails if an event, response or connection was lost, repeated or out of order, and never because of speed.

mod calls;
mod fan;
mod floor;
mod idle;
mod link;
mod redis;
mod report;
mod requests;
mod scenarios;
mod stamp;
mod sys;
mod wire;

use std::{path::PathBuf, process::ExitCode, time::Duration};

use anyhow::{Context, Result, bail};
use clap::Parser;

/// Loads weir and measures latency, throughput, CPU time and memory.
#[derive(Parser)]
#[command(name = "load")]
struct Args {
    /// Scenarios by name or beginning of a name (`fan`, `idle-ws`), or `all`.
    scenarios: Vec<String>,
    /// Lists the scenarios.
    #[arg(long)]
    list: bool,
    /// Number of repeats of each slice; medians are reported.
    #[arg(long, default_value_t = 3)]
    repeat: usize,
    /// Seconds of one slice of weir. The floor runs as long, half of it before and half after.
    #[arg(long, default_value_t = 3.0)]
    seconds: f64,
    /// Bytes of `data`.
    #[arg(long, default_value_t = 100)]
    size: usize,
    /// Multiplies the numbers of readers, connections and channels.
    #[arg(long, default_value_t = 1.0)]
    scale: f64,
    /// Writes the figures as JSON to a file, or to stdout (`-`) instead of the table.
    #[arg(long)]
    json: Option<PathBuf>,
    /// The weir binary, if not the one just built.
    #[arg(long, default_value = env!("CARGO_BIN_EXE_weir"))]
    weir: PathBuf,
    /// An environment variable of weir, `KEY=VALUE`.
    #[arg(long)]
    env: Vec<String>,
    /// A running MicroStream hub on the core of weir to compare with: `PID@ADDRESS:PORT`.
    #[arg(long)]
    hub: Option<String>,
    /// The core of weir and of the floors.
    #[arg(long, default_value_t = 0)]
    server_core: usize,
    /// The core of the load.
    #[arg(long, default_value_t = 1)]
    load_core: usize,
    /// Lets the load program sleep without input. Every response then wakes it at the cost of the server: several µs on
    /// a virtual machine.
    #[arg(long)]
    sleep: bool,
    /// Seconds after which a scenario is aborted.
    #[arg(long, default_value_t = 300)]
    timeout: u64,
    /// Added by `cargo bench`.
    #[arg(long, hide = true)]
    bench: bool,
}

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().collect();
    let result = match args.get(1).map(String::as_str) {
        Some("--child") => child(&args[2..]).map(|()| true),
        _ => load(&Args::parse()),
    };
    match result {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("load: {error:#}");
            ExitCode::from(2)
        }
    }
}

/// Runs this program in another role: `--child ROLE CORE …`.
fn child(args: &[String]) -> Result<()> {
    sys::follow_parent();
    let [role, core, rest @ ..] = args else { bail!("a child needs a role and a core") };
    if let Ok(core) = core.parse() {
        sys::pin(core);
    }
    match role.as_str() {
        "exec" => Err(sys::become_program(rest).into()),
        "crowd" => {
            sys::raise_descriptors();
            scenarios::crowd(rest)
        }
        role => {
            sys::raise_descriptors();
            floor::run(role)
        }
    }
}

/// True if nothing was lost.
fn load(args: &Args) -> Result<bool> {
    if args.list || args.scenarios.is_empty() {
        scenarios::ALL.iter().for_each(|scenario| println!("{:14} {}", scenario.name, scenario.what));
        return Ok(true);
    }
    let chosen: Vec<_> = scenarios::ALL
        .iter()
        .filter(|scenario| {
            args.scenarios.iter().any(|name| {
                name == "all"
                    || (scenario.name.starts_with(name.as_str())
                        && !scenarios::ALL.iter().any(|other| other.name == name))
                    || scenario.name == name
            })
        })
        .collect();
    if chosen.is_empty() {
        bail!("no such scenario; --list names them");
    }
    let descriptors = sys::raise_descriptors();
    if descriptors < 17_000 {
        eprintln!("load: only {descriptors} descriptors: scenarios with more connections will fail");
    }
    sys::pin(args.load_core);
    let env = args
        .env
        .iter()
        .map(|pair| pair.split_once('=').map(|(key, value)| (key.to_owned(), value.to_owned())))
        .collect::<Option<_>>()
        .context("--env takes KEY=VALUE")?;
    let hub = match &args.hub {
        Some(hub) => {
            let (pid, addr) = hub.split_once('@').context("--hub takes PID@ADDRESS:PORT")?;
            Some((pid.parse()?, addr.parse()?))
        }
        None => None,
    };
    let options = scenarios::Options {
        hub,
        weir: sys::Weir { program: args.weir.clone(), core: args.server_core, args: Vec::new(), env },
        floor_core: args.server_core,
        load_core: args.load_core,
        repeat: args.repeat.max(1),
        slice: Duration::from_secs_f64(args.seconds.clamp(0.2, 60.0)),
        size: args.size,
        busy_poll: !args.sleep,
        scale: args.scale,
    };
    let to_stdout = args.json.as_ref().is_some_and(|path| path.as_os_str() == "-");
    let mut all = Vec::new();
    let mut clean = true;
    for scenario in chosen {
        let watchdog = watch(scenario.name, Duration::from_secs(args.timeout));
        match scenario.run(&options) {
            Ok(report) => {
                if !to_stdout {
                    print!("{}", report.table());
                }
                clean &= !report.faults().any();
                all.push(report.json());
            }
            Err(error) => {
                eprintln!("load: {}: {error:#}", scenario.name);
                clean = false;
                all.push(serde_json::json!({"scenario": scenario.name, "error": format!("{error:#}")}));
            }
        }
        drop(watchdog);
    }
    if let Some(path) = &args.json {
        let text = serde_json::to_string_pretty(&serde_json::json!({"machine": machine(), "reports": all}))?;
        if to_stdout { println!("{text}") } else { std::fs::write(path, text)? }
    }
    Ok(clean)
}

/// Ends the whole run with all children if the scenario takes too long.
fn watch(name: &'static str, limit: Duration) -> std::sync::mpsc::Sender<()> {
    let (tx, rx) = std::sync::mpsc::channel();
    std::thread::spawn(move || {
        if rx.recv_timeout(limit) == Err(std::sync::mpsc::RecvTimeoutError::Timeout) {
            eprintln!("load: {name} took longer than {limit:?}");
            std::process::exit(3);
        }
    });
    tx
}

/// The machine of the measurement.
fn machine() -> serde_json::Value {
    let read = |path: &str| std::fs::read_to_string(path).unwrap_or_default();
    let model = read("/proc/cpuinfo");
    let model = model.lines().find_map(|line| line.strip_prefix("model name")).unwrap_or_default();
    serde_json::json!({
        "cpu": model.trim_start_matches(['\t', ' ', ':']),
        "cores": std::thread::available_parallelism().map_or(0, usize::from),
        "kernel": read("/proc/sys/kernel/osrelease").trim(),
        "load_before": read("/proc/loadavg").trim(),
    })
}
