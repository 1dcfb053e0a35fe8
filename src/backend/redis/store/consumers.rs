//! Consumers: each has all its cursors in one key, which dies when nobody uses it for long. The set of their names is
//! only for counting and listing; names of dead ones are taken out when there is no room, and when a list meets them.

use std::sync::LazyLock;

use futures_util::future::try_join_all;
use tokio::sync::Mutex;

use super::{
    Inner,
    read::{failed, millis, nonsense, read_failed},
};
use crate::backend::redis::client::{Command, OnLostReply, RedisConnection, Script, Value};
use crate::{
    bus::{ConsumerInfo, CursorOp, ReadLimit},
    channel::Channel,
    error::{Code, Error, Result},
    position::{Position, Start},
};

static CONSUMER: LazyLock<Script> = LazyLock::new(|| Script::new(include_str!("consumer.lua")));
static ADMIT: LazyLock<Script> = LazyLock::new(|| Script::new(include_str!("admit.lua")));

/// Names listed together...
const PAGE: usize = 1000;
/// ...and consumers asked for together.
const AT_ONCE: usize = 100;
/// Between two looks for names of the dead because there is no room, milliseconds: nobody pays for it in each request.
const SWEEP: u64 = 60_000;
/// Somebody else may move the same cursor at the same time, not for ever.
const TRIES: usize = 20;

/// What `consumer.lua` found.
struct Found {
    status: Box<str>,
    at: Option<Position>,
}

/// When the names of the dead were last looked for. One at a time does it.
#[derive(Default)]
pub(super) struct Sweeps(Mutex<Option<u64>>);

impl Inner {
    pub(super) async fn act(&self, consumer: &str, channel: &Channel, act: CursorOp) -> Result<Option<Position>> {
        let mut known = self.cursor_at(consumer, channel).await?;
        for _ in 0..TRIES {
            let to = match act {
                CursorOp::Get => return Ok(known),
                CursorOp::Seek(to) => to,
                CursorOp::Commit(to) => self.forward(channel, known, to).await?,
            };
            if known == Some(to) {
                return Ok(known);
            }
            let mut found = self.set_cursor(consumer, channel, known, to, false).await?;
            if &*found.status == "new" {
                self.admit(consumer).await?;
                found = self.set_cursor(consumer, channel, known, to, true).await?;
                // Who saw no consumer behind the name may have taken it out meanwhile.
                self.enlist(consumer).await?;
            }
            match &*found.status {
                "ok" => return Ok(found.at),
                "full" => return Err(limit_reached("limits.consumer_channels", self.topics.config().max_cursors)),
                // Somebody else moved it since we looked.
                _ => known = found.at,
            }
        }
        Err(Error::new(Code::Conflict, "others move this cursor all the time"))
    }

    /// The later of two positions.
    async fn forward(&self, channel: &Channel, known: Option<Position>, to: Position) -> Result<Position> {
        let (keys, keep) = (self.keys.channel(channel), self.keep_of(channel).await.map_err(failed)?);
        let bounds = self.look(&keys, &keep, Start::Now, ReadLimit { events: 0, bytes: 0 }).await?.bounds;
        if !to.epoch.is_absent() && to.epoch == bounds.epoch && to.offset > bounds.top {
            return Err(Error::new(Code::InvalidPosition, format!("{to} lies ahead of channel {channel}")));
        }
        Ok(known.filter(|known| bounds.rank(*known) >= bounds.rank(to)).unwrap_or(to))
    }

    async fn cursor_at(&self, consumer: &str, channel: &Channel) -> Result<Option<Position>> {
        let key = self.keys.consumer(consumer);
        let fill = |_: &RedisConnection, command: &mut Command| {
            command.push_int(self.script_now());
            command.push_int(self.idle());
            command.push("get");
            command.push(channel.as_str());
        };
        let keys = [key.as_bytes()];
        let run = self.topology.run(&CONSUMER, &keys, OnLostReply::Retry, fill);
        Ok(found(&run.await.map_err(read_failed)?.0)?.at)
    }

