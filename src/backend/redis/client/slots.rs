//! Slots of a Redis Cluster: which key belongs to which, and which server owns which.

use redis::{Value, from_redis_value_ref};

use super::{majority::majority, url::Address};

pub(super) const SLOTS: usize = 16384;

/// The first slot, the last one, and the master that owns them.
pub(super) type SlotRange = (usize, usize, Address);

/// The slot of a key: of the text between the first `{` and the next `}`, if there is any.
pub(crate) fn slot(key: &[u8]) -> usize {
    let tag = memchr::memchr(b'{', key).and_then(|open| {
        let rest = &key[open + 1..];
        memchr::memchr(b'}', rest).filter(|close| *close > 0).map(|close| &rest[..close])
    });
    usize::from(crc16(tag.unwrap_or(key))) % SLOTS
}

/// CRC-16/XMODEM.
fn crc16(bytes: &[u8]) -> u16 {
    bytes.iter().fold(0, |crc, byte| {
        (0..8).fold(crc ^ u16::from(*byte) << 8, |crc, _| if crc & 0x8000 == 0 { crc << 1 } else { crc << 1 ^ 0x1021 })
    })
}

/// Parses the reply to CLUSTER SLOTS of the server at `asked`.
pub(super) fn parse_slots(reply: &[Vec<Value>], asked: &Address) -> Option<Vec<SlotRange>> {
    let range = |range: &Vec<Value>| {
        let [from, to, Value::Array(master), ..] = &range[..] else { return None };
        let [host, port, ..] = &master[..] else { return None };
        let (from, to): (usize, usize) = (from_redis_value_ref(from).ok()?, from_redis_value_ref(to).ok()?);
        let host: Option<String> = from_redis_value_ref(host).ok()?;
        let address = Address::of_host(asked, &host.unwrap_or_default(), from_redis_value_ref(port).ok()?)?;
        (from <= to && to < SLOTS).then_some((from, to, address))
    };
    let ranges: Vec<_> = reply.iter().map(range).collect::<Option<_>>()?;
    (!ranges.is_empty()).then_some(ranges)
}

/// The owner of each slot by the majority of several views; without a majority, by the first view.
pub(super) fn merge_views(views: &[Vec<SlotRange>]) -> Vec<SlotRange> {
    let owners = views.iter().map(|view| {
        let mut owners = vec![None; SLOTS];
        view.iter().for_each(|(from, to, address)| owners[*from..=*to].fill(Some(address)));
        owners
    });
    let owners: Vec<Vec<Option<&Address>>> = owners.collect();
    let mut ranges: Vec<SlotRange> = Vec::new();
    for slot in 0..SLOTS {
        let votes: Vec<_> = owners.iter().map(|owners| owners[slot]).collect();
        let Some(owner) = majority(&votes, votes.len()).or(votes.first()).copied().flatten() else { continue };
        match ranges.last_mut() {
            Some((_, to, address)) if *to + 1 == slot && address == owner => *to = slot,
            _ => ranges.push((slot, slot, owner.clone())),
        }
    }
    ranges
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slots_are_those_of_redis() {
        // As CLUSTER KEYSLOT replies.
        assert_eq!(crc16(b"123456789"), 0x31c3);
        assert_eq!((slot(b"foo"), slot(b"weir:{foo}:m"), slot(b"{}foo")), (12182, 12182, slot(b"{}foo")));
        assert_ne!(slot(b"{}foo"), slot(b"foo"));
    }

    #[test]
    fn the_majority_of_the_servers_decides() {
        let at = |port| Address { host: "h".into(), port };
        let (old, new) = (vec![(0, 99, at(1)), (100, 16383, at(2))], vec![(0, 99, at(3)), (100, 16383, at(2))]);
        for views in [[&old, &new, &new], [&new, &old, &new], [&new, &new, &old]] {
            assert_eq!(merge_views(&views.map(Clone::clone)), new);
        }
        // Slots may be moving: each is decided by itself.
        let moving = vec![(0, 99, at(3)), (100, 200, at(1)), (201, 16383, at(2))];
        assert_eq!(merge_views(&[old.clone(), new.clone(), moving.clone()]), new);
        let half = vec![(0, 99, at(3))];
        assert_eq!(merge_views(&[half.clone(), new.clone(), half.clone()]), half, "the rest has no owner");
        assert_eq!(merge_views(&[moving.clone(), old]), moving, "without a majority");
    }
}
