//! [`Port`]: a MicroStream client as the hub sees it, to call and to answer.

use std::{
    collections::HashMap,
    sync::{Arc, Weak},
};

use foldhash::fast::RandomState;
use parking_lot::Mutex;
use serde_json::value::RawValue;

use super::{bytes, translate};
use crate::{
    compat::{
        engineio::{Outbox, Session, packet::Framing},
        socketio::{close_event, open_event},
    },
    json::write_json_str,
    net::timer::TimerWheel,
    rpc::{CallAnswer, CallId, CallerId, ForwardedCall, Peer, ProbeCallback, WriteOutcome},
};

/// Requests that a service was sent and has not answered, beyond which the older ones are forgotten.
const MAX_ASKED: usize = 100_000;
/// A request that is younger than this many ticks is not forgotten.
const YOUNG: u32 = 120;

/// The outbound side of one client.
pub struct Port {
    session: Weak<Session>,
    outbox: Arc<Outbox>,
    wheel: Arc<TimerWheel>,
    /// What the client was asked, by the id that it knows; those under ids of ours are not here.
    asked: Mutex<HashMap<Key, Asked, RandomState>>,
}

/// An id as its requester wrote it. Its own library's have 21 letters.
#[derive(Clone, PartialEq, Eq)]
struct Key(CallerId);

struct Asked {
    call: CallId,
    since: u32,
}

impl std::hash::Hash for Key {
    fn hash<H: std::hash::Hasher>(&self, state: &mut H) {
        state.write(self.0.id());
    }
}

impl Key {
    fn new(id: &str) -> Self {
        Key(CallerId::new(translate::spelled(id).as_bytes()))
    }
}

impl Port {
    pub fn new(session: Weak<Session>, outbox: Arc<Outbox>, wheel: Arc<TimerWheel>) -> Self {
        Port { session, outbox, wheel, asked: Mutex::default() }
    }

    /// The call that the client answers under `id`, once.
    pub fn answered(&self, id: Option<&RawValue>) -> Option<CallId> {
        let id = id.map_or("", RawValue::get);
        if let Some(call) = own(id) {
            return CallId::parse(call);
        }
        let mut asked = self.asked.lock();
        let call = asked.remove(&Key::new(id)).map(|asked| asked.call);
        if asked.is_empty() && asked.capacity() > 1_000 {
            *asked = HashMap::default();
        }
        call
    }

    /// Forgets what was asked more than `ticks` ago: nobody waits for it.
    pub fn forget(&self, ticks: u32) {
        let now = self.wheel.now();
        let mut asked = self.asked.lock();
        asked.retain(|_, asked| now - asked.since <= ticks);
        if asked.is_empty() {
            *asked = HashMap::default();
        }
    }

    /// Remembers that the client is asked under `id`. False: that could not be told from another request, or its number is
    /// too large.
    fn remember(&self, id: &str, call: CallId) -> bool {
        if own(id).is_some() {
            return false;
        }
        let now = self.wheel.now();
        let mut asked = self.asked.lock();
        if asked.len() >= MAX_ASKED {
            asked.retain(|_, asked| now - asked.since <= YOUNG);
        }
        let key = Key::new(id);
        if asked.len() >= MAX_ASKED || asked.contains_key(&key) {
            return false;
        }
        asked.insert(key, Asked { call, since: now });
        true
    }

    /// Sends a `response`.
    fn respond(&self, id: &str, response: &str) {
        let before = match id {
            "" => ["", "", "{\"response\":"],
            id => ["{\"id\":", id, ",\"response\":"],
        };
        self.outbox.send(event("response", before, response, "}"));
    }

    /// Sends a `request`: the payload as it was sent, or one of our own making.
    fn request(&self, payload: &str) -> WriteOutcome {
        match self.outbox.offer(event("request", [""; 3], payload, "")) {
            Some(true) => WriteOutcome::Written,
            Some(false) => WriteOutcome::Full,
            None => WriteOutcome::Gone,
        }
    }
}

