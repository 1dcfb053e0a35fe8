//! The calls of a service: each is with a provider, or waits for one.

use std::sync::{
    Arc,
    atomic::{AtomicUsize, Ordering::Relaxed},
};

use serde_json::value::RawValue;
use slab::Slab;

use super::{
    super::{
        Call, MethodNames,
        pending::{CallId, Conn},
    },
    Provider, State,
};

/// A call that is with a provider or waits for one.
pub(in crate::rpc) struct Entry {
    pub(super) seq: u64,
    /// None: a notification, which is here only while it waits.
    caller: Option<(Arc<Conn>, u32)>,
    due: u64,
    deadline: u64,
    timeout: u32,
    pub(super) place: Place,
}

pub(super) enum Place {
    With {
        provider: u32,
        previous: u32,
        next: u32,
    },
    Waiting(Box<Stored>),
    /// On its way from one to the other, while the lock is held.
    Nowhere,
}

/// No entry.
pub(super) const NONE: u32 = u32::MAX;

/// What is written to a provider, but for what depends on the provider.
#[derive(Clone, Copy, Debug)]
pub(in crate::rpc) struct Request<'a> {
    pub method: &'a str,
    pub params: Option<&'a RawValue>,
    pub as_sent: Option<&'a RawValue>,
    pub caller: &'a str,
    pub traceparent: Option<&'a str>,
    pub wait: Option<u64>,
    pub late: bool,
}

/// A [`Request`] that waits.
pub(in crate::rpc) struct Stored {
    method: Box<str>,
    params: Option<Box<RawValue>>,
    as_sent: Option<Box<RawValue>>,
    caller: Box<str>,
    traceparent: Option<Box<str>>,
    wait: Option<u64>,
    late: bool,
    _room: Ticket,
}

/// How much may wait, on the whole node.
#[derive(Debug, Default)]
pub(in crate::rpc) struct Room {
    calls: AtomicUsize,
    bytes: AtomicUsize,
}

/// A place in the [`Room`], given back on drop.
pub(in crate::rpc) struct Ticket {
    room: Arc<Room>,
    bytes: usize,
}

/// Where a call is to be written.
pub(in crate::rpc) struct Target {
    pub conn: Arc<Conn>,
    pub provider: u32,
    /// None: a notification.
    pub id: Option<CallId>,
    pub names: MethodNames,
    pub meta: bool,
    pub fence: Option<u64>,
    pub deadline: u64,
    /// What is known of another node.
    pub rev: u64,
}

/// A call that waited and has its provider now.
pub(in crate::rpc) struct Waited {
    pub target: Target,
    /// Index and number of its entry. None: a notification.
    pub entry: Option<(u32, u64)>,
    pub request: Box<Stored>,
}

/// A new call.
pub(in crate::rpc) struct New {
    pub seq: u64,
    pub caller: Option<(Arc<Conn>, u32)>,
    pub deadline: u64,
    pub timeout: u32,
}

/// Who waits for the answer of a call that left the table.
pub(in crate::rpc) struct Done {
    pub caller: Arc<Conn>,
    pub live: u32,
    pub seq: u64,
}

/// What is left to do when calls have left a provider.
#[derive(Default)]
#[must_use]
pub(in crate::rpc) struct After {
    /// Registrations that have finished.
    pub closed: Vec<(Arc<Conn>, u32)>,
    /// A slot is free and somebody waits for it.
    pub flush: bool,
}

pub(in crate::rpc) struct Expired {
    pub done: Done,
    pub timeout: u32,
    pub why: Overdue,
}

pub(in crate::rpc) enum Overdue {
    /// Written, and not answered in time.
    Unanswered { provider: Arc<Conn>, id: CallId },
    /// Waited until its own deadline.
    Unwritten,
    /// Waited as long as calls wait for a provider. `full`: there is one by now, but it is busy.
    Unprovided { full: bool },
}

/// A call that its caller gave up.
pub(in crate::rpc) enum Abandoned {
    /// It was answered at the same moment.
    Gone,
    Waiting,
    /// The provider, if it wants to know.
    With(Option<(Arc<Conn>, CallId)>),
}

// === impl State: calls ===

impl State {
    /// Whether newcomers have to line up.
    pub fn is_queued(&self) -> bool {
        self.flushing || self.waiting > 0
    }

    pub fn is_flushing(&self) -> bool {
        self.flushing
    }

    /// Whether the table takes another call.
    pub fn has_room(&self) -> bool {
        self.entries.vacant_key() < CallId::ENTRIES
    }

    /// Puts a call with `provider`.
    pub fn place(&mut self, call: New, provider: u32) -> (u32, Target) {
        let index = self.insert(call);
        (index, self.place_at(index, provider))
    }

