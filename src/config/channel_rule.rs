//! [`ChannelRule`]: retention by channel name.

use std::time::Duration;

use super::section::{self, ConfigItem, MIB, Section, Setting, Slot, Table, seconds, section};

section! {
    /// Retention of a channel. The first limit reached trims the oldest events.
    Keep {
        /// Maximum number of events.
        count: usize as Count = 10_000,
        /// Maximum age of an event.
        age: Duration as Time = seconds(24 * 60 * 60),
        /// Maximum size of the encoded events.
        bytes: usize as Size = 16 * MIB,
    }
}

/// The retention of the channels whose name matches `pattern`.
#[derive(Clone, Debug, PartialEq)]
pub struct ChannelRule {
    /// `*` matches any run of characters; no other character is special. The key in files is `match`.
    pub pattern: String,
    pub keep: Keep,
}

impl Default for ChannelRule {
    fn default() -> Self {
        ChannelRule { pattern: "*".into(), keep: Keep::default() }
    }
}

impl Table for ChannelRule {
    const REQUIRED: &'static [(&'static str, &'static str)] = &[("match", "which channels is it for?")];
    const EXAMPLE: &'static str = "{ match = \"*\", keep = { count = 5 } }";
}

impl Section for ChannelRule {
    fn doc(&self) -> &'static str {
        "The retention of the channels whose name matches."
    }

    fn items<'a>(&'a mut self, at: &str, items: &mut Vec<ConfigItem<'a>>) {
        let slot = Slot::Pattern(&mut self.pattern);
        items.push(ConfigItem::Setting(Setting { key: section::join(at, "match"), doc: "".into(), slot }));
        self.keep.items(&section::join(at, "keep"), items);
    }
}
