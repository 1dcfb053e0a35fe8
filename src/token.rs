//! [`ResumeToken`], the positions of several channels in one text, and [`AfterParam`], where a client asks to begin.

use std::str::FromStr;

use base64::{Engine, engine::general_purpose::URL_SAFE_NO_PAD as BASE64};

use crate::{
    channel::Channel,
    error::{Code, Error, Result},
    position::{Epoch, MalformedPosition, Position, Start, parse_offset},
};

const TOKEN_VERSION: u8 = 1;
/// Longest token, in characters.
pub(crate) const MAX_TOKEN: usize = 2048;

/// The parameter `after` of a request, before its channels are known.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum AfterParam {
    Position(Position),
    Offset(u64),
    Earliest,
    Now,
    Token(ResumeToken),
}

/// The positions of all channels of one reader. A token does not contain the channels' names, only a hash of them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ResumeToken {
    names: u32,
    positions: Vec<Position>,
}

/// Encodes tokens for the channels of one reader.
#[derive(Clone, Debug)]
pub(crate) struct TokenEncoder {
    hash: u32,
    /// Indices of the channels in byte order of their names.
    order: Box<[usize]>,
}

// === impl After ===

impl FromStr for AfterParam {
    type Err = MalformedPosition;

    fn from_str(text: &str) -> Result<Self, MalformedPosition> {
        match text {
            "earliest" => Ok(AfterParam::Earliest),
            "now" => Ok(AfterParam::Now),
            _ if text.starts_with('w') => ResumeToken::decode(text).map(AfterParam::Token),
            _ if text.contains('-') => text.parse().map(AfterParam::Position),
            _ => parse_offset(text).map(AfterParam::Offset),
        }
    }
}

impl AfterParam {
    /// The start of each of `channels`, in their order.
    ///
    /// # Errors
    /// `invalid_position` if a token was made for another list of channels, or if one position is given for several
    /// channels. (SSE turns the error into a gap `bad_position`, because an error status would end an EventSource.)
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
            AfterParam::Earliest => all(Start::Earliest),
            AfterParam::Now => all(Start::Now),
            AfterParam::Position(position) => one(Start::After(*position)),
            AfterParam::Offset(offset) => one(Start::AfterOffset(*offset)),
            AfterParam::Token(token) => token
                .starts(channels)
                .ok_or_else(|| Error::new(Code::InvalidPosition, "this token belongs to another list of channels")),
        }
    }
}

// === impl Token ===

impl ResumeToken {
    /// The resume token of a reader of `channels` at `positions`: the position itself if there is one channel.
    pub fn encode(channels: &[Channel], positions: &[Position]) -> String {
        debug_assert_eq!(channels.len(), positions.len());
        if let [position] = positions {
            return position.to_string();
        }
        TokenEncoder::new(channels).token(|at| positions[at])
    }

