//! Reads pages of events, and waiting for new ones (a *long-poll*): `GET /v1/events` and `weir.read`.
//!
//! Nothing is kept between two requests except the cursors of named consumers. The next `after` acknowledges the page.

use std::{future::poll_fn, sync::Arc, time::Duration};

use serde::Deserialize;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::query::{Query, StartParam};
use crate::{
    auth::Identity,
    bus::{Bus, Filter, Format, Gap, LogPage, ReadLimit, Subscriptions},
    channel::Channel,
    config::LimitsSection,
    duration,
    error::{Code, Error, Result},
    json::{JsonStr, write_json_str},
    metrics::{Metrics, Transport},
    position::{Position, Start},
    token::{AfterParam, ResumeToken},
};

const DEFAULT_LIMIT: usize = 100;
/// How long a poll that finds nothing waits while this node drains: an immediate response would be requested again at
/// once.
const DRAIN_PAUSE: Duration = Duration::from_secs(1);

/// Waits for events of subscriptions, until a deadline or until this node drains.
pub(crate) struct EventWait<'a> {
    deadline: Instant,
    draining: &'a CancellationToken,
    /// This node was draining already when the wait began.
    is_drained: bool,
}

/// A validated request for a page of events.
#[derive(Debug)]
pub(crate) struct PageRequest {
    channels: Vec<Channel>,
    start: StartParam,
    filter: Option<Filter>,
    limit: ReadLimit,
    wait: Duration,
    /// Events to wait for.
    min: usize,
    consumer: Option<ConsumerRead>,
}

/// A consumer, whose cursors weir keeps.
#[derive(Debug)]
struct ConsumerRead {
    name: String,
    /// The start if it has no cursor yet.
    start: Start,
    /// Commit the positions of the page that is returned.
    auto: bool,
}

/// Where a request begins to read.
#[derive(Debug)]
struct ConsumerStarts {
    /// By channel.
    starts: Vec<Start>,
    /// The consumer had no cursor.
    new: bool,
    /// A cursor could not be stored.
    unstored: bool,
}

/// A page of events, of one or more channels.
#[derive(Debug, Default)]
pub(crate) struct ReadPage {
    /// Events as JSON, with commas between.
    events: Vec<u8>,
    count: usize,
    next: Vec<Position>,
    more: bool,
    gaps: Vec<Gap>,
    /// By channel: whether the page has anything of it.
    included: Vec<bool>,
    /// A gap follows, behind events of its channel: it begins the next page.
    cut: bool,
    new: bool,
    /// The bus rejects writes for now: positions of the consumer could not be stored.
    unstored: bool,
    /// The consumer that will get the same page again until it commits.
    uncommitted: Option<String>,
}

/// The params of `weir.read`, as sent and not validated.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
struct ReadParams<'a> {
    #[serde(borrow, default)]
    channels: Vec<JsonStr<'a>>,
    #[serde(borrow)]
    after: Option<JsonStr<'a>>,
    last: Option<u64>,
    #[serde(borrow, default, rename = "type")]
    kinds: Vec<JsonStr<'a>>,
    limit: Option<u64>,
    #[serde(borrow)]
    wait: Option<JsonStr<'a>>,
    min: Option<u64>,
    #[serde(borrow)]
    consumer: Option<JsonStr<'a>>,
    #[serde(borrow)]
    start: Option<JsonStr<'a>>,
    #[serde(borrow)]
    commit: Option<JsonStr<'a>>,
}

// === impl EventWait ===

impl<'a> EventWait<'a> {
    pub(crate) fn new(deadline: Instant, draining: &'a CancellationToken) -> Self {
        // Evaluated once: a drain that begins between two checks would be missed by both.
        let is_drained = draining.is_cancelled();
        let deadline = if is_drained { deadline.min(Instant::now() + DRAIN_PAUSE) } else { deadline };
        EventWait { deadline, draining, is_drained }
    }

    /// False: the wait is over.
    pub(crate) async fn changed(&self, subscriptions: &mut Subscriptions) -> bool {
        tokio::select! {
            biased;
            () = poll_fn(|cx| subscriptions.poll_changed(cx)) => true,
            () = self.draining.cancelled(), if !self.is_drained => false,
            () = tokio::time::sleep_until(self.deadline) => false,
        }
    }
}

// === impl PageRequest ===

