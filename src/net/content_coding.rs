//! Codings of request bodies (RFC 9110, section 8.4; RFC 9112, section 6.1), removed before a handler sees the request.

use std::{
    io::{self, Write as _},
    pin::Pin,
    task::{Context, Poll, ready},
};

use axum::body::Body;
use bytes::{Buf as _, Bytes};
use flate2::write::{MultiGzDecoder, ZlibDecoder};
use http::{HeaderMap, header, request::Parts};
use http_body::Frame;

use crate::error::{Code, Error, Result};

/// The value of `Accept-Encoding` in the response to another coding.
pub(crate) const ACCEPTED: &str = "gzip, deflate";

/// Encoded bytes that are decoded at once. They become at most about 1 MiB, so that a small body cannot take more memory
/// than that before the limit of its handler applies.
const STEP: usize = 1024;

enum ContentDecoder {
    Gzip(MultiGzDecoder<Vec<u8>>),
    Deflate(ZlibDecoder<Vec<u8>>),
}

/// A body that is decoded while it is read.
struct DecodedBody {
    encoded: Body,
    /// Received and not decoded yet.
    received: Bytes,
    decoder: ContentDecoder,
    /// An empty body is empty, although it is no valid gzip file.
    began: bool,
    ended: bool,
}

/// Checks the transfer coding of a request.
///
/// # Errors
/// `not_implemented` for any other than `chunked`.
pub(crate) fn check_transfer_coding(headers: &HeaderMap) -> Result<()> {
    let mut codings = headers.get_all(header::TRANSFER_ENCODING).iter();
    match (codings.next(), codings.next()) {
        (None, _) => Ok(()),
        (Some(coding), None) if coding.as_bytes().eq_ignore_ascii_case(b"chunked") => Ok(()),
        _ => Err(Error::new(Code::NotImplemented, "the only supported Transfer-Encoding is chunked")),
    }
}

/// Removes the content coding of a request, if it has one. Handlers read the decoded body and apply their limits to it.
///
/// # Errors
/// `unsupported_media_type`, with a member `accept_encoding`, for another coding than gzip or deflate, or several.
pub(crate) fn decode_content(head: &mut Parts, body: Body) -> Result<Body> {
    let Some(decoder) = ContentDecoder::of(&head.headers)? else { return Ok(body) };
    // They are about the encoded body.
    head.headers.remove(header::CONTENT_ENCODING);
    head.headers.remove(header::CONTENT_LENGTH);
    Ok(Body::new(DecodedBody { encoded: body, received: Bytes::new(), decoder, began: false, ended: false }))
}

impl ContentDecoder {
    fn of(headers: &HeaderMap) -> Result<Option<Self>> {
        let mut decoder = None;
        for value in headers.get_all(header::CONTENT_ENCODING) {
            for coding in value.to_str().unwrap_or("?").split(',') {
                let coding = coding.trim().to_ascii_lowercase();
                decoder = match (&*coding, decoder) {
                    ("" | "identity", decoder) => decoder,
                    ("gzip" | "x-gzip", None) => Some(ContentDecoder::Gzip(MultiGzDecoder::new(Vec::new()))),
                    ("deflate", None) => Some(ContentDecoder::Deflate(ZlibDecoder::new(Vec::new()))),
                    // Two codings would multiply the time that a small body can take.
                    _ => {
                        let detail = "Content-Encoding: a body may have one of the codings gzip and deflate";
                        let error = Error::new(Code::UnsupportedMediaType, detail);
                        return Err(error.with("accept_encoding", ACCEPTED));
                    }
                };
            }
        }
        Ok(decoder)
    }

    /// Decodes some bytes.
    fn decode(&mut self, bytes: &[u8]) -> io::Result<Vec<u8>> {
        let out = match self {
            ContentDecoder::Gzip(decoder) => {
                decoder.write_all(bytes)?;
                decoder.flush()?;
                decoder.get_mut()
            }
            ContentDecoder::Deflate(decoder) => {
                decoder.write_all(bytes)?;
                decoder.flush()?;
                decoder.get_mut()
            }
        };
        Ok(std::mem::take(out))
    }

    /// Whether the encoded data is complete.
    fn is_complete(&mut self) -> bool {
        match self {
            ContentDecoder::Gzip(decoder) => decoder.try_finish().is_ok(),
            // After its end it takes nothing more.
            ContentDecoder::Deflate(decoder) => matches!(decoder.write(&[0]), Ok(0)),
        }
    }
}

