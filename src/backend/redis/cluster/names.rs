//! Names: claimed, renewed and given back in one step each.

use std::sync::Arc;

use tokio::time::sleep;

use super::{Inner, MARGIN, State, TTL, texts};
use crate::{
    backend::redis::client::{Command, CommandError, OnLostReply, Script, Value},
    cluster::{Claim, ClaimError, Lease, LeaseBackend, LeaseState, NodeId},
};

static CLAIM: Script = Script::new(include_str!("claim.lua"));
static RENEW: Script = Script::new(include_str!("renew.lua"));
static RELEASE: Script = Script::new(include_str!("release.lua"));

/// How long the fence of a name that nobody holds is remembered. It would grow without that too, by the clock of Redis.
const FENCE: u64 = 24 * 60 * 60 * 1_000;
/// How long a claim waits for this node to be heard by Redis.
const PATIENCE: std::time::Duration = std::time::Duration::from_secs(2);
/// Between two tries to give a name back.
const AGAIN: std::time::Duration = std::time::Duration::from_millis(200);

impl Inner {
    pub(super) async fn claim(self: Arc<Self>, name: Arc<str>, claim: Claim) -> Result<Lease, ClaimError> {
        let give_up = tokio::time::Instant::now() + PATIENCE;
        loop {
            // Its last lease may still be being given back: that must not come after this.
            let freed = self.freed.notified();
            let heard = self.is_heard() && !self.state.lock().unknown;
            if heard && !self.state.lock().freeing.contains_key(&name) {
                break;
            }
            // It has only just begun, or Redis was away and knows nothing of it.
            if !heard && tokio::time::Instant::now() >= give_up {
                return Err(ClaimError::Unreachable);
            }
            tokio::select! {
                () = freed => {}
                () = sleep(AGAIN / 10) => {}
            }
        }
        // On its own: who asked may be gone before Redis answers, and then the lease is dropped where it arises.
        let task = tokio::spawn(async move { self.claim_now(name, claim).await });
        task.await.unwrap_or(Err(ClaimError::Unreachable))
    }

    async fn claim_now(self: Arc<Self>, name: Arc<str>, claim: Claim) -> Result<Lease, ClaimError> {
        let id = self.state.lock().id;
        let asked = self.clock.now();
        let mut value = self.ask_for(&name, claim, id).await?;
        if holders_of(&value).is_some_and(|nodes| !nodes.is_empty()) && self.bury(&name, &value).await {
            value = self.ask_for(&name, claim, id).await?;
        }
        if let Some(nodes) = holders_of(&value) {
            return Err(ClaimError::Held(nodes));
        }
        let parts = value.list().unwrap_or_default();
        let fence = parts.get(1).and_then(Value::int).unwrap_or_default();
        let until = match claim {
            Claim::Shared => u64::MAX,
            Claim::Exclusive => asked + (TTL - MARGIN).as_millis() as u64,
        };
        let lease = LeaseState::new(name.clone(), claim, fence, self.clock.clone(), until);
        let reborn = {
            let mut state = self.state.lock();
            state.leases.insert(name, lease.clone());
            state.id != id
        };
        let handle = Lease::new(lease.clone(), self.clone() as Arc<dyn LeaseBackend>);
        if reborn {
            // It became another node meanwhile.
            self.renew(&lease, id).await;
        }
        Ok(handle)
    }

    async fn ask_for(self: &Arc<Self>, name: &Arc<str>, claim: Claim, id: NodeId) -> Result<Value, ClaimError> {
        let (holders, owner) = self.name_keys(name);
        let exclusive = u64::from(claim == Claim::Exclusive);
        // The same again takes the same name again: the fence is higher, and that is all.
        let answer = self
            .topology
            .run(&CLAIM, &[holders.as_bytes(), owner.as_bytes()], OnLostReply::Retry, |_, command| {
                command.push(id.to_string());
                command.push_int(exclusive);
                command.push_int(TTL.as_millis() as u64);
                command.push_int(FENCE);
            })
            .await;
        match answer {
            Ok((value, _)) => Ok(value),
            Err(fault) => {
                // It may have been taken all the same. An exclusive one ends with its time.
                if fault == CommandError::Unconfirmed {
                    self.set_free(&mut self.state.lock(), name, 0);
                }
                Err(ClaimError::Unreachable)
            }
        }
    }

