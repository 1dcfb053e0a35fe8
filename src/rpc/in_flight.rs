//! Calls in flight: what happens to a call in the table of its service and in the connection of its caller.

use std::sync::{Arc, atomic::Ordering::SeqCst};

use slab::Slab;

use super::{
    call::StoredRequest,
    call_id::CallId,
    peer::{Peer, PeerRoom},
    tables::{
        CallEntry, CallKey, CallPlace, CallTable, CallTarget, FinishedCall, InFlight, NO_ENTRY, PeerState, Provider,
        ServiceState,
    },
};
use crate::{cluster::NodeId, error::Executed};

/// A call that waited and has a provider now.
pub(super) struct DequeuedCall {
    pub(super) target: CallTarget,
    /// None: a notification.
    pub(super) entry: Option<CallKey>,
    pub(super) request: Box<StoredRequest>,
}

pub(super) struct ExpiredCall {
    pub(super) call: FinishedCall,
    /// Milliseconds.
    pub(super) timeout: u32,
    pub(super) cause: ExpiryCause,
}

pub(super) enum ExpiryCause {
    /// Written, and not answered in time.
    Unanswered { provider: Arc<PeerState>, id: CallId },
    /// Waited until its own deadline.
    Unwritten,
    /// Waited as long as calls wait for a provider. `busy`: there is one by now, but it takes no more calls.
    NoProvider { busy: bool },
}

// === impl PeerState ===

impl PeerState {
    /// Capacity that an idle connection keeps, in calls.
    const KEPT_CAPACITY: usize = 64;

    pub(super) fn new(peer: Arc<dyn Peer>, max_calls: usize, node: Option<NodeId>) -> Self {
        PeerState {
            peer,
            max_calls,
            node,
            in_flight: Default::default(),
            provides: Default::default(),
            held_by: Default::default(),
            late: Default::default(),
            closed: Default::default(),
        }
    }

    /// Takes the right to answer a call. None: it was taken before.
    pub(super) fn take(&self, at: u32, seq: u64) -> Option<InFlight> {
        let mut in_flight = self.in_flight.lock();
        if in_flight.get(at as usize).is_none_or(|call| call.seq != seq) {
            return None;
        }
        let call = in_flight.remove(at as usize);
        if in_flight.is_empty() && in_flight.capacity() > Self::KEPT_CAPACITY {
            *in_flight = Slab::new();
        }
        Some(call)
    }

    /// Takes the right to answer all calls for which `which` is true.
    pub(super) fn take_all(&self, which: impl Fn(&InFlight) -> bool) -> Vec<InFlight> {
        let mut in_flight = self.in_flight.lock();
        let found: Vec<usize> = in_flight.iter().filter(|(_, call)| which(call)).map(|(at, _)| at).collect();
        found.into_iter().map(|at| in_flight.remove(at)).collect()
    }

    /// Whether this is the link to another node. The calls of a node are counted there.
    pub(super) fn is_link(&self) -> bool {
        self.node.is_some()
    }

    /// Records that a reply of this connection has filled up `caller`.
    pub(super) fn hold_back(&self, room: PeerRoom, caller: &Arc<PeerState>) {
        if room == PeerRoom::Full {
            *self.held_by.lock() = Some(Arc::downgrade(caller));
        }
    }

    pub(super) fn is_closed(&self) -> bool {
        self.closed.load(SeqCst)
    }
}

// === impl CallTable ===

impl CallTable {
    /// Whether new calls have to queue up.
    pub(super) fn is_queued(&self) -> bool {
        self.flushing || self.waiting > 0
    }

    pub(super) fn has_room(&self) -> bool {
        self.entries.vacant_key() < CallId::ENTRIES
    }

    /// Calls with a provider.
    pub(super) fn in_flight(&self) -> usize {
        self.entries.len() - self.waiting
    }

    /// Whether another node made this call: it goes to a provider of this node only, and does not wait.
    pub(super) fn is_of_link(&self, index: u32) -> bool {
        self.entries.get(index as usize).and_then(|entry| entry.caller.as_ref()).is_some_and(|(conn, _)| conn.is_link())
    }

    /// The call, unless it is over and its entry free or in use again.
    fn get(&self, index: u32, seq: u64) -> Option<&CallEntry> {
        self.entries.get(index as usize).filter(|entry| entry.seq == seq)
    }

    pub(super) fn remove(&mut self, index: u32) -> Option<FinishedCall> {
        self.entries.remove(index as usize).finished()
    }

    /// Lets a call wait until `due`, behind all others.
    pub(super) fn enqueue(&mut self, call: CallEntry, due: u64, request: Box<StoredRequest>) -> u32 {
        let seq = call.seq;
        let index = self.entries.insert(call) as u32;
        self.wait(index, due, request);
        self.queue.push_back((index, seq));
        index
    }

    /// Lets a call wait that had a provider before: ahead of all calls that are newer.
    pub(super) fn requeue(&mut self, index: u32, due: u64, request: Box<StoredRequest>) {
        let seq = self.wait(index, due, request);
        let newer = |(_, other): &CallKey| (other.wrapping_sub(seq) as i64) > 0;
        let at = self.queue.iter().position(newer).unwrap_or(self.queue.len());
        self.queue.insert(at, (index, seq));
    }

