//! [`Pattern`], the matcher of channel rules, routes and permissions: `*` matches any run of characters, nothing else is
//! special.

use std::fmt;

/// A pattern such as `orders.*`, `*@eu` or `*`.
///
/// Wildcards are stored as NUL, so that a [literal](Pattern::push_literal) can contain `*`.
#[derive(Clone, PartialEq, Eq, Hash)]
pub struct Pattern(Box<str>);

const WILDCARD: char = '\0';

impl Pattern {
    pub fn new(pattern: &str) -> Self {
        Pattern(pattern.replace('*', "\0").into())
    }

    /// Appends text without wildcards: its `*` is a character. `text` has no control characters.
    pub(crate) fn push_literal(&mut self, text: &str) {
        self.0 = [&*self.0, text].concat().into();
    }

    /// Appends a pattern.
    pub(crate) fn push(&mut self, pattern: &str) {
        self.push_literal(&Pattern::new(pattern).0);
    }

    /// The only name that matches, if the pattern has no wildcard.
    pub(crate) fn as_exact(&self) -> Option<&str> {
        (!self.0.contains(WILDCARD)).then_some(&*self.0)
    }

    /// Whether every name matches.
    pub(crate) fn matches_all(&self) -> bool {
        !self.0.is_empty() && self.0.chars().all(|char| char == WILDCARD)
    }

    /// Whether some name that begins with `prefix` matches.
    pub(crate) fn can_match_prefix(&self, prefix: &str) -> bool {
        match self.0.split_once(WILDCARD) {
            Some((first, _)) => first.starts_with(prefix) || prefix.starts_with(first),
            None => self.0.starts_with(prefix),
        }
    }

    /// Whether only names that begin with `prefix` can match.
    pub(crate) fn starts_with(&self, prefix: char) -> bool {
        self.0.starts_with(prefix)
    }

    /// Takes at most the product of the lengths, without recursion: names come from clients.
    pub fn matches(&self, name: &str) -> bool {
        let mut parts = self.0.split(WILDCARD);
        let Some(mut rest) = parts.next().and_then(|prefix| name.strip_prefix(prefix)) else { return false };
        let mut last = None;
        for part in parts {
            // A part in the middle is matched as early as possible; the last part must end the name.
            if let Some(middle) = last.replace(part) {
                match rest.find(middle) {
                    Some(at) => rest = &rest[at + str::len(middle)..],
                    None => return false,
                }
            }
        }
        match last {
            Some(suffix) => rest.ends_with(suffix),
            None => rest.is_empty(),
        }
    }
}

impl fmt::Display for Pattern {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0.replace(WILDCARD, "*"))
    }
}

impl fmt::Debug for Pattern {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(&self.0, f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn stars_match_any_run() {
        for (pattern, name) in [
            ("*", ""),
            ("*", "a"),
            ("a*", "a"),
            ("a*c", "abc"),
            ("*b*", "abc"),
            ("a.b", "a.b"),
            ("a*a", "aa"),
            ("*aab", "aaab"),
        ] {
            assert!(Pattern::new(pattern).matches(name), "{pattern} {name}");
        }
        for (pattern, name) in
            [("", "a"), ("a", "ab"), ("a*a", "a"), ("a.b", "axb"), ("*b", "bc"), ("[a]", "a"), ("?", "a")]
        {
            assert!(!Pattern::new(pattern).matches(name), "{pattern} {name}");
        }
    }

    proptest! {
        /// Compares with the recursive definition.
        #[test]
        fn matches_as_defined(pattern in "[ab*]{0,8}", name in "[ab]{0,10}") {
            fn defined(pattern: &[u8], name: &[u8]) -> bool {
                match pattern {
                    [] => name.is_empty(),
                    [b'*', rest @ ..] => (0..=name.len()).any(|skip| defined(rest, &name[skip..])),
                    [letter, rest @ ..] => name.first() == Some(letter) && defined(rest, &name[1..]),
                }
            }
            prop_assert_eq!(Pattern::new(&pattern).matches(&name), defined(pattern.as_bytes(), name.as_bytes()));
        }
    }
}
