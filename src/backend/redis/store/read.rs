//! [`LogReader`]: snapshots and pages of logs, and the list of channels.

use std::{collections::BTreeSet, sync::Arc};

use bytes::Bytes;
use futures_util::future::try_join_all;
use redis::{Cmd, Value, cmd};

use super::{
    context::{LogContext, MAX_NUMBER, millis, unexpected_reply},
    keys::ChannelKeys,
    retention::RetentionRules,
    wire::{LogSnapshot, SnapshotParams},
};
use crate::{
    backend::redis::client::{CommandError, OnLostReply, RedisConnection, Script},
    bus::{ChannelInfo, LogBounds, LogPage, ReadLimit, Retention},
    channel::Channel,
    error::{Code, Error, Result},
    event::Event,
    position::{Epoch, Position, Start},
};

static SNAPSHOT: Script = Script::new(concat!(include_str!("limits.lua"), include_str!("snapshot.lua")));
static TOUCH: Script = Script::new(concat!(include_str!("limits.lua"), include_str!("touch.lua")));

/// Names that one scan of all keys collects, at least and at most, unless more are wanted.
const NAMES: std::ops::Range<usize> = 256..8192;
/// Keys of one SCAN.
const SCAN: u64 = 1000;

pub(super) struct LogReader {
    context: Arc<LogContext>,
    retention: Arc<RetentionRules>,
    /// The first full second of this reader.
    began: u64,
}

impl LogReader {
    pub(super) fn new(context: Arc<LogContext>, retention: Arc<RetentionRules>) -> Arc<Self> {
        let began = context.topics.now() / 1000 + 1;
        Arc::new(LogReader { context, retention, began })
    }

    /// The state of a log, and its events from `start` on as far as `limit` goes.
    pub(super) async fn snapshot(
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
        let fill = |_: &RedisConnection, command: &mut Cmd| {
            command.arg(self.context.script_now()).arg(count).arg(age).arg(from).arg(&epoch);
            // A larger number is past the end of any log.
            command.arg(number.min(MAX_NUMBER)).arg(limit.events).arg(limit.bytes);
        };
        let script_keys = [meta.as_bytes(), stream.as_bytes()];
        let topology = &self.context.topology;
        let mut touched = None;
        for _ in 0..3 {
            let run = topology.run::<Vec<Value>>(&SNAPSHOT, &script_keys, OnLostReply::Retry, fill);
            let (reply, connection) = run.await.map_err(CommandError::of_read)?;
            let horizon = match self.context.topics.is_manual() {
                true => Some(self.began),
                false => topology.horizon(meta.as_bytes(), &connection),
            };
            let params = SnapshotParams { horizon, count, age };
            let snapshot = LogSnapshot::parse(reply, params).ok_or_else(unexpected_reply)?;
            if snapshot.newer {
                return Err(CommandError::Rejected("VERSION".into()).into());
            }
            let current = *snapshot.generation == *connection.server.generation.as_bytes();
            if current || snapshot.bounds.is_absent() || touched.as_ref() == Some(&snapshot.generation) {
                return Ok(snapshot);
            }
            // Another server replies than wrote last: events that it never received may be lost, and readers must learn
            // of it, whether or not anything else is published.
            match self.touch(keys, keep).await {
                Ok(generation) => touched = generation,
                Err(error) => {
                    // The log can be read although its term cannot be ended now. The first write ends it, behind the
                    // newest event of this snapshot, so that readers of both terms receive the gap then.
                    tracing::debug!(%error, "cannot begin a new term yet");
                    return Ok(snapshot);
                }
            }
        }
        Err(Error::new(Code::BusUnavailable, "Redis changes its master all the time"))
    }

    /// Marks a log as read, and returns its generation if it exists. Begins a new term if the server is another one.
    pub(super) async fn touch(&self, keys: &ChannelKeys, keep: &Retention) -> Result<Option<Bytes>> {
        let (meta, events, topology) = (keys.meta(), keys.events(), &self.context.topology);
        let fill = |connection: &RedisConnection, command: &mut Cmd| {
            command.arg(self.context.script_now()).arg(&*connection.server.generation);
            command.arg(&*Epoch::random().text()).arg(topology.publish_verb()).arg(&*events).arg(millis(keep.age));
        };
        let keys = [meta.as_bytes()];
        let run = topology.run(&TOUCH, &keys, OnLostReply::Retry, fill);
        let (generation, _) = run.await.map_err(CommandError::of_read)?;
        Ok(match generation {
            Value::BulkString(generation) => Some(generation.into()),
            _ => None,
        })
    }

