//! `POST /events` and `GET /latest`.

use std::{collections::VecDeque, sync::Arc};

use super::{
    body::GanomedeBody,
    context::Ganomede,
    poll::{channel, limit},
    wire::{self, GanomedeError, is_void},
};
use crate::{
    auth::Identity,
    bus::{LogPage, ReadLimit},
    channel::{Channel, check_label},
    compat::{form::Form, publish::publish},
    error::Error,
    event::{Draft, DraftParts, Event, EventData, check_kind},
    position::Start,
};

/// Maximum size of the events of one response, in bytes. Clients limit their number only.
const MAX_LATEST: usize = 8 << 20;

impl Ganomede {
    /// Publishes one event. The response is the event as it is stored.
    pub(super) async fn emit(&self, identity: &Identity, body: &GanomedeBody<'_>) -> Result<Vec<u8>, GanomedeError> {
        if body.text("clientId").is_none() {
            return Err(GanomedeError::invalid("Invalid Client ID"));
        }
        let name = body.text("channel");
        let channel = name.as_deref().and_then(|name| channel(name).filter(|channel| channel.writable().is_ok()));
        let channel = channel.ok_or_else(|| GanomedeError::invalid("Invalid Channel"))?;
        let from = body.text("from").filter(|from| check_label("from", from).is_ok());
        let from = from.ok_or_else(|| GanomedeError::invalid("Invalid from"))?;
        let kind = body.text("type").filter(|kind| check_kind(kind).is_ok());
        let kind = kind.ok_or_else(|| GanomedeError::invalid("Invalid type"))?;
        let data = body.data()?.map_or(EventData::None, EventData::Json);
        let parts = DraftParts { kind: Some(&kind), from: Some(&from), data, ..DraftParts::default() };
        let draft = Draft::new(parts, self.node.config.limits.event)?;
        let stored = draft.clone();
        let placed = publish(&self.node, identity, vec![(channel, draft)]).await?;
        let placed = placed.first().ok_or_else(|| Error::internal("a backend placed nothing and did not fail"))?;
        let mut out = Vec::with_capacity(stored.size() + 96);
        wire::event(&stored.place(placed.position, placed.time), &mut out);
        Ok(out)
    }

    /// The newest events, oldest first.
    pub(super) async fn latest(&self, identity: &Identity, query: &Form<'_>) -> Result<Vec<u8>, GanomedeError> {
        let channel =
            query.text("channel").and_then(channel).ok_or_else(|| GanomedeError::invalid("Invalid Channel"))?;
        let _ = identity.may_subscribe(&channel)?;
        let limit = limit(query, self.node.config.limits.page_events);
        let events = self.newest(&channel, limit, MAX_LATEST).await?;
        Ok(wire::array(events.iter().map(|event| &**event)))
    }

    /// The newest events: at most `count`, and at most `bytes` unless it is one event.
    async fn newest(&self, channel: &Channel, count: usize, bytes: usize) -> Result<Vec<Arc<Event>>, Error> {
        let mut last = count;
        loop {
            let (events, void) = self.newest_of(channel, last, count, bytes).await?;
            if last >= count + void {
                return Ok(events);
            }
            // Void events are left out: read as many more.
            last = count + void;
        }
    }

    /// The newest of the `last` events, and the number of void events among these.
    async fn newest_of(
        &self,
        channel: &Channel,
        last: usize,
        count: usize,
        bytes: usize,
    ) -> Result<(Vec<Arc<Event>>, usize), Error> {
        let mut void = 0;
        let mut events = VecDeque::new();
        let mut held = 0;
        let mut start = Start::Last(last as u64);
        loop {
            let page = self.node.bus.read(channel, start, ReadLimit { events: count, bytes }, None).await?;
            let LogPage { events: read, next, more, .. } = page;
            for event in read {
                if is_void(&event) {
                    void += 1;
                    continue;
                }
                held += event.size();
                events.push_back(event);
                while events.len() > count || (held > bytes && events.len() > 1) {
                    held -= events.pop_front().map_or(0, |event: Arc<Event>| event.size());
                }
            }
            if !more {
                return Ok((events.into(), void));
            }
            start = Start::After(next);
        }
    }
}