    /// Lets a call wait until `due`.
    pub fn enqueue(&mut self, call: New, due: u64, request: Box<Stored>) -> u32 {
        let seq = call.seq;
        let index = self.insert(call);
        self.wait_at(index, due, request);
        self.queue.push_back((index, seq));
        index
    }

    /// A notification leaves no trace but the choice.
    pub fn notify(&self, provider: u32) -> Target {
        let Provider { conn, names, meta, fence, .. } = &self.providers[provider as usize];
        let (conn, names, meta, fence) = (conn.clone(), *names, *meta, *fence);
        Target { conn, provider, id: None, names, meta, fence, deadline: 0, rev: self.rev(provider) }
    }

    fn id(&self, seq: u64, index: u32, provider: u32) -> CallId {
        let provider = &self.providers[provider as usize];
        // The slots of a link are too many for an id, and it does not look for them there.
        CallId::new(seq, index, if provider.far.is_some() { 0 } else { provider.slot as u16 })
    }

    /// Takes a call that could not be written from its provider, unless it was finished meanwhile. Before the lock is
    /// free again it has to be placed, wait or be removed.
    pub fn take_back(&mut self, index: u32, seq: u64, after: &mut After) -> bool {
        let Some(entry) = self.entries.get(index as usize).filter(|entry| entry.seq == seq) else { return false };
        let with = match entry.place {
            Place::With { provider, .. } => Some(provider),
            _ => None,
        };
        self.detach(index);
        if let Some(provider) = with {
            // It may have been withdrawn meanwhile, and waited only for this call.
            self.close_if_done(provider, after);
        }
        true
    }

    pub fn place_at(&mut self, index: u32, provider: u32) -> Target {
        self.attach(index, provider);
        let Entry { seq, deadline, .. } = self.entries[index as usize];
        let mut target = self.notify(provider);
        target.id = Some(self.id(seq, index, provider));
        target.deadline = deadline;
        target
    }

    /// Before all that came later, though they may wait already.
    pub fn wait_again(&mut self, index: u32, due: u64, request: Box<Stored>) {
        let seq = self.wait_at(index, due, request);
        let later = |(_, other): &(u32, u64)| (other.wrapping_sub(seq) as i64) > 0;
        let at = self.queue.iter().position(later).unwrap_or(self.queue.len());
        self.queue.insert(at, (index, seq));
    }

    /// Whether another node made this call: it goes to nobody but a provider here, and does not wait.
    pub fn is_of_link(&self, index: u32) -> bool {
        self.entries.get(index as usize).and_then(|entry| entry.caller.as_ref()).is_some_and(|(conn, _)| conn.is_link())
    }

    pub fn give_up(&mut self, index: u32) -> Option<Done> {
        self.entries.remove(index as usize).done()
    }

    /// The reply of `conn`, if it has that call.
    pub fn finish(&mut self, id: CallId, conn: &Arc<Conn>) -> Option<(Done, After)> {
        let (provider, _) = self.with(id, conn)?;
        self.detach(id.index());
        let entry = self.entries.remove(id.index() as usize);
        let mut after = After { closed: Vec::new(), flush: self.waiting > 0 };
        self.close_if_done(provider, &mut after);
        entry.done().map(|done| (done, after))
    }

    /// The key of `conn` and the number of its call `id`, if it has that.
    pub fn with(&self, id: CallId, conn: &Arc<Conn>) -> Option<(u32, u64)> {
        let entry = self.entries.get(id.index() as usize)?;
        let Place::With { provider, .. } = entry.place else { return None };
        (id.is(entry.seq) && self.is_of(provider, conn)).then_some((provider, entry.seq))
    }

    pub fn abandon(&mut self, index: u32, seq: u64) -> (Abandoned, After) {
        let mut after = After::default();
        let Some(entry) = self.entries.get(index as usize).filter(|entry| entry.seq == seq) else {
            return (Abandoned::Gone, after);
        };
        let with = match entry.place {
            Place::With { provider, .. } => Some(provider),
            _ => None,
        };
        self.detach(index);
        self.entries.remove(index as usize);
        let Some(provider) = with else { return (Abandoned::Waiting, after) };
        let Provider { conn, meta, .. } = &self.providers[provider as usize];
        let told = meta.then(|| (conn.clone(), self.id(seq, index, provider)));
        after.flush = self.waiting > 0;
        self.close_if_done(provider, &mut after);
        (Abandoned::With(told), after)
    }

