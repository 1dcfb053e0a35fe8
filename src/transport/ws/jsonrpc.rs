//! JSON-RPC 2.0 as text: reading messages without copying them, and writing the messages that weir sends.
//!
//! Everything that weir sends is written by the functions here, as some clients fail on unusual messages, such as an
//! `error` with a fourth member.

use std::{borrow::Cow, fmt};

use serde::{
    Deserialize, Deserializer,
    de::{self, IgnoredAny, MapAccess, Visitor},
};
use serde_json::value::RawValue;

use crate::{
    error::{Code, Error, Result},
    json::{read_json_str, write_json_str},
    rpc::CallerId,
};

/// The content of one frame or body.
#[derive(Debug)]
pub(super) enum RpcFrame<'a> {
    One(RpcMessage<'a>),
    /// A batch of any length, possibly empty.
    Batch(Vec<&'a RawValue>),
}

/// One message, borrowed from the text that it came in.
#[derive(Debug)]
pub(super) enum RpcMessage<'a> {
    Request(RpcRequest<'a>),
    Reply(RpcReply<'a>),
}

#[derive(Debug)]
pub(super) struct RpcRequest<'a> {
    /// The id as the client sent it, to be returned byte for byte. `null` is an id; without an id it is a notification.
    pub(super) id: Option<&'a str>,
    pub(super) method: Cow<'a, str>,
    /// An object or an array. `null` counts as absent.
    pub(super) params: Option<&'a RawValue>,
}

/// An answer to a request of ours. It is never answered, however malformed.
#[derive(Debug)]
pub(super) struct RpcReply<'a> {
    /// The id as the client sent it.
    pub(super) id: Option<&'a str>,
    pub(super) result: Option<&'a RawValue>,
    pub(super) error: Option<&'a RawValue>,
}

/// A message that cannot be dispatched, with the id for the error response (`null` if it has no usable id).
#[derive(Debug)]
pub(super) struct Unusable<'a> {
    pub(super) id: &'a str,
    pub(super) error: Error,
}

/// All known members, with any values.
#[derive(Default)]
struct Members<'a> {
    jsonrpc: Option<&'a RawValue>,
    id: Option<&'a RawValue>,
    method: Option<&'a RawValue>,
    params: Option<&'a RawValue>,
    result: Option<&'a RawValue>,
    error: Option<&'a RawValue>,
}

/// Reads a frame.
///
/// # Errors
/// `parse_error` if it is not JSON, else as [`RpcMessage::read`].
pub(super) fn read(text: &str) -> Result<RpcFrame<'_>, Unusable<'_>> {
    if text.trim_start_matches([' ', '\t', '\r', '\n']).starts_with('[') {
        return serde_json::from_str(text).map(RpcFrame::Batch).map_err(not_json);
    }
    RpcMessage::read(text).map(RpcFrame::One)
}

/// The error for text that is not JSON.
fn not_json(error: impl fmt::Display) -> Unusable<'static> {
    Unusable { id: "null", error: Error::new(Code::ParseError, format!("not JSON: {error}")) }
}

