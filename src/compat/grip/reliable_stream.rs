//! [`ReliableStream`]: a held stream whose items are inspected one by one.
//!
//! Items name their predecessor. When one is missing, or the link's timeout passes without items, the stream requests the
//! link of the origin (`Grip-Link: <…>; rel=next`) and appends the response. Meanwhile events wait in the log of their
//! channels.

use std::{
    task::{Context, Poll, ready},
    time::Duration,
};

use bytes::Bytes;
use futures_util::future::BoxFuture;
use http::HeaderMap;
use hyper::body::Incoming;

use super::{
    filter,
    frame::{FrameAction, ItemFrame},
    headers::append_last_id,
    instructions::{HeldChannel, Instructions},
    next_link::{FetchedPart, StreamSite},
    origin_client::OriginError,
    response::OriginBody,
    stream_parts::{StreamKeepAlive, forward_body},
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
    node::Node,
    position::Start,
    transport::subscription_stream::{HeartbeatPolicy, StreamAction, StreamContext, StreamHandler},
};

/// Maximum number of retries of a failed link.
const RETRIES: u32 = 5;
/// Back-off before the first retry of a failed link; it doubles with each retry.
const RETRY_BACKOFF: Duration = Duration::from_secs(1);
/// Back-off before the link is requested again because its response did not contain the missing item; it doubles too.
const GAP_BACKOFF: Duration = Duration::from_millis(100);
/// Longer than the timeout of any link.
const NEVER: Duration = Duration::from_secs(60 * 60 * 24 * 365);

pub(super) struct ReliableStream {
    site: StreamSite,
    instructions: Instructions,
    channels: Vec<FollowedChannel>,
    state: LinkState,
    keep_alive: Option<StreamKeepAlive>,
    /// Timeout of the link, or end of a back-off.
    timer: Timer,
    /// An event whose predecessor was missing: inspected again after the link was fetched.
    pending: Option<(u32, Bytes)>,
    /// Consecutive failures of the link.
    failures: u32,
    /// Consecutive responses of the link that did not contain the missing item.
    gaps: u32,
    /// Applied when the stream is polled next.
    change: Option<SubscriptionChange>,
    /// Whether the stream has been held before.
    held: bool,
    /// An item was published before the first response could be held.
    outdated: bool,
}

struct FollowedChannel {
    slot: u32,
    /// The origin's name of it.
    name: String,
    channel: Channel,
    /// The newest item that the client has, if the items have ids.
    last_id: Option<String>,
    /// Items up to this offset may be contained in the origin's response.
    covered: Option<u64>,
    /// Whether it had an item since the timer was set.
    active: bool,
}

struct SubscriptionChange {
    removed: Vec<u32>,
    /// With their indices in the instructions.
    added: Vec<(usize, Watch)>,
}

