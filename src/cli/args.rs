//! The arguments of the command line, and their help.

use std::{path::PathBuf, time::Duration};

use clap::{ArgMatches, Args, FromArgMatches, Parser, Subcommand};

use super::connect::Base;
use crate::{
    compat,
    config::{Config, Override},
    duration,
    terminal::{Failure, Output},
    token::AfterParam,
};

const ABOUT: &str = "One bus, three transports: services call each other over WebSocket, browsers stream over SSE, batch jobs long-poll.";

const EXAMPLES: &str = "\
Try it, in three terminals:
  weir                                        a node on http://127.0.0.1:8000, events in memory
  weir tail orders                            watch a channel
  weir publish orders '{\"id\":7}'              all subscribers receive it

Call a service:
  weir provide math -- python3 add.py         one run per call: params in, JSON out
  weir call math/add '[1,2]'

Client commands print lines of JSON on standard output, and everything else on standard error.
Exit codes: 0 success, 1 failure, 2 invalid usage, 3 rejected (4xx), 4 unavailable (5xx, no node).";

#[derive(Debug, Parser)]
#[command(name = "weir", version, about = ABOUT, after_help = EXAMPLES)]
#[command(args_conflicts_with_subcommands = true, max_term_width = 110)]
pub struct Cli {
    #[command(flatten)]
    serve: Serve,
    #[command(subcommand)]
    command: Option<Command>,
}

#[derive(Debug, Subcommand)]
pub enum Command {
    /// Run a node (the default command)
    #[command(after_help = SERVE)]
    Serve(Serve),
    #[command(flatten)]
    Client(ClientCommand),
    /// Import the data of another system into the Redis of weir
    Import {
        #[command(subcommand)]
        command: ImportCommand,
    },
    /// Validate or print the configuration
    Config {
        #[command(subcommand)]
        command: ConfigCommand,
    },
}

const SERVE: &str = "\
The environment overrides the file, and flags override both.
`weir config show --explain` prints every key with its value and description.
The environment variable of sse.heartbeat is WEIR__SSE__HEARTBEAT.

  weir --listen 127.0.0.1:9000
  weir serve --config weir.toml
  WEIR__SERVER__LISTEN=0.0.0.0:8000 WEIR__AUTH__ALLOW_ANONYMOUS=true weir";

#[derive(Clone, Debug, Default, Args)]
pub struct Serve {
    /// Configuration file; without one the defaults apply
    #[arg(long, value_name = "FILE", env = "WEIR_CONFIG", hide_env_values = true)]
    pub config: Option<PathBuf>,
    /// Address to listen on, repeatable [default: 127.0.0.1:8000]
    #[arg(long, value_name = "ADDR:PORT")]
    pub listen: Vec<String>,
    #[arg(long, value_name = "NAME,…", value_delimiter = ',', help = format!("Adapters to enable: {}", compat::names().join(", ")))]
    pub compat: Vec<String>,
}

/// `weir import NAME`, by the importer of an adapter.
#[derive(Debug)]
pub struct ImportCommand {
    name: String,
    args: ArgMatches,
}

#[derive(Debug, Subcommand)]
pub enum ConfigCommand {
    /// Report all errors of the configuration
    Check(Serve),
    /// Print the effective configuration as a file, with the source of each value
    Show {
        #[command(flatten)]
        serve: Serve,
        /// With the description of each key
        #[arg(long)]
        explain: bool,
    },
}

/// The node that a client command connects to.
#[derive(Clone, Debug, Args)]
pub struct Remote {
    /// URL of the node
    #[arg(long, env = "WEIR_URL", hide_env_values = true, value_name = "URL", default_value = "http://127.0.0.1:8000", value_parser = Base::parse)]
    pub url: Base,
    /// Key or token, sent as `Authorization: Bearer`
    #[arg(long, env = "WEIR_TOKEN", hide_env_values = true, value_name = "TOKEN")]
    pub token: Option<String>,
}

#[derive(Debug, Subcommand)]
pub enum ClientCommand {
    /// Publish an event to a channel
    #[command(after_help = PUBLISH)]
    Publish {
        #[command(flatten)]
        remote: Remote,
        channel: String,
        /// JSON, or text that becomes a JSON string; `-` reads standard input. Omitted: the event has no data
        data: Option<String>,
        /// Publish each line of standard input as an event, as soon as it is read
        #[arg(long, conflicts_with_all = ["data", "key"])]
        lines: bool,
        /// Type of the event
        #[arg(long = "type", value_name = "TYPE")]
        kind: Option<String>,
        /// Idempotency key: a repetition with the same key within 5 minutes is not stored
        #[arg(long)]
        key: Option<String>,
        /// Sender of the event (`from`)
        #[arg(long, value_name = "NAME")]
        from: Option<String>,
    },

