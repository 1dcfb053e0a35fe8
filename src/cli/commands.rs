//! The client commands. Those that need more than requests and responses have modules of their own.

use std::{borrow::Cow, time::Duration};

use http::Method;
use serde::Deserialize;
use serde_json::value::RawValue;
use tokio::io::AsyncReadExt as _;

use super::{
    args::{ChannelsCommand, ClientCommand, ConnectionsCommand, ConsumersCommand, List, Remote, Which},
    client::{NodeClient, RESPONSE_TIMEOUT},
    doctor, provide, publish,
    request_target::RequestTarget,
    sse,
};
use crate::{
    duration,
    terminal::{Failure, ObjectList, Output, note},
};

/// Timeout of a call without a timeout of its own: the node's configuration decides, and its default maximum is 10 minutes.
const CALL_TIMEOUT: Duration = Duration::from_secs(15 * 60);

pub(super) async fn run(command: ClientCommand, out: &mut Output) -> Result<(), Failure> {
    match command {
        ClientCommand::Publish { remote, channel, data, lines, kind, key, from } => {
            let mut client = NodeClient::new(&remote)?;
            let fields = publish::EventFields { channel: &channel, kind: kind.as_deref(), from: from.as_deref() };
            match lines {
                true => publish::lines(&mut client, fields, out).await,
                false => {
                    let data = match data.as_deref() {
                        Some(data) => Some(argument(data).await?),
                        None => None,
                    };
                    publish::one(&mut client, fields, key.as_deref(), data.as_deref(), out).await
                }
            }
        }
        ClientCommand::Tail { remote, channels, last, after, kinds, count, present } => {
            let target = RequestTarget::new("/v1/sse").each("channel", &channels).each("type", &kinds);
            let target = target.each("last", last).each("after", after).each("present", present);
            sse::tail(&mut NodeClient::new(&remote)?, &target, count, out).await
        }
        ClientCommand::Read { remote, channels, last, after, kinds, limit, all, wait, consumer, commit } => {
            let target = RequestTarget::new("/v1/events").each("channel", &channels).each("type", &kinds);
            let target = target.each("limit", limit).each("wait", wait.map(duration::format));
            let target = target.each("consumer", consumer).each("commit", commit.then_some("auto"));
            let first = target.clone().each("last", last).each("after", after);
            read(&mut NodeClient::new(&remote)?, first, &target, all, RESPONSE_TIMEOUT + wait.unwrap_or_default(), out)
                .await
        }
        ClientCommand::Call { remote, method, params, timeout } => {
            if !method.contains('/') {
                return Err(Failure::Usage(format!("{method:?} is not a method: write SERVICE/METHOD")));
            }
            let body = match params {
                Some(params) => argument(&params).await?.into_owned().into_bytes(),
                None => Vec::new(),
            };
            if !body.is_empty() && serde_json::from_slice::<&RawValue>(&body).is_err() {
                return Err(Failure::Usage("the params are not JSON".into()));
            }
            let target =
                RequestTarget::new("/v1/services/").path(&method).each("timeout", timeout.map(duration::format));
            let limit = timeout.map_or(CALL_TIMEOUT, |timeout| timeout + RESPONSE_TIMEOUT);
            let body = (!body.is_empty()).then_some(body);
            print(NodeClient::new(&remote)?.fetch(Method::POST, &target, body, limit).await?, out)
        }
        ClientCommand::Provide(args) => provide::provide(&NodeClient::new(&args.remote)?, &args).await,
        ClientCommand::Services { remote, prefix } => list(&remote, "services", named("services", prefix), out).await,
        ClientCommand::Presence { remote, channel, count } => {
            let target = RequestTarget::new("/v1/presence").query("channel", channel);
            match count {
                true => execute(&remote, Method::GET, &target.query("count", true), None, out).await,
                false => list(&remote, "members", target, out).await,
            }
        }
        ClientCommand::Connections { list: default, command } => {
            connections(command.unwrap_or(ConnectionsCommand::List(default)), out).await
        }
        ClientCommand::Channels { list: default, command } => {
            channels(command.unwrap_or(ChannelsCommand::List(default)), out).await
        }
        ClientCommand::Doctor { mut remote, node, redis, prefix, long } => {
            let mut report = doctor::Report::new(remote.json, out);
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
        ClientCommand::Consumers { list: default, command } => {
            consumers(command.unwrap_or(ConsumersCommand::List(default)), out).await
        }
    }
}

async fn connections(command: ConnectionsCommand, out: &mut Output) -> Result<(), Failure> {
    let target = RequestTarget::new("/v1/connections");
    match command {
        ConnectionsCommand::List(Which { remote, subject, channel }) => {
            let target = target.each("subject", subject).each("channel", channel);
            list(&remote, "connections", target, out).await
        }
        ConnectionsCommand::Kick { remote, subject, id } => {
            let target = target.each("subject", subject).each("id", id);
            execute(&remote, Method::DELETE, &target, None, out).await
        }
    }
}

/// A list of `/v1/{member}`, filtered by prefix.
fn named(member: &str, prefix: Option<String>) -> RequestTarget {
    RequestTarget::new(&format!("/v1/{member}")).each("prefix", prefix)
}

async fn channels(command: ChannelsCommand, out: &mut Output) -> Result<(), Failure> {
    let (remote, method, target) = match command {
        ChannelsCommand::List(List { remote, prefix }) => {
            return list(&remote, "channels", named("channels", prefix), out).await;
        }
        ChannelsCommand::Show { remote, channel } => {
            let target = RequestTarget::new("/v1/channels").query("channel", &channel);
            let info = NodeClient::new(&remote)?.fetch(Method::GET, &target, None, RESPONSE_TIMEOUT).await?;
            return match parse(info.as_deref()) {
                // The state of a channel that has neither events nor readers, such as one with a misspelled name.
                Ok(ShownChannel { epoch, readers: 0 }) if epoch == "0" => {
                    Err(Failure::Rejected(format!("there is no channel {channel}")))
                }
                _ => show(&remote, info, out),
            };
        }
        ChannelsCommand::Delete { remote, channel, before } => {
            let target = RequestTarget::new("/v1/events").query("channel", channel).each("before", before);
            (remote, Method::DELETE, target)
        }
    };
    execute(&remote, method, &target, None, out).await
}

/// What `channels show` needs of a channel.
#[derive(Deserialize)]
struct ShownChannel {
    epoch: String,
    readers: u32,
}

async fn consumers(command: ConsumersCommand, out: &mut Output) -> Result<(), Failure> {
    let one = |name: &str| RequestTarget::new("/v1/consumers/").segment(name);
    let (remote, method, target, body) = match command {
        ConsumersCommand::List(List { remote, prefix }) => {
            return list(&remote, "consumers", named("consumers", prefix), out).await;
        }
        ConsumersCommand::Show { remote, consumer } => {
            let consumer =
                NodeClient::new(&remote)?.fetch(Method::GET, &one(&consumer), None, RESPONSE_TIMEOUT).await?;
            return show(&remote, consumer, out);
        }
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
    execute(&remote, method, &target, body, out).await
}

/// One page of `GET /v1/events`. Events and gaps are printed unmodified.
#[derive(Deserialize)]
struct EventsPage<'a> {
    #[serde(borrow)]
    events: Vec<&'a RawValue>,
    next: String,
    more: bool,
    #[serde(borrow, default)]
    gaps: Vec<&'a RawValue>,
}

async fn read(
    client: &mut NodeClient,
    first: RequestTarget,
    base: &RequestTarget,
    all: bool,
    limit: Duration,
    out: &mut Output,
) -> Result<(), Failure> {
    let mut target = first;
    loop {
        let response = client.fetch(Method::GET, &target, None, limit).await?;
        let page: EventsPage<'_> = parse(response.as_deref())?;
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

/// Prints the entries of all pages of a list, which are in `member`.
async fn list(remote: &Remote, member: &str, base: RequestTarget, out: &mut Output) -> Result<(), Failure> {
    let mut client = NodeClient::new(remote)?;
    let mut listed = ObjectList::new(remote.json, out);
    let mut page: Option<String> = None;
    loop {
        let target = base.clone().each("page", page.as_deref());
        let response = client.fetch(Method::GET, &target, None, RESPONSE_TIMEOUT).await?;
        let members: std::collections::BTreeMap<Cow<'_, str>, &RawValue> = parse(response.as_deref())?;
        let entries: Vec<&RawValue> = parse(members.get(member).copied())?;
        entries.into_iter().try_for_each(|entry| listed.add(entry))?;
        if let Some(silent) = members.get("silent") {
            note(format_args!("nodes that did not respond: {silent}"));
        }
        page = match members.get("page") {
            Some(next) => parse(Some(next))?,
            None => None,
        };
        if page.is_none() {
            return listed.finish();
        }
    }
}

/// Prints one object like a list of it.
fn show(remote: &Remote, object: Option<Box<RawValue>>, out: &mut Output) -> Result<(), Failure> {
    let mut listed = ObjectList::new(remote.json, out);
    object.as_deref().map_or(Ok(()), |object| listed.add(object))?;
    listed.finish()
}

fn parse<'a, T: Deserialize<'a>>(response: Option<&'a RawValue>) -> Result<T, Failure> {
    let unexpected = || Failure::Failed("unexpected response; is this a weir node?".into());
    serde_json::from_str(response.ok_or_else(unexpected)?.get()).map_err(|_| unexpected())
}

fn print(response: Option<Box<RawValue>>, out: &mut Output) -> Result<(), Failure> {
    response.map_or(Ok(()), |response| out.json(&response))
}

/// Sends one request, and prints the body of its response.
async fn execute(
    remote: &Remote,
    method: Method,
    target: &RequestTarget,
    body: Option<Vec<u8>>,
    out: &mut Output,
) -> Result<(), Failure> {
    print(NodeClient::new(remote)?.fetch(method, target, body, RESPONSE_TIMEOUT).await?, out)
}

/// The URL of the configuration, so that a password need not be an argument.
fn redis_url() -> Result<String, Failure> {
    const NAME: &str = "WEIR__BUS__REDIS__URL";
    std::env::var(NAME)
        .map_err(|_| Failure::Usage(format!("the URL of Redis is missing: pass --redis URL, or set {NAME}")))
}

/// The argument, or the whole standard input if it is `-`.
async fn argument(text: &str) -> Result<Cow<'_, str>, Failure> {
    if text != "-" {
        return Ok(Cow::Borrowed(text));
    }
    let mut all = String::new();
    let read = tokio::io::stdin().read_to_string(&mut all).await;
    read.map_err(|error| Failure::Failed(format!("standard input: {error}")))?;
    Ok(Cow::Owned(all))
}
