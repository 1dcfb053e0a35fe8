//! One channel: what there is, whether it may be imported, and its events.

use std::{sync::Arc, time::Duration};

use serde::Deserialize;
use serde_json::value::RawValue;

use super::{
    Carried, Progress, Target, failed,
    source::{Bounds, Source},
};
use crate::{
    bus::ReadLimit,
    channel::Channel,
    cli::Failure,
    compat::ganomede::VOID,
    event::{Draft, DraftParts, Event, EventData},
    position::{Epoch, Position, Start},
};

/// Events of one look at the source, and voids that are placed in one step.
const PAGE: usize = 500;
/// An id that is missing may be of an event that is being written, if those around it are so young.
const SETTLED: Duration = Duration::from_secs(60);
/// What an event is counted with in `keep.bytes`, beside its own.
const OVERHEAD: usize = 100;
const ONE: ReadLimit = ReadLimit { events: 1, bytes: 1 };

/// A channel of the source, on its way.
pub struct Course {
    pub channel: Channel,
    /// None if only ids were given.
    bounds: Option<Bounds>,
    /// The newest id that will be an offset.
    pub end: u64,
    /// The newest offset that weir has.
    at: u64,
}

/// Where a channel stands when all is there: cursors need it.
pub struct Stand {
    pub channel: Channel,
    pub epoch: Epoch,
    pub top: u64,
}

/// An event as the original keeps it.
#[derive(Deserialize)]
struct Stored<'a> {
    timestamp: u64,
    #[serde(rename = "type")]
    kind: String,
    from: String,
    #[serde(borrow)]
    data: Option<&'a RawValue>,
}

/// Looks at a channel on both sides. The inner error is a reason to import nothing at all.
pub async fn look(
    source: &mut Source,
    target: &Target,
    channel: Channel,
    counter: u64,
    allow_trim: bool,
) -> Result<Result<Course, String>, Failure> {
    let bounds = source.bounds(channel.as_str()).await?;
    // An id that was given and has no event may still get one. Without any event it is all that is known.
    let end = bounds.map_or(counter, |bounds| bounds.last);
    let info = target.past.inspect(&channel).await.map_err(|error| failed(&error))?;
    let course = Course { bounds, end, at: info.top, channel };
    if info.top > 0 && !course.is_ours(source, target).await? {
        return Ok(Err(format!(
            "{}: weir has events of its own there: delete them, or import under another prefix",
            course.channel
        )));
    }
    if !allow_trim && let Some(reason) = course.trimmed(source, target).await? {
        return Ok(Err(reason));
    }
    Ok(Ok(course))
}

/// Places what is missing.
pub async fn carry(
    source: &mut Source,
    target: &Target,
    mut course: Course,
    progress: &mut Progress,
) -> Result<(Carried, Option<Stand>), Failure> {
    let name = course.channel.as_str().to_owned();
    let mut carried = Carried { channel: name.clone(), ..Carried::default() };
    // What cannot be read has no time: it is as late as what is before it. Not 0: that is the clock of Redis itself.
    target.set_time(1);
    'pages: loop {
        let page = source.page(&name, course.at, PAGE).await?;
        if page.is_empty() {
            break;
        }
        for (id, stored) in page {
            let (draft, time) = match stored.as_deref().map(|stored| read(stored, target.event_limit)) {
                Some(Ok((draft, time))) => (Some(draft), Some(time)),
                Some(Err(reason)) => {
                    carried.unfit.push(format!("event {id}: {reason}"));
                    (None, None)
                }
                None => (None, None),
            };
            if let Some(time) = time {
                let young = target.bus.now().saturating_sub(time) < SETTLED.as_millis() as u64;
                if young && id > course.at + 1 && course.bounds.is_some_and(|bounds| id > bounds.first) {
                    carried.held_back = course.end.saturating_sub(course.at);
                    break 'pages;
                }
                target.set_time(time);
            }
            if id > course.at + 1 {
                carried.void += id - course.at - 1;
                course.void(target, id - 1).await?;
            }
            match draft {
                Some(draft) => {
                    course.place(target, vec![draft]).await?;
                    carried.events += 1;
                    progress.placed += 1;
                }
                None => {
                    carried.void += 1;
                    course.void(target, id).await?;
                }
            }
            progress.tell(&course, id);
        }
    }
    if course.bounds.is_none() && course.end > course.at {
        target.set_time(target.bus.now());
        carried.void += course.end - course.at;
        course.void(target, course.end).await?;
    }
    carried.top = course.at;
    let epoch = target.past.inspect(&course.channel).await.map_err(|error| failed(&error))?.epoch;
    if course.at == 0 || epoch.is_absent() {
        return Ok((carried, None));
    }
    // Before the first there was something once, and whoever asks for it hears that it is gone.
    let first = course.bounds.map_or(course.end + 1, |bounds| bounds.first);
    if first > 1 && course.at + 1 >= first {
        let before = Position { epoch, offset: first };
        target.past.remove(&course.channel, Some(before)).await.map_err(|error| failed(&error))?;
    }
    let stand = Stand { epoch, top: course.at, channel: course.channel };
    Ok((carried, Some(stand)))
}

