//! `weir import ganomede`: from the Redis of ganomede-events into that of weir.
//!
//! The source is only read. An event keeps its id, which becomes its offset, and its time; where the original had none of an
//! id, an event of type `weir.void` stands, which ganomede's clients do not see. Nothing is kept of how far an import got:
//! what weir has of a channel says so itself, and whether that is an import of ours says its newest event.

mod channel;
mod source;

use std::{
    collections::BTreeMap,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use serde::Serialize;

use self::{
    channel::{Course, Stand},
    source::{Source, Survey},
};
use super::{Failure, args::ImportGanomede, note, output::Output};
use crate::{
    app,
    bus::{Bus, Retention, WallClock},
    channel::Channel,
    compat::ganomede::{Indices, consumer},
    config::{Adapter, Backend, Config},
    error::{Code, Error},
    metrics::Metrics,
    position::Position,
};

/// What no channel has: the past is imported as it is, whatever is kept of it then.
const EVERYTHING: Retention =
    Retention { count: 1 << 40, age: Duration::from_secs(200 * 365 * 24 * 60 * 60), bytes: 1 << 46 };

/// How often progress is told.
const TELL: Duration = Duration::from_secs(2);

/// Where to.
struct Target {
    /// The bus as nodes use it.
    bus: Arc<Bus>,
    /// The same, where it is as late as `clock` says, and where nothing is let go.
    past: Bus,
    clock: Arc<AtomicU64>,
    /// The largest event, in bytes.
    event_limit: usize,
}

/// What became of a channel.
#[derive(Debug, Default, Serialize)]
struct Carried {
    pub channel: String,
    /// Placed by this run, or by one that is only thought of.
    pub events: u64,
    /// Ids that the original had no event of, and those below.
    pub void: u64,
    /// Events that weir cannot hold, and why not.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub unfit: Vec<String>,
    /// The newest offset now.
    pub top: u64,
    /// Left for the next run: an event that is being written may be missing between these.
    #[serde(skip_serializing_if = "is_zero")]
    pub held_back: u64,
}

/// The rest.
#[derive(Debug, Default, Serialize)]
struct Rest {
    cursors: u64,
    indices: u64,
    /// Of channels that there are no events of.
    cursors_without_channel: u64,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    unfit: Vec<String>,
}

/// Tells somebody who waits.
struct Progress {
    told: Instant,
    pub placed: u64,
    began: Instant,
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde asks so")]
fn is_zero(n: &u64) -> bool {
    *n == 0
}

/// Imports everything into the bus of `config`, or refuses before anything is written.
pub async fn ganomede(given: &ImportGanomede, config: Config, out: &mut Output) -> Result<(), Failure> {
    let target = Target::open(config).await?;
    let mut source = Source::open(&given.from).await?;
    let survey = source.survey().await?;
    note(format_args!(
        "found {} channels, {} cursors, {} indices",
        survey.channels.len(),
        survey.cursors.len(),
        survey.indices.len()
    ));
    import(given, &mut source, &survey, &target, out).await
}

async fn import(
    given: &ImportGanomede,
    source: &mut Source,
    survey: &Survey,
    target: &Target,
    out: &mut Output,
) -> Result<(), Failure> {
    let mut courses = Vec::new();
    let mut refused = Vec::new();
    let mut unfit = Vec::new();
    for (name, counter) in &survey.channels {
        match Channel::parse(name).and_then(|channel| channel.writable().map(|()| channel)) {
            Ok(channel) => match channel::look(source, target, channel, *counter, given.allow_trim).await? {
                Ok(course) => courses.push(course),
                Err(reason) => refused.push(reason),
            },
            Err(error) => unfit.push(format!("channel {name:?}: {}", error.detail())),
        }
    }
    if !refused.is_empty() {
        return Err(Failure::Refused(format!("nothing was written:\n  {}", refused.join("\n  "))));
    }
    if given.dry_run {
        for course in &courses {
            let plan = course.plan(source, target.event_limit).await?;
            unfit.extend(plan.unfit.iter().map(|reason| format!("channel {}: {reason}", plan.channel)));
            out.line(&json(&plan)?)?;
            out.flush()?;
        }
        return all_fits(&unfit);
    }
    let mut progress = Progress { told: Instant::now(), placed: 0, began: Instant::now() };
    let mut stands: BTreeMap<String, Stand> = BTreeMap::new();
    let mut held_back = 0;
    for course in courses {
        let (carried, stand) = channel::carry(source, target, course, &mut progress).await?;
        unfit.extend(carried.unfit.iter().map(|reason| format!("channel {}: {reason}", carried.channel)));
        held_back += carried.held_back;
        out.line(&json(&carried)?)?;
        out.flush()?;
        stands.extend(stand.map(|stand| (carried.channel, stand)));
    }
    let rest = rest(survey, target, &stands).await?;
    unfit.append(&mut rest.unfit.clone());
    out.line(&json(&rest)?)?;
    out.flush()?;
    note(format_args!(
        "{} events, {} cursors, {} indices in {:.1}s",
        progress.placed,
        rest.cursors,
        rest.indices,
        progress.began.elapsed().as_secs_f32()
    ));
    if held_back > 0 {
        note(format_args!("{held_back} events are left for a second run: others may be missing before them still"));
    }
    all_fits(&unfit)
}

fn all_fits(unfit: &[String]) -> Result<(), Failure> {
    match unfit {
        [] => Ok(()),
        unfit => Err(Failure::Failed(format!("weir cannot hold all of it:\n  {}", unfit.join("\n  ")))),
    }
}

/// Cursors and definitions of indices. Both may be there already: a cursor only moves forward, a definition stays.
async fn rest(survey: &Survey, target: &Target, stands: &BTreeMap<String, Stand>) -> Result<Rest, Failure> {
    let mut rest = Rest::default();
    for (key, id) in &survey.cursors {
        let mut found = false;
        // The original does not tell client a:b of channel c from client a of channel b:c either.
        for (client, channel) in key.match_indices(':').map(|(at, _)| (&key[..at], &key[at + 1..])) {
            let Some(stand) = stands.get(channel) else { continue };
            found = true;
            let Some(consumer) = consumer(client) else {
                rest.unfit.push(format!("client {client:?}: its name is too long for a consumer"));
                continue;
            };
            let position = Position { epoch: stand.epoch, offset: (*id).min(stand.top) };
            if position.offset == 0 {
                // Where everybody begins.
                continue;
            }
            match target.bus.commit(&consumer, &stand.channel, position).await {
                Ok(()) => rest.cursors += 1,
                Err(error) if error.code() == Code::LimitReached => {
                    rest.unfit.push(format!("client {client:?}: {}", error.detail()));
                }
                Err(error) => return Err(failed(&error)),
            }
        }
        rest.cursors_without_channel += u64::from(!found);
    }
    let indices = Indices::new(target.bus.clone(), target.event_limit).map_err(|error| failed(&error))?;
    for index in &survey.indices {
        match indices.define(&index.id, &index.channel, &index.field).await {
            Ok(new) => rest.indices += u64::from(new),
            Err(error) if error.code() == Code::LimitReached => {
                rest.unfit.push(format!("index {:?}: {}", index.id, error.detail()));
            }
            Err(error) => return Err(failed(&error)),
        }
    }
    Ok(rest)
}

/// What the bus says, as commands say it.
fn failed(error: &Error) -> Failure {
    let reason = format!("{}; run it again: it goes on where it was", error.detail());
    match error.code() {
        Code::BusUnavailable | Code::Unconfirmed | Code::Overloaded => Failure::Unavailable(reason),
        _ => Failure::Failed(reason),
    }
}

fn json(value: &impl Serialize) -> Result<String, Failure> {
    serde_json::to_string(value).map_err(|error| Failure::Failed(error.to_string()))
}

impl Target {
    async fn open(mut config: Config) -> Result<Self, Failure> {
        if config.bus.backend == Backend::Memory {
            let reason = "bus.backend is memory, and what is imported there is gone with this process: the settings of the \
                          nodes are needed, with bus.backend = \"redis\" and bus.redis.url";
            return Err(Failure::Usage(reason.into()));
        }
        if !config.compat.enable.contains(&Adapter::Ganomede) {
            // Its definitions of indices are kept as they will be when it is.
            config.compat.enable.push(Adapter::Ganomede);
        }
        let away = |error: anyhow::Error| Failure::Unavailable(format!("{error:#}"));
        let metrics = Arc::new(Metrics::new());
        let topics = app::bus_config(&config);
        let clock = Arc::new(AtomicU64::new(0));
        let mut past = topics.clone();
        past.rules.clear();
        past.retention = EVERYTHING;
        let past = app::bus(&config, past, WallClock::Manual(clock.clone()), metrics.clone()).await.map_err(away)?;
        let bus = Arc::new(app::bus(&config, topics, WallClock::System, metrics).await.map_err(away)?);
        Ok(Target { bus, past, clock, event_limit: config.limits.event })
    }

    /// From here on it is so late in the past.
    fn set_time(&self, ms: u64) {
        self.clock.store(ms, Ordering::Relaxed);
    }
}

impl Progress {
    fn tell(&mut self, course: &Course, at: u64) {
        if self.told.elapsed() > TELL {
            self.told = Instant::now();
            let rate = self.placed as f64 / self.began.elapsed().as_secs_f64();
            note(format_args!("{}: {at} of {} ({rate:.0} events/s)", course.channel, course.end));
        }
    }
}
