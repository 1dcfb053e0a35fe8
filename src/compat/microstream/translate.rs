//! Conversion between MicroStream's messages and calls: requests, responses and errors.

use std::borrow::Cow;

use serde::Deserialize;
use serde_json::{json, value::RawValue};

use crate::{
    error::{Code, Error},
    json::{JsonStr, write_json_str},
    rpc::{CallAnswer, ProviderError},
};

/// The argument of a `request` event.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct RequestEvent<'a> {
    #[serde(borrow, default)]
    pub(super) target_service: Option<&'a RawValue>,
    #[serde(borrow, default)]
    pub(super) payload: Option<&'a RawValue>,
}

/// The members of its payload that weir reads.
#[derive(Debug, Deserialize)]
pub(super) struct RequestPayload<'a> {
    #[serde(borrow, default)]
    pub(super) id: Option<&'a RawValue>,
    #[serde(borrow, default)]
    pub(super) event: Option<&'a RawValue>,
    #[serde(borrow, default)]
    pub(super) data: Option<&'a RawValue>,
}

/// The argument of a `response` event.
#[derive(Debug, Deserialize)]
pub(super) struct ResponseEvent<'a> {
    #[serde(borrow, default)]
    pub(super) id: Option<&'a RawValue>,
    #[serde(borrow, default)]
    pub(super) response: Option<&'a RawValue>,
}

/// The argument of a `heartbeat` event.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct HeartbeatEvent<'a> {
    #[serde(borrow, default)]
    pub(super) service_name: Option<&'a RawValue>,
}

/// Deserializes an object; `None` for any other value.
pub(super) fn object<'a, T: Deserialize<'a>>(json: Option<&'a RawValue>) -> Option<T> {
    // serde accepts an array for a struct.
    let json = json?.get();
    json.starts_with('{').then(|| serde_json::from_str(json).ok())?
}

/// A name as JavaScript formats it: the string, or the JSON of another value; `undefined` if it is missing.
pub(super) fn name(json: Option<&RawValue>) -> Cow<'_, str> {
    let Some(json) = json else { return Cow::Borrowed("undefined") };
    match serde_json::from_str::<JsonStr<'_>>(json.get()) {
        Ok(JsonStr(text)) => text,
        Err(_) => Cow::Borrowed(json.get()),
    }
}

/// The id of a payload as it is written there; empty if it has none.
pub(super) fn id_of(payload: &str) -> &str {
    const FIRST: &str = "{\"id\":";
    // MicroStream's client writes it first.
    if let Some(rest) = payload.strip_prefix(FIRST).and_then(|rest| rest.strip_prefix('"'))
        && let Some(end) = memchr::memchr2(b'"', b'\\', rest.as_bytes())
        && rest.as_bytes()[end] == b'"'
    {
        return &payload[FIRST.len()..FIRST.len() + end + 2];
    }
    let read: Option<RequestPayload<'_>> = serde_json::from_str(payload).ok();
    read.and_then(|payload| payload.id).map_or("", RawValue::get)
}

/// An id in canonical form, without unnecessary escapes.
pub(super) fn spelled(id: &str) -> Cow<'_, str> {
    if !id.contains('\\') {
        return Cow::Borrowed(id);
    }
    match serde_json::from_str::<String>(id) {
        Ok(text) => {
            let mut out = Vec::new();
            write_json_str(&text, &mut out);
            Cow::Owned(String::from_utf8(out).unwrap_or_default())
        }
        Err(_) => Cow::Borrowed(id),
    }
}

/// `data` as params. A value that is neither object nor array is wrapped in an array.
pub(super) fn params(data: Option<&RawValue>) -> Option<Cow<'_, RawValue>> {
    let data = data?;
    match data.get().as_bytes().first() {
        Some(b'{' | b'[') => Some(Cow::Borrowed(data)),
        _ => RawValue::from_string(format!("[{data}]")).ok().map(Cow::Owned),
    }
}

// === responses of services as results of calls ===

#[derive(Deserialize)]
struct FailedResponse<'a> {
    #[serde(borrow, default)]
    error: Option<&'a RawValue>,
}

/// The `error` member in the form of MicroStream's library.
#[derive(Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct ServiceError<'a> {
    #[serde(borrow)]
    code: JsonStr<'a>,
    #[serde(borrow)]
    message: JsonStr<'a>,
    #[serde(borrow, default)]
    error_data: Option<&'a RawValue>,
}

