//! [`PresentClient`] and [`MemberInfo`]: a client as it describes itself, and a member as it is listed and announced.

use serde_json::value::RawValue;

use crate::{
    channel::{MAX_LABEL, check_label},
    error::{Code, Error, Result},
    json::{write_json_line, write_json_str},
};

/// The name of a client, and JSON of its own that other clients see.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PresentClient {
    name: Box<str>,
    info: Option<Box<[u8]>>,
}

/// A member without its name, encoded once: `,"subject":"u7","transport":"sse","info":{}`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MemberInfo {
    pub(super) text: Box<str>,
    /// Length of the part of `text` that `leave` events contain: the subject.
    pub(super) brief: u16,
    /// Unix milliseconds.
    pub(super) since: u64,
}

impl PresentClient {
    /// Validates a name (1 to 128 bytes) and JSON of at most `limit` bytes (`limits.present_info`).
    pub fn new(name: &str, info: Option<&RawValue>, limit: usize) -> Result<Self> {
        check_label("the client that is present", name)?;
        if let Some(info) = info
            && info.get().len() > limit
        {
            let detail = format!("info has {} bytes, limits.present_info is {limit}", info.get().len());
            return Err(Error::new(Code::TooLarge, detail).with("limit", "limits.present_info"));
        }
        let info = info.map(|info| {
            let mut line = Vec::with_capacity(info.get().len());
            write_json_line(info, &mut line);
            line.into_boxed_slice()
        });
        Ok(PresentClient { name: name.into(), info })
    }

    pub(super) fn name(&self) -> &str {
        &self.name
    }

    /// The client as a member since `since`, in Unix milliseconds.
    pub(super) fn info(&self, subject: &str, transport: &str, since: u64) -> MemberInfo {
        let mut text = Vec::with_capacity(64 + subject.len() + self.info.as_ref().map_or(0, |info| info.len()));
        text.extend_from_slice(br#","subject":"#);
        write_json_str(subject, &mut text);
        let brief = text.len().min(usize::from(u16::MAX)) as u16;
        text.extend_from_slice(br#","transport":"#);
        write_json_str(transport, &mut text);
        if let Some(info) = &self.info {
            text.extend_from_slice(br#","info":"#);
            text.extend_from_slice(info);
        }
        // All parts are UTF-8.
        MemberInfo { text: String::from_utf8(text).unwrap_or_default().into(), brief, since }
    }
}

impl MemberInfo {
    /// Appends the member: `{"client":"c1","subject":"u7","transport":"sse","info":{},"since":1763640000123}`.
    pub(crate) fn write_json(&self, client: &str, out: &mut Vec<u8>) {
        out.extend_from_slice(br#"{"client":"#);
        write_json_str(client, out);
        out.extend_from_slice(self.text.as_bytes());
        out.extend_from_slice(br#","since":"#);
        out.extend_from_slice(itoa::Buffer::new().format(self.since).as_bytes());
        out.push(b'}');
    }

    /// Appends what a `leave` event contains: `{"client":"c1","subject":"u7"}`.
    pub(super) fn write_brief(&self, client: &str, out: &mut Vec<u8>) {
        out.extend_from_slice(br#"{"client":"#);
        write_json_str(client, out);
        out.extend_from_slice(self.text.get(..usize::from(self.brief)).unwrap_or_default().as_bytes());
        out.push(b'}');
    }

    /// An upper bound for the length of [`write_json`](Self::write_json).
    pub(super) fn size(&self) -> usize {
        self.text.len() + MAX_LABEL * 6 + 48
    }

    /// Whether both are equal, apart from `since`.
    pub(super) fn equals_but_since(&self, other: &MemberInfo) -> bool {
        self.text == other.text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_member_on_the_wire() {
        let info = serde_json::value::to_raw_value(&serde_json::json!({ "nick": "\"é" })).unwrap();
        let client = PresentClient::new("c\"1", Some(&info), 100).unwrap();
        let info = client.info("u7", "sse", 1_763_640_000_123);
        let text = |write: &dyn Fn(&mut Vec<u8>)| {
            let mut out = Vec::new();
            write(&mut out);
            assert!(out.len() <= info.size());
            serde_json::from_slice::<serde_json::Value>(&out).unwrap()
        };
        let whole = serde_json::json!({ "client": "c\"1", "subject": "u7", "transport": "sse", "info": { "nick": "\"é" }, "since": 1_763_640_000_123_u64 });
        assert_eq!(text(&|out| info.write_json(client.name(), out)), whole);
        let brief = serde_json::json!({ "client": "c\"1", "subject": "u7" });
        assert_eq!(text(&|out| info.write_brief(client.name(), out)), brief);
    }

    #[test]
    fn too_large_info_and_invalid_names_are_rejected() {
        let info = serde_json::value::to_raw_value("0123456789").unwrap();
        assert!(PresentClient::new("c", Some(&info), 12).is_ok());
        assert_eq!(PresentClient::new("c", Some(&info), 11).unwrap_err().code(), Code::TooLarge);
        for bad in ["", "a\nb", &"x".repeat(129)] {
            assert_eq!(PresentClient::new(bad, None, 100).unwrap_err().code(), Code::InvalidParams);
        }
    }
}
