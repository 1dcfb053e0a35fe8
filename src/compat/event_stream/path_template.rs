//! [`PathTemplate`]: a path with placeholders, as `/api/events/{id}`, and texts with the same placeholders.

use std::borrow::Cow;

/// A pattern of paths. A placeholder matches one segment that is not empty.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct PathTemplate(Vec<TemplateSegment>);

#[derive(Clone, Debug, PartialEq, Eq)]
enum TemplateSegment {
    Literal(String),
    Token(String),
    /// The rest of the path, which may be empty (`*`). Only the paths of weir and of other adapters have it.
    Rest,
}

impl PathTemplate {
    /// Parses a path from the configuration. The error is a sentence.
    pub(super) fn parse(text: &str) -> Result<Self, String> {
        let inner =
            text.strip_prefix('/').ok_or_else(|| format!("{text:?} is not a path: write /api/events/{{id}}"))?;
        let segment = |segment: &str| match segment.strip_prefix('{').and_then(|name| name.strip_suffix('}')) {
            Some(name) if is_name(name) => Ok(TemplateSegment::Token(name.to_owned())),
            None if !segment.contains(['{', '}']) => Ok(TemplateSegment::Literal(segment.to_owned())),
            _ => {
                Err(format!("{text:?}: a token is a whole segment, and its name letters, digits and _: write /{{id}}/"))
            }
        };
        let mut segments: Vec<TemplateSegment> = segments(inner).map(segment).collect::<Result<_, _>>()?;
        if let Some(TemplateSegment::Literal(last)) = segments.last()
            && last == "*"
        {
            segments.pop();
            segments.push(TemplateSegment::Rest);
        }
        Ok(PathTemplate(segments))
    }

    /// The placeholders with their segments of `path`, still percent-encoded. A slash at the end is ignored.
    pub(super) fn matches<'a>(&'a self, path: &'a str) -> Option<Vec<(&'a str, &'a str)>> {
        let mut tokens = Vec::new();
        let mut given = segments(path.strip_prefix('/')?);
        for segment in &self.0 {
            let given = given.next();
            match (segment, given) {
                (TemplateSegment::Rest, _) => return Some(tokens),
                (TemplateSegment::Literal(own), Some(given)) if own == given => {}
                (TemplateSegment::Token(name), Some(given)) if !given.is_empty() => tokens.push((name.as_str(), given)),
                _ => return None,
            }
        }
        given.next().is_none().then_some(tokens)
    }

    /// Whether a path exists that both templates match.
    pub(super) fn overlaps(&self, other: &PathTemplate) -> bool {
        let (mut ours, mut theirs) = (self.0.iter(), other.0.iter());
        loop {
            match (ours.next(), theirs.next()) {
                (Some(TemplateSegment::Rest), _) | (_, Some(TemplateSegment::Rest)) | (None, None) => return true,
                (Some(TemplateSegment::Literal(one)), Some(TemplateSegment::Literal(two))) if one != two => {
                    return false;
                }
                (Some(_), Some(_)) => {}
                _ => return false,
            }
        }
    }
}

fn segments(path: &str) -> impl Iterator<Item = &str> {
    let path = path.strip_suffix('/').unwrap_or(path);
    path.split('/').skip(usize::from(path.is_empty()))
}

fn is_name(text: &str) -> bool {
    let letter = |byte: u8| byte.is_ascii_alphabetic() || byte == b'_';
    text.bytes().next().is_some_and(letter) && text.bytes().all(|byte| letter(byte) || byte.is_ascii_digit())
}

/// Replaces every `{name}` in `text` by `value(name)`.
pub(super) fn fill<'a>(text: &str, value: impl Fn(&str) -> Cow<'a, str>) -> String {
    let mut out = String::with_capacity(text.len() + 16);
    let mut rest = text;
    while let Some(open) = rest.find('{') {
        out.push_str(&rest[..open]);
        rest = &rest[open..];
        match rest.find('}').filter(|close| is_name(&rest[1..*close])) {
            Some(close) => {
                out.push_str(&value(&rest[1..close]));
                rest = &rest[close + 1..];
            }
            None => {
                out.push('{');
                rest = &rest[1..];
            }
        }
    }
    out + rest
}

#[cfg(test)]
mod tests {
    use super::*;

    fn template(text: &str) -> PathTemplate {
        PathTemplate::parse(text).unwrap()
    }

    #[test]
    fn a_template_matches_paths() {
        let shape = template("/api/{room}/events/{id}");
        assert_eq!(shape.matches("/api/a%20b/events/7/"), Some(vec![("room", "a%20b"), ("id", "7")]));
        for other in ["/api/a/events", "/api/a/events/7/8", "/api//events/7", "/API/a/events/7", "/", "api/a/events/7"]
        {
            assert_eq!(shape.matches(other), None, "{other}");
        }
        assert_eq!(template("/").matches("/"), Some(vec![]));
        assert_eq!(template("/a").matches("/a/"), Some(vec![]));
        for wrong in ["api", "/a{id}", "/{}", "/{1}", "/{a b}", "/}"] {
            assert!(PathTemplate::parse(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn templates_that_overlap() {
        for (one, other, meet) in [
            ("/a/{x}", "/a/{y}", true),
            ("/a/{x}", "/a/b/", true),
            ("/a/{x}", "/{y}/b", true),
            ("/a/{x}", "/a", false),
            ("/a/{x}", "/b/{x}", false),
            ("/{x}", "/v1/*", true),
            ("/v1/x/y", "/v1/*", true),
            ("/v2", "/v1/*", false),
            ("/", "/", true),
            ("/{x}", "/", false),
        ] {
            assert_eq!(template(one).overlaps(&template(other)), meet, "{one} {other}");
            assert_eq!(template(other).overlaps(&template(one)), meet, "{other} {one}");
        }
    }

    #[test]
    fn placeholders_in_texts() {
        let value = |name: &str| Cow::from(if name == "id" { "7" } else { "" });
        assert_eq!(fill("room-{id}-{nope}.{ {1} {id", value), "room-7-.{ {1} {id");
    }
}
