//! A configuration as a file.

use std::{collections::BTreeMap, fmt::Write as _};

use super::{
    load::Source,
    section::{ConfigItem, Section as _, Setting, Slot, Tables},
    sections::Config,
};

impl Config {
    /// Formats the configuration as TOML that [`load`](super::load::load) can read. `explained` adds the description of
    /// each key as a comment; a key that is in `sources` gets its source as a comment.
    pub fn to_toml(&self, explained: bool, sources: &BTreeMap<String, Source>) -> String {
        let mut out = String::new();
        let mut config = self.clone();
        let mut items = Vec::new();
        config.items("", &mut items);
        for item in items {
            match item {
                ConfigItem::Section { key, doc } => {
                    out.push('\n');
                    if explained {
                        comment(doc, &mut out);
                    }
                    let _ = writeln!(out, "[{key}]");
                }
                // It must precede all sections: below a section header the key would belong to that section.
                ConfigItem::Setting(Setting { key, slot: Slot::Tables(list), .. })
                    if list.len() == 0 && !key.contains('.') =>
                {
                    out.insert_str(0, &format!("{key} = []\n"));
                }
                ConfigItem::Setting(Setting { key, doc, slot: Slot::Tables(list) }) if list.len() > 0 => {
                    out.push('\n');
                    if explained {
                        comment(&doc, &mut out);
                    }
                    write_tables(&key, list, sources.get(&key), &mut out);
                }
                ConfigItem::Setting(Setting { key, doc, slot }) => {
                    if explained {
                        comment(&doc, &mut out);
                    }
                    let name = key.rsplit('.').next().unwrap_or(&key);
                    let _ = write!(out, "{name} = {slot}");
                    if let Some(source) = sources.get(&key) {
                        let _ = write!(out, "  # {source}");
                    }
                    out.push('\n');
                }
            }
        }
        out.trim_start().to_owned()
    }
}

/// Writes an array of tables. It must follow all other settings of its section: a key after a table would belong to the
/// table.
fn write_tables(key: &str, list: &mut dyn Tables, source: Option<&Source>, out: &mut String) {
    if let Some(source) = source {
        let _ = writeln!(out, "# {source}");
    }
    for n in 0..list.len() {
        let _ = writeln!(out, "{}[[{key}]]", if n == 0 { "" } else { "\n" });
        for item in list.items(n, "") {
            if let ConfigItem::Setting(Setting { key, slot, .. }) = item {
                let _ = writeln!(out, "{key} = {slot}");
            }
        }
    }
}

fn comment(doc: &str, out: &mut String) {
    for line in doc.lines().map(str::trim).filter(|line| !line.is_empty()) {
        let _ = writeln!(out, "# {line}");
    }
}
