//! The rules of the source tree that no compiler checks: which module imports which, no circles between files, one
//! name per type, and an ARCHITECTURE.md that names what exists.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::{Path, PathBuf},
};

/// Pairs of files that may import each other.
const CIRCLES: &[(&str, &str, &str)] = &[];

/// Type names with more than one definition: every part of the program has its own.
const REPEATED: &[&str] = &["Config", "Error", "Result", "Settings"];

/// Words of ARCHITECTURE.md outside of its code blocks, so that it stays about two pages.
const MAX_WORDS: usize = 1_100;

#[test]
fn modules_import_only_what_architecture_md_lists() {
    let listed = listed_arrows(&architecture());
    let mut found: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
    for (file, imports) in imports(&sources()) {
        let from = top(&file);
        for to in imports.iter().map(|import| top(import)).filter(|to| *to != from) {
            found.entry(from.clone()).or_default().insert(to);
        }
    }
    found.remove("lib");
    let table: String =
        found.iter().map(|(from, to)| format!("{from} → {}\n", Vec::from_iter(to.clone()).join(", "))).collect();
    assert!(
        listed == found,
        "the arrows under \"Modules\" in ARCHITECTURE.md are not those of the source, which has:\n{table}"
    );
    // A module that reaches itself through others has no place in an order.
    let circles = circles(&found);
    assert!(circles.is_empty(), "circles between modules: {circles:#?}");
}

#[test]
fn no_files_import_each_other_in_a_circle() {
    let mut graph = imports(&sources());
    for (one, other, _reason) in CIRCLES {
        let imported = graph.get_mut(*one).is_some_and(|imports| imports.remove(*other));
        assert!(imported, "{one} no longer imports {other}: remove the pair from CIRCLES");
    }
    let circles = circles(&graph);
    assert!(circles.is_empty(), "circles between files: {circles:#?}");
}

#[test]
fn a_type_name_has_one_definition() {
    let mut definitions: BTreeMap<String, Vec<String>> = BTreeMap::new();
    for (file, text) in sources() {
        for name in type_definitions(&text) {
            definitions.entry(name).or_default().push(file.clone());
        }
    }
    definitions.retain(|name, files| files.len() > 1 && !REPEATED.contains(&name.as_str()));
    assert!(definitions.is_empty(), "type names with several definitions: {definitions:#?}");
}

#[test]
fn comments_name_programs_and_not_people() {
    const PEOPLE: [&str; 7] = ["who", "whoever", "whom", "nobody", "somebody", "anybody", "everybody"];
    let mut lines = Vec::new();
    for (file, text) in files() {
        for (number, line) in text.lines().enumerate() {
            let Some(comment) = comment_of(line) else { continue };
            if comment
                .split(|letter: char| !letter.is_alphabetic())
                .any(|word| PEOPLE.contains(&word.to_lowercase().as_str()))
            {
                lines.push(format!("{file}:{}: {comment}", number + 1));
            }
        }
    }
    assert!(lines.is_empty(), "comments about people: {lines:#?}");
}

#[test]
fn most_items_have_restricted_visibility() {
    let (mut public, mut restricted) = (0, 0);
    for (_, text) in files() {
        for line in text.lines().map(str::trim_start) {
            public += usize::from(line.starts_with("pub "));
            restricted += usize::from(line.starts_with("pub("));
        }
    }
    assert!(restricted > public, "{public} items are pub, {restricted} are restricted");
}

