//! Loads a [`Config`] from a file, the environment and flags, and reports all errors at once.

use std::{collections::BTreeMap, fmt, io, path::Path, sync::Arc};

use figment::{
    Figment, Metadata, Profile, Provider,
    providers::{Format as _, Toml},
    util::nest,
    value::{Dict, Map, Tag, Value},
};
use strsim::levenshtein;

use super::{
    originals::{OriginalSetting, OriginalVariables},
    section::{ConfigItem, Section, Setting, Slot, join},
    sections::Config,
};

/// The variables that are no settings: those of the command line, and those of commands that `weir provide` runs.
pub const COMMAND_VARIABLES: [&str; 6] =
    ["WEIR_CONFIG", "WEIR_URL", "WEIR_TOKEN", "WEIR_SERVICE", "WEIR_METHOD", "WEIR_CALLER"];

/// A configuration and the sources of its values. A key that is not in `sources` has its default.
#[derive(Clone, Debug)]
pub struct Loaded {
    pub config: Config,
    pub sources: BTreeMap<String, Source>,
    /// The variables that Kubernetes sets for a Service whose name begins with `weir`; they are no settings.
    pub service_links: Vec<String>,
}

/// The source of a value.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Source {
    File(Arc<str>),
    Environment(Arc<str>),
    Flag(&'static str),
}

/// A value from the command line.
#[derive(Clone, Debug)]
pub struct Override {
    pub flag: &'static str,
    pub key: &'static str,
    pub value: String,
}

/// An error of the configuration.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ConfigProblem {
    /// Empty if the error is not about one key, for example if a file cannot be read.
    pub key: String,
    /// `None` if the value is a default that contradicts another value.
    pub source: Option<Source>,
    pub reason: String,
}

/// All errors, printed one per line. Never empty.
#[derive(Clone, Debug)]
pub struct ConfigProblems(pub Vec<ConfigProblem>);

/// Overrides `defaults` with `file`, the variables of `environment` that begin with `WEIR_`, and `flags`; the later wins.
///
/// The environment is a parameter so that tests have their own.
pub fn load(
    defaults: &Config,
    file: Option<&Path>,
    environment: impl IntoIterator<Item = (String, String)>,
    flags: &[Override],
) -> Result<Loaded, ConfigProblems> {
    let text = file.map(|path| (path.display().to_string(), std::fs::read_to_string(path)));
    read(defaults, text, environment, flags)
}

/// As [`load`], with the content of the file.
pub fn read(
    defaults: &Config,
    file: Option<(String, io::Result<String>)>,
    environment: impl IntoIterator<Item = (String, String)>,
    flags: &[Override],
) -> Result<Loaded, ConfigProblems> {
    let (service_links, environment): (Vec<_>, Vec<_>) =
        environment.into_iter().partition(|(name, value)| is_service_link(name, value));
    // The enabled adapters are known after a first pass; their originals' variables apply in a second.
    let first = gather(defaults, &file, &environment, &[], flags);
    let originals = originals(&first.0, &environment);
    let (config, found) = match originals.is_empty() {
        true => first,
        false => gather(defaults, &file, &environment, &originals, flags),
    };
    if found.problems.is_empty() {
        let service_links = service_links.into_iter().map(|(name, _)| name).collect();
        Ok(Loaded { config, sources: found.sources, service_links })
    } else {
        Err(ConfigProblems(found.problems))
    }
}

/// The settings that the variables of an original stand for, if its adapter is the only one that is enabled.
fn originals(config: &Config, environment: &[(String, String)]) -> Vec<OriginalSetting> {
    let mut variables = OriginalVariables::new(environment, config.auth.allow_anonymous);
    if let [name] = config.compat.enable[..]
        && let Some(adapter) = config.compat.enabled().find(|adapter| adapter.name() == name)
    {
        adapter.read_original(&mut variables);
    }
    variables.into_settings()
}

/// Merges all sources.
fn gather(
    defaults: &Config,
    file: &Option<(String, io::Result<String>)>,
    environment: &[(String, String)],
    originals: &[OriginalSetting],
    flags: &[Override],
) -> (Config, MergedValues) {
    let mut config = defaults.clone();
    let mut found = MergedValues::default();
    let known = settings(&mut config, "");
    let keys: Vec<String> = known.iter().map(|setting| setting.key.clone()).collect();
    let lists: Vec<String> = known
        .into_iter()
        .filter_map(|setting| matches!(setting.slot, Slot::Tables(_)).then_some(setting.key))
        .collect();
    if let Some((name, text)) = file {
        found.file(name.as_str().into(), text);
    }
    for OriginalSetting { variable, key, value } in originals {
        found.text(key, value.clone(), Source::Environment((*variable).into()), &lists);
    }
    let mut variables: Vec<_> = environment
        .iter()
        .filter(|(name, _)| name.to_uppercase().starts_with("WEIR_") && !COMMAND_VARIABLES.contains(&name.as_str()))
        .collect();
    variables.sort();
    for (name, value) in variables {
        let source = Source::Environment(name.as_str().into());
        match keys.iter().find(|key| variable(key) == *name) {
            Some(key) => found.text(key, value.clone(), source, &lists),
            None => found.problem("", Some(source), unknown_variable(name, &keys)),
        }
    }
    for Override { flag, key, value } in flags {
        found.text(key, value.clone(), Source::Flag(flag), &lists);
    }
    let merged = found.figment.data().unwrap_or_default().remove(&Profile::Default).unwrap_or_default();
    found.table(&merged, "", &mut settings(&mut config, ""));
    for (key, reason) in config.contradictions() {
        // A value that cannot be read has been reported already.
        if !found.problems.iter().any(|problem| problem.key == key) {
            let source = found.sources.get(key).cloned();
            found.problem(key, source, reason);
        }
    }
    (config, found)
}

