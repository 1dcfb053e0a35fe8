//! The table of `proto-docs/errors.md` equals the table of the code.

use weir::error::{Code, Retry};

#[test]
fn the_documented_table_equals_the_codes() {
    let page = include_str!("../../proto-docs/errors.md");
    let rows: Vec<Vec<&str>> = page
        .lines()
        .filter(|line| line.starts_with("| `"))
        .map(|line| line.trim_matches('|').split('|').map(str::trim).collect())
        .collect();
    let names: Vec<&str> = rows.iter().map(|row| row[0].trim_matches('`')).collect();
    assert_eq!(names, Code::ALL.map(Code::as_str), "one row per code, in the order of Code::ALL");
    for (code, row) in Code::ALL.into_iter().zip(&rows) {
        let name = code.as_str();
        if let Ok(status) = row[1].parse::<u16>() {
            assert_eq!(status, code.status(), "HTTP status of {name}");
        }
        if let Ok(number) = row[2].replace('−', "-").parse::<i32>() {
            assert_eq!(number, code.number(), "JSON-RPC number of {name}");
        }
        let close = row[3].split(' ').next().and_then(|first| first.parse().ok());
        assert_eq!(close, code.close(), "close code of {name}");
        let again = match row[4] {
            "yes" => Some(Retry::Yes),
            "key" => Some(Retry::Key),
            "no" => Some(Retry::No),
            _ => None,
        };
        assert!(again.is_none_or(|again| again == code.retry()), "again? of {name}");
    }
}