impl http_body::Body for DecodedBody {
    type Data = Bytes;
    type Error = axum::BoxError;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, axum::BoxError>>> {
        let this = &mut *self;
        loop {
            if this.ended {
                return Poll::Ready(None);
            }
            if this.received.is_empty() {
                match ready!(Pin::new(&mut this.encoded).poll_frame(cx)) {
                    // Trailers are dropped.
                    Some(frame) => this.received = frame?.into_data().unwrap_or_default(),
                    None => {
                        this.ended = true;
                        if this.began && !this.decoder.is_complete() {
                            return Poll::Ready(Some(Err("the encoded body is not complete".into())));
                        }
                    }
                }
                continue;
            }
            this.began = true;
            let step = this.received.len().min(STEP);
            let decoded = this.decoder.decode(&this.received[..step]);
            this.received.advance(step);
            this.ended = decoded.is_err();
            let decoded = decoded?;
            if !decoded.is_empty() {
                return Poll::Ready(Some(Ok(Frame::data(decoded.into()))));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use flate2::{
        Compression,
        write::{GzEncoder, ZlibEncoder},
    };
    use futures_util::stream;
    use http::Request;
    use http_body_util::BodyExt as _;

    use super::*;

    fn gzip(data: &[u8]) -> Vec<u8> {
        let mut encoder = GzEncoder::new(Vec::new(), Compression::default());
        encoder.write_all(data).unwrap();
        encoder.finish().unwrap()
    }

    fn deflate(data: &[u8]) -> Vec<u8> {
        let mut encoder = ZlibEncoder::new(Vec::new(), Compression::default());
        encoder.write_all(data).unwrap();
        encoder.finish().unwrap()
    }

    /// Decodes a body that arrives in pieces of `size` bytes.
    async fn decoded(coding: &str, body: &[u8], size: usize) -> Result<Vec<u8>, String> {
        let request = Request::post("/").header("content-encoding", coding).header("content-length", body.len());
        let mut head = request.body(()).unwrap().into_parts().0;
        let pieces: Vec<io::Result<Bytes>> =
            body.chunks(size.max(1)).map(|piece| Ok(Bytes::copy_from_slice(piece))).collect();
        let body = Body::from_stream(stream::iter(pieces));
        let body = decode_content(&mut head, body).map_err(|error| error.code().as_str().to_owned())?;
        Ok(body.collect().await.map_err(|error| error.to_string())?.to_bytes().to_vec())
    }

    #[tokio::test]
    async fn bodies_are_decoded_in_pieces_of_any_size() {
        let data = Vec::from_iter((0..100_000u32).flat_map(|n| (n / 7).to_le_bytes()));
        for size in [1, 10, 1_000, 1_000_000] {
            assert_eq!(decoded("gzip", &gzip(&data), size).await.unwrap(), data);
            assert_eq!(decoded("X-GZIP", &gzip(b"a"), size).await.unwrap(), b"a");
            assert_eq!(decoded("deflate", &deflate(&data), size).await.unwrap(), data);
            assert_eq!(decoded("identity, gzip", &gzip(b""), size).await.unwrap(), b"");
            assert_eq!(decoded("gzip", &[gzip(b"a"), gzip(b"b")].concat(), size).await.unwrap(), b"ab");
            assert_eq!(decoded("identity", b"plain", size).await.unwrap(), b"plain");
            assert_eq!(decoded("gzip", b"", size).await.unwrap(), b"");
            assert_eq!(decoded("deflate", b"", size).await.unwrap(), b"");
        }
    }

    #[tokio::test]
    async fn damaged_bodies_are_errors() {
        for (coding, whole) in [("gzip", gzip(b"some data")), ("deflate", deflate(b"some data"))] {
            for end in 1..whole.len() {
                assert!(decoded(coding, &whole[..end], 3).await.is_err(), "{coding}, {end} bytes");
            }
            assert!(decoded(coding, &[&whole[..], b"more"].concat(), 100).await.is_err(), "{coding}");
            assert!(decoded(coding, b"{\"id\":7}", 100).await.is_err(), "{coding}");
        }
    }

    #[tokio::test]
    async fn other_codings_are_not_supported() {
        for coding in ["br", "zstd", "gzip, gzip", "gzip, br", "none", "gzip;q=1", "x"] {
            assert_eq!(decoded(coding, b"", 1).await.unwrap_err(), "unsupported_media_type", "{coding}");
        }
    }

    #[test]
    fn chunked_is_the_only_transfer_coding() {
        let check = |codings: &[&'static str]| {
            let mut headers = HeaderMap::new();
            for coding in codings {
                headers.append(header::TRANSFER_ENCODING, coding.parse().unwrap());
            }
            check_transfer_coding(&headers).map_err(|error| error.code().status())
        };
        assert_eq!((check(&[]), check(&["chunked"]), check(&["Chunked"])), (Ok(()), Ok(()), Ok(())));
        for codings in [&["gzip, chunked"][..], &["gzip", "chunked"], &["chunked", "chunked"], &["identity"]] {
            assert_eq!(check(codings), Err(501), "{codings:?}");
        }
    }
}
