//! Publishing several events in one request.

use crate::{bus::PublishFailed, channel::Channel, error::Error, event::Draft, metrics::Transport, node::Node};

/// The results of the events of one request.
pub(crate) struct PublishedEvents {
    /// A JSON array: where each event was placed, or `null` for an event that was not.
    pub(crate) json: Vec<u8>,
    /// Every event that was placed is the repetition of an earlier one.
    pub(crate) all_repeated: bool,
    /// Why the rest was not placed.
    pub(crate) error: Option<Error>,
}

/// Publishes events and counts them. `subject` is the scope of idempotency keys.
pub(crate) async fn publish_many(
    node: &Node,
    subject: &str,
    transport: Transport,
    events: Vec<(Channel, Draft)>,
) -> PublishedEvents {
    let names: Vec<(Channel, usize)> = events.iter().map(|(channel, draft)| (channel.clone(), draft.size())).collect();
    let (placed, error) = match node.bus.publish(subject, events).await {
        Ok(placed) => (placed.into_iter().map(Some).collect(), None),
        Err(PublishFailed { error, placed }) => (placed, Some(error)),
    };
    let mut json = Vec::with_capacity(names.len() * 96);
    json.push(b'[');
    for ((channel, size), placed) in names.iter().zip(&placed) {
        if json.len() > 1 {
            json.push(b',');
        }
        match placed {
            Some(placed) => {
                node.metrics.event_published(transport, placed.duplicate, *size);
                placed.write_json(channel, &mut json);
            }
            None => json.extend_from_slice(b"null"),
        }
    }
    json.push(b']');
    if let Some(error) = &error {
        node.metrics.publish_failed(error.code());
    }
    PublishedEvents { json, all_repeated: placed.iter().flatten().all(|placed| placed.duplicate), error }
}
