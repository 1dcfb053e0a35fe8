//! Stores published items in the order that their `prev-id`s name, without making their publishers wait.

use std::{sync::Arc, time::Duration};

use tokio::{sync::Notify, time::Instant};

use super::{
    proxy::GripProxy,
    waiting_items::{AcceptedItem, Enqueued, NextItem, in_order},
};
use crate::{
    bus::{Format, Subscriptions},
    channel::Channel,
    error::{Code, Error, Result, Retry},
    metrics::Transport,
    position::Start,
};

/// The publisher to which idempotency keys belong.
const SUBJECT: &str = "grip";
/// How often, and after which time, an item that was acknowledged is stored again if the bus rejects it for now.
const RETRIES: u32 = 60;
const RETRY_PAUSE: Duration = Duration::from_secs(1);

impl GripProxy {
    /// Stores the items whose turn it is, and lets the others wait for their predecessors. It ends only when all of this
    /// is done, even if its future is dropped: a publisher that disconnects loses nothing.
    pub(super) async fn store_all(self: &Arc<Self>, items: Vec<AcceptedItem>) -> Result<()> {
        let proxy = self.clone();
        let stored = self.node.background.spawn(async move {
            for item in in_order(items) {
                proxy.store_or_wait(item).await?;
            }
            Ok(())
        });
        stored.await.unwrap_or_else(|error| Err(Error::internal(error)))
    }

    async fn store_or_wait(self: &Arc<Self>, item: AcceptedItem) -> Result<()> {
        if item.prev_id.is_none() || item.is_next(self.last_item_id(&item.channel).await.as_deref()) {
            return self.store(&item).await;
        }
        let channel = item.channel.clone();
        match self.waiting.enqueue(item) {
            Enqueued::Waiting => {}
            Enqueued::First(changed) => drop(self.node.background.spawn(self.clone().store_waiting(channel, changed))),
            Enqueued::Duplicate => self.node.metrics.duplicates.add(1),
            // Out of order, as after the timeout.
            Enqueued::Full(item) => return self.store(&item).await,
        }
        Ok(())
    }

    async fn store(&self, item: &AcceptedItem) -> Result<()> {
        let metrics = &self.node.metrics;
        match self.node.bus.publish_one(SUBJECT, &item.channel, item.draft.clone()).await {
            Ok(placed) => metrics.event_published(Transport::Http, placed.duplicate, item.draft.size()),
            // Items with the same id are the same item, even if their contents differ.
            Err(error) if error.code() == Code::KeyReused => metrics.duplicates.add(1),
            Err(error) => {
                metrics.publish_failed(error.code());
                return Err(error);
            }
        }
        Ok(())
    }

    /// Stores the waiting items of a channel until there are none. A predecessor may be stored by another node.
    async fn store_waiting(self: Arc<Self>, channel: Channel, changed: Arc<Notify>) {
        let mut subs = Subscriptions::new(Format::NONE);
        // If the bus is unavailable, the items wait for their timeout.
        let watches = self.node.bus.watch(std::slice::from_ref(&channel)).await.unwrap_or_default();
        let slots: Vec<u32> = watches.into_iter().map(|watch| subs.add(watch, Start::Now, None).slot).collect();
        let draining = &self.node.draining;
        loop {
            // Read after the subscription: an item that was stored before it does not wake this task.
            let last = self.last_item_id(&channel).await;
            let now = Instant::now();
            // A node that shuts down waits for no predecessor.
            let now = if draining.is_cancelled() { now + Duration::from_secs(60) } else { now };
            match self.waiting.take(&channel, last.as_deref(), now) {
                NextItem::Ready(item) => self.store_acknowledged(&item).await,
                NextItem::Later(deadline) => tokio::select! {
                    () = std::future::poll_fn(|cx| subs.poll_changed(cx)) => {}
                    () = changed.notified() => {}
                    () = tokio::time::sleep_until(deadline) => {}
                    () = draining.cancelled() => {}
                },
                NextItem::Done => return,
            }
            for slot in &slots {
                subs.seek(*slot, Start::Now);
            }
        }
    }

    /// Stores an item whose publisher does not wait for the result any more.
    async fn store_acknowledged(&self, item: &AcceptedItem) {
        for _ in 0..RETRIES {
            let Err(error) = self.store(item).await else { return };
            let again = match error.code().retry() {
                Retry::Yes => true,
                // It may have been stored: only its id prevents that it is stored twice.
                Retry::Key => item.draft.parts().1.is_some(),
                Retry::No => false,
            };
            if !again {
                tracing::warn!(channel = %item.channel, %error, "could not store an acknowledged item");
                return;
            }
            tokio::time::sleep(RETRY_PAUSE).await;
        }
        tracing::warn!(channel = %item.channel, "could not store an acknowledged item: the bus was unavailable for long");
    }
}
