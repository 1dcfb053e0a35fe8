//! The command line of `weir import ganomede`.

use std::path::PathBuf;

use clap::Args;

const IMPORT: &str = "\
Ids become offsets and times stay. An id that has no event is filled by an event of type weir.void,
which clients of ganomede do not see. last-fetched positions become cursors of consumers.

  WEIR__BUS__BACKEND=redis WEIR__BUS__REDIS__URL=redis://new:6379 \\
    weir import ganomede --from redis://old:6379

It may be interrupted at any point and run again, and goes on where it was: run it while the
servers of ganomede still work, stop them, and run it once more. A channel that has events of
weir's own is refused, and then nothing is written.";

/// Channels, events, positions of clients and indices of ganomede-events
#[derive(Debug, Args)]
#[command(after_help = IMPORT)]
pub(super) struct ImportArgs {
    /// The Redis of ganomede-events, which is only read
    #[arg(long, value_name = "URL")]
    pub(super) from: String,
    /// Settings of the nodes: bus.backend and bus.redis say where to, the channel rules what is kept
    #[arg(long, value_name = "FILE", env = "WEIR_CONFIG", hide_env_values = true)]
    pub(super) config: Option<PathBuf>,
    /// Only say what would be done
    #[arg(long)]
    pub(super) dry_run: bool,
    /// Also where the channel rules let go of a part of it
    #[arg(long)]
    pub(super) allow_trim: bool,
}
