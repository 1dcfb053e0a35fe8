//! [`Pattern`], the matcher of channel rules and routes: `*` matches any run of characters, nothing else is special.

use std::fmt;

/// A pattern such as `orders.*`, `*@eu` or `*`.
#[derive(Clone, PartialEq, Eq)]
pub struct Pattern(Box<str>);

impl Pattern {
    pub fn new(pattern: &str) -> Self {
        Pattern(pattern.into())
    }

    /// Takes at most the product of the lengths, without recursion: names come from clients.
    pub fn matches(&self, name: &str) -> bool {
        let mut parts = self.0.split('*');
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
        f.write_str(&self.0)
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
