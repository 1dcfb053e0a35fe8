//! Permissions: [`Verb`]s with patterns of the names that they cover. Roles, claims of tokens and the answers of the hook
//! have the same grammar.
//!
//! Grants only add up: there is no order and no denial. What cannot be read is rejected as a whole, so that a mistake never
//! grants more, or less in silence.

use std::{collections::HashSet, fmt::Write as _, sync::Arc};

use serde_json::{Map, Value};

use crate::pattern::Pattern;

/// Maximum number of patterns in one set of grants.
const MAX_PATTERNS: usize = 256;
/// Maximum length of a pattern, in bytes.
const MAX_PATTERN: usize = 255;
/// Maximum number of wildcards in a pattern.
const MAX_WILDCARDS: usize = 4;

/// An action that needs a permission, and the kind of name that its patterns match.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Verb {
    /// A channel.
    Publish,
    /// The `from` of an event, unless it is the subject of the client.
    PublishAs,
    /// A channel: to stream, wait for, read, and look up its history.
    Subscribe,
    /// A channel: to appear in its presence list.
    Join,
    /// A channel: to list its members and to read `$presence/CHANNEL`.
    Presence,
    /// A consumer.
    Consume,
    /// A service.
    Provide,
    /// A method, as `service/method` by [`method_name`].
    Call,
    /// An operation of administration, as `connections:kick`.
    Admin,
}

pub(crate) const VERBS: [(&str, Verb); 9] = [
    ("publish", Verb::Publish),
    ("publish_as", Verb::PublishAs),
    ("subscribe", Verb::Subscribe),
    ("join", Verb::Join),
    ("presence", Verb::Presence),
    ("consume", Verb::Consume),
    ("provide", Verb::Provide),
    ("call", Verb::Call),
    ("admin", Verb::Admin),
];

/// A label of a client: its name and its value.
pub(crate) type Label = (Box<str>, Box<str>);

/// The values that templates of patterns insert.
#[derive(Clone, Copy, Default)]
pub(crate) struct TemplateValues<'a> {
    pub(crate) subject: &'a str,
    pub(crate) labels: &'a [Label],
}

/// Grants as written: a verb and a pattern that may contain templates.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct GrantRules(Vec<(Verb, PatternTemplate)>);

/// A pattern that may contain `{sub}` and `{label.NAME}`.
#[derive(Clone, Debug, PartialEq)]
struct PatternTemplate {
    text: Box<str>,
    parts: Vec<TemplatePart>,
}

#[derive(Clone, Debug, PartialEq)]
enum TemplatePart {
    Pattern(Box<str>),
    /// `delimiter` is the character that follows the template. A value that contains it matches nothing, because it could
    /// match the names of another value.
    Subject {
        delimiter: Option<char>,
    },
    Label {
        name: Box<str>,
        delimiter: Option<char>,
    },
}

/// Compiled grants of one client or role.
#[derive(Debug, Default)]
pub(crate) struct GrantSet {
    verbs: [PatternSet; VERBS.len()],
}

#[derive(Debug, Default)]
struct PatternSet {
    exact: HashSet<Box<str>, foldhash::fast::RandomState>,
    /// `*`: every name that does not begin with `$`.
    all: bool,
    /// `$*`: every name that begins with `$`.
    all_reserved: bool,
    patterns: Vec<Pattern>,
}

/// A role. The part that is the same for every client is shared.
#[derive(Debug, Default)]
pub(crate) struct Role {
    pub(crate) name: Box<str>,
    fixed: Arc<GrantSet>,
    /// The patterns with templates.
    templates: GrantRules,
    /// All patterns; empty for the built-in roles.
    pub(crate) rules: GrantRules,
}

// === impl Verb ===

impl Verb {
    pub(crate) fn parse(name: &str) -> Option<Verb> {
        VERBS.iter().find(|(known, _)| *known == name).map(|(_, verb)| *verb)
    }

