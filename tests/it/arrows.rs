//! The arrows of ARCHITECTURE.md: who may use whom. Read from the `use crate::` lines.

use std::{fs, path::Path};

/// From the top down: a module uses what stands below it, or beside it with the same number.
const FLOORS: &[(&str, u8)] = &[
    ("main", 9),
    ("cli", 9),
    ("app", 8),
    ("http", 7),
    ("node", 5),
    ("transport", 6),
    ("compat", 6),
    ("sessions", 6),
    ("rpc", 5),
    ("auth", 5),
    ("backend", 5),
    ("presence", 5),
    ("bus", 4),
    ("cluster", 4),
    ("token", 3),
    ("event", 3),
    ("channel", 2),
    ("json", 2),
    ("position", 2),
    ("config", 2),
    ("net", 3),
    ("error", 1),
    ("pattern", 1),
    ("duration", 1),
];
/// May be used, and may use little, anywhere.
const ANYWHERE: &[&str] = &["metrics", "telemetry"];
/// Uses what stands above it, for a reason.
const EXCEPTIONS: &[(&str, &str)] = &[];

#[test]
fn point_one_way() {
    let src = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let mut wrong = Vec::new();
    visit(&src, &mut |path| {
        let from = path.strip_prefix(&src).unwrap().to_str().unwrap().to_owned();
        let of = from.split('/').next().unwrap().trim_end_matches(".rs");
        if of == "lib" || ANYWHERE.contains(&of) {
            return;
        }
        let text = fs::read_to_string(path).unwrap();
        for used in used(&text) {
            if ANYWHERE.contains(&used.as_str()) || EXCEPTIONS.contains(&(of, used.as_str())) {
                continue;
            }
            let sideways =
                used != of && [of, &used].iter().all(|name| ["rpc", "auth", "backend", "presence"].contains(name));
            if floor(&used) > floor(of) || sideways {
                wrong.push(format!("{from} uses {used}"));
            }
        }
        let knows_http = ["axum", "hyper", "http_body"].iter().any(|name| text.contains(&format!("use {name}")));
        if knows_http && !["http", "transport", "net", "compat", "cli"].contains(&of) {
            wrong.push(format!("{from} knows HTTP"));
        }
        if text.contains("backend::memory") && of != "app" && !text.contains("#[cfg(test)]") {
            wrong.push(format!("{from} names a backend"));
        }
        for (one, other) in [("sse", "ws"), ("ws", "sse"), ("reading", "sse"), ("sse", "reading")] {
            if from.starts_with(&format!("transport/{one}")) && text.contains(&format!("transport::{other}")) {
                wrong.push(format!("{from} imports another transport"));
            }
        }
    });
    assert!(wrong.is_empty(), "{wrong:#?}");
}

#[test]
fn are_read_from_the_source() {
    assert_eq!(used("use crate::{a::{b, c}, d};\nlet x = crate::e::f(crate::G);"), ["a", "d", "e"]);
    assert!(floor("http") > floor("bus"));
}

fn floor(module: &str) -> u8 {
    let found = FLOORS.iter().find(|(name, _)| *name == module);
    found.unwrap_or_else(|| panic!("module {module} has no floor: add it to FLOORS")).1
}

/// The modules of this crate that a file uses, tests left out.
fn used(text: &str) -> Vec<String> {
    let text = text.split("#[cfg(test)]\nmod tests {").next().unwrap_or_default();
    let mut found = Vec::new();
    for part in text.split("crate::").skip(1) {
        match part.strip_prefix('{') {
            // `use crate::{a::…, b}`: the names at depth one.
            Some(list) => {
                let (mut depth, mut name) = (1, String::new());
                let mut fresh = true;
                for letter in list.chars() {
                    match letter {
                        '{' => depth += 1,
                        '}' => depth -= 1,
                        ',' if depth == 1 => fresh = true,
                        ':' => fresh = false,
                        letter if depth == 1 && fresh && (letter.is_alphanumeric() || letter == '_') => {
                            name.push(letter)
                        }
                        _ => {}
                    }
                    if (depth == 0 || letter == ',' || letter == ':') && !name.is_empty() {
                        found.push(std::mem::take(&mut name));
                    }
                    if depth == 0 {
                        break;
                    }
                }
            }
            None => found.push(part.chars().take_while(|letter| letter.is_alphanumeric() || *letter == '_').collect()),
        }
    }
    found.retain(|name| name.chars().next().is_some_and(char::is_lowercase));
    found
}

fn visit(folder: &Path, each: &mut dyn FnMut(&Path)) {
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        match path.is_dir() {
            true => visit(&path, each),
            false if path.extension().is_some_and(|extension| extension == "rs") => each(&path),
            false => {}
        }
    }
}
