//! Parts of held streams, with and without next links.

use std::{
    pin::Pin,
    task::{Context, Poll},
};

use bytes::Bytes;
use http_body::Body;
use hyper::body::Incoming;

use super::instructions::KeepAlive;
use crate::{
    error::Code,
    net::{chunk, stream::StreamOutput},
    transport::subscription_stream::{HeartbeatPolicy, StreamAction},
};

/// The keep-alive data of a stream, as a chunk.
pub(super) struct StreamKeepAlive {
    pub(super) chunk: Bytes,
    pub(super) policy: HeartbeatPolicy,
}

impl StreamKeepAlive {
    pub(super) fn new(KeepAlive { data, timeout, interval }: KeepAlive) -> Self {
        let policy = if interval { HeartbeatPolicy::Periodic(timeout) } else { HeartbeatPolicy::WhenIdle(timeout) };
        StreamKeepAlive { chunk: chunk::of(&data), policy }
    }
}

/// Forwards the rest of an origin's body; `Continue` when it is complete, and `body` is `None` then.
pub(super) fn forward_body(
    body: &mut Option<Box<Incoming>>,
    cx: &mut Context<'_>,
    out: &mut StreamOutput,
) -> StreamAction {
    let Some(incoming) = body else { return StreamAction::Continue };
    while !out.is_full() {
        match Pin::new(&mut **incoming).poll_frame(cx) {
            Poll::Pending => return StreamAction::Wait,
            Poll::Ready(None) => {
                *body = None;
                return StreamAction::Continue;
            }
            Poll::Ready(Some(Ok(frame))) => {
                if let Ok(data) = frame.into_data() {
                    out.push(chunk::of(&data));
                }
            }
            Poll::Ready(Some(Err(_))) => return StreamAction::Close(Code::ProviderGone),
        }
    }
    StreamAction::Wait
}
