//! File, environment and flags become one [`Config`], or a list of everything that is wrong with them.

use std::{collections::BTreeMap, fmt, io, path::Path, sync::Arc};

use figment::{
    Figment, Metadata, Profile, Provider,
    providers::{Format as _, Toml},
    value::{Dict, Map, Tag, Value},
};

use super::{
    Config, Part, originals,
    slot::{Item, Setting, Slot},
};

/// `WEIR__SSE__HEARTBEAT` is `sse.heartbeat`. The two underscores keep `WEIR_URL` and what Kubernetes
/// adds for a service called weir (`WEIR_PORT=tcp://…`) out of it.
const PREFIX: &str = "WEIR__";

/// One of a list of tables.
pub(super) trait Table: Part + Clone + Default {
    /// The keys that have no default, and what to ask whoever left them out.
    const REQUIRED: &'static [(&'static str, &'static str)];
    /// As it is written in one line.
    const EXAMPLE: &'static str;
}

/// A list of tables, whatever they are: what the loader needs of it, and who writes it down.
pub(super) trait Tables {
    fn clear(&mut self);
    /// Adds a table of defaults.
    fn add(&mut self);
    fn len(&self) -> usize;
    /// The settings of one.
    fn items<'a>(&'a mut self, n: usize, at: &str) -> Vec<Item<'a>>;
    fn required(&self) -> &'static [(&'static str, &'static str)];
    fn example(&self) -> &'static str;
}

/// What was found, and where. A key that is not in `sources` has its default.
#[derive(Clone, Debug)]
pub struct Loaded {
    pub config: Config,
    pub sources: BTreeMap<String, Source>,
}

/// Where a value comes from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Source {
    File(Arc<str>),
    Environment(Arc<str>),
    Flag(&'static str),
}

/// A value given on the command line.
#[derive(Clone, Debug)]
pub struct Override {
    pub flag: &'static str,
    pub key: &'static str,
    pub value: String,
}

/// One thing that is wrong.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Problem {
    /// Empty if it is no single key, such as a file that cannot be read.
    pub key: String,
    /// None if the value is weir's own and only contradicts another.
    pub source: Option<Source>,
    pub reason: String,
}

/// Everything that is wrong, a line each. Never empty.
#[derive(Clone, Debug)]
pub struct Problems(pub Vec<Problem>);

/// Reads `file` if there is one, then what of `environment` is weir's, then `flags`; the later wins.
///
/// The environment is given, not looked up, so that tests have their own.
pub fn load(
    file: Option<&Path>,
    environment: impl IntoIterator<Item = (String, String)>,
    flags: &[Override],
) -> Result<Loaded, Problems> {
    let text = file.map(|path| (path.display().to_string(), std::fs::read_to_string(path)));
    from(text, environment, flags)
}

pub(super) fn from(
    file: Option<(String, io::Result<String>)>,
    environment: impl IntoIterator<Item = (String, String)>,
    flags: &[Override],
) -> Result<Loaded, Problems> {
    let environment: Vec<_> = environment.into_iter().collect();
    // Which adapters are on says whose other variables count, and those may be overruled in turn.
    let first = gather(&file, &environment, &[], flags);
    let originals = originals::settings(&first.0, &environment);
    let (config, found) = match originals.is_empty() {
        true => first,
        false => gather(&file, &environment, &originals, flags),
    };
    if found.problems.is_empty() {
        Ok(Loaded { config, sources: found.sources })
    } else {
        Err(Problems(found.problems))
    }
}

/// Everything that was found, and what is wrong with it.
fn gather(
    file: &Option<(String, io::Result<String>)>,
    environment: &[(String, String)],
    originals: &[(&'static str, &'static str, String)],
    flags: &[Override],
) -> (Config, Found) {
    let mut config = Config::default();
    let mut found = Found::default();
    let lists: Vec<String> = settings(&mut config, "")
        .into_iter()
        .filter_map(|setting| matches!(setting.slot, Slot::Tables(_)).then_some(setting.key))
        .collect();
    if let Some((name, text)) = file {
        found.file(name.as_str().into(), text);
    }
    for (variable, key, value) in originals {
        found.text(key, value.clone(), Source::Environment((*variable).into()), &lists);
    }
    let mut variables: Vec<_> = environment.iter().filter(|(name, _)| name.starts_with(PREFIX)).collect();
    variables.sort();
    for (name, value) in variables {
        let key = name[PREFIX.len()..].to_lowercase().replace("__", ".");
        found.text(&key, value.clone(), Source::Environment(name.as_str().into()), &lists);
    }
    for Override { flag, key, value } in flags {
        found.text(key, value.clone(), Source::Flag(flag), &lists);
    }
    let merged = found.figment.data().unwrap_or_default().remove(&Profile::Default).unwrap_or_default();
    found.table(&merged, "", &mut settings(&mut config, ""));
    for (key, reason) in config.contradictions() {
        // Of a value that could not be read nothing more is known.
        if !found.problems.iter().any(|problem| problem.key == key) {
            let source = found.sources.get(key).cloned();
            found.problem(key, source, reason);
        }
    }
    (config, found)
}

/// Where values come together: figment merges the layers and knows of each value which one it is from.
#[derive(Default)]
struct Found {
    figment: Figment,
    /// Of each layer, in their order; a layer's name is its index.
    layers: Vec<Source>,
    sources: BTreeMap<String, Source>,
    problems: Vec<Problem>,
}

