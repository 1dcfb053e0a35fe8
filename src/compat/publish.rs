//! Publishing what clients of an adapter send.

use crate::{
    auth::Identity, bus::Placed, channel::Channel, error::Result, event::Draft, metrics::Transport, node::Node,
};

/// Publishes events of a client. Metrics count them as published over HTTP.
pub(super) async fn publish(node: &Node, identity: &Identity, events: Vec<(Channel, Draft)>) -> Result<Vec<Placed>> {
    let sizes: Vec<usize> = events.iter().map(|(_, draft)| draft.size()).collect();
    for (channel, draft) in &events {
        let _ = identity.may_publish(channel, draft)?;
    }
    let (placed, failed) = match node.bus.publish(identity.subject(), events).await {
        Ok(placed) => (placed.into_iter().map(Some).collect(), None),
        Err(failed) => (failed.placed, Some(failed.error)),
    };
    for (placed, size) in placed.iter().zip(sizes).filter_map(|(placed, size)| Some(((*placed)?, size))) {
        node.metrics.event_published(Transport::Http, placed.duplicate, size);
    }
    match failed {
        None => Ok(placed.into_iter().flatten().collect()),
        Some(error) => {
            node.metrics.publish_failed(error.code());
            Err(error)
        }
    }
}