/// The result of a response. Without one, or with null, it is `{}`: MicroStream's client would crash otherwise.
pub(super) fn answer(response: Option<&RawValue>) -> CallAnswer<'_> {
    let Some(response) = response.filter(|response| response.get() != "null") else {
        return CallAnswer::Result(empty());
    };
    match failing(response) {
        Some(error) => CallAnswer::Error(provider_error(response, error)),
        None => CallAnswer::Result(response),
    }
}

/// A truthy `error`.
fn failing(response: &RawValue) -> Option<&RawValue> {
    memchr::memmem::find(response.get().as_bytes(), b"\"error\"")?;
    let FailedResponse { error } = object(Some(response))?;
    error.filter(|error| !matches!(error.get(), "null" | "false" | "0" | "-0" | "\"\""))
}

fn provider_error<'a>(response: &'a RawValue, error: &'a RawValue) -> ProviderError<'a> {
    #[derive(Deserialize)]
    #[serde(deny_unknown_fields)]
    struct Only<'a> {
        #[serde(borrow, rename = "error")]
        _error: &'a RawValue,
    }
    let known: Option<ServiceError<'_>> = object(Some(error));
    let alone = serde_json::from_str::<Only<'_>>(response.get()).is_ok();
    let code = match known.as_ref().map(|known| &*known.code.0) {
        Some("EVENT_NOT_FOUND") => -32601,
        Some("INTERNAL_SERVER_ERROR") => -32603,
        _ => -32000,
    };
    let mut data = json!({});
    if let Some(known) = &known {
        data["code"] = (*known.code.0).into();
    }
    let mut data = data.to_string().into_bytes();
    let mut member = |name: &str, value: &RawValue| {
        data.pop();
        if data.len() > 1 {
            data.push(b',');
        }
        write_json_str(name, &mut data);
        data.push(b':');
        data.extend_from_slice(value.get().as_bytes());
        data.push(b'}');
    };
    if let Some(error_data) = known.as_ref().and_then(|known| known.error_data) {
        member("errorData", error_data);
    }
    if !alone || known.is_none() {
        // The response does not fit into an error: MicroStream's clients get it unmodified from the data.
        member(WHOLE, response);
    }
    let message = match known {
        Some(known) => known.message.0,
        None => match serde_json::from_str::<JsonStr<'_>>(error.get()) {
            Ok(JsonStr(text)) => text,
            Err(_) => Cow::Borrowed("the service answered with an error"),
        },
    };
    let data = String::from_utf8(data).ok().and_then(|data| RawValue::from_string(data).ok());
    ProviderError { code, message, data: data.map(Cow::Owned) }
}

/// The member of an error's data that holds a whole response, if it is more than an error in the library's form.
const WHOLE: &str = "microstream";

fn empty() -> &'static RawValue {
    serde_json::from_str("{}").unwrap_or(RawValue::NULL)
}

// === results of calls as responses ===

/// A provider's error as a response.
pub(super) fn response_of(error: &ProviderError<'_>, target: Option<&RawValue>, id: &str) -> String {
    #[derive(Deserialize)]
    #[serde(rename_all = "camelCase")]
    struct Data<'a> {
        #[serde(borrow)]
        code: Option<JsonStr<'a>>,
        #[serde(borrow, default)]
        error_data: Option<&'a RawValue>,
        #[serde(borrow, default, rename = "microstream")]
        whole: Option<&'a RawValue>,
    }
    let data: Option<Data<'_>> = object(error.data.as_deref());
    if let Some(whole) = data.as_ref().and_then(|data| data.whole).filter(|whole| failing(whole).is_some()) {
        return whole.get().to_owned();
    }
    if let Some(Data { code: Some(code), error_data, .. }) = &data {
        return failure(&code.0, &error.message, error_data.map(RawValue::get));
    }
    let code = match error.code {
        -32601 => "EVENT_NOT_FOUND",
        -32603 => "INTERNAL_SERVER_ERROR",
        _ => "SERVICE_ERROR",
    };
    let data = error.data.as_deref();
    let error_data = json!({ "code": error.code, "data": data });
    failure(code, &error.message, Some(&with_origin(error_data, target, id)))
}

