//! [`Linked`]: a held stream that misses nothing. Its items name the one before them, and when one is missing, or the
//! stream was quiet for long, the origin is asked for what comes next (`Grip-Link: <…>; rel=next`). Meanwhile events wait
//! where they are, in their channels.

use std::{
    sync::Arc,
    task::{Context, Poll, ready},
    time::Duration,
};

use bytes::Bytes;
use futures_util::future::BoxFuture;
use http::{HeaderMap, HeaderValue};
use hyper::body::Incoming;

use super::{
    Content, Grip,
    at::{At, Fetched},
    filter,
    frame::{Frame, What},
    hold::{Alive, away, pour},
    instruct::{self, Instruct},
    proxy::Failure,
};
use crate::{
    bus::{Gap, Subscriptions, Watch},
    channel::Channel,
    error::Code,
    net::{
        chunk,
        stream::StreamOutput,
        timer::{Due, Timer},
    },
    position::Start,
    transport::subscription_stream::{HeartbeatPolicy, StreamAction, StreamContext, StreamHandler},
};

/// How often an origin that fails is asked again, and how long after the first time; twice as long after each more.
const TRIES: u32 = 5;
const PAUSE: Duration = Duration::from_secs(1);
/// The pause before the origin is asked again for the same reason, as what it said did not help.
const STALE: Duration = Duration::from_millis(100);
/// Longer than any link's time.
const NEVER: Duration = Duration::from_secs(60 * 60 * 24 * 365);

/// See the [module](self).
pub struct Linked {
    at: At,
    instruct: Instruct,
    following: Vec<Followed>,
    state: State,
    keep_alive: Option<Alive>,
    /// Fires when the link is to be fetched for nothing else.
    alarm: Timer,
    /// What did not fit, until it is known what does.
    unfit: Option<(u32, Bytes)>,
    /// The origin failed so often in a row.
    failures: u32,
    /// What it said did not help so often in a row.
    stale: u32,
    /// What the next look at the subscriptions is to change.
    change: Option<Change>,
    /// It has been held.
    begun: bool,
    /// The first answer was outdated before it could be held.
    outdated: bool,
}

/// A channel of the stream.
struct Followed {
    slot: u32,
    /// As the origin calls it.
    name: String,
    channel: Channel,
    /// The item that the client has, if its items have ids.
    prev: Option<String>,
    /// Up to here the origin may have told of items already.
    told: Option<u64>,
    /// Anything came since the alarm was set.
    active: bool,
}

struct Change {
    gone: Vec<u32>,
    /// With their places in the instructions.
    new: Vec<(usize, Watch)>,
}