impl<'a> RpcMessage<'a> {
    /// Reads one message.
    ///
    /// # Errors
    /// `parse_error`; or `invalid_request` for JSON that is neither request nor answer.
    pub(super) fn read(text: &'a str) -> Result<Self, Unusable<'a>> {
        let members: Members = match serde_json::from_str(text) {
            Ok(members) => members,
            Err(error) if !error.is_data() => return Err(not_json(error)),
            Err(error) => {
                // A scalar is rejected before the rest of the text is checked.
                if let Err(error) = serde_json::from_str::<IgnoredAny>(text) {
                    return Err(not_json(error));
                }
                return Err(Unusable { id: "null", error: Error::new(Code::InvalidRequest, error.to_string()) });
            }
        };
        let id = members.id.map(RawValue::get);
        // A message with an id of ours and neither result nor error is an answer too, if a malformed one: the call must
        // not wait on.
        let ours = members.method.is_none() && id.is_some_and(|id| id.starts_with(r#""w:"#));
        if members.result.is_some() || members.error.is_some() || ours {
            return Ok(RpcMessage::Reply(RpcReply { id, result: members.result, error: members.error }));
        }
        let usable = id.filter(|id| id.starts_with(['"', '-', 'n']) || id.starts_with(|c: char| c.is_ascii_digit()));
        let too_long = usable.is_some_and(|id| id.len() > CallerId::MAX);
        let usable = usable.filter(|_| !too_long);
        let reject = |detail: &'static str| {
            Err(Unusable { id: usable.unwrap_or("null"), error: Error::new(Code::InvalidRequest, detail) })
        };
        if too_long {
            return reject("an id has at most 256 bytes");
        }
        if members.jsonrpc.is_none_or(|version| version.get() != r#""2.0""#) {
            return reject(r#"a message has "jsonrpc":"2.0""#);
        }
        if id.is_some() && usable.is_none() {
            return reject("id is a string, a number or null");
        }
        let Some(method) = members.method.and_then(|method| string(method.get())) else {
            return reject("method is a string");
        };
        let params = match members.params {
            Some(params) if params.get() == "null" => None,
            Some(params) if !params.get().starts_with(['{', '[']) => return reject("params is an object or an array"),
            params => params,
        };
        Ok(RpcMessage::Request(RpcRequest { id, method, params }))
    }
}

/// A JSON string's text.
pub(super) fn string(json: &str) -> Option<Cow<'_, str>> {
    json.starts_with('"').then(|| read_json_str(json))
}

impl<'de: 'a, 'a> Deserialize<'de> for Members<'a> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct MembersVisitor;

        impl<'de> Visitor<'de> for MembersVisitor {
            type Value = Members<'de>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object with jsonrpc, id, method and params")
            }

            fn visit_map<M: MapAccess<'de>>(self, mut map: M) -> Result<Members<'de>, M::Error> {
                let mut members = Members::default();
                while let Some(MemberName(name)) = map.next_key()? {
                    // Not by Option<&RawValue>, which reads `null` as absent.
                    let value = map.next_value::<&RawValue>()?;
                    match name {
                        MemberKind::Jsonrpc => members.jsonrpc = Some(value),
                        MemberKind::Id => members.id = Some(value),
                        MemberKind::Method => members.method = Some(value),
                        MemberKind::Params => members.params = Some(value),
                        MemberKind::Result => members.result = Some(value),
                        MemberKind::Error => members.error = Some(value),
                        MemberKind::Other => {}
                    }
                }
                Ok(members)
            }
        }

        deserializer.deserialize_map(MembersVisitor)
    }
}

enum MemberKind {
    Jsonrpc,
    Id,
    Method,
    Params,
    Result,
    Error,
    Other,
}

struct MemberName(MemberKind);

impl<'de> Deserialize<'de> for MemberName {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct MemberVisitor;

        impl<'de> Visitor<'de> for MemberVisitor {
            type Value = MemberName;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a name")
            }

            fn visit_borrowed_bytes<E: de::Error>(self, name: &'de [u8]) -> Result<MemberName, E> {
                if name.iter().any(|byte| *byte < b' ') {
                    return Err(E::custom("a name contains a control character"));
                }
                self.visit_bytes(name)
            }

            fn visit_bytes<E>(self, name: &[u8]) -> Result<MemberName, E> {
                Ok(MemberName(match name {
                    b"jsonrpc" => MemberKind::Jsonrpc,
                    b"id" => MemberKind::Id,
                    b"method" => MemberKind::Method,
                    b"params" => MemberKind::Params,
                    b"result" => MemberKind::Result,
                    b"error" => MemberKind::Error,
                    _ => MemberKind::Other,
                }))
            }
        }

        // As bytes, because a name need not be text (see `json`): then it is another member, which is ignored.
        deserializer.deserialize_bytes(MemberVisitor)
    }
}

// === writing ===

/// `{"jsonrpc":"2.0","id":…,"result":…}`; `result` is JSON.
pub(super) fn result(out: &mut Vec<u8>, id: &[u8], result: &[u8]) {
    open_result(out, id);
    out.extend_from_slice(result);
    out.push(b'}');
}

/// Like [`result`], for a value to be serialized.
pub(super) fn result_of(out: &mut Vec<u8>, id: &[u8], result: &impl serde::Serialize) {
    open_result(out, id);
    json(out, result);
    out.push(b'}');
}

/// `{"jsonrpc":"2.0","id":…,"error":{…}}`.
pub(super) fn error(out: &mut Vec<u8>, id: &[u8], error: &Error) {
    open_error(out, id);
    json(out, &error.to_rpc());
    out.push(b'}');
}

/// A provider's error, which is JSON already: exactly `code`, `message` and `data`.
pub(super) fn error_json(out: &mut Vec<u8>, id: &[u8], error: &[u8]) {
    open_error(out, id);
    out.extend_from_slice(error);
    out.push(b'}');
}

