//! [`Log`], the contract of a backend: what happened in a channel, in order.
//!
//! A backend stores, orders and carries events; everything that users can tell apart is written once, in
//! [`Bus`](super::Bus). `tests/it/conformance.rs` proves these rules on every backend:
//!
//! * offsets are dense in a channel, order of sight is order of offsets, `time` never decreases;
//! * what is shown to one is readable by all, and reads never write;
//! * a position that cannot be proven contiguous yields a [`Gap`], never nothing.

use std::sync::Arc;

use futures_util::future::BoxFuture;
use serde::{Serialize, Serializer, ser::SerializeMap};

use super::topic::Topic;
use crate::{
    channel::Channel,
    error::Result,
    event::{Draft, Event},
    json::write_json_str,
    position::{Epoch, Position, Start},
};

/// A place for events. All methods may be called at once from many tasks.
pub trait Log: Send + Sync + 'static {
    /// Whether events can be placed and heard of now. Answers at once, from what is known.
    fn ready(&self) -> Result<()>;

    /// One part of the housekeeping: all of it after 64 calls.
    fn sweep(&self);

    /// Places all drafts of one channel in one atomic step: place, store, show. None or all of them.
    ///
    /// `subject` is who publishes: the scope of idempotency keys. Fails with `bus_unavailable` (surely not placed),
    /// `unconfirmed` (perhaps placed; never retried here), `key_reused` or `overloaded`.
    fn append<'a>(
        &'a self,
        channel: &'a Channel,
        subject: &'a str,
        drafts: Vec<Draft>,
    ) -> BoxFuture<'a, Result<Vec<Placed>>>;

    /// Up to `limit` events, and at least one if there is one, from `start` on.
    fn read<'a>(&'a self, channel: &'a Channel, start: Start, limit: ReadLimit) -> BoxFuture<'a, Result<LogPage>>;

    /// Fills the ring of `topic` until the answer is dropped. When it returns, the ring knows the channel's epoch and
    /// top: whoever has watched may read.
    fn tail<'a>(&'a self, topic: &'a Arc<Topic>) -> BoxFuture<'a, Result<Tail>>;

    /// What is known of a channel. A channel without a log is not an error.
    fn inspect<'a>(&'a self, channel: &'a Channel) -> BoxFuture<'a, Result<ChannelInfo>>;

    /// Channels that have a log, in byte order of their names, from the first after `after` on.
    fn list<'a>(
        &'a self,
        prefix: &'a str,
        after: Option<&'a str>,
        limit: usize,
    ) -> BoxFuture<'a, Result<Vec<ChannelInfo>>>;

    /// Removes the events before `before`, or the log.
    fn remove<'a>(&'a self, channel: &'a Channel, before: Option<Position>) -> BoxFuture<'a, Result<()>>;

    /// Does `act` and answers where the cursor is then.
    fn cursor<'a>(
        &'a self,
        consumer: &'a str,
        channel: &'a Channel,
        act: CursorOp,
    ) -> BoxFuture<'a, Result<Option<Position>>>;

    /// All cursors of one consumer.
    fn consumer<'a>(&'a self, consumer: &'a str) -> BoxFuture<'a, Result<Option<ConsumerInfo>>>;

    /// Consumers in byte order of their names, from the first after `after` on.
    fn consumers<'a>(
        &'a self,
        prefix: &'a str,
        after: Option<&'a str>,
        limit: usize,
    ) -> BoxFuture<'a, Result<Vec<ConsumerInfo>>>;

    /// Forgets a consumer. False if there was none.
    fn forget<'a>(&'a self, consumer: &'a str) -> BoxFuture<'a, Result<bool>>;
}

/// Keeps a ring filled while it lives. Nothing, where the ring is the log.
#[derive(Clone, Default)]
pub struct Tail(pub Option<Arc<dyn Backfill>>);

/// A channel whose ring is a window on a log that is elsewhere.
pub trait Backfill: Send + Sync {
    /// Begins to fetch what readers of the ring [want](super::Ring::next_wanted), until none of them does. Called when there
    /// was none before.
    fn fetch(&self);
}

/// Where a draft was placed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Placed {
    pub position: Position,
    /// Unix milliseconds.
    pub time: u64,
    /// The key had been used for the same event: this is where it is since then.
    pub duplicate: bool,
}