    pub(crate) fn as_str(self) -> &'static str {
        VERBS[self as usize].0
    }

    /// Reserved names (`$…`) are never published to or joined, whatever the patterns.
    fn allows_reserved(self) -> bool {
        !matches!(self, Verb::Publish | Verb::Join)
    }
}

/// The name of a method for patterns of [`Verb::Call`]. The method is escaped, so that the last `/` separates it from the
/// service: `a` and `b/c` is not `a/b` and `c`.
pub(crate) fn method_name(service: &str, method: &str) -> String {
    let mut name = String::with_capacity(service.len() + method.len() + 1);
    name.push_str(service);
    name.push('/');
    for char in method.chars() {
        match char {
            '%' | '/' => {
                // Writing to a string does not fail.
                let _ = write!(name, "%{:02X}", u32::from(char));
            }
            char => name.push(char),
        }
    }
    name
}

// === impl GrantRules ===

impl GrantRules {
    /// Reads an object of verbs with lists of patterns. `others` are the members that the caller reads.
    ///
    /// # Errors
    /// A sentence: an unknown member, a malformed pattern, too many patterns.
    pub(crate) fn from_json(object: &Map<String, Value>, others: &[&str]) -> Result<Self, String> {
        let mut rules = GrantRules::default();
        for (name, patterns) in object {
            if others.contains(&name.as_str()) {
                continue;
            }
            let verb = Verb::parse(name).ok_or_else(|| format!("{name:?} is not a permission"))?;
            let patterns = patterns.as_array().ok_or_else(|| format!("{name} needs a list of patterns"))?;
            for pattern in patterns {
                let text =
                    pattern.as_str().ok_or_else(|| format!("{name} needs a list of patterns, which are text"))?;
                rules.add(verb, text)?;
            }
        }
        Ok(rules)
    }

    /// # Errors
    /// A sentence: the pattern is malformed, or there are too many.
    pub(crate) fn add(&mut self, verb: Verb, pattern: &str) -> Result<(), String> {
        if self.0.len() == MAX_PATTERNS {
            return Err(format!("more than {MAX_PATTERNS} patterns"));
        }
        let template =
            PatternTemplate::parse(pattern).map_err(|reason| format!("{}: {pattern:?} {reason}", verb.as_str()))?;
        if verb == Verb::Call && !pattern.contains(['/', '*']) {
            return Err(format!("call: {pattern:?} has no method: write {pattern}/* for all methods of a service"));
        }
        self.0.push((verb, template));
        Ok(())
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// The first pattern, as written, that permits a client something.
    pub(crate) fn find(&self, values: TemplateValues<'_>, verb: Verb, name: &str) -> Option<&str> {
        let permits = |(of, template): &&(Verb, PatternTemplate)| {
            let mut set = PatternSet::default();
            *of == verb
                && template.expand(values).is_some_and(|pattern| {
                    set.insert(pattern);
                    set.allows(verb, name)
                })
        };
        self.0.iter().find(permits).map(|(_, template)| &*template.text)
    }

    /// The patterns for a client. A template whose value is empty or contains the delimiter matches nothing.
    pub(crate) fn compile(&self, values: TemplateValues<'_>) -> GrantSet {
        let mut set = GrantSet::default();
        for (verb, template) in &self.0 {
            if let Some(pattern) = template.expand(values) {
                set.verbs[*verb as usize].insert(pattern);
            }
        }
        set
    }

    /// The patterns that match nothing for a client, as written.
    pub(crate) fn void(&self, values: TemplateValues<'_>) -> Vec<&str> {
        let void = |(_, template): &&(Verb, PatternTemplate)| template.expand(values).is_none();
        self.0.iter().filter(void).map(|(_, template)| &*template.text).collect()
    }

    fn partition(self) -> (GrantRules, GrantRules) {
        let (fixed, templates) = self.0.into_iter().partition(|(_, template)| template.is_fixed());
        (GrantRules(fixed), GrantRules(templates))
    }
}

// === impl PatternTemplate ===

impl PatternTemplate {
    fn parse(text: &str) -> Result<Self, &'static str> {
        if text.is_empty() {
            return Err("is empty; * matches every name");
        }
        if text.len() > MAX_PATTERN {
            return Err("is longer than 255 bytes");
        }
        if text.chars().any(char::is_control) {
            return Err("contains a control character");
        }
        if text.matches('*').count() > MAX_WILDCARDS {
            return Err("has more than four *");
        }
        let mut parts = Vec::new();
        let mut rest = text;
        while let Some(start) = rest.find('{') {
            let (before, template) = rest.split_at(start);
            let end = template.find('}').ok_or("has a { that begins neither {sub} nor {label.NAME}")?;
            let (name, after) = (&template[1..end], &template[end + 1..]);
            let delimiter = after.chars().next();
            if matches!(delimiter, Some('*' | '{')) {
                return Err("has a template that is not followed by a delimiter");
            }
            if !before.is_empty() {
                parts.push(TemplatePart::Pattern(before.into()));
            }
            parts.push(match (name, name.strip_prefix("label.")) {
                ("sub", _) => TemplatePart::Subject { delimiter },
                (_, Some(label)) if !label.is_empty() => TemplatePart::Label { name: label.into(), delimiter },
                _ => return Err("has a { that begins neither {sub} nor {label.NAME}"),
            });
            if text[..text.len() - template.len()].contains('*') {
                return Err("has a * before a template");
            }
            rest = after;
        }
        if !rest.is_empty() {
            parts.push(TemplatePart::Pattern(rest.into()));
        }
        Ok(PatternTemplate { text: text.into(), parts })
    }

