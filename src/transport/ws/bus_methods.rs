//! The methods of [`RpcSession`] that concern the bus and presence: queued as [work](super::work), and answered when
//! they are done.

use std::{future::ready, task::Context};

use futures_util::future::BoxFuture;
use serde_json::value::RawValue;

use super::{
    jsonrpc,
    outbox::reject,
    params::{self, PublishParams},
    session::{MethodOutcome, NULL, RpcSession},
    subscriptions::{ReadySubscription, SocketSubscriptions},
    work::{FinishedJob, JobOrder, JobOutput},
};
use crate::{
    channel::Channel,
    error::{Code, Error, Result},
    event::Draft,
    metrics::Transport,
    node::Node,
    rpc::CallerId,
    transport::{
        present,
        publishing::{self, PublishedEvents},
        reading,
    },
};

/// Jobs that are finished before other connections have their turn: with the memory backend none of them waits.
const MAX_FINISHED: usize = 64;

impl RpcSession {
    pub(super) fn publish(&mut self, params: Option<&RawValue>) -> Result<MethodOutcome> {
        let limits = &self.node.config.limits;
        let (node, identity) = (self.node.clone(), self.identity.clone());
        match PublishParams::read(params)? {
            PublishParams::One(event) => {
                let (channel, draft) = event.draft(limits.event)?;
                let _ = identity.may_publish(&channel, &draft)?;
                let size = draft.size();
                let order = JobOrder::Behind(channel.clone());
                let work = async move {
                    let placed = node.bus.publish_one(identity.subject(), &channel, draft).await;
                    let placed = placed.inspect_err(|error| node.metrics.publish_failed(error.code()))?;
                    node.metrics.event_published(Transport::Ws, placed.duplicate, size);
                    let mut out = Vec::new();
                    placed.write_json(&channel, &mut out);
                    Ok(JobOutput::Result(out))
                };
                Ok(MethodOutcome::Later { work: Box::pin(work), bytes: size, order })
            }
            PublishParams::Many(events) => {
                if events.is_empty() {
                    return Err(Error::params("events is empty"));
                }
                if events.len() > limits.publish_events {
                    let max = limits.publish_events;
                    return Err(Error::new(Code::TooLarge, format!("more than {max} events (limits.publish_events)"))
                        .with("limit", "limits.publish_events"));
                }
                // All are checked before the first is published.
                let mut drafts = Vec::with_capacity(events.len());
                for event in &events {
                    let (channel, draft) = event.draft(limits.event)?;
                    let _ = identity.may_publish(&channel, &draft)?;
                    drafts.push((channel, draft));
                }
                let bytes = drafts.iter().map(|(_, draft)| draft.size()).sum();
                let work = async move { publish_many(&node, identity.subject(), drafts).await };
                Ok(MethodOutcome::Later { work: Box::pin(work), bytes, order: JobOrder::Alone })
            }
        }
    }

    pub(super) fn subscribe(&mut self, params: Option<&RawValue>) -> Result<MethodOutcome> {
        let subscribe: params::SubscribeParams<'_> = params::read(params)?;
        let max = self.node.config.limits.present_info;
        let client = subscribe.present.as_ref().map(|present| present.client(max)).transpose()?;
        let requests = subscribe.requests()?;
        let mut rejected: Option<Error> = None;
        let mut names = Vec::new();
        for request in &requests {
            if let Err(error) = self.identity.may_subscribe(&request.channel) {
                names.push(request.channel.as_str().to_owned());
                rejected.get_or_insert(error);
            }
        }
        if let Some(error) = rejected {
            return Err(error.with("channels", names));
        }
        // A request that exceeds the limit by itself does not open channels. Otherwise the limit is checked again when
        // its turn comes, as requests before this one may still be queued.
        self.has_room(requests.len(), 0)?;
        let (node, identity) = (self.node.clone(), self.identity.clone());
        let work = async move {
            let channels: Vec<Channel> = requests.iter().map(|request| request.channel.clone()).collect();
            let watches = node.bus.watch(&channels).await?;
            let leases = present::enter(&node.presence, &identity, channels.iter(), client.as_ref(), Transport::Ws)?;
            let ready = requests.into_iter().zip(watches).zip(leases);
            Ok(JobOutput::Subscribe(ready.map(|((request, watch), lease)| (request, watch, lease)).collect()))
        };
        Ok(MethodOutcome::Later { work: Box::pin(work), bytes: 0, order: JobOrder::Alone })
    }

