//! Binary values in JSON. In Socket.IO they are attachments, and placeholders refer to them; elsewhere in weir they are
//! `{"_base64":"…"}`.

use base64::{
    Engine as _,
    alphabet::STANDARD,
    engine::{DecodePaddingMode, GeneralPurpose, GeneralPurposeConfig},
};
use memchr::{memchr2, memmem};
use serde::Deserialize;

const BASE64: GeneralPurpose = GeneralPurpose::new(
    &STANDARD,
    GeneralPurposeConfig::new().with_decode_padding_mode(DecodePaddingMode::Indifferent),
);

const MEMBER: &[u8] = b"\"_base64\"";
/// The member that identifies a placeholder is within this many bytes of its beginning.
const SEEN: usize = 64;

/// Replaces placeholders by base64. `None` if a placeholder has no attachment.
pub(super) fn inline(json: &str, attachments: &[Vec<u8>]) -> Option<String> {
    #[derive(Deserialize)]
    struct Placeholder {
        _placeholder: bool,
        num: usize,
    }
    let mut out =
        String::with_capacity(json.len() + attachments.iter().map(|bytes| bytes.len() * 4 / 3 + 20).sum::<usize>());
    let mut copied = 0;
    for at in Objects::of(json) {
        let seen = &json.as_bytes()[at..json.len().min(at + SEEN)];
        if at < copied || memmem::find(seen, b"\"_placeholder\"").is_none() {
            continue;
        }
        let mut read = serde_json::Deserializer::from_str(&json[at..]).into_iter::<Placeholder>();
        let Some(Ok(Placeholder { _placeholder: true, num })) = read.next() else { continue };
        out.push_str(&json[copied..at]);
        out.push_str("{\"_base64\":\"");
        BASE64.encode_string(attachments.get(num)?, &mut out);
        out.push_str("\"}");
        copied = at + read.byte_offset();
    }
    out.push_str(&json[copied..]);
    Some(out)
}

/// Replaces base64 by placeholders. `None` if there is none.
pub(super) fn extract(json: &str) -> Option<(String, Vec<Vec<u8>>)> {
    // Nearly all payloads end here.
    memmem::find(json.as_bytes(), MEMBER)?;
    let (mut out, mut taken, mut copied) = (String::with_capacity(json.len()), Vec::new(), 0);
    for at in Objects::of(json) {
        let Some((bytes, length)) = bytes_at(&json.as_bytes()[at..]) else { continue };
        out.push_str(&json[copied..at]);
        out.push_str(&format!("{{\"_placeholder\":true,\"num\":{}}}", taken.len()));
        taken.push(bytes);
        copied = at + length;
    }
    out.push_str(&json[copied..]);
    (!taken.is_empty()).then_some((out, taken))
}

/// The bytes of the object at the beginning of `json`, and the object's length.
fn bytes_at(json: &[u8]) -> Option<(Vec<u8>, usize)> {
    let rest = space(json.strip_prefix(b"{")?);
    let rest = space(rest.strip_prefix(MEMBER)?);
    let rest = space(rest.strip_prefix(b":")?).strip_prefix(b"\"")?;
    let end = memchr2(b'"', b'\\', rest)?;
    let behind = space(rest[end..].strip_prefix(b"\"")?).strip_prefix(b"}")?;
    Some((BASE64.decode(&rest[..end]).ok()?, json.len() - behind.len()))
}

fn space(json: &[u8]) -> &[u8] {
    json.trim_ascii_start()
}

/// The offsets of the objects in a JSON text.
struct Objects<'a> {
    json: &'a [u8],
    at: usize,
}

impl<'a> Objects<'a> {
    fn of(json: &'a str) -> Self {
        Objects { json: json.as_bytes(), at: 0 }
    }
}

impl Iterator for Objects<'_> {
    type Item = usize;

    fn next(&mut self) -> Option<usize> {
        loop {
            let found = self.at + memchr2(b'{', b'"', &self.json[self.at..])?;
            self.at = found + 1;
            if self.json[found] == b'{' {
                return Some(found);
            }
            // Skip to the end of the string.
            loop {
                let stop = self.at + memchr2(b'"', b'\\', &self.json[self.at..])?;
                self.at = (stop + 1).min(self.json.len());
                if self.json[stop] == b'"' {
                    break;
                }
                self.at = (stop + 2).min(self.json.len());
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use serde_json::{Value, json};

    #[test]
    fn there_and_back() {
        let sent = r#"["request",{"a":{"_placeholder":true,"num":1},"s":"{\"_placeholder\":true,\"num\":7}","b":[{"num":0,"_placeholder":true}]}]"#;
        let inlined = inline(sent, &[vec![1, 2], vec![255]]).unwrap();
        assert_eq!(
            inlined,
            r#"["request",{"a":{"_base64":"/w=="},"s":"{\"_placeholder\":true,\"num\":7}","b":[{"_base64":"AQI="}]}]"#
        );
        let (text, bytes) = extract(&inlined).unwrap();
        assert_eq!(bytes, [vec![255], vec![1, 2]]);
        assert_eq!(inline(&text, &bytes).unwrap(), inlined);
        assert_eq!(inline(sent, &[vec![1]]), None);
    }

    #[test]
    fn what_only_looks_like_bytes_is_left() {
        for plain in [
            r#"{"_base64":"not base64!"}"#,
            r#"{"_base64":7}"#,
            r#"{"_base64":"AQI=","more":1}"#,
            r#"{"a":"{\"_base64\":\"AQI=\"}"}"#,
            r#""\"_base64\"""#,
            "{}",
            "",
        ] {
            assert_eq!(extract(plain), None, "{plain}");
        }
        let odd = r#"{"_placeholder":false,"num":0}"#;
        assert_eq!(inline(odd, &[]).unwrap(), odd);
        let (text, bytes) = extract("{ \"_base64\" :\n\"AQI\" }").unwrap();
        assert_eq!((&*text, bytes), (r#"{"_placeholder":true,"num":0}"#, vec![vec![1, 2]]));
    }

    /// JSON with placeholders, and the attachments.
    fn value() -> impl Strategy<Value = Value> {
        let leaf = prop_oneof![
            Just(json!(null)),
            any::<i32>().prop_map(Value::from),
            "[\\PC\"\\\\{}]{0,8}".prop_map(Value::from),
            prop::collection::vec(any::<u8>(), 0..20).prop_map(|bytes| json!({ "_base64": BASE64.encode(bytes) })),
        ];
        leaf.prop_recursive(4, 30, 5, |inner| {
            prop_oneof![
                prop::collection::vec(inner.clone(), 0..5).prop_map(Value::from),
                prop::collection::btree_map("[a-z\"\\\\]{0,3}", inner, 0..5).prop_map(|map| json!(map)),
            ]
        })
    }

    proptest! {
        #[test]
        fn bytes_survive(value in value()) {
            let json = value.to_string();
            let Some((text, bytes)) = extract(&json) else {
                prop_assert!(!json.contains("\"_base64\":"));
                return Ok(());
            };
            prop_assert!(!text.contains("\"_base64\":"));
            prop_assert_eq!(inline(&text, &bytes).unwrap(), json);
        }

        #[test]
        fn any_text_is_scanned(text in "[{}\"\\\\_base64:placeholder]{0,40}") {
            let _ = extract(&text);
            let _ = inline(&text, &[]);
        }
    }
}
