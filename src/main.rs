//! The process: parses arguments, loads the configuration, starts logging, runs the node or a command, and sets the exit
//! code.

use std::{
    io::{IsTerminal as _, Write as _, stdout},
    path::Path,
    process::ExitCode,
};

use tokio::signal::unix::{SignalKind, signal};
use weir::{
    app::{self, App},
    backend,
    cli::{self, Cli, Command, ConfigCommand, ImportCommand, Serve, TokenCommand, USAGE, welcome},
    compat,
    config::{self, ConfigProblem, ConfigProblems, Loaded},
    telemetry,
};

/// The allocator with the least memory per idle connection of those measured; `no_thp` because huge pages need a third more
/// (benches/README.md).
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> ExitCode {
    match Cli::from_process().into_command() {
        Command::Serve(serve) => serve_node(&serve),
        Command::Client(command) => cli::run(command),
        Command::Import { command } => import_command(&command),
        Command::Config { command } => config_command(command),
        Command::Key { command } => cli::key(command),
        Command::Token { command } => token_command(command),
    }
}

fn serve_node(serve: &Serve) -> ExitCode {
    let loaded = match load(serve) {
        Ok(loaded) => loaded,
        Err(problems) => return report(&problems),
    };
    telemetry::start(&loaded.config.log);
    if !loaded.service_links.is_empty() {
        let variables = loaded.service_links.join(" ");
        tracing::debug!(variables, "ignoring the variables that Kubernetes sets for a Service");
    }
    let mut config = loaded.config;
    config.limits.connections = affordable_connections(config.limits.connections);
    match run(config) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            // The chain of causes on one line, without a backtrace.
            eprintln!("weir: {error:#}");
            ExitCode::FAILURE
        }
    }
}

#[tokio::main]
async fn run(config: config::Config) -> anyhow::Result<()> {
    let loopback_only = config.is_loopback_only();
    // Registered before anything is bound, so that no signal is missed.
    let shutdown = shutdown_signal()?;
    let app = App::build(config).await?;
    print_addresses(&app, loopback_only);
    app.run(shutdown).await?;
    tracing::info!("stopped");
    Ok(())
}

/// Shows the addresses: as a welcome text on a terminal, or else in the log.
fn print_addresses(app: &App, loopback_only: bool) {
    let addresses = app.addresses();
    if stdout().is_terminal() {
        // Fails only if the terminal was closed.
        let _ = writeln!(stdout(), "{}", welcome(&addresses, app.bus(), loopback_only));
        return;
    }
    tracing::info!(version = env!("CARGO_PKG_VERSION"), bus = app.bus(), node = app.node_name(), "starting");
    for (address, purpose) in addresses.iter().zip(app.purposes()) {
        tracing::info!(url = %format_args!("http://{address}"), "for" = purpose, "listening");
    }
}

/// Resolves at the first SIGTERM or SIGINT. The second one ends the process at once.
fn shutdown_signal() -> anyhow::Result<impl Future<Output = ()>> {
    let (mut terminate, mut interrupt) = (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
    let mut next = async move || {
        tokio::select! {
            _ = terminate.recv() => "SIGTERM",
            _ = interrupt.recv() => "SIGINT",
        }
    };
    Ok(async move {
        let signal = next().await;
        tracing::info!(signal, "shutting down; a second signal ends the process at once");
        tokio::spawn(async move {
            next().await;
            std::process::exit(130);
        });
    })
}

/// Files that are not connections of clients: listeners, Redis, logs. And what is left for probes.
const OTHER_FILES: usize = 64;

/// Raises the limit of open files to the maximum, as each connection is a file and the usual default is about a thousand.
/// Returns how many connections it allows, at most `connections`.
fn affordable_connections(connections: usize) -> usize {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    let Rlimit { current, maximum } = getrlimit(Resource::Nofile);
    // Fails only in a sandbox that forbids it, and then the old limit applies.
    let raised = setrlimit(Resource::Nofile, Rlimit { current: maximum, maximum }).map_or(current, |()| maximum);
    let Some(files) = raised.and_then(|files| usize::try_from(files).ok()) else { return connections };
    // A sixteenth and 16 more than the limit are accepted, to be rejected with an answer.
    let affordable = (files.saturating_sub((OTHER_FILES + 16).min(files / 2)) * 16 / 17).max(1);
    if affordable < connections {
        tracing::warn!(
            files,
            connections = affordable,
            "limits.connections is lowered from {connections}: this process may open only {files} files; raise the hard \
             limit (ulimit -Hn, LimitNOFILE of systemd, --ulimit nofile of docker) or lower limits.connections"
        );
    }
    affordable.min(connections)
}

fn import_command(command: &ImportCommand) -> ExitCode {
    match load(&Serve { config: command.config().cloned(), ..Serve::default() }) {
        Ok(Loaded { config, .. }) => cli::import(command, config),
        Err(problems) => report(&problems),
    }
}

fn token_command(command: TokenCommand) -> ExitCode {
    match load(&Serve { config: command.config().cloned(), ..Serve::default() }) {
        Ok(Loaded { config, .. }) => cli::token(command, &config),
        Err(problems) => report(&problems),
    }
}

fn config_command(command: ConfigCommand) -> ExitCode {
    let (serve, show, explain) = match command {
        ConfigCommand::Check(serve) => (serve, false, false),
        ConfigCommand::Show { serve, explain } => (serve, true, explain),
    };
    match load(&serve) {
        Err(problems) => report(&problems),
        Ok(_) if !show => {
            eprintln!("weir: the configuration is valid");
            ExitCode::SUCCESS
        }
        Ok(Loaded { config, sources, .. }) => {
            let _ = write!(stdout(), "{}", config.to_toml(explain, &sources));
            ExitCode::SUCCESS
        }
    }
}

fn load(serve: &Serve) -> Result<Loaded, ConfigProblems> {
    // A variable that is not UTF-8 is never a valid setting, but problems are reported by its name.
    let environment = std::env::vars_os()
        .map(|(name, value)| (name.to_string_lossy().into_owned(), value.to_string_lossy().into_owned()));
    let file = serve.config.as_deref().map(Path::new);
    let loaded = config::load(&compat::default_config(), file, environment, &serve.overrides())?;
    let mut found = app::check_auth(&loaded.config);
    if let Err((key, reason)) = backend::check(&loaded.config) {
        found.push((key.to_owned(), reason));
    }
    if found.is_empty() {
        return Ok(loaded);
    }
    let problem = |(key, reason): (String, String)| {
        let source = loaded.sources.get(&key).cloned();
        ConfigProblem { key, source, reason }
    };
    Err(ConfigProblems(found.into_iter().map(problem).collect()))
}

fn report(problems: &ConfigProblems) -> ExitCode {
    eprintln!("{problems}");
    ExitCode::from(USAGE)
}
