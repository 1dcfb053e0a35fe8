//! [`RetentionRules`]: how much the nodes together keep. Each node announces its rules every few seconds, and of a
//! channel the most is kept that any of them promises its readers: a node with smaller limits, as during an update,
//! trims no log of the others. Less is kept only after all have agreed for a minute.
//!
//! A task exchanges the rules, and nothing else waits for Redis here. A node that has not yet read the rules of others
//! places and removes no events, since it could trim theirs; its readers see what its own rules keep.

use std::{
    collections::BTreeMap,
    sync::Arc,
    time::{Duration, Instant},
};

use parking_lot::RwLock;
use redis::Cmd;
use tokio::{
    sync::watch,
    time::{sleep, timeout, timeout_at},
};

use super::context::{LogContext, millis};
use crate::{
    backend::redis::client::{CommandError, Deadline, OnLostReply, RedisConnection, Script, deadline},
    bus::{Retention, RetentionRule},
    channel::Channel,
    pattern::Pattern,
};

static RETENTION: Script = Script::new(include_str!("retention.lua"));

/// How often rules are announced.
const EVERY: Duration = Duration::from_secs(5);
/// How long an attempt may take: reads of a node that has just started wait for the first one.
const PATIENCE: Duration = Duration::from_secs(1);
/// Between two attempts to announce them.
const RETRY: Duration = Duration::from_millis(500);
/// Rules that were not announced for this long no longer count.
const FORGET: Duration = Duration::from_secs(60);

pub(super) struct RetentionRules {
    context: Arc<LogContext>,
    /// Random: the field of this node.
    node: String,
    own: String,
    /// The rules of other nodes that differ from this node's, by their text.
    others: RwLock<BTreeMap<String, OtherRules>>,
    exchanged: watch::Sender<Exchanged>,
}

/// What is known of the rules of other nodes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Exchanged {
    /// The first exchange is under way.
    Pending,
    /// No exchange has succeeded yet.
    Failed,
    Known,
}

struct OtherRules {
    /// The last pattern is `*`.
    rules: Vec<RetentionRule>,
    /// Since when no node has announced them.
    missing: Option<Instant>,
}

impl RetentionRules {
    pub(super) fn new(context: Arc<LogContext>) -> Self {
        let own = to_text(&context.topics.config().rules, context.topics.config().retention);
        let node = format!("{:016x}", fastrand::u64(..));
        // A bus with a clock of its own, as that of an import, is no node, and uses its own rules.
        let exchanged = if context.topics.is_manual() { Exchanged::Known } else { Exchanged::Pending };
        RetentionRules { context, node, own, others: RwLock::default(), exchanged: watch::Sender::new(exchanged) }
    }

    /// How much of a channel all nodes together keep, for a write. The error is that this is not known by `deadline`.
    pub(super) async fn for_write(&self, channel: &Channel, deadline: Deadline) -> Result<Retention, CommandError> {
        self.exchanged_by(deadline, |state| state == Exchanged::Known).await?;
        Ok(self.known(channel))
    }

    /// How much of a channel is shown to a reader. A read does not fail because rules cannot be exchanged.
    pub(super) async fn for_read(&self, channel: &Channel) -> Result<Retention, CommandError> {
        self.exchanged_by(deadline(), |state| state != Exchanged::Pending).await?;
        Ok(self.known(channel))
    }

    async fn exchanged_by(&self, deadline: Deadline, is: impl Fn(Exchanged) -> bool) -> Result<(), CommandError> {
        if is(*self.exchanged.borrow()) {
            return Ok(());
        }
        let mut exchanged = self.exchanged.subscribe();
        let wait = timeout_at(deadline, exchanged.wait_for(|state| is(*state)));
        match wait.await {
            Ok(Ok(_)) => Ok(()),
            _ => Err(CommandError::NotExecuted("the retention rules of other nodes are not known yet".into())),
        }
    }

    /// How much of a channel all nodes together keep, as far as is known.
    fn known(&self, channel: &Channel) -> Retention {
        self.max_with(self.context.topics.config().retention_of(channel), channel)
    }

    /// The larger of `own` and what other nodes keep of a channel.
    pub(super) fn max_with(&self, own: Retention, channel: &Channel) -> Retention {
        let others = self.others.read();
        others.values().fold(own, |most, other| max_with(most, other, channel))
    }

