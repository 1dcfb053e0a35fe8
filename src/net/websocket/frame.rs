//! WebSocket frames. A server's frames are written by the functions here: they are not masked, so their bytes can be
//! shared. A client's frames are read by [`Decoder`].
//!
//! A data frame that arrives whole, as nearly all do, is unmasked in place and borrowed: no copy, no buffer per
//! connection. Everything else that a client may send (fragments, partial frames, control frames, invalid data) goes
//! through tungstenite, whose state exists only as long as it is needed.

use std::{
    io::{self, Read, Write},
    mem,
    str::Utf8Error,
};

use bytes::Bytes;
use tokio_tungstenite::tungstenite::{
    self,
    error::CapacityError,
    protocol::{
        Role, WebSocketConfig, WebSocketContext,
        frame::{FrameHeader, coding::OpCode},
    },
};

use crate::error::Code;

/// Opcode and FIN of a whole text frame, a whole binary frame, and of the control frames.
const TEXT: u8 = 0x81;
const BINARY: u8 = 0x82;
const CLOSE: u8 = 0x88;
const PING: u8 = 0x89;

/// Longest header of a client's frame: two bytes, eight of length, four of mask.
const MAX_HEADER: usize = 14;

/// Bytes reserved for a header until the length is known: nearly every payload has 126 to 65,535 bytes.
const ROOM: usize = 4;

/// Most bytes of unsent pongs. Only the last ping needs an answer (RFC 6455 §5.5.3).
const MAX_REPLIES: usize = 4096;

/// Appends one whole text frame, whose payload `write` appends.
pub(crate) fn text(out: &mut Vec<u8>, write: impl FnOnce(&mut Vec<u8>)) {
    whole(TEXT, out, write);
}

/// Appends one whole binary frame.
pub(crate) fn binary(out: &mut Vec<u8>, payload: &[u8]) {
    whole(BINARY, out, |out| out.extend_from_slice(payload));
}

#[inline]
fn whole(first: u8, out: &mut Vec<u8>, write: impl FnOnce(&mut Vec<u8>)) {
    let start = out.len();
    out.extend_from_slice(&[first, 0, 0, 0]);
    write(out);
    let len = out.len() - start - ROOM;
    match len {
        ..126 => {
            // The shortest form is required (RFC 6455 §5.2), and browsers check it.
            out.copy_within(start + ROOM.., start + 2);
            out.truncate(out.len() - 2);
            out[start + 1] = len as u8;
        }
        126..=0xffff => {
            out[start + 1] = 126;
            out[start + 2..start + 4].copy_from_slice(&(len as u16).to_be_bytes());
        }
        _ => {
            let mut header = [0; 10];
            header[0] = first;
            header[1] = 127;
            header[2..].copy_from_slice(&(len as u64).to_be_bytes());
            out.splice(start..start + ROOM, header);
        }
    }
}

/// An empty ping.
pub(crate) const PING_FRAME: [u8; 2] = [PING, 0];

/// The end of the frame that `at` lies in, in a sequence of our own frames; `at` itself if a frame begins there.
pub(crate) fn boundary(frames: &[u8], at: usize) -> usize {
    let mut end = 0;
    while end < at {
        let Some((&[_, short], rest)) = frames.get(end..).and_then(|rest| rest.split_first_chunk()) else {
            return frames.len();
        };
        let (header, payload) = match (short, rest) {
            (127, rest) => (10, rest.first_chunk().map_or(0, |len| u64::from_be_bytes(*len) as usize)),
            (126, rest) => (4, rest.first_chunk().map_or(0, |len| u16::from_be_bytes(*len) as usize)),
            (short, _) => (2, short as usize),
        };
        end += header + payload;
    }
    end.min(frames.len())
}