    fn decode(text: &str) -> Result<Self, MalformedPosition> {
        if text.len() > MAX_TOKEN {
            return Err(MalformedPosition);
        }
        let bytes = BASE64.decode(text.strip_prefix('w').ok_or(MalformedPosition)?).map_err(|_| MalformedPosition)?;
        let mut rest = bytes.strip_prefix(&[TOKEN_VERSION]).ok_or(MalformedPosition)?;
        let channels = take_varint(&mut rest)?;
        let names = take(&mut rest, 4)?;
        let names = u32::from_le_bytes(names.try_into().map_err(|_| MalformedPosition)?);
        let distinct = take_varint(&mut rest)?;
        // Each takes at least one byte, so the allocations below are no larger than the token.
        if channels > rest.len() as u64 || distinct > rest.len() as u64 || distinct == 0 {
            return Err(MalformedPosition);
        }
        let mut epochs = Vec::with_capacity(distinct as usize);
        for _ in 0..distinct {
            let mut bits = [0; 8];
            bits[..5].copy_from_slice(take(&mut rest, 5)?);
            epochs.push(Epoch::from_bits(u64::from_le_bytes(bits)));
        }
        let mut positions = Vec::with_capacity(channels as usize);
        for _ in 0..channels {
            let index = if distinct > 1 { take_varint(&mut rest)? } else { 0 };
            let epoch = *epochs.get(index as usize).ok_or(MalformedPosition)?;
            positions.push(Position { epoch, offset: take_varint(&mut rest)? });
        }
        if rest.is_empty() { Ok(ResumeToken { names, positions }) } else { Err(MalformedPosition) }
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

impl TokenEncoder {
    pub(crate) fn new(channels: &[Channel]) -> Self {
        let order = order(channels);
        TokenEncoder { hash: hash(channels, &order), order: order.into() }
    }

    /// The token of these channels, each at the position that `at` returns for its index.
    pub(crate) fn token(&self, at: impl Fn(usize) -> Position) -> String {
        let mut epochs: Vec<Epoch> = self.order.iter().map(|index| at(*index).epoch).collect();
        epochs.sort_unstable();
        epochs.dedup();
        let mut out = Vec::with_capacity(16 + epochs.len() * 5 + self.order.len() * 6);
        out.push(TOKEN_VERSION);
        put_varint(&mut out, self.order.len() as u64);
        out.extend_from_slice(&self.hash.to_le_bytes());
        put_varint(&mut out, epochs.len() as u64);
        for epoch in &epochs {
            out.extend_from_slice(&epoch.bits().to_le_bytes()[..5]);
        }
        for index in &self.order {
            let position = at(*index);
            if epochs.len() > 1 {
                // Always found: the loop above collected it.
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

/// FNV-1a over the names, each followed by a NUL, which no name contains. Must never change: tokens outlive a build.
fn hash(channels: &[Channel], order: &[usize]) -> u32 {
    order
        .iter()
        .flat_map(|at| channels[*at].as_str().bytes().chain([0]))
        .fold(0x811c_9dc5, |hash, byte| (hash ^ u32::from(byte)).wrapping_mul(0x0100_0193))
}

/// LEB128.
fn put_varint(out: &mut Vec<u8>, mut value: u64) {
    while value >= 0x80 {
        out.push(value as u8 | 0x80);
        value >>= 7;
    }
    out.push(value as u8);
}

fn take_varint(from: &mut &[u8]) -> Result<u64, MalformedPosition> {
    let mut value = 0u64;
    for shift in (0..64).step_by(7) {
        let byte = take(from, 1)?[0];
        let bits = u64::from(byte & 0x7f);
        if shift == 63 && bits > 1 {
            return Err(MalformedPosition);
        }
        value |= bits << shift;
        if byte < 0x80 {
            return Ok(value);
        }
    }
    Err(MalformedPosition)
}

fn take<'a>(from: &mut &'a [u8], n: usize) -> Result<&'a [u8], MalformedPosition> {
    let (head, tail) = from.split_at_checked(n).ok_or(MalformedPosition)?;
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
    fn offsets_and_keywords_are_parsed() {
        assert_eq!("42".parse(), Ok(AfterParam::Offset(42)));
        assert_eq!("now".parse(), Ok(AfterParam::Now));
    }

    #[test]
    fn a_token_belongs_to_its_channels_in_any_order() {
        let (a, b) = (Channel::parse("a").unwrap(), Channel::parse("b").unwrap());
        let (at_a, at_b) = ("k3Vq00-1".parse().unwrap(), "0-9".parse().unwrap());
        let token: AfterParam = ResumeToken::encode(&[a.clone(), b.clone()], &[at_a, at_b]).parse().unwrap();
        assert_eq!(token.starts(&[b.clone(), a.clone()]).unwrap(), [Start::After(at_b), Start::After(at_a)]);
        assert_eq!(token.starts(&[a]).unwrap_err().code(), Code::InvalidPosition);
        assert!(AfterParam::Position(at_a).starts(&[b.clone(), b]).is_err());
    }

    #[test]
    fn sizes_of_tokens() {
        let epoch = Epoch::random();
        for (n, longest) in [(10, 90), (100, 810)] {
            let positions = vec![Position { epoch, offset: 1_000_000 }; n];
            let same = ResumeToken::encode(&channels(n), &positions).len();
            let distinct: Vec<_> = positions.iter().map(|at| Position { epoch: Epoch::random(), ..*at }).collect();
            let worst = ResumeToken::encode(&channels(n), &distinct).len();
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
            let after: AfterParam = ResumeToken::encode(&channels, &positions).parse().unwrap();
            let starts: Vec<_> = positions.into_iter().map(Start::After).collect();
            prop_assert_eq!(after.starts(&channels).unwrap(), starts);
        }

        #[test]
        fn any_text_is_parsed_or_rejected(text in "w?[A-Za-z0-9_-]{0,60}") {
            let _ = text.parse::<AfterParam>();
        }
    }
}