enum LinkState {
    /// The body of a response is forwarded.
    Forwarding(Option<Box<Incoming>>),
    /// The bus is read after a response has been forwarded.
    Subscribing(BoxFuture<'static, Result<ChannelHeads, OriginError>>),
    Holding,
    /// The link is fetched when the timer fires.
    BackOff,
    Fetching(BoxFuture<'static, Result<FetchedPart, OriginError>>),
}

struct ChannelHeads {
    /// New channels, with their indices in the instructions.
    watches: Vec<(usize, Watch)>,
    /// The newest offset of each channel.
    offsets: Vec<u64>,
}

impl ReliableStream {
    /// `slots` are the subscriptions to the channels of the instructions, in the same order.
    pub(super) fn new(
        site: StreamSite,
        instructions: Instructions,
        slots: Vec<(u32, Channel)>,
        body: Option<Box<Incoming>>,
        outdated: bool,
    ) -> Self {
        let followed = |((slot, channel), held): ((u32, Channel), &HeldChannel)| FollowedChannel {
            slot,
            name: held.name.clone(),
            channel,
            last_id: held.prev_id.clone(),
            covered: None,
            active: false,
        };
        ReliableStream {
            channels: slots.into_iter().zip(&instructions.channels).map(followed).collect(),
            keep_alive: instructions.keep_alive.clone().map(StreamKeepAlive::new),
            timer: site.proxy.node.timers.timer(NEVER),
            site,
            instructions,
            state: LinkState::Forwarding(body),
            pending: None,
            failures: 0,
            gaps: 0,
            change: None,
            held: false,
            outdated,
        }
    }

    /// Continues after the body of a response.
    fn on_forwarded(&mut self) -> StreamAction {
        let held = std::mem::replace(&mut self.held, true);
        match self.instructions.hold {
            None => {
                if !self.fetch() {
                    return StreamAction::Finish;
                }
            }
            Some(_) if held => self.state = LinkState::Subscribing(self.read_heads()),
            Some(_) if self.outdated => self.on_missing_item(),
            Some(_) => self.hold(),
        }
        StreamAction::Wait
    }

    fn hold(&mut self) {
        self.state = LinkState::Holding;
        self.channels.iter_mut().for_each(|followed| followed.active = false);
        self.timer.reset(self.instructions.next.as_ref().map_or(NEVER, |link| link.timeout));
    }

    /// Requests the link; `false` if there is none.
    fn fetch(&mut self) -> bool {
        let Some(link) = &self.instructions.next else { return false };
        let mut last_ids = HeaderMap::new();
        for followed in &self.channels {
            append_last_id(&mut last_ids, &followed.name, followed.last_id.as_ref());
        }
        self.state = LinkState::Fetching(Box::pin(self.site.fetch(&link.uri, last_ids)));
        true
    }

    fn fetch_after(&mut self, back_off: Duration) {
        self.state = LinkState::BackOff;
        self.timer.reset(back_off);
    }

    /// Watches new channels and reads the newest offset of all.
    fn read_heads(&self) -> BoxFuture<'static, Result<ChannelHeads, OriginError>> {
        let proxy = self.site.proxy.clone();
        let channels = proxy.channels(&proxy.routes[self.site.route], &self.instructions);
        let known: Vec<Channel> = self.channels.iter().map(|followed| followed.channel.clone()).collect();
        Box::pin(async move {
            let (bus, unavailable) = (&proxy.node.bus, OriginError::bus_unavailable);
            let (mut watches, mut offsets) = (Vec::new(), Vec::new());
            for (index, channel) in channels?.into_iter().enumerate() {
                if !known.contains(&channel) {
                    let watch = bus.watch(std::slice::from_ref(&channel)).await.map_err(unavailable)?;
                    watches.extend(watch.into_iter().map(|watch| (index, watch)));
                }
                offsets.push(bus.head(&channel).await.map_err(unavailable)?.offset);
            }
            Ok(ChannelHeads { watches, offsets })
        })
    }

    /// Holds the stream on the channels of the newest instructions.
    fn on_heads(&mut self, heads: ChannelHeads) -> Result<(), OriginError> {
        let proxy = &self.site.proxy;
        let channels = proxy.channels(&proxy.routes[self.site.route], &self.instructions)?;
        let mut previous = std::mem::take(&mut self.channels);
        for ((channel, held), offset) in channels.into_iter().zip(&self.instructions.channels).zip(heads.offsets) {
            let known = previous.iter().position(|followed| followed.channel == channel);
            let slot = known.map_or(u32::MAX, |known| previous.swap_remove(known).slot);
            let (name, last_id) = (held.name.clone(), held.prev_id.clone());
            let covered = last_id.is_some().then_some(offset);
            self.channels.push(FollowedChannel { slot, name, channel, last_id, covered, active: false });
        }
        let removed = previous.into_iter().map(|followed| followed.slot).collect();
        self.change = Some(SubscriptionChange { removed, added: heads.watches });
        self.keep_alive = self.instructions.keep_alive.clone().map(StreamKeepAlive::new);
        self.hold();
        Ok(())
    }

    fn change_subscriptions(
        &mut self,
        SubscriptionChange { removed, added }: SubscriptionChange,
        subs: &mut Subscriptions,
    ) {
        removed.into_iter().for_each(|slot| subs.remove(slot));
        for (index, watch) in added {
            let slot = subs.add(watch, Start::Now, None).slot;
            if let Some(followed) = self.channels.get_mut(index) {
                followed.slot = slot;
            }
        }
    }

    /// Inspects one event, and appends its content if it is next and passes the filters.
    fn on_item(&mut self, slot: u32, bytes: &Bytes, out: &mut StreamOutput) -> StreamAction {
        let Some(index) = self.channels.iter().position(|followed| followed.slot == slot) else {
            return StreamAction::Continue;
        };
        let Some(frame) = ItemFrame::read(bytes) else { return StreamAction::Continue };
        let followed = &mut self.channels[index];
        if frame.has_record
            && let Some(last_id) = &followed.last_id
        {
            let covered = followed.covered.is_some_and(|covered| frame.offset <= covered);
            if followed.covered.is_some_and(|covered| frame.offset >= covered) {
                followed.covered = None;
            }
            if frame.id.as_deref() == Some(last_id) {
                // The origin's response contains it.
                return StreamAction::Continue;
            }
            if frame.prev.as_deref() != Some(last_id) {
                if covered && followed.covered.is_some() {
                    // It may be older than the newest item of the response.
                    return StreamAction::Continue;
                }
                if self.instructions.next.is_some() {
                    self.pending = (!covered).then(|| (slot, bytes.clone()));
                    self.on_missing_item();
                    return StreamAction::Wait;
                }
                return StreamAction::Close(Code::Slow);
            }
            followed.last_id = frame.id.as_deref().map(str::to_owned);
            self.gaps = 0;
        }
        self.channels[index].active = true;
        if self.channels.iter().all(|followed| followed.active) && self.instructions.next.is_some() {
            self.hold();
        }
        if !filter::passes(&self.instructions, index, &frame.meta) {
            return StreamAction::Continue;
        }
        match frame.action {
            FrameAction::Send => {
                out.push(chunk::of(frame.content));
                StreamAction::Continue
            }
            FrameAction::Nothing => StreamAction::Continue,
            FrameAction::Close => StreamAction::Finish,
            FrameAction::Hint => match self.fetch() {
                true => StreamAction::Wait,
                false => StreamAction::Continue,
            },
        }
    }

    /// Requests the missing item from the origin.
    fn on_missing_item(&mut self) {
        self.gaps += 1;
        match self.gaps {
            1 => drop(self.fetch()),
            gaps => self.fetch_after(GAP_BACKOFF * 2u32.saturating_pow(gaps.min(8) - 2)),
        }
    }

    /// Works on the origin's responses; ready when events can be taken, or the stream ends.
    fn poll_link(&mut self, cx: &mut Context<'_>, out: &mut StreamOutput) -> Poll<StreamAction> {
        loop {
            match &mut self.state {
                LinkState::Forwarding(body) => match forward_body(body, cx, out) {
                    StreamAction::Continue => match self.on_forwarded() {
                        StreamAction::Wait => {}
                        end => return Poll::Ready(end),
                    },
                    StreamAction::Wait => return Poll::Pending,
                    end => return Poll::Ready(end),
                },
                LinkState::Subscribing(reading) => match ready!(reading.as_mut().poll(cx)) {
                    Ok(heads) => {
                        if self.on_heads(heads).is_err() {
                            return Poll::Ready(StreamAction::Close(Code::ProviderGone));
                        }
                        // The subscriptions must change before events are taken.
                        cx.waker().wake_by_ref();
                        return Poll::Pending;
                    }
                    Err(_) => return Poll::Ready(StreamAction::Close(Code::BusUnavailable)),
                },
                LinkState::Holding => {
                    if let Some((slot, bytes)) = self.pending.take() {
                        match self.on_item(slot, &bytes, out) {
                            StreamAction::Continue | StreamAction::Wait => continue,
                            end => return Poll::Ready(end),
                        }
                    }
                    match self.timer.poll(cx) {
                        Poll::Ready(Due::Time) if self.fetch() => {}
                        // The `SubscriptionStream` ends streams when the node drains or a client is kicked.
                        Poll::Ready(_) => {}
                        Poll::Pending => return Poll::Ready(StreamAction::Continue),
                    }
                }
                LinkState::BackOff => match ready!(self.timer.poll(cx)) {
                    Due::Time if !self.fetch() => return Poll::Ready(StreamAction::Finish),
                    _ => {}
                },
                LinkState::Fetching(fetching) => match ready!(fetching.as_mut().poll(cx)) {
                    Ok(FetchedPart { instructions, body, route, path }) => {
                        self.failures = 0;
                        (self.site.route, self.site.path) = (route, path);
                        self.instructions = instructions;
                        self.state = LinkState::Forwarding(match body {
                            OriginBody::Incoming(body) => Some(Box::new(body)),
                            OriginBody::Bytes(bytes) => {
                                out.push(chunk::of(&bytes));
                                None
                            }
                        });
                    }
                    Err(error) => {
                        tracing::debug!(?error, "could not fetch the next link of a held stream");
                        self.failures += 1;
                        if self.failures > RETRIES {
                            return Poll::Ready(StreamAction::Close(Code::ProviderGone));
                        }
                        let jitter = Duration::from_millis(fastrand::u64(..1_000));
                        self.fetch_after(RETRY_BACKOFF * 2u32.pow(self.failures - 1) + jitter);
                    }
                },
            }
        }
    }
}

impl StreamHandler for ReliableStream {
    fn heartbeat(&self, _: &Node) -> Option<HeartbeatPolicy> {
        self.keep_alive.as_ref().map(|keep_alive| keep_alive.policy)
    }