    pub(super) fn presence(&mut self, params: Option<&RawValue>) -> Result<MethodOutcome> {
        let query = present::MembersRequest::from_params(params::object(params)?, &self.node.config.limits)?;
        query.permit(&self.identity)?;
        let presence = self.node.presence.clone();
        let work = async move { Ok(JobOutput::Result(query.answer(&presence).await?)) };
        Ok(MethodOutcome::Later { work: Box::pin(work), bytes: 0, order: JobOrder::Alone })
    }

    /// Whether `new` channels may be subscribed to beside `have`.
    fn has_room(&self, new: usize, have: usize) -> Result<()> {
        let max = self.node.config.limits.subscriptions;
        if have + new <= max {
            return Ok(());
        }
        let detail = format!("{have} channels and {new} more, limits.subscriptions is {max}");
        Err(Error::new(Code::LimitReached, detail).with("limit", "limits.subscriptions"))
    }

    /// Begins the subscriptions of the URL, before anything is read.
    pub(super) fn subscribe_now(&mut self, ready: Vec<ReadySubscription>) {
        self.begin(None, ready);
    }

    fn begin(&mut self, to: Option<&CallerId>, list: Vec<ReadySubscription>) {
        let batch = to.map_or(0, |to| to.note);
        let gauge = &self.node.metrics.subscriptions[Transport::Ws];
        let reader = self.subscriptions.get_or_insert_with(|| {
            let reader = Box::new(SocketSubscriptions::new(gauge.clone()));
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

    pub(super) fn unsubscribe(&mut self, params: Option<&RawValue>) -> Result<MethodOutcome> {
        let params::UnsubscribeParams { channels } = params::read(params)?;
        let channels = channels.iter().map(|name| Channel::parse(name)).collect::<Result<_>>()?;
        // Queued: an earlier subscription may still wait for the bus.
        Ok(MethodOutcome::Later {
            work: Box::pin(ready(Ok(JobOutput::Unsubscribe(channels)))),
            bytes: 0,
            order: JobOrder::Alone,
        })
    }

    pub(super) fn read(&mut self, params: Option<&RawValue>) -> Result<MethodOutcome> {
        let reading = reading::PageRequest::from_params(params::object(params)?, &self.node.config.limits)?;
        reading.permit(&self.identity)?;
        let order = if reading.waits() { JobOrder::Waits } else { JobOrder::Alone };
        let node = self.node.clone();
        let work = async move {
            let page = reading.read(&node.bus, &node.draining).await?;
            let mut out = Vec::new();
            reading.write_json(&page, &mut out);
            page.count(&node.metrics, Transport::Ws, out.len());
            Ok(JobOutput::Page { channels: reading.channels().to_vec(), json: out })
        };
        Ok(MethodOutcome::Later { work: Box::pin(work), bytes: 0, order })
    }

    pub(super) fn commit(&mut self, params: Option<&RawValue>) -> Result<MethodOutcome> {
        let params::CommitParams { consumer, after, channels } = params::read(params)?;
        let _ = self.identity.may_consume(&consumer)?;
        let names = channels.map(|names| names.iter().map(|name| Channel::parse(name)).collect::<Result<Vec<_>>>());
        let (names, node, identity) = (names.transpose()?, self.node.clone(), self.identity.clone());
        let (consumer, after) = (consumer.0.into_owned(), after.as_str().to_owned());
        let work = async move {
            reading::commit_named(&node.bus, &identity, &consumer, names, &after).await?;
            Ok(JobOutput::Result(NULL.to_vec()))
        };
        Ok(MethodOutcome::Later { work: Box::pin(work), bytes: 0, order: JobOrder::Alone })
    }

    /// Queues `work`.
    pub(super) fn enqueue(
        &mut self,
        to: Option<CallerId>,
        work: BoxFuture<'static, Result<JobOutput>>,
        bytes: usize,
        order: JobOrder,
    ) {
        let limits = &self.node.config.limits;
        let queued = self.work.get_or_insert_default();
        let many = queued.len() >= limits.calls;
        if many || queued.bytes + bytes > limits.publish_bytes.max(limits.frame) {
            let limit = if many { "limits.calls" } else { "limits.publish_bytes" };
            let error = Error::new(Code::LimitReached, format!("too much of this connection waits ({limit})"));
            return reject(&self.outbox, to.as_ref(), &error.with("limit", limit));
        }
        queued.push(to, work, bytes, order);
    }

    /// Whether nothing waits for the bus.
    pub(super) fn is_idle(&self) -> bool {
        self.work.as_ref().is_none_or(|work| work.len() == 0)
    }

    /// Makes progress with queued jobs. True if there is more to do at once.
    #[inline]
    pub(super) fn poll(&mut self, cx: &mut Context<'_>) -> bool {
        self.work.is_some() && self.poll_work(cx)
    }

    fn poll_work(&mut self, cx: &mut Context<'_>) -> bool {
        for _ in 0..MAX_FINISHED {
            // Otherwise a client that requests many pages at once would be closed as slow. The write wakes us.
            if self.outbox.is_behind() {
                return false;
            }
            let Some(finished) = self.work.as_mut().and_then(|work| work.poll(cx)) else { return false };
            self.finish(finished);
        }
        true
    }

    /// Frees what an idle connection does not need.
    pub(super) fn shrink(&mut self) {
        if self.is_idle() {
            self.work = None;
        }
    }

    fn finish(&mut self, FinishedJob { to, output, .. }: FinishedJob) {
        let outbox = &self.outbox;
        match output {
            Ok(JobOutput::Result(result)) => {
                if let Some(to) = &to {
                    outbox.answer(to, |out| jsonrpc::result(out, to.id(), &result));
                }
            }
            Ok(JobOutput::Login(verified)) => match verified.and_then(|identity| self.log_in(identity)) {
                Ok(answer) => {
                    if let Some(to) = &to {
                        self.outbox.answer(to, |out| jsonrpc::result(out, to.id(), &answer));
                    }
                }
                Err(error) => {
                    self.count_failed_login(&error);
                    reject(&self.outbox, to.as_ref(), &error);
                }
            },
            Ok(JobOutput::Page { channels, json }) => {
                match channels.iter().find_map(|channel| self.identity.may_subscribe(channel).err()) {
                    Some(error) => reject(outbox, to.as_ref(), &error),
                    None => {
                        if let Some(to) = &to {
                            outbox.answer(to, |out| jsonrpc::result(out, to.id(), &json));
                        }
                    }
                }
            }
            Ok(JobOutput::Subscribe(list)) if let Some(error) = self.first_refused(&list) => {
                reject(&self.outbox, to.as_ref(), &error);
            }
            Ok(JobOutput::Subscribe(list)) => {
                let reader = self.subscriptions.as_deref();
                let is_new = |channel| reader.is_none_or(|reader| !reader.has(channel));
                let new = list.iter().filter(|(request, _, _)| is_new(&request.channel)).count();
                match self.has_room(new, reader.map_or(0, SocketSubscriptions::len)) {
                    Ok(()) => self.begin(to.as_ref(), list),
                    Err(error) => reject(outbox, to.as_ref(), &error),
                }
            }
            Ok(JobOutput::Unsubscribe(mut channels)) => {
                channels
                    .retain(|channel| self.subscriptions.as_mut().is_some_and(|reader| reader.unsubscribe(channel)));
                if self.subscriptions.as_ref().is_some_and(|reader| reader.len() == 0) {
                    self.subscriptions = None;
                }
                if let Some(to) = &to {
                    let names: Vec<&str> = channels.iter().map(Channel::as_str).collect();
                    let answer = serde_json::json!({ "channels": names });
                    outbox.answer(to, |out| jsonrpc::result_of(out, to.id(), &answer));
                }
            }
            Ok(JobOutput::Provide { service, bare, provided }) => self.provided(to.as_ref(), &service, bare, provided),
            Err(error) => reject(outbox, to.as_ref(), &error),
        }
    }
}

async fn publish_many(node: &Node, subject: &str, drafts: Vec<(Channel, Draft)>) -> Result<JobOutput> {
    let PublishedEvents { json, error, .. } = publishing::publish_many(node, subject, Transport::Ws, drafts).await;
    match error {
        None => Ok(JobOutput::Result(json)),
        Some(error) => {
            Err(error.with("placed", serde_json::from_slice::<serde_json::Value>(&json).unwrap_or_default()))
        }
    }
}
