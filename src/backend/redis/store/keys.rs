//! What lies where in Redis. A channel's keys have its name in braces, so that in a Cluster they share a slot; what would
//! end the braces early is escaped.

use std::fmt::Write as _;

use bytes::Bytes;

use crate::channel::Channel;

/// Before every key and every pub/sub channel: `bus.redis.prefix`.
#[derive(Clone, Debug)]
pub struct Keys {
    prefix: Box<str>,
}

/// The keys of one channel.
pub struct ChannelKeys {
    tag: String,
}

impl Keys {
    pub fn new(prefix: &str) -> Self {
        Keys { prefix: prefix.into() }
    }

    pub fn channel(&self, channel: &Channel) -> ChannelKeys {
        self.tagged(channel.as_str())
    }

    /// As a channel of that name, which may be one that no client can have.
    pub fn tagged(&self, name: &str) -> ChannelKeys {
        let mut tag = String::with_capacity(self.prefix.len() + name.len() + 4);
        tag.push_str(&self.prefix);
        tag.push('{');
        escape(name, &mut tag);
        tag.push('}');
        ChannelKeys { tag }
    }

    /// What SCAN is to look for: keys of the logs of channels whose names begin so.
    pub fn logs(&self, name: &str) -> String {
        let mut pattern = String::new();
        glob(&self.prefix, &mut pattern);
        pattern.push('{');
        let mut escaped = String::new();
        escape(name, &mut escaped);
        glob(&escaped, &mut pattern);
        pattern.push_str("*}:m");
        pattern
    }

    /// The channel whose log has this key.
    pub fn channel_of(&self, key: &[u8]) -> Option<Channel> {
        let tag = std::str::from_utf8(key).ok()?.strip_prefix(&*self.prefix)?.strip_prefix('{')?.strip_suffix("}:m")?;
        Channel::parse(&unescape(tag)?).ok()
    }

    /// A consumer's list of channels.
    pub fn consumer(&self, name: &str) -> String {
        let mut key = format!("{}{{consumer:", self.prefix);
        escape(name, &mut key);
        key.push('}');
        key
    }

    /// What each node keeps.
    pub fn keep(&self) -> String {
        format!("{}{{keep}}", self.prefix)
    }

    /// The names of all consumers.
    pub fn consumers(&self) -> String {
        format!("{}{{consumers}}", self.prefix)
    }

    /// Written so that replicas can be waited for; each number may be of another slot.
    pub fn mark(&self, number: u32) -> String {
        format!("{}{{acks:{number}}}", self.prefix)
    }
}

impl ChannelKeys {
    /// Where the log begins and ends.
    pub fn meta(&self) -> String {
        format!("{}:m", self.tag)
    }

    pub fn stream(&self) -> String {
        format!("{}:s", self.tag)
    }

    /// Where its events are published.
    pub fn events(&self) -> Bytes {
        format!("{}:e", self.tag).into()
    }

    /// An idempotency key of somebody. The length keeps two that look alike apart.
    pub fn once(&self, subject: &str, key: &str) -> String {
        format!("{}:k:{}:{subject}:{key}", self.tag, subject.len())
    }
}

/// As a part of a key that stands in braces.
pub(crate) fn escape(name: &str, out: &mut String) {
    for letter in name.chars() {
        match letter {
            '{' | '}' | '%' => {
                let _ = write!(out, "%{:02x}", letter as u32);
            }
            _ => out.push(letter),
        }
    }
}

fn unescape(text: &str) -> Option<String> {
    let mut parts = text.split('%');
    let mut out = parts.next()?.to_owned();
    for part in parts {
        let (digits, rest) = part.split_at_checked(2)?;
        out.push(u8::from_str_radix(digits, 16).ok()?.into());
        out.push_str(rest);
    }
    Some(out)
}

/// As a pattern that only fits itself.
fn glob(text: &str, out: &mut String) {
    for letter in text.chars() {
        if matches!(letter, '*' | '?' | '[' | ']' | '\\' | '^') {
            out.push('\\');
        }
        out.push(letter);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::redis::client::slot;

    #[test]
    fn any_name_keeps_one_slot_and_comes_back() {
        let keys = Keys::new("weir:");
        for name in ["a", "{a}", "}", "{}", "%7b", "ä/ö", "a}:m", "*"] {
            let channel = Channel::parse(name).unwrap();
            let of = keys.channel(&channel);
            let slots = [of.meta(), of.stream(), of.once("s", "k")].map(|key| slot(key.as_bytes()));
            assert!(slots.iter().all(|other| *other == slots[0] && *other == slot(&of.events())), "{name}");
            assert_eq!(keys.channel_of(of.meta().as_bytes()), Some(channel));
            assert_eq!(keys.channel_of(of.stream().as_bytes()), None);
        }
        assert_eq!(keys.logs("a*"), "weir:{a\\**}:m");
        assert_ne!(keys.tagged("a").once("b:c", "d"), keys.tagged("a").once("b", "c:d"));
    }
}
