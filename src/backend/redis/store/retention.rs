//! [`RetentionRules`]: what the nodes together keep. Each says its rules every few seconds, and of a channel the most is kept that any
//! of them promises its readers: a node with smaller rules, as in the middle of an update, cuts nobody's log. Less is
//! kept when all agree, and have for a minute.

use std::{
    collections::BTreeMap,
    sync::LazyLock,
    time::{Duration, Instant},
};

use parking_lot::RwLock;
use tokio::sync::Mutex;

use super::{Inner, read::millis};
use crate::backend::redis::client::{Command, CommandError, OnLostReply, RedisConnection, Script, Value};
use crate::{
    bus::{Retention, RetentionRule},
    channel::Channel,
    pattern::Pattern,
};

static KEEP: LazyLock<Script> = LazyLock::new(|| Script::new(include_str!("retention.lua")));

/// How often it is said.
const EVERY: Duration = Duration::from_secs(5);
/// Rules that are not said again for so long count no more.
const FORGET: Duration = Duration::from_secs(60);

pub(super) struct RetentionRules {
    /// Tells the rules of this node from others'.
    node: String,
    own: String,
    /// Rules of others that are not this node's own, by their text. Nothing is known before others were heard.
    others: RwLock<Option<BTreeMap<String, Other>>>,
    /// When others were heard last; and one asks at a time.
    asked: Mutex<Option<Instant>>,
}

struct Other {
    rules: Rules,
    /// Nobody has said them since.
    missing: Option<Instant>,
}

/// Patterns and what is kept by them; the last is `*`.
struct Rules(Vec<RetentionRule>);

impl RetentionRules {
    /// Of a node with these rules, that keeps `rest` where none of them matches.
    pub fn new(rules: &[RetentionRule], rest: Retention) -> Self {
        let all = rules.iter().map(|rule| (rule.pattern.to_string(), rule.retention));
        let all: Vec<_> = all
            .chain([("*".to_owned(), rest)])
            .map(|(pattern, Retention { count, age, bytes })| (pattern, count, millis(age), bytes))
            .collect();
        RetentionRules {
            node: format!("{:016x}", fastrand::u64(..)),
            own: serde_json::json!(all).to_string(),
            others: RwLock::default(),
            asked: Mutex::default(),
        }
    }

    /// What is kept of a channel of which this node keeps `own`.
    pub fn max_with(&self, own: Retention, channel: &Channel) -> Retention {
        let others = self.others.read();
        others.iter().flat_map(BTreeMap::values).fold(own, |most, other| {
            let keep = other.rules.of(channel).unwrap_or(most);
            Retention {
                count: most.count.max(keep.count),
                age: most.age.max(keep.age),
                bytes: most.bytes.max(keep.bytes),
            }
        })
    }

    fn heard(&self, answer: &Value, now: Instant) {
        let said: Vec<&str> = answer.list().unwrap_or_default().iter().filter_map(Value::text).collect();
        let mut others = self.others.write();
        let others = others.get_or_insert_default();
        for text in &said {
            if *text != self.own
                && !others.contains_key(*text)
                && let Some(rules) = Rules::read(text)
            {
                others.insert((*text).to_owned(), Other { rules, missing: None });
            }
        }
        others.retain(|text, other| {
            if said.contains(&text.as_str()) {
                other.missing = None;
                return true;
            }
            // Who is away may be back, and so may be a Redis that has forgotten everybody.
            now.saturating_duration_since(*other.missing.get_or_insert(now)) < FORGET
        });
    }
}

impl Rules {
    fn read(text: &str) -> Option<Self> {
        let rules: Vec<(String, usize, u64, usize)> = serde_json::from_str(text).ok()?;
        let rule = |(pattern, count, age, bytes): (String, usize, u64, usize)| RetentionRule {
            pattern: Pattern::new(&pattern),
            retention: Retention { count, age: Duration::from_millis(age), bytes },
        };
        Some(Rules(rules.into_iter().map(rule).collect()))
    }

    fn of(&self, channel: &Channel) -> Option<Retention> {
        self.0.iter().find(|rule| rule.pattern.matches(channel.as_str())).map(|rule| rule.retention)
    }
}

impl Inner {
    /// How much of a channel is kept, by all nodes together.
    pub(super) async fn keep_of(&self, channel: &Channel) -> Result<Retention, CommandError> {
        let known = self.keeps.others.read().is_some();
        if !known {
            // What is lost here was only asked.
            self.agree().await.map_err(|fault| match fault {
                CommandError::Unconfirmed => CommandError::NotExecuted("the connection to Redis broke".into()),
                fault => fault,
            })?;
        }
        Ok(self.keeps.max_with(self.topics.retention_of(channel), channel))
    }

    /// Says what this node keeps and hears what others do, unless that was just done. A bus with a time of its own, as that
    /// of an import, is no node, and goes by its own rules.
    pub(super) async fn agree(&self) -> Result<(), CommandError> {
        if self.clock_is_ours {
            return Ok(());
        }
        let mut asked = self.keeps.asked.lock().await;
        if asked.is_some_and(|asked| asked.elapsed() < EVERY) {
            return Ok(());
        }
        let key = self.keys.keep();
        let fill = |_: &RedisConnection, command: &mut Command| {
            command.push(&self.keeps.node);
            command.push(&self.keeps.own);
            command.push_int(FORGET.as_millis() as u64);
        };
        let (answer, _) = self.topology.run(&KEEP, &[key.as_bytes()], OnLostReply::Retry, fill).await?;
        let now = Instant::now();
        self.keeps.heard(&answer, now);
        *asked = Some(now);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn keeps(rules: &[(&str, usize)], count: usize) -> RetentionRules {
        let keep = |count| Retention { count, age: Duration::from_secs(60), bytes: 1000 };
        let rules = rules
            .iter()
            .map(|(pattern, count)| RetentionRule { pattern: Pattern::new(pattern), retention: keep(*count) });
        RetentionRules::new(&rules.collect::<Vec<_>>(), keep(count))
    }

    #[test]
    fn less_is_kept_when_all_have_agreed_for_a_minute() {
        let (mine, other) = (keeps(&[], 10), keeps(&[("a*", 100)], 5));
        let kept = |name: &str| {
            let own = Retention { count: 10, age: Duration::from_secs(60), bytes: 1000 };
            mine.max_with(own, &Channel::parse(name).unwrap()).count
        };
        let said =
            |texts: &[&str]| Value::List(texts.iter().map(|text| Value::Bytes((*text).to_owned().into())).collect());
        let begin = Instant::now();
        mine.heard(&said(&[&other.own, &mine.own, "nonsense"]), begin);
        assert_eq!((kept("a1"), kept("b")), (100, 10), "the most that anybody keeps, channel by channel");
        let later = |seconds| begin + Duration::from_secs(seconds);
        mine.heard(&said(&[]), later(100));
        mine.heard(&said(&[&other.own]), later(159));
        mine.heard(&said(&[]), later(200));
        mine.heard(&said(&[]), later(259));
        assert_eq!(kept("a1"), 100, "it may be back, as it was before");
        mine.heard(&said(&[]), later(260));
        assert_eq!(kept("a1"), 10);
    }
}
