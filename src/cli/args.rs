//! What can be typed, and the help that teaches it.

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

const ABOUT: &str =
    "One bus, three ways in: services call each other over WebSocket, browsers stream over SSE, batch jobs long-poll.";

const EXAMPLES: &str = "\
Try it, in three terminals:
  weir                                        a node on http://127.0.0.1:8000, events in memory
  weir tail orders                            watch a channel
  weir publish orders '{\"id\":7}'              everybody who watches sees it

Call a service:
  weir provide math -- python3 add.py         one run per call: params in, JSON out
  weir call math/add '[1,2]'

Client commands print JSON, a line each, on standard output, and all else on standard error.
They end with 0 done, 1 failed, 2 wrong usage, 3 refused (4xx), 4 unavailable (5xx, no node).";

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
    /// Run a node (what weir does without a command)
    #[command(after_help = SERVE)]
    Serve(Serve),
    #[command(flatten)]
    Client(ClientCommand),
    /// Bring what another system keeps into the Redis of weir
    Import {
        #[command(subcommand)]
        command: ImportCommand,
    },
    /// Check the settings, or show them
    Config {
        #[command(subcommand)]
        command: ConfigCommand,
    },
}

const SERVE: &str = "\
Settings come from the file, then the environment, then flags; the later wins.
`weir config show --explain` prints every key, its value and its meaning.
In the environment sse.heartbeat is WEIR__SSE__HEARTBEAT.

  weir --listen 127.0.0.1:9000
  weir serve --config weir.toml
  WEIR__SERVER__LISTEN=0.0.0.0:8000 WEIR__AUTH__ALLOW_ANONYMOUS=true weir";

#[derive(Clone, Debug, Default, Args)]
pub struct Serve {
    /// File of settings; without one the built-in defaults hold
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
    /// Report everything that is wrong with the settings, or nothing
    Check(Serve),
    /// Print the settings in force, and where each comes from, as a file that could be used
    Show {
        #[command(flatten)]
        serve: Serve,
        /// With the meaning of each key
        #[arg(long)]
        explain: bool,
    },
}

