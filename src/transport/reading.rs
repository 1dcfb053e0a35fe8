//! Reading by request: a page of what there is, and waiting for what is not there yet (a *long-poll*).
//!
//! `GET /v1/events` and `weir.read` are this. Nothing is kept between two requests but, for a named consumer, its
//! cursors: the next `after` is the acknowledgement.

use std::{future::poll_fn, sync::Arc, time::Duration};

use serde::Deserialize;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::query::{Begin, Query};
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
/// How long a poll that finds nothing waits while this node drains: a fast answer would be asked again at once.
const DRAIN_PAUSE: Duration = Duration::from_secs(1);

/// What a reader asks for, checked.
#[derive(Debug)]
pub struct Reading {
    channels: Vec<Channel>,
    begin: Begin,
    filter: Option<Filter>,
    limit: ReadLimit,
    wait: Duration,
    /// Events to wait for.
    min: usize,
    consumer: Option<Consuming>,
}

/// A reader whose place weir keeps.
#[derive(Debug)]
struct Consuming {
    name: String,
    /// Where to begin if it has no cursor yet.
    start: Start,
    /// Commit what is handed out.
    auto: bool,
}

/// What a reader gets.
#[derive(Debug, Default)]
pub struct Answer {
    /// Events as JSON, with commas between.
    events: Vec<u8>,
    count: usize,
    next: Vec<Position>,
    more: bool,
    gaps: Vec<Gap>,
    /// By channel: whether anything of it is told.
    told: Vec<bool>,
    /// A gap comes next, behind what is told: it begins the next answer.
    cut: bool,
    new: bool,
    /// Whose page it is, if it will be the same again until it is committed.
    uncommitted: Option<String>,
}

/// The same, as written: every member optional, nothing checked.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
struct Asked<'a> {
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

// === impl Reading ===

impl Reading {
    /// From the parameters of `GET /v1/events`; `last_event_id` is the header.
    pub fn from_query(mut query: Query<'_>, last_event_id: Option<&str>, limits: &LimitsSection) -> Result<Self> {
        let channels = query.some_channels(limits.stream_channels, "limits.stream_channels")?;
        let begin = query.begin(last_event_id)?;
        let kinds = query.types()?;
        let asked = Asked {
            limit: query.number("limit")?,
            wait: query.take("wait")?.map(JsonStr),
            min: query.number("min")?,
            consumer: query.take("consumer")?.map(JsonStr),
            start: query.take("start")?.map(JsonStr),
            commit: query.take("commit")?.map(JsonStr),
            ..Asked::default()
        };
        query.finish()?;
        Self::check(channels, begin, &kinds, asked, limits)
    }

