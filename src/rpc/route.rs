//! How a call gets to a provider and its answer back, whatever happens in between.

use std::{
    sync::{Arc, atomic::Ordering::Relaxed},
    time::Duration,
};

use super::{
    CallAnswer, CallMeta, ForwardedCall, Hub, REMEMBERED, RelayInfo, WriteOutcome,
    pending::{Conn, Live},
    services::{
        Abandoned, After, Done, Expired, New, Overdue, Removed, Request, Service, State, Target, Ticket, Waited,
    },
};
use crate::cluster::NodeId;
use crate::{
    duration,
    error::{Code, Error, Executed, Result},
    metrics::Outcome,
};

/// A call that left the table and is to be answered so.
pub(super) type Failed = (Done, Error);

/// Who need not be asked again for a call.
#[derive(Default)]
pub(super) struct Tried {
    pub keys: Vec<u32>,
    /// Those of `keys` that are other nodes, and returned it.
    pub nodes: Vec<NodeId>,
}

/// Why a provider did not take a call.
pub(super) enum Refused {
    Full,
    /// It takes no calls any more.
    Gone,
    /// That node has no provider. `rev`: what was known of it when it was asked.
    NotThere {
        rev: u64,
    },
}

impl Hub {
    pub(super) fn next_seq(&self) -> u64 {
        self.seq.fetch_add(1, Relaxed)
    }

    /// Books a call whose right to answer was taken.
    pub(super) fn ended(&self, caller: &Conn, call: &Live, outcome: Outcome) {
        if caller.is_link() {
            // It is booked where it was made.
            return;
        }
        // A sample is as many bytes as a call until the metrics are swept, and costs two looks at a clock.
        let timed = self.timed.load(Relaxed) < Self::TIMED;
        let took = timed.then(|| {
            self.timed.fetch_add(1, Relaxed);
            Duration::from_micros(self.clock.micros().saturating_sub(call.started))
        });
        self.metrics.call_ended(outcome, took);
    }

    /// Answers a call unless somebody else did.
    pub(super) fn settle(&self, call: &Done, answer: CallAnswer<'_>) -> bool {
        let Some(live) = call.caller.take(call.live, call.seq) else { return false };
        self.ended(&call.caller, &live, outcome(&answer));
        call.caller.peer.answer(&live.tag, answer);
        true
    }

    /// Until when a call may wait for a provider, and its place among those that do; or why it may not.
    pub(super) fn may_wait(&self, name: &str, state: &State, request: &Request<'_>) -> Result<(u64, Ticket)> {
        let now = self.clock.now();
        let usual = self.config.wait_for_provider.as_millis() as u64;
        // One is just registering, or was here within the last minute.
        let expected = state.providers() > 0
            || state.is_flushing()
            || state.left.is_some_and(|left| now < left + REMEMBERED.as_millis() as u64);
        let until = match request.wait {
            Some(wait) if wait > 0 => now + wait,
            None if expected && usual > 0 => now + usual,
            _ => return Err(no_provider(name)),
        };
        let ticket = self.room.take(request.bytes(), self.config.waiting, self.config.waiting_bytes);
        Ok((until, ticket.ok_or_else(|| no_provider(name).with("limit", "limits.waiting"))?))
    }

    /// Lets a notification wait if it may. True: the service has to be put among those that tick.
    pub(super) fn wait_notification(&self, service: &Service, state: &mut State, request: &Request<'_>) -> bool {
        let Ok((until, ticket)) = self.may_wait(&service.name, state, request) else { return false };
        let call = New { seq: self.next_seq(), caller: None, deadline: until, timeout: 0 };
        state.enqueue(call, until, request.store(ticket));
        self.starts_ticking(state)
    }

