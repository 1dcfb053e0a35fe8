//! [`Instructions`] of an origin for its response, in `Grip-…` headers or in a body of the type
//! `application/grip-instruct`. Invalid instructions are a 502 for the client; the texts are Pushpin's.

use std::{collections::BTreeMap, time::Duration};

use base64::{Engine, engine::general_purpose::STANDARD as BASE64};
use http::{HeaderMap, StatusCode, header};
use serde_json::{Map, Value};

use super::{
    headers::strip_grip,
    members::{bytes_of, code_of, final_status, headers_of, seconds_of, text_of},
    origin_client::OriginError,
};
use crate::json::parse_owned;

/// Default timeout of response holds and keep-alives.
const DEFAULT_TIMEOUT: Duration = Duration::from_secs(55);
const DEFAULT_LINK_TIMEOUT: Duration = Duration::from_secs(120);
const MEDIA_TYPE: &str = "application/grip-instruct";
const FILTERS: [&str; 3] = ["skip-self", "skip-users", "require-sub"];

#[derive(Clone, Debug, Default, PartialEq)]
pub(super) struct Instructions {
    pub(super) hold: Option<HoldMode>,
    pub(super) channels: Vec<HeldChannel>,
    /// How long a response is held.
    pub(super) timeout: Duration,
    pub(super) keep_alive: Option<KeepAlive>,
    /// The client's metadata for filters.
    pub(super) meta: BTreeMap<String, String>,
    /// Replaces the status of the response.
    pub(super) status: Option<StatusCode>,
    pub(super) next: Option<NextLink>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum HoldMode {
    /// Until an item is published as the response.
    Response,
    /// Items are appended to the response.
    Stream,
}

#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct HeldChannel {
    /// Without the prefix of the route.
    pub(super) name: String,
    /// The newest item that the response contains.
    pub(super) prev_id: Option<String>,
    pub(super) filters: Vec<String>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct KeepAlive {
    pub(super) data: Vec<u8>,
    pub(super) timeout: Duration,
    /// Sent regularly, and not only after a time without items.
    pub(super) interval: bool,
}

/// Where a stream continues.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct NextLink {
    pub(super) uri: String,
    /// The link is fetched after this time without an item on every channel.
    pub(super) timeout: Duration,
}

/// The response in a body of instructions.
#[derive(Debug, Default, PartialEq)]
pub(super) struct EmbeddedResponse {
    pub(super) status: Option<StatusCode>,
    pub(super) headers: HeaderMap,
    pub(super) body: Vec<u8>,
}

impl Instructions {
    /// Whether a response with this header has instructions.
    pub(super) fn are_in(headers: &HeaderMap) -> bool {
        headers.contains_key("grip-hold") || headers.contains_key("grip-link") || are_in_body(headers)
    }

    /// Takes the instructions out of `headers`: removes all fields of GRIP, and those that are not exposed.
    pub(super) fn take(headers: &mut HeaderMap) -> Result<Self, String> {
        let instructions = Self::read(headers);
        let exposed: Vec<String> = list(headers, "grip-expose-headers").map(|name| name.to_ascii_lowercase()).collect();
        strip_grip(headers);
        if !exposed.is_empty() {
            let hidden = headers.keys().filter(|name| !exposed.iter().any(|kept| kept == name.as_str())).cloned();
            let hidden: Vec<_> = hidden.collect();
            for name in hidden {
                headers.remove(name);
            }
        }
        instructions
    }