/// An error of weir as a response. `None` if the original does not respond.
pub(super) fn response_to(error: &Error, target: Option<&RawValue>, id: &str) -> Option<String> {
    Some(match error.code() {
        Code::Timeout | Code::ProviderGone | Code::Cancelled => return None,
        // A name that is invalid in weir has no provider.
        Code::NoProvider | Code::InvalidParams => {
            let message = format!("Service \"{}\" not found", name(target));
            failure("TARGET_SERVICE_NOT_FOUND", &message, Some(&with_origin(json!({}), target, id)))
        }
        Code::MethodNotFound => failure("EVENT_NOT_FOUND", error.detail(), Some(&with_origin(json!({}), target, id))),
        code => {
            let code = code.as_str().to_ascii_uppercase();
            failure(&code, error.detail(), Some(&with_origin(json!({}), target, id)))
        }
    })
}

/// `data` with the target and the id of the request.
fn with_origin(mut data: serde_json::Value, target: Option<&RawValue>, id: &str) -> String {
    let mut members = serde_json::Map::new();
    if let Some(target) = target {
        members.insert("targetService".into(), serde_json::from_str(target.get()).unwrap_or_default());
    }
    if !id.is_empty() {
        members.insert("requestID".into(), serde_json::from_str(id).unwrap_or_default());
    }
    if let Some(data) = data.as_object_mut() {
        members.append(data);
    }
    serde_json::Value::Object(members).to_string()
}

/// `{"error":{"code":…,"message":…,"errorData":…}}`.
fn failure(code: &str, message: &str, error_data: Option<&str>) -> String {
    let mut out = b"{\"error\":{\"code\":".to_vec();
    write_json_str(code, &mut out);
    out.extend_from_slice(b",\"message\":");
    write_json_str(message, &mut out);
    if let Some(data) = error_data {
        out.extend_from_slice(b",\"errorData\":");
        out.extend_from_slice(data.as_bytes());
    }
    out.extend_from_slice(b"}}");
    String::from_utf8(out).unwrap_or_default()
}

/// Code and data of the error if the name is taken. `name` is the one in the client's query.
pub(super) fn duplicate(name: Option<&str>) -> (String, String) {
    const DUPLICATE: &str = "DUPLICATE_SERVICE_REGISTRATION";
    let data = name.map_or_else(|| json!({}), |name| json!({ "serviceName": name }));
    let message = "Duplicate Service Registration Name! A service with the same name is already registered.";
    let data = json!({ "code": DUPLICATE, "message": message, "errorData": data });
    (DUPLICATE.to_owned(), data.to_string())
}

