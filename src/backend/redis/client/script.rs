//! [`Script`]: a Lua script, which Redis runs in one atomic step. Sent by its hash, and loaded where a server does not
//! know it.

use std::sync::OnceLock;

use redis::{Cmd, cmd};

use super::{connection::RedisConnection, pipeline::CommandError};

pub struct Script {
    source: &'static str,
    /// Redis returns it when the script is first loaded; it is the same on all servers.
    hash: OnceLock<String>,
}

impl Script {
    pub const fn new(source: &'static str) -> Self {
        Script { source, hash: OnceLock::new() }
    }

    /// Begins a call; the caller appends the arguments. Loads the script if no server has seen it yet.
    pub(super) async fn call(&self, connection: &RedisConnection, keys: &[&[u8]]) -> Result<Cmd, CommandError> {
        let hash = match self.hash.get() {
            Some(hash) => hash,
            None => self.load(connection).await?,
        };
        let mut call = cmd("EVALSHA");
        call.arg(hash).arg(keys.len()).arg(keys);
        Ok(call)
    }

    /// For a server that does not know the script, or has flushed it.
    pub(super) async fn load(&self, connection: &RedisConnection) -> Result<&str, CommandError> {
        let load = connection.ask(cmd("SCRIPT").arg("LOAD").arg(self.source));
        let hash = load.parse().await.map_err(CommandError::of_read)?;
        Ok(self.hash.get_or_init(|| hash))
    }
}