    async fn set_cursor(
        &self,
        consumer: &str,
        channel: &Channel,
        from: Option<Position>,
        to: Position,
        new: bool,
    ) -> Result<Found> {
        let key = self.keys.consumer(consumer);
        let fill = |_: &RedisConnection, command: &mut Command| {
            command.push_int(self.script_now());
            command.push_int(self.idle());
            command.push("set");
            command.push(channel.as_str());
            command.push(from.map_or(String::new(), |from| from.to_string()));
            command.push(to.to_string());
            command.push_int(self.topics.config().max_cursors as u64);
            command.push_int(new.into());
        };
        // Done twice, it finds the cursor where the first left it, which is told.
        let keys = [key.as_bytes()];
        let run = self.topology.run(&CONSUMER, &keys, OnLostReply::Retry, fill);
        found(&run.await.map_err(failed)?.0)
    }

    fn idle(&self) -> u64 {
        millis(self.topics.config().consumer_idle).max(1)
    }

    async fn admit(&self, consumer: &str) -> Result<()> {
        let most = self.topics.config().max_consumers;
        for swept in [false, true] {
            let names = self.keys.consumers();
            let fill = |_: &RedisConnection, command: &mut Command| {
                command.push(consumer);
                command.push_int(most as u64);
            };
            let keys = [names.as_bytes()];
            let run = self.topology.run(&ADMIT, &keys, OnLostReply::Retry, fill);
            if run.await.map_err(failed)?.0.int() == Some(1) {
                return Ok(());
            }
            if !swept {
                self.sweep_consumers().await?;
            }
        }
        Err(limit_reached("limits.consumers", most))
    }

    /// Takes the names of consumers that are forgotten out of the set of all, if that was not done a moment ago.
    async fn sweep_consumers(&self) -> Result<()> {
        // Who waits here for another finds it done.
        let mut last = self.sweeps.0.lock().await;
        if last.is_some_and(|last| last.abs_diff(self.topics.now()) < SWEEP) {
            return Ok(());
        }
        let mut after: Option<String> = None;
        loop {
            let names = self.names_of_consumers("", after.as_deref(), PAGE).await?;
            let Some(end) = names.last().cloned() else { break };
            self.strike(self.forgotten(names).await?).await?;
            after = Some(end);
        }
        *last = Some(self.topics.now());
        Ok(())
    }

    /// Those of the names, in their order, behind which there is no consumer.
    async fn forgotten(&self, names: Vec<String>) -> Result<Vec<String>> {
        let mut forgotten = Vec::new();
        for names in names.chunks(AT_ONCE) {
            let found = try_join_all(names.iter().map(|name| self.is_forgotten(name))).await?;
            forgotten.extend(names.iter().zip(found).filter(|(_, forgotten)| *forgotten).map(|(name, _)| name.clone()));
        }
        Ok(forgotten)
    }

    async fn is_forgotten(&self, name: &str) -> Result<bool> {
        let key = self.keys.consumer(name);
        let fill = |_: &RedisConnection, command: &mut Command| {
            command.push_int(self.script_now());
            command.push_int(self.idle());
            command.push("seen");
        };
        let keys = [key.as_bytes()];
        let answer = self.topology.run(&CONSUMER, &keys, OnLostReply::Retry, fill).await.map_err(read_failed)?.0;
        let Some([_, _, seen]) = answer.list() else { return Err(nonsense()) };
        Ok(seen.text().unwrap_or_default().is_empty())
    }

    /// Takes sorted names out. One whose consumer has come back since gets its place again.
    async fn strike(&self, names: Vec<String>) -> Result<()> {
        if names.is_empty() {
            return Ok(());
        }
        let key = self.keys.consumers();
        let strike =
            |_: &RedisConnection| names.iter().fold(Command::new("ZREM").arg(&key), |command, name| command.arg(name));
        self.topology.call(key.as_bytes(), OnLostReply::Retry, strike).await.map_err(failed)?;
        let gone = self.forgotten(names.clone()).await?;
        for name in names.iter().filter(|name| gone.binary_search(name).is_err()) {
            self.enlist(name).await?;
        }
        Ok(())
    }

