//! The two ids of a call: [`CallId`] towards the provider, [`CallerId`] towards the caller.

use std::fmt;

/// The id under which a provider knows a call; `w:` and 1 to 13 digits of base 32 on the wire. It is a string because
/// clients that keep one table of ids for both directions would confuse a number with one of their own.
///
/// The lowest bits locate the call (the slot of the service in the provider's connection, the index of the entry in the
/// service), the rest is a sequence number: a late reply finds another number there and matches nothing.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct CallId(u64);

/// [`CallId`] as text, without an allocation.
#[derive(Clone, Copy)]
pub(crate) struct CallIdText {
    text: [u8; CallId::LONGEST],
    start: u8,
}

/// The caller's own id of a call, as the raw bytes that it sent, and a note of its transport. Up to 39 bytes (a quoted
/// UUID) are stored inline.
#[derive(Clone, PartialEq, Eq)]
pub struct CallerId {
    /// For the transport, such as the batch that the answer belongs to. The hub ignores it.
    pub(crate) note: u32,
    id: CallerIdBytes,
}

#[derive(Clone, PartialEq, Eq)]
enum CallerIdBytes {
    Short { len: u8, bytes: [u8; CallerId::SHORT] },
    Long(Box<[u8]>),
}

// === impl CallId ===

impl CallId {
    const LONGEST: usize = 15;
    const DIGITS: &'static [u8; 32] = b"0123456789abcdefghijklmnopqrstuv";

    /// Services that one connection provides, at most.
    pub(super) const SLOTS: usize = 1 << 10;
    /// Calls of one service, at most.
    pub(super) const ENTRIES: usize = 1 << 20;
    const SEQ: u64 = (1 << 34) - 1;

    pub(super) fn new(seq: u64, index: u32, slot: u16) -> Self {
        debug_assert!((index as usize) < Self::ENTRIES && (slot as usize) < Self::SLOTS);
        CallId((seq & Self::SEQ) << 30 | u64::from(index) << 10 | u64::from(slot))
    }

    /// For messages between nodes.
    pub(super) fn to_u64(self) -> u64 {
        self.0
    }

    pub(super) fn from_u64(number: u64) -> Self {
        CallId(number)
    }

    pub(super) fn slot(self) -> usize {
        (self.0 & (Self::SLOTS as u64 - 1)) as usize
    }

    pub(super) fn index(self) -> u32 {
        (self.0 >> 10) as u32 & (Self::ENTRIES as u32 - 1)
    }

    pub(super) fn has_seq(self, seq: u64) -> bool {
        self.0 >> 30 == seq & Self::SEQ
    }

    /// Reads the id of a reply, without its quotes.
    pub(crate) fn parse(text: &str) -> Option<Self> {
        let digits = text.strip_prefix("w:")?.as_bytes();
        if digits.is_empty() || digits.len() > Self::LONGEST - 2 {
            return None;
        }
        let mut id: u64 = 0;
        for digit in digits {
            let value = match digit {
                b'0'..=b'9' => digit - b'0',
                b'a'..=b'v' => digit - b'a' + 10,
                _ => return None,
            };
            if id >> 59 != 0 {
                return None;
            }
            id = id << 5 | u64::from(value);
        }
        Some(CallId(id))
    }

    pub(crate) fn text(self) -> CallIdText {
        let mut text = [0; Self::LONGEST];
        let (mut start, mut rest) = (Self::LONGEST, self.0);
        loop {
            start -= 1;
            text[start] = Self::DIGITS[(rest & 31) as usize];
            rest >>= 5;
            if rest == 0 {
                break;
            }
        }
        text[start - 2..start].copy_from_slice(b"w:");
        CallIdText { text, start: start as u8 - 2 }
    }
}

impl CallIdText {
    /// ASCII that JSON does not escape.
    pub(crate) fn as_bytes(&self) -> &[u8] {
        &self.text[usize::from(self.start)..]
    }

    pub(crate) fn as_str(&self) -> &str {
        str::from_utf8(self.as_bytes()).unwrap_or_default()
    }
}

impl fmt::Display for CallId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.text().as_str())
    }
}

impl fmt::Debug for CallId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

// === impl CallerId ===

impl CallerId {
    const SHORT: usize = 39;
    /// Longest id of a caller that transports accept, in bytes as sent. An id is kept as long as its call, and for five
    /// minutes more if the call accepts a late reply.
    pub(crate) const MAX: usize = 256;

    /// `id` as the caller sent it: `7`, `"a1"` with its quotes, `null`.
    pub fn new(id: &[u8]) -> Self {
        let id = if id.len() <= Self::SHORT {
            let mut bytes = [0; Self::SHORT];
            bytes[..id.len()].copy_from_slice(id);
            CallerIdBytes::Short { len: id.len() as u8, bytes }
        } else {
            CallerIdBytes::Long(id.into())
        };
        CallerId { note: 0, id }
    }

    pub(crate) fn with_note(mut self, note: u32) -> Self {
        self.note = note;
        self
    }

    pub fn id(&self) -> &[u8] {
        match &self.id {
            CallerIdBytes::Short { len, bytes } => &bytes[..usize::from(*len)],
            CallerIdBytes::Long(bytes) => bytes,
        }
    }
}

impl fmt::Debug for CallerId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "CallerId({}, {})", String::from_utf8_lossy(self.id()), self.note)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn text_of_call_ids() {
        assert_eq!(CallId::new(0, 0, 0).to_string(), "w:0");
        assert_eq!(CallId(42).to_string(), "w:1a");
        assert_eq!(CallId::parse("w:1a"), Some(CallId(42)));
        assert_eq!(CallId(u64::MAX).to_string().len(), CallId::LONGEST);
        for bad in
            ["", "w:", "1a", "w:1A", "w:w", "w: 1", "w:gvvvvvvvvvvvv", "w:00000000000000", "W:1a", "w:1a\"", "w:é"]
        {
            assert_eq!(CallId::parse(bad), None, "{bad}");
        }
    }

    proptest! {
        #[test]
        fn an_id_survives_a_round_trip(seq: u64, index in 0..CallId::ENTRIES as u32, slot in 0..CallId::SLOTS as u16) {
            let id = CallId::new(seq, index, slot);
            prop_assert_eq!(CallId::parse(&id.to_string()), Some(id));
            prop_assert_eq!((id.index(), id.slot()), (index, slot as usize));
            prop_assert!(id.has_seq(seq));
            prop_assert!(!id.has_seq(seq.wrapping_add(1)));
        }

        #[test]
        fn caller_ids_keep_every_byte(id: Vec<u8>, note: u32) {
            let caller_id = CallerId::new(&id).with_note(note);
            prop_assert_eq!((caller_id.id(), caller_id.note), (&id[..], note));
        }
    }
}