/// Appends a close frame. `reason` is an error code's name: short.
pub(crate) fn close(out: &mut Vec<u8>, code: u16, reason: &str) {
    debug_assert!(reason.len() <= 123);
    out.extend_from_slice(&[CLOSE, 2 + reason.len() as u8]);
    out.extend_from_slice(&code.to_be_bytes());
    out.extend_from_slice(reason.as_bytes());
}

/// Something that a client has sent.
pub(crate) enum Incoming<'a> {
    Message(Payload<'a>),
    /// A ping, which is answered already, or a pong.
    Alive,
    /// The client closes, or answers our close frame. If an answer is due, it is among the replies.
    Close,
}

/// A message: borrowed from the read buffer, or assembled from fragments.
pub(crate) enum Payload<'a> {
    Text(&'a str),
    /// Some clients send their JSON as binary messages.
    Binary(&'a [u8]),
    Pieces {
        text: bool,
        bytes: Bytes,
    },
}

impl Payload<'_> {
    /// The message as text.
    ///
    /// # Errors
    /// If a binary message is not UTF-8.
    pub(crate) fn text(&self) -> Result<&str, Utf8Error> {
        match self {
            Payload::Text(text) => Ok(text),
            Payload::Binary(bytes) => std::str::from_utf8(bytes),
            Payload::Pieces { bytes, .. } => std::str::from_utf8(bytes),
        }
    }
}

/// The reason why a client's frames cannot be read any further: [`Code::TooLarge`] or [`Code::Protocol`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct FrameError(pub(crate) Code);

/// Reads the frames of one client, however they are split into reads.
pub(crate) struct Decoder {
    /// Largest message, in bytes.
    limit: usize,
    partial: Option<Box<PartialDecoder>>,
    /// The error after which nothing more is read.
    failed: Option<FrameError>,
}

/// The state between two reads while a frame or message is incomplete, or the connection is closing.
struct PartialDecoder {
    context: WebSocketContext,
    /// The beginning of an incomplete header.
    header: [u8; MAX_HEADER],
    header_len: u8,
    /// Bytes of the current frame that have not been passed to tungstenite.
    owed: u64,
    /// Between the first and the last fragment of a message.
    fragments: bool,
    closing: bool,
}

/// The stream that tungstenite reads from and writes to: it reads one frame or part of one, and writes pongs and the
/// answer to a close frame.
struct DecoderStream<'a> {
    input: &'a [u8],
    replies: &'a mut Vec<u8>,
}

// === impl Decoder ===

impl Decoder {
    /// `limit` is the largest message, in bytes.
    pub(crate) fn new(limit: usize) -> Self {
        Decoder { limit, partial: None, failed: None }
    }

    /// Takes the next message from the front of `input`; `None` when all of it has been taken.
    ///
    /// Pongs and the answer to a close are appended to `replies`.
    ///
    /// # Errors
    /// [`FrameError`] if the client violates the protocol or its message is too large; nothing can be read after that.
    pub(crate) fn next<'a>(
        &mut self,
        input: &mut &'a mut [u8],
        replies: &mut Vec<u8>,
    ) -> Result<Option<Incoming<'a>>, FrameError> {
        if let Some(error) = self.failed {
            return Err(error);
        }
        self.take(input, replies).inspect_err(|error| self.failed = Some(*error))
    }

    fn take<'a>(
        &mut self,
        input: &mut &'a mut [u8],
        replies: &mut Vec<u8>,
    ) -> Result<Option<Incoming<'a>>, FrameError> {
        loop {
            if input.is_empty() {
                return Ok(None);
            }
            if self.partial.is_none()
                && let Some(whole) = WholeFrame::find(input)
            {
                if whole.payload > self.limit {
                    return Err(FrameError(Code::TooLarge));
                }
                let (frame, rest) = mem::take(input).split_at_mut(whole.header + whole.payload);
                *input = rest;
                let (header, payload) = frame.split_at_mut(whole.header);
                if let Some(mask) = header.last_chunk() {
                    unmask(payload, *mask);
                }
                return Ok(Some(Incoming::Message(match header[0] {
                    TEXT => Payload::Text(std::str::from_utf8(payload).map_err(|_| FrameError(Code::Protocol))?),
                    _ => Payload::Binary(payload),
                })));
            }
            let limit = self.limit;
            let partial = self.partial.get_or_insert_with(|| Box::new(PartialDecoder::new(limit)));
            let came = partial.next(input, replies)?;
            if partial.is_idle() {
                self.partial = None;
            }
            if came.is_some() {
                return Ok(came);
            }
        }
    }
}