    fn on_heartbeat(&mut self, stream: &mut StreamContext<'_>) {
        match (&self.state, &self.keep_alive) {
            // In the middle of the origin's body it would corrupt it.
            (LinkState::Forwarding(_), _) | (_, None) => {}
            (_, Some(keep_alive)) => stream.out.push(keep_alive.chunk.clone()),
        }
    }

    fn poll_direct(&mut self, cx: &mut Context<'_>, stream: &mut StreamContext<'_>) -> StreamAction {
        let action = match self.poll_link(cx, stream.out) {
            Poll::Ready(action) => action,
            Poll::Pending => StreamAction::Wait,
        };
        if let Some(change) = self.change.take() {
            self.change_subscriptions(change, stream.subscriptions);
        }
        action
    }

    fn on_events(&mut self, stream: &mut StreamContext<'_>, slot: u32, bytes: Bytes, _: u32) -> StreamAction {
        self.on_item(slot, &bytes, stream.out)
    }

    /// The origin has the missing events, if there is a link.
    fn on_gap(&mut self, _: &mut StreamContext<'_>, _: &Gap) -> StreamAction {
        if self.instructions.next.is_none() {
            return StreamAction::Close(Code::Slow);
        }
        self.on_missing_item();
        StreamAction::Wait
    }
}
