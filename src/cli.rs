//! The command line: its arguments, and the client commands.
//!
//! Client commands use a node only through its protocols, as any other client does.

mod args;
mod backoff;
mod client;
mod commands;
mod connect;
mod credentials;
mod doctor;
mod json_or_text;
mod provide;
mod publish;
mod request_target;
mod sse;
mod welcome;

use std::process::ExitCode;

pub use args::{Cli, ClientCommand, Command, ConfigCommand, ImportCommand, KeyCommand, Serve, TokenCommand};
pub use welcome::welcome;

pub use crate::terminal::USAGE;
use crate::{
    config::Config,
    terminal::{Failure, Output},
};

/// Runs a client command to its end, in a tokio runtime of its own.
pub fn run(command: ClientCommand) -> ExitCode {
    block_on(async |out| commands::run(command, out).await)
}

/// Imports into the bus of `config`, in a tokio runtime of its own.
pub fn import(command: &ImportCommand, config: Config) -> ExitCode {
    block_on(async |out| command.run(config, out).await)
}

/// Makes API keys.
pub fn key(command: KeyCommand) -> ExitCode {
    block_on(async |out| credentials::key(command, out).await)
}

/// Makes and checks tokens by `config`.
pub fn token(command: TokenCommand, config: &Config) -> ExitCode {
    block_on(async |out| credentials::token(command, config, out).await)
}

fn block_on(work: impl AsyncFnOnce(&mut Output) -> Result<(), Failure>) -> ExitCode {
    // One thread suffices for one connection.
    let runtime = match tokio::runtime::Builder::new_current_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => return Failure::Failed(error.to_string()).exit(),
    };
    let done = runtime.block_on(async {
        let mut out = Output::new();
        let done = work(&mut out).await;
        // Output before an error counts.
        out.flush()?;
        done
    });
    // Does not wait for a thread that still reads standard input.
    runtime.shutdown_background();
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => error.exit(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        <Cli as clap::CommandFactory>::command().debug_assert();
    }

    #[test]
    fn the_configuration_knows_the_variables_of_the_command_line() {
        fn check(command: &clap::Command) {
            for variable in command.get_arguments().filter_map(clap::Arg::get_env) {
                let variable = variable.to_str().unwrap();
                assert!(crate::config::COMMAND_VARIABLES.contains(&variable), "{variable}");
            }
            command.get_subcommands().for_each(check);
        }
        check(&<Cli as clap::CommandFactory>::command());
    }
}
