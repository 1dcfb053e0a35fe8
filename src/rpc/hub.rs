//! The [`Hub`], and the life of a call from top to bottom: it is made, placed with a provider or queued, written, rerouted
//! if the provider did not take it, answered or abandoned, or found overdue.

use std::{
    ops::{Deref, DerefMut},
    sync::{
        Arc,
        atomic::{AtomicU64, AtomicUsize, Ordering::Relaxed},
    },
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use parking_lot::MutexGuard;
use serde_json::value::{RawValue, to_raw_value};
use tokio::sync::watch;

use super::{
    call::{Call, CallRequest, WaitPermit, WaitingRoom},
    call_id::{CallId, CallerId},
    changes::UnpublishedChange,
    in_flight::{DequeuedCall, ExpiredCall, ExpiryCause},
    late::LateCalls,
    name_queries::NameQueries,
    peer::{CallAnswer, CallMeta, ForwardedCall, PeerRoom, RelayInfo, WriteOutcome},
    registry::ServiceRegistry,
    service::ServiceInfo,
    tables::{
        CallEntry, CallKey, CallTarget, Effects, FinishedCall, InFlight, PeerState, RemovedProvider, ServiceEntry,
        ServiceState,
    },
};
use crate::{
    channel::check_label,
    cluster::{Cluster, MonotonicClock, NodeId},
    config::Config,
    duration,
    error::{Code, Error, Executed, Result},
    metrics::{CallOutcome, Metrics},
};

/// Sizes of the hub's tables, for tests and metrics.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct HubCounts {
    pub connections: usize,
    /// Services that have a provider.
    pub services: usize,
    pub providers: usize,
    /// Calls written to a provider and not answered.
    pub pending: usize,
    /// Calls that wait for a provider.
    pub waiting: usize,
    /// Calls past their deadline that accept a late reply.
    pub late: usize,
    /// Names in the registry: services that have a provider, or had one within the last minute.
    pub names: usize,
    /// Services that had a provider within the last minute, or that the list is about to forget.
    pub remembered: usize,
    /// Services whose name this node holds in the cluster.
    pub leased: usize,
    /// Queries to other nodes whether the holder of a name is alive.
    pub queries: usize,
}

/// The effect of a reply.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ReplyOutcome {
    Answered,
    /// After the deadline; delivered if the caller asked for that.
    Late,
    /// No call waits for it: cancelled, unknown, or placed with another provider.
    Unmatched,
}

/// Connects callers with providers; see the [module](super). Shared as an `Arc`.
pub struct Hub {
    pub(super) config: Arc<Config>,
    pub(super) clock: MonotonicClock,
    pub(super) cluster: Arc<dyn Cluster>,
    pub(super) metrics: Arc<Metrics>,
    pub(super) registry: ServiceRegistry,
    pub(super) late: LateCalls,
    pub(super) name_queries: NameQueries,
    /// Changed by every sweep, for tasks that wait by the hub's clock.
    pub(super) sweeps: watch::Sender<usize>,
    pub(super) connections: AtomicUsize,
    /// Numbers calls; starts at random, so that a reply to a former process matches nothing.
    seq: AtomicU64,
    waiting_room: Arc<WaitingRoom>,
}

/// A call that left the tables and has to be answered with an error.
pub(super) type FailedCall = (FinishedCall, Error);

/// A call or notification on its way to a provider.
pub(super) struct CallRoute<'a> {
    pub(super) service: &'a Arc<ServiceEntry>,
    pub(super) request: &'a CallRequest<'a>,
    /// None: a notification.
    pub(super) entry: Option<CallKey>,
    /// Providers that did not take it.
    pub(super) tried: Vec<u32>,
    /// Other nodes that rejected it.
    pub(super) rejected_by: Vec<NodeId>,
}

/// Why a provider did not take a call.
pub(super) enum NotDelivered {
    Full,
    Gone,
    /// The node has no provider. `rev`: of the advertisement by which it was chosen.
    NoProvider {
        rev: u64,
    },
}

