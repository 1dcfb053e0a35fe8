//! [`Appender`]: the publishes of this node. Publishes to a channel that arrive while an append to it is under way go
//! together with the next one: one script for all of them, and one message to the readers. A single publish does not
//! wait.
//!
//! There is one append to a channel at a time: so its events are placed in the order in which they arrived at this
//! node, even if an append must be retried.

use std::{
    collections::{HashMap, VecDeque, hash_map},
    sync::Arc,
};

use parking_lot::Mutex;
use tokio::{
    sync::oneshot,
    time::{Instant, timeout_at},
};

use super::{
    acks::ReplicaAcks,
    context::LogContext,
    keys::ChannelKeys,
    retention::RetentionRules,
    tail::Tails,
    write::{AppendError, AppendResult, LogWriter, PublishBatch},
};
use crate::{
    backend::redis::client::{CommandError, Deadline, RedisConnection, deadline},
    bus::Placed,
    channel::Channel,
    error::{Code, Error, Result},
    event::Draft,
};

/// The most that one script places, unless one publish has more: Redis does nothing else meanwhile.
const MAX_EVENTS: usize = 128;
const MAX_BYTES: usize = 256 << 10;
/// Bytes that may wait for their turn on this node.
const MAX_WAITING: usize = 64 << 20;

pub(super) struct Appender {
    pub(super) context: Arc<LogContext>,
    pub(super) writer: Arc<LogWriter>,
    pub(super) retention: Arc<RetentionRules>,
    pub(super) tails: Arc<Tails>,
    /// If publishes are acknowledged by replicas.
    pub(super) acks: Option<Arc<ReplicaAcks>>,
    pub(super) queues: Mutex<AppendQueues>,
}

/// The publishes that wait, by channel. A channel has a queue as long as a task places its events.
#[derive(Default)]
pub(super) struct AppendQueues {
    waiting: HashMap<Channel, VecDeque<WaitingPublish>>,
    bytes: usize,
}

struct WaitingPublish {
    batch: PublishBatch,
    since: Instant,
    deadline: Deadline,
    result: oneshot::Sender<AppendResult>,
}

/// The only task that places the events of a channel; it ends when its queue is empty.
struct ChannelAppender {
    appender: Arc<Appender>,
    channel: Channel,
    /// The queue was removed: another task may have begun.
    done: bool,
}

// === impl Appender ===

impl Appender {
    pub(super) async fn append(
        self: &Arc<Self>,
        channel: &Channel,
        subject: &str,
        drafts: Vec<Draft>,
    ) -> Result<Vec<Placed>> {
        let deadline = deadline();
        let result = self.submit(channel, PublishBatch { subject: subject.into(), drafts }, deadline)?;
        let (placed, connection) = match result.await.unwrap_or(Err(CommandError::Unconfirmed.into())) {
            Ok(placed) => placed,
            Err(AppendError::Command(error)) => return Err(error.into()),
            Err(AppendError::KeyReused { key, .. }) => {
                let reason = format!("the key {key:?} was used for another event of channel {channel}");
                return Err(Error::new(Code::KeyReused, reason));
            }
        };
        if let Some(acks) = &self.acks {
            // Duplicates wait as well: the first publish may have been placed a moment ago.
            let meta = self.context.keys.channel(channel).meta();
            let replicated = acks.replicated(meta.as_bytes(), &connection);
            timeout_at(deadline, replicated).await.unwrap_or(Err(CommandError::Unconfirmed))?;
        }
        Ok(placed)
    }

    /// Queues a publish, and starts a task if the channel has none.
    fn submit(
        self: &Arc<Self>,
        channel: &Channel,
        batch: PublishBatch,
        deadline: Deadline,
    ) -> Result<oneshot::Receiver<AppendResult>, CommandError> {
        let (tx, result) = oneshot::channel();
        let size = batch.size();
        let mut queues = self.queues.lock();
        if queues.bytes + size > MAX_WAITING.max(size) {
            return Err(CommandError::NotExecuted("too many events wait for Redis".into()));
        }
        queues.bytes += size;
        let waiting = WaitingPublish { batch, since: Instant::now(), deadline, result: tx };
        let task = match queues.waiting.entry(channel.clone()) {
            hash_map::Entry::Occupied(mut queue) => {
                queue.get_mut().push_back(waiting);
                None
            }
            hash_map::Entry::Vacant(free) => {
                free.insert(VecDeque::from([waiting]));
                Some(ChannelAppender { appender: self.clone(), channel: channel.clone(), done: false })
            }
        };
        // A runtime that shuts down drops a new task at once, which locks the queues.
        drop(queues);
        if let Some(task) = task {
            tokio::spawn(task.run());
        }
        Ok(result)
    }
}

