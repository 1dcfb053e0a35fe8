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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        compat::read_config as read,
        config::{Backend, Loaded},
    };

    #[test]
    fn variables_of_the_original() {
        const SECRET: (&str, &str) = ("API_SECRET", "s3cret");
        let ganomede = |more: &[(&str, &str)]| {
            let own = [SECRET, ("PORT", "9000"), ("POLL_TIMEOUT", "30000"), ("LOG_LEVEL", "WARN")];
            read("compat.enable = [\"ganomede\"]\nlog.level = \"debug\"", &[&own, more].concat())
        };
        let Loaded { config, sources, .. } = ganomede(&[]).unwrap();
        assert_eq!(config.server.listen, ["127.0.0.1:9000".parse().unwrap()]);
        assert_eq!(config.compat.get::<Config>().secret.reveal(), "s3cret");
        assert_eq!(config.compat.get::<Config>().poll_timeout, seconds(30));
        assert_eq!(sources["server.listen"].to_string(), "PORT");
        assert_eq!(sources["compat.ganomede.secret"].to_string(), "API_SECRET");
        assert_eq!(sources["log.level"].to_string(), "LOG_LEVEL");
        let shown = config.to_toml(false, &sources);
        assert!(shown.contains("listen = [\"127.0.0.1:9000\"]  # PORT\n"), "{shown}");
        assert!(shown.contains("level = \"warn\"  # LOG_LEVEL\n") && !shown.contains("s3cret"), "{shown}");

        // weir's own variables override those of the original.
        let own =
            [SECRET, ("PORT", "9000"), ("WEIR__COMPAT__ENABLE", "ganomede"), ("WEIR__SERVER__LISTEN", "127.0.0.1:1")];
        let flagged = read("", &own).unwrap();
        assert_eq!(flagged.config.server.listen, ["127.0.0.1:1".parse().unwrap()]);
        assert_eq!(
            ganomede(&[("WEIR__LOG__LEVEL", "trace")]).unwrap().sources["log.level"].to_string(),
            "WEIR__LOG__LEVEL"
        );

        // Only auth.allow_anonymous permits public addresses.
        let open = ganomede(&[("HOST", "0.0.0.0")]).unwrap_err();
        assert!(open.starts_with("HOST: server.listen: 0.0.0.0:9000 can be reached from other machines"), "{open}");
        let allowed = ganomede(&[("WEIR__AUTH__ALLOW_ANONYMOUS", "true")]).unwrap().config;
        assert_eq!(allowed.server.listen, ["0.0.0.0:9000".parse().unwrap()]);
        assert!(ganomede(&[("HOST", "localhost")]).is_ok());
        assert!(
            ganomede(&[("HOST", "example.com")])
                .unwrap_err()
                .starts_with("HOST: server.listen: \"example.com:9000\" is not")
        );
        let wrong = read("compat.enable = [\"ganomede\"]", &[("POLL_TIMEOUT", "soon")]).unwrap_err();
        assert!(wrong.contains("POLL_TIMEOUT: compat.ganomede.poll_timeout:"), "{wrong}");
        assert!(wrong.contains("compat.ganomede.secret: is missing"), "{wrong}");

        let redis = ganomede(&[("REDIS_EVENTS_PORT_6379_TCP_ADDR", "db.example")]).unwrap();
        assert_eq!(
            (redis.config.bus.backend, redis.config.bus.redis.url.reveal()),
            (Backend::Redis, "redis://db.example:6379")
        );
        assert_eq!(redis.sources["bus.redis.url"].to_string(), "REDIS_EVENTS_PORT_6379_TCP_ADDR");
    }
}
