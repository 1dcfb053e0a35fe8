//! The tests that `proto-docs/guarantees.md` cites exist.

use std::{fs, path::Path};

#[test]
fn every_cited_test_exists() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let page = fs::read_to_string(root.join("proto-docs/guarantees.md")).unwrap();
    let mut sources = String::new();
    for folder in ["tests/it", "src"] {
        read_sources(&root.join(folder), &mut sources);
    }
    let rows = page.lines().filter(|line| line.starts_with("| ") && !line.starts_with("| operation"));
    let mut count = 0;
    for row in rows {
        let cited = row.trim_end_matches('|').rsplit('|').next().unwrap_or_default();
        let tests: Vec<&str> = cited.split('`').filter(|part| !part.trim().is_empty()).collect();
        assert!(!tests.is_empty(), "this row cites no test: {row}");
        for test in tests {
            assert!(
                [format!("fn {test}("), format!("fn {test}<")].iter().any(|line| sources.contains(line)),
                "there is no test {test}"
            );
            count += 1;
        }
    }
    assert!(count > 20, "the table could not be read");
}

fn read_sources(folder: &Path, sources: &mut String) {
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            read_sources(&path, sources);
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            *sources += &fs::read_to_string(path).unwrap();
        }
    }
}
