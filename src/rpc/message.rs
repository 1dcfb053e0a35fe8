//! The messages that nodes send each other about calls. Numbers are varints, ids take eight bytes (little-endian), texts are
//! preceded by their length.
//!
//! A message of an unknown kind is ignored: a newer node must not depend on an older one to understand it.

use std::borrow::Cow;

use serde_json::value::RawValue;

use super::{
    call::CallRequest,
    call_id::{CallId, CallerId},
    peer::{CallAnswer, ProviderError},
};
use crate::{
    cluster::NodeId,
    error::{Code, Error, Executed},
};

/// A message as the receiver reads it.
#[derive(Debug)]
pub(super) enum HubMessage<'a> {
    /// For one provider of the receiver.
    Call(RemoteCall<'a>),
    /// The answer, in time or late, and the load of the service on the sender.
    Reply { caller_id: &'a [u8], load: u64, answer: CallAnswer<'a> },
    /// No provider has received this call, nor will: the original message, and the reason.
    Reject { reason: RejectReason, message: &'a [u8] },
    /// The caller no longer waits for this call.
    Cancel { id: u64 },
    /// Makes the receiver notice lost messages. `ack`: it answers a heartbeat.
    Heartbeat { ack: bool },
    /// Asks whether the receiver still holds the name of a service.
    NameQuery(NameQuery<'a>),
    /// The answer to the query of that number.
    NameReply { number: u64, held: bool },
}

/// A call or notification from another node.
#[derive(Debug)]
pub(super) struct RemoteCall<'a> {
    /// None: a notification.
    pub(super) id: Option<u64>,
    pub(super) service: &'a str,
    pub(super) request: CallRequest<'a>,
    /// Milliseconds until the deadline.
    pub(super) time_left: u64,
    /// Revision of the advertisement by which the sender chose the receiver.
    pub(super) rev: u64,
    /// Nodes that rejected it.
    pub(super) tried: Vec<NodeId>,
}

/// Whether a name can be taken over from the node that holds it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct NameQuery<'a> {
    pub(super) number: u64,
    pub(super) service: &'a str,
    pub(super) subject: &'a str,
    /// An exclusive provider of the same subject yields.
    pub(super) takeover: bool,
    /// An exclusive provider is probed, and holds nothing if it is dead.
    pub(super) probe: bool,
}

/// Why a node rejects a call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(super) enum RejectReason {
    /// All providers of the node are at their concurrency.
    Busy = 0,
    /// The node has no provider.
    NoProvider = 1,
}

const CALL: u8 = 1;
const REPLY: u8 = 2;
const REJECT: u8 = 3;
const CANCEL: u8 = 4;
const HEARTBEAT: u8 = 5;
const NAME_QUERY: u8 = 6;
const NAME_REPLY: u8 = 7;
const HEARTBEAT_ACK: u8 = 8;

const HAS_ID: u8 = 1;
const LATE: u8 = 2;
const PARAMS: u8 = 4;
const AS_SENT: u8 = 8;
const TRACEPARENT: u8 = 16;
const WAIT: u8 = 32;

pub(super) const HEARTBEAT_MESSAGE: &[u8] = &[HEARTBEAT];
pub(super) const HEARTBEAT_ACK_MESSAGE: &[u8] = &[HEARTBEAT_ACK];

// === writing ===

impl RemoteCall<'_> {
    pub(super) fn encode(&self) -> Vec<u8> {
        let CallRequest { method, params, as_sent, caller, traceparent, wait, late } = self.request;
        let mut out = Vec::with_capacity(64 + self.service.len() + self.request.bytes());
        let flags = [
            (self.id.is_some(), HAS_ID),
            (late, LATE),
            (params.is_some(), PARAMS),
            (as_sent.is_some(), AS_SENT),
            (traceparent.is_some(), TRACEPARENT),
            (wait.is_some(), WAIT),
        ];
        out.push(CALL);
        out.push(flags.iter().filter(|(set, _)| *set).map(|(_, flag)| flag).sum());
        if let Some(id) = self.id {
            out.extend_from_slice(&id.to_le_bytes());
        }
        number(&mut out, self.time_left);
        number(&mut out, self.rev);
        number(&mut out, self.tried.len() as u64);
        for node in &self.tried {
            out.extend_from_slice(&node.0.to_le_bytes());
        }
        text(&mut out, self.service);
        text(&mut out, method);
        text(&mut out, caller);
        for json in [params, as_sent].into_iter().flatten() {
            text(&mut out, json.get());
        }
        if let Some(traceparent) = traceparent {
            text(&mut out, traceparent);
        }
        if let Some(wait) = wait {
            number(&mut out, wait);
        }
        out
    }
}

