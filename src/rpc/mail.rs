//! What nodes write to each other about calls. Numbers are varints, ids eight bytes, texts have their length before them.
//!
//! What is not understood is left out: a node of a later version does not say it to one of this.

use std::borrow::Cow;

use serde_json::value::RawValue;

use super::{CallAnswer, CallId, CallerId, ProviderError, services::Request};
use crate::{
    cluster::NodeId,
    error::{Code, Error, Executed},
};

/// A mail as it is read.
#[derive(Debug)]
pub(super) enum Mail<'a> {
    /// For one provider of the receiver.
    Call(Called<'a>),
    /// The answer, in time or not; the load of the service where it was made.
    Reply { tag: &'a [u8], load: u64, answer: CallAnswer<'a> },
    /// Nobody has got this call, nor will: the mail in which it came, and why.
    Return { why: Why, mail: &'a [u8] },
    /// The caller gave up.
    Cancel { id: u64 },
    /// Shows that nothing was lost, or that something was. `back`: it answers one.
    Beat { back: bool },
    /// May the sender have this service?
    Ask(Ask<'a>),
    /// The answer to that: it may not, if it is `held`.
    Told { ask: u64, held: bool },
}

/// A call or notification of another node.
#[derive(Debug)]
pub(super) struct Called<'a> {
    /// None: a notification.
    pub id: Option<u64>,
    pub service: &'a str,
    pub request: Request<'a>,
    /// Milliseconds that are left.
    pub left: u64,
    /// What the sender knew of the receiver as a holder of the service.
    pub rev: u64,
    /// Nodes that returned it.
    pub tried: Vec<NodeId>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Ask<'a> {
    pub ask: u64,
    pub service: &'a str,
    pub subject: &'a str,
    pub takeover: bool,
    /// A provider that is dead holds nothing.
    pub probe: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(super) enum Why {
    /// All providers there have as many calls as they take.
    Busy = 0,
    /// There is none.
    NotHere = 1,
}

const CALL: u8 = 1;
const REPLY: u8 = 2;
const RETURN: u8 = 3;
const CANCEL: u8 = 4;
const BEAT: u8 = 5;
const ASK: u8 = 6;
const TOLD: u8 = 7;
const BEAT_BACK: u8 = 8;

const HAS_ID: u8 = 1;
const LATE: u8 = 2;
const PARAMS: u8 = 4;
const AS_SENT: u8 = 8;
const TRACEPARENT: u8 = 16;
const WAIT: u8 = 32;

pub(super) const BEAT_MAIL: &[u8] = &[BEAT];
pub(super) const BEAT_BACK_MAIL: &[u8] = &[BEAT_BACK];

// === writing ===

impl Called<'_> {
    pub fn write(&self) -> Vec<u8> {
        let Request { method, params, as_sent, caller, traceparent, wait, late } = self.request;
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
        number(&mut out, self.left);
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

pub(super) fn reply(tag: &[u8], load: u64, answer: &CallAnswer<'_>) -> Vec<u8> {
    let mut out = vec![REPLY];
    bytes(&mut out, tag);
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

pub(super) fn give_back(why: Why, mail: &[u8]) -> Vec<u8> {
    let mut out = vec![RETURN, why as u8];
    out.extend_from_slice(mail);
    out
}

pub(super) fn cancel(id: u64) -> Vec<u8> {
    let mut out = vec![CANCEL];
    out.extend_from_slice(&id.to_le_bytes());
    out
}

impl Ask<'_> {
    pub fn write(&self) -> Vec<u8> {
        let mut out = vec![ASK];
        number(&mut out, self.ask);
        out.push(u8::from(self.takeover) | u8::from(self.probe) << 1);
        text(&mut out, self.service);
        text(&mut out, self.subject);
        out
    }
}

pub(super) fn told(ask: u64, held: bool) -> Vec<u8> {
    let mut out = vec![TOLD];
    number(&mut out, ask);
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

impl<'a> Mail<'a> {
    /// None: it is of a kind, or in a form, that this version does not know.
    pub fn read(mail: &'a [u8]) -> Option<Self> {
        let mut from = Reader(mail);
        Some(match from.byte()? {
            CALL => Mail::Call(from.called()?),
            REPLY => Mail::Reply { tag: from.bytes()?, load: from.number()?, answer: from.answer()? },
            RETURN => {
                let why = match from.byte()? {
                    0 => Why::Busy,
                    _ => Why::NotHere,
                };
                Mail::Return { why, mail: from.0 }
            }
            CANCEL => Mail::Cancel { id: from.id()? },
            BEAT => Mail::Beat { back: false },
            BEAT_BACK => Mail::Beat { back: true },
            ASK => {
                let (ask, flags) = (from.number()?, from.byte()?);
                let (takeover, probe) = (flags & 1 != 0, flags & 2 != 0);
                Mail::Ask(Ask { ask, takeover, probe, service: from.text()?, subject: from.text()? })
            }
            TOLD => Mail::Told { ask: from.number()?, held: from.byte()? != 0 },
            _ => return None,
        })
    }
}

struct Reader<'a>(&'a [u8]);

impl<'a> Reader<'a> {
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

    fn called(&mut self) -> Option<Called<'a>> {
        let flags = self.byte()?;
        let has = |flag| flags & flag != 0;
        let id = if has(HAS_ID) { Some(self.id()?) } else { None };
        let (left, rev, tried) = (self.number()?, self.number()?, self.number()?);
        let mut nodes = Vec::new();
        for _ in 0..tried {
            nodes.push(NodeId(self.id()?));
        }
        let (service, method, caller) = (self.text()?, self.text()?, self.text()?);
        let params = if has(PARAMS) { Some(self.json()?) } else { None };
        let as_sent = if has(AS_SENT) { Some(self.json()?) } else { None };
        let traceparent = if has(TRACEPARENT) { Some(self.text()?) } else { None };
        let wait = if has(WAIT) { Some(self.number()?) } else { None };
        let request = Request { method, params, as_sent, caller, traceparent, wait, late: has(LATE) };
        Some(Called { id, service, request, left, rev, tried: nodes })
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
                // A code of a later version: what is sure is that it was not answered.
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

// === tags ===

/// Under what the receiver knows the call `id` of another node.
pub(super) fn tag(id: u64, service: &str) -> CallerId {
    let mut tag = Vec::with_capacity(8 + service.len());
    tag.extend_from_slice(&id.to_le_bytes());
    tag.extend_from_slice(service.as_bytes());
    CallerId::new(&tag)
}

pub(super) fn read_tag(tag: &[u8]) -> Option<(CallId, &str)> {
    let (id, service) = tag.split_first_chunk::<8>()?;
    Some((CallId::from_number(u64::from_le_bytes(*id)), str::from_utf8(service).ok()?))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn a_call_is_read_as_it_was_written(
            (id, left, rev, tried) in (any::<Option<u64>>(), any::<u64>(), any::<u64>(), prop::collection::vec(any::<u64>(), 0..4)),
            (service, method, caller) in (".{0,300}", ".*", ".*"),
            (params, traceparent, wait, late) in (any::<Option<Vec<String>>>(), any::<Option<String>>(), any::<Option<u64>>(), any::<bool>()),
        ) {
            let json = params.map(|params| serde_json::value::to_raw_value(&params).unwrap());
            let (params, as_sent) = (json.as_deref(), json.as_deref().filter(|_| late));
            let request = Request {
                method: &method, params, as_sent, caller: &caller, traceparent: traceparent.as_deref(), wait, late,
            };
            let tried: Vec<_> = tried.into_iter().map(NodeId).collect();
            let called = Called { id, service: &service, request, left, rev, tried };
            let bytes = called.write();
            let Some(Mail::Call(read)) = Mail::read(&bytes) else { panic!("it is a call") };
            prop_assert_eq!(format!("{called:?}"), format!("{read:?}"));
            let back = give_back(Why::Busy, &bytes);
            let Some(Mail::Return { why: Why::Busy, mail }) = Mail::read(&back) else { panic!("it is a return") };
            prop_assert_eq!(mail, &bytes);
            for end in 0..bytes.len() {
                // Cut short it is none, and nothing panics.
                let whole = matches!(Mail::read(&bytes[..end]), Some(Mail::Call(_)));
                prop_assert!(!whole);
            }
        }

        #[test]
        fn whatever_comes_is_read_or_left(bytes: Vec<u8>) {
            let _ = Mail::read(&bytes);
        }

        #[test]
        fn answers(tag: Vec<u8>, load: u64, code: i64, message: String, data: Option<String>) {
            let data = data.map(|data| serde_json::value::to_raw_value(&data).unwrap());
            let result = serde_json::value::to_raw_value(&message).unwrap();
            let error = ProviderError { code, message: message.as_str().into(), data: data.map(Cow::Owned) };
            let failed = Error::new(Code::BadReply, message.clone()).executed(Executed::No);
            for answer in [CallAnswer::Result(&result), CallAnswer::Error(error), CallAnswer::Failed(failed)] {
                let bytes = reply(&tag, load, &answer);
                let Some(Mail::Reply { tag: read_tag, load: read_load, answer: read }) = Mail::read(&bytes) else {
                    panic!("it is a reply")
                };
                prop_assert_eq!((read_tag, read_load), (&tag[..], load));
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
    fn small_mails() {
        for (takeover, probe) in [(true, false), (false, true), (true, true)] {
            let ask = Ask { ask: 7, service: "s", subject: "u", takeover, probe };
            assert!(matches!(Mail::read(&ask.write()), Some(Mail::Ask(read)) if read == ask));
        }
        assert!(matches!(Mail::read(&told(300, true)), Some(Mail::Told { ask: 300, held: true })));
        assert!(matches!(Mail::read(&cancel(9)), Some(Mail::Cancel { id: 9 })));
        assert!(matches!(Mail::read(BEAT_MAIL), Some(Mail::Beat { back: false })));
        assert!(matches!(Mail::read(BEAT_BACK_MAIL), Some(Mail::Beat { back: true })));
        assert!(Mail::read(&[200, 1, 2]).is_none());
        let tag = tag(42, "jwt");
        assert_eq!(read_tag(tag.id()), Some((CallId::from_number(42), "jwt")));
    }
}