#[test]
fn architecture_md_names_what_exists_and_is_two_pages() {
    let text = architecture();
    let words: usize = text.split("```").step_by(2).map(|prose| prose.split_whitespace().count()).sum();
    assert!(words <= MAX_WORDS, "ARCHITECTURE.md has {words} words");
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut missing = Vec::new();
    let mut paths = 0;
    for code in text.split('`').skip(1).step_by(2).filter(|code| !code.contains(char::is_whitespace)) {
        let is_path = code.ends_with(".rs") || code.ends_with('/') || code.ends_with(".lua") || code.ends_with(".md");
        if is_path && !code.starts_with('/') {
            paths += 1;
            if ![root.join(code), root.join("src").join(code)].iter().any(|path| path.exists()) {
                missing.push(code.to_owned());
            }
        }
    }
    assert!(paths > 20, "only {paths} paths were recognized");
    assert!(missing.is_empty(), "ARCHITECTURE.md names paths that do not exist: {missing:#?}");
    // The steps of "One event" and "One call": `function` after the file that defines it.
    let mut steps = 0;
    for step in text.lines().filter(|line| line.starts_with("  ")).map(str::split_whitespace) {
        let step: Vec<&str> = step.collect();
        let [file, function, ..] = step[..] else { continue };
        if !file.ends_with(".rs") && !file.ends_with(".lua") {
            continue;
        }
        steps += 1;
        let code = fs::read_to_string(root.join("src").join(file)).unwrap_or_default();
        let name = function.rsplit("::").next().unwrap_or_default();
        let defined = code.contains(&format!("fn {name}(")) || code.contains(&format!("fn {name}<"));
        assert!(defined || file.ends_with(".lua"), "ARCHITECTURE.md: {file} does not define {function}");
    }
    assert!(steps >= 12, "only {steps} steps were recognized");
}

#[test]
fn imports_are_read_from_the_source() {
    let text = "use crate::{a::{b, c::D}, d};\nuse super::e;\n// crate::comment\nlet x = \"crate::text\"; crate::f::g();\n\
        #[cfg(test)]\nmod tests {\n    use crate::test_only;\n}\n";
    let paths = paths(&strip(text));
    assert_eq!(paths, ["crate::a::b", "crate::a::c::D", "crate::d", "super::e", "crate::f::g"]);
    assert_eq!(type_definitions("pub struct A;\npub(crate) enum B {}\nimpl C {}\ntype D = A;"), ["A", "B"]);
}

// --- the source tree ---

fn architecture() -> String {
    fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("ARCHITECTURE.md")).unwrap()
}

/// The files of `src/` by their path in it, tests left out.
fn files() -> BTreeMap<String, String> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let mut found = BTreeMap::new();
    let mut folders = vec![root.clone()];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(folder).unwrap() {
            let path: PathBuf = entry.unwrap().path();
            let name = path.strip_prefix(&root).unwrap().to_str().unwrap().to_owned();
            let is_test = name.contains("tests/") || name.ends_with("tests.rs") || name.ends_with("/tests");
            if path.is_dir() {
                folders.push(path);
            } else if name.ends_with(".rs") && !is_test {
                found.insert(name, fs::read_to_string(&path).unwrap());
            }
        }
    }
    found
}

/// As [`files`], without comments, string literals and test modules.
fn sources() -> BTreeMap<String, String> {
    files().into_iter().map(|(name, text)| (name, strip(&text))).collect()
}

fn comment_of(line: &str) -> Option<&str> {
    let line = line.trim_start();
    line.strip_prefix("//").map(|comment| comment.trim_start_matches(['/', '!']).trim_start())
}

fn strip(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(letter) = rest.chars().next() {
        if rest.starts_with("//") {
            rest = &rest[rest.find('\n').unwrap_or(rest.len())..];
        } else if rest.starts_with("#[cfg(test)]") {
            // The item that follows, to its closing brace or semicolon.
            let end = rest.find([';', '{']).unwrap_or(rest.len() - 1);
            rest = match rest.as_bytes()[end] {
                b'{' => &rest[end + matching_brace(&strip_literals(&rest[end..]))..],
                _ => &rest[end + 1..],
            };
        } else if let Some(end) = literal(rest) {
            out.push_str("\"\"");
            rest = &rest[end..];
        } else {
            out.push(letter);
            rest = &rest[letter.len_utf8()..];
        }
    }
    out
}