    /// Print events as they arrive; reconnects and resumes
    #[command(visible_alias = "subscribe", after_help = TAIL)]
    Tail {
        #[command(flatten)]
        remote: Remote,
        #[arg(required = true, value_name = "CHANNEL")]
        channels: Vec<String>,
        /// Start with the last N events of each channel
        #[arg(long, value_name = "N", conflicts_with = "after")]
        last: Option<u64>,
        /// Start after this position or token, or at `earliest`
        #[arg(long, value_name = "POSITION", value_parser = position)]
        after: Option<String>,
        /// Only events of this type, repeatable
        #[arg(long = "type", value_name = "TYPE")]
        kinds: Vec<String>,
        /// Exit after N events
        #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
        count: Option<u64>,
        /// Be a presence member of these channels under this name
        #[arg(long, value_name = "CLIENT")]
        present: Option<String>,
    },

    /// Print stored events, and the position to continue from
    #[command(after_help = READ)]
    Read {
        #[command(flatten)]
        remote: Remote,
        #[arg(required = true, value_name = "CHANNEL")]
        channels: Vec<String>,
        /// The last N events of each channel
        #[arg(long, value_name = "N", conflicts_with = "after")]
        last: Option<u64>,
        /// After this position or token; `now` with --wait [default: earliest]
        #[arg(long, value_name = "POSITION")]
        after: Option<String>,
        /// Only events of this type, repeatable
        #[arg(long = "type", value_name = "TYPE")]
        kinds: Vec<String>,
        /// At most N events a page [default: 100]
        #[arg(long, value_name = "N")]
        limit: Option<u64>,
        /// Read all pages
        #[arg(long, conflicts_with_all = ["wait", "commit"])]
        all: bool,
        /// How long to wait for an event if there is none, such as 30s
        #[arg(long, value_name = "DURATION", value_parser = duration::parse)]
        wait: Option<Duration>,
        /// Read from the cursor of this consumer; --after commits first
        #[arg(long, value_name = "NAME")]
        consumer: Option<String>,
        /// Commit events when they are returned
        #[arg(long, requires = "consumer")]
        commit: bool,
    },

    /// Call a method of a service and print its result
    #[command(after_help = CALL)]
    Call {
        #[command(flatten)]
        remote: Remote,
        /// SERVICE/METHOD
        method: String,
        /// A JSON object or array; `-` reads standard input
        params: Option<String>,
        /// Timeout of the call [default: the node's rpc.timeout]
        #[arg(long, value_name = "DURATION", value_parser = duration::parse)]
        timeout: Option<Duration>,
    },

    /// Provide a service
    #[command(after_help = PROVIDE)]
    Provide {
        #[command(flatten)]
        remote: Remote,
        service: String,
        /// Maximum number of concurrent calls
        #[arg(long, value_name = "N", default_value_t = 8, value_parser = clap::value_parser!(u32).range(1..=10_000))]
        concurrency: u32,
        /// Fail if the service has another provider, and admit no other
        #[arg(long)]
        exclusive: bool,
        /// Timeout of the command; then it is killed and the call fails
        #[arg(long, value_name = "DURATION", default_value = "10m", value_parser = duration::parse)]
        timeout: Duration,
        /// Program and arguments, or one text for the shell; without it the result is the params
        #[arg(last = true, value_name = "CMD")]
        command: Vec<String>,
    },

    /// List available services
    Services {
        #[command(flatten)]
        remote: Remote,
        /// Only names with this prefix
        #[arg(long)]
        prefix: Option<String>,
    },

    /// Diagnose a node, or a Redis for use by weir, and suggest changes
    #[command(after_help = DOCTOR)]
    Doctor {
        #[command(flatten)]
        remote: Remote,
        /// URL of the node as clients use it, through all proxies [default: --url]
        #[arg(value_name = "URL", value_parser = Base::parse)]
        node: Option<Base>,
        /// A Redis: redis://, rediss://, redis+sentinel://HOST,…/NAME, redis-cluster://HOST,… [default: that of WEIR__BUS__REDIS__URL]
        #[arg(long, value_name = "URL", num_args = 0..=1, default_missing_value = "", conflicts_with_all = ["node", "long"])]
        redis: Option<String>,
        /// The prefix of weir's keys in that Redis (bus.redis.prefix)
        #[arg(long, value_name = "PREFIX", default_value = "weir:", requires = "redis")]
        prefix: String,
        /// Wait for 75 seconds to detect whether idle connections are closed
        #[arg(long)]
        long: bool,
    },