impl PageRequest {
    /// From the parameters of `GET /v1/events`; `last_event_id` is the header.
    pub(crate) fn from_query(
        mut query: Query<'_>,
        last_event_id: Option<&str>,
        limits: &LimitsSection,
    ) -> Result<Self> {
        let channels = query.some_channels(limits.stream_channels, "limits.stream_channels")?;
        let start = query.start(last_event_id)?;
        let kinds = query.types()?;
        let params = ReadParams {
            limit: query.number("limit")?,
            wait: query.take_nonempty("wait")?.map(JsonStr),
            min: query.number("min")?,
            consumer: query.take("consumer")?.map(JsonStr),
            start: query.take_nonempty("start")?.map(JsonStr),
            commit: query.take_nonempty("commit")?.map(JsonStr),
            ..ReadParams::default()
        };
        query.finish()?;
        Self::check(channels, start, &kinds, params, limits)
    }

    /// From the params of `weir.read`: the same names, `channels` and `type` being lists.
    pub(crate) fn from_params(json: &str, limits: &LimitsSection) -> Result<Self> {
        let mut params: ReadParams<'_> = crate::json::parse_json(json)?;
        let mut channels = Vec::new();
        for name in std::mem::take(&mut params.channels) {
            let channel = Channel::parse(&name)?;
            if !channels.contains(&channel) {
                channels.push(channel);
            }
            if channels.len() > limits.stream_channels {
                return Err(too_many("channels", "limits.stream_channels", limits.stream_channels));
            }
        }
        if channels.is_empty() {
            return Err(Error::params("channels is missing: a list of names"));
        }
        let start = match (params.after.take().filter(|after| !after.is_empty()), params.last) {
            (Some(_), Some(_)) => return Err(Error::params("after and last exclude each other")),
            (Some(after), None) => StartParam::After(after.0.into_owned()),
            (None, Some(last)) => StartParam::Last(last),
            (None, None) => StartParam::Default,
        };
        let kinds: Vec<_> = std::mem::take(&mut params.kinds);
        let kinds: Vec<&str> = kinds.iter().map(|kind| &**kind).collect();
        Self::check(channels, start, &kinds, params, limits)
    }

    fn check<S: AsRef<str>>(
        channels: Vec<Channel>,
        start: StartParam,
        kinds: &[S],
        params: ReadParams<'_>,
        limits: &LimitsSection,
    ) -> Result<Self> {
        let events = params.limit.map_or(DEFAULT_LIMIT.min(limits.page_events), |limit| limit as usize);
        if events == 0 || events > limits.page_events {
            return Err(too_many("limit", "limits.page_events", limits.page_events));
        }
        let wait = match &params.wait {
            Some(text) => duration::parse(text).map_err(|error| Error::params(format!("wait: {error}")))?,
            None => Duration::ZERO,
        };
        if wait > limits.wait {
            let most = duration::format(limits.wait);
            return Err(Error::params(format!("wait is at most {most} (limits.wait)")).with("limit", "limits.wait"));
        }
        let min = params.min.unwrap_or(1) as usize;
        if min == 0 || min > events {
            return Err(Error::params(format!("min is 1 to limit, which is {events}")));
        }
        let consumer = match params.consumer {
            Some(name) => Some(ConsumerRead {
                name: name.0.into_owned(),
                start: match params.start.as_deref() {
                    None | Some("earliest") => Start::Earliest,
                    Some("now") => Start::Now,
                    Some(_) => return Err(Error::params("start is earliest or now")),
                },
                auto: match params.commit.as_deref() {
                    None | Some("manual") => false,
                    Some("auto") => true,
                    Some(_) => return Err(Error::params("commit is manual or auto")),
                },
            }),
            None if params.start.is_some() || params.commit.is_some() => {
                return Err(Error::params("start and commit are about a consumer: name it with consumer"));
            }
            None => None,
        };
        let filter = Filter::new(kinds)?;
        let limit = ReadLimit { events, bytes: limits.page_bytes };
        Ok(PageRequest { channels, start, filter, limit, wait, min, consumer })
    }

    /// Checks that `identity` may read these channels, as this consumer.
    pub(crate) fn permit(&self, identity: &Identity) -> Result<()> {
        for channel in &self.channels {
            let _ = identity.may_subscribe(channel)?;
        }
        if let Some(consumer) = &self.consumer {
            let _ = identity.may_consume(&consumer.name)?;
        }
        Ok(())
    }

