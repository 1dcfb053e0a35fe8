//! What a [`Session`] asks the bus. It is done one after the other, so that publishes are placed in the order in which they
//! came; reads that wait are set aside when their turn comes, and hold up nobody.

use std::{
    collections::VecDeque,
    future::ready,
    pin::Pin,
    task::{Context, Poll},
};

use futures_util::{
    future::BoxFuture,
    stream::{FuturesUnordered, Stream},
};
use serde_json::value::RawValue;

use super::{
    Ready, Ws,
    dispatch::{NULL, Outcome, Session},
    jsonrpc,
    outbox::refuse,
    params::{self, Publish},
    reader::Reader,
};
use crate::{
    bus::{Placed, PublishFailed},
    error::{Code, Error, Result},
    event::{Channel, Draft},
    metrics::Transport,
    rpc::{Provided, Tag},
    transport::{longpoll, present},
};

/// Jobs that are finished before others have their turn: a bus in memory makes none of them wait.
const TURN: usize = 64;

/// What waits for the bus.
#[derive(Default)]
pub(super) struct Work {
    /// One at a time, in order.
    queue: VecDeque<Job>,
    /// All at once: reads that wait for events.
    waits: Option<FuturesUnordered<BoxFuture<'static, Finished>>>,
    /// Encoded bytes of the events in the queue.
    bytes: usize,
}

struct Job {
    work: BoxFuture<'static, Finished>,
    bytes: usize,
    /// Becomes one of those that wait when its turn comes: what was published before is seen by it.
    waits: bool,
}

/// What a job came to, and whom to tell.
struct Finished {
    to: Option<Tag>,
    done: Result<Done>,
}

/// What a job did.
pub(super) enum Done {
    /// JSON.
    Result(Vec<u8>),
    Subscribe(Vec<Ready>),
    Unsubscribe(Vec<Channel>),
    Provide {
        service: String,
        bare: bool,
        provided: Provided,
    },
}

impl Session {
    pub(super) fn publish(&mut self, params: Option<&RawValue>) -> Result<Outcome> {
        let limits = &self.ws.config.limits;
        let (ws, identity) = (self.ws.clone(), self.identity.clone());
        match Publish::read(params)? {
            Publish::One(event) => {
                let (channel, draft) = event.draft(limits.event)?;
                let _ = identity.may_publish(&channel)?;
                let size = draft.size();
                let work = async move {
                    let placed = ws.bus.publish_one(identity.subject(), &channel, draft).await;
                    let placed = placed.inspect_err(|error| ws.metrics.publish_failed(error.code()))?;
                    ws.count(&placed, size);
                    let mut out = Vec::new();
                    placed.write_json(&channel, &mut out);
                    Ok(Done::Result(out))
                };
                Ok(Outcome::Later { work: Box::pin(work), bytes: size, waits: false })
            }
            Publish::Many(events) => {
                if events.is_empty() {
                    return Err(Error::params("events is empty"));
                }
                if events.len() > limits.publish_events {
                    let most = limits.publish_events;
                    return Err(Error::new(Code::TooLarge, format!("more than {most} events (limits.publish_events)"))
                        .with("limit", "limits.publish_events"));
                }
                // All are checked before any is placed.
                let mut drafts = Vec::with_capacity(events.len());
                for event in &events {
                    let (channel, draft) = event.draft(limits.event)?;
                    let _ = identity.may_publish(&channel)?;
                    drafts.push((channel, draft));
                }
                let bytes = drafts.iter().map(|(_, draft)| draft.size()).sum();
                let work = async move { publish_many(&ws, identity.subject(), drafts).await };
                Ok(Outcome::Later { work: Box::pin(work), bytes, waits: false })
            }
        }
    }

    pub(super) fn subscribe(&mut self, params: Option<&RawValue>) -> Result<Outcome> {
        let asked: params::Subscribe<'_> = params::read(params)?;
        let most = self.ws.config.limits.present_info;
        let client = asked.present.as_ref().map(|present| present.client(most)).transpose()?;
        let wanted = asked.wanted()?;
        let mut refused: Option<Error> = None;
        let mut names = Vec::new();
        for wanted in &wanted {
            if let Err(error) = self.identity.may_subscribe(&wanted.channel) {
                names.push(wanted.channel.as_str().to_owned());
                refused.get_or_insert(error);
            }
        }
        if let Some(error) = refused {
            return Err(error.with("channels", names));
        }
        // What is too much in any case puts no channel into use. The rest is counted when its turn comes: requests before
        // this one may still wait for theirs.
        self.has_room(wanted.len(), 0)?;
        let (ws, identity) = (self.ws.clone(), self.identity.clone());
        let work = async move {
            let channels: Vec<Channel> = wanted.iter().map(|wanted| wanted.channel.clone()).collect();
            let watches = ws.bus.watch(&channels).await?;
            let ready = wanted.into_iter().zip(watches).map(|(wanted, watch)| {
                let lease = ws.enter(&identity, &wanted.channel, client.as_ref())?;
                Ok((wanted, watch, lease))
            });
            Ok(Done::Subscribe(ready.collect::<Result<_>>()?))
        };
        Ok(Outcome::Later { work: Box::pin(work), bytes: 0, waits: false })
    }