    /// List the presence members of a channel
    #[command(after_help = PRESENCE)]
    Presence {
        #[command(flatten)]
        remote: Remote,
        channel: String,
        /// Only their number
        #[arg(long)]
        count: bool,
    },

    /// List or close connections on all nodes
    #[command(args_conflicts_with_subcommands = true, after_help = CONNECTIONS)]
    Connections {
        #[command(flatten)]
        list: Which,
        #[command(subcommand)]
        command: Option<ConnectionsCommand>,
    },

    /// List channels, show one, trim or delete one
    #[command(args_conflicts_with_subcommands = true)]
    Channels {
        #[command(flatten)]
        list: List,
        #[command(subcommand)]
        command: Option<ChannelsCommand>,
    },

    /// List consumers, show one, move its cursors, delete it
    #[command(args_conflicts_with_subcommands = true)]
    Consumers {
        #[command(flatten)]
        list: List,
        #[command(subcommand)]
        command: Option<ConsumersCommand>,
    },
}

#[derive(Clone, Debug, Args)]
pub struct List {
    #[command(flatten)]
    pub remote: Remote,
    /// Only names with this prefix
    #[arg(long)]
    pub prefix: Option<String>,
}

#[derive(Clone, Debug, Args)]
pub struct Which {
    #[command(flatten)]
    pub remote: Remote,
    /// Only connections of this subject
    #[arg(long)]
    pub subject: Option<String>,
    /// Only connections that read this channel
    #[arg(long)]
    pub channel: Option<String>,
}

#[derive(Debug, Subcommand)]
pub enum ConnectionsCommand {
    /// List connections (the default)
    List(Which),
    /// Close connections on all nodes
    Kick {
        #[command(flatten)]
        remote: Remote,
        /// All connections of this subject
        #[arg(long, required_unless_present = "id")]
        subject: Option<String>,
        /// The connection with this id
        #[arg(long)]
        id: Option<String>,
    },
}

#[derive(Debug, Subcommand)]
pub enum ChannelsCommand {
    /// List channels (the default)
    List(List),
    /// Show its epoch, first and top offset, bytes and readers
    Show {
        #[command(flatten)]
        remote: Remote,
        channel: String,
    },
    /// Delete all events, or those before a position
    Delete {
        #[command(flatten)]
        remote: Remote,
        channel: String,
        #[arg(long, value_name = "POSITION")]
        before: Option<String>,
    },
}

#[derive(Debug, Subcommand)]
pub enum ConsumersCommand {
    /// List consumers (the default)
    List(List),
    /// Show its cursors, and how far they are behind
    Show {
        #[command(flatten)]
        remote: Remote,
        consumer: String,
    },
    /// Move its cursors forward
    Commit {
        #[command(flatten)]
        remote: Remote,
        consumer: String,
        /// The token at the end of a read
        after: String,
        /// The channels of the token, if the token does not contain them
        #[arg(long = "channel", value_name = "CHANNEL")]
        channels: Vec<String>,
    },
    /// Move a cursor to any position
    Seek {
        #[command(flatten)]
        remote: Remote,
        consumer: String,
        channel: String,
        /// A position, `earliest` or `now`
        after: String,
    },
    /// Delete it
    Delete {
        #[command(flatten)]
        remote: Remote,
        consumer: String,
    },
}

const PUBLISH: &str = "\
Prints the position of the event.

  weir publish orders '{\"id\":7}' --type created
  weir publish chat hello                             text is a JSON string: \"hello\"
  weir publish backups - < report.json                one event
  journalctl -f -o json | weir publish --lines logs   an event per line";

const TAIL: &str = "\
Prints an event per line, starting with new events unless a start is given.

  weir tail orders
  weir tail orders payments --last 10
  weir tail orders --after k3Vq7d-42 --type created | jq .data

Missing events, which were trimmed before they were read, are reported on standard error as a gap.";

const READ: &str = "\
The position to continue from is printed on standard error as `next`.

  weir read orders --last 10
  weir read orders --after k3Vq7d-42 --wait 30s
  weir read orders --all > orders.ndjson
  weir read orders --consumer mailer --wait 30s

A consumer gets the same events until it commits: with --after NEXT, or at once with --commit.";