    fn read(headers: &HeaderMap) -> Result<Self, String> {
        let one = |name: &str| headers.get(name).map(|value| String::from_utf8_lossy(value.as_bytes()));
        let mut instructions = Instructions { timeout: DEFAULT_TIMEOUT, ..Instructions::default() };
        instructions.hold = match one("grip-hold").as_deref() {
            None => None,
            Some(mode) => {
                Some(hold_mode(mode).ok_or("Grip-Hold must be set to either 'response' or 'stream'".to_owned())?)
            }
        };
        for text in list(headers, "grip-channel") {
            let (name, params) = params(&text);
            if name.is_empty() {
                return Err("failed to parse Grip-Channel".into());
            }
            let mut channel = HeldChannel { name, ..HeldChannel::default() };
            for (key, value) in params {
                match key.as_str() {
                    "prev-id" => channel.prev_id = Some(value),
                    "filter" => channel.filters.push(value),
                    _ => {}
                }
            }
            instructions.add(channel)?;
        }
        if let Some(text) = one("grip-timeout") {
            instructions.timeout = whole_seconds(&text, "Grip-Timeout")?;
        }
        if let Some(text) = one("grip-keep-alive") {
            instructions.keep_alive = Some(keep_alive(&text)?);
        }
        for text in list(headers, "grip-set-meta") {
            let Some((key, value)) = text.split_once('=') else {
                return Err("failed to parse Grip-Set-Meta".into());
            };
            instructions.meta.insert(key.trim().to_owned(), unquoted(value));
        }
        if let Some(text) = one("grip-status").filter(|text| !text.is_empty()) {
            // The reason phrase is dropped: HTTP/2 has none.
            let code = text.split(' ').next().and_then(|code| code.parse().ok());
            instructions.status = Some(code.and_then(final_status).ok_or("Grip-Status contains invalid status code")?);
        }
        for text in list(headers, "grip-link") {
            let (uri, params) = params(&text);
            let rel = |wanted: &str| params.iter().any(|(key, value)| key == "rel" && value == wanted);
            if !rel("next") {
                continue;
            }
            let uri = uri.strip_prefix('<').and_then(|uri| uri.strip_suffix('>')).filter(|uri| !uri.is_empty());
            let uri = uri.ok_or("failed to parse Grip-Link value")?.to_owned();
            let timeout = params.iter().find(|(key, _)| key == "timeout");
            let timeout = timeout.map(|(_, value)| whole_seconds(value, "Grip-Link timeout")).transpose()?;
            instructions.next = Some(NextLink { uri, timeout: timeout.unwrap_or(DEFAULT_LINK_TIMEOUT) });
        }
        Ok(instructions)
    }

    fn add(&mut self, channel: HeldChannel) -> Result<(), String> {
        if let Some(unknown) = channel.filters.iter().find(|filter| !FILTERS.contains(&filter.as_str())) {
            return Err(format!("there is no filter '{unknown}'"));
        }
        match self.channels.iter_mut().find(|other| other.name == channel.name) {
            Some(other) => *other = channel,
            None => self.channels.push(channel),
        }
        Ok(())
    }

    /// Adds the instructions of a body to those of the header.
    pub(super) fn read_body(&mut self, status: StatusCode, body: &[u8]) -> Result<EmbeddedResponse, String> {
        if status != StatusCode::OK {
            return Err(format!("response code for {MEDIA_TYPE} content must be 200"));
        }
        let document: Value = parse_owned(body).map_err(|_| format!("failed to parse {MEDIA_TYPE} content as JSON"))?;
        let document = document.as_object().ok_or("instruct must be an object")?;
        if let Some(hold) = document.get("hold") {
            self.read_hold(hold.as_object().ok_or("instruct contains 'hold' with wrong type")?)?;
        }
        let mut embedded = EmbeddedResponse::default();
        if let Some(response) = document.get("response") {
            let response = response.as_object().ok_or("instruct contains 'response' with wrong type")?;
            embedded.status = code_of(response, "response")?;
            embedded.headers = headers_of(response, "response")?;
            embedded.body = bytes_of(response, "response", "body-bin", "body")?.unwrap_or_default();
        }
        Ok(embedded)
    }

