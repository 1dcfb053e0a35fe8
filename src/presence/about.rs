//! [`About`]: what is said of one member, encoded once.

use serde_json::value::RawValue;

use crate::{
    channel::{MAX_LABEL, check_label},
    error::{Code, Error, Result},
    json::{write_json_line, write_json_str},
};

/// A client as it says it is: its name, and whatever others are to know of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Client {
    pub name: Box<str>,
    info: Option<Box<[u8]>>,
}

/// A member as it is listed and announced, but for its name:
/// `,"subject":"u7"` up to `brief`, then `,"transport":"sse","info":{}`; `since` is written behind it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct About {
    pub text: Box<str>,
    pub brief: u16,
    /// Unix milliseconds.
    pub since: u64,
}

impl Client {
    /// Reads a name as a client wrote it (1 to 128 bytes) and JSON of at most `most` bytes (`limits.present_info`).
    pub fn read(name: &str, info: Option<&RawValue>, most: usize) -> Result<Self> {
        check_label("the client that is present", name)?;
        if let Some(info) = info
            && info.get().len() > most
        {
            let detail = format!("info has {} bytes, limits.present_info is {most}", info.get().len());
            return Err(Error::new(Code::TooLarge, detail).with("limit", "limits.present_info"));
        }
        let info = info.map(|info| {
            let mut line = Vec::with_capacity(info.get().len());
            write_json_line(info, &mut line);
            line.into_boxed_slice()
        });
        Ok(Client { name: name.into(), info })
    }

    pub fn about(&self, subject: &str, transport: &str, since: u64) -> About {
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
        // Made of what was UTF-8 when it came in.
        About { text: String::from_utf8(text).unwrap_or_default().into(), brief, since }
    }
}

impl About {
    /// Appends the member: `{"client":"c1","subject":"u7","transport":"sse","info":{},"since":1763640000123}`.
    pub fn write_json(&self, client: &str, out: &mut Vec<u8>) {
        out.extend_from_slice(br#"{"client":"#);
        write_json_str(client, out);
        out.extend_from_slice(self.text.as_bytes());
        out.extend_from_slice(br#","since":"#);
        out.extend_from_slice(itoa::Buffer::new().format(self.since).as_bytes());
        out.push(b'}');
    }

    /// Appends who it is, for those who know the rest: `{"client":"c1","subject":"u7"}`.
    pub fn write_brief(&self, client: &str, out: &mut Vec<u8>) {
        out.extend_from_slice(br#"{"client":"#);
        write_json_str(client, out);
        out.extend_from_slice(self.text.get(..usize::from(self.brief)).unwrap_or_default().as_bytes());
        out.push(b'}');
    }

    /// Bytes of [`write_json`](Self::write_json), at most.
    pub fn size(&self) -> usize {
        self.text.len() + MAX_LABEL * 6 + 48
    }

    /// Whether the same is said, since whenever.
    pub fn says(&self, other: &About) -> bool {
        self.text == other.text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_member_on_the_wire() {
        let info = serde_json::value::to_raw_value(&serde_json::json!({ "nick": "\"é" })).unwrap();
        let client = Client::read("c\"1", Some(&info), 100).unwrap();
        let about = client.about("u7", "sse", 1_763_640_000_123);
        let text = |write: &dyn Fn(&mut Vec<u8>)| {
            let mut out = Vec::new();
            write(&mut out);
            assert!(out.len() <= about.size());
            serde_json::from_slice::<serde_json::Value>(&out).unwrap()
        };
        let whole = serde_json::json!({ "client": "c\"1", "subject": "u7", "transport": "sse", "info": { "nick": "\"é" }, "since": 1_763_640_000_123_u64 });
        assert_eq!(text(&|out| about.write_json(&client.name, out)), whole);
        let brief = serde_json::json!({ "client": "c\"1", "subject": "u7" });
        assert_eq!(text(&|out| about.write_brief(&client.name, out)), brief);
    }

    #[test]
    fn what_is_too_much_is_named() {
        let info = serde_json::value::to_raw_value("0123456789").unwrap();
        assert!(Client::read("c", Some(&info), 12).is_ok());
        assert_eq!(Client::read("c", Some(&info), 11).unwrap_err().code(), Code::TooLarge);
        for bad in ["", "a\nb", &"x".repeat(129)] {
            assert_eq!(Client::read(bad, None, 100).unwrap_err().code(), Code::InvalidParams);
        }
    }
}