    /// Shared names do not end by themselves: takes them from nodes whose session is over. True: there was one.
    async fn bury(&self, name: &str, taken: &Value) -> bool {
        let mut some = false;
        for node in holders_of(taken).unwrap_or_default() {
            let session = self.session_key(node);
            let ask = Command::new("EXISTS").arg(&session);
            let asked = self.topology.call(session.as_bytes(), OnLostReply::Retry, |_| ask.clone()).await;
            let Ok((exists, connection)) = asked else { continue };
            // Right after Redis was away one that lives may not have told of itself again.
            if exists.int() == Some(0) && self.topology.is_settled(session.as_bytes(), &connection) {
                some |= self.give_back(name, 0, node).await;
            }
        }
        some
    }

    /// Goes on holding a name; `before` is who this node was when it last said so.
    pub(super) async fn renew(&self, lease: &Arc<LeaseState>, before: NodeId) {
        let (holders, owner) = self.name_keys(&lease.name);
        let id = self.state.lock().id;
        let asked = self.clock.now();
        let renewed = self
            .topology
            .run(&RENEW, &[holders.as_bytes(), owner.as_bytes()], OnLostReply::Retry, |_, command| {
                command.push(id.to_string());
                command.push(before.to_string());
                command.push_int(lease.fence);
                command.push_int(TTL.as_millis() as u64);
                command.push_int(FENCE);
            })
            .await;
        match renewed.as_ref().map(|(value, _)| value.int()) {
            Ok(Some(1)) if lease.claim == Claim::Exclusive => {
                lease.renew(asked + (TTL - MARGIN).as_millis() as u64);
            }
            Ok(Some(0)) => {
                // Unless it was given back, or claimed anew, while Redis was asked.
                let mut state = self.state.lock();
                if state.leases.get(&lease.name).is_some_and(|mine| Arc::ptr_eq(mine, lease)) {
                    state.tell(&lease.name, None);
                    lease.mark_lost();
                    self.changed.notify_one();
                }
            }
            // It stands for as long as it stands.
            _ => {}
        }
        // Given back while it was renewed: what came last may have been the renewal.
        let mut state = self.state.lock();
        if !state.leases.contains_key(&lease.name) && !state.freeing.contains_key(&lease.name) {
            self.set_free(&mut state, &lease.name, lease.fence);
        }
    }

    /// Gives a name back, in its own time. Until then this node does not claim it.
    pub(super) fn set_free(&self, state: &mut State, name: &Arc<str>, fence: u64) {
        let Some(this) = self.me.upgrade() else { return };
        *state.freeing.entry(name.clone()).or_default() += 1;
        tokio::spawn(this.free(name.clone(), fence));
    }

    /// Gives a name back, however long Redis is away.
    async fn free(self: Arc<Self>, name: Arc<str>, fence: u64) {
        self.insist(&name, fence).await;
        let mut state = self.state.lock();
        if let Some(times) = state.freeing.get_mut(&name) {
            *times -= 1;
            if *times == 0 {
                state.freeing.remove(&name);
            }
        }
        drop(state);
        self.freed.notify_waiters();
    }

    /// Gives a name back, unless that comes by itself: with the session.
    pub(super) async fn insist(&self, name: &str, fence: u64) {
        loop {
            let id = self.state.lock().id;
            if self.give_back(name, fence, id).await || !self.is_heard() {
                return;
            }
            sleep(AGAIN).await;
        }
    }

    async fn give_back(&self, name: &str, fence: u64, id: NodeId) -> bool {
        let (holders, owner) = self.name_keys(name);
        let released = self
            .topology
            .run(&RELEASE, &[holders.as_bytes(), owner.as_bytes()], OnLostReply::Retry, |_, command| {
                command.push(id.to_string());
                command.push_int(fence);
            })
            .await;
        released.is_ok()
    }
}

/// Who else has it, if it was not given.
fn holders_of(claimed: &Value) -> Option<Vec<NodeId>> {
    let given = claimed.list().and_then(|parts| parts.first()).and_then(Value::int) == Some(1);
    (!given).then(|| texts(claimed).iter().filter_map(|text| NodeId::parse(text)).collect())
}