    fn read_hold(&mut self, from: &Map<String, Value>) -> Result<(), String> {
        self.hold = Some(match text_of(from, "hold", "mode")? {
            None => HoldMode::Response,
            Some(mode) => {
                hold_mode(mode).ok_or("hold 'mode' must be set to either 'response' or 'stream'".to_owned())?
            }
        });
        let channels = from.get("channels").ok_or("'hold' does not contain 'channels'")?;
        for channel in channels.as_array().ok_or("hold contains 'channels' with wrong type")? {
            let channel = channel.as_object().ok_or("channel is not an object")?;
            let name = text_of(channel, "channel", "name")?.ok_or("'channel' does not contain 'name'")?;
            let filters = channel
                .get("filters")
                .map(|filters| filters.as_array().ok_or("channel contains 'filters' with wrong type"));
            let filters = filters.transpose()?.into_iter().flatten();
            let filters = filters
                .map(|filter| filter.as_str().map(str::to_owned).ok_or("filters contains value with wrong type"));
            self.add(HeldChannel {
                name: name.to_owned(),
                prev_id: text_of(channel, "channel", "prev-id")?.map(str::to_owned),
                filters: filters.collect::<Result<_, _>>()?,
            })?;
        }
        if let Some(timeout) = seconds_of(from, "hold", "timeout")? {
            self.timeout = timeout;
        }
        if let Some(from) = from.get("keep-alive") {
            let from = from.as_object().ok_or("hold contains 'keep-alive' with wrong type")?;
            let data = bytes_of(from, "keep-alive", "content-bin", "content")?.unwrap_or_default();
            let timeout = seconds_of(from, "keep-alive", "timeout")?.unwrap_or(DEFAULT_TIMEOUT);
            let interval = text_of(from, "keep-alive", "mode")? == Some("interval");
            self.keep_alive = Some(KeepAlive { data, timeout: timeout.max(Duration::from_secs(1)), interval });
        }
        if let Some(meta) = from.get("meta") {
            for (key, value) in meta.as_object().ok_or("hold contains 'meta' with wrong type")? {
                let value = value.as_str().ok_or_else(|| format!("'meta' contains '{key}' with wrong type"))?;
                self.meta.insert(key.clone(), value.to_owned());
            }
        }
        Ok(())
    }

    /// Whether a held stream must inspect each item, because some are filtered or because none may be missed.
    pub(super) fn inspect_items(&self) -> bool {
        let looks = |channel: &HeldChannel| channel.prev_id.is_some() || !channel.filters.is_empty();
        self.next.is_some() || self.channels.iter().any(looks)
    }
}

/// Removes a `Content-Encoding` that names no encoding, by which some servers keep others from compressing a stream.
///
/// # Errors
/// The content is encoded: published items could not be appended to it.
pub(super) fn take_no_encoding(headers: &mut HeaderMap) -> Result<(), OriginError> {
    let lines = headers.get_all(header::CONTENT_ENCODING).iter().map(|line| line.to_str().unwrap_or("?"));
    let mut encodings = lines.flat_map(|line| line.split(',')).map(str::trim);
    if !encodings.all(|name| ["", "identity", "none"].iter().any(|none| none.eq_ignore_ascii_case(name))) {
        return Err(OriginError::Invalid("an answer that is held cannot have a Content-Encoding".into()));
    }
    headers.remove(header::CONTENT_ENCODING);
    Ok(())
}

/// Whether the body of a response with this header consists of instructions.
pub(super) fn are_in_body(headers: &HeaderMap) -> bool {
    let kind = headers.get(header::CONTENT_TYPE).and_then(|kind| kind.to_str().ok()).unwrap_or_default();
    kind.split(';').next().unwrap_or_default().trim().eq_ignore_ascii_case(MEDIA_TYPE)
}

fn hold_mode(mode: &str) -> Option<HoldMode> {
    match mode {
        "response" => Some(HoldMode::Response),
        "stream" => Some(HoldMode::Stream),
        _ => None,
    }
}

fn whole_seconds(text: &str, what: &str) -> Result<Duration, String> {
    let seconds: i64 = text.trim().parse().map_err(|_| format!("failed to parse {what}"))?;
    u32::try_from(seconds)
        .map(|seconds| Duration::from_secs(seconds.into()))
        .map_err(|_| format!("{what} has invalid value"))
}