/// Code and data of the error if weir rejects the registration for another reason.
pub(super) fn refused(error: &Error, name: &str) -> (String, String) {
    let code = error.code().as_str().to_ascii_uppercase();
    let data = json!({ "code": code, "message": error.detail(), "errorData": { "serviceName": name } });
    (code, data.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::Value;

    fn json(text: &str) -> &RawValue {
        serde_json::from_str(text).unwrap()
    }

    fn error(response: &str) -> ProviderError<'static> {
        match answer(Some(json(response))) {
            CallAnswer::Error(error) => error.into_owned(),
            other => panic!("{response}: {other:?}"),
        }
    }

    #[test]
    fn ids() {
        assert_eq!(id_of(r#"{"id":"r1","event":"e"}"#), "\"r1\"");
        assert_eq!(id_of(r#"{"event":"e","id":7}"#), "7");
        assert_eq!(id_of(r#"{"id":"a\"b"}"#), r#""a\"b""#);
        assert_eq!(id_of(r#"{"event":"e"}"#), "");
        assert_eq!(spelled(r#""\u0041\u00e9""#), "\"Aé\"");
        assert_eq!(spelled(r#""\ud800""#), r#""\ud800""#);
        assert_eq!(name(Some(json("\"A\""))), "A");
        assert_eq!(name(Some(json("5"))), "5");
        assert_eq!(name(None), "undefined");
    }

    #[test]
    fn data_and_params() {
        let params = |data| params(Some(json(data))).unwrap().get().to_owned();
        assert_eq!(
            (params("{\"a\":1}"), params("[1]"), params("5"), params("\"x\"")),
            ("{\"a\":1}".into(), "[1]".into(), "[5]".into(), "[\"x\"]".into())
        );
        assert!(super::params(None).is_none());
    }

    #[test]
    fn responses_that_are_results() {
        for same in [
            "5",
            "{\"a\":1}",
            "{\"error\":null}",
            "{\"error\":0,\"x\":1}",
            "[{\"error\":1}]",
            "\"error\"",
            "{\"a\":{\"error\":1}}",
        ] {
            match answer(Some(json(same))) {
                CallAnswer::Result(result) => assert_eq!(result.get(), same),
                other => panic!("{same}: {other:?}"),
            }
        }
        for nothing in [None, Some(json("null"))] {
            assert!(matches!(answer(nothing), CallAnswer::Result(result) if result.get() == "{}"));
        }
    }

    #[test]
    fn an_error_comes_back_as_it_was() {
        for (response, code, message) in [
            (
                r#"{"error":{"code":"EVENT_NOT_FOUND","message":"Event \"e\" not found","errorData":{"event":"e"}}}"#,
                -32601,
                "Event \"e\" not found",
            ),
            (
                r#"{"error":{"code":"INTERNAL_SERVER_ERROR","message":"Internal server error","errorData":{"error":"x"}}}"#,
                -32603,
                "Internal server error",
            ),
            (r#"{"error":{"code":"MINE","message":"m"}}"#, -32000, "m"),
            (r#"{"error":{"code":7,"message":"m"}}"#, -32000, "the service answered with an error"),
            (r#"{"error":"broken"}"#, -32000, "broken"),
            (r#"{"error":true,"more":[1]}"#, -32000, "the service answered with an error"),
            (r#"{"error":{"code":"A","message":"m","extra":1}}"#, -32000, "the service answered with an error"),
            (r#"{"error":{"code":"A","message":"m"},"more":1}"#, -32000, "m"),
        ] {
            let error = error(response);
            assert_eq!((error.code, &*error.message), (code, message), "{response}");
            let back: Value = serde_json::from_str(&response_of(&error, None, "")).unwrap();
            assert_eq!(back, serde_json::from_str::<Value>(response).unwrap());
        }
        assert_eq!(
            error(r#"{"error":{"code":"MINE","message":"m","errorData":[1]}}"#).data.unwrap().get(),
            r#"{"code":"MINE","errorData":[1]}"#
        );
    }

    #[test]
    fn errors_of_other_providers() {
        let of = |code, data: Option<&str>| {
            let data = data.map(|data| Cow::Owned(json(data).to_owned()));
            response_of(&ProviderError { code, message: "m".into(), data }, Some(json("\"A\"")), "\"r1\"")
        };
        assert_eq!(
            of(-32601, None),
            r#"{"error":{"code":"EVENT_NOT_FOUND","message":"m","errorData":{"targetService":"A","requestID":"r1","code":-32601,"data":null}}}"#
        );
        assert_eq!(
            of(42, Some("{\"microstream\":{\"a\":1}}")),
            r#"{"error":{"code":"SERVICE_ERROR","message":"m","errorData":{"targetService":"A","requestID":"r1","code":42,"data":{"microstream":{"a":1}}}}}"#
        );
        assert_eq!(of(1, Some("{\"code\":\"X\"}")), r#"{"error":{"code":"X","message":"m"}}"#);
    }

    #[test]
    fn failures_of_weir() {
        let to = |code, target| response_to(&Error::new(code, "detail"), target, "\"r2\"");
        assert_eq!(
            to(Code::NoProvider, Some(json("\"ZZ\""))).unwrap(),
            r#"{"error":{"code":"TARGET_SERVICE_NOT_FOUND","message":"Service \"ZZ\" not found","errorData":{"targetService":"ZZ","requestID":"r2"}}}"#
        );
        assert_eq!(
            to(Code::NoProvider, None).unwrap(),
            r#"{"error":{"code":"TARGET_SERVICE_NOT_FOUND","message":"Service \"undefined\" not found","errorData":{"requestID":"r2"}}}"#
        );
        assert!(to(Code::Busy, None).unwrap().starts_with(r#"{"error":{"code":"BUSY","message":"detail""#));
        for silent in [Code::Timeout, Code::ProviderGone, Code::Cancelled] {
            assert_eq!(to(silent, None), None);
        }
    }

    #[test]
    fn a_duplicate() {
        assert_eq!(
            duplicate(Some("A")).1,
            r#"{"code":"DUPLICATE_SERVICE_REGISTRATION","message":"Duplicate Service Registration Name! A service with the same name is already registered.","errorData":{"serviceName":"A"}}"#
        );
        assert!(duplicate(None).1.ends_with(r#""errorData":{}}"#));
    }
}
