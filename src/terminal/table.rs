//! [`TextTable`]: objects as rows of text.

use serde_json::{Map, Value};

/// The members that are a Unix time in milliseconds.
const TIMES: [&str; 4] = ["time", "since", "seen", "expires"];

/// A row per object and a column per member. An object with a list of objects has a row for each of those.
#[derive(Default)]
pub(super) struct TextTable {
    columns: Vec<String>,
    rows: Vec<Vec<(usize, String)>>,
}

/// Unix milliseconds as `2026-11-21T15:04:05.678Z`.
pub(crate) fn utc(ms: u64) -> String {
    let (days, ms) = ((ms / 86_400_000) as i64, ms % 86_400_000);
    // `civil_from_days` of Howard Hinnant, for dates since 1970.
    let shifted = days + 719_468;
    let era = shifted / 146_097;
    let of_era = shifted % 146_097;
    let year_of_era = (of_era - of_era / 1460 + of_era / 36_524 - of_era / 146_096) / 365;
    let of_year = of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let month = (5 * of_year + 2) / 153;
    let day = of_year - (153 * month + 2) / 5 + 1;
    let month = if month < 10 { month + 3 } else { month - 9 };
    let year = year_of_era + era * 400 + i64::from(month <= 2);
    let (hour, minute, second) = (ms / 3_600_000, ms / 60_000 % 60, ms / 1000 % 60);
    format!("{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}.{:03}Z", ms % 1000)
}

impl TextTable {
    pub(super) fn add(&mut self, object: &Map<String, Value>) {
        let inner = object.iter().find_map(|(name, value)| Some((name, objects(value)?)));
        let Some((list, inner)) = inner else { return self.row(object.iter()) };
        for part in inner {
            // The members of the part take the place of the list.
            self.row(object.iter().flat_map(|(name, value)| {
                let (own, part) = if name == list { (None, Some(part)) } else { (Some((name, value)), None) };
                own.into_iter().chain(part.into_iter().flatten())
            }));
        }
    }

    fn row<'a>(&mut self, members: impl Iterator<Item = (&'a String, &'a Value)>) {
        let mut row = Vec::new();
        for (name, value) in members.filter(|(_, value)| value.as_array().is_none_or(|list| !list.is_empty())) {
            let column = self.columns.iter().position(|column| column == name).unwrap_or_else(|| {
                self.columns.push(name.clone());
                self.columns.len() - 1
            });
            row.push((column, cell(name, value)));
        }
        self.rows.push(row);
    }

    /// The lines, with the names of the columns first. None without rows.
    pub(super) fn lines(&self) -> Vec<String> {
        if self.rows.is_empty() {
            return Vec::new();
        }
        let title = |name: &String| name.replace("_ms", "_time").replace('_', " ").to_uppercase();
        let mut lines = vec![self.columns.iter().map(title).collect::<Vec<_>>()];
        for row in &self.rows {
            let mut cells = vec!["-".to_owned(); self.columns.len()];
            for (column, cell) in row {
                cells[*column].clone_from(cell);
            }
            lines.push(cells);
        }
        let width = |column: usize| lines.iter().map(|cells| cells[column].chars().count()).max().unwrap_or(0);
        let widths: Vec<usize> = (0..self.columns.len()).map(width).collect();
        let line = |cells: &Vec<String>| {
            let padded = cells.iter().zip(&widths).map(|(cell, width)| format!("{cell:<width$}"));
            padded.collect::<Vec<_>>().join("  ").trim_end().to_owned()
        };
        lines.iter().map(line).collect()
    }
}

/// The objects of a list that has nothing else.
fn objects(value: &Value) -> Option<Vec<&Map<String, Value>>> {
    let list: Vec<_> = value.as_array()?.iter().map(Value::as_object).collect::<Option<_>>()?;
    (!list.is_empty()).then_some(list)
}

fn cell(name: &str, value: &Value) -> String {
    let text = match value {
        Value::Number(ms) if TIMES.contains(&name) => ms.as_u64().map_or_else(|| ms.to_string(), utc),
        Value::Number(ms) if name.ends_with("_ms") => ms.as_u64().map_or_else(|| ms.to_string(), rounded),
        Value::Null => "-".into(),
        Value::String(text) if text.is_empty() => "-".into(),
        Value::String(text) => text.clone(),
        Value::Array(list) => list.iter().map(|item| cell(name, item)).collect::<Vec<_>>().join(","),
        other => other.to_string(),
    };
    // Names and subjects come from clients: a control character would reach the terminal.
    let shown = |c: char| if c.is_control() { c.escape_default().to_string() } else { c.to_string() };
    text.chars().map(shown).collect()
}

/// Milliseconds as a duration with one unit.
fn rounded(ms: u64) -> String {
    match ms {
        0..1_000 => format!("{ms}ms"),
        1_000..60_000 => format!("{:.1}s", ms as f64 / 1e3),
        60_000..3_600_000 => format!("{}m", ms / 60_000),
        3_600_000..172_800_000 => format!("{}h", ms / 3_600_000),
        _ => format!("{}d", ms / 86_400_000),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lines(objects: &[Value]) -> Vec<String> {
        let mut table = TextTable::default();
        objects.iter().for_each(|object| table.add(object.as_object().unwrap()));
        table.lines()
    }

    #[test]
    fn columns_are_aligned_and_times_are_readable() {
        let shown = lines(&[
            serde_json::json!({"channel": "größe", "top": 12, "time": 1763640000123u64, "methods": ["a", "b"]}),
            serde_json::json!({"channel": "b", "bytes": 3, "subject": "", "remote": null, "info": {"n": 1}}),
        ]);
        let expected = [
            "CHANNEL  TOP  TIME                      METHODS  BYTES  SUBJECT  REMOTE  INFO",
            "größe    12   2025-11-20T12:00:00.123Z  a,b      -      -        -       -",
            "b        -    -                         -        3      -        -       {\"n\":1}",
        ];
        assert_eq!(shown, expected);
        assert!(lines(&[]).is_empty());
    }

    #[test]
    fn a_list_of_objects_has_a_row_for_each() {
        let channels = serde_json::json!([{"channel": "a", "lag_ms": 1}, {"channel": "b", "lag_ms": 172_800_000}]);
        let shown = lines(&[
            serde_json::json!({"name": "x", "channels": channels, "seen": 0}),
            serde_json::json!({"name": "y", "channels": [], "seen": 0}),
        ]);
        let expected = [
            "NAME  CHANNEL  LAG TIME  SEEN",
            "x     a        1ms       1970-01-01T00:00:00.000Z",
            "x     b        2d        1970-01-01T00:00:00.000Z",
            "y     -        -         1970-01-01T00:00:00.000Z",
        ];
        assert_eq!(shown, expected);
    }

    #[test]
    fn times_are_those_of_the_calendar() {
        assert_eq!(utc(951_827_696_001), "2000-02-29T12:34:56.001Z");
        assert_eq!(utc(1_798_761_599_999), "2026-12-31T23:59:59.999Z");
    }

    #[test]
    fn control_characters_do_not_reach_the_terminal() {
        let shown = lines(&[serde_json::json!({"name": "\u{1b}[31m\u{9b}\n"})]);
        assert_eq!(shown, ["NAME", "\\u{1b}[31m\\u{9b}\\n"]);
    }
}