/// Writes an event whose argument is JSON between two texts; its bytes go behind it.
fn event<'a>(
    name: &'a str,
    before: [&'a str; 3],
    json: &'a str,
    after: &'a str,
) -> impl FnOnce(Framing, &mut Vec<u8>) + 'a {
    let extracted = bytes::extract(json);
    move |framing, out| {
        let (json, attachments) = match &extracted {
            Some((json, attachments)) => (&**json, &**attachments),
            None => (json, &[][..]),
        };
        framing.text(out, |out| {
            open_event(out, name, attachments.len());
            before.iter().chain(&[json, after]).for_each(|text| out.extend_from_slice(text.as_bytes()));
            close_event(out);
        });
        attachments.iter().for_each(|bytes| framing.binary(out, bytes));
    }
}

/// A hub's id in its quotes: an id of ours, never a requester's.
fn own(id: &str) -> Option<&str> {
    id.strip_prefix('"')?.strip_suffix('"').filter(|id| id.starts_with("w:"))
}

/// A payload under another id.
fn under(id: &str, payload: &str, call: CallId) -> String {
    let text = call.text();
    let own = text.as_str();
    if id.is_empty() {
        let members = payload.strip_prefix('{').unwrap_or_default();
        let comma = if members.trim_start().starts_with('}') { "" } else { "," };
        return format!("{{\"id\":\"{own}\"{comma}{members}");
    }
    // Where it stands: `id` is a part of `payload`.
    let at = id.as_ptr() as usize - payload.as_ptr() as usize;
    format!("{}\"{own}\"{}", &payload[..at], &payload[at + id.len()..])
}

impl Peer for Port {
    fn call(&self, call: &ForwardedCall<'_>) -> WriteOutcome {
        if let (Some(sent), Some(id)) = (call.as_sent, call.id) {
            let sent = sent.get();
            let known = translate::id_of(sent);
            if !self.remember(known, id) {
                return self.request(&under(known, sent, id));
            }
            let written = self.request(sent);
            if written != WriteOutcome::Written {
                self.asked.lock().remove(&Key::new(known));
            }
            return written;
        }
        let mut payload = b"{\"id\":\"".to_vec();
        match call.id {
            Some(id) => payload.extend_from_slice(id.text().as_bytes()),
            // It answers in any case; nobody waits for this one.
            None => payload.extend_from_slice(b"w:-"),
        }
        payload.extend_from_slice(b"\",\"event\":");
        write_json_str(call.method, &mut payload);
        if let Some(params) = call.params {
            payload.extend_from_slice(b",\"data\":");
            payload.extend_from_slice(params.get().as_bytes());
        }
        payload.push(b'}');
        // Of texts only.
        self.request(str::from_utf8(&payload).unwrap_or_default())
    }

    fn cancel(&self, _: CallId) {
        // There is no word for it.
    }

    fn answer(&self, to: &CallerId, answer: CallAnswer<'_>) {
        let (id, target) = split(to);
        match answer {
            CallAnswer::Result(result) if result.get() == "null" => self.respond(id, "{}"),
            CallAnswer::Result(result) => self.respond(id, result.get()),
            CallAnswer::Error(error) => self.respond(id, &translate::response_of(&error, target, id)),
            CallAnswer::Failed(error) => {
                if let Some(response) = translate::response_to(&error, target, id) {
                    self.respond(id, &response);
                }
            }
        }
    }

    fn late(&self, to: &CallerId, answer: CallAnswer<'_>) {
        // Its client knows by itself that it is.
        self.answer(to, answer);
    }

    fn withdrawn(&self, _: &str, reason: &str) {
        match reason {
            // Somebody else has the name: who is told so stays away.
            "replaced" => self.outbox.part("41"),
            // Who is only cut off comes back by itself, and asks for its name again.
            _ => self.outbox.finish(),
        }
    }

    fn probe(&self, told: ProbeCallback) {
        match self.session.upgrade() {
            Some(session) => session.probe(told),
            None => told(false),
        }
    }
}

/// What a request's answer needs: its id, and whom it was for, both as they were written.
pub fn tag(id: Option<&RawValue>, target: Option<&RawValue>) -> CallerId {
    let id = id.map_or("", RawValue::get).as_bytes();
    match target {
        None => CallerId::new(id),
        // JSON holds no such byte.
        Some(target) => CallerId::new(&[id, &[0], target.get().as_bytes()].concat()),
    }
}