/// An event for weir, and when it happened; or why weir cannot hold it.
fn read(stored: &str, limit: usize) -> Result<(Draft, u64), String> {
    let stored: Stored<'_> = serde_json::from_str(stored).map_err(|error| format!("unreadable: {error}"))?;
    let data = stored.data.map_or(EventData::None, EventData::Json);
    let parts = DraftParts { kind: Some(&stored.kind), from: Some(&stored.from), data, ..DraftParts::default() };
    let draft = Draft::new(parts, limit).map_err(|error| error.detail().to_owned())?;
    Ok((draft, stored.timestamp))
}

// === impl Course ===

impl Course {
    /// What would be done, if nobody writes any more.
    pub async fn plan(&self, source: &mut Source, event_limit: usize) -> Result<Carried, Failure> {
        let mut plan = Carried { channel: self.channel.as_str().to_owned(), ..Carried::default() };
        let mut at = self.at;
        loop {
            let page = source.page(&plan.channel, at, PAGE).await?;
            let Some((last, _)) = page.last() else { break };
            at = *last;
            for (id, stored) in &page {
                match stored.as_deref().map(|stored| read(stored, event_limit)) {
                    Some(Ok(_)) => plan.events += 1,
                    Some(Err(reason)) => plan.unfit.push(format!("event {id}: {reason}")),
                    None => {}
                }
            }
        }
        plan.top = at.max(self.end);
        plan.void = plan.top - self.at - plan.events;
        Ok(plan)
    }

    /// Whether what weir has is what an import of this source would have placed there.
    async fn is_ours(&self, source: &mut Source, target: &Target) -> Result<bool, Failure> {
        let name = self.channel.as_str();
        let at = self.at.min(self.end);
        let start = Start::AfterOffset(at.saturating_sub(1));
        let page = target.past.read(&self.channel, start, ONE, None).await.map_err(|error| failed(&error))?;
        let Some(event) = page.events.first().filter(|event| event.offset == at) else {
            // Of a channel that had lost all its events only the number is left.
            return Ok(self.bounds.is_none() && self.at >= self.end);
        };
        let stored = source.event(name, at).await?;
        Ok(match stored.as_deref().map(|stored| read(stored, target.event_limit)) {
            Some(Ok((draft, time))) => {
                let ours = draft.place(event.position(), event.time);
                event.time >= time && same(&ours, event)
            }
            Some(Err(_)) | None => is_void(event),
        })
    }

    /// What the rules of the target would let go of at once.
    async fn trimmed(&self, source: &mut Source, target: &Target) -> Result<Option<String>, Failure> {
        let Some(Bounds { first, count, .. }) = self.bounds else { return Ok(None) };
        let (name, keep) = (self.channel.as_str(), target.bus.topics().retention_of(&self.channel));
        let say = |key: &str, reason: String| {
            Some(format!("{name}: {reason}; raise keep.{key} in [[channels]], or let go of them with --allow-trim"))
        };
        if count > keep.count as u64 {
            return Ok(say("count", format!("of {count} events {} would be kept", keep.count)));
        }
        let (mut at, mut bytes, mut oldest) = (0, 0, None);
        loop {
            let page = source.page(name, at, PAGE).await?;
            let Some((last, _)) = page.last() else { return Ok(None) };
            at = *last;
            for (draft, time) in page.iter().filter_map(|(_, stored)| read(stored.as_deref()?, target.event_limit).ok())
            {
                bytes += draft.size() + OVERHEAD;
                oldest.get_or_insert(time);
            }
            if let Some(age) = oldest.map(|time| Duration::from_millis(target.bus.now().saturating_sub(time)))
                && age > keep.age
            {
                let hours = |age: Duration| age.as_secs().div_ceil(3600);
                let reason =
                    format!("of {first} to {at} some are {} hours old, {} are kept", hours(age), hours(keep.age));
                return Ok(say("age", reason));
            }
            if bytes > keep.bytes {
                return Ok(say("bytes", format!("it has more than the {} bytes that are kept", keep.bytes)));
            }
        }
    }

    /// Places events at the next offsets.
    async fn place(&mut self, target: &Target, drafts: Vec<Draft>) -> Result<(), Failure> {
        let drafts: Vec<_> = drafts.into_iter().map(|draft| (self.channel.clone(), draft)).collect();
        let count = drafts.len() as u64;
        let placed = target.past.publish("", drafts).await.map_err(|failure| failed(&failure.error))?;
        let first = placed.first().ok_or_else(|| Failure::Failed("nothing was placed".into()))?;
        if first.position.offset != self.at + 1 {
            return Err(Failure::Failed(format!(
                "{}: somebody else publishes there: stop it, delete the channel and run the import again",
                self.channel
            )));
        }
        self.at += count;
        Ok(())
    }

    /// Fills the offsets up to `last`.
    async fn void(&mut self, target: &Target, last: u64) -> Result<(), Failure> {
        let parts = DraftParts { kind: Some(VOID), ..DraftParts::default() };
        let void = Draft::own(parts, target.event_limit).map_err(|error| failed(&error))?;
        while self.at < last {
            let count = usize::try_from(last - self.at).unwrap_or(PAGE).min(PAGE);
            self.place(target, vec![void.clone(); count]).await?;
        }
        Ok(())
    }
}

fn is_void(event: &Arc<Event>) -> bool {
    event.kind_json().is_some_and(|kind| kind.trim_matches('"') == VOID)
}

/// Whether both say the same.
fn same(one: &Event, other: &Event) -> bool {
    one.kind_json() == other.kind_json() && one.from_json() == other.from_json() && one.data_json() == other.data_json()
}