/// A service under its lock. Dropping it updates the registry and releases the lock, and then does what follows from the
/// changes: it frees the slots of removed providers, fails their calls, writes waiting calls and forgets unused names.
pub(super) struct ServiceEdit<'h, 's> {
    hub: &'h Hub,
    service: &'s Arc<ServiceEntry>,
    /// None: unlocked.
    state: Option<MutexGuard<'s, ServiceState>>,
}

/// The work that follows from an edit, done on drop. No lock may be held then.
#[must_use = "dropping it does what follows from the edit"]
pub(super) struct FollowUp<'h> {
    hub: &'h Hub,
    work: Option<FollowUpWork>,
}

/// The service, the effects on it, and whether it is to be removed from the registry.
type FollowUpWork = (Arc<ServiceEntry>, Effects, bool);

// === impl Hub: what app and transports use ===

impl Hub {
    /// The service that the hub itself provides.
    const BUILT_IN: &'static str = "weir";

    pub fn new(
        config: Arc<Config>,
        clock: MonotonicClock,
        cluster: Arc<dyn Cluster>,
        metrics: Arc<Metrics>,
    ) -> Arc<Self> {
        Arc::new(Hub {
            late: LateCalls::new(config.limits.late),
            config,
            clock,
            cluster,
            metrics,
            registry: ServiceRegistry::default(),
            name_queries: NameQueries::default(),
            sweeps: watch::Sender::new(0),
            connections: AtomicUsize::new(0),
            seq: AtomicU64::new(fastrand::u64(..)),
            waiting_room: Arc::default(),
        })
    }

    /// Services whose name begins with `prefix` and that have a provider, at most `limit`, by name.
    pub fn services(&self, prefix: &str, limit: usize) -> Vec<ServiceInfo> {
        let found = self.registry.list(prefix);
        let mut infos: Vec<_> = found.iter().filter_map(|service| service.info()).take(limit).collect();
        if Self::BUILT_IN.starts_with(prefix) {
            let at = infos.partition_point(|info| info.service.as_str() < Self::BUILT_IN);
            let built_in = ServiceInfo {
                service: Self::BUILT_IN.into(),
                providers: 1,
                in_flight: 0,
                exclusive: true,
                methods: vec!["echo".into(), "time".into()],
            };
            infos.insert(at, built_in);
            infos.truncate(limit);
        }
        infos
    }

    /// Waits for changes of the providers of services: one entry per service, however often it changed. For one task; of
    /// several nodes only the leader receives them.
    pub async fn next_changes(&self) -> Vec<UnpublishedChange> {
        loop {
            let changes = self.take_changes();
            if !changes.is_empty() {
                return changes;
            }
            self.registry.changes.ready().await;
        }
    }

    /// The changes that this node has to publish now.
    pub fn take_changes(&self) -> Vec<UnpublishedChange> {
        self.registry.changes.take(self.cluster.is_leader(), self.clock.now())
    }

    pub fn counts(&self) -> HubCounts {
        let services = self.registry.list("");
        let mut counts = HubCounts {
            connections: self.connections.load(Relaxed),
            services: self.registry.provided(),
            late: self.late.len(),
            names: services.len(),
            remembered: self.registry.remembered(),
            leased: self.registry.leased(),
            queries: self.name_queries.len(),
            ..HubCounts::default()
        };
        for service in services {
            let state = service.state.lock();
            counts.providers += state.providers.count_local();
            counts.pending += state.calls.in_flight();
            counts.waiting += state.calls.waiting;
        }
        counts
    }

    /// Panics if the tables contradict each other. For tests.
    pub fn assert_consistent(&self) {
        self.registry.list("").iter().for_each(|service| service.state.lock().assert_consistent());
    }

    pub(crate) fn update_gauges(&self) {
        let HubCounts { services, providers, pending, waiting, .. } = self.counts();
        self.metrics.services.set(services as i64);
        self.metrics.providers.set(providers as i64);
        self.metrics.calls_in_flight.set((pending + waiting) as i64);
    }