    /// Exchanges the rules of all nodes for as long as it is polled.
    pub(super) async fn run(self: Arc<Self>) {
        let mut warned = false;
        while !self.context.topics.is_manual() {
            let exchange = timeout(PATIENCE, self.exchange()).await;
            let pause = match exchange.unwrap_or(Err(CommandError::NotExecuted("Redis does not reply".into()))) {
                Ok(()) => {
                    self.exchanged.send_replace(Exchanged::Known);
                    EVERY
                }
                Err(error) => {
                    if matches!(error, CommandError::Rejected(_)) && !std::mem::replace(&mut warned, true) {
                        tracing::warn!(
                            ?error,
                            "Redis rejects the exchange of retention rules, without which nothing is published"
                        );
                    }
                    self.exchanged.send_if_modified(|state| {
                        let first = *state == Exchanged::Pending;
                        if first {
                            *state = Exchanged::Failed;
                        }
                        first
                    });
                    RETRY
                }
            };
            sleep(pause).await;
        }
    }

    /// Announces the rules of this node and reads those of others.
    async fn exchange(&self) -> Result<(), CommandError> {
        let key = self.context.keys.retention();
        let fill = |_: &RedisConnection, command: &mut Cmd| {
            command.arg(&self.node).arg(&self.own).arg(FORGET.as_millis() as u64);
        };
        let keys = [key.as_bytes()];
        let run = self.context.topology.run(&RETENTION, &keys, OnLostReply::Retry, fill);
        let (announced, _): (Vec<String>, _) = run.await?;
        update(&mut self.others.write(), &announced, &self.own, Instant::now());
        Ok(())
    }
}

/// `[[pattern, count, milliseconds, bytes], …]`; `rest` is for the channels that no rule matches.
fn to_text(rules: &[RetentionRule], rest: Retention) -> String {
    let rules = rules.iter().map(|rule| (rule.pattern.to_string(), rule.retention));
    let all: Vec<_> = rules
        .chain([("*".to_owned(), rest)])
        .map(|(pattern, Retention { count, age, bytes })| (pattern, count, millis(age), bytes))
        .collect();
    serde_json::json!(all).to_string()
}

fn from_text(text: &str) -> Option<Vec<RetentionRule>> {
    let rules: Vec<(String, usize, u64, usize)> = serde_json::from_str(text).ok()?;
    let rule = |(pattern, count, age, bytes): (String, usize, u64, usize)| RetentionRule {
        pattern: Pattern::new(&pattern),
        retention: Retention { count, age: Duration::from_millis(age), bytes },
    };
    Some(rules.into_iter().map(rule).collect())
}

fn max_with(most: Retention, other: &OtherRules, channel: &Channel) -> Retention {
    let rule = other.rules.iter().find(|rule| rule.pattern.matches(channel.as_str()));
    let keep = rule.map_or(most, |rule| rule.retention);
    Retention { count: most.count.max(keep.count), age: most.age.max(keep.age), bytes: most.bytes.max(keep.bytes) }
}

fn update(others: &mut BTreeMap<String, OtherRules>, announced: &[String], own: &str, now: Instant) {
    for text in announced {
        if text != own
            && !others.contains_key(text)
            && let Some(rules) = from_text(text)
        {
            others.insert(text.clone(), OtherRules { rules, missing: None });
        }
    }
    others.retain(|text, other| {
        if announced.contains(text) {
            other.missing = None;
            return true;
        }
        // A node may come back, and so may a Redis that has forgotten all nodes.
        now.saturating_duration_since(*other.missing.get_or_insert(now)) < FORGET
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    fn keep(count: usize) -> Retention {
        Retention { count, age: Duration::from_secs(60), bytes: 1000 }
    }

    #[test]
    fn less_is_kept_when_all_have_agreed_for_a_minute() {
        let own = to_text(&[], keep(10));
        let other = to_text(&[RetentionRule { pattern: Pattern::new("a*"), retention: keep(100) }], keep(5));
        let mut others = BTreeMap::new();
        let kept = |others: &BTreeMap<String, OtherRules>, name: &str| {
            let channel = Channel::parse(name).unwrap();
            others.values().fold(keep(10), |most, other| max_with(most, other, &channel)).count
        };
        let texts = |texts: &[&str]| texts.iter().map(|text| (*text).to_owned()).collect::<Vec<_>>();
        let begin = Instant::now();
        update(&mut others, &texts(&[&other, &own, "invalid"]), &own, begin);
        assert_eq!((kept(&others, "a1"), kept(&others, "b")), (100, 10), "the most of all nodes, channel by channel");
        let later = |seconds| begin + Duration::from_secs(seconds);
        update(&mut others, &[], &own, later(100));
        update(&mut others, &texts(&[&other]), &own, later(159));
        update(&mut others, &[], &own, later(200));
        update(&mut others, &[], &own, later(259));
        assert_eq!(kept(&others, "a1"), 100, "the node may be back, as it was before");
        update(&mut others, &[], &own, later(260));
        assert_eq!(kept(&others, "a1"), 10);
    }
}
