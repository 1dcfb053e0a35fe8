//! Where a reader is: [`Epoch`], [`Position`] in one channel, [`Token`] for many, and [`Start`].

use std::{fmt, str::FromStr};

use base64::{Engine, engine::general_purpose::URL_SAFE_NO_PAD as BASE64};

use crate::{
    error::{Code, Error, Result},
    event::Channel,
};

const ALPHABET: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_";
const TOKEN_VERSION: u8 = 1;
/// Longest token, in characters.
pub const MAX_TOKEN: usize = 2048;

/// Which life or term of a channel's log: 36 random bits, six characters of base64url.
///
/// The first character is never `w`, so that a position is never mistaken for a token.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Epoch(u64);

/// A place in one channel, written `k3Vq00-42`: everything up to and including `offset` has been seen.
///
/// In a channel without a log the epoch is [`Epoch::ABSENT`] and the offset is the bus's clock in Unix seconds:
/// `0-1763640000` means *there was nothing then*.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Position {
    pub epoch: Epoch,
    pub offset: u64,
}

/// Where a reader begins in one channel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Start {
    After(Position),
    /// After this offset, whatever the epoch: for humans.
    AfterOffset(u64),
    Earliest,
    Now,
    /// So many events before the head.
    Last(u64),
}

/// What a client gave as `after`, before it is known which channels it is about.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum After {
    Position(Position),
    Offset(u64),
    Earliest,
    Now,
    Token(Token),
}

/// The positions of all channels of one reader, as sent: names are not inside, only a hash of them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Token {
    names: u32,
    positions: Vec<Position>,
}

/// The channels of a reader, made ready for many tokens.
#[derive(Clone, Debug)]
pub struct Names {
    hash: u32,
    /// Indices of the channels in byte order of their names.
    order: Box<[usize]>,
}

// === impl Epoch ===

impl Epoch {
    /// The epoch of a channel that has no log.
    pub const ABSENT: Epoch = Epoch(0);

    /// A new life.
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

