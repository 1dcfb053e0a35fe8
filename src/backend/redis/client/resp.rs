//! Parses RESP3, the protocol of replies, with bounds on depth and length.
//!
//! The parser of the `redis` crate has no bound on length and costs several times as much. It parses only the types that
//! are rare in replies, one whole value at a time.

use bytes::{Buf, BytesMut};
use redis::{PushKind, Value};

/// The bytes are not RESP3, or beyond the bounds: nothing after them can be parsed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct InvalidResp;

/// No reply to a command of weir is nested deeper.
const MAX_DEPTH: usize = 16;
/// Of a string in bytes, of an array in elements. Redis allows strings of 512 MiB.
const MAX_LENGTH: usize = 1 << 30;

/// Removes one whole value from the bytes that were received, if there is one.
pub(super) fn take(received: &mut BytesMut) -> Result<Option<Value>, InvalidResp> {
    // Its end first, without an allocation: a value that arrives in many pieces is scanned many times.
    let mut end = 0;
    if !skip(received, &mut end, 0)? {
        return Ok(None);
    }
    let value = read(received, &mut 0)?;
    received.advance(end);
    Ok(Some(value))
}

/// Moves `at` behind one value. False if the value is incomplete.
fn skip(from: &[u8], at: &mut usize, depth: usize) -> Result<bool, InvalidResp> {
    let Some((kind, number)) = head(from, at)? else { return Ok(false) };
    match kind {
        b'+' | b'-' | b':' | b'_' | b'#' | b',' | b'(' => Ok(true),
        b'$' | b'=' | b'!' => {
            let Some(length) = length(number)? else { return Ok(true) };
            *at += length + 2;
            Ok(*at <= from.len())
        }
        b'*' | b'~' | b'>' | b'%' | b'|' => {
            if depth == MAX_DEPTH {
                return Err(InvalidResp);
            }
            let count = length(number)?.unwrap_or(0) * if matches!(kind, b'%' | b'|') { 2 } else { 1 };
            for _ in 0..count {
                if !skip(from, at, depth + 1)? {
                    return Ok(false);
                }
            }
            // Attributes are followed by the value that they describe.
            if kind == b'|' { skip(from, at, depth + 1) } else { Ok(true) }
        }
        _ => Err(InvalidResp),
    }
}

/// The type and the rest of a line. Moves `at` behind it.
fn head<'a>(from: &'a [u8], at: &mut usize) -> Result<Option<(u8, &'a [u8])>, InvalidResp> {
    let rest = from.get(*at..).unwrap_or_default();
    let Some(end) = memchr::memchr(b'\n', rest) else { return Ok(None) };
    let line = rest[..end].strip_suffix(b"\r").ok_or(InvalidResp)?;
    let (kind, line) = line.split_first().ok_or(InvalidResp)?;
    *at += end + 1;
    Ok(Some((*kind, line)))
}

/// None for -1, which is nil in RESP2.
fn length(digits: &[u8]) -> Result<Option<usize>, InvalidResp> {
    match number(digits)? {
        -1 => Ok(None),
        length => usize::try_from(length).ok().filter(|length| *length <= MAX_LENGTH).map(Some).ok_or(InvalidResp),
    }
}

fn number(digits: &[u8]) -> Result<i64, InvalidResp> {
    std::str::from_utf8(digits).ok().and_then(|digits| digits.parse().ok()).ok_or(InvalidResp)
}

/// Reads a value that [`skip`] has found to be whole.
fn read(from: &[u8], at: &mut usize) -> Result<Value, InvalidResp> {
    let start = *at;
    let (kind, line) = head(from, at)?.ok_or(InvalidResp)?;
    Ok(match kind {
        b'+' if line == b"OK" => Value::Okay,
        b':' => Value::Int(number(line)?),
        b'_' => Value::Nil,
        b'-' => error(line)?,
        b'$' | b'!' => {
            let Some(length) = length(line)? else { return Ok(Value::Nil) };
            let (bytes, rest) = from[*at..].split_at(length);
            if !rest.starts_with(b"\r\n") {
                return Err(InvalidResp);
            }
            *at += length + 2;
            if kind == b'!' { error(bytes)? } else { Value::BulkString(bytes.to_vec()) }
        }
        b'*' => match length(line)? {
            Some(length) => Value::Array(read_all(length, from, at)?),
            None => Value::Nil,
        },
        b'>' => {
            let length = length(line)?.and_then(|length| length.checked_sub(1)).ok_or(InvalidResp)?;
            let kind = push_kind(read(from, at)?)?;
            Value::Push { kind, data: read_all(length, from, at)? }
        }
        _ => {
            *at = start;
            skip(from, at, 0)?;
            redis::parse_redis_value(&from[start..*at]).map_err(|_| InvalidResp)?
        }
    })
}