    pub(super) fn next_seq(&self) -> u64 {
        self.seq.fetch_add(1, Relaxed)
    }

    /// Locks a service in order to change it.
    #[inline]
    pub(super) fn edit<'h, 's>(&'h self, service: &'s Arc<ServiceEntry>) -> ServiceEdit<'h, 's> {
        ServiceEdit { hub: self, service, state: Some(service.state.lock()) }
    }
}

// === impl Hub: one call ===

impl Hub {
    /// Makes a call of `conn`, which is answered once, perhaps before this returns.
    pub(super) fn call(&self, conn: &Arc<PeerState>, caller_id: CallerId, call: &Call<'_>) {
        if let Err((caller_id, error)) = self.try_call(conn, caller_id, call) {
            self.metrics.call_ended(error.code().into(), 0);
            conn.peer.answer(&caller_id, CallAnswer::Failed(error));
        }
    }

    fn try_call(
        &self,
        conn: &Arc<PeerState>,
        mut caller_id: CallerId,
        call: &Call<'_>,
    ) -> Result<(), (CallerId, Error)> {
        let timeout = match self.check(call) {
            Ok(timeout) => timeout,
            Err(error) => return Err((caller_id, error)),
        };
        if call.service == Self::BUILT_IN {
            return self.call_built_in(conn, caller_id, call);
        }
        let request = CallRequest::new(call);
        loop {
            let service = match self.find_for(call.service, &request) {
                Ok(service) => service,
                Err(error) => return Err((caller_id, error)),
            };
            match self.enter(conn, &service, caller_id, timeout, &request) {
                Ok(None) => return Ok(()),
                Ok(Some((call, error))) => {
                    self.settle(&call, CallAnswer::Failed(error));
                    return Ok(());
                }
                Err((caller_id, Some(error))) => return Err((caller_id, error)),
                Err((returned, None)) => caller_id = returned,
            }
        }
    }

    /// Rejects what cannot be called. Returns the timeout in milliseconds.
    fn check(&self, call: &Call<'_>) -> Result<u32> {
        if call.as_sent.is_none() {
            check_label("method", call.method)?;
        }
        let max = self.config.rpc.max_timeout;
        let timeout = call.timeout.unwrap_or_else(|| self.config.rpc.timeout.min(max));
        if timeout > max || call.wait.is_some_and(|wait| wait > max) {
            return Err(Error::params(format!("timeout and wait are at most {}", duration::format(max))));
        }
        if timeout < Duration::from_millis(1) {
            return Err(Error::params("a timeout is at least 1ms"));
        }
        Ok(u32::try_from(timeout.as_millis()).unwrap_or(u32::MAX))
    }

    fn call_built_in(&self, conn: &PeerState, caller_id: CallerId, call: &Call<'_>) -> Result<(), (CallerId, Error)> {
        let time;
        let result = match call.method {
            "echo" => call.params.unwrap_or(RawValue::NULL),
            "time" => {
                time = wall_clock();
                &time
            }
            method => {
                let detail = format!("the service weir has no method {method}, only echo and time");
                return Err((caller_id, Error::new(Code::MethodNotFound, detail)));
            }
        };
        self.metrics.call_ended(CallOutcome::Ok, 0);
        conn.peer.answer(&caller_id, CallAnswer::Result(result));
        Ok(())
    }

    /// The service of a call. One that never had a provider is created only if the call is ready to wait for it.
    fn find_for(&self, name: &str, request: &CallRequest<'_>) -> Result<Arc<ServiceEntry>> {
        if let Some(service) = self.registry.find(name) {
            return Ok(service);
        }
        check_label("service", name)?;
        match request.wait {
            Some(1..) => Ok(self.registry.find_or_create(name)),
            _ => Err(no_provider(name)),
        }
    }

