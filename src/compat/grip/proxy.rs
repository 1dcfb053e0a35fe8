//! [`GripProxy`]: the state that the handlers of requests, held responses and publishers share.

use std::sync::Arc;

use bytes::Bytes;
use http::{HeaderValue, Response, uri::Scheme};
use http_body_util::{BodyExt as _, LengthLimitError, Limited};
use hyper::body::Incoming;

use super::{
    config::Config,
    instructions::{HeldChannel, Instructions},
    item_event::ItemRecord,
    origin_client::{OriginClient, OriginError, OriginRequest},
    response::OriginBody,
    route::OriginRoute,
    waiting_items::WaitingItems,
};
use crate::{
    bus::ReadLimit,
    channel::Channel,
    error::{Error, Result},
    node::Node,
    position::Start,
};

/// How many events are searched for the newest item of a channel.
const RECENT: u64 = 32;

pub(crate) struct GripProxy {
    pub(super) node: Arc<Node>,
    pub(super) config: Config,
    /// The longest path first.
    pub(super) routes: Vec<OriginRoute>,
    pub(super) waiting: WaitingItems,
    client: OriginClient,
}

impl GripProxy {
    pub(crate) fn new(node: &Arc<Node>) -> Result<Self> {
        let config: Config = node.config.compat.get();
        let routes = config.routes.iter().map(OriginRoute::new).collect::<Result<Vec<_>, String>>();
        let mut routes = routes.map_err(Error::params)?;
        routes.sort_by_key(|route| std::cmp::Reverse(route.path.len()));
        if routes.is_empty() {
            tracing::warn!("GRIP has no origin: name one in [[compat.grip.routes]]");
        }
        let tls = routes.iter().any(|route| route.scheme == Scheme::HTTPS);
        let client = OriginClient::new(&config, tls, node.timers.clone()).map_err(Error::params)?;
        Ok(GripProxy { node: node.clone(), config, routes, waiting: WaitingItems::default(), client })
    }

    /// The index of the route that a path belongs to.
    pub(super) fn route(&self, path: &str) -> Option<usize> {
        self.routes.iter().position(|route| route.matches(path))
    }

    pub(super) async fn send(
        &self,
        route: &OriginRoute,
        request: OriginRequest,
    ) -> Result<Response<Incoming>, OriginError> {
        self.client.send(&route.scheme, &route.authority, request).await
    }

    /// A new `Grip-Sig`.
    pub(super) fn signature(&self, route: &OriginRoute) -> HeaderValue {
        // Cannot fail: a token is base64 and dots.
        let token = route.signer.sign(&self.config.iss).unwrap_or_default();
        HeaderValue::try_from(token).unwrap_or(HeaderValue::from_static(""))
    }

    pub(super) fn check_limits(&self, instructions: &Instructions) -> Result<(), OriginError> {
        let max = self.node.config.limits.stream_channels;
        if instructions.channels.len() > max {
            return Err(OriginError::Invalid(format!(
                "an answer is held on at most {max} channels (limits.stream_channels)"
            )));
        }
        Ok(())
    }

    /// The channels of the bus on which a response is held.
    pub(super) fn channels(
        &self,
        route: &OriginRoute,
        instructions: &Instructions,
    ) -> Result<Vec<Channel>, OriginError> {
        let invalid = |error: Error| OriginError::Invalid(format!("Grip-Channel: {}", error.detail()));
        // Clients of the proxy read nothing of weir itself.
        let parse = |channel: &HeldChannel| {
            let channel = Channel::parse(&format!("{}{}", route.prefix, channel.name)).map_err(invalid)?;
            channel.writable().map(|()| channel).map_err(invalid)
        };
        instructions.channels.iter().map(parse).collect()
    }

    /// Reads a whole body, of at most `limits.publish_bytes`.
    pub(super) async fn read_body(&self, body: OriginBody) -> Result<Bytes, OriginError> {
        let incoming = match body {
            OriginBody::Incoming(incoming) => incoming,
            OriginBody::Bytes(bytes) => return Ok(bytes),
        };
        let max = self.node.config.limits.publish_bytes;
        let collecting = Limited::new(incoming, max).collect();
        let timeout = self.config.timeout;
        match tokio::time::timeout(timeout, collecting).await {
            Ok(Ok(body)) => Ok(body.to_bytes()),
            Ok(Err(error)) if error.is::<LengthLimitError>() => {
                Err(OriginError::Invalid(format!("its answer has more than {max} bytes (limits.publish_bytes)")))
            }
            Ok(Err(_)) => Err(OriginError::Broken),
            Err(_) => Err(OriginError::Timeout(timeout)),
        }
    }

    /// The id of the newest item of a channel. `None` if it has no id, or is not among the newest events.
    pub(super) async fn last_item_id(&self, channel: &Channel) -> Option<String> {
        for count in [1, RECENT] {
            let limit = ReadLimit { events: count as usize, bytes: self.node.config.limits.page_bytes };
            let page = self.node.bus.read(channel, Start::Last(count), limit, None).await.ok()?;
            // A page that is cut at its byte limit does not contain the newest event.
            if page.more {
                return None;
            }
            if let Some(record) = page.events.iter().rev().find_map(|event| ItemRecord::of(event)) {
                return record.id;
            }
        }
        None
    }
}
