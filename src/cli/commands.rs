//! The client commands that are one question and its answer, or a few.

use std::{borrow::Cow, time::Duration};

use http::Method;
use serde::Deserialize;
use serde_json::value::RawValue;
use tokio::io::AsyncReadExt as _;

use super::{
    Failure, Output, Target,
    args::{ChannelsCommand, ClientCommand, ConnectionsCommand, ConsumersCommand, List, Remote, Which},
    client::Client,
    doctor, note, provide, publish, sse,
};
use crate::duration;

/// How long an answer may take that should take no time.
pub const PATIENCE: Duration = Duration::from_secs(60);
/// A call that names no timeout has the node's, which can be set; beyond this nobody is there.
const LONG_CALL: Duration = Duration::from_secs(15 * 60);

pub async fn run(command: ClientCommand) -> Result<(), Failure> {
    let mut out = Output::new();
    let done = dispatch(command, &mut out).await;
    // What was printed before a failure counts.
    out.flush()?;
    done
}

async fn dispatch(command: ClientCommand, out: &mut Output) -> Result<(), Failure> {
    match command {
        ClientCommand::Publish { remote, channel, data, lines, kind, key, from } => {
            let mut client = client(&remote)?;
            let label = publish::Label { channel: &channel, kind: kind.as_deref(), from: from.as_deref() };
            match lines {
                true => publish::lines(&mut client, label, out).await,
                false => {
                    let data = match data.as_deref() {
                        Some(data) => Some(argument(data).await?),
                        None => None,
                    };
                    publish::one(&mut client, label, key.as_deref(), data.as_deref(), out).await
                }
            }
        }
        ClientCommand::Tail { remote, channels, last, after, kinds, count, present } => {
            let target = Target::new("/v1/sse").each("channel", &channels).each("type", &kinds);
            let target = target.maybe("last", last).maybe("after", after).maybe("present", present);
            sse::tail(&mut client(&remote)?, &target, count, out).await
        }
        ClientCommand::Read { remote, channels, last, after, kinds, limit, all, wait, consumer, commit } => {
            let target = Target::new("/v1/events").each("channel", &channels).each("type", &kinds);
            let target = target.maybe("limit", limit).maybe("wait", wait.map(duration::format));
            let target = target.maybe("consumer", consumer).maybe("commit", commit.then_some("auto"));
            let first = target.clone().maybe("last", last).maybe("after", after);
            read(&mut client(&remote)?, first, &target, all, PATIENCE + wait.unwrap_or_default(), out).await
        }
        ClientCommand::Call { remote, method, params, timeout } => {
            if !method.contains('/') {
                return Err(Failure::Usage(format!("{method:?} names no method: write SERVICE/METHOD")));
            }
            let body = match params {
                Some(params) => argument(&params).await?.into_owned().into_bytes(),
                None => Vec::new(),
            };
            if !body.is_empty() && serde_json::from_slice::<&RawValue>(&body).is_err() {
                return Err(Failure::Usage("params are not JSON".into()));
            }
            let target = Target::new("/v1/services/").path(&method).maybe("timeout", timeout.map(duration::format));
            let patience = timeout.map_or(LONG_CALL, |timeout| timeout + PATIENCE);
            let body = (!body.is_empty()).then_some(body);
            print(client(&remote)?.ask(Method::POST, &target, body, patience).await?, out)
        }
        ClientCommand::Provide { remote, service, concurrency, exclusive, timeout, command } => {
            let offer = provide::Offer { service, concurrency, exclusive, timeout, command };
            provide::provide(&client(&remote)?, &offer).await
        }
        ClientCommand::Services { remote, prefix } => {
            list(&mut client(&remote)?, "services", named("services", prefix), out).await
        }
        ClientCommand::Presence { remote, channel, count } => {
            let target = Target::new("/v1/presence").query("channel", channel);
            match count {
                true => {
                    print(client(&remote)?.ask(Method::GET, &target.query("count", true), None, PATIENCE).await?, out)
                }
                false => list(&mut client(&remote)?, "members", target, out).await,
            }
        }
        ClientCommand::Connections { list: given, command } => {
            connections(command.unwrap_or(ConnectionsCommand::List(given)), out).await
        }
        ClientCommand::Channels { list: given, command } => {
            channels(command.unwrap_or(ChannelsCommand::List(given)), out).await
        }
        ClientCommand::Doctor { mut remote, node, redis, prefix, long } => {
            let mut report = doctor::Report::new(out);
            match redis {
                Some(url) => {
                    let url = if url.is_empty() { redis_url()? } else { url };
                    doctor::redis(&url, &prefix, &mut report).await?;
                }
                None => {
                    remote.url = node.unwrap_or(remote.url);
                    doctor::node(&remote, long, &mut report).await?;
                }
            }
            report.verdict()
        }
        ClientCommand::Consumers { list: given, command } => {
            consumers(command.unwrap_or(ConsumersCommand::List(given)), out).await
        }
    }
}

async fn connections(command: ConnectionsCommand, out: &mut Output) -> Result<(), Failure> {
    let target = Target::new("/v1/connections");
    match command {
        ConnectionsCommand::List(Which { remote, subject, channel }) => {
            let target = target.maybe("subject", subject).maybe("channel", channel);
            list(&mut client(&remote)?, "connections", target, out).await
        }
        ConnectionsCommand::Kick { remote, subject, id } => {
            let target = target.maybe("subject", subject).maybe("id", id);
            print(client(&remote)?.ask(Method::DELETE, &target, None, PATIENCE).await?, out)
        }
    }
}

