//! [`Redis`], the log of many nodes: what is placed, read and removed.

use std::{
    collections::BTreeSet,
    sync::{Arc, LazyLock},
    time::Duration,
};

use bytes::Bytes;
use futures_util::{FutureExt, future::BoxFuture};

use super::{
    Inner, Redis,
    keys::ChannelKeys,
    wire::{LogSnapshot, SnapshotParams},
};
use crate::backend::redis::client::{Command, CommandError, OnLostReply, RedisConnection, Script, Value};
use crate::{
    bus::{ChannelInfo, ConsumerInfo, CursorOp, Log, LogBounds, LogPage, Placed, ReadLimit, Retention, Tail, Topic},
    channel::Channel,
    error::{Code, Error, Result},
    event::{Draft, Event},
    position::{Epoch, Position, Start},
};

static LOOK: LazyLock<Script> =
    LazyLock::new(|| Script::new(concat!(include_str!("limits.lua"), include_str!("look.lua"))));
static REMOVE: LazyLock<Script> =
    LazyLock::new(|| Script::new(concat!(include_str!("limits.lua"), include_str!("remove.lua"))));
static TOUCH: LazyLock<Script> =
    LazyLock::new(|| Script::new(concat!(include_str!("limits.lua"), include_str!("touch.lua"))));

/// Ten thousand years: what is longer is for ever, and Lua still counts exactly.
pub(super) const FOR_EVER: u64 = 1 << 48;
/// Names that one look at all keys brings, at least and at most, unless more are wanted.
const NAMES: std::ops::Range<usize> = 256..8192;
/// Keys looked at by one SCAN.
const SCAN: u64 = 1000;

/// Why Redis did not do what was asked. `what` may have been done if the answer was lost.
pub(super) fn failed(fault: CommandError) -> Error {
    match fault {
        CommandError::NotExecuted(reason) => {
            tracing::debug!(%reason, "Redis is away");
            Error::new(Code::BusUnavailable, "Redis cannot be reached now")
        }
        CommandError::Unconfirmed => Error::new(Code::Unconfirmed, "it was sent to Redis, and the answer is lost"),
        CommandError::Rejected(error) => match error.split(' ').next().unwrap_or_default() {
            "OOM" => {
                Error::new(Code::Overloaded, "Redis has no memory left (its maxmemory)").with("limit", "maxmemory")
            }
            "VERSION" => Error::new(Code::BusUnavailable, "a newer weir wrote this channel: this node must be updated"),
            "MISCONF" | "NOREPLICAS" | "NOPERM" | "NOAUTH" | "WRONGTYPE" => {
                tracing::warn!(%error, "Redis refuses");
                let code = error.split(' ').next().unwrap_or_default().to_owned();
                Error::new(
                    Code::BusUnavailable,
                    format!("Redis refuses it ({code}); the reason is in the log of this node"),
                )
            }
            _ => Error::internal(format!("Redis: {error}")),
        },
    }
}

pub(super) fn nonsense() -> Error {
    Error::internal("Redis answers what a script of weir never does")
}

pub(super) fn millis(time: Duration) -> u64 {
    u64::try_from(time.as_millis()).unwrap_or(FOR_EVER).min(FOR_EVER)
}

impl Inner {
    /// What the scripts take for now: 0 is the clock of Redis.
    pub(super) fn script_now(&self) -> u64 {
        if self.clock_is_ours { self.topics.now() } else { 0 }
    }
}

// === reading ===