/// `data; format=…; timeout=…; mode=…`. The data may contain semicolons: only known parameters are split off its end.
fn keep_alive(text: &str) -> Result<KeepAlive, String> {
    let (mut format, mut timeout, mut mode) = (None, None, None);
    let mut data = text;
    while let Some((rest, param)) = data.rsplit_once(';') {
        let Some((key, value)) = param.split_once('=') else { break };
        let place = match key.trim() {
            "format" => &mut format,
            "timeout" => &mut timeout,
            "mode" => &mut mode,
            _ => break,
        };
        *place = Some(unquoted(value));
        data = rest;
    }
    if data.is_empty() {
        return Err("Grip-Keep-Alive cannot be empty".into());
    }
    let interval = match mode.as_deref() {
        None | Some("" | "idle") => false,
        Some("interval") => true,
        Some(mode) => return Err(format!("no such Grip-Keep-Alive mode '{mode}'")),
    };
    let timeout = timeout.map(|timeout| whole_seconds(&timeout, "Grip-Keep-Alive timeout")).transpose()?;
    let data = match format.as_deref() {
        None | Some("" | "raw") => data.as_bytes().to_vec(),
        Some("cstring") => unescaped(data).ok_or("failed to parse Grip-Keep-Alive cstring format")?,
        Some("base64") => BASE64.decode(data.trim()).map_err(|_| "failed to parse Grip-Keep-Alive base64 format")?,
        Some(format) => return Err(format!("no such Grip-Keep-Alive format '{format}'")),
    };
    Ok(KeepAlive { data, timeout: timeout.unwrap_or(DEFAULT_TIMEOUT).max(Duration::from_secs(1)), interval })
}

/// Decodes the escapes of a C string.
fn unescaped(text: &str) -> Option<Vec<u8>> {
    let mut out = Vec::with_capacity(text.len());
    let mut bytes = text.bytes();
    while let Some(byte) = bytes.next() {
        if byte != b'\\' {
            out.push(byte);
            continue;
        }
        match bytes.next()? {
            b'n' => out.push(b'\n'),
            b'r' => out.push(b'\r'),
            b't' => out.push(b'\t'),
            b'x' => {
                let mut digit = || char::from(bytes.next()?).to_digit(16);
                out.push((digit()? * 16 + digit()?) as u8);
            }
            other => out.push(other),
        }
    }
    Some(out)
}

// === headers ===

/// The elements of a list field, which may be repeated.
fn list<'a>(headers: &'a HeaderMap, name: &str) -> impl Iterator<Item = String> + 'a {
    let values: Vec<String> =
        headers.get_all(name).iter().map(|value| String::from_utf8_lossy(value.as_bytes()).into_owned()).collect();
    values
        .into_iter()
        .flat_map(|value| split(&value, ',').into_iter().map(|item| item.trim().to_owned()).collect::<Vec<_>>())
        .filter(|item| !item.is_empty())
}

/// Splits a text, but not within quotes and `<…>`.
fn split(text: &str, at: char) -> Vec<&str> {
    let (mut parts, mut from) = (Vec::new(), 0);
    let (mut quoted, mut escaped, mut link) = (false, false, false);
    for (here, letter) in text.char_indices() {
        match letter {
            _ if escaped => escaped = false,
            '\\' if quoted => escaped = true,
            '"' => quoted = !quoted,
            '<' if !quoted => link = true,
            '>' if !quoted => link = false,
            _ if letter == at && !quoted && !link => {
                parts.push(&text[from..here]);
                from = here + 1;
            }
            _ => {}
        }
    }
    parts.push(&text[from..]);
    parts
}

/// `first; key=value; key="value"`.
fn params(text: &str) -> (String, Vec<(String, String)>) {
    let mut parts = split(text, ';').into_iter();
    let first = parts.next().unwrap_or_default().trim().to_owned();
    let pair = |part: &str| {
        let (key, value) = part.split_once('=').unwrap_or((part, ""));
        (key.trim().to_ascii_lowercase(), unquoted(value))
    };
    (first, parts.map(pair).collect())
}

