//! The arguments of the command line, and their help.

use std::{path::PathBuf, time::Duration};

use clap::{ArgGroup, ArgMatches, Args, CommandFactory, FromArgMatches, Parser, Subcommand};

use super::connect::BaseUrl;
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
  weir publish orders '{\"id\":7}'              every reader of the channel receives it

Call a service:
  weir provide math -- python3 add.py         runs once per call: params on stdin, JSON on stdout
  weir call math/add '[1,2]'

Client commands print one JSON value per line to standard output, and messages to standard error.
On a terminal, lists are tables; --json prints JSON there, too.
Exit codes: 0 success, 1 failure, 2 wrong usage, 3 rejected (4xx), 4 unavailable (5xx, no node).";

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
    /// Make API keys, which `auth.keys` in the configuration accepts
    Key {
        #[command(subcommand)]
        command: KeyCommand,
    },
    /// Make and check tokens, by the configuration of a node
    Token {
        #[command(subcommand)]
        command: TokenCommand,
    },
    /// Check or show the configuration
    Config {
        #[command(subcommand)]
        command: ConfigCommand,
    },
}

const SERVE: &str = "\
Environment variables override the configuration file; flags override both.
`weir config show --explain` prints every key with its value and description.
The environment variable of sse.heartbeat is WEIR__SSE__HEARTBEAT. An unknown key or an unknown
variable that begins with WEIR_ is an error.

  weir --listen 127.0.0.1:9000
  weir serve --config weir.toml
  WEIR__SERVER__LISTEN=0.0.0.0:8000 WEIR__AUTH__ALLOW_ANONYMOUS=true weir";

#[derive(Clone, Debug, Default, Args)]
pub struct Serve {
    /// Configuration file [default: none, built-in defaults]
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
pub enum KeyCommand {
    /// Make a key: prints it once as JSON, and the lines for the configuration to standard error
    New {
        /// Name of the key, which its subject contains: key:NAME
        name: String,
        /// Role of the key, repeatable
        #[arg(long = "role", value_name = "ROLE", required = true)]
        roles: Vec<String>,
        /// Time at which the key expires, as 2027-01-31T00:00:00Z [default: never]
        #[arg(long, value_name = "TIME")]
        expires: Option<String>,
    },
    /// Print the hash of a key that is read from standard input
    Hash,
}

/// The configuration of the node that issues or verifies a token.
#[derive(Debug, Args)]
pub struct AuthConfig {
    /// Configuration file [default: none, the environment only]
    #[arg(long, value_name = "FILE", env = "WEIR_CONFIG", hide_env_values = true)]
    pub config: Option<PathBuf>,
}

#[derive(Debug, Subcommand)]
pub enum TokenCommand {
    /// Make a token, signed with auth.jwt.secret
    Make {
        #[command(flatten)]
        auth: AuthConfig,
        /// Subject of the token
        #[arg(long, value_name = "SUBJECT")]
        sub: String,
        /// Permission as VERB=PATTERN, for example subscribe=news.*, repeatable
        #[arg(long = "grant", value_name = "VERB=PATTERN")]
        grants: Vec<String>,
        /// Role of the token, repeatable
        #[arg(long = "role", value_name = "ROLE")]
        roles: Vec<String>,
        /// Lifetime of the token
        #[arg(long, value_name = "TIME", default_value = "1h", value_parser = duration::parse)]
        ttl: Duration,
    },
    /// Check a key or token, which is read from standard input or WEIR_TOKEN
    Check {
        #[command(flatten)]
        auth: AuthConfig,
    },
    /// Explain whether a key or token permits something
    Explain {
        #[command(flatten)]
        auth: AuthConfig,
        /// Permission, for example subscribe
        verb: String,
        /// Name of the channel, service, service/method, consumer or operation
        name: String,
    },
}

impl TokenCommand {
    /// The configuration file.
    pub fn config(&self) -> Option<&PathBuf> {
        let (TokenCommand::Make { auth, .. } | TokenCommand::Check { auth } | TokenCommand::Explain { auth, .. }) =
            self;
        auth.config.as_ref()
    }
}

#[derive(Debug, Subcommand)]
pub enum ConfigCommand {
    /// Validate the configuration and report all errors
    Check(Serve),
    /// Print the effective configuration, with the source of each value, as a configuration file
    Show {
        #[command(flatten)]
        serve: Serve,
        /// Include the description of each key
        #[arg(long)]
        explain: bool,
    },
}

/// The node that a client command uses, and the form of its results.
#[derive(Clone, Debug, Args)]
pub struct Remote {
    /// URL of the node
    #[arg(long, env = "WEIR_URL", hide_env_values = true, value_name = "URL", default_value = "http://127.0.0.1:8000", value_parser = BaseUrl::parse)]
    pub(super) url: BaseUrl,
    /// Credentials, sent as `Authorization: Bearer`
    #[arg(long, env = "WEIR_TOKEN", hide_env_values = true, value_name = "TOKEN")]
    pub(super) token: Option<String>,
    /// Print lines of JSON on a terminal too, where lists are tables
    #[arg(long)]
    pub(super) json: bool,
}

#[derive(Debug, Subcommand)]
pub enum ClientCommand {
    /// Publish an event to a channel
    #[command(after_help = PUBLISH)]
    Publish {
        #[command(flatten)]
        remote: Remote,
        /// Name of the channel
        channel: String,
        /// JSON, or text that becomes a JSON string; `-` reads standard input [default: an event without data]
        data: Option<String>,
        /// Publish each line of standard input as an event, at once
        #[arg(long, conflicts_with_all = ["data", "key"])]
        lines: bool,
        /// Type of the event
        #[arg(long = "type", value_name = "TYPE")]
        kind: Option<String>,
        /// Idempotency key: an event with the same key within 5 minutes is not stored again
        #[arg(long)]
        key: Option<String>,
        /// Sender of the event
        #[arg(long, value_name = "NAME")]
        from: Option<String>,
    },

