//! `Grip-Hold: response`: the response is held back until an item is published as the response, or the timeout passes and the
//! origin's response is sent.

use axum::body::Body as AxumBody;
use bytes::Bytes;
use http::{HeaderMap, Response, StatusCode, header};
use tokio::time::Instant;

use super::{
    filter,
    headers::append_last_id,
    instructions::Instructions,
    item_event::{self, ItemRecord},
    next_link::StreamSite,
    origin_client::OriginError,
    response::{OriginBody, OriginResponse},
};
use crate::{
    bus::{Format, ReadLimit, Subscriptions},
    channel::Channel,
    metrics::{Metrics, Transport},
    position::{Position, Start},
};

/// Maximum number of events of one read.
const PAGE: usize = 64;

/// The result of a response from an origin.
pub(super) enum HoldOutcome {
    Done(Response<AxumBody>),
    /// The request must be sent to the origin again, with these `Grip-Last` fields.
    Retry(HeaderMap),
}

/// How often the request was sent to the origin again.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Retries {
    Unused,
    Used,
    /// The request has a body, or the maximum is reached.
    Exhausted,
}

/// A channel whose items may be the response.
struct WatchedChannel {
    slot: u32,
    /// Its index in the instructions.
    index: usize,
    channel: Channel,
    position: Position,
    prev_id: Option<String>,
}

pub(super) async fn hold_response(
    site: &StreamSite,
    instructions: Instructions,
    mut response: OriginResponse,
    retries: Retries,
) -> Result<HoldOutcome, OriginError> {
    let (proxy, node) = (&site.proxy, &site.proxy.node);
    let repeatable = retries != Retries::Exhausted;
    let channels = proxy.channels(&proxy.routes[site.route], &instructions)?;
    let mut subs = Subscriptions::new(Format::NONE);
    let mut watched = Vec::with_capacity(channels.len());
    let watches = node.bus.watch(&channels).await.map_err(OriginError::bus_unavailable)?;
    for (index, watch) in watches.into_iter().enumerate() {
        let channel = watch.channel().clone();
        let added = subs.add(watch, Start::Now, None);
        let prev_id = instructions.channels[index].prev_id.clone();
        watched.push(WatchedChannel { slot: added.slot, index, channel, position: added.position, prev_id });
    }
    let _counted = CountedSubscriptions::new(&node.metrics, &subs);
    let mut registration = node.sessions.register_read(&node.auth.anonymous(false), site.remote, channels);
    let retry = || {
        let mut last_ids = HeaderMap::new();
        for held in &instructions.channels {
            append_last_id(&mut last_ids, &held.name, held.prev_id.as_ref());
        }
        HoldOutcome::Retry(last_ids)
    };
    // An item may have been published between the origin's read and this subscription. After a retry, the origin is trusted
    // to know the item.
    if retries == Retries::Unused {
        for watched in &watched {
            if let Some(prev_id) = &watched.prev_id
                && proxy.last_item_id(&watched.channel).await.is_some_and(|last| last != *prev_id)
            {
                return Ok(retry());
            }
        }
    }
    let body = proxy.read_body(std::mem::replace(&mut response.body, OriginBody::Bytes(Bytes::new()))).await?;
    let mut timeout = std::pin::pin!(tokio::time::sleep_until(Instant::now() + instructions.timeout));
    let mut draining = std::pin::pin!(node.draining.cancelled());
    loop {
        tokio::select! {
            biased;
            () = std::future::poll_fn(|cx| subs.poll_changed(cx)) => {}
            () = &mut timeout => break,
            // Handled as a timeout, so that the client polls another node.
            () = &mut draining => break,
            _ = registration.kicked() => break,
        }
        for watched in &mut watched {
            let limit = ReadLimit { events: PAGE, bytes: node.config.limits.page_bytes };
            let page = node.bus.read(&watched.channel, Start::After(watched.position), limit, None).await;
            let page = page.map_err(OriginError::bus_unavailable)?;
            // The response may be among the missing events; the origin knows.
            if page.gap.is_some() && repeatable {
                return Ok(retry());
            }
            watched.position = page.next;
            for event in &page.events {
                let Some(record) = ItemRecord::of(event) else { continue };
                let Some(item) = &record.response else { continue };
                if !filter::passes(&instructions, watched.index, &record.meta) {
                    continue;
                }
                if watched.prev_id.is_some() && watched.prev_id == record.id {
                    // The origin knew this item.
                    continue;
                }
                if watched.prev_id.is_some() && watched.prev_id != record.prev && repeatable {
                    return Ok(retry());
                }
                match item_event::response_parts(event, item, &body) {
                    Some((status, headers, body)) => {
                        let published = published_response(response.headers, status, headers, body);
                        return Ok(HoldOutcome::Done(published));
                    }
                    None if repeatable => return Ok(retry()),
                    None => {}
                }
            }
            subs.seek(watched.slot, Start::After(watched.position));
        }
    }
    Ok(HoldOutcome::Done(OriginResponse { body: OriginBody::Bytes(body), ..response }.into_response()))
}

/// The response of an item. Header fields that it does not set are those of the origin's response.
fn published_response(
    mut defaults: HeaderMap,
    status: StatusCode,
    headers: HeaderMap,
    body: Vec<u8>,
) -> Response<AxumBody> {
    defaults.remove(header::CONTENT_LENGTH);
    for name in headers.keys() {
        defaults.remove(name);
    }
    defaults.extend(headers);
    let mut response = Response::new(AxumBody::from(body));
    (*response.status_mut(), *response.headers_mut()) = (status, defaults);
    response
}

/// Counts the subscriptions of a hold in the metrics until it is dropped.
struct CountedSubscriptions<'a>(&'a Metrics, i64);

impl<'a> CountedSubscriptions<'a> {
    fn new(metrics: &'a Metrics, subs: &Subscriptions) -> Self {
        let count = subs.len() as i64;
        metrics.subscriptions[Transport::Poll].add(count);
        CountedSubscriptions(metrics, count)
    }
}

impl Drop for CountedSubscriptions<'_> {
    fn drop(&mut self) {
        self.0.subscriptions[Transport::Poll].add(-self.1);
    }
}
