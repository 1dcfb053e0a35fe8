//! [`ChannelInfo`], the state of a channel as the API shows it.

use serde::{Serialize, Serializer};
use utoipa::ToSchema;

use crate::{channel::Channel, position::Epoch};

/// The state of a channel. A channel without a log has the epoch `0`; it is not an error.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, ToSchema)]
#[schema(as = Channel)]
pub struct ChannelInfo {
    #[serde(serialize_with = "as_text")]
    #[schema(value_type = String)]
    pub channel: Channel,
    #[serde(serialize_with = "as_text")]
    #[schema(value_type = String)]
    pub epoch: Epoch,
    /// Oldest offset that can be read; `top + 1` if there is none.
    pub first: u64,
    /// Newest offset; 0 if there is none.
    pub top: u64,
    /// Memory of the stored events, in bytes.
    pub bytes: usize,
    /// Subscriptions on this node.
    pub readers: u32,
    /// Time of the newest event, Unix milliseconds.
    #[schema(required)]
    pub time: Option<u64>,
}

fn as_text<S: Serializer>(value: &impl std::fmt::Display, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_str(value)
}
