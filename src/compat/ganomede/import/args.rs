//! The command line of `weir import ganomede`.

use std::path::PathBuf;

use clap::Args;

const IMPORT: &str = "\
Ids become offsets; times are preserved. An id without an event gets an event of type weir.void,
which is not shown to clients of ganomede. last-fetched positions become cursors of consumers.

  WEIR__BUS__BACKEND=redis WEIR__BUS__REDIS__URL=redis://new:6379 \\
    weir import ganomede --from redis://old:6379

An import can be interrupted and run again; it continues where it stopped. Run it while the
servers of ganomede still run, stop them, and run it once more. If a channel has events that are
not imported, nothing is written.";

/// Import channels, events, positions of clients and indices of ganomede-events
#[derive(Debug, Args)]
#[command(after_help = IMPORT)]
pub(super) struct ImportArgs {
    /// The Redis of ganomede-events; it is only read
    #[arg(long, value_name = "URL")]
    pub(super) from: String,
    /// Configuration of the nodes: bus.backend and bus.redis are the target, and the channel rules apply
    #[arg(long, value_name = "FILE", env = "WEIR_CONFIG", hide_env_values = true)]
    pub(super) config: Option<PathBuf>,
    /// Print what would be imported, and write nothing
    #[arg(long)]
    pub(super) dry_run: bool,
    /// Import channels of which the channel rules trim a part
    #[arg(long)]
    pub(super) allow_trim: bool,
}
