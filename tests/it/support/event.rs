//! Events as the bus takes them, for tests without a transport.

use serde_json::value::RawValue;
use weir::{
    bus::Format,
    channel::Channel,
    event::{Draft, DraftParts, Event, EventData},
};

/// A wire format of JSON lines.
pub static JSON_LINES: Format = Format {
    open: |_| {},
    event: |channel, event, out| {
        event.write_json(channel, out);
        out.push(b'\n');
    },
    close: |_| {},
};

pub fn channel(name: &str) -> Channel {
    Channel::parse(name).unwrap()
}

/// An event whose data is JSON.
pub fn draft(kind: Option<&str>, data: &str, key: Option<&str>) -> Draft {
    let data = RawValue::from_string(data.to_owned()).unwrap();
    Draft::new(DraftParts { kind, data: EventData::Json(&data), key, ..DraftParts::default() }, 1 << 20).unwrap()
}

/// The data of an event that is a number.
pub fn number(event: &Event) -> u64 {
    event.data_json().unwrap().parse().unwrap()
}
