//! [`Format`], how a transport encodes events.

use std::{borrow::Borrow, sync::Arc};

use bytes::Bytes;

use crate::{channel::Channel, event::Event};

/// A wire format, defined by a transport or an adapter as a `static`. A frame is `open`, one or more `event`, `close`,
/// all appended to one buffer. It is encoded once and shared by all readers that need the same events in this format.
///
/// A format is identified by its address, so it must not be a `const`: those have no address of their own.
pub struct Format {
    pub open: fn(&mut Vec<u8>),
    pub event: fn(&Channel, &Event, &mut Vec<u8>),
    pub close: fn(&mut Vec<u8>),
}

impl Format {
    /// For readers that only wait for changes and never read encoded events.
    pub const NONE: &'static Format = &Format { open: |_| {}, event: |_, _, _| {}, close: |_| {} };

    /// One frame of these events.
    pub fn encode<E: Borrow<Arc<Event>>>(&self, channel: &Channel, events: impl IntoIterator<Item = E>) -> Bytes {
        let mut out = Vec::with_capacity(512);
        (self.open)(&mut out);
        for event in events {
            (self.event)(channel, event.borrow(), &mut out);
        }
        (self.close)(&mut out);
        // Without spare capacity, because frames are cached.
        Bytes::from(out.into_boxed_slice())
    }
}
