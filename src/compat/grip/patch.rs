//! JSON Patch (RFC 6902), for items that answer a held response with a change of what its origin would have answered.

use serde_json::Value;

/// `document` after `patch`; nothing if it is no JSON, or the patch does not fit it.
pub fn apply(document: &[u8], patch: &Value) -> Option<Vec<u8>> {
    let mut document: Value = serde_json::from_slice(document).ok()?;
    for step in patch.as_array()? {
        let text = |key: &str| step.get(key).and_then(Value::as_str);
        let path = text("path")?;
        match text("op")? {
            "add" => add(&mut document, path, step.get("value")?.clone())?,
            "remove" => drop(remove(&mut document, path)?),
            "replace" => *document.pointer_mut(path)? = step.get("value")?.clone(),
            "move" => {
                let from = text("from")?;
                // Nothing can be moved into itself.
                if path.strip_prefix(from).is_some_and(|rest| rest.starts_with('/')) {
                    return None;
                }
                let value = remove(&mut document, from)?;
                add(&mut document, path, value)?;
            }
            "copy" => {
                let value = document.pointer(text("from")?)?.clone();
                add(&mut document, path, value)?;
            }
            "test" => (document.pointer(path)? == step.get("value")?).then_some(())?,
            _ => return None,
        }
    }
    serde_json::to_vec(&document).ok()
}

/// The container that `path` leads into, and the name in it.
fn place<'a>(document: &'a mut Value, path: &str) -> Option<(&'a mut Value, String)> {
    let (parent, name) = path.rsplit_once('/')?;
    Some((document.pointer_mut(parent)?, name.replace("~1", "/").replace("~0", "~")))
}

fn add(document: &mut Value, path: &str, value: Value) -> Option<()> {
    if path.is_empty() {
        *document = value;
        return Some(());
    }
    match place(document, path)? {
        (Value::Object(map), name) => {
            map.insert(name, value);
        }
        (Value::Array(list), name) => {
            let at = if name == "-" { list.len() } else { index(&name)? };
            (at <= list.len()).then(|| list.insert(at, value))?;
        }
        _ => return None,
    }
    Some(())
}

fn remove(document: &mut Value, path: &str) -> Option<Value> {
    match place(document, path)? {
        (Value::Object(map), name) => map.shift_remove(&name),
        (Value::Array(list), name) => {
            let at = index(&name)?;
            (at < list.len()).then(|| list.remove(at))
        }
        _ => None,
    }
}

fn index(name: &str) -> Option<usize> {
    let plain = name == "0" || (!name.starts_with('0') && name.bytes().all(|byte| byte.is_ascii_digit()));
    plain.then(|| name.parse().ok())?
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn patched(document: Value, patch: Value) -> Option<Value> {
        Some(serde_json::from_slice(&apply(document.to_string().as_bytes(), &patch)?).unwrap())
    }

    #[test]
    fn every_step() {
        let patch = json!([
            {"op": "test", "path": "/a", "value": 1},
            {"op": "replace", "path": "/a", "value": 2},
            {"op": "add", "path": "/list/1", "value": "x"},
            {"op": "add", "path": "/list/-", "value": "z"},
            {"op": "move", "from": "/list/0", "path": "/first"},
            {"op": "copy", "from": "/first", "path": "/a~1b"},
            {"op": "remove", "path": "/gone"},
        ]);
        let document = json!({"a": 1, "list": [0, 1], "gone": true});
        assert_eq!(patched(document, patch), Some(json!({"a": 2, "list": ["x", 1, "z"], "first": 0, "a/b": 0})));
    }

    #[test]
    fn what_does_not_fit_changes_nothing() {
        for patch in [
            json!([{"op": "test", "path": "/a", "value": 2}]),
            json!([{"op": "replace", "path": "/b", "value": 2}]),
            json!([{"op": "remove", "path": "/b"}]),
            json!([{"op": "remove", "path": ""}]),
            json!([{"op": "add", "path": "/list/5", "value": 2}]),
            json!([{"op": "add", "path": "/list/01", "value": 2}]),
            json!([{"op": "move", "from": "/list", "path": "/list/0"}]),
            json!([{"op": "odd", "path": "/a"}]),
            json!({}),
        ] {
            assert_eq!(patched(json!({"a": 1, "list": []}), patch.clone()), None, "{patch}");
        }
        assert_eq!(apply(b"no json", &json!([])), None);
    }
}