    /// Enters a call into the tables and writes it to a provider, or queues it.
    ///
    /// # Errors
    /// The call is not in the tables. Without an error: `service` was removed from the registry and has to be looked up
    /// again.
    #[inline]
    pub(super) fn enter(
        &self,
        conn: &Arc<PeerState>,
        service: &Arc<ServiceEntry>,
        caller_id: CallerId,
        timeout: u32,
        request: &CallRequest<'_>,
    ) -> Result<Option<FailedCall>, (CallerId, Option<Error>)> {
        let started = self.clock.micros();
        let now = started / 1_000;
        // Declared first to be dropped last: nothing may follow from the edit under the connection's lock.
        let mut state;
        let mut in_flight = conn.in_flight.lock();
        if in_flight.len() >= conn.max_calls {
            let detail = format!("{} calls of this connection are in flight, which is the limit", in_flight.len());
            // An edit removes a service that was created only for this call.
            drop(in_flight);
            drop(self.edit(service));
            return Err((caller_id, Some(Error::new(Code::LimitReached, detail).with("limit", "limits.calls"))));
        }
        let vacant = in_flight.vacant_entry();
        state = self.edit(service);
        if state.marks.dead {
            return Err((caller_id, None));
        }
        // A call of another node is for a provider of this node and does not wait.
        let local = conn.is_link();
        let chosen = match state.calls.is_queued() && !local {
            true => None,
            false => state.pick(&[], false, local, now),
        };
        let full = || state.has_active(local) && (local || !state.calls.flushing);
        if chosen.is_none() && full() || !state.calls.has_room() {
            return Err((caller_id, Some(busy(&service.name))));
        }
        if chosen.is_none() && local {
            return Err((caller_id, Some(no_provider(&service.name))));
        }
        let seq = self.next_seq();
        let caller = Some((conn.clone(), vacant.key() as u32));
        let new = CallEntry::new(seq, caller, now + u64::from(timeout), timeout);
        let (index, target) = match chosen {
            Some(provider) => {
                let (index, target) = state.place_new(new, provider);
                (index, Some(target))
            }
            None => match self.may_wait(&service.name, &state, request) {
                Ok((until, permit)) => (state.calls.enqueue(new, until, request.store(permit)), None),
                Err(error) => return Err((caller_id, Some(error))),
            },
        };
        let follow_up = state.unlock();
        // Not too late: an answer needs the lock of `in_flight` first.
        vacant.insert(InFlight { caller_id, service: service.clone(), index, seq, started, late: request.late });
        drop(in_flight);
        drop(follow_up);
        let Some(target) = target else { return Ok(None) };
        Ok(self.try_deliver(&mut CallRoute::new(service, request, Some((index, seq))), target))
    }

    /// Sends a notification to one provider, even if that is at its concurrency.
    pub(super) fn notify(&self, call: &Call<'_>) {
        if self.check(call).is_err() || call.service == Self::BUILT_IN {
            return;
        }
        let request = CallRequest::new(call);
        loop {
            let Ok(service) = self.find_for(call.service, &request) else { return };
            let now = self.clock.now();
            let mut state = self.edit(&service);
            if state.marks.dead {
                continue;
            }
            let chosen = if state.calls.is_queued() { None } else { state.pick(&[], true, false, now) };
            let Some(provider) = chosen else {
                self.queue_notification(&service.name, &mut state, &request);
                return;
            };
            let target = state.target(provider);
            drop(state);
            return self.deliver(&service, target, &request, None);
        }
    }

    /// Until when a call may wait for a provider, and its permit; or why it may not.
    fn may_wait(&self, name: &str, state: &ServiceState, request: &CallRequest<'_>) -> Result<(u64, WaitPermit)> {
        let now = self.clock.now();
        let default = self.config.rpc.wait_for_provider.as_millis() as u64;
        let until = match request.wait {
            Some(wait) if wait > 0 => now + wait,
            None if default > 0 && ServiceRegistry::is_expected(state, now) => now + default,
            _ => return Err(no_provider(name)),
        };
        let limits = &self.config.limits;
        let permit = self.waiting_room.acquire(request.bytes(), limits.waiting, limits.waiting_bytes);
        Ok((until, permit.ok_or_else(|| no_provider(name).with("limit", "limits.waiting"))?))
    }

