//! [`SseHandler`]: what native SSE sends beside events: ids, heartbeats, gaps, and when to reconnect.

use std::{
    hash::BuildHasher,
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};

use bytes::Bytes;
use futures_util::{FutureExt as _, future::BoxFuture};

use super::frame;
use crate::{
    bus::{Filter, Gap, GapReason, Subscriptions, Watch},
    channel::Channel,
    error::{Code, Result},
    metrics::Metrics,
    net::{stream::StreamOutput, timer::TimerWheel},
    node::Node,
    position::{Position, Start},
    presence::PresenceLease,
    token::TokenEncoder,
    transport::subscription_stream::{HeartbeatPolicy, KICKED_RETRY, StreamAction, StreamContext, StreamHandler},
};

/// A token of more bytes than this is sent at most once in [`TOKEN_PAUSE`].
const LONG_TOKEN: usize = 64;
const TOKEN_PAUSE: Duration = Duration::from_secs(1);

/// The source of a stream's `id:` lines.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Ids {
    /// One channel: they are inside the shared frames.
    Shared,
    /// Several channels: a token before the last frame of each write, or less often if it is long.
    Token,
    /// Several channels: a token before every frame.
    Each,
}

/// The token that was sent last. One that is long is sent less often.
#[derive(Clone, Copy, PartialEq, Eq)]
enum LastToken {
    Short,
    Long,
    /// A long token, after which events were sent: the next is due within [`TOKEN_PAUSE`].
    Outdated,
}

/// The events of the chunk that was pushed last, if it still can get an id.
#[derive(Clone, Copy, PartialEq, Eq)]
enum LastChunk {
    None,
    OneEvent,
    ManyEvents,
}

/// Handles one native stream, whose subscriptions are in slots counted from 0 and never change.
pub(super) struct SseHandler {
    /// The beginning, while the bus does not reply.
    opening: Option<Box<SseOpening>>,
    _membership: Option<Box<StreamMembership>>,
    /// Encodes the positions of several channels.
    token: Option<Box<TokenEncoder>>,
    /// The tick of the last token.
    token_at: u32,
    /// Fingerprint of the last `id:` that was sent. Maintained where positions advance without an event.
    last_id: u32,
    /// The delay that the first block announced as `retry:`.
    retry_ms: u16,
    /// Spreads the interval to the next heartbeat: a fraction of [`u16::MAX`].
    jitter: u16,
    ids: Ids,
    filtered: bool,
    last_token: LastToken,
    last_chunk: LastChunk,
}

/// Keeps the client present on its channels. Few streams have one: without it a stream takes eight bytes less.
struct StreamMembership {
    _leases: Box<[PresenceLease]>,
}

/// The subscriptions with which a stream begins.
pub(super) struct SseOpening {
    pub(super) watches: BoxFuture<'static, Result<Vec<Watch>>>,
    pub(super) starts: Vec<Start>,
    /// The requested position cannot be parsed.
    pub(super) unreadable: bool,
    pub(super) filter: Option<Arc<Filter>>,
    pub(super) metrics: Arc<Metrics>,
}

impl SseOpening {
    /// Adds the subscriptions, and returns what is missing before their positions.
    pub(super) fn subscribe(self, watches: Vec<Watch>, subscriptions: &mut Subscriptions) -> Vec<Gap> {
        let mut gaps = Vec::new();
        for (watch, start) in watches.into_iter().zip(self.starts) {
            let added = subscriptions.add(watch, start, self.filter.clone());
            gaps.extend(added.gap);
            if self.unreadable {
                let channel = subscriptions.channel(added.slot);
                gaps.extend(channel.map(|channel| bad_position(channel.clone(), added.position)));
            }
        }
        gaps.iter().for_each(|gap| self.metrics.gap(gap.reason.as_str()));
        gaps
    }
}

