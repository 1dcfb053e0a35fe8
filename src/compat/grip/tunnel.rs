//! WebSockets between clients and origins: bytes are copied, not parsed.

use std::{sync::Arc, task::Poll, time::Duration};

use axum::body::Body as AxumBody;
use http::{HeaderValue, Response, Version, header};
use hyper::{body::Incoming, upgrade::OnUpgrade};
use hyper_util::rt::TokioIo;
use tokio::io::AsyncWriteExt as _;

use super::headers::{strip_grip, strip_hop_by_hop};
use crate::{
    error::Code,
    metrics::Transport,
    net::{
        hijack::{Hijack, HijackedConn},
        timer::Due,
    },
    node::Node,
    sessions::ChannelSet,
};

/// How long one direction stays open after the other has closed.
const LINGER: Duration = Duration::from_secs(5);
/// The timer of a tunnel only ends it; its time is irrelevant.
const TIMER_PERIOD: Duration = Duration::from_secs(60 * 60);

/// Connects the client to the origin that has responded with 101.
pub(super) fn tunnel(mut response: Response<Incoming>, node: Arc<Node>) -> Response<AxumBody> {
    let upgrade = hyper::upgrade::on(&mut response);
    let protocol = response.headers().get(header::UPGRADE).cloned();
    let (mut head, _) = response.into_parts();
    strip_hop_by_hop(&mut head.headers);
    strip_grip(&mut head.headers);
    head.headers.insert(header::CONNECTION, HeaderValue::from_static("upgrade"));
    head.headers.extend(protocol.map(|protocol| (header::UPGRADE, protocol)));
    head.version = Version::HTTP_11;
    head.extensions = http::Extensions::new();
    head.extensions.insert(Hijack::new(move |conn| {
        tokio::spawn(run(conn, upgrade, node));
    }));
    Response::from_parts(head, AxumBody::empty())
}

async fn run(conn: HijackedConn, upgrade: OnUpgrade, node: Arc<Node>) {
    let HijackedConn { io: client, peer, early, permit: _permit, .. } = conn;
    let mut connected = node.metrics.connected(Transport::Ws);
    let registration =
        node.sessions.register(Transport::Ws, &node.auth.anonymous(false), Some(peer), ChannelSet::Empty);
    let mut timer = node.timers.timer(TIMER_PERIOD);
    timer.set_owner(registration.number());
    let Ok(upgraded) = upgrade.await else { return };
    let mut origin = TokioIo::new(upgraded);
    let ended_by_node = std::future::poll_fn(|cx| {
        loop {
            match timer.poll(cx) {
                Poll::Ready(Due::Leave) => return Poll::Ready(Code::Draining),
                Poll::Ready(Due::Kicked(code)) => return Poll::Ready(code),
                Poll::Ready(Due::Time) => timer.reset(TIMER_PERIOD),
                Poll::Pending => return Poll::Pending,
            }
        }
    });
    let copied = async {
        origin.write_all(&early).await?;
        let (mut from_client, mut to_client) = tokio::io::split(client);
        let (mut from_origin, mut to_origin) = tokio::io::split(origin);
        let mut up = std::pin::pin!(async {
            tokio::io::copy(&mut from_client, &mut to_origin).await?;
            to_origin.shutdown().await
        });
        let mut down = std::pin::pin!(async {
            tokio::io::copy(&mut from_origin, &mut to_client).await?;
            to_client.shutdown().await
        });
        let lingering = tokio::select! {
            ended = &mut up => ended.map(|()| tokio::time::timeout(LINGER, down)),
            ended = &mut down => return ended.map(|()| tokio::time::timeout(LINGER, up))?.await.unwrap_or(Ok(())),
        };
        lingering?.await.unwrap_or(Ok(()))
    };
    tokio::select! {
        ended = copied => match ended {
            Ok(()) => connected.completed(),
            Err::<_, std::io::Error>(_) => connected.closed_by_peer(),
        },
        code = ended_by_node => connected.closed_with(code),
    }
}
