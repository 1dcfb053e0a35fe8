//! `POST /events` and `GET /latest`.

use std::{collections::VecDeque, sync::Arc};

use serde_json::value::RawValue;

use super::{
    Ganomede, Given,
    poll::{channel, limit},
    wire::{self, Refusal, is_void},
};
use crate::{
    bus::{LogPage, ReadLimit},
    channel::{Channel, check_label},
    compat::{form::Form, publish::publish},
    error::Error,
    event::{Draft, DraftParts, Event, EventData, check_kind},
    position::Start,
};

/// Bytes of the events of one answer that names their number and not their size.
const MAX_LATEST: usize = 8 << 20;

impl Ganomede {
    /// Publishes one event, and shows it as it is stored.
    pub(super) async fn emit(&self, given: &Given<'_>) -> Result<Vec<u8>, Refusal> {
        if given.text("clientId").is_none() {
            return Err(Refusal::invalid("Invalid Client ID"));
        }
        let name = given.text("channel");
        let channel = name.as_deref().and_then(|name| channel(name).filter(|channel| channel.writable().is_ok()));
        let channel = channel.ok_or_else(|| Refusal::invalid("Invalid Channel"))?;
        let from = given.text("from").filter(|from| check_label("from", from).is_ok());
        let from = from.ok_or_else(|| Refusal::invalid("Invalid from"))?;
        let kind = given.text("type").filter(|kind| check_kind(kind).is_ok());
        let kind = kind.ok_or_else(|| Refusal::invalid("Invalid type"))?;
        let data = given.data()?.map_or(EventData::None, EventData::Json);
        let parts = DraftParts { kind: Some(&kind), from: Some(&from), data, ..DraftParts::default() };
        let draft = Draft::new(parts, self.node.config.limits.event)?;
        let stored = draft.clone();
        let placed = publish(&self.node, vec![(channel, draft)]).await?;
        let placed = placed.first().ok_or_else(|| Error::internal("a backend placed nothing and did not fail"))?;
        let mut out = Vec::with_capacity(stored.size() + 96);
        wire::event(&stored.place(placed.position, placed.time), &mut out);
        Ok(out)
    }

    /// The newest events, oldest first.
    pub(super) async fn latest(&self, query: &Form<'_>) -> Result<Vec<u8>, Refusal> {
        let channel = query.text("channel").and_then(channel).ok_or_else(|| Refusal::invalid("Invalid Channel"))?;
        let limit = limit(query, self.node.config.limits.page_events);
        let events = self.newest(&channel, limit, MAX_LATEST).await?;
        Ok(wire::array(events.iter().map(|event| &**event)))
    }

    /// At most `count` of the newest events, and at most `bytes` of them but for one.
    async fn newest(&self, channel: &Channel, count: usize, bytes: usize) -> Result<Vec<Arc<Event>>, Error> {
        let mut last = count;
        loop {
            let (events, void) = self.newest_of(channel, last, count, bytes).await?;
            if last >= count + void {
                return Ok(events);
            }
            // Some only keep a place: as many more are looked at.
            last = count + void;
        }
    }

    /// Of the `last` places; also says how many of them only keep a place.
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

impl<'a> Given<'a> {
    /// `data`, which is an object or an array if it is there at all.
    fn data(&self) -> Result<Option<&'a RawValue>, Refusal> {
        let invalid = || Refusal::invalid("Invalid data");
        match self {
            Given::Nothing => Ok(None),
            // A text, or something of brackets that the original would take for an object: no form says what JSON does.
            Given::Form(form) if form.has("data") => Err(invalid()),
            Given::Form(_) => Ok(None),
            Given::Json(members) => match members.get("data") {
                Some(data) if data.get().starts_with(['{', '[']) => Ok(Some(data)),
                Some(_) => Err(invalid()),
                None => Ok(None),
            },
        }
    }
}
