//! Reading the value of a [`Slot`] from a file or from text, and writing it as TOML.

use std::{fmt, net::SocketAddr};

use figment::value::Value;

use super::{
    section::Slot,
    value::{Ack, Backend, Level, LogFormat, Secret},
};
use crate::duration;

const BACKENDS: [(&str, Backend); 2] = [("memory", Backend::Memory), ("redis", Backend::Redis)];
const ACKS: [(&str, Ack); 2] = [("stored", Ack::Stored), ("replicated", Ack::Replicated)];
const FORMATS: [(&str, LogFormat); 3] =
    [("auto", LogFormat::Auto), ("text", LogFormat::Text), ("json", LogFormat::Json)];

// === impl Slot ===

impl Slot<'_> {
    /// Replaces the value. The error is a sentence without its subject, the key. The loader reads [`Slot::Tables`].
    pub(super) fn read(&mut self, value: &Value) -> Result<(), String> {
        let input = Input(value);
        match self {
            Slot::Flag(to) => **to = input.flag()?,
            Slot::Count(to) => **to = input.whole("a whole number")?,
            Slot::Size(to) => **to = input.size()?,
            Slot::Time(to) => {
                let time = duration::parse(&input.text("a duration as \"5s\"")?)?;
                if time.is_zero() {
                    return Err("must be longer than 0s".into());
                }
                **to = time;
            }
            Slot::Pause(to) => **to = duration::parse(&input.text("a duration as \"5s\"")?)?,
            Slot::Addresses(to) => {
                let list: Vec<_> = input.list()?.iter().map(|text| address(text)).collect::<Result<_, _>>()?;
                if list.is_empty() {
                    return Err("needs an address".into());
                }
                **to = list;
            }
            Slot::Address(to) => {
                let text = input.text("an address")?;
                **to = if text.is_empty() { None } else { Some(address(&text)?) };
            }
            Slot::Origins(to) => {
                let list = input.list()?;
                list.iter().try_for_each(|text| origin(text))?;
                **to = list;
            }
            Slot::Pattern(to) => {
                let text = input.text("a pattern")?;
                if text.is_empty() {
                    return Err("an empty pattern matches nothing; * matches every channel".into());
                }
                **to = text;
            }
            Slot::Backend(to) => **to = choice("a backend", &input.text("a name")?, &BACKENDS)?,
            Slot::Ack(to) => **to = choice("an acknowledgement", &input.text("a name")?, &ACKS)?,
            Slot::Adapters { enabled, names } => {
                let names: Vec<_> = names.iter().map(|name| (*name, *name)).collect();
                let mut list = Vec::new();
                for text in input.list()? {
                    let name = choice("an adapter", &text, &names)?;
                    if !list.contains(&name) {
                        list.push(name);
                    }
                }
                **enabled = list;
            }
            Slot::Level(to) => **to = Level::parse(&input.text("a level")?)?,
            Slot::Format(to) => **to = choice("a format", &input.text("a name")?, &FORMATS)?,
            Slot::Path(to) => {
                let text = input.text("a path")?;
                if !text.starts_with('/') || text.contains(['?', '#']) || text.contains(char::is_control) {
                    return Err(format!("{text:?} is not a path: write / or /api"));
                }
                **to = text;
            }
            Slot::Url(to) => **to = url(&input.text("a URL")?)?,
            Slot::Text(to) => **to = input.text("text")?,
            Slot::Texts(to) => **to = input.list()?,
            Slot::Secret(to) => **to = Secret::parse(input.text("text")?)?,
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
            Slot::Backend(backend) => f.write_str(&quoted(name_of(**backend, &BACKENDS))),
            Slot::Ack(ack) => f.write_str(&quoted(name_of(**ack, &ACKS))),
            Slot::Adapters { enabled, .. } => write_list(enabled.iter().map(|name| (*name).to_owned()), f),
            Slot::Level(level) => f.write_str(&quoted(level.as_str())),
            Slot::Format(format) => f.write_str(&quoted(name_of(**format, &FORMATS))),
            // Lists that are not empty are printed as tables of their own.
            Slot::Tables(_) => f.write_str("[]"),
        }
    }
}