enum State {
    /// The origin's own words go out.
    Pouring(Option<Box<Incoming>>),
    /// Where things stand is asked of the bus.
    Settling(BoxFuture<'static, Result<Settled, Failure>>),
    Holding,
    /// Until the alarm fires, then the link is fetched.
    Pausing,
    Fetching(BoxFuture<'static, Result<Fetched, Failure>>),
}

struct Settled {
    watches: Vec<(usize, Watch)>,
    /// The newest offset of each channel.
    heads: Vec<u64>,
}

impl Linked {
    /// A stream that has begun: `slots` are subscriptions to the channels of the instructions, in their order.
    pub fn new(
        grip: &Arc<Grip>,
        at: At,
        instruct: Instruct,
        slots: Vec<(u32, Channel)>,
        body: Option<Box<Incoming>>,
        outdated: bool,
    ) -> Self {
        let followed = |((slot, channel), asked): ((u32, Channel), &instruct::Channel)| Followed {
            slot,
            name: asked.name.clone(),
            channel,
            prev: asked.prev_id.clone(),
            told: None,
            active: false,
        };
        Linked {
            at,
            following: slots.into_iter().zip(&instruct.channels).map(followed).collect(),
            keep_alive: instruct.keep_alive.clone().map(Alive::new),
            alarm: grip.node.timers.timer(NEVER),
            instruct,
            state: State::Pouring(body),
            unfit: None,
            failures: 0,
            stale: 0,
            change: None,
            begun: false,
            outdated,
        }
    }

    /// Goes on behind the origin's words.
    fn poured(&mut self) -> StreamAction {
        let begun = std::mem::replace(&mut self.begun, true);
        match self.instruct.hold {
            None => {
                if !self.fetch() {
                    return StreamAction::Finish;
                }
            }
            Some(_) if begun => self.state = State::Settling(self.settle()),
            Some(_) if self.outdated => self.missed(),
            Some(_) => self.hold(),
        }
        StreamAction::Wait
    }

    fn hold(&mut self) {
        self.state = State::Holding;
        self.following.iter_mut().for_each(|followed| followed.active = false);
        let timeout = self.instruct.next.as_ref().and_then(|link| link.timeout);
        self.alarm.reset(timeout.unwrap_or(NEVER));
    }

    /// Asks the origin for what comes next, if there is a link to it.
    fn fetch(&mut self) -> bool {
        let Some(link) = &self.instruct.next else { return false };
        self.state = State::Fetching(Box::pin(self.at.fetch(&link.uri, self.last_ids())));
        true
    }

    /// As [`fetch`](Self::fetch), and later each time that it does not help.
    fn fetch_later(&mut self, pause: Duration) {
        self.state = State::Pausing;
        self.alarm.reset(pause);
    }

    fn last_ids(&self) -> HeaderMap {
        let mut headers = HeaderMap::new();
        for Followed { name, prev, .. } in &self.following {
            let last = prev.as_ref().map(|id| HeaderValue::try_from(format!("{name}; last-id={id}")));
            if let Some(Ok(last)) = last {
                headers.append("grip-last", last);
            }
        }
        headers
    }

    /// What the bus knows of the channels that are to be held now.
    fn settle(&self) -> BoxFuture<'static, Result<Settled, Failure>> {
        let grip = self.at.grip.clone();
        let names = grip.channels(&grip.routes[self.at.route], &self.instruct);
        let known: Vec<Channel> = self.following.iter().map(|followed| followed.channel.clone()).collect();
        Box::pin(async move {
            let (mut watches, mut heads) = (Vec::new(), Vec::new());
            for (nth, channel) in names?.into_iter().enumerate() {
                if !known.contains(&channel) {
                    let watch = grip.node.bus.watch(std::slice::from_ref(&channel)).await.map_err(away)?;
                    watches.extend(watch.into_iter().map(|watch| (nth, watch)));
                }
                heads.push(grip.node.bus.head(&channel).await.map_err(away)?.offset);
            }
            Ok(Settled { watches, heads })
        })
    }

    /// Takes up what the origin's newest instructions say.
    fn settled(&mut self, settled: Settled) -> Result<(), Failure> {
        let names = self.at.grip.channels(&self.at.grip.routes[self.at.route], &self.instruct)?;
        let mut before = std::mem::take(&mut self.following);
        for ((channel, asked), head) in names.into_iter().zip(&self.instruct.channels).zip(settled.heads) {
            let known = before.iter().position(|followed| followed.channel == channel);
            let slot = known.map_or(u32::MAX, |known| before.swap_remove(known).slot);
            let (name, prev) = (asked.name.clone(), asked.prev_id.clone());
            let told = prev.is_some().then_some(head);
            self.following.push(Followed { slot, name, channel, prev, told, active: false });
        }
        let gone = before.into_iter().map(|followed| followed.slot).collect();
        self.change = Some(Change { gone, new: settled.watches });
        self.keep_alive = self.instruct.keep_alive.clone().map(Alive::new);
        self.hold();
        Ok(())
    }

    /// One event: what it does to the stream.
    fn event(&mut self, slot: u32, bytes: &Bytes, out: &mut StreamOutput) -> StreamAction {
        let Some(nth) = self.following.iter().position(|followed| followed.slot == slot) else {
            return StreamAction::Continue;
        };
        let Some(frame) = Frame::read(bytes) else { return StreamAction::Continue };
        let followed = &mut self.following[nth];
        if frame.marked
            && let Some(prev) = &followed.prev
        {
            let told = followed.told.is_some_and(|told| frame.offset <= told);
            if followed.told.is_some_and(|told| frame.offset >= told) {
                followed.told = None;
            }
            if frame.id.as_deref() == Some(prev) {
                // The origin has told it already.
                return StreamAction::Continue;
            }
            if frame.prev.as_deref() != Some(prev) {
                if told && followed.told.is_some() {
                    // It may be older than what the origin told last.
                    return StreamAction::Continue;
                }
                if self.instruct.next.is_some() {
                    self.unfit = (!told).then(|| (slot, bytes.clone()));
                    self.missed();
                    return StreamAction::Wait;
                }
                return StreamAction::Close(Code::Slow);
            }
            followed.prev = frame.id.as_deref().map(str::to_owned);
            self.stale = 0;
        }
        self.following[nth].active = true;
        if self.following.iter().all(|followed| followed.active) && self.instruct.next.is_some() {
            self.hold();
        }
        if !filter::passes(&self.instruct, nth, &frame.meta) {
            return StreamAction::Continue;
        }
        match frame.what {
            What::Send => {
                out.push(chunk::of(frame.bytes));
                StreamAction::Continue
            }
            What::Nothing => StreamAction::Continue,
            What::Close => StreamAction::Finish,
            What::Hint => match self.fetch() {
                true => StreamAction::Wait,
                false => StreamAction::Continue,
            },
        }
    }

    /// Something is missing, and the origin has it.
    fn missed(&mut self) {
        self.stale += 1;
        match self.stale {
            1 => drop(self.fetch()),
            more => self.fetch_later(STALE * 2u32.saturating_pow(more.min(8) - 2)),
        }
    }

    /// Goes on as far as it can aside; ready when events may.
    fn advance(&mut self, cx: &mut Context<'_>, out: &mut StreamOutput) -> Poll<StreamAction> {
        loop {
            match &mut self.state {
                State::Pouring(body) => match pour(body, cx, out) {
                    StreamAction::Continue => match self.poured() {
                        StreamAction::Wait => {}
                        end => return Poll::Ready(end),
                    },
                    StreamAction::Wait => return Poll::Pending,
                    end => return Poll::Ready(end),
                },
                State::Settling(settling) => match ready!(settling.as_mut().poll(cx)) {
                    Ok(settled) => {
                        if self.settled(settled).is_err() {
                            return Poll::Ready(StreamAction::Close(Code::ProviderGone));
                        }
                        // The subscriptions are to be changed before anything else.
                        cx.waker().wake_by_ref();
                        return Poll::Pending;
                    }
                    Err(_) => return Poll::Ready(StreamAction::Close(Code::BusUnavailable)),
                },
                State::Holding => {
                    if let Some((slot, bytes)) = self.unfit.take() {
                        match self.event(slot, &bytes, out) {
                            StreamAction::Continue | StreamAction::Wait => continue,
                            end => return Poll::Ready(end),
                        }
                    }
                    match self.alarm.poll(cx) {
                        Poll::Ready(Due::Time) if self.fetch() => {}
                        // Whoever carries the stream ends it.
                        Poll::Ready(_) => {}
                        Poll::Pending => return Poll::Ready(StreamAction::Continue),
                    }
                }
                State::Pausing => match ready!(self.alarm.poll(cx)) {
                    Due::Time if !self.fetch() => return Poll::Ready(StreamAction::Finish),
                    _ => {}
                },
                State::Fetching(fetching) => match ready!(fetching.as_mut().poll(cx)) {
                    Ok(Fetched { instruct, body, route, path }) => {
                        self.failures = 0;
                        (self.at.route, self.at.path) = (route, path);
                        self.instruct = instruct;
                        self.state = State::Pouring(match body {
                            Content::Incoming(body) => Some(Box::new(body)),
                            Content::Bytes(bytes) => {
                                out.push(chunk::of(&bytes));
                                None
                            }
                        });
                    }
                    Err(failure) => {
                        tracing::debug!(?failure, "could not fetch what comes next of a held stream");
                        self.failures += 1;
                        if self.failures > TRIES {
                            return Poll::Ready(StreamAction::Close(Code::ProviderGone));
                        }
                        let jitter = Duration::from_millis(fastrand::u64(..1_000));
                        self.fetch_later(PAUSE * 2u32.pow(self.failures - 1) + jitter);
                    }
                },
            }
        }
    }
}

impl StreamHandler for Linked {
    fn heartbeat(&self) -> Option<HeartbeatPolicy> {
        self.keep_alive.as_ref().map(|alive| alive.policy)
    }

