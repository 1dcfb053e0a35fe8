//! [`RetentionRules`]: how much the nodes together keep. Each node announces its rules every few seconds, and of a
//! channel the most is kept that any of them promises its readers: a node with smaller limits, as during an update,
//! trims no log of the others. Less is kept only after all have agreed for a minute.

use std::{
    collections::BTreeMap,
    sync::Arc,
    time::{Duration, Instant},
};

use parking_lot::RwLock;
use redis::Cmd;
use tokio::sync::Mutex;

use super::context::{LogContext, millis};
use crate::{
    backend::redis::client::{CommandError, OnLostReply, RedisConnection, Script},
    bus::{Retention, RetentionRule},
    channel::Channel,
    pattern::Pattern,
};

static RETENTION: Script = Script::new(include_str!("retention.lua"));

/// How often rules are announced.
const EVERY: Duration = Duration::from_secs(5);
/// Rules that were not announced for this long no longer count.
const FORGET: Duration = Duration::from_secs(60);

pub(super) struct RetentionRules {
    context: Arc<LogContext>,
    /// Random: the field of this node.
    node: String,
    own: String,
    /// The rules of other nodes that differ from this node's, by their text. None before the first exchange.
    others: RwLock<Option<BTreeMap<String, OtherRules>>>,
    /// The time of the last exchange; the lock makes it one at a time.
    exchanged: Mutex<Option<Instant>>,
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
        RetentionRules { context, node, own, others: RwLock::default(), exchanged: Mutex::default() }
    }

    /// How much of a channel all nodes together keep.
    pub(super) async fn of(&self, channel: &Channel) -> Result<Retention, CommandError> {
        let known = self.others.read().is_some();
        if !known {
            // The announcement is idempotent: to lose its reply is no reason to doubt anything else.
            self.exchange().await.map_err(CommandError::of_read)?;
        }
        Ok(self.max_with(self.context.topics.config().retention_of(channel), channel))
    }

    /// The larger of `own` and what other nodes keep of a channel.
    pub(super) fn max_with(&self, own: Retention, channel: &Channel) -> Retention {
        let others = self.others.read();
        others.iter().flat_map(BTreeMap::values).fold(own, |most, other| max_with(most, other, channel))
    }

    /// Announces the rules of this node and reads those of others, unless that was just done. A bus with a clock of its
    /// own, as that of an import, is no node, and uses its own rules.
    pub(super) async fn exchange(&self) -> Result<(), CommandError> {
        if self.context.topics.is_manual() {
            return Ok(());
        }
        let mut exchanged = self.exchanged.lock().await;
        if exchanged.is_some_and(|last| last.elapsed() < EVERY) {
            return Ok(());
        }
        let key = self.context.keys.retention();
        let fill = |_: &RedisConnection, command: &mut Cmd| {
            command.arg(&self.node).arg(&self.own).arg(FORGET.as_millis() as u64);
        };
        let keys = [key.as_bytes()];
        let run = self.context.topology.run(&RETENTION, &keys, OnLostReply::Retry, fill);
        let (announced, _): (Vec<String>, _) = run.await?;
        let now = Instant::now();
        update(self.others.write().get_or_insert_default(), &announced, &self.own, now);
        *exchanged = Some(now);
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