fn read_all(count: usize, from: &[u8], at: &mut usize) -> Result<Vec<Value>, InvalidResp> {
    // Each takes at least three of the bytes that were received, which bounds the allocation.
    let mut values = Vec::with_capacity(count);
    for _ in 0..count {
        values.push(read(from, at)?);
    }
    Ok(values)
}

/// Only the crate can make an error. Its text may quote bytes that are not UTF-8.
fn error(text: &[u8]) -> Result<Value, InvalidResp> {
    let text = String::from_utf8_lossy(text);
    redis::parse_redis_value(format!("!{}\r\n{text}\r\n", text.len()).as_bytes()).map_err(|_| InvalidResp)
}

fn push_kind(kind: Value) -> Result<PushKind, InvalidResp> {
    let kind: String = redis::from_redis_value(kind).map_err(|_| InvalidResp)?;
    Ok(match &*kind {
        "message" => PushKind::Message,
        "smessage" => PushKind::SMessage,
        "subscribe" => PushKind::Subscribe,
        "ssubscribe" => PushKind::SSubscribe,
        "unsubscribe" => PushKind::Unsubscribe,
        "sunsubscribe" => PushKind::SUnsubscribe,
        _ => PushKind::Other(kind),
    })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const VALUES: [&str; 19] = [
        "+OK\r\n",
        "+PONG\r\n",
        "-MOVED 7 h:1\r\n",
        "-ERR\r\n",
        ":42\r\n",
        ":-42\r\n",
        "_\r\n",
        "$-1\r\n",
        "*-1\r\n",
        "$3\r\na\r\n\r\n",
        "$0\r\n\r\n",
        "*3\r\n:1\r\n*0\r\n-ERR in a script\r\n",
        "%1\r\n+a\r\n#t\r\n",
        "~1\r\n$1\r\na\r\n",
        ">2\r\n+message\r\n$1\r\nx\r\n",
        ">3\r\n$10\r\nssubscribe\r\n$1\r\nx\r\n:1\r\n",
        "=7\r\ntxt:abc\r\n",
        "*2\r\n|1\r\n+ttl\r\n:1\r\n:5\r\n,1.5\r\n",
        "!9\r\nLOADING x\r\n",
    ];

    proptest! {
        #[test]
        fn any_pieces_give_the_values_of_the_crate(cuts in prop::collection::vec(1usize..20, 0..60)) {
            let stream = VALUES.concat();
            let (mut received, mut values, mut rest) = (BytesMut::new(), Vec::new(), stream.as_bytes());
            for cut in cuts.into_iter().chain([stream.len()]) {
                let (piece, after) = rest.split_at(cut.min(rest.len()));
                rest = after;
                received.extend_from_slice(piece);
                while let Some(value) = take(&mut received).unwrap() {
                    values.push(value);
                }
            }
            prop_assert_eq!(values, VALUES.map(|value| redis::parse_redis_value(value.as_bytes()).unwrap()));
            prop_assert!(received.is_empty());
        }

        #[test]
        fn noise_is_rejected_or_incomplete(noise in prop::collection::vec(any::<u8>(), 0..60)) {
            let _ = take(&mut BytesMut::from(&noise[..]));
        }

        #[test]
        fn damaged_values_do_not_panic(at in any::<prop::sample::Index>(), byte in any::<u8>()) {
            let mut stream = VALUES.concat().into_bytes();
            let at = at.index(stream.len());
            stream[at] = byte;
            let mut received = BytesMut::from(&stream[..]);
            while let Ok(Some(_)) = take(&mut received) {}
        }
    }

    #[test]
    fn depth_and_length_have_bounds() {
        assert_eq!(take(&mut BytesMut::from(&b"*1\r\n".repeat(100)[..])), Err(InvalidResp));
        assert_eq!(take(&mut BytesMut::from("$99999999999\r\n")), Err(InvalidResp));
        assert_eq!(take(&mut BytesMut::from("$1073741825\r\n")), Err(InvalidResp));
        assert_eq!(take(&mut BytesMut::from("$1073741824\r\n")), Ok(None));
    }

    #[test]
    fn errors_may_quote_any_bytes() {
        let value = take(&mut BytesMut::from(&b"-ERR unknown \xff\r\n"[..])).unwrap();
        assert_eq!(value, Some(error("ERR unknown \u{fffd}".as_bytes()).unwrap()));
    }
}
