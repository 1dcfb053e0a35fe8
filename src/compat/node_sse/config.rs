//! The configuration of the adapter, which has no settings.

use crate::{
    compat::adapter::permanent,
    config::{
        AdapterConfig, ChannelRule, OriginalVariables,
        section::{ConfigItem, Section},
    },
};

/// The channel whose offsets are the numbers of clients, on Redis.
pub(super) const CLIENTS: &str = "$node-sse/clients";

#[derive(Clone, Debug, Default, PartialEq)]
pub struct Config;

impl Section for Config {
    fn doc(&self) -> &'static str {
        ""
    }

    fn items<'a>(&'a mut self, _at: &str, _items: &mut Vec<ConfigItem<'a>>) {}
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