impl Placed {
    /// Appends the answer to a publish: `{"channel":…,"epoch":…,"offset":…,"time":…}`, and `"duplicate":true` if so.
    pub fn write_json(&self, channel: &Channel, out: &mut Vec<u8>) {
        out.reserve(channel.as_str().len() + 96);
        out.extend_from_slice(br#"{"channel":"#);
        write_json_str(channel.as_str(), out);
        out.extend_from_slice(br#","epoch":""#);
        out.extend_from_slice(&self.position.epoch.text());
        out.extend_from_slice(br#"","offset":"#);
        out.extend_from_slice(itoa::Buffer::new().format(self.position.offset).as_bytes());
        out.extend_from_slice(br#","time":"#);
        out.extend_from_slice(itoa::Buffer::new().format(self.time).as_bytes());
        out.extend_from_slice(if self.duplicate { br#","duplicate":true}"# } else { b"}" });
    }
}

/// How much one read may answer.
#[derive(Clone, Copy, Debug)]
pub struct ReadLimit {
    pub events: usize,
    pub bytes: usize,
}

/// A piece of a channel's log.
#[derive(Clone, Debug)]
pub struct LogPage {
    pub events: Vec<Arc<Event>>,
    /// Where to go on: past everything that was looked at, shown or not.
    pub next: Position,
    /// There was more when this was read.
    pub more: bool,
    /// What had been asked for and is gone. Before all `events`.
    pub gap: Option<Gap>,
}

/// What to do with a cursor.
#[derive(Clone, Copy, Debug)]
pub enum CursorOp {
    Get,
    /// Forward only: an older position changes nothing.
    Commit(Position),
    /// Anywhere.
    Seek(Position),
}

/// A consumer and where it is.
#[derive(Clone, Debug)]
pub struct ConsumerInfo {
    pub name: Box<str>,
    pub cursors: Vec<(Channel, Position)>,
    /// When it was last heard of, Unix milliseconds.
    pub seen: u64,
    /// When it will be forgotten if it is not heard of, Unix milliseconds.
    pub expires: u64,
}

/// What is known of a channel.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct ChannelInfo {
    #[serde(serialize_with = "as_text")]
    pub channel: Channel,
    #[serde(serialize_with = "as_text")]
    pub epoch: Epoch,
    /// Oldest offset that can be read; `top + 1` if none can.
    pub first: u64,
    /// Newest offset; 0 if there is none.
    pub top: u64,
    /// Memory of the events kept, in bytes.
    pub bytes: usize,
    /// Subscriptions on this node.
    pub readers: u32,
    /// Of the newest event, Unix milliseconds.
    pub time: Option<u64>,
}

fn as_text<S: Serializer>(value: &impl std::fmt::Display, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_str(value)
}

/// History that a reader asked for and that no longer exists. Always announced before anything newer of its channel.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Gap {
    pub channel: Channel,
    pub reason: GapReason,
    /// What the reader had, as it said it; nothing where that could not be read.
    pub after: Option<Position>,
    /// Position of the next event that the reader will get.
    pub next: Position,
    /// How many events are missing, where it can be known.
    pub missed: Option<u64>,
}

/// Why history is missing.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum GapReason {
    /// Retention: count, age or bytes.
    Trimmed,
    /// The memory budget of the node.
    Budget,
    /// A new life of the channel.
    Reset,
    /// Writes may have been lost.
    Failover,
    /// Somebody deleted it.
    Deleted,
    /// The position cannot be read, or lies ahead of the channel.
    BadPosition,
}

impl GapReason {
    /// Every reason, for metrics.
    pub const ALL: [GapReason; 6] = [
        GapReason::Trimmed,
        GapReason::Budget,
        GapReason::Reset,
        GapReason::Failover,
        GapReason::Deleted,
        GapReason::BadPosition,
    ];

    pub const fn as_str(self) -> &'static str {
        match self {
            GapReason::Trimmed => "trimmed",
            GapReason::Budget => "budget",
            GapReason::Reset => "reset",
            GapReason::Failover => "failover",
            GapReason::Deleted => "deleted",
            GapReason::BadPosition => "bad_position",
        }
    }
}

impl Gap {
    /// Where a reader is after it has been told.
    pub fn resume(&self) -> Position {
        match self.next.epoch.is_absent() {
            true => self.next,
            false => Position { offset: self.next.offset - 1, ..self.next },
        }
    }
}

impl Serialize for Gap {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut map = serializer.serialize_map(Some(5))?;
        map.serialize_entry("channel", self.channel.as_str())?;
        map.serialize_entry("reason", self.reason.as_str())?;
        map.serialize_entry("after", &self.after)?;
        map.serialize_entry("next", &self.next)?;
        map.serialize_entry("missed", &self.missed)?;
        map.end()
    }
}