    /// Lets a notification wait for a provider, or drops it.
    fn queue_notification(&self, name: &str, state: &mut ServiceState, request: &CallRequest<'_>) {
        if let Ok((until, permit)) = self.may_wait(name, state, request) {
            let call = CallEntry::new(self.next_seq(), None, until, 0);
            state.calls.enqueue(call, until, request.store(permit));
        }
    }

    /// Writes a call that is placed, and fails it if no provider takes it.
    pub(super) fn deliver(
        &self,
        service: &Arc<ServiceEntry>,
        target: CallTarget,
        request: &CallRequest<'_>,
        entry: Option<CallKey>,
    ) {
        if let Some((call, error)) = self.try_deliver(&mut CallRoute::new(service, request, entry), target) {
            self.settle(&call, CallAnswer::Failed(error));
        }
    }

    /// Writes a call that is placed, and reroutes it until a provider takes it. Returns a call that none takes.
    pub(super) fn try_deliver(&self, route: &mut CallRoute<'_>, mut target: CallTarget) -> Option<FailedCall> {
        loop {
            let CallRoute { service, request, .. } = *route;
            let meta = target.meta.then(|| CallMeta {
                caller: request.caller,
                deadline_ms: target.id.map(|_| target.deadline.saturating_sub(self.clock.now())),
                traceparent: request.traceparent,
                fence: target.fence,
            });
            let written = target.conn.peer.call(&ForwardedCall {
                id: target.id,
                service: &service.name,
                method: request.method,
                names: target.names,
                params: request.params,
                as_sent: request.as_sent,
                meta,
                relay: RelayInfo { wait: request.wait, late: request.late, rev: target.rev, tried: &route.rejected_by },
            });
            let cause = match written {
                WriteOutcome::Written => return None,
                WriteOutcome::Full => NotDelivered::Full,
                WriteOutcome::Gone => NotDelivered::Gone,
            };
            match self.reroute(route, &target.conn, target.provider, cause) {
                Ok(Some(next)) => target = next,
                Ok(None) => return None,
                Err(failed) => return Some(failed),
            }
        }
    }

    /// Looks for another provider for a call that surely no provider has received. None: it waits, or is finished.
    ///
    /// # Errors
    /// It can neither be placed nor wait, and has left the tables.
    pub(super) fn reroute(
        &self,
        route: &mut CallRoute<'_>,
        conn: &Arc<PeerState>,
        provider: u32,
        cause: NotDelivered,
    ) -> Result<Option<CallTarget>, FailedCall> {
        let CallRoute { service, request, entry, .. } = *route;
        let now = self.clock.now();
        let mut state = self.edit(service);
        if let Some((index, seq)) = entry
            && !state.take_back(index, seq)
        {
            // Finished while it was being written: cancelled, overdue, or its provider was removed.
            return Ok(None);
        }
        match cause {
            NotDelivered::Full => route.tried.push(provider),
            NotDelivered::Gone => state.remove_conn(provider, conn),
            NotDelivered::NoProvider { rev } => state.unset_remote(conn, Some(rev)),
        }
        // Whether the call may wait depends on when the last provider left.
        state.update();
        let local = entry.is_some_and(|(index, _)| state.calls.is_of_link(index));
        match (state.pick(&route.tried, entry.is_none(), local, now), entry) {
            (Some(provider), Some((index, _))) => Ok(Some(state.place(index, provider))),
            (Some(provider), None) => Ok(Some(state.target(provider))),
            (None, Some((index, _))) => {
                let wait = match state.has_active(local) {
                    // All of them were tried: a call that waited for them would be tried for ever.
                    true => Err(busy(&service.name)),
                    false if local => Err(no_provider(&service.name)),
                    false => self.may_wait(&service.name, &state, request),
                };
                match wait {
                    Ok((until, permit)) => state.calls.requeue(index, until, request.store(permit)),
                    Err(error) => return state.calls.remove(index).map_or(Ok(None), |call| Err((call, error))),
                }
                Ok(None)
            }
            (None, None) => {
                if !state.has_active(false) {
                    self.queue_notification(&service.name, &mut state, request);
                }
                Ok(None)
            }
        }
    }

