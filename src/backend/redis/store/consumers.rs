//! [`ConsumerStore`]: each consumer has all its cursors in one key, which expires when it is not used for long. The set
//! of all names is only for counting and listing; names of expired consumers are removed when there is no room, and by
//! listings that find them.

use std::sync::Arc;

use futures_util::future::try_join_all;
use redis::{Cmd, FromRedisValue, cmd};
use tokio::sync::Mutex;

use super::{
    context::{LogContext, millis, unexpected_reply},
    read::LogReader,
    retention::RetentionRules,
};
use crate::{
    backend::redis::client::{CommandError, OnLostReply, RedisConnection, Script},
    bus::{ConsumerInfo, CursorOp, ReadLimit},
    channel::Channel,
    error::{Code, Error, Result},
    position::{Position, Start},
};

static CONSUMER: Script = Script::new(include_str!("consumer.lua"));
static ADMIT: Script = Script::new(include_str!("admit.lua"));

/// Names that are listed together...
const PAGE: usize = 1000;
/// ...and consumers that are read together.
const CONCURRENT: usize = 100;
/// Between two sweeps for lack of room, milliseconds: not every request pays for one.
const SWEEP: u64 = 60_000;
/// Attempts to move a cursor that others move at the same time.
const ATTEMPTS: usize = 20;

pub(super) struct ConsumerStore {
    context: Arc<LogContext>,
    reader: Arc<LogReader>,
    retention: Arc<RetentionRules>,
    /// When names of expired consumers were last swept, Unix milliseconds. Only the task of a sweep holds the lock.
    swept: Mutex<Option<u64>>,
}

/// The reply of `consumer.lua` about one cursor.
struct CursorReply {
    status: String,
    at: Option<Position>,
}

impl ConsumerStore {
    pub(super) fn new(context: Arc<LogContext>, reader: Arc<LogReader>, retention: Arc<RetentionRules>) -> Self {
        ConsumerStore { context, reader, retention, swept: Mutex::default() }
    }

    /// Reads or moves a cursor.
    pub(super) async fn act(
        self: &Arc<Self>,
        consumer: &str,
        channel: &Channel,
        act: CursorOp,
    ) -> Result<Option<Position>> {
        let mut known = self.cursor(consumer, channel).await?;
        for _ in 0..ATTEMPTS {
            let to = match act {
                CursorOp::Get => return Ok(known),
                CursorOp::Seek(to) => to,
                CursorOp::Commit(to) => self.later(channel, known, to).await?,
            };
            if known == Some(to) {
                return Ok(known);
            }
            let mut reply = self.set_cursor(consumer, channel, known, to, false).await?;
            if reply.status == "new" {
                self.admit(consumer).await?;
                reply = self.set_cursor(consumer, channel, known, to, true).await?;
                // A sweep that found no consumer of this name may have removed it meanwhile.
                self.add_name(consumer).await?;
            }
            match reply.status.as_str() {
                "ok" => return Ok(reply.at),
                "full" => {
                    return Err(limit_reached("limits.consumer_channels", self.context.topics.config().max_cursors));
                }
                // Another node moved the cursor since it was read.
                _ => known = reply.at,
            }
        }
        Err(Error::new(Code::Conflict, "others move this cursor all the time"))
    }

    /// The later of two positions.
    async fn later(&self, channel: &Channel, known: Option<Position>, to: Position) -> Result<Position> {
        let (keys, keep) = (self.context.keys.channel(channel), self.retention.for_read(channel).await?);
        let limit = ReadLimit { events: 0, bytes: 0 };
        let bounds = self.reader.snapshot(&keys, &keep, Start::Now, limit).await?.bounds;
        if !to.epoch.is_absent() && to.epoch == bounds.epoch && to.offset > bounds.top {
            return Err(Error::new(Code::InvalidPosition, format!("{to} lies ahead of channel {channel}")));
        }
        Ok(known.filter(|known| bounds.rank(*known) >= bounds.rank(to)).unwrap_or(to))
    }

