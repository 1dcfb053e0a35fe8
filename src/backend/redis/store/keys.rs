//! [`KeyNames`]: the names of keys and pub/sub channels. The keys of a channel have its name in braces, so that they share
//! a slot in a Cluster; braces in the name are escaped.

use std::fmt::Write as _;

use bytes::Bytes;

use crate::channel::Channel;

#[derive(Clone, Debug)]
pub(super) struct KeyNames {
    /// Of every key and every pub/sub channel: `bus.redis.prefix`.
    prefix: Box<str>,
}

/// The keys of one channel.
pub(super) struct ChannelKeys {
    tag: String,
}

impl KeyNames {
    pub(super) fn new(prefix: &str) -> Self {
        KeyNames { prefix: prefix.into() }
    }

    pub(super) fn channel(&self, channel: &Channel) -> ChannelKeys {
        self.tagged(channel.as_str())
    }

    /// As [`channel`](Self::channel), with a name that need not be valid for clients.
    pub(super) fn tagged(&self, name: &str) -> ChannelKeys {
        let mut tag = String::with_capacity(self.prefix.len() + name.len() + 4);
        tag.push_str(&self.prefix);
        tag.push('{');
        escape(name, &mut tag);
        tag.push('}');
        ChannelKeys { tag }
    }

    /// The pattern of SCAN for the logs of channels whose names begin with `name`.
    pub(super) fn logs(&self, name: &str) -> String {
        let mut pattern = String::new();
        glob(&self.prefix, &mut pattern);
        pattern.push('{');
        let mut escaped = String::new();
        escape(name, &mut escaped);
        glob(&escaped, &mut pattern);
        pattern.push_str("*}:m");
        pattern
    }

    /// The channel whose log has the key `key`.
    pub(super) fn channel_of(&self, key: &[u8]) -> Option<Channel> {
        let tag = std::str::from_utf8(key).ok()?.strip_prefix(&*self.prefix)?.strip_prefix('{')?.strip_suffix("}:m")?;
        Channel::parse(&unescape(tag)?).ok()
    }

    /// The cursors of a consumer.
    pub(super) fn consumer(&self, name: &str) -> String {
        let mut key = format!("{}{{consumer:", self.prefix);
        escape(name, &mut key);
        key.push('}');
        key
    }

    /// The retention rules of each node.
    pub(super) fn retention(&self) -> String {
        format!("{}{{keep}}", self.prefix)
    }

    /// The names of all consumers.
    pub(super) fn consumers(&self) -> String {
        format!("{}{{consumers}}", self.prefix)
    }

    /// Written so that WAIT has a write to wait for; each number may be in another slot.
    pub(super) fn mark(&self, number: u32) -> String {
        format!("{}{{acks:{number}}}", self.prefix)
    }
}

impl ChannelKeys {
    /// The hash that says where the log begins and ends.
    pub(super) fn meta(&self) -> String {
        format!("{}:m", self.tag)
    }

    pub(super) fn stream(&self) -> String {
        format!("{}:s", self.tag)
    }

    /// The pub/sub channel of its events.
    pub(super) fn events(&self) -> Bytes {
        format!("{}:e", self.tag).into()
    }

    /// An idempotency key of `subject`. The length keeps `a:b` with key `c` apart from `a` with key `b:c`.
    pub(super) fn idempotency(&self, subject: &str, key: &str) -> String {
        format!("{}:k:{}:{subject}:{key}", self.tag, subject.len())
    }
}

/// Appends a name as part of a key in braces.
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

/// Appends text as a pattern that matches only itself.
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
    fn keys_of_any_name_share_a_slot_and_can_be_parsed() {
        let keys = KeyNames::new("weir:");
        for name in ["a", "{a}", "}", "{}", "%7b", "ä/ö", "a}:m", "*"] {
            let channel = Channel::parse(name).unwrap();
            let of = keys.channel(&channel);
            let slots = [of.meta(), of.stream(), of.idempotency("s", "k")].map(|key| slot(key.as_bytes()));
            assert!(slots.iter().all(|other| *other == slots[0] && *other == slot(&of.events())), "{name}");
            assert_eq!(keys.channel_of(of.meta().as_bytes()), Some(channel));
            assert_eq!(keys.channel_of(of.stream().as_bytes()), None);
        }
        assert_eq!(keys.logs("a*"), "weir:{a\\**}:m");
        assert_ne!(keys.tagged("a").idempotency("b:c", "d"), keys.tagged("a").idempotency("b", "c:d"));
    }
}
