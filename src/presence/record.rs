//! The messages by which nodes replicate members.
//!
//! ```text
//! message   version:1 · record*                              little endian
//! record    tag:1 · length:4 · payload, by tag:
//!   1 begin held       a snapshot of all members that the sender holds follows
//!   2 held             key · info                            the sender holds this member
//!   3 released         key                                   the sender no longer holds it
//!   4 end held         the snapshot is complete
//!   5 …8               the same for announced members; sent only by the leader
//!   9 position         position · channel                    ends the records of one announcement
//! key       length:1 · channel · length:1 · client
//! info      since:8 · brief:2 · text                         to the end of the record
//! position  epoch (six characters, or 0) · - · offset
//! ```

use std::sync::Arc;

use bytes::{Buf, BufMut, Bytes};

use super::{member::MemberInfo, member_table::MemberKey};
use crate::{channel::Channel, position::Position};

/// The version that this node writes, and the only one that it reads. Records with an unknown tag are skipped.
const VERSION: u8 = 1;

#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum PresenceRecord {
    BeginHeld,
    Held(MemberKey, MemberInfo),
    Released(MemberKey),
    EndHeld,
    BeginAnnounced,
    Joined(MemberKey, MemberInfo),
    Left(MemberKey),
    EndAnnounced,
    Position(Channel, Position),
}

/// Packs records into messages. A message is closed once it has `limit` bytes.
pub(super) struct RecordWriter {
    limit: usize,
    full: Vec<Bytes>,
    message: Vec<u8>,
}

impl RecordWriter {
    pub(super) fn new(limit: usize) -> Self {
        RecordWriter { limit, full: Vec::new(), message: vec![VERSION] }
    }

    pub(super) fn begin_held(&mut self) {
        self.record(1, |_| {});
    }

    pub(super) fn held(&mut self, key: (&Channel, &str), info: &MemberInfo) {
        self.record(2, |out| {
            put_key(key, out);
            put_info(info, out);
        });
    }

    pub(super) fn released(&mut self, key: (&Channel, &str)) {
        self.record(3, |out| put_key(key, out));
    }

    pub(super) fn end_held(&mut self) {
        self.record(4, |_| {});
    }

    pub(super) fn begin_announced(&mut self) {
        self.record(5, |_| {});
    }

    /// An announced member, or with `None` one that was announced to have left.
    pub(super) fn announced(&mut self, key: (&Channel, &str), info: Option<&MemberInfo>) {
        self.record(if info.is_some() { 6 } else { 7 }, |out| {
            put_key(key, out);
            if let Some(info) = info {
                put_info(info, out);
            }
        });
    }

    pub(super) fn end_announced(&mut self) {
        self.record(8, |_| {});
    }

    /// Ends the records of the announcement at `position`.
    pub(super) fn position(&mut self, channel: &Channel, position: Position) {
        self.record(9, |out| {
            put_text(&position.to_string(), out);
            put_text(channel.as_str(), out);
        });
    }

    fn record(&mut self, tag: u8, write: impl FnOnce(&mut Vec<u8>)) {
        if self.message.len() >= self.limit {
            self.full.push(std::mem::replace(&mut self.message, vec![VERSION]).into());
        }
        self.message.push(tag);
        let at = self.message.len();
        self.message.extend_from_slice(&[0; 4]);
        write(&mut self.message);
        let length = (self.message.len() - at - 4) as u32;
        self.message[at..at + 4].copy_from_slice(&length.to_le_bytes());
    }

    /// The messages in order; none without records.
    pub(super) fn finish(mut self) -> Vec<Bytes> {
        if self.message.len() > 1 {
            self.full.push(self.message.into());
        }
        self.full
    }
}

fn put_text(text: &str, out: &mut Vec<u8>) {
    // Channel names have at most 255 bytes, client names 128.
    out.put_u8(text.len() as u8);
    out.put_slice(text.as_bytes());
}

fn put_key((channel, client): (&Channel, &str), out: &mut Vec<u8>) {
    put_text(channel.as_str(), out);
    put_text(client, out);
}

fn put_info(info: &MemberInfo, out: &mut Vec<u8>) {
    out.put_u64_le(info.since);
    out.put_u16_le(info.brief);
    out.put_slice(info.text.as_bytes());
}