/// The gap for a position that could not be parsed. The stream continues at `at`.
fn bad_position(channel: Channel, at: Position) -> Gap {
    let next = if at.epoch.is_absent() { at } else { Position { offset: at.offset + 1, ..at } };
    Gap { channel, reason: GapReason::BadPosition, after: None, next, missed: None }
}

impl SseHandler {
    pub(super) fn new(leases: Box<[PresenceLease]>, ids: Ids, filtered: bool, now: u32) -> Self {
        SseHandler {
            opening: None,
            _membership: (!leases.is_empty()).then(|| Box::new(StreamMembership { _leases: leases })),
            token: None,
            token_at: now,
            last_id: 0,
            retry_ms: frame::retry_ms(),
            jitter: fastrand::u16(..),
            ids,
            filtered,
            last_token: LastToken::Short,
            last_chunk: LastChunk::None,
        }
    }

    /// The first blocks, as chunks. `gaps` are what is missing before the subscriptions' positions.
    pub(super) fn open(&mut self, gaps: Vec<Gap>, subscriptions: &Subscriptions, now: u32) -> Vec<Bytes> {
        if subscriptions.len() > 1 {
            let channels: Vec<Channel> = positions(subscriptions).map(|(channel, _)| channel.clone()).collect();
            self.token = Some(Box::new(TokenEncoder::new(&channels)));
        }
        self.next_id(subscriptions, now);
        // Until a gap is reported, ids lie before it: a client that loses its connection in between gets it again.
        let opening = self.id_before(subscriptions, &gaps);
        let mut first = vec![frame::opening(self.retry_ms.into(), &opening, positions(subscriptions))];
        for (reported, gap) in gaps.iter().enumerate() {
            first.push(frame::gap(&self.id_before(subscriptions, &gaps[reported + 1..]), gap));
        }
        first
    }

    /// Has the stream begin when the bus replies. Returns the first chunk until then.
    pub(super) fn open_later(&mut self, opening: SseOpening) -> Bytes {
        self.opening = Some(Box::new(opening));
        Bytes::from_static(frame::HEARTBEAT)
    }

    /// The position or token after everything that was pushed, which is to be sent now.
    fn next_id(&mut self, subscriptions: &Subscriptions, now: u32) -> String {
        let id = self.id_before(subscriptions, &[]);
        self.last_id = fingerprint(id.as_bytes());
        self.token_at = now;
        self.last_token = if id.len() > LONG_TOKEN { LastToken::Long } else { LastToken::Short };
        id
    }

    /// The position or token of a client to which `gaps` are not reported yet.
    fn id_before(&self, subscriptions: &Subscriptions, gaps: &[Gap]) -> String {
        let position = |at: usize| {
            let channel = subscriptions.channel(at as u32);
            let before_gap = gaps.iter().find(|gap| Some(&gap.channel) == channel).and_then(|gap| gap.after);
            before_gap.or(subscriptions.position(at as u32)).unwrap_or(Position::absent(0))
        };
        match &self.token {
            None => position(0).to_string(),
            Some(token) => token.token(position),
        }
    }
}

impl StreamHandler for SseHandler {
    fn heartbeat(&self, node: &Node) -> Option<HeartbeatPolicy> {
        // Within a quarter: otherwise clients that connected together stay in step.
        let factor = f64::from(self.jitter) / f64::from(u16::MAX) / 2.0 + 0.75;
        Some(HeartbeatPolicy::Periodic(node.config.sse.heartbeat.mul_f64(factor)))
    }

    fn on_heartbeat(&mut self, stream: &mut StreamContext<'_>) {
        self.jitter = fastrand::u16(..);
        stream.out.push(Bytes::from_static(frame::HEARTBEAT));
        if self.filtered
            && self.opening.is_none()
            && fingerprint(self.id_before(stream.subscriptions, &[]).as_bytes()) != self.last_id
        {
            self.on_deadline(stream);
        }
    }

