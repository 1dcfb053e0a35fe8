//! [`MessageCarrier`]: batches of messages between two nodes, published on the receiver's channel.

use std::{collections::hash_map::Entry, sync::Arc, time::Duration};

use bytes::Bytes;
use tokio::time::sleep;

use super::context::{ClusterContext, ClusterState};
use crate::{
    backend::redis::client::{CommandError, OnLostReply},
    cluster::{BatchOutcome, MessageBatch, NodeId, ReceiveOutcome},
};

/// A subscription that broke is back within this: until then a live node may have no subscriber for a batch.
const RESUBSCRIBE: Duration = Duration::from_millis(50);
const ATTEMPTS: usize = 3;
/// Unknown nodes whose batches are kept, and batches of each, until their announcements arrive.
const MAX_EARLY: usize = 256;

pub(super) struct MessageCarrier(pub(super) Arc<ClusterContext>);

impl MessageCarrier {
    /// Sends what is queued, one batch at a time to each node.
    pub(super) async fn run(self: Arc<Self>) {
        loop {
            while let Some(batch) = self.0.links.next_batch() {
                let this = self.clone();
                tokio::spawn(async move { this.deliver(batch).await });
            }
            self.0.links.batch_ready().await;
        }
    }

    async fn deliver(&self, batch: MessageBatch) {
        let context = &self.0;
        let channel = context.mail_channel(batch.to);
        let publish = context.publish(&channel, &batch.bytes);
        // Once a reply was lost the batch may have been delivered, whatever later attempts say.
        let (mut absent, mut unconfirmed) = (0, false);
        let outcome = loop {
            // A receiver drops duplicates.
            let begin = || context.links.begin_send(&batch);
            let sent =
                context.topology.call_while::<u64>(channel.as_bytes(), OnLostReply::Report, &publish, begin).await;
            unconfirmed |= matches!(sent, Err(CommandError::Unconfirmed));
            let undelivered = if unconfirmed { BatchOutcome::Unknown } else { BatchOutcome::Undelivered };
            match &sent {
                Ok((1.., _)) => break BatchOutcome::Delivered,
                // Callers retry on other nodes, so a dead node must be detected soon, but a live one not given up.
                Ok((_, connection))
                    if absent >= ATTEMPTS && context.topology.is_settled(channel.as_bytes(), connection) =>
                {
                    break undelivered;
                }
                // The receiver's session decides when to give up.
                Ok(_) | Err(CommandError::NotExecuted(_) | CommandError::Unconfirmed)
                    if context.is_alive() && context.links.has_peer(batch.to) => {}
                _ => break undelivered,
            }
            if !unconfirmed {
                context.links.not_sent(&batch);
            }
            if sent.is_ok() {
                absent += 1;
                sleep(RESUBSCRIBE).await;
            }
        };
        context.links.complete(&batch, outcome);
        if outcome == BatchOutcome::Undelivered {
            context.refresh.notify_one();
        }
    }

    pub(super) fn receive(&self, batch: Bytes) {
        let mut state = self.0.state.lock();
        if let ReceiveOutcome::UnknownSender(node) = self.0.links.receive(&batch) {
            // The node may be new, and its announcement still under way.
            let room = state.early.len() < MAX_EARLY;
            let batches = state.early.entry(node);
            if room || matches!(batches, Entry::Occupied(_)) {
                let batches = batches.or_default();
                if batches.len() < MAX_EARLY {
                    batches.push(batch);
                }
            }
            self.0.refresh.notify_one();
        }
    }

    /// A node is up: messages are exchanged with it from now on.
    pub(super) fn add_peer(&self, state: &mut ClusterState, node: NodeId) {
        if node == state.id || !self.0.links.add_peer(node) {
            return;
        }
        state.watchers.member_changed(node, true);
        for batch in state.early.remove(&node).into_iter().flatten() {
            self.0.links.receive(&batch);
        }
    }
}
