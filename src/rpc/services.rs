//! One service: who provides it, which calls are with whom, and who waits for a provider.
//!
//! Everything here happens under the service's one lock and touches no connection. What has to be written or answered is
//! returned, and done by the hub when the lock is free.

mod calls;
mod far;

use std::{collections::VecDeque, sync::Arc};

use parking_lot::Mutex;
use slab::Slab;

pub(super) use calls::{Abandoned, After, Done, Entry, Expired, New, Overdue, Request, Room, Target, Ticket, Waited};
use calls::{NONE, Place};
use far::Far;
pub(super) use far::Info;

use super::{MethodNames, ProvideRequest, pending::Conn};
use crate::{
    cluster::{Claim, Lease},
    error::{Code, Error, Result},
};

pub(super) struct Service {
    pub name: Arc<str>,
    pub state: Mutex<State>,
    /// Who registers a provider waits for who registers one, for the cluster may have to be asked.
    pub registering: Arc<tokio::sync::Mutex<()>>,
}

#[derive(Default)]
pub(super) struct State {
    /// No longer in the hub's table: whoever still holds it looks again.
    pub dead: bool,
    providers: Slab<Provider>,
    /// Providers that are on their way out, those of other nodes too.
    leaving: usize,
    /// Keys of the providers here that take calls.
    active: Vec<u32>,
    /// Keys of other nodes: each is one provider for all that it has.
    far: Vec<u32>,
    /// This node's hold on the name, while it has a provider.
    tenure: Option<Lease>,
    /// The lease is exclusive: calls go here only while it stands.
    guarded: bool,
    /// Registrations under way.
    pub registering: usize,
    /// Which of equals is next.
    turn: usize,
    entries: Slab<Entry>,
    /// Who waits, in order. May hold ids of calls that waited.
    queue: VecDeque<(u32, u64)>,
    waiting: usize,
    /// Somebody is writing what waited; newcomers line up behind, or they would be written before it.
    flushing: bool,
    /// No entry is due earlier.
    earliest: u64,
    /// The hub looks at this service in every sweep.
    pub ticking: bool,
    /// Is in the hub's list of services that hold their name.
    pub tenured: bool,
    /// When the last provider left.
    pub left: Option<u64>,
    /// Is in the hub's list of names whose provider left.
    pub remembered: bool,
    /// Counts as a service that has a provider on this node.
    pub counted: bool,
    /// Had a provider on some node when last looked at.
    pub present: bool,
    /// Is in the hub's list of changes.
    pub dirty: bool,
    /// Providers as last told.
    pub announced: usize,
    pub replaced: bool,
}

pub(super) struct Provider {
    pub conn: Arc<Conn>,
    /// Index in its connection's `provides`.
    pub slot: u32,
    /// Of another node.
    far: Option<Far>,
    subject: Box<str>,
    stage: Stage,
    concurrency: u32,
    in_flight: u32,
    names: MethodNames,
    meta: bool,
    fence: Option<u64>,
    methods: Box<[Box<str>]>,
    /// First of its entries.
    head: u32,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Stage {
    /// Registered, but its transport has not told it yet.
    Starting,
    Active,
    /// Withdrawn: finishes its calls and then goes.
    Leaving,
}

/// A provider that is no longer one.
pub(super) struct Removed {
    pub provider: Provider,
    /// Its calls.
    pub orphans: Vec<Done>,
}

pub(super) struct Registered {
    pub provider: u32,
    pub providers: usize,
    pub fence: Option<u64>,
    pub replaced: Option<Removed>,
}

// === impl Service ===

impl Service {
    pub fn new(name: &str) -> Self {
        let state = State { earliest: u64::MAX, ..State::default() };
        Service { name: name.into(), state: Mutex::new(state), registering: Arc::default() }
    }
}

// === impl State: providers ===

impl State {
    /// Providers on all nodes, those that are on their way out not counted.
    pub fn providers(&self) -> usize {
        let far = self.far.iter().map(|key| &self.providers[*key as usize]);
        self.here() + far.filter(|it| it.stage != Stage::Leaving).map(Provider::count).sum::<usize>()
    }

    /// Providers on this node.
    pub fn here(&self) -> usize {
        if self.far.is_empty() {
            return self.providers.len() - self.leaving;
        }
        self.providers.iter().filter(|(_, provider)| provider.far.is_none() && provider.stage != Stage::Leaving).count()
    }