// === impl Input ===

/// A value from any source. Values from the environment are text, so text is accepted in place of numbers.
struct Input<'a>(&'a Value);

impl Input<'_> {
    fn text(&self, expected: &str) -> Result<String, String> {
        match self.0 {
            Value::String(_, text) => Ok(text.clone()),
            // A number without a unit is the most common mistake: the parser of durations explains it.
            Value::Num(_, number) if expected.starts_with("a duration") && number.to_f64().is_none() => {
                Ok(number.to_i128().map_or_else(|| "0".into(), |number| number.to_string()))
            }
            other => Err(format!("needs {expected}, not {}", kind(other))),
        }
    }

    fn flag(&self) -> Result<bool, String> {
        match self.0 {
            Value::Bool(_, flag) => Ok(*flag),
            Value::String(_, text) => text.parse().map_err(|_| format!("needs true or false, not {text:?}")),
            other => Err(format!("needs true or false, not {}", kind(other))),
        }
    }

    fn whole(&self, expected: &str) -> Result<usize, String> {
        let number = match self.0 {
            Value::String(_, text) => whole(text, expected)?,
            Value::Num(_, number) => match (number.to_i128(), number.to_u128()) {
                (Some(number), _) => usize::try_from(number).map_err(|_| format!("needs {expected}, not {number}"))?,
                (_, Some(number)) => usize::try_from(number).map_err(|_| format!("needs {expected}, not {number}"))?,
                _ => return Err(format!("needs {expected}, not a fraction")),
            },
            other => return Err(format!("needs {expected}, not {}", kind(other))),
        };
        if number == 0 { Err("must be at least 1".into()) } else { Ok(number) }
    }

    fn size(&self) -> Result<usize, String> {
        const EXPECTED: &str = "a number of bytes, plain or as \"16MiB\"";
        let Value::String(_, text) = self.0 else { return self.whole(EXPECTED) };
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
            _ => return Err(format!("needs {EXPECTED}, not {text:?}; the units are KiB, MiB, GiB, kB, MB and GB")),
        };
        match whole(number, EXPECTED).map_err(|_| format!("needs {EXPECTED}, not {text:?}"))? {
            0 => Err("must be at least 1".into()),
            number => number.checked_mul(factor).ok_or_else(|| format!("{text} is more than this machine can count")),
        }
    }

    /// A list, or text separated by commas.
    fn list(&self) -> Result<Vec<String>, String> {
        match self.0 {
            Value::Array(_, items) => items.iter().map(|item| Input(item).text("a list of text")).collect(),
            _ => {
                let text = self.text("a list, or text with commas")?;
                Ok(text.split(',').map(str::trim).filter(|part| !part.is_empty()).map(str::to_owned).collect())
            }
        }
    }
}

fn whole(text: &str, expected: &str) -> Result<usize, String> {
    text.replace('_', "").parse().map_err(|_| format!("needs {expected}, not {text:?}"))
}

// ===

fn choice<T: Copy>(kind: &str, text: &str, values: &[(&str, T)]) -> Result<T, String> {
    values.iter().find(|(name, _)| *name == text).map(|(_, value)| *value).ok_or_else(|| {
        let names: Vec<_> = values.iter().map(|(name, _)| *name).collect();
        format!("{text:?} is not {kind}; use one of: {}", names.join(", "))
    })
}

fn name_of<T: PartialEq>(value: T, values: &'static [(&str, T)]) -> &'static str {
    values.iter().find(|(_, known)| *known == value).map_or("", |(name, _)| *name)
}

fn address(text: &str) -> Result<SocketAddr, String> {
    // Other names would have to be resolved, and can have several addresses.
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
    // `null` is the origin of every sandboxed frame and local file: to allow it is to allow every page.
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

/// A TOML string: JSON's, except for DEL.
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