/// The merged values. figment remembers which layer each value comes from.
#[derive(Default)]
struct MergedValues {
    figment: Figment,
    /// The source of each layer. The name of a layer is its index.
    layers: Vec<Source>,
    sources: BTreeMap<String, Source>,
    problems: Vec<ConfigProblem>,
}

/// A file, a variable or a flag.
struct ConfigLayer {
    index: usize,
    data: Map<Profile, Dict>,
}

// === impl ConfigLayer ===

impl Provider for ConfigLayer {
    fn metadata(&self) -> Metadata {
        Metadata::named(self.index.to_string())
    }

    fn data(&self) -> figment::Result<Map<Profile, Dict>> {
        Ok(self.data.clone())
    }
}

// === impl MergedValues ===

impl MergedValues {
    fn file(&mut self, name: Arc<str>, text: &io::Result<String>) {
        let source = Source::File(name);
        match text {
            Ok(text) => self.toml(text, "", source),
            Err(error) => self.problem("", Some(source), format!("cannot be read: {error}")),
        }
    }

    /// Adds a value from the environment or a flag. It is text, except that arrays of tables are TOML.
    fn text(&mut self, key: &str, value: String, source: Source, lists: &[String]) {
        if lists.iter().any(|list| list == key) {
            return self.toml(&format!("{key} = {value}"), key, source);
        }
        let table = nest(key, value.into()).into_dict().unwrap_or_default();
        self.layer(Profile::Default.collect(table), source);
    }

    fn toml(&mut self, text: &str, key: &str, source: Source) {
        match Toml::string(text).data() {
            Ok(data) => self.layer(data, source),
            Err(error) => {
                // A problem is printed on one line: the lines of the excerpt, which begin with `|`, are left out.
                let picture =
                    |line: &str| line.trim_start_matches(|c: char| c == ' ' || c.is_ascii_digit()).starts_with('|');
                let reason = error.to_string();
                let reason: Vec<_> = reason.lines().filter(|line| !picture(line)).map(str::trim).collect();
                self.problem(key, Some(source), reason.join(": "));
            }
        }
    }

    fn layer(&mut self, data: Map<Profile, Dict>, source: Source) {
        let layer = ConfigLayer { index: self.layers.len(), data };
        self.layers.push(source);
        self.figment = std::mem::take(&mut self.figment).merge(layer);
    }

    fn source(&self, tag: Tag) -> Option<Source> {
        self.layers.get(self.figment.get_metadata(tag)?.name.parse::<usize>().ok()?).cloned()
    }

    fn table(&mut self, table: &Dict, at: &str, settings: &mut [Setting<'_>]) {
        for (name, value) in table {
            let key = join(at, name);
            let source = self.source(value.tag());
            if let Some(setting) = settings.iter_mut().find(|setting| setting.key == key) {
                let before = self.problems.len();
                self.value(setting, value, source.clone());
                if self.problems.len() == before {
                    self.sources.extend(source.map(|source| (key, source)));
                }
            } else if let Value::Dict(_, inner) = value
                && !inner.is_empty()
            {
                self.table(inner, &key, settings);
            } else if settings.iter().any(|setting| is_under(&setting.key, &key)) && matches!(value, Value::Dict(..)) {
                // An empty section.
            } else if settings.iter().any(|setting| is_under(&setting.key, &key)) {
                self.problem(&key, source, format!("is a section: write [{key}] and its keys below"));
            } else {
                let reason = unknown(&key, settings);
                self.problem(&key, source, reason);
            }
        }
    }

    fn value(&mut self, setting: &mut Setting<'_>, value: &Value, source: Option<Source>) {
        let Slot::Tables(list) = &mut setting.slot else {
            if let Err(reason) = setting.slot.read(value) {
                self.problem(&setting.key, source, reason);
            }
            return;
        };
        let Value::Array(_, tables) = value else {
            return self.problem(&setting.key, source, format!("is a list of tables: write [[{}]]", setting.key));
        };
        list.clear();
        for item in tables {
            let n = list.len();
            let key = format!("{}[{n}]", setting.key);
            list.add();
            let Value::Dict(_, table) = item else {
                self.problem(&key, source.clone(), format!("must be a table, as {}", list.example()));
                continue;
            };
            for (name, question) in list.required() {
                if !table.contains_key(*name) {
                    self.problem(&key, source.clone(), format!("has no `{name}`: {question}"));
                }
            }
            self.table(table, &key, &mut only_settings(list.items(n, &key)));
        }
    }

    fn problem(&mut self, key: &str, source: Option<Source>, reason: String) {
        self.problems.push(ConfigProblem { key: key.to_owned(), source, reason });
    }
}

// === Display ===

impl fmt::Display for Source {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Source::File(name) | Source::Environment(name) => f.write_str(name),
            Source::Flag(flag) => f.write_str(flag),
        }
    }
}