impl Inner {
    /// One look at a log: from `start` on, as far as `limit` goes.
    pub(super) async fn look(
        &self,
        keys: &ChannelKeys,
        keep: &Retention,
        start: Start,
        limit: ReadLimit,
    ) -> Result<LogSnapshot> {
        let (meta, stream) = (keys.meta(), keys.stream());
        let (from, epoch, number) = match start {
            Start::Now => ("none", String::new(), 0),
            Start::Earliest => ("earliest", String::new(), 0),
            Start::After(position) if position.epoch.is_absent() => ("earliest", String::new(), 0),
            Start::After(position) => ("after", position.epoch.to_string(), position.offset),
            Start::AfterOffset(offset) => ("after", "*".to_owned(), offset),
            Start::Last(n) => ("last", String::new(), n),
        };
        let (count, age) = (keep.count as u64, millis(keep.age));
        // Offsets are exact in Lua up to there; whoever asks for more is past the end of any log.
        let number = number.min(FOR_EVER);
        let fill = |_: &RedisConnection, command: &mut Command| {
            command.push_int(self.script_now());
            command.push_int(count);
            command.push_int(age);
            command.push(from);
            command.push(&epoch);
            command.push_int(number);
            command.push_int(limit.events as u64);
            command.push_int(limit.bytes as u64);
        };
        let keys_of = [meta.as_bytes(), stream.as_bytes()];
        let mut touched = None;
        for _ in 0..3 {
            let (answer, connection) =
                self.topology.run(&LOOK, &keys_of, OnLostReply::Retry, fill).await.map_err(read_failed)?;
            let horizon = match self.clock_is_ours {
                true => Some(self.began),
                false => self.topology.horizon(meta.as_bytes(), &connection),
            };
            let look = LogSnapshot::read(&answer, SnapshotParams { horizon, count, age }).ok_or_else(nonsense)?;
            if look.newer {
                return Err(failed(CommandError::Rejected("VERSION".into())));
            }
            let current = *look.generation == *connection.server.generation.as_bytes();
            if current || look.bounds.is_absent() || touched.as_ref() == Some(&look.generation) {
                return Ok(look);
            }
            // Another server answers than wrote last: what it does not know of may have been lost, and whoever reads
            // must hear of it, whether or not anybody writes.
            touched = self.touch(keys, keep).await?;
        }
        Err(Error::new(Code::BusUnavailable, "Redis changes its master all the time"))
    }

    /// Says that a log is read, and answers the generation of it, if there is one. Begins a new term if the server is another.
    pub(super) async fn touch(&self, keys: &ChannelKeys, keep: &Retention) -> Result<Option<Bytes>> {
        let (meta, events) = (keys.meta(), keys.events());
        let fill = |connection: &RedisConnection, command: &mut Command| {
            command.push_int(self.script_now());
            command.push(&*connection.server.generation);
            command.push(&*Epoch::random().text());
            command.push(self.topology.publish_verb());
            command.push(&events);
            command.push_int(millis(keep.age));
        };
        let done =
            self.topology.run(&TOUCH, &[meta.as_bytes()], OnLostReply::Retry, fill).await.map_err(read_failed)?;
        Ok(done.0.bytes().cloned())
    }

    async fn page(&self, channel: &Channel, start: Start, limit: ReadLimit) -> Result<LogPage> {
        let keys = self.keys.channel(channel);
        let keep = self.keep_of(channel).await.map_err(failed)?;
        let mut look = self.look(&keys, &keep, start, limit).await?;
        let (mut next, mut gap) = look.bounds.resolve(channel, start, look.now);
        if !follows(&look, next) {
            // It was read from elsewhere than it turns out to begin.
            look = self.look(&keys, &keep, Start::After(next), limit).await?;
            (next, gap) = look.bounds.resolve(channel, start, look.now);
            if !follows(&look, next) {
                // What should be there is not: the stream was deleted, or cut, by somebody else.
                look.bounds.first = look
                    .events
                    .iter()
                    .find(|event| event.offset > next.offset)
                    .map_or(look.bounds.top + 1, |event| event.offset);
                (next, gap) = look.bounds.resolve(channel, start, look.now);
            }
        }
        let mut bytes = 0;
        let mut events = Vec::new();
        for event in look.events {
            if event.offset <= next.offset {
                continue;
            }
            bytes += event.size() + channel.as_str().len() + 96;
            let contiguous = event.offset == next.offset + 1 && event.epoch == next.epoch;
            if !contiguous || events.len() == limit.events || (bytes > limit.bytes && !events.is_empty()) {
                break;
            }
            next = event.position();
            events.push(event);
        }
        let more = !look.bounds.is_absent() && next.offset < look.bounds.top;
        Ok(LogPage { events, next, more, gap })
    }