    /// Print events as they arrive, and resume after a lost connection
    #[command(visible_alias = "subscribe", after_help = TAIL)]
    Tail {
        #[command(flatten)]
        remote: Remote,
        /// Channels to read
        #[arg(required = true, value_name = "CHANNEL")]
        channels: Vec<String>,
        /// Begin with the last N events of each channel
        #[arg(long, value_name = "N", conflicts_with = "after")]
        last: Option<u64>,
        /// Begin after this position or token, or at `earliest` [default: now]
        #[arg(long, value_name = "POSITION", allow_hyphen_values = true, value_parser = position)]
        after: Option<String>,
        /// Print only events of this type (repeatable)
        #[arg(long = "type", value_name = "TYPE")]
        kinds: Vec<String>,
        /// Exit after N events
        #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
        count: Option<u64>,
        /// Be a presence member of the channels under this name
        #[arg(long, value_name = "CLIENT")]
        present: Option<String>,
    },

    /// Print stored events, and the position after them
    #[command(after_help = READ)]
    Read {
        #[command(flatten)]
        remote: Remote,
        /// Channels to read
        #[arg(required = true, value_name = "CHANNEL")]
        channels: Vec<String>,
        /// Begin with the last N events of each channel
        #[arg(long, value_name = "N", conflicts_with = "after")]
        last: Option<u64>,
        /// Begin after this position or token, at `earliest` or at `now` [default: earliest]
        #[arg(long, value_name = "POSITION", allow_hyphen_values = true)]
        after: Option<String>,
        /// Print only events of this type (repeatable)
        #[arg(long = "type", value_name = "TYPE")]
        kinds: Vec<String>,
        /// Maximum number of events per page [default: 100]
        #[arg(long, value_name = "N")]
        limit: Option<u64>,
        /// Read page after page until the newest event
        #[arg(long, conflicts_with_all = ["wait", "commit"])]
        all: bool,
        /// Wait this long for an event if there is none, for example 30s
        #[arg(long, value_name = "DURATION", value_parser = duration::parse)]
        wait: Option<Duration>,
        /// Read from the cursor of this consumer; --after commits that position first
        #[arg(long, value_name = "NAME")]
        consumer: Option<String>,
        /// Commit the returned events with the read
        #[arg(long, requires = "consumer")]
        commit: bool,
    },