pub(super) fn encode_reply(caller_id: &[u8], load: u64, answer: &CallAnswer<'_>) -> Vec<u8> {
    let mut out = vec![REPLY];
    bytes(&mut out, caller_id);
    number(&mut out, load);
    match answer {
        CallAnswer::Result(result) => {
            out.push(0);
            text(&mut out, result.get());
        }
        CallAnswer::Error(error) => {
            out.push(1 + u8::from(error.data.is_some()));
            out.extend_from_slice(&error.code.to_le_bytes());
            text(&mut out, &error.message);
            if let Some(data) = &error.data {
                text(&mut out, data.get());
            }
        }
        CallAnswer::Failed(error) => {
            out.push(3);
            text(&mut out, error.code().as_str());
            text(&mut out, error.detail());
            out.push(match error.is_executed() {
                None => 0,
                Some(Executed::No) => 1,
                Some(Executed::Maybe) => 2,
            });
        }
    }
    out
}

/// Rejects the call that came in `message`.
pub(super) fn encode_reject(reason: RejectReason, message: &[u8]) -> Vec<u8> {
    let mut out = vec![REJECT, reason as u8];
    out.extend_from_slice(message);
    out
}

pub(super) fn encode_cancel(id: u64) -> Vec<u8> {
    let mut out = vec![CANCEL];
    out.extend_from_slice(&id.to_le_bytes());
    out
}

impl NameQuery<'_> {
    pub(super) fn encode(&self) -> Vec<u8> {
        let mut out = vec![NAME_QUERY];
        number(&mut out, self.number);
        out.push(u8::from(self.takeover) | u8::from(self.probe) << 1);
        text(&mut out, self.service);
        text(&mut out, self.subject);
        out
    }
}

pub(super) fn encode_name_reply(query: u64, held: bool) -> Vec<u8> {
    let mut out = vec![NAME_REPLY];
    number(&mut out, query);
    out.push(u8::from(held));
    out
}

fn number(out: &mut Vec<u8>, mut number: u64) {
    while number >= 0x80 {
        out.push(number as u8 | 0x80);
        number >>= 7;
    }
    out.push(number as u8);
}

fn bytes(out: &mut Vec<u8>, bytes: &[u8]) {
    number(out, bytes.len() as u64);
    out.extend_from_slice(bytes);
}

fn text(out: &mut Vec<u8>, text: &str) {
    bytes(out, text.as_bytes());
}

// === reading ===

impl<'a> HubMessage<'a> {
    /// None: this version does not know the kind, or the message is malformed.
    pub(super) fn decode(message: &'a [u8]) -> Option<Self> {
        let mut from = MessageReader(message);
        Some(match from.byte()? {
            CALL => HubMessage::Call(from.call()?),
            REPLY => HubMessage::Reply { caller_id: from.bytes()?, load: from.number()?, answer: from.answer()? },
            REJECT => {
                let reason = match from.byte()? {
                    0 => RejectReason::Busy,
                    _ => RejectReason::NoProvider,
                };
                HubMessage::Reject { reason, message: from.0 }
            }
            CANCEL => HubMessage::Cancel { id: from.id()? },
            HEARTBEAT => HubMessage::Heartbeat { ack: false },
            HEARTBEAT_ACK => HubMessage::Heartbeat { ack: true },
            NAME_QUERY => {
                let (number, flags) = (from.number()?, from.byte()?);
                let (takeover, probe) = (flags & 1 != 0, flags & 2 != 0);
                HubMessage::NameQuery(NameQuery {
                    number,
                    takeover,
                    probe,
                    service: from.text()?,
                    subject: from.text()?,
                })
            }
            NAME_REPLY => HubMessage::NameReply { number: from.number()?, held: from.byte()? != 0 },
            _ => return None,
        })
    }
}

