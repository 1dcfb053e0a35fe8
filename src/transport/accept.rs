//! Content negotiation by the `Accept` header (RFC 9110, section 12.5.1).

use http::{HeaderMap, header};

/// How much a client wants a media type.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Preference {
    /// The `q` of the most specific range that matches, in thousandths. 0 is "not acceptable".
    pub(crate) quality: u16,
    /// The range is the media type itself.
    pub(crate) exact: bool,
}

/// The media ranges of `Accept` in lower case, without their parameters, and their `q` in thousandths. None if the header is
/// absent or empty.
pub(crate) fn ranges(headers: &HeaderMap) -> impl Iterator<Item = (String, u16)> {
    let values = headers.get_all(header::ACCEPT).iter().filter_map(|value| value.to_str().ok());
    values.flat_map(|value| value.split(',')).filter_map(|range| {
        let mut parts = range.split(';').map(|part| part.trim().to_ascii_lowercase());
        let kind = parts.next().filter(|kind| !kind.is_empty())?;
        let quality = parts.find_map(|part| part.strip_prefix("q=")?.trim().parse::<f32>().ok());
        Some((kind, (quality.unwrap_or(1.0).clamp(0.0, 1.0) * 1000.0).round() as u16))
    })
}

/// The preference for `kind`, which is in lower case. `None` if no range matches it; without the header everything is
/// acceptable.
pub(crate) fn preference(headers: &HeaderMap, kind: &str) -> Option<Preference> {
    let main = kind.split('/').next().unwrap_or_default();
    let mut empty = true;
    let best = ranges(headers)
        .inspect(|_| empty = false)
        .filter_map(|(range, quality)| {
            let specificity = match range.strip_suffix("/*") {
                None if range == kind => 2,
                Some(any) if any == main => 1,
                Some("*") => 0,
                _ => return None,
            };
            Some((specificity, quality))
        })
        .max();
    match best {
        Some((specificity, quality)) => Some(Preference { quality, exact: specificity == 2 }),
        None if empty => Some(Preference { quality: 1000, exact: false }),
        None => None,
    }
}

#[cfg(test)]
mod tests {
    use http::HeaderValue;

    use super::*;

    #[test]
    fn the_most_specific_range_decides() {
        let of = |accept: &'static str| {
            let headers = HeaderMap::from_iter([(header::ACCEPT, HeaderValue::from_static(accept))]);
            preference(&headers, "application/json").map(|it| (it.quality, it.exact))
        };
        for (accept, expected) in [
            ("", Some((1000, false))),
            (" , ", Some((1000, false))),
            ("*/*", Some((1000, false))),
            ("application/*;q=0.5, */*", Some((500, false))),
            ("*/*, Application/JSON; charset=utf-8; Q=0.25", Some((250, true))),
            ("application/json;q=0, */*", Some((0, true))),
            ("*/*;q=0", Some((0, false))),
            ("application/json;q=x", Some((1000, true))),
            ("application/json;q=7", Some((1000, true))),
            ("text/html, text/*", None),
        ] {
            assert_eq!(of(accept), expected, "{accept}");
        }
        assert_eq!(preference(&HeaderMap::new(), "a/b"), Some(Preference { quality: 1000, exact: false }));
    }
}
