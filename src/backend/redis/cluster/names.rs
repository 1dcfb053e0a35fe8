//! Names: claimed, renewed and given back in one step each.

use std::sync::Arc;

use tokio::time::sleep;

use super::{Inner, MARGIN, TTL, texts};
use crate::{
    backend::redis::{deployment::Lost, link::Fault, resp::Value, script::Script},
    cluster::{Claim, Keeper, Lease, NodeId, Tenure, Unclaimed},
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
    pub(super) async fn claim(self: Arc<Self>, name: Arc<str>, claim: Claim) -> Result<Lease, Unclaimed> {
        let give_up = tokio::time::Instant::now() + PATIENCE;
        loop {
            // Its last lease may still be being given back: that must not come after this.
            let freed = self.freed.notified();
            let heard = self.is_heard();
            if heard && !self.state.lock().freeing.contains_key(&name) {
                break;
            }
            // It has only just begun, or Redis is away for a moment.
            if !heard && tokio::time::Instant::now() >= give_up {
                return Err(Unclaimed::Away);
            }
            tokio::select! {
                () = freed => {}
                () = sleep(AGAIN / 10) => {}
            }
        }
        // On its own: who asked may be gone before Redis answers, and then the lease is dropped where it arises.
        let task = tokio::spawn(async move { self.claim_now(name, claim).await });
        task.await.unwrap_or(Err(Unclaimed::Away))
    }

    async fn claim_now(self: Arc<Self>, name: Arc<str>, claim: Claim) -> Result<Lease, Unclaimed> {
        let (holders, owner) = self.name_keys(&name);
        let id = self.state.lock().id;
        let asked = self.clock.now();
        let exclusive = u64::from(claim == Claim::Exclusive);
        // The same again takes the same name again: the fence is higher, and that is all.
        let answer = self
            .deployment
            .run(&CLAIM, &[holders.as_bytes(), owner.as_bytes()], Lost::Again, |_, command| {
                command.push(id.to_string());
                command.push_int(exclusive);
                command.push_int(TTL.as_millis() as u64);
                command.push_int(FENCE);
            })
            .await;
        let value = match answer {
            Ok((value, _)) => value,
            Err(fault) => {
                // It may have been taken all the same.
                if fault == Fault::Lost {
                    self.give_back(&name, 0, id).await;
                }
                return Err(Unclaimed::Away);
            }
        };
        let parts = value.list().unwrap_or_default();
        if parts.first().and_then(Value::int) != Some(1) {
            let nodes: Vec<NodeId> = texts(&value).iter().filter_map(|text| NodeId::parse(text)).collect();
            return Err(Unclaimed::Taken(nodes));
        }
        let fence = parts.get(1).and_then(Value::int).unwrap_or_default();
        let until = match claim {
            Claim::Shared => u64::MAX,
            Claim::Exclusive => asked + (TTL - MARGIN).as_millis() as u64,
        };
        let tenure = Tenure::new(name.clone(), claim, fence, self.clock.clone(), until);
        let reborn = {
            let mut state = self.state.lock();
            state.leases.insert(name, tenure.clone());
            state.id != id
        };
        let lease = Lease::new(tenure.clone(), self.clone() as Arc<dyn Keeper>);
        if reborn {
            // It became another node meanwhile.
            self.renew(&tenure, id).await;
        }
        Ok(lease)
    }

    /// Goes on holding a name; `before` is who this node was when it last said so.
    pub(super) async fn renew(&self, tenure: &Arc<Tenure>, before: NodeId) {
        let (holders, owner) = self.name_keys(&tenure.name);
        let id = self.state.lock().id;
        let asked = self.clock.now();
        let renewed = self
            .deployment
            .run(&RENEW, &[holders.as_bytes(), owner.as_bytes()], Lost::Again, |_, command| {
                command.push(id.to_string());
                command.push(before.to_string());
                command.push_int(tenure.fence);
                command.push_int(TTL.as_millis() as u64);
                command.push_int(FENCE);
            })
            .await;
        match renewed.as_ref().map(|(value, _)| value.int()) {
            Ok(Some(1)) if tenure.claim == Claim::Exclusive => {
                tenure.renew(asked + (TTL - MARGIN).as_millis() as u64);
            }
            Ok(Some(0)) => {
                // Unless it was given back, or claimed anew, while Redis was asked.
                let mut state = self.state.lock();
                if state.leases.get(&tenure.name).is_some_and(|mine| Arc::ptr_eq(mine, tenure)) {
                    state.tell(&tenure.name, None);
                    tenure.lose();
                    self.changed.notify_one();
                }
            }
            // It stands for as long as it stands.
            _ => {}
        }
        // Given back while it was renewed: what came last may have been the renewal.
        let gone = {
            let state = self.state.lock();
            !state.leases.contains_key(&tenure.name) && !state.freeing.contains_key(&tenure.name)
        };
        if gone {
            self.give_back(&tenure.name, tenure.fence, id).await;
        }
    }

    /// Gives a name back, however long Redis is away.
    pub(super) async fn free(self: Arc<Self>, name: Arc<str>, fence: u64) {
        loop {
            let id = self.state.lock().id;
            let done = self.give_back(&name, fence, id).await;
            // With the session it is over by itself.
            if done || !self.is_heard() {
                break;
            }
            sleep(AGAIN).await;
        }
        self.state.lock().freeing.remove(&name);
        self.freed.notify_waiters();
    }

    async fn give_back(&self, name: &str, fence: u64, id: NodeId) -> bool {
        let (holders, owner) = self.name_keys(name);
        let released = self
            .deployment
            .run(&RELEASE, &[holders.as_bytes(), owner.as_bytes()], Lost::Again, |_, command| {
                command.push(id.to_string());
                command.push_int(fence);
            })
            .await;
        released.is_ok()
    }
}