    /// Writes waiting calls, in order, while there is a provider for them.
    pub(super) fn flush(&self, service: &Arc<ServiceEntry>) {
        if !service.state.lock().calls.begin_flush() {
            return;
        }
        loop {
            // A statement of its own: the lock must not be held in the rest of the loop, which calls peers.
            let next = service.state.lock().next_waiting(self.clock.now());
            let Some(DequeuedCall { target, entry, request }) = next else { return };
            self.deliver(service, target, &request.request(), entry);
        }
    }

    /// A provider's reply.
    pub(super) fn reply(&self, conn: &Arc<PeerState>, id: CallId, answer: CallAnswer<'_>) -> ReplyOutcome {
        let provides = conn.provides.lock();
        let finished = provides.get(id.slot()).and_then(|slot| self.finish(&slot.service, conn, id, None));
        drop(provides);
        self.finish_reply(conn, id, answer, finished)
    }

    /// The reply of another node, which names the service: a node has more services than an id has slots.
    pub(super) fn reply_from_node(
        &self,
        conn: &Arc<PeerState>,
        service: &Arc<ServiceEntry>,
        id: CallId,
        load: u64,
        answer: CallAnswer<'_>,
    ) -> ReplyOutcome {
        let finished = self.finish(service, conn, id, Some(load));
        self.finish_reply(conn, id, answer, finished)
    }

    /// Ends a call that `conn` has. `load`: that the node at the other end of `conn` reports.
    #[inline]
    fn finish(
        &self,
        service: &Arc<ServiceEntry>,
        conn: &Arc<PeerState>,
        id: CallId,
        load: Option<u64>,
    ) -> Option<(FinishedCall, FollowUp<'_>)> {
        let mut state = self.edit(service);
        let finished = state.finish(id, conn);
        if let Some(load) = load {
            state.providers.record_load(conn, u32::try_from(load).unwrap_or(u32::MAX), self.clock.now());
        }
        Some((finished?, state.unlock()))
    }

