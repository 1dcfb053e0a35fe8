//! The kinds and priorities of messages between nodes.

/// Selects the inbox at the receiving node. The numbers are part of the wire format.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum MessageKind {
    Calls = 1,
    Connections = 2,
    Presence = 3,
}

/// At which length of a peer's send queue a message is rejected.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Priority {
    /// Rejected early: the sender has an alternative.
    Normal,
    /// Rejected only at the hard limit.
    High,
}

/// The immediate result of sending a message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SendOutcome {
    Queued,
    /// The send queue of that node is full.
    Full,
    /// The node is not a member, or cannot be reached.
    NoSuchNode,
}

impl MessageKind {
    pub(crate) const ALL: [MessageKind; 3] = [MessageKind::Calls, MessageKind::Connections, MessageKind::Presence];

    pub(crate) fn from_byte(byte: u8) -> Option<Self> {
        Self::ALL.into_iter().find(|kind| *kind as u8 == byte)
    }

    /// The position in [`ALL`](Self::ALL).
    pub(crate) fn index(self) -> usize {
        self as usize - 1
    }
}
