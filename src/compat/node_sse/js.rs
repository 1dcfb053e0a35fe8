//! Conversions of JavaScript.

use serde_json::{Number, Value};

use crate::json::write_json_str;

/// `String(value)`, which is also `value + ""`.
pub(super) fn text(value: &Value) -> String {
    match value {
        Value::Null => "null".to_owned(),
        Value::Bool(flag) => flag.to_string(),
        Value::Number(number) => self::number(number),
        Value::String(text) => text.clone(),
        Value::Array(items) => {
            let items: Vec<_> =
                items.iter().map(|item| if item.is_null() { String::new() } else { text(item) }).collect();
            items.join(",")
        }
        Value::Object(_) => "[object Object]".to_owned(),
    }
}

/// `JSON.stringify(value)`.
pub(super) fn stringify(value: &Value, out: &mut Vec<u8>) {
    match value {
        Value::Number(number) => out.extend_from_slice(self::number(number).as_bytes()),
        Value::String(text) => write_json_str(text, out),
        Value::Array(items) => {
            out.push(b'[');
            for (at, item) in items.iter().enumerate() {
                if at > 0 {
                    out.push(b',');
                }
                stringify(item, out);
            }
            out.push(b']');
        }
        Value::Object(members) => {
            out.push(b'{');
            for (at, (name, member)) in members.iter().enumerate() {
                if at > 0 {
                    out.push(b',');
                }
                write_json_str(name, out);
                out.push(b':');
                stringify(member, out);
            }
            out.push(b'}');
        }
        Value::Null | Value::Bool(_) => out.extend_from_slice(text(value).as_bytes()),
    }
}

/// JavaScript's numbers are doubles.
fn number(number: &Number) -> String {
    let number = number.as_f64().unwrap_or_default();
    match number.abs() {
        // -0 too.
        0.0 => "0".to_owned(),
        size if (1e-6..1e21).contains(&size) => number.to_string(),
        _ => {
            let text = format!("{number:e}");
            if text.contains("e-") { text } else { text.replace('e', "e+") }
        }
    }
}

/// `!value`.
pub(super) fn is_falsy(value: &Value) -> bool {
    match value {
        Value::Null => true,
        Value::Bool(flag) => !flag,
        Value::Number(number) => number.as_f64() == Some(0.0),
        Value::String(text) => text.is_empty(),
        Value::Array(_) | Value::Object(_) => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn conversions_equal_those_of_node_js() {
        for (json, string) in [
            ("12.5", "12.5"),
            ("1.0", "1"),
            ("-0", "0"),
            ("1e3", "1000"),
            ("1e21", "1e+21"),
            ("1.5e-7", "1.5e-7"),
            ("12345678901234567890", "12345678901234567000"),
            ("true", "true"),
            ("[1,[2,null],\"x\"]", "1,2,,x"),
            ("{\"a\":1}", "[object Object]"),
            ("\"x\"", "x"),
        ] {
            assert_eq!(text(&serde_json::from_str(json).unwrap()), string, "{json}");
        }
        let mut out = Vec::new();
        stringify(&serde_json::from_str(r#" { "b" : [1.0, null, true], "a" : "\u00e9\n" } "#).unwrap(), &mut out);
        assert_eq!(String::from_utf8(out).unwrap(), r#"{"b":[1,null,true],"a":"é\n"}"#);
        assert!(["null", "0", "\"\"", "false"].iter().all(|json| is_falsy(&serde_json::from_str(json).unwrap())));
        assert!(!["[]", "{}", "\"0\"", "-1"].iter().any(|json| is_falsy(&serde_json::from_str(json).unwrap())));
    }
}