struct MessageReader<'a>(&'a [u8]);

impl<'a> MessageReader<'a> {
    fn byte(&mut self) -> Option<u8> {
        let (first, rest) = self.0.split_first()?;
        self.0 = rest;
        Some(*first)
    }

    fn take(&mut self, length: usize) -> Option<&'a [u8]> {
        let (taken, rest) = self.0.split_at_checked(length)?;
        self.0 = rest;
        Some(taken)
    }

    fn id(&mut self) -> Option<u64> {
        Some(u64::from_le_bytes(self.take(8)?.try_into().ok()?))
    }

    fn number(&mut self) -> Option<u64> {
        let mut number = 0;
        for shift in (0..64).step_by(7) {
            let byte = self.byte()?;
            number |= u64::from(byte & 0x7f) << shift;
            if byte < 0x80 {
                return Some(number);
            }
        }
        None
    }

    fn bytes(&mut self) -> Option<&'a [u8]> {
        let length = usize::try_from(self.number()?).ok()?;
        self.take(length)
    }

    fn text(&mut self) -> Option<&'a str> {
        str::from_utf8(self.bytes()?).ok()
    }

    fn json(&mut self) -> Option<&'a RawValue> {
        serde_json::from_str(self.text()?).ok()
    }

    fn call(&mut self) -> Option<RemoteCall<'a>> {
        let flags = self.byte()?;
        let has = |flag| flags & flag != 0;
        let id = if has(HAS_ID) { Some(self.id()?) } else { None };
        let (time_left, rev, tried) = (self.number()?, self.number()?, self.number()?);
        let mut nodes = Vec::new();
        for _ in 0..tried {
            nodes.push(NodeId(self.id()?));
        }
        let (service, method, caller) = (self.text()?, self.text()?, self.text()?);
        let params = if has(PARAMS) { Some(self.json()?) } else { None };
        let as_sent = if has(AS_SENT) { Some(self.json()?) } else { None };
        let traceparent = if has(TRACEPARENT) { Some(self.text()?) } else { None };
        let wait = if has(WAIT) { Some(self.number()?) } else { None };
        let request = CallRequest { method, params, as_sent, caller, traceparent, wait, late: has(LATE) };
        Some(RemoteCall { id, service, request, time_left, rev, tried: nodes })
    }

    fn answer(&mut self) -> Option<CallAnswer<'a>> {
        Some(match self.byte()? {
            0 => CallAnswer::Result(self.json()?),
            kind @ (1 | 2) => {
                let code = i64::from_le_bytes(self.take(8)?.try_into().ok()?);
                let message = Cow::Borrowed(self.text()?);
                let data = if kind == 2 { Some(Cow::Borrowed(self.json()?)) } else { None };
                CallAnswer::Error(ProviderError { code, message, data })
            }
            3 => {
                let name = self.text()?;
                // A code of a newer version. Only one thing is certain: the call was not answered.
                let code = Code::ALL.into_iter().find(|code| code.as_str() == name).unwrap_or(Code::ProviderGone);
                let error = Error::new(code, self.text()?.to_owned());
                CallAnswer::Failed(match self.byte()? {
                    0 => error,
                    1 => error.executed(Executed::No),
                    _ => error.executed(Executed::Maybe),
                })
            }
            _ => return None,
        })
    }
}

// === caller ids of calls from other nodes ===

/// The [`CallerId`] of the call that another node knows as `id`.
pub(super) fn remote_caller_id(id: u64, service: &str) -> CallerId {
    let mut bytes = Vec::with_capacity(8 + service.len());
    bytes.extend_from_slice(&id.to_le_bytes());
    bytes.extend_from_slice(service.as_bytes());
    CallerId::new(&bytes)
}