    /// Takes out what is due. Looks at every call only if one of them may be.
    ///
    /// From then on the provider has a slot free, though it may still be at work: a provider that leaves calls unanswered
    /// would otherwise run out of slots for good.
    pub fn expire(&mut self, now: u64) -> (Vec<Expired>, After) {
        let (mut expired, mut after) = (Vec::new(), After::default());
        if now < self.earliest {
            return (expired, after);
        }
        self.earliest = u64::MAX;
        let mut due = Vec::new();
        for (index, entry) in &self.entries {
            if entry.due <= now {
                due.push(index as u32);
            } else {
                self.earliest = self.earliest.min(entry.due);
            }
        }
        let full = self.has_active(false);
        for index in due {
            let Entry { seq, deadline, timeout, ref place, .. } = self.entries[index as usize];
            let with = match *place {
                Place::With { provider, .. } => Some(provider),
                _ => None,
            };
            self.detach(index);
            let entry = self.entries.remove(index as usize);
            let why = match with {
                Some(provider) => {
                    let conn = self.providers[provider as usize].conn.clone();
                    let why = Overdue::Unanswered { provider: conn, id: self.id(seq, index, provider) };
                    self.close_if_done(provider, &mut after);
                    why
                }
                None if deadline <= now => Overdue::Unwritten,
                None => Overdue::Unprovided { full },
            };
            if let Some(done) = entry.done() {
                expired.push(Expired { done, timeout, why });
            }
        }
        after.flush = self.waiting > 0;
        if self.entries.is_empty() && self.entries.capacity() > 1_024 {
            self.entries = Slab::new();
        }
        (expired, after)
    }

    /// Claims the right to write what waits. False: somebody else has it, or there is nothing.
    pub fn begin_flush(&mut self) -> bool {
        let begin = !self.flushing && self.waiting > 0;
        self.flushing |= begin;
        begin
    }

    /// The next that waits, placed. None: nobody waits or no provider is free, and the right is given back.
    pub fn next_waiting(&mut self, now: u64) -> Option<Waited> {
        while let Some((index, seq)) = self.queue.pop_front() {
            let Some(entry) = self.entries.get(index as usize).filter(|entry| entry.is_waiting(seq)) else { continue };
            let call = entry.caller.is_some();
            let Some(provider) = self.pick(&[], !call, false, now) else {
                self.queue.push_front((index, seq));
                break;
            };
            let Some(request) = self.detach(index) else { continue };
            if !call {
                self.entries.remove(index as usize);
                return Some(Waited { target: self.notify(provider), entry: None, request });
            }
            let target = self.place_at(index, provider);
            return Some(Waited { target, entry: Some((index, seq)), request });
        }
        self.flushing = false;
        None
    }

    fn insert(&mut self, call: New) -> u32 {
        let New { seq, caller, deadline, timeout } = call;
        self.entries.insert(Entry { seq, caller, due: deadline, deadline, timeout, place: Place::Nowhere }) as u32
    }

    fn wait_at(&mut self, index: u32, due: u64, request: Box<Stored>) -> u64 {
        let entry = &mut self.entries[index as usize];
        entry.due = due.min(entry.deadline);
        entry.place = Place::Waiting(request);
        let (due, seq) = (entry.due, entry.seq);
        self.waiting += 1;
        self.earliest = self.earliest.min(due);
        // Calls that waited and were given up leave their ids behind; a caller that does nothing else must not fill it.
        if self.queue.len() > 2 * self.waiting + 64 {
            let entries = &self.entries;
            self.queue.retain(|(index, seq)| entries.get(*index as usize).is_some_and(|entry| entry.is_waiting(*seq)));
        }
        seq
    }

    fn attach(&mut self, index: u32, key: u32) {
        let provider = &mut self.providers[key as usize];
        let head = std::mem::replace(&mut provider.head, index);
        provider.in_flight += 1;
        let entry = &mut self.entries[index as usize];
        entry.due = entry.deadline;
        entry.place = Place::With { provider: key, previous: NONE, next: head };
        self.earliest = self.earliest.min(entry.due);
        if let Some(Entry { place: Place::With { previous, .. }, .. }) = self.entries.get_mut(head as usize) {
            *previous = index;
        }
    }

    /// Takes a call from its provider or from those that wait.
    fn detach(&mut self, index: u32) -> Option<Box<Stored>> {
        match std::mem::replace(&mut self.entries[index as usize].place, Place::Nowhere) {
            Place::With { provider, previous, next } => {
                let provider = &mut self.providers[provider as usize];
                provider.in_flight -= 1;
                match self.entries.get_mut(previous as usize) {
                    Some(Entry { place: Place::With { next: of_previous, .. }, .. }) => *of_previous = next,
                    _ => provider.head = next,
                }
                if let Some(Entry { place: Place::With { previous: of_next, .. }, .. }) =
                    self.entries.get_mut(next as usize)
                {
                    *of_next = previous;
                }
                None
            }
            Place::Waiting(request) => {
                self.waiting -= 1;
                if self.waiting == 0 && !self.flushing {
                    self.queue.clear();
                }
                Some(request)
            }
            Place::Nowhere => None,
        }
    }
}