/// The records of a message in order, without those that cannot be read.
pub(super) fn read_records(message: &[u8]) -> Vec<PresenceRecord> {
    let mut records = Vec::new();
    let [VERSION, rest @ ..] = message else { return records };
    let mut rest = rest;
    while rest.len() >= 5 {
        let tag = rest.get_u8();
        let length = rest.get_u32_le() as usize;
        if rest.len() < length {
            break;
        }
        records.extend(read_record(tag, &rest[..length]));
        rest.advance(length);
    }
    records
}

fn read_record(tag: u8, mut from: &[u8]) -> Option<PresenceRecord> {
    let from = &mut from;
    Some(match tag {
        1 => PresenceRecord::BeginHeld,
        2 => PresenceRecord::Held(key(from)?, info(from)?),
        3 => PresenceRecord::Released(key(from)?),
        4 => PresenceRecord::EndHeld,
        5 => PresenceRecord::BeginAnnounced,
        6 => PresenceRecord::Joined(key(from)?, info(from)?),
        7 => PresenceRecord::Left(key(from)?),
        8 => PresenceRecord::EndAnnounced,
        9 => {
            let position = text(from)?.parse().ok()?;
            PresenceRecord::Position(Channel::parse(text(from)?).ok()?, position)
        }
        _ => return None,
    })
}

fn text<'a>(from: &mut &'a [u8]) -> Option<&'a str> {
    let (length, rest) = from.split_first()?;
    let (text, rest) = rest.split_at_checked(usize::from(*length))?;
    *from = rest;
    std::str::from_utf8(text).ok()
}

fn key(from: &mut &[u8]) -> Option<MemberKey> {
    Some((Channel::parse(text(from)?).ok()?, Arc::from(text(from)?)))
}

fn info(from: &mut &[u8]) -> Option<MemberInfo> {
    if from.len() < 10 {
        return None;
    }
    let (since, brief) = (from.get_u64_le(), from.get_u16_le());
    Some(MemberInfo { text: std::str::from_utf8(from).ok()?.into(), brief, since })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn records_are_read_as_written_in_messages_of_any_size() {
        let name = |n: usize| (Channel::parse(&format!("room {n}")).unwrap(), Arc::<str>::from("é"));
        let info = MemberInfo { text: ",\"subject\":\"\"".into(), brief: 13, since: 7 };
        let at = Position { epoch: "k3Vq00".parse().unwrap(), offset: 42 };
        for limit in [1, 40, 100, 100_000] {
            let mut writer = RecordWriter::new(limit);
            let mut records = vec![PresenceRecord::BeginHeld];
            writer.begin_held();
            for n in 0..9 {
                let (channel, client) = name(n);
                writer.held((&channel, &client), &info);
                writer.released((&channel, &client));
                writer.announced((&channel, &client), Some(&info));
                writer.announced((&channel, &client), None);
                writer.position(&channel, at);
                records.extend([
                    PresenceRecord::Held(name(n), info.clone()),
                    PresenceRecord::Released(name(n)),
                    PresenceRecord::Joined(name(n), info.clone()),
                    PresenceRecord::Left(name(n)),
                    PresenceRecord::Position(name(n).0, at),
                ]);
            }
            writer.end_held();
            writer.begin_announced();
            writer.end_announced();
            records.extend([PresenceRecord::EndHeld, PresenceRecord::BeginAnnounced, PresenceRecord::EndAnnounced]);
            let messages = writer.finish();
            assert!(messages.iter().all(|message| message.len() < limit + 100));
            assert_eq!(messages.iter().flat_map(|message| read_records(message)).collect::<Vec<_>>(), records);
        }
        assert!(RecordWriter::new(100).finish().is_empty());
    }

    #[test]
    fn malformed_records_and_later_versions_are_skipped() {
        let mut writer = RecordWriter::new(1000);
        writer.released((&Channel::parse("a").unwrap(), "c"));
        writer.end_held();
        let message = writer.finish().remove(0);
        assert_eq!(read_records(&message).len(), 2);
        for cut in 0..message.len() {
            assert!(read_records(&message[..cut]).len() < 2);
        }
        let mut later = message.to_vec();
        later[1] = 99;
        assert_eq!(read_records(&later), [PresenceRecord::EndHeld]);
        later[0] = 2;
        assert_eq!(read_records(&later), []);
        for _ in 0..10_000 {
            let noise: Vec<u8> = std::iter::once(1).chain((0..30).map(|_| fastrand::u8(..10))).collect();
            read_records(&noise);
        }
    }
}
