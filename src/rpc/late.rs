//! Calls past their deadline: a late reply is counted, and delivered to a caller that asked for it.

use std::{
    collections::{HashMap, VecDeque},
    sync::{
        Arc,
        atomic::{
            AtomicUsize,
            Ordering::{Relaxed, SeqCst},
        },
    },
};

use foldhash::fast::RandomState;
use parking_lot::Mutex;

use super::{
    call_id::{CallId, CallerId},
    tables::PeerState,
};

/// Bounded in number (the oldest is dropped first) and time. One lock is enough: only calls that were too slow take it.
pub(super) struct LateCalls {
    limit: usize,
    /// Spares unmatched replies the lock while no call is late.
    len: AtomicUsize,
    table: Mutex<LateTable>,
}

#[derive(Default)]
struct LateTable {
    calls: HashMap<CallId, LateCall, RandomState>,
    /// By age. May hold ids of answered calls, up to as many again as there are calls.
    order: VecDeque<(u64, CallId)>,
}

pub(super) struct LateCall {
    pub(super) caller: Arc<PeerState>,
    /// None: the reply is only counted.
    pub(super) caller_id: Option<CallerId>,
    provider: Arc<PeerState>,
    until: u64,
}

impl LateCalls {
    pub(super) fn new(limit: usize) -> Self {
        LateCalls { limit, len: AtomicUsize::new(0), table: Mutex::default() }
    }

    pub(super) fn len(&self) -> usize {
        self.len.load(Relaxed)
    }

    /// Remembers a call until `until`, unless either connection is closed.
    pub(super) fn put(
        &self,
        id: CallId,
        until: u64,
        caller: Arc<PeerState>,
        caller_id: Option<CallerId>,
        provider: Arc<PeerState>,
    ) {
        let mut table = self.table.lock();
        // Counted before the check: a connection that closes from here on sees the count and calls `retain`.
        caller.late.fetch_add(1, SeqCst);
        provider.late.fetch_add(1, SeqCst);
        let call = LateCall { caller, caller_id, provider, until };
        if self.limit == 0 || call.caller.is_closed() || call.provider.is_closed() {
            return call.release();
        }
        while table.calls.len() >= self.limit {
            let Some((_, oldest)) = table.order.pop_front() else { break };
            table.remove(oldest);
        }
        if let Some(same) = table.calls.insert(id, call) {
            same.release();
        }
        table.order.push_back((until, id));
        if table.order.len() > 2 * table.calls.len() + 64 {
            let LateTable { calls, order } = &mut *table;
            order.retain(|(until, id)| calls.get(id).is_some_and(|call| call.until == *until));
        }
        self.len.store(table.calls.len(), Relaxed);
    }

    /// Removes the late call that `provider` answers with `id`.
    pub(super) fn take(&self, id: CallId, provider: &Arc<PeerState>) -> Option<LateCall> {
        if self.len() == 0 {
            return None;
        }
        let mut table = self.table.lock();
        if !Arc::ptr_eq(&table.calls.get(&id)?.provider, provider) {
            return None;
        }
        let call = table.remove(id);
        self.len.store(table.calls.len(), Relaxed);
        call
    }

    pub(super) fn sweep(&self, now: u64) {
        if self.len() == 0 {
            return;
        }
        let mut table = self.table.lock();
        while table.order.front().is_some_and(|(until, _)| *until <= now) {
            let Some((until, id)) = table.order.pop_front() else { break };
            if table.calls.get(&id).is_some_and(|call| call.until == until) {
                table.remove(id);
            }
        }
        self.len.store(table.calls.len(), Relaxed);
    }

    /// Removes the calls for which `keep` is false; all of them have to involve `conn`.
    pub(super) fn retain(&self, conn: &PeerState, mut keep: impl FnMut(CallId, &LateCall) -> bool) {
        if conn.late.load(SeqCst) == 0 {
            return;
        }
        let mut table = self.table.lock();
        table.calls.retain(|id, call| {
            let keep = keep(*id, call);
            if !keep {
                call.release();
            }
            keep
        });
        self.len.store(table.calls.len(), Relaxed);
    }
}

impl LateTable {
    fn remove(&mut self, id: CallId) -> Option<LateCall> {
        let call = self.calls.remove(&id);
        if let Some(call) = &call {
            call.release();
        }
        if self.calls.is_empty() {
            self.order.clear();
        }
        call
    }
}

impl LateCall {
    pub(super) fn provider(&self) -> &Arc<PeerState> {
        &self.provider
    }

    fn release(&self) {
        self.caller.late.fetch_sub(1, Relaxed);
        self.provider.late.fetch_sub(1, Relaxed);
    }
}
