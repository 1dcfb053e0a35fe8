//! The section `compat.ganomede`.

use std::time::Duration;

use super::indices::INDICES;
use crate::{
    compat::adapter::permanent,
    config::{
        AdapterConfig, AdapterContext, ChannelRule, OriginalVariables, Secret, bracketed,
        section::{seconds, section},
    },
};

/// Maximum number of index definitions.
const MAX_INDICES: usize = 1 << 20;

section! {
    /// The `ganomede` adapter: the HTTP interface of ganomede-events at /events/v1.
    Config {
        /// Shared secret of the clients (`API_SECRET`). Required if the adapter is enabled.
        secret: Secret as Secret = Secret::default(),
        /// Names of the roles of clients that send the secret, if authentication is on.
        roles: Vec<String> as Texts = vec!["client".to_owned()],
        /// How long a poll waits for events before it returns an empty array.
        poll_timeout: Duration as Pause = seconds(5),
    }
}

impl AdapterConfig for Config {
    fn name(&self) -> &'static str {
        "ganomede"
    }

    fn paths(&self) -> &'static [&'static str] {
        &["/events/v1/*", "/latest", "/about"]
    }

    fn channels(&self) -> Vec<ChannelRule> {
        vec![permanent(INDICES, MAX_INDICES)]
    }

    fn read_original(&self, variables: &mut OriginalVariables<'_>) {
        variables.set_listen(variables.get("HOST"));
        variables.set("API_SECRET", "compat.ganomede.secret", variables.get("API_SECRET"));
        let poll_timeout = variables.get("POLL_TIMEOUT").map(|ms| format!("{ms}ms"));
        variables.set("POLL_TIMEOUT", "compat.ganomede.poll_timeout", poll_timeout);
        variables.set_log_level();
        let (host, port) = ("REDIS_EVENTS_PORT_6379_TCP_ADDR", "REDIS_EVENTS_PORT_6379_TCP_PORT");
        if let Some(variable) = [host, port].into_iter().find(|name| variables.get(name).is_some()) {
            // Events of the original in this Redis are not read: weir has its own keys.
            let host = bracketed(variables.get(host).unwrap_or("localhost".into()));
            let port = variables.get(port).unwrap_or("6379".into());
            variables.set(variable, "bus.backend", Some("redis".into()));
            variables.set(variable, "bus.redis.url", Some(format!("redis://{host}:{port}")));
        }
    }

    fn contradictions(&self, context: &AdapterContext) -> Vec<(&'static str, String)> {
        if !context.enabled || !self.secret.is_empty() {
            return Vec::new();
        }
        let reason = "is missing: it is the shared secret of all ganomede-events clients \
                      (WEIR__COMPAT__GANOMEDE__SECRET, or API_SECRET if ganomede is the only adapter)";
        vec![("compat.ganomede.secret", reason.to_owned())]
    }
}