    #[inline]
    fn finish_reply(
        &self,
        conn: &Arc<PeerState>,
        id: CallId,
        answer: CallAnswer<'_>,
        finished: Option<(FinishedCall, FollowUp<'_>)>,
    ) -> ReplyOutcome {
        if let Some((call, _follow_up)) = finished {
            return match self.settle(&call, answer) {
                None => ReplyOutcome::Unmatched,
                Some(room) => {
                    conn.hold_back(room, &call.caller);
                    ReplyOutcome::Answered
                }
            };
        }
        let Some(call) = self.late.take(id, conn) else { return ReplyOutcome::Unmatched };
        if !conn.is_link() {
            // Counted on the node of the provider, wherever the caller is.
            self.metrics.calls_late.add(1);
        }
        if let Some(caller_id) = &call.caller_id {
            conn.hold_back(call.caller.peer.late(caller_id, answer), &call.caller);
        }
        ReplyOutcome::Late
    }

    /// Answers a call. None: it was answered before.
    pub(super) fn settle(&self, call: &FinishedCall, answer: CallAnswer<'_>) -> Option<PeerRoom> {
        let in_flight = call.caller.take(call.at, call.seq)?;
        self.record(&call.caller, &in_flight, outcome(&answer));
        Some(call.caller.peer.answer(&in_flight.caller_id, answer))
    }

    /// Counts a call that is about to be answered.
    pub(super) fn record(&self, caller: &PeerState, call: &InFlight, outcome: CallOutcome) {
        if caller.is_link() {
            // Counted on the caller's node.
            return;
        }
        self.metrics.call_ended(outcome, self.clock.micros().saturating_sub(call.started));
    }

    /// Removes a call whose [`InFlight`] was taken. Returns whether it may have been executed.
    pub(super) fn abandon(&self, call: &InFlight) -> Executed {
        let mut state = self.edit(&call.service);
        let (executed, notify) = state.abandon(call.index, call.seq);
        let _follow_up = state.unlock();
        if let Some((provider, id)) = notify {
            provider.peer.cancel(id);
        }
        executed
    }

    /// Answers a call that is overdue.
    fn expire(&self, service: &ServiceEntry, expired: ExpiredCall, now: u64) {
        let ExpiredCall { call, timeout, cause } = expired;
        let name = &service.name;
        let timeout = || duration::format(Duration::from_millis(u64::from(timeout)));
        let (error, late) = match cause {
            ExpiryCause::Unanswered { provider, id } => {
                let detail = format!("{name} did not answer within {}", timeout());
                (Error::new(Code::Timeout, detail), Some((provider, id)))
            }
            ExpiryCause::Unwritten => {
                let detail = format!("no provider of {name} was available within {}", timeout());
                (Error::new(Code::Timeout, detail).executed(Executed::No), None)
            }
            ExpiryCause::NoProvider { busy: true } => (busy(name), None),
            ExpiryCause::NoProvider { busy: false } => (no_provider(name), None),
        };
        let Some(in_flight) = call.caller.take(call.at, call.seq) else { return };
        self.record(&call.caller, &in_flight, error.code().into());
        if let Some((provider, id)) = late {
            let until = now + self.config.rpc.late_window.as_millis() as u64;
            let caller_id = in_flight.late.then(|| in_flight.caller_id.clone());
            self.late.put(id, until, call.caller.clone(), caller_id, provider);
        }
        call.caller.peer.answer(&in_flight.caller_id, CallAnswer::Failed(error));
    }

    /// Frees the slot of a provider that was removed from its service, and fails its calls.
    fn provider_removed(&self, service: &Arc<ServiceEntry>, removed: RemovedProvider) {
        let RemovedProvider { conn, slot, orphans, reason } = removed;
        if let Some(reason) = reason {
            conn.peer.withdrawn(&service.name, reason);
            // Its late replies are dropped, as other replies are.
            self.late.retain(&conn, |id, call| !(Arc::ptr_eq(call.provider(), &conn) && id.slot() == slot as usize));
        }
        let mut provides = conn.provides.lock();
        if provides.get(slot as usize).is_some_and(|slot| Arc::ptr_eq(&slot.service, service)) {
            provides.remove(slot as usize);
        }
        drop(provides);
        for call in orphans {
            let detail = format!("the provider of {} disconnected before it replied", service.name);
            self.settle(&call, CallAnswer::Failed(Error::new(Code::ProviderGone, detail)));
        }
    }
}

// === impl Hub: the sweep ===

impl Hub {
    /// Finds what is due. One task calls it about every 20 ms.
    pub fn sweep(&self) {
        let now = self.clock.now();
        self.late.sweep(now);
        self.registry.retain_ticking(|service| self.sweep_calls(service, now));
        self.registry.forget_expired(now, self.config.limits.services);
        // Many names are checked less often; a call checks the lease itself.
        if self.sweeps.borrow().is_multiple_of(8) || self.registry.leased() < 64 {
            self.registry.retain_leased(|service| self.sweep_lease(service));
        }
        self.registry.changes.sweep(self.cluster.is_leader(), self.cluster.is_isolated(), now);
        self.sweeps.send_modify(|count| *count = count.wrapping_add(1));
    }

    /// Answers the calls of a service that are overdue. False: it has no calls left.
    fn sweep_calls(&self, service: &Arc<ServiceEntry>, now: u64) -> bool {
        let mut state = self.edit(service);
        let expired = state.expire(now);
        let has_calls = !state.calls.entries.is_empty();
        state.marks.ticking = has_calls;
        let poll = state.has_to_poll();
        let follow_up = state.unlock();
        for call in expired {
            self.expire(service, call, now);
        }
        drop(follow_up);
        if poll {
            self.flush(service);
        }
        has_calls
    }