    fn on_heartbeat(&mut self, stream: &mut StreamContext<'_>) {
        match (&self.state, &self.keep_alive) {
            // In the midst of the origin's body it would corrupt it.
            (State::Pouring(_), _) | (_, None) => {}
            (_, Some(alive)) => stream.out.push(alive.data.clone()),
        }
    }

    fn poll_direct(&mut self, cx: &mut Context<'_>, stream: &mut StreamContext<'_>) -> StreamAction {
        let action = match self.advance(cx, stream.out) {
            Poll::Ready(action) => action,
            Poll::Pending => StreamAction::Wait,
        };
        if let Some(change) = self.change.take() {
            self.subscribe(change, stream.subscriptions);
        }
        action
    }

    fn on_events(&mut self, stream: &mut StreamContext<'_>, slot: u32, bytes: Bytes, _: u32) -> StreamAction {
        self.event(slot, &bytes, stream.out)
    }

    /// The events that are missing are available from the origin.
    fn on_gap(&mut self, _: &mut StreamContext<'_>, _: &Gap) -> StreamAction {
        if self.instruct.next.is_none() {
            return StreamAction::Close(Code::Slow);
        }
        self.missed();
        StreamAction::Wait
    }
}

impl Linked {
    fn subscribe(&mut self, Change { gone, new }: Change, subs: &mut Subscriptions) {
        gone.into_iter().for_each(|slot| subs.remove(slot));
        for (nth, watch) in new {
            let slot = subs.add(watch, Start::Now, None).slot;
            if let Some(followed) = self.following.get_mut(nth) {
                followed.slot = slot;
            }
        }
    }
}