    fn poll_direct(&mut self, cx: &mut Context<'_>, stream: &mut StreamContext<'_>) -> StreamAction {
        let Some(opening) = &mut self.opening else { return StreamAction::Continue };
        let watches = match opening.watches.poll_unpin(cx) {
            Poll::Pending => return StreamAction::Wait,
            Poll::Ready(Err(error)) => return StreamAction::Close(error.code()),
            Poll::Ready(Ok(watches)) => watches,
        };
        if let Some(opening) = self.opening.take() {
            let gaps = opening.subscribe(watches, stream.subscriptions);
            let first = self.open(gaps, stream.subscriptions, stream.now);
            first.into_iter().for_each(|block| stream.out.push(block));
        }
        StreamAction::Continue
    }

    fn on_events(&mut self, stream: &mut StreamContext<'_>, _: u32, bytes: Bytes, count: u32) -> StreamAction {
        if self.ids == Ids::Shared && self.filtered {
            self.last_id = fingerprint(frame::last_id(&bytes));
        }
        stream.out.push(bytes);
        let last_chunk = if count > 1 { LastChunk::ManyEvents } else { LastChunk::OneEvent };
        match self.ids {
            Ids::Shared => {}
            Ids::Token => self.last_chunk = last_chunk,
            Ids::Each => {
                let id = self.next_id(stream.subscriptions, stream.now);
                add_id(stream.out, last_chunk, &id);
            }
        }
        StreamAction::Continue
    }

    fn on_gap(&mut self, stream: &mut StreamContext<'_>, gap: &Gap) -> StreamAction {
        self.last_chunk = LastChunk::None;
        let id = self.next_id(stream.subscriptions, stream.now);
        stream.out.push(frame::gap(&id, gap));
        StreamAction::Continue
    }

    fn on_batch_end(&mut self, stream: &mut StreamContext<'_>) {
        let last_chunk = std::mem::replace(&mut self.last_chunk, LastChunk::None);
        if last_chunk == LastChunk::None {
            return;
        }
        let quiet = TimerWheel::span(self.token_at, stream.now);
        if self.last_token != LastToken::Short && quiet < TOKEN_PAUSE {
            self.last_token = LastToken::Outdated;
        } else {
            let id = self.next_id(stream.subscriptions, stream.now);
            add_id(stream.out, last_chunk, &id);
        }
    }

    fn deadline(&self) -> Option<u32> {
        (self.last_token == LastToken::Outdated).then(|| self.token_at + TimerWheel::ticks(TOKEN_PAUSE))
    }

    fn on_deadline(&mut self, stream: &mut StreamContext<'_>) {
        let id = self.next_id(stream.subscriptions, stream.now);
        stream.out.push(frame::position(&id));
    }

    fn on_end(&mut self, stream: &mut StreamContext<'_>, code: Code) {
        // The `retry:` line: a delay is all that an `EventSource` understands, also for "do not reconnect".
        let kicked = code == Code::Kicked;
        let after_ms = if kicked { KICKED_RETRY.into() } else { self.retry_ms.into() };
        stream.out.push(frame::retry(code.as_str(), after_ms, kicked || self.opening.is_some()));
    }
}

fn positions(subscriptions: &Subscriptions) -> impl Iterator<Item = (&Channel, Position)> {
    (0..subscriptions.len() as u32)
        .filter_map(|slot| Some((subscriptions.channel(slot)?, subscriptions.position(slot)?)))
}

fn fingerprint(id: &[u8]) -> u32 {
    foldhash::fast::FixedState::with_seed(0).hash_one(id) as u32
}

/// Puts `id` before the last event that was pushed.
fn add_id(out: &mut StreamOutput, last_chunk: LastChunk, id: &str) {
    let chunked = out.is_chunked();
    if let Some(piece) = out.take_back() {
        frame::with_id(&piece, last_chunk == LastChunk::ManyEvents, id, chunked, |piece| out.push_framed(piece));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{net::stream, transport::subscription_stream::SubscriptionStream};

    #[test]
    fn an_idle_stream_is_small() {
        let size = stream::task_size::<SubscriptionStream<SseHandler>>();
        assert!(size <= 368, "{size}");
    }
}