    /// Call a method of a service and print its result
    #[command(after_help = CALL)]
    Call {
        #[command(flatten)]
        remote: Remote,
        /// The method to call, as SERVICE/METHOD
        method: String,
        /// Params: a JSON object or array; `-` reads standard input
        params: Option<String>,
        /// Timeout of the call [default: rpc.timeout of the node]
        #[arg(long, value_name = "DURATION", value_parser = duration::parse)]
        timeout: Option<Duration>,
    },

    /// Provide a service
    #[command(after_help = PROVIDE)]
    Provide(ProvideArgs),

    /// List the services that have a provider
    Services {
        #[command(flatten)]
        remote: Remote,
        /// List only names with this prefix
        #[arg(long)]
        prefix: Option<String>,
    },

    /// Examine a node or a Redis, and advise what to change
    #[command(after_help = DOCTOR)]
    Doctor {
        #[command(flatten)]
        remote: Remote,
        /// URL of the node as its clients use it, through all proxies [default: --url]
        #[arg(value_name = "URL", value_parser = BaseUrl::parse)]
        node: Option<BaseUrl>,
        /// Examine a Redis: redis://, rediss://, redis+sentinel://HOST,…/NAME or redis-cluster://HOST,… [default: WEIR__BUS__REDIS__URL]
        #[arg(long, value_name = "URL", num_args = 0..=1, default_missing_value = "", conflicts_with_all = ["node", "long"])]
        redis: Option<String>,
        /// Prefix of the keys of weir in that Redis (bus.redis.prefix)
        #[arg(long, value_name = "PREFIX", default_value = "weir:", requires = "redis")]
        prefix: String,
        /// Also test idle connections, which takes 75 seconds
        #[arg(long)]
        long: bool,
    },

    /// List the presence members of a channel
    #[command(after_help = PRESENCE)]
    Presence {
        #[command(flatten)]
        remote: Remote,
        /// Name of the channel
        channel: String,
        /// Print only the number of members
        #[arg(long)]
        count: bool,
    },

    /// List or close the connections of all nodes
    #[command(args_conflicts_with_subcommands = true, after_help = CONNECTIONS)]
    Connections {
        #[command(flatten)]
        list: Which,
        #[command(subcommand)]
        command: Option<ConnectionsCommand>,
    },

    /// List, show, trim or delete channels
    #[command(args_conflicts_with_subcommands = true)]
    Channels {
        #[command(flatten)]
        list: List,
        #[command(subcommand)]
        command: Option<ChannelsCommand>,
    },

