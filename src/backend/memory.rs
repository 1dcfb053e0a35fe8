//! [`Memory`]: the log of one node, as long as the process lives. The rings of the topics are the log.

use std::{
    collections::{BTreeMap, BinaryHeap},
    future::ready,
    ops::Bound,
    sync::Arc,
};

use futures_util::{FutureExt, future::BoxFuture};
use parking_lot::Mutex;

use crate::{
    bus::{ChannelInfo, ConsumerInfo, CursorOp, Log, LogPage, Placed, ReadLimit, Ring, Tail, Topic, Topics},
    channel::Channel,
    error::{Code, Error, Result},
    event::Draft,
    position::{Epoch, Position, Start},
};

pub struct Memory {
    topics: Arc<Topics>,
    consumers: Mutex<BTreeMap<Box<str>, State>>,
}

/// Of one consumer.
struct State {
    cursors: BTreeMap<Channel, Position>,
    /// Unix milliseconds.
    seen: u64,
}

impl Memory {
    pub fn new(topics: Arc<Topics>) -> Self {
        Memory { topics, consumers: Mutex::default() }
    }

    fn place(&self, channel: &Channel, subject: &str, drafts: Vec<Draft>) -> Result<Vec<Placed>> {
        self.topics.reserve(drafts.iter().map(Draft::size).sum())?;
        let (placed, parked) = self.topics.with(channel, |topic, ring| {
            let before = ring.memory();
            let now = self.topics.now();
            let placed = ring.append(channel, subject, drafts, topic.retention(), &self.topics.config().keys, now)?;
            self.topics.account(before, ring.memory());
            Ok::<_, Error>((placed, ring.take_parked()))
        })?;
        parked.wake();
        Ok(placed)
    }

    fn page(&self, channel: &Channel, start: Start, limit: ReadLimit) -> LogPage {
        match self.topics.get(channel) {
            Some(topic) => topic.lock().page(channel, start, limit, self.topics.now()),
            // Reads never write: what is known of the end of a channel without a topic is asked of a ring in passing.
            None => self.topics.passing(channel).page(channel, start, limit, self.topics.now()),
        }
    }

    fn info(&self, channel: &Channel) -> ChannelInfo {
        match self.topics.get(channel) {
            Some(topic) => describe(channel, &topic.lock()),
            None => describe(channel, &self.topics.passing(channel)),
        }
    }

    fn names(&self, prefix: &str, after: Option<&str>, limit: usize) -> Vec<ChannelInfo> {
        // The smallest `limit` names, without holding all of them.
        let mut first: BinaryHeap<Channel> = BinaryHeap::with_capacity(limit + 1);
        self.topics.each(|topic| {
            let name = topic.channel().as_str();
            let wanted = name.starts_with(prefix) && after.is_none_or(|after| name > after);
            if wanted
                && (first.len() < limit || first.peek().is_some_and(|last| topic.channel() < last))
                && !topic.lock().epoch().is_absent()
            {
                first.push(topic.channel().clone());
                if first.len() > limit {
                    first.pop();
                }
            }
        });
        first.into_sorted_vec().iter().map(|channel| self.info(channel)).collect()
    }

    fn delete(&self, channel: &Channel, before: Option<Position>) -> Result<()> {
        let Some(topic) = self.topics.get(channel) else {
            return match before {
                Some(_) => Err(Error::new(Code::InvalidPosition, "the channel has no log")),
                None => Ok(()),
            };
        };
        let mut ring = topic.lock();
        let size = ring.memory();
        match before {
            Some(before) => ring.trim_before(before)?,
            None => ring.delete(self.topics.now()),
        }
        self.topics.account(size, ring.memory());
        Ok(())
    }

    fn act(&self, consumer: &str, channel: &Channel, act: CursorOp) -> Result<Option<Position>> {
        let now = self.topics.now();
        let mut consumers = self.consumers.lock();
        let known = consumers.get(consumer).and_then(|state| state.cursors.get(channel)).copied();
        let to = match act {
            CursorOp::Get => known,
            CursorOp::Seek(to) => Some(to),
            CursorOp::Commit(to) => Some(self.forward(channel, known, to)?),
        };
        if let Some(state) = consumers.get_mut(consumer) {
            state.seen = now;
        }
        let Some(to) = to.filter(|to| known != Some(*to)) else { return Ok(known) };
        if !consumers.contains_key(consumer) && consumers.len() >= self.topics.config().max_consumers {
            return Err(limit_reached("limits.consumers", self.topics.config().max_consumers));
        }
        let state = consumers.entry(consumer.into()).or_insert_with(|| State { cursors: BTreeMap::new(), seen: now });
        if !state.cursors.contains_key(channel) && state.cursors.len() >= self.topics.config().max_cursors {
            return Err(limit_reached("limits.consumer_channels", self.topics.config().max_cursors));
        }
        state.cursors.insert(channel.clone(), to);
        Ok(Some(to))
    }