#[cfg(test)]
impl State {
    /// Everything that has to be true between two operations.
    pub fn check(&self) {
        use super::Stage;
        let mut linked = 0;
        for (key, provider) in &self.providers {
            let (mut index, mut before, mut count) = (provider.head, NONE, 0);
            while index != NONE {
                let Place::With { provider: has, previous, next } = self.entries[index as usize].place else {
                    panic!("a provider's list has an entry that is elsewhere")
                };
                assert_eq!((has as usize, previous), (key, before));
                (before, index, count) = (index, next, count + 1);
            }
            assert_eq!(provider.in_flight, count);
            let far = provider.far.is_some();
            let bounded = provider.in_flight <= provider.concurrency || provider.concurrency < 3 || far;
            assert!(bounded, "only an update lowers it");
            assert_eq!(provider.stage == Stage::Active && !far, self.active.contains(&(key as u32)));
            assert_eq!(far, self.far.contains(&(key as u32)));
            assert!(provider.stage != Stage::Leaving || count > 0);
            linked += count as usize;
        }
        assert_eq!(
            self.leaving,
            self.providers.iter().filter(|(_, provider)| provider.stage == Stage::Leaving).count()
        );
        let waiting: Vec<_> = self.entries.iter().filter(|(_, entry)| entry.is_waiting(entry.seq)).collect();
        assert_eq!((waiting.len(), waiting.len() + linked), (self.waiting, self.entries.len()));
        for (index, entry) in waiting {
            assert_eq!(self.queue.iter().filter(|queued| **queued == (index as u32, entry.seq)).count(), 1);
        }
        assert!(self.entries.iter().all(|(_, entry)| self.earliest <= entry.due));
        assert!(self.ticking || self.entries.is_empty());
        assert!(!self.flushing);
        assert_eq!(self.counted, self.here() > 0);
        let here: Vec<_> =
            self.providers.iter().filter(|(_, it)| it.stage != Stage::Leaving && it.far.is_none()).collect();
        let exclusive = here.iter().filter(|(_, it)| it.fence.is_some()).count();
        assert!(exclusive == 0 || exclusive == 1 && here.len() == 1);
        assert_eq!(self.guarded, exclusive == 1 || self.guarded && self.registering > 0);
        assert_eq!(self.tenure.is_some(), !here.is_empty() || self.tenure.is_some() && self.registering > 0);
    }
}

impl After {
    pub fn is_something(&self) -> bool {
        self.flush || !self.closed.is_empty()
    }
}

impl Entry {
    fn is_waiting(&self, seq: u64) -> bool {
        self.seq == seq && matches!(self.place, Place::Waiting(_))
    }

    pub(super) fn done(self) -> Option<Done> {
        let seq = self.seq;
        self.caller.map(|(caller, live)| Done { caller, live, seq })
    }
}

// === impl Request ===

impl<'a> Request<'a> {
    pub fn of(call: &Call<'a>) -> Self {
        let Call { method, params, as_sent, caller, traceparent, .. } = *call;
        let wait = call.wait.map(|wait| wait.as_millis() as u64);
        Request { method, params, as_sent, caller, traceparent, wait, late: call.late }
    }

    pub fn store(&self, room: Ticket) -> Box<Stored> {
        Box::new(Stored {
            method: self.method.into(),
            params: self.params.map(ToOwned::to_owned),
            as_sent: self.as_sent.map(ToOwned::to_owned),
            caller: self.caller.into(),
            traceparent: self.traceparent.map(Into::into),
            wait: self.wait,
            late: self.late,
            _room: room,
        })
    }

    pub fn bytes(&self) -> usize {
        let json: usize = [self.params, self.as_sent].into_iter().flatten().map(|json| json.get().len()).sum();
        self.method.len() + json + self.caller.len() + self.traceparent.map_or(0, str::len)
    }
}

impl Stored {
    pub fn request(&self) -> Request<'_> {
        Request {
            method: &self.method,
            params: self.params.as_deref(),
            as_sent: self.as_sent.as_deref(),
            caller: &self.caller,
            traceparent: self.traceparent.as_deref(),
            wait: self.wait,
            late: self.late,
        }
    }
}

// === impl Room ===

impl Room {
    pub fn take(self: &Arc<Self>, bytes: usize, max_calls: usize, max_bytes: usize) -> Option<Ticket> {
        let ticket = Ticket { room: self.clone(), bytes };
        let calls = self.calls.fetch_add(1, Relaxed) + 1;
        let bytes = self.bytes.fetch_add(bytes, Relaxed) + bytes;
        (calls <= max_calls && bytes <= max_bytes).then_some(ticket)
    }
}

impl Drop for Ticket {
    fn drop(&mut self) {
        self.room.calls.fetch_sub(1, Relaxed);
        self.room.bytes.fetch_sub(self.bytes, Relaxed);
    }
}
