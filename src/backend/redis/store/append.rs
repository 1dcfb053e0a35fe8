//! Placing events. What is published to a channel while an append of this node is under way there goes together with
//! the next one: one script for all of them, one message to whoever reads. Who publishes alone does not wait.
//!
//! Of one channel, one append at a time: so its events are placed in the order in which they were handed in here, even if
//! an append must be tried again.

use std::{
    collections::{HashMap, VecDeque, hash_map},
    sync::{Arc, LazyLock},
    time::Instant,
};

use indexmap::IndexSet;
use parking_lot::Mutex;
use tokio::sync::oneshot;

use super::{
    Inner,
    keys::ChannelKeys,
    read::{FOR_EVER, failed, millis, nonsense},
};
use crate::backend::redis::client::{Command, CommandError, OnLostReply, RedisConnection, Script, Value};
use crate::{
    bus::{Placed, Retention},
    channel::Channel,
    error::{Code, Error, Result},
    event::Draft,
    position::{Epoch, Position},
};

static APPEND: LazyLock<Script> =
    LazyLock::new(|| Script::new(concat!(include_str!("limits.lua"), include_str!("append.lua"))));

/// What one script places at most, unless one publish has more: Redis does nothing else meanwhile.
const MOST_EVENTS: usize = 128;
const MOST_BYTES: usize = 256 << 10;
/// What may wait for its turn in this node.
const MAX_WAITING: usize = 64 << 20;

/// What waits for its turn. A channel is in it as long as a task places its events.
#[derive(Default)]
pub(super) struct Appends(Mutex<State>);

#[derive(Default)]
struct State {
    waiting: HashMap<Channel, VecDeque<Waiting>>,
    bytes: usize,
}

/// A publish: all of it or nothing.
pub(super) struct Publish {
    /// Who publishes, the scope of keys.
    pub subject: Box<str>,
    pub drafts: Vec<Draft>,
}

struct Waiting {
    publish: Publish,
    since: Instant,
    tell: oneshot::Sender<Outcome>,
}

/// What was placed, and over which connection.
type Outcome = Result<(Vec<Placed>, Arc<RedisConnection>), Failed>;

/// Why nothing was placed, or nobody knows.
#[derive(Clone, Debug)]
pub(super) enum Failed {
    CommandError(CommandError),
    /// This draft's key was used for another event.
    Reused {
        at: usize,
        key: Box<str>,
    },
    Nonsense,
}

/// The one task that places the events of a channel, until nothing waits.
struct Writer {
    inner: Arc<Inner>,
    channel: Channel,
    /// Another may have begun.
    over: bool,
}

// === impl Inner ===

impl Inner {
    pub(super) async fn append(
        self: &Arc<Self>,
        channel: &Channel,
        subject: &str,
        drafts: Vec<Draft>,
    ) -> Result<Vec<Placed>> {
        let outcome = match self.submit(channel, Publish { subject: subject.into(), drafts }) {
            Ok(outcome) => outcome.await.unwrap_or(Err(Failed::CommandError(CommandError::Unconfirmed))),
            Err(fault) => Err(Failed::CommandError(fault)),
        };
        let placed = match outcome {
            // One that was placed before may have been placed a moment ago.
            Ok((placed, connection)) if self.acks.is_some() => {
                let meta = self.keys.channel(channel).meta();
                self.replicated(meta.as_bytes(), &connection).await.map(|()| placed)
            }
            Ok((placed, _)) => Ok(placed),
            Err(failed) => Err(failed),
        };
        placed.map_err(|why| match why {
            Failed::CommandError(fault) => failed(fault),
            Failed::Nonsense => nonsense(),
            Failed::Reused { key, .. } => {
                Error::new(Code::KeyReused, format!("the key {key:?} was used for another event of channel {channel}"))
            }
        })
    }