    pub(super) fn presence(&mut self, params: Option<&RawValue>) -> Result<Outcome> {
        let asking = present::Asking::from_params(params::object(params)?, &self.ws.config.limits)?;
        asking.permit(&self.identity)?;
        let presence = self.ws.presence.clone();
        let work = async move { Ok(Done::Result(asking.answer(&presence).await?)) };
        Ok(Outcome::Later { work: Box::pin(work), bytes: 0, waits: false })
    }

    /// Whether `new` channels may be subscribed to beside `have`.
    fn has_room(&self, new: usize, have: usize) -> Result<()> {
        let most = self.ws.config.limits.subscriptions;
        if have + new <= most {
            return Ok(());
        }
        let detail = format!("{have} channels and {new} more, limits.subscriptions is {most}");
        Err(Error::new(Code::LimitReached, detail).with("limit", "limits.subscriptions"))
    }

    /// Subscribes by the URL, before anything is read.
    pub fn read_at_once(&mut self, begun: Vec<Ready>) {
        self.begin(None, begun);
    }

    fn begin(&mut self, to: Option<&Tag>, list: Vec<Ready>) {
        let batch = to.map_or(0, |to| to.note);
        let gauge = &self.ws.metrics.subscriptions[Transport::Ws];
        let reader = self.reader.get_or_insert_with(|| {
            let reader = Box::new(Reader::new(gauge.clone()));
            if let Some(place) = &self.place {
                place.reads(reader.reads());
            }
            reader
        });
        let begun: Vec<_> = list.into_iter().map(|ready| reader.subscribe(ready, batch)).collect();
        for gap in begun.iter().filter_map(|begun| begun.gap.as_ref()) {
            self.ws.metrics.gap(gap.reason.as_str());
            if to.is_none() {
                self.outbox.send(|out| jsonrpc::notification(out, "weir.gap", gap));
            }
        }
        if let Some(to) = to {
            let answer = serde_json::json!({ "channels": begun });
            self.outbox.answer(to, |out| jsonrpc::result_of(out, to.id(), &answer));
        }
    }

    pub(super) fn unsubscribe(&mut self, params: Option<&RawValue>) -> Result<Outcome> {
        let params::Unsubscribe { channels } = params::read(params)?;
        let channels = channels.iter().map(|name| Channel::parse(name)).collect::<Result<_>>()?;
        // Queued: a subscription that was asked for before may still wait for the bus.
        Ok(Outcome::Later { work: Box::pin(ready(Ok(Done::Unsubscribe(channels)))), bytes: 0, waits: false })
    }

    pub(super) fn read(&mut self, params: Option<&RawValue>) -> Result<Outcome> {
        let reading = longpoll::Reading::from_params(params::object(params)?, &self.ws.config.limits)?;
        reading.permit(&self.identity)?;
        let (ws, waits) = (self.ws.clone(), reading.waits());
        let work = async move {
            let answer = reading.answer(&ws.bus, &ws.draining).await?;
            let mut out = Vec::new();
            reading.write_json(&answer, &mut out);
            answer.count(&ws.metrics, Transport::Ws, out.len());
            Ok(Done::Result(out))
        };
        Ok(Outcome::Later { work: Box::pin(work), bytes: 0, waits })
    }

    pub(super) fn commit(&mut self, params: Option<&RawValue>) -> Result<Outcome> {
        let params::Commit { consumer, after, channels } = params::read(params)?;
        let _ = self.identity.may_consume(&consumer)?;
        let names = channels.map(|names| names.iter().map(|name| Channel::parse(name)).collect::<Result<Vec<_>>>());
        let (names, ws) = (names.transpose()?, self.ws.clone());
        let (consumer, after) = (consumer.0.into_owned(), after.as_str().to_owned());
        let work = async move {
            longpoll::commit_named(&ws.bus, &consumer, names, &after).await?;
            Ok(Done::Result(NULL.to_vec()))
        };
        Ok(Outcome::Later { work: Box::pin(work), bytes: 0, waits: false })
    }

    /// Queues `work`.
    pub(super) fn later(&mut self, to: Option<Tag>, work: BoxFuture<'static, Result<Done>>, bytes: usize, waits: bool) {
        let limits = &self.ws.config.limits;
        let queued = self.work.get_or_insert_default();
        let many = queued.len() >= limits.calls;
        if many || queued.bytes + bytes > limits.publish_bytes.max(limits.frame) {
            let limit = if many { "limits.calls" } else { "limits.publish_bytes" };
            let error = Error::new(Code::LimitReached, format!("too much of this connection waits ({limit})"));
            return refuse(&self.outbox, to.as_ref(), &error.with("limit", limit));
        }
        queued.bytes += bytes;
        let work = Box::pin(async move { Finished { to, done: work.await } });
        queued.queue.push_back(Job { work, bytes, waits });
    }

