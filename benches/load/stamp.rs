//! Stamps in payloads, with which every event is counted and timed, and the records of them.

use std::collections::BTreeSet;

/// Smallest `data` that holds a stamp, in bytes.
pub const SMALLEST: usize = OPEN.len() + 16 + 7 + 16 + 7 + 8 + FILL.len() + CLOSE.len();

const OPEN: &[u8] = br#"{"s":""#;
const FILL: &[u8] = br#"","p":""#;
const CLOSE: &[u8] = br#""}"#;
const HEX: &[u8; 16] = b"0123456789abcdef";

/// `{"s":"<sequence>","t":"<sent, ns>","c":"<channel>","p":"…"}`, the numbers in hex digits of fixed width.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stamp {
    pub sequence: u64,
    pub sent: u64,
    pub channel: u32,
}

impl Stamp {
    /// Appends the payload, `size` bytes in all.
    pub fn put(self, size: usize, out: &mut Vec<u8>) {
        let from = out.len();
        out.extend_from_slice(OPEN);
        put_hex(self.sequence, 16, out);
        out.extend_from_slice(br#"","t":""#);
        put_hex(self.sent, 16, out);
        out.extend_from_slice(br#"","c":""#);
        put_hex(self.channel.into(), 8, out);
        out.extend_from_slice(FILL);
        out.resize((from + size - CLOSE.len()).max(out.len()), b'x');
        out.extend_from_slice(CLOSE);
    }

    /// Replaces the stamp in `bytes`. Returns whether there was one.
    pub fn patch(self, bytes: &mut [u8]) -> bool {
        let Some(at) = memchr::memmem::find(bytes, OPEN) else { return false };
        let mut fresh = Vec::new();
        self.put(SMALLEST, &mut fresh);
        let Some(place) = bytes.get_mut(at..at + SMALLEST - CLOSE.len()) else { return false };
        place.copy_from_slice(&fresh[..fresh.len() - CLOSE.len()]);
        true
    }

    /// The stamp in an event whose `data` of `size` bytes is followed by `tail` bytes, without a search.
    pub fn at_end(event: &[u8], size: usize, tail: usize) -> Option<Stamp> {
        let at = event.len().checked_sub(size + tail)?;
        Self::read(event.get(at..)?).or_else(|| Self::find(event))
    }

    /// The first stamp in `bytes`.
    pub fn find(bytes: &[u8]) -> Option<Stamp> {
        Self::read(&bytes[memchr::memmem::find(bytes, OPEN)?..])
    }

    /// Every stamp in `bytes`.
    pub fn all(bytes: &[u8]) -> impl Iterator<Item = Stamp> {
        memchr::memmem::find_iter(bytes, OPEN).filter_map(|at| Self::read(&bytes[at..]))
    }

    fn read(bytes: &[u8]) -> Option<Stamp> {
        let bytes = bytes.strip_prefix(OPEN)?;
        Some(Stamp {
            sequence: hex(bytes.get(..16)?)?,
            sent: hex(bytes.get(23..39)?)?,
            channel: hex(bytes.get(46..54)?)? as u32,
        })
    }
}

pub fn put_hex(value: u64, digits: u32, out: &mut Vec<u8>) {
    out.extend((0..digits).rev().map(|digit| HEX[(value >> (4 * digit)) as usize & 15]));
}

pub fn hex(digits: &[u8]) -> Option<u64> {
    let mut value = 0;
    for digit in digits {
        let nibble = match digit {
            b'0'..=b'9' => digit - b'0',
            b'a'..=b'f' => digit - b'a' + 10,
            _ => return None,
        };
        value = value << 4 | u64::from(nibble);
    }
    Some(value)
}

/// Counts of errors. The run fails unless all are zero.
#[derive(Clone, Copy, Debug, Default, serde::Serialize)]
pub struct Faults {
    /// Not received, and not announced by a gap.
    pub lost: u64,
    pub duplicated: u64,
    /// Received after a newer event of its channel.
    pub misordered: u64,
    /// Announced losses (`weir.gap`).
    pub gaps: u64,
    /// Connections that ended, and error responses.
    pub failed: u64,
}

impl Faults {
    pub fn any(&self) -> bool {
        self.lost + self.duplicated + self.misordered + self.gaps + self.failed > 0
    }

    pub fn add(&mut self, other: Faults) {
        self.lost += other.lost;
        self.duplicated += other.duplicated;
        self.misordered += other.misordered;
        self.gaps += other.gaps;
        self.failed += other.failed;
    }
}

/// The events that one reader has received of each of its channels.
pub struct Seen {
    first: u32,
    next: Box<[u64]>,
    missing: BTreeSet<(u32, u64)>,
}

impl Seen {
    /// For `channels` channels numbered from `first`.
    pub fn new(first: u32, channels: usize) -> Self {
        Seen { first, next: vec![0; channels].into(), missing: BTreeSet::new() }
    }

    /// Records an event. Returns true if it is received for the first time.
    pub fn record(&mut self, stamp: Stamp, faults: &mut Faults) -> bool {
        let Some(next) = stamp.channel.checked_sub(self.first).and_then(|at| self.next.get_mut(at as usize)) else {
            faults.failed += 1; // an event of another channel
            return false;
        };
        let expected = *next;
        match stamp.sequence {
            sequence if sequence == expected => *next += 1,
            sequence if sequence > expected => {
                self.missing.extend((expected..sequence).map(|missed| (stamp.channel, missed)));
                *next = sequence + 1;
            }
            sequence if self.missing.remove(&(stamp.channel, sequence)) => faults.misordered += 1,
            _ => {
                faults.duplicated += 1;
                return false;
            }
        }
        true
    }

    /// Expects no event published so far: the sequences continue at `next(channel)`.
    pub fn skip_to(&mut self, next: impl Fn(u32) -> u64) {
        for (at, value) in self.next.iter_mut().enumerate() {
            *value = next(self.first + at as u32);
        }
        self.missing.clear();
    }

    /// The number of events not received if `published(channel)` were published.
    pub fn lost(&self, published: impl Fn(u32) -> u64) -> u64 {
        let tail: u64 = self.next.iter().zip(self.first..).map(|(next, channel)| published(channel) - next).sum();
        tail + self.missing.len() as u64
    }
}

/// Latencies in nanoseconds, within 1.6 %: 64 steps to each power of two.
#[derive(Clone)]
pub struct Histogram {
    counts: Box<[u64]>,
    total: u64,
    max: u64,
}

impl Default for Histogram {
    fn default() -> Self {
        Histogram { counts: vec![0; 64 * 60].into(), total: 0, max: 0 }
    }
}

impl Histogram {
    pub fn add(&mut self, ns: u64) {
        self.counts[Self::bucket(ns)] += 1;
        self.total += 1;
        self.max = self.max.max(ns);
    }

    fn bucket(ns: u64) -> usize {
        if ns < 64 {
            return ns as usize;
        }
        let power = 63 - ns.leading_zeros() as usize;
        (power - 5) * 64 + (ns >> (power - 6)) as usize % 64
    }

    /// In nanoseconds; 0 without values.
    pub fn quantile(&self, of: f64) -> u64 {
        let rank = (self.total as f64 * of).ceil().max(1.0) as u64;
        let mut below = 0;
        for (bucket, count) in self.counts.iter().enumerate() {
            below += count;
            if below >= rank {
                let value = match bucket {
                    0..64 => bucket as u64,
                    _ => (64 + bucket as u64 % 64) << (bucket / 64 - 1),
                };
                return value.min(self.max);
            }
        }
        self.max
    }

    pub fn max(&self) -> u64 {
        self.max
    }
}