    /// Six characters; `"0"` for [`ABSENT`](Self::ABSENT).
    pub fn text(self) -> EpochText {
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
pub struct EpochText {
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

/// Not an epoch, position or token.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("not a position: write EPOCH-OFFSET as an event shows them, a token, an offset, earliest or now")]
pub struct Malformed;

impl FromStr for Epoch {
    type Err = Malformed;

    fn from_str(text: &str) -> Result<Self, Malformed> {
        if text == "0" {
            return Ok(Self::ABSENT);
        }
        if text.len() != 6 || text.starts_with('w') {
            return Err(Malformed);
        }
        let mut bits = 0;
        for byte in text.bytes() {
            let value = ALPHABET.iter().position(|letter| *letter == byte).ok_or(Malformed)?;
            bits = bits << 6 | value as u64;
        }
        if bits == 0 { Err(Malformed) } else { Ok(Epoch(bits)) }
    }
}

// === impl Position ===

impl Position {
    /// Of a channel without a log, at the bus's clock in Unix seconds.
    pub fn absent(seconds: u64) -> Self {
        Position { epoch: Epoch::ABSENT, offset: seconds }
    }

    /// Appends the text of it.
    pub fn write(self, out: &mut Vec<u8>) {
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
    type Err = Malformed;

    fn from_str(text: &str) -> Result<Self, Malformed> {
        // The epoch may itself contain a hyphen.
        let (epoch, offset) = text.rsplit_once('-').ok_or(Malformed)?;
        Ok(Position { epoch: epoch.parse()?, offset: parse_offset(offset)? })
    }
}

impl serde::Serialize for Position {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

/// Digits only: `u64::from_str` would also take a sign.
fn parse_offset(text: &str) -> Result<u64, Malformed> {
    if text.is_empty() || !text.bytes().all(|byte| byte.is_ascii_digit()) {
        return Err(Malformed);
    }
    text.parse().map_err(|_| Malformed)
}

// === impl After ===

impl FromStr for After {
    type Err = Malformed;

    fn from_str(text: &str) -> Result<Self, Malformed> {
        match text {
            "earliest" => Ok(After::Earliest),
            "now" => Ok(After::Now),
            _ if text.starts_with('w') => Token::decode(text).map(After::Token),
            _ if text.contains('-') => text.parse().map(After::Position),
            _ => parse_offset(text).map(After::Offset),
        }
    }
}

impl After {
    /// Where each of `channels` starts, in their order.
    ///
    /// Fails with `invalid_position` if a token was made for another list of channels, or if one position is given
    /// for several channels. (SSE turns the failure into a gap `bad_position`: a status would end an EventSource.)
    pub fn starts(&self, channels: &[Channel]) -> Result<Vec<Start>> {
        let all = |start| Ok(vec![start; channels.len()]);
        let one = |start| match channels {
            [_] => Ok(vec![start]),
            _ => Err(Error::new(
                Code::InvalidPosition,
                "a position is of one channel; for several give the token that the last answer called next",
            )),
        };
        match self {
            After::Earliest => all(Start::Earliest),
            After::Now => all(Start::Now),
            After::Position(position) => one(Start::After(*position)),
            After::Offset(offset) => one(Start::AfterOffset(*offset)),
            After::Token(token) => token
                .starts(channels)
                .ok_or_else(|| Error::new(Code::InvalidPosition, "this token belongs to another list of channels")),
        }
    }
}

// === impl Token ===

impl Token {
    /// The resume token of a reader of `channels` at `positions`: the position itself if there is one channel.
    pub fn encode(channels: &[Channel], positions: &[Position]) -> String {
        debug_assert_eq!(channels.len(), positions.len());
        if let [position] = positions {
            return position.to_string();
        }
        Names::new(channels).token(|at| positions[at])
    }

    fn decode(text: &str) -> Result<Self, Malformed> {
        if text.len() > MAX_TOKEN {
            return Err(Malformed);
        }
        let bytes = BASE64.decode(text.strip_prefix('w').ok_or(Malformed)?).map_err(|_| Malformed)?;
        let mut rest = bytes.strip_prefix(&[TOKEN_VERSION]).ok_or(Malformed)?;
        let channels = take_varint(&mut rest)?;
        let names = take(&mut rest, 4)?;
        let names = u32::from_le_bytes(names.try_into().map_err(|_| Malformed)?);
        let distinct = take_varint(&mut rest)?;
        // Each takes at least a byte: what follows allocates no more than was sent.
        if channels > rest.len() as u64 || distinct > rest.len() as u64 || distinct == 0 {
            return Err(Malformed);
        }
        let mut epochs = Vec::with_capacity(distinct as usize);
        for _ in 0..distinct {
            let mut bits = [0; 8];
            bits[..5].copy_from_slice(take(&mut rest, 5)?);
            epochs.push(Epoch(u64::from_le_bytes(bits)));
        }
        let mut positions = Vec::with_capacity(channels as usize);
        for _ in 0..channels {
            let index = if distinct > 1 { take_varint(&mut rest)? } else { 0 };
            let epoch = *epochs.get(index as usize).ok_or(Malformed)?;
            positions.push(Position { epoch, offset: take_varint(&mut rest)? });
        }
        if rest.is_empty() { Ok(Token { names, positions }) } else { Err(Malformed) }
    }

    fn starts(&self, channels: &[Channel]) -> Option<Vec<Start>> {
        let order = order(channels);
        if self.positions.len() != channels.len() || self.names != hash(channels, &order) {
            return None;
        }
        let mut starts = vec![Start::Earliest; channels.len()];
        for (position, at) in self.positions.iter().zip(order) {
            starts[at] = Start::After(*position);
        }
        Some(starts)
    }
}

// === impl Names ===

impl Names {
    pub fn new(channels: &[Channel]) -> Self {
        let order = order(channels);
        Names { hash: hash(channels, &order), order: order.into() }
    }

    /// The token of these channels, each at the position that `at` says for its index.
    pub fn token(&self, at: impl Fn(usize) -> Position) -> String {
        let mut epochs: Vec<Epoch> = self.order.iter().map(|index| at(*index).epoch).collect();
        epochs.sort_unstable();
        epochs.dedup();
        let mut out = Vec::with_capacity(16 + epochs.len() * 5 + self.order.len() * 6);
        out.push(TOKEN_VERSION);
        put_varint(&mut out, self.order.len() as u64);
        out.extend_from_slice(&self.hash.to_le_bytes());
        put_varint(&mut out, epochs.len() as u64);
        for epoch in &epochs {
            out.extend_from_slice(&epoch.0.to_le_bytes()[..5]);
        }
        for index in &self.order {
            let position = at(*index);
            if epochs.len() > 1 {
                // Present, for the lines above collected it.
                put_varint(&mut out, epochs.partition_point(|epoch| *epoch < position.epoch) as u64);
            }
            put_varint(&mut out, position.offset);
        }
        let mut text = String::with_capacity(1 + out.len().div_ceil(3) * 4);
        text.push('w');
        BASE64.encode_string(out, &mut text);
        text
    }
}

/// Indices of `channels` in byte order of their names.
fn order(channels: &[Channel]) -> Vec<usize> {
    let mut order: Vec<usize> = (0..channels.len()).collect();
    order.sort_unstable_by_key(|at| &channels[*at]);
    order
}

/// FNV-1a over the names, each ended by a NUL (no name contains one). Stable for ever: tokens outlive a build.
fn hash(channels: &[Channel], order: &[usize]) -> u32 {
    order
        .iter()
        .flat_map(|at| channels[*at].as_str().bytes().chain([0]))
        .fold(0x811c_9dc5, |hash, byte| (hash ^ u32::from(byte)).wrapping_mul(0x0100_0193))
}

/// LEB128, little end first.
fn put_varint(out: &mut Vec<u8>, mut value: u64) {
    while value >= 0x80 {
        out.push(value as u8 | 0x80);
        value >>= 7;
    }
    out.push(value as u8);
}

fn take_varint(from: &mut &[u8]) -> Result<u64, Malformed> {
    let mut value = 0u64;
    for shift in (0..64).step_by(7) {
        let byte = take(from, 1)?[0];
        let bits = u64::from(byte & 0x7f);
        if shift == 63 && bits > 1 {
            return Err(Malformed);
        }
        value |= bits << shift;
        if byte < 0x80 {
            return Ok(value);
        }
    }
    Err(Malformed)
}

fn take<'a>(from: &mut &'a [u8], n: usize) -> Result<&'a [u8], Malformed> {
    let (head, tail) = from.split_at_checked(n).ok_or(Malformed)?;
    *from = tail;
    Ok(head)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn channels(n: usize) -> Vec<Channel> {
        (0..n).map(|i| Channel::parse(&format!("c{}", (i * 7919) % 1000)).unwrap()).collect()
    }

    #[test]
    fn what_a_position_looks_like() {
        let position: Position = "k3Vq00-42".parse().unwrap();
        assert_eq!(position.offset, 42);
        assert_eq!(position.to_string(), "k3Vq00-42");
        assert_eq!("0-1763640000".parse::<Position>().unwrap(), Position::absent(1763640000));
        for bad in ["", "-", "k3Vq00", "k3Vq00-", "k3Vq00-+1", "k3Vq-42", "w3Vq00-42", "AAAAAA-1", "k3Vq0!-1", "0-x"] {
            assert!(bad.parse::<Position>().is_err(), "{bad}");
        }
        assert_eq!("42".parse(), Ok(After::Offset(42)));
        assert_eq!("now".parse(), Ok(After::Now));
    }

    #[test]
    fn a_token_belongs_to_its_channels_in_any_order() {
        let (a, b) = (Channel::parse("a").unwrap(), Channel::parse("b").unwrap());
        let (at_a, at_b) = ("k3Vq00-1".parse().unwrap(), "0-9".parse().unwrap());
        let token: After = Token::encode(&[a.clone(), b.clone()], &[at_a, at_b]).parse().unwrap();
        assert_eq!(token.starts(&[b.clone(), a.clone()]).unwrap(), [Start::After(at_b), Start::After(at_a)]);
        assert_eq!(token.starts(&[a]).unwrap_err().code(), Code::InvalidPosition);
        assert!(After::Position(at_a).starts(&[b.clone(), b]).is_err());
    }

    #[test]
    fn sizes_of_tokens() {
        let epoch = Epoch::random();
        for (n, longest) in [(10, 90), (100, 810)] {
            let positions = vec![Position { epoch, offset: 1_000_000 }; n];
            let same = Token::encode(&channels(n), &positions).len();
            let distinct: Vec<_> = positions.iter().map(|at| Position { epoch: Epoch::random(), ..*at }).collect();
            let worst = Token::encode(&channels(n), &distinct).len();
            assert!(same <= longest, "{n} channels of one epoch: {same}");
            assert!(worst <= MAX_TOKEN, "{n} channels of {n} epochs: {worst}");
        }
    }

    proptest! {
        #[test]
        fn tokens_round_trip(offsets in prop::collection::vec((any::<u64>(), 0..4usize), 2..100)) {
            let epochs = [Epoch::ABSENT, Epoch::random(), Epoch::random(), Epoch::random()];
            let channels = channels(offsets.len());
            let positions: Vec<_> =
                offsets.iter().map(|(offset, epoch)| Position { epoch: epochs[*epoch], offset: *offset }).collect();
            let after: After = Token::encode(&channels, &positions).parse().unwrap();
            let starts: Vec<_> = positions.into_iter().map(Start::After).collect();
            prop_assert_eq!(after.starts(&channels).unwrap(), starts);
        }

        #[test]
        fn any_text_is_read_or_refused(text in "w?[A-Za-z0-9_-]{0,60}") {
            let _ = text.parse::<After>();
        }

        #[test]
        fn epochs_round_trip(_ in 0..100u8) {
            let epoch = Epoch::random();
            prop_assert_eq!(epoch.to_string().parse(), Ok(epoch));
        }
    }
}