    fn is_fixed(&self) -> bool {
        self.parts.iter().all(|part| matches!(part, TemplatePart::Pattern(_)))
    }

    fn expand(&self, values: TemplateValues<'_>) -> Option<Pattern> {
        let mut pattern = Pattern::new("");
        for part in &self.parts {
            let (value, delimiter) = match part {
                TemplatePart::Pattern(text) => {
                    pattern.push(text);
                    continue;
                }
                TemplatePart::Subject { delimiter } => (values.subject, *delimiter),
                TemplatePart::Label { name, delimiter } => {
                    let label = values.labels.iter().find(|(label, _)| label == name);
                    (label.map_or("", |(_, value)| value), *delimiter)
                }
            };
            // A value does not make a pattern one of reserved names.
            let reserved = value.starts_with('$') && pattern.as_exact() == Some("");
            if value.is_empty() || reserved || delimiter.is_some_and(|delimiter| value.contains(delimiter)) {
                return None;
            }
            pattern.push_literal(value);
        }
        Some(pattern)
    }
}

// === impl GrantSet ===

impl GrantSet {
    pub(crate) fn allows(&self, verb: Verb, name: &str) -> bool {
        self.verbs[verb as usize].allows(verb, name)
    }

    /// Whether some method of a service is permitted.
    pub(crate) fn allows_some_method(&self, service: &str) -> bool {
        let set = &self.verbs[Verb::Call as usize];
        let prefix = format!("{service}/");
        let reserved = service.starts_with('$');
        set.allows(Verb::Call, &prefix)
            || set.exact.iter().any(|name| name.rsplit_once('/').is_some_and(|(of, _)| of == service))
            || set
                .patterns
                .iter()
                .any(|pattern| (!reserved || pattern.starts_with('$')) && pattern.can_match_prefix(&prefix))
    }
}

impl PatternSet {
    fn insert(&mut self, pattern: Pattern) {
        if pattern.matches_all() {
            self.all = true;
        } else if pattern == Pattern::new("$*") {
            self.all_reserved = true;
        } else if let Some(name) = pattern.as_exact() {
            self.exact.insert(name.into());
        } else if !self.patterns.contains(&pattern) {
            self.patterns.push(pattern);
        }
    }

