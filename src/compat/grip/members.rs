//! Typed members of JSON objects, for instructions and items. `what` names the object in errors, whose texts are Pushpin's.

use std::time::Duration;

use base64::{Engine, engine::general_purpose::STANDARD as BASE64};
use http::{HeaderMap, HeaderName, HeaderValue, StatusCode, header};
use serde_json::{Map, Value};

use super::headers::{strip_grip, strip_hop_by_hop};

pub(super) fn text_of<'a>(from: &'a Map<String, Value>, what: &str, key: &str) -> Result<Option<&'a str>, String> {
    let Some(value) = from.get(key) else { return Ok(None) };
    value.as_str().map(Some).ok_or_else(|| format!("{what} contains '{key}' with wrong type"))
}

/// Member `bin` is base64 and takes precedence over `text`.
pub(super) fn bytes_of(
    from: &Map<String, Value>,
    what: &str,
    bin: &str,
    text: &str,
) -> Result<Option<Vec<u8>>, String> {
    if let Some(encoded) = text_of(from, what, bin)? {
        return BASE64.decode(encoded).map(Some).map_err(|_| format!("{what} contains '{bin}' that is not base64"));
    }
    Ok(text_of(from, what, text)?.map(|text| text.as_bytes().to_vec()))
}

/// A number, or a string that contains one.
fn number_of(from: &Map<String, Value>, what: &str, key: &str) -> Result<Option<i64>, String> {
    let Some(value) = from.get(key) else { return Ok(None) };
    let number = value.as_i64().or_else(|| value.as_str()?.trim().parse().ok());
    number.map(Some).ok_or_else(|| format!("{what} contains '{key}' with wrong type"))
}

pub(super) fn seconds_of(from: &Map<String, Value>, what: &str, key: &str) -> Result<Option<Duration>, String> {
    let Some(seconds) = number_of(from, what, key)? else { return Ok(None) };
    let seconds = u32::try_from(seconds).map_err(|_| format!("{what} contains '{key}' with invalid value"))?;
    Ok(Some(Duration::from_secs(seconds.into())))
}

pub(super) fn code_of(from: &Map<String, Value>, what: &str) -> Result<Option<StatusCode>, String> {
    let Some(code) = number_of(from, what, "code")? else { return Ok(None) };
    let code = u16::try_from(code).ok().and_then(final_status);
    code.map(Some).ok_or_else(|| format!("{what} contains 'code' with invalid value"))
}

/// `headers`, an object or a list of pairs. Hop-by-hop fields and those of GRIP are ignored.
pub(super) fn headers_of(from: &Map<String, Value>, what: &str) -> Result<HeaderMap, String> {
    let mut headers = HeaderMap::new();
    let mut add = |name: &str, value: &str| -> Result<(), String> {
        let invalid = || format!("headers contains '{name}' that is no header");
        let name = HeaderName::from_bytes(name.as_bytes()).map_err(|_| invalid())?;
        headers.append(name, HeaderValue::from_bytes(value.as_bytes()).map_err(|_| invalid())?);
        Ok(())
    };
    match from.get("headers") {
        None => {}
        Some(Value::Object(map)) => {
            for (name, value) in map {
                add(name, value.as_str().ok_or_else(|| format!("headers contains '{name}' with wrong type"))?)?;
            }
        }
        Some(Value::Array(pairs)) => {
            for pair in pairs {
                let pair = pair.as_array().ok_or("headers contains element with wrong type")?;
                let [name, value] = &pair[..] else {
                    return Err("headers contains list with wrong number of elements".into());
                };
                add(
                    name.as_str().ok_or("header contains name element with wrong type")?,
                    value.as_str().ok_or("header contains value element with wrong type")?,
                )?;
            }
        }
        Some(_) => return Err(format!("{what} contains 'headers' with wrong type")),
    }
    strip_hop_by_hop(&mut headers);
    strip_grip(&mut headers);
    headers.remove(header::CONTENT_LENGTH);
    Ok(headers)
}

/// Informational statuses are invalid: they do not complete a response.
pub(super) fn final_status(code: u16) -> Option<StatusCode> {
    StatusCode::from_u16(code).ok().filter(|status| !status.is_informational())
}