    async fn describe(&self, channel: &Channel) -> Result<ChannelInfo> {
        let keys = self.keys.channel(channel);
        let one = ReadLimit { events: 1, bytes: 0 };
        let look = self.look(&keys, &self.keep_of(channel).await.map_err(failed)?, Start::Earliest, one).await?;
        let LogBounds { epoch, first, top, time, .. } = look.bounds;
        Ok(ChannelInfo {
            channel: channel.clone(),
            epoch,
            first: look.events.first().map_or(first, |event| event.offset),
            top,
            bytes: if look.events.is_empty() { 0 } else { look.bytes as usize },
            readers: self.topics.get(channel).map_or(0, |topic| topic.lock().readers()),
            time: (!epoch.is_absent()).then_some(time),
        })
    }

    async fn names(&self, prefix: &str, after: Option<&str>, limit: usize) -> Result<Vec<ChannelInfo>> {
        let pattern = self.keys.logs(prefix);
        let mut after = after.map(str::to_owned);
        let mut found = Vec::new();
        // What is left of channels without a log is found as well, and there may be more of that: each round, which looks
        // at every key, brings more than is wanted.
        while found.len() < limit {
            let wanted = limit - found.len();
            let room = wanted.saturating_mul(4).clamp(NAMES.start, NAMES.end).max(wanted);
            let mut first: BTreeSet<Channel> = BTreeSet::new();
            self.scan(&pattern, |key| {
                let Some(channel) = self.keys.channel_of(key) else { return };
                let name = channel.as_str();
                if !name.starts_with(prefix) || after.as_deref().is_some_and(|after| name <= after) {
                    return;
                }
                first.insert(channel);
                if first.len() > room {
                    first.pop_last();
                }
            })
            .await?;
            after = first.last().map(|name| name.as_str().to_owned());
            let last = first.len() < room;
            let names: Vec<Channel> = first.into_iter().collect();
            for names in names.chunks(wanted) {
                let infos = futures_util::future::try_join_all(names.iter().map(|name| self.describe(name))).await?;
                found.extend(infos.into_iter().filter(|info| !info.epoch.is_absent()));
                if found.len() >= limit {
                    break;
                }
            }
            if last {
                break;
            }
        }
        found.truncate(limit);
        Ok(found)
    }

    /// Calls `visit` with every key that fits, on all servers, some of them twice.
    async fn scan(&self, pattern: &str, mut visit: impl FnMut(&[u8])) -> Result<()> {
        for server in self.topology.servers() {
            let mut cursor = Bytes::from_static(b"0");
            loop {
                let connection =
                    server.connection().ok_or_else(|| failed(CommandError::NotExecuted("no connection".into())))?;
                let command = Command::new("SCAN").arg(&cursor).arg("MATCH").arg(pattern).arg("COUNT").int(SCAN);
                let answer = connection.ask(&command).await.map_err(read_failed)?;
                let Some([Value::Bytes(next), Value::List(keys)]) = answer.list() else { return Err(nonsense()) };
                keys.iter().filter_map(Value::bytes).for_each(|key| visit(key));
                cursor = next.clone();
                if *cursor == *b"0" {
                    break;
                }
            }
        }
        Ok(())
    }

    async fn delete(&self, channel: &Channel, before: Option<Position>) -> Result<()> {
        let keys = self.keys.channel(channel);
        let (meta, stream, events) = (keys.meta(), keys.stream(), keys.events());
        let keep = self.keep_of(channel).await.map_err(failed)?;
        let fill = |_: &RedisConnection, command: &mut Command| {
            command.push_int(self.script_now());
            command.push(self.topology.publish_verb());
            command.push(&events);
            command.push(before.map_or(String::new(), |before| before.epoch.to_string()));
            // Offsets begin with 1: nothing lies before it, and 0 says all.
            command.push_int(before.map_or(0, |before| before.offset.clamp(1, FOR_EVER)));
            command.push_int(millis(keep.age));
        };
        let keys_of = [meta.as_bytes(), stream.as_bytes()];
        let (done, _) = self.topology.run(&REMOVE, &keys_of, OnLostReply::Report, fill).await.map_err(failed)?;
        match done.int() {
            Some(1) => {
                // Whoever asked and reads here reads what is left.
                self.refresh(channel).await;
                Ok(())
            }
            Some(0) => Err(Error::new(Code::InvalidPosition, "before is a position in the channel as it is now")),
            _ => Err(nonsense()),
        }
    }
}