    pub(crate) fn channels(&self) -> &[Channel] {
        &self.channels
    }

    /// Whether the request waits if there are no events.
    pub(crate) fn waits(&self) -> bool {
        !self.wait.is_zero()
    }

    /// Reads a page, and waits for events if there are none and the request asks for it. Cancel-safe.
    ///
    /// When `draining` is cancelled, a waiting request returns what there is, possibly an empty page.
    pub(crate) async fn read(&self, bus: &Bus, draining: &CancellationToken) -> Result<ReadPage> {
        let ConsumerStarts { starts, new, unstored } = self.starts(bus).await?;
        let uncommitted =
            self.consumer.as_ref().filter(|consumer| !consumer.auto).map(|consumer| consumer.name.clone());
        let mut page = ReadPage {
            next: Vec::new(),
            included: vec![false; self.channels.len()],
            new,
            unstored,
            uncommitted,
            ..ReadPage::default()
        };
        self.read_first(bus, starts, &mut page).await?;
        if self.waits() && !self.is_enough(&page) {
            self.wait(bus, draining, &mut page).await?;
        }
        if let Some(ConsumerRead { name, auto: true, .. }) = &self.consumer {
            for (channel, next) in self.channels.iter().zip(&page.next) {
                page.unstored |= !is_stored(bus.commit(name, channel, *next).await)?;
            }
        }
        Ok(page)
    }

    /// Resolves the start of each channel. While the bus rejects writes, a consumer reads on from the position that it
    /// could not commit.
    async fn starts(&self, bus: &Bus) -> Result<ConsumerStarts> {
        let Some(consumer) = &self.consumer else {
            let starts = self.start.starts(&self.channels, Start::Earliest)?;
            return Ok(ConsumerStarts { starts, new: false, unstored: false });
        };
        let commits = match &self.start {
            StartParam::Default => Vec::new(),
            StartParam::After(after) => commit_positions(bus, &self.channels, after, |_| true).await?,
            StartParam::Last(_) => {
                return Err(Error::params("a consumer reads on from its cursor: there is start=now, and seek"));
            }
        };
        let mut unstored = Vec::new();
        for (channel, position) in commits {
            if !is_stored(bus.commit(&consumer.name, channel, position).await)? {
                unstored.push((channel, position));
            }
        }
        let starts = Vec::with_capacity(self.channels.len());
        let mut all = ConsumerStarts { starts, new: true, unstored: !unstored.is_empty() };
        for channel in &self.channels {
            let cursor = bus.cursor(&consumer.name, channel).await?;
            all.new &= cursor.is_none();
            let uncommitted = unstored.iter().find(|(of, _)| *of == channel).map(|(_, position)| *position);
            let start = match uncommitted.or(cursor) {
                Some(position) => position,
                // Stored at the first poll: otherwise events that are published between two polls from `now` would be
                // lost.
                None => {
                    let at = bus.locate(channel, consumer.start).await?.0;
                    all.unstored |= !is_stored(bus.seek(&consumer.name, channel, at).await)?;
                    at
                }
            };
            all.starts.push(Start::After(start));
        }
        Ok(all)
    }

    /// The first read. After it, `page.next` has a position of every channel.
    async fn read_first(&self, bus: &Bus, starts: Vec<Start>, page: &mut ReadPage) -> Result<()> {
        if let ([channel], [start]) = (&*self.channels, &*starts) {
            let log_page = bus.read(channel, *start, self.limit, self.filter.as_ref()).await?;
            page.next.push(log_page.next);
            page.more = log_page.more;
            page.add(0, channel, log_page);
            return Ok(());
        }
        // The page may be full before all channels are read, but the token needs a position of each.
        for (channel, start) in self.channels.iter().zip(starts) {
            let at = match start {
                Start::After(position) => position,
                start => {
                    let (at, gap) = bus.locate(channel, start).await?;
                    page.included[page.next.len()] = gap.is_some();
                    page.gaps.extend(gap);
                    at
                }
            };
            page.next.push(at);
        }
        self.read_more(bus, page).await
    }