fn unquoted(text: &str) -> String {
    let text = text.trim();
    let Some(inner) = text.strip_prefix('"').and_then(|text| text.strip_suffix('"')) else { return text.to_owned() };
    let mut out = String::with_capacity(inner.len());
    let mut letters = inner.chars();
    while let Some(letter) = letters.next() {
        out.extend(if letter == '\\' { letters.next() } else { Some(letter) });
    }
    out
}

#[cfg(test)]
mod tests {
    use http::HeaderValue;

    use super::*;

    fn headers(pairs: &[(&'static str, &str)]) -> HeaderMap {
        let mut headers = HeaderMap::new();
        for (name, value) in pairs {
            headers.append(*name, HeaderValue::from_str(value).unwrap());
        }
        headers
    }

    fn read(pairs: &[(&'static str, &str)]) -> Result<Instructions, String> {
        Instructions::take(&mut headers(pairs))
    }

    #[test]
    fn instructions_of_eventstream() {
        let instructions = read(&[
            ("grip-channel", "events-abc, events-room-abc"),
            ("grip-hold", "stream"),
            ("grip-keep-alive", r"event: keep-alive\ndata: \n\n; format=cstring; timeout=20"),
        ])
        .unwrap();
        assert_eq!(instructions.hold, Some(HoldMode::Stream));
        let names: Vec<_> = instructions.channels.iter().map(|channel| channel.name.as_str()).collect();
        assert_eq!(names, ["events-abc", "events-room-abc"]);
        let keep_alive = KeepAlive {
            data: b"event: keep-alive\ndata: \n\n".into(),
            timeout: Duration::from_secs(20),
            interval: false,
        };
        assert_eq!(instructions.keep_alive, Some(keep_alive));
        assert!(!instructions.inspect_items());
    }

    #[test]
    fn all_headers_are_read() {
        let mut map = headers(&[
            ("grip-hold", "response"),
            ("grip-channel", "a; prev-id=7; filter=skip-self"),
            ("grip-channel", r#"b;prev-id="x,\"y", c"#),
            ("grip-timeout", "5"),
            ("grip-status", "304 Not Modified"),
            ("grip-set-meta", r#"user="alice, \"a\"", other=1"#),
            ("grip-link", "</next?a=1,2;b>; rel=next; timeout=9, </gone>; rel=gone"),
            ("content-type", "text/plain"),
            ("x-kept", "1"),
        ]);
        let instructions = Instructions::take(&mut map).unwrap();
        assert_eq!(map, headers(&[("content-type", "text/plain"), ("x-kept", "1")]));
        assert_eq!((instructions.hold, instructions.timeout), (Some(HoldMode::Response), Duration::from_secs(5)));
        let [a, b, c] = &instructions.channels[..] else { panic!("{instructions:?}") };
        assert_eq!((a.prev_id.as_deref(), &a.filters[..]), (Some("7"), &["skip-self".to_owned()][..]));
        assert_eq!((b.prev_id.as_deref(), c.prev_id.as_deref()), (Some("x,\"y"), None));
        assert_eq!(instructions.status, Some(StatusCode::NOT_MODIFIED));
        assert_eq!((&instructions.meta["user"][..], &instructions.meta["other"][..]), ("alice, \"a\"", "1"));
        let next = NextLink { uri: "/next?a=1,2;b".into(), timeout: Duration::from_secs(9) };
        assert_eq!(instructions.next, Some(next));
        assert!(instructions.inspect_items());
    }

    #[test]
    fn keep_alive_has_formats_and_modes() {
        let read = |text: &str| read(&[("grip-keep-alive", text)]).map(|instructions| instructions.keep_alive.unwrap());
        assert_eq!(read("x").unwrap(), KeepAlive { data: b"x".into(), timeout: DEFAULT_TIMEOUT, interval: false });
        assert_eq!(read("a;b; timeout=3").unwrap().data, b"a;b");
        let periodic = read("Ogo=; format=base64; mode=interval; timeout=1").unwrap();
        assert_eq!(periodic, KeepAlive { data: b":\n".into(), timeout: Duration::from_secs(1), interval: true });
        assert_eq!(read(r"\\\r\n\t\x41; format=cstring").unwrap().data, b"\\\r\n\tA");
        assert_eq!(read(r"\n; format=raw; mode=idle").unwrap().data, br"\n");
        for (text, wrong) in [
            ("", "Grip-Keep-Alive cannot be empty"),
            ("x; mode=odd", "no such Grip-Keep-Alive mode 'odd'"),
            ("x; format=odd", "no such Grip-Keep-Alive format 'odd'"),
            ("x; timeout=soon", "failed to parse Grip-Keep-Alive timeout"),
            ("x; timeout=-1", "Grip-Keep-Alive timeout has invalid value"),
            (r"\x4; format=cstring", "failed to parse Grip-Keep-Alive cstring format"),
        ] {
            assert_eq!(read(text).unwrap_err(), wrong);
        }
    }

    #[test]
    fn errors_have_the_texts_of_pushpin() {
        for (name, value, wrong) in [
            ("grip-hold", "forever", "Grip-Hold must be set to either 'response' or 'stream'"),
            ("grip-timeout", "soon", "failed to parse Grip-Timeout"),
            ("grip-timeout", "-1", "Grip-Timeout has invalid value"),
            ("grip-status", "x", "Grip-Status contains invalid status code"),
            ("grip-link", "/a; rel=next", "failed to parse Grip-Link value"),
            ("grip-channel", "a; filter=odd", "there is no filter 'odd'"),
        ] {
            assert_eq!(read(&[(name, value)]).unwrap_err(), wrong);
        }
    }

    #[test]
    fn headers_that_are_not_exposed_are_removed() {
        let mut map = headers(&[("grip-expose-headers", "X-A"), ("x-a", "1"), ("x-b", "2")]);
        Instructions::take(&mut map).unwrap();
        assert_eq!(map, headers(&[("x-a", "1")]));
    }

    #[test]
    fn instructions_as_a_body() {
        let mut instructions = read(&[]).unwrap();
        let body = br#"{"hold":{"mode":"stream","channels":[{"name":"a","prev-id":"1"},{"name":"b"}],"timeout":9,
            "keep-alive":{"content-bin":"Ogo=","timeout":7},"meta":{"user":"u"}},
            "response":{"code":"201","reason":"Yes","headers":{"X-A":"1","Grip-Hold":"stream","Connection":"close"},"body":"hi"}}"#;
        let embedded = instructions.read_body(StatusCode::OK, body).unwrap();
        assert_eq!((embedded.status, &embedded.body[..]), (Some(StatusCode::CREATED), &b"hi"[..]));
        assert_eq!(embedded.headers, headers(&[("x-a", "1")]));
        assert_eq!((instructions.hold, instructions.channels.len()), (Some(HoldMode::Stream), 2));
        assert_eq!(instructions.channels[0].prev_id.as_deref(), Some("1"));
        assert_eq!(instructions.keep_alive.as_ref().unwrap().data, b":\n");
        for (body, wrong) in [
            ("{", "failed to parse application/grip-instruct content as JSON"),
            ("[]", "instruct must be an object"),
            (r#"{"hold":1}"#, "instruct contains 'hold' with wrong type"),
            (r#"{"hold":{}}"#, "'hold' does not contain 'channels'"),
            (r#"{"hold":{"mode":"x"}}"#, "hold 'mode' must be set to either 'response' or 'stream'"),
            (r#"{"response":{"code":1000}}"#, "response contains 'code' with invalid value"),
            (r#"{"response":{"headers":[["a"]]}}"#, "headers contains list with wrong number of elements"),
        ] {
            assert_eq!(instructions.read_body(StatusCode::OK, body.as_bytes()).unwrap_err(), wrong);
        }
    }
}
