//! [`LeaseManager`]: names, which are claimed, renewed and released in one step each.

use std::{
    sync::{Arc, Weak},
    time::Duration,
};

use redis::cmd;
use tokio::{
    sync::Notify,
    time::{Instant, sleep},
};

use super::context::{ClusterContext, ClusterState, TTL};
use crate::{
    backend::redis::client::{CommandError, OnLostReply, Script},
    cluster::{Claim, ClaimError, Lease, LeaseBackend, LeaseState, NodeId},
};

static CLAIM: Script = Script::new(include_str!("claim.lua"));
static RENEW: Script = Script::new(include_str!("renew.lua"));
static RELEASE: Script = Script::new(include_str!("release.lua"));

/// How long before an exclusive name expires its holder stops using it.
const MARGIN: Duration = Duration::from_secs(2);
/// Milliseconds that the fencing token of a name without a holder is remembered. The clock of Redis makes it grow as
/// well.
const FENCE: u64 = 24 * 60 * 60 * 1_000;
/// How long a claim waits for the first heartbeat of this node.
const PATIENCE: Duration = Duration::from_secs(2);
/// Between two attempts to release a name.
const RETRY: Duration = Duration::from_millis(200);

pub(super) struct LeaseManager {
    me: Weak<LeaseManager>,
    context: Arc<ClusterContext>,
    /// A name was released.
    released: Notify,
}

impl LeaseManager {
    pub(super) fn new(context: Arc<ClusterContext>) -> Arc<Self> {
        Arc::new_cyclic(|me| LeaseManager { me: me.clone(), context, released: Notify::new() })
    }

    pub(super) async fn claim(self: Arc<Self>, name: Arc<str>, claim: Claim) -> Result<Lease, ClaimError> {
        let give_up = Instant::now() + PATIENCE;
        loop {
            // A lease of the same name may still be being released: that must not be executed after this claim.
            let released = self.released.notified();
            let known = self.context.is_alive() && !self.context.state.lock().unknown;
            if known && !self.context.state.lock().releasing.contains_key(&name) {
                break;
            }
            // The node has only just started, or Redis was away and does not know it.
            if !known && Instant::now() >= give_up {
                return Err(ClaimError::Unreachable);
            }
            tokio::select! {
                () = released => {}
                () = sleep(RETRY / 10) => {}
            }
        }
        // In a task: the caller may be gone before Redis replies, and then the lease is dropped, which releases it.
        let task = tokio::spawn(async move { self.claim_now(name, claim).await });
        task.await.unwrap_or(Err(ClaimError::Unreachable))
    }

    async fn claim_now(self: Arc<Self>, name: Arc<str>, claim: Claim) -> Result<Lease, ClaimError> {
        let id = self.context.id();
        let asked = self.context.clock.now();
        let mut claimed = self.run_claim(&name, claim, id).await?;
        if let Err(holders) = &claimed
            && !holders.is_empty()
            && self.release_dead(&name, holders).await
        {
            claimed = self.run_claim(&name, claim, id).await?;
        }
        let fence = claimed.map_err(ClaimError::Held)?;
        let until = match claim {
            Claim::Shared => u64::MAX,
            Claim::Exclusive => asked + (TTL - MARGIN).as_millis() as u64,
        };
        let lease = LeaseState::new(name.clone(), claim, fence, self.context.clock.clone(), until);
        let renamed = {
            let mut state = self.context.state.lock();
            state.leases.insert(name, lease.clone());
            state.id != id
        };
        let handle = Lease::new(lease.clone(), self.clone() as Arc<dyn LeaseBackend>);
        if renamed {
            // This node got another id meanwhile.
            self.renew(&lease, id).await;
        }
        Ok(handle)
    }

    /// The fencing token, or the nodes that hold the name.
    async fn run_claim(
        &self,
        name: &Arc<str>,
        claim: Claim,
        id: NodeId,
    ) -> Result<Result<u64, Vec<NodeId>>, ClaimError> {
        let (holders, owner) = self.context.name_keys(name);
        let keys = [holders.as_bytes(), owner.as_bytes()];
        let announcers = self.context.announcers(name);
        // Idempotent: a second run takes the same name with a higher fencing token.
        let run = self.context.topology.run::<Vec<String>>(&CLAIM, &keys, OnLostReply::Retry, |_, command| {
            command.arg(id.to_string()).arg(u8::from(claim == Claim::Exclusive));
            command.arg(TTL.as_millis() as u64).arg(FENCE);
            for node in &announcers {
                command.arg(node.to_string());
            }
        });
        match run.await.as_ref().map(|(reply, _)| &reply[..]) {
            Ok([taken, fence, ..]) if taken == "1" => Ok(Ok(fence.parse().unwrap_or_default())),
            Ok(holders) => Ok(Err(holders.iter().skip(1).filter_map(|text| NodeId::parse(text)).collect())),
            Err(error) => {
                // The name may be taken all the same. An exclusive one expires.
                if *error == CommandError::Unconfirmed {
                    self.release_later(&mut self.context.state.lock(), name, 0);
                }
                Err(ClaimError::Unreachable)
            }
        }
    }

