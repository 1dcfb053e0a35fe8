//! Providers of a service: how one is registered, withdrawn and removed.

use std::sync::Arc;

use super::{
    peer::MethodNames,
    tables::{CallPlace, NO_ENTRY, PeerState, Provider, ProviderStage, ProviderTable, RemovedProvider, ServiceState},
};
use crate::{
    cluster::{Claim, Lease},
    error::{Code, Error, Result},
};

/// The registration of a provider, as a transport requests it.
#[derive(Clone, Copy, Debug)]
pub struct ProvideRequest<'a> {
    pub service: &'a str,
    /// Subject of the provider, from its permit.
    pub subject: &'a str,
    /// No other connection may provide the service.
    pub exclusive: bool,
    /// Replaces an exclusive provider of the same subject.
    pub takeover: bool,
    /// [Probes](super::Peer::probe) an exclusive provider, on whatever node it is, and is rejected only if that is alive.
    pub probe: bool,
    /// Calls in flight that the provider takes, at least 1.
    pub concurrency: u32,
    pub names: MethodNames,
    /// Calls carry [`CallMeta`](super::CallMeta), and the provider is notified when a caller abandons one.
    pub meta: bool,
    /// For [`Hub::services`](super::Hub::services); the hub rejects no method.
    pub methods: &'a [&'a str],
}

impl<'a> ProvideRequest<'a> {
    /// A shared registration with the documented defaults.
    pub fn new(service: &'a str) -> Self {
        ProvideRequest {
            service,
            subject: "",
            exclusive: false,
            takeover: false,
            probe: false,
            concurrency: 1_000,
            names: MethodNames::Short,
            meta: false,
            methods: &[],
        }
    }
}

impl Provider {
    pub(super) fn new(conn: Arc<PeerState>, slot: u32) -> Self {
        Provider {
            conn,
            slot,
            remote: None,
            subject: "".into(),
            stage: ProviderStage::Starting,
            concurrency: 1,
            in_flight: 0,
            names: MethodNames::Qualified,
            meta: true,
            fence: None,
            methods: Box::default(),
            head: NO_ENTRY,
        }
    }
}

// === impl ProviderTable ===

impl ProviderTable {
    /// Providers on all nodes, without those that are leaving.
    pub(super) fn count(&self) -> usize {
        let remote = self.remote.iter().map(|key| &self.all[*key as usize]);
        self.count_local() + remote.filter(|it| it.stage != ProviderStage::Leaving).map(Provider::count).sum::<usize>()
    }

    /// Providers on this node, without those that are leaving.
    pub(super) fn count_local(&self) -> usize {
        match self.remote.is_empty() {
            true => self.all.len() - self.leaving,
            false => self.local().count(),
        }
    }

    /// Providers on this node with their keys, without those that are leaving.
    pub(super) fn local(&self) -> impl Iterator<Item = (u32, &Provider)> {
        let local = self.all.iter().filter(|(_, it)| it.remote.is_none() && it.stage != ProviderStage::Leaving);
        local.map(|(key, provider)| (key as u32, provider))
    }

    /// A provider on this node other than `own`.
    pub(super) fn other(&self, own: Option<u32>) -> Option<(u32, &Provider)> {
        self.local().find(|(key, _)| own != Some(*key))
    }

    /// The connection of the exclusive provider on this node, unless that is `own`.
    pub(super) fn exclusive_holder(&self, own: Option<u32>) -> Option<Arc<PeerState>> {
        let (_, other) = self.other(own)?;
        other.fence.is_some().then(|| other.conn.clone())
    }

    /// The exclusive provider on this node, if `subject` may take over from it.
    pub(super) fn yields_to(&self, subject: &str) -> Option<u32> {
        let (key, provider) = self.other(None)?;
        (provider.fence.is_some() && *provider.subject == *subject).then_some(key)
    }

    pub(super) fn is_exclusive(&self) -> bool {
        self.all.iter().any(|(_, provider)| provider.stage != ProviderStage::Leaving && provider.fence.is_some())
    }

    /// Methods that the providers declare, sorted.
    pub(super) fn methods(&self) -> Vec<String> {
        let present = self.all.iter().filter(|(_, provider)| provider.stage != ProviderStage::Leaving);
        sorted_methods(present.map(|(_, provider)| provider))
    }

    /// Whether `key` is a provider of that connection: keys are reused.
    pub(super) fn is_of(&self, key: u32, conn: &Arc<PeerState>) -> bool {
        self.all.get(key as usize).is_some_and(|provider| Arc::ptr_eq(&provider.conn, conn))
    }
}

pub(super) fn sorted_methods<'a>(providers: impl Iterator<Item = &'a Provider>) -> Vec<String> {
    let mut methods: Vec<String> =
        providers.flat_map(|it| it.methods.iter().map(|method| method.to_string())).collect();
    methods.sort();
    methods.dedup();
    methods
}

// === impl ServiceState: providers ===