impl fmt::Display for ConfigProblem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(source) = &self.source {
            write!(f, "{source}: ")?;
        }
        if !self.key.is_empty() {
            write!(f, "{}: ", self.key)?;
        }
        f.write_str(&self.reason)
    }
}

impl fmt::Display for ConfigProblems {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (n, problem) in self.0.iter().enumerate() {
            write!(f, "{}{problem}", if n == 0 { "" } else { "\n" })?;
        }
        Ok(())
    }
}

impl std::error::Error for ConfigProblems {}

// === keys ===

fn settings<'a>(section: &'a mut impl Section, at: &str) -> Vec<Setting<'a>> {
    let mut items = Vec::new();
    section.items(at, &mut items);
    only_settings(items)
}

fn only_settings(items: Vec<ConfigItem<'_>>) -> Vec<Setting<'_>> {
    items
        .into_iter()
        .filter_map(|item| if let ConfigItem::Setting(setting) = item { Some(setting) } else { None })
        .collect()
}

fn is_under(key: &str, section: &str) -> bool {
    key.strip_prefix(section).is_some_and(|rest| rest.starts_with('.'))
}

fn unknown(key: &str, settings: &[Setting<'_>]) -> String {
    match nearest(key, settings.iter().map(|setting| &*setting.key)) {
        Some(near) => format!("unknown key; did you mean {near}?"),
        None => "unknown key".into(),
    }
}

fn unknown_variable(name: &str, keys: &[String]) -> String {
    let upper = name.to_uppercase();
    let command = COMMAND_VARIABLES.into_iter().find(|known| levenshtein(known, &upper) <= 2).map(str::to_owned);
    match command.or_else(|| nearest(&upper["WEIR_".len()..], keys.iter().map(String::as_str)).map(variable)) {
        Some(near) => format!("unknown variable; did you mean {near}?"),
        None => "unknown variable; the variable of sse.heartbeat is WEIR__SSE__HEARTBEAT".into(),
    }
}

/// The environment variable of a setting.
fn variable(key: &str) -> String {
    format!("WEIR__{}", key.to_uppercase().replace('.', "__"))
}

/// Whether Kubernetes sets this variable for a Service named `weir` or `weir-…` in the namespace
/// (`enableServiceLinks`): `WEIR_SERVICE_HOST`, `WEIR_SERVICE_PORT_HTTP`, `WEIR_PORT=tcp://…`, `WEIR_PORT_8000_TCP_ADDR`.
fn is_service_link(name: &str, value: &str) -> bool {
    let Some(name) = name.strip_prefix("WEIR") else { return false };
    let is_url = || ["tcp://", "udp://", "sctp://"].iter().any(|scheme| value.starts_with(scheme));
    let is_port = |rest: &str| {
        let mut words = rest.split('_');
        words.next().is_some_and(|port| port.parse::<u16>().is_ok())
            && words.next().is_some_and(|protocol| ["TCP", "UDP", "SCTP"].contains(&protocol))
    };
    name.ends_with("_SERVICE_HOST")
        || name.ends_with("_SERVICE_PORT")
        || name.contains("_SERVICE_PORT_")
        || name.ends_with("_PORT") && is_url()
        || name.match_indices("_PORT_").any(|(at, found)| is_port(&name[at + found.len()..]))
}

/// The key that a mistaken key or variable most likely stands for: one that differs in two letters, one that contains it
/// (`LISTEN`, `REDIS_URL`), or one whose last part it contains (`ws.heartbeat`). The first of `keys` if several fit.
fn nearest<'a>(name: &str, keys: impl Iterator<Item = &'a str>) -> Option<&'a str> {
    let words = |text: &str| {
        let text = text.to_lowercase();
        let words: Vec<_> = text.split(['.', '_']).filter(|word| !word.is_empty()).map(synonym).collect();
        format!("_{}_", words.join("_"))
    };
    let name = words(name);
    let rank = |key: &str| {
        let (whole, last) = (words(key), words(key.rsplit('.').next().unwrap_or(key)));
        match levenshtein(&name, &whole) {
            edits @ 0..=2 => Some((0, edits)),
            _ if whole.contains(&name) => Some((1, 0)),
            // A longer part says more.
            _ if name.contains(&last) => Some((2, usize::MAX - last.len())),
            _ => None,
        }
    };
    keys.filter_map(|key| Some((rank(key)?, key))).min_by_key(|(rank, _)| *rank).map(|(_, key)| key)
}

/// The word of the settings for what other servers call `PORT`.
fn synonym(word: &str) -> &str {
    if ["port", "host", "addr", "address", "bind"].contains(&word) { "listen" } else { word }
}
