//! Durations in configuration, flags, queries and bodies: `500ms`, `5s`, `2m`, `1h`, `30d`.
//!
//! A bare number is rejected, because `timeout=5` might mean seconds or milliseconds.

use std::time::Duration;

/// Longest duration: short enough to be added to a clock without overflow.
pub(crate) const LONGEST: Duration = Duration::from_secs(100 * 365 * 24 * 60 * 60);

const UNITS: [(&str, u64); 5] = [("ms", 1), ("s", 1_000), ("m", 60_000), ("h", 3_600_000), ("d", 86_400_000)];

/// Parses a duration, as `5s`.
///
/// # Errors
/// A sentence that says how to write the duration.
pub fn parse(text: &str) -> Result<Duration, String> {
    let digits = text.bytes().take_while(u8::is_ascii_digit).count();
    let (number, unit) = text.split_at(digits);
    if digits == 0 {
        return Err(format!("{text:?} is not a duration: write 500ms, 5s, 2m, 1h or 30d"));
    }
    if unit.is_empty() {
        return Err(format!("{text} of what? write {text}s or {text}ms"));
    }
    let Some((_, ms)) = UNITS.into_iter().find(|(name, _)| *name == unit) else {
        return Err(format!(
            "{text:?} is not a duration: the units are ms, s, m, h and d, and one number has one unit"
        ));
    };
    let parsed = number.parse::<u64>().ok().and_then(|number| number.checked_mul(ms)).map(Duration::from_millis);
    parsed.filter(|parsed| *parsed <= LONGEST).ok_or_else(|| format!("{text} is too long: at most 36500d"))
}

/// The shortest text that [`parse`] reads back, to the millisecond.
pub fn format(duration: Duration) -> String {
    let ms = duration.as_millis() as u64;
    let (name, unit) =
        UNITS.into_iter().rev().find(|(_, unit)| ms != 0 && ms.is_multiple_of(*unit)).unwrap_or(("s", 1_000));
    format!("{}{name}", ms / unit)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn durations_are_parsed() {
        for (text, ms) in [("0s", 0), ("500ms", 500), ("5s", 5_000), ("2m", 120_000), ("1h", 3_600_000)] {
            assert_eq!(parse(text), Ok(Duration::from_millis(ms)));
            assert_eq!(format(Duration::from_millis(ms)), text);
        }
        assert_eq!(parse("90s"), Ok(Duration::from_secs(90)));
        assert_eq!(format(Duration::from_secs(172_800)), "2d");
    }

    #[test]
    fn other_text_is_rejected() {
        assert_eq!(parse("5").unwrap_err(), "5 of what? write 5s or 5ms");
        for bad in ["", "s", "-5s", "1.5s", "5 s", "5sec", "1h30m", "36501d", "99999999999999999999ms", "5S"] {
            assert!(parse(bad).is_err(), "{bad}");
        }
    }

    proptest! {
        #[test]
        fn formatted_durations_are_parsed_back(ms in 0..=LONGEST.as_millis() as u64) {
            let duration = Duration::from_millis(ms);
            prop_assert_eq!(parse(&format(duration)), Ok(duration));
        }
    }
}
