//! HTTP/1.1 chunks (RFC 9112 §7.1) with a size of fixed width, so that one allocation serves every reader: a hijacked
//! connection gets the chunk as it is, HTTP/2 and HTTP/1.0 get its [`text`].

use bytes::Bytes;

/// The bytes before and after the text of a chunk; [`close`] fills in the size.
pub(crate) const HEAD: &[u8] = b"000000\r\n";
pub(crate) const TAIL: &[u8] = b"\r\n";
/// The end of a chunked body.
pub(crate) const END: &[u8] = b"0\r\n\r\n";

/// Begins a chunk.
pub(crate) fn open(out: &mut Vec<u8>) {
    out.extend_from_slice(HEAD);
}

/// Closes the chunk that is all of `out`. Its text has at most 16 MiB, as the largest event has one.
pub(crate) fn close(out: &mut Vec<u8>) {
    let mut size = out.len() - HEAD.len();
    debug_assert!(size < 1 << 24);
    for digit in out[..6].iter_mut().rev() {
        *digit = b"0123456789abcdef"[size & 15];
        size >>= 4;
    }
    out.extend_from_slice(TAIL);
}

/// A text as a chunk. An empty text gives nothing: its chunk would be the end of the body.
pub(crate) fn of(text: &[u8]) -> Bytes {
    if text.is_empty() {
        return Bytes::new();
    }
    let mut out = Vec::with_capacity(HEAD.len() + text.len() + TAIL.len());
    open(&mut out);
    out.extend_from_slice(text);
    close(&mut out);
    out.into()
}

/// The text of a chunk.
pub fn text(chunk: &Bytes) -> Bytes {
    match chunk.is_empty() {
        true => Bytes::new(),
        false => chunk.slice(HEAD.len()..chunk.len() - TAIL.len()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_chunk_and_its_text() {
        assert_eq!(of(b"hello"), "000005\r\nhello\r\n");
        assert_eq!(text(&of(b"hello")), "hello");
        assert_eq!(text(&of(b"")), "");
        assert_eq!(of(&[b'x'; 0x12345])[..8], *b"012345\r\n");
    }
}
