//! What a [`Session`] asks the bus. It is done one after the other, so that publishes are placed in the order in which they
//! came. Publishes to one channel keep their order by themselves: they are handed over one behind the other, without
//! waiting for answers. Reads that wait are set aside when their turn comes, and hold up nobody.

use std::{
    collections::VecDeque,
    future::ready,
    pin::Pin,
    sync::{Arc, Weak},
    task::{Context, Poll},
};

use futures_util::{
    future::BoxFuture,
    stream::{FuturesUnordered, Stream},
};
use serde_json::value::RawValue;
use tokio::sync::Notify;

use super::{
    Ready,
    dispatch::{NULL, Outcome, Session},
    jsonrpc,
    outbox::refuse,
    params::{self, Publish},
    reader::Reader,
};
use crate::{
    bus::{Placed, PublishFailed},
    channel::Channel,
    error::{Code, Error, Result},
    event::Draft,
    metrics::Metrics,
    metrics::Transport,
    node::Node,
    rpc::{AcceptedProvider, CallerId},
    transport::{present, reading},
};

/// Jobs that are finished before others have their turn: a bus in memory makes none of them wait.
const TURN: usize = 64;
/// Publishes to one channel that are under way at once.
const RUN: usize = 64;

/// What waits for the bus.
#[derive(Default)]
pub(super) struct Work {
    /// One at a time, in order.
    queue: VecDeque<Job>,
    /// Publishes to one channel that are under way.
    run: Option<Run>,
    /// All at once: reads that wait for events.
    waits: Option<FuturesUnordered<BoxFuture<'static, Finished>>>,
    /// Encoded bytes of the events in the queue.
    bytes: usize,
    /// Registrations of services that are under way, and those that were a moment ago.
    registering: Vec<(String, Weak<Notify>)>,
}

struct Run {
    channel: Channel,
    jobs: FuturesUnordered<BoxFuture<'static, Finished>>,
}

struct Job {
    work: BoxFuture<'static, Finished>,
    manner: Manner,
}

/// How a job gets along with others.
pub(super) enum Manner {
    /// It begins when all before it have ended, and holds up those behind it.
    Alone,
    /// A publish to this channel: placed behind those that began before it.
    Behind(Channel),
    /// Becomes one of those that wait when its turn comes: what was published before is seen by it.
    Waits,
}

/// What a job came to, and whom to tell.
struct Finished {
    to: Option<CallerId>,
    done: Result<Done>,
    /// What it held of [`Work::bytes`].
    bytes: usize,
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
        provided: AcceptedProvider,
    },
}

impl Session {
    pub(super) fn publish(&mut self, params: Option<&RawValue>) -> Result<Outcome> {
        let limits = &self.node.config.limits;
        let (node, identity) = (self.node.clone(), self.identity.clone());
        match Publish::read(params)? {
            Publish::One(event) => {
                let (channel, draft) = event.draft(limits.event)?;
                let _ = identity.may_publish(&channel)?;
                let size = draft.size();
                let manner = Manner::Behind(channel.clone());
                let work = async move {
                    let placed = node.bus.publish_one(identity.subject(), &channel, draft).await;
                    let placed = placed.inspect_err(|error| node.metrics.publish_failed(error.code()))?;
                    count(&node.metrics, &placed, size);
                    let mut out = Vec::new();
                    placed.write_json(&channel, &mut out);
                    Ok(Done::Result(out))
                };
                Ok(Outcome::Later { work: Box::pin(work), bytes: size, manner })
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
                let work = async move { publish_many(&node, identity.subject(), drafts).await };
                Ok(Outcome::Later { work: Box::pin(work), bytes, manner: Manner::Alone })
            }
        }
    }

