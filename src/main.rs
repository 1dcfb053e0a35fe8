//! The process: parse, configure, log, build, run until told to stop, drain, and say how it went.

use std::{
    io::{IsTerminal as _, Write as _, stdout},
    path::Path,
    process::ExitCode,
};

use clap::Parser as _;
use tokio::signal::unix::{SignalKind, signal};
use weir::{
    app::{self, App},
    cli::{self, Cli, Command, ConfigCommand, ImportCommand, Serve, USAGE, welcome},
    config::{self, Loaded, Problem, Problems},
    telemetry,
};

/// Least memory per idle connection of those measured; `no_thp` because huge pages take a third more (benches/README.md).
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> ExitCode {
    match Cli::parse().into_command() {
        Command::Serve(serve) => node(&serve),
        Command::Client(command) => cli::run(command),
        Command::Import { command } => import(command),
        Command::Config { command } => configuration(command),
    }
}

fn node(serve: &Serve) -> ExitCode {
    let loaded = match load(serve) {
        Ok(loaded) => loaded,
        Err(problems) => return wrong(&problems),
    };
    telemetry::start(&loaded.config.log);
    raise_open_files(loaded.config.limits.connections);
    match run(loaded.config) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            // Its chain on one line: an address that is taken is no reason for a backtrace.
            eprintln!("weir: {error:#}");
            ExitCode::FAILURE
        }
    }
}

#[tokio::main]
async fn run(config: config::Config) -> anyhow::Result<()> {
    let loopback_only = config.is_loopback_only();
    // Before anything is bound, so that no signal comes too early.
    let stop = stop()?;
    let app = App::build(config).await?;
    announce(&app, loopback_only);
    app.run(stop).await?;
    tracing::info!("stopped");
    Ok(())
}

/// Where to connect: a page for a person, a line of the log for everybody else.
fn announce(app: &App, loopback_only: bool) {
    let addresses = app.addresses();
    if stdout().is_terminal() {
        // Whoever closed the terminal does not want to read it.
        let _ = writeln!(stdout(), "{}", welcome(&addresses, app.bus(), loopback_only));
        return;
    }
    tracing::info!(version = env!("CARGO_PKG_VERSION"), bus = app.bus(), node = app.node_name(), "starting");
    for (address, purpose) in addresses.iter().zip(app.purposes()) {
        tracing::info!(url = %format_args!("http://{address}"), "for" = purpose, "listening");
    }
}

/// Resolves at the first SIGTERM or SIGINT. The second ends the process where it stands.
fn stop() -> anyhow::Result<impl Future<Output = ()>> {
    let (mut terminate, mut interrupt) = (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
    let mut next = async move || {
        tokio::select! {
            _ = terminate.recv() => "SIGTERM",
            _ = interrupt.recv() => "SIGINT",
        }
    };
    Ok(async move {
        let signal = next().await;
        tracing::info!(signal, "leaving; a second signal ends it at once");
        tokio::spawn(async move {
            next().await;
            std::process::exit(130);
        });
    })
}

/// A connection is a file; the limit that shells start with is about a thousand. Ours is raised as far as we may.
fn raise_open_files(connections: usize) {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    let Rlimit { current, maximum } = getrlimit(Resource::Nofile);
    // Refused only where a sandbox forbids it, and then the old limit holds.
    let raised = setrlimit(Resource::Nofile, Rlimit { current: maximum, maximum }).map_or(current, |()| maximum);
    if raised.is_some_and(|files| files < connections as u64) {
        tracing::debug!(files = raised, connections, "limits.connections is more than the files this process may open");
    }
}

fn import(command: ImportCommand) -> ExitCode {
    let ImportCommand::Ganomede(given) = &command;
    match load(&Serve { config: given.config.clone(), ..Serve::default() }) {
        Ok(Loaded { config, .. }) => cli::import(command, config),
        Err(problems) => wrong(&problems),
    }
}

fn configuration(command: ConfigCommand) -> ExitCode {
    let (serve, show, explain) = match command {
        ConfigCommand::Check(serve) => (serve, false, false),
        ConfigCommand::Show { serve, explain } => (serve, true, explain),
    };
    match load(&serve) {
        Err(problems) => wrong(&problems),
        Ok(_) if !show => {
            eprintln!("weir: nothing wrong");
            ExitCode::SUCCESS
        }
        Ok(Loaded { config, sources }) => {
            let _ = write!(stdout(), "{}", config.to_toml(explain, &sources));
            ExitCode::SUCCESS
        }
    }
}

fn load(serve: &Serve) -> Result<Loaded, Problems> {
    // A variable that is not text cannot be a setting either, but its name shall be in the report.
    let environment = std::env::vars_os()
        .map(|(name, value)| (name.to_string_lossy().into_owned(), value.to_string_lossy().into_owned()));
    let loaded = config::load(serve.config.as_deref().map(Path::new), environment, &serve.overrides())?;
    match app::check(&loaded.config) {
        Ok(()) => Ok(loaded),
        Err((key, reason)) => {
            let source = loaded.sources.get(key).cloned();
            Err(Problems(vec![Problem { key: key.into(), source, reason }]))
        }
    }
}

fn wrong(problems: &Problems) -> ExitCode {
    eprintln!("{problems}");
    ExitCode::from(USAGE)
}