    /// List, show, move or delete consumers
    #[command(args_conflicts_with_subcommands = true)]
    Consumers {
        #[command(flatten)]
        list: List,
        #[command(subcommand)]
        command: Option<ConsumersCommand>,
    },
}

#[derive(Debug, Args)]
pub struct ProvideArgs {
    #[command(flatten)]
    pub(super) remote: Remote,
    /// Name of the service
    pub(super) service: String,
    /// Maximum number of concurrent calls
    #[arg(long, value_name = "N", default_value_t = 8, value_parser = clap::value_parser!(u32).range(1..=10_000))]
    pub(super) concurrency: u32,
    /// Be the only provider; fail if there is another one
    #[arg(long)]
    pub(super) exclusive: bool,
    /// Kill a command that runs longer, and fail its call
    #[arg(long, value_name = "DURATION", default_value = "10m", value_parser = duration::parse)]
    pub(super) timeout: Duration,
    /// Program and arguments, or one line for the shell [default: return the params as the result]
    #[arg(last = true, value_name = "CMD")]
    pub(super) command: Vec<String>,
}

#[derive(Clone, Debug, Args)]
pub struct List {
    #[command(flatten)]
    pub(super) remote: Remote,
    /// List only names with this prefix
    #[arg(long)]
    pub(super) prefix: Option<String>,
}

#[derive(Clone, Debug, Args)]
pub struct Which {
    #[command(flatten)]
    pub(super) remote: Remote,
    /// List only connections of this subject
    #[arg(long)]
    pub(super) subject: Option<String>,
    /// List only connections that read this channel
    #[arg(long)]
    pub(super) channel: Option<String>,
}

#[derive(Debug, Subcommand)]
pub enum ConnectionsCommand {
    /// List connections (the default command)
    List(Which),
    /// Close connections, on all nodes
    #[command(group(ArgGroup::new("which").args(["subject", "id"]).required(true).multiple(true)))]
    Kick {
        #[command(flatten)]
        remote: Remote,
        /// Close all connections of this subject
        #[arg(long)]
        subject: Option<String>,
        /// Close only the connection with this id
        #[arg(long)]
        id: Option<String>,
    },
}

#[derive(Debug, Subcommand)]
pub enum ChannelsCommand {
    /// List channels (the default command)
    List(List),
    /// Show epoch, first and top offset, bytes and readers of a channel
    Show {
        #[command(flatten)]
        remote: Remote,
        /// Name of the channel
        channel: String,
    },
    /// Delete the events of a channel, or those before a position
    Delete {
        #[command(flatten)]
        remote: Remote,
        /// Name of the channel
        channel: String,
        /// Position of the first event to keep
        #[arg(long, value_name = "POSITION", allow_hyphen_values = true)]
        before: Option<String>,
    },
}

#[derive(Debug, Subcommand)]
pub enum ConsumersCommand {
    /// List consumers (the default command)
    List(List),
    /// Show the cursors of a consumer and their lag
    Show {
        #[command(flatten)]
        remote: Remote,
        /// Name of the consumer
        consumer: String,
    },
    /// Move the cursors of a consumer forward
    Commit {
        #[command(flatten)]
        remote: Remote,
        /// Name of the consumer
        consumer: String,
        /// Token or position that a read returned as `next`
        #[arg(allow_hyphen_values = true)]
        after: String,
        /// Channels of the token (repeatable) [default: all channels of the consumer]
        #[arg(long = "channel", value_name = "CHANNEL")]
        channels: Vec<String>,
    },
    /// Move a cursor to any position, also backward
    Seek {
        #[command(flatten)]
        remote: Remote,
        /// Name of the consumer
        consumer: String,
        /// Channel of the cursor
        channel: String,
        /// New position: a position, `earliest` or `now`
        #[arg(allow_hyphen_values = true)]
        after: String,
    },
    /// Delete a consumer
    Delete {
        #[command(flatten)]
        remote: Remote,
        /// Name of the consumer
        consumer: String,
    },
}

const PUBLISH: &str = "\
Prints the position of the event.

  weir publish orders '{\"id\":7}' --type created
  weir publish chat hello                             text becomes a JSON string: \"hello\"
  weir publish backups - < report.json                one event
  journalctl -f -o json | weir publish --lines logs   one event per line";

const TAIL: &str = "\
Prints one event per line.

  weir tail orders
  weir tail orders payments --last 10
  weir tail orders --after k3Vq7d-42 --type created | jq .data

Events that were trimmed before they were read are reported as a gap on standard error.";

const READ: &str = "\
The position for the next read is printed to standard error as `next`.

  weir read orders --last 10
  weir read orders --after k3Vq7d-42 --wait 30s
  weir read orders --all > orders.ndjson
  weir read orders --consumer mailer --wait 30s

A consumer reads the same events until it commits, with --after NEXT or --commit.";

const PRESENCE: &str = "\
Prints one member per line. Joins and leaves are events: weir tail '$presence/chat'

