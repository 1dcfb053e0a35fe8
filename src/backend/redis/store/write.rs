//! [`LogWriter`]: the scripts that append events and remove them.

use std::sync::Arc;

use indexmap::IndexSet;
use redis::{Cmd, Value, from_redis_value_ref};

use super::{
    context::{LogContext, MAX_NUMBER, millis, unexpected_reply},
    keys::ChannelKeys,
};
use crate::{
    backend::redis::client::{CommandError, Deadline, OnLostReply, RedisConnection, Script},
    bus::{Placed, Retention},
    error::{Code, Error, Result},
    event::Draft,
    position::{Epoch, Position},
};

static APPEND: Script = Script::new(concat!(include_str!("limits.lua"), include_str!("append.lua")));
static REMOVE: Script = Script::new(concat!(include_str!("limits.lua"), include_str!("remove.lua")));

pub(super) struct LogWriter(Arc<LogContext>);

/// The events of one publish, which are placed together or not at all.
pub(super) struct PublishBatch {
    /// The scope of idempotency keys.
    pub(super) subject: Box<str>,
    pub(super) drafts: Vec<Draft>,
}

/// The placed events, and the connection that placed them.
pub(super) type AppendResult = Result<(Vec<Placed>, Arc<RedisConnection>), AppendError>;

#[derive(Clone, Debug)]
pub(super) enum AppendError {
    Command(CommandError),
    /// The idempotency key of the draft with this index was used for another event.
    KeyReused {
        at: usize,
        key: Box<str>,
    },
}

enum AppendReply {
    Placed(Vec<Placed>),
    /// The index of the draft whose key was used for another event.
    KeyReused(usize),
}

impl From<CommandError> for AppendError {
    fn from(error: CommandError) -> Self {
        AppendError::Command(error)
    }
}

impl PublishBatch {
    /// Memory in bytes.
    pub(super) fn size(&self) -> usize {
        self.drafts.iter().map(|draft| draft.size() + size_of::<Draft>()).sum()
    }
}

impl LogWriter {
    pub(super) fn new(context: Arc<LogContext>) -> Self {
        LogWriter(context)
    }

    /// Places several publishes of one channel in one step, all or none.
    pub(super) async fn append(
        &self,
        keys: &ChannelKeys,
        keep: &Retention,
        batches: &[&PublishBatch],
        deadline: Deadline,
    ) -> AppendResult {
        let context = &self.0;
        let (meta, stream, events) = (keys.meta(), keys.stream(), keys.events());
        let mut idempotency: IndexSet<String> = IndexSet::new();
        let mut drafts = Vec::new();
        for batch in batches {
            for draft in &batch.drafts {
                let key = draft.parts().1.map(|key| keys.idempotency(&batch.subject, key));
                let number = key.map_or(0, |key| idempotency.insert_full(key).0 + 1);
                drafts.push((draft, number));
            }
        }
        let mut all: Vec<&[u8]> = vec![meta.as_bytes(), stream.as_bytes()];
        all.extend(idempotency.iter().map(String::as_bytes));
        let (now, window) = (context.script_now(), millis(context.topics.config().key_window));
        let fill = |connection: &RedisConnection, command: &mut Cmd| {
            command.arg(now).arg(&*connection.server.generation).arg(&*Epoch::random().text());
            command.arg(context.topology.publish_verb()).arg(&*events);
            command.arg(keep.count).arg(millis(keep.age)).arg((keep.bytes as u64).min(MAX_NUMBER)).arg(window.max(1));
            let mut stored = Vec::new();
            for (draft, number) in &drafts {
                let (body, _) = draft.parts();
                command.arg(*number);
                match number {
                    0 => command.arg(""),
                    _ => command.arg(format!("{:016x}", body.fingerprint())),
                };
                stored.clear();
                body.store(&mut stored);
                command.arg(&stored[..]);
            }
        };
        let (reply, connection) =
            context.topology.run_by::<Vec<Value>>(deadline, &APPEND, &all, OnLostReply::Report, fill).await?;
        match AppendReply::parse(&reply) {
            Some(AppendReply::Placed(placed)) if placed.len() == drafts.len() => Ok((placed, connection)),
            Some(AppendReply::KeyReused(at)) => {
                let key = drafts.get(at).and_then(|(draft, _)| draft.parts().1).ok_or_else(unexpected_reply)?;
                Err(AppendError::KeyReused { at, key: key.into() })
            }
            _ => Err(unexpected_reply().into()),
        }
    }

    /// Removes the events before a position, or the log.
    pub(super) async fn remove(&self, keys: &ChannelKeys, keep: &Retention, before: Option<Position>) -> Result<()> {
        let context = &self.0;
        let (meta, stream, events) = (keys.meta(), keys.stream(), keys.events());
        let fill = |_: &RedisConnection, command: &mut Cmd| {
            command.arg(context.script_now()).arg(context.topology.publish_verb()).arg(&*events);
            command.arg(before.map_or(String::new(), |before| before.epoch.to_string()));
            // Offsets begin with 1: no event is before it, and 0 stands for the log.
            command.arg(before.map_or(0, |before| before.offset.clamp(1, MAX_NUMBER))).arg(millis(keep.age));
        };
        let keys = [meta.as_bytes(), stream.as_bytes()];
        match context.topology.run::<u64>(&REMOVE, &keys, OnLostReply::Report, fill).await?.0 {
            0 => Err(Error::new(Code::InvalidPosition, "before is a position in the channel as it is now")),
            _ => Ok(()),
        }
    }
}

impl AppendReply {
    fn parse(reply: &[Value]) -> Option<Self> {
        let [epoch, second, placed @ ..] = reply else { return None };
        if *epoch == Value::Nil {
            return Some(AppendReply::KeyReused(from_redis_value_ref::<usize>(second).ok()?.checked_sub(1)?));
        }
        let epoch: Epoch = from_redis_value_ref::<String>(epoch).ok()?.parse().ok()?;
        let time: u64 = from_redis_value_ref(second).ok()?;
        let one = |placed: &Value| match placed {
            Value::Int(offset) => {
                let position = Position { epoch, offset: u64::try_from(*offset).ok()? };
                Some(Placed { position, time, duplicate: false })
            }
            earlier => {
                let earlier: String = from_redis_value_ref(earlier).ok()?;
                let mut parts = earlier.split(' ');
                let (epoch, offset) = (parts.next()?.parse().ok()?, parts.next()?.parse().ok()?);
                Some(Placed {
                    position: Position { epoch, offset },
                    time: parts.next()?.parse().ok()?,
                    duplicate: true,
                })
            }
        };
        placed.iter().map(one).collect::<Option<_>>().map(AppendReply::Placed)
    }
}