    /// Releases a name that dead nodes hold: its record does not expire by itself. True if there was one.
    async fn release_dead(&self, name: &str, holders: &[NodeId]) -> bool {
        let mut any = false;
        for node in holders {
            if self.context.is_heard(*node) {
                continue;
            }
            let session = self.context.session_key(*node);
            let exists = self.context.call::<u64>(&session, cmd("EXISTS").arg(&session)).await;
            let Ok((exists, connection)) = exists else { continue };
            // Directly after Redis was away a live node may not have written its session again.
            if exists == 0 && self.context.topology.is_settled(session.as_bytes(), &connection) {
                any |= self.release_once(name, 0, *node).await;
            }
        }
        any
    }

    /// Renews a lease; `before` is the id of this node at the last renewal.
    pub(super) async fn renew(&self, lease: &Arc<LeaseState>, before: NodeId) {
        let context = &self.context;
        let (holders, owner) = context.name_keys(&lease.name);
        let id = context.id();
        let asked = context.clock.now();
        let keys = [holders.as_bytes(), owner.as_bytes()];
        let run = context.topology.run::<u64>(&RENEW, &keys, OnLostReply::Retry, |_, command| {
            command.arg(id.to_string()).arg(before.to_string()).arg(lease.fence);
            command.arg(TTL.as_millis() as u64).arg(FENCE);
        });
        match run.await {
            Ok((1, _)) if lease.claim == Claim::Exclusive => {
                lease.renew(asked + (TTL - MARGIN).as_millis() as u64);
            }
            Ok((0, _)) => {
                // Unless it was released, or claimed again, while Redis was asked.
                let mut state = context.state.lock();
                if state.holds(lease) {
                    state.set_info(&lease.name, None);
                    lease.mark_lost();
                    context.changed.notify_one();
                }
            }
            // It is valid until it expires.
            _ => {}
        }
        // If it was released while it was renewed, the renewal may have been executed last.
        let mut state = context.state.lock();
        if !state.leases.contains_key(&lease.name) && !state.releasing.contains_key(&lease.name) {
            self.release_later(&mut state, &lease.name, lease.fence);
        }
    }

    /// Releases a name in a task. Until it has ended this node does not claim the name.
    fn release_later(&self, state: &mut ClusterState, name: &Arc<str>, fence: u64) {
        let Some(this) = self.me.upgrade() else { return };
        *state.releasing.entry(name.clone()).or_default() += 1;
        let name = name.clone();
        tokio::spawn(async move {
            this.release_name(&name, fence).await;
            let mut state = this.context.state.lock();
            if let Some(times) = state.releasing.get_mut(&name) {
                *times -= 1;
                if *times == 0 {
                    state.releasing.remove(&name);
                }
            }
            drop(state);
            this.released.notify_waiters();
        });
    }

    /// Releases a name, however long Redis is away; unless that happens anyway because the session expires.
    pub(super) async fn release_name(&self, name: &str, fence: u64) {
        while !self.release_once(name, fence, self.context.id()).await && self.context.is_alive() {
            sleep(RETRY).await;
        }
    }

    async fn release_once(&self, name: &str, fence: u64, id: NodeId) -> bool {
        let (holders, owner) = self.context.name_keys(name);
        let keys = [holders.as_bytes(), owner.as_bytes()];
        let run = self.context.topology.run::<u64>(&RELEASE, &keys, OnLostReply::Retry, |_, command| {
            command.arg(id.to_string()).arg(fence);
        });
        run.await.is_ok()
    }
}

impl LeaseBackend for LeaseManager {
    fn info_changed(&self, lease: &Arc<LeaseState>) {
        let mut state = self.context.state.lock();
        if state.holds(lease) {
            state.set_info(&lease.name, lease.info());
            self.context.changed.notify_one();
        }
    }

    fn release(&self, lease: &Arc<LeaseState>) {
        let mut state = self.context.state.lock();
        if !state.holds(lease) {
            return;
        }
        state.leases.remove(&lease.name);
        state.set_info(&lease.name, None);
        self.context.changed.notify_one();
        if !lease.is_lost() && !state.left {
            self.release_later(&mut state, &lease.name, lease.fence);
        }
    }
}
