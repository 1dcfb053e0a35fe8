//! JSON Patch (RFC 6902): items may respond to a held request with a change of the origin's response.

use std::slice;

use json_patch::{Patch, PatchOperation, jsonptr::PointerBuf};
use serde::Deserialize as _;
use serde_json::Value;

use crate::json::parse_owned;

/// The document after the patch; `None` if it is not JSON, or the patch is invalid or does not apply.
pub(super) fn apply(document: &[u8], patch: &Value) -> Option<Vec<u8>> {
    let mut document: Value = parse_owned(document).ok()?;
    let patch = Patch::deserialize(patch).ok()?;
    for operation in &*patch {
        match operation {
            PatchOperation::Remove(operation) => move_to_end(&mut document, &operation.path),
            PatchOperation::Move(operation) => move_to_end(&mut document, &operation.from),
            _ => {}
        }
        // "Unsafe" leaves the document half patched on an error; this one is discarded then.
        json_patch::patch_unsafe(&mut document, slice::from_ref(operation)).ok()?;
    }
    serde_json::to_vec(&document).ok()
}

/// Makes a member the last of its object: `json_patch` puts the last member in the place of the one that it removes.
fn move_to_end(document: &mut Value, path: &PointerBuf) {
    let Some((parent, name)) = path.split_back() else { return };
    let Some(Value::Object(members)) = document.pointer_mut(parent.as_str()) else { return };
    if let Some((name, value)) = members.shift_remove_entry(name.decoded().as_ref()) {
        members.insert(name, value);
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn patched(document: Value, patch: Value) -> Option<Value> {
        Some(serde_json::from_slice(&apply(document.to_string().as_bytes(), &patch)?).unwrap())
    }

    #[test]
    fn all_operations_apply() {
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
    fn members_keep_their_order() {
        let document = br#"{"a":1,"gone":0,"b":2,"c":3}"#;
        let remove = json!([{"op": "remove", "path": "/gone"}]);
        assert_eq!(apply(document, &remove).unwrap(), br#"{"a":1,"b":2,"c":3}"#);
        let rename = json!([{"op": "move", "from": "/gone", "path": "/last"}]);
        assert_eq!(apply(document, &rename).unwrap(), br#"{"a":1,"b":2,"c":3,"last":0}"#);
    }

    #[test]
    fn invalid_patches_are_rejected() {
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
