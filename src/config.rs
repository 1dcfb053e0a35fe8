//! All settings with their defaults and descriptions, and the loading of them.
//!
//! Sources in increasing precedence: a TOML file, the environment (`WEIR__SSE__HEARTBEAT` is `sse.heartbeat`), flags.
//! An unknown key or `WEIR_` variable is an error. All errors are reported together, each with its key and its source.
//! `config.toml` at the root of the repository is generated from the sections (`UPDATE=1 cargo test config`).
//!
//! A section that is not an adapter's is in `sections`. An adapter's section is its [`AdapterConfig`]; the caller of
//! [`load`] brings them, in the defaults.

mod adapter;
mod auth;
mod channel_rule;
mod load;
mod originals;
mod print;
pub(crate) mod section;
mod sections;
mod slot;
mod value;

pub use adapter::{AdapterConfig, AdapterContext, CompatSection};
pub use auth::{AuthSection, JwtSection, KeyRule, RoleRule};
pub use channel_rule::{ChannelRule, Keep};
pub use load::{COMMAND_VARIABLES, ConfigProblem, ConfigProblems, Loaded, Override, Source, load, read};
pub use originals::OriginalVariables;
pub(crate) use originals::bracketed;
pub use section::{ConfigItem, Section};
pub use sections::{Config, LimitsSection, LogSection};
pub use value::{Ack, Backend, Level, LogFormat, Secret};