    pub fn is_exclusive(&self) -> bool {
        self.providers.iter().any(|(_, provider)| provider.stage != Stage::Leaving && provider.fence.is_some())
    }

    /// Calls with a provider.
    pub fn in_flight(&self) -> usize {
        self.entries.len() - self.waiting
    }

    pub fn waiting(&self) -> usize {
        self.waiting
    }

    pub fn is_idle(&self) -> bool {
        self.entries.is_empty()
    }

    pub fn is_deserted(&self) -> bool {
        self.providers.is_empty() && self.entries.is_empty() && self.registering == 0
    }

    /// What the providers say they answer to.
    pub fn methods(&self) -> Vec<String> {
        let mut methods: Vec<String> = self
            .providers
            .iter()
            .filter(|(_, provider)| provider.stage != Stage::Leaving)
            .flat_map(|(_, provider)| provider.methods.iter().map(|method| method.to_string()))
            .collect();
        methods.sort();
        methods.dedup();
        methods
    }

    /// What the cluster has to be asked before `conn` may register; `mine` is its key if it is registered.
    ///
    /// # Errors
    /// `service_taken`, by a connection of this node.
    pub fn need(&self, name: &str, mine: Option<u32>, ask: &ProvideRequest<'_>) -> Result<Option<Claim>> {
        if let Some((_, other)) = self.other(mine) {
            match (ask.exclusive, other.fence.is_some()) {
                (false, false) => {}
                (true, true) if ask.takeover && *other.subject == *ask.subject => {}
                (_, true) => return Err(taken(format!("{name} is provided exclusively by another connection"))),
                (true, false) => return Err(taken(format!("{name} has providers, so nobody can have it exclusively"))),
            }
        }
        let own = mine.and_then(|key| self.providers.get(key as usize));
        let has = own.is_some_and(|provider| provider.fence.is_some() && provider.stage != Stage::Leaving);
        let held = self.tenure.as_ref().filter(|lease| !lease.is_lost()).map(Lease::claim);
        Ok(match ask.exclusive {
            true => (!has || held != Some(Claim::Exclusive)).then_some(Claim::Exclusive),
            false => (held != Some(Claim::Shared)).then_some(Claim::Shared),
        })
    }

    /// A provider here that is not `mine`.
    fn other(&self, mine: Option<u32>) -> Option<(u32, &Provider)> {
        self.providers
            .iter()
            .map(|(key, provider)| (key as u32, provider))
            .find(|(key, it)| it.far.is_none() && it.stage != Stage::Leaving && mine != Some(*key))
    }

    /// Who provides it exclusively here, and is not `mine`.
    pub fn holder(&self, mine: Option<u32>) -> Option<Arc<Conn>> {
        let (_, other) = self.other(mine)?;
        other.fence.is_some().then(|| other.conn.clone())
    }

    /// Registers `conn`, or updates it where `mine` is its key. `lease`: what was [needed](Self::need).
    ///
    /// # Errors
    /// `service_taken`, if something has changed since.
    pub fn provide(
        &mut self,
        name: &str,
        conn: &Arc<Conn>,
        mine: Option<u32>,
        slot: u32,
        ask: &ProvideRequest<'_>,
        lease: Option<Lease>,
    ) -> Result<Registered> {
        if self.need(name, mine, ask)? != lease.as_ref().map(Lease::claim) {
            return Err(taken(format!("{name} changed hands at this moment")));
        }
        let replaced = self.other(mine).filter(|_| ask.exclusive).map(|(key, _)| key);
        let replaced = replaced.map(|key| {
            self.replaced = true;
            self.remove(key)
        });
        let fence = match &lease {
            Some(lease) => lease.fence(),
            None => mine.and_then(|key| self.providers[key as usize].fence).filter(|_| ask.exclusive),
        };
        if lease.is_some() {
            self.guarded = ask.exclusive;
            self.tenure = lease;
        }
        let provider = match mine {
            Some(key) => {
                let provider = &mut self.providers[key as usize];
                provider.subject = ask.subject.into();
                provider.concurrency = ask.concurrency;
                provider.names = ask.names;
                provider.meta = ask.meta;
                provider.fence = fence;
                provider.methods = ask.methods.iter().map(|method| Box::from(*method)).collect();
                if provider.stage == Stage::Leaving {
                    provider.stage = Stage::Starting;
                    self.leaving -= 1;
                }
                key
            }
            None => self.providers.insert(Provider {
                conn: conn.clone(),
                slot,
                far: None,
                subject: ask.subject.into(),
                stage: Stage::Starting,
                concurrency: ask.concurrency,
                in_flight: 0,
                names: ask.names,
                meta: ask.meta,
                fence,
                methods: ask.methods.iter().map(|method| Box::from(*method)).collect(),
                head: NONE,
            }) as u32,
        };
        Ok(Registered { provider, providers: self.providers(), fence, replaced })
    }