fn split(tag: &CallerId) -> (&str, Option<&RawValue>) {
    let text = str::from_utf8(tag.id()).unwrap_or_default();
    match text.split_once('\0') {
        Some((id, target)) => (id, serde_json::from_str(target).ok()),
        None => (text, None),
    }
}

#[cfg(test)]
mod tests {
    use std::task::{Context, Poll, Waker};

    use super::*;
    use crate::rpc::MethodNames;

    fn json(text: &str) -> &RawValue {
        serde_json::from_str(text).unwrap()
    }

    fn port() -> Port {
        Port::new(Weak::new(), Arc::new(Outbox::new(Framing::Polling, 1_000)), TimerWheel::start())
    }

    fn wrote(port: &Port) -> String {
        let mut out = Vec::new();
        let taken = port.outbox.poll_take(&mut Context::from_waker(Waker::noop()), Framing::Polling, &mut out);
        assert!(matches!(taken, Poll::Ready(_)));
        String::from_utf8(out).unwrap()
    }

    fn ask(port: &Port, number: u64, sent: &str) -> WriteOutcome {
        let id = CallId::parse(&format!("w:{number}"));
        let sent = json(sent);
        let call = ForwardedCall {
            id,
            service: "s",
            method: "m",
            names: MethodNames::Short,
            params: None,
            as_sent: Some(sent),
            meta: None,
            relay: crate::rpc::RelayInfo::default(),
        };
        port.call(&call)
    }

    #[tokio::test]
    async fn a_payload_goes_as_it_came_unless_its_id_is_taken() {
        let port = port();
        let sent = r#"{"id":"r1","event":"e","data":{"x":1},"more":[]}"#;
        assert_eq!(ask(&port, 1, sent), WriteOutcome::Written);
        assert_eq!(wrote(&port), format!("42[\"request\",{sent}]"));
        for (number, sent, other) in [
            (2, sent, r#"{"id":"w:2","event":"e","data":{"x":1},"more":[]}"#),
            (3, r#"{"event":"e","id":"w:1"}"#, r#"{"event":"e","id":"w:3"}"#),
            (4, r#"{"id":"\u00721"}"#, r#"{"id":"w:4"}"#),
        ] {
            assert_eq!(ask(&port, number, sent), WriteOutcome::Written);
            assert_eq!(wrote(&port), format!("42[\"request\",{other}]"));
        }
        assert_eq!(port.answered(Some(json("\"w:3\""))), CallId::parse("w:3"));
        assert_eq!(port.answered(Some(json("\"r1\""))), CallId::parse("w:1"));
        assert_eq!(port.answered(Some(json("\"r1\""))), None);
        assert_eq!(port.answered(None), None);
        assert_eq!(ask(&port, 5, "{}"), WriteOutcome::Written);
        assert_eq!(wrote(&port), "42[\"request\",{}]");
        assert_eq!(ask(&port, 6, "{ }"), WriteOutcome::Written);
        assert_eq!(wrote(&port), "42[\"request\",{\"id\":\"w:6\" }]");
        assert_eq!(port.answered(None), CallId::parse("w:5"));
        assert!(port.asked.lock().is_empty());
    }

    #[tokio::test]
    async fn what_is_not_taken_is_not_remembered() {
        let port = port();
        let large = format!(r#"{{"id":"r1","data":"{}"}}"#, "x".repeat(1_000));
        assert_eq!(ask(&port, 1, &large), WriteOutcome::Written);
        assert_eq!(ask(&port, 2, r#"{"id":"r2"}"#), WriteOutcome::Full);
        assert_eq!(port.asked.lock().len(), 1);
        port.outbox.close();
        assert_eq!(ask(&port, 3, r#"{"id":"r3"}"#), WriteOutcome::Gone);
        assert_eq!(port.asked.lock().len(), 1);
        port.forget(0);
        assert_eq!(port.asked.lock().len(), 1);
    }
}