    async fn enlist(&self, name: &str) -> Result<()> {
        let key = self.keys.consumers();
        let add = |_: &RedisConnection| Command::new("ZADD").arg(&key).int(0).arg(name);
        self.topology.call(key.as_bytes(), OnLostReply::Retry, add).await.map_err(failed)?;
        Ok(())
    }

    async fn names_of_consumers(&self, prefix: &str, after: Option<&str>, limit: usize) -> Result<Vec<String>> {
        let names = self.keys.consumers();
        let from = match after {
            Some(after) if after >= prefix => format!("({after}"),
            _ => format!("[{prefix}"),
        };
        let make = |_: &RedisConnection| {
            let command = Command::new("ZRANGEBYLEX").arg(&names).arg(&from).arg("+").arg("LIMIT");
            command.int(0).int(limit as u64)
        };
        let (answer, _) = self.topology.call(names.as_bytes(), OnLostReply::Retry, make).await.map_err(read_failed)?;
        let names = answer.list().ok_or_else(nonsense)?.iter().filter_map(Value::text);
        Ok(names.take_while(|name| name.starts_with(prefix)).map(str::to_owned).collect())
    }

    pub(super) async fn describe_consumer(&self, name: &str) -> Result<Option<ConsumerInfo>> {
        let key = self.keys.consumer(name);
        let fill = |_: &RedisConnection, command: &mut Command| {
            command.push_int(self.script_now());
            command.push_int(self.idle());
            command.push("show");
        };
        let keys = [key.as_bytes()];
        let run = self.topology.run(&CONSUMER, &keys, OnLostReply::Retry, fill);
        let answer = run.await.map_err(read_failed)?.0;
        let Some([_, _, fields]) = answer.list() else { return Err(nonsense()) };
        let (mut cursors, mut seen) = (Vec::new(), None);
        for pair in fields.list().unwrap_or_default().chunks_exact(2) {
            let (Some(field), Some(value)) = (pair[0].text(), pair[1].text()) else { continue };
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

    pub(super) async fn list_consumers(
        &self,
        prefix: &str,
        after: Option<&str>,
        limit: usize,
    ) -> Result<Vec<ConsumerInfo>> {
        let mut after = after.map(str::to_owned);
        let mut consumers = Vec::new();
        while consumers.len() < limit {
            let names = self.names_of_consumers(prefix, after.as_deref(), limit - consumers.len()).await?;
            let Some(last) = names.last() else { break };
            after = Some(last.clone());
            let mut dead = Vec::new();
            for names in names.chunks(AT_ONCE) {
                let found = try_join_all(names.iter().map(|name| self.describe_consumer(name))).await?;
                for (name, found) in names.iter().zip(found) {
                    match found {
                        Some(consumer) => consumers.push(consumer),
                        None => dead.push(name.clone()),
                    }
                }
            }
            // Or the next listing would ask for them again. If they cannot be taken out now, it will.
            let _ = self.strike(dead).await;
        }
        Ok(consumers)
    }

    pub(super) async fn forget_consumer(&self, name: &str) -> Result<bool> {
        let existed = self.describe_consumer(name).await?.is_some();
        let (key, names) = (self.keys.consumer(name), self.keys.consumers());
        let delete = |_: &RedisConnection| Command::new("DEL").arg(&key);
        self.topology.call(key.as_bytes(), OnLostReply::Retry, delete).await.map_err(failed)?;
        let remove = |_: &RedisConnection| Command::new("ZREM").arg(&names).arg(name);
        self.topology.call(names.as_bytes(), OnLostReply::Retry, remove).await.map_err(failed)?;
        Ok(existed)
    }
}

fn found(answer: &Value) -> Result<Found> {
    let Some([_, status, at]) = answer.list() else { return Err(nonsense()) };
    let (Some(status), Some(at)) = (status.text(), at.text()) else { return Err(nonsense()) };
    let at = match at {
        "" => None,
        at => Some(at.parse().map_err(|_| nonsense())?),
    };
    Ok(Found { status: status.into(), at })
}

fn limit_reached(limit: &'static str, number: usize) -> Error {
    Error::new(Code::LimitReached, format!("{limit} is {number}")).with("limit", limit)
}
