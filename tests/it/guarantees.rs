//! A promise whose test is gone is only a sentence.

use std::{fs, path::Path};

#[test]
fn each_names_tests_that_exist() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let page = fs::read_to_string(root.join("proto-docs/guarantees.md")).unwrap();
    let mut sources = String::new();
    for folder in ["tests/it", "tests/it/redis", "src/rpc/tests", "src/presence"] {
        for entry in fs::read_dir(root.join(folder)).unwrap() {
            let path = entry.unwrap().path();
            if path.extension().is_some_and(|extension| extension == "rs") {
                sources += &fs::read_to_string(path).unwrap();
            }
        }
    }
    let rows = page.lines().filter(|line| line.starts_with("| ") && !line.starts_with("| operation"));
    let mut count = 0;
    for row in rows {
        let cited = row.trim_end_matches('|').rsplit('|').next().unwrap_or_default();
        let tests: Vec<&str> = cited.split('`').filter(|part| !part.trim().is_empty()).collect();
        assert!(!tests.is_empty(), "no test holds: {row}");
        for test in tests {
            assert!(sources.contains(&format!("fn {test}")), "there is no test {test}");
            count += 1;
        }
    }
    assert!(count > 20, "the table could not be read");
}
