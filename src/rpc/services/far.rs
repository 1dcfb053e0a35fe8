//! Providers on other nodes: each node counts as one provider, with what all of its own take together.

use std::sync::Arc;

use bytes::Bytes;
use serde::{Deserialize, Serialize};

use super::{After, Conn, MethodNames, NONE, Provider, Stage, State};
use crate::cluster::NodeId;

/// What a node tells the others of a service that it has: JSON, so that members may be added.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(in crate::rpc) struct Info {
    pub providers: u32,
    /// Calls that they take together.
    pub concurrency: u32,
    /// Of exclusive ones.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub fence: Option<u64>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub methods: Vec<String>,
}

pub(super) struct Far {
    providers: u32,
    /// Of the holding that this is made of.
    rev: u64,
    /// Calls that it has from elsewhere, as last heard.
    others: u32,
    /// When that is too old to count.
    until: u64,
}

/// How long the load of another node is believed, in milliseconds: one that was full once must get calls again.
const BELIEVED: u64 = 1_000;

impl Provider {
    /// How many providers this one stands for.
    pub(super) fn count(&self) -> usize {
        self.far.as_ref().map_or(1, |far| far.providers as usize)
    }

    /// Calls that it has, as far as is known.
    pub(super) fn load(&self, now: u64) -> u32 {
        let others = self.far.as_ref().map_or(0, |far| if now < far.until { far.others } else { 0 });
        self.in_flight.saturating_add(others)
    }
}

impl State {
    /// The better of two other nodes at random, unless `here` is not above twice its load.
    pub(super) fn pick_far(&self, here: Option<u32>, tried: &[u32], full: bool, now: u64) -> Option<u32> {
        if full && here.is_some() {
            return here;
        }
        let load = |key: u32| {
            let provider = &self.providers[key as usize];
            // The call in question counts, or an idle node would be infinitely better than one with a single call.
            (u64::from(provider.load(now)) + 1, u64::from(provider.concurrency))
        };
        let free = |key: &u32| {
            let provider = &self.providers[*key as usize];
            let takes = provider.stage == Stage::Active && (full || provider.load(now) < provider.concurrency);
            takes && !tried.contains(key)
        };
        let lighter = |a: u32, b: u32| {
            let ((x, of_x), (y, of_y)) = (load(a), load(b));
            if x * of_y <= y * of_x { a } else { b }
        };
        let count = self.far.len();
        let two = [fastrand::usize(..count), fastrand::usize(..count)].map(|at| self.far[at]);
        let far = match two.iter().copied().filter(free).reduce(lighter) {
            Some(far) => far,
            None => match self.far.iter().copied().filter(free).reduce(lighter) {
                Some(far) => far,
                None => return here,
            },
        };
        let Some(here) = here else { return Some(far) };
        let ((own, of_own), (other, of_other)) = (load(here), load(far));
        Some(if own * of_other <= 2 * other * of_own { here } else { far })
    }

    /// The key of another node.
    pub fn far(&self, conn: &Arc<Conn>) -> Option<u32> {
        self.far.iter().copied().find(|key| self.is_of(*key, conn))
    }

    /// Another node has, or has something else now. True: it has to be put among what `conn` provides, under `slot`.
    pub fn set_far(&mut self, conn: &Arc<Conn>, slot: u32, rev: u64, info: &Info) -> Option<u32> {
        let (concurrency, fence) = (info.concurrency.max(1), info.fence);
        let methods = info.methods.iter().map(|method| Box::from(method.as_str())).collect();
        let news = Far { providers: info.providers, rev, others: 0, until: 0 };
        if let Some(key) = self.far(conn) {
            let provider = &mut self.providers[key as usize];
            if provider.stage == Stage::Leaving {
                provider.stage = Stage::Active;
                self.leaving -= 1;
            }
            (provider.concurrency, provider.fence, provider.methods, provider.far) =
                (concurrency, fence, methods, Some(news));
            return None;
        }
        let key = self.providers.insert(Provider {
            conn: conn.clone(),
            slot,
            far: Some(news),
            subject: "".into(),
            stage: Stage::Active,
            concurrency,
            in_flight: 0,
            names: MethodNames::Qualified,
            // It wants to know all there is, and who gave up.
            meta: true,
            fence,
            methods,
            head: NONE,
        }) as u32;
        self.far.push(key);
        Some(key)
    }