    pub(super) fn subscribe(&mut self, params: Option<&RawValue>) -> Result<Outcome> {
        let asked: params::Subscribe<'_> = params::read(params)?;
        let most = self.node.config.limits.present_info;
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
        let (node, identity) = (self.node.clone(), self.identity.clone());
        let work = async move {
            let channels: Vec<Channel> = wanted.iter().map(|wanted| wanted.channel.clone()).collect();
            let watches = node.bus.watch(&channels).await?;
            let ready = wanted.into_iter().zip(watches).map(|(wanted, watch)| {
                let lease = super::enter(&node, &identity, &wanted.channel, client.as_ref())?;
                Ok((wanted, watch, lease))
            });
            Ok(Done::Subscribe(ready.collect::<Result<_>>()?))
        };
        Ok(Outcome::Later { work: Box::pin(work), bytes: 0, manner: Manner::Alone })
    }

    pub(super) fn presence(&mut self, params: Option<&RawValue>) -> Result<Outcome> {
        let asking = present::Asking::from_params(params::object(params)?, &self.node.config.limits)?;
        asking.permit(&self.identity)?;
        let presence = self.node.presence.clone();
        let work = async move { Ok(Done::Result(asking.answer(&presence).await?)) };
        Ok(Outcome::Later { work: Box::pin(work), bytes: 0, manner: Manner::Alone })
    }