impl AppendQueues {
    /// Takes the first `count` publishes of a channel.
    fn take(&mut self, channel: &Channel, count: usize) -> Vec<WaitingPublish> {
        let Some(queue) = self.waiting.get_mut(channel) else { return Vec::new() };
        let taken: Vec<_> = queue.drain(..count.min(queue.len())).collect();
        self.bytes -= taken.iter().map(|waiting| waiting.batch.size()).sum::<usize>();
        taken
    }
}

// === impl ChannelAppender ===

impl ChannelAppender {
    async fn run(mut self) {
        let keys = self.appender.context.keys.channel(&self.channel);
        while let Some(publishes) = self.next() {
            self.append(&keys, publishes).await;
        }
    }

    /// The publishes of the next script. None: the queue is empty, and the next publish starts another task.
    fn next(&mut self) -> Option<Vec<WaitingPublish>> {
        let mut queues = self.appender.queues.lock();
        let queue = queues.waiting.get_mut(&self.channel)?;
        let (mut count, mut bytes) = (0, 0);
        let fits = queue.iter().take_while(|waiting| {
            count += waiting.batch.drafts.len();
            bytes += waiting.batch.size();
            count <= MAX_EVENTS && bytes <= MAX_BYTES
        });
        let fits = fits.count().max(1);
        let publishes = queues.take(&self.channel, fits);
        if publishes.is_empty() {
            queues.waiting.remove(&self.channel);
            self.done = true;
            return None;
        }
        Some(publishes)
    }

    async fn append(&self, keys: &ChannelKeys, mut publishes: Vec<WaitingPublish>) {
        let appender = &self.appender;
        // The first publish has waited longest.
        while let Some(deadline) = publishes.first().map(|waiting| waiting.deadline) {
            let batches: Vec<&PublishBatch> = publishes.iter().map(|waiting| &waiting.batch).collect();
            let result = match appender.retention.for_write(&self.channel, deadline).await {
                Ok(keep) => appender.writer.append(keys, &keep, &batches, deadline).await,
                Err(error) => Err(error.into()),
            };
            match result {
                Ok((placed, connection)) => return self.placed(keys, publishes, placed, &connection),
                Err(AppendError::KeyReused { at, key }) => {
                    // Nothing was placed, and one publish is at fault: the others are retried without it.
                    let mut before = 0;
                    let rejected = publishes.iter().position(|waiting| {
                        before += waiting.batch.drafts.len();
                        at < before
                    });
                    // The index is of a draft of these publishes.
                    let rejected = publishes.remove(rejected.unwrap_or_default());
                    let _ = rejected.result.send(Err(AppendError::KeyReused { at, key }));
                }
                Err(error) => {
                    if let AppendError::Command(CommandError::NotExecuted(_)) = error {
                        // The publishes that came meanwhile have waited for the same.
                        publishes.extend(appender.queues.lock().take(&self.channel, usize::MAX));
                    }
                    for waiting in publishes {
                        let _ = waiting.result.send(Err(error.clone()));
                    }
                    return;
                }
            }
        }
    }

    fn placed(
        &self,
        keys: &ChannelKeys,
        publishes: Vec<WaitingPublish>,
        placed: Vec<Placed>,
        connection: &Arc<RedisConnection>,
    ) {
        let mut rest = placed.iter().copied();
        let mut results = Vec::with_capacity(publishes.len());
        let mut events = Vec::with_capacity(placed.len());
        for waiting in publishes {
            self.appender.context.topology.metrics.redis_append_seconds.record(waiting.since.elapsed());
            let placed: Vec<Placed> = rest.by_ref().take(waiting.batch.drafts.len()).collect();
            events.extend(waiting.batch.drafts.into_iter().zip(placed.iter().copied()));
            results.push((waiting.result, placed));
        }
        // Readers on this node need not wait for the message from Redis.
        self.appender.tails.apply_own(&keys.events(), events);
        for (result, placed) in results {
            let _ = result.send(Ok((placed, connection.clone())));
        }
    }
}

impl Drop for ChannelAppender {
    fn drop(&mut self) {
        // The task was aborted: dropping the senders reports these publishes as unconfirmed, and the next one starts
        // another task.
        if !self.done {
            let mut queues = self.appender.queues.lock();
            queues.take(&self.channel, usize::MAX);
            queues.waiting.remove(&self.channel);
        }
    }
}