    fn wait(&mut self, index: u32, due: u64, request: Box<StoredRequest>) -> u64 {
        let entry = &mut self.entries[index as usize];
        entry.due = due.min(entry.deadline);
        entry.place = CallPlace::Waiting(request);
        let (due, seq) = (entry.due, entry.seq);
        self.waiting += 1;
        self.earliest_due = self.earliest_due.min(due);
        // Cancelled calls leave their ids in the queue, and a caller must not be able to fill it with them.
        if self.queue.len() > 2 * self.waiting + 64 {
            let entries = &self.entries;
            self.queue.retain(|(index, seq)| entries.get(*index as usize).is_some_and(|entry| entry.is_waiting(*seq)));
        }
        seq
    }

    /// Claims the right to write what waits. False: another thread has it, or nothing waits.
    pub(super) fn begin_flush(&mut self) -> bool {
        let begin = !self.flushing && self.waiting > 0;
        self.flushing |= begin;
        begin
    }

    /// Indices of the calls that are due, which the caller has to remove. Visits the table only if one may be due.
    fn take_due(&mut self, now: u64) -> Vec<u32> {
        let mut due = Vec::new();
        if now >= self.earliest_due {
            self.earliest_due = u64::MAX;
            for (index, entry) in &self.entries {
                if entry.due <= now {
                    due.push(index as u32);
                } else {
                    self.earliest_due = self.earliest_due.min(entry.due);
                }
            }
        }
        due
    }
}

impl CallEntry {
    /// A call that is neither placed nor queued yet.
    pub(super) fn new(seq: u64, caller: Option<(Arc<PeerState>, u32)>, deadline: u64, timeout: u32) -> Self {
        CallEntry { seq, caller, due: deadline, deadline, timeout, place: CallPlace::Nowhere }
    }

    pub(super) fn is_waiting(&self, seq: u64) -> bool {
        self.seq == seq && matches!(self.place, CallPlace::Waiting(_))
    }

    pub(super) fn finished(self) -> Option<FinishedCall> {
        let seq = self.seq;
        self.caller.map(|(caller, at)| FinishedCall { caller, at, seq })
    }

    fn provider(&self) -> Option<u32> {
        match self.place {
            CallPlace::With { provider, .. } => Some(provider),
            _ => None,
        }
    }
}

// === impl ServiceState: calls ===

impl ServiceState {
    /// Adds a call and places it with `provider`.
    pub(super) fn place_new(&mut self, call: CallEntry, provider: u32) -> (u32, CallTarget) {
        let index = self.calls.entries.insert(call) as u32;
        (index, self.place(index, provider))
    }

    /// Places a call that is with no provider and does not wait.
    pub(super) fn place(&mut self, index: u32, provider: u32) -> CallTarget {
        self.attach(index, provider);
        let CallEntry { seq, deadline, .. } = self.calls.entries[index as usize];
        let id = Some(self.call_id(seq, index, provider));
        CallTarget { id, deadline, ..self.target(provider) }
    }

    /// Where a notification for `provider` is written to; it leaves no trace in the tables.
    pub(super) fn target(&self, provider: u32) -> CallTarget {
        let Provider { conn, names, meta, fence, .. } = &self.providers.all[provider as usize];
        let (conn, names, meta, fence) = (conn.clone(), *names, *meta, *fence);
        CallTarget { conn, provider, id: None, names, meta, fence, deadline: 0, rev: self.providers.rev(provider) }
    }

    fn call_id(&self, seq: u64, index: u32, provider: u32) -> CallId {
        let provider = &self.providers.all[provider as usize];
        // A link has more slots than fit into an id, and finds its services by name.
        CallId::new(seq, index, if provider.remote.is_some() { 0 } else { provider.slot as u16 })
    }

    /// Takes a call that could not be written from its provider. It has to be placed, requeued or removed before the lock
    /// is released. False: it was finished meanwhile.
    pub(super) fn take_back(&mut self, index: u32, seq: u64) -> bool {
        let Some(entry) = self.calls.get(index, seq) else { return false };
        let provider = entry.provider();
        self.detach(index);
        if let Some(provider) = provider {
            // It may have been withdrawn meanwhile, and have had no other call.
            self.close_if_done(provider);
        }
        true
    }

    /// Ends a call with the reply of `conn`. None: `conn` does not have that call.
    pub(super) fn finish(&mut self, id: CallId, conn: &Arc<PeerState>) -> Option<FinishedCall> {
        let (provider, _) = self.find_call(id, conn)?;
        self.detach(id.index());
        let finished = self.calls.remove(id.index());
        self.effects.capacity_freed |= self.calls.waiting > 0;
        self.close_if_done(provider);
        finished
    }

    /// The key of `conn` and the number of its call `id`.
    pub(super) fn find_call(&self, id: CallId, conn: &Arc<PeerState>) -> Option<(u32, u64)> {
        let entry = self.calls.entries.get(id.index() as usize)?;
        let provider = entry.provider()?;
        (id.has_seq(entry.seq) && self.providers.is_of(provider, conn)).then_some((provider, entry.seq))
    }