    /// Whether `new` channels may be subscribed to beside `have`.
    fn has_room(&self, new: usize, have: usize) -> Result<()> {
        let most = self.node.config.limits.subscriptions;
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

    fn begin(&mut self, to: Option<&CallerId>, list: Vec<Ready>) {
        let batch = to.map_or(0, |to| to.note);
        let gauge = &self.node.metrics.subscriptions[Transport::Ws];
        let reader = self.reader.get_or_insert_with(|| {
            let reader = Box::new(Reader::new(gauge.clone()));
            if let Some(registration) = &self.registration {
                registration.set_channels(reader.channel_set());
            }
            reader
        });
        let begun: Vec<_> = list.into_iter().map(|ready| reader.subscribe(ready, batch)).collect();
        for gap in begun.iter().filter_map(|begun| begun.gap.as_ref()) {
            self.node.metrics.gap(gap.reason.as_str());
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
        Ok(Outcome::Later { work: Box::pin(ready(Ok(Done::Unsubscribe(channels)))), bytes: 0, manner: Manner::Alone })
    }

    pub(super) fn read(&mut self, params: Option<&RawValue>) -> Result<Outcome> {
        let reading = reading::Reading::from_params(params::object(params)?, &self.node.config.limits)?;
        reading.permit(&self.identity)?;
        let manner = if reading.waits() { Manner::Waits } else { Manner::Alone };
        let node = self.node.clone();
        let work = async move {
            let answer = reading.answer(&node.bus, &node.draining).await?;
            let mut out = Vec::new();
            reading.write_json(&answer, &mut out);
            answer.count(&node.metrics, Transport::Ws, out.len());
            Ok(Done::Result(out))
        };
        Ok(Outcome::Later { work: Box::pin(work), bytes: 0, manner })
    }

    pub(super) fn commit(&mut self, params: Option<&RawValue>) -> Result<Outcome> {
        let params::Commit { consumer, after, channels } = params::read(params)?;
        let _ = self.identity.may_consume(&consumer)?;
        let names = channels.map(|names| names.iter().map(|name| Channel::parse(name)).collect::<Result<Vec<_>>>());
        let (names, node) = (names.transpose()?, self.node.clone());
        let (consumer, after) = (consumer.0.into_owned(), after.as_str().to_owned());
        let work = async move {
            reading::commit_named(&node.bus, &consumer, names, &after).await?;
            Ok(Done::Result(NULL.to_vec()))
        };
        Ok(Outcome::Later { work: Box::pin(work), bytes: 0, manner: Manner::Alone })
    }

    /// Queues `work`.
    pub(super) fn later(
        &mut self,
        to: Option<CallerId>,
        work: BoxFuture<'static, Result<Done>>,
        bytes: usize,
        manner: Manner,
    ) {
        let limits = &self.node.config.limits;
        let queued = self.work.get_or_insert_default();
        let many = queued.len() >= limits.calls;
        if many || queued.bytes + bytes > limits.publish_bytes.max(limits.frame) {
            let limit = if many { "limits.calls" } else { "limits.publish_bytes" };
            let error = Error::new(Code::LimitReached, format!("too much of this connection waits ({limit})"));
            return refuse(&self.outbox, to.as_ref(), &error.with("limit", limit));
        }
        queued.bytes += bytes;
        let work = Box::pin(async move { Finished { to, done: work.await, bytes } });
        queued.queue.push_back(Job { work, manner });
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

    fn finish(&mut self, Finished { to, done, .. }: Finished) {
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
    /// A registration begins. It is given up when this is notified.
    pub fn registers(&mut self, service: &str) -> Arc<Notify> {
        let given_up = Arc::default();
        self.registering.retain(|(_, given_up)| given_up.strong_count() > 0);
        self.registering.push((service.to_owned(), Arc::downgrade(&given_up)));
        given_up
    }

    /// Gives up the registrations of a service. False: there are none under way.
    pub fn give_up(&mut self, service: &str) -> bool {
        let mut some = false;
        self.registering.retain(|(name, given_up)| {
            let Some(given_up) = given_up.upgrade() else { return false };
            if name == service {
                given_up.notify_one();
                some = true;
            }
            name != service
        });
        some
    }

    fn len(&self) -> usize {
        let run = self.run.as_ref().map_or(0, |run| run.jobs.len());
        self.queue.len() + run + self.waits.as_ref().map_or(0, FuturesUnordered::len)
    }

    fn poll(&mut self, cx: &mut Context<'_>) -> Option<Finished> {
        let finished = self.poll_some(cx)?;
        self.bytes -= finished.bytes;
        Some(finished)
    }

    fn poll_some(&mut self, cx: &mut Context<'_>) -> Option<Finished> {
        while let Some(job) = self.queue.front_mut() {
            match (&self.run, &job.manner) {
                (None, _) => {}
                (Some(run), Manner::Behind(channel)) if *channel == run.channel && run.jobs.len() < RUN => {}
                (Some(_), _) => break,
            }
            if !matches!(job.manner, Manner::Waits)
                && let Poll::Ready(finished) = job.work.as_mut().poll(cx)
            {
                self.queue.pop_front();
                return Some(finished);
            }
            if matches!(job.manner, Manner::Alone) {
                break;
            }
            // What was published is handed over by now: whatever begins behind it is placed behind it.
            let Some(job) = self.queue.pop_front() else { break };
            match job.manner {
                Manner::Behind(channel) => {
                    let run = self.run.get_or_insert_with(|| Run { channel, jobs: FuturesUnordered::new() });
                    run.jobs.push(job.work);
                }
                _ => self.waits.get_or_insert_default().push(job.work),
            }
        }
        if let Some(run) = &mut self.run
            && let Poll::Ready(Some(finished)) = Pin::new(&mut run.jobs).poll_next(cx)
        {
            if run.jobs.is_empty() {
                self.run = None;
            }
            return Some(finished);
        }
        match Pin::new(self.waits.as_mut()?).poll_next(cx) {
            Poll::Ready(finished) => finished,
            Poll::Pending => None,
        }
    }
}

async fn publish_many(node: &Node, subject: &str, drafts: Vec<(Channel, Draft)>) -> Result<Done> {
    let names: Vec<(Channel, usize)> = drafts.iter().map(|(channel, draft)| (channel.clone(), draft.size())).collect();
    let (placed, failed) = match node.bus.publish(subject, drafts).await {
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
                count(&node.metrics, placed, *size);
                placed.write_json(channel, &mut out);
            }
            None => out.extend_from_slice(NULL),
        }
    }
    out.push(b']');
    match failed {
        None => Ok(Done::Result(out)),
        Some(error) => {
            node.metrics.publish_failed(error.code());
            Err(error.with("placed", serde_json::from_slice::<serde_json::Value>(&out).unwrap_or_default()))
        }
    }
}

fn count(metrics: &Metrics, placed: &Placed, size: usize) {
    if placed.duplicate {
        metrics.duplicates.add(1);
    } else {
        metrics.published[Transport::Ws].add(1);
        metrics.published_bytes[Transport::Ws].add(size as u64);
    }
}