    /// Queues a publish, and sees to it that somebody places it.
    fn submit(
        self: &Arc<Self>,
        channel: &Channel,
        publish: Publish,
    ) -> Result<oneshot::Receiver<Outcome>, CommandError> {
        let (tell, outcome) = oneshot::channel();
        let size = publish.size();
        let mut state = self.appends.0.lock();
        if state.bytes + size > MAX_WAITING.max(size) {
            return Err(CommandError::NotExecuted("too much waits for Redis".into()));
        }
        state.bytes += size;
        let waiting = Waiting { publish, since: Instant::now(), tell };
        match state.waiting.entry(channel.clone()) {
            hash_map::Entry::Occupied(mut queue) => queue.get_mut().push_back(waiting),
            hash_map::Entry::Vacant(free) => {
                free.insert(VecDeque::from([waiting]));
                let writer = Writer { inner: self.clone(), channel: channel.clone(), over: false };
                tokio::spawn(writer.run());
            }
        }
        Ok(outcome)
    }

    /// Places publishes of one channel in one step, all or none, and says over which connection.
    pub(super) async fn store(&self, keys: &ChannelKeys, keep: &Retention, publishes: &[&Publish]) -> Outcome {
        let (meta, stream, events) = (keys.meta(), keys.stream(), keys.events());
        let mut once: IndexSet<String> = IndexSet::new();
        let mut drafts = Vec::new();
        for publish in publishes {
            for draft in &publish.drafts {
                let name = draft.parts().1.map(|key| keys.once(&publish.subject, key));
                let number = name.map_or(0, |name| once.insert_full(name).0 as u64 + 1);
                drafts.push((draft, number));
            }
        }
        let mut all: Vec<&[u8]> = vec![meta.as_bytes(), stream.as_bytes()];
        all.extend(once.iter().map(String::as_bytes));
        let (now, window) = (self.script_now(), millis(self.topics.config().keys.window));
        let fill = |connection: &RedisConnection, command: &mut Command| {
            command.push_int(now);
            command.push(&*connection.server.generation);
            command.push(&*Epoch::random().text());
            command.push(self.topology.publish_verb());
            command.push(&events);
            command.push_int(keep.count as u64);
            command.push_int(millis(keep.age));
            command.push_int((keep.bytes as u64).min(FOR_EVER));
            command.push_int(window.max(1));
            let mut stored = Vec::new();
            for (draft, number) in &drafts {
                let (body, _) = draft.parts();
                command.push_int(*number);
                if *number > 0 {
                    command.push(format!("{:016x}", body.fingerprint()));
                } else {
                    command.push("");
                }
                stored.clear();
                body.store(&mut stored);
                command.push(&stored);
            }
        };
        let (answer, connection) =
            self.topology.run(&APPEND, &all, OnLostReply::Report, fill).await.map_err(Failed::CommandError)?;
        let [epoch, time, rest @ ..] = answer.list().ok_or(Failed::Nonsense)? else { return Err(Failed::Nonsense) };
        if epoch.is_nil() {
            let at = time.int().and_then(|n| usize::try_from(n).ok()?.checked_sub(1)).ok_or(Failed::Nonsense)?;
            let key = drafts.get(at).and_then(|(draft, _)| draft.parts().1).ok_or(Failed::Nonsense)?;
            return Err(Failed::Reused { at, key: key.into() });
        }
        let epoch = epoch.text().and_then(|text| text.parse().ok()).ok_or(Failed::Nonsense)?;
        let time = time.int().ok_or(Failed::Nonsense)?;
        let placed = rest
            .iter()
            .map(|placed| match placed {
                Value::Int(offset) => Some(Placed {
                    position: Position { epoch, offset: u64::try_from(*offset).ok()? },
                    time,
                    duplicate: false,
                }),
                placed => {
                    let mut parts = placed.text()?.split(' ');
                    let (epoch, offset) = (parts.next()?.parse().ok()?, parts.next()?.parse().ok()?);
                    let position = Position { epoch, offset };
                    Some(Placed { position, time: parts.next()?.parse().ok()?, duplicate: true })
                }
            })
            .collect::<Option<Vec<_>>>()
            .filter(|placed| placed.len() == drafts.len())
            .ok_or(Failed::Nonsense)?;
        Ok((placed, connection))
    }
}

impl State {
    /// Takes up to so many of those that wait for a channel.
    fn take(&mut self, channel: &Channel, most: usize) -> Vec<Waiting> {
        let Some(queue) = self.waiting.get_mut(channel) else { return Vec::new() };
        let taken: Vec<Waiting> = queue.drain(..most.min(queue.len())).collect();
        self.bytes -= taken.iter().map(|waiting| waiting.publish.size()).sum::<usize>();
        taken
    }
}