    /// The later of two positions, as far as this node knows their order.
    fn forward(&self, channel: &Channel, known: Option<Position>, to: Position) -> Result<Position> {
        let rank = |ring: &Ring| {
            if !to.epoch.is_absent() && to.epoch == ring.epoch() && to.offset > ring.top() {
                return Err(Error::new(Code::InvalidPosition, format!("{to} lies ahead of channel {channel}")));
            }
            Ok((known.map(|known| ring.bounds().rank(known)), ring.bounds().rank(to)))
        };
        let (before, after) = match self.topics.get(channel) {
            Some(topic) => rank(&topic.lock())?,
            None => rank(&self.topics.passing(channel))?,
        };
        Ok(known.filter(|_| before >= Some(after)).unwrap_or(to))
    }

    fn describe_consumer(&self, name: &str, state: &State) -> ConsumerInfo {
        ConsumerInfo {
            name: name.into(),
            cursors: state.cursors.iter().map(|(channel, position)| (channel.clone(), *position)).collect(),
            seen: state.seen,
            expires: state.seen + self.topics.config().consumer_idle.as_millis() as u64,
        }
    }
}

fn limit_reached(limit: &'static str, number: usize) -> Error {
    Error::new(Code::LimitReached, format!("{limit} is {number}")).with("limit", limit)
}

fn describe(channel: &Channel, ring: &Ring) -> ChannelInfo {
    let absent = ring.epoch() == Epoch::ABSENT;
    ChannelInfo {
        channel: channel.clone(),
        epoch: ring.epoch(),
        first: ring.first(),
        top: ring.top(),
        bytes: ring.bytes(),
        readers: ring.readers(),
        time: ring.time().filter(|_| !absent),
    }
}

/// Nothing here waits: every answer is ready.
impl Log for Memory {
    fn ready(&self) -> Result<()> {
        Ok(())
    }

    fn sweep(&self) {
        if !self.topics.sweep() {
            return;
        }
        let old = self.topics.now().saturating_sub(self.topics.config().consumer_idle.as_millis() as u64);
        self.consumers.lock().retain(|_, state| state.seen >= old);
    }

    fn append<'a>(
        &'a self,
        channel: &'a Channel,
        subject: &'a str,
        drafts: Vec<Draft>,
    ) -> BoxFuture<'a, Result<Vec<Placed>>> {
        ready(self.place(channel, subject, drafts)).boxed()
    }

    fn read<'a>(&'a self, channel: &'a Channel, start: Start, limit: ReadLimit) -> BoxFuture<'a, Result<LogPage>> {
        ready(Ok(self.page(channel, start, limit))).boxed()
    }

    fn tail<'a>(&'a self, _topic: &'a Arc<Topic>) -> BoxFuture<'a, Result<Tail>> {
        ready(Ok(Tail::default())).boxed()
    }

    fn inspect<'a>(&'a self, channel: &'a Channel) -> BoxFuture<'a, Result<ChannelInfo>> {
        ready(Ok(self.info(channel))).boxed()
    }

    fn list<'a>(
        &'a self,
        prefix: &'a str,
        after: Option<&'a str>,
        limit: usize,
    ) -> BoxFuture<'a, Result<Vec<ChannelInfo>>> {
        ready(Ok(self.names(prefix, after, limit))).boxed()
    }

    fn remove<'a>(&'a self, channel: &'a Channel, before: Option<Position>) -> BoxFuture<'a, Result<()>> {
        ready(self.delete(channel, before)).boxed()
    }

    fn cursor<'a>(
        &'a self,
        consumer: &'a str,
        channel: &'a Channel,
        act: CursorOp,
    ) -> BoxFuture<'a, Result<Option<Position>>> {
        ready(self.act(consumer, channel, act)).boxed()
    }

    fn consumer<'a>(&'a self, consumer: &'a str) -> BoxFuture<'a, Result<Option<ConsumerInfo>>> {
        let consumers = self.consumers.lock();
        ready(Ok(consumers.get(consumer).map(|state| self.describe_consumer(consumer, state)))).boxed()
    }

    fn consumers<'a>(
        &'a self,
        prefix: &'a str,
        after: Option<&'a str>,
        limit: usize,
    ) -> BoxFuture<'a, Result<Vec<ConsumerInfo>>> {
        let start = match after {
            Some(after) if after >= prefix => Bound::Excluded(after),
            _ => Bound::Included(prefix),
        };
        let consumers = self.consumers.lock();
        let page = consumers
            .range::<str, _>((start, Bound::Unbounded))
            .take_while(|(name, _)| name.starts_with(prefix))
            .take(limit)
            .map(|(name, state)| self.describe_consumer(name, state))
            .collect();
        ready(Ok(page)).boxed()
    }

    fn forget<'a>(&'a self, consumer: &'a str) -> BoxFuture<'a, Result<bool>> {
        ready(Ok(self.consumers.lock().remove(consumer).is_some())).boxed()
    }
}
