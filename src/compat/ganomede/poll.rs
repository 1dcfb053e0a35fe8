//! `GET /events`: long-polls, and the positions of clients.
//!
//! An id does not contain the epoch of its channel. Two rules prevent that a client whose id is from an earlier epoch
//! (the memory backend was restarted, the channel was deleted) misses events:
//!
//! * the cursor that weir stores has an epoch: if it is not the channel's, the client gets all events of the channel;
//! * an `after` that is ahead of the channel is handled as by the original, but if it is repeated, the client also gets
//!   all events.

use axum::http::request::Parts as Head;
use tokio::time::Instant;

use super::{
    context::Ganomede,
    wire::{self, GanomedeError, is_void},
};
use crate::{
    auth::{Identity, MAX_CONSUMER},
    bus::{Format, GapReason, LogPage, ReadLimit, Subscriptions},
    channel::Channel,
    compat::form::Form,
    error::Error,
    metrics::Transport,
    net::server::PeerAddr,
    position::{Position, Start},
    sessions,
    transport::reading::EventWait,
};

/// The default of `limit`, as in the published version of the original.
const DEFAULT_LIMIT: u64 = 100;
/// `Number.MAX_SAFE_INTEGER` of JavaScript.
const MAX_SAFE: u64 = (1 << 53) - 1;

/// The page that a poll has read, and where it waits.
struct PollState {
    page: LogPage,
    /// The client's `after`, if it is ahead of the channel.
    ahead: Option<u64>,
}

impl Ganomede {
    pub(super) async fn poll(
        &self,
        head: &Head,
        identity: &Identity,
        query: &Form<'_>,
    ) -> Result<Vec<u8>, GanomedeError> {
        let client = query.text("clientId").filter(|client| !client.is_empty()).and_then(consumer);
        let client = client.ok_or_else(|| GanomedeError::invalid("Invalid Client ID"))?;
        let channel =
            query.text("channel").and_then(channel).ok_or_else(|| GanomedeError::invalid("Invalid Channel"))?;
        let _ = identity.may_consume(&client)?;
        let _ = identity.may_subscribe(&channel)?;
        let after = query.has("after").then(|| whole(query.text("after").unwrap_or_default()).unwrap_or(0));
        let limits = &self.node.config.limits;
        let limit = ReadLimit { events: limit(query, limits.page_events), bytes: limits.page_bytes };

        let mut place = self.place(&client, &channel, after, limit).await?;
        let epoch = place.page.next.epoch;
        if place.page.events.is_empty() && !self.config.poll_timeout.is_zero() {
            let mut listed = self.node.sessions.register_read(identity, PeerAddr::of(head), vec![channel.clone()]);
            tokio::select! {
                biased;
                waited = self.wait(&channel, &mut place, limit) => waited?,
                code = listed.kicked() => return Err(sessions::closed(code).into()),
            }
        }
        let next = place.page.next;
        if next.epoch != epoch && !place.page.events.is_empty() {
            // The channel was created during the wait: the cursor gets its epoch.
            self.node.bus.seek(&client, &channel, Position { offset: 0, ..next }).await?;
        }
        let events = &place.page.events;
        let out = wire::array(events.iter().map(|event| &**event));
        if !events.is_empty() {
            self.node.metrics.events_delivered(Transport::Poll, events.len() as u64, out.len() as u64);
        }
        Ok(out)
    }

    /// Reads a page without void events.
    async fn read(&self, channel: &Channel, start: Start, limit: ReadLimit) -> Result<LogPage, Error> {
        let mut page = self.node.bus.read(channel, start, limit, None).await?;
        loop {
            page.events.retain(|event| !is_void(event));
            if !page.events.is_empty() || !page.more {
                return Ok(page);
            }
            let gap = page.gap.take();
            page = self.node.bus.read(channel, Start::After(page.next), limit, None).await?;
            page.gap = gap.or(page.gap);
        }
    }

    /// Moves the cursor to the client's `after`, if it sends one, and reads a page from there.
    async fn place(
        &self,
        client: &str,
        channel: &Channel,
        after: Option<u64>,
        limit: ReadLimit,
    ) -> Result<PollState, Error> {
        let bus = &self.node.bus;
        let kept = bus.cursor(client, channel).await?;
        let start = match (after, kept) {
            (Some(after), _) => Start::AfterOffset(after),
            (None, Some(kept)) => Start::After(kept),
            (None, None) => Start::Earliest,
        };
        let mut page = self.read(channel, start, limit).await?;
        let epoch = page.next.epoch;
        let said = match (after, kept) {
            (Some(after), _) => Position { epoch, offset: after },
            (None, Some(kept)) => kept,
            (None, None) => return Ok(PollState { page, ahead: None }),
        };
        if epoch.is_absent() {
            // The channel does not exist: its first event will be new to the client.
            if after.is_some() {
                bus.seek(client, channel, page.next).await?;
            }
            return Ok(PollState { page, ahead: None });
        }
        let elsewhere = kept.is_some_and(|kept| kept.epoch != epoch);
        let mut ahead = is_ahead(&page).then_some(said.offset);
        let repeats = ahead.is_some() && kept == Some(said);
        if elsewhere || repeats {
            page = self.read(channel, Start::Earliest, limit).await?;
            ahead = None;
            bus.seek(client, channel, Position { epoch: page.next.epoch, offset: 0 }).await?;
        } else if after.is_some() {
            bus.seek(client, channel, said).await?;
        }
        Ok(PollState { page, ahead })
    }