const PRESENCE: &str = "\
Prints a member per line. Joins and leaves are events: weir tail '$presence/chat'

  weir presence chat
  weir presence chat --count
  weir tail chat --present ann              a member while it runs";

const CONNECTIONS: &str = "\
Prints a connection per line: streams, sockets and waiting reads. Nodes that do not respond are
named on standard error.

  weir connections
  weir connections --channel orders | jq .remote
  weir connections kick --subject user-7
  weir connections kick --id 8f14e45fceea167a-0000002a

A kicked client is told not to reconnect, but can do so unless its credentials are revoked too.";

const CALL: &str = "\
Prints the result as the provider sent it.

  weir call weir/echo '{\"n\":1}'
  weir call math/add '[1,2]' --timeout 5s
  weir call reports/build - < params.json";

const PROVIDE: &str = "\
The command runs once per call. It gets the params on standard input, and WEIR_SERVICE,
WEIR_METHOD and WEIR_CALLER in its environment; it prints the result: JSON, or text that becomes
a JSON string. If it fails, its output can be the error, as {\"code\":42,\"message\":\"no user\"}.
A cancelled call kills it.

  weir provide echo
  weir provide math -- python3 add.py
  weir provide shout --concurrency 2 -- 'jq .text | tr a-z A-Z'
  weir provide nightly --exclusive -- ./run.sh

After a lost connection it reconnects. After the first Ctrl-C it accepts no more calls and finishes
those in progress.";

const DOCTOR: &str = "\
Sends streams, long-polls, a WebSocket and a large body through the node, detects what buffers,
interrupts or rejects them on the way, and suggests changes.

  weir doctor https://weir.example.com --token \"$TOKEN\"
  weir doctor --long                                    also tests idle connections
  weir doctor --redis redis://:password@redis:6379      before weir uses it
  weir doctor --redis redis+sentinel://a,b,c/weir | jq 'select(.state != \"ok\")'

A finding is a line of JSON on standard output (unless that is a terminal) and prose on standard
error. Exit codes: 0 advice at most, 1 a problem, 3 access denied, 4 unavailable. It publishes to a
channel of its own, weir.doctor.*, and deletes it; in Redis it writes four keys that expire within a
minute.";

/// Validates a position. The node would start at `now` after an invalid one and report a gap, which is right for programs but
/// not for a command line.
fn position(text: &str) -> Result<String, String> {
    text.parse::<AfterParam>().map(|_| text.to_owned()).map_err(|error| error.to_string())
}

// === impl Cli, Serve ===

impl Cli {
    pub fn into_command(self) -> Command {
        self.command.unwrap_or(Command::Serve(self.serve))
    }
}

impl Serve {
    /// The flags as settings.
    pub fn overrides(&self) -> Vec<Override> {
        let given = [("--listen", "server.listen", &self.listen), ("--compat", "compat.enable", &self.compat)];
        let given = given.into_iter().filter(|(_, _, values)| !values.is_empty());
        given.map(|(flag, key, values)| Override { flag, key, value: values.join(",") }).collect()
    }
}

// === impl ImportCommand ===

impl ImportCommand {
    /// The configuration file.
    pub fn config(&self) -> Option<&PathBuf> {
        self.args.get_one("config")
    }

    pub(super) async fn run(&self, config: Config, out: &mut Output) -> Result<(), Failure> {
        match compat::importers().find(|importer| importer.name == self.name) {
            Some(importer) => (importer.run)(&self.args, config, out).await,
            None => Err(Failure::Usage(format!("{} has no importer", self.name))),
        }
    }
}

impl FromArgMatches for ImportCommand {
    fn from_arg_matches(matches: &ArgMatches) -> Result<Self, clap::Error> {
        let (name, args) =
            matches.subcommand().ok_or_else(|| clap::Error::new(clap::error::ErrorKind::MissingSubcommand))?;
        Ok(ImportCommand { name: name.to_owned(), args: args.clone() })
    }

    fn update_from_arg_matches(&mut self, matches: &ArgMatches) -> Result<(), clap::Error> {
        *self = Self::from_arg_matches(matches)?;
        Ok(())
    }
}

impl Subcommand for ImportCommand {
    fn augment_subcommands(command: clap::Command) -> clap::Command {
        let importers = compat::importers();
        importers
            .fold(command, |command, importer| command.subcommand((importer.args)(clap::Command::new(importer.name))))
    }

    fn augment_subcommands_for_update(command: clap::Command) -> clap::Command {
        Self::augment_subcommands(command)
    }

    fn has_subcommand(name: &str) -> bool {
        compat::importers().any(|importer| importer.name == name)
    }
}
