//! `Grip-Hold: response`: nothing is answered until an item answers it, or the time is up; then the origin's answer is.

use std::sync::Arc;

use axum::body::Body as AxumBody;
use bytes::Bytes;
use http::{HeaderMap, HeaderValue, Response, StatusCode, header};
use tokio::time::Instant;

use super::{
    Answer, Content, Grip, Outcome,
    at::At,
    filter,
    hold::away,
    instruct::Instruct,
    mark::{self, Mark},
    proxy::Failure,
};
use crate::{
    auth::Identity,
    bus::{Format, ReadLimit, Subscriptions},
    channel::Channel,
    metrics::{Metrics, Transport},
    position::{Position, Start},
};

/// Events looked at in one go.
const PAGE: usize = 64;
/// So far back an item is looked for.
const RECENT: u64 = 32;

/// Whether the origin can be asked again.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Again {
    /// It was asked once.
    First,
    More,
    /// Its request had a body, or it was asked often enough.
    Never,
}

/// A channel that an answer waits for.
struct Waiting {
    slot: u32,
    /// Which of the instructions it is.
    nth: usize,
    channel: Channel,
    at: Position,
    prev: Option<String>,
}

impl Grip {
    pub(super) async fn hold_response(
        self: &Arc<Self>,
        at: &At,
        instruct: Instruct,
        mut answer: Answer,
        again: Again,
    ) -> Result<Outcome, Failure> {
        let repeatable = again != Again::Never;
        let channels = self.channels(&self.routes[at.route], &instruct)?;
        let mut subs = Subscriptions::new(Format::NONE);
        let mut waiting = Vec::with_capacity(channels.len());
        for (nth, watch) in self.node.bus.watch(&channels).await.map_err(away)?.into_iter().enumerate() {
            let channel = watch.channel().clone();
            let added = subs.add(watch, Start::Now, None);
            let prev = instruct.channels[nth].prev_id.clone();
            waiting.push(Waiting { slot: added.slot, nth, channel, at: added.position, prev });
        }
        let _counted = Counted::new(&self.node.metrics, &subs);
        let mut listed = self.node.sessions.register_read(&Identity::anonymous(), at.remote, channels);
        let ask_again = || {
            let mut last = HeaderMap::new();
            for asked in &instruct.channels {
                let value =
                    asked.prev_id.as_ref().map(|id| HeaderValue::try_from(format!("{}; last-id={id}", asked.name)));
                if let Some(Ok(value)) = value {
                    last.append("grip-last", value);
                }
            }
            Outcome::Again(last)
        };
        // An item may have come between the origin's look and ours. Asked twice, it knows what it says.
        if again == Again::First {
            for wait in &waiting {
                if let Some(prev) = &wait.prev
                    && self.last_id(&wait.channel).await.is_some_and(|last| last != *prev)
                {
                    return Ok(ask_again());
                }
            }
        }
        let body = self.whole(std::mem::replace(&mut answer.body, Content::Bytes(Bytes::new()))).await?;
        let mut alarm = std::pin::pin!(tokio::time::sleep_until(Instant::now() + instruct.timeout));
        let mut leaving = std::pin::pin!(self.node.draining.cancelled());
        loop {
            tokio::select! {
                biased;
                () = std::future::poll_fn(|cx| subs.poll_changed(cx)) => {}
                () = &mut alarm => break,
                // Whoever waits is answered as if its time was up, and comes back to a node that stays.
                () = &mut leaving => break,
                () = listed.kicked() => break,
            }
            for wait in &mut waiting {
                let limit = ReadLimit { events: PAGE, bytes: self.node.config.limits.page_bytes };
                let page = self.node.bus.read(&wait.channel, Start::After(wait.at), limit, None).await.map_err(away)?;
                // What is gone may have been the answer: the origin knows.
                if page.gap.is_some() && repeatable {
                    return Ok(ask_again());
                }
                wait.at = page.next;
                for event in &page.events {
                    let Some(mark) = Mark::of(event) else { continue };
                    let Some(item) = &mark.response else { continue };
                    if !filter::passes(&instruct, wait.nth, &mark.meta) {
                        continue;
                    }
                    if wait.prev.is_some() && wait.prev == mark.id {
                        // The origin knew of it.
                        continue;
                    }
                    if wait.prev.is_some() && wait.prev != mark.prev && repeatable {
                        return Ok(ask_again());
                    }
                    match mark::answer(event, item, &body) {
                        Some((status, headers, body)) => {
                            return Ok(Outcome::Done(answered(answer.headers, status, headers, body)));
                        }
                        None if repeatable => return Ok(ask_again()),
                        None => {}
                    }
                }
                subs.seek(wait.slot, Start::After(wait.at));
            }
        }
        Ok(Outcome::Done(Answer { body: Content::Bytes(body), ..answer }.respond()))
    }

    /// The id of the newest item of a channel, if it is known.
    pub(super) async fn last_id(&self, channel: &Channel) -> Option<String> {
        for count in [1, RECENT] {
            let limit = ReadLimit { events: count as usize, bytes: self.node.config.limits.page_bytes };
            let page = self.node.bus.read(channel, Start::Last(count), limit, None).await.ok()?;
            // Cut short, it does not reach to the newest.
            if page.more {
                return None;
            }
            if let Some(mark) = page.events.iter().rev().find_map(|event| Mark::of(event)) {
                return mark.id;
            }
        }
        None
    }
}

/// An item's answer. What it does not say of its head, the origin has said.
fn answered(mut inherited: HeaderMap, status: StatusCode, headers: HeaderMap, body: Vec<u8>) -> Response<AxumBody> {
    inherited.remove(header::CONTENT_LENGTH);
    for name in headers.keys() {
        inherited.remove(name);
    }
    inherited.extend(headers);
    let mut response = Response::new(AxumBody::from(body));
    (*response.status_mut(), *response.headers_mut()) = (status, inherited);
    response
}

/// Subscriptions as the metrics count them.
struct Counted<'a>(&'a Metrics, i64);

impl<'a> Counted<'a> {
    fn new(metrics: &'a Metrics, subs: &Subscriptions) -> Self {
        let count = subs.len() as i64;
        metrics.subscriptions[Transport::Poll].add(count);
        Counted(metrics, count)
    }
}

impl Drop for Counted<'_> {
    fn drop(&mut self) {
        self.0.subscriptions[Transport::Poll].add(-self.1);
    }
}
