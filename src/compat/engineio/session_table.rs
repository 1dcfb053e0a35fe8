//! [`SessionTable`]: all sessions of one server, and the task that keeps their time.

use std::{
    collections::HashMap,
    sync::{Arc, Weak},
};

use foldhash::fast::RandomState;
use parking_lot::Mutex;

use super::session::{EngineSession, SessionStage, Sid};
use crate::net::timer::TICK;

#[derive(Default)]
pub(super) struct SessionTable(Mutex<HashMap<Sid, Arc<EngineSession>, RandomState>>);

// === impl SessionTable ===

impl SessionTable {
    /// Starts the task that keeps the time of the sessions, and ends with the table. Needs a tokio runtime.
    pub(super) fn start() -> Arc<Self> {
        let table = Arc::new(SessionTable::default());
        tokio::spawn(keep_time(Arc::downgrade(&table)));
        table
    }

    pub(super) fn len(&self) -> usize {
        self.0.lock().len()
    }

    pub(super) fn insert(&self, session: Arc<EngineSession>) {
        self.0.lock().insert(session.sid, session);
    }

    pub(super) fn find(&self, sid: &str) -> Option<Arc<EngineSession>> {
        let sid: &Sid = sid.as_bytes().try_into().ok()?;
        let session = self.0.lock().get(sid).cloned()?;
        (session.stage() != SessionStage::Over).then_some(session)
    }

    /// Pings, times out, drains and removes sessions.
    fn sweep(&self, sessions: &mut Vec<Arc<EngineSession>>) {
        sessions.extend(self.0.lock().values().cloned());
        for session in sessions.drain(..) {
            if !session.tick() {
                let mut table = self.0.lock();
                table.remove(&session.sid);
                if table.is_empty() {
                    // Frees the capacity that a burst of clients has left behind.
                    table.shrink_to_fit();
                }
            }
        }
        sessions.shrink_to(1_000);
    }
}

async fn keep_time(table: Weak<SessionTable>) {
    let mut ticks = tokio::time::interval(TICK);
    ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    let mut sessions = Vec::new();
    loop {
        ticks.tick().await;
        let Some(table) = table.upgrade() else { return };
        table.sweep(&mut sessions);
    }
}