impl Publish {
    fn size(&self) -> usize {
        self.drafts.iter().map(|draft| draft.size() + size_of::<Draft>()).sum()
    }
}

// === impl Writer ===

impl Writer {
    async fn run(mut self) {
        let keys = self.inner.keys.channel(&self.channel);
        while let Some(batch) = self.next() {
            self.place(&keys, batch).await;
        }
    }

    /// What goes next. None: nothing waits, and the next publish begins another writer.
    fn next(&mut self) -> Option<Vec<Waiting>> {
        let mut state = self.inner.appends.0.lock();
        let queue = state.waiting.get_mut(&self.channel)?;
        let (mut count, mut bytes) = (0, 0);
        let fits = queue.iter().take_while(|waiting| {
            count += waiting.publish.drafts.len();
            bytes += waiting.publish.size();
            count <= MOST_EVENTS && bytes <= MOST_BYTES
        });
        let fits = fits.count().max(1);
        let batch = state.take(&self.channel, fits);
        if batch.is_empty() {
            state.waiting.remove(&self.channel);
            self.over = true;
            return None;
        }
        Some(batch)
    }

    async fn place(&self, keys: &ChannelKeys, mut batch: Vec<Waiting>) {
        while !batch.is_empty() {
            let publishes: Vec<&Publish> = batch.iter().map(|waiting| &waiting.publish).collect();
            let stored = match self.inner.keep_of(&self.channel).await {
                Ok(keep) => self.inner.store(keys, &keep, &publishes).await,
                Err(fault) => Err(Failed::CommandError(fault)),
            };
            match stored {
                Ok((placed, connection)) => return self.placed(keys, batch, placed, &connection),
                Err(Failed::Reused { at, key }) => {
                    // Nothing was placed, and the fault is one publish's: the others go without it.
                    let mut before = 0;
                    let guilty = batch.iter().position(|waiting| {
                        before += waiting.publish.drafts.len();
                        at < before
                    });
                    let Some(guilty) = guilty.and_then(|index| batch.drain(index..=index).next()) else {
                        return refuse(batch, &Failed::Nonsense);
                    };
                    let _ = guilty.tell.send(Err(Failed::Reused { at, key }));
                }
                Err(failed) => {
                    if let Failed::CommandError(CommandError::NotExecuted(_)) = failed {
                        // Who came meanwhile has waited for the same.
                        batch.extend(self.inner.appends.0.lock().take(&self.channel, usize::MAX));
                    }
                    return refuse(batch, &failed);
                }
            }
        }
    }

    fn placed(&self, keys: &ChannelKeys, batch: Vec<Waiting>, placed: Vec<Placed>, connection: &Arc<RedisConnection>) {
        let mut rest = placed.iter().copied();
        let mut tell = Vec::with_capacity(batch.len());
        let mut ours = Vec::with_capacity(placed.len());
        for waiting in batch {
            self.inner.topology.metrics.redis_append_seconds.record(waiting.since.elapsed());
            let mine: Vec<Placed> = rest.by_ref().take(waiting.publish.drafts.len()).collect();
            ours.extend(waiting.publish.drafts.into_iter().zip(mine.iter().copied()));
            tell.push((waiting.tell, mine));
        }
        // Who publishes here and reads here need not wait for Redis to say it again.
        self.inner.hear_own(&keys.events(), ours);
        for (tell, mine) in tell {
            let _ = tell.send(Ok((mine, connection.clone())));
        }
    }
}

impl Drop for Writer {
    fn drop(&mut self) {
        // Ended by force: nobody knows what became of what was under way, and the next publish begins another writer.
        if !self.over {
            let mut state = self.inner.appends.0.lock();
            state.take(&self.channel, usize::MAX);
            state.waiting.remove(&self.channel);
        }
    }
}

fn refuse(batch: Vec<Waiting>, failed: &Failed) {
    for waiting in batch {
        let _ = waiting.tell.send(Err(failed.clone()));
    }
}