/// The same length of text, with blanks for literals and comments.
fn strip_literals(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(letter) = rest.chars().next() {
        let end = match rest.starts_with("//") {
            true => Some(rest.find('\n').unwrap_or(rest.len())),
            false => literal(rest),
        };
        let end = end.unwrap_or(0);
        if end > 0 {
            out.push_str(&" ".repeat(end));
            rest = &rest[end..];
        } else {
            out.push_str(&" ".repeat(letter.len_utf8() - 1));
            out.push(if letter.is_ascii() { letter } else { ' ' });
            rest = &rest[letter.len_utf8()..];
        }
    }
    out
}

/// The length of the string or character literal that `text` begins with.
fn literal(text: &str) -> Option<usize> {
    let raw = text.strip_prefix('r').or_else(|| text.strip_prefix("br"));
    if let Some(raw) = raw {
        let hashes = raw.bytes().take_while(|byte| *byte == b'#').count();
        if raw[hashes..].starts_with('"') {
            let close = format!("\"{}", "#".repeat(hashes));
            let body = hashes + 1;
            return Some(text.len() - raw.len() + body + raw[body..].find(&close)? + close.len());
        }
    }
    if let Some(body) = text.strip_prefix('"') {
        let mut escaped = false;
        for (at, letter) in body.char_indices() {
            match letter {
                _ if escaped => escaped = false,
                '\\' => escaped = true,
                '"' => return Some(at + 2),
                _ => {}
            }
        }
    }
    // A lifetime has no closing quote near by.
    let body = text.strip_prefix('\'')?;
    if body.starts_with('\\') {
        return body[2..].find('\'').map(|at| at + 4);
    }
    let first = body.chars().next()?;
    body[first.len_utf8()..].starts_with('\'').then_some(first.len_utf8() + 2)
}

fn matching_brace(text: &str) -> usize {
    let mut depth = 0;
    for (at, letter) in text.char_indices() {
        match letter {
            '{' => depth += 1,
            '}' => depth -= 1,
            _ => {}
        }
        if depth == 0 {
            return at + 1;
        }
    }
    text.len()
}

// --- imports ---

/// The files that each file imports.
fn imports(sources: &BTreeMap<String, String>) -> BTreeMap<String, BTreeSet<String>> {
    let modules: BTreeMap<Vec<&str>, &str> =
        sources.keys().map(|file| (file.trim_end_matches(".rs").split('/').collect(), file.as_str())).collect();
    let mut found = BTreeMap::new();
    for (file, text) in sources {
        let own: Vec<&str> = match file.as_str() {
            "lib.rs" | "main.rs" => Vec::new(),
            file => file.trim_end_matches(".rs").split('/').collect(),
        };
        let mut imported = BTreeSet::new();
        for path in paths(text) {
            let mut segments = path.split("::").peekable();
            let mut module = match segments.peek() {
                Some(&"crate" | &"weir") => {
                    segments.next();
                    Vec::new()
                }
                _ => own.clone(),
            };
            while let Some(&("self" | "super")) = segments.peek() {
                if segments.next() == Some("super") {
                    module.pop();
                }
            }
            module.extend(segments);
            // The longest prefix that is a file holds what the path names.
            while !module.is_empty() && !modules.contains_key(&module) {
                module.pop();
            }
            if let Some(target) = modules.get(&module)
                && *target != file
            {
                imported.insert((*target).to_owned());
            }
        }
        found.insert(file.clone(), imported);
    }
    found
}

/// The paths into this crate that stripped source names, in full.
fn paths(text: &str) -> Vec<String> {
    let mut found = Vec::new();
    for root in ["crate::", "super::", "self::", "weir::"] {
        for (at, _) in text.match_indices(root) {
            let before = text[..at].chars().next_back().unwrap_or(' ');
            if !before.is_alphanumeric() && before != '_' && before != ':' {
                tree(&text[at..], String::new(), &mut found);
            }
        }
    }
    found.sort_by_key(|(at, _)| std::cmp::Reverse(*at));
    found.into_iter().map(|(_, path)| path).collect()
}

