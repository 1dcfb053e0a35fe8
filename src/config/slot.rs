//! One setting: where its value is kept, how it is read from a file or from text, how it is written back.

use std::{fmt, net::SocketAddr, time::Duration};

use figment::value::Value;
use tracing_subscriber::filter::Targets;

use super::load::Tables;
use crate::duration;

/// What a part of the configuration is made of, in the order in which it is shown.
pub(super) enum Item<'a> {
    Section { key: String, doc: &'static str },
    Setting(Setting<'a>),
}

/// A key, its explanation, and the place that its value goes to.
pub(super) struct Setting<'a> {
    pub key: String,
    pub doc: &'static str,
    pub slot: Slot<'a>,
}

/// The closed set of things a setting can be.
pub(super) enum Slot<'a> {
    Flag(&'a mut bool),
    /// A number of things, at least one.
    Count(&'a mut usize),
    /// A number of bytes, at least one: `16MiB`, or plain.
    Size(&'a mut usize),
    /// A duration longer than nothing.
    Time(&'a mut Duration),
    /// A duration that may be `0s`.
    Pause(&'a mut Duration),
    Addresses(&'a mut Vec<SocketAddr>),
    /// Empty text is none.
    Address(&'a mut Option<SocketAddr>),
    Origins(&'a mut Vec<String>),
    Pattern(&'a mut String),
    Backend(&'a mut Backend),
    Ack(&'a mut Ack),
    /// No name twice.
    Adapters(&'a mut Vec<Adapter>),
    Level(&'a mut Level),
    Format(&'a mut Format),
    /// A path that requests begin with.
    Path(&'a mut String),
    /// Where an HTTP server is: scheme, host and port, and nothing more.
    Url(&'a mut String),
    /// Any text; what it means is somebody else's to say.
    Text(&'a mut String),
    /// Texts, of which each is somebody else's to read.
    Texts(&'a mut Vec<String>),
    /// Empty text is none.
    Secret(&'a mut Secret),
    /// A list of tables.
    Tables(&'a mut dyn Tables),
}

/// Text that is never shown, nor logged.
#[derive(Clone, Default, PartialEq, Eq)]
pub struct Secret(String);

/// What keeps the channels.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Backend {
    /// In this process, for as long as it lives.
    Memory,
    /// In Redis, for all nodes that use it.
    Redis,
}

/// When a publish is answered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ack {
    /// When the master has it.
    Stored,
    /// When a replica has it as well.
    Replicated,
}

/// Somebody else's protocol that weir speaks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Adapter {
    MicroStream,
    Ganomede,
    NodeSse,
    Grip,
}

/// What is logged: a level, or levels by target as in `info,weir=debug`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Level(String);

/// How a line of the log looks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// Text on a terminal, JSON elsewhere.
    Auto,
    Text,
    Json,
}

// === impl Slot ===

impl Slot<'_> {
    /// Replaces the value, or says in a sentence why not. [`Slot::Tables`] are read by the loader.
    pub fn read(&mut self, value: &Value) -> Result<(), String> {
        let given = Given(value);
        match self {
            Slot::Flag(to) => **to = given.flag()?,
            Slot::Count(to) => **to = given.whole("a whole number")?,
            Slot::Size(to) => **to = given.size()?,
            Slot::Time(to) => {
                let time = duration::parse(&given.text("a duration as \"5s\"")?)?;
                if time.is_zero() {
                    return Err("must be longer than nothing".into());
                }
                **to = time;
            }
            Slot::Pause(to) => **to = duration::parse(&given.text("a duration as \"5s\"")?)?,
            Slot::Addresses(to) => {
                let list: Vec<_> = given.list()?.iter().map(|text| address(text)).collect::<Result<_, _>>()?;
                if list.is_empty() {
                    return Err("needs an address".into());
                }
                **to = list;
            }
            Slot::Address(to) => {
                let text = given.text("an address")?;
                **to = if text.is_empty() { None } else { Some(address(&text)?) };
            }
            Slot::Origins(to) => {
                let list = given.list()?;
                list.iter().try_for_each(|text| origin(text))?;
                **to = list;
            }
            Slot::Pattern(to) => {
                let text = given.text("a pattern")?;
                if text.is_empty() {
                    return Err("an empty pattern matches nothing; * matches every channel".into());
                }
                **to = text;
            }
            Slot::Backend(to) => match given.text("a name")?.as_str() {
                "memory" => **to = Backend::Memory,
                "redis" => **to = Backend::Redis,
                other => return Err(format!("{other:?} is no backend; there are: memory, redis")),
            },
            Slot::Ack(to) => match given.text("a name")?.as_str() {
                "stored" => **to = Ack::Stored,
                "replicated" => **to = Ack::Replicated,
                other => return Err(format!("{other:?} is no moment to answer; there are: stored, replicated")),
            },
            Slot::Adapters(to) => {
                let mut list = Vec::new();
                for name in given.list()? {
                    let adapter = Adapter::parse(&name)?;
                    if !list.contains(&adapter) {
                        list.push(adapter);
                    }
                }
                **to = list;
            }
            Slot::Level(to) => **to = Level::parse(&given.text("a level")?)?,
            Slot::Format(to) => match given.text("a name")?.as_str() {
                "auto" => **to = Format::Auto,
                "text" => **to = Format::Text,
                "json" => **to = Format::Json,
                other => return Err(format!("{other:?} is no format; there are: auto, text, json")),
            },
            Slot::Path(to) => {
                let text = given.text("a path")?;
                if !text.starts_with('/') || text.contains(['?', '#']) || text.contains(char::is_control) {
                    return Err(format!("{text:?} is not a path: write / or /api"));
                }
                **to = text;
            }
            Slot::Url(to) => **to = url(&given.text("a URL")?)?,
            Slot::Text(to) => **to = given.text("text")?,
            Slot::Texts(to) => **to = given.list()?,
            Slot::Secret(to) => **to = Secret::parse(given.text("text")?)?,
            Slot::Tables(to) => return Err(format!("needs a list of tables, as [{}]", to.example())),
        }
        Ok(())
    }
}

/// The value as TOML.
impl fmt::Display for Slot<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Slot::Flag(value) => write!(f, "{value}"),
            Slot::Count(value) => write!(f, "{value}"),
            Slot::Size(value) => write_size(**value, f),
            Slot::Time(value) | Slot::Pause(value) => write!(f, "\"{}\"", duration::format(**value)),
            Slot::Addresses(list) => write_list(list.iter().map(|address| address.to_string()), f),
            Slot::Address(None) => f.write_str("\"\""),
            Slot::Address(Some(address)) => write!(f, "\"{address}\""),
            Slot::Origins(list) | Slot::Texts(list) => write_list(list.iter().cloned(), f),
            Slot::Pattern(text) | Slot::Path(text) | Slot::Url(text) | Slot::Text(text) => f.write_str(&quoted(text)),
            Slot::Secret(secret) => f.write_str(if secret.is_empty() { "\"\"" } else { "\"********\"" }),
            Slot::Backend(Backend::Memory) => f.write_str("\"memory\""),
            Slot::Backend(Backend::Redis) => f.write_str("\"redis\""),
            Slot::Ack(Ack::Stored) => f.write_str("\"stored\""),
            Slot::Ack(Ack::Replicated) => f.write_str("\"replicated\""),
            Slot::Adapters(list) => write_list(list.iter().map(|adapter| adapter.as_str().to_owned()), f),
            Slot::Level(Level(text)) => f.write_str(&quoted(text)),
            Slot::Format(Format::Auto) => f.write_str("\"auto\""),
            Slot::Format(Format::Text) => f.write_str("\"text\""),
            Slot::Format(Format::Json) => f.write_str("\"json\""),
            // Those that are are shown as tables of their own.
            Slot::Tables(_) => f.write_str("[]"),
        }
    }
}

// === impl Given ===

/// A value as it was found. What comes from the environment is text, so text is read where a file would have a number.
struct Given<'a>(&'a Value);

impl Given<'_> {
    fn text(&self, wanted: &str) -> Result<String, String> {
        match self.0 {
            Value::String(_, text) => Ok(text.clone()),
            // The commonest mistake with durations gets its own answer.
            Value::Num(_, number) if wanted.starts_with("a duration") && number.to_f64().is_none() => {
                Ok(number.to_i128().map_or_else(|| "0".into(), |number| number.to_string()))
            }
            other => Err(format!("needs {wanted}, not {}", kind(other))),
        }
    }

    fn flag(&self) -> Result<bool, String> {
        match self.0 {
            Value::Bool(_, flag) => Ok(*flag),
            Value::String(_, text) => text.parse().map_err(|_| format!("needs true or false, not {text:?}")),
            other => Err(format!("needs true or false, not {}", kind(other))),
        }
    }

    fn whole(&self, wanted: &str) -> Result<usize, String> {
        let number = match self.0 {
            Value::String(_, text) => whole(text, wanted)?,
            Value::Num(_, number) => match (number.to_i128(), number.to_u128()) {
                (Some(number), _) => usize::try_from(number).map_err(|_| format!("needs {wanted}, not {number}"))?,
                (_, Some(number)) => usize::try_from(number).map_err(|_| format!("needs {wanted}, not {number}"))?,
                _ => return Err(format!("needs {wanted}, not a fraction")),
            },
            other => return Err(format!("needs {wanted}, not {}", kind(other))),
        };
        if number == 0 { Err("must be at least 1".into()) } else { Ok(number) }
    }

    fn size(&self) -> Result<usize, String> {
        const WANTED: &str = "a number of bytes, plain or as \"16MiB\"";
        let Value::String(_, text) = self.0 else { return self.whole(WANTED) };
        let split = text.find(|c: char| !c.is_ascii_digit() && c != '_').unwrap_or(text.len());
        let (number, unit) = text.split_at(split);
        let factor = match unit.trim_start() {
            "" | "B" => 1,
            "kB" | "KB" => 1_000,
            "MB" => 1_000_000,
            "GB" => 1_000_000_000,
            "KiB" => 1 << 10,
            "MiB" => 1 << 20,
            "GiB" => 1 << 30,
            _ => return Err(format!("needs {WANTED}, not {text:?}; the units are KiB, MiB, GiB, kB, MB and GB")),
        };
        match whole(number, WANTED).map_err(|_| format!("needs {WANTED}, not {text:?}"))? {
            0 => Err("must be at least 1".into()),
            number => number.checked_mul(factor).ok_or_else(|| format!("{text} is more than this machine can count")),
        }
    }

    /// A list, or text with commas between.
    fn list(&self) -> Result<Vec<String>, String> {
        match self.0 {
            Value::Array(_, items) => items.iter().map(|item| Given(item).text("a list of text")).collect(),
            _ => {
                let text = self.text("a list, or text with commas")?;
                Ok(text.split(',').map(str::trim).filter(|part| !part.is_empty()).map(str::to_owned).collect())
            }
        }
    }
}

fn whole(text: &str, wanted: &str) -> Result<usize, String> {
    text.replace('_', "").parse().map_err(|_| format!("needs {wanted}, not {text:?}"))
}

// === impl Adapter ===

impl Adapter {
    const ALL: [Adapter; 4] = [Adapter::MicroStream, Adapter::Ganomede, Adapter::NodeSse, Adapter::Grip];

    pub const fn as_str(self) -> &'static str {
        match self {
            Adapter::MicroStream => "microstream",
            Adapter::Ganomede => "ganomede",
            Adapter::NodeSse => "node-sse",
            Adapter::Grip => "grip",
        }
    }

    /// What it owns of the listeners for clients; `*` is whatever follows.
    pub(super) const fn paths(self) -> &'static [&'static str] {
        match self {
            Adapter::MicroStream => &["/socket.io/*"],
            Adapter::Ganomede => &["/events/v1/*", "/latest", "/about"],
            Adapter::NodeSse => &["/subscribe", "/publish", "/lastEvent"],
            Adapter::Grip => &["/grip/*"],
        }
    }

    fn parse(text: &str) -> Result<Self, String> {
        Self::ALL.into_iter().find(|adapter| adapter.as_str() == text).ok_or_else(|| {
            let names = Self::ALL.map(Adapter::as_str).join(", ");
            format!("{text:?} is no adapter; there are: {names}")
        })
    }
}

// === impl Secret ===

impl Secret {
    /// What is shown instead.
    const HIDDEN: &str = "********";

    fn parse(text: String) -> Result<Self, String> {
        match text == Self::HIDDEN {
            true => Err("is what weir shows instead of the secret".into()),
            false => Ok(Secret(text)),
        }
    }

    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// The secret itself. Whoever calls this does not print it.
    pub fn reveal(&self) -> &str {
        &self.0
    }
}

impl From<&str> for Secret {
    fn from(text: &str) -> Self {
        Secret(text.to_owned())
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(if self.is_empty() { "Secret()" } else { "Secret(…)" })
    }
}

// === impl Level ===

impl Level {
    pub(super) fn info() -> Self {
        Level("info".into())
    }

    fn parse(text: &str) -> Result<Self, String> {
        // Tracing itself takes `louder` for the name of a target, of which everything is wanted.
        const NAMES: [&str; 6] = ["error", "warn", "info", "debug", "trace", "off"];
        let known = |part: &str| NAMES.contains(&part.rsplit_once('=').map_or(part, |(_, level)| level));
        if text.split(',').all(known) && text.parse::<Targets>().is_ok() {
            return Ok(Level(text.to_owned()));
        }
        Err(format!(
            "{text:?} is no level: write one of {}, or by target as \"info,weir::rpc=debug\"",
            NAMES.join(", ")
        ))
    }

    /// What tracing filters by.
    pub fn targets(&self) -> Targets {
        // `parse` has tried it.
        self.0.parse().unwrap_or_default()
    }
}

// ===

fn address(text: &str) -> Result<SocketAddr, String> {
    // A name would have to be looked up, and could mean several; this one everybody writes.
    let numeric = match text.strip_prefix("localhost:") {
        Some(port) => format!("127.0.0.1:{port}"),
        None => text.to_owned(),
    };
    numeric.parse().map_err(|_| {
        format!("{text:?} is not an address with a port: write 127.0.0.1:8000, 0.0.0.0:8000 or [::1]:8000")
    })
}

fn origin(text: &str) -> Result<(), String> {
    if text == "*" {
        return Ok(());
    }
    // `null` is what sandboxed frames and local files send: whoever allows it allows every page.
    let host = text.strip_prefix("https://").or_else(|| text.strip_prefix("http://"));
    match host {
        Some(host)
            if !host.is_empty() && !host.contains(['/', '?', '#', '@', ' ']) && !host.contains(char::is_control) =>
        {
            Ok(())
        }
        _ => Err(format!(
            "{text:?} is not an origin: write https://example.com or https://*.example.com, without a path"
        )),
    }
}

fn url(text: &str) -> Result<String, String> {
    let wrong = || format!("{text:?} is not where a server is: write http://127.0.0.1:3000 or https://example.com");
    let bare = text.strip_suffix('/').unwrap_or(text);
    let (scheme, host) = bare.split_once("://").ok_or_else(wrong)?;
    let plain = |c: char| !matches!(c, '/' | '?' | '#' | '@' | '\\') && !c.is_whitespace() && !c.is_control();
    if !matches!(scheme, "http" | "https") || host.is_empty() || host.starts_with(':') || !host.chars().all(plain) {
        return Err(wrong());
    }
    Ok(bare.to_owned())
}

fn kind(value: &Value) -> &'static str {
    match value {
        Value::String(..) | Value::Char(..) => "text",
        Value::Num(_, number) if number.to_f64().is_some() => "a fraction",
        Value::Num(..) => "a number",
        Value::Bool(..) => "true or false",
        Value::Empty(..) => "nothing",
        Value::Dict(..) => "a table",
        Value::Array(..) => "a list",
    }
}

/// JSON's text is TOML's, but for DEL.
pub(super) fn quoted(text: &str) -> String {
    serde_json::Value::from(text).to_string().replace('\u{7f}', "\\u007f")
}

fn write_list(items: impl Iterator<Item = String>, f: &mut fmt::Formatter<'_>) -> fmt::Result {
    let items: Vec<_> = items.map(|item| quoted(&item)).collect();
    write!(f, "[{}]", items.join(", "))
}

fn write_size(bytes: usize, f: &mut fmt::Formatter<'_>) -> fmt::Result {
    let units = [("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10), ("GB", 1_000_000_000), ("MB", 1_000_000)];
    match units.into_iter().find(|(_, unit)| bytes.is_multiple_of(*unit)) {
        Some((name, unit)) => write!(f, "\"{}{name}\"", bytes / unit),
        None => write!(f, "{bytes}"),
    }
}
