//! [`Port`]: the outbound side of a MicroStream client, through which the hub calls it and responds to it.

use std::{
    collections::HashMap,
    sync::{Arc, Weak},
    task::{Context, Poll},
};

use foldhash::fast::RandomState;
use parking_lot::Mutex;
use serde_json::value::RawValue;

use super::{bytes, translate};
use crate::{
    compat::{
        engineio::{EngineSession, PacketOutbox, packet::Framing},
        socketio::{close_event, open_event},
    },
    error::{Code, Error},
    json::write_json_str,
    net::{timer::TimerWheel, websocket::outbox::OfferOutcome},
    rpc::{CallAnswer, CallId, CallerId, ForwardedCall, Peer, PeerRoom, ProbeCallback, WriteOutcome},
};

/// Maximum number of requests that a client has not answered; beyond it older ones are forgotten.
const MAX_PENDING: usize = 100_000;
/// Requests are not forgotten for this number of ticks.
const MIN_AGE: u32 = 120;

/// The outbound side of one client.
pub(super) struct Port {
    session: Weak<EngineSession>,
    outbox: Arc<PacketOutbox>,
    wheel: Arc<TimerWheel>,
    /// Requests to the client by the id that it knows. Requests with a call id as their id are not in the map.
    pending: Mutex<HashMap<RequestKey, UnansweredRequest, RandomState>>,
}

/// A request id as its sender wrote it. Those of MicroStream's library have 21 characters.
#[derive(Clone, PartialEq, Eq)]
struct RequestKey(CallerId);

struct UnansweredRequest {
    call: CallId,
    since: u32,
}

impl std::hash::Hash for RequestKey {
    fn hash<H: std::hash::Hasher>(&self, state: &mut H) {
        state.write(self.0.id());
    }
}

impl RequestKey {
    fn new(id: &str) -> Self {
        RequestKey(CallerId::new(translate::spelled(id).as_bytes()))
    }
}

impl Port {
    pub(super) fn new(session: Weak<EngineSession>, outbox: Arc<PacketOutbox>, wheel: Arc<TimerWheel>) -> Self {
        Port { session, outbox, wheel, pending: Mutex::default() }
    }

    /// Takes the call that a response with this id belongs to.
    pub(super) fn answered(&self, id: Option<&RawValue>) -> Option<CallId> {
        let id = id.map_or("", RawValue::get);
        if let Some(call) = own(id) {
            return CallId::parse(call);
        }
        let mut pending = self.pending.lock();
        let call = pending.remove(&RequestKey::new(id)).map(|pending| pending.call);
        if pending.is_empty() && pending.capacity() > 1_000 {
            *pending = HashMap::default();
        }
        call
    }

    /// Forgets requests that are older than `ticks`, whose callers no longer wait.
    pub(super) fn forget(&self, ticks: u32) {
        let now = self.wheel.now();
        let mut pending = self.pending.lock();
        pending.retain(|_, pending| now - pending.since <= ticks);
        if pending.is_empty() {
            *pending = HashMap::default();
        }
    }

    /// Records a request with the sender's id. `false` if the id is in use, or too many requests are recorded.
    fn remember(&self, id: &str, call: CallId) -> bool {
        // A request of another node may have a longer id.
        if own(id).is_some() || id.len() > CallerId::MAX {
            return false;
        }
        let now = self.wheel.now();
        let mut pending = self.pending.lock();
        if pending.len() >= MAX_PENDING {
            pending.retain(|_, pending| now - pending.since <= MIN_AGE);
        }
        let key = RequestKey::new(id);
        if pending.len() >= MAX_PENDING || pending.contains_key(&key) {
            return false;
        }
        pending.insert(key, UnansweredRequest { call, since: now });
        true
    }

    /// Sends a `response` event, or an error if so much waits for the client that there is no room for it.
    fn respond(&self, id: &str, response: &str) -> PeerRoom {
        let before = match id {
            "" => ["", "", "{\"response\":"],
            id => ["{\"id\":", id, ",\"response\":"],
        };
        let error = Error::new(Code::TooLarge, "the client has not read the responses before this one");
        let error = translate::response_to(&error, None, id).unwrap_or_default();
        self.outbox.answer(event("response", before, response, "}"), event("response", before, &error, "}"))
    }

    /// Sends a `request` event: the payload as it was sent, or one that weir has built.
    fn request(&self, payload: &str) -> WriteOutcome {
        match self.outbox.offer(event("request", [""; 3], payload, "")) {
            OfferOutcome::Written => WriteOutcome::Written,
            OfferOutcome::Full => WriteOutcome::Full,
            OfferOutcome::Closed => WriteOutcome::Gone,
        }
    }
}