/// Reads the path or tree of paths that `text` begins with, and returns what follows. A path is found with the length
/// of the text behind it, which orders paths as they stand.
fn tree<'a>(text: &'a str, prefix: String, found: &mut Vec<(usize, String)>) -> &'a str {
    let (mut path, mut rest) = (prefix, text.trim_start());
    loop {
        if let Some(list) = rest.strip_prefix('{') {
            rest = list.trim_start();
            while !rest.is_empty() && !rest.starts_with('}') {
                let before = rest.len();
                rest = tree(rest, path.clone(), found).trim_start();
                rest = rest.strip_prefix(',').unwrap_or(rest).trim_start();
                if rest.len() == before {
                    return rest;
                }
            }
            return rest.get(1..).unwrap_or_default();
        }
        let end = rest.find(|letter: char| !letter.is_alphanumeric() && letter != '_').unwrap_or(rest.len());
        if end > 0 && &rest[..end] != "self" || path.is_empty() {
            if !path.is_empty() {
                path.push_str("::");
            }
            path.push_str(&rest[..end]);
        }
        rest = &rest[end..];
        match rest.strip_prefix("::") {
            Some(next) => rest = next,
            None => break,
        }
    }
    found.push((rest.len(), path));
    // `as NAME`
    match rest.trim_start().strip_prefix("as ") {
        Some(alias) => alias.trim_start_matches(|letter: char| letter.is_alphanumeric() || letter == '_'),
        None => rest,
    }
}

fn top(file: &str) -> String {
    file.split('/').next().unwrap_or_default().trim_end_matches(".rs").to_owned()
}

/// The groups of more than one node that reach each other.
fn circles(graph: &BTreeMap<String, BTreeSet<String>>) -> Vec<Vec<String>> {
    let reach: BTreeMap<&String, BTreeSet<&String>> = graph.keys().map(|from| (from, reachable(graph, from))).collect();
    let mut groups: BTreeSet<Vec<String>> = BTreeSet::new();
    for (from, reached) in &reach {
        if reached.contains(from) {
            let group = reached.iter().filter(|to| reach.get(*to).is_some_and(|back| back.contains(from)));
            groups.insert(group.map(|to| (*to).clone()).collect());
        }
    }
    groups.into_iter().collect()
}

fn reachable<'a>(graph: &'a BTreeMap<String, BTreeSet<String>>, from: &'a String) -> BTreeSet<&'a String> {
    let mut reached = BTreeSet::new();
    let mut open = vec![from];
    while let Some(node) = open.pop() {
        for next in graph.get(node).into_iter().flatten() {
            if reached.insert(next) {
                open.push(next);
            }
        }
    }
    reached
}

/// The rows `module → a, b` of the block under "Arrows".
fn listed_arrows(text: &str) -> BTreeMap<String, BTreeSet<String>> {
    let rows = text.lines().filter_map(|line| line.split_once(" → "));
    let rows = rows.filter(|(from, _)| from.trim().chars().all(|letter| letter.is_ascii_lowercase() || letter == '_'));
    rows.map(|(from, to)| (from.trim().to_owned(), to.split(',').map(|to| to.trim().to_owned()).collect())).collect()
}

/// The structs, enums, traits and unions that stripped source defines.
fn type_definitions(text: &str) -> Vec<String> {
    let mut found = Vec::new();
    for line in text.lines() {
        let words = line.split_whitespace().filter(|word| !word.starts_with("pub"));
        let words: Vec<&str> = words.take(2).collect();
        if let ["struct" | "enum" | "trait" | "union", name] = words[..] {
            let end = name.find(|letter: char| !letter.is_alphanumeric() && letter != '_').unwrap_or(name.len());
            found.push(name[..end].to_owned());
        }
    }
    found
}
