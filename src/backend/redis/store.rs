//! [`Redis`], the log of a bus on Redis.

mod acks;
mod append;
mod consumers;
mod context;
pub(super) mod keys;
mod probe;
mod read;
mod retention;
mod tail;
mod wire;
mod write;

use std::{sync::Arc, time::Duration};

use futures_util::{FutureExt, future::BoxFuture};
use parking_lot::Mutex;
use tokio::{
    task::JoinHandle,
    time::{MissedTickBehavior, timeout, timeout_at},
};

use self::{
    acks::ReplicaAcks, append::Appender, consumers::ConsumerStore, context::LogContext, keys::KeyNames, probe::Probes,
    read::LogReader, retention::RetentionRules, tail::Tails, write::LogWriter,
};
use super::client::{CommandError, Topology, deadline};
use crate::{
    bus::{ChannelInfo, ConsumerInfo, CursorOp, Log, LogPage, Placed, ReadLimit, Tail, Topic, Topics},
    channel::Channel,
    config::Ack,
    error::{Code, Error, Result},
    event::Draft,
    position::{Position, Start},
};

/// How often probes and tails are maintained.
const TICK: Duration = Duration::from_secs(1);
/// How long an operation of several steps may take in all, whatever Redis does: each step waits almost as long by
/// itself.
const ANSWER: Duration = Duration::from_millis(1_900);

/// The log of a bus that many nodes share. Dropped, it ends its subscriptions.
pub struct Redis {
    context: Arc<LogContext>,
    reader: Arc<LogReader>,
    writer: Arc<LogWriter>,
    retention: Arc<RetentionRules>,
    appender: Arc<Appender>,
    tails: Arc<Tails>,
    probes: Arc<Probes>,
    consumers: Arc<ConsumerStore>,
    tasks: [JoinHandle<()>; 2],
}

#[derive(Clone, Debug)]
pub struct RedisSettings {
    /// Of every key and every pub/sub channel.
    pub prefix: String,
    pub ack: Ack,
}

impl Redis {
    /// Needs a tokio runtime. Does not wait for a connection.
    pub fn start(topology: Arc<Topology>, topics: Arc<Topics>, settings: RedisSettings) -> Self {
        let context = Arc::new(LogContext { topology, topics, keys: KeyNames::new(&settings.prefix) });
        let retention = Arc::new(RetentionRules::new(context.clone()));
        let reader = LogReader::new(context.clone(), retention.clone());
        let writer = Arc::new(LogWriter::new(context.clone()));
        let probes = Probes::new(context.clone(), writer.clone());
        let tails = Tails::start(context.clone(), reader.clone(), retention.clone(), probes.clone());
        let appender = Arc::new(Appender {
            context: context.clone(),
            writer: writer.clone(),
            retention: retention.clone(),
            tails: tails.clone(),
            acks: (settings.ack == Ack::Replicated).then(|| ReplicaAcks::new(context.clone())),
            queues: Mutex::default(),
        });
        let consumers = Arc::new(ConsumerStore::new(context.clone(), reader.clone(), retention.clone()));
        let maintenance = tokio::spawn({
            let (probes, tails) = (probes.clone(), tails.clone());
            async move {
                let mut ticks = tokio::time::interval(TICK);
                ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
                loop {
                    ticks.tick().await;
                    probes.tick(&tails.pubsub);
                    tails.audit();
                }
            }
        });
        let tasks = [maintenance, tokio::spawn(retention.clone().run())];
        Redis { context, reader, writer, retention, appender, tails, probes, consumers, tasks }
    }

    /// Audits all channels now, for tests whose clock stands still.
    pub async fn audit(&self) {
        self.tails.audit_all().await;
    }

    /// The number of servers whose replicas are waited for, for tests that look for leaks.
    pub fn waits(&self) -> usize {
        self.appender.acks.as_ref().map_or(0, |acks| acks.len())
    }
}

impl Drop for Redis {
    fn drop(&mut self) {
        self.tasks.iter().for_each(JoinHandle::abort);
    }
}

