//! [`Announcement`]: what a node publishes to all others.

use std::sync::Arc;

use bytes::{Buf, BufMut, Bytes, BytesMut};

use crate::cluster::NodeId;

/// Of sessions and announcements.
pub(super) const VERSION: u8 = 1;

/// `version:1 · kind:1 · from:8 · …`, little-endian.
pub(super) enum Announcement {
    /// The node can be reached from now on. Its session has this revision.
    Hello {
        from: NodeId,
        joined: u64,
        rev: u64,
    },
    Goodbye {
        from: NodeId,
    },
    /// The changes of its session from one revision to another.
    Changes {
        from: NodeId,
        after: u64,
        rev: u64,
        changes: Vec<SessionChange>,
    },
}

pub(super) struct SessionChange {
    pub(super) name: Arc<str>,
    pub(super) rev: u64,
    /// None: the node no longer publishes anything about the name.
    pub(super) info: Option<Bytes>,
}

const HELLO: u8 = 1;
const GOODBYE: u8 = 2;
const CHANGES: u8 = 3;
const NO_INFO: u32 = u32::MAX;

impl Announcement {
    pub(super) fn from(&self) -> NodeId {
        match self {
            Announcement::Hello { from, .. } | Announcement::Goodbye { from } | Announcement::Changes { from, .. } => {
                *from
            }
        }
    }

    pub(super) fn encode(&self) -> Bytes {
        let mut out = BytesMut::new();
        out.put_u8(VERSION);
        match self {
            Announcement::Hello { from, joined, rev } => {
                out.put_u8(HELLO);
                for number in [from.0, *joined, *rev] {
                    out.put_u64_le(number);
                }
            }
            Announcement::Goodbye { from } => {
                out.put_u8(GOODBYE);
                out.put_u64_le(from.0);
            }
            Announcement::Changes { from, after, rev, changes } => {
                out.put_u8(CHANGES);
                for number in [from.0, *after, *rev] {
                    out.put_u64_le(number);
                }
                for SessionChange { name, rev, info } in changes {
                    out.put_u64_le(*rev);
                    out.put_u32_le(name.len() as u32);
                    out.put_u32_le(info.as_ref().map_or(NO_INFO, |info| info.len() as u32));
                    out.put_slice(name.as_bytes());
                    out.put_slice(info.as_deref().unwrap_or_default());
                }
            }
        }
        out.freeze()
    }

    /// None for another version or an unknown kind: the session of the node has the same content.
    pub(super) fn decode(message: &Bytes) -> Option<Self> {
        let mut rest = message.clone();
        if rest.try_get_u8().ok()? != VERSION {
            return None;
        }
        let kind = rest.try_get_u8().ok()?;
        let from = NodeId(rest.try_get_u64_le().ok()?);
        match kind {
            HELLO => {
                let (joined, rev) = (rest.try_get_u64_le().ok()?, rest.try_get_u64_le().ok()?);
                Some(Announcement::Hello { from, joined, rev })
            }
            GOODBYE => Some(Announcement::Goodbye { from }),
            CHANGES => {
                let (after, rev) = (rest.try_get_u64_le().ok()?, rest.try_get_u64_le().ok()?);
                let mut changes = Vec::new();
                while rest.has_remaining() {
                    let rev = rest.try_get_u64_le().ok()?;
                    let (name, info) = (rest.try_get_u32_le().ok()?, rest.try_get_u32_le().ok()?);
                    let mut take = |length: u32| {
                        let length = length as usize;
                        (rest.remaining() >= length).then(|| rest.split_to(length))
                    };
                    let name = take(name)?;
                    let info = if info == NO_INFO { None } else { Some(take(info)?) };
                    changes.push(SessionChange { name: std::str::from_utf8(&name).ok()?.into(), rev, info });
                }
                Some(Announcement::Changes { from, after, rev, changes })
            }
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn announcements_are_decoded_as_they_were_encoded() {
        let change = |name: &str, info: Option<&'static str>| SessionChange {
            name: name.into(),
            rev: 7,
            info: info.map(Bytes::from),
        };
        let changes = Announcement::Changes {
            from: NodeId(1),
            after: 5,
            rev: 7,
            changes: vec![change("a", Some("{}")), change("b", None), change("", Some(""))],
        };
        let bytes = changes.encode();
        let Some(Announcement::Changes { from, after: 5, rev: 7, changes }) = Announcement::decode(&bytes) else {
            panic!("it is decoded")
        };
        let decoded: Vec<_> =
            changes.iter().map(|change| (&*change.name, change.rev, change.info.as_deref())).collect();
        assert_eq!(decoded, [("a", 7, Some(&b"{}"[..])), ("b", 7, None), ("", 7, Some(&b""[..]))]);
        assert_eq!(from, NodeId(1));
        for end in 0..bytes.len() {
            // Nothing panics; a list cut between two changes is a shorter list.
            let _ = Announcement::decode(&bytes.slice(..end));
        }
        let mut later = bytes.to_vec();
        later[0] = 9;
        assert!(Announcement::decode(&later.into()).is_none());
    }
}
