//! [`Instruct`]: what an origin tells the proxy to do with its answer, in `Grip-…` headers or as a body of
//! `application/grip-instruct`. A mistake in it is the origin's: the client gets a 502, the text is Pushpin's.

use std::{collections::BTreeMap, time::Duration};

use base64::{Engine, engine::general_purpose::STANDARD as BASE64};
use http::{HeaderMap, StatusCode, header};
use serde_json::{Map, Value};

use super::members::{bytes_of, code_of, headers_of, seconds_of, text_of};

/// Of a response hold, and of a keep-alive that names no time.
const DEFAULT_TIMEOUT: Duration = Duration::from_secs(55);
const DEFAULT_LINK_TIMEOUT: Duration = Duration::from_secs(120);
/// The media type of instructions as a body.
const AS_BODY: &str = "application/grip-instruct";
/// Filters that weir has.
pub const FILTERS: [&str; 3] = ["skip-self", "skip-users", "require-sub"];

/// What to do with an answer beside passing it on.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Instruct {
    pub hold: Option<Hold>,
    pub channels: Vec<Channel>,
    /// How long a response is held.
    pub timeout: Duration,
    pub keep_alive: Option<KeepAlive>,
    /// What filters know of the client.
    pub meta: BTreeMap<String, String>,
    /// Instead of the answer's own status.
    pub status: Option<StatusCode>,
    /// Where the stream goes on.
    pub next: Option<Link>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Hold {
    /// Until an item answers it.
    Response,
    /// For good, and items are added to it.
    Stream,
}