    async fn cursor(&self, consumer: &str, channel: &Channel) -> Result<Option<Position>> {
        let reply = self.run(consumer, |command| {
            command.arg("get").arg(channel.as_str());
        });
        Ok(CursorReply::parse(reply.await.map_err(CommandError::of_read)?)?.at)
    }

    async fn set_cursor(
        &self,
        consumer: &str,
        channel: &Channel,
        from: Option<Position>,
        to: Position,
        new: bool,
    ) -> Result<CursorReply> {
        let max = self.context.topics.config().max_cursors;
        // Idempotent: a second run finds the cursor where the first left it, and says so.
        let reply = self.run(consumer, |command| {
            command.arg("set").arg(channel.as_str()).arg(from.map_or(String::new(), |from| from.to_string()));
            command.arg(to.to_string()).arg(max).arg(u8::from(new));
        });
        CursorReply::parse(reply.await?)
    }

    /// Runs `consumer.lua`; `fill` adds what to do.
    async fn run<T: FromRedisValue>(&self, consumer: &str, fill: impl Fn(&mut Cmd)) -> Result<T, CommandError> {
        let key = self.context.keys.consumer(consumer);
        let fill = |_: &RedisConnection, command: &mut Cmd| {
            command.arg(self.context.script_now()).arg(self.idle());
            fill(command);
        };
        let (reply, _) = self.context.topology.run(&CONSUMER, &[key.as_bytes()], OnLostReply::Retry, fill).await?;
        Ok(reply)
    }

    /// Runs a command about the set of all names.
    async fn call<T: FromRedisValue>(&self, command: &Cmd) -> Result<T, CommandError> {
        let names = self.context.keys.consumers();
        Ok(self.context.topology.call(names.as_bytes(), OnLostReply::Retry, command).await?.0)
    }

    /// Milliseconds after which a consumer that is not used expires.
    fn idle(&self) -> u64 {
        millis(self.context.topics.config().consumer_idle).max(1)
    }

    /// Adds a new name if there is room, perhaps after a sweep.
    async fn admit(self: &Arc<Self>, consumer: &str) -> Result<()> {
        let max = self.context.topics.config().max_consumers;
        let names = self.context.keys.consumers();
        for swept in [false, true] {
            let fill = |_: &RedisConnection, command: &mut Cmd| {
                command.arg(consumer).arg(max);
            };
            let keys = [names.as_bytes()];
            let run = self.context.topology.run::<u64>(&ADMIT, &keys, OnLostReply::Retry, fill);
            if run.await?.0 == 1 {
                return Ok(());
            }
            if !swept {
                // In a task: a sweep of many names takes longer than a request may wait, and the next one finds it done.
                let this = self.clone();
                tokio::spawn(async move { this.sweep().await }).await.map_err(Error::internal)??;
            }
        }
        Err(limit_reached("limits.consumers", max))
    }

    /// Removes the names of expired consumers, unless that was just done.
    async fn sweep(&self) -> Result<()> {
        let mut last = self.swept.lock().await;
        if last.is_some_and(|last| last.abs_diff(self.context.topics.now()) < SWEEP) {
            return Ok(());
        }
        let mut after: Option<String> = None;
        loop {
            let names = self.names("", after.as_deref(), PAGE).await?;
            let Some(end) = names.last().cloned() else { break };
            self.remove_names(self.expired(names).await?).await?;
            after = Some(end);
        }
        *last = Some(self.context.topics.now());
        Ok(())
    }

    /// Those of the names whose consumer has expired, in their order.
    async fn expired(&self, names: Vec<String>) -> Result<Vec<String>> {
        let mut expired = Vec::new();
        for names in names.chunks(CONCURRENT) {
            let found = try_join_all(names.iter().map(|name| self.is_expired(name))).await?;
            expired.extend(names.iter().zip(found).filter(|(_, expired)| *expired).map(|(name, _)| name.clone()));
        }
        Ok(expired)
    }

    async fn is_expired(&self, name: &str) -> Result<bool> {
        let reply = self.run(name, |command| {
            command.arg("seen");
        });
        let (_, _, seen): (String, String, String) = reply.await.map_err(CommandError::of_read)?;
        Ok(seen.is_empty())
    }

