//! [`RequestTarget`]: path and query of a request.

use std::fmt;

/// Path and query of a request (RFC 9112, section 3.2), percent-encoded.
#[derive(Clone, Debug)]
pub(super) struct RequestTarget(String);

impl RequestTarget {
    /// `path` is not escaped.
    pub(super) fn new(path: &str) -> Self {
        RequestTarget(path.to_owned())
    }

    /// Appends to the path; `/` is not escaped.
    pub(super) fn path(mut self, name: &str) -> Self {
        escape(name, b"/", &mut self.0);
        self
    }

    /// Appends one segment to the path.
    pub(super) fn segment(mut self, name: &str) -> Self {
        escape(name, b"", &mut self.0);
        self
    }

    pub(super) fn query(mut self, name: &str, value: impl fmt::Display) -> Self {
        self.0.push(if self.0.contains('?') { '&' } else { '?' });
        self.0.push_str(name);
        self.0.push('=');
        escape(&value.to_string(), b"", &mut self.0);
        self
    }

    /// Appends one parameter per value; an `Option` is a parameter that may be absent.
    pub(super) fn each<T: fmt::Display>(self, name: &str, values: impl IntoIterator<Item = T>) -> Self {
        values.into_iter().fold(self, |target, value| target.query(name, value))
    }
}

impl fmt::Display for RequestTarget {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

fn escape(text: &str, unescaped: &[u8], out: &mut String) {
    for byte in text.bytes() {
        if byte.is_ascii_alphanumeric() || b"-._~".contains(&byte) || unescaped.contains(&byte) {
            out.push(char::from(byte));
        } else {
            out.push_str(&format!("%{byte:02X}"));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_percent_encoded() {
        let target = RequestTarget::new("/v1/services/").path("a/b c?d").query("x", "1&2=3").each("y", None::<&str>);
        assert_eq!(target.each("c", ["ü", "*"]).to_string(), "/v1/services/a/b%20c%3Fd?x=1%262%3D3&c=%C3%BC&c=%2A");
    }
}