    /// Removes the providers of a name that another node has by now. False: this node does not hold the name.
    fn sweep_lease(&self, service: &Arc<ServiceEntry>) -> bool {
        let mut state = self.edit(service);
        if state.is_lost() {
            let keys: Vec<u32> = state.providers.local().map(|(key, _)| key).collect();
            for key in keys {
                state.remove(key, Some("lost"));
            }
            state.effects.providers_changed = true;
            state.update();
        }
        state.marks.leased = state.is_leased();
        state.marks.leased
    }
}

impl<'a> CallRoute<'a> {
    pub(super) fn new(service: &'a Arc<ServiceEntry>, request: &'a CallRequest<'a>, entry: Option<CallKey>) -> Self {
        CallRoute { service, request, entry, tried: Vec::new(), rejected_by: Vec::new() }
    }
}

// === impl ServiceEdit ===

impl<'h> ServiceEdit<'h, '_> {
    /// Brings the registry up to date, which otherwise happens when the lock is released.
    pub(super) fn update(&mut self) {
        let (hub, service, state) = (self.hub, self.service, &mut **self);
        if std::mem::take(&mut state.effects.providers_changed) {
            hub.registry.update(service, state, hub.clock.now());
        }
        hub.registry.tick(service, state);
    }

    /// Releases the lock. The work that follows from the edit is done when the returned value is dropped.
    #[inline]
    pub(super) fn unlock(mut self) -> FollowUp<'h> {
        self.release()
    }

    #[inline]
    fn release(&mut self) -> FollowUp<'h> {
        let work = if self.is_settled() { None } else { self.collect() };
        self.state = None;
        FollowUp { hub: self.hub, work }
    }

    #[cold]
    fn collect(&mut self) -> Option<FollowUpWork> {
        self.update();
        let forget = self.is_unused() && ServiceRegistry::is_forgettable(self, self.hub.clock.now());
        let some = forget || !self.effects.is_empty();
        some.then(|| (self.service.clone(), std::mem::take(&mut self.effects), forget))
    }
}

impl Deref for ServiceEdit<'_, '_> {
    type Target = ServiceState;

    #[inline]
    fn deref(&self) -> &ServiceState {
        self.state.as_ref().expect("an edit holds its lock until it is consumed")
    }
}

impl DerefMut for ServiceEdit<'_, '_> {
    #[inline]
    fn deref_mut(&mut self) -> &mut ServiceState {
        self.state.as_mut().expect("an edit holds its lock until it is consumed")
    }
}

impl Drop for ServiceEdit<'_, '_> {
    #[inline]
    fn drop(&mut self) {
        if self.state.is_some() {
            drop(self.release());
        }
    }
}

impl FollowUp<'_> {
    #[cold]
    fn run(&self, (service, effects, forget): FollowUpWork) {
        for removed in effects.removed {
            self.hub.provider_removed(&service, removed);
        }
        if effects.capacity_freed {
            self.hub.flush(&service);
        }
        if forget {
            self.hub.registry.forget(&service, self.hub.clock.now(), false);
        }
    }
}

impl Drop for FollowUp<'_> {
    #[inline]
    fn drop(&mut self) {
        if let Some(work) = self.work.take() {
            self.run(work);
        }
    }
}

fn busy(name: &str) -> Error {
    Error::new(Code::Busy, format!("every provider of {name} is at its concurrency"))
}

fn no_provider(name: &str) -> Error {
    Error::new(Code::NoProvider, format!("no connection provides {name}"))
}

fn outcome(answer: &CallAnswer<'_>) -> CallOutcome {
    match answer {
        CallAnswer::Result(_) => CallOutcome::Ok,
        CallAnswer::Error(_) => CallOutcome::ServiceError,
        CallAnswer::Failed(error) => error.code().into(),
    }
}

fn wall_clock() -> Box<RawValue> {
    let ms = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_millis() as u64;
    to_raw_value(&serde_json::json!({ "time": ms })).unwrap_or_else(|_| RawValue::NULL.to_owned())
}