/// Where the node is that a client command talks to.
#[derive(Clone, Debug, Args)]
pub struct Remote {
    /// The node to talk to
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
        /// JSON, or text that becomes a JSON string; `-` reads it from standard input. Without it the event has no data
        data: Option<String>,
        /// Publish each line of standard input as an event of its own, as it comes
        #[arg(long, conflicts_with_all = ["data", "key"])]
        lines: bool,
        /// The name of what happened
        #[arg(long = "type", value_name = "TYPE")]
        kind: Option<String>,
        /// Idempotency key: the same key again within 5 minutes places nothing
        #[arg(long)]
        key: Option<String>,
        /// Who says so
        #[arg(long, value_name = "NAME")]
        from: Option<String>,
    },

    /// Print events as they come; after a lost connection, from where it was
    #[command(visible_alias = "subscribe", after_help = TAIL)]
    Tail {
        #[command(flatten)]
        remote: Remote,
        #[arg(required = true, value_name = "CHANNEL")]
        channels: Vec<String>,
        /// Begin with the last N events of each channel
        #[arg(long, value_name = "N", conflicts_with = "after")]
        last: Option<u64>,
        /// Begin after this position or token, or `earliest`
        #[arg(long, value_name = "POSITION", value_parser = position)]
        after: Option<String>,
        /// Only events of this type, repeatable
        #[arg(long = "type", value_name = "TYPE")]
        kinds: Vec<String>,
        /// End after N events
        #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
        count: Option<u64>,
        /// Be present under this name on these channels, as `weir presence` shows it
        #[arg(long, value_name = "CLIENT")]
        present: Option<String>,
    },

    /// Print events that are there, and where to go on
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
        /// Page after page, until all is read
        #[arg(long, conflicts_with_all = ["wait", "commit"])]
        all: bool,
        /// Wait so long for an event if there is none, as 30s
        #[arg(long, value_name = "DURATION", value_parser = duration::parse)]
        wait: Option<Duration>,
        /// Read from the cursor that weir keeps under this name; --after commits first
        #[arg(long, value_name = "NAME")]
        consumer: Option<String>,
        /// Commit what is printed as it is handed out
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
        /// A JSON object or array; `-` reads it from standard input
        params: Option<String>,
        /// How long the answer may take [default: the node's rpc.timeout]
        #[arg(long, value_name = "DURATION", value_parser = duration::parse)]
        timeout: Option<Duration>,
    },

    /// Answer the calls to a service
    #[command(after_help = PROVIDE)]
    Provide {
        #[command(flatten)]
        remote: Remote,
        service: String,
        /// How many calls at a time
        #[arg(long, value_name = "N", default_value_t = 8, value_parser = clap::value_parser!(u32).range(1..=10_000))]
        concurrency: u32,
        /// Be the only provider, or fail
        #[arg(long)]
        exclusive: bool,
        /// A command that runs longer is ended, and its call fails
        #[arg(long, value_name = "DURATION", default_value = "10m", value_parser = duration::parse)]
        timeout: Duration,
        /// Program and arguments, or one text for the shell; without it params come back as the result
        #[arg(last = true, value_name = "CMD")]
        command: Vec<String>,
    },

    /// List the services that can be called
    Services {
        #[command(flatten)]
        remote: Remote,
        /// Only names that begin so
        #[arg(long)]
        prefix: Option<String>,
    },

    /// Look at a node, or at a Redis, as weir uses it, and say what to change
    #[command(after_help = DOCTOR)]
    Doctor {
        #[command(flatten)]
        remote: Remote,
        /// The node, as its clients reach it: through every proxy [default: --url]
        #[arg(value_name = "URL", value_parser = Base::parse)]
        node: Option<Base>,
        /// A Redis: redis://, rediss://, redis+sentinel://HOST,…/NAME, redis-cluster://HOST,… [default: that of WEIR__BUS__REDIS__URL]
        #[arg(long, value_name = "URL", num_args = 0..=1, default_missing_value = "", conflicts_with_all = ["node", "long"])]
        redis: Option<String>,
        /// bus.redis.prefix: what the keys of weir begin with in that Redis
        #[arg(long, value_name = "PREFIX", default_value = "weir:", requires = "redis")]
        prefix: String,
        /// Wait for 75 seconds to see which idle connections are cut off
        #[arg(long)]
        long: bool,
    },

    /// List who is on a channel
    #[command(after_help = PRESENCE)]
    Presence {
        #[command(flatten)]
        remote: Remote,
        channel: String,
        /// Only how many
        #[arg(long)]
        count: bool,
    },

    /// List who is connected, on all nodes; end connections
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
    /// Only names that begin so
    #[arg(long)]
    pub prefix: Option<String>,
}

#[derive(Clone, Debug, Args)]
pub struct Which {
    #[command(flatten)]
    pub remote: Remote,
    /// Only those of this subject
    #[arg(long)]
    pub subject: Option<String>,
    /// Only those that read this channel
    #[arg(long)]
    pub channel: Option<String>,
}

#[derive(Debug, Subcommand)]
pub enum ConnectionsCommand {
    /// List (what `weir connections` does without a command)
    List(Which),
    /// End them, on all nodes
    Kick {
        #[command(flatten)]
        remote: Remote,
        /// All of this subject
        #[arg(long, required_unless_present = "id")]
        subject: Option<String>,
        /// Just this one, as listed
        #[arg(long)]
        id: Option<String>,
    },
}