    fn allows(&self, verb: Verb, name: &str) -> bool {
        let reserved = name.starts_with('$');
        if reserved && !verb.allows_reserved() {
            return false;
        }
        let all = if reserved { self.all_reserved } else { self.all };
        all || self.exact.contains(name)
            || self.patterns.iter().any(|pattern| (!reserved || pattern.starts_with('$')) && pattern.matches(name))
    }
}

// === impl Role ===

impl Role {
    pub(crate) fn new(name: &str, rules: GrantRules) -> Self {
        let (fixed, templates) = rules.clone().partition();
        Role { name: name.into(), fixed: Arc::new(fixed.compile(TemplateValues::default())), templates, rules }
    }

    /// The built-in role with every permission.
    pub(crate) fn admin() -> Self {
        Role::of_all_verbs("admin", |_| true)
    }

    /// The built-in role with every permission but administration.
    pub(crate) fn client() -> Self {
        Role::of_all_verbs("client", |verb| verb != Verb::Admin)
    }

    fn of_all_verbs(name: &str, includes: impl Fn(Verb) -> bool) -> Self {
        let mut fixed = GrantSet::default();
        for (_, verb) in VERBS.into_iter().filter(|(_, verb)| includes(*verb)) {
            let set = &mut fixed.verbs[verb as usize];
            (set.all, set.all_reserved) = (true, true);
        }
        Role { name: name.into(), fixed: Arc::new(fixed), ..Role::default() }
    }

    /// The first pattern that permits a client something. Those of the built-in roles are not written anywhere.
    pub(crate) fn find(&self, values: TemplateValues<'_>, verb: Verb, name: &str) -> Option<&str> {
        let built_in = || self.fixed.allows(verb, name).then_some(if name.starts_with('$') { "$*" } else { "*" });
        self.rules.find(values, verb, name).or_else(built_in)
    }

