//! One service: who provides it, which calls are with whom, and who waits for a provider.
//!
//! Everything here happens under the service's one lock and touches no connection. What has to be written or answered is
//! returned, and done by the hub when the lock is free.

mod calls;

use std::{collections::VecDeque, sync::Arc};

use parking_lot::Mutex;
use slab::Slab;

pub(super) use calls::{Abandoned, After, Done, Entry, Expired, New, Overdue, Request, Room, Target, Ticket, Waited};
use calls::{NONE, Place};

use super::{Names, Provide, pending::Conn};
use crate::error::{Code, Error, Result};

pub(super) struct Service {
    pub name: Arc<str>,
    pub state: Mutex<State>,
}

#[derive(Default)]
pub(super) struct State {
    /// No longer in the hub's table: whoever still holds it looks again.
    pub dead: bool,
    providers: Slab<Provider>,
    /// Providers that are on their way out.
    leaving: usize,
    /// Keys of the providers that take calls.
    active: Vec<u32>,
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
    /// The last number given to an exclusive provider.
    pub fence: u64,
    /// When the last provider left.
    pub left: Option<u64>,
    /// Is in the hub's list of names whose provider left.
    pub remembered: bool,
    /// Counts as a service that has a provider.
    pub counted: bool,
    /// Is in the hub's list of changes.
    pub dirty: bool,
    /// Providers as last told.
    pub announced: usize,
    pub replaced: bool,
}

pub(super) struct Provider {
    pub conn: Arc<Conn>,
    /// Index in its connection's `provides`.
    pub slot: u16,
    subject: Box<str>,
    stage: Stage,
    concurrency: u32,
    in_flight: u32,
    names: Names,
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
    pub fn new(name: &str, fence: u64) -> Self {
        Service { name: name.into(), state: Mutex::new(State { fence, earliest: u64::MAX, ..State::default() }) }
    }
}

// === impl State: providers ===

impl State {
    /// Providers, those that are on their way out not counted.
    pub fn providers(&self) -> usize {
        self.providers.len() - self.leaving
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
        self.providers.is_empty() && self.entries.is_empty()
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

    /// Registers `conn`, or updates it where `mine` is its key.
    pub fn provide(
        &mut self,
        name: &str,
        conn: &Arc<Conn>,
        mine: Option<u32>,
        slot: u16,
        ask: &Provide<'_>,
    ) -> Result<Registered> {
        let mut others = self
            .providers
            .iter()
            .filter(|(key, provider)| provider.stage != Stage::Leaving && mine != Some(*key as u32))
            .map(|(key, provider)| (key as u32, provider));
        let mut replaced = None;
        if let Some((key, other)) = others.next() {
            let may_take_over =
                ask.takeover && ask.exclusive && other.fence.is_some() && *other.subject == *ask.subject;
            match (ask.exclusive, other.fence.is_some()) {
                (false, false) => {}
                (true, true) if may_take_over => replaced = Some(key),
                (_, true) => return Err(taken(format!("{name} is provided exclusively by another connection"))),
                (true, false) => return Err(taken(format!("{name} has providers, so nobody can have it exclusively"))),
            }
        }
        drop(others);
        let replaced = replaced.map(|key| {
            self.replaced = true;
            self.remove(key)
        });

        let fence = match mine.and_then(|key| self.providers.get(key as usize)) {
            _ if !ask.exclusive => None,
            Some(provider) if provider.fence.is_some() && provider.stage != Stage::Leaving => provider.fence,
            _ => {
                self.fence += 1;
                Some(self.fence)
            }
        };
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

    /// The provider with the fewest calls for its size, equals in turn. Of many, the better of two at random: nearly as
    /// good, and the time does not grow. `full`: those count too that have all they take.
    pub fn pick(&mut self, tried: &[u32], full: bool) -> Option<u32> {
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

    pub fn has_active(&self) -> bool {
        !self.active.is_empty()
    }

    fn close_if_done(&mut self, key: u32, after: &mut After) {
        let provider = &self.providers[key as usize];
        if provider.stage == Stage::Leaving && provider.in_flight == 0 {
            let provider = self.providers.remove(key as usize);
            self.leaving -= 1;
            after.closed.push((provider.conn, provider.slot));
        }
    }
}

fn taken(detail: String) -> Error {
    Error::new(Code::ServiceTaken, detail)
}
