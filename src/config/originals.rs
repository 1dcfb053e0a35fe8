//! The environment of the systems that weir stands in for: whoever exchanges the program behind a service need not
//! exchange the service's variables.
//!
//! They count where their system's adapter is the only one that is enabled, for two of them cannot both have a `PORT`;
//! after the file, and before weir's own variables and the flags.

use super::{Adapter, Config};

/// What the variables of the one enabled adapter's original say, as (variable, key, value as weir writes it).
pub(super) fn settings(config: &Config, environment: &[(String, String)]) -> Vec<(&'static str, &'static str, String)> {
    let [adapter] = config.compat.enable[..] else { return Vec::new() };
    // An empty variable is one that somebody took back.
    let get = |name: &str| {
        let found = environment.iter().find(|(given, value)| given == name && !value.is_empty());
        found.map(|(_, value)| value.trim().to_owned())
    };
    let mut found = Vec::new();
    let mut set = |variable, key, value: Option<String>| found.extend(value.map(|value| (variable, key, value)));
    let (host, port) = match adapter {
        Adapter::Ganomede => (get("HOST"), get("PORT")),
        Adapter::MicroStream | Adapter::NodeSse => (None, get("PORT")),
        // It has no listener of its own kind, and its publisher's variables are the publisher's.
        Adapter::Grip => (None, None),
    };
    if host.is_some() || port.is_some() {
        let variable = if host.is_some() { "HOST" } else { "PORT" };
        // The originals serve every network by default. weir does where that is allowed: it is said in one place, for
        // all that it serves.
        let everybody = if config.auth.allow_anonymous { "0.0.0.0" } else { "127.0.0.1" };
        let host = host.as_deref().unwrap_or(everybody);
        let host = if host.contains(':') { format!("[{host}]") } else { host.to_owned() };
        set(variable, "server.listen", Some(format!("{host}:{}", port.as_deref().unwrap_or("8000"))));
    }
    match adapter {
        Adapter::Ganomede => {
            set("API_SECRET", "compat.ganomede.secret", get("API_SECRET"));
            set("POLL_TIMEOUT", "compat.ganomede.poll_timeout", get("POLL_TIMEOUT").map(|ms| format!("{ms}ms")));
            set("LOG_LEVEL", "log.level", get("LOG_LEVEL").map(level));
            let (host, port) = ("REDIS_EVENTS_PORT_6379_TCP_ADDR", "REDIS_EVENTS_PORT_6379_TCP_PORT");
            if let Some(variable) = [host, port].into_iter().find(|name| get(name).is_some()) {
                // Whatever it held is not read: weir keeps its events under keys of its own.
                let (host, port) = (get(host).unwrap_or("localhost".into()), get(port).unwrap_or("6379".into()));
                let host = if host.contains(':') { format!("[{host}]") } else { host };
                set(variable, "bus.backend", Some("redis".into()));
                set(variable, "bus.redis.url", Some(format!("redis://{host}:{port}")));
            }
        }
        Adapter::MicroStream => set("LOG_LEVEL", "log.level", get("LOG_LEVEL").map(level)),
        Adapter::NodeSse => {
            let debug = get("DEBUG_LOGS").filter(|value| value == "true");
            set("DEBUG_LOGS", "log.level", debug.map(|_| "debug".to_owned()));
        }
        Adapter::Grip => {}
    }
    found
}

/// Names of levels that weir has not, or writes in small letters.
fn level(name: String) -> String {
    match name.to_lowercase().as_str() {
        "silent" => "off".to_owned(),
        "fatal" => "error".to_owned(),
        other => other.to_owned(),
    }
}
