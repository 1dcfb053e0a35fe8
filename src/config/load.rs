//! File, environment and flags become one [`Config`], or a list of everything that is wrong with them.

use std::{collections::BTreeMap, fmt, io, path::Path, sync::Arc};

use toml::{
    Spanned,
    de::{DeTable, DeValue},
};

use super::{
    ChannelRule, Config, Part,
    slot::{Given, Item, Setting, Slot},
};

/// `WEIR__SSE__HEARTBEAT` is `sse.heartbeat`. The two underscores keep `WEIR_URL` and what Kubernetes
/// adds for a service called weir (`WEIR_PORT=tcp://…`) out of it.
const PREFIX: &str = "WEIR__";

/// What was found, and where. A key that is not in `sources` has its default.
#[derive(Clone, Debug)]
pub struct Loaded {
    pub config: Config,
    pub sources: BTreeMap<String, Source>,
}

/// Where a value comes from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Source {
    File { name: Arc<str>, line: usize },
    Environment(String),
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
    let mut config = Config::default();
    let mut found = Found::default();
    {
        let mut settings = settings(&mut config, "");
        match file {
            None => {}
            Some((name, Ok(text))) => found.file(&name, &text, &mut settings),
            Some((name, Err(error))) => {
                let source = Some(Source::File { name: name.into(), line: 0 });
                found.problem("", source, format!("cannot be read: {error}"));
            }
        }
        let mut variables: Vec<_> = environment.into_iter().filter(|(name, _)| name.starts_with(PREFIX)).collect();
        variables.sort();
        for (name, value) in variables {
            let key = name[PREFIX.len()..].to_lowercase().replace("__", ".");
            found.text(&key, &value, Source::Environment(name), &mut settings);
        }
        for Override { flag, key, value } in flags {
            found.text(key, value, Source::Flag(flag), &mut settings);
        }
    }
    for (key, reason) in config.contradictions() {
        // Of a value that could not be read nothing more is known.
        if !found.problems.iter().any(|problem| problem.key == key) {
            let source = found.sources.get(key).cloned();
            found.problem(key, source, reason);
        }
    }
    if found.problems.is_empty() {
        Ok(Loaded { config, sources: found.sources })
    } else {
        Err(Problems(found.problems))
    }
}

#[derive(Default)]
struct Found {
    sources: BTreeMap<String, Source>,
    problems: Vec<Problem>,
}

/// The file that is being read: a place in it is a line.
struct File<'a> {
    name: Arc<str>,
    text: &'a str,
}

// === impl Found ===

impl Found {
    fn file(&mut self, name: &str, text: &str, settings: &mut [Setting<'_>]) {
        let file = File { name: name.into(), text };
        let (table, errors) = DeTable::parse_recoverable(text);
        for error in errors {
            let source = file.at(error.span().map_or(0, |span| span.start));
            self.problem("", Some(source), error.message().to_owned());
        }
        self.table(table.get_ref(), "", &|at| file.at(at), settings);
    }

    /// `source` knows where a byte of the text is.
    fn table(&mut self, table: &DeTable<'_>, at: &str, source: &dyn Fn(usize) -> Source, settings: &mut [Setting<'_>]) {
        for (name, value) in table {
            let key = join(at, name.get_ref());
            let place = source(name.span().start);
            if let Some(setting) = settings.iter_mut().find(|setting| setting.key == key) {
                let before = self.problems.len();
                self.value(setting, value, source, &place);
                if self.problems.len() == before {
                    self.sources.insert(key, place);
                }
            } else if settings.iter().any(|setting| is_under(&setting.key, &key)) {
                match value.get_ref() {
                    DeValue::Table(inner) => self.table(inner, &key, source, settings),
                    _ => self.problem(&key, Some(place), format!("is a section: write [{key}] and its keys below")),
                }
            } else {
                let reason = unknown(&key, settings);
                self.problem(&key, Some(place), reason);
            }
        }
    }

    fn value(
        &mut self,
        setting: &mut Setting<'_>,
        value: &Spanned<DeValue<'_>>,
        source: &dyn Fn(usize) -> Source,
        place: &Source,
    ) {
        let Slot::Rules(rules) = &mut setting.slot else {
            if let Err(reason) = setting.slot.read(&Given::Toml(value.get_ref())) {
                self.problem(&setting.key, Some(place.clone()), reason);
            }
            return;
        };
        let DeValue::Array(tables) = value.get_ref() else {
            return self.problem(&setting.key, Some(place.clone()), "is a list of tables: write [[channels]]".into());
        };
        rules.clear();
        for (n, item) in tables.iter().enumerate() {
            let key = format!("{}[{n}]", setting.key);
            let place = source(item.span().start);
            let DeValue::Table(table) = item.get_ref() else {
                self.problem(&key, Some(place), "must be a table, as { match = \"*\", keep = { count = 5 } }".into());
                continue;
            };
            if !table.contains_key("match") {
                self.problem(&key, Some(place), "has no `match`: which channels is it for?".into());
            }
            let mut rule = ChannelRule::default();
            self.table(table, &key, source, &mut self::settings(&mut rule, &key));
            rules.push(rule);
        }
    }

    /// A value from the environment or a flag. Lists of tables are written as in a file.
    fn text(&mut self, key: &str, value: &str, source: Source, settings: &mut [Setting<'_>]) {
        let Some(setting) = settings.iter_mut().find(|setting| setting.key == key) else {
            let reason = unknown(key, settings);
            return self.problem(key, Some(source), reason);
        };
        let before = self.problems.len();
        if let Slot::Rules(_) = setting.slot {
            match DeValue::parse(value) {
                Ok(parsed) => self.value(setting, &parsed, &|_| source.clone(), &source),
                Err(error) => self.problem(key, Some(source.clone()), error.message().to_owned()),
            }
        } else if let Err(reason) = setting.slot.read(&Given::Text(value)) {
            self.problem(key, Some(source.clone()), reason);
        }
        if self.problems.len() == before {
            self.sources.insert(key.to_owned(), source);
        }
    }

    fn problem(&mut self, key: &str, source: Option<Source>, reason: String) {
        self.problems.push(Problem { key: key.to_owned(), source, reason });
    }
}

// === impl File ===

impl File<'_> {
    fn at(&self, byte: usize) -> Source {
        let line = 1 + self.text.bytes().take(byte).filter(|byte| *byte == b'\n').count();
        Source::File { name: self.name.clone(), line }
    }
}

// === what is printed ===

impl fmt::Display for Source {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Source::File { name, line: 0 } => f.write_str(name),
            Source::File { name, line } => write!(f, "{name}:{line}"),
            Source::Environment(name) => f.write_str(name),
            Source::Flag(flag) => f.write_str(flag),
        }
    }
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.source {
            Some(source) => write!(f, "{source}: ")?,
            None => f.write_str("default: ")?,
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
