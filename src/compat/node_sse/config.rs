//! The section `compat.node-sse`.

use crate::{
    compat::adapter::permanent,
    config::{AdapterConfig, ChannelRule, OriginalVariables, section::section},
};

/// The channel whose offsets are the numbers of clients, on Redis.
pub(super) const CLIENTS: &str = "$node-sse/clients";

section! {
    /// The `node-sse` adapter: node-sse-server at /subscribe, /publish and /lastEvent.
    Config {
        /// Names of the roles of clients without credentials, if authentication is on.
        roles: Vec<String> as Texts = Vec::new(),
    }
}

impl AdapterConfig for Config {
    fn name(&self) -> &'static str {
        "node-sse"
    }

    fn paths(&self) -> &'static [&'static str] {
        &["/subscribe", "/publish", "/lastEvent"]
    }

    fn channels(&self) -> Vec<ChannelRule> {
        // The newest event holds the count.
        vec![permanent(CLIENTS, 1)]
    }

    fn read_original(&self, variables: &mut OriginalVariables<'_>) {
        variables.set_listen(None);
        let debug = variables.get("DEBUG_LOGS").filter(|value| value == "true");
        variables.set("DEBUG_LOGS", "log.level", debug.map(|_| "debug".to_owned()));
    }
}
