//! Request bodies, read completely within their limits.

use std::time::Duration;

use axum::body::{Body, Bytes};
use http_body_util::BodyExt as _;

use crate::{
    duration,
    error::{Code, Error, Result},
    net::timer,
};

/// The body of a response to `HEAD` whose content is not generated. Its length is unknown: an empty body would get a
/// `Content-Length: 0`, which is not that of `GET` (RFC 9110, section 8.6).
pub(crate) fn not_generated() -> Body {
    Body::from_stream(futures_util::stream::empty::<std::result::Result<Bytes, std::convert::Infallible>>())
}

/// Reads the whole body.
///
/// # Errors
/// `too_large` beyond `limit` bytes (`name` is the name of the limit); `invalid_request` if it does not arrive within
/// `time`.
pub(crate) async fn read_body(body: Body, limit: usize, name: &'static str, time: Duration) -> Result<Bytes> {
    // The timer costs nothing if the body arrived with the head: it is registered when it is first polled.
    timer::timeout(time, collect(body, limit, name)).await.unwrap_or_else(|_| {
        let time = duration::format(time);
        Err(Error::new(Code::InvalidRequest, format!("the body did not arrive within {time} (limits.body_time)")))
    })
}

async fn collect(mut body: Body, limit: usize, name: &'static str) -> Result<Bytes> {
    let too_large =
        || Error::new(Code::TooLarge, format!("the body has more than {limit} bytes ({name})")).with("limit", name);
    // Before the first byte is read: a body that is declared too large is rejected at once.
    if http_body::Body::size_hint(&body).lower() > limit as u64 {
        return Err(too_large());
    }
    let mut first = Bytes::new();
    let mut rest: Vec<u8> = Vec::new();
    while let Some(frame) = body.frame().await {
        let detail =
            "the body ended early, its chunks are malformed, or it is not encoded as its Content-Encoding says";
        let frame = frame.map_err(|_| Error::new(Code::InvalidRequest, detail))?;
        let Ok(data) = frame.into_data() else { continue };
        if first.len() + rest.len() + data.len() > limit {
            return Err(too_large());
        }
        if first.is_empty() {
            first = data;
        } else {
            rest.extend_from_slice(&data);
        }
    }
    if rest.is_empty() {
        return Ok(first);
    }
    // Several frames: `rest` has grown by doubling, so one more copy of the first frame does not matter.
    rest.splice(..0, first.iter().copied());
    Ok(rest.into())
}

#[cfg(test)]
mod tests {
    use std::convert::Infallible;

    use futures_util::stream;

    use super::*;

    async fn body(frames: &[&'static str], limit: usize) -> Result<Bytes> {
        let frames: Vec<_> =
            frames.iter().map(|frame| Ok::<_, Infallible>(Bytes::from_static(frame.as_bytes()))).collect();
        read_body(Body::from_stream(stream::iter(frames)), limit, "limits.x", Duration::MAX).await
    }

    #[tokio::test]
    async fn bodies_of_one_frame_and_of_many() {
        assert_eq!(body(&[], 10).await.unwrap(), "");
        assert_eq!(body(&["abc"], 10).await.unwrap(), "abc");
        assert_eq!(body(&["abc", "d", "efgh"], 8).await.unwrap(), "abcdefgh");
        assert_eq!(body(&["abc", "d", "efgh"], 7).await.unwrap_err().code(), Code::TooLarge);
        assert_eq!(
            read_body(Body::from("abc"), 2, "limits.x", Duration::MAX).await.unwrap_err().code(),
            Code::TooLarge
        );
    }
}