    /// From the params of `weir.read`: the same names, `channels` and `type` being lists.
    pub fn from_params(params: &str, limits: &LimitsSection) -> Result<Self> {
        let mut asked: Asked<'_> = crate::json::parse_json(params)?;
        let mut channels = Vec::new();
        for name in std::mem::take(&mut asked.channels) {
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
        let begin = match (asked.after.take(), asked.last) {
            (Some(_), Some(_)) => return Err(Error::params("after and last exclude each other")),
            (Some(after), None) => Begin::After(after.0.into_owned()),
            (None, Some(last)) => Begin::Last(last),
            (None, None) => Begin::Unsaid,
        };
        let kinds: Vec<_> = std::mem::take(&mut asked.kinds);
        let kinds: Vec<&str> = kinds.iter().map(|kind| &**kind).collect();
        Self::check(channels, begin, &kinds, asked, limits)
    }

    fn check<S: AsRef<str>>(
        channels: Vec<Channel>,
        begin: Begin,
        kinds: &[S],
        asked: Asked<'_>,
        limits: &LimitsSection,
    ) -> Result<Self> {
        let events = asked.limit.map_or(DEFAULT_LIMIT.min(limits.page_events), |limit| limit as usize);
        if events == 0 || events > limits.page_events {
            return Err(too_many("limit", "limits.page_events", limits.page_events));
        }
        let wait = match &asked.wait {
            Some(text) => duration::parse(text).map_err(|error| Error::params(format!("wait: {error}")))?,
            None => Duration::ZERO,
        };
        if wait > limits.wait {
            let most = duration::format(limits.wait);
            return Err(Error::params(format!("wait is at most {most} (limits.wait)")).with("limit", "limits.wait"));
        }
        let min = asked.min.unwrap_or(1) as usize;
        if min == 0 || min > events {
            return Err(Error::params(format!("min is 1 to limit, which is {events}")));
        }
        let consumer = match asked.consumer {
            Some(name) => Some(Consuming {
                name: name.0.into_owned(),
                start: match asked.start.as_deref() {
                    None | Some("earliest") => Start::Earliest,
                    Some("now") => Start::Now,
                    Some(_) => return Err(Error::params("start is earliest or now")),
                },
                auto: match asked.commit.as_deref() {
                    None | Some("manual") => false,
                    Some("auto") => true,
                    Some(_) => return Err(Error::params("commit is manual or auto")),
                },
            }),
            None if asked.start.is_some() || asked.commit.is_some() => {
                return Err(Error::params("start and commit are about a consumer: name it with consumer"));
            }
            None => None,
        };
        let filter = Filter::new(kinds)?;
        let limit = ReadLimit { events, bytes: limits.page_bytes };
        Ok(Reading { channels, begin, filter, limit, wait, min, consumer })
    }

    /// Asks whether `identity` may read this.
    pub fn permit(&self, identity: &Identity) -> Result<()> {
        for channel in &self.channels {
            let _ = identity.may_subscribe(channel)?;
        }
        if let Some(consumer) = &self.consumer {
            let _ = identity.may_consume(&consumer.name)?;
        }
        Ok(())
    }

    pub fn channels(&self) -> &[Channel] {
        &self.channels
    }

    /// Whether the reader is willing to wait.
    pub fn waits(&self) -> bool {
        !self.wait.is_zero()
    }

    /// Reads, and waits if there is nothing and the reader asked to. Dropping it gives everything back.
    ///
    /// While `draining`, nobody is kept: who waits gets what there is, an empty page if nothing.
    pub async fn answer(&self, bus: &Bus, draining: &CancellationToken) -> Result<Answer> {
        let (starts, new) = self.starts(bus).await?;
        let uncommitted =
            self.consumer.as_ref().filter(|consumer| !consumer.auto).map(|consumer| consumer.name.clone());
        let mut answer =
            Answer { next: Vec::new(), told: vec![false; self.channels.len()], new, uncommitted, ..Answer::default() };
        self.begin(bus, starts, &mut answer).await?;
        if self.waits() && !self.is_enough(&answer) {
            self.wait(bus, draining, &mut answer).await?;
        }
        if let Some(Consuming { name, auto: true, .. }) = &self.consumer {
            for (channel, next) in self.channels.iter().zip(&answer.next) {
                bus.commit(name, channel, *next).await?;
            }
        }
        Ok(answer)
    }

    /// Where to read from, and whether the consumer is new.
    async fn starts(&self, bus: &Bus) -> Result<(Vec<Start>, bool)> {
        let Some(consumer) = &self.consumer else {
            return Ok((self.begin.starts(&self.channels, Start::Earliest)?, false));
        };
        match &self.begin {
            Begin::Unsaid => {}
            Begin::After(after) => commit(bus, &consumer.name, &self.channels, after).await?,
            Begin::Last(_) => {
                return Err(Error::params("a consumer reads on from its cursor: there is start=now, and seek"));
            }
        }
        let mut starts = Vec::with_capacity(self.channels.len());
        let mut new = true;
        for channel in &self.channels {
            let cursor = match bus.cursor(&consumer.name, channel).await? {
                Some(cursor) => {
                    new = false;
                    cursor
                }
                // Kept from the first poll on, or what is published between two polls from `now` would be lost.
                None => {
                    let at = bus.locate(channel, consumer.start).await?.0;
                    bus.seek(&consumer.name, channel, at).await?;
                    at
                }
            };
            starts.push(Start::After(cursor));
        }
        Ok((starts, new))
    }

    /// The first look. After it, `answer.next` knows a position of every channel.
    async fn begin(&self, bus: &Bus, starts: Vec<Start>, answer: &mut Answer) -> Result<()> {
        if let ([channel], [start]) = (&*self.channels, &*starts) {
            let page = bus.read(channel, *start, self.limit, self.filter.as_ref()).await?;
            answer.next.push(page.next);
            answer.more = page.more;
            answer.take(0, channel, page);
            return Ok(());
        }
        // Of several, the page may be full before all were looked at: then the token needs a position nevertheless.
        for (channel, start) in self.channels.iter().zip(starts) {
            let at = match start {
                Start::After(position) => position,
                start => {
                    let (at, gap) = bus.locate(channel, start).await?;
                    answer.told[answer.next.len()] = gap.is_some();
                    answer.gaps.extend(gap);
                    at
                }
            };
            answer.next.push(at);
        }
        self.more(bus, answer).await
    }

    /// Reads on in every channel, in turns of equal shares so that a busy one does not fill the page alone.
    async fn more(&self, bus: &Bus, answer: &mut Answer) -> Result<()> {
        if let [channel] = &*self.channels {
            let limit = self.left(answer, self.limit.events);
            let page = bus.read(channel, Start::After(answer.next[0]), limit, self.filter.as_ref()).await?;
            answer.more = page.more;
            answer.take(0, channel, page);
            return Ok(());
        }
        let mut open: Vec<usize> = (0..self.channels.len()).collect();
        while !open.is_empty() && !self.is_full(answer) {
            let share = ((self.limit.events - answer.count) / open.len()).max(1);
            let mut unread = Vec::new();
            for (turn, at) in open.iter().enumerate() {
                if self.is_full(answer) {
                    unread.extend_from_slice(&open[turn..]);
                    break;
                }
                let limit = self.left(answer, share);
                let start = Start::After(answer.next[*at]);
                let page = bus.read(&self.channels[*at], start, limit, self.filter.as_ref()).await?;
                let more = page.more;
                if answer.take(*at, &self.channels[*at], page) && more {
                    unread.push(*at);
                }
            }
            open = unread;
        }
        // What was not looked at may have more: who asks again finds out.
        answer.more = !open.is_empty() || answer.cut;
        Ok(())
    }

    /// Waits for enough, and reads it.
    async fn wait(&self, bus: &Bus, draining: &CancellationToken, answer: &mut Answer) -> Result<()> {
        let mut deadline = Instant::now() + self.wait;
        // What is published from here on wakes us; what came since the first look is found at the first poll.
        let mut subscriptions = Subscriptions::new(Format::NONE);
        let mut slots = Vec::with_capacity(self.channels.len());
        for (watch, next) in bus.watch(&self.channels).await?.into_iter().zip(&answer.next) {
            slots.push(subscriptions.add(watch, Start::After(*next), None).slot);
        }
        // Asked once: a drain that began between two questions would be seen by neither.
        let drained = draining.is_cancelled();
        if drained {
            deadline = deadline.min(Instant::now() + DRAIN_PAUSE);
        }
        let mut alarm = std::pin::pin!(tokio::time::sleep_until(deadline));
        let mut leaving = std::pin::pin!(draining.cancelled());
        while !self.is_enough(answer) {
            tokio::select! {
                biased;
                () = poll_fn(|cx| subscriptions.poll_changed(cx)) => {}
                () = &mut leaving, if !drained => break,
                () = &mut alarm => break,
            }
            self.more(bus, answer).await?;
            for (slot, next) in slots.iter().zip(&answer.next) {
                subscriptions.seek(*slot, Start::After(*next));
            }
        }
        Ok(())
    }

    /// What still fits, of `share` events.
    fn left(&self, answer: &Answer, share: usize) -> ReadLimit {
        ReadLimit {
            events: share.min(self.limit.events.saturating_sub(answer.count)),
            bytes: self.limit.bytes.saturating_sub(answer.events.len()),
        }
    }

    fn is_full(&self, answer: &Answer) -> bool {
        answer.count >= self.limit.events || answer.events.len() >= self.limit.bytes
    }

    /// A gap is told at once: who waits for news of a channel wants to know that some are lost.
    fn is_enough(&self, answer: &Answer) -> bool {
        answer.count >= self.min || self.is_full(answer) || !answer.gaps.is_empty() || answer.cut
    }

    /// Appends the page: `{"events":[…],"next":"…","more":false,"gaps":[]}`.
    pub fn write_json(&self, answer: &Answer, out: &mut Vec<u8>) {
        out.reserve(answer.events.len() + 128);
        out.extend_from_slice(br#"{"events":["#);
        out.extend_from_slice(&answer.events);
        out.extend_from_slice(br#"],"next":""#);
        // Either has only characters that JSON leaves alone.
        match *answer.next {
            [position] => position.write(out),
            _ => out.extend_from_slice(ResumeToken::encode(&self.channels, &answer.next).as_bytes()),
        }
        out.extend_from_slice(br#"","more":"#);
        out.extend_from_slice(if answer.more { b"true" } else { b"false" });
        out.extend_from_slice(br#","gaps":"#);
        match *answer.gaps {
            [] => out.extend_from_slice(b"[]"),
            // Writing into a Vec cannot fail.
            _ => drop(serde_json::to_writer(&mut *out, &answer.gaps)),
        }
        if let Some(consumer) = &self.consumer {
            out.extend_from_slice(br#","consumer":{"name":"#);
            write_json_str(&consumer.name, out);
            out.extend_from_slice(if answer.new { br#","new":true}"# } else { b"}" });
        }
        out.push(b'}');
    }
}

// === impl Answer ===

impl Answer {
    /// Adds what is handed out, `bytes` as written, to the metrics.
    pub(crate) fn count(&self, metrics: &Metrics, transport: Transport, bytes: usize) {
        metrics.delivered[transport].add(self.count as u64);
        metrics.delivered_bytes[transport].add(bytes as u64);
        self.gaps.iter().for_each(|gap| metrics.gap(gap.reason.as_str()));
        if let Some(consumer) = self.uncommitted.as_ref().filter(|_| self.count > 0) {
            metrics.consumer_page_read((consumer, &self.next));
        }
    }

    /// Adds what was read of a channel. A gap comes before all of it: one that would stand behind something of the same
    /// channel is left for the next answer, and so is what follows it. Then false.
    fn take(&mut self, at: usize, channel: &Channel, page: LogPage) -> bool {
        if page.gap.is_some() && self.told[at] {
            (self.cut, self.more) = (true, true);
            return false;
        }
        self.told[at] |= page.gap.is_some() || !page.events.is_empty();
        self.next[at] = page.next;
        self.gaps.extend(page.gap);
        self.push(channel, &page.events);
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

/// Moves the cursors of `consumer` forward to `after`, a token of these channels or the position of the only one.
pub async fn commit(bus: &Bus, consumer: &str, channels: &[Channel], after: &str) -> Result<()> {
    let unreadable = |error| Error::new(Code::InvalidPosition, format!("after is {error}"));
    let after: AfterParam = after.parse().map_err(unreadable)?;
    if !matches!(after, AfterParam::Position(_) | AfterParam::Token(_)) {
        return Err(Error::params("a consumer commits a position or a token; seek is the way to anywhere else"));
    }
    let starts = after.starts(channels)?;
    let mut positions = Vec::with_capacity(channels.len());
    for (channel, start) in channels.iter().zip(starts) {
        let Start::After(position) = start else { continue };
        check_ahead(bus, channel, position).await?;
        positions.push((channel, position));
    }
    for (channel, position) in positions {
        bus.commit(consumer, channel, position).await?;
    }
    Ok(())
}

/// As [`commit`] of a consumer that exists. A token does not hold names: it is of `channels`, or else of all that the
/// consumer reads.
pub async fn commit_named(bus: &Bus, consumer: &str, channels: Option<Vec<Channel>>, after: &str) -> Result<()> {
    let Some(known) = bus.consumer(consumer).await? else {
        return Err(Error::new(Code::NotFound, format!("there is no consumer {consumer}")));
    };
    let channels = channels.unwrap_or_else(|| known.cursors.into_iter().map(|(channel, _)| channel).collect());
    commit(bus, consumer, &channels, after).await
}

/// Refuses a position that the channel has not reached: a cursor there could never come back by committing.
pub async fn check_ahead(bus: &Bus, channel: &Channel, position: Position) -> Result<()> {
    let info = bus.inspect(channel).await?;
    if position.epoch == info.epoch && position.offset > info.top && !info.epoch.is_absent() {
        return Err(Error::new(Code::InvalidPosition, format!("{position} lies ahead of channel {channel}")));
    }
    Ok(())
}

fn too_many(what: &str, limit: &'static str, most: usize) -> Error {
    Error::params(format!("{what}: 1 to {most} ({limit})")).with("limit", limit)
}