    /// Ends a call for which its caller no longer waits. Returns whether it may have been executed, and its provider if that
    /// has to be notified.
    pub(super) fn abandon(&mut self, index: u32, seq: u64) -> (Executed, Option<(Arc<PeerState>, CallId)>) {
        let Some(entry) = self.calls.get(index, seq) else { return (Executed::Maybe, None) };
        let provider = entry.provider();
        self.detach(index);
        self.calls.entries.remove(index as usize);
        let Some(key) = provider else { return (Executed::No, None) };
        let Provider { conn, meta, .. } = &self.providers.all[key as usize];
        let notify = meta.then(|| (conn.clone(), self.call_id(seq, index, key)));
        self.effects.capacity_freed |= self.calls.waiting > 0;
        self.close_if_done(key);
        (Executed::Maybe, notify)
    }

    /// Removes the calls that are due.
    ///
    /// Their provider's slots are free from then on, though it may still work on the calls: otherwise a provider that
    /// leaves calls unanswered would run out of slots for good.
    pub(super) fn expire(&mut self, now: u64) -> Vec<ExpiredCall> {
        let due = self.calls.take_due(now);
        if due.is_empty() {
            return Vec::new();
        }
        let mut expired = Vec::with_capacity(due.len());
        let busy = self.has_active(false);
        for index in due {
            let CallEntry { seq, deadline, timeout, .. } = self.calls.entries[index as usize];
            let provider = self.calls.entries[index as usize].provider();
            self.detach(index);
            let finished = self.calls.remove(index);
            let cause = match provider {
                Some(key) => {
                    let conn = self.providers.all[key as usize].conn.clone();
                    let cause = ExpiryCause::Unanswered { provider: conn, id: self.call_id(seq, index, key) };
                    self.close_if_done(key);
                    cause
                }
                None if deadline <= now => ExpiryCause::Unwritten,
                None => ExpiryCause::NoProvider { busy },
            };
            expired.extend(finished.map(|call| ExpiredCall { call, timeout, cause }));
        }
        self.effects.capacity_freed |= self.calls.waiting > 0;
        if self.calls.entries.is_empty() && self.calls.entries.capacity() > 1_024 {
            self.calls.entries = Slab::new();
        }
        expired
    }

    /// Places the next waiting call. None: nothing waits or no provider is free, and the flush is over.
    pub(super) fn next_waiting(&mut self, now: u64) -> Option<DequeuedCall> {
        while let Some((index, seq)) = self.calls.queue.pop_front() {
            let Some(entry) = self.calls.get(index, seq).filter(|entry| entry.is_waiting(seq)) else { continue };
            let is_call = entry.caller.is_some();
            let Some(provider) = self.pick(&[], !is_call, false, now) else {
                self.calls.queue.push_front((index, seq));
                break;
            };
            let Some(request) = self.detach(index) else { continue };
            if !is_call {
                self.calls.entries.remove(index as usize);
                return Some(DequeuedCall { target: self.target(provider), entry: None, request });
            }
            let target = self.place(index, provider);
            return Some(DequeuedCall { target, entry: Some((index, seq)), request });
        }
        self.calls.flushing = false;
        None
    }

    fn attach(&mut self, index: u32, key: u32) {
        let provider = &mut self.providers.all[key as usize];
        let head = std::mem::replace(&mut provider.head, index);
        provider.in_flight += 1;
        let CallTable { entries, earliest_due, .. } = &mut self.calls;
        let entry = &mut entries[index as usize];
        entry.due = entry.deadline;
        entry.place = CallPlace::With { provider: key, previous: NO_ENTRY, next: head };
        *earliest_due = (*earliest_due).min(entry.due);
        if let Some(CallEntry { place: CallPlace::With { previous, .. }, .. }) = entries.get_mut(head as usize) {
            *previous = index;
        }
    }

    /// Takes a call from its provider or out of the queue.
    fn detach(&mut self, index: u32) -> Option<Box<StoredRequest>> {
        let calls = &mut self.calls;
        match std::mem::replace(&mut calls.entries[index as usize].place, CallPlace::Nowhere) {
            CallPlace::With { provider, previous, next } => {
                let provider = &mut self.providers.all[provider as usize];
                provider.in_flight -= 1;
                match calls.entries.get_mut(previous as usize) {
                    Some(CallEntry { place: CallPlace::With { next: of_previous, .. }, .. }) => *of_previous = next,
                    _ => provider.head = next,
                }
                if let Some(CallEntry { place: CallPlace::With { previous: of_next, .. }, .. }) =
                    calls.entries.get_mut(next as usize)
                {
                    *of_next = previous;
                }
                None
            }
            CallPlace::Waiting(request) => {
                calls.waiting -= 1;
                if calls.waiting == 0 && !calls.flushing {
                    calls.queue.clear();
                }
                Some(request)
            }
            CallPlace::Nowhere => None,
        }
    }
}