/// A whole, unfragmented data frame at the front of the input: lengths of its header and payload.
struct WholeFrame {
    header: usize,
    payload: usize,
}

impl WholeFrame {
    fn find(input: &[u8]) -> Option<Self> {
        let (&[first, second], rest) = input.split_first_chunk()?;
        if (first != TEXT && first != BINARY) || second & 0x80 == 0 {
            return None;
        }
        let (header, payload) = match second & 0x7f {
            127 => (14, u64::from_be_bytes(*rest.first_chunk()?)),
            126 => (8, u16::from_be_bytes(*rest.first_chunk()?) as u64),
            short => (6, short as u64),
        };
        let payload = usize::try_from(payload).ok()?;
        (input.len() - 2 >= payload.checked_add(header - 2)?).then_some(WholeFrame { header, payload })
    }
}

fn unmask(payload: &mut [u8], mask: [u8; 4]) {
    let wide = u64::from_ne_bytes([mask[0], mask[1], mask[2], mask[3], mask[0], mask[1], mask[2], mask[3]]);
    let (chunks, rest) = payload.as_chunks_mut::<8>();
    for chunk in chunks {
        *chunk = (u64::from_ne_bytes(*chunk) ^ wide).to_ne_bytes();
    }
    for (byte, mask) in rest.iter_mut().zip(mask.iter().cycle()) {
        *byte ^= mask;
    }
}

// === impl PartialDecoder ===

impl PartialDecoder {
    fn new(limit: usize) -> Self {
        let config = WebSocketConfig::default()
            // Allocated at once, and the most that is read in one step.
            .read_buffer_size(4096)
            .write_buffer_size(0)
            .max_write_buffer_size(MAX_REPLIES)
            .max_message_size(Some(limit))
            .max_frame_size(Some(limit));
        PartialDecoder {
            context: WebSocketContext::new(Role::Server, Some(config)),
            header: [0; MAX_HEADER],
            header_len: 0,
            owed: 0,
            fragments: false,
            closing: false,
        }
    }

    /// Whether no state needs to be kept.
    fn is_idle(&self) -> bool {
        self.header_len == 0 && self.owed == 0 && !self.fragments && !self.closing
    }

    /// Passes at most one frame to tungstenite, so that its state is known, and can be dropped between two frames.
    fn next<'a>(&mut self, input: &mut &mut [u8], replies: &mut Vec<u8>) -> Result<Option<Incoming<'a>>, FrameError> {
        let mut header = [0; MAX_HEADER];
        let mut header_len = 0;
        if self.owed == 0 {
            let kept = self.header_len as usize;
            let more = input.len().min(MAX_HEADER - kept);
            self.header[kept..kept + more].copy_from_slice(&input[..more]);
            let mut cursor = io::Cursor::new(&self.header[..kept + more]);
            match FrameHeader::parse(&mut cursor) {
                Ok(Some((head, payload))) => {
                    header_len = cursor.position() as usize;
                    header = self.header;
                    self.header_len = 0;
                    self.owed = payload;
                    // `parse` consumed a whole header, of which the beginning was kept from an earlier read.
                    *input = &mut mem::take(input)[header_len - kept..];
                    if matches!(head.opcode, OpCode::Data(_)) {
                        self.fragments = !head.is_final;
                    }
                }
                Ok(None) => {
                    self.header_len += more as u8;
                    *input = &mut mem::take(input)[more..];
                    return Ok(None);
                }
                Err(error) => return Err(frame_error(&error)),
            }
        }
        let here = input.len().min(usize::try_from(self.owed).unwrap_or(usize::MAX));
        let (payload, rest) = mem::take(input).split_at_mut(here);
        *input = rest;
        self.owed -= here as u64;
        let mut came = self.feed(&header[..header_len], replies)?;
        if came.is_none() && here > 0 {
            came = self.feed(payload, replies)?;
        }
        Ok(came)
    }