    /// From now on `key` gets calls, if it is still that connection's.
    pub fn start(&mut self, key: u32, conn: &Arc<Conn>) {
        if let Some(provider) = self.providers.get_mut(key as usize)
            && Arc::ptr_eq(&provider.conn, conn)
            && provider.stage == Stage::Starting
        {
            provider.stage = Stage::Active;
            self.active.push(key);
            self.tell();
        }
    }

    /// No new calls for `key`. Returns how many it still has.
    pub fn withdraw(&mut self, key: u32) -> (u32, After) {
        let provider = &mut self.providers[key as usize];
        if std::mem::replace(&mut provider.stage, Stage::Leaving) != Stage::Leaving {
            self.leaving += 1;
        }
        let in_flight = provider.in_flight;
        self.active.retain(|active| *active != key);
        let mut after = After::default();
        self.close_if_done(key, &mut after);
        (in_flight, after)
    }

    /// Whether the provider is still that connection: keys are given out again.
    pub fn is_of(&self, key: u32, conn: &Arc<Conn>) -> bool {
        self.providers.get(key as usize).is_some_and(|provider| Arc::ptr_eq(&provider.conn, conn))
    }

    pub fn remove(&mut self, key: u32) -> Removed {
        self.active.retain(|active| *active != key);
        self.far.retain(|far| *far != key);
        let provider = self.providers.remove(key as usize);
        self.leaving -= usize::from(provider.stage == Stage::Leaving);
        let mut orphans = Vec::with_capacity(provider.in_flight as usize);
        let mut index = provider.head;
        while index != NONE {
            let entry = self.entries.remove(index as usize);
            index = match entry.place {
                Place::With { next, .. } => next,
                Place::Waiting(_) | Place::Nowhere => NONE,
            };
            orphans.extend(entry.done());
        }
        Removed { provider, orphans }
    }

    /// Removes `key` if it is still that connection's: a connection that turned out to be gone.
    pub fn remove_conn(&mut self, key: u32, conn: &Arc<Conn>) -> Option<Removed> {
        self.is_of(key, conn).then(|| self.remove(key))
    }

    /// Who gets a call now. `full`: those count too that have all they take; `only_here`: other nodes do not count.
    #[inline]
    pub fn pick(&mut self, tried: &[u32], full: bool, only_here: bool, now: u64) -> Option<u32> {
        let here = if self.guarded && !self.is_valid() { None } else { self.pick_here(tried, full) };
        if self.far.is_empty() || only_here { here } else { self.pick_far(here, tried, full, now) }
    }

    /// The provider with the fewest calls for its size, equals in turn. Of many, the better of two at random: nearly as
    /// good, and the time does not grow.
    fn pick_here(&mut self, tried: &[u32], full: bool) -> Option<u32> {
        let free = |key: &u32| {
            let provider = &self.providers[*key as usize];
            (full || provider.in_flight < provider.concurrency) && (tried.is_empty() || !tried.contains(key))
        };
        let lighter = |a: u32, b: u32| {
            let (x, y) = (&self.providers[a as usize], &self.providers[b as usize]);
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

    /// Whether somebody takes calls, be they full.
    pub fn has_active(&self, only_here: bool) -> bool {
        let here = !self.active.is_empty() && (!self.guarded || self.is_valid());
        here || !only_here && self.far.iter().any(|key| self.providers[*key as usize].stage == Stage::Active)
    }

    /// Whether this node may have its exclusive provider work.
    fn is_valid(&self) -> bool {
        self.tenure.as_ref().is_some_and(Lease::is_valid)
    }

    fn close_if_done(&mut self, key: u32, after: &mut After) {
        let provider = &self.providers[key as usize];
        if provider.stage == Stage::Leaving && provider.in_flight == 0 {
            let provider = self.providers.remove(key as usize);
            self.far.retain(|far| *far != key);
            self.leaving -= 1;
            after.closed.push((provider.conn, provider.slot));
        }
    }
}

fn taken(detail: String) -> Error {
    Error::new(Code::ServiceTaken, detail)
}
