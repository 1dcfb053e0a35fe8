//! How a transport wants its events ([`Format`]), and which of them ([`Filter`]).

use std::{borrow::Borrow, fmt, sync::Arc};

use bytes::Bytes;

use crate::{
    channel::{Channel, check_label},
    error::{Error, Result},
    event::Event,
    json::write_json_str,
};

/// A wire format: a leaf that a transport defines as a `static`. A frame is `open`, one or more `event`, `close`,
/// all appended to one buffer; it is made once and shared by every reader that needs the same.
pub struct Format {
    /// Distinguishes formats in a ring's memory of frames. Unique in the program.
    pub index: usize,
    pub open: fn(&mut Vec<u8>),
    pub event: fn(&Channel, &Event, &mut Vec<u8>),
    pub close: fn(&mut Vec<u8>),
}

/// Indexes of all formats, in one place so that no two are the same.
pub mod index {
    pub const NONE: usize = 0;
    pub const WS: usize = 1;
    pub const SSE: usize = 2;
    pub const SSE_BARE: usize = 3;
    pub const SSE_DATA: usize = 4;
    pub const SSE_DATA_BARE: usize = 5;
    pub const GRIP: usize = 6;
    pub const NODE_SSE: usize = 7;
    pub const EVENT_STREAM: usize = 8;
    pub const GRIP_MARKED: usize = 9;
}

impl Format {
    /// For readers that only want to know when there is something.
    pub const NONE: &'static Format = &Format { index: index::NONE, open: |_| {}, event: |_, _, _| {}, close: |_| {} };

    /// One frame of these events.
    pub fn encode<E: Borrow<Arc<Event>>>(&self, channel: &Channel, events: impl IntoIterator<Item = E>) -> Bytes {
        let mut out = Vec::with_capacity(512);
        (self.open)(&mut out);
        for event in events {
            (self.event)(channel, event.borrow(), &mut out);
        }
        (self.close)(&mut out);
        // Exact: frames are remembered.
        Bytes::from(out.into_boxed_slice())
    }
}

impl fmt::Debug for Format {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Format({})", self.index)
    }
}

/// Most types of one filter. Every event is held against all of them, some under the lock of its channel.
const MAX_TYPES: usize = 100;

/// Events of these types only.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Filter {
    /// As JSON text, as events hold them.
    kinds: Box<[Box<[u8]>]>,
}

impl Filter {
    /// `None` for no types at all: everything passes.
    pub fn new<S: AsRef<str>>(kinds: &[S]) -> Result<Option<Self>> {
        if kinds.len() > MAX_TYPES {
            return Err(Error::params(format!("type: at most {MAX_TYPES}")));
        }
        let json = |kind: &S| {
            check_label("type", kind.as_ref())?;
            let mut out = Vec::new();
            write_json_str(kind.as_ref(), &mut out);
            Ok(out.into_boxed_slice())
        };
        let kinds = kinds.iter().map(json).collect::<Result<Box<[_]>>>()?;
        Ok((!kinds.is_empty()).then_some(Filter { kinds }))
    }

    pub fn matches(&self, event: &Event) -> bool {
        event.kind_json().is_some_and(|kind| self.kinds.iter().any(|wanted| **wanted == *kind.as_bytes()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_filter_has_a_bound() {
        assert!(Filter::new(&["t"; MAX_TYPES]).unwrap().is_some());
        assert!(Filter::new(&["t"; MAX_TYPES + 1]).is_err());
    }
}