#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Channel {
    /// Without the prefix of the route.
    pub name: String,
    /// The item that the answer already contains: what follows it is the next.
    pub prev_id: Option<String>,
    pub filters: Vec<String>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KeepAlive {
    pub data: Vec<u8>,
    pub timeout: Duration,
    /// Whether it is sent however much else is.
    pub always: bool,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Link {
    pub uri: String,
    /// Fetched after so long without anything on every channel; `None` for never.
    pub timeout: Option<Duration>,
}

/// An answer that was all instructions: what the client gets instead.
#[derive(Debug, Default, PartialEq)]
pub struct Instead {
    pub status: Option<StatusCode>,
    pub headers: HeaderMap,
    pub body: Vec<u8>,
}

/// What is wrong with instructions.
pub type Wrong = String;

impl Instruct {
    /// Whether an answer with this head is more than an answer.
    pub fn is_in(headers: &HeaderMap) -> bool {
        headers.contains_key("grip-hold") || headers.contains_key("grip-link") || is_body(headers)
    }

    /// Takes the instructions out of `headers`; no header of GRIP is left in them.
    pub fn take(headers: &mut HeaderMap) -> Result<Self, Wrong> {
        let found = Self::read(headers);
        let exposed: Vec<String> = list(headers, "grip-expose-headers").map(|name| name.to_ascii_lowercase()).collect();
        strip(headers);
        if !exposed.is_empty() {
            let hidden = headers.keys().filter(|name| !exposed.iter().any(|kept| kept == name.as_str())).cloned();
            let hidden: Vec<_> = hidden.collect();
            for name in hidden {
                headers.remove(name);
            }
        }
        found
    }

    fn read(headers: &HeaderMap) -> Result<Self, Wrong> {
        let one = |name: &str| headers.get(name).map(|value| String::from_utf8_lossy(value.as_bytes()));
        let mut instruct = Instruct { timeout: DEFAULT_TIMEOUT, ..Instruct::default() };
        instruct.hold = match one("grip-hold").as_deref() {
            None => None,
            Some(mode) => Some(hold(mode).ok_or("Grip-Hold must be set to either 'response' or 'stream'".to_owned())?),
        };
        for text in list(headers, "grip-channel") {
            let (name, params) = params(&text);
            if name.is_empty() {
                return Err("failed to parse Grip-Channel".into());
            }
            let mut channel = Channel { name, ..Channel::default() };
            for (key, value) in params {
                match key.as_str() {
                    "prev-id" => channel.prev_id = Some(value),
                    "filter" => channel.filters.push(value),
                    _ => {}
                }
            }
            instruct.add(channel)?;
        }
        if let Some(text) = one("grip-timeout") {
            instruct.timeout = whole_seconds(&text, "Grip-Timeout")?;
        }
        if let Some(text) = one("grip-keep-alive") {
            instruct.keep_alive = Some(keep_alive(&text)?);
        }
        for text in list(headers, "grip-set-meta") {
            let Some((key, value)) = text.split_once('=') else {
                return Err("failed to parse Grip-Set-Meta".into());
            };
            instruct.meta.insert(key.trim().to_owned(), unquoted(value));
        }
        if let Some(text) = one("grip-status").filter(|text| !text.is_empty()) {
            // The reason behind it is lost: HTTP/2 has none, and nobody reads it.
            let code = text.split(' ').next().and_then(|code| code.parse().ok());
            instruct.status = Some(code.and_then(status).ok_or("Grip-Status contains invalid status code")?);
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
            instruct.next = Some(Link { uri, timeout: Some(timeout.unwrap_or(DEFAULT_LINK_TIMEOUT)) });
        }
        Ok(instruct)
    }

    fn add(&mut self, channel: Channel) -> Result<(), Wrong> {
        if let Some(unknown) = channel.filters.iter().find(|filter| !FILTERS.contains(&filter.as_str())) {
            return Err(format!("there is no filter '{unknown}'"));
        }
        match self.channels.iter_mut().find(|other| other.name == channel.name) {
            Some(other) => *other = channel,
            None => self.channels.push(channel),
        }
        Ok(())
    }

    /// Adds the instructions of a body to those of its head.
    pub fn read_body(&mut self, status: StatusCode, body: &[u8]) -> Result<Instead, Wrong> {
        if status != StatusCode::OK {
            return Err(format!("response code for {AS_BODY} content must be 200"));
        }
        let document: Value =
            serde_json::from_slice(body).map_err(|_| format!("failed to parse {AS_BODY} content as JSON"))?;
        let document = document.as_object().ok_or("instruct must be an object")?;
        if let Some(hold) = document.get("hold") {
            self.read_hold(hold.as_object().ok_or("instruct contains 'hold' with wrong type")?)?;
        }
        let mut instead = Instead::default();
        if let Some(response) = document.get("response") {
            let response = response.as_object().ok_or("instruct contains 'response' with wrong type")?;
            instead.status = code_of(response, "response")?;
            instead.headers = headers_of(response, "response")?;
            instead.body = bytes_of(response, "response", "body-bin", "body")?.unwrap_or_default();
        }
        Ok(instead)
    }

    fn read_hold(&mut self, from: &Map<String, Value>) -> Result<(), Wrong> {
        self.hold = Some(match text_of(from, "hold", "mode")? {
            None => Hold::Response,
            Some(mode) => hold(mode).ok_or("hold 'mode' must be set to either 'response' or 'stream'".to_owned())?,
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
            self.add(Channel {
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
            let always = text_of(from, "keep-alive", "mode")? == Some("interval");
            self.keep_alive = Some(KeepAlive { data, timeout: timeout.max(Duration::from_secs(1)), always });
        }
        if let Some(meta) = from.get("meta") {
            for (key, value) in meta.as_object().ok_or("hold contains 'meta' with wrong type")? {
                let value = value.as_str().ok_or_else(|| format!("'meta' contains '{key}' with wrong type"))?;
                self.meta.insert(key.clone(), value.to_owned());
            }
        }
        Ok(())
    }

    /// Whether a held stream has to look at each item: its client may not get all of them, or has to get all of them.
    pub fn is_followed(&self) -> bool {
        let looks = |channel: &Channel| channel.prev_id.is_some() || !channel.filters.is_empty();
        self.next.is_some() || self.channels.iter().any(looks)
    }
}

/// Whether the body is instructions, and not for the client.
pub fn is_body(headers: &HeaderMap) -> bool {
    let kind = headers.get(header::CONTENT_TYPE).and_then(|kind| kind.to_str().ok()).unwrap_or_default();
    kind.split(';').next().unwrap_or_default().trim().eq_ignore_ascii_case(AS_BODY)
}

/// Removes what is between proxy and origin only.
pub fn strip(headers: &mut HeaderMap) {
    let grip: Vec<_> = headers.keys().filter(|name| name.as_str().starts_with("grip-")).cloned().collect();
    for name in grip {
        headers.remove(name);
    }
}

fn hold(mode: &str) -> Option<Hold> {
    match mode {
        "response" => Some(Hold::Response),
        "stream" => Some(Hold::Stream),
        _ => None,
    }
}

/// A final status: what is informational would not end the exchange.
pub fn status(code: u16) -> Option<StatusCode> {
    StatusCode::from_u16(code).ok().filter(|status| !status.is_informational())
}

fn whole_seconds(text: &str, what: &str) -> Result<Duration, Wrong> {
    let seconds: i64 = text.trim().parse().map_err(|_| format!("failed to parse {what}"))?;
    u32::try_from(seconds)
        .map(|seconds| Duration::from_secs(seconds.into()))
        .map_err(|_| format!("{what} has invalid value"))
}

/// `data; format=…; timeout=…; mode=…`. The data may hold semicolons: only what looks like these is taken from its end.
fn keep_alive(text: &str) -> Result<KeepAlive, Wrong> {
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
    let always = match mode.as_deref() {
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
    Ok(KeepAlive { data, timeout: timeout.unwrap_or(DEFAULT_TIMEOUT).max(Duration::from_secs(1)), always })
}

/// The bytes that a C string means.
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

/// The items of a header that is a list, however often it is repeated.
fn list<'a>(headers: &'a HeaderMap, name: &str) -> impl Iterator<Item = String> + 'a {
    let values: Vec<String> =
        headers.get_all(name).iter().map(|value| String::from_utf8_lossy(value.as_bytes()).into_owned()).collect();
    values
        .into_iter()
        .flat_map(|value| split(&value, ',').into_iter().map(|item| item.trim().to_owned()).collect::<Vec<_>>())
        .filter(|item| !item.is_empty())
}

/// Splits outside of quotes and of `<…>`.
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

    fn read(pairs: &[(&'static str, &str)]) -> Result<Instruct, Wrong> {
        Instruct::take(&mut headers(pairs))
    }

    #[test]
    fn what_eventstream_says() {
        let instruct = read(&[
            ("grip-channel", "events-abc, events-room-abc"),
            ("grip-hold", "stream"),
            ("grip-keep-alive", r"event: keep-alive\ndata: \n\n; format=cstring; timeout=20"),
        ])
        .unwrap();
        assert_eq!(instruct.hold, Some(Hold::Stream));
        let names: Vec<_> = instruct.channels.iter().map(|channel| channel.name.as_str()).collect();
        assert_eq!(names, ["events-abc", "events-room-abc"]);
        let keep_alive = KeepAlive {
            data: b"event: keep-alive\ndata: \n\n".into(),
            timeout: Duration::from_secs(20),
            always: false,
        };
        assert_eq!(instruct.keep_alive, Some(keep_alive));
        assert!(!instruct.is_followed());
    }

    #[test]
    fn every_header() {
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
        let instruct = Instruct::take(&mut map).unwrap();
        assert_eq!(map, headers(&[("content-type", "text/plain"), ("x-kept", "1")]));
        assert_eq!((instruct.hold, instruct.timeout), (Some(Hold::Response), Duration::from_secs(5)));
        let [a, b, c] = &instruct.channels[..] else { panic!("{instruct:?}") };
        assert_eq!((a.prev_id.as_deref(), &a.filters[..]), (Some("7"), &["skip-self".to_owned()][..]));
        assert_eq!((b.prev_id.as_deref(), c.prev_id.as_deref()), (Some("x,\"y"), None));
        assert_eq!(instruct.status, Some(StatusCode::NOT_MODIFIED));
        assert_eq!((&instruct.meta["user"][..], &instruct.meta["other"][..]), ("alice, \"a\"", "1"));
        let next = Link { uri: "/next?a=1,2;b".into(), timeout: Some(Duration::from_secs(9)) };
        assert_eq!(instruct.next, Some(next));
        assert!(instruct.is_followed());
    }

    #[test]
    fn keep_alive_in_all_formats_and_modes() {
        let read = |text: &str| read(&[("grip-keep-alive", text)]).map(|instruct| instruct.keep_alive.unwrap());
        assert_eq!(read("x").unwrap(), KeepAlive { data: b"x".into(), timeout: DEFAULT_TIMEOUT, always: false });
        assert_eq!(read("a;b; timeout=3").unwrap().data, b"a;b");
        let interval = read("Ogo=; format=base64; mode=interval; timeout=1").unwrap();
        assert_eq!(interval, KeepAlive { data: b":\n".into(), timeout: Duration::from_secs(1), always: true });
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
    fn mistakes_have_pushpins_words() {
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
    fn headers_may_be_hidden() {
        let mut map = headers(&[("grip-expose-headers", "X-A"), ("x-a", "1"), ("x-b", "2")]);
        Instruct::take(&mut map).unwrap();
        assert_eq!(map, headers(&[("x-a", "1")]));
    }

    #[test]
    fn instructions_as_a_body() {
        let mut instruct = read(&[]).unwrap();
        let body = br#"{"hold":{"mode":"stream","channels":[{"name":"a","prev-id":"1"},{"name":"b"}],"timeout":9,
            "keep-alive":{"content-bin":"Ogo=","timeout":7},"meta":{"user":"u"}},
            "response":{"code":"201","reason":"Yes","headers":{"X-A":"1","Grip-Hold":"stream","Connection":"close"},"body":"hi"}}"#;
        let instead = instruct.read_body(StatusCode::OK, body).unwrap();
        assert_eq!((instead.status, &instead.body[..]), (Some(StatusCode::CREATED), &b"hi"[..]));
        assert_eq!(instead.headers, headers(&[("x-a", "1")]));
        assert_eq!((instruct.hold, instruct.channels.len()), (Some(Hold::Stream), 2));
        assert_eq!(instruct.channels[0].prev_id.as_deref(), Some("1"));
        assert_eq!(instruct.keep_alive.as_ref().unwrap().data, b":\n");
        for (body, wrong) in [
            ("{", "failed to parse application/grip-instruct content as JSON"),
            ("[]", "instruct must be an object"),
            (r#"{"hold":1}"#, "instruct contains 'hold' with wrong type"),
            (r#"{"hold":{}}"#, "'hold' does not contain 'channels'"),
            (r#"{"hold":{"mode":"x"}}"#, "hold 'mode' must be set to either 'response' or 'stream'"),
            (r#"{"response":{"code":1000}}"#, "response contains 'code' with invalid value"),
            (r#"{"response":{"headers":[["a"]]}}"#, "headers contains list with wrong number of elements"),
        ] {
            assert_eq!(instruct.read_body(StatusCode::OK, body.as_bytes()).unwrap_err(), wrong);
        }
    }
}