    /// Reads on in every channel, in equal shares, so that a busy channel does not fill the page alone.
    async fn read_more(&self, bus: &Bus, page: &mut ReadPage) -> Result<()> {
        if let [channel] = &*self.channels {
            let limit = self.left(page, self.limit.events);
            let log_page = bus.read(channel, Start::After(page.next[0]), limit, self.filter.as_ref()).await?;
            page.more = log_page.more;
            page.add(0, channel, log_page);
            return Ok(());
        }
        let mut open: Vec<usize> = (0..self.channels.len()).collect();
        while !open.is_empty() && !self.is_full(page) {
            let share = ((self.limit.events - page.count) / open.len()).max(1);
            let mut unread = Vec::new();
            for (turn, at) in open.iter().enumerate() {
                if self.is_full(page) {
                    unread.extend_from_slice(&open[turn..]);
                    break;
                }
                let limit = self.left(page, share);
                let start = Start::After(page.next[*at]);
                let log_page = bus.read(&self.channels[*at], start, limit, self.filter.as_ref()).await?;
                let more = log_page.more;
                if page.add(*at, &self.channels[*at], log_page) && more {
                    unread.push(*at);
                }
            }
            open = unread;
        }
        // Channels that were not read may have more: the next request will tell.
        page.more = !open.is_empty() || page.cut;
        Ok(())
    }

    /// Waits for enough, and reads it.
    async fn wait(&self, bus: &Bus, draining: &CancellationToken, page: &mut ReadPage) -> Result<()> {
        let deadline = Instant::now() + self.wait;
        // Events that are published from here on wake us; those since the first read are found at the first poll.
        let mut subscriptions = Subscriptions::new(Format::NONE);
        let mut slots = Vec::with_capacity(self.channels.len());
        for (watch, next) in bus.watch(&self.channels).await?.into_iter().zip(&page.next) {
            slots.push(subscriptions.add(watch, Start::After(*next), None).slot);
        }
        let wait = EventWait::new(deadline, draining);
        while !self.is_enough(page) && wait.changed(&mut subscriptions).await {
            self.read_more(bus, page).await?;
            for (slot, next) in slots.iter().zip(&page.next) {
                subscriptions.seek(*slot, Start::After(*next));
            }
        }
        Ok(())
    }

    /// The limit of the next read: `share` events, or what still fits.
    fn left(&self, page: &ReadPage, share: usize) -> ReadLimit {
        ReadLimit {
            events: share.min(self.limit.events.saturating_sub(page.count)),
            bytes: self.limit.bytes.saturating_sub(page.events.len()),
        }
    }

    fn is_full(&self, page: &ReadPage) -> bool {
        page.count >= self.limit.events || page.events.len() >= self.limit.bytes
    }

    /// A gap is reported at once: the client should know that events are lost.
    fn is_enough(&self, page: &ReadPage) -> bool {
        page.count >= self.min || self.is_full(page) || !page.gaps.is_empty() || page.cut
    }