/// Reverses [`remote_caller_id`].
pub(super) fn parse_remote_caller_id(caller_id: &[u8]) -> Option<(CallId, &str)> {
    let (id, service) = caller_id.split_first_chunk::<8>()?;
    Some((CallId::from_u64(u64::from_le_bytes(*id)), str::from_utf8(service).ok()?))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn a_call_survives_a_round_trip(
            (id, time_left, rev, tried) in (any::<Option<u64>>(), any::<u64>(), any::<u64>(), prop::collection::vec(any::<u64>(), 0..4)),
            (service, method, caller) in (".{0,300}", ".*", ".*"),
            (params, traceparent, wait, late) in (any::<Option<Vec<String>>>(), any::<Option<String>>(), any::<Option<u64>>(), any::<bool>()),
        ) {
            let json = params.map(|params| serde_json::value::to_raw_value(&params).unwrap());
            let (params, as_sent) = (json.as_deref(), json.as_deref().filter(|_| late));
            let request = CallRequest {
                method: &method, params, as_sent, caller: &caller, traceparent: traceparent.as_deref(), wait, late,
            };
            let tried: Vec<_> = tried.into_iter().map(NodeId).collect();
            let call = RemoteCall { id, service: &service, request, time_left, rev, tried };
            let bytes = call.encode();
            let Some(HubMessage::Call(read)) = HubMessage::decode(&bytes) else { panic!("it is a call") };
            prop_assert_eq!(format!("{call:?}"), format!("{read:?}"));
            let rejected = encode_reject(RejectReason::Busy, &bytes);
            let Some(HubMessage::Reject { reason: RejectReason::Busy, message }) = HubMessage::decode(&rejected) else {
                panic!("it is a rejection")
            };
            prop_assert_eq!(message, &bytes);
            for end in 0..bytes.len() {
                // A truncated message is no call, and nothing panics.
                let whole = matches!(HubMessage::decode(&bytes[..end]), Some(HubMessage::Call(_)));
                prop_assert!(!whole);
            }
        }

        #[test]
        fn arbitrary_bytes_do_not_panic(bytes: Vec<u8>) {
            let _ = HubMessage::decode(&bytes);
        }

        #[test]
        fn answers_survive_a_round_trip(caller_id: Vec<u8>, load: u64, code: i64, message: String, data: Option<String>) {
            let data = data.map(|data| serde_json::value::to_raw_value(&data).unwrap());
            let result = serde_json::value::to_raw_value(&message).unwrap();
            let error = ProviderError { code, message: message.as_str().into(), data: data.map(Cow::Owned) };
            let failed = Error::new(Code::BadReply, message.clone()).executed(Executed::No);
            for answer in [CallAnswer::Result(&result), CallAnswer::Error(error), CallAnswer::Failed(failed)] {
                let bytes = encode_reply(&caller_id, load, &answer);
                let Some(HubMessage::Reply { caller_id: read_id, load: read_load, answer: read }) = HubMessage::decode(&bytes) else {
                    panic!("it is a reply")
                };
                prop_assert_eq!((read_id, read_load), (&caller_id[..], load));
                let text = |answer: &CallAnswer<'_>| match answer {
                    CallAnswer::Result(result) => result.get().to_owned(),
                    CallAnswer::Error(error) => error.to_raw().get().to_owned(),
                    CallAnswer::Failed(error) => error.to_rpc().to_string(),
                };
                prop_assert_eq!(text(&read), text(&answer));
            }
        }
    }

    #[test]
    fn small_messages() {
        for (takeover, probe) in [(true, false), (false, true), (true, true)] {
            let query = NameQuery { number: 7, service: "s", subject: "u", takeover, probe };
            assert!(matches!(HubMessage::decode(&query.encode()), Some(HubMessage::NameQuery(read)) if read == query));
        }
        assert!(matches!(
            HubMessage::decode(&encode_name_reply(300, true)),
            Some(HubMessage::NameReply { number: 300, held: true })
        ));
        assert!(matches!(HubMessage::decode(&encode_cancel(9)), Some(HubMessage::Cancel { id: 9 })));
        assert!(matches!(HubMessage::decode(HEARTBEAT_MESSAGE), Some(HubMessage::Heartbeat { ack: false })));
        assert!(matches!(HubMessage::decode(HEARTBEAT_ACK_MESSAGE), Some(HubMessage::Heartbeat { ack: true })));
        assert!(HubMessage::decode(&[200, 1, 2]).is_none());
        let caller_id = remote_caller_id(42, "jwt");
        assert_eq!(parse_remote_caller_id(caller_id.id()), Some((CallId::from_u64(42), "jwt")));
    }
}