#[derive(Debug, Subcommand)]
pub enum ChannelsCommand {
    /// List (what `weir channels` does without a command)
    List(List),
    /// Its epoch, first and top offset, bytes and readers
    Show {
        #[command(flatten)]
        remote: Remote,
        channel: String,
    },
    /// Delete its events, or those before a position
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
    /// List (what `weir consumers` does without a command)
    List(List),
    /// Its cursors, and how far they are behind
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
        /// The token that a read ended with
        after: String,
        /// The channels of the token, if the node must be told
        #[arg(long = "channel", value_name = "CHANNEL")]
        channels: Vec<String>,
    },
    /// Move a cursor anywhere, back too
    Seek {
        #[command(flatten)]
        remote: Remote,
        consumer: String,
        channel: String,
        /// A position, `earliest` or `now`
        after: String,
    },
    /// Forget it
    Delete {
        #[command(flatten)]
        remote: Remote,
        consumer: String,
    },
}

const PUBLISH: &str = "\
Prints the position that the event was given.

  weir publish orders '{\"id\":7}' --type created
  weir publish chat hello                             text is a JSON string: \"hello\"
  weir publish backups - < report.json                one event
  journalctl -f -o json | weir publish --lines logs   an event per line, as they come";

const TAIL: &str = "\
Prints an event a line, from now on or from wherever is asked for.

  weir tail orders
  weir tail orders payments --last 10
  weir tail orders --after k3Vq7d-42 --type created | jq .data

What is missing (trimmed before it was read) is announced on standard error as a gap.";

const READ: &str = "\
Where to go on is printed on standard error as `next`.

  weir read orders --last 10
  weir read orders --after k3Vq7d-42 --wait 30s
  weir read orders --all > orders.ndjson
  weir read orders --consumer mailer --wait 30s

A consumer gets the same again until it commits: with --after NEXT, or --commit at once.";

const PRESENCE: &str = "\
Prints a member a line. Joins and leaves are events: weir tail '$presence/chat'

  weir presence chat
  weir presence chat --count
  weir tail chat --present ann              is there, as long as it runs";

const CONNECTIONS: &str = "\
Prints a connection a line: streams, sockets and reads that wait. Nodes that do not answer are
named on standard error.

  weir connections
  weir connections --channel orders | jq .remote
  weir connections kick --subject user-7
  weir connections kick --id 8f14e45fceea167a-0000002a

Who is kicked is told not to come back, but can, unless the credentials are withdrawn too.";

const CALL: &str = "\
Prints the result, as the provider wrote it.

  weir call weir/echo '{\"n\":1}'
  weir call math/add '[1,2]' --timeout 5s
  weir call reports/build - < params.json";

const PROVIDE: &str = "\
The command runs once per call. It finds the params on standard input, and WEIR_SERVICE,
WEIR_METHOD and WEIR_CALLER in its environment; it prints the result: JSON, or text that becomes
a JSON string. If it fails, what it printed may be the error, as {\"code\":42,\"message\":\"no user\"}.
A cancelled call ends it.

  weir provide echo
  weir provide math -- python3 add.py
  weir provide shout --concurrency 2 -- 'jq .text | tr a-z A-Z'
  weir provide nightly --exclusive -- ./run.sh

After a lost connection it comes back. On the first Ctrl-C it finishes the calls it has and takes
no more.";

const DOCTOR: &str = "\
Streams, long-polls, a WebSocket and a large body go to the node and back: what buffers, cuts off or
refuses them on the way is found, and named with what to change.

  weir doctor https://weir.example.com --token \"$TOKEN\"
  weir doctor --long                                    also what idle connections meet
  weir doctor --redis redis://:password@redis:6379      before weir is told to use it
  weir doctor --redis redis+sentinel://a,b,c/weir | jq 'select(.state != \"ok\")'

A finding is a line of JSON on standard output (unless that is a terminal) and prose on standard
error. Advice ends with 0, a problem with 1; what cannot be looked at ends with 3 if it does not let
us in, and with 4 if it is not there. It publishes to a channel of its own, weir.doctor.*, and
deletes it; in Redis it writes four keys that expire within a minute.";

/// A stream that begins at something unreadable begins at `now`, and says so with a gap: a program can go on from
/// there, but whoever typed it wants to hear it.
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
