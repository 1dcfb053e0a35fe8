//! What Redis and we say to each other: RESP3, the part of it that we use.

use bytes::{Buf, Bytes, BytesMut};

/// A command, encoded when it is made.
#[derive(Clone, Debug, Default)]
pub struct Command {
    args: Vec<u8>,
    count: usize,
}

/// What Redis says.
#[derive(Clone, Debug, PartialEq)]
pub enum Value {
    Nil,
    Int(i64),
    /// A string of either kind.
    Bytes(Bytes),
    /// An array or a set; of a map, keys and values in turn.
    List(Vec<Value>),
    /// Not the answer to a command.
    Push(Vec<Value>),
    /// `CODE what was wrong`.
    Error(Box<str>),
}

/// Not RESP3: the connection cannot be understood any more.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("this is not the Redis protocol")]
pub struct Garbled;

/// Nothing that we ask for is nested deeper.
const MAX_DEPTH: usize = 16;

// === impl Command ===

impl Command {
    pub fn new(name: &str) -> Self {
        Command::default().arg(name)
    }

    #[must_use]
    pub fn arg(mut self, arg: impl AsRef<[u8]>) -> Self {
        self.push(arg);
        self
    }

    pub fn push(&mut self, arg: impl AsRef<[u8]>) {
        let arg = arg.as_ref();
        self.args.reserve(arg.len() + 16);
        self.args.push(b'$');
        self.args.extend_from_slice(itoa::Buffer::new().format(arg.len()).as_bytes());
        self.args.extend_from_slice(b"\r\n");
        self.args.extend_from_slice(arg);
        self.args.extend_from_slice(b"\r\n");
        self.count += 1;
    }

    #[must_use]
    pub fn int(mut self, arg: u64) -> Self {
        self.push_int(arg);
        self
    }

    pub fn push_int(&mut self, arg: u64) {
        self.push(itoa::Buffer::new().format(arg));
    }

    /// Bytes on the wire, nearly.
    pub fn size(&self) -> usize {
        self.args.len()
    }

    /// Appends the command as it is sent.
    pub fn write(&self, out: &mut Vec<u8>) {
        out.push(b'*');
        out.extend_from_slice(itoa::Buffer::new().format(self.count).as_bytes());
        out.extend_from_slice(b"\r\n");
        out.extend_from_slice(&self.args);
    }
}

// === impl Value ===

impl Value {
    pub fn bytes(&self) -> Option<&Bytes> {
        match self {
            Value::Bytes(bytes) => Some(bytes),
            _ => None,
        }
    }

    pub fn text(&self) -> Option<&str> {
        std::str::from_utf8(self.bytes()?).ok()
    }

    /// A whole number, also one that came as text.
    pub fn int(&self) -> Option<u64> {
        match self {
            Value::Int(n) => (*n).try_into().ok(),
            Value::Bytes(_) => self.text()?.parse().ok(),
            _ => None,
        }
    }

    pub fn list(&self) -> Option<&[Value]> {
        match self {
            Value::List(list) | Value::Push(list) => Some(list),
            _ => None,
        }
    }

    pub fn is_nil(&self) -> bool {
        *self == Value::Nil
    }
}

/// Takes one whole value from what was received, if there is one.
pub fn take(received: &mut BytesMut) -> Result<Option<Value>, Garbled> {
    // First the length, without an allocation: a value that comes in many pieces is looked at many times.
    let mut end = 0;
    if !skip(received, &mut end, 0)? {
        return Ok(None);
    }
    let mut whole = received.split_to(end).freeze();
    read(&mut whole).map(Some)
}

/// Moves `at` behind one value. False if it is not all there.
fn skip(from: &[u8], at: &mut usize, depth: usize) -> Result<bool, Garbled> {
    let Some((kind, number)) = head(from, at)? else { return Ok(false) };
    match kind {
        b'+' | b'-' | b':' | b'_' | b'#' | b',' | b'(' => Ok(true),
        b'$' | b'=' | b'!' => {
            let Some(length) = length(number)? else { return Ok(true) };
            *at = at.checked_add(length + 2).ok_or(Garbled)?;
            Ok(*at <= from.len())
        }
        b'*' | b'~' | b'>' | b'%' | b'|' => {
            if depth == MAX_DEPTH {
                return Err(Garbled);
            }
            let count = length(number)?.unwrap_or(0) * if matches!(kind, b'%' | b'|') { 2 } else { 1 };
            for _ in 0..count {
                if !skip(from, at, depth + 1)? {
                    return Ok(false);
                }
            }
            // Attributes stand before what they are about.
            if kind == b'|' { skip(from, at, depth + 1) } else { Ok(true) }
        }
        _ => Err(Garbled),
    }
}

/// The first byte and the rest of a line, `at` moved behind it.
fn head<'a>(from: &'a [u8], at: &mut usize) -> Result<Option<(u8, &'a [u8])>, Garbled> {
    let rest = from.get(*at..).unwrap_or_default();
    let Some(end) = memchr::memchr(b'\n', rest) else { return Ok(None) };
    let line = rest[..end].strip_suffix(b"\r").ok_or(Garbled)?;
    let (kind, line) = line.split_first().ok_or(Garbled)?;
    *at += end + 1;
    Ok(Some((*kind, line)))
}

