//! [`Log`], the contract of a backend: the events of every channel, in order.
//!
//! A backend stores, orders and carries events; everything that clients can tell apart is written once, in
//! [`Bus`](super::Bus). `tests/it/conformance.rs` proves these rules on every backend:
//!
//! * offsets are dense in a channel, events become visible in the order of their offsets, `time` never decreases;
//! * an event that one reader has seen can be read by all;
//! * a read never creates a channel, and works while the store rejects writes: what it would mark, as the last use of a
//!   consumer, it marks if it can;
//! * a position that cannot be proven contiguous yields a [`Gap`](super::Gap), never silence.

use std::sync::Arc;

use futures_util::future::BoxFuture;

use super::{
    channel_info::ChannelInfo,
    consumer::{ConsumerInfo, CursorOp},
    page::{LogPage, Placed, ReadLimit},
    tail::Tail,
    topic::Topic,
};
use crate::{
    channel::Channel,
    error::Result,
    event::Draft,
    position::{Position, Start},
};

/// The store behind the bus. All methods may be called concurrently from many tasks.
pub trait Log: Send + Sync + 'static {
    /// Whether events can be published and received now. Returns at once, from what is known.
    fn ready(&self) -> Result<()>;

    /// Does one part of the housekeeping; 64 calls do all of it.
    fn sweep(&self);

    /// Places all drafts of one channel in one atomic step (place, store, make visible): all of them or none.
    ///
    /// `subject` identifies the publisher and is the scope of idempotency keys.
    ///
    /// # Errors
    /// `bus_unavailable` (not placed), `unconfirmed` (perhaps placed; the backend never retries it), `key_reused` or
    /// `overloaded`.
    fn append<'a>(
        &'a self,
        channel: &'a Channel,
        subject: &'a str,
        drafts: Vec<Draft>,
    ) -> BoxFuture<'a, Result<Vec<Placed>>>;

    /// Reads a page from `start` on: at least one event if there is one.
    fn read<'a>(&'a self, channel: &'a Channel, start: Start, limit: ReadLimit) -> BoxFuture<'a, Result<LogPage>>;

    /// Fills `topic` until the returned handle is dropped. Once it is returned, the topic knows the channel's epoch and
    /// top, so that its readers may begin.
    fn tail<'a>(&'a self, topic: &'a Arc<Topic>) -> BoxFuture<'a, Result<Tail>>;

    /// Describes a channel. A channel without a log is not an error.
    fn inspect<'a>(&'a self, channel: &'a Channel) -> BoxFuture<'a, Result<ChannelInfo>>;

    /// Lists channels that have a log, in byte order of their names, beginning with the first one after `after`.
    fn list<'a>(
        &'a self,
        prefix: &'a str,
        after: Option<&'a str>,
        limit: usize,
    ) -> BoxFuture<'a, Result<Vec<ChannelInfo>>>;

    /// Removes the events before `before`, or the whole log.
    fn remove<'a>(&'a self, channel: &'a Channel, before: Option<Position>) -> BoxFuture<'a, Result<()>>;

    /// Applies `op` and returns the resulting position of the cursor.
    fn cursor<'a>(
        &'a self,
        consumer: &'a str,
        channel: &'a Channel,
        op: CursorOp,
    ) -> BoxFuture<'a, Result<Option<Position>>>;

    /// All cursors of one consumer.
    fn consumer<'a>(&'a self, consumer: &'a str) -> BoxFuture<'a, Result<Option<ConsumerInfo>>>;

    /// Lists consumers in byte order of their names, beginning with the first one after `after`.
    fn consumers<'a>(
        &'a self,
        prefix: &'a str,
        after: Option<&'a str>,
        limit: usize,
    ) -> BoxFuture<'a, Result<Vec<ConsumerInfo>>>;

    /// Removes a consumer. False if it does not exist.
    fn forget<'a>(&'a self, consumer: &'a str) -> BoxFuture<'a, Result<bool>>;
}
