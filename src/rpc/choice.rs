//! Which provider gets a call.

use super::tables::{ProviderStage, ProviderTable, ServiceState};
use crate::cluster::Lease;

impl ServiceState {
    /// Chooses the provider of a call. `full`: those at their concurrency count too; `local`: other nodes do not count.
    #[inline]
    pub(super) fn pick(&mut self, tried: &[u32], full: bool, local: bool, now: u64) -> Option<u32> {
        let here = if self.may_run() { self.providers.pick_local(tried, full) } else { None };
        if self.providers.remote.is_empty() || local {
            here
        } else {
            self.providers.pick_remote(here, tried, full, now)
        }
    }

    /// Whether a provider takes calls, even if it is at its concurrency. `local`: on this node.
    pub(super) fn has_active(&self, local: bool) -> bool {
        let here = !self.providers.active.is_empty() && self.may_run();
        let is_active = |key: &u32| self.providers.all[*key as usize].stage == ProviderStage::Active;
        here || !local && self.providers.remote.iter().any(is_active)
    }

    /// Whether providers of this node may be called: an exclusive one only while the lease is valid.
    fn may_run(&self) -> bool {
        !self.exclusive || self.lease.as_ref().is_some_and(Lease::is_valid)
    }
}

impl ProviderTable {
    /// The provider with the fewest calls for its concurrency, equals in turn. Of many, the better of two random ones:
    /// nearly as good, in constant time.
    fn pick_local(&mut self, tried: &[u32], full: bool) -> Option<u32> {
        let free = |key: &u32| {
            let provider = &self.all[*key as usize];
            (full || provider.in_flight < provider.concurrency) && (tried.is_empty() || !tried.contains(key))
        };
        let lighter = |a: u32, b: u32| {
            let (x, y) = (&self.all[a as usize], &self.all[b as usize]);
            let a_is =
                u64::from(x.in_flight) * u64::from(y.concurrency) <= u64::from(y.in_flight) * u64::from(x.concurrency);
            if a_is { a } else { b }
        };
        let count = self.active.len();
        if count > 8 {
            let one = self.active[fastrand::usize(..count)];
            let two = self.active[fastrand::usize(..count)];
            match (free(&one), free(&two)) {
                (true, true) => return Some(lighter(one, two)),
                (true, false) => return Some(one),
                (false, true) => return Some(two),
                (false, false) => {}
            }
        }
        let turn = if self.turn < count { self.turn } else { 0 };
        let best = self.active[turn..].iter().chain(&self.active[..turn]).copied().filter(free).reduce(lighter);
        self.turn = turn + 1;
        best
    }

    /// The better of two random nodes, unless `here` has at most twice its load.
    fn pick_remote(&self, here: Option<u32>, tried: &[u32], full: bool, now: u64) -> Option<u32> {
        if full && here.is_some() {
            return here;
        }
        let load = |key: u32| {
            let provider = &self.all[key as usize];
            // The call in question counts, or an idle node would be infinitely better than one with a single call.
            (u64::from(provider.load(now)) + 1, u64::from(provider.concurrency))
        };
        let free = |key: &u32| {
            let provider = &self.all[*key as usize];
            let takes = provider.stage == ProviderStage::Active && (full || provider.load(now) < provider.concurrency);
            takes && !tried.contains(key)
        };
        let lighter = |a: u32, b: u32| {
            let ((x, of_x), (y, of_y)) = (load(a), load(b));
            if x * of_y <= y * of_x { a } else { b }
        };
        let count = self.remote.len();
        let two = [fastrand::usize(..count), fastrand::usize(..count)].map(|at| self.remote[at]);
        let remote = match two.iter().copied().filter(free).reduce(lighter) {
            Some(remote) => remote,
            None => match self.remote.iter().copied().filter(free).reduce(lighter) {
                Some(remote) => remote,
                None => return here,
            },
        };
        let Some(here) = here else { return Some(remote) };
        let ((own, of_own), (other, of_other)) = (load(here), load(remote));
        Some(if own * of_other <= 2 * other * of_own { here } else { remote })
    }
}
