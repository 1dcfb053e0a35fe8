//! Providers on other nodes: each node counts as one provider, with the sum of what its providers take.

use std::sync::Arc;

use bytes::Bytes;
use serde::{Deserialize, Serialize};

use super::{
    provider::sorted_methods,
    tables::{PeerState, Provider, ProviderStage, ProviderTable, RemoteProvider, ServiceState},
};
use crate::cluster::{Lease, NodeId};

/// The providers of a service on one node, as the other nodes learn of them: JSON, so that members may be added.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Advertisement {
    pub(super) providers: u32,
    /// Calls that they take together.
    pub(super) concurrency: u32,
    /// Fencing token of an exclusive provider.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) fence: Option<u64>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub(super) methods: Vec<String>,
}

/// How long a node's report of its load counts, in milliseconds: a node that was full once must be tried again.
const LOAD_VALIDITY: u64 = 1_000;

impl Provider {
    /// How many providers this one stands for.
    pub(super) fn count(&self) -> usize {
        self.remote.as_ref().map_or(1, |remote| remote.providers as usize)
    }

    /// Calls that it has, as far as is known.
    pub(super) fn load(&self, now: u64) -> u32 {
        let other_calls =
            self.remote.as_ref().map_or(0, |remote| if now < remote.valid_until { remote.other_calls } else { 0 });
        self.in_flight.saturating_add(other_calls)
    }
}

impl ProviderTable {
    /// The key of the node at the other end of `conn`.
    pub(super) fn find_remote(&self, conn: &Arc<PeerState>) -> Option<u32> {
        self.remote.iter().copied().find(|key| self.is_of(*key, conn))
    }

    /// Records the load that a node reports, calls of this node included.
    pub(super) fn record_load(&mut self, conn: &Arc<PeerState>, load: u32, now: u64) {
        let Some(key) = self.find_remote(conn) else { return };
        let provider = &mut self.all[key as usize];
        if let Some(remote) = &mut provider.remote {
            (remote.other_calls, remote.valid_until) = (load.saturating_sub(provider.in_flight), now + LOAD_VALIDITY);
        }
    }

    /// Records that a node takes no more calls for now.
    pub(super) fn record_full(&mut self, conn: &Arc<PeerState>, now: u64) {
        let Some(key) = self.find_remote(conn) else { return };
        let full = self.all[key as usize].concurrency;
        self.record_load(conn, full.saturating_add(1), now);
    }

    pub(super) fn keys_of(&self, nodes: &[NodeId]) -> Vec<u32> {
        let is_one = |key: &u32| self.all[*key as usize].conn.node.is_some_and(|node| nodes.contains(&node));
        self.remote.iter().copied().filter(is_one).collect()
    }

    /// Revision of the advertisement of `key`; 0 of a provider of this node.
    pub(super) fn rev(&self, key: u32) -> u64 {
        self.all.get(key as usize).and_then(|provider| provider.remote.as_ref()).map_or(0, |remote| remote.rev)
    }

    /// Whether `key` is that connection's and has calls of this node.
    pub(super) fn has_calls(&self, key: u32, conn: &Arc<PeerState>) -> bool {
        self.is_of(key, conn) && self.all.get(key as usize).is_some_and(|provider| provider.in_flight > 0)
    }

    fn advertisement(&self) -> Advertisement {
        let active = || self.active.iter().map(|key| &self.all[*key as usize]);
        Advertisement {
            providers: self.active.len() as u32,
            concurrency: active().fold(0, |sum, provider| sum.saturating_add(provider.concurrency)),
            fence: active().filter_map(|provider| provider.fence).max(),
            methods: sorted_methods(active()),
        }
    }
}

impl ServiceState {
    /// Another node advertises the service. A key: it is new, and has to be entered at `slot` of what `conn` provides.
    pub(super) fn set_remote(
        &mut self,
        conn: &Arc<PeerState>,
        slot: u32,
        rev: u64,
        info: &Advertisement,
    ) -> Option<u32> {
        let providers = &mut self.providers;
        let known = providers.find_remote(conn);
        let key = known.unwrap_or_else(|| providers.all.insert(Provider::new(conn.clone(), slot)) as u32);
        if known.is_none() {
            providers.remote.push(key);
        }
        let provider = &mut providers.all[key as usize];
        providers.leaving -= usize::from(provider.stage == ProviderStage::Leaving);
        provider.stage = ProviderStage::Active;
        provider.concurrency = info.concurrency.max(1);
        provider.fence = info.fence;
        provider.methods = info.methods.iter().map(|method| Box::from(method.as_str())).collect();
        provider.remote = Some(RemoteProvider { providers: info.providers, rev, other_calls: 0, valid_until: 0 });
        (self.effects.providers_changed, self.effects.capacity_freed) = (true, true);
        known.is_none().then_some(key)
    }

    /// Another node no longer advertises the service. `rev`: unless it has advertised it anew since then.
    pub(super) fn unset_remote(&mut self, conn: &Arc<PeerState>, rev: Option<u64>) {
        let Some(key) = self.providers.find_remote(conn) else { return };
        let is_newer = rev.is_some_and(|rev| self.providers.rev(key) != rev);
        if self.providers.all[key as usize].stage == ProviderStage::Active && !is_newer {
            self.withdraw(key);
        }
    }

    /// Calls with providers of this node.
    pub(super) fn local_load(&self) -> usize {
        let ProviderTable { all, remote, .. } = &self.providers;
        let elsewhere: u32 = remote.iter().map(|key| all[*key as usize].in_flight).sum();
        self.calls.in_flight() - elsewhere as usize
    }

    /// Calls with providers of all nodes, as far as is known.
    pub(super) fn total_load(&self) -> usize {
        let ProviderTable { all, remote, .. } = &self.providers;
        let others = |key: &u32| all[*key as usize].remote.as_ref().map_or(0, |remote| remote.other_calls as usize);
        self.calls.in_flight() + remote.iter().map(others).sum::<usize>()
    }

    /// Advertises the providers of this node, or releases the name if it has none.
    pub(super) fn advertise_or_release(&mut self) {
        if self.providers.count_local() == 0 && self.registering == 0 {
            (self.lease, self.exclusive) = (None, false);
        } else if let Some(lease) = self.lease.as_ref().filter(|lease| !lease.is_single_node()) {
            let info = self.providers.advertisement();
            // A provider that is only starting takes no calls yet.
            lease
                .set_info((info.providers > 0).then(|| serde_json::to_vec(&info).unwrap_or_default()).map(Bytes::from));
        }
    }

    /// Whether this node holds the name in a cluster.
    pub(super) fn is_leased(&self) -> bool {
        self.lease.as_ref().is_some_and(|lease| !lease.is_single_node())
    }

    /// Whether another node has the name by now.
    pub(super) fn is_lost(&self) -> bool {
        self.lease.as_ref().is_some_and(Lease::is_lost)
    }

    /// Whether waiting calls may get a provider without an event on this node: another node has room, or the lease is
    /// valid again.
    pub(super) fn has_to_poll(&self) -> bool {
        self.calls.waiting > 0 && (self.exclusive || !self.providers.remote.is_empty())
    }
}
