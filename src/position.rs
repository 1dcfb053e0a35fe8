//! [`Position`], a place in one channel's log, [`Epoch`], the life or term it belongs to, and [`Start`], where to begin.

use std::{fmt, str::FromStr};

const ALPHABET: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_";

/// Identifies a life or term of a channel's log: 36 random bits, written as six characters of base64url.
///
/// The first character is never `w`, so that a position is never mistaken for a token.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Epoch(u64);

/// A position in one channel, written `k3Vq00-42`: everything up to and including `offset` has been read.
///
/// In a channel without a log the epoch is [`Epoch::ABSENT`] and the offset is the bus's clock in Unix seconds:
/// `0-1763640000` means *the channel had no log then*.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Position {
    pub epoch: Epoch,
    pub offset: u64,
}

/// Where a reader begins in one channel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Start {
    After(Position),
    /// After this offset in any epoch, for use by hand.
    AfterOffset(u64),
    Earliest,
    Now,
    /// This many events before the head.
    Last(u64),
}

// === impl Epoch ===

impl Epoch {
    /// The epoch of a channel that has no log.
    pub(crate) const ABSENT: Epoch = Epoch(0);

    /// The epoch of a new life or term.
    pub fn random() -> Self {
        loop {
            let epoch = Epoch(fastrand::u64(1..1 << 36));
            if epoch.text()[0] != b'w' {
                return epoch;
            }
        }
    }

    pub fn is_absent(self) -> bool {
        self == Self::ABSENT
    }

    /// The 36 bits in a resume token.
    pub(crate) fn bits(self) -> u64 {
        self.0
    }

    pub(crate) fn from_bits(bits: u64) -> Self {
        Epoch(bits)
    }

    /// Six characters; `"0"` for [`ABSENT`](Self::ABSENT).
    pub(crate) fn text(self) -> EpochText {
        let mut text = EpochText { bytes: *b"0AAAAA", len: 1 };
        if !self.is_absent() {
            for (i, byte) in text.bytes.iter_mut().enumerate() {
                *byte = ALPHABET[(self.0 >> (30 - 6 * i)) as usize & 63];
            }
            text.len = 6;
        }
        text
    }
}

/// The characters of an [`Epoch`], without an allocation.
#[derive(Clone, Copy)]
pub(crate) struct EpochText {
    bytes: [u8; 6],
    len: u8,
}

impl std::ops::Deref for EpochText {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.bytes[..self.len as usize]
    }
}

impl fmt::Display for Epoch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.text().iter().try_for_each(|byte| fmt::Write::write_char(f, *byte as char))
    }
}

impl fmt::Debug for Epoch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// The text is not an epoch, position or token.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("not a position: write EPOCH-OFFSET as an event shows them, a token, an offset, earliest or now")]
pub struct MalformedPosition;

impl FromStr for Epoch {
    type Err = MalformedPosition;

    fn from_str(text: &str) -> Result<Self, MalformedPosition> {
        if text == "0" {
            return Ok(Self::ABSENT);
        }
        if text.len() != 6 || text.starts_with('w') {
            return Err(MalformedPosition);
        }
        let mut bits = 0;
        for byte in text.bytes() {
            let value = ALPHABET.iter().position(|letter| *letter == byte).ok_or(MalformedPosition)?;
            bits = bits << 6 | value as u64;
        }
        if bits == 0 { Err(MalformedPosition) } else { Ok(Epoch(bits)) }
    }
}

// === impl Position ===

impl Position {
    /// Position in a channel without a log, at a time in Unix seconds.
    pub fn absent(seconds: u64) -> Self {
        Position { epoch: Epoch::ABSENT, offset: seconds }
    }

    /// Appends its text.
    pub(crate) fn write(self, out: &mut Vec<u8>) {
        out.extend_from_slice(&self.epoch.text());
        out.push(b'-');
        out.extend_from_slice(itoa::Buffer::new().format(self.offset).as_bytes());
    }
}

impl fmt::Display for Position {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}-{}", self.epoch, self.offset)
    }
}

impl fmt::Debug for Position {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl FromStr for Position {
    type Err = MalformedPosition;

    fn from_str(text: &str) -> Result<Self, MalformedPosition> {
        // The epoch may itself contain a hyphen.
        let (epoch, offset) = text.rsplit_once('-').ok_or(MalformedPosition)?;
        Ok(Position { epoch: epoch.parse()?, offset: parse_offset(offset)? })
    }
}

impl serde::Serialize for Position {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

/// Digits only: `u64::from_str` would also take a sign.
pub(crate) fn parse_offset(text: &str) -> Result<u64, MalformedPosition> {
    if text.is_empty() || !text.bytes().all(|byte| byte.is_ascii_digit()) {
        return Err(MalformedPosition);
    }
    text.parse().map_err(|_| MalformedPosition)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn positions_are_parsed_and_written() {
        let position: Position = "k3Vq00-42".parse().unwrap();
        assert_eq!(position.offset, 42);
        assert_eq!(position.to_string(), "k3Vq00-42");
        assert_eq!("0-1763640000".parse::<Position>().unwrap(), Position::absent(1763640000));
        for bad in ["", "-", "k3Vq00", "k3Vq00-", "k3Vq00-+1", "k3Vq-42", "w3Vq00-42", "AAAAAA-1", "k3Vq0!-1", "0-x"] {
            assert!(bad.parse::<Position>().is_err(), "{bad}");
        }
    }

    #[test]
    fn epochs_round_trip() {
        for _ in 0..256 {
            let epoch = Epoch::random();
            assert_eq!(epoch.to_string().parse(), Ok(epoch));
        }
    }
}
