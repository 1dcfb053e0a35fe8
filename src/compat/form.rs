//! [`Form`]: query and form parameters as parsed by `qs` of Node.js. Unlike weir's own parser it accepts anything: text
//! that cannot be decoded stays as it is, and a name that is repeated or has brackets is a list or an object, never a
//! string.

use std::borrow::Cow;

use crate::transport::query::decode;

/// The limit of `qs`.
const MAX_PARAMETERS: usize = 1000;

/// The decoded parameters of a URL or a form.
pub(super) struct Form<'a>(Vec<(Cow<'a, str>, Cow<'a, str>)>);

impl<'a> Form<'a> {
    pub(super) fn parse(text: &'a str) -> Self {
        let lenient = |text: &'a str| decode(text, true).unwrap_or(Cow::Borrowed(text));
        let pairs = text.split('&').filter(|pair| !pair.is_empty()).take(MAX_PARAMETERS).map(|pair| {
            let (name, value) = pair.split_once('=').unwrap_or((pair, ""));
            (lenient(name), lenient(value))
        });
        Form(pairs.collect())
    }

    /// Whether a parameter is present, as a string or not.
    pub(super) fn has(&self, name: &str) -> bool {
        self.all(name).next().is_some()
    }

    /// The value of a parameter that is a string.
    pub(super) fn text(&self, name: &str) -> Option<&str> {
        let mut all = self.all(name);
        match (all.next(), all.next()) {
            (Some((exact, value)), None) if exact == name => Some(value),
            _ => None,
        }
    }

    /// Every value of a parameter, in order.
    pub(super) fn texts(&self, name: &str) -> impl Iterator<Item = &str> {
        self.all(name).map(|(_, value)| value)
    }

    /// `name`, `name[]` and `name[key]` are one parameter.
    fn all(&self, name: &str) -> impl Iterator<Item = (&str, &str)> {
        let same =
            move |given: &str| given.strip_prefix(name).is_some_and(|rest| rest.is_empty() || rest.starts_with('['));
        self.0.iter().map(|(given, value)| (&**given, &**value)).filter(move |(given, _)| same(given))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parameters_are_parsed_as_by_qs() {
        let form = Form::parse("a=1&b=x+y%2Fz&b=2&c[]=3&d&e=%zz&ab=9");
        assert_eq!((form.text("a"), form.text("d"), form.text("e")), (Some("1"), Some(""), Some("%zz")));
        assert_eq!((form.text("b"), form.text("c"), form.text("x")), (None, None, None));
        assert!(form.has("b") && form.has("c") && !form.has("x"));
        assert_eq!(form.texts("b").collect::<Vec<_>>(), ["x y/z", "2"]);
        assert!(!Form::parse("").has(""));
    }
}
