//! One service: how discovery shows it, and the invariants of its tables.

use parking_lot::Mutex;
use serde::Serialize;
use utoipa::ToSchema;

use super::tables::{ServiceEntry, ServiceState};

/// A service that has a provider.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, ToSchema)]
#[schema(as = Service)]
pub struct ServiceInfo {
    pub service: String,
    pub providers: usize,
    pub in_flight: usize,
    pub exclusive: bool,
    /// The methods that the providers declared. Absent if none did.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub methods: Vec<String>,
}

impl ServiceEntry {
    pub(super) fn new(name: &str) -> Self {
        ServiceEntry { name: name.into(), state: Mutex::default(), registration: Default::default() }
    }

    /// None: it has no provider.
    pub(super) fn info(&self) -> Option<ServiceInfo> {
        let state = self.state.lock();
        let providers = state.providers.count();
        (providers > 0).then(|| ServiceInfo {
            service: self.name.to_string(),
            providers,
            in_flight: state.total_load(),
            exclusive: state.providers.is_exclusive(),
            methods: state.providers.methods(),
        })
    }
}

impl ServiceState {
    /// Whether nothing follows from a change: the case of nearly every call.
    #[inline]
    pub(super) fn is_settled(&self) -> bool {
        let is_ticking = self.marks.ticking || self.calls.entries.is_empty();
        is_ticking && !self.is_unused() && !self.effects.providers_changed && self.effects.is_empty()
    }

    #[inline]
    pub(super) fn is_unused(&self) -> bool {
        self.providers.all.is_empty() && self.calls.entries.is_empty() && self.registering == 0
    }
}

impl ServiceState {
    /// Panics unless what has to hold between two operations does.
    pub(super) fn assert_consistent(&self) {
        use super::tables::{CallPlace, NO_ENTRY, ProviderStage};
        let ServiceState { providers, calls, marks, .. } = self;
        let mut linked = 0;
        for (key, provider) in &providers.all {
            let (mut index, mut before, mut count) = (provider.head, NO_ENTRY, 0);
            while index != NO_ENTRY {
                let CallPlace::With { provider: has, previous, next } = calls.entries[index as usize].place else {
                    panic!("a provider's list has an entry that is elsewhere")
                };
                assert_eq!((has as usize, previous), (key, before));
                (before, index, count) = (index, next, count + 1);
            }
            assert_eq!(provider.in_flight, count);
            let remote = provider.remote.is_some();
            let bounded = provider.in_flight <= provider.concurrency || provider.concurrency < 3 || remote;
            assert!(bounded, "only an update lowers the concurrency");
            assert_eq!(provider.stage == ProviderStage::Active && !remote, providers.active.contains(&(key as u32)));
            assert_eq!(remote, providers.remote.contains(&(key as u32)));
            assert!(provider.stage != ProviderStage::Leaving || count > 0);
            linked += count as usize;
        }
        let leaving = providers.all.iter().filter(|(_, provider)| provider.stage == ProviderStage::Leaving).count();
        assert_eq!(providers.leaving, leaving);
        let waiting: Vec<_> = calls.entries.iter().filter(|(_, entry)| entry.is_waiting(entry.seq)).collect();
        assert_eq!((waiting.len(), waiting.len() + linked), (calls.waiting, calls.entries.len()));
        for (index, entry) in waiting {
            assert_eq!(calls.queue.iter().filter(|queued| **queued == (index as u32, entry.seq)).count(), 1);
        }
        assert!(calls.entries.iter().all(|(_, entry)| calls.earliest_due <= entry.due));
        assert!(marks.ticking || calls.entries.is_empty());
        assert!(!calls.flushing);
        assert!(self.effects.is_empty() && !self.effects.providers_changed);
        assert_eq!(marks.counted, providers.count_local() > 0);
        let exclusive = providers.local().filter(|(_, it)| it.fence.is_some()).count();
        assert!(exclusive == 0 || exclusive == 1 && providers.count_local() == 1);
        assert_eq!(self.exclusive, exclusive == 1 || self.exclusive && self.registering > 0);
        let holds = providers.count_local() > 0 || self.lease.is_some() && self.registering > 0;
        assert_eq!(self.lease.is_some(), holds);
    }
}