/// Writes an event whose argument is JSON between two texts, followed by its attachments.
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

/// The call id in a request id that weir has made, without its quotes.
fn own(id: &str) -> Option<&str> {
    id.strip_prefix('"')?.strip_suffix('"').filter(|id| id.starts_with("w:"))
}

/// The payload with another id.
fn under(id: &str, payload: &str, call: CallId) -> String {
    let text = call.text();
    let own = text.as_str();
    if id.is_empty() {
        let members = payload.strip_prefix('{').unwrap_or_default();
        let comma = if members.trim_start().starts_with('}') { "" } else { "," };
        return format!("{{\"id\":\"{own}\"{comma}{members}");
    }
    // The offset of `id`, which is a slice of `payload`.
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
                self.pending.lock().remove(&RequestKey::new(known));
            }
            return written;
        }
        let mut payload = b"{\"id\":\"".to_vec();
        match call.id {
            Some(id) => payload.extend_from_slice(id.text().as_bytes()),
            // The client responds anyway; the response is ignored.
            None => payload.extend_from_slice(b"w:-"),
        }
        payload.extend_from_slice(b"\",\"event\":");
        write_json_str(call.method, &mut payload);
        if let Some(params) = call.params {
            payload.extend_from_slice(b",\"data\":");
            payload.extend_from_slice(params.get().as_bytes());
        }
        payload.push(b'}');
        // Built of JSON texts, so it is valid JSON.
        self.request(str::from_utf8(&payload).unwrap_or_default())
    }

    fn cancel(&self, _: CallId) {
        // MicroStream has no cancellation.
    }

    fn answer(&self, to: &CallerId, answer: CallAnswer<'_>) -> PeerRoom {
        let (id, target) = split(to);
        match answer {
            CallAnswer::Result(result) if result.get() == "null" => self.respond(id, "{}"),
            CallAnswer::Result(result) => self.respond(id, result.get()),
            CallAnswer::Error(error) => self.respond(id, &translate::response_of(&error, target, id)),
            CallAnswer::Failed(error) => match translate::response_to(&error, target, id) {
                Some(response) => self.respond(id, &response),
                None => PeerRoom::Free,
            },
        }
    }

    fn late(&self, to: &CallerId, answer: CallAnswer<'_>) -> PeerRoom {
        // MicroStream has no such message.
        self.answer(to, answer)
    }

    fn poll_room(&self, cx: &mut Context<'_>) -> Poll<()> {
        self.outbox.poll_room(cx)
    }

    fn abandon_wait(&self) {
        self.outbox.abandon_wait();
    }

    fn withdrawn(&self, _: &str, reason: &str) {
        match reason {
            // Another client has the name: after this message the client does not reconnect.
            "replaced" => self.outbox.send_last("41"),
            // A client that is only disconnected reconnects and registers again.
            _ => self.outbox.finish(),
        }
    }

    fn probe(&self, callback: ProbeCallback) {
        match self.session.upgrade() {
            Some(session) => session.probe(callback),
            None => callback(false),
        }
    }
}

/// The id and the target of a request as they were sent, which its response needs.
pub(super) fn tag(id: Option<&RawValue>, target: Option<&RawValue>) -> CallerId {
    let id = id.map_or("", RawValue::get).as_bytes();
    match target {
        None => CallerId::new(id),
        // JSON contains no such byte.
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
        Port::new(Weak::new(), Arc::new(PacketOutbox::new(Framing::Polling, 1_000)), TimerWheel::start())
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
        assert!(port.pending.lock().is_empty());
    }

    #[tokio::test]
    async fn what_is_not_taken_is_not_remembered() {
        let port = port();
        let large = format!(r#"{{"id":"r1","data":"{}"}}"#, "x".repeat(1_000));
        assert_eq!(ask(&port, 1, &large), WriteOutcome::Written);
        assert_eq!(ask(&port, 2, r#"{"id":"r2"}"#), WriteOutcome::Full);
        assert_eq!(port.pending.lock().len(), 1);
        port.outbox.close();
        assert_eq!(ask(&port, 3, r#"{"id":"r3"}"#), WriteOutcome::Gone);
        assert_eq!(port.pending.lock().len(), 1);
        port.forget(0);
        assert_eq!(port.pending.lock().len(), 1);
    }
}
