//! [`Script`]: what happens in one step inside Redis. Sent by its hash, loaded where a server does not know it.

use std::sync::OnceLock;

use super::{
    connection::{CommandError, RedisConnection},
    resp::{Command, Value},
};

/// A `.lua` file.
pub struct Script {
    source: &'static str,
    /// Redis names it when it is first loaded; the same everywhere.
    hash: OnceLock<Box<str>>,
}

impl Script {
    pub const fn new(source: &'static str) -> Self {
        Script { source, hash: OnceLock::new() }
    }

    /// Begins a call; the keys come next, then the arguments. Loads the script if no server has seen it yet.
    pub async fn call(&self, connection: &RedisConnection, keys: u64) -> Result<Command, CommandError> {
        let hash = match self.hash.get() {
            Some(hash) => &**hash,
            None => self.load(connection).await?,
        };
        Ok(Command::new("EVALSHA").arg(hash).int(keys))
    }

    /// For a server that has not seen it, or was told to forget it.
    pub async fn load(&self, connection: &RedisConnection) -> Result<&str, CommandError> {
        match connection.ask(&Command::new("SCRIPT").arg("LOAD").arg(self.source)).await {
            Ok(Value::Bytes(hash)) => Ok(self.hash.get_or_init(|| String::from_utf8_lossy(&hash).into())),
            Ok(_) => Err(CommandError::Rejected("ERR SCRIPT LOAD answers nonsense".into())),
            // A script that was not loaded has not run.
            Err(CommandError::Unconfirmed) => Err(CommandError::NotExecuted("the connection to Redis broke".into())),
            Err(fault) => Err(fault),
        }
    }
}