/// A request of ours, or a notification if it has no id. `id` goes between quotes as it is; `params` is JSON.
/// The method is `prefix/method` where there is a prefix.
pub(super) fn request(
    out: &mut Vec<u8>,
    id: Option<&[u8]>,
    prefix: Option<&str>,
    method: &str,
    params: Option<&[u8]>,
    meta: Option<&impl serde::Serialize>,
) {
    out.extend_from_slice(br#"{"jsonrpc":"2.0""#);
    if let Some(id) = id {
        out.extend_from_slice(br#","id":""#);
        out.extend_from_slice(id);
        out.push(b'"');
    }
    out.extend_from_slice(br#","method":"#);
    let start = out.len();
    write_json_str(method, out);
    if let Some(prefix) = prefix {
        out[start] = b'/';
        let at = out.len();
        write_json_str(prefix, out);
        // `/method"` and `"prefix"` change places, and a quote falls away.
        out.truncate(out.len() - 1);
        out[start..].rotate_left(at - start);
    }
    if let Some(params) = params {
        out.extend_from_slice(br#","params":"#);
        out.extend_from_slice(params);
    }
    if let Some(meta) = meta {
        out.extend_from_slice(br#","meta":"#);
        json(out, meta);
    }
    out.push(b'}');
}

/// A notification of weir's own.
pub(super) fn notification(out: &mut Vec<u8>, method: &'static str, params: &impl serde::Serialize) {
    open_notification(out, method);
    json(out, params);
    out.push(b'}');
}

/// `weir.event`: the one that is written once for many readers.
pub(super) fn event(out: &mut Vec<u8>, write: impl FnOnce(&mut Vec<u8>)) {
    open_notification(out, "weir.event");
    write(out);
    out.push(b'}');
}

/// `weir.late`: an answer after its deadline. `name` is `result` or `error`, `value` JSON.
pub(super) fn late(out: &mut Vec<u8>, id: &[u8], name: &'static str, value: &[u8]) {
    open_notification(out, "weir.late");
    out.extend_from_slice(br#"{"id":"#);
    out.extend_from_slice(id);
    out.extend_from_slice(br#",""#);
    out.extend_from_slice(name.as_bytes());
    out.extend_from_slice(br#"":"#);
    out.extend_from_slice(value);
    out.extend_from_slice(b"}}");
}

fn open_result(out: &mut Vec<u8>, id: &[u8]) {
    out.extend_from_slice(br#"{"jsonrpc":"2.0","id":"#);
    out.extend_from_slice(id);
    out.extend_from_slice(br#","result":"#);
}

fn open_error(out: &mut Vec<u8>, id: &[u8]) {
    out.extend_from_slice(br#"{"jsonrpc":"2.0","id":"#);
    out.extend_from_slice(id);
    out.extend_from_slice(br#","error":"#);
}

fn open_notification(out: &mut Vec<u8>, method: &'static str) {
    out.extend_from_slice(br#"{"jsonrpc":"2.0","method":""#);
    out.extend_from_slice(method.as_bytes());
    out.extend_from_slice(br#"","params":"#);
}

/// Appends `value` as JSON. Of what weir sends, nothing fails to serialise.
fn json(out: &mut Vec<u8>, value: &impl serde::Serialize) {
    let start = out.len();
    if serde_json::to_writer(&mut *out, value).is_err() {
        debug_assert!(false, "not serialisable");
        out.truncate(start);
        out.extend_from_slice(b"null");
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn request(text: &str) -> RpcRequest<'_> {
        match RpcMessage::read(text) {
            Ok(RpcMessage::Request(request)) => request,
            other => panic!("{text}: {other:?}"),
        }
    }

    fn rejected(text: &str) -> (i32, &str) {
        let unusable = match read(text) {
            Err(unusable) => unusable,
            Ok(other) => panic!("{text}: {other:?}"),
        };
        (unusable.error.code().number(), unusable.id)
    }

    #[test]
    fn ids_are_kept_byte_for_byte() {
        for id in ["0", "-1", "1.50", "1e3", "9007199254740993", "null", r#""a\u0041""#, r#""""#] {
            let text = format!(r#"{{"jsonrpc":"2.0","id": {id} ,"method":"m"}}"#);
            assert_eq!(request(&text).id, Some(id));
        }
        assert_eq!(request(r#"{"jsonrpc":"2.0","method":"m"}"#).id, None);
    }

    #[test]
    fn requests() {
        let it = request(r#" {"params":{"a":[1, 2]},"extra":{},"method":"a\/b","jsonrpc":"2.0"} "#);
        assert_eq!((it.method.as_ref(), it.params.unwrap().get()), ("a/b", r#"{"a":[1, 2]}"#));
        assert!(matches!(request(r#"{"jsonrpc":"2.0","method":"m"}"#).method, Cow::Borrowed("m")));
        assert!(request(r#"{"jsonrpc":"2.0","method":"m","params":null}"#).params.is_none());
    }

    #[test]
    fn a_message_with_result_or_error_is_a_reply() {
        for text in [
            r#"{"id":"w:1","result":null}"#,
            r#"{"jsonrpc":"2.0","id":null,"error":{}}"#,
            r#"{"result":1,"error":2}"#,
            r#"{"method":"m","id":[],"error":7}"#,
            r#"{"jsonrpc":"2.0","id":"w:1"}"#,
        ] {
            assert!(matches!(RpcMessage::read(text), Ok(RpcMessage::Reply(_))), "{text}");
        }
        match RpcMessage::read(r#"{"jsonrpc":"2.0","id":"w:1","result":null}"#) {
            Ok(RpcMessage::Reply(reply)) => {
                assert_eq!((reply.id, reply.result.unwrap().get()), (Some(r#""w:1""#), "null"));
            }
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn messages_that_cannot_be_dispatched() {
        assert_eq!(rejected(r#"{"jsonrpc": "2.0", "method": "foobar, "params": "bar", "baz]"#), (-32700, "null"));
        assert_eq!(rejected(r#"[{"jsonrpc": "2.0", "method": "sum"},{"jsonrpc": "2.0", "method"]"#), (-32700, "null"));
        assert_eq!(rejected(""), (-32700, "null"));
        assert_eq!(rejected("1x"), (-32700, "null"));
        assert_eq!(rejected("1"), (-32600, "null"));
        assert_eq!(rejected(r#""text""#), (-32600, "null"));
        assert_eq!(rejected("{}"), (-32600, "null"));
        assert_eq!(rejected(r#"{"jsonrpc": "2.0", "method": 1, "params": "bar"}"#), (-32600, "null"));
        assert_eq!(rejected(r#"{"jsonrpc":"2.0","method":"m","id":1,"params":"bar"}"#), (-32600, "1"));
        assert_eq!(rejected(r#"{"jsonrpc":"1.0","method":"m","id":1}"#), (-32600, "1"));
        assert_eq!(rejected(r#"{"method":"m","id":1}"#), (-32600, "1"));
        assert_eq!(rejected(r#"{"jsonrpc":"2.0","method":"m","id":{}}"#), (-32600, "null"));
        assert_eq!(rejected(r#"{"jsonrpc":"2.0","method":"m","id":true}"#), (-32600, "null"));
        assert!(matches!(read(" [] "), Ok(RpcFrame::Batch(batch)) if batch.is_empty()));
        assert!(matches!(read("[1,{}]"), Ok(RpcFrame::Batch(batch)) if batch[0].get() == "1"));
    }

    #[test]
    fn deep_nesting_does_not_overflow() {
        let deep =
            format!(r#"{{"jsonrpc":"2.0","method":"m","params":{}{}}}"#, "[".repeat(300_000), "]".repeat(300_000));
        assert_eq!(request(&deep).params.unwrap().get().len(), 600_000);
        assert!(read(&"[".repeat(1_000_000)).is_err());
    }

    #[test]
    fn written_messages() {
        let text = |write: fn(&mut Vec<u8>)| {
            let mut out = Vec::new();
            write(&mut out);
            String::from_utf8(out).unwrap()
        };
        assert_eq!(text(|out| result(out, b"1.50", b"null")), r#"{"jsonrpc":"2.0","id":1.50,"result":null}"#);
        assert_eq!(
            text(|out| super::request(out, Some(b"w:1a"), None, "a\"b", Some(b"[1]"), None::<&()>)),
            r#"{"jsonrpc":"2.0","id":"w:1a","method":"a\"b","params":[1]}"#
        );
        assert_eq!(
            text(|out| super::request(out, None, Some("a/b"), "m", None, None::<&()>)),
            r#"{"jsonrpc":"2.0","method":"a/b/m"}"#
        );
        assert_eq!(
            text(|out| super::request(out, None, None, "m", None, Some(&[1]))),
            r#"{"jsonrpc":"2.0","method":"m","meta":[1]}"#
        );
        assert_eq!(
            text(|out| late(out, b"\"a\"", "result", b"7")),
            r#"{"jsonrpc":"2.0","method":"weir.late","params":{"id":"a","result":7}}"#
        );
        let failed: serde_json::Value =
            serde_json::from_str(&text(|out| error(out, b"null", &Error::params("no")))).unwrap();
        assert_eq!(failed["error"]["code"], -32602);
        assert_eq!(failed["error"].as_object().unwrap().len(), 3);
        assert!(failed["id"].is_null());
    }

    proptest! {
        #[test]
        fn any_text_is_read_or_refused(text in r#"[\[\]{}":,0-9a-z \\]{0,60}"#) {
            let _ = read(&text);
        }
    }
}