    fn feed(&mut self, input: &[u8], replies: &mut Vec<u8>) -> Result<Option<Incoming<'static>>, FrameError> {
        use tungstenite::Message;
        let mut stream = DecoderStream { input, replies };
        match self.context.read(&mut stream) {
            Ok(Message::Text(text)) => Ok(Some(Incoming::Message(Payload::Pieces { text: true, bytes: text.into() }))),
            Ok(Message::Binary(bytes)) => Ok(Some(Incoming::Message(Payload::Pieces { text: false, bytes }))),
            Ok(Message::Close(_)) => {
                self.closing = true;
                self.reply(&mut stream);
                Ok(Some(Incoming::Close))
            }
            Ok(_) => {
                self.reply(&mut stream);
                Ok(Some(Incoming::Alive))
            }
            Err(tungstenite::Error::Io(error)) if error.kind() == io::ErrorKind::WouldBlock => Ok(None),
            Err(tungstenite::Error::ConnectionClosed | tungstenite::Error::AlreadyClosed) => {
                self.closing = true;
                Ok(Some(Incoming::Close))
            }
            Err(error) => Err(frame_error(&error)),
        }
    }

    /// Writes a pong or the answer to a close frame. After a close it fails with "closed", as expected.
    fn reply(&mut self, stream: &mut DecoderStream<'_>) {
        let _ = self.context.flush(stream);
    }
}

fn frame_error(error: &tungstenite::Error) -> FrameError {
    match error {
        tungstenite::Error::Capacity(CapacityError::MessageTooLong { .. }) => FrameError(Code::TooLarge),
        _ => FrameError(Code::Protocol),
    }
}

impl Read for DecoderStream<'_> {
    fn read(&mut self, out: &mut [u8]) -> io::Result<usize> {
        if self.input.is_empty() {
            return Err(io::ErrorKind::WouldBlock.into());
        }
        self.input.read(out)
    }
}