    pub(super) async fn page(&self, channel: &Channel, start: Start, limit: ReadLimit) -> Result<LogPage> {
        let keys = self.context.keys.channel(channel);
        let keep = self.retention.for_read(channel).await?;
        let mut snapshot = self.snapshot(&keys, &keep, start, limit).await?;
        let (mut next, mut gap) = snapshot.bounds.resolve(channel, start, snapshot.now);
        if !is_contiguous(&snapshot, next) {
            // It was read from another position than the page begins at.
            snapshot = self.snapshot(&keys, &keep, Start::After(next), limit).await?;
            (next, gap) = snapshot.bounds.resolve(channel, start, snapshot.now);
            if !is_contiguous(&snapshot, next) {
                // The event that must follow is missing: something else deleted or trimmed the stream.
                let first = snapshot.events.iter().find(|event| event.offset > next.offset);
                snapshot.bounds.first = first.map_or(snapshot.bounds.top + 1, |event| event.offset);
                (next, gap) = snapshot.bounds.resolve(channel, start, snapshot.now);
            }
        }
        let mut bytes = 0;
        let mut events = Vec::new();
        for event in snapshot.events {
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
        let more = !snapshot.bounds.is_absent() && next.offset < snapshot.bounds.top;
        Ok(LogPage { events, next, more, gap })
    }

    pub(super) async fn describe(&self, channel: &Channel) -> Result<ChannelInfo> {
        let keys = self.context.keys.channel(channel);
        let one = ReadLimit { events: 1, bytes: 0 };
        let keep = self.retention.for_read(channel).await?;
        let snapshot = self.snapshot(&keys, &keep, Start::Earliest, one).await?;
        let LogBounds { epoch, first, top, time, .. } = snapshot.bounds;
        Ok(ChannelInfo {
            channel: channel.clone(),
            epoch,
            first: snapshot.events.first().map_or(first, |event| event.offset),
            top,
            bytes: if snapshot.events.is_empty() { 0 } else { snapshot.bytes as usize },
            readers: self.context.topics.get(channel).map_or(0, |topic| topic.lock().readers()),
            time: (!epoch.is_absent()).then_some(time),
        })
    }

    /// Channels whose names begin with `prefix`, in their order, behind `after`.
    pub(super) async fn list(&self, prefix: &str, after: Option<&str>, limit: usize) -> Result<Vec<ChannelInfo>> {
        let pattern = self.context.keys.logs(prefix);
        let mut after = after.map(str::to_owned);
        let mut found = Vec::new();
        // Keys that remain of expired logs are found as well, and there may be many of them: each round, which scans
        // every key, collects more than is wanted.
        while found.len() < limit {
            let wanted = limit - found.len();
            let room = wanted.saturating_mul(4).clamp(NAMES.start, NAMES.end).max(wanted);
            let mut first: BTreeSet<Channel> = BTreeSet::new();
            self.scan(&pattern, |key| {
                let Some(channel) = self.context.keys.channel_of(key) else { return };
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
                let infos = try_join_all(names.iter().map(|name| self.describe(name))).await?;
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

    /// Calls `visit` with every key that matches, on all servers; with some of them twice.
    async fn scan(&self, pattern: &str, mut visit: impl FnMut(&[u8])) -> Result<()> {
        for server in self.context.topology.servers() {
            let mut cursor: u64 = 0;
            loop {
                let scan = cmd("SCAN").arg(cursor).arg("MATCH").arg(pattern).arg("COUNT").arg(SCAN).take();
                let reply = self.context.topology.call_at::<(u64, Vec<Vec<u8>>)>(&server, &scan).await;
                let ((next, keys), _) = reply.map_err(CommandError::of_read)?;
                keys.iter().for_each(|key| visit(key));
                cursor = next;
                if cursor == 0 {
                    break;
                }
            }
        }
        Ok(())
    }
}

/// Whether the first event after `next` is the one with the next offset.
fn is_contiguous(snapshot: &LogSnapshot, next: Position) -> bool {
    match snapshot.events.iter().find(|event: &&Arc<Event>| event.offset > next.offset) {
        Some(event) => event.offset == next.offset + 1,
        None => snapshot.bounds.is_absent() || next.offset >= snapshot.bounds.top,
    }
}