/// Nothing for -1, which RESP2 has for nil.
fn length(digits: &[u8]) -> Result<Option<usize>, Garbled> {
    if digits == b"-1" {
        return Ok(None);
    }
    // Redis allows 512 MB; more can only be a mistake.
    let length = std::str::from_utf8(digits).ok().and_then(|text| text.parse().ok()).ok_or(Garbled)?;
    if length > 1 << 30 { Err(Garbled) } else { Ok(Some(length)) }
}

/// What [`skip`] found to be whole.
fn read(from: &mut Bytes) -> Result<Value, Garbled> {
    let mut at = 0;
    let (kind, line) = head(from, &mut at)?.ok_or(Garbled)?;
    let text = 1..1 + line.len();
    let text = |from: &Bytes| from.slice(text);
    match kind {
        b'+' | b',' | b'(' => {
            let value = Value::Bytes(text(from));
            from.advance(at);
            Ok(value)
        }
        b'-' => {
            let value = Value::Error(String::from_utf8_lossy(line).into());
            from.advance(at);
            Ok(value)
        }
        b':' => {
            let number = std::str::from_utf8(line).ok().and_then(|text| text.parse().ok()).ok_or(Garbled)?;
            from.advance(at);
            Ok(Value::Int(number))
        }
        b'_' => {
            from.advance(at);
            Ok(Value::Nil)
        }
        b'#' => {
            let value = Value::Int((line == b"t").into());
            from.advance(at);
            Ok(value)
        }
        b'$' | b'=' | b'!' => {
            let length = length(line)?;
            from.advance(at);
            let Some(length) = length else { return Ok(Value::Nil) };
            let bytes = from.split_to(length);
            from.advance(2);
            Ok(match kind {
                b'!' => Value::Error(String::from_utf8_lossy(&bytes).into()),
                // Verbatim text begins with `txt:`.
                b'=' => Value::Bytes(bytes.slice(bytes.len().min(4)..)),
                _ => Value::Bytes(bytes),
            })
        }
        _ => {
            let count = length(line)?;
            from.advance(at);
            let Some(count) = count else { return Ok(Value::Nil) };
            let count = if matches!(kind, b'%' | b'|') { count * 2 } else { count };
            let list = (0..count).map(|_| read(from)).collect::<Result<Vec<_>, _>>()?;
            match kind {
                b'|' => read(from),
                b'>' => Ok(Value::Push(list)),
                _ => Ok(Value::List(list)),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn bytes(text: &'static str) -> Value {
        Value::Bytes(Bytes::from_static(text.as_bytes()))
    }

    const TALK: &[u8] = b"+OK\r\n-MOVED 7 h:1\r\n:42\r\n_\r\n$-1\r\n$3\r\na\r\n\r\n*2\r\n:1\r\n*0\r\n%1\r\n+a\r\n#t\r\n>2\r\n+message\r\n$1\r\nx\r\n=7\r\ntxt:abc\r\n|1\r\n+ttl\r\n:1\r\n:5\r\n,1.5\r\n";

    fn said() -> Vec<Value> {
        vec![
            bytes("OK"),
            Value::Error("MOVED 7 h:1".into()),
            Value::Int(42),
            Value::Nil,
            Value::Nil,
            bytes("a\r\n"),
            Value::List(vec![Value::Int(1), Value::List(vec![])]),
            Value::List(vec![bytes("a"), Value::Int(1)]),
            Value::Push(vec![bytes("message"), bytes("x")]),
            bytes("abc"),
            Value::Int(5),
            bytes("1.5"),
        ]
    }

    proptest! {
        #[test]
        fn is_understood_in_any_pieces(cuts in prop::collection::vec(1usize..20, 0..60)) {
            let (mut received, mut values, mut rest) = (BytesMut::new(), Vec::new(), TALK);
            for cut in cuts.into_iter().chain([TALK.len()]) {
                let (piece, after) = rest.split_at(cut.min(rest.len()));
                rest = after;
                received.extend_from_slice(piece);
                while let Some(value) = take(&mut received).unwrap() {
                    values.push(value);
                }
            }
            prop_assert_eq!(values, said());
            prop_assert!(received.is_empty());
        }

        #[test]
        fn anything_else_is_refused_or_waited_for(noise in prop::collection::vec(any::<u8>(), 0..60)) {
            let _ = take(&mut BytesMut::from(&noise[..]));
        }
    }

    #[test]
    fn a_command_as_it_is_sent() {
        let mut out = Vec::new();
        Command::new("SET").arg("a").int(10).write(&mut out);
        assert_eq!(out, b"*3\r\n$3\r\nSET\r\n$1\r\na\r\n$2\r\n10\r\n");
    }

    #[test]
    fn depth_and_length_have_bounds() {
        assert_eq!(take(&mut BytesMut::from(&b"*1\r\n".repeat(100)[..])), Err(Garbled));
        assert_eq!(take(&mut BytesMut::from("$99999999999\r\n")), Err(Garbled));
    }
}