  weir presence chat
  weir presence chat --count
  weir tail chat --present ann              is a member while the command runs";

const CONNECTIONS: &str = "\
Prints one connection per line: streams, WebSockets and waiting reads. Nodes that do not respond are
listed on standard error.

  weir connections
  weir connections --channel orders | jq .remote
  weir connections kick --subject user-7
  weir connections kick --id 8f14e45fceea167a-0000002a

A kicked client is asked not to reconnect, but it can while its credentials are valid.";

const CALL: &str = "\
Prints the result, unmodified.

  weir call weir/echo '{\"n\":1}'
  weir call math/add '[1,2]' --timeout 5s
  weir call reports/build - < params.json";

const PROVIDE: &str = "\
The command runs once per call. It reads the params from standard input, and has WEIR_SERVICE,
WEIR_METHOD and WEIR_CALLER in its environment. It prints the result: JSON, or text that becomes a
JSON string. If it fails, it can print an error as {\"code\":42,\"message\":\"no user\"}. If the call is
cancelled, the command is killed.

  weir provide echo
  weir provide math -- python3 add.py
  weir provide shout --concurrency 2 -- 'jq .text | tr a-z A-Z'
  weir provide nightly --exclusive -- ./run.sh

It reconnects after a lost connection. The first Ctrl-C lets running calls finish and accepts no new
ones; the second one aborts them.";

const DOCTOR: &str = "\
Tests streams, long-polls, a WebSocket and a large body, and finds proxies that buffer, close or
reject them. Each problem is printed with its remedy.

  weir doctor https://weir.example.com --token \"$TOKEN\"
  weir doctor --long                                    also idle connections
  weir doctor --redis redis://:password@redis:6379      before weir uses it
  weir doctor --redis redis+sentinel://a,b,c/weir | jq 'select(.state != \"ok\")'

A finding is one line of JSON on standard output (unless that is a terminal) and prose on standard
error. Exit codes: 0 no problem, 1 a problem, 3 the node, a proxy or Redis rejects the requests,
4 not reachable. The command publishes to a channel weir.doctor.* and deletes it; in Redis it
writes four keys that expire within a minute. Its requests have the User-Agent weir-doctor, and
cause no errors in the metrics of a node without a problem.";

/// Rejects an invalid position before the stream is opened. A node would begin the stream at `now` and report a gap, which
/// suits programs, but not a command line.
fn position(text: &str) -> Result<String, String> {
    text.parse::<AfterParam>().map(|_| text.to_owned()).map_err(|error| error.to_string())
}

// === impl Cli, Serve ===

impl Cli {
    /// Parses the arguments of the process. Ends the process if they are invalid, or if they ask for help.
    pub fn from_process() -> Self {
        let mut command = <Cli as CommandFactory>::command();
        command.build();
        let matches = with_whole_usage(command).get_matches();
        Cli::from_arg_matches(&matches).unwrap_or_else(|error| error.exit())
    }

    /// The command; without one it is `serve`.
    pub fn into_command(self) -> Command {
        self.command.unwrap_or(Command::Serve(self.serve))
    }
}

impl Serve {
    /// The flags that override settings.
    pub fn overrides(&self) -> Vec<Override> {
        let flags = [("--listen", "server.listen", &self.listen), ("--compat", "compat.enable", &self.compat)];
        let flags = flags.into_iter().filter(|(_, _, values)| !values.is_empty());
        flags.map(|(flag, key, values)| Override { flag, key, value: values.join(",") }).collect()
    }
}

/// Lets errors show the same usage lines as the help. The lines that clap makes for an error have no `[OPTIONS]`, and an
/// option with a value from the environment looks required.
fn with_whole_usage(command: clap::Command) -> clap::Command {
    let mut command = command.mut_subcommands(with_whole_usage);
    let usage = command.render_usage().to_string();
    command.override_usage(usage.trim_start_matches("Usage: ").to_owned())
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