impl Write for DecoderStream<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        // One call is one frame. Pongs to a flood of pings may be omitted.
        if self.replies.len() < MAX_REPLIES {
            self.replies.extend_from_slice(bytes);
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const LIMIT: usize = 100_000;

    /// A client's frame.
    fn client(first: u8, payload: &[u8]) -> Vec<u8> {
        let mask = [0x6d, 0xb6, 0xb2, 0x80];
        let mut frame = vec![first];
        match payload.len() {
            len @ ..126 => frame.push(0x80 | len as u8),
            len @ 126..=0xffff => {
                frame.push(0x80 | 126);
                frame.extend_from_slice(&(len as u16).to_be_bytes());
            }
            len => {
                frame.push(0x80 | 127);
                frame.extend_from_slice(&(len as u64).to_be_bytes());
            }
        }
        frame.extend_from_slice(&mask);
        frame.extend(payload.iter().zip(mask.iter().cycle()).map(|(byte, mask)| byte ^ mask));
        frame
    }

    #[test]
    fn nothing_is_read_after_a_violation() {
        for beginning in [LIMIT + 1, 10 * LIMIT] {
            let mut frame = client(0x81, &vec![b'x'; beginning]);
            let mut decoder = Decoder::new(LIMIT);
            let mut replies = Vec::new();
            for piece in frame.chunks_mut(4096) {
                let mut piece = piece;
                let broken = decoder.next(&mut piece, &mut replies).err();
                assert_eq!((broken, replies.len()), (Some(FrameError(Code::TooLarge)), 0));
            }
        }
    }

    /// Messages, with `None` for a close; the replies; and the decoder.
    type Read = (Vec<Option<Vec<u8>>>, Vec<u8>, Decoder);

    /// Reads all pieces.
    fn read(pieces: &[&[u8]]) -> Result<Read, FrameError> {
        let (mut decoder, mut messages, mut replies) = (Decoder::new(LIMIT), Vec::new(), Vec::new());
        for piece in pieces {
            let mut piece = piece.to_vec();
            let mut input = &mut piece[..];
            while let Some(came) = decoder.next(&mut input, &mut replies)? {
                match came {
                    Incoming::Message(Payload::Text(text)) => messages.push(Some(text.into())),
                    Incoming::Message(Payload::Binary(bytes)) => messages.push(Some(bytes.into())),
                    Incoming::Message(Payload::Pieces { bytes, .. }) => messages.push(Some(bytes.into())),
                    Incoming::Alive => {}
                    Incoming::Close => messages.push(None),
                }
            }
        }
        Ok((messages, replies, decoder))
    }

    fn rejected(bytes: &[u8]) -> Code {
        read(&[bytes]).map(drop).unwrap_err().0
    }

    #[test]
    fn headers_have_the_shortest_form() {
        for (len, header) in [(0, 2), (125, 2), (126, 4), (65535, 4), (65536, 10)] {
            let mut out = vec![7];
            text(&mut out, |out| out.extend(vec![b'x'; len]));
            assert_eq!(out.len(), 1 + header + len);
            assert!(out[1 + header..].iter().all(|byte| *byte == b'x'));
            let (head, payload) = FrameHeader::parse(&mut io::Cursor::new(&out[1..])).unwrap().unwrap();
            assert_eq!((head.is_final, payload), (true, len as u64));
        }
    }

    #[test]
    fn boundaries() {
        let mut frames = PING_FRAME.to_vec();
        for len in [5, 200, 70_000] {
            text(&mut frames, |out| out.extend(vec![b'x'; len]));
        }
        let ends = [2, 2 + 7, 2 + 7 + 204, 2 + 7 + 204 + 70_010];
        for (at, end) in
            [(0, 0), (1, ends[0]), (2, ends[0]), (3, ends[1]), (10, ends[2]), (213, ends[2]), (214, ends[3])]
        {
            assert_eq!(boundary(&frames, at), end, "{at}");
        }
    }

    #[test]
    fn whole_frames_are_borrowed() {
        let mut frames = [client(TEXT, b"one"), client(BINARY, b"\xff"), client(TEXT, "zwei €".as_bytes())].concat();
        let (mut decoder, mut replies) = (Decoder::new(LIMIT), Vec::new());
        let mut input = &mut frames[..];
        for expected in [Some("one"), None, Some("zwei €")] {
            match decoder.next(&mut input, &mut replies).unwrap() {
                Some(Incoming::Message(Payload::Text(text))) => assert_eq!(Some(text), expected),
                Some(Incoming::Message(payload @ Payload::Binary(_))) => assert_eq!(payload.text().ok(), expected),
                _ => panic!("not borrowed"),
            }
        }
        assert!(decoder.next(&mut input, &mut replies).unwrap().is_none());
        assert!(decoder.partial.is_none());
    }

    #[test]
    fn pings_are_answered_and_nothing_is_kept() {
        let (messages, replies, decoder) = read(&[&client(PING, b"hi")]).unwrap();
        assert!(messages.is_empty());
        assert_eq!(replies, [0x8a, 2, b'h', b'i']);
        assert!(decoder.partial.is_none());
        let flood = client(PING, &[0; 125]).repeat(1000);
        assert!(read(&[&flood]).unwrap().1.len() < MAX_REPLIES + 200);
    }

    #[test]
    fn a_close_is_echoed() {
        let (messages, replies, _) = read(&[&client(CLOSE, &[0x03, 0xe8])]).unwrap();
        assert_eq!(messages, [None]);
        assert_eq!(replies, [CLOSE, 2, 0x03, 0xe8]);
    }

    #[test]
    fn violations() {
        let mut unmasked = Vec::new();
        text(&mut unmasked, |out| out.push(b'x'));
        assert_eq!(rejected(&unmasked), Code::Protocol);
        assert_eq!(rejected(&client(0xc1, b"reserved bit")), Code::Protocol);
        assert_eq!(rejected(&client(0x83, b"reserved opcode")), Code::Protocol);
        assert_eq!(rejected(&client(0x80, b"nothing to continue")), Code::Protocol);
        assert_eq!(rejected(&client(0x09, b"fragmented ping")), Code::Protocol);
        assert_eq!(rejected(&client(PING, &[0; 126])), Code::Protocol);
        assert_eq!(rejected(&client(TEXT, b"\xff")), Code::Protocol);
        assert_eq!(rejected(&[client(0x01, b"\xff"), client(0x80, b"")].concat()), Code::Protocol);
        assert_eq!(rejected(&[client(0x01, b"a"), client(TEXT, b"b")].concat()), Code::Protocol);
        assert_eq!(rejected(&client(CLOSE, b"x")), Code::Protocol);
        assert_eq!(rejected(&client(TEXT, &vec![b'x'; LIMIT + 1])), Code::TooLarge);
        assert_eq!(rejected(&client(TEXT, &vec![b'x'; LIMIT + 1])[..20]), Code::TooLarge);
        let half = vec![b'x'; LIMIT / 2 + 1];
        assert_eq!(rejected(&[client(0x01, &half), client(0x80, &half)].concat()), Code::TooLarge);
        assert_eq!(rejected(&[0x82, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0, 0, 0, 0]), Code::TooLarge);
    }

    /// The payload of a message, and its frames: possibly fragmented, with a ping in between.
    fn message() -> impl Strategy<Value = (Vec<u8>, Vec<u8>)> {
        let payload = prop_oneof![
            prop::collection::vec(any::<u8>(), 0..10),
            prop::collection::vec(any::<u8>(), 100..300),
            prop::collection::vec(any::<u8>(), 65_500..66_000),
        ];
        (payload, any::<Option<prop::sample::Index>>(), any::<bool>()).prop_map(|(payload, cut, ping)| {
            let mut wire = Vec::new();
            match cut {
                Some(cut) => {
                    let (first, last) = payload.split_at(cut.index(payload.len() + 1));
                    wire.extend(client(0x02, first));
                    if ping {
                        wire.extend(client(PING, b"p"));
                    }
                    wire.extend(client(0x80, last));
                }
                None => wire.extend(client(BINARY, &payload)),
            }
            (payload, wire)
        })
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        #[test]
        fn pieces_do_not_matter(
            sent in prop::collection::vec(message(), 1..6),
            cuts in prop::collection::vec(any::<prop::sample::Index>(), 0..12),
        ) {
            let wire: Vec<u8> = sent.iter().flat_map(|(_, wire)| wire.clone()).collect();
            let mut cuts: Vec<usize> = cuts.iter().map(|cut| cut.index(wire.len())).collect();
            cuts.extend([0, wire.len()]);
            cuts.sort_unstable();
            let pieces: Vec<&[u8]> = cuts.windows(2).map(|cut| &wire[cut[0]..cut[1]]).collect();
            let (messages, _, decoder) = read(&pieces).unwrap();
            let expected: Vec<_> = sent.into_iter().map(|(payload, _)| Some(payload)).collect();
            prop_assert_eq!(messages, expected);
            prop_assert!(decoder.partial.is_none());
        }

        #[test]
        fn any_bytes_are_read_or_rejected(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            let _ = read(&[&bytes]);
        }
    }
}