    /// Waits for an event, and reads a page.
    async fn wait(&self, channel: &Channel, place: &mut PollState, limit: ReadLimit) -> Result<(), Error> {
        let bus = &self.node.bus;
        let mut subscriptions = Subscriptions::new(Format::NONE);
        let start = match place.ahead {
            Some(_) => Start::Now,
            None => Start::After(place.page.next),
        };
        let mut slot = None;
        for watch in bus.watch(std::slice::from_ref(channel)).await? {
            slot = Some(subscriptions.add(watch, start, None).slot);
        }
        let wait = EventWait::new(Instant::now() + self.config.poll_timeout, &self.node.draining);
        while place.page.events.is_empty() && wait.changed(&mut subscriptions).await {
            if let Some(after) = place.ahead {
                let page = self.read(channel, Start::AfterOffset(after), limit).await?;
                if !is_ahead(&page) {
                    place.page = page;
                }
                return Ok(());
            }
            place.page = self.read(channel, Start::After(place.page.next), limit).await?;
            if let Some(slot) = slot {
                subscriptions.seek(slot, Start::After(place.page.next));
            }
        }
        Ok(())
    }
}

/// Whether the requested position is ahead of the channel.
fn is_ahead(page: &LogPage) -> bool {
    page.gap.as_ref().is_some_and(|gap| gap.reason == GapReason::BadPosition)
}

/// The channel of that name, if it is valid in weir. The original accepts any name.
pub(super) fn channel(name: &str) -> Option<Channel> {
    Channel::parse(name).ok()
}

/// `limit`, at most `most`. Anything but a canonical number means the default.
pub(super) fn limit(query: &Form<'_>, most: usize) -> usize {
    let limit = query.text("limit").and_then(whole).filter(|limit| *limit > 0).unwrap_or(DEFAULT_LIMIT);
    usize::try_from(limit).unwrap_or(most).min(most)
}

/// A canonical whole number.
fn whole(text: &str) -> Option<u64> {
    let plain = !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
    let canonical = plain && (text == "0" || !text.starts_with('0'));
    text.parse().ok().filter(|number| canonical && *number <= MAX_SAFE)
}

/// The consumer that stores the positions of a `clientId`. It has the same name, except that bytes that a consumer's
/// name cannot contain are written `..` and two hexadecimal digits.
pub(super) fn consumer(client: &str) -> Option<String> {
    let bytes = client.as_bytes();
    let mut name = String::with_capacity(client.len());
    for (at, byte) in bytes.iter().enumerate() {
        let hex = |at: usize| bytes.get(at).is_some_and(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'));
        // Escaped as well, so that no two names have the same encoding.
        let ambiguous = *byte == b'.' && bytes.get(at + 1) == Some(&b'.') && hex(at + 2) && hex(at + 3);
        match byte {
            b'A'..=b'Z' | b'a'..=b'z' | b'0'..=b'9' | b'.' | b'_' | b':' | b'-' if !ambiguous => {
                name.push(*byte as char)
            }
            byte => name.push_str(&format!("..{byte:02x}")),
        }
    }
    (!name.is_empty() && name.len() <= MAX_CONSUMER).then_some(name)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn numbers_are_canonical() {
        for (text, number) in
            [("0", Some(0)), ("17", Some(17)), ("9007199254740991", Some(MAX_SAFE)), ("9007199254740992", None)]
        {
            assert_eq!(whole(text), number, "{text}");
        }
        for text in ["", " 2", "2x", "1.5", "-1", "+1", "01", "1e3", "99999999999999999999"] {
            assert_eq!(whole(text), None, "{text:?}");
        }
        let limited = |text| limit(&Form::parse(text), 1000);
        assert_eq!([limited(""), limited("limit=0"), limited("limit=3"), limited("limit=5000")], [100, 100, 3, 1000]);
    }

    #[test]
    fn consumers_have_the_names_of_clients() {
        assert_eq!(consumer("mailer-1:a.b_C").unwrap(), "mailer-1:a.b_C");
        assert_eq!(consumer("coordinator/v1").unwrap(), "coordinator..2fv1");
        assert_eq!(consumer("a..2fb").unwrap(), "a..2e.2fb");
        assert_eq!(consumer(&"x".repeat(129)), None);
    }

    proptest! {
        /// Every name decodes to that of its client, so no two clients share a position.
        #[test]
        fn every_client_has_its_own_consumer(client in "[a-f0-9./é]{1,12}") {
            let name = consumer(&client).unwrap();
            let (mut read, mut rest) = (Vec::new(), name.as_bytes());
            while let Some((first, more)) = rest.split_first() {
                let escaped = rest.strip_prefix(b"..").and_then(|rest| rest.get(..2));
                let byte = escaped.and_then(|hex| u8::from_str_radix(std::str::from_utf8(hex).unwrap(), 16).ok());
                let byte = byte.filter(|_| !escaped.unwrap_or_default().contains(&b'+'));
                (rest, _) = (if byte.is_some() { &rest[4..] } else { more }, read.push(byte.unwrap_or(*first)));
            }
            prop_assert_eq!(String::from_utf8(read).unwrap(), client);
        }
    }
}