    /// Writes a call that has been placed, and fails it if nobody takes it.
    #[inline]
    pub(super) fn deliver(
        &self,
        service: &Arc<Service>,
        target: Target,
        request: &Request<'_>,
        entry: Option<(u32, u64)>,
    ) {
        if let Some((done, error)) = self.try_deliver(service, target, request, entry, &mut Tried::default()) {
            self.settle(&done, CallAnswer::Failed(error));
        }
    }

    /// Writes a call that has been placed; looks for another provider while none took it. What is returned is to be failed.
    pub(super) fn try_deliver(
        &self,
        service: &Arc<Service>,
        mut target: Target,
        request: &Request<'_>,
        entry: Option<(u32, u64)>,
        tried: &mut Tried,
    ) -> Option<Failed> {
        loop {
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
                relay: RelayInfo { wait: request.wait, late: request.late, rev: target.rev, tried: &tried.nodes },
            });
            let refused = match written {
                WriteOutcome::Written => return None,
                WriteOutcome::Full => Refused::Full,
                WriteOutcome::Gone => Refused::Gone,
            };
            match self.elsewhere(service, &target.conn, target.provider, refused, request, entry, tried) {
                Ok(Some(next)) => target = next,
                Ok(None) => return None,
                Err(failed) => return Some(failed),
            }
        }
    }

    /// Looks for another provider for a call that surely nobody has got. None: it waits, or is over.
    ///
    /// # Errors
    /// It can neither be placed nor wait, and has left the table.
    #[allow(clippy::too_many_arguments)]
    pub(super) fn elsewhere(
        &self,
        service: &Arc<Service>,
        conn: &Arc<Conn>,
        provider: u32,
        refused: Refused,
        request: &Request<'_>,
        entry: Option<(u32, u64)>,
        tried: &mut Tried,
    ) -> Result<Option<Target>, Failed> {
        let now = self.clock.now();
        let mut state = service.state.lock();
        let mut left = After::default();
        if let Some((index, seq)) = entry
            && !state.take_back(index, seq, &mut left)
        {
            // Answered while it was being written: cancelled, overdue, or the provider was dropped.
            drop(state);
            self.after(service, left);
            return Ok(None);
        }
        let mut removed = None;
        match refused {
            Refused::Full => tried.keys.push(provider),
            Refused::Gone => {
                removed = state.remove_conn(provider, conn);
                if removed.is_some() {
                    self.touched(service, &mut state);
                }
            }
            Refused::NotThere { rev } => {
                if let Some(more) = state.unset_far(conn, Some(rev)) {
                    left.closed.extend(more.closed);
                    self.touched(service, &mut state);
                }
            }
        }
        let only_here = entry.is_some_and(|(index, _)| state.is_of_link(index));
        let next = state.pick(&tried.keys, entry.is_none(), only_here, now);
        let mut failed = None;
        let mut starts = false;
        let again = match (next, entry) {
            (Some(provider), Some((index, _))) => Some(state.place_at(index, provider)),
            (Some(provider), None) => Some(state.notify(provider)),
            (None, Some((index, _))) => {
                // Who took none of it will not in a moment either, and must not be asked for ever.
                let stays = match state.has_active(only_here) {
                    true => Err(busy(&service.name)),
                    false if only_here => Err(no_provider(&service.name)),
                    false => self.may_wait(&service.name, &state, request),
                };
                match stays {
                    Ok((until, ticket)) => state.wait_again(index, until, request.store(ticket)),
                    Err(error) => failed = state.give_up(index).map(|done| (done, error)),
                }
                None
            }
            (None, None) => {
                starts = !state.has_active(false) && self.wait_notification(service, &mut state, request);
                None
            }
        };
        drop(state);
        if starts {
            self.ticking.lock().push(service.clone());
        }
        if let Some(removed) = removed {
            self.removed(service, removed);
        }
        self.after(service, left);
        match failed {
            Some(failed) => Err(failed),
            None => Ok(again),
        }
    }

    /// Whether the hub has to be told that this service has deadlines now.
    pub(super) fn starts_ticking(&self, state: &mut State) -> bool {
        !state.is_idle() && !std::mem::replace(&mut state.ticking, true)
    }

    /// Writes what waits, in order, while there is a provider for it.
    pub(super) fn flush(&self, service: &Arc<Service>) {
        if !service.state.lock().begin_flush() {
            return;
        }
        loop {
            // The guard must not live on in the loop's body, which calls peers.
            let next = service.state.lock().next_waiting(self.clock.now());
            let Some(Waited { target, entry, request }) = next else { return };
            self.deliver(service, target, &request.request(), entry);
        }
    }

    pub(super) fn after(&self, service: &Arc<Service>, after: After) {
        for (conn, slot) in &after.closed {
            self.vacate(service, conn, *slot);
        }
        if after.flush {
            self.flush(service);
        }
    }

    /// Frees the slot of a registration that is no more.
    pub(super) fn vacate(&self, service: &Arc<Service>, conn: &Conn, slot: u32) {
        let mut provides = conn.provides.lock();
        if provides.get(slot as usize).is_some_and(|registration| Arc::ptr_eq(&registration.service, service)) {
            provides.remove(slot as usize);
        }
    }

    /// Gives a call up whose `Live` was taken. Whether it may have run.
    pub(super) fn abandon(&self, call: &Live) -> Executed {
        let (abandoned, after) = call.service.state.lock().abandon(call.index, call.seq);
        let executed = match abandoned {
            Abandoned::Waiting => Executed::No,
            Abandoned::Gone | Abandoned::With(None) => Executed::Maybe,
            Abandoned::With(Some((provider, id))) => {
                provider.peer.cancel(id);
                Executed::Maybe
            }
        };
        self.after(&call.service, after);
        executed
    }

    /// Fails the calls of a provider that is no more.
    pub(super) fn removed(&self, service: &Arc<Service>, removed: Removed) {
        let Removed { provider, orphans } = removed;
        self.vacate(service, &provider.conn, provider.slot);
        for call in orphans {
            let detail = format!("the provider of {} went before it answered", service.name);
            self.settle(&call, CallAnswer::Failed(Error::new(Code::ProviderGone, detail)));
        }
    }

    pub(super) fn overdue(&self, service: &Service, call: Expired, now: u64) {
        let Expired { done, timeout, why } = call;
        let name = &service.name;
        let in_time = || duration::format(Duration::from_millis(u64::from(timeout)));
        let (error, late) = match why {
            Overdue::Unanswered { provider, id } => {
                let detail = format!("{name} did not answer within {}", in_time());
                (Error::new(Code::Timeout, detail), Some((provider, id)))
            }
            Overdue::Unwritten => {
                let detail = format!("no provider of {name} came within {}", in_time());
                (Error::new(Code::Timeout, detail).executed(Executed::No), None)
            }
            Overdue::Unprovided { full: true } => (busy(name), None),
            Overdue::Unprovided { full: false } => (no_provider(name), None),
        };
        let Some(live) = done.caller.take(done.live, done.seq) else { return };
        self.ended(&done.caller, &live, error.code().into());
        if let Some((provider, id)) = late {
            let until = now + self.config.late_window.as_millis() as u64;
            let tag = live.late.then(|| live.tag.clone());
            self.late.put(id, until, done.caller.clone(), tag, provider);
        }
        done.caller.peer.answer(&live.tag, CallAnswer::Failed(error));
    }
}

pub(super) fn busy(name: &str) -> Error {
    Error::new(Code::Busy, format!("every provider of {name} has as many calls as it takes"))
}

pub(super) fn no_provider(name: &str) -> Error {
    Error::new(Code::NoProvider, format!("nobody provides {name}"))
}

fn outcome(answer: &CallAnswer<'_>) -> Outcome {
    match answer {
        CallAnswer::Result(_) => Outcome::Ok,
        CallAnswer::Error(_) => Outcome::ServiceError,
        CallAnswer::Failed(error) => error.code().into(),
    }
}