    /// The grants of the role for a client: the fixed ones are shared.
    pub(crate) fn grants(&self, values: TemplateValues<'_>) -> impl Iterator<Item = Arc<GrantSet>> {
        let own = (!self.templates.is_empty()).then(|| Arc::new(self.templates.compile(values)));
        std::iter::once(self.fixed.clone()).chain(own)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn rules(verb: Verb, patterns: &[&str]) -> GrantRules {
        let mut rules = GrantRules::default();
        patterns.iter().for_each(|pattern| rules.add(verb, pattern).unwrap());
        rules
    }

    fn compiled(verb: Verb, patterns: &[&str], subject: &str) -> GrantSet {
        let labels = [("tenant".into(), "t1".into())];
        rules(verb, patterns).compile(TemplateValues { subject, labels: &labels })
    }

    #[test]
    fn patterns_cover_the_names_they_match() {
        let set = compiled(Verb::Subscribe, &["news.*", "user.{sub}", "{label.tenant}/*"], "ann");
        for (name, allowed) in [
            ("news.eu", true),
            ("news", false),
            ("user.ann", true),
            ("user.bob", false),
            ("t1/a", true),
            ("t2/a", false),
            ("$services", false),
        ] {
            assert_eq!(set.allows(Verb::Subscribe, name), allowed, "{name}");
        }
        assert!(!set.allows(Verb::Publish, "news.eu"));
    }

    #[test]
    fn reserved_names_need_a_pattern_that_begins_with_a_dollar_sign() {
        let all = compiled(Verb::Subscribe, &["*"], "");
        assert!(all.allows(Verb::Subscribe, "a") && !all.allows(Verb::Subscribe, "$services"));
        let reserved = compiled(Verb::Subscribe, &["$s*"], "");
        assert!(reserved.allows(Verb::Subscribe, "$services") && !reserved.allows(Verb::Subscribe, "services"));
        for verb in [Verb::Publish, Verb::Join] {
            assert!(!compiled(verb, &["*", "$*", "$services"], "").allows(verb, "$services"));
        }
    }

    #[test]
    fn a_value_is_literal_and_void_if_it_contains_the_delimiter() {
        let set = compiled(Verb::Subscribe, &["user.{sub}.*"], "a*");
        assert!(set.allows(Verb::Subscribe, "user.a*.x") && !set.allows(Verb::Subscribe, "user.ab.x"));
        for subject in ["a.b", ""] {
            let set = compiled(Verb::Subscribe, &["user.{sub}.*"], subject);
            assert!(!set.allows(Verb::Subscribe, "user.a.b.x") && !set.allows(Verb::Subscribe, "user..x"));
        }
        assert_eq!(
            rules(Verb::Consume, &["{sub}:*", "a"]).void(TemplateValues { subject: "a:b", labels: &[] }),
            ["{sub}:*"]
        );
    }

    #[test]
    fn malformed_patterns_are_rejected() {
        let long = "x".repeat(256);
        for bad in
            ["", "*{sub}", "{sub}*", "{sub}{sub}", "{", "{sub", "{subject}", "{label.}", "a\nb", "*****", long.as_str()]
        {
            assert!(GrantRules::default().add(Verb::Subscribe, bad).is_err(), "{bad:?}");
        }
        assert!(GrantRules::default().add(Verb::Call, "orders").is_err());
        for good in ["orders/*", "*", "orders/list"] {
            GrantRules::default().add(Verb::Call, good).unwrap();
        }
        let many = serde_json::json!({ "subscribe": vec!["a"; 257] });
        assert!(GrantRules::from_json(many.as_object().unwrap(), &[]).is_err());
        for bad in [
            serde_json::json!({ "read": ["a"] }),
            serde_json::json!({ "subscribe": "a" }),
            serde_json::json!({ "subscribe": [1] }),
        ] {
            assert!(GrantRules::from_json(bad.as_object().unwrap(), &["roles"]).is_err(), "{bad}");
        }
    }

    #[test]
    fn a_service_is_listed_if_a_method_of_it_is_permitted() {
        for (pattern, listed) in
            [("orders/*", true), ("orders/list", true), ("*", true), ("o*", true), ("other/*", false), ("*/list", true)]
        {
            assert_eq!(compiled(Verb::Call, &[pattern], "").allows_some_method("orders"), listed, "{pattern}");
        }
        assert_eq!(method_name("a", "b/c%"), "a/b%2Fc%25");
    }

    proptest! {
        /// Under one template, two subjects never match the same name.
        #[test]
        fn subjects_are_disjoint(
            pattern in "[ab.]{0,3}\\{sub\\}(|[.a][ab.*]{0,4})",
            one in "[ab.*]{1,4}",
            other in "[ab.*]{1,4}",
            name in "[ab.*]{0,12}",
        ) {
            prop_assume!(one != other);
            let mut rules = GrantRules::default();
            prop_assume!(rules.add(Verb::Subscribe, &pattern).is_ok());
            let allows = |subject| {
                rules.compile(TemplateValues { subject, labels: &[] }).allows(Verb::Subscribe, &name)
            };
            prop_assert!(!(allows(&one) && allows(&other)), "{} {} {} {}", pattern, one, other, name);
        }

        /// Grants add up: a set allows what one of its patterns allows alone.
        #[test]
        fn grants_are_a_union(patterns in prop::collection::vec("[$ab*]{1,4}", 0..5), name in "[$ab]{1,6}") {
            let patterns: Vec<&str> = patterns.iter().map(String::as_str).collect();
            prop_assume!(patterns.iter().all(|text| text.matches('*').count() <= MAX_WILDCARDS));
            let all = compiled(Verb::Subscribe, &patterns, "x").allows(Verb::Subscribe, &name);
            let any = patterns.iter().any(|one| compiled(Verb::Subscribe, &[one], "x").allows(Verb::Subscribe, &name));
            prop_assert_eq!(all, any);
        }
    }
}
