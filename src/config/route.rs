//! [`Template`]: a path with tokens in it, as `/api/events/{id}`, and texts that tokens are put into.

use std::borrow::Cow;

/// Paths of one shape. A token stands for a whole segment, never an empty one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Template(Vec<Segment>);

#[derive(Clone, Debug, PartialEq, Eq)]
enum Segment {
    Literal(String),
    Token(String),
    /// Whatever follows, or nothing. Only weir's own paths have it.
    Rest,
}

impl Template {
    /// Reads what a person wrote, or says in a sentence what is wrong with it.
    pub fn parse(text: &str) -> Result<Self, String> {
        let inner =
            text.strip_prefix('/').ok_or_else(|| format!("{text:?} is not a path: write /api/events/{{id}}"))?;
        let segment = |segment: &str| match segment.strip_prefix('{').and_then(|name| name.strip_suffix('}')) {
            Some(name) if is_name(name) => Ok(Segment::Token(name.to_owned())),
            None if !segment.contains(['{', '}']) => Ok(Segment::Literal(segment.to_owned())),
            _ => {
                Err(format!("{text:?}: a token is a whole segment, and its name letters, digits and _: write /{{id}}/"))
            }
        };
        let mut segments: Vec<Segment> = segments(inner).map(segment).collect::<Result<_, _>>()?;
        if let Some(Segment::Literal(last)) = segments.last()
            && last == "*"
        {
            segments.pop();
            segments.push(Segment::Rest);
        }
        Ok(Template(segments))
    }

    /// The tokens of a path of this shape, as they stand in it. One slash at the end does not matter.
    pub fn matches<'a>(&'a self, path: &'a str) -> Option<Vec<(&'a str, &'a str)>> {
        let mut tokens = Vec::new();
        let mut given = segments(path.strip_prefix('/')?);
        for segment in &self.0 {
            let given = given.next();
            match (segment, given) {
                (Segment::Rest, _) => return Some(tokens),
                (Segment::Literal(own), Some(given)) if own == given => {}
                (Segment::Token(name), Some(given)) if !given.is_empty() => tokens.push((name.as_str(), given)),
                _ => return None,
            }
        }
        given.next().is_none().then_some(tokens)
    }

    /// Whether there is a path that is of both shapes.
    pub fn collides(&self, other: &Template) -> bool {
        let (mut ours, mut theirs) = (self.0.iter(), other.0.iter());
        loop {
            match (ours.next(), theirs.next()) {
                (Some(Segment::Rest), _) | (_, Some(Segment::Rest)) | (None, None) => return true,
                (Some(Segment::Literal(one)), Some(Segment::Literal(two))) if one != two => return false,
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

/// `text` with every `{name}` replaced by what `value` says.
pub fn fill<'a>(text: &str, value: impl Fn(&str) -> Cow<'a, str>) -> String {
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

    fn template(text: &str) -> Template {
        Template::parse(text).unwrap()
    }

    #[test]
    fn paths_of_a_shape() {
        let shape = template("/api/{room}/events/{id}");
        assert_eq!(shape.matches("/api/a%20b/events/7/"), Some(vec![("room", "a%20b"), ("id", "7")]));
        for other in ["/api/a/events", "/api/a/events/7/8", "/api//events/7", "/API/a/events/7", "/", "api/a/events/7"]
        {
            assert_eq!(shape.matches(other), None, "{other}");
        }
        assert_eq!(template("/").matches("/"), Some(vec![]));
        assert_eq!(template("/a").matches("/a/"), Some(vec![]));
        for wrong in ["api", "/a{id}", "/{}", "/{1}", "/{a b}", "/}"] {
            assert!(Template::parse(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn shapes_that_meet() {
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
            assert_eq!(template(one).collides(&template(other)), meet, "{one} {other}");
            assert_eq!(template(other).collides(&template(one)), meet, "{other} {one}");
        }
    }

    #[test]
    fn tokens_in_texts() {
        let value = |name: &str| Cow::from(if name == "id" { "7" } else { "" });
        assert_eq!(fill("room-{id}-{nope}.{ {1} {id", value), "room-7-.{ {1} {id");
    }
}
