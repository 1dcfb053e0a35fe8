//! [`Script`]: what happens in one step inside Redis. Sent by its hash, loaded where a server does not know it.

use std::sync::OnceLock;

use super::{
    link::{Fault, Link},
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
    pub async fn call(&self, link: &Link, keys: u64) -> Result<Command, Fault> {
        let hash = match self.hash.get() {
            Some(hash) => &**hash,
            None => self.load(link).await?,
        };
        Ok(Command::new("EVALSHA").arg(hash).int(keys))
    }

    /// For a server that has not seen it, or was told to forget it.
    pub async fn load(&self, link: &Link) -> Result<&str, Fault> {
        match link.ask(&Command::new("SCRIPT").arg("LOAD").arg(self.source)).await {
            Ok(Value::Bytes(hash)) => Ok(self.hash.get_or_init(|| String::from_utf8_lossy(&hash).into())),
            Ok(_) => Err(Fault::Refused("ERR SCRIPT LOAD answers nonsense".into())),
            // A script that was not loaded has not run.
            Err(Fault::Lost) => Err(Fault::Away("the connection to Redis broke".into())),
            Err(fault) => Err(fault),
        }
    }
}
