//! Who is waited for: [`CallId`] towards providers, [`CallerId`] towards callers, and what a connection has asked.
//!
//! A call is known in two places. Its *entry* is in the service and dies with the reply, the deadline, or the provider.
//! Its [`Live`] is in the caller's connection. **Whoever takes the `Live` owns the answer**: that is why a call has
//! exactly one, whatever happens at the same moment.

use std::{
    fmt,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering::SeqCst},
    },
};

use parking_lot::Mutex;
use slab::Slab;

use super::{Peer, services::Service};
use crate::cluster::NodeId;

/// The id under which a provider knows a call; `w:` and 1 to 13 digits of base 32 on the wire. A string, since clients
/// that keep one table of ids for both directions would reject their own calls if it met a number of theirs.
///
/// The lowest bits say where the call is (which service of that connection, which entry), the rest is a number that does
/// not come again: a reply that is too late finds another number there.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct CallId(u64);

/// [`CallId`] as text, without an allocation.
#[derive(Clone, Copy)]
pub struct CallIdText {
    text: [u8; CallId::LONGEST],
    start: u8,
}

/// The caller's own id, as the raw bytes that it wrote, and whatever else its transport needs to answer.
/// Up to 39 bytes (a UUID in its quotes) are kept in place.
#[derive(Clone, PartialEq, Eq)]
pub struct CallerId {
    /// The transport's own note, such as the batch that the answer goes into. The hub ignores it.
    pub note: u32,
    id: Id,
}

#[derive(Clone, PartialEq, Eq)]
enum Id {
    Short { len: u8, bytes: [u8; CallerId::SHORT] },
    Long(Box<[u8]>),
}

/// One connection as the hub sees it.
pub(super) struct Conn {
    pub peer: Arc<dyn Peer>,
    /// Calls that it may have in flight.
    pub calls: usize,
    /// What it asked and was not answered. Locked before a service, never after.
    pub live: Mutex<Slab<Live>>,
    /// The node, if it is a link to one.
    pub node: Option<NodeId>,
    /// What it provides; the index is the slot in a [`CallId`], but not of links. Locked before a service, never after.
    pub provides: Mutex<Slab<Registration>>,
    /// How many entries of [`Late`](super::late::Late) name it.
    pub late: AtomicUsize,
    pub closed: AtomicBool,
}

pub(super) struct Live {
    pub tag: CallerId,
    pub service: Arc<Service>,
    /// Where the entry is, unless `seq` is no longer there.
    pub index: u32,
    pub seq: u64,
    /// Microseconds of the hub's clock.
    pub started: u64,
    pub late: bool,
}

pub(super) struct Registration {
    pub service: Arc<Service>,
    /// Key among the service's providers.
    pub provider: u32,
}

// === impl CallId ===

impl CallId {
    const LONGEST: usize = 15;
    const DIGITS: &'static [u8; 32] = b"0123456789abcdefghijklmnopqrstuv";

    pub(super) const SLOTS: usize = 1 << 10;
    /// Calls in flight of one service.
    pub(super) const ENTRIES: usize = 1 << 20;
    const SEQ: u64 = (1 << 34) - 1;

    pub(super) fn new(seq: u64, index: u32, slot: u16) -> Self {
        debug_assert!((index as usize) < Self::ENTRIES && (slot as usize) < Self::SLOTS);
        CallId((seq & Self::SEQ) << 30 | u64::from(index) << 10 | u64::from(slot))
    }

    /// The whole of it, for other nodes.
    pub(super) fn number(self) -> u64 {
        self.0
    }

    pub(super) fn from_number(number: u64) -> Self {
        CallId(number)
    }

    pub(super) fn slot(self) -> usize {
        (self.0 & (Self::SLOTS as u64 - 1)) as usize
    }

    pub(super) fn index(self) -> u32 {
        (self.0 >> 10) as u32 & (Self::ENTRIES as u32 - 1)
    }

    pub(super) fn is(self, seq: u64) -> bool {
        self.0 >> 30 == seq & Self::SEQ
    }

    /// Reads what a provider answered to, without quotes.
    pub fn parse(text: &str) -> Option<Self> {
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

    pub fn text(self) -> CallIdText {
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
    /// ASCII, and nothing that JSON would escape.
    pub fn as_bytes(&self) -> &[u8] {
        &self.text[usize::from(self.start)..]
    }

    pub fn as_str(&self) -> &str {
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

    /// `id` as the caller wrote it: `7`, `"a1"` with its quotes, `null`.
    pub fn new(id: &[u8]) -> Self {
        let id = if id.len() <= Self::SHORT {
            let mut bytes = [0; Self::SHORT];
            bytes[..id.len()].copy_from_slice(id);
            Id::Short { len: id.len() as u8, bytes }
        } else {
            Id::Long(id.into())
        };
        CallerId { note: 0, id }
    }

    pub fn with_note(mut self, note: u32) -> Self {
        self.note = note;
        self
    }

    pub fn id(&self) -> &[u8] {
        match &self.id {
            Id::Short { len, bytes } => &bytes[..usize::from(*len)],
            Id::Long(bytes) => bytes,
        }
    }
}

impl fmt::Debug for CallerId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "CallerId({}, {})", String::from_utf8_lossy(self.id()), self.note)
    }
}

// === impl Conn ===

impl Conn {
    /// Room that a burst of calls leaves behind in an idle connection, in calls.
    const KEEP: usize = 64;

    pub fn new(peer: Arc<dyn Peer>, calls: usize, node: Option<NodeId>) -> Self {
        Conn {
            peer,
            calls,
            node,
            live: Mutex::default(),
            provides: Mutex::default(),
            late: AtomicUsize::new(0),
            closed: AtomicBool::new(false),
        }
    }

    /// Takes the right to answer, unless somebody else has it.
    pub fn take(&self, live: u32, seq: u64) -> Option<Live> {
        let mut table = self.live.lock();
        if table.get(live as usize).is_none_or(|call| call.seq != seq) {
            return None;
        }
        let call = table.remove(live as usize);
        if table.is_empty() && table.capacity() > Self::KEEP {
            *table = Slab::new();
        }
        Some(call)
    }

    /// Whether it is another node, whose calls are counted there.
    pub fn is_link(&self) -> bool {
        self.node.is_some()
    }

    pub fn is_closed(&self) -> bool {
        self.closed.load(SeqCst)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn ids_of_calls() {
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
        fn an_id_is_read_back(seq: u64, index in 0..CallId::ENTRIES as u32, slot in 0..CallId::SLOTS as u16) {
            let id = CallId::new(seq, index, slot);
            prop_assert_eq!(CallId::parse(&id.to_string()), Some(id));
            prop_assert_eq!((id.index(), id.slot()), (index, slot as usize));
            prop_assert!(id.is(seq));
            prop_assert!(!id.is(seq.wrapping_add(1)));
        }

        #[test]
        fn tags_keep_every_byte(id: Vec<u8>, note: u32) {
            let tag = CallerId::new(&id).with_note(note);
            prop_assert_eq!((tag.id(), tag.note), (&id[..], note));
        }
    }
}
