//! Calls past their deadline whose reply may still come: counted, and delivered to callers that asked for it.

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

use super::pending::{CallId, CallerId, Conn};

/// Bounded in number (the oldest goes first) and time. One lock: it is only met by calls that were too slow.
pub(super) struct Late {
    limit: usize,
    /// Lets replies that match nothing pass without the lock while nothing is late.
    len: AtomicUsize,
    table: Mutex<Table>,
}

#[derive(Default)]
struct Table {
    calls: HashMap<CallId, LateCall, RandomState>,
    /// By age. Holds ids that are answered by now, at most as many again as there are calls.
    order: VecDeque<(u64, CallId)>,
}

pub(super) struct LateCall {
    pub caller: Arc<Conn>,
    /// None: only counted.
    pub tag: Option<CallerId>,
    provider: Arc<Conn>,
    until: u64,
}

impl Late {
    pub fn new(limit: usize) -> Self {
        Late { limit, len: AtomicUsize::new(0), table: Mutex::default() }
    }

    pub fn len(&self) -> usize {
        self.len.load(Relaxed)
    }

    /// Remembers until `until`, unless either side is gone already.
    pub fn put(&self, id: CallId, until: u64, caller: Arc<Conn>, tag: Option<CallerId>, provider: Arc<Conn>) {
        let mut table = self.table.lock();
        // Counted before looking: a connection that closes from here on sees the count, comes by and forgets.
        caller.late.fetch_add(1, SeqCst);
        provider.late.fetch_add(1, SeqCst);
        let call = LateCall { caller, tag, provider, until };
        if self.limit == 0 || call.caller.is_closed() || call.provider.is_closed() {
            return call.forget();
        }
        while table.calls.len() >= self.limit {
            let Some((_, oldest)) = table.order.pop_front() else { break };
            table.remove(oldest);
        }
        if let Some(same) = table.calls.insert(id, call) {
            same.forget();
        }
        table.order.push_back((until, id));
        if table.order.len() > 2 * table.calls.len() + 64 {
            let Table { calls, order } = &mut *table;
            order.retain(|(until, id)| calls.get(id).is_some_and(|call| call.until == *until));
        }
        self.len.store(table.calls.len(), Relaxed);
    }

    /// The call that `provider` answers with `id`.
    pub fn take(&self, id: CallId, provider: &Arc<Conn>) -> Option<LateCall> {
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

    pub fn sweep(&self, now: u64) {
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

    /// Forgets what `keep` does not want, for a connection that is concerned by some of it.
    pub fn retain(&self, conn: &Conn, mut keep: impl FnMut(CallId, &LateCall) -> bool) {
        if conn.late.load(SeqCst) == 0 {
            return;
        }
        let mut table = self.table.lock();
        table.calls.retain(|id, call| {
            let keep = keep(*id, call);
            if !keep {
                call.forget();
            }
            keep
        });
        self.len.store(table.calls.len(), Relaxed);
    }
}

impl Table {
    fn remove(&mut self, id: CallId) -> Option<LateCall> {
        let call = self.calls.remove(&id);
        if let Some(call) = &call {
            call.forget();
        }
        if self.calls.is_empty() {
            self.order.clear();
        }
        call
    }
}

impl LateCall {
    pub fn provider(&self) -> &Arc<Conn> {
        &self.provider
    }

    fn forget(&self) {
        self.caller.late.fetch_sub(1, Relaxed);
        self.provider.late.fetch_sub(1, Relaxed);
    }
}
