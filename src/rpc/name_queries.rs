//! Queries to other nodes about names: whether the node that holds one still needs it.

use std::collections::HashMap;

use parking_lot::Mutex;
use tokio::sync::oneshot;

use crate::cluster::NodeId;

/// The queries that are not answered, by number.
#[derive(Default)]
pub(super) struct NameQueries(Mutex<HashMap<u64, (NodeId, oneshot::Sender<bool>)>>);

/// A query in progress, given up on drop.
pub(super) struct PendingQuery<'a> {
    /// Whether the name is held. Closed: the node cannot answer.
    pub(super) held: oneshot::Receiver<bool>,
    queries: &'a NameQueries,
    number: u64,
}

impl NameQueries {
    pub(super) fn begin(&self, number: u64, node: NodeId) -> PendingQuery<'_> {
        let (sender, held) = oneshot::channel();
        self.0.lock().insert(number, (node, sender));
        PendingQuery { held, queries: self, number }
    }

    pub(super) fn answer(&self, number: u64, held: bool) {
        let query = self.0.lock().remove(&number);
        if let Some((_, sender)) = query {
            // The query may have been given up.
            let _ = sender.send(held);
        }
    }

    /// Ends a query that was not delivered.
    pub(super) fn remove(&self, number: u64) {
        self.0.lock().remove(&number);
    }

    /// Ends all queries to a node that can no longer be reached.
    pub(super) fn remove_node(&self, node: NodeId) {
        self.0.lock().retain(|_, (asked, _)| *asked != node);
    }

    pub(super) fn len(&self) -> usize {
        self.0.lock().len()
    }
}

impl Drop for PendingQuery<'_> {
    fn drop(&mut self) {
        self.queries.remove(self.number);
    }
}