    /// Another node has it no longer. `rev`: only if nothing newer is known. True: that was news.
    pub fn unset_far(&mut self, conn: &Arc<Conn>, rev: Option<u64>) -> Option<After> {
        let key = self.far(conn)?;
        let provider = &self.providers[key as usize];
        let newer = rev.is_some_and(|rev| provider.far.as_ref().is_some_and(|far| far.rev != rev));
        (provider.stage == Stage::Active && !newer).then(|| self.withdraw(key).1)
    }

    /// What another node said of its load, the calls of this one included.
    pub fn heard_load(&mut self, conn: &Arc<Conn>, load: u32, now: u64) {
        let Some(key) = self.far(conn) else { return };
        let provider = &mut self.providers[key as usize];
        if let Some(far) = &mut provider.far {
            (far.others, far.until) = (load.saturating_sub(provider.in_flight), now + BELIEVED);
        }
    }

    /// It has as many calls as it takes.
    pub fn heard_full(&mut self, conn: &Arc<Conn>, now: u64) {
        let Some(key) = self.far(conn) else { return };
        let full = self.providers[key as usize].concurrency;
        self.heard_load(conn, full.saturating_add(1), now);
    }

    pub fn keys_of(&self, nodes: &[NodeId]) -> Vec<u32> {
        let is_one = |key: &u32| self.providers[*key as usize].conn.node.is_some_and(|node| nodes.contains(&node));
        self.far.iter().copied().filter(is_one).collect()
    }

    /// What was known of `key` when it was chosen.
    pub fn rev(&self, key: u32) -> u64 {
        self.providers.get(key as usize).and_then(|provider| provider.far.as_ref()).map_or(0, |far| far.rev)
    }

    /// Calls with providers of this node.
    pub fn load_here(&self) -> usize {
        let elsewhere: u32 = self.far.iter().map(|key| self.providers[*key as usize].in_flight).sum();
        self.in_flight() - elsewhere as usize
    }

    /// Calls with providers of any node, as far as is known.
    pub fn load_anywhere(&self) -> usize {
        let others = |key: &u32| self.providers[*key as usize].far.as_ref().map_or(0, |far| far.others as usize);
        self.in_flight() + self.far.iter().map(others).sum::<usize>()
    }

    /// Whether calls of this node are with `conn`.
    pub fn has_calls(&self, key: u32) -> bool {
        self.providers.get(key as usize).is_some_and(|provider| provider.in_flight > 0)
    }

    /// The other nodes know what this one has.
    pub(super) fn tell(&self) {
        let Some(lease) = self.tenure.as_ref().filter(|lease| !lease.is_single_node()) else { return };
        let mut info = Info::default();
        for key in &self.active {
            let provider = &self.providers[*key as usize];
            info.providers += 1;
            info.concurrency = info.concurrency.saturating_add(provider.concurrency);
            info.fence = info.fence.max(provider.fence);
            info.methods.extend(provider.methods.iter().map(|method| method.to_string()));
        }
        info.methods.sort();
        info.methods.dedup();
        // A provider that was not told yet that it is one gets no calls.
        let told = (info.providers > 0).then(|| serde_json::to_vec(&info).unwrap_or_default());
        lease.set_info(told.map(Bytes::from));
    }

    /// Gives the name back if nobody here needs it; else the others know what there is.
    pub fn keep_or_release(&mut self) {
        if self.here() > 0 || self.registering > 0 {
            self.tell();
        } else {
            (self.tenure, self.guarded) = (None, false);
        }
    }

    /// Whether a name is held that others could have.
    pub fn is_tenured(&self) -> bool {
        self.tenure.as_ref().is_some_and(|lease| !lease.is_single_node())
    }

    /// Whether calls may wait for what other nodes do.
    pub fn waits_for_others(&self) -> bool {
        self.waiting() > 0 && (self.guarded || !self.far.is_empty())
    }

    /// Whether the name was lost to others.
    pub fn is_lost(&self) -> bool {
        self.tenure.as_ref().is_some_and(crate::cluster::Lease::is_lost)
    }

    /// Keys of the providers of this node, those on their way out not counted.
    pub fn keys_here(&self) -> Vec<u32> {
        let here = self.providers.iter().filter(|(_, it)| it.far.is_none() && it.stage != Stage::Leaving);
        here.map(|(key, _)| key as u32).collect()
    }

    /// The key of the exclusive provider of this node, if `subject` may take over from it.
    pub fn yields_to(&self, subject: &str) -> Option<u32> {
        let (key, provider) = self.other(None)?;
        (provider.fence.is_some() && *provider.subject == *subject).then_some(key)
    }
}
