//! [`AdapterConfig`]: the settings of an adapter, and [`CompatSection`], the section of all adapters.

use std::{any::Any, fmt::Debug, net::SocketAddr};

use super::{
    channel_rule::ChannelRule,
    originals::OriginalVariables,
    section::{self, ConfigItem, Section, Setting, Slot},
};

/// The settings of an adapter (the section `compat.NAME`), and what follows from them for the rest of the
/// configuration.
pub trait AdapterConfig: Section + AdapterObject {
    /// The adapter's name in `compat.enable`, and the key of its section.
    fn name(&self) -> &'static str;

    /// For an adapter that is not in `compat.enable`: whether its settings enable it.
    fn enables_itself(&self) -> Option<bool> {
        None
    }

    /// The paths of the main listeners that the adapter owns; a `*` at the end matches the rest of a path.
    fn paths(&self) -> &'static [&'static str] {
        &[]
    }

    /// The addresses of the adapter's own listeners, with their keys.
    fn listeners(&self) -> Vec<(&'static str, SocketAddr)> {
        Vec::new()
    }

    /// Retention of the channels in which the adapter stores its own data.
    fn channels(&self) -> Vec<ChannelRule> {
        Vec::new()
    }

    /// Translates environment variables of the original.
    fn read_original(&self, _variables: &mut OriginalVariables<'_>) {}

    /// Errors that involve more than one setting, as pairs of key and reason.
    fn contradictions(&self, _context: &AdapterContext) -> Vec<(&'static str, String)> {
        Vec::new()
    }
}

/// The rest of the configuration, for [`AdapterConfig::contradictions`].
pub struct AdapterContext {
    pub enabled: bool,
    /// `auth.allow_anonymous`.
    pub allow_anonymous: bool,
    /// The paths of weir and of all enabled adapters, with their owners.
    pub paths: Vec<(&'static str, &'static str)>,
}

/// Cloning and comparison of `dyn AdapterConfig`.
pub trait AdapterObject: Any + Debug + Send + Sync {
    fn boxed(&self) -> Box<dyn AdapterConfig>;
    fn is_equal(&self, other: &dyn AdapterConfig) -> bool;
}

impl<T: AdapterConfig + Clone + PartialEq + Debug + Send + Sync> AdapterObject for T {
    fn boxed(&self) -> Box<dyn AdapterConfig> {
        Box::new(self.clone())
    }

    fn is_equal(&self, other: &dyn AdapterConfig) -> bool {
        (other as &dyn Any).downcast_ref() == Some(self)
    }
}

/// The section `compat`: which adapters are enabled, and their settings.
#[derive(Debug, Default)]
pub struct CompatSection {
    pub enable: Vec<&'static str>,
    adapters: Vec<Box<dyn AdapterConfig>>,
}

impl CompatSection {
    /// The defaults of these adapters; none is enabled.
    pub fn new(adapters: impl IntoIterator<Item = Box<dyn AdapterConfig>>) -> Self {
        CompatSection { enable: Vec::new(), adapters: adapters.into_iter().collect() }
    }

    /// The names that `compat.enable` may contain.
    pub(crate) fn names(&self) -> Vec<&'static str> {
        let named = self.adapters.iter().filter(|adapter| adapter.enables_itself().is_none());
        named.map(|adapter| adapter.name()).collect()
    }

    pub(crate) fn enabled(&self) -> impl Iterator<Item = &dyn AdapterConfig> {
        self.adapters.iter().map(|adapter| &**adapter).filter(|adapter| self.is_enabled(*adapter))
    }

    /// The settings of an adapter, by their type: its defaults in a configuration that does not know the adapter.
    pub fn get<T: AdapterConfig + Clone + Default>(&self) -> T {
        let all = self.adapters.iter().map(|adapter| &**adapter as &dyn Any);
        all.filter_map(|adapter| adapter.downcast_ref::<T>()).next().cloned().unwrap_or_default()
    }

    /// As [`get`](Self::get), to change them.
    pub fn get_mut<T: AdapterConfig>(&mut self) -> Option<&mut T> {
        self.adapters.iter_mut().find_map(|adapter| (&mut **adapter as &mut dyn Any).downcast_mut())
    }

    pub(super) fn contradictions(&self, allow_anonymous: bool) -> Vec<(&'static str, String)> {
        const OWN: [&str; 6] = ["/", "/v1/*", "/health/*", "/metrics", "/openapi.json", "/console/*"];
        let mut paths: Vec<_> = OWN.map(|path| (path, "weir's")).into();
        for adapter in self.enabled() {
            paths.extend(adapter.paths().iter().map(|path| (*path, adapter.name())));
        }
        let mut context = AdapterContext { enabled: false, allow_anonymous, paths };
        let mut found = Vec::new();
        for adapter in &self.adapters {
            context.enabled = self.is_enabled(&**adapter);
            found.extend(adapter.contradictions(&context));
        }
        found
    }

    fn is_enabled(&self, adapter: &dyn AdapterConfig) -> bool {
        adapter.enables_itself().unwrap_or_else(|| self.enable.contains(&adapter.name()))
    }
}

impl Clone for CompatSection {
    fn clone(&self) -> Self {
        let adapters = self.adapters.iter().map(|adapter| (**adapter).boxed()).collect();
        CompatSection { enable: self.enable.clone(), adapters }
    }
}

impl PartialEq for CompatSection {
    fn eq(&self, other: &Self) -> bool {
        self.enable == other.enable
            && self.adapters.len() == other.adapters.len()
            && self.adapters.iter().zip(&other.adapters).all(|(one, other)| one.is_equal(&**other))
    }
}

impl Section for CompatSection {
    fn doc(&self) -> &'static str {
        "Adapters for unmodified clients of other systems. Each adapter serves one other protocol on the same channels\n\
         and services."
    }

    fn items<'a>(&'a mut self, at: &str, items: &mut Vec<ConfigItem<'a>>) {
        let names = self.names();
        let doc = format!("Enabled adapters: any of {}. A disabled adapter uses no resources.", names.join(", "));
        let slot = Slot::Adapters { enabled: &mut self.enable, names };
        items.push(ConfigItem::Setting(Setting { key: section::join(at, "enable"), doc: doc.into(), slot }));
        for adapter in &mut self.adapters {
            let (key, before) = (section::join(at, adapter.name()), items.len());
            section::add(&mut **adapter, key, items);
            // An adapter without settings has no section.
            items.truncate(if items.len() == before + 1 { before } else { items.len() });
        }
    }
}