    /// Appends the page: `{"events":[…],"next":"…","more":false,"gaps":[]}`.
    pub(crate) fn write_json(&self, page: &ReadPage, out: &mut Vec<u8>) {
        out.reserve(page.events.len() + 128);
        out.extend_from_slice(br#"{"events":["#);
        out.extend_from_slice(&page.events);
        out.extend_from_slice(br#"],"next":""#);
        // Neither has characters that JSON escapes.
        match *page.next {
            [position] => position.write(out),
            _ => out.extend_from_slice(ResumeToken::encode(&self.channels, &page.next).as_bytes()),
        }
        out.extend_from_slice(br#"","more":"#);
        out.extend_from_slice(if page.more { b"true" } else { b"false" });
        out.extend_from_slice(br#","gaps":"#);
        match *page.gaps {
            [] => out.extend_from_slice(b"[]"),
            // Writing into a Vec cannot fail.
            _ => drop(serde_json::to_writer(&mut *out, &page.gaps)),
        }
        if let Some(consumer) = &self.consumer {
            out.extend_from_slice(br#","consumer":{"name":"#);
            write_json_str(&consumer.name, out);
            if page.new {
                out.extend_from_slice(br#","new":true"#);
            }
            if page.unstored {
                out.extend_from_slice(br#","committed":false"#);
            }
            out.push(b'}');
        }
        out.push(b'}');
    }
}

// === impl ReadPage ===

impl ReadPage {
    /// Adds the page, of `bytes` as written, to the metrics.
    pub(crate) fn count(&self, metrics: &Metrics, transport: Transport, bytes: usize) {
        metrics.events_delivered(transport, self.count as u64, bytes as u64);
        self.gaps.iter().for_each(|gap| metrics.gap(gap.reason.as_str()));
        if let Some(consumer) = self.uncommitted.as_ref().filter(|_| self.count > 0) {
            metrics.consumer_page_read((consumer, &self.next));
        }
    }

    /// Adds what was read of a channel. A gap precedes all events of its channel in a page: if there are some already,
    /// the gap and what follows it are left for the next page. Then the result is false.
    fn add(&mut self, at: usize, channel: &Channel, read: LogPage) -> bool {
        if read.gap.is_some() && self.included[at] {
            (self.cut, self.more) = (true, true);
            return false;
        }
        self.included[at] |= read.gap.is_some() || !read.events.is_empty();
        self.next[at] = read.next;
        self.gaps.extend(read.gap);
        self.push(channel, &read.events);
        true
    }

    fn push(&mut self, channel: &Channel, events: &[Arc<crate::event::Event>]) {
        for event in events {
            if self.count > 0 {
                self.events.push(b',');
            }
            event.write_json(channel, &mut self.events);
            self.count += 1;
        }
    }
}

/// Whether a position was stored. False: the bus rejects writes for now, and can be read.
fn is_stored(result: Result<()>) -> Result<bool> {
    match result {
        Ok(()) => Ok(true),
        Err(error) if error.is_read_only() => {
            tracing::debug!(%error, "cannot store a position of a consumer yet");
            Ok(false)
        }
        Err(error) => Err(error),
    }
}

/// The positions of `channels` in `after`, all of which the channels have reached.
async fn commit_positions<'a>(
    bus: &Bus,
    channels: &'a [Channel],
    after: &str,
    includes: impl Fn(&Channel) -> bool,
) -> Result<Vec<(&'a Channel, Position)>> {
    let unreadable = |error| Error::new(Code::InvalidPosition, format!("after is {error}"));
    let after: AfterParam = after.parse().map_err(unreadable)?;
    if !matches!(after, AfterParam::Position(_) | AfterParam::Token(_)) {
        return Err(Error::params("a consumer commits a position or a token; seek is the way to anywhere else"));
    }
    let starts = after.starts(channels)?;
    let mut positions = Vec::with_capacity(channels.len());
    for (channel, start) in channels.iter().zip(starts) {
        let Start::After(position) = start else { continue };
        // Nothing is said about channels that the client may not read, and their cursors stay where they are.
        if !includes(channel) {
            continue;
        }
        check_ahead(bus, channel, position).await?;
        positions.push((channel, position));
    }
    Ok(positions)
}

/// Advances the cursors of a consumer that exists to `after`: a token, or the position of the only channel. A token does not
/// contain names: it is of `channels`, or else of all channels that the consumer reads.
pub(crate) async fn commit_named(
    bus: &Bus,
    identity: &Identity,
    consumer: &str,
    channels: Option<Vec<Channel>>,
    after: &str,
) -> Result<()> {
    for channel in channels.iter().flatten() {
        let _ = identity.may_subscribe(channel)?;
    }
    let Some(known) = bus.consumer(consumer).await? else {
        return Err(Error::new(Code::NotFound, format!("there is no consumer {consumer}")));
    };
    let channels = channels.unwrap_or_else(|| known.cursors.into_iter().map(|(channel, _)| channel).collect());
    // Cursors of channels that the client may not read stay where they are.
    let readable = |channel: &Channel| identity.may_subscribe(channel).is_ok();
    for (channel, position) in commit_positions(bus, &channels, after, readable).await? {
        bus.commit(consumer, channel, position).await?;
    }
    Ok(())
}

/// Rejects a position that the channel has not reached: a cursor there could not be moved back by a commit.
pub(crate) async fn check_ahead(bus: &Bus, channel: &Channel, position: Position) -> Result<()> {
    let info = bus.inspect(channel).await?;
    if position.epoch == info.epoch && position.offset > info.top && !info.epoch.is_absent() {
        return Err(Error::new(Code::InvalidPosition, format!("{position} lies ahead of channel {channel}")));
    }
    Ok(())
}

fn too_many(what: &str, limit: &'static str, most: usize) -> Error {
    Error::params(format!("{what}: 1 to {most} ({limit})")).with("limit", limit)
}