/// A read that was lost did nothing.
pub(super) fn read_failed(fault: CommandError) -> Error {
    match fault {
        CommandError::Unconfirmed => failed(CommandError::NotExecuted("the connection broke".into())),
        fault => failed(fault),
    }
}

/// Whether the first event after `next` is the one that should be.
fn follows(look: &LogSnapshot, next: Position) -> bool {
    let found = look.events.iter().find(|event: &&Arc<Event>| event.offset > next.offset);
    match found {
        Some(event) => event.offset == next.offset + 1,
        None => look.bounds.is_absent() || next.offset >= look.bounds.top,
    }
}

impl Log for Redis {
    fn ready(&self) -> Result<()> {
        match self.0.is_ready() {
            true => Ok(()),
            false => Err(Error::new(Code::BusUnavailable, "no probe has come back through Redis lately")),
        }
    }

    fn sweep(&self) {
        self.0.topics.sweep();
    }

    fn append<'a>(
        &'a self,
        channel: &'a Channel,
        subject: &'a str,
        drafts: Vec<Draft>,
    ) -> BoxFuture<'a, Result<Vec<Placed>>> {
        self.0.append(channel, subject, drafts).boxed()
    }

    fn read<'a>(&'a self, channel: &'a Channel, start: Start, limit: ReadLimit) -> BoxFuture<'a, Result<LogPage>> {
        async move {
            let page = match start {
                Start::Now => self.0.page(channel, start, ReadLimit { events: 0, bytes: 0 }).await,
                _ => self.0.page(channel, start, limit).await,
            };
            let page = page?;
            // Whoever reads and then waits must not find a ring that knows less than the page did.
            self.0.catch_up_with(channel, page.next).await;
            Ok(page)
        }
        .boxed()
    }

    fn tail<'a>(&'a self, topic: &'a Arc<Topic>) -> BoxFuture<'a, Result<Tail>> {
        self.0.tail(topic).boxed()
    }

    fn inspect<'a>(&'a self, channel: &'a Channel) -> BoxFuture<'a, Result<ChannelInfo>> {
        self.0.describe(channel).boxed()
    }

    fn list<'a>(
        &'a self,
        prefix: &'a str,
        after: Option<&'a str>,
        limit: usize,
    ) -> BoxFuture<'a, Result<Vec<ChannelInfo>>> {
        self.0.names(prefix, after, limit).boxed()
    }

    fn remove<'a>(&'a self, channel: &'a Channel, before: Option<Position>) -> BoxFuture<'a, Result<()>> {
        self.0.delete(channel, before).boxed()
    }

    fn cursor<'a>(
        &'a self,
        consumer: &'a str,
        channel: &'a Channel,
        act: CursorOp,
    ) -> BoxFuture<'a, Result<Option<Position>>> {
        self.0.act(consumer, channel, act).boxed()
    }

    fn consumer<'a>(&'a self, consumer: &'a str) -> BoxFuture<'a, Result<Option<ConsumerInfo>>> {
        self.0.describe_consumer(consumer).boxed()
    }

    fn consumers<'a>(
        &'a self,
        prefix: &'a str,
        after: Option<&'a str>,
        limit: usize,
    ) -> BoxFuture<'a, Result<Vec<ConsumerInfo>>> {
        self.0.list_consumers(prefix, after, limit).boxed()
    }

    fn forget<'a>(&'a self, consumer: &'a str) -> BoxFuture<'a, Result<bool>> {
        self.0.forget_consumer(consumer).boxed()
    }
}