/// Bounds the time of a read. What it waits for goes on without it.
async fn read_in_time<T>(read: impl Future<Output = Result<T>>) -> Result<T> {
    let late = || CommandError::NotExecuted("Redis does not reply".into());
    timeout(ANSWER, read).await.unwrap_or_else(|_| Err(late().into()))
}

/// Bounds the time of a write, a step of which may have been sent.
async fn write_in_time<T>(write: impl Future<Output = Result<T>>) -> Result<T> {
    timeout(ANSWER, write).await.unwrap_or_else(|_| Err(CommandError::Unconfirmed.into()))
}

impl Log for Redis {
    fn ready(&self) -> Result<()> {
        match self.probes.is_ready() {
            true => Ok(()),
            false => Err(Error::new(Code::BusUnavailable, "no probe has come back through Redis lately")),
        }
    }

    fn sweep(&self) {
        // The scripts trim the logs.
        self.context.topics.sweep(|_, _| {});
    }

    fn append<'a>(
        &'a self,
        channel: &'a Channel,
        subject: &'a str,
        drafts: Vec<Draft>,
    ) -> BoxFuture<'a, Result<Vec<Placed>>> {
        self.appender.append(channel, subject, drafts).boxed()
    }

    fn read<'a>(&'a self, channel: &'a Channel, start: Start, limit: ReadLimit) -> BoxFuture<'a, Result<LogPage>> {
        async move {
            let limit = if start == Start::Now { ReadLimit { events: 0, bytes: 0 } } else { limit };
            let deadline = deadline();
            let page = read_in_time(self.reader.page(channel, start, limit)).await?;
            // A client that reads and then waits must not find a ring that is older than the page.
            let _ = timeout_at(deadline, self.tails.catch_up_with(channel, page.next)).await;
            Ok(page)
        }
        .boxed()
    }

    fn tail<'a>(&'a self, topic: &'a Arc<Topic>) -> BoxFuture<'a, Result<Tail>> {
        read_in_time(self.tails.tail(topic)).boxed()
    }

    fn inspect<'a>(&'a self, channel: &'a Channel) -> BoxFuture<'a, Result<ChannelInfo>> {
        read_in_time(self.reader.describe(channel)).boxed()
    }

    fn list<'a>(
        &'a self,
        prefix: &'a str,
        after: Option<&'a str>,
        limit: usize,
    ) -> BoxFuture<'a, Result<Vec<ChannelInfo>>> {
        self.reader.list(prefix, after, limit).boxed()
    }

    fn remove<'a>(&'a self, channel: &'a Channel, before: Option<Position>) -> BoxFuture<'a, Result<()>> {
        async move {
            let deadline = deadline();
            let keep = self.retention.for_write(channel, deadline).await?;
            write_in_time(self.writer.remove(&self.context.keys.channel(channel), &keep, before)).await?;
            // A caller that reads on this node sees the removal.
            let _ = timeout_at(deadline, self.tails.refresh(channel)).await;
            Ok(())
        }
        .boxed()
    }

    fn cursor<'a>(
        &'a self,
        consumer: &'a str,
        channel: &'a Channel,
        act: CursorOp,
    ) -> BoxFuture<'a, Result<Option<Position>>> {
        let result = self.consumers.act(consumer, channel, act);
        match act {
            CursorOp::Get => read_in_time(result).boxed(),
            CursorOp::Commit(_) | CursorOp::Seek(_) => write_in_time(result).boxed(),
        }
    }

    fn consumer<'a>(&'a self, consumer: &'a str) -> BoxFuture<'a, Result<Option<ConsumerInfo>>> {
        read_in_time(self.consumers.describe(consumer)).boxed()
    }

    fn consumers<'a>(
        &'a self,
        prefix: &'a str,
        after: Option<&'a str>,
        limit: usize,
    ) -> BoxFuture<'a, Result<Vec<ConsumerInfo>>> {
        self.consumers.list(prefix, after, limit).boxed()
    }

    fn forget<'a>(&'a self, consumer: &'a str) -> BoxFuture<'a, Result<bool>> {
        write_in_time(self.consumers.forget(consumer)).boxed()
    }
}
