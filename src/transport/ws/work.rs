//! [`WorkQueue`]: the jobs that one session runs on the bus.
//!
//! Jobs run one after the other, so that events are published in the order in which they were received. Publishes to
//! one channel keep their order by themselves: they are started one behind the other, without waiting for results.
//! Reads that wait for events run beside all others.

use std::{
    collections::VecDeque,
    pin::Pin,
    sync::{Arc, Weak},
    task::{Context, Poll},
};

use futures_util::{
    future::BoxFuture,
    stream::{FuturesUnordered, Stream},
};
use tokio::sync::Notify;

use super::subscriptions::ReadySubscription;
use crate::{
    auth::Identity,
    channel::Channel,
    error::Result,
    rpc::{AcceptedProvider, CallerId},
};

/// Publishes to one channel that are under way at once.
const MAX_RUN: usize = 64;

/// The jobs of one session.
#[derive(Default)]
pub(super) struct WorkQueue {
    /// One at a time, in order.
    queue: VecDeque<QueuedJob>,
    /// Publishes to one channel that are under way.
    run: Option<PublishRun>,
    /// Reads that wait for events, all at once.
    waits: Option<FuturesUnordered<BoxFuture<'static, FinishedJob>>>,
    /// Bytes that the queued jobs hold.
    pub(super) bytes: usize,
    /// Registrations of services that are under way, and some that were.
    registering: Vec<(String, Weak<Notify>)>,
}

struct PublishRun {
    channel: Channel,
    jobs: FuturesUnordered<BoxFuture<'static, FinishedJob>>,
}

struct QueuedJob {
    work: BoxFuture<'static, FinishedJob>,
    order: JobOrder,
}

/// How a job is ordered with others.
pub(super) enum JobOrder {
    /// Starts when all before it have ended, and delays those behind it.
    Alone,
    /// A publish to this channel: placed behind those that were started before it.
    Behind(Channel),
    /// Starts waiting when its turn comes, so that it sees what was published before, and delays nothing.
    Waits,
}

/// The result of a job, and the request that it answers.
pub(super) struct FinishedJob {
    pub(super) to: Option<CallerId>,
    pub(super) output: Result<JobOutput>,
    /// Its share of [`WorkQueue::bytes`].
    bytes: usize,
}

pub(super) enum JobOutput {
    /// JSON.
    Result(Vec<u8>),
    Login(Result<Identity>),
    /// A page of these channels, as JSON.
    Page {
        channels: Vec<Channel>,
        json: Vec<u8>,
    },
    Subscribe(Vec<ReadySubscription>),
    Unsubscribe(Vec<Channel>),
    Provide {
        service: String,
        /// Its methods are called by their bare names.
        bare: bool,
        provided: AcceptedProvider,
    },
}

impl WorkQueue {
    /// Queues a job that holds `bytes`.
    pub(super) fn push(
        &mut self,
        to: Option<CallerId>,
        work: BoxFuture<'static, Result<JobOutput>>,
        bytes: usize,
        order: JobOrder,
    ) {
        self.bytes += bytes;
        let work = Box::pin(async move { FinishedJob { to, output: work.await, bytes } });
        self.queue.push_back(QueuedJob { work, order });
    }

    /// Registers that `service` is being registered, which is abandoned when the result is notified.
    pub(super) fn begin_registration(&mut self, service: &str) -> Arc<Notify> {
        let abandoned = Arc::default();
        self.registering.retain(|(_, abandoned)| abandoned.strong_count() > 0);
        self.registering.push((service.to_owned(), Arc::downgrade(&abandoned)));
        abandoned
    }

    /// Abandons the registrations of a service that are under way. False if there are none.
    pub(super) fn abandon_registration(&mut self, service: &str) -> bool {
        let mut some = false;
        self.registering.retain(|(name, abandoned)| {
            let Some(abandoned) = abandoned.upgrade() else { return false };
            if name == service {
                abandoned.notify_one();
                some = true;
            }
            name != service
        });
        some
    }

    pub(super) fn len(&self) -> usize {
        let run = self.run.as_ref().map_or(0, |run| run.jobs.len());
        self.queue.len() + run + self.waits.as_ref().map_or(0, FuturesUnordered::len)
    }

    pub(super) fn poll(&mut self, cx: &mut Context<'_>) -> Option<FinishedJob> {
        let finished = self.poll_some(cx)?;
        self.bytes -= finished.bytes;
        Some(finished)
    }

    fn poll_some(&mut self, cx: &mut Context<'_>) -> Option<FinishedJob> {
        while let Some(job) = self.queue.front_mut() {
            match (&self.run, &job.order) {
                (None, _) => {}
                (Some(run), JobOrder::Behind(channel)) if *channel == run.channel && run.jobs.len() < MAX_RUN => {}
                (Some(_), _) => break,
            }
            if !matches!(job.order, JobOrder::Waits)
                && let Poll::Ready(finished) = job.work.as_mut().poll(cx)
            {
                self.queue.pop_front();
                return Some(finished);
            }
            if matches!(job.order, JobOrder::Alone) {
                break;
            }
            // The publish was started by now: a job that starts later is placed behind it.
            let Some(job) = self.queue.pop_front() else { break };
            match job.order {
                JobOrder::Behind(channel) => {
                    let run = self.run.get_or_insert_with(|| PublishRun { channel, jobs: FuturesUnordered::new() });
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