    /// Removes sorted names; one whose consumer has come back since is added again.
    async fn remove_names(&self, names: Vec<String>) -> Result<()> {
        if names.is_empty() {
            return Ok(());
        }
        self.call::<u64>(cmd("ZREM").arg(self.context.keys.consumers()).arg(&names)).await?;
        let gone = self.expired(names.clone()).await?;
        for name in names.iter().filter(|name| gone.binary_search(name).is_err()) {
            self.add_name(name).await?;
        }
        Ok(())
    }

    async fn add_name(&self, name: &str) -> Result<()> {
        self.call::<u64>(cmd("ZADD").arg(self.context.keys.consumers()).arg(0).arg(name)).await?;
        Ok(())
    }

    async fn names(&self, prefix: &str, after: Option<&str>, limit: usize) -> Result<Vec<String>> {
        let from = match after {
            Some(after) if after >= prefix => format!("({after}"),
            _ => format!("[{prefix}"),
        };
        let mut range = cmd("ZRANGEBYLEX");
        range.arg(self.context.keys.consumers()).arg(from).arg("+").arg("LIMIT").arg(0).arg(limit);
        let names: Vec<String> = self.call(&range).await.map_err(CommandError::of_read)?;
        Ok(names.into_iter().take_while(|name| name.starts_with(prefix)).collect())
    }

    pub(super) async fn describe(&self, name: &str) -> Result<Option<ConsumerInfo>> {
        let reply = self.run(name, |command| {
            command.arg("show");
        });
        let (_, _, fields): (String, String, Vec<(String, String)>) = reply.await.map_err(CommandError::of_read)?;
        let (mut cursors, mut seen) = (Vec::new(), None);
        for (field, value) in fields {
            if field == "s" {
                seen = value.parse().ok();
            } else if let Some(Ok(channel)) = field.strip_prefix("c:").map(Channel::parse)
                && let Ok(position) = value.parse()
            {
                cursors.push((channel, position));
            }
        }
        let Some(seen) = seen else { return Ok(None) };
        cursors.sort_by(|one, other| one.0.cmp(&other.0));
        let expires = seen + self.idle();
        Ok(Some(ConsumerInfo { name: name.into(), cursors, seen, expires }))
    }

    pub(super) async fn list(&self, prefix: &str, after: Option<&str>, limit: usize) -> Result<Vec<ConsumerInfo>> {
        let mut after = after.map(str::to_owned);
        let mut consumers = Vec::new();
        while consumers.len() < limit {
            let names = self.names(prefix, after.as_deref(), limit - consumers.len()).await?;
            let Some(last) = names.last() else { break };
            after = Some(last.clone());
            let mut expired = Vec::new();
            for names in names.chunks(CONCURRENT) {
                let found = try_join_all(names.iter().map(|name| self.describe(name))).await?;
                for (name, found) in names.iter().zip(found) {
                    match found {
                        Some(consumer) => consumers.push(consumer),
                        None => expired.push(name.clone()),
                    }
                }
            }
            // If they cannot be removed now, the next listing will.
            let _ = self.remove_names(expired).await;
        }
        Ok(consumers)
    }

    /// True if the consumer existed.
    pub(super) async fn forget(&self, name: &str) -> Result<bool> {
        let existed = self.describe(name).await?.is_some();
        let key = self.context.keys.consumer(name);
        let delete = cmd("DEL").arg(&key).take();
        self.context.topology.call::<u64>(key.as_bytes(), OnLostReply::Retry, &delete).await?;
        self.call::<u64>(cmd("ZREM").arg(self.context.keys.consumers()).arg(name)).await?;
        Ok(existed)
    }
}

impl CursorReply {
    fn parse((_, status, at): (String, String, String)) -> Result<Self> {
        let at = match at.as_str() {
            "" => None,
            at => Some(at.parse().map_err(|_| unexpected_reply())?),
        };
        Ok(CursorReply { status, at })
    }
}

fn limit_reached(limit: &'static str, number: usize) -> Error {
    Error::new(Code::LimitReached, format!("{limit} is {number}")).with("limit", limit)
}