/// A file, a variable or a flag.
struct Layer {
    index: usize,
    data: Map<Profile, Dict>,
}

// === impl Layer ===

impl Provider for Layer {
    fn metadata(&self) -> Metadata {
        Metadata::named(self.index.to_string())
    }

    fn data(&self) -> figment::Result<Map<Profile, Dict>> {
        Ok(self.data.clone())
    }
}

// === impl Found ===

impl Found {
    fn file(&mut self, name: Arc<str>, text: &io::Result<String>) {
        let source = Source::File(name);
        match text {
            Ok(text) => self.toml(text, "", source),
            Err(error) => self.problem("", Some(source), format!("cannot be read: {error}")),
        }
    }

    /// A value from the environment or a flag: text, whatever it looks like, but that lists of tables are written as in
    /// a file.
    fn text(&mut self, key: &str, value: String, source: Source, lists: &[String]) {
        if lists.iter().any(|list| list == key) {
            return self.toml(&format!("{key} = {value}"), key, source);
        }
        let mut nested = Value::from(value);
        let mut names = key.rsplit('.').peekable();
        while let Some(name) = names.next() {
            let table = Dict::from([(name.to_owned(), nested)]);
            if names.peek().is_none() {
                return self.layer(Profile::Default.collect(table), source);
            }
            nested = Value::from(table);
        }
    }

    fn toml(&mut self, text: &str, key: &str, source: Source) {
        match Toml::string(text).data() {
            Ok(data) => self.layer(data, source),
            Err(error) => {
                // A problem has one line. Its picture of the place takes several, with a `|` before what is on them.
                let picture =
                    |line: &str| line.trim_start_matches(|c: char| c == ' ' || c.is_ascii_digit()).starts_with('|');
                let reason = error.to_string();
                let reason: Vec<_> = reason.lines().filter(|line| !picture(line)).map(str::trim).collect();
                self.problem(key, Some(source), reason.join(": "));
            }
        }
    }

    fn layer(&mut self, data: Map<Profile, Dict>, source: Source) {
        let layer = Layer { index: self.layers.len(), data };
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
                // A section of which everything is left as it is.
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
        self.problems.push(Problem { key: key.to_owned(), source, reason });
    }
}

// === impl Tables ===

impl<T: Table> Tables for Vec<T> {
    fn clear(&mut self) {
        self.clear();
    }

    fn add(&mut self) {
        self.push(T::default());
    }

    fn len(&self) -> usize {
        self.len()
    }

    fn items<'a>(&'a mut self, n: usize, at: &str) -> Vec<Item<'a>> {
        let mut items = Vec::new();
        self[n].items(at, &mut items);
        items
    }

    fn required(&self) -> &'static [(&'static str, &'static str)] {
        T::REQUIRED
    }

    fn example(&self) -> &'static str {
        T::EXAMPLE
    }
}

// === what is printed ===

impl fmt::Display for Source {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Source::File(name) | Source::Environment(name) => f.write_str(name),
            Source::Flag(flag) => f.write_str(flag),
        }
    }
}

impl fmt::Display for Problem {
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

impl fmt::Display for Problems {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (n, problem) in self.0.iter().enumerate() {
            write!(f, "{}{problem}", if n == 0 { "" } else { "\n" })?;
        }
        Ok(())
    }
}

impl std::error::Error for Problems {}

// === keys ===

pub(super) fn join(at: &str, name: &str) -> String {
    if at.is_empty() { name.to_owned() } else { format!("{at}.{name}") }
}

fn settings<'a>(part: &'a mut impl Part, at: &str) -> Vec<Setting<'a>> {
    let mut items = Vec::new();
    part.items(at, &mut items);
    only_settings(items)
}

fn only_settings(items: Vec<Item<'_>>) -> Vec<Setting<'_>> {
    items.into_iter().filter_map(|item| if let Item::Setting(setting) = item { Some(setting) } else { None }).collect()
}

fn is_under(key: &str, section: &str) -> bool {
    key.strip_prefix(section).is_some_and(|rest| rest.starts_with('.'))
}

fn unknown(key: &str, settings: &[Setting<'_>]) -> String {
    let name = key.rsplit('.').next().unwrap_or(key);
    let near = settings.iter().map(|setting| (edits(key, &setting.key), &setting.key)).min();
    let elsewhere = settings.iter().find(|setting| setting.key.rsplit('.').next() == Some(name));
    match (near, elsewhere) {
        (Some((1..=2, near)), _) => format!("unknown key; did you mean {near}?"),
        (_, Some(elsewhere)) => format!("unknown key; did you mean {}?", elsewhere.key),
        _ => "unknown key".into(),
    }
}

/// Levenshtein's distance in bytes: good enough for a hint.
fn edits(a: &str, b: &str) -> usize {
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, x) in a.bytes().enumerate() {
        let mut diagonal = row[0];
        row[0] = i + 1;
        for (j, y) in b.bytes().enumerate() {
            let kept = diagonal + usize::from(x != y);
            diagonal = row[j + 1];
            row[j + 1] = kept.min(row[j] + 1).min(diagonal + 1);
        }
    }
    row[b.len()]
}
