//! The environment variables of the systems that adapters replace, so that a deployment keeps the variables that it
//! has.
//!
//! They apply if exactly one adapter is enabled, because two originals can both have a `PORT`. They override the file;
//! weir's own variables and the flags override them.

/// The variables of an original, and the settings that they stand for.
pub struct OriginalVariables<'a> {
    environment: &'a [(String, String)],
    allow_anonymous: bool,
    settings: Vec<OriginalSetting>,
}

/// A setting that an original's variable stands for.
pub(super) struct OriginalSetting {
    pub(super) variable: &'static str,
    pub(super) key: &'static str,
    /// As weir writes it.
    pub(super) value: String,
}

impl<'a> OriginalVariables<'a> {
    pub(super) fn new(environment: &'a [(String, String)], allow_anonymous: bool) -> Self {
        OriginalVariables { environment, allow_anonymous, settings: Vec::new() }
    }

    pub(super) fn into_settings(self) -> Vec<OriginalSetting> {
        self.settings
    }

    /// The value of a variable, if it is set and not empty.
    pub(crate) fn get(&self, name: &str) -> Option<String> {
        let found = self.environment.iter().find(|(given, value)| given == name && !value.is_empty());
        found.map(|(_, value)| value.trim().to_owned())
    }

    /// Sets `key` on behalf of `variable`, if there is a value.
    pub(crate) fn set(&mut self, variable: &'static str, key: &'static str, value: Option<String>) {
        self.settings.extend(value.map(|value| OriginalSetting { variable, key, value }));
    }

    /// `PORT`, and `HOST` if the original has it, as `server.listen`. Without a host the originals listen on all
    /// networks; weir does so only if `auth.allow_anonymous` permits it.
    pub fn set_listen(&mut self, host: Option<String>) {
        let port = self.get("PORT");
        let variable = match (&host, &port) {
            (Some(_), _) => "HOST",
            (None, Some(_)) => "PORT",
            (None, None) => return,
        };
        let all_networks = if self.allow_anonymous { "0.0.0.0" } else { "127.0.0.1" };
        let host = bracketed(host.unwrap_or_else(|| all_networks.to_owned()));
        let listen = format!("{host}:{}", port.as_deref().unwrap_or("8000"));
        self.set(variable, "server.listen", Some(listen));
    }

    /// `LOG_LEVEL` as `log.level`; it has two names that weir does not have, and may be in capitals.
    pub fn set_log_level(&mut self) {
        let level = self.get("LOG_LEVEL").map(|name| match name.to_lowercase().as_str() {
            "silent" => "off".to_owned(),
            "fatal" => "error".to_owned(),
            other => other.to_owned(),
        });
        self.set("LOG_LEVEL", "log.level", level);
    }
}

/// A host as it is written before a port.
pub(crate) fn bracketed(host: String) -> String {
    if host.contains(':') { format!("[{host}]") } else { host }
}