    /// Whether nothing waits for the bus.
    pub fn is_idle(&self) -> bool {
        self.work.as_ref().is_none_or(|work| work.len() == 0)
    }

    /// Does a turn of what is queued, as far as it goes. True if there is more to do at once.
    #[inline]
    pub fn poll(&mut self, cx: &mut Context<'_>) -> bool {
        self.work.is_some() && self.poll_work(cx)
    }

    fn poll_work(&mut self, cx: &mut Context<'_>) -> bool {
        for _ in 0..TURN {
            // A client that asks for many pages at once would else be taken for one that does not read them. The write
            // wakes us.
            if self.outbox.is_behind() {
                return false;
            }
            let Some(finished) = self.work.as_mut().and_then(|work| work.poll(cx)) else { return false };
            self.finish(finished);
        }
        true
    }

    /// Gives back what an idle connection does not need.
    pub fn relax(&mut self) {
        if self.is_idle() {
            self.work = None;
        }
    }

    fn finish(&mut self, Finished { to, done }: Finished) {
        let outbox = &self.outbox;
        match done {
            Ok(Done::Result(result)) => {
                if let Some(to) = &to {
                    outbox.answer(to, |out| jsonrpc::result(out, to.id(), &result));
                }
            }
            Ok(Done::Subscribe(list)) => {
                let reader = self.reader.as_deref();
                let is_new = |channel| reader.is_none_or(|reader| !reader.has(channel));
                let new = list.iter().filter(|(wanted, _, _)| is_new(&wanted.channel)).count();
                match self.has_room(new, reader.map_or(0, Reader::len)) {
                    Ok(()) => self.begin(to.as_ref(), list),
                    Err(error) => refuse(outbox, to.as_ref(), &error),
                }
            }
            Ok(Done::Unsubscribe(mut channels)) => {
                channels.retain(|channel| self.reader.as_mut().is_some_and(|reader| reader.unsubscribe(channel)));
                if self.reader.as_ref().is_some_and(|reader| reader.len() == 0) {
                    self.reader = None;
                }
                if let Some(to) = &to {
                    let names: Vec<&str> = channels.iter().map(Channel::as_str).collect();
                    let answer = serde_json::json!({ "channels": names });
                    outbox.answer(to, |out| jsonrpc::result_of(out, to.id(), &answer));
                }
            }
            Ok(Done::Provide { service, bare, provided }) => self.provided(to.as_ref(), &service, bare, provided),
            Err(error) => refuse(outbox, to.as_ref(), &error),
        }
    }
}

impl Work {
    fn len(&self) -> usize {
        self.queue.len() + self.waits.as_ref().map_or(0, FuturesUnordered::len)
    }

    fn poll(&mut self, cx: &mut Context<'_>) -> Option<Finished> {
        while let Some(job) = self.queue.front_mut() {
            if job.waits {
                let Some(job) = self.queue.pop_front() else { break };
                self.waits.get_or_insert_default().push(job.work);
                continue;
            }
            let Poll::Ready(finished) = job.work.as_mut().poll(cx) else { break };
            self.bytes -= job.bytes;
            self.queue.pop_front();
            return Some(finished);
        }
        match Pin::new(self.waits.as_mut()?).poll_next(cx) {
            Poll::Ready(finished) => finished,
            Poll::Pending => None,
        }
    }
}

async fn publish_many(ws: &Ws, subject: &str, drafts: Vec<(Channel, Draft)>) -> Result<Done> {
    let names: Vec<(Channel, usize)> = drafts.iter().map(|(channel, draft)| (channel.clone(), draft.size())).collect();
    let (placed, failed) = match ws.bus.publish(subject, drafts).await {
        Ok(placed) => (placed.into_iter().map(Some).collect(), None),
        Err(PublishFailed { error, placed }) => (placed, Some(error)),
    };
    let mut out = vec![b'['];
    for ((channel, size), placed) in names.iter().zip(&placed) {
        if out.len() > 1 {
            out.push(b',');
        }
        match placed {
            Some(placed) => {
                ws.count(placed, *size);
                placed.write_json(channel, &mut out);
            }
            None => out.extend_from_slice(NULL),
        }
    }
    out.push(b']');
    match failed {
        None => Ok(Done::Result(out)),
        Some(error) => {
            ws.metrics.publish_failed(error.code());
            Err(error.with("placed", serde_json::from_slice::<serde_json::Value>(&out).unwrap_or_default()))
        }
    }
}

impl Ws {
    fn count(&self, placed: &Placed, size: usize) {
        if placed.duplicate {
            self.metrics.duplicates.add(1);
        } else {
            self.metrics.published[Transport::Ws].add(1);
            self.metrics.published_bytes[Transport::Ws].add(size as u64);
        }
    }
}