/// `/v1/{what}`, of names that begin so.
fn named(what: &str, prefix: Option<String>) -> Target {
    Target::new(&format!("/v1/{what}")).maybe("prefix", prefix)
}

async fn channels(command: ChannelsCommand, out: &mut Output) -> Result<(), Failure> {
    let (remote, method, target) = match command {
        ChannelsCommand::List(List { remote, prefix }) => {
            return list(&mut client(&remote)?, "channels", named("channels", prefix), out).await;
        }
        ChannelsCommand::Show { remote, channel } => {
            (remote, Method::GET, Target::new("/v1/channels").query("channel", channel))
        }
        ChannelsCommand::Delete { remote, channel, before } => {
            let target = Target::new("/v1/events").query("channel", channel).maybe("before", before);
            (remote, Method::DELETE, target)
        }
    };
    print(client(&remote)?.ask(method, &target, None, PATIENCE).await?, out)
}

async fn consumers(command: ConsumersCommand, out: &mut Output) -> Result<(), Failure> {
    let one = |name: &str| Target::new("/v1/consumers/").segment(name);
    let (remote, method, target, body) = match command {
        ConsumersCommand::List(List { remote, prefix }) => {
            return list(&mut client(&remote)?, "consumers", named("consumers", prefix), out).await;
        }
        ConsumersCommand::Show { remote, consumer } => (remote, Method::GET, one(&consumer), None),
        ConsumersCommand::Delete { remote, consumer } => (remote, Method::DELETE, one(&consumer), None),
        ConsumersCommand::Commit { remote, consumer, after, channels } => {
            let mut body = serde_json::json!({ "after": after });
            if !channels.is_empty() {
                body["channels"] = channels.into();
            }
            (remote, Method::POST, one(&consumer).path("/commit"), Some(body))
        }
        ConsumersCommand::Seek { remote, consumer, channel, after } => {
            let body = serde_json::json!({ "channel": channel, "after": after });
            (remote, Method::POST, one(&consumer).path("/seek"), Some(body))
        }
    };
    let body = body.map(|body| body.to_string().into_bytes());
    print(client(&remote)?.ask(method, &target, body, PATIENCE).await?, out)
}

/// One page of `GET /v1/events`. Its parts go out as they came.
#[derive(Deserialize)]
struct Page<'a> {
    #[serde(borrow)]
    events: Vec<&'a RawValue>,
    next: String,
    more: bool,
    #[serde(borrow, default)]
    gaps: Vec<&'a RawValue>,
}

async fn read(
    client: &mut Client,
    first: Target,
    base: &Target,
    all: bool,
    patience: Duration,
    out: &mut Output,
) -> Result<(), Failure> {
    let mut target = first;
    loop {
        let answer = client.ask(Method::GET, &target, None, patience).await?;
        let page: Page<'_> = parse(answer.as_deref())?;
        for gap in &page.gaps {
            note(format_args!("gap: {gap}"));
        }
        for event in &page.events {
            out.json(event)?;
        }
        out.flush()?;
        if !all || !page.more {
            note(format_args!("next: {}{}", page.next, if page.more { " (there is more)" } else { "" }));
            return Ok(());
        }
        target = base.clone().query("after", &page.next);
    }
}

/// Prints what every page calls `what`.
async fn list(client: &mut Client, what: &str, base: Target, out: &mut Output) -> Result<(), Failure> {
    let mut page: Option<String> = None;
    loop {
        let target = base.clone().maybe("page", page.as_deref());
        let answer = client.ask(Method::GET, &target, None, PATIENCE).await?;
        let members: std::collections::BTreeMap<Cow<'_, str>, &RawValue> = parse(answer.as_deref())?;
        let entries: Vec<&RawValue> = parse(members.get(what).copied())?;
        for entry in entries {
            out.json(entry)?;
        }
        out.flush()?;
        if let Some(silent) = members.get("silent") {
            note(format_args!("nodes that did not answer: {silent}"));
        }
        page = match members.get("page") {
            Some(next) => parse(Some(next))?,
            None => None,
        };
        if page.is_none() {
            return Ok(());
        }
    }
}

fn parse<'a, T: Deserialize<'a>>(answer: Option<&'a RawValue>) -> Result<T, Failure> {
    let unexpected = || Failure::Failed("not the answer that a weir gives".into());
    serde_json::from_str(answer.ok_or_else(unexpected)?.get()).map_err(|_| unexpected())
}

fn print(answer: Option<Box<RawValue>>, out: &mut Output) -> Result<(), Failure> {
    answer.map_or(Ok(()), |answer| out.json(&answer))
}

pub fn client(remote: &Remote) -> Result<Client, Failure> {
    Client::new(remote.url.clone(), remote.token.as_deref()).map_err(Failure::Usage)
}

/// Where a password need not be typed.
fn redis_url() -> Result<String, Failure> {
    const NAME: &str = "WEIR__BUS__REDIS__URL";
    std::env::var(NAME).map_err(|_| Failure::Usage(format!("which Redis? say --redis URL, or set {NAME}")))
}

/// An argument, or all of standard input for `-`.
async fn argument(text: &str) -> Result<Cow<'_, str>, Failure> {
    if text != "-" {
        return Ok(Cow::Borrowed(text));
    }
    let mut all = String::new();
    let read = tokio::io::stdin().read_to_string(&mut all).await;
    read.map_err(|error| Failure::Failed(format!("standard input: {error}")))?;
    Ok(Cow::Owned(all))
}
