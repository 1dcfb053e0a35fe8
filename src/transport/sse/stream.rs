//! [`Stream`]: what one reader gets, in which order, whatever carries it.

use std::{
    hash::BuildHasher,
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};

use bytes::Bytes;

use super::{frame, jitter};
use crate::{
    bus::{Delivery, DeliveryItem, Gap, Subscriptions},
    channel::Channel,
    error::Code,
    metrics::{OpenConnection, Transport},
    net::{
        stream::{Progress, StreamOutput, StreamSource, TURN},
        timer::{Due, Timer, TimerWheel},
    },
    node::Node,
    position::Position,
    presence::PresenceLease,
    sessions::ConnectionRegistration,
    token::TokenEncoder,
};

/// A token of more bytes than this is sent at most once in [`TOKEN_PAUSE`].
const LONG_TOKEN: usize = 64;
const TOKEN_PAUSE: Duration = Duration::from_secs(1);

/// Milliseconds: 25 days, the longest that the timers of browsers can wait. More would be no wait at all.
const NEVER: u32 = i32::MAX as u32;

/// Where a reader's `id:` lines come from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Ids {
    /// One channel: they are inside the shared frames.
    Shared,
    /// Several channels: a token before the last frame of each write, or not so often if it is long.
    Token,
    /// Several channels: a token before every frame.
    Each,
}

/// One reader's subscriptions, and all that is said to it beside events.
pub(super) struct Stream {
    /// In slots counted from 0, and none ever leaves.
    subs: Subscriptions,
    /// Whom the reader says to be, on its channels.
    _leases: Box<[PresenceLease]>,
    _registration: ConnectionRegistration,
    /// Of several channels, for their token.
    names: Option<Box<TokenEncoder>>,
    node: Arc<Node>,
    timer: Timer,
    connected: OpenConnection,
    /// Ticks: when the next heartbeat is due, and when the last token went out.
    beat: u32,
    told_at: u32,
    /// Fingerprint of the last `id:` that the reader got. Kept where positions move without an event.
    told: u32,
    /// Events and bytes handed over since they were last added to the metrics.
    events: u32,
    bytes: u64,
    /// What the `retry:` of the first block said.
    retry_ms: u32,
    ids: Ids,
    filtered: bool,
    /// The last token was long, and so will be the next.
    long: bool,
    /// Events went out after the last token: it is due within [`TOKEN_PAUSE`].
    owed: bool,
    ended: bool,
}

impl Stream {
    /// A stream that has begun: `subs` hold all its channels, in slots counted from 0, and `gaps` are what is missing
    /// before them. Also returns the first blocks, as chunks.
    pub fn begin(
        node: Arc<Node>,
        subs: Subscriptions,
        leases: Box<[PresenceLease]>,
        registration: ConnectionRegistration,
        gaps: Vec<Gap>,
        ids: Ids,
        filtered: bool,
    ) -> (Self, Vec<Bytes>) {
        let beat = jitter(node.config.sse.heartbeat);
        let mut timer = node.timers.timer(beat);
        timer.set_owner(registration.number());
        node.metrics.subscriptions[Transport::Sse].add(subs.len() as i64);
        let mut stream = Stream {
            connected: node.metrics.connected(Transport::Sse),
            beat: timer.now() + TimerWheel::ticks(beat),
            told_at: timer.now(),
            told: 0,
            names: None,
            subs,
            _leases: leases,
            _registration: registration,
            timer,
            events: 0,
            bytes: 0,
            retry_ms: super::retry_ms().into(),
            ids,
            filtered,
            long: false,
            owed: false,
            ended: false,
            node,
        };
        if stream.subs.len() > 1 {
            let channels: Vec<Channel> = stream.places().map(|(channel, _)| channel.clone()).collect();
            stream.names = Some(Box::new(TokenEncoder::new(&channels)));
        }
        stream.tell();
        // Until a gap has been told, ids lie before it: who is cut off in between shall hear of it the next time.
        let opening = stream.id_before(&gaps);
        let mut first = vec![frame::opening(stream.retry_ms, &opening, stream.places())];
        for (told, gap) in gaps.iter().enumerate() {
            stream.node.metrics.gap(gap.reason.as_str());
            first.push(frame::gap(&stream.id_before(&gaps[told + 1..]), gap));
        }
        (stream, first)
    }

    fn tick(&mut self, silent: bool, out: &mut StreamOutput) {
        let now = self.timer.now();
        let heartbeat = now >= self.beat;
        if heartbeat {
            self.beat = now + TimerWheel::ticks(jitter(self.node.config.sse.heartbeat));
            self.report();
            out.relax();
        }
        if silent {
            return;
        }
        if heartbeat {
            out.push(Bytes::from_static(frame::HEARTBEAT));
        }
        let overdue = self.owed && TimerWheel::span(self.told_at, now) >= TOKEN_PAUSE;
        if overdue || (heartbeat && self.filtered && fingerprint(self.id().as_bytes()) != self.told) {
            out.push(frame::position(&self.tell()));
        }
    }

