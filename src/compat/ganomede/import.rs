//! `weir import ganomede`: from the Redis of ganomede-events into that of weir.
//!
//! The source is only read. An event keeps its time and its id, which becomes its offset; an id without an event
//! becomes an event of type `weir.void`, which clients of ganomede do not see. No progress is stored: the newest event
//! of a channel in weir shows how far it was imported, and whether the channel is an import of this source.

mod args;
mod channel;
mod progress;
mod source;
mod target;

use std::collections::BTreeMap;

use clap::{Args as _, FromArgMatches as _};

use self::{
    args::ImportArgs,
    channel::{ChannelImport, ImportedLog},
    progress::{ImportProgress, ImportedCursors},
    source::{ImportSource, SourceSurvey},
    target::{ImportTarget, failed},
};
use super::{indices::Indices, poll::consumer};
use crate::{
    channel::Channel,
    compat::adapter::Importer,
    config::Config,
    error::Code,
    position::Position,
    terminal::{Failure, Output, note},
};

/// `weir import ganomede`.
pub(super) const IMPORTER: Importer = Importer {
    name: "ganomede",
    args: ImportArgs::augment_args,
    run: |matches, config, out| {
        Box::pin(async move {
            let args = ImportArgs::from_arg_matches(matches).map_err(|error| Failure::Usage(error.to_string()))?;
            import_all(&args, config, out).await
        })
    },
};

/// Imports everything into the bus of `config`, or fails before anything is written.
async fn import_all(args: &ImportArgs, config: Config, out: &mut Output) -> Result<(), Failure> {
    let target = ImportTarget::open(config).await?;
    let mut source = ImportSource::open(&args.from).await?;
    let survey = source.survey().await?;
    note(format_args!(
        "found {} channels, {} cursors, {} indices",
        survey.channels.len(),
        survey.cursors.len(),
        survey.indices.len()
    ));
    import(args, &mut source, &survey, &target, out).await
}

async fn import(
    args: &ImportArgs,
    source: &mut ImportSource,
    survey: &SourceSurvey,
    target: &ImportTarget,
    out: &mut Output,
) -> Result<(), Failure> {
    let mut imports = Vec::new();
    let mut rejected = Vec::new();
    let mut unfit = Vec::new();
    for (name, counter) in &survey.channels {
        match Channel::parse(name).and_then(|channel| channel.writable().map(|()| channel)) {
            Ok(channel) => match ChannelImport::prepare(source, target, channel, *counter, args.allow_trim).await? {
                Ok(one) => imports.push(one),
                Err(reason) => rejected.push(reason),
            },
            Err(error) => unfit.push(format!("channel {name:?}: {}", error.detail())),
        }
    }
    if !rejected.is_empty() {
        return Err(Failure::Rejected(format!("nothing was written:\n  {}", rejected.join("\n  "))));
    }
    if args.dry_run {
        for one in &imports {
            let plan = one.plan(source, target.event_limit).await?;
            unfit.extend(plan.unfit.iter().map(|reason| format!("channel {}: {reason}", plan.channel)));
            out.value(&plan)?;
        }
        return all_fits(&unfit);
    }
    let mut progress = ImportProgress::start();
    let mut logs: BTreeMap<String, ImportedLog> = BTreeMap::new();
    let mut held_back = 0;
    for one in imports {
        let (imported, log) = one.run(source, target, &mut progress).await?;
        unfit.extend(imported.unfit.iter().map(|reason| format!("channel {}: {reason}", imported.channel)));
        held_back += imported.held_back;
        out.value(&imported)?;
        logs.extend(log.map(|log| (imported.channel, log)));
    }
    let rest = import_cursors(survey, target, &logs).await?;
    unfit.append(&mut rest.unfit.clone());
    out.value(&rest)?;
    note(format_args!(
        "{} events, {} cursors, {} indices in {:.1}s",
        progress.placed,
        rest.cursors,
        rest.indices,
        progress.began.elapsed().as_secs_f32()
    ));
    if held_back > 0 {
        note(format_args!("{held_back} events are left for a second run: events before them may still be missing"));
    }
    all_fits(&unfit)
}

fn all_fits(unfit: &[String]) -> Result<(), Failure> {
    match unfit {
        [] => Ok(()),
        unfit => Err(Failure::Failed(format!("weir cannot store all of it:\n  {}", unfit.join("\n  ")))),
    }
}

/// Imports cursors and definitions of indices. Both may exist already: a cursor only moves forward, a definition stays.
async fn import_cursors(
    survey: &SourceSurvey,
    target: &ImportTarget,
    logs: &BTreeMap<String, ImportedLog>,
) -> Result<ImportedCursors, Failure> {
    let mut rest = ImportedCursors::default();
    for (key, id) in &survey.cursors {
        let mut found = false;
        // In ganomede-events client a:b of channel c and client a of channel b:c share one key.
        for (client, channel) in key.match_indices(':').map(|(at, _)| (&key[..at], &key[at + 1..])) {
            let Some(log) = logs.get(channel) else { continue };
            found = true;
            let Some(consumer) = consumer(client) else {
                rest.unfit.push(format!("client {client:?}: its name is too long for a consumer"));
                continue;
            };
            let position = Position { epoch: log.epoch, offset: (*id).min(log.top) };
            if position.offset == 0 {
                // The default.
                continue;
            }
            match target.bus.commit(&consumer, &log.channel, position).await {
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