impl ServiceState {
    /// The claim that the cluster has to grant before a connection may register; `own` is its key if it is registered.
    ///
    /// # Errors
    /// `service_taken`, by another connection of this node.
    pub(super) fn required_claim(
        &self,
        name: &str,
        own: Option<u32>,
        request: &ProvideRequest<'_>,
    ) -> Result<Option<Claim>> {
        if let Some((_, other)) = self.providers.other(own) {
            match (request.exclusive, other.fence.is_some()) {
                (false, false) => {}
                (true, true) if request.takeover && *other.subject == *request.subject => {}
                (_, true) => return Err(taken(format!("{name} is provided exclusively by another connection"))),
                (true, false) => return Err(taken(format!("{name} has other providers and cannot be exclusive"))),
            }
        }
        let own = own.and_then(|key| self.providers.all.get(key as usize));
        let is_exclusive = own.is_some_and(|own| own.fence.is_some() && own.stage != ProviderStage::Leaving);
        let held = self.lease.as_ref().filter(|lease| !lease.is_lost()).map(Lease::claim);
        Ok(match request.exclusive {
            true => (!is_exclusive || held != Some(Claim::Exclusive)).then_some(Claim::Exclusive),
            false => (held != Some(Claim::Shared)).then_some(Claim::Shared),
        })
    }

    /// Registers `conn`, or updates its registration where `own` is its key, which is returned. `lease`: what was
    /// [required](Self::required_claim).
    ///
    /// # Errors
    /// `service_taken`, if the providers have changed since.
    pub(super) fn provide(
        &mut self,
        name: &str,
        conn: &Arc<PeerState>,
        own: Option<u32>,
        slot: u32,
        request: &ProvideRequest<'_>,
        lease: Option<Lease>,
    ) -> Result<u32> {
        if self.required_claim(name, own, request)? != lease.as_ref().map(Lease::claim) {
            return Err(taken(format!("the providers of {name} have just changed")));
        }
        let replaced = self.providers.other(own).filter(|_| request.exclusive).map(|(key, _)| key);
        if let Some(key) = replaced {
            self.marks.replaced = true;
            self.remove(key, Some("replaced"));
        }
        let providers = &mut self.providers;
        let fence = match &lease {
            Some(lease) => lease.fence(),
            None => own.and_then(|key| providers.all[key as usize].fence).filter(|_| request.exclusive),
        };
        if lease.is_some() {
            self.exclusive = request.exclusive;
            self.lease = lease;
        }
        let key = own.unwrap_or_else(|| providers.all.insert(Provider::new(conn.clone(), slot)) as u32);
        let provider = &mut providers.all[key as usize];
        if provider.stage == ProviderStage::Leaving {
            provider.stage = ProviderStage::Starting;
            providers.leaving -= 1;
        }
        provider.subject = request.subject.into();
        provider.concurrency = request.concurrency;
        provider.names = request.names;
        provider.meta = request.meta;
        provider.fence = fence;
        provider.methods = request.methods.iter().map(|method| Box::from(*method)).collect();
        self.effects.providers_changed = true;
        Ok(key)
    }

    /// Lets `key` take calls, if it is still that connection's.
    pub(super) fn start(&mut self, key: u32, conn: &Arc<PeerState>) {
        if let Some(provider) = self.providers.all.get_mut(key as usize)
            && Arc::ptr_eq(&provider.conn, conn)
            && provider.stage == ProviderStage::Starting
        {
            provider.stage = ProviderStage::Active;
            self.providers.active.push(key);
            self.effects.providers_changed = true;
        }
        self.effects.capacity_freed = true;
    }

    /// Ends the registration of `key`: no new calls. Returns how many calls it still has.
    pub(super) fn withdraw(&mut self, key: u32) -> u32 {
        let provider = &mut self.providers.all[key as usize];
        if std::mem::replace(&mut provider.stage, ProviderStage::Leaving) != ProviderStage::Leaving {
            self.providers.leaving += 1;
        }
        let in_flight = provider.in_flight;
        self.providers.active.retain(|active| *active != key);
        self.effects.providers_changed = true;
        self.close_if_done(key);
        in_flight
    }

    /// Removes a provider and fails its calls. `reason`: why, if the provider did not ask for it.
    pub(super) fn remove(&mut self, key: u32, reason: Option<&'static str>) {
        let providers = &mut self.providers;
        providers.active.retain(|active| *active != key);
        providers.remote.retain(|remote| *remote != key);
        let provider = providers.all.remove(key as usize);
        providers.leaving -= usize::from(provider.stage == ProviderStage::Leaving);
        let mut orphans = Vec::with_capacity(provider.in_flight as usize);
        let mut index = provider.head;
        while index != NO_ENTRY {
            let entry = self.calls.entries.remove(index as usize);
            index = match entry.place {
                CallPlace::With { next, .. } => next,
                CallPlace::Waiting(_) | CallPlace::Nowhere => NO_ENTRY,
            };
            orphans.extend(entry.finished());
        }
        self.effects.providers_changed = true;
        let (conn, slot) = (provider.conn, provider.slot);
        self.effects.removed.push(RemovedProvider { conn, slot, orphans, reason });
    }

    /// Removes `key` if it is still that connection's, which is closed.
    pub(super) fn remove_conn(&mut self, key: u32, conn: &Arc<PeerState>) {
        if self.providers.is_of(key, conn) {
            self.remove(key, None);
        }
    }

    /// Removes a withdrawn provider that has no calls left.
    pub(super) fn close_if_done(&mut self, key: u32) {
        let provider = &self.providers.all[key as usize];
        if provider.stage == ProviderStage::Leaving && provider.in_flight == 0 {
            let Provider { conn, slot, .. } = self.providers.all.remove(key as usize);
            self.providers.remote.retain(|remote| *remote != key);
            self.providers.leaving -= 1;
            self.effects.removed.push(RemovedProvider { conn, slot, orphans: Vec::new(), reason: None });
        }
    }
}

fn taken(detail: String) -> Error {
    Error::new(Code::ServiceTaken, detail)
}