    /// Says that the stream ends, and why. Nothing comes after it.
    fn end(&mut self, code: Code, out: &mut StreamOutput) {
        if !self.ended {
            self.ended = true;
            self.connected.closed_with(code);
            out.push(frame::retry(code.as_str(), self.retry_ms.into(), self.retry_ms == NEVER));
            out.end();
        }
    }

    /// The position or token of everything that was pushed, to be said now.
    fn tell(&mut self) -> String {
        let id = self.id();
        self.told = fingerprint(id.as_bytes());
        self.told_at = self.timer.now();
        self.long = id.len() > LONG_TOKEN;
        self.owed = false;
        id
    }

    fn id(&self) -> String {
        self.id_before(&[])
    }

    /// Where the reader is while it has not been told of `gaps`.
    fn id_before(&self, gaps: &[Gap]) -> String {
        let position = |at: usize| {
            let channel = self.subs.channel(at as u32);
            let untold = gaps.iter().find(|gap| Some(&gap.channel) == channel).and_then(|gap| gap.after);
            untold.or(self.subs.position(at as u32)).unwrap_or(Position::absent(0))
        };
        match &self.names {
            None => position(0).to_string(),
            Some(names) => names.token(position),
        }
    }

    fn places(&self) -> impl Iterator<Item = (&Channel, Position)> {
        (0..self.subs.len() as u32).filter_map(|slot| Some((self.subs.channel(slot)?, self.subs.position(slot)?)))
    }

    fn report(&mut self) {
        self.node.metrics.delivered[Transport::Sse].add(std::mem::take(&mut self.events).into());
        self.node.metrics.delivered_bytes[Transport::Sse].add(std::mem::take(&mut self.bytes));
    }
}

impl StreamSource for Stream {
    fn poll_time(&mut self, cx: &mut Context<'_>, blocked: bool, out: &mut StreamOutput) {
        while let Poll::Ready(due) = self.timer.poll(cx) {
            match due {
                Due::Leave => self.end(Code::Draining, out),
                Due::Kicked => {
                    // What an `EventSource` takes for its pause: it has no word for "never".
                    self.retry_ms = NEVER;
                    self.end(Code::Kicked, out);
                }
                Due::Time => {
                    self.tick(blocked || self.ended, out);
                    let next = if self.owed {
                        self.beat.min(self.told_at + TimerWheel::ticks(TOKEN_PAUSE))
                    } else {
                        self.beat
                    };
                    self.timer.reset(TimerWheel::span(self.timer.now(), next));
                }
            }
        }
    }

    fn poll(&mut self, cx: &mut Context<'_>, out: &mut StreamOutput) -> Progress {
        if self.ended {
            return Progress::Ended;
        }
        if self.subs.poll_turn(cx).is_pending() {
            return Progress::Idle;
        }
        // Not pushed before it is known whether it is the last of this write, and takes the token.
        let mut last: Option<(Bytes, u32)> = None;
        let turn = loop {
            if out.len() + last.as_ref().map_or(0, |(bytes, _)| bytes.len()) >= TURN {
                break Progress::Full;
            }
            let Some(Delivery { item, .. }) = self.subs.take() else { break Progress::Idle };
            match item {
                DeliveryItem::Events { bytes, count } => {
                    self.events += count;
                    self.bytes += bytes.len() as u64;
                    match self.ids {
                        Ids::Shared => {
                            if self.filtered {
                                self.told = fingerprint(frame::last_id(&bytes));
                            }
                            out.push(bytes);
                        }
                        Ids::Each => {
                            let id = self.tell();
                            push_with_id(out, &bytes, count, &id);
                        }
                        Ids::Token => {
                            if let Some((bytes, _)) = last.replace((bytes, count)) {
                                out.push(bytes);
                            }
                        }
                    }
                }
                DeliveryItem::Gap(gap) => {
                    if let Some((bytes, _)) = last.take() {
                        out.push(bytes);
                    }
                    self.node.metrics.gap(gap.reason.as_str());
                    out.push(frame::gap(&self.tell(), &gap));
                }
            }
        };
        if let Some((bytes, count)) = last {
            let quiet = TimerWheel::span(self.told_at, self.timer.now());
            if self.long && quiet < TOKEN_PAUSE {
                out.push(bytes);
                self.owed = true;
                self.timer.shorten(TOKEN_PAUSE - quiet);
            } else {
                let id = self.tell();
                push_with_id(out, &bytes, count, &id);
            }
        }
        turn
    }

    fn connected(&mut self) -> &mut OpenConnection {
        &mut self.connected
    }

    fn timer(&mut self) -> &mut Timer {
        &mut self.timer
    }

    fn patience(&self) -> Duration {
        self.node.config.limits.stalled
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        self.report();
        self.node.metrics.subscriptions[Transport::Sse].add(-(self.subs.len() as i64));
    }
}

fn fingerprint(id: &[u8]) -> u32 {
    foldhash::fast::FixedState::with_seed(0).hash_one(id) as u32
}

fn push_with_id(out: &mut StreamOutput, chunk: &Bytes, count: u32, id: &str) {
    frame::with_id(chunk, count, id, out.is_chunked(), |piece| out.push_framed(piece));
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::net::stream;

    #[test]
    fn an_idle_stream_is_small() {
        assert!(stream::size::<Stream>() <= 368, "{}", stream::size::<Stream>());
    }
}
