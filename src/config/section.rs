//! The structure of a configuration: [`Section`]s of [`Setting`]s, each with a typed [`Slot`] for its value.

use std::{borrow::Cow, net::SocketAddr, time::Duration};

use super::value::{Ack, Backend, Level, LogFormat, Secret};

pub(crate) const KIB: usize = 1 << 10;
pub(crate) const MIB: usize = 1 << 20;

pub(crate) const fn seconds(n: u64) -> Duration {
    Duration::from_secs(n)
}

/// A section of the configuration.
pub trait Section {
    /// The description of the section in `config.toml`.
    fn doc(&self) -> &'static str;

    /// Appends the settings of this section, whose key is `at`, in the order in which they are printed.
    fn items<'a>(&'a mut self, at: &str, items: &mut Vec<ConfigItem<'a>>);
}

/// An element of the configuration, in the order in which it is printed.
pub enum ConfigItem<'a> {
    Section { key: String, doc: &'static str },
    Setting(Setting<'a>),
}

/// A key, its description, and the variable that holds its value.
pub struct Setting<'a> {
    pub key: String,
    pub doc: Cow<'static, str>,
    pub(crate) slot: Slot<'a>,
}

/// The variable of a setting, by the type of its values.
pub(crate) enum Slot<'a> {
    Flag(&'a mut bool),
    /// A number of things, at least one.
    Count(&'a mut usize),
    /// A number of bytes, at least one: `16MiB`, or plain.
    Size(&'a mut usize),
    /// A duration above zero.
    Time(&'a mut Duration),
    /// A duration that may be `0s`.
    Pause(&'a mut Duration),
    Addresses(&'a mut Vec<SocketAddr>),
    /// Empty text is `None`.
    Address(&'a mut Option<SocketAddr>),
    Origins(&'a mut Vec<String>),
    Pattern(&'a mut String),
    Backend(&'a mut Backend),
    Ack(&'a mut Ack),
    /// Names out of a list; repetitions are dropped.
    Adapters {
        enabled: &'a mut Vec<&'static str>,
        names: Vec<&'static str>,
    },
    Level(&'a mut Level),
    Format(&'a mut LogFormat),
    /// The path prefix of requests.
    Path(&'a mut String),
    /// The address of an HTTP server: scheme, host and port only.
    Url(&'a mut String),
    /// Any text; the section that owns it validates it.
    Text(&'a mut String),
    Texts(&'a mut Vec<String>),
    /// Empty text means that no secret is set.
    Secret(&'a mut Secret),
    Tables(&'a mut dyn Tables),
}

/// An element of an array of tables.
pub(crate) trait Table: Section + Clone + Default {
    /// The keys without a default, with the question that an error asks if they are missing.
    const REQUIRED: &'static [(&'static str, &'static str)];
    /// A table in one line, for error messages.
    const EXAMPLE: &'static str;
}

/// An array of tables of any type, for the loader and the printer.
pub(crate) trait Tables {
    fn clear(&mut self);
    /// Appends a table of defaults.
    fn add(&mut self);
    fn len(&self) -> usize;
    /// The items of table `n`.
    fn items<'a>(&'a mut self, n: usize, at: &str) -> Vec<ConfigItem<'a>>;
    fn required(&self) -> &'static [(&'static str, &'static str)];
    fn example(&self) -> &'static str;
}

/// Defines a section. A setting is `name: Type as Kind = default`; `Kind` is a variant of [`Slot`], or `Section` for a
/// subsection.
macro_rules! section {
    ($(#[doc = $about:literal])+ $section:ident { $($(#[doc = $doc:literal])* $name:ident: $type:ty as $kind:ident = $default:expr,)+ }) => {
        $(#[doc = $about])+
        #[derive(Clone, Debug, PartialEq)]
        pub struct $section { $($(#[doc = $doc])* pub $name: $type,)+ }

        impl Default for $section {
            fn default() -> Self {
                $section { $($name: $default,)+ }
            }
        }

        impl $crate::config::section::Section for $section {
            fn doc(&self) -> &'static str {
                concat!($($about, "\n"),+)
            }

            fn items<'a>(&'a mut self, at: &str, items: &mut Vec<$crate::config::section::ConfigItem<'a>>) {
                $($crate::config::section::section!(
                    @ $kind, self.$name, $crate::config::section::join(at, stringify!($name)), concat!($($doc, "\n"),*), items
                );)+
            }
        }
    };
    (@ Section, $self:ident.$field:ident, $key:expr, $doc:expr, $items:ident) => {
        $crate::config::section::add(&mut $self.$field, $key, $items)
    };
    (@ $kind:ident, $self:ident.$field:ident, $key:expr, $doc:expr, $items:ident) => {
        $items.push($crate::config::section::ConfigItem::Setting($crate::config::section::Setting {
            key: $key,
            doc: $doc.into(),
            slot: $crate::config::section::Slot::$kind(&mut $self.$field),
        }))
    };
}
pub(crate) use section;

/// Appends a subsection with its items.
pub(crate) fn add<'a>(section: &'a mut (impl Section + ?Sized), key: String, items: &mut Vec<ConfigItem<'a>>) {
    items.push(ConfigItem::Section { key: key.clone(), doc: section.doc() });
    section.items(&key, items);
}

/// The key of `name` in the section `at`; the root is `""`.
pub(crate) fn join(at: &str, name: &str) -> String {
    if at.is_empty() { name.to_owned() } else { format!("{at}.{name}") }
}

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

    fn items<'a>(&'a mut self, n: usize, at: &str) -> Vec<ConfigItem<'a>> {
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
